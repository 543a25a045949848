"""A batch whose rows go through different adapters: values and gradients are those of one batch for each."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_llama import llama, move
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from trimtab import PeftModel, get_peft_model, inject_adapter_in_model
from trimtab.core.adapter import ModelAdapter
from trimtab.core.config import config_for, load, methods
from trimtab.errors import ConfigError, NoMatch, NotSupported, TrainingError
from trimtab.model import checkpoint_activations

IDS = torch.randint(3, 37, (5, 6), generator=torch.Generator().manual_seed(4))
NAMES = ["b", "__base__", "a", "b", "a"]
MASK = torch.ones_like(IDS)
MASK[0, :2] = MASK[3, :3] = 0
TARGETS = ["embed_tokens", "q_proj", "v_proj", "down_proj"]


def small(method: str) -> list[str]:
    """The layers of the model that the method fits."""
    found = []
    for name in [*TARGETS, "input_layernorm"]:
        try:
            get_peft_model(llama(), config_for(method, **load(method).small | {"target_modules": [name]}))
            found.append(name)
        except NotSupported:
            continue
    return found


def two(method: str = "lora", other: str = "ia3", **more: Any) -> PeftModel:
    """Adapters a and b of two methods on other layers, moved off their start, and c, which is active."""
    where = small(method)
    model = get_peft_model(llama(), config_for(method, **load(method).small | {"target_modules": where} | more), "a")
    model.add_adapter("b", config_for(other, target_modules=["q_proj", "k_proj"], feedforward_modules=[]))
    model.add_adapter("c", config_for("lora", target_modules=["q_proj"], r=2))
    for seed, name in enumerate("abc"):
        model.set_adapter(name)
        move(model, seed)
    return model.eval()


def one_by_one(model: PeftModel, **call: Any) -> Tensor:
    """The definition: one batch for each adapter."""
    out: list[Any] = [None] * len(NAMES)
    for name in dict.fromkeys(NAMES):
        rows = [i for i, n in enumerate(NAMES) if n == name]
        own = {k: v[rows] for k, v in call.items()}
        if name == "__base__":
            with model.disable_adapter():
                y = model(**own).logits
        else:
            model.set_adapter(name)
            y = model(**own).logits
        for i, row in zip(rows, y, strict=True):
            out[i] = row
    model.set_adapter("c")
    return torch.stack(out)


def layer_methods() -> list[str]:
    return [m for m in methods() if not issubclass(load(m).adapter, ModelAdapter) and not load(m).adapter.among]


@pytest.mark.parametrize("method", layer_methods())
def test_each_row_goes_through_its_own_adapter(method: str) -> None:
    model, call = two(method), {"input_ids": IDS, "attention_mask": MASK}
    if load(method).adapter.noisy:
        assert not model.training
    want = one_by_one(model, **call)
    got = model(**call, adapter_names=NAMES).logits
    assert (got - want).abs().max() < 2e-5
    assert all((want[i] - model(**call).logits[i]).abs().max() > 1e-3 for i in range(5))  # c is another one


def gradients(model: PeftModel, *, mixed: bool) -> dict[str, Tensor]:
    """Of every adapter's tensors, for one fixed direction at the logits."""
    direction = torch.randn(5, 6, 37, generator=torch.Generator().manual_seed(1))
    for name in "abc":
        model.set_requires_grad(name)
    if mixed:
        (model(input_ids=IDS, adapter_names=NAMES).logits * direction).sum().backward()
    for name in "" if mixed else "ab":
        rows = [i for i, n in enumerate(NAMES) if n == name]
        model.set_adapter(name)
        (model(input_ids=IDS[rows]).logits * direction[rows]).sum().backward()
    own = {n: p.grad for n, p in model.named_parameters() if ".adapters." in n}
    return {n: torch.zeros(1) if g is None else g for n, g in own.items()}


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
def test_gradients_are_those_of_one_batch_for_each(again: bool) -> None:
    want, model = gradients(two().train(), mixed=False), two().train()
    if again:
        checkpoint_activations(model.get_base_model())
    got = gradients(model, mixed=True)
    assert got.keys() == want.keys() and len(got) > 15
    for name, g in want.items():
        assert (g.abs().max() > 0) == (".c." not in name)
        assert (got[name] - g).abs().max() < 1e-5, name


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generate_writes_what_each_adapter_writes_alone(options: dict[str, Any]) -> None:
    model, n = two(), options.get("num_return_sequences", 1)
    options = options | {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    got = model.generate(input_ids=IDS, attention_mask=MASK, adapter_names=NAMES, **options)
    assert got.shape == (5 * n, 11)
    for i, name in enumerate(NAMES):
        one = {"input_ids": IDS[i : i + 1], "attention_mask": MASK[i : i + 1]} | options
        if name == "__base__":
            with model.disable_adapter():
                want = model.generate(**one)
        else:
            model.set_adapter(name)
            want = model.generate(**one)
        assert torch.equal(got[i * n : (i + 1) * n], want)
    texts = model.generate(input_ids=IDS[:1].expand(2, -1), adapter_names=["a", "__base__"], **options)
    assert not torch.equal(texts[0], texts[n])


def t5() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(vocab_size=37, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    made = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=None))
    with torch.no_grad():
        for n, p in made.named_parameters():
            if "EncDecAttention" in n or n.endswith("lm_head.weight"):
                p.normal_(std=0.5)
    return made.eval()


@pytest.mark.parametrize("beams", [1, 2])
def test_an_encoder_decoder_model(beams: int) -> None:
    model = get_peft_model(t5(), config_for("lora", target_modules=["q", "v", "wo"], r=2), "a")
    move(model, 1)
    model.add_adapter("b", config_for("oft", target_modules=["q"], oft_block_size=4))
    model.set_adapter("b")
    move(model, 2)
    model.eval()
    decoder = IDS[:, :4]
    got = model(input_ids=IDS, decoder_input_ids=decoder, adapter_names=NAMES).logits
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    text = model.generate(input_ids=IDS, adapter_names=NAMES, **options)
    for i, name in enumerate(NAMES):
        if name != "__base__":
            model.set_adapter(name)
            one = IDS[i : i + 1]
            assert (model(input_ids=one, decoder_input_ids=decoder[i : i + 1]).logits - got[i]).abs().max() < 1e-5
            assert torch.equal(model.generate(input_ids=one, **options), text[i : i + 1])


def test_trained_modules_and_biases_go_by_row() -> None:
    where: dict[str, Any] = dict(target_modules=["q_proj"], r=2)
    model = get_peft_model(llama(attention_bias=True), config_for("lora", **where, modules_to_save=["lm_head"]), "a")
    move(model, 1)
    model.add_adapter("b", config_for("lora", **where, bias="all"))
    model.set_adapter("b")
    move(model, 2)
    model.add_adapter("c", config_for("lora", **where))
    want = one_by_one(model.eval(), input_ids=IDS)
    assert (model(input_ids=IDS, adapter_names=NAMES).logits - want).abs().max() < 1e-5


def test_an_injected_model_takes_the_same_argument() -> None:
    model = inject_adapter_in_model(config_for("lora", target_modules=["q_proj"], init_lora_weights=False), llama(), "a")
    plain = llama()(IDS).logits
    got = model(IDS, adapter_names=["a", "__base__", "a", "a", "a"]).logits
    assert (got[1] - plain[1]).abs().max() < 1e-6 and (got[0] - plain[0]).abs().max() > 1e-4
    assert torch.equal(got[0], model(IDS).logits[0])


def test_wrong_names_are_errors_before_anything_is_computed() -> None:
    model = two()
    want = model(IDS).logits
    with pytest.raises(NoMatch, match=r"no adapter is called 'frensh'.*a, b, c"):
        model(IDS, adapter_names=["a", "a", "frensh", "a", "a"])
    with pytest.raises(ConfigError, match="3 names for a batch of 5 rows"):
        model(IDS, adapter_names=["a", "b", "a"])
    with pytest.raises(ConfigError, match="list"):
        model(IDS, adapter_names="a")
    with pytest.raises(ConfigError, match="2 names for a batch of 5 rows"):
        model.generate(input_ids=IDS, adapter_names=["a", "b"], max_new_tokens=2)
    model.merge_adapter(["c"])
    with pytest.raises(NotSupported, match=r"unmerge_adapter\(\)"):
        model(IDS, adapter_names=NAMES)
    model.unmerge_adapter()
    assert torch.equal(model(IDS).logits, want)  # nothing stays


def test_a_prompt_cannot_share_a_batch() -> None:
    model = two()
    model.add_adapter("prompt", config_for("prompt_tuning", num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(NotSupported, match="'prompt' is a prompt method"):
        model(IDS, adapter_names=["prompt", "a", "a", "b", "b"])
    model.set_adapter("prompt")
    with pytest.raises(NotSupported, match="'prompt' is a prompt method"):
        model(IDS, adapter_names=NAMES)
    model.set_adapter("c")
    assert model(IDS, adapter_names=NAMES).logits.shape == (5, 6, 37)


class Experts(nn.Module):
    """Tokens of all rows in one long list, some of them for each expert, as mixtures of experts have them."""

    def __init__(self, tokens: list[int]) -> None:
        super().__init__()
        self.embed, self.tokens = nn.Embedding(37, 8), tokens
        self.layers = nn.ModuleList([nn.ModuleDict({"expert": nn.Linear(8, 8), "mlp": nn.Linear(8, 8)})])
        self.score = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.embed(input_ids)
        flat = h.flatten(0, 1)
        chosen = self.layers[0]["expert"](flat[self.tokens])  # type: ignore[index]
        h = flat.index_add(0, torch.tensor(self.tokens), chosen).view_as(h)
        return self.score(self.layers[0]["mlp"](h).mean(1))  # type: ignore[index]


@pytest.mark.parametrize("tokens", [[0, 7, 11], [11, 0, 7, 2, 3]], ids=["fewer", "as many as rows"])
def test_tokens_that_are_no_rows_are_refused_and_not_taken_for_rows(tokens: list[int]) -> None:
    model = get_peft_model(Experts(tokens), config_for("lora", target_modules=["expert"], init_lora_weights=False), "a")
    model.add_adapter("b", config_for("lora", target_modules=["mlp", "score"], init_lora_weights=False))
    with pytest.raises(NotSupported, match=r"'layers.0.expert' gets \(\d, 8\)"):
        model(IDS, adapter_names=NAMES)
    without = ["b", "__base__", "b", "b", "__base__"]  # the expert is the base's for all of them; score has a row each
    with model.disable_adapter():
        base = model(IDS)
    model.set_adapter("b")
    want = torch.where(torch.tensor([n == "b" for n in without])[:, None], model(IDS), base)
    assert (model(IDS, adapter_names=without) - want).abs().max() < 1e-6


def test_nothing_stays_for_a_later_call_or_for_layers_called_by_themselves() -> None:
    model, x = two(), torch.randn(5, 6, 16)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    want, plain = layer(x), model(IDS).logits
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            model(IDS, adapter_names=NAMES)
            assert torch.equal(layer(x), want) and torch.equal(model.get_base_model().model(IDS)[0], model.model(IDS)[0])
            assert torch.equal(copy.deepcopy(model)(IDS).logits, plain) and torch.equal(model(IDS).logits, plain)
    before = llama()
    hooks = len(before._forward_pre_hooks), len(before._forward_hooks)
    bare = get_peft_model(before, config_for("lora", target_modules=["q_proj"])).unload()
    assert (len(bare._forward_pre_hooks), len(bare._forward_hooks)) == hooks == (0, 0)


def test_a_second_forward_before_the_backward_is_an_error_when_layers_are_computed_again() -> None:
    def step(names: list[str], later: list[str] | None, *, again: bool, grad: bool = True) -> Tensor:
        model = two().train()
        model.set_requires_grad("a")
        if again:
            checkpoint_activations(model.get_base_model())
        loss = model(IDS, adapter_names=names).logits.square().sum()
        with torch.set_grad_enabled(grad):
            model(IDS, adapter_names=later)
        loss.backward()
        return model.get_base_model().model.layers[0].self_attn.q_proj.lora_A["a"].weight.grad

    want = step(NAMES, NAMES, again=False)
    for later in (NAMES[::-1], None):
        assert torch.equal(step(NAMES, later, again=False), want)
        assert (step(NAMES, later, again=True, grad=False) - want).abs().max() < 1e-5  # an evaluation in between
        with pytest.raises(TrainingError, match="call backward before the next forward"):
            step(NAMES, later, again=True)
    assert (step(NAMES, NAMES, again=True) - want).abs().max() < 1e-5  # the same rows: nothing to mistake

"""Bottleneck adapters, Compacter and LoReFT, written out by hand on whole models, and where they stand in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from trimtab import PeftModel, get_peft_model
from trimtab.core.config import config_for
from trimtab.core.group import adapted
from trimtab.errors import ConfigError, NotSupported

D = 16
SIZES: dict[str, Any] = dict(vocab_size=37, hidden_size=D, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=None)).double().eval()


def bert() -> Any:
    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZES), add_pooling_layer=False).double().eval()


def adapt(model: Any, method: str, **options: Any) -> Any:
    """In double precision, moved off its start."""
    made = get_peft_model(model, config_for(method, **options)).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=draw).to(p))
    return made


def site(model: Any, path: str) -> Any:
    return dict(adapted(model.get_base_model()))[path].adapters["default"]


IDS = torch.tensor([[5, 9, 3, 11, 7], [0, 0, 8, 4, 30]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


def network(a: Any, z: Tensor, act: Any) -> Tensor:
    down, up = a.adapter_down[0], a.adapter_up
    return act(z @ down.weight.T + down.bias) @ up.weight.T + up.bias


def llama_by_hand(model: Any, change: Any) -> Tensor:
    """The last hidden states; `change(kind, layer, x, y)` is what a block of either kind, or the whole layer, answers."""
    plain, body = llama(), None
    body = plain.model
    h = body.embed_tokens(IDS)
    rope = body.rotary_emb(h, torch.arange(5)[None])
    blocked = torch.full((5, 5), float("-inf")).triu(1).double()[None, None]
    for i, layer in enumerate(body.layers):
        x = layer.input_layernorm(h)
        h = h + change("attention", i, x, layer.self_attn(x, position_embeddings=rope, attention_mask=blocked)[0])
        x = layer.post_attention_layernorm(h)
        h = h + change("feed-forward", i, x, layer.mlp(x))
        h = change("layer", i, h, h)
    return body.norm(h)


def hidden(model: Any) -> Tensor:
    return model.get_base_model().model(input_ids=IDS).last_hidden_state


PLACE = {"attention": "self_attn", "feed-forward": "mlp"}
FORMS: dict[str, tuple[dict[str, Any], Any]] = {
    "houlsby": ({}, lambda m: lambda kind, i, x, y: y if kind == "layer" else
        y + network(site(m, f"model.layers.{i}.{PLACE[kind]}"), y, nn.functional.silu)),
    "he": ({"mh_adapter": False, "is_parallel": True, "scaling": 4.0, "non_linearity": "relu"},
        lambda m: lambda kind, i, x, y: y if kind != "feed-forward" else
        y + 4 * network(site(m, f"model.layers.{i}.mlp"), x, torch.relu)),
    "pfeiffer": ({"mh_adapter": False, "original_ln_before": True, "non_linearity": "relu"},
        lambda m: lambda kind, i, x, y: y if kind != "layer" else
        y + network(site(m, f"model.layers.{i}"), y, torch.relu)),
    "channel": ({"output_adapter": False, "scaling": "channel", "non_linearity": "tanh"},
        lambda m: lambda kind, i, x, y: y if kind != "attention" else
        y + site(m, f"model.layers.{i}.self_attn").scaling * network(site(m, f"model.layers.{i}.self_attn"), y, torch.tanh)),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_bottleneck_in_llama(form: str) -> None:
    options, by_hand = FORMS[form]
    model = adapt(llama(), "bottleneck", reduction_factor=4, **options)
    want = llama_by_hand(model, by_hand(model))
    assert (hidden(model) - want).abs().max() < 1e-12
    assert (want - llama_by_hand(model, lambda kind, i, x, y: y)).abs().max() > 1e-2
    assert {a.adapter_down[0].weight.shape for _, a in model.get_base_model().trimtab_groups["default"].sites()} == {(4, D)}


def test_a_bottleneck_before_the_norm_of_bert() -> None:
    """Pfeiffer's: LN(A(LN(f + x)) + f + x) behind feed-forward; Houlsby's: LN(A(f) + f + x)."""
    model = adapt(bert(), "bottleneck", reduction_factor=4, mh_adapter=False, original_ln_before=True, non_linearity="relu")
    both = adapt(bert(), "bottleneck", reduction_factor=4, non_linearity="relu")
    assert [n for n, _ in adapted(model.get_base_model())] == [f"encoder.layer.{i}.output.LayerNorm" for i in (0, 1)]
    plain = bert()
    x, f, layer = torch.randn(2, 3, D).double(), torch.randn(2, 3, 24).double(), plain.encoder.layer[1].output
    u = layer.dense(f) + x
    a = site(model, "encoder.layer.1.output.LayerNorm")
    want = layer.LayerNorm(network(a, layer.LayerNorm(u), torch.relu) + u)
    assert (model.get_base_model().encoder.layer[1].output(f, x) - want).abs().max() < 1e-12
    a = site(both, "encoder.layer.1.output.dense")
    want = layer.LayerNorm(network(a, layer.dense(f), torch.relu) + u)
    assert (both.get_base_model().encoder.layer[1].output(f, x) - want).abs().max() < 1e-12
    assert len(list(adapted(both.get_base_model()))) == 4


def test_bottlenecks_in_t5_stand_behind_self_attention_and_feed_forward() -> None:
    sizes: dict[str, Any] = dict(vocab_size=37, d_model=D, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    model = adapt(T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)), "bottleneck")
    assert [n for n, _ in adapted(model.get_base_model())] == [
        "encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.1.DenseReluDense",
        "decoder.block.0.layer.0.SelfAttention", "decoder.block.0.layer.2.DenseReluDense",
    ]  # fmt: skip
    with torch.no_grad():
        y = model(input_ids=IDS, decoder_input_ids=IDS).logits
        with model.disable_adapter():
            assert (model(input_ids=IDS, decoder_input_ids=IDS).logits - y).abs().max() > 1e-3


@pytest.mark.parametrize("shared", [True, False])
def test_compacter_s_matrices_are_sums_of_kronecker_products(shared: bool) -> None:
    options: dict[str, Any] = dict(reduction_factor=4, phm_dim=2, phm_rank=3, shared_phm_rule=shared, target_modules=["mlp"])
    model = adapt(llama(), "compacter", **options)
    a = site(model, "model.layers.1.mlp")
    matrices = []
    for part in (a.adapter_down, a.adapter_up):
        A = a.shared.phm_rule if shared else part.rule.phm_rule
        matrices.append(sum(torch.kron(A[i], part.W_left[i] @ part.W_right[i]) for i in range(2)))
    assert [tuple(m.shape) for m in matrices] == [(D, 4), (4, D)]
    x = torch.randn(2, 3, D).double()
    mlp = model.get_base_model().model.layers[1].mlp
    y = mlp.base_layer(x)
    want = y + nn.functional.gelu(y @ matrices[0] + a.adapter_down.b) @ matrices[1] + a.adapter_up.b
    assert (mlp(x) - want).abs().max() < 1e-12 and (want - y).abs().max() > 1e-2
    rules = {id(site(model, f"model.layers.{i}.mlp").shared) for i in (0, 1)}
    assert len(rules) == 1


def test_compacter_s_file_holds_the_rule_once(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    options: dict[str, Any] = dict(phm_dim=2, target_modules=["mlp"], learn_phm=False)
    model = adapt(llama(), "compacter", **options)
    assert not any("rule" in n for n, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    names = [n for n in load_file(tmp_path / "adapter_model.safetensors") if "rule" in n]
    assert names == ["base_model.phm_rule"]
    assert torch.equal(hidden(PeftModel.from_pretrained(llama(), tmp_path)), hidden(model))


@pytest.mark.parametrize("options", [{}, {"orthogonality": False}, {"orthogonality": False, "subtract_projection": False}])
def test_loreft_edits_what_it_says_where_it_says(options: dict[str, Any]) -> None:
    model = adapt(llama(), "loreft", r=3, prefix_positions=2, suffix_positions=1, non_linearity="relu", **options)

    def edit(kind: str, i: int, x: Tensor, h: Tensor) -> Tensor:
        if kind != "layer":
            return h
        made = h.clone()
        for unit, tokens in (("0", [0, 1]), ("1", [4])):
            u = site(model, f"model.layers.{i}").units[unit]
            P, W = u.projection.weight, u.learned_source.weight
            if not options:  # Gram-Schmidt, a row at a time
                rows: list[Tensor] = []
                for v in P:
                    v = v - sum((v @ r) * r for r in rows)
                    rows.append(v / v.norm())
                P = torch.stack(rows)
                assert (P @ P.T - torch.eye(3)).abs().max() < 1e-12
            z = torch.relu(h[:, tokens] @ W.T + u.learned_source.bias)
            made[:, tokens] += (z - h[:, tokens] @ P.T if "subtract_projection" not in options else z) @ P
        return made

    with torch.no_grad():
        want = llama_by_hand(model, edit)
        got = model(input_ids=IDS, output_hidden_states=False).logits
        assert (got - llama().lm_head(want)).abs().max() < 1e-12


def test_loreft_counts_from_the_first_token_and_to_the_first_label() -> None:
    model = adapt(llama(), "loreft", r=3, prefix_positions=2, suffix_positions=2, layers=[1], dropout=0.0)
    group = model.get_base_model().trimtab_groups["default"]
    assert list(group.layers) == ["model.layers.1"]
    kind = type(site(model, "model.layers.1"))

    def where(**given: Any) -> list[list[int]]:
        call = type("Call", (), {"cache": given.pop("cache", None), "tokens": True, "kept": {}})()
        return kind.enter(group, call, given).tolist()

    assert where(input_ids=IDS, attention_mask=MASK) == [[1, 1, 0, 2, 2], [0, 0, 1, 1, 2]]
    labels = torch.tensor([[-100, -100, -100, 11, 7], [-100, -100, -100, 4, -100]])
    assert where(input_ids=IDS, attention_mask=MASK, labels=labels) == [[1, 1, 2, 0, 0], [0, 0, 1, 1, 0]]
    with torch.no_grad():
        out = model(input_ids=IDS, attention_mask=MASK, use_cache=True)
        wide = torch.cat([MASK, torch.ones(2, 1).long()], 1)
        after = where(input_ids=IDS[:, :1], attention_mask=wide, cache=out.past_key_values)
        assert after == [[0], [0]]
        packed = torch.tensor([[0, 1, 2, 0, 1]])
        model.peft_config["default"].suffix_positions = 0
        assert where(input_ids=IDS[:1], position_ids=packed) == [[1, 1, 0, 1, 1]]
        model.peft_config["default"].suffix_positions = 2
    model.train()
    with pytest.raises(ConfigError, match="where labels begin"):
        model(input_ids=IDS)
    with pytest.raises(NotSupported, match="packed"):
        model(input_ids=IDS, layout=torch.zeros(1))


def test_places_that_are_not_there_are_told() -> None:
    with pytest.raises(ConfigError, match="blocks of 'Linear' are not known"):
        get_peft_model(nn.Linear(3, 3), config_for("bottleneck"))
    with pytest.raises(ConfigError, match="only behind feed-forward"):
        get_peft_model(llama(), config_for("bottleneck", original_ln_before=True))
    with pytest.raises(ConfigError, match="no place"):
        get_peft_model(llama(), config_for("bottleneck", mh_adapter=False, output_adapter=False))
    with pytest.raises(NotSupported, match="is a part of it"):
        get_peft_model(bert(), config_for("bottleneck", is_parallel=True, mh_adapter=False))
    with pytest.raises(NotSupported, match="does not divide"):
        get_peft_model(llama(), config_for("compacter", phm_dim=5))
    with pytest.raises(NotSupported, match="r=17 of 16"):
        get_peft_model(llama(), config_for("loreft", r=17))

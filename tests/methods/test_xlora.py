"""X-LoRA: scalings by token, experts of any name, saving and loading, gradients where layers are computed again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_llama import endless
from torch import Tensor

from trimtab import LoraConfig, PeftModel, get_peft_model
from trimtab.core.config import config_for
from trimtab.errors import BadCheckpoint, ConfigError, NoMatch, NotMergeable, NotSupported, TrainingError
from trimtab.model import checkpoint_activations

IDS = torch.randint(3, 37, (3, 5), generator=torch.Generator().manual_seed(4))


def llama() -> Any:
    return endless(4)


def folders(where: Path, targets: list[str]) -> dict[str, str]:
    """Two experts, one of which stands on one kind of layer more."""
    found = {}
    for i, name in enumerate(("law", "french")):
        config = LoraConfig(r=2, init_lora_weights=False, target_modules=targets[: 2 + i], task_type="CAUSAL_LM")
        torch.manual_seed(i)
        get_peft_model(llama(), config).save_pretrained(where / name)
        found[name] = str(where / name)
    return found


def xlora(where: Path, **more: Any) -> PeftModel:
    adapters = folders(where, ["q_proj", "v_proj", "embed_tokens"])
    fields: dict[str, Any] = {"adapters": adapters, "xlora_depth": 2, "xlora_size": 8, "task_type": "CAUSAL_LM"}
    model = get_peft_model(llama(), config_for("xlora", **fields | more)).eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.requires_grad and "lora_A" not in n and "lora_B" not in n and "embedding" not in n:
                p.normal_(generator=torch.Generator().manual_seed(len(n)))
    return model


OPTIONS: list[dict[str, Any]] = [
    {},
    {"layerwise_scalings": True, "softmax_temperature": 0.5, "global_scaling_weight": 2.0},
    {"top_k_lora": 1, "enable_softmax": False, "enable_softmax_topk": True, "xlora_depth": 1},
    {"enable_softmax": False, "scaling_pass_value": 0.5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_equation(options: dict[str, Any], tmp_path: Path) -> None:
    model = xlora(tmp_path, **options)
    layer: Any = model.get_base_model().model.layers[1].self_attn.q_proj
    seen: list[tuple[Tensor, Tensor]] = []
    layer.register_forward_hook(lambda m, args, y: seen.append((args[0], y)))
    model(IDS)
    _, (x, y) = seen  # the first pass, and the second
    p = model.get_latest_scalings()
    assert p is not None and p.shape == (3, 5, 5, 2)  # q and v in two layers, and the embedding
    experts = [layer.adapters[n] for n in ("french", "law")]  # in the order of their names
    delta = [e.s * x @ e.lora_A.weight.T @ e.lora_B.weight.T for e in experts]
    own = p[:, :, [n for n, _ in model.get_base_model().trimtab_groups["default"].sites()].index(layer.path)]
    if options.get("top_k_lora"):
        own = torch.nn.functional.one_hot(own.argmax(-1), 2).float()
    weight = options.get("global_scaling_weight", 1)
    want = layer.base_layer(x) + weight * sum(own[..., e, None] * d for e, d in enumerate(delta))
    assert (y - want).abs().max() < 1e-4 and (y - layer.base_layer(x)).abs().max() > 1e-2
    if not options.get("scaling_pass_value"):
        hidden: list[Tensor] = []
        with model.disable_adapter():
            hidden.append(model(IDS, output_hidden_states=True).hidden_states[-1])
        router = layer.adapters["default"].shared
        layers = router.internal_xlora_classifier.layers
        z = layers(hidden[0]).unflatten(-1, (-1, 2)).expand(-1, -1, 5, -1)
        z = (z / options.get("softmax_temperature", 1)).softmax(-1) if options.get("enable_softmax", True) else z
        assert (p - z).abs().max() < 1e-5


def test_saved_and_loaded_it_answers_the_same_with_the_experts_beside_it(tmp_path: Path) -> None:
    model = xlora(tmp_path / "experts", use_trainable_adapters=True)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert sum("lora_A" in n or "embedding_A" in n for n in trained) == 9 and sum("classifier" in n for n in trained) == 4
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_A" in n:
                p.mul_(1.5)  # so that the experts are others than those in the first folders
    model.save_pretrained(tmp_path / "saved")
    assert set(load_file(tmp_path / "saved" / "adapter_model.safetensors")) == {
        f"base_model.internal_xlora_classifier.layers.{i}.{k}" for i in (0, 3) for k in ("weight", "bias")
    }
    again = PeftModel.from_pretrained(llama(), tmp_path / "saved")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert not any(p.requires_grad for p in again.parameters())
    assert again.active_adapters == ["default"] and sorted(again.peft_config) == ["default", "french", "law"]


def test_only_the_classifier_is_trained_unless_the_experts_are_asked_for(tmp_path: Path) -> None:
    model = xlora(tmp_path)
    assert {n.rpartition("internal_xlora_classifier.")[2] for n, p in model.named_parameters() if p.requires_grad} == {
        "layers.0.weight", "layers.0.bias", "layers.3.weight", "layers.3.bias",
    }  # fmt: skip


@pytest.mark.parametrize("experts", [False, True], ids=["router", "experts-too"])
def test_gradients_are_the_same_when_layers_are_computed_again(experts: bool, tmp_path: Path) -> None:
    found: list[dict[str, Tensor]] = []
    for again in (False, True):
        model = xlora(tmp_path, use_trainable_adapters=experts, xlora_dropout_p=0.0).train()
        if again:
            checkpoint_activations(model.get_base_model())
        model(IDS, labels=IDS).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert len(found[0]) == (22 if experts else 4) and all(g.abs().max() > 0 for g in found[0].values())
    assert all((found[1][n] - g).abs().max() < 1e-5 * g.abs().max() + 1e-7 for n, g in found[0].items())
    losses = [model(ids, labels=ids).loss for ids in (IDS[:1], IDS[1:])]
    with pytest.raises(TrainingError, match="before the next forward"):
        sum(losses).backward()


def test_generate_is_greedy_decoding_by_repeated_forward(tmp_path: Path) -> None:
    model, out = xlora(tmp_path), IDS
    with torch.no_grad():
        for _ in range(5):
            out = torch.cat([out, model(out).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(model.generate(input_ids=IDS, max_new_tokens=5, do_sample=False), out)
    with model.disable_adapter():
        assert not torch.equal(model.generate(input_ids=IDS, max_new_tokens=5, do_sample=False), out)
    with pytest.raises(NotSupported, match="use_cache=False"):
        model.generate(input_ids=IDS, max_new_tokens=2, use_cache=True)
    with pytest.raises(NotSupported, match="use_cache=False"):
        model.get_base_model().generate(input_ids=IDS, max_new_tokens=2)
    model.set_adapter("law")  # an expert alone has a cache as ever
    assert model.generate(input_ids=IDS, max_new_tokens=2).shape == (3, 7)


def test_scalings_can_be_read_and_steered(tmp_path: Path) -> None:
    model = xlora(tmp_path)
    assert model.get_latest_scalings() is None
    model.enable_scalings_logging()
    plain = model(IDS).logits
    model(IDS[:, :3])
    model.disable_scalings_logging()
    model(IDS)
    log = model.get_scalings_log()
    assert [tuple(s.shape) for s in log] == [(3, 5, 5, 2), (3, 3, 5, 2)]
    assert {k: v[0] for k, v in model.get_bucketed_scalings_log().items()} == {5: [0], 3: [1]}
    model.clear_scalings_log()
    assert model.get_scalings_log() == [] and len(log) == 2
    model.set_global_scaling_weight(0.0)
    with model.disable_adapter():
        base = model(IDS).logits
    assert model.get_global_scaling_weight() == 0 and (model(IDS).logits - base).abs().max() < 1e-5
    model.set_global_scaling_weight(1.0)
    model.set_topk_lora(1)
    assert (model(IDS).logits - plain).abs().max() > 1e-4
    with pytest.raises(ConfigError, match="top_k_lora=3"):
        model.set_topk_lora(3)
    model.set_topk_lora(None)
    model.set_scaling_pass_value(None)
    assert model.peft_config["default"].scaling_pass_value == 0.5  # type: ignore[attr-defined]
    assert (model(IDS).logits - plain).abs().max() > 1e-4


def test_what_cannot_be_right_is_refused(tmp_path: Path) -> None:
    model = xlora(tmp_path)
    with pytest.raises(NotMergeable, match="token by token"):
        model.merge_adapter()
    with pytest.raises(NotSupported, match="share one"):
        model(IDS, adapter_names=["default", "law", "french"])
    assert model(IDS, adapter_names=["law", "law", "__base__"]).logits.shape == (3, 5, 37)
    with pytest.raises(NotSupported, match="by itself"):
        model.get_base_model().model.layers[0].self_attn.q_proj(torch.randn(1, 2, 16))
    model.delete_adapter("law")
    with pytest.raises(NoMatch, match="'law'"):
        model(IDS)
    base = llama()
    with pytest.raises(BadCheckpoint, match="nowhere"):
        more = {"nowhere": str(tmp_path / "nowhere")}
        get_peft_model(base, config_for("xlora", adapters=folders(tmp_path, ["q_proj", "v_proj"]) | more))
    assert not base.trimtab_groups and type(base.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    with pytest.raises(NotSupported, match="none stands"):
        get_peft_model(llama(), config_for("xlora"))
    with pytest.raises(NoMatch, match="no X-LoRA"):
        get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).get_latest_scalings()


def test_experts_keep_their_order_in_files() -> None:
    names = ["10", "2", "0", "law", "french"]
    assert list(config_for("xlora", adapters=dict.fromkeys(names, "")).adapters) == ["0", "2", "10", "french", "law"]  # type: ignore[attr-defined]

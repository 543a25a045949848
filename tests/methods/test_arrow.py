"""Arrow: which experts a token goes through, and what happens to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_llama import endless as llama
from torch import Tensor

from trimtab import ArrowConfig, LoraConfig, PeftModel, create_arrow_model, get_peft_model
from trimtab.errors import ConfigError, NoMatch, NotMergeable, NotSupported
from trimtab.model import checkpoint_activations

IDS = torch.randint(3, 37, (3, 5), generator=torch.Generator().manual_seed(4))
TARGETS = ["q_proj", "down_proj"]


def folder(where: Path, seed: int, **more: Any) -> Path:
    torch.manual_seed(seed)
    fields: dict[str, Any] = {"r": 2, "init_lora_weights": False, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    get_peft_model(llama(), LoraConfig(**fields | more)).save_pretrained(where / str(seed))
    return where / str(seed)


def arrow(where: Path, experts: int = 4, general: int = 0, **settings: Any) -> PeftModel:
    paths = [folder(where, i) for i in range(experts + general)]
    config = ArrowConfig(**{"top_k": 2, "rng_seed": 0} | settings)
    return create_arrow_model(llama(), paths[:experts], config, paths[experts:]).eval()


@pytest.mark.parametrize("general", [0, 2])
def test_the_equation(general: int, tmp_path: Path) -> None:
    model = arrow(tmp_path, 4, general, router_temperature=0.5, use_gks=bool(general))
    layer: Any = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
    factors = [[layer.lora_A[n].weight, layer.lora_B[n].weight] for n in ("task_0", "task_1", "task_2", "task_3")]
    if general:
        mean = [sum(getattr(layer, f)[f"gks_{i}"].weight for i in (0, 1)) / 2 for f in ("lora_A", "lora_B")]
        factors = [[A - mean[0], B - mean[1]] for A, B in factors]
    got = layer(x)
    router = layer.adapters["arrow_router"]
    for row in range(3):
        for t in range(5):
            likeness = torch.stack([(v @ x[row, t]).abs() for v in router.prototypes(*router.factors())])
            top = likeness.topk(2)
            want = layer.base_layer(x[row, t])
            for e, p in zip(top.indices.tolist(), (top.values / 0.5).softmax(0), strict=True):
                want = want + p * 4 * factors[e][1] @ factors[e][0] @ x[row, t]  # s = alpha / r = 8 / 2
            assert (got[row, t] - want).abs().max() < 1e-5


def test_prototypes_are_the_directions_that_updates_stretch_most(tmp_path: Path) -> None:
    model = arrow(tmp_path)
    router = model.get_base_model().model.layers[1].mlp.down_proj.adapters["arrow_router"]
    before = router.prototypes(*router.factors())
    with torch.no_grad():  # clear singular values: the iteration is at its end
        for e in router.experts():
            u, _, v = torch.linalg.svd(e.lora_B.weight @ e.lora_A.weight, full_matrices=False)
            e.lora_A.weight.copy_(v[:2])
            e.lora_B.weight.copy_(u[:, :2] * torch.tensor([1.0, 3.0]))
    A, B = router.factors()
    found = router.prototypes(A, B)  # made again, for the factors have changed
    assert (found - before).abs().max() > 1e-2
    assert torch.allclose((found * A[:, 1]).sum(1).abs(), torch.ones(4), atol=1e-4)
    assert router.prototypes(A, B) is found


def test_gradients_are_the_same_when_layers_are_computed_again(tmp_path: Path) -> None:
    found: list[dict[str, Tensor]] = []
    for again in (False, True):
        model = arrow(tmp_path, 2)
        for name in ("task_0", "task_1"):
            model.set_requires_grad(name)
        if again:
            checkpoint_activations(model.get_base_model())
        model.train()(IDS, labels=IDS).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if ".task_" in n and p.grad is not None})
    assert len(found[0]) == 16 and all(g.abs().max() > 0 for g in found[0].values())
    assert all((found[1][n] - g).abs().max() < 1e-7 for n, g in found[0].items())


def test_it_shares_a_batch_with_its_experts(tmp_path: Path) -> None:
    model = arrow(tmp_path)
    got = model(IDS, adapter_names=["arrow_router", "task_1", "__base__"]).logits
    assert (got[0] - model(IDS[:1]).logits[0]).abs().max() < 1e-6
    assert (got[2] - llama()(IDS[2:]).logits[0]).abs().max() < 1e-6
    model.set_adapter("task_1")
    assert (got[1] - model(IDS[1:2]).logits[0]).abs().max() < 1e-6


def test_what_cannot_be_right_is_refused(tmp_path: Path) -> None:
    model = arrow(tmp_path)
    with pytest.raises(NotMergeable, match="token by token"):
        model.merge_adapter()
    model.delete_adapter("task_2")
    with pytest.raises(NoMatch, match="'task_2'"):
        model(IDS)
    paths = [folder(tmp_path, 1), folder(tmp_path, 7, r=4)]
    with pytest.raises(ConfigError, match="one rank, not 2, 4"):
        create_arrow_model(llama(), paths, ArrowConfig(top_k=1))
    with pytest.raises(NotSupported, match="other layers"):
        create_arrow_model(llama(), [paths[0], folder(tmp_path, 8, target_modules=["q_proj"])], ArrowConfig(top_k=1))
    with pytest.raises(NotSupported, match="plain LoRAs"):
        create_arrow_model(llama(), [paths[0], folder(tmp_path, 9, use_dora=True)], ArrowConfig(top_k=1))
    with pytest.raises(ConfigError, match="top_k=3"):
        create_arrow_model(llama(), paths[:1], ArrowConfig())
    with pytest.raises(ConfigError, match="general_adapter_paths"):
        create_arrow_model(llama(), paths[:1], ArrowConfig(top_k=1, use_gks=True))
    with pytest.raises(ConfigError, match="create_arrow_model"):
        get_peft_model(llama(), LoraConfig(arrow_config=ArrowConfig(), target_modules=TARGETS))
    with pytest.raises(ConfigError, match="router_temperature"):
        ArrowConfig(router_temperature=0)


def test_experts_of_some_layers_alone_are_found_by_their_paths(tmp_path: Path) -> None:
    paths = [folder(tmp_path, i, layers_to_transform=[1]) for i in range(2)]
    model = create_arrow_model(llama(), paths, ArrowConfig(top_k=1))
    names = ["model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"]
    assert model.peft_config["arrow_router"].target_modules == names  # type: ignore[attr-defined]
    assert (model(IDS).logits - llama()(IDS).logits).abs().max() > 1e-4

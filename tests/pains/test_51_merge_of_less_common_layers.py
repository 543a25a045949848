"""No. 51: merge, unmerge and disable on the layers where a transpose or groups are easily forgotten."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from little import far
from small_llama import move
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trimtab import IA3Config, LoKrConfig, LoraConfig, get_peft_model
from trimtab.core.config import PeftConfig
from trimtab.errors import NotMergeable, TrimtabWarning

LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "square Conv1D": (lambda: Conv1D(8, 8), torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))),
    "Embedding": (lambda: nn.Embedding(11, 8), torch.tensor([[3, 7, 3]])),
    "Conv2d": (lambda: nn.Conv2d(4, 8, 3, padding=1), torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(1))),
    "depthwise Conv1d": (
        lambda: nn.Conv1d(8, 8, 4, groups=8, padding=3),
        torch.randn(2, 8, 9, generator=torch.Generator().manual_seed(1)),
    ),
}
CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lambda: LoraConfig(r=8, target_modules=["layer"]),
    "dora": lambda: LoraConfig(r=8, target_modules=["layer"], use_dora=True),
    "ia3": lambda: IA3Config(target_modules=["layer"], feedforward_modules=[]),
    "lokr": lambda: LoKrConfig(r=2, alpha=4, target_modules=["layer"]),
}
# trained there they mix the groups, as the published files do: no weight of the layer can hold that
SAID = r"mixes the groups of 1 convolutions \(layer\), .* it can be trained and saved there, and not merged"
MIXES = {("depthwise Conv1d", method) for method in ("lora", "dora")}


class Host(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("layer", LAYERS)
def test_merge_keeps_the_answers_and_unmerge_restores_the_bytes(layer: str, method: str) -> None:
    x = LAYERS[layer][1]
    torch.manual_seed(0)
    plain = Host(LAYERS[layer][0]())
    untouched, weight = plain(x).detach(), plain.layer.weight.detach().clone()
    mixes = (layer, method) in MIXES
    with pytest.warns(TrimtabWarning, match=SAID) if mixes else nullcontext():
        model = get_peft_model(plain, CONFIGS[method]())
    move(model, size=0.3)
    model.eval()
    with torch.no_grad():
        tuned = model(x)
        assert far(tuned, untouched) > 1e-2
        if mixes:
            with pytest.raises(NotMergeable, match="mixes the groups of a grouped convolution"):
                model.merge_adapter()
        else:
            model.merge_adapter()
            assert far(model(x), tuned) < 1e-5
            model.unmerge_adapter()
        assert torch.equal(model(x), tuned)
        with model.disable_adapter():
            assert torch.equal(model(x), untouched)
        assert torch.equal(model.unload().layer.weight, weight)

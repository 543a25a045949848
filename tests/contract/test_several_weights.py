"""Every method on the weights inside torch's nn.MultiheadAttention: it fits whole, or is refused with the reason."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import close, layer_methods, randomise
from torch import Tensor, nn

from trimtab import PeftModel, get_peft_model
from trimtab.core.config import config_for, load
from trimtab.errors import NotSupported

DIM = 16
FITTING = {"lora", "dora", "ia3", "oft", "boft", "hra", "loha", "lokr", "miss", "fourierft", "shira"}  # at least these


class Host(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attn, self.beside = nn.MultiheadAttention(DIM, 2, batch_first=True, **options), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        own = x[..., : self.attn.kdim]
        return self.attn(x, own, own, need_weights=False)[0]


def host(**options: Any) -> Host:
    torch.manual_seed(0)
    made = Host(**options).double()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return made


def config(method: str) -> Any:
    return config_for(method, **copy.deepcopy(load(method).small | {"target_modules": ["attn"]}))


def x() -> Tensor:
    return torch.randn(2, 5, DIM, generator=torch.Generator().manual_seed(1)).double()


def _fits(method: str) -> bool:
    try:
        get_peft_model(host(), config(method))
    except NotSupported:
        return False
    return True


AROUND = {m for m in layer_methods() if load(m).adapter.on_modules}  # they take the attention as a block
FIT = [m for m in layer_methods() if m not in AROUND and _fits(m)]
REFUSED = sorted(set(layer_methods()) - AROUND - set(FIT))


def test_the_common_methods_fit() -> None:
    assert set(FIT) >= FITTING and len(FIT) > len(REFUSED)


@pytest.mark.parametrize("method", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_changed(method: str) -> None:
    made = host()
    layer = made.attn
    with pytest.raises(NotSupported, match="attn"):
        get_peft_model(made, config(method))
    assert made.attn is layer and "trimtab_groups" not in made.__dict__


CASES = [(m, o) for m in FIT for o in ({}, {"kdim": 8, "vdim": 8})]


def test_a_method_that_trains_biases_is_refused_where_three_weights_share_one() -> None:
    with pytest.raises(NotSupported, match="BEFT on 'attn': it needs a bias"):
        get_peft_model(host(kdim=8, vdim=8), config("beft"))


@pytest.mark.parametrize(("method", "options"), [c for c in CASES if c != ("beft", CASES[1][1])], ids=str)
def test_a_method_on_attention_merges_unmerges_and_travels(method: str, options: dict[str, int], tmp_path: Path) -> None:
    model = get_peft_model(host(**options), config(method))
    randomise(model)
    model.eval()
    y, layer = model(x()), model.get_base_model().attn
    original = layer.base_layer
    before = {k: v.clone() for k, v in original.state_dict().items()}
    assert (y - host(**options).eval().requires_grad_(False)(x())).abs().max() > 1e-4
    with torch.no_grad():  # the fast path of torch
        close(model(x()), y.detach(), 1e-9)
    model.save_pretrained(tmp_path)
    close(PeftModel.from_pretrained(host(**options), tmp_path)(x()), y, 1e-12)
    model.merge_adapter()
    assert type(layer.base_layer) is nn.MultiheadAttention and layer.base_layer is not original
    close(model(x()), y.detach(), 1e-9)
    with model.disable_adapter():
        assert torch.equal(model(x()), host(**options).eval().requires_grad_(False)(x()))
    model.unmerge_adapter()
    assert layer.base_layer is original and all(torch.equal(v, before[k]) for k, v in original.state_dict().items())
    assert torch.equal(model(x()), y)
    plain = model.merge_and_unload()
    close(plain(x()), y, 1e-9)
    assert plain.state_dict().keys() == host(**options).state_dict().keys()


def encoder(mask: bool) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(DIM, 2, 32, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(block, 2).eval()
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = mask
    return model, {"src_key_padding_mask": padding} if mask else {}


@pytest.mark.parametrize("target", ["self_attn", "linear1", "norm1"])
@pytest.mark.parametrize("mask", [False, True])
def test_torch_s_encoder_takes_no_fast_path_around_an_adapter(target: str, mask: bool) -> None:
    base, more = encoder(mask)
    model = get_peft_model(base, config_for("lora" if target != "norm1" else "ln_tuning", target_modules=[target])).eval()
    randomise(model)
    src = x().float()
    want = model(src, **more)
    plain, _ = encoder(mask)
    kept = ~more["src_key_padding_mask"] if mask else torch.ones(2, 5, dtype=torch.bool)
    with torch.no_grad():
        got = model(src, **more)
        close(got[kept], want[kept], 1e-5)
        assert (got - plain(src, **more))[kept].abs().max() > 1e-3
        close(model.merge_and_unload()(src, **more)[kept], want[kept], 1e-5)

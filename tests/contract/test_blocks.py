"""What holds for methods around blocks of a model: attention, feed-forward, whole layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import layer_methods, randomise
from test_prompts import NEW, base, batch, greedy

from trimtab import PeftModel, get_peft_model
from trimtab.core.config import config_for, load
from trimtab.core.group import adapted
from trimtab.errors import NotMergeable

methods = pytest.mark.parametrize("method", [m for m in layer_methods() if load(m).adapter.on_modules])
names = pytest.mark.parametrize("name", ["llama", "gpt2"])


def around(method: str, name: str, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    fields = load(method).small | {"task_type": "CAUSAL_LM"} | options
    model = get_peft_model(base(name).to(dtype), config_for(method, **copy.deepcopy(fields))).eval()
    randomise(model, size=0.5)
    return model


@methods
@names
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
def test_generate_is_greedy_decoding_by_repeated_forward(method: str, name: str, use_cache: bool) -> None:
    model, (ids, mask) = around(method, name), batch()
    more: dict[str, Any] = dict(max_new_tokens=NEW, do_sample=False, use_cache=use_cache)
    got = model.generate(input_ids=ids, attention_mask=mask, **more)
    assert torch.equal(model.generate(input_ids=ids[:1], **more), greedy(model, name, ids[:1], None))
    for row in range(len(ids)):
        alone = greedy(model, name, ids[row : row + 1, int((mask[row] == 0).sum()) :], None)
        assert torch.equal(got[row, -NEW:], alone[0, -NEW:])
    with torch.no_grad():
        y = model(input_ids=ids[:1]).logits[:, -1]
        with model.disable_adapter():
            assert (model(input_ids=ids[:1]).logits[:, -1] - y).abs().max() > 1e-3  # it has a say in what comes next


@methods
@names
def test_disabled_unloaded_saved_and_not_merged(method: str, name: str, tmp_path: Path) -> None:
    model, ids = around(method, name), batch()[0]
    with torch.no_grad():
        y, bare = model(input_ids=ids).logits, base(name)(input_ids=ids).logits
        assert (y - bare).abs().max() > 1e-3
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, bare)
        with pytest.raises(NotMergeable):
            model.merge_adapter()
        model.save_pretrained(tmp_path)
        for trainable in (False, True):
            again = PeftModel.from_pretrained(base(name), tmp_path, is_trainable=trainable).eval()
            assert torch.equal(again(input_ids=ids).logits, y)
            assert any(p.requires_grad for p in again.parameters()) == trainable
        assert torch.equal(model.unload()(input_ids=ids).logits, bare)


@methods
@names
def test_layers_within_and_without_are_adapted_whichever_comes_first(method: str, name: str, tmp_path: Path) -> None:
    ids, target = batch()[0], {"llama": "q_proj", "gpt2": "c_attn"}[name]
    low = config_for("lora", r=2, target_modules=[target], init_lora_weights=False)
    one, two = around(method, name), get_peft_model(base(name), copy.deepcopy(low), "low").eval()
    one.add_adapter("low", low)
    two.add_adapter("default", one.peft_config["default"])
    for model in (one, two):
        paths = [n for n, _ in adapted(model.get_base_model())]
        assert sum(n.endswith(target) for n in paths) == 2 and not any("base_layer" in n for n in paths)
        for adapter, seed in (("default", 5), ("low", 6)):
            model.set_adapter(adapter)
            torch.manual_seed(seed)
            randomise(model, seed, 0.3)
        model.set_adapter(["default", "low"])
    two.load_state_dict(one.state_dict(), strict=False)
    one.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(name), tmp_path / "low", "low")
    again.load_adapter(tmp_path, "default")
    again.set_adapter(["default", "low"])
    with torch.no_grad():
        y = one(input_ids=ids).logits
        assert torch.equal(again(input_ids=ids).logits, y)
        for gone, left in (("default", "low"), ("low", "default")):
            for model in (copy.deepcopy(one), copy.deepcopy(again)):
                model.set_adapter(left)
                want = model(input_ids=ids).logits
                assert (want - y).abs().max() > 1e-4
                model.delete_adapter(gone)
                assert torch.equal(model(input_ids=ids).logits, want)
        bare = base(name)(input_ids=ids).logits
        assert torch.equal(again.unload()(input_ids=ids).logits, bare)
        assert torch.equal(one.unload()(input_ids=ids).logits, bare)


@methods
def test_gradients_reach_all_of_it_also_through_recomputed_activations(method: str) -> None:
    ids, found = batch()[0], []
    for checkpointed in (False, True):
        model = around(method, "llama", torch.float64)
        if checkpointed:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
        model(input_ids=ids, labels=ids).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert found[0] and all(g is not None and g.abs().max() > 0 for g in found[0].values())
    assert all(torch.allclose(g, found[1][n], atol=1e-12) for n, g in found[0].items())


@methods
@names
def test_a_bfloat16_model_answers_in_bfloat16(method: str, name: str) -> None:
    model = around(method, name, torch.bfloat16)
    own = [p.dtype for p in model.parameters() if p.requires_grad]
    assert set(own) == {torch.float32} and model(input_ids=batch()[0]).logits.dtype == torch.bfloat16

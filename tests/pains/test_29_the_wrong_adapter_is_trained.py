"""Whatever is loaded, added, chosen and deleted: an adapter is trained only where that was said of it."""

from __future__ import annotations

from pathlib import Path

from situations import llama, lora

from trimtab import PeftModel, get_peft_model


def trained(model: PeftModel) -> set[str]:
    return {n.partition(".adapters.")[2].partition(".")[0] for n, p in model.named_parameters() if p.requires_grad}


def test_every_step_of_a_day_with_three_adapters(tmp_path: Path) -> None:
    get_peft_model(llama(), lora()).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(llama(), tmp_path, "first")
    assert trained(model) == set()
    model.load_adapter(tmp_path, "second", is_trainable=True)
    assert trained(model) == {"second"} and model.active_adapters == ["first"]
    model.add_adapter("third", lora())
    assert trained(model) == {"second"}
    model.set_adapter("second")
    assert trained(model) == {"second"} and model.active_adapters == ["second"]
    model.set_adapter("first", inference_mode=True)
    assert trained(model) == set()
    model.set_requires_grad(["third"])
    assert trained(model) == {"third"} and model.active_adapters == ["first"]
    model.delete_adapter("second")
    assert trained(model) == {"third"} and model.active_adapters == ["first"]

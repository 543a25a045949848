"""Adapter folders: what is written, what is read, and what is refused with the model untouched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_llama import IDS, llama, logits, move, same, state
from test_adapters import lora

import trimtab
from trimtab import LoraConfig, PeftConfig, PeftModel, get_peft_model
from trimtab.errors import BadCheckpoint, ConfigError, NoMatch, NotSupported, TrimtabWarning

Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = get_peft_model(llama(), lora())
    move(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder: Path, **tensors: torch.Tensor | None) -> None:
    file = folder / "adapter_model.safetensors"
    kept = load_file(file) | tensors
    save_file({k: v for k, v in kept.items() if v is not None}, file)


def settings(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({Q: None}, f"1 missing: {Q}"),
    ({"base_model.model.model.layers.0.self_attn.q_prj.lora_A.weight": torch.zeros(2, 16)}, f"nearest key of this model: {Q}"),
    ({Q: torch.zeros(3, 16)}, r"1 of another shape: .*\(3, 16\) instead of \(2, 16\)"),
    ({f"odd.{i}": torch.zeros(1) for i in range(7)}, "7 unexpected: odd.0, odd.1, odd.2, odd.3, odd.4, ..."),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WRONG, ids=["missing", "unexpected", "shape", "many"])
def test_loading_is_strict_and_changes_nothing(change: dict[str, Any], message: str, folder: Path) -> None:
    edit(folder, **change)
    model = get_peft_model(llama(), lora())
    before, names = state(model), [n for n, _ in model.named_modules()]
    with pytest.raises(BadCheckpoint, match=message):
        model.load_adapter(folder, "new")
    assert list(model.peft_config) == ["default"] and same(state(model), before)
    assert [n for n, _ in model.named_modules()] == names
    base = llama()
    with pytest.raises(BadCheckpoint, match=message):
        PeftModel.from_pretrained(base, folder)
    assert same(state(base), state(llama())) and not base.__dict__.get("trimtab_groups")
    get_peft_model(base, lora())  # it can be wrapped still

    report = model.load_adapter(folder, "new", strict=False)
    assert len(report.loaded) == 8 - sum(k == Q for k in change)
    assert len(report.problems()) == 1 and "new" in model.peft_config


def test_loading_into_an_adapter_that_is_there(folder: Path) -> None:
    model = get_peft_model(llama(), lora())
    model.load_adapter(folder, "default")
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(llama(), folder)))
    before = state(model)
    edit(folder, **{Q: None})
    with pytest.raises(BadCheckpoint):
        model.load_adapter(folder, "default")
    assert same(state(model), before) and list(model.peft_config) == ["default"]


def test_an_adapter_for_another_model_is_refused(folder: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    other = GPT2LMHeadModel(GPT2Config(vocab_size=37, n_embd=16, n_layer=1, n_head=2, n_positions=16))
    with pytest.raises((BadCheckpoint, trimtab.errors.NoMatch), match="q_proj"):
        PeftModel.from_pretrained(other, folder)
    assert not other.__dict__.get("trimtab_groups") and type(other.transformer.h[0].attn.c_attn).__name__ == "Conv1D"


def test_files_are_named_and_frozen_as_published(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "trimtab.json"]
    text = (folder / "adapter_config.json").read_text()
    values = json.loads(text)
    assert list(values) == sorted(values) and values["inference_mode"] is True and values["peft_type"] == "LORA"
    assert text.startswith('{\n  "') and values["target_modules"] == ["q_proj", "v_proj"]
    config = PeftConfig.from_pretrained(folder)
    assert type(config) is LoraConfig and config.to_dict() == values
    assert LoraConfig.from_pretrained(folder).r == 2
    with pytest.raises(ConfigError, match="LoraConfig, not a IA3Config"):
        trimtab.IA3Config.from_pretrained(folder)


def test_unknown_keys_of_a_config(folder: Path) -> None:
    settings(folder, from_the_future=None, another={"a": False})
    with pytest.warns(TrimtabWarning, match="another, from_the_future"):
        assert PeftConfig.from_pretrained(folder).r == 2  # type: ignore[attr-defined]
    settings(folder, lora_alpah=16)
    with pytest.raises(ConfigError, match=r"no .*lora_alpah=16.* Did you mean 'lora_alpha'"):
        PeftModel.from_pretrained(llama(), folder)
    settings(folder, lora_alpah=None, peft_type=None)
    with pytest.raises(BadCheckpoint, match="peft_type"):
        PeftConfig.from_pretrained(folder)
    settings(folder, peft_type="LORRA")
    with pytest.raises(ConfigError, match="Did you mean 'lora'"):
        PeftConfig.from_pretrained(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(BadCheckpoint, match="not JSON"):
        PeftConfig.from_pretrained(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(BadCheckpoint, match=r"no adapter_config.json"):
        PeftModel.from_pretrained(llama(), folder)


@pytest.mark.parametrize(
    "field",
    [
        {"megatron_config": {"tensor_model_parallel_size": 2}},
    ],
    ids=str,
)
def test_what_this_version_cannot_do_is_not_silently_dropped(field: dict[str, Any]) -> None:
    with pytest.raises(NotSupported, match=next(iter(field))):
        get_peft_model(llama(), lora(**field))


def test_pickle_is_refused_unless_asked_for(folder: Path) -> None:
    want = logits(PeftModel.from_pretrained(llama(), folder))
    file = folder / "adapter_model.safetensors"
    torch.save(load_file(file), folder / "adapter_model.bin")
    file.unlink()
    with pytest.raises(BadCheckpoint, match="is a pickle, which can run code"):
        PeftModel.from_pretrained(llama(), folder)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), folder, allow_pickle=True)), want)
    with pytest.raises(ConfigError, match="would write a pickle"):
        get_peft_model(llama(), lora()).save_pretrained(folder, safe_serialization=False)


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_a_cut_off_file_is_refused(keep: int, folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    base = llama()
    with pytest.raises(BadCheckpoint, match="damaged or cut off"):
        PeftModel.from_pretrained(base, folder)
    assert not base.__dict__.get("trimtab_groups") and same(state(base), state(llama()))


def test_a_failed_write_leaves_the_old_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / "adapter_model.safetensors").read_bytes()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("trimtab.store.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        get_peft_model(llama(), lora()).save_pretrained(folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "trimtab.json"]


@pytest.mark.parametrize(
    ("said", "word"),
    [(b"[]", "JSON object"), (b'{"base": 3}', "no record"), (b'{"base": {"config": {}, "values": 3}}', "no record"),
     (b"{", "not JSON")],
)
def test_a_record_of_a_base_is_data(said: bytes, word: str, folder: Path) -> None:
    (folder / "trimtab.json").write_bytes(said)
    with pytest.raises(BadCheckpoint, match=word):
        PeftModel.from_pretrained(llama(), folder)


def based(folder: Path, **shape: Any) -> Any:
    """A model that was loaded from a folder."""
    if not folder.exists():
        model = llama()
        for i, p in enumerate(model.parameters()):
            torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(shape.get("seed", 0) + i))
        model.to(shape.get("dtype", torch.float32)).save_pretrained(folder)
    return type(llama()).from_pretrained(folder, dtype=torch.float32)


def test_another_base_is_refused_and_both_are_named(tmp_path: Path) -> None:
    first = based(tmp_path / "first")
    get_peft_model(first, lora()).save_pretrained(tmp_path / "adapter")
    record = json.loads((tmp_path / "adapter" / "trimtab.json").read_text())["base"]
    assert record["name"] == str(tmp_path / "first") and record["config"]["hidden_size"] == 16
    PeftModel.from_pretrained(based(tmp_path / "first"), tmp_path / "adapter")
    (tmp_path / "first").rename(tmp_path / "moved")  # the same base elsewhere is the same base
    PeftModel.from_pretrained(based(tmp_path / "moved"), tmp_path / "adapter")
    further = based(tmp_path / "further", seed=100)
    before = state(further)
    with pytest.raises(BadCheckpoint, match="of one architecture, and with other values") as refused:
        PeftModel.from_pretrained(further, tmp_path / "adapter")
    assert str(tmp_path / "first") in str(refused.value) and str(tmp_path / "further") in str(refused.value)
    assert same(state(further), before) and not further.__dict__.get("trimtab_groups")
    with pytest.warns(TrimtabWarning, match="another base"):
        PeftModel.from_pretrained(further, tmp_path / "adapter", strict=False)
    with pytest.warns(TrimtabWarning, match="stored in BF16"):
        PeftModel.from_pretrained(based(tmp_path / "half", dtype=torch.bfloat16), tmp_path / "adapter")
    config = json.loads((tmp_path / "moved" / "config.json").read_text())
    (tmp_path / "moved" / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 2}))
    moved = llama()
    moved.name_or_path = str(tmp_path / "moved")
    with pytest.raises(BadCheckpoint, match="num_key_value_heads 1 there, 2 here"):
        PeftModel.from_pretrained(moved, tmp_path / "adapter")


def test_the_record_is_passed_by_by_the_peer(tmp_path: Path) -> None:
    import peft

    get_peft_model(based(tmp_path / "base"), lora()).save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(based(tmp_path / "base"), str(tmp_path / "adapter"))
    ours = PeftModel.from_pretrained(based(tmp_path / "base"), tmp_path / "adapter")
    assert torch.allclose(logits(theirs.eval()), logits(ours), atol=1e-5)


def test_an_adapter_whose_base_has_no_folder_has_no_record_of_it(tmp_path: Path) -> None:
    get_peft_model(based(tmp_path / "base"), lora()).save_pretrained(tmp_path / "adapter")
    get_peft_model(llama(), lora()).save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "trimtab.json").read_text()) == {"embedding_rows": 37}


def test_auto_class_loads_base_and_adapter(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    base = type(llama()).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, lora())
    move(model)
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "base"
    )
    again = trimtab.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    assert type(again) is trimtab.PeftModelForCausalLM and torch.equal(logits(again), logits(model.eval()))
    assert torch.equal(
        logits(trimtab.AutoPeftModel.from_pretrained(tmp_path / "adapter", dtype=torch.float32)), logits(model)
    )
    with pytest.raises(ConfigError, match="is an adapter for CAUSAL_LM"):
        trimtab.AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter")


def test_plain_transformers_trainer_saves_the_adapter_alone(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = get_peft_model(llama(), lora(lora_dropout=0.1, bias="none"))
    rows = [{"input_ids": r, "labels": r} for r in IDS.repeat(4, 1)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, save_steps=3, per_device_train_batch_size=2, learning_rate=1e-1,
        report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    frozen = {k: v.clone() for k, v in model.state_dict().items() if "adapters" not in k}
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-3"
    names = {p.name for p in checkpoint.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= names
    assert not {n for n in names if n.startswith("model") or n.endswith("pytorch_model.bin")}
    saved = load_file(checkpoint / "adapter_model.safetensors")
    assert len(saved) == 8 and saved["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"].abs().max() > 0
    after = model.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in frozen.items())
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), checkpoint)), logits(model.eval()))


def test_a_spent_handle_refuses_to_be_used(tmp_path: Path) -> None:
    for spend in ("merge_and_unload", "unload"):
        for through in ("", "base_model"):
            model = get_peft_model(llama(), lora())
            plain = getattr(getattr(model, through) if through else model, spend)()
            uses: list[Any] = [
                lambda m: m(IDS), lambda m: m.generate(IDS), lambda m: m.save_pretrained(tmp_path / "x"),
                lambda m: m.state_dict(),
                lambda m: list(m.parameters()), lambda m: m.add_adapter("b", lora()), lambda m: m.load_adapter(tmp_path, "b"),
                lambda m: m.merge_and_unload(), lambda m: m.set_adapter("x"), lambda m: m.get_base_model(),
                lambda m: m.print_trainable_parameters(), lambda m: m.config,
            ]  # fmt: skip
            for use in uses:
                with pytest.raises(NoMatch, match="go on with the model that merge_and_unload"):
                    use(model)
            assert "PeftModel" in repr(model) and not (tmp_path / "x").exists()
            assert isinstance(plain(IDS).logits, torch.Tensor)

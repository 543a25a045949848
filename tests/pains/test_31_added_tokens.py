"""Tokens were added: loaded on the pristine base, the adapter makes it as long, or the error says which rows are missing."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from situations import llama, logits, lora, move, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimtab import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from trimtab.errors import BadCheckpoint, TrimtabWarning
from trimtab.export.merge import merge
from trimtab.serve.chat import open_chat
from trimtab.train.load import load_model

NEW = torch.tensor([[37, 5, 38, 40, 39, 6]])
ADDED = [37, 38, 39, 40]
GROWS = r"was made on 41 rows of embeddings, and this base has 37: it is made longer, model.resize_token_embeddings\(41\)"
CASES: dict[str, dict[str, Any]] = {
    "rows": {"trainable_token_indices": ADDED},
    "rows of both": {"trainable_token_indices": {"embed_tokens": ADDED, "lm_head": ADDED}},
    "more rows": {"trainable_token_indices": {"embed_tokens": [5, *ADDED], "lm_head": [*ADDED, 9]}},
    "whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "whole, kept tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}
LACKING = {"rows": False, "whole, kept tied": False, "more rows": True}  # what does not go with untied, or with tied ends


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to rounding: the rows of a head are raised by x (t - t0), whatever t0 the longer base has there."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def longer(model: Any, size: int = 41) -> Any:
    torch.manual_seed(1)
    model.resize_token_embeddings(size, mean_resizing=False)
    return model


def answer(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=NEW).logits


def refused(base: Any, folder: Path, why: str) -> None:
    """... and nothing was changed."""
    before = base.get_input_embeddings().weight
    with pytest.raises(BadCheckpoint, match=why) as said:
        PeftModel.from_pretrained(base, folder)
    assert "Fix: " in str(said.value) and base.get_input_embeddings().weight is before
    assert len(before) == 37 == base.config.vocab_size and not base.__dict__.get("trimtab_groups")


@pytest.mark.parametrize(("case", "tied"), [(c, t) for c in CASES for t in (True, False) if LACKING.get(c) is not t])
def test_one_call_on_the_pristine_base(case: str, tied: bool, tmp_path: Path) -> None:
    model = get_peft_model(longer(llama(tie_word_embeddings=tied)), lora(**CASES[case]))
    move(model)
    want = answer(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "trimtab.json").read_text()) == {"embedding_rows": 41}
    if "rows" in case:
        kept = load_file(tmp_path / "adapter_model.safetensors")
        assert {v.shape[0] for k, v in kept.items() if "token" in k} == {len(ADDED) + (case == "more rows")}
    base = llama(tie_word_embeddings=tied)
    torch.manual_seed(7)
    with pytest.warns(TrimtabWarning, match=GROWS):
        again = PeftModel.from_pretrained(base, tmp_path)
    assert torch.rand(1).item() == torch.rand(1, generator=torch.Generator().manual_seed(7)).item()  # no draw was taken
    assert near(answer(again), want) and base.config.vocab_size == 41
    with again.disable_adapter():
        assert torch.equal(logits(again)[..., :37], logits(llama(tie_word_embeddings=tied)))
    assert (base.lm_head.base_layer if hasattr(base.lm_head, "adapters") else base.lm_head).weight.shape == (41, 16)
    plain = again.merge_and_unload()
    assert (answer(plain) - want).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("options", "lacks", "tied"),
    [({"trainable_token_indices": [37, 38, 40]}, "embed_tokens", True),
     ({"trainable_token_indices": ADDED}, "lm_head", False),
     ({}, "embed_tokens", True),
     ({}, "embed_tokens", False),
     ({"modules_to_save": ["embed_tokens"]}, "lm_head", True),
     ({"modules_to_save": ["embed_tokens"]}, "lm_head", False),
     ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens", True),
     ({"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]}, "lm_head", False)],
)  # fmt: skip
def test_rows_that_the_file_lacks_are_an_error(options: dict[str, Any], lacks: str, tied: bool, tmp_path: Path) -> None:
    model = get_peft_model(longer(llama(tie_word_embeddings=tied)), lora(**options))
    move(model)
    want = answer(model)
    model.save_pretrained(tmp_path)
    said = rf"made on 41 rows of embeddings, and this base has 37: .*rows 37 to 40 of '.*{lacks}'[^$]*"
    refused(llama(tie_word_embeddings=tied), tmp_path, rf"{said}model.resize_token_embeddings\(41\)")
    base = longer(llama(tie_word_embeddings=tied))  # with the rows as they were
    assert near(answer(PeftModel.from_pretrained(base, tmp_path)), want)


def test_a_longer_base_stays_and_one_in_use_is_not_changed(tmp_path: Path) -> None:
    model = get_peft_model(longer(llama(tie_word_embeddings=True)), lora(**CASES["rows"]))
    move(model)
    model.save_pretrained(tmp_path / "longer")
    padded = PeftModel.from_pretrained(longer(llama(tie_word_embeddings=True), 48), tmp_path / "longer")
    assert padded.config.vocab_size == 48 and near(answer(padded)[..., :41], answer(model))
    get_peft_model(llama(tie_word_embeddings=True), lora()).save_pretrained(tmp_path / "first")
    used = PeftModel.from_pretrained(llama(tie_word_embeddings=True), tmp_path / "first", adapter_name="first")
    before = logits(used)
    said = r"carries 'first' already[^$]*model.resize_token_embeddings\(41\) before any adapter"
    with pytest.raises(BadCheckpoint, match=said):
        used.load_adapter(tmp_path / "longer", "second")
    assert torch.equal(logits(used), before) and used.config.vocab_size == 37 and [*used.peft_config] == ["first"]


def test_what_fails_later_leaves_the_base_as_it_was(tmp_path: Path) -> None:
    get_peft_model(longer(llama()), lora(**CASES["whole"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    kept = load_file(file)
    save_file({k: v for k, v in kept.items() if "q_proj.lora_A" not in k}, file, {"format": "pt"})
    base = llama()
    before = {k: v.clone() for k, v in base.state_dict().items()}
    with pytest.warns(TrimtabWarning, match=GROWS), pytest.raises(BadCheckpoint, match="2 missing"):
        PeftModel.from_pretrained(base, tmp_path)
    assert base.config.vocab_size == 37 and all(torch.equal(v, before[k]) for k, v in base.state_dict().items())


@pytest.mark.parametrize("said", ['"41"', "true", "-4", "0", "[]"])
def test_the_number_is_data(said: str, tmp_path: Path) -> None:
    get_peft_model(llama(), lora()).save_pretrained(tmp_path)
    (tmp_path / "trimtab.json").write_text(f'{{"embedding_rows": {said}}}')
    refused(llama(), tmp_path, "no number of rows")
    (tmp_path / "trimtab.json").write_text('{"embedding_rows": 1000000000000}')
    refused(llama(), tmp_path, "made on 1,000,000,000,000 rows .* this base has 37")


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("case", ["rows of both", "rows", "whole", "no tokens"])
def test_a_folder_of_peft(case: str, tied: bool, known: bool, tmp_path: Path) -> None:
    """`known`: its base lies in a folder, so that peft sees that it grew and writes whole embeddings, trained or not."""
    import peft

    llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    pristine = lambda: type(llama()).from_pretrained(tmp_path / "base") if known else llama(tie_word_embeddings=tied)  # noqa: E731
    options = CASES.get(case, {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj", "v_proj"]} | options)
        theirs: Any = peft.get_peft_model(longer(pristine()), config)
        move(theirs)
        theirs.save_pretrained(str(tmp_path / "adapter"))
    if not known and case == "no tokens":
        assert PeftModel.from_pretrained(pristine(), tmp_path / "adapter").config.vocab_size == 37  # nothing tells of them
        return
    if not known and not tied and case == "rows":
        refused(pristine(), tmp_path / "adapter", "rows 37 to 40 of 'lm_head'")
        return
    with pytest.warns(TrimtabWarning, match=GROWS):
        ours = PeftModel.from_pretrained(pristine(), tmp_path / "adapter")
    assert (answer(ours) - answer(theirs)).abs().max() < 1e-5


def test_chat_merge_and_auto_class(tmp_path: Path) -> None:
    folder, out = write_model(tmp_path / "base"), tmp_path / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    first = len(tokenizer)
    tokenizer.add_tokens(["<one>", "<two>", "<three>", "<four>"])
    base = longer(load_model(folder, dtype=torch.float32), len(tokenizer))
    ids = [*range(first, first + 4)]
    rows = ids if base.config.tie_word_embeddings else {"embed_tokens": ids, "lm_head": ids}
    model = get_peft_model(base, lora(trainable_token_indices=rows))
    move(model, size=0.5)
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    record = json.loads((out / "trimtab.json").read_text())
    assert record["embedding_rows"] == first + 4 and record["base"]["config"]["vocab_size"] == first
    prompt = torch.tensor([tokenizer("<two> ab <four>")["input_ids"]])
    assert {first + 1, first + 3} <= {*prompt[0].tolist()}
    with torch.no_grad():
        want = model(input_ids=prompt).logits
    with pytest.warns(TrimtabWarning, match="it is made longer"):
        report = merge(out, tmp_path / "merged", console=Console(file=io.StringIO()))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert report.shard_by_shard and merged.config.vocab_size == first + 4 and report.difference.relative < 1e-5
    with torch.no_grad():
        assert (merged(input_ids=prompt).logits - want).abs().max() < 1e-5
    with pytest.warns(TrimtabWarning, match="it is made longer"):
        talk = open_chat(out, max_new_tokens=2)
    with torch.no_grad():
        assert near(talk.model(input_ids=prompt).logits, want)
    assert talk.renderer.tokenizer.convert_tokens_to_ids("<four>") == first + 3
    assert isinstance(talk.ask("<two> <four>", lambda piece: None), str)
    with pytest.warns(TrimtabWarning, match="it is made longer"):
        auto = AutoPeftModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        assert near(auto(input_ids=prompt).logits, want)

"""The tokenizer and template that a run saves read conversations token by token as training did, or the run stops."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import model_folder as made
import pytest

from trimtab.data import Renderer
from trimtab.errors import BadCheckpoint
from trimtab.train import talks
from trimtab.train.folder import RunFolder
from trimtab.train.load import load_tokenizer


def test_a_saved_tokenizer_reads_as_training_did(model_folder: Path, tmp_path: Path) -> None:
    for template in (None, "chatml"):
        tokenizer = load_tokenizer(model_folder)
        renderer = Renderer(tokenizer, chat_template=template)
        tokenizer.chat_template = renderer.chat_template or tokenizer.chat_template
        talks.try_saving(renderer)
    assert len(set(talks.reads(renderer).values())) == len(talks.CORPUS)


def test_a_template_that_is_not_saved_is_found(model_folder: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    renderer = Renderer(load_tokenizer(model_folder), chat_template=template)
    with pytest.raises(BadCheckpoint, match=r"do not read conversations as training did: \d+ of 11 .*--chat_template"):
        talks.try_saving(renderer)  # the tokenizer still has its own


@pytest.mark.parametrize("harm", ["template", "token", "gone"])
def test_what_came_out_wrong_is_found(harm: str, model_folder: Path, tmp_path: Path) -> None:
    renderer = Renderer(load_tokenizer(model_folder))
    renderer.tokenizer.save_pretrained(tmp_path)
    talks.check_saved(tmp_path, renderer)
    if harm == "template":
        file = tmp_path / "chat_template.jinja"
        file.write_text(file.read_text().replace("\n{{ m.content }}", " {{ m.content }}"))
    elif harm == "token":
        file = tmp_path / "tokenizer.json"
        said = json.loads(file.read_text())
        vocabulary = said["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        file.write_text(json.dumps(said))
    else:
        (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(BadCheckpoint, match=r"as training did|cannot be read again"):
        talks.check_saved(tmp_path, renderer)


def test_a_run_that_cannot_save_its_template_keeps_the_adapter_aside(model_folder: Path, tmp_path: Path) -> None:
    renderer = Renderer(load_tokenizer(model_folder))

    class Forgets:
        def __getattr__(self, name: str) -> object:
            return getattr(renderer.tokenizer, name)

        def save_pretrained(self, folder: Path) -> None:
            tokenizer = made.tokenizer()
            tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
            tokenizer.save_pretrained(folder)

    class Adapter:
        def save_pretrained(self, folder: Path) -> None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "adapter_model.safetensors").write_bytes(b"trained")

    reading = Renderer(load_tokenizer(model_folder))
    reading.tokenizer = Forgets()
    with warnings.catch_warnings(), pytest.raises(BadCheckpoint, match="as training did"):
        warnings.simplefilter("ignore")
        RunFolder(tmp_path / "out").finish(Adapter(), reading)
    assert (tmp_path / "out" / ".result.partial" / "adapter_model.safetensors").read_bytes() == b"trained"
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


def test_the_record_counts_ends_that_are_learnt(model_folder: Path) -> None:
    from trimtab.data import Example

    renderer = Renderer(load_tokenizer(model_folder))
    end = renderer.stop_token_ids[0]
    examples = [Example([5, end, 6], [False, True, False], "a", 1), Example([5, end], [True, False], "a", 2)]
    record = talks.record(renderer, examples)
    assert (record["examples"], record["examples_with_a_learnt_end"]) == (2, 1) and record["reads"] == talks.reads(renderer)

"""No. 44: prepared rows are kept in one step, so that a killed run leaves no half of them, and read on the next start."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from model_folder import tokenizer, write_rows

from trimtab.data import Renderer, prepare
from trimtab.data import cache as cache_module


def test_a_start_after_a_kill_and_the_start_after_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    rendered: list[int] = []
    render = Renderer.examples

    def counted(self: Renderer, *args: Any, **options: Any) -> Any:
        out = render(self, *args, **options)
        rendered.append(len(out))
        return out

    monkeypatch.setattr(Renderer, "examples", counted)
    rows = write_rows(tmp_path / "rows.jsonl")
    with monkeypatch.context() as killed:

        def kill(self: Path, target: Any) -> Path:
            raise KeyboardInterrupt

        killed.setattr(Path, "replace", kill)
        with pytest.raises(KeyboardInterrupt):
            prepare([rows], Renderer(tokenizer()))
    assert not [f for f in cache_module.folder().iterdir() if f.suffix == ".safetensors"]
    first = prepare([rows], Renderer(tokenizer()))
    assert sum(rendered) == 80  # the killed start, and this one: half a file is as good as none
    again = prepare([rows], Renderer(tokenizer()))
    assert sum(rendered) == 80 and again.train == first.train and len(first.train) == 40
    os.utime(rows)  # touched, not changed
    assert prepare([rows], Renderer(tokenizer())).train == first.train and sum(rendered) == 80

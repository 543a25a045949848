"""The folder of a run: what an earlier run left is set aside, results are put in place when they are whole."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from trimtab import origin
from trimtab.data import Renderer
from trimtab.files import sync, write, write_text
from trimtab.train.talks import check_saved

METRICS, PICTURE, SAMPLES, RUN = "metrics.jsonl", "loss.png", "samples.jsonl", "run.json"
RESULTS = ("adapter_config.json", "adapter_model.safetensors", origin.FILE, METRICS, PICTURE, SAMPLES, RUN)


class RunFolder:
    """`open` before the first step, `finish` at the end; `undo` when no step was taken leaves the folder as it was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.made = [f for f in (path, *path.parents) if not f.exists()]
        self.aside: Path | None = None
        self.resumed = False
        self.record: bytes | None = None  # of a run that is continued: its run.json as it was

    def open(self, *, resume: bool) -> str | None:
        """Make the folder. Results and checkpoints of an earlier run move into a folder inside it; the line says so."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.resumed = resume
        self.record = (self.path / RUN).read_bytes() if resume and (self.path / RUN).is_file() else None
        old = [] if resume else self._results()
        if not old:
            return None
        number = next(n for n in range(1, len(old) + 10**6) if not (self.path / f"earlier-{n}").exists())
        self.aside = self.path / f"earlier-{number}"
        self.aside.mkdir()
        for file in old:
            file.rename(self.aside / file.name)
        return f"{self.path} held an earlier run: it is kept in {self.aside.name}/"

    def _results(self) -> list[Path]:
        return [f for f in sorted(self.path.iterdir()) if f.name in RESULTS or f.name.startswith("checkpoint-")]

    def undo(self) -> None:
        if self.resumed:  # all but the record is that of the run that was to be continued
            if self.record is not None:
                write(self.path / RUN, lambda path: path.write_bytes(self.record or b""))
            return
        for file in self._results():
            shutil.rmtree(file) if file.is_dir() else file.unlink()
        if self.aside is not None:
            for file in self.aside.iterdir():
                file.rename(self.path / file.name)
            self.aside.rmdir()
        for place in self.made:
            if place.is_dir() and not any(place.iterdir()):
                place.rmdir()

    def finish(self, model: Any, renderer: Renderer) -> None:
        """Write adapter, tokenizer and template beside the rest; each file appears whole. What is written renders as
        training did, or this raises and leaves the adapter in `.result.partial`."""
        partial = self.path / ".result.partial"
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        renderer.tokenizer.save_pretrained(partial)
        check_saved(partial, renderer)
        for file in sorted(partial.rglob("*")):  # a folder comes before what is in it
            place = self.path / file.relative_to(partial)
            if file.is_dir():
                place.mkdir(exist_ok=True)
            else:
                sync(file)
                file.replace(place)
        sync(self.path)
        shutil.rmtree(partial)

    def write(self, name: str, text: str) -> None:
        write_text(self.path / name, text)

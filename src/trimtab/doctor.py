"""`trimtab doctor`: why does a tuned model answer like its base, babble, or never stop? The known causes, looked for in
the order in which one hides the next; the first that is found is the answer.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from torch import Tensor

from trimtab import origin, store
from trimtab.core.config import PeftConfig
from trimtab.data import Renderer
from trimtab.errors import TrimtabError, TrimtabWarning
from trimtab.export.merge import find_source
from trimtab.export.probes import Difference, compare, logits, probes
from trimtab.files import read_json
from trimtab.model import PeftModel
from trimtab.train import load, rate, talks
from trimtab.train.folder import METRICS, RUN

State = Literal["well", "cause", "unknown"]
Found = tuple[State, str, str]  # the state, what was seen, what mends it

NOTICEABLE = 1e-3  # of the logits' spread: below it hardly an answer changes
ENDS = 0.99  # share of the examples that must teach where an answer ends
KEPT = 0.5  # share of the rows that should have been trained on
SLOWEST, FASTEST = 1 / 50, 10  # times the usual rate of LoRA: below nothing is learnt, above a run does not settle
FEW = 10  # steps


@dataclass(frozen=True)
class Finding:
    """One check: what was seen, and, where it is a cause, what mends it."""

    check: str
    state: State
    seen: str
    fix: str = ""


@dataclass
class Report:
    """What was found, in the order of the checks."""

    adapter: str
    base: str
    findings: list[Finding] = field(default_factory=list)

    @property
    def cause(self) -> Finding | None:
        """The first cause. Those behind it may follow from it."""
        return next((f for f in self.findings if f.state == "cause"), None)


class Patient:
    """An adapter folder, its run's record where it has one, and both models."""

    def __init__(self, folder: Path, model: str | None, allow_pickle: bool) -> None:
        self.folder = store.folder(folder)
        self.config: Any = PeftConfig.from_pretrained(self.folder)
        self.record: dict[str, Any] = read_json(self.folder / RUN) if (self.folder / RUN).is_file() else {}
        self.source = source = find_source(self.folder, model)
        self.tensors = store.read(self.folder, allow_pickle=allow_pickle)
        self.own = (self.folder / "tokenizer_config.json").is_file()
        self.renderer = Renderer(load.load_tokenizer(self.folder if self.own else source.base))
        base = load.load_model(source.base, dtype=source.dtype, load_in_4bit=source.load_in_4bit, held=True)
        self.base_config = base.config
        self.different = origin.difference(self.folder, base)
        self.tuned: Any = None
        self.refused = ""
        try:
            self.tuned = PeftModel.from_pretrained(base, self.folder, strict=False, allow_pickle=allow_pickle)
        except TrimtabError as error:
            self.refused = str(error)

    def number(self, *path: str) -> float | None:
        """A number of the run's record."""
        value: Any = self.record
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) else None

    def part(self, *path: str) -> dict[str, Any]:
        """An object of the run's record; an empty one where it is missing."""
        value: Any = self.record
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value if isinstance(value, dict) else {}

    @cached_property
    def losses(self) -> list[float]:
        """From `metrics.jsonl`. A line that was cut off is left out."""
        path, found = self.folder / METRICS, []
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []:
            try:
                row: Any = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and isinstance(row.get("loss"), (int, float)):
                found.append(float(row["loss"]))
        return found

    @cached_property
    def said(self) -> tuple[list[Tensor], list[Tensor]]:
        """The logits of the probes: tuned, and of the untouched base."""
        ids = probes(self.folder, self.renderer)
        tuned = logits(self.tuned, ids)
        with self.tuned.disable_adapter():
            return tuned, logits(self.tuned, ids)

    @cached_property
    def finite(self) -> tuple[bool, bool]:
        tuned, base = self.said
        return all(bool(t.isfinite().all()) for t in tuned), all(bool(t.isfinite().all()) for t in base)

    @cached_property
    def apart(self) -> Difference:
        tuned, base = self.said
        return compare(base, tuned)


def examine(folder: str | Path, *, model: str | None = None, allow_pickle: bool = False) -> Report:
    """Look for each known cause. Raises `TrimtabError` where there is nothing to look at: no adapter folder, no base, a
    file that cannot be read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrimtabWarning)
        patient = Patient(Path(folder).expanduser(), model, allow_pickle)
        report = Report(str(patient.folder), str(patient.source.base))
        for name, check in CHECKS.items():
            state, seen, fix = check(patient)
            report.findings.append(Finding(name, state, seen, fix))
    return report


def _well(seen: str) -> Found:
    return "well", seen, ""


def _unknown(seen: str) -> Found:
    return "unknown", seen, ""


NO_RECORD = f"the folder has no {RUN}: what the run did is not recorded"


def _keys(p: Patient) -> Found:
    """Loaded without its keys, an adapter is its random start: the base."""
    fix = f"the model that it was made for (--model FOLDER), or a copy of the folder that is whole{_named(p)}"
    if p.refused:
        return "cause", f"the adapter does not go onto the base: {p.refused}", fix
    if problems := p.tuned.load_report.problems():
        return "cause", f"the tensors are not those of this model: {'; '.join(problems)}", fix
    return _well(f"all {len(p.tuned.load_report.loaded):,} tensors of the file are in the model")


def _named(p: Patient) -> str:
    name = p.config.base_model_name_or_path
    return f"; its config names {name!r}" if name else ""


def _delta(p: Patient) -> Found:
    if p.tuned is None:
        return _unknown("the adapter is not on the model")
    if not all(p.finite):
        return _unknown("the logits are not finite")
    far = f"logits differ from the base's by {100 * p.apart.relative:.2g} % of their spread"
    more = "a higher learning rate, more steps, or the checkpoint that was meant: this one may be a run's first"
    if p.apart.maximum == 0:
        zero = sorted({key.rpartition(".")[0].rpartition(".")[2] for key, t in p.tensors.items() if not t.any()})
        held = f"; all zero: {', '.join(zero[:4])}" if zero else ""
        return "cause", f"the adapter changes nothing: on {p.apart.probes} probes the logits are the base's{held}", more
    if p.apart.relative < NOTICEABLE:
        return "cause", f"the adapter changes next to nothing: {far}", more
    return _well(f"{far}, another first choice at {100 * (1 - p.apart.agreement):.1f} % of {p.apart.positions:,} places")


def _template(p: Patient) -> Found:
    there: Any = p.part("template", "reads")
    if not there:
        return _unknown(NO_RECORD if not p.record else f"{RUN} does not say how the run read conversations")
    whose = "saved with the adapter" if p.own else "of the base (the folder has none of its own)"
    if wrong := talks.different(there, talks.reads(p.renderer)):
        return (
            "cause",
            f"the tokenizer and template {whose} read {len(wrong)} of {len(there)} conversations as other tokens than the "
            f"run did ({', '.join(wrong[:4])}): the model is asked in a way it never saw",
            "tokenizer_config.json, tokenizer.json and chat_template.jinja as the run wrote them beside the adapter",
        )
    return _well(f"the tokenizer and template {whose} read conversations as the run did")


def _end(p: Patient) -> Found:
    template = p.part("template")
    total, ending = p.number("template", "examples"), p.number("template", "examples_with_a_learnt_end")
    end: Any = template.get("end_of_turn") or p.renderer.tokenizer.eos_token
    if total is None or ending is None:
        return _unknown(NO_RECORD if not p.record else f"{RUN} does not count the ends that were learnt")
    known: Any = template.get("stop_token_ids")
    if isinstance(known, list) and not set(known) & set(p.renderer.stop_token_ids):
        return (
            "cause",
            f"the run learnt to end with {end}, and generation stops at {p.renderer.end_of_turn}",
            "the tokenizer and template of the run; elsewhere, that token among the stop tokens",
        )
    if total and ending / total < ENDS:
        cut = p.part("options").get("overlong") == "truncate_end"
        why = ": overlong truncate_end cuts it off" if cut else ""
        fix = "--overlong drop, or a larger --max_length" if cut else "rows whose last turn is the assistant's, and whole"
        return "cause", f"{end} ends {int(ending):,} of {int(total):,} examples, so the model never stops{why}", fix
    return _well(f"{end} is learnt at the end of {int(ending):,} of {int(total):,} examples")


def _dtype(p: Patient) -> Found:
    kinds = sorted({str(t.dtype).removeprefix("torch.") for t in p.tensors.values() if t.is_floating_point()})
    broken = [key for key, t in p.tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())]
    used = str(p.source.dtype).removeprefix("torch.")
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        return "cause", f"{broken[0]}{more} is not finite", "an earlier checkpoint; then a lower learning rate, or float32"
    if p.tuned is not None and not all(p.finite):
        whose = "tuned model's" if p.finite[1] else "base's own"
        fix = "train and run it in bfloat16 or float32 (--dtype): float16 ends at 65,504"
        return "cause", f"the {whose} logits are not finite in {used}", fix
    return _well(f"the adapter is stored in {', '.join(kinds) or 'no float'}, the base computes in {used}: all finite")


def _base(p: Patient) -> Found:
    if p.different:
        return "cause", f"another base: {p.different}", "load it on the base that it was made for: --model FOLDER"
    if origin.read(p.folder) is None:
        missing = f"the folder has no record of its base ({origin.FILE})"
        return _unknown(f"{missing}: which one it was made for is known by name alone{_named(p)}")
    return _well("the base has the config, the tensors and the values that were recorded")


def _labels(p: Patient) -> Found:
    supervised, seen = p.number("supervised_tokens"), p.number("tokens_seen")
    read, kept = p.number("data", "train", "read"), p.number("data", "train", "kept")
    if supervised is None or seen is None:
        return _unknown(NO_RECORD if not p.record else f"{RUN} does not count labels")
    if not supervised:
        return "cause", f"of {int(seen):,} tokens none carried loss", "trimtab data check DATA shows what is learnt"
    if read and kept is not None and kept / read < KEPT:
        dropped = p.part("data", "train", "dropped")
        why = ", ".join(f"{d.get('rows')} {reason}" for reason, d in dropped.items() if isinstance(d, dict))
        fix = "mend the rows, or a larger --max_length: trimtab data check DATA shows them"
        return "cause", f"of {int(read):,} rows {int(kept):,} were trained on ({why or 'the rest was dropped'})", fix
    return _well(f"{int(supervised):,} of {int(seen):,} tokens carried loss")


def _loss(p: Patient) -> Found:
    if not p.losses:
        return _unknown(NO_RECORD if not p.record else f"{METRICS} holds no loss")
    if bad := [i + 1 for i, loss in enumerate(p.losses) if not math.isfinite(loss)]:
        return "cause", f"the loss was not finite at line {bad[0]} of {METRICS}", "a lower learning rate, or float32"
    n = max(1, len(p.losses) // 10)
    first, last = mean(p.losses[:n]), mean(p.losses[-n:])
    fell = f"the loss went from {first:.4g} to {last:.4g}"
    steps = p.number("steps") or len(p.losses)
    if p.record.get("status") == "failed":
        why = str(p.record.get("error"))[:200]
        return "cause", f"the run failed after {int(steps):,} steps: {why}", "mend it, and run again"
    if steps < FEW:
        return "cause", f"the run took {int(steps)} steps ({fell})", "more rows, more epochs, or a smaller --batch_size"
    if last >= first:
        return "cause", f"nothing was learnt: {fell}", "another learning rate (below), more steps, or other targets"
    before, after = p.number("eval_loss_before"), p.number("eval_loss")
    if before is not None and after is not None and after > before:
        seen = f"held-out rows became less likely ({before:.4g} before, {after:.4g} after) while {fell}"
        return "cause", seen, "fewer epochs, more rows, a smaller rank or rate; --load_best_model_at_end keeps the best"
    return _well(f"{fell} in {int(steps):,} steps")


def _rate(p: Patient) -> Found:
    used = p.number("options", "learning_rate")
    if used is None:
        return _unknown(NO_RECORD if not p.record else f"{RUN} names no learning rate")
    if p.config.peft_type != "LORA":
        return _unknown(f"{used:g}; what is usual for {p.config.peft_type} is not known here")
    usual = rate.learning_rate(p.base_config)
    if not usual * SLOWEST <= used <= usual * FASTEST:
        word = "low" if used < usual else "high"
        return "cause", f"{used:g} is very {word}: {usual:g} is usual for a model of this width", f"--learning_rate {usual:g}"
    return _well(f"{used:g}; {usual:g} is usual for a model of this width")


CHECKS: dict[str, Callable[[Patient], Found]] = {
    "keys": _keys,
    "change": _delta,
    "template": _template,
    "end": _end,
    "dtype": _dtype,
    "base": _base,
    "labels": _labels,
    "loss": _loss,
    "rate": _rate,
}

"""Kills a run again and again, resumes it, and compares what comes out with the run that nothing interrupted, byte by byte.

    python bench/kill_resume.py                       # 200 kills over all the methods below; minutes on one core
    python bench/kill_resume.py --kills 20 --methods lora,adalora --seed 7

Each run is `trimtab train` on a tiny random Llama and rows made here: packs, shared prefixes, dropout, two epochs in random
order, a checkpoint every second step, two of them kept. It is killed (SIGKILL) in a step, in a save, or anywhere, which is
drawn by lot, then resumed from the last checkpoint (or begun again where there is none), killed again, and in the end left
alone. Compared are the trained tensors, the optimizer's state, the adapter's file and the loss of every step.

One warm process has everything imported, and forks a child for each run.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trimtab.train import run as running
from trimtab.train import samples, saving
from trimtab.train.options import TrainOptions
from trimtab.train.trainer import Trainer

STEPS = 12
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_dropout": 0.2},
    "adalora": {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 2, "total_step": STEPS, "lora_dropout": 0.1},
    "dora": {"r": 4, "lora_dropout": 0.1},
    "vera": {"r": 8, "vera_dropout": 0.1},
    "ia3": {},
    "oft": {"oft_block_size": 8, "module_dropout": 0.1},
    "adamss": dict(r=8, num_subspaces=3, use_asa=True, init_warmup=1, final_warmup=9, mask_interval=2, asa_target_subspaces=6),
    "pvera": {"r": 8},
    "prompt_tuning": {"num_virtual_tokens": 4},
}
WITHOUT_TARGETS = {"prompt_tuning"}
WHERE = ("in a step", "in a save", "anywhere")
STARTING, STEPPING, SAVING = range(3)
COMPARED = ("trainable.safetensors", "optimizer.safetensors", "adapter_model.safetensors")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_model(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<|im_start|>", "<|im_end|>", *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"],
        chat_template=TEMPLATE,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(path: Path) -> None:
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for i in range(24):
            answer = draw.choice(("red", "blue", "green")) * draw.randint(1, 4)
            file.write(json.dumps({"instruction": "Name a colour.", "input": f"row {i}", "output": answer}) + "\n")


class Phase:
    """What the child is doing, in a byte that both processes see."""

    def __init__(self) -> None:
        self.shared = mmap.mmap(-1, 1)

    def now(self) -> int:
        return self.shared[0]

    def set(self, phase: int) -> None:
        self.shared[0] = phase


class Bench:
    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.draw, self.phase = folder, random.Random(seed), Phase()
        self.model, self.rows = folder / "model", folder / "rows.jsonl"
        write_model(self.model)
        write_rows(self.rows)

    def options(self, method: str, out: Path, resume: bool) -> TrainOptions:
        targets = {} if method in WITHOUT_TARGETS else {"target_modules": ["q_proj", "v_proj", "down_proj"]}
        own = METHODS[method] | targets
        if method == "ia3":
            own["feedforward_modules"] = ["down_proj"]
        return TrainOptions(
            model=str(self.model), dataset=[str(self.rows)], output_dir=str(out), adapter=method, batch_size=4,
            num_train_epochs=2.0, learning_rate=1e-2, dtype="float32", pack_tokens=256, save_steps=2, save_total_limit=2,
            compile="off", adapter_options=own, resume_from_checkpoint="last" if resume else None,
        )  # fmt: skip

    def start(self, method: str, out: Path, resume: bool) -> int:
        """Fork a child that trains; returns its number."""
        self.phase.set(STARTING)
        if child := os.fork():
            return child
        code = 1
        try:
            with (out.parent / "log").open("a") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                self._watched()
                running.run(self.options(method, out, resume), console=Console(file=log, width=200))
                code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def _watched(self) -> None:
        """In the child: say when a step and when a save begins and ends."""
        samples.choose = lambda *_: []  # its answers are of no interest here
        running.picture.draw = lambda *_: None
        for owner, name, phase in ((Trainer, "training_step", STEPPING), (saving, "save", SAVING)):
            setattr(owner, name, self._told(getattr(owner, name), phase))

    def _told(self, work: Any, phase: int) -> Any:
        def told(*args: Any, **kwargs: Any) -> Any:
            before = self.phase.now()
            self.phase.set(phase)
            try:
                return work(*args, **kwargs)
            finally:
                self.phase.set(before)

        return told

    def whole(self, method: str) -> tuple[Path, float]:
        """The run that nothing interrupts, and its seconds."""
        out = self.folder / method / "whole" / "out"
        out.parent.mkdir(parents=True)
        began = time.monotonic()
        status = os.waitpid(self.start(method, out, False), 0)[1]
        if status:
            raise SystemExit(f"{method}: the uninterrupted run failed\n{(out.parent / 'log').read_text()[-3000:]}")
        return out, time.monotonic() - began

    def kill(self, child: int, where: str, seconds: float) -> str | None:
        """Kill the child at a moment drawn by lot; returns what it was doing, or None: it was done before."""
        wanted = {"in a step": STEPPING, "in a save": SAVING}.get(where)
        moment = time.monotonic() + self.draw.uniform(0, seconds)
        while time.monotonic() < moment or (wanted is not None and self.phase.now() != wanted):
            if os.waitpid(child, os.WNOHANG)[0]:
                return None
            time.sleep(0.0005)
        if wanted is not None:
            time.sleep(self.draw.uniform(0, 0.004))  # a step of so small a model takes some milliseconds
        doing = ("between", "in a step", "in a save")[self.phase.now()]
        os.kill(child, signal.SIGKILL)
        return doing if os.WIFSIGNALED(os.waitpid(child, 0)[1]) else None

    def broken_off(self, method: str, number: int, kills: int, seconds: float) -> tuple[Path, Counter[str], list[str]]:
        """A run that is killed so often and then left alone: its folder, where it was killed, and what went wrong."""
        out, met = self.folder / method / str(number) / "out", Counter[str]()
        out.parent.mkdir(parents=True)
        resume = False
        while True:
            child = self.start(method, out, resume)
            doing = self.kill(child, self.draw.choice(WHERE), seconds) if met.total() < kills else None
            if doing is None and met.total() >= kills:
                if os.waitpid(child, 0)[1]:
                    return out, met, [f"resuming failed:\n{(out.parent / 'log').read_text()[-3000:]}"]
                return out, met, []
            if doing is None and json.loads((out / "run.json").read_text())["status"] != "completed":
                return out, met, [f"resuming failed:\n{(out.parent / 'log').read_text()[-3000:]}"]
            met.update([doing] if doing else [])  # it may have been done before its moment came: it is resumed at its end
            resume = any(out.glob("checkpoint-*"))


def losses(out: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def differences(out: Path, whole: Path) -> list[str]:
    found = []
    for name in COMPARED:
        own, other = (folder / f"checkpoint-{STEPS}" / name for folder in (out, whole))
        if own.read_bytes() != other.read_bytes():
            found.append(f"{name} differs")
    if (out / COMPARED[2]).read_bytes() != (whole / COMPARED[2]).read_bytes():
        found.append("the adapter that the run leaves differs")
    mine, theirs = losses(out), losses(whole)
    if mine != theirs:
        steps = [a for a, b in zip(mine, theirs, strict=False) if a != b] or [("length", len(mine), len(theirs))]
        found.append(f"losses differ, first {steps[0]}")
    kept = sorted(f.name for f in out.iterdir() if "checkpoint" in f.name)
    if kept != [f"checkpoint-{STEPS - 2}", f"checkpoint-{STEPS}"]:
        found.append(f"the folder holds {kept}")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="in all")
    parser.add_argument("--per_run", type=int, default=4, help="kills of one run before it is left alone")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seed", type=int, default=0, help="of the moments; 0 draws other ones each time")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    seed, names = args.seed or time.time_ns() % 10**9, args.methods.split(",")
    folder = Path(tempfile.mkdtemp(prefix="kill_resume_"))
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    bench, began, bad = Bench(folder, seed), time.monotonic(), 0
    print(f"seed {seed}: {args.kills} kills over {len(names)} methods, {STEPS} steps a run, a checkpoint every second one")
    print("method         kills  in a step  in a save  between  runs  identical  seconds")
    shares = [args.kills // len(names) + (i < args.kills % len(names)) for i in range(len(names))]
    every = Counter[str]()
    for method, share in zip(names, shares, strict=True):
        start, met, good, number = time.monotonic(), Counter[str](), 0, 0
        whole, seconds = bench.whole(method)
        while met.total() < share:
            out, killed, wrong = bench.broken_off(method, number, min(args.per_run, share - met.total()), seconds)
            wrong = wrong or differences(out, whole)
            met += killed
            number += 1
            good += not wrong
            bad += bool(wrong)
            for text in wrong:
                print(f"  {method}, run {number} (kept in {out.parent}): {text}")
            if not wrong:
                shutil.rmtree(out.parent)
        every += met
        row = "".join(f"{met[w]:>{n}}" for w, n in (("in a step", 11), ("in a save", 11), ("between", 9)))
        print(f"{method:<14}{met.total():>6}{row}{number:>6}{good:>11}{time.monotonic() - start:>9.0f}", flush=True)
    row = "".join(f"{every[w]:>{n}}" for w, n in (("in a step", 11), ("in a save", 11), ("between", 9)))
    print(f"{'all':<14}{every.total():>6}{row}   {'every run identical' if not bad else f'{bad} runs differ'}"
          f", {time.monotonic() - began:.0f} s")  # fmt: skip
    if not bad:
        shutil.rmtree(folder)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())

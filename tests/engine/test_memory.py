"""Running out of memory: how it is noticed, and that the step is done again as if nothing had been."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))  # the tiny model and its rows are made there

import tiny_llama as tiny
from full_memory import Full

from trimtab.engine import memory
from trimtab.engine.forward import Engine
from trimtab.engine.memory import OverLimit, Watch, out_of_memory
from trimtab.errors import TrainingError
from trimtab.train.batches import Together
from trimtab.train.packing import Packing
from trimtab.train.trainer import Trainer

LAYERS = 2


def trainer(
    folder: Path, full: Watch | None, *, tokens: int = 1024, dropout: float = 0.0, **over: Any
) -> tuple[Trainer, list[str]]:
    """Steps of eight rows in packs of so many tokens; what is said about memory."""
    said: list[str] = []
    model = tiny.adapted(lora_dropout=dropout)
    packing = Packing(Engine(model), tokens, say=said.append)
    packing.engine.watch = full
    settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 3}
    made = Trainer(
        model=model, args=tiny.arguments(folder, **settings | over), train_dataset=tiny.rows(40),
        eval_dataset=tiny.rows(20, seed=1), data_collator=Together(), packing=packing,
    )  # fmt: skip
    return made, said


def trained(*args: Any, **over: Any) -> tuple[Trainer, list[str]]:
    made, said = trainer(*args, **over)
    made.train()
    return made, said


Calm = Callable[..., Trainer]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Calm:
    """The run that never runs out, once for each set of options."""
    done: dict[str, Trainer] = {}

    def run(**over: Any) -> Trainer:
        key = repr(sorted(over.items()))
        if key not in done:
            done[key], said = trained(tmp_path_factory.mktemp("calm"), None, **over)
            assert said == []
        return done[key]

    return run


def same(a: Trainer, b: Trainer) -> None:
    """Bit for bit."""
    assert tiny.losses(a) == tiny.losses(b)
    for name, p in tiny.tensors(a.model).items():
        assert torch.equal(p, tiny.tensors(b.model)[name]), name
    seen = [(t.counts.examples, t.counts.tokens, t.counts.supervised) for t in (a, b)]
    assert seen[0] == seen[1]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("look", [LAYERS + 1, LAYERS + 2])  # in the second step: at its first layer, at its last
def test_a_step_that_runs_out_of_memory_is_done_again_exactly(
    tmp_path: Path, calm: Calm, look: int, dropout: float
) -> None:
    hit, said = trained(tmp_path, Full(look), dropout=dropout)
    same(hit, calm(dropout=dropout))
    assert hit.packing is not None and hit.packing.tokens == 512
    assert said == ["out of memory: 512 tokens in one pass from here on; the step is done again, nothing is lost"]


@pytest.mark.parametrize("look", [1, LAYERS + 1, 2 * LAYERS])  # in the first pack of a step, in the second
def test_what_packs_of_the_step_had_done_is_not_done_twice(tmp_path: Path, calm: Calm, look: int) -> None:
    quiet = calm(tokens=128)
    hit, said = trained(tmp_path, Full(look), tokens=128)
    assert len(said) == 1 and hit.packing is not None and hit.packing.tokens == 64
    assert tiny.losses(hit) == pytest.approx(tiny.losses(quiet), abs=1e-6)  # other packs: other sums, not other steps
    for name, p in tiny.tensors(quiet.model).items():
        assert torch.allclose(p, tiny.tensors(hit.model)[name], atol=2e-5), name
    assert hit.counts.computed == quiet.counts.computed


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("micro", [1, 2, 4])  # the micro-batch of the first step that is hit
def test_gradients_of_earlier_micro_batches_are_kept(tmp_path: Path, calm: Calm, micro: int, dropout: float) -> None:
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "dropout": dropout}
    hit, said = trained(tmp_path, Full(micro * LAYERS), **split)
    same(hit, calm(**split))
    assert len(said) == 1


def test_several_times_in_one_step(tmp_path: Path, calm: Calm) -> None:
    hit, said = trained(tmp_path, Full(1, 3, 5))  # 1024, 512, 256: and then 128 do
    assert hit.packing is not None and hit.packing.tokens == 128 and len(said) == 3
    assert tiny.losses(hit) == pytest.approx(tiny.losses(calm()), abs=1e-6)


def test_it_gives_up_at_the_smallest_budget(tmp_path: Path) -> None:
    run, said = trainer(tmp_path, Full(*range(1, 100)), tokens=256, save_strategy="steps", save_steps=1)
    before = {name: p.detach().clone() for name, p in tiny.tensors(run.model).items()}
    with pytest.raises(TrainingError, match=r"out of memory with 64 tokens in one pass .*--load_in_4bit"):
        run.train()
    assert len(said) == 2 and not [*tmp_path.iterdir()]
    assert all(torch.equal(p, before[name]) for name, p in tiny.tensors(run.model).items())
    assert tiny.base(run.model).config._attn_implementation == "sdpa"


def test_other_errors_are_not_taken_for_memory(tmp_path: Path) -> None:
    run, said = trainer(tmp_path, None)

    def broken(*_: Any) -> None:
        raise RuntimeError("shapes do not fit")

    tiny.base(run.model).model.layers[0].register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run.train()
    assert said == []


def test_evaluation_goes_on_with_less(tmp_path: Path) -> None:
    quiet, _ = trainer(tmp_path / "a", None)
    hit, said = trainer(tmp_path / "b", Full(2))
    assert hit.evaluate()["eval_loss"] == pytest.approx(quiet.evaluate()["eval_loss"], abs=1e-6)
    assert len(said) == 1


def test_what_the_failed_pass_held_is_free_before_the_next(tmp_path: Path) -> None:
    """An error that is kept keeps its frames, and they all that was computed: the second try would have no more room."""
    held: list[weakref.ref[Any]] = []
    alive: list[int] = []

    class Counting(Full):
        def look(self) -> None:
            if self.looks == 2:  # the second try begins
                alive.append(sum(ref() is not None for ref in held))
            super().look()

    run, _ = trainer(tmp_path, Counting(2), max_steps=1)

    def note(module: Any, args: Any, out: Any) -> None:
        if not alive:
            held.append(weakref.ref(out))

    for layer in tiny.base(run.model).model.layers:
        layer.mlp.register_forward_hook(note)
    run.train()
    assert len(held) >= 1 and alive == [0]


def test_ranks_do_not_start_again_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, said = trainer(tmp_path, Full(1))
    monkeypatch.setattr(type(run.accelerator), "num_processes", 2)
    run.current_gradient_accumulation_steps = 1
    with pytest.raises(TrainingError, match=r"fewer --pack_tokens than 1024, the same on all ranks"):
        run.training_step(run.model, Together()(tiny.rows(4)))
    assert said == []


# ---- how it is noticed


def test_a_watch_raises_above_its_limit() -> None:
    held = memory.resident()
    if not held:
        pytest.skip("this system does not say what a process holds")
    Watch(limit=2 * held).look()
    with pytest.raises(OverLimit, match=r"this process holds \d+\.\d GB, the limit is"):
        Watch(limit=held // 2).look()
    Watch(limit=0).look()  # no limit


def test_the_limit_is_what_is_free_or_granted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_free", lambda: 6000)
    monkeypatch.setattr(memory, "resident", lambda: 4000)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert Watch().limit == 9000
    (tmp_path / "memory.max").write_text("5000\n")
    assert Watch().limit == 4500
    (tmp_path / "memory.max").write_text("max\n")
    assert Watch().limit == 9000
    monkeypatch.setattr(memory, "_free", lambda: 0)  # a system that does not say
    assert Watch().limit == 0


def test_what_torch_says_when_a_cpu_has_no_more() -> None:
    with pytest.raises(RuntimeError) as said:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert out_of_memory(said.value)
    assert out_of_memory(torch.OutOfMemoryError("x")) and out_of_memory(MemoryError()) and out_of_memory(OverLimit())
    assert out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"))
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not out_of_memory(ValueError("out of memory"))


def test_random_numbers_and_gradients_are_put_back() -> None:
    from trimtab.train.packing import remembered

    layer = torch.nn.Linear(2, 2)
    layer.weight.grad = torch.ones(2, 2)
    back = remembered(layer, gradients=True)
    drawn = torch.rand(3)
    layer.weight.grad += 1
    layer.bias.grad = torch.ones(2)
    for _ in range(2):  # as often as it is needed
        back()
        assert torch.equal(torch.rand(3), drawn)
        assert layer.weight.grad.eq(1).all() and layer.bias.grad is None
        layer.weight.grad += 1
    remembered(layer, gradients=False)()
    assert layer.weight.grad is None

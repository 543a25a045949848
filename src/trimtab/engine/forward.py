"""`Engine`: packs through a causal language model, with the loss taken where it is wanted.

Whether a model can be laid out is not looked up in a list but tried: two short examples with a common beginning must give
the logits that they give alone, every attention layer must have read the layout, and the head's own logits must be ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.core.group import groups
from trimtab.data.encode import Example
from trimtab.data.pack import Pack, pack
from trimtab.engine.attention import attending
from trimtab.engine.compile import Compiled
from trimtab.engine.head import After, Pairs, losses
from trimtab.engine.layout import Layout
from trimtab.engine.memory import Watch
from trimtab.errors import NotSupported

EXACT = 1e-4  # root mean square difference of the logits that is rounding, as a share of their spread, in float32
ROUNDED = 0.1  # and in 16-bit floats; a wrong mask gives about 1
EVEN = 8  # bfloat16 products of a CPU are up to a quarter slower where the number of rows is no multiple of this


@dataclass
class Result:
    """The summed loss of a pack, differentiable, and the summed loss of each of its examples, `(B,)`."""

    loss: Tensor
    rows: Tensor


class Engine:
    """Runs packs through `model`, a causal language model of transformers that may carry adapters.

    Raises `NotSupported`, with the reason, for a model that cannot be laid out; such a one takes padded batches. The model
    is not changed: its attention reads layouts inside `running` only.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.after: After | None = None
        self.head = self._head()
        self.layers = _attention_layers(model)
        self.watch: Watch | None = None
        self.compiled: Compiled | None = None  # used in training steps, where it is set
        self._layouts: list[Layout] = []  # of this step: compiled layers know them by number alone
        self._probe()

    def _head(self) -> nn.Module:
        prompts = [g.name for g in groups(self.model).values() if g.adapter is not None]
        if prompts:
            raise NotSupported(f"adapter {prompts[0]!r} puts virtual tokens before each row")
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        if not isinstance(head, nn.Module):
            raise NotSupported("the model has no output layer that could be found")
        return head

    # ---- a step

    @contextmanager
    def running(self, *, training: bool = False) -> Iterator[None]:
        """Forward and backward of a step both belong inside: recomputed layers read their layout again."""
        quick = self.compiled.on() if training and self.compiled is not None else nullcontext()
        try:
            with attending(self.model), quick:
                yield
        finally:
            self._layouts.clear()

    def forward(self, model: nn.Module, pack: Pack) -> Result:
        """One pack through `model`: the engine's own, perhaps wrapped for several ranks."""
        device = next(self.model.parameters()).device
        pack = _even(pack)
        layout = Layout(pack.segments, device, self.watch)
        self._layouts.append(layout)
        h, _ = self._run(model, pack, layout)
        put = lambda x: torch.from_numpy(x).to(device, non_blocking=True)  # noqa: E731
        pairs = Pairs(put(pack.at), put(pack.targets), put(pack.weights))
        total, each = losses(h[put(pack.kept)], self.head, self.after, pairs)
        rows = each.new_zeros(len(pack.members)).index_add_(0, put(pack.owner), each[put(pack.pair)])
        return Result(total, rows)

    def _run(self, model: nn.Module, pack: Pack, layout: Layout) -> tuple[Tensor, Tensor]:
        """Hidden states before the head (T, d), and the model's own logits of its first token (V,)."""
        ids = torch.from_numpy(pack.input_ids).to(layout.device)[None]
        with _caught(self.head) as caught:
            out = model(
                input_ids=ids, position_ids=layout.position_ids[None], layout=layout.handle, use_cache=False
            )
        if len(caught) != 1 or caught[0].shape[:2] != ids.shape:
            raise NotSupported("the model does not put its hidden states through its output layer once")
        if layout.calls != self.layers:
            raise NotSupported(f"{layout.calls} of its {self.layers} layers read the layout")
        return caught[0][0], out.logits[0, 0]

    # ---- can it be done at all

    @torch.no_grad()
    def _probe(self) -> None:
        model, device = self.model, next(self.model.parameters()).device
        size = int(self.head.weight.shape[0]) if hasattr(self.head, "weight") else 100
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(size // 2, (80,), generator=draw).tolist()
        tests = sorted([ids[:56], ids[:40] + ids[56:]])  # 40 tokens in common; in a row the lesser ids come first
        examples = [Example(t, [True] * len(t), "", 0) for t in tests]
        laid = pack(examples)
        layout = Layout(laid.segments, device)
        training = model.training
        try:
            with self.running(), torch.random.fork_rng(devices=[]):
                self._run(model.train(), laid, Layout(laid.segments, device))  # what it refuses in training shows here
                h, first = self._run(model.eval(), laid, layout)
            wanted = [model(input_ids=torch.tensor([t], device=device), use_cache=False).logits[0] for t in tests]
            z = self.head(h)
            self.after = self._find_after(z[0], first)
            z = z if self.after is None else self.after(z)
        except NotSupported:
            raise
        except (TypeError, KeyError, ValueError, AttributeError, IndexError) as error:
            raise NotSupported(f"its forward does not take a layout ({type(error).__name__}: {error})") from error
        finally:
            model.train(training)
        n = len(tests[0])
        places = [torch.arange(n), torch.cat([torch.arange(40), torch.arange(n, 80)])]
        for at, want in zip(places, wanted, strict=True):
            if not (error := _apart(z[at], want)) <= _rounding(z):
                raise NotSupported(f"its logits differ by {error:.1%} of their spread when rows are packed")

    def _find_after(self, ours: Tensor, theirs: Tensor) -> After | None:
        """What the model does to its logits behind the head: nothing, or one of the known things."""
        config = self.model.config
        for after in (None, *_known_after(config)):
            z = ours if after is None else after(ours)
            if _apart(z, theirs) <= _rounding(z):
                return after
        raise NotSupported("it changes its logits behind the output layer in a way that is not known")


def _even(pack: Pack) -> Pack:
    """The same pack, `EVEN` tokens long or a multiple: its last segment goes on with tokens that nothing looks at."""
    fill = -len(pack.input_ids) % EVEN
    *others, last = pack.segments
    segments = (*others, replace(last, length=last.length + fill))
    return replace(pack, input_ids=np.pad(pack.input_ids, (0, fill)), segments=segments)


def _apart(a: Tensor, b: Tensor) -> float:
    """Root mean square difference, as a share of the spread of `b`."""
    return float((a - b).float().square().mean().sqrt() / b.float().std())


def _rounding(x: Tensor) -> float:
    return EXACT if x.dtype.itemsize >= 4 else ROUNDED


def _known_after(config: Any) -> Iterator[After]:
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if cap := getattr(config, "final_logit_softcapping", None):
        yield lambda z: torch.tanh(z / cap) * cap
    if scale := getattr(config, "logit_scale", None):
        yield lambda z: z * scale
    if divisor := getattr(config, "logits_scaling", None):
        yield lambda z: z / divisor


def _attention_layers(model: Any) -> int:
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    return int(getattr(config, "num_hidden_layers", 0))


@contextmanager
def _caught(head: nn.Module) -> Iterator[list[Tensor]]:
    """What goes into `head` inside; it is given the first token alone, so that no other logits are made."""
    found: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        found.append(args[0])
        return (args[0][:, :1], *args[1:])

    handle = head.register_forward_pre_hook(hook)
    try:
        yield found
    finally:
        handle.remove()


def engine_for(model: Any) -> tuple[Engine | None, str]:
    """The engine of a model, or None and the line that says why it takes padded batches."""
    try:
        return Engine(model), ""
    except NotSupported as reason:
        return None, f"padded batches: {reason}"

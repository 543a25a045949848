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
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.group import groups
from trimtab.data.encode import Example
from trimtab.data.pack import Pack, pack
from trimtab.engine.attention import attending
from trimtab.engine.compile import Compiled
from trimtab.engine.head import After, Pairs, losses
from trimtab.engine.layout import EVEN, Layout
from trimtab.engine.memory import Watch, out_of_memory
from trimtab.errors import NotSupported
from trimtab.verbs import Verbs

EXACT = 1e-4  # what is rounding in float32: the difference of logits as a share of their spread, at half the tokens or more
ROUNDED = 0.2  # and in 16-bit floats, where single tokens may be off by several times that; a wrong mask gives more than 1
KEPT = 64 << 20  # bytes of attention weights that a pack keeps for its backward: all of short rows, the first of long ones
KINDS = 5  # leading bits of a row's length, zeros behind them: each shape of a product is 2 ms and 0.1 MB of code on a CPU


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
        self.model = model.get_base_model() if isinstance(model, Verbs) else model
        self.after: After | None = None
        self.head = self._head()
        self.layers = int(getattr(_text(self.model.config), "num_hidden_layers", 0))
        self.may_recompute: list[Any] = [m for m in self.model.modules() if hasattr(m, "gradient_checkpointing")]
        self.watch: Watch | None = None
        self.compiled: Compiled | None = None  # used in training steps, where it is set
        self._layouts: list[Layout] = []  # of this step: compiled layers know them by number alone
        self._probe()

    def _head(self) -> nn.Module:
        prompts = [g.name for g in groups(self.model).values() if g.adapter is not None]
        if prompts:
            raise NotSupported(f"adapter {prompts[0]!r} puts virtual tokens before each row")
        if len({p.device for p in self.model.parameters()}) > 1:
            raise NotSupported("its weights lie on several devices")
        if adds_to_its_loss(self.model):
            raise NotSupported("output_router_logits of its config adds a loss of its routers, by batch")
        if not getattr(self.model, "_can_set_attn_implementation", lambda: False)():
            raise NotSupported("its attention cannot be told to read a layout")
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
        length, pack = len(pack.input_ids), _even(pack)
        layout = Layout(pack.segments, device, self.watch, len(pack.input_ids) - length)
        if torch.is_grad_enabled() and not any(m.gradient_checkpointing for m in self.may_recompute):
            layout.room = KEPT
        self._layouts.append(layout)
        return self._loss(self._run(model, pack, layout)[0], pack)

    def _loss(self, h: Tensor, pack: Pack) -> Result:
        """Of hidden states (T, d)."""
        put = lambda x: torch.from_numpy(x).to(h.device, non_blocking=True)  # noqa: E731
        pairs = Pairs(put(pack.at), put(pack.targets), put(pack.weights))
        total, each = losses(h[put(pack.kept)], self.head, self.after, pairs)
        rows = each.new_zeros(len(pack.members)).index_add_(0, put(pack.owner), each[put(pack.pair)])
        return Result(total, rows)

    def _run(self, model: nn.Module, pack: Pack, layout: Layout, *, own: int = 0) -> tuple[Tensor, Tensor]:
        """Hidden states before the head (T, d), and the model's own logits of its first `own` tokens (own, V)."""
        ids = torch.from_numpy(pack.input_ids).to(layout.device)[None]
        with _caught(self.head, own) as caught:
            out = model(
                input_ids=ids, position_ids=layout.position_ids[None], layout=layout.handle, use_cache=False
            )
        if len(caught) != 1 or caught[0].shape[:2] != ids.shape:
            raise NotSupported("the model does not put its hidden states through its output layer once")
        if layout.calls != self.layers:
            raise NotSupported(f"{layout.calls} of its {self.layers} layers read the layout")
        return caught[0][0], out.logits[0]

    # ---- can it be done at all

    @torch.no_grad()
    def _probe(self) -> None:
        """Two examples with a common beginning, packed and alone."""
        head: Any = self.head
        device = next(self.model.parameters()).device
        size = int(head.weight.shape[0]) if hasattr(head, "weight") else 100
        ids = torch.randint(size // 2, (80,), generator=torch.Generator().manual_seed(0)).tolist()
        tests = sorted([ids[:56], ids[:40] + ids[56:]])  # in a row the lesser ids come first
        laid = pack([Example(t, [True] * len(t), "", 0) for t in tests])
        layout = Layout(laid.segments, device)
        try:
            with _as_it_was(self.model), _no_zeros(self.model):
                with self.running():
                    self._run(self.model.train(), laid, Layout(laid.segments, device))  # what it refuses in training
                    h, first = self._run(self.model.eval(), laid, layout, own=1)
                wanted = [self.model(input_ids=torch.tensor([t], device=device), use_cache=False).logits[0] for t in tests]
                z = head(h)
                self.after = self._find_after(z[0], first[0])
                z = z if self.after is None else self.after(z)
                loss = float(self._loss(h, laid).loss)
        except (TypeError, KeyError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            if isinstance(error, NotSupported) or out_of_memory(error):
                raise
            reason = str(error).strip().split("\n")[0]
            raise NotSupported(f"its forward does not take a layout ({type(error).__name__}: {reason})") from error
        for own, want in zip(laid.segments[1:], wanted, strict=True):  # what follows the common beginning
            packed, apart = z[own.start :][: own.length], want[own.offset :][: own.length]
            if not (error := _apart(packed, apart)) <= _rounding(z):
                raise NotSupported(f"its logits differ by {error:.1%} of their spread when rows are packed")
        alone = sum(
            float(F.cross_entropy(want[:-1].float(), torch.tensor(t[1:], device=device), reduction="sum"))
            for want, t in zip(wanted, tests, strict=True)
        )
        if not abs(loss - alone) <= _rounding(z) * alone:
            raise NotSupported(f"its loss is {loss:.4g} when rows are packed, {alone:.4g} when they are not")

    def _find_after(self, ours: Tensor, theirs: Tensor) -> After | None:
        """What the model does to its logits behind the head: nothing, or the known thing that its config names, unless
        nothing is clearly nearer. A soft cap on small logits is all but nothing, and must be there when they grow."""
        tries: list[tuple[float, After | None]] = [(_apart(f(ours), theirs), f) for f in _known_after(self.model.config)]
        tries.append((_apart(ours, theirs) + _rounding(ours) / 10, None))
        error, after = min(tries, key=lambda tried: tried[0])
        if not error <= 1.1 * _rounding(ours):
            raise NotSupported("it changes its logits behind the output layer in a way that is not known")
        return after


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Modes of all modules, and random numbers, are afterwards what they were."""
    modes = [(module, module.training) for module in model.modules()]
    cards = {p.device for p in model.parameters() if p.is_cuda}
    try:
        with torch.random.fork_rng(devices=cards):
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _no_zeros(model: nn.Module) -> Iterator[None]:
    """Trained tensors that are zero, as those of a new adapter, are not inside: they would hide what they will do."""
    draw = torch.Generator().manual_seed(0)
    zeros = [p for p in model.parameters() if p.requires_grad and p.is_floating_point() and not p.any()]
    try:
        for p in zeros:
            p.copy_(torch.randn(p.shape, generator=draw) / 50)
        yield
    finally:
        for p in zeros:
            p.zero_()


def _even(pack: Pack) -> Pack:
    """The same pack, of a length that others have too: its last segment goes on with tokens that nothing looks at."""
    length = len(pack.input_ids)
    fill = -length % max(EVEN, 1 << max(length.bit_length() - KINDS, 0))
    *others, last = pack.segments
    segments = (*others, replace(last, length=last.length + fill))
    return replace(pack, input_ids=np.pad(pack.input_ids, (0, fill)), segments=segments)


def _apart(a: Tensor, b: Tensor) -> float:
    """Root mean square difference of logits (..., V), as a share of the spread of `b`: the median over tokens."""
    return float(((a - b).float().square().mean(-1).sqrt() / b.float().std(-1)).median())


def _rounding(x: Tensor) -> float:
    exact = x.dtype.itemsize >= 4 and torch.get_float32_matmul_precision() == "highest"  # else TF32, or bfloat16
    return EXACT if exact else ROUNDED


def _known_after(config: Any) -> Iterator[After]:
    config = _text(config)
    if cap := getattr(config, "final_logit_softcapping", None):
        yield lambda z: torch.tanh(z / cap) * cap
    if (scale := getattr(config, "logit_scale", None)) not in (None, 1):
        yield lambda z: z * scale
    if (divisor := getattr(config, "logits_scaling", None)) not in (None, 1):
        yield lambda z: z / divisor


def adds_to_its_loss(model: Any) -> bool:
    """Whether the model's own loss has a term beside that of the next token: experts whose config asks to balance them."""
    return bool(getattr(_text(getattr(model, "config", None)), "output_router_logits", False))


def _text(config: Any) -> Any:
    """Of a model of several kinds of input, what concerns text."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


@contextmanager
def _caught(head: nn.Module, own: int) -> Iterator[list[Tensor]]:
    """What goes into `head` inside; it is given the first `own` tokens alone, so that no other logits are made."""
    found: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        found.append(args[0])
        return (args[0][:, :own], *args[1:])

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

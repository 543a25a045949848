"""CPT: the embeddings of a context of examples, trained within a small ball around the words."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.config import in_range, method, one_of, option
from trimtab.errors import ConfigError, NotSupported
from trimtab.methods.prompt._embeddings import EmbeddedPrompt, vocabulary
from trimtab.methods.prompt._virtual import PromptConfig, read_model

if TYPE_CHECKING:
    from trimtab.core.group import Group

_TYPES = 4  # of a token, by its number modulo 4: 1 format of an input, 2 input, 3 format of a label, 0 label


@dataclass(kw_only=True)
class CPTConfig(PromptConfig):
    cpt_token_ids: list[int] | None = option(None, "tokens of the context; none: [0]")
    cpt_mask: list[int] | None = option(None, "kept for the file format; no effect")
    cpt_tokens_type_mask: list[int] | None = option(None, "type of each: 4 k + 1, 2, 3, 4 of example k; 0: none of them")
    opt_weighted_loss_type: str | None = option("none", "none, or decay: earlier labels count less", choices=["decay"])
    opt_loss_decay_factor: float | None = option(1.0, "what each label counts, over the next one")
    opt_projection_epsilon: float | None = option(0.1, "how far inputs may move, at a width of 2048")
    opt_projection_format_epsilon: float | None = option(0.1, "how far formats may")
    tokenizer_name_or_path: str | None = option(None, "kept for the file format; no effect")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.task_type = self.task_type or "CAUSAL_LM"
        if self.task_type != "CAUSAL_LM":
            raise NotSupported(f"CPT is for task_type='CAUSAL_LM', not {self.task_type!r}")
        self.cpt_token_ids = [0] if self.cpt_token_ids is None else self.cpt_token_ids
        n = self.num_virtual_tokens = len(self.cpt_token_ids)
        self.num_transformer_submodules = 1
        self.cpt_mask = self.cpt_mask or [1] * n
        self.cpt_tokens_type_mask = self.cpt_tokens_type_mask or [1] * n
        if not n == len(self.cpt_mask) == len(self.cpt_tokens_type_mask):
            raise ConfigError("cpt_token_ids, cpt_mask and cpt_tokens_type_mask are of different lengths")
        one_of("opt_weighted_loss_type", self.opt_weighted_loss_type, ["none", "decay"])
        for name in ("opt_loss_decay_factor", "opt_projection_epsilon", "opt_projection_format_epsilon"):
            in_range(name, getattr(self, name), 0)


@method("CPT", config=CPTConfig, small={"cpt_token_ids": [5, 6, 7], "cpt_tokens_type_mask": [1, 2, 3],
        "opt_projection_epsilon": 99.0, "opt_projection_format_epsilon": 99.0})  # fmt: skip
class CPT(EmbeddedPrompt):
    """E' = [E(context) + D; E(ids)],  |D_i| <= eps sqrt(dim / 2048)                        arXiv:2410.17222, algorithm 1

    D (n, dim) trained but for the rows of labels, and put back into its ball whenever it is used. The labels of the context
    count in the loss, those of its example k from the last with the weight decay^k; the mean is over all that count.
    """

    takes = ("input_type_mask",)
    own_loss = True
    asked: tuple[Tensor, Tensor] | None = None  # labels and types of the tokens of a call

    def __init__(self, cfg: CPTConfig, model: nn.Module) -> None:
        read_model(cfg, model)
        super().__init__(cfg, cfg.num_virtual_tokens, cfg.token_dim or 0)
        ids, kinds = torch.tensor(cfg.cpt_token_ids), torch.tensor(cfg.cpt_tokens_type_mask)
        self.ids, self.kinds = nn.Buffer(ids, persistent=False), nn.Buffer(kinds, persistent=False)
        form, scale = cfg.opt_projection_format_epsilon, ((cfg.token_dim or 0) / 2048) ** 0.5
        radius = torch.tensor([0.0, form, cfg.opt_projection_epsilon, form])[kinds % _TYPES] * (kinds > 0) * scale
        self.radius = nn.Buffer(radius[:, None], persistent=False)
        words = vocabulary(model)
        centre = words[ids] if not words.is_meta else self.embedding.weight.detach()
        self.centre = nn.Buffer(centre.clone(), persistent=False)
        self.start = nn.Buffer(centre.clone(), persistent=False)  # the words, or where a file left off
        nn.init.zeros_(self.embedding.weight)

    def table(self) -> Tensor:
        D = self.embedding.weight
        with torch.no_grad():
            moved = self.start + D - self.centre  # (n, dim)
            length = moved.norm(dim=1, keepdim=True)
            back = self.centre - self.start + moved * (self.radius / length.clamp_min(1e-30))
            D.copy_(torch.where(length > self.radius * (1 + 1e-6), back, D))
        return self.start + torch.where(self.kinds[:, None] % _TYPES == 0, D.detach(), D)

    def load(self, tensors: dict[str, Tensor]) -> None:
        super().load(tensors)
        self.start.copy_(self.embedding.weight.detach())
        nn.init.zeros_(self.embedding.weight)

    def attach(self, model: nn.Module, group: Group) -> list[Any]:
        return [*super().attach(model, group), model.register_forward_hook(partial(self.after, group))]

    def insert(self, call: dict[str, Any], model: Any, batch: int, side: str = "") -> None:
        labels, kinds, self.asked = call.pop("labels", None), self.told("input_type_mask", batch), None
        super().insert(call, model, batch, side)
        if labels is not None:
            kinds = torch.full_like(labels, _TYPES) if kinds is None else kinds.to(labels.device).long()
            above = -(-int(self.kinds.max()) // _TYPES) * _TYPES  # so that no type of the input is one of the context
            kinds = torch.cat([self.kinds.expand(batch, -1), torch.where(kinds > 0, kinds + above, kinds)], 1)
            labels = torch.cat([self.ids.expand(batch, -1), labels], 1).masked_fill((kinds <= 0) | (kinds % _TYPES != 0), -100)
            self.asked = labels[:, 1:], kinds[:, 1:]

    def after(self, group: Group, module: Any, args: Any, output: Any) -> None:
        if group.live and self.asked is not None:
            (labels, kinds), self.asked = self.asked, None
            losses = F.cross_entropy(output.logits[:, :-1].float().transpose(1, 2), labels, reduction="none")
            output.loss = (losses * self.weights(kinds))[labels != -100].mean()

    def weights(self, kinds: Tensor) -> Tensor:
        """What each token counts: decay to the power of how many labels come after its own."""
        made = torch.ones(kinds.shape, device=kinds.device)
        if self.cfg.opt_weighted_loss_type == "decay":
            for row, own in enumerate(kinds):
                groups = own[(own > 0) & (own % _TYPES == 0)].unique()
                later = len(groups) - 1 - torch.searchsorted(groups, own.contiguous())
                made[row] = self.cfg.opt_loss_decay_factor ** later.clamp_min(0)
        return made

"""P-tuning: embeddings in front of the input, made by a small network while training."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from trimtab.core.config import in_range, method, one_of, option
from trimtab.errors import TrimtabWarning
from trimtab.methods.prompt._embeddings import EmbeddedPrompt
from trimtab.methods.prompt._virtual import PromptConfig, read_model

_LAYERS = 2


@dataclass(kw_only=True)
class PromptEncoderConfig(PromptConfig):
    encoder_reparameterization_type: str = option("MLP", "the network: MLP or LSTM", choices=["LSTM"])
    encoder_hidden_size: int | None = option(None, "width of its hidden layers; none: token_dim")
    encoder_num_layers: int = option(_LAYERS, "layers of the LSTM")
    encoder_dropout: float = option(0.0, "dropout between the layers of the LSTM")

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = getattr(self.encoder_reparameterization_type, "value", self.encoder_reparameterization_type)
        self.encoder_reparameterization_type = one_of("encoder_reparameterization_type", kind, ["MLP", "LSTM"])
        in_range("encoder_num_layers", self.encoder_num_layers, 1)
        in_range("encoder_dropout", self.encoder_dropout, 0, 1)
        if kind == "MLP" and not self.inference_mode and (self.encoder_num_layers, self.encoder_dropout) != (_LAYERS, 0):
            warnings.warn("encoder_num_layers and encoder_dropout are the LSTM's; an MLP has neither", TrimtabWarning)


class BothWays(nn.Module):
    """A table (n, dim) read as one sequence in both directions: (n, 2 hidden)."""

    def __init__(self, cfg: PromptEncoderConfig, hidden: int) -> None:
        super().__init__()
        layers, dropout = cfg.encoder_num_layers, cfg.encoder_dropout
        self.lstm = nn.LSTM(cfg.token_dim or 0, hidden, layers, dropout=dropout, bidirectional=True)

    def forward(self, rows: Tensor) -> Tensor:
        return self.lstm(rows)[0]


@method("P_TUNING", config=PromptEncoderConfig, small={"num_virtual_tokens": 3})
class PTuning(EmbeddedPrompt):
    """E' = [P; E(ids)],  P = f(T)  with  T (n, dim) and f trained                            arXiv:2103.10385, section 3.2

    f = MLP: Linear ReLU Linear ReLU Linear, or MLP(biLSTM(T)): Linear ReLU Linear. What is saved is P.
    """

    def __init__(self, cfg: Any, model: nn.Module) -> None:
        read_model(cfg, model)
        dim, rows = cfg.token_dim, cfg.num_virtual_tokens * cfg.num_transformer_submodules
        h = cfg.encoder_hidden_size = cfg.encoder_hidden_size or dim
        network: list[nn.Module] = []
        if not cfg.inference_mode and cfg.encoder_reparameterization_type == "MLP":
            network = [nn.Linear(dim, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, dim)]
        elif not cfg.inference_mode:
            network = [BothWays(cfg, h), nn.Linear(2 * h, 2 * h), nn.ReLU(), nn.Linear(2 * h, dim)]
        super().__init__(cfg, rows, dim, nn.Sequential(*network) if network else None)

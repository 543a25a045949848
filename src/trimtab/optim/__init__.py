"""Optimizers that know which of a low-rank adapter's tensors are its A and its B."""

from trimtab.optim.lorafa import LoraFAOptimizer, create_lorafa_optimizer
from trimtab.optim.loraplus import create_loraplus_optimizer
from trimtab.optim.riemannian import create_riemannian_optimizer

__all__ = ["LoraFAOptimizer", "create_lorafa_optimizer", "create_loraplus_optimizer", "create_riemannian_optimizer"]

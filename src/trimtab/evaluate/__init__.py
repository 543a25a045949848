"""How good a model is on rows: loss, answers, and how many of them are right."""

from trimtab.evaluate.answers import exact_match, generate_answers
from trimtab.evaluate.loss import loss

__all__ = ["exact_match", "generate_answers", "loss"]

"""A target that is the end of a name means whole parts of a path; a pattern that hits what carries no weight is an error."""

from __future__ import annotations

import pytest
from situations import Plain, lora
from torch import nn

from trimtab import get_peft_model
from trimtab.core.group import adapted
from trimtab.errors import TrimtabError


def towers() -> Plain:
    return Plain(
        vision=Plain(proj=nn.Linear(8, 8), attn_drop=nn.Dropout()), text=Plain(proj=nn.Linear(8, 8), up_proj=nn.Linear(8, 8))
    )


def test_each_form_means_what_it_says() -> None:
    for targets, want in (
        (["proj"], ["vision.proj", "text.proj"]),  # not up_proj
        (["text.proj"], ["text.proj"]),
        (r"text\..*", ["text.proj", "text.up_proj"]),
    ):
        model = get_peft_model(towers(), lora(task_type=None, target_modules=targets))
        assert [path for path, _ in adapted(model.get_base_model())] == want


def test_dropout_is_refused_by_name() -> None:
    with pytest.raises(TrimtabError, match=r"attn_drop.* Dropout"):
        get_peft_model(towers(), lora(task_type=None, target_modules=r"vision\..*"))

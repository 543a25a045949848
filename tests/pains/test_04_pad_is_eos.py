"""The token that pads is the token that ends an answer: it is masked where it pads, and learnt where it ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from situations import chats, tiny, trainer

from trimtab.data import Renderer, collate, prepare
from trimtab.errors import DataError


def test_the_last_eos_is_a_label_and_padding_is_not() -> None:
    tok = chats.tokenizer(chats.INST)
    assert tok.pad_token_id == tok.eos_token_id
    short, long = (Renderer(tok).example(chats.talk("q", answer)) for answer in ("a", "a much longer answer"))
    labels = collate([short, long], tok.pad_token_id)["labels"]
    assert (labels == tok.eos_token_id).sum(1).tolist() == [1, 1]
    assert labels[0, len(short.input_ids) :].unique().tolist() == [-100]


def test_a_model_learns_to_stop(tmp_path: Path) -> None:
    """Row i: three tokens, an answer of one, and then the end, which is what pads the batch."""
    end = tiny.PAD
    rows = [
        tiny.Example([3 + i, *[9] * (i % 3), 20 + i % 4, end], [False] * (1 + i % 3) + [True, True]) for i in range(12)
    ]
    model = tiny.adapted(r=8)
    trainer(tmp_path, model, rows, max_steps=20, learning_rate=2e-2).train()
    model.eval()
    for row in rows:
        ids = torch.tensor([row.input_ids[:-2]])
        said = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False,
                              eos_token_id=end, pad_token_id=end)[0, ids.shape[1] :].tolist()  # fmt: skip
        assert len(said) == 2 and said[-1] == end


def test_rows_that_are_cut_before_their_end_are_left_out(tmp_path: Path) -> None:
    file = chats.write(tmp_path / "rows.jsonl", {"prompt": "q", "completion": "an answer that is far too long to fit"})
    with pytest.raises(DataError, match="no train row is left of 1: 1 longer than max_length 40"):
        prepare([file], Renderer(chats.tokenizer()), max_length=40)

"""The token that pads is the token that ends an answer: it is masked where it pads, and learnt where it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from situations import chats, ran, tiny, trainer, write_model

from trimtab.data import Renderer, collate, prepare
from trimtab.data.ends import check_ends
from trimtab.errors import DataError, TrimtabWarning


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


ROWS = [{"prompt": "q", "completion": "short"}] * 99
CUT = {"prompt": "q", "completion": "an answer of many words, of which the last do not fit"}
OPEN = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "r"}]}
LIMIT = 60


def ends(folder: Path, rows: list[Any], template: str = chats.CHATML, *, allowed: bool = False, **over: Any) -> str:
    renderer = Renderer(chats.tokenizer(template))
    given: dict[str, Any] = {"max_length": LIMIT, "overlong": "truncate_end"} | over
    data = prepare([chats.write(folder / "rows.jsonl", *rows)], renderer, **given)
    return check_ends(data.train, renderer, max_length=LIMIT, overlong=given["overlong"], allowed=allowed)


def test_one_row_in_a_hundred_may_lose_its_end_and_is_named(tmp_path: Path) -> None:
    assert ends(tmp_path, ROWS) == ""
    line = ends(tmp_path, [*ROWS, CUT])
    assert line.startswith("1 of 100 train rows do not end with a learnt <|im_end|> (") and "rows.jsonl:100)" in line


def test_more_of_them_are_an_error_that_names_them_and_the_fixes(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        ends(tmp_path, [CUT, *ROWS, CUT])
    said = str(caught.value)
    assert "2 of 101 train rows do not end with a learnt <|im_end|>" in said and "rows.jsonl:1, :101)" in said
    assert "a max_length above 60, or overlong: drop or truncate_prompt" in said and "--allow_unended" in said
    assert ends(tmp_path, [CUT, *ROWS, CUT], allowed=True).startswith("2 of 101 train rows")
    assert ends(tmp_path, [CUT, *ROWS, CUT], overlong="drop") == ""


def test_the_end_that_counts_is_that_of_the_last_answer(tmp_path: Path) -> None:
    """A question behind a closed answer takes nothing from it; an end learnt before the answer that is cut is not its end."""
    assert ends(tmp_path, [OPEN]) == ""
    two = [*OPEN["messages"], {"role": "assistant", "content": "a long, long, long answer"}]
    with pytest.raises(DataError, match="1 of 1 train rows"):
        ends(tmp_path, [{"messages": two}], max_length=LIMIT - 5)


def test_text_and_templates_without_an_end_of_their_own_end_with_eos(tmp_path: Path) -> None:
    with pytest.warns(TrimtabWarning, match="closes no turn: </s> is put behind the last answer"):
        assert ends(tmp_path, ROWS[:1], chats.UNCLOSED) == ""
        with pytest.raises(DataError, match="rows whose last turn is the assistant's, or a chat_template that ends"):
            ends(tmp_path, [OPEN], chats.UNCLOSED)
    assert ends(tmp_path, [{"text": "plain words"}]) == ""


def test_a_run_refuses_them_before_the_model_is_read(tmp_path: Path) -> None:
    model, rows = write_model(tmp_path / "model"), chats.write(tmp_path / "rows.jsonl", *ROWS[:20], CUT)
    (model / "model.safetensors").write_bytes(b"")
    given: dict[str, Any] = {"overlong": "truncate_end", "max_length": LIMIT}
    with pytest.raises(DataError, match=r"1 of 21 train rows do not end with a learnt <\|im_end\|> \(.*rows\.jsonl:21\)"):
        ran(model, rows, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()
    write_model(model)
    result, said = ran(model, rows, tmp_path / "out", allow_unended=True, max_steps=1, **given)
    assert "1 of 21 train rows do not end with a learnt <|im_end|>" in said
    counted = result.record.template
    assert (counted["examples"], counted["examples_with_a_learnt_end"]) == (21, 20)


def test_rows_that_are_cut_before_their_end_are_left_out(tmp_path: Path) -> None:
    file = chats.write(tmp_path / "rows.jsonl", {"prompt": "q", "completion": "an answer that is far too long to fit"})
    with pytest.raises(DataError, match="no train row is left of 1: 1 longer than max_length 40"):
        prepare([file], Renderer(chats.tokenizer()), max_length=40)

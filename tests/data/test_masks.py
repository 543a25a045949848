"""What is learnt, for templates of every temper: exactly the assistant's words and the token that ends its turn."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from trimtab.data import Conversation, Problems, Renderer
from trimtab.errors import ConfigError, DataError, TrimtabWarning

from . import tiny
from .tiny import learnt, talk


class ChatGLMTokenizer(PreTrainedTokenizerFast):
    """A tokenizer known by its name."""


def masks(template: str, conversation: Conversation, **options: Any) -> list[str]:
    tok = tiny.tokenizer(template)
    return learnt(Renderer(tok).example(conversation, **options), tok)


def test_ids_and_labels_by_hand() -> None:
    tok = tiny.tokenizer()
    example = Renderer(tok).example(talk("Hi", "Yo"))
    start, end = tok.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])

    def ids(text: str) -> list[int]:
        return tok(text, add_special_tokens=False)["input_ids"]

    head = [start, *ids("user\nHi"), end, *ids("\n"), start, *ids("assistant\n")]
    assert example.input_ids == [*head, *ids("Yo"), end, *ids("\n")]
    assert example.labels == [-100] * len(head) + [*ids("Yo"), end] + [-100] * len(ids("\n"))
    assert head == Renderer(tok).prompt_ids([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(
    ("template", "want"),
    [
        (tiny.CHATML, ["a1<|im_end|>", "a2<|im_end|>"]),
        (tiny.SYSTEM_DEFAULT, ["a1<|im_end|>", "a2<|im_end|>"]),
        (tiny.TRIMS_WITH_BOS, ["a1<|eot|>", "a2<|eot|>"]),
        (tiny.STRICT, ["a1</turn>", "a2</turn>"]),
        (tiny.INST, [" a1</s>", " a2</s>"]),
        (tiny.THOUGHTS, ["a1<|im_end|>", "<think>\n\n</think>\n\na2<|im_end|>"]),
        (tiny.TOOLS, ["a1<|im_end|>", "a2<|im_end|>"]),
        (tiny.TWO_ENDS, ["<|system|>final<|user|>a1<|end|>", "<|system|>final<|user|>a2<|return|>"]),
        (tiny.GENERATION_TAG, ["a1<|im_end|>", "a2<|im_end|>"]),
    ],
)
def test_two_turns(template: str, want: list[str]) -> None:
    assert masks(template, talk("u1", "a1", "u2", "a2")) == want
    assert masks(template, talk("u1", "a1", "u2", "a2"), train_on="last") == want[-1:]


@pytest.mark.parametrize("name", ["CHATML", "SYSTEM_DEFAULT", "TRIMS_WITH_BOS", "STRICT", "INST", "TWO_ENDS"])
def test_an_answer_begins_where_the_prompt_ends(name: str) -> None:
    tok = tiny.tokenizer(getattr(tiny, name))
    renderer = Renderer(tok)
    conversation = talk("u1", "a1", "u2", "the answer")
    example = renderer.example(conversation, train_on="last")
    prompt = renderer.prompt_ids(conversation.prompt)
    assert example.input_ids[: len(prompt)] == prompt
    assert example.supervised.index(True) == len(prompt)


def test_train_on_all_learns_every_token() -> None:
    tok = tiny.tokenizer()
    example = Renderer(tok).example(talk("u", "a"), train_on="all")
    assert all(example.supervised)
    assert tok.decode(example.input_ids) == "<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"


@pytest.mark.parametrize("answer", ["u", "<|im_end|>", "<|im_start|>assistant\nx", "user\nu<|im_end|>\n", "assistant"])
@pytest.mark.parametrize("name", ["CHATML", "THOUGHTS", "TOOLS", "STRICT", "INST"])
def test_answers_that_quote_prompt_or_markers(name: str, answer: str) -> None:
    conversation = talk("u", answer, "<|im_start|>assistant\nno", "last")
    end = {"STRICT": "</turn>", "INST": "</s>"}.get(name, "<|im_end|>")
    space = " " if name == "INST" else ""
    answer = answer.strip() if name == "STRICT" else answer
    thought = "<think>\n\n</think>\n\n" if name == "THOUGHTS" else ""
    assert masks(getattr(tiny, name), conversation) == [f"{space}{answer}{end}", f"{space}{thought}last{end}"]


def test_thoughts_cut_from_past_turns_are_not_learnt_and_the_last_is() -> None:
    conversation = talk("u1", "<think>\none\n</think>\n\na1", "u2", "<think>\ntwo\n</think>\n\na2")
    assert masks(tiny.THOUGHTS, conversation) == ["a1<|im_end|>", "<think>\ntwo\n</think>\n\na2<|im_end|>"]
    # three turns, so that rewritten turns stand before and behind
    conversation = talk("u1", "<think>x</think>a1", "u2", "<think>u2</think>a2", "u3", "a3")
    assert masks(tiny.THOUGHTS, conversation)[:2] == ["a1<|im_end|>", "a2<|im_end|>"]


def test_trimmed_content() -> None:
    assert masks(tiny.TRIMS_WITH_BOS, talk("  u ", "  a b \n")) == ["a b<|eot|>"]
    # only the answer is trimmed differently from its prompt: no frame fits, one message at a time does
    assert masks(tiny.STRICT, talk(" u", "\n\na")) == ["a</turn>"]


def test_a_token_over_the_edge_is_cut_as_generation_cuts_it() -> None:
    """`\\n\\n` is one token of this tokenizer: header newline and answer newline must not melt into it."""
    tok = tiny.tokenizer()
    renderer = Renderer(tok)
    example = renderer.example(talk("u", "\nthen"))
    assert learnt(example, tok) == ["\nthen<|im_end|>"]
    prompt = renderer.prompt_ids([{"role": "user", "content": "u"}])
    assert example.input_ids[: len(prompt)] == prompt


def test_a_tools_call_is_learnt_and_its_answer_is_not() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": "<|im_end|>"}}}
    messages = [
        {"role": "user", "content": "1+1"}, {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"}, {"role": "assistant", "content": "two"},
    ]
    tools = [{"type": "function", "function": {"name": "add"}}]
    said = '\n<tool_call>\n{"name": "add", "arguments": {"a": "<|im_end|>"}}\n</tool_call><|im_end|>'
    got = masks(tiny.TOOLS, Conversation(messages, tools, "rows.jsonl", 1))
    assert [text.lstrip("\n") for text in got] == [said.lstrip("\n"), "two<|im_end|>"]


def test_tool_calls_that_the_template_leaves_out_are_refused() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    messages = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(DataError, match=r"rows.jsonl:4: the template does not render the tool calls of message 1"):
        masks(tiny.CHATML, Conversation(messages, None, "rows.jsonl", 4))


def test_tools_that_the_template_ignores_are_said() -> None:
    conversation = talk("u", "a")
    conversation.tools = [{"type": "function", "function": {"name": "add"}}]
    with pytest.warns(TrimtabWarning, match="ignores the tools"):
        assert masks(tiny.CHATML, conversation) == ["a<|im_end|>"]


def test_turns_marked_not_to_train() -> None:
    conversation = talk("u1", "a1", "u2", "a2")
    conversation.messages[1]["train"] = False
    assert masks(tiny.CHATML, conversation) == ["a2<|im_end|>"]


def test_end_of_turn_that_is_eos_and_pad() -> None:
    tok = tiny.tokenizer(tiny.CHATML, eos_token="<|im_end|>", pad_token="<|im_end|>")
    renderer = Renderer(tok)
    assert learnt(renderer.example(talk("u", "a")), tok) == ["a<|im_end|>"]
    assert renderer.stop_token_ids == [tok.eos_token_id]
    assert Renderer(tiny.tokenizer(tiny.STRICT)).end_of_turn == "</turn>"
    assert len(Renderer(tiny.tokenizer(tiny.STRICT)).stop_token_ids) == 2  # and eos


def test_no_bos_is_added_to_what_a_template_wrote() -> None:
    tok = tiny.tokenizer(tiny.TRIMS_WITH_BOS)
    example = Renderer(tok).example(talk("u", "a"))
    assert example.input_ids.count(tok.bos_token_id) == 1
    assert Renderer(tok).prompt_ids([{"role": "user", "content": "u"}]).count(tok.bos_token_id) == 1
    twice = tiny.tokenizer("{{- bos_token }}" + tiny.TRIMS_WITH_BOS)
    with pytest.raises(DataError, match="begins with '<s>' twice"):
        Renderer(twice).example(talk("u", "a"))


def test_a_template_that_closes_no_turn_gets_eos_at_the_end() -> None:
    tok = tiny.tokenizer(tiny.UNCLOSED)
    with pytest.warns(TrimtabWarning, match="closes no turn: </s> is put behind the last answer"):
        renderer = Renderer(tok)
    # ": " is one token here: it would reach over the edge of the answer if the text were tokenised in one go
    assert learnt(renderer.example(talk("u1", "a1", "u2", "P2")), tok) == ["a1", "P2", "</s>"]


def test_templates_that_refuse_are_quoted_with_the_row() -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:1: the chat template refuses it: System role not supported"):
        masks(tiny.STRICT, talk("u", "a", system="s"))
    with pytest.raises(DataError, match="must alternate"):
        masks(tiny.STRICT, Conversation([{"role": "user", "content": "u"}, {"role": "user", "content": "v"},
                                         {"role": "assistant", "content": "a"}], None, "rows.jsonl", 1))


def test_two_user_turns_and_an_assistant_first() -> None:
    messages = [{"role": r, "content": c} for r, c in (("assistant", "a0"), ("user", "u"), ("user", "v"),
                                                       ("assistant", "a1"), ("assistant", "a2"), ("user", "w"))]
    got = masks(tiny.CHATML, Conversation(messages, None, "rows.jsonl", 1))
    assert got == ["a0<|im_end|>", "a1<|im_end|>", "a2<|im_end|>"]


def test_a_system_message_that_moves() -> None:
    assert masks(tiny.INST, talk("u1", "a1", "u2", "a2", system="sys")) == [" a1</s>", " a2</s>"]


def test_without_a_template_chatml_closed_by_a_token_the_tokenizer_knows() -> None:
    tok = tiny.tokenizer(None)
    with pytest.warns(TrimtabWarning, match=r"no chat template; ChatML, closed by <\|im_end\|>"):
        renderer = Renderer(tok)
    assert learnt(renderer.example(talk("u", "a", system="s")), tok) == ["a<|im_end|>"]


def test_chatglm_roles_for_its_tokenizers() -> None:
    tok = tiny.tokenizer(None, ChatGLMTokenizer)
    with pytest.warns(TrimtabWarning) as said:
        renderer = Renderer(tok)
    assert "ChatGLM's <|system|> <|user|> <|assistant|>" in str(said[0].message)
    text = renderer.text([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], None, True)
    assert text == "<|system|>\ns<|user|>\nu<|assistant|>"
    assert learnt(renderer.example(talk("u1", "a1", "u2", "a2")), tok) == ["\na1", "\na2</s>"]


def test_built_in_chatml_shows_tools() -> None:
    tok = tiny.tokenizer(tiny.CHATML)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    tools = [{"type": "function", "function": {"name": "add"}}]
    example = Renderer(tok, chat_template="chatml").example(Conversation(messages, tools, "r", 1))
    assert "".join(learnt(example, tok)).strip() == (
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>')
    assert '<tools>\n{"type": "function"' in tok.decode(example.input_ids)


def test_raw_text_is_learnt_whole_and_ends() -> None:
    tok = tiny.tokenizer()
    example = Renderer(tok).example(Conversation([], None, "r", 1, text="once\nupon"))
    assert tok.decode(example.input_ids) == "once\nupon</s>" and all(example.supervised)


def test_unknown_options() -> None:
    with pytest.raises(ConfigError, match="neither Jinja"):
        Renderer(tiny.tokenizer(), chat_template="chatmll")
    with pytest.raises(ConfigError, match=r"there is no file 'nowhere\.jinja'"):
        Renderer(tiny.tokenizer(), chat_template="nowhere.jinja")
    with pytest.raises(ConfigError, match="train_on"):
        Renderer(tiny.tokenizer()).examples([], "assistants", Problems())  # type: ignore[arg-type]


WORDS = st.text(
    st.one_of(st.sampled_from(list(" \n:tPhe<|>")), st.characters(blacklist_categories=("Cs",))),
    min_size=1, max_size=12,
)
PIECES = st.lists(
    st.one_of(WORDS, st.sampled_from(["<|im_end|>", "<|im_start|>assistant\n", "</s>", "[/INST]", "</turn>", "user"])),
    min_size=1, max_size=3,
).map("".join).filter(lambda text: text.strip())
RENDERERS = {
    name: Renderer(tiny.tokenizer(getattr(tiny, name)))
    for name in ("CHATML", "SYSTEM_DEFAULT", "TRIMS_WITH_BOS", "STRICT", "INST", "TOOLS", "TWO_ENDS", "GENERATION_TAG")
}


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(PIECES, min_size=2, max_size=6).filter(lambda turns: len(turns) % 2 == 0))
def test_any_contents_in_any_template(turns: list[str]) -> None:
    """Supervised text = each answer as the template writes it, with its end; all the ids = the rendering."""
    for name, renderer in RENDERERS.items():
        tok, conversation = renderer.tokenizer, talk(*turns)
        example = renderer.example(conversation)
        trims = name in ("TRIMS_WITH_BOS", "STRICT")
        answers = [turn.strip() if trims else turn for turn in turns[1::2]]
        ends = [renderer.end_of_turn] * len(answers)
        if name == "TWO_ENDS":
            answers = ["<|system|>final<|user|>" + answer for answer in answers]
            ends = ["<|end|>"] * (len(answers) - 1) + ["<|return|>"]
        space = " " if name == "INST" else ""
        want = [f"{space}{answer}{end}" for answer, end in zip(answers, ends, strict=True)]
        assert "".join(learnt(example, tok)) == "".join(want)
        assert tok.decode(example.input_ids) == renderer.text(conversation.messages)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(PIECES, min_size=4, max_size=4), st.lists(WORDS, min_size=2, max_size=2))
def test_any_thoughts(turns: list[str], thoughts: list[str]) -> None:
    tok = tiny.tokenizer(tiny.THOUGHTS)
    u1, a1, u2, a2 = (turn.replace("think>", "") for turn in turns)
    t1, t2 = (thought.replace("think>", "").strip("\n") for thought in thoughts)
    conversation = talk(u1, f"<think>{t1}</think>{a1}", u2, f"<think>{t2}</think>{a2}")
    got = learnt(Renderer(tok).example(conversation), tok)
    first, last = a1.lstrip("\n"), a2.lstrip("\n")
    assert "".join(got) == f"{first}<|im_end|><think>\n{t2}\n</think>\n\n{last}<|im_end|>"


def spaced(template: str) -> Any:
    """Words by white space: what is decoded is not what was encoded, and unknown words are all one token."""
    words = ["[unk]", "user", "assistant", "yes", "no"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[unk]"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(tiny.SPECIAL)
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", bos_token="<s>", unk_token="[unk]")
    made.chat_template = template
    return made


def metaspace(template: str) -> Any:
    """SentencePiece's way: a word carries the space before it, and a text begins with one."""
    words = ["▁yes", "▁no", "▁", *"abcdefghijklmnopqrstuvwxyz", "\n", ":", "U", "A"]
    core = Tokenizer(models.BPE({w: i for i, w in enumerate(["<unk>", *words, "ye", "yes", "no", "▁n", "▁y"])},
                                [("y", "e"), ("ye", "s"), ("n", "o"), ("▁", "yes"), ("▁", "no")], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    core.add_special_tokens(tiny.SPECIAL)
    core.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", core.token_to_id("<s>"))])
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    made.chat_template = template
    return made


def test_a_tokenizer_that_does_not_keep_every_character() -> None:
    tok = spaced(tiny.CHATML)
    example = Renderer(tok).example(talk("Yes or what", "No  IDEA"))
    tokens = tok.convert_ids_to_tokens([t for t in example.labels if t != -100])
    assert tokens == ["no", "[unk]", "<|im_end|>"]


@pytest.mark.parametrize("template", [tiny.INST, tiny.CHATML])
def test_a_tokenizer_whose_words_carry_their_space(template: str) -> None:
    tok = metaspace(template)
    renderer = Renderer(tok)
    example = renderer.example(talk("yes", "no", "no", "yes"))
    spans = tok.convert_ids_to_tokens([t for t in example.labels if t != -100])
    end = renderer.end_of_turn
    space = "▁" if template is tiny.INST else ""
    assert spans == [f"{space}no", end, f"{space}yes", end]
    assert example.input_ids.count(tok.bos_token_id) == (template is tiny.INST)


def test_our_own_layout_opens_as_the_tokenizer_opens_any_text() -> None:
    tok = metaspace(tiny.CHATML)
    renderer = Renderer(tok, chat_template="chatml")
    example = renderer.example(talk("yes", "no"))
    assert example.input_ids[0] == tok.bos_token_id and example.input_ids.count(tok.bos_token_id) == 1
    prompt = renderer.prompt_ids([{"role": "user", "content": "yes"}])
    assert example.input_ids[: len(prompt)] == prompt
    tok.chat_template = renderer.chat_template  # as an adapter folder keeps it
    again = Renderer(tok)
    assert again.prompt_ids([{"role": "user", "content": "yes"}]) == prompt
    assert again.example(talk("yes", "no")).input_ids == example.input_ids
    raw = renderer.example(Conversation([], None, "r", 1, text="yes"))
    assert raw.input_ids[0] == tok.bos_token_id and raw.input_ids.count(tok.bos_token_id) == 1


def test_a_template_that_is_none_is_one_fault_and_not_each_row_s() -> None:
    broken = "{% for m in messages %}\n{{ m.content }\n{% endfor %}"
    with pytest.raises(DataError, match=r"^the chat template, line 2: unexpected '}'\. Fix: correct it"):
        Renderer(tiny.tokenizer(), chat_template=broken)

"""Default `target_modules` by model type, as the field's published adapters use them, and heads by task."""

from __future__ import annotations

from itertools import chain

_BY_NAMES = {
    (
        "q_proj",
        "v_proj",
    ): "bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm gemma gemma2 gemma3_text qwen2 qwen3",
    ("query", "value"): "bert roberta xlm-roberta electra layoutlm",
    ("query_key_value",): "bloom gpt_neox chatglm RefinedWebModel RefinedWeb falcon",
    ("q", "v"): "t5 mt5",
    ("c_attn",): "gpt2 gpt_bigcode",
    ("query_proj", "value_proj"): "deberta-v2",
    ("in_proj",): "deberta",
    ("Wqkv",): "mpt",
    ("c_proj", "c_attn"): "btlm",
    ("qkv_proj",): "codegen",
    ("q_proj", "v_proj", "fc1", "fc2"): "phi",
    ("q", "v", "q_proj", "v_proj"): "blip-2",
    ("q_proj", "k_proj", "v_proj", "o_proj"): "nemotron_h",
    ("key", "value", "receptance", "output"): "rwkv",
    ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"): "rwkv7",
}

TARGETS: dict[str, list[str]] = dict(
    chain.from_iterable(((t, list(names)) for t in types.split()) for names, types in _BY_NAMES.items())
)

HEADS: dict[str, list[str]] = {  # freshly made when a model is loaded for the task: trained and saved always
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}

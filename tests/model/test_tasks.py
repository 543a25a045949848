"""The six tasks: what is made afresh for one is trained and saved, whatever the model calls it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import trimtab
from trimtab import LoraConfig, PeftModel, TaskType, get_peft_model

BERT: dict[str, Any] = dict(vocab_size=37, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
BART: dict[str, Any] = dict(
    vocab_size=37, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=32, decoder_ffn_dim=32, num_labels=3, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
T5: dict[str, Any] = dict(vocab_size=37, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)


def distilbert() -> nn.Module:
    config = hf.DistilBertConfig(vocab_size=37, dim=32, n_layers=1, n_heads=2, hidden_dim=32, num_labels=3)
    return hf.DistilBertForSequenceClassification(config)


Case = tuple[TaskType, Callable[[], nn.Module], set[str]]
CASES: list[Case] = [
    (TaskType.CAUSAL_LM, lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**BERT)), set()),
    (TaskType.SEQ_2_SEQ_LM, lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)), set()),
    (TaskType.SEQ_CLS, lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**BERT, pad_token_id=0)), {"score"}),
    (TaskType.SEQ_CLS, lambda: hf.BertForSequenceClassification(hf.BertConfig(**BERT)), {"classifier"}),
    (TaskType.SEQ_CLS, distilbert, {"pre_classifier", "classifier"}),
    (TaskType.SEQ_CLS, lambda: hf.BartForSequenceClassification(hf.BartConfig(**BART)), {"classification_head"}),
    (TaskType.TOKEN_CLS, lambda: hf.BertForTokenClassification(hf.BertConfig(**BERT)), {"classifier"}),
    (TaskType.QUESTION_ANS, lambda: hf.BertForQuestionAnswering(hf.BertConfig(**BERT)), {"qa_outputs"}),
    (TaskType.FEATURE_EXTRACTION, lambda: hf.BertModel(hf.BertConfig(**BERT)), set()),
]


def fresh(make: Callable[[], nn.Module], seed: int) -> Any:
    """The same body each time, and a head that is as random as the seed."""
    torch.manual_seed(0)
    model: Any = make().eval()
    torch.manual_seed(seed)
    for child in model.children():
        if child is not model.base_model is not model and not hasattr(model, "lm_head"):
            for p in child.parameters():
                nn.init.normal_(p, std=0.1)
    return model


def output(model: Any) -> Tensor:
    ids = torch.tensor([[5, 6, 7, 2], [8, 9, 10, 2]])
    more = {"decoder_input_ids": ids[:, :2]} if model.config.model_type == "t5" else {}
    with torch.no_grad():
        out = model.eval()(input_ids=ids, **more)
    return next(out[name] for name in ("logits", "start_logits", "last_hidden_state") if name in out)


@pytest.mark.parametrize(("task", "make", "heads"), CASES, ids=lambda v: getattr(v, "value", ""))
def test_a_fresh_head_is_trained_and_saved(task: TaskType, make: Any, heads: set[str], tmp_path: Path) -> None:
    model = get_peft_model(fresh(make, 1), LoraConfig(task_type=task, r=2, target_modules="all-linear"))
    assert type(model) is getattr(trimtab, f"PeftModelFor{NAMES[task]}")
    trained = [name for name, p in model.named_parameters() if p.requires_grad and ".copy." in name]
    assert {name.partition(".adapters.")[0].rpartition(".")[2] for name in trained} == heads
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.add_(0.1 * torch.randn(p.shape, generator=draw))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(fresh(make, 2), tmp_path)
    assert type(again) is type(model) and torch.equal(output(again), output(model))
    assert (output(fresh(make, 2)) - output(again)).abs().max() > 1e-3
    theirs = peft.PeftModel.from_pretrained(fresh(make, 3), str(tmp_path))
    assert (output(theirs) - output(model)).abs().max() < 1e-5


NAMES = {
    TaskType.CAUSAL_LM: "CausalLM",
    TaskType.SEQ_2_SEQ_LM: "Seq2SeqLM",
    TaskType.SEQ_CLS: "SequenceClassification",
    TaskType.TOKEN_CLS: "TokenClassification",
    TaskType.QUESTION_ANS: "QuestionAnswering",
    TaskType.FEATURE_EXTRACTION: "FeatureExtraction",
}


def test_a_published_adapter_holds_the_heads_that_it_names(tmp_path: Path) -> None:
    """peft takes any module whose name ends in the letters of one that is to be saved, `pre_classifier` for `classifier`."""
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_lin"], modules_to_save=["layer_norm"])
    theirs = peft.get_peft_model(fresh(distilbert, 1), config)
    with torch.no_grad():
        for p in (p for p in theirs.parameters() if p.requires_grad):
            p.add_(0.1)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = PeftModel.from_pretrained(fresh(distilbert, 2), tmp_path / "theirs")
    want = output(theirs)
    assert (output(ours) - want).abs().max() < 1e-6
    norms = ["distilbert.transformer.layer.0.output_layer_norm", "distilbert.transformer.layer.0.sa_layer_norm"]
    assert {*norms, "pre_classifier", "classifier", "score"} == {*ours.peft_config["default"].modules_to_save}
    ours.save_pretrained(tmp_path / "ours")
    for library in (trimtab, peft):
        back = library.PeftModel.from_pretrained(fresh(distilbert, 3), str(tmp_path / "ours"))
        assert (output(back) - want).abs().max() < 1e-6


def test_every_task_has_a_case() -> None:
    assert {task for task, _, _ in CASES} == set(TaskType) == set(NAMES)

"""Prompt methods against peft: folders both ways, gradients, losses; and where peft is wrong, both side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from theirs import base, close, configs, exchange, inputs, keys, logits, move, quiet_peft, same_settings
from torch import Tensor
from transformers import DynamicCache

import trimtab
from trimtab.errors import ConfigError, NotSupported, TrimtabWarning

FOUR = pytest.mark.parametrize("model", ["llama", "gpt2", "bert", "t5"])
CAUSAL = pytest.mark.parametrize("model", ["llama", "gpt2"])
show = lambda v: "-".join(f"{k}={x}" for k, x in v.items()) or "plain" if isinstance(v, dict) else str(v)  # noqa: E731


@FOUR
@pytest.mark.parametrize("kind", [{}, {"encoder_hidden_size": 12}, {"encoder_reparameterization_type": "LSTM"}], ids=show)
def test_exchange_p_tuning(kind: dict[str, Any], model: str, tmp_path: Path) -> None:
    exchange(model, *configs("p_tuning", model, num_virtual_tokens=4, **kind), tmp_path)


def their_encoder(them: Any, us: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Their tensors of P-tuning beside ours, by their names."""
    ours = dict(us.get_base_model().prompt_encoder["default"].named_parameters())
    lstm = any("lstm" in n for n in ours)
    place = (lambda i: {0: 1, 2: 3}[i]) if lstm else (lambda i: i)
    found = {}
    for name, p in them.prompt_encoder["default"].named_parameters():
        head, _, rest = name.partition(".")
        number, _, leaf = rest.partition(".")
        own = {"embedding": name, "lstm_head": f"transform.0.lstm.{rest}"}.get(head)
        found[name] = p, ours[own or f"transform.{place(int(number))}.{leaf}"]
    assert len(found) == len(ours)
    return found


@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
def test_p_tuning_trains_the_same_network(kind: str) -> None:
    ours, theirs = configs("p_tuning", "llama", num_virtual_tokens=4, encoder_reparameterization_type=kind)
    us, them = trimtab.get_peft_model(base("llama"), ours).eval(), quiet_peft(base("llama"), theirs)
    move(them)
    pairs = their_encoder(them, us)
    for p, own in pairs.values():
        own.data.copy_(p.data)
    close(logits(us, "llama"), logits(them, "llama"))
    batch = inputs("llama")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for m in (us, them):
        m(**batch).loss.backward()
    assert all(p.grad is not None for p, _ in pairs.values())
    for p, own in pairs.values():
        close(own.grad, p.grad)  # type: ignore[arg-type]


def test_p_tuning_says_what_an_mlp_has_not_and_saves_without_dropout(tmp_path: Path) -> None:
    with pytest.warns(TrimtabWarning, match="LSTM's"):
        configs("p_tuning", "llama", num_virtual_tokens=4, encoder_dropout=0.5)
    kind = {"encoder_reparameterization_type": "LSTM", "encoder_dropout": 0.5}
    us = trimtab.get_peft_model(base("llama"), configs("p_tuning", "llama", num_virtual_tokens=4, **kind)[0]).train()
    us.save_pretrained(tmp_path)
    saved, want = load_file(tmp_path / "adapter_model.safetensors"), us.eval()(input_ids=inputs("llama")["input_ids"]).logits
    again = trimtab.PeftModel.from_pretrained(base("llama"), tmp_path)
    assert list(saved) == ["prompt_embeddings"]
    assert torch.equal(again(input_ids=inputs("llama")["input_ids"]).logits, want)


# -- multitask --------------------------------------------------------------------------------------------------------
TASKS = torch.tensor([2, 0])


def by_task(model: Any, name: str) -> Tensor:
    batch = inputs(name)
    if name == "t5":  # peft takes labels alone there
        batch["labels"] = batch.pop("decoder_input_ids")
    given = {"task_ids": TASKS} if hasattr(model, "peft_config") else {}
    with torch.no_grad():
        found = model.eval()(**batch, **given).logits
    if name != "bert":
        mask = batch["attention_mask"] if name != "t5" else batch["labels"].new_ones(batch["labels"].shape)
        found = found * torch.cat([mask.new_ones(len(mask), found.shape[1] - mask.shape[1]), mask], 1)[..., None]
    return found


@FOUR
def test_exchange_multitask(model: str, tmp_path: Path) -> None:
    pair = configs("multitask_prompt_tuning", model, num_virtual_tokens=4, num_tasks=3, num_ranks=2)
    loaded = exchange(model, *pair, tmp_path, answer=by_task)
    other = loaded.eval()(**inputs(model), task_ids=torch.tensor([1, 0])).logits
    assert (other[0] - by_task(loaded, model)[0]).abs().max() > 1e-5 or model == "t5"  # the task has a say
    assert {k for k in keys(tmp_path / "ours") if "classifier" not in k} == {
        "prompt_embeddings", "prefix_task_cols", "prefix_task_rows"
    }  # fmt: skip


@pytest.mark.parametrize("how", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
def test_a_multitask_prompt_starts_from_a_trained_one(how: str, tmp_path: Path) -> None:
    source = quiet_peft(base("llama"), configs("multitask_prompt_tuning", "llama", num_virtual_tokens=4, num_tasks=3)[1])
    move(source)
    source.save_pretrained(tmp_path)
    file = str(tmp_path / "adapter_model.safetensors")
    more = {"prompt_tuning_init": how, "prompt_tuning_init_state_dict_path": file, "prompt_tuning_init_task": 1}
    ours, theirs = configs("multitask_prompt_tuning", "llama", num_virtual_tokens=4, **more)
    us, them = trimtab.get_peft_model(base("llama"), ours), quiet_peft(base("llama"), theirs)
    a, b = trimtab.get_peft_model_state_dict(us), peft.get_peft_model_state_dict(them)
    assert a.keys() == b.keys() and torch.equal(a["prompt_embeddings"], b["prompt_embeddings"])
    if how != "ONLY_SOURCE_SHARED":
        assert all(torch.equal(a[k], b[k]) for k in a)
        wide = configs("multitask_prompt_tuning", "llama", num_virtual_tokens=4, num_tasks=2, **more)[0]
        with pytest.raises(trimtab.errors.BadCheckpoint, match="prefix_task_cols"):
            trimtab.get_peft_model(base("llama"), wide)


def test_task_ids_are_asked_for_checked_and_heard_by_generate() -> None:
    ours, _ = configs("multitask_prompt_tuning", "llama", num_virtual_tokens=4, num_tasks=3)
    model = trimtab.get_peft_model(base("llama"), ours).eval()
    move(model, 3.0)
    ids = inputs("llama")["input_ids"]
    with pytest.raises(ConfigError, match="which of the 3 tasks"):
        model(input_ids=ids)
    with pytest.raises(ConfigError, match="3 rows and the batch 2"):
        model(input_ids=ids, task_ids=torch.tensor([0, 1, 2]))
    with pytest.raises(IndexError):
        model(input_ids=ids, task_ids=torch.tensor([0, 3]))
    more: dict[str, Any] = dict(max_new_tokens=5, do_sample=False, eos_token_id=None)
    got = model.generate(input_ids=ids, task_ids=TASKS, **more)
    want = ids
    for _ in range(5):
        with torch.no_grad():
            want = torch.cat([want, model(input_ids=want, task_ids=TASKS).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, want)
    assert not torch.equal(got, model.generate(input_ids=ids, task_ids=torch.tensor([1, 1]), **more))
    beams = model.generate(input_ids=ids, task_ids=TASKS, num_beams=3, **more)
    for row in range(2):
        alone = model.generate(input_ids=ids[row : row + 1], task_ids=TASKS[row : row + 1], num_beams=3, **more)
        assert torch.equal(beams[row], alone[0])
    with pytest.raises(ConfigError, match="which of the 3 tasks"):  # said to one call, it is gone with it
        model(input_ids=ids)


def test_a_multitask_decoder_takes_ids_where_peft_fails() -> None:
    ours, theirs = configs("multitask_prompt_tuning", "t5", num_virtual_tokens=4, num_tasks=3)
    us, them = trimtab.get_peft_model(base("t5"), ours).eval(), quiet_peft(base("t5"), theirs)
    batch = inputs("t5")
    with pytest.raises(TypeError):
        them(**batch, task_ids=TASKS)
    shifted = us.get_base_model().prepare_decoder_input_ids_from_labels(labels=batch["decoder_input_ids"])
    with torch.no_grad():
        y = us(**batch | {"decoder_input_ids": shifted}, task_ids=TASKS).logits
    close(y, by_task(us, "t5"), 1e-6)


# -- CPT --------------------------------------------------------------------------------------------------------------
CONTEXT = {"cpt_token_ids": [4, 9, 11, 3, 5, 8, 12, 6], "cpt_tokens_type_mask": [1, 2, 3, 4, 5, 6, 7, 8]}


@CAUSAL
def test_exchange_cpt(model: str, tmp_path: Path) -> None:
    exchange(model, *configs("cpt", model, **CONTEXT, opt_projection_epsilon=40.0), tmp_path)


@CAUSAL
@pytest.mark.parametrize("how", [{}, {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.7}], ids=show)
@pytest.mark.parametrize("typed", [False, True])
def test_cpt_s_loss_and_steps_are_peft_s(typed: bool, how: dict[str, Any], model: str) -> None:
    eps = {"opt_projection_epsilon": 0.5, "opt_projection_format_epsilon": 0.2}
    ours, theirs = configs("cpt", model, **CONTEXT, **how, **eps)
    us, them = trimtab.get_peft_model(base(model), ours), quiet_peft(base(model), theirs).train()
    batch = inputs(model) | {"labels": inputs(model)["input_ids"].masked_fill(inputs(model)["attention_mask"] == 0, -100)}
    kinds = torch.tensor([[1, 2, 2, 3, 4, 4, 0], [1, 2, 3, 4, 4, 0, 0]])
    mine: Any = us.get_base_model().prompt_encoder["default"].embedding.weight
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.3) for m in (us, them)]
    for _ in range(4):
        losses = [m.eval()(**batch, **({"input_type_mask": kinds.clone()} if typed else {})).loss for m in (us, them)]
        close(losses[0], losses[1], 1e-6)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    theirs_now = peft.get_peft_model_state_dict(them)["prompt_embeddings"]
    close(trimtab.get_peft_model_state_dict(us)["prompt_embeddings"], theirs_now)
    radius = torch.tensor([0.2, 0.5, 0.2, 0.0] * 2) * (32 / 2048) ** 0.5
    assert (mine.norm(dim=1) <= radius * 1.0001 + 1e-9).all() and (mine.norm(dim=1)[[0, 1, 2]] > 0).all()


def test_cpt_where_peft_s_is_wrong() -> None:
    batch = inputs("llama") | {"labels": inputs("llama")["input_ids"]}
    kinds = torch.full_like(batch["labels"], 4)
    ours, theirs = configs("cpt", "llama", cpt_token_ids=[4, 9, 11])  # no label in the context
    us, them = trimtab.get_peft_model(base("llama"), ours), quiet_peft(base("llama"), theirs)
    out = us(**batch, input_type_mask=kinds)
    close(out.loss, torch.nn.functional.cross_entropy(out.logits[:, 2:-1].flatten(0, 1), batch["labels"].flatten()))
    assert (kinds == 4).all() and them(**batch, input_type_mask=kinds).loss.isnan()
    assert (kinds == 5).all()  # theirs has changed the caller's
    us = trimtab.get_peft_model(base("llama"), configs("cpt", "llama", **CONTEXT)[0], "other")
    them = peft.get_peft_model(base("llama"), configs("cpt", "llama", **CONTEXT)[1], "other")
    assert us(**batch).loss.isfinite()
    with pytest.raises(KeyError):
        them(**batch)
    with pytest.raises(NotSupported, match="CAUSAL_LM"):
        configs("cpt", "bert")


def test_a_loaded_cpt_stays_near_its_words_and_goes_on(tmp_path: Path) -> None:
    us = trimtab.get_peft_model(base("llama"), configs("cpt", "llama", **CONTEXT)[0])
    move(us)
    us.save_pretrained(tmp_path)
    again = trimtab.PeftModel.from_pretrained(base("llama"), tmp_path, is_trainable=True)
    saved = trimtab.get_peft_model_state_dict(us)["prompt_embeddings"]
    assert torch.equal(trimtab.get_peft_model_state_dict(again)["prompt_embeddings"], saved)
    move(again, 9.0)
    words = again.get_input_embeddings().weight[torch.tensor(CONTEXT["cpt_token_ids"])]
    far = (trimtab.get_peft_model_state_dict(again)["prompt_embeddings"] - words).norm(dim=1)
    close(far, torch.tensor([0.1, 0.1, 0.1, 0.0] * 2) * (32 / 2048) ** 0.5, 1e-6)


# -- cartridges -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("model", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("frozen", [0, 1, 4])
def test_exchange_cartridge(frozen: int, model: str, tmp_path: Path) -> None:
    pair = configs("cartridge", model, num_virtual_tokens=4, num_frozen_tokens=frozen)
    loaded = exchange(model, *pair, tmp_path)
    rows: Any = loaded.get_base_model().prompt_encoder["default"].embedding.weight
    assert len(rows) == 4 - frozen
    trained = trimtab.get_peft_model(base(model), configs("cartridge", model, num_virtual_tokens=4)[0])
    start = trimtab.get_peft_model_state_dict(trained)["prompt_embeddings"].clone()
    move(trained)
    moved = (trimtab.get_peft_model_state_dict(trained)["prompt_embeddings"] != start).all(1)
    assert moved.tolist() == [False, True, True, True]


class Words:
    """A tokenizer of numbers."""

    chat_template = None

    def __call__(self, text: str, **_: Any) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([[int(w) for w in text.split()]])}


@pytest.mark.parametrize("method", ["cartridge", "prefix_tuning"])
def test_a_cartridge_of_a_text_answers_as_if_the_text_stood_there(method: str) -> None:
    ours, theirs = configs(method, "llama", num_virtual_tokens=5)
    us, them = trimtab.get_peft_model(base("llama"), ours).eval(), quiet_peft(base("llama"), theirs)
    text = "4 8 15 16 23"
    table = trimtab.initialize_kv_prefix_from_text(us, Words(), text=text)
    close(table, peft.initialize_kv_prefix_from_text(them, Words(), text=text, use_chat_template=False))
    ids = inputs("llama")["input_ids"]
    whole = torch.cat([torch.tensor([[4, 8, 15, 16, 23]] * 2), ids], 1)
    with torch.no_grad():
        close(us(input_ids=ids).logits, base("llama")(input_ids=whole).logits[:, 5:])
    with pytest.raises(ConfigError, match="holds 5 tokens"):
        trimtab.initialize_kv_prefix_from_text(us, Words(), text=text, num_virtual_tokens=6)
    wide = configs("prefix_tuning", "llama", num_virtual_tokens=5, prefix_projection=True)[0]
    with pytest.raises(ConfigError, match="prefix_projection"):
        trimtab.initialize_kv_prefix_from_text(trimtab.get_peft_model(base("llama"), wide), Words(), text=text)
    with pytest.raises(ConfigError, match="one row"):
        two = base("llama")(input_ids=ids, use_cache=True).past_key_values
        trimtab.prompt_embeddings_from_past_key_values(two, num_virtual_tokens=5)
    with pytest.raises(ConfigError, match="empty"):
        trimtab.prompt_embeddings_from_past_key_values(DynamicCache(), num_virtual_tokens=5)


def test_cartridges_are_put_together_as_peft_does(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, n in zip(folders, (3, 4), strict=True):
        model = trimtab.get_peft_model(base("llama"), configs("cartridge", "llama", num_virtual_tokens=n)[0])
        move(model)
        model.save_pretrained(folder)
    trimtab.compose_cartridge_adapters(folders, output_path=tmp_path / "ours")
    peft.tuners.cartridge.utils.compose_cartridge_adapters(folders, output_path=tmp_path / "theirs")
    a, b = (load_file(tmp_path / w / "adapter_model.safetensors")["prompt_embeddings"] for w in ("ours", "theirs"))
    assert torch.equal(a, b) and a.shape[0] == 7
    same_settings(tmp_path / "ours", tmp_path / "theirs")
    trimtab.PeftModel.from_pretrained(base("llama"), tmp_path / "ours")
    with pytest.raises(ConfigError, match="at least two"):
        trimtab.compose_cartridge_adapters(folders[:1], output_path=tmp_path / "one")
    other = trimtab.get_peft_model(base("gpt2"), configs("cartridge", "gpt2", num_virtual_tokens=3)[0])
    other.save_pretrained(tmp_path / "c")
    with pytest.raises(ConfigError, match="token_dim is"):
        trimtab.compose_cartridge_adapters([folders[0], tmp_path / "c"], output_path=tmp_path / "mixed")

"""No. 49: importing and using trimtab changes nothing of torch and transformers, and importing it loads neither."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
import trimtab
assert not {"torch", "transformers"} & set(sys.modules)
import torch, transformers
from torch import nn
from transformers.models.llama import modeling_llama
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

def picture():
    places = [torch.nn.functional, torch.autograd, modeling_llama, sys.modules[Trainer.__module__],
              transformers.modeling_utils, nn.Module, nn.Linear, nn.Embedding, Trainer, LlamaForCausalLM,
              modeling_llama.LlamaAttention, modeling_llama.LlamaModel, torch.Tensor, torch.optim.AdamW]
    return {(str(p), k): id(v) for p in places for k, v in vars(p).items() if not k.startswith("__")}

transformers.modeling_utils, Trainer
before = picture()
from trimtab import LoraConfig, get_peft_model
import trimtab.train.trainer, trimtab.train.run, trimtab.engine.forward, trimtab.export.merge
model = LlamaForCausalLM(LlamaConfig(vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                                     num_attention_heads=2, num_key_value_heads=1))
tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
ids = torch.tensor([[3, 4, 5]])
tuned(input_ids=ids, labels=ids).loss.backward()
tuned.merge_and_unload()
after = picture()
print(sorted(k for k, v in before.items() if after.get(k) != v))
assert not torch.cuda.is_initialized()
"""


def test_no_name_of_theirs_means_something_else_afterwards() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1] == "[]"

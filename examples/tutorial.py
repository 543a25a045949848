"""The page of code that most PEFT tutorials show, with one line changed: the import. Plain `transformers.Trainer`.

    python examples/tutorial.py MODEL_FOLDER src/trimtab/demo/rows.jsonl OUT
    python examples/tutorial.py MODEL_FOLDER rows.jsonl OUT --load_in_4bit      # needs bitsandbytes
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from trimtab import LoraConfig, TaskType, get_peft_model


def encode(row: dict[str, str], tokenizer, max_length: int = 384) -> dict[str, list[int]]:
    """Token ids of prompt and answer; the prompt's labels are -100, so that the loss is on the answer alone."""
    asked = "\n".join(filter(None, (row.get("instruction"), row.get("input"))))
    user = {"role": "user", "content": asked}
    prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(prompt, add_special_tokens=False).input_ids
    answer = [*tokenizer(row["output"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    labels = [-100] * len(prompt) + answer
    return {"input_ids": (prompt + answer)[:max_length], "labels": labels[:max_length]}


def main(
    folder: str,
    rows: str,
    output_dir: str,
    *,
    load_in_4bit: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    max_steps: int = -1,
) -> Trainer:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=quantised if load_in_4bit else None
    )
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=8, lora_alpha=32, lora_dropout=0.1)
    model = get_peft_model(model, config)
    model.print_trainable_parameters()

    lines = Path(rows).read_text(encoding="utf-8").split("\n")
    data = Dataset.from_list([encode(json.loads(line), tokenizer) for line in lines if line.strip()])
    args = TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        num_train_epochs=1,
        max_steps=max_steps,
        learning_rate=1e-4,
        logging_steps=10,
        save_steps=100,
        report_to=[],
    )
    trainer = Trainer(
        model=model, args=args, train_dataset=data, data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True)
    )
    trainer.train()
    model.save_pretrained(output_dir)
    return trainer


if __name__ == "__main__":
    from trimtab.train.device import pick

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("output_dir")
    parser.add_argument("--load_in_4bit", action="store_true")
    parser.add_argument("--max_steps", type=int, default=-1)
    given = parser.parse_args()
    dtype = pick().dtype  # bfloat16 where the chip multiplies it, else float32: emulated, it is many times slower
    main(
        given.model,
        given.rows,
        given.output_dir,
        load_in_4bit=given.load_in_4bit,
        dtype=dtype,
        max_steps=given.max_steps,
    )

"""Run other common trainers, from raw JSON lines to a trained checkpoint.

    python benchmarks/peer_trainers.py full BASE TARGET.jsonl SOURCE.jsonl OUTPUT --tokens 120000

`full` is transformers.Trainer on packed blocks, as in run_clm.py of transformers. `frozen` is the same with the layers
between the first and the last frozen, and `lora` the same with peft adapters on every linear layer. `trl` is TRL's
SFTTrainer with packing. The script does not use ELO. Target and replay text are mixed 9 : 1 by documents.
"""

import argparse
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from datasets import Dataset, interleave_datasets, load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    default_data_collator,
)


def mixed(args: argparse.Namespace) -> Dataset:
    target, source = (load_dataset("json", data_files=file, split="train") for file in (args.target, args.source))
    return interleave_datasets([target, source], probabilities=[0.9, 0.1], seed=args.seed)


def blocks(text: Dataset, tokenizer: Any, length: int) -> Dataset:
    """Documents end to end, cut into blocks, as run_clm.py does."""

    def tokenise(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        ids = tokenizer(batch["text"], add_special_tokens=False)["input_ids"]
        joined = list(chain.from_iterable([*each, tokenizer.eos_token_id] for each in ids))
        whole = [joined[start : start + length] for start in range(0, len(joined) - length + 1, length)]
        return {"input_ids": whole, "labels": whole}

    return text.map(tokenise, batched=True, remove_columns=text.column_names)


def arguments_of(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "output_dir": args.output,
        "max_steps": args.tokens // (args.batch * args.sequence_length),
        "per_device_train_batch_size": args.batch,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "adam_beta2": 0.95,
        "weight_decay": 0.1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "bf16": torch.cuda.is_available(),
        "disable_tqdm": True,
        "logging_steps": 10,
        "seed": args.seed,
    }


def parsed(description: str | None, kinds: Sequence[str]) -> argparse.Namespace:
    """The command line of a peer: what it trains, on which text, how much and how."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=kinds)
    for name in ("base", "target", "source", "output"):
        parser.add_argument(name)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args()


def main() -> None:
    args = parsed(__doc__, ["full", "frozen", "lora", "trl"])
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    text = mixed(args)
    model: Any = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    if args.kind == "frozen":
        last = model.config.num_hidden_layers - 1
        for index, layer in enumerate(model.model.layers):
            layer.requires_grad_(index in (0, last))
    elif args.kind == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    if args.kind == "trl":
        from trl import SFTConfig, SFTTrainer

        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(**arguments_of(args), packing=True, max_length=args.sequence_length),
            train_dataset=text,
            processing_class=tokenizer,
        )
    else:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**arguments_of(args)),
            train_dataset=blocks(text, tokenizer, args.sequence_length),
            data_collator=default_data_collator,
        )
    result = trainer.train()
    if args.kind == "lora":
        model = model.merge_and_unload()
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print("TRAINED", result.metrics["train_runtime"])


if __name__ == "__main__":
    main()

"""Run LLaMA-Factory's continual pretraining (`stage: pt`), from raw JSON lines to a trained checkpoint.

    PYTHON benchmarks/peer_llamafactory.py full BASE TARGET.jsonl SOURCE.jsonl OUTPUT --tokens 120000

PYTHON is the Python of an environment with `pip install llamafactory`, which needs older libraries than ELO. `full`
trains everything, `freeze` the last two layers (it cannot choose the first and the last), and `lora` adapters
on every linear layer. The script does not use ELO.
"""

import json
from pathlib import Path

from peer_trainers import arguments_of, parsed


def main() -> None:
    args = parsed(__doc__, ["full", "freeze", "lora"])
    import torch
    from llamafactory.train.tuner import export_model, run_exp

    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    if not torch.cuda.is_available():  # without bf16 its frozen layers cannot be in bf16, as they are stored
        from transformers import AutoModelForCausalLM, AutoTokenizer

        AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32).save_pretrained(output / "base")
        AutoTokenizer.from_pretrained(args.base).save_pretrained(output / "base")
        args.base = str(output / "base")
    texts = {name: {"file_name": getattr(args, name), "columns": {"prompt": "text"}} for name in ("target", "source")}
    (output / "dataset_info.json").write_text(json.dumps(texts))
    run_exp(
        {
            "stage": "pt",
            "do_train": True,
            "model_name_or_path": args.base,
            "finetuning_type": args.kind,
            "lora_rank": 16,
            "lora_alpha": 32,
            "lora_target": "all",
            "dataset_dir": args.output,
            "dataset": "target,source",
            "mix_strategy": "interleave_under",
            "interleave_probs": "0.9,0.1",
            "template": "empty",
            "cutoff_len": args.sequence_length,
            "overwrite_cache": True,
            **arguments_of(args),
            "overwrite_output_dir": True,
            "trust_remote_code": False,
        }
    )
    if args.kind == "lora":
        export_model(
            {
                "model_name_or_path": args.base,
                "adapter_name_or_path": args.output,
                "finetuning_type": "lora",
                "template": "empty",
                "export_dir": args.output,
                "export_device": "cpu",
                "trust_remote_code": False,
            }
        )
        for file in output.glob("adapter_*"):  # or transformers would put the adapter on what it is merged into
            file.unlink()
    results = json.loads((output / "train_results.json").read_text())
    print("TRAINED", results["train_runtime"])


if __name__ == "__main__":
    main()

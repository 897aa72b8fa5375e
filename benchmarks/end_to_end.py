"""Compare `elo run` with other tools from raw text to a trained checkpoint, including imports.

    pip install trl; python benchmarks/end_to_end.py --tokens 120000 --output end_to_end.json
    python -m venv LF && LF/bin/pip install llamafactory && python benchmarks/end_to_end.py --llamafactory LF/bin/python

Each contestant is a separate process that starts from JSON lines and a base (by default the quickstart's) and writes a
checkpoint. All train on the same number of tokens, with the same update size and learning rate (LoRA with half of it).
Then `elo evaluate` measures all of them on the same held-out text. The floor is the time for the matmul FLOPs of the
tokens at the measured rate of a large matrix product.
"""

import argparse
import importlib.util
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from measuring import finished, matmul_rate, print_table, write_report

from elo.checkpoint.counting import footprint, read_config
from elo.checkpoint.footprint import Middle
from elo.checkpoint.layers import parse_layers
from elo.evaluate.evaluate import evaluate
from elo.plan.plan import plan
from elo.quickstart.quickstart import WORLD, unpack_corpus

ROOT = Path(__file__).parent
OURS: dict[str, dict[str, Any]] = {
    "elo run, frozen middle": {"name": "frozen"},
    "elo run, detached, bridge": {"name": "elo", "alignment": "none"},
    "elo run, as published": {"name": "elo_paper"},
    "elo run, full CPT": {"name": "full"},
}
PEERS = {
    "transformers.Trainer, full CPT": "full",
    "transformers.Trainer, frozen middle": "frozen",
    "transformers.Trainer, peft LoRA": "lora",
    "TRL SFTTrainer, full": "trl",
}
LLAMA_FACTORY = {
    "LLaMA-Factory, full": "full",
    "LLaMA-Factory, freeze: last two layers": "freeze",
    "LLaMA-Factory, LoRA": "lora",
}
LAYERS = "first:1,last:1"


def our_config(args: argparse.Namespace, name: str, output: Path) -> dict[str, Any]:
    """A run on the same text, nothing measured on the way but the base and the end, on little text."""
    return {
        "model": str(args.base),
        "output": str(output),
        "method": OURS[name],
        "layers": LAYERS,
        "tokens": args.tokens,
        "data": {
            "target": "target",
            "source": "source",
            "corpora": {"target": str(args.target), "source": str(args.source)},
            "heldout": {"target": str(args.heldout_target), "source": str(args.heldout_source)},
            "sequence_length": args.sequence_length,
        },
        "training": {
            "learning_rate": args.learning_rate,
            "tokens_per_step": args.batch * args.sequence_length,
            "per_device_train_batch_size": args.batch,
            "evaluations": 0,
            "save_steps": 10**9,
        },
        "evaluation": {"max_bytes": 4000},
    }


def our_code(args: argparse.Namespace, name: str, output: Path) -> str:
    return f"from elo.api import run; run({our_config(args, name, output)!r})"


def peer_code(args: argparse.Namespace, name: str, output: Path) -> str:
    kind, script = (PEERS | LLAMA_FACTORY)[name], "peer_llamafactory" if name in LLAMA_FACTORY else "peer_trainers"
    rate = args.learning_rate / 2 if kind == "lora" else args.learning_rate
    words = [kind, args.base, args.target, args.source, output, "--tokens", args.tokens]
    words += ["--sequence-length", args.sequence_length, "--batch", args.batch, "--learning-rate", rate]
    argv = [f"{script}.py", *map(str, words)]
    found = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = {argv!r}"
    return f"{found}\nimport {script}; {script}.main()"


def seconds_of_training(printed: str, output: Path) -> float:
    """The trainers' own clocks, all phases together."""
    if "TRAINED" in printed:
        return float(printed.rsplit("TRAINED", 1)[1].split()[0])
    records = [json.loads(file.read_text())["record"] for file in (output / "stages").glob("*.json")]
    return sum(record["seconds"] for record in records if "tokens_per_second" in record)


def floor_flops(args: argparse.Namespace, name: str) -> float:
    """Matmul FLOPs of all trained tokens."""
    if name in OURS:
        return plan(our_config(args, name, Path("none")), compare_with=()).run.flops
    counted = footprint(read_config(args.base))
    kind = (PEERS | LLAMA_FACTORY)[name]
    layers = parse_layers("last:2" if kind == "freeze" else LAYERS, counted.num_layers)
    middles: dict[str, Middle] = {"lora": "adapted", "frozen": "frozen", "freeze": "frozen"}
    cost = counted.flops_per_token(
        middles.get(kind, "trained"),
        layers,
        sequence_length=args.sequence_length,
        lora_rank=16 if kind == "lora" else 0,
        also_train=("embedding", "norm", "head") if kind == "frozen" else (),
    )
    return cost.total * args.tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=WORLD / "base")
    for name in ("target", "source", "heldout-target", "heldout-source"):
        parser.add_argument(f"--{name}", type=Path, help="JSON lines; by default the quickstart's corpus")
    parser.add_argument("--tokens", type=int, default=120_000)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--heldout-bytes", type=int, default=100_000)
    parser.add_argument("--only", nargs="+", help="contestants to run")
    parser.add_argument("--llamafactory", metavar="PYTHON", help="Python of an environment with LLaMA-Factory")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="elo-end-to-end-"))
    if args.target is None:
        corpus = scratch / "corpus"
        unpack_corpus(corpus)
        args.target, args.source = corpus / "adapt_target.jsonl", corpus / "adapt_source.jsonl"
        args.heldout_target, args.heldout_source = corpus / "heldout_target.jsonl", corpus / "heldout_source.jsonl"
    peers = PEERS | (LLAMA_FACTORY if args.llamafactory else {})
    names = [name for name in [*OURS, *peers] if not args.only or name in args.only]
    if importlib.util.find_spec("trl") is None and "TRL SFTTrainer, full" in names:
        print("TRL is not installed (pip install trl): left out", flush=True)
        names.remove("TRL SFTTrainer, full")
    rate = matmul_rate()
    heldout = {"target": args.heldout_target, "source": args.heldout_source}
    quiet = {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_DATASETS_CACHE": str(scratch / "cache"),
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    results: dict[str, dict[str, Any]] = {name: {"rounds": []} for name in names}
    try:
        for number in range(args.rounds):
            for name in names:
                output = scratch / "trained"
                code = (our_code if name in OURS else peer_code)(args, name, output)
                python = args.llamafactory if name in LLAMA_FACTORY else sys.executable
                found = finished(code, env=quiet, python=python)
                found["training_seconds"] = seconds_of_training(found.pop("printed"), output)
                results[name]["rounds"].append(found)
                if number == 0:
                    model = output / "model" if name in OURS else output
                    measured = evaluate(
                        model, corpora=heldout, sequence_length=args.sequence_length,
                        max_bytes=args.heldout_bytes, progress=False,
                    )  # fmt: skip
                    results[name] |= {"bpb": measured["bpb"], "floor_seconds": floor_flops(args, name) / rate}
                shutil.rmtree(output)
                shutil.rmtree(scratch / "cache", ignore_errors=True)
                print(f"{name}: {found['seconds']:.0f} s", flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)

    first = results.get("transformers.Trainer, full CPT", results[names[0]])
    rows = []
    for name, found in results.items():
        wall, training = (
            statistics.median(each[key] for each in found["rounds"]) for key in ("seconds", "training_seconds")
        )
        faster = statistics.median(
            slow["seconds"] / each["seconds"] for slow, each in zip(first["rounds"], found["rounds"], strict=True)
        )
        peak = max(each["peak_rss_mib"] for each in found["rounds"])
        bpb = [f"{found['bpb'][language]:.3f}" for language in ("target", "source")]
        rows.append(
            [
                name,
                f"{wall:.0f}",
                f"{training:.0f}",
                f"{found['floor_seconds']:.0f}",
                f"{faster:.2f}",
                f"{peak:,}",
                *bpb,
            ]
        )
    print(f"\n{args.tokens:,} tokens, {args.batch} x {args.sequence_length} an update; {rate / 1e9:,.0f} GFLOP/s")
    print_table(["", "wall s", "training s", "floor s", "speed-up", "peak MiB", "target bpb", "source bpb"], rows)
    write_report(args.output, vars(args), matmul_flops=rate, contestants=results)


if __name__ == "__main__":
    main()

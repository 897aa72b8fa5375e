"""Measure the peak GPU memory of training at full size, beside `elo plan`, on a real GPU or a simulated one.

    python benchmarks/gpu_memory.py --output gpu_memory.json

Each contestant trains a model with random weights, by default of the shape of Llama-3.1-8B, for a few updates in a
separate process. The peak is that of PyTorch's allocator. It needs no arithmetic, so it can be measured without a GPU:

    python -m venv cuda    # for a CUDA build of PyTorch
    cuda/bin/pip install 'torch==2.13.0' 'nvidia-cuda-crt<13.1' -e '.[adamw8bit]'
    cuda/bin/python dev/null_gpu/build.py null
    NULL_GPU_GIB=400 LD_PRELOAD=$PWD/null/null_gpu.so LD_LIBRARY_PATH=$PWD/null \\
        cuda/bin/python benchmarks/gpu_memory.py --output gpu_memory.json

Without a GPU, the seconds per update are host time only, without CUDA's time to start kernels.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from alignment_memory import CONTESTANTS, Contestant, measure_apart, planned_phase, settings_of
from measuring import print_table, write_report
from throughput import make_rows
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from elo.checkpoint.counting import footprint
from elo.checkpoint.layers import gaps_between
from elo.methods import Method, Setup
from elo.surgery.in_memory import detach_layers
from elo.train.bridge import Bridge
from elo.train.loop import train
from elo.train.prepared import Prepared

sys.path.insert(0, str(Path(__file__).parent.parent / "dev" / "null_gpu"))
from answers import answer_for_it, on_a_null_gpu

GIB = 1 << 30
LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    bos_token_id=None,
    eos_token_id=0,
)
DEVICE = "H200"


def config_of(args: argparse.Namespace) -> Any:
    return AutoConfig.from_pretrained(args.config) if args.config else LLAMA_8B


def make_ready(args: argparse.Namespace, method: Method) -> tuple[Any, Prepared]:
    """The model that a method's first phase trains, on the GPU: what trains in fp32, all else in bf16."""
    phase, config = method.phases[0], config_of(args)
    layers = (0, config.num_hidden_layers - 1)
    with torch.device("cuda"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    bridge = None
    if phase.middle == "bridged":
        width, gaps = config.hidden_size, tuple(gaps_between(layers, config.num_hidden_layers))
        zeros = tuple(torch.zeros(width, width) for _ in gaps), tuple(torch.zeros(width) for _ in gaps)
        bridge = Bridge(gaps, *zeros, tuple(0.0 for _ in gaps))
    if phase.detached:
        model = detach_layers(model, list(layers))
    prepared = method.prepare(model, phase, Setup(layers, bridge))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    torch.cuda.empty_cache()
    return model, prepared


def measure(args: argparse.Namespace, contestant: Contestant) -> dict[str, float]:
    """Train here, for a few updates: peaks of memory allocated and reserved, in bytes, and the last one's seconds."""
    if on_a_null_gpu():
        answer_for_it()
    model, prepared = make_ready(args, contestant.make())
    args.vocab_size = model.config.vocab_size
    rows = make_rows(args, args.steps * args.batch * args.accumulate)
    result = train(model, rows, settings=settings_of(args, contestant), output_dir=None, seed=0, prepared=prepared)
    seconds = [point["seconds"] for point in result.losses]
    return {
        "peak_bytes": result.peak_memory_bytes,
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "seconds_per_update": seconds[-1] - seconds[-2],
    }


def estimate(args: argparse.Namespace, contestant: Contestant) -> dict[str, Any]:
    """What `elo plan` estimates: what PyTorch allocates (without CUDA's own), and seconds of an update."""
    phase = planned_phase(args, contestant, config_of(args), device=DEVICE)
    return {
        "peak_bytes": phase.memory.peak_bytes - phase.memory.parts["runtime"],
        "seconds_per_update": args.batch * args.accumulate * args.sequence_length / phase.tokens_per_second,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="folder or hub id of another model's config.json")
    parser.add_argument("--sequence-length", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(CONTESTANTS), help="contestants to run")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU, and no null GPU either: see --help")

    print(f"{footprint(config_of(args)).total / 1e9:.2f} B parameters on {torch.cuda.get_device_name()}")
    rows: list[list[str]] = []
    results: dict[str, dict[str, Any]] = {}
    for name in args.only or CONTESTANTS:
        measured, planned = measure_apart(args, name, module="gpu_memory"), estimate(args, CONTESTANTS[name])
        results[name] = {"measured": measured, "planned": planned}
        if "failed" in measured:
            rows.append([name, "failed", *[""] * 5])
            print(f"{name}: {measured['failed'][-300:]}", file=sys.stderr, flush=True)
            continue
        plain = results.get("full, AdamW", {}).get("measured", {}).get("peak_bytes")
        cells = [f"{measured[key] / GIB:.1f}" for key in ("peak_bytes", "reserved_bytes")]
        cells.append(f"{measured['peak_bytes'] / plain:.3f}" if plain else "")
        cells.append(f"{planned['peak_bytes'] / measured['peak_bytes']:.3f}")
        cells.append(f"{measured['seconds_per_update']:.2f}")
        cells.append(f"{planned['seconds_per_update']:.2f}")
        rows.append([name, *cells])
        print(f"{name}: {cells[0]} GiB", file=sys.stderr, flush=True)
    update = "s an update, host alone" if on_a_null_gpu() else "s an update"
    print_table(["", "peak GiB", "reserved", "/ plain", "planned / peak", update, f"planned, {DEVICE}"], rows)
    write_report(args.output, vars(args), contestants=results)


if __name__ == "__main__":
    main()

"""List GPUs with their data-sheet rates, and measure the rate of matrix products on this machine.

Rates come from the makers' data sheets (dense bf16 with fp32 accumulation, no sparsity; memory bandwidth). Memory is
what the driver reports, which is a little less than the name suggests.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from elo.errors import EloError

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """An accelerator, or this machine's processor."""

    name: str
    matmul_flops: float
    """Rate of matrix products, in FLOP/s: the data sheet's dense bf16 rate, or the measured rate."""
    memory_bytes: int
    bandwidth: float
    """Memory bandwidth, read plus write, in bytes per second."""
    precision: Literal["bf16", "fp32"]
    """Precision of training: bf16 autocast over fp32 weights, or fp32 throughout."""
    kind: Literal["gpu", "cpu"]
    measured: bool = False


def _gpu(name: str, teraflops: float, memory_gib: float, gigabytes_per_second: float) -> Device:
    return Device(name, teraflops * 1e12, int(memory_gib * GIB), gigabytes_per_second * 1e9, "bf16", "gpu")


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        _gpu("A100-40GB", 312, 39.5, 1555),
        _gpu("A100-80GB", 312, 79.2, 2039),
        _gpu("H100", 989, 79.6, 3350),
        _gpu("H100-PCIe", 756, 79.6, 2000),
        _gpu("H200", 989, 139.8, 4800),
        _gpu("B200", 2250, 178.0, 8000),
        _gpu("L40S", 362, 44.5, 864),
        _gpu("A10G", 70, 22.1, 600),
        _gpu("L4", 121, 22.1, 300),
        _gpu("RTX-4090", 165, 23.5, 1008),
        _gpu("RTX-3090", 71, 23.6, 936),
        _gpu("RTX-5090", 209, 31.4, 1792),
    )
}

_ALIASES = {"a100": "A100-80GB", "h100sxm": "H100", "h10080gb": "H100", "h200sxm": "H200"}


def find_device(name: str) -> Device:
    """Find a device by name; case, spaces, hyphens and `GB` are ignored.

    Raises:
        EloError: the device is not in the table.
    """

    def plain(text: str) -> str:
        return "".join(character for character in text.lower() if character.isalnum())

    key = plain(name).removeprefix("nvidia").removeprefix("geforce")
    names = {plain(known): known for known in DEVICES}
    names |= {known.removesuffix("gb").removeprefix("rtx"): name for known, name in names.items()} | _ALIASES
    if key not in names:
        raise EloError(
            f"device: {name!r} is not known; choose among {', '.join(DEVICES)}, or measure this machine with --measure"
        )
    return DEVICES[names[key]]


def measure_matmul_rate(
    seconds: float = 2.0, *, precision: Literal["bf16", "fp32"] | None = None, size: int | None = None
) -> Device:
    """Measure the rate of matrix products and the memory bandwidth of this machine.

    Args:
        seconds: minimum duration, in seconds, half for each of the two measurements; warm-up comes on top.
        precision: precision of the products; None means bf16 on a GPU and fp32 on a CPU.
        size: side of the square matrices; None means 8192 on a GPU and 1024 on a CPU, large enough for the full rate.

    Returns:
        A device with this machine's memory and the best measured rates; the best, since the machine may be shared.
    """
    import torch

    gpu = torch.cuda.is_available()
    where = torch.device("cuda" if gpu else "cpu")
    side = size or (8192 if gpu else 1024)
    precision = precision or ("bf16" if gpu else "fp32")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right, product = (torch.ones(side, side, dtype=dtype, device=where) for _ in range(3))
    source = torch.ones((256 if gpu else 32) * 2**20, dtype=torch.float32, device=where)
    target = torch.empty_like(source)

    def best(work: Callable[[], object], budget: float) -> float:
        fastest, began = float("inf"), time.perf_counter()
        work()
        while time.perf_counter() - began < budget or fastest == float("inf"):
            if gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            if gpu:
                torch.cuda.synchronize()
            fastest = min(fastest, time.perf_counter() - start)
        return fastest

    with torch.no_grad():
        matmul_seconds = best(lambda: torch.mm(left, right, out=product), seconds / 2)
        copy_seconds = best(lambda: target.copy_(source), seconds / 2)
    if gpu:
        properties = torch.cuda.get_device_properties(where)
        name, memory = properties.name, properties.total_memory
    else:
        name, memory = f"this machine's CPU ({torch.get_num_threads()} threads)", _physical_memory()
    return Device(
        name=name,
        matmul_flops=2.0 * side**3 / matmul_seconds,
        memory_bytes=memory,
        bandwidth=2.0 * source.nbytes / copy_seconds,
        precision=precision,
        kind="gpu" if gpu else "cpu",
        measured=True,
    )


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

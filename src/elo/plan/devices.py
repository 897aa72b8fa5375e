"""List GPUs with the rates of their data sheets, and describe this machine.

Rates come from the manufacturers' data sheets: dense bf16 with fp32 accumulation and no sparsity, and memory bandwidth.
Memory sizes are those that the driver reports, which are slightly below the nominal ones.
"""

from dataclasses import dataclass
from typing import Literal

import psutil
import torch

from elo.errors import EloError
from elo.train.arguments import bf16_pays

GIB = 2**30
Precision = Literal["bf16", "fp32"]
"""Precision of training: bf16 autocast over fp32 weights, or fp32 throughout."""
Kind = Literal["gpu", "cpu"]


@dataclass(frozen=True)
class Device:
    """A GPU, or this machine's CPU."""

    name: str
    memory_bytes: int
    precision: Precision
    kind: Kind
    matmul_flops: float | None = None
    """Rate of dense bf16 matrix products in the data sheet, in FLOP/s; None for this machine."""
    bandwidth: float | None = None
    """Memory bandwidth, read plus write, in bytes per second; None for this machine."""


def _gpu(name: str, teraflops: float, memory_gib: float, gigabytes_per_second: float) -> Device:
    return Device(name, int(memory_gib * GIB), "bf16", "gpu", teraflops * 1e12, gigabytes_per_second * 1e9)


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


def this_machine() -> Device:
    """Return this machine's GPU, or else its CPU, with the precision that training uses on it by default."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        precision: Precision = "bf16" if bf16_pays("cuda") else "fp32"
        return Device(properties.name, properties.total_memory, precision, "gpu")
    name, memory = f"this machine's CPU ({torch.get_num_threads()} threads)", psutil.virtual_memory().total
    return Device(name, memory, "bf16" if bf16_pays("cpu") else "fp32", "cpu")

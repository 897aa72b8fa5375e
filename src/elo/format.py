"""Format numbers for people: three significant digits and a unit."""

from collections.abc import Sequence


def signed(value: float, digits: int = 3) -> str:
    """Format a change with its sign."""
    shown = f"{value:+.{digits}f}"
    zero = f"{0:.{digits}f}"
    return f"±{zero}" if shown[1:] == zero else shown.replace("-", "−")


def duration(seconds: float) -> str:
    """Format a time in seconds as seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 90 * 60 else f"{seconds / 3600:.3g} h"


def count(value: float) -> str:
    """Format a large number, such as 1.5 M."""
    for scale, suffix in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " K")):
        if value >= 0.9995 * scale:
            return f"{value / scale:.3g}{suffix}"
    return f"{value:.0f}"


def memory(value: float) -> str:
    """Format a number of bytes in binary units."""
    for scale, suffix in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= 999.5 / 1024 * scale:
            return f"{value / scale:.3g} {suffix}"
    return f"{value:.0f} B"


def flops(value: float) -> str:
    """Format a number of floating-point operations."""
    for scale, prefix in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")):
        if value >= 0.9995 * scale:
            return f"{value / scale:.3g} {prefix}FLOP"
    return f"{value:.3g} FLOP"


def learning_rate(value: float) -> str:
    """Format a learning rate: 5e-4 rather than 0.0005 or 5e-04."""
    if value == 0:
        return "0"
    digits, exponent = f"{value:.2e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"


def listed(names: Sequence[str]) -> str:
    """Join names, as in `A, B and C`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""


def mean_of(names: Sequence[str]) -> str:
    """Return the name of a mean over languages, which is the language itself if there is only one."""
    return f"mean of {listed(names)}" if len(names) > 1 else listed(names)

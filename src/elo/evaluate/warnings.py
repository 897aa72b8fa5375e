"""Warnings about measurements, one line each."""

from collections.abc import Mapping
from typing import Any

from elo.data.heldout import MIN_DOCUMENTS


def few_documents(heldout: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a warning for each language that was measured on fewer than `MIN_DOCUMENTS` documents.

    Args:
        heldout: number of "documents" and "bytes" measured on, by language.
    """
    return [
        f"{language}: measured on {text['documents']} held-out documents ({text['bytes']:,} bytes), below "
        f"{MIN_DOCUMENTS}: differences may come from single documents; give more held-out documents"
        for language, text in heldout.items()
        if text["documents"] < MIN_DOCUMENTS
    ]


def worse_than_base(language: str, bpb: Mapping[str, float], base: Mapping[str, float]) -> str | None:
    """Return a warning if a target language has more bits per byte than in the base model; otherwise None."""
    if language not in bpb or language not in base or bpb[language] <= base[language]:
        return None
    return (
        f"{language} is worse than the base model ({bpb[language]:.4f} bits per byte, base {base[language]:.4f}); "
        "try a lower learning rate or another method"
    )


def harmful_change(tried: Mapping[float, float]) -> str:
    """Return a warning that the search of a scale found the model before training to be best.

    Args:
        tried: nats per token by scale, with 0.
    """
    others = ", ".join(f"{nats:.4f} at scale {scale:g}" for scale, nats in tried.items() if scale != 0)
    return (
        "scale: search keeps nothing of the trained change: on unseen text of all languages, the model before training "
        f"has {tried[0]:.4f} nats per token, and with the change {others or 'no finite loss'}; try a lower learning "
        "rate, more text or another method"
    )

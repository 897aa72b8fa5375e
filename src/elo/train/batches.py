"""Make batches of sequences in their fixed order, divided among the processes."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset
from transformers import TrainingArguments

from elo.train.attention import document_starts


def micro_batches(
    rows: Dataset, collator: "PackedCollator", arguments: TrainingArguments, accelerator: Accelerator, first_row: int
) -> Iterator[dict[str, Any]]:
    """Return an iterator over this process's micro-batches, from sequence `first_row` on.

    The processes take micro-batches in turn, so the sequences of an update do not depend on the number of processes.

    Args:
        rows: map-style dataset of sequences.
    """
    size = arguments.per_device_train_batch_size
    start, stride = first_row + accelerator.process_index * size, accelerator.num_processes * size
    firsts = range(start, len(rows), stride)  # type: ignore[arg-type]
    return iter(
        DataLoader(
            rows,
            batch_sampler=(list(range(first, first + size)) for first in firsts),
            collate_fn=collator,
            num_workers=arguments.dataloader_num_workers,
            pin_memory=arguments.dataloader_pin_memory,
            persistent_workers=arguments.dataloader_persistent_workers,
            prefetch_factor=arguments.dataloader_prefetch_factor,
            multiprocessing_context=arguments.dataloader_multiprocessing_context,
        )
    )


class PackedCollator:
    """Stack sequences to [B, T]; with `varlen`, concatenate them to [1, B x T] and add the document boundaries.

    Args:
        varlen: whether the attention is `elo.train.attention.VARLEN`.
        position_ids: whether the model takes position ids; if not, the sequences must not be packed.
    """

    def __init__(self, *, varlen: bool = False, position_ids: bool = True) -> None:
        self.varlen, self.position_ids = varlen, position_ids

    def __call__(self, rows: list[dict[str, np.ndarray]]) -> dict[str, Any]:
        keys = [key for key in rows[0] if self.position_ids or key != "position_ids"]
        batch: dict[str, Any] = {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in keys}
        if not self.varlen:
            return batch
        boundaries, longest = document_starts(batch["position_ids"])
        flat = {key: value.reshape(1, -1) for key, value in batch.items()}
        # A constant upper bound avoids recompilation of compiled layers.
        longest = max(longest, len(rows[0]["input_ids"]))
        return flat | {
            "cu_seq_lens_q": boundaries,
            "cu_seq_lens_k": boundaries,
            "max_length_q": longest,
            "max_length_k": longest,
        }

"""Training sequences of whole conversations: several packed into a sequence, or one per sequence with padding."""

from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from elo.data.chat_template import ChatExample
from elo.data.packing import IGNORE_INDEX, PackedSequence, shuffled

_OPEN_SEQUENCES = 64  # sequences that the next conversation may still go to


class ChatSequences(Dataset):
    """Sequences of `epochs` passes over the conversations, in an order that `seed` determines.

    Their number is rounded up to a multiple of `multiple` with sequences of a further pass.

    Args:
        examples: conversations of at most `sequence_length` tokens.
        packing: pack several conversations into a sequence; otherwise each has an attention mask and padding.
    """

    def __init__(
        self,
        examples: Sequence[ChatExample],
        *,
        sequence_length: int,
        packing: bool,
        epochs: int,
        multiple: int,
        seed: int,
    ) -> None:
        self.examples, self.sequence_length, self.packing = examples, sequence_length, packing
        lengths = [len(each.ids) for each in examples]
        self.sequences: list[list[int]] = []
        epoch = 0
        while epoch < epochs or len(self.sequences) % multiple:
            order = shuffled(len(examples), seed, epoch).tolist()
            made = _pack(lengths, order, sequence_length) if packing else [[index] for index in order]
            whole = epoch < epochs
            self.sequences += made if whole else made[: -len(self.sequences) % multiple]
            epoch += 1

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        T = self.sequence_length
        held = [self.examples[each] for each in self.sequences[index]]
        used = sum(len(each.ids) for each in held)
        padding = np.full(T - used, held[-1].ids[-1])
        ids = np.concatenate([*(each.ids for each in held), padding])
        labels = np.concatenate([*(each.labels for each in held), np.full(T - used, IGNORE_INDEX)])
        positions = [np.arange(len(each.ids)) for each in held]
        if self.packing:  # padding is a document of its own
            sequence = PackedSequence(ids, labels, np.concatenate([*positions, np.arange(T - used)]))
        else:
            mask = (np.arange(T) < used).astype(np.int64)
            sequence = PackedSequence(ids, labels, np.concatenate([*positions, np.zeros(T - used, np.int64)]), mask)
        return {name: value for name, value in sequence._asdict().items() if value is not None}

    @property
    def tokens_used(self) -> int:
        """Number of positions that are not padding."""
        return sum(len(self.examples[index].ids) for sequence in self.sequences for index in sequence)


def _pack(lengths: Sequence[int], order: Sequence[int], size: int) -> list[list[int]]:
    """Put each conversation into the first of the open sequences that has room for it, else into a new one."""
    sequences: list[list[int]] = []
    room: list[int] = []
    for index in order:
        first = max(0, len(room) - _OPEN_SEQUENCES)
        place = next((at for at in range(first, len(room)) if room[at] >= lengths[index]), None)
        if place is None:
            place = len(room)
            sequences.append([])
            room.append(size)
        sequences[place].append(index)
        room[place] -= lengths[index]
    return sequences

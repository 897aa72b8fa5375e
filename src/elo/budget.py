"""Divide the token budget of a run into the packed sequences of each phase."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from elo.config import DataConfig, RunConfig
from elo.data.mixture import Mixture, MixtureSequences, Schedule, build_mixture, language_shares
from elo.data.shards import PreparedData
from elo.errors import EloError
from elo.methods import Phase
from elo.train.arguments import sequences_per_step

# A scale is searched on 1/400 of the budget per language, within these limits in tokens. The search takes several
# forward passes of the whole model, and should be cheap compared with training.
_SCALE_TOKENS = (2048, 32_768)


@dataclass(frozen=True)
class Sequences:
    """The packed sequences of a run: first those of ELO pretraining, then those of layer alignment.

    Attributes:
        mixture: source of the sequences; sequence i does not depend on which others are read.
        pretraining: number of sequences for phases with portion `pretraining`.
        alignment: number of sequences for phases with portion `alignment`.
    """

    mixture: Mixture
    pretraining: int
    alignment: int

    def of(self, phase: Phase) -> MixtureSequences:
        """Return the sequences of a phase."""
        start, stop = {
            "pretraining": (0, self.pretraining),
            "alignment": (self.pretraining, self.pretraining + self.alignment),
            "all": (0, self.pretraining + self.alignment),
        }[phase.portion]
        return self.mixture.sequences(start, stop)

    def first(self, tokens: int) -> MixtureSequences:
        """Return the fewest first sequences that have at least `tokens` tokens together."""
        return self.mixture.sequences(0, -(-tokens // self.mixture.sequence_length))

    def unseen(self) -> dict[str, list[dict[str, np.ndarray]]]:
        """Return sequences that follow those of the training, by language."""
        return self.mixture.sequences_by_language(*self.unseen_identity()["rows"])

    def unseen_identity(self) -> dict[str, Any]:
        """Return all that determines `unseen`, for the fingerprint of a stage."""
        length, total = self.mixture.sequence_length, self.pretraining + self.alignment
        count = -(-min(max(total * length // 400, _SCALE_TOKENS[0]), _SCALE_TOKENS[1]) // length)
        return {"mixture": self.mixture.origin, "rows": [total, count]}


def divide_budget(config: RunConfig, data: PreparedData, say: Callable[[str], None]) -> Sequences:
    """Divide the token budget into whole updates of the phases.

    Args:
        say: function that shows the user a note if the budget exceeds one pass over a language's text.

    Raises:
        EloError: the budget is less than one update of a phase.
    """
    length = config.data.sequence_length
    mixture = _mixture(config, data)
    total = mixture.epoch_sequences(*config.data.targets) if config.tokens is None else config.tokens // length
    for language in dict.fromkeys(source.language for source in mixture.sources):
        own = [source for source in mixture.sources if source.language == language]
        passes = {each.stream.corpus.name: total * each.share / each.stream.sequences_per_epoch for each in own}
        most = max(passes.values())
        if most > 1:
            by_corpus = ", ".join(f"{name} {count:.1f}" for name, count in passes.items())
            say(
                f"note: the budget of {total * length:,} tokens passes over the {language!r} text "
                f"{total / mixture.epoch_sequences(language):.1f} times"
                + (f" ({by_corpus})" if len(own) > 1 else "")
                + ("; passes beyond 4 lose value (docs/data.md, Little target text)" if most > 4 else "")
            )
    pretraining, alignment = divide_sequences(config, total)
    if isinstance(mixture, Schedule):
        mixture = mixture.over(pretraining + alignment)
    return Sequences(mixture, pretraining, alignment)


def divide_sequences(config: RunConfig, total: int) -> tuple[int, int]:
    """Divide `total` packed sequences into whole updates.

    Returns:
        Number of sequences for phases with portion `pretraining` or `all`, and for phases with portion `alignment`.

    Raises:
        EloError: `total` is less than one update of each phase.
    """
    length = config.data.sequence_length
    steps = {phase.portion: sequences_per_step(length, config.settings(phase)) for phase in config.method.phases}
    alignment = 0
    if "alignment" in steps:
        step = steps["alignment"]
        alignment = max(1, round(total * config.method.alignment_share / step)) * step
    step = steps.get("pretraining", steps.get("all", 1))
    pretraining = max(0, total - alignment) // step * step
    too_short = alignment > total or (pretraining == 0 and len(steps) > ("alignment" in steps))
    if too_short:
        needed = " and ".join(f"{count * length:,} ({portion})" for portion, count in steps.items())
        raise EloError(
            f"tokens: the budget of {total * length:,} tokens is less than one update of each phase, which takes "
            f"{needed}; give more text or tokens, or lower training.tokens_per_step"
        )
    return pretraining, alignment


def _mixture(config: RunConfig, data: PreparedData) -> Mixture:
    section = config.data
    names = {language: [corpus.name for corpus in data.train(language)] for language in section.corpora}
    parts: list[tuple[float, Mixture]] = []
    for part in section.parts:
        weights = {
            language: dict(
                zip(names[language], part.weights.get(language) or [each.weight for each in corpora], strict=True)
            )
            for language, corpora in section.corpora.items()
        }
        mixture = build_mixture(
            data,
            part.target or section.target,
            part.source or section.source,
            section.replay_ratio if part.replay_ratio is None else part.replay_ratio,
            section.sequence_length,
            config.seed,
            section.packing,
            weights,
            section.languages,
        )
        parts.append((part.share, mixture))
    return Schedule(parts, 0) if section.schedule else parts[0][1]


def training_shares(section: DataConfig, data: PreparedData) -> tuple[float, dict[str, float]]:
    """Return the replay ratio and the share of training tokens of each language, as means over the schedule."""
    ratio, shares = 0.0, dict[str, float]()
    for part in section.parts:
        length = part.share / sum(each.share for each in section.parts)
        own = section.replay_ratio if part.replay_ratio is None else part.replay_ratio
        ratio += own * length
        found = language_shares(data, part.target or section.target, part.source or section.source, own)
        shares |= {language: shares.get(language, 0.0) + share * length for language, share in found.items()}
    return ratio, shares

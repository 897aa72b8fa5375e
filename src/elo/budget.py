"""Which packed rows of a run's mixture each phase trains on: the token budget, divided."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from elo.config import RunConfig
from elo.errors import EloError

if TYPE_CHECKING:
    from elo.data.mixture import Mixture, MixtureRows
    from elo.data.shards import PreparedData
    from elo.methods.methods import Method
    from elo.methods.phases import Phase

# Tokens of each language for the search of a scale, a 400th of the budget within these: four forward passes of the
# whole model should cost little beside the training.
_SCALE_TOKENS = (2048, 32_768)


@dataclass(frozen=True)
class RowBudget:
    """A run's rows: those of ELO pretraining first, then those of layer alignment; a phase takes either or all.

    Attributes:
        config: of the run.
        prepared: the shards that the mixture is drawn from.
        mixture: row i is the same whatever is asked for before it.
        pretraining: rows of ELO pretraining.
        alignment: rows of layer alignment, which follow.
        all: rows of what has no such parts, and of full CPT beside it.
    """

    config: RunConfig
    prepared: "PreparedData"
    mixture: "Mixture"
    pretraining: int
    alignment: int
    all: int

    def of(self, phase: "Phase", method: "Method", earlier: dict[str, dict[str, Any]]) -> "MixtureRows":
        """The rows that a phase trains on, a whole number of its steps.

        Args:
            earlier: what `elo.run.adapt` returned for the methods before.

        Raises:
            EloError: there are some, but less than a step's.
        """
        start, stop = {
            "pretraining": (0, self.pretraining),
            "alignment": (self.pretraining, self.pretraining + self.alignment),
            "all": (0, self.all),
        }[phase.rows]
        if method.name == "full_at_wall_time":
            stop = self._at_wall_time(earlier)
        step = _rows_per_step(self.config, phase.settings)
        if 0 < stop - start < step:
            length = self.config.data.sequence_length
            raise EloError(
                f"tokens: {method.name} has {(stop - start) * length:,} tokens for {phase.name}, less than one step of "
                f"{phase.settings}.tokens_per_step {step * length:,}; give more tokens, or lower it"
            )
        return self.mixture.rows(start, start + (stop - start) // step * step)

    def _at_wall_time(self, earlier: dict[str, dict[str, Any]]) -> int:
        """Rows that full CPT gets through in ELO's wall time, by its measured rate; decided once in a run."""
        from elo.run import wall_seconds

        rate = earlier["full"]["stages"]["full"]["tokens_per_second"] / self.config.data.sequence_length
        step = _rows_per_step(self.config, "full")
        # Rounded up: the control is never given less time than ELO took.
        return math.ceil(wall_seconds(earlier[self.config.method]) * rate / step) * step

    def unseen(self, method: "Method") -> tuple[int, int]:
        """Where the rows begin that follow those of a method's first phase, and how many of each language to take."""
        length = self.config.data.sequence_length
        count = -(-min(max(self.all * length // 400, _SCALE_TOKENS[0]), _SCALE_TOKENS[1]) // length)
        return self.of(method.phases[0], method, {}).stop, count

    def inputs(self, first: int, last: int) -> dict[str, Any]:
        """What decides the content of rows: where they begin, and where they end or how many there are."""
        data = self.config.data
        return {
            "data": self.prepared.fingerprint,
            "mixture": {
                "target": data.target,
                "source": data.source,
                "replay_ratio": data.replay_ratio,
                "sequence_length": data.sequence_length,
                "packing": data.packing,
                "weights": {language: [each.weight for each in sources] for language, sources in data.corpora.items()},
            },
            "rows": [first, last],
            "row_seed": self.config.seed,
        }


def divide_budget(
    config: RunConfig,
    prepared: "PreparedData",
    own: Sequence["Phase"],
    controls: Sequence["Phase"],
    say: Callable[[str], None],
) -> RowBudget:
    """Divide the token budget in whole steps of the run's own method.

    Args:
        own: the method's phases.
        controls: those of its controls. A share is kept for layer alignment if any phase at all is one.
        say: is told which text the budget passes over more than once.

    Raises:
        EloError: the budget is less than one update of a phase.
    """
    from elo.data.mixture import build_mixture

    data = config.data
    weights = {
        language: {corpus.name: each.weight for corpus, each in zip(prepared.train(language), sources, strict=True)}
        for language, sources in data.corpora.items()
    }
    mixture = build_mixture(
        prepared,
        data.target,
        data.source,
        data.replay_ratio,
        data.sequence_length,
        config.seed,
        data.packing,
        weights,
    )
    total = mixture.epoch_rows(data.target) if config.tokens is None else config.tokens // data.sequence_length
    for language in (data.target, data.source) if data.replay_ratio else (data.target,):
        once = mixture.epoch_rows(language)
        if total > once:
            say(
                f"note: the budget of {total * data.sequence_length:,} tokens passes over the {language!r} text "
                f"{total / once:.1f} times"
            )
    phases = [*own, *controls]
    sections = [own[0].settings]
    alignment = 0
    aligning = next((phase.settings for phase in phases if phase.rows == "alignment"), None)
    if aligning and config.layer_alignment.share:
        sections.append(aligning)
        step = _rows_per_step(config, aligning)
        alignment = max(1, round(total * config.layer_alignment.share / step)) * step
    step = _rows_per_step(config, own[0].settings)
    pretraining = max(0, total - alignment) // step * step
    # What a control needs does not change what the method itself trains on.
    parted = any(phase.rows == "alignment" for phase in own)
    everything = pretraining + alignment if parted else total // step * step
    too_short = {"all": everything == 0, "pretraining": pretraining == 0, "alignment": alignment > total}
    if any(too_short[phase.rows] for phase in phases):
        steps = " and one of ".join(
            f"{section} ({getattr(config, section).tokens_per_step:,})" for section in dict.fromkeys(sections)
        )
        raise EloError(
            f"tokens: the budget of {total * data.sequence_length:,} tokens is less than one step of {steps}; give "
            "more text or tokens, or lower tokens_per_step"
        )
    return RowBudget(config, prepared, mixture, pretraining, alignment, everything)


def _rows_per_step(config: RunConfig, section: str) -> int:
    from elo.train.loop import rows_per_step

    return rows_per_step(config.data.sequence_length, getattr(config, section))

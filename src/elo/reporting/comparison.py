"""Numbers that the report shows and the sentences they support: differences, ratios, who is best.

Every speed-up says of what over what; every sentence is chosen by the numbers, whichever way they point.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt

from elo.reporting.results import ClozeGroup, Measurement, Method, Results

LEVEL_BPB = 0.005
"""Bits per byte by which two models must differ to be called different; one seed cannot tell less apart."""
SAME_TOKENS = 0.02
"""Relative difference up to which two methods have trained on the same number of tokens."""


@dataclass(frozen=True)
class Row:
    """One line of the comparison table; None where the results do not say."""

    method: Method
    speed_up: float | None
    """Wall time of full CPT over this method's, when both trained on the same number of tokens."""
    target: float | None
    target_change: float | None
    source: float | None
    source_change: float | None
    cloze_target: float | None
    cloze_source: float | None
    best: frozenset[str]
    """Names of the columns in which this row is the best of at least two."""


@dataclass(frozen=True)
class GroupColumn:
    """Cloze accuracy in one language of the items of one group, of the base and then of every method."""

    language: str
    name: str
    """The group's, for people."""
    items: int
    groups: tuple[ClozeGroup | None, ...]
    """None for a model that was not asked these items."""


@dataclass(frozen=True)
class Figure:
    """A number worth a large type: what it is, and what it is compared with."""

    name: str
    value: str
    detail: str
    tone: str
    """good, bad or plain."""


def compare(results: Results) -> list[Row]:
    """One row a method, in the results' order."""
    target, source = results.languages.target, results.languages.source
    full = results.method("full")
    columns: dict[str, tuple[Callable[[Method], float | None], bool]] = {
        "wall": (lambda method: method.wall_seconds, False),
        "speed_up": (lambda method: speed_up(method, full), True),
        "target": (lambda method: method.bpb.get(target), False),
        "source": (lambda method: method.bpb.get(source), False),
        "cloze_target": (lambda method: _accuracy(method, target), True),
        "cloze_source": (lambda method: _accuracy(method, source), True),
        "memory": (lambda method: method.peak_memory_bytes, False),
    }
    values = {name: [value(method) for method in results.methods] for name, (value, _) in columns.items()}
    best = {name: _best(values[name], highest) for name, (_, highest) in columns.items()}
    return [
        Row(
            method=method,
            speed_up=values["speed_up"][index],
            target=values["target"][index],
            target_change=difference(values["target"][index], results.base.bpb.get(target)),
            source=values["source"][index],
            source_change=difference(values["source"][index], results.base.bpb.get(source)),
            cloze_target=values["cloze_target"][index],
            cloze_source=values["cloze_source"][index],
            best=frozenset(name for name, indices in best.items() if index in indices),
        )
        for index, method in enumerate(results.methods)
    ]


def group_columns(results: Results) -> list[GroupColumn]:
    """Target language first, its groups in the order in which the results bring them; empty without groups."""
    measured: list[Measurement] = [results.base, *results.methods]
    languages = (results.languages.target, results.languages.source)
    asked = {language: [each.cloze.get(language) for each in measured] for language in languages}
    names = dict.fromkeys(name for clozes in asked.values() for cloze in clozes if cloze for name in cloze.groups)
    found = []
    for language, clozes in asked.items():
        for name in names:
            groups = tuple(cloze.groups.get(name) if cloze else None for cloze in clozes)
            if any(groups):
                items = max(group.items for group in groups if group)
                found.append(GroupColumn(language, name.replace("_", " "), items, groups))
    return found


def group_note(results: Results) -> str:
    """What the accuracies by group are to be read against."""
    columns = group_columns(results)
    notes = []
    guessing = []
    partial = False
    for language in dict.fromkeys(column.language for column in columns):
        cloze = next(each.cloze[language] for each in (results.base, *results.methods) if language in each.cloze)
        guessing.append(f"{language} {cloze.chance:.0%}")
        partial |= sum(column.items for column in columns if column.language == language) < cloze.items
    notes.append(f"Guessing would give, over all items of a language: {', '.join(guessing)}.")
    if any(standard_error(group) is not None for column in columns for group in column.groups):
        notes.append(
            "± is one standard error in points, √(p(1 − p) / n) of n items taken as independent; "
            "at 0% and 100% it says nothing and is left out."
        )
    if partial:
        notes.append("Items without a group are in the overall accuracy alone.")
    return " ".join(notes)


def standard_error(group: ClozeGroup | None) -> float | None:
    """Of the group's accuracy, 0 to 0.5, were its items independent; None where the formula has nothing to say."""
    if group is None or not group.items or not 0 < group.accuracy < 1:
        return None
    return sqrt(group.accuracy * (1 - group.accuracy) / group.items)


def difference(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else after - before


def speed_up(method: Method, full: Method | None) -> float | None:
    """Wall time of full CPT over the method's; None unless both trained on the same number of tokens."""
    if full is None or not method.wall_seconds or not same_tokens(method, full):
        return None
    return full.wall_seconds / method.wall_seconds


def same_tokens(one: Method, other: Method) -> bool:
    return abs(one.tokens - other.tokens) <= SAME_TOKENS * max(one.tokens, other.tokens)


def rate_speed_up(results: Results) -> float | None:
    """Tokens/s of ELO pretraining over tokens/s of full CPT."""
    full = results.method("full")
    fast = _rate(results.methods[0], "elo_pretraining")
    slow = _rate(full, "full") if full else None
    return fast / slow if fast and slow else None


def seconds_to_reach(method: Method, language: str, bpb: float, base: float | None) -> float | None:
    """Training seconds after which the method's whole-model curve first stands at or below `bpb`.

    Interpolated linearly between measurements; None if it never gets there or was not measured on the way.
    """
    points = [(0.0, base)] if base is not None else []
    points += [(e.seconds, e.bpb[language]) for e in method.evaluations if language in e.bpb]
    final = method.bpb.get(language)
    if final is not None and (not points or 0.995 * method.wall_seconds > points[-1][0]):
        points.append((method.wall_seconds, final))
    if len(points) < 3:
        return None
    for (start, high), (end, low) in pairwise(points):
        if low <= bpb:
            return start if high <= bpb else start + (end - start) * (high - bpb) / (high - low)
    return None


def figures(results: Results) -> list[Figure]:
    """The headline's numbers, as many as the results support."""
    own, target, source = results.methods[0], results.languages.target, results.languages.source
    full = results.method("full")
    found = []
    for language, role in ((target, "Target language"), (source, "Source language")):
        before, after = results.base.bpb.get(language), own.bpb.get(language)
        if before is None or after is None:
            continue
        change = after - before
        tone = "plain" if abs(change) < LEVEL_BPB else "good" if change < 0 else "bad"
        found.append(Figure(f"{role} ({language})", signed(change), f"bits per byte: {before:.3f} → {after:.3f}", tone))
    if full is not None and full is not own:
        if (ratio := speed_up(own, full)) is not None:
            found.append(
                Figure(
                    "Wall time, same tokens",
                    f"{ratio:.2f}×",
                    f"{full.title} {duration(full.wall_seconds)} over {own.title} {duration(own.wall_seconds)}",
                    "good" if ratio > 1 else "bad",
                )
            )
        if (ratio := rate_speed_up(results)) is not None:
            found.append(
                Figure(
                    "Tokens per second",
                    f"{ratio:.2f}×",
                    f"ELO pretraining over {full.title}",
                    "good" if ratio > 1 else "bad",
                )
            )
        if (reached := _time_to_own_result(results)) is not None and own.wall_seconds:
            ratio = reached / own.wall_seconds
            found.append(
                Figure(
                    f"Time to {own.title}'s {target} result",
                    f"{ratio:.2f}×",
                    f"{full.title} stood there after {duration(reached)}, {own.title} after "
                    f"{duration(own.wall_seconds)}",
                    "good" if ratio > 1 else "bad",
                )
            )
    return found


def verdict(results: Results) -> str:
    """What the run's own method did and how full CPT compares, in one or two sentences chosen by the numbers."""
    own, target, source = results.methods[0], results.languages.target, results.languages.source
    before, after = results.base.bpb.get(target), own.bpb.get(target)
    did = f"{own.title} was trained on {count(own.tokens)} tokens"
    if before is not None and after is not None:
        did = f"{own.title} took {target} from {before:.3f} to {after:.3f} bits per byte ({signed(after - before)})"
    if (change := difference(own.bpb.get(source), results.base.bpb.get(source))) is not None:
        moved = "stayed level" if abs(change) < LEVEL_BPB else "rose" if change > 0 else "fell"
        did += f" while {source} {moved} ({signed(change)})"
    rivals = []
    for name, condition in (("full_at_wall_time", "In the same wall time"), ("full", "On the same tokens")):
        rival = results.method(name)
        if rival is None or rival is own or target not in rival.bpb or after is None:
            continue
        if name == "full" and not same_tokens(own, rival):
            condition = f"On {count(rival.tokens)} tokens"
        ratio = rival.wall_seconds / own.wall_seconds if own.wall_seconds else None
        cost = f", in {ratio:.2f} times the wall time," if name == "full" and ratio is not None else ""
        kept = difference(rival.bpb.get(source), results.base.bpb.get(source))
        at = f"{rival.bpb[target]:.3f}" + (f" ({source} {signed(kept)})" if kept is not None else "")
        gap = rival.bpb[target] - after
        outcome = (
            f"ends level with it, at {at}"
            if abs(gap) < LEVEL_BPB
            else f"ends lower, at {at}"
            if gap < 0
            else f"ends higher, at {at}"
        )
        rivals.append(f"{condition}{cost} full CPT {outcome}")
    if not rivals:
        return f"{did}. No full-CPT control was run, so nothing here says what else the time could have bought."
    joined = "; ".join([rivals[0], *(rival[0].lower() + rival[1:] for rival in rivals[1:])])
    return f"{did}. {joined}."


def findings(results: Results) -> list[str]:
    """How every control compares with the run's own method, one sentence each."""
    own = results.methods[0]
    found = [sentence for control in results.methods[1:] if (sentence := _against(results, own, control))]
    if own.before_alignment is not None:
        stood = [
            f"{own.before_alignment.bpb[language]:.3f} in {language} (then {own.bpb[language]:.3f})"
            for language in (results.languages.target, results.languages.source)
            if language in own.before_alignment.bpb and language in own.bpb
        ]
        if stood:
            found.append(f"Before layer alignment the attached model stood at {' and '.join(stood)}.")
    return found


def _against(results: Results, own: Method, control: Method) -> str | None:
    languages = (("target", results.languages.target), ("source", results.languages.source))
    gaps = [
        (role, language, control.bpb[language] - own.bpb[language])
        for role, language in languages
        if language in control.bpb and language in own.bpb
    ]
    if not gaps:
        return None
    words = []
    for role, language, gap in gaps:
        where = f"in {language} ({role})"
        words.append(
            f"level {where}" if abs(gap) < LEVEL_BPB else f"{abs(gap):.3f} {'higher' if gap > 0 else 'lower'} {where}"
        )
    return f"Against {own.title}, {control.title}{_cost(own, control)} ends {' and '.join(words)}."


def _cost(own: Method, control: Method) -> str:
    if not own.wall_seconds or not control.wall_seconds:
        return ""
    share = control.wall_seconds / own.wall_seconds
    tokens = "the same tokens" if same_tokens(own, control) else f"{count(control.tokens)} tokens"
    time = "the same wall time" if abs(share - 1) < 0.03 else f"{share:.2f} times the wall time"
    return f" ({tokens}, {time})"


def _time_to_own_result(results: Results) -> float | None:
    """Seconds full CPT needed to stand where the run's own method ends."""
    own, full, target = results.methods[0], results.method("full"), results.languages.target
    reached = own.bpb.get(target)
    if full is None or reached is None:
        return None
    last = own.evaluations[-1] if own.evaluations else None
    if last is not None and last.tokens >= 0.995 * own.tokens:
        # Measured during training, as the curve it is looked up on is: maybe on fewer documents than the final value.
        reached = last.bpb.get(target, reached)
    return seconds_to_reach(full, target, reached, results.base.bpb.get(target))


def _rate(method: Method | None, stage_name: str) -> float | None:
    stage = method.stage(stage_name) if method else None
    if stage is None:
        return None
    return stage.tokens_per_second or (stage.tokens / stage.seconds if stage.seconds else None)


def _accuracy(method: Method, language: str) -> float | None:
    return method.cloze[language].accuracy if language in method.cloze else None


def _best(values: Sequence[float | None], highest: bool) -> set[int]:
    known = [value for value in values if value is not None]
    if len(known) < 2 or min(known) == max(known):
        return set()
    best = max(known) if highest else min(known)
    return {index for index, value in enumerate(values) if value == best}


def signed(value: float) -> str:
    """A change in bits per byte, with its sign."""
    shown = f"{value:+.3f}"
    return "±0.000" if shown in ("+0.000", "-0.000") else shown.replace("-", "−")


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 90 * 60 else f"{seconds / 3600:.3g} h"


def count(value: float) -> str:
    """A large number with three significant digits."""
    for scale, suffix in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " K")):
        if value >= 0.9995 * scale:
            return f"{value / scale:.3g}{suffix}"
    return f"{value:.0f}"


def memory(value: float) -> str:
    """Bytes in binary units."""
    for scale, suffix in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= 999.5 / 1024 * scale:
            return f"{value / scale:.3g} {suffix}"
    return f"{value:.0f} B"


def flops(value: float) -> str:
    """Floating-point operations with three significant digits."""
    for scale, prefix in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")):
        if value >= 0.9995 * scale:
            return f"{value / scale:.3g} {prefix}FLOP"
    return f"{value:.3g} FLOP"


def rate(value: float) -> str:
    """A learning rate: 5e-4 rather than 0.0005 or 5e-04."""
    if value == 0:
        return "0"
    digits, exponent = f"{value:.2e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"

"""TensorBoard receives both languages' bits per byte, the loss, tokens, cost and memory of a run."""

from pathlib import Path

import pytest
from run_fixtures import write_world

from elo.run import run

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def test_tensorboard(tmp_path: Path) -> None:
    config = write_world(tmp_path) | {"method": "full", "tokens": 256}
    config["training"] |= {"report_to": "tensorboard", "evaluations": 1}
    results = run(config)
    values: dict[str, list[float]] = {}
    for file in (tmp_path / "run" / "trackers" / "full").rglob("events.out.tfevents.*"):
        events = event_accumulator.EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            values[tag.rpartition("/")[2]] = [event.value for event in events.Scalars(tag)]
    assert {"loss", "learning_rate", "bpb_xx", "bpb_en", "tokens", "seconds", "cpu_seconds", "memory_bytes"} <= set(
        values
    )
    (trial,) = results["trials"]
    assert values["bpb_xx"][-1] == pytest.approx(trial["evaluations"][-1]["bpb"]["xx"], rel=1e-5)
    assert values["tokens"][-1] == 256
    assert values["cpu_seconds"][-1] > 0
    assert values["memory_bytes"][-1] > 1e7

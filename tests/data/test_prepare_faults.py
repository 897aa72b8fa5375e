"""elo prepare under kill -9, two at once, and a full disk: the outcome is the undisturbed one, byte for byte."""

import errno
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from data_fixtures import make_backend, make_texts, make_tokenizer, tree, write_jsonl

from elo.data import shard_writer
from elo.data.prepare import prepare
from elo.errors import EloError

SCRIPT = """
    import sys, time
    import elo.data.corpora as corpora, elo.data.shard_writer as writer, elo.data.prepare as recipe
    from tokenizers import Tokenizer
    from elo.data.tokenizer import wrap_tokenizer

    # Small batches and a pause at each record make it likely to be killed at any of the steps.
    corpora.BATCH_BYTES, recipe.BYTES_PER_WORKER, corpora.UNIT_BYTES = 2000, 1, 20000
    write = writer.write_json
    def slow_write(path, value):
        time.sleep(0.003)
        write(path, value)
        time.sleep(0.003)
    writer.write_json = slow_write
    tokenizer, source, output, workers = sys.argv[1:]
    tokenizer = wrap_tokenizer(Tokenizer.from_file(tokenizer), 0, 1, "made")
    print("ready", flush=True)
    recipe.prepare(tokenizer, {"ko": source}, output, heldout_share=0.05, validation_share=0.05,
                   shard_tokens=1500, workers=int(workers), on_error="skip", progress=False)
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    make_backend().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(4):
        path = write_jsonl(folder / f"{number}.jsonl.gz", make_texts(300, number))
    broken = write_jsonl(folder / "9.jsonl", make_texts(40, 7))
    broken.write_bytes(broken.read_bytes().replace(b'"text"', b'"txt"', 5) + b'{"text": 1}\n{"text": ""}\n')
    assert path.exists()
    return [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "tokenizer.json"), str(folder)]


def test_killed_at_any_instant_it_goes_on_to_the_same_bytes(tmp_path: Path, command: list[str]) -> None:
    subprocess.run([*command, str(tmp_path / "undisturbed"), "1"], check=True)
    expected = tree(tmp_path / "undisturbed")
    assert sum(name.endswith(".tokens") for name in expected) > 30
    assert sum(int(b'"skipped": 1' in data) for name, data in expected.items() if name.endswith(".json"))

    rng = random.Random(0)
    output = tmp_path / "killed"
    kept, kills = 0, 0
    for attempt in range(9):
        process = subprocess.Popen([*command, str(output), str(1 + attempt % 2)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        wanted = kept + rng.randrange(4)
        while process.poll() is None and attempt < 8 and finished_segments(output) < wanted:
            time.sleep(0.001)
        if attempt < 8:
            time.sleep(rng.uniform(0, 0.02))
            process.kill()
        status = process.wait()
        process.stdout.close()
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills += 1
        assert finished_segments(output) >= kept, "finished shards must be kept"
        kept = finished_segments(output)
    assert kills >= 3 and kept > 0
    assert tree(output) == expected


def finished_segments(output: Path) -> int:
    """A shard counts once its record is there."""
    return len(list(output.glob("*/*/*/?????-?????.json")))


def test_two_at_once_the_second_is_told_and_leaves(tmp_path: Path, command: list[str]) -> None:
    output = tmp_path / "out"
    first = subprocess.Popen([*command, str(output), "1"], stdout=subprocess.PIPE)
    try:
        while not (output / "prepare.json").exists() and first.poll() is None:
            time.sleep(0.005)
        first.send_signal(signal.SIGSTOP)  # however long the second takes to start
        second = subprocess.run([*command, str(output), "1"], capture_output=True, text=True)
        assert "another elo prepare is writing to it" in second.stderr
    finally:
        first.send_signal(signal.SIGCONT)
        assert first.wait() == 0
        assert first.stdout is not None
        first.stdout.close()


def test_a_full_disk_is_told_and_finished_shards_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(100))
    options: dict = {"heldout_share": 0, "shard_tokens": 500, "progress": False}
    prepare(make_tokenizer(), {"ko": str(source)}, tmp_path / "whole", **options)
    output = tmp_path / "out"
    closed = []
    close = shard_writer._close

    def close_until_full(file: object) -> None:
        closed.append(file)
        if len(closed) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        close(file)

    monkeypatch.setattr(shard_writer, "_close", close_until_full)
    with pytest.raises(EloError, match=r"ko/train/0: cannot be written \(No space left on device\); free disk space"):
        prepare(make_tokenizer(), {"ko": str(source)}, output, **options)
    assert sum(name.endswith(".tokens") for name in tree(output)) == 2
    assert not any(".tmp-" in name for name in tree(output))
    monkeypatch.undo()
    prepare(make_tokenizer(), {"ko": str(source)}, output, **options)
    assert tree(output) == tree(tmp_path / "whole")

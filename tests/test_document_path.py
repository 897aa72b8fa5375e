"""A training document reaches the loss through at most 12 files of this package.

Counted while a run works: the files of all functions that hold the document, as text, as token ids or in a batch.
"""

import json
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from run_fixtures import SOURCE, TARGET, write_documents, write_world

import elo
from elo.data.tokenizer import load_tokenizer
from elo.run import run

PACKAGE = Path(elo.__file__).parent
MARK = "zqj vkw xpf"
AT_MOST = 12


def test_a_document_passes_few_files_on_its_way_to_the_loss(tmp_path):
    config = write_world(tmp_path)
    corpus = tmp_path / "xx.jsonl"
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    corpus.write_text("".join(json.dumps({"text": f"{text} {MARK}"}) + "\n" for text in texts))
    # Measurements read other text, which is not counted.
    for language, words in (("xx", TARGET), ("en", SOURCE)):
        heldout = write_documents(tmp_path / f"{language}_heldout.jsonl", words, 4, 3)
        config["data"].setdefault("heldout", {})[language] = str(heldout)
    config["data"]["validation_share"] = 0
    config |= {"method": "full", "tokens": 256}
    found = _files_that_hold(load_tokenizer(tmp_path / "base").encode(MARK)[2:], lambda: run(config, until="full"))
    assert {"data/sources.py", "data/tokenizing.py", "data/packing.py", "train/loop.py", "train/loss.py"} <= found
    assert len(found) <= AT_MOST, sorted(found)


def _files_that_hold(ids: list[int], work: Any) -> set[str]:
    """Files with a function that had the text, or these token ids in a row, in an argument, a variable or a result."""
    wanted, found, looking = np.array(ids), set[str](), False

    def holds(value: Any, depth: int = 0) -> bool:
        if isinstance(value, str | bytes):
            return (MARK if isinstance(value, str) else MARK.encode()) in value
        if isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.dtype == torch.int64:
            value = value.numpy()
        if isinstance(value, np.ndarray):
            if value.dtype.kind not in "iu" or value.size < len(wanted):
                return False
            windows = np.lib.stride_tricks.sliding_window_view(value.ravel(), len(wanted))
            return bool((windows == wanted).all(1).any())
        if isinstance(value, dict):
            value = list(value.values())
        return isinstance(value, list | tuple) and depth < 3 and any(holds(each, depth + 1) for each in value)

    def watch(frame: Any, event: str, argument: Any) -> None:
        nonlocal looking
        name = frame.f_code.co_filename
        if looking or event != "return" or not name.startswith(str(PACKAGE)):
            return
        looking = True
        try:
            if holds(argument) or any(map(holds, list(frame.f_locals.values()))):
                found.add(Path(name).relative_to(PACKAGE).as_posix())
        finally:
            looking = False

    threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return found

"""Few threads for every test: tiny models gain nothing from more. And cheap garbage collection."""

import gc
import os
import tempfile

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
_cache = tempfile.TemporaryDirectory(prefix="elo-tests-")
os.environ["ELO_CACHE"] = _cache.name


@pytest.fixture(autouse=True, scope="module")
def _modules_are_not_looked_through_for_garbage():
    """A collection takes 0.3 s once torch and transformers are imported, and each stage of a run begins with one."""
    gc.collect()
    gc.freeze()

"""What all tests run with: few threads, since tiny models gain nothing from more, and no GPU."""

import gc
import os
import tempfile

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Children are forked, which CUDA does not survive. ELO_TEST_CUDA=1 is for the tests that fork nothing.
if "ELO_TEST_CUDA" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
_cache = tempfile.TemporaryDirectory(prefix="elo-tests-")
os.environ["ELO_CACHE"] = _cache.name


@pytest.fixture(autouse=True, scope="module")
def _modules_are_not_looked_through_for_garbage():
    """A collection takes 0.3 s once torch and transformers are imported, and each stage of a run begins with one."""
    gc.collect()
    gc.freeze()

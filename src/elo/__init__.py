"""ELO: teach an existing Hugging Face causal LM a new language by training a few detached layers.

The functions behind the command line are in `elo.api`.
"""

from elo.errors import EloError

__version__ = "0.2.0"
__all__ = ["EloError", "__version__"]

"""ELO: teach an existing Hugging Face causal LM a new language by training a few detached layers."""

__version__ = "0.1.0"

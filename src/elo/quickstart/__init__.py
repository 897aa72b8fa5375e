"""The quickstart's instrument: a small world told in two languages, and a small base model that speaks one."""

from pathlib import Path

# A Hugging Face checkpoint with its tokenizer, made by examples/tavuni/train_quickstart_base.py.
BASE = Path(__file__).with_name("base")

"""The quickstart: a small bilingual corpus, and a small base model trained on one of its languages."""

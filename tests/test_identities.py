"""Identities of inputs: a changed file changes them, so that the stages that read it are repeated."""

from pathlib import Path

from elo.identities import tokenizer_identity


def test_a_tokenizer_without_tokenizer_json_is_identified_by_its_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("a b")
    before = tokenizer_identity(str(tmp_path))
    (tmp_path / "merges.txt").write_text("a b\nb c")
    assert tokenizer_identity(str(tmp_path)) != before
    (tmp_path / "tokenizer.json").write_text("{}")
    whole = tokenizer_identity(str(tmp_path))
    (tmp_path / "merges.txt").write_text("unused")
    assert tokenizer_identity(str(tmp_path)) == whole
    assert tokenizer_identity("owner/name") == "owner/name"

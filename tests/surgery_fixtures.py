"""Small checkpoints on disk for the tests of detaching and attaching."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase
from vocabulary_fixtures import ENGLISH, KOREAN, texts, tokenizer_of, write_texts
from zoo import tiny_model

from elo.vocab.vocabulary import extend_vocabulary


def llama(layers: int = 4, tied: bool = False, seed: int = 0, **particular: Any) -> PreTrainedModel:
    """A Llama of width 32."""
    config = LlamaConfig(
        vocab_size=particular.pop("vocab_size", 64),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        **particular,
    )
    return tiny_model(config, seed)


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint folder by its name in the files."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def store(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a folder's model.safetensors."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of a folder's config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text())
    config |= changes
    kept = {key: value for key, value in config.items() if key not in changes or value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def changed(model: PreTrainedModel, folder: Path, seed: int) -> Path:
    """Save a model whose every weight was changed a little."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, dtype=parameter.dtype)
    model.save_pretrained(folder)
    return folder


def three(folder: Path, dtype: torch.dtype = torch.float32, **arguments: Any) -> tuple[Path, Path, Path]:
    """Folders of an adapted model, its base and a chat model of it."""
    llama(**arguments).to(dtype).save_pretrained(folder / "base")
    adapted = changed(llama(**arguments).to(dtype), folder / "adapted", 1)
    return adapted, folder / "base", changed(llama(**arguments).to(dtype), folder / "chat", 2)


def resized(folder: Path, rows: int, seed: int = 4, **arguments: Any) -> Path:
    """Save a changed model with this number of embedding rows."""
    model = llama(**arguments)
    model.resize_token_embeddings(rows, mean_resizing=False)
    return changed(model, folder, seed)


def tokenized(root: Path, *names: str) -> PreTrainedTokenizerBase:
    """Save models with Qwen's kind of tokenizer, text of two languages, and `adapted` with new pieces as `extended`."""
    tokenizer = tokenizer_of("qwen")
    model = llama()
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for name in names:
        changed(model, root / name, 1)
        tokenizer.save_pretrained(root / name)
    ko, en = (
        write_texts(root / f"{name}.jsonl", texts(words, 60, 0)) for name, words in (("ko", KOREAN), ("en", ENGLISH))
    )
    extend_vocabulary(root / "adapted", ko, en, output=root / "extended", pieces=30, pad_to_multiple_of=8)
    return tokenizer

"""Pretrain a small Llama from nothing, to serve as the base model of an experiment.

A base that really speaks its source language is the instrument every comparison needs, and no model hub is assumed
to be in reach. The loop is bare PyTorch on purpose: it depends on nothing of ELO's, so that a mistake in ELO cannot
hide in the base it is measured on.

    python examples/tavuni/train_base.py --corpus en=en_wiki.jsonl.gz --corpus ko=ko_wiki.jsonl.gz --share ko=0.05 \
        --tokens 8e6 --output base-en
"""

import argparse
import copy
import gzip
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
# Qwen's and GPT-4's split: contractions, words with their leading space, digits one by one, punctuation, white space.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_documents(path: Path) -> Iterator[str]:
    """Yield the `text` of each JSON line of `path` (.jsonl or .jsonl.gz)."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def train_tokenizer(corpora: dict[str, Path], characters: dict[str, int], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the first `characters[language]` characters of each language."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()

    def texts() -> Iterator[str]:
        for language, path in corpora.items():
            left = characters[language]
            for document in read_documents(path):
                yield document[:left]
                left -= len(document)
                if left <= 0:
                    break

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def token_stream(path: Path, tokenizer: PreTrainedTokenizerFast, count: int) -> np.ndarray:
    """Token ids (int32, at least `count` where the corpus has them) of documents, each led by end-of-text."""
    pieces: list[list[int]] = []
    have = 0
    batch: list[str] = []
    for document in read_documents(path):
        batch.append(document)
        if len(batch) == 256:
            ids = tokenizer(batch, add_special_tokens=False)["input_ids"]
            pieces += [[tokenizer.eos_token_id, *row] for row in ids]
            have += sum(len(row) + 1 for row in ids)
            batch = []
            if have >= count:
                break
    if batch and have < count:
        pieces += [[tokenizer.eos_token_id, *row] for row in tokenizer(batch, add_special_tokens=False)["input_ids"]]
    return np.concatenate([np.asarray(row, dtype=np.int32) for row in pieces])


def fresh_config(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The config of a model that begins from nothing."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size or args.hidden_size * 8 // 3 // 32 * 32,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        max_position_embeddings=2048,
        tie_word_embeddings=args.tie,
        initializer_range=args.init,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )


def stacked(folder: Path, layers: int) -> LlamaForCausalLM:
    """A deeper model of a trained one: its layers, repeated in order (G_stack, Du et al. 2024, arXiv 2405.15319)."""
    small = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    depth = small.config.num_hidden_layers
    config = copy.deepcopy(small.config)
    config.num_hidden_layers = layers
    config.layer_types = None
    config.dtype = torch.float32
    deep = LlamaForCausalLM(config)
    deep.model.embed_tokens.load_state_dict(small.model.embed_tokens.state_dict())
    deep.model.norm.load_state_dict(small.model.norm.state_dict())
    deep.lm_head.load_state_dict(small.lm_head.state_dict())
    for index, layer in enumerate(deep.model.layers):
        layer.load_state_dict(small.model.layers[index % depth].state_dict())
    return deep


def schedule(progress: float, peak: float) -> float:
    """Learning rate at `progress` in [0, 1]: 2 % warm-up, constant, linear decay over the last 30 % to 5 %."""
    if progress < 0.02:
        return peak * max(progress / 0.02, 0.01)
    if progress < 0.7:
        return peak
    return peak * (0.05 + 0.95 * (1 - progress) / 0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", action="append", required=True, help="LANGUAGE=FILE; the first is the main one")
    parser.add_argument("--share", action="append", default=[], help="LANGUAGE=share of tokens, for all but the first")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokens", type=float, default=8e6)
    parser.add_argument("--minutes", type=float, default=1e9, help="end (decayed) after this wall time at the latest")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--intermediate-size", type=int, help="default: 8/3 of the hidden size, in 32s")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--tie", action="store_true", help="tie the LM head to the embedding")
    parser.add_argument(
        "--stack",
        type=Path,
        help="begin from this shallower Llama instead, its layers one copy after the other up to --layers, with its "
        "tokenizer; the other options of size do not count",
    )
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument(
        "--init", type=float, default=0.02, help="standard deviation of initial weights; narrow models want more"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--no-bf16", action="store_true")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    corpora = {name: Path(path) for name, path in (pair.split("=", 1) for pair in args.corpus)}
    shares = {name: float(share) for name, share in (pair.split("=", 1) for pair in args.share)}
    main_language = next(iter(corpora))
    shares[main_language] = 1 - sum(shares.values())

    if args.stack:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.stack)
    else:
        tokenizer = train_tokenizer(
            corpora, {name: max(int(2e7 * share), 100_000) for name, share in shares.items()}, args.vocab_size
        )
    streams = {
        name: token_stream(path, tokenizer, int(args.tokens * shares[name] * 1.02)) for name, path in corpora.items()
    }
    rows = []
    for stream in streams.values():
        whole = len(stream) // args.sequence_length
        rows.append(stream[: whole * args.sequence_length].reshape(whole, args.sequence_length))
    available = {name: len(stream) for name, stream in streams.items()}
    data = np.concatenate(rows)
    print(f"tokens {available}, {len(data)} rows of {args.sequence_length}", flush=True)

    model = stacked(args.stack, args.layers) if args.stack else LlamaForCausalLM(fresh_config(args, tokenizer))
    print(f"parameters {sum(p.numel() for p in model.parameters()):,}", flush=True)
    forward = model if args.no_compile else torch.compile(model)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)

    generator = np.random.default_rng(args.seed)
    order = generator.permutation(len(data))
    start = time.time()
    seen = step = 0
    while True:
        progress = max(seen / args.tokens, (time.time() - start) / 60 / args.minutes)
        if progress >= 1:
            break
        picked = order[np.arange(step * args.batch, (step + 1) * args.batch) % len(order)]
        ids = torch.from_numpy(data[picked]).long()
        for group in optimizer.param_groups:
            group["lr"] = schedule(progress, args.learning_rate)
        with torch.autocast("cpu", torch.bfloat16, enabled=not args.no_bf16):
            loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen += ids.numel()
        step += 1
        if step % 20 == 0:
            rate = seen / (time.time() - start)
            print(f"{seen / 1e6:.2f} M tokens  loss {loss.item():.3f}  {rate:,.0f} tokens/s", flush=True)

    model.bfloat16().save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"{args.output}: {seen / 1e6:.2f} M tokens in {(time.time() - start) / 60:.1f} min", flush=True)


if __name__ == "__main__":
    main()

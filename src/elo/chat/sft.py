"""Supervised fine-tuning (SFT) on conversations with ELO's training loop, and a loss on the answers only."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from elo.chat.sequences import ChatSequences
from elo.checkpoint.counting import read_config
from elo.data.chat_template import ChatExample, ChatFormat
from elo.data.conversations import read_conversations
from elo.data.tokenizer import TOKENIZER_FILES
from elo.errors import EloError
from elo.evaluate.scoring import keeps_apart
from elo.methods import Method, Setup
from elo.surgery.equivalence import build_hollow_causal_lm
from elo.train.arguments import sequences_per_step
from elo.train.attention import separates_documents
from elo.train.phase import train_checkpoint
from elo.train.settings import TrainingSettings

TRAINING_FILES, HELDOUT_FILES = "train-{}.jsonl", "heldout-{}.jsonl"
TEMPLATE_FILE = "chat_template.jinja"


def fine_tune(
    checkpoint: Path,
    output: Path,
    *,
    data: Path,
    method: Method,
    epochs: int,
    sequence_length: int,
    packing: bool,
    settings: TrainingSettings,
    tokenizer: str,
    seed: int,
    say: Callable[[str], None],
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Train the checkpoint on conversations and write a chat model.

    Args:
        data: folder with the training conversations by language and the chat template.
        method: what trains; its first phase is used.
        packing: pack conversations where the architecture keeps them apart.
        tokenizer: folder or hub id of the checkpoint's tokenizer.
        say: function that shows the user a line.

    Returns:
        The record of the training, with counts of conversations and answer tokens.

    Raises:
        EloError: no conversation fits into `sequence_length`, or training fails.
    """
    chat = ChatFormat.load(tokenizer, str(data / TEMPLATE_FILE), trust_remote_code)
    examples: list[ChatExample] = []
    left_out = 0
    for path in sorted(data.glob(TRAINING_FILES.format("*"))):
        for conversation in read_conversations(path):
            made = chat.examples(conversation)
            fitting = [each for each in made if len(each.ids) <= sequence_length]
            left_out += len(made) - len(fitting)
            examples += fitting
    if not examples:
        raise EloError(
            f"chat.sequence_length: no conversation fits into {sequence_length} tokens; write a larger number"
        )
    model_config = read_config(str(checkpoint), trust_remote_code=trust_remote_code)
    hollow = build_hollow_causal_lm(model_config, trust_remote_code=trust_remote_code)
    packing = packing and keeps_apart(hollow, sequence_length) and separates_documents(hollow)
    rows = ChatSequences(
        examples,
        sequence_length=sequence_length,
        packing=packing,
        epochs=epochs,
        multiple=sequences_per_step(sequence_length, settings),
        seed=seed,
    )
    answers = sum(each.answer_tokens for each in examples)
    note = f"; {left_out:,} longer than {sequence_length:,} tokens are left out" if left_out else ""
    say(f"sft: {len(examples):,} conversations with {answers:,} answer tokens, {len(rows):,} sequences{note}")
    phase = method.phases[0]
    record = train_checkpoint(
        checkpoint,
        output,
        rows=rows,
        prepare=lambda model: method.prepare(model, phase, Setup(seed=seed)),
        seed=seed,
        settings=settings,
        scratch=output.with_name(f"{output.name}-checkpoints"),
        finish=lambda folder: _finish(folder, chat, model_config),
        trust_remote_code=trust_remote_code,
        label="sft",
    )
    return record | {
        "conversations": len(examples),
        "conversations_left_out": left_out,
        "answer_tokens": answers,
        "packing": packing,
        "padding": 1 - rows.tokens_used / (len(rows) * sequence_length),
    }


def _finish(folder: Path, chat: ChatFormat, config: PreTrainedConfig) -> None:
    """Write the tokenizer, if the checkpoint has none, the chat template, and generation settings that end a turn."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        chat.settings.save_pretrained(folder)
    (folder / TEMPLATE_FILE).write_text(chat.template, encoding="utf-8")
    path = folder / "generation_config.json"
    if not path.exists():
        GenerationConfig.from_model_config(config).save_pretrained(folder)
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings.pop("_from_model_config", None)  # they are no longer what config.json implies
    own = settings.get("eos_token_id")
    before = own if isinstance(own, list) else [own] if own is not None else []
    settings["eos_token_id"] = list(dict.fromkeys([*before, chat.end_of_turn]))
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

"""The stages of the section `chat`: conversations, chat vector, supervised fine-tuning.

Each writes its output to a path and returns a JSON record; `RunFolder.once` skips finished ones.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from elo.chat.chat_vector import chat_vector, check_chat_vector
from elo.chat.sft import HELDOUT_FILES, TEMPLATE_FILE, TRAINING_FILES, fine_tune
from elo.checkpoint.counting import read_decoder_config
from elo.config import ChatConfig
from elo.data.chat_template import TEMPLATES, ChatFormat
from elo.data.conversations import Conversation, read_conversations, write_conversations
from elo.data.language import require_identifier
from elo.data.packing import shuffled
from elo.data.tokenizer import load_tokenizer
from elo.detach_attach import resolve_checkpoint
from elo.errors import EloError
from elo.evaluate.chat import Chat
from elo.identities import checkpoint_identity, tokenizer_identity
from elo.methods.base import check_supervision
from elo.stages import checked, measured
from elo.store.files import atomic_directory
from elo.store.run_folder import Artifact, RunFolder, file_identity
from elo.train.arguments import check_settings

_HELD_OUT = 0x5F7  # number of the shuffle that chooses held-out conversations; passes of training count from 0


@dataclass(frozen=True)
class ChatInputs:
    """The checked inputs of the chat stages.

    Attributes:
        base: base of the chat model; None if there is no chat model.
        model: chat model whose change is added; None adds none.
        tokenizer: folder or hub id of the tokenizer for conversations before the first stage.
        conversations: folder with training and held-out conversations by language, and the chat template.
        fits_base: whether the model that is adapted has a row for every token of `tokenizer`.
    """

    config: ChatConfig
    folder: RunFolder
    base: Artifact | None
    model: Artifact | None
    tokenizer: str
    conversations: Artifact
    fits_base: bool
    seed: int
    trust_remote_code: bool

    def measure_base(self) -> Chat | None:
        """Return the measure for models before the chat stages; None if they cannot read the chat model's tokens."""
        return self.measure(self.tokenizer) if self.fits_base else None

    def measure(self, tokenizer: str | Path) -> Chat | None:
        """Return the measure on the held-out conversations; None if there are none."""
        languages = list(dict.fromkeys((*self.config.data, *self.config.heldout)))
        if not languages:
            return None
        path = self.conversations.path
        return Chat(
            data={language: str(path / HELDOUT_FILES.format(language)) for language in languages},
            template=str(path / TEMPLATE_FILE),
            tokenizer=str(tokenizer),
            prompts=self.config.prompts,
            max_new_tokens=self.config.max_new_tokens,
        )


def open_chat(
    config: ChatConfig, folder: RunFolder, *, model: Path, tokenizer: str, seed: int, trust_remote_code: bool
) -> ChatInputs:
    """Check everything that the chat stages need, and divide the conversations, before anything is trained.

    Args:
        model: checkpoint that is adapted.
        tokenizer: folder or hub id of its tokenizer.

    Raises:
        EloError: a file, a template or a model cannot be used.
    """
    base = chat = None
    if config.model is not None:
        chats = resolve_checkpoint(config.model, trust_remote_code=trust_remote_code)
        bases = resolve_checkpoint(config.base, trust_remote_code=trust_remote_code) if config.base else model
        check_chat_vector(model, bases, chats, trust_remote_code=trust_remote_code)
        base, chat = (Artifact(each, checkpoint_identity(each)) for each in (bases, chats))
        tokenizer = str(chats)
    decoder = read_decoder_config(model, trust_remote_code=trust_remote_code)
    if config.data:
        _check_training(config, decoder, model)
    if config.data or config.heldout:
        require_identifier("chat")
    files = {Path(path) for paths in config.data.values() for path in paths} | set(map(Path, config.heldout.values()))
    if config.template is None:
        files.add(Path(tokenizer) / TEMPLATE_FILE)
    elif config.template not in TEMPLATES:
        files.add(Path(config.template))
    stage = folder.once(
        "conversations",
        _divide,
        data=config.data,
        heldout=config.heldout,
        heldout_share=config.heldout_share,
        template=config.template,
        tokenizer_identity=tokenizer_identity(tokenizer),
        files={str(path): file_identity(path) if path.exists() else None for path in sorted(files)},
        seed=seed,
        execution={"tokenizer": tokenizer, "trust_remote_code": trust_remote_code},
    )
    for language, count in stage.record["conversations"].items():
        if copies := count.get("also_in_training"):
            folder.say(
                f"warning: chat.heldout.{language}: {copies} of {count['heldout']} held-out conversations are also in "
                "chat.data, so their measured loss is too low"
            )
    fits = load_tokenizer(tokenizer, trust_remote_code=trust_remote_code).vocab_size <= decoder.vocab_size
    return ChatInputs(config, folder, base, chat, tokenizer, stage, fits, seed, trust_remote_code)


def chat_models(inputs: ChatInputs, adapted: Artifact, adapted_tokenizer: str) -> Iterator[tuple[str, Artifact]]:
    """Run the stages one by one, and yield each one's name and chat model.

    Args:
        adapted: model that the first stage starts from.
        adapted_tokenizer: folder or hub id of its tokenizer.
    """
    config, folder, trust = inputs.config, inputs.folder, {"trust_remote_code": inputs.trust_remote_code}
    model, tokenizer = adapted, adapted_tokenizer
    if inputs.model is not None:
        model = folder.once(
            "chat_vector",
            _add_chat_vector,
            adapted=model,
            base=inputs.base,
            chat=inputs.model,
            scale=config.scale,
            leave_out=config.leave_out,
            template=(inputs.conversations.path / TEMPLATE_FILE).read_text("utf-8") if config.template else None,
            execution=trust,
        )
        tokenizer = str(model.path)
        yield "chat_vector", model
    if config.data:
        yield (
            "sft",
            folder.once(
                "sft",
                _fine_tune,
                collective=True,
                checkpoint=model,
                conversations=inputs.conversations,
                method=config.method,
                epochs=config.epochs,
                sequence_length=config.sequence_length,
                packing=config.packing,
                settings=config.settings,
                seed=inputs.seed,
                execution={"tokenizer": tokenizer, "say": folder.say, **trust},
            ),
        )


def _divide(
    output: Path,
    *,
    data: dict[str, list[str]],
    heldout: dict[str, str],
    heldout_share: float,
    template: str | None,
    tokenizer_identity: Any,
    files: Any,
    seed: int,
    tokenizer: str,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Read and check all conversations, lay each one out once, and write training and held-out files by language.

    Args:
        tokenizer_identity, files: identities of the files that are read.
    """
    chat = ChatFormat.load(tokenizer, template, trust_remote_code)
    counts = {}
    with atomic_directory(output, overwrite=True) as folder:
        for language in dict.fromkeys((*data, *heldout)):
            train = [each for path in data.get(language, ()) for each in read_conversations(path)]
            if language in heldout:
                held = read_conversations(heldout[language])
            else:
                train, held = _hold_out(train, heldout_share, seed, language)
            for conversation in (*train, *held):
                chat.examples(conversation)
            if train:
                write_conversations(folder / TRAINING_FILES.format(language), train)
            write_conversations(folder / HELDOUT_FILES.format(language), held)
            counts[language] = {
                "training": len(train),
                "heldout": len(held),
                "also_in_training": len(held) - len(_without(held, train)),
            }
        (folder / TEMPLATE_FILE).write_text(chat.template, encoding="utf-8")
    return {"conversations": counts}


def _hold_out(
    conversations: list[Conversation], share: float, seed: int, language: str
) -> tuple[list[Conversation], list[Conversation]]:
    if len(conversations) < 2:
        raise EloError(f"chat.data.{language}: {conversations[0].where}: is the only conversation; give at least two")
    count = max(1, round(share * len(conversations)))
    chosen = set(shuffled(len(conversations), seed, _HELD_OUT)[:count].tolist())
    held = [each for index, each in enumerate(conversations) if index in chosen]
    train = _without(conversations, held)
    if not train:
        raise EloError(f"chat.data.{language}: {held[0].where}: all conversations are the same; give different ones")
    return train, held


def _without(conversations: list[Conversation], others: list[Conversation]) -> list[Conversation]:
    """Return the conversations whose messages differ from those of all `others`."""
    known = {json.dumps(each.messages) for each in others}
    return [each for each in conversations if json.dumps(each.messages) not in known]


def _check_training(config: ChatConfig, decoder: PretrainedConfig, model: Path) -> None:
    """Raise EloError if the model cannot be fine-tuned with these settings."""
    length, limit = config.sequence_length, getattr(decoder, "max_position_embeddings", None)
    if isinstance(limit, int) and length > limit > 0:
        raise EloError(f"chat.sequence_length: got {length}, but {model} has {limit} positions; write at most {limit}")
    check_settings(config.settings, length, "chat.training")
    try:
        check_supervision(config.method.phases[0], config.settings, (), decoder.num_hidden_layers)
    except EloError as error:
        raise EloError(f"chat.{error}") from None


@measured
def _add_chat_vector(
    output: Path,
    *,
    adapted: Artifact,
    base: Artifact,
    chat: Artifact,
    scale: float,
    leave_out: tuple[str, ...],
    template: str | None,
    trust_remote_code: bool,
) -> dict[str, Any]:
    record = chat_vector(
        adapted.path,
        base.path,
        chat.path,
        output=output,
        scale=scale,
        leave_out=leave_out,
        with_card=False,
        overwrite=True,
        trust_remote_code=trust_remote_code,
    )
    if template is not None:
        (output / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    return record


@checked("checkpoint", collective=True)
def _fine_tune(
    output: Path,
    *,
    checkpoint: Artifact,
    conversations: Artifact,
    **settings: Any,
) -> dict[str, Any]:
    return fine_tune(checkpoint.path, output, data=conversations.path, **settings)

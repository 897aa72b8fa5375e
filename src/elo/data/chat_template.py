"""Lay out conversations with a chat template, and find the tokens that the assistant writes.

Answers are found by rendering a conversation twice: up to an answer, with the generation prompt, and up to the end of
the answer. The first text must be a prefix of the second. This works with and without `{% generation %}` marks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.processors import Sequence as ProcessorSequence

from elo.data.conversations import Conversation, Message
from elo.data.packing import IGNORE_INDEX
from elo.data.tokenizer import TextTokenizer, load_with_settings
from elo.errors import EloError, error_line

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "plain": (
        "{{ bos_token if bos_token else '' }}{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}Assistant: {{ message['content'] }}{{ eos_token }}\n"
        "{% else %}{{ message['role'].capitalize() }}: {{ message['content'] }}\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
}
"""Templates by name. `chatml` needs its two tokens in the vocabulary; `plain` works with every end-of-text token."""


@dataclass(frozen=True)
class ChatExample:
    """A conversation as tokens.

    Attributes:
        ids: tokens, int64 [T].
        labels: next token at each position if the assistant writes it, otherwise IGNORE_INDEX, int64 [T].
    """

    ids: np.ndarray
    labels: np.ndarray

    @property
    def answer_tokens(self) -> int:
        """Number of tokens that the assistant writes, ends of turns included."""
        return int((self.labels != IGNORE_INDEX).sum())


@dataclass(frozen=True, eq=False)
class ChatFormat:
    """A tokenizer with a chat template.

    Attributes:
        name: name of the tokenizer, for messages.
        settings: transformers' tokenizer, which renders the template.
        tokenizer: the same tokenizer, which encodes the rendered text.
        template: Jinja source.
    """

    name: str
    settings: Any
    tokenizer: TextTokenizer
    template: str

    @classmethod
    def load(cls, tokenizer: str | Path, template: str | None, trust_remote_code: bool = False) -> "ChatFormat":
        """Load a tokenizer with its own chat template, or with `template`: a file, or a name in `TEMPLATES`.

        Raises:
            EloError: there is no template, or the file cannot be read.
        """
        settings, text_tokenizer = load_with_settings(tokenizer, trust_remote_code)
        return cls(str(tokenizer), settings, text_tokenizer, _source(settings, template, str(tokenizer)))

    @cached_property
    def end_of_turn(self) -> int:
        """Token that ends an answer: the last special token of a rendered answer.

        Raises:
            EloError: the template ends answers without a special token, so generation would not stop.
        """
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
        prompt = self._render(messages[:1], self.name, generation_prompt=True)
        answer = self._render(messages, self.name)[len(prompt) :]
        ends = [token for token in self._encode(answer)[0] if token in self._special]
        if not ends:
            raise EloError(
                f"{self.name}: the chat template ends an answer with {answer[-30:]!r}, which holds no special token of "
                "this tokenizer, so generation would not stop; give another template, such as plain"
            )
        return ends[-1]

    @property
    def stops(self) -> tuple[int, ...]:
        """Tokens at which generation stops: the end of a turn, and the tokenizer's end of text."""
        return tuple(dict.fromkeys((self.end_of_turn, self.tokenizer.eos_token_id)))

    def ended(self, answer: Sequence[int]) -> bool:
        """Return whether generated tokens end the turn and contain no other special token."""
        return answer[-1] == self.end_of_turn and not self._special & set(answer[:-1])

    def prompt(self, messages: Sequence[Message], where: str) -> list[int]:
        """Return the tokens after which the assistant writes its next answer."""
        return self._encode(self._render(messages, where, generation_prompt=True))[0]

    def examples(self, conversation: Conversation) -> list[ChatExample]:
        """Return a conversation as one example, or one per answer if later turns change how earlier ones are rendered.

        Raises:
            EloError: the template rejects the conversation, does not begin an answer with its generation prompt, or
                does not end each answer with exactly one end-of-turn token.
        """
        messages, where = conversation.messages, conversation.where
        text = self._render(messages, where)
        spans, texts = [], []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:index], where, generation_prompt=True)
            written = self._render(messages[: index + 1], where)
            if not written.startswith(prompt):
                raise EloError(
                    f"{where}: the chat template of {self.name} does not begin an answer with its generation prompt, "
                    f"which ends in {prompt[-40:]!r}; give another template"
                )
            spans.append((len(prompt), len(written)))
            texts.append(written)
        if all(text.startswith(written) for written in texts):
            return [self._example(text, spans, where)]
        return [self._example(written, [span], where) for written, span in zip(texts, spans, strict=True)]

    def _example(self, text: str, spans: Sequence[tuple[int, int]], where: str) -> ChatExample:
        ids, offsets = self._encode(text)
        written = np.zeros(len(ids), np.bool_)
        for start, stop in spans:
            inside = [index for index, (begin, end) in enumerate(offsets) if start <= begin and end <= stop]
            ends = [index for index in inside if ids[index] == self.end_of_turn]
            if len(ends) != 1:
                raise EloError(
                    f"{where}: an answer has {len(ends)} end-of-turn tokens "
                    f"{self.tokenizer.backend.id_to_token(self.end_of_turn)!r}; remove this token from the text, or "
                    "give a template that ends each answer with it"
                )
            written[[index for index in inside if index <= ends[0]]] = True
        tokens = np.array(ids, np.int64)
        labels = np.where(written, tokens, IGNORE_INDEX)
        return ChatExample(tokens[:-1], labels[1:])

    @cached_property
    def _special(self) -> set[int]:
        ids = (self.tokenizer.backend.token_to_id(token) for token in self.tokenizer.special_tokens)
        return {each for each in ids if each is not None}

    @cached_property
    def _encoder(self) -> Tokenizer:
        encoder = Tokenizer.from_str(self.tokenizer.backend.to_str())
        encoder.post_processor = ProcessorSequence([])  # ByteLevel's would trim spaces from the offsets
        return encoder

    def _encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self._encoder.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def _render(self, messages: Sequence[Message], where: str, *, generation_prompt: bool = False) -> str:
        try:
            text = self.settings.apply_chat_template(
                list(messages),
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=generation_prompt,
            )
        except Exception as error:  # a template can raise any type
            raise EloError(
                f"{where}: the chat template of {self.name} rejects the conversation ({error_line(error)}); change the "
                "conversation, or give another template"
            ) from None
        return str(text)


def _source(settings: Any, given: str | None, name: str) -> str:
    if given in TEMPLATES:
        return TEMPLATES[given]
    if given is not None:
        try:
            return Path(given).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise EloError(
                f"template: {given}: cannot be read; give a Jinja file in UTF-8, or one of {', '.join(TEMPLATES)}"
            ) from None
    own = settings.chat_template
    if isinstance(own, dict):  # several by name
        own = own.get("default")
    if not own:
        raise EloError(
            f"{name}: its tokenizer has no chat template; give a template: a Jinja file, or one of "
            f"{', '.join(TEMPLATES)}"
        )
    return str(own)

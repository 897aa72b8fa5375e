"""Chat ability on held-out conversations: whether answers end, their language, and the loss on the true answers.

- chat_ended: share of generated answers that end with the end-of-turn token, hold text and no other special token.
- chat_language: share of generated answers in the language of the conversation, by py3langid (extra `chat`). The
  subset `reference` is the same share of the true answers: the most that can be expected.
- chat_nats: nats per token of the true answers, ends of turns included.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import ClassVar

from pydantic import Field

from elo.data.chat_template import TEMPLATES, ChatFormat
from elo.data.conversations import Conversation, read_conversations
from elo.data.language import is_identifiable, is_in, require_identifier
from elo.errors import EloError
from elo.evaluate.base import Measure, MeasureValue, Outcome, Subject, ratio_error, register, share_error
from elo.evaluate.scoring import check_ids, evaluating, longest_sequence, summed_nats
from elo.evaluate.writing import BATCH_SIZE, write_greedily
from elo.log import Progress


@register
class Chat(Measure):
    """Measure answers to held-out conversations: end of turn, language (extra `chat`), and loss on the true answers."""

    name: ClassVar[str] = "chat"

    data: dict[str, str] = Field(min_length=1)
    """File of held-out conversations (.jsonl) by language. The language of answers is measured if the key is an
    ISO 639-1 code, such as ko."""
    template: str | None = None
    """Chat template: a Jinja file, `chatml` or `plain`; null is the tokenizer's own."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer for the conversations; null is the model's."""
    prompts: int = Field(32, ge=1)
    """Number of conversations per language whose last answer is generated, greedily."""
    max_new_tokens: int = Field(128, ge=1)
    """Maximum length of a generated answer, in tokens."""

    @cached_property
    def conversations(self) -> dict[str, list[Conversation]]:
        """Conversations by language; files are read once."""
        return {language: read_conversations(path) for language, path in self.data.items()}

    def files(self) -> list[Path]:
        template = [] if self.template in (None, *TEMPLATES) else [Path(str(self.template))]
        return [*map(Path, self.data.values()), *template]

    def check(self, where: str) -> None:
        require_identifier(where)
        assert self.conversations

    def measure(self, subject: Subject) -> Outcome:
        source = self.tokenizer or subject.tokenizer_source
        if not isinstance(source, str | Path):
            raise EloError("chat: a tokenizer in memory has no chat template; give the folder of a tokenizer")
        chat = ChatFormat.load(source, self.template, subject.trust_remote_code)
        values, answers = [], []
        for language, conversations in self.conversations.items():
            values += self._loss(subject, chat, language, conversations)
            asked = self._asked(subject, chat, conversations)
            written = write_greedily(
                subject.model,
                [prompt for _, prompt in asked],
                stops=chat.stops,
                max_new_tokens=self.max_new_tokens,
                batch_size=subject.batch_size or BATCH_SIZE,
                progress=f"chat {language}: answers" if subject.progress else None,
                unit="answers",
            )
            texts = [chat.tokenizer.backend.decode(ids, skip_special_tokens=True).strip() for ids in written]
            ended = [chat.ended(ids) and bool(text) for ids, text in zip(written, texts, strict=True)]
            values.append(_share("chat_ended", "all", language, ended))
            if is_identifiable(language):
                values.append(_share("chat_language", "all", language, [is_in(language, text) for text in texts]))
                true = [is_in(language, each.messages[-1]["content"]) for each, _ in asked]
                values.append(_share("chat_language", "reference", language, true))
            answers += [
                {"language": language, "prompt": each.messages[-2]["content"], "text": text, "ended": end}
                for (each, _), text, end in zip(asked, texts, ended, strict=True)
            ]
        return Outcome(values, {"answers": answers})

    def _asked(
        self, subject: Subject, chat: ChatFormat, conversations: Sequence[Conversation]
    ) -> list[tuple[Conversation, list[int]]]:
        """Return the first conversations whose prompt leaves room for an answer, and their prompts as token ids."""
        limit = longest_sequence(subject.model)
        found = []
        for each in conversations:
            prompt = chat.prompt(each.messages[:-1], each.where)
            check_ids(max(prompt), subject.model, "chat")
            if limit is None or len(prompt) + self.max_new_tokens <= limit:
                found.append((each, prompt))
            if len(found) == self.prompts:
                break
        if not found:
            raise EloError(
                f"chat: no conversation leaves room for an answer of {self.max_new_tokens} tokens in the model's "
                f"{limit} positions; lower max_new_tokens"
            )
        return found

    def _loss(
        self, subject: Subject, chat: ChatFormat, language: str, conversations: Sequence[Conversation]
    ) -> list[MeasureValue]:
        limit = longest_sequence(subject.model)
        examples = [example for each in conversations for example in chat.examples(each)]
        examples = [each for each in examples if limit is None or len(each.ids) <= limit]
        if not examples:
            return []
        model = subject.model
        check_ids(max(int(each.ids.max()) for each in examples), model, "chat")
        label = f"chat {language}: true answers" if subject.progress else None
        with evaluating(model) as place, Progress(len(examples), label, "conversations") as bar:
            rows = [(each.ids, each.labels) for each in examples]
            nats = summed_nats(model, rows, place, bar, subject.batch_size)
        tokens = [each.answer_tokens for each in examples]
        return [
            MeasureValue(
                measure="chat_nats",
                language=language,
                value=sum(nats) / sum(tokens),
                unit="number",
                higher_is_better=False,
                standard_error=ratio_error(nats, tokens),
                items=len(examples),
            )
        ]


def _share(measure: str, name: str, language: str, hits: Sequence[bool]) -> MeasureValue:
    share = fmean(hits)
    error = share_error(share, len(hits))
    return MeasureValue(
        measure=measure, name=name, language=language, value=share, standard_error=error, items=len(hits)
    )

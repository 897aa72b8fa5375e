"""Translation of held-out sentences with a few-shot prompt, scored with chrF (extra `eval`)."""

import importlib.util
from pathlib import Path
from typing import ClassVar

from pydantic import Field, field_validator

from elo.data.parallel import DEFAULT_TEMPLATE, Parallel, read_pairs, template_problem
from elo.data.sources import list_inputs
from elo.errors import EloError
from elo.evaluate.base import Measure, MeasureValue, Outcome, Subject, mean_error, register
from elo.evaluate.samples import generate_samples
from elo.evaluate.writing import BATCH_SIZE
from elo.store.remote import require_local


@register
class Translation(Measure):
    """Translate held-out sentences in both directions with a few-shot prompt: chrF of sacrebleu (extra `eval`)."""

    name: ClassVar[str] = "translation"

    path: str = Field(min_length=1)
    """File, folder or glob of held-out parallel text, in any format that a corpus may have."""
    columns: dict[str, str]
    """Columns of the two languages, by language."""
    template: str = DEFAULT_TEMPLATE
    """Layout of a pair, as in `data.corpora`. The first line break ends a translation."""
    shots: int = Field(4, ge=0, le=64)
    """Number of examples in the prompt: the first pairs of the file."""
    limit: int = Field(100, ge=1)
    """Number of sentences to translate in each direction: the pairs after the examples."""
    max_new_tokens: int = Field(128, ge=1)
    """Maximum length of a translation, in tokens."""

    @field_validator("columns")
    @classmethod
    def _two(cls, value: dict[str, str]) -> dict[str, str]:
        if len(value) != 2:
            raise ValueError(f"got {value}; name the columns of two languages, such as {{en: a, ko: b}}")
        return value

    @field_validator("template")
    @classmethod
    def _usable(cls, value: str) -> str:
        if problem := template_problem(value):
            raise ValueError(problem)
        return value

    def check(self, where: str) -> None:
        if importlib.util.find_spec("sacrebleu") is None:
            raise EloError(f"{where}: sacrebleu is not installed; run: pip install 'elo-cpt[eval]'")
        require_local(self.path, where, "download it, and give the local file")
        self._pairs(*self.columns.values())

    def files(self) -> list[Path]:
        return [Path(file.location) for file in list_inputs(self.path) if not file.is_hub]

    def measure(self, subject: Subject) -> Outcome:
        from sacrebleu.metrics.chrf import CHRF

        one, other = self.columns
        values = []
        for languages in ((one, other), (other, one)):
            of, into = languages
            columns = (self.columns[of], self.columns[into])
            layout = Parallel(columns, languages)
            pairs = self._pairs(*columns)
            shots = "".join(layout.example(*pair, self.template) + "\n" for pair in pairs[: self.shots])
            asked = pairs[self.shots :]
            prompts = [shots + layout.prompt(source, self.template) for source, _ in asked]
            texts = generate_samples(
                subject.model,
                subject.text_tokenizer,
                prompts,
                max_new_tokens=self.max_new_tokens,
                progress=f"translation into {into}" if subject.progress else None,
                stop="\n",
                batch_size=subject.batch_size or BATCH_SIZE,
            )
            hypotheses = [text.strip() for text in texts]
            references = [target for _, target in asked]
            # sacrebleu's bootstrap fails on some scores, so the standard error is that of the mean over sentences.
            each = [
                float(CHRF().sentence_score(hypothesis, [reference]).score)
                for hypothesis, reference in zip(hypotheses, references, strict=True)
            ]
            values.append(
                MeasureValue(
                    measure="translation",
                    language=into,
                    value=float(CHRF().corpus_score(hypotheses, [references]).score),
                    unit="number",
                    standard_error=mean_error(each),
                    items=len(asked),
                )
            )
        return Outcome(values)

    def _pairs(self, *columns: str) -> list[tuple[str, str]]:
        """Return the examples, then the sentences to translate.

        Raises:
            EloError: the file cannot be read or has too few pairs.
        """
        found: list[tuple[str, str]] = []
        for pair in read_pairs(self.path, (columns[0], columns[1])):
            found.append(pair)
            if len(found) == self.shots + self.limit:
                break
        if len(found) <= self.shots:
            raise EloError(
                f"evaluation.translation: {self.path}: has {len(found)} pairs, all of them examples in the prompt; "
                "give more pairs or lower shots"
            )
        return found

"""The choices of a run that need scores of the layers: `layers: auto`, and settings of a method."""

from transformers import PreTrainedModel

from elo.checkpoint.layers import parse_auto
from elo.config import RunConfig
from elo.data.shards import PreparedData
from elo.data.tokenizer import load_tokenizer
from elo.methods import Method
from elo.probe.base import Scores
from elo.probe.choice import TO_TRAIN, Choice, choose, mean_scores
from elo.probe.probe import frozen_model, score_once
from elo.probe.text import ProbeText, make_sequences, read_sentences
from elo.store.run_folder import Artifact, RunFolder


def choices(
    config: RunConfig, data: PreparedData, folder: RunFolder, base: Artifact, tokenizer: str
) -> tuple[Choice | None, Method]:
    """Return the layers that a probe chooses, None if the configuration names them, and the method.

    The text is the beginning of the target languages' training text. Each criterion is a stage of `folder`.
    """
    method, settings, targets = config.method, config.probe, config.data.targets
    auto = parse_auto(config.layers) if method.uses_layers else None
    if auto is None and method.probe_criterion is None:
        return None, method
    sequences = {
        language: make_sequences(
            language,
            (corpus.document(index) for corpus in data.train(language) for index in range(corpus.num_documents)),
            settings.tokens,
            settings.sequence_length,
        )
        for language in targets
    }
    sentences = {}
    if settings.parallel is not None:
        encoder = load_tokenizer(tokenizer, config.trust_remote_code)
        sentences = read_sentences(settings.parallel, config.data.languages, encoder, settings.sequence_length)
    text = ProbeText(sequences, sentences)

    def load() -> PreTrainedModel:
        return frozen_model(base.path, config.trust_remote_code)

    def scores(criterion: str) -> Scores:
        found: Scores = score_once(folder, criterion, base, text, load)["scores"]
        return found

    choice = None
    if auto is not None:
        criterion = auto.criterion or TO_TRAIN
        choice = choose(scores(criterion), criterion, auto.count, method.module, targets)
        folder.say(f"layers: {config.layers}: {', '.join(map(str, choice.layers))}: {choice.reason}")
    if method.probe_criterion is not None:
        method = method.with_scores(mean_scores(scores(method.probe_criterion), method.module, targets))
    return choice, method

"""Make the choices of a run that depend on layer scores: `layers: auto`, and a method's settings."""

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
    """Probe the base as far as the configuration requires, and make the choices that depend on the scores.

    The probe reads the beginning of the target languages' training text. Each criterion is a stage of `folder`.

    Args:
        tokenizer: folder or hub id of the tokenizer.

    Returns:
        The chosen layers (None if the configuration names them), and the method with the settings that follow from its
        probe.

    Raises:
        EloError: there is too little text, or the parallel sentences cannot be read.
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

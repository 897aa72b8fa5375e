"""Run a method: prepare the text, train, measure before and after, and report.

Each step is a stage of the run folder (`elo.store.run_folder`). A stage runs once, resumes after a kill, and runs again
if an argument has changed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from elo import stages
from elo.budget import Sequences, divide_budget
from elo.chat.stages import ChatInputs, chat_models, open_chat
from elo.checkpoint.counting import read_decoder_config
from elo.checkpoint.download import fetch_checkpoint
from elo.config import RunConfig, load_config
from elo.data.shards import PreparedData, TokenCorpus
from elo.detach_attach import resolve_checkpoint
from elo.errors import EloError
from elo.evaluate.chat import Chat
from elo.evaluate.warnings import worse_than_base
from elo.identities import checkpoint_identity, corpus_identity, tokenizer_identity
from elo.inputs import Adapted, Inputs
from elo.preflight import check_inputs, check_model, check_processes
from elo.probe.in_run import choices
from elo.report import collect, schema
from elo.run_results import report_progress, write_report
from elo.store.files import write_json
from elo.store.processes import check_launch, is_main
from elo.store.remote import is_remote
from elo.store.run_folder import Artifact, RunFolder, file_identity
from elo.train.bridge import BRIDGE_FILE, Bridge

# Minimum number of tokens to fit and measure a bridge on, besides 16 per hidden dimension and two sequences.
_BRIDGE_TOKENS = 8192
# Minimum share of the middle layers' effect on the hidden states that a bridge has to explain.
_MIN_EXPLAINED = 0.05


class ReachedError(Exception):
    """The stage `until` is done."""


def run(
    config: RunConfig | str | Path | dict[str, Any],
    *,
    overrides: list[str] | None = None,
    until: str | None = None,
    ray: str | None = None,
) -> dict[str, Any]:
    """Run all stages, or resume an interrupted run.

    Args:
        config: a configuration, its file, or a dict of the same form.
        overrides: `key.path=value`, applied to a file or dict.
        until: last stage to run: prepare, bridge, detach, attach, scale, the name of a phase, chat_vector, or sft; None
            runs all.
        ray: address of a Ray cluster that tokenises the corpora (`auto`, or host:port); None uses this machine.

    Returns:
        The results, as written to results.json (docs/results.md), or {} if `until` stopped the run earlier.

    Raises:
        EloError: the configuration or an input is invalid.
    """
    if not isinstance(config, RunConfig):
        config = load_config(config, overrides)
    _check_until(config, until)
    with open_run(config) as inputs:
        chat = _open_chat(inputs)
        data = prepare_data(inputs, ray)
        if until == "prepare":
            return {}
        check_processes(config)
        inputs = probe_layers(inputs, data)
        sequences = divide_budget(config, data, inputs.folder.say)
        text, questions = heldout_text(inputs, data), chat.measure_base() if chat else None
        try:
            base = measure(inputs, "evaluate-base", inputs.base, text, chat=questions)
            progress = partial(report_progress, inputs, data, base)
            adapted = adapt(inputs, data, sequences, base["bpb"], until=until, measured=progress)
            final = measure(inputs, "evaluate", adapted.model, text, chat=questions)
            chats = make_chat(inputs, chat, adapted.model, text, until=until) if chat else []
        except ReachedError:
            return {}
        return write_report(inputs, data, base, adapted, final, chats)


@contextmanager
def open_run(config: RunConfig) -> Iterator[Inputs]:
    """Check the inputs of a configuration, lock its run folder and yield the inputs.

    Raises:
        EloError: the base, a corpus, the layers, the run folder or the launch cannot be used.
    """
    check_launch()
    check_inputs(config)
    base = resolve_checkpoint(config.model, trust_remote_code=config.trust_remote_code)
    layers = check_model(config, base)
    tokenizer = config.tokenizer or str(base)
    if is_remote(tokenizer):
        tokenizer = str(fetch_checkpoint(tokenizer, config.trust_remote_code, weights=False))
    folder = RunFolder(Path(config.output))
    with folder.locked():
        if is_main():
            folder.sweep()
            write_json(folder.path("config.json"), config.model_dump(mode="json"))
        yield Inputs(config, folder, Artifact(base, checkpoint_identity(base)), tokenizer, layers)


def prepare_data(inputs: Inputs, ray: str | None = None) -> PreparedData:
    """Tokenise all corpora and return the token shards."""
    config, folder = inputs.config, inputs.folder
    corpora, heldout = stages.corpus_sources(config.data)
    decisive: dict[str, Any] = {
        "tokenizer": tokenizer_identity(inputs.tokenizer),
        "corpora": {name: [corpus_identity(each) for each in sources] for name, sources in corpora.items()},
        "heldout": {name: corpus_identity(each) for name, each in heldout.items()},
        **config.data.decisive(),
    }
    execution: dict[str, Any] = {
        "data": config.data,
        "tokenizer": inputs.tokenizer,
        "vocab_size": _decoder_config(inputs, inputs.base).vocab_size,
        "ray": ray,
        "trust_remote_code": config.trust_remote_code,
    }
    folder.once("prepared", stages.prepare_data, identities=decisive, execution=execution)
    return PreparedData.open(folder.path("prepared"))


def probe_layers(inputs: Inputs, data: PreparedData) -> Inputs:
    """Make the choices that need scores of the layers; see `elo.probe.in_run`."""
    choice, method = choices(inputs.config, data, inputs.folder, inputs.base, inputs.tokenizer)
    inputs = replace(inputs, config=inputs.config.model_copy(update={"method": method}))
    return inputs if choice is None else replace(inputs, layers=choice.layers, layers_reason=choice.reason)


def adapt(
    inputs: Inputs,
    data: PreparedData,
    sequences: Sequences,
    base_bpb: dict[str, float],
    *,
    until: str | None = None,
    measured: Callable[[Adapted, str, dict[str, Any]], None] = lambda *_: None,
) -> Adapted:
    """Run the phases of the method, from the base to the adapted model.

    Args:
        measured: function called after each measurement during training, with the stages that are done, the phase and
            the result.

    Raises:
        ReachedError: the stage `until` is done.
        MethodFailedError: a bridge explains too little of the removed layers' effect, or training diverged.
    """
    config, folder, method, base = inputs.config, inputs.folder, inputs.config.method, inputs.base
    layers = inputs.layers
    trust = {"trust_remote_code": config.trust_remote_code}
    shards = Artifact(data.path, data.fingerprint)
    adapted = Adapted(base)

    def done(artifact: Artifact, name: str) -> Artifact:
        adapted.records[name] = artifact.record
        if until == name:
            raise ReachedError
        return artifact

    phases = method.phases
    for phase in phases:
        settings = config.settings(phase)
        bridge = vocabulary = None
        start = adapted.model
        if phase.middle == "bridged":
            hidden_size = _decoder_config(inputs, base).hidden_size
            rows = sequences.first(bridge_tokens(hidden_size, config.data.sequence_length))
            bridge = folder.once("bridge", stages.fit_middle, base=base, layers=layers, rows=rows, execution=trust)
            # Not in the stage, which only the main process runs: every process has to raise the error.
            Bridge.load(bridge.path / BRIDGE_FILE).require(_MIN_EXPLAINED)
            done(bridge, "bridge")
            shown = ", ".join(f"{share:.0%}" for share in bridge.record["explained"])
            folder.say(f"bridge: explains {shown} of the removed layers' effect on hidden states of unseen tokens")
        if phase.detached:
            start = done(
                folder.once("detach", stages.detach_layers, base=base, layers=layers, execution=trust), "detach"
            )
        if settings.vocabulary == "corpus":
            sample = settings.vocabulary_sample
            name = f"vocabulary-{phase.name}"
            vocabulary = done(
                folder.once(
                    name,
                    stages.cut_vocabulary,
                    data=shards,
                    sample=sample,
                    seed=config.seed,
                    base=base,
                    execution=trust,
                ),
                name,
            )
        trained = done(
            folder.once(
                phase.name,
                stages.train,
                collective=True,
                checkpoint=start,
                rows=sequences.of(phase),
                method=method,
                phase=phase,
                layers=layers,
                bridge=bridge,
                vocabulary=vocabulary,
                settings=settings,
                seed=config.seed,
                evaluation=config.evaluation.max_bytes,
                execution={
                    "data": shards,
                    "measures": config.evaluation.measures_during_training,
                    "languages": inputs.languages,
                    "targets": config.data.targets,
                    "base_bpb": base_bpb,
                    "tokenizer": inputs.tokenizer,
                    "label": phase.name if phase.name == method.name else f"{method.name} {phase.name}",
                    "say": folder.say,
                    "measured": partial(measured, adapted, phase.name),
                    **trust,
                },
            ),
            phase.name,
        )
        folder.say(
            f"{phase.name}: {trained.record['tokens']:,} tokens in {trained.record['seconds']:.1f} s "
            f"({trained.record['tokens_per_second']:,.0f} tokens/s)"
        )
        adapted.model = trained
        if phase.detached:
            include = sorted(phase.also_train)
            adapted.model = done(
                folder.once(
                    "attach", stages.attach_layers, base=base, trained=trained, include=include, execution=trust
                ),
                "attach",
            )
        last = phase is phases[-1]
        if method.scale != 1.0 and (phase.detached or (last and "scale" not in adapted.records)):
            adapted.model = done(_keep_share(inputs, adapted.model, sequences), "scale")
        if phase.detached and not last:
            text = heldout_text(inputs, data)
            adapted.before_alignment = measure(inputs, "evaluate-attached", adapted.model, text, brief=True)
            for language in config.data.targets:
                if line := worse_than_base(language, adapted.before_alignment["bpb"], base_bpb):
                    folder.say(f"warning: evaluate-attached: {line}")
    return adapted


def bridge_tokens(hidden_size: int, sequence_length: int) -> int:
    """Return the number of tokens to fit a bridge on, and to measure it on others."""
    return max(_BRIDGE_TOKENS, 16 * hidden_size, 2 * sequence_length)


def _keep_share(inputs: Inputs, trained: Artifact, sequences: Sequences) -> Artifact:
    method = inputs.config.method
    searched = isinstance(method.scale, str)
    stage = inputs.folder.once(
        "scale",
        stages.keep_share,
        base=inputs.base,
        trained=trained,
        scale=method.scale,
        rows_identity=sequences.unseen_identity() if searched else None,
        execution={
            "rows": sequences.unseen() if searched else None,
            "trust_remote_code": inputs.config.trust_remote_code,
        },
    )
    inputs.folder.say(f"scale: the trained change is multiplied by {stage.record['scale']:g}")
    for line in stage.record.get("warnings", []):
        inputs.folder.say(f"warning: {line}")
    return stage


def heldout_text(inputs: Inputs, data: PreparedData) -> dict[str, TokenCorpus]:
    """Return held-out text by language, for reported measurements."""
    return {language: data.heldout(language) for language in inputs.languages}


def validation_text(inputs: Inputs, data: PreparedData) -> dict[str, TokenCorpus]:
    """Return validation text by language, which is set aside from the training corpora for choosing learning rates."""
    sizes = data.summary()["validation"]
    # Without replay, a source language may have held-out text only.
    sources = [language for language in inputs.config.data.sources if sizes[language]["documents"]]
    return {language: data.validation(language) for language in (*inputs.config.data.targets, *sources)}


def _open_chat(inputs: Inputs) -> ChatInputs | None:
    config = inputs.config
    if config.chat is None:
        return None
    return open_chat(
        config.chat,
        inputs.folder,
        model=inputs.base.path,
        tokenizer=inputs.tokenizer,
        seed=config.seed,
        trust_remote_code=config.trust_remote_code,
    )


def make_chat(
    inputs: Inputs, chat: ChatInputs, adapted: Artifact, text: dict[str, TokenCorpus], *, until: str | None = None
) -> list[schema.ChatModel]:
    """Run the chat stages, and measure the given chat model and each stage's.

    Raises:
        ReachedError: the stage `until` is done.
    """
    found = []
    if chat.model is not None:
        own, readable = inputs, text
        if _decoder_config(inputs, chat.model).vocab_size < _decoder_config(inputs, inputs.base).vocab_size:
            # The base's vocabulary was extended, so the text has tokens that the chat model does not have.
            own, readable = replace(inputs, tokenizer=str(chat.model.path)), {}
        record = measure(own, "evaluate-chat_model", chat.model, readable, chat=chat.measure(chat.model.path))
        found.append(collect.chat_model("chat_model", {}, record))
    for name, model in chat_models(chat, adapted, inputs.tokenizer):
        if until == name:
            raise ReachedError
        record = measure(inputs, f"evaluate-{name}", model, text, chat=chat.measure(model.path))
        found.append(collect.chat_model(name, model.record, record))
    return found


def measure(
    inputs: Inputs,
    name: str,
    model: Artifact,
    corpora: dict[str, TokenCorpus],
    *,
    brief: bool = False,
    chat: Chat | None = None,
) -> dict[str, Any]:
    """Measure a model as stage `name` and return the record.

    Args:
        brief: measure bits per byte only.
        chat: chat ability to measure, unless the configuration has its own `evaluation.chat`.
    """
    config = inputs.config
    evaluation = config.evaluation
    if chat is not None and not any(isinstance(each, Chat) for each in evaluation.measures):
        evaluation = evaluation.model_copy(update={"chat": chat})
    paths = [] if brief else list(map(Path, evaluation.cloze.values()))
    paths += [] if brief else [path for each in evaluation.measures for path in each.files()]
    stage = inputs.folder.once(
        name,
        stages.measure,
        keep=False,
        model=model,
        corpora=corpora,
        evaluation=evaluation,
        files={str(path): file_identity(path) for path in paths},
        brief=brief,
        sequence_length=config.data.sequence_length,
        split_special_tokens=config.data.split_special_tokens,
        execution={"tokenizer": inputs.tokenizer, "trust_remote_code": config.trust_remote_code},
    )
    shown = ", ".join(f"{language} {value:.4f}" for language, value in stage.record["bpb"].items())
    inputs.folder.say(f"{name}: bits per byte {shown}")
    return stage.record


def stage_names(config: RunConfig) -> list[str]:
    """Return the possible values of `until`."""
    names = ["prepare"]
    method = config.method
    phases = method.phases
    for phase in phases:
        names += ["bridge"] if phase.middle == "bridged" else []
        names += ["detach", phase.name, "attach"] if phase.detached else [phase.name]
        if method.scale != 1.0 and "scale" not in names and (phase.detached or phase is phases[-1]):
            names.append("scale")
    return names + (config.chat.stages if config.chat else [])


def _check_until(config: RunConfig, until: str | None) -> None:
    if until is not None and until not in (known := stage_names(config)):
        raise EloError(
            f"--until {until}: method {config.method.name} has no such stage; write one of {', '.join(known)}"
        )


def _decoder_config(inputs: Inputs, model: Artifact) -> PretrainedConfig:
    return read_decoder_config(model.path, trust_remote_code=inputs.config.trust_remote_code)

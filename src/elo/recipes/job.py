"""A run's stages, bound to its configuration and its run folder."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elo.config import RunConfig
from elo.processes import is_main
from elo.recipes.budget import RowBudget, divide_budget
from elo.recipes.identities import (
    HOW,
    checkpoint_identity,
    corpus_identity,
    further_arguments,
    tokenizer_identity,
)
from elo.recipes.preflight import check_inputs, check_model
from elo.recipes.prepare import corpus_sources, prepare
from elo.recipes.stand_in import choose_scale, write_bridge
from elo.recipes.surgery import attach, detach, resolve_checkpoint
from elo.records import write_json
from elo.workspace import Stage, Workspace, file_identity

if TYPE_CHECKING:
    from elo.data.mixture import MixtureRows
    from elo.data.shards import PreparedData
    from elo.training.methods import Method
    from elo.training.phases import Phase

# Tokens for the fit of a bridge (and 16 for each hidden dimension).
_BRIDGE_TOKENS = 8192


@dataclass
class Job:
    """Makes each stage's inputs from the configuration, and runs it in the workspace.

    Attributes:
        base: folder of the base checkpoint.
        layers: decoder layers that ELO trains.
    """

    config: RunConfig
    workspace: Workspace
    base: Path
    tokenizer: str
    layers: tuple[int, ...]
    base_identity: dict[str, Any] = field(default_factory=dict)
    prepared: "PreparedData | None" = None
    heldout: slice = field(default_factory=lambda: slice(None))
    """Which held-out documents are measured on."""
    _budget: RowBudget | None = None

    def path(self, *parts: str) -> Path:
        """A path in the run folder."""
        return self.workspace.path(*parts)

    def say(self, line: str) -> None:
        """Tell the user a line."""
        self.workspace.say(line)

    @property
    def languages(self) -> tuple[str, str]:
        """Target and source language."""
        return self.config.data.target, self.config.data.source

    def _base_config(self) -> Any:
        from elo.model.counting import read_config, text_config

        return text_config(read_config(str(self.base), trust_remote_code=self.config.trust_remote_code))

    # Data.

    def prepare(self, *, together: bool = False) -> "PreparedData":
        """Token shards of all corpora, made by this process or `together` with others."""
        from elo.data.shards import PreparedData

        data = self.config.data
        corpora, heldout = corpus_sources(data)
        inputs = {
            "tokenizer": tokenizer_identity(self.tokenizer),
            "corpora": {name: [corpus_identity(each) for each in sources] for name, sources in corpora.items()},
            "heldout": {name: corpus_identity(each) for name, each in heldout.items()},
            "heldout_share": data.heldout_share,
            "on_error": data.on_error,
            "split_special_tokens": data.split_special_tokens,
            "allow_lost_text": data.allow_lost_text,
        }
        output = self.path("prepared")

        def work() -> dict[str, Any]:
            self.say("prepare: tokenising the corpora")
            prepare(
                self.tokenizer,
                corpora,
                output,
                heldout=heldout or None,
                heldout_share=data.heldout_share,
                workers=data.workers,
                on_error=data.on_error,
                split_special_tokens=data.split_special_tokens,
                allow_lost_text=data.allow_lost_text,
                vocab_size=int(self._base_config().vocab_size),
                together=together,
                overwrite=not together,
                trust_remote_code=self.config.trust_remote_code,
            )
            return {}

        if together:
            self.workspace.begin("prepare", inputs)
            work()
        else:
            self.workspace.stage("prepare", inputs, work, outputs=(output,))
        self.prepared = PreparedData.open(output)
        return self.prepared

    def divide_budget(self, prepared: "PreparedData") -> None:
        """Decide which rows each phase trains on.

        Raises:
            EloError: the budget is less than one update.
        """
        own = self.method(self.config.method).phases
        controls = [phase for name in self.config.controls for phase in self.method(name).phases]
        self._budget = divide_budget(self.config, prepared, own, controls, self.say)

    @property
    def rows(self) -> RowBudget:
        """The token budget, once it is divided."""
        assert self._budget is not None
        return self._budget

    # Surgery.

    def detach(self, method: str) -> Stage:
        """The detached model's folder."""
        output = self.path(method, "detached")
        inputs = {"base": self.base_identity, "layers": list(self.layers)}
        return self.workspace.stage(
            f"{method}-detach",
            inputs,
            lambda: _measured(
                lambda: detach(
                    str(self.base),
                    list(self.layers),
                    output=output,
                    overwrite=True,
                    trust_remote_code=self.config.trust_remote_code,
                )
            ),
            outputs=(output,),
        )

    def bridge(self, method: "Method") -> Stage:
        """The linear bridge over what the layers leave out, fitted on the first rows of the run."""
        output = self.path(method.name, "bridge", "elo_bridge.safetensors")
        tokens = max(_BRIDGE_TOKENS, 16 * int(self._base_config().hidden_size))
        rows = self.rows.mixture.rows(0, -(-tokens // self.config.data.sequence_length))
        inputs = {"base": self.base_identity, "layers": list(self.layers), **self.rows.inputs(rows.start, rows.stop)}

        def work() -> dict[str, Any]:
            fitted = write_bridge(self.base, self.layers, rows, output, trust_remote_code=self.config.trust_remote_code)
            return {"layers": list(self.layers), **fitted}

        stage = self.workspace.stage(f"{method.name}-bridge", inputs, lambda: _measured(work), outputs=(output,))
        shown = ", ".join(f"{share:.0%}" for share in stage.record["explained"])
        self.say(f"{method.name} bridge: explains {shown} of what the middle does to the hidden states")
        return stage

    def attach(self, method: "Method", trained: Path, trained_stage: Stage) -> Stage:
        """The base with the trained layers put back."""
        output = self.path(method.name, "attached")
        include = sorted(method.also_train)
        inputs: dict[str, Any] = {"base": self.base_identity, "trained": trained_stage.fingerprint, "include": include}
        unseen = None
        if method.scale == "search":
            unseen = self.rows.unseen(method)
            inputs |= {"scale": "search", **self.rows.inputs(*unseen)}
        elif method.scale != 1.0:
            inputs |= {"scale": method.scale}

        def work() -> dict[str, Any]:
            scale, tried = method.scale, None
            if unseen is not None:
                rows = self.rows.mixture.rows_by_language(*unseen)
                trust = self.config.trust_remote_code
                scale, tried = choose_scale(self.base, trained, rows, include, trust_remote_code=trust)
            assert not isinstance(scale, str)
            record = attach(
                trained,
                str(self.base),
                output=output,
                scale=scale,
                include=include,
                overwrite=True,
                trust_remote_code=self.config.trust_remote_code,
            )
            return record if tried is None else record | {"scales_tried": tried}

        stage = self.workspace.stage(f"{method.name}-attach", inputs, lambda: _measured(work), outputs=(output,))
        if unseen is not None:
            self.say(f"{method.name} attach: scale {stage.record['scale']:g} predicts unseen rows best")
        return stage

    # Training.

    def method(self, name: str) -> "Method":
        """A method with this configuration's options."""
        from elo.training.methods import Options, find_method

        return find_method(name, Options(self.config.elo, self.config.lora, self.config.lisa))

    def train(
        self,
        method: "Method",
        phase: "Phase",
        rows: "MixtureRows",
        checkpoint: Path,
        before: Stage | None,
        bridge: Stage | None = None,
    ) -> Stage:
        """Train `checkpoint`, the outcome of stage `before` (None: the base), on `rows`."""
        from elo.recipes.train import heldout_evaluator, train_checkpoint
        from elo.training.bridge import Bridge
        from elo.training.methods import Setup

        assert self.prepared is not None
        config, data, settings = self.config, self.config.data, getattr(self.config, phase.settings)
        output, scratch = self.path(method.name, phase.name), self.path(method.name, f"{phase.name}-checkpoints")
        inputs = {
            "model": before.fingerprint if before else self.base_identity,
            **self.rows.inputs(rows.start, rows.stop),
            "method": method.name,
            "layers": list(self.layers),
            "middle": phase.middle,
            "also_train": list(method.also_train),
            **({"embedding_rows": "new"} if method.needs_new_rows else {}),
            "bridge": bridge.fingerprint if bridge else None,
            "settings": settings.model_dump(mode="json", exclude=HOW) | further_arguments(settings),
            "seed": config.seed,
            "evaluation": config.evaluation.max_tokens,
        }
        label = f"{method.name} {phase.name}" if phase.name != method.name else method.name

        def work() -> dict[str, Any]:
            tokens = len(rows) * data.sequence_length
            self.say(f"{label}: {tokens:,} tokens, {phase.rows} part of the budget")
            evaluate = heldout_evaluator(
                self.prepared,  # type: ignore[arg-type]
                self.languages,
                sequence_length=data.sequence_length,
                max_tokens=config.evaluation.max_tokens,
                settings=settings,
            )
            return train_checkpoint(
                checkpoint,
                output,
                rows=rows,  # type: ignore[arg-type]
                method=method,
                phase=phase,
                setup=Setup(
                    self.layers,
                    Bridge.load(self.path(method.name, "bridge", "elo_bridge.safetensors")) if bridge else None,
                    config.seed,
                ),
                settings=settings,
                scratch=scratch,
                evaluate=evaluate,
                trust_remote_code=config.trust_remote_code,
                label=label,
            )

        name = f"{method.name}-{phase.name}"
        stage = self.workspace.stage(name, inputs, work, outputs=(output,), scratch=(scratch,), collective=True)
        self.say(
            f"{label}: {stage.record['tokens']:,} tokens in {stage.record['seconds']:.1f} s "
            f"({stage.record['tokens_per_second']:,.0f} tokens/s)"
        )
        return stage

    # Evaluation and report.

    def evaluate(
        self,
        name: str,
        model: Path,
        before: Stage | None = None,
        *,
        brief: bool = False,
        heldout: slice | None = None,
    ) -> Stage:
        """Bits per byte of both languages; unless `brief`, cloze accuracy and samples too."""
        from elo.recipes.evaluate import evaluate

        assert self.prepared is not None
        settings, data = self.config.evaluation, self.config.data
        cloze = {} if brief else {language: Path(path) for language, path in settings.cloze.items()}
        prompts = {} if brief else settings.prompts
        documents = heldout or self.heldout
        inputs = {
            "model": before.fingerprint if before else self.base_identity,
            "documents": str(documents),
            "heldout": {language: self.prepared.heldout(language).fingerprint for language in self.languages},
            "sequence_length": data.sequence_length,
            "max_tokens": settings.max_tokens,
            "cloze": {language: file_identity(path) for language, path in cloze.items()},
            "prompts": prompts,
            "max_new_tokens": settings.max_new_tokens,
        }

        def work() -> dict[str, Any]:
            started = time.perf_counter()
            measured = evaluate(
                str(model),
                tokenizer=self.tokenizer,
                corpora={language: self.prepared.heldout(language) for language in self.languages},  # type: ignore[union-attr]
                cloze=cloze,
                prompts=prompts,
                sequence_length=data.sequence_length,
                max_tokens=settings.max_tokens,
                documents=documents,
                split_special_tokens=data.split_special_tokens,
                max_new_tokens=settings.max_new_tokens,
                trust_remote_code=self.config.trust_remote_code,
                progress=False,
            )
            return {**measured, "seconds": time.perf_counter() - started}

        stage = self.workspace.stage(f"evaluate-{name}", inputs, work)
        shown = ", ".join(f"{language} {value:.4f}" for language, value in stage.record["bpb"].items())
        self.say(f"{name}: bits per byte {shown}")
        return stage

    def link_model(self, model: Path) -> None:
        """Let RUN/model name the final model."""
        if not is_main():
            return
        link = self.path("model")
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(model, link.parent), target_is_directory=True)

    def report(self, results: dict[str, Any]) -> None:
        """Write report.html, report.md and the charts beside results.json, and show the comparison."""
        if not is_main():
            return
        from rich.console import Console

        from elo.recipes.report import report
        from elo.reporting.terminal import render_comparison

        report(results, self.workspace.root)
        console = Console()
        console.width = max(console.width, 118)  # a table that wraps in a log file cannot be read
        console.print(render_comparison(results))
        self.say(f"report: {self.path('report.html')}")
        self.say(f"model: {self.path('model')}")


@contextmanager
def open_job(config: RunConfig, *, shared: bool = False) -> Iterator[Job]:
    """Check a configuration against the disk, lock its run folder, alone or `shared`, and yield the job.

    Raises:
        EloError: the base, a corpus, the layers or the run folder is not usable.
    """
    check_inputs(config)
    base = resolve_checkpoint(config.model, trust_remote_code=config.trust_remote_code)
    workspace = Workspace(Path(config.output), lambda line: print(line, flush=True))
    layers = check_model(config, base)
    with workspace.locked(shared=shared):
        if is_main() and not shared:
            workspace.sweep()
        if is_main():
            write_json(workspace.path("config.json"), config.model_dump(mode="json"))
        yield Job(
            config,
            workspace,
            base=base,
            tokenizer=config.tokenizer or str(base),
            layers=layers,
            base_identity=checkpoint_identity(base),
        )


def _measured(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Record of a stage that trains nothing: its time and peak memory."""
    from elo.training.memory import peak_memory_bytes, reset_peak_memory

    reset_peak_memory()
    started = time.perf_counter()
    record = work()
    return {
        **record,
        "seconds": time.perf_counter() - started,
        "tokens": 0,
        "tokens_per_second": None,
        "peak_memory_bytes": peak_memory_bytes(),
    }

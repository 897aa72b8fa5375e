"""Every method with settings for a tiny model, prepared to train, and what it may change."""

from dataclasses import dataclass
from typing import Any

from training_fixtures import VOCAB, rows, tiny_llama
from transformers import PreTrainedModel

from elo.checkpoint.new_rows import VOCABULARY_KEY
from elo.methods import METHODS, Method, Phase, Setup
from elo.surgery.in_memory import detach_layers
from elo.train.bridge import fit_bridge
from elo.train.prepared import Prepared

KEPT = (0, 3)
FIRST_NEW_ROW = 40
SEED = 7
_SMALL: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2, "alpha": 4},
    "depth_lora": {"rank": 4, "min_rank": 1, "alpha": 8},
    "lisa": {"layers": 2, "period": 2},
}
_VARIANTS: dict[str, dict[str, Any]] = {
    "elo-removed": {"name": "elo", "middle": "removed"},
    "elo-aligned by adapters": {"name": "elo", "alignment": "lora", "alignment_rank": 2},
    "elo-layers alone": {"name": "elo", "also_train": []},
    "elo-new rows": {"name": "elo", "embedding_rows": "new", "alignment": "lora", "alignment_rank": 2},
    "frozen-half": {"name": "frozen", "backward_share": 0.5},
    "frozen-top alone": {"name": "frozen", "backward_share": 0.0},
    "frozen-new rows": {"name": "frozen", "embedding_rows": "new"},
    "lora-with ends": {"name": "lora", "rank": 2, "alpha": 4, "also_train": ["embedding", "head"]},
    "lora-new rows": {
        "name": "lora",
        "rank": 2,
        "alpha": 4,
        "also_train": ["embedding", "head"],
        "embedding_rows": "new",
    },
    "lisa-window": {"name": "lisa", "layers": 2, "period": 2, "window": True},
    "depth_lora-given": {"name": "depth_lora", "profile": [2, 0, 0, 1], "rank": 2, "alpha": 4},
    "full-mlp": {"name": "full", "module": "mlp"},
    "elo-attention": {"name": "elo", "module": "attention", "alignment": "none"},
    "frozen-attention": {"name": "frozen", "module": "attention"},
    "frozen-half-mlp": {"name": "frozen", "module": "mlp", "backward_share": 0.5},
    "lora-mlp": {"name": "lora", "rank": 2, "alpha": 4, "module": "mlp"},
    "lisa-mlp": {"name": "lisa", "layers": 2, "period": 2, "module": "mlp"},
}


def method(name: str, **settings: Any) -> Method:
    """A method with small settings where none are given."""
    return METHODS[name].model_validate({"name": name, **_SMALL.get(name, {}), **settings})


@dataclass(frozen=True)
class Case:
    """One phase of one method."""

    name: str
    method: Method
    phase: Phase

    @property
    def stochastic(self) -> bool:
        """Whether what trains is drawn anew for each update."""
        return self.method.name == "lisa" or getattr(self.method, "backward_share", 1.0) not in (0.0, 1.0)

    def start(self, *, tie: bool = False, vocab: int = VOCAB) -> PreTrainedModel:
        """The model that the phase begins with, before it is prepared; always the same."""
        whole = tiny_llama(tie=tie, vocab=vocab)
        if self.method.needs_new_rows:
            setattr(whole.config, VOCABULARY_KEY, {"rows": {"start": FIRST_NEW_ROW, "stop": vocab}})
        return detach_layers(whole, list(KEPT)) if self.phase.detached else whole

    def setup(self, *, tie: bool = False, vocab: int = VOCAB) -> Setup:
        bridge = None
        if self.phase.middle == "bridged":
            mixture = rows(40)
            bridge = fit_bridge(tiny_llama(tie=tie, vocab=vocab), KEPT, [mixture[index] for index in range(40)])
        return Setup(KEPT, bridge, SEED)

    def ready(self, **arguments: Any) -> tuple[PreTrainedModel, Prepared]:
        """The model with everything that the method adds."""
        model = self.start(**arguments)
        return model, self.method.prepare(model, self.phase, self.setup(**arguments))

    def adapted(self, model: PreTrainedModel) -> set[str]:
        """Names of the modules that get adapters."""
        part = {"layer": "", "attention": ".self_attn.", "mlp": ".mlp."}[self.method.module]
        ranks = self.method.lora_ranks(self.phase, 4)
        linear = {name.removesuffix(".weight") for name in model.state_dict() if "_proj" in name and part in name}
        return {name for name in linear if ranks[int(name.split(".")[2])]}

    def may_change(self, model: PreTrainedModel) -> set[str]:
        """Names of the tensors of the plain model that training changes (for lisa: may change)."""
        part = {"layer": "", "attention": ".self_attn.", "mlp": ".mlp."}[self.method.module]
        names = {name for name in model.state_dict() if ".layers." not in name or part in name}
        if self.phase.middle == "trained" or self.method.name == "lisa":
            return names
        parts = {"embedding": "embed_tokens", "norm": "model.norm", "head": "lm_head"}
        found = {name for name in names for part in self.phase.also_train if parts[part] in name}
        if self.phase.middle == "adapted":
            return found | {f"{name}.weight" for name in self.adapted(model)}
        layers: tuple[int, ...] = () if self.method.name == "embeddings_first" else KEPT
        if getattr(self.method, "backward_share", 1.0) == 0.0:
            layers = KEPT[-1:]
            if model.lm_head.weight is not model.model.embed_tokens.weight:
                found.discard("model.embed_tokens.weight")
        places = range(len(layers)) if self.phase.detached else layers
        return found | {name for name in names if any(f".layers.{place}." in name for place in places)}


def cases() -> list[Case]:
    """Every phase of every method, and of variants that train in another way."""
    found = [Case(name, method(name), phase) for name in METHODS for phase in method(name).phases]
    seen = {(case.method, case.phase.name) for case in found}
    for name, settings in _VARIANTS.items():
        chosen = method(**settings)
        found += [Case(name, chosen, phase) for phase in chosen.phases if (chosen, phase.name) not in seen]
    return found


CASES = cases()


def case_id(case: Case) -> str:
    return f"{case.name}:{case.phase.name}"

"""Translate a training configuration of LLaMA-Factory or Axolotl into one of ELO (`elo config --from`).

The tables of settings are in `elo.config.other_tools`.
"""

import json
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, get_args

from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from elo.config.document import yaml_line
from elo.config.load import load_config, put, read_yaml
from elo.config.other_tools import AXOLOTL, DEFAULTS, PARTS, SAME, TITLES, UNNEEDED, WHY, Tool
from elo.config.schema import RunConfig
from elo.errors import EloError


@dataclass
class Translation:
    """A configuration under translation.

    Attributes:
        given: settings of the file that are not translated yet, under the file's own names.
        value: configuration of ELO.
        comments: where a key comes from, by its path.
        todo: what the user has to do before the first run.
        lost: settings that ELO cannot express, with the reason.
        unneeded: settings that ELO does not need.
    """

    tool: Tool
    source: Path
    given: dict[str, Any]
    value: dict[str, Any] = field(default_factory=dict)
    comments: dict[str, str] = field(default_factory=dict)
    todo: list[str] = field(default_factory=list)
    lost: list[tuple[str, str]] = field(default_factory=list)
    unneeded: list[str] = field(default_factory=list)

    def name(self, setting: str) -> str:
        """Return the name of a setting in the file."""
        return AXOLOTL.get(setting, setting) if self.tool == "axolotl" else setting

    def take(self, setting: str) -> tuple[Any, str]:
        """Remove a setting and return its value (or the tool's default, or None) and where it comes from."""
        name = self.name(setting)
        if name in self.given:
            return self.given.pop(name), name
        return DEFAULTS[self.tool].get(setting), f"default of {TITLES[self.tool]}"

    def put(self, key: str, value: Any, origin: str) -> None:
        put(self.value, key, value, str(self.source))
        self.comments[key] = origin

    def move(self, setting: str, key: str) -> Any:
        """Translate a setting to a key with the same meaning, and return its value (None if there is none)."""
        value, origin = self.take(setting)
        if value is not None:
            self.put(key, _number(value), origin)
        return _number(value)

    def lose(self, setting: str, reason: str) -> None:
        self.lost.append((self.name(setting), reason))


def translate(tool: str, path: Path) -> Translation:
    """Translate the training configuration in file `path`.

    Args:
        tool: `llamafactory` or `axolotl`.

    Raises:
        EloError: the tool is unknown, the file cannot be read, is not language-model training, or has a value that ELO
            does not accept.
    """
    if tool not in get_args(Tool):
        raise EloError(f"--from {tool}: unknown tool; write one of {', '.join(get_args(Tool))}")
    given = {key: value for key, value in read_yaml(path).items() if value not in (None, "", [], {})}
    made = Translation(tool, path, given)  # type: ignore[arg-type]
    if made.name("model_name_or_path") not in given:
        raise EloError(
            f"{path}: has no {made.name('model_name_or_path')!r}, so it is not a training configuration of "
            f"{TITLES[made.tool]}; check --from"
        )
    for setting in ("model_name_or_path", "tokenizer_config"):
        made.move(setting, SAME[setting])
    if made.move("output_dir", "output") is None:
        made.put("output", "runs/translated", "output_dir is missing")
    _read_method(made)
    _read_data(made)
    for setting, key in SAME.items():
        made.move(setting, key)
    _read_budget(made)
    _read_training(made)
    _sort_leftovers(made)
    made.value = {key: made.value[key] for key in sorted(made.value, key=_position)}
    load_config(made.value)  # names the key that ELO does not accept
    return made


def _position(key: str) -> int:
    return list(RunConfig.model_fields).index(key)


def _read_method(made: Translation) -> None:
    kind, origin = made.take("finetuning_type" if made.tool == "llamafactory" else "adapter")
    if kind in ("lora", "qlora"):
        made.put("method.name", "lora", origin)
        rank = made.move("lora_rank", "method.rank")
        if made.move("lora_alpha", "method.alpha") is None and rank is not None:
            made.put("method.alpha", 2 * rank, f"default of {TITLES[made.tool]}")
        made.move("lora_dropout", "method.dropout")
        _also_train(made, "additional_target")
        for setting, every in (("lora_target", "all"), ("lora_target_modules", "all-linear")):
            targets, _ = made.take(setting)
            if targets not in (None, every):
                made.lose(setting, f"ELO puts adapters on every linear layer of the decoder, not only on {targets}")
        made.given.pop("lora_target_linear", None)
        if kind == "qlora":
            made.lose("adapter", "ELO does not train over quantised weights; this is LoRA instead of QLoRA")
    elif kind == "freeze":
        made.put("method.name", "frozen", origin)
        layers, origin = made.take("freeze_trainable_layers")
        made.put("layers", f"last:{int(layers)}" if int(layers) > 0 else f"first:{-int(layers)}", origin)
        _also_train(made, "freeze_extra_modules", write_empty=True)
        modules = made.given.pop("freeze_trainable_modules", "all")
        if modules != "all":
            made.lose("freeze_trainable_modules", f"ELO trains whole layers, not only {modules}")
    elif kind not in (None, "full", "none"):
        raise EloError(f"{made.source}: {origin}: {kind!r} has no counterpart in ELO; choose lora, freeze or full")
    elif "lisa_n_layers" in made.given:
        made.put("method.name", "lisa", "lisa_n_layers")
        made.move("lisa_n_layers", "method.layers")
        made.move("lisa_step_interval", "method.period")
        made.given.pop("lisa_layers_attribute", None)
    elif "unfrozen_parameters" in made.given:
        _read_unfrozen(made, [str(each) for each in made.given.pop("unfrozen_parameters")])
    else:
        made.put("method", "full", origin if kind else "no adapter")


def _also_train(made: Translation, setting: str, *, write_empty: bool = False) -> None:
    """Translate names of modules that train in full to the parts of `also_train`."""
    names, origin = made.take(setting)
    names = [] if names is None else _listed(names)
    parts = sorted({PARTS[name.rpartition(".")[2]] for name in names if name.rpartition(".")[2] in PARTS})
    if parts or write_empty:
        made.put("method.also_train", parts, origin if names else "embedding and head stay frozen")
    if others := [name for name in names if name.rpartition(".")[2] not in PARTS]:
        made.lose(setting, f"ELO trains embedding, norm and head beside the layers, not {', '.join(others)}")


def _read_unfrozen(made: Translation, patterns: list[str]) -> None:
    """Translate Axolotl's patterns of parameter names to layers and parts."""
    matched = [re.compile(pattern.partition("$[")[0]).match for pattern in patterns]
    inside = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj", "input_layernorm")
    hits = {index: [_any(matched, f"model.layers.{index}.{each}.weight") for each in inside] for index in range(100)}
    layers = [index for index, found in hits.items() if all(found)]
    outside = {"model.embed_tokens": "embedding", "model.norm": "norm", "lm_head": "head"}
    parts = [part for module, part in outside.items() if _any(matched, f"{module}.weight")]
    if not layers or len(layers) == len(hits):
        made.put("method", "full", "unfrozen_parameters")
        made.lose("unfrozen_parameters", "ELO trains whole decoder layers; name them in `layers` with `method: frozen`")
        return
    made.put("method.name", "frozen", "unfrozen_parameters")
    made.put("method.also_train", parts, "unfrozen_parameters")
    made.put("layers", ",".join(map(str, layers)), "unfrozen_parameters")
    if any(any(found) and not all(found) for found in hits.values()):
        made.lose("unfrozen_parameters", "ELO trains whole decoder layers; layers of which parts train are left out")
    if any("$[" in pattern for pattern in patterns):
        made.lose("unfrozen_parameters", "ELO trains all rows of a matrix; new rows alone: `embedding_rows: new`")


def _any(matchers: list[Any], name: str) -> bool:
    return any(match(name) for match in matchers)


def _read_data(made: Translation) -> None:
    instructions = "is not plain text; ELO trains on plain documents (docs/data.md), and SFT follows (docs/chat.md)"
    corpora: list[Any] = []
    pretraining = True
    if made.tool == "llamafactory":
        stage = made.given.pop("stage", "sft")
        pretraining = stage == "pt"
        if stage not in ("pt", "sft"):
            raise EloError(f"{made.source}: stage {stage!r} does not train on text; ELO translates pt and sft")
        if not pretraining:
            made.lose("stage", f"{stage} {instructions}")
        info = _dataset_info(made)
        for name in _listed(made.given.pop("dataset", [])):
            corpora += _from_dataset_info(made, name, info.get(name), instructions)
    else:
        if kind := made.given.get("rl") or ("reward_model" if made.given.get("reward_model") else None):
            raise EloError(f"{made.source}: {kind} does not train on text; ELO translates pretraining and SFT")
        streamed = made.given.pop("pretraining_dataset", None)
        pretraining = streamed is not None
        found = made.given.pop("datasets", []) if streamed is None else streamed
        for each in [{"path": found}] if isinstance(found, str) else found:
            kind = each.get("type") or ("pretrain" if pretraining else None)
            if str(kind).split(":")[0] in ("completion", "pretrain"):
                corpora.append(_axolotl_corpus(made, each))
            else:
                made.lose("datasets", f"{each.get('path')}: type {kind!r} {instructions}")
        if tested := made.given.pop("test_datasets", None):
            made.put("data.heldout.target", _axolotl_corpus(made, tested[0]), "test_datasets")
            for each in tested[1:]:
                made.lose("test_datasets", f"{each.get('path')}: ELO measures each language on one held-out text")
    made.todo.append("data.target, data.source: name the two languages, here and under corpora")
    made.put("data.target", "target", "TODO: language to teach")
    made.put("data.source", "source", "TODO: language to keep")
    if not corpora:
        made.todo.append("data.corpora.target: give the path of the training text")
    origin = "dataset" if made.tool == "llamafactory" else "datasets"
    made.put("data.corpora.target", corpora or "TARGET_TEXT.jsonl", origin if corpora else "TODO")
    made.todo.append(
        "data.corpora.source: give text in the language to keep, or move a corpus there; ELO replays "
        "data.replay_ratio of it"
    )
    made.put("data.corpora.source", "SOURCE_TEXT.jsonl", "TODO")
    packing, origin = made.take("packing")
    if made.given.pop("neat_packing", False):
        packing, origin = True, "neat_packing"
    if packing is None:
        packing, origin = pretraining, f"default of {TITLES[made.tool]}"
    made.put("data.packing", bool(packing), f"{origin}; attention never crosses documents")
    share, origin = made.take("val_size")
    if share is not None and 0 < (share := _number(share)) < 0.5:
        made.put("data.heldout_share", share, origin)
    elif share:
        made.lose("val_size", "ELO holds out a share below 0.5, or text of its own (`data.heldout`)")
    if made.given.pop("split_special_tokens", False):
        made.put("data.split_special_tokens", True, "split_special_tokens")


def _dataset_info(made: Translation) -> dict[str, Any]:
    """Read LLaMA-Factory's list of datasets, from the working directory or a folder above the file."""
    folder = str(made.given.get("dataset_dir", "data"))
    for root in (Path(), *made.source.absolute().parents):
        path = root / folder / "dataset_info.json"
        if path.is_file():
            try:
                return {
                    name: {**about, "_folder": path.parent}
                    for name, about in json.loads(path.read_text(encoding="utf-8")).items()
                }
            except (ValueError, AttributeError, TypeError) as error:
                raise EloError(f"{path}: not a list of datasets ({error}); correct it, or remove it") from None
    return {}


def _from_dataset_info(made: Translation, name: str, about: Any, instructions: str) -> list[Any]:
    if about is None:
        made.todo.append(f"data.corpora.target: dataset {name!r} has no dataset_info.json here; give the path")
        return [f"{name}.jsonl"]
    columns = about.get("columns", {})
    if about.get("formatting", "alpaca") != "alpaca" or about.get("ranking") or "response" in columns:
        made.lose("dataset", f"{name} {instructions}")
        return []
    if "hf_hub_url" in about:
        where = _hub(about["hf_hub_url"], about.get("subset"), about.get("split"))
    elif "file_name" in about:
        where = str(about["_folder"] / about["file_name"])
    else:
        made.lose("dataset", f"{name}: ELO reads files and Hugging Face datasets only")
        return []
    return [_corpus(made, where, columns.get("prompt", "instruction"))]


def _axolotl_corpus(made: Translation, about: Mapping[str, Any]) -> Any:
    where = str(about.get("path"))
    if files := about.get("data_files"):
        where = _listed(files)[0]
        if len(_listed(files)) > 1:
            made.lose("datasets", f"{about.get('path')}: of its data_files only the first is here; add the others")
    elif "/" in where and not where.startswith((".", "/", "~")) and not Path(where).suffix and not Path(where).exists():
        where = _hub(where, about.get("name"), about.get("split"))
        if "[" in str(about.get("split")):
            made.lose("datasets", f"{about['path']}: ELO reads whole splits, not {about['split']}")
    return _corpus(made, where, about.get("text_column") or about.get("field") or "text")


def _hub(name: str, subset: str | None, split: str | None) -> str:
    """Return the path of a Hugging Face dataset: hf://name, hf://name:split or hf://name:subset:split."""
    split = (split or "train").partition("[")[0]
    return "hf://" + ":".join([name, *([subset] if subset else []), *([split] if subset or split != "train" else [])])


def _corpus(made: Translation, where: str, column: str) -> Any:
    if where.endswith(".json"):
        made.todo.append(f"{where}: if it is one JSON array, convert it to JSON lines (.jsonl)")
    return where if column == "text" else {"path": where, "text_column": column}


def _read_budget(made: Translation) -> None:
    micro = made.value["training"].get("per_device_train_batch_size", 1)
    accumulation, _ = made.take("gradient_accumulation_steps")
    accumulation = _number(accumulation) or made.given.pop("batch_size", micro) // micro
    length = made.value["data"]["sequence_length"]
    per_step = micro * accumulation * length
    made.put("training.tokens_per_step", per_step, f"{length} tokens x {micro} sequences x {accumulation} micro-steps")
    made.todo.append("training.tokens_per_step: multiply it by the number of processes (GPUs) that you launch")
    steps, _ = made.take("max_steps")
    epochs, origin = made.take("num_train_epochs")
    if steps is not None and _number(steps) > 0:
        made.put("tokens", _number(steps) * per_step, "max_steps x tokens_per_step")
    elif _number(epochs) != 1:
        made.lose(
            "num_train_epochs",
            f"{epochs} ({origin}): ELO counts tokens; this file trains one pass. `elo prepare` reports the tokens of a "
            "pass; write a multiple of it as `tokens`",
        )


def _read_training(made: Translation) -> None:
    warmup, origin = made.take("warmup_steps")
    ratio, ratio_origin = made.take("warmup_ratio")
    if ratio is not None and not warmup:
        warmup, origin = ratio, ratio_origin
    if warmup is not None:
        made.put("training.warmup_steps", _number(warmup), origin)
    _choose(made, "optim", "training.optim", {each.value for each in OptimizerNames})
    schedule = made.take("cosine_min_lr_ratio")
    if schedule[0] is not None:
        made.given.pop(made.name("lr_scheduler_type"), None)
        made.put("training.lr_scheduler_type", "cosine_with_min_lr", schedule[1])
        made.put("training.lr_scheduler_kwargs", {"min_lr_rate": _number(schedule[0])}, schedule[1])
    else:
        _choose(made, "lr_scheduler_type", "training.lr_scheduler_type", {each.value for each in SchedulerType})
    made.move("bf16", "training.bf16")
    recompute, origin = made.take("gradient_checkpointing")
    if made.given.pop("disable_gradient_checkpointing", False):
        recompute, origin = False, "disable_gradient_checkpointing"
    made.put("training.activation_checkpointing", bool(recompute), origin)
    if isinstance(recompute, str):
        made.lose("gradient_checkpointing", f"ELO recomputes activations and does not move them ({recompute})")
    if made.given.pop("fsdp", None):
        made.put("training.training_arguments.fsdp", True, "fsdp")
    for setting in ("save_steps", "logging_steps"):
        value = _number(made.take(setting)[0])
        if isinstance(value, int) and value > 0:
            made.put(f"training.{setting}", value, setting)
        elif value is not None:
            made.lose(setting, f"{value}: ELO takes a whole number of updates")
    implementation = made.given.pop("attn_implementation", None)
    for switch, chosen in (("sdp_attention", "sdpa"), ("eager_attention", "eager"), ("flex_attention", None)):
        if made.given.pop(switch, False):
            implementation = chosen or implementation
    implementation = {"disabled": "eager", "sdpa": "sdpa"}.get(str(made.given.get("flash_attn")), implementation)
    if implementation in ("sdpa", "eager"):
        made.put("training.attn_implementation", implementation, "attention")
    _read_trackers(made)


def _read_trackers(made: Translation) -> None:
    names = [name for name in _listed(made.given.pop("report_to", [])) if name not in ("none", "all")]
    switches = {"use_tensorboard": "tensorboard", "wandb_project": "wandb", "mlflow_tracking_uri": "mlflow"}
    switches |= {"use_swanlab": "swanlab", "trackio_project_name": "trackio", "use_comet": "comet_ml"}
    for switch, name in switches.items():
        if value := made.given.pop(switch, None):
            names.append(name)
            if isinstance(value, str):
                made.lose(switch, f"set {switch.upper()} in the environment instead")
    if names:
        made.put("training.report_to", list(dict.fromkeys(names)), "report_to")


def _choose(made: Translation, setting: str, key: str, known: set[str]) -> None:
    value, origin = made.take(setting)
    if value in known:
        made.put(key, value, origin)
    elif value is not None:
        made.lose(setting, f"transformers has no {value!r}; this file uses ELO's default")


def _sort_leftovers(made: Translation) -> None:
    for name, value in made.given.items():
        if name in UNNEEDED or value is False:
            made.unneeded.append(name)
        else:
            reasons = (why for why, names in WHY.items() if any(fnmatchcase(name, each) for each in names))
            made.lose(name, next(reasons, "no counterpart in ELO"))


def render(made: Translation) -> str:
    """Return the configuration as YAML, with the origin of every key and, first, what remains to be done."""
    head = [f"Translated from {made.source.name} ({TITLES[made.tool]})."]
    head += ["", "To do before `elo run`:", *(f"- {each}" for each in made.todo)]
    if made.lost:
        head += ["", "Not translated:", *(f"- {name}: {reason}" for name, reason in made.lost)]
    if made.unneeded:
        head += ["", f"Without effect in ELO: {', '.join(made.unneeded)}"]
    wrapped = [line for text in head for line in textwrap.wrap(text, 116, subsequent_indent="  ") or [""]]
    return "\n".join([*(f"# {line}".rstrip() for line in wrapped), "", *_yaml(made, made.value)]) + "\n"


def _yaml(made: Translation, section: Mapping[str, Any], path: str = "", indent: str = "") -> list[str]:
    lines: list[str] = []
    for name, value in section.items():
        key = f"{path}{name}"
        if key in made.comments:
            lines.append(f"{yaml_line(name, value, indent)}  # {made.comments[key]}")
        else:
            lines += [f"{indent}{name}:", *_yaml(made, value, f"{key}.", indent + "  ")]
    return lines


def _listed(value: Any) -> list[str]:
    """Return a list of names that a file may also give as text with commas."""
    return [each.strip() for each in value.split(",")] if isinstance(value, str) else [str(each) for each in value]


def _number(value: Any) -> Any:
    """Convert 2e-4, which YAML 1.1 reads as text, to a number."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value

"""Configurations that are wrong: each is refused in one sentence before anything is made."""

from pathlib import Path
from typing import Any

import pytest
from bad_input_fixtures import assert_refused, change, write_config
from run_fixtures import write_world

HUGE = 10**30


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("world")
    return root, write_world(root)


# (key, value, words of the message); `__` goes a section deeper.
VALUES: list[tuple[str, Any, tuple[str, ...]]] = [
    ("model", ..., ("missing key 'model'",)),
    ("model", "", ("model", "got ''")),
    ("model", 7, ("model", "got 7")),
    ("model", None, ("model", "got None")),
    ("model", ["a", "b"], ("model", "got ['a', 'b']")),
    ("model", "{root}/nowhere/at/all", ("no such folder",)),
    ("model", "{root}/en.jsonl", ("en.jsonl", "not a folder")),
    ("model", "{root}", ("no model.safetensors",)),
    ("model", "../nowhere", ("nowhere", "no such folder")),
    ("model", "~/no-such-model-here", ("no such folder",)),
    ("model", "nobody/no-such-model", ("nobody/no-such-model", "hub")),
    ("model", "no such model", ("no such model", "hub")),
    ("model", "a" * 300, ("File name too long",)),
    ("output", ..., ("missing key 'output'",)),
    ("output", "", ("output", "got ''")),
    ("output", 3.5, ("output", "got 3.5")),
    ("output", "{root}/en.jsonl", ("en.jsonl", "is a file")),
    ("output", "{root}", ("is not empty and is not an ELO run",)),
    ("output", "{root}/en.jsonl/run", ("en.jsonl", "Not a directory")),
    ("output", "/proc/elo-run", ("/proc/elo-run", "cannot be written")),
    ("output", "{root}/" + "x" * 300, ("File name too long",)),
    ("output", "{root}/nul\0byte", ("null byte",)),
    ("model", "{root}/nul\0byte", ("null byte",)),
    ("data", ..., ("missing key 'data'",)),
    ("data", [], ("data", "got []")),
    ("data", "corpus.jsonl", ("data", "got 'corpus.jsonl'")),
    ("data", None, ("data", "got None")),
    ("data__target", ..., ("missing key 'data.target'",)),
    ("data__source", ..., ("missing key 'data.source'",)),
    ("data__target", "en", ("'en' is both a target and a source language",)),
    ("data__target", False, ("data.target", "quote it")),
    ("data__target", "de", ("target: 'de' has no corpus", "xx")),
    ("data__source", "de", ("source: 'de' has no corpus",)),
    ("data__target", "../xx", ("'../xx'",)),
    ("data__target", 4, ("data.target", "got 4")),
    ("data__target", "", ("data.target", "got ''")),
    ("data__target", [], ("data.target", "got []")),
    ("data__target", {}, ("data.target", "got {}")),
    ("data__target", None, ("data.target", "got None")),
    ("data__target", ["xx", False], ("data.target", "quote it")),
    ("data__target", ["xx", ["yy"]], ("data.target", "a list of languages")),
    ("data__target", ["xx", "xx"], ("data.target", "names a language twice")),
    ("data__target", ["xx", "en"], ("'en' is both a target and a source language",)),
    ("data__target", ["xx", "de"], ("target: 'de' has no corpus",)),
    ("data__source", {"en": 1, "de": 2}, ("source: 'de' has no corpus",)),
    ("data__target", {"xx": 0}, ("data.target", "share of 'xx' is 0; write a number above 0, at most 1e6")),
    ("data__target", {"xx": -1}, ("data.target", "share of 'xx' is -1")),
    ("data__target", {"xx": True}, ("data.target", "share of 'xx' is True")),
    ("data__target", {"xx": "half"}, ("data.target", "share of 'xx' is 'half'")),
    ("data__target", {"xx": float("inf")}, ("data.target", "share of 'xx' is inf")),
    ("data__target", {"xx": HUGE}, ("data.target", "share of 'xx' is 1000")),
    ("data__target", {"xx": float("nan")}, ("data.target", "share of 'xx' is nan")),
    ("data__corpora", ..., ("missing key 'data.corpora'",)),
    ("data__corpora", {}, ("has no corpus", "none")),
    ("data__corpora", "file.jsonl", ("data.corpora", "got 'file.jsonl'")),
    ("data__corpora", ["file.jsonl"], ("data.corpora",)),
    ("data__corpora__xx", [], ("'xx' has no corpus",)),
    ("data__corpora__xx", None, ("data.corpora.xx", "got None")),
    ("data__corpora__xx", 5, ("data.corpora.xx", "got 5")),
    ("data__corpora__de", "{root}/en.jsonl", ("'de' is neither a target nor a source language",)),
    ("data__corpora__../up", "{root}/en.jsonl", ("'../up' may contain only letters",)),
    ("data__corpora__xx", {"weight": 2}, ("missing key", "path")),
    ("data__corpora__xx", {"path": "{root}/xx.jsonl", "weight": 0}, ("weight", "greater than 0", "got 0")),
    ("data__corpora__xx", {"path": "{root}/xx.jsonl", "weight": -1}, ("weight", "got -1")),
    ("data__corpora__xx", {"path": "{root}/xx.jsonl", "weight": 1e7}, ("weight", "1000000")),
    ("data__corpora__xx", {"path": "{root}/xx.jsonl", "weight": "heavy"}, ("weight", "got 'heavy'")),
    ("data__corpora__xx", {"path": "{root}/xx.jsonl", "weight": float("nan")}, ("weight", "nan")),
    ("data__corpora__xx", {"path": "{root}/xx.jsonl", "weight": float("inf")}, ("weight", "inf")),
    ("data__corpora__xx", {"path": "{root}/xx.jsonl", "text_column": 3}, ("text_column", "got 3")),
    ("data__corpora__xx", {"path": "{root}/xx.jsonl", "text_field": "t"}, ("text_field", "'text_column'")),
    ("data__corpora__xx", {"path": "{root}/xx.jsonl", "wieght": 2}, ("wieght", "'weight'")),
    ("data__corpora__xx", {"path": None}, ("path", "got None")),
    ("data__corpora__xx", [{"path": ["a"]}], ("path", "got ['a']")),
    ("data__corpora__xx", "{root}/none.jsonl", ("none.jsonl", "no such file")),
    ("data__corpora__xx", "{root}/*.parquet", ("*.parquet", "matches no file")),
    ("data__corpora__xx", "{root}/config.yaml.bak", ("config.yaml.bak", "no such file")),
    ("data__corpora__xx", "{root}/ba*", ("matches only folders",)),
    ("data__corpora__xx", "", ("data.corpora.xx.0.path", "got ''")),
    ("data__corpora__xx", "hf://", ("hf://",)),
    ("data__corpora__xx", "hf://a:b:c:d", ("hf://a:b:c:d",)),
    ("data__corpora__xx", "{root}/nul\0byte.jsonl", ("null byte",)),
    ("data__heldout__de", "{root}/en.jsonl", ("'de' is neither",)),
    ("data__heldout__xx", "{root}/none.jsonl", ("none.jsonl", "no such file")),
    ("data__heldout__xx", ["{root}/xx.jsonl"], ("data.heldout.xx",)),
    ("data__heldout_share", 0, ("data.heldout_share", "greater than 0", "got 0")),
    ("data__heldout_share", 0.5, ("data.heldout_share", "less than 0.5")),
    ("data__heldout_share", -0.1, ("data.heldout_share", "got -0.1")),
    ("data__heldout_share", "some", ("data.heldout_share", "got 'some'")),
    ("data__heldout_share", float("nan"), ("data.heldout_share", "nan")),
    ("data__replay_ratio", 1, ("data.replay_ratio", "less than 1")),
    ("data__replay_ratio", -0.5, ("data.replay_ratio", "got -0.5")),
    ("data__replay_ratio", 10, ("data.replay_ratio", "got 10")),
    ("data__replay_ratio", "10%", ("data.replay_ratio", "got '10%'")),
    ("data__replay_ratio", float("inf"), ("data.replay_ratio", "inf")),
    ("data__sequence_length", 7, ("data.sequence_length", "greater than or equal to 8", "got 7")),
    ("data__sequence_length", 0, ("data.sequence_length", "got 0")),
    ("data__sequence_length", -2048, ("data.sequence_length", "got -2048")),
    ("data__sequence_length", 32.5, ("data.sequence_length", "got 32.5")),
    ("data__sequence_length", "2k", ("data.sequence_length", "got '2k'")),
    ("data__sequence_length", 4096, ("tokens_per_step: 64 is not a multiple", "4096 x 2 x 1 = 8192")),
    ("data__sequence_length", HUGE, ("data.sequence_length",)),
    ("data__sequence_length", True, ("data.sequence_length", "got True")),
    ("data__packing", "maybe", ("data.packing", "got 'maybe'")),
    ("data__on_error", "ignore", ("data.on_error", "'stop' or 'skip'", "got 'ignore'")),
    ("data__workers", 0, ("data.workers", "got 0")),
    ("data__workers", -1, ("data.workers", "got -1")),
    ("data__workers", "all", ("data.workers", "got 'all'")),
    ("data__workers", HUGE, ("data.workers",)),
    ("method", "loro", ("method: there is no method 'loro'", "'lora'")),
    ("method", None, ("method", "got None")),
    ("method", ["elo"], ("method",)),
    ("method", {}, ("method",)),
    ("method", {"name": None}, ("method",)),
    ("method", {"name": "elo", "middel": "removed"}, ("'method.elo.middel'", "'middle'")),
    ("method", {"name": "elo", "middle": "none"}, ("method.elo.middle", "'bridged' or 'removed'", "got 'none'")),
    ("method", {"name": "elo", "share": 0}, ("method.elo.share", "got 0")),
    ("method", {"name": "elo", "share": 1}, ("method.elo.share", "less than 1")),
    ("method", {"name": "elo", "scale": 0}, ("above 0 and at most 2",)),
    ("method", {"name": "full", "scale": "best"}, ("method.full.scale",)),
    ("method", {"name": "elo", "alignment": "some"}, ("method.elo.alignment", "got 'some'")),
    ("method", {"name": "elo", "also_train": ["tail"]}, ("method.elo.also_train", "got 'tail'")),
    ("method", {"name": "elo", "also_train": [], "embedding_rows": "new"}, ("name one in also_train",)),
    ("method", {"name": "frozen", "also_train": [], "embedding_rows": "new"}, ("name one in also_train",)),
    ("method", {"name": "lora", "embedding_rows": "new"}, ("name one in also_train",)),
    ("method", {"name": "elo_paper", "also_train": ["head"]}, ("write method: elo",)),
    ("method", {"name": "frozen", "backward_share": 2}, ("method.frozen.backward_share", "got 2")),
    ("method", {"name": "lora", "rank": 0}, ("method.lora.rank", "got 0")),
    ("method", {"name": "lora", "dropout": 1}, ("method.lora.dropout", "less than 1")),
    ("method", {"name": "lisa", "layers": "all"}, ("method.lisa.layers", "got 'all'")),
    ("training", [], ("training", "got []")),
    ("training__phases", {"full": {}}, ("'full' is not a phase of method elo",)),
    ("training__phases", {"layer_alignment": {"lr": 1}}, ("layer_alignment.lr: unknown key",)),
    ("training__phases", {"layer_alignment": {"learning_rate": -1}}, ("layer_alignment.learning_rate",)),
    ("training__phases", {"layer_alignment": 3}, ("training.phases.layer_alignment", "got 3")),
    ("tokens", 0, ("tokens", "greater than 0")),
    ("tokens", -5, ("tokens", "got -5")),
    ("tokens", 1.5, ("tokens", "1.5")),
    ("tokens", "many", ("tokens", "got 'many'")),
    ("tokens", float("inf"), ("tokens", "inf")),
    ("tokens", float("nan"), ("tokens", "nan")),
    ("tokens", 10**16, ("tokens", "1000000000000000")),
    ("tokens", True, ("tokens", "not true or false")),
    ("tokens", [1], ("tokens", "got [1]")),
    ("seed", -1, ("seed", "got -1")),
    ("seed", 2**32, ("seed", "4294967296")),
    ("seed", "lucky", ("seed", "got 'lucky'")),
    ("seed", 1.25, ("seed", "got 1.25")),
    ("tokenizer", "{root}/nowhere/at/all", ("nowhere", "no such folder")),
    ("tokenizer", "{root}", ("has no tokenizer",)),
    ("tokenizer", 9, ("tokenizer", "got 9")),
    ("tokenizer", "", ("tokenizer",)),
    ("trust_remote_code", "perhaps", ("trust_remote_code", "got 'perhaps'")),
    ("title", 12, ("title", "got 12")),
    ("evaluation", [], ("evaluation", "got []")),
    ("evaluation__max_bytes", 0, ("evaluation.max_bytes", "got 0")),
    ("evaluation__max_bytes", "all", ("evaluation.max_bytes", "got 'all'")),
    ("data__validation_share", 0.5, ("data.validation_share", "less than 0.5")),
    ("data__validation_share", -0.1, ("data.validation_share", "got -0.1")),
    ("evaluation__max_new_tokens", 0, ("evaluation.max_new_tokens", "got 0")),
    ("evaluation__max_new_tokens", -3, ("evaluation.max_new_tokens", "got -3")),
    ("evaluation__cloze", {"de": "{root}/en.jsonl"}, ("evaluation.cloze: 'de'",)),
    ("evaluation__cloze", {"xx": "{root}/none"}, ("evaluation.cloze.xx", "no such file")),
    ("evaluation__cloze", {"xx": "{root}"}, ("evaluation.cloze.xx", "no such file")),
    ("evaluation__cloze", {"xx": "{root}/en.jsonl"}, ("en.jsonl:1", '"prompt" must be a string')),
    ("evaluation__cloze", {"xx": ["a"]}, ("evaluation.cloze.xx", "got ['a']")),
    ("evaluation__prompts", {"de": ["hallo"]}, ("evaluation.prompts: 'de'",)),
    ("evaluation__prompts", {"xx": "hallo"}, ("evaluation.prompts.xx", "got 'hallo'")),
    ("evaluation__prompts", {"xx": [1]}, ("evaluation.prompts.xx.0", "got 1")),
    ("layers", "", ("layers", "cannot read ''")),
    ("layers", [], ("layers", "selects no layer")),
    ("layers", "first:0", ("first:0", "1 to 3")),
    ("layers", "first:5", ("first:5", "the model has 4")),
    ("layers", "last:9", ("last:9", "the model has 4")),
    ("layers", "first:2,last:3", ("layer 1 twice",)),
    ("layers", "first:2,last:2", ("all 4 layers",)),
    ("layers", "0-3", ("all 4 layers",)),
    ("layers", "0,0", ("layer 0 twice",)),
    ("layers", "3,-1", ("layer 3 twice",)),
    ("layers", "4", ("names layer 4", "0 to 3")),
    ("layers", "-5", ("names layer -5",)),
    ("layers", 17, ("names layer 17",)),
    ("layers", [0, 9], ("names layer 9",)),
    ("layers", [0, 0.5], ("layers",)),
    ("layers", "2-1", ("backwards", "1-2")),
    ("layers", "0-9", ("names layer 9",)),
    ("layers", "first", ("cannot read 'first'",)),
    ("layers", "first:one", ("cannot read 'first:one'",)),
    ("layers", "first:1;last:1", ("cannot read",)),
    ("layers", "first:1,,last:1", ("cannot read ''",)),
    ("layers", "middle:1", ("cannot read 'middle:1'",)),
    ("layers", "0..3", ("cannot read '0..3'",)),
    ("layers", "all", ("cannot read 'all'",)),
    ("layers", "9" * 5000, ("layers",)),
    ("layers", {"first": 1}, ("layers", "got {'first': 1}")),
    ("layers", 1.5, ("layers", "got 1.5")),
    ("layers", None, ("layers", "got None")),
    ("layers", True, ("layers", "got True")),
]

# In the section training.
TRAINING: list[tuple[str, Any, tuple[str, ...]]] = [
    ("learning_rate", 0, ("greater than 0",)),
    ("learning_rate", -1e-4, ("got -0.0001",)),
    ("learning_rate", 2, ("less than or equal to 1",)),
    ("learning_rate", "fast", ("got 'fast'", "plain number")),
    ("learning_rate", float("nan"), ("nan",)),
    ("lr_scheduler_type", "cosin", ("cosine", "got 'cosin'")),
    ("warmup_steps", -1, ("got -1",)),
    ("warmup_steps", float("inf"), ("inf",)),
    ("warmup_steps", "3%", ("got '3%'",)),
    ("weight_decay", -0.1, ("got -0.1",)),
    ("weight_decay", 1.1, ("got 1.1",)),
    ("adam_beta1", 1.0, ("less than 1",)),
    ("adam_beta2", -0.5, ("got -0.5",)),
    ("adam_beta2", 1, ("less than 1",)),
    ("max_grad_norm", -1, ("got -1",)),
    ("optim", "sgdd", ("adamw", "got 'sgdd'")),
    ("tokens_per_step", 0, ("greater than 0",)),
    ("tokens_per_step", 100, ("is not a multiple", "write for example")),
    ("tokens_per_step", 64.5, ("got 64.5",)),
    ("per_device_train_batch_size", 0, ("greater than 0",)),
    ("per_device_train_batch_size", "auto", ("got 'auto'",)),
    ("activation_checkpointing", 2, ("got 2",)),
    ("torch_compile", "inductor", ("got 'inductor'",)),
    ("bf16", "fp16", ("bf16", "got 'fp16'")),
    ("attn_implementation", 5, ("got 5",)),
    ("attn_implementation", "flash_attention_9", ("flash_attention_9",)),
    ("head_loss", "fused", ("'chunked'", "got 'fused'")),
    ("logging_steps", 0, ("got 0",)),
    ("save_steps", 0, ("got 0",)),
    ("save_steps", -1, ("got -1",)),
    ("save_total_limit", 0, ("got 0",)),
    ("evaluations", -1, ("got -1",)),
    ("max_loss_spike_nats", 0, ("got 0",)),
    ("max_loss_spike_nats", float("nan"), ("nan",)),
    ("dataloader_num_workers", -1, ("got -1",)),
    ("dataloader_num_workers", "two", ("got 'two'",)),
    ("report_to", "nowhere", ("nowhere",)),
    ("report_to", 4, ("got 4",)),
    ("training_arguments", "fsdp", ("got 'fsdp'",)),
    ("training_arguments", {"fsdpp": "x"}, ("has no 'fsdpp'",)),
    ("training_arguments", {"max_steps": 5}, ("ELO sets 'max_steps'",)),
    ("training_arguments", {"output_dir": "/tmp"}, ("ELO sets 'output_dir'",)),
    ("training_arguments", {"learning_rate": 1}, ("ELO sets 'learning_rate'",)),
    ("training_arguments", {"hub_token": "hf_abc"}, ("hub_token", "secret", "HF_TOKEN")),
    ("training_arguments", {"fsdp": "wat"}, ("transformers rejects",)),
    ("training_arguments", {"deepspeed": "{root}/none.json"}, ("transformers rejects", "deepspeed")),
    ("vocabulary", "some", ("'all' or 'corpus'", "got 'some'")),
    ("vocabulary_sample", -1, ("got -1",)),
    ("also_train", ["tail"], ("unknown key", "method.also_train")),
]

# What other tools call it -> what it is called here.
ELSEWHERE: list[tuple[str, str]] = [
    ("base_model", "model"),
    ("model_name_or_path", "model"),
    ("model_id", "model"),
    ("output_dir", "output"),
    ("cutoff_len", "data.sequence_length"),
    ("sequence_len", "data.sequence_length"),
    ("max_length", "data.sequence_length"),
    ("max_seq_length", "data.sequence_length"),
    ("block_size", "data.sequence_length"),
    ("sequence_length", "data.sequence_length"),
    ("datasets", "data.corpora"),
    ("dataset", "data.corpora"),
    ("elo_pretraining", "training"),
    ("layer_alignment", "training.phases.layer_alignment"),
    ("full", "training"),
    ("elo", "method"),
    ("lora", "method"),
    ("lisa", "method"),
    ("controls", "contestants of a comparison (elo compare)"),
    ("learning_rate", "training.learning_rate"),
    ("lora_rank", "method.rank"),
    ("modules_to_save", "method.also_train"),
    ("num_train_epochs", "tokens"),
    ("max_steps", "tokens"),
    ("sample_packing", "data.packing"),
    ("data__replay", "replay_ratio"),
    ("data__sequence_lenght", "sequence_length"),
    ("data__cutoff_len", "data.sequence_length"),
    ("training__lr", "training.learning_rate"),
    ("training__optimizer", "training.optim"),
    ("training__gradient_checkpointing", "training.activation_checkpointing"),
    ("training__micro_batch_size", "training.per_device_train_batch_size"),
    ("training__batch_size", "training.per_device_train_batch_size"),
    ("training__gradient_accumulation_steps", "training.tokens_per_step"),
    ("training__warmup_ratio", "training.warmup_steps"),
    ("training__flash_attention", "training.attn_implementation"),
    ("training__lr_scheduler", "training.lr_scheduler_type"),
    ("training__learning_rat", "learning_rate"),
    ("training__savesteps", "save_steps"),
    ("training__loss_spike", "max_loss_spike_nats"),
    ("evaluation__max_byte", "max_bytes"),
    ("evaluation__max_tokens", "evaluation.max_bytes"),
    ("modle", "model"),
    ("sed", "seed"),
    ("tokenzier", "tokenizer"),
]

# Files that are no configuration: content and words.
FILES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty": (b"", ("contains NoneType", "mapping")),
    "comment only": (b"# nothing\n", ("mapping",)),
    "list": (b"- a\n- b\n", ("contains list",)),
    "bare text": (b"hello", ("contains str",)),
    "number": (b"5", ("contains int",)),
    "unclosed quote": (b'model: "x', ("is not YAML",)),
    "unclosed brace": (b"data: {a: 1", ("is not YAML",)),
    "tab indent": (b"data:\n\ttarget: x\n", ("is not YAML",)),
    "bad indent": (b"model: a\n  output: b\n", ("is not YAML",)),
    "key twice": (b"model: a\nmodel: b\n", ("'model' appears twice",)),
    "nested key twice": (b"data:\n  target: a\n  target: b\n", ("'target' appears twice",)),
    "python tag": (b"model: !!python/object/apply:os.system ['true']\n", ("is not YAML", "python")),
    "unknown tag": (b"model: !thing x\n", ("is not YAML", "!thing")),
    "undefined alias": (b"model: *nobody\n", ("is not YAML", "nobody")),
    "refers to itself": (b"data: &a\n  data: *a\nmodel: x\n", ("refers to itself",)),
    "alias bomb": (
        b"a: &a [x,x,x,x,x,x,x,x,x,x]\n"
        + b"".join(b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 10)) for i in range(8)),
        ("aliases",),
    ),
    "deep": (b"a: " + b"[" * 1200 + b"]" * 1200, ("nested too deeply",)),
    "two documents": (b"model: a\n---\nmodel: b\n", ("is not YAML",)),
    "utf-16": ("model: a\n".encode("utf-16"), ("not UTF-8",)),
    "latin-1": ("model: é\n".encode("latin-1"), ("not UTF-8",)),
    "null bytes": (b"\0" * 40, ("is not YAML",)),
    "control character": (b"model: a\x07b\n", ("is not YAML",)),
    "gzip": (b"\x1f\x8b\x08\0\0\0\0\0", ("not UTF-8",)),
    "json5": (b"{model: a, // base\n}", ("config.yaml",)),
    "numeric keys": (b"1: a\n2: b\n", ("keys should be strings, got 1",)),
    "null key": (b"? \n: a\n", ("keys should be strings, got None",)),
    "list as a key": (b"? [a]\n: b\n", ("is not YAML",)),
    "date": (b"model: 2026-01-01\noutput: x\n", ("model",)),
    "binary": (b"model: !!binary /w==\noutput: x\n", ("model",)),
    "no such date": (b"title: 2026-99-99\noutput: x\n", ("month", "quote it")),
    "number of 5000 digits": (b"tokens: " + b"9" * 5000 + b"\n", ("digits", "quote it")),
    "set": (b"model: !!set {a, b}\noutput: x\n", ("model",)),
}

# --set arguments and words.
OVERRIDES: dict[str, tuple[str, ...]] = {
    "tokens": ("write key.path=value",),
    "=5": ("write key.path=value",),
    "": ("write key.path=value",),
    " =1": ("write key.path=value",),
    "tokens={": ("is not YAML",),
    "tokens.more=1": ("'tokens' is a value, not a section",),
    "model.name=x": ("'model' is a value",),
    "data..target=x": ("data",),
    ".=1": ("unknown key",),
    "a.b.c.d=1": ("unknown key 'a'",),
    "layers=first:99": ("first:99",),
    "training=5": ("training", "got 5"),
    "method.rank=5": ("'method.elo.rank'",),
    "data.corpora.xx.path=x": ("'xx' is a value",),
    "training.optim=[": ("is not YAML",),
    "data=!!python/name:os.system": ("is not YAML",),
    "data.corpora={a: b, a: c}": ("twice",),
    "seed=" + "9" * 5000: ("--set", "digits"),
    "title=2026-99-99": ("month", "quote it"),
    "tokens=" + "[" * 1200: ("tokens=", "nested too deeply"),
}


def _filled(value: Any, root: Path) -> Any:
    if isinstance(value, str):
        return value.replace("{root}", str(root))
    if isinstance(value, dict):
        return {key: _filled(item, root) for key, item in value.items()}
    return [_filled(item, root) for item in value] if isinstance(value, list) else value


def _name(value: Any) -> str:
    return f"{value!r:.24}".replace("/", "|").replace("\\", "")


@pytest.mark.parametrize(("key", "value", "words"), VALUES, ids=[f"{k}={_name(v)}" for k, v, _ in VALUES])
def test_value(key, value, words, world, tmp_path, capsys):
    root, config = world
    changed = change({**config, "output": str(tmp_path / "run")}, **{key: _filled(value, root)})
    path = write_config(tmp_path, changed)
    assert_refused(["run", path], words, (root, tmp_path), capsys)


@pytest.mark.parametrize(("key", "value", "words"), TRAINING, ids=[f"{k}={_name(v)}" for k, v, _ in TRAINING])
def test_training_setting(key, value, words, world, tmp_path, capsys):
    root, config = world
    changes = {"output": str(tmp_path / "run"), f"training__{key}": _filled(value, root)}
    path = write_config(tmp_path, change(config, **changes))
    words = words if "transformers rejects" in words else (key, *words)
    assert_refused(["run", path], ("training", *words), (root, tmp_path), capsys)


@pytest.mark.parametrize(("key", "ours"), ELSEWHERE, ids=[key for key, _ in ELSEWHERE])
def test_key_of_another_tool_or_misspelt(key, ours, world, tmp_path, capsys):
    root, config = world
    path = write_config(tmp_path, change({**config, "output": str(tmp_path / "run")}, **{key: "x"}))
    words = (f"unknown key '{key.replace('__', '.')}'", f"did you mean '{ours}'")
    assert_refused(["run", path], words, (root, tmp_path), capsys)


@pytest.mark.parametrize("fault", FILES)
def test_file(fault, tmp_path, capsys):
    content, words = FILES[fault]
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    assert_refused(["run", path], words, (tmp_path,), capsys)


@pytest.mark.parametrize("override", OVERRIDES, ids=[_name(each) for each in OVERRIDES])
def test_override(override, world, tmp_path, capsys):
    root, config = world
    path = write_config(tmp_path, {**config, "output": str(tmp_path / "run")})
    assert_refused(["run", path, "--set", override], OVERRIDES[override], (root, tmp_path), capsys)


@pytest.mark.parametrize("divided", ["fsdp", "deepspeed"])
def test_part_of_a_vocabulary_cannot_be_divided(divided, world, tmp_path, capsys):
    root, config = world
    changed = change(config, output=str(tmp_path / "run"), method="full", training__vocabulary="corpus")
    changed["training"]["training_arguments"] = {divided: True}
    path = write_config(tmp_path, changed)
    assert_refused(
        ["run", path], ("training.vocabulary: corpus: needs whole weights", "in full; remove"), (root, tmp_path), capsys
    )


def test_not_a_file(world, tmp_path, capsys):
    assert_refused(["run", tmp_path], ("is a folder",), (tmp_path,), capsys)
    assert_refused(["run", tmp_path / "none.yaml"], ("no such configuration file",), (tmp_path,), capsys)
    assert_refused(["run", tmp_path / ("x" * 300)], ("File name too long",), (tmp_path,), capsys)
    assert_refused(["run", "/dev/null/x.yaml"], ("/dev/null/x.yaml",), (tmp_path,), capsys)

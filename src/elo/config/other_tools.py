"""Settings of LLaMA-Factory and Axolotl, for `elo.config.translate`.

They are listed under the names of LLaMA-Factory, most of which are those of transformers; `AXOLOTL` maps them to
Axolotl's. If a file leaves a setting out, the translation has the other tool's default, not ELO's.
"""

from typing import Any, Literal

Tool = Literal["llamafactory", "axolotl"]
TITLES: dict[Tool, str] = {"llamafactory": "LLaMA-Factory", "axolotl": "Axolotl"}

AXOLOTL = {
    "model_name_or_path": "base_model",
    "cutoff_len": "sequence_len",
    "packing": "sample_packing",
    "val_size": "val_set_size",
    "preprocessing_num_workers": "dataset_processes",
    "per_device_train_batch_size": "micro_batch_size",
    "num_train_epochs": "num_epochs",
    "optim": "optimizer",
    "lr_scheduler_type": "lr_scheduler",
    "lora_rank": "lora_r",
    "additional_target": "lora_modules_to_save",
    "use_rslora": "peft_use_rslora",
    "use_dora": "peft_use_dora",
}
# Setting: key of ELO that means the same.
SAME = {
    "model_name_or_path": "model",
    "tokenizer_config": "tokenizer",
    "output_dir": "output",
    "trust_remote_code": "trust_remote_code",
    "seed": "seed",
    "cutoff_len": "data.sequence_length",
    "preprocessing_num_workers": "data.workers",
    "learning_rate": "training.learning_rate",
    "embedding_lr": "training.embedding_learning_rate",
    "weight_decay": "training.weight_decay",
    "adam_beta1": "training.adam_beta1",
    "adam_beta2": "training.adam_beta2",
    "max_grad_norm": "training.max_grad_norm",
    "lr_scheduler_kwargs": "training.lr_scheduler_kwargs",
    "per_device_train_batch_size": "training.per_device_train_batch_size",
    "torch_compile": "training.torch_compile",
    "save_total_limit": "training.save_total_limit",
    "dataloader_num_workers": "training.dataloader_num_workers",
    "deepspeed": "training.training_arguments.deepspeed",
    "ddp_backend": "training.training_arguments.ddp_backend",
    "ddp_timeout": "training.training_arguments.ddp_timeout",
    "adam_epsilon": "training.training_arguments.adam_epsilon",
}
# Defaults of both tools that differ from ELO's.
DEFAULTS: dict[Tool, dict[str, Any]] = {
    "llamafactory": {
        "cutoff_len": 2048,
        "per_device_train_batch_size": 8,
        "num_train_epochs": 3,
        "learning_rate": 5e-5,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "adam_beta2": 0.999,
        "bf16": False,
        "gradient_checkpointing": True,
        "finetuning_type": "lora",
        "lora_rank": 8,
        "freeze_trainable_layers": 2,
    },
    "axolotl": {"cutoff_len": 512, "num_train_epochs": 1, "adam_beta2": 0.999, "seed": 42},
}
PARTS = {"embed_tokens": "embedding", "wte": "embedding", "lm_head": "head", "norm": "norm"}
UNNEEDED = {
    *("do_train", "overwrite_cache", "overwrite_output_dir", "plot_loss", "include_num_input_tokens_seen"),
    *("per_device_eval_batch_size", "eval_batch_size", "preprocessing_batch_size", "streaming", "buffer_size"),
    *("model_type", "tokenizer_type", "dataset_prepared_path", "pad_to_sequence_len", "eval_sample_packing"),
    *("flash_attn", "flash_attention", "gradient_checkpointing_kwargs", "use_fast_tokenizer", "use_reentrant_gc"),
    *("low_cpu_mem_usage", "tf32", "strict", "shuffle_merged_datasets", "train_on_inputs", "save_safetensors"),
    *("fsdp_version", "run_name", "wandb_name", "infer_backend", "tokenizer_use_fast", "auto_resume_from_checkpoints"),
    *("pretrain_multipack_attn", "dataset_dir", "media_dir", "save_only_model", "eval_strategy", "save_strategy"),
}
# Reason why ELO cannot express a setting: patterns of its names.
WHY: dict[str, tuple[str, ...]] = {
    "ELO starts from whole models; merge the adapter into its base first": ("adapter_name_or_path", "lora_model_dir"),
    "ELO has no limit on documents; shorten the files, or write `tokens`": ("max_samples",),
    "ELO's weights are passes over a corpus, not shares; set `weight` for each corpus": ("interleave_probs",),
    "ELO always interleaves all corpora; set `weight` and `data.replay_ratio`": ("mix_strategy",),
    "ELO trains in bf16 or fp32; this file trains in fp32 unless bf16 is set": ("fp16",),
    "ELO keeps fp32 master weights of what trains; write `training.bf16: true` for bf16 autocast": ("pure_bf16",),
    "ELO does not train over quantised weights; estimate the memory with `elo plan`": (
        "quantization_bit",
        "load_in_4bit",
        "load_in_8bit",
    ),
    "ELO's adapters are scaled by alpha / rank; multiply `method.alpha` by the square root of the rank": (
        "use_rslora",
    ),
    "ELO trains plain low-rank adapters": ("use_dora",),
    "extend the vocabulary first with `elo vocab extend`": ("resize_vocab", "add_tokens", "tokens"),
    "ELO uses the tokenizer's own special tokens": ("special_tokens",),
    "ELO trains on plain documents, without a chat template": ("template", "chat_template"),
    "ELO shards with FSDP2, one unit for each decoder layer (docs/launching.md)": ("fsdp_config",),
    "ELO measures `training.evaluations` times a phase": ("eval_steps", "evals_per_epoch"),
    "ELO saves every `training.save_steps` updates": ("saves_per_epoch",),
    "ELO trains its whole budget, so that methods stay comparable": ("early_stopping_patience",),
    "it names datasets instead of files; write `data.heldout`": ("eval_dataset",),
    "ELO adds no noise to embeddings": ("neftune_noise_alpha",),
    "ELO reads the main revision; download the other one and give its folder": ("revision_of_model", "model_revision"),
    "ELO has its own head loss and attention (docs/performance.md)": (
        "liger_*",
        "plugins*",
        "lora_mlp_kernel*",
        "lora_qkv_kernel*",
        "lora_o_kernel*",
        "unsloth_*",
        "use_unsloth*",
        "use_kernels*",
    ),
    "ELO trains on text alone": ("image_*", "video_*", "freeze_vision*", "freeze_multi*", "processor_type*"),
    "ELO takes the optimizers of transformers; see `training.optim`": (
        "galore_*",
        "use_galore*",
        "apollo_*",
        "use_apollo*",
        "badam_*",
        "use_badam*",
        "use_muon*",
        "use_adam_mini*",
    ),
    "ELO writes whole models in any case; measure them with `elo evaluate`": ("export_*", "do_predict*", "predict_*"),
}

"""What a user may have meant: keys and values of a configuration under other names."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from tutelage.config.keys import KEYS, kinds_at, split_location

_NAMES_OF_KEYS = {
    "learning_rate": ("lr",),
    "weight_decay": ("wd",),
    "max_grad_norm": ("clip_grad", "grad_clip", "max_norm"),
    "warmup_steps": ("warmup", "warmup_ratio"),
    "schedule": ("scheduler", "lr_scheduler", "lr_scheduler_type"),
    "num_steps": ("steps", "max_steps", "epochs", "num_epochs", "num_train_epochs"),
    "prompts_per_step": ("batch_size", "train_batch_size"),
    "micro_batch_size": ("per_device_train_batch_size",),
    "micro_batch_tokens": ("gradient_accumulation_steps",),
    "max_new_tokens": ("max_tokens", "max_length", "max_completion_length"),
    "max_prompt_tokens": ("max_prompt_length",),
    "num_samples": ("n", "num_generations"),
    "temperature": ("temp",),
    "rank": ("r", "lora_r", "lora_rank"),
    "alpha": ("lora_alpha",),
    "dropout": ("lora_dropout",),
    "quantization": ("bits", "load_in_4bit", "load_in_8bit"),
    "dtype": ("precision", "torch_dtype", "bf16", "fp16"),
    "model": ("name", "model_name", "model_name_or_path"),
    "student.model": ("student_model",),
    "teacher.model": ("teacher_model", "teacher_model_name_or_path"),
    "activation_checkpointing": ("gradient_checkpointing",),
    "beta2": ("betas",),
    "engine.kind": ("use_vllm",),
    "path": ("dataset", "file"),
    "out": ("output", "output_dir", "resume", "resume_from_checkpoint"),
    "trackers": ("report_to",),
    "checkpoint_every": ("save_steps",),
    "evaluation.every": ("eval_steps", "eval_every"),
    "keep_checkpoints": ("save_total_limit", "keep_last"),
    "keep_best": ("metric_for_best_model", "load_best_model_at_end"),
    "stop_when.patience": ("early_stopping", "early_stopping_patience"),
    "keep": ("ratio", "fraction"),
    "kind": ("loss",),
}
OTHER_NAMES = {name: key for key, names in _NAMES_OF_KEYS.items() for name in names}
"""Keys of this project by their names in other projects."""
_NAMES_OF_VALUES = {
    "kl": ("reverse_kl", "rkl", "forward_kl", "fkl"),
    "sampled": ("k1",),
    "jsd": ("gkd",),
    "tropd": ("trust_region",),
    "grpo": ("dapo", "dr_grpo", "policy_gradient", "rl"),
    "opsa": ("sharpening", "self_sharpening", "teacher_free"),
    "soft_or": ("tip",),
    "all": ("none",),
    "none": ("off",),
    "float32": ("fp32", "float"),
    "bfloat16": ("bf16",),
    "float16": ("fp16", "half"),
    "8bit": ("int8", "8"),
    "4bit": ("int4", "nf4", "4"),
    "transformers": ("hf",),
    "file": ("jsonl", "parquet", "hub", "dataset"),
    "math": ("boxed",),
    "cuda": ("gpu",),
}
_OTHER_VALUES = {name: value for value, names in _NAMES_OF_VALUES.items() for name in names}
_FORWARD_KL = " with objective.reverse_weight=0 and objective.forward_weight=1"


def did_you_mean_value(value: object, allowed: Sequence[str]) -> str:
    """The allowed word that a value stands for, as a question; empty without one."""
    word = str(value).lower().replace("-", "_")
    meant = _OTHER_VALUES.get(word)
    if meant not in allowed:
        meant = next(iter(difflib.get_close_matches(word, allowed, 1)), None)
    extra = _FORWARD_KL if meant == "kl" and word in ("forward_kl", "fkl") else ""
    return f" Did you mean {meant!r}{extra}?" if meant else ""


def did_you_mean_key(parents: Sequence[str], name: str) -> str:
    """The key that an unknown one stands for, as a question, or the keys that there are.

    Args:
        parents: the tables that the unknown key is in, with the tag of a union after its name.
        name: the unknown key.
    """
    if found := owners(parents, name):
        return f" It belongs to {found}."
    known = kinds_at(parents)[0].keys
    word = name.lower().replace("-", "_")
    if OTHER_NAMES.get(word) in known:
        return f" Did you mean {OTHER_NAMES[word]!r}?"
    near = difflib.get_close_matches(word, known, 1)
    other = find_key(word)
    if near and not (other and word in OTHER_NAMES):
        return f" Did you mean {near[0]!r}?"
    return f" Did you mean {other!r}?" if other else f" Known keys: {', '.join(known)}."


def find_key(name: str) -> str | None:
    """The dotted key of the configuration that a name stands for, with or without its table."""
    table, dot, last = name.rpartition(".")
    by_name = {key.rpartition(".")[2]: key for key in reversed(KEYS)}
    other = OTHER_NAMES.get(last, last)
    for meant in (name, f"{table}{dot}{other}", other):
        if meant in KEYS:
            return meant
        if not dot and meant in by_name:
            return by_name[meant]
    near = difflib.get_close_matches(name, by_name, 1, 0.8) if not dot else []
    return by_name[near[0]] if near else None


def owners(parents: Sequence[str], name: str) -> str:
    """The kinds of the same table that have a key, such as "objective.kind jsd"; empty: none."""
    table, kinds = kinds_at(parents)
    tags = [tag for tag, kind in kinds.items() if tag and name in kind.keys]
    keys, _ = split_location(parents)
    return f"{'.'.join(keys)}.{table.tag_key} {', '.join(tags)}" if tags else ""

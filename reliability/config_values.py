"""Every key of a configuration and values to draw for it: usable, odd and unusable ones."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_args, get_type_hints

from tutelage.config.keys import KEYS
from tutelage.config.method import ObjectiveConfig, WeightingConfig
from tutelage.config.sampling import EngineConfig
from tutelage.config.selection import SelectionConfig

Keys = dict[str, tuple[str, ...]]


def members(union: Any, tag: str) -> Keys:
    """Each name that `tag` may have in a discriminated union, and the keys beside it."""
    found: Keys = {}
    for kind in get_args(get_args(union)[0]):
        keys = tuple(field.name for field in fields(kind) if field.name != tag)
        for name in get_args(get_type_hints(kind)[tag]):
            found[name] = keys
    return found


SELECTIONS = members(SelectionConfig, "rule")
OBJECTIVES = members(ObjectiveConfig, "kind")
WEIGHTINGS = members(WeightingConfig, "kind")
ENGINES = members(EngineConfig, "kind")
FILE_KEYS = ("split", "subset", "prompt_column", "answer_column", "suffix", "enable_thinking",
             "max_prompt_tokens", "grader", "num_held_out")  # fmt: skip
LEDGER_KEYS = ("num_items",)
CONVERSATION_KEYS = ("max_turns", "max_turn_tokens", "max_inserted_tokens", "tool_timeout_s",
                     "tool_format")  # fmt: skip

Values = tuple[list[Any], list[Any], list[Any]]
_HUGE = 1 << 62
VALUES: dict[str, Values] = {
    "student.dtype": (["float32", "bfloat16"], [], ["float8"]),
    "student.num_layers": ([1, 2], [_HUGE], [0, -1, 99]),
    "student.activation_checkpointing": ([True, False], [1], ["yes"]),
    "student.layers": (["transformers"], ["liger"], ["fused"]),
    "student.quantization": (["none", "none", "8bit"], ["4bit"], ["3bit"]),
    "student.lora.rank": ([1, 4], [1000], [0, 10**13]),
    "student.lora.alpha": ([8.0, 32], [1e-30, 65536], [0.0, -1, 1e30]),
    "student.lora.dropout": ([0.0, 0.3], [0.999999], [1.0, -0.1]),
    "student.lora.target_modules": (
        [[], ["q_proj", "v_proj"]], [["lm_head"], ["norm"], ["q_proj", "no_such_layer"]],
        [["no_such_layer"], "q_proj", [1]],
    ),
    "student.sharding": (["none", "fsdp2"], [], ["fsdp1", True]),
    "student.sharding_group_size": ([0], [2, _HUGE], [1, -1]),
    "teacher.dtype": (["float32", "bfloat16", "float16"], [], ["float64"]),
    "teacher.mode": (["resident", "offload", "reload"], [], ["away"]),
    "teacher.quantization": (["none", "none", "8bit"], ["4bit"], ["2bit"]),
    "teacher.hidden_budget_bytes": ([0, 1, 1 << 20], [_HUGE], [-1]),
    "teacher.vocabulary": (["same"], ["aligned"], ["other"]),
    "teacher.stop_token": (["map", "refuse", "class"], [], ["keep"]),
    "teacher.sharding": (["none", "fsdp2", "tp"], [], ["ddp", True]),
    "teacher.sharding_group_size": ([0], [2, _HUGE], [1, -1]),
    "data.num_items": ([1, 2, 5], [16], [0, 17]),
    "data.split": (["train", "test"], ["no such split", ""], [3]),
    "data.subset": (["main"], [""], [3]),
    "data.prompt_column": (["prompt"], ["answer", ""], ["no_such_column"]),
    "data.answer_column": (["answer", "no_such_column"], ["prompt", ""], [1]),
    "data.suffix": (["", "1"], ["\n", "\u2028 \u00e9 \U0001f600", "x" * 3000], [2]),
    "data.enable_thinking": ([True, False], [], ["on"]),
    "data.max_prompt_tokens": ([0, 40, 4096], [_HUGE], [-1, 1]),
    "data.grader": (["none", "number", "math", "exact"], [], ["judge"]),
    "data.max_turns": ([1, 4, 8], [1 << 20], [0, _HUGE]),
    "data.max_turn_tokens": ([0, 8, 48], [_HUGE], [-1]),
    "data.max_inserted_tokens": ([64, 256], [1, 1 << 20], [0, _HUGE]),
    "data.tool_timeout_s": ([5.0, 10], [3600], [0.0, -1, 4000]),
    "data.tool_format": (["auto", "json"], ["hermes", "llama3"], ["xml"]),
    "data.num_held_out": ([1, 4], [11], [-1, 0, 1000]),
    "sampling.temperature": ([1.0, 0.7, 0], [1e-30, 1e9], [-1.0, "inf", 1e30, 1e-320]),
    "sampling.top_p": ([1.0, 0.9], [1e-30, 0.9999999999], [0.0, 1.5]),
    "sampling.top_k": ([0, 5, 100000], [1, _HUGE], [-1]),
    "sampling.max_new_tokens": ([1, 6, 10], [300], [0, 1 << 21]),
    "sampling.num_samples": ([1, 2, 3], [40], [0, 1 << 40]),
    "selection.keep": ([0.5, 1.0, 0.001], [1e-30, 0.9999999999], [0.0, 50]),
    "selection.scope": (["completion", "batch"], [], ["prompt"]),
    "selection.normalization": (
        ["minmax_p98", "minmax", "minmax_p98_both", "quantile_05_95"], [], ["none"],
    ),
    "selection.correct_sampling": ([True, False], [], ["maybe"]),
    "selection.num_tokens": ([1, 3, 1000], [_HUGE], [0]),
    "selection.b": ([0.0, 0.5, 1.0], [1e-30, 0.9999999999], [-0.1, 1.5]),
    "selection.combine": (["none", "soft_or", "soft_and"], [], ["or"]),
    "selection.usefulness": (["soft_or", "teachability"], [], ["q3"]),
    "selection.end": (["max", "min", "both"], [], ["top"]),
    "objective.reverse_weight": ([1.0, 0.5], [1e-30, 1e9], [-1.0, 1e300]),
    "objective.forward_weight": ([0.5, 1.0], [1e-30, 1e9], [-0.5, 1e30]),
    "objective.teacher_weight": ([0.5, 0.1], [1e-30, 0.9999999999], [0.0, 1.0]),
    "objective.alpha": ([0.0, 0.1, 0.9], [1e-30, 0.9999999999], [1.0]),
    "objective.direction": (["reverse", "forward"], [], ["both"]),
    "objective.k": ([1, 16, 100000], [_HUGE], [0]),
    "objective.support": (["teacher", "student"], [], ["both"]),
    "objective.clip": ([0.2], [1e-30, 1e9], [0.0, 1e300]),
    "objective.old_logprobs": (["sampler", "step"], [], ["now"]),
    "objective.scale": (["std", "none"], [], ["var"]),
    "objective.clip_low": ([0.2], [1e-30, 1.0], [0.0, 1.5]),
    "objective.clip_high": ([0.2, 0.28], [1e-30, 1e9], [0.0, 1e300]),
    "objective.distillation_weight": ([0.0, 1.0], [1e-30, 1e9], [-1.0, 1e300]),
    "objective.estimator": (["exact", "sampled"], [], ["k3"]),
    "objective.fkl": (["full", "topk_tail", "topk_renorm"], [], ["top"]),
    "objective.gate": (["hard", "soft", "percentile"], [], ["open"]),
    "objective.threshold": ([0.8, 0.0], [1e9, 1.0], [-1.0, 1e300]),
    "objective.width": ([0.1], [1e-30, 1e9], [0.0, 1e-320]),
    "weighting.outside": ([0.0, 0.01], [1e-30, 1e9], [-0.1, 1e300]),
    "weighting.drop": ([0.0, 0.2, 0.9], [0.9999999999], [1.0]),
    "weighting.beta": ([0.1, 1.0], [1e-30, 1e9], [0.0, 1e-320]),
    "optimizer.kind": (
        ["adamw", "adamw_on_disk", "adamw_8bit", "adafactor"], [], ["paged_adamw_8bit", "sgd"],
    ),
    "optimizer.offload": ([True, False], [], ["disk"]),
    "optimizer.learning_rate": ([1e-3, 1e-6, 10.0], [1e-30, 5.0], [0.0, -1.0, 11, 1e30, "nan"]),
    "optimizer.schedule": (["constant", "linear", "cosine"], [], ["step"]),
    "optimizer.warmup_steps": ([0, 1, 50], [_HUGE], [-1]),
    "optimizer.weight_decay": ([0.0, 0.1], [100, 0.999], [-0.1, 1e300]),
    "optimizer.decay_all": ([True, False], [], ["all"]),
    "optimizer.beta1": ([0.9, 0.0], [0.9999999999], [1.0]),
    "optimizer.beta2": ([0.95, 0.999], [0.0, 0.9999999999], [1.0]),
    "optimizer.max_grad_norm": ([1.0, 0.0], [1e-30, 1e9], [-1.0, 1e300]),
    "evaluation.num_problems": ([0, 1, 3, 1000], [], [-1, 1 << 40]),
    "evaluation.num_samples": ([1, 2], [40], [0, 1 << 40]),
    "evaluation.every": ([0, 1], [_HUGE], [-1]),
    "evaluation.temperature": ([0.0, 1.0], [1e-30, 1e9], [-1.0, "inf", 1e-320]),
    "evaluation.top_p": ([1.0, 0.5], [1e-30], [0.0]),
    "evaluation.teacher": ([True, False], [], ["once"]),
    "stop_when.metric": (["none", "held_out_reverse_kl_nats"], ["pass_at_k"], ["loss"]),
    "stop_when.patience": ([0, 1], [_HUGE], [-1]),
    "stop_when.value": ([0.5], [0.0, 1e9], [-1.0, "inf"]),
    "recording.every": ([0, 1], [_HUGE], [-1]),
    "recording.num_prompts": ([0, 2], [1000], [-1, 1 << 40]),
    "recording.num_rollouts": ([0, 2], [_HUGE], [-1]),
    "recording.max_new_tokens": ([4, 8], [300], [0, 1 << 40]),
    "recording.max_bytes": ([1, 6_000_000], [_HUGE], [0]),
    "seed": ([0, 7], [-3, _HUGE], [1.5, 1 << 63]),
    "num_steps": ([1, 3], [_HUGE], [0]),
    "prompts_per_step": ([2, 4], [40], [0, 3 << 20]),
    "updates_per_step": ([1, 2], [], [0, 7]),
    "micro_batch_tokens": ([0, 64, 4096], [1, _HUGE], [-1, 1 << 70]),
    "micro_batch_size": ([1, 3, 64], [_HUGE], [0]),
    "micro_batches": (["padded", "padded", "packed"], [], ["stacked"]),
    "sampling_batch_size": ([1, 2, 64], [_HUGE], [0]),
    "scoring": (["recorded", "forward"], [], ["none"]),
    "diagnostics": (["all", "kept"], [], ["some"]),
    "quadrant_thresholds": (["median", [0.5, 0.1]], [[-1.0, 1e9]], [[0.5], "mean", [0.1, 1e300]]),
    "renormalize": ([True, False], [], ["off"]),
    "checkpoint_every": ([0, 1], [_HUGE], [-1]),
    "checkpoint_writer": (["auto", "thread", "inline"], [], ["later"]),
    "keep_checkpoints": ([1, 2], [_HUGE], [0]),
    "keep_best": (["none", "held_out_reverse_kl_nats"], ["mean_at_k"], ["loss", True]),
    "max_skipped_steps": ([1, 3], [_HUGE], [0]),
    "process_timeout_s": ([600], [5, _HUGE], [4, -1]),
    "num_threads": ([1], [], [-1, 1 << 40]),
    "device": (["cpu", "auto"], ["cuda"], ["tpu", ""]),
    "trackers": ([[]], [["tensorboard"], ["wandb"]], [["mlflow"], "wandb"]),
}  # fmt: skip
"""Usable, odd and unusable values of each key. Odd ones are refused or trained, as `check` says;
a few usable ones are so in some configurations only."""
CHOSEN_WITH_MODELS = (
    *("student.model", "teacher.model", "data.kind", "data.path", "data.chat"),
    *("selection.rule", "objective.kind", "weighting.kind", "out"),
)
"""Keys that every configuration has, or that depend on the pair of models."""
_VERIFIERS = "needs the library verifiers, which has an environment of its own"
_LONG = "needs a model that takes the tools of shopping or travel, thousands of tokens"
_SERVED = "needs a server of a teacher"
_OTHER = "belongs to another kind of the table, whose runs kill_stored and tests of the kind try"
ALWAYS_REFUSED: dict[str, tuple[str, list[Any]]] = {
    "data.environment": (_VERIFIERS, ["some-environment", ""]),
    "data.arguments": (_VERIFIERS, [{"a": 1}, 3]),
    "data.python": (_VERIFIERS, ["/no/such/python", 1]),
    "data.num_tasks": (_VERIFIERS, [8, -1]),
    "data.success_reward": (_VERIFIERS, [0.5, "all"]),
    "data.renderer": (_VERIFIERS, ["auto", 1]),
    "data.num_concurrent": (_VERIFIERS, [4, 0]),
    "data.timeout_s": (_VERIFIERS, [5.0, 0]),
    "data.level": (_LONG, [1, 3, 9]),
    "data.num_products": (_LONG, [60, 10]),
    "data.max_items": (_LONG, [2, 9]),
    "engine.max_model_len": ("needs vLLM, which has an environment of its own", [64, -1]),
    "engine.gpu_memory_utilization": ("needs vLLM, which has an environment of its own", [0.5, 2]),
    "engine.max_logprob_gap": ("needs vLLM, which has an environment of its own", [0.1, 0.0]),
    "engine.urls": (
        "needs a server of vLLM",
        [
            *([url] for url in ("http://127.0.0.1:9", "127.0.0.1", "ftp://x", "http://[")),
            *(["http://127.0.0.1:99999999"], ["http://127.0.0.1:9"] * 2, [], "http://127.0.0.1:9"),
        ],
    ),
    "engine.transfer": ("needs a server of vLLM", ["folder", "nccl", "ipc"]),
    "engine.min_replicas": ("needs a server of vLLM", [1, 0, -1, 9]),
    "engine.max_staleness": ("needs a server of vLLM", [1, 0, 2, -1]),
    "engine.folder": ("needs a server of vLLM", ["handed-over", ""]),
    "engine.num_concurrent": ("needs a server of vLLM", [1, 0, _HUGE]),
    "teacher.kind": (_SERVED, ["hidden_server", "server", 3]),
    "teacher.url": (_SERVED, ["http://127.0.0.1:9", ["http://127.0.0.1:9"], [], "ftp://x", 3]),
    "teacher.server": (_SERVED, ["tutelage", "vllm", "sglang"]),
    "teacher.payload": (_SERVED, ["float32", "bfloat16", "float8"]),
    "teacher.num_concurrent": (_SERVED, [1, 0, -1]),
    "teacher.timeout_s": (_SERVED, [5.0, 0]),
    "teacher.served_name": (_SERVED, ["a-model", 3]),
    "teacher.logprob_url": (_SERVED, ["http://127.0.0.1:9", 3]),
    "teacher.api": (_SERVED, ["completions", "openai"]),
    "teacher.num_logprobs": (_SERVED, [8, 0]),
    "teacher.context": (_OTHER, ["{answer}", "{", 3]),
    "teacher.ema_decay": (_OTHER, [0.9, 1.0, -1]),
    "teacher.weights": (_OTHER, ["frozen", "ema", "other"]),
    "teachers": (_OTHER, [{"code": {}}, {"code": 3}, 3]),
    "data.teacher_column": (_OTHER, ["teacher", 3]),
    "rollouts.source": (_OTHER, ["other", 3]),
    "rollouts.path": (_OTHER, ["no-such-file.jsonl", 3]),
    "rollouts.on_policy_share": (_OTHER, [0.5, 2]),
    "rollouts.max_bytes": (_OTHER, [1, -1]),
    "rollouts.teacher_prefix_steps": (_OTHER, [3, -1]),
    "rollouts.teacher_prefix_tokens": (_OTHER, [2, -1]),
    "rollouts.teacher_states": (_OTHER, ["float32", "float8"]),
}
"""Keys that are drawn here in refused configurations alone: why, and values."""
LABELS = [
    *VALUES,
    *("data.path", "data.chat", "data.kind=file", "data.kind=ledger", "data.kind=ledger_tools",
      "data.kind=coins"),
    *(f"selection={name}" for name in SELECTIONS),
    *(f"objective={name}" for name in OBJECTIVES),
    *(f"weighting={name}" for name in WEIGHTINGS),
]  # fmt: skip
"""What has to be met often among the accepted configurations."""


def forgotten() -> list[str]:
    """Keys of the configuration that no trial draws, and drawn ones that no configuration has."""
    drawn = {*VALUES, *CHOSEN_WITH_MODELS, *ALWAYS_REFUSED, "engine.kind"}
    return sorted(drawn ^ set(KEYS))

"""Every causal architecture of transformers, tiny: exact from loading to resuming, or refused.

A student and a teacher are built from an architecture's own configuration, shrunk, with random
weights and a tokenizer shaped like its family's. They are loaded as a run loads them. What is not
refused in one line samples in padded batches and each prompt alone, is compared with its own plain
forward pass, trains two steps with two samples a prompt, is saved, loaded again, and resumed.
"""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tutelage.config.parse import parse_config
from tutelage.config.sampling import SamplingConfig
from tutelage.config.schema import Config
from tutelage.data.batch import collate
from tutelage.data.types import Prompt, Rollout
from tutelage.errors import TutelageError
from tutelage.models.llama_cpu.layers import is_fast_family
from tutelage.models.load import load_model, load_tokenizer
from tutelage.models.tiny import Architecture, save_tiny_model, tiny_tokenizer
from tutelage.rollout import slots as rows_module
from tutelage.rollout.request import RolloutRequest
from tutelage.rollout.sampler import TransformersSampler
from tutelage.setup.components import Components, build_components
from tutelage.train.loop import train

from .record import Outcome

IMAGES_AND_TEXT = (
    "aria", "idefics3", "internvl", "llava", "mistral3", "qwen2_5_vl", "qwen3_vl", "smolvlm",
)  # fmt: skip
"""Types that transformers has no causal class for, but one of images and text."""
SHORT = (
    "bart", "bert", "bert-generation", "falcon_h1", "gemma3_text", "gpt2", "gpt_oss", "lfm2",
    "llama", "llama4_text", "mamba", "mllama", "openai-gpt", "qwen3", "recurrent_gemma", "smolvlm",
    "xlm", "xmod",
)  # fmt: skip
"""A tenth of the architectures: every way to decode, every kind of tokenizer, every refusal."""
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
GIVEN: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {**_ROPE, "mrope_section": [2, 3, 3]},
            "sliding_attention": {**_ROPE, "mrope_section": [2, 3, 3]},
        }
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "hunyuan_v1_dense": {"head_dim": 128, "num_key_value_heads": 8},
    "hunyuan_v1_moe": {"head_dim": 128, "num_key_value_heads": 8},
    "bamba": {"attn_layer_indices": [3, 7]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 16},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"head_dim": 128, "num_key_value_heads": 8},
    "qwen2_5_vl": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [16, 24, 24]}}},
}
"""What a published configuration of a type says and its class leaves open."""
LARGEST = 8_000_000
"""Parameters up to which a shrunk model counts as tiny."""
TOLERANCE_NATS = 5e-4
PROMPTS = [Prompt("a", "7+5"), Prompt("b", "What is left of nine?"), Prompt("c", "to be")]
_SAMPLING = SamplingConfig(max_new_tokens=12, num_samples=2)


@dataclass
class Case:
    """What became of an architecture."""

    name: str
    class_name: str = ""
    result: str = "not built"
    """exact, refused, not built or BROKEN."""
    decoding: str = ""
    tokenizer: str = ""
    message: str = ""
    gaps: dict[str, float] = field(default_factory=dict)
    """Largest differences in nats."""


def names() -> list[str]:
    """Model types of all causal architectures, and some of images and text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as causal

    return sorted({*causal, *IMAGES_AND_TEXT})


def run(size: int) -> Outcome:
    """Take `size` architectures through everything; 0 takes all."""
    chosen = list(SHORT[:size]) if size else names()
    with quiet():
        if size:
            cases = [through(name) for name in chosen]
        else:  # in processes of their own, for one may crash
            with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
                cases = list(pool.map(_through_quietly, chosen))
        control = seen_of_wrong_code()
    return summary(cases, control)


def summary(cases: Sequence[Case], control: dict[str, int]) -> Outcome:
    """What all cases together say."""
    results = Counter(case.result for case in cases)
    tried = [case for case in cases if case.result != "not built"]
    return Outcome(
        "a causal architecture of transformers gives what its own plain forward pass gives, from "
        "loading to resuming, or is refused in one line when it is loaded",
        len(tried),
        results["BROKEN"],
        control,
        {
            "results": dict(sorted(results.items())),
            "largest_gap_nats": max((g for case in cases for g in case.gaps.values()), default=0.0),
            "cases": {case.name: _table(case) for case in cases},
        },
        is_sample=False,
    )


def _table(case: Case) -> dict[str, Any]:
    values = {k: v for k, v in vars(case).items() if k not in ("name", "gaps") and v}
    return values | ({"largest_gap_nats": max(case.gaps.values())} if case.gaps else {})


@contextmanager
def quiet() -> Iterator[None]:
    """Without what configurations say of their defaults, and with the random numbers as before."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def in_memory() -> Iterator[Path]:
    """A temporary folder where waiting for a disk costs nothing, if there is such a place."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="tutelage-family-", dir=memory) as name:
        yield Path(name)


def _through_quietly(name: str) -> Case:
    torch.set_num_threads(1)
    with quiet():
        case = through(name)
    print(case, file=sys.stderr, flush=True)
    return case


def through(name: str) -> Case:
    """Everything with one architecture."""
    case = Case(name)
    with in_memory() as folder:
        try:
            case.class_name = make_pair(name, folder, case)
        except Exception as error:
            case.message = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            return case
        try:
            judge(case, folder)
        except TutelageError as error:
            case.result, case.message = "BROKEN", f"refused late: {error}"
        except Exception as error:  # a crash is what is looked for
            text = " ".join(str(error).split())[:300]
            case.result, case.message = "BROKEN", f"{type(error).__name__}: {text}"
    return case


def make_pair(name: str, folder: Path, case: Case) -> str:
    """Write a student and a teacher; the name of their class."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.for_model(name, **GIVEN.get(name, {}))
    known = (AutoModelForCausalLM._model_mapping, AutoModelForImageTextToText._model_mapping)
    if not any(type(config) in mapping for mapping in known):
        config = config.get_text_config()
    tokenizer, case.tokenizer, is_cut = shaped(name)
    rows = (260, 260) if is_cut else (267, 395)
    kind = ""
    for seed, who in enumerate(("student", "teacher")):
        found = Architecture(config, "a test", is_base=False)
        kind = save_tiny_model(found, rows[seed], seed, folder / who, tokenizer)
        size = (folder / who / "model.safetensors").stat().st_size // 4
        if size > LARGEST:
            raise ValueError(f"{size} parameters are not tiny")
        # Several tokens end a text, some of them ordinary, so that completions differ in length.
        stops = {"eos_token_id": [tokenizer.eos_token_id, *range(0, 256, 12)]}
        (folder / who / "generation_config.json").write_text(json.dumps(stops))
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"id": p.id, "prompt": p.content}) + "\n" for p in PROMPTS)
    )
    return kind


def shaped(name: str) -> tuple[Any, str, bool]:
    """A tokenizer like the family's, what is special about it, and whether ids lie beyond heads."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    if name.startswith(("gpt", "opt", "bloom", "codegen", "mpt", "phi", "starcoder", "openai")):
        tokenizer.pad_token, tokenizer.bos_token = None, tokenizer.eos_token
        return tokenizer, "no pad", False
    is_cut = name.startswith(("gemma", "paligemma", "recurrent", "vault"))
    if is_cut or name.startswith(
        ("llama", "mistral", "ministral", "mixtral", "cohere", "deepseek")
    ):
        tokenizer.add_special_tokens({"bos_token": "<s>"})
        start = ("<s>", tokenizer.convert_tokens_to_ids("<s>"))
        template = TemplateProcessing(single="<s> $A", special_tokens=[start])
        tokenizer.backend_tokenizer.post_processor = template
        if is_cut:
            tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)
            return tokenizer, "bos by template, an id beyond the head", True
        tokenizer.pad_token = None
        return tokenizer, "bos by template, no pad", False
    return tokenizer, "pad and several eos", False


def settings(folder: Path, out: str, **changes: Any) -> Config:
    """A run of two steps with two samples a prompt."""
    table: dict[str, Any] = {
        "student": {"model": str(folder / "student")},
        "teacher": {"model": str(folder / "teacher")},
        "data": {
            "kind": "file",
            "path": str(folder / "prompts.jsonl"),
            "num_held_out": 0,
            "chat": False,
            "grader": "none",
        },
        "sampling": {"max_new_tokens": 12, "num_samples": 2},
        "optimizer": {"learning_rate": 1e-3, "schedule": "constant"},
        "evaluation": {"num_problems": 0},
        "num_steps": 2,
        "prompts_per_step": 3,
        "checkpoint_every": 1,
        "keep_checkpoints": 2,
        "device": "cpu",
        "out": str(folder / out),
    }
    return parse_config(table | changes)


def judge(case: Case, folder: Path) -> None:
    """Fill in what became of it."""
    try:
        components = build_components(settings(folder, "run"))
    except TutelageError as error:
        is_line = "\n" not in str(error)
        case.result, case.message = ("refused" if is_line else "BROKEN"), str(error)
        case.message = case.message.replace(f"student {str(folder / 'student')!r}", "student")
        return
    model = components.student.model
    form = type(rows_module.slots_for(model, 0)).__name__
    case.decoding = "by hand" if is_fast_family(model) else form.removesuffix("Slots").lower()
    with torch.no_grad():
        rollouts = sampled(case, components)
        compared(case, components, rollouts)
    trained(case, folder)
    worst = max(case.gaps.values())
    case.result = "exact" if worst <= TOLERANCE_NATS and not case.message else "BROKEN"


def sampled(case: Case, components: Components) -> list[Rollout]:
    """Rollouts of padded batches, the same as those of each prompt alone."""
    model, tokenizer = components.student.model, components.tokenizer
    request = RolloutRequest(PROMPTS, _SAMPLING, (1,))
    together = TransformersSampler(model, tokenizer, 4).sample(request)
    single = TransformersSampler(model, tokenizer, 1)
    alone = [
        rollout
        for prompt in PROMPTS
        for rollout in single.sample(replace(request, prompts=[prompt]))
    ]
    if [r.completion_ids for r in together] != [r.completion_ids for r in alone]:
        case.message = "other tokens in a padded batch than alone"
    case.gaps["padded"] = largest([r.logprobs for r in together], [r.logprobs for r in alone])
    return together


def compared(case: Case, components: Components, rollouts: Sequence[Rollout]) -> None:
    """Log-probabilities and divergences are those of plain forward passes of both models."""
    plain = [
        plain_rows(components.student.model, r, components.student.vocab_size) for r in rollouts
    ]
    logprobs = [
        p.gather(1, torch.tensor(r.completion_ids)[:, None])[:, 0].tolist()
        for p, r in zip(plain, rollouts, strict=True)
    ]
    case.gaps["drawn"] = largest([r.logprobs for r in rollouts], logprobs)
    with components.teacher.on_device():
        batch = collate(rollouts, 0)
        stats = components.student(batch, components.teacher.forward(batch))
        wanted = [
            plain_rows(components.teacher.model, r, components.student.vocab_size) for r in rollouts
        ]
    p, q = torch.cat(plain), torch.cat(wanted)
    case.gaps["divergence"] = gap(stats.reverse_kl, (p.exp() * (p - q)).sum(-1))
    tokens = batch.tokens[:, None]
    case.gaps["scored"] = gap(stats.log_p, p.gather(1, tokens)[:, 0])


def plain_rows(model: Any, rollout: Rollout, vocab_size: int) -> Tensor:
    """Log-probabilities `[T, V]` by the model's own forward pass over one sequence."""
    ids = torch.tensor([[*rollout.prompt_ids, *rollout.completion_ids]])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(rollout.prompt_ids) - 1 : -1]
    return logits[:, :vocab_size].double().log_softmax(-1)


def gap(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference."""
    return float((ours.double() - theirs.double()).abs().max())


def largest(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float:
    """Largest difference of two ragged lists; infinite where their lengths differ."""
    gap = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if len(a) != len(b):
            return math.inf
        gap = max(gap, *(abs(x - y) for x, y in zip(a, b, strict=True)))
    return gap


def trained(case: Case, folder: Path) -> None:
    """Two steps, and the second again from a checkpoint, lead to the same weights, which load."""
    seen: list[dict[str, Any]] = []
    train(settings(folder, "whole"), log=lambda _: None, on_step=seen.append)
    shutil.copytree(folder / "whole", folder / "parts")
    for later in ("checkpoint-000002", "student"):  # as if it had stopped after the first step
        shutil.rmtree(folder / "parts" / later)
    train(settings(folder, "parts"), log=lambda _: None)
    whole, resumed = (weights(folder / out / "student") for out in ("whole", "parts"))
    start = weights(folder / "student")
    if not all(math.isfinite(s["loss"]) and s["grad_norm"] > 0 for s in seen):
        case.message = "a step trained nothing"
    if all(torch.equal(whole[name], start[name]) for name in start if name in whole):
        case.message = "training changed no weight"
    if whole.keys() != resumed.keys() or not all(torch.equal(whole[n], resumed[n]) for n in whole):
        case.message = "a resumed run has other weights"
    load_model(str(folder / "whole" / "student"))
    load_tokenizer(str(folder / "whole" / "student"))
    last = weights(folder / "whole" / "checkpoint-000002" / "model")
    if whole.keys() != last.keys() or not all(torch.equal(whole[n], last[n]) for n in whole):
        case.message = "the exported weights are not those of the last checkpoint"


def weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder."""
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def seen_of_wrong_code() -> dict[str, int]:
    """What the same comparisons see where padding is read, and where states are not selected."""
    return {
        "padding_read": _seen("mamba", rows_module.PlainSlots),
        "states_not_selected": _seen("lfm2", _KeysOnly),
    }


def _seen(name: str, form: type[rows_module.PlainSlots]) -> int:
    """1 if a sample in a form that is wrong for an architecture is seen."""
    case = Case(name)
    with in_memory() as folder:
        make_pair(name, folder, case)
        components = build_components(settings(folder, "run"))
        rows_module._KNOWN[components.student.model] = form
        with torch.no_grad():
            sampled(case, components)
    return int(case.gaps["padded"] > TOLERANCE_NATS)


class _KeysOnly(rows_module.PlainSlots):
    """Selects rows of keys and values; convolution states are those of other rows."""

    def keep(self, index: Tensor) -> None:
        super().keep(index)
        for layer in self.cache.layers:
            states = layer.__dict__.get("conv_states", {})
            for i, state in states.items():
                states[i] = None if state is None else state.roll(1, 0)

"""`tutelage check --dry-run`: a recipe on tiny random models of its kinds, from start to export."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tutelage.config.conversations import ConversationData, LedgerToolsData
from tutelage.config.evaluation import StopWhenConfig
from tutelage.config.models import TeacherConfig
from tutelage.config.parse import flat_values, to_table
from tutelage.config.rollouts import LiveRollouts, RolloutsConfig
from tutelage.config.sampling import TransformersEngine
from tutelage.config.schema import Config, FileData
from tutelage.config.self_teacher import SelfTeacher
from tutelage.config.teachers import HiddenServerTeacher, LogprobServerTeacher
from tutelage.data.formats import find_file, is_file_name
from tutelage.data.prompts import load_prompts
from tutelage.data.suites import SETS
from tutelage.data.tasks import Task
from tutelage.data.types import Prompt, Rollout
from tutelage.errors import DataError, RunError
from tutelage.models.load import load_model
from tutelage.models.tiny import architecture, save_tiny_model, tiny_tokenizer
from tutelage.models.tokenizers import vocabulary_size
from tutelage.setup.components import build_components
from tutelage.setup.inputs import pick_device, prompt_format, told_fields
from tutelage.setup.objective import graded_by
from tutelage.setup.phases import no_log
from tutelage.teachers.server import ServedModel, serving
from tutelage.train.checkpoint import checkpoint_path
from tutelage.train.distributed import Ranks
from tutelage.train.grades import Grades, grade_step
from tutelage.train.loop import train

_NUM_PROMPTS = 16
_NUM_READ = 256
_MOST_SAMPLES = 3
_MOST_TOKENS = 16
_PADDING = (8, 136)
"""Rows of a tiny head that no token uses: of the smaller vocabulary, and of a larger one."""
_IDS_PER_STOP = 6
_SAME = {"float32": 1e-4, "bfloat16": 5e-2}
"""Largest relative difference of logits between a student and its export, by dtype."""
_SAME_MERGED = 0.1
"""The same for an adapter on weights of few bits, which is merged into the whole ones."""
_REPEATED = 1e-3
"""Largest relative difference between a step and its repetition."""
_LEAST_NORM = 1e-6
"""A smaller gradient is rounding; those of the tiny models are about one."""
_BUILT_IN = (
    Prompt("dry/1", "What is 17 + 25?", "42"),
    Prompt("dry/2", "A train has 6 cars with 48 seats each. How many seats are there?", "288"),
    Prompt("dry/3", "Find x if 3x - 4 = 11.", "5"),
)


_PLACES = (".model", ".path", "_column", ".subset", ".url", "teacher.kind")
"""Ends of keys that say where something is."""


def dry_run(config: Config) -> Iterator[str]:
    """Lines on what was scaled, and what a run of two steps did.

    It keeps the recipe's selection, objective, weighting, optimizer, dtypes and memory modes. Each
    prompt gets several completions of unequal length. The run evaluates, saves and exports; the
    export is read back and compared, and the second step is repeated from the first checkpoint.

    Raises:
        TutelageError: the recipe does not run.
    """
    with tempfile.TemporaryDirectory(prefix="tutelage-dry-run-") as name, ExitStack() as stack:
        folder = Path(name)
        yield from _models(config, folder)
        prompts, source = _prompts(config)
        _write(prompts, folder / "prompts.jsonl", ("", *config.teachers))
        if config.teachers:
            yield f"teachers {', '.join(config.teachers)}: the tiny teacher too, of prompts in turn"
        if isinstance(config.data, ConversationData):
            yield (
                f"data: the embedded conversations, for those of {config.data.kind}; a random "
                "model calls no tool, so nothing is inserted"
            )
        else:
            yield f"data: {len(prompts)} prompts of {source}"
        small = _scaled(config, folder)
        if isinstance(small.teacher, HiddenServerTeacher):
            url = stack.enter_context(_serving(small.teacher))
            here = replace(
                small.teacher, url=url, server="tutelage", served_name="", logprob_url=""
            )
            small = replace(small, teacher=here)
            yield f"teacher: on a server in this process, {url}"
        if isinstance(config.teacher, LogprobServerTeacher):
            yield "teacher: in this process, without a server of log-probabilities"
        yield from (f"scaled: {line}" for line in _changes(config, small))
        if graded_by(config):
            yield "grades: every second completion counts as right; a random model never is"
        steps: list[dict[str, Any]] = []
        _train(small, steps)
        teaches_itself = isinstance(config.teacher, SelfTeacher) and not config.teacher.context
        yield _outcome(steps[0], -1.0 if teaches_itself else _LEAST_NORM)
        yield _reloaded(small)
        yield _resumed(small, steps[1])


@contextmanager
def _serving(teacher: HiddenServerTeacher) -> Iterator[str]:
    """A server of the tiny teacher in this process."""
    with serving(ServedModel(load_model(teacher.model, teacher.dtype), "a tiny teacher")) as url:
        yield url


def _models(config: Config, folder: Path) -> Iterator[str]:
    is_self = isinstance(config.teacher, SelfTeacher)
    both = (config.student,) if is_self else (config.student, config.teacher)
    found = [architecture(side.model) for side in both]
    rows = [side.config.vocab_size for side in found]
    num_ids = vocabulary_size(tiny_tokenizer())
    sides = (("student", config.student.model), ("teacher", config.teacher.model))
    for seed, ((who, ref), side) in enumerate(zip(sides, found, strict=False)):
        num_rows = num_ids + _PADDING[rows[seed] > min(rows)]
        kind = save_tiny_model(side, num_rows, seed, folder / who)
        if who == "student":
            _end_early(folder / who, num_ids)
        tied = "tied" if side.config.tie_word_embeddings else "untied"
        yield (
            f"{who}: a tiny random {kind}, {tied} head of {num_rows} rows, for {ref} "
            f"({side.origin}: {rows[seed]:,} rows)"
        )
    if isinstance(config.teacher, SelfTeacher):
        yield f"teacher: the student itself, weights {config.teacher.weights}"


def _end_early(model: Path, num_ids: int) -> None:
    """Let many ids end a completion, so that lengths differ."""
    path = model / "generation_config.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    declared = table.get("eos_token_id")
    stops = declared if isinstance(declared, list) else [declared]
    every = {*range(0, num_ids, _IDS_PER_STOP), *(i for i in stops if i is not None)}
    path.write_text(json.dumps(table | {"eos_token_id": sorted(every)}), encoding="utf-8")


def _prompts(config: Config) -> tuple[list[Prompt], str]:
    """Short prompts of the recipe's own data where they lie here, else built-in ones."""
    data = config.data
    if not isinstance(data, FileData):
        return _built_in(config), "a built-in list"
    try:
        if data.path in SETS:
            is_here = SETS[data.path].local_file() is not None
        else:
            is_here = is_file_name(data.path) and find_file(data.path).is_file()
    except DataError:
        is_here = False
    if not is_here:
        return _built_in(config), f"a built-in list; {data.path} is not here"
    columns = prompt_format(data, told_fields(config))
    every = load_prompts(data.path, columns, limit=_NUM_READ)
    shortest = sorted(every, key=lambda prompt: len(json.dumps(prompt.content)))
    return shortest[:_NUM_PROMPTS], f"{data.path}, the shortest of its first {len(every)}"


def _built_in(config: Config) -> list[Prompt]:
    """Their answers stand for whatever else a teacher reads."""
    names = told_fields(config)
    return [replace(p, fields=tuple((name, str(p.answer)) for name in names)) for p in _BUILT_IN]


def _write(prompts: list[Prompt], path: Path, teachers: tuple[str, ...]) -> None:
    records = (
        {**dict(p.fields), "id": p.id, "prompt": p.content, "answer": p.answer, "tools": p.tools,
         "teacher": teachers[place % len(teachers)]}
        for place, p in enumerate(prompts)
    )  # fmt: skip
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")


def _scaled(config: Config, folder: Path) -> Config:
    """The run with the tiny models, few and short completions, and one step."""
    student = replace(config.student, model=str(folder / "student"))
    if student.num_layers is not None:
        student = replace(student, num_layers=1)
    if pick_device(config.device).type == "cpu":  # which has no kernels for them
        low = student.quantization if student.quantization != "4bit" else "none"
        student = replace(student, quantization=low, layers="transformers")
    path = folder / "prompts.jsonl"
    num_prompts = len(path.read_text(encoding="utf-8").splitlines())
    evaluation, can_hold_out = config.evaluation, num_prompts > 1
    updates, sampling = config.updates_per_step, config.sampling
    teacher: Any = config.teacher
    if isinstance(teacher, LogprobServerTeacher):
        teacher = TeacherConfig(teacher.model)
    if not isinstance(teacher, SelfTeacher):
        teacher = replace(teacher, model=str(folder / "teacher"))
    others: dict[str, Any] = {
        name: replace(
            other if isinstance(other, TeacherConfig) else TeacherConfig(other.model),
            model=str(folder / "teacher"),
        )
        for name, other in config.teachers.items()
    }
    return replace(
        config,
        student=student,
        teacher=teacher,
        teachers=others,
        data=_data(config, path, int(can_hold_out)),
        sampling=replace(
            sampling,
            num_samples=max(2, min(_MOST_SAMPLES, sampling.num_samples)),
            max_new_tokens=min(_MOST_TOKENS, sampling.max_new_tokens),
        ),
        engine=TransformersEngine(),
        rollouts=_rollouts(config, path),
        evaluation=replace(
            evaluation, num_problems=min(int(can_hold_out), evaluation.num_problems), num_samples=2
        ),
        num_steps=2,
        checkpoint_every=1,
        keep_checkpoints=2,
        keep_best="none",
        stop_when=StopWhenConfig(),
        prompts_per_step=updates if updates > 1 else min(2, config.prompts_per_step),
        trackers=(),
        out=str(folder / "run"),
    )


def _rollouts(config: Config, prompts: Path) -> RolloutsConfig:
    """The same source; a file of completions becomes one of the short prompts.

    A teacher's prefix is at most half of a short completion.
    """
    if isinstance(config.rollouts, LiveRollouts):
        shorter = min(config.rollouts.teacher_prefix_tokens, _MOST_TOKENS // 2)
        return replace(config.rollouts, teacher_prefix_tokens=shorter)
    if config.rollouts.path is None:
        return config.rollouts
    path = prompts.with_name("completions.jsonl")
    records = [json.loads(line) for line in prompts.read_text(encoding="utf-8").splitlines()]
    lines = (
        json.dumps({"prompt_id": record["id"], "completion": f"{record['answer']} {sample}"})
        for record in records
        for sample in range(_MOST_SAMPLES)
    )
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return replace(config.rollouts, path=str(path))


def _data(config: Config, path: Path, num_held_out: int) -> FileData | LedgerToolsData:
    """Short prompts in a file; for conversations of any kind, the embedded ones."""
    data = config.data
    if isinstance(data, ConversationData):
        limits = {each.name: getattr(data, each.name) for each in fields(ConversationData)}
        limits |= {"max_inserted_tokens": min(1024, data.max_inserted_tokens)}
        return LedgerToolsData(**limits | {"tool_format": "json", "enable_thinking": None})
    if not isinstance(data, FileData):
        data = FileData("file", str(path), chat=False, grader="number")
    return replace(
        data,
        path=str(path),
        subset=None,
        prompt_column="prompt",
        answer_column="answer",
        teacher_column="teacher" if config.teachers else None,
        suffix=None,
        max_prompt_tokens=0,
        num_held_out=num_held_out,
    )


def _changes(before: Config, after: Config) -> Iterator[str]:
    """What was scaled, apart from where models, data, servers and results are."""
    old, new = flat_values(to_table(before)), flat_values(to_table(after))
    for key in sorted(old.keys() & new.keys()):
        is_place = key == "out" or key.endswith(_PLACES)
        if old[key] != new[key] and not is_place:
            yield f"{key} {old[key]} -> {new[key]}"


def _outcome(metrics: dict[str, Any], least_norm: float) -> str:
    if not math.isfinite(metrics["loss"]) or not metrics["grad_norm"] > least_norm:
        raise RunError(
            f"the dry run's step trained nothing: loss {metrics['loss']}, gradient norm "
            f"{metrics['grad_norm']}. Check the objective and the selection."
        )
    return (
        f"one step ran: loss {metrics['loss']:.4f}, gradient norm {metrics['grad_norm']:.3g}, "
        f"{metrics['num_kept']} of {metrics['num_rows']} tokens trained"
    )


def _reloaded(config: Config) -> str:
    """The exported weights give the logits of the last checkpoint."""
    run, start = Path(str(config.out)), config.student
    trained = build_components(
        config, str(checkpoint_path(run, config.num_steps) / "model")
    ).student.model
    exported = load_model(str(run / "student"), start.dtype, str(trained.device))
    ids = torch.arange(1, 9, device=trained.device)[None]
    with torch.no_grad():
        ours, theirs = (
            model(input_ids=ids, use_cache=False).logits.double() for model in (trained, exported)
        )
    gap = float((ours - theirs).norm() / ours.norm())
    limit = _SAME[start.dtype] if start.quantization == "none" else _SAME_MERGED
    if not gap <= limit:
        raise RunError(
            f"the exported student is not the trained one: its logits differ by {gap:.2g} of their "
            f"size, more than {limit:.2g}. This model cannot be saved as it is trained."
        )
    return f"saved and exported; read back, its logits differ by {gap:.1g} of their size"


def _resumed(config: Config, metrics: dict[str, Any]) -> str:
    """The second step, repeated from the first checkpoint, gives the same numbers."""
    run = Path(str(config.out))
    last = checkpoint_path(run, config.num_steps)
    moments = load_file(last / "optimizer.safetensors")
    shutil.rmtree(last)
    shutil.rmtree(run / "student")
    again: list[dict[str, Any]] = []
    _train(config, again)
    (repeated,) = again
    differing = [
        name
        for name in ("loss", "grad_norm", "num_rows", "num_kept")
        if not math.isclose(repeated[name], metrics[name], rel_tol=1e-4, abs_tol=1e-6)
    ]
    for name, tensor in load_file(last / "optimizer.safetensors").items():
        before = moments[name].double()
        if not float((tensor.double() - before).norm()) <= _REPEATED * float(before.norm()):
            differing.append(name)
    if differing:
        raise RunError(
            f"a run continued from its checkpoint is another run: {differing[0]} differs after "
            "step 2. Its checkpoints lack something."
        )
    return "continued from the checkpoint of step 1: step 2 gives the same numbers"


def _train(config: Config, steps: list[dict[str, Any]]) -> None:
    """A run to its end, whose metrics join `steps`; a signal that stops it stops the command."""
    if not train(config, log=no_log, on_step=steps.append, grade=_in_turn).is_finished:
        raise KeyboardInterrupt


def _in_turn(task: Task, rollouts: Sequence[Rollout], share: Sequence[int], ranks: Ranks) -> Grades:
    """Every second completion is right: a random model never is, and would learn nothing."""
    grade_step(task, rollouts, share, ranks)  # which has to work
    verdicts = [index % 2 == 0 for index in range(len(rollouts) * ranks.count)]
    return Grades(verdicts, [float(verdict) for verdict in verdicts])

"""Sizes of the runs on a real language model, and the cells that follow from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from claims_design import digest_of, made_with, sources
from claims_lm_rules import ARMS, CONTROLS, LATER, MINIMUM, OWN_LOSS, TUNED, overrides
from tutelage.config.parse import fingerprint, load_config
from tutelage.config.schema import Config
from tutelage.errors import ConfigError

BASELINES = ("start", "teacher")
"""Measured, never trained."""
CONTROL_OFFSET = 10
"""What is added to the seeds of the second half of an A/A pair."""


@dataclass(frozen=True)
class Scale:
    """How much one cell does."""

    name: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    """Not among the seeds of the comparison."""
    grid: tuple[float, ...]
    """Learning rates tried under each loss on the arm that it is tuned on."""
    num_steps: int
    prompts_per_step: int
    micro_batch_tokens: int
    num_problems: int
    num_samples: int
    num_scored: int
    """Problems whose first completion is compared with the teacher's distribution."""
    num_other_texts: int
    evaluation_batch: int
    num_looks: int = 1
    """How often verdicts were looked at: seeds that are added after verdicts are a further look."""

    @property
    def level(self) -> float:
        """Coverage of the intervals: looks share the 5 % of error (Bonferroni)."""
        return 1 - 0.05 / self.num_looks


_OF_THE_DESIGN = ("name", "arms", "seeds", "tuning_seeds", "grid", "num_looks")
"""Sizes that say which cells there are, not what one of them does."""

SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            name="cpu",
            arms=MINIMUM + LATER,
            seeds=(1, 2, 3, 4, 5, 6),  # the last three after the verdicts of the first three
            tuning_seeds=(101,),
            grid=(6e-6, 2e-5, 6e-5, 2e-4),
            num_steps=8,
            prompts_per_step=12,
            micro_batch_tokens=2048,
            num_problems=200,
            num_samples=2,
            num_scored=48,
            num_other_texts=16,
            evaluation_batch=200,
            num_looks=2,
        ),
        Scale(
            name="gpu",
            arms=tuple(ARMS),
            seeds=(1, 2, 3, 4, 5),
            tuning_seeds=(101, 102),
            grid=(6e-6, 2e-5, 6e-5, 2e-4, 6e-4),
            num_steps=32,
            prompts_per_step=64,
            micro_batch_tokens=16384,
            num_problems=500,
            num_samples=4,
            num_scored=128,
            num_other_texts=64,
            evaluation_batch=1000,
        ),
    )
}
MAX_NEW_TOKENS = {"stories": 40, "gsm8k": 256}
OTHER_TOKENS = 96
"""Tokens of each other text that are scored."""


@dataclass(frozen=True)
class Pair:
    """A folder that `scripts/build_lm_pair.py` filled, and texts of another kind."""

    folder: Path
    task: str
    others: Path | None

    @property
    def max_new_tokens(self) -> int:
        return MAX_NEW_TOKENS[self.task]

    @cache  # noqa: B019 - a process has one or two pairs
    def digest(self) -> str:
        """A short hash of everything that cells read of it."""
        models = [self.folder / who for who in ("teacher", "student")]
        files = [f for model in models for f in sorted(model.iterdir()) if f.suffix != ".md"]
        files += [self.folder / "data" / f"{split}.jsonl" for split in ("prompts", "test")]
        return digest_of([*files, *([] if self.others is None else [self.others])])


@dataclass(frozen=True)
class Cell:
    """One run, or one measurement of a baseline."""

    kind: str
    """tune or arm."""
    task: str
    scale: str
    loss: str
    arm: str
    seed: int
    rate: float

    @property
    def name(self) -> str:
        """What `--cells` chooses by."""
        parts = (self.kind, self.task, self.scale, self.loss, self.arm, self.seed, f"{self.rate:g}")
        return "/".join(map(str, parts))

    def key(self, pair: Pair, device: str) -> str:
        """The cell under these sizes, this configuration, this pair and this kind of device."""
        return self.key_on(device.split(":")[0], pair.digest())

    def key_on(self, kind_of_device: str, digest: str) -> str:
        """`key` from the digest of the pair; the folders of its models are not part of it."""
        sizes = as_table(SCALES[self.scale])
        own = {name: size for name, size in sizes.items() if name not in _OF_THE_DESIGN}
        text = json.dumps([own, overrides_of(self)], sort_keys=True)
        size = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
        run = fingerprint(_config(self, Path("pair"), kind_of_device))
        return "/".join([self.name, size, run, kind_of_device, digest])


def cell_of(record: Mapping[str, Any]) -> Cell:
    """The cell that a record is of."""
    return Cell(**{field.name: record[field.name] for field in fields(Cell)})


def is_current(record: Mapping[str, Any]) -> bool:
    """Whether a cell was run in the sizes and the configuration that it has now."""
    device, pair = record["key"].split("/")[-2:]
    try:
        return bool(record["key"] == cell_of(record).key_on(device, pair))
    except ConfigError:  # an arm that is no longer built
        return False


@cache
def source() -> str:
    """A short hash of the code and the library versions that cells are made with."""
    here = Path(__file__).parent
    code = [file for file in sources() if file.suffix == ".py" and file.parent != here]
    own = [here / f"claims_{name}.py" for name in ("choices", "probe", "work", "lm_work")]
    return made_with([*own, *code])


def overrides_of(cell: Cell) -> tuple[str, ...]:
    """Settings of a cell's arm; a baseline has those of all tokens."""
    arm = "all" if cell.arm in BASELINES else cell.arm
    return overrides(arm, "exact" if cell.loss == "own" else cell.loss)


def config_of(cell: Cell, pair: Pair, device: str) -> Config:
    """The run that a cell is."""
    return _config(cell, pair.folder.resolve(), device)


def _config(cell: Cell, folder: Path, device: str) -> Config:
    """The run of a cell on the pair in that folder."""
    scale = SCALES[cell.scale]
    return load_config(
        _BASE,
        [
            f"student.model={folder / 'student'}",
            f"teacher.model={folder / 'teacher'}",
            f"data.path={folder / 'data' / 'prompts.jsonl'}",
            f"sampling.max_new_tokens={MAX_NEW_TOKENS[cell.task]}",
            f"optimizer.learning_rate={cell.rate or _NOT_USED}",
            f"num_steps={scale.num_steps}",
            f"prompts_per_step={scale.prompts_per_step}",
            f"micro_batch_tokens={scale.micro_batch_tokens}",
            f"seed={cell.seed}",
            f"device={device}",
            *(["num_threads=1"] if device == "cpu" else []),
            *overrides_of(cell),
        ],
    )


_BASE = Path(__file__).with_name("claims_lm.toml")
_NOT_USED = 2e-5
"""The learning rate in the configuration of a baseline."""


def tuning_cells(scale: Scale, task: str) -> list[Cell]:
    """The tuned arms at every rate."""
    return [
        Cell("tune", task, scale.name, loss, arm, seed, rate)
        for loss, arm in TUNED.items()
        if arm in scale.arms
        for rate in scale.grid
        for seed in scale.tuning_seeds
    ]


def cells(scale: Scale, task: str, rates: Mapping[str, float]) -> list[Cell]:
    """All work after tuning, under each loss that has a rate; whole seeds one after the other.

    The teacher is measured once, and the A/A controls come last.
    """

    def arm(loss: str, name: str, seed: int, rate: float) -> Cell:
        return Cell("arm", task, scale.name, loss, name, seed, rate)

    found = [arm("exact", "teacher", scale.seeds[0], 0.0)]
    for seed in scale.seeds:
        found.append(arm("exact", "start", seed, 0.0))
        for loss, rate in rates.items():
            mine = [name for name in scale.arms if (name in OWN_LOSS) == (loss == "own")]
            found += [arm(loss, name, seed, rate) for name in mine]
    if "exact" in rates:
        seeds = [seed + CONTROL_OFFSET for seed in scale.seeds]
        found += [arm("exact", name, seed, rates["exact"]) for name in CONTROLS for seed in seeds]
    return found


def as_table(scale: Scale) -> dict[str, Any]:
    """The sizes as plain JSON values."""
    return {**asdict(scale), "other_tokens": OTHER_TOKENS}

"""What the claims benchmark runs: settings, arms, sizes, and the cells that follow from them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import tutelage
from claims_rules import arms_of_claims
from tutelage.config.method import EOPDObjective, KLObjective, ObjectiveConfig, SampledObjective
from tutelage.config.models import OptimizerConfig, StudentConfig, TeacherConfig
from tutelage.config.parse import fingerprint
from tutelage.config.sampling import SamplingConfig
from tutelage.config.schema import Config, LedgerData
from tutelage.config.selection import (
    AllTokens,
    RandomTokens,
    SampledTokens,
    SelectionConfig,
    SomeTokens,
)

MAX_NEW_TOKENS = 64
NUM_SAMPLES = 8
Q3_CUTS_NATS = (0.5, 0.5)
"""Entropy and divergence at which the quadrants are cut; most tokens here have neither."""
BUDGETS = (50, 20, 10)
RULES = (
    "random",
    "entropy",
    "entropy_sample",
    "soft_or",
    "soft_or_sample",
    "q3",
    "divergence",
    "teachability",
    "gradient_norm",
    "local_oracle",
    "local_gain",
)
SAMPLING_RULES = ("random", "entropy_sample", "soft_or_sample")
GRID = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
"""Learning rates tried on the all-token arm of every setting."""
TUNING_SEEDS = (101, 102)
"""Not among the seeds of the comparison."""
SENSITIVITY_FACTORS = (0.5, 2.0)
"""Multiples of a setting's learning rate at which some of its arms are run again."""
NOT_SOURCES = ("__main__.py", "cli.py", "commands", "integrations", "report")
"""Parts of the package that no cell runs; a cell's numbers depend on all others."""


@dataclass(frozen=True)
class Setting:
    """A student, how many prompts a step has, and for how many steps it learns."""

    name: str
    student: str
    prompts_per_step: int
    num_steps: int


@dataclass(frozen=True)
class Arm:
    """One way to learn."""

    name: str
    selection: SelectionConfig
    objective: ObjectiveConfig


@dataclass(frozen=True)
class Design:
    """Sizes of one benchmark."""

    name: str
    seeds: tuple[int, ...]
    """Of every arm."""
    more_seeds: tuple[int, ...]
    """Of the arms that a claim compares, besides; seeds are what limits an interval."""
    num_problems: int
    num_probe_tokens: int
    arms: dict[str, tuple[str, ...]]
    """Names of the arms of each setting."""
    sensitivity_arms: dict[str, tuple[str, ...]]
    """Names of the arms that are run at half and double the learning rate as well."""


@dataclass(frozen=True)
class Cell:
    """One piece of work, with everything its result depends on but the source."""

    kind: str
    """arm, tune, probe, oscillation or bias."""
    setting: str
    arm: str
    seed: int
    learning_rate: float
    num_problems: int
    num_probe_tokens: int = 0

    @property
    def key(self) -> str:
        """A name that no other cell has.

        It ends with the fingerprints of the run and of the source, so that cells of another version
        are never taken for this one's.
        """
        run = [fingerprint(config_of(self))] if self.setting else []
        return "/".join([*(str(value) for value in asdict(self).values()), *run, source()])


PACKAGE = Path(tutelage.__file__).parent


@cache
def source() -> str:
    """A short hash of the code and the models that cells are made with."""
    return digest_of(sources())


def sources() -> list[Path]:
    """The files that a cell's numbers depend on: what it runs, and the models with tokenizers."""
    here = Path(__file__).parent
    own = [here / f"claims_{name}.py" for name in ("design", "probe", "work")]
    code = [f for f in PACKAGE.rglob("*.py") if f.relative_to(PACKAGE).parts[0] not in NOT_SOURCES]
    models = [f for kind in ("json", "safetensors") for f in PACKAGE.glob(f"assets/*/*.{kind}")]
    return [*own, *sorted(code), *sorted(models)]


def digest_of(files: Iterable[Path]) -> str:
    """A short hash of the contents of files, in the order given."""
    hashed = hashlib.blake2b(digest_size=6)
    for file in files:
        hashed.update(hashlib.blake2b(file.read_bytes()).digest())
    return hashed.hexdigest()


SETTINGS = {
    s.name: s
    for s in (
        Setting("overconfident", "ledger-overconfident", prompts_per_step=12, num_steps=16),
        # Too few steps and prompts for pass@8 to reach 1: what is left to learn stays visible.
        Setting("scarce", "ledger-overconfident", prompts_per_step=8, num_steps=4),
        Setting("collapsed", "ledger-collapsed", prompts_per_step=12, num_steps=12),
        Setting("small", "ledger-small", prompts_per_step=12, num_steps=12),
    )
}

BASELINES = ("start", "teacher")
"""Measured, never trained."""


def _selection(rule: str, percent: int) -> SelectionConfig:
    keep = percent / 100
    if rule == "random":
        return RandomTokens("random", keep)
    if rule in SAMPLING_RULES:
        return SampledTokens(rule, keep)  # type: ignore[arg-type]
    return SomeTokens(rule, keep)  # type: ignore[arg-type]


def _rule_arm(rule: str, percent: int, with_eopd: bool = False) -> Arm:
    objective: ObjectiveConfig = EOPDObjective("eopd") if with_eopd else KLObjective()
    suffix = "+eopd" if with_eopd else ""
    return Arm(f"{rule}-{percent}{suffix}", _selection(rule, percent), objective)


ARMS = {
    arm.name: arm
    for arm in (
        Arm("all", AllTokens(), KLObjective()),
        *(_rule_arm(rule, percent) for percent in BUDGETS for rule in RULES),
        _rule_arm("bottom", 50),
        Arm("eopd", AllTokens(), EOPDObjective("eopd")),
        Arm("opd_sampled", AllTokens(), SampledObjective("sampled")),
        Arm("eopd_sampled", AllTokens(), EOPDObjective("eopd", "sampled", "topk_renorm")),
        Arm("eopd_sampled_tail", AllTokens(), EOPDObjective("eopd", "sampled", "topk_tail")),
        _rule_arm("soft_or", 50, with_eopd=True),
        _rule_arm("q3", 10, with_eopd=True),
    )
}
"""Every arm by name. `eopd_sampled` is the published form: renormalised top 16."""

FULL = Design(
    name="full",
    seeds=(1, 2, 3, 4, 5),
    more_seeds=(6, 7, 8),
    num_problems=48,
    num_probe_tokens=150,
    arms=dict.fromkeys(SETTINGS, tuple(ARMS)),
    sensitivity_arms={
        "overconfident": (
            *("all", "entropy_sample-50", "random-50", "bottom-50"),
            *("soft_or-10", "entropy-10", "q3-10", "divergence-10"),
        ),
        "collapsed": ("all", "eopd", "opd_sampled", "eopd_sampled"),
        "small": ("all", "soft_or-50"),
    },
)

QUICK = Design(
    name="quick",
    seeds=(1, 2),
    more_seeds=(),
    num_problems=32,
    num_probe_tokens=30,
    arms={**arms_of_claims(), "small": ("all",)},
    sensitivity_arms={"overconfident": ("all", "q3-10", "divergence-10")},
)

DESIGNS = {design.name: design for design in (QUICK, FULL)}


def tuning_cells(design: Design) -> list[Cell]:
    """The all-token arm of every setting at every learning rate of the grid."""
    return [
        Cell("tune", setting, "all", seed, rate, design.num_problems)
        for setting in design.arms
        for rate in GRID
        for seed in TUNING_SEEDS
    ]


def cells(design: Design, rates: Mapping[str, float]) -> list[Cell]:
    """All work after tuning; the arms of one setting and seed differ in nothing but the arm.

    What verdicts rest on comes first, then arm after arm, then other learning rates, and the
    further seeds last: a run that is cut off lacks whole arms, not a seed of every one.
    """

    def arm(setting: str, name: str, seed: int, factor: float = 1.0) -> Cell:
        return Cell("arm", setting, name, seed, factor * rates[setting], design.num_problems)

    claimed = [(setting, name) for setting, names in arms_of_claims().items() for name in names]
    everything = [(s, name) for s, names in design.arms.items() for name in (*BASELINES, *names)]
    first = dict.fromkeys([*claimed, *everything])
    other_rates = [
        arm(setting, name, seed, factor)
        for setting, names in design.sensitivity_arms.items()
        for name in names
        for factor in SENSITIVITY_FACTORS
        for seed in design.seeds
    ]
    return [
        *_probes(design),
        *(arm(*which, seed) for which in first for seed in design.seeds),
        *other_rates,
        *(arm(*which, seed) for seed in design.more_seeds for which in claimed),
    ]


def _probes(design: Design) -> list[Cell]:
    """Measurements that train no student: token values and the two toys."""
    seeds, size = (*design.seeds, *design.more_seeds), design.num_probe_tokens
    probes = [Cell("probe", "overconfident", "", seed, 0.0, 0, size) for seed in seeds]
    toys = [Cell(kind, "", "", seed, 0.0, 0) for kind in ("oscillation", "bias") for seed in seeds]
    return probes + toys


def config_of(cell: Cell) -> Config:
    """The run that a cell of kind arm or tune is a part of."""
    setting, arm = SETTINGS[cell.setting], ARMS.get(cell.arm, ARMS["all"])
    package = "package:tutelage/assets"
    return Config(
        student=StudentConfig(f"{package}/{setting.student}"),
        teacher=TeacherConfig(f"{package}/ledger-teacher"),
        data=LedgerData(),
        sampling=SamplingConfig(max_new_tokens=MAX_NEW_TOKENS),
        selection=arm.selection,
        objective=arm.objective,
        optimizer=OptimizerConfig(
            learning_rate=cell.learning_rate or GRID[0], schedule="linear", warmup_steps=2
        ),
        seed=cell.seed,
        num_steps=setting.num_steps,
        prompts_per_step=setting.prompts_per_step,
        micro_batch_size=setting.prompts_per_step,
        # Recorded states round otherwise: arms that score would not start like arms that do not.
        scoring="forward",
        sampling_batch_size=1024,
        quadrant_thresholds=Q3_CUTS_NATS,
        num_threads=1,
        device="cpu",
    )


def as_table(design: Design) -> dict[str, Any]:
    """The design as plain JSON values."""
    settings = {name: asdict(SETTINGS[name]) for name in design.arms}
    return {**asdict(design), "settings": settings, "num_samples": NUM_SAMPLES, "grid": GRID}

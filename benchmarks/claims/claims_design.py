"""What the claims benchmark runs: tasks, settings, sizes, and the cells that follow from them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import transformers

import tutelage
from claims_arms import ARMS, BASELINES, TUNED, Arm, Loss, loss_of
from claims_rules import BROAD, arms_of_claims
from tutelage.config.models import OptimizerConfig, StudentConfig, TeacherConfig
from tutelage.config.parse import fingerprint
from tutelage.config.rollouts import LiveRollouts, RolloutsConfig, StoredRollouts
from tutelage.config.sampling import SamplingConfig
from tutelage.config.schema import CoinsData, Config, LedgerData

Q3_CUTS_NATS = (0.5, 0.5)
"""Entropy and divergence at which the quadrants are cut; most tokens here have neither."""
GRID = (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
"""Learning rates tried on the all-token arm of every setting and kind of loss."""
TUNING_SEEDS = (101, 102, 103, 104, 105)
"""Not among the seeds of the comparison; a setting takes the first of them."""
SENSITIVITY_FACTORS = (0.5, 2.0)
"""Multiples of a setting's learning rate at which some of its arms are run again."""
CONTROL_SEEDS = 1000
"""Seeds of the controls come after this one."""
LIMIT_CORE_MINUTES = 150
"""What the full benchmark may take of processor time."""
PACKAGE = Path(tutelage.__file__).parent
NOT_SOURCES = ("__main__.py", "cli.py", "commands", "integrations", "report")
"""Parts of the package that no cell runs; a cell's numbers depend on all others."""
_OWN_SOURCES = ("choices", "probe", "work")
"""Modules of the benchmark that cells are made with; arms and settings are in their keys."""

Rates: TypeAlias = Mapping[str, Mapping[Loss, float]]
"""The learning rate of every setting and kind of loss."""


@dataclass(frozen=True)
class TaskOfSetting:
    """An embedded task with its teacher, and how long its completions may be."""

    data: Any
    teacher: str
    max_new_tokens: int
    prefix_tokens: int
    """Of a teacher's prefix: a quarter of a usual completion."""


LEDGER = TaskOfSetting(LedgerData(), "ledger-teacher", max_new_tokens=64, prefix_tokens=12)
COINS = TaskOfSetting(CoinsData(), "coins-teacher", max_new_tokens=64, prefix_tokens=4)


@dataclass(frozen=True)
class Setting:
    """A task and student, how many prompts a step has, and for how many steps it learns."""

    name: str
    student: str
    prompts_per_step: int
    num_steps: int
    task: TaskOfSetting = LEDGER
    tuned_by: Literal["reverse_kl", "forward_kl"] = "reverse_kl"
    """The divergence whose minimum chooses the learning rate."""
    num_tuning_seeds: int = 2

    @property
    def num_rollouts(self) -> int:
        """Completions that an arm is trained on."""
        return self.prompts_per_step * self.num_steps


SETTINGS = {
    s.name: s
    for s in (
        Setting("overconfident", "ledger-overconfident", prompts_per_step=12, num_steps=16),
        # Too few steps and prompts for pass@8 to reach 1: what is left to learn stays visible.
        Setting("scarce", "ledger-overconfident", prompts_per_step=8, num_steps=4),
        # Its reverse KL is low from the start and no rate lowers it: variety is what it lacks.
        # At high rates some seeds lose their accuracy and others do not.
        Setting("collapsed", "ledger-collapsed", 12, 12, LEDGER, "forward_kl", num_tuning_seeds=5),
        # No damaged copy. Completions are short: more of them make as many tokens a step.
        Setting("coins", "coins-student", prompts_per_step=32, num_steps=24, task=COINS),
        Setting("coins-small", "coins-small", prompts_per_step=32, num_steps=24, task=COINS),
    )
}


@dataclass(frozen=True)
class Controls:
    """Arms that are compared with themselves under other seeds."""

    setting: str
    arms: tuple[str, ...]
    num_cells: int
    """Seeds of each of them."""

    @property
    def seeds(self) -> range:
        """Not among the seeds of the comparison."""
        return range(CONTROL_SEEDS + 1, CONTROL_SEEDS + 1 + self.num_cells)


@dataclass(frozen=True)
class Design:
    """Sizes of one benchmark."""

    name: str
    seeds: tuple[int, ...]
    num_problems: int
    num_probe_tokens: int
    num_choice_prompts: int
    """Prompts whose tokens every rule chooses from, at the first seed."""
    arms: dict[str, tuple[str, ...]]
    """Names of the arms of each setting."""
    sensitivity_arms: dict[str, tuple[str, ...]]
    """Names of the arms that are run at half and double the learning rate as well."""
    sensitivity_seeds: tuple[int, ...]
    choice_settings: tuple[str, ...]
    """Settings in which the choices of rules are recorded."""
    controls: tuple[Controls, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One piece of work, with everything its result depends on but the source."""

    kind: str
    """arm, control, tune, probe, oscillation or bias."""
    setting: str
    arm: str
    seed: int
    learning_rate: float
    num_problems: int
    num_probed: int = 0
    """Tokens of a probe; of an arm the prompts whose tokens it chooses from."""

    @property
    def key(self) -> str:
        """A name that no other cell has.

        It ends with the fingerprints of the run and of the source, so that cells of another version
        are never taken for this one's.
        """
        run = [fingerprint(config_of(self))] if self.setting else []
        return "/".join([*(str(value) for value in asdict(self).values()), *run, source()])


@cache
def source() -> str:
    """A short hash of the code, the models and the library versions that cells are made with."""
    return made_with(sources())


def made_with(files: Iterable[Path]) -> str:
    """A short hash of these files and of the library versions."""
    return digest_of(files, " ".join((torch.__version__, transformers.__version__)))


def sources() -> list[Path]:
    """The files that a cell's numbers depend on: what it runs, and the models with tokenizers."""
    here = Path(__file__).parent
    own = [here / f"claims_{name}.py" for name in _OWN_SOURCES]
    code = [f for f in PACKAGE.rglob("*.py") if f.relative_to(PACKAGE).parts[0] not in NOT_SOURCES]
    models = [f for kind in ("json", "safetensors") for f in PACKAGE.glob(f"assets/*/*.{kind}")]
    return [*own, *sorted(code), *sorted(models)]


def digest_of(files: Iterable[Path], versions: str = "") -> str:
    """A short hash of versions and of the contents of files, in the order given."""
    hashed = hashlib.blake2b(versions.encode(), digest_size=6)
    for file in files:
        hashed.update(hashlib.blake2b(file.read_bytes()).digest())
    return hashed.hexdigest()


_REPEATED = ("all", "random-20", "soft_or-20", "probability_gap-20")
"""What is run at other rates, with both losses."""

FULL = Design(
    name="full",
    seeds=(1, 2, 3, 4, 5),
    num_problems=48,
    num_probe_tokens=150,
    num_choice_prompts=48,
    arms=arms_of_claims(),
    sensitivity_arms={
        "overconfident": (*_REPEATED, *(f"{arm}+sampled" for arm in _REPEATED)),
        "collapsed": ("all", "eopd", "all+sampled", "eopd+sampled"),
    },
    sensitivity_seeds=(1, 2, 3),
    choice_settings=("overconfident", "coins"),
    controls=(
        Controls("scarce", ("all", "all+sampled", "random-10"), 100),
        Controls("coins", ("all", "random-20"), 50),
    ),
)

QUICK = Design(
    name="quick",
    seeds=(1, 2),
    num_problems=24,
    num_probe_tokens=30,
    num_choice_prompts=8,
    arms=arms_of_claims(),
    sensitivity_arms={},
    sensitivity_seeds=(),
    choice_settings=("overconfident", "coins"),
    controls=(Controls("scarce", ("all",), 10),),
)

DESIGNS = {design.name: design for design in (QUICK, FULL)}


def tuning_cells(design: Design) -> list[Cell]:
    """The all-token arms of every setting at every learning rate of the grid."""
    return [
        Cell("tune", setting, TUNED[loss], seed, rate, design.num_problems)
        for setting, arms in design.arms.items()
        for loss in losses_of(arms)
        for rate in GRID
        for seed in TUNING_SEEDS[: SETTINGS[setting].num_tuning_seeds]
    ]


def losses_of(arms: Iterable[str]) -> list[Loss]:
    """The kinds of loss that arms are trained with."""
    found = {loss_of(arm) for arm in arms}
    return [loss for loss in TUNED if loss in found]


def cells(design: Design, rates: Rates) -> list[Cell]:
    """All work after tuning; the arms of one setting, loss and seed differ in the arm alone.

    Arm after arm, then other learning rates and the controls: a run that is cut off lacks whole
    arms, not a seed of every one.
    """

    def arm(setting: str, name: str, seed: int, factor: float = 1.0, kind: str = "arm") -> Cell:
        is_recorded = (kind, seed, factor) == ("arm", design.seeds[0], 1.0)
        probed = design.num_choice_prompts if setting in design.choice_settings else 0
        rate = factor * rates[setting][loss_of(name)]
        problems = design.num_problems
        return Cell(kind, setting, name, seed, rate, problems, probed if is_recorded else 0)

    everything = dict.fromkeys(
        (s, name) for s, names in design.arms.items() for name in (*BASELINES, *names)
    )
    other_rates = [
        arm(setting, name, seed, factor)
        for setting, names in design.sensitivity_arms.items()
        for name in names
        for factor in SENSITIVITY_FACTORS
        for seed in design.sensitivity_seeds
    ]
    return [
        *_probes(design),
        *(arm(*which, seed) for which in everything for seed in design.seeds),
        *other_rates,
        *(
            arm(controls.setting, name, seed, kind="control")
            for controls in design.controls
            for name in controls.arms
            for seed in controls.seeds
        ),
    ]


def _probes(design: Design) -> list[Cell]:
    """Measurements that train no student: token values and the two toys."""
    seeds, size = design.seeds, design.num_probe_tokens
    probes = [Cell("probe", "overconfident", "", seed, 0.0, 0, size) for seed in seeds]
    toys = [Cell(kind, "", "", seed, 0.0, 0) for kind in ("oscillation", "bias") for seed in seeds]
    return probes + toys


def config_of(cell: Cell) -> Config:
    """The run that a cell with a setting is a part of."""
    setting, arm = SETTINGS[cell.setting], ARMS.get(cell.arm, ARMS["all"])
    package, task = "package:tutelage/assets", setting.task
    return Config(
        student=StudentConfig(f"{package}/{setting.student}"),
        teacher=TeacherConfig(f"{package}/{task.teacher}"),
        data=task.data,
        sampling=SamplingConfig(max_new_tokens=task.max_new_tokens),
        selection=arm.selection,
        objective=arm.objective,
        weighting=arm.weighting,
        rollouts=_rollouts(arm, setting),
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


def _rollouts(arm: Arm, setting: Setting) -> RolloutsConfig:
    match arm.rollouts:
        case "stored":
            return StoredRollouts("stored")
        case "prefix":
            tokens, steps = setting.task.prefix_tokens, setting.num_steps // 2
            return LiveRollouts(teacher_prefix_tokens=tokens, teacher_prefix_steps=steps)
    return LiveRollouts()


def as_table(design: Design) -> dict[str, Any]:
    """The design as plain JSON values."""
    settings = {name: asdict(SETTINGS[name]) for name in design.arms}
    return {**asdict(design), "settings": settings, "grid": GRID, "broad": BROAD}

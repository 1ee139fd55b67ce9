"""`tutelage demo`: the main job in minutes, a student, its teacher, and selection rules compared.

Everything it uses is in the package; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table

from tutelage.commands.options import INTERRUPTED
from tutelage.commands.progress import Reporter
from tutelage.config.parse import load_config
from tutelage.config.schema import Config
from tutelage.config.selection import AllTokens, RandomTokens, SelectionConfig, SomeTokens
from tutelage.evaluation.evaluate import evaluate
from tutelage.evaluation.metrics import Interval
from tutelage.evaluation.request import EvaluationRequest
from tutelage.report.records import read_run
from tutelage.report.run_page import write_report
from tutelage.setup.run_folder import run_folder
from tutelage.train.loop import RunResult, train

CONFIG = Path(__file__).parents[1] / "assets" / "ledger.toml"
"""The same as configs/examples/ledger.toml of a checkout."""
RULES_STEPS = 24
NUM_PROBLEMS = 128
RULES: tuple[SelectionConfig, ...] = (
    AllTokens(),
    SomeTokens("soft_or", keep=0.1),
    SomeTokens("q3", keep=0.1),
    SomeTokens("entropy", keep=0.1),
    RandomTokens("random", keep=0.1),
)
CAVEAT = """\
KL kept is the kept tokens' share of the summed reverse KL. One seed: the intervals cover the 128
problems, not the seed. The student is a damaged copy of the teacher, which makes tokens of low
entropy and high KL by construction: a best case for rules that rank them first."""
console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Arm:
    """One selection rule of the table: its tokens and the accuracy after it."""

    name: str
    tokens: int
    kept_kl_share: float
    mean_at_k: Interval
    pass_at_k: Interval


def run(_: argparse.Namespace) -> int:
    """Train, measure, and compare five rules on the embedded models."""
    start = time.monotonic()
    config = load_config(CONFIG)
    console.rule("1. A student is distilled on its own completions")
    result = trained(config, "demo")
    if not result.is_finished:
        return INTERRUPTED
    tokens, seconds = totals(result.folder)
    console.print(f"{tokens:,} tokens trained; seconds: {seconds}")
    exported = measure(str(result.folder / "student"), config)[0]
    console.print(f"the exported student, loaded again: mean@8 {as_percent(exported)}")

    console.rule(f"2. Selection rules: {RULES_STEPS} steps each, same start, same prompts")
    arms = [arm(config, rule) for rule in RULES]
    if None in arms:
        return INTERRUPTED
    console.print(table([row for row in arms if row is not None]))
    console.print(CAVEAT)
    console.rule(f"done in {time.monotonic() - start:.0f} s")
    console.print(f"report:  {write_report(result.folder)}")
    console.print(f"student: {result.folder / 'student'}")
    return 0


def trained(config: Config, name: str, is_quiet: bool = False) -> RunResult:
    """Train from scratch: what an earlier demo left behind is removed, stopped or not."""
    shutil.rmtree(run_folder(config, name), ignore_errors=True)
    if is_quiet:
        return train(config, name, log=lambda _: None)
    with Reporter(config.num_steps) as reporter:
        return train(config, name, log=reporter.log, on_step=reporter.on_step)


def arm(config: Config, rule: SelectionConfig) -> Arm | None:
    """Train under one rule and measure the student; None when it was stopped."""
    quiet = replace(config.evaluation, num_problems=0)
    config = replace(config, num_steps=RULES_STEPS, selection=rule, evaluation=quiet)
    keep = f" {rule.keep:.0%}" if isinstance(rule, SomeTokens | RandomTokens) else ""
    name = f"{rule.rule}{keep}"
    with console.status(name):
        result = trained(config, "demo-rule", is_quiet=True)
    if not result.is_finished:
        return None
    mean, passing = measure(str(result.folder / "student"), config)
    return Arm(name, totals(result.folder)[0], kept_kl_share(result.folder), mean, passing)


def measure(model: str, config: Config) -> tuple[Interval, Interval]:
    """mean@8 and pass@8 of a model folder on the run's held-out problems."""
    found = evaluate(
        EvaluationRequest(
            model,
            num_problems=NUM_PROBLEMS,
            max_new_tokens=config.sampling.max_new_tokens,
            batch_size=config.sampling_batch_size,
        )
    )
    scores = found.results[0].scores
    mean, passing = scores.mean_at_k, scores.pass_at_k
    if mean is None or passing is None:
        raise RuntimeError("the embedded problems have no answers")
    return mean, passing


def totals(folder: Path) -> tuple[int, str]:
    """Tokens trained on in a run, and seconds by phase as text."""
    steps = read_run(folder).steps
    seconds: Counter[str] = Counter()
    for step in steps:
        seconds.update(step.seconds)
    phases = ", ".join(f"{name.removesuffix('_s')} {value:.1f}" for name, value in seconds.items())
    return sum(step.num_kept or 0 for step in steps), phases


def kept_kl_share(folder: Path) -> float:
    """The kept tokens' share of the summed reverse KL, mean over steps."""
    shares = (step.kept_kl_share for step in read_run(folder).steps)
    return fmean(share for share in shares if share is not None)


def table(arms: list[Arm]) -> Table:
    made = Table("rule", title=f"after {RULES_STEPS} steps (one seed)")
    for title in ("tokens trained", "KL kept", "mean@8", "95 % interval", "pass@8"):
        made.add_column(title, justify="right")
    for row in arms:
        interval = f"[{100 * row.mean_at_k.low:.1f}, {100 * row.mean_at_k.high:.1f}]"
        mean = f"{100 * row.mean_at_k.value:.1f} %"
        kept, passing = f"{row.kept_kl_share:.0%}", f"{100 * row.pass_at_k.value:.1f} %"
        made.add_row(row.name, f"{row.tokens:,}", kept, mean, interval, passing)
    return made


def as_percent(interval: Interval) -> str:
    return (
        f"{100 * interval.value:.1f} % [{100 * interval.low:.1f}, {100 * interval.high:.1f}] (95 %)"
    )

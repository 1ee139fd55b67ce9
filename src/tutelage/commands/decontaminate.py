"""`tutelage check --decontaminate`: training prompts that repeat benchmark problems."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tutelage.config.schema import Config, FileData
from tutelage.data.contamination import find_overlaps
from tutelage.data.prompts import PromptFormat, load_prompts
from tutelage.data.suites import SUITES, find_suite
from tutelage.errors import DataError
from tutelage.setup.inputs import prompt_format

_MAX_LINES = 200


def decontaminate(config: Config, names: str) -> Iterator[str]:
    """Lines with the number of overlaps for each benchmark, and every pair.

    Args:
        config: its `[data]` table names the prompts that are compared, held-out ones included.
        names: suites or benchmarks, separated by commas.

    Raises:
        TutelageError: the prompts cannot be read, or a name is unknown.
    """
    parts = [name.strip() for name in names.split(",")]
    suites = [find_suite(name) for name in parts]
    benchmarks = dict.fromkeys(name for suite in suites for name in suite.benchmarks)
    data = config.data
    if not isinstance(data, FileData):
        yield f"decontamination: the prompts of data.kind = {data.kind} are generated"
        return
    columns = replace(prompt_format(data), suffix="")
    prompts = load_prompts(data.path, columns, split=data.split, subset=data.subset)
    for name in benchmarks:
        try:
            problems = load_prompts(name, PromptFormat(suffix=""))
        except DataError as error:
            yield f"decontamination: not checked against {name}: {error}"
            continue
        overlaps = find_overlaps(prompts, problems)
        yield (
            f"decontamination: {len(overlaps)} of {len(prompts)} prompts repeat one of "
            f"{len(problems)} problems of {name}"
        )
        for found in overlaps[:_MAX_LINES]:
            yield f"  {found.prompt_id} holds {found.share:.0%} of {found.benchmark_id}"
        if len(overlaps) > _MAX_LINES:
            yield f"  … and {len(overlaps) - _MAX_LINES} more"


ALL = ",".join([*SUITES, "gsm8k"])
"""Every benchmark of the papers."""

"""Named training sets, benchmarks and suites: where they are found and how they are prompted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tutelage.data.formats import find_file
from tutelage.errors import ConfigError, DataError

BOXED = "\n\nLet's think step by step and output the final answer within \\boxed{}."
"""The instruction in the data preparation of TIP's authors, for DAPO-Math and all benchmarks
(`prepare_grpo_data.py`; the same sentence as in verl's `math_dataset.py`, after a blank line)."""

# What DAPO's own data set wraps around each problem; TIP's authors cut it out, and so do we.
_DAPO_INSTRUCTIONS = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n",
    '\n\nRemember to put your answer on its own line after "Answer:".',
)


@dataclass(frozen=True)
class NamedSet:
    """A public data set: the files it may lie in, else the hub data set to read."""

    files: tuple[str, ...]
    """File names looked for in $TUTELAGE_DATA and ./data, in this order."""
    dataset: str
    """Data set id on the hub."""
    split: str = "test"
    subset: str | None = None
    suffix: str = BOXED
    """Instruction added to every problem."""
    removed: tuple[str, ...] = ()
    """Instructions that come with the data and are cut out."""
    has_repeats: bool = False
    """Whether problems are repeated in the data set; each is then taken once."""
    max_new_tokens: int = 8192
    """Length in tokens at which completions of an evaluation are cut off."""

    def local_file(self) -> Path | None:
        """The first of the files that exists."""
        for name in self.files:
            try:
                return find_file(name)
            except DataError:
                continue
        return None


def _files(*stems: str) -> tuple[str, ...]:
    return tuple(f"{stem}{ending}" for stem in stems for ending in (".jsonl", ".parquet"))


TRAINING_SETS = {
    "dapo-math-17k": NamedSet(
        _files("dapo_math_17k", "dapo-math-17k"),
        "BytedTsinghua-SIA/DAPO-Math-17k",
        "train",
        removed=_DAPO_INSTRUCTIONS,
        has_repeats=True,
    ),
    "math-train": NamedSet(
        _files("math_train12k", "math_train"), "DigitalLearningGmbH/MATH-lighteval", "train"
    ),
    "gsm8k-train": NamedSet(_files("gsm8k_train"), "openai/gsm8k", "train", "main"),
}
"""Training sets by name; usable as `data.path`."""

BENCHMARKS = {
    "math500": NamedSet(_files("math500", "math-500"), "HuggingFaceH4/MATH-500"),
    "aime24": NamedSet(_files("aime2024", "aime24"), "HuggingFaceH4/aime_2024", "train"),
    "aime25": NamedSet(_files("aime2025", "aime25"), "math-ai/aime25"),
    "amc23": NamedSet(_files("amc23"), "math-ai/amc23"),
    "minerva": NamedSet(_files("minerva", "minerva_math"), "math-ai/minervamath"),
    "olympiadbench": NamedSet(_files("olympiadbench", "olympiad_bench"), "math-ai/olympiadbench"),
    "gsm8k": NamedSet(
        _files("gsm8k_test", "gsm8k"), "openai/gsm8k", subset="main", max_new_tokens=1024
    ),
}
"""Benchmarks by name, in the order of the tables."""

SETS = TRAINING_SETS | BENCHMARKS


@dataclass(frozen=True)
class Suite:
    """Benchmarks and how a paper samples them."""

    benchmarks: tuple[str, ...]
    num_samples: int = 8
    temperature: float = 1.0
    top_p: float = 1.0


AGENT_BENCHMARKS = {
    "ledger-tools": ("ledger_tools", 1),
    **{f"shopping{level}": ("shopping", level) for level in (1, 2, 3)},
    "shopping-official": ("shopping_official", 0),
    **{f"travel{level}": ("travel", level) for level in (1, 2, 3)},
}
"""Problems for agents by name: the kind of data, and its level. All are generated but those of
`shopping-official`, which are DeepPlanning's own where the user has them."""

SUITES = {
    "tip": Suite(("math500", "aime24", "aime25"), num_samples=16),
    "eopd": Suite(("math500", "amc23", "minerva", "olympiadbench", "aime24", "aime25"), top_p=0.8),
    "deepplanning-shopping": Suite(("shopping1", "shopping2", "shopping3"), num_samples=16),
    "deepplanning-shopping-official": Suite(("shopping-official",), num_samples=16),
    "deepplanning-travel": Suite(("travel1", "travel2", "travel3"), num_samples=16),
}
"""The evaluations of the two papers; those of DeepPlanning are over generated worlds of our own,
except the official one."""


def find_suite(text: str) -> Suite:
    """The suite of a name, or of benchmark names separated by commas.

    Raises:
        ConfigError: a name is unknown.
    """
    if text in SUITES:
        return SUITES[text]
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    known = (*BENCHMARKS, *AGENT_BENCHMARKS)
    for name in names:
        if name not in known:
            raise ConfigError(
                f"--suite {name!r} is unknown. Choose {', '.join(SUITES)}, held-out, a .jsonl "
                f"file, or of {', '.join(known)}, separated by commas."
            )
    return Suite(names)

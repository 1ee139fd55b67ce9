"""A tenth of the sweep over architectures, and that its table is what the last sweep saw."""

from __future__ import annotations

import importlib.util
import json

import pytest

from . import families
from .record import RESULTS, ROOT

spec = importlib.util.spec_from_file_location("families_table", ROOT / "scripts/families_table.py")
assert spec is not None
assert spec.loader is not None
families_table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(families_table)
EXPECTED = {
    "bert": ("refused", ""),
    "falcon_h1": ("exact", "plain"),
    "gemma3_text": ("exact", "plain"),
    "gpt2": ("exact", "plain"),
    "mamba": ("exact", "aligned"),
    "openai-gpt": ("exact", "reread"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_an_architecture_is_exact_from_loading_to_resuming_or_refused(name: str) -> None:
    with families.quiet():
        case = families.through(name)
    assert (case.result, case.decoding) == EXPECTED[name], case


@pytest.mark.slow
def test_a_tenth_of_the_sweep() -> None:
    outcome = families.run(len(families.SHORT))
    assert outcome.failures == 0, outcome.details
    assert outcome.trials == len(families.SHORT)
    assert all(outcome.control.values())


def test_what_padding_and_other_rows_states_do_is_seen() -> None:
    with families.quiet():
        assert families.seen_of_wrong_code() == {"padding_read": 1, "states_not_selected": 1}


def test_the_table_in_the_documents_is_what_the_sweep_saw() -> None:
    result = json.loads((RESULTS / "faults-families.json").read_text(encoding="utf-8"))
    assert result["failures"] == 0
    assert result["details"]["results"]["exact"] + result["details"]["results"]["refused"] >= 100
    assert len(result["details"]["cases"]) >= len(families.names())
    text = families_table.PAGE.read_text(encoding="utf-8")
    assert families_table.page(text, result) == text

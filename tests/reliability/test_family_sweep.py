"""A tenth of the sweep over architectures, and that its table is what the last sweep saw."""

from __future__ import annotations

import importlib.util
import json

import pytest

from reliability import families
from reliability.record import RESULTS, ROOT

spec = importlib.util.spec_from_file_location("families_table", ROOT / "scripts/families_table.py")
assert spec is not None
assert spec.loader is not None
families_table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(families_table)
EXPECTED = {
    "bart": ("exact", "aligned"),
    "bert": ("refused", "layers between its backbone and its output embeddings"),
    "bert-generation": ("refused", "tokens attend to what follows them"),
    "falcon_h1": ("exact", "plain"),
    "gemma3_text": ("exact", "plain"),
    "gpt2": ("exact", "plain"),
    "gpt_oss": ("exact", "plain"),
    "lfm2": ("exact", "plain"),
    "llama": ("exact", "by hand"),
    "llama4_text": ("exact", "plain"),
    "mamba": ("exact", "aligned"),
    "mllama": ("refused", "transformers has no causal language model"),
    "openai-gpt": ("exact", "recomputed"),
    "qwen3": ("exact", "by hand"),
    "recurrent_gemma": ("exact", "recomputed"),
    "smolvlm": ("exact", "plain"),
    "xlm": ("refused", "tokens attend to what follows them"),
    "xmod": ("refused", "cannot be run"),
}
"""How a type is decoded, or why it is refused."""


@pytest.mark.parametrize("name", EXPECTED)
def test_an_architecture_is_exact_from_loading_to_resuming_or_refused(name: str) -> None:
    with families.quiet():
        case = families.through(name)
    result, what = EXPECTED[name]
    assert case.result == result, case
    assert what in (case.decoding or case.message), case


def test_they_are_a_tenth_of_the_sweep_and_of_every_kind() -> None:
    whole = json.loads((RESULTS / "faults-families.json").read_text(encoding="utf-8"))["details"]
    built = {n: case for n, case in whole["cases"].items() if case["result"] != "not built"}
    assert EXPECTED.keys() == set(families.SHORT) <= built.keys()
    assert 10 * len(EXPECTED) >= len(built)
    for kinds in (
        {name: case.get("decoding") for name, case in built.items()},
        {name: case["tokenizer"] for name, case in built.items()},
        {
            name: case["result"] == "refused" and families_table.reason(case)
            for name, case in built.items()
        },
    ):
        assert {kinds[name] for name in EXPECTED} == {*kinds.values()}


def test_a_sweep_counts_what_is_broken() -> None:
    cases = [
        families.Case("a", result="exact", gaps={"drawn": 1e-6}),
        families.Case("b", result="BROKEN"),
        families.Case("c"),
    ]
    outcome = families.summary(cases, {})
    assert (outcome.trials, outcome.failures) == (2, 1)
    assert outcome.details["cases"]["a"]["largest_gap_nats"] == 1e-6


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

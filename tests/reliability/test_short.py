"""Short versions of the harnesses, and that their detectors see what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from reliability import masks, mutants, numerics, record
from reliability.__main__ import HARNESSES


def test_no_gradient_is_infinite_over_extreme_logits() -> None:
    outcome = numerics.run(HARNESSES["numerics"][0])
    assert outcome.failures == 0, outcome.details
    assert outcome.trials >= 10_000
    assert min(outcome.control.values()) > 1000  # torch's kl_div the other way round
    assert set(outcome.details["gradients_by_term"]) > set(numerics.TERMS)


@pytest.mark.parametrize("name", numerics.TERMS)
def test_a_bad_gradient_of_any_term_would_be_counted(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Negative control: a term whose gradient is NaN in one row."""
    case = next(c for c in map(numerics.random_case, range(99)) if c.ruled_out == "nobody")
    good = numerics.TERMS[name]

    def spoiled(tokens: torch.Tensor, old: torch.Tensor) -> numerics.Term:
        term = good(tokens, old)

        def call(block: numerics.Block, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
            value, gradient = term(block, rows)
            gradient[0] = torch.nan
            return value, gradient

        call.num_student_top = getattr(term, "num_student_top", 0)  # type: ignore[attr-defined]
        return call

    assert numerics.judged(case, name)[0] == 0
    monkeypatch.setitem(numerics.TERMS, name, spoiled)
    assert numerics.judged(case, name)[0] > 0


def test_a_logit_moves_the_loss_only_where_it_should() -> None:
    outcome = masks.run(HARNESSES["masks"][0])
    assert outcome.failures == 0, outcome.details
    assert outcome.trials == 300
    assert all(count > 20 for count in outcome.control.values())  # of 30


def test_every_mutant_applies_to_the_code_as_it_is() -> None:
    """The list ages with the code; running it takes minutes, seeing that it fits does not."""
    found = mutants.applicable()
    texts = {(m.old, m.new) for m in found}
    assert [str(m) for m in mutants.mutants() if (m.old, m.new) not in texts] == []
    assert len({(m.path, m.old, m.new) for m in found}) == len(found)
    assert all(Path(record.ROOT, test).is_file() for m in found for test in m.tests)


def test_a_result_says_how_sure_it_is(tmp_path: Path) -> None:
    good = record.Outcome("p", 300, 0, {"seen": 1})
    assert good.bound == pytest.approx(3 / 300, rel=0.01)  # the rule of three
    assert record.Outcome("p", 300, 1, {}).bound is None
    assert record.Outcome("p", 300, 0, {}, is_sample=False).bound is None
    path = record.write("x", good, 1.25, tmp_path)
    table = json.loads(path.read_text())
    assert (table["trials"], table["failures"], table["bound_95"]) == (300, 0, good.bound)
    assert table["versions"]["torch"]

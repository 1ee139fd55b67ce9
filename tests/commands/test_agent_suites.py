"""`eval --suite` and `check` on conversations: what is refused, what is cut, what is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from calling import ROOT, TEACHER, call, succeed

from tutelage.config.conversations import LedgerToolsData
from tutelage.data.suites import SUITES
from tutelage.envs.ledger_tools import LedgerToolsTask
from tutelage.errors import ConfigError
from tutelage.evaluation.agents import cuts, fitted
from tutelage.evaluation.benchmark import Benchmark
from tutelage.rollout.request import Agent

AGENT = "package:tutelage/assets/ledger-tools-teacher"
CONFIG = ROOT / "configs" / "ledger_tools.toml"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(*arguments: object) -> str:
    outcome = call(*arguments)
    assert outcome.code == 2, outcome
    assert outcome.err.splitlines()[-1].startswith("tutelage: ")
    return outcome.err.splitlines()[-1]


def conversations() -> Benchmark:
    task = LedgerToolsTask()
    agent = Agent(task.environment, LedgerToolsData(max_inserted_tokens=300))
    return Benchmark("b", tuple(task.held_out(1)), task.grade, 100, agent=agent)


@pytest.mark.parametrize("option", [("--no-chat",), ("--chat",), ("--suffix", "x")])
@pytest.mark.parametrize("suite", ["ledger-tools", "gsm8k,shopping1"])
def test_options_that_conversations_do_not_use_are_refused(
    option: tuple[str, ...], suite: str
) -> None:
    line = refused("eval", AGENT, "--suite", suite, *option)
    assert f"{option[0]} is not for conversations" in line
    line = refused("eval", "http://127.0.0.1:1/v1", "--suite", suite, *option)
    assert f"{option[0]} is not for conversations" in line


def test_limits_are_cut_to_the_context_and_a_given_length_is_kept() -> None:
    def limits(room: int, is_given: bool) -> tuple[int, int, str]:
        found = fitted(conversations(), room, is_given)
        assert found.agent is not None
        inserted = found.agent.limits.max_inserted_tokens
        return found.max_new_tokens, inserted, cuts(conversations(), found)

    assert limits(400, True) == limits(400, False) == (100, 300, "")
    assert limits(200, True) == (100, 100, "max_inserted_tokens from 300 to 100")
    cut = "max_new_tokens from 100 to 50, max_inserted_tokens from 300 to 150"
    assert limits(200, False) == (50, 150, cut)
    with pytest.raises(ConfigError, match="Lower --max-new-tokens"):
        limits(100, True)


def test_a_suite_says_which_limits_the_context_cut() -> None:
    command = ("eval", AGENT, "--suite", "ledger-tools", "--num-problems", 1, "--num-samples", 1)
    found = succeed(*command, "--max-new-tokens", 100, "--out", "e")
    context = "to fit the model's context of 1024"
    assert f"ledger-tools: max_inserted_tokens from 4096 to 905, {context}\n" in found.err
    about = json.loads(Path("e/settings.json").read_text())["benchmarks"]["ledger-tools"]
    assert about["max_new_tokens"] == 100
    assert about["conversations"]["max_inserted_tokens"] == 905


def test_a_model_without_a_chat_template_is_no_agent() -> None:
    line = refused("eval", TEACHER, "--suite", "ledger-tools")
    assert "has no chat template, which says how turns follow one another" in line


def test_sample_says_that_it_leads_no_conversations() -> None:
    assert "sample leads none" in refused("sample", AGENT)


def test_help_names_the_suites_of_agents() -> None:
    said = "".join(succeed("eval", "--help").out.split())
    for name in (*SUITES, "ledger-tools"):
        assert name in said


def test_check_says_how_conversations_are_led() -> None:
    lines = succeed("check", CONFIG, "data.max_turn_tokens=97", "device=cpu").out.splitlines()
    (line,) = (line for line in lines if line.startswith("conversations: "))
    assert line == (
        "conversations: calls in the format json; at most 8 turns, 96 generated tokens, 97 of "
        "them a turn, 256 inserted tokens"
    )
    assert any("data.max_turn_tokens = 97 has no effect" in line for line in lines)
    line = refused("check", CONFIG, "data.enable_thinking=false", "device=cpu")
    assert "data.enable_thinking = false has no effect" in line

"""What `train` shows: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import pty
import re
import shlex
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from calling import LEDGER, TEACHER, TINY, call, read_jsonl, succeed

from tutelage import cli
from tutelage.cli import main
from tutelage.commands import progress
from tutelage.commands import train as command
from tutelage.commands.progress import PERIOD_S, PlainPhases, Reporter
from tutelage.config.evaluation import EvaluationConfig
from tutelage.config.parse import load_config
from tutelage.config.schema import FileData

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
LINE = re.compile(
    r"loss (?P<loss>\S+) KL (?P<kl>\S+) entropy (?P<entropy>\S+) kept (?P<kept>\d+)% "
    r"(?P<speed>\d+) tokens/s"
)


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing the report takes longer than these runs."""
    monkeypatch.setattr(command, "write_report", lambda folder: folder / "report.html")


def in_terminal(
    monkeypatch: pytest.MonkeyPatch, columns: int, action: Callable[[], Any]
) -> list[str]:
    """Frames that a terminal of this width got while the action ran."""
    ours, theirs = pty.openpty()
    got = bytearray()

    def listen() -> None:
        try:
            while part := os.read(ours, 4096):
                got.extend(part)
        except OSError:  # how Linux says that the other side was closed
            return

    reader = threading.Thread(target=listen)
    reader.start()
    with monkeypatch.context() as patch, os.fdopen(theirs, "w", encoding="utf-8") as terminal:
        patch.setattr(sys, "stdout", terminal)
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", str(columns))
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            patch.delenv(name, raising=False)
        action()
    reader.join()
    os.close(ours)
    return [ANSI.sub("", frame).strip() for frame in re.split(r"[\r\n]+", got.decode())]


def test_a_terminal_shows_every_number_of_the_last_step_on_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    command = [
        "train",
        str(LEDGER),
        *TINY,
        f"out={folder}",
        "num_steps=2",
        "evaluation.num_problems=0",
    ]
    frames = in_terminal(monkeypatch, 80, lambda: main(command))
    last = read_jsonl(folder / "metrics.jsonl")[-1]
    live = [frame for frame in frames if frame.startswith("2/2")]
    shown = LINE.search(live[-1])
    assert shown, live
    for name, key in {"loss": "loss", "kl": "reverse_kl_nats", "entropy": "entropy_nats"}.items():
        assert float(shown[name]) == pytest.approx(last[key], abs=6e-4)
    assert int(shown["kept"]) == round(100 * last["num_kept"] / last["num_rows"])
    speed = last["num_rows"] / sum(last["seconds"].values())
    assert int(shown["speed"]) == pytest.approx(speed, abs=1)
    assert re.search(r" \d\d:\d\d ", live[-1]), "no time to go"
    assert all(len(frame) <= 80 for frame in frames if frame.startswith("2/2"))
    assert any(frame == f"report: {folder / 'report.html'}" for frame in frames)


@pytest.mark.parametrize("columns", [80, 120])
def test_the_longest_line_fits(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    metrics = {
        "step": 123, "loss": 12.3456, "reverse_kl_nats": 2.34567, "entropy_nats": 1.23456,
        "num_rows": 98765, "num_kept": 98765, "seconds": {"learn_s": 60.0},
    }  # fmt: skip

    def show() -> None:
        with Reporter(999) as reporter:
            reporter.log("warning: [bold] stays as it is")
            reporter.on_step(metrics)

    frames = in_terminal(monkeypatch, columns, show)
    assert "warning: [bold] stays as it is" in frames
    (found, *_) = [frame for frame in frames if frame.startswith("123/999")]
    assert ("━" in found) == (columns == 120)
    assert found.endswith("loss 12.346 KL 2.346 entropy 1.235 kept 100% 1646 tokens/s")


def test_elsewhere_steps_are_plain_lines(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    out = succeed("train", LEDGER, *TINY, f"out={folder}", "num_steps=2",
                  "evaluation.num_problems=0").out  # fmt: skip
    assert "\x1b" not in out
    assert "\r" not in out
    lines = [line for line in out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["1/2", "2/2"]
    metrics = read_jsonl(folder / "metrics.jsonl")
    for line, step in zip(lines, metrics, strict=True):
        shown = LINE.search(line)
        assert shown
        assert float(shown["loss"]) == pytest.approx(step["loss"], abs=6e-5)
        assert line.endswith(f"{sum(step['seconds'].values()):.2f} s")


# --- phases ---------------------------------------------------------------------------------------

EVALUATED = ("evaluation.num_problems=3", "evaluation.num_samples=2", "num_steps=1")


class AtOnce:
    """A timer that does not wait."""

    daemon = False

    def __init__(self, seconds: float, action: Callable[[], None]) -> None:
        self.seconds, self.action = seconds, action

    def start(self) -> None:
        if self.seconds != PERIOD_S:  # what is told again would be told for ever
            self.action()

    def cancel(self) -> None:
        pass


def test_training_tells_what_it_does_before_and_between_steps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(progress, "Timer", AtOnce)
    out = succeed("train", LEDGER, *TINY, *EVALUATED, f"out={tmp_path / 'run'}").out
    told = [
        "loading the teacher package:", "loading the student package:", "trying both models",
        "evaluating the student: completions", "evaluating the student: completions 6 of 6",
        "held-out KL", "evaluating the teacher: completions 6 of 6", "student at step 0:",
        "first step", "step 1/1", "saving a checkpoint", "exporting the student",
        "verdict: too few problems to say: ", "writing the report", "report: ",
        f"results in {tmp_path / 'run'}: student (the trained model), metrics.jsonl (every step)",
        "next: tutelage eval ",
    ]  # fmt: skip
    place = 0
    for line in told:
        assert line in out[place:], (line, out)
        place = out.index(line, place)


def test_a_terminal_shows_the_phase_in_the_line_of_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def show() -> None:
        with Reporter(6) as reporter:
            reporter.phase("loading the teacher [x]")
            reporter._progress.refresh()
            reporter.phase("evaluating: completions", 12, 64)
            reporter._progress.refresh()

    frames = in_terminal(monkeypatch, 80, show)
    live = [frame for frame in frames if frame.startswith("0/6")]
    assert any(frame.endswith("loading the teacher [x]") for frame in live)
    assert live[-1].endswith("evaluating: completions 12 of 64")


@pytest.mark.parametrize("command", ["eval", "sample", "score"])
def test_other_commands_tell_what_they_do_on_standard_error(
    monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(progress, "Timer", AtOnce)
    options = ("--num-prompts", 3, "--num-samples", 2, "--max-new-tokens", 8)
    if command == "score":
        model, options = str(LEDGER), ("--num-prompts", 3, "sampling.max_new_tokens=8")
    else:
        model = TEACHER
    outcome = succeed(command, model, *options)
    assert "loading" in outcome.err.splitlines()[0]
    assert re.search(r"^(ledger|sampling): completions (\d+) of \2$", outcome.err, re.MULTILINE)
    assert "sampling" not in outcome.out


def test_counts_are_told_in_at_most_eleven_lines_and_short_phases_are_not() -> None:
    told: list[str] = []
    phases = PlainPhases(told.append)
    phases("loading")
    phases("work", 0, 1000)
    for done in range(1, 1001):
        phases("work", done, 1000)
    phases("")
    assert len(told) <= 11
    assert told[-1] == "work 1000 of 1000"
    assert not any("loading" in line for line in told)


class ByHand:
    """Timers that fire when a test says so."""

    daemon = False
    waiting: list[ByHand]

    def __init__(self, seconds: float, action: Callable[[], None]) -> None:
        self.seconds, self.action = seconds, action

    def start(self) -> None:
        ByHand.waiting.append(self)

    def cancel(self) -> None:
        pass  # one that has fired meanwhile cannot be cancelled any more


def test_what_lasts_is_told_every_half_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "Timer", ByHand)
    monkeypatch.setattr(progress, "DELAY_S", 2.0)
    ByHand.waiting = []
    told: list[str] = []

    def fire() -> float:
        timer = ByHand.waiting.pop(0)
        timer.action()
        return timer.seconds

    phases = PlainPhases(told.append)
    phases("loading")
    assert [fire() for _ in range(3)] == [2, 30, 30]
    assert told == ["loading", "loading, for 32 s", "loading, for 62 s"]
    phases("work", 0, 4)
    phases("work", 1, 4)
    for _ in range(2):
        fire()  # of loading, and of the beginning of work, which have ended
    assert fire() == 30
    assert told[3:] == ["work 1 of 4", "work 1 of 4, for 30 s"]
    phases("work", 4, 4)
    fire()
    assert (told[5:], ByHand.waiting) == (["work 4 of 4"], [])
    phases.remind("step 3/9")
    assert fire() == 30
    phases("")
    fire()
    assert (told[6:], ByHand.waiting) == (["step 3/9, for 30 s"], [])


def test_a_long_step_is_told_in_plain_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "Timer", ByHand)
    ByHand.waiting = []
    metrics = {
        "step": 1, "loss": 1.0, "reverse_kl_nats": 1.0, "entropy_nats": 1.0,
        "num_rows": 1, "num_kept": 1, "seconds": {"learn_s": 60.0},
    }  # fmt: skip
    with Reporter(2) as reporter:
        reporter.phase("")
        assert ByHand.waiting == []
        reporter.on_step(metrics)
        reporter.phase("")
        told: list[str] = []
        monkeypatch.setattr(reporter._plain, "_show", told.append)
        ByHand.waiting.pop().action()
        assert told == ["step 2/2, for 30 s"]
        reporter.on_step(metrics | {"step": 2})
        ByHand.waiting.clear()
        reporter.phase("")
        assert ByHand.waiting == []


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("improved", "tutelage eval 'a b' --suite held-out"),
        ("too few problems to say", "tutelage eval 'a b' --suite held-out --num-problems 512"),
        ("cut off", f"tutelage train {LEDGER} sampling.max_new_tokens=128"),
        ("worse", f"tutelage train {LEDGER} optimizer.learning_rate=0.00033"),
        ("unchanged", f"tutelage train {LEDGER} num_steps=240"),
    ],
)
def test_the_next_command_is_what_the_verdict_asks_for(word: str, said: str) -> None:
    config = load_config(LEDGER)
    assert command.next_command(word, config, str(LEDGER), Path("a b")) == said
    words = said.split()
    if words[1] == "train":
        assert load_config(LEDGER, words[3:]) != config


def test_the_next_run_has_the_same_overrides_in_another_folder() -> None:
    given = ["selection.rule=soft_or", "out=a b", "num_steps=10", "data.suffix=be brief"]
    config = load_config(LEDGER, ["num_steps=10", "out=a b"])
    found = command.next_command("unchanged", config, "mine.toml", Path("a b"), given)
    train, name, *rest = shlex.split(found)[1:]
    assert (train, name) == ("train", "mine.toml")
    assert rest == [given[0], given[3], "num_steps=40", "out=a b-2"]


@pytest.mark.parametrize(
    ("num_held_out", "said"),
    [
        (36, "tutelage eval run --suite held-out --num-problems 36"),
        (1000, "tutelage eval run --suite held-out --num-problems 64"),
        (16, "tutelage train mine.toml num_steps=40"),  # all of them were measured
    ],
)
def test_the_next_command_asks_for_no_more_problems_than_are_held_out(
    num_held_out: int, said: str
) -> None:
    data = FileData("file", "prompts.jsonl", num_held_out=num_held_out)
    config = replace(load_config(LEDGER), data=data, num_steps=10, evaluation=EvaluationConfig(16))
    found = command.next_command("too few problems to say", config, "mine.toml", Path("run"))
    assert found == said


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("eval", TEACHER), "nothing was saved"),
        (("sample", TEACHER), "nothing was saved"),
        (("eval", TEACHER, "--suite", "x.jsonl"), "the same command continues"),
        (("train", str(LEDGER)), "the same command continues"),
    ],
)
def test_control_c_promises_only_what_holds(
    monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], said: str
) -> None:
    def interrupt(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli._COMMANDS, command[0], interrupt)
    outcome = call(*command)
    assert outcome.code == 130
    assert outcome.err == f"tutelage: interrupted; {said}\n"


def test_a_step_of_rewards_shows_the_reward() -> None:
    metrics = {"loss": 0.0, "reverse_kl_nats": None, "entropy_nats": 0.5, "reward_mean": 0.4375,
               "num_rows": 10, "num_kept": 10, "seconds": {"learn_s": 1.0}}  # fmt: skip
    assert progress._line(metrics, 3).startswith("reward 0.438 KL - entropy 0.500 kept 100% ")
    del metrics["reward_mean"]
    assert progress._line(metrics, 3).startswith("loss 0.000 KL - entropy")

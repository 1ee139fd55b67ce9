"""Fuzzing of the mathematics grader: hostile and mutated answers, timed and watched.

    python reliability/grader.py --inputs 1000000 --minutes 15
    python reliability/grader.py --inputs 2000 --contestant math-verify

Counts, of every input: exceptions, seconds, executions and file accesses (audit events, here and in
the worker) and canary files. The same inputs can be given to math-verify alone, in a process that
is restarted when an input takes longer than a minute.
"""

from __future__ import annotations

import argparse
import copy
import heapq
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .record import Outcome

MINUTES = float(os.environ.get("GRADER_MINUTES", "15"))
"""At most so long does a run of the harness take."""
LIMIT_S = 5.5
"""The grader's time limit and half a second for all around it."""
BLOCKED = "blocked:"
"""How the reason begins that counts an action refused in the worker; its audit event follows."""
MAX_LISTED = 50
CANARY = Path(tempfile.gettempdir()) / f"tutelage-canary-{os.getpid()}"

PLAIN = (
    "42", "-7", "1,234", "0.50", r"\frac{3}{4}", r"-\frac{1}{2}", "(1,2)", "[0,1)", "1,2,3",
    "50\\%", r"12\text{ cm}", r"\text{(B)}", "x=5", r"\{1,2\}", "3:30", "1010_2", r"x \in (1,2]",
    "x>3",
    r"\text{June 20}", r"(-\infty,1)\cup(2,\infty)", "1 1/2", "2^{10}", r"90^\circ", r"\$5",
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\pm 3", "½", "no solution", "7 and 9", "1.5e3",
)  # fmt: skip
FORMULAS = (
    r"2\sqrt{3}", r"\frac{\pi}{3}", "x^2+2x+1", r"\frac{1+\sqrt{5}}{2}", "y=2x+1", "3+4i",
    r"\sin(30^\circ)", r"\log_2 8", r"e^{i\pi}", r"\frac{v_0^2}{2g}", r"|x-1|", r"\binom{5}{2}",
    r"\sum_{k=1}^{10} k", r"\sqrt[3]{54}", r"x^2+y^2=1", r"\lfloor x \rfloor", r"\tan^{-1} x",
)  # fmt: skip
PAYLOADS = tuple(
    text.replace("CANARY", str(CANARY))
    for text in (
        "__import__('os').system('touch CANARY')", "open('CANARY','w')", "exec('1')", "eval('1')",
        "().__class__.__bases__[0].__subclasses__()", "lambda: open('CANARY','w')", "exit()",
        "[x for x in open('/etc/passwd')]", r"\mathrm{__import__('os')}",
        "f'{open(\"CANARY\",\"w\")}'",
        r"\text{;touch CANARY}", "${7*7}", "{{7*7}}", "`touch CANARY`", "$(touch CANARY)",
        "import os",
    )
)  # fmt: skip
BOMBS = (
    "9^9^9^9", "9^{9^{9^{9}}}", "9**9**9**9", "10^{10^{10}}", "2^{99999999}", "(10^{9})!", "99999!",
    "5!!!!!!", "((((2^{9})^{9})^{9})^{9})^{9}", "1e999999999", r"\binom{100000000}{50000000}",
    r"\sum_{k=1}^{10000000000} \frac{1}{k}", r"\prod_{k=1}^{1000000} k", "(x+y+z+w)^{9999}",
    r"\int_0^1 e^{-x^{2}} \sin(x^{x}) dx", r"\gcd(9^{999},7)", r"\sqrt{2}^{\sqrt{2}^{\sqrt{2}}}",
    "0/0", "1/0", r"\frac{1}{0}", r"\log 0", "0^{-1}", r"\tan 90^\circ", r"\infty-\infty", "nan",
)  # fmt: skip
TOKENS = (
    *"0123456789xyzein+-*/^_=<>()[]{}|,.;:!'%$& ", r"\frac", r"\sqrt", "{", "}", r"\cdot", r"\pi",
    r"\left", r"\right", r"\text", r"\pm", r"\cup", r"\in", r"\infty", r"\begin{pmatrix}", r"\\",
    r"\end{pmatrix}", r"\sin", r"\log", r"\{", r"\}", "\ud800", "\x00", "\u202e", "٣", "²", "½",
    "−",
)  # fmt: skip
Pair = tuple[str, str]


def pairs(seed: int, formulas: float = 0.1, bombs: float = 0.005) -> Iterator[Pair]:
    """Endless pairs of prediction and gold, from a seed."""
    rng = random.Random(seed)
    while True:
        kind = rng.random()
        gold = rng.choice(PLAIN)
        if kind < bombs:
            yield rng.choice(BOMBS), rng.choice((*FORMULAS, *BOMBS))
        elif kind < bombs + formulas:
            yield _mutated(rng, rng.choice(FORMULAS), rng.randrange(3)), rng.choice(FORMULAS)
        elif kind < 0.3:
            yield rng.choice(PAYLOADS) + rng.choice(("", gold)), gold
        elif kind < 0.32:
            yield _huge(rng), gold
        elif kind < 0.6:
            yield "".join(rng.choices(TOKENS, k=rng.randrange(1, 30))), gold
        else:
            yield _mutated(rng, gold, rng.randrange(4)), gold


def _mutated(rng: random.Random, text: str, num_changes: int) -> str:
    for _ in range(num_changes):
        start, end = sorted(rng.choices(range(len(text) + 1), k=2))
        part = rng.choice(("", rng.choice(TOKENS), text[start:end] * 2))
        text = text[:start] + part + text[min(end, start + 3) :]
    return text


def _huge(rng: random.Random) -> str:
    part = rng.choice(("(", "{", "[", r"\{", "9", "-", ",", "1,", "^", r"\frac{", "x+", r"\boxed{"))
    return part * rng.choice((50, 300, 2_000, 100_000, 1_000_000 // len(part)))


@dataclass
class Watch:
    """What happened over all inputs."""

    num_inputs: int = 0
    num_accepted: int = 0
    exceptions: Counter[str] = field(default_factory=Counter)
    audit_events: Counter[str] = field(default_factory=Counter)
    worst_s: float = 0.0
    worst_input: str = ""
    num_over_one_s: int = 0
    num_late: int = 0
    """Inputs that took longer than the grader's limit and half a second."""
    p999_s: float = 0.0
    """Seconds that one input in a thousand exceeds."""
    num_restarts: int = 0
    offences: list[tuple[str, str]] = field(default_factory=list)
    """The first exceptions, audit events and blocked actions, each with its input."""

    def __post_init__(self) -> None:
        self._slowest: list[float] = []
        self._pair: Pair = ("", "")

    def run(self, grade: Callable[[str, str], bool], pair: Pair) -> None:
        """Grade one pair, by a caller that catches everything a grader must not let out."""
        from tutelage.grading.pool import undecided

        self._pair = pair
        before = undecided()
        start = time.monotonic()
        try:
            self.num_accepted += bool(grade(*pair))
        except Exception as error:
            self.exceptions[type(error).__name__] += 1
            self._accuse(type(error).__name__)
        self.note(pair, time.monotonic() - start)
        for reason, number in undecided().items():
            if reason.startswith(BLOCKED) and number > before.get(reason, 0):
                self._accuse(reason)

    def _accuse(self, what: str) -> None:
        if len(self.offences) < MAX_LISTED:
            self.offences.append((what, repr(self._pair)[:500]))

    def note(self, pair: Pair, seconds: float) -> None:
        """Count one input and its time."""
        self.num_inputs += 1
        self.num_over_one_s += seconds > 1
        self.num_late += seconds > LIMIT_S
        # The slowest thousandth is all that has to be kept.
        heapq.heappush(self._slowest, seconds)
        while len(self._slowest) > 1 + self.num_inputs // 1000:
            heapq.heappop(self._slowest)
        self.p999_s = self._slowest[0]
        if seconds > self.worst_s:
            self.worst_s, self.worst_input = seconds, repr(pair)[:200]

    def listen(self) -> None:
        """Count executions, and accesses to files and processes, in this thread's process."""
        here = threading.get_ident()

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            if threading.get_ident() == here and _is_suspicious(event, arguments):
                self.audit_events[event] += 1
                self._accuse(event)

        sys.addaudithook(hook)


def _is_suspicious(event: str, arguments: tuple[object, ...]) -> bool:
    if event in ("compile", "exec"):
        code = arguments[0] if event == "exec" else None
        name = str(arguments[1]) if code is None else code.co_filename  # type: ignore[attr-defined]
        return not name.startswith((sys.prefix, sys.base_prefix, "<frozen", os.getcwd()))
    if event == "open":
        return str(CANARY) in str(arguments[0]) or "passwd" in str(arguments[0])
    return event in ("os.system", "os.remove", "os.rename", "socket.connect")


def fuzz(
    num_inputs: int, minutes: float, seed: int = 0, formulas: float = 0.1, bombs: float = 0.005
) -> Watch:
    """Our grader: half of the inputs as answers, half as boxed completions."""
    from tutelage.grading.mathematics import answers_equal, grade_completion

    watch = Watch()
    CANARY.unlink(missing_ok=True)
    watch.listen()
    end = time.monotonic() + 60 * minutes
    for number, (prediction, gold) in enumerate(pairs(seed, formulas, bombs)):
        if number >= num_inputs or time.monotonic() > end:
            break
        if number % 2:
            watch.run(grade_completion, (rf"so \boxed{{{prediction}}}", gold))
        else:
            watch.run(answers_equal, (prediction, gold))
    return watch


# --- math-verify alone, in a child ----------------------------------------------------------------


def answer_as_math_verify() -> None:
    """Child: grade pairs of standard input as math-verify's users do; a line for each."""
    from math_verify import parse, verify

    watch = Watch()
    verify(parse("$1$"), parse(r"$\frac{x}{2}$"))
    watch.listen()
    for line in sys.stdin:
        prediction, gold = json.loads(line)
        watch.exceptions.clear()
        watch.audit_events.clear()
        watch.run(lambda p, g: verify(parse(f"${g}$"), parse(f"${p}$")), (prediction, gold))
        seen = [watch.num_accepted, dict(watch.exceptions), dict(watch.audit_events)]
        print(json.dumps(seen), flush=True)
        watch.num_accepted = 0


def fuzz_math_verify(num_inputs: int, minutes: float, seed: int = 0) -> Watch:
    """math-verify with its default limits, on its main thread, restarted when it hangs or dies."""
    watch = Watch()
    end = time.monotonic() + 60 * minutes
    child = _child()
    for number, pair in enumerate(pairs(seed)):
        if number >= num_inputs or time.monotonic() > end:
            break
        start = time.monotonic()
        killer = threading.Timer(60, child.kill)
        killer.start()
        try:
            child.stdin.write(json.dumps(pair) + "\n")  # type: ignore[union-attr]
            child.stdin.flush()  # type: ignore[union-attr]
            line = child.stdout.readline()  # type: ignore[union-attr]
        except OSError:
            line = ""
        killer.cancel()
        watch.note(pair, time.monotonic() - start)
        if line:
            accepted, exceptions, events = json.loads(line)
            watch.num_accepted += accepted
            watch.exceptions.update(exceptions)
            watch.audit_events.update(events)
        else:
            child.kill()
            child.wait()
            watch.num_restarts += 1
            child = _child()
    child.kill()
    return watch


def _child() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, __file__, "--contestant", "child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def num_blocked(undecided: dict[str, int]) -> int:
    """Actions of workers that were refused, of all audit events."""
    return sum(number for reason, number in undecided.items() if reason.startswith(BLOCKED))


def report(watch: Watch, contestant: str, limit_s: float) -> dict[str, object]:
    """The result as JSON, with the machine."""
    from tutelage.grading.pool import undecided

    return {
        "contestant": contestant,
        "versions": {n: metadata.version(n) for n in ("math-verify", "sympy")},
        "python": platform.python_version(),
        "limit_s": limit_s,
        **{
            name: copy.copy(value)  # what this watch still hears after its report is not in it
            for name, value in vars(watch).items()
            if not name.startswith("_")
        },
        "canary_created": CANARY.exists(),
        "undecided": undecided(),
        "load_average": os.getloadavg(),
    }


def run(num_inputs: int) -> Outcome:
    """For `python -m reliability grader`: as many inputs as fit into 15 minutes."""
    from reliability.record import Outcome
    from tutelage.grading.pool import TIME_LIMIT_S, undecided

    watch = fuzz(num_inputs, MINUTES)
    details = report(watch, "tutelage", TIME_LIMIT_S)
    failures = sum(watch.exceptions.values()) + sum(watch.audit_events.values())
    failures += CANARY.exists() + watch.num_late + num_blocked(undecided())
    control = Watch()
    control.listen()
    warnings.simplefilter("ignore", SyntaxWarning)
    for pair in islice(pairs(0), 1000):
        control.run(lambda text, _: bool(compile(text, "answer", "eval")), pair)
    return Outcome(
        "hostile answers raise nothing, execute nothing and end in time",
        trials=watch.num_inputs,
        failures=failures,
        control={
            "inputs given to a grader that compiles them": control.num_inputs,
            "audit events seen of it": sum(control.audit_events.values()),
            "exceptions seen of it": sum(control.exceptions.values()),
        },
        details=details | {"ended_by": "number" if watch.num_inputs == num_inputs else "time"},
    )


def main() -> None:
    """Run the harness and print, or write, its result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--contestant", default="tutelage", help="tutelage or math-verify")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    if arguments.contestant == "child":
        answer_as_math_verify()
        return
    from tutelage.grading.pool import TIME_LIMIT_S

    harness = fuzz if arguments.contestant == "tutelage" else fuzz_math_verify
    watch = harness(arguments.inputs, arguments.minutes, arguments.seed)
    text = json.dumps(report(watch, arguments.contestant, TIME_LIMIT_S), indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()

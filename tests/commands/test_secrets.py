"""Secrets of the environment reach the server they are for, and no file, output or command line."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

import pytest
from calling import LEDGER, TINY, write_jsonl

from reliability.server import EvilServer, good

SECRETS = {
    name: f"canary/{name.lower()}+{number}5e9a71c4"
    for number, name in enumerate(
        ("HF_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY", "TUTELAGE_API_KEY", "AWS_SECRET_ACCESS_KEY")
    )
}
PROGRAM = """
import json, sys
from pathlib import Path
from tutelage.cli import main
from tutelage.train.step import Step

train, evaluation, crash, command_lines = json.loads(sys.argv[1])
codes = [main(train), main(evaluation)]

def fail(self, number):
    own, children = Path("/proc/self"), Path("/proc/self/task").glob("*/children")
    pids = " ".join(path.read_text() for path in children).split()
    lines = [(Path("/proc") / pid / "cmdline").read_bytes() for pid in ["self", *pids]]
    Path(command_lines).write_bytes(b"".join(lines))
    raise ZeroDivisionError("a defect")

Step.generate = fail
try:
    main(crash)
finally:
    print(codes)
"""


def spellings(secret: str) -> Iterator[bytes]:
    """A secret as it stands, in JSON, in a URL and anywhere within base64."""
    yield secret.encode()
    yield json.dumps(secret).strip('"').replace("/", r"\/").encode()
    yield quote(secret, safe="").encode()
    for shift in range(3):
        encoded = base64.b64encode(b"x" * shift + secret.encode())
        yield encoded[4:-4]
        yield base64.urlsafe_b64encode(b"x" * shift + secret.encode())[4:-4]


def leaks(folder: Path, *outputs: bytes) -> set[str]:
    """Names of the secrets that stand in a file below the folder, in a name, or in an output."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    contents = [path.read_bytes() for path in files] + [str(files).encode(), *outputs]
    return {
        name
        for name, secret in SECRETS.items()
        if any(spelling in content for spelling in spellings(secret) for content in contents)
    }


@pytest.mark.parametrize("number", range(len(list(spellings("x")))))
def test_every_spelling_is_seen(tmp_path: Path, number: int) -> None:
    """The negative control: each secret leaked once, within other text."""
    for name, secret in SECRETS.items():
        spelling = list(spellings(secret))[number]
        (tmp_path / "log").write_bytes(b"ab" + spelling + b"cd")
        assert leaks(tmp_path) == {name}
        (tmp_path / "log").write_bytes(b"nothing")
        assert leaks(tmp_path, b"ab" + spelling + b"cd") == {name}
    assert leaks(tmp_path) == set()


TRACKERS = [
    "",
    pytest.param(
        "tensorboard",
        marks=pytest.mark.skipif(
            find_spec("tensorboard") is None,
            reason="tensorboard is an extra: grpc and protobuf are too large for every check",
        ),
    ),
]


@pytest.mark.parametrize("tracker", TRACKERS)
def test_no_command_leaks_a_secret(tmp_path: Path, tracker: str) -> None:
    """Two steps with a tracker, an evaluation of a server that wants the key, and a crash."""
    problems = write_jsonl(tmp_path / "p.jsonl", {"prompt": "2+2=", "answer": "4"})
    runs = tmp_path / "runs"
    common = ["train", str(LEDGER), *TINY, f"trackers={json.dumps([tracker] if tracker else [])}"]
    server = EvilServer(lambda body: good)
    with server.running() as url:
        evaluation = ["eval", url, "--suite", str(problems), "--model-name", "m"]
        commands = [
            [*common, f"out={runs / 'run'}"],
            [*evaluation, "--num-samples", "1", "--out", str(runs / "evaluation")],
            [*common, f"out={runs / 'crash'}"],
            str(tmp_path / "command-lines"),
        ]
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, json.dumps(commands)],
            env=os.environ | SECRETS | {"PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            check=False,
        )
    assert b"[0, 0]" in done.stdout, done.stderr.decode()
    assert b"ZeroDivisionError: a defect" in done.stderr
    keys = {headers["authorization"] for _, _, headers in server.seen}
    assert keys == {f"Bearer {SECRETS['TUTELAGE_API_KEY']}"}
    assert len([path for path in runs.rglob("*") if path.is_file()]) > 15
    assert bool(tracker) == bool(list(runs.rglob("events.out.tfevents.*")))
    assert b"tutelage.cli" in (tmp_path / "command-lines").read_bytes()
    assert leaks(tmp_path, done.stdout, done.stderr) == set()

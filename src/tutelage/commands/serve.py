"""`tutelage serve-teacher`: answer runs elsewhere with a teacher's final hidden states."""

from __future__ import annotations

import argparse
import ipaddress
import signal
from types import FrameType

from tutelage.models.load import load_model
from tutelage.rollout.http_client import KEY_VARIABLE, read_key
from tutelage.setup.trial import refuse_nonfinite, try_model
from tutelage.teachers.server import ServedModel, TeacherServer


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM."""
    signal.signal(signal.SIGTERM, _end)
    key = read_key()
    with TeacherServer(arguments.host, arguments.port, key) as server:
        name, who = arguments.model, f"teacher {arguments.model!r}"
        print(f"loading {name}", flush=True)
        model = load_model(name, arguments.dtype, arguments.device)
        refuse_nonfinite(model, who)
        served = server.served = ServedModel(model, name)
        notes = try_model(model, who, served.identity.vocab_size, decodes=False)
        for line in notes:
            print(f"warning: {line}")
        if key is None and not _is_local(arguments.host):
            print(
                f"warning: whoever reaches {server.url} can ask this model. Set {KEY_VARIABLE} "
                "here and in the runs, and keep the address on a trusted network"
            )
        identity = served.identity
        print(
            f"serving {type(model).__name__} {name} on {server.url}: {identity.dtype}, head of "
            f"{identity.vocab_size:,} x {identity.hidden_size:,} on {model.device}, weights "
            f"{served.weights[:16]}; Ctrl-C ends",
            flush=True,
        )
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("ended", flush=True)
    return 0


def _end(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends as Ctrl-C does."""
    raise KeyboardInterrupt


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

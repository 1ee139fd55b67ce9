"""Which process of a run is lost, how the others get to know it, and how they end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from patience import HANG_S
from tutelage.commands.launch import launch, rendezvous
from tutelage.commands.processes import sharing
from tutelage.config.parse import changed_keys, fingerprint, parse_config, to_table
from tutelage.errors import ConfigError, LostProcessError, RunError
from tutelage.setup import common_store
from tutelage.setup.common_store import Address, address_of
from tutelage.train import peers as module
from tutelage.train.distributed import Leaving
from tutelage.train.heartbeat import Lost, State, Watch, is_gone, own_state
from tutelage.train.peer_store import DONE, PeerStore
from tutelage.train.peers import Peers, peers_of

HERE = State(1)
MODELS = {"student": {"model": "a"}, "teacher": {"model": "b"}}


# --- judging --------------------------------------------------------------------------------------


def watch_of(*states: State, silent_s: float = 0.0) -> Watch:
    watch = Watch(0, len(states))
    watch.note(states, 0)
    watch.note(None, silent_s)
    return watch


@pytest.mark.parametrize(
    ("states", "gone", "lost"),
    [
        ([HERE, HERE, HERE], [], None),
        ([HERE, HERE, HERE], [2], Lost(2, "gone")),
        ([HERE, State(1, end="done"), HERE], [1], None),
        # what follows from a loss comes after its cause
        ([HERE, State(1, end="error", line="x"), HERE], [2], Lost(2, "gone")),
        ([HERE, State(1, end="error", line="x"), HERE], [1], Lost(1, "error", "x")),
        ([HERE, HERE, State(1, end="lost", line="1 left")], [1, 2], Lost(2, "lost", "1 left")),
        ([HERE, State(1, end="lost"), State(1, end="killed", line="by 9")], [1, 2],
         Lost(2, "killed", "by 9")),
        ([HERE, State(1, end="interrupted"), HERE], [1], Lost(1, "interrupted")),
    ],
)  # fmt: skip
def test_the_cause_of_a_loss_is_named(
    states: list[State], gone: list[int], lost: Lost | None
) -> None:
    watch = watch_of(*states)
    assert watch.lost([rank in gone for rank in range(3)], 10) == lost


def test_a_process_without_a_new_heartbeat_is_silent_after_the_limit_and_not_before() -> None:
    watch = watch_of(HERE, HERE, silent_s=9.0)
    assert watch.lost([False] * 2, 10) is None
    watch.note([HERE, State(2)], 1.0)
    watch.note(None, 9.0)  # the store did not answer
    assert watch.lost([False] * 2, 10) is None
    watch.note([State(3), State(2)], 1.0)
    assert watch.lost([False] * 2, 10) == Lost(1, "silent")


def test_a_process_that_never_started_is_named() -> None:
    watch = watch_of(HERE, HERE, State(), silent_s=10.0)
    assert not watch.has_started()
    watch.note([HERE, State(2), State()], 0)
    assert watch.lost([False] * 3, 10) == Lost(2, "late")


def test_a_process_is_gone_when_it_was_killed_or_its_number_is_another_one_s() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    own = own_state()
    start = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
    state = replace(own, pid=process.pid, started=start)
    assert not is_gone(own)
    assert not is_gone(state)
    assert is_gone(replace(state, started="1"))
    process.kill()
    # Until somebody waits for it, it is there in name only.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert is_gone(state)
    process.communicate()
    assert is_gone(state)
    assert not is_gone(replace(state, namespace="another machine"))


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{}", b'{"beat": 1}', b'{"beat": "1"}', b"\xff", b"[" * 99]
)
def test_what_is_no_heartbeat_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError):
        State.from_json(text)
    assert State.from_json(own_state().to_json().encode()) == own_state()


def test_the_store_is_that_of_the_launcher_or_of_process_0() -> None:
    found = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "7"}
    assert address_of(found) == Address(1, 2, "h", 7, is_in_process_0=True)
    launched = found | {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "3"}
    assert address_of(launched) == Address(1, 2, "h", 7, False, "3")
    for name, value in (("WORLD_SIZE", "1"), ("RANK", "2"), ("MASTER_PORT", ""), ("RANK", "-1")):
        assert address_of(found | {name: value}) is None


# --- ending ---------------------------------------------------------------------------------------


@pytest.fixture(name="other")
def _other(monkeypatch: pytest.MonkeyPatch) -> Iterator[PeerStore]:
    """Process 1 of 2, of which this is process 0."""
    monkeypatch.setattr(module, "_RUNS", count())
    monkeypatch.setattr(module, "PERIOD_S", 0.05)
    # A main thread that is slow to end is no reason to end the process of the tests.
    monkeypatch.setattr(Peers, "_exit", lambda _: None)
    # Shells start what runs in the background with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with rendezvous() as common:
        for name, value in (common | {"WORLD_SIZE": "2", "RANK": "0"}).items():
            monkeypatch.setenv(name, value)
        address = address_of(common | {"WORLD_SIZE": "2", "RANK": "1"})
        assert address is not None
        yield PeerStore(address, HANG_S)
    signal.signal(signal.SIGINT, before)


def run(folder: Path, limit_s: float, error: BaseException | None = None) -> None:
    """A run that fails, or waits for as long as nothing interrupts it."""
    run_of(peers_of(folder, limit_s), error)


def run_of(peers: Peers, error: BaseException | None = None) -> None:
    with peers, peers.told():
        peers.watch()
        if error is not None:
            raise error
        time.sleep(HANG_S)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (State(1, end="killed", line="was ended by SIGKILL"),
         "process 1 was ended by SIGKILL. The same command continues from checkpoint-000012."),
        (State(1, end="lost", line="process 7 is gone."), "process 7 is gone."),
        (State(1, host="far"), "process 1 on far has been silent for longer than "
         "process_timeout_s = 0.5 s. The same command continues from checkpoint-000012."),
        (State(), "process 1 has not started within process_timeout_s = 0.5 s. "
         "The same command continues from checkpoint-000012."),
    ],
)  # fmt: skip
def test_a_loss_ends_the_main_thread_in_one_line(
    other: PeerStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    state: State,
    said: str,
) -> None:
    monkeypatch.setattr(module, "_LEAST_ANSWER_S", HANG_S)  # the store is no part of it
    for name in ("checkpoint-000012", "checkpoint-000003", "checkpoint-000013.damaged"):
        (tmp_path / name).mkdir()
    other.exchange(state)
    with pytest.raises(LostProcessError) as caught:
        run(tmp_path, 0.5)
    assert str(caught.value) == said
    assert other.exchange(state)[0].end == "lost"


def test_all_say_the_same_about_a_loss(other: PeerStore, tmp_path: Path) -> None:
    """The other one saw that a process was gone, before its launcher wrote by what."""
    line = "process 1 (pid 9) is gone: it was killed or it crashed."
    assert other.agreed(line) == line
    other.exchange(State(1, end="killed", line="was ended by SIGKILL"))
    with pytest.raises(LostProcessError) as caught:
        run(tmp_path, HANG_S)
    assert str(caught.value) == line


def test_processes_without_shards_leave_without_importing_torch_s_tools_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They take a second, and others wait for the end."""
    name = "torch.distributed.tensor.debug"
    monkeypatch.delitem(sys.modules, name, raising=False)
    with Leaving(SimpleNamespace(num_processes=2, end_training=lambda: None)):  # type: ignore[arg-type]
        pass
    assert name not in sys.modules


def test_a_file_system_that_does_not_answer_delays_no_loss(
    other: PeerStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor a heartbeat, which looks for no checkpoint."""
    monkeypatch.setattr(module, "_LEAST_ANSWER_S", 0.3)
    thawed = threading.Event()

    def left() -> str:
        thawed.wait(HANG_S)
        return "Never said."

    other.exchange(State(1, end="killed", line="was ended by SIGKILL"))
    said = r"SIGKILL\. The same command continues from the newest checkpoint, if there is one\."
    with pytest.raises(LostProcessError, match=said):
        run_of(Peers(left, 1.2))
    thawed.set()


@pytest.mark.parametrize(
    ("is_saved", "said"),
    [(True, "The same command continues."), (False, "Start the same command again.")],
)
def test_a_command_that_is_no_run_names_no_checkpoint(
    is_saved: bool, said: str, other: PeerStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoint-000012").mkdir()
    monkeypatch.chdir(tmp_path)
    other.exchange(State(0, end="killed", line="was ended by SIGKILL"))
    with pytest.raises(LostProcessError) as caught, sharing("cpu", is_saved=is_saved):
        pass
    assert str(caught.value) == f"process 1 was ended by SIGKILL. {said}"


def test_a_process_of_this_machine_is_missed_at_once(other: PeerStore, tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    other.exchange(replace(own_state(), beat=1, pid=process.pid))
    with pytest.raises(LostProcessError, match=f"process 1 .pid {process.pid}. is gone"):
        run(tmp_path, HANG_S)


def test_an_error_of_a_connection_becomes_the_line_about_its_cause(
    other: PeerStore, tmp_path: Path
) -> None:
    other.exchange(State(1, end="error", line="the disk is full."))
    with pytest.raises(LostProcessError, match=r"^process 1 ended: the disk is full\.$"):
        run(tmp_path, HANG_S, RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed"))


def test_an_error_of_a_connection_while_all_are_there_is_one_line_too(
    other: PeerStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ASK_S", 0.1)
    other.exchange(replace(own_state(), beat=1))
    with pytest.raises(RunError, match=r"connection of the processes broke: NCCL.*anew") as caught:
        run(tmp_path, HANG_S, RuntimeError("NCCL error\nand a page about it"))
    assert "\n" not in str(caught.value)


def test_runs_whose_stores_have_one_port_do_not_hear_of_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second could not open the port, and its process 1 found the store of the first."""
    monkeypatch.setattr(module, "_DONE_S", 0.0)  # there is no process 1 of the first
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    names = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with peers_of(tmp_path / "first", HANG_S, names | {"RANK": "0"}) as first:
        first.watch()
        second = peers_of(tmp_path / "second", 0.5, names | {"RANK": "1"})
        with pytest.raises(LostProcessError, match="process 0 has not started"):
            run_of(second)
        assert not first.is_lost()


def test_a_broken_connection_is_made_anew_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once it may be to a process that is being killed, about which torch prints a page."""
    monkeypatch.setattr(common_store, "_RETRY_S", HANG_S)
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = ("127.0.0.1", server.port)
    store = PeerStore(Address(0, 2, *place, is_in_process_0=False), HANG_S)
    assert store.exchange(HERE) == [HERE, State()]
    del server
    with pytest.raises(RuntimeError):
        store.exchange(HERE)
    again = TCPStore(*place, is_master=True, wait_for_workers=False)
    with pytest.raises(RuntimeError, match="broke a moment ago"):
        store.exchange(HERE)
    monkeypatch.setattr(common_store, "_RETRY_S", 0.0)
    assert store.exchange(HERE) == [HERE, State()]
    assert again.port == place[1]


@pytest.mark.parametrize(
    ("error", "end"),
    [(None, "done"), (ConfigError("out of range."), "error"), (KeyError("a"), "error"),
     (KeyboardInterrupt(), "interrupted")],
)  # fmt: skip
def test_others_get_to_know_how_a_process_ended(
    other: PeerStore, tmp_path: Path, error: BaseException | None, end: str
) -> None:
    state = replace(own_state(), beat=1)
    other.exchange(state)
    caught: BaseException | None = None
    try:
        with peers_of(tmp_path, HANG_S) as peers, peers.told():
            peers.meet()
            if error is not None:
                raise error
    except (ConfigError, KeyError, KeyboardInterrupt) as found:
        caught = found
    assert caught is error
    found_state = other.exchange(state)[0]
    assert found_state.end == end
    assert found_state.line == {"done": "", "interrupted": ""}.get(
        end, "out of range." if isinstance(error, ConfigError) else "KeyError: 'a'."
    )


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (State(end="done"), None),
        (State(end="error", line="the disk is full."), "process 0 ended: the disk is full."),
        (State(end="killed", line="was ended by SIGKILL"),
         "process 0 was ended by SIGKILL. The same command starts anew: there is no checkpoint "
         "yet."),
    ],
)  # fmt: skip
def test_a_process_ends_properly_only_after_the_main_process(
    other: PeerStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: State, said: str | None
) -> None:
    """Which writes the report when the others have nothing left to do."""
    monkeypatch.setenv("RANK", "1")
    main = PeerStore(replace(other.address, rank=0), HANG_S)
    main.exchange(HERE)
    ends: list[str] = []

    def write() -> None:
        """Of the main process: it is alive for some heartbeats of this one, then it ends."""
        numbers = count(2)
        while (state := main.exchange(State(next(numbers)))[1]).beat < 10 and not state.end:
            time.sleep(0.01)
        ends.append(state.end)
        main.exchange(replace(end, beat=next(numbers)))

    thread = threading.Thread(target=write)
    caught: str | None = None
    try:
        with peers_of(tmp_path, HANG_S) as peers, peers.told():
            peers.meet()
            thread.start()
    except LostProcessError as error:
        caught = str(error)
    thread.join()
    assert (ends, caught) == ([""], said)
    assert main.exchange(State(end=end.end))[1].end == ("done" if said is None else "lost")


LINE = "process 2 is gone."


@pytest.mark.parametrize("first", [LINE, DONE])
def test_a_loss_at_the_very_end_ends_all_processes_alike(
    other: PeerStore, tmp_path: Path, first: str
) -> None:
    """Process 0 has nothing left to write when the others find one lost."""
    other.exchange(replace(own_state(), beat=1))
    caught: str | None = None
    try:
        with peers_of(tmp_path, HANG_S) as peers, peers.told():
            peers.meet()
            assert other.agreed(first) == first
    except LostProcessError as error:
        caught = str(error)
    assert caught == (LINE if first == LINE else None)
    assert other.exchange(HERE)[0].end == ("lost" if first == LINE else "done")


@pytest.mark.parametrize("first", ["a line of another", DONE])
def test_who_finds_one_lost_after_process_0_was_done_ends_properly(
    other: PeerStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """Also where process 0 ended before it could write more than that."""
    monkeypatch.setenv("RANK", "1")
    main = PeerStore(replace(other.address, rank=0), HANG_S)
    state = replace(HERE, end="killed", line="was ended by SIGKILL")
    main.exchange(HERE)
    caught: str | None = None
    try:
        with peers_of(tmp_path, HANG_S) as peers, peers.told():
            peers.meet()
            assert main.agreed(first) == first
            main.exchange(replace(state, beat=2))
    except LostProcessError as error:
        caught = str(error)
    assert caught == (None if first == DONE else first)


def test_a_refusal_that_all_share_is_said_as_it_is(
    other: PeerStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one was faster, and this one is told so before it fails."""
    monkeypatch.setattr(module, "ERROR_GRACE_S", HANG_S)
    other.exchange(State(1, end="error", line="no such model."))

    def load() -> None:
        with peers_of(tmp_path, HANG_S) as peers, peers.told():
            peers.meet()
            raise ConfigError("no such model.")

    with pytest.raises(ConfigError, match="no such model"):
        load()


def test_a_process_that_was_interrupted_for_good_interrupts_the_others(
    other: PeerStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ERROR_GRACE_S", 0.0)
    other.exchange(State(1, end="interrupted"))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, HANG_S)


def test_a_single_process_watches_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with peers_of(tmp_path, 5) as peers, peers.told():
        peers.meet()
    assert [thread.name for thread in threading.enumerate() if thread.name == "peers"] == []


KILLED = """
import os, sys
from pathlib import Path
import torch
from tutelage.commands.launch import print_once
from tutelage.errors import LostProcessError
from tutelage.train.peers import peers_of
try:
    with peers_of(Path(sys.argv[1]), 1800) as peers, peers.told():
        peers.meet()
        torch.distributed.init_process_group("gloo")
        for step in range(10**9):
            if (step, os.environ["RANK"]) == (3, "1"):
                os.kill(os.getpid(), 9)
            torch.distributed.all_reduce(torch.zeros(1))
except LostProcessError as error:
    print_once(str(error))
    sys.exit(2)
"""


def test_a_process_that_is_killed_ends_the_other_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoint-000004").mkdir()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
    assert launch([sys.executable, "-c", KILLED, str(tmp_path)], 2) == 2
    assert capfd.readouterr().err == (
        "tutelage: process 1 was ended by SIGKILL. "
        "The same command continues from checkpoint-000004.\n"
    )


# --- the key --------------------------------------------------------------------------------------


def test_the_limit_may_change_in_a_run_and_is_some_seconds_at_least() -> None:
    short, long = (parse_config({**MODELS, "process_timeout_s": s}) for s in (5, 600))
    assert changed_keys(to_table(short), to_table(long)) == []
    assert fingerprint(short) == fingerprint(long)
    with pytest.raises(ConfigError, match="process_timeout_s must be at least 5, got 4"):
        parse_config({**MODELS, "process_timeout_s": 4})

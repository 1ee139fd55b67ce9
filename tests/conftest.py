"""Shared settings: one thread a process, and no deadline on a machine that may be busy."""

from __future__ import annotations

import gc
import os
import re
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from patience import unhurried

if find_spec("triton") is not None:
    # Triton decides at its import whether kernels are interpreted, which needs no GPU.
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    import tutelage.core.kernels.tops  # noqa: F401

    if before is None:
        del os.environ["TRITON_INTERPRET"]

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the hub for anything

torch.set_num_threads(1)
EXAMPLES = int(os.environ.get("TUTELAGE_EXAMPLES", "50"))
"""Of a property without a number of its own; `make test-slow` asks for more."""
settings.register_profile("shared", deadline=None, max_examples=EXAMPLES)
settings.load_profile("shared")
unhurried()


MEMORY = Path("/dev/shm")
LONGEST = ("reliability", "invariance")
"""Folders of the files that take longest: their tests start processes."""
ROOM_BYTES = 4 << 30
"""Far more than what the tests write."""


def pytest_configure(config: pytest.Config) -> None:
    """Temporary folders lie in memory where there is room: runs wait for the disk at every file."""
    is_ours = config.option.basetemp is None and "PYTEST_DEBUG_TEMPROOT" not in os.environ
    if is_ours and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > ROOM_BYTES:
        os.environ["PYTEST_DEBUG_TEMPROOT"] = str(MEMORY)


@pytest.fixture(autouse=True)
def _the_same_process() -> Iterator[None]:
    """A test leaves the environment and torch's threads as they were."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random `student` and `teacher`."""
    from tiny import save_tiny_model  # transformers takes seconds; most tests do not need it

    folder = tmp_path_factory.mktemp("models")
    save_tiny_model(folder / "student", seed=1)
    save_tiny_model(folder / "teacher", seed=2)
    return folder


def pytest_collection_finish() -> None:
    """The collector need not look at what was imported again and again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Before the interpreter ends, which tells of what is left."""
    gc.unfreeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that no process waits for another one that has them last.

    A name with an address in it is another one in every process, which would not find its test.

    Raises:
        pytest.UsageError: there is one.
    """
    items.sort(key=lambda item: item.path.parent.name not in LONGEST)
    named = [item.nodeid for item in items if re.search(r" at 0x[0-9a-f]+", item.nodeid)]
    if named:
        raise pytest.UsageError(f"give the parameters of this test ids of their own: {named[0]}")

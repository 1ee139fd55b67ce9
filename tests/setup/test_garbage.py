"""Python's search for garbage rests while models are loaded, and goes on as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from tutelage.setup.garbage import without_collection


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    was_on = gc.isenabled()
    yield
    (gc.enable if was_on else gc.disable)()


@pytest.mark.parametrize("is_on", [True, False])
def test_it_goes_on_as_it_was_also_after_an_error(is_on: bool) -> None:
    (gc.enable if is_on else gc.disable)()
    found = []

    def fail() -> None:
        with without_collection():
            with without_collection():
                found.append(gc.isenabled())
            found.append(gc.isenabled())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert found == [False, False]
    assert gc.isenabled() == is_on

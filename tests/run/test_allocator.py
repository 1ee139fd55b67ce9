"""Freed memory stays mapped between steps, counted by the page faults of taking it again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from tutelage.run.allocator import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    blocks = [torch.ones(3 << 20, dtype=torch.uint8) for _ in range(4)]
step(), step()
before = faults()
for _ in range(5):
    step()
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what glibc does")
def test_memory_that_was_freed_is_taken_again_without_page_faults() -> None:
    kept, plain = (
        int(subprocess.check_output([sys.executable, "-c", PROGRAM, how], text=True))
        for how in ("keep", "plain")
    )
    num_pages = 5 * 4 * (3 << 20) // 4096
    assert kept < num_pages // 4
    assert plain > num_pages // 2  # negative control: without it they are counted

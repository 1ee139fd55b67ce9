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
before = faults()
for megabytes in range(8, 26, 2):  # each larger than any that was freed before
    torch.ones(megabytes << 20, dtype=torch.uint8)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what glibc does")
def test_memory_that_was_freed_is_taken_again_without_page_faults() -> None:
    kept, plain = (
        int(subprocess.check_output([sys.executable, "-c", PROGRAM, how], text=True))
        for how in ("keep", "plain")
    )
    pages_of_the_largest, pages_of_all = (
        (sum(sizes) << 20) // 4096 for sizes in ([24], range(8, 26, 2))
    )
    assert kept < 2 * pages_of_the_largest
    assert plain > 0.9 * pages_of_all  # negative control: without it each page is one

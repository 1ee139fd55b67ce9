"""Freed memory stays in the process: large blocks come from the heap, not from the system."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import sys, torch
from tutelage.models.device import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
block = torch.empty(24 << 20, dtype=torch.uint8)
(heap,) = [line.split()[0] for line in open("/proc/self/maps") if line.endswith("[heap]\\n")]
low, high = (int(end, 16) for end in heap.split("-"))
print(low <= block.data_ptr() < high)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what glibc does")
@pytest.mark.parametrize(("how", "is_kept"), [("keep", "True"), ("plain", "False")])
def test_blocks_below_32_mib_are_kept_once_it_was_asked_for(how: str, is_kept: str) -> None:
    said = subprocess.check_output([sys.executable, "-c", PROGRAM, how], text=True)
    assert said.strip() == is_kept  # "plain" is the negative control

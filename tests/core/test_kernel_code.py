"""The statistics kernel's machine code for compute capability 9.0, which needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

COMPILE = """
import json, re, subprocess, sys
from pathlib import Path
from typing import Any
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tutelage.core.kernels import passes
from tutelage.core.kernels.rows import statistics_kernel as kernel

TYPES = {"out": "*fp64", "tokens": "*i64", "aux": "*fp32", "student": "*fp32", "teacher": "*fp32"}
ALIGNED = ("student", "teacher", "stride", "vocab_size")


def kind(name: str) -> str:
    if name.endswith("_bias"):
        return "*fp32"
    return TYPES.get(name, "fp32" if name.endswith(("_scale", "_cap")) else "i32")


def compiled(**changes: bool) -> dict[str, Any]:
    names = kernel.arg_names
    values = {name: False for name in names if name.isupper()} | changes
    values["BLOCK"] = passes.STATISTICS_BLOCK
    values["LANES"] = passes.num_lanes(values["BLOCK"])
    types = {name: "constexpr" if name in values else kind(name) for name in names}
    places = {(names.index(name),): value for name, value in values.items()}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in ALIGNED}
    source = ASTSource(kernel, types, constexprs=places, attrs=attrs)
    options = {"num_warps": passes.STATISTICS_WARPS}
    found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    Path(sys.argv[1]).write_bytes(found.asm["cubin"])
    command = [triton.knobs.nvidia.nvdisasm.path, "-c", sys.argv[1]]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines, labels, loops = [], {}, []
    for line in code.splitlines():
        label = re.match(r"\\s*(\\.L_x_\\d+):", line)
        if label:
            labels[label[1]] = len(lines)
        elif re.search(r"/\\*[0-9a-f]{4,5}\\*/", line):
            back = re.search(r"BRA.*(\\.L_x_\\d+)", line)
            if back and back[1] in labels:
                loops.append(lines[labels[back[1]] :])
            lines.append(line)
    count = lambda part, words: sum(any(w in line for w in words) for line in part)
    return {
        "loop": len(loops[0]),
        "meetings": max(count(loop, ("BAR", "SHFL", "LDS", "STS")) for loop in loops[:2]),
        "wide_loads": count(loops[0], ("LDG.E.128",)),
        "loads": count(loops[0], ("LDG",)),
        "spills": count(lines, ("LDL", "STL")),
        "fused": count(loops[0], ("FFMA",)),
    }


print(json.dumps({
    "both": compiled(TEACHER=True),
    "student": compiled(),
    "scaled": compiled(TEACHER=True, STUDENT_SCALED=True),
}))
"""


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("code")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "TRITON_DEFAULT_FP_FUSION": "1"}
    script = folder / "compile.py"  # Triton reads the source of what it compiles
    script.write_text(COMPILE)
    command = [sys.executable, str(script), str(folder / "kernel.cubin")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", ["both", "student", "scaled"])
def test_threads_do_not_meet_in_a_loop(name: str, code: dict[str, dict[str, Any]]) -> None:
    assert code[name]["meetings"] == 0
    assert code[name]["spills"] == 0


@pytest.mark.parametrize(("name", "num_instructions"), [("both", 320), ("student", 125)])
def test_a_block_of_eight_ids_a_thread_is_loaded_at_once_and_takes_few_instructions(
    name: str, num_instructions: int, code: dict[str, dict[str, Any]]
) -> None:
    assert code[name]["wide_loads"] == code[name]["loads"] == (4 if name == "both" else 2)
    assert code[name]["loop"] <= num_instructions


def test_no_scaled_logit_is_fused_with_the_subtraction_of_the_largest(
    code: dict[str, dict[str, Any]],
) -> None:
    assert code["scaled"]["fused"] == code["both"]["fused"]

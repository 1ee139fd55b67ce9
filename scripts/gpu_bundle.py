"""Pack what the GPU benchmarks need on a machine without a network: wheels and this code.

    python scripts/gpu_bundle.py build/gpu --python 3.12
    # over there, where torch, triton, transformers and accelerate are installed:
    bash build/gpu/run.sh --list

The folder holds wheels of this package and of what it needs beside those four, the benchmarks, and
`run.sh`, which installs the wheels into a folder of their own and starts
`benchmarks/performance/gpu.py`.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
WHEELS = (
    "trl==1.16.0",
    "liger-kernel==0.8.5",
    "datasets",
    "dill",
    "multiprocess",
    "pydantic",
    "pydantic_core",
    "annotated-types",
    "typing-inspection",
    "rich",
    "peft",
    "httpx2",
    "httpcore2",
    "truststore",
)
"""Ours and the peers' needs that images with torch seldom hold."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
RUN = """#!/usr/bin/env bash
# Install the wheels beside the machine's own torch and start the benchmarks with the arguments.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
site="${TUTELAGE_SITE:-/tmp/tutelage-site}"
if [ ! -e "$site/installed" ]; then
  python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade \\
    --target "$site" "$here"/wheels/*.whl
  touch "$site/installed"
fi
export PYTHONPATH="$site" TUTELAGE_COMMIT="@COMMIT@"
exec python3 "$here/benchmarks/performance/gpu.py" "$@"
"""


def pip(*arguments: str) -> None:
    """Run pip of this interpreter, or end with what it printed."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"pip {arguments[0]} failed.")


def main() -> None:
    """Fill the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="version of the other machine's Python")
    given = parser.parse_args()
    folder: Path = given.folder
    wheels = folder / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    if not any(wheels.glob("trl-*.whl")):
        platforms = [x for platform in PLATFORMS for x in ("--platform", platform)]
        only = ("--no-deps", "--only-binary=:all:", "--implementation", "cp")
        version = ("--python-version", given.python)
        pip("download", *only, *version, *platforms, "--dest", str(wheels), *WHEELS)
    for old in wheels.glob("tutelage-*.whl"):
        old.unlink()
    pip("wheel", "--no-deps", "--wheel-dir", str(wheels), str(ROOT))
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)
    ignored = shutil.ignore_patterns("results", "__pycache__")
    for name in ("benchmarks", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored, dirs_exist_ok=True)
    head = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(head, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (folder / "run.sh").write_text(RUN.replace("@COMMIT@", commit.strip()))
    print(f"{folder}: {sum(f.stat().st_size for f in folder.rglob('*.*')) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

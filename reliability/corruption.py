"""Files that rot: is every flipped bit, cut, addition and deletion in a checkpoint noticed?"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from tutelage.files.checksums import DamagedError, unseal

from . import forked
from .record import Outcome

Damage = Callable[[Path, random.Random], None]


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def zero(path: Path, rng: random.Random) -> None:
    """A lost block: zeros, or ones where there were zeros already."""
    content = bytearray(path.read_bytes())
    first = rng.randrange(len(content))
    block = content[first : first + 512]
    content[first : first + 512] = bytes(len(block)) if any(block) else b"\x01" * len(block)
    path.write_bytes(content)


def grow(path: Path, rng: random.Random) -> None:
    with path.open("ab") as file:
        file.write(rng.randbytes(rng.randint(1, 64)))


def delete(path: Path, rng: random.Random) -> None:
    path.unlink()


def add(path: Path, rng: random.Random) -> None:
    (path.parent / f"{rng.randrange(1000)}.json").write_text("{}")


DAMAGES: tuple[Damage, ...] = (flip, flip, flip, cut, cut, zero, grow, delete, add)


def is_noticed(path: Path) -> bool:
    try:
        unseal(path)
    except DamagedError:
        return True
    return False


def library_notices(folder: Path, payload: bytes, size: int) -> int:
    """Flipped bits in tensors that safetensors alone notices when it reads all of them."""
    seen = 0
    path = folder / "flipped.safetensors"
    header = 8 + int.from_bytes(payload[:8], "little")
    rng = random.Random(1)
    for _ in range(size):
        content = bytearray(payload)
        content[rng.randrange(header, len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    file.get_tensor(name)
        except SafetensorError:
            seen += 1
    return seen


def run(size: int) -> Outcome:
    """`size` single damages of a checkpoint of a real run."""
    missed: list[str] = []
    kinds: list[str] = []
    with forked.models() as folder:
        out = folder / "run"
        ended = forked.end(forked.start(folder, out, num_steps=2), out)
        if ended.code:
            raise RuntimeError(f"no checkpoint to damage: {ended.text}")
        good, bad = out / "checkpoint-000002", folder / "damaged"
        if is_noticed(good):
            raise RuntimeError("a checkpoint as it was written is called damaged")
        files = sorted(p.relative_to(good) for p in good.rglob("*") if p.is_file())
        rng = random.Random(0)
        shutil.copytree(good, bad)
        for _ in range(size):
            name, damage = rng.choice(files), rng.choice(DAMAGES)
            damage(bad / name, rng)
            kinds.append(damage.__name__)
            if not is_noticed(bad):
                missed.append(f"{damage.__name__} of {name}")
            if damage is add:
                shutil.rmtree(bad)
                shutil.copytree(good, bad)
            else:
                shutil.copyfile(good / name, bad / name)
        few = max(20, size // 50)
        alone = library_notices(folder, (good / "optimizer.safetensors").read_bytes(), few)
    return Outcome(
        "a checkpoint with any damaged, missing or added file is noticed before it is used",
        trials=size,
        failures=len(missed),
        control={f"flipped bits of {few} that safetensors alone lets pass": few - alone},
        details={"damages": forked.tally(kinds), "files": len(files), "missed": missed[:10]},
    )

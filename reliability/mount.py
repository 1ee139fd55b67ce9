"""A small file system of one's own, in a child with a mount namespace; no privileges are needed
where the system allows user namespaces.
"""

from __future__ import annotations

import ctypes
import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000  # linux/sched.h
MS_REC, MS_PRIVATE = 0x4000, 0x40000  # linux/mount.h


def in_mount(where: Path, num_bytes: int, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` returns in a child that alone sees a fresh tmpfs at the folder `where`.

    Raises:
        OSError: the system refuses such mounts.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            try:
                _mount(where, num_bytes)
            except OSError as error:
                found = {"refused": error.errno}
            else:
                found = {"found": work()}
            os.write(writing, json.dumps(found).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    if not text:
        raise RuntimeError("the work in the mount failed; its traceback is above")
    answer = json.loads(text)
    if "refused" in answer:
        raise OSError(answer["refused"], f"no tmpfs may be mounted at {where}")
    result: dict[str, Any] = answer["found"]
    return result


def refusal(where: Path) -> str | None:
    """Why nothing may be mounted here, if so."""
    try:
        in_mount(where, 1 << 20, dict)
    except OSError as error:
        return f"{os.strerror(error.errno)}"
    return None


def _mount(where: Path, num_bytes: int) -> None:
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.unshare(CLONE_NEWUSER | CLONE_NEWNS))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    _check(libc.mount(None, b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None))
    options = f"size={num_bytes},mode=700".encode()
    _check(libc.mount(b"none", os.fsencode(where), b"tmpfs", ctypes.c_ulong(0), options))


def _check(code: int) -> None:
    if code:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))

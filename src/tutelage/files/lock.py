"""A lock on a folder, which the system releases when the process that holds it ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

from tutelage.errors import RunError


class FolderLock:
    """A locked file that holds its owner's process id and host for error messages."""

    def __init__(self, path: Path, kind: str = "run") -> None:
        self.path = path
        self.kind = kind
        """Of what the folder is, for messages."""
        self._descriptor: int | None = None

    def take(self) -> None:
        """Lock the file.

        Raises:
            RunError: a living process has it, or perhaps one on another machine.
            OSError: the file cannot be written, or its file system has no locks.
        """
        while (descriptor := self._try()) is None:
            pass  # its owner removed it between our opening and our locking it
        host = self._owner().get("host", platform.node())
        if host != platform.node():
            os.close(descriptor)  # the system may not lock across machines
            raise self._in_use()
        self._descriptor = descriptor
        os.truncate(descriptor, 0)
        os.write(descriptor, json.dumps({"pid": os.getpid(), "host": host}).encode())

    def release(self) -> None:
        """Remove the file if the disk allows it, and release the lock."""
        if self._descriptor is not None:
            with suppress(OSError):  # a file without a lock stops no run
                self.path.unlink()
            os.close(self._descriptor)
            self._descriptor = None

    def _try(self) -> int | None:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), self.path.stat()):
                return descriptor
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(descriptor)
            is_held = error.errno in (errno.EWOULDBLOCK, errno.EACCES)
            raise (self._in_use() if is_held else error) from None
        os.close(descriptor)
        return None

    def _owner(self) -> dict[str, Any]:
        """The owner in the file; empty if its process died before it wrote one."""
        try:
            owner = json.loads(self.path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError, RecursionError):
            return {}
        return owner if isinstance(owner, dict) else {}

    def _in_use(self) -> RunError:
        owner = self._owner()
        return RunError(
            f"{self.kind} folder {self.path.parent} is in use by process "
            f"{owner.get('pid', 'unknown')} on {owner.get('host', platform.node())}. Wait for it, "
            f"or delete {self.path} if that process is gone."
        )

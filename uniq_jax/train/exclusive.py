"""A workdir is written by one run at a time."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there.
    fcntl = None

LOCK_FILE = ".lock"
"""In a workdir: which process writes it, or wrote it last."""


@contextlib.contextmanager
def writing(workdir: Path) -> Iterator[None]:
    """Keeps other processes from writing the same workdir.

    The operating system gives the lock back when the process ends, however it ends. Where a file
    system has no locks, nothing is locked.

    Args:
      workdir: a directory.

    Raises:
      BlockingIOError: if another process, here or on a machine that shares it, writes `workdir`.
      OSError: if the lock's file cannot be written.
    """
    # Such a lock is the process's own: workers that it leaves behind, when killed, don't keep it.
    with open(workdir / LOCK_FILE, "a+", encoding="utf-8") as file:
        if fcntl is not None:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):  # POSIX leaves open which one.
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise BlockingIOError(
                    f"workdir (={str(workdir)!r}) is being written by {holder}; wait for its end, "
                    "or give this run a directory of its own"
                ) from None
            except OSError:  # No locks on this file system.
                pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield

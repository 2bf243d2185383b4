"""What a worker process does before it makes batches."""

import multiprocessing
import os
import signal
import threading


def start(index: int, count: int) -> None:
    """Ties this worker to the process that it works for.

    It ends with that process, also when that is killed and cannot end it; and it does not end
    before: a signal that goes to a whole group of processes (Ctrl-C, a scheduler's SIGTERM) is for
    the other one, which may want some more batches.

    Args:
      index: of the worker.
      count: of all workers.
    """
    del index, count
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)

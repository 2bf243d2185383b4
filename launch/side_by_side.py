"""Commands that run side by side, and hear the signals that end them together."""

import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_POLL_S = 0.2
# Exit status of a run that was told to stop, and saved.
STOPPED = 75


def run_all(
    commands: Mapping[str, Sequence[str]],
    *,
    jobs: int,
    log: Callable[[str], Path | None],
    began: Callable[[str], None],
    ended: Callable[[str, int], None],
) -> dict[str, int]:
    """Runs commands, several at a time.

    SIGTERM, SIGINT and SIGHUP are passed on to what runs, and nothing more begins. Call it from the
    main thread, which alone may hear signals.

    Args:
      commands: by a name, in their order.
      jobs: how many run at a time.
      log: of a name, the file that the command's output is appended to; its directory is made. None
        leaves the output where it goes.
      began: told a name, before its command runs.
      ended: told a name and its exit status.

    Returns:
      Exit status by name; what never began is not there.

    Raises:
      ValueError: if `jobs` is below 1.
      Whatever `began`, `ended` or the start of a command raise, after what ran was ended.
    """
    if jobs < 1:
        raise ValueError(f"jobs (={jobs}) must be at least 1")
    waiting, running, statuses = list(commands), {}, {}
    stopped_by: int | None = None

    def stop(number: int, frame: object) -> None:
        nonlocal stopped_by
        stopped_by = number
        for process in running.values():
            process.send_signal(number)

    heard = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    handlers = {number: signal.signal(number, stop) for number in heard}
    try:
        while running or (waiting and stopped_by is None):
            while waiting and len(running) < jobs and stopped_by is None:
                name = waiting.pop(0)
                began(name)
                running[name] = process = _started(commands[name], log(name))
                if stopped_by is not None:  # The signal came before the process was known.
                    process.send_signal(stopped_by)
            time.sleep(_POLL_S)
            for name in [name for name, process in running.items() if process.poll() is not None]:
                statuses[name] = running.pop(name).returncode
                ended(name, statuses[name])
    finally:
        for process in running.values():  # There are some after an error only.
            process.terminate()
            process.wait()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return statuses


def _started(command: Sequence[str], log: Path | None) -> subprocess.Popen[bytes]:
    # In a session of its own: the terminal's signals come through this process, and once.
    if log is None:
        return subprocess.Popen(command, start_new_session=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)

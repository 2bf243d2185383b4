"""Stopping at the next step when the machine, or the user, wants the run to end.

SIGTERM is what schedulers send before they take a machine away (SLURM, Kubernetes, the preemption
notices of cloud machines); SIGINT is Ctrl-C.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import TypeVar

# JAX has no public name for this; what `multihost_utils.reached_preemption_sync_point` reads.
from jax._src import distributed

# EX_TEMPFAIL of sysexits.h: it failed for now, and the same command may be tried again.
EXIT_CODE = 75

Stop = Callable[[], bool]

T = TypeVar("T")


class Stopped(Exception):
    """A run was told to stop, and did; the same command resumes it."""


def never() -> bool:
    """Does not stop a run."""
    return False


def check(stop: Stop) -> None:
    """Raises Stopped if the run is to stop."""
    if stop():
        raise Stopped("the run was told to stop")


def until(stop: Stop, items: Iterable[T]) -> Iterator[T]:
    """The items, as long as the run is not to stop; then raises Stopped."""
    for item in items:
        check(stop)
        yield item


@contextlib.contextmanager
def listening() -> Iterator[Stop]:
    """Takes SIGTERM and SIGINT as a wish to stop, until the block ends.

    A second SIGINT ends the process at once. In a thread other than the main one, where Python
    allows no signal handlers, nothing changes, and the run is never told to stop.

    Yields:
      A function that says whether to stop. Of many processes each must call it equally often; then
      all hear of it in the same call, whichever of them got the signal (JAX's preemption service,
      which `jax.distributed.initialize` starts, listens to SIGTERM and agrees on the call).
    """
    if threading.current_thread() is not threading.main_thread():
        yield never
    elif distributed.global_state.client is None:
        with _listening_alone() as stop:
            yield stop
    else:
        with _listening_together() as stop:
            yield stop


@contextlib.contextmanager
def _listening_alone() -> Iterator[Stop]:
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        del frame
        received.append(number)
        _announce(number)

    with _handlers({signal.SIGTERM: receive, signal.SIGINT: receive}):
        yield lambda: bool(received)


@contextlib.contextmanager
def _listening_together() -> Iterator[Stop]:
    state = distributed.global_state
    service = state.preemption_sync_manager
    if service is None:  # jax_enable_preemption_service is off: there is no way to agree.
        yield never
        return
    calls, reached = 0, False

    def stop() -> bool:
        nonlocal calls, reached
        if not reached:
            calls += 1
            reached = service.reached_sync_point(calls)
        return reached

    def pass_on(number: int, frame: FrameType | None) -> None:
        del frame
        _announce(number)
        signal.raise_signal(signal.SIGTERM)  # The service's own handler has it.

    # Orbax asks the service too, with the numbers of the steps it saves: the service would take
    # them for calls of this function.
    state.preemption_sync_manager = None
    try:
        with _handlers({signal.SIGINT: pass_on}):
            yield stop
    finally:
        state.preemption_sync_manager = service


@contextlib.contextmanager
def _handlers(handlers: dict[int, Callable[[int, FrameType | None], None]]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            # None is a handler that was not set by Python, which cannot set it again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _announce(number: int) -> None:
    text = "stops at the next step, saves, and can be resumed"
    if number == signal.SIGINT:
        # From now on the system's own: it works where Python's waits for a long computation.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        text += "; Ctrl-C again ends it at once"
    with contextlib.suppress(OSError):
        # Not print: the signal may have come in the middle of one.
        os.write(2, f"\n{signal.Signals(number).name}: {text}\n".encode())

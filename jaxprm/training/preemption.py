"""When to save besides every n steps: after so many minutes, and when the machine is about to be taken away."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from jaxprm.training import distributed

# Steps between two looks at the clock of process 0, where there are several.
CLOCK_EVERY = 10


class Preemption:
    """Within its `with`, SIGTERM is a notice that `noticed` tells of, and `signalled` afterwards, and no death.

    With several processes JAX takes the notice of any of them and agrees on a step that all of them will reach.
    """

    def __init__(self) -> None:
        self.signalled = False
        self._before: Any = None

    def __enter__(self) -> Preemption:
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._signal)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _signal(self, number: int, frame: FrameType | None) -> None:
        self.signalled = True

    def noticed(self, step: int) -> bool:
        """Whether to stop after this step; the same answer in every process. To be asked after every step."""
        if jax.process_count() > 1 and jax.config.jax_enable_preemption_service:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.signalled


class Timer:
    """Whether `minutes` have passed since the last save; None never."""

    def __init__(self, minutes: float | None):
        self._seconds = None if minutes is None else 60 * minutes
        self.restart()

    def restart(self) -> None:
        self._since = time.monotonic()

    def due(self, step: int) -> bool:
        """The same answer in every process: that of process 0, asked every few steps."""
        if self._seconds is None:
            return False
        if jax.process_count() == 1:
            return self._passed()
        return step % CLOCK_EVERY == 0 and distributed.agreed(self._passed())

    def _passed(self) -> bool:
        return time.monotonic() - self._since >= self._seconds

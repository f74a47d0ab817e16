"""An environment that crashes, hangs, raises or leaks when an action says so."""

import os
import time
from pathlib import Path

from jaxprm.environments import StepResult


class Misbehaving:
    """Counts its steps and is done after `max_rounds`. Every instance appends its process id to the file `pids`."""

    max_rounds = 6

    def __init__(self, fork="clone", pids=None, delay=0.0, drift=None):
        self.fork, self._delay, self._drift, self._hoard = fork, delay, drift, []
        if fork == "crash":
            os._exit(4)
        if fork == "raise":
            raise OSError("no display")
        if pids is not None:
            with open(pids, "a") as file:
                file.write(f"{os.getpid()}\n")

    def tasks(self, split):
        return tuple(f"{split}/{number}" for number in range(4))

    def describe(self, task):
        return {"pid": os.getpid(), "goal": f"count \u2028 {task}"}

    def reset(self, task):
        self._count, self._task = 0, task
        time.sleep(self._delay)
        return f"begin {task}"

    def step(self, action):
        print("this is not an answer")
        time.sleep(self._delay)
        if action == "crash":
            os._exit(3)
        if action == "hang":
            time.sleep(60)
        if action == "raise":
            raise OSError("the path is broken")
        if action == "odd":
            return object()
        if action == "leak":
            self._hoard.append(b"x" * (200 << 20))
        self._count += 1
        noise = "" if self._drift is None else f" in {Path(self._drift).read_text()}"
        return StepResult(f"{self._count} after {action}{noise}", 0.5, self._count == self.max_rounds)

    def outcome(self):
        return self._count / self.max_rounds

    def snapshot(self):
        return self._count, self._task

    def restore(self, state):
        self._count, self._task = state

    def close(self):
        pass

"""Trains in a process of its own and, if asked to, kills it with SIGKILL at a named point, or sends it SIGTERM.

    python killed_training.py ARGUMENTS.json

Arguments: experiment, shards, base, output; kill_before (a batch, from 0) and wait_for (a checkpoint that must be
committed before that), signal (its name), kill_at (one of NAMED), kill_after (seconds from the second step on) and
stop_in_validation (the number of one, from 0, during which SIGTERM comes), all of which may be null. Prints where in
the data it began; exits with 75 where the training says that it was interrupted.
"""

import itertools
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

from data_pipeline import batches
from jaxprm import config as config_lib
from jaxprm.errors import RESUMABLE, Interrupted
from jaxprm.training import train

# A point is an operation on a file, as Python announces it before it happens: (event, its path below the output).
POINTS = {
    # After the state was handed over, before the data position.
    "position": ("open", r"checkpoints/\d+.*tmp.*/meta.*/metadata$"),
    "commit": ("os.rename", r"checkpoints/\d+\.orbax-checkpoint-tmp[^/]*$"),
    "deletion": ("shutil.rmtree", r"checkpoints/\d+$"),  # of an old checkpoint, when two of its files are gone
    "model": ("os.rename", r"model\.partial$"),  # all is written, and not yet in its place
}
# In an order in which one run can be killed at all of them: each needs what those before it left to be done.
NAMED = ("arrays", "position", "deletion", "restored", "commit", "model")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(point: str, output: Path) -> None:
    """Arms a point of POINTS, or `arrays`: when the first bytes of a state are on the disk of an unfinished write."""
    if point == "arrays":

        def watch() -> None:
            while not any(output.glob("checkpoints/*tmp*/state*/**/d/*")):
                time.sleep(0.0005)
            die()

        threading.Thread(target=watch, daemon=True).start()
        return
    events, pattern = POINTS[point]
    removed: list[str] = []

    def hook(event: str, arguments: tuple) -> None:
        if removed and event == "os.remove":
            removed.append(str(arguments[0]))
            if len(removed) > 3:
                die()
        if not re.fullmatch(events, event) or not isinstance(arguments[0], (str, os.PathLike)):
            return
        path = os.fspath(arguments[0])
        below = path.startswith(str(output)) and re.match(pattern, path[len(str(output)) + 1 :])
        if below and point == "deletion":
            removed.append(path)
        elif below and (point != "position" or "r" not in str(arguments[1])):
            die()

    sys.addaudithook(hook)


def main() -> None:
    arguments = json.loads(Path(sys.argv[1]).read_text())
    output = Path(arguments["output"])
    take = batches.TrainingBatches.__next__
    began: list[int] = []

    def take_or_die(self):
        if not began:
            began.append(self.position)
            print(json.dumps({"began": self.position}), flush=True)
            if arguments.get("kill_at") == "restored" and self.position:
                take(self)
                die()
        elif len(began) == 1 and arguments.get("kill_after") is not None:
            began.append(self.position)
            timer = threading.Timer(arguments["kill_after"], die)
            timer.daemon = True  # a training that ends earlier has ended
            timer.start()
        if self.position == arguments.get("kill_before"):
            wait_for = arguments.get("wait_for")
            while wait_for and not (output / "checkpoints" / str(wait_for)).is_dir():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.Signals[arguments.get("signal") or "SIGKILL"])
        return take(self)

    batches.TrainingBatches.__next__ = take_or_die
    validate, validations = train.step_values, itertools.count()

    def stopped_validation(*given):
        if next(validations) == arguments.get("stop_in_validation"):
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(*given)

    train.step_values = stopped_validation
    if arguments.get("kill_at") not in (None, "restored"):
        die_at(arguments["kill_at"], output.absolute())
    experiment = config_lib.from_dict(arguments["experiment"], where="test")
    paths = {name: Path(arguments[name]) for name in ("shards", "base")}
    try:
        train.train_reward_model(experiment, experiment.reward_models[0], 0, **paths, output=output)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(RESUMABLE)


if __name__ == "__main__":
    main()

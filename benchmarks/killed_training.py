"""Trains the toy in this process, and kills the process (SIGKILL) or stops it (SIGTERM) at a given point.

    python killed_training.py ARGUMENTS.json

Required arguments: experiment, shards, base, output. Optional ones, which may be null:

    kill_before          number of the batch, from 0, before which the process is signalled
    wait_for             a checkpoint that must be committed before that
    signal               name of that signal; default SIGKILL
    kill_at              one of NAMED
    kill_after           seconds from the second step to the kill
    stop_in_validation   number of the validation, from 0, during which SIGTERM is sent

Prints {"began": number of the first batch}. Exits with status 75 if the training run says that it was interrupted.
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

# A point is an operation on a file that a Python audit event announces: (event, pattern of the path below the output).
POINTS = {
    # The state is written, the data position is not.
    "position": ("open", r"checkpoints/\d+.*tmp.*/meta.*/metadata$"),
    "commit": ("os.rename", r"checkpoints/\d+\.orbax-checkpoint-tmp[^/]*$"),
    "deletion": ("shutil.rmtree", r"checkpoints/\d+$"),  # of an old checkpoint, after two of its files are removed
    "model": ("os.rename", r"model\.partial$"),  # everything is written, the rename is missing
}
# In an order in which one run can be killed at each: every process gets further than the one before.
NAMED = ("arrays", "position", "deletion", "restored", "commit", "model")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(point: str, output: Path) -> None:
    """Kills the process at a point of POINTS, or at `arrays`: once the first bytes of a state are on the disk."""
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
    next_batch = batches.TrainingBatches.__next__
    began: list[int] = []

    def next_batch_or_die(self):
        if not began:
            began.append(self.position)
            print(json.dumps({"began": self.position}), flush=True)
            if arguments.get("kill_at") == "restored" and self.position:
                next_batch(self)
                die()
        elif len(began) == 1 and arguments.get("kill_after") is not None:
            began.append(self.position)
            timer = threading.Timer(arguments["kill_after"], die)
            timer.daemon = True  # does not keep a finished run alive
            timer.start()
        if self.position == arguments.get("kill_before"):
            wait_for = arguments.get("wait_for")
            while wait_for and not (output / "checkpoints" / str(wait_for)).is_dir():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.Signals[arguments.get("signal") or "SIGKILL"])
        return next_batch(self)

    batches.TrainingBatches.__next__ = next_batch_or_die
    validate, validations = train.validate, itertools.count()

    def stopped_validation(*validate_arguments):
        if next(validations) == arguments.get("stop_in_validation"):
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(*validate_arguments)

    train.validate = stopped_validation
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

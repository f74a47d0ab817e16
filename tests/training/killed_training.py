"""Trains in a process of its own and, if asked to, kills it with SIGKILL when it wants a given batch.

    python killed_training.py ARGUMENTS.json

Arguments: experiment, shards, base, output; kill_before (a batch, from 0) and wait_for (a checkpoint that must be
committed before the kill), both may be null. Prints the position in the data at which it began.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from data_pipeline import batches
from jaxprm import config as config_lib
from jaxprm.training.train import train_reward_model


def main() -> None:
    arguments = json.loads(Path(sys.argv[1]).read_text())
    output = Path(arguments["output"])
    take = batches.TrainingBatches.__next__
    began: list[int] = []

    def take_or_die(self):
        if not began:
            began.append(self.position)
            print(json.dumps({"began": self.position}), flush=True)
        if self.position == arguments["kill_before"]:
            while arguments["wait_for"] and not (output / "checkpoints" / str(arguments["wait_for"])).is_dir():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return take(self)

    batches.TrainingBatches.__next__ = take_or_die
    experiment = config_lib.from_dict(arguments["experiment"], where="test")
    paths = {name: Path(arguments[name]) for name in ("shards", "base")}
    train_reward_model(experiment, experiment.reward_models[0], 0, **paths, output=output)


if __name__ == "__main__":
    main()

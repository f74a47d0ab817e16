"""One process of a training run on eight virtual devices.

    python hosts.py ARGUMENTS.json PROCESS

Arguments: experiment, shards, base, output, coordinator, processes, and kill: {"process", "before"}, a process and the
batch before which it is killed. Exits with the status of the command line.
"""

import json
import os
import signal
import sys
from pathlib import Path

arguments, process = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={8 // arguments['processes']}"

from data_pipeline import batches  # noqa: E402
from jaxprm import cli  # noqa: E402
from jaxprm import config as config_lib  # noqa: E402
from jaxprm.training import distributed  # noqa: E402
from jaxprm.training.train import train_reward_model  # noqa: E402


def train(options: object) -> int:
    several = arguments["processes"] > 1
    hosts = (arguments["coordinator"], arguments["processes"], process) if several else ()
    experiment = config_lib.from_dict(arguments["experiment"], where="test")
    paths = {name: Path(arguments[name]) for name in ("shards", "base", "output")}
    with distributed.joined(*hosts):
        train_reward_model(experiment, experiment.reward_models[0], 0, **paths)
    return 0


def main() -> None:
    kill, next_batch = arguments.get("kill"), batches.TrainingBatches.__next__

    def next_batch_or_die(self):
        if kill and (kill["process"], kill["before"]) == (process, self.position):
            os.kill(os.getpid(), signal.SIGKILL)
        return next_batch(self)

    batches.TrainingBatches.__next__ = next_batch_or_die
    cli.VERBS["inspect"] = train
    sys.exit(cli.main(["inspect", "."]))


if __name__ == "__main__":
    main()

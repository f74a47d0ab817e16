"""A work directory that an earlier version wrote resumes: every stage records the inputs that it recorded then."""

from __future__ import annotations

from jaxprm import config, files
from jaxprm.workflow.context import Run
from jaxprm.workflow.run import stage_inputs
from jaxprm.workflow.workdir import WorkDirectory

# Fingerprints of the inputs in stages/*.json of `run configs/textcraft_tiny.py --quick`, written by the code before it
# was restructured (commit d8ec209). A change here means that every existing work directory is refused.
RECORDED = {
    "build": "4520f5e266f19ba0",
    "collect": "d029248140c1264f",
    "search-beam-2x2-agentprm-0": "e86dabd28020ac57",
    "search-beam-2x2-orm-0": "cbd90a23adc8fd0a",
    "search-beam-2x2-pvm-0": "b34adcb9639bbf45",
    "search-beam-2x2-random-0": "23a71c37997f9c3a",
    "search-greedy": "2525cdfd3263e4fe",
    "search-pool": "a97c8c6e86581e71",
    "search-stepwise-2-agentprm-0": "eadcc0eb78f25bf3",
    "search-stepwise-2-orm-0": "ee4172a8c7f3add8",
    "search-stepwise-2-pvm-0": "55a2ebdc9aa39af5",
    "search-stepwise-2-random-0": "2641e5c57742cb0f",
    "search-values-pool-agentprm-0": "223efcc0ae86e44f",
    "search-values-pool-orm-0": "20ac731ea75f8b26",
    "search-values-pool-pvm-0": "515a27eab713802b",
    "search-values-validation-agentprm-0": "80b8ad11edb46203",
    "search-values-validation-orm-0": "3541de51d5ee00e2",
    "search-values-validation-pvm-0": "dd5f22187cfe69e4",
    "train-agentprm-0": "d2aa8f4be2bf97cc",
    "train-orm-0": "ddacfb8ef8e8c89a",
    "train-pvm-0": "5578c24f966b3f00",
}


def test_the_recorded_inputs_of_every_stage_are_those_of_earlier_runs(tmp_path):
    run = Run(config.load("textcraft_tiny", quick=True), WorkDirectory(tmp_path))
    inputs = stage_inputs(run, "report")
    assert {name: config.fingerprint(files.plain(recorded))[:16] for name, recorded in inputs.items()} == RECORDED

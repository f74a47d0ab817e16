"""`python -m jaxprm plan`: its options and exit status."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from jaxprm import config as config_lib
from jaxprm import files
from jaxprm.errors import UserError
from jaxprm.planning import compiling

DOES_NOT_FIT = 3


def run(options: Any, show: Callable[[str], None] = print) -> int:
    """Plans as the command line asks; returns 0 if training fits (with --search: if anything does), or DOES_NOT_FIT.

    options: the parsed arguments of `plan`. show: prints a line.

    Raises UserError for an option, a config or a model that cannot be planned.
    """
    experiment = config_lib.load(options.config, options.overrides, quick=options.quick)
    settings = _reward_model(experiment, options.reward_model)
    changes = {"rows": options.batch, "length": options.length}
    for name, value in changes.items():
        if value is not None and value < 1:
            raise UserError(f"--{'batch' if name == 'rows' else name} {value}: must be at least 1")
    data = msgspec.structs.replace(experiment.data, **{k: v for k, v in changes.items() if v is not None})
    compiling.prepare_environment(os.environ)

    # These import JAX, which reads the environment once.
    from jaxprm.planning.mesh_search import search_meshes
    from jaxprm.planning.models import policy_config
    from jaxprm.planning.plan import make_plan, open_slice
    from jaxprm.planning.report import as_json, as_text

    policy = policy_config(options.model or _policy(experiment))
    tpu_slice = open_slice(options.topology)
    mesh = experiment.mesh if options.mesh is None else config_lib.parse_mesh(options.mesh)
    if options.search:
        only = None if options.mesh is None else mesh
        report = search_meshes(tpu_slice, settings, data, only, policy, rows=options.batch, show=show)
        fits = bool(report["frontier"])
    else:
        plan = make_plan(tpu_slice, settings, data, mesh, policy)
        show(as_text(plan))
        report, fits = as_json(plan), plan.fits
    if options.json is not None:
        files.write_json(options.json, report)
    return 0 if fits else DOES_NOT_FIT


def _reward_model(experiment: config_lib.Experiment, label: str | None) -> config_lib.RewardModelConfig:
    """The reward model with a label; without a label the first."""
    if label is None:
        return experiment.reward_models[0]
    settings = next((model for model in experiment.reward_models if model.label == label), None)
    if settings is None:
        labels = ", ".join(model.label for model in experiment.reward_models)
        raise UserError(f"--reward-model {label}: the config has {labels}")
    return settings


def _policy(experiment: config_lib.Experiment) -> str | Path:
    """The model that the reward models start from. Raises UserError if the config names none with a directory."""
    from jaxprm.policies import language_model, loading

    path = experiment.base_model
    if path is None and loading.is_directory(experiment.policy):
        path = experiment.policy.path
    if path is None or path == "default":
        # Any other path is not resolved here: of a model on the hub, `policy_config` fetches config.json and no
        # weights.
        return loading.base_directory(experiment) if path is None else language_model.default_directory()
    return path

"""`python -m jaxprm plan`: what the options mean, and what is printed."""

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
    """The exit status: 0 where training fits (with --search: where anything does), or DOES_NOT_FIT."""
    experiment = config_lib.load(options.config, options.overrides, quick=options.quick)
    settings = _reward_model(experiment, options.reward_model)
    changes = {"rows": options.batch, "length": options.length}
    for name, value in changes.items():
        if value is not None and value < 1:
            raise UserError(f"--{'batch' if name == 'rows' else name} {value}: must be at least 1")
    data = msgspec.structs.replace(experiment.data, **{k: v for k, v in changes.items() if v is not None})
    compiling.prepare(os.environ)

    from jaxprm.planning.models import policy_config
    from jaxprm.planning.plan import make_plan, mesh_of, open_slice
    from jaxprm.planning.report import as_json, as_text

    policy = policy_config(options.model or _policy(experiment))
    where = open_slice(options.topology)
    mesh = experiment.mesh if options.mesh is None else mesh_of(options.mesh, experiment.mesh)
    if options.search:
        only = None if options.mesh is None else mesh
        written = search(where, settings, data, only, policy, rows=options.batch, show=show)
        fits = bool(written["frontier"])
    else:
        plan = make_plan(where, settings, data, mesh, policy)
        show(as_text(plan))
        written, fits = as_json(plan), plan.fits
    if options.json is not None:
        files.write_json(options.json, written)
    return 0 if fits else DOES_NOT_FIT


def search(where, settings, data, mesh, policy, *, rows: int | None, show: Callable[[str], None]) -> dict[str, Any]:
    """{"tried": plans, "frontier": plans}; a line for each as it is compiled. mesh: the only one to try, or None."""
    from jaxprm.planning.plan import make_plan
    from jaxprm.planning.report import as_json, verdict
    from jaxprm.planning.search import Candidate, Found, changed, frontier, meshes, staircase
    from jaxprm.training import sharding

    def evaluate(candidate: Candidate) -> Found:
        plan = make_plan(where, *changed(settings, data, candidate), candidate.mesh, policy, scores=False)
        speed = plan.estimate.tokens_per_second_per_chip if plan.estimate and plan.fits else None
        found = Found(candidate, plan.training.memory, speed, plan)
        show(_line(found, verdict(found.memory)))
        return found

    devices = len(where.devices)
    if mesh is not None:
        sizes = dict(sharding.make_mesh(mesh, where.devices).shape)
        tried = [config_lib.Mesh(**sizes)]
    else:
        tried = meshes(devices, policy)
    found = list(staircase(tried, evaluate, settings=settings, devices=devices, rows=rows))
    best = frontier(found)
    best_of = f"{len(best)} of {len(found)} are on the frontier of speed (estimate) and memory:"
    show("\n" + (best_of if best else "none fits"))
    for one in best:
        show(_line(one, verdict(one.memory)))
    return {"tried": [as_json(one.plan) for one in found], "frontier": [as_json(one.plan) for one in best]}


def _line(found: Any, verdict: str) -> str:
    candidate = found.candidate
    axes = ",".join(f"{axis}={size}" for axis in ("data", "fsdp", "tensor", "sequence")
                    if (size := getattr(candidate.mesh, axis)) != 1) or "data=1"  # fmt: skip
    speed = found.tokens_per_second_per_chip
    said = "" if speed is None else f"; {speed:,.0f} tokens/s/chip (estimate)"
    return f"--mesh {axes} --batch {candidate.rows} remat={candidate.remat}: {verdict}{said}"


def _reward_model(experiment: config_lib.Experiment, label: str | None) -> config_lib.RewardModel:
    """The one with this label, or the first."""
    if label is None:
        return experiment.reward_models[0]
    found = next((model for model in experiment.reward_models if model.label == label), None)
    if found is None:
        labels = ", ".join(model.label for model in experiment.reward_models)
        raise UserError(f"--reward-model {label}: the config has {labels}")
    return found


def _policy(experiment: config_lib.Experiment) -> str | Path:
    """The model that the reward models start from. Raises UserError where the config has none with a directory."""
    from jaxprm.policies import language_model, loading

    path = experiment.base_model
    if path is None and loading.is_directory(experiment.policy):
        path = experiment.policy.path
    if path is None or path == "default":
        return loading.base_directory(experiment) if path is None else language_model.default_directory()
    return path

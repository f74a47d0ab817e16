"""`python -m jaxprm plan`: its options, the models it knows by name, and what it prints."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from jaxprm import config as config_lib
from jaxprm import files
from jaxprm.errors import UserError
from jaxprm.hf import hub, reader
from jaxprm.model.config import RopeScaling, TransformerConfig
from jaxprm.planning import compiling

# Of their config.json on the Hugging Face hub; without an unembedding, which a reward model has not.
MODELS = {
    "qwen2.5-0.5b": TransformerConfig(
        vocab_size=151_936,
        hidden_size=896,
        layers=24,
        heads=14,
        kv_heads=2,
        head_dim=64,
        intermediate_size=4864,
        rope_theta=1e6,
    ),
    "qwen2.5-3b": TransformerConfig(
        vocab_size=151_936,
        hidden_size=2048,
        layers=36,
        heads=16,
        kv_heads=2,
        head_dim=128,
        intermediate_size=11_008,
        rope_theta=1e6,
    ),
    "qwen2.5-7b": TransformerConfig(
        vocab_size=152_064,
        hidden_size=3584,
        layers=28,
        heads=28,
        kv_heads=4,
        head_dim=128,
        intermediate_size=18_944,
        rope_theta=1e6,
    ),
    "llama-3.1-8b": TransformerConfig(
        vocab_size=128_256,
        hidden_size=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        intermediate_size=14_336,
        rope_theta=5e5,
        norm_epsilon=1e-5,
        family="llama",
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
    ),
}


def policy_config(model: str | Path) -> TransformerConfig:
    """The config of a policy: a name in MODELS, a directory in Hugging Face format, or a name on the hub.

    Of the hub config.json alone is fetched. Raises UserError for anything else.
    """
    if (known := str(model).lower()) in MODELS:
        return MODELS[known]
    try:
        return reader.read_config(hub.resolve(model, files=("config.json",)))[0]
    except UserError as error:
        raise UserError(f"{error}; shapes that need no file: {', '.join(MODELS)}") from None


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

    pass
    from jaxprm.planning.plan import make_plan, open_slice
    from jaxprm.planning.report import as_json, as_text

    policy = policy_config(options.model or _policy(experiment))
    where = open_slice(options.topology)
    mesh = experiment.mesh if options.mesh is None else config_lib.parse_mesh(options.mesh)
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
    from jaxprm.model import sharding
    from jaxprm.planning.plan import Candidate, MeshSearchResult, changed, frontier, make_plan, meshes, staircase
    from jaxprm.planning.report import as_json, verdict

    def evaluate(candidate: Candidate) -> MeshSearchResult:
        plan = make_plan(where, *changed(settings, data, candidate), candidate.mesh, policy, scores=False)
        speed = plan.estimate.tokens_per_second_per_chip if plan.estimate and plan.fits else None
        found = MeshSearchResult(candidate, plan.training.memory, speed, plan)
        show(_line(found, verdict(found.memory)))
        return found

    devices = len(where.devices)
    if mesh is not None:
        sizes = dict(sharding.make_mesh(mesh, where.devices).shape)
        tried = [config_lib.MeshConfig(**sizes)]
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
    axes = (
        ",".join(
            f"{axis}={size}"
            for axis in ("data", "fsdp", "tensor", "sequence")
            if (size := getattr(candidate.mesh, axis)) != 1
        )
        or "data=1"
    )
    speed = found.tokens_per_second_per_chip
    said = "" if speed is None else f"; {speed:,.0f} tokens/s/chip (estimate)"
    return f"--mesh {axes} --batch {candidate.rows} remat={candidate.remat}: {verdict}{said}"


def _reward_model(experiment: config_lib.Experiment, label: str | None) -> config_lib.RewardModelConfig:
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

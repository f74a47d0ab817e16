"""Scores and costs on meshes of eight virtual devices, compared with one device. Run by test_mesh.py.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python on_meshes.py MODEL

Prints one JSON line a mesh: largest difference, tokens, programs compiled again, and the layout of cache and weights.
"""

import json
import sys

import jax
import numpy as np

import jaxprm
from jaxprm.scoring.engine import _values_after
from tests.model import tiny

MESHES = [None, {"tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8}]


def searched(model):
    """Scores of a small search: two conversations, three turns of four candidates, then the finished conversations."""
    states = [tiny.conversation(seed)[:1] for seed in (1, 2)]
    scores = []
    for turn in range(3):
        for at, state in enumerate(states):
            candidates = [f"try {turn} {at} {number}" for number in range(4)]
            scores += [score.promise for score in model.score_actions(state, candidates)]
            states[at] = [
                *state,
                {"role": "assistant", "content": candidates[turn]},
                {"role": "user", "content": f"saw {turn}"},
            ]
    finished = [[*state, {"role": "assistant", "content": "done"}] for state in states]
    scores += [step["promise"] for table in model.score(finished) for step in table["steps"]]
    return np.asarray(scores)


def layout_of(array):
    """Mesh axis of each axis of the array."""
    spec = getattr(array.sharding, "spec", ())
    return [part if part is None or isinstance(part, str) else list(part) for part in spec]


def main(directory):
    reference = None
    for mesh in MESHES:
        jax.clear_caches()
        model = jaxprm.load(directory, rows=8, max_tokens=256, mesh=mesh)
        scores_of_mesh = searched(model)
        reference = scores_of_mesh if reference is None else reference
        compiled = _values_after._cache_size()
        again = searched(jaxprm.load(directory, rows=8, max_tokens=256, mesh=mesh))
        bank = model._scorer.engine._bank
        report = {
            "mesh": mesh,
            "difference": float(np.abs(scores_of_mesh - reference).max()),
            "repeat": float(np.abs(again - scores_of_mesh).max()),
            "encoded": model.usage["encoded"],
            "compiled_again": _values_after._cache_size() - compiled,
            "cache": layout_of(bank.bank.keys[0]),
            "ring": layout_of(bank.ring.keys[0]),
            "query": layout_of(model._scorer.parameters["transformer"]["blocks"]["query"][...]),
        }
        print(json.dumps(report), flush=True)


main(sys.argv[1])

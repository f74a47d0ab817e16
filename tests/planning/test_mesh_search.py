"""The candidates that a search over meshes compiles, and its frontier."""

import msgspec

from jaxprm import config as config_lib
from jaxprm.planning import mesh_search
from jaxprm.planning.compiling import Memory
from jaxprm.planning.mesh_search import Candidate, MeshSearchResult, compile_candidates, frontier, meshes
from jaxprm.planning.models import MODELS

SETTINGS = config_lib.RewardModelConfig(label="x")


def result_of(rows: int, total: int, speed: float | None, *, limit: int = 100) -> MeshSearchResult:
    memory = Memory(0, 0, 0, total, 0, total, limit)
    return MeshSearchResult(Candidate(config_lib.MeshConfig(), rows, "full"), memory, speed)


def test_meshes_divide_the_model():
    """Qwen2.5-0.5B has 14 heads and 2 kv heads: two parts, not four."""
    sizes = [(mesh.data, mesh.fsdp, mesh.tensor) for mesh in meshes(8, MODELS["qwen2.5-0.5b"])]
    assert sizes == [(8, 1, 1), (1, 8, 1), (1, 4, 2)]
    assert [(mesh.data, mesh.fsdp, mesh.tensor) for mesh in meshes(1, MODELS["llama-3.1-8b"])] == [(1, 1, 1)]
    assert (1, 4, 4) in [(mesh.data, mesh.fsdp, mesh.tensor) for mesh in meshes(16, MODELS["llama-3.1-8b"])]


def test_larger_batches_use_more_rematerialisation_until_none_fits():
    """A device has memory for 40: a row takes 10, 5 with `minimal`, 2 with `full`."""
    cost = {"none": 10, "minimal": 5, "full": 2}

    def evaluate(candidate):
        total = candidate.rows * cost[candidate.remat]
        return MeshSearchResult(candidate, Memory(0, 0, 0, total, 0, total, 40), 1.0)

    tried = list(compile_candidates([config_lib.MeshConfig(data=4)], evaluate, settings=SETTINGS, devices=4))
    assert [(result.candidate.rows, result.candidate.remat, result.memory.fits) for result in tried] == [
        (4, "none", True),
        (8, "none", False),
        (8, "minimal", True),
        (16, "minimal", False),
        (16, "full", True),
        (32, "full", False),
    ]


def test_the_first_batch_divides_over_the_mesh():
    def evaluate(candidate):
        return MeshSearchResult(candidate, Memory(0, 0, 0, 9, 0, 9, 1), None)

    rows = config_lib.RewardModelConfig(label="x", microbatches=2)
    tried = list(
        compile_candidates([config_lib.MeshConfig(fsdp=4, tensor=2)], evaluate, settings=rows, devices=8, rows=10)
    )
    rows_and_remats = [(result.candidate.rows, result.candidate.remat) for result in tried]
    assert rows_and_remats == [(16, "none"), (16, "minimal"), (16, "full")]


def test_the_frontier_has_the_results_that_no_other_beats():
    fast, lean = result_of(8, 90, 30.0), result_of(2, 20, 10.0)
    beaten, too_large, middle = result_of(4, 95, 20.0), result_of(16, 120, None), result_of(4, 50, 20.0)
    assert frontier([lean, beaten, too_large, fast, middle]) == [fast, middle, lean]
    assert frontier([too_large]) == []


def test_a_candidate_sets_its_rows_and_rematerialisation_and_nothing_else():
    candidate = Candidate(config_lib.MeshConfig(), 24, "minimal")
    settings, data = mesh_search._apply(candidate, SETTINGS, config_lib.DataConfig())
    assert settings == msgspec.structs.replace(SETTINGS, remat="minimal")
    assert data == config_lib.DataConfig(rows=24)

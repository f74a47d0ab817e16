"""Weights written one tensor at a time: read back by safetensors and torch, in the shards of transformers."""

import json
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import load_file

from jaxprm.errors import UserError
from jaxprm.hf import writer
from jaxprm.hf.writer import TensorToWrite, parse_size, write_weights

RNG = np.random.default_rng(0)
SHAPES = {"b.weight": (7, 5), "a": (3,), "large": (30, 11), "matrix": (4, 2, 3), "one": (1, 9), "last": (13,)}
VALUES = {name: RNG.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def tensors(values=VALUES) -> list[TensorToWrite]:
    return [TensorToWrite(name, array.shape, lambda array=array: array) for name, array in values.items()]


def test_one_file_holds_every_tensor_unchanged(tmp_path):
    assert write_weights(tmp_path, tensors()) == ["model.safetensors"]
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == VALUES.keys()
    for name, array in VALUES.items():
        np.testing.assert_array_equal(read[name].numpy(), array)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    # Readers that map the file expect aligned data.
    assert int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little") % 8 == 0


def test_bfloat16_is_rounded_to_nearest_even_as_torch_does(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_BLOCK", 64)  # several blocks per tensor
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1e-40, np.inf, 3.4e38], np.float32)
    values = VALUES | {"ties": ties}
    write_weights(tmp_path, tensors(values), dtype="bfloat16")
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, torch.tensor(values[name]).to(torch.bfloat16))
    back = load_file(tmp_path / "model.safetensors")["ties"].float().tolist()
    assert back[:3] == [1.0, 1 + 2 * 2**-7, -1.0]


def test_arrays_in_bfloat16_are_written_as_float32(tmp_path):
    array = jnp.asarray(VALUES["large"], jnp.bfloat16)
    write_weights(tmp_path, [TensorToWrite("x", array.shape, lambda: np.asarray(array))], dtype="float32")
    np.testing.assert_array_equal(load_file(tmp_path / "model.safetensors")["x"].numpy(), np.asarray(array, np.float32))


@pytest.mark.parametrize("limit", [1, 200, 1000, 1700, 10**9])
@pytest.mark.parametrize(("dtype", "theirs"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_shards_are_those_of_the_hub(tmp_path, limit, dtype, theirs):
    names = write_weights(tmp_path, tensors(), dtype=dtype, max_shard_bytes=limit)
    plan = split_torch_state_dict_into_shards(
        {name: torch.empty(shape, dtype=theirs) for name, shape in SHAPES.items()},
        max_shard_size=limit,
        filename_pattern="model{suffix}.safetensors",
    )
    assert {name for name in names if not name.endswith(".json")} == plan.filename_to_tensors.keys()
    for name, held in plan.filename_to_tensors.items():
        assert load_file(tmp_path / name).keys() == set(held)
    if plan.is_sharded:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == plan.tensor_to_filename
        assert index["metadata"]["total_size"] == plan.metadata["total_size"]
        assert index["metadata"]["total_parameters"] == sum(array.size for array in VALUES.values())
    assert {path.name for path in tmp_path.iterdir()} == set(names)


def test_sizes_are_decimal():
    sizes = {"5GB": 5 * 10**9, "500MB": 5 * 10**8, "1.5 gb": 15 * 10**8, "9KB": 9000, "2TB": 2 * 10**12}
    assert {text: parse_size(text) for text in sizes} == sizes


@pytest.mark.parametrize("text", ["", "5", "GB", "-5GB", "5GiB", "0MB", "0.0001KB", "1e3GB", "five GB"])
def test_an_invalid_size_is_refused_with_an_example(text):
    with pytest.raises(UserError, match=r"max_shard_size = .* such as 5GB"):
        parse_size(text)


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    """Twenty tensors of 4 MB: no more than two at once, and a block of the cast."""
    size = 1_000_000

    def make(seed: int):
        return lambda: np.full(size, seed, np.float32)

    tracemalloc.start()
    write_weights(tmp_path, [TensorToWrite(str(seed), (size,), make(seed)) for seed in range(20)], dtype="bfloat16")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12e6
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert float(file.get_slice("7")[3:4][0]) == 7.0


def test_a_tensor_of_another_shape_than_planned_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"tensor x: made with shape \(2,\), planned as \(3,\)"):
        write_weights(tmp_path, [TensorToWrite("x", (3,), lambda: np.zeros(2, np.float32))])


def test_a_file_that_reads_back_differently_is_an_error(tmp_path):
    header = {"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}
    write_weights(tmp_path, [TensorToWrite("x", (1, 3), lambda: np.zeros((1, 3), np.float32))])
    with pytest.raises(OSError, match="reads back differently"):
        writer._check(tmp_path / "model.safetensors", header)

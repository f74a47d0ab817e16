"""A model written as a Hugging Face checkpoint: config.json and safetensors shards, streamed one tensor at a time."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxprm.errors import UserError
from jaxprm.hf import names
from jaxprm.hf.config import hf_config
from jaxprm.model.config import Head, TransformerConfig

FORMATS = ("sequence", "token")


def write_model(
    directory: Path,
    config: TransformerConfig,
    state: Any,
    *,
    pad_id: int,
    end_id: int,
    max_length: int,
    source: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    max_shard_bytes: int | None = None,
) -> list[str]:
    """Writes config.json and the weights into an existing directory; returns the names of the files.

    state: of a Transformer, written as a language model, or of a RewardModel, written as a classifier of sequences, or
    of tokens where its head has a bias. The other arguments are those of `hf_config` and `write_weights`.
    """
    described = hf_config(
        config,
        reward="transformer" in state,
        pad_id=pad_id,
        end_id=end_id,
        max_length=max_length,
        source=source,
        dtype=dtype,
    )
    (directory / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    tensors = tensors_of(config, state)
    return ["config.json", *write_weights(directory, tensors, dtype=dtype, max_shard_bytes=max_shard_bytes)]


def in_format(config: TransformerConfig, state: Any, form: str) -> tuple[TransformerConfig, Any]:
    """(config, state) of a reward model with the head that a format has, and the same values.

    Classifiers of tokens have a bias, zero where the model has none: one that no checkpoint sets is drawn at random.
    Classifiers of sequences have none. Raises UserError for a bias that is not zero there.
    """
    head = config.head
    if form == "token" and not head.bias:
        state = nnx.State({**state, "head_bias": nnx.Param(jnp.zeros((head.labels,)))})
    elif form == "sequence" and head.bias:
        if np.any(np.asarray(state["head_bias"][...])):
            raise UserError(
                f"format sequence: the model's head has a bias, and {config.traits.sequence} has none; "
                "use --format token"
            )
        state = nnx.State({name: part for name, part in state.items() if name != "head_bias"})
    return dataclasses.replace(config, head=Head(head.labels, bias=form == "token")), state


def tensors_of(config: TransformerConfig, state: Any) -> list[TensorToWrite]:
    """The parameters under their Hugging Face names and in their shapes, each to be made in its turn.

    A layer is cut from its stack on the device: the host holds one tensor of one layer at a time.
    """
    return [_tensor(one, state) for one in names.tensors(config, reward="transformer" in state)]


def _tensor(one: names.TensorSpec, state: Any) -> TensorToWrite:
    parameter = state
    for name in one.path:
        parameter = parameter[name]
    values = parameter[...]

    def make() -> np.ndarray:
        ours = values if one.layer is None else jax.lax.dynamic_index_in_dim(values, one.layer, keepdims=False)
        ours = np.asarray(ours)
        return (ours.T if one.transposed else ours).reshape(one.shape)

    return TensorToWrite(one.name, one.shape, make)


SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"float32": ("F32", jnp.dtype("float32")), "bfloat16": ("BF16", jnp.dtype("bfloat16"))}
MAX_SHARD = "5GB"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BLOCK = 1 << 24  # elements cast at a time


class TensorToWrite(NamedTuple):
    """A tensor to be written: `make()` gives its values, of this shape, when its turn comes."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


def parse_size(text: str, field: str = "max_shard_size") -> int:
    """Bytes of a size such as 5GB or 500MB; units are decimal, as transformers' are.

    Raises UserError for anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]B)", text.strip().upper())
    size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if size < 1:
        raise UserError(f"{field} = {text!r} is not a size; write a number and KB, MB, GB or TB, such as {MAX_SHARD}")
    return size


def write_weights(
    directory: Path, tensors: Sequence[TensorToWrite], *, dtype: str = "float32", max_shard_bytes: int | None = None
) -> list[str]:
    """Writes the tensors, in their order, as `dtype` (rounded to nearest even); returns the names of the files.

    Host memory: what one `make` gives, and 64 MB. A tensor larger than `max_shard_bytes` (5 GB by default) has a shard
    of its own. Every file is on the disk, and opened again to see that it holds what it should, before this returns.

    Raises OSError for a full disk, and ValueError where `make` gives another shape than it said.
    """
    shards = _plan(tensors, DTYPES[dtype][1].itemsize, max_shard_bytes or parse_size(MAX_SHARD))
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write_shard(directory / name, shard, dtype)
    if count == 1:
        return names
    weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    total = sum(map(_elements, tensors))
    index = {
        "metadata": {"total_parameters": total, "total_size": total * DTYPES[dtype][1].itemsize},
        "weight_map": dict(sorted(weight_map.items())),
    }
    with (directory / INDEX).open("w", encoding="utf-8") as file:
        file.write(json.dumps(index, indent=2) + "\n")
        _to_disk(file)
    return [*names, INDEX]


def _plan(tensors: Sequence[TensorToWrite], item: int, limit: int) -> list[list[TensorToWrite]]:
    """The tensors of each file: as many as fit, in order; one that fits nowhere does not end the file it is met in."""
    shards: list[list[TensorToWrite]] = []
    current: list[TensorToWrite] = []
    used = 0
    for tensor in tensors:
        size = _elements(tensor) * item
        if size > limit:
            shards.append([tensor])
            continue
        if used + size > limit:
            shards.append(current)
            current, used = [], 0
        current.append(tensor)
        used += size
    return [*shards, current] if current or not shards else shards


def _elements(tensor: TensorToWrite) -> int:
    return math.prod(tensor.shape)


def _write_shard(path: Path, tensors: Sequence[TensorToWrite], dtype: str) -> None:
    code, numpy_dtype = DTYPES[dtype]
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + _elements(tensor) * numpy_dtype.itemsize
        header[tensor.name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of eight, as readers that map the file expect
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            for block in _blocks(tensor, numpy_dtype):
                file.write(block)
        _to_disk(file)
    _check(path, header)


def _blocks(tensor: TensorToWrite, dtype: np.dtype) -> Iterator[memoryview]:
    """The bytes of a tensor, cast a block at a time."""
    values = tensor.make()
    if values.shape != tensor.shape:
        raise ValueError(f"tensor {tensor.name}: made with shape {values.shape}, planned as {tensor.shape}")
    flat = np.ascontiguousarray(values).reshape(-1)
    del values
    for start in range(0, flat.size, _BLOCK):
        yield flat[start : start + _BLOCK].astype(dtype, copy=False).view(np.uint8).data


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _check(path: Path, header: dict[str, dict]) -> None:
    """The file as safetensors reads it: names, types, shapes; it checks the offsets and the length itself."""
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        slices = {name: file.get_slice(name) for name in set(file.keys())}
        found = {name: (one.get_dtype(), one.get_shape()) for name, one in slices.items()}
    wanted = {name: (field["dtype"], field["shape"]) for name, field in header.items() if name != "__metadata__"}
    if found != wanted:
        raise OSError(f"{path}: reads back otherwise than it was written")

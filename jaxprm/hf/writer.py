"""A model written as a Hugging Face checkpoint: config.json and safetensors shards, streamed one tensor at a time."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open

from jaxprm.errors import UserError
from jaxprm.hf import names
from jaxprm.hf.config import hf_config
from jaxprm.hf.safetensors import INDEX
from jaxprm.model.config import Head, TransformerConfig

FORMATS = ("sequence", "token")
DTYPES = {"float32": ("F32", jnp.dtype("float32")), "bfloat16": ("BF16", jnp.dtype("bfloat16"))}
MAX_SHARD = "5GB"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BLOCK = 1 << 24  # elements cast at a time: 64 MB in float32


class TensorToWrite(NamedTuple):
    """A tensor to be written. `make()` returns its values, of this shape, and is called when it is written."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


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

    state: of a Transformer, written as a causal language model, or of a RewardModel, written as a sequence classifier,
    or as a token classifier if its head has a bias. The other arguments are those of `hf_config` and `write_weights`.
    """
    fields = hf_config(
        config,
        reward="transformer" in state,
        pad_id=pad_id,
        end_id=end_id,
        max_length=max_length,
        source=source,
        dtype=dtype,
    )
    (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    tensors = tensors_of(config, state)
    return ["config.json", *write_weights(directory, tensors, dtype=dtype, max_shard_bytes=max_shard_bytes)]


def in_format(config: TransformerConfig, state: Any, head_format: str | None) -> tuple[TransformerConfig, Any]:
    """(config, state) of a reward model with the same values, and the head of one of FORMATS.

    A sequence classifier has no bias. A token classifier has one, zero if the model has none. None is "token" for a
    bias that is not zero, else "sequence".

    Raises UserError if a bias that is not zero would be dropped.
    """
    head = config.head
    if head_format is None:
        head_format = "token" if head.bias and np.any(np.asarray(state["head_bias"][...])) else "sequence"
    if head_format == "token" and not head.bias:
        # Written even though it is zero: transformers draws a bias at random if the checkpoint has none.
        state = nnx.State({**state, "head_bias": nnx.Param(jnp.zeros((head.labels,)))})
    elif head_format == "sequence" and head.bias:
        if np.any(np.asarray(state["head_bias"][...])):
            raise UserError(
                f"format sequence: the model's head has a bias, and {config.traits.sequence} has none; "
                "use --format token"
            )
        state = nnx.State({name: part for name, part in state.items() if name != "head_bias"})
    return dataclasses.replace(config, head=Head(head.labels, bias=head_format == "token")), state


def tensors_of(config: TransformerConfig, state: Any) -> list[TensorToWrite]:
    """The parameters of a Transformer or a RewardModel as Hugging Face tensors, each made when it is written."""
    return [_tensor(spec, state) for spec in names.tensors(config, reward="transformer" in state)]


def _tensor(spec: names.TensorSpec, state: Any) -> TensorToWrite:
    parameter = state
    for name in spec.path:
        parameter = parameter[name]
    values = parameter[...]

    def make() -> np.ndarray:
        # A layer is cut from its stack on the device: the host holds one tensor of one layer at a time.
        tensor = values if spec.layer is None else jax.lax.dynamic_index_in_dim(values, spec.layer, keepdims=False)
        tensor = np.asarray(tensor)
        return (tensor.T if spec.transposed else tensor).reshape(spec.shape)

    return TensorToWrite(spec.name, spec.shape, make)


def parse_size(text: str, field: str = "max_shard_size") -> int:
    """Bytes of a size such as 5GB or 500MB; units are decimal, as in transformers.

    Raises UserError, with the name of the field, for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]B)", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise UserError(f"{field} = {text!r} is not a size; write a number and KB, MB, GB or TB, such as {MAX_SHARD}")
    return size


def write_weights(
    directory: Path, tensors: Sequence[TensorToWrite], *, dtype: str = "float32", max_shard_bytes: int | None = None
) -> list[str]:
    """Writes the tensors, in their order, as safetensors shards; returns the names of the files, the index last.

    Host memory: the result of one `make`, and 64 MB. Every file is flushed to the disk and its header read back.

    Args:
        dtype: of the files, "float32" or "bfloat16" (rounded to nearest even).
        max_shard_bytes: 5 GB by default. A tensor that is larger is a shard by itself.

    Raises:
        OSError: the disk is full, or a file does not read back as it was written.
        ValueError: `make` returned another shape than planned.
    """
    from huggingface_hub import split_state_dict_into_shards_factory  # slow to import, for those who only read

    itemsize = DTYPES[dtype][1].itemsize
    # The plan of transformers: other tools find the same tensors in files of the same names.
    plan = split_state_dict_into_shards_factory(
        {tensor.name: tensor for tensor in tensors},
        get_storage_size=lambda tensor: tensor.size * itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes or parse_size(MAX_SHARD),
    )
    by_name = {tensor.name: tensor for tensor in tensors}
    for file_name, tensor_names in plan.filename_to_tensors.items():
        _write_shard(directory / file_name, [by_name[name] for name in tensor_names], dtype)
    if not plan.is_sharded:
        return list(plan.filename_to_tensors)
    total = sum(tensor.size for tensor in tensors)
    index = {
        "metadata": {"total_parameters": total, "total_size": total * itemsize},
        "weight_map": dict(sorted(plan.tensor_to_filename.items())),
    }
    with (directory / INDEX).open("w", encoding="utf-8") as file:
        file.write(json.dumps(index, indent=2) + "\n")
        _flush_to_disk(file)
    return [*plan.filename_to_tensors, INDEX]


def _write_shard(path: Path, tensors: Sequence[TensorToWrite], dtype: str) -> None:
    code, numpy_dtype = DTYPES[dtype]
    # transformers 4 refuses a file that does not name the framework of its layout.
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.size * numpy_dtype.itemsize
        header[tensor.name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers that map the file expect the data to begin at a multiple of eight
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            for block in _blocks(tensor, numpy_dtype):
                file.write(block)
        _flush_to_disk(file)
    _check(path, header)


def _blocks(tensor: TensorToWrite, dtype: np.dtype) -> Iterator[memoryview]:
    """The bytes of a tensor, cast one block at a time."""
    values = tensor.make()
    if values.shape != tensor.shape:
        raise ValueError(f"tensor {tensor.name}: made with shape {values.shape}, planned as {tensor.shape}")
    flat = np.ascontiguousarray(values).reshape(-1)
    del values  # if they were not contiguous, `flat` is a copy, and two would stay in memory
    for start in range(0, flat.size, _BLOCK):
        # As bytes: an array of ml_dtypes' bfloat16 has no buffer that a file could write.
        yield flat[start : start + _BLOCK].astype(dtype, copy=False).view(np.uint8).data


def _flush_to_disk(file: IO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _check(path: Path, header: dict[str, dict]) -> None:
    """Raises OSError if safetensors reads other names, dtypes or shapes; it checks offsets and length itself."""
    with safe_open(path, "np") as file:
        slices = {name: file.get_slice(name) for name in set(file.keys())}
        stored = {name: (tensor.get_dtype(), tensor.get_shape()) for name, tensor in slices.items()}
    expected = {name: (field["dtype"], field["shape"]) for name, field in header.items() if name != "__metadata__"}
    if stored != expected:
        raise OSError(f"{path}: reads back differently from what was written")

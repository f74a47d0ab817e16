"""The files of a model, and its safetensors: headers checked to the last byte, tensors memory-mapped.

No memory is allocated for tensors. A checkpoint that `open_tensors` accepts can be read completely.

The headers are checked here and not by the safetensors library, because its errors say less: a torn file is "not fully
covered" without the number of missing bytes, a tensor of the wrong size has no name, JSON errors have a column instead
of a tensor, and a repeated name is accepted.
"""

from __future__ import annotations

import json
import math
import mmap
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from data_pipeline.errors import shown
from jaxprm.errors import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
# Bits per element of every dtype of the format: a file may hold tensors that are skipped.
_ITEM_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
# Name of a file in an index. Without slashes, an index cannot reach outside its directory.
_PLAIN_NAME = re.compile(r"\w[\w.-]{0,200}\.safetensors", re.ASCII)
_MAX_HEADER_BYTES = 100_000_000  # the bound of the format
_MAX_RANK = 32
_DESCRIPTION_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a memory-mapped file: bytes `start` to `end` of it. dtype: as in the header, such as "BF16"."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    map: mmap.mmap

    def array(self) -> np.ndarray:
        """A read-only view of the mapped file; the dtype must be in DTYPES."""
        flat = np.frombuffer(self.map, DTYPES[self.dtype], math.prod(self.shape), self.start)
        return flat.reshape(self.shape)


def has_weights(directory: Path) -> bool:
    """Whether a directory has the weights of a model, in one file or several."""
    return (directory / WEIGHTS).is_file() or (directory / INDEX).is_file()


def weight_files(directory: Path) -> list[str]:
    """The names of the files with a model's weights, the index first if there is one.

    Raises UserError if there are no weights, or if the index is broken or names a file that is missing.
    """
    if (directory / WEIGHTS).is_file():
        return [WEIGHTS]
    if not (directory / INDEX).is_file():
        raise UserError(f"model {directory}: no {WEIGHTS} and no {INDEX}; only safetensors are read")
    return [INDEX, *sorted(set(_read_index(directory / INDEX).values()))]


def model_files(directory: Path) -> list[str]:
    """The names of the existing files that determine what a model computes from a conversation."""
    others = [name for name in _DESCRIPTION_FILES if (directory / name).is_file()]
    return [*others, *(weight_files(directory) if has_weights(directory) else [])]


def open_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by name. Raises UserError, with file and tensor, for anything broken."""
    first, *shards = weight_files(directory)
    if not shards:
        return _open_file(directory / first)
    index = _read_index(directory / first)
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for name, tensor in _open_file(directory / shard).items():
            if name not in index:
                raise UserError(f"{directory / shard}: tensor {shown(name)} is not in {INDEX}")
            if index[name] != shard:
                raise UserError(f"{directory / shard}: tensor {shown(name)} belongs in {index[name]} by {INDEX}")
            tensors[name] = tensor
    for name, shard in index.items():
        if name not in tensors:
            raise UserError(f"{directory / INDEX}: tensor {shown(name)} is not in {shard}, where it should be")
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    """{tensor: file name}. Raises UserError for a name that is not a file in the same directory."""
    index = _parse_json(path.read_bytes(), path)
    files = index.get("weight_map")
    if not isinstance(files, dict) or not files:
        raise UserError(f"{path}: no weight_map of tensors to files")
    for tensor, name in files.items():
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
            raise UserError(
                f"{path}: {shown(tensor)} is in {shown(name)}, which is no .safetensors file of this directory"
            )
    for name in sorted(set(files.values())):
        if not (path.parent / name).is_file():
            raise UserError(f"{path}: names {shown(name)}, which is missing; download or copy all files of the model")
    return files


def _parse_json(text: bytes, path: Path) -> dict[str, Any]:
    # json.loads would silently use the last of repeated names.
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            repeated, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise UserError(f"{path}: {shown(repeated)} occurs twice")
        return fields

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read, not JSON ({str(error) or type(error).__name__})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: cannot be read, must hold an object")
    return value


def _open_file(path: Path) -> dict[str, StoredTensor]:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size < 8:
            raise UserError(f"{path}: cannot be read, {size} bytes are no safetensors file")
        mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    length = int.from_bytes(mapped[:8], "little")
    if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
        raise UserError(f"{path}: cannot be read, a header of {length} bytes in a file of {size}")
    header = _parse_json(mapped[8 : 8 + length], path)
    header.pop("__metadata__", None)
    data = 8 + length
    tensors = {name: _entry(name, entry, path, data, mapped) for name, entry in header.items()}
    # The format has no gaps, no overlaps and nothing after the last tensor. A torn or spliced file breaks that.
    end = data
    # By end too: a tensor without elements starts where the next one does, and comes before it.
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != end:
            problem = "overlaps the one before it" if tensor.start < end else "leaves a gap before it"
            raise UserError(f"{path}: cannot be read, tensor {shown(name)} {problem} in the file")
        end = tensor.end
    if end != size:
        relation = f"{end - size} bytes are missing" if end > size else f"{size - end} bytes too many"
        raise UserError(f"{path}: cannot be read, {relation} at its end; copy or download it again")
    return tensors


def _entry(name: str, entry: Any, path: Path, data: int, mapped: mmap.mmap) -> StoredTensor:
    def refuse(problem: str) -> UserError:
        return UserError(f"{path}: cannot be read, tensor {shown(name)} {problem}")

    if not isinstance(entry, Mapping) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise refuse("has no dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BITS:
        raise refuse(f"has the unknown dtype {shown(dtype)}")
    if not _are_counts(shape) or len(shape) > _MAX_RANK:
        raise refuse(f"has the shape {shown(shape)}")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse(f"has the data_offsets {shown(offsets)}")
    # In bits, since some dtypes are smaller than a byte.
    bits = math.prod(shape) * _ITEM_BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise refuse(f"of shape {shown(shape)} and dtype {dtype} cannot fill the bytes {offsets[0]} to {offsets[1]}")
    return StoredTensor(path, dtype, tuple(shape), data + offsets[0], data + offsets[1], mapped)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63 for value in values
    )

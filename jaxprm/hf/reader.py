"""Hugging Face checkpoints of the supported families, read tensor by tensor into parameters on their devices.

Host memory holds one tensor of one layer at a time, and no device ever has more than its part of the parameters.
Letters: L layers, I and O inputs and outputs of a matrix.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from data_pipeline.errors import shown
from jaxprm.errors import UserError
from jaxprm.hf.config import is_reward_model, read_config
from jaxprm.hf.names import TensorSpec, tensors
from jaxprm.hf.safetensors import DTYPES, StoredTensor, open_tensors
from jaxprm.model.config import Head, TransformerConfig
from jaxprm.model.parameters import parameter_shapes

# Rotary tables of old checkpoints; they follow from the config.
_BUFFERS = re.compile(r"(.+\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")
_COMPARED_BYTES = 1 << 24


def load_transformer(
    directory: str | Path, *, unembedding: bool = True, dtype=jnp.float32, shardings: Any = None
) -> tuple[TransformerConfig, nnx.State]:
    """(config, nnx.State of a Transformer) from a causal language model.

    Args:
        unembedding: False loads the decoder only, from a causal language model or a reward model. The returned config
            has tied embeddings, so that the Transformer has no unembedding.
        dtype, shardings: see `load`.

    Raises UserError if the model cannot be read, before any memory is allocated.
    """
    config, source = read_config(directory)
    classifier = is_reward_model(source)
    if unembedding and classifier:
        raise UserError(
            f"model {directory}: architectures = {source['architectures']} is a reward model; "
            f"give a language model ({config.traits.causal})"
        )
    skipped = () if unembedding else ("score.weight", "score.bias") if classifier else ("lm_head.weight",)
    config = dataclasses.replace(config, head=Head(), tie_embeddings=config.tie_embeddings or not unembedding)
    options = {"skipped": skipped, "dtype": dtype, "shardings": shardings}
    return config, load(Path(directory), config, reward=False, **options)


def load_reward_model(
    directory: str | Path, *, dtype=jnp.float32, shardings: Any = None
) -> tuple[TransformerConfig, nnx.State]:
    """(config, nnx.State of a RewardModel) from a sequence or token classifier of one or two labels.

    The returned config has tied embeddings: a reward model predicts no tokens and has no unembedding.
    dtype, shardings: see `load`.

    Raises UserError if the model cannot be read, before any memory is allocated.
    """
    config, source = read_config(directory)
    if not is_reward_model(source):
        raise UserError(
            f"model {directory}: architectures = {source['architectures']} is no reward model and has no score.weight; "
            f"give one of {config.traits.sequence}, {config.traits.token}"
        )
    config = dataclasses.replace(config, tie_embeddings=True)
    return config, load(Path(directory), config, reward=True, dtype=dtype, shardings=shardings)


def check_vocabulary(directory: str | Path, config: TransformerConfig, tokens: int) -> None:
    """Raises UserError if a tokenizer of `tokens` tokens has ids beyond the embedding."""
    # JAX clips indices out of range: it would silently read another token's row.
    if tokens > config.vocab_size:
        raise UserError(
            f"model {directory}: its tokenizer has {tokens} tokens, its embedding {config.vocab_size}; "
            "put the tokenizer that the model was trained with into its directory"
        )


def abstract(config: TransformerConfig, *, reward: bool, dtype=jnp.float32) -> nnx.State:
    """Shapes of the parameters of a Transformer or a RewardModel, in the tree that `load` returns."""
    tree: dict[str, Any] = {}
    for path, shape in parameter_shapes(config, reward=reward).items():
        *parents, last = path
        node = functools.reduce(lambda inner, name: inner.setdefault(name, {}), parents, tree)
        node[last] = nnx.Param(jax.ShapeDtypeStruct(shape, dtype))
    return nnx.State(tree)


def load(
    directory: Path,
    config: TransformerConfig,
    *,
    reward: bool,
    skipped: Collection[str] = (),
    dtype=jnp.float32,
    shardings: Any = None,
) -> nnx.State:
    """The parameters of the checkpoint in `directory`.

    Args:
        reward: whether to return those of a RewardModel; else of a Transformer.
        skipped: names of tensors to ignore.
        dtype: of the parameters; stored float32, float16 and bfloat16 are converted on the device.
        shardings: a tree like `abstract(config, reward=reward)`; None puts everything on the default device.

    Raises UserError, with file and tensor, before anything is allocated.
    """
    stored = open_tensors(directory)
    # Everything is checked before the first allocation: a broken file costs no memory and no time.
    tensors_by_path: dict[tuple[str, ...], list[tuple[TensorSpec, StoredTensor]]] = {}
    for tensor, source in _match(directory, stored, config, reward=reward, skipped=skipped):
        tensors_by_path.setdefault(tensor.path, []).append((tensor, source))
    state = abstract(config, reward=reward, dtype=dtype)
    leaves, treedef = jax.tree.flatten(state)
    leaf_shardings = [None] * len(leaves) if shardings is None else treedef.flatten_up_to(shardings)
    paths = [_path(path) for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
    return treedef.unflatten(
        _fill(leaf, sharding, tensors_by_path[path])
        for path, leaf, sharding in zip(paths, leaves, leaf_shardings, strict=True)
    )


def _path(keys: Any) -> tuple[str, ...]:
    return tuple(key.key for key in keys if isinstance(key, jax.tree_util.DictKey))


def _match(
    directory: Path,
    stored: Mapping[str, StoredTensor],
    config: TransformerConfig,
    *,
    reward: bool,
    skipped: Collection[str],
) -> list[tuple[TensorSpec, StoredTensor]]:
    """Every tensor of the config with the stored one.

    Raises UserError, by name, for a tensor that is missing, unknown, or of another shape or an unsupported dtype.
    """
    unmatched = {
        name: source for name, source in stored.items() if name not in skipped and not _BUFFERS.fullmatch(name)
    }
    matched = []
    for tensor in tensors(config, reward=reward):
        if tensor.name not in unmatched:
            raise UserError(f"model {directory}: tensor {tensor.name} is missing")
        matched.append((tensor, unmatched.pop(tensor.name)))
    if "lm_head.weight" in unmatched and not reward:
        _check_tied(directory, stored["model.embed_tokens.weight"], unmatched.pop("lm_head.weight"))
    if unmatched:
        raise UserError(f"model {directory}: unknown tensor {shown(min(unmatched))} ({len(unmatched)} in all)")
    for tensor, source in matched:
        if source.shape != tensor.shape:
            raise UserError(
                f"model {directory}: tensor {tensor.name} has shape {list(source.shape)}, expected {list(tensor.shape)}"
            )
        if source.dtype not in DTYPES:
            raise UserError(
                f"model {directory}: tensor {tensor.name} has dtype {source.dtype}; supported: {', '.join(DTYPES)}"
            )
    return matched


def _check_tied(directory: Path, embedding: StoredTensor, head: StoredTensor) -> None:
    """Raises UserError if a checkpoint with tied embeddings stores an unembedding that differs from the embedding."""
    same = (embedding.shape, embedding.dtype) == (head.shape, head.dtype)
    if same and embedding.dtype in DTYPES:
        pair = (np.frombuffer(t.map, np.uint8, t.end - t.start, t.start) for t in (embedding, head))
        first, second = pair
        # In pieces: the comparison allocates a boolean per byte.
        pieces = [slice(start, start + _COMPARED_BYTES) for start in range(0, len(first), _COMPARED_BYTES)]
        same = all(np.array_equal(first[piece], second[piece]) for piece in pieces)
    if not same:
        raise UserError(
            f"model {directory}: lm_head.weight differs from model.embed_tokens.weight, but tie_word_embeddings = true "
            "says that they are equal; set it to false, or remove lm_head.weight"
        )


def _fill(
    leaf: jax.ShapeDtypeStruct, sharding: NamedSharding | None, sources: list[tuple[TensorSpec, StoredTensor]]
) -> jax.Array:
    """One parameter: allocated as zeros with its sharding, then written tensor by tensor."""
    first = sources[0][0]
    stacked = first.layer is not None
    chunk_sharding = None if sharding is None else NamedSharding(sharding.mesh, _chunk_spec(first, sharding.spec))
    parameter = jnp.zeros(leaf.shape, leaf.dtype, device=sharding)
    # If the layer axis is split over devices, a round writes one layer on each of them.
    rounds = 1 if not stacked else leaf.shape[0] if sharding is None else sharding.shard_shape(leaf.shape)[0]
    for step in range(rounds):
        chunk = _chunk([source for _, source in sources[step::rounds]], chunk_sharding)
        parameter = _write(
            parameter,
            chunk,
            np.int32(step),
            shardings=(sharding, chunk_sharding),
            transposed=first.transposed,
            stacked=stacked,
        )
        # Dispatch is asynchronous: without the wait, every tensor would be in memory before the first is written.
        parameter.block_until_ready()
    return parameter


def _chunk(sources: list[StoredTensor], sharding: NamedSharding | None) -> jax.Array:
    """`sources` stacked, [n, *stored shape], in the stored dtype. Each device reads only its slices from the files."""

    def read(index: tuple[slice, ...]) -> np.ndarray:
        # The slice may have open ends; applied to a range it gives the one index.
        (slot,) = range(len(sources))[index[0]]
        part = sources[slot].array()[index[1:]][None]
        # The format does not promise alignment, and JAX requires it.
        return part if part.flags.c_contiguous and part.flags.aligned else part.copy()

    shape = (len(sources), *sources[0].shape)
    if sharding is None:
        return jax.device_put(read((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, sharding, read)


def _chunk_spec(tensor: TensorSpec, spec: PartitionSpec) -> PartitionSpec:
    """Spec of a chunk of stored tensors, given the spec of the parameter that it is written to."""
    stacked = tensor.layer is not None
    axes = len(tensor.shape) + stacked
    parameter_axes = [*spec, *[None] * axes][:axes]
    layer, tensor_axes = (parameter_axes[0], parameter_axes[1:]) if stacked else (None, parameter_axes)
    return PartitionSpec(layer, *(tensor_axes[::-1] if tensor.transposed else tensor_axes))


# The parameter is donated: it is filled in place, instead of being copied for every tensor.
@functools.partial(jax.jit, static_argnames=("shardings", "transposed", "stacked"), donate_argnames=("parameter",))
def _write(parameter, chunk, step, *, shardings: tuple, transposed: bool, stacked: bool):
    """The parameter, [L, I, O] or not stacked, with a chunk [1, *stored shape] per device written at layer `step`.

    shardings: of parameter and chunk. Layers are counted within the device's part.
    """

    def write(part, chunk, step):
        chunk = (chunk.swapaxes(1, 2) if transposed else chunk).astype(part.dtype)
        # Also drops an axis: the head of one label is [1, D] in the file and [D] here.
        chunk = chunk.reshape((1, *part.shape[1:]) if stacked else part.shape)
        start = (step,) + (0,) * (part.ndim - 1) if stacked else (0,) * part.ndim
        return jax.lax.dynamic_update_slice(part, chunk, start)

    sharding, chunk_sharding = shardings
    if sharding is None:
        return write(parameter, chunk, step)
    # shard_map, as the partitioner could gather a split layer axis before writing to it.
    local = jax.shard_map(
        write,
        mesh=sharding.mesh,
        in_specs=(sharding.spec, chunk_sharding.spec, PartitionSpec()),
        out_specs=sharding.spec,
        check_vma=False,
    )
    return local(parameter, chunk, step)

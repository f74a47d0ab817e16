"""Hugging Face checkpoints of the supported families, read tensor by tensor into our parameters on their devices."""

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

from jaxprm.errors import UserError, shown
from jaxprm.hf.config import is_reward_model, read_config
from jaxprm.hf.names import TensorSpec, tensors
from jaxprm.hf.safetensors import DTYPES, StoredTensor, open_tensors
from jaxprm.hf.writer import write_model as write_model
from jaxprm.model.config import Head, TransformerConfig
from jaxprm.model.parameters import parameter_shapes


def load_transformer(
    directory: str | Path, *, unembedding: bool = True, dtype=jnp.float32, shardings: Any = None
) -> tuple[TransformerConfig, nnx.State]:
    """(config, nnx.State of a Transformer) from a causal language model, streamed: see weights.load.

    unembedding: without, the decoder alone, of a causal language model or of a reward model; its config is tied, so it
    holds no unembedding. shardings: a tree like `weights.abstract(config, reward=False)`.

    Raises UserError for what cannot be read, before any memory is spent.
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
    """(config, nnx.State of a RewardModel) from a sequence or token classifier of one or two labels, streamed.

    A reward model predicts no token: its config is tied, so it holds no unembedding. shardings: a tree like
    `weights.abstract(config, reward=True)`.

    Raises UserError for what cannot be read, before any memory is spent.
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
    """Raises UserError where a tokenizer has ids that the embedding has not; JAX would read some other row."""
    if tokens > config.vocab_size:
        raise UserError(
            f"model {directory}: its tokenizer has {tokens} tokens, its embedding {config.vocab_size}; "
            "put the tokenizer it was trained with beside it"
        )


# Tables that old checkpoints carry; they follow from the config.
_BUFFERS = re.compile(r"(.+\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")
_COMPARED_AT_ONCE = 1 << 24  # elements


def abstract(config: TransformerConfig, *, reward: bool, dtype=jnp.float32) -> nnx.State:
    """Shapes of a Transformer's or a RewardModel's parameters, in the tree that `load` fills."""
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
    """The parameters of the checkpoint in `directory`, in `dtype`.

    Args:
      reward: of a RewardModel, or else of a Transformer.
      skipped: tensors that may be there and are not wanted.
      shardings: a tree like `abstract(config)` of NamedShardings; None puts everything on the default device.

    Raises:
      UserError: one line with file and tensor, before anything is allocated.
    """
    stored = open_tensors(directory)
    wanted = _match(directory, stored, config, reward=reward, skipped=skipped)
    state = abstract(config, reward=reward, dtype=dtype)
    leaves, treedef = jax.tree.flatten(state)
    places = [None] * len(leaves) if shardings is None else treedef.flatten_up_to(shardings)
    paths = [_path(path) for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
    slots = {path: (leaf, place) for path, leaf, place in zip(paths, leaves, places, strict=True)}
    by_path: dict[tuple[str, ...], list[tuple[TensorSpec, StoredTensor]]] = {path: [] for path in paths}
    for tensor, source in wanted:
        by_path[tensor.path].append((tensor, source))
    return treedef.unflatten([_fill(*slots[path], by_path[path]) for path in paths])


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
    """Every tensor of the config with the stored one, all stored ones used. UserError, by name, where that fails."""
    rest = {name: one for name, one in stored.items() if name not in skipped and not _BUFFERS.fullmatch(name)}
    found = []
    for tensor in tensors(config, reward=reward):
        if tensor.name not in rest:
            raise UserError(f"model {directory}: tensor {tensor.name} is missing")
        found.append((tensor, rest.pop(tensor.name)))
    if "lm_head.weight" in rest and not reward:
        _check_tied(directory, stored["model.embed_tokens.weight"], rest.pop("lm_head.weight"))
    if rest:
        raise UserError(f"model {directory}: unknown tensor {shown(min(rest))} ({len(rest)} in all)")
    for tensor, source in found:
        if source.shape != tensor.shape:
            raise UserError(
                f"model {directory}: tensor {tensor.name} has shape {list(source.shape)}, expected {list(tensor.shape)}"
            )
        if source.dtype not in DTYPES:
            raise UserError(
                f"model {directory}: tensor {tensor.name} has dtype {source.dtype}; supported: {', '.join(DTYPES)}"
            )
    return found


def _check_tied(directory: Path, embedding: StoredTensor, head: StoredTensor) -> None:
    """A checkpoint may hold the unembedding that its config ties to the embedding; then they must be equal."""
    same = (embedding.shape, embedding.dtype) == (head.shape, head.dtype)
    if same and embedding.dtype in DTYPES:
        ours, theirs = (np.frombuffer(one.map, np.uint8, one.end - one.start, one.start) for one in (embedding, head))
        pieces = range(0, len(ours), _COMPARED_AT_ONCE)
        same = all(np.array_equal(ours[i : i + _COMPARED_AT_ONCE], theirs[i : i + _COMPARED_AT_ONCE]) for i in pieces)
    if not same:
        raise UserError(
            f"model {directory}: lm_head.weight differs from model.embed_tokens.weight, but tie_word_embeddings = true "
            "says that they are one; set it to false, or remove lm_head.weight"
        )


def _fill(leaf: jax.ShapeDtypeStruct, place: NamedSharding | None, sources: list[tuple[TensorSpec, StoredTensor]]):
    """One parameter: zeros where it will lie, then every tensor written into its place."""
    first = sources[0][0]
    stacked = first.layer is not None
    chunk_place = None if place is None else NamedSharding(place.mesh, _chunk_spec(first, place.spec))
    parameter = jnp.zeros(leaf.shape, leaf.dtype, device=place)
    # Where the layer axis is split over devices, a round writes one layer on each of them.
    rounds = 1 if not stacked else leaf.shape[0] if place is None else place.shard_shape(leaf.shape)[0]
    for step in range(rounds):
        chunk = _chunk([source for _, source in sources[step::rounds]], chunk_place)
        parameter = _write(
            parameter, chunk, np.int32(step), places=(place, chunk_place), transposed=first.transposed, stacked=stacked
        )
        # Left to run ahead, every tensor would be in memory before the first is written.
        parameter.block_until_ready()
    return parameter


def _chunk(sources: list[StoredTensor], place: NamedSharding | None) -> jax.Array:
    """[n, *stored shape], as stored: each device reads its own slices of its own one of `sources`."""

    def read(index: tuple[slice, ...]) -> np.ndarray:
        (slot,) = range(len(sources))[index[0]]
        part = sources[slot].array()[index[1:]][None]
        # Alignment is not promised by the format.
        return part if part.flags.c_contiguous and part.flags.aligned else part.copy()

    shape = (len(sources), *sources[0].shape)
    if place is None:
        return jax.device_put(read((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, place, read)


def _chunk_spec(tensor: TensorSpec, spec: PartitionSpec) -> PartitionSpec:
    """How a tensor as it is stored is split, if the parameter made of it is split as `spec` says."""
    stacked = tensor.layer is not None
    axes = len(tensor.shape) + stacked
    ours = [*spec, *[None] * axes][:axes]
    layer, rest = (ours[0], ours[1:]) if stacked else (None, ours)
    return PartitionSpec(layer, *(rest[::-1] if tensor.transposed else rest))


@functools.partial(jax.jit, static_argnames=("places", "transposed", "stacked"), donate_argnames=("parameter",))
def _write(parameter, chunk, step, *, places: tuple, transposed: bool, stacked: bool):
    """Writes a chunk [1, *stored shape] on every device into its part of the parameter, at layer `step` of that."""

    def write(part, chunk, step):
        chunk = (chunk.swapaxes(1, 2) if transposed else chunk).astype(part.dtype)
        chunk = chunk.reshape((1, *part.shape[1:]) if stacked else part.shape)
        start = (step,) + (0,) * (part.ndim - 1) if stacked else (0,) * part.ndim
        return jax.lax.dynamic_update_slice(part, chunk, start)

    place, chunk_place = places
    if place is None:
        return write(parameter, chunk, step)
    # Each device on its own: left to the partitioner, a write into a split layer axis could gather it first.
    local = jax.shard_map(
        write,
        mesh=place.mesh,
        in_specs=(place.spec, chunk_place.spec, PartitionSpec()),
        out_specs=place.spec,
        check_vma=False,
    )
    return local(parameter, chunk, step)

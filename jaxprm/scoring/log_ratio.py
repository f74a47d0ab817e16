"""Progress Advantage (arXiv 2606.26080): steps scored by a policy and its reference, without a reward model.

The log-ratio of a step is log pi(action | state) - log pi_ref(action | state), summed over the tokens of the action.
docs/method.md, section 8, says what it estimates.

Shapes: B rows, T tokens of a row, S steps of a conversation, N candidates of a state, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from cachetools import LRUCache
from flax import nnx

from data_pipeline.chat_template import load_tokenizer
from data_pipeline.encode import Encoded, Encoder, Reasoning, SpecialTokens
from data_pipeline.errors import DataError, one_line
from jaxprm import config as config_lib
from jaxprm.errors import UserError
from jaxprm.hf import reader
from jaxprm.hf.safetensors import open_tensors
from jaxprm.hf.writer import DTYPES
from jaxprm.model import sharding
from jaxprm.model.attention import packed_attention, tiled_attention
from jaxprm.model.config import TransformerConfig
from jaxprm.model.sharding import ONE_DEVICE, Layout
from jaxprm.model.transformer import ForwardOptions, transformer_graph
from jaxprm.policies.protocol import prefix_hash
from jaxprm.scoring.engine import bucket_of, padded_batches
from jaxprm.scoring.scorer import MAX_CACHED, Key, as_message, state_hash

# Tokens whose logits are in memory at once: a divisor of every length that a row is padded to.
LOGITS_AT_ONCE = 128


class LanguageModel(NamedTuple):
    """A causal language model: its sizes and its parameters."""

    config: TransformerConfig
    parameters: Any


@functools.partial(jax.jit, static_argnames=("graph", "dtype", "layout"))
def _log_probabilities(graph, parameters, tokens, counts, dtype, layout=ONE_DEVICE):
    """Log probability [B, T] of every token of rows [B, T] given those before it; 0 for the first.

    counts: number of tokens [B] of each row that are not padding.
    """
    model, tokens = nnx.merge(graph, parameters), layout.constrain_rows(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segments = (positions < counts[:, None]).astype(jnp.int32)
    options = ForwardOptions(dtype, attend=functools.partial(packed_attention, block=tiled_attention))
    hidden = model(tokens, positions, segments, forward_options=options).hidden

    def of_chunk(chunk):
        states, targets = chunk
        logits = model.logits(states)
        return jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)

    # All logits at once would be gigabytes, [B, T, V]. LENGTH_BUCKETS are multiples of the chunk.
    targets = jnp.roll(tokens, -1, axis=1)
    chunks = (hidden.reshape(-1, LOGITS_AT_ONCE, hidden.shape[-1]), targets.reshape(-1, LOGITS_AT_ONCE))
    following = jax.lax.map(of_chunk, chunks).reshape(tokens.shape)
    return jnp.pad(following[:, :-1], ((0, 0), (1, 0)))


class LogRatioScorer:
    """Scores conversations and candidate actions by two language models with one tokenizer. Not thread-safe.

    The value of a step is the sum of the log-ratios of the steps up to it. So the difference of neighbouring values is
    the log-ratio of a step, and the last value is that of the trajectory. It has the protocol of `Scorer`, so that
    every search and best-of-N can use it.

    Args:
      policy, reference: the trained policy, and the model that its training started from or was held close to.
      encoder: of the policy.
      dtype: of the arithmetic, "float32" or "bfloat16".
      layout: of the mesh that holds the parameters.

    Nothing is cached except values: a conversation is read in full, by both models, each time that it grows.
    """

    def __init__(
        self,
        policy: LanguageModel,
        reference: LanguageModel,
        encoder: Encoder,
        *,
        dtype: str = "float32",
        layout: Layout = ONE_DEVICE,
    ):
        self.encoder = encoder
        self._models, self._dtype, self._layout = (policy, reference), jnp.dtype(dtype), layout
        self._cache: LRUCache[Key, float] = LRUCache(MAX_CACHED)
        self._encoded = self._slots = 0

    @property
    def usage(self) -> dict[str, int]:
        """Tokens so far, as in `Scorer.usage`: each model's are counted."""
        return {"encoded": self._encoded, "reused": 0, "again": 0, "slots": self._slots}

    def forget(self) -> None:
        """Empties the cache of values."""
        self._cache.clear()

    def log_ratios(self, encoded: Sequence[Encoded], names: Sequence[str]) -> list[np.ndarray]:
        """Log-ratio of every step of each conversation: float64 [S] each.

        Raises UserError, with its name, for a conversation longer than the largest bucket.
        """
        sequences = [conversation.tokens for conversation in encoded]
        of_tokens = [np.zeros(len(tokens)) for tokens in sequences]
        for indices, tokens, counts in padded_batches(sequences, names, parts=self._layout.parts):
            for sign, model in zip((1, -1), self._models, strict=True):
                graph = transformer_graph(model.config)
                result = _log_probabilities(graph, model.parameters, tokens, counts, self._dtype, self._layout)
                result = np.asarray(result, np.float64)
                for row, index in enumerate(indices):
                    of_tokens[index] += sign * result[row, : counts[row]]
            self._encoded += len(self._models) * int(counts.sum())
            self._slots += len(self._models) * tokens.size
        return [
            np.asarray([values[part].sum() for part in self._actions(conversation)])
            for conversation, values in zip(encoded, of_tokens, strict=True)
        ]

    def score_encoded(self, encoded: Sequence[Encoded], names: Sequence[str]) -> list[np.ndarray]:
        """Sum of the log-ratios up to every step: float64 [S] each. Raises as `log_ratios`."""
        return [np.cumsum(ratios) for ratios in self.log_ratios(encoded, names)]

    def score_actions(
        self,
        states: Sequence[Sequence[dict]],
        candidates: Sequence[Sequence[str | dict]],
        *,
        tools: Sequence[list[dict] | None] | None = None,
    ) -> list[np.ndarray]:
        """The value of candidate actions, float64 [N] for each state; see `Scorer.score_actions`."""
        tools = tools or [None] * len(states)
        keys: list[list[Key]] = []
        pending: dict[Key, Encoded] = {}
        failed: set[Key] = set()
        for state, texts, of_state in zip(states, candidates, tools, strict=True):
            state_key, actions = state_hash(state, of_state), [as_message(candidate) for candidate in texts]
            keys.append([(state_key, prefix_hash([action])) for action in actions])
            for key, action in zip(keys[-1], actions, strict=True):
                if key in self._cache or key in pending or key in failed:
                    continue
                try:
                    pending[key] = self._encode(state, action, of_state)
                except (DataError, UserError):
                    failed.add(key)
        # Read before the cache grows, which may drop some of them.
        values = {key: self._cache[key] for row in keys for key in row if key in self._cache}
        computed = self.score_encoded([*pending.values()], ["candidate"] * len(pending))
        values |= {key: float(sums[-1]) for key, sums in zip(pending, computed, strict=True)}
        self._cache.update(values)
        return [np.asarray([values.get(key, -np.inf) for key in row]) for row in keys]

    def refusal(self, state: Sequence[dict], candidate: str | dict, tools: list[dict] | None = None) -> str | None:
        """Why `score_actions` gives a candidate -inf, in one line; None if it can be scored."""
        try:
            self._encode(state, as_message(candidate), tools)
        except (DataError, UserError) as error:
            return one_line(error)
        return None

    def _encode(self, state: Sequence[dict], action: dict, tools: list[dict] | None) -> Encoded:
        encoded = self.encoder.trajectory([*state, action], row="candidate", tools=tools)
        bucket_of(len(encoded.tokens), "candidate")
        return encoded

    def _actions(self, encoded: Encoded) -> list[slice]:
        """The tokens of every step that the policy has drawn: up to its end token, without what the template adds."""
        slices = []
        for start, stop in zip(encoded.action_starts, encoded.read_positions + 1, strict=True):
            (ends,) = np.nonzero(encoded.tokens[start:stop] == self.encoder.end_id)
            slices.append(slice(start, start + ends[0] + 1 if len(ends) else stop))
        return slices


def load_log_ratio(
    policy: Path,
    reference: Path,
    *,
    dtype: str = "float32",
    template: str | None = None,
    reasoning: Reasoning | None = None,
    special_tokens: SpecialTokens | None = None,
    mesh: config_lib.MeshConfig | None = None,
) -> LogRatioScorer:
    """The scorer of two directories of language models. template: in place of the policy's; the reference needs none.
    reasoning, special_tokens: as in Encoder.load.

    Raises UserError or DataError if a model cannot be read, or their tokenizers differ.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype = {dtype!r} is not supported; supported: {', '.join(DTYPES)}")
    encoder = Encoder.load(policy, template, reasoning=reasoning or "keep", special_tokens=special_tokens or "error")
    check_tokenizers(policy, reference)
    layout = ONE_DEVICE if mesh is None else Layout(sharding.make_mesh(mesh, jax.local_devices()))
    models = []
    for directory in (policy, reference):
        models.append(_load(directory, layout))
        reader.check_vocabulary(directory, models[-1].config, encoder.vocabulary_size)
    return LogRatioScorer(*models, encoder, dtype=dtype, layout=layout)


def check_tokenizers(policy: Path, reference: Path) -> None:
    """Raises UserError unless both models mean the same tokens by the same ids."""
    vocabulary, other = load_tokenizer(policy).get_vocab(), load_tokenizer(reference).get_vocab()
    different = sorted(token for token in vocabulary.keys() | other.keys() if vocabulary.get(token) != other.get(token))
    if different:
        token = different[0]
        raise UserError(
            f"reference {reference}: its tokenizer is not that of {policy}: token {token!r} is {other.get(token)} "
            f"there and {vocabulary.get(token)} here ({len(different)} differ); give the model that the policy's "
            "training started from"
        )


def _load(directory: Path, layout: Layout) -> LanguageModel:
    shardings = None
    if layout.mesh is not None:
        config = reader.read_config(directory)[0]
        sharding.check_model(layout.mesh, config)
        shardings = sharding.shardings(sharding.with_shardings(layout.mesh, reader.abstract(config, reward=False)))
    # As for reward models: weights in bfloat16 stay so in memory.
    stored = {tensor.dtype for tensor in open_tensors(directory).values()}
    dtype = jnp.bfloat16 if stored == {"BF16"} else jnp.float32
    return LanguageModel(*reader.load_transformer(directory, dtype=dtype, shardings=shardings))

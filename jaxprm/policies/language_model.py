"""The embedded policy: our transformer, sampled behind cached prefixes, many states at once, in fixed shapes.

Shapes: R rows of a call, one candidate each; G prefixes of a call, each read by R / G rows; T tokens to generate at
most; V vocabulary.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cachetools import LRUCache
from flax import nnx

from data_pipeline.encode import Encoder
from jaxprm.config import PolicyConfig
from jaxprm.hf import hub, reader
from jaxprm.model.config import TransformerConfig
from jaxprm.model.prefix_bank import PrefixBank, copy_slots
from jaxprm.model.transformer import Cache, transformer_graph
from jaxprm.policies.protocol import Action, DrawKey, State, candidate_seed, draw_keys

# Threads that sample a half of the states each: one call does not fill two cores, and an accelerator queues them.
LANES = 2
# Candidates of a state that read one copy of its prefix. Every further number would be another compilation.
GROUP_SIZE = 4
# Most turns end early. Once this fraction of the rows is open, a smaller call finishes them.
TAIL_FRACTION = 4
# Actions in memory, a kilobyte each at most. The least recently used are dropped, and drawn again the same.
MAX_CACHED = 1 << 18

# A draw, and the tokens of its prompt, int32 [P].
_Job = tuple[DrawKey, np.ndarray]


@functools.partial(jax.jit, static_argnames=("graph", "end_id", "steps", "capacity"))
def _generate(
    graph, parameters, bank, slots, lengths, last, keys, active, temperature, banned, *, end_id, steps, capacity
):
    """Samples up to `steps` (T) tokens after `last` [R], each R / G rows behind a copy of one of `slots` [G].

    Args:
      lengths: int32 [G], filled tokens of the slots.
      keys: uint32 [R, 2], one random key a row.
      active: bool [R], rows to fill.
      banned: bool [V], tokens that are never sampled.

    Returns (tokens int32 [R, T], counts int32 [R], ended bool [R], log probabilities float32 [R]). The end token counts
    as generated. Log probabilities are the model's own, at temperature 1.
    """
    model = nnx.merge(graph, parameters)
    rows, tail_rows = len(last), max(1, len(last) // TAIL_FRACTION)
    group_size = rows // len(slots)

    def draw(logits, keys, step):
        # Inverse transform: one uniform number a row, where jax.random.categorical draws one a vocabulary entry.
        # At temperature 0 argmax decides below; the floor keeps what is not used finite.
        scaled = logits / jnp.maximum(temperature, 1e-6)
        probabilities = jax.nn.softmax(scaled, axis=-1)
        # A function of the row's key and the step alone, so a draw does not depend on the rest of the batch.
        uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, step)))(keys)
        cumulative = jnp.cumsum(probabilities, axis=-1)
        # Times the last sum, which rounding keeps from being exactly 1.
        drawn = jnp.sum(cumulative <= uniform[:, None] * cumulative[:, -1:], axis=-1)
        token = jnp.where(temperature > 0, jnp.minimum(drawn, logits.shape[-1] - 1), logits.argmax(-1))
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), token[:, None], axis=1)[:, 0]
        return token.astype(jnp.int32), chosen

    def sample(inputs, state, step, until):
        """(state, step) after decoding until at most `until` rows are open."""
        # Outside the loop's carry, which XLA may copy at every step.
        prefix = copy_slots(bank, inputs["slots"], inputs["lengths"], capacity)
        ones = jnp.ones((len(inputs["starts"]), 1), jnp.int32)

        def more(carry):
            state, step = carry
            return (step < steps) & (state["open"].sum() > until)

        def advance(carry):
            state, step = carry
            turn, is_open = state["turn"], state["open"]
            positions = (inputs["starts"] + turn.lengths)[:, None]
            output = model(state["last"][:, None], positions, ones, (prefix, turn))
            logits = jnp.where(banned, -jnp.inf, model.logits(output.hidden[:, 0]))
            token, log_probability = draw(logits, inputs["keys"], step)
            token = jnp.where(is_open, token, end_id)
            state = {
                "turn": turn.append(output.keys, output.values, is_open.astype(jnp.int32)),
                "last": token,
                "tokens": state["tokens"].at[:, step].set(token),
                "counts": state["counts"] + is_open,
                "log_probability": state["log_probability"] + jnp.where(is_open, log_probability, 0.0),
                "open": is_open & (token != end_id),
            }
            return state, step + 1

        return jax.lax.while_loop(more, advance, (state, step))

    inputs = {
        "slots": slots,
        "lengths": lengths,
        "starts": jnp.repeat(lengths, group_size),
        "keys": jax.vmap(jax.random.wrap_key_data)(keys),
    }
    state = {
        # One token more than steps: a row that has ended still writes its keys and values after its last token.
        "turn": Cache.empty(model.config, rows, steps + 1),
        "last": last,
        "tokens": jnp.full((rows, steps), end_id, jnp.int32),
        "counts": jnp.zeros((rows,), jnp.int32),
        "log_probability": jnp.zeros((rows,), jnp.float32),
        "open": active,
    }
    state, step = sample(inputs, state, 0, tail_rows)
    # The longest turns finish in a smaller call. Copies of row 0 fill the rows that are left: all of them
    # compute the same.
    open_rows = jnp.nonzero(state["open"], size=tail_rows, fill_value=0)[0]
    inputs = inputs | {"slots": jnp.repeat(slots, group_size), "lengths": inputs["starts"]}
    inputs, tail = jax.tree.map(lambda leaf: leaf[open_rows], (inputs, state))
    tail, _ = sample(inputs, tail, step, 0)
    done = {name: state[name].at[open_rows].set(tail[name]) for name in ("tokens", "counts", "open", "log_probability")}
    return done["tokens"], done["counts"], ~done["open"], done["log_probability"]


class LanguageModelPolicy:
    """Samples assistant turns from a causal language model.

    A candidate is drawn once: for the same (task, conversation, number, temperature) the policy answers from memory,
    so searches that meet in a state share its candidates and their cost. What was dropped from memory is drawn again.

    Args:
      parameters: of the transformer, with its unembedding.
      settings: `max_tokens` bounds conversation and action together, `max_action_tokens` the action; `in_flight` is
        the number of candidates sampled at once.
    """

    def __init__(
        self, config: TransformerConfig, parameters: Any, encoder: Encoder, *, seed: int, settings: PolicyConfig
    ):
        self._graph = transformer_graph(config)
        self._parameters, self._encoder, self._seed = parameters, encoder, seed
        self._rows = -(-settings.in_flight // LANES)
        self._group_size = GROUP_SIZE if self._rows % GROUP_SIZE == 0 else 1
        self._lanes = ThreadPoolExecutor(LANES, thread_name_prefix="sample")
        self._steps = settings.max_action_tokens
        self.max_tokens = settings.max_tokens
        self._bank = PrefixBank(
            self._graph,
            parameters,
            config,
            # A call holds one slot for every row, and allocate needs twice as many slots as prefixes.
            slots=2 * LANES * self._rows,
            capacity=self.max_tokens,
            rows=settings.in_flight,
        )
        self._cache: LRUCache[DrawKey, Action] = LRUCache(MAX_CACHED)
        # A turn can end, but it cannot open another message or be padding.
        self._banned = np.zeros(config.vocab_size, bool)
        self._banned[sorted(encoder.special_ids - {encoder.end_id})] = True
        # Many embeddings have more rows than the tokenizer has tokens.
        self._banned[encoder.vocabulary_size :] = True
        self.generated = 0
        self._lock = threading.Lock()

    @property
    def encoder(self) -> Encoder:
        return self._encoder

    @property
    def usage(self) -> dict[str, int]:
        """Tokens encoded and generated so far; an answer from memory adds none."""
        return {"encoded": self._bank.tokens_encoded, "generated": self.generated}

    def propose(self, states: Sequence[State], n: int, temperature: float) -> list[list[Action]]:
        """n actions for each state. A state without room for an action gets empty ones with stop "length"."""
        keys = draw_keys(states, n, temperature)
        # Read before anything is added: an addition may drop a key of this call.
        actions = {key: self._cache[key] for row in keys for key in row if key in self._cache}
        missing = {key: state for state, row in zip(states, keys, strict=True) for key in row if key not in actions}
        jobs, prompts = [], {}
        for key, state in missing.items():
            if key.prefix not in prompts:
                prompts[key.prefix] = np.asarray(self._encoder.prompt(state.messages), np.int32)
            tokens = prompts[key.prefix]
            if len(tokens) + self._steps > self.max_tokens:
                actions[key] = Action("", 0, None, "length")
            else:
                jobs.append((key, tokens))
        actions |= self._sample_all(jobs, temperature)
        self._cache.update((key, actions[key]) for key in missing)
        return [[actions[key] for key in row] for row in keys]

    def count_tokens(self, messages: Sequence[dict[str, Any]]) -> int:
        """Length of a conversation in tokens, with the opening of the next assistant turn."""
        return len(self._encoder.prompt(messages))

    def _sample_all(self, jobs: list[_Job], temperature: float) -> dict[DrawKey, Action]:
        """Samples all jobs: those of one prompt in groups, prompts of similar length in one call."""
        of_prompt: dict[bytes, list[_Job]] = {}
        for job in jobs:
            of_prompt.setdefault(job[1].tobytes(), []).append(job)
        groups: dict[int, list[list[_Job]]] = {self._group_size: [], 1: []}
        for same_prompt in of_prompt.values():
            # An empty row costs what a filled one does, so a last group is formed only if it misses one job at most.
            grouped = 0
            if self._group_size > 1:
                grouped = (len(same_prompt) + 1) // self._group_size * self._group_size
            groups[self._group_size] += [
                same_prompt[at : at + self._group_size] for at in range(0, grouped, self._group_size)
            ]
            groups[1] += [[job] for job in same_prompt[grouped:]]
        actions: dict[DrawKey, Action] = {}
        for size, of_size in groups.items():
            of_size.sort(key=lambda group: len(group[0][1]))
            groups_a_call = self._rows // size * LANES
            for start in range(0, len(of_size), groups_a_call):
                actions |= self._sample(of_size[start : start + groups_a_call], size, temperature)
        return actions

    def _sample(self, groups: list[list[_Job]], size: int, temperature: float) -> dict[DrawKey, Action]:
        # The last token is not part of the prefix: the decoder reads it to get the first distribution.
        # By this thread, before the lanes start: the bank is not thread-safe, and its slots are valid until the next
        # call.
        slots = self._bank.allocate([group[0][1][:-1] for group in groups])
        groups_a_lane = self._rows // size
        lanes = [slice(start, start + groups_a_lane) for start in range(0, len(groups), groups_a_lane)]
        actions: dict[DrawKey, Action] = {}
        for of_lane in self._lanes.map(
            lambda lane: self._sample_lane(groups[lane], size, slots[lane], temperature), lanes
        ):
            actions |= of_lane
        return actions

    def _sample_lane(
        self, groups: list[list[_Job]], size: int, allocated: np.ndarray, temperature: float
    ) -> dict[DrawKey, Action]:
        rows = self._rows
        slots, lengths = np.zeros((2, rows // size), np.int32)
        last, active, seeds = np.zeros(rows, np.int32), np.zeros(rows, bool), np.zeros((rows, 2), np.uint32)
        keys: dict[int, DrawKey] = {}
        for number, group in enumerate(groups):
            slots[number], lengths[number] = allocated[number], len(group[0][1]) - 1
            for row, (key, tokens) in enumerate(group, start=number * size):
                keys[row], active[row], last[row] = key, True, tokens[-1]
                seeds[row] = candidate_seed(self._seed, key.task, key.prefix, key.number)
        tokens, counts, ended, log_probabilities = jax.device_get(
            _generate(
                self._graph,
                self._parameters,
                self._bank.bank,
                slots,
                lengths,
                last,
                seeds,
                active,
                np.float32(temperature),
                self._banned,
                end_id=self._encoder.end_id,
                steps=self._steps,
                capacity=self._bank.bucket(int(lengths.max())),
            )
        )
        actions: dict[DrawKey, Action] = {}
        for row, key in keys.items():
            ids = tokens[row, : counts[row] - int(ended[row])].tolist()
            stop = "end" if ended[row] else "length"
            actions[key] = Action(self._text(ids), int(counts[row]), float(log_probabilities[row]), stop)
        with self._lock:
            self.generated += int(counts[active].sum())
        return actions

    def _text(self, ids: list[int]) -> str:
        text = self._encoder.decode(ids)
        # Plain tokens can spell a special one, which no conversation may contain; removing it can form another.
        while special := self._encoder.special_in(text):
            text = text.replace(special, "")
        return text


def default_directory() -> Path:
    """The model directory of the policy that ships with the package."""
    return Path(str(resources.files("jaxprm") / "assets" / "textcraft_policy"))


def load(path: str, *, seed: int, settings: PolicyConfig) -> LanguageModelPolicy:
    """The policy of a model directory or Hub id; "default" is the policy that ships with the package.

    Raises UserError or DataError if the model or its tokenizer cannot be read, or they do not belong together.
    """
    directory = default_directory() if path == "default" else hub.resolve(path)
    config, parameters = reader.load_transformer(directory)
    encoder = Encoder.load(directory, **settings.encoding)
    reader.check_vocabulary(directory, config, encoder.vocabulary_size)
    return LanguageModelPolicy(config, parameters, encoder, seed=seed, settings=settings)

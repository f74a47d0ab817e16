"""The embedded policy: our transformer, sampled with cached prefixes, many states at once, in fixed shapes."""

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
from flax import nnx

from data_pipeline.encode import Encoder
from jaxprm.hf import hub, reader
from jaxprm.model.prefix_bank import PrefixBank, copy_slots
from jaxprm.model.transformer import Cache, transformer_graph
from jaxprm.policies.protocol import Action, DrawKey, State, candidate_seed, draw_keys

# Half of the states each, side by side: one call does not fill two cores, and an accelerator queues them.
LANES = 2
# Candidates of one state that read one copy of its prefix. A second number would be a second compilation.
SHARED = 4
# A call goes on with this much fewer rows once no more are open.
FEW = 4
# Actions that are remembered, the latest; a kilobyte each at most. What is forgotten is drawn again, and the same.
MAX_CACHED = 1 << 18


@functools.partial(jax.jit, static_argnames=("graph", "end_id", "steps", "capacity"))
def _generate(
    graph, parameters, bank, slots, lengths, last, keys, active, temperature, banned, *, end_id, steps, capacity
):
    """Samples up to `steps` tokens after `last` [R], each R / G rows after a copy of one of `slots` [G].

    lengths: int32 [G], filled of the slots; keys: uint32 [R, 2]; active: bool [R], rows to fill; banned: bool [V],
    never sampled. Returns (tokens int32 [R, steps], counts [R], ended bool [R], log probabilities [R]); the end token
    counts as generated. Log probabilities are the model's own, at temperature 1.
    """
    model = nnx.merge(graph, parameters)
    rows, few = len(last), max(1, len(last) // FEW)
    shared = rows // len(slots)

    def draw(logits, keys, step):
        # Inverse transform: one uniform number a row, not one a vocabulary entry.
        scaled = logits / jnp.maximum(temperature, 1e-6)
        probabilities = jax.nn.softmax(scaled, axis=-1)
        uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, step)))(keys)
        cumulative = jnp.cumsum(probabilities, axis=-1)
        drawn = jnp.sum(cumulative <= uniform[:, None] * cumulative[:, -1:], axis=-1)
        token = jnp.where(temperature > 0, jnp.minimum(drawn, logits.shape[-1] - 1), logits.argmax(-1))
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), token[:, None], axis=1)[:, 0]
        return token.astype(jnp.int32), chosen

    def sample(given, state, step, until):
        """Advances the rows until no more than `until` are open: (state, step)."""
        # The prefix stays outside the loop's state: what a loop carries, it may copy at every step.
        prefix = copy_slots(bank, given["slots"], given["lengths"], capacity)
        ones = jnp.ones((len(given["starts"]), 1), jnp.int32)

        def more(carry):
            state, step = carry
            return (step < steps) & (state["open"].sum() > until)

        def advance(carry):
            state, step = carry
            turn, is_open = state["turn"], state["open"]
            positions = (given["starts"] + turn.lengths)[:, None]
            output = model(state["last"][:, None], positions, ones, (prefix, turn))
            logits = jnp.where(banned, -jnp.inf, model.logits(output.hidden[:, 0]))
            token, log_probability = draw(logits, given["keys"], step)
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

    given = {
        "slots": slots,
        "lengths": lengths,
        "starts": jnp.repeat(lengths, shared),
        "keys": jax.vmap(jax.random.wrap_key_data)(keys),
    }
    state = {
        "turn": Cache.empty(model.config, rows, steps + 1),
        "last": last,
        "tokens": jnp.full((rows, steps), end_id, jnp.int32),
        "counts": jnp.zeros((rows,), jnp.int32),
        "log_probability": jnp.zeros((rows,), jnp.float32),
        "open": active,
    }
    state, step = sample(given, state, 0, few)
    # The longest turns end among themselves. Where fewer are left than fit, row 0 stands in, and stays what it is.
    rest = jnp.nonzero(state["open"], size=few, fill_value=0)[0]
    given = given | {"slots": jnp.repeat(slots, shared), "lengths": given["starts"]}
    given, ended = jax.tree.map(lambda leaf: leaf[rest], (given, state))
    ended, _ = sample(given, ended, step, 0)
    done = {name: state[name].at[rest].set(ended[name]) for name in ("tokens", "counts", "open", "log_probability")}
    return done["tokens"], done["counts"], ~done["open"], done["log_probability"]


class LanguageModelPolicy:
    """Samples assistant turns from a causal language model.

    Every candidate is drawn once: asked again for the same (task, conversation, number, temperature), the policy
    answers from memory, as far as that goes, so that searches that meet in a state share its candidates and its cost.
    """

    def __init__(self, config, parameters: Any, encoder: Encoder, *, seed: int, settings):
        self._graph = transformer_graph(config)
        self._parameters, self._encoder, self._seed = parameters, encoder, seed
        self._in_flight = settings.in_flight
        self._rows = -(-settings.in_flight // LANES)
        self._shared = SHARED if self._rows % SHARED == 0 else 1
        self._lanes = ThreadPoolExecutor(LANES, thread_name_prefix="sample")
        self._steps = settings.max_action_tokens
        self.max_tokens = settings.max_tokens
        self._bank = PrefixBank(
            self._graph,
            parameters,
            config,
            slots=2 * LANES * self._rows,
            capacity=self.max_tokens,
            rows=self._in_flight,
        )
        self._memory: dict[DrawKey, Action] = {}
        # A turn can end, but not open another message or be padding.
        self._banned = np.zeros(config.vocab_size, bool)
        self._banned[sorted(encoder.special_ids - {encoder.end_id})] = True
        self._banned[encoder.vocabulary_size :] = True
        self.generated = 0
        self._lock = threading.Lock()

    @property
    def encoder(self) -> Encoder:
        return self._encoder

    @property
    def usage(self) -> dict[str, int]:
        """Tokens encoded and generated so far; an answer from memory costs nothing."""
        return {"encoded": self._bank.tokens_encoded, "generated": self.generated}

    def propose(self, states: Sequence[State], n: int, temperature: float) -> list[list[Action]]:
        """n actions for each state; a state too long for the cache gets actions that stop at once, with no text."""
        keys = draw_keys(states, n, temperature)
        pairs = zip(states, keys, strict=True)
        wanted = {key: state for state, row in pairs for key in row if key not in self._memory}
        jobs, prompts = [], {}
        for key, state in wanted.items():
            if (name := key[1]) not in prompts:
                prompts[name] = np.asarray(self._encoder.prompt(state.messages), np.int32)
            tokens = prompts[name]
            if len(tokens) + self._steps > self.max_tokens:
                self._memory[key] = Action("", 0, None, "length")
            else:
                jobs.append((key, tokens))
        self._sample_all(jobs, temperature)
        found = [[self._memory[key] for key in row] for row in keys]
        while len(self._memory) > MAX_CACHED:
            del self._memory[next(iter(self._memory))]
        return found

    def count_tokens(self, messages: Sequence[dict]) -> int:
        """Length of a conversation, with the opening of the next assistant turn."""
        return len(self._encoder.prompt(messages))

    def _sample_all(self, jobs: list, temperature: float) -> None:
        """Jobs (key, tokens), those of one prefix in groups as far as they fill groups, alike lengths together."""
        of_prefix: dict[bytes, list] = {}
        for job in jobs:
            of_prefix.setdefault(job[1].tobytes(), []).append(job)
        groups: dict[int, list[list]] = {self._shared: [], 1: []}
        for some in of_prefix.values():
            # A place left empty costs what a filled one does: a rest goes together only where it nearly fills a group.
            together = (len(some) + 1) // self._shared * self._shared if self._shared > 1 else 0
            groups[self._shared] += [some[at : at + self._shared] for at in range(0, together, self._shared)]
            groups[1] += [[job] for job in some[together:]]
        for size, found in groups.items():
            found.sort(key=lambda group: len(group[0][1]))
            at_once = self._rows // size * LANES
            for start in range(0, len(found), at_once):
                self._sample(found[start : start + at_once], size, temperature)

    def _sample(self, groups: list[list], size: int, temperature: float) -> None:
        # The last token is fed to the decoder: its output is the first distribution to draw from.
        slots = self._bank.allocate([group[0][1][:-1] for group in groups])
        each = self._rows // size
        lanes = [slice(start, start + each) for start in range(0, len(groups), each)]
        for _ in self._lanes.map(lambda lane: self._sample_lane(groups[lane], size, slots[lane], temperature), lanes):
            pass

    def _sample_lane(self, groups: list[list], size: int, placed: np.ndarray, temperature: float) -> None:
        rows = self._rows
        slots, lengths = np.zeros((2, rows // size), np.int32)
        last, active, seeds = np.zeros(rows, np.int32), np.zeros(rows, bool), np.zeros((rows, 2), np.uint32)
        jobs: dict[int, Any] = {}
        for number, group in enumerate(groups):
            slots[number], lengths[number] = placed[number], len(group[0][1]) - 1
            for row, (key, tokens) in enumerate(group, start=number * size):
                jobs[row], active[row], last[row] = key, True, tokens[-1]
                seeds[row] = candidate_seed(self._seed, *key[:3])
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
        for row, key in jobs.items():
            ids = tokens[row, : counts[row] - int(ended[row])].tolist()
            stop = "end" if ended[row] else "length"
            self._memory[key] = Action(self._text(ids), int(counts[row]), float(log_probabilities[row]), stop)
        with self._lock:
            self.generated += int(counts[active].sum())

    def _text(self, ids: list[int]) -> str:
        text = self._encoder.decode(ids)
        # Plain tokens can still spell a special one, which no conversation may contain.
        while found := self._encoder.special_in(text):
            text = text.replace(found, "")
        return text


def default_directory() -> Path:
    """The policy that ships with the package."""
    return Path(str(resources.files("jaxprm") / "assets" / "textcraft_policy"))


def load(path: str, *, seed: int, settings) -> LanguageModelPolicy:
    """The policy of a model directory or a name on the hub, or the shipped one for "default"."""
    directory = default_directory() if path == "default" else hub.resolve(path)
    config, parameters = reader.load_transformer(directory)
    encoder = Encoder.load(directory, settings.chat_template)
    reader.check_vocabulary(directory, config, encoder.vocabulary_size)
    return LanguageModelPolicy(config, parameters, encoder, seed=seed, settings=settings)

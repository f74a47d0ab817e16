"""A policy behind an API: any OpenAI-compatible server of chat completions."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from data_pipeline.encode import Encoder
from jaxprm.config import EndpointConfig, PolicyConfig
from jaxprm.errors import UserError
from jaxprm.policies.chat_client import ChatClient, RequestFailed
from jaxprm.policies.completion import Completion
from jaxprm.policies.protocol import Action, DrawKey, State, candidate_seed, draw_keys

_SENT = ("role", "content", "name", "tool_calls", "tool_call_id")
# Where no tokenizer is known: of English and of code, a token is some four bytes, and a message costs a few to mark.
_BYTES_PER_TOKEN, _TOKENS_PER_MESSAGE = 4, 4


class OpenAIPolicy:
    """Asks for every candidate in a request of its own, with the draw's own seed, so that draws do not depend on the
    batch; whether equal seeds give equal draws is the server's to keep.

    Every candidate is asked for once: asked again, the policy answers from memory. One that could not be had is an
    Action with stop "error", and is asked for again.

    Args:
      settings: with an `endpoint`.
      encoder: the base model's tokenizer. It counts tokens, and keeps conversations under `settings.max_tokens`.
        Without one, tokens are estimated.
      client: asks the endpoint.
    """

    def __init__(self, settings: PolicyConfig, *, seed: int, encoder: Encoder | None, client: ChatClient):
        self._settings, self._endpoint, self._seed = settings, settings.endpoint, seed
        self._encoder, self._client = encoder, client
        self._memory: dict[DrawKey, Action] = {}

    @property
    def usage(self) -> dict[str, int]:
        """Tokens by the server's count (`encoded`, `cached`, `generated`); `requests`, `retries` and `failures`."""
        return asdict(self._client.counts)

    def propose(self, states: Sequence[State], n: int, temperature: float) -> list[list[Action]]:
        """n actions for each state; where there is no room for one, it stops at once, with no text.

        Raises UserError where the server cannot be used as it is configured, or is gone.
        """
        keys = draw_keys(states, n, temperature)
        pairs = zip(states, keys, strict=True)
        wanted = {key: state for state, row in pairs for key in row if key not in self._memory}
        drawn = {key: Action("", 0, None, "length") for key, state in wanted.items() if self._is_full(state)}
        jobs = [(key, state) for key, state in wanted.items() if key not in drawn]
        results = self._client.ask([self._body(key, state) for key, state in jobs])
        drawn |= {key: self._action(result) for (key, _), result in zip(jobs, results, strict=True)}
        self._memory |= {key: action for key, action in drawn.items() if action.stop != "error"}
        return [[drawn[key] if key in drawn else self._memory[key] for key in row] for row in keys]

    def count_tokens(self, messages: Sequence[dict]) -> int:
        """Length of a conversation in the base model's tokens, with the opening of the next turn, or an estimate."""
        if self._encoder is not None:
            return len(self._encoder.prompt(messages))
        sizes = [len(str(message.get("content") or "").encode()) for message in messages]
        return sum(_TOKENS_PER_MESSAGE - (-size // _BYTES_PER_TOKEN) for size in sizes)

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def _is_full(self, state: State) -> bool:
        # An estimate may be off by half: there the server says when it is too long.
        return self._encoder is not None and (
            self.count_tokens(state.messages) + self._settings.max_action_tokens > self._settings.max_tokens
        )

    def _body(self, key: DrawKey, state: State) -> dict[str, Any]:
        extra, seed = self._endpoint.extra_body, candidate_seed(self._seed, key.task, key.prefix, key.index)
        body: dict[str, Any] = {
            "model": self._endpoint.model,
            "messages": [
                {name: message[name] for name in _SENT if message.get(name) is not None} for message in state.messages
            ],
            "temperature": key.temperature,
            # What is recorded as drawn at a temperature is drawn from the whole distribution.
            "top_p": 1.0,
            # Some servers keep it in a signed word of 32 bits.
            "seed": seed[0] >> 1,
        }
        if "max_completion_tokens" not in extra:
            body["max_tokens"] = self._settings.max_action_tokens
        if self._endpoint.log_probabilities:
            body["logprobs"] = True
        return {name: value for name, value in (body | extra).items() if (name, value) != ("seed", None)}

    def _action(self, result: Completion | RequestFailed) -> Action:
        if isinstance(result, RequestFailed):
            return Action("", 0, None, "length") if result.too_long else Action("", 0, None, "error", result.reason)
        return Action(result.text, result.usage.generated, result.log_probability, result.stop)


def read_key(endpoint: EndpointConfig) -> str | None:
    """The key from the environment. Raises UserError where the variable is empty or holds what cannot be sent."""
    name = endpoint.api_key_env
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise UserError(f"policy.endpoint.api_key_env: {name} is not set; export it, or set the field to null for none")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"environment variable {name}: holds characters that no key has; set it anew")
    return key


def template_reader(encoder: Encoder | None) -> Callable[[str], str | None]:
    """Finds the first special token that a text spells: a tokenizer's own, or of the form that most have."""
    if encoder is not None:
        return encoder.special_in
    return lambda text: found[0] if (found := re.search(r"<\|\w+\|>", text)) else None


def load(settings: PolicyConfig, *, seed: int, encoder: Encoder | None) -> OpenAIPolicy:
    """The policy that an endpoint serves."""
    client = ChatClient(settings.endpoint, read_key(settings.endpoint), template_in=template_reader(encoder))
    return OpenAIPolicy(settings, seed=seed, encoder=encoder, client=client)

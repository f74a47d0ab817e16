"""A user's own policy, with everything that it returns checked where it enters jaxprm."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from data_pipeline.errors import shown
from jaxprm.errors import UserError
from jaxprm.policies.protocol import Action, State

_STOPS = ("end", "length", "error")
_ACTION = "jaxprm.policies.protocol.Action(text, tokens)"


class CheckedPolicy:
    """A policy that raises UserError, with class, method and value, where the user's policy returns another type.

    Other attributes are those of the user's policy. Whole numbers of other libraries, such as NumPy's, become Python's.

    Raises UserError if its `usage` is not a dictionary of whole numbers.
    """

    def __init__(self, policy: Any, path: str):
        self._policy, self._path = policy, path
        # Before the run: a wrong `usage` would otherwise end it when its results are there.
        _ = self.usage

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    @property
    def usage(self) -> dict[str, int]:
        usage = getattr(self._policy, "usage", {})
        if not isinstance(usage, Mapping):
            self._refuse("usage", usage, 'must be a dictionary of counts, such as {"encoded": 0, "generated": 0}')
        for name, count in usage.items():
            if not isinstance(name, str) or _whole(count) is None:
                self._refuse(f"usage[{shown(name)}]", count, "must be a whole number, 0 or more, under a text")
        return {name: operator.index(count) for name, count in usage.items()}

    def propose(self, states: Sequence[State], n: int, temperature: float) -> list[list[Action]]:
        proposals = self._policy.propose(states, n, temperature)
        if not _is_list(proposals) or len(proposals) != len(states):
            self._refuse("propose", proposals, f"must return a list with {len(states)} lists, one for each state")
        for index, actions in enumerate(proposals):
            if not _is_list(actions) or len(actions) != n:
                self._refuse("propose", actions, f"must return {n} actions for each state, and state {index} has this")
        return [[self._action(action) for action in actions] for actions in proposals]

    def count_tokens(self, messages: Sequence[dict[str, Any]]) -> int:
        tokens = self._policy.count_tokens(messages)
        if (count := _whole(tokens)) is None:
            self._refuse("count_tokens", tokens, "must return a whole number, 0 or more")
        return count

    def _action(self, action: Any) -> Action:
        if not isinstance(action, Action):
            self._refuse("propose", action, f"must return actions, each a {_ACTION}")
        if not isinstance(action.text, str) or not _is_unicode(action.text):
            self._refuse("propose", action.text, "must return actions whose text is a str without half surrogates")
        if (tokens := _whole(action.tokens)) is None:
            self._refuse("propose", action.tokens, "must return actions whose tokens are a whole number, 0 or more")
        if action.stop not in _STOPS:
            self._refuse("propose", action.stop, f"must return actions whose stop is one of {', '.join(_STOPS)}")
        if action.error is not None and not isinstance(action.error, str):
            self._refuse("propose", action.error, "must return actions whose error is a str or None")
        if action.reasoning is not None and not (isinstance(action.reasoning, str) and _is_unicode(action.reasoning)):
            self._refuse("propose", action.reasoning, "must return actions whose reasoning is a str or None")
        try:
            log_probability = None if action.log_probability is None else float(action.log_probability)
        except (TypeError, ValueError):
            self._refuse("propose", action.log_probability, "must return log_probability as a number or None")
        return action._replace(tokens=tokens, log_probability=log_probability)

    def _refuse(self, member: str, value: object, expected: str) -> NoReturn:
        kind = type(self._policy).__name__
        raise UserError(
            f"policy {self._path!r}: {kind}.{member} gave {shown(value)} ({type(value).__name__}); it {expected}"
        )


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, Action))


def _whole(value: Any) -> int | None:
    """The value as an int, or None if it is no whole number of at least 0."""
    try:
        count = operator.index(value)
    except TypeError:
        return None
    return None if isinstance(value, bool) or count < 0 else count


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

"""A function's results, remembered within a bound on their memory: for work that goes on for days."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Any


class Remembered:
    """`function`, which depends on its arguments alone, computed once for those that were used last.

    size: bytes that a result takes with its arguments, of (arguments, result); most: what all of them may take. A
    result of more than an eighth of that is not kept: it would drop what the others need. Nor is what is raised.
    """

    def __init__(self, function: Callable[..., Any], *, size: Callable[[tuple, Any], int], most: int):
        self._function, self._size, self._most = function, size, most
        self._results: OrderedDict[tuple[Hashable, ...], tuple[Any, int]] = OrderedDict()
        self._lock = Lock()
        self.bytes = 0

    def __call__(self, *arguments: Hashable) -> Any:
        with self._lock:
            found = self._results.get(arguments)
            if found is not None:
                self._results.move_to_end(arguments)
                return found[0]
        result = self._function(*arguments)
        size = self._size(arguments, result)
        if size <= self._most // 8:
            with self._lock:
                self._keep(arguments, result, size)
        return result

    def _keep(self, arguments: tuple, result: Any, size: int) -> None:
        _, former = self._results.pop(arguments, (None, 0))  # another thread may have been faster
        self._results[arguments] = (result, size)
        self.bytes += size - former
        while self.bytes > self._most:
            _, (_, dropped) = self._results.popitem(last=False)
            self.bytes -= dropped

"""Results of a function, kept within a bound on their memory: for processes that run for days."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from threading import Lock
from typing import Any

from cachetools import LRUCache, cached


class ByteLRU:
    """A pure function that computes each result once while it stays among the most recently used ones. Thread-safe.

    A result of more than an eighth of `max_bytes` is not kept, because it would evict many that are used more often.
    Nor is an exception.

    Args:
      function: takes hashable positional arguments.
      size: bytes that a result takes together with its arguments, as a function of (arguments, result).
      max_bytes: bound on the sum of these sizes.
    """

    def __init__(self, function: Callable[..., Any], *, size: Callable[[tuple, Any], int], max_bytes: int):
        def with_size(*arguments: Any) -> tuple[Any, int]:
            result = function(*arguments)
            bytes = size(arguments, result)
            # LRUCache does not store what is larger than itself.
            return result, bytes if bytes <= max_bytes // 8 else max_bytes + 1

        # Sizes are stored with the results: getsizeof gets only the value, and the size depends on the arguments too.
        self._cache = LRUCache(max_bytes, getsizeof=itemgetter(1))
        # The lock is held for look-ups, not while the function runs: two threads may compute the same result.
        self._lock = Lock()
        self._compute = cached(self._cache, key=lambda *arguments: arguments, lock=self._lock)(with_size)

    def __call__(self, *arguments: Any) -> Any:
        return self._compute(*arguments)[0]

    def clear(self) -> None:
        """Drops all results."""
        with self._lock:
            self._cache.clear()

    @property
    def bytes(self) -> int:
        """Sum of the sizes of the results that are kept."""
        return self._cache.currsize

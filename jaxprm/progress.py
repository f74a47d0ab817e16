"""One progress bar for all long work: rate and time left, quiet when the output is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(label: str, total: int | None, *, initial: int = 0, unit: str = "it", **settings) -> Iterator:
    """A tqdm bar on stderr. Not on a terminal it writes a line every 20 seconds instead of redrawing."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    with tqdm(
        total=total,
        initial=initial,
        desc=f"{label:<28}",
        unit=unit,
        dynamic_ncols=terminal,
        mininterval=0.2 if terminal else 20,
        maxinterval=1 if terminal else 60,
        smoothing=0.1,
        file=sys.stderr,
        **settings,
    ) as progress:
        yield progress


@contextmanager
def absolute(label: str, *, unit: str = "it", **settings) -> Iterator[Callable[[int, int], None]]:
    """A bar as a function of (done, in all), for work that knows its total only once it has begun."""
    with bar(label, None, unit=unit, **settings) as progress:

        def show(done: int, total: int) -> None:
            progress.total = total
            progress.update(done - progress.n)

        yield show


def track(items: Iterable, label: str, total: int | None = None, unit: str = "it") -> Iterator:
    """Yields the items, showing how many have passed."""
    with bar(label, total, unit=unit) as progress:
        for item in items:
            yield item
            progress.update()

"""Progress bars of all long work, with rate and time left; quiet if stderr is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(label: str, total: int | None, *, initial: int = 0, unit: str = "it", **settings) -> Iterator:
    """A tqdm bar on stderr. If that is not a terminal, a line every 20 seconds instead of a redrawn one."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    with tqdm(
        total=total,
        initial=initial,
        desc=f"{label:<28}",
        unit=unit,
        dynamic_ncols=terminal,
        mininterval=0.2 if terminal else 20,
        # Above mininterval, because tqdm's monitor redraws a bar that was quiet for longer than this.
        maxinterval=1 if terminal else 60,
        smoothing=0.1,
        file=sys.stderr,
        **settings,
    ) as progress:
        yield progress


@contextmanager
def absolute(label: str, *, unit: str = "it", **settings) -> Iterator[Callable[[int, int], None]]:
    """A bar as a function of (done, total), for work that learns its total only after it has started."""
    with bar(label, None, unit=unit, **settings) as progress:

        def show(done: int, total: int) -> None:
            progress.total = total
            progress.update(done - progress.n)

        yield show


def track(items: Iterable, label: str, total: int | None = None, unit: str = "it") -> Iterator:
    """Yields the items and shows how many were yielded."""
    with bar(label, total, unit=unit) as progress:
        for item in items:
            yield item
            progress.update()

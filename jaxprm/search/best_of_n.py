"""How the promises of a trajectory's steps become the score that best-of-N chooses by."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

# Final is the paper's. Negative promises are no probabilities: in a product they count as 0.
AGGREGATIONS: dict[str, Callable[[Sequence[float]], float]] = {
    "final": lambda promises: promises[-1],
    "mean": lambda promises: math.fsum(promises) / len(promises),
    "min": min,
    "max": max,
    "product": lambda promises: math.prod(max(0.0, promise) for promise in promises),
    "sum": math.fsum,
}

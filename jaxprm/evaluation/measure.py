"""A number that can be computed anew for every resample of the tasks: what estimates and paired differences share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from jaxprm.evaluation.statistics import LEVEL, SAMPLES, Estimate, TaskStatistic, bootstrap_statistic


class Measure(NamedTuple):
    statistic: TaskStatistic
    n: int  # tasks with a part in it


@dataclass(frozen=True)
class Resampling:
    """How intervals are made: by the bootstrap over tasks."""

    samples: int = SAMPLES
    seed: int = 0
    level: float = LEVEL

    def estimate(self, measure: Measure, tasks: int) -> Estimate:
        return bootstrap_statistic(
            [measure.statistic], tasks, n=measure.n, samples=self.samples, seed=self.seed, level=self.level
        )

    def estimates(self, measures: Mapping[str, Measure], tasks: int) -> dict[str, Estimate]:
        return {name: self.estimate(measure, tasks) for name, measure in measures.items()}

    def difference(self, a: Measure, b: Measure, tasks: int) -> Estimate:
        """a - b on the same resamples."""
        return self.estimate(Measure(lambda counts: a.statistic(counts) - b.statistic(counts), min(a.n, b.n)), tasks)

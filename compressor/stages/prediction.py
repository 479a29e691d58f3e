"""From the sum of swap-in scores to the KL of the whole mixture.

Scores add up only while errors are small: at 2 bits the errors of many units meet and the sum is
too low; from 3 bits on the quantizer corrects in later layers what earlier ones did (W*), and the
sum is too high. So the sum is multiplied by the ratio measured on whole models that were
materialised anyway, uniform ones first:

    KL(a) = S(a) * r(S(a)),     log r interpolated linearly in log S between the measured models,
                                constant beyond them
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, field

TINY = 1e-12


@dataclass(slots=True)
class Curve:
    """The correction; without measured models it is none."""

    measured: dict[float, float] = field(default_factory=dict)  # sum of scores -> measured KL

    def add(self, additive: float, measured: float) -> None:
        """Learn from a measured model."""
        if additive > TINY and measured > TINY:
            self.measured[additive] = measured

    def __call__(self, additive: float) -> float:
        """The KL to expect of a mixture with this sum of scores."""
        if not self.measured or additive <= TINY:
            return additive
        sums = sorted(self.measured)
        ratios = [math.log(self.measured[s] / s) for s in sums]
        place = bisect_left(sums, additive)
        if place in (0, len(sums)):
            return additive * math.exp(ratios[min(place, len(sums) - 1)])
        low, high = math.log(sums[place - 1]), math.log(sums[place])
        share = (math.log(additive) - low) / (high - low)
        return additive * math.exp((1 - share) * ratios[place - 1] + share * ratios[place])

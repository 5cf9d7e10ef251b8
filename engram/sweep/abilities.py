"""Whether a lower loss comes with more ability: what probes score at the rho of least loss, against both ends.

Others found optima of a sparsity budget whose lower loss brought no better scores (arXiv:2601.21204).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from engram.sweep.fit import Curve, Interval, between
from engram.sweep.plan import MAIN_VARIANT
from engram.sweep.results import MEASURES, Measured, Row, curve_of, probe_tasks


@dataclass(frozen=True)
class Score:
    """A loss or a score of a probe over rho after the last token, and whether more of it is better.

    `name` is for people; `task` is the probe's, empty for a loss.
    """

    name: str
    metric: str
    task: str
    higher_is_better: bool
    curve: Curve

    @property
    def arrow(self) -> str:
        """Which way is better."""
        return "↑" if self.higher_is_better else "↓"

    def against(self, at: int, end: int) -> Interval:
        """The score at the rho of index `at`, between the ends, less that at an end (0 or -1).

        The interval holds for all rhos between the ends at once. So it does for the one that the loss chose, although
        the noise of a run's loss is not independent of that of its probes.
        """
        return between(self.curve, at, end, comparisons=len(self.curve.rho) - 2)

    def said(self, difference: Interval) -> str:
        """What a difference means."""
        if not (difference.low > 0 or difference.high < 0):
            return "not resolved"
        return "better" if (difference.value > 0) == self.higher_is_better else "worse"


def scores(rows: Sequence[Row]) -> list[Score]:
    """The losses of `MEASURES`, then of each probe the share of right answers and the nats an answer.

    Empty where nothing was probed.
    """
    tasks = probe_tasks(rows)
    wanted = [(f"loss on {name}, nats", metric, "", False) for metric, name in MEASURES.items()] if tasks else []
    for task in tasks:
        wanted.append((f"{task}: share of right answers", f"probe_{task}", task, True))
        wanted.append((f"{task}: nats an answer", f"probe_nats_{task}", task, False))
    last = [row for row in rows if row.final]
    taken = [w for w in wanted if not any(math.isnan(row.value(w[1])) for row in last if row.variant == MAIN_VARIANT)]
    return [Score(*about, curve_of(last, last[0].tokens, about[1])) for about in taken]


def least_losses(measured: Sequence[Measured]) -> dict[int, list[Measured]]:
    """Where between the ends each measure has its least mean, as indices of rho, and which measures have it there."""
    found: dict[int, list[Measured]] = {}
    for m in measured:
        found.setdefault(1 + int(m.curve.means[1:-1].argmin()), []).append(m)
    return found

"""What a row of the benchmark measures, always as cost: ours over a peer's, so that less is better."""

from __future__ import annotations

from dataclasses import dataclass, field

from adaptive_llava.training.paired_timing import Pairs, Ratio


@dataclass(frozen=True)
class Measurement:
    """What a row measured.

    Attributes:
        what: One line for the table.
        pairs: One `(ours, peer)` per pair.
        unit: Unit of the pairs: `"s"`, `"MB"`, `"bytes"`, or what was counted.
        limit: The ratio that arithmetic or physics allows, printed beside the measured one; `None` where there is
            none.
        bar: Largest acceptable ratio; `None` where a row only reports.
        interval_bar: Largest acceptable upper end of the interval.
        exact: Whether both sides of every pair must be equal.
        notes: Further numbers for the JSON.
    """

    what: str
    pairs: Pairs
    unit: str
    limit: float | None = None
    bar: float | None = None
    interval_bar: float | None = None
    exact: bool = False
    notes: dict = field(default_factory=dict)

    def met(self, ratio: Ratio) -> bool | None:
        """Whether the bar is met; `None` without one."""
        if self.exact:
            return all(ours == peer for ours, peer in self.pairs)
        if self.bar is None:
            return None
        return ratio.ratio <= self.bar and (self.interval_bar is None or ratio.high <= self.interval_bar)

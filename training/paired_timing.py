"""Two ways to do one thing, timed in interleaved pairs, and the ratio of their medians with its interval.

A machine drifts: clocks, caches and neighbours change from minute to minute. Timed as A B A B, both sides meet the
same machine, and resampling whole pairs keeps what they share.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch


Pairs = list[tuple[float, float]]


@dataclass(frozen=True)
class Ratio:
    """Median of the first side over the median of the second.

    Attributes:
        ratio: Ratio of the medians.
        low: Lower end of its 95 % interval.
        high: Upper end.
        median: Median of the first side, in the unit of the pairs.
        peer_median: Median of the second side.
    """

    ratio: float
    low: float
    high: float
    median: float
    peer_median: float


def ratio_of_medians(pairs: Sequence[tuple[float, float]], *, resamples: int = 10_000, seed: int = 0) -> Ratio:
    """Ratio of medians with a 95 % percentile interval from resampling whole pairs.

    Args:
        pairs: One `(ours, peer)` per pair, at least one.
        resamples: Bootstrap samples.
        seed: Seed of the resampling, so that the same pairs give the same interval.
    """
    values = np.asarray(pairs, dtype=float)
    if values.ndim != 2 or values.shape[0] < 1 or values.shape[1] != 2:
        raise ValueError(f"`pairs` has shape {values.shape}; pass at least one (ours, peer).")
    median, peer_median = np.median(values, axis=0)
    index = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    medians = np.median(values[index], axis=1)  # (resamples, pairs, 2) -> (resamples, 2)
    low, high = np.quantile(medians[:, 0] / medians[:, 1], [0.025, 0.975])
    return Ratio(float(median / peer_median), float(low), float(high), float(median), float(peer_median))


def timed_pairs(
    ours: Callable[[], object],
    peer: Callable[[], object],
    *,
    pairs: int,
    warm_up: int = 2,
    seconds: float = float("inf"),
    device: str = "cpu",
    progress: Callable[[int], None] = lambda done: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Pairs:
    """Seconds of both sides, run in turn: ours, peer, ours, peer.

    Args:
        ours: First side; called without gradients. A float it returns is taken as its time, for sides that time a
            part of what they do.
        peer: Second side, likewise.
        pairs: Number of pairs.
        warm_up: Untimed pairs before.
        seconds: Begin no further pair after so many, but measure two.
        device: Where the work runs; a GPU is waited for before the clock is read.
        progress: Called with the number of pairs done.
        clock: Gives seconds. `time.process_time` counts only what this process computes on the CPU, whatever else
            the machine does; on a GPU it means nothing.
    """
    times: Pairs = []
    started = time.perf_counter()
    with torch.no_grad():
        for done in range(-warm_up, pairs):
            if len(times) >= 2 and time.perf_counter() - started > seconds:
                break
            pair = (_seconds(ours, device, clock), _seconds(peer, device, clock))
            if done >= 0:
                times.append(pair)
            progress(max(done + 1, 0))
    return times


def wait_for(device: str) -> None:
    """Return once everything asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()


def _seconds(side: Callable[[], object], device: str, clock: Callable[[], float]) -> float:
    wait_for(device)
    start = clock()
    result = side()
    wait_for(device)
    return result if isinstance(result, float) else clock() - start

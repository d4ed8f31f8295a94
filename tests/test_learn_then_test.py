"""The bound on a loss of score holds, is no looser than need be, and is refused where nothing can be said."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from adaptive_llava.training.learn_then_test import (
    check_goal,
    images_needed,
    learn_then_test,
    p_value,
    size_of_tested,
    upper_bound,
)


DRAWS = 500
ALLOWED = 0.05 + 2 * math.sqrt(0.05 * 0.95 / DRAWS)  # 5 % and two standard errors

# losses, gains: as shares of all images, at settings from the most tokens to the fewest
GROWING = ((0.002, 0.001), (0.008, 0.004), (0.015, 0.0049), (0.03, 0.015), (0.1, 0.05))  # the third is just too much
ON_THE_EDGE = ((0.01, 0.0),) * 5
NOISY_EDGE = ((0.06, 0.05),) * 5
FALLING = ((0.02, 0.0099), (0.0, 0.0), (0.0, 0.0))  # only the first is too much


def drops_of(shares, number: int, rng: np.random.Generator) -> np.ndarray:
    """Drops of -1, 0 and 1; an image that loses at one setting is likely to lose at the next."""
    luck = rng.random((number, 1))
    return np.concatenate([(luck < loss) * 1.0 - (luck > 1 - gain) for loss, gain in shares], axis=1)


@pytest.mark.parametrize("shares", [GROWING, ON_THE_EDGE, NOISY_EDGE, FALLING])
@pytest.mark.parametrize("number", [600, 2000])
def test_over_500_draws_the_bound_is_violated_in_at_most_5_percent(shares, number):
    rng, violated = np.random.default_rng(number), 0
    for _ in range(DRAWS):
        drops = drops_of(shares, number, rng)
        verdict = learn_then_test(drops[: number // 5], drops[number // 5 :], max_drop=0.01, confidence=0.95)
        if verdict.setting is not None:
            loss, gain = shares[verdict.setting]
            # a drop of just the figure counts as too much: the hypothesis that is tested includes it
            violated += loss - gain >= 0.01 - 1e-12 or loss - gain > verdict.bound
    assert violated / DRAWS <= ALLOWED


def test_in_between_values_are_bounded_too():
    """Scores such as ANLS: a mean drop of just the figure, made of many small ones."""
    rng, rejected = np.random.default_rng(0), 0
    for _ in range(DRAWS):
        drops = np.clip(rng.normal(0.0, 0.15, size=(500, 1)), -0.5, 0.5) + 0.01
        rejected += learn_then_test(drops[:100], drops[100:], max_drop=0.01, confidence=0.95).setting is not None
    assert rejected / DRAWS <= ALLOWED


def test_a_bound_on_one_setting_holds_over_500_draws():
    rng, violated = np.random.default_rng(0), 0
    for _ in range(DRAWS):
        drops = drops_of([(0.05, 0.03)], 400, rng)[:, 0]
        violated += upper_bound(drops[:80], drops[80:], max_drop=0.01, confidence=0.95) < 0.02
    assert violated / DRAWS <= ALLOWED


def test_p_is_at_most_u_in_at_most_u_of_all_cases_exactly():
    """Every possible outcome of six images with a mean drop of just the figure, in exact fractions."""
    pilot, limit = np.array([0.0, 0.0, 1.0, -1.0]), Fraction(1, 4)
    chances = {1: Fraction(3, 8), 0: Fraction(1, 2), -1: Fraction(1, 8)}
    assert sum(value * chance for value, chance in chances.items()) == limit
    outcomes = []
    for ones in range(7):
        for zeros in range(7 - ones):
            rest = 6 - ones - zeros
            ways = math.comb(6, ones) * math.comb(6 - ones, zeros)
            chance = ways * chances[1] ** ones * chances[0] ** zeros * chances[-1] ** rest
            drops = np.repeat([1.0, 0.0, -1.0], [ones, zeros, rest])
            outcomes.append((p_value(pilot, drops, float(limit)), chance))
    assert sum(chance for _, chance in outcomes) == 1
    assert min(p for p, _ in outcomes) < 0.1  # so that there is something to check
    for p, _ in outcomes:
        assert sum(chance for other, chance in outcomes if other <= p) <= p + 1e-12 or p == 1


def test_losing_less_or_allowing_more_never_raises_p():
    rng = np.random.default_rng(0)
    pilot, drops = drops_of([(0.03, 0.03)], 100, rng)[:, 0], drops_of([(0.03, 0.03)], 500, rng)[:, 0]
    ps = [p_value(pilot, drops, limit, stakes_for=0.01) for limit in np.linspace(-0.5, 0.9, 50)]
    assert all(first >= second for first, second in pairwise(ps)) and ps[0] == 1 and ps[-1] < 1e-6
    better = np.where(drops == 1, 0, drops)
    assert p_value(pilot, better, 0.01) < p_value(pilot, drops, 0.01)
    assert p_value(pilot, drops[::-1], 0.01) == p_value(pilot, drops, 0.01)


def test_the_bound_and_the_test_agree():
    rng = np.random.default_rng(3)
    for shares in [(0.0, 0.0), (0.002, 0.0), (0.01, 0.01), (0.05, 0.0)]:
        drops = drops_of([shares], 1000, rng)[:, 0]
        bound = upper_bound(drops[:200], drops[200:], max_drop=0.01, confidence=0.95)
        assert (bound <= 0.01) == (p_value(drops[:200], drops[200:], 0.01) <= 0.05)
        assert bound > drops[200:].mean()


def test_without_losses_it_needs_little_more_than_the_least_that_any_test_needs():
    least = math.ceil(math.log(0.05) / math.log(0.99))  # 299: an image in 100 may lose all, and none did
    needed = images_needed(0.01, 0.95, tested_share=0.8, at_least=10)
    assert least < size_of_tested(needed, 0.8) < 1.4 * least


@pytest.mark.parametrize(("max_drop", "confidence"), [(0.01, 0.95), (0.03, 0.9), (0.2, 0.99)])
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_the_needed_number_is_exact(max_drop, confidence, share):
    needed = images_needed(max_drop, confidence, tested_share=share, at_least=4)

    def setting(number: int):
        tested = size_of_tested(number, share)
        nothing = np.zeros((number - tested, 1)), np.zeros((tested, 1))
        return learn_then_test(*nothing, max_drop=max_drop, confidence=confidence).setting

    assert setting(needed) == 0 and setting(needed - 1) is None


def test_no_fewer_are_asked_for_than_make_sense():
    assert images_needed(0.9, 0.5, tested_share=0.8, at_least=37) == 37


def test_gains_make_up_for_losses():
    """3 % lose and 3 % win: a bound on the losses alone could never pass at 1 %."""
    drops = np.zeros((20000, 1))
    drops[::33], drops[1::33] = 1, -1
    verdict = learn_then_test(drops[:4000], drops[4000:], max_drop=0.01, confidence=0.95)
    assert verdict.setting == 0 and verdict.drop == pytest.approx(0, abs=1e-3)


def test_the_sequence_stops_at_the_first_setting_that_may_drop_more():
    rng = np.random.default_rng(0)
    shares = ((0.0, 0.0), (0.0005, 0.0), (0.2, 0.0), (0.0, 0.0))
    drops = drops_of(shares, 3000, rng)
    verdict = learn_then_test(drops[:600], drops[600:], max_drop=0.01, confidence=0.95)
    assert (verdict.setting, verdict.tested, verdict.num_images) == (1, 3, 2400)
    assert verdict.bound == 0.01  # what the choice allows to be said, though the setting alone has a lower one
    assert upper_bound(drops[:600, 1], drops[600:, 1], max_drop=0.01, confidence=0.95) < 0.01


def test_if_all_pass_the_bound_is_the_largest_of_all():
    drops = drops_of(((0.0, 0.0), (0.001, 0.0), (0.0, 0.001)), 4000, np.random.default_rng(0))
    verdict = learn_then_test(drops[:800], drops[800:], max_drop=0.02, confidence=0.95)
    each = [upper_bound(drops[:800, j], drops[800:, j], max_drop=0.02, confidence=0.95) for j in range(3)]
    assert verdict.setting == 2 and verdict.tested == 3
    assert verdict.bound == max(each) < 0.02


def test_if_none_passes_the_first_ones_bound_is_told():
    drops = drops_of(((0.05, 0.0), (0.0, 0.0)), 1000, np.random.default_rng(0))
    verdict = learn_then_test(drops[:200], drops[200:], max_drop=0.01, confidence=0.95)
    assert verdict.setting is None and verdict.tested == 1
    assert 0.05 < verdict.bound < 0.08
    again = learn_then_test(drops[:200], drops[200:], max_drop=verdict.bound + 0.01, confidence=0.95)
    assert again.setting is not None


@pytest.mark.parametrize(
    ("max_drop", "confidence", "message"),
    [
        (0, 0.95, "`max_drop=0` must lie between 0 and 1.*cannot be shown"),
        (1, 0.95, "`max_drop=1` must lie"),
        (float("nan"), 0.95, "`max_drop=nan`"),
        (0.01, 95, "`confidence=95` must be at least 0.5 and below 1, such as 0.95"),
        (0.01, 1, "`confidence=1`"),
        (0.01, 0.05, "`confidence=0.05`"),
    ],
)
def test_goals_that_cannot_be_shown_are_refused(max_drop, confidence, message):
    with pytest.raises(ValueError, match=message):
        check_goal(max_drop, confidence)


@pytest.mark.parametrize("bad", [np.zeros(5), np.zeros((0, 2)), np.full((5, 1), 1.5), np.full((5, 1), np.nan)])
def test_drops_that_are_none_are_refused(bad):
    with pytest.raises(ValueError, match="must hold differences of scores from -1 to 1"):
        learn_then_test(np.zeros((5, 1)), bad, max_drop=0.01, confidence=0.95)

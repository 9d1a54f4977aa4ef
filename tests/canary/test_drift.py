from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from anamorph.canary import Drift, median_test

Noise = Callable[[np.random.Generator, int], np.ndarray]


def steady(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.lognormal(0, 0.05, n)


def heavy_tails(rng: np.random.Generator, n: int) -> np.ndarray:
    """As a machine that many share: most pairs are near 1, some are off by half or more."""
    return np.exp(0.03 * rng.standard_t(2, n))


def noisy_hours(rng: np.random.Generator, n: int) -> np.ndarray:
    """Quiet and noisy stretches of 30 pairs: the spread changes tenfold, the middle does not."""
    spread = np.repeat(rng.choice([0.02, 0.2], size=-(-n // 30)), 30)[:n]
    return np.exp(spread * rng.standard_normal(n))


NOISES = pytest.mark.parametrize("noise", [steady, heavy_tails, noisy_hours])


def alarms(drift: Drift, ratios: np.ndarray) -> int:
    """Batches after which the alarm was on."""
    found = 0
    for number, ratio in enumerate(ratios, start=1):
        drift.add(float(ratio))
        found += drift.drifting and number % drift.batch == 0
    return found


def test_p_value_is_exact() -> None:
    """Three above and three below by chance alone: 2 of the 20 ways to choose are as uneven."""
    assert median_test([4, 5, 6], [1, 2, 3]) == pytest.approx(2 / 20)
    assert median_test([1, 4], [2, 3]) == pytest.approx(1)


@NOISES
def test_false_alarms_are_as_rare_as_stated(noise: Noise) -> None:
    """Without drift, at most the stated share of batches raises an alarm, whatever the noise is.

    Bounds from the binomial distribution: 400 batches at 5 % exceed 34 with a probability of 0.1 %.
    """
    rng, found = np.random.default_rng(17), 0
    for _ in range(400):
        drift, ratios = Drift(alpha=0.05, least=0, history=300), noise(rng, 330)
        drift._history.extend(ratios[:300].tolist())
        found += alarms(drift, ratios[300:])
    assert found <= 34


@NOISES
def test_months_without_an_alarm(noise: Noise) -> None:
    """With the defaults, a hundred days of pairs every two minutes bring three false alarms at most."""
    rng = np.random.default_rng(5)
    assert alarms(Drift(), noise(rng, 2400 * 30)) <= 3


@pytest.mark.parametrize("change", [1.08, 0.92])
@NOISES
def test_a_change_is_noticed(noise: Noise, change: float) -> None:
    """Eight per cent more or less raise the alarm within four batches, eight times of ten."""
    rng, noticed = np.random.default_rng(23), 0
    for _ in range(50):
        drift = Drift()
        assert alarms(drift, noise(rng, 300)) == 0
        noticed += alarms(drift, change * noise(rng, 120)) > 0
    assert noticed >= 40


def test_a_change_too_small_to_matter() -> None:
    """One per cent raises no alarm, however certain it is."""
    drift = Drift()
    assert alarms(drift, np.linspace(0.9999, 1.0001, 300)) == 0
    assert alarms(drift, 1.01 * np.linspace(0.9999, 1.0001, 300)) == 0


def test_the_alarm_ends_with_its_cause() -> None:
    """Back at the old ratio the next batch ends it: what was under suspicion did not move the history."""
    rng, drift = np.random.default_rng(3), Drift()
    alarms(drift, steady(rng, 300))
    assert alarms(drift, 1.2 * steady(rng, 300)) == 10
    assert alarms(drift, steady(rng, 30)) == 0


def test_what_lasts_becomes_the_rule() -> None:
    """After a day at the new ratio the alarm has been heard, and that ratio is the history."""
    rng, drift = np.random.default_rng(4), Drift()
    alarms(drift, steady(rng, 300))
    alarms(drift, 1.2 * steady(rng, 24 * 30))
    assert not drift.drifting
    assert alarms(drift, 1.2 * steady(rng, 90)) == 0
    assert alarms(drift, steady(rng, 90)) > 0


def test_silent_until_there_is_a_history() -> None:
    """The first batch has nothing to be compared with."""
    drift = Drift()
    assert alarms(drift, np.full(30, 5.0)) == 0

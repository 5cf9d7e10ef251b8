"""Losses at equal seconds, of simulated runs whose speeds and losses at any time are known in closed form."""

import math
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from simulated_runs import run_of
from small_sweep import plan_at

from engram.sweep.results import Row
from engram.sweep.sections import wall_clock_section
from engram.sweep.wall_clock import Speeds, Trajectories, levelling_fall, timed_measures, trajectories

RHO = np.array([0.0, 0.25, 0.5, 1.0])
SPEED = np.array([80.0, 90.0, 95.0, 100.0])
TOKENS = np.array([1000, 2000, 3000, 4000])
OFFSET, FALL = np.array([5.0, 4.8, 4.9, 5.1]), np.array([0.3, 0.25, 0.2, 0.4])


def straight(rho: int, tokens: float, seed: int = 0) -> float:
    """A loss that is straight in the logarithm of tokens, with an effect of the seed."""
    return float(OFFSET[rho] - FALL[rho] * math.log(tokens) + 0.05 * seed)


def rows_of(
    speed: np.ndarray,
    loss: Callable[[int, float, int], float] = straight,
    tokens: Iterable[int] = TOKENS,
    **changes: object,
) -> list[Row]:
    """All runs, at `speed` [R, S]."""
    rows = []
    for (i, rho), seed in product(enumerate(RHO), range(speed.shape[1])):
        losses = {int(t): loss(i, int(t), seed) for t in tokens}
        rows += run_of(float(rho), seed, losses, float(speed[i, seed]), **changes)
    return rows


def test_losses_at_a_time_are_those_of_the_closed_form() -> None:
    runs = trajectories(rows_of(SPEED[:, None] * np.ones(3)), "nats")
    assert runs.common == pytest.approx(40)  # 4000 tokens at 100 a second
    for seconds in (13.0, 25.0, runs.common):
        found = runs.at(seconds)
        expected = [[straight(i, seconds * SPEED[i], seed) for seed in range(3)] for i in range(4)]
        np.testing.assert_allclose(found.curve.losses, expected, rtol=1e-12)
        np.testing.assert_allclose(found.slopes, -FALL)
        np.testing.assert_allclose(found.done, seconds * SPEED / 4000)
    np.testing.assert_allclose(runs.at_the_end.losses[3], runs.at(runs.common).curve.losses[3])  # the fastest is done


def test_a_power_law_is_met_between_validations() -> None:
    """Its logarithm of time is not straight: five validations leave an error far below what is compared."""

    def power(rho: int, tokens: float, seed: int = 0) -> float:
        return float(2 + OFFSET[rho] * tokens**-0.3)

    runs = trajectories(rows_of(SPEED[:, None] * np.ones(2), power, range(800, 4001, 800)), "nats")
    expected = [power(i, runs.common * SPEED[i]) for i in range(4)]
    np.testing.assert_allclose(runs.at(runs.common).curve.means, expected, atol=1e-3)
    assert np.abs(runs.at_the_end.means - expected)[:3].min() > 5e-3  # equal tokens are another comparison


def test_typical_speeds_leave_out_what_slows_a_seed_and_what_disturbs_a_run() -> None:
    measured = SPEED[:, None] * np.array([1.0, 0.6, 1.1])
    measured[1, 2] *= 0.3
    speeds = Speeds(RHO, measured)
    np.testing.assert_allclose(speeds.typical, SPEED)
    assert speeds.ratio(0, 3).value == pytest.approx(0.8)


def test_intervals_of_speeds_hold_them_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    held, width = 0, []
    for _ in range(400):
        noise = generator.normal(0, 0.05, (4, 3)) + generator.normal(0, 0.3, 3)
        ratio = Speeds(RHO, SPEED[:, None] * np.exp(noise)).ratio(0, 3)
        held += ratio.low <= 0.8 <= ratio.high
        width.append(ratio.high - ratio.low)
    assert held / 400 > 0.95
    assert np.mean(width) < 0.4  # and say something


@pytest.mark.parametrize(("losses", "speeds"), [(0.02, 0.0), (0.0, 0.05), (0.02, 0.05)])
def test_intervals_at_equal_seconds_hold_the_noise_of_losses_and_of_speeds(losses: float, speeds: float) -> None:
    generator = np.random.default_rng(1)
    held, width = 0, []
    for _ in range(400):
        measured = SPEED[:, None] * np.exp(generator.normal(0, speeds, (4, 3)) + generator.normal(0, 0.2, 3))
        noise = generator.normal(0, losses, (4, 3, 1)) + generator.normal(0, 0.3, (3, 1))
        exact = np.array([[[straight(i, t, s) for t in TOKENS] for s in range(3)] for i in range(4)])
        found = Trajectories(Speeds(RHO, measured), TOKENS.astype(float), exact + noise)
        at = found.at(found.common)
        # Slopes differ, so the true difference depends on the time a little; it is that of the true speeds.
        scale = np.exp(np.log(found.speeds.typical / SPEED).mean())
        truth = straight(0, at.seconds * SPEED[0] * scale) - straight(3, at.seconds * SPEED[3] * scale)
        difference = at.against(0, 3)
        held += difference.low <= truth <= difference.high
        width.append(difference.high - difference.low)
    assert held / 400 > 0.95
    assert np.mean(width) < 0.25


def test_the_levelling_fall_makes_two_runs_equal_at_equal_seconds() -> None:
    fall = levelling_fall(-0.06, 0.8)
    assert fall > 0
    slow, fast = (lambda tokens: 3.0 - fall * math.log2(tokens)), (lambda tokens: 3.06 - fall * math.log2(tokens))
    assert slow(4000) - fast(4000) == pytest.approx(-0.06)
    assert slow(0.8 * 4000) == pytest.approx(fast(4000))
    assert levelling_fall(0.06, 1 / 0.8) == pytest.approx(fall)  # the other way about
    assert levelling_fall(0.06, 0.8) < 0  # the slower one is behind already
    assert levelling_fall(0.06, 1.0) == math.inf


def refused_rows() -> dict[str, list[Row]]:
    equal = SPEED[:, None] * np.ones(2)
    rows = rows_of(equal)
    other_device = [*rows[:-4], *(r for r in rows_of(equal, device="another") if r.rho == 1.0 and r.seed == 1)]
    other_threads = [*rows[:-4], *(r for r in rows_of(equal, threads=2) if r.rho == 1.0 and r.seed == 1)]
    return {
        "different devices (another, device)": other_device,
        "different numbers of threads (1, 2)": other_threads,
        "too short": rows_of(equal * np.array([1, 0])),
        "two validations": rows_of(equal, tokens=[4000]),
        "first validated after": rows_of(equal * np.array([[0.1], [1], [1], [1]])),
    }


@pytest.mark.parametrize("reason", list(refused_rows()))
def test_runs_that_cannot_be_compared_by_the_clock_are_refused_in_a_sentence(reason: str, tmp_path: Path) -> None:
    rows = refused_rows()[reason]
    timed, why = timed_measures(rows)
    assert timed == []
    assert reason in why
    section = "".join(wall_clock_section(plan_at(tmp_path)[0], rows, timed, why, ""))
    assert reason in section
    assert "<img" not in section


def test_a_measure_that_earlier_validations_lack_is_left_out() -> None:
    rows = rows_of(SPEED[:, None] * np.ones(2), nats_new=math.nan)
    assert [name for name, _ in timed_measures(rows)[0]] == ["all tokens"]


def settled(section: list[str], heading: str) -> dict[str, list[str]]:
    """Cells of the table that compares with an end, by rho."""
    table = next(part for part in section if f"<th>rho, nats less those of {heading}</th>" in part)
    rows = [
        line.removeprefix("<tr><td>").removesuffix("</td></tr>").split("</td><td>") for line in table.split("\n")[1:-1]
    ]
    return {row[0]: row[1:] for row in rows}


def test_only_what_holds_both_ways_is_settled(tmp_path: Path) -> None:
    """Rho 0.5 is far ahead, 0.25 ahead at equal tokens by less than its speed costs it, and 0 far behind."""
    generator = np.random.default_rng(2)
    noise = generator.normal(0, 1e-4, (4, 3))
    offsets = np.array([5.3, 4.98, 4.8, 5.0])

    def loss(rho: int, tokens: float, seed: int = 0) -> float:
        return float(offsets[rho] - 0.4 * math.log(tokens) + 0.05 * seed + noise[rho, seed])

    rows = rows_of(SPEED[:, None] * np.exp(generator.normal(0, 1e-3, (4, 3))), loss)
    section = wall_clock_section(plan_at(tmp_path)[0], rows, *timed_measures(rows), "")
    found = settled(section, "all experts")
    assert {rho: cells[2] for rho, cells in found.items()} == {
        "0.000": "behind",
        "0.250": "not settled",
        "0.500": "ahead",
    }
    assert found["0.250"][0].startswith("-0.02")
    assert found["0.250"][1].startswith("+0.02")  # -0.02 + 0.4 ln(100 / 90)
    assert found["0.250"][3].startswith(f"{0.02 / math.log2(100 / 90):.2f}")
    assert found["0.000"][3] == "nothing"
    page = "".join(section)
    assert "80 to 80" in page  # tokens a second, least to most
    assert "on device" in page
    assert "side by side" in page


def test_one_seed_settles_nothing(tmp_path: Path) -> None:
    rows = rows_of(SPEED[:, None])
    section = wall_clock_section(plan_at(tmp_path, seeds=[0], workers=1)[0], rows, *timed_measures(rows), "")
    assert {cells[2] for cells in settled(section, "all memory").values()} == {"not settled"}
    assert "unknown: one seed" in "".join(section)
    assert "one run at a time" in "".join(section)

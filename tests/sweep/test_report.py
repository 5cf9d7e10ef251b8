"""What a report tells: how much is finished, what is left out, and the domains that the runs have."""

import csv
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.text import Text
from simulated_runs import run_of, write_results
from small_sweep import plan_at

from engram.cli import main
from engram.sweep.abilities import scores
from engram.sweep.plan import Point, SweepPlan
from engram.sweep.plot import draw_abilities, draw_domains, draw_wall_clock
from engram.sweep.results import at_the_end, domain_names, measure, read_csv, write_csv
from engram.sweep.wall_clock import timed_measures


def losses(point: Point, tokens: int) -> dict[str, float]:
    nats = 3 + (point.rho - 0.4) ** 2 + 0.01 * point.seed + 1e-3 * ((7 * point.seed + round(10 * point.rho)) % 3)
    return {"nats": nats, "bits_per_byte": 2 * nats, "nats_new": nats + 1, "nats_repeated": nats - 1}


def simulated(
    tmp_path: Path, values: Callable[[Point, int], dict[str, float]] = losses, **changes: Any
) -> tuple[SweepPlan, Path]:
    plan, path = plan_at(tmp_path, **changes)
    write_results(plan, values)
    return plan, path


def test_points_that_are_not_finished_are_counted_with_what_the_curve_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, path = simulated(tmp_path, seeds=[0, 1, 2], rho=[0.0, 0.25, 0.5, 1.0], variants={})
    absent = [p for p in plan.points() if p.rho == 0.25 or (p.rho, p.seed) == (0.5, 1)]
    for point in absent:
        (point.folder / "result.json").unlink()
    assert main(["sweep", "report", str(path)]) == 0
    said = capsys.readouterr().out.splitlines()
    expected = [
        "8 of 12 points are finished",
        "rho 0.25 is left out of the curve: it is finished at no seed",
        "seed 1 is left out of the curve: it is not finished at rho 0.5",
    ]
    assert said[:3] == expected
    assert said[3].startswith("verdict on all tokens: ")
    page = (plan.folder / "report.html").read_text()
    assert all(f"<p class=verdict>{line}.</p>" in page for line in expected)
    assert "(2 seeds)" in page


@pytest.mark.parametrize("rho", [[0.5], [0.0, 1.0]])
def test_a_plan_without_a_curve_says_so_and_its_losses_are_reported(
    tmp_path: Path, rho: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    plan, path = simulated(tmp_path, rho=rho, variants={})
    assert main(["sweep", "plan", str(path)]) == 0
    assert "need 3 values of rho or more" in capsys.readouterr().out
    assert main(["sweep", "report", str(path)]) == 0
    assert f"no verdict: a curve needs 3 values of rho or more, got {len(rho)}" in capsys.readouterr().out
    assert len(read_csv(plan.folder / "points.csv")) == len(plan.points()) * plan.evaluations
    page = (plan.folder / "report.html").read_text()
    assert all(f"<td>{point.budget.rho:.3f}</td>" in page for point in plan.points())
    assert not (plan.folder / "curve.png").exists()


def test_a_sweep_whose_controls_alone_are_finished_has_no_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, path = simulated(tmp_path)
    for point in plan.points()[:-1]:
        (point.folder / "result.json").unlink()
    assert main(["sweep", "report", str(path)]) == 0
    assert "no verdict: no point of the main curve is finished" in capsys.readouterr().out


@pytest.mark.parametrize("names", [("text",), ("law & order", "new_age", "verse")])
def test_domains_are_those_of_the_results_where_there_are_several(tmp_path: Path, names: tuple[str, ...]) -> None:
    def by_domain(point: Point, tokens: int) -> dict[str, float]:
        own = losses(point, tokens)
        found = {f"nats_{name}": own["nats"] + i for i, name in enumerate(names)}
        return own | found | {f"bits_per_byte_{name}": 2 * own["nats"] + i for i, name in enumerate(names)}

    plan, path = simulated(tmp_path, by_domain)
    assert main(["sweep", "report", str(path)]) == 0
    page = (plan.folder / "report.html").read_text()
    assert ("By domain" in page) == (len(names) > 1)
    assert ("<th>law &amp; order</th>" in page) == (len(names) > 1)
    assert "nan" not in re.sub("data:image/png;base64,[^']*", "", page)
    rows = read_csv(plan.folder / "points.csv")
    assert domain_names(rows) == sorted(names)
    for row in rows:
        assert row.domains == {
            f"{kind}_{name}": scale * row.nats + i
            for kind, scale in (("nats", 1), ("bits_per_byte", 2))
            for i, name in enumerate(names)
        }


def test_domains_survive_the_csv_and_those_of_earlier_ones_are_read(tmp_path: Path) -> None:
    rows = run_of(0.5, 0, {100: 3.0}, 9.0, domains={"nats_verse": 2.5, "bits_per_byte_verse": 1.5})
    rows += run_of(1.0, 0, {100: 3.0}, 9.0, domains={})
    write_csv(rows, tmp_path / "points.csv")
    assert read_csv(tmp_path / "points.csv") == rows
    with (tmp_path / "points.csv").open() as file:
        assert [line["nats_verse"] for line in csv.DictReader(file)] == ["2.5", ""]
    large = read_csv(Path(__file__).parents[2] / "docs/results/large/points.csv")
    assert domain_names(large) == ["code", "prose"]
    assert not any(math.isnan(row.value("bits_per_byte_code")) for row in large)


def texts_of(figure: Any) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def test_pictures_say_what_they_show() -> None:
    loss = {0.0: 3.2, 0.5: 3.0, 1.0: 3.3}
    rows = [
        row
        for rho, nats in loss.items()
        for row in run_of(rho, 0, {50: nats + 1, 100: nats}, 9.0 + rho, probes={"probe_facts": 0.5})
    ]
    measured = at_the_end(measure(rows))
    said = texts_of(draw_abilities(rows, scores(rows), measured))
    assert "dotted: least mean loss between the ends" in said
    assert "one seed" in said
    assert "bars" not in texts_of(draw_wall_clock(timed_measures(rows)[0]))
    again = [row for seed in (0, 1) for rho in loss for row in run_of(rho, seed, {50: 4 + rho, 100: 3.0}, 9.0 + rho)]
    assert "bars: 95 %" in texts_of(draw_wall_clock(timed_measures(again)[0]))
    assert "code (" in texts_of(draw_domains(rows, ["code", "prose"]))

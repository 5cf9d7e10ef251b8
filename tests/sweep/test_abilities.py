"""Probes over rho: read from runs, kept in the CSV, and compared with their noise, against truths that are known."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Text
from simulated_runs import LOSSES, run_of, write_results
from small_sweep import plan_at

from engram.cli import main
from engram.pages import as_typed
from engram.sweep.abilities import Score, least_losses, scores
from engram.sweep.fit import Curve, between
from engram.sweep.plan import Point
from engram.sweep.plot import draw, draw_abilities
from engram.sweep.results import Row, at_the_end, measure, probe_tasks, read_csv, write_csv

RHO = np.array([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
LARGE = Path(__file__).parents[2] / "docs/results/large/points.csv"


def probed(accuracies: dict[float, float], losses: dict[float, float], task: str = "facts") -> list[Row]:
    """Rows of a sweep on two seeds, the second better at everything by as much at every rho, whatever its noise."""
    rows = []
    for rho, accuracy in accuracies.items():
        for seed in (0, 1):
            score = accuracy + 0.1 * seed + 1e-6 * rho * seed
            probes = {f"probe_{task}": score, f"probe_nats_{task}": 1 - score}
            rows += run_of(rho, seed, {100: losses[rho] - 0.3 * seed + 1e-6 * rho * seed}, 1.0, probes=probes)
    return rows


def test_probes_survive_the_csv_beside_rows_that_have_none(tmp_path: Path) -> None:
    rows = run_of(0.5, 0, {100: 3.0}, 9.0, probes={"probe_a b": 0.25, "probe_nats_a b": 1.5, "probe_nats": 0.125})
    rows += run_of(1.0, 0, {100: 3.0}, 9.0)
    write_csv(rows, tmp_path / "points.csv")
    assert read_csv(tmp_path / "points.csv") == rows
    with (tmp_path / "points.csv").open() as file:
        assert [line["probe_a b"] for line in csv.DictReader(file)] == ["0.25", ""]


def test_rows_written_before_there_were_probes_are_read() -> None:
    rows = read_csv(LARGE)
    assert len(rows) == 28 * 4
    assert all(row.probes == {} and row.threads == 0 for row in rows)
    assert min(row.nats for row in rows) == pytest.approx(3.21, abs=0.01)


def test_tasks_are_those_that_every_last_validation_has() -> None:
    both = {"probe_facts": 0.5, "probe_nats_facts": 1.0, "probe_needle": 0.5}
    rows = run_of(0.0, 0, {50: 4.0}, 1.0, final=False) + run_of(0.0, 0, {100: 3.0}, 1.0, probes=both)
    assert probe_tasks(rows) == ["facts", "needle"]
    rows += run_of(1.0, 0, {100: 3.0}, 1.0, probes={"probe_facts": 0.5, "probe_nats_facts": 1.0})
    assert probe_tasks(rows) == ["facts"]
    assert probe_tasks(rows + run_of(1.0, 1, {100: 3.0}, 1.0)) == []


def test_a_better_probe_and_a_worse_one_are_told_by_the_direction_that_is_better() -> None:
    losses = {0.0: 3.2, 0.5: 3.0, 1.0: 3.3}
    found = {s.metric: s for s in scores(probed({0.0: 0.9, 0.5: 0.5, 1.0: 0.2}, losses))}
    assert list(found) == ["nats", "nats_new", "probe_facts", "probe_nats_facts"]
    for metric in ("probe_facts", "probe_nats_facts"):
        said = [found[metric].said(found[metric].against(1, end)) for end in (-1, 0)]
        assert said == ["better", "worse"]
    assert found["probe_facts"].against(1, 0).value == pytest.approx(-0.4, abs=1e-5)
    assert found["probe_nats_facts"].against(1, 0).value == pytest.approx(0.4, abs=1e-5)
    assert found["nats"].said(found["nats"].against(1, -1)) == "better"  # a lower loss


def test_a_flat_probe_is_resolved_no_more_often_than_the_intervals_say() -> None:
    """The rho is chosen by losses whose noise is that of the probe, upside down: a run of luck has both."""
    generator = np.random.default_rng(0)
    resolved, plain = 0, 0
    for _ in range(1500):
        accuracy = 0.4 + generator.normal(0, 0.1, 3) + generator.normal(0, 0.02, (len(RHO), 3))
        score = Score("", "", "", True, Curve(RHO, accuracy))
        losses = -accuracy + generator.normal(0, 0.01, accuracy.shape)
        chosen = 1 + int(losses.mean(1)[1:-1].argmin())
        resolved += score.said(score.against(chosen, -1)) != "not resolved"
        plain += not between(score.curve, 2, -1).low <= 0 <= between(score.curve, 2, -1).high
    assert resolved / 1500 < 0.06
    assert plain / 1500 == pytest.approx(0.05, abs=0.015)  # of a rho that nothing has chosen


def test_a_probe_that_every_seed_scores_alike_resolves_nothing() -> None:
    """So do all when nothing was learnt, and on few questions some by chance: there is no noise to compare with."""
    score = Score("", "", "", True, Curve(RHO, np.array([0, 0.1, 0.2, 0.3, 0, 0])[:, None] * np.ones(3)))
    assert score.said(score.against(2, -1)) == "not resolved"


def test_without_seeds_to_tell_the_noise_nothing_is_resolved() -> None:
    score = Score("", "", "", True, Curve(RHO, np.linspace(0, 1, 6)[:, None]))
    assert score.said(score.against(2, 0)) == "not resolved"


def test_each_measure_chooses_its_rho_between_the_ends() -> None:
    rows = []
    for rho, nats, new in ((0.0, 2.9, 3.1), (0.3, 3.0, 3.0), (0.6, 2.95, 3.2), (1.0, 2.8, 3.3)):
        for seed in (0, 1):
            rows += run_of(rho, seed, {100: nats}, 1.0, nats_new=new)
    found = least_losses(at_the_end(measure(rows)))
    assert {at: [m.metric for m in measured] for at, measured in found.items()} == {2: ["nats"], 1: ["nats_new"]}


def values(point: Point, tokens: int) -> dict[str, float]:
    """A history as a run writes it: the loss is a U, facts like memory, and brackets come with luck alone."""
    luck = 0.01 * ((2 * point.seed + 6 * point.rho * (point.seed + 1)) % 5)  # 0, 3, 1 and 2, 3, 4 hundredths
    loss = 4 + (point.rho - 0.5) ** 2 - tokens / 2000 + luck / 10
    facts, brackets = 0.6 - 0.3 * point.rho + luck / 10, 0.3 + luck
    probes = {"facts": facts, "brackets": brackets}
    scored = {f"probe_{task}": score for task, score in probes.items()}
    return {**dict.fromkeys(LOSSES, loss), **scored, **{f"probe_nats_{t}": 1 - s for t, s in probes.items()}}


def test_the_report_sets_probes_beside_losses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, path = plan_at(tmp_path)
    write_results(plan, values)
    assert main(["sweep", "report", str(path)]) == 0
    assert str(plan.folder / "probes.png") in capsys.readouterr().out
    assert (plan.folder / "probes.png").read_bytes().startswith(b"\x89PNG")
    page = (plan.folder / "report.html").read_text()
    section = page[page.index("Lower loss, same ability?") : page.index("Loss at equal wall-clock")]
    lines = {line.split("</td>")[0].removeprefix("<tr><td>"): line for line in section.splitlines()}
    facts, brackets = lines["facts: share of right answers ↑"], lines["brackets: share of right answers ↑"]
    assert "<td>better</td>" in facts  # than all experts
    assert "<td>worse</td>" in facts  # than all memory
    assert brackets.count("<td>not resolved</td>") == 2
    rows = {(r.rho, r.seed): r for r in read_csv(plan.folder / "points.csv") if r.final and r.variant == "engram"}
    mean = sum(rows[0.5, seed].probes["probe_facts"] - rows[1.0, seed].probes["probe_facts"] for seed in (0, 1)) / 2
    assert f"<td>{mean:+.3f} (" in facts
    assert "<td>capacity_one</td>" in section


FALLING = {0.0: 3.3, 0.5: 3.17, 1.0: 3.0}  # all experts are best


def with_variants(n: int) -> list[Row]:
    """Rows whose variants, at rho 0.5, have names that matplotlib would not show as they are."""
    rows = probed({0.0: 0.9, 0.5: 0.5, 1.0: 0.2}, FALLING)
    for i in range(n):
        about = {"variant": f"_{i}$x^2$", "probes": {"probe_facts": 0.4, "probe_nats_facts": 0.6}}
        rows += run_of(0.5, 0, {100: 3.2}, 1.0, **about)
    return rows


def test_no_loss_is_told_to_lie_below_by_less_than_nothing(tmp_path: Path) -> None:
    rows = probed({0.0: 0.9, 0.5: 0.5, 1.0: 0.2}, FALLING)
    measured = measure(rows)
    title = draw(rows, measured, "title").axes[0].get_title(loc="left")
    assert "0.1700 above all experts" in title
    assert "0.1300 below all memory" in title
    plan, path = plan_at(tmp_path)
    write_results(plan, lambda point, tokens: {**dict.fromkeys(LOSSES, FALLING[point.rho] + 1e-3 * point.seed)})
    assert main(["sweep", "report", str(path)]) == 0
    page = (plan.folder / "report.html").read_text()
    assert "<td>0.1700 above</td>" in page
    assert "<td>0.1300 below</td>" in page
    assert not re.search(r"-[0-9.]+ (above|below)|(above|below)[^<>]*</t[hd]><td>-", page)


def test_variants_are_called_what_their_plan_calls_them() -> None:
    rows = with_variants(2)
    main_figure = draw(rows, measure(rows), "_sweep$1$")
    labels = [text.get_text() for text in main_figure.axes[2].get_legend().get_texts()]
    assert labels == ["engram", *map(as_typed, ("_0$x^2$", "_1$x^2$"))]
    assert as_typed("_sweep$1$") in {text.get_text() for text in main_figure.findobj(Text)}
    figure = draw_abilities(rows, scores(rows), at_the_end(measure(rows)))
    assert {as_typed("_0$x^2$"), as_typed("_1$x^2$")} < {text.get_text() for text in figure.legends[0].get_texts()}


@pytest.mark.parametrize("n", [1, 40])
def test_variants_that_stand_beside_their_rho_say_so_and_are_nearer_to_it_than_to_another(n: int) -> None:
    rows = with_variants(n)
    figure = draw_abilities(rows, scores(rows), at_the_end(measure(rows)))
    places = [
        float(x)
        for container in figure.axes[0].containers
        if str(container.get_label()).endswith("x^2\\$")
        for x in container.lines[0].get_xdata()
    ]
    assert len(places) == len(set(places)) == n
    assert all(0.5 < x < 0.75 for x in places)
    said = "have the ρ of the mean to their left"  # noqa: RUF001
    assert any(said in text.get_text() for text in figure.findobj(Text))
    alone = probed({0.0: 0.9, 0.5: 0.5, 1.0: 0.2}, FALLING)
    figure = draw_abilities(alone, scores(alone), at_the_end(measure(alone)))
    assert not any(said in text.get_text() for text in figure.findobj(Text))

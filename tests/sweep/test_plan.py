"""A plan says what will be trained, and what cannot be is refused before anything trains."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_sweep import PLAN

from engram.budget import ParameterBudget
from engram.cli import main
from engram.config import ConfigError, ModelConfig
from engram.sweep.plan import SweepPlan, plan_table
from engram.training.data import DataConfig

CONFIGS = Path(__file__).parents[2] / "configs"
MODEL = PLAN["model"]


def settings(**changes: Any) -> dict[str, Any]:
    base = {
        "name": "test",
        "model": MODEL,
        "rho": [0.0, 0.5, 1.0],
        "seeds": [0, 1],
        "tokens": 1024,
        "evaluations": 2,
        "data": {"vocab_size": 300, "seq_len": 32, "batch_size": 4},
        "variants": {"capacity_one": {"memory": {"kind": "capacity_one"}, "rho": [0.5], "seeds": [0]}},
    }
    return {**base, **changes}


def load(tmp_path: Path, **changes: Any) -> SweepPlan:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(settings(**changes)))
    return SweepPlan.load(path)


def test_points_differ_in_the_split_alone(tmp_path: Path) -> None:
    points = load(tmp_path).points()
    assert [(p.variant, p.rho, p.seed) for p in points] == [
        *(("engram", rho, seed) for seed in (0, 1) for rho in (0.0, 0.5, 1.0)),
        ("capacity_one", 0.5, 0),
    ]
    whole = ParameterBudget.of(ModelConfig.from_dict(MODEL), 32)
    for point in points:
        assert point.budget.total == pytest.approx(whole.total, rel=1e-3)
        assert point.budget.flops == pytest.approx(whole.flops, rel=5e-3)
        same = {k: v for k, v in point.run_settings.items() if k not in ("model", "seed_everything", "data")}
        assert same == {k: v for k, v in points[0].run_settings.items() if k in same}
        assert point.run_settings["data"]["config"]["seed"] == point.run_settings["seed_everything"] == point.seed
    assert points[0].run_settings["trainer"]["max_steps"] == 8
    assert points[-1].config.memory is not None
    assert points[-1].config.memory.kind == "capacity_one"


def test_a_changed_setting_makes_another_point(tmp_path: Path) -> None:
    names = [p.name for p in load(tmp_path).points()]
    assert len(set(names)) == len(names)
    assert names == [p.name for p in load(tmp_path).points()]
    for changes in ({"tokens": 2048}, {"optim": {"lr": 1e-4}}, {"evaluations": 4}):
        assert not set(names) & {p.name for p in load(tmp_path, **changes).points()}
    moved = {"vocab_size": 300, "seq_len": 32, "batch_size": 4, "cache_dir": "elsewhere", "num_proc": 2}
    assert names == [p.name for p in load(tmp_path, data=moved).points()]


def test_a_variant_is_trained_where_it_differs_from_the_plans_own_model_alone(tmp_path: Path) -> None:
    points = load(tmp_path, variants={"shuffled": {"memory": {"kind": "shuffled"}}}, seeds=[0]).points()
    assert [(p.variant, p.rho) for p in points[3:]] == [("shuffled", 0.0), ("shuffled", 0.5)]


def test_variants_have_the_budget_of_a_model_with_rows_of_its_own(tmp_path: Path) -> None:
    model = {**MODEL, "memory": {**MODEL["memory"], "rows": [970, 1310]}}
    whole = ParameterBudget.of(ModelConfig.from_dict(model), 32)
    for point in load(tmp_path, model=model, variants={"shuffled": {"memory": {"kind": "shuffled"}}}).points():
        assert point.budget.total == pytest.approx(whole.total, rel=2e-3)
        assert point.budget.flops == pytest.approx(whole.flops, rel=1e-2)


def test_the_table_shows_every_split_with_its_deviations(tmp_path: Path) -> None:
    lines = plan_table(load(tmp_path, tokens_per_s=1024.0), workers=2).splitlines()
    assert [line.split()[:2] for line in lines[1:5]] == [
        ["engram", "0.000"],
        ["engram", "0.500"],
        ["engram", "1.000"],
        ["capacity_one", "0.500"],
    ]
    assert "7 points of 8 steps, 1,024 tokens each" in lines[5]
    assert "%" in lines[1]


@pytest.mark.parametrize("path", sorted((CONFIGS / "sweeps").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_plans_load_and_split(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    plan = SweepPlan.load(path)
    assert {0.0, 1.0} <= set(plan.rho)
    if plan.name != "smoke":
        assert len(plan.rho) >= 5
        assert len(plan.seeds) >= 2


@pytest.mark.parametrize("config", [SweepPlan, DataConfig])
def test_the_documentation_lists_every_key_with_its_default(config: type) -> None:
    text = (CONFIGS.parent / "docs/data.md").read_text(encoding="utf-8").partition("Keys of `data`:")
    rows = re.findall(r"^\| `(\w+)` \|(?: `(.*?)`)? \|", text[0 if config is SweepPlan else 2], re.MULTILINE)
    fields = {f.name: f for f in dataclasses.fields(config)}
    assert [name for name, _ in rows] == list(fields)
    for name, default in rows:
        if default in ("[]", "{}"):
            assert fields[name].default_factory is not dataclasses.MISSING or fields[name].default == ()
        else:
            assert (yaml.safe_load(default) if default else dataclasses.MISSING) == fields[name].default


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rho": [0.5, 1.5]}, ["rho is 1.5", "0 to 1"]),
        ({"rho": [0.5, 0.5]}, ["rho", "differ"]),
        ({"rho": []}, ["rho", "one value or more"]),
        ({"seeds": []}, ["seeds", "one seed or more"]),
        ({"token": 5}, ["unknown setting token", "tokens"]),
        ({"tokens": 100}, ["tokens is 100", "256 or more"]),
        ({"variants": {"x": {"memry": {}}}}, ["variants.x.memry", "memory"]),
        ({"variants": {"x": {"memory": {"kind": "y"}}}}, ["memory.kind", "'y'", "capacity_one"]),
        ({"variants": {"x": {"memory": {"orders": 3}}}}, ["variants.x.memory.orders is 3", "a list"]),
        ({"variants": {"x": {"memory": None}}}, ["variants.x.memory is None", "a mapping"]),
        ({"variants": {"x": {"memory": {"n_heads": 0}}}}, ["variants.x.memory.n_heads is 0", "1 or more"]),
        ({"variants": {"x": {"memory": {"rows": [5, 7]}}}}, ["variants.x.memory.rows is [5, 7]", "rho decides"]),
        ({"variants": {"x": {}}}, ["variants.x.memory is {}", "settings that change the model"]),
        ({"variants": {"x": {"memory": {"kind": "shuffled"}, "rho": [0.5, 1.0]}}}, ["variants.x.rho is (1.0,)"]),
        ({"variants": {5: {"memory": {"kind": "shuffled"}}}}, ["variants is 5", "names of letters"]),
        ({"variants": {"engram": {}}}, ["variants", "engram"]),
        ({"model": {**MODEL, "memory": None}}, ["memory", "None", "template"]),
        ({"model": {**MODEL, "experts": {**MODEL["experts"], "shared_width": 0}}}, ["shared_width"]),
        ({"data": {"vocab_size": 400, "seq_len": 32, "batch_size": 4}}, ["vocab_size is 400", "300"]),
        ({"data": {"vocab_size": 300, "seq_len": 64, "batch_size": 4}}, ["data.seq_len is 64", "max_seq_len (32)"]),
        ({"seeds": [0, -1]}, ["seeds is -1", "0 to 4294967295"]),
        ({"seeds": [2**32]}, ["seeds is 4294967296", "0 to 4294967295"]),
        ({"tokens_per_s": float("inf")}, ["tokens_per_s is inf", "finite"]),
        ({"optim": {"lr": "3e-2"}}, ["optim.lr is '3e-2'", "3.0e-2"]),
        ({"model": 5}, ["model is 5", "path", "mapping"]),
        ({"precision": "fp7"}, ["precision is 'fp7'", "bf16-mixed"]),
        ({"model": "absent.yaml"}, ["absent.yaml"]),
        ({"name": "a/b"}, ["name", "a/b"]),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    tmp_path: Path, changes: dict[str, Any], named: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(settings(**changes)))
    with pytest.raises(ConfigError):
        SweepPlan.load(path).points()
    assert main(["sweep", "plan", str(path)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert all(part in message for part in named), message

"""What a sweep trains: a YAML plan -> the list of its points, each a complete run at equal P_tot and FLOPs.

The points of one seed differ in the split alone: data order, initial seed and all optimiser settings are the same
(arXiv:2601.07372, section 3).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from engram.budget import ParameterBudget
from engram.config import (
    ConfigError,
    MemoryConfig,
    ModelConfig,
    build_config,
    load_yaml,
    read_settings,
    require,
    require_one_of,
    require_seed,
    settings_under,
)
from engram.parallel.config import ParallelConfig
from engram.training.optim import OptimConfig
from engram.training.prepare import DataConfig

MAIN_VARIANT = "engram"
LEAST_RHOS = 3  # of a curve: its ends, and one between them
Precision = Literal["bf16-mixed", "32-true", "bf16-true", "16-true"]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Another memory in the place of the plan's: a rival or a control.

    `memory` replaces settings of the base config's memory, all but `rows`; empty `rho` and `seeds` take the plan's. Of
    the plan's rhos those are left out at which no memory is built: every variant is the plan's own model there.
    """

    memory: dict[str, Any] = field(default_factory=dict)
    rho: tuple[float, ...] = ()
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """A sweep: which points, how long each trains, on what, and how many run at once.

    `model` is a model config (its path, or the mapping itself) with a memory template; its P_tot and FLOPs are the
    budget. `tokens` is what each point trains on, `evaluations` how often it is validated, evenly spaced, the last time
    at the end. `workers` 0 takes one for each GPU, or as many as the cores allow at `threads` each.
    `parallel` says how the processes of one point share its model, where it runs on more than one.
    `tokens_per_s` is the speed of one worker that time estimates start from; 0: unknown.
    """

    name: str
    model: str | dict[str, Any]
    rho: tuple[float, ...]
    seeds: tuple[int, ...]
    tokens: int
    data: DataConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    variants: dict[str, Variant] = field(default_factory=dict)
    evaluations: int = 4
    precision: Precision = "bf16-mixed"
    workers: int = 0
    threads: int = 1
    retries: int = 1
    tokens_per_s: float = 0.0
    save_weights: bool = False
    output: str = ""

    def __post_init__(self) -> None:
        require(self.name.replace("-", "").replace("_", "").isalnum(), "name", self.name, "letters, digits, - and _")
        _check_points("", self.rho, self.seeds)
        require(len(self.rho) > 0, "rho", self.rho, "one value or more")
        require(len(self.seeds) > 0, "seeds", self.seeds, "one seed or more")
        require_one_of("precision", self.precision, Precision)
        require(MAIN_VARIANT not in self.variants, "variants", MAIN_VARIANT, "any name but that of the main curve")
        for name, variant in self.variants.items():
            named = isinstance(name, str) and name.replace("_", "").replace("-", "").isalnum()
            require(named, "variants", name, "names of letters, digits, - and _")
            _check_points(f"variants.{name}.", variant.rho, variant.seeds)
        for name in ("evaluations", "threads"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("workers", "retries"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(0 <= self.tokens_per_s < math.inf, "tokens_per_s", self.tokens_per_s, "0 or more, finite")
        least = self.tokens_per_step * self.evaluations
        require(self.tokens >= least, "tokens", self.tokens, f"{least} or more: {self.evaluations} steps of training")

    @classmethod
    def load(cls, path: str | Path) -> SweepPlan:
        """Read a plan. Raises `ConfigError` naming what is wrong in it."""
        data = load_yaml(path)
        variants = data.get("variants") or {}
        require(isinstance(variants, dict), "variants", variants, "a mapping of names to settings")
        data["variants"] = {n: build_config(Variant, v or {}, f"variants.{n}.") for n, v in variants.items()}
        return build_config(cls, data)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimiser step."""
        return self.data.batch_size * self.data.seq_len

    @property
    def steps(self) -> int:
        """Optimiser steps of a point: as many whole evaluation intervals as `tokens` allows."""
        return self.tokens // self.tokens_per_step // self.evaluations * self.evaluations

    @property
    def folder(self) -> Path:
        """Where points and report go."""
        return Path(self.output or f"runs/sweeps/{self.name}")

    @cached_property
    def base(self) -> ModelConfig:
        """The model whose P_tot and FLOPs all points share."""
        settings = load_yaml(self.model) if isinstance(self.model, str) else self.model
        require(isinstance(settings, dict), "model", settings, "a model config's path, or a mapping of its settings")
        config = ModelConfig.from_dict(settings)
        require(config.memory is not None, "model.memory", None, "a memory template (its rows may be 0)")
        require(
            config.vocab_size == self.data.vocab_size, "data.vocab_size", self.data.vocab_size, str(config.vocab_size)
        )
        longest = f"at most the model's max_seq_len ({config.max_seq_len})"
        require(self.data.seq_len <= config.max_seq_len, "data.seq_len", self.data.seq_len, longest)
        return config

    def points(self) -> list[Point]:
        """All points: the main curve first, seed by seed, then the variants. Raises `ConfigError` for a bad split."""
        return list(self._points())

    def _points(self) -> Iterator[Point]:
        own = {rho: _named_split(self.base, rho, self, MAIN_VARIANT) for rho in self.rho}
        yield from self._curve(MAIN_VARIANT, Variant(), own)
        for name, variant in self.variants.items():
            yield from self._curve(name, variant, _configs_of(self, name, variant))

    def _curve(self, name: str, variant: Variant, configs: dict[float, ModelConfig]) -> Iterator[Point]:
        require(len(set(configs.values())) == len(configs), "rho", tuple(configs), "values that split differently")
        for seed in variant.seeds or self.seeds:
            for rho, config in configs.items():
                yield Point(self, name, rho, seed, config)


@dataclass(frozen=True)
class Point:
    """One run of a sweep: a variant at an asked rho, with a seed, and the config that came out of the split."""

    plan: SweepPlan
    variant: str
    rho: float
    seed: int
    config: ModelConfig

    @property
    def budget(self) -> ParameterBudget:
        """The counts of this point, at the length it trains with."""
        return ParameterBudget.of(self.config, self.plan.data.seq_len)

    @cached_property
    def run_settings(self) -> dict[str, Any]:
        """All that decides the result, as the training command takes it."""
        plan = self.plan
        return {
            "seed_everything": self.seed,
            "trainer": {
                "max_steps": plan.steps,
                "val_check_interval": plan.steps // plan.evaluations,
                "precision": plan.precision,
            },
            "model": {"model": self.config.to_dict(), "optim": _plain(plan.optim)},
            "data": {"config": {**_data_settings(plan.data), "seed": self.seed}},
        }

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of `run_settings`, less where caches lie; a point with another one is another point."""
        settings = json.loads(json.dumps(self.run_settings))
        for name in ("cache_dir", "num_proc"):
            settings["data"]["config"].pop(name)
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def name(self) -> str:
        """Name of the point and of its folder."""
        return f"{self.variant}-rho{self.rho:.3f}-seed{self.seed}-{self.fingerprint}"

    @property
    def folder(self) -> Path:
        """Where its run writes."""
        return self.plan.folder / "points" / self.name


def _data_settings(config: DataConfig) -> dict[str, Any]:
    """All settings; those of the mixture only if there is one, as points of plans without it keep their names."""
    settings = _plain(config)
    if not config.portions():
        for name in ("mixture", "mixture_seed", "probe_examples"):
            settings.pop(name)
    return settings


def _plain(config: Any) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _configs_of(plan: SweepPlan, name: str, variant: Variant) -> dict[float, ModelConfig]:
    """The configs of a variant by rho, less those that are the plan's own: where no memory is built, any kind is."""
    base = _with_memory(_named_split(plan.base, 1.0, plan, name), name, variant.memory)
    configs = {rho: _named_split(base, rho, plan, name) for rho in variant.rho or plan.rho}
    own = {rho: _named_split(plan.base, rho, plan, MAIN_VARIANT) for rho in configs}
    others = {rho: config for rho, config in configs.items() if _built(config) != _built(own[rho])}
    where, same = f"variants.{name}", tuple(rho for rho in configs if rho not in others)
    require(len(others) > 0, f"{where}.memory", variant.memory, f"settings that change the model at rho {same}")
    require(not (variant.rho and same), f"{where}.rho", same, "values at which it is not the same model as without it")
    return others


def _built(config: ModelConfig) -> ModelConfig:
    return config if config.has_memory else dataclasses.replace(config, memory=None)


def _with_memory(base: ModelConfig, name: str, settings: dict[str, Any]) -> ModelConfig:
    """A base of no rows with settings of its memory replaced by those of a variant."""
    assert base.memory is not None
    where = f"variants.{name}"
    changes = read_settings(MemoryConfig, settings, f"{where}.memory.")
    require("rows" not in changes, f"{where}.memory.rows", settings.get("rows"), "no setting: rho decides it")
    with settings_under(where):
        none = (0,) * len(changes.get("orders", base.memory.orders))
        memory = dataclasses.replace(base.memory, **changes, rows=none)
        return dataclasses.replace(base, memory=memory)


def _named_split(base: ModelConfig, rho: float, plan: SweepPlan, variant: str) -> ModelConfig:
    try:
        return ParameterBudget.of(base, plan.data.seq_len).split(rho)
    except ConfigError as error:
        raise ConfigError(f"point {variant} at rho {rho}: {error}") from error


def _check_points(where: str, rho: tuple[float, ...], seeds: tuple[int, ...]) -> None:
    for value in rho:
        require(0 <= value <= 1, f"{where}rho", value, "0 to 1")
    for seed in seeds:
        require_seed(f"{where}seeds", seed)
    for name, values in (("rho", rho), ("seeds", seeds)):
        require(len(set(values)) == len(values), f"{where}{name}", values, "values that differ from each other")


def plan_table(plan: SweepPlan, workers: int = 0) -> str:
    """The points as a text table, with what each holds, its deviation from the budget, and with `workers` at once how
    long training may take."""
    points = plan.points()
    whole = ParameterBudget.of(plan.base, plan.data.seq_len)
    lines = [
        f"{'variant':<16}{'rho':>6}{'actual':>8}{'experts':>9}{'shared':>8}{'rows/head':>11}{'P_tot':>15}{'P_act':>13}"
        f"{'FLOPs/token':>15}{'P_tot dev':>11}{'FLOPs dev':>11}  seeds"
    ]
    for variant, rho in dict.fromkeys((p.variant, p.rho) for p in points):
        same = [p for p in points if (p.variant, p.rho) == (variant, rho)]
        b, c = same[0].budget, same[0].config
        assert c.experts is not None
        assert c.memory is not None
        lines.append(
            f"{variant:<16}{rho:>6.3f}{b.rho:>8.4f}{c.experts.n_experts:>9}{c.experts.shared_width:>8}"
            f"{c.memory.rows[0]:>11,}{b.total:>15,}{b.active:>13,}{b.flops:>15,}"
            f"{b.total / whole.total - 1:>+11.3%}{b.flops / whole.flops - 1:>+11.3%}  "
            + ",".join(str(p.seed) for p in same)
        )
    lines.append(f"{len(points)} points of {plan.steps} steps, {plan.steps * plan.tokens_per_step:,} tokens each")
    if len(plan.rho) < LEAST_RHOS:
        lines.append(
            f"a report will have losses alone: a curve and its verdict need {LEAST_RHOS} values of rho or more"
        )
    if plan.tokens_per_s and workers:
        seconds = len(points) * plan.steps * plan.tokens_per_step / plan.tokens_per_s / workers
        lines.append(
            f"about {seconds / 60:.0f} minutes of training: {workers} workers at {plan.tokens_per_s:,.0f} tokens/s each"
        )
    return "\n".join(lines)

"""What a config promises: it survives a round trip, and what it cannot be is refused in one line."""

import dataclasses
from math import inf
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from engram.config import ConfigError, GQAConfig, MemoryConfig, MLAConfig, ModelConfig, MoEConfig

GQA = {"kind": "gqa", "n_heads": 4, "n_kv_heads": 2, "head_dim": 8}
MLA = {"kind": "mla", "n_heads": 4, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
YARN = {"factor": 4.0, "original_max_seq_len": 32}


def settings(**changes: Any) -> dict[str, Any]:
    base = {
        "vocab_size": 64,
        "d_model": 32,
        "n_layers": 3,
        "attention": GQA,
        "dense_width": 64,
        "experts": {"n_experts": 8, "top_k": 2, "width": 16, "shared_width": 16},
        "memory": {"layers": [1], "orders": [2, 3], "n_heads": 2, "row_width": 4, "rows": [11, 11]},
    }
    return {**base, **changes}


@given(
    attention=st.sampled_from([GQA, MLA, {**GQA, "yarn": YARN}, {**MLA, "yarn": YARN}]),
    layers=st.sets(st.integers(0, 2), min_size=1),
    branches=st.integers(1, 4),
    rows=st.integers(0, 10**9),
    table_dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_plain_data_and_yaml_round_trips_keep_every_setting(
    attention: dict[str, Any], layers: set[int], branches: int, rows: int, table_dtype: str
) -> None:
    memory = {"layers": sorted(layers), "rows": [rows, rows], "table_dtype": table_dtype}
    config = ModelConfig.from_dict(settings(attention=attention, branches=branches, memory=memory))
    assert ModelConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


def test_a_model_without_yarn_is_written_as_before_there_was_any() -> None:
    """Names of finished points of sweeps, and what checkpoints keep, are made of this."""
    for attention in (GQA, MLA):
        assert "yarn" not in ModelConfig.from_dict(settings(attention=attention)).to_dict()["attention"]


def test_parts_take_the_models_sizes() -> None:
    config = ModelConfig.from_dict(settings(branches=4))
    assert config.experts is not None
    assert config.memory is not None
    assert config.experts.d_model == 32
    assert (config.memory.d_model, config.memory.vocab_size, config.memory.branches) == (32, 64, 4)


def test_the_kind_of_attention_picks_its_class() -> None:
    assert isinstance(ModelConfig.from_dict(settings(attention=GQA)).attention, GQAConfig)
    assert isinstance(ModelConfig.from_dict(settings(attention=MLA)).attention, MLAConfig)


def test_rows_of_zero_mean_no_memory() -> None:
    config = ModelConfig.from_dict(settings(memory={"rows": [0, 0]}))
    assert config.memory is not None
    assert not config.has_memory
    assert ModelConfig.from_dict(settings()).has_memory


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden": 3}, ["hidden", "3", "d_model"]),
        ({"memory": {"heads": 3}}, ["memory.heads", "3", "n_heads"]),
        ({"attention": {"kind": "mha"}}, ["attention.kind", "mha", "gqa", "mla"]),
        ({"attention": {**GQA, "n_kv_heads": 3}}, ["n_kv_heads", "3", "divisor"]),
        ({"attention": {**GQA, "rope_theta": 1, "yarn": YARN}}, ["attention.rope_theta", "1.0", "above 1"]),
        ({"attention": {**MLA, "yarn": {**YARN, "factor": 0.5}}}, ["attention.yarn.factor", "0.5", "1 or more"]),
        (
            {"attention": {**GQA, "yarn": {**YARN, "beta_fast": 0.5}}},
            ["yarn.beta_fast", "0.5", "above beta_slow"],
        ),
        ({"attention": {**GQA, "yarn": {**YARN, "beta_slow": 0}}}, ["yarn.beta_slow", "0", "above 0"]),
        ({"attention": {**GQA, "yarn": {"factor": 2}}}, ["attention.yarn.original_max_seq_len", "missing"]),
        (
            {"attention": {**GQA, "yarn": {**YARN, "original_max_seq_len": 0}}},
            ["original_max_seq_len", "1 or more"],
        ),
        ({"attention": {**GQA, "yarn": {**YARN, "mscale": 1}}}, ["attention.yarn.mscale", "beta_fast"]),
        ({"d_model": "wide"}, ["d_model", "wide", "whole number"]),
        ({"d_model": True}, ["d_model", "True", "whole number"]),
        ({"tied": 1}, ["tied", "1", "true or false"]),
        ({"experts": {"n_experts": 2, "top_k": 4, "width": 8}}, ["top_k", "4", "1 to n_experts (2)"]),
        (
            {"experts": {"n_experts": 2, "top_k": 1, "width": 8, "bias_step": inf}},
            ["experts.bias_step", "inf", "finite"],
        ),
        ({"experts": {"n_experts": 2, "top_k": 1, "width": 8, "route_scale": inf}}, ["route_scale", "inf", "finite"]),
        ({"norm_eps": "1e-6"}, ["norm_eps", "'1e-6'", "3.0e-2"]),
        ({"experts": None}, ["n_dense_layers", "1", "no experts"]),
        ({"memory": {"layers": [3]}}, ["memory.layers", "(3,)", "below n_layers (3)"]),
        ({"memory": {"layers": [1, 1]}}, ["memory.layers", "distinct"]),
        ({"memory": {"rows": [5]}}, ["memory.rows", "(5,)", "(2, 3)"]),
        ({"memory": {"rows": [5, 0]}}, ["memory.rows", "(5, 0)"]),
        ({"memory": {"pad_id": 64}}, ["memory.pad_id", "64"]),
        ({"memory": {"table_dtype": "float16"}}, ["memory.table_dtype", "float16", "float32, bfloat16"]),
        ({"memory": {"kind": "cache"}}, ["memory.kind", "cache", "over_encoding"]),
        ({"memory": {"kind": "additive_bigram", "orders": [2], "rows": [5], "row_width": 7}}, ["row_width", "7", "32"]),
        ({"memory": {"d_model": 16}}, ["memory.d_model", "16", "32"]),
        ({"attention": "gqa"}, ["attention", "gqa", "mapping"]),
    ],
)
def test_a_setting_that_cannot_be_is_refused_in_one_line_that_names_it(
    changes: dict[str, Any], named: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(settings(**changes))
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in named), message


def test_a_missing_setting_is_named() -> None:
    data = settings()
    del data["d_model"]
    with pytest.raises(ConfigError, match="d_model is missing"):
        ModelConfig.from_dict(data)


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "a: [1\n", ""])
def test_a_file_that_holds_no_mapping_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"model\.yaml"):
        ModelConfig.load(path)
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        ModelConfig.load(tmp_path / "absent.yaml")


@pytest.mark.parametrize("config", [MemoryConfig(), MoEConfig(n_experts=4, top_k=2, width=8)])
def test_configs_cannot_be_changed_after_they_are_made(config: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_model = 8

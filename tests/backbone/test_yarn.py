"""YaRN turns by transformers' angles, extends a trained model from outside, and by factor 1 is plain RoPE."""

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo
from small_models import GQA, MLA, YARN, V, model_of

from engram import ConfigError
from engram.backbone import extend_context, mean_loss
from engram.backbone.rope import frequencies
from engram.config import YarnConfig
from engram.training.weights import load_model, save_model

KINDS = pytest.mark.parametrize("attention", [GQA, MLA], ids=["grouped", "latent"])


@pytest.mark.parametrize("dim", [4, 32, 64, 128])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize(("factor", "length"), [(1.0, 128), (2.0, 128), (4.0, 256), (16.0, 4096), (40.0, 4096)])
@pytest.mark.parametrize(("fast", "slow"), [(32.0, 1.0), (8.0, 2.0)])
def test_frequencies_and_temperature_are_transformers(
    dim: int, theta: float, factor: float, length: int, fast: float, slow: float
) -> None:
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    settings = {"rope_theta": theta, "factor": factor, "original_max_position_embeddings": length}
    settings |= {"beta_fast": fast, "beta_slow": slow}
    theirs = SimpleNamespace(
        rope_parameters=settings, head_dim=dim, hidden_size=dim, num_attention_heads=1, standardize_rope_params=str
    )
    expected, attention_factor = rope._compute_yarn_parameters(theirs)
    yarn = YarnConfig(factor=factor, original_max_seq_len=length, beta_fast=fast, beta_slow=slow)
    torch.testing.assert_close(frequencies(dim, theta, yarn), expected, rtol=1e-6, atol=0)
    assert yarn.attention_factor == attention_factor
    slowdown = frequencies(dim, theta, None) / frequencies(dim, theta, yarn)
    assert slowdown.min() >= 1 - 1e-6
    assert slowdown.max() <= factor * (1 + 1e-6)


@KINDS
def test_factor_1_is_plain_rope_to_the_bit(attention: dict[str, object]) -> None:
    model, ids = model_of(attention=attention), torch.randint(0, V, (2, 70))
    extended = extend_context(model, 1.0, 16)
    assert extended.config.attention.yarn is not None
    assert torch.equal(extended(ids), model(ids))


@KINDS
def test_a_model_is_extended_from_outside_and_stays_as_it_is(attention: dict[str, object]) -> None:
    model, ids = model_of(attention=attention, max_seq_len=50), torch.randint(0, V, (2, 70))
    before = model(ids)
    extended = extend_context(extend_context(model, 2.0), 2.0)
    assert extended.config.max_seq_len == 200
    made_so = model_of(attention={**attention, "yarn": {"factor": 4.0, "original_max_seq_len": 50}}, max_seq_len=200)
    assert extended.config == made_so.config
    made_so.load_state_dict(model.state_dict())
    assert torch.equal(extended(ids), made_so(ids))
    assert torch.equal(model(ids), before)
    assert not torch.allclose(extended(ids), before)
    assert all(a is b for a, b in zip(extended.parameters(), model.parameters(), strict=True))


def test_the_trained_length_may_be_shorter_than_the_configs() -> None:
    extended = extend_context(model_of(max_seq_len=64), 4.0, 32).config
    assert extended.attention.yarn == YarnConfig(factor=4.0, original_max_seq_len=32)
    assert extended.max_seq_len == 128


def test_positions_that_cannot_be_are_refused_by_the_name_of_what_the_caller_said() -> None:
    def refused(message: str, *args: Any, **model: Any) -> None:
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
            extend_context(model_of(**model), *args)

    for factor in (0.5, 0, -2.0, math.inf, math.nan):
        refused(f"factor is {factor!r}: allowed is a finite number, 1 or more", factor)
    refused("trained_seq_len is 0: allowed is 1 or more", 2.0, 0)
    extended = {**GQA, "yarn": {"factor": 1e200, "original_max_seq_len": 16}}
    refused("factor is 1e+200: allowed is one whose product with the model's own, 1e+200", 1e200, attention=extended)
    refused("factor is 0.9: allowed is a finite number", 0.9, attention=extended)
    for attention in (GQA, MLA):
        turning = {**attention, "rope_theta": 1.0}
        refused("attention.rope_theta is 1.0: allowed is above 1 with attention.yarn", 2.0, attention=turning)


def test_an_extended_model_is_saved_and_read_as_any_other(tmp_path: Path) -> None:
    extended, ids = extend_context(model_of(max_seq_len=32), 4.0), torch.randint(0, V, (2, 70))
    save_model(extended, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert loaded.config == extended.config
    assert torch.equal(loaded(ids), extended(ids))


@KINDS
def test_training_at_extended_positions_compiles_to_one_graph_with_the_same_gradients(
    attention: dict[str, object],
) -> None:
    model = model_of(attention={**attention, "yarn": YARN}, memory=None, experts=None, n_layers=1)

    def loss_of(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return mean_loss(model.run(ids).hidden, model.head_weight, targets)

    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True, dynamic=True)
    for T in (20, 60):
        ids, targets = torch.randint(0, V, (2, 3, T))
        of_both = []
        for compute in (compiled, loss_of):
            loss = compute(ids, targets)
            of_both.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
        for got, expected in zip(*of_both, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert graphs["unique_graphs"] - before == 1

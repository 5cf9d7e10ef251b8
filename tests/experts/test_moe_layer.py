"""The whole layer: against a loop over tokens in float64, and against transformers' blocks with the same weights."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DeepseekV3Config, MixtralConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from engram.config import ConfigError, MoEConfig
from engram.experts import MoE, SwiGLU

CONFIG = MoEConfig(n_experts=8, top_k=3, width=12, shared_width=20, d_model=16, score="sigmoid", route_scale=1.7)


def layer_with_random_weights(config: MoEConfig, dtype: torch.dtype = torch.float64) -> MoE:
    layer = MoE(config).to(dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    layer.router.bias.normal_(std=0.1)
    return layer


def swiglu(x: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    gate, up = (x @ w_gate_up).tensor_split(2, -1)
    return (gate * torch.sigmoid(gate) * up) @ w_down


def one_token_at_a_time(layer: MoE, x: Tensor) -> Tensor:
    """DeepSeekMoE, equations 9-11, from the layer's weights alone."""
    config, outputs = layer.config, []
    for token in x.flatten(0, 1):
        logits = layer.router.weight @ token
        scores = logits.softmax(0) if config.score == "softmax" else torch.sigmoid(logits)
        chosen = (scores + layer.router.bias).argsort()[-config.top_k :]
        norm = scores[chosen].sum() if config.normalize else 1.0
        y = torch.zeros_like(token)
        for e in chosen:
            weight = config.route_scale * scores[e] / norm
            y = y + weight * swiglu(token, layer.experts.w_gate_up[e], layer.experts.w_down[e])
        if layer.shared is not None:
            y = y + swiglu(token, layer.shared.gate_up.weight.T, layer.shared.down.weight.T)
        outputs.append(y)
    return torch.stack(outputs).view(x.shape)


def gradients(loss: Tensor, x: Tensor, layer: torch.nn.Module) -> dict[str, Tensor]:
    named = {"x": x, **dict(layer.named_parameters())}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"score": "softmax"},
        {"normalize": False},
        {"shared_width": 0},
        {"top_k": 8},
        {"top_k": 1, "n_experts": 1},
        {"width": 7, "d_model": 9},
    ],
    ids=str,
)
def test_outputs_and_all_gradients_equal_a_loop_over_tokens(changes: dict[str, Any]) -> None:
    layer = layer_with_random_weights(replace(CONFIG, **changes))
    x = torch.randn(2, 13, layer.config.d_model, dtype=torch.float64, requires_grad=True)
    seed = torch.randn(x.shape, dtype=torch.float64)
    y, expected = layer(x), one_token_at_a_time(layer, x)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(
        gradients((y * seed).sum(), x, layer), gradients((expected * seed).sum(), x, layer), rtol=1e-9, atol=1e-11
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_mixtrals_block_with_the_same_weights(dtype: torch.dtype) -> None:
    theirs = MixtralSparseMoeBlock(
        MixtralConfig(hidden_size=16, intermediate_size=12, num_local_experts=8, num_experts_per_tok=3)
    ).to(dtype)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    ours = MoE(MoEConfig(n_experts=8, top_k=3, width=12, d_model=16, score="softmax")).to(dtype)
    ours.router.weight.data.copy_(theirs.gate.weight)
    ours.experts.w_gate_up.data.copy_(theirs.experts.gate_up_proj.transpose(1, 2))
    ours.experts.w_down.data.copy_(theirs.experts.down_proj.transpose(1, 2))
    x = torch.randn(2, 40, 16, dtype=dtype, requires_grad=True)
    seed = torch.randn(x.shape, dtype=dtype)
    tolerance = {"rtol": 1e-4, "atol": 1e-4}  # Mixtral takes its softmax in float32 whatever the type
    y, expected = ours(x), theirs(x)
    torch.testing.assert_close(y, expected, **tolerance)
    result, reference = gradients((y * seed).sum(), x, ours), gradients((expected * seed).sum(), x, theirs)
    torch.testing.assert_close(result["x"], reference["x"], **tolerance)
    torch.testing.assert_close(result["router.weight"], reference["gate.weight"], **tolerance)
    torch.testing.assert_close(
        result["experts.w_gate_up"], reference["experts.gate_up_proj"].transpose(1, 2), **tolerance
    )
    torch.testing.assert_close(result["experts.w_down"], reference["experts.down_proj"].transpose(1, 2), **tolerance)


@pytest.mark.parametrize("normalize", [True, False])
def test_it_is_deepseek_v3s_block_with_the_same_weights_and_selection_bias(normalize: bool) -> None:
    theirs = DeepseekV3MoE(
        DeepseekV3Config(
            hidden_size=16,
            moe_intermediate_size=10,
            n_routed_experts=8,
            num_experts_per_tok=3,
            n_shared_experts=2,
            n_group=1,
            topk_group=1,
            norm_topk_prob=normalize,
            routed_scaling_factor=1.7,
        )
    )
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    theirs.gate.e_score_correction_bias.normal_(std=0.3)
    ours = MoE(replace(CONFIG, width=10, shared_width=20, normalize=normalize))
    assert ours.shared is not None
    ours.router.weight.data.copy_(theirs.gate.weight)
    ours.router.bias.copy_(theirs.gate.e_score_correction_bias)
    ours.experts.w_gate_up.data.copy_(theirs.experts.gate_up_proj.transpose(1, 2))
    ours.experts.w_down.data.copy_(theirs.experts.down_proj.transpose(1, 2))
    gate_up = torch.cat([theirs.shared_experts.gate_proj.weight, theirs.shared_experts.up_proj.weight])
    ours.shared.gate_up.weight.data.copy_(gate_up)
    ours.shared.down.weight.data.copy_(theirs.shared_experts.down_proj.weight)
    x = torch.randn(2, 40, 16, requires_grad=True)
    seed = torch.randn(x.shape)
    y, expected = ours(x), theirs(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    result, reference = gradients((y * seed).sum(), x, ours), gradients((expected * seed).sum(), x, theirs)
    for name, value in {
        "x": reference["x"],
        "router.weight": reference["gate.weight"],
        "experts.w_gate_up": reference["experts.gate_up_proj"].transpose(1, 2),
        "experts.w_down": reference["experts.down_proj"].transpose(1, 2),
        "shared.down.weight": reference["shared_experts.down_proj.weight"],
    }.items():
        torch.testing.assert_close(result[name], value, rtol=1e-4, atol=2e-4)
    unbiased = MoE(ours.config)
    unbiased.load_state_dict(ours.state_dict() | {"router.bias": torch.zeros(8)})
    assert not torch.allclose(unbiased(x), expected, atol=1e-2)  # the bias did change who was chosen


@settings(max_examples=25, deadline=None)
@given(permutation=st.permutations(range(24)), seed=st.integers(0, 1000))
def test_reordered_tokens_give_reordered_outputs(permutation: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    layer = layer_with_random_weights(CONFIG)
    x = torch.randn(1, 24, 16, dtype=torch.float64)
    y, stats = layer.forward_with_stats(x)
    permuted, permuted_stats = layer.forward_with_stats(x[:, permutation])
    torch.testing.assert_close(permuted, y[:, permutation], rtol=1e-12, atol=1e-12)
    assert torch.equal(stats.load_E, permuted_stats.load_E)


def test_no_token_is_dropped_when_all_choose_the_same_experts() -> None:
    layer = layer_with_random_weights(CONFIG)
    layer.router.bias.copy_(torch.tensor([0, 0, 9.0, 0, 9.0, 0, 0, 9.0]))
    x = torch.randn(2, 100, 16, dtype=torch.float64, requires_grad=True)
    y, stats = layer.forward_with_stats(x)
    assert stats.load_E.tolist() == [0, 0, 200, 0, 200, 0, 0, 200]
    assert stats.dropped == 0
    torch.testing.assert_close(y, one_token_at_a_time(layer, x), rtol=1e-11, atol=1e-12)
    y.square().sum().backward()
    assert layer.experts.w_gate_up.grad is not None
    assert layer.experts.w_gate_up.grad.flatten(1).any(1).tolist() == [load > 0 for load in stats.load_E]


@pytest.mark.parametrize(("d_model", "width"), [(32, 16), (256, 72)], ids=["small experts", "large experts"])
def test_bfloat16_autocast_is_close_to_float32(d_model: int, width: int) -> None:
    layer = MoE(replace(CONFIG, d_model=d_model, width=width))
    x = torch.randn(2, 64, d_model, requires_grad=True)
    seed = torch.randn(x.shape)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    expected = layer(x)
    assert (y - expected).norm() < 1e-2 * expected.norm()
    result, reference = gradients((y * seed).sum(), x, layer), gradients((expected * seed).sum(), x, layer)
    for name, value in reference.items():
        assert result[name].dtype == torch.float32  # master weights keep float32 gradients
        assert (result[name] - value).norm() < 2e-2 * value.norm(), name


def test_one_token_and_one_sequence_at_a_time_give_what_the_batch_gives() -> None:
    layer = layer_with_random_weights(CONFIG)
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    singly = torch.stack([torch.cat([layer(x[b : b + 1, t : t + 1]) for t in range(5)], 1)[0] for b in range(3)])
    torch.testing.assert_close(layer(x), singly, rtol=1e-11, atol=1e-12)


def test_the_selection_bias_is_saved_with_the_weights() -> None:
    layer = layer_with_random_weights(CONFIG)
    layer.update_balance(torch.tensor([9, 1, 1, 1, 1, 1, 1, 1]))
    other = MoE(CONFIG).double()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    assert layer.router.bias.count_nonzero() == 8
    assert torch.equal(other(x), layer(x))


def test_fresh_weights_keep_the_variance_of_unit_inputs() -> None:
    layer = MoE(MoEConfig(n_experts=16, top_k=2, width=512, shared_width=384, d_model=256))
    fan_in = {
        "router.weight": 256,
        "experts.w_gate_up": 256,
        "experts.w_down": 512,
        "shared.gate_up.weight": 256,
        "shared.down.weight": 384,
    }
    std = {name: float(parameter.detach().std()) for name, parameter in layer.named_parameters()}
    assert std == pytest.approx({name: n**-0.5 for name, n in fan_in.items()}, rel=0.05)


def test_a_shared_swiglu_equals_the_equation() -> None:
    layer = SwiGLU(6, 10).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    expected = swiglu(x, layer.gate_up.weight.T, layer.down.weight.T)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(gradients(layer(x).sum(), x, layer), gradients(expected.sum(), x, layer))


def test_a_config_without_a_model_width_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"experts.d_model is 0: allowed is 1 or more"):
        MoE(MoEConfig(n_experts=4, top_k=2, width=8))


def test_the_layer_compiles_into_one_graph() -> None:
    torch._dynamo.reset()
    layer = layer_with_random_weights(replace(CONFIG, balance="sequence_aux"), torch.float32)
    compiled = torch.compile(layer.forward_with_stats, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 30, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, stats = compiled(x)
    result = gradients(y.float().square().sum() + stats.aux_loss, x, layer)
    wide = MoE(layer.config).double()
    wide.load_state_dict(layer.state_dict())
    x64 = x.detach().double().requires_grad_()
    expected = one_token_at_a_time(wide, x64)
    assert (y - expected).norm() < 1e-2 * expected.norm()
    reference = gradients(expected.square().sum(), x64, wide)
    for name in ("x", "experts.w_gate_up", "experts.w_down", "shared.down.weight"):
        assert (result[name] - reference[name]).norm() < 3e-2 * reference[name].norm(), name

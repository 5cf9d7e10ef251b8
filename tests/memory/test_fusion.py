"""The fusion's weights and state, at the ends of their range; the operator's equations are in `tests/kernels`."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engram.config import GateKind, MemoryConfig
from engram.kernels.fusion import signed_sqrt
from engram.memory.fusion import Fusion

EPS = 1e-5


def fusion(**changes: object) -> Fusion:
    base: dict[str, object] = {"conv_kernel": 4, "conv_dilation": 3, "d_model": 3, "branches": 2, "norm_eps": EPS}
    return Fusion(MemoryConfig(**{**base, **changes}))  # type: ignore[arg-type]


def random_fusion(**changes: object) -> Fusion:
    module = fusion(**changes).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(0.5, 1.5)
    return module


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_the_signed_root_keeps_signs_and_is_never_below_a_thousandth_but_at_zero() -> None:
    g = torch.tensor([-4.0, -0.25, -1e-9, 0.0, 1e-9, 1e-6, 0.25, 4.0])
    torch.testing.assert_close(signed_sqrt(g), torch.tensor([-2.0, -0.5, -1e-3, 0.0, 1e-3, 1e-3, 0.5, 2.0]))


@pytest.mark.parametrize("kind", ["signed_sqrt", "plain"])
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1.0, 1e15])
def test_gates_lie_between_0_and_1_whatever_the_scale(kind: GateKind, scale: float) -> None:
    module = fusion(gate=kind, d_model=16)
    fused = module(scale * torch.randn(2, 5, 2, 16), scale * torch.randn(2, 5, 48))
    assert fused.alpha.shape == (2, 5, 2)
    assert 0 < fused.alpha.min() <= fused.alpha.max() < 1
    assert fused.out.isfinite().all()


def test_gates_in_bfloat16_are_computed_in_float32() -> None:
    module = fusion(d_model=64, branches=1, gate="plain")
    h, kv = torch.randn(2, 8, 1, 64).bfloat16(), torch.randn(2, 8, 128).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        alpha = module(h, kv).alpha
    assert alpha.dtype == torch.float32
    torch.testing.assert_close(alpha, module.double()(h.double(), kv.double()).alpha.float())


@pytest.mark.parametrize(("kernel", "dilation"), [(4, 3), (1, 2), (2, 1), (3, 7)])
def test_the_convolution_is_a_causal_depthwise_conv1d_of_normed_inputs(kernel: int, dilation: int) -> None:
    B, T, M, D = 2, 9, 2, 3
    module = random_fusion(conv_kernel=kernel, conv_dilation=dilation)
    fused_without = random_fusion(conv_kernel=0)
    fused_without.load_state_dict({k: v for k, v in module.state_dict().items() if not k.startswith("conv")})
    h, kv = double(B, T, M, D), double(B, T, (M + 1) * D)
    u = fused_without(h, kv).out
    x = F.rms_norm(u, (D,), None, EPS) * module.conv_norm
    x = F.pad(x.flatten(2).transpose(1, 2), ((kernel - 1) * dilation, 0))
    assert module.conv_weight is not None
    weight = module.conv_weight.permute(1, 2, 0).reshape(M * D, 1, kernel)
    y = F.conv1d(x, weight, groups=M * D, dilation=dilation).transpose(1, 2).unflatten(-1, (M, D))
    torch.testing.assert_close(module(h, kv).out, F.silu(y) + u)


def test_a_new_convolution_learns() -> None:
    module = fusion(d_model=5)
    module(torch.randn(2, 20, 2, 5), torch.randn(2, 20, 15)).out.square().sum().backward()
    assert module.conv_weight is not None
    assert module.conv_weight.grad is not None
    assert (module.conv_weight.grad != 0).all()


def test_positions_without_documents_do_not_read_a_state_of_another_document() -> None:
    module, h, kv = random_fusion(), double(1, 8, 2, 3), double(1, 8, 9)
    before = double(1, 20, 2, 3), double(1, 20, 9)
    _, state = module.step(*before, torch.full((1, 20), 5), module.init_state(1))
    torch.testing.assert_close(module(h, kv, None, state).out, module(h, kv).out)


def test_document_ids_may_be_int32() -> None:
    module, documents = random_fusion(), torch.tensor([[0] * 3 + [1] * 4])
    hidden, kv = double(1, 7, 2, 3), double(1, 7, 9)
    assert torch.equal(module(hidden, kv, documents.int()).out, module(hidden, kv, documents).out)


def test_a_kernel_of_0_builds_no_convolution() -> None:
    module = fusion(conv_kernel=0)
    h, kv = torch.randn(2, 5, 2, 3), torch.randn(2, 5, 9)
    assert [name for name, _ in module.named_parameters()] == ["query_norm", "key_norm"]
    fused = module(h, kv)
    torch.testing.assert_close(fused.out, fused.alpha.unsqueeze(-1) * kv[..., 6:].unsqueeze(2))


def test_kernel_and_dilation_come_from_the_config() -> None:
    module = fusion(conv_kernel=5, conv_dilation=0, orders=(2, 4), rows=(0, 0))
    assert module.conv_weight is not None
    assert module.conv_weight.shape == (5, 2, 3)
    assert module.context == 4 * 4  # dilated by the largest order
    assert fusion(conv_kernel=5, conv_dilation=7).context == 4 * 7

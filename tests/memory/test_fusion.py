"""The parts of the fusion against torch's own, at the ends of their range; `test_layer.py` has the equations."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engram.config import GateKind, MemoryConfig
from engram.memory.fusion import Gate, NoConv, ShortConv, build_conv, rms_normalize, signed_sqrt

EPS = 1e-5


def random_conv(branches: int = 2, d_model: int = 3, kernel: int = 4, dilation: int = 3) -> ShortConv:
    conv = ShortConv(branches, d_model, kernel, dilation, EPS).double()
    with torch.no_grad():
        conv.weight.normal_()
        conv.norm.uniform_(0.5, 1.5)
    return conv


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_norms_are_those_of_torch() -> None:
    x, weight = double(4, 5, 8), double(8)
    torch.testing.assert_close(rms_normalize(x, weight, EPS), F.rms_norm(x, (8,), weight, EPS))


def test_the_signed_root_keeps_signs_and_is_never_below_a_thousandth_but_at_zero() -> None:
    g = torch.tensor([-4.0, -0.25, -1e-9, 0.0, 1e-9, 1e-6, 0.25, 4.0])
    torch.testing.assert_close(signed_sqrt(g), torch.tensor([-2.0, -0.5, -1e-3, 0.0, 1e-3, 1e-3, 0.5, 2.0]))


@pytest.mark.parametrize("kind", ["signed_sqrt", "plain"])
def test_gates_lie_between_0_and_1_whatever_the_scale(kind: GateKind) -> None:
    for scale in (0.0, 1e-20, 1.0, 1e15):
        h, k = scale * torch.randn(2, 5, 2, 16), scale * torch.randn(2, 5, 2, 16)
        alpha = Gate(2, 16, kind, EPS)(h, k)
        assert alpha.shape == (2, 5, 2)
        assert 0 < alpha.min() <= alpha.max() < 1


def test_a_gate_in_bfloat16_is_computed_in_float32() -> None:
    gate = Gate(1, 64, "plain", EPS)
    h, k = torch.randn(2, 8, 1, 64).bfloat16(), torch.randn(2, 8, 1, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        alpha = gate(h, k)
    assert alpha.dtype == torch.float32
    torch.testing.assert_close(alpha, gate.double()(h.double(), k.double()).float())


@pytest.mark.parametrize(("kernel", "dilation"), [(4, 3), (1, 2), (2, 1), (3, 7)])
def test_the_convolution_is_a_causal_depthwise_conv1d_of_normed_inputs(kernel: int, dilation: int) -> None:
    B, T, M, D = 2, 9, 2, 3
    conv, u = random_conv(M, D, kernel, dilation), double(B, T, M, D)
    x = F.rms_norm(u, (D,), None, EPS) * conv.norm
    x = F.pad(x.flatten(2).transpose(1, 2), ((kernel - 1) * dilation, 0))
    weight = conv.weight.permute(1, 2, 0).reshape(M * D, 1, kernel)
    y = F.conv1d(x, weight, groups=M * D, dilation=dilation).transpose(1, 2).unflatten(-1, (M, D))
    torch.testing.assert_close(conv(u)[0], F.silu(y) + u)


def test_a_new_convolution_learns() -> None:
    conv = ShortConv(2, 5, 4, 3, EPS)
    conv(torch.randn(2, 20, 2, 5))[0].square().sum().backward()
    assert conv.weight.grad is not None
    assert (conv.weight.grad != 0).all()


def test_positions_without_documents_do_not_read_a_state_of_another_document() -> None:
    conv, u = random_conv(), double(1, 8, 2, 3)
    _, state = conv(double(1, 20, 2, 3), torch.full((1, 20), 5))
    torch.testing.assert_close(conv(u, None, state)[0], conv(u)[0])


def test_a_kernel_of_0_builds_no_convolution() -> None:
    config = MemoryConfig(conv_kernel=0, d_model=3, branches=2)
    conv, u = build_conv(config), torch.randn(2, 5, 2, 3)
    assert isinstance(conv, NoConv)
    assert list(conv.parameters()) == []
    assert torch.equal(conv(u)[0], u)


def test_kernel_and_dilation_come_from_the_config() -> None:
    conv = build_conv(MemoryConfig(conv_kernel=5, orders=(2, 4), rows=(0, 0), d_model=3, branches=2))
    assert isinstance(conv, ShortConv)
    assert conv.weight.shape == (5, 2, 3)
    assert conv.context == 4 * 4  # dilated by the largest order
    wider = build_conv(MemoryConfig(conv_kernel=5, conv_dilation=7, d_model=3, branches=2))
    assert isinstance(wider, ShortConv)
    assert wider.context == 4 * 7

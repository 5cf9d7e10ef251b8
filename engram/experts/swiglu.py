"""The gated feed-forward map that shared experts and dense blocks are (arXiv:2002.05202)."""

from torch import Tensor, nn

from engram.kernels import load_kernels, swiglu


class SwiGLU(nn.Module):
    """down(silu(gate x) * (up x)), without biases; gate and up are one product.

    Starts with N(0, 1/fan-in) weights; a model scales the output map down with its depth.
    """

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        load_kernels()
        self.gate_up = nn.Linear(d_model, 2 * width, bias=False)
        self.down = nn.Linear(width, d_model, bias=False)
        nn.init.normal_(self.gate_up.weight, std=d_model**-0.5)
        nn.init.normal_(self.down.weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d]` -> `[..., d]`."""
        return self.down(swiglu(self.gate_up(x)))

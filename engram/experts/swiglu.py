"""The gated feed-forward map that shared experts and dense blocks are (arXiv:2002.05202)."""

from torch import Tensor, nn

from engram.kernels import load_kernels, swiglu


class SwiGLU(nn.Module):
    """down(silu(gate x) * (up x)), without biases; gate and up are one product.

    Starts with N(0, 1/fan-in) weights, those of the output map times `output_scale`.
    """

    def __init__(self, d_model: int, width: int, output_scale: float = 1.0) -> None:
        super().__init__()
        load_kernels()
        self.gate_up = nn.Linear(d_model, 2 * width, bias=False)
        self.down = nn.Linear(width, d_model, bias=False)
        self.output_scale = output_scale
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both maps anew."""
        nn.init.normal_(self.gate_up.weight, std=self.gate_up.in_features**-0.5)
        nn.init.normal_(self.down.weight, std=self.output_scale * self.down.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d]` -> `[..., d]`."""
        return self.down(swiglu(self.gate_up(x)))

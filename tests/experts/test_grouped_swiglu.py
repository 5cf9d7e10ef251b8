"""The grouped product against a loop over experts in float64, gradients included: by the kernel, and by every product
that stands in for it."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engram.experts.grouped import blockwise_product, grouped_product, grouped_swiglu, lay_out
from engram.kernels import has_grouped_swiglu
from engram.kernels.grouped_swiglu import grouped_swiglu_backward_reference, grouped_swiglu_reference

# Type, d, F, relative error allowed, the product these sizes are to choose without the kernel.
CASES = [
    pytest.param(torch.float64, 16, 8, 1e-12, blockwise_product, id="float64"),
    pytest.param(torch.float32, 16, 8, 2e-6, blockwise_product, id="float32"),
    pytest.param(torch.float32, 10, 7, 2e-6, blockwise_product, id="float32-odd-widths"),
    pytest.param(torch.bfloat16, 32, 16, 1.5e-2, blockwise_product, id="bfloat16-small-experts"),
    pytest.param(torch.bfloat16, 256, 72, 1.5e-2, grouped_product, id="bfloat16-large-experts"),
    pytest.param(torch.bfloat16, 18, 7, 1.5e-2, blockwise_product, id="bfloat16-widths-grouped_mm-refuses"),
]

Inputs = dict[str, Tensor]
Squash = Callable[[Tensor], Tensor]


@pytest.fixture(params=[True, False], ids=["kernel", "products"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the kernel is used."""
    if not request.param:
        without_kernel(monkeypatch)
    return bool(request.param) and has_grouped_swiglu("cpu", torch.float32, 16, 8)


def without_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engram.experts.grouped.has_grouped_swiglu", lambda *of: False)


def loop_over_experts(
    x: Tensor, experts: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor, squash: Squash = torch.sigmoid
) -> Tensor:
    """The definition, one expert at a time, each on the tokens that chose it."""
    width = w_down.shape[1]
    y = torch.zeros_like(x)
    for e in range(len(w_down)):
        token, slot = torch.where(experts == e)
        gate = x[token] @ w_gate_up[e, :, :width]
        up = x[token] @ w_gate_up[e, :, width:]
        out = (gate * squash(gate) * up) @ w_down[e]
        y = y.index_add(0, token, weights[token, slot, None] * out)
    return y


def random_inputs(dtype: torch.dtype, N: int, E: int, D: int, width: int, K: int) -> tuple[Inputs, Tensor]:
    """Values that `dtype` holds exactly, in float64, and distinct experts for each token."""
    draw = lambda *shape: torch.randn(shape).to(dtype).double()  # noqa: E731
    inputs = {
        "x": draw(N, D),
        "weights": torch.rand(N, K).to(dtype).double(),
        "w_gate_up": draw(E, D, 2 * width) / 4,
        "w_down": draw(E, width, D) / 4,
    }
    return inputs, torch.rand(N, E).topk(K).indices


def outputs_and_gradients(ours: bool, inputs: Inputs, experts: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    leaves = {name: value.to(dtype, copy=True).requires_grad_() for name, value in inputs.items()}
    if ours:
        load = torch.bincount(experts.flatten(), minlength=len(leaves["w_down"]))
        x, weights, w_gate_up, w_down = leaves.values()
        y = grouped_swiglu(x, experts, weights, load, w_gate_up, w_down)
    else:
        y = loop_over_experts(experts=experts, **leaves)
    generator = torch.Generator().manual_seed(1)
    y.backward(torch.randn(y.shape, generator=generator).to(torch.bfloat16).to(y.dtype))
    return {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def magnitudes(inputs: Inputs, experts: Tensor) -> dict[str, float]:
    """Norms of outputs and gradients in which all terms have one sign: what rounding of a sum's terms goes by."""
    leaves = {name: value.abs().requires_grad_() for name, value in inputs.items()}
    y = loop_over_experts(experts=experts, squash=torch.ones_like, **leaves)
    y.backward(torch.ones_like(y))
    return {"y": float(y.detach().norm())} | {
        name: float(leaf.grad.norm()) for name, leaf in leaves.items() if leaf.grad is not None
    }


def assert_equals_loop(
    inputs: Inputs, experts: Tensor, dtype: torch.dtype, error: float, terms: dict[str, float] | None = None
) -> None:
    """`error` is relative to the norm; with `terms`, of `magnitudes`, their rounding may come on top: where there are
    few of them they may all but cancel."""
    expected = outputs_and_gradients(False, inputs, experts, torch.float64)
    result = outputs_and_gradients(True, inputs, experts, dtype)
    assert result.keys() == expected.keys() == {"y", "x", "weights", "w_gate_up", "w_down"}
    for name, value in expected.items():
        assert result[name].dtype == dtype
        rounding = 2 * torch.finfo(dtype).eps * terms[name] if terms else 0.0
        assert (result[name].double() - value).norm() <= error * value.norm() + rounding, name


@pytest.mark.parametrize(("dtype", "D", "width", "error", "product"), CASES)
def test_outputs_and_all_gradients_equal_a_loop_over_experts(
    dtype, D, width, error, product, kernel, monkeypatch
) -> None:
    used = []
    for name in ("grouped_product", "blockwise_product"):
        original = globals()[name]
        monkeypatch.setattr(
            f"engram.experts.grouped.{name}", lambda *args, f=original: used.append(f) or f(*args), raising=True
        )
    inputs, experts = random_inputs(dtype, N=211, E=7, D=D, width=width, K=3)
    assert_equals_loop(inputs, experts, dtype, error)
    assert used == [] if kernel and has_grouped_swiglu("cpu", dtype, D, width) else [product, product]


@pytest.mark.parametrize(("dtype", "D", "width", "error", "product"), CASES)
def test_all_tokens_on_the_same_experts_lose_nothing(dtype, D, width, error, product, kernel) -> None:
    inputs, _ = random_inputs(dtype, N=300, E=9, D=D, width=width, K=2)
    experts = torch.tensor([8, 3]).expand(300, 2)
    assert_equals_loop(inputs, experts, dtype, error)
    gradients = outputs_and_gradients(True, inputs, experts, dtype)
    idle = [0, 1, 2, 4, 5, 6, 7]
    assert gradients["w_gate_up"][idle].count_nonzero() == 0
    assert gradients["w_down"][idle].count_nonzero() == 0
    assert all(gradients[w][e].count_nonzero() > 0 for w in ("w_gate_up", "w_down") for e in (3, 8))


@settings(max_examples=40, deadline=None)
@given(
    N=st.integers(1, 40),
    E=st.integers(1, 9),
    K=st.integers(1, 4),
    D=st.integers(1, 40),
    width=st.integers(1, 40),
    seed=st.integers(0, 2**20),
)
@example(N=1, E=1, K=1, D=26, width=1, seed=0)  # products that cancel
def test_any_numbers_equal_the_loop(N: int, E: int, K: int, D: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    for dtype, error in ((torch.float64, 1e-12), (torch.float32, 5e-6)):
        inputs, experts = random_inputs(dtype, N, E, D, width, K=min(K, E))
        terms = magnitudes(inputs, experts)
        assert_equals_loop(inputs, experts, dtype, error, terms)
        with pytest.MonkeyPatch.context() as monkeypatch:
            without_kernel(monkeypatch)
            assert_equals_loop(inputs, experts, dtype, error, terms)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("D", "width", "tokens"), [(130, 70, 700), (65, 33, 40), (3, 1, 5), (0, 4, 5), (4, 0, 5)])
def test_the_kernel_is_its_reference_over_panels_and_blocks_of_rows(dtype, D, width, tokens) -> None:
    inputs, experts = random_inputs(dtype, N=tokens, E=3, D=D, width=width, K=2)
    place, copy, ends, _ = lay_out(experts, torch.bincount(experts.flatten(), minlength=3), 1)
    x, weights, w_gate_up, w_down = (value.to(dtype) for value in inputs.values())
    arguments = (x, weights, place, copy, ends, w_gate_up, w_down)
    error = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
    out, gate_up = torch.ops.engram.grouped_swiglu(*arguments)
    grad = torch.randn(x.shape).to(dtype)
    ours = (out, gate_up, *torch.ops.engram.grouped_swiglu_backward(grad, *arguments, gate_up))
    theirs = (
        *grouped_swiglu_reference(*arguments),
        *grouped_swiglu_backward_reference(grad, *arguments, gate_up),
    )
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        assert (one.double() - other.double()).norm() <= error * other.double().norm()


def test_matrices_may_be_wider_than_tokens_and_so_are_their_gradients() -> None:
    inputs, experts = random_inputs(torch.bfloat16, N=90, E=4, D=24, width=12, K=2)
    load = torch.bincount(experts.flatten(), minlength=4)
    leaves = [value.to(torch.float32).requires_grad_() for value in inputs.values()]
    x, weights, w_gate_up, w_down = leaves
    y = grouped_swiglu(x.bfloat16(), experts, weights, load, w_gate_up, w_down)
    grad = torch.randn(y.shape).bfloat16()
    exact = [value.requires_grad_() for value in inputs.values()]
    expected = loop_over_experts(exact[0], experts, *exact[1:])
    wanted = torch.autograd.grad(expected, exact, grad.double())
    assert (y.double() - expected).norm() <= 1e-2 * expected.norm()
    for ours, right in zip(torch.autograd.grad(y, leaves, grad), wanted, strict=True):
        assert ours.dtype == torch.float32
        assert (ours.double() - right).norm() <= 1e-2 * right.norm()


def test_the_operator_keeps_its_promises_to_the_compiler() -> None:
    inputs, experts = random_inputs(torch.float32, N=9, E=3, D=4, width=2, K=2)
    place, copy, ends, _ = lay_out(experts, torch.bincount(experts.flatten(), minlength=3), 1)
    x, weights, w_gate_up, w_down = (value.float().requires_grad_() for value in inputs.values())
    arguments = (x, weights, place, copy, ends, w_gate_up, w_down)
    torch.library.opcheck(torch.ops.engram.grouped_swiglu.default, arguments)


@settings(max_examples=60, deadline=None)
@given(
    N=st.integers(1, 50),
    E=st.integers(1, 12),
    K=st.integers(1, 4),
    multiple=st.sampled_from([1, 8, 64]),
    data=st.data(),
)
def test_a_layout_gives_every_copy_one_row_among_its_experts_rows(
    N: int, E: int, K: int, multiple: int, data: st.DataObject
) -> None:
    chosen = data.draw(st.lists(st.integers(0, E - 1), min_size=N * K, max_size=N * K))
    experts = torch.tensor(chosen).view(N, K)
    layout = lay_out(experts, torch.tensor([chosen.count(e) for e in range(E)]), multiple)
    ends = layout.ends_E.tolist()
    starts = [0, *ends[:-1]]
    assert [(end - start) % multiple for start, end in zip(starts, ends, strict=True)] == [0] * E
    rows = layout.place_NK.flatten().tolist()
    assert len(set(rows)) == N * K
    assert all(starts[e] <= row < ends[e] for e, row in zip(chosen, rows, strict=True))
    expected = [N * K] * ends[-1]
    for copy, row in enumerate(rows):
        expected[row] = copy
    assert layout.copy_P.tolist() == expected
    assert ends[-1] - N * K <= len(set(chosen)) * (multiple - 1)


def test_gradients_are_those_of_finite_differences(kernel) -> None:
    inputs, experts = random_inputs(torch.float64, N=5, E=3, D=4, width=2, K=2)
    load = torch.bincount(experts.flatten(), minlength=3)
    x, weights, w_gate_up, w_down = (value.requires_grad_() for value in inputs.values())
    assert torch.autograd.gradcheck(
        lambda x, w, a, b: grouped_swiglu(x, experts, w, load, a, b), (x, weights, w_gate_up, w_down)
    )


@pytest.mark.parametrize(("dtype", "D", "width", "error", "product"), CASES)
def test_a_compiled_graph_has_room_for_any_routing(dtype, D, width, error, product, kernel) -> None:
    """Shapes must not depend on the routing: one graph, traced on one routing, serves the worst one."""
    torch._dynamo.reset()
    compiled = torch.compile(grouped_swiglu, fullgraph=True, dynamic=False, backend="aot_eager")
    inputs, experts = random_inputs(dtype, N=35, E=6, D=D, width=width, K=2)
    x, weights, w_gate_up, w_down = (value.to(dtype) for value in inputs.values())
    most_padding = torch.tensor([0] * 65 + [1, 2, 3, 4, 5]).view(35, 2)  # each load one above a multiple of 64
    one_expert = torch.full((35, 2), 5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for routing in (experts, most_padding, one_expert):
            load = torch.bincount(routing.flatten(), minlength=6)
            y = compiled(x, routing, weights, load, w_gate_up, w_down)
            expected = loop_over_experts(experts=routing, **inputs)
            assert (y.double() - expected).norm() <= error * expected.norm()

"""Every kernel compiles for an H100, as it is launched: what the interpreter accepts, Triton's compiler may not.

No device is needed: a launch is caught and its kernel compiled down to machine code, but not run.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from engram.kernels.triton import (  # noqa: E402
    elsewhere,
    fusion_backward,
    fusion_forward,
    fusion_forward_taps,
    hashing,
    launch,
    layout,
    loss,
    norm,
    register,
    rotate,
    routing,
    rows,
    sinkhorn,
    spread,
    swiglu,
)

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


def type_of(x: Any) -> str:
    if isinstance(x, Tensor):
        return TYPES[x.dtype]
    return "fp32" if isinstance(x, float) else "i32" if -(2**31) <= x < 2**31 else "i64"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What has been compiled, instead of launched, since the test began."""
    kernels: list[Any] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in list(kwargs) if name not in self.arg_names}
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        fixed = {p.name for p in self.params if p.is_constexpr} | {name for name, x in given.items() if x is None}
        signature = {n: "constexpr" if n in fixed else type_of(given[n]) for n in self.arg_names}
        places = {name: (i,) for i, name in enumerate(self.arg_names)}
        told = {p.name for p in self.params if not p.do_not_specialize and isinstance(given[p.name], int)}
        known = {n for n, t in signature.items() if t[0] == "*" or (t[0] == "i" and n in told and given[n] % 16 == 0)}
        aligned = {places[n]: [["tt.divisibility", 16]] for n in known}
        source = ASTSource(self, signature, {places[n]: given[n] for n in fixed}, aligned)
        kernels.append(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options))

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", run)
    return kernels


@pytest.mark.parametrize(
    ("M", "D", "taps", "packed", "past", "hidden", "kv"),
    [
        (4, 2560, 4, True, 0, torch.bfloat16, torch.bfloat16),
        (3, 300, 3, True, 9, torch.float32, torch.bfloat16),
        (1, 24, 0, False, 0, torch.float32, torch.float32),
        (3, 30, 0, True, 0, torch.bfloat16, torch.float32),
        (2, 64, 1, False, 0, torch.float32, torch.float32),
    ],
)
@pytest.mark.parametrize("bulk", [True, False])
def test_fusion(
    M: int,
    D: int,
    taps: int,
    packed: bool,
    past: int,
    hidden: torch.dtype,
    kv: torch.dtype,
    bulk: bool,
    compiled: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "machine", lambda device: launch.Machine(132, 50 * 2**20, bulk))
    monkeypatch.setattr(fusion_forward_taps, "_MANY", 1 if bulk else 100)
    B, T = 2, 5
    inputs: list[Any] = [
        torch.randn(B, T, M, D, dtype=hidden),
        torch.randn(B, T, (M + 1) * D, dtype=kv),
        torch.ones(M, D),
        torch.ones(M, D),
        torch.ones(M, D) if taps else None,
        torch.randn(taps, M, D) if taps else None,
        torch.zeros(B, past + T, dtype=torch.int64) if packed else None,
        torch.randn(B, past, D, dtype=kv) if past else None,
        torch.rand(B, past, M) if past else None,
    ]
    settings = (1e-5, True, 3, True)
    out, alpha, stats = fusion_forward.fuse_memory_triton(*inputs, *settings)
    fusion_backward.fuse_memory_backward_triton(out, alpha, *inputs, alpha, stats, *settings)
    assert len(compiled) == (8 + bulk if taps else 3)
    assert all(kernel.asm["cubin"] for kernel in compiled)
    pieces = all(D * dtype.itemsize % 16 == 0 for dtype in (hidden, kv))  # what is asked for at once comes in such
    assert any("cp.async.bulk.prefetch" in kernel.asm["ptx"] for kernel in compiled) == (bulk and pieces)


@pytest.mark.parametrize(
    ("T", "M", "D", "taps", "packed", "past", "hidden", "kv"),
    [
        (1, 1, 2560, 4, True, 9, torch.bfloat16, torch.bfloat16),
        (3, 4, 7168, 4, True, 9, torch.bfloat16, torch.bfloat16),
        (2, 3, 33, 15, True, 60, torch.float32, torch.bfloat16),
        (3, 2, 64, 1, False, 0, torch.float32, torch.float32),
    ],
)
def test_fusion_in_decoding(
    T: int,
    M: int,
    D: int,
    taps: int,
    packed: bool,
    past: int,
    hidden: torch.dtype,
    kv: torch.dtype,
    compiled: list[Any],
) -> None:
    """Up to as many tokens as the dilation."""
    norms = [torch.ones(M, D) for _ in range(3)]
    fusion_forward.fuse_memory_triton(
        torch.randn(2, T, M, D, dtype=hidden),
        torch.randn(2, T, (M + 1) * D, dtype=kv),
        *norms,
        torch.randn(taps, M, D),
        torch.zeros(2, past + T, dtype=torch.int64) if packed else None,
        torch.randn(2, past, D, dtype=kv) if past else None,
        torch.rand(2, past, M) if past else None,
        1e-5,
        True,
        3,
        True,
    )
    assert len(compiled) == 1  # one launch
    assert compiled[0].asm["cubin"]
    assert compiled[0].metadata.name == "_steps_kernel"


def test_hashing(compiled: list[Any]) -> None:
    ids, moduli = torch.zeros(2, 9, dtype=torch.int64), torch.arange(1, 33).view(2, 16)
    arguments = (moduli, moduli - 1, 1, [3, 2**40 + 1, 5], [2, 3], 1, 2)
    hashing.hash_ngrams_triton(ids, None, *arguments, -1, 9)
    hashing.hash_gather_triton(ids, ids, *arguments, 3, 9, torch.randn(40, 80).bfloat16())
    assert len(compiled) == 2


@pytest.mark.parametrize(("dtype", "run"), [(torch.float32, 16), (torch.bfloat16, 64)])
def test_rows(dtype: torch.dtype, run: int, compiled: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    grads = torch.randn(300, 80).to(dtype)
    monkeypatch.setattr(rows, "_run", lambda n: run)
    rows.combine_rows_triton(torch.zeros(300, dtype=torch.int64), grads)
    assert len(compiled) == 5
    rows._combine(torch.zeros(300, dtype=torch.int64), grads)  # as row numbers beyond 32 bits are
    assert len(compiled) == 9
    table, numbers = torch.randn(9, 80).to(dtype), torch.arange(9)
    for beta1, kept in ((0.9, 161), (0.0, 2)):
        rows.row_adam_triton_(table, torch.zeros(9, kept), numbers, grads[:9], 1, 0.1, beta1, 0.95, 1e-8, 3)
    assert len(compiled) == 11
    rows.gather_rows_triton(table, numbers)
    assert len(compiled) == 12
    assert all(kernel.asm["cubin"] for kernel in compiled)


def test_rows_picked_from_elsewhere(compiled: list[Any]) -> None:
    rows, slots = torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 5, dtype=torch.int64)
    for row_bytes in (160, 84, 7):
        table = torch.zeros(9, row_bytes, dtype=torch.uint8)
        assert elsewhere.pick_rows_triton(table, slots, table, rows).shape == (2, 5, row_bytes)
    assert len(compiled) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu(dtype: torch.dtype, compiled: list[Any]) -> None:
    x, weights = torch.randn(5, 96).to(dtype), torch.rand(5)
    out = swiglu.swiglu_triton(x, weights)
    swiglu.swiglu_backward_triton(out, x, weights)
    swiglu.swiglu_again_triton(out, x, weights)
    assert len(compiled) == 3


@pytest.mark.parametrize(("E", "k", "sigmoid"), [(128, 8, True), (5, 3, False), (4096, 1, False)])
def test_routing(E: int, k: int, sigmoid: bool, compiled: list[Any]) -> None:
    logits = torch.randn(70, E)
    weights, experts, _, _ = routing.route_triton(logits, torch.zeros(E), k, sigmoid, True, 1.0)
    routing.route_backward_triton(weights, logits, experts, sigmoid, True, 1.0)
    assert len(compiled) == 2


@pytest.mark.parametrize(("N", "E"), [(700, 128), (3, 5), (3, 4096)])
def test_layout(N: int, E: int, compiled: list[Any]) -> None:
    layout.lay_out_triton(torch.zeros(N, 8, dtype=torch.int64), torch.zeros(E, dtype=torch.int64), 8, True)
    assert len(compiled) == 3


@pytest.mark.parametrize(("D", "K", "dtype"), [(2048, 8, torch.bfloat16), (24, 11, torch.float32)])
def test_spreading(D: int, K: int, dtype: torch.dtype, compiled: list[Any]) -> None:
    place = torch.zeros(9, K, dtype=torch.int64)
    spread.sum_rows_triton(spread.spread_triton(torch.randn(9, D).to(dtype), place), place)
    assert len(compiled) == 2


@pytest.mark.parametrize("D", [2048, 2560, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms(D: int, dtype: torch.dtype, compiled: list[Any]) -> None:
    x, weight = torch.randn(5, D).to(dtype), torch.ones(D)
    y, inverse = norm.rms_norm_triton(x, weight, 1e-6)
    norm.rms_norm_backward_triton(y, x, weight, inverse)
    assert len(compiled) == 3
    assert all(kernel.asm["cubin"] for kernel in compiled)


@pytest.mark.parametrize("c", [128, 64, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_turned_heads(c: int, dtype: torch.dtype, compiled: list[Any]) -> None:
    x, cos, sin = torch.randn(2, 5, 7, c).to(dtype)[:, :, 1:5], torch.ones(5, c // 2), torch.zeros(5, c // 2)
    for weight in (torch.ones(c), None):
        y, inverse = rotate.norm_rotate_triton(x, weight, cos, sin, 1e-6)
        rotate.norm_rotate_backward_triton(y, x, weight, cos, sin, inverse)
    assert len(compiled) == 5
    assert all(kernel.asm["cubin"] for kernel in compiled)


@pytest.mark.parametrize("V", [2048, 32768, 50257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy(V: int, dtype: torch.dtype, compiled: list[Any]) -> None:
    loss.cross_entropy_triton_(torch.randn(2, V).to(dtype), torch.zeros(2, dtype=torch.int64))
    assert len(compiled) == 1
    assert all(kernel.asm["cubin"] for kernel in compiled)


@pytest.mark.parametrize(("M", "stream"), [(4, torch.float32), (3, torch.bfloat16)])
def test_hyper_connections(M: int, stream: torch.dtype, compiled: list[Any]) -> None:
    logits, weights = torch.randn(5, M, M), torch.rand(5, M)
    hidden, update = torch.randn(5, M, 300).to(stream), torch.randn(5, 300).bfloat16()
    sinkhorn.sinkhorn_backward_triton(sinkhorn.sinkhorn_triton(logits, 20), logits, 20)
    sinkhorn.read_branches_backward_triton(sinkhorn.read_branches_triton(hidden, weights), hidden, weights)
    out = sinkhorn.write_branches_triton(hidden, update, weights, logits)
    sinkhorn.write_branches_backward_triton(out, hidden, update, weights, logits)
    assert len(compiled) == 6
    assert all(kernel.asm["cubin"] for kernel in compiled)


@pytest.mark.parametrize(
    "name",
    [
        "hash_ngrams",
        "hash_gather",
        "fuse_memory",
        "row_adam_",
        "pick_rows",
        "swiglu_backward",
        "grouped_swiglu",
        "lay_out_rows",
        "norm_rotate",
        "rms_norm",
        "route",
    ],
)
def test_operators_have_a_kernel_for_cuda(name: str) -> None:
    assert register()
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"engram::{name}", "CUDA")

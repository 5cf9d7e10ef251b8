"""The Triton kernels on one CUDA device: bytes that must move against the device's copy rate, and times of peers.

Peers are each kernel's reference in plain torch, the same under `torch.compile`, and `tile-kernels` where it imports
(it has the hash and the gate without convolution). Every call starts with a cold L2 cache, its launches queued behind a
pause of the device, so that the host's time does not count; sides alternate, and the median counts. Bytes that a design
moves beyond the least (a second pass) lower its rate: `moved` says how many times the least they are. The rate
is that of a copy of 2 GiB; a copy of no more bytes than a kernel must move takes longer for each (`as large`).
`python benchmarks/gpu_kernels.py`
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from harness import Call, alternate_on_gpu, copy_rate, gpu_hardware, store
from torch import Tensor

from engram.kernels import fusion, hashing, loss, norm, rows
from engram.kernels.swiglu import swiglu_backward_reference, swiglu_reference

HIDDEN = (2560, 4096)
TOKENS = (4096, 8192, 16384, 32768)
BRANCHES = 4
TAPS, DILATION, EPS = 4, 3, 1e-5
ORDERS, HEADS = [2, 3], 16
IDS = 100_000
TABLE_ROWS = 2_000_000
EXPERTS_PER_TOKEN, EXPERT_WIDTH = 8, 768
HEAD_WIDTH, BESIDE = 128, 8  # channels of a query head; heads of keys and values that lie beside a token's queries
CHUNK_LOGITS = 2**26  # as in the loss of a model
SEQUENCE = 4096
COMPILE_LIMIT = 64
BF16 = {"dtype": torch.bfloat16, "device": "cuda"}


class Case(NamedTuple):
    """One kernel at one size: bytes that must move and that its design moves, and how to call each side."""

    kernel: str
    hidden: int
    tokens: int
    least: int
    moved: int
    ours: Call
    eager: Call
    compiled: Call | str
    tile: Call | str
    checked: bool = True


# inputs and cases


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled once for all token counts."""
    return _COMPILED.setdefault(function, torch.compile(function, dynamic=True))


_COMPILED: dict[Callable[..., Any], Callable[..., Any]] = {}


def sides(ours: Callable[..., Any], reference: Callable[..., Any], arguments: list[Any]) -> dict[str, Call]:
    return {
        "ours": lambda: ours(*arguments),
        "eager": lambda: reference(*arguments),
        "compiled": lambda: compiled(reference)(*arguments),
    }


def peer(name: str) -> Any:
    """A module of tile-kernels, or why there is none."""
    try:
        return importlib.import_module(f"tile_kernels.{name}")
    except Exception as error:  # whatever the peer raises, the other comparisons go on
        return f"no tile-kernels ({type(error).__name__}: {error})"


def hash_cases(D: int, N: int) -> Iterator[Case]:
    from engram.kernels.triton.gather import hash_gather_reference
    from engram.kernels.triton.hashing import hash_gather_triton, hash_ngrams_triton
    from engram.kernels.triton.rows import gather_rows_triton

    W = D // 32  # all rows of a token are d / 2 wide, as in the paper
    ids = torch.randint(0, IDS, (N // SEQUENCE, SEQUENCE), device="cuda")
    step = TABLE_ROWS // HEADS
    moduli = torch.tensor([step - 2 * h - 1 for h in range(HEADS)], device="cuda")
    offsets = torch.arange(HEADS, device="cuda") * step
    multipliers = [2**40 + 15, 2**41 + 27, 2**42 + 15]
    arguments = [ids, None, moduli[None], offsets[None], 0, multipliers, ORDERS, 0, 2, -1, IDS]
    least = N * (8 + 8 * HEADS)
    tile = peer("engram")
    if not isinstance(tile, str):
        windows = torch.stack([ids.roll(back, 1).flatten() for back in range(3)], 1).int().contiguous()
        sizes = moduli.int().view(1, len(ORDERS), HEADS // len(ORDERS))
        numbers = (windows, torch.tensor([multipliers], device="cuda"), sizes, offsets.int().view(1, -1))
        tile = (lambda module: lambda: module.engram_hash(*numbers))(tile)
    made = sides(hash_ngrams_triton, hashing.hash_ngrams_reference, arguments)
    yield Case("hash", D, N, least, least, **made, tile=tile)
    table = torch.randn(TABLE_ROWS, W, **BF16)
    least += N * HEADS * W * 2 * 2
    made = sides(hash_gather_triton, hash_gather_reference, [*arguments, table])
    yield Case("hash + gather", D, N, least, least, **made, tile="-")
    found = hash_ngrams_triton(*arguments)
    least = N * HEADS * (8 + W * 2 * 2)
    made = sides(gather_rows_triton, rows.gather_rows_reference, [table, found])
    yield Case("gather rows", D, N, least, least, **made, tile="-")


def fusion_cases(D: int, N: int) -> Iterator[Case]:
    from engram.kernels.triton.fusion_backward import fuse_memory_backward_triton
    from engram.kernels.triton.fusion_forward import fuse_memory_triton

    M, row = BRANCHES, 2 * D * N
    shape = (N // SEQUENCE, SEQUENCE)
    hidden, kv = torch.randn(*shape, M, D, **BF16), torch.randn(*shape, (M + 1) * D, **BF16)
    grad = torch.randn_like(hidden)
    query, key, norm = (1 + 0.1 * torch.randn(M, D, **BF16) for _ in range(3))
    weight = torch.randn(TAPS, M, D, **BF16)
    settings = [EPS, True, DILATION, True]
    for name, convolution, backward in (("gate", [None, None], 5 * M + 2), ("gate + conv", [norm, weight], 6 * M + 5)):
        inputs = [hidden, kv, query, key, *convolution, None, None, None]
        tiles = tile_gate(hidden, kv, query, key, grad) if name == "gate" else ("-", "-")
        made = sides(fuse_memory_triton, fusion.fuse_memory_reference, [*inputs, *settings])
        yield Case(f"{name}, forward", D, N, (3 * M + 1) * row, (3 * M + 1) * row, **made, tile=tiles[0])
        _, alpha, stats = fuse_memory_triton(*inputs, *settings)
        arguments = [grad, None, *inputs, alpha, stats, *settings]
        made = sides(fuse_memory_backward_triton, fusion.fuse_memory_backward_reference, arguments)
        yield Case(f"{name}, backward", D, N, (5 * M + 2) * row, backward * row, **made, tile=tiles[1])


def tile_gate(hidden: Tensor, kv: Tensor, query: Tensor, key: Tensor, grad: Tensor) -> tuple[Call | str, Call | str]:
    """The peer's gate with residual, forward and backward, as tile-kernels 2.1 calls them."""
    module = peer("engram")
    if isinstance(module, str):
        return module, module
    M, D = query.shape
    x, gy, rows = hidden.view(-1, M, D), grad.view(-1, M, D), kv.view(-1, M + 1, D)

    def forward() -> Any:
        return module.engram_gate_fwd(x, rows, module.fused_weight(query, key), EPS, 1e-6)

    def backward() -> Any:
        both = module.fused_weight(query, key)
        *grads, parts = module.engram_gate_bwd(gy, x, rows, both, *saved(), 1e-6)
        ours, theirs = torch.zeros_like(query, dtype=torch.float32), torch.zeros_like(key, dtype=torch.float32)
        module.grad_w_reduce(parts, query, key, ours, theirs)
        return grads, ours, theirs

    kept: list[Any] = []

    def saved() -> Any:
        if not kept:
            kept.extend(forward()[1:])
        return kept

    return forward, backward


def row_cases(D: int, N: int) -> Iterator[Case]:
    from engram.kernels.triton.rows import combine_rows_triton, row_adam_triton_

    W, looked_up = D // 32, N * HEADS
    ranks = torch.arange(1, TABLE_ROWS + 1, device="cuda", dtype=torch.float64)
    drawn = torch.searchsorted((1 / ranks).cumsum(0) / (1 / ranks).sum(), torch.rand_like(ranks[:looked_up]))
    drawn = drawn.clamp_max(TABLE_ROWS - 1)  # by Zipf's law, so that duplicates are natural
    grads = torch.randn(looked_up, W, **BF16)
    unique, sums = combine_rows_triton(drawn, grads)
    least = 2 * W * (looked_up + len(unique)) + 8 * (looked_up + len(unique))
    # The sort takes 4 passes over keys of 4 bytes and places of 8, there and back, and reads or writes them once before
    # that; keys are written for it and read twice after it, places once. A run of 64 gradients writes a part of a sum.
    more = 4 * 2 * 12 + 12 + 4 + 2 * 4 + 8 + 4 * W // 64
    made = sides(combine_rows_triton, rows.combine_rows_reference, [drawn, grads])
    yield Case("combine rows", D, N, least, least + more * looked_up, **made, tile="-")
    table = torch.randn(TABLE_ROWS, W, **BF16)
    for name, beta1, kept in (("row Adam", 0.9, 2 * W + 1), ("row Adam, one moment a row", 0.0, 2)):
        row_state = torch.zeros(TABLE_ROWS, kept, device="cuda")
        least = len(unique) * (6 * W + 8 * kept + 8)  # weights and gradients, what is kept, and the row's number
        options = [10, 1e-3, beta1, 0.95, 1e-8, 0]
        made = sides(row_adam_triton_, rows.row_adam_reference_, [table, row_state, unique, sums, *options])
        yield Case(name, D, N, least, least, **made, tile="-", checked=False)


def swiglu_cases(D: int, N: int) -> Iterator[Case]:
    from engram.kernels.triton.swiglu import swiglu_backward_triton, swiglu_triton

    P, F = N * EXPERTS_PER_TOKEN, EXPERT_WIDTH
    x, g, w = torch.randn(P, 2 * F, **BF16), torch.randn(P, F, **BF16), torch.rand(P, device="cuda")
    made = sides(swiglu_triton, swiglu_reference, [x, w])
    least = P * (6 * F + 4)
    yield Case("SwiGLU, forward", D, N, least, least, **made, tile="-")
    made = sides(swiglu_backward_triton, swiglu_backward_reference, [g, x, w])
    least = P * (10 * F + 8)
    yield Case("SwiGLU, backward", D, N, least, least, **made, tile="-")


def norm_cases(D: int, N: int) -> Iterator[Case]:
    from engram.kernels.triton.norm import rms_norm_backward_triton, rms_norm_triton

    x, grad, weight = torch.randn(N, D, **BF16), torch.randn(N, D, **BF16), torch.randn(D, device="cuda")
    least = N * (4 * D + 4)
    made = sides(rms_norm_triton, norm.rms_norm_reference, [x, weight, EPS])
    yield Case("RMSNorm, forward", D, N, least, least, **made, tile="-")
    arguments = [grad, x, weight, rms_norm_triton(x, weight, EPS)[1]]
    least = N * (6 * D + 4)
    made = sides(rms_norm_backward_triton, norm.rms_norm_backward_reference, arguments)
    yield Case("RMSNorm, backward", D, N, least, least, **made, tile="-")


def rotate_cases(D: int, N: int) -> Iterator[Case]:
    from engram.kernels.triton.rotate import norm_rotate_backward_triton, norm_rotate_triton

    H, shape = D // HEAD_WIDTH, (N // SEQUENCE, SEQUENCE)
    x = torch.randn(*shape, H + BESIDE, HEAD_WIDTH, **BF16)[:, :, :H]
    grad, weight = torch.randn(*shape, H, HEAD_WIDTH, **BF16), torch.randn(HEAD_WIDTH, device="cuda")
    angles = 100 * torch.rand(SEQUENCE, HEAD_WIDTH // 2, device="cuda")
    inputs, both = [x, weight, angles.cos(), angles.sin()], 8 * angles.numel()
    least = N * H * (4 * HEAD_WIDTH + 4) + both
    made = sides(norm_rotate_triton, norm.norm_rotate_reference, [*inputs, EPS])
    yield Case("norm + rotate, forward", D, N, least, least, **made, tile="-")
    arguments = [grad, *inputs, norm_rotate_triton(*inputs, EPS)[1]]
    least = N * H * (6 * HEAD_WIDTH + 4) + both
    made = sides(norm_rotate_backward_triton, norm.norm_rotate_backward_reference, arguments)
    yield Case("norm + rotate, backward", D, N, least, least, **made, tile="-")


def loss_cases(D: int, N: int) -> Iterator[Case]:
    from engram.kernels.triton.loss import cross_entropy_triton_

    V = 32768 if D < 4096 else 151936
    chunk = min(N, CHUNK_LOGITS // V)
    logits, targets = torch.randn(chunk, V, **BF16), torch.randint(V, (chunk,), device="cuda")
    least = chunk * (4 * V + 12)
    made = sides(cross_entropy_triton_, loss.cross_entropy_reference_, [logits, targets])
    yield Case(f"cross-entropy of {V}", D, chunk, least, least, **made, tile="-", checked=False)


CASES = (hash_cases, fusion_cases, row_cases, swiglu_cases, norm_cases, rotate_cases, loss_cases)


# the table


def difference(case: Case) -> float | str:
    """The largest difference between our results and the reference's, in parts of the size of each result."""
    if not case.checked:
        return "-"
    try:
        ours, theirs = case.ours(), case.eager()
    except torch.OutOfMemoryError:
        return "-"
    pairs = [(ours, theirs)] if isinstance(ours, Tensor) else list(zip(ours, theirs, strict=True))
    errors = [
        ((x.double() - y.double()).norm() / y.double().norm().clamp_min(1e-30)).item() for x, y in pairs if y.numel()
    ]
    return max(errors)


COLUMNS = (
    "kernel",
    "hidden",
    "tokens",
    "ours us",
    "GB/s",
    "of copy",
    "as large",
    "moved",
    "eager",
    "compiled",
    "tile-kernels",
    "differs",
)
WIDTHS = (27, 6, 6, 8, 6, 7, 8, 6, 7, 8, 12, 8)


def line(cells: tuple[object, ...]) -> str:
    return " ".join(f"{str(cell)[:width]:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True))


def measure(case: Case, rate: float, rounds: int) -> dict[str, Any]:
    """Measure a case, print its line and return what the line says."""
    differs = difference(case)
    torch.cuda.empty_cache()
    source = torch.randint(0, 255, (case.least // 2,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    calls: dict[str, Call | str] = {
        "ours": case.ours,
        "copy": lambda: target.copy_(source),
        "eager": case.eager,
        "compiled": case.compiled,
        "tile": case.tile,
    }
    seconds = alternate_on_gpu(calls, rounds)
    ours, copy = seconds["ours"], seconds.pop("copy")
    assert isinstance(ours, float)
    assert isinstance(copy, float)
    reached = case.least / ours
    ratios = {name: s / ours if isinstance(s, float) else s for name, s in seconds.items() if name != "ours"}
    cells = [f"{r:.2f}x" if isinstance(r, float) else r for r in ratios.values()]
    moved = case.moved / case.least
    print(
        line(
            (
                case.kernel,
                case.hidden,
                case.tokens,
                f"{ours * 1e6:.1f}",
                f"{reached / 1e9:.0f}",
                f"{reached / rate:.1%}",
                f"{copy / ours:.1%}",
                f"{moved:.2f}x",
                *cells,
                f"{differs:.1e}" if isinstance(differs, float) else differs,
            )
        ),
        flush=True,
    )
    return {
        "kernel": case.kernel,
        "hidden": case.hidden,
        "tokens": case.tokens,
        "least_bytes": case.least,
        "moved_over_least": moved,
        "of_copy_rate": reached / rate,
        "of_copy_as_large": copy / ours,
        "seconds": seconds,
        "ratios": ratios,
        "differs": differs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewest tokens and few rounds")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", default="", help="kernels whose name holds this")
    parser.add_argument("--hidden", type=int, nargs="+", default=HIDDEN)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out the compiled references, which take a while"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here: the Triton kernels cannot be timed")
        return
    if importlib.util.find_spec("triton") is None:
        print("Triton is not installed: there are no kernels to time")
        return
    torch.manual_seed(0)
    torch._dynamo.config.cache_size_limit = COMPILE_LIMIT
    rate = copy_rate()
    machine = gpu_hardware()
    print(
        f"{machine['gpu']}: a copy moves {rate / 1e9:.0f} GB/s. M = {BRANCHES}, bfloat16; peers: their time over ours"
    )
    tile = peer("engram")
    print(tile if isinstance(tile, str) else "tile-kernels imports", file=sys.stderr)
    print(line(COLUMNS))
    results = []
    for D in arguments.hidden:
        for N in arguments.tokens[:1] if arguments.quick else arguments.tokens:
            for cases in CASES:
                chosen = (case for case in cases(D, N) if arguments.only in case.kernel)
                if arguments.no_compile:
                    chosen = (case._replace(compiled="-") for case in chosen)
                results += [measure(case, rate, 5 if arguments.quick else arguments.rounds) for case in chosen]
                torch.cuda.empty_cache()
            store("gpu_kernels", {"hardware": machine, "copy_bytes_per_second": rate, "rows": results})
    for name in dict.fromkeys(row["kernel"] for row in results):
        parts = [row["of_copy_rate"] for row in results if row["kernel"] == name]
        print(f"  {name}: {min(parts):.1%} to {max(parts):.1%} of the copy rate")


if __name__ == "__main__":
    main()

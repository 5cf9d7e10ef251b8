"""Bytes that one process sends and receives in a training step, by formula: needs no processes and no group of them.

What is counted is what must leave a process, whatever algorithm moves it. Of n processes that gather S bytes in all,
each gets S (n - 1) / n, and passes on as much in a ring; a reduce-scatter is the same backwards, an all-reduce both,
one after the other; of an all-to-all it is what goes to others. `benchmarks/communication.py` holds all of it against
real runs, byte by byte; docs/scaling.md says what follows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import nn

from engram.backbone import EngramLM
from engram.config import ModelConfig
from engram.experts import Experts, Router
from engram.memory import MemoryTable
from engram.parallel.config import MeshSizes

Shape = tuple[int, ...]
_INT64 = 8


class Flow(NamedTuple):
    """What one kind of collective moves for one process in a step.

    sent, received: bytes to and from others. calls: how often it is called. members: processes that take part. span:
    neighbouring ranks from the first of them to the last, so that a span of 8 fits in a machine of 8.
    """

    sent: float
    received: float
    calls: int
    members: int
    span: int

    def __add__(self, other: Flow) -> Flow:  # type: ignore[override]
        """Both, of one group."""
        sent, received, calls = (self[i] + other[i] for i in range(3))
        return Flow(sent, received, int(calls), self.members, self.span)


Traffic = dict[str, Flow]


class Reads(NamedTuple):
    """What the traffic of one memory table depends on, beside sizes.

    asks: distinct rows that this process reads of others. asked: rows that others read of it, once for each who does.
    most: of all processes that hold copies of the same rows, the most that one is asked for, by itself included.
    """

    asks: float
    asked: float
    most: float

    @classmethod
    def of(cls, wanted: Sequence[Sequence[int]], rank: int, table: int) -> Self:
        """From counts: `wanted[r][i]` distinct rows that rank r reads of member i of its group of `table`."""
        me = rank % table
        totals = [sum(wanted[first + i][me] for i in range(table)) for first in range(0, len(wanted), table)]
        own = wanted[rank][me]
        return cls(sum(wanted[rank]) - own, totals[rank // table] - own, max(totals))


class Routed(NamedTuple):
    """What the traffic of one expert layer depends on: tokens, and copies of them (a token and one of its experts),
    that go to other processes and come from them. A token goes once to each process that has any of its experts."""

    tokens_out: float
    tokens_in: float
    copies_out: float
    copies_in: float

    @classmethod
    def of(cls, tokens: Sequence[Sequence[int]], copies: Sequence[Sequence[int]], rank: int, expert: int) -> Self:
        """From counts: `tokens[r][i]` and `copies[r][i]` that rank r has for member i of its group of `expert`."""
        me, first = rank % expert, rank - rank % expert
        out = [sum(each[rank]) - each[rank][me] for each in (tokens, copies)]
        come = [sum(each[first + i][me] for i in range(expert)) - each[rank][me] for each in (tokens, copies)]
        return cls(out[0], come[0], out[1], come[1])


class Unit(NamedTuple):
    """What FSDP2 gathers at a time: shapes of dense parameters, and of routed experts, which `parallel.expert` above 1
    takes out of it."""

    dense: tuple[Shape, ...]
    experts: tuple[Shape, ...] = ()


@dataclass(frozen=True)
class Parts:
    """The parameters of a model as `parallelize` spreads them, tables left out.

    units: memories and blocks, whose parameters are freed after the forward pass and gathered again for the backward
    one. root: everything else, which stays. matrices: what `ShardedMuon` sends around, in its order. row_bytes: of one
    row of a table. tables, expert_layers: how many there are. n_experts, d_model: of the config.
    """

    units: tuple[Unit, ...]
    root: Unit
    matrices: tuple[Shape, ...]
    row_bytes: int
    tables: int
    expert_layers: int
    n_experts: int
    d_model: int

    @classmethod
    def of(cls, config: ModelConfig) -> Self:
        """From the model itself, on the meta device."""
        with torch.device("meta"):
            model = EngramLM(config)
        memories = [*([] if model.input_memory is None else [model.input_memory]), *model.memory.values()]
        spread = [*memories, *model.each_block()]
        inside = {p for unit in spread for p in unit.parameters()}
        matrices = tuple(
            tuple(module.weight.shape)
            for module in model.modules()
            if isinstance(module, nn.Linear | Router) and module.weight is not model.head_weight
        )
        memory, experts = config.memory, config.experts
        of_row = torch.empty(0, dtype=getattr(torch, memory.table_dtype)).itemsize * memory.row_width if memory else 0
        return cls(
            tuple(_unit(unit) for unit in spread),
            Unit(tuple(tuple(p.shape) for p in model.parameters() if p not in inside)),
            matrices,
            of_row,
            sum(isinstance(module, MemoryTable) for module in model.modules()),
            config.n_moe_layers,
            0 if experts is None else experts.n_experts,
            config.d_model,
        )


def _unit(module: nn.Module) -> Unit:
    own = [(part, tuple(p.shape)) for part in module.modules() for p in part.parameters(recurse=False)]
    return Unit(
        tuple(shape for part, shape in own if not isinstance(part, MemoryTable | Experts)),
        tuple(shape for part, shape in own if isinstance(part, Experts)),
    )


class Types(NamedTuple):
    """Bytes of a dense parameter and of its gradient, as they travel; of a number of a token on its way to experts (2
    under bfloat16 autocast); of an expert's weight for a token; of the loss."""

    parameter: int = 4
    token: int = 4
    weight: int = 4
    loss: int = 4


def step_traffic(
    parts: Parts,
    sizes: MeshSizes,
    reads: Sequence[Reads],
    routed: Sequence[Routed],
    rank: int = 0,
    types: Types = Types(),  # noqa: B008 - immutable
) -> Traffic:
    """What a rank sends and receives in one step of training with Muon, on one batch, by the name of the collective.
    Collectives of one process are left out; so is what is logged, and checkpoints. (With `parallel.prefetch` the counts
    and indices are those of the next batch.)

    Args:
        parts: of the model.
        sizes: of the mesh.
        reads: of each table. routed: of each expert layer. Both may be counted or expected.
        rank: whose; ranks differ in what they read, and in which matrices they orthogonalise.
        types: bytes of what travels.
    """
    flows = [*_fully_sharded(parts, sizes, types)]
    flows += [flow for each in reads for flow in _table(each, sizes, parts.row_bytes)]
    flows += [flow for each in routed for flow in _expert_layer(each, sizes.expert, parts.d_model, types)]
    flows.append(("muon", _muon(parts.matrices, sizes.shard, rank % sizes.shard, types)))
    world = sizes.world
    numbers = [("gradient norm", 4), ("loss", types.loss), ("loads", _INT64 * parts.expert_layers * parts.n_experts)]
    flows += [(name, all_reduce(n_bytes, world, world)) for name, n_bytes in numbers if n_bytes]
    traffic: Traffic = {}
    for name, flow in flows:
        if flow.members > 1:
            traffic[name] = traffic[name] + flow if name in traffic else flow
    return traffic


def gather(n_bytes: float, members: int, span: int) -> Flow:
    """All-gather of `n_bytes` in all; or the reduce-scatter of as many."""
    moved = n_bytes * (members - 1) / members
    return Flow(moved, moved, 1, members, span)


def all_reduce(n_bytes: float, members: int, span: int) -> Flow:
    """Sum of `n_bytes` that each of the members holds."""
    moved = 2 * n_bytes * (members - 1) / members
    return Flow(moved, moved, 1, members, span)


def padded(shapes: Sequence[Shape], n: int) -> int:
    """Numbers in parameters that FSDP2 has cut into n parts: rows are filled up to a multiple of n in each of them."""
    return sum(-(-shape[0] // n) * n * math.prod(shape[1:]) for shape in shapes)


def _fully_sharded(parts: Parts, sizes: MeshSizes, types: Types) -> Iterator[tuple[str, Flow]]:
    shard, copies = sizes.shard, sizes.replicate
    for unit in (*parts.units, parts.root):
        stays = unit is parts.root
        dense = unit.dense if sizes.expert > 1 else unit.dense + unit.experts
        yield from _unit_traffic("dense", dense, _every(1, shard), _every(shard, copies), stays, types)
        if unit.experts and sizes.expert > 1:
            held = [(shape[0] // sizes.expert, *shape[1:]) for shape in unit.experts]
            # Members of an expert group are neighbours: who shares a member's experts is `expert` ranks away.
            shards = _every(sizes.expert, sizes.expert_shard)
            replicas = _every(sizes.expert * sizes.expert_shard, sizes.expert_replicate)
            yield from _unit_traffic("expert", held, shards, replicas, stays, types)


def _every(stride: int, members: int) -> tuple[int, int]:
    """Members and span of a group of every `stride`-th rank."""
    return members, (members - 1) * stride + 1


def _unit_traffic(
    kind: str,
    shapes: Sequence[Shape],
    shards: tuple[int, int],
    copies: tuple[int, int],
    stays: bool,
    types: Types,
) -> Iterator[tuple[str, Flow]]:
    """One unit's parameters gathered, and its gradients summed; `shards` and `copies` are members and span."""
    whole = padded(shapes, shards[0]) * types.parameter
    if not whole:
        return
    yield f"{kind} gather, forward", gather(whole, *shards)
    if not stays:
        yield f"{kind} gather, backward", gather(whole, *shards)
    yield f"{kind} reduce-scatter", gather(whole, *shards)
    yield f"{kind} all-reduce", all_reduce(whole / shards[0], *copies)


def _table(reads: Reads, sizes: MeshSizes, row_bytes: int) -> Iterator[tuple[str, Flow]]:
    n, copies = sizes.table, sizes.world // sizes.table
    asks, asked, most = reads
    yield "table counts", Flow(_INT64 * (n - 1), _INT64 * (n - 1), 1, n, n)
    yield "table indices", Flow(_INT64 * asks, _INT64 * asked, 1, n, n)
    yield "table rows", Flow(row_bytes * asked, row_bytes * asks, 1, n, n)
    yield "table gradients", Flow(row_bytes * asks, row_bytes * asked, 1, n, n)
    # How many there are, then places and gradients, all filled up to the most.
    gathered = gather(copies * (_INT64 + most * (_INT64 + row_bytes)), *_every(n, copies))
    yield "table copies", gathered._replace(calls=3)


def _expert_layer(routed: Routed, n: int, d_model: int, types: Types) -> Iterator[tuple[str, Flow]]:
    tokens_out, tokens_in, copies_out, copies_in = routed
    # A token goes out and its result comes back; of the two gradients the other way round.
    tokens = d_model * types.token * (tokens_out + tokens_in)
    yield "expert counts", Flow(2 * _INT64 * (n - 1), 2 * _INT64 * (n - 1), 1, n, n)
    yield "expert tokens, forward", Flow(tokens, tokens, 2, n, n)
    yield "expert tokens, backward", Flow(tokens, tokens, 2, n, n)
    yield "expert indices", Flow(_INT64 * copies_out, _INT64 * copies_in, 1, n, n)
    yield "expert weights, forward", Flow(types.weight * copies_out, types.weight * copies_in, 1, n, n)
    yield "expert weights, backward", Flow(types.weight * copies_in, types.weight * copies_out, 1, n, n)


def dealt(shapes: Sequence[Shape], n: int) -> list[list[int]]:
    """Which of some matrices each of n processes orthogonalises for Muon: the largest first, to the process with the
    least work so far."""
    work, owned = [0] * n, [[] for _ in range(n)]  # type: tuple[list[int], list[list[int]]]
    for i in sorted(range(len(shapes)), key=lambda i: -math.prod(shapes[i]) * min(shapes[i])):
        owner = work.index(min(work))
        work[owner] += math.prod(shapes[i]) * min(shapes[i])
        owned[owner].append(i)
    return owned


def _muon(matrices: Sequence[Shape], n: int, rank: int, types: Types) -> Flow:
    """Parts of updates go to who works on a matrix, and come back: what is sent first is received then."""
    mine = set(dealt(matrices, n)[rank])
    numbers = 0
    for i, (rows, columns) in enumerate(matrices):
        each = -(-rows // n)
        here = min(max(rows - rank * each, 0), each)
        numbers += (rows - here if i in mine else here) * columns
    return Flow(numbers * types.parameter, numbers * types.parameter, 2, n, n)


def expected_reads(distinct: float, sizes: MeshSizes) -> Reads:
    """Of a table of which each process reads so many distinct rows, its owners alike (rows are dealt out in turn, by
    hash) and all of a size; `most` is taken for the mean."""
    away = distinct * (sizes.table - 1) / sizes.table
    return Reads(away, away, distinct)


def expected_routed(tokens: float, n_experts: int, top_k: int, expert: int) -> Routed:
    """Of `tokens` of each process whose experts are any `top_k` alike."""
    away = (expert - 1) / expert
    travels = tokens * expected_ranks(n_experts, top_k, expert) * away
    return Routed(travels, travels, tokens * top_k * away, tokens * top_k * away)


def expected_ranks(n_experts: int, top_k: int, expert: int) -> float:
    """Processes of a group of `expert` that have any of a token's `top_k` experts, if any `top_k` are as likely:
    n (1 - C(E - E/n, K) / C(E, K))."""
    others = math.comb(n_experts - n_experts // expert, top_k)
    return expert * (1 - others / math.comb(n_experts, top_k))


def total(traffic: Traffic, prefix: str = "") -> Flow:
    """All collectives whose names start so, together; members and span are the largest."""
    some = [flow for name, flow in traffic.items() if name.startswith(prefix)]
    sent, received, calls = (sum(flow[i] for flow in some) for i in range(3))
    members, span = (int(max((flow[i] for flow in some), default=1)) for i in (3, 4))
    return Flow(sent, received, int(calls), members, span)

"""What a training step really sends: each collective seen as it is called, its bytes taken from its tensors.

All of them, those of FSDP2 and of autograd included, go through torch's dispatcher, where a mode sees them; which part
of the program called is read from the stack. What rows and tokens there were is counted apart, from the inputs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from small_model import MODEL, build, optimizer_of, train
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode
from world import World

from engram.backbone import EngramLM
from engram.config import ModelConfig
from engram.parallel.config import ParallelConfig
from engram.parallel.experts import ShardedExperts
from engram.parallel.table import ShardedTable
from engram.parallel.traffic import Flow, Parts, Reads, Routed, Traffic, Types, step_traffic

# The innermost of these functions on the stack says what a collective is for.
_CALLERS = {
    ("table", "__init__"): "table counts",
    ("table", "ask"): "table indices",
    ("table", "fetch"): "table rows",
    ("table", "give_back"): "table gradients",
    ("table", "collect"): "table copies",
    ("sharded_muon", "orthogonalized"): "muon",
    ("_fsdp_param_group", "pre_forward"): "gather, forward",
    ("_fsdp_param_group", "pre_backward"): "gather, backward",
    ("_fsdp_param_group", "post_backward"): "reduce",
    ("optim", "clip_gradients"): "gradient norm",
    ("experts", "forward"): "forward",
}
_WAITS = ("wait_tensor", "_wrap_tensor_autograd")


class Counter(TorchDispatchMode):
    """Adds up what this process sends and receives while it is entered, by the names of `engram.parallel.traffic`."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic: Traffic = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and func.overloadpacket.__name__ not in _WAITS:
            self._count(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        group = _group_of(args)
        n, ranks = group.size(), dist.get_process_group_ranks(group)
        if n == 1:
            return
        call = _CALLS[name](args, group.rank(), n)
        label = _label(name, call.tensor)
        flow = Flow(call.sent, call.received, 1, n, max(ranks) - min(ranks) + 1)
        self.traffic[label] = self.traffic[label] + flow if label in self.traffic else flow


def _label(name: str, tensor: Tensor) -> str:
    caller = _caller()
    if caller in ("gather, forward", "gather, backward", "reduce"):
        kind = "expert" if isinstance(_sharded_module(), ShardedExperts) else "dense"
        how = {"_reduce_scatter_base_": "reduce-scatter", "allreduce_": "all-reduce"}.get(name, caller)
        return f"{kind} {how}"
    if name == "allreduce_" and not caller:
        return "loss" if tensor.is_floating_point() else "loads"
    if name == "alltoall_base_" and caller == "forward":
        return "expert counts"
    if name == "all_to_all_single":
        if not tensor.is_floating_point():
            return "expert indices"
        return f"expert {'tokens' if tensor.ndim == 2 else 'weights'}, {caller or 'backward'}"
    return caller


def _stack() -> Iterator[tuple[str, FrameType]]:
    """Frames and their modules' names, the innermost first; a package's is its folder's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        yield path.parent.name if path.stem == "__init__" else path.stem, frame
        frame = frame.f_back


def _caller() -> str:
    found = (_CALLERS.get((module, frame.f_code.co_name)) for module, frame in _stack())
    return next(filter(None, found), "")


def _sharded_module() -> nn.Module:
    """The module whose parameters FSDP2 is at."""
    group = next(frame.f_locals["self"] for module, frame in _stack() if module == "_fsdp_param_group")
    module: nn.Module = group.modules[0]
    return module


def _group_of(args: Any) -> dist.ProcessGroup:
    for arg in args:
        if isinstance(arg, str):
            return _resolve_process_group(arg)  # type: ignore[arg-type]
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return dist.ProcessGroup.unbox(arg)
    raise TypeError("a collective without a group")


class _Call(NamedTuple):
    """Bytes to and from others, and a tensor that is sent."""

    sent: float
    received: float
    tensor: Tensor


def _others(x: Tensor, splits: list[int], rank: int, n: int) -> int:
    """Bytes of the parts of `x` that are not of this rank."""
    rows = splits[rank] if splits else len(x) // n
    return x.nbytes - rows * x[:1].nbytes


def _all_to_all(out: Tensor, x: Tensor, receives: list[int], sends: list[int], rank: int, n: int) -> _Call:
    return _Call(_others(x, sends, rank, n), _others(out, receives, rank, n), x)


def _functional_all_to_all(args: Any, rank: int, n: int) -> _Call:
    x, receives, sends, _ = args
    out = x.new_empty(sum(receives), *x.shape[1:])
    return _all_to_all(out, x, receives, sends, rank, n)


def _gathered(args: Any, rank: int, n: int) -> _Call:
    (outs,), (x,) = args[:2]
    received = sum(out.nbytes for out in outs) - x.nbytes
    return _Call(received, received, x)


def _gathered_whole(args: Any, rank: int, n: int) -> _Call:
    out, x = args[:2]
    return _Call(out.nbytes - x.nbytes, out.nbytes - x.nbytes, x)


def _scattered(args: Any, rank: int, n: int) -> _Call:
    out, x = args[:2]
    return _Call(x.nbytes - out.nbytes, x.nbytes - out.nbytes, x)


def _summed(args: Any, rank: int, n: int) -> _Call:
    (x,) = args[0]
    moved = 2 * x.nbytes * (n - 1) / n
    return _Call(moved, moved, x)


# A collective that is not here is an error, so that none goes uncounted.
_CALLS = {
    "alltoall_base_": lambda args, rank, n: _all_to_all(args[0], args[1], args[3], args[4], rank, n),
    "all_to_all_single": _functional_all_to_all,
    "allgather_": _gathered,
    "_allgather_base_": _gathered_whole,
    "_reduce_scatter_base_": _scattered,
    "allreduce_": _summed,
}


class Counted(NamedTuple):
    """Of one process: its traffic; of each table the distinct rows read of each owner; of each expert layer the tokens
    and the copies of them that each member of the group gets."""

    traffic: Traffic
    wanted: list[list[int]]
    tokens: list[list[int]]
    copies: list[list[int]]


class Precision(NamedTuple):
    """The type of all parameters, rows included, whether products are in bfloat16, and the bytes that follow."""

    parameters: torch.dtype
    autocast: bool
    types: Types

    def products(self) -> torch.autocast:
        """For one step: autocast keeps the weights it has cast until it is left, and their graph with them."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.autocast)


# The loss is told in double precision by the loop of `small_model`.
PRECISIONS = {
    "float32": Precision(torch.float32, False, Types(loss=8)),
    "autocast": Precision(torch.float32, True, Types(token=2, loss=8)),
    "bfloat16": Precision(torch.bfloat16, False, Types(parameter=2, token=2, loss=8)),
}


def changes_of(precision: str, n_experts: int) -> dict[str, Any]:
    """What differs from the small model: how many experts there are, and rows of the type of all parameters."""
    dtype = str(PRECISIONS[precision].parameters).removeprefix("torch.")
    return {
        "experts": {**MODEL["experts"], "n_experts": n_experts},
        "memory": {**MODEL["memory"], "table_dtype": dtype},
    }


def counted_step(rank: int, n: int, mesh: dict[str, Any], precision: str, n_experts: int) -> Counted:
    """Train two steps on a mesh; what the second one sent."""
    how = PRECISIONS[precision]
    model = build(mesh, how.parameters, changes_of(precision, n_experts))
    optimizer = optimizer_of(model)
    result = Counted({}, [], [], [])
    with how.products():
        train(model, optimizer, range(1), rank, n)
    _note_inputs(model, result)
    with how.products(), Counter() as counter:
        train(model, optimizer, range(1, 2), rank, n)
    return result._replace(traffic=counter.traffic)


def _note_inputs(model: EngramLM, result: Counted) -> None:
    """From now on, note which rows tables are asked for and where tokens go."""

    def note_rows(table: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(table, ShardedTable)
        owners = args[0].unique() % table.n_shards
        result.wanted.append(owners.bincount(minlength=table.n_shards).tolist())

    def note_tokens(experts: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(experts, ShardedExperts)
        shard_NK = args[1] // experts.n_local
        each = [(shard_NK == i) for i in range(experts.n_shards)]
        result.tokens.append([int(mine.any(1).sum()) for mine in each])
        result.copies.append([int(mine.sum()) for mine in each])

    for module in model.modules():
        if isinstance(module, ShardedTable):
            module.register_forward_pre_hook(note_rows)
        elif isinstance(module, ShardedExperts):
            module.register_forward_pre_hook(note_tokens)


def checked(
    world: World, mesh: dict[str, Any], precision: str, n_experts: int = 8
) -> Iterator[tuple[Traffic, Traffic]]:
    """Of each rank of a world, what the formulas say and what was counted."""
    ranks: list[Counted] = world.run(counted_step, mesh, precision, n_experts)
    parts = Parts.of(ModelConfig.from_dict({**MODEL, **changes_of(precision, n_experts)}))
    sizes = ParallelConfig(**mesh).sizes(world.n)
    types = PRECISIONS[precision].types
    for rank, counted in enumerate(ranks):
        reads = [Reads.of([r.wanted[i] for r in ranks], rank, sizes.table) for i in range(parts.tables)]
        routed = [
            Routed.of([r.tokens[i] for r in ranks], [r.copies[i] for r in ranks], rank, sizes.expert)
            for i in range(len(counted.tokens))
        ]
        yield step_traffic(parts, sizes, reads, routed, rank, types), counted.traffic

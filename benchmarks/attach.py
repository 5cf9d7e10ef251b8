"""Memory attached to a transformers model: ours beside engram-peft 1.2.7, on the same Llama, text, rows and steps.

A small Llama is trained first; then each side adds memory to a copy of it and trains that alone: time of a step, peak
memory of a process that trains, loss on held-out text after equal steps, and whether decoding with a cache gives the
logits that decoding without one does. Tables have the same primes of rows, which is checked. What they are read by is
not the same: engram-peft's N-grams below the largest order end before their token (`reached_by_a_token` shows it), so
losses are also compared for the largest order alone.
`python benchmarks/attach.py`
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import typing_extensions
from harness import Table, alternate, finish, import_peer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from engram import MemoryConfig
from engram.interop import attach
from engram.interop.trainer import build_optimizer
from engram.training.tokenizer import EOS, train_bpe

V, T, BATCH, LAYERS, HEADS, WIDTH = 1024, 128, 8, (1, 2), 4, 32
ROWS = (20_000, 200_000)  # of a head
NEW_TOKENS = 24
ALONE = "Llama alone"


class Side(NamedTuple):
    """A Llama with one package's memory, its optimiser, and the rows that layer 1 reads for some ids."""

    model: Any
    optimizer: torch.optim.Optimizer
    rows: Callable[[Tensor], Tensor]


def ours(backbone: LlamaForCausalLM, rows: int, lr: float, orders: tuple[int, ...] = (2, 3)) -> Side:
    model = copy.deepcopy(backbone)
    memory = MemoryConfig(
        orders=orders, n_heads=HEADS, row_width=WIDTH, rows=(rows,) * len(orders), conv_dilation=3, compress=False
    )
    attachment = attach(model, LAYERS, memory)
    return Side(model, build_optimizer(model, lr), attachment.memory[str(LAYERS[0])].reader)


@functools.cache
def peer() -> types.ModuleType | str:
    """engram-peft, whose own requirements are Python 3.12, for a decorator that says nothing, and trl, for its SFT."""
    if not hasattr(typing, "override"):
        typing.override = typing_extensions.override  # type: ignore[attr-defined]
    trl = types.ModuleType("trl")
    trl.SFTConfig = trl.SFTTrainer = type("NotHere", (), {})  # type: ignore[attr-defined]
    sys.modules.setdefault("trl", trl)
    for package, version, module in (("wadler-lindig", "0.1.8", "wadler_lindig"), ("jaxtyping", "0.3.11", "jaxtyping")):
        found = import_peer(package, version, module)
        if isinstance(found, str):
            return found
    return import_peer("engram-peft", "1.2.7", "engram_peft")


def theirs(backbone: LlamaForCausalLM, rows: int, lr: float, orders: tuple[int, ...] = (2, 3)) -> Side:
    package: Any = peer()
    config = package.EngramConfig(
        engram_vocab_size_per_ngram=[rows * HEADS] * len(orders),  # of all heads together
        ngram_sizes=list(orders),
        n_head_per_ngram=HEADS,
        embedding_dim=len(orders) * HEADS * WIDTH,
        enable_tokenizer_compression=False,
        target_layers=list(LAYERS),
        hc_mult=1,
        pad_id=0,
    )
    model = package.get_engram_model(copy.deepcopy(backbone), config)

    def rows_read(ids: Tensor) -> Tensor:
        hashed = torch.from_numpy(model.hash_mapping.hash(ids.numpy())[LAYERS[0]])
        return hashed + model.engram_layers[str(LAYERS[0])].multi_head_embedding.offsets

    return Side(model, model.create_optimizer(base_learning_rate=lr), rows_read)


SIDES: dict[str, Callable[..., Side]] = {"ours": ours, "engram-peft": theirs}


def text_ids() -> tuple[Tensor, Tensor]:
    """Windows `[n, T]` of this package's source, and of about one in eight of its files to test on."""
    root = Path(__file__).resolve().parents[1]
    files = sorted(root.glob("engram/**/*.py"))
    out = [hashlib.sha256(file.name.encode()).digest()[0] % 8 == 0 for file in files]
    texts = [[f.read_text("utf-8") for f, is_out in zip(files, out, strict=True) if is_out == side] for side in (0, 1)]
    tokenizer = train_bpe(texts[0], V)
    ids = [[i for text in some for i in tokenizer.encode(text + EOS).ids] for some in texts]
    train, test = (torch.tensor(some).unfold(0, T, T) for some in ids)
    return train, test[:64]


def trained_backbone(data: Tensor, steps: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=max(steps, 1))
    for _ in range(steps):
        step(Side(model, optimizer, lambda ids: ids), data[torch.randint(len(data), (BATCH,))])
        schedule.step()
    return model


def step(side: Side, batch: Tensor) -> float:
    """One training step, without clipping, which both leave to the Trainer."""
    loss = side.model(input_ids=batch, labels=batch, use_cache=False).loss
    loss.backward()
    side.optimizer.step()
    side.optimizer.zero_grad()
    return float(loss.detach())


def llama_alone(backbone: LlamaForCausalLM) -> Callable[[Tensor], float]:
    """What no memory can save: the frozen Llama forward, and backward to what block 1 reads."""
    model = copy.deepcopy(backbone).requires_grad_(False)
    model.model.layers[LAYERS[0]].register_forward_pre_hook(lambda _, args: (args[0].requires_grad_(), *args[1:]))

    def run(batch: Tensor) -> float:
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        return float(loss.detach())

    return run


def processor_seconds(sides: dict[str, Callable[[Tensor], float]], data: Tensor, rounds: int = 15) -> dict[str, float]:
    """Median seconds of all threads of this process in a step, sides in turn: others' load touches it less."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        batch = data[torch.randint(len(data), (BATCH,))]
        for name, side in sides.items():
            start = time.process_time()
            side(batch)
            taken[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


@torch.no_grad()
def loss_of(model: nn.Module, data: Tensor) -> float:
    model.eval()
    losses = [float(model(input_ids=batch, labels=batch, use_cache=False).loss) for batch in data.split(BATCH)]
    model.train()
    return sum(losses) / len(losses)


def learning(backbone: LlamaForCausalLM, data: Tensor, test: Tensor, steps: int) -> list[dict[str, Any]]:
    """Held-out loss before and after equal steps at equal learning rates (tables: five times as much)."""
    results = []
    print(f"\nheld-out loss after {steps} steps (before: {loss_of(backbone, test):.4f})")
    for orders, lr in (((2, 3), 3e-3), ((2, 3), 1e-2), ((3,), 3e-3), ((3,), 1e-2)):
        found: dict[str, Any] = {"orders": orders, "lr": lr, "steps": steps, "before": loss_of(backbone, test)}
        for name, build in SIDES.items():
            torch.manual_seed(1)
            side, order = build(backbone, ROWS[0], lr, orders), torch.Generator().manual_seed(0)
            at_start = loss_of(side.model, test)
            for _ in range(steps):
                step(side, data[torch.randint(len(data), (BATCH,), generator=order)])
            found[name] = {"at the start": at_start, "after": loss_of(side.model, test)}
        results.append(found)
        shown = ", ".join(f"{name} {found[name]['after']:.4f}" for name in SIDES)
        print(f"  orders {orders}, lr {lr:g}: {shown}", flush=True)
    return results


def reached_by_a_token(backbone: LlamaForCausalLM) -> dict[str, dict[str, list[int]]]:
    """Which tokens read other rows when one token is another: how far after it they stand, by order."""
    one = torch.randint(V, (1, 16))
    other = one.clone()
    other[0, 8] = (other[0, 8] + 1) % V
    results = {}
    for name, build in SIDES.items():
        side = build(backbone, ROWS[0], 1e-3)
        changed = (side.rows(one) != side.rows(other))[0].unflatten(-1, (2, HEADS)).any(-1)
        results[name] = {str(n): (changed[:, i].nonzero().flatten() - 8).tolist() for i, n in enumerate((2, 3))}
    return results


@torch.no_grad()
def decoding(backbone: LlamaForCausalLM, test: Tensor) -> dict[str, Any]:
    """Where a cache, padding or drafts change what is answered, by memory that is all at work."""
    results: dict[str, Any] = {}
    for name, build in SIDES.items():
        side = build(backbone, ROWS[0], 1e-3)
        torch.manual_seed(2)
        for parameter_name, parameter in side.model.named_parameters():
            if "engram" in parameter_name or "adapters" in parameter_name:
                parameter.normal_(std=0.3)
        model, prompt = side.model.eval(), test[:2, :16]
        generate = functools.partial(model.generate, do_sample=False, eos_token_id=None, max_new_tokens=NEW_TOKENS)
        cached, uncached = (generate(input_ids=prompt, use_cache=cache) for cache in (True, False))
        beams = [generate(input_ids=prompt, use_cache=cache, num_beams=4) for cache in (True, False)]
        drafts = [generate(input_ids=prompt[:1].repeat(1, 3), **more) for more in ({}, {"prompt_lookup_num_tokens": 4})]
        first = model(input_ids=prompt[:, :8])
        pieces, cache = [first.logits], first.cache
        pieces += [model(input_ids=prompt[:, t : t + 1], cache=cache).logits for t in range(8, 16)]
        mask = torch.ones_like(prompt)
        mask[:, :4] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        padded = model(
            input_ids=prompt.masked_fill(mask == 0, 0), attention_mask=mask, position_ids=positions, use_cache=False
        )
        results[name] = {
            "largest difference of cached logits": largest(
                torch.cat(pieces, 1), model(input_ids=prompt, use_cache=False).logits
            ),
            "largest difference by left padding": largest(
                padded.logits[:, 4:], model(input_ids=prompt[:, 4:], use_cache=False).logits
            ),
            "greedy tokens equal": torch.equal(cached, uncached),
            "beams equal": torch.equal(*beams),
            "prompt lookup equals greedy": torch.equal(*drafts),
        }
        print(f"\n{name}: " + ", ".join(f"{what} {value}" for what, value in results[name].items()), flush=True)
    return results


def largest(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def peak_of_training(name: str, rows: int) -> None:
    """In a process of its own: print the peak of its memory, in bytes, after some steps."""
    data = torch.randint(V, (4, BATCH, T))
    backbone = trained_backbone(data.flatten(0, 1), 0)
    if name in SIDES:
        side = SIDES[name](backbone, rows, 1e-3)
        del backbone
        for batch in data:
            step(side, batch)
    status = Path("/proc/self/status").read_text()
    print(json.dumps(1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])))


def peak_memory(rows: int) -> dict[str, Any]:
    """Peak memory of training above that of a process that has built the Llama and no more."""
    peaks: dict[str, int] = {}
    for name in (ALONE, *SIDES):
        command = [sys.executable, __file__, "--peak", name, "--rows", str(rows)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[name] = int(done.stdout.splitlines()[-1])
    above = {name: peaks[name] - peaks[ALONE] for name in SIDES}
    print(f"\npeak memory, {rows} rows: " + ", ".join(f"{name} {n / 2**20:.0f} MiB" for name, n in above.items()))
    return {"rows": rows, "table_bytes": 4 * len(LAYERS) * 2 * HEADS * rows * WIDTH, "bytes": above}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="of training memory, for the loss")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, default=ROWS[0], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    found = peer()
    if isinstance(found, str):
        raise SystemExit(found)
    if arguments.peak:
        peak_of_training(arguments.peak, arguments.rows)
        return
    data, test = text_ids()
    backbone = trained_backbone(data, 250)
    columns = (["rows", "B", "T"], [*SIDES, ALONE], [ALONE])
    table = Table("A training step of memory on a frozen Llama", *columns)
    processor_rows = []
    for rows in ROWS:
        sides = {name: build(backbone, rows, 1e-3) for name, build in SIDES.items()}
        counts = [sorted(p.shape for p in side.model.parameters() if len(p) > rows) for side in sides.values()]
        if counts[0] != counts[1]:
            raise AssertionError(f"tables of different sizes: {counts}")
        steps = {name: functools.partial(step, side) for name, side in sides.items()} | {ALONE: llama_alone(backbone)}
        seconds = alternate(steps, lambda: data[torch.randint(len(data), (BATCH,))], budget_s=20.0)
        table.add((rows, BATCH, T), seconds)
        processor_rows.append(((rows, BATCH, T), processor_seconds(steps, data)))
    processor = Table("The same, processor time", *columns)
    for case, seconds in processor_rows:
        processor.add(case, seconds)
    memory = [peak_memory(rows) for rows in ROWS]
    answers = decoding(backbone, test)
    losses = learning(backbone, data, test, arguments.steps)
    reached = reached_by_a_token(backbone)
    print(f"\ntokens that read other rows when one token is another, by order, counted from it: {reached}")
    results = {"peak_memory": memory, "learning": losses, "decoding": answers, "reached_by_a_token": reached}
    finish("attach", [table, processor], load_after=os.getloadavg()[0], **results)


if __name__ == "__main__":
    main()

"""A model larger than memory: built empty, loaded where a device map says, its memory tables on the CPU or on disk.

    python examples/accelerate_training.py
    python examples/big_model_inference.py runs/accelerate/model --table cpu --text "The memory "

`cpu` keeps tables as `accelerate` loads them, mapped from the model's own file: only pages with rows that are read ever
come into memory, and the kernel drops them when it needs room. `disk` is accelerate's offloading: it copies tables to a
folder and reads the whole of a table into memory for each forward pass, which frees it again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from safetensors import safe_open

from engram import EngramLM, MemoryTable
from engram.training.weights import read_config


def empty_model(folder: Path) -> EngramLM:
    """The model that `engram.training.weights.save_model` wrote to a folder, with no storage for its weights yet.

    What hashing needs is there at once: its numbers come from the config, the token compression from the file.
    """
    config = read_config(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        lookup = file.get_tensor("token_lookup") if "token_lookup" in file.keys() else None  # noqa: SIM118
    with init_empty_weights():
        return EngramLM(config, lookup)


def device_map(model: EngramLM, tables: str) -> dict[str, str]:
    """Memory tables where they are to be kept, everything else on the CPU."""
    places = {
        name: tables if isinstance(module, MemoryTable) else "cpu"
        for name, module in model.named_modules()
        if not list(module.children())
    }
    # What a module with others inside holds itself is named one by one: a place for the module would be for all in it.
    return places | {name: "cpu" for name in model.state_dict() if name.rpartition(".")[0] not in places}


@torch.no_grad()
def continued(model: EngramLM, ids: list[int], n: int) -> list[int]:
    """`ids` and the `n` most likely ids after them, one at a time."""
    for _ in range(n):
        logits = model(torch.tensor([ids]))
        ids = [*ids, int(logits[0, -1].argmax())]
    return ids


def main(folder: Path, table: str, text: str, n: int) -> None:
    model = empty_model(folder)
    places = device_map(model, table)
    load_checkpoint_and_dispatch(model, str(folder), places, offload_folder=str(folder / "offloaded"))
    print(bytes(continued(model.eval(), list(text.encode()), n)).decode(errors="replace"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a model whose tokens are bytes, as accelerate_training.py makes")
    parser.add_argument("--table", choices=["cpu", "disk"], default="cpu", help="where memory tables are kept")
    parser.add_argument("--text", default="The memory ", help="what is continued")
    parser.add_argument("-n", type=int, default=40, help="bytes to add")
    main(**vars(parser.parse_args()))

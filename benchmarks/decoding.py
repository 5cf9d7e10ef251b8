"""Generation, greedy, against transformers' own of a Qwen3-MoE model of the same shape: prefill and decoding.

Both go through what users call, `engram.inference.generate` and `generate` of transformers with its default cache. The
peer has as many parameters as our model without memory, which is timed too; weights are random, and nothing ends early.
One new token is the prefill; the others are decoded. `python benchmarks/decoding.py [--quick]`
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from harness import Table, alternate, finish
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from engram import EngramLM, ModelConfig
from engram.inference import generate
from engram.training.environment import prepare_process

CONFIG: dict[str, Any] = {
    "vocab_size": 8192,
    "d_model": 256,
    "n_layers": 8,
    "attention": {"kind": "gqa", "n_heads": 4, "n_kv_heads": 2, "head_dim": 64},
    "dense_width": 512,
    "experts": {"n_experts": 16, "top_k": 2, "width": 256},
    "memory": {"layers": [1, 4], "rows": [20011, 20011], "n_heads": 4, "row_width": 32},
}
OWN = ("engram without memory", "engram without cache")
SIDES = ("engram", OWN[0], "transformers", OWN[1])


def peer_of(model: EngramLM) -> Qwen3MoeForCausalLM:
    """A Qwen3-MoE model with the sizes of one of ours that has no memory."""
    c, attention, experts = CONFIG, CONFIG["attention"], CONFIG["experts"]
    peer = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=c["vocab_size"],
            hidden_size=c["d_model"],
            num_hidden_layers=c["n_layers"],
            num_attention_heads=attention["n_heads"],
            num_key_value_heads=attention["n_kv_heads"],
            head_dim=attention["head_dim"],
            intermediate_size=c["dense_width"],
            mlp_only_layers=list(range(model.config.n_dense_layers)),
            num_experts=experts["n_experts"],
            num_experts_per_tok=experts["top_k"],
            moe_intermediate_size=experts["width"],
            eos_token_id=None,
            pad_token_id=0,
        )
    ).eval()
    counts = [sum(p.numel() for p in m.parameters()) for m in (model, peer)]
    assert counts[0] == counts[1], f"{counts[0]} parameters against {counts[1]}"
    return peer


@torch.no_grad()
def without_cache(model: EngramLM, ids: Tensor, n: int) -> Tensor:
    """The `n` likeliest tokens, each from the whole text before it."""
    for _ in range(n):
        last = model.logits(model.run(ids).hidden[:, -1])
        ids = torch.cat([ids, last.argmax(-1, keepdim=True)], 1)
    return ids


def main(quick: bool) -> None:
    """Time every case and write the result."""
    model = EngramLM(ModelConfig.from_dict(CONFIG)).eval()
    bare = EngramLM(ModelConfig.from_dict({**CONFIG, "memory": None})).eval()
    peer, vocab = peer_of(bare), CONFIG["vocab_size"]
    table = Table("prompts of T tokens and n new ones each", ("B", "T", "n"), SIDES, OWN)
    for B, T in ((1, 16),) if quick else ((1, 32), (1, 512), (8, 32), (8, 512)):
        for n in (1, 4 if quick else 32):

            def through_transformers(ids: Tensor, n: int = n) -> Tensor:
                lengths: dict[str, Any] = {"max_new_tokens": n, "min_new_tokens": n}
                return peer.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **lengths)

            sides = {
                "engram": lambda ids, n=n: generate(model, ids, n),
                "engram without memory": lambda ids, n=n: generate(bare, ids, n),
                "transformers": through_transformers,
                "engram without cache": lambda ids, n=n: without_cache(model, ids, n),
            }
            table.add((B, T, n), alternate(sides, lambda B=B, T=T: torch.randint(0, vocab, (B, T)), rounds=11))
    if not quick:
        finish("decoding", [table], config=CONFIG)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small case, and nothing written")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    prepare_process()
    torch.set_num_threads(args.threads)
    main(args.quick)

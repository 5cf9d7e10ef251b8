"""Small models of every shape that a config can name, with no weight at a special value."""

from __future__ import annotations

from typing import Any

import torch

from engram import EngramLM, ModelConfig

V = 80
MLA = {"kind": "mla", "n_heads": 2, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
GQA = {"kind": "gqa", "n_heads": 2, "n_kv_heads": 1, "head_dim": 12}
YARN = {"factor": 4.0, "original_max_seq_len": 50, "beta_fast": 5.0}
BIGRAM = {"kind": "additive_bigram", "layers": [0], "orders": [2], "n_heads": 1, "row_width": 24, "rows": [31]}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "branches": {"branches": 4},
    "latent": {"attention": MLA},
    "further": {"attention": {**GQA, "yarn": YARN}},
    "further, latent": {"attention": {**MLA, "yarn": YARN}},
    "tied": {"tied": True},
    "dense": {"experts": None, "n_dense_layers": 3},
    "no memory": {"memory": None},
    "over encoding": {"memory": {"kind": "over_encoding", "rows": [31, 37], "n_heads": 2, "row_width": 4}},
    "over encoding, branches": {
        "memory": {"kind": "over_encoding", "rows": [31, 37], "n_heads": 2, "row_width": 4},
        "branches": 2,
    },
    "bigram": {"memory": BIGRAM},
    "bigram, branches": {"memory": BIGRAM, "branches": 2},
    "rows by position": {"memory": {"kind": "shuffled", "rows": [31, 37], "n_heads": 2, "row_width": 4}},
    "documents end at eos": {
        "memory": {"hash": "qwen", "compress": False, "eos_id": 5, "rows": [31, 37], "n_heads": 2, "row_width": 4}
    },
    "bfloat16 rows": {"memory": {"rows": [31, 37], "n_heads": 2, "row_width": 4, "table_dtype": "bfloat16"}},
    "two memories": {"memory": {"layers": [0, 2], "rows": [31, 37], "n_heads": 2, "row_width": 4}},
}


def model_of(**changes: Any) -> EngramLM:
    base: dict[str, Any] = {
        "vocab_size": V,
        "d_model": 24,
        "n_layers": 3,
        "attention": GQA,
        "dense_width": 32,
        "experts": {"n_experts": 4, "top_k": 2, "width": 12, "shared_width": 8},
        "memory": {"layers": [1], "rows": [31, 37], "n_heads": 2, "row_width": 4},
    }
    model = EngramLM(ModelConfig.from_dict({**base, **changes}))
    for name, parameter in model.named_parameters():
        if "conv_weight" in name or "table" in name:
            torch.nn.init.normal_(parameter)
    return model

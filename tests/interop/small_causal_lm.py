"""The smallest model with all parts that tests of `EngramForCausalLM` need."""

from typing import Any

import torch

V = 40
LOOKUP = torch.arange(V) // 2
CONFIG: dict[str, Any] = {
    "vocab_size": V,
    "d_model": 24,
    "n_layers": 2,
    "attention": {"kind": "gqa", "n_heads": 2, "n_kv_heads": 1, "head_dim": 12},
    "dense_width": 32,
    "experts": {"n_experts": 4, "top_k": 2, "width": 12},
    "memory": {"layers": [1], "rows": [31, 37], "n_heads": 2, "row_width": 4},
}

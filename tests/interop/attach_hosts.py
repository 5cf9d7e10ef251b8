"""Tiny random models of transformers to attach memory to, and a memory that says something."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from engram import MemoryConfig
from engram.interop import Attachment, attach

V, D, BLOCKS = 90, 32, 3
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HOSTS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=V, n_embd=D, n_layer=BLOCKS, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    ),
}
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
LAYERS = (0, 2)
MEMORY = MemoryConfig(n_heads=2, row_width=8, rows=(150, 200), compress=False)


def host(name: str = "llama") -> PreTrainedModel:
    torch.manual_seed(0)
    model = HOSTS[name]().eval()
    with torch.no_grad():  # far enough from uniform that a greedy choice is not one of rounding
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


def attached(model: PreTrainedModel, **options: Any) -> Attachment:
    """Memory whose gates, keys, values and convolution are all at work."""
    options = {"layers": LAYERS, "memory": MEMORY, **options}
    attachment = attach(model, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in attachment.parameters():
            parameter.normal_()
    return attachment


def some_ids(B: int, T: int, seed: int = 2) -> Tensor:
    return torch.randint(3, V, (B, T), generator=torch.Generator().manual_seed(seed))


def words_tokenizer(fold: bool = True) -> PreTrainedTokenizerFast:
    """V words, of which each other one differs from the one before in case alone (if `fold`)."""
    words = ["<pad>", "<s>", "</s>", *(f"w{i // 2}" if i % 2 or not fold else f"W{i // 2}" for i in range(V - 3))]
    if not fold:
        words[3:] = [f"v{i}" for i in range(V - 3)]
    vocabulary = {word: i for i, word in enumerate(words)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>")), pad_token="<pad>", eos_token="</s>"
    )

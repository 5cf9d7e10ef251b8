"""Qwen4-Exp of transformers with our memory layers in the places of its own: same outputs, its caches, its `generate`.

A layer's decoding state lies in the model's own cache, where the model's layers keep theirs, so that whatever reorders
or resets the cache (beam search, batches that are repeated) takes it along.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engram.config import require
from engram.memory import Engram, EngramState, HashState
from engram.memory.fusion import FusionState

_CONVOLUTION, _IDS = 1, 2  # numbers of the cache's states; 0 is the attention's


class PLELayer(nn.Module):
    """An `Engram` with the signature of transformers' `Qwen4ExpTextPLELayer`.

    On padding it returns 0, where the other lets its convolution write what real tokens before it said; nothing reads
    that.
    """

    def __init__(self, memory: Engram, layer_idx: int) -> None:
        super().__init__()
        self.memory = memory
        self.layer_idx = layer_idx

    def forward(
        self, hidden_states: Tensor, input_ids: Tensor, cache: Any = None, conv_mask: Tensor | None = None
    ) -> Tensor:
        """The update of `hidden_states` `[B, T, M d]`, of the same shape.

        Args:
            hidden_states: the residual branches side by side.
            input_ids: raw ids `[B, T]`, eos at padding.
            cache: a transformers `Cache`, or None.
            conv_mask: `[B, T]`, 0 at padding; none is padding if None.
        """
        M = self.memory.config.branches
        hidden, real = hidden_states.unflatten(-1, (M, -1)), None if conv_mask is None else conv_mask.bool()
        if cache is None:
            return self.memory(hidden, input_ids, padding_mask=real).flatten(-2)
        update, state = self.memory.step(hidden, input_ids, self._state(cache, len(input_ids)), padding_mask=real)
        self._keep(cache, state)
        return update.flatten(-2)

    def _state(self, cache: Any, batch_size: int) -> EngramState:
        state = self.memory.init_state(batch_size)
        ids = cache.get_conv_state(self.layer_idx, state_idx=_IDS)
        if ids is None:
            return state
        # Eos stands at padding, and their convolution's inputs are 0: one document for all gives the same.
        ids = ids[..., -state.ids.ids.shape[1] :]
        fusion, context = state.fusion, state.fusion.values.shape[1]
        if context:
            kept = cache.get_conv_state(self.layer_idx, state_idx=_CONVOLUTION)[..., -context:].transpose(1, 2)
            values, scales = kept.split([fusion.values.shape[-1], fusion.scales.shape[-1]], -1)
            documents = torch.zeros_like(fusion.documents)
            fusion = FusionState(values.to(fusion.values.dtype), scales.to(fusion.scales.dtype), documents)
        return EngramState(HashState(ids, torch.zeros_like(ids)), fusion)

    def _keep(self, cache: Any, state: EngramState) -> None:
        ids, (values, scales, _) = state.ids.ids, state.fusion
        # Whole windows: each replaces the one before.
        cache.update_conv_state(ids, self.layer_idx, state_idx=_IDS, conv_kernel_size=ids.shape[1])
        if values.shape[1]:
            window = torch.cat([values, scales], -1).transpose(1, 2)
            cache.update_conv_state(window, self.layer_idx, state_idx=_CONVOLUTION, conv_kernel_size=window.shape[-1])


def use_memory(model: nn.Module, memories: Mapping[int, Engram]) -> nn.Module:
    """Put memories in the places of a Qwen4-Exp model's own, by block (0-based), and return the model.

    Saving the model then is `write_memory`'s work: `save_pretrained` would write our names.

    Raises `ConfigError` for a block without such a layer, or a memory of another width or number of branches.
    """
    blocks = {
        int(found[1]): module
        for name, module in model.named_modules()
        if (found := re.search(r"(?:^|\.)layers\.(\d+)$", name)) and getattr(module, "ple", None) is not None
    }
    for layer, memory in memories.items():
        require(layer in blocks, "block of a memory", layer, f"one of the model's {sorted(blocks)}")
        size = (memory.config.d_model, memory.config.branches)
        norm = blocks[layer].attn_hyper_connection.hc_norm
        wanted = (norm.group_size, norm.weight.numel() // norm.group_size)
        require(size == wanted, f"width and branches of the memory for block {layer}", size, str(wanted))
    for layer, memory in memories.items():
        blocks[layer].ple = PLELayer(memory, layer)
    return model

"""EngramLM as a transformers model: `AutoModelForCausalLM`, `save_pretrained`, `generate` and what builds on them.

Importing this module registers it. Weights and `config.json` have the names and form that `engram.training.weights`
gives them, so that a folder that either wrote is read by both.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import torch
from accelerate.hooks import attach_align_device_hook, remove_hook_from_submodules
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg

from engram.backbone import DecodingState, EngramLM
from engram.backbone.block import Block
from engram.config import ConfigError, ModelConfig, require
from engram.experts import RoutingStats
from engram.interop.packing import documents_by_position
from engram.memory import RowReader
from engram.memory.readers import documents_of
from engram.parallel.consolidate import INDEX, WEIGHTS
from engram.training.checksums import CHECKSUMS, write_checksums
from engram.training.identity import origin_of
from engram.training.weights import TRAINED_WITH, require_float_rows, require_sound

_FIELDS = [field.name for field in dataclasses.fields(ModelConfig)]
_SLACK = 64  # tokens that a cache can give back at least, as assisted generation does with those that it rejects
_ROOM = 128  # tokens by which a cache grows
_NOT_SUPPORTED = ("inputs_embeds", "output_hidden_states", "output_attentions", "output_router_logits")
# Of transformers' collators, beside position_ids that say it too.
_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


class EngramConfig(PretrainedConfig):
    """A `ModelConfig` as transformers keeps it: its fields, as plain data, beside transformers' own.

    Raises:
        ConfigError: as `ModelConfig.from_dict`, when a model is built.
    """

    model_type = "engram"
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "max_position_embeddings": "max_seq_len",
        "tie_word_embeddings": "tied",
    }

    def __init__(self, **kwargs: Any) -> None:
        for name in _FIELDS:
            if name in kwargs:
                setattr(self, name, kwargs.pop(name))
        super().__init__(**kwargs)

    @classmethod
    def of(cls, config: ModelConfig, **kwargs: Any) -> Self:
        """From a model's own config, and settings of transformers such as `eos_token_id`."""
        return cls(**config.to_dict(), **kwargs)

    def model_config(self) -> ModelConfig:
        """The model's own config."""
        return ModelConfig.from_dict({name: getattr(self, name) for name in _FIELDS if hasattr(self, name)})


class _PastLayer(CacheLayerMixin):
    """A `DecodingState` where transformers expects one layer's keys and values."""

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, state: DecodingState) -> None:
        super().__init__()
        self.state = state
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the model's first step makes what is kept."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise ConfigError("a cache of EngramForCausalLM is changed by the model alone")

    def get_seq_length(self) -> int:
        return int(self.state.length)

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def reset(self) -> None:
        self.state.reset()

    def offload(self) -> None:
        raise ConfigError("a cache of EngramForCausalLM stays on its device")

    def crop(self, tokens_to_remove: int) -> None:
        allowed = "0 or less: minus the number of tokens to take back"
        require(tokens_to_remove <= 0, "tokens_to_remove", tokens_to_remove, allowed)
        self.state.rollback(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.state.select(beam_idx.to(self.state.real.device))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(self.state.batch_size, device=self.state.real.device)
        self.state.select(rows.repeat_interleave(repeats))


class EngramCache(Cache):
    """What decoding keeps of the past, for `generate`: keys and values, and the memories' states.

    Args:
        state: of the model, before its first token or after some.
    """

    def __init__(self, state: DecodingState) -> None:
        super().__init__(layers=[_PastLayer(state)])

    @property
    def state(self) -> DecodingState:
        """The model's own form of it."""
        return cast(_PastLayer, self.layers[0]).state


class EngramForCausalLM(PreTrainedModel, GenerationMixin):
    """`EngramLM` behind transformers' interface; `lm` is the model itself.

    A token compression is kept with the weights, as `token_lookup`; where there is none it maps ids to themselves.

    Tables have row-sparse gradients, which transformers' own optimisers and Trainer don't take: train by
    `engram.interop.trainer.MemoryTrainer`, or in a loop of your own with the optimisers of `engram.training.optim` and
    `update_balance` after each step.

    Args:
        config: what to build.
        lookup: raw id -> canonical id, int64 `[V]` (`TokenCompressor.lookup`), for the memory's hash.
    """

    config_class = EngramConfig
    config: EngramConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _no_split_modules = ["Block", "Engram", "OverEncoding", "AdditiveBigram"]  # noqa: RUF012
    _supports_sdpa = True
    token_lookup: Tensor | None

    def __init__(self, config: EngramConfig, lookup: Tensor | None = None) -> None:
        super().__init__(config)
        own = config.model_config()
        lm = EngramLM(own, lookup)
        # One dictionary of children for both: what replaces a child of one (peft, a quantiser) replaces it for both,
        # and parameters have the names that EngramLM gives them.
        self._modules.update(lm._modules)
        lm._modules = self._modules
        self._lm = (lm,)  # in a tuple, so that it is no child
        self._loads: Tensor | None = None  # of experts, since their routers were last balanced
        compressed = own.memory is not None and own.memory.present and own.memory.compress
        kept = lookup.clone() if lookup is not None else torch.arange(own.vocab_size)
        self.register_buffer("token_lookup", kept if compressed else None)
        self.register_load_state_dict_post_hook(_compress_anew)
        self.post_init()

    @property
    def lm(self) -> EngramLM:
        """The model itself, of the same modules."""
        return self._lm[0]

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """As transformers' own, with checksums, and with what the weights were trained with in the config.

        Weights of a model that was saved there before, in other files than these, are removed. Raises `ConfigError`
        naming a table whose rows are quantized.
        """
        require_float_rows(self)
        setattr(self.config, TRAINED_WITH, origin_of(self.lm.config, self.token_lookup, None))
        folder = Path(save_directory)
        if is_main_process:
            (folder / INDEX).unlink(missing_ok=True)  # transformers itself leaves it where it writes one file
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            if (folder / INDEX).exists():
                (folder / WEIGHTS).unlink(missing_ok=True)  # and this one, which it would load
            if files := sorted(folder.glob("model*.safetensors")):
                write_checksums(folder, files)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """As transformers' own, after what `load_model` checks of a folder with checksums.

        Raises `ConfigError` for what it finds, and naming tensors that are missing or have another shape: a memory with
        fresh rows would say nothing, and nothing would say so.
        """
        if (Path(str(pretrained_model_name_or_path)) / CHECKSUMS).is_file():
            require_sound(pretrained_model_name_or_path)
        kwargs["ignore_mismatched_sizes"] = True  # they are refused here, by name
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        missing = set(info["missing_keys"])
        if "token_lookup" in missing and model.token_lookup is not None:  # saved by a model without a compression
            missing.remove("token_lookup")
            model.token_lookup = torch.arange(model.vocab_size, device=model.embed.weight.device)
        wrong = sorted(missing | {" ".join(map(str, key)) for key in info["mismatched_keys"]})
        require(not wrong, "tensors that do not fit the config, or are missing", wrong, "none")
        model._compress()
        _hook_what_is_not_called(model)
        return (model, info) if output_loading_info else model

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.lm.config.vocab_size

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: every module draws its own when it is made."""

    def _compress(self) -> None:
        """Let the memories hash by `token_lookup` as it is now."""
        if self.token_lookup is not None and not self.token_lookup.is_meta:
            for module in self.modules():
                if isinstance(module, RowReader):
                    module.compress_by(self.token_lookup)

    def get_input_embeddings(self) -> nn.Module:
        return self.lm.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed = value

    def get_output_embeddings(self) -> nn.Module | None:
        return self.lm.head

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Raises `ConfigError` for another size: rows of the memory belong to this vocabulary's ids."""
        require(new_num_tokens in (None, self.vocab_size), "new_num_tokens", new_num_tokens, f"{self.vocab_size}")
        fits = self.vocab_size % (pad_to_multiple_of or 1) == 0
        require(fits, "pad_to_multiple_of", pad_to_multiple_of, f"none, or a divisor of {self.vocab_size}")
        return self.lm.embed

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """What `generate` calls to make the cache: one of ours, whatever implementation is asked for."""
        if model_kwargs.get("cache") is None and generation_config.use_cache:
            n = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            candidates = (generation_config.num_assistant_tokens, generation_config.prompt_lookup_num_tokens)
            slack = max(_SLACK, *(2 * (most or 0) for most in candidates))
            model_kwargs["cache"] = EngramCache(self.lm.init_state(n, _ROOM, slack))

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")  # as transformers' own models
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: EngramCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits `[B, T, V]` of the next tokens, in `CausalLMOutputWithPast`.

        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, T]`, or `[B, past + T]` with a cache: 0 at padding. With a cache it may stand only
                before the first token of a sequence.
            position_ids: `[B, T]`; without a cache and a mask, a document starts where they do not go on by one, as
                transformers packs sequences. Not read otherwise: positions follow from the mask.
            cache: of tokens before these, which takes these in. No gradient goes through it. `past_key_values` is its
                older name.
            labels: `[B, T]`, shifted here, -100 where there is none: adds the mean loss, in nats, and in training the
                routers' auxiliary losses. With `num_items_in_batch`, as transformers' Trainer gives it where it sums
                gradients of several batches, this batch's part of the mean over all of their labels.
            use_cache: return a cache; False where none is given if None.
            logits_to_keep: how many last positions to give logits for (0: all), or which ones.

        Raises:
            ConfigError: `inputs_embeds` (memory is read by ids), hidden states, attentions or router logits asked for;
                a mask of another shape; a cache of another kind; tensors under other names than these; the rest as
                `EngramLM.step`.
        """
        require(input_ids is not None, "input_ids", input_ids, "token ids: embeddings alone can't be looked up")
        assert input_ids is not None
        for name in _NOT_SUPPORTED:
            require(not _asked(kwargs.get(name)), name, type(kwargs.get(name)).__name__, "none: not supported")
        for name, value in kwargs.items():
            known = name == "num_items_in_batch" or (name in _PACKING and position_ids is not None)
            require(known or not isinstance(value, Tensor | Cache), name, type(value).__name__, "none: it is not read")
        mask = attention_mask
        if mask is not None:
            shape = f"[{input_ids.shape[0]}, {input_ids.shape[1]}], or longer with a cache"
            mask = mask[:, -input_ids.shape[1] :].bool()
            require(mask.shape == input_ids.shape, "shape of attention_mask", tuple(mask.shape), shape)
        if cache is not None:
            require(isinstance(cache, EngramCache), "cache", type(cache).__name__, "an EngramCache, or none yet")
        if use_cache or cache is not None:
            cache = self._with_room(cache, *input_ids.shape)
            output = self.lm.step(input_ids, cache.state, mask)
        else:
            output = self.lm.run(input_ids, _documents(input_ids, mask, position_ids))
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, loss = self.lm.logits(output.hidden[:, kept]), None
        if labels is not None:
            n_all = kwargs.get("num_items_in_batch")
            loss = self.loss_function(logits, labels, self.vocab_size, num_items_in_batch=n_all)
            if self.training:
                self._count_loads(output.routing)
                part = 1 if n_all is None else (labels[:, 1:] != -100).sum() / n_all
                loss = loss + part * sum(stats.aux_loss for stats in output.routing)
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=cache)

    def update_balance(self) -> None:
        """Move the routers' biases by the loads of all training batches since the last call, after an optimiser's step.

        `MemoryTrainer` calls it; in a loop of your own do it yourself, or experts are used as unevenly as they start.
        """
        if self._loads is not None:
            for layer, load_E in zip(self.lm.moe_layers(), self._loads, strict=True):
                layer.update_balance(load_E)
            self._loads = None

    def _count_loads(self, routing: list[RoutingStats]) -> None:
        if routing:
            loads = torch.stack([stats.load_E.detach() for stats in routing])
            self._loads = loads if self._loads is None else self._loads + loads

    def _with_room(self, cache: EngramCache | None, B: int, T: int) -> EngramCache:
        """The cache, or a new one, with room for T more tokens."""
        if cache is None:
            return EngramCache(self.lm.init_state(B, T + _ROOM, _SLACK))
        needed = cache.get_seq_length() + T
        if needed > cache.state.capacity:
            cache.state.grow(needed + max(_ROOM, needed // 2))
        return cache


def _compress_anew(model: EngramForCausalLM, incompatible: Any) -> None:
    model._compress()


def _hook_what_is_not_called(model: EngramForCausalLM) -> None:
    """Where a device map has spread a model, let accelerate's hooks reach what it does not call.

    They bring weights and inputs to a module when it is called. A block reads weights of modules inside it in its own
    kernels, so all that is offloaded of it comes when the block is called; memories are called in two stages.
    """
    for name, block in model.named_modules():
        hooks = [hook for part in block.modules() if (hook := getattr(part, "_hf_hook", None)) is not None]
        offloaded = [hook for hook in hooks if getattr(hook, "offload", False)]
        if isinstance(block, Block) and offloaded:
            hook = offloaded[0]
            remove_hook_from_submodules(block)
            attach_align_device_hook(
                block,
                execution_device=hook.execution_device,
                offload=True,
                weights_map=hook.weights_map.dataset,
                offload_buffers=hook.offload_buffers,
                module_name=name,
                preload_module_classes=[type(block).__name__],
            )
    for memory in model.lm.memories().values():
        device = getattr(getattr(memory, "_hf_hook", None), "execution_device", None)
        if device is not None:
            for stage in ("look_up", "add_to"):
                setattr(memory, stage, partial(_on_device, getattr(memory, stage), device))


def _on_device(stage: Callable[..., Any], device: Any, *args: Any) -> Any:
    return stage(*send_to_device(args, device))


def _asked(value: Any) -> bool:
    return value is not None and value is not False


def _documents(ids: Tensor, mask: Tensor | None, position_ids: Tensor | None) -> Tensor | None:
    """Document ids `[B, T]`, or None where each row is one document."""
    if mask is not None:
        return documents_of(ids, None, mask)
    return None if position_ids is None else documents_by_position(position_ids, len(ids))


AutoConfig.register(EngramConfig.model_type, EngramConfig)
AutoModelForCausalLM.register(EngramConfig, EngramForCausalLM)

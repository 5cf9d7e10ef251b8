"""Memory added to a decoder-only transformers model, through hooks: `attach(model, layers=(1, 5), memory=...)`.

A hook on the decoder sees ids, mask and cache and begins to bring rows; one on each chosen block adds the memory's
update to what the block reads. The layer is arXiv:2601.07372's, with one residual branch; its output is zero at first.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from engram.config import ConfigError, MemoryConfig, require
from engram.interop.adapter import Saved, read_adapter, write_adapter
from engram.interop.decoding import Past, keep_on, past_of
from engram.interop.host import Host, Identity, find_tokenizer
from engram.interop.packing import documents_by_position
from engram.memory import Engram, EngramState, TokenCompressor
from engram.memory.readers import Reading
from engram.memory.table import tables_in
from engram.training.weights import require_float_rows

_NAME = "engram"


@dataclass
class _Call:
    """One forward pass of the decoder: what has begun in it, and what is to be kept after it."""

    n_tokens: int = 0
    past: Past | None = None
    readings: dict[str, Reading] = field(default_factory=dict)
    before: dict[str, EngramState] = field(default_factory=dict)
    after: dict[str, EngramState] = field(default_factory=dict)
    gates: dict[int, Tensor] = field(default_factory=dict)


class Attachment(nn.Module):
    """The memory of a transformers model, of which it is the submodule `engram`; made by `attach`.

    Parameters, `to`, `requires_grad_` and the rest of `nn.Module` concern the memory alone. `memory` holds the layers,
    by block, `config` what they are. `gates`: those of the last forward pass, `[B, T]`, by block.
    """

    config: MemoryConfig
    identity: Identity

    def __init__(
        self, host: Host, config: MemoryConfig, tokenizer: Any | None, compressor: TokenCompressor | None, slack: int
    ) -> None:
        super().__init__()
        lookup = None if compressor is None else compressor.lookup
        self.memory = nn.ModuleDict({str(layer): Engram(config, layer, lookup) for layer in config.layers})
        self.config = config
        self.identity = Identity.of(host, tokenizer, compressor)
        self.slack = slack
        self.gates: dict[int, Tensor] = {}
        self._host = (host,)  # in a tuple, so that the model is not a submodule of its own memory
        self._calls: list[_Call] = []  # a stack, for a forward pass inside another
        self._outer_ids: list[Any] = []  # another, of the module around the decoder
        self._frozen: list[nn.Parameter] = []
        self._handles: list[Any] = []
        self._kept_from_saving: Any = None
        self._arguments = _names_of_arguments(host.decoder)
        self._names = frozenset(self.state_dict())
        with torch.no_grad():
            for layer in self._layers().values():
                _make_silent(layer)

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model that the memory is attached to."""
        return self._host[0].model

    def save(self, folder: str | Path) -> Path:
        """Write the memory alone to a folder, from which `load_adapter` attaches it again; other files there stay.

        Raises `ConfigError` naming the file when the disk refuses, a table whose rows are quantized, or weights that
        peft has put into the memory, which `load_adapter` could not place.
        """
        require_float_rows(self)
        changed = sorted(self.state_dict().keys() ^ self._names)
        require(
            not changed,
            "weights of the memory",
            changed,
            "those it was made with: `exclude_modules` of peft's config keeps it off",
        )
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        return write_adapter(Path(folder), self.config, self.identity, tensors)

    def restore(self, folder: str | Path) -> None:
        """Take weights that `save` wrote of a memory like this one. Raises `ConfigError` as `load_adapter`."""
        self._take(read_adapter(Path(folder)), Path(folder))

    def remove(self) -> None:
        """Leave the model as it was: no hooks, no memory, and `requires_grad` of its parameters as before.

        Raises `ConfigError` if that is done already.
        """
        host = self._host[0]
        require(getattr(host.model, _NAME, None) is self, "attachment", "removed", "one that is attached")
        for handle in self._handles:
            handle.remove()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._handles, self._frozen = [], []
        delattr(host.model, _NAME)
        host.model._keys_to_ignore_on_save = self._kept_from_saving

    def requires_grad_(self, requires_grad: bool = True) -> Attachment:
        """As of any module; rows of kind `frozen_random` stay frozen. `peft.get_peft_model` freezes all that it finds:
        call this after it."""
        super().requires_grad_(requires_grad)
        if self.config.kind == "frozen_random":
            for layer in self._layers().values():
                layer.table.requires_grad_(False)
        return self

    def _layers(self) -> dict[str, Engram]:
        return cast(dict[str, Engram], self.memory)

    def _take(self, saved: Saved, folder: Path) -> None:
        self.identity.require_same(saved.base_model)
        for name, own in dataclasses.asdict(self.config).items():
            its = getattr(saved.config, name)
            require(own == its, f"memory.{name}", own, f"{its!r}, as saved in {str(folder)!r}")
        try:
            self.load_state_dict(saved.tensors)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"weights in {str(folder)!r} do not fit their settings: {reason}") from error

    def _enter(self, freeze_backbone: bool) -> None:
        """Put the memory into the model."""
        host = self._host[0]
        for name, layer in self._layers().items():
            layer.to(_device_of(host.blocks[int(name)]))
        if freeze_backbone:
            adapters = _parameters_of_adapters(host.model)
            self._frozen = [p for p in host.model.parameters() if p.requires_grad and p not in adapters]
            for parameter in self._frozen:
                parameter.requires_grad_(False)
        self.train(host.model.training)
        host.model.add_module(_NAME, self)
        # `save_pretrained` of the model writes the model; the memory has a folder of its own.
        self._kept_from_saving = host.model._keys_to_ignore_on_save
        own = {f"{_NAME}.{name}" for name in self.state_dict()}
        own |= {f"{_NAME}.{name}.records" for name, *_ in tables_in(self)}  # which they have when they are quantized
        host.model._keys_to_ignore_on_save = {*(self._kept_from_saving or ()), *own}
        if host.around is not None:
            self._handles = [
                host.around.register_forward_pre_hook(
                    functools.partial(self._note_ids, _names_of_arguments(host.around)), with_kwargs=True
                ),
                host.around.register_forward_hook(self._forget_ids, always_call=True),
            ]
        self._handles += [
            host.decoder.register_forward_pre_hook(self._begin, with_kwargs=True),
            host.decoder.register_forward_hook(self._end, with_kwargs=True, always_call=True),
            *(
                host.blocks[int(name)].register_forward_pre_hook(functools.partial(self._add, name), with_kwargs=True)
                for name in self.memory
            ),
        ]

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The decoder's arguments by name."""
        return dict(zip(self._arguments, args, strict=False)) | kwargs

    def _note_ids(
        self, names: tuple[str, ...], around: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Before the module around the decoder, which in a multimodal model is the last to be given ids."""
        self._outer_ids.append((dict(zip(names, args, strict=False)) | kwargs).get("input_ids"))

    def _forget_ids(self, *_: Any) -> None:
        self._outer_ids.pop()

    def _begin(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the decoder: look the rows of all layers up."""
        call = _Call()
        self._calls.append(call)  # first of all: `_end` takes it off, whatever fails here
        given = self._given(args, kwargs)
        ids, embeds, cache = given.get("input_ids"), given.get("inputs_embeds"), _cache_among(given)
        if ids is None and self._outer_ids:
            ids = self._outer_ids[-1]
        if ids is None:
            raise ConfigError(
                "input_ids is None: the attached memory reads token ids, and `inputs_embeds` alone does not say them"
            )
        if embeds is not None:
            require(
                embeds.shape[:2] == ids.shape,
                "shape of input_ids",
                tuple(ids.shape),
                f"{tuple(embeds.shape[:2])}, as of inputs_embeds",
            )
        call.n_tokens = ids.shape[1]
        if cache is not None:
            call.past = past_of(cache, self.memory) or Past(self.memory, len(ids), self.slack)
        elif self._will_make_cache(given):
            call.past = Past(self.memory, len(ids), self.slack)
        mask = full = given.get("attention_mask")
        if isinstance(mask, dict):  # by the kind of a block's attention: chunks, too, hide from a token the one before
            full = mask.get("full_attention")
            mask = next(iter(mask.values()), None) if full is None else full
        seen = 0 if call.past is None else call.past.seen
        padding_mask, documents = _padding_mask(mask, ids, seen), None
        if padding_mask is not None:
            documents = None if full is None or full.ndim == 2 else _documents_by_mask(full, padding_mask, seen)
        elif cache is None:
            documents = _documents(given, ids)
        call.before = {} if call.past is None else call.past.before(call.n_tokens)
        for name, layer in self._layers().items():
            device = layer.project.weight.device
            own_documents, own_mask = (None if x is None else x.to(device) for x in (documents, padding_mask))
            call.readings[name] = layer.look_up(ids.to(device), own_documents, own_mask, call.before.get(name))

    def _add(
        self, name: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before a block: add the memory's update to what it reads."""
        if not self._calls:
            raise ConfigError(
                f"block {name} is called outside of its decoder's forward pass: the attached memory knows no token ids"
            )
        call = self._calls[-1]
        hidden = args[0] if args else kwargs["hidden_states"]
        layer = self._layers()[name]
        added = layer.add_to(hidden.to(layer.project.weight.device), call.readings[name], call.before.get(name))
        call.gates[int(name)] = cast(Tensor, added.gates).detach().squeeze(-1)
        if call.past is not None:
            call.after[name] = added.state
        following = added.hidden.to(hidden.device)
        if args:
            return (following, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": following}

    def _end(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """After the decoder, also one that failed: keep what decoding needs on the cache."""
        call = self._calls.pop()
        if output is None:
            return
        self.gates = call.gates
        cache = _cache_among(dict(enumerate(output)) if isinstance(output, tuple) else output)
        if cache is None:  # not every decoder gives back the one it was given
            cache = _cache_among(self._given(args, kwargs))
        if call.past is not None and cache is not None and len(call.after) == len(self.memory):
            call.past.after(call.after, call.n_tokens)
            keep_on(cache, call.past)

    def _will_make_cache(self, given: dict[str, Any]) -> bool:
        """Whether the decoder makes a cache of its own that someone may go on from."""
        wanted = given.get("use_cache")
        wanted = getattr(self.model.config.get_text_config(), "use_cache", False) if wanted is None else wanted
        return bool(wanted) and not self.model.training and not torch.compiler.is_compiling()


def attach(
    model: nn.Module,
    layers: Sequence[int] | None = None,
    memory: MemoryConfig | None = None,
    freeze_backbone: bool = True,
    *,
    tokenizer: Any | None = None,
    slack: int = 32,
) -> Attachment:
    """Add memory in front of some blocks of a decoder-only transformers model, which at first answers as before.

    Works with `generate` and its caches (beams, left padding, assisted decoding), gradient checkpointing, the Trainer
    (`engram.interop.trainer.MemoryTrainer`), and with peft on the same model, put on before or after.

    Args:
        model: a transformers model, or a `PeftModel` around one. Changed in place.
        layers: block indices from 0; those of `memory` if None.
        memory: what it is. Hidden size and vocabulary are the model's, and there is one residual branch.
        freeze_backbone: stop the gradients of all that is there, but for parameters that peft has added.
        tokenizer: for the compression of ids; if None, the one in the folder or repository the model was loaded from.
        slack: how many tokens `Cache.crop` can take back of single steps or of a cache's first call: in assisted
            decoding, at least as many as a draft has.

    Raises:
        ConfigError: a model that is not decoder-only, has memory, or has other sizes than `memory`; a layer it has not;
            no tokenizer where ids are to be compressed; a memory that is not read before blocks.
    """
    host = Host.of(model)
    require(isinstance(memory, MemoryConfig), "memory", memory, "a MemoryConfig that says how many rows there are")
    assert memory is not None
    given = memory.layers if layers is None else layers
    require(
        isinstance(given, Collection) and all(type(layer) is int for layer in given),
        "layers",
        given,
        "block indices from 0",
    )
    name = type(host.model).__name__
    require(not hasattr(host.model, _NAME), "model", name, f"one without an attribute {_NAME!r}: memory is attached")
    require(slack >= 0, "slack", slack, "0 or more")
    n, sizes = len(host.blocks), {"d_model": host.hidden_size, "vocab_size": host.vocab_size, "branches": 1}
    for setting, size in sizes.items():
        own = getattr(memory, setting)
        require(own in (0, size), f"memory.{setting}", own, f"{size}, as of {name}, or 0 to take it")
    chosen: dict[str, Any] = {**sizes, "layers": tuple(given)}
    config = dataclasses.replace(memory, **chosen)
    require(config.layers[-1] < n, "layers", config.layers, f"block indices below {n}, the blocks of {name}")
    compressor = None
    if config.compress:
        tokenizer = find_tokenizer(host, tokenizer)
        compressor = TokenCompressor.from_tokenizer(tokenizer, host.vocab_size)
    attachment = Attachment(host, config, tokenizer, compressor, slack)
    attachment._enter(freeze_backbone)
    return attachment


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    freeze_backbone: bool = True,
    *,
    tokenizer: Any | None = None,
    slack: int = 32,
) -> Attachment:
    """Attach the memory that `Attachment.save` wrote; the other arguments are those of `attach`.

    Raises `ConfigError` for a folder that can't be read or was changed, and for a model or tokenizer other than those
    that the memory was trained with.
    """
    saved = read_adapter(Path(folder))
    # Asked first: sizes of another model would be refused in words about the memory.
    Identity.of(Host.of(model), None, None).require_same({**saved.base_model, "tokenizer": "", "compression": ""})
    with torch.random.fork_rng(devices=[]):  # weights are overwritten: the caller's random state stays as it was
        attachment = attach(model, None, saved.config, freeze_backbone, tokenizer=tokenizer, slack=slack)
    try:
        attachment._take(saved, Path(folder))
    except ConfigError:
        attachment.remove()
        raise
    return attachment


def _make_silent(layer: Engram) -> None:
    """Make a layer's output zero in such a way that gradients flow.

    Rows of zeros, and biases that are zero already, make values of zeros. A row that no text has trained then never
    says anything, and held-out loss fell faster than from a zeroed value map (docs/attach.md). That map is what is left
    to zero where rows don't learn.
    """
    if layer.config.kind != "frozen_random":
        layer.table.weight.zero_()
    else:
        layer.project.weight[-layer.config.d_model :].zero_()


def _device_of(block: nn.Module) -> torch.device:
    """Where a block computes: accelerate's hooks say so of one whose weights it keeps elsewhere."""
    hooks = (getattr(module, "_hf_hook", None) for module in block.modules())
    devices = [device for hook in hooks if (device := getattr(hook, "execution_device", None)) is not None]
    return torch.device(devices[0]) if devices else next(block.parameters()).device


def _parameters_of_adapters(model: nn.Module) -> set[nn.Parameter]:
    """What peft has added to a model's layers."""
    names = [(module, name) for module in model.modules() for name in getattr(module, "adapter_layer_names", ())]
    added = [getattr(module, name, None) for module, name in names]
    return {p for part in added if isinstance(part, nn.Module) for p in part.parameters()}


def _names_of_arguments(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(module.forward).parameters)


def _cache_among(given: Any) -> Any:
    """The cache among arguments or outputs, under whatever name."""
    for name in ("cache", "past_key_values"):
        if given.get(name) is not None:
            return given[name]
    return next((value for value in given.values() if isinstance(value, Cache)), None)


def _padding_mask(mask: Any, ids: Tensor, past: int) -> Tensor | None:
    """True at real tokens, `[B, T]`, from a mask of past and new tokens `[B, past + T]` or one that says which token
    sees which, `[B, 1, T, positions]`: a token that does not see itself is padding."""
    B, T = ids.shape
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.ndim == 2:
        real = mask[:, past : past + T].bool() if mask.shape[1] >= past + T else mask[:, -T:].bool()
    elif isinstance(mask, Tensor) and mask.ndim == 4 and (mask.dtype == torch.bool or mask.is_floating_point()):
        # New tokens come right after past ones, or last where a sliding window has let positions go.
        itself = mask[:, 0].diagonal(offset=min(past, mask.shape[-1] - T), dim1=-2, dim2=-1)
        real = (itself if itself.dtype == torch.bool else itself == 0).expand(B, -1)
    else:
        real = None
    if real is None or real.shape != ids.shape:
        shown = f"{tuple(mask.shape)} of {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ConfigError(
            f"attention_mask is {shown} for ids of {tuple(ids.shape)}: allowed with memory attached is [B, past + T], "
            "or [B, 1, T, positions] of bool or float"
        )
    return real


def _documents_by_mask(mask: Tensor, real: Tensor, past: int) -> Tensor | None:
    """Documents `[B, T]` of a mask `[B, 1, T, positions]`: one starts at each token that does not see the one
    before it, neither being padding. The last is number 0.

    Raises `ConfigError` for a start among tokens that follow past ones: which document those belong to is not kept.
    """
    sees = mask[:, 0, 1:].diagonal(offset=min(past, mask.shape[-1] - real.shape[1]), dim1=-2, dim2=-1)
    starts = ~(sees if sees.dtype == torch.bool else sees == 0) & real[:, 1:] & real[:, :-1]
    if past:
        if not torch.compiler.is_compiling() and starts.any():
            raise ConfigError(
                "attention_mask hides from a token the one before it: allowed with memory attached is that (a new "
                "document) in the first call of a cache"
            )
        return None
    number = nn.functional.pad(starts.cumsum(1), (1, 0))
    return number[:, -1:] - number


def _documents(given: dict[str, Any], ids: Tensor) -> Tensor | None:
    """Documents packed in one row, where there is no mask."""
    positions = given.get("position_ids")
    return None if positions is None or positions.ndim != 2 else documents_by_position(positions, len(ids))

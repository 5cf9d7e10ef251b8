"""What a model is: frozen dataclasses, validated when made.

Every number that shapes a model stands here; a model, its budget and its checkpoint are all made from these
objects alone. Field names are the field's usual ones; formulas are those of arXiv:2601.07372 (Engram),
arXiv:2401.06066 (DeepSeekMoE), arXiv:2405.04434 (multi-head latent attention).
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar, get_args

MemoryKind = Literal["engram", "over_encoding", "additive_bigram", "capacity_one", "shuffled", "frozen_random"]
HashFamily = Literal["deepseek", "qwen"]
GateKind = Literal["signed_sqrt", "plain"]
TableType = Literal["float32", "bfloat16"]
SecondMoment = Literal["element", "row"]
ScoreKind = Literal["softmax", "sigmoid"]
BalanceKind = Literal["bias", "sequence_aux", "none"]


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the setting, its value and what is allowed."""


def require(ok: bool, name: str, value: object, allowed: str) -> None:
    """Raise `ConfigError` naming the setting, its value and what is allowed, unless `ok`."""
    if not ok:
        raise ConfigError(f"{name} is {value!r}: allowed is {allowed}")


def require_one_of(name: str, value: object, kinds: Any) -> None:
    """Raise `ConfigError` unless `value` is one of the strings of the Literal type `kinds`."""
    require(value in get_args(kinds), name, value, "one of " + ", ".join(get_args(kinds)))


def require_seed(name: str, value: int) -> None:
    """Raise `ConfigError` unless `value` can seed all generators of a run; NumPy's takes the fewest."""
    require(0 <= value < 2**32, name, value, f"0 to {2**32 - 1}")


@contextmanager
def settings_under(where: str) -> Iterator[None]:
    """Inside, the setting that a `ConfigError` names, which is what it begins with, is told with `where` before it: who
    checks a setting need not know which part of a file it was written in."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{where}.{error}") from error


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """Rotary positions that reach `factor` times as far as `original_max_seq_len`, the length trained on without them
    (YaRN, arXiv:2309.00071).

    Channels that turn `beta_fast` times or more in the original length keep their speed, those that turn `beta_slow`
    times or less turn slower by `factor`, and those between the two take something between.
    """

    factor: float
    original_max_seq_len: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self) -> None:
        name, length = "attention.yarn", self.original_max_seq_len
        require(1 <= self.factor < math.inf, f"{name}.factor", self.factor, "a finite number, 1 or more")
        require(length >= 1, f"{name}.original_max_seq_len", length, "1 or more")
        require(0 < self.beta_slow < math.inf, f"{name}.beta_slow", self.beta_slow, "above 0")
        above_slow = f"above beta_slow ({self.beta_slow})"
        require(self.beta_slow < self.beta_fast < math.inf, f"{name}.beta_fast", self.beta_fast, above_slow)

    @property
    def attention_factor(self) -> float:
        """By which queries and keys both grow, 0.1 ln(factor) + 1: the inverse root of the softmax's temperature."""
        return 0.1 * math.log(self.factor) + 1


@dataclass(frozen=True, kw_only=True)
class GQAConfig:
    """Grouped-query attention with rotary positions (arXiv:2305.13245), keys and queries normalised per head."""

    kind: ClassVar[str] = "gqa"
    n_heads: int
    n_kv_heads: int
    head_dim: int
    qk_norm: bool = True
    rope_theta: float = 10_000.0
    yarn: YarnConfig | None = None

    def __post_init__(self) -> None:
        require(self.n_heads >= 1, "attention.n_heads", self.n_heads, "1 or more")
        require(
            self.n_kv_heads >= 1 and self.n_heads % self.n_kv_heads == 0,
            "attention.n_kv_heads",
            self.n_kv_heads,
            f"a divisor of n_heads ({self.n_heads})",
        )
        require(self.head_dim >= 2 and self.head_dim % 2 == 0, "attention.head_dim", self.head_dim, "an even number")
        _check_rope(self)


@dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Multi-head latent attention (arXiv:2405.04434, section 2.1); `q_lora_rank` 0 means a full-rank query map."""

    kind: ClassVar[str] = "mla"
    n_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int = 0
    rope_theta: float = 10_000.0
    yarn: YarnConfig | None = None

    def __post_init__(self) -> None:
        for name in ("n_heads", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"):
            require(getattr(self, name) >= 1, f"attention.{name}", getattr(self, name), "1 or more")
        require(
            self.qk_rope_head_dim >= 2 and self.qk_rope_head_dim % 2 == 0,
            "attention.qk_rope_head_dim",
            self.qk_rope_head_dim,
            "an even number",
        )
        require(self.q_lora_rank >= 0, "attention.q_lora_rank", self.q_lora_rank, "0 (full rank) or more")
        _check_rope(self)


def _check_rope(config: GQAConfig | MLAConfig) -> None:
    least = 0 if config.yarn is None else 1  # YaRN asks how often channels turn, and by theta 1 all turn alike
    allowed = f"above {least}" + (" with attention.yarn" if least else "")
    require(config.rope_theta > least, "attention.rope_theta", config.rope_theta, allowed)


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Conditional computation: routed experts of width F, `top_k` of them for each token, plus shared ones.

    `shared_width` is the summed width of the shared experts (n shared experts side by side are one SwiGLU of n
    times the width). `balance`: `bias` is the loss-free rule of arXiv:2408.15664, `sequence_aux` the
    sequence-wise auxiliary loss of arXiv:2412.19437 (equations 17-20). `d_model` 0 takes the enclosing model's.
    """

    n_experts: int
    top_k: int
    width: int
    shared_width: int = 0
    score: ScoreKind = "softmax"
    normalize: bool = True
    route_scale: float = 1.0
    balance: BalanceKind = "bias"
    bias_step: float = 1e-3
    aux_weight: float = 1e-4
    d_model: int = 0

    def __post_init__(self) -> None:
        require(self.n_experts >= 1, "experts.n_experts", self.n_experts, "1 or more")
        require(1 <= self.top_k <= self.n_experts, "experts.top_k", self.top_k, f"1 to n_experts ({self.n_experts})")
        require(self.width >= 1, "experts.width", self.width, "1 or more")
        require(self.shared_width >= 0, "experts.shared_width", self.shared_width, "0 or more")
        require_one_of("experts.score", self.score, ScoreKind)
        require_one_of("experts.balance", self.balance, BalanceKind)
        require(0 < self.route_scale < math.inf, "experts.route_scale", self.route_scale, "above 0, finite")
        for name in ("bias_step", "aux_weight"):
            require(0 <= getattr(self, name) < math.inf, f"experts.{name}", getattr(self, name), "0 or more, finite")
        require(self.d_model >= 0, "experts.d_model", self.d_model, "1 or more (0: the model's)")


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Conditional memory: hashed N-gram tables in front of the attention of some blocks (arXiv:2601.07372).

    `layers` are 0-based block indices. Each of the `len(orders) * n_heads` hash heads of a layer owns a table of
    `row_width` wide rows whose number of rows is a prime not below `rows[i]` of its order; all rows 0 means that
    no memory is built (the rho = 1 end of an allocation), while the rest stays as the template for `split`.
    `d_model`, `vocab_size` and `branches` 0 take the enclosing model's. `conv_dilation` 0 takes the largest order.
    `table_dtype` is the type in which rows are kept and trained: bfloat16 halves them, and `RowAdam` rounds its updates
    at random, so that small ones are not lost. All other weights have the model's type.
    """

    kind: MemoryKind = "engram"
    layers: tuple[int, ...] = (1,)
    orders: tuple[int, ...] = (2, 3)
    n_heads: int = 8
    row_width: int = 80
    rows: tuple[int, ...] = (0, 0)
    table_dtype: TableType = "float32"
    hash: HashFamily = "deepseek"
    seed: int = 0
    pad_id: int = 0
    eos_id: int = 0
    compress: bool = True
    gate: GateKind = "signed_sqrt"
    conv_kernel: int = 4
    conv_dilation: int = 0
    bias: bool = True
    norm_eps: float = 1e-5
    d_model: int = 0
    vocab_size: int = 0
    branches: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "orders", "rows"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        require_one_of("memory.kind", self.kind, MemoryKind)
        require_one_of("memory.hash", self.hash, HashFamily)
        require_one_of("memory.gate", self.gate, GateKind)
        require_one_of("memory.table_dtype", self.table_dtype, TableType)
        require(
            len(self.layers) > 0 and list(self.layers) == sorted(set(self.layers)) and self.layers[0] >= 0,
            "memory.layers",
            self.layers,
            "ascending distinct block indices from 0",
        )
        require(
            len(self.orders) > 0 and list(self.orders) == sorted(set(self.orders)) and self.orders[0] >= 1,
            "memory.orders",
            self.orders,
            "ascending distinct N-gram orders from 1",
        )
        require(
            len(self.rows) == len(self.orders) and (all(r >= 1 for r in self.rows) or not any(self.rows)),
            "memory.rows",
            self.rows,
            f"one number of 1 or more for each of the orders {self.orders}, or all 0 for no memory",
        )
        for name in ("n_heads", "row_width"):
            require(getattr(self, name) >= 1, f"memory.{name}", getattr(self, name), "1 or more")
        for name in ("conv_kernel", "conv_dilation", "pad_id", "eos_id", "seed", "d_model", "vocab_size", "branches"):
            require(getattr(self, name) >= 0, f"memory.{name}", getattr(self, name), "0 or more")
        if self.vocab_size:
            for name in ("pad_id", "eos_id"):
                value = getattr(self, name)
                require(value < self.vocab_size, f"memory.{name}", value, f"an id below vocab_size ({self.vocab_size})")
        require(
            not (self.hash == "qwen" and self.compress),
            "memory.compress",
            self.compress,
            "false with hash qwen, which hashes raw ids",
        )
        require(self.norm_eps > 0, "memory.norm_eps", self.norm_eps, "above 0")
        require(
            self.kind != "additive_bigram" or self.d_model in (0, self.d_memory),
            "memory.row_width",
            self.row_width,
            f"for additive_bigram such that len(orders) * n_heads * row_width is d_model ({self.d_model})",
        )

    @property
    def present(self) -> bool:
        """Whether any row exists; without rows no memory module is built."""
        return any(self.rows)

    @property
    def d_memory(self) -> int:
        """Width of the concatenated rows of one token at one layer (`d_mem` in the paper)."""
        return len(self.orders) * self.n_heads * self.row_width

    @property
    def dilation(self) -> int:
        """Dilation of the short convolution: the largest order unless set."""
        return self.conv_dilation or self.orders[-1]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only language model: `n_layers` blocks, the first `n_dense_layers` of them without experts.

    `dense_width` is the SwiGLU width of blocks without experts. `branches` is the number M of residual branches;
    above 1 the blocks are joined by manifold-constrained hyper-connections (arXiv:2512.24880).
    """

    vocab_size: int
    d_model: int
    n_layers: int
    attention: GQAConfig | MLAConfig
    dense_width: int
    n_dense_layers: int = 1
    experts: MoEConfig | None = None
    memory: MemoryConfig | None = None
    branches: int = 1
    tied: bool = False
    norm_eps: float = 1e-6
    max_seq_len: int = 4096

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "dense_width", "branches", "max_seq_len"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(
            0 <= self.n_dense_layers <= self.n_layers,
            "n_dense_layers",
            self.n_dense_layers,
            f"0 to n_layers ({self.n_layers})",
        )
        require(
            self.experts is not None or self.n_dense_layers == self.n_layers,
            "n_dense_layers",
            self.n_dense_layers,
            f"n_layers ({self.n_layers}) when there are no experts",
        )
        require(self.norm_eps > 0, "norm_eps", self.norm_eps, "above 0")
        if self.experts is not None:
            self._adopt("experts", d_model=self.d_model)
        if self.memory is not None:
            self._adopt("memory", d_model=self.d_model, vocab_size=self.vocab_size, branches=self.branches)
            require(
                self.memory.layers[-1] < self.n_layers,
                "memory.layers",
                self.memory.layers,
                f"block indices below n_layers ({self.n_layers})",
            )

    def _adopt(self, part: str, **sizes: int) -> None:
        """Give a part the model's sizes; a part that was made for other sizes is refused."""
        config = getattr(self, part)
        for name, size in sizes.items():
            own = getattr(config, name)
            require(own in (0, size), f"{part}.{name}", own, f"the model's {name} ({size}), or 0 to take it")
        object.__setattr__(self, part, dataclasses.replace(config, **sizes))

    @property
    def n_moe_layers(self) -> int:
        """Number of blocks that hold routed experts."""
        return self.n_layers - self.n_dense_layers if self.experts is not None else 0

    @property
    def has_memory(self) -> bool:
        """Whether any memory table is built."""
        return self.memory is not None and self.memory.present

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Build from plain data (parsed YAML or JSON). Raises `ConfigError` on unknown, missing or bad keys."""
        return build_config(cls, data)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` turns back into this config, and YAML or JSON can hold."""
        data = dataclasses.asdict(self, dict_factory=lambda items: {k: _plain(v) for k, v in items})
        data["attention"]["kind"] = self.attention.kind
        if self.attention.yarn is None:  # as before there was YaRN: names of points are made of this
            del data["attention"]["yarn"]
        return data

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a YAML file. Raises `ConfigError` naming the file when it is missing or is not a mapping."""
        return cls.from_dict(load_yaml(path))


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Parse a YAML mapping. Raises `ConfigError` naming the file when it is absent, malformed or no mapping."""
    import yaml  # here, so that importing a layer alone needs no YAML parser

    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"config file {str(path)!r} cannot be read: {reason}") from error
    require(isinstance(data, dict), f"config file {str(path)!r}", type(data).__name__, "a mapping of settings")
    return data


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


C = TypeVar("C")


def build_config(cls: type[C], data: Any, where: str = "") -> C:
    """Build a config dataclass from plain data. Raises `ConfigError` as `read_settings`, and as the dataclass does."""
    return cls(**read_settings(cls, data, where))


def read_settings(cls: type, data: Any, where: str = "") -> dict[str, Any]:
    """The fields of a config dataclass from plain data; `where` is the prefix that error messages put before a key.

    Raises `ConfigError` on a key that the dataclass lacks, a missing key, or a value of the wrong type.
    """
    require(isinstance(data, Mapping), where.rstrip(".") or cls.__name__, data, "a mapping of settings")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in data:
        require(key in fields, f"unknown setting {where}{key}", data[key], "one of " + ", ".join(fields))
    for name, field in fields.items():
        optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if name not in data and not optional:
            raise ConfigError(f"setting {where}{name} is missing")
    return {key: _coerce(hints[key], value, where + key) for key, value in data.items()}


def _coerce(hint: Any, value: Any, where: str) -> Any:
    """Turn plain data into the field's type, refusing what does not fit."""
    options = get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union else ()
    if type(None) in options and value is None:
        return None
    classes = [t for t in (options or (hint,)) if dataclasses.is_dataclass(t)]
    if any(isinstance(value, t) for t in classes):  # type: ignore[arg-type]
        return value
    if len(classes) > 1:
        require(isinstance(value, Mapping), where, value, "a mapping of settings")
        kinds = {t.kind: t for t in classes}  # type: ignore[union-attr]
        kind = value.get("kind")
        require(kind in kinds, f"{where}.kind", kind, "one of " + ", ".join(kinds))
        return build_config(kinds[kind], {k: v for k, v in value.items() if k != "kind"}, where + ".")  # type: ignore[arg-type]
    if classes:
        return build_config(classes[0], value, where + ".")  # type: ignore[arg-type]
    simple = [t for t in (options or (hint,)) if t is not type(None)]
    return _coerce_simple(simple[0] if len(simple) == 1 else hint, value, where)


def _coerce_simple(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if hint is bool:
        require(isinstance(value, bool), where, value, "true or false")
    elif hint is int:
        require(isinstance(value, int) and not isinstance(value, bool), where, value, "a whole number")
    elif hint is float:
        allowed = "a number" + (", which YAML reads as one with a point: 3.0e-2" if isinstance(value, str) else "")
        require(isinstance(value, (int, float)) and not isinstance(value, bool), where, value, allowed)
        return float(value)
    elif hint is str:
        require(isinstance(value, str), where, value, "text")
    elif origin is Literal:
        require_one_of(where, value, hint)
    elif origin is tuple:
        require(isinstance(value, (list, tuple)), where, value, "a list")
        return tuple(_coerce(get_args(hint)[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    return value

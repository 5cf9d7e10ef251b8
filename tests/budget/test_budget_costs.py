"""Counts by formula against models that are really built, plain arithmetic and torch's FLOP counter."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from engram.backbone import EngramLM
from engram.budget import ParameterBudget
from engram.config import ConfigError, GQAConfig, MemoryConfig, MemoryKind, MLAConfig, ModelConfig, MoEConfig
from engram.experts import grouped

MODELS = Path(__file__).parents[2] / "configs" / "models"
SHIPPED = sorted(path.stem for path in MODELS.glob("*.yaml"))
KINDS = get_args(MemoryKind)


def shipped(name: str) -> ModelConfig:
    return ModelConfig.load(MODELS / f"{name}.yaml")


def with_kind(config: ModelConfig, kind: str, rows: tuple[int, int] = (50, 70)) -> ModelConfig:
    """The config with a memory of another kind; rows of an additive bigram are as wide as the model together."""
    assert config.memory is not None
    heads = len(config.memory.orders) * config.memory.n_heads
    width = config.d_model // heads if kind == "additive_bigram" else config.memory.row_width
    return replace(config, memory=replace(config.memory, kind=kind, row_width=width, rows=rows))  # type: ignore[arg-type]


def on_meta(config: ModelConfig) -> EngramLM:
    with torch.device("meta"):
        return EngramLM(config)


PART_OF = (  # what a parameter's name says of it; the first that matches
    ("embed.", "embedding"),
    ("head.", "head"),
    ("_residual.", "hyper_connections"),
    ("attention_norm.", "norms"),
    ("ffn_norm.", "norms"),
    (".attention.", "attention"),
    (".router.", "router"),
    (".ffn.experts.", "routed_experts"),
    (".shared.", "shared_experts"),
    (".ffn.", "dense_ffn"),
    (".table.", "memory_tables"),
    ("memory.project.", "memory_projections"),
    (".project.", "memory_projections"),
    (".query_norm", "memory_gates"),
    (".key_norm", "memory_gates"),
    (".scale.weight", "memory_gates"),
    (".conv_", "memory_convs"),
    ("norm.", "norms"),
)


def counted(model: EngramLM) -> Counter[str]:
    """Parameters by part, as the built model's tensors have them."""
    parts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        parts[next(part for key, part in PART_OF if key in name)] += parameter.numel()
    return parts


def assert_formula_equals_model(config: ModelConfig) -> None:
    parts, budget = counted(on_meta(config)), ParameterBudget.of(config)
    assert {name: cost.total for name, cost in budget.breakdown.items() if cost.total} == dict(parts)
    assert budget.with_embeddings == parts.total()
    assert budget.total == parts.total() - parts["embedding"] - parts["head"]
    unused = 0
    if config.experts is not None:
        unused += (
            parts["routed_experts"] * (config.experts.n_experts - config.experts.top_k) // config.experts.n_experts
        )
    routed = unused
    if config.memory is not None and config.has_memory:
        n_tables = 1 if config.memory.kind in ("over_encoding", "additive_bigram") else len(config.memory.layers)
        slots = n_tables * len(config.memory.orders) * config.memory.n_heads
        unused += parts["memory_tables"] - slots * config.memory.row_width
    assert budget.active == budget.total - unused
    assert budget.sparse == unused
    assert budget.rho == (routed / unused if unused else 1.0)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_config_counts_exactly_what_its_model_holds(name: str) -> None:
    assert_formula_equals_model(shipped(name))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["tiny", "small", "moe-27b"])
def test_every_kind_of_memory_counts_exactly_what_its_model_holds(name: str, kind: str) -> None:
    assert_formula_equals_model(with_kind(shipped(name), kind))


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    def number(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    def even(high: int) -> int:
        return 2 * number(1, high)

    attention: GQAConfig | MLAConfig
    if draw(st.booleans()):
        kv = number(1, 3)
        attention = GQAConfig(n_heads=kv * number(1, 3), n_kv_heads=kv, head_dim=even(8), qk_norm=draw(st.booleans()))
    else:
        attention = MLAConfig(
            n_heads=number(1, 4), kv_lora_rank=number(1, 20), qk_nope_head_dim=number(1, 16),
            qk_rope_head_dim=even(4), v_head_dim=number(1, 16), q_lora_rank=draw(st.sampled_from([0, 7])),
        )  # fmt: skip
    kind = draw(st.sampled_from(KINDS))
    orders = tuple(sorted(draw(st.sets(st.integers(1, 4), min_size=1, max_size=3))))
    heads, width, layers = number(1, 3), number(1, 9), number(1, 4)
    d_model = len(orders) * heads * width if kind == "additive_bigram" else number(2, 40)
    rows = draw(st.sampled_from([(0,) * len(orders), tuple(number(1, 200) for _ in orders)]))
    at = tuple(sorted(draw(st.sets(st.integers(0, layers - 1), min_size=1))))
    memory = MemoryConfig(
        kind=kind, layers=at, orders=orders, n_heads=heads, row_width=width, rows=rows, bias=draw(st.booleans()),
        conv_kernel=draw(st.sampled_from([0, 1, 4])),
    )  # fmt: skip
    experts = MoEConfig(
        n_experts=number(3, 9), top_k=number(1, 3), width=number(1, 20), shared_width=draw(st.sampled_from([0, 5])),
    )  # fmt: skip
    has_experts = draw(st.booleans())
    return ModelConfig(
        vocab_size=number(2, 50), d_model=d_model, n_layers=layers, attention=attention, dense_width=number(1, 30),
        n_dense_layers=number(0, layers) if has_experts else layers, experts=experts if has_experts else None,
        memory=draw(st.sampled_from([memory, None])), branches=draw(st.sampled_from([1, 2, 4])),
        tied=draw(st.booleans()),
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(config=models())
def test_any_config_counts_exactly_what_its_model_holds(config: ModelConfig) -> None:
    assert_formula_equals_model(config)


def test_tiny_is_the_sum_that_one_writes_on_paper() -> None:
    D, V, K, T = 96, 2048, 4, 256
    tiny = with_kind(shipped("tiny"), "engram", rows=(11, 11))
    attention = 4 * D * D + 2 * 24
    one_expert = 3 * D * 48
    primes = 11 + 13 + 17 + 19 + 23 + 29 + 31 + 37
    projections = 128 * 2 * D
    fusion = projections + 2 * D + 2 * D + (4 * D + D)  # maps, biases, two gate norms, convolution with its norm
    shared = 3 * D * 96
    always = 3 * attention + 7 * D + 3 * D * 288 + 2 * (64 * D + shared) + fusion
    budget = ParameterBudget.of(tiny)
    assert budget.total == always + 2 * 64 * one_expert + primes * 16
    assert budget.active == always + 2 * K * one_expert + 8 * 16
    products = 3 * 4 * D * D + 3 * D * 288 + 2 * (64 * D + shared + K * one_expert + K * D) + V * D
    memory = projections + D + 4 * D  # the gate's dot product, four taps
    assert budget.flops == 2 * (products + memory + 3 * 2 * T * D)  # scores and values over T positions in 3 blocks
    assert budget.training_flops == 3 * budget.flops


def test_rows_that_never_train_and_rows_that_tell_nothing_cost_what_engrams_do() -> None:
    engram = ParameterBudget.of(with_kind(shipped("tiny"), "engram"))
    for kind in ("frozen_random", "capacity_one", "shuffled"):
        budget = ParameterBudget.of(with_kind(shipped("tiny"), kind))
        assert (budget.total, budget.active, budget.flops) == (engram.total, engram.active, engram.flops)


@pytest.mark.parametrize("name", ["tiny", "moe-27b"])
def test_more_context_costs_attention_alone(name: str) -> None:
    config = shipped(name)
    short, long = ParameterBudget.of(config, 128), ParameterBudget.of(config, 1128)
    a = config.attention
    width = 2 * a.head_dim if isinstance(a, GQAConfig) else a.qk_nope_head_dim + a.qk_rope_head_dim + a.v_head_dim
    assert long.flops - short.flops == 1000 * 2 * a.n_heads * width * config.n_layers
    assert (long.total, long.active) == (short.total, short.active)


def grouped_flops(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * x[0] * weight[1] * weight[2]


def attention_flops(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


COUNTED_TOO = {  # what torch's counter has no rule for: the CPU's attention, and products by groups
    torch.ops.aten._grouped_mm: grouped_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
}
LATENT = MLAConfig(
    n_heads=4, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, q_lora_rank=40
)  # fmt: skip
TINY = shipped("tiny")
ENGRAM = with_kind(TINY, "engram")
COUNTERS = {
    "pure experts": TINY,
    "grouped queries": replace(TINY, attention=GQAConfig(n_heads=4, n_kv_heads=2, head_dim=24)),
    "latent attention": replace(TINY, attention=LATENT),
    **{kind: with_kind(TINY, kind) for kind in KINDS},
    "four branches": replace(ENGRAM, branches=4, memory=replace(ENGRAM.memory, branches=4)),
}


@pytest.mark.parametrize("case", COUNTERS)
def test_flops_are_those_that_torch_counts(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly, once what no token asked for (rows that pad the experts' groups) and the elementwise multiply-adds that
    the counter has no rule for (weighting experts, gate, convolution, reading from and writing to branches) are set
    apart."""
    config, T = COUNTERS[case], 48
    model = EngramLM(config)
    ids = torch.randint(config.vocab_size, (2, T))
    laid_out: list[int] = []

    def recorded(*args: Any) -> grouped.Layout:
        layout = lay_out(*args)
        laid_out.append(len(layout.copy_P))
        return layout

    lay_out = grouped.lay_out
    monkeypatch.setattr(grouped, "lay_out", recorded)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=COUNTED_TOO) as counter:
        model(ids)
    assert config.experts is not None
    K, D, M = config.experts.top_k, config.d_model, config.branches
    assert len(laid_out) == config.n_moe_layers
    group_padding = (sum(laid_out) - ids.numel() * K * len(laid_out)) * 6 * D * config.experts.width
    elementwise = 2 * K * D * config.n_moe_layers + (2 * config.n_layers * 4 * M * D if M > 1 else 0)
    if config.has_memory and config.memory.kind not in ("over_encoding", "additive_bigram"):
        elementwise += 2 * M * D + 2 * 4 * M * D
    expected = (ParameterBudget.of(config, T).flops - elementwise) * ids.numel()
    assert counter.get_total_flops() == expected + group_padding


def test_the_report_shows_every_part_and_how_far_off_the_reference_it_is() -> None:
    reference = ParameterBudget.of(TINY)
    budget = ParameterBudget.of(reference.split(0.5))
    text = budget.report(reference)
    for name, cost in budget.breakdown.items():
        (line,) = [line for line in text.splitlines() if line.startswith(name + " ")]
        assert [int(word.replace(",", "")) for word in line.split()[1:4]] == [cost.total, cost.active, cost.flops]
    for number in (budget.total, budget.active, budget.sparse, budget.with_embeddings, budget.training_flops):
        assert f"{number:,}" in text
    assert f"P_tot {budget.total / reference.total - 1:+.4%}" in text


def test_a_sequence_of_no_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match="seq_len is 0: allowed is 1 or more"):
        ParameterBudget.of(TINY, 0)

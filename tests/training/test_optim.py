"""Which optimiser gets which parameter, how gradients are clipped, and several optimisers that act as one."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import MODEL, merge
from torch import Tensor, nn

from engram.backbone import EngramLM
from engram.config import ConfigError, ModelConfig
from engram.memory import MemoryTable
from engram.training.optim import BatchedMuon, OptimConfig, Roles, RowAdam, build_optimizer, clip_gradients


def model(**changes: object) -> EngramLM:
    return EngramLM(ModelConfig.from_dict(merge(MODEL, {k.replace("__", "."): v for k, v in changes.items()})))


def names_by_role(model: EngramLM) -> dict[str, set[str]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {role: {names[id(p)] for p in found} for role, found in Roles.of(model)._asdict().items()}


def test_roles_are_what_the_names_say() -> None:
    expected = {
        "tables": {"memory.1.table.weight"},
        "stacks": {"blocks.1.ffn.experts.w_gate_up", "blocks.1.ffn.experts.w_down"},
        "embeddings": {"embed.weight", "head.weight"},
        "matrices": {
            *(f"blocks.{i}.attention.{name}.weight" for i in range(2) for name in ("qkv", "out")),
            *(f"blocks.{part}.{name}.weight" for part in ("0.ffn", "1.ffn.shared") for name in ("gate_up", "down")),
            "blocks.1.ffn.router.weight",
            "memory.1.project.weight",
        },
    }
    every = {name for name, _ in model().named_parameters()}
    assert names_by_role(model()) == {**expected, "vectors": every.difference(*expected.values())}
    assert "memory.1.fusion.conv_weight" in every.difference(*expected.values())


def test_a_role_does_not_depend_on_size() -> None:
    """At every point of a sweep the same optimiser and decay, also for the router of few experts."""
    few = names_by_role(model(experts__n_experts=2, experts__shared_width=3, memory__rows=[7, 11]))
    assert few == names_by_role(model(experts__n_experts=64))


@pytest.mark.parametrize("matrix_optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied": True, "branches": 2},
        {"memory__kind": "over_encoding"},
        {"memory__kind": "additive_bigram", "memory__row_width": 8},
        {"memory__kind": "frozen_random"},
        {"memory": None},
    ],
)
def test_every_trainable_parameter_has_exactly_one_optimizer(changes: dict[str, object], matrix_optimizer: str) -> None:
    built = model(**changes)
    optimizer = build_optimizer(built, OptimConfig(matrix_optimizer=matrix_optimizer))  # type: ignore[arg-type]
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in built.parameters() if p.requires_grad)
    tables = [m.weight for m in built.modules() if isinstance(m, MemoryTable) and m.weight.requires_grad]
    row_adams = [o for o in optimizer.optimizers if isinstance(o, RowAdam)]
    assert [id(p) for o in row_adams for p in o.param_groups[0]["params"]] == [id(p) for p in tables]


def test_tables_learn_five_times_as_fast_and_only_maps_and_embeddings_decay() -> None:
    for matrix_optimizer, stacks in (("adamw", "matrices"), ("muon", "experts")):
        config = OptimConfig(lr=0.01, weight_decay=0.3, matrix_optimizer=matrix_optimizer)  # type: ignore[arg-type]
        groups = {g["name"]: g for g in build_optimizer(model(), config).param_groups}
        assert {name: g["lr"] for name, g in groups.items() if name != "tables"} == dict.fromkeys(
            groups.keys() - {"tables"}, 0.01
        )
        assert groups["tables"]["lr"] == pytest.approx(0.05)
        assert groups["tables"].get("weight_decay", 0) == groups["vectors"]["weight_decay"] == 0
        assert {groups[n]["weight_decay"] for n in ("embeddings", "matrices", stacks)} == {0.3}
        assert groups["tables"]["schedule"] == "table_schedule"


def test_tables_take_the_moments_that_the_config_names() -> None:
    def state_of(**options: Any) -> tuple[tuple[float, float], tuple[int, int], int]:
        built = model()
        optimizer = build_optimizer(built, OptimConfig(beta1=0.8, beta2=0.9, **options))
        stepped(optimizer, built, range(1))
        row_adam = optimizer.optimizers[-1]
        assert isinstance(row_adam, RowAdam)
        (table,) = Roles.of(built).tables
        kept = row_adam.state[table]["row_state"].shape[1] - 1, table.shape[1]  # moments of a row, and its width
        return row_adam.param_groups[0]["betas"], kept, row_adam.param_groups[0]["seed"]

    width = state_of()[1][1]
    assert width > 1
    assert state_of() == ((0.8, 0.9), (2 * width, width), 0)
    assert state_of(table_beta1=0.5) == ((0.5, 0.9), (2 * width, width), 0)
    assert state_of(table_beta1=0.0) == ((0.0, 0.9), (width, width), 0)
    assert state_of(table_second_moment="row") == ((0.8, 0.9), (width + 1, width), 0)
    assert state_of(table_second_moment="row", table_beta1=0.0) == ((0.0, 0.9), (1, width), 0)


def test_a_bfloat16_table_has_float32_moments_and_the_rest_is_as_ever() -> None:
    built = model(memory__table_dtype="bfloat16")
    optimizer = build_optimizer(built, OptimConfig())
    stepped(optimizer, built, range(3))
    assert {p.dtype for p in built.parameters()} == {torch.float32, torch.bfloat16}
    (table,) = Roles.of(built).tables
    assert [name for name, p in built.named_parameters() if p.dtype == torch.bfloat16] == ["memory.1.table.weight"]
    state = optimizer.optimizers[-1].state[table]
    assert state["row_state"].dtype == torch.float32


def test_muon_takes_the_linear_maps_and_no_embedding() -> None:
    built = model()
    optimizer = build_optimizer(built, OptimConfig(matrix_optimizer="muon"))
    roles = Roles.of(built)
    kinds = {type(o): {id(p) for g in o.param_groups for p in g["params"]} for o in optimizer.optimizers}
    assert kinds[BatchedMuon] == {id(p) for p in [*roles.matrices, *roles.stacks]}
    assert kinds[torch.optim.AdamW] == {id(p) for p in [*roles.embeddings, *roles.vectors]}


class Two(nn.Module):
    """A dense parameter and a table."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Parameter(torch.zeros(3))
        self.table = nn.Parameter(torch.zeros(1_000_000, 2))


def two_with_gradients() -> Two:
    two = Two()
    two.dense.grad = torch.tensor([1.0, 2.0, 4.0])
    rows, values = torch.tensor([[5, 999_999, 5]]), torch.tensor([[1.0, 0.0], [2.0, 2.0], [1.0, -3.0]])
    two.table.grad = torch.sparse_coo_tensor(rows, values, (1_000_000, 2), check_invariants=True)
    return two


def test_the_norm_counts_what_a_row_got_in_sum_and_stays_sparse() -> None:
    two = two_with_gradients()
    norm = clip_gradients(two, 0.0)
    # Row 5 got (2, -3), row 999,999 (2, 2).
    assert norm.item() == pytest.approx(math.sqrt(1 + 4 + 16 + 4 + 9 + 4 + 4))
    assert two.table.grad is not None
    assert two.table.grad.is_sparse
    assert two.table.grad._nnz() == 2


@pytest.mark.parametrize(("bound", "scale"), [(0.0, 1.0), (100.0, 1.0), (1.0, 1 / math.sqrt(42))])
def test_all_gradients_shrink_together_to_the_bound(bound: float, scale: float) -> None:
    two = two_with_gradients()
    clip_gradients(two, bound)
    assert two.dense.grad is not None
    assert two.table.grad is not None
    torch.testing.assert_close(two.dense.grad, torch.tensor([1.0, 2.0, 4.0]) * scale)
    rows = two.table.grad.coalesce()
    assert rows.indices().tolist() == [[5, 999_999]]
    torch.testing.assert_close(rows.values(), torch.tensor([[2.0, -3.0], [2.0, 2.0]]) * scale)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.1, 1e6]))
def test_gradients_of_a_bfloat16_table_are_clipped_as_any(seed: int, bound: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    table, dense = MemoryTable(50, 30, torch.bfloat16), nn.Parameter(torch.zeros(3))
    model = nn.ParameterList([table.weight, dense])
    dense.grad = torch.randn(3, generator=generator)
    upstream = torch.randn(40, 30, generator=generator).bfloat16()
    table(torch.arange(40)).backward(upstream)
    before = torch.cat([upstream.double().flatten(), dense.grad.double()])
    norm = clip_gradients(model, bound)
    torch.testing.assert_close(norm.double(), before.norm(), rtol=1e-5, atol=0.0)
    assert table.weight.grad is not None
    after = torch.cat([table.weight.grad.coalesce().values().double().flatten(), dense.grad.double()])
    torch.testing.assert_close(after, before * (min(1.0, bound / float(norm)) if bound else 1.0), rtol=2**-7, atol=0.0)


def stepped(optimizer: torch.optim.Optimizer, built: EngramLM, numbers: range) -> None:
    for number in numbers:
        ids = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        built(ids).logsumexp(-1).mean().backward()
        optimizer.step()


def together(built: EngramLM) -> torch.optim.Optimizer:
    return build_optimizer(built, OptimConfig(matrix_optimizer="muon"))


def apart(built: EngramLM) -> torch.optim.Optimizer:
    class Apart(torch.optim.Optimizer):
        """The same optimisers, each stepped by hand."""

        def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
            self.each = optimizers

        def zero_grad(self, set_to_none: bool = True) -> None:
            for optimizer in self.each:
                optimizer.zero_grad()

        def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
            for optimizer in self.each:
                optimizer.step()

    return Apart(build_optimizer(built, OptimConfig(matrix_optimizer="muon")).optimizers)


def seeded_model(**changes: object) -> EngramLM:
    torch.manual_seed(5)
    return model(**changes)


def test_together_they_step_as_each_by_itself() -> None:
    one, other = seeded_model(), seeded_model()
    stepped(together(one), one, range(3))
    stepped(apart(other), other, range(3))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("table_dtype", ["float32", "bfloat16"])
def test_together_they_resume_to_the_last_bit(table_dtype: str) -> None:
    whole, parts = seeded_model(memory__table_dtype=table_dtype), seeded_model(memory__table_dtype=table_dtype)
    stepped(together(whole), whole, range(6))
    first = together(parts)
    stepped(first, parts, range(3))
    second = together(parts)
    second.load_state_dict(first.state_dict())
    stepped(second, parts, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


def test_a_scheduler_reaches_every_group_also_after_loading() -> None:
    built = model()
    optimizer = together(built)
    optimizer.load_state_dict(optimizer.state_dict())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    before = [p.detach().clone() for p in built.parameters()]
    optimizer.step()
    scheduler.step()
    stepped(optimizer, built, range(1))
    assert all(map(torch.equal, before, built.parameters()))


def test_a_closure_is_asked_once() -> None:
    built = model()
    calls: list[Tensor] = []

    def closure() -> Tensor:
        calls.append(built(torch.zeros(1, 4, dtype=torch.int64)).mean())
        calls[-1].backward()
        return calls[-1]

    assert together(built).step(closure) is calls[0]  # type: ignore[arg-type, func-returns-value]
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("lr", 0.0, "above 0"),
        ("lr", math.inf, "above 0, finite"),
        ("matrix_optimizer", "sgd", "one of adamw, muon"),
        ("weight_decay", -1.0, "0 or more"),
        ("weight_decay", math.inf, "0 or more, finite"),
        ("table_lr_factor", math.inf, "0 or more, finite"),
        ("beta2", 1.0, "0 to below 1"),
        ("table_beta1", 1.0, "0 to below 1, or none for beta1"),
        ("table_second_moment", "column", "one of element, row"),
        ("clip", -1.0, "0 or more"),
        ("eps", 0.0, "above 0"),
    ],
)
def test_settings_that_cannot_be_are_named(name: str, value: object, allowed: str) -> None:
    with pytest.raises(ConfigError, match=f"optim.{name} is {value!r}: allowed is {allowed}"):
        OptimConfig(**{name: value})  # type: ignore[arg-type]

"""Bytes by formula against the tensors of a real training step."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from engram.backbone import EngramLM
from engram.budget import Footprint, training_memory
from engram.config import ConfigError, MemoryKind, ModelConfig, SecondMoment
from engram.memory import MemoryTable
from engram.training.optim import RowAdam

TINY = ModelConfig.load(Path(__file__).parents[2] / "configs" / "models" / "tiny.yaml")


def with_tables(kind: str, table_dtype: str) -> ModelConfig:
    width = 12 if kind == "additive_bigram" else 16
    memory = replace(TINY.memory, kind=kind, row_width=width, rows=(300, 500), table_dtype=table_dtype)
    return replace(TINY, memory=memory)


def nbytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def gradient_bytes(weight: torch.Tensor) -> int:
    if weight.grad is None:
        return 0
    return nbytes(weight.grad._indices(), weight.grad._values()) if weight.grad.is_sparse else nbytes(weight.grad)


@pytest.mark.parametrize(
    ("table_dtype", "beta1", "second_moment"),
    [("float32", 0.9, "element"), ("float32", 0.0, "row"), ("bfloat16", 0.9, "row"), ("bfloat16", 0.0, "element")],
)
@pytest.mark.parametrize("kind", get_args(MemoryKind))
def test_a_training_step_holds_what_the_formula_says(
    kind: str, table_dtype: str, beta1: float, second_moment: SecondMoment
) -> None:
    config = with_tables(kind, table_dtype)
    model = EngramLM(config)
    ids = torch.randint(config.vocab_size, (2, 24))
    model(ids).sum().backward()
    tables = [m.weight for m in model.modules() if isinstance(m, MemoryTable)]
    others = [p for p in model.parameters() if all(p is not table for table in tables)]
    gradients = [sum(map(gradient_bytes, group)) for group in (others, tables)]
    trained = [table for table in tables if table.requires_grad]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(others)]
    if trained:
        optimizers.append(RowAdam(trained, betas=(beta1, 0.9), second_moment=second_moment))
    for optimizer in optimizers:
        optimizer.step()
    states = [
        nbytes(*(v for state in o.state.values() for k, v in state.items() if k != "step")) for o in optimizers
    ] + [0]
    expected = [Footprint(nbytes(*group), gradients[i], states[i]) for i, group in enumerate((others, tables))]
    options = {"table_first_moment": beta1 > 0, "table_second_moment": second_moment}
    assert list(training_memory(config, tokens=ids.numel(), **options)) == expected
    assert expected[1].total == sum((expected[1].parameters, expected[1].gradients, expected[1].optimizer))


def test_without_memory_tables_take_nothing() -> None:
    dense, tables = training_memory(TINY, tokens=1000, value_bytes=2, moments=1)
    assert tables.total == 0
    assert dense.total == 3 * 2 * sum(p.numel() for p in EngramLM(TINY).parameters())


def test_bytes_of_dense_weights_say_nothing_of_the_tables() -> None:
    config = with_tables("engram", "bfloat16")
    (dense, tables), (half, same) = (training_memory(config, 100, value_bytes) for value_bytes in (4, 2))
    assert same == tables
    assert half.total * 2 == dense.total


def test_numbers_and_moments_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="table_second_moment is 'column'"):
        training_memory(TINY, tokens=1, table_second_moment="column")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="tokens is -1"):
        training_memory(TINY, tokens=-1)

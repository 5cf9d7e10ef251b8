"""The whole model: nothing leaks between documents or from the future, and it starts and builds as it should."""

import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import SHAPES, V, model_of
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from engram import ConfigError, Engram
from engram.backbone import mean_loss
from engram.backbone.positions import positions_of


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_documents_and_the_future_are_out_of_sight(shape: str) -> None:
    model = model_of(**SHAPES[shape])
    ids = torch.randint(0, V, (2, 30))
    documents = torch.tensor([0] * 11 + [1] * 19).expand(2, -1)
    logits = model(ids, documents)
    assert logits.shape == (2, 30, V)
    changed = ids.clone()
    changed[:, :11] = torch.randint(0, V, (2, 11))
    assert torch.equal(model(changed, documents)[:, 11:], logits[:, 11:])
    changed = ids.clone()
    changed[:, 20:] = torch.randint(0, V, (2, 10))
    torch.testing.assert_close(model(changed, documents)[:, :20], logits[:, :20], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_parameter_gets_a_gradient(shape: str) -> None:
    model = model_of(**SHAPES[shape])
    logits = model(torch.randint(0, V, (4, 40)))
    logits.square().mean().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.to_dense().any()]
    assert not missing


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_loss_starts_at_that_of_a_uniform_guess(shape: str) -> None:
    logits = model_of(**SHAPES[shape])(torch.randint(0, V, (4, 40)))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.randint(0, V, (160,)))
    assert float(loss.detach()) == pytest.approx(math.log(V), abs=0.6 if shape == "tied" else 0.1)


@settings(max_examples=10, deadline=None)
@given(depth=st.integers(2, 12))
def test_the_streams_size_does_not_grow_with_depth(depth: int) -> None:
    torch.manual_seed(0)
    model = model_of(n_layers=depth, memory=None)
    sizes: list[float] = []
    model.norm.register_forward_pre_hook(lambda _, inputs: sizes.append(float(inputs[0].detach().std())))
    model(torch.randint(0, V, (4, 40)))
    assert 0.7 < sizes[0] < 2.0


def test_what_routers_and_gates_did_is_returned() -> None:
    model = model_of(branches=2)
    output = model.run(torch.randint(0, V, (2, 30)))
    assert [int(stats.load_E.sum()) for stats in output.routing] == [2 * 30 * 2] * 2
    assert len(model.moe_layers()) == 2
    assert output.gates[1].shape == (2, 30, 2)


def test_it_builds_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = model_of()
    assert all(p.is_meta for p in model.parameters())


def test_autocast_stays_close_to_float32() -> None:
    model = model_of()
    ids = torch.randint(0, V, (2, 30))
    with torch.autocast("cpu", torch.bfloat16):
        low = model(ids)
    torch.testing.assert_close(low.float(), model(ids), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ids_may_be_int32(shape: str) -> None:
    model = model_of(**SHAPES[shape])
    ids, documents = torch.randint(0, V, (2, 12)), torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
    assert torch.equal(model(ids.int(), documents.int()), model(ids, documents))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("shape", ["plain", "branches", "latent", "dense", "over encoding", "bigram"])
def test_checkpointed_layers_have_the_gradients_of_plain_ones(shape: str, use_reentrant: bool) -> None:
    """Whole blocks, and in them attention, experts and hyper-connections; and memories."""
    model = model_of(**SHAPES[shape])
    ids, documents = torch.randint(0, V, (2, 12)), torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
    at = positions_of(ids, documents, model.config.attention)
    hidden = torch.randn(2, 12, *[4] * (shape == "branches"), 24, requires_grad=True)
    block = list(model.each_block())[1]

    def connected(hidden: Tensor) -> Tensor:
        x, mixing = block.attention_residual.read(hidden)
        return block.attention_residual.write(hidden, x.square(), mixing)

    alone = torch.randn(2, 12, 24, requires_grad=True)
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (lambda hidden: block(hidden, at)[0], (hidden,)),
        (lambda x: block.attention(x, at), (alone,)),
        (block.ffn, (alone,)),
        (connected, (hidden,)),
        *[(memory, (hidden, ids, documents)) for memory in model.memories().values()],
    ]
    for call, inputs in calls:
        gradients = []
        for compute in (call, partial(checkpoint, call, use_reentrant=use_reentrant)):
            model.zero_grad()
            alone.grad = hidden.grad = None
            compute(*inputs).square().sum().backward()
            gradients.append([inputs[0].grad] + [p.grad.to_dense() for p in model.parameters() if p.grad is not None])
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("bad", [-1, V])
def test_an_id_outside_the_vocabulary_is_named(bad: int) -> None:
    ids = torch.zeros(1, 4, dtype=torch.int64)
    ids[0, 2] = bad
    with pytest.raises(ConfigError, match=rf"token id is {bad}: allowed is 0 to 79"):
        model_of()(ids)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_compiled_model_has_the_loss_and_gradients_of_the_eager_one(dtype: torch.dtype) -> None:
    """Grouped queries with documents, hyper-connections, experts and memory, and the chunked loss, as one graph; the
    memory's rows in the type of the rest or another."""
    model = model_of(n_layers=2, branches=2).double()
    memory = model.memory["1"]
    assert isinstance(memory, Engram)
    memory.table.to(dtype)
    ids, targets = torch.randint(0, V, (2, 2, 12)).unbind()
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 12])

    def loss(ids: torch.Tensor, documents: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return mean_loss(model.run(ids, documents).hidden, model.head_weight, targets)

    results = []
    for compute in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        value = compute(ids, documents, targets)
        value.backward()
        gradients = {name: p.grad.to_dense() for name, p in model.named_parameters() if p.grad is not None}
        results.append((value.detach(), gradients))
    (eager, eager_gradients), (compiled, compiled_gradients) = results
    torch.testing.assert_close(compiled, eager)
    assert set(eager_gradients) == {name for name, _ in model.named_parameters()}
    torch.testing.assert_close(compiled_gradients, eager_gradients)


def test_importing_a_layer_imports_no_trainer_and_no_compiler() -> None:
    heavy = ("lightning", "transformers", "datasets", "tokenizers", "yaml", "scipy", "matplotlib", "accelerate")
    heavy += ("torch._dynamo", "torch._inductor")
    code = f"import sys; from engram import Engram, MoE; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

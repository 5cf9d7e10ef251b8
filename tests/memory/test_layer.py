"""Engram against a float64 restatement of SPEC's equations and against Qwen4-Exp's own layer in transformers.

Then the layer in use: packed and padded batches, decoding, types, bad calls. `test_baselines.py` holds what is true of
every kind of memory.
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engram.config import ConfigError, GateKind, MemoryConfig, MemoryKind
from engram.memory import Engram, EngramState

D, V, EOS = 12, 60, 7
KINDS: tuple[MemoryKind, ...] = ("engram", "capacity_one", "shuffled", "frozen_random")


def memory(**changes: Any) -> MemoryConfig:
    base: dict[str, Any] = {
        "layers": (1,),
        "orders": (2, 3),
        "n_heads": 2,
        "row_width": 4,
        "rows": (31, 37),
        "d_model": D,
        "vocab_size": V,
        "branches": 2,
        "eos_id": EOS,
        "compress": changes.get("hash") != "qwen",
    }
    return MemoryConfig(**{**base, **changes})


def random_layer(config: MemoryConfig) -> Engram:
    """A float64 layer none of whose parameters is at a special value."""
    layer = Engram(config).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.7)
    return layer


def inputs(B: int, T: int, config: MemoryConfig) -> tuple[Tensor, Tensor]:
    """Hidden states, without an axis of branches if there is one, and raw ids."""
    shape = (B, T, D) if config.branches == 1 else (B, T, config.branches, D)
    return torch.randn(shape, dtype=torch.float64), torch.randint(0, V, (B, T))


def in_chunks(layer: Engram, sizes: list[int], hidden: Tensor, *by_token: Tensor | None) -> tuple[Tensor, EngramState]:
    """Updates of all chunks, one after the other; `by_token` are ids, documents and mask."""
    state, updates, at = layer.init_state(len(hidden)), [], 0
    for size in sizes:
        now = slice(at, at + size)
        ids, documents, mask = (None if x is None else x[:, now] for x in by_token)
        assert ids is not None
        update, state = layer.step(hidden[:, now], ids, state, documents, mask)
        updates.append(update)
        at += size
    return torch.cat(updates, 1), state


def restated(layer: Engram, hidden: Tensor, ids: Tensor, documents: Tensor | None, mask: Tensor | None) -> Tensor:
    """SPEC 1.3 and 1.4, one token, one branch and one convolution tap at a time."""
    c = layer.config
    M, H = c.branches, len(c.orders) * c.n_heads
    rows = layer.reader(
        ids,
        documents if mask is None else (documents if documents is not None else 0 * ids).where(mask, torch.tensor(-1)),
    )
    B, T = ids.shape
    norm = lambda x, w: x / torch.sqrt((x * x).sum() / D + c.norm_eps) * w  # noqa: E731
    h = hidden.reshape(B, T, M, D)
    W, b = layer.project.weight, layer.project.bias
    u: dict[tuple[int, int, int], Tensor] = {}
    for i in range(B):
        for t in range(T):
            e = torch.cat([layer.table.weight[rows[i, t, head]] for head in range(H)])
            for m in range(M):
                k = W[m * D : (m + 1) * D] @ e + (b[m * D : (m + 1) * D] if b is not None else 0)
                v = W[M * D :] @ e + (b[M * D :] if b is not None else 0)
                g = norm(h[i, t, m], layer.fusion.query_norm[m]) @ norm(k, layer.fusion.key_norm[m]) / math.sqrt(D)
                if c.gate == "signed_sqrt":
                    g = torch.sign(g) * torch.sqrt(torch.clamp(torch.abs(g), min=1e-6))
                real = 1.0 if mask is None else float(mask[i, t])
                u[i, t, m] = v / (1 + torch.exp(-g)) * real
    out = []
    for i in range(B):
        for t in range(T):
            for m in range(M):
                y = torch.zeros(D, dtype=torch.float64)
                for tap in range(c.conv_kernel):
                    source = t - c.dilation * (c.conv_kernel - 1 - tap)
                    inside = source >= 0 and (documents is None or documents[i, source] == documents[i, t])
                    if inside and (mask is None or (mask[i, source] and mask[i, t])):
                        y = y + layer.fusion.conv_weight[tap, m] * norm(u[i, source, m], layer.fusion.conv_norm[m])
                out.append(u[i, t, m] + y / (1 + torch.exp(-y)))
    return torch.stack(out).reshape(hidden.shape)


@pytest.mark.parametrize("branches", [1, 4])
@pytest.mark.parametrize("gate", ["signed_sqrt", "plain"])
@pytest.mark.parametrize("kernel", [0, 4])
def test_output_and_gradients_are_those_of_the_equations(branches: int, gate: str, kernel: int) -> None:
    layer = random_layer(memory(branches=branches, gate=gate, conv_kernel=kernel, conv_dilation=2))
    hidden, ids = inputs(2, 9, layer.config)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 2, 2]])
    results = []
    for compute in (lambda h: layer(h, ids, documents), lambda h: restated(layer, h, ids, documents, None)):
        h = hidden.clone().requires_grad_()
        layer.zero_grad()
        out = compute(h)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        gradients = {n: p.grad.to_dense() if p.grad.is_sparse else p.grad for n, p in layer.named_parameters()}
        results.append((out, h.grad, gradients))
    (out, grad, gradients), (expected, expected_grad, expected_gradients) = results
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-8, atol=1e-10)
    for name, value in gradients.items():
        torch.testing.assert_close(value, expected_gradients[name], rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("gate", ["signed_sqrt", "plain"])
def test_gradients_of_the_layer_are_those_of_finite_differences(gate: GateKind) -> None:
    layer = random_layer(memory(d_model=3, row_width=2, gate=gate, conv_kernel=3, conv_dilation=2))
    layer.table.weight.requires_grad_(False)  # its gradient is sparse; the restatement's test covers it
    names, parameters = zip(*((n, p) for n, p in layer.named_parameters() if p.requires_grad), strict=True)
    ids = torch.randint(0, V, (1, 8))
    documents = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1]])

    def update(hidden: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (hidden, ids, documents))

    hidden = torch.randn(1, 8, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(update, (hidden, *parameters))


@pytest.mark.parametrize("packed", [False, True])
def test_padding_gets_no_update_and_is_read_by_none(packed: bool) -> None:
    layer = random_layer(memory(conv_dilation=2))
    hidden, ids = inputs(2, 12, layer.config)
    documents = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1]]).expand(2, -1) if packed else None
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1], [1] * 10 + [0] * 2], dtype=torch.bool)
    update = layer(hidden, ids, documents, mask)
    torch.testing.assert_close(update, restated(layer, hidden, ids, documents, mask), rtol=1e-9, atol=1e-11)
    assert (update[~mask] == 0).all()
    torch.testing.assert_close(update[:1, 2:5], layer(hidden[:1, 2:5], ids[:1, 2:5]))
    if packed:
        torch.testing.assert_close(update[:1, 8:], layer(hidden[:1, 8:], ids[:1, 8:]))


def qwen_pair(branches: int) -> tuple[Any, Engram]:
    """transformers' layer with random weights, and ours with the same ones, both in float32."""
    qwen = pytest.importorskip("transformers.models.qwen4_exp.modeling_qwen4_exp")
    configuration = pytest.importorskip("transformers.models.qwen4_exp.configuration_qwen4_exp")
    text = configuration.Qwen4ExpTextConfig(
        vocab_size=V,
        hidden_size=D,
        hc_count=branches,
        ple_layer_ids=[1],
        ple_embed_dim=16,
        ngram_size=3,
        heads_per_ngram=2,
        ngram_vocab_size_base=100,
        eos_token_id=EOS,
        num_hidden_layers=2,
        rms_norm_eps=1e-6,
        seed=5,
    )
    theirs = qwen.Qwen4ExpTextPLELayer(text, 0, 0)
    ours = Engram(
        memory(layers=(0,), hash="qwen", rows=(100, 100), branches=branches, bias=False, norm_eps=1e-6, seed=5)
    )
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.5)
        ours.table.weight.copy_(theirs.ple_embedding.ngram_embedding.weight[: len(ours.table.weight)])
        ours.project.weight.copy_(torch.cat([theirs.key_proj.weight, theirs.value_proj.weight]))
        for norm, other in [
            (ours.fusion.query_norm, theirs.norm_query),
            (ours.fusion.key_norm, theirs.norm_key),
            (ours.fusion.conv_norm, theirs.norm_conv),
        ]:
            norm.copy_(1 + other.weight.view(branches, D))  # theirs holds the norms' weights less 1
        ours.fusion.conv_weight.copy_(theirs.conv1d.weight.view(branches, D, 4).permute(2, 0, 1))
    return theirs, ours


@pytest.mark.parametrize("branches", [2, 4])
def test_output_equals_transformers_qwen_layer(branches: int) -> None:
    theirs, ours = qwen_pair(branches)
    hidden, ids = torch.randn(3, 40, branches, D), torch.randint(0, V, (3, 40))
    ids[:, [5, 6, 20]] = EOS
    expected = theirs(hidden.flatten(-2), ids, None).unflatten(-1, (branches, D))
    torch.testing.assert_close(ours(hidden, ids), expected, rtol=1e-5, atol=1e-5)


PADDINGS = {
    "left": ([0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], [1] * 16),
    "right": ([1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0], [1] * 16),
    "inside": ([1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1], [1] * 16),
    "everywhere": ([0] * 16, [1, 0] * 8),
}


@pytest.mark.parametrize("padding", PADDINGS)
def test_padded_batches_give_what_transformers_qwen_layer_gives(padding: str) -> None:
    theirs, ours = qwen_pair(branches=3)
    mask = torch.tensor(PADDINGS[padding], dtype=torch.bool)
    hidden, ids = torch.randn(2, 16, 3, D), torch.randint(0, V, (2, 16))
    ids[:, [2, 9]] = EOS
    # Its text model puts eos in the place of padding before it calls the layer.
    expected = theirs(hidden.flatten(-2), torch.where(mask, ids, EOS), None, conv_mask=mask).unflatten(-1, (3, D))
    update = ours(hidden, ids, padding_mask=mask)
    torch.testing.assert_close(update[mask], expected[mask], rtol=1e-5, atol=1e-5)
    # Its convolution writes on padding what real tokens before it said; ours leaves padding alone.
    assert (update[~mask] == 0).all()


def test_decoding_gives_what_transformers_qwen_layer_gives_for_the_whole() -> None:
    theirs, ours = qwen_pair(branches=2)
    hidden, ids = torch.randn(2, 16, 2, D), torch.randint(0, V, (2, 16))
    ids[:, [0, 6, 7]] = EOS
    updates, _ = in_chunks(ours, [5, 1, 1, 1, 3, 1, 4], hidden, ids, None, None)
    expected = theirs(hidden.flatten(-2), ids, None).unflatten(-1, (2, D))
    torch.testing.assert_close(updates, expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    kernel=st.integers(1, 4),
    dilation=st.integers(1, 4),
    family=st.sampled_from(["deepseek", "qwen"]),
)
def test_a_document_in_a_packed_window_gets_the_update_it_gets_alone(
    lengths: list[int], kernel: int, dilation: int, family: str
) -> None:
    layer = random_layer(memory(hash=family, conv_kernel=kernel, conv_dilation=dilation))
    hidden, ids = inputs(2, sum(lengths), layer.config)
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).expand(2, -1)
    alone = [layer(h, i) for h, i in zip(hidden.split(lengths, 1), ids.split(lengths, 1), strict=True)]
    torch.testing.assert_close(layer(hidden, ids, numbers), torch.cat(alone, 1))


@settings(max_examples=40, deadline=None)
@given(data=st.data(), kind=st.sampled_from(KINDS), family=st.sampled_from(["deepseek", "qwen"]))
def test_chunks_with_documents_and_padding_give_what_the_whole_gives(
    data: st.DataObject, kind: MemoryKind, family: str
) -> None:
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=6))
    T = sum(sizes)
    layer = random_layer(memory(kind=kind, hash=family, conv_kernel=data.draw(st.integers(0, 4))))
    hidden, ids = inputs(2, T, layer.config)
    borders, real = (
        torch.tensor(data.draw(st.lists(st.booleans(), min_size=2 * T, max_size=2 * T))).view(2, T) for _ in range(2)
    )
    documents = borders.cumsum(1)
    left = torch.arange(T) >= torch.tensor([[0], [data.draw(st.integers(0, T))]])
    mask = data.draw(st.sampled_from([left, real]))
    updates, _ = in_chunks(layer, sizes, hidden, ids, documents, mask)
    torch.testing.assert_close(updates, layer(hidden, ids, documents, mask))


def test_the_state_does_not_grow_with_the_prompt() -> None:
    layer = random_layer(memory())
    hidden, ids = inputs(1, 300, layer.config)
    _, state = layer.step(hidden, ids, layer.init_state(1))
    assert [x.shape[1] for x in (*state.ids, *state.fusion)] == [2, 2, 9, 9, 9]
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in (*state.ids, *state.fusion))  # no views of more


@pytest.mark.parametrize("branches", [1, 4])
def test_adding_in_one_pass_is_adding_the_update(branches: int) -> None:
    layer = random_layer(memory(branches=branches))
    hidden, ids = inputs(2, 9, layer.config)
    added, gates, _ = layer.add_to(hidden, layer.look_up(ids))
    torch.testing.assert_close(added, hidden + layer(hidden, ids))
    assert gates.shape == (2, 9, branches)


def test_two_layers_of_a_model_read_different_rows() -> None:
    config = memory(layers=(1, 4), rows=(101, 101))
    first, second = (Engram(config, layer).reader for layer in config.layers)
    _, ids = inputs(2, 50, config)
    assert first.n_rows != second.n_rows
    assert (first(ids) == second(ids)).float().mean() < 0.1


def test_the_first_updates_are_small_beside_a_hidden_state_of_unit_scale() -> None:
    layer = Engram(memory(d_model=256, row_width=64))
    update = layer(torch.randn(4, 64, 2, 256), torch.randint(0, V, (4, 64)))
    assert 0 < update.square().mean().sqrt() < 0.1


def test_at_the_start_the_update_comes_from_the_rows_alone() -> None:
    layer = Engram(memory())
    torch.nn.init.zeros_(layer.table.weight)
    assert (layer(torch.randn(2, 9, 2, D), torch.randint(0, V, (2, 9))) == 0).all()


def test_the_convolution_adds_nothing_at_the_start() -> None:
    with_conv = Engram(memory())
    without = Engram(memory(conv_kernel=0))
    without.load_state_dict({k: v for k, v in with_conv.state_dict().items() if not k.startswith("fusion.conv")})
    ids, hidden = torch.randint(0, V, (2, 9)), torch.randn(2, 9, 2, D)
    assert torch.equal(with_conv(hidden, ids), without(hidden, ids))


@pytest.mark.parametrize("branches", [1, 4])
@pytest.mark.parametrize("kernel", [0, 4])
def test_bfloat16_autocast_trains_and_decodes(branches: int, kernel: int) -> None:
    layer = random_layer(memory(branches=branches, conv_kernel=kernel)).float()
    hidden, ids = torch.randn(2, 20, branches, D), torch.randint(0, V, (2, 20))
    exact = layer(hidden, ids)
    with torch.autocast("cpu", torch.bfloat16):
        update = layer(hidden, ids)
        decoded, _ = in_chunks(layer, [13, 1, 6], hidden, ids, None, None)
    assert update.dtype == hidden.dtype
    torch.testing.assert_close(decoded, update)
    assert (update.float() - exact).abs().mean() < 0.02 * exact.abs().mean()
    torch.testing.assert_close(update.float(), exact, rtol=0.05, atol=0.05)
    update.float().square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
        values = parameter.grad.coalesce().values() if parameter.grad.is_sparse else parameter.grad
        assert values.isfinite().all(), name


def test_a_layer_held_in_bfloat16_stays_in_bfloat16() -> None:
    layer = random_layer(memory()).bfloat16()
    hidden, ids = inputs(1, 9, layer.config)
    update = layer(hidden.bfloat16(), ids)
    assert update.dtype == torch.bfloat16
    torch.testing.assert_close(update.double(), layer.double()(hidden, ids), rtol=0.1, atol=0.1)


def test_a_compiled_layer_gives_what_the_eager_one_gives() -> None:
    layer = random_layer(memory())
    hidden, ids = inputs(2, 9, layer.config)
    documents = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(hidden, ids, documents), layer(hidden, ids, documents))


@pytest.mark.parametrize(
    "shape", [(2, 5, D), (2, 5, 3, D), (2, 5, 2, D + 1), (2, 4, 2, D), (1, 5, 2, D)], ids=lambda shape: str(shape)
)
def test_a_hidden_state_of_another_shape_is_refused_by_name(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"shape of hidden is \(.*: allowed is a hidden state \[B, T, 2, 12\]"):
        Engram(memory())(torch.randn(shape), torch.randint(0, V, (2, 5)))


@pytest.mark.parametrize("kind", ["over_encoding", "additive_bigram"])
def test_a_kind_that_is_another_layer_is_refused(kind: MemoryKind) -> None:
    with pytest.raises(ConfigError, match=f"memory.kind is '{kind}'"):
        Engram(memory(kind=kind, orders=(2,), rows=(11,), n_heads=1, row_width=D))


def test_a_layer_or_lookup_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="layer is 2"):
        Engram(memory(), layer=2)
    with pytest.raises(ConfigError, match="lookup is 3"):
        Engram(memory(), lookup=torch.zeros(3, dtype=torch.int64))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_gives_what_the_cpu_gives() -> None:
    layer = random_layer(memory())
    hidden, ids = inputs(2, 16, layer.config)
    documents = torch.arange(16).div(6, rounding_mode="floor").expand(2, -1)
    expected = layer(hidden, ids, documents)
    layer.cuda()
    args = hidden.cuda(), ids.cuda(), documents.cuda(), None
    torch.testing.assert_close(layer(*args).cpu(), expected)
    torch.testing.assert_close(in_chunks(layer, [9, 1, 6], *args)[0].cpu(), expected)

"""The memory layer against three others with the same weights, forward, and forward and backward.

1. `Qwen4ExpTextPLELayer` of transformers (hash family `qwen`, no biases; it needs M > 1).
2. The arithmetic of the demonstration code of arXiv:2601.07372, restated plainly: numpy hash, one module per branch.
3. `DeepseekV41Engram` of the nemo-automodel wheel with its hash: no convolution, and the residual sum is its own.

Each is timed beside our layer set up as it is, and outputs are compared before. The gradient of our table is row-sparse
and theirs is dense, so backward is timed twice: with few rows (20,000 for each order) and with many (1M together).
`python benchmarks/memory_layer.py`
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from harness import MEMORY_LIMIT, Measured, Table, alternate, finish, import_peer
from hashing import NumpyHash
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerFast
from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextPLELayer

from engram import Engram, MemoryConfig
from engram.training.environment import prepare_process

VOCAB = 8192
LAYER = 1
HEADS = 8
ORDERS = (2, 3)
KERNEL = 4
EPS = 1e-6
FEW_ROWS, MANY_ROWS = 2500, 62_500  # of each head: 20,000 for each order, 1M for both
SHAPES = ((1, 1), (1, 128), (4, 512), (8, 2048))
WIDTHS = (256, 1024, 2048)
# Tensors as large as the hidden states that both sides hold when they are compared (measured: 13 of Qwen's, 5 of ours).
LIVE_TENSORS = 18

Update = Callable[[Tensor, Tensor], Tensor]


class Size(NamedTuple):
    """One case: hidden states `[B, T, M, D]` in `dtype`, and rows of each head's table."""

    B: int
    T: int
    D: int
    M: int
    dtype: torch.dtype
    rows: int

    @property
    def memory(self) -> int:
        """Bytes that a forward and backward pass takes, about."""
        return LIVE_TENSORS * self.B * self.T * self.M * self.D * self.dtype.itemsize


class Pair(NamedTuple):
    """Two layers that give the same update of hidden states `[B, T, M, D]`, and all their parameters."""

    ours: Update
    theirs: Update
    parameters: list[nn.Parameter]


def our_layer(size: Size, **changes: Any) -> Engram:
    """Our layer with random norms and taps, so that nothing is at a special value."""
    config = MemoryConfig(
        layers=(LAYER,),
        orders=ORDERS,
        n_heads=HEADS,
        row_width=size.D // 32,  # all rows of a token are d / 2 wide, as in the paper
        rows=(size.rows, size.rows),
        d_model=size.D,
        vocab_size=VOCAB,
        branches=size.M,
        norm_eps=EPS,
        **{"conv_kernel": KERNEL, **changes},
    )
    layer = Engram(config, LAYER, torch.arange(VOCAB) if config.compress else None)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name in ("fusion.conv_weight", "project.bias"):
                parameter.normal_(std=0.5)
            elif "norm" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        layer.table.weight.normal_()
    return layer


def keys_and_value(layer: Engram) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases of the M keys and, last, of the value."""
    D, M = layer.config.d_model, layer.config.branches
    bias = layer.project.bias
    return list(layer.project.weight.split(D)), list(bias.split(D)) if bias is not None else [torch.empty(0)] * (M + 1)


# 1. transformers


def qwen_layers(size: Size) -> tuple[Engram, Qwen4ExpTextPLELayer, Qwen4ExpTextConfig]:
    """Ours and Qwen4-Exp's layer, whose norms' weights are held less 1."""
    ours = our_layer(size, hash="qwen", compress=False, bias=False)
    c = ours.config
    config = Qwen4ExpTextConfig(
        vocab_size=VOCAB,
        hidden_size=size.D,
        hc_count=size.M,
        ple_layer_ids=[LAYER],
        ple_embed_dim=c.d_memory,
        ngram_size=ORDERS[-1],
        heads_per_ngram=HEADS,
        ngram_vocab_size_base=size.rows,
        ple_conv_kernel_size=KERNEL,
        eos_token_id=c.eos_id,
        num_hidden_layers=2,
        rms_norm_eps=EPS,
        seed=c.seed,
    )
    theirs = Qwen4ExpTextPLELayer(config, LAYER, 0)
    with torch.no_grad():
        theirs.ple_embedding.ngram_embedding.weight[: len(ours.table.weight)].copy_(ours.table.weight)
        *keys, value = keys_and_value(ours)[0]
        theirs.key_proj.weight.copy_(torch.cat(keys))
        theirs.value_proj.weight.copy_(value)
        for norm, other in (
            (ours.fusion.query_norm, theirs.norm_query),
            (ours.fusion.key_norm, theirs.norm_key),
            (ours.fusion.conv_norm, theirs.norm_conv),
        ):
            other.weight.copy_(norm.flatten() - 1)
        theirs.conv1d.weight.copy_(ours.fusion.conv_weight.permute(1, 2, 0).reshape(theirs.conv1d.weight.shape))
    return ours.to(size.dtype), theirs.to(size.dtype), config


def qwen_pair(size: Size) -> Pair:
    """Whole sequences."""
    ours, theirs, _ = qwen_layers(size)
    return paired(size, ours, theirs, lambda h, ids: theirs(h.flatten(-2), ids, None).unflatten(-1, (size.M, size.D)))


@torch.no_grad()
def qwen_decoding_pair(size: Size) -> Pair:
    """The next tokens after a prompt, each side with its state of ids and convolution, which moves on at every call."""
    ours, theirs, config = qwen_layers(size)
    prompt, ids, _ = draw(size._replace(T=16))
    cache = DynamicCache(config=config)
    theirs(prompt.flatten(-2), ids, cache)
    _, state = ours.step(prompt, ids, ours.init_state(size.B))

    def step(hidden: Tensor, ids: Tensor) -> Tensor:
        nonlocal state
        update, state = ours.step(hidden, ids, state)
        return update

    return Pair(step, lambda h, ids: theirs(h.flatten(-2), ids, cache).unflatten(-1, (size.M, size.D)), [])


# 2. the demonstration's arithmetic


class PlainEngram(nn.Module):
    """The paper's layer, one small module for each thing that its equations name."""

    def __init__(self, ours: Engram) -> None:
        super().__init__()
        c = ours.config
        M, D = c.branches, c.d_model
        self.lookup = ours.reader.lookup.numpy()
        self.hash = NumpyHash(c, LAYER, VOCAB)
        self.register_buffer("offsets", torch.from_numpy(self.hash.offsets))
        self.embedding = nn.Embedding(*ours.table.weight.shape)
        self.keys = nn.ModuleList(nn.Linear(c.d_memory, D) for _ in range(M))
        self.value = nn.Linear(c.d_memory, D)
        self.key_norms, self.query_norms, self.conv_norms = (
            nn.ModuleList(nn.RMSNorm(D, eps=c.norm_eps) for _ in range(M)) for _ in range(3)
        )
        reach = (c.conv_kernel - 1) * c.dilation
        self.conv = nn.Conv1d(M * D, M * D, c.conv_kernel, groups=M * D, dilation=c.dilation, padding=reach, bias=False)
        self._take_weights(ours)

    @torch.no_grad()
    def _take_weights(self, ours: Engram) -> None:
        self.embedding.weight.copy_(ours.table.weight)
        for linear, weight, bias in zip([*self.keys, self.value], *keys_and_value(ours), strict=True):
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
        for norms, weights in (
            (self.key_norms, ours.fusion.key_norm),
            (self.query_norms, ours.fusion.query_norm),
            (self.conv_norms, ours.fusion.conv_norm),
        ):
            for norm, weight in zip(norms, weights, strict=True):
                norm.weight.copy_(weight)
        self.conv.weight.copy_(ours.fusion.conv_weight.permute(1, 2, 0).reshape(self.conv.weight.shape))

    def forward(self, hidden_BTMD: Tensor, token_ids: Tensor) -> Tensor:
        rows = torch.from_numpy(self.hash(self.lookup[token_ids.numpy()])) + self.offsets
        e = self.embedding(rows).flatten(-2)
        gates = []
        for m, (key, key_norm, query_norm) in enumerate(zip(self.keys, self.key_norms, self.query_norms, strict=True)):
            g = (key_norm(key(e)) * query_norm(hidden_BTMD[:, :, m])).sum(-1) / math.sqrt(hidden_BTMD.shape[-1])
            gates.append((g.abs().clamp_min(1e-6).sqrt() * g.sign()).sigmoid().unsqueeze(-1))
        u = torch.stack(gates, dim=2) * self.value(e).unsqueeze(2)
        return u + self.short_conv(u)

    def short_conv(self, u_BTMD: Tensor) -> Tensor:
        """SiLU of the convolution over all branches' channels, each branch with a norm of its own."""
        normed = torch.cat([norm(u_BTMD[:, :, m]) for m, norm in enumerate(self.conv_norms)], dim=-1)
        y = nn.functional.silu(self.conv(normed.transpose(1, 2))[..., : u_BTMD.shape[1]])
        return y.transpose(1, 2).view(u_BTMD.shape).contiguous()


def plain_pair(size: Size) -> Pair:
    """The demonstration's arithmetic, with the biases that it has."""
    ours = our_layer(size)
    theirs = PlainEngram(ours)
    return paired(size, ours, theirs, theirs)


# 3. nemo-automodel


@functools.cache
def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of VOCAB words that differ after normalisation, so that compression changes no id."""
    from tokenizers import Tokenizer, models

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    )


@functools.cache
def nemo() -> tuple[Any, Any, Any] | str:
    """The peer's modules for the layer, its config and its choice of linear maps; or why there are none."""
    package = "nemo_automodel.components.models"
    modules = [
        import_peer("nemo-automodel", "0.7.0", f"{package}.{name}")
        for name in ("deepseek_v41.engram", "deepseek_v41.config", "common")
    ]
    for module in modules:
        if isinstance(module, str):
            print(module)
            return "no import"
    return tuple(modules)


def nemo_pair(size: Size) -> Pair | str:
    """DeepSeek-V4.1's layer as NeMo trains it. Its update includes the residual stream, so ours is added to it."""
    modules = nemo()
    if isinstance(modules, str):
        return modules
    layers, configs, common = modules
    ours = our_layer(size, conv_kernel=0, bias=False)
    c = ours.config
    config = configs.DeepseekV41TextConfig(
        vocab_size=VOCAB,
        hidden_size=size.D,
        hc_mult=size.M,
        rms_norm_eps=EPS,
        engram_layer_ids=[LAYER],
        engram_num_embeddings=[len(ours.table.weight)],
        engram_max_ngram_size=ORDERS[-1],
        engram_vocab_size=size.rows,
        engram_n_heads=HEADS,
        engram_head_dim=c.row_width,
        engram_pad_token_id=c.pad_id,
        engram_compressed_vocab_size=VOCAB,
        dspark_noise_token_id=0,
        dtype="float32",
    )
    hasher = layers.DeepseekV41NgramHash(config, word_tokenizer())
    theirs = layers.DeepseekV41Engram(config, LAYER, common.BackendConfig(linear="torch"))
    with torch.no_grad():
        theirs.embed.weight.copy_(ours.table.weight)
        theirs.wkv.weight.copy_(ours.project.weight)
        theirs.q_weight.copy_(ours.fusion.query_norm)
        theirs.k_weight.copy_(ours.fusion.key_norm)
    pair = paired(size, ours, theirs, lambda h, ids: theirs(h, hasher(ids)[:, :, 0]))
    return pair._replace(ours=lambda h, ids: h + pair.ours(h, ids))


# timing


def paired(size: Size, ours: Engram, theirs: nn.Module, update: Update) -> Pair:
    """Both in the type of `size`."""
    ours.to(size.dtype)
    theirs.to(size.dtype)
    return Pair(ours, update, [*ours.parameters(), *theirs.parameters()])


def draw(size: Size) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states that want a gradient, fresh token ids, and the gradient of the update."""
    shape = (size.B, size.T, size.M, size.D)
    hidden, grad = torch.randn(shape, dtype=size.dtype), torch.randn(shape, dtype=size.dtype)
    return hidden.requires_grad_(), torch.randint(0, VOCAB, (size.B, size.T)), grad


def check(name: str, size: Size, pair: Pair) -> None:
    """Raise unless both give the same update and, in float32, the same gradient of the hidden states."""
    hidden, ids, grad = draw(size)
    with torch.set_grad_enabled(name != "decode"):
        updates = [update(hidden, ids) for update in (pair.ours, pair.theirs)]
    compared = [(updates, 1e-4 if size.dtype == torch.float32 else 0.05)]
    if size.dtype == torch.float32 and name != "decode":
        compared.append(([torch.autograd.grad(update, hidden, grad)[0] for update in updates], 1e-3))
    for (one, other), allowed in compared:
        # Of the median vector: a gate near 0 has a slope of up to 500, so the gradients of few are all rounding.
        error = float(((one - other).norm(dim=-1) / other.norm(dim=-1)).detach().median())
        if error > allowed:
            raise AssertionError(f"the layers differ by {error:.2g} of their size, {allowed:g} allowed")


def forward(update: Update, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """As in inference."""
    with torch.no_grad():
        update(*inputs[:2])


def forward_backward(update: Update, parameters: list[nn.Parameter], inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """With gradients of hidden states and all parameters, made anew as after `zero_grad`."""
    hidden, ids, grad = inputs
    hidden.grad = None
    update(hidden, ids).backward(grad)
    for parameter in parameters:
        parameter.grad = None


def measure(name: str, size: Size, pair: Pair | str, quick: bool) -> dict[str, Measured]:
    """Seconds of one pass of ours and theirs."""
    if isinstance(pair, str):
        return {"ours": "-", "theirs": pair}
    check(name, size, pair)
    run = functools.partial(forward_backward, parameters=pair.parameters) if name == "both" else forward
    return alternate(
        {"ours": lambda x: run(pair.ours, inputs=x), "theirs": lambda x: run(pair.theirs, inputs=x)},
        functools.partial(draw, size),
        budget_s=0.5 if quick else 1.0,
    )


class Peer(NamedTuple):
    """How pairs with a peer are built, and what is measured: passes, each with rows of a head (which matter to backward
    alone), numbers of branches, and shapes `[B, T]`."""

    build: Callable[[Size], Pair | str]
    branches: tuple[int, ...] = (1, 4)
    passes: tuple[tuple[str, int], ...] = (("forward", FEW_ROWS), ("both", FEW_ROWS), ("both", MANY_ROWS))
    shapes: tuple[tuple[int, int], ...] = SHAPES

    def cases(self, widths: Sequence[int], quick: bool) -> Iterator[tuple[str, Size]]:
        """Passes and sizes."""
        for dtype in (torch.float32, torch.bfloat16):
            for M in self.branches:
                for D in widths:
                    for B, T in self.shapes[:3] if quick else self.shapes:
                        for name, rows in self.passes:
                            yield name, Size(B, T, D, M, dtype, rows)


# Qwen4-Exp's config refuses M = 1.
PEERS = {
    "transformers' Qwen4ExpTextPLELayer (M > 1 alone)": Peer(qwen_pair, (4,)),
    "The same, decoding with a state, next tokens of a prompt": Peer(
        qwen_decoding_pair, (4,), (("decode", FEW_ROWS), ("decode", MANY_ROWS)), ((1, 1), (8, 1), (1, 8))
    ),
    "The demonstration's arithmetic, restated": Peer(plain_pair),
    "nemo-automodel 0.7.0's DeepseekV41Engram (no convolution)": Peer(nemo_pair),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three shapes and few rounds")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="model widths d")
    arguments = parser.parse_args()
    prepare_process()
    torch.manual_seed(0)
    tables = []
    for title, peer in PEERS.items():
        table = Table(title, ["type", "M", "d", "B", "T", "rows", "pass"], ["ours", "theirs"])
        for name, size in peer.cases(arguments.widths, arguments.quick):
            pair = peer.build(size) if size.memory <= MEMORY_LIMIT else "> 8 GiB"
            seconds = measure(name, size, pair, arguments.quick)
            n_rows = size.rows * HEADS * len(ORDERS)
            kind = str(size.dtype).removeprefix("torch.")
            table.add((kind, size.M, size.D, size.B, size.T, n_rows, name), seconds)
        tables.append(table)
        finish("memory_layer", tables, arguments=vars(arguments))  # after each, since all take half an hour


if __name__ == "__main__":
    main()

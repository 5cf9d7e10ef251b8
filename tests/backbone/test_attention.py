"""Attention against transformers' Qwen3 and Llama (grouped queries) and DeepSeek-V3 (latent) with the same weights."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engram.backbone import attention
from engram.backbone.attention import GroupedQueryAttention, MultiHeadLatentAttention
from engram.backbone.positions import positions_of
from engram.config import GQAConfig, MLAConfig, YarnConfig

D, B, T = 32, 2, 17
GQA = GQAConfig(n_heads=4, n_kv_heads=2, head_dim=8)
MLA = MLAConfig(n_heads=4, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=6, v_head_dim=10, q_lora_rank=14)
YARN = YarnConfig(factor=8.0, original_max_seq_len=40, beta_fast=6.0)
ROPES = [(10_000.0, None), (777.0, None), (777.0, YARN)]


@pytest.mark.parametrize(("theta", "yarn"), ROPES)
def test_grouped_query_attention_equals_qwen3(theta: float, yarn: YarnConfig | None) -> None:
    qwen3 = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    settings = qwen3.Qwen3Config(
        hidden_size=D,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-6,
        rope_parameters=_rope(theta, yarn),
        attn_implementation="eager",
    )
    theirs = qwen3.Qwen3Attention(settings, 0)
    config = replace(GQA, rope_theta=theta, yarn=yarn)
    ours = GroupedQueryAttention(config, D, 1e-6)
    for norm in (ours.q_norm, ours.k_norm):
        torch.nn.init.normal_(norm.weight, 1.0, 0.3)
    _copy_projections(ours, theirs)
    with torch.no_grad():
        theirs.q_norm.weight.copy_(ours.q_norm.weight)
        theirs.k_norm.weight.copy_(ours.k_norm.weight)
    x = torch.randn(B, T, D)
    angles = qwen3.Qwen3RotaryEmbedding(settings)(x, torch.arange(T)[None])
    expected, _ = theirs(x, angles, _causal())
    got = ours(x, positions_of(torch.zeros(B, T, dtype=torch.int64), None, config))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("theta", "yarn"), ROPES)
def test_without_norms_of_queries_and_keys_it_equals_llama(theta: float, yarn: YarnConfig | None) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    settings = llama.LlamaConfig(
        hidden_size=D,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rope_parameters=_rope(theta, yarn),
        attn_implementation="eager",
    )
    theirs = llama.LlamaAttention(settings, 0)
    config = replace(GQA, qk_norm=False, rope_theta=theta, yarn=yarn)
    ours = GroupedQueryAttention(config, D, 1e-6)
    assert {name for name, _ in ours.named_parameters()} == {"qkv.weight", "out.weight"}
    _copy_projections(ours, theirs)
    x = 3 * torch.randn(B, T, D)
    angles = llama.LlamaRotaryEmbedding(settings)(x, torch.arange(T)[None])
    expected, _ = theirs(x, angles, _causal())
    got = ours(x, positions_of(torch.zeros(B, T, dtype=torch.int64), None, config))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("theta", "yarn"), ROPES)
@pytest.mark.parametrize("q_lora_rank", [0, 14])
def test_latent_attention_equals_deepseek_v3(q_lora_rank: int, theta: float, yarn: YarnConfig | None) -> None:
    deepseek = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    config = replace(MLA, q_lora_rank=q_lora_rank, rope_theta=theta, yarn=yarn)
    settings = deepseek.DeepseekV3Config(
        hidden_size=D,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=q_lora_rank or None,
        kv_lora_rank=12,
        qk_nope_head_dim=8,
        qk_rope_head_dim=6,
        v_head_dim=10,
        rope_interleave=False,
        attn_implementation="eager",
        # By mscale_all_dim the temperature is that of the whole score, of which rotated channels are a part.
        rope_parameters={**_rope(theta, yarn), "mscale": 1.0, "mscale_all_dim": 1.0},
    )
    theirs = deepseek.DeepseekV3Attention(settings, 0)
    ours = MultiHeadLatentAttention(config, D, 1e-6)
    torch.nn.init.normal_(ours.kv_norm.weight, 1.0, 0.3)
    with torch.no_grad():
        if q_lora_rank:
            torch.nn.init.normal_(ours.q_norm.weight, 1.0, 0.3)
            theirs.q_a_proj.weight.copy_(ours.q_down.weight)
            theirs.q_a_layernorm.weight.copy_(ours.q_norm.weight)
            theirs.q_b_proj.weight.copy_(ours.q_up.weight)
        else:
            theirs.q_proj.weight.copy_(ours.q_up.weight)
        theirs.kv_a_proj_with_mqa.weight.copy_(ours.kv_down.weight)
        theirs.kv_a_layernorm.weight.copy_(ours.kv_norm.weight)
        theirs.kv_b_proj.weight.copy_(ours.kv_up.weight)
        theirs.o_proj.weight.copy_(ours.out.weight)
    x = torch.randn(B, T, D)
    angles = deepseek.DeepseekV3RotaryEmbedding(settings)(x, torch.arange(T)[None])
    expected, _ = theirs(x, angles, _causal())
    got = ours(x, positions_of(torch.zeros(B, T, dtype=torch.int64), None, config))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("own_kernel", [True, False])
@pytest.mark.parametrize("kind", ["gqa", "mla"])
def test_a_document_in_a_window_is_attended_as_if_alone(
    kind: str, own_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotary positions are relative, so that where a document stands in its window does not matter."""
    if not own_kernel:  # as on devices that have none: documents are kept apart by a mask
        monkeypatch.setattr(attention, "has_attention", lambda device: False)
    config: Any = GQA if kind == "gqa" else MLA
    layer: Any = (GroupedQueryAttention if kind == "gqa" else MultiHeadLatentAttention)(config, D, 1e-6).double()
    x = torch.randn(1, T, D, dtype=torch.float64)
    ids = torch.zeros(1, T, dtype=torch.int64)
    documents = torch.tensor([[0] * 5 + [1] * 8 + [2] * 4])
    together = layer(x, positions_of(ids, documents, config))
    for start, end in ((0, 5), (5, 13), (13, 17)):
        alone = layer(x[:, start:end], positions_of(ids[:, start:end], None, config))
        torch.testing.assert_close(together[:, start:end], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["gqa", "mla"])
def test_packed_documents_on_a_gpu_are_those_of_float64(kind: str) -> None:
    """In bfloat16 flash attention takes them one by one, without a mask."""
    config: Any = GQA if kind == "gqa" else replace(MLA, qk_rope_head_dim=8)
    layer: Any = (GroupedQueryAttention if kind == "gqa" else MultiHeadLatentAttention)(config, D, 1e-6)
    x, grad = torch.randn(B, T, D), torch.randn(B, T, D)
    documents = torch.tensor([[0] * 5 + [1] * 8 + [2] * 4, [7] * 16 + [9]])
    found = []
    for dtype, device in ((torch.float64, "cpu"), (torch.bfloat16, "cuda")):
        here = x.to(device, dtype).requires_grad_()
        at = positions_of(torch.zeros(B, T, dtype=torch.int64, device=device), documents.to(device), config)
        y = layer.to(device, dtype)(here, at)
        found.append((y.detach().cpu().double(), torch.autograd.grad(y, here, grad.to(y))[0].cpu().double()))
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() < 0.02 * one.norm()


def _rope(theta: float, yarn: YarnConfig | None) -> dict[str, Any]:
    """The `rope_parameters` of transformers."""
    if yarn is None:
        return {"rope_type": "default", "rope_theta": theta}
    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_seq_len,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
    }


def _copy_projections(ours: GroupedQueryAttention, theirs: Any) -> None:
    with torch.no_grad():
        q, k, v = ours.qkv.weight.split([n * ours.config.head_dim for n in ours.heads])
        theirs.q_proj.weight.copy_(q)
        theirs.k_proj.weight.copy_(k)
        theirs.v_proj.weight.copy_(v)
        theirs.o_proj.weight.copy_(ours.out.weight)


def _causal() -> Tensor:
    return torch.full((T, T), float("-inf")).triu(1)[None, None]

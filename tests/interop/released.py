"""Small checkpoints of the released kinds: Qwen4-Exp saved by transformers, DeepSeek-V4.1 written tensor by tensor."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from torch import Tensor, nn

EOS, PAD = 5, 2


def qwen_config(**changes: Any) -> Any:
    from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig

    settings = {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "num_experts_per_tok": 2,
        "num_experts": 6,
        "hc_count": 2,
        "hc_lowrank": 8,
        "ple_layer_ids": [2, 3],
        "ple_embed_dim": 64,
        "ngram_size": 3,
        "heads_per_ngram": 4,
        "ngram_vocab_size_base": 50,
        "split_ngram_parts": 8,
        "eos_token_id": [EOS, 6],
        "pad_token_id": 0,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]},
    }
    return Qwen4ExpTextConfig(**{**settings, **changes})


def qwen_model(dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """A model of transformers whose memories say something: its own start leaves their convolutions at 0."""
    from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpForCausalLM

    torch.manual_seed(1)
    model = Qwen4ExpForCausalLM(qwen_config(**changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ple." in name:
                parameter.normal_(std=0.5)
            elif parameter.ndim > 1:
                parameter.mul_(5)
    return model.to(dtype)


V41 = {
    "vocab_size": 60,
    "hidden_size": 40,
    "num_hidden_layers": 3,
    "rms_norm_eps": 1e-20,
    "hc_mult": 3,
    "n_routed_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "engram_layer_ids": [0, 2],
    "engram_max_ngram_size": 4,
    "engram_vocab_size": 30,
    "engram_n_heads": 2,
    "engram_head_dim": 64,
    "engram_pad_token_id": PAD,
}


def v41_tokenizer() -> Tokenizer:
    """57 tokens, of which capitals and accents share the ids of what they fold to: 29 are left."""
    words = [*"abcdefghijklmnopqrstuvwxyz", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ", "\u00e9", "\u00c9", "<pad>", "12", "ab"]
    return Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))


def primes_from(base: int, count: int) -> list[int]:
    return [n for n in range(base, base + 40 * count) if all(n % d for d in range(2, n))][:count]


def random_fp8(rows: int, columns: int, scale_rows: int) -> tuple[Tensor, Tensor]:
    """Any finite values, scales of different sizes, and a block of zeros whose scale says nothing."""
    values = torch.randint(0, 255, (rows, columns), dtype=torch.uint8)
    values[values & 0x7F == 0x7F] = 1  # NaN
    scales = torch.randint(112, 122, (scale_rows, -(-columns // 32)), dtype=torch.uint8)
    values[:1, :32] = 0
    return values.view(torch.float8_e4m3fn), scales.view(torch.float8_e8m0fnu)


def v41_tensors(scaled: bool = True) -> dict[str, Tensor]:
    """Two memories' tensors, and a few of a model around them."""
    torch.manual_seed(2)
    d, m, width = V41["hidden_size"], V41["hc_mult"], 3 * V41["engram_n_heads"] * V41["engram_head_dim"]
    primes, tensors = primes_from(V41["engram_vocab_size"], 12), {}
    for at, layer in enumerate(V41["engram_layer_ids"]):
        rows = sum(primes[6 * at : 6 * at + 6])
        prefix = f"layers.{layer}.engram."
        if scaled:
            embed = random_fp8(rows, 64, rows)
            wkv = random_fp8((m + 1) * d, width, -(-(m + 1) * d // 32))
            for name, (values, scales) in {"embed": embed, "wkv": wkv}.items():
                tensors[f"{prefix}{name}.weight"], tensors[f"{prefix}{name}.scale"] = values, scales
        else:
            tensors[f"{prefix}embed.weight"] = torch.randn(rows, 64).bfloat16()
            tensors[f"{prefix}wkv.weight"] = torch.randn((m + 1) * d, width).bfloat16() / 16
        for name in ("q_weight", "k_weight"):
            tensors[prefix + name] = torch.randn(m, d).bfloat16()
    tensors["embed.weight"] = torch.randn(V41["vocab_size"], d).bfloat16()
    tensors["head.weight"] = torch.randn(V41["vocab_size"], d)
    return tensors


def save_v41(folder: Path, tensors: dict[str, Tensor], **changes: Any) -> Path:
    """A folder with the tensors in two files, the table of the second memory alone in one of them."""
    folder.mkdir(parents=True, exist_ok=True)
    alone = "layers.2.engram.embed.weight"
    tokenizer = v41_tokenizer()
    text = {**V41, "engram_compressed_vocab_size": 29, **changes}
    (folder / "config.json").write_text(json.dumps({"model_type": "deepseek_v41", "text_config": text}))
    tokenizer.save(str(folder / "tokenizer.json"))
    files = {"model-1.safetensors": {k: v for k, v in tensors.items() if k != alone}}
    if alone in tensors:
        files["model-2.safetensors"] = {alone: tensors[alone]}
    for name, held in files.items():
        save_file(held, folder / name)
    weight_map = {key: name for name, held in files.items() for key in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def same_files(one: Path, other: Path) -> bool:
    """Whether two folders hold the same files, byte by byte, and some at all."""
    names = sorted(path.name for path in one.iterdir())
    assert names
    return names == sorted(path.name for path in other.iterdir()) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )

"""Memories of DeepSeek-V4.1 checkpoints: against its arithmetic restated here, NVIDIA NeMo's layer, and its files."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from released import PAD, V41, primes_from, same_files, save_v41, v41_tensors, v41_tokenizer
from torch import Tensor, nn

from engram import ConfigError, Engram
from engram.inference.offload import offload, quantize
from engram.interop import deepseek_v41
from engram.memory import OffloadedTable, ReadOnlyTable, table_sizes

LAYERS = V41["engram_layer_ids"]
D, M = V41["hidden_size"], V41["hc_mult"]


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return v41_tensors()


@pytest.fixture(scope="module")
def folder(tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_v41(tmp_path_factory.mktemp("v41"), tensors)


def value_of_e4m3(byte: int) -> float:
    """Sign, 4 bits of exponent (bias 7), 3 of mantissa; exponent 0 without the leading 1."""
    sign, exponent, mantissa = -1.0 if byte & 0x80 else 1.0, byte >> 3 & 15, byte & 7
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def dequantized(tensors: dict[str, Tensor], name: str, block_rows: int) -> np.ndarray:
    values = np.vectorize(value_of_e4m3)(tensors[name + ".weight"].view(torch.uint8).numpy())
    scales = 2.0 ** (tensors[name + ".scale"].view(torch.uint8).numpy().astype(np.float64) - 127)
    rows, columns = np.indices(values.shape)
    return values * scales[rows // block_rows, columns // 32]


def canonical_ids() -> list[int]:
    """The small tokenizer's tokens by hand: letters without case and accent, then the three other tokens."""
    words = [word for word, _ in sorted(v41_tokenizer().get_vocab().items(), key=lambda item: item[1])]
    folded = [word.lower().replace("\u00e9", "e") for word in words]
    return [list(dict.fromkeys(folded)).index(word) for word in folded]


def restated(tensors: dict[str, Tensor], layer: int, hidden: np.ndarray, ids: np.ndarray, real: np.ndarray) -> Any:
    """The residual stream after the memory, in float64, one token and head at a time."""
    lookup, primes = canonical_ids(), primes_from(V41["engram_vocab_size"], 12)
    n_canonical, at = max(lookup) + 1, LAYERS.index(layer)
    draws = np.random.default_rng(10007 * layer).integers(0, (2**63 - 1) // n_canonical // 2, size=4, dtype=np.int64)
    multipliers = [2 * int(r) + 1 for r in draws]
    heads = primes[6 * at : 6 * at + 6]
    prefix = f"layers.{layer}.engram."
    table, wkv = dequantized(tensors, prefix + "embed", 1), dequantized(tensors, prefix + "wkv", 32)
    q, k = (tensors[prefix + name].double().numpy() for name in ("q_weight", "k_weight"))
    out = hidden.copy()
    for b, t in np.argwhere(real):
        back, past = [], True
        for shift in range(4):  # padding and images end the look back for good
            past = past and t >= shift and bool(real[b, t - shift])
            back.append(lookup[ids[b, t - shift]] if past else lookup[PAD])
        rows = []
        for head, prime in enumerate(heads):
            mix = 0
            for shift in range(head // 2 + 2):
                mix ^= back[shift] * multipliers[shift]
            rows.append(table[sum(heads[:head]) + mix % prime])
        kv = wkv @ np.concatenate(rows)
        for m in range(M):
            h, key = hidden[b, t, m], kv[m * D : (m + 1) * D]
            dot = float((h * q[m] * key * k[m]).sum()) / math.sqrt((h**2).mean() * (key**2).mean() * D)
            gate = 1 / (1 + math.exp(-math.copysign(math.sqrt(max(abs(dot), 1e-6)), dot)))
            out[b, t, m] += gate * kv[M * D :]
    return out


@pytest.mark.parametrize("layer", LAYERS)
def test_the_update_is_that_of_the_released_arithmetic(folder: Path, tensors: dict[str, Tensor], layer: int) -> None:
    memory = deepseek_v41.read_memory(folder, dtype=torch.float32)[layer]
    hidden, ids = torch.randn(2, 10, M, D), torch.randint(0, 57, (2, 10))
    real = torch.ones(2, 10, dtype=torch.bool)
    real[0, :3] = real[1, 5] = real[1, 8:] = False
    expected = torch.from_numpy(restated(tensors, layer, hidden.double().numpy(), ids.numpy(), real.numpy()))
    found = hidden + memory(hidden, ids, padding_mask=real)
    assert (expected - hidden)[real].abs().mean() > 0.1
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_decoding_gives_what_the_whole_sequence_gives(folder: Path) -> None:
    memory = deepseek_v41.read_memory(folder, dtype=torch.float32)[2]
    hidden, ids = torch.randn(2, 9, M, D), torch.randint(0, 57, (2, 9))
    state, updates = memory.init_state(2), []
    for t in range(9):
        update, state = memory.step(hidden[:, t : t + 1], ids[:, t : t + 1], state)
        updates.append(update)
    torch.testing.assert_close(torch.cat(updates, 1), memory(hidden, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", LAYERS)
def test_rows_and_outputs_equal_nemos(folder: Path, tensors: dict[str, Tensor], layer: int) -> None:
    theirs = pytest.importorskip("nemo_automodel.components.models.deepseek_v41.engram")
    from nemo_automodel.components.models.common import BackendConfig
    from nemo_automodel.components.models.deepseek_v41.config import DeepseekV41TextConfig
    from nemo_automodel.components.models.deepseek_v41.state_dict_adapter import dequantize_checkpoint_weight
    from transformers import PreTrainedTokenizerFast

    memory = deepseek_v41.read_memory(folder, dtype=torch.float32)[layer]
    rows = [sum(heads) for heads in table_sizes(memory.config).values()]
    config = DeepseekV41TextConfig(
        **{**V41, "engram_compressed_vocab_size": 29, "engram_num_embeddings": rows, "dtype": "float32"},
        compress_ratios=[0, 0, 0],
        kv_source_layer_ids=[],
        index_source_layer_ids=[],
        candidate_source_layer_id=-1,
    )
    hasher = theirs.DeepseekV41NgramHash(config, PreTrainedTokenizerFast(tokenizer_object=v41_tokenizer()))
    module = theirs.DeepseekV41Engram(config, layer, BackendConfig(linear="torch"))
    prefix = f"layers.{layer}.engram."
    with torch.no_grad():
        for name, parameter in (("embed", module.embed.weight), ("wkv", module.wkv.weight)):
            pair = tensors[f"{prefix}{name}.weight"], tensors[f"{prefix}{name}.scale"]
            decoded = dequantize_checkpoint_weight(*pair, dtype=torch.float32, rowwise=name == "embed")
            parameter[: len(decoded)] = decoded
        module.q_weight.copy_(tensors[prefix + "q_weight"])
        module.k_weight.copy_(tensors[prefix + "k_weight"])
    hidden, ids = torch.randn(3, 12, M, D), torch.randint(0, 57, (3, 12))
    real = torch.ones(3, 12, dtype=torch.bool)
    real[0, :4] = real[1, 6] = real[2, 9:] = False
    hashes = hasher(ids, token_mask=real)[:, :, LAYERS.index(layer)]
    assert torch.equal(hashes[real], memory.reader(ids, torch.zeros_like(ids).masked_fill(~real, -1))[real])
    expected = module(hidden, hashes, token_mask=real)
    torch.testing.assert_close(hidden + memory(hidden, ids, padding_mask=real), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scaled", [True, False], ids=["8 bits", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_read_is_written_back_bit_for_bit(tmp_path: Path, scaled: bool, dtype: torch.dtype) -> None:
    source = save_v41(tmp_path / "theirs", v41_tensors(scaled))
    memories = deepseek_v41.read_memory(source, dtype=dtype)
    assert memories[2].table.weight.dtype == memories[2].project.weight.dtype == dtype
    deepseek_v41.write_memory(memories, source, tmp_path / "ours")
    assert same_files(source, tmp_path / "ours")


def test_packed_tables_say_the_same_in_264_bytes_for_256_values(folder: Path, tmp_path: Path) -> None:
    whole, packed = (deepseek_v41.read_memory(folder, packed=packed) for packed in (False, True))
    table = packed[2].table
    assert table.records.shape == (len(whole[2].table.weight), 64 * 264 // 256)
    assert torch.equal(table(torch.arange(len(table.records))), whole[2].table.weight)
    hidden, ids = torch.randn(2, 8, M, D), torch.randint(0, 57, (2, 8))
    assert torch.equal(packed[2](hidden, ids), whole[2](hidden, ids))
    assert isinstance(table, ReadOnlyTable)
    packed[2](hidden, ids).sum().backward()  # what is no row learns
    assert packed[2].project.weight.grad is not None
    assert [name for name, _ in table.named_parameters()] == []
    deepseek_v41.write_memory(packed, folder, tmp_path / "ours")
    assert same_files(folder, tmp_path / "ours")
    with pytest.raises(ConfigError, match=r"embed\.weight: type is torch\.bfloat16: allowed is torch\.float8_e4m3fn"):
        deepseek_v41.read_memory(save_v41(tmp_path / "plain", v41_tensors(scaled=False)), packed=True)


@pytest.mark.parametrize("place", ["host", "disk"])
@pytest.mark.parametrize("packed", [True, False])
def test_tables_elsewhere_say_the_same_and_are_written_back_bit_for_bit(
    folder: Path, tmp_path: Path, place: Any, packed: bool
) -> None:
    memories = deepseek_v41.read_memory(folder, packed=packed)
    hidden, ids = torch.randn(2, 8, M, D), torch.randint(0, 57, (2, 8))
    with torch.no_grad():
        expected = [memory(hidden, ids) for memory in memories.values()]
        tables = tmp_path / "tables" if place == "disk" else None
        moved = offload(nn.ModuleList(memories.values()), place, folder=tables, cache_rows=20)
        assert [table.format.kind for table in moved.values()] == ["fp8_block32" if packed else "float"] * 2
        for memory, update in zip(memories.values(), expected, strict=True):
            assert isinstance(memory.table, OffloadedTable)
            assert torch.equal(memory(hidden, ids), update)
    deepseek_v41.write_memory(memories, folder, tmp_path / "ours")
    assert same_files(folder, tmp_path / "ours")


def test_rows_in_another_format_of_8_bits_are_not_written(folder: Path, tmp_path: Path) -> None:
    memories = deepseek_v41.read_memory(folder)
    quantize(nn.ModuleList(memories.values()), "int8")
    with pytest.raises(ConfigError, match="rows of the memory of block 0 is 'int8': allowed is float or fp8_block32"):
        deepseek_v41.write_memory(memories, folder, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_packed_rows_of_another_checkpoint_are_written_as_they_are(folder: Path, tmp_path: Path) -> None:
    packed = deepseek_v41.read_memory(folder, packed=True)
    packed[0].table.records[:] = torch.randint(0, 120, packed[0].table.records.shape, dtype=torch.uint8)
    deepseek_v41.write_memory({0: packed[0]}, folder, tmp_path / "ours")
    again = deepseek_v41.read_memory(tmp_path / "ours", [0], packed=True)
    assert torch.equal(again[0].table.records, packed[0].table.records)


def test_bfloat16_holds_what_is_stored_exactly(folder: Path) -> None:
    exact, half = (deepseek_v41.read_memory(folder, dtype=dtype)[0] for dtype in (torch.float32, torch.bfloat16))
    assert torch.equal(exact.table.weight, half.table.weight.float())
    assert torch.equal(exact.project.weight, half.project.weight.float())


def test_changed_rows_are_rounded_to_eight_bits_and_others_keep_theirs(folder: Path, tmp_path: Path) -> None:
    memories = deepseek_v41.read_memory(folder)
    table = memories[2].table.weight
    before = table.detach().clone()
    with torch.no_grad():
        table[3:5] = torch.randn(2, 64).bfloat16()
    deepseek_v41.write_memory({2: memories[2]}, folder, tmp_path / "written")
    after = deepseek_v41.read_memory(tmp_path / "written", [2])[2].table.weight
    others = [i for i in range(len(table)) if i not in (3, 4)]
    assert torch.equal(after[others], before[others])
    blocks = table[3:5].detach().float().view(-1, 32)
    error = (after[3:5].detach().float().view(-1, 32) - blocks).abs()
    # Half of the last of three bits of mantissa; below 2**-6 half of a fixed step, with a largest value above 224.
    assert (error <= (blocks.abs() / 16).maximum(blocks.abs().amax(-1, keepdim=True) * 2.0**-10 / 224)).all()
    assert error.max() > 0


def test_config_describes_the_released_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v41"}))
    config = deepseek_v41.memory_config(tmp_path)
    assert [sum(heads) for heads in table_sizes(config).values()] == [384_006_168, 384_016_682]
    assert (config.layers, config.orders, config.d_memory) == ((1, 14), (2, 3, 4), 24 * 256)
    # 8-bit rows of 256 and 8 scales of a byte each: 264 bytes.
    assert sum(table_rows * 264 for table_rows in (384_006_168, 384_016_682)) == 202_758_032_400


def spoiled(tmp_path: Path, changed: dict[str, Tensor | None], **settings: Any) -> Path:
    tensors = {**v41_tensors(), **changed}
    return save_v41(tmp_path / "spoiled", {k: v for k, v in tensors.items() if v is not None}, **settings)


@pytest.mark.parametrize(
    ("changed", "settings", "message"),
    [
        ({"layers.0.engram.k_weight": None}, {}, r"index\.json' lacks the tensor layers\.0\.engram\.k_weight"),
        ({"layers.2.engram.embed.scale": None}, {}, r"lacks the tensor layers\.2\.engram\.embed\.scale"),
        ({"layers.0.engram.q_weight": torch.ones(3, 39)}, {}, r"q_weight: shape is \[3, 39\]: allowed is \[3, 40\]"),
        (
            {"layers.0.engram.wkv.scale": torch.ones(5, 12)},
            {},
            r"wkv\.scale: type is torch\.float32: allowed is torch\.float8_e8m0fnu",
        ),
        ({}, {"engram_vocab_size": 32}, r"embed\.weight: shape is "),
        ({}, {"engram_vocab_size": 2**60}, r"rows of layers\.0\.engram\.embed\.weight is 252: allowed is \d+ or more"),
        ({}, {"engram_n_heads": 2**60}, r"rows of layers\.0\.engram\.embed\.weight is 252: allowed is \d+ or more"),
        ({}, {"engram_vocab_size": 1, "engram_n_heads": 40}, r"rows of layers\.0.* is 252: allowed is 7260 or more"),
        ({}, {"engram_max_ngram_size": 2**60}, r"config\.json': engram_max_ngram_size is \d+: allowed is 2 to 64"),
        ({}, {"hidden_size": 2**30}, r"wkv\.weight: shape is "),
        ({}, {"hidden_size": 40.0}, r"config\.json': hidden_size is 40\.0: allowed is a whole number"),
        ({}, {"rms_norm_eps": float("inf")}, r"config\.json': rms_norm_eps is inf: allowed is a number"),
        ({}, {"rms_norm_eps": 0}, r"config\.json.* memory\.norm_eps is 0: allowed is above 0"),
        (
            {},
            {"engram_num_embeddings": [300, 400]},
            r"engram_num_embeddings of block 0 is 300: allowed is \d+",
        ),
        ({}, {"engram_compressed_vocab_size": 32}, r"tokenizer\.json': canonical ids is 29: allowed is 32"),
        ({}, {"engram_layer_ids": []}, r"engram_layer_ids is \[\]"),
        ({}, {"vocab_size": 50}, r"tokenizer\.json': tokens is 57: allowed is up to 50"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, changed: dict, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        deepseek_v41.read_memory(spoiled(tmp_path, changed, **settings))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layers.0.engram.q_weight": torch.ones(3, 39)}, r"q_weight: shape is \[3, 39\]: allowed is \[3, 40\]"),
        ({"layers.0.engram.k_weight": torch.ones(3, 40).half()}, r"k_weight: type is torch\.float16"),
        ({"layers.0.engram.wkv.scale": torch.ones(5, 11).to(torch.float8_e8m0fnu)}, r"wkv\.scale: shape is \[5, 11\]"),
        ({"layers.0.engram.embed.weight": torch.ones(240, 64).bfloat16()}, r"embed\.weight: shape is \[240, 64\]"),
        ({"layers.0.engram.embed.weight": torch.ones(260, 64).bfloat16()}, r"embed\.weight: shape is \[260, 64\]"),
    ],
)
def test_nothing_is_written_into_a_checkpoint_that_would_not_be_read(
    folder: Path, tmp_path: Path, changed: dict, message: str
) -> None:
    """Rows that are written into a tensor of another shape would be written over the tensors behind it."""
    memories = deepseek_v41.read_memory(folder)
    with pytest.raises(ConfigError, match=message):
        deepseek_v41.write_memory(memories, spoiled(tmp_path, changed), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_lookup_of_other_ids_is_refused(folder: Path) -> None:
    for odd in (torch.empty(0, dtype=torch.int64), torch.arange(-31, 29)):
        with pytest.raises(ConfigError, match=r"lookup is .*: allowed is canonical ids of 0 or more"):
            deepseek_v41.read_memory(folder, lookup=odd)
    with pytest.raises(ConfigError, match="canonical ids of lookup is 60: allowed is 29"):
        deepseek_v41.read_memory(folder, lookup=torch.arange(60))
    with pytest.raises(ConfigError, match="layers is 1: allowed is one of the blocks"):
        deepseek_v41.read_memory(folder, [1])


def test_ids_that_the_tokenizer_has_no_token_for_are_padding(folder: Path) -> None:
    lookup = deepseek_v41.token_lookup(folder)
    assert lookup.tolist() == canonical_ids() + [canonical_ids()[PAD]] * 3


def test_another_models_checkpoint_is_refused(folder: Path) -> None:
    from engram.interop import qwen4_exp

    with pytest.raises(ConfigError, match="model_type is 'deepseek_v41': allowed is qwen4_exp"):
        qwen4_exp.read_memory(folder)


def test_memories_of_another_config_are_not_written(folder: Path, tmp_path: Path) -> None:
    memory = deepseek_v41.read_memory(folder)[0]
    with pytest.raises(ConfigError, match="layer of the memory for block 2 is 0: allowed is 2"):
        deepseek_v41.write_memory({2: memory}, folder, tmp_path / "x")
    raw = Engram(memory.config, 0, lookup=torch.arange(60))
    with pytest.raises(ConfigError, match="canonical ids of lookup is 60: allowed is 29"):
        deepseek_v41.write_memory({0: raw}, folder, tmp_path / "x")
    assert not (tmp_path / "x").exists()

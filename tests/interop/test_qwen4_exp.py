"""Memories of Qwen4-Exp checkpoints as transformers saves them: its own layers' and models' outputs, and its files."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from released import EOS, qwen_config, qwen_model, same_files
from safetensors.torch import load_file, save_file

from engram import ConfigError, Engram
from engram.interop import qwen4_exp
from engram.interop.qwen4_exp_model import PLELayer, use_memory
from engram.memory import NgramHasher
from engram.memory.primes import next_primes

pytest.importorskip("transformers.models.qwen4_exp")


@pytest.fixture(scope="module")
def model() -> Any:
    return qwen_model()


@pytest.fixture(scope="module", params=["one file", "many files"])
def folder(model: Any, request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen")
    model.save_pretrained(path, **({} if request.param == "one file" else {"max_shard_size": "20KB"}))
    assert (len(list(path.glob("*.safetensors"))) > 20) == (request.param == "many files")
    return path


@pytest.fixture(scope="module")
def single(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single")
    model.save_pretrained(path)
    return path


@pytest.fixture
def copy(single: Path, tmp_path: Path) -> Path:
    """A checkpoint in one file, to spoil."""
    for path in single.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def with_our_memory(model: Any, folder: Path) -> Any:
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    return use_memory(other, qwen4_exp.read_memory(folder))


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids with ends of documents, of unequal lengths, filled up on the left."""
    ids = torch.randint(7, 97, (3, 14))
    ids[:, [4, 9, 10]] = EOS
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    mask[1, :1] = 0
    return ids, mask


@torch.no_grad()
def test_whole_models_logits_equal_transformers(model: Any, folder: Path) -> None:
    ours, (ids, mask) = with_our_memory(model, folder), prompts()
    assert isinstance(ours.model.layers[1].ple, PLELayer)
    expected = model(ids).logits
    torch.testing.assert_close(ours(ids).logits, expected, rtol=1e-5, atol=1e-5)
    padded = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(
        ours(ids, attention_mask=mask).logits[mask.bool()], padded[mask.bool()], rtol=1e-5, atol=1e-5
    )
    # The memory is no rounding error in these logits.
    for layer in (1, 2):
        ours.model.layers[layer].ple.memory.table.weight.zero_()
    assert (ours(ids).logits - expected).abs().max() > 0.05


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_the_models_cache_equals_transformers(model: Any, single: Path, beams: int) -> None:
    ours, (ids, mask) = with_our_memory(model, single), prompts()
    asked = {
        "attention_mask": mask,
        "max_new_tokens": 16,
        "do_sample": False,
        "num_beams": beams,
        "eos_token_id": 96,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    expected, found = model.generate(ids, **asked), ours.generate(ids, **asked)
    assert torch.equal(found.sequences, expected.sequences)
    for a, b in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert len(found.sequences[0].unique()) > 3


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[1, 1, 1, 4, 1, 1, 12, 1, 2], [24], [2, 22], [11, 1, 12]])
def test_decoding_in_chunks_through_a_cache_equals_transformers_layer(
    model: Any, single: Path, chunks: list[int]
) -> None:
    from transformers import DynamicCache

    theirs, ours = model.model.layers[2].ple, PLELayer(qwen4_exp.read_memory(single, [2])[2], 2)
    hidden, ids = torch.randn(2, 24, 64), torch.randint(0, 97, (2, 24))
    ids[:, [0, 3, 12, 13]] = EOS
    caches, at = [DynamicCache(config=model.config), DynamicCache(config=model.config)], 0
    for n in chunks:
        now = slice(at, at + n)
        found, expected = (
            layer(hidden[:, now], ids[:, now], cache) for layer, cache in zip((ours, theirs), caches, strict=True)
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        at += n
    assert at == 24


def test_gradients_of_the_whole_model_equal_transformers(model: Any, single: Path) -> None:
    ours, (ids, _) = with_our_memory(model, single), prompts()
    theirs = model.model.layers[1].ple
    memory = ours.model.layers[1].ple.memory
    for each in (model, ours):
        each.zero_grad()
        each(ids, labels=ids).loss.backward()
    assert memory.table.weight.grad is not None
    rows = memory.table.weight.grad.to_dense()
    expected = theirs.ple_embedding.ngram_embedding.weight.grad
    assert rows.abs().max() > 1e-3
    torch.testing.assert_close(rows, expected[: len(rows)], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(memory.project.weight.grad[:64], theirs.key_proj.weight.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        memory.fusion.conv_norm.grad.flatten(), theirs.norm_conv.weight.grad, rtol=1e-4, atol=1e-6
    )
    model.zero_grad()


def test_config_describes_the_released_model(tmp_path: Path) -> None:
    """The figures of Qwen3.8-Flash-Next: one table of 320,001,446 rows that are read, filled up to 320,001,536."""
    text = {"ple_layer_ids": [2], "eos_token_id": 7, "ple_embed_dim": 2560, "split_ngram_parts": 512}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen4_exp", "text_config": text}))
    prefix, some = "model.language_model.layers.1.ple.", torch.zeros(1, dtype=torch.bfloat16)
    names = ("key_proj.weight", "ple_embedding.ngram_embedding.shard_0.weight")
    save_file({prefix + name: some.clone() for name in names}, tmp_path / "model.safetensors")
    config = qwen4_exp.memory_config(tmp_path)
    hasher = NgramHasher(config, config.vocab_size)
    assert hasher.n_rows == {1: 320_001_446}
    assert hasher.multipliers[1] == (23703573157769, 20109073645365, 8052911324071)
    assert (config.row_width, config.table_dtype, config.branches, config.norm_eps) == (160, "bfloat16", 4, 1e-6)
    with pytest.raises(ConfigError, match=r"shard_0.weight: shape is \[1\]: allowed is \[625003, 160\]"):
        qwen4_exp.Checkpoint(tmp_path).parts(1, hasher.n_rows[1])


def test_defaults_are_those_of_transformers() -> None:
    from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig

    own = Qwen4ExpTextConfig()
    for name, value in qwen4_exp.DEFAULTS.items():
        if name not in ("ple_layer_ids", "ple_embed_dim", "split_ngram_parts"):  # which follow from others
            assert getattr(own, name) == value, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", ["20KB", "10MB"])
def test_what_is_read_is_written_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype, size: str) -> None:
    model = qwen_model(dtype)
    with torch.no_grad():  # 1 + w has no digits left for some of these
        model.model.layers[1].ple.norm_key.weight[:8] = torch.logspace(-3, -30, 8).to(dtype)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    memories = qwen4_exp.read_memory(tmp_path / "theirs")
    assert memories[1].table.weight.dtype == memories[1].project.weight.dtype == dtype
    memories[1].table = memories[1].table.to_disk(tmp_path / "table")
    qwen4_exp.write_memory(memories, tmp_path / "theirs", tmp_path / "ours")
    assert same_files(tmp_path / "theirs", tmp_path / "ours")


def test_a_changed_memory_is_what_transformers_loads(model: Any, folder: Path, tmp_path: Path) -> None:
    memories = qwen4_exp.read_memory(folder)
    with torch.no_grad():
        for parameter in memories[2].parameters():
            parameter.add_(torch.randn_like(parameter) / 8)
    qwen4_exp.write_memory({2: memories[2]}, folder, tmp_path / "written")
    loaded = type(model).from_pretrained(tmp_path / "written").eval()
    before, after = model.state_dict(), loaded.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    own = {f"model.layers.2.ple.{n}" for n, _ in model.model.layers[2].ple.named_parameters()}
    assert changed == own
    hidden, ids = torch.randn(2, 9, 2, 32), torch.randint(0, 97, (2, 9))
    expected = loaded.model.layers[2].ple(hidden.flatten(-2), ids, None).unflatten(-1, (2, 32))
    torch.testing.assert_close(memories[2](hidden, ids), expected, rtol=1e-5, atol=1e-5)
    name, n_rows = "model.layers.2.ple.ple_embedding.ngram_embedding.weight", len(memories[2].table.weight)
    assert len(before[name]) > n_rows
    assert torch.equal(after[name][n_rows:], before[name][n_rows:])  # the rows that fill it up are the old ones


def test_a_copy_has_all_of_a_checkpoint_and_keeps_what_stood_beside_it(copy: Path, tmp_path_factory: Any) -> None:
    (copy / "assets").mkdir()
    (copy / "assets" / "note.txt").write_text("whatever else there is")
    (copy / "model.safetensors").chmod(0o444)
    out = tmp_path_factory.mktemp("out")
    (out / "mine.txt").write_text("kept")
    (out / "config.json").write_text("not kept")
    qwen4_exp.write_memory({}, copy, out)
    assert (out / "assets" / "note.txt").read_text() == "whatever else there is"
    assert (out / "mine.txt").read_text() == "kept"
    assert (out / "config.json").read_bytes() == (copy / "config.json").read_bytes()
    assert (out / "model.safetensors").stat().st_mode & 0o200


def test_a_table_in_one_tensor_is_read_and_written_too(single: Path, copy: Path, tmp_path: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    for layer in (1, 2):
        name = f"model.layers.{layer}.ple.ple_embedding.ngram_embedding."
        tensors[name + "weight"] = torch.cat([tensors.pop(f"{name}shard_{i}.weight") for i in range(8)])
    save_file(tensors, copy / "model.safetensors")
    memories = qwen4_exp.read_memory(copy)
    assert torch.equal(memories[1].table.weight, qwen4_exp.read_memory(single)[1].table.weight)
    out = qwen4_exp.write_memory(memories, copy, tmp_path.parent / (tmp_path.name + "-written"))
    assert same_files(copy, out)


def test_parts_are_counted_where_the_config_does_not_say_how_many(single: Path, copy: Path) -> None:
    reconfigure(copy, split_ngram_parts=None)
    for ours, theirs in zip(qwen4_exp.read_memory(copy).values(), qwen4_exp.read_memory(single).values(), strict=True):
        assert torch.equal(ours.table.weight, theirs.table.weight)
    spoil(copy, lambda tensors: tensors.pop(TABLE + "shard_3.weight"))
    with pytest.raises(ConfigError, match=r"model\.safetensors' lacks the tensor .*shard_3\.weight"):
        qwen4_exp.read_memory(copy)


def spoil(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


TABLE = "model.layers.2.ple.ple_embedding.ngram_embedding."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(TABLE + "shard_3.weight"), r"model\.safetensors' lacks the tensor .*shard_3\.weight"),
        (
            lambda t: t.update({TABLE + "shard_7.weight": torch.zeros(79, 8)}),
            r"shard_7\.weight: shape is \[79, 8\]: allowed is \[\d+, 8\]",
        ),
        (
            lambda t: t.update({"model.layers.1.ple.conv1d.weight": torch.zeros(64, 1, 3)}),
            r"conv1d\.weight: shape is \[64, 1, 3\]: allowed is \[64, 1, 4\]",
        ),
        (
            lambda t: t["model.layers.2.ple.ple_embedding.layer_multipliers"].add_(2),
            r"layer_multipliers is \[.*\]: allowed is \[.*\], from config.json",
        ),
        (
            lambda t: t.update({"model.layers.1.ple.value_proj.weight": torch.zeros(31, 64)}),
            r"value_proj\.weight: shape is \[31, 64\]: allowed is \[32, 64\]",
        ),
        (
            lambda t: t.update({"model.layers.1.ple.value_proj.weight": torch.zeros(32, 64).bfloat16()}),
            r"value_proj\.weight: type is torch\.bfloat16: allowed is torch\.float32",
        ),
        (lambda t: t.pop("model.layers.1.ple.key_proj.weight"), r"lacks the tensor layers\.1\.ple\.key_proj\.weight"),
    ],
)
def test_a_tensor_that_is_not_what_the_config_says_is_refused_by_name(copy: Path, change: Any, message: str) -> None:
    spoil(copy, change)
    with pytest.raises(ConfigError, match=message):
        qwen4_exp.read_memory(copy)


def reconfigure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama': allowed is qwen4_exp"),
        ({"ple_layer_ids": []}, "ple_layer_ids is "),
        ({"ple_layer_ids": "2"}, "ple_layer_ids is '2': allowed is the 1-based numbers"),
        ({"split_ngram_parts": -1}, "split_ngram_parts is -1: allowed is a whole number of 0 or more"),
        ({"eos_token_id": None}, "eos_token_id is None: allowed is an id"),
        ({"ple_layer_ids": [2, 4]}, r"lacks the tensor layers\.3\.ple\.key_proj\.weight"),
        ({"ngram_vocab_size_base": 60}, "ngram_heads_vocab_sizes is "),
        ({"seed": 7}, "layer_multipliers is "),
        ({"split_ngram_parts": 4}, "shard_0.weight: shape is "),
        ({"heads_per_ngram": 5}, "ple_embed_dim is 64: allowed is a multiple of the number of hash heads, 10"),
        ({"seed": "x"}, "seed is 'x': allowed is a whole number"),
        ({"eos_token_id": []}, "config.json' can't be read: IndexError"),
        ({"eos_token_id": True}, "eos_token_id is True: allowed is an id"),
        ({"ngram_vocab_size_base": 2**60}, r"rows of the table of block 1 is \d+: allowed is \d+ or more"),
        ({"make_ngram_vocab_size_divisible_by": 2**60, "split_ngram_parts": 0}, r"shard_0\.weight: shape is "),
        ({"split_ngram_parts": 2**60}, r"shard_0\.weight: shape is "),
        ({"hidden_size": 2**30}, r"key_proj\.weight: shape is "),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_name(copy: Path, changes: dict, message: str) -> None:
    reconfigure(copy, **changes)
    with pytest.raises(ConfigError, match=message):
        qwen4_exp.read_memory(copy)


def test_a_truncated_file_is_refused_by_name(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ConfigError, match=r"model\.safetensors' can't be read as safetensors"):
        qwen4_exp.read_memory(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({"model.layers.1.ple.key_proj.weight": torch.zeros(60, 64)}),
            r"key_proj\.weight: shape is",
        ),
        (lambda t: t.update({"model.layers.2.ple.conv1d.weight": torch.zeros(64, 1, 3)}), r"conv1d\.weight: shape is"),
        (lambda t: t.update({"model.layers.2.ple.norm_key.weight": torch.zeros(8)}), r"norm_key\.weight: shape is"),
        (lambda t: t[TABLE.replace("ngram_embedding.", "layer_multipliers")].add_(2), "layer_multipliers is "),
    ],
)
def test_nothing_is_written_into_a_checkpoint_that_would_not_be_read(
    single: Path, copy: Path, tmp_path_factory: Any, change: Any, message: str
) -> None:
    """Values that are written into a tensor of another shape would be written over the tensors behind it."""
    memories, out = qwen4_exp.read_memory(single), tmp_path_factory.mktemp("out") / "x"
    spoil(copy, change)
    with pytest.raises(ConfigError, match=message):
        qwen4_exp.write_memory(memories, copy, out)
    assert not out.exists()


def test_a_checkpoint_that_cannot_be_copied_is_named(copy: Path, tmp_path_factory: Any) -> None:
    (copy / "gone").symlink_to(copy / "nowhere")
    out = tmp_path_factory.mktemp("out") / "x"
    with pytest.raises(ConfigError, match="gone' can't be copied to"):
        qwen4_exp.write_memory({}, copy, out)
    assert list(out.parent.iterdir()) == []


def test_memories_of_another_config_are_not_written(single: Path, tmp_path: Path) -> None:
    memories = qwen4_exp.read_memory(single)
    other = Engram(replace(memories[1].config, seed=9), 1)
    with pytest.raises(ConfigError, match="seed of block 1 is 9: allowed is 1234"):
        qwen4_exp.write_memory({1: other}, single, tmp_path / "x")
    with pytest.raises(ConfigError, match="layer of the memory for block 2 is 1"):
        qwen4_exp.write_memory({2: memories[1]}, single, tmp_path / "x")
    with pytest.raises(ConfigError, match="allowed is another than the checkpoint's own"):
        qwen4_exp.write_memory(memories, single, single)
    assert not (tmp_path / "x").exists()


def test_a_memory_of_another_shape_is_not_put_into_a_model(model: Any, single: Path) -> None:
    memories = qwen4_exp.read_memory(single)
    with pytest.raises(ConfigError, match=r"block of a memory is 3: allowed is one of the model's \[1, 2\]"):
        use_memory(model, {3: memories[1]})
    other = qwen_model(hc_count=3)
    with pytest.raises(ConfigError, match=r"branches of the memory for block 1 is \(32, 2\): allowed is \(32, 3\)"):
        use_memory(other, memories)


def test_loading_holds_no_second_copy_of_the_table(tmp_path: Path) -> None:
    """A table of 80 MB in 8 parts, read in a process of its own."""
    base, width = 156_250, 8 * 16
    config = qwen_config(ple_layer_ids=[2], ngram_vocab_size_base=base, ple_embed_dim=width, split_ngram_parts=8)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    rows = -(-sum(next_primes(base, 8)) // 128) * 128
    prefix = "model.layers.1.ple."
    tensors = {f"{prefix}ple_embedding.ngram_embedding.shard_{i}.weight": torch.zeros(rows // 8, 16) for i in range(8)}
    tensors |= {
        prefix + "key_proj.weight": torch.zeros(64, width),
        prefix + "value_proj.weight": torch.zeros(32, width),
    }
    tensors |= {prefix + f"norm_{name}.weight": torch.zeros(64) for name in ("key", "query", "conv")}
    save_file({**tensors, prefix + "conv1d.weight": torch.zeros(64, 1, 4)}, tmp_path / "model.safetensors")
    code = (
        "import sys; from engram.interop import qwen4_exp\n"
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) * 1024\n"
        "before = peak(); layers = qwen4_exp.read_memory(sys.argv[1])\n"
        "print(layers[1].table.weight.nbytes, peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    table, grown = map(int, done.stdout.split())
    assert table > 75e6
    assert 0.9 * table < grown < 1.4 * table

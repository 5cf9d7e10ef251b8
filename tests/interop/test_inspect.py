"""What `inspect` tells of a checkpoint is what the loaded model holds, and is told from headers alone."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from released import EOS, V41, primes_from, qwen_model, save_v41, v41_tensors
from safetensors.torch import load_file, save_file

from engram import ConfigError, EngramLM, ModelConfig, ParameterBudget
from engram.cli import main
from engram.interop.inspect import inspect
from engram.memory.primes import next_primes
from engram.parallel.checkpoint import CheckpointWriter
from engram.training.weights import save_checkpoints_model, save_model

MODEL = {
    "vocab_size": 300,
    "d_model": 32,
    "n_layers": 3,
    "dense_width": 48,
    "attention": {"kind": "gqa", "n_heads": 2, "n_kv_heads": 1, "head_dim": 16},
    "experts": {"n_experts": 6, "top_k": 2, "width": 16},
    "memory": {"layers": [0, 2], "n_heads": 2, "row_width": 8, "rows": [97, 131]},
}


def built(**memory: Any) -> EngramLM:
    return EngramLM(ModelConfig.from_dict({**MODEL, "memory": {**MODEL["memory"], **memory}}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_our_models_and_checkpoints_are_told_as_the_budget_counts_them(tmp_path: Path, dtype: str) -> None:
    model = built(table_dtype=dtype)
    save_model(model, tmp_path / "model")
    run = {"model_config": model.config.to_dict(), "token_lookup": None, "tokenizer_json": None}
    CheckpointWriter().save(tmp_path / "step", model, [], run)
    budget = ParameterBudget.of(model.config)
    reports = [inspect(tmp_path / name) for name in ("model", "step")]
    for report in reports:
        assert (report.total, report.active, report.sparse) == (budget.total, budget.active, budget.sparse)
        assert report.rho == budget.rho
        assert 0 < report.rho < 1
        for table, layer in zip(report.tables, (0, 2), strict=True):
            weight = model.memory[str(layer)].table.weight
            assert (table.layer, table.rows, table.width, table.heads) == (layer, *weight.shape, 4)
            assert (table.row_type, table.bytes) == (dtype, weight.nbytes)
    assert replace(reports[1], path=reports[0].path, kind=reports[0].kind) == reports[0]
    assert [report.kind for report in reports] == ["engram model", "engram checkpoint"]


def test_a_model_that_transformers_saved_is_told_as_ours(tmp_path: Path) -> None:
    from engram.interop.causal_lm import EngramConfig, EngramForCausalLM

    config = built().config
    EngramForCausalLM(EngramConfig.of(config)).save_pretrained(tmp_path / "theirs")
    theirs, ours = inspect(tmp_path / "theirs"), inspect(save_model(EngramLM(config), tmp_path / "ours"))
    assert (theirs.tables, theirs.parts, theirs.rho) == (ours.tables, ours.parts, ours.rho)


@pytest.mark.parametrize(
    ("kind", "layers"), [("over_encoding", [None]), ("additive_bigram", [0]), ("capacity_one", [0, 2])]
)
def test_other_kinds_of_memory_have_the_tables_that_are_built(tmp_path: Path, kind: str, layers: list) -> None:
    changes = {"n_heads": 1, "row_width": 16} if kind == "additive_bigram" else {}
    model = built(kind=kind, **changes)
    tables = inspect(save_model(model, tmp_path)).tables
    assert [table.layer for table in tables] == layers
    held = sum(p.numel() for name, p in model.named_parameters() if name.endswith("table.weight"))
    assert sum(table.rows * table.width for table in tables) == held


def test_a_model_without_memory_has_no_table_and_rho_1(tmp_path: Path) -> None:
    report = inspect(save_model(built(rows=[0, 0]), tmp_path))
    assert (report.tables, report.rho) == ((), 1.0)
    assert "no memory table" in report.text()


def test_qwen4_exp_is_told_as_transformers_model_counts(tmp_path: Path) -> None:
    model: Any = qwen_model(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    report = inspect(tmp_path)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    held = {name: size for name, size in sizes.items() if "embed_tokens" not in name and "lm_head" not in name}
    experts = sum(size for name, size in sizes.items() if ".mlp.experts." in name)
    memories = [model.model.layers[i].ple.ple_embedding for i in (1, 2)]
    tables = [memory.ngram_embedding.weight for memory in memories]
    assert report.total == sum(held.values())
    idle = experts * 4 // 6 + sum(table.numel() - 8 * 8 for table in tables)
    assert report.active == report.total - idle
    assert report.rho == experts * 4 // 6 / idle
    for told, memory, table in zip(report.tables, memories, tables, strict=True):
        assert (told.rows, told.width, told.bytes, told.tensors) == (len(table), 8, table.nbytes, 8)
        assert told.unread_rows == len(table) - memory.total_vocab_size
    assert report.bytes == sum(t.nbytes for path in tmp_path.glob("*.safetensors") for t in load_file(path).values())


def test_deepseek_v41_is_told_with_four_bit_experts_and_eight_bit_tables(tmp_path: Path) -> None:
    tensors, d = v41_tensors(), V41["hidden_size"]
    expert = 3 * d * 32
    for block in range(2):
        for j in range(5):
            for name, rows, columns in (("w1", 32, d), ("w3", 32, d), ("w2", d, 32)):
                key = f"layers.{block}.ffn.experts.{j}.{name}."
                tensors[key + "weight"] = torch.zeros(rows, columns // 2, dtype=torch.int8)
                tensors[key + "scale"] = torch.ones(rows, -(-columns // 32)).to(torch.float8_e8m0fnu)
        tensors[f"layers.{block}.ffn.gate.weight"] = torch.zeros(5, d)
        tensors[f"layers.{block}.hc_attn_scale"] = torch.zeros(3)
    tensors["mtp.0.ffn.experts.0.w1.weight"] = torch.zeros(7, 7)
    for name, size in (("vision.blocks.0.weight", 9), ("aligner.w", 5), ("image_newline", 3), ("mystery.weight", 8)):
        tensors[name] = torch.zeros(size)
    report = inspect(save_v41(tmp_path, tensors))
    primes = primes_from(V41["engram_vocab_size"], 12)
    rows = [sum(primes[:6]), sum(primes[6:])]
    fusion = 2 * ((3 + 1) * d * 6 * 64 + 2 * 3 * d)
    always = fusion + 2 * (5 * d + 3) + 8
    assert report.total == always + 2 * 5 * expert + sum(rows) * 64
    assert report.active == always + 2 * 2 * expert + 2 * 6 * 64
    assert [(t.rows, t.bytes) for t in report.tables] == [(n, n * (64 + 2)) for n in rows]
    assert report.tables[0].row_type == "float8_e4m3fn with a float8_e8m0fnu scale for each 32"
    assert [report.parts[part].total for part in ("draft", "vision", "other")] == [49, 9 + 5 + 3, 8]


def test_a_sparse_file_with_a_20_gb_table_is_told_from_its_header(tmp_path: Path) -> None:
    """In a process of its own that has inspected a small model before: time and memory are those of headers alone."""
    base, width, parts = 3_950_000, 160, 512
    rows = -(-sum(next_primes(base, 16)) // 128) * 128
    size = -(-rows // parts)
    shapes = {
        f"ple_embedding.ngram_embedding.shard_{i}.weight": [min(size, rows - i * size), width] for i in range(parts)
    }
    shapes["key_proj.weight"] = [128, 2560]
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * shape[0] * shape[1]
        header[f"model.layers.1.ple.{name}"] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    assert end > 20e9
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    settings = {"ple_layer_ids": [2], "ple_embed_dim": 2560, "ngram_vocab_size_base": base, "eos_token_id": EOS}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen4_exp_text", **settings}))
    small = save_v41(tmp_path / "small", v41_tensors())
    code = (
        "import sys, time; from engram.interop.inspect import inspect\n"
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) * 1024\n"
        "inspect(sys.argv[1]); before, began = peak(), time.perf_counter(); table, = inspect(sys.argv[2]).tables\n"
        "print(table.rows, table.bytes, table.tensors, time.perf_counter() - began, peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, small, tmp_path], capture_output=True, text=True, check=True)
    found = done.stdout.split()
    assert list(map(int, found[:3])) == [rows, end - 2 * 128 * 2560, parts]
    assert float(found[3]) < 1
    assert int(found[4]) < 8e6


def test_a_checkpoint_whose_table_has_other_rows_than_its_config_is_refused(tmp_path: Path) -> None:
    save_model(built(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["memory"]["rows"][1] += 40
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ConfigError, match=r"tensor memory\.0\.table\.weight: shape is \(\d+, 8\): allowed is \(\d+, 8\)"
    ):
        inspect(tmp_path)


def test_anything_else_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"path is .*none': allowed is the folder"):
        inspect(tmp_path / "none")
    with pytest.raises(ConfigError, match="no model's folder, no run's, and no checkpoint's"):
        inspect(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match=r"config.json': model_type is 'llama': allowed is qwen4_exp, deepseek_v41"):
        inspect(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.json' can't be read"):
        inspect(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen4_exp", "eos_token_id": 1}))
    with pytest.raises(ConfigError, match=r"allowed is a folder with model.safetensors or"):
        inspect(tmp_path)


def test_the_command_prints_a_table_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(built(), tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "table of block 0: 466 rows of 8 x float32 for 4 hash heads, 14.9 kB in 1 tensor\n" in text
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    budget = ParameterBudget.of(built().config)
    assert (data["total"], data["active"], data["rho"]) == (budget.total, budget.active, budget.rho)
    assert data["parts"]["memory_tables"]["total"] == budget.memory_parameters
    assert f"P_tot {budget.total:,}  P_act {budget.active:,}" in text
    assert main(["inspect", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("error: path is ")


def test_a_consolidated_checkpoint_is_told_as_the_checkpoint(tmp_path: Path) -> None:
    model = built()
    run = {"model_config": model.config.to_dict(), "token_lookup": None, "tokenizer_json": None}
    CheckpointWriter().save(tmp_path / "step", model, [torch.optim.AdamW(model.parameters())], run)
    save_checkpoints_model(tmp_path / "step", tmp_path / "model")
    step, consolidated = inspect(tmp_path / "step"), inspect(tmp_path / "model")
    assert replace(step, path="", kind="") == replace(consolidated, path="", kind="")


def test_a_run_is_told_as_its_model_or_last_checkpoint(tmp_path: Path) -> None:
    model = built()
    run = {"model_config": model.config.to_dict(), "token_lookup": None, "tokenizer_json": None}
    CheckpointWriter().save(tmp_path / "checkpoints" / "step-00000007", model, [], run)
    assert inspect(tmp_path) == inspect(tmp_path / "checkpoints" / "step-00000007")
    save_model(model, tmp_path / "model")
    assert inspect(tmp_path) == inspect(tmp_path / "model")


def test_files_are_not_read_beyond_their_headers(tmp_path: Path) -> None:
    """The same report when every weight is a NaN."""
    save_model(built(), tmp_path)
    before = inspect(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {k: torch.full_like(t, float("nan")) if t.is_floating_point() else t for k, t in tensors.items()},
        tmp_path / "model.safetensors",
    )
    assert inspect(tmp_path) == before

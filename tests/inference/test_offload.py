"""Models whose tables lie elsewhere give what they gave before: whole windows, packed documents, step by step."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engram.backbone import EngramLM
from engram.config import ConfigError, GQAConfig, MemoryConfig, ModelConfig
from engram.inference import generate, offload, offload_from, offloaded_tables, read_stats, warm_caches
from engram.memory import DiskTable, Engram, HostTable
from engram.memory.row_formats import RowKind
from engram.tensor_files import read_header
from engram.training.weights import load_model, save_model

MEMORY = MemoryConfig(rows=(500, 700), n_heads=2, row_width=8, layers=(1, 2), table_dtype="bfloat16")
CONFIG = ModelConfig(
    vocab_size=97,
    d_model=16,
    n_layers=3,
    dense_width=32,
    n_dense_layers=3,
    attention=GQAConfig(n_heads=2, n_kv_heads=1, head_dim=8),
    memory=MEMORY,
)


def model_of(config: ModelConfig = CONFIG) -> EngramLM:
    """A model whose convolutions are not zero, as they are before training."""
    model = EngramLM(config).eval()
    for name, parameter in model.named_parameters():
        if "conv_weight" in name or "table" in name:
            nn.init.normal_(parameter)
    return model


def ids_of(*shape: int) -> Tensor:
    return torch.randint(0, 97, shape)


def move(model: nn.Module, place: str, folder: Path, cache_rows: int = 0, rows: RowKind = "float") -> None:
    offload(model, place, folder=folder if place == "disk" else None, cache_rows=cache_rows, rows=rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("place", ["host", "disk"])
@pytest.mark.parametrize("cache_rows", [0, 50])
@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("kind", ["engram", "over_encoding", "additive_bigram", "shuffled"])
def test_logits_are_those_of_the_model(place: str, cache_rows: int, prefetch: bool, kind: str, tmp_path: Path) -> None:
    memory = dataclasses.replace(MEMORY, kind=kind)
    if kind == "additive_bigram":
        memory = dataclasses.replace(memory, rows=(500,), orders=(2,), n_heads=1, row_width=16, layers=(0,))
    model = model_of(dataclasses.replace(CONFIG, memory=memory))
    ids = ids_of(2, 40)
    documents = (torch.arange(40) // 15).expand(2, -1)
    with torch.no_grad():
        expected = [model(ids), model(ids, documents), model(ids[:, :1])]
        move(model, place, tmp_path, cache_rows)
        for table in offloaded_tables(model).values():
            table.prefetch = prefetch
        if cache_rows:
            warm_caches(model, ids)
        for _ in range(2):
            got = [model(ids), model(ids, documents), model(ids[:, :1])]
            assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert (read_stats(model).hits > 0) == (cache_rows > 0)


@pytest.mark.parametrize("place", ["host", "disk"])
@pytest.mark.parametrize("cache_rows", [0, 50])
def test_steps_give_what_the_whole_gives_and_can_be_taken_back(place: str, cache_rows: int, tmp_path: Path) -> None:
    config = dataclasses.replace(MEMORY, d_model=16, vocab_size=97, branches=2)
    memory = Engram(config).double()
    nn.init.normal_(memory.table.weight)
    assert memory.fusion.conv_weight is not None
    nn.init.normal_(memory.fusion.conv_weight)
    ids, hidden = ids_of(2, 12), torch.randn(2, 12, 2, 16, dtype=torch.float64)
    model = nn.ModuleList([memory])
    with torch.no_grad():
        whole = memory(hidden, ids)
        state = memory.init_state(2)
        _, after_four = memory.step(hidden[:, :4], ids[:, :4], state)
        move(model, place, tmp_path, cache_rows)
        updates = []
        for t in range(12):
            if t == 7:  # a token that is rejected
                memory.step(torch.randn_like(hidden[:, :1]), ids_of(2, 1), state)
            update, state = memory.step(hidden[:, t : t + 1], ids[:, t : t + 1], state)
            updates.append(update)
        torch.testing.assert_close(torch.cat(updates, 1), whole)
        chunk, _ = memory.step(hidden[:, 4:], ids[:, 4:], after_four)  # from a state made before the move
        torch.testing.assert_close(chunk, whole[:, 4:])


@pytest.mark.parametrize("place", ["host", "disk"])
@pytest.mark.parametrize("cache_rows", [0, 50])
def test_texts_are_continued_as_by_the_model(place: str, cache_rows: int, tmp_path: Path) -> None:
    model = model_of()
    nn.init.normal_(model.head_weight)  # logits far apart, so that rounding does not choose the likeliest
    prompts = [[3], [7, 0, 0, 12, 4], [0, 9]]
    expected = generate(model, prompts, 30)
    move(model, place, tmp_path, cache_rows)
    assert generate(model, prompts, 30) == expected
    state, following = model.init_state(1, 10, slack=3), ids_of(1, 10)
    first = model.step(following[:, :5], state).hidden
    model.step(ids_of(1, 3), state)
    state.rollback(3)
    whole = model.step(following, model.init_state(1, 10)).hidden
    torch.testing.assert_close(torch.cat([first, model.step(following[:, 5:], state).hidden], 1), whole)


def test_a_compiled_layer_reads_the_same_rows(tmp_path: Path) -> None:
    """In one graph, without a break."""
    memory = Engram(dataclasses.replace(MEMORY, d_model=16, vocab_size=97, branches=1))
    ids, hidden = ids_of(1, 8), torch.randn(1, 8, 16)
    with torch.no_grad():
        expected = memory(hidden, ids)
        move(nn.ModuleList([memory]), "disk", tmp_path, 20)
        assert isinstance(memory.table, DiskTable)
        torch.testing.assert_close(torch.compile(memory, backend="aot_eager", fullgraph=True)(hidden, ids), expected)


@pytest.mark.parametrize("kind", ["int8", "fp8", "fp8_block32"])
def test_quantized_rows_change_logits_a_little(kind: RowKind, tmp_path: Path) -> None:
    model, ids = model_of(), ids_of(2, 40)
    with torch.no_grad():
        expected = model(ids)
        move(model, "disk", tmp_path, rows=kind)
        difference = (model(ids) - expected).norm() / expected.norm()
    assert 1e-4 < difference < 0.1


def test_memory_in_a_users_own_module_is_found() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleDict(
                {"recall": Engram(dataclasses.replace(MEMORY, d_model=16, vocab_size=97, branches=1))}
            )

    model = Own()
    assert list(offload(model, "host", cache_rows=7)) == ["inner.recall.table"]
    assert isinstance(model.inner["recall"].table, HostTable)
    assert list(offloaded_tables(model)) == ["inner.recall.table"]
    with pytest.raises(ConfigError, match="Linear"):
        offload(nn.Linear(2, 2), "host")


def test_places_and_folders_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    model = model_of()
    for place, folder in (("attic", None), ("disk", None), ("host", tmp_path)):
        with pytest.raises(ConfigError, match=r"place|folder"):
            offload(model, place, folder=folder)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="cache_rows"):
        offload(model, "host", cache_rows=-1)
    assert not offloaded_tables(model)


def test_training_says_that_rows_are_read_only() -> None:
    model = model_of().train()
    offload(model, "host")
    with pytest.raises(ConfigError, match="read-only"):
        model(ids_of(1, 5))
    for table in offloaded_tables(model).values():
        table.requires_grad_(False)
    model(ids_of(1, 5)).sum().backward()
    assert model.embed.weight.grad is not None


# Saved models.


def test_a_saved_models_tables_are_served_from_its_file(tmp_path: Path) -> None:
    model, ids = model_of(), ids_of(2, 30)
    save_model(model, tmp_path / "model")
    served = load_model(tmp_path / "model").eval()
    tables = offload_from(served, tmp_path / "model", cache_rows=20)
    assert list(tables) == ["memory.1.table", "memory.2.table"]
    assert all(isinstance(table, DiskTable) for table in tables.values())
    with torch.no_grad():
        assert torch.equal(served(ids), model(ids))
    # Saved again, it is the model that it was.
    save_model(served, tmp_path / "again")
    saved, again = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "again"))
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[name], again[name]) for name in saved)


def test_tables_that_were_never_made_are_served_all_the_same(tmp_path: Path) -> None:
    model, ids = model_of(), ids_of(2, 30)
    save_model(model, tmp_path / "model")
    with torch.device("meta"):
        served = EngramLM(CONFIG).eval()
    offload_from(served, tmp_path / "model")
    served.to_empty(device="cpu")
    for name, module in served.named_modules():  # what no state dict holds
        for key, buffer in module.named_buffers(recurse=False):
            buffer.copy_(model.get_submodule(name).get_buffer(key))
    for name, parameter in served.named_parameters():
        parameter.data.copy_(model.get_parameter(name))
    with torch.no_grad():
        assert torch.equal(served(ids), model(ids))


def test_tables_of_another_model_are_refused(tmp_path: Path) -> None:
    save_model(model_of(), tmp_path / "model")
    other = model_of(dataclasses.replace(CONFIG, memory=dataclasses.replace(MEMORY, rows=(500, 900))))
    with pytest.raises(ConfigError, match=r"memory\.1\.table\.weight"):
        offload_from(other, tmp_path / "model")
    elsewhere = model_of(dataclasses.replace(CONFIG, memory=dataclasses.replace(MEMORY, layers=(0,))))
    with pytest.raises(ConfigError, match=r"memory\.0\.table\.weight"):
        offload_from(elsewhere, tmp_path / "model")
    with pytest.raises(ConfigError, match="nowhere"):
        offload_from(other, tmp_path / "nowhere")
    assert not offloaded_tables(other)


@pytest.mark.parametrize(
    ("changes", "lookup", "said"),
    [
        ({"seed": 5}, True, "memory.seed is 5: the weights were trained with 0"),
        ({"hash": "qwen", "compress": False}, False, "memory.hash is 'qwen': the weights were trained with 'deepseek'"),
        ({"eos_id": 3}, True, "memory.eos_id is 3: the weights were trained with 0"),
        ({}, False, "token compression has none: the weights were trained with sha256"),
    ],
    ids=str,
)
def test_tables_that_a_memory_would_read_otherwise_are_refused(
    changes: dict[str, Any], lookup: bool, said: str, tmp_path: Path
) -> None:
    """In a model, and in a memory of a user's own module. What is done with rows is another thing."""
    compression = torch.arange(97) // 2
    save_model(EngramLM(CONFIG, compression), tmp_path)
    config = dataclasses.replace(CONFIG, memory=dataclasses.replace(MEMORY, **changes))
    own = nn.Module()
    for model in (EngramLM(config, compression if lookup else None), own):
        if model is own:
            memory = dataclasses.replace(config.memory, d_model=16, vocab_size=97, branches=1)
            model.memory = nn.ModuleDict({"1": Engram(memory, 1, compression if lookup else None)})
        model.load_state_dict(
            {name: x for name, x in load_file(tmp_path / "model.safetensors").items() if "table" in name}, strict=False
        )
        with pytest.raises(ConfigError, match=said):
            offload_from(model, tmp_path)
        assert not offloaded_tables(model)
    beyond = dataclasses.replace(MEMORY, gate="plain", conv_kernel=2)
    deeper = dataclasses.replace(CONFIG, n_layers=4, n_dense_layers=4, memory=beyond)
    assert len(offload_from(EngramLM(deeper, compression), tmp_path)) == 2


def test_damaged_tables_are_not_served_large_ones_if_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    path = save_model(model, tmp_path) / "model.safetensors"
    whole, end = path.read_bytes(), read_header(path).entries["memory.2.table.weight"].end
    path.write_bytes(whole[: end - 1] + bytes([whole[end - 1] ^ 1]) + whole[end:])
    damaged = r"memory\.2\.table\.weight is damaged"
    with pytest.raises(ConfigError, match=damaged):
        offload_from(model, tmp_path)
    monkeypatch.setattr(sys.modules["engram.inference.offload"], "CHECKED_BYTES", 1000)
    with pytest.raises(ConfigError, match=damaged):
        offload_from(model, tmp_path, verify=True)
    assert not offloaded_tables(model)
    assert len(offload_from(model, tmp_path)) == 2
    path.write_bytes(whole.replace(b'"BF16"', b'"F16"', 1))
    with pytest.raises(ConfigError):
        offload_from(model_of(), tmp_path)


def test_tables_of_a_file_that_tells_nothing_are_served_with_a_warning(tmp_path: Path) -> None:
    model, ids = model_of(), ids_of(2, 30)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with torch.no_grad():
        expected = model(ids)
        with (
            pytest.warns(UserWarning, match=r"no checksums\.json"),
            pytest.warns(UserWarning, match="what they were trained with is not told"),
        ):
            offload_from(model, tmp_path)
        assert torch.equal(model(ids), expected)
    with pytest.raises(ConfigError, match=r"verify is True: allowed is False for a folder without checksums\.json"):
        offload_from(model_of(), tmp_path, verify=True)

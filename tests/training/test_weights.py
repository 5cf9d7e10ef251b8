"""Trained models on disk: what is saved is what is loaded, and what cannot be loaded is named."""

import errno
import json
import resource
from functools import partial
from pathlib import Path

import pytest
import torch
from small_run import LOOKUP, bpe, built

from engram.config import ConfigError
from engram.inference import offload, offload_from
from engram.inference.offload import quantize
from engram.memory.row_formats import RowKind
from engram.training.weights import load_model, save_model


@pytest.mark.parametrize(
    "changes", [{}, {"memory": None}, {"tied": True, "branches": 2}, {"memory.table_dtype": "bfloat16"}]
)
def test_a_loaded_model_says_what_the_saved_one_said(tmp_path: Path, changes: dict[str, object]) -> None:
    model = built(**changes)
    ids = torch.randint(0, 300, (2, 16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
        loaded = load_model(save_model(model, tmp_path / "m", LOOKUP)).eval()
        assert torch.equal(loaded(ids), model(ids))
    assert loaded.config == model.config
    assert [p.dtype for p in loaded.parameters()] == [p.dtype for p in model.parameters()]


def test_loading_leaves_the_callers_random_numbers_alone(tmp_path: Path) -> None:
    save_model(built(), tmp_path, LOOKUP)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    load_model(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_another_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    own = bpe("some text")
    save_model(built(), tmp_path, LOOKUP, own)
    load_model(tmp_path, own)
    load_model(tmp_path)
    with pytest.raises(
        ConfigError, match=r"the tokenizer given has sha256 \w+: the weights were trained with sha256 \w+"
    ):
        load_model(tmp_path, bpe("quite another text"))


def test_a_folder_that_holds_no_model_is_named(tmp_path: Path) -> None:
    save_model(built(), tmp_path / "m", LOOKUP)
    config = tmp_path / "m" / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"colour": "red"}))
    with pytest.raises(ConfigError, match=r"m' cannot be loaded: config.json: unknown setting colour"):
        load_model(tmp_path / "m")
    with pytest.raises(ConfigError, match=r"nowhere' cannot be loaded: .*No such file"):
        load_model(tmp_path / "nowhere")


def test_a_full_disk_leaves_the_old_model_and_nothing_half_written(tmp_path: Path) -> None:
    save_model(built(), tmp_path, LOOKUP)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(ConfigError, match=r"cannot write '.*model\.safetensors': "):
            save_model(built(), tmp_path, LOOKUP)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_disk_that_fills_at_the_last_file_leaves_the_old_model_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "m"
    save_model(built(), folder, LOOKUP, bpe("old"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write_text = Path.write_text

    def full(path: Path, *args: object, **options: object) -> int:
        if path.name == "tokenizer.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_text(path, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "write_text", full)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(ConfigError) as caught:
            save_model(built(d_model=64), target, LOOKUP, bpe("new"))
        assert str(caught.value) == f"cannot write '{target / 'tokenizer.json'}': No space left on device"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


def test_a_swap_that_fails_brings_the_old_model_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "m"
    save_model(built(), folder, LOOKUP)
    before = (folder / "model.safetensors").read_bytes()
    rename = Path.rename

    def refused(path: Path, target: Path) -> Path:
        if path.name == "draft":
            raise OSError(errno.EACCES, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(ConfigError, match=r"cannot write '.*m': Permission denied"):
        save_model(built(), folder, LOOKUP)
    assert (folder / "model.safetensors").read_bytes() == before
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("rows", ["int8", "fp8", "fp8_block32"])
def test_a_quantized_model_does_not_replace_the_one_it_was_made_of(tmp_path: Path, rows: RowKind) -> None:
    save_model(built(), tmp_path, LOOKUP)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for change in (partial(offload, place="host", rows=rows), partial(quantize, rows=rows)):
        model = load_model(tmp_path)
        change(model)
        with pytest.raises(ConfigError, match=rf"rows of memory\.1\.table is '{rows}': allowed is float"):
            save_model(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_model_with_offloaded_float_rows_is_saved_as_it_is(tmp_path: Path) -> None:
    model = built()
    save_model(model, tmp_path, LOOKUP)
    offload_from(loaded := load_model(tmp_path), tmp_path)
    again = load_model(save_model(loaded, tmp_path))  # over the very file in which its table lies
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


def test_a_new_model_replaces_the_old_one_and_leaves_other_files_alone(tmp_path: Path) -> None:
    folder, link = tmp_path / "m", tmp_path / "link"
    save_model(built(), folder, LOOKUP, bpe("old"))
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("kept")
    link.symlink_to(folder)
    save_model(built(d_model=64), link, LOOKUP)
    assert load_model(folder).config.d_model == 64
    assert (folder / "notes" / "a.txt").read_text() == "kept"
    assert not (folder / "tokenizer.json").exists()  # it was the old model's
    assert sorted(tmp_path.iterdir()) == [link, folder]

"""Tensors of a checkpoint's folder by name: what is read is what safetensors wrote, and what can't be is named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engram import ConfigError
from engram.interop.checkpoint_files import TensorFiles

TENSORS = {
    "a": torch.arange(12, dtype=torch.int64).view(4, 3),
    "b": torch.randn(7, 2, 3).bfloat16(),
    "c": torch.tensor(2.5),
    "d": torch.randint(0, 255, (9, 4), dtype=torch.uint8).view(torch.float8_e4m3fn),
    "e": torch.empty(0, 5),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {"one.safetensors": ("a", "b"), "two.safetensors": ("c", "d", "e")}
    for file, names in files.items():
        save_file({name: TENSORS[name] for name in names}, tmp_path / file)
    weight_map = {name: file for file, names in files.items() for name in names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tolist() == b.tolist()


def test_every_tensor_is_read_whole_and_in_rows(folder: Path) -> None:
    files = TensorFiles(folder)
    assert sorted(files) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert same(torch.nan_to_num(files.read(name).float()), torch.nan_to_num(tensor.float()))
        assert files.read(name).dtype == tensor.dtype
        if tensor.ndim:
            for rows in (0, 1, 2, 100):
                chunks = list(files.chunks(name, rows))
                assert sum(len(chunk) for _, chunk in chunks) == len(tensor)
                for first, chunk in chunks:
                    assert (
                        chunk.view(torch.uint8).tolist()
                        == tensor[first : first + len(chunk)].view(torch.uint8).tolist()
                    )
    part = torch.empty(2, 3, dtype=torch.int64)
    files.read_into("a", part, 1)
    assert same(part, TENSORS["a"][1:3])


def test_a_files_header_is_read_when_one_of_its_tensors_is_asked_for(folder: Path) -> None:
    (folder / "two.safetensors").unlink()
    files = TensorFiles(folder)
    assert same(files.read("a"), TENSORS["a"])
    with pytest.raises(ConfigError, match=r"two\.safetensors' can't be read as safetensors"):
        files.read("c")


def test_a_tensor_that_the_index_alone_knows_is_named(folder: Path) -> None:
    save_file({"a": TENSORS["a"]}, folder / "one.safetensors")
    with pytest.raises(ConfigError, match=r"one\.safetensors' lacks the tensor b, which model"):
        TensorFiles(folder).read("b")
    with pytest.raises(ConfigError, match=r"index\.json' lacks the tensor z"):
        TensorFiles(folder).read("z")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 10**5])
def test_a_broken_index_is_named(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ConfigError, match=r"index\.json"):
        TensorFiles(folder)


def test_an_index_leads_to_no_other_folder(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../one.safetensors"}}')
    with pytest.raises(ConfigError, match="names of files in the same folder"):
        TensorFiles(folder)


@pytest.mark.parametrize("name", ["..", "", "a\0b", "\ud800", "x" * 5000])
def test_a_name_in_the_index_that_is_no_files_is_refused(folder: Path, name: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ConfigError, match="can't be read as safetensors"):
        TensorFiles(folder).read("a")


def test_pickled_weights_are_not_opened(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"allowed is a folder with model\.safetensors or"):
        TensorFiles(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data_offsets", [0.0, 48]),
        ("data_offsets", ["0", 48]),
        ("data_offsets", [0, float("inf")]),
        ("data_offsets", [0, 10**400]),
        ("data_offsets", [False, 48]),
        ("data_offsets", [0]),
        ("data_offsets", [0, 40]),
        ("data_offsets", [-8, 48]),
        ("data_offsets", [48, 96]),
        ("shape", [4.0, 3]),
        ("shape", [-4, -3]),
        ("shape", [2**64, 3]),
        ("shape", [2**62, 0]),
        ("shape", 12),
        ("dtype", "F4"),
        ("dtype", []),
    ],
)
def test_a_header_that_says_what_cannot_be_is_refused(tmp_path: Path, key: str, value: object) -> None:
    path = tmp_path / "model.safetensors"
    described = {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 48]}

    def write(described: dict) -> None:
        text = json.dumps({"a": described}).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 48)

    write(described)
    assert TensorFiles(tmp_path).read("a").shape == (4, 3)
    write({**described, key: value})
    with pytest.raises(ConfigError, match=r"model\.safetensors' can't be read as safetensors: .* is damaged"):
        TensorFiles(tmp_path)


@pytest.mark.parametrize("spoil", ["deep", "short", "long header", "no header", "empty"])
def test_a_spoiled_file_is_named(tmp_path: Path, spoil: str) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    whole = path.read_bytes()
    spoiled = {
        "deep": (10**5).to_bytes(8, "little") + b"[" * 10**5,
        "short": whole[:-3],
        "long header": (2**40).to_bytes(8, "little") + whole[8:],
        "no header": whole[:8] + b"x" * (len(whole) - 8),
        "empty": b"",
    }
    path.write_bytes(spoiled[spoil])
    with pytest.raises(ConfigError, match=r"model\.safetensors' can't be read as safetensors"):
        TensorFiles(tmp_path)

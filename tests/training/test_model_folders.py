"""Folders of models from anywhere: damage is found and named, weights meet what they were trained with, nothing that
they hold is executed."""

import json
import pickle
import random
import resource
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_run import LOOKUP, MODEL, bpe, built, merge

from engram.backbone import EngramLM
from engram.cli import main
from engram.config import ConfigError, ModelConfig
from engram.parallel.checkpoint import CheckpointWriter
from engram.parallel.consolidate import consolidate
from engram.tensor_files import map_tensors, read_header
from engram.training import weights
from engram.training.checksums import write_checksums
from engram.training.identity import origin_of
from engram.training.weights import load_model, save_checkpoints_model, save_model, verify_model

TABLE = "memory.1.table.weight"
WEIGHTS = "model.safetensors"


def write_checkpoint(folder: Path, model: EngramLM, tokenizer_json: str | None = None) -> None:
    saved = {"model_config": model.config.to_dict(), "token_lookup": LOOKUP, "tokenizer_json": tokenizer_json}
    CheckpointWriter().save(folder, model, [], saved)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(built(), tmp_path_factory.mktemp("model") / "m", LOOKUP, bpe("some text"))


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(original, tmp_path / "m"))


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model in many files, made of a checkpoint."""
    write_checkpoint(tmp_path / "checkpoint", built(), bpe("some text").to_str())
    monkeypatch.setattr(weights, "consolidate", partial(consolidate, file_bytes=30_000))
    return save_checkpoints_model(tmp_path / "checkpoint", tmp_path / "shards")


def test_the_command_takes_a_checkpoint_or_that_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, run = built(), tmp_path / "run"
    write_checkpoint(run / "checkpoints" / "step-00000002", model)
    for asked in (run / "checkpoints" / "step-00000002", run):
        assert main(["consolidate", str(asked), str(tmp_path / "models" / asked.name)]) == 0
        assert torch.equal(load_model(tmp_path / "models" / asked.name).embed.weight, model.embed.weight)
    capsys.readouterr()
    for wrong in (run / "checkpoints", tmp_path / "none"):
        assert main(["consolidate", str(wrong), str(tmp_path / "no")]) == 2
        assert f"checkpoint is {str(wrong)!r}: allowed is the folder of a checkpoint" in capsys.readouterr().err


def spans(path: Path) -> dict[str, tuple[int, int]]:
    """From which byte of a file to which each tensor goes, by the format's description."""
    raw = path.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:begin])
    del header["__metadata__"]
    return {"header": (0, begin)} | {
        name: (begin + entry["data_offsets"][0], begin + entry["data_offsets"][1]) for name, entry in header.items()
    }


def flip(path: Path, byte: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(byte)
        (value,) = file.read(1)
        file.seek(byte)
        file.write(bytes([value ^ 1 << bit]))


def test_whatever_bit_flips_the_tensor_it_belongs_to_is_named(folder: Path) -> None:
    path, chance = folder / WEIGHTS, random.Random(0)
    places = spans(path)
    assert max(end for _, end in places.values()) == path.stat().st_size
    assert {TABLE, "token_lookup", "memory.1.reader.hasher.moduli", "embed.weight"} < places.keys()
    for name, (start, end) in places.items():
        assert end > start
        n_random = 40 if name == "header" else 2
        for byte in (start, end - 1, *(chance.randrange(start, end) for _ in range(n_random))):
            bit = chance.randrange(8)
            flip(path, byte, bit)
            with pytest.raises(ConfigError, match=rf"model\.safetensors: (its )?{name} is damaged"):
                load_model(folder)
            flip(path, byte, bit)
    load_model(folder)
    assert verify_model(folder) == []


def test_wherever_a_file_is_cut_off_it_is_named(folder: Path) -> None:
    path, chance = folder / WEIGHTS, random.Random(0)
    whole, places = path.read_bytes(), spans(path)
    for name, (start, end) in places.items():
        for length in {start, end - 1, *(chance.randrange(start, end) for _ in range(3))}:
            path.write_bytes(whole[:length])
            what = "its header is cut off or damaged" if name == "header" else f"cut off: {name} ends at byte {end}"
            with pytest.raises(ConfigError, match=rf"model\.safetensors.*{what}"):
                load_model(folder)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ConfigError, match=r"model\.safetensors: its last tensor ends at byte"):
        load_model(folder)
    path.unlink()
    with pytest.raises(ConfigError, match=r"No such file .*model\.safetensors"):
        load_model(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "checksums.json"])
def test_other_files_that_are_cut_off_or_damaged_are_named(folder: Path, name: str) -> None:
    whole = (folder / name).read_text()
    for text in (whole[: len(whole) // 2], "", "[]", whole[1:]):
        (folder / name).write_text(text)
        with pytest.raises(ConfigError, match=f"m' cannot be loaded: .*({name}|data.tokenizer)"):
            load_model(folder)


def test_many_files_load_as_one_and_damage_in_each_is_found(shards: Path) -> None:
    files = sorted(shards.glob("*.safetensors"))
    assert len(files) > 3
    tensors = {name: value for path in files for name, value in load_file(path).items()}
    state = load_model(shards).state_dict()
    assert torch.equal(tensors.pop("token_lookup"), LOOKUP)
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[name], value) for name, value in tensors.items())
    for path in files:
        name, (start, _) = list(spans(path).items())[-1]
        flip(path, start, 0)
        with pytest.raises(ConfigError, match=f"{path.name}: {name} is damaged"):
            load_model(shards)
        flip(path, start, 0)
    index = shards / "model.safetensors.index.json"
    whole = index.read_text()
    index.write_text(index.read_text().replace("embed.weight", "embet.weight"))
    with pytest.raises(ConfigError, match=r"model\.safetensors\.index\.json is damaged"):
        load_model(shards)
    index.write_text(whole)
    save_model(load_model(shards), shards)
    assert sorted(path.name for path in shards.iterdir()) == ["checksums.json", "config.json", WEIGHTS]


def test_a_tensor_that_checksums_do_not_know_is_not_taken_for_sound(folder: Path) -> None:
    path = folder / "checksums.json"
    saved = json.loads(path.read_text())
    saved["files"][WEIGHTS]["tensors"].pop("embed.weight")
    path.write_text(json.dumps(saved))
    with pytest.raises(ConfigError, match=r"checksums\.json does not say what embed\.weight should be"):
        load_model(folder)
    assert len(verify_model(folder)) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda saved: saved["files"].pop(WEIGHTS),
            r"model\.safetensors is none of the files that checksums\.json names",
        ),
        (
            lambda saved: saved.update(algorithm="md5"),
            r"checksums\.json is damaged: ValueError it is of another version",
        ),
        (lambda saved: saved.update(block_bytes=2**20), r"checksums\.json is damaged: .* another version"),
    ],
)
def test_checksums_of_other_files_or_another_version_are_named(folder: Path, change: Callable, said: str) -> None:
    path = folder / "checksums.json"
    saved = json.loads(path.read_text())
    change(saved)
    path.write_text(json.dumps(saved))
    for load in (load_model, verify_model):
        with pytest.raises(ConfigError, match=said):
            load(folder)


def test_tensors_lie_where_their_type_may_lie_whoever_wrote_the_file(tmp_path: Path) -> None:
    """A header of odd length is allowed, and other programs write it."""
    values = torch.arange(6, dtype=torch.float64)
    header = json.dumps({"a": {"dtype": "F64", "shape": [6], "data_offsets": [0, 48]}}).encode()
    for padding in range(8):
        text = header + b" " * padding
        path = tmp_path / f"{padding}.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + values.numpy().tobytes())
        tensor = map_tensors(path, read_header(path))["a"]
        assert torch.equal(tensor, values)
        assert tensor.data_ptr() % 8 == 0


def test_a_large_table_is_verified_when_asked_and_its_size_always(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(weights, "CHECKED_BYTES", 1000)
    path = folder / WEIGHTS
    start, end = spans(path)[TABLE]
    assert main(["verify", str(folder)]) == 0
    flip(path, end - 1, 0)
    load_model(folder)
    with pytest.raises(ConfigError, match=f"{TABLE} is damaged"):
        load_model(folder, verify=True)
    assert len(verify_model(folder)) == 1
    capsys.readouterr()
    assert main(["verify", str(folder)]) == 1
    assert f"model.safetensors: {TABLE} is damaged" in capsys.readouterr().out
    flip(path, spans(path)["embed.weight"][0], 0)
    with pytest.raises(ConfigError, match=r"embed\.weight is damaged"):
        load_model(folder)
    path.write_bytes(path.read_bytes()[: start + 10])
    with pytest.raises(ConfigError, match=f"cut off: {TABLE}"):
        load_model(folder)


def test_a_folder_without_checksums_is_loaded_with_a_warning_and_never_verified(folder: Path) -> None:
    (folder / "checksums.json").unlink()
    with pytest.warns(UserWarning, match=r"there is no checksums\.json"):
        load_model(folder)
    for verify in (partial(load_model, verify=True), verify_model):
        with pytest.raises(ConfigError, match=r"there is no checksums\.json"):
            verify(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"memory.seed": 1}, "memory.seed is 1: the weights were trained with 0"),
        ({"memory.rows": [97, 132]}, r"memory.rows is \[97, 132\]: the weights were trained with \[97, 131\]"),
        ({"memory.orders": [2, 4]}, r"memory.orders is \[2, 4\]: the weights were trained with \[2, 3\]"),
        ({"memory.layers": [0]}, r"memory.layers is \[0\]: the weights were trained with \[1\]"),
        ({"memory.eos_id": 2}, "memory.eos_id is 2: the weights were trained with 1"),
        ({"memory.pad_id": 3}, "memory.pad_id is 3: the weights were trained with 0"),
        ({"vocab_size": 310, "memory.vocab_size": 310}, "vocab_size is 310: the weights were trained with 300"),
        ({"memory.compress": False}, "memory.compress is False: the weights were trained with True"),
        (
            {"memory.hash": "qwen", "memory.compress": False},
            "memory.hash is 'qwen': the weights were trained with 'deepseek'",
        ),
        ({"memory": None}, "memory is None: the weights were trained with {"),
        ({"norm_eps": 1e-5}, "norm_eps is 1e-05: the weights were trained with 1e-06"),
    ],
)
def test_a_config_other_than_the_weights_were_trained_with_is_refused(
    folder: Path, changes: dict[str, Any], said: str
) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps(merge(json.loads(config.read_text()), changes)))
    for load in (load_model, verify_model):
        with pytest.raises(ConfigError, match=said):
            load(folder)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], None]) -> None:
    """Change tensors or metadata of a folder, checksums and all."""
    path = folder / WEIGHTS
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata()  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    write_checksums(folder, [path])


def test_files_of_models_that_were_trained_otherwise_do_not_mix(shards: Path) -> None:
    files = sorted(shards.glob("*.safetensors"))
    for seed, path in enumerate(files[:4], start=1):  # in whatever order they are looked at
        whole = path.read_bytes()
        with safe_open(path, "pt") as file:
            tensors, metadata = {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata()  # noqa: SIM118
        other = ModelConfig.from_dict(merge(MODEL, {"memory.seed": seed}))
        metadata["engram"] = origin_of(other, LOOKUP, bpe("some text").to_str())
        save_file(tensors, path, metadata)
        write_checksums(shards, files)
        with pytest.raises(ConfigError, match=f"memory.seed is 0: the weights were trained with {seed}"):
            load_model(shards)
        path.write_bytes(whole)
    write_checksums(shards, files)
    load_model(shards)


def test_all_but_tables_is_copied_and_stays_when_the_file_changes(folder: Path) -> None:
    model = load_model(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, (start, _) in spans(folder / WEIGHTS).items():
        if name not in ("header", TABLE):
            flip(folder / WEIGHTS, start, 0)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    with pytest.raises(ConfigError, match=r"embed\.weight is damaged"):
        load_model(folder)


def test_another_token_compression_or_tokenizer_is_refused(folder: Path) -> None:
    ours = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(bpe("quite another text").to_str(pretty=True))
    with pytest.raises(ConfigError, match=r"tokenizer\.json has sha256 \w+: the weights were trained with sha256"):
        load_model(folder)
    (folder / "tokenizer.json").write_text(ours)
    rewrite(folder, lambda tensors, _: tensors.update(token_lookup=torch.arange(300) // 3))
    with pytest.raises(ConfigError, match=r"token compression has sha256 \w+: the weights were trained with sha256"):
        load_model(folder)
    rewrite(folder, lambda tensors, _: tensors.pop("token_lookup"))
    with pytest.raises(ConfigError, match="token compression has none: the weights were trained with sha256"):
        load_model(folder)


def test_weights_of_unknown_origin_are_loaded_with_a_warning_if_their_rows_fit(folder: Path) -> None:
    rewrite(folder, lambda _, metadata: metadata.pop("engram"))
    with pytest.warns(UserWarning, match="do not tell what they were trained with"):
        load_model(folder)
    rewrite(folder, lambda tensors, _: tensors.update({TABLE: tensors[TABLE][:-1].clone()}))
    with (
        pytest.warns(UserWarning, match="do not tell"),
        pytest.raises(ConfigError, match=rf"weights do not fit config\.json: .*size mismatch for {TABLE}"),
    ):
        load_model(folder)


@pytest.mark.filterwarnings("ignore:whether .* is damaged is not known")
def test_whatever_a_header_holds_the_model_is_loaded_or_refused(folder: Path) -> None:
    """Without checksums, which would find every change: no reading outside the file, no error but our own."""
    (folder / "checksums.json").unlink()
    path, chance = folder / WEIGHTS, random.Random(0)
    whole, end = path.read_bytes(), spans(path)["header"][1]
    refused = 0
    for _ in range(300):
        changed = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            changed[chance.randrange(end)] = chance.choice(b'0123456789[]{},:"-. ')
        path.write_bytes(changed)
        try:
            load_model(folder)
        except ConfigError:
            refused += 1
    assert refused > 200


def test_a_model_is_saved_with_its_own_token_compression(tmp_path: Path) -> None:
    model = built()
    loaded = load_model(save_model(model, tmp_path / "m")).eval()
    ids = torch.randint(0, 300, (2, 16))
    assert torch.equal(loaded(ids), model(ids))
    assert torch.equal(loaded.memory["1"].reader.lookup, LOOKUP)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("dump", [pickle.dump, torch.save])
def test_nothing_that_is_pickled_in_a_folder_is_executed(folder: Path, dump: Callable[..., None]) -> None:
    exploded = folder / "exploded"
    for name in ("pytorch_model.bin", "model.bin", WEIGHTS):
        with (folder / name).open("wb") as file:
            dump({"embed.weight": Bomb(exploded)}, file)
        if name != WEIGHTS:
            load_model(folder)
    with pytest.raises(ConfigError, match=r"model\.safetensors: its header is"):
        load_model(folder)
    (folder / "checksums.json").unlink()
    with pytest.raises(ConfigError, match=r"model\.safetensors: its header is"):
        load_model(folder)
    assert not exploded.exists()
    pickle.loads(pickle.dumps(Bomb(exploded)))
    assert exploded.exists()  # it would have


def test_a_full_disk_leaves_the_old_model_when_a_checkpoint_is_consolidated(tmp_path: Path, folder: Path) -> None:
    """The limit on file size is how a test can fill a disk."""
    write_checkpoint(tmp_path / "step-00000001", built())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(ConfigError, match=r"cannot write '.*m/model\.safetensors': File too large"):
            save_checkpoints_model(tmp_path / "step-00000001", folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"m", "step-00000001"}

"""Attached memory on disk: alone, whole, and refused where it does not belong or was changed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attach_hosts import LAYERS, MEMORY, SIZES, attached, host, some_ids, words_tokenizer
from safetensors import safe_open
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from engram import ConfigError
from engram.inference import offload
from engram.interop import attach, load_adapter

COMPRESSED = dataclasses.replace(MEMORY, compress=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return attached(host(), memory=COMPRESSED, tokenizer=words_tokenizer()).save(tmp_path / "memory")


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "engram.json"
    about = json.loads(path.read_text())
    change(about)
    path.write_text(json.dumps(about))


def test_memory_loaded_on_the_same_model_answers_alike(tmp_path: Path) -> None:
    model, ids, tokenizer = host(), some_ids(2, 9), words_tokenizer()
    attachment = attached(model, memory=COMPRESSED, tokenizer=tokenizer)
    with torch.no_grad():
        expected = model(ids).logits
    (tmp_path / "notes.txt").write_text("mine")
    attachment.save(tmp_path)
    attachment.save(tmp_path)
    again, state = host(), torch.get_rng_state()
    loaded = load_adapter(again, tmp_path, tokenizer=tokenizer)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, expected)
    assert loaded.config == attachment.config
    assert {path.name for path in tmp_path.iterdir()} == {"engram.json", "engram.safetensors", "notes.txt"}
    learns = {name for name, parameter in again.named_parameters() if parameter.requires_grad}
    assert learns == {f"engram.{name}" for name, _ in loaded.named_parameters()}


def test_a_folder_holds_the_memory_and_nothing_of_the_model(folder: Path) -> None:
    with safe_open(folder / "engram.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert names == set(attach(host(), LAYERS, MEMORY).state_dict())
    about = json.loads((folder / "engram.json").read_text())
    assert about["base_model"]["model"] == "LlamaForCausalLM"
    assert about["memory"]["layers"] == list(LAYERS)


def test_quantized_memory_is_saved_neither_alone_nor_with_the_model(tmp_path: Path) -> None:
    model = host()
    attachment = attached(model)
    attachment.save(tmp_path / "memory")
    before = {path.name: path.read_bytes() for path in (tmp_path / "memory").iterdir()}
    offload(model, "host", rows="int8")
    with pytest.raises(ConfigError, match=r"rows of memory\.\d\.table is 'int8': allowed is float"):
        attachment.save(tmp_path / "memory")
    assert {path.name: path.read_bytes() for path in (tmp_path / "memory").iterdir()} == before
    model.save_pretrained(tmp_path / "model")
    with safe_open(tmp_path / "model" / "model.safetensors", framework="pt") as file:
        assert not [name for name in file.keys() if "engram" in name]  # noqa: SIM118


def test_padding_and_truncation_do_not_make_another_tokenizer(folder: Path) -> None:
    tokenizer = words_tokenizer()
    tokenizer(["w1 w2", "w3"], padding=True, truncation=True, max_length=5)
    load_adapter(host(), folder, tokenizer=tokenizer)


def test_what_a_tokenizer_puts_around_a_text_does_not_make_another(folder: Path) -> None:
    tokenizer = words_tokenizer()
    bare = tokenizer.backend_tokenizer
    bare.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    load_adapter(host(), folder, tokenizer=bare)


def smaller(**sizes: int) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **sizes}))


@pytest.mark.parametrize(
    ("make", "fold", "says"),
    [
        (lambda: MistralForCausalLM(MistralConfig(**SIZES)), True, "base model's model is 'MistralForCausalLM'"),
        (lambda: smaller(hidden_size=64), True, "base model's hidden_size is 64: allowed is 32"),
        (lambda: smaller(num_hidden_layers=2), True, "base model's n_layers is 2: allowed is 3"),
        (lambda: smaller(vocab_size=91), True, "base model's vocab_size is 91: allowed is 90"),
        (host, False, "base model's tokenizer is "),
    ],
)
def test_another_model_or_tokenizer_is_refused_and_left_alone(
    folder: Path, make: Callable[[], PreTrainedModel], fold: bool, says: str
) -> None:
    model = make()
    with pytest.raises(ConfigError, match=says):
        load_adapter(model, folder, tokenizer=words_tokenizer(fold))
    assert not hasattr(model, "engram")
    assert all(parameter.requires_grad for parameter in model.parameters())


def flip_a_bit(folder: Path) -> None:
    path = folder / "engram.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def cut_short(folder: Path) -> None:
    path = folder / "engram.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (flip_a_bit, "sha256 of .*engram.safetensors"),
    "a truncated file": (cut_short, "sha256 of .*engram.safetensors"),
    "another seed": (lambda f: edit(f, lambda a: a["memory"].update(seed=1)), "sha256 of .*engram.json"),
    "another model": (lambda f: edit(f, lambda a: a["base_model"].update(model="X")), "sha256 of .*engram.json"),
    "no checksums": (lambda f: edit(f, lambda a: a.pop("sha256")), "holds no memory that can be read"),
    "no weights": (lambda f: (f / "engram.safetensors").unlink(), "holds no memory that can be read"),
    "no settings": (lambda f: (f / "engram.json").unlink(), "holds no memory that can be read"),
    "no JSON": (lambda f: (f / "engram.json").write_text("{"), "holds no memory that can be read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused(folder: Path, damage: str) -> None:
    do, says = DAMAGE[damage]
    do(folder)
    model = host()
    with pytest.raises(ConfigError, match=says):
        load_adapter(model, folder, tokenizer=words_tokenizer())
    assert not hasattr(model, "engram")


def test_weights_are_restored_in_a_memory_like_theirs_alone(folder: Path) -> None:
    saved = load_adapter(host(), folder, tokenizer=words_tokenizer()).state_dict()
    same = attach(host(), LAYERS, COMPRESSED, tokenizer=words_tokenizer())
    same.restore(folder)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in same.state_dict().items())
    other = attach(host(), LAYERS, dataclasses.replace(COMPRESSED, seed=5), tokenizer=words_tokenizer())
    with pytest.raises(ConfigError, match=r"memory\.seed is 5"):
        other.restore(folder)


def test_weights_are_restored_around_rows_elsewhere_that_are_the_same(folder: Path) -> None:
    memory = load_adapter(host(), folder, tokenizer=words_tokenizer())
    saved = {name: tensor.clone() for name, tensor in memory.state_dict().items()}
    offload(memory, "host")
    with torch.no_grad():
        memory.memory["0"].project.weight.zero_()
        memory.restore(folder)
        assert all(torch.equal(tensor, saved[name]) for name, tensor in memory.state_dict().items())
        memory.memory["0"].table.records[0] = 0
    with pytest.raises(ConfigError, match=r"memory\.0\.table\.weight: a read-only table takes no other rows"):
        memory.restore(folder)

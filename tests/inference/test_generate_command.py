"""`engram generate` prints what `TextGenerator` gives, and ends well however it is ended."""

import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from engram import EngramLM, ModelConfig
from engram.cli import main
from engram.inference import Sampling
from engram.inference.opening import open_model
from engram.inference.text import TextGenerator
from engram.memory.row_formats import RowKind
from engram.training.tokenizer import train_bpe
from engram.training.weights import save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config: dict[str, Any] = {
        "vocab_size": 290,
        "d_model": 24,
        "n_layers": 1,
        "attention": {"kind": "gqa", "n_heads": 2, "n_kv_heads": 1, "head_dim": 12},
        "dense_width": 32,
        "n_dense_layers": 1,
        "memory": {"layers": [0], "rows": [31, 37], "n_heads": 2, "row_width": 4},
    }
    model = EngramLM(ModelConfig.from_dict(config), torch.arange(290))
    tokenizer = train_bpe(["Grüße aus Łódź! def f(x): return x"], 290)
    return save_model(model, tmp_path_factory.mktemp("model"), tokenizer=tokenizer)


def generate(folder: Path, *args: str) -> int:
    return main(["generate", str(folder), *args, "--max-new-tokens", "30"])


@pytest.mark.parametrize("prompts", [["Grüße"], ["def f", "x"]], ids=str)
def test_what_is_printed_is_the_prompt_and_what_follows_it(folder: Path, prompts: list[str], capsys: Any) -> None:
    model, tokenizer = open_model(folder)
    assert tokenizer is not None
    writer = TextGenerator(model, tokenizer)
    new = writer.generate(prompts, 30, sampling=Sampling(temperature=0.7, top_k=9), seed=3)
    settings = ["--temperature", "0.7", "--top-k", "9", "--seed", "3"]
    assert generate(folder, *prompts, *settings) == 0
    out, err = capsys.readouterr()
    assert out == "\n\n".join(map("".join, zip(prompts, new, strict=True))) + "\n"
    assert f"{writer.n_new} tokens" in err  # fewer where a text ended
    assert generate(folder, *prompts, *settings, "--no-echo") == 0
    assert capsys.readouterr().out == "\n\n".join(new) + "\n"


@pytest.mark.parametrize("kind", get_args(RowKind))
def test_rows_of_every_format_are_generated_from(folder: Path, kind: RowKind, capsys: Any) -> None:
    model, tokenizer = open_model(folder, rows=kind)
    assert tokenizer is not None
    new = TextGenerator(model, tokenizer).generate(["def f"], 30, sampling=Sampling(temperature=0.0))
    assert generate(folder, "def f", "--temperature", "0", "--rows", kind) == 0
    assert capsys.readouterr().out == f"def f{new[0]}\n"


def test_a_prompt_comes_from_standard_input(folder: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("def f"))
    assert generate(folder, "-", "--temperature", "0") == 0
    assert generate(folder, "def f", "--temperature", "0") == 0
    lines = capsys.readouterr().out
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :]


def test_standard_input_that_is_no_text_is_refused(folder: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff"), encoding="utf-8"))
    assert generate(folder, "-") == 2
    assert capsys.readouterr() == (
        "",
        "error: standard input is no text in utf-8: 'utf-8' codec can't decode byte 0xff in position 1: invalid start "
        "byte\n",
    )


def test_another_tokenizer_than_the_models_is_refused(folder: Path, tmp_path: Path, capsys: Any) -> None:
    train_bpe(["quite another text"], 290).save(str(tmp_path / "other.json"))
    assert generate(folder, "a", "--tokenizer", str(tmp_path / "other.json")) == 2
    assert "the tokenizer given has sha256" in capsys.readouterr().err
    assert generate(folder, "a", "--tokenizer", str(folder / "tokenizer.json")) == 0


@pytest.mark.parametrize("prompts", [["a"], ["a", "b"]], ids=str)
def test_ctrl_c_ends_with_the_text_so_far(folder: Path, prompts: list[str], capsys: Any, monkeypatch: Any) -> None:
    def interrupted(self: TextGenerator, prompts: list[str], *args: Any, **settings: Any) -> Iterator[list[str]]:
        self.n_new = 2
        yield ["x"] * len(prompts)
        yield ["y"] * len(prompts)
        raise KeyboardInterrupt

    monkeypatch.setattr(TextGenerator, "stream", interrupted)
    assert generate(folder, *prompts) == 130
    assert capsys.readouterr().out == "\n\n".join(prompt + "xy" for prompt in prompts) + "\n"


def test_a_reader_that_leaves_ends_it_without_a_word(folder: Path, capsys: Any, monkeypatch: Any) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", encoding="utf-8") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert generate(folder, "a") == 141
    assert capsys.readouterr().err == ""


def test_a_terminal_that_cannot_show_a_character_shows_another(folder: Path, monkeypatch: Any) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert generate(folder, "Grüße") == 0
    assert written.getvalue().startswith(b"Gr??e")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([""], "length of a prompt in tokens is 0"),
        (["a\udcff"], "prompt is"),
        (["a", "--temperature", "-1"], "temperature is -1.0"),
        (["a", "--seed", str(2**64)], "seed is"),
        (["a", "--device", "nowhere"], "device is 'nowhere'"),
        (["a", "--device", "meta"], "device is 'meta'"),
        (["a", "--stop", ""], "stop is"),
    ],
    ids=str,
)
def test_a_bad_argument_is_named_and_nothing_printed(folder: Path, args: list[str], message: str, capsys: Any) -> None:
    assert generate(folder, *args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {message}")
    assert len(err.splitlines()) == 1

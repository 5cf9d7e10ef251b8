import base64
import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from asking import answer_of

from engram.cli import main as engram
from engram.pages import as_typed, png_of
from eval import QUESTIONS
from eval.shared import command
from eval.shared.page import write_page
from eval.shared.question import Asked
from eval.shared.subjects import open_subjects


def _refused(capsys: pytest.CaptureFixture[str], *args: str | Path) -> str:
    assert engram(["eval", *map(str, args)]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("error: ")
    return told


def test_bad_input_ends_in_one_line_that_names_it(
    memory_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loss = ("loss", "--checkpoint", memory_run, "--output", tmp_path)
    assert "'los'" in _refused(capsys, "los")
    assert str(tmp_path) in _refused(capsys, "loss", "--checkpoint", tmp_path)
    assert "tokens is 63" in _refused(capsys, *loss, "--tokens", "63")
    assert "names is ['a', 'b']" in _refused(capsys, *loss, "--names", "a", "b")
    assert "hot-from is 1" in _refused(capsys, *loss, "--hot-from", "1")
    assert "batch-size is -1" in _refused(capsys, *loss, "--batch-size", "-1")
    assert "device is 'cuda:99'" in _refused(capsys, *loss, "--device", "cuda:99")
    assert not any(tmp_path.iterdir())


def test_a_model_without_its_run_is_asked_on_a_text_that_is_named(
    memory_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = shutil.copytree(memory_run / "model", tmp_path / "alone")
    assert "--data" in _refused(capsys, "loss", "--checkpoint", alone)
    settings = yaml.safe_load((memory_run / "config.yaml").read_text())["data"]["config"]
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(settings))
    own = answer_of("loss", tmp_path / "own", memory_run)
    named = answer_of("loss", tmp_path / "named", alone, "--data", tmp_path / "data.yaml")
    first, second = (next(iter(record["result"]["checkpoints"].values()))["nats"][0] for record in (own, named))
    assert first == second
    assert named["checkpoints"][0]["tokens"] is None
    counted = "in the training split of the text, once, since it is not known what alone was trained on"
    assert counted in (tmp_path / "named" / "report.html").read_text()
    assert counted not in (tmp_path / "own" / "report.html").read_text()


def test_checkpoints_of_other_tokenizers_and_changed_texts_are_refused(
    memory_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = yaml.safe_load((memory_run / "config.yaml").read_text())["data"]["config"]
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({**settings, "tokenizer_bytes": 20_000}))
    told = _refused(capsys, "loss", "--checkpoint", memory_run, "--data", tmp_path / "data.yaml")
    assert "tokenizer" in told
    changed = shutil.copytree(memory_run, tmp_path / "changed")
    text = (changed / "result.json").read_text()
    (changed / "result.json").write_text(text.replace('"max_bytes": 0', '"max_bytes": 100000'))
    assert "corpus" in _refused(capsys, "loss", "--checkpoint", changed)


def test_a_page_warns_of_a_name_that_stands_for_two_checkpoints(
    memory_run: Path, experts_run: Path, tmp_path: Path
) -> None:
    some, page = ("--names", "<it>", "--tokens", "1024"), tmp_path / "report.html"
    for question in ("loss", "lens"):
        answer_of(question, tmp_path, memory_run, *some)
    assert "not the same checkpoint" not in page.read_text()
    assert page.read_text().count("Asked of: &lt;it&gt;.") == 2
    answer_of("lens", tmp_path, experts_run, *some)
    assert "&lt;it&gt;: not the same checkpoint in all sections" in page.read_text()


def test_a_page_has_no_picture_but_that_of_its_numbers_and_tells_of_one_that_is_not_there(
    memory_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, picture = tmp_path / "report.html", tmp_path / "loss.png"

    def shown() -> tuple[bool, bool]:
        whole = write_page(tmp_path).read_text()
        return base64.b64encode(picture.read_bytes()).decode() in whole, "No picture: loss.png is not that" in whole

    answer_of("loss", tmp_path, memory_run, "--tokens", "1024")
    first = picture.read_bytes()
    assert shown() == (True, False)
    with monkeypatch.context() as patch:  # ended between the two files
        patch.setattr(command, "save", None)
        with pytest.raises(TypeError):
            answer_of("loss", tmp_path, memory_run, "--tokens", "2048")
    assert json.loads((tmp_path / "loss.json").read_text())["held_out_tokens"] == 2048
    assert picture.read_bytes() == first
    assert shown() == (False, True)
    picture.unlink()
    write_page(tmp_path)
    assert "The picture is missing: there is no loss.png" in page.read_text()
    assert "<td>2,048</td>" in page.read_text()


@pytest.mark.parametrize("changed", [{"format": 0}, {"result": {}, "format": 2}])
def test_an_answer_of_another_version_is_named_and_does_not_keep_others_from_being_shown(
    memory_run: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    for name in ("loss", "lens"):
        answer_of(name, tmp_path, memory_run, "--tokens", "1024")
    path = tmp_path / "loss.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    page = write_page(tmp_path).read_text()
    assert "loss: answered by another version of engram" in page
    assert "<h2 id=loss>" not in page
    assert "<h2 id=lens>" in page


def test_checkpoints_are_called_in_pictures_what_their_user_calls_them(
    memory_run: Path, experts_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = []

    def looked_at(figure: Any) -> bytes:
        labels.extend(text.get_text() for text in figure.axes[0].get_legend().get_texts())
        return png_of(figure)

    monkeypatch.setattr(command, "png_of", looked_at)
    names = ["_mine", "$x$ or _y"]
    record = answer_of("loss", tmp_path, memory_run, "--against", experts_run, "--names", *names, "--tokens", "1024")
    assert labels == [as_typed(name) for name in names]
    assert list(record["result"]["checkpoints"]) == names


def test_a_text_that_is_shorter_than_asked_for_is_told_of_once(
    memory_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subjects = open_subjects([memory_run])
    assert subjects[0].run is not None
    there = subjects[0].run.data.n_held_out_windows * 64
    for tokens, told in ((there + 64, 1), (there + 63, 0), (1024, 0), (0, 0)):
        asked = Asked(subjects, Namespace(data=None, tokens=tokens, batch_size=0))
        assert asked.held_out is asked.held_out
        notes = capsys.readouterr().err
        assert notes.count(f"note: the held-out text has {there:,} tokens, not the {tokens:,} of --tokens") == told
        assert notes.count("note") == told


@pytest.mark.parametrize("where", ["model", "checkpoints/step-00000300", "."])
def test_a_run_is_found_from_any_of_its_folders(memory_run: Path, tmp_path: Path, where: str) -> None:
    record = answer_of("loss", tmp_path, memory_run / where, "--tokens", "1024")
    assert record["checkpoints"][0]["tokens"] == 300 * 16 * 64
    assert record["checkpoints"][0]["name"] == ("step-00000300" if "step" in where else memory_run.name)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_answers_lie_in_the_run_and_in_no_folder_of_weights(
    memory_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, alone = tmp_path / "run", shutil.copytree(memory_run / "model", tmp_path / "alone")
    for part in ("model", "checkpoints/step-00000300"):
        shutil.copytree(memory_run / part, run / part)
    for name in ("config.yaml", "result.json"):
        shutil.copy(memory_run / name, run)
    wanted = {
        (run, None): run / "eval",
        (run / "model", None): run / "eval",
        (run / "checkpoints/step-00000300", None): run / "eval/step-00000300",
        (alone, None): alone / "eval",
        (run / "model", alone): run / "eval/against-alone",
        (alone, run / "model"): alone / "eval/against-run",
        (run / "checkpoints/step-00000300", run / "model"): run / "eval/step-00000300/against-run",
    }
    for (checkpoint, other), folder in wanted.items():
        subjects = open_subjects([checkpoint, *([other] if other else [])], own_text=False)
        assert command._folder(checkpoint, subjects).resolve() == folder
    for inside in (run, run / "model"):
        monkeypatch.chdir(inside)
        subjects = open_subjects([Path()])
        assert command._folder(Path(), subjects).resolve() == run / "eval"
        assert subjects[0].name == "run"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_what_the_cpu_gives(told_run: Path, tmp_path: Path) -> None:
    """In the questions that have no such test of their own."""

    def told(device: str, name: str, *more: str) -> Any:
        record = answer_of(name, tmp_path / device, told_run, "--names", "here", "--device", device, *more)
        return record["result"]["checkpoints"]["here"]

    text = ("--tokens", "4096")
    found = []
    for device in ("cpu", "cuda"):
        means = [told(device, "loss", *text)["nats"], *(cell["gate"] for cell in told(device, "gates", *text)["gates"])]
        means.append(told(device, "probes", "--examples", "50")["facts"]["nats"])
        needles = [answer["nats"] for answer in told(device, "needle", "--kinds", "single", "--examples", "5")]
        found.append([known["value"] for each in means for known in each] + needles)
    np.testing.assert_allclose(*found, rtol=1e-3)
    one, other = (told(device, "rows", *text)["layers"][0] for device in ("cpu", "cuda"))
    for what in ("reads", "heads", "orders", "cache"):
        assert one[what] == other[what]


def test_every_question_has_its_file_and_a_line_of_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert engram(["eval", "--help"]) == 0
    told = capsys.readouterr().out
    root = Path(__file__).parents[2] / "eval"
    assert {path.stem for path in root.glob("*.py")} - {"__init__"} == set(QUESTIONS)
    assert all(name in told for name in QUESTIONS)

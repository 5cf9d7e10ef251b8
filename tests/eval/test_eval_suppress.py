"""What is told of a suppressed memory: against models that were built without it, plain loops, and greedy decoding."""

import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from asking import answer_of, held_out_suffixes, seen_in_training

from engram.backbone import EngramLM
from engram.cli import main as engram
from engram.config import ModelConfig
from engram.interop.harness import EngramHarness
from engram.training.weights import save_model
from eval.shared.subjects import Subject, open_subjects

TOKENS = 4096
QUESTIONS = [
    {"question": left, "choices": [right, wrong], "answer": 0}
    for left, right, wrong in (
        ("import", "sys", "None"),
        ("return", "None", "import"),
        ("raise", "ValueError", "the"),
        ("if not", "self", "return"),
        ("is", "None", "class"),
        ("the default", "is", "of"),
        ("the name of", "the", "is"),
        ("must be", "a", "the"),
        ("def", "get", "the"),
        ("in the", "message", "and"),
        ("instance of", "the", "a"),
        ("as", "a", "of"),
    )
]


def without(model: EngramLM, layers: list[int] | None = None) -> EngramLM:
    """A model of the same weights that was built with memories before these blocks alone, or without any."""
    config = model.config.to_dict()
    if layers is None:
        config["memory"]["rows"] = [0 for _ in config["memory"]["rows"]]
    else:
        config["memory"]["layers"] = layers
    lookup = next(iter(model.memories().values())).reader.lookup
    bare = EngramLM(ModelConfig.from_dict(config), lookup).eval()
    weights = {name: value for name, value in model.state_dict().items() if ".hasher." not in name}
    assert all(".hasher." in name for name in bare.load_state_dict(weights, strict=False).missing_keys)
    return bare


def subject_of(run: Path) -> Subject:
    return open_subjects([run], ["here"])[0]


@torch.no_grad()
def of_tokens(model: EngramLM, subject: Subject) -> tuple[Any, Any, dict[str, Any]]:
    """Nats and hits of held-out tokens, by full logits; and the tokens."""
    batch = subject.run.data.val_windows(np.arange(TOKENS // 64))
    logits = model(batch["tokens"], batch["document_ids"]).double()
    nats = F.cross_entropy(logits.transpose(1, 2), batch["targets"], reduction="none").numpy()
    return nats, (logits.argmax(-1) == batch["targets"]).numpy(), batch


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "words.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (folder / "words.yaml").write_text(
        f"task: words\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: '{folder}/words.jsonl'}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{answer}}'\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    (folder / "texts.yaml").write_text(
        f"task: texts\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: '{folder}/words.jsonl'}}}}\n"
        "test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{question}}'\n"
        "metric_list: [{metric: bits_per_byte}]\n"
    )
    return folder


@pytest.fixture(scope="module")
def output(told_run: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suppress")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(folder / "cache"))
        patch.setattr("engram.interop.harness.open_model", None)  # the harness asks the model that is open already
        more = ("--tasks", "words", "--include-path", tasks)
        answer_of("suppress", folder, told_run, "--names", "here", "--tokens", str(TOKENS), *more)
    return folder


@pytest.fixture(scope="module")
def result(output: Path) -> dict[str, Any]:
    return json.loads((output / "suppress.json").read_text())["result"]


def test_zeroed_is_a_model_built_without_memory_in_every_stratum(told_run: Path, result: dict[str, Any]) -> None:
    subject = subject_of(told_run)
    nats, hits, batch = of_tokens(subject.model, subject)
    bare_nats, bare_hits, _ = of_tokens(without(subject.model), subject)
    seen = seen_in_training(subject, 3)
    counts = np.array([[seen[g] for g in window] for window in held_out_suffixes(subject, len(nats), 3)])
    code = batch["domains"].numpy() == subject.run.data.domains.index("code")
    groups = {
        "all tokens": counts >= 0,
        "cold: never seen": counts == 0,
        "warm: seen 1 to 9 times": (counts > 0) & (counts < 10),
        "hot: 10 times or more": counts >= 10,
        "2 to 3": (counts == 2) | (counts == 3),
        "code": code,
    }
    told, answer = [group["name"] for group in result["groups"]], result["checkpoints"]["here"]
    for name, who in groups.items():
        at = told.index(name)
        normal, zeroed = answer["normal"], answer["zeroed"]
        assert result["groups"][at]["tokens"] == who.sum() > 50
        assert normal["nats"][at]["value"] == pytest.approx(nats[who].mean(), abs=1e-5)
        assert zeroed["nats"][at]["value"] == pytest.approx(bare_nats[who].mean(), abs=1e-5)
        assert zeroed["difference"][at]["value"] == pytest.approx((bare_nats - nats)[who].mean(), abs=2e-5)
        assert normal["accuracy"][at]["value"] == pytest.approx(hits[who].mean(), abs=1e-3)
        assert zeroed["retained"][at]["value"] == pytest.approx(bare_hits[who].sum() / hits[who].sum(), abs=1e-3)
        assert normal["retained"][at] == {"value": 1, "low": 1, "high": 1} or name == "code"


def test_a_trained_memory_is_missed_most_where_the_n_gram_is_hot(result: dict[str, Any]) -> None:
    """As the paper has it of facts; and wrong rows are worth no more than none."""
    told, answer = [group["name"] for group in result["groups"]], result["checkpoints"]["here"]
    cold, hot = told.index("cold: never seen"), told.index("hot: 10 times or more")
    for change in ("zeroed", "shuffled"):
        assert answer[change]["retained"][hot]["high"] < answer[change]["retained"][cold]["low"]
        assert answer[change]["difference"][hot]["low"] > answer[change]["difference"][cold]["high"] > 0


def decoded_right(model: EngramLM, subject: Subject, text: str, start: int, end: int) -> bool:
    """Whether greedy decoding from the text before an answer writes it, token by token and without a batch."""
    data = subject.run.data
    encoded = data.tokenizer.encode(text, add_special_tokens=False)
    n = sum(last <= start for _, last in encoded.offsets)
    ids, wanted = [data.eos_id, *encoded.ids[:n]], encoded.ids[n:]
    documents = torch.ones(1, len(encoded.ids) + 1, dtype=torch.int64)
    documents[0, 0] = 0
    for _ in range(sum(first < end for first, _ in encoded.offsets[n:])):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), documents[:, : len(ids)])[0, -1].argmax()))
    return ids[n + 1 :] == wanted[: len(ids) - n - 1]


def test_facts_that_are_kept_are_those_that_greedy_decoding_writes(told_run: Path, result: dict[str, Any]) -> None:
    subject = subject_of(told_run)
    data = subject.run.data
    portion = data.config.portions()["facts"]
    examples = [e for e in portion.examples(data.config.probe_examples, data.config.mixture_seed) if not e.control]
    bare = without(subject.model)
    told = {(task["task"], task["group"]): task for task in result["checkpoints"]["here"]["tasks"]}
    right = {
        name: [decoded_right(model, subject, e.text, *e.answers[0]) for e in examples]
        for name, model in (("normal", subject.model), ("zeroed", bare))
    }
    assert sum(right["normal"]) >= 5
    near = [("place", "near") in e.group for e in examples]
    for group, who in (("", [True] * len(examples)), ("place near", near)):
        task = told["facts", group]
        counts = {name: sum(r for r, w in zip(each, who, strict=True) if w) for name, each in right.items()}
        assert task["answers"] == task["questions"] == sum(who) > 0
        assert task["chance"] == 1 / 16
        for name in right:
            assert task[name]["accuracy"]["value"] == pytest.approx(counts[name] / sum(who))
        assert task["zeroed"]["retained"]["value"] == pytest.approx(counts["zeroed"] / counts["normal"])


def test_facts_go_with_the_memory_and_brackets_stay(result: dict[str, Any]) -> None:
    told = {(task["task"], task["group"]): task for task in result["checkpoints"]["here"]["tasks"]}
    facts, brackets = told["facts", ""], told["brackets", ""]
    assert facts["normal"]["accuracy"]["low"] > facts["chance"]
    assert brackets["normal"]["accuracy"]["low"] > brackets["chance"]
    assert facts["zeroed"]["retained"]["high"] < brackets["zeroed"]["retained"]["low"]


def test_a_task_of_the_harness_is_asked_of_the_suppressed_model(
    told_run: Path, tasks: Path, result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    subject = subject_of(told_run)
    bare = save_model(without(subject.model), tmp_path / "bare", None, subject.tokenizer)
    found = {}
    for name, path in (("normal", told_run), ("zeroed", bare)):
        harness = EngramHarness(str(path), device="cpu")
        manager = TaskManager(include_path=tasks, include_defaults=False)
        found[name] = simple_evaluate(harness, tasks=["words"], task_manager=manager, bootstrap_iters=0)
    (task,) = (task for task in result["checkpoints"]["here"]["tasks"] if task["task"] == "words")
    assert task["metric"] == "acc"
    assert task["chance"] is None
    accuracy = {name: each["results"]["words"]["acc,none"] for name, each in found.items()}
    assert 0 < accuracy["zeroed"] < accuracy["normal"]
    assert {name: task[name]["accuracy"]["value"] for name in accuracy} == pytest.approx(accuracy)
    kept = task["zeroed"]["retained"]
    assert kept["value"] == pytest.approx(accuracy["zeroed"] / accuracy["normal"])
    assert kept["low"] < kept["value"] < kept["high"]


def test_one_memory_of_two_is_suppressed_and_numbers_are_the_same_at_any_batch_size(
    branches_run: Path, tmp_path: Path
) -> None:
    some = ("--tokens", str(TOKENS), "--layers", "2", "--names", "here")
    records = [
        answer_of("suppress", tmp_path / size, branches_run, *some, "--batch-size", size)["result"]
        for size in ("64", "7")
    ]
    first, second = (record["checkpoints"]["here"] for record in records)
    assert first["memories"] == ["2"]
    subject = subject_of(branches_run)
    nats, _, _ = of_tokens(without(subject.model, [0]), subject)
    assert first["zeroed"]["nats"][0]["value"] == pytest.approx(nats.mean(), abs=1e-5)
    assert first["zeroed"]["nats"][0]["value"] != pytest.approx(first["normal"]["nats"][0]["value"], abs=1e-2)
    for change in ("normal", "zeroed", "shuffled"):
        for what, tolerance in (("nats", 1e-5), ("difference", 1e-5), ("accuracy", 1e-3)):
            values = [[each["value"] for each in own[change][what]] for own in (first, second)]
            np.testing.assert_allclose(*values, atol=tolerance)


def test_the_page_tells_what_was_done_and_what_is_kept(output: Path) -> None:
    page = (output / "report.html").read_text()
    for told in ("memory before block 1", "kept when zeroed", "facts, exposures 200", "words (acc)", "hot: 10 times"):
        assert told in page


def test_of_what_a_model_never_could_nothing_is_said_to_be_kept(output: Path, result: dict[str, Any]) -> None:
    tasks = {(task["task"], task["group"]): task for task in result["checkpoints"]["here"]["tasks"]}
    recall = tasks["recall", ""]
    assert recall["normal"]["accuracy"]["high"] < recall["chance"]
    rows = re.findall("<tr><td>(.*?)</td>(.*?)</tr>", (output / "report.html").read_text())
    told = dict(rows)
    assert told["recall"].count("<td>a guess") == 2
    assert "a guess" not in told["facts"] + told["brackets"] + told["words (acc)"]


def test_what_cannot_be_asked_is_named(
    memory_run: Path,
    experts_run: Path,
    tasks: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lm_eval.tasks import TaskManager

    def refused(*args: str | Path) -> str:
        command = ["eval", "suppress", "--output", tmp_path / "out", "--names", "a", "--checkpoint", *args]
        assert engram(list(map(str, command))) == 2
        told = capsys.readouterr().err.strip().splitlines()[-1]
        assert told.startswith("error: ")
        return told

    assert "'a' has no memory" in refused(experts_run)
    assert "layers is '0': allowed is one of the memories of 'a': 1" in refused(memory_run, "--layers", "0")
    assert "examples is -1" in refused(memory_run, "--examples", "-1")
    assert "limit is -1" in refused(memory_run, "--limit", "-1")
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))  # or it takes long
    assert "tasks is 'no_task'" in refused(memory_run, "--tasks", "no_task")
    assert "include-path is '/nowhere'" in refused(memory_run, "--tasks", "words", "--include-path", "/nowhere")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    texts = ("--tasks", "texts", "--include-path", tasks, "--tokens", "256")
    assert "'texts' has no metric" in refused(memory_run, *texts)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "engram-moe[eval]" in refused(memory_run, "--tasks", "words", "--include-path", tasks)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_a_memory_is_told_of_beside_one_that_has_it(
    memory_run: Path, experts_run: Path, tmp_path: Path
) -> None:
    several = ("--names", "experts <&>", "hybrid", "--tokens", "1024")
    record = answer_of("suppress", tmp_path, experts_run, "--against", memory_run, *several)
    assert record["result"]["without_memory"] == ["experts <&>"]
    assert list(record["result"]["checkpoints"]) == ["hybrid"]
    assert record["held_out_tokens"] == 1024
    page = (tmp_path / "report.html").read_text()
    assert "nothing to suppress: experts &lt;&amp;&gt;." in page
    assert "1,024" in page


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_losses_without_the_memory_are_the_same_on_a_gpu(told_run: Path, tmp_path: Path) -> None:
    one, other = (
        answer_of("suppress", tmp_path / device, told_run, "--names", "here", "--tokens", "4096", "--device", device)
        for device in ("cpu", "cuda")
    )
    for change in ("normal", "zeroed", "shuffled"):
        nats = [[v["value"] for v in each["result"]["checkpoints"]["here"][change]["nats"]] for each in (one, other)]
        np.testing.assert_allclose(*nats, rtol=1e-3)

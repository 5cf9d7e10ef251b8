"""Our models in lm-evaluation-harness: its numbers are those of the model's own logits, asked one text at a time."""

import copy
import json
import math
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer
from torch import Tensor

import engram
from engram import EngramLM, MemoryTable, ModelConfig, TokenCompressor
from engram.config import ConfigError
from engram.interop.harness import EngramHarness
from engram.training.tokenizer import EOS, train_bpe
from engram.training.weights import save_model

TEXT = "The capital of France is Paris, that of Italy is Rome, and Oslo lies in Norway by the sea. "
QUESTIONS = [
    {"question": "The capital of France is", "choices": ["Paris", "Rome", "Oslo by the sea"], "answer": 0},
    {"question": "Italy:", "choices": ["A", "B", "C"], "answer": 1},
    {"question": "", "choices": ["Oslo lies in Norway", "Rome"], "answer": 0},
]
PROMPTS = [{"prompt": "The capital of"}, {"prompt": "Oslo"}, {"prompt": "Norway, that is where the sea is and"}]
TEXTS = [{"text": TEXT * 2}, {"text": "Paris"}]
LENGTH = 24
ROOT = Path(engram.__file__).parents[1]
# What `lm_eval` runs; the import before it is that of `engram_lm_eval.pth`.
LM_EVAL = "import _engram_lm_eval; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EngramLM, Tokenizer]:
    """An untrained model with rows and weights so large that every difference shows, in a folder."""
    tokenizer = train_bpe(iter([TEXT]), 300)
    config = ModelConfig.from_dict(
        {
            "vocab_size": 300,
            "d_model": 32,
            "n_layers": 2,
            "dense_width": 48,
            "max_seq_len": LENGTH,
            "attention": {"kind": "gqa", "n_heads": 2, "n_kv_heads": 1, "head_dim": 16},
            "experts": {"n_experts": 4, "top_k": 2, "width": 16},
            "memory": {"layers": [0, 1], "n_heads": 2, "row_width": 8, "rows": [97, 131], "eos_id": 1},
        }
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = EngramLM(config, TokenCompressor.from_tokenizer(tokenizer, 300).lookup).eval()
        with torch.no_grad():
            model.head.weight.normal_()
            for part in model.modules():
                if isinstance(part, MemoryTable):
                    part.weight.normal_()
    return save_model(model, tmp_path_factory.mktemp("harness") / "model", None, tokenizer), model, tokenizer


@torch.no_grad()
def log_probs(model: EngramLM, ids: list[int]) -> Tensor:
    """Of each token after the first, given those before it; in document 0 the end-of-text token that begins them."""
    documents = [0] + [1] * (len(ids) - 1) if ids[0] == 1 else [0] * len(ids)
    logits = model(torch.tensor([ids]), torch.tensor([documents]))
    return logits[0].log_softmax(-1)[:-1].gather(-1, torch.tensor(ids[1:]).unsqueeze(-1)).squeeze(-1)


def scored(model: EngramLM, tokenizer: Tokenizer, context: str, continuation: str) -> float:
    """Log-likelihood of a continuation, tokenized together with its context."""
    whole = tokenizer.encode(context + continuation, add_special_tokens=False).ids
    n_context = len(tokenizer.encode(context, add_special_tokens=False).ids)
    ids = (whole if context else [1, *whole])[-LENGTH - 1 :]
    return float(log_probs(model, ids)[-(len(whole) - n_context) :].sum())


def rolled(model: EngramLM, tokenizer: Tokenizer, text: str) -> float:
    """Log-likelihood of a document: the last window is as long as the others, but its first tokens were counted."""
    ids = [1, *tokenizer.encode(text, add_special_tokens=False).ids]
    if len(ids) <= LENGTH + 1:
        return float(log_probs(model, ids).sum())
    total, done = float(log_probs(model, ids[: LENGTH + 1]).sum()), LENGTH + 1
    while done < len(ids):
        end = min(done + LENGTH, len(ids))
        total += float(log_probs(model, ids[end - LENGTH - 1 : end])[-(end - done) :].sum())
        done = end
    return total


@torch.no_grad()
def continued(model: EngramLM, tokenizer: Tokenizer, prompt: str, n: int, stop: str = "") -> str:
    """By the most likely token each time, all computed anew, up to a stop text or the end of the document."""
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids[-(LENGTH - n) :]
    new: list[int] = []
    while len(new) < n:
        token = int(model(torch.tensor([ids + new]))[0, -1].argmax())
        if token == 1:
            break
        new.append(token)
    return tokenizer.decode(new).partition(stop)[0] if stop else tokenizer.decode(new)


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=given, idx=i) for i, given in enumerate(arguments)]


TASKS = {
    "capitals": (
        QUESTIONS,
        "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{answer}}'\nmetric_list: [{metric: acc}]",
    ),
    "texts": (
        TEXTS,
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: bits_per_byte}]",
    ),
    "continuations": (
        PROMPTS,
        "output_type: generate_until\ndoc_to_text: '{{prompt}}'\ndoc_to_target: ''\nmetric_list: [{metric: bypass}]\n"
        "generation_kwargs: {until: ['e'], max_gen_toks: 8}",
    ),
}


def test_the_command_gives_the_numbers_of_the_models_own_logits(
    saved: tuple[Path, EngramLM, Tokenizer], tmp_path: Path
) -> None:
    folder, model, tokenizer = saved
    for name, (rows, settings) in TASKS.items():
        data = tmp_path / f"{name}.jsonl"
        data.write_text("\n".join(map(json.dumps, rows)))
        dataset = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: '{data}'}}}}\ntest_split: test"
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{dataset}\n{settings}\n")
    command = [sys.executable, "-c", LM_EVAL, "--model", "engram", "--model_args", f"path={folder}"]
    command += ["--tasks", ",".join(TASKS), "--include_path", str(tmp_path), "--batch_size", "2"]
    command += ["--log_samples", "--output_path", str(tmp_path / "out")]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "packaging"))),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    samples = {}
    for name in TASKS:
        (path,) = (tmp_path / "out").rglob(f"samples_{name}_*.jsonl")
        samples[name] = sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    (path,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(path.read_text())["results"]

    best = []
    for sample, row in zip(samples["capitals"], QUESTIONS, strict=True):
        expected = [scored(model, tokenizer, row["question"], " " + choice) for choice in row["choices"]]
        assert [float(score) for ((score, _),) in sample["resps"]] == pytest.approx(expected, abs=1e-4)
        best.append(expected.index(max(expected)) == row["answer"])
    assert results["capitals"]["acc,none"] == pytest.approx(sum(best) / len(best))
    expected = [rolled(model, tokenizer, row["text"]) for row in TEXTS]
    assert [float(sample["resps"][0][0]) for sample in samples["texts"]] == pytest.approx(expected, abs=1e-4)
    n_bytes = sum(len(row["text"].encode()) for row in TEXTS)
    assert results["texts"]["bits_per_byte,none"] == pytest.approx(-sum(expected) / n_bytes / math.log(2), rel=1e-5)
    for sample, row in zip(samples["continuations"], PROMPTS, strict=True):
        assert sample["resps"][0][0] == continued(model, tokenizer, row["prompt"], 8, "e")


def test_numbers_do_not_depend_on_the_size_of_a_batch(saved: tuple[Path, EngramLM, Tokenizer]) -> None:
    folder, model, tokenizer = saved
    pairs = [(" ".join(TEXT.split()[:n]), " " + word) for n in (1, 4, 9, 16, 17) for word in ("Rome", "sea", TEXT[:40])]
    pairs += [("", "Oslo"), ("", f"Oslo{EOS}Rome")]
    prompts = [(TEXT[:n], {"until": [], "max_gen_toks": 6}) for n in (3, 20, 33, 90)]
    answers, texts = [], []
    for batch_size in (1, 3, "auto"):
        tables = "disk" if batch_size == 3 else "device"
        harness = EngramHarness(path=str(folder), batch_size=batch_size, device="cpu", tables=tables)
        answers.append(harness.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True))
        texts.append(harness.generate_until(requests("generate_until", *prompts), disable_tqdm=True))
    scores = [[score for score, _ in given] for given in answers]
    assert scores[1] == pytest.approx(scores[0], abs=1e-4)
    assert scores[2] == pytest.approx(scores[0], abs=1e-4)
    assert len({tuple(greedy for _, greedy in given) for given in answers}) == 1
    assert texts[0] == texts[1] == texts[2]
    assert scores[0][:-1] == pytest.approx([scored(model, tokenizer, *pair) for pair in pairs[:-1]], abs=1e-4)


def test_texts_go_on_within_the_models_length_and_to_the_end_of_the_document(
    saved: tuple[Path, EngramLM, Tokenizer],
) -> None:
    folder, _, tokenizer = saved
    harness = EngramHarness(path=str(folder), batch_size=3, device="cpu")
    prompts, lengths = [TEXT[:n] for n in (3, 20, 33, 60, 90)], {6: 6, 40: LENGTH // 2}
    for boost in (1.0, 4.0):  # of the end-of-text token
        with torch.no_grad():
            harness.model.head.weight[1] *= boost
        for asked, given in lengths.items():
            pairs = [(prompt, {"until": [], "max_gen_toks": asked}) for prompt in prompts]
            found = harness.generate_until(requests("generate_until", *pairs), disable_tqdm=True)
            assert found == [continued(harness.model, tokenizer, prompt, given) for prompt in prompts]
    n_tokens = [len(harness.tok_encode(text)) for text in found]
    assert min(n_tokens) < LENGTH // 2 - 2  # some ended


def test_a_tokenizer_other_than_the_models_is_refused(saved: tuple[Path, EngramLM, Tokenizer]) -> None:
    with pytest.raises(ConfigError, match="the tokenizer given has sha256"):
        EngramHarness(path=str(saved[0]), device="cpu", tokenizer=train_bpe(iter(["quite another text"]), 300))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_texts_are_scored_and_written_in_narrow_types_too(saved: tuple[Path, EngramLM, Tokenizer], dtype: str) -> None:
    folder, model, tokenizer = saved
    harness = EngramHarness(path=str(folder), device="cpu", batch_size=2, dtype=dtype)
    pair = requests("loglikelihood", ("The capital of", " Rome"))
    ((score, _),) = harness.loglikelihood(pair, disable_tqdm=True)
    assert score == pytest.approx(scored(model, tokenizer, "The capital of", " Rome"), rel=2e-2)
    asked = [(row["prompt"], {"until": [], "max_gen_toks": 8}) for row in PROMPTS]
    found = harness.generate_until(requests("generate_until", *asked), disable_tqdm=True)
    # The likeliest token by far does not change with the type.
    first = [continued(model, tokenizer, row["prompt"], 1) for row in PROMPTS]
    assert [text.startswith(start) for text, start in zip(found, first, strict=True)] == [True] * len(PROMPTS)


def test_a_continuation_is_greedy_if_each_of_its_tokens_is_the_most_likely(
    saved: tuple[Path, EngramLM, Tokenizer],
) -> None:
    folder, model, tokenizer = saved
    harness = EngramHarness(path=str(folder), device="cpu")
    context = tokenizer.encode("The capital of", add_special_tokens=False).ids
    with torch.no_grad():
        best = [int(model(torch.tensor([context]))[0, -1].argmax())]
        best.append(int(model(torch.tensor([context + best]))[0, -1].argmax()))
    others = [[best[0], best[1] - 1], [best[0] - 1, best[1]], best[:1]]
    answers = harness._loglikelihood_tokens([(None, context, tokens) for tokens in (best, *others)], disable_tqdm=True)
    assert [greedy for _, greedy in answers] == [True, False, False, True]


def test_a_text_after_the_end_of_another_is_scored_as_if_alone(saved: tuple[Path, EngramLM, Tokenizer]) -> None:
    """As documents in training: by attention, N-grams and convolution it sees nothing of what was before."""
    folder, _, tokenizer = saved
    harness = EngramHarness(path=str(folder), device="cpu")
    pairs = [("", "Rome by the sea"), (f"Paris is in{EOS}", "Rome by the sea"), ("Paris is in", "Rome by the sea")]
    alone, after, inside = (score for score, _ in harness.loglikelihood(requests("loglikelihood", *pairs), True))
    # Only the first token is predicted from another context.
    token = tokenizer.decode(harness.tok_encode("Rome by the sea")[:1])
    first = [("", token), (f"Paris is in{EOS}", token)]
    first_alone, first_after = (score for score, _ in harness.loglikelihood(requests("loglikelihood", *first), True))
    assert after - first_after == pytest.approx(alone - first_alone, abs=1e-4)
    assert abs(inside - alone) > 0.1


def test_texts_are_drawn_by_the_settings_of_a_task(saved: tuple[Path, EngramLM, Tokenizer]) -> None:
    folder, _, _ = saved
    harness = EngramHarness(path=str(folder), device="cpu", batch_size=8)

    def drawn(**settings: Any) -> list[str]:
        torch.manual_seed(0)
        asked = [("The capital of", {"until": [], "max_gen_toks": 6, **settings})] * 4
        return harness.generate_until(requests("generate_until", *asked), disable_tqdm=True)

    assert len(set(drawn())) == len(set(drawn(do_sample=False, temperature=2.0))) == 1
    assert len(set(drawn(do_sample=True, temperature=1.0))) > 1
    assert drawn(do_sample=True, temperature=1.0) == drawn(temperature=1.0)
    assert drawn(do_sample=True, top_k=1) == drawn()
    assert drawn(num_beams=1) == drawn(top_p=None, do_sample=None) == drawn()
    assert drawn(do_sample=None, temperature=1.0) == drawn(temperature=1.0)
    with pytest.raises(ConfigError, match="generation setting num_beams is 4"):
        drawn(num_beams=4)


def test_what_cannot_be_evaluated_is_named(saved: tuple[Path, EngramLM, Tokenizer], tmp_path: Path) -> None:
    folder, model, tokenizer = saved
    bare = save_model(model, tmp_path / "bare")
    with pytest.raises(ConfigError, match="bare' holds no tokenizer"):
        EngramHarness(path=str(bare))
    assert EngramHarness(path=str(bare), tokenizer=str(folder)).eot_token_id == tokenizer.token_to_id(EOS)
    with pytest.raises(ConfigError, match=r"data\.eos_token is '<nothing>'"):
        EngramHarness(path=str(folder), eos_token="<nothing>")
    with pytest.raises(ConfigError, match="dtype is 'int4': allowed is one of float32"):
        EngramHarness(path=str(folder), dtype="int4")
    wrong: dict[str, Any] = {"max_length": "x", "batch_size": "x", "max_batch_size": 0, "cache_rows": -1}
    for name, value in wrong.items():
        with pytest.raises(ConfigError, match=rf"{name} is {value!r}: allowed is \d or more"):
            EngramHarness(path=str(folder), device="cpu", **{name: value})
    harness = EngramHarness(path=str(folder), device="cpu", max_length="12", batch_size="2")
    assert (harness.max_length, harness.batch_size) == (12, 2)


def test_questions_without_an_answer_and_conversations_are_refused(saved: tuple[Path, EngramLM, Tokenizer]) -> None:
    """An end-of-text token without context is itself the context."""
    harness = EngramHarness(path=str(saved[0]), device="cpu")
    for context, continuation in (("", ""), ("Rome", ""), ("", EOS)):
        with pytest.raises(ConfigError, match=r"continuation is (''|0): allowed is"):
            harness.loglikelihood(requests("loglikelihood", (context, continuation)), disable_tqdm=True)
    with pytest.raises(ConfigError, match="apply_chat_template is set"):
        harness.apply_chat_template([{"role": "user", "content": "Rome"}])


def test_a_batch_of_as_many_tokens_as_fit_is_bounded_by_its_largest_size(
    saved: tuple[Path, EngramLM, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, _ = saved
    sizes: dict[int | None, list[int]] = {}
    for most in (None, 2):
        harness = EngramHarness(path=str(folder), device="cpu", batch_size="auto", max_batch_size=most)
        run, seen = harness.model.run, sizes.setdefault(most, [])

        def counted(ids: Tensor, *given: Any, run: Any = run, seen: list[int] = seen) -> Any:
            seen.append(len(ids))
            return run(ids, *given)

        monkeypatch.setattr(harness.model, "run", counted)
        pairs = [("Paris", f" {word}") for word in ("A B", "C D", "E F", "G H", "I J")]
        harness.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    assert sizes == {None: [5], 2: [2, 2, 1]}


def test_an_open_model_is_asked_as_it_is_at_that_moment_and_no_file_is_read(
    saved: tuple[Path, EngramLM, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model, tokenizer = saved
    pairs = requests("loglikelihood", ("The capital of", " Rome"), ("", "Oslo"))

    def scores(harness: EngramHarness) -> list[float]:
        return [score for score, _ in harness.loglikelihood(pairs, disable_tqdm=True)]

    expected = scores(EngramHarness(path=str(folder), device="cpu"))
    monkeypatch.setattr("engram.interop.harness.open_model", None)
    own = copy.deepcopy(model).train()
    harness = EngramHarness(model=own, tokenizer=tokenizer, batch_size=2)
    assert harness.model is own
    assert not own.training
    assert scores(harness) == pytest.approx(expected, abs=1e-4)
    with torch.no_grad():
        own.head.weight *= 2
    assert scores(harness) != pytest.approx(expected, abs=1e-1)


def test_an_open_model_stays_where_it_is_and_takes_the_place_of_a_path(
    saved: tuple[Path, EngramLM, Tokenizer],
) -> None:
    folder, model, tokenizer = saved
    refused: dict[str, Any] = {"device": "cpu", "tables": "host", "cache_rows": 5, "rows": "int8"}
    for name, value in refused.items():
        with pytest.raises(ConfigError, match=f"{name} is {value!r}: allowed is .* an open model stays where"):
            EngramHarness(model=model, tokenizer=tokenizer, **{name: value})
    with pytest.raises(ConfigError, match="'an open model' holds no tokenizer: name one by tokenizer="):
        EngramHarness(model=model)
    assert EngramHarness(model=model, tokenizer=str(folder)).eot_token_id == tokenizer.token_to_id(EOS)
    for given in ({}, {"path": str(folder), "model": model}):
        with pytest.raises(ConfigError, match=r"path is '.*': allowed is the model's, or none beside a model"):
            EngramHarness(tokenizer=tokenizer, **given)


def test_requests_that_are_kept_are_told_apart_by_their_tokenizer(saved: tuple[Path, EngramLM, Tokenizer]) -> None:
    folder, model, tokenizer = saved
    names = [
        harness.tokenizer_name
        for harness in (
            EngramHarness(path=str(folder), device="cpu"),
            EngramHarness(model=model, tokenizer=tokenizer),
            EngramHarness(model=model, tokenizer=train_bpe(iter([TEXT]), 280)),
        )
    ]
    assert names[0] == names[1] != names[2]


def in_python(code: str, *paths: Path, options: tuple[str, ...] = ()) -> str:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, *options, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_the_model_is_known_however_the_harness_is_found_and_is_not_imported_before_it_is_asked_for() -> None:
    known = (
        "from lm_eval.api.registry import model_registry; print('engram' in model_registry, 'engram' in sys.modules)"
    )
    first = "import importlib.util, sys, _engram_lm_eval; "
    for before in ("", "importlib.util.find_spec('lm_eval.models'); "):
        assert in_python(first + before + "import lm_eval.models; " + known, ROOT / "packaging") == "True False"


def test_a_harness_that_finds_plugins_by_itself_finds_ours_before_and_after_us() -> None:
    """As one might: entry points are put into the list, and the class is there when it is asked for."""
    add = (
        "import _engram_lm_eval\n"
        "from importlib.metadata import EntryPoint; from lm_eval.api.registry import get_model, model_registry\n"
        "model_registry.register('engram', target=EntryPoint('engram', '{}', 'lm_eval.models'))\n"
    ).format("engram.interop.harness:EngramHarness")
    ask = "print(get_model('engram').__name__)"
    assert in_python(add + "import lm_eval.models\n" + ask, ROOT, ROOT / "packaging") == "EngramHarness"
    assert in_python("import lm_eval.models\n" + add + "print('added')", ROOT / "packaging") == "added"


def test_a_harness_of_another_kind_is_left_alone(tmp_path: Path) -> None:
    """Versions before 0.4.10 have another registry."""
    for folder in ("lm_eval", "lm_eval/models", "lm_eval/api"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("")
    (tmp_path / "lm_eval" / "api" / "registry.py").write_text("MODEL_REGISTRY = {}")
    code = "import _engram_lm_eval, lm_eval.models; print(lm_eval.__file__)"
    assert in_python(code, ROOT / "packaging", tmp_path) == str(tmp_path / "lm_eval" / "__init__.py")


def test_the_line_at_pythons_start_costs_little_and_fails_in_silence(tmp_path: Path) -> None:
    line = (ROOT / "packaging" / "engram_lm_eval.pth").read_text()
    assert line.count("\n") == 1
    assert line.startswith("import ")  # other lines of such a file are taken for folders
    imported = "import sys; before = set(sys.modules)\n" + line + "print(sorted(set(sys.modules) - before))"
    # Without what is installed, which may be an older copy.
    assert in_python(imported, ROOT / "packaging", options=("-S",)) == "['_engram_lm_eval']"
    assert in_python(imported, tmp_path, options=("-S",)) == "[]"


def test_the_entry_point_by_which_the_harness_finds_plugins_leads_to_the_model() -> None:
    """`lm_eval.models`, as asked for in the harness's issue 3282."""
    import tomllib

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (name, value), *others = declared["project"]["entry-points"]["lm_eval.models"].items()
    assert (name, others) == ("engram", [])
    assert EntryPoint(name, value, "lm_eval.models").load() is EngramHarness

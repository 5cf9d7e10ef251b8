"""Cost: FLOPs against torch's counter, bytes against the tensors that operators get, times for their presence."""

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from asking import answer_of
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from trained import MODELS

from engram.backbone import DecodingState, EngramLM
from engram.cli import main as engram
from engram.config import ModelConfig
from eval.cost import QUESTION, median_of
from eval.shared.serving import alternate, decode, prefill
from eval.shared.work import bytes_read, decoding_flops, prefill_flops

LATENT = {"kind": "mla", "n_heads": 2, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8}
CASES: dict[str, dict[str, Any]] = {
    **MODELS,
    "latent attention": {**MODELS["memory"], "attention": {**LATENT, "v_head_dim": 12}},
    "tied": {**MODELS["experts"], "tied": True},
    "half": MODELS["memory"],
}
T = 21


def model_of(case: str) -> EngramLM:
    model = EngramLM(ModelConfig.from_dict(CASES[case])).eval()
    return model.to(torch.bfloat16) if case == "half" else model


def ids_of(sequences: int) -> torch.Tensor:
    return torch.randint(512, (sequences, T + 1))


def elementwise(config: ModelConfig) -> int:
    """FLOPs of a token that torch's counter has no rule for: weighting experts, gates, convolutions, what reads from
    branches, and what writes to them."""
    assert config.experts is not None
    D, M = config.d_model, config.branches
    flops = 2 * config.experts.top_k * D * config.n_moe_layers
    flops += 2 * config.n_layers * 4 * M * D if M > 1 else 0
    layers = len(config.memory.layers) if config.memory is not None and config.has_memory else 0
    return flops + layers * (2 * M * D + 2 * 4 * M * D)


def attention_flops(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


COUNTED_TOO = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}


@pytest.mark.parametrize("case", [case for case in CASES if case != "half"])
def test_flops_are_those_that_torch_counts(case: str) -> None:
    """Exactly, the elementwise ones set apart."""
    model, ids = model_of(case), ids_of(2)
    with FlopCounterMode(display=False, custom_mapping=COUNTED_TOO) as reading:
        state, _ = prefill(model, ids[:, :T], 1)
    expected = (prefill_flops(model.config, T) - elementwise(model.config)) * 2 * T
    assert reading.get_total_flops() == pytest.approx(expected, rel=1e-12)
    with FlopCounterMode(display=False, custom_mapping=COUNTED_TOO) as writing:
        decode(model, ids[:, T:], state)  # the last token there is room for: it sees T + 1 positions
    assert writing.get_total_flops() == (decoding_flops(model.config, T + 1) - elementwise(model.config)) * 2


class Touched(TorchDispatchMode):
    """What operators are given of a model's weights and of a state: whole tensors, but of tables and experts what the
    ids beside them pick."""

    def __init__(self, model: EngramLM, state: DecodingState | None = None) -> None:
        super().__init__()
        self.weights = {p.untyped_storage().data_ptr(): p for p in model.parameters()}
        caches = [] if state is None else [x for block in state.blocks for x in block.tensors]
        self.caches = {x.untyped_storage().data_ptr(): x for x in caches}
        self.whole: dict[int, int] = {}
        self.rows, self.experts, self.cache = 0, 0, dict[int, int]()
        self.window = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        name = str(func)
        if name in ("aten.embedding.default", "engram.gather_rows.default"):
            weight, picked = tensors
            self.rows += picked.numel() * weight[0].nbytes
        elif name == "engram.grouped_swiglu.default":
            *_, ends, w_gate_up, w_down = tensors  # where each expert's rows end
            used = int((ends.diff(prepend=ends.new_zeros(1)) > 0).sum())
            self.experts += used * (w_gate_up[0].nbytes + w_down[0].nbytes)
        else:
            for x in tensors:
                at = x.untyped_storage().data_ptr()
                if at in self.weights:
                    self.whole[at] = self.weights[at].nbytes
                if at in self.caches:
                    self.cache[at] = self.caches[at].nbytes
            if name == "engram.fuse_memory.default" and len(tensors) == 9:
                self.window += sum(x.nbytes for x in tensors[-2:])  # the past values and their scales
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sequences", [1, 3])
def test_bytes_are_those_of_the_tensors_that_operators_touch(case: str, sequences: int) -> None:
    model, ids = model_of(case), ids_of(sequences)
    with Touched(model) as reading:
        state, loads = prefill(model, ids[:, :T], 1)
    found = bytes_read(model, sequences * T, sum(int((load > 0).sum()) for load in loads))
    assert found.weights == sum(reading.whole.values()) + reading.experts
    assert found.rows == (reading.rows if case != "tied" else 0)  # a tied embedding is read whole, by the head
    assert found.cache == 0
    with Touched(model, state) as writing:
        (loads,) = decode(model, ids[:, T:], state)
    found = bytes_read(model, sequences, sum(int((load > 0).sum()) for load in loads), T, state)
    assert found.weights == sum(writing.whole.values()) + writing.experts
    assert found.rows == (writing.rows if case != "tied" else 0)
    before = sum(writing.cache.values()) * T / (T + 1)  # the last position is the token's own
    assert len(writing.cache) == (3 if case == "latent attention" else 6)
    assert found.cache == pytest.approx(before + writing.window)
    assert (writing.window > 0) == model.config.has_memory
    assert writing.experts < sum(p.nbytes for n, p in model.named_parameters() if ".experts." in n)


def test_sides_take_turns_and_warming_up_is_not_kept() -> None:
    calls: list[tuple[str, int]] = []
    sides = {name: [lambda i, name=name: calls.append((name, i))] for name in "ab"}
    seconds = alternate(sides, 3, torch.device("cpu"), "")
    assert calls == [("b", 0), ("a", 0), ("a", 1), ("b", 1), ("b", 2), ("a", 2), ("a", 3), ("b", 3)]
    assert {name: own.shape for name, own in seconds.items()} == {"a": (3, 1), "b": (3, 1)}


@pytest.mark.parametrize("n", [6, 7, 15, 40])
def test_intervals_of_medians_hold_them_as_often_as_they_say(n: int) -> None:
    """Of a skew distribution, as timings are. Leaving out k values on each side, the chance is 1 - 2 P(X <= k) of a
    binomial X; of those of 95 % or more it is to be the least, which belongs to the narrowest interval."""
    generator = np.random.default_rng(0)
    found = [median_of(generator.exponential(size=n)) for _ in range(2000)]
    held = np.mean([each.low <= np.log(2) <= each.high for each in found])
    chances = 1 - 2 * stats.binom.cdf(np.arange(n), n, 0.5)
    assert held == pytest.approx(min(chances[chances >= 0.95]), abs=0.015)


@pytest.fixture(scope="module")
def output(memory_run: Path, experts_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cost")
    options = ("--lengths", "8", "32", "--sequences", "2", "--new-tokens", "3", "--rounds", "6")
    answer_of("cost", folder, memory_run, "--against", experts_run, "--names", "memory", "experts", *options)
    return folder


def test_every_case_is_measured_for_every_checkpoint(output: Path, memory_run: Path) -> None:
    result = json.loads((output / "cost.json").read_text())["result"]
    told = [(case["phase"], case["sequences"], case["length"]) for case in result["cases"]]
    assert told == [("prefill", 2, 8), ("decoding", 2, 8), ("prefill", 2, 32), ("decoding", 2, 32)]
    for case in result["cases"]:
        tokens = case["sequences"] * (case["length"] if case["phase"] == "prefill" else 3)
        for name in ("memory", "experts"):
            answer = case["checkpoints"][name]
            speed = answer["tokens_per_s"]
            assert 0 < speed["low"] <= speed["value"] <= speed["high"]
            assert len(answer["seconds"]) == 6
            assert speed["value"] == pytest.approx(np.median(tokens / np.array(answer["seconds"])))
            first = case["checkpoints"]["memory"]["seconds"]
            ratio = np.median(np.array(first) / np.array(answer["seconds"]))
            assert answer["over_first"]["value"] == pytest.approx(ratio)
    recorded = json.loads((memory_run / "result.json").read_text())["val"]["nats"]
    assert result["checkpoints"]["memory"]["loss"] == recorded


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's high-water marks")
def test_peaks_hold_the_model_and_grow_with_the_prompt(output: Path) -> None:
    result = json.loads((output / "cost.json").read_text())["result"]
    for name, memory in result["memory"].items():
        assert memory["model"] > result["checkpoints"][name]["parameter_bytes"]
        short, long = memory["cases"]
        assert (short["length"], long["length"]) == (8, 32)
        assert long["prefill"] >= short["prefill"] > result["checkpoints"][name]["parameter_bytes"]
        assert short["decoding"] > 0


def test_the_section_tells_costs_beside_losses(output: Path) -> None:
    page = (output / "report.html").read_text()
    loss = json.loads((output / "cost.json").read_text())["result"]["checkpoints"]["memory"]["loss"]
    for told in (f"<td>{loss:.4f}</td>", "Prefill", "Decoding, 3 tokens", "2 x 32", "peak memory", "over memory"):
        assert told in page


def test_losses_that_are_not_drawn_are_told_of(output: Path) -> None:
    def panels_and_page(**changes: dict[str, Any]) -> tuple[int, str]:
        result = json.loads((output / "cost.json").read_text())["result"]
        for name, changed in changes.items():
            result["checkpoints"][name] |= changed
        figure = QUESTION.draw(result)
        plt.close(figure)
        return len(figure.axes), QUESTION.tables(result)

    panels, page = panels_and_page()
    assert (panels, "drawn against costs" in page) == (6, False)
    panels, page = panels_and_page(experts={"corpus": "another"})
    assert (panels, "memory and experts were trained and validated on different corpora" in page) == (3, True)
    nothing = {"loss": None, "corpus": None}
    panels, page = panels_and_page(experts=nothing)
    assert (panels, "Losses drawn against costs leave out experts: " in page) == (6, True)
    panels, page = panels_and_page(memory=nothing, experts=nothing)
    assert (panels, "No loss is drawn against costs: the loss of the run" in page) == (3, True)


def test_impossible_cases_are_refused(memory_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option, value in (("lengths", "0"), ("sequences", "0"), ("new-tokens", "0"), ("rounds", "5")):
        assert engram(["eval", "cost", "--checkpoint", str(memory_run), f"--{option}", value]) == 2
        assert f"{option} is" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_is_timed_and_its_memory_measured(memory_run: Path, tmp_path: Path) -> None:
    options = ("--device", "cuda", "--lengths", "32", "--sequences", "2", "--new-tokens", "3", "--rounds", "6")
    result = answer_of("cost", tmp_path, memory_run, *options)["result"]
    ((name, held),) = result["checkpoints"].items()
    memory = result["memory"][name]
    assert memory["cases"][0]["prefill"] >= memory["model"] >= held["parameter_bytes"]
    assert all(case["checkpoints"][name]["tokens_per_s"]["low"] > 0 for case in result["cases"])

"""A training run: what it computes, logs and leaves, and how it says no."""

import json
import math
import re
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import yaml
from small_run import MODEL, Run, read_checkpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from engram.backbone import EngramLM
from engram.config import ModelConfig, build_config
from engram.experts import MoE
from engram.parallel.checkpoint import last_checkpoint, load
from engram.training import module
from engram.training.data import DataConfig, TokenData
from engram.training.module import merged

Train = Callable[..., Run]
EXACT = {"trainer__precision": "32-true"}


@pytest.fixture
def data(settings: dict[str, Any]) -> TokenData:
    return TokenData(build_config(DataConfig, settings["data"]["config"]))


def model_of(checkpoint: Path, data: TokenData) -> EngramLM:
    """The model of a checkpoint, in float64."""
    built = EngramLM(ModelConfig.from_dict(MODEL), data.compressor().lookup)
    load(checkpoint, built)
    return built.double()


def nats(model: EngramLM, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of every target, from the logits."""
    with torch.no_grad():
        logits = model(batch["tokens"], batch["document_ids"])
    return F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="none")


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_the_training_loss_is_the_mean_cross_entropy_of_the_steps_batch(train: Train, data: TokenData) -> None:
    run = train(**EXACT)
    expected = nats(model_of(run.folder / "step-4", data), data.train_batch(4)).mean()
    assert run.column("train/loss")[4] == pytest.approx(expected.item(), rel=1e-5)


def test_validation_is_nats_a_token_and_bits_a_byte_in_total_and_by_kind(train: Train, data: TokenData) -> None:
    run = train(**EXACT)
    model = model_of(run.folder / "step-4", data)
    batches = list(data.val_dataloader())
    losses = torch.cat([nats(model, batch) for batch in batches])
    n_bytes = torch.cat([batch["target_bytes"].flatten() for batch in batches])
    domains = torch.cat([batch["domains"].flatten() for batch in batches])
    repeated = torch.cat([batch["repeated"].flatten() for batch in batches])
    kinds = {"": domains >= 0, "_code": domains == 0, "_prose": domains == 1}
    kinds |= {"_new": repeated == 0, "_repeated": repeated == 1}
    assert all(chosen.any() for chosen in kinds.values())
    expected = {"step": 4, "tokens": 4 * 64}
    for name, chosen in kinds.items():
        expected[f"nats{name}"] = losses[chosen].mean().item()
        expected[f"bits_per_byte{name}"] = losses[chosen].sum().item() / math.log(2) / n_bytes[chosen].sum().item()
    assert run.result["history"][0] == pytest.approx(expected, rel=1e-5)
    assert len(losses) == 320


def test_the_routers_bias_moves_against_the_load_of_all_micro_batches_of_a_step(
    train: Train, data: TokenData, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Tensor] = []
    update = MoE.update_balance

    def note_and_update(self: MoE, load_E: Tensor) -> None:
        told.append(load_E)
        update(self, load_E)

    monkeypatch.setattr(MoE, "update_balance", note_and_update)
    run = train(**EXACT, trainer__accumulate_grad_batches=2, checkpoint_every=1, trainer__val_check_interval=16)
    before, after = (model_of(run.folder / f"step-{n}", data) for n in (1, 2))
    batches = [data.train_batch(step) for step in (2, 3)]
    load = sum(before.float().run(b["tokens"], b["document_ids"]).routing[0].load_E for b in batches)
    assert isinstance(load, Tensor)
    assert len(told) == 8
    assert torch.equal(told[1], load)
    assert load.sum() == 2 * 64 * 2  # two batches of 64 tokens, each with two experts
    moved = after.moe_layers()[0].router.bias - before.moe_layers()[0].router.bias
    expected = 0.01 * torch.sign(load.double().mean() - load)
    torch.testing.assert_close(moved.double(), expected, atol=1e-7, rtol=0)


def test_two_micro_batches_are_one_batch_of_twice_the_size(train: Train) -> None:
    """Weights are not compared: Adam's first steps turn rounding near 0 into whole learning rates."""
    kept = {**EXACT, "trainer__max_steps": 4, "checkpoint_every": 1}
    parts = train("parts", trainer__accumulate_grad_batches=2, trainer__val_check_interval=8, **kept)
    whole = train("whole", data__config__batch_size=8, **kept)
    assert parts.column("train/grad_norm")[0] == pytest.approx(whole.column("train/grad_norm")[0], rel=1e-5)
    biases = [read_checkpoint(run.folder / "step-1")["tensors"] for run in (parts, whole)]
    name = "model.blocks.1.ffn.router.bias"
    assert torch.equal(biases[0][name], biases[1][name])
    assert parts.result["tokens"] == whole.result["tokens"] == 4 * 8 * 16
    assert [entry["tokens"] for entry in parts.result["history"]] == [4 * 8 * 16]


@pytest.mark.parametrize(("flag", "bound"), [(None, 0.25), (0.5, 0.5)])
def test_gradients_are_clipped_to_the_config_or_to_lightnings_flag(
    train: Train, monkeypatch: pytest.MonkeyPatch, flag: float | None, bound: float
) -> None:
    norms: list[float] = []
    clip = module.clip_gradients

    def clip_and_look(model: Any, bound: float) -> Tensor:
        before = clip(model, bound)
        norms.append(clip(model, 0.0).item())
        return before

    monkeypatch.setattr(module, "clip_gradients", clip_and_look)
    more = {} if flag is None else {"flags": ("--trainer.gradient_clip_val", str(flag))}
    run = train(model__optim__clip=0.25, **more)
    assert all(norm > bound for norm in run.column("train/grad_norm").values())
    assert norms == pytest.approx([bound] * 8, rel=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_windows(
    train: Train, data: TokenData, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = train("sound").folder
    checkpoint = read_checkpoint(sound / "step-4")
    checkpoint["tensors"]["model.norm.weight"][3] = torch.nan
    shutil.copytree(sound / "step-4", sound / "broken")
    dcp.save(checkpoint["tensors"], checkpoint_id=sound / "broken", no_dist=True)
    capsys.readouterr()
    run = train("stopped", resume=sound / "broken")
    assert run.code == 3
    said = last_line(capsys)
    found = re.fullmatch(
        r"stopped: training loss is nan at step 4, batch 4 \(windows (.*) of the training split\)", said
    )
    assert found, said
    stream = torch.from_numpy(data._train.tokens.astype("int64"))
    windows = [stream[16 * w : 16 * w + 16] for w in map(int, found[1].split(", "))]
    assert torch.equal(torch.stack(windows), data.train_batch(4)["tokens"])
    assert not (run.folder / "result.json").exists()
    assert last_checkpoint(run.folder / "checkpoints") is None


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights_move(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loss = module.mean_loss

    def broken_loss(hidden: Tensor, head_weight: Tensor, targets: Tensor) -> Tensor:
        hidden.register_hook(lambda gradient: gradient * torch.inf)
        return loss(hidden, head_weight, targets)

    monkeypatch.setattr(module, "mean_loss", broken_loss)
    assert train().code == 3
    assert re.match(r"stopped: gradient norm is (nan|inf) at step 0, batch 0 \(windows ", last_line(capsys))


def test_every_group_follows_its_own_schedule(train: Train) -> None:
    flags = (
        '--model.optim.schedule={"warmup": 0.5, "decay": 0.5}',
        '--model.optim.table_schedule={"kind": "step", "warmup": 0.0, "milestones": [0.5], "factor": 0.1}',
    )
    run = train(flags=flags, model__optim__lr=0.004)
    assert list(run.column("lr/tables").values()) == pytest.approx([0.02] * 4 + [0.002] * 4)
    for name in ("matrices", "embeddings", "vectors"):
        expected = [0.001, 0.002, 0.003, 0.004, 0.004, 0.003, 0.002, 0.001]
        assert list(run.column(f"lr/{name}").values()) == pytest.approx(expected)


def test_logs_hold_loss_gates_loads_and_speed_in_csv_and_tensorboard(train: Train) -> None:
    run = train()
    header = (run.folder / "metrics.csv").read_text().splitlines()[0].split(",")
    names = {"train/loss", "train/grad_norm", "gate/block_1", "lr/tables", "speed/tokens_per_s", "speed/flops_per_s"}
    names |= {"experts/0_max_load", "experts/0_entropy", "experts/0_dropped"}
    kinds = ("", "_code", "_prose", "_new", "_repeated")
    names |= {f"val/{what}{kind}" for what in ("nats", "bits_per_byte") for kind in kinds}
    assert names <= set(header)
    board = EventAccumulator(str(run.folder / "tb"))
    board.Reload()
    assert names <= set(board.Tags()["scalars"])
    losses = [event.value for event in board.Scalars("train/loss")]
    assert losses == pytest.approx(list(run.column("train/loss").values()))
    assert all(0 < gate < 1 for gate in run.column("gate/block_1").values())
    assert all(1 <= load <= 6 / 2 for load in run.column("experts/0_max_load").values())
    assert all(0 < entropy <= math.log(6) + 1e-6 for entropy in run.column("experts/0_entropy").values())


def test_a_finished_run_leaves_its_result_progress_and_settings(train: Train, data: TokenData) -> None:
    run = train(flags=("--model.overrides.experts.top_k", "1"))
    result = run.result
    assert result["val"] == result["history"][-1]
    assert [entry["step"] for entry in result["history"]] == [4, 8]
    assert result["val"]["tokens"] == result["tokens"] == 8 * 64
    assert result["data"]["corpus_hash"] == data.corpus_hash
    assert ModelConfig.from_dict(result["model"]) == ModelConfig.from_dict(
        MODEL | {"experts": MODEL["experts"] | {"top_k": 1}}  # type: ignore[operator]
    )
    assert (result["seed"], result["optim"]["lr"], result["data"]["config"]["seed"]) == (3, 0.003, 0)
    assert result["tokens_per_s"] > 0
    assert result["versions"]["torch"] == torch.__version__
    assert result["versions"]["engram"] == metadata.version("engram-moe")
    progress = json.loads((run.folder / "progress.json").read_text())
    assert {key: progress[key] for key in ("step", "steps", "tokens")} == {"step": 8, "steps": 8, "tokens": 512}
    assert progress["loss"] == run.column("train/loss")[7]
    saved = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert saved["model"]["overrides"] == {"experts.top_k": 1}
    files = {"config.yaml", "metrics.csv", "progress.json", "result.json", "run.yaml", "checkpoints", "model", "tb"}
    assert {path.name for path in run.folder.iterdir() if not path.name.startswith("step-")} == files


def test_the_settings_a_run_wrote_make_the_same_run(train: Train, tmp_path: Path) -> None:
    first = train("first", flags=("--model.optim.matrix_optimizer", "muon"))
    again = train(
        "again",
        flags=("--config", str(first.folder / "config.yaml"), "--trainer.default_root_dir", str(tmp_path / "again")),
    )
    assert again.result["history"] == first.result["history"]


def test_a_model_comes_from_a_file_and_changes_in_place(train: Train, tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump(MODEL))
    run = train(model__model=str(path), flags=("--model.overrides.memory.rows", "[11, 13]"))
    assert run.result["model"]["memory"]["rows"] == [11, 13]


def test_overrides_nest_with_dots_or_with_mappings() -> None:
    settings = {"a": 1, "b": {"c": 2, "d": {"e": 3}}}
    expected = {"a": 9, "b": {"c": 2, "d": {"e": 4, "f": 5}}}
    assert merged(settings, {"a": 9, "b.d.e": 4, "b": {"d": {"f": 5}}}) == expected
    assert settings == {"a": 1, "b": {"c": 2, "d": {"e": 3}}}
    assert merged(settings, {"b": None, "x.y": 1}) == {"a": 1, "b": None, "x": {"y": 1}}
    flags = {"a": "1e-3", "b": "{c: 4}", "b.d.e": "[5, six]", "x": "a: b: c"}
    assert merged(settings, flags) == {"a": 0.001, "b": {"c": 4, "d": {"e": [5, "six"]}}, "x": "a: b: c"}


def test_a_run_without_validation_says_so_in_its_result(train: Train) -> None:
    run = train(flags=("--trainer.limit_val_batches", "0"))
    assert run.code == 0
    assert (run.result["val"], run.result["history"]) == (None, [])


def test_without_an_interval_the_end_is_validated(train: Train) -> None:
    run = train(trainer__val_check_interval=None, trainer__accumulate_grad_batches=2)
    assert [entry["step"] for entry in run.result["history"]] == [8]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flags": ("--model.optim.lrr", "3")}, "unrecognized arguments: --model.optim.lrr"),
        ({"flags": ("--model.optim.lr", "-1")}, "optim.lr is -1.0: allowed is above 0"),
        ({"flags": ("--model.optim.lr", "fast")}, "Parser key \"model.optim.lr\": Expected a <class 'float'>"),
        ({"flags": ("--model.overrides.experts.n_expert", "3")}, "unknown setting experts.n_expert is 3"),
        ({"flags": ("--config", "none.yaml")}, 'Parser key "config": File does not exist'),
        ({"model__model": "none.yaml"}, "config file 'none.yaml' cannot be read"),
        ({"model__model__vocab_size": 310}, "model vocab_size is 310: allowed is the data's, 300"),
        ({"model__model__max_seq_len": 8}, "data.seq_len is 16: allowed is at most max_seq_len (8)"),
        ({"model__model__memory__eos_id": 7}, "memory.eos_id is 7: allowed is that of the tokenizer, 1"),
        ({"data__config__batch_size": 0}, "data.batch_size is 0: allowed is 1 or more"),
        ({"trainer__val_check_interval": 3}, "trainer.val_check_interval is 3: allowed is a divisor of the run's 8"),
        ({"trainer__max_steps": -1}, "trainer.max_steps is -1: allowed is 1 or more"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0: allowed is 1 or more"),
        ({"threads": 0}, "threads is 0: allowed is 1 or more"),
        ({"trainer__val_check_interval": 0.5}, "`val_check_interval` should be an integer"),
        ({"flags": ("--trainer.enable_checkpointing", "false")}, "Trainer was configured with `enable_checkpointing"),
        ({"flags": ("--ckpt_path", "last")}, "ckpt_path is '"),
        ({"flags": ("--ckpt_path", "best")}, "ckpt_path is 'best': allowed is the folder of a checkpoint"),
        ({"flags": ("--trainer.default_root_dir", "/dev/null/run")}, "cannot use '/dev/null"),
    ],
)
def test_settings_that_cannot_be_end_in_one_line(
    train: Train, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(**changes)
    lines = capsys.readouterr().err.strip().splitlines()
    assert run.code == 2
    assert lines[-1].startswith(f"error: {message}"), lines[-1]
    assert not any("Traceback" in line or line.startswith("usage:") for line in lines)

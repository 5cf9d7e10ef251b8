"""The `engram` command: `engram sweep plan|run|status|report PLAN.yaml`, `engram consolidate CHECKPOINT FOLDER`,
`engram verify PATH`, `engram generate MODEL PROMPT`, `engram inspect PATH`, `engram eval NAME --checkpoint RUN`."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from engram.config import ConfigError, require
from engram.memory.row_formats import RowKind

if TYPE_CHECKING:
    from engram.sweep.launch import Executor
    from engram.sweep.plan import SweepPlan


_SLURM_OPTIONS: dict[str, tuple[Any, str]] = {
    "gpus-per-point": (int, "GPUs of a point, over all its nodes; 0 (the default): CPUs"),
    "nodes-per-point": (int, "nodes of a point (1)"),
    "cpus-per-task": (int, "cores for each GPU, or of a point without (the plan's `threads`)"),
    "slurm-partition": (str, "partition"),
    "slurm-time": (int, "minutes after which a job is requeued (240)"),
    "slurm-account": (str, "account"),
    "slurm-qos": (str, "quality of service"),
}


def main(args: list[str] | None = None) -> int:
    """Run the command line; returns the exit code. A bad setting ends in one line on stderr and code 2."""
    args = sys.argv[1:] if args is None else args
    parsed = _parser().parse_args(args[:1] if args[:1] == ["eval"] else args)  # each question reads its own options
    parsed.arguments = args[1:]
    # What torch says of a checkpoint that one process reads.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    try:
        return int(parsed.run(parsed))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read what is printed, as `| head` does, has closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's own flush at the end fails too
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: cannot use {str(error.filename)!r}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="engram", description="Split parameters between memory and experts.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    sweep = commands.add_parser("sweep", help="train models across the split and report the curve")
    actions = sweep.add_subparsers(required=True, metavar="ACTION")
    for name, run, text in (
        ("plan", _plan, "print the points, what each holds, and the time they may take"),
        ("run", _run, "train the points that are not finished"),
        ("status", _status, "print how far each point is, from the files that the runs write"),
        ("report", _report, "write points.csv, pictures and report.html from the finished points"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("plan", type=Path, help="the sweep's YAML plan")
        action.set_defaults(run=run)
        if name == "run":
            action.add_argument("--workers", type=int, help="points at once, in the place of the plan's `workers`")
            _add_executor(action)
        if name == "status":
            action.add_argument("--json", action="store_true", help="for programs")
    action = commands.add_parser(
        "consolidate", help="write a checkpoint's model as safetensors, whatever mesh saved it"
    )
    action.add_argument("checkpoint", type=Path, help="a checkpoint's folder, or a run's, whose last one is taken")
    action.add_argument("folder", type=Path, help="where to write the model")
    action.set_defaults(run=_consolidate)
    action = commands.add_parser(
        "verify", help="compare all weights of a model's folder, or of a table's file, with their checksums"
    )
    action.add_argument("path", type=Path, help="of a trained model, such as RUN/model, or a file that `to_disk` wrote")
    action.set_defaults(run=_verify)
    _add_generate(commands.add_parser("generate", help="continue a text with a trained model"))
    action = commands.add_parser(
        "inspect", help="print what a checkpoint holds, without loading it: tables, and where its parameters are"
    )
    action.add_argument(
        "path", type=Path, help="a folder of engram's (a model, a run, a checkpoint), Qwen4-Exp's or DeepSeek-V4.1's"
    )
    action.add_argument("--json", action="store_true", help="for programs")
    action.set_defaults(run=_inspect)
    commands.add_parser("eval", help="ask a question of checkpoints").set_defaults(run=_eval)
    return parser


def _add_generate(action: argparse.ArgumentParser) -> None:
    action.add_argument("model", type=Path, help="a model's folder, a run's, or a checkpoint's")
    action.add_argument("prompt", nargs="+", help="text to continue, - for standard input; several are done together")
    action.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="at most so many (200)")
    action.add_argument(
        "--temperature", type=float, default=1.0, help="1: the model's own distribution; 0: the likeliest"
    )
    action.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest tokens")
    action.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest that make up P")
    action.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="draw from those with P of the likeliest's"
    )
    action.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1: fewer repetitions")
    action.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    action.add_argument("--seed", type=int, help="of the draws")
    action.add_argument("--tokenizer", help="where the model's folder has none: a tokenizer.json, a folder, a hub id")
    action.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (cpu)")
    places = ("device", "host", "disk")
    action.add_argument("--tables", choices=places, default="device", help="where memory tables are kept (device)")
    action.add_argument("--cache-rows", type=int, default=0, metavar="N", help="rows of each to keep on the device")
    action.add_argument("--rows", choices=get_args(RowKind), default="float", help="quantize memory rows")
    action.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    action.add_argument("--compile", action="store_true", help="compile the step: for long texts")
    action.add_argument("--no-echo", action="store_true", help="print what is new alone, without the prompt")
    action.set_defaults(run=_generate)


def _add_executor(action: argparse.ArgumentParser) -> None:
    action.add_argument("--executor", choices=("local", "slurm"), default="local", help="where points are trained")
    slurm = action.add_argument_group("with --executor slurm")
    for name, (kind, text) in _SLURM_OPTIONS.items():
        slurm.add_argument(f"--{name}", type=kind, help=text)
    slurm.add_argument(
        "--slurm-option",
        action="append",
        metavar="NAME=VALUE",
        help="any other option of sbatch, as mem=64G; repeatable",
    )


def _consolidate(args: argparse.Namespace) -> int:
    from engram.parallel.checkpoint import find_checkpoint
    from engram.training.weights import save_checkpoints_model

    checkpoint, allowed = find_checkpoint(args.checkpoint), "the folder of a checkpoint, or of a run that has one"
    require(checkpoint is not None, "checkpoint", str(args.checkpoint), allowed)
    assert checkpoint is not None
    print(save_checkpoints_model(checkpoint, args.folder))
    return 0


def _verify(args: argparse.Namespace) -> int:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from engram.memory.row_files import verify_rows
    from engram.training.weights import verify_model

    verify, files = (
        (verify_rows, [args.path]) if args.path.is_file() else (verify_model, args.path.glob("*.safetensors"))
    )
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("verifying", total=sum(path.stat().st_size for path in files))
        damaged = verify(args.path, lambda n: progress.advance(task, n))
    print("\n".join(damaged) or f"undamaged: {args.path}")
    return 1 if damaged else 0


def _generate(args: argparse.Namespace) -> int:
    import time

    import torch

    from engram.inference import Sampling
    from engram.inference.opening import open_model
    from engram.inference.text import TextGenerator
    from engram.training.tokenizer import load_tokenizer

    sampling = Sampling(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
    )
    given = load_tokenizer(args.tokenizer) if args.tokenizer else None
    model, tokenizer = open_model(args.model, args.tables, cache_rows=args.cache_rows, rows=args.rows, tokenizer=given)
    if tokenizer is None:
        raise ConfigError(f"{str(args.model)!r} holds no tokenizer: name one with --tokenizer")
    try:
        autocast = torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16)
        model.to(args.device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch built without CUDA
        raise ConfigError(f"device is {args.device!r}: {str(error).splitlines()[0]}") from error
    try:
        prompts = [sys.stdin.read() if prompt == "-" else prompt for prompt in args.prompt]
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input is no text in {error.encoding}: {error}") from error
    writer = TextGenerator(model, tokenizer)
    started, texts = time.perf_counter(), [[] if args.no_echo else [prompt] for prompt in prompts]
    streaming = len(prompts) == 1
    parts = writer.stream(
        prompts, args.max_new_tokens, stop=args.stop, sampling=sampling, seed=args.seed, compiled=args.compile
    )
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that can't show a character shows another
    interrupted = False
    try:
        with autocast:
            for new in parts:
                if streaming:
                    print("".join(texts[0]) + new[0], end="", flush=True)
                    texts = [[]]
                else:
                    for text, part in zip(texts, new, strict=True):
                        text.append(part)
    except KeyboardInterrupt:
        interrupted = True  # what there is so far is wanted all the same
    print("" if streaming else "\n\n".join("".join(text) for text in texts))
    seconds = time.perf_counter() - started
    print(f"{writer.n_new} tokens in {seconds:.1f} s, {writer.n_new / seconds:.0f} a second", file=sys.stderr)
    return 130 if interrupted else 0


def _inspect(args: argparse.Namespace) -> int:
    from engram.interop.inspect import inspect

    report = inspect(args.path)
    print(json.dumps(report.to_dict(), indent=1) if args.json else report.text())
    return 0


def _eval(args: argparse.Namespace) -> int:
    from eval import QUESTIONS

    name = args.arguments[0] if args.arguments else "--help"
    if name in QUESTIONS:
        from eval.shared.command import run

        return run(name, args.arguments[1:])
    if name not in ("-h", "--help"):
        require(False, "question", name, "one of " + ", ".join(QUESTIONS))
    print("usage: engram eval NAME --checkpoint RUN [--against RUN ...]; engram eval NAME --help tells more\n")
    print("\n".join(f"  {name:<10}{text}" for name, text in QUESTIONS.items()))
    return 0


# The sweep is imported where it is used, so that `engram --help` answers at once.


def _plan(args: argparse.Namespace) -> int:
    from engram.sweep.launch import LocalExecutor
    from engram.sweep.plan import SweepPlan, plan_table

    plan = SweepPlan.load(args.plan)
    print(plan_table(plan, LocalExecutor(plan.workers, plan.threads).workers))
    return 0


@contextmanager
def _unwinding_when_ended() -> Iterator[None]:
    """Let a polite kill or a closed terminal unwind as Ctrl-C does, so that the sweep stops the runs it started."""

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]  # what nohup chose stays
    try:
        for number in numbers:
            signal.signal(number, leave)
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _run(args: argparse.Namespace) -> int:
    from engram.sweep.launch import run_sweep
    from engram.sweep.plan import SweepPlan

    plan = SweepPlan.load(args.plan)
    executor = _executor(args, plan)
    # Slurm jobs go on without their launcher, so there only Ctrl-C stops them.
    with _unwinding_when_ended() if args.executor == "local" else nullcontext():
        failures = run_sweep(plan, executor)
    for failure in failures:
        print(f"failed: {failure.point.name} ({failure.how}), last lines of its log:\n{failure.tail}")
    print(f"points: {plan.folder / 'points'}")
    return 1 if failures else 0


def _executor(args: argparse.Namespace, plan: SweepPlan) -> Executor:
    """Where the points are to be trained. Raises `ConfigError` for options of an executor that was not asked for."""
    workers = plan.workers if args.workers is None else args.workers
    given = {name: getattr(args, name.replace("-", "_")) for name in (*_SLURM_OPTIONS, "slurm-option")}
    given = {name: value for name, value in given.items() if value is not None}
    if args.executor == "local":
        from engram.sweep.launch import LocalExecutor

        for name, value in given.items():
            raise ConfigError(f"{name} is {value!r}: allowed is with --executor slurm alone")
        return LocalExecutor(workers, plan.threads)
    from engram.sweep.slurm import SlurmExecutor, SlurmOptions

    pairs = [text.partition("=") for text in given.pop("slurm-option", ())]
    for name, equals, value in pairs:
        require(bool(name and equals and value), "slurm-option", name + equals + value, "NAME=VALUE")
    fields = {_field_of(name): value for name, value in given.items()}
    return SlurmExecutor(plan, SlurmOptions(**fields, other={name: value for name, _, value in pairs}), workers)


def _field_of(option: str) -> str:
    return option.removeprefix("slurm-").removesuffix("-per-point").replace("-", "_")


def _status(args: argparse.Namespace) -> int:
    from engram.sweep.plan import SweepPlan
    from engram.sweep.status import status_json, status_of, status_table

    statuses = [status_of(point) for point in SweepPlan.load(args.plan).points()]
    print(status_json(statuses) if args.json else status_table(statuses))
    return 0


def _report(args: argparse.Namespace) -> int:
    from engram.sweep.plan import SweepPlan
    from engram.sweep.report import write_report

    print("\n".join(str(path) for path in write_report(SweepPlan.load(args.plan))))
    return 0


if __name__ == "__main__":
    sys.exit(main())

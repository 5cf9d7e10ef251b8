"""A cache entry appears whole or not at all, and is built by one process."""

import errno
import multiprocessing
import time
from pathlib import Path

import pytest

from engram.config import ConfigError
from engram.training.cache import build_once, content_key


def _slow_build(folder: Path) -> None:
    with (folder.parent / "builds.log").open("a") as log:
        log.write("built\n")
    (folder / "first").write_text("1")
    time.sleep(0.5)
    (folder / "second").write_text("2")


def _want(path: Path) -> None:
    assert (build_once(path, _slow_build) / "second").read_text() == "2"


def test_processes_that_want_the_same_entry_build_it_once(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_want, args=(tmp_path / "entry",)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "builds.log").read_text() == "built\n"
    assert not list(tmp_path.glob("*.draft"))


def test_a_failed_build_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        build_once(tmp_path / "entry", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["entry.lock"]
    _want(tmp_path / "entry")


def test_what_a_killed_process_left_is_not_taken_for_an_entry(tmp_path: Path) -> None:
    (tmp_path / "entry.draft").mkdir()
    (tmp_path / "entry.draft" / "stale").write_text("x")
    _want(tmp_path / "entry")
    assert sorted(path.name for path in (tmp_path / "entry").iterdir()) == ["first", "second"]


def test_a_full_disk_is_one_line_that_names_the_entry_also_when_a_library_wraps_it(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "half").write_text("x")
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("while generating the data set") from error

    with pytest.raises(ConfigError) as caught:
        build_once(tmp_path / "entry", fill)
    assert str(caught.value) == f"cannot write '{tmp_path / 'entry'}': No space left on device"
    assert [path.name for path in tmp_path.iterdir()] == ["entry.lock"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"cannot write .*entry': File exists"):
        build_once(tmp_path / "file" / "entry", _slow_build)


def test_the_key_changes_with_every_input() -> None:
    keys = {content_key(a=1, b=[2]), content_key(a=2, b=[2]), content_key(a=1, b=[3]), content_key(a=1, c=[2])}
    assert len(keys) == 4
    assert content_key(a=1, b=[2]) == content_key(b=[2], a=1)

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from ditrim.engines.sets import staging
from ditrim.engines.sets.staging import commit, recover, staging_folder, target_locked
from ditrim.plugins.errors import DitrimError


def place(target: Path, text: str) -> None:
    with target_locked(target), staging_folder(target) as folder:
        (folder / "file").write_text(text)
        commit(folder, target)


@pytest.mark.parametrize("can_exchange", [True, False])
def test_commit_replaces_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr(staging, "_exchange", lambda left, right: False)
    target = tmp_path / "set"
    for text in ("first", "second"):
        place(target, text)
        assert (target / "file").read_text() == text
        assert os.listdir(tmp_path) == ["set"]


def test_empty_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    place(tmp_path / "set", "new")
    assert (tmp_path / "set" / "file").read_text() == "new"


def test_this_system_exchanges_folders_in_one_step(tmp_path: Path) -> None:
    for name in ("left", "right"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not staging._exchange(tmp_path / "left", tmp_path / "right"):
        pytest.skip("renameat2 is not available on this file system; the fallback is used")
    assert os.listdir(tmp_path / "left") == ["right"]


def test_exchange_that_fails_for_another_reason_raises(tmp_path: Path) -> None:
    (tmp_path / "left").mkdir()
    with pytest.raises(FileNotFoundError):
        staging._exchange(tmp_path / "left", tmp_path / "gone")


def test_reader_recovers_the_previous_set_of_a_dead_builder(tmp_path: Path) -> None:
    place(tmp_path / "set", "old")
    (tmp_path / "set").rename(staging.previous_path(tmp_path / "set"))
    recover(tmp_path / "set")
    assert (tmp_path / "set" / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["set"]


def test_reader_leaves_a_swap_of_a_live_builder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "_SWAP_SECONDS", 0.1)
    target = tmp_path / "set"
    place(target, "old")
    with target_locked(target):
        target.rename(staging.previous_path(target))
        recover(target)
        assert not target.exists()


def test_leftovers_of_dead_builders_are_deleted(tmp_path: Path) -> None:
    stale = tmp_path / ".set.building-0123"
    stale.mkdir()
    (stale / "half").touch()
    other = tmp_path / ".set2.building-0123"
    other.mkdir()
    place(tmp_path / "set", "new")
    assert not stale.exists()
    assert other.exists()


def test_second_builder_says_whom_it_waits_for_and_then_goes_on(tmp_path: Path) -> None:
    target, messages, order = tmp_path / "set", [], []
    said = threading.Event()

    def wait_for_it() -> None:
        def note(message: str) -> None:
            messages.append(message)
            said.set()

        with target_locked(target, note):
            order.append("second")

    with target_locked(target):
        with pytest.raises(BlockingIOError), target_locked(target, wait=False):
            pass
        thread = threading.Thread(target=wait_for_it)
        thread.start()
        assert said.wait(5)
        order.append("first")
    thread.join(5)
    assert order == ["first", "second"]
    assert messages == [f"process {os.getpid()} is building {target}; waiting for it to finish"]
    assert os.listdir(tmp_path) == []


def test_failed_build_leaves_no_folder(tmp_path: Path) -> None:
    def fail() -> None:
        with staging_folder(tmp_path / "set") as folder:
            (folder / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert os.listdir(tmp_path) == []


def test_too_little_free_space_is_said_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(
        DitrimError, match=r"too full: the engine set needs about 1000000\.0 TB and"
    ):
        staging.check_free_space(tmp_path, 10**18)


def test_fsync_error_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="broken") as raised:
        staging.fsync_path(tmp_path)
    assert raised.value.filename == str(tmp_path)

"""A folder that is built beside its target and takes its place in one step.

Replaces: writing into the target. Limits: Linux; where the file system cannot exchange two folders
(`renameat2`), the swap is two renames, and `recover` undoes the first if the second never came.
Trade-off: while a build runs, the old and the new set are both on the disk.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ditrim.engines.files import format_bytes
from ditrim.plugins.errors import DitrimError

logger = logging.getLogger(__name__)

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_POLL_SECONDS = 0.1
# How long a reader waits for a swap that is between its two renames.
_SWAP_SECONDS = 5.0


def lock_path(target: Path) -> Path:
    """The file whose lock a builder of `target` holds; it contains the builder's process number."""
    return target.parent / f".{target.name}.lock"


def previous_path(target: Path) -> Path:
    """Return the path of the old set between the two renames of a swap without `renameat2`."""
    return target.parent / f".{target.name}.previous"


def longest_affix(target: Path) -> int:
    """Bytes by which the longest name beside a target is longer than the target's own."""
    names = (lock_path(target), previous_path(target), _building_path(target, "0" * 12))
    return max(len(os.fsencode(path.name)) for path in names) - len(os.fsencode(target.name))


def _building_path(target: Path, token: str) -> Path:
    return target.parent / f".{target.name}.building-{token}"


def _building_paths(target: Path) -> list[Path]:
    prefix = f".{target.name}.building-"
    with suppress(FileNotFoundError):
        return [path for path in target.parent.iterdir() if path.name.startswith(prefix)]
    return []


def _try_lock(path: Path) -> int | None:
    """A descriptor that holds the lock, or none if another process does."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever held the lock before may have removed the file that we opened.
        with suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
    except BlockingIOError:
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


@contextmanager
def target_locked(
    target: Path, on_wait: Callable[[str], None] | None = None, *, wait: bool = True
) -> Iterator[None]:
    """Hold the only right to replace `target`, waiting for it while another process has it.

    Leftovers of builders that died are put right: the previous set goes back into its place if it
    was taken out of it, and half-built folders are deleted.

    Args:
        target: what will be replaced. Its parent is created.
        on_wait: called once with the holder of the lock.
        wait: if not, BlockingIOError is raised while another process has it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    path = lock_path(target)
    descriptor = _try_lock(path)
    if descriptor is None and not wait:
        raise BlockingIOError(errno.EAGAIN, "another process is building it", str(target))
    if descriptor is None and on_wait is not None:
        on_wait(f"{_holder(path)} is building {target}; waiting for it to finish")
    while descriptor is None:
        time.sleep(_POLL_SECONDS)
        descriptor = _try_lock(path)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        _restore_previous(target)
        for stale in _building_paths(target):
            shutil.rmtree(stale, ignore_errors=True)
        yield
    finally:
        with suppress(FileNotFoundError):
            os.unlink(path)
        os.close(descriptor)


def _holder(path: Path) -> str:
    try:
        return f"process {int(path.read_text())}"
    except (OSError, ValueError):
        return "another process"


def _restore_previous(target: Path) -> None:
    previous = previous_path(target)
    if not previous.is_dir():
        return
    if os.path.lexists(target):
        shutil.rmtree(previous, ignore_errors=True)
        return
    os.rename(previous, target)
    logger.warning("%s was put back after an interrupted build", target)


def recover(target: Path) -> None:
    """Put the previous set back if a builder died between the two renames of a swap.

    Does nothing when the target is there, or when there is nothing to put back.
    """
    deadline = time.monotonic() + _SWAP_SECONDS
    while not os.path.lexists(target) and previous_path(target).is_dir():
        descriptor = _try_lock(lock_path(target))
        if descriptor is not None:
            try:
                _restore_previous(target)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(lock_path(target))
                os.close(descriptor)
            return
        if time.monotonic() > deadline:
            return
        time.sleep(_POLL_SECONDS)


@contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target`, deleted at the end unless `commit` moved it away."""
    folder = _building_path(target, secrets.token_hex(6))
    folder.mkdir()
    try:
        yield folder
    finally:
        # After a commit this is the old set, if it could not be deleted at once, or nothing.
        shutil.rmtree(folder, ignore_errors=True)


def write_durably(path: Path, text: str) -> None:
    """Write a text file and wait until it is on the disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def fsync_path(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # no such thing on this file system
            error.filename = error.filename or str(path)
            raise
    finally:
        os.close(descriptor)


def commit(folder: Path, target: Path) -> None:
    """Put a finished staging folder into the target's place; the lock is held.

    At every moment one of the two whole sets is at the target, or `recover` can put it there.
    """
    fsync_path(folder)
    if not os.path.lexists(target) or not any(target.iterdir()):
        os.rename(folder, target)  # also over an empty folder
        fsync_path(target.parent)
        return
    if _exchange(folder, target):
        old = folder
        fsync_path(target.parent)
    else:
        old = previous_path(target)
        os.rename(target, old)
        os.rename(folder, target)
        fsync_path(target.parent)
    shutil.rmtree(old, ignore_errors=True)
    if old.exists():
        logger.warning("the replaced engine set could not be deleted; it is at %s", old)


def _exchange(left: Path, right: Path) -> bool:
    """Swap two folders in one step; false where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    arguments = (_AT_FDCWD, os.fsencode(left), _AT_FDCWD, os.fsencode(right), _RENAME_EXCHANGE)
    if renameat2(*arguments) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(number, os.strerror(number), str(right))


def check_free_space(folder: Path, num_bytes: int) -> None:
    """Fail before hours of work if a build cannot fit.

    Raises:
        DitrimError: names what is needed, what is free and what to do.
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise DitrimError(
            f"the disk of {folder} is too full: the engine set needs about "
            f"{format_bytes(num_bytes)} and {format_bytes(free)} are free; free some space or "
            "choose another --output"
        )

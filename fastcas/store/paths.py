"""The storage folder on disk: layout, durable creation, and the one place where `OSError` becomes ours.

    LOCK  node.sock  node.key      see lock.py and store.py
    catalog.db                     see catalog.py
    hashed_files/ab/<name>.blob    owned blobs, see blobs.py
    manifests/ab/<hash>            canonical manifests
    quarantine/                    copies of what scrub found damaged
    reserve                        1 MiB that is given up when a removal finds the disk full

Owns: the folder's descriptor. Every name is relative to it, so that a folder that is moved or replaced under us
cannot redirect a write. A temporary file lies at the top of its tree as `.tmp-<random>`, so that start-up finds
all of them in two listings. Durable creation is: O_EXCL | O_NOFOLLOW, write, fsync, rename, fsync of the folder;
a failed fsync is never retried, the file is removed.
Never: follows a symbolic link inside the folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import re
import secrets
import stat
from collections.abc import Iterator, Set
from functools import cache
from pathlib import Path

from fastcas.errors import FastCASError, NotFound, PermissionDenied, StoreError, StoreFull, StoreNotFound, UsageError
from fastcas.ids import escape_for_terminal

__all__ = [
    "BLOB_DIR",
    "MANIFEST_DIR",
    "OLD_CATALOG",
    "QUARANTINE_DIR",
    "Folder",
    "is_held",
    "os_errors",
    "punch_hole",
    "root_of",
    "shown",
    "syncfs_tells_errors",
    "translate",
    "write_all",
]

BLOB_DIR = "hashed_files"
MANIFEST_DIR = "manifests"
QUARANTINE_DIR = "quarantine"
OLD_CATALOG = f"{QUARANTINE_DIR}/catalog-"  # what `rebuild` replaced
TEMP_PREFIX = ".tmp-"
RESERVE = "reserve"
RESERVE_B = 1 << 20  # the catalog's log of a removal and a gc
_OPEN = os.O_CLOEXEC | os.O_NOFOLLOW
_FALLOC_KEEP_SIZE = 0x01
_HELD_STEP = 64 << 20  # bytes looked at at once
_PAGES_TOGETHER = 2 << 20  # the largest page in the cache of a file
_FALLOC_PUNCH_HOLE = 0x02


def shown(path: str | bytes | os.PathLike[str]) -> str:
    """Return a path as messages show it: bytes that are not UTF-8 and control characters escaped."""
    return escape_for_terminal(os.fsencode(path).decode("utf-8", "backslashreplace"))


def translate(exc: OSError, path: str | bytes | os.PathLike[str], action: str) -> FastCASError:
    """Return our error for an `OSError` met while doing `action` to `path`."""
    return _translated(exc, shown(path), action).about((shown(path), exc.strerror or str(exc)))


def _translated(exc: OSError, who: str, action: str) -> FastCASError:
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreFull(f"{who}: no space left on the disk while {action}; nothing of it was stored")
    if exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return PermissionDenied(f"{who}: {exc.strerror} while {action}; nothing was changed")
    if exc.errno in (errno.ENOENT, errno.ENOTDIR):
        return NotFound(f"{who}: does not exist ({action})")
    if exc.errno in (errno.ELOOP, errno.ENAMETOOLONG, errno.EISDIR, errno.ENXIO):
        return UsageError(f"{who}: {exc.strerror} while {action}")
    return StoreError(f"{who}: {exc.strerror or exc} while {action}; nothing of it was stored")


@contextlib.contextmanager
def os_errors(path: str | bytes | os.PathLike[str], action: str) -> Iterator[None]:
    """Turn an `OSError` of the block into one of `fastcas.errors` that names the path and the action."""
    try:
        yield
    except OSError as exc:
        raise translate(exc, path, action) from exc


def root_of(path: str | os.PathLike[str]) -> Path:
    """Return the absolute storage folder that `path` means: its parent if it names `hashed_files` itself."""
    root = Path(os.path.abspath(path))
    return root.parent if root.name == BLOB_DIR else root


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`; short writes are continued. OSError is not translated."""
    view = memoryview(data)
    while view:
        n = os.pwrite(fd, view, offset)
        view, offset = view[n:], offset + n


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    libc.fallocate.restype = ctypes.c_int
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    libc.mmap.restype = ctypes.c_void_p
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    libc.mincore.restype = ctypes.c_int
    return libc


@cache
def syncfs_tells_errors() -> bool:
    """Whether this kernel's `syncfs` returns the errors of writing back: Linux 5.8 and later."""
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return found is not None and (int(found[1]), int(found[2])) >= (5, 8)


def is_held(fd: int, offset: int, length: int) -> bool:
    """Whether pages of a range stay in the page cache although it was asked to drop them: somebody holds them.

    sendfile puts the file's own pages into a socket's queue; a hole punched before they have left turns them into
    zeros there (seen on ext4, whose pages are large). A mapping holds pages, too.
    Cost: the range and up to 2 MiB around it are no longer cached; one byte of memory per page.
    """
    libc = _libc()
    start = offset // mmap.PAGESIZE * mmap.PAGESIZE
    first, end = offset // _PAGES_TOGETHER * _PAGES_TOGETHER, -(-(offset + length) // _PAGES_TOGETHER) * _PAGES_TOGETHER
    os.posix_fadvise(fd, first, end - first, os.POSIX_FADV_DONTNEED)  # a large page goes whole or not at all
    for at in range(start, offset + length, _HELD_STEP):
        n = min(_HELD_STEP, offset + length - at)
        view = libc.mmap(None, n, mmap.PROT_READ, mmap.MAP_SHARED, fd, at)
        if view in (None, ctypes.c_void_p(-1).value):
            return False
        pages = ctypes.create_string_buffer(-(-n // mmap.PAGESIZE))
        held = libc.mincore(view, n, pages) == 0 and any(page & 1 for page in pages.raw)
        libc.munmap(view, n)
        if held:
            return True
    return False


def punch_hole(fd: int, offset: int, length: int) -> bool:
    """Give a range's blocks back to the file system; its bytes read as zeros, the size stays.

    Returns:
        False where the file system cannot do it.
    """
    if _libc().fallocate(fd, _FALLOC_PUNCH_HOLE | _FALLOC_KEEP_SIZE, offset, length) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EOPNOTSUPP, errno.ENOSYS):
        return False
    raise OSError(code, os.strerror(code))


class Folder:
    """The open storage folder. All names are relative to it; errors are translated.

    Args:
        root: Absolute path.
        create: Make the folder and its parts where they are missing (mode 0700).
    Raises:
        StoreNotFound: `root` is absent or not a directory.
        PermissionDenied: The operating system refuses.
    """

    def __init__(self, root: Path, *, create: bool) -> None:
        self.root = root
        self._made: set[str] = set()
        try:
            if create and not root.is_dir():
                os.makedirs(root, mode=0o700, exist_ok=True)
                parent = os.open(root.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    os.fsync(parent)
                finally:
                    os.close(parent)
            self.fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError, FileExistsError) as exc:
            raise StoreNotFound(f"{shown(root)}: no such storage folder") from exc
        except OSError as exc:
            raise translate(exc, root, "opening the storage folder") from exc

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def path(self, name: str) -> Path:
        """Return the absolute path of a name, for messages and for the workers."""
        return self.root / name

    def exists(self, name: str) -> bool:
        """Whether a regular file of that name is there."""
        try:
            return stat.S_ISREG(os.stat(name, dir_fd=self.fd, follow_symlinks=False).st_mode)
        except FileNotFoundError:
            return False
        except OSError as exc:
            raise translate(exc, self.path(name), "looking at it") from exc

    def open(self, name: str, flags: int = os.O_RDONLY, mode: int = 0o600) -> int:
        """Open a regular file below the folder. A FIFO or a link there neither blocks nor is followed."""
        with os_errors(self.path(name), "opening it"):
            fd = os.open(name, flags | _OPEN | os.O_NONBLOCK, mode, dir_fd=self.fd)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise StoreError(f"{shown(self.path(name))}: not a regular file")
        return fd

    def make_dir(self, name: str) -> None:
        """Make a folder (mode 0700) and make its name durable. Its parent must exist."""
        if name in self._made:
            return
        with os_errors(self.path(name), "making a folder"), contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=self.fd)
            self._fsync_dir(os.path.dirname(name) or ".")
        self._made.add(name)

    @contextlib.contextmanager
    def made_together(self, names: Set[str]) -> Iterator[None]:
        """Make folders (mode 0700) that are missing; the block makes their names durable."""
        missing = names - self._made
        for name in missing:
            with os_errors(self.path(name), "making a folder"), contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=self.fd)
        yield
        self._made |= missing

    def create_temp(self, tree: str, mode: int = 0o600) -> tuple[int, str]:
        """Create a temporary file at the top of a tree; returns (descriptor open for reading and writing, name)."""
        name = f"{tree}/{TEMP_PREFIX}{secrets.token_hex(8)}"
        with os_errors(self.path(name), "creating it"):
            return os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | _OPEN, mode, dir_fd=self.fd), name

    def publish(self, fd: int, temp: str, name: str, mode: int) -> None:
        """Make a written temporary file durable under its final name. On any error both names are removed.

        The descriptor stays open. The folder of `name` is made if need be.
        """
        try:
            self.make_dir(os.path.dirname(name) or ".")
            with os_errors(self.path(name), "making it durable"):
                os.fchmod(fd, mode)
                os.fsync(fd)
                os.rename(temp, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        except BaseException:
            self.discard(temp)
            raise
        try:
            with os_errors(self.path(name), "making its name durable"):
                self._fsync_dir(os.path.dirname(name) or ".")
        except BaseException:
            self.discard(name)
            raise

    def write_file(self, tree: str, name: str, data: bytes | memoryview, mode: int) -> os.stat_result:
        """Create a whole small file durably under `name`; returns its stat."""
        fd, temp = self.create_temp(tree)
        try:
            try:
                with os_errors(self.path(name), "writing it"):
                    write_all(fd, data, 0)
            except BaseException:
                self.discard(temp)
                raise
            self.publish(fd, temp, name, mode)
            return os.fstat(fd)
        finally:
            os.close(fd)

    def sync(self) -> None:
        """Make everything durable that was written to the folder's file system."""
        with os_errors(self.root, "making it durable"):
            if _libc().syncfs(self.fd) != 0:
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code))

    def unlink(self, name: str) -> None:
        """Remove a file; one that is not there is fine."""
        with os_errors(self.path(name), "removing it"), contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.fd)

    def discard(self, name: str) -> None:
        """Remove a file on the way out of an error: what goes wrong here cannot help the caller."""
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=self.fd)

    def names(self, tree: str) -> list[str]:
        """List a folder; an absent one is empty."""
        try:
            fd = os.open(tree, os.O_RDONLY | os.O_DIRECTORY | _OPEN, dir_fd=self.fd)
        except FileNotFoundError:
            return []
        except OSError as exc:
            raise translate(exc, self.path(tree), "listing it") from exc
        try:
            with os_errors(self.path(tree), "listing it"):
                return os.listdir(fd)
        finally:
            os.close(fd)

    def make_reserve(self) -> None:
        """Hold back a little space, so that removing things works on a full disk. Without room there is none."""
        if self.exists(RESERVE):
            return
        with contextlib.suppress(FastCASError, OSError):
            fd, temp = self.create_temp(".")
            try:
                os.posix_fallocate(fd, 0, RESERVE_B)
                os.rename(temp, RESERVE, src_dir_fd=self.fd, dst_dir_fd=self.fd)
            except OSError:
                self.discard(temp)
            finally:
                os.close(fd)

    def spend_reserve(self) -> bool:
        """Give the space that was held back to the file system; returns whether there was any."""
        if not self.exists(RESERVE):
            return False
        self.unlink(RESERVE)
        return True

    def sweep_temps(self) -> int:
        """Remove what a killed process left behind; returns how many files. Only with the lock held."""
        n = 0
        for tree in (".", BLOB_DIR, MANIFEST_DIR, QUARANTINE_DIR):
            for name in self.names(tree):
                if name.startswith(TEMP_PREFIX):
                    self.unlink(f"{tree}/{name}")
                    n += 1
        return n

    def _fsync_dir(self, name: str) -> None:
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | _OPEN, dir_fd=self.fd)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

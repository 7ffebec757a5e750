"""Names of other people's making, only ever used below one open folder.

Every component is opened by itself, relative to the descriptor of the one before, with O_NOFOLLOW: a link that
somebody puts in the way is an error, never followed, and `..` is refused. Nothing outside can be reached.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from fastcas.errors import UsageError
from fastcas.store.paths import os_errors, shown

__all__ = ["beneath", "make_dirs_beneath", "open_beneath"]

_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW


def _components(path: str) -> list[str]:
    parts = path.split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise UsageError(f"path: expected plain components, got '{shown(path)}'")
    return parts


@contextlib.contextmanager
def beneath(dir_fd: int, path: str) -> Iterator[tuple[int, str]]:
    """Yield (descriptor of the folder that holds `path`, its last component).

    Args:
        dir_fd: Where the path starts; stays open.
        path: Relative, `/` between components.
    Raises:
        UsageError, NotFound, PermissionDenied: The path is not plain, absent, or a link is in the way.
    """
    parts = _components(path)
    fd = dir_fd
    try:
        for part in parts[:-1]:
            with os_errors(path, "walking to it"):
                below = os.open(part, _DIR, dir_fd=fd)
            if fd != dir_fd:
                os.close(fd)
            fd = below
        yield fd, parts[-1]
    finally:
        if fd != dir_fd:
            os.close(fd)


def open_beneath(dir_fd: int, path: str, flags: int, mode: int = 0o600) -> int:
    """Open or create a file below a folder; returns its descriptor (close-on-exec, no link followed)."""
    with beneath(dir_fd, path) as (fd, name), os_errors(path, "opening it"):
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, mode, dir_fd=fd)


def make_dirs_beneath(dir_fd: int, path: str, mode: int = 0o755) -> None:
    """Make a folder below another, parents included; folders that are there are fine."""
    parts = _components(path)
    for i in range(len(parts)):
        with beneath(dir_fd, "/".join(parts[: i + 1])) as (fd, name), os_errors(path, "making a folder"):
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, mode, dir_fd=fd)
            os.close(os.open(name, _DIR, dir_fd=fd))

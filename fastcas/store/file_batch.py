"""Many whole small files that become durable together, all or none.

Each is written under a temporary name as it comes; `publish` makes all durable with two flushes of the file system
and gives them their names between. Few files, or a kernel whose `syncfs` tells no error: each by itself.
"""

from __future__ import annotations

import os

from fastcas.store.paths import Folder, os_errors, syncfs_tells_errors, write_all

__all__ = ["FileBatch"]

TOGETHER_MIN = 16  # files from which on one flush of the file system costs less than two for each


class FileBatch:
    """Files of one tree of the storage folder in the making; by one thread at a time.

    Args:
        folder: The storage folder.
        tree: Where the temporary names lie; it exists.
        mode: Of every file.
    """

    def __init__(self, folder: Folder, tree: str, mode: int) -> None:
        self._folder, self._tree, self._mode = folder, tree, mode
        self._temps: dict[str, str] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._temps

    def add(self, name: str, data: bytes) -> None:
        """Write a file that `publish` will call `name`, below the root. Cost: four system calls, no flush."""
        fd, temp = self._folder.create_temp(self._tree, self._mode)
        self._temps[name] = temp
        try:
            with os_errors(self._folder.path(name), "writing it"):
                write_all(fd, data, 0)
        finally:
            os.close(fd)

    def publish(self) -> list[str]:
        """Make all files durable under their names, which are returned; the batch is empty then.

        Raises:
            StoreFull, StoreError: None of them is there.
        """
        made: list[str] = []
        try:
            if len(self._temps) < TOGETHER_MIN or not syncfs_tells_errors():
                self._publish_each(made)
            else:
                self._publish_together(made)
        except BaseException:
            for name in made:
                self._folder.discard(name)
            self.discard()
            raise
        self._temps.clear()
        return made

    def _publish_each(self, made: list[str]) -> None:
        for name, temp in self._temps.items():
            fd = self._folder.open(temp)
            try:
                self._folder.publish(fd, temp, name, self._mode)
            finally:
                os.close(fd)
            made.append(name)

    def _publish_together(self, made: list[str]) -> None:
        folder = self._folder
        folder.sync()
        with folder.made_together({os.path.dirname(name) or "." for name in self._temps}):
            for name, temp in self._temps.items():
                with os_errors(folder.path(name), "renaming it"):
                    os.rename(temp, name, src_dir_fd=folder.fd, dst_dir_fd=folder.fd)
                made.append(name)
            folder.sync()

    def discard(self) -> None:
        """Remove what was written and not published. Idempotent."""
        for temp in self._temps.values():
            self._folder.discard(temp)
        self._temps.clear()

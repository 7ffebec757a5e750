"""What people see: tables and lines on stdout, progress bars on stderr, and only on a terminal.

Text that came from peers or disks is escaped. `--json` output is one object on one line.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from fastcas.errors import FastCASError
from fastcas.ids import escape_for_terminal

__all__ = [
    "ProgressShow", "bytes_text", "discard_output", "output_failed", "print_json", "print_line", "print_note",
    "print_table",
]  # fmt: skip

JSON_EVERY_S = 0.5
JSON_STEPS = 20  # a line at each twentieth of the whole, too, however fast it comes


def discard_output(fd: int = 1) -> None:
    """Let everything that is still written to `fd` vanish: Python's own flush at exit must not complain."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, fd)
    os.close(nothing)


def output_failed(exc: OSError) -> FastCASError:
    """Return the typed error of a failed write to stdout, which gets nothing more."""
    from fastcas.fetch.partfile import storage_error

    discard_output()
    return storage_error(exc, "stdout", "what was written there is incomplete")


def print_line(text: str) -> None:
    """Write one line of the result.

    Raises:
        BrokenPipeError: Whoever read it has enough.
        StoreFull, StoreError: It cannot be written.
    """
    try:
        sys.stdout.write(text + "\n")
    except BrokenPipeError:
        raise
    except OSError as exc:
        raise output_failed(exc) from exc


def print_json(values: dict[str, Any]) -> None:
    """Write one JSON object as one line of the result; raises as `print_line`."""
    print_line(_json(values))


def print_note(note: str | dict[str, Any]) -> None:
    """Write one line or JSON object to stderr, beside the result; a stderr that cannot take it gets nothing more."""
    try:
        sys.stderr.write((note if isinstance(note, str) else _json(note)) + "\n")
        sys.stderr.flush()
    except OSError:
        discard_output(2)


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, separators=(",", ":"))


def bytes_text(count: float) -> str:
    """Return a number of bytes for people: powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def print_table(rows: list[list[str]]) -> None:
    """Write rows as columns, two blanks apart; cells are escaped."""
    cells = [[escape_for_terminal(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))] if cells else []
    for row in cells:
        print_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


class ProgressShow:
    """Shows progress on stderr: JSON lines with `--json`, a bar on a terminal, else nothing.

    Used as a context manager; calling it takes an interim answer.
    """

    def __init__(self, title: str, *, as_json: bool) -> None:
        self._title = escape_for_terminal(title)
        self._as_json = as_json
        self._bar: Any = None
        self._task: Any = None
        self._last_s = 0.0
        self._last_part = 0

    def __enter__(self) -> ProgressShow:
        """Begin to show."""
        if not self._as_json and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(),
                TextColumn("{task.fields[note]}"), console=Console(stderr=True), transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task(self._title, total=None, note="")
            self._bar.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, values: dict[str, Any]) -> None:
        """Show an interim answer {"done", "total", …}."""
        if self._as_json:
            now = time.monotonic()
            part = JSON_STEPS * values["done"] // max(values["total"], 1)
            if now - self._last_s >= JSON_EVERY_S or part != self._last_part:
                self._last_s, self._last_part = now, part
                print_note({"progress": values})
        elif self._bar is not None:
            waiting = values.get("waiting_on") or ""
            note = f"waiting for {escape_for_terminal(waiting)}" if waiting else f"{values.get('peers', 0)} peers"
            self._bar.update(
                self._task, completed=values["done"], total=values["total"] or None,
                note=note if "peers" in values else "",
            )  # fmt: skip

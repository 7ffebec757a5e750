"""Where `fastcas` and `fastcas-node` begin: interrupted while Python still imports, they end like any command.

Imports almost nothing itself. Until `raise_interrupts` there is nothing to clean up, so the process just ends.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

__all__ = ["fastcas", "fastcas_node", "raise_interrupts"]

INTERRUPTED = 7
# Nearly all that the collector would look at is modules: it comes after so many new objects, not every 700.
COLLECT = (50_000, 20, 20)
_PROGRAM = "fastcas"


def fastcas(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `fastcas`; returns the exit status, or ends the process with it.

    Args:
        arguments: None: the process's own, and nothing comes after them.
    """
    status = _run("fastcas", "fastcas.cli.main", arguments)
    if arguments is None:
        _leave(status)
    return status


def fastcas_node(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `fastcas-node`; returns the exit status."""
    return _run("fastcas-node", "fastcas.cli.node_command", arguments)


def raise_interrupts() -> None:
    """Let an interrupt raise KeyboardInterrupt from now on, as Python does: somebody is there to catch it."""
    import signal

    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _run(program: str, module: str, arguments: Sequence[str] | None) -> int:
    global _PROGRAM
    _PROGRAM = program
    try:
        import gc
        import signal
        from importlib import import_module

        _open_standard_files()
        gc.set_threshold(*COLLECT)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where interrupts are ignored
            signal.signal(signal.SIGINT, _end)
        status: int = import_module(module).main(arguments)
        return status
    except KeyboardInterrupt:
        _end()


def _open_standard_files() -> None:
    """Put nothing where stdin, stdout or stderr is closed: no file of ours may get their numbers."""
    import sys

    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # Python found it closed
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free is `fd`
            setattr(sys, name, os.fdopen(fd, "w" if fd else "r", closefd=False))


def _leave(status: int) -> None:
    """End the process without taking its modules apart, which costs 20 ms; only where no thread is left to wait for."""
    import sys
    import threading

    if threading.active_count() == 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _end(*_: object) -> NoReturn:
    try:
        os.write(2, f"{_PROGRAM}: interrupted\n".encode())
    finally:
        os._exit(INTERRUPTED)

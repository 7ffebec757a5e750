"""How a command ends: exit codes, one-line errors, interruption, a reader that went away.

Owns the process's exit status. A traceback is shown only with FASTCAS_DEBUG=1.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

import click

from fastcas.cli.render import discard_output, output_failed, print_note
from fastcas.cli.start import raise_interrupts
from fastcas.errors import FastCASError, Interrupted, UsageError
from fastcas.ids import escape_for_terminal

__all__ = ["complain", "resume_hint", "run_command"]

_RESUME: list[str] = []


def resume_hint(command: str) -> None:
    """Say which command resumes what is running; shown when the user interrupts it."""
    _RESUME[:] = [command]


def complain(text: str) -> None:
    """Write one line to stderr; never fails."""
    line = " ".join(escape_for_terminal(part) for part in text.splitlines()) or "error"
    print_note(line)


def _report(words: Sequence[str], program: str, error: FastCASError) -> None:
    """Say what went wrong: one line, with `--json` one object with the same as fields."""
    if "--json" not in words:
        complain(f"{program}: {error}")
        return
    values = {
        "type": type(error).__name__, "message": str(error), "exit_code": error.exit_code,
        "retryable": error.retryable, "paths": [{"path": path, "reason": reason} for path, reason in error.paths],
    }  # fmt: skip
    print_note({"error": values})


def run_command(command: click.Command, program: str, arguments: Sequence[str] | None = None) -> int:
    """Run a click command and return the exit status of architecture §9."""
    try:
        status = _invoke(command, program, arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has enough
        discard_output()
        return 0
    except OSError as exc:
        error = output_failed(exc)
        _report(sys.argv[1:] if arguments is None else arguments, program, error)
        return error.exit_code
    return status


def _invoke(command: click.Command, program: str, arguments: Sequence[str] | None) -> int:
    is_debugged = os.environ.get("FASTCAS_DEBUG") == "1"
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        raise_interrupts()
        # Not command.main(): it has its own ideas of Ctrl-C and of a closed pipe.
        with command.make_context(program, words) as context:
            result = command.invoke(context)
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        _report(words, program, UsageError(error.format_message()))
        return 2
    except (click.Abort, KeyboardInterrupt, Interrupted):
        hint = f"; resume with: {_RESUME[0]}" if _RESUME else ""
        complain(f"{program}: interrupted{hint}")
        return 7
    except FastCASError as error:
        if is_debugged:
            traceback.print_exc()
        _report(words, program, error)
        return error.exit_code
    except BrokenPipeError:
        raise
    except Exception as error:  # noqa: BLE001 - the process border: whatever it is, the user gets one line
        if is_debugged:
            traceback.print_exc()
        complain(f"{program}: internal error: {type(error).__name__}: {error}")
        return 1
    return result if isinstance(result, int) else 0

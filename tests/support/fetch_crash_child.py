"""Starts downloads in forked children that wait until a tracer is attached: what strikes them strikes only them.

One JSON line in: {"link": …, "out": …, "bare": …}; answers {"pid": …}; the child starts with the next line, whatever it
says; answers {"status": exit status or -signal, "error": message}. The first download is a warm-up in this process, so
that children import nothing. Exit statuses are those of the command line, FOREIGN for an exception that is not ours.

usage: python -m tests.support.fetch_crash_child
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import sys
import traceback
from pathlib import Path
from typing import Any

from fastcas.errors import FastCASError
from fastcas.fetch import filling
from fastcas.fetch.download import download
from fastcas.ids import Link

FOREIGN = 99


def fetch(order: dict[str, Any]) -> None:
    stall_s = float(order.get("stall_timeout_s", 30.0))
    filling.PARITY_AFTER_S = float(order.get("parity_after_s", filling.PARITY_AFTER_S))
    work = download(Link.parse(order["link"]), Path(order["out"]), discovery=None, stall_timeout_s=stall_s)
    asyncio.run(work)


def child(order: dict[str, Any], go: int, say: int) -> int:
    select.select([go], [], [])  # a call that no test strikes: it is under way when the tracer comes
    try:
        fetch(order)
    except FastCASError as exc:
        os.write(say, str(exc).encode())
        return exc.exit_code
    except BaseException:  # noqa: BLE001 - whatever it is, the test is to see it
        os.write(say, traceback.format_exc().encode())
        return FOREIGN
    return 0


def answer(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def main() -> None:
    fetch(json.loads(sys.stdin.readline()))
    answer(pid=os.getpid())
    while line := sys.stdin.readline():
        go_out, go_in = os.pipe()
        say_out, say_in = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(say_out)
            os.close(go_in)
            os._exit(child(json.loads(line), go_out, say_in))
        os.close(go_out)
        os.close(say_in)
        answer(pid=pid)
        sys.stdin.readline()
        os.close(go_in)
        with open(say_out, "rb") as said:
            error = said.read().decode()
        answer(status=os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), error=error)


if __name__ == "__main__":
    main()

"""`fastcas get`: a file, a directory, or part of one, at its place; and what is said about it."""

from __future__ import annotations

import math
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from fastcas.cli.options import (
    check_choice,
    check_fetch,
    check_network,
    choice_options,
    fetch_options,
    json_option,
    network_options,
    open_storage,
    storage_option,
)
from fastcas.cli.render import ProgressShow, bytes_text, print_json, print_line, print_note
from fastcas.cli.runner import resume_hint
from fastcas.errors import UsageError
from fastcas.ids import escape_for_terminal, parse_member
from fastcas.limits import STALL_TIMEOUT_S

__all__ = ["get_command"]

PROGRAM = "fastcas"


@click.command("get")
@click.argument("ref", metavar="REF[/PATH]")
@click.option("-o", "out", metavar="PATH", help="file (for a directory: folder) to create")
@choice_options
@storage_option
@network_options
@fetch_options
@click.option("--seed-from", "seed_from", multiple=True, metavar="PATH",
              help="a file or directory, such as the version before: chunks in it are not fetched (repeatable)")
@click.option("--force", is_flag=True, help="replace a destination with other content")
@click.option("--raw", is_flag=True, help="fetch a collection as the file that describes it")
@click.option("--stall-timeout", type=click.FloatRange(min=0.001), default=STALL_TIMEOUT_S, show_default=True,
              metavar="SECONDS", help="give up after next to nothing has come from anybody for so long")  # fmt: skip
@click.option("--explain", is_flag=True, help="say at the end what limited the download")
@json_option
def get_command(
    ref: str, out: str | None, include: tuple[str, ...], exclude: tuple[str, ...], storage_dir: str,
    peers: tuple[str, ...], bootstrap: tuple[str, ...], timeout: float, network_key: str | None,
    origins: tuple[str, ...], max_download: str | None, seed_from: tuple[str, ...], force: bool, raw: bool,
    stall_timeout: float, explain: bool, as_json: bool,
) -> None:  # fmt: skip
    """Fetch a file or directory by its hash or link (or one file of a directory by its path), and print its path."""
    link = parse_member(ref)
    check_network(peers, bootstrap, timeout)
    if not math.isfinite(stall_timeout):
        raise UsageError(f"--stall-timeout: expected a number of seconds, got {stall_timeout}")
    if out is not None and not out:
        raise UsageError("-o: expected a path, got ''")
    if not all(seed_from):
        raise UsageError("--seed-from: expected a path, got ''")
    args = {
        "ref": str(link), "out": os.fsencode(os.path.abspath(out)) if out is not None else None,
        "folder": os.fsencode(os.getcwd()), "peers": list(peers), "bootstrap": list(bootstrap), "timeout_s": timeout,
        "stall_timeout_s": stall_timeout, "raw": raw, "force": force, "network_key": network_key,
        "seed_from": [os.fsencode(os.path.abspath(path)) for path in seed_from], **check_fetch(origins, max_download),
        **check_choice(link, include, exclude, raw=raw),
    }  # fmt: skip
    resume_hint(shlex.join([PROGRAM, *sys.argv[1:]]))
    with open_storage(storage_dir, optional=True) as access, ProgressShow("fetching", as_json=as_json) as show:
        result = access.call("get", args, on_progress=show)
    if as_json:
        print_json(result)
    else:
        shown = Path(result["path"])
        print_line(str(shown) if out is None or os.path.isabs(out) else out)
        _say_sources(result)
        if result["chosen"] is not None:
            _say_chosen(result["chosen"])
        if explain:
            _say_limits(result["explained"])


def _say_sources(result: dict[str, Any]) -> None:
    parts = [f"{bytes_text(count)} from {peer}" for peer, count in sorted(result["bytes_by_peer"].items())]
    parts += [f"{bytes_text(count)} from {url}" for url, count in sorted(result["bytes_by_origin"].items())]
    if result["local_bytes"]:
        parts.append(f"{bytes_text(result['local_bytes'])} from this machine")
    if result["resumed_bytes"]:
        parts.append(f"{bytes_text(result['resumed_bytes'])} resumed")
    banned = [f"; banned {peer}: {escape_for_terminal(reason)}" for peer, reason in result["banned"].items()]
    banned += [f"; {url}: {escape_for_terminal(reason)}" for url, reason in result["failed_origins"].items()]
    seconds = max(result["seconds"], 0.001)
    rate = bytes_text(result["size"] / seconds)
    count = len(result["bytes_by_peer"])
    total = f"{bytes_text(result['size'])} in {seconds:.1f} s, {rate}/s, {count} peer{'' if count == 1 else 's'}"
    print_note(f"{total}: {', '.join(parts)}{''.join(banned)}")


def _say_chosen(chosen: dict[str, Any]) -> None:
    sizes = f"{bytes_text(chosen['size'])} of {bytes_text(chosen['size_total'])}"
    print_note(f"chosen: {chosen['files']} of {chosen['files_total']} files, {sizes}")


def _say_limits(explained: dict[str, Any]) -> None:
    """Say where the time went, the largest share first."""
    from fastcas.fetch.explain import CAUSES

    def words(cause: str) -> str:
        if cause == "unheld" and explained["n_unheld"]:
            return f"waiting for {explained['n_unheld']} chunks that nobody has"
        return CAUSES.get(cause, cause)

    shares = [f"{share:.0%} {words(cause)}" for cause, share in explained["shares"].items() if share >= 0.01]
    print_note(f"limited by {words(explained['limited_by'])}: {', '.join(shares)}")

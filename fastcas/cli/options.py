"""Options that several commands share, and the way to their storage folder."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fastcas.config import storage_root
from fastcas.errors import UsageError
from fastcas.ids import Link, parse_peer, parse_rate

if TYPE_CHECKING:
    from fastcas.node.access import Access

__all__ = [
    "check_choice", "check_fetch", "check_network", "choice_options", "fetch_options", "json_option", "network_options",
    "open_storage", "storage_option",
]  # fmt: skip

F = TypeVar("F", bound=Callable[..., Any])


def storage_option(function: F) -> F:
    """Add --storage-dir."""
    return click.option(
        "--storage-dir", metavar="DIR", envvar="FASTCAS_STORAGE", default="storage",
        help="storage folder; the default is $FASTCAS_STORAGE, else ./storage",
    )(function)  # fmt: skip


def json_option(function: F) -> F:
    """Add --json."""
    return click.option(
        "--json", "as_json", is_flag=True, help="one JSON object on stdout; progress as JSON lines on stderr"
    )(function)


def network_options(function: F) -> F:
    """Add --peer, --bootstrap, --network-key and --timeout."""
    for option in (
        click.option("--timeout", type=click.FloatRange(min=0.001), default=30.0, show_default=True, metavar="SECONDS",
                     help="how long to wait for the first peer and the manifest"),
        click.option("--bootstrap", multiple=True, metavar="HOST:PORT", envvar="FASTCAS_BOOTSTRAP",
                     help="a DHT node to ask through (repeatable)"),
        click.option("--network-key", metavar="FILE", envvar="FASTCAS_NETWORK_KEY",
                     help="ask in the private DHT of those who have this file"),
        click.option("--peer", "peers", multiple=True, metavar="HOST:PORT", envvar="FASTCAS_PEER",
                     help="a node to ask, without discovery (repeatable)"),
    ):  # fmt: skip
        function = option(function)
    return function


def check_network(peers: Sequence[str], bootstrap: Sequence[str], timeout: float) -> None:
    """Check what `network_options` took.

    Raises:
        UsageError: The message names the option.
    """
    for name, texts in (("--peer", peers), ("--bootstrap", bootstrap)):
        for text in texts:
            parse_peer(text, name)
    if not math.isfinite(timeout):
        raise UsageError(f"--timeout: expected a number of seconds, got {timeout}")


def fetch_options(function: F) -> F:
    """Add --origin and --max-download."""
    for option in (
        click.option("--max-download", metavar="RATE", help="fetch at most so many bytes per second"),
        click.option("--origin", "origins", multiple=True, metavar="URL",
                     help="an HTTP server that has the file, for what no peer has (repeatable); "
                          "of a directory: the URL of its folder, with a / at the end"),
    ):  # fmt: skip
        function = option(function)
    return function


def choice_options(function: F) -> F:
    """Add --include and --exclude."""
    for option in (
        click.option("--exclude", multiple=True, metavar="GLOB", help="of a directory: not these (repeatable)"),
        click.option("--include", multiple=True, metavar="GLOB",
                     help="of a directory: only these files (repeatable); '*.txt' and 'docs' fit names at any depth, "
                          "'a/*.txt' and '/README' paths from the top, '**' any folders between"),
    ):  # fmt: skip
        function = option(function)
    return function


def check_choice(link: Link, include: Sequence[str], exclude: Sequence[str], *, raw: bool) -> dict[str, Any]:
    """Return what `choice_options` took, as arguments of a request.

    Raises:
        UsageError: The message names the option.
    """
    if include or exclude:
        from fastcas.fetch.choosing import Choice

        Choice(include, exclude)
        if raw or link.path is not None:
            raise UsageError(f"--include, --exclude: cannot be used with {'--raw' if raw else 'REF/path'}")
    if raw and link.path is not None:
        raise UsageError("--raw: cannot be used with REF/path")
    return {"include": list(include), "exclude": list(exclude)}


def check_fetch(origins: Sequence[str], max_download: str | None) -> dict[str, Any]:
    """Return what `fetch_options` took, as arguments of a request.

    Raises:
        UsageError: The message names the option.
    """
    from fastcas.fetch.origin import parse_origin

    return {
        "origins": [parse_origin(url) for url in origins],
        "max_download_Bps": parse_rate(max_download, "--max-download") if max_download is not None else None,
    }


@contextlib.contextmanager
def open_storage(storage_dir: str, *, create: bool = False, optional: bool = False) -> Iterator[Access]:
    """Open the way to a storage folder for one command; arguments as `fastcas.node.access.open_access`."""
    from fastcas.node.access import open_access

    access = open_access(storage_root(storage_dir), create=create, optional=optional)
    try:
        yield access
    finally:
        access.close()

"""`fastcas`: store, get and the rest of architecture §9. Each command asks the running node, or works on the folder."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click

from fastcas import __version__
from fastcas.cli.cat_command import cat_command
from fastcas.cli.get_command import get_command
from fastcas.cli.options import (
    check_network,
    json_option,
    network_options,
    open_storage,
    storage_option,
)  # fmt: skip
from fastcas.cli.render import ProgressShow, bytes_text, print_json, print_line, print_note, print_table
from fastcas.cli.runner import resume_hint, run_command
from fastcas.config import storage_root
from fastcas.errors import DamageFound, NotFound, PermissionDenied, UsageError
from fastcas.ids import (
    escape_for_terminal,
    parse_chunk_size,
    parse_parity,
    parse_peer,
    parse_quota,
    parse_rate,
    parse_ref,
    parse_subset,
)
from fastcas.metadata import CDC, check_chunking

__all__ = ["command", "main"]

PROGRAM = "fastcas"
@click.group(PROGRAM, no_args_is_help=False)
@click.version_option(__version__, prog_name=PROGRAM)
def command() -> None:
    """Move big files to many machines: every byte proven, no server needed."""
    level = logging.getLevelNamesMapping().get(os.environ.get("FASTCAS_LOG", "ERROR").upper(), logging.ERROR)
    logging.basicConfig(stream=sys.stderr, level=level, format="%(levelname)s %(name)s: %(message)s")


@command.command("store")
@click.argument("path", metavar="PATH")
@storage_option
@click.option("--chunk-size", metavar="SIZE|auto", default="auto", show_default=True, help="16KiB to 16MiB")
@click.option("--chunking", type=click.Choice(["fixed", "cdc"]), default="fixed", show_default=True,
              help="cdc cuts by content: another version shares what did not change; --chunk-size is the average then")
@click.option("--parity", metavar="K+M", help="M parity chunks for every K data chunks")
@click.option("--in-place", is_flag=True, help="seed from the file where it is, without a copy")
@click.option("--quota", metavar="SIZE|none", help="set the storage folder's quota first; it is remembered")
@json_option
def store_command(
    path: str, storage_dir: str, chunk_size: str, chunking: str, parity: str | None, in_place: bool, quota: str | None,
    as_json: bool,
) -> None:
    """Store a file or directory, and announce it if a node runs on the storage folder."""
    args: dict[str, Any] = {
        "path": os.fsencode(os.path.realpath(path)),
        "chunk_size": parse_chunk_size(chunk_size, "--chunk-size"),
        "chunking": chunking,
        "parity": list(parse_parity(parity, "--parity")) if parity is not None else None,
        "in_place": in_place,
    }
    check_chunking(chunking, args["parity"])
    if quota is not None:
        args["quota"] = parse_quota(quota, "--quota")
    fd = _open_source(path)
    try:
        args["is_dir"] = os.path.isdir(f"/proc/self/fd/{fd}")
        args["name"] = os.fsencode(os.path.basename(os.path.realpath(path))).decode(errors="backslashreplace")
        with open_storage(storage_dir, create=True) as access, ProgressShow("storing", as_json=as_json) as show:
            stored = access.call("store", args, [] if args["is_dir"] else [fd], show)
    finally:
        os.close(fd)
    if as_json:
        print_json(stored)
    else:
        print_line(f"File stored with hash: {stored['file_hash']}")
        print_line(f"Link: {stored['link']}")


def _open_source(path: str) -> int:
    if not path:
        raise UsageError("PATH: expected a path, got ''")
    shown = escape_for_terminal(os.fsencode(path).decode(errors="backslashreplace"))
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as exc:
        raise NotFound(f"{shown}: no such file or directory").about((shown, "no such file or directory")) from exc
    except PermissionError as exc:
        raise PermissionDenied(f"{shown}: permission denied").about((shown, "permission denied")) from exc
    except OSError as exc:
        raise UsageError(f"PATH: {shown}: {exc.strerror}").about((shown, exc.strerror or str(exc))) from exc


@command.command("ls")
@storage_option
@json_option
def ls_command(storage_dir: str, as_json: bool) -> None:
    """List what is stored."""
    with open_storage(storage_dir) as access:
        result = access.call("ls", {})
    if as_json:
        print_json(result)
        return
    rows = [
        [row["file_hash"], bytes_text(row["size"]), _flags(row), row["name"] or "-"]
        for row in result["files"]
        if not (row["is_member"] and not row["name"])
    ]
    print_table(rows)


def _flags(row: dict[str, Any]) -> str:
    flags = [
        word
        for word, is_set in (
            ("collection", row["is_collection"]),
            ("in-place", row["path"] is not None),
            ("incomplete", not row["is_complete"]),
            ("pinned", row["pinned"]),
        )
        if is_set
    ]
    return ",".join(flags) or "file"


@command.command("info")
@click.argument("ref", metavar="REF")
@storage_option
@json_option
def info_command(ref: str, storage_dir: str, as_json: bool) -> None:
    """Show what is known of one stored file."""
    link = parse_ref(ref)
    with open_storage(storage_dir) as access:
        result = access.call("info", {"ref": str(link)})
    if as_json:
        print_json(result)
        return
    row = result["file"]
    lines = [
        ["hash", row["file_hash"]],
        ["name", row["name"] or "-"],
        ["size", f"{row['size']} B"],
        ["kind", _flags(row)],
        ["link", row["link"]],
    ]
    if row["path"] is not None:
        lines.append(["path", row["path"]])
    for manifest in result["manifests"]:
        parity = f", parity {manifest['parity']}: {manifest['n_parity']} chunks" if manifest["parity"] else ""
        kind = "at most {} B, cut by content" if manifest["chunking"] == CDC else "{} B"
        cut = f"{manifest['n_chunks']} chunks of {kind.format(manifest['chunk_size'])}{parity}"
        lines.append(["manifest", f"{manifest['manifest_hash']} {cut}"])
    print_table(lines)


@command.command("peers")
@click.argument("ref", metavar="REF")
@storage_option
@network_options
@json_option
def peers_command(
    ref: str, storage_dir: str, peers: tuple[str, ...], bootstrap: tuple[str, ...], timeout: float,
    network_key: str | None, as_json: bool,
) -> None:  # fmt: skip
    """List the peers that are known to have a file."""
    link = parse_ref(ref)
    check_network(peers, bootstrap, timeout)
    args = {
        "ref": str(link), "peers": list(peers), "bootstrap": list(bootstrap), "timeout_s": timeout,
        "network_key": network_key,
    }  # fmt: skip
    with open_storage(storage_dir, optional=True) as access:
        result = access.call("peers", args)
    if as_json:
        print_json(result)
    else:
        print_table([[f"{ip}:{port}", node_id or "-", source] for node_id, ip, port, source in result["peers"]])
        if result["peers"] and result["dht"] is not None:
            print_note(f"DHT: {_dht_text(result['dht'])}")
    if not result["peers"]:
        raise NotFound(f"no peer has {link.file_hash.hex()}")


@command.command("status")
@storage_option
@json_option
def status_command(storage_dir: str, as_json: bool) -> None:
    """Show the running node: processes, ports, contents, downloads."""
    with open_storage(storage_dir) as access:
        status = access.call("status", {})
    if as_json:
        print_json(status)
    else:
        print_table(_status_rows(status))


def _status_rows(status: dict[str, Any]) -> list[list[str]]:
    kept = status["store"]
    rows = [["storage", status["storage"]]]
    if status["node_id"] is None:
        rows.append(["node", "not running"])
    else:
        data, dht = status["data"], status["dht"]
        rows += [
            ["node", f"{status['node_id']} {status['label']}".rstrip()],
            ["supervisor", f"pid {status['pid']}, up {status['uptime_s']:.0f} s"],
            ["data", f"tcp://{data['host']}:{data['port']}" if data["port"] else "off"],
            ["dht", f"udp port {dht['port']}, {_dht_text(dht)}" if dht else "off"],
        ]
        for worker in status["workers"]:
            counters = worker["counters"]
            rows.append(
                ["worker", f"pid {worker['pid']}, {counters['active']} connections, {counters['requests']} requests, "
                           f"{bytes_text(counters['bytes_sent'])} sent"]
            )  # fmt: skip
    stored, logical, linked = (bytes_text(kept[name]) for name in ("stored", "logical", "linked"))
    rows += [
        ["files", str(kept["files"])],
        ["chunks", str(kept["chunks"])],
        ["logical", logical],
        ["stored", f"{stored}, {linked} in place"],
        ["shared", bytes_text(kept["shared"])],
    ]
    if kept["quota"]:
        rows.append(["quota", f"{bytes_text(kept['used'])} of {bytes_text(kept['quota'])}"])
    scrub = status.get("scrub") or {}
    if "bytes" in scrub:
        at = time.strftime("%Y-%m-%d %H:%M", time.localtime(scrub["finished_at"]))
        found = f"{scrub['n_damaged']} damaged, {scrub['n_repaired']} repaired"
        rows.append(["scrub", f"{at}, {bytes_text(scrub['bytes'])}, {found}"])
    for item in status.get("downloads", []):
        rate = bytes_text(item["rate_Bps"])
        rows.append(["download", f"{item['name']} {bytes_text(item['done'])} of {bytes_text(item['total'])}, {rate}/s"])
    return rows


def _dht_text(dht: dict[str, Any]) -> str:
    """Return what a DHT process says of itself: whom it knows, what it did, what it refused."""
    parts = [f"{dht['contacts']} contact{'' if dht['contacts'] == 1 else 's'}"]
    if "nodes_estimated" in dht:
        parts[0] += f" of about {dht['nodes_estimated']} nodes"
        hops = dht["lookup_hops"] / max(dht["lookups"], 1)
        parts.append(f"{dht['lookups']} lookups of {hops:.1f} hops")
        parts.append(f"announces {dht['announce']} chunks")
    drops = [f"{count} {cause}" for cause, count in sorted(dht.get("drops", {}).items())]
    if drops:
        parts.append(f"dropped: {', '.join(drops)}")
    return ", ".join(parts)


@command.command("verify")
@click.option("--repair", is_flag=True, help="mend what can be mended: other copies, parity, then peers")
@click.option("--peer", "peers", multiple=True, metavar="HOST:PORT", envvar="FASTCAS_PEER",
              help="a node to repair from (repeatable); a running node also asks those it finds")
@click.option("--rate", metavar="RATE", help="read at most so many bytes per second; the default is no limit")
@click.option("--subset", metavar="I/N", help="check the I-th of N parts only")
@click.option("--restart", is_flag=True, help="begin anew instead of where a verify of the last 24 hours was stopped")
@storage_option
@json_option
def verify_command(
    repair: bool, peers: tuple[str, ...], rate: str | None, subset: str | None, restart: bool, storage_dir: str,
    as_json: bool,
) -> None:  # fmt: skip
    """Read everything that is stored and check it. Exits 5 while damage is left."""
    for text in peers:
        parse_peer(text, "--peer")
    args = {
        "repair": repair, "peers": list(peers), "rate_Bps": parse_rate(rate, "--rate") if rate is not None else None,
        "subset": list(parse_subset(subset, "--subset")) if subset is not None else None, "restart": restart,
    }  # fmt: skip
    if subset is None:
        resume_hint(shlex.join([PROGRAM, *(word for word in sys.argv[1:] if word != "--restart")]))
    with open_storage(storage_dir) as access, ProgressShow("verifying", as_json=as_json) as show:
        report = access.call("verify", args, on_progress=show)
    if as_json:
        print_json(report)
    else:
        for item in report["damages"]:
            state = f"repaired from {item['repaired_by']}" if item["repaired_by"] else "damaged"
            where = f" at {item['offset']} of {item['path']}" if item["path"] else ""
            print_line(escape_for_terminal(f"{state}: {item['kind']} {item['hash']}{where}: {item['reason']}"))
        before = f" ({bytes_text(report['resumed_bytes'])} before the interruption)" if report["resumed_bytes"] else ""
        print_line(
            f"{report['chunks']} chunks, {bytes_text(report['bytes'])}, {report['manifests']} manifests "
            f"checked{before}: {report['n_damaged']} damaged, {report['n_repaired']} repaired"
        )
    if not report["is_clean"]:
        left = report["n_damaged"] - report["n_repaired"]
        raise DamageFound(f"verify: {left} damaged and not repaired")


@command.command("rm")
@click.argument("ref", metavar="REF")
@storage_option
@json_option
def rm_command(ref: str, storage_dir: str, as_json: bool) -> None:
    """Forget a file; `gc` then frees its space."""
    link = parse_ref(ref)
    with open_storage(storage_dir) as access:
        result = access.call("rm", {"ref": str(link)})
    if as_json:
        print_json(result)
    else:
        print_line(f"Removed {result['file_hash']}; run gc to free its space")


@command.command("pin")
@click.argument("ref", metavar="REF")
@storage_option
@json_option
def pin_command(ref: str, storage_dir: str, as_json: bool) -> None:
    """Keep a file: the quota never takes it."""
    _pin("pin", ref, storage_dir, as_json)


@command.command("unpin")
@click.argument("ref", metavar="REF")
@storage_option
@json_option
def unpin_command(ref: str, storage_dir: str, as_json: bool) -> None:
    """Let the quota take a file again."""
    _pin("unpin", ref, storage_dir, as_json)


def _pin(op: str, ref: str, storage_dir: str, as_json: bool) -> None:
    link = parse_ref(ref)
    with open_storage(storage_dir) as access:
        result = access.call(op, {"ref": str(link)})
    if as_json:
        print_json(result)
    else:
        print_line(f"{'Pinned' if result['pinned'] else 'Unpinned'} {result['file_hash']}")


@command.command("gc")
@storage_option
@json_option
def gc_command(storage_dir: str, as_json: bool) -> None:
    """Free the space of what no stored file needs."""
    with open_storage(storage_dir) as access:
        result = access.call("gc", {})
    if as_json:
        print_json(result)
    else:
        print_line(f"Freed {bytes_text(result['bytes_freed'])} of {result['chunks']} chunks")


@command.command("rebuild")
@storage_option
@json_option
def rebuild_command(storage_dir: str, as_json: bool) -> None:
    """Make a new catalog from the manifests and blobs on disk, every byte checked."""
    from fastcas.store import Store

    with ProgressShow("reading", as_json=as_json) as show:
        report = Store.rebuild(
            storage_root(storage_dir), progress=lambda done, total: show({"done": done, "total": total})
        )
    if as_json:
        print_json(asdict(report))
        return
    for subject, reason in report.left_out:
        print_note(f"left out {subject}: {reason}")
    incomplete = f", {report.incomplete} of them incomplete" if report.incomplete else ""
    print_line(f"{report.files} files{incomplete}, {report.chunks} chunks, {bytes_text(report.bytes)} checked")
    if report.old_catalog is not None:
        print_note(f"the old catalog is kept as {escape_for_terminal(report.old_catalog)}")


@command.command("migrate")
@click.argument("old_dir", metavar="DIR")
@storage_option
@json_option
def migrate_command(old_dir: str, storage_dir: str, as_json: bool) -> None:
    """Import a storage folder of the older layout."""
    path = os.fsencode(os.path.realpath(old_dir))
    with open_storage(storage_dir, create=True) as access, ProgressShow("migrating", as_json=as_json) as show:
        result = access.call("migrate", {"path": path}, on_progress=show)
    if as_json:
        print_json(result)
        return
    for stored in result["files"]:
        print_line(f"{stored['file_hash']}  {escape_for_terminal(stored['name'])}")
    for subject, reason in result["left_out"]:
        print_note(f"left out {subject}: {reason}")
    print_line(f"Imported {len(result['files'])} files, {bytes_text(result['bytes'])}")


@command.command("index")
@storage_option
@json_option
def index_command(storage_dir: str, as_json: bool) -> None:
    """Print a cas_index.json of what is stored."""
    with open_storage(storage_dir) as access:
        print_json(access.call("index", {})["index"])


command.add_command(cat_command)
command.add_command(get_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `fastcas`; returns the exit status."""
    return run_command(command, PROGRAM, arguments)


if __name__ == "__main__":
    sys.exit(main())

"""`fastcas-node`: run a node in this process until it is told to stop. Its flags are the fields of `NodeConfig`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import click

from fastcas.cli.runner import run_command
from fastcas.config import SEND_PATHS, NodeConfig

__all__ = ["command", "main", "ready_line"]

PROGRAM = "fastcas-node"


def ready_line(facts: dict[str, Any]) -> str:
    """Return the one line that a node prints once it accepts connections (architecture §9)."""
    host = f"[{facts['host']}]" if ":" in facts["host"] else facts["host"]
    dht = "off" if facts["dht_port"] is None else f"udp://{host}:{facts['dht_port']}"
    return (
        f"node {facts['id']} ready: data tcp://{host}:{facts['port']} workers={facts['workers']} "
        f"dht {dht} storage={facts['storage']} chunks={facts['chunks']}"
    )


def _option(item: dataclasses.Field[Any]) -> click.Option:
    kind = item.metadata["kind"]
    name = item.name.replace("_", "-")
    default = item.default if item.default is not dataclasses.MISSING else []
    types: dict[str, Any] = {
        "count": click.IntRange(min=1),
        "port": click.IntRange(0, 65535),
        "choice": click.Choice(SEND_PATHS),
    }
    settings: dict[str, Any] = {"envvar": f"FASTCAS_{item.name.upper()}", "help": item.metadata["help"]}
    if kind == "flag":
        return click.Option([f"--{name}"], is_flag=True, **settings)
    if kind == "peers":
        return click.Option([f"--{name}"], multiple=True, metavar=item.metadata["metavar"], **settings)
    shown = None if item.name == "workers" else default
    return click.Option(
        [f"--{name}"], type=types.get(kind, str), default=shown, metavar=item.metadata["metavar"],
        show_default=bool(shown), **settings,
    )  # fmt: skip


def _run(**values: Any) -> int:
    from fastcas.node.logs import set_up_logging
    from fastcas.node.supervisor import run_supervisor

    context = click.get_current_context()
    given = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    given["workers"] = -1 if given["workers"] is None else given["workers"]
    source = context.get_parameter_source("dht_port")
    named = source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT")
    config = NodeConfig(**given, dht_port_required=named and given["dht_port"] != 0).check()
    set_up_logging()

    def report(facts: dict[str, Any]) -> None:
        sys.stdout.write(ready_line(facts) + "\n")
        sys.stdout.flush()

    return run_supervisor(config, report)


command = click.Command(
    PROGRAM,
    params=[_option(item) for item in dataclasses.fields(NodeConfig) if item.metadata],
    callback=_run,
    help="Run a node: serve what is stored, find and be found, until SIGTERM.",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `fastcas-node`; returns the exit status."""
    return run_command(command, PROGRAM, arguments)


if __name__ == "__main__":
    sys.exit(main())

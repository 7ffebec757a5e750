"""`fastcas-node`: run a node in this process until it is told to stop. Its flags are the fields of `NodeConfig`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import click

from fastcas.cli.runner import run_command
from fastcas.config import SETTINGS, NodeConfig, Setting
from fastcas.limits import WORKERS_MAX

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


def _option(name: str, setting: Setting) -> click.Option:
    flag = "--" + name.replace("_", "-")
    types: dict[str, Any] = {
        "count": click.IntRange(1, WORKERS_MAX),
        "port": click.IntRange(0, 65535),
        "choice": click.Choice(setting.metavar.split("|")),
    }
    shared: dict[str, Any] = {"envvar": f"FASTCAS_{name.upper()}", "help": setting.help}
    if setting.kind == "flag":
        return click.Option([flag], is_flag=True, **shared)
    if setting.kind == "peers":
        return click.Option([flag], multiple=True, metavar=setting.metavar, **shared)
    default = None if name == "workers" else getattr(NodeConfig, name)
    return click.Option(
        [flag], type=types.get(setting.kind, str), default=default, metavar=setting.metavar,
        show_default=bool(default), **shared,
    )  # fmt: skip


def _run(**values: Any) -> int:
    from fastcas.node.logs import set_up_logging
    from fastcas.node.supervisor import run_supervisor

    context = click.get_current_context()
    given = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    given["workers"] = -1 if given["workers"] is None else given["workers"]
    source = context.get_parameter_source("dht_port")
    named = source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT")
    given["dht_port_required"] = named and given["dht_port"] != 0
    config = NodeConfig.from_json(json.dumps(given)).check()
    set_up_logging()

    def report(facts: dict[str, Any]) -> None:
        sys.stdout.write(ready_line(facts) + "\n")
        sys.stdout.flush()

    return run_supervisor(config, report)


command = click.Command(
    PROGRAM,
    params=[_option(name, setting) for name, setting in SETTINGS.items()],
    callback=_run,
    help="Run a node: serve what is stored, find and be found, until SIGTERM.",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `fastcas-node`; returns the exit status."""
    return run_command(command, PROGRAM, arguments)


if __name__ == "__main__":
    sys.exit(main())

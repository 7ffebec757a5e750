"""Status for machines: `GET /status` (JSON) and `GET /metrics` (Prometheus text) on 127.0.0.1, nothing else.

One request per connection. Loopback only; no request changes anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from fastcas.errors import PortInUse

__all__ = ["AdminServer", "metrics_text"]

REQUEST_S = 5.0
REQUEST_MAX = 8192


_WORKER_GAUGES = {
    "active": ("connections", "connections open now"),
    "epoch_safe": ("epoch_safe", "table epoch that no response in flight is older than"),
    "epoch_table": ("table_number", "number of the chunk table in use"),
    "queue_bytes": ("queue_bytes", "bytes of peers' requests that wait to be sent"),
    "uplink_rate": ("uplink_rate", "measured rate of the uplink, bytes per second, 0 = not known"),
}
_FAMILIES = {"status_": ("responses", "status", "responses by status"),
             "evict_": ("evictions", "cause", "connections closed by us, by cause")}  # fmt: skip
_DHT_GAUGES = {
    "contacts": "nodes in the routing table",
    "nodes_estimated": "nodes in the network, estimated",
    "hints_held": "chunk records held for others",
    "providers_held": "nodes whose chunk records are held",
    "swarm_records_held": "swarm records held for others",
    "metadata_keys_held": "files whose metadata records are held",
    "chunks_offered": "chunks of this node",
    "files_offered": "files of this node",
}
_RENAMED = {"shortfall": ("shortfalls", "blobs found shorter than their extents, changed or unreadable")}


def _store_families(status: dict[str, Any]) -> Iterator[Metric]:
    for name in ("files", "chunks", "logical", "stored", "linked"):
        unit = "" if name in ("files", "chunks") else "_bytes"
        yield GaugeMetricFamily(f"fastcas_store_{name}{unit}", f"{name} in the store", status["store"].get(name, 0))
    yield GaugeMetricFamily("fastcas_uptime_seconds", "age of the node's agent", status["uptime_s"])
    yield GaugeMetricFamily("fastcas_downloads", "downloads that run", len(status["downloads"]))


def _dht_families(dht: dict[str, Any]) -> Iterator[Metric]:
    """Yield what the DHT process counts; its counters begin again when it does."""
    drops = CounterMetricFamily("fastcas_dht_drops", "datagrams dropped, by cause", labels=["cause"])
    for cause, value in dht.get("drops", {}).items():
        drops.add_metric([cause], value)
    requests = CounterMetricFamily("fastcas_dht_requests", "requests sent, by name", labels=["rpc"])
    yield drops
    for name, value in dht.items():
        if not isinstance(value, int) or name in ("port", "pid", "requests"):
            continue
        if name.startswith("rpc_"):
            requests.add_metric([name.removeprefix("rpc_")], value)
        elif name in _DHT_GAUGES:
            yield GaugeMetricFamily(f"fastcas_dht_{name}", _DHT_GAUGES[name], value)
        else:
            yield CounterMetricFamily(f"fastcas_dht_{name}", name.replace("_", " "), value)
    yield requests


def _worker_families(workers: list[dict[str, Any]], now_ns: int) -> Iterator[Metric]:
    families: dict[str, Metric] = {
        "heartbeat": GaugeMetricFamily(
            "fastcas_worker_heartbeat_age_seconds", "time since the last turn of the loop", labels=["worker"]
        )
    }

    def add(kind: type[Any], name: str, text: str, value: int, slot: str, *, label: str = "", of: str = "") -> None:
        if name not in families:
            families[name] = kind(f"fastcas_worker_{name}", text, labels=["worker", label] if label else ["worker"])
        families[name].add_metric([slot, of] if label else [slot], value)  # type: ignore[attr-defined]

    for worker in workers:
        slot = str(worker["slot"])
        for name, value in worker["counters"].items():
            prefix = next((start for start in _FAMILIES if name.startswith(start)), None)
            if name == "heartbeat_ns":
                age_s = max(0, now_ns - value) / 1e9
                families["heartbeat"].add_metric([slot], age_s)  # type: ignore[attr-defined]
            elif name in _WORKER_GAUGES:
                add(GaugeMetricFamily, *_WORKER_GAUGES[name], value, slot)
            elif prefix is not None:
                family, label, text = _FAMILIES[prefix]
                add(CounterMetricFamily, family, text, value, slot, label=label, of=name.removeprefix(prefix))
            else:
                shown, text = _RENAMED.get(name, (name, name.replace("_", " ")))
                add(CounterMetricFamily, shown, text, value, slot)
    yield from families.values()


class _Snapshot(Collector):
    """One status as metrics: every scrape has a registry of its own, nothing is kept between two."""

    def __init__(self, status: dict[str, Any]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        yield from _store_families(self._status)
        if self._status["dht"] is not None:
            yield from _dht_families(self._status["dht"])
        yield from _worker_families(self._status["workers"], time.monotonic_ns())


def metrics_text(status: dict[str, Any]) -> bytes:
    """Return a status in the Prometheus text format.

    A worker is named by its counter slot, which a successor takes over with the counts: counters never go back.

    Args:
        status: What `status` of the agent returns.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(status))
    return generate_latest(registry)


class AdminServer:
    """Serves what `status` returns."""

    def __init__(self, port: int, status: Callable[[], Awaitable[dict[str, Any]]]) -> None:
        self._port = port
        self._status = status
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen.

        Raises:
            PortInUse: The port is taken.
        """
        try:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port, limit=REQUEST_MAX)
        except OSError as exc:
            raise PortInUse(f"Port already in use: admin TCP port {self._port} of 127.0.0.1") from exc

    async def close(self) -> None:
        """Stop listening. Idempotent."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_S):
                head = await reader.readuntil(b"\r\n\r\n")
                status, kind, body = await self._answer(head.split(b"\r\n", 1)[0])
                writer.write(
                    f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
                    "Connection: close\r\n\r\n".encode()
                    + body
                )
                await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _answer(self, request_line: bytes) -> tuple[str, str, bytes]:
        match request_line.split(b" "):
            case [b"GET", b"/status", _]:
                return "200 OK", "application/json", json.dumps(await self._status()).encode()
            case [b"GET", b"/metrics", _]:
                return "200 OK", CONTENT_TYPE_LATEST, metrics_text(await self._status())
        return "404 Not Found", "text/plain", b"/status and /metrics are here\n"

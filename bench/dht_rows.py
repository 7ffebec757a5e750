"""One line per target of the DHT bench: what, measured, wanted, met or MISSED."""

from __future__ import annotations

__all__ = ["AT_LEAST", "AT_MOST", "line"]

AT_MOST, AT_LEAST = "<=", ">="


def line(what: str, measured: float, relation: str, target: float, *, digits: int = 2, unit: str = "") -> None:
    """Print one line of the table."""
    met = measured <= target if relation == AT_MOST else measured >= target
    unit = f" {unit}" if unit else ""
    verdict = "met" if met else "MISSED"
    print(f"  {what:56} {measured:12,.{digits}f}{unit:5} target {relation} {target:,g}{unit}: {verdict}", flush=True)

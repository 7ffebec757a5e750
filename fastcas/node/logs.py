"""Logging of our processes: one line per record on stderr. `FASTCAS_LOG` sets the level (default INFO)."""

from __future__ import annotations

import logging
import os
import sys

__all__ = ["set_up_logging"]


def set_up_logging(default: str = "INFO") -> None:
    """Send the log to stderr at the level of `$FASTCAS_LOG`; an unknown level counts as the default."""
    level = logging.getLevelNamesMapping().get(os.environ.get("FASTCAS_LOG", default).upper(), logging.INFO)
    logging.basicConfig(
        stream=sys.stderr, level=level, format="%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"
    )

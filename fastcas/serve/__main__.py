"""`python -m fastcas.serve --channel FD`: a worker process, started by the supervisor."""

from __future__ import annotations

import argparse
import logging
import sys

from fastcas.serve.worker import run_worker


def main() -> int:
    """Parse the command line and serve; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fastcas.serve")
    parser.add_argument(
        "--channel", type=int, required=True, metavar="FD", help="inherited end of the parent's channel"
    )
    options = parser.parse_args()
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr
    )
    return run_worker(options.channel)


if __name__ == "__main__":
    sys.exit(main())

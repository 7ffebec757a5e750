"""`python -m fastcas` is the `fastcas` command."""

import sys

from fastcas.cli.start import fastcas

if __name__ == "__main__":
    sys.exit(fastcas())

"""`python -m fastcas` is the `fastcas` command."""

import sys

from fastcas.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

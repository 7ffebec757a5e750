"""`python -m fastcas.dht`."""

import sys

from fastcas.dht.process import main

if __name__ == "__main__":
    sys.exit(main())

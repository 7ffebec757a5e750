"""Power cuts: what the store acknowledged before one is there and right after it; nothing needs a hand.

`FASTCAS_POWER_CUTS` says how many (`make power-cuts`: 60), see tests/support/store_power.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CUTS = int(os.environ.get("FASTCAS_POWER_CUTS", "3"))
SEED = os.environ.get("FASTCAS_TEST_SEED", "1")

if os.geteuid() == 0:  # mounting needs root

    @pytest.mark.slow
    def test_nothing_acknowledged_is_lost_in_a_power_cut(tmp_path: Path) -> None:
        done = subprocess.run(
            ["unshare", "-m", sys.executable, "-m", "tests.support.store_power", str(tmp_path), str(CUTS), SEED],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"seed {SEED}: {done.stderr}"
        assert int(done.stdout) >= CUTS
        print(f"{CUTS} power cuts, {int(done.stdout)} acknowledged files, none missing")

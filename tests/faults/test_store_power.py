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
    @pytest.mark.parametrize("who", ["store", "bare"])
    def test_nothing_acknowledged_is_lost_in_a_power_cut(tmp_path: Path, who: str) -> None:
        cuts = CUTS if who == "store" else 5 * CUTS  # plain files take a tenth of a second
        done = subprocess.run(
            ["unshare", "-m", sys.executable, "-m", "tests.support.store_power", tmp_path, str(cuts), SEED, who],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"seed {SEED}: {done.stderr}"
        before, within, within_missing = map(int, done.stdout.split())
        print(
            f"{who}: {cuts} power cuts, {before} files acknowledged before them, none missing; "
            f"{within} acknowledged while the file system ended, {within_missing} of these missing"
        )
        assert before >= cuts

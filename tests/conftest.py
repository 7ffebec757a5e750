"""For all tests: Hypothesis judges results, never times, and says how to repeat a failure."""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("fastcas", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fastcas"))

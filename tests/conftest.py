"""For all tests: Hypothesis judges results, never times, and says how to repeat a failure; Ctrl-C means Ctrl-C."""

from __future__ import annotations

import os
import signal

from hypothesis import settings

settings.register_profile("fastcas", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fastcas"))

# A shell starts background jobs with SIGINT ignored, and children inherit that: then nothing here could be interrupted.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

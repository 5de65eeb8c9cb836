"""Shared set-up: one thread per test process, so that timings and results don't depend on the machine's cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

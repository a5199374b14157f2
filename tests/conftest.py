"""Settings for all tests."""

import os
from pathlib import Path

from hypothesis import settings

# First calls compile kernels, so a deadline per example says nothing.
settings.register_profile("trivium", deadline=None, print_blob=True)
settings.load_profile("trivium")

if not Path("/dev/nvidiactl").exists():  # without a GPU, Triton interprets; it must know before anything imports it
    os.environ["TRITON_INTERPRET"] = "1"

"""Settings for all tests."""

from hypothesis import settings

# First calls compile kernels, so a deadline per example says nothing.
settings.register_profile("trivium", deadline=None, print_blob=True)
settings.load_profile("trivium")

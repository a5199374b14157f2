"""Imported first by a job that runs as a script, `python jobs/X.py`: puts the checkout on the path, not `jobs/`.

Python puts the script's own folder first on the path, where `jobs/dedup.py` would hide the package `dedup`.
"""

import sys
from pathlib import Path

JOBS = Path(__file__).resolve().parent
sys.path[:] = [str(JOBS.parent), *(p for p in sys.path if p and Path(p).resolve() != JOBS)]

"""Make `_tiny` importable from every test."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
# What LightningCLI calls, jsonargparse has renamed.
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"
# Several tests run at once; the models are too small to gain by threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

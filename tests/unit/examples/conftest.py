"""The quickstart's scripts import their neighbours by name, as Python does for a script; so do its tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "examples" / "quickstart"))

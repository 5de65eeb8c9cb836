"""Text from a checkpoint, with and without early exits: python tools/generate_text.py --help."""

import os
import sys
from pathlib import Path

# the package of this checkout, wherever the script is called from and whatever else is installed
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Before torch is imported: threads that wait sleep instead of spinning, or any other busy process on a small machine
# makes a step several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from megatron.cli.generate import main

if __name__ == "__main__":
    raise SystemExit(main())

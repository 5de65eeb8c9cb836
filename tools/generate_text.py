"""Text from a checkpoint, with and without early exits: python tools/generate_text.py --help."""

import sys
from pathlib import Path

# the package of this checkout, wherever the script is called from and whatever else is installed
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.cli.generate import main

if __name__ == "__main__":
    raise SystemExit(main())

"""Change the layout of Megatron's checkpoints: python tools/checkpoint/util.py --help."""

import sys
from pathlib import Path

# the package of this checkout, wherever the script is called from and whatever else is installed
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.cli.reshard_checkpoint import main

if __name__ == "__main__":
    raise SystemExit(main())

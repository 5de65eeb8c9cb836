"""Compare the losses of two runs: python tools/compare_loss.py A.jsonl B.jsonl --assert-equal."""

import sys
from pathlib import Path

# the package of this checkout, wherever the script is called from and whatever else is installed
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.cli.compare_loss import main

if __name__ == "__main__":
    raise SystemExit(main())

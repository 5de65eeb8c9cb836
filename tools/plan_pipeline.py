"""Find the fastest layout of a model on so many devices: python tools/plan_pipeline.py --help."""

import sys
from pathlib import Path

# the package of this checkout, wherever the script is called from and whatever else is installed
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.cli.plan_pipeline import main

if __name__ == "__main__":
    raise SystemExit(main())

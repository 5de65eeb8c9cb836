"""Draw pipeline schedules with exits: python tools/draw_schedule.py --help."""

import sys
from pathlib import Path

# the package of this checkout, wherever the script is called from and whatever else is installed
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.cli.draw_schedule import main

if __name__ == "__main__":
    raise SystemExit(main())

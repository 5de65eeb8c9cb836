"""Whether the launched processes compute rightly and how fast: python tools/check_cluster.py --help."""

import os
import sys
from pathlib import Path

# the package of this checkout, wherever the script is called from and whatever else is installed
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# before torch is imported: threads that wait sleep instead of spinning
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from megatron.cli.check_cluster import main

if __name__ == "__main__":
    raise SystemExit(main())

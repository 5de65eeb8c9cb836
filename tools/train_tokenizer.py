"""Train a byte-level BPE tokenizer: python tools/train_tokenizer.py --help."""

import sys
from pathlib import Path

# the package of this checkout, wherever the script is called from and whatever else is installed
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.cli.train_tokenizer import main

if __name__ == "__main__":
    raise SystemExit(main())

"""Pretrain (or evaluate) a GPT or Llama with early exits: `python pretrain_early_exit_gpt.py --help`."""

import sys

from megatron.cli.pretrain import main

if __name__ == "__main__":
    sys.exit(main())

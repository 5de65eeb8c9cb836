"""Pretrain (or evaluate) a GPT or Llama with early exits: `python pretrain_early_exit_gpt.py --help`."""

import os

# Before torch is imported: threads that wait sleep instead of spinning, or any other busy process on a small machine
# makes a step several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def run() -> int:
    """Import and run; Ctrl-C while torch is being imported ends quietly, too."""
    try:
        from megatron.cli.pretrain import main

        return main()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(run())

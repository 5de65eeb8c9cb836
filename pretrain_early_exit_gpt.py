"""Pretrain (or evaluate) a GPT or Llama with early exits: `python pretrain_early_exit_gpt.py --help`."""


def run() -> int:
    """Import and run; Ctrl-C while torch is being imported ends quietly, too."""
    try:
        from megatron.cli.pretrain import main

        return main()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(run())

#!/usr/bin/env bash
# From nothing to an early-exit language model that you trained yourself, in about ten minutes on a laptop:
#
#   bash examples/quickstart.sh
#
# Makes .venv, collects text from Python's standard library, trains a tokenizer and a small GPT with two early exits,
# draws its losses, scores each exit on text it never saw, and compares generation with and without exits.
# Run it again to go on where it was stopped. Environment variables:
#
#   QUICK=1      the whole way in about a minute, to see that it works; the model learns next to nothing
#   MINUTES=60   train for that many minutes instead of 5; from 20 on a larger model
#   RUN_DIR=DIR  where everything goes            (default: quickstart-run, within it one folder for each QUICK/MINUTES)
#   EE_LLM_PYTHON, EE_LLM_TORCH                   see examples/setup_env.sh
set -euo pipefail

case "${1:-}" in
    "") ;;
    -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) echo "error: unknown word $1; see bash examples/quickstart.sh --help" >&2; exit 2 ;;
esac

case "${RUN_DIR:-}" in
    "" | /*) ;;
    *) RUN_DIR="$PWD/$RUN_DIR" ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash examples/setup_env.sh
RUN_DIR="${RUN_DIR:-}" exec .venv/bin/python examples/quickstart/run.py

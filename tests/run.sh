#!/usr/bin/env bash
# Lint, import rules and tests, in a .venv that is made if need be:
#
#   bash tests/run.sh                   all but the tests marked slow
#   bash tests/run.sh --quick           the inner loop: leaves out whole training runs and runs of several ranks
#   bash tests/run.sh [--quick] WORDS   WORDS go to pytest: tests/unit/optim, -k resume, -x, -n 0 (one process)
#   bash tests/run.sh -m slow           the full figures, by hand
#
# The last lines say what passed, what failed and how long each part took; README.md states the usual durations.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

quick=
for word in "$@"; do
    shift
    case "$word" in
        -h | --help)
            sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        --quick) quick=yes ;;
        *)
            set -- "$@" "$word"
            ;;
    esac
done

bash examples/setup_env.sh --test
bin=$PWD/.venv/bin

if [ -n "$quick" ]; then
    set -- --ignore=tests/golden/test_trajectory_golden.py --ignore=tests/curves --ignore=tests/unit/train \
        --ignore=tests/house/test_commands.py --ignore=tests/ranks "$@"
fi

report=
failed=0
part() { # name, command and its words
    local name=$1 started=$SECONDS status=0
    shift
    printf '\n== %s\n' "$name"
    "$@" || status=$?
    if [ "$status" -ne 0 ]; then failed=1; fi
    report="$report$(printf '  %-14s %-7s %4d s' "$name" "$([ "$status" -eq 0 ] && echo passed || echo FAILED)" \
        "$((SECONDS - started))")
"
}

started=$SECONDS
part "ruff check" "$bin/ruff" check .
part "ruff format" "$bin/ruff" format --check .
part "import rules" "$bin/lint-imports" --no-logo
part "tests" "$bin/python" -m pytest -q -n auto --maxprocesses 8 --dist worksteal --durations 10 "$@"

printf '\n%s  %-14s %-7s %4d s\n' "$report" all "$([ "$failed" -eq 0 ] && echo passed || echo FAILED)" \
    "$((SECONDS - started))"
exit "$failed"

# What all launch scripts share; `source`d by theirs once they stand in the repository's root directory.

fail() { echo "error: $1" >&2; exit 2; }

needs() {
    [ -n "${!1:-}" ] || fail "$1 is not set: $2"
}

whole() {
    [[ "${!1}" =~ ^[1-9][0-9]*$ ]] || fail "$1 is '${!1}': give a whole number of at least 1"
}

if [ -z "${PYTHON:-}" ]; then
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python || PYTHON=python3
fi
if [ -z "${GPUS_PER_NODE:-}" ]; then
    GPUS_PER_NODE=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
    [ "$GPUS_PER_NODE" -gt 0 ] || GPUS_PER_NODE=8
fi

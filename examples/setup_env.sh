#!/usr/bin/env bash
# Makes .venv in the repository's root and installs EE-LLM in it, editable:
#
#   bash examples/setup_env.sh           what training and the quickstart need
#   bash examples/setup_env.sh --test    and what the tests need
#
# A second call finds everything in place and returns at once. Environment variables:
#
#   EE_LLM_PYTHON   interpreter to use, 3.10 or newer               (default: python3)
#   EE_LLM_TORCH    torch to install, as words for `pip install`    (default: see below)
#                   EE_LLM_TORCH="torch==2.12.0 --index-url https://..."
#
# Which torch: one of at least 2.11 that the interpreter can import (a container's, conda's, a cluster module's) is
# reused and never replaced; then only packages that are missing are added. Otherwise a pinned one is installed: the
# CPU build where no NVIDIA GPU is seen and pip's configured indices offer it, else the default build.
# Indices, proxies and wheel directories are pip's own business: its configuration files and variables are honoured.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TORCH=2.13.0
TORCH_AT_LEAST=2.11
STAMP=.venv/ee-llm-stamp
LOG=.venv/ee-llm-install.log
REUSED=.venv/ee-llm-reused-torch

say() { printf '%s\n' "$*" >&2; }
fail() { say "error: $*"; exit 1; }

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

[ $# -le 1 ] || fail "one word at most; see bash examples/setup_env.sh --help"
extras=run
case "${1:-}" in
    "") ;;
    --test) extras="test" ;;
    -h | --help) usage; exit 0 ;;
    *) fail "unknown word $1; see bash examples/setup_env.sh --help" ;;
esac

# What the environment is made from; another one of these and the installation runs again.
state() {
    printf '%s %s %s\n' "$PWD" "$(.venv/bin/python -V 2>&1)" "${EE_LLM_TORCH:-}"
    cat requirements.txt tests/requirements.txt pyproject.toml setup.py megatron/data/index_builder.cpp \
        examples/setup_env.sh | cksum
}

usable_venv() { [ -x .venv/bin/python ] && .venv/bin/python -c '' 2>/dev/null; }

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

if [ -n "${EE_LLM_PYTHON:-}" ]; then
    is_new_enough "$EE_LLM_PYTHON" || fail "EE_LLM_PYTHON=$EE_LLM_PYTHON is no Python of 3.10 or newer"
    if usable_venv && [ "$(version_of .venv/bin/python)" != "$(version_of "$EE_LLM_PYTHON")" ]; then
        fail ".venv is of Python $(version_of .venv/bin/python), EE_LLM_PYTHON of $(version_of "$EE_LLM_PYTHON"):" \
            "remove .venv to change it"
    fi
fi

# The stamp's first line says how much is installed: the test extras include the rest.
if usable_venv && [ -f "$STAMP" ] && [ "$(tail -n +2 "$STAMP")" = "$(state)" ]; then
    installed=$(head -n 1 "$STAMP")
    if [ "$installed" = test ] || [ "$installed" = "$extras" ]; then exit 0; fi
fi

find_python() {
    if [ -n "${EE_LLM_PYTHON:-}" ]; then
        printf '%s' "$EE_LLM_PYTHON"
        return
    fi
    local candidate
    for candidate in python3 python python3.13 python3.12 python3.11 python3.10; do
        if is_new_enough "$candidate"; then
            printf '%s' "$candidate"
            return
        fi
    done
    fail "EE-LLM needs Python 3.10 or newer, and python3 is $(version_of python3 || echo 'not there')." \
        "Install one, or name it: EE_LLM_PYTHON=/path/to/python bash examples/quickstart.sh"
}

# The version of a torch that is new enough (a pre-release of it too: containers ship those); nothing otherwise.
torch_of() { # python, its options
    "$@" - "$TORCH_AT_LEAST" 2>/dev/null <<'PYTHON' || true
import re, sys, torch
release = tuple(int(part) for part in re.match(r"(\d+)\.(\d+)", torch.__version__).groups())
if release >= tuple(int(part) for part in sys.argv[1].split(".")):
    print(torch.__version__)
PYTHON
}

# Packages of an interpreter that is a virtual environment itself, or that PYTHONPATH adds, are not "system" ones: a
# path file makes them visible to ours for good.
is_virtual() { "$1" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)'; }
lend_packages() {
    local directory target
    directory=$("$1" -c 'import pathlib, torch; print(repr(str(pathlib.Path(torch.__file__).parents[1])))')
    target=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    printf 'import site; site.addsitedir(%s)\n' "$directory" >"$target/ee_llm_reused_torch.pth"
}

make_venv() { # python, options of venv
    [ -w . ] || fail "$PWD cannot be written to: clone EE-LLM into a directory of yours"
    local python=$1
    shift
    # without ensurepip (Debian splits it off) an environment that sees the system's packages still has their pip
    "$python" -m venv --clear "$@" .venv >/dev/null 2>&1 && return
    case " $* " in *" --system-site-packages "*)
        "$python" -m venv --clear --without-pip "$@" .venv >/dev/null 2>&1 && .venv/bin/python -m pip --version \
            >/dev/null 2>&1 && return ;;
    esac
    rm -rf .venv
    fail "$python -m venv does not work here: install the venv module (Debian, Ubuntu: apt-get install" \
        "python$(version_of "$python")-venv), or name another Python in EE_LLM_PYTHON"
}

pip_install() { # words for pip; its chatter goes to the log, and on a terminal progress is shown
    local status=0
    printf '\n$ pip install %s\n' "$*" >>"$LOG"
    if [ -t 2 ] && [ -n "${SHOW_PROGRESS:-}" ]; then
        .venv/bin/python -m pip install --disable-pip-version-check "$@" 2>>"$LOG" >&2 || status=$?
    else
        .venv/bin/python -m pip install --disable-pip-version-check "$@" >>"$LOG" 2>&1 || status=$?
    fi
    return "$status"
}

must_install() { # what it is, words for pip
    local what=$1
    shift
    pip_install "$@" && return
    grep -i '^ *error' "$LOG" | tail -n 4 >&2 || true
    fail "could not install $what; pip's whole output is in $LOG. Run the same command again to go on."
}

sees_gpu() { [ -e /dev/nvidia0 ] || nvidia-smi -L >/dev/null 2>&1; }

install_torch() {
    if [ -n "${EE_LLM_TORCH:-}" ]; then
        say "  torch: $EE_LLM_TORCH (EE_LLM_TORCH)"
        set -f # words, not file patterns
        # shellcheck disable=SC2086
        must_install torch -c requirements.txt $EE_LLM_TORCH
        set +f
        return
    fi
    if [ "$(uname -s)" = Linux ] && ! sees_gpu; then
        say "  torch: $TORCH for CPU (no NVIDIA GPU is seen; about 200 MB) ..."
        pip_install -c requirements.txt "torch==$TORCH+cpu" && return
        say "  pip's indices offer no CPU build of it: taking the default build, which on a PC brings CUDA's libraries"
        say "  (a few GB). To avoid that: Ctrl-C, and see EE_LLM_TORCH in examples/setup_env.sh"
    else
        say "  torch: $TORCH, default build (large where it brings CUDA's libraries) ..."
    fi
    must_install "torch==$TORCH" -c requirements.txt "torch==$TORCH"
}

# Those lines of requirement files whose package the environment lacks, or has too old a setuptools of: before 77
# it cannot read our pyproject.toml.
missing() {
    .venv/bin/python - "$@" <<'PYTHON'
import importlib.metadata, re, sys

def version(name):
    try:
        return tuple(int(part) for part in re.findall(r"\d+", importlib.metadata.version(name))[:2])
    except importlib.metadata.PackageNotFoundError:
        return None

for path in sys.argv[1:]:
    for line in open(path, encoding="utf-8"):
        name = re.match(r"[\w.-]+", line)
        if name and (version(name[0]) is None or name[0] == "setuptools" and version(name[0]) < (77,)):
            print(line.strip())
PYTHON
}

started=$SECONDS
python=
reused=
if usable_venv; then
    say "EE-LLM: completing .venv ($(.venv/bin/python -V 2>&1))"
else
    python=$(find_python)
    say "EE-LLM: making .venv with $("$python" -V 2>&1) ($(command -v "$python"))"
    if [ -z "${EE_LLM_TORCH:-}" ]; then reused=$(torch_of "$python"); fi
    if [ -n "$reused" ] && ! is_virtual "$python"; then
        make_venv "$python" --system-site-packages
    else
        make_venv "$python"
    fi
    if [ -n "$reused" ]; then
        [ -n "$(torch_of .venv/bin/python -E)" ] || lend_packages "$python"
        printf '%s\n' "$reused" >"$REUSED"
    fi
fi

set -- requirements.txt
if [ "$extras" = test ]; then set -- "$@" tests/requirements.txt; fi

if [ -f "$REUSED" ] && [ -z "${EE_LLM_TORCH:-}" ]; then
    say "  torch: $(torch_of .venv/bin/python) is reused"
    say "  packages that are missing beside it ..."
    # All pins are closed under dependencies, so --no-deps loses nothing and touches nothing that is there. A
    # container's constraints are for what it has, not for what it lacks.
    missing "$@" >.venv/ee-llm-missing.txt
    PIP_CONSTRAINT='' must_install "the missing packages" --no-deps -r .venv/ee-llm-missing.txt
    if [ "$extras" = test ]; then
        # lint has to be of the pinned version, and its commands have to be in .venv/bin
        grep -E '^(ruff|import-linter)==' tests/requirements.txt >.venv/ee-llm-linters.txt
        PIP_CONSTRAINT='' must_install "the linters" --no-deps --ignore-installed -r .venv/ee-llm-linters.txt
    fi
else
    SHOW_PROGRESS=1
    if [ -n "${EE_LLM_TORCH:-}" ] || [ -z "$(torch_of .venv/bin/python)" ]; then install_torch; fi
    SHOW_PROGRESS=
    for file in "$@"; do
        say "  packages of $file ..."
        must_install "the packages of $file" -c requirements.txt -r "$file"
    done
fi

must_install EE-LLM --no-deps --no-build-isolation -e .
if .venv/bin/python -c 'import megatron.data._index_builder' 2>/dev/null; then
    say "  EE-LLM: installed, index builder compiled"
else
    say "  EE-LLM: installed; without a C++ compiler data indices are built by numpy (slower, same result)"
fi
[ -n "$(torch_of .venv/bin/python)" ] || fail "torch cannot be imported: .venv/bin/python -c 'import torch' says why"

{ printf '%s\n' "$extras"; state; } >"$STAMP"
say "  ready after $((SECONDS - started)) s"

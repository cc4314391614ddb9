#!/usr/bin/env bash
# Makes the environment that demo.sh and test.sh run in. Source it and call its one function:
#
#     source "$(dirname "${BASH_SOURCE[0]}")/install/setup_env.sh"
#     setup_env            # to run the project;  setup_env dev  to run its tests and linter too
#
# It returns non-zero after one line on stderr where it fails. Afterwards
#     $REPO_ROOT    is the absolute path of this checkout,
#     $ENV_PYTHON   is the interpreter to use; its folder comes first in PATH, so that `python`,
#                   `pytest` and `ruff` are that environment's,
#     $PYTHONPATH   starts with $REPO_ROOT.
# The working directory stays as it was. Executed instead of sourced: ./tools/install/setup_env.sh [dev]
#
# The active environment is used untouched where it has everything. Otherwise .venv at the root of
# the checkout is made and filled; a stamp in it makes every later call quick.
# WSBCN_PYTHON  names the interpreter to start from (default: the first python3 that is new enough).
# WSBCN_TORCH   replaces the torch pins, e.g. for a GPU driver that needs another CUDA version.

REPO_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)"

_setup_error() {
    echo "error: $*" >&2
    return 1
}

_setup_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1
}

# Sets $_setup_base to a Python that can make the environment.
_setup_find_python() {
    local candidate
    for candidate in ${WSBCN_PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
        if command -v "$candidate" >/dev/null && _setup_new_enough "$candidate"; then
            _setup_base="$candidate"
            return 0
        fi
    done
    _setup_error "Python 3.10 or newer is needed, found ${WSBCN_PYTHON:-only $(python3 --version 2>&1 | tail -1)};" \
        "install one and name it: WSBCN_PYTHON=/path/to/python3 $0"
}

# Whether the environment that is active already, if any, has everything.
_setup_active_serves() {
    local candidate="${WSBCN_PYTHON:-}"
    [ -n "$candidate" ] || candidate="$(command -v python3 || command -v python)" || return 1
    _setup_new_enough "$candidate" || return 1
    ENV_PYTHON="$("$candidate" -c 'import sys; print(sys.executable)')" || return 1
    # The environment made here is judged by its stamp, not by what it happens to have.
    [ "${ENV_PYTHON%/bin/*}" != "$_setup_venv" ] || return 1
    (cd / && "$ENV_PYTHON" "$REPO_ROOT/tools/install/env_check.py" "${_setup_extras[@]}" >/dev/null 2>&1)
}

_setup_stamp_value() {
    {
        echo "$REPO_ROOT ${_setup_torch[*]}"
        "$_setup_venv/bin/python" --version
        cat "$REPO_ROOT"/setup.py "$REPO_ROOT"/tools/install/{setup_env.sh,install_detectron2.py,detectron2_wheel.py,detectron2_stub.py}
    } 2>&1 | cksum
}

# Runs one step, says what it is, and turns its failure into one line.
_setup_step() {
    local what="$1"
    shift
    echo "setup: $what"
    "$@" || _setup_error "$what failed; see above, mend it and run this again"
}

_setup_fill() {
    local pip=("$_setup_venv/bin/python" -m pip install -qq --disable-pip-version-check)
    local extras
    extras="[$(IFS=, && echo "${_setup_extras[*]}")]"
    # torch first, so that nothing later chooses another one.
    _setup_step "installing ${_setup_torch[*]} (about 5 GB on disk)" "${pip[@]}" "${_setup_torch[@]}" &&
        PIP_USE_PEP517=1 _setup_step "installing the project" "${pip[@]}" -e "$REPO_ROOT$extras" &&
        _setup_step "installing Detectron2" "$_setup_venv/bin/python" "$REPO_ROOT/tools/install/install_detectron2.py" &&
        _setup_step "checking" "$_setup_venv/bin/python" "$REPO_ROOT/tools/install/env_check.py" "${_setup_extras[@]}"
}

setup_env() {
    local _setup_venv="$REPO_ROOT/.venv" _setup_base _setup_extras=(vis) _setup_torch _setup_stamp
    local started=$SECONDS
    read -r -a _setup_torch <<<"${WSBCN_TORCH:-torch==2.12.0 torchvision==0.27.0}"
    case "${1:-}" in
        "") ;;
        dev) _setup_extras+=(dev) ;;
        *) _setup_error "setup_env knows no '$1'; call it with nothing or with dev" || return 1 ;;
    esac
    _setup_stamp="$_setup_venv/.wsbcn_setup_${1:-run}"

    if ! _setup_active_serves; then
        ENV_PYTHON="$_setup_venv/bin/python"
        if ! "$ENV_PYTHON" -m pip --version >/dev/null 2>&1; then
            _setup_find_python || return 1
            "$_setup_base" -c 'import ensurepip, venv' 2>/dev/null || _setup_error \
                "$_setup_base has no venv module; install it (Debian and Ubuntu: apt-get install python3-venv)" || return 1
            _setup_step "making $_setup_venv with $("$_setup_base" --version)" "$_setup_base" -m venv --clear "$_setup_venv" || return 1
        fi
        # What serves the tests serves the project as well.
        if ! grep -qxF "$(_setup_stamp_value)" "$_setup_stamp" "$_setup_venv/.wsbcn_setup_dev" 2>/dev/null; then
            _setup_fill || return 1
            _setup_stamp_value >"$_setup_stamp"
            echo "setup: done in $((SECONDS - started)) s"
        fi
    fi
    export ENV_PYTHON REPO_ROOT
    export PATH="${ENV_PYTHON%/*}:$PATH"
    export PYTHONPATH="$REPO_ROOT${PYTHONPATH:+:$PYTHONPATH}"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    setup_env "$@" && echo "setup: $ENV_PYTHON is ready"
fi

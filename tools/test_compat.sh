#!/usr/bin/env bash
# Runs the test suite against another Detectron2 than the one installed:
#
#     ./tools/test_compat.sh CHECKOUT [pytest arguments]
#
# CHECKOUT is a source tree of Detectron2, for example of its main branch:
#     git clone https://github.com/facebookresearch/detectron2.git
# It is compiled (80 s on two cores) into .cache/compat, an environment on top of the project's own,
# once per commit. WSBCN_PYTHON instead names an interpreter that has a Detectron2 already:
#
#     WSBCN_PYTHON=/path/to/python ./tools/test_compat.sh "" [pytest arguments]
set -euo pipefail
[ $# -gt 0 ] || { sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; }
checkout="$1"
shift
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
if [ -n "${WSBCN_PYTHON:-}" ]; then
    python="$WSBCN_PYTHON"
else
    [ -f "$checkout/setup.py" ] && [ -d "$checkout/detectron2" ] || {
        echo "error: ${checkout:-''} is no source tree of Detectron2" >&2
        exit 2
    }
    checkout="$(cd "$checkout" && pwd -P)"
    source "$root/tools/install/setup_env.sh"
    setup_env dev
    overlay="$root/.cache/compat"
    python="$overlay/bin/python"
    version="$checkout $(git -C "$checkout" rev-parse HEAD 2>/dev/null || echo unknown)"
    if ! grep -qxF "$version" "$overlay/.built" 2>/dev/null; then
        "$ENV_PYTHON" -m venv --clear "$overlay"
        # The project's own packages, after those of the overlay.
        "$ENV_PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
            >"$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
        # setuptools of its own: the extension is built by it, and it is not always in the base.
        "$python" -m pip install -q --disable-pip-version-check "setuptools<81" wheel
        "$python" -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps \
            "$checkout"
        echo "$version" >"$overlay/.built"
    fi
fi
cd "$root"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
"$python" -c 'import detectron2; print("detectron2", detectron2.__version__, *detectron2.__path__)'
exec "$python" -m pytest -q -n "${WSBCN_TEST_WORKERS:-2}" "$@"

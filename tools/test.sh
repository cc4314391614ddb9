#!/usr/bin/env bash
# Sets everything up, then runs the linter and the whole test suite: ./tools/test.sh
# Arguments go to pytest, e.g. ./tools/test.sh -m "not slow" or ./tools/test.sh tests/test_install.py;
# coverage is only held against its threshold when the whole suite runs.
# WSBCN_TEST_WORKERS  is the number of test processes (default 2).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install/setup_env.sh"
setup_env dev
cd "$REPO_ROOT"
"$ENV_PYTHON" -m ruff check .
# The workers share the cores; more threads than that only get in each other's way.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [ $# -eq 0 ]; then
    set -- --cov=wsbcn_d2 --cov-report=term-missing:skip-covered --cov-fail-under=97
fi
rm -f .cache/coverage*  # what a killed run left behind would count as covered
exec "$ENV_PYTHON" -m pytest -q -n "${WSBCN_TEST_WORKERS:-2}" --dist worksteal "$@"

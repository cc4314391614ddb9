#!/usr/bin/env bash
# Checks the GPU kernels on this machine's GPU and times them, in at most ten minutes; sets
# everything up first. Writes one Markdown table. Without a GPU it says so, exit code 2.
#
#     ./tools/gpu_check.sh [--output gpu_check.md] [--quick]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install/setup_env.sh"
setup_env
cd "$REPO_ROOT"
exec "$ENV_PYTHON" tools/benchmarks/gpu_report.py "$@"

#!/usr/bin/env bash
# Trains a BCN+WS Mask R-CNN at one image per step on the embedded shapes set, evaluates it and
# draws what it found. Sets everything up on a bare machine; run again, it only reports.
#
#     ./tools/demo.sh [DIR [KEY VALUE ...]]     default DIR: output/demo
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install/setup_env.sh"
setup_env
cd "$REPO_ROOT"

config=configs/shapes/mask_rcnn_R_18_FPN_bcn_ws.yaml
output="${1:-output/demo}"
[ $# -eq 0 ] || shift

if [ -f "$output/model_final.pth" ]; then
    echo "demo: $output/model_final.pth is there already; delete $output to train again"
else
    # --resume continues a demo that was interrupted, and starts one that was not.
    echo "demo: training $config (about 12 minutes on two CPU cores)"
    "$ENV_PYTHON" tools/train_net.py --config-file "$config" --resume OUTPUT_DIR "$output" "$@"
fi
"$ENV_PYTHON" tools/install/demo_report.py --config-file "$config" OUTPUT_DIR "$output" "$@"

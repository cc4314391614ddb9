#!/usr/bin/env bash
# Trains an image classifier on the objects of the embedded shapes set, then a BCN+WS Mask R-CNN
# from its backbone. Sets everything up on a bare machine; run again, it goes on or only reports.
#
#     ./tools/pretrain_demo.sh [DIR [KEY VALUE ...]]     default DIR: output/pretrain
#
# KEY VALUE go to both trainings.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install/setup_env.sh"
setup_env
cd "$REPO_ROOT"

detector=configs/shapes/mask_rcnn_R_18_FPN_bcn_ws_finetune.yaml
output="${1:-output/pretrain}"
[ $# -eq 0 ] || shift

# Trains CONFIG into FOLDER unless that has been done; KEY VALUE ... follow.
train() {
    local config="$1" folder="$2"
    shift 2
    if [ -f "$folder/model_final.pth" ]; then
        echo "pretrain_demo: $folder/model_final.pth is there already; delete $folder to train again"
    else
        echo "pretrain_demo: training $config"
        "$ENV_PYTHON" tools/train_net.py --config-file "$config" --resume OUTPUT_DIR "$folder" "$@"
    fi
}

train configs/shapes/classifier_R_18_bcn_ws.yaml "$output/classifier" "$@"
weights=(MODEL.WEIGHTS "$output/classifier/model_final.pth")
train "$detector" "$output/detector" "${weights[@]}" "$@"
"$ENV_PYTHON" tools/install/demo_report.py --config-file "$detector" OUTPUT_DIR "$output/detector" "${weights[@]}" "$@"

"""tools/train_net.py on one or two CPU processes, on the same two images in every step.

    [torchrun ...] train_net_cases.py FOLDER CASE[,CASE...] [arguments of train_net.py]

What is random in Detectron2's training loop is taken out: sampling of anchors and proposals (the
first ones are taken), data order (the set has as many images as the step) and augmentation.
Arithmetic is float64: in float32 a rounding error at a kink of ReLU now and then makes a
percent of some gradient.
Each case's final checkpoint is FOLDER/CASE/model_final.pth.
"""

import importlib.util
import sys
from pathlib import Path

import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import proposal_utils
from detectron2.structures import Boxes

from wsbcn_d2 import data
from wsbcn_d2.engine import Trainer, processes
from wsbcn_d2.engine.trainer import train_net

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from conftest import TINY  # noqa: E402

NORMS = [f"MODEL.{part}.NORM" for part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")]


def norm(name):
    return [text for key in NORMS for text in (key, name)]


CASES = {
    "start": ["SOLVER.MAX_ITER", "1", "SOLVER.BASE_LR", "0.0"],
    "gn": [*norm("GN"), "SOLVER.MAX_ITER", "2"],
    "fixed": [
        *("MODEL.BCN.UPDATE_RATE", "0.0", "MODEL.BCN.FIRST_BATCH_INIT", "False"),
        *("SOLVER.MAX_ITER", "2"),
    ],
    "sync": [*norm("SyncBCN"), "SOLVER.MAX_ITER", "1"],
    "bcn": ["SOLVER.MAX_ITER", "1"],
    "bcn_alone": ["SOLVER.MAX_ITER", "1", "MODEL.BCN.SYNC_ESTIMATES", "False"],
}


def load_train_net():
    spec = importlib.util.spec_from_file_location("train_net", ROOT / "tools" / "train_net.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prepare(folder):
    """In every process: the data set, and samplers that take what comes first."""
    torch.set_num_threads(1)
    data.register_shapes_split("two_images", folder, num_images=2, seed=3, image_size=(64, 64))
    torch.randperm = lambda n, device=None, **_: torch.arange(n, device=device)
    for record in DatasetCatalog.get("two_images"):  # so that both have two positives
        assert len(record["annotations"]) >= 2


def in_float64():
    """Makes the trainer's models float64, and Detectron2's float32 boxes fit in with that."""
    stock_model = Trainer.build_model
    stock_nms, stock_pooler = proposal_utils.batched_nms, ROIPooler.forward

    def pooler(self, features, boxes):
        boxes = [Boxes(item.tensor) for item in boxes]
        for item in boxes:
            item.tensor = item.tensor.double()  # the constructor would make it float32
        return stock_pooler(self, features, boxes)

    Trainer.build_model = staticmethod(lambda cfg: stock_model(cfg).double())
    proposal_utils.batched_nms = lambda boxes, scores, *rest: stock_nms(
        boxes.float(), scores.float(), *rest
    )
    ROIPooler.forward = pooler


def run_cases(args):
    prepare(args.folder)
    in_float64()
    common = list(args.opts)
    for case in args.cases:
        args.opts = [*common, *CASES[case], "OUTPUT_DIR", str(Path(args.folder) / case)]
        train_net(args)


def main():
    folder, cases = sys.argv[1:3]
    prepare(folder)
    launch = processes.launch

    def launch_cases(_, args):
        args.folder, args.cases = folder, cases.split(",")
        return launch(run_cases, args)

    processes.launch = launch_cases
    options = [
        *TINY,
        *("DATASETS.TRAIN", "('two_images',)", "DATASETS.TEST", "()", "SEED", "7"),
        *("DATALOADER.ASPECT_RATIO_GROUPING", "False", "INPUT.RANDOM_FLIP", "none"),
        *("INPUT.MIN_SIZE_TRAIN", "(64,)", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.STEPS", "()"),
        *("SOLVER.BASE_LR", "0.02", "SOLVER.WARMUP_ITERS", "0", "TEST.EVAL_PERIOD", "0"),
        *("MODEL.ROI_HEADS.POSITIVE_FRACTION", "0.25", "MODEL.BCN.UPDATE_RATE", "0.1"),
    ]
    config = str(ROOT / "configs" / "shapes" / "mask_rcnn_R_18_FPN_bcn_ws.yaml")
    sys.argv = ["train_net.py", "--config-file", config, *sys.argv[3:], *options]
    return load_train_net().cli()


if __name__ == "__main__":
    sys.exit(main())

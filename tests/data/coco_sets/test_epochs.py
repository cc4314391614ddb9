"""SOLVER.EPOCHS: iterations of the pictures that are trained on."""

import pytest

from wsbcn_d2.engine import load_config
from wsbcn_d2.engine.from_config import schedule_by_epochs

from .sets import CONFIG, KEYPOINTS, NAMES, a_set, keypoints, without_objects, write


@pytest.mark.parametrize(
    "epochs, images, wanted",
    [(10, 1, (30, (21, 27), 3, 3, 3)), (10, 2, (15, (10, 14), 2, 2, 1)), (0, 1, None)],
)
def test_epochs_become_iterations(epochs, images, wanted, tmp_path):
    entry = write(tmp_path, a_set())
    options = [
        *("DATASETS.COCO_SETS", str([entry]), "DATASETS.TRAIN", "('test_set',)"),
        *("SOLVER.MAX_ITER", "1000", "SOLVER.STEPS", "(700, 900)", "TEST.EVAL_PERIOD", "100"),
        *("SOLVER.CHECKPOINT_PERIOD", "100", "SOLVER.WARMUP_ITERS", "50"),
        *("SOLVER.EPOCHS", str(epochs), "SOLVER.IMS_PER_BATCH", str(images)),
    ]
    cfg = load_config(CONFIG, options)
    solver = schedule_by_epochs(cfg).SOLVER
    if wanted is None:
        assert solver is cfg.SOLVER
        return
    out = schedule_by_epochs(cfg)
    assert wanted == (
        *(solver.MAX_ITER, solver.STEPS, out.TEST.EVAL_PERIOD, solver.CHECKPOINT_PERIOD),
        solver.WARMUP_ITERS,
    )
    assert cfg.SOLVER.MAX_ITER == 1000 and cfg.is_frozen() and out.is_frozen()


@pytest.mark.parametrize("empty, images", [(True, 2), (False, 3)])
def test_epochs_are_of_the_pictures_that_are_trained_on(empty, images, tmp_path):
    content = a_set()
    without_objects(content, None)
    options = [
        *("DATASETS.COCO_SETS", str([write(tmp_path, content)]), "DATASETS.TRAIN", "('test_set',)"),
        *("DATALOADER.FILTER_EMPTY_ANNOTATIONS", str(empty), "SOLVER.EPOCHS", "7"),
    ]
    assert 7 * images == schedule_by_epochs(load_config(CONFIG, options)).SOLVER.MAX_ITER


@pytest.mark.parametrize("least, images", [(1, 1), (4, 0)])
def test_epochs_are_of_the_pictures_with_enough_keypoints(least, images, tmp_path):
    content = a_set()
    keypoints(3, NAMES)(content, None)
    for annotation in content["annotations"][1:]:
        annotation["num_keypoints"], annotation["keypoints"] = 0, [0] * 9
    options = [
        *("DATASETS.COCO_SETS", str([write(tmp_path, content)]), "DATASETS.TRAIN", "('test_set',)"),
        *(*KEYPOINTS[:2], "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE", str(least)),
        *("SOLVER.EPOCHS", "7"),
    ]
    if not images:
        with pytest.raises(AssertionError, match="No valid data"):
            schedule_by_epochs(load_config(CONFIG, options))
        return
    assert 7 * images == schedule_by_epochs(load_config(CONFIG, options)).SOLVER.MAX_ITER


def test_epochs_of_few_pictures_are_a_step(tmp_path):
    options = [
        *("DATASETS.COCO_SETS", str([write(tmp_path, a_set())]), "DATASETS.TRAIN", "('test_set',)"),
        *("SOLVER.EPOCHS", "1", "SOLVER.IMS_PER_BATCH", "100", "TEST.EVAL_PERIOD", "0"),
    ]
    cfg = schedule_by_epochs(load_config(CONFIG, options))
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.EPOCHS, cfg.TEST.EVAL_PERIOD) == (1, 0, 0)
    assert cfg.SOLVER.WARMUP_ITERS == 0

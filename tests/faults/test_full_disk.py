"""A disk that fills up under tools/train_net.py."""

import sys

import pytest
from conftest import ROOT

from wsbcn_d2.files import PART_FILE

CONFIG = str(ROOT / "configs" / "shapes" / "mask_rcnn_R_18_FPN_bcn_ws.yaml")

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("metrics_too", [False, True])
def test_training_stops_with_one_line_and_goes_on_after_it(
    metrics_too, train_net, tiny_options, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "output"

    def run(iterations):
        options = [*tiny_options, "SOLVER.MAX_ITER", str(iterations), "TEST.EVAL_PERIOD", "0"]
        options += ["DATASETS.TEST", "()"]
        arguments = ["train_net.py", "--config-file", CONFIG, "--resume", *options]
        monkeypatch.setattr(sys, "argv", arguments)
        return train_net.cli()

    assert run(2) == 0
    (output / PART_FILE).symlink_to("/dev/full")
    if metrics_too:  # the writer fails as well, while the first failure is being handled
        (output / "metrics.json").unlink()
        (output / "metrics.json").symlink_to("/dev/full")
    capsys.readouterr()
    assert run(4) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "cannot save" in lines[0] and "No space left on device" in lines[0]
    assert str(output / "model_final.pth") in lines[0]
    assert (output / "last_checkpoint").read_text() == "model_final.pth"

    if metrics_too:
        (output / "metrics.json").unlink()
    assert run(3) == 0
    assert "Starting training from iteration 2" in (output / "log.txt").read_text()

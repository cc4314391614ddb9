"""What is checked of a run, whatever kind of config it has, and in which case."""

import pytest
import torch
from torch import nn

from wsbcn_d2.engine import UsageError
from wsbcn_d2.engine.checks import Keys, Setup, setup
from wsbcn_d2.engine.checks.setup import check_setup


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(2, 3), nn.Linear(3, 1)


class Fake(Setup):
    """A config of a few values, that notes what is asked of it."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.asked, self.frozen = [], ()

    def value(self, key, default=None):
        return self.cfg.get(key, default)

    def estimates(self):
        return self.cfg.get("estimates", {})

    def model(self):
        model = Model()
        assert model.first.weight.is_meta
        for name in self.frozen:
            model.get_parameter(name).requires_grad_(False)
        return model

    def training(self, model):
        self.asked.append("training")

    def wanted(self, training):
        return ("wanted", training)

    def expected(self, model):
        return "expected"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Checks a run of some values; gives what was asked of the data and of the weights."""
    for name in ("check_datasets", "check_sets"):
        monkeypatch.setattr(setup, name, lambda *args, n=name: fake[0].asked.append((n, *args)))

    class Checkpointer:
        def __init__(self, model, *, expected):
            assert isinstance(model, Model) and expected == "expected"

        def check(self, weights):
            fake[0].asked.append(("weights", weights))

    monkeypatch.setattr(setup, "WSBCNCheckpointer", Checkpointer)
    fake = []

    def call(frozen=(), how=None, **values):
        keys = {
            **{"DATASETS.TRAIN": ("a", "b"), "DATASETS.TEST": "test", "SOLVER.IMS_PER_BATCH": 4},
            **{"MODEL.WEIGHTS": "", "OUTPUT_DIR": str(tmp_path), **values},
        }
        fake[:] = [Fake(keys)]
        fake[0].frozen = frozen
        check_setup(fake[0], **(how or {}))
        return fake[0].asked

    return call


def test_a_training_is_checked_from_its_data_to_its_weights(run, tmp_path):
    weights = tmp_path / "w.pth"
    weights.touch()
    assert run(**{"MODEL.WEIGHTS": str(weights)}) == [
        ("check_datasets", ["a", "b"], "DATASETS.TRAIN"),
        ("check_datasets", ["test"], "DATASETS.TEST"),
        "training",
        ("weights", str(weights)),
        ("check_sets", ["a", "b"], ["test"], ("wanted", True)),
    ]


def test_an_evaluation_needs_nothing_of_training(run):
    values = {
        "DATASETS.TRAIN": ("absent",),
        "SOLVER.IMS_PER_BATCH": 3,
        "MODEL.RECOMPUTE": ["absent"],
    }
    frozen = ["first.weight"]
    assert run(frozen, {"eval_only": True, "world_size": 2}, **values) == [
        ("check_datasets", [], "DATASETS.TRAIN"),
        ("check_datasets", ["test"], "DATASETS.TEST"),
        ("check_sets", [], ["test"], ("wanted", False)),
    ]
    with pytest.raises(UsageError, match=r"^DATASETS\.TEST is empty: name a data set$"):
        run(how={"eval_only": True}, **{"DATASETS.TEST": ()})
    with pytest.raises(UsageError, match=r"^DATASETS\.TRAIN is empty: name a data set$"):
        run(**{"DATASETS.TRAIN": []})
    assert run(**{"DATASETS.TEST": ()})[-1][2] == []  # training needs none to test on


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("resume", [True, False])
def test_weights_do_not_matter_where_a_run_goes_on(run, resume, last, tmp_path):
    if last:
        (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    values, options = {"MODEL.WEIGHTS": "absent.pth"}, {"resume": resume}
    if last and resume:
        assert "training" in run(["first.weight"], options, **values)
        return
    message = "^MODEL.WEIGHTS 'absent.pth' not found: give the path of a checkpoint, or '' to"
    with pytest.raises(UsageError, match=message):
        run(how=options, **values)
    with pytest.raises(UsageError, match="leaves 1 frozen layers at random values, 'first' first"):
        run(["first.weight"], options)


def test_weights_that_are_fetched_are_checked_then(run):
    asked = run(["first.weight"], **{"MODEL.WEIGHTS": "wsbcn://x/y"})
    assert not [entry for entry in asked if entry[0] == "weights"]


def test_a_frozen_bias_is_no_frozen_layer(run):
    assert "training" in run(["first.bias"])


@pytest.mark.parametrize(
    "values, message",
    [
        ({"MODEL.RECOMPUTE": ["absent"]}, r"^MODEL\.RECOMPUTE: .*'absent'"),
        ({"estimates": {"update_rate": 2.0}}, r"^MODEL\.BCN: .*\[0, 1\]"),
        ({"estimates": {"monitor_period": "x"}}, r"^MODEL\.BCN: "),
    ],
)
def test_values_that_there_are_none_of(run, values, message):
    with pytest.raises(UsageError, match=message):
        run(**values)


@pytest.mark.parametrize(
    "images, reference, accumulate, world_size, message",
    [
        (4, 0, 1, 1, None),
        (4, 0, 2, 2, None),
        (1, 1, 1, 8, None),  # an image for each process, however many there are
        (4, 0, 3, 2, "SOLVER.ACCUMULATE 3 cannot split the 2 images of a process's step: make it "
         "1 to 2, or SOLVER.IMS_PER_BATCH larger"),
        (4, 2, 3, 8, "SOLVER.ACCUMULATE 3 cannot split the 2 images of a process's step: make it "
         "1 to 2, or SOLVER.IMS_PER_BATCH larger"),
        (4, 0, 0, 1, "SOLVER.ACCUMULATE 0 cannot split the 4 images of a process's step: make it "
         "1 to 4, or SOLVER.IMS_PER_BATCH larger"),
        (6, 4, 1, 1, "SOLVER.IMS_PER_BATCH 6 cannot be split over SOLVER.REFERENCE_WORLD_SIZE 4 "
         "processes: make it a multiple"),
        (6, 0, 1, 4, "SOLVER.IMS_PER_BATCH 6 cannot be split over 4 processes: make it a positive "
         "multiple of 4"),
        (0, 0, 1, 1, "SOLVER.IMS_PER_BATCH 0 cannot be split over 1 processes: make it a positive "
         "multiple of 1"),
    ],
)  # fmt: skip
def test_how_a_batch_is_split(run, images, reference, accumulate, world_size, message):
    values = {"SOLVER.IMS_PER_BATCH": images, "SOLVER.REFERENCE_WORLD_SIZE": reference}
    values["SOLVER.ACCUMULATE"] = accumulate
    if message is None:
        assert "training" in run(how={"world_size": world_size}, **values)
        return
    with pytest.raises(UsageError) as caught:
        run(how={"world_size": world_size}, **values)
    assert str(caught.value) == message


def test_what_a_config_calls_things():
    assert vars(Keys()) == {
        **{"train": "DATASETS.TRAIN", "test": "DATASETS.TEST", "images": "SOLVER.IMS_PER_BATCH"},
        **{"reference": "SOLVER.REFERENCE_WORLD_SIZE", "accumulate": "SOLVER.ACCUMULATE"},
        **{"recompute": "MODEL.RECOMPUTE", "weights": "MODEL.WEIGHTS", "estimates": "MODEL.BCN"},
        **{"freeze": "MODEL.BACKBONE.FREEZE_AT", "output_dir": "OUTPUT_DIR"},
    }


def test_a_model_that_needs_numbers_is_built_with_them():
    built = []

    def build():
        model = Model()
        built.append(model.first.weight.device.type)
        if built[-1] == "meta":
            raise NotImplementedError("Cannot copy out of meta tensor")
        return model

    assert setup._on_meta(build).first.weight.device == torch.empty(0).device
    assert built == ["meta", "cpu"]
    with pytest.raises(ValueError), torch.device("cpu"):
        setup._on_meta(lambda: int("x"))

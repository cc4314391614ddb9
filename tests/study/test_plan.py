"""What a plan's runs are, and which records stand for them."""

import functools
import hashlib
import itertools
import json
import shlex
from pathlib import Path

import pytest

from wsbcn_d2.config import get_cfg
from wsbcn_d2.engine import UsageError, load_config
from wsbcn_d2.study import find_records, make_plan, matching, plan, write_record
from wsbcn_d2.study.plan import default_of, flatten, label_configs

from .helpers import make_record

SHAPES = Path(__file__).resolve().parents[2] / "configs" / "shapes"
VARIANTS = ("bn", "gn", "gn_ws", "bcn", "bcn_ws")
CONFIGS = {name: str(SHAPES / f"mask_rcnn_R_18_FPN_{name}.yaml") for name in VARIANTS}
PARTS = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")
NORMS = {f"MODEL.{part}.NORM" for part in PARTS}
NAMES = {f"MODEL.{part}.NAME" for part in ("BACKBONE", "ROI_BOX_HEAD", "ROI_MASK_HEAD")}


@pytest.mark.parametrize("one,other", list(itertools.combinations(VARIANTS, 2)))
def test_shapes_variants_differ_in_norm_and_convolution_lines_alone(one, other):
    left, right = (flatten(load_config(CONFIGS[name])) for name in (one, other))
    differ = {key for key in left.keys() | right.keys() if left.get(key) != right.get(key)}
    norm = {name: name.removesuffix("_ws") for name in (one, other)}
    expected = set() if norm[one] == norm[other] else set(NORMS)
    if one.endswith("_ws") != other.endswith("_ws"):
        expected |= NAMES
    assert differ == expected
    for key in differ & NAMES:  # the same component, with and without WS
        names = {value.removeprefix("WS").replace("_ws_", "_") for value in (left[key], right[key])}
        assert len(names) == 1


def test_pre_training_and_fine_tuning_differ_in_norm_lines_alone():
    for form, norms in (
        ("classifier_R_18_{}.yaml", {"MODEL.RESNETS.NORM"}),
        ("mask_rcnn_R_18_FPN_{}_finetune.yaml", NORMS),
    ):
        gn, bcn = (flatten(load_config(str(SHAPES / form.format(v)))) for v in ("gn_ws", "bcn_ws"))
        differ = {key for key in gn if gn[key] != bcn[key]}
        assert differ - {"MODEL.WEIGHTS", "OUTPUT_DIR"} == norms
    for variant in ("gn_ws", "bcn_ws"):  # each from its own classifier, where that is left
        classifier, detector = (
            load_config(str(SHAPES / form.format(variant)))
            for form in ("classifier_R_18_{}.yaml", "mask_rcnn_R_18_FPN_{}_finetune.yaml")
        )
        left = Path(classifier.OUTPUT_DIR, "model_final.pth")
        assert Path(detector.MODEL.WEIGHTS) == left


def test_seeds_come_before_variants():
    runs = make_plan(
        {k: CONFIGS[k] for k in ("gn", "bcn_ws")}, images_per_step=[1, 2], seeds=[5, 6]
    )
    found = [(run.seed, run.images_per_step, run.variant) for run in runs]
    assert found == list(itertools.product([5, 6], [1, 2], ["gn", "bcn_ws"]))
    assert len({run.name for run in runs}) == len(runs)


def test_every_run_sees_the_same_images_at_a_rate_per_image():
    opts = ["SOLVER.BASE_LR", "0.01", "SOLVER.MAX_ITER", "2500", "SOLVER.STEPS", "(2000, 2300)"]
    opts += ["SOLVER.WARMUP_ITERS", "200"]
    one, two = make_plan(
        {"gn": CONFIGS["gn"]}, images_per_step=[1, 2], max_iter=1000, evaluations=4, opts=opts
    )
    a, b = (load_config(run.config_file, run.overrides) for run in (one, two))
    assert (a.SOLVER.IMS_PER_BATCH, b.SOLVER.IMS_PER_BATCH) == (1, 2)
    assert b.SOLVER.BASE_LR == 2 * a.SOLVER.BASE_LR == pytest.approx(0.02)
    assert (a.SOLVER.MAX_ITER, b.SOLVER.MAX_ITER) == (1000, 500)
    assert (a.SOLVER.STEPS, b.SOLVER.STEPS) == ((800, 920), (400, 460))
    assert (a.SOLVER.WARMUP_ITERS, b.SOLVER.WARMUP_ITERS) == (80, 40)
    assert (a.TEST.EVAL_PERIOD, b.TEST.EVAL_PERIOD) == (250, 125)


@pytest.mark.parametrize("length, count, period", [(10, 4, 3), (10, 5, 2), (7, 2, 4), (3, 9, 1)])
def test_there_are_at_most_so_many_evaluations(length, count, period):
    """Rounded up: one more would come shortly before the last."""
    configs = {"gn": CONFIGS["gn"]}
    opts = ["SOLVER.STEPS", "()"]
    (run,) = make_plan(configs, max_iter=length, evaluations=count, opts=opts)
    cfg = load_config(run.config_file, run.overrides)
    assert (period, period) == (cfg.TEST.EVAL_PERIOD, cfg.SOLVER.CHECKPOINT_PERIOD)


def test_a_very_short_schedule_has_no_step_at_its_end():
    opts = ["SOLVER.MAX_ITER", "100", "SOLVER.STEPS", "(75, 92)"]
    (run,) = make_plan({"gn": CONFIGS["gn"]}, max_iter=4, opts=opts)  # 0.92 x 4 rounds to 4
    assert load_config(run.config_file, run.overrides).SOLVER.STEPS == (3,)
    opts[-1] = "(5, 30, 75)"  # 0.05 x 4 rounds to 0, where there is no step either
    (run,) = make_plan({"gn": CONFIGS["gn"]}, max_iter=4, opts=opts)
    assert load_config(run.config_file, run.overrides).SOLVER.STEPS == (1, 3)


def test_the_overrides_make_the_config_that_the_settings_describe():
    (run,) = make_plan(
        {"gn": CONFIGS["gn"]}, images_per_step=[2], seeds=[9], opts=["SOLVER.BASE_LR", "0.03"]
    )
    cfg = flatten(load_config(run.config_file, run.overrides))
    assert all(cfg[key] == value for key, value in run.settings.items())
    assert run.settings["SOLVER.BASE_LR"] == pytest.approx(0.06)
    changed = {k for k, v in cfg.items() if v != default_of(k)} - run.settings.keys()
    assert changed <= {"OUTPUT_DIR", "MODEL.DEVICE", "DATALOADER.NUM_WORKERS"} | {
        "SOLVER.CHECKPOINT_PERIOD"
    }


def test_sweeps_multiply_where_they_have_an_effect():
    keys = [
        ("MODEL.BCN.UPDATE_RATE", ["0.1", "0.01"]),
        ("MODEL.BCN.FIRST_BATCH_INIT", ["True", "False"]),
    ]
    runs = make_plan({k: CONFIGS[k] for k in ("gn", "bcn_ws")}, sweeps=keys)
    labels = [run.variant for run in runs]
    assert len([label for label in labels if label.startswith("bcn_ws")]) == 2 * 2
    assert "bcn_ws UPDATE_RATE=0.1 FIRST_BATCH_INIT=False" in labels
    assert len([label for label in labels if label.startswith("gn")]) == 1  # it has no estimates
    found = {run.settings.get("MODEL.BCN.FIRST_BATCH_INIT") for run in runs}
    assert found == {None, True, False}


def test_keys_joined_by_commas_are_swept_together():
    keys = "MODEL.RESNETS.NORM,MODEL.FPN.NORM"
    runs = make_plan({"gn": CONFIGS["gn"]}, sweeps=[(keys, ["GN", "BN"])])
    norms = [[run.settings[key] for key in keys.split(",")] for run in runs]
    assert norms == [["GN", "GN"], ["BN", "BN"]]
    assert [run.variant for run in runs] == ["gn NORM=GN", "gn NORM=BN"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_options_with_an_effect_are_in_the_settings_at_their_defaults_too(variant):
    """So that a record stays what it is when one of the defaults moves."""
    (run,) = make_plan({variant: CONFIGS[variant]})
    bcn = ("UPDATE_RATE", "UPDATE_RATE_SCHEDULE", "FIRST_BATCH_INIT", "SYNC_ESTIMATES")
    expected = {f"MODEL.BCN.{key}" for key in bcn} if variant.startswith("bcn") else set()
    if variant.endswith("_ws"):
        expected |= {f"MODEL.WS.{key}" for key in ("EPS", "FORMULA", "KIND")}
    found = {key for key in run.settings if key.startswith(("MODEL.BCN.", "MODEL.WS."))}
    assert found == expected


def test_moving_a_default_of_bcn_leaves_gn_runs_finished(monkeypatch):
    configs = {k: CONFIGS[k] for k in ("gn", "bcn_ws")}
    records = [make_record(run.variant, settings=run.settings) for run in make_plan(configs)]
    assert all(matching(run, records) for run in make_plan(configs))

    def moved():
        cfg = get_cfg()
        cfg.MODEL.BCN.UPDATE_RATE = 0.005
        return cfg

    monkeypatch.setattr("wsbcn_d2.config.get_cfg", moved)
    monkeypatch.setattr("wsbcn_d2.study.plan._defaults", flatten(moved()))
    found = {run.variant: matching(run, records) is not None for run in make_plan(configs)}
    assert found == {"gn": True, "bcn_ws": False}


@pytest.mark.parametrize(
    "change", [["SOLVER.MOMENTUM", "0.8"], ["MODEL.FPN.OUT_CHANNELS", "64"], ["SEED", "4"]]
)
def test_another_config_is_another_run(change):
    (run,) = make_plan({"gn": CONFIGS["gn"]})
    record = make_record(settings=run.settings)
    seeds = [4] if change[0] == "SEED" else [1]
    (other,) = make_plan({"gn": CONFIGS["gn"]}, opts=change, seeds=seeds)
    assert matching(run, [record]) is record
    assert matching(other, [record]) is None
    assert run.digest != other.digest


def test_where_a_run_happens_makes_no_other_run():
    elsewhere = ["OUTPUT_DIR", "/x", "DATALOADER.NUM_WORKERS", "7", "MODEL.BCN.MONITOR_PERIOD", "5"]
    (one,) = make_plan({"gn": CONFIGS["gn"]})
    (other,) = make_plan({"gn": CONFIGS["gn"]}, opts=elsewhere)
    assert one.digest == other.digest


# Where a run leaves things, how it is watched, and how fast it goes.
NOT_WHAT_IT_COMPUTES = {
    "OUTPUT_DIR",
    "VERSION",
    "VIS_PERIOD",
    "DATALOADER.NUM_WORKERS",
    "MODEL.DEVICE",
    "MODEL.BCN.MONITOR_PERIOD",
    "SOLVER.CHECKPOINT_PERIOD",
}


def another(value):
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return value + "x" if isinstance(value, str) else ["x"]


@pytest.mark.parametrize("variant", ["gn", "bcn_ws"])
def test_every_key_of_a_config_takes_part_in_what_a_run_is(variant):
    cfg = load_config(CONFIGS[variant])
    settings = plan._settings(cfg)
    without = set()
    for key, value in flatten(cfg).items():
        changed = cfg.clone()
        changed.defrost()
        *nodes, leaf = key.split(".")
        functools.reduce(getattr, nodes, changed)[leaf] = another(value)
        if plan._settings(changed) == settings:
            without.add(key)
    no_effect = {key for key in flatten(cfg) if key.startswith(("MODEL.BCN.", "MODEL.WS."))}
    no_effect -= {"MODEL.WS.PARTS"}  # standardizes whatever model there is
    assert without == NOT_WHAT_IT_COMPUTES | (no_effect if variant == "gn" else set())
    assert any(key.startswith("SOLVER.") for key in flatten(cfg).keys() - without)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_new_key_at_its_default_leaves_a_run_what_it_is(variant, monkeypatch):
    """Digest and all: the folder that an interrupted run goes on in has it in its name."""
    before = make_plan({variant: CONFIGS[variant]})[0]

    def grown():
        cfg = get_cfg()
        cfg.MODEL.BCN.NEW_KEY = 32
        cfg.MODEL.WS.NEW_KEY = []
        cfg.MODEL.NEW_KEY = []
        cfg.NEW_KEY = "x"
        return cfg

    monkeypatch.setattr("wsbcn_d2.config.get_cfg", grown)
    monkeypatch.setattr("wsbcn_d2.study.plan._defaults", flatten(grown()))
    (after,) = make_plan({variant: CONFIGS[variant]})
    assert (after.settings, after.name) == (before.settings, before.name)
    (other,) = make_plan({variant: CONFIGS[variant]}, opts=["MODEL.NEW_KEY", "['a']"])
    assert matching(other, [{"settings": before.settings}]) is None
    (other,) = make_plan({variant: CONFIGS[variant]}, opts=["MODEL.BCN.NEW_KEY", "16"])
    same = not variant.startswith("bcn")  # it has no BCN that the key could be of
    assert (matching(other, [{"settings": before.settings}]) is not None) == same


RECORDS = sorted(Path(__file__).resolve().parents[2].glob("configs/*/results/records*/*.json"))


def test_committed_records_are_found_by_the_runs_that_made_them(monkeypatch):
    """The command in each makes a run with the record's settings, whatever was added since."""
    monkeypatch.chdir(SHAPES.parents[1])
    assert len(RECORDS) > 70
    for path in RECORDS:
        record = json.loads(path.read_text())
        words = shlex.split(record["command"])
        cfg = load_config(words[3], words[4:])
        settings = plan._settings(cfg)
        if plan.WEIGHTS in record["settings"]:  # of a file that is not here
            settings[plan.WEIGHTS] = record["settings"][plan.WEIGHTS]
        run = plan.Run(record["variant"], words[3], tuple(words[4:]), settings)
        assert matching(run, [record]) is record, path.name


def test_a_key_that_is_new_since_the_record_counts_as_its_default():
    (run,) = make_plan({"bcn_ws": CONFIGS["bcn_ws"]})
    older = dict(run.settings)
    del older["MODEL.BCN.UPDATE_RATE_SCHEDULE"]
    assert matching(run, [{"settings": older}])
    del older["MODEL.RESNETS.NORM"]  # its default is another value than the run's
    assert not matching(run, [{"settings": older}])


def test_other_weights_of_one_name_make_another_run(tmp_path):
    weights = tmp_path / "model.pth"
    configs, opts = {"gn": CONFIGS["gn"]}, ["MODEL.WEIGHTS", str(weights)]
    (absent,) = make_plan(configs, opts=opts)
    weights.write_bytes(b"a classifier")
    (run,) = make_plan(configs, opts=opts)
    record = {"settings": run.settings}
    assert run.name != absent.name  # the folder in which an interrupted run goes on
    assert matching(run, [record]) is record
    # A report of records alone needs no weights, and older records do not know their content.
    assert matching(absent, [record]) is record
    assert matching(run, [{"settings": absent.settings}])
    weights.write_bytes(b"another one")
    (other,) = make_plan(configs, opts=opts)
    assert matching(other, [record]) is None
    (elsewhere,) = make_plan(configs, opts=["MODEL.WEIGHTS", "elsewhere.pth"])
    assert matching(elsewhere, [record]) is None


def test_labels():
    paths = ["a/mask_rcnn_gn.yaml", "b/mask_rcnn_gn_ws.yaml"]
    assert label_configs(paths) == {"gn": paths[0], "gn_ws": paths[1]}
    assert label_configs(paths[:1]) == {"mask_rcnn_gn": paths[0]}
    with pytest.raises(UsageError, match="same name"):
        label_configs(["a/x.yaml", "b/x.yaml"])


@pytest.mark.parametrize(
    "options", [{"images_per_step": [0]}, {"seeds": [-1]}, {"max_iter": 0}, {"evaluations": 0}]
)
def test_senseless_numbers_are_refused(options):
    with pytest.raises(UsageError):
        make_plan({"gn": CONFIGS["gn"]}, **options)


def test_records_are_found_and_other_files_are_not(tmp_path):
    write_record(make_record(), tmp_path / "one" / "a.json")
    write_record(make_record(seed=2), tmp_path / "two" / "b.json")
    (tmp_path / "one" / "broken.json").write_text('{"format": 1,')
    (tmp_path / "one" / "other.json").write_text('{"format": 99}')
    (tmp_path / "one" / "list.json").write_text("[]")
    found = find_records(tmp_path / "one", tmp_path / "two", tmp_path / "absent")
    assert [record["seed"] for record in found] == [1, 2]
    found = find_records(tmp_path / "two", tmp_path / "one")  # the first named, first used
    assert [record["seed"] for record in found] == [2, 1]
    assert not list(tmp_path.rglob("*.part"))


def test_the_name_of_a_run():
    settings = {"SEED": 7, "SOLVER.IMS_PER_BATCH": 2}
    digest = hashlib.sha256(b'{"SEED": 7, "SOLVER.IMS_PER_BATCH": 2}').hexdigest()[:10]
    run = plan.Run("gn/ws A=0.1_b-c ü:d", "x.yaml", (), settings)
    assert run.name == f"gn-ws-A=0.1_b-c-ü-d_2img_seed7_{digest}"
    plain = plan.Run("gn", "x.yaml", (), {"SEED": 1})  # Detectron2's own
    assert (plain.images_per_step, plain.max_iter, plain.seed) == (16, 40000, 1)
    assert default_of("NO.SUCH") is None


def test_a_plan_that_asks_for_nothing_is_the_configs_own():
    (run,) = make_plan({"gn": CONFIGS["gn"]})
    cfg, own = load_config(run.config_file, run.overrides), load_config(CONFIGS["gn"])
    assert run.seed == 1 and cfg.SOLVER.IMS_PER_BATCH == own.SOLVER.IMS_PER_BATCH
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (own.SOLVER.MAX_ITER, own.SOLVER.STEPS)
    assert (own.SOLVER.BASE_LR, run.max_iter) == (cfg.SOLVER.BASE_LR, own.SOLVER.MAX_ITER)
    assert -(-own.SOLVER.MAX_ITER // 5) == cfg.TEST.EVAL_PERIOD


@pytest.mark.parametrize(
    "options, message",
    [
        ({"images_per_step": [0]}, "--images-per-step must be at least 1, --seeds at least 0"),
        ({"seeds": [1, -1]}, "--images-per-step must be at least 1, --seeds at least 0"),
        ({"max_iter": 0}, "--max-iter and --evaluations must be at least 1"),
        ({"evaluations": 0}, "--max-iter and --evaluations must be at least 1"),
    ],
)
def test_the_least_numbers_of_a_plan(options, message):
    configs = {"gn": CONFIGS["gn"]}
    with pytest.raises(UsageError, match=f"^{message}$"):
        make_plan(configs, **options)
    least = {"images_per_step": [1], "seeds": [0], "max_iter": 1, "evaluations": 1}
    assert make_plan(configs, opts=["SOLVER.STEPS", "()"], **least)[0].seed == 0


def test_labels_keep_whole_words():
    """What all stems begin with goes, but no part of a word."""
    assert list(label_configs(["a_bcn.yaml", "a_bn.yaml"])) == ["bcn", "bn"]
    assert list(label_configs(["x/a_gn.yaml", "y/a_.yaml"])) == ["gn", "a_"]
    assert list(label_configs(["gn.yaml", "gnx.yaml"])) == ["gn", "gnx"]

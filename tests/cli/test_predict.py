"""The command that predicts: what it writes, and what it refuses before it writes anything."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_model
from PIL import Image
from pycocotools.coco import COCO

from wsbcn_d2 import Predictor
from wsbcn_d2.checkpoint import WSBCNCheckpointer
from wsbcn_d2.cli import predict
from wsbcn_d2.cli.predict import Source, _readable, find_sources, main
from wsbcn_d2.engine import UsageError, load_config

ROOT = Path(__file__).resolve().parents[2]

ANY = ["--threshold", "0.05"]


@pytest.fixture
def run(tmp_path, tiny_cfg, tiny_shapes):
    """A finished run's folder: a checkpoint and its config."""
    cfg = tiny_cfg("DATASETS.TEST", (tiny_shapes["val"],), "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
    folder = tmp_path / "run"
    folder.mkdir()
    torch.manual_seed(0)
    WSBCNCheckpointer(build_model(cfg), str(folder)).save("model_final")
    (folder / "config.yaml").write_text(cfg.dump())
    return folder


def picture(path, size=(64, 80)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.randint(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return path


def test_pictures_of_a_data_set_become_results_that_coco_takes(run, tmp_path, tiny_shapes):
    metadata = MetadataCatalog.get(tiny_shapes["val"])
    output = tmp_path / "out"
    assert main(["--weights", str(run / "model_final.pth"), "--output", str(output), *ANY,
                 "--annotations", metadata.json_file, metadata.image_root]) == 0  # fmt: skip
    truth = COCO(metadata.json_file)
    assert truth.loadRes(str(output / "results.json")).getAnnIds()
    results = json.loads((output / "results.json").read_text())
    names = {i["id"]: i["file_name"] for i in truth.dataset["images"]}
    for result in results:
        assert names[result["image_id"]] == result["file_name"]
        assert result["category_id"] in truth.getCatIds()
        assert result["score"] >= 0.05
    assert sorted(p.name for p in output.glob("*.png")) == sorted(names.values())
    predictor = Predictor.from_checkpoint(run / "model_final.pth", threshold=0.05)
    instances = predictor(read_image(f"{metadata.image_root}/{names[1]}", "BGR"))["instances"]
    assert [r["score"] for r in results if r["image_id"] == 1] == instances.scores.tolist()
    classes = [truth.getCatIds()[c] for c in instances.pred_classes]
    assert [r["category_id"] for r in results if r["image_id"] == 1] == classes


def test_folders_and_patterns_keep_names_and_a_folded_model_finds_the_same(run, tmp_path):
    folder = tmp_path / "pictures"
    for name in ("a.jpg", "below/a.jpg", "below/b.png", ".hidden.png"):
        picture(folder / name)
    (folder / "notes.txt").write_text("no picture")
    command = ["--weights", str(run / "model_final.pth"), *ANY, str(folder), f"{folder}/*/*.png"]
    assert main([*command, "--output", str(tmp_path / "plain")]) == 0
    assert main([*command, "--output", str(tmp_path / "folded"), "--fold", "--no-pictures"]) == 0
    names = ["a.jpg", "b.png", "below/a.jpg", "below/b.png"]
    made = [p.relative_to(tmp_path / "plain").as_posix() for p in (tmp_path / "plain").rglob("*.*")]
    assert sorted(made) == [*names, "results.json"]
    assert [p.name for p in (tmp_path / "folded").iterdir()] == ["results.json"]
    plain, folded = (json.loads((tmp_path / n / "results.json").read_text())
                     for n in ("plain", "folded"))  # fmt: skip
    assert len(plain) > 10
    for one, other in zip(plain, folded, strict=True):
        for key in ("image_id", "file_name", "category_id"):
            assert one[key] == other[key]
        assert other["score"] == pytest.approx(one["score"], abs=1e-4)
        assert other["bbox"] == pytest.approx(one["bbox"], abs=0.05)
    numbered = {r["file_name"]: r["image_id"] for r in plain}
    assert {n: numbered[n] for n in names} == {
        "a.jpg": 1, "below/a.jpg": 2, "below/b.png": 3, "b.png": 4
    }  # fmt: skip


def test_a_film_keeps_its_colours(run, tmp_path):
    import cv2

    film = str(tmp_path / "blue.avi")
    writer = cv2.VideoWriter(film, cv2.VideoWriter_fourcc(*"MJPG"), 12.5, (80, 64))
    for _ in range(2):
        writer.write(np.full((64, 80, 3), (230, 60, 20), np.uint8))  # OpenCV's order
    writer.release()
    words = ["--weights", str(run / "model_final.pth"), "--threshold", "1", film]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    drawn = cv2.VideoCapture(str(tmp_path / "out" / "blue.mp4"))
    assert drawn.get(cv2.CAP_PROP_FPS) == 12.5
    assert drawn.read()[1].mean((0, 1)) == pytest.approx((230, 60, 20), abs=12)


def test_a_picture_keeps_its_colours(run, tmp_path):
    Image.new("RGB", (80, 64), (230, 60, 20)).save(tmp_path / "red.png")
    words = ["--weights", str(run / "model_final.pth"), "--threshold", "1"]
    words += [str(tmp_path / "red.png"), "--output", str(tmp_path / "out")]
    assert main(words) == 0
    drawn = np.asarray(Image.open(tmp_path / "out" / "red.png").convert("RGB"))
    assert np.array_equal(drawn, np.full((64, 80, 3), (230, 60, 20)))


def test_pictures_of_one_name_have_a_number_each(tmp_path):
    paths = [str(picture(tmp_path / folder / "a.png")) for folder in ("x", "y", "z")]
    paths.insert(2, str(picture(tmp_path / "x" / "a_2.png")))
    found = find_sources(paths, str(tmp_path / "out"))
    assert [source.path for source in found] == paths
    assert [source.name for source in found] == ["a.png", "a_2.png", "a_2_2.png", "a_3.png"]
    assert [source.is_video or source.deep for source in found] == [False] * 4


@pytest.mark.parametrize(
    "words, expected",
    [
        ([], (0.5, False, [])),
        (["--threshold", "0.25", "--fold"], (0.25, True, [])),
        (["--device", "cpu"], (0.5, False, ["MODEL.DEVICE", "cpu"])),
        (["--device", "cpu", "--config-file", "a.py"], (0.5, False, ["train.device=cpu"])),
        (["--opts", "SEED", "3"], (0.5, False, ["SEED", "3"])),
    ],
)
def test_what_is_asked_of_the_predictor(words, expected, tmp_path, monkeypatch):
    asked = []

    def from_checkpoint(weights, **options):
        asked.append((weights, options))
        raise UsageError("enough")

    monkeypatch.setattr(Predictor, "from_checkpoint", from_checkpoint)
    path = str(picture(tmp_path / "p.png"))
    command = [path, "--weights", "w.pth", "--output", str(tmp_path / "out")]
    assert main([*command, *words]) == 2
    ((weights, options),) = asked
    assert weights == "w.pth"
    assert options.pop("config_file") == ("a.py" if "a.py" in words else None)
    threshold, fold, opts = expected
    assert options == {"threshold": threshold, "fold": fold, "opts": opts}


def test_a_video(run, tmp_path):
    import cv2

    film = str(tmp_path / "film.avi")
    writer = cv2.VideoWriter(film, cv2.VideoWriter_fourcc(*"MJPG"), 5, (80, 64))
    for _ in range(3):
        writer.write(np.random.randint(0, 256, (64, 80, 3), dtype=np.uint8))
    writer.release()
    output = tmp_path / "out"
    weights = ["--weights", str(run / "model_final.pth")]
    assert main([*weights, "--output", str(output), *ANY, film]) == 0
    assert sorted(p.name for p in output.iterdir()) == ["film.json", "film.mp4"]
    results = json.loads((output / "film.json").read_text())
    assert {r["image_id"] for r in results} == {1, 2, 3}
    drawn = cv2.VideoCapture(str(output / "film.mp4"))
    assert drawn.get(cv2.CAP_PROP_FRAME_COUNT) == 3 and drawn.read()[1].shape == (64, 80, 3)
    assert drawn.get(cv2.CAP_PROP_FPS) == 5


def test_a_video_that_does_not_say_how_fast_it_is(run, tmp_path, monkeypatch):
    """Neither frames per second nor their number: a stream's first part, say."""
    import cv2

    film = str(tmp_path / "film.avi")
    writer = cv2.VideoWriter(film, cv2.VideoWriter_fourcc(*"MJPG"), 5, (80, 64))
    writer.write(np.zeros((64, 80, 3), np.uint8))
    writer.release()

    class Silent:
        def __init__(self, path):
            video = open_video(path)
            self.read, self.isOpened, self.release = video.read, video.isOpened, video.release

        def get(self, what):
            return 0.0

    seen, open_video = [], cv2.VideoCapture
    monkeypatch.setattr(predict, "progress", lambda it, **how: seen.append(how) or it)
    weights, output = ["--weights", str(run / "model_final.pth")], ["--output", str(tmp_path / "o")]
    assert main([*weights, *output, *ANY, film, str(picture(tmp_path / "one.png"))]) == 0
    monkeypatch.setattr(cv2, "VideoCapture", Silent)
    assert main([*weights, *output, *ANY, film]) == 0
    names = [{"desc": "pictures"}, {"total": 1, "desc": "film.avi"}]
    assert seen == [*names, {"total": None, "desc": "film.avi"}]
    monkeypatch.undo()
    assert cv2.VideoCapture(str(tmp_path / "o" / "film.mp4")).get(cv2.CAP_PROP_FPS) == 25


def test_help_names_what_every_option_takes(capsys):
    with pytest.raises(SystemExit, match="0"):
        predict.parse(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for words in (
        "INPUT picture, folder, glob or video",
        "--weights WEIGHTS checkpoint of the model",
        "--config-file CONFIG_FILE its config, if not beside it",
        "--output DIR folder to write to",
        "--threshold THRESHOLD lowest score (default: 0.5)",
        "--fold fold the model first: faster",
        "--device DEVICE cpu, cuda, cuda:1 (default: the config's, if there is)",
        "--annotations JSON COCO file with the pictures' ids",
        "--no-pictures write results.json alone",
        "config overrides: KEY VALUE ...",
    ):
        assert words in shown


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


WRONG = {
    "an absent picture": (lambda run: None, ["absent.png"], "'absent.png' not found"),
    "a pattern without pictures": (lambda run: None, ["*.gif"], "'*.gif' not found"),
    "a folder without pictures": (lambda run: None, ["."], "holds no picture and no video"),
    "no picture": (
        lambda run: (run / "x.png").write_text("text"), ["x.png"], "'x.png' is no picture"),
    "a picture cut short": (
        lambda run: cut(picture(run / "x.png")), ["x.png"], "'x.png' is no picture"),
    "a name without a format": (
        lambda run: picture(run / "x.png").rename(run / "x.dat"), ["x.dat"], "must end as"),
    "no video": (lambda run: (run / "x.mp4").write_text("text"), ["x.mp4"], "'x.mp4' is no video"),
    "a checkpoint that is absent": (
        lambda run: (run / "model_final.pth").unlink(), ["p.png"], "model_final.pth' not found"),
    "a checkpoint cut short": (
        lambda run: cut(run / "model_final.pth"), ["p.png"], "model_final.pth"),
    "no config": (
        lambda run: (run / "config.yaml").unlink(), ["p.png"], "no config.yaml beside it"),
    "a config of another model": (
        lambda run: edit(run / "config.yaml", "NORM: BCN", "NORM: GN"), ["p.png"], "BCN"),
    "a norm that is none": (
        lambda run: edit(run / "config.yaml", "NORM: BCN", "NORM: XY"), ["p.png"], "XY"),
    "an unknown key": (
        lambda run: (run / "config.yaml").write_text("MODEL:\n  NOTHING: 1\n"), ["p.png"],
        "NOTHING"),
    "a config that runs code": (
        lambda run: (run / "config.yaml").write_text("a: !!python/object/apply:os.abort []"),
        ["p.png"], "could not determine a constructor"),
    "a config with a base": (
        lambda run: ((run / "config.yaml").rename(run / "other.yaml"),
                     (run / "config.yaml").write_text("_BASE_: other.yaml")),
        ["p.png"], "is no whole config, it has a _BASE_"),
    "a Python config": (
        lambda run: (run / "config.yaml").write_text("model: {_target_: os.abort}"), ["p.png"],
        "which is code"),
    "annotations that are absent": (
        lambda run: None, ["p.png", "--annotations", "x.json"], "--annotations 'x.json': "),
    "annotations of other pictures": (
        lambda run: (run / "x.json").write_text('{"images": [{"id": 1, "file_name": "q.png"}]}'),
        ["p.png", "--annotations", "x.json"], "'x.json': p.png"),
    "a picture of 16 bits": (
        lambda run: Image.fromarray(np.full((64, 80), 4000, np.uint16)).save(run / "x.png"),
        ["p.png", "x.png"], "x.png has more than 8 bits (I;16): set INPUT.PICTURE_RANGE"),
    "an override of no key": (lambda run: None, ["p.png", "--opts", "MODEL.NOTHING", "1"],
                              "NOTHING"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input_gets_one_line_and_nothing_is_written(run, what, monkeypatch, capsys):
    spoil, words, message = WRONG[what]
    monkeypatch.chdir(run)
    if "p.png" in words:
        picture(run / "p.png")
    spoil(run)
    before = sorted(run.rglob("*"))
    capsys.readouterr()
    assert main(["--weights", "model_final.pth", "--output", "out", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert sorted(run.rglob("*")) == before


def test_pictures_of_16_bits_are_scaled_by_their_range(run, tmp_path):
    eight = np.asarray(Image.open(picture(tmp_path / "a.png")).convert("L"))
    Image.fromarray(eight).save(tmp_path / "a.png")
    Image.fromarray(eight.astype(np.uint16) * 10 + 500).save(tmp_path / "b.png")
    words = ["--weights", str(run / "model_final.pth"), *ANY, "--no-pictures", "--output"]
    words += [str(tmp_path / "out"), str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    assert main([*words, "--opts", "INPUT.PICTURE_RANGE", "[500, 3050]"]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    scores = [[r["score"] for r in found if r["image_id"] == i] for i in (1, 2)]
    assert scores[0] and scores[0] == scores[1]


def test_an_input_is_not_overwritten(run, tmp_path, capsys):
    pictures = picture(tmp_path / "pictures" / "a.png").parent
    words = ["--weights", str(run / "model_final.pth"), str(pictures), "--output"]
    assert main([*words, str(pictures)]) == 2
    assert "would be overwritten" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--threshold", "2"], ["--device", "gpu"], ["--device", "cuda"]])
def test_options_that_are_wrong(run, words, capsys):
    if words[-1] == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as end:
        main(["--weights", "x.pth", "--output", "out", "p.png", *words])
    assert end.value.code == 2
    assert words[0] in capsys.readouterr().err.splitlines()[-1]


def test_a_classifier_is_refused(run, tmp_path, capsys):
    cfg = load_config(str(ROOT / "configs" / "shapes" / "classifier_R_18_gn_ws.yaml"))
    WSBCNCheckpointer(build_model(cfg), str(run)).save("model_final")
    (run / "config.yaml").write_text(cfg.dump())
    picture(tmp_path / "p.png")
    words = ["--weights", str(run / "model_final.pth"), "--output", str(tmp_path / "out")]
    assert main([*words, str(tmp_path / "p.png")]) == 2
    assert "ImageClassifier gives" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "suffix", ["mp4", "avi", "mov", "mkv", "webm", "m4v", "mpg", "mpeg", "MP4"]
)
def test_what_is_a_video_by_its_name(suffix):
    name = f"film.{suffix}"
    assert Source(name, name).is_video and _readable(Path(name))
    assert not _readable(Path(f".{name}"))


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "png", "bmp", "tif", "tiff", "webp", "PNG"])
def test_what_is_a_picture_by_its_name(suffix):
    Image.init()
    name = f"picture.{suffix}"
    assert not Source(name, name).is_video and _readable(Path(name))
    assert not _readable(Path(f".{name}"))
    assert not _readable(Path(f"{name}.txt"))

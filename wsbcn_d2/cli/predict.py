"""Predict on pictures or videos: drawn pictures and a COCO results file come out.

    {prog} --weights output/demo/model_final.pth --output DIR PICTURE ...
    {prog} --weights CHECKPOINT --output DIR FOLDER 'shots/*.jpg' film.mp4
    {prog} --weights CHECKPOINT --config-file CONFIG --fold --threshold 0.7 --output DIR FOLDER

The config is the config.yaml beside the checkpoint, as training left it, or --config-file. Pictures
are looked for in folders below a folder too. DIR gets each picture with what was found, under its
own name, and results.json in COCO's format for results. There file_name says which picture it is,
and image_id is that of --annotations, or its place in the order of reading, from 1 on; category_id
is the data set's, or where that is not here the class's number from 0 on. A video becomes NAME.mp4
and NAME.json, its frames counted from 1 on.

Wrong input is answered with one line and exit code 2 before anything is written.
"""

import argparse
import glob
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.utils.logger import setup_logger
from PIL import Image

from ..config import one_line, refusing
from ..data.picture_range import is_deep
from ..engine import UsageError
from ..engine.processes import is_python, one_line_errors
from ..files import progress, replacing
from ..predictor import Predictor

VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")


@dataclass
class Source:
    """A picture or a video to be read, and its name below the output folder.

    Attributes:
        deep: whether it is a picture of more than 8 bits.
    """

    path: str
    name: str
    deep: bool = False

    @property
    def is_video(self) -> bool:
        return self.path.lower().endswith(VIDEOS)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.description = __doc__.format(prog=parser.prog)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="picture, folder, glob or video")
    parser.add_argument("--weights", required=True, help="checkpoint of the model")
    parser.add_argument("--config-file", help="its config, if not beside it")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--threshold", type=float, default=0.5, help="lowest score (default: 0.5)")
    parser.add_argument("--fold", action="store_true", help="fold the model first: faster")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: the config's, if there is)")
    parser.add_argument("--annotations", metavar="JSON", help="COCO file with the pictures' ids")
    parser.add_argument("--no-pictures", action="store_true", help="write results.json alone")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="config overrides: KEY VALUE ..."
    )
    args = parser.parse_args(argv)
    if not 0 <= args.threshold <= 1:
        parser.error(f"--threshold is a score from 0 to 1, not {args.threshold:g}")
    if args.device:
        try:
            device = torch.device(args.device)
        except RuntimeError as error:
            parser.error(f"--device {args.device}: {one_line(error)}")
        if device.type == "cuda" and not torch.cuda.is_available():
            parser.error(f"--device {args.device}: no CUDA device here")
    return args


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    args = parse(argv)
    sources = find_sources(args.inputs, args.output)
    pictures = [source for source in sources if not source.is_video]
    ids = image_ids(pictures, args.annotations)
    setup_logger(name="wsbcn_d2")
    opts = list(args.opts)
    if args.device:
        lazy = args.config_file and is_python(args.config_file)
        opts += [f"train.device={args.device}"] if lazy else ["MODEL.DEVICE", args.device]
    predictor = Predictor.from_checkpoint(
        args.weights,
        config_file=args.config_file,
        opts=opts,
        threshold=args.threshold,
        fold=args.fold,
    )
    for source in [source for source in pictures if source.deep][:1]:
        predictor.read(source.path)  # says what is missing before anything is written
    count = predict_pictures(predictor, pictures, ids, args) if pictures else 0
    for source in sources:
        if source.is_video:
            count += predict_video(predictor, source, args)
    logging.getLogger("wsbcn_d2").info(
        f"{count} objects of scores from {args.threshold:g} on in {len(pictures)} pictures and "
        f"{len(sources) - len(pictures)} videos: {args.output}"
    )


def _format(path: str | os.PathLike) -> str | None:
    """The format that Pillow writes under a name with such an ending."""
    found = Image.registered_extensions().get(Path(path).suffix.lower())
    return found if found in Image.SAVE else None


def find_sources(inputs: list[str], output: str) -> list[Source]:
    """Pictures and videos that the command line names, each checked to be one.

    Raises:
        UsageError: for what is absent, empty or neither, and where the output would replace it.
    """
    found: list[Source] = []
    Image.init()
    for text in inputs:
        if os.path.isdir(text):
            paths = [p for p in sorted(Path(text).rglob("*")) if _readable(p) and p.is_file()]
            if not paths:
                raise UsageError(f"{text!r} holds no picture and no video: name another folder")
            found += [Source(str(p), p.relative_to(text).as_posix()) for p in paths]
            continue
        names = [text] if os.path.exists(text) else sorted(glob.glob(text, recursive=True))
        if not names:
            raise UsageError(f"{text!r} not found: check the path, and quote patterns")
        found += [Source(name, os.path.basename(name)) for name in names if os.path.isfile(name)]
    taken: set[str] = set()
    for source in found:
        stem, suffix = os.path.splitext(source.name)
        number = 1
        while source.name in taken:
            number += 1
            source.name = f"{stem}_{number}{suffix}"
        taken.add(source.name)
        target = os.path.join(output, source.name)
        if os.path.exists(target) and os.path.samefile(target, source.path):
            raise UsageError(f"{target!r} would be overwritten: choose another --output")
        if source.is_video:
            _check_video(source.path)
        else:
            source.deep = _check_picture(source.path)
    return found


def _readable(path: Path) -> bool:
    known = path.suffix.lower() in VIDEOS or _format(path)
    return bool(known) and not path.name.startswith(".")


def _check_picture(path: str) -> bool:
    """Whether a picture has more than 8 bits."""
    # A decoder of a damaged file raises anything.
    unread = refusing(f"{path!r} is no picture that can be read: ", Exception)
    with unread, Image.open(path) as image:
        image.load()  # all of it: a file cut short says so at its end
        deep = is_deep(image)
    if not _format(path):
        raise UsageError(f"{path!r}: its name must end as a picture's, in .jpg or .png for example")
    return deep


def _check_video(path: str) -> None:
    try:
        import cv2
    except ImportError as error:
        raise UsageError("videos need OpenCV: pip install opencv-python-headless") from error
    video = cv2.VideoCapture(path)
    readable, _ = video.read()
    video.release()
    if not readable:
        raise UsageError(f"{path!r} is no video that can be read")


def image_ids(sources: list[Source], annotations: str | None) -> list[int]:
    """Ids of the pictures in a COCO file, by their names, or numbers from 1 on.

    Raises:
        UsageError: for a file that cannot be read, or a picture that is not in it.
    """
    if annotations is None:
        return list(range(1, len(sources) + 1))
    wrong, mend = (OSError, ValueError, TypeError, KeyError), " cannot be read, or is not in it"
    with refusing(f"--annotations {annotations!r}: ", *wrong, mend=mend):
        images = json.loads(Path(annotations).read_text())["images"]
        ids = {os.path.basename(image["file_name"]): image["id"] for image in images}
        return [ids[os.path.basename(source.name)] for source in sources]


def predict_pictures(
    predictor: Predictor, sources: list[Source], ids: list[int], args: argparse.Namespace
) -> int:
    """Writes the drawn pictures and results.json; returns the number of objects."""
    results: list[dict] = []
    for image_id, source in zip(ids, progress(sources, desc="pictures"), strict=True):
        image = predictor.read(source.path)
        predictions = predictor(image)
        results += to_coco(predictor, predictions, image_id, source.name)
        if not args.no_pictures:
            path = os.path.join(args.output, source.name)
            drawn = Image.fromarray(predictor.draw(image, predictions).get_image())
            with replacing(path) as part:
                drawn.save(part, format=_format(path))
    _write_json(os.path.join(args.output, "results.json"), results)
    return len(results)


def predict_video(predictor: Predictor, source: Source, args: argparse.Namespace) -> int:
    """Writes the drawn video and its results; returns the number of objects."""
    import cv2

    video = cv2.VideoCapture(source.path)
    length = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    frames = progress(_frames(video), total=length if length > 0 else None, desc=source.name)
    target = os.path.join(args.output, os.path.splitext(source.name)[0])
    os.makedirs(os.path.dirname(target), exist_ok=True)
    results: list[dict] = []
    writer = None
    # OpenCV chooses the format by the name, so it cannot be that of an unfinished file.
    with tempfile.TemporaryDirectory(prefix=".", dir=os.path.dirname(target)) as folder:
        part = os.path.join(folder, "part.mp4")
        for number, frame in enumerate(frames, start=1):
            predictions = predictor(frame)
            results += to_coco(predictor, predictions, number, source.name)
            if args.no_pictures:
                continue
            drawn = predictor.draw(frame, predictions).get_image()[:, :, ::-1]
            if writer is None:
                rate = video.get(cv2.CAP_PROP_FPS) or 25.0
                code = cv2.VideoWriter_fourcc(*"mp4v")
                writer = cv2.VideoWriter(part, code, rate, (drawn.shape[1], drawn.shape[0]))
            writer.write(np.ascontiguousarray(drawn))
        video.release()
        if writer is not None:
            writer.release()
            os.replace(part, target + ".mp4")
    _write_json(target + ".json", results)
    return len(results)


def _frames(video) -> Iterator[np.ndarray]:
    while True:
        more, frame = video.read()
        if not more:
            return
        yield frame


def to_coco(predictor: Predictor, predictions: dict, image_id: int, name: str) -> list[dict]:
    """What was found in one picture as COCO results, with the picture's name.

    Raises:
        UsageError: for a model that finds neither objects nor segments.
    """
    if not predictions.keys() & {"instances", "sem_seg", "panoptic_seg"}:
        raise UsageError(
            f"{type(predictor.model).__name__} gives {', '.join(predictions)}: this command is for "
            "models that find objects or segments"
        )
    if "instances" not in predictions:
        return []
    ids = predictor.metadata.get("thing_dataset_id_to_contiguous_id", {})
    categories = {contiguous: category for category, contiguous in ids.items()}
    found = instances_to_coco_json(predictions["instances"].to("cpu"), image_id)
    for result in found:
        result["category_id"] = categories.get(result["category_id"], result["category_id"])
        result["file_name"] = name
    return found


def _write_json(path: str, results: list[dict]) -> None:
    with replacing(path) as part:
        Path(part).write_text(json.dumps(results))

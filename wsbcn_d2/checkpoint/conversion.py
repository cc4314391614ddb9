"""Any supported checkpoint -> a Detectron2 state dict with an account of what was done."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from .errors import CheckpointError, shortened
from .files.containers import Source, read_checkpoint, unwrap
from .formats.plain_bn import batch_norm_to_bcn
from .formats.recognise import FORMATS, detect_format, presume_formula, presume_pixels
from .layout import BOTTOM_UP, check_shapes, detector_shapes, infer_backbone, split_backbone
from .metadata import FORMULAS, METADATA_KEY, Metadata
from .report import ConversionReport
from .saving import save

TARGETS = {  # --to -> what the names are for
    "fpn": "a FPN detector (backbone.bottom_up.stem.conv1.weight)",
    "resnet": "any model: bare names (stem.conv1.weight) that Detectron2 matches by suffix",
    "c4": "a C4 detector (backbone.stem.conv1.weight, roi_heads.res5.0.conv1.weight)",
}


@dataclass(frozen=True)
class Options:
    """What the user knows better than the file.

    Attributes:
        target: a key of ``TARGETS``.
        format: a key of ``FORMATS``, None to detect it.
        norm: "GN", "BCN" or "BN" that the result must have; None for BCN from a BatchNorm file
            and for the file's own norm otherwise.
        formula: one of ``FORMULAS``, None for the format's usual one.
        source_name: file name or URL of the source, for the record and as a hint.
    """

    target: str = "fpn"
    format: str | None = None
    norm: str | None = None
    formula: str | None = None
    source_name: str = ""

    def __post_init__(self):
        for value, allowed in (
            (self.target, TARGETS),
            (self.format, (None, *FORMATS)),
            (self.norm, (None, "GN", "BCN", "BN")),
            (self.formula, (None, *FORMULAS)),
        ):
            if value not in allowed:
                names = ", ".join(str(name) for name in allowed if name)
                raise CheckpointError(f"{value!r} is not one of {names}")


def convert(
    state: Mapping[str, torch.Tensor] | Source, options: Options = Options()
) -> tuple[dict[str, torch.Tensor], ConversionReport]:
    """Converts a state dict; a pure function.

    Args:
        state: source names -> tensors (``module.`` allowed), a container around them, or what
            `read_checkpoint` returned.
        options: see `Options`.

    Returns:
        (state dict in Detectron2 names, report). Tensors keep their dtype.

    Raises:
        CheckpointError: unknown format or keys, shapes that are no known ResNet's, a norm that
            the source cannot be turned into.
    """
    source = state if isinstance(state, Source) else unwrap(dict(state))
    recorded = source.extra.get(METADATA_KEY)
    recorded = None if recorded is None else Metadata.from_dict(recorded)
    fmt = FORMATS[options.format] if options.format else detect_format(source.state)
    mapped = fmt.convert(source.state)
    kind, names = split_backbone(mapped.state)
    if not names:
        raise CheckpointError("there is no ResNet in it")
    backbone = {bare: mapped.state.pop(name) for bare, name in names.items()}
    origin = {bare: mapped.sources.get(name) for bare, name in names.items()}
    rest = mapped.state
    if kind == "bare" and rest:
        raise CheckpointError(f"{len(rest)} keys are no part of a ResNet: {shortened(rest)}")
    notes = [*source.notes, *mapped.notes]

    layout = infer_backbone(backbone)
    check_shapes(backbone, layout.shapes())
    if fmt.name != "detectron2" and rest:  # Detectron2's own heads are of any kind
        check_shapes(rest, detector_shapes(rest, layout))

    norm = options.norm or _default_norm(layout.norm, detector=bool(rest), recorded=recorded)
    metadata = recorded or _presumed(fmt, layout.norm, options, source, bool(rest), notes)
    if (layout.norm, norm) == ("BN", "BCN"):
        backbone = batch_norm_to_bcn(backbone)
        origin = {n: origin.get(n.replace(".norm.bn.", ".norm.")) for n in backbone} | {
            n: None for n in backbone if ".norm." in n and ".norm.bn." not in n
        }
        layout = replace(layout, norm=norm)
        notes.append("the channel half of each BCN starts at weight 1, bias 0: fine-tune from it")
    elif layout.norm != norm:
        raise CheckpointError(
            f"this is a {layout.norm} checkpoint and {norm} is wanted: they hold different "
            f"parameters; set the model's norm to {layout.norm} or take another checkpoint"
        )
    metadata = replace(
        metadata,
        norm=norm,
        ws_formula=options.formula or metadata.ws_formula,
        presumed=tuple(p for p in metadata.presumed if not (options.formula and p == "ws_formula")),
        source=metadata.source or os.path.basename(options.source_name) or None,
        source_sha256=metadata.source_sha256 or source.sha256,
    )
    if extra := sorted(set(map(str, source.extra)) - {METADATA_KEY, "matching_heuristics"}):
        notes.append(f"not parameters, left behind: {', '.join(extra[:8])}")

    renamed, keep_rest = _target_names(backbone, kind, bool(rest), options.target)
    state = {renamed[bare]: tensor for bare, tensor in backbone.items()}
    mapping = {renamed[bare]: origin[bare] for bare in backbone}
    dropped = dict(mapped.dropped)
    if keep_rest:
        state |= rest
        mapping |= {name: mapped.sources.get(name) for name in rest}
    else:
        reason = f"not part of a {options.target} target"
        dropped |= {mapped.sources[name]: reason for name in rest}
    report = ConversionReport(
        format=fmt.name,
        container=source.container,
        keys_in=len(source.state),
        mapped={name: key for name, key in mapping.items() if key is not None},
        dropped=dropped,
        metadata=metadata,
        layout=layout,
        detector=_detector(rest) if keep_rest else "",
        added=[name for name, key in mapping.items() if key is None],
        nonfinite=[name for name, tensor in state.items() if not _finite(tensor)],
        notes=notes,
    )
    return state, report


def _finite(tensor):
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _detector(rest):
    if not any(name.startswith("roi_heads.") for name in rest):
        return ""
    mask = any(name.startswith("roi_heads.mask_head.") for name in rest)
    return "mask_rcnn" if mask else "faster_rcnn"


def _default_norm(norm, detector, recorded):
    """A bare BatchNorm backbone is for BCN; a detector or our own file stays what it is."""
    return "BCN" if norm == "BN" and not detector and not recorded else norm


def _presumed(fmt, norm, options, source, detector, notes):
    """Metadata of a source that says nothing about itself."""
    meta = source.extra.get("meta")
    name = os.path.basename(options.source_name)
    formula, why, certain = presume_formula(fmt, norm, name, meta)
    pixels = presume_pixels(fmt, norm, formula, detector)
    if options.formula is None:
        notes.append(f"WS formula {formula or 'not known'}: {why}")
    return Metadata(
        format=fmt.name,
        norm=norm,
        ws_formula=formula,
        ws_eps=1e-5,
        pixel_mean=pixels and pixels.pixel_mean,
        pixel_std=pixels and pixels.pixel_std,
        input_format=pixels and pixels.input_format,
        presumed=(
            *(("ws_formula",) if formula and not certain else ()),
            *(("pixel_mean", "pixel_std", "input_format") if pixels else ()),
        ),
    )


def _target_names(backbone, kind, has_heads, target):
    """(bare name -> name for a target, whether the other parts of the source come along)."""
    if target == "resnet":
        return {name: name for name in backbone}, False
    if has_heads and kind != target:
        raise CheckpointError(
            f"the heads of this {kind} detector do not fit a {target} one: use --to resnet"
        )
    if target == "fpn":
        return {name: f"{BOTTOM_UP}{name}" for name in backbone}, True
    return {
        name: f"roi_heads.{name}" if name.startswith("res5.") else f"backbone.{name}"
        for name in backbone
    }, True


def convert_file(source: str, target: str | None, options: Options = Options()) -> ConversionReport:
    """Reads a file, converts it and writes the result under a temporary name, then renames it.

    Args:
        source: local file.
        target: file to write, None to only check.
        options: see `Options`; the source's file name is filled in.

    Returns:
        the report.

    Raises:
        CheckpointError: with the source's path; the target is then as it was.
    """
    loaded = read_checkpoint(source)
    if not options.source_name:
        options = replace(options, source_name=source)
    try:
        state, report = convert(loaded, options)
    except CheckpointError as err:
        raise CheckpointError(f"{source}: {err}") from err
    if target:
        heuristics = options.target == "resnet"
        write_checkpoint(target, state, report.metadata, heuristics)
    return report


def write_checkpoint(
    path: str, state: Mapping[str, torch.Tensor], metadata: Metadata, heuristics: bool = False
) -> None:
    """Writes a Detectron2 checkpoint with this project's metadata, whole or not at all.

    Args:
        path: target, ``.pth``.
        state: names -> tensors.
        metadata: stored under ``wsbcn_d2``.
        heuristics: the names lack the model's prefix; Detectron2 is told to match suffixes.

    Raises:
        CheckpointError: it cannot be written.
    """
    data = {"model": dict(state), METADATA_KEY: metadata.as_dict()}
    if heuristics:
        data["matching_heuristics"] = True
    save(data, path)

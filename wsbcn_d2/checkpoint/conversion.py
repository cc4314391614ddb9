"""Any supported checkpoint -> a Detectron2 state dict with an account of what was done."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from .errors import CheckpointError, naming, shortened
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

    # A bare BatchNorm backbone is for BCN; a detector or our own file stays what it is.
    for_bcn = layout.norm == "BN" and not rest and not recorded
    norm = options.norm or ("BCN" if for_bcn else layout.norm)
    metadata = recorded or _presumed(fmt, layout.norm, options, source, bool(rest), notes)
    if (layout.norm, norm) == ("BN", "BCN"):
        backbone = batch_norm_to_bcn(backbone)
        added = [n for n in backbone if ".norm." in n and ".norm.bn." not in n]
        origin = {n: origin.get(n.replace(".norm.bn.", ".norm.")) for n in backbone}
        origin |= dict.fromkeys(added)
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

    keep_rest = options.target != "resnet"
    if keep_rest and rest and kind != options.target:
        raise CheckpointError(
            f"the heads of this {kind} detector do not fit a {options.target} one: use --to resnet"
        )
    renamed = {name: _placed(name, options.target) for name in backbone}
    state = {renamed[bare]: tensor for bare, tensor in backbone.items()}
    mapping = {renamed[bare]: origin[bare] for bare in backbone}
    dropped = dict(mapped.dropped)
    if keep_rest:
        state |= rest
        mapping |= {name: mapped.sources.get(name) for name in rest}
    else:
        dropped |= {mapped.sources[name]: "not part of a resnet target" for name in rest}
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
        nonfinite=[name for name, tensor in state.items() if not torch.isfinite(tensor).all()],
        notes=notes,
    )
    return state, report


def _detector(rest):
    if not any(name.startswith("roi_heads.") for name in rest):
        return ""
    mask = any(name.startswith("roi_heads.mask_head.") for name in rest)
    return "mask_rcnn" if mask else "faster_rcnn"


def _presumed(fmt, norm, options, source, detector, notes):
    """Metadata of a source that says nothing about itself."""
    name = os.path.basename(options.source_name)
    formula, why, certain = presume_formula(fmt, norm, name, source.extra.get("meta"))
    pixels = presume_pixels(fmt, norm, formula, detector)
    shown = vars(pixels) if pixels else {}
    if options.formula is None:
        notes.append(f"WS formula {formula or 'not known'}: {why}")
    return Metadata(
        format=fmt.name,
        norm=norm,
        ws_formula=formula,
        ws_eps=1e-5,
        presumed=(*(("ws_formula",) if formula and not certain else ()), *shown),
        **shown,
    )


def _placed(name, target):
    """A bare name where a target has it."""
    parent = "roi_heads." if name.startswith("res5.") else "backbone."
    return {"resnet": "", "fpn": BOTTOM_UP, "c4": parent}[target] + name


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
    with naming(source):
        state, report = convert(loaded, options)
    if target:
        write_checkpoint(target, state, report.metadata, options.target == "resnet")
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

"""What a conversion did, for people."""

from collections import Counter
from dataclasses import dataclass, field

from .layout import BackboneLayout
from .metadata import Metadata


@dataclass
class ConversionReport:
    """Account of one conversion: every key that went in is in ``mapped`` or in ``dropped``.

    Attributes:
        format: name of the source format.
        container: how the state dict was wrapped.
        keys_in: number of keys read.
        mapped: new name -> source key.
        dropped: source key -> reason.
        metadata: conventions, as written to the checkpoint.
        layout: the backbone's architecture; None where it is not a ResNet of ours.
        detector: "" for a backbone, else "faster_rcnn" or "mask_rcnn".
        added: new names without a source key (initial values).
        nonfinite: names of tensors with NaN or Inf.
        notes: everything else worth knowing.
    """

    format: str
    container: str
    keys_in: int
    mapped: dict[str, str]
    dropped: dict[str, str]
    metadata: Metadata
    layout: BackboneLayout | None = None
    detector: str = ""
    added: list[str] = field(default_factory=list)
    nonfinite: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def config_lines(self) -> list[str]:
        """Returns ``KEY: value`` lines with which this project's configs fit the checkpoint."""
        meta, layout, lines = self.metadata, self.layout, []
        if layout is not None:
            standardized = meta.ws_formula not in (None, "none")
            builder = f"build_{'ws_' if standardized else ''}resnet_fpn_backbone"
            if layout.deeplab:
                builder = "build_resnet_deeplab_backbone"
            lines += [
                f'MODEL.BACKBONE.NAME: "{builder}"',
                f"MODEL.RESNETS.DEPTH: {layout.depth}",
                f'MODEL.RESNETS.NORM: "{meta.norm}"',
                f"MODEL.RESNETS.STRIDE_IN_1X1: {meta.format == 'caffe2' and meta.norm != 'GN'}",
            ]
            if layout.groups > 1 or layout.width_per_group != 64:
                lines += [
                    f"MODEL.RESNETS.NUM_GROUPS: {layout.groups}",
                    f"MODEL.RESNETS.WIDTH_PER_GROUP: {layout.width_per_group}",
                ]
            if standardized:
                lines.append(f'MODEL.WS.FORMULA: "{meta.ws_formula}"')
            if self.detector:
                lines += self._detector_lines(standardized)
        if meta.input_format:
            lines += [
                f'INPUT.FORMAT: "{meta.input_format}"',
                f"MODEL.PIXEL_MEAN: {list(meta.pixel_mean)}",
                f"MODEL.PIXEL_STD: {list(meta.pixel_std)}",
            ]
        return lines

    def _detector_lines(self, standardized):
        ws = "WS" if standardized else ""
        plain = not any(".norm." in name for name in self.mapped if "fpn_" in name)
        norm = "" if plain else self.metadata.norm
        mask = self.detector == "mask_rcnn"
        lines = [
            f"MODEL.MASK_ON: {mask}",
            f'MODEL.FPN.NORM: "{norm}"',
            f'MODEL.ROI_BOX_HEAD.NAME: "{ws}FastRCNNConvFCHead"',
            f'MODEL.ROI_BOX_HEAD.NORM: "{norm}"',
        ]
        if mask:
            lines += [
                f'MODEL.ROI_MASK_HEAD.NAME: "{ws}MaskRCNNConvUpsampleHead"',
                f'MODEL.ROI_MASK_HEAD.NORM: "{norm}"',
            ]
        if self.format == "mmdet":
            lines.append("(the rest: configs/published/Base-mmdet-GN-WS.yaml)")
        return lines

    def lines(self) -> list[str]:
        """Returns the report, one line each."""
        meta = self.metadata

        def shown(name):
            value = getattr(meta, name)
            presumed = " (presumed)" if name in meta.presumed else ""
            return "not known" if value is None else f"{value}{presumed}"

        what = self.layout.name if self.layout else "not a ResNet of this project"
        lines = [
            f"format        {self.format}, {self.container}",
            f"model         {what}{', ' + self.detector if self.detector else ''}",
            f"keys          {self.keys_in} in, {len(self.mapped)} mapped, "
            f"{len(self.dropped)} dropped, {len(self.added)} added",
        ]
        for reason, count in Counter(self.dropped.values()).items():
            names = [key for key, why in self.dropped.items() if why == reason]
            example = names[0] if count == 1 else f"{names[0]} ... {names[-1]}"
            lines.append(f"  dropped     {count} ({example}): {reason}")
        lines += [
            f"norm          {shown('norm')}",
            f"WS formula    {shown('ws_formula')}, eps {shown('ws_eps')}",
            f"channel order {shown('input_format')}",
            f"pixel mean    {shown('pixel_mean')}",
            f"pixel std     {shown('pixel_std')}",
        ]
        lines += [f"note          {note}" for note in self.notes]
        if self.nonfinite:
            lines.append(
                f"WARNING       NaN or Inf in {len(self.nonfinite)} tensors: "
                f"{', '.join(self.nonfinite[:4])}"
            )
        lines += ["config"] + [f"  {line}" for line in self.config_lines()]
        return lines

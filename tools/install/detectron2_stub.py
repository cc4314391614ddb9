"""Stands in for `detectron2._C`, the compiled extension, in a pure-Python Detectron2.

`tools/install/install_detectron2.py` copies this file into the package as `detectron2/_C.py`.
Importing it always works, because Detectron2's layers do so on import; using an operation that
only the compiled extension has raises an error that names it.
"""

_WHAT = {
    "box_iou_rotated": "rotated boxes",
    "nms_rotated": "rotated boxes",
    "roi_align_rotated": "rotated boxes",
    "deform_conv": "deformable convolutions",
    "modulated_deform_conv": "deformable convolutions",
    "COCOeval": "the C++ COCOeval (evaluate with use_fast_impl=False)",
    "InstanceAnnotation": "the C++ COCOeval (evaluate with use_fast_impl=False)",
}


class MissingExtensionError(NotImplementedError, AttributeError):
    """A compiled operation was used. Also an AttributeError, so that `hasattr` answers False."""


def get_compiler_version():
    """Answers `detectron2.utils.collect_env`."""
    return "none (pure-Python Detectron2, nothing compiled)"


def get_cuda_version():
    """Answers `detectron2.utils.collect_env`."""
    return "not available"


def has_cuda():
    """Answers `detectron2.utils.collect_env`."""
    return False


def __getattr__(name):
    # Dunder names are probes by copy, inspect, pickle and the import system, not uses.
    if name.startswith("__") and name.endswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    what = next((text for prefix, text in _WHAT.items() if name.startswith(prefix)), "an operation")
    raise MissingExtensionError(
        f"detectron2._C.{name} is missing: this pure-Python Detectron2 comes without {what}; "
        "compile Detectron2 from its repository to get it "
        "(python tools/install/install_detectron2.py --source git)"
    )

"""Names of data sets in Detectron2's catalogs."""

from detectron2.data import DatasetCatalog, MetadataCatalog

__all__ = ["forget", "is_free"]


def is_free(name: str, replace: bool) -> bool:
    """Whether a set can be registered under a name, which is taken from another to replace it."""
    if name in DatasetCatalog.list() and replace:
        forget(name)
    return name not in DatasetCatalog.list()


def forget(name: str) -> None:
    """Take a name from the set that has it."""
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)

"""Errors of the data sets."""


class ClassificationDataError(RuntimeError):
    """A classification data set is absent or damaged; one line says where and what to do."""

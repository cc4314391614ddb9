"""Errors of the data sets."""


class DataError(RuntimeError):
    """A data set cannot be used; one line says which, where it was looked for and what to do."""


class ClassificationDataError(DataError):
    """A classification data set is absent or damaged; one line says where and what to do."""

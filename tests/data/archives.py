"""Archives as data sets are published in, whole or with members that are no files."""

import tarfile
from io import BytesIO


def pack(path, folder, files, **attributes):
    """Write a tar.gz of one folder: ``files`` is name to content; attributes of every member."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            for key, value in attributes.items():
                setattr(info, key, value)
            tar.addfile(info, BytesIO(content))

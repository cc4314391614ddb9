"""A config whose YAML files are data: no tag runs code, and no file fetches another."""

import contextvars
import os

import detectron2
import yaml
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from fvcore.common.config import BASE_KEY

__all__ = ["SafeCfgNode", "read_yaml"]

_BYTES = 1 << 20  # larger than any config
_VALUES = 100_000  # in one file, with what its aliases repeat
_DEPTH = 50  # of a file's values, and of files that inherit from each other
# Its own configs are part of an installed program; that of RetinaNet computes its anchors.
_DETECTRON2 = os.path.join(os.path.dirname(os.path.realpath(detectron2.__file__)), "")
_remote = contextvars.ContextVar("remote", default=False)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe one, and tuples."""


_Loader.add_constructor(
    "tag:yaml.org,2002:python/tuple",
    lambda loader, node: tuple(loader.construct_sequence(node, deep=True)),
)


class SafeCfgNode(CfgNode):
    """Detectron2's config, whose ``merge_from_file`` takes files from strangers."""

    def merge_from_file(
        self, cfg_filename: str, allow_unsafe: bool = False, *, allow_remote: bool = False
    ) -> None:
        """Merge a YAML file, with those that its ``_BASE_`` names.

        Args:
            cfg_filename: path of the file.
            allow_unsafe: of Detectron2's interface; nothing unsafe is allowed.
            allow_remote: let a ``_BASE_`` be a URL, or beside a config that is one.

        Raises:
            ValueError: tags that would run code, a ``_BASE_`` on another machine or in a circle,
                or a file out of all proportion; one line with the file's name.
        """
        if allow_unsafe:
            raise ValueError("a config file runs no code: allow_unsafe is not to be had")
        token = _remote.set(allow_remote)
        try:
            super().merge_from_file(cfg_filename, allow_unsafe=False)
        except TypeError as error:  # Detectron2's look for the version of MODEL: 3
            raise ValueError(f"{cfg_filename}: MODEL has keys of its own: give them") from error
        finally:
            _remote.reset(token)

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict:
        """As Detectron2's, safe whatever is asked for."""
        return _load_with_bases(filename, ())

    # Only the root, which merges files, is of this class: yacs wants nodes of one class within.
    _create_config_tree_from_dict = CfgNode._create_config_tree_from_dict
    _decode_cfg_value = CfgNode._decode_cfg_value


def _load_with_bases(path: str, heirs: tuple[str, ...]) -> dict:
    if path in heirs or len(heirs) > _DEPTH:
        raise ValueError(f"{path} inherits from itself, or too long a chain of files: mend _BASE_")
    values = read_yaml(path)
    bases = values.pop(BASE_KEY, [])
    result: dict = {}
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str):
            raise ValueError(f"{path}: _BASE_ is the path of a file, not {type(base).__name__}")
        if "://" not in base:
            base = os.path.join(os.path.dirname(path), os.path.expanduser(base))
        if "://" not in base:
            base = os.path.normpath(base)
            if not os.path.isfile(base):
                raise ValueError(f"{path}: _BASE_ {base} not found")
        elif not _remote.get():
            raise ValueError(
                f"{path}: _BASE_ {base} is on another machine: fetch it, look at it and name the "
                "local file"
            )
        _merge(_load_with_bases(base, (*heirs, path)), result, path)
    _merge(values, result, path)
    return result


def _merge(new: dict, into: dict, path: str) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and key in into:
            if not isinstance(into[key], dict):
                raise ValueError(f"{path}: {key} is one value in its _BASE_, here it has several")
            _merge(value, into[key], path)
        else:
            into[key] = value


def read_yaml(path: str) -> dict:
    """A YAML file as plain values; its ``_BASE_`` is left alone.

    Args:
        path: of the file.

    Raises:
        ValueError: tags that would run code, or a file out of all proportion; one line.
    """
    try:
        with PathManager.open(path, "r") as stream:
            text = stream.read(_BYTES + 1)
        if len(text) > _BYTES:
            raise ValueError(f"more than {_BYTES} characters: no config")
        own = os.path.realpath(path).startswith(_DETECTRON2)
        loader = (yaml.UnsafeLoader if own else _Loader)(text)
        try:
            node = loader.get_single_node()
            _size(node, {}, 0)
            values = {} if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.constructor.ConstructorError as error:
        raise ValueError(
            f"{path}: {error.problem}: a config file is data, and runs no code"
        ) from error
    except (yaml.YAMLError, UnicodeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no KEY: value lines")
    return values


def _size(node: yaml.Node | None, known: dict[int, int], depth: int) -> int:
    """Values in a node, its aliases written out."""
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in known:
        size = known[id(node)]  # infinite within itself
    else:
        known[id(node)] = _VALUES + 1
        children = node.value
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in children for part in pair]
        size = 1 + sum(_size(child, known, depth + 1) for child in children)
        known[id(node)] = size
    if size > _VALUES or depth > _DEPTH:
        raise ValueError(f"more than {_VALUES} values or {_DEPTH} levels, aliases written out")
    return size

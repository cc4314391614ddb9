"""Type hints: everything public has them, since the package says so (py.typed)."""

import importlib
import inspect
import pkgutil

import pytest

import wsbcn_d2

# Machinery that is reached through other modules alone.
INSIDE = ("wsbcn_d2.layers.kernels", "wsbcn_d2.checkpoint.files")
MODULES = ["wsbcn_d2"] + [
    info.name
    for info in pkgutil.walk_packages(wsbcn_d2.__path__, "wsbcn_d2.")
    if not info.name.startswith(INSIDE)
]


def functions(owner):
    """Public functions of a class or the function itself, those written in this project."""
    if inspect.isfunction(owner):
        yield owner
    elif inspect.isclass(owner):
        for name, member in vars(owner).items():
            member = inspect.unwrap(getattr(member, "__func__", getattr(member, "fget", member)))
            if inspect.isfunction(member) and (name == "__init__" or not name.startswith("_")):
                yield member


def missing(function):
    signature = inspect.signature(function)
    for i, (name, parameter) in enumerate(signature.parameters.items()):
        bound = i == 0 and name in ("self", "cls")
        several = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.annotation is parameter.empty and not bound and not several:
            yield name
    if signature.return_annotation is signature.empty and function.__name__ != "__init__":
        yield "return"


@pytest.mark.parametrize("module", MODULES)
def test_everything_public_has_type_hints(module):
    module = importlib.import_module(module)
    bare = {}
    for name in getattr(module, "__all__", ()):
        public = getattr(module, name)
        if getattr(public, "__module__", "").startswith("wsbcn_d2"):
            for function in functions(public):
                if found := list(missing(function)):
                    bare[function.__qualname__] = found
    assert bare == {}

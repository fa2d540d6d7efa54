"""Functions of a batch by their import path, `"package.module:function"`, for configuration files."""

import re
from functools import lru_cache
from importlib import import_module
from typing import Any

from lightning_neuro.checks import ArgumentError

_PATH = re.compile(r"(?:\w+\.)*\w+:(?:\w+\.)*\w+")


def is_import_path(field: Any) -> bool:
    """Whether a field of a batch is given as an import path and not as a key, an index or a function."""
    return isinstance(field, str) and _PATH.fullmatch(field) is not None


@lru_cache(maxsize=64)
def imported(name: str, path: str) -> Any:
    """The function at an import path.

    Args:
        name: Name of the argument that holds the path, for the message.
        path: `"package.module:function"`.

    Raises:
        ArgumentError: If it cannot be imported, or is no function.
    """
    module, _, attributes = path.partition(":")
    try:
        found: Any = import_module(module)
        for attribute in attributes.split("."):
            found = getattr(found, attribute)
    except (ImportError, AttributeError) as error:
        raise ArgumentError(
            f"`{name}` must be the import path of a function, 'package.module:function'; got {path!r}, which raised"
            f" {type(error).__name__}: {error}. Is its folder on PYTHONPATH?"
        ) from error
    if not callable(found):
        raise ArgumentError(f"`{name}` must be the import path of a function; {path!r} is {type(found).__name__}.")
    return found

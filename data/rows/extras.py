"""Loads the packages of the `data` extra only where a file needs one."""

from importlib import import_module
from typing import Any


def load_extra(module: str, needs: str) -> Any:
    """Import a module; if it is not installed, raise a ValueError that names the extra. `needs` says what needs it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise ValueError(f"{needs} needs {package}, which is not installed: pip install 'moetune[data]'") from error

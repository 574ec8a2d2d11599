"""Composition: configuration, model, engine, loop, checkpoint, export.

Our top-level names are common words. A foreign `data/` or `moe/` in front of ours on the path would be imported in our
place, half the time silently; the guard below turns that into one sentence before anything else happens.
"""

from importlib.util import find_spec
from pathlib import Path


def _refuse_foreign_packages() -> None:
    home = Path(__file__).resolve().parent.parent
    for name in ("configs", "data", "moe"):
        spec = find_spec(name)
        found = Path(spec.origin).resolve() if spec is not None and spec.origin else None
        if found is None or found.parent.parent != home:
            where = found or (list(spec.submodule_search_locations or []) if spec is not None else "nothing")
            raise ImportError(
                f"moetune's package `{name}` belongs in {home / name}, but Python finds {where}. "
                f"Start from another folder, set PYTHONSAFEPATH=1, or install moetune into an environment of its own."
            )


_refuse_foreign_packages()

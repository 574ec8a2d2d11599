"""Unzip the kit's wheels into a folder for PYTHONPATH. Uses only the standard library, as no package is there yet."""

import sys
import zipfile
from pathlib import Path

NEEDED = ("torch", "numpy")
"""Packages that the machine must provide, because the kit does not contain them."""


def main(kit: Path, into: Path) -> int:
    """Unzip the kit; return 2 if this Python is not the kit's, or lacks torch or numpy."""
    expected = (kit / "python").read_text().strip()
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if version != expected:
        return _refuse(
            f"{sys.executable} is Python {version}, but the kit's packages are for {expected}. Use another one: "
            f"PYTHON=/path/to/python{expected} bash benchmarks/gpu/run.sh"
        )
    unpack(sorted((kit / "wheels").glob("*.whl")), into)
    missing = [name for name in NEEDED if not _can_import(name)]
    if missing:
        return _refuse(f"{sys.executable} lacks {' and '.join(missing)}, which the machine must provide: install them")
    return 0


def unpack(wheels: list[Path], into: Path) -> None:
    """Extract the modules and metadata of all wheels into one folder, including `.data` libraries but no scripts."""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                first, _, rest = name.partition("/")
                kind, _, inside = rest.partition("/")
                if not first.endswith(".data"):
                    archive.extract(name, into)
                elif kind in ("purelib", "platlib") and inside and not inside.endswith("/"):
                    target = into / inside
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(archive.read(name))


def _can_import(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


def _refuse(why: str) -> int:
    print(f"gpu-kit: {why}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))

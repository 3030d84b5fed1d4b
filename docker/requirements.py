"""Print what the named extras of pyproject.toml ask for, one requirement a line.

The images install libraries before our code is copied, so that a change of the code does not
download them again.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def requirements(extras: list[str]) -> list[str]:
    """The package's own requirements and those of its extras, sorted.

    Raises:
        ValueError: There is no such extra.
    """
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    known = project["optional-dependencies"]
    if unknown := sorted(set(extras) - set(known)):
        raise ValueError(f"no such extra: {', '.join(unknown)}; there are {', '.join(known)}")
    return sorted({*project["dependencies"], *(line for extra in extras for line in known[extra])})


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1:])))

"""Print the requirements that pyproject.toml declares, one a line: ``requirements.py [--oldest] [EXTRA…]``.

The Makefile installs them before the package, so that a change of a source file rebuilds the package alone.
``--oldest`` prints the oldest versions that are promised, for `make test-oldest`.
"""

from __future__ import annotations

import sys
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib


def main(arguments: list[str]) -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    requirements = list(project["dependencies"])
    for extra in arguments:
        if extra != "--oldest":
            requirements += project["optional-dependencies"][extra]
    if "--oldest" in arguments:
        requirements = [requirement.replace(">=", "==") for requirement in requirements]
    print("\n".join(requirements))


if __name__ == "__main__":
    main(sys.argv[1:])

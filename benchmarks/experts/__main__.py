"""``python benchmarks/experts run|report``; what is asked, and how, stands in ``__init__.py``."""

import argparse
import sys
from pathlib import Path

# Started as a folder, Python puts that folder on the path; the package is found from the one above it.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import experts  # noqa: E402
from experts.arms import PARTS  # noqa: E402
from experts.report import report  # noqa: E402
from experts.runner import run  # noqa: E402
from experts.worlds import SEEDS, WORLDS  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="experts", description=experts.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["run", "report"])
    parser.add_argument("--files", type=Path, default=Path(), help="DATA")
    parser.add_argument("--out", type=Path, default=Path("runs/experts"))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=["diverse"])
    parser.add_argument(
        "--parts", nargs="*", choices=PARTS, help="beside what is asked; no word: none; default: all"
    )
    options = parser.parse_args()
    (run if options.what == "run" else report)(options)


if __name__ == "__main__":
    main()

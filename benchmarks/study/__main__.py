"""``python benchmarks/study run|status|report --config cpu --out DIR``; see cli.py."""

import sys
from pathlib import Path

# Started as a folder, Python puts that folder on the path; the package is found from the one above it.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from study.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())

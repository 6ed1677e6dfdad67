"""``python -m mvp_ext``: versions, build flags, instruction set, archs, GPU and driver. Paste it into a bug report.

With arguments it is ``mvp-ext``, so that ``torchrun -m mvp_ext pretrain …`` starts it.
"""

from __future__ import annotations

import sys

from mvp_ext.app.environment import environment, places


def main() -> None:
    if sys.argv[1:]:
        from mvp_ext.app import cli

        return cli.main()
    facts = environment() | places()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()

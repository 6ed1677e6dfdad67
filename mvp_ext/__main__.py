"""``python -m mvp_ext``: versions, build flags, instruction set, archs, GPU and driver. Paste it into a bug report."""

from __future__ import annotations

from mvp_ext.app.environment import environment, places


def main() -> None:
    facts = environment() | places()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()

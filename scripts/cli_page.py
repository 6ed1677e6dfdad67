"""Writes docs/api/cli.md from the commands and options of ``mvp-ext``, or checks (``--check``) that they agree."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import typer  # noqa: E402

from mvp_ext.app.cli import app  # noqa: E402

PAGE = ROOT / "docs" / "api" / "cli.md"
INTRODUCTION = """# Command line

Thin commands over the Python API. An error is one line, with exit code 2; `MVP_DEBUG=1` shows where it was raised.
After Ctrl-C the same command goes on where it was. This page is made by scripts/cli_page.py of what `--help` says.
"""


def commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every command that does something, with the words that call it."""
    if not hasattr(command, "commands"):
        yield name, command
    for word, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, f"{name} {word}")


def section(name: str, command: Any) -> str:
    parts = [f"## {name}", inspect.cleandoc(command.help or "")]
    groups: dict[str, list[str]] = {}
    for parameter in command.params:
        if parameter.name == "help" or getattr(parameter, "hidden", False):
            continue
        group = getattr(parameter, "rich_help_panel", None) or "Options"
        groups.setdefault(group, []).append(row(parameter))
    for group, rows in groups.items():
        parts.append("\n".join([f"| {group} | default | |", "|---|---|---|", *rows]))
    return "\n\n".join(parts)


def row(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        label = parameter.metavar or parameter.name.upper()
    else:
        label = " / ".join([*parameter.opts, *parameter.secondary_opts])
    default = parameter.default() if callable(parameter.default) else parameter.default
    default = str(default).lower() if isinstance(default, bool) else default
    shown = "" if default is None or default == () else f"`{default}`"
    help_text = " ".join((parameter.help or "").split()).replace("|", "\\|")
    return f"| `{label}` | {shown} | {help_text} |"


def render() -> str:
    root = typer.main.get_command(app)
    return (
        "\n\n".join([INTRODUCTION.rstrip(), *(section(*named) for named in commands(root, "mvp-ext"))]) + "\n"
    )


def main() -> int:
    text = render()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != text:
        print(f"{PAGE.relative_to(ROOT)}: not what the commands say; run python scripts/cli_page.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What every command shares: one console, and errors as one clear line."""

from __future__ import annotations

import os
import sqlite3
import sys
import warnings
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

# A file or a log has no width: do not squeeze tables into 80 columns.
WIDTH = None if sys.stdout.isatty() else 120
console = Console(width=WIDTH)
errors = Console(stderr=True)

# What the API raises for wrong input and wrong surroundings: one line says it all. The rest is a mistake of ours.
EXPECTED = (ValueError, TypeError, OSError, ImportError, RuntimeError, ArithmeticError, sqlite3.Error)
# Commands that keep what is finished, and go on from there.
RESUME = ("demo", "pretrain", "build", "compare", "push", "pull")
# Exit codes; 130 is what a shell reports of a command that Ctrl-C ended.
WRONG_INPUT, OUR_MISTAKE, INTERRUPTED = 2, 1, 130


class Commands(TyperGroup):
    """A group of commands whose errors are one red line and exit code 2 (Ctrl-C: 130); ``MVP_DEBUG=1`` shows where."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            resumes = ctx.invoked_subcommand in RESUME
            kept = (
                "what was finished is kept, and the same command goes on from there"
                if resumes
                else "the same command begins anew"
            )
            complain(f"interrupted; {kept}", "yellow")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            # typer's own exceptions (a wrong option, an exit code) are not ours to print.
            if os.environ.get("MVP_DEBUG") or type(error).__module__.startswith(("typer", "click")):
                raise
            expected = isinstance(error, EXPECTED)
            title = (
                "error"
                if expected
                else f"error in mvp_ext itself ({type(error).__name__}; MVP_DEBUG=1 shows where)"
            )
            line = f"{title}: {' '.join(str(error).split()) or type(error).__name__}"
            complain(line)
            raise typer.Exit(WRONG_INPUT if expected else OUR_MISTAKE) from None


def say(text: object) -> None:
    """A sentence, as it is: a path in it is not broken over lines, and brackets in a name are no markup."""
    console.print(plain(str(text)), markup=False, highlight=False, soft_wrap=True)


def complain(text: str, style: str = "red") -> None:
    """Likewise, on stderr."""
    errors.print(plain(text), style=style, markup=False, highlight=False, soft_wrap=True)


def plain(text: str) -> str:
    """Text of whatever origin (a file's name, a class's) without what would steer a terminal: that is spelled out."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def warn_in_one_line() -> None:
    """Show warnings (a damaged zoo entry, say) as one yellow line instead of a line of somebody's source."""

    def show(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
        if issubclass(category, UserWarning):
            complain(f"warning: {message}", "yellow")

    warnings.showwarning = show

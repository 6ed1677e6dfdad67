"""``mvp-ext cache list | clear``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mvp_ext.app.console import Commands, complain, say
from mvp_ext.app.results import count_text
from mvp_ext.data.cache import CacheFile, cache_files, clear_cache

app = typer.Typer(cls=Commands, no_args_is_help=True, help="Decoded images of folders.")
Folders = Annotated[list[Path], typer.Argument(help="Folders of images, as of --data.", metavar="DATA...")]
Where = Annotated[
    Path | None,
    typer.Option(
        "--cache", help="The folder that --cache named. Default: beside DATA, and the user's cache."
    ),
]


@app.command("list")
def list_(data: Folders, cache: Where = None) -> None:
    """The files that hold decoded images of these folders, one line each."""
    files = [file for folder in data for file in cache_files(folder, cache)]
    for file in files:
        say(_line(file))
    if not files:
        say("none")


@app.command()
def clear(data: Folders, cache: Where = None) -> None:
    """Remove these files; not those that are being written. The images themselves stay."""
    for folder in data:
        removed = clear_cache(folder, cache)
        for file in removed:
            say(f"removed {_line(file)}")
        if not removed:
            say(f"{folder}: nothing to remove")
        for file in cache_files(folder, cache):
            complain(f"{file.path}: is being written, and stays", "yellow")


def _line(file: CacheFile) -> str:
    count = f"{file.images}" if file.done == file.images else f"{file.done} of {file.images}"
    return f"{file.path}: {count} images of {file.size} pixels, {count_text(file.bytes)}B"

"""Files that a command is to write, looked at before its work begins."""

from __future__ import annotations

import tempfile
from pathlib import Path


def check_output(option: str, path: Path, *, replace: bool = True) -> None:
    """Make the folder that ``path`` will lie in, and see that a file can be written there.

    Args:
        option: names it in errors.
        replace: whether a file that is there may be replaced.

    Raises:
        ValueError: there is a folder, or a file that must not be replaced.
        OSError: nothing can be written there.
    """
    if path.is_dir():
        raise ValueError(f"{option}: expected a file, got the folder {path}")
    if path.exists() and not replace:
        raise ValueError(
            f"{option}: {path} is there already; give --force to replace it, or another {option}"
        )
    check_folder(option, path.parent)


def check_folder(option: str, folder: Path) -> None:
    """Make the folder, and see that files can be written into it; OSError, or ValueError where it is a file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except FileExistsError:
        raise ValueError(f"{option}: expected a folder, got the file {folder}") from None
    except OSError as error:
        raise OSError(f"{option}: nothing can be written into {folder} ({error.strerror or error})") from None

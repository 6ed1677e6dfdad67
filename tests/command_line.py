"""Commands as a user types them, run in this process."""

from __future__ import annotations

import shlex

from typer.testing import CliRunner, Result

from mvp_ext.app import cli


def run(command: str, code: int = 0) -> Result:
    """Run ``mvp-ext command``; it must end with this exit code."""
    result = CliRunner().invoke(cli.app, shlex.split(command))
    assert result.exit_code == code, f"{command}\n{result.output}\n{result.exception!r}"
    return result

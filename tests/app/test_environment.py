"""Where a measurement comes from: commit and command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mvp_ext.app.environment import command, commit


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_commit_and_whether_the_sources_differ(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "source.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    at = git(tmp_path, "rev-parse", "--short=12", "HEAD")
    assert commit(tmp_path) == commit(tmp_path, "*.py") == at
    (tmp_path / "result.json").write_text("{}")
    assert commit(tmp_path) == at + "+"
    assert commit(tmp_path, "*.py") == at
    (tmp_path / "source.py").write_text("2")
    assert commit(tmp_path, "*.py") == at + "+"


def test_commit_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("MVP_COMMIT", raising=False)
    assert commit(tmp_path) == "unknown"
    monkeypatch.setenv("MVP_COMMIT", "abc")
    assert commit(tmp_path) == "abc"


def test_command_names_no_folder_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "bench" / "a.py"), "--only", "two words"])
    assert command(tmp_path) == "python bench/a.py --only 'two words'"
    assert command() == command(tmp_path / "other") == "a.py --only 'two words'"

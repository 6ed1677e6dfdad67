"""The messages on docs/errors.md are those that the code raises."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What a reader has instead of names and numbers, on the page; in the sources a value that is put in.
ELLIPSIS = "…"


def text_of(node: ast.AST) -> str | None:
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or ELLIPSIS for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def test_every_message_is_one_that_can_be_raised() -> None:
    sources = (ROOT / "mvp_ext").rglob("*.py")
    texts = [
        text_of(node) for path in sources for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    ]
    raised = [text for text in texts if text]
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.M)
    assert len(messages) > 40
    for message in messages:
        pieces = [re.escape(piece) for piece in re.split(rf"{ELLIPSIS}", message)]
        pattern = re.compile(".*".join(pieces), re.S)
        assert any(pattern.search(text) for text in raised), f"docs/errors.md: nothing says {message!r}"

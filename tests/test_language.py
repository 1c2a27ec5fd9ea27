"""Everything a person reads opens with its subject or an imperative, never with a clause."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from derta.cli.commands import COMMANDS
from derta.settings.fields import keys_of

ROOT = Path(__file__).parents[1]
CLAUSES = ("What", "Whether", "Of", "That", "How", "Which", "Whose", "Whom")
OPENING = re.compile(rf"({'|'.join(CLAUSES)})\b", re.IGNORECASE)
ENTRY = re.compile(r"^    [\w*, ]+: (.+)$", re.MULTILINE)
MODULES = [
    path
    for folder in ("derta", "kernels", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield every docstring's first sentence, and the descriptions of its arguments."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            continue
        text = ast.get_docstring(node)
        if text:
            line = getattr(node, "lineno", 1)
            yield line, text
            yield from ((line, entry) for entry in ENTRY.findall(text))


def messages(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield what exceptions say first."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            said = node.exc.args[0]
            if isinstance(said, ast.JoinedStr):
                said = said.values[0]
            if isinstance(said, ast.Constant) and isinstance(said.value, str):
                yield node.lineno, said.value


@pytest.mark.parametrize("folder", ["derta", "kernels", "benchmarks"])
def test_no_docstring_or_message_opens_with_a_clause(folder: str) -> None:
    found = []
    for path in MODULES:
        if path.is_relative_to(ROOT / folder):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found += [
                f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
                for line, text in (*docstrings(tree), *messages(tree))
                if OPENING.match(text)
            ]
    assert not found, "\n".join(found)


SETTINGS = [name for name, entry in COMMANDS.items() if entry.settings]


@pytest.mark.parametrize("command", sorted(SETTINGS))
def test_no_help_text_opens_with_a_clause(command: str) -> None:
    assert not OPENING.match(COMMANDS[command].summary)
    for name, key in keys_of(COMMANDS[command].config_class).items():
        text = key.about.help
        assert text and not OPENING.match(text), name
        assert text.endswith((".", ":")), name


def test_pages_open_their_paragraphs_with_the_subject() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
    pages += [*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*/README.md")]
    found = []
    for page in pages:
        for paragraph in re.split(r"\n\s*\n", page.read_text(encoding="utf-8")):
            text = paragraph.strip().lstrip("*#- ")
            if OPENING.match(text) and "?" not in text and "." in text.split("\n")[0]:
                found.append(f"{page.relative_to(ROOT)}: {text[:60]}")
    assert not found, "\n".join(found)

"""MkDocs hook: pages that include a file of the repository, and links that leave the pages.

A line `--8<-- "path"` is replaced by that file, so that the mathematics and the benchmarks are
written once, beside their code. A link to a file outside of docs/ becomes the file's path. A line
`--help-- COMMAND` is replaced by what `derta COMMAND --help` prints.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from derta.cli.commands import help_of

ROOT = Path(__file__).parents[1]
INCLUDE = re.compile(r'^--8<-- "(.+)"$', re.MULTILINE)
HELP = re.compile(r"^--help-- (.+)$", re.MULTILINE)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(((?!https?:|#)[^)\s]+)\)")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Return the page's text, included files and all."""

    def included(found: re.Match[str]) -> str:
        source = ROOT / found[1]
        return _within_docs(source.read_text(encoding="utf-8"), source.parent, page.file.src_uri)

    own_folder = (ROOT / "docs" / page.file.src_uri).parent
    markdown = INCLUDE.sub(included, _within_docs(markdown, own_folder, page.file.src_uri))
    return HELP.sub(lambda found: f"```\n{help_of(found[1])}```", markdown)


def _within_docs(markdown: str, folder: Path, page: str) -> str:
    """Return the text with links from `folder` as links from `page`, or as paths."""

    def link(found: re.Match[str]) -> str:
        picture, text, target = found.groups()
        path, _, anchor = target.partition("#")
        place = posixpath.normpath(posixpath.join(folder.relative_to(ROOT).as_posix(), path))
        if place.startswith("docs/"):
            here = posixpath.dirname(posixpath.join("docs", page))
            relative = posixpath.relpath(place, here)
            return f"{picture}[{text}]({relative}{'#' if anchor else ''}{anchor})"
        return text if text == place else f"{text} (`{place}`)"

    return LINK.sub(link, markdown)

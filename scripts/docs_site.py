"""What the site of the documentation (`make docs`) does to the pages of docs/.

The pages are written for a checkout, where a link may lead to any file of the repository. On the
site a link to a page goes to it, also to and from the files of the root that are pages there; a
link to anything else goes to `repo_url`, where that is set, and is its text alone otherwise.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")
ALSO = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Files of the root that are pages."""


def on_config(config: Any) -> Any:
    """Add every decision to the navigation."""
    pages = sorted((ROOT / "docs" / "adr").glob("*.md"))
    config.nav.append({"Decisions": [f"adr/{page.name}" for page in pages]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that stand in the root."""
    for name, place in ALSO.items():
        files.append(File.generated(config, place, content=(ROOT / name).read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn the links of a checkout into those of the site."""
    place = page.file.src_uri
    written = {site: name for name, site in ALSO.items()}.get(place, f"docs/{place}")
    return LINK.sub(lambda link: of_site(link, written, place, config.repo_url, files), markdown)


def of_site(link: re.Match[str], written: str, place: str, repository: str, files: Any) -> str:
    """A link of a checkout as one of the site.

    Args:
        link: text and target.
        written: the file that it stands in, from the root.
        place: its page, from that of the site.
        repository: address of the code; empty where there is none yet.
        files: of the site.
    """
    text, target = link.groups()
    path, mark, anchor = target.partition("#")
    if not path or ":" in path:
        return link.group()
    path = posixpath.normpath(posixpath.join(posixpath.dirname(written), path))
    page = ALSO.get(path, path.removeprefix("docs/") if path.startswith("docs/") else "")
    if files.get_file_from_path(page) is not None:
        return f"[{text}]({posixpath.relpath(page, posixpath.dirname(place) or '.')}{mark}{anchor})"
    if not (ROOT / path).exists():
        return link.group()  # mkdocs says so
    return f"[{text}]({repository.rstrip('/')}/blob/main/{path})" if repository else text

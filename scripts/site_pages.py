"""A hook of mkdocs: pages that live outside docs/ join the site, and links between all pages keep working.

In the repository links are relative paths, so that they work where the files are read without the site.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
# Path in the repository: path in the site.
OUTSIDE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "dev/LOG.md": "log.md",
    "examples/tavuni/README.md": "tavuni.md",
}
INSIDE = {in_site: path for path, in_site in OUTSIDE.items()}
LINK = re.compile(r"\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    for path, in_site in OUTSIDE.items():
        files.append(File.generated(config, in_site, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    source = page.file.src_uri
    here = posixpath.dirname(INSIDE.get(source, f"docs/{source}"))

    def rewrite(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(here, link[1]))
        in_site = OUTSIDE.get(path, path.removeprefix("docs/"))
        return f"]({posixpath.relpath(in_site, posixpath.dirname(source))}{link[2] or ''})"

    return LINK.sub(rewrite, markdown)

"""Settings of the site: `python -m sphinx -W --keep-going docs build/docs`. No network needed."""

import importlib.metadata
import os
import re
import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS / "extensions")]

project = "padim-ray"
author = "the padim-ray maintainers"
release = importlib.metadata.version("padim-ray")
html_title = f"padim-ray {release}"
html_theme = "furo"
html_copy_source = False
smartquotes = False  # options and JSON are copied from the pages
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",  # docstrings with Args:, Returns:, Raises:
    "command_options",  # in extensions/
]

# links within and between pages are those of a code host
myst_heading_anchors = 4

default_role = "code"  # `single backticks` in docstrings
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # "Attributes:" describes a class, beside members with docstrings

nitpicky = True
# annotations name what has no page here: other packages, and what is private or internal
nitpick_ignore_regex = [("py:.*", r"(?!padim_ray\.\w+$).*")]

# pages of the site that are files elsewhere in the repository
ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "infra/README.md": "kubernetes.md",
}


def link_to_pages(text: str, folder: Path) -> str:
    """Let the relative links of Markdown lead to pages of the site, or to files beside it.

    Args:
        text: Markdown, as it stands in the repository.
        folder: the directory that its links start from.

    Returns:
        The same text with links that start from `docs/`.
    """

    def target(link: re.Match[str]) -> str:
        path = (folder / link["path"]).resolve()
        if not path.is_file():
            return link[0]  # Sphinx says so
        name = path.relative_to(DOCS.parent).as_posix()
        return f"]({ELSEWHERE.get(name, os.path.relpath(path, DOCS))}{link['anchor']})"

    return re.sub(r"\]\((?!\w+:)(?P<path>[^)#\s]+)(?P<anchor>(#[^)\s]*)?)\)", target, text)


def setup(app):
    """Rewrite links when a page is read; leave out named tuples' fields, which say nothing."""

    def read_page(_app, _page, content):
        content[0] = link_to_pages(content[0], DOCS)

    def read_included(_app, path, _page, content):
        content[0] = link_to_pages(content[0], (DOCS / path).resolve().parent)

    def skip(_app, _what, _name, member, skipped, _options):
        is_field = type(member).__name__ == "_tuplegetter"  # "Alias for field number 0"
        return True if is_field else skipped

    app.connect("autodoc-skip-member", skip)
    app.connect("source-read", read_page)
    app.connect("include-read", read_included)

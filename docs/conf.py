"""Configuration of the documentation site: `make docs`.

README.md and its like are written to be read in the repository. The site has copies of them, made
here, in which links lead to pages of the site.
"""

import re
from pathlib import Path

from perceiver_ar_jax import __version__

ROOT = Path(__file__).resolve().parent.parent
PAGES_OF_ROOT = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")

project = "perceiver-ar-jax"
author = copyright = "the perceiver-ar-jax authors"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings have shapes, which types have not
napoleon_google_docstring, napoleon_numpy_docstring = True, False

html_theme = "furo"
html_title = f"perceiver-ar-jax {version}"
html_show_sphinx = False


def setup(app):
    """Sphinx calls it."""
    app.connect("builder-inited", _copy_pages_of_root)
    app.connect("source-read", _link_pages_of_root)


def _copy_pages_of_root(app) -> None:
    folder = Path(app.srcdir) / "_root"
    folder.mkdir(exist_ok=True)
    for name in PAGES_OF_ROOT:
        text = re.sub(r"\]\((?!https?:|#)([^)]*)\)", _from_copy, (ROOT / name).read_text())
        if not (folder / name).is_file() or (folder / name).read_text() != text:
            (folder / name).write_text(text)


def _from_copy(link: re.Match) -> str:
    """A link of a page in the root, as docs/_root needs it."""
    target = link[1]
    if target in PAGES_OF_ROOT:
        return f"]({target})"
    return f"](../{target.removeprefix('docs/')})" if "docs/" in target else f"](../../{target})"


def _link_pages_of_root(app, name, source) -> None:
    for page in PAGES_OF_ROOT:
        source[0] = source[0].replace(f"](../{page}", f"](_root/{page}")

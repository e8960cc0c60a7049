"""How Sphinx builds these pages: `tox -e docs`.  Nothing here asks the network."""

from __future__ import annotations

import sys
import warnings
from importlib.metadata import version as installed_version
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

project = "sqla-uow"
author = "the sqla-uow authors"
project_copyright = author
release = installed_version("sqla-uow")
version = release

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "myst_parser",
    # ours, in _ext
    "contents",  # the sidebar, from the lists of index.md
    "public_names",  # what is public, and that the reference has all of it
    "fixtures",  # of the pytest plugin
    "foreign_names",  # where the names of others are explained
    "terms",  # of the glossary, linked where a page first has them
    "diagrams",  # SVG that follows the light and dark of the page
]
exclude_patterns = ["_build"]

# autodoc looks at every attribute, also at those that only a mapped class has
warnings.filterwarnings("ignore", "Unmanaged access of declarative attribute")

# ---- pages
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4  # as a code forge makes them
default_role = "name"  # `name` in a docstring: a link where it is public, see _ext/public_names.py

# ---- reference
autodoc_default_options = {"show-inheritance": True}
autodoc_type_aliases = {
    "IsolationLevel": "sqla_uow.typing.IsolationLevel",
    "Propagation": "sqla_uow.typing.Propagation",
    "Fault": "sqla_uow.testing.Fault",
    "FaultPoint": "sqla_uow.testing.FaultPoint",
    "AnyVersioned": "sqla_uow_starlette.AnyVersioned",
    "ASGIApp": "starlette.types.ASGIApp",
}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

nitpick_ignore_regex = [
    (r"py:.*", r"sqla_uow(_starlette)?\._.*"),  # type variables and base classes: shown, but not for use
    (r"py:class", "P"),  # of ParamSpec
    (r"py:class", "S"),  # the class of a manager's sessions, in overloads
    (r"py:.*", r"starlette\..*"),  # its pages have no anchors for names
]

# ---- HTML
html_theme = "furo"
html_title = f"sqla-uow {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_copy_source = False
html_show_sourcelink = False

# ---- links: `tox -e links`, apart, because other people's servers fail when they like
linkcheck_anchors = False  # they are JavaScript's, more and more often
linkcheck_retries = 2
linkcheck_timeout = 20
linkcheck_ignore = [r"http://(127\.0\.0\.1|localhost)\b.*"]  # what a reader's own machine serves

"""Sphinx: what becomes of the pages in docs/."""  # noqa: INP001 - Sphinx reads it by its path

from __future__ import annotations

import builtins
from typing import TYPE_CHECKING

from sphinx.util.logging import getLogger

import sdlisten
import sdlisten.testing

if TYPE_CHECKING:
    from docutils.nodes import Element, TextElement
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

__all__ = ("setup",)

project = "sdlisten"
author = "The sdlisten developers"
version = release = sdlisten.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"sdlisten {release}"
html_copy_source = False
html_show_copyright = False
smartquotes = False  # "" is an empty string

myst_heading_anchors = 3
myst_enable_extensions = ["deflist", "fieldlist"]

default_role = "py:obj"  # `name` in docstrings
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
napoleon_use_rtype = False

# A link that leads nowhere fails the build. In texts and docstrings use py:obj, py:func, py:exc, py:meth.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:class", r".*"),  # annotations: much of what they name is not documented here
    (r"py:.*", rf"({'|'.join(dir(builtins))})(\..*)?"),
    (r"py:.*", r"(asyncio|os|socket|ssl)\..*"),
    (r"py:obj", r"[A-Z]+_ERRNOS|sdlisten\.(message|service)"),  # of modules, not public
    (r"py:obj", r"[a-z_]+"),  # arguments
]

HIDDEN_COLON = "\ufdd0"  # a code point that no text has
MADE_BY_USERS = {"sdlisten.Notifier", "sdlisten.Service"}


def check_all_is_documented(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn of public names that stand nowhere in the reference; here a warning is an error."""
    del app
    documented = env.domains.python_domain.objects
    for module in (sdlisten, sdlisten.testing):
        for name in module.__all__:
            if f"{module.__name__}.{name}" not in documented:
                text = "%s.%s is public, but stands nowhere in docs/reference"
                getLogger(__name__).warning(text, module.__name__, name)


def drop_signature(
    _app: Sphinx,
    what: str,
    name: str,
    _thing: object,
    _options: object,
    signature: str | None,
    _returns: object,
) -> tuple[str, None] | None:
    """Leave out the arguments of classes that only sdlisten itself makes."""
    if signature and what in {"class", "exception"} and name not in MADE_BY_USERS:
        return "", None
    return None


def hide_colons(
    _app: Sphinx, what: str, _name: str, _thing: object, _options: object, lines: list[str]
) -> None:
    """Keep napoleon from taking the text before a colon for a type: our annotations have the types."""
    hiding = what in {"attribute", "property"}  # there the first sentence
    for number, line in enumerate(lines):
        if hiding and (line.startswith(" ") or number == 0):
            lines[number] = line.replace(":", HIDDEN_COLON)
        elif line:
            hiding = line == "Returns:"


def show_colon(
    _app: Sphinx, _what: str, _name: str, _thing: object, _options: object, lines: list[str]
) -> None:
    """Undo what `hide_colons` did."""
    lines[:] = [line.replace(HIDDEN_COLON, ":") for line in lines]


def find_by_name(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: TextElement
) -> Element | None:
    """Find a public name that a docstring calls by its module, or from another package."""
    name = "sdlisten." + str(node.get("reftarget")).removeprefix("sdlisten.").partition(".")[2]
    domain = env.domains.python_domain
    for candidate in (name, f"sdlisten.{node.get('reftarget')}"):
        if node.get("refdomain") == "py" and candidate in domain.objects:
            return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", candidate, node, content)
    return None


def setup(app: Sphinx) -> None:
    """Connect the above."""
    app.connect("env-check-consistency", check_all_is_documented)
    app.connect("autodoc-process-signature", drop_signature)
    app.connect("autodoc-process-docstring", hide_colons, priority=400)  # napoleon has 500
    app.connect("autodoc-process-docstring", show_colon, priority=600)
    app.connect("missing-reference", find_by_name)

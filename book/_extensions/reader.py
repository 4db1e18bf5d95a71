"""A Sphinx extension: what a reader needs and the theme lacks.

The PDF of the whole book among the downloads of every page; pictures that open alone, to be enlarged on a phone; lists and
folding menus that screen readers understand; and no loader of code from another host, which Jupyter Book puts on every page
and this book never starts.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from lxml import html
from sphinx.application import Sphinx

_LOADER = "thebe"
_PICTURE = re.compile(r'(<a [^>]*>\s*)?(<img [^>]*src="([^"]*_images/[^"]*)"[^>]*>)')


def drop_loader(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None) -> None:
    """Take the scripts and styles of sphinx-thebe off the page."""
    for kind in ("script_files", "css_files"):
        context[kind] = [file for file in context.get(kind, ()) if not _is_loader(file)]


def _is_loader(file: Any) -> bool:
    body = str(getattr(file, "attributes", {}).get("body") or "")
    return _LOADER in str(getattr(file, "filename", file) or "") or _LOADER in body


def offer_pdf(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None) -> None:
    """Put the PDF of the book, where there is one, last in the menu of downloads."""
    if not app.config.book_pdf:
        return
    button = {
        "type": "link",
        "url": context["pathto"](app.config.book_pdf, 1),
        "text": "whole book (.pdf)",
        "tooltip": "Download the whole book as PDF",
        "icon": "fas fa-book",
        "label": "download-book-button",
    }
    groups = [group for group in context.get("header_buttons", ()) if group.get("label") == "download-buttons"]
    for group in groups:
        group["buttons"].append(button)


def name_menus(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None) -> None:
    """Say what the arrows of the side bar do: the theme draws them without a word."""
    if generate := context.get("generate_toctree_html"):
        named = '<summary aria-label="Show or hide the pages below">'
        context["generate_toctree_html"] = lambda *a, **k: str(generate(*a, **k) or "").replace("<summary>", named)


def nest_lists(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None) -> None:
    """Put the lists that sphinx.ext.viewcode writes into lists where they belong: into the item above."""
    if page != "_modules/index":
        return
    body = html.fragment_fromstring(context["body"], create_parent="div")
    for nested in body.xpath(".//ul/ul[preceding-sibling::li]"):
        nested.getprevious().append(nested)
    context["body"] = "".join(html.tostring(child, encoding="unicode") for child in body)


def link_pictures(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Let every picture that is no link yet open alone, where a phone enlarges it; paper has no use for that."""
    if app.builder.name == "html" and "body" in context:
        context["body"] = _PICTURE.sub(
            lambda m: m[0] if m[1] else f'<a class="picture" title="Open the picture alone" href="{m[3]}">{m[2]}</a>',
            context["body"],
        )


def visit_citation(self: Any, node: nodes.citation) -> None:
    """An entry of the list of references: docutils' own role is deprecated, and its list may not hold it."""
    if not isinstance(node.previous_sibling(), nodes.citation):
        self.body.append('<div role="list" class="citation-list">\n')
    self.body.append(self.starttag(node, "div", classes=["citation"], role="listitem"))


def depart_citation(self: Any, node: nodes.citation) -> None:
    self.body.append("</div>\n")
    if not isinstance(node.next_node(descend=False, siblings=True), nodes.citation):
        self.body.append("</div>\n")


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_config_value("book_pdf", "", "html")
    app.add_node(nodes.citation, override=True, html=(visit_citation, depart_citation))
    app.connect("html-page-context", drop_loader, priority=900)  # after all who add
    app.connect("html-page-context", offer_pdf, priority=900)
    app.connect("html-page-context", name_menus, priority=900)
    app.connect("html-page-context", nest_lists, priority=900)
    app.connect("html-page-context", link_pictures, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

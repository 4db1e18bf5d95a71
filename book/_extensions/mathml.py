"""A Sphinx extension: equations as MathML, which browsers draw and read aloud themselves, without a script."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number

logger = logging.getLogger(__name__)


def to_mathml(node: nodes.Element, as_block: bool) -> str:
    """The equation of a `math` or `math_block` node; a warning, and its source, where it is not understood."""
    source = node.astext().strip()
    try:
        mathml = tex2mathml(source, as_block=as_block)  # several lines are aligned at their &
    except MathError as error:
        logger.warning("equation not understood: %s (%s)", source, error, location=node)
        mathml = f"<code>{nodes.unescape(source)}</code>"
    return str(mathml)


def visit_math(self: Any, node: nodes.math) -> None:
    self.body.append(f'<span class="math-inline">{to_mathml(node, as_block=False)}</span>')
    raise nodes.SkipNode


def visit_math_block(self: Any, node: nodes.math_block) -> None:
    self.body.append(self.starttag(node, "div", CLASS="math-block"))
    self.body.append(f'<div class="math-scroll" tabindex="0">{to_mathml(node, as_block=True)}</div>')
    if node["number"]:
        self.body.append(f'<span class="eqno">({get_node_equation_number(self, node)})')
        self.add_permalink_ref(node, "Link to this equation")
        self.body.append("</span>")
    self.body.append("</div>")
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}

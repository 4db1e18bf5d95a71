"""Reading order: no term of the glossary is used before the sentence that introduces it, in bold."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
# Where a term's letters mean something else.
PATTERNS = {
    "learning": r"learning(?! rates?\b| curves?\b|\w)",
    "residue": r"(?<!neutral )residues?",
    "front": r"front(?!s? of)",
    "mix": r"mix(?!\w)",
    "adapter": r"adapters?",
    "capacity": r"capacity",
}


def terms():
    text = (ROOT / "book" / "glossary.md").read_text(encoding="utf-8")
    block = text.split("```{glossary}\n")[1].split("```")[0]
    return [line for line in block.splitlines() if line and not line.startswith(" ")]


def prose(path: Path) -> str:
    """The running text of a page: no headings, no code, no directives' options."""
    if path.suffix == ".ipynb":
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    else:
        text = path.read_text(encoding="utf-8")
    text = re.sub(r"```\{(admonition|list-table|raw|literalinclude|include)\}.*?```", "", text, flags=re.S)
    text = re.sub(r"\{[\w:]+\}`[^`]*`|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|\]\([^)]*\)", " ", text, flags=re.S)
    return "\n".join(line for line in text.splitlines() if not re.match(r"#|:|```|\|", line))


def pages() -> list[Path]:
    """The pages of Parts I to IV in reading order."""
    parts = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))["parts"]
    names = [entry["file"] for part in parts if part["caption"][:1] == "I" for entry in part["chapters"]]
    return [next(ROOT.glob(f"{name}.*")) for name in names]


BOOK = [(path.name, prose(path)) for path in pages()]


def first_use(term: str) -> tuple[str, str] | None:
    """Page and text around the first use of a term."""
    pattern = PATTERNS.get(term, re.escape(term).replace(r"\ ", r"\s+"))
    for name, text in BOOK:
        if found := re.search(rf"\*{{0,2}}\b{pattern}", text, re.IGNORECASE):
            start = text.rfind("\n\n", 0, found.start())
            return name, text[start : found.end() + 40].strip()
    return None


def test_reading_order_is_that_of_the_four_parts():
    assert [name for name, _ in BOOK][:5] == [
        "forgetting.ipynb", "capacity.ipynb", "adapter_by_hand.ipynb", "switching_off.ipynb", "method.md"
    ]  # fmt: skip


@pytest.mark.parametrize("term", terms())
def test_a_term_is_introduced_where_it_is_first_used(term):
    found = first_use(term)
    assert found is not None, f"{term} stands in the glossary and nowhere in the book"
    name, around = found
    pattern = PATTERNS.get(term, re.escape(term).replace(r"\ ", r"\s+"))
    bold = [re.sub(r"\s+", " ", words) for words in re.findall(r"\*\*([^*]+)\*\*", around)]
    assert any(re.search(pattern, words, re.IGNORECASE) for words in bold), f"{name}: …{around[-160:]}"

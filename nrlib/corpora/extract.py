"""HTML pages and Mallard help pages to paragraphs of plain text, and the rules all paragraphs are held to.

One walk serves every kind of markup: an element is *dropped* with all it holds (navigation, headings, code listings),
*breaks* the text into a new paragraph, or is *inline*. Roff manual pages have a module of their own, `man_pages`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from typing import Literal

from lxml import etree, html

EXTRACTOR_VERSION = 1
"""Raise it whenever the text that comes out changes: cached extractions of another version are made anew."""

MIN_COLUMNS = 40
"""Shorter paragraphs are headings and labels, mostly. A CJK character counts as two columns."""

Role = Literal["drop", "gap", "break", "inline"]
"""What an element does to the text around it; a `gap` is dropped and separates what stands before from after."""

# --- paragraphs -------------------------------------------------------------------------------------------------------

# Soft hyphens, zero-width spaces and direction marks are layout. The (non-)joiners U+200C/D are spelling: they stay.
_INVISIBLE = re.compile("[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060\ufeff\ue000-\uf8ff\ufffc]")
_CJK = "\u2e80-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uff00-\uffef"
_SPACE_IN_CJK = re.compile(f"(?<=[{_CJK}]) (?=[{_CJK}])")
_BULLET = re.compile(r"^(?:[-*•·◦▪‣→–—]\s+)+")
_WORD = re.compile(r"[^\W\d_]+")
_SPACE_BEFORE_STOP = re.compile(r"(?<=[\w)\]»”]) \.$")
# A comment of a Basic program, the signature of a method: marked up as paragraphs in LibreOffice's help.
_CODE = re.compile(r"'\s?\w|[\w.]+\.\w+\(")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ENGLISH = _words(
    "the of and is are this that with which from by be has have will when if not you your can it its for to or as an "
    "was does should must may but these there than been were using"
)
# Words of the list above that other languages of the recipes spell alike: not evidence of English there.
_SPELT_ALIKE = _words("of is for by to an or as can may be was but has it have were")
_NON_LATIN = _words("el hi ja ko mk ru sr uk zh")


def normalise(text: str) -> str:
    """One line of NFC text: every run of white space, no-break spaces included, becomes one plain space."""
    text = _INVISIBLE.sub("", unicodedata.normalize("NFC", text))
    text = "".join(c if c >= " " and c != "\x7f" else " " for c in text) if not text.isprintable() else text
    return _SPACE_BEFORE_STOP.sub(".", _SPACE_IN_CJK.sub("", " ".join(text.split())))


def is_prose(text: str) -> bool:
    """Whether normalised `text` is long enough and consists of words rather than of code, key names or references."""
    n_wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text) if not text.isascii() else 0
    if len(text) + n_wide < MIN_COLUMNS or _CODE.match(text):
        return False
    n_letters = sum(c.isalpha() or unicodedata.category(c)[0] == "M" for c in text)
    n_visible = len(text) - text.count(" ")
    n_code = sum(text.count(c) for c in "{}\\|=;<>_#$@~^*/()[]")
    return n_letters >= 0.7 * n_visible and n_code <= 0.12 * n_visible and (n_wide > 5 or text.count(" ") >= 4)


def is_english(text: str) -> bool:
    """Whether a paragraph of a translated page was plainly left in English (a stop-word test)."""
    words = [word.lower() for word in _WORD.findall(text)]
    found = [word for word in words if word in _ENGLISH]
    return len(found) >= 0.1 * len(words) and not _SPELT_ALIKE.issuperset(found)


def is_in(language: str, text: str) -> bool:
    """Whether a paragraph of a page in `language` is in that language rather than left in English."""
    if language.partition("-")[0] in _NON_LATIN:  # for these the script tells
        n_letters = sum(c.isalpha() for c in text)
        return sum(c.isalpha() and c > "\u024f" for c in text) >= 0.25 * n_letters
    return language.startswith("en") or not is_english(text)


def paragraphs_kept(paragraphs: Iterable[str], language: str) -> list[str]:
    """Normalise paragraphs and keep those that are prose in `language`; a page repeats none."""
    kept: dict[str, None] = {}
    for paragraph in paragraphs:
        text = _BULLET.sub("", normalise(paragraph))
        if is_prose(text) and is_in(language, text):
            kept[text] = None
    return list(kept)


# --- the walk over a tree ---------------------------------------------------------------------------------------------


def _walk(root: etree._Element, role_of: Callable[[etree._Element], Role], joints: dict[str, str]) -> list[str]:
    """The paragraphs below `root`; `joints` says what stands between the children of an element of that name."""
    paragraphs: list[str] = []
    pieces: list[str] = []

    def flush() -> None:
        paragraphs.append("".join(pieces))
        pieces.clear()

    def visit(element: etree._Element) -> None:
        pieces.append(element.text or "")
        joint = joints.get(_name(element))
        for child in element:
            role = role_of(child) if isinstance(child.tag, str) else "drop"  # comments have no name
            if role in ("gap", "break"):
                flush()
            if role == "drop" and child.tail and child.tail[0] in ".,)" and pieces:
                pieces[-1] = pieces[-1].rstrip()  # the space before the mark of a footnote
            if role in ("break", "inline"):
                visit(child)
            if role == "break":
                flush()
            pieces.append(joint if joint and child.getnext() is not None else child.tail or "")

    visit(root)
    flush()
    return paragraphs


def _name(element: etree._Element) -> str:
    return str(element.tag).rpartition("}")[2]


# --- HTML -------------------------------------------------------------------------------------------------------------

_HTML_GONE = _words("script style img input button label noscript svg object meta link")
_HTML_GAP = _words("h1 h2 h3 h4 h5 h6 head header footer nav aside pre dt hr caption thead th title select")
_HTML_BREAK = _words(
    "p div li ul ol dl dd table tbody tr td blockquote section article main body center details summary br"
)
# Per tool that made the pages: DocBook and Publican, Sphinx, LibreOffice.
_HTML_CLASS_GONE = _words(
    "navheader navfooter toc list-of-tables list-of-figures titlepage title docnav url footnotes cmdsynopsis synopsis "
    "longdesc-link programlisting screen literallayout authorgroup legalnotice revhistory copyright "
    "related sphinxsidebar footer clearer headerlink highlight toctree-wrapper index "
    "howtoget relatedtopics bascode bug iconcell"
)
_HTML_ID_GONE = frozenset(("banner", "title", "searchbox"))


def html_paragraphs(page: bytes) -> list[str]:
    """Paragraphs of an HTML page of LibreOffice's help, DocBook, Publican or Sphinx, still to be passed to
    `paragraphs_kept`."""
    if not page.strip():
        return []
    root = html.document_fromstring(page, parser=html.HTMLParser(encoding="utf-8", remove_comments=True))
    content = root.xpath("//*[@id='DisplayArea'] | //div[@role='main']") or root.xpath("//body") or [root]
    return _walk(content[0], _html_role, {})


def _html_role(element: etree._Element) -> Role:
    name = element.tag
    if name in _HTML_GONE or _is_footnote_mark(element) or _is_other_case(element):
        return "drop"
    classes = element.get("class")
    if name in _HTML_GAP or (classes and not _HTML_CLASS_GONE.isdisjoint(classes.split())):
        return "drop" if classes == "headerlink" else "gap"
    if element.get("id") in _HTML_ID_GONE:
        return "gap"
    return "break" if name in _HTML_BREAK else "inline"


def _is_footnote_mark(element: etree._Element) -> bool:
    classes = (element.get("class") or "").split()
    return "footnote" in classes or "footnote-reference" in classes or (element.tag == "sup" and "para" in classes)


def _is_other_case(element: etree._Element) -> bool:
    """LibreOffice's pages hold one text for each system and program and show one: take the default, else the first."""
    parent = element.getparent()
    if parent is None or parent.get("class") not in ("switch", "switchinline"):
        return False
    cases = list(parent)
    default = [case for case in cases if (case.get("id") or "").startswith("default")]
    return element is not (default or cases)[0]


# --- Mallard ----------------------------------------------------------------------------------------------------------

_MALLARD_INLINE = _words(
    "em gui guiseq app key keyseq link span file cmd sys input output var code tt b i if choose when else"
)
_MALLARD_GONE = _words("info title subtitle desc links screen media figure comment thead credit cite")


def mallard_titles(pages: Iterable[bytes]) -> dict[str, str]:
    """The titles of pages and, as `page#section`, of sections: what a link without a text of its own shows."""
    titles = {}
    for page in pages:
        root = _mallard_root(page)
        if root is None:
            continue
        for title in root.iterfind(".//{*}title"):
            owner = title.getparent()
            if owner is not None and _name(owner) in ("page", "section") and owner.get("id"):
                key = owner.get("id", "") if owner is root else f"{root.get('id')}#{owner.get('id')}"
                titles[key] = "".join(title.itertext())
    return titles


def mallard_paragraphs(page: bytes, titles: dict[str, str] | None = None) -> list[str]:
    """Paragraphs of a Mallard page (GNOME's help), still to be passed to `paragraphs_kept`; `titles` of the pages it
    links to come from `mallard_titles`."""
    root = _mallard_root(page)
    if root is None:
        return []
    for link in root.iter("{*}link"):
        if not len(link) and not link.text:
            target = link.get("xref", "")
            known = titles or {}
            link.text = known.get(target) or known.get(target.partition("#")[0]) or link.get("href", "")
    found = _walk(root, _mallard_role, {"keyseq": "+", "guiseq": " - "})
    return [re.sub(r" \(\s*\)", "", paragraph) for paragraph in found]  # what an icon stood in


def _mallard_root(page: bytes) -> etree._Element | None:
    parser = etree.XMLParser(resolve_entities=False, no_network=True, remove_comments=True, recover=True)
    return etree.fromstring(page, parser=parser) if page.strip() else None


def _mallard_role(element: etree._Element) -> Role:
    name = _name(element)
    tests = [value for key, value in element.attrib.items() if key.endswith("test")]
    if any(test.startswith("platform:") for test in tests):  # text for another desktop than the default one
        return "drop"
    if name == "code" and element.getparent() is not None and _name(element.getparent()) != "p":
        return "gap"
    if name in _MALLARD_GONE:
        return "drop" if name == "media" else "gap"
    if name in _MALLARD_INLINE and not (name in ("when", "else", "if", "choose") and element.find("./*") is not None):
        return "inline"
    return "break"

"""The unit every corpus is made of: one document."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """One document: paragraphs joined by a blank line.

    The split a document lies in depends on `id` alone, so an id should name the same thing in every language.
    """

    id: str  # unique within a corpus, e.g. "manpages/ls.1"
    source: str  # the group or genre it comes from, e.g. "manpages"
    text: str
    licence: str  # a short note, e.g. "GPL-2+"

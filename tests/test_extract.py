"""Markup to paragraphs: every trap met in the real packages, on small pages written for the purpose."""

from __future__ import annotations

import pytest

from nrlib.corpora.extract import (
    html_paragraphs,
    is_english,
    is_prose,
    mallard_paragraphs,
    mallard_titles,
    normalise,
    paragraphs_kept,
)
from nrlib.corpora.man_pages import decode, man_paragraphs

LONG = "The garden gate stays shut until the last of the geese has gone home"


def from_html(body: str, language: str = "en") -> list[str]:
    page = f"<html><head><title>{LONG}</title></head><body>{body}</body></html>"
    return paragraphs_kept(html_paragraphs(page.encode()), language)


def from_mallard(body: str, titles: dict[str, str] | None = None) -> list[str]:
    page = f"""<page xmlns="http://projectmallard.org/1.0/" xmlns:if="http://projectmallard.org/if/1.0/" id="geese">
        <info><desc>{LONG}</desc><credit><name>{LONG}</name></credit></info><title>{LONG}</title>{body}</page>"""
    return paragraphs_kept(mallard_paragraphs(page.encode(), titles), "en")


def from_man(body: str, language: str = "en") -> list[str]:
    return paragraphs_kept(man_paragraphs(f'.\\" a comment\n.TH GOOSE 1 2020\n{body}'), language)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  two \n\t words ", "two words"),
        ("attention\u00a0: la\u202fporte", "attention : la porte"),
        ("syl\u00adlable\u200b", "syllable"),
        ("e\u0301te\u0301", "été"),
        ("日本\n語の 文", "日本語の文"),
        ("한국 말", "한국 말"),
        ("a\x07b", "a b"),
        ("read only .", "read only."),
    ],
)
def test_normalise(raw: str, clean: str) -> None:
    assert normalise(raw) == clean


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LONG, True),
        ("Too short for a paragraph", False),
        ("鵞鳥が家に帰るまで庭の門は閉じたままです。", True),
        ("foo(1), bar(2), baz(3), qux(4), quux(5), corge(6), grault(7)", False),
        ("for (i = 0; i < n; i++) { total += prices[i] * counts[i]; }", False),
        ("while (gate and open) {shut(gate)}; otherwise (count[geese]); honk(twice); sleep(long);", False),
        ("goose.Feed(grain: str, optional amount: int = 0): bool or nothing at all", False),
        ("' Counts the geese that have gone home before the gate was shut", False),
        ("Ctrl+Shift+F1234567890 = 0987654321 + 1234567890 + 1234567890", False),
    ],
)
def test_is_prose(text: str, expected: bool) -> None:
    assert is_prose(text) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LONG, True),
        ("Feeds geese when the gate opens", True),
        ("La porte du jardin reste fermée, avec ou sans les oies de la voisine", False),
        ("Das Gartentor bleibt zu, bis die letzte Gans im Stall ist", False),
        ("Het hek is van de boer of van de buurman, it is niet bekend", False),
        ("La commande « the » de l'interpréteur affiche le nombre de lignes lues dans le fichier donné", False),
    ],
)
def test_is_english(text: str, expected: bool) -> None:
    assert is_english(text) is expected


def test_untranslated_paragraphs_go_only_from_translations() -> None:
    french = "La porte du jardin reste fermée jusqu'au retour de la dernière oie."
    assert paragraphs_kept([LONG, french], "fr") == [french]
    assert paragraphs_kept([LONG, french], "en") == [LONG, french]
    russian = "Калитка в сад закрыта, пока последний гусь не вернётся домой."
    assert paragraphs_kept(["Geese eat grain, grass, weeds, seeds, snails", russian], "ru") == [russian]


def test_a_page_repeats_no_paragraph_and_bullets_go() -> None:
    assert paragraphs_kept([f"• {LONG}", LONG], "en") == [LONG]


class TestHtml:
    def test_paragraphs_list_items_and_inline_markup(self) -> None:
        body = f"<p>{LONG}<br/></p><ul><li>{LONG} and<b>&nbsp;the&amp;dogs</b> sleep</li></ul><h2>{LONG} heading</h2>"
        assert from_html(body) == [LONG, f"{LONG} and the&dogs sleep"]

    @pytest.mark.parametrize(
        "body",
        [
            "<pre>{}</pre>",
            "<h1>{}</h1>",
            "<nav><p>{}</p></nav>",
            "<header><p>{}</p></header>",
            "<footer>{}</footer>",
            "<script>{}</script>",
            "<div class='navheader'><p>{}</p></div>",
            "<div class='toc'><ul><li>{}</li></ul></div>",
            "<ul class='docnav top'><li>{}</li></ul>",
            "<div class='legalnotice'><p>{}</p></div>",
            "<div class='titlepage'><p>{}</p></div>",
            "<div class='highlight-sh highlight'><span>{}</span></div>",
            "<div class='sphinxsidebar'><p>{}</p></div>",
            "<dl><dt>{}</dt></dl>",
            "<div class='howtoget'><p>{}</p></div>",
            "<div class='bascode'><code>{}</code></div>",
            "<p id='title'>{}</p>",
            "<!-- {} -->",
        ],
    )
    def test_what_is_not_prose_goes(self, body: str) -> None:
        assert from_html(body.format(LONG)) == []

    def test_a_listing_parts_the_text_around_it(self) -> None:
        assert from_html(f"<div>{LONG}<pre>x = 1</pre>{LONG} too</div>") == [LONG, f"{LONG} too"]

    def test_only_the_content_of_a_page_with_a_marked_content(self) -> None:
        assert from_html(f"<p>{LONG} aside</p><div role='main'><p>{LONG}</p></div>") == [LONG]
        assert from_html(f"<p>{LONG} aside</p><div id='DisplayArea'><p>{LONG}</p></div>") == [LONG]

    def test_one_case_of_a_switch(self) -> None:
        switch = (
            "<span class='switchinline'><span hidden='true' id='MAC1' class='MAC'>Preferences</span>"
            "<span hidden='true' id='default1'>Tools</span></span>"
        )
        assert from_html(f"<p>{LONG}: {switch} menu.</p>") == [f"{LONG}: Tools menu."]
        no_default = switch.replace("default1", "UNIX1")
        assert from_html(f"<p>{LONG}: {no_default} menu.</p>") == [f"{LONG}: Preferences menu."]

    def test_marks_of_footnotes_and_headings_go(self) -> None:
        mark = '<a href="#f1" class="footnote"><sup class="footnote">[8]</sup></a>'
        assert from_html(f"<p>{LONG} {mark}, he said<a class='headerlink'>¶</a>.</p>") == [f"{LONG}, he said."]

    def test_block_inside_a_publican_paragraph(self) -> None:
        body = f"<div class='para'>{LONG}.<div class='url'>→ <a>http://geese.example/a/long/address</a></div></div>"
        assert from_html(body) == [f"{LONG}."]


class TestMallard:
    def test_paragraphs_without_titles_credits_and_code(self) -> None:
        body = f"<p>{LONG}</p><steps><item><p>{LONG} now</p></item></steps><screen>{LONG} on screen</screen>"
        assert from_mallard(body + f"<section><title>{LONG} title</title><code>{LONG}</code></section>") == [
            LONG,
            f"{LONG} now",
        ]

    def test_keys_and_menus_are_joined(self) -> None:
        body = f"<p>{LONG}: <keyseq><key>Ctrl</key><key>G</key></keyseq> or <guiseq><gui>File</gui> <gui>Shut</gui></guiseq>.</p>"
        assert from_mallard(body) == [f"{LONG}: Ctrl+G or File - Shut."]

    def test_a_link_without_text_shows_the_title_of_its_page(self) -> None:
        other = (
            b'<page xmlns="http://projectmallard.org/1.0/" id="ducks"><title>Ducks &amp; <em>drakes</em></title></page>'
        )
        titles = mallard_titles([other])
        assert titles == {"ducks": "Ducks & drakes"}
        assert from_mallard(f'<p>{LONG}, see <link xref="ducks"/>.</p>', titles) == [f"{LONG}, see Ducks & drakes."]
        assert from_mallard(f'<p>{LONG}, see <link xref="ducks#pond"/>.</p>', titles) == [
            f"{LONG}, see Ducks & drakes."
        ]
        assert from_mallard(f'<p>{LONG}, see <link href="http://g.example"/>.</p>') == [
            f"{LONG}, see http://g.example."
        ]

    def test_icons_and_text_for_another_desktop_go(self) -> None:
        body = f'<p>{LONG} (<media src="a.svg"/>) again.</p><p if:test="platform:classic">{LONG} classic</p>'
        body += f'<p if:test="!platform:classic">{LONG} modern</p>'
        assert from_mallard(body) == [f"{LONG} again.", f"{LONG} modern"]

    def test_a_broken_page_is_read_as_far_as_it_goes(self) -> None:
        assert paragraphs_kept(mallard_paragraphs(f"<page><p>{LONG}</p><p>".encode()), "en") == [LONG]
        assert mallard_paragraphs(b"") == html_paragraphs(b" \n") == []


class TestManPages:
    @pytest.mark.parametrize(
        ("roff", "text"),
        [
            (r"\fBbold\fP \fIital\f[R]ic \f(CWmono\fR", "bold italic mono"),
            (r"a\-b \(aqq\(aq \(dqd\[dq] \(lql\(rq", "a-b 'q' \"d\" “l”"),
            (r"\[bu]\& x\|y\^z \s-1SMALL\s0 \s+2BIG\s0", " xyz SMALL BIG"),
            (r"no\ break\~here\0now", "no break here now"),
            (r"back\eslash \\n \[rs]", "back\\slash \\n \\"),
            (r"caf\['e] na\(:ive \[u00E9] \[u0065_0301] \N'233' \[char233]", "café naïve é é é é"),
            (r"\*(lqquoted\*(rq \*R \*[Tm]", "“quoted” ® ™"),
            (r"\h'-04'x\h'+03'\v'1'y \w'abc'z \m[red]r\m[]", "xy z r"),
            (r"one\c", "one"),
            (r"\[ha]\(ti\(ga\(em\[en]", "^~`—–"),
            ("plain", "plain"),
        ],
    )
    def test_escapes(self, roff: str, text: str) -> None:
        assert decode(roff) == text

    def test_paragraphs_fonts_and_comments(self) -> None:
        body = rf"""
.SH DESCRIPTION
.\" a comment that is quite long enough to be mistaken for prose, if it were read
{LONG}, \" a remark
says
.BR goose (1),
and
.I the\-gander
.RB ( -g ).
.PP
{LONG} too.
"""
        assert from_man(body) == [f"{LONG}, says goose(1), and the-gander (-g).", f"{LONG} too."]

    @pytest.mark.parametrize(
        "section",
        ["NAME", "SYNOPSIS", '"SEE ALSO"', "COLOPHON", "TRADUCTION", "ÜBERSETZUNG", "SKŁADNIA", "この文書について", '"ЗВІТИ ПРО ВАДИ"'],
    )  # fmt: skip
    def test_sections_without_prose(self, section: str) -> None:
        assert from_man(f".SH {section}\n{LONG}\n.SH NOTES\n{LONG} too\n") == [f"{LONG} too"]

    def test_a_heading_on_the_next_line(self) -> None:
        assert from_man(f".SH\nSYNOPSIS\n{LONG}\n.SH\nNOTES\n{LONG} too\n") == [f"{LONG} too"]

    @pytest.mark.parametrize(
        ("start", "end"),
        [("nf", "fi"), ("EX", "EE"), ("TS", "TE"), ("SY goose", "YS"), ("Vb 4", "Ve"), ("de xx", ".")],
    )
    def test_code_tables_and_definitions_are_skipped(self, start: str, end: str) -> None:
        assert from_man(f".SH NOTES\n{LONG}\n.{start}\n{LONG} code\n.PP\n{LONG}\n.{end}\n{LONG} after\n") == [
            LONG,
            f"{LONG} after",
        ]

    def test_a_listing_that_is_not_closed_ends_at_the_next_section(self) -> None:
        assert from_man(f".SH EXAMPLE\n.nf\n{LONG} code\n.SH NOTES\n{LONG}\n") == [LONG]

    def test_terms_go_and_their_explanations_stay(self) -> None:
        body = f".SH OPTIONS\n.TP\n.B \\-\\-{LONG}\n{LONG}\n.TP\n\\fB\\-x\\fP \\c\nmore {LONG}\n{LONG} x\n"
        body += f'.IP "the tag {LONG}" 4\n{LONG} y\n.IP \\[bu] 2\n{LONG} z\n'
        assert from_man(body) == [LONG, f"{LONG} x", f"{LONG} y", f"{LONG} z"]

    def test_links_show_their_text_or_else_their_address(self) -> None:
        body = (
            f".SH NOTES\n{LONG}, see\n.UR http://g.example/\nthe pond\n.UE .\nWrite to\n.MT gander@g.example\n.ME .\n"
        )
        assert from_man(body) == [f"{LONG}, see the pond. Write to gander@g.example."]

    def test_conditions(self) -> None:
        body = (
            f".SH NOTES\n.ie n \\{{\\\n{LONG} skipped\n.\\}}\n.el \\{{\\\n.sp -1\n.\\}}\n.if t {LONG} typeset\n{LONG}\n"
        )
        assert from_man(body + f".if n .PP\n{LONG} too\n.ie \\n(.g .ds Aq x\n.el .ds Aq y\n") == [LONG, f"{LONG} too"]

    def test_joined_lines_blank_lines_and_indented_lines(self) -> None:
        body = f".SH NOTES\n{LONG} \\\nand on\nspl\\c\nit\n\n{LONG} too\n {LONG} three\n"
        assert from_man(body) == [f"{LONG} and on split", f"{LONG} too", f"{LONG} three"]

    def test_a_page_that_refers_to_another_and_set_up_before_the_page(self) -> None:
        assert man_paragraphs(".so man3/goose.3\n") == []
        assert man_paragraphs(f"{LONG} set up\n.de Xx\n.TH GOOSE 1\n.SH NOTES\n{LONG}\n") == [LONG]

    def test_mdoc(self) -> None:
        body = f".Dd 2020\n.Dt GOOSE 1\n.Os\n.Sh DESCRIPTION\nThe\n.Nm goose\ncalls\n.Xr gander 2 ,\nwith\n.Fl g\n.Dq grain .\n{LONG}\n"
        body += f".Bd -literal\n{LONG} code\n.Ed\n.Bl -tag\n.It Fl x\n{LONG} x\n.El\n"
        assert paragraphs_kept(man_paragraphs(body), "en") == [
            f"The goose calls gander(2), with -g “grain”. {LONG}",
            f"{LONG} x",
        ]

"""Light pages: rules and scripts that a page uses are kept and come in their order, the rest is gone."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from nrlib.lighten import SHEET, lighten_pages, rules_in_use

PAGE = """<html><head><link href="{up}_static/styles/theme.css?digest=1" rel="stylesheet" />
<link rel="preload" as="script" href="{up}_static/menu.js" />
<link rel="stylesheet" type="text/css" href="{up}_static/book.css?v=2" />
<link rel="icon" href="{up}_static/favicon.svg"/>
<script src="{up}_static/documentation_options.js?v=3"></script>
<script>DOCUMENTATION_OPTIONS.pagename = "a";</script>
<script data-menu="a" src="{up}_static/menu.js"></script>
<script defer src="{up}_static/fontawesome.js"></script>
<script src="{up}searchindex.js"></script></head>
<body class="page"><link rel="stylesheet" href="{up}_static/own.css"><img src="a.png"><img src="{up}b.png"></body></html>"""


def test_pages_share_one_sheet_and_no_script_stands_before_the_text(tmp_path: Path) -> None:
    (tmp_path / "_static" / "styles").mkdir(parents=True)
    (tmp_path / "book").mkdir()
    pages = {tmp_path / "search.html": "", tmp_path / "book" / "a.html": "../"}
    for page, up in pages.items():
        page.write_text(PAGE.format(up=up), encoding="utf-8")
    (tmp_path / "index.html").write_text("<html><head></head></html>", encoding="utf-8")
    (tmp_path / "_static" / "menu.js").write_text("menu.classList.add('opened')", encoding="utf-8")
    (tmp_path / "_static" / "basic.css").write_text(".page { background: url(file.png) }", encoding="utf-8")
    (tmp_path / "_static" / "styles" / "theme.css").write_text(
        '@charset "UTF-8"; @import "../basic.css"; .unused { color: red }', encoding="utf-8"
    )
    (tmp_path / "_static" / "book.css").write_text("/* note */ .opened { color: blue }", encoding="utf-8")
    plt.imsave(tmp_path / "b.png", np.zeros((2, 3)))
    lighten_pages(tmp_path)

    style = (tmp_path / SHEET).read_text(encoding="utf-8")
    assert "url(../file.png)" in style and style.index(".page") < style.index(".opened")
    assert not any(gone in style for gone in ("unused", "@import", "@charset", "note"))
    for page, up in pages.items():
        text = page.read_text(encoding="utf-8")
        head = text.partition("</head>")[0]
        assert head.count('rel="stylesheet"') == 1 and f'href="{up}{SHEET.as_posix()}?v=' in head
        assert f'<link rel="icon" href="{up}_static/favicon.svg"/>' in head and "preload" not in head
        assert f'<script src="{up}_static/documentation_options.js?v=3">' in head  # the next line needs it
        assert f'<script defer data-menu="a" src="{up}_static/menu.js">' in head
        assert "fontawesome" not in text and '<img loading="lazy" src="a.png">' in text
        assert f'<img loading="lazy" width="3" height="2" src="{up}b.png">' in text
        assert f'href="{up}_static/own.css"' in text
        assert ("searchindex.js" in text) is (page.name == "search.html")
    assert (tmp_path / "index.html").read_text(encoding="utf-8") == "<html><head></head></html>"


def test_rules_in_use() -> None:
    style = """:root { --used: 1px; --other: url("a;b"); --through: 2px; --set-by-script: 0 }
    .a, .gone .a, p:not(.gone, :is(.gone)) { margin: var(--used) }
    .b { --end: var(--through); padding: var( --end ) }
    @media (min-width: 1.5em) { .gone { color: red } }
    @media print { .a > #c { color: red } .gone { color: red } }
    @font-face { font-family: f }
    @keyframes k { from { left: 0 } 50.5% { left: 1px } }"""
    kept = "".join(rules_in_use(style, {"a", "b", "c", "--set-by-script"}).split())
    assert kept == (
        ":root{--used:1px;--through:2px;--set-by-script:0}"
        ".a,p:not(.gone,:is(.gone)){margin:var(--used)}"
        ".b{--end:var(--through);padding:var(--end)}"
        "@mediaprint{.a>#c{color:red}}"
        "@font-face{font-family:f}"
        "@keyframesk{from{left:0}50.5%{left:1px}}"
    )

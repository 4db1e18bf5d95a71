"""Roff manual pages (man(7), with what pod2man, docbook and rst2man add, and simple mdoc(7)) to paragraphs of text.

Not a typesetter: requests that shape a page end a paragraph, those that hold code, tables or definitions are skipped
to their end, and the rest are fonts. See groff_man(7), groff_char(7), mdoc(7).
"""

from __future__ import annotations

import re
import unicodedata


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FONT_JOINED = _words("BI BR IB IR RB RI FN")  # arguments follow each other without a space
_FONT_SPACED = _words("B I SM SB R")
_BREAK = _words("PP P LP sp HP RS RE SS br in ti bp Sp Pp Bl El TQ INDENT UNINDENT ce fi EE nop")
_TAGGED = _words("TP TQ")  # the next line is the term that is explained, not prose
_BLOCK_END = {
    "nf": ("fi",), "EX": ("EE",), "Vb": ("Ve",), "TS": ("TE",), "EQ": ("EN",), "PS": ("PE",), "SY": ("YS",),
    "Bd": ("Ed",), "de": (".",), "de1": (".",), "am": (".",), "ig": (".",),
}  # fmt: skip
_MDOC_INLINE = _words("Ar Ad An Cm Dv Em Er Ev Fa Fn Ft Ic Li Nm No Pa Sy Tn Va Vt Fl Xr Dq Sq Aq Op Ql Lk")
_MDOC_QUOTES = {"Dq": "“”", "Sq": "‘’", "Ql": "‘’", "Aq": "<>", "Op": "[]"}

# Sections that hold no prose (name, synopsis, references), or the same sentences on each page (who made, sells,
# mends or translated it), in the languages of the recipes.
SKIPPED_SECTIONS = frozenset(
    name.strip().casefold()
    for names in (
        "NAME|SYNOPSIS|SEE ALSO|COLOPHON|COPYRIGHT|AUTHOR|AUTHORS|REPORTING BUGS|LICENSE|TRANSLATION|LIBRARY|ATTRIBUTES",
        "NOM|VOIR AUSSI|TRADUCTION|AUTEUR|AUTEURS|SIGNALER DES BOGUES|SIGNALEMENTS DE BOGUES|BIBLIOTHÈQUE|ATTRIBUTS",
        "DROIT D’AUTEUR ET LICENCE|LICENCE|DROITS D'AUTEUR|DROITS D’AUTEUR|PAGE D'ACCUEIL|DISPONIBILITÉ",
        "ÜBERSETZUNG|BEZEICHNUNG|ÜBERSICHT|SIEHE AUCH|AUTOR|AUTOREN|FEHLER MELDEN|KOLOPHON|VERFÜGBARKEIT|ATTRIBUTE",
        "TRADUCCIÓN|NOMBRE|SINOPSIS|VÉASE TAMBIÉN|AUTORES|INFORMAR DE ERRORES|COLOFÓN|DISPONIBILIDAD|MARCAS REGISTRADAS",
        "TRADUZIONE|NOME|SINTASSI|VEDERE ANCHE|AUTORE|AUTORI|SEGNALAZIONE BUG|COLOPHON|TRADUÇÃO|SINOPSE|VEJA TAMBÉM",
        "RELATANDO PROBLEMAS|DIREITOS AUTORAIS|VERTALING|NAAM|SAMENVATTING|ZIE OOK|RAPPORTEREN VAN BUGS",
        "TŁUMACZENIE|NAZWA|SKŁADNIA|ZOBACZ TAKŻE|AUTORZY|ZGŁASZANIE BŁĘDÓW|PRAWA AUTORSKIE|DOSTĘPNOŚĆ|ATRYBUTY",
        "PŘEKLAD|POUŽITÍ|JMÉNO|DALŠÍ INFORMACE|HLÁŠENÍ CHYB|TIRÁŽ|OVERSÆTTELSE|NAVN|SE OGSÅ|FEJLRAPPORTER|FORFATTER",
        "FORFATTERE|OPHAVSRET|VAREMÆRKER|ÖVERSÄTTNING|SE ÄVEN|NAMN|RAPPORTERA FEL|UPPHOVSMAN|KÄÄNNÖS|NIMI|YLEISKATSAUS",
        "KATSO MYÖS|TEKIJÄNOIKEUDET|TEKIJÄ|TEKIJÄT|VIRHEISTÄ ILMOITTAMINEN|NÉV|FORDÍTÁS|LÁSD MÉG|ÖSSZEGZÉS|SZERZŐ|SZERZŐI",
        "HIBÁK JELENTÉSE|SZERZŐI JOG|TERJEMAHAN|NAMA|LIHAT JUGA|RINGKASAN|PENGARANG|PENULIS|MELAPORKAN BUG|HAK CIPTA",
        "VEDEȚI ȘI|TRADUCERE|NUME|REZUMAT|RAPORTĂ O EROARE|İSİM|ÇEVİREN|KULLANIM|İLGİLİ BELGELER|YAZAN|GERİBİLDİRİM",
        "TELİF HAKKI|XEM THÊM|TÓM TẮT|TÊN|DỊCH|THÔNG BÁO LỖI|TÁC GIẢ|BẢN QUYỀN|ΣΥΓΓΡΑΦΕΑΣ|ΟΝΟΜΑ|ΜΕΤΑΦΡΑΣΗ|ΔΕΙΤΕ ΕΠΙΣΗΣ",
        "ΑΝΑΦΟΡΑ ΣΦΑΛΜΑΤΟΣ|ПЕРЕВОД|ИМЯ|СИНТАКСИС|ОБЗОР|СМ. ТАКЖЕ|АВТОР|АВТОРЫ|АВТОРСКИЕ ПРАВА|ИНФОРМАЦИЯ ОБ ОШИБКАХ",
        "ПЕРЕКЛАД|НАЗВА|КОРОТКИЙ ОПИС|ДИВ. ТАКОЖ|ЗВІТИ ПРО ВАДИ|АВТОРИ|АВТОРСЬКІ ПРАВА|ДОСТУПНІСТЬ|ТОРГОВА МАРКА",
        "名前|名称|書式|関連項目|この文書について|著者|作者|著作権|バグ報告|入手方法|翻訳者謝辞|跋|概述|总览|總覽|参见|參見",
        "译者|譯者|[中文版最新更新]|[中文版维护人]|[中文版維護人]|NAME 名称|SEE ALSO 参见|SEE ALSO 參見|SYNOPSIS 总览",
        "《中国 Linux 论坛 man 手册页翻译计划》:|《中國 Linux 論壇 man 手冊頁翻譯計劃》:|总览 SYNOPSIS|總覽 SYNOPSIS",
    )
    for name in names.split("|")
)

_SIMPLE = {
    "-": "-",
    "e": "\\",
    "\\": "\\",
    "'": "'",
    "`": "`",
    "~": " ",
    " ": " ",
    "0": " ",
    "t": " ",
    ".": ".",
    "_": "_",
}
_NAMED = {
    "aq": "'", "dq": '"', "lq": "“", "rq": "”", "oq": "‘", "cq": "’", "bq": "‚", "Bq": "„", "Fo": "«", "Fc": "»",
    "fo": "‹", "fc": "›", "em": "—", "en": "–", "hy": "-", "mi": "−", "pl": "+", "eq": "=", "rs": "\\", "ha": "^",
    "ti": "~", "ga": "`", "aa": "´", "at": "@", "sh": "#", "Do": "$", "lB": "[", "rB": "]", "lC": "{", "rC": "}",
    "la": "⟨", "ra": "⟩", "bu": "", "ci": "", "sq": "", "ss": "ß", "ae": "æ", "AE": "Æ", "oe": "œ", "OE": "Œ", "/o": "ø", "/O": "Ø",
    "/l": "ł", "/L": "Ł", "-D": "Ð", "Sd": "ð", "TP": "Þ", "Tp": "þ", "co": "©", "rg": "®", "tm": "™", "ct": "¢",
    "Po": "£", "Eu": "€", "Ye": "¥", "de": "°", "sc": "§", "dg": "†", "ps": "¶", "mu": "×", "di": "÷", "+-": "±",
    "<=": "≤", ">=": "≥", "!=": "≠", "==": "≡", "~=": "≈", "->": "→", "<-": "←", "<>": "↔", "if": "∞", "sr": "√",
    "12": "½", "14": "¼", "34": "¾", "or": "|", "bv": "|", "ba": "|", "ul": "_", "sl": "/", "fm": "′", "sd": "″",
    "mc": "µ", "*a": "α", "*b": "β", "*g": "γ", "*d": "δ", "*e": "ε", "*l": "λ", "*m": "μ", "*p": "π", "*s": "σ",
    "pc": "·", "r!": "¡", "r?": "¿", "ff": "ff", "fi": "fi", "fl": "fl", "**": "*", "lh": "", "rh": "",
}  # fmt: skip
_ACCENTS = {"'": "\u0301", "`": "\u0300", "^": "\u0302", ":": "\u0308", "~": "\u0303", ",": "\u0327", "o": "\u030a",
            "v": "\u030c", '"': "\u030b", "a": "\u0306", "-": "\u0304", ".": "\u0307", "h": "\u0328"}  # fmt: skip
_STRINGS = {
    "lq": "“", "rq": "”", 'L"': "“", 'R"': "”", "C`": '"', "C'": '"', "Aq": "'", "R": "®", "Tm": "™", "-": "-",
    "--": "—", "PI": "π", "C+": "C++", "Gt": ">", "Lt": "<", "Am": "&", "Ba": "|", "la": "⟨", "ra": "⟩", "q": '"',
}  # fmt: skip
_ESCAPE = re.compile(
    r"""\\(?:
      \[(?P<long>[^\]\n]*)\] | \((?P<short>..)
    | \*(?:\[(?P<string>[^\]\n]*)\] | \((?P<string2>..) | (?P<string1>.))
    | N'(?P<code>\d+)' | C'(?P<char>[^']*)'
    | s(?:\[[^\]]*\] | '[^']*' | [-+]?\(\d\d | [-+]?\d)
    | [fFmMnkgVY](?:\[[^\]\n]*\] | [-+]?\(.. | [-+]?.)
    | [hvwlLoxXZDRSHbABz]'[^']*'
    | (?P<simple>.?)
    )""",
    re.VERBOSE,
)
_COMMENT = re.compile(r"""(?<!\\)((?:\\\\)*)\\["#].*""")
_ARGUMENT = re.compile(r'"((?:[^"]|"")*)"?|((?:\\.|[^\s\\])+)', re.DOTALL)
_REQUEST = re.compile(r"[.'][ \t]*(\.|\\\}|[A-Za-z]+[0-9]?)?[ \t]*(.*)", re.DOTALL)


def man_paragraphs(source: str) -> list[str]:
    """Paragraphs of one manual page, still to be passed to `extract.paragraphs_kept`.

    A page that only refers to another (`.so man3/printf.3`) has none.
    """
    lines = re.sub(r"(?<!\\)((?:\\\\)*)\\\n", r"\1", source).split("\n")
    starts = [i for i, line in enumerate(lines) if re.match(r"\.[ \t]*(TH|Dt)\b", line)]
    if not starts:
        return []
    page = _Page()
    for line in lines[starts[0] + 1 :]:  # what stands before is set-up for a typesetter
        page.read(_COMMENT.sub(r"\1", line))
    page.end_paragraph()
    return page.paragraphs


def decode(text: str) -> str:
    """Replace roff's escape sequences by the characters they stand for; fonts, sizes and motions vanish."""
    return _ESCAPE.sub(_decode_one, text) if "\\" in text else text


def _decode_one(match: re.Match[str]) -> str:
    name = match["long"] or match["short"] or match["char"]
    string = match["string"] or match["string2"] or match["string1"]
    if name:
        return _character(name)
    if string:
        return _STRINGS.get(string, "")
    if match["code"]:
        return chr(int(match["code"]))
    return _SIMPLE.get(match["simple"] or "", "")


def _character(name: str) -> str:
    if name in _NAMED:
        return _NAMED[name]
    if re.fullmatch(r"u[0-9A-F]{4,6}(_[0-9A-F]{4,6})*", name):
        return unicodedata.normalize("NFC", "".join(chr(int(part, 16)) for part in name[1:].split("_")))
    if re.fullmatch(r"char\d+", name):
        return chr(int(name[4:]))
    if len(name) == 2 and name[0] in _ACCENTS:
        return unicodedata.normalize("NFC", name[1] + _ACCENTS[name[0]])
    return ""


def _arguments(text: str) -> list[str]:
    return [(quoted.replace('""', '"') if quoted or not plain else plain) for quoted, plain in _ARGUMENT.findall(text)]


class _Page:
    """The state of a page while it is read line by line; finished paragraphs collect in `paragraphs`."""

    def __init__(self) -> None:
        self.paragraphs: list[str] = []
        self._words = ""
        self._is_joined = False  # the last line ended in \c: no space before the next
        self._is_tag_next = False
        self._is_heading_next = False
        self._is_section_kept = True
        self._block_end: tuple[str, ...] = ()
        self._is_in_skipped_case = False
        self._address = ""
        self._n_before_link = 0

    def read(self, line: str) -> None:
        request = _REQUEST.match(line) if line[:1] in (".", "'") else None
        name, rest = (request[1] or "", request[2]) if request else ("", line)
        if self._is_in_skipped_case:
            self._is_in_skipped_case = "\\}" not in line
        elif self._block_end:
            if name in self._block_end or (name in ("SH", "Sh") and "." not in self._block_end):
                self._block_end = ()
                if name in ("SH", "Sh"):
                    self._section(rest)
        elif request:
            self._request(name, rest)
        elif not line.strip() or line[0] in " \t":
            self.end_paragraph()
            if line.strip():
                self._text(line)
        else:
            self._text(line)

    def end_paragraph(self) -> None:
        if self._words.strip() and self._is_section_kept:
            self.paragraphs.append(self._words)
        self._words = ""

    def _text(self, text: str) -> None:
        if self._is_heading_next:
            self._is_heading_next = False
            self._section(text)
            return
        if self._is_tag_next:
            self._is_tag_next = text.endswith("\\c")
            return
        glue = "" if self._is_joined or not self._words else " "
        self._is_joined = text.endswith("\\c")
        self._words += glue + decode(text)

    def _section(self, heading: str) -> None:
        self.end_paragraph()
        self._is_tag_next = False
        title = decode(" ".join(_arguments(heading))).strip()
        self._is_heading_next = not title
        self._is_section_kept = " ".join(title.split()).casefold() not in SKIPPED_SECTIONS

    def _request(self, name: str, rest: str) -> None:
        if name in ("SH", "Sh"):
            self._section(rest)
        elif name in _BLOCK_END:
            self.end_paragraph()
            self._block_end = _BLOCK_END[name]
        elif name in ("TP", "IP", "It", *_BREAK):
            self.end_paragraph()
            self._is_tag_next = name in _TAGGED or (name == "SS" and not rest)
        elif name in _FONT_JOINED:
            self._text("".join(_arguments(rest)))
        elif name in _FONT_SPACED:
            self._text(" ".join(_arguments(rest)))
        elif name in ("UR", "MT", "UE", "ME", "URL", "MTO"):
            self._link(name, _arguments(rest))
        elif name == "q":  # the pages of the time zone database define it
            self._text("“" + "”".join([*_arguments(rest), "", ""][:2]))
        elif name in ("if", "ie", "el"):
            self._condition(name, rest)
        elif name in _MDOC_INLINE:
            self._text(_mdoc_text([name, *_arguments(rest)]))

    def _link(self, name: str, arguments: list[str]) -> None:
        first = arguments[0] if arguments else ""
        if name in ("UR", "MT"):
            self._address, self._n_before_link = first, len(self._words)
        elif name in ("UE", "ME"):  # a link without a text of its own shows its address
            is_bare = not self._words[self._n_before_link :].strip()
            self._words += decode((" " + self._address if is_bare else "") + first)
        else:
            self._text("".join(arguments[1:]))

    def _condition(self, name: str, rest: str) -> None:
        # Text is made for a terminal (n), not for a typesetter (t); of two cases the second is the plain one.
        is_skipped = name == "ie" or (name == "if" and rest.lstrip().startswith(("t", "!n", "\\n")))
        if "\\{" in rest:
            self._is_in_skipped_case = is_skipped and "\\}" not in rest
        elif not is_skipped:
            self.read(rest.partition(" ")[2] if name == "if" else rest)


def _mdoc_text(words: list[str]) -> str:
    """The words of an mdoc line: `Xr fork 2 ,` → `fork(2),`; `Fl a` → `-a`."""
    text, close = "", ""
    for i, word in enumerate(words):
        if word in _MDOC_QUOTES:
            text += (" " if text else "") + _MDOC_QUOTES[word][0]
            close = _MDOC_QUOTES[word][1] + close
        elif word in _MDOC_INLINE or word == "Ns":
            continue
        elif re.fullmatch(r"[.,:;!?)\]]+", word):
            text, close = text + close + word, ""
        else:
            previous = words[i - 1] if i else ""
            is_section = i >= 2 and words[i - 2] == "Xr"
            word = f"({word})" if is_section else f"-{word}" if previous == "Fl" else word
            is_glued = not text or is_section or previous == "Ns" or text[-1] in "“‘<[("
            text += word if is_glued else " " + word
    return text + close

r"""Answers as text in a normal form: one spelling for each sign, no markup.

The text is read once, token by token, so that the time is linear in its length. Nothing that may
decide an answer is dropped: words stay, as `\text{…}` or bare, and so does a blank between two
letters or digits.
"""

from __future__ import annotations

import html
import re
import unicodedata
from functools import lru_cache


def words(text: str) -> list[str]:
    """The words of a table."""
    return text.split()


SYMBOLS = {
    "π": "pi", "∞": "infty", "×": "times", "⋅": "cdot", "·": "cdot", "∙": "cdot", "≤": "le",
    "≥": "ge", "⩽": "le", "⩾": "ge", "≠": "ne", "∅": "emptyset", "∪": "cup", "∩": "cap",
    "∈": "in", "±": "pm", "∓": "mp", "≈": "approx", "≡": "equiv", "∧": "land", "∨": "lor",
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "θ": "theta",
    "λ": "lambda", "μ": "mu", "µ": "mu", "ρ": "rho", "σ": "sigma", "τ": "tau", "φ": "phi",
    "ω": "omega", "Δ": "Delta", "Ω": "Omega", "ℝ": "reals", "√": "sqrt", "…": "dots",
    "⋯": "dots", "∣": "mid", "⌊": "lfloor", "⌋": "rfloor", "⌈": "lceil", "⌉": "rceil",
}  # fmt: skip
CHARACTERS = {ord(character): f"\\{name} " for character, name in SYMBOLS.items()} | {
    ord("−"): "-", ord("–"): "-", ord("—"): "-", ord("÷"): "/", ord("⁄"): "/", ord("∕"): "/",
    ord("∶"): ":", ord("’"): "'", ord("‘"): "'", ord("“"): '"', ord("”"): '"', ord("′"): "'",
    ord("″"): "''", ord("°"): "^\\circ ", ord("、"): ", ", ord("，"): ", ", ord("。"): ".",
    ord("٫"): ".", ord("٬"): ",", ord("\N{NARROW NO-BREAK SPACE}"): " ",
}  # fmt: skip
SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))
SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))

RENAMED = {
    "dfrac": r"\frac", "tfrac": r"\frac", "cfrac": r"\frac", "xfrac": r"\frac",
    "nicefrac": r"\frac", "sfrac": r"\frac", "flatfrac": r"\frac", "dbinom": r"\binom",
    "tbinom": r"\binom", "leq": r"\le", "leqslant": r"\le", "leqq": r"\le", "geq": r"\ge",
    "geqslant": r"\ge", "geqq": r"\ge", "neq": r"\ne", "lt": "<", "gt": ">", "cdot": "*",
    "times": "*", "ast": "*", "div": "/", "varnothing": r"\emptyset", "simeq": r"\approx",
    "thickapprox": r"\approx", "sim": r"\approx", "degree": r"^\circ", "deg": r"^\circ",
    "degrees": r"^\circ",
    "lvert": "|", "rvert": "|", "vert": "|", "lbrace": r"\{", "rbrace": r"\}", "lbrack": "[",
    "rbrack": "]", "lparen": "(", "rparen": ")", "colon": ":",
    "langle": "(", "rangle": ")", "ratio": ":", "ldots": r"\dots",
    "cdots": r"\dots", "dotsc": r"\dots", "dotsb": r"\dots", "cr": r"\\", "newline": r"\\",
    "wedge": r"\land", "vee": r"\lor", "prime": "'", "longrightarrow": r"\to",
    "rightarrow": r"\to", "quad": r"\quad ", "qquad": r"\quad ", "reals": r"\mathbb{R}",
    "euro": "€", "AA": "Å", "textdegree": r"^\circ",
    "pounds": "£", "tg": r"\tan", "ctg": r"\cot", "arctg": r"\arctan",
    "percent": "%", "lnot": r"\neg", "thinspace": " ", "nobreakspace": " ", "space": " ",
    "enspace": " ", "implies": r"\to", "Rightarrow": r"\to", "mod": r"\bmod", "bf": " ",
    "rm": " ", "it": " ", "varepsilon": r"\epsilon", "varphi": r"\phi", "ne": r"\ne",
}  # fmt: skip
"""Commands that mean the same as others."""
DROPPED = frozenset(
    words(
        """left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr bigm
        displaystyle textstyle scriptstyle limits nolimits middle mathstrut strut relax
        mathbf boldsymbol bm pmb mathit ensuremath mathsf mathtt mathcal mathnormal
        underline overbrace underbrace boxed fbox hfill noindent centering large Large small
        normalsize !"""
    )
)  # fmt: skip
"""Commands that change how an answer looks and not what it says."""
FONTS = frozenset(
    words("""text textbf textit textrm textnormal textsf texttt textup emph mbox hbox mathrm""")
)
ENVIRONMENTS = re.compile(r"[bBpP]?(?:small)?(?:matrix|array)|array")
LAYOUT = frozenset(
    words("""align align* aligned gathered gather gather* equation equation* split cases""")
)
FUNCTION_NAMES = frozenset(
    words(
        """sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log exp max min gcd lcm
        sqrt pi infty"""
    )
)
SPELT = {"infinity": "infty", "inf": "infty", "oo": "infty", "asin": "arcsin", "acos": "arccos",
         "atan": "arctan"}  # fmt: skip
CONNECTIVES = {"and": r"\land ", "or": r"\lor ", "&": r"\land "}

_TOKEN = re.compile(r"\\[A-Za-z]+\*?|\\.|[A-Za-z]+|\d+|\s+|.", re.DOTALL)
_RUN = re.compile(r"(?<![\\A-Za-z])([A-Za-z]+(?: [A-Za-z]+)*)(?![A-Za-z])")
_MARKUP = re.compile(r"<su([bp])>(\w{1,20})</su[bp]>", re.IGNORECASE)
_DEFINITE = re.compile(r"[^\W\d_]", re.UNICODE)
_BOLD_VECTOR = re.compile(
    r"\\(?:mathbf|boldsymbol|bm|hat|vec|widehat)\s*\{\s*(?:\\mathbf\s*\{\s*)?"
    r"\\?([ijk])(?:math)?\s*\}(?:\s*\})?"
)
_OPERATORS = (
    ("<=", r"\le "), ("=<", r"\le "), (">=", r"\ge "), ("!=", r"\ne "), ("==", "="),
    ("+/-", r"\pm "), ("...", r"\dots "), ("**", "^"),
)  # fmt: skip
_SEPARATE = re.compile(r"[A-Za-z0-9\x80-\U0010ffff]")


@lru_cache(maxsize=4096)
def normalise(text: str) -> str:
    """An answer in its normal form; never raises, takes time linear in the text.

    Args:
        text: An answer as it stands in a box, or a gold answer.
    """
    if text.isdigit() and text.isascii():
        return text.lstrip("0") or "0"
    text = _plain_characters(text)
    text = re.sub(r"(?<![\w)\]}*])\*\*([^*]+)\*\*(?![\w(*])", r"\1", text)
    text = text.replace("{,}", ",").replace(",\\!", "\N{NO-BREAK SPACE}").replace("\\$", "$")
    text = re.sub("\N{NO-BREAK SPACE}[ ]?", "\N{NO-BREAK SPACE}", text)
    text = re.sub("(?<=[0-9])\N{NO-BREAK SPACE}(?=[0-9]{3})", "", text)
    text = text.replace("\N{NO-BREAK SPACE}", ", ")
    if "\\begin" not in text:
        # Escaped once too often, as JSON in JSON: \\frac for \frac.
        text = re.sub(r"\\\\(?=(?:[a-z]{2,}|[{}]))", r"\\", text)
    text = re.sub(r"(?<=\d)'(?=\d{3}(?!\d))", "", text)
    for written, sign in _OPERATORS:
        text = text.replace(written, sign)
    return _Writer(_BOLD_VECTOR.sub(r"\\unitvector\1 ", text)).written()


def _plain_characters(text: str) -> str:
    """Characters that a formula is typed in: ASCII digits, LaTeX for signs, no invisible ones."""
    text = text.replace("\x00", "")
    if "&" in text and ";" in text:
        text = html.unescape(text.replace("&nbsp;", " "))
    if "<" in text:
        text = _MARKUP.sub(lambda m: ("_" if m[1] in "bB" else "^") + "{" + m[2] + "}", text)
    if text.isascii():
        return text
    text = re.sub(
        "(?<=[0-9])?([½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞])",
        lambda match: " " + unicodedata.normalize("NFKC", match[1]).replace("⁄", "/"),
        text,
    )
    text = re.sub(r"∛\s{0,9}(\d+|[A-Za-z](?![A-Za-z]))", r"\\sqrt[3]{\1}", text)
    text = re.sub(r"√\s{0,9}(\d+|[A-Za-z](?![A-Za-z]))", r"\\sqrt{\1}", text)
    for table, mark in ((SUPERSCRIPTS, "^"), (SUBSCRIPTS, "_")):
        characters = "".join(table)
        text = re.sub(
            f"[{characters}]+",
            lambda match, t=table, m=mark: m + "{" + "".join(t[c] for c in match.group()) + "}",
            text,
        )
    text = unicodedata.normalize("NFKC", text.translate(CHARACTERS)).translate(CHARACTERS)
    return "".join(
        str(unicodedata.digit(character))
        if not character.isascii() and unicodedata.category(character) == "Nd"
        else character
        for character in text
        if unicodedata.category(character) not in ("Cf", "Cs", "Co")
    )


class _Writer:
    """Reads the tokens of a text once and writes its normal form."""

    def __init__(self, text: str):
        self.tokens = _TOKEN.findall(text)
        self.at = 0
        self.out: list[str] = []
        self.blank = False

    def written(self) -> str:
        while self.at < len(self.tokens):
            token = self.tokens[self.at]
            self.at += 1
            if token.isspace() or token in ("~", "$"):
                self.blank = True
            elif token[0] == "\\" and len(token) > 1:
                self._command(token)
            elif token.isascii() and token.isalpha():
                self._word(token)
            else:
                self._put(token)
        return _tidy("".join(self.out))

    def _put(self, piece: str) -> None:
        if not piece:
            return
        last = self.out[-1] if self.out else ""
        joins = self.blank or (last[:1] == "\\" and last[-1:].isalpha() and piece[0].isalpha())
        if joins and last and _SEPARATE.match(last[-1]) and _SEPARATE.match(piece[0]):
            self.out.append(" ")
        self.blank = False
        self.out.append(piece)

    def _word(self, word: str) -> None:
        name = SPELT.get(word, word)
        if name in FUNCTION_NAMES:
            self._put("\\" + name)
        elif word.lower() in CONNECTIVES and self.out:
            self._put(CONNECTIVES[word.lower()])
            self.blank = False
        elif word.lower() in ("degree", "degrees"):
            self._put(r"^\circ")
        elif word.lower() in ("percent", "percentage", "pct"):
            self._put("%")
        elif word in ("x", "X") and self._stands_for_times():
            self._put("*")
        else:
            self._put(word)

    def _stands_for_times(self) -> bool:
        """Whether an x means "times", as in 1 x 10^3 and 1x10^3."""
        if not self.out or not self.out[-1][-1:].isdigit():
            return False
        following = "".join(self.tokens[self.at : self.at + 3])
        spaced = self.blank and following[:1].isspace() and following[1:2].isdigit()
        return spaced or following.startswith("10^")

    def _command(self, token: str) -> None:
        name = token[1:].rstrip("*")
        if name in ("(", ")", "]", "[") or name in DROPPED:
            return
        if name in FONTS:
            self._text()
        elif name in (",", ";", ":", ">", " ", "\n", "\t"):
            self.blank = True
        elif name in ("textcolor", "colorbox"):
            self._group()
        elif name in ("color", "hspace", "vspace", "label", "tag", "phantom", "hphantom"):
            self._group()
            self.blank = True
        elif name in ("begin", "end"):
            self._environment(name)
        elif name in ("operatorname", "mathop"):
            group = self._group()
            self._put("\\" + group if group in FUNCTION_NAMES else f"\\text{{{group}}}")
        elif name == "%":
            self._put("%")
        elif name == "&":
            self._put(r"\land ")
        else:
            renamed = RENAMED.get(name, token.rstrip("*") if len(token) > 2 else token)
            if renamed == " ":
                self.blank = True
            else:
                self._put(renamed)

    def _group(self) -> str:
        """The raw content of the group that follows, or the next token; skips it."""
        while self.at < len(self.tokens) and self.tokens[self.at].isspace():
            self.at += 1
        if self.at >= len(self.tokens):
            return ""
        start, depth = self.at, 0
        while self.at < len(self.tokens):
            token = self.tokens[self.at]
            self.at += 1
            depth += (token == "{") - (token == "}")
            if depth <= 0:
                break
        inside = self.tokens[start : self.at]
        return "".join(inside[1:-1] if inside[0] == "{" and inside[-1] == "}" else inside)

    def _holds_fonts(self) -> bool:
        """Whether the group that follows has a font in it; looks no further than to the first."""
        depth = 0
        for index in range(self.at, len(self.tokens)):
            token = self.tokens[index]
            depth += (token == "{") - (token == "}")
            if token[1:].rstrip("*") in FONTS and token[0] == "\\":
                return True
            if depth <= 0 and not token.isspace():
                return False
        return False

    def _text(self) -> None:
        if self._holds_fonts():
            return  # Text in text: what is inside is read as it comes.
        content = self._group()
        plain = " ".join(content.replace("~", " ").split())
        connective = CONNECTIVES.get(plain.strip(" ,").lower())
        if connective:
            self._put(connective)
        elif not _DEFINITE.search(plain) or "\\" in plain or "$" in plain:
            # No words in it, or formulas among them.
            if "$" not in plain and "\\(" not in plain:
                plain = _RUN.sub(r"\\text{\1}", plain)
            self.tokens[self.at : self.at] = _TOKEN.findall(plain)
            self.blank = self.blank or content[:1].isspace()
        elif plain.lower() in ("percent", "percentage", "pct"):
            self._put("%")
        elif plain.lower() in ("degree", "degrees"):
            self._put(r"^\circ")
        elif plain:
            self._put(f"\\text{{{plain}}}")

    def _environment(self, name: str) -> None:
        kind = self._group().strip()
        if ENVIRONMENTS.fullmatch(kind):
            kind = kind if kind in ("vmatrix", "Vmatrix") else "pmatrix"
            if name == "begin" and self.at < len(self.tokens) and self.tokens[self.at] == "{":
                self._group()  # The columns of an array.
            self._put(f"\\{name}{{{kind}}}")
        elif kind not in LAYOUT:
            self._put(f"\\{name}{{{kind}}}")


_TIDY: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\sqrt ?(\d|[A-Za-z](?![A-Za-z]))", r"\\sqrt{\1}"),
        (r"\\sqrt\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\frac ?(\d) ?(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac ?(\d)\{", r"\\frac{\1}{"),
        (r"\\frac(\{[^{}]*\})(\d)", r"\\frac\1{\2}"),
        (r"([_^])\{(\w)\}(?!\d)", r"\1\2"),
        (r"\^\{\\circ\}", r"^\\circ"),
        (r"\\\{\\\}", r"\\emptyset"),
        (r"^(?:[,;]|\\quad )+|(?:[.,;:]|\\quad ?)+$", ""),
    )
)


def _tidy(text: str) -> str:
    text = text.strip()
    if "\\begin{pmatrix}" not in text and "\\begin{vmatrix}" not in text:
        text = text.replace("&", "")
    for pattern, replacement in _TIDY:
        text = pattern.sub(replacement, text)
    text = text.rstrip("\\").strip() if text.endswith("\\") else text
    inner = unwrapped(text)
    return inner if inner == text else _tidy(inner)


def unwrapped(text: str, pair: str = "{}", kept: int = 0) -> str:
    """The text without the brackets around all of it, but for so many pairs of them."""
    opening, closing = pair
    outer = 0
    while outer < len(text) // 2 and text[outer] == opening and text[-1 - outer] == closing:
        outer += 1
    if outer <= kept:
        return text
    # How deep the inside falls below its own ground: so many of the outer brackets are no pair.
    depth = lowest = 0
    previous = ""
    for character in text[outer : len(text) - outer]:
        if previous != "\\":
            depth += (character == opening) - (character == closing)
        previous = character
        lowest = min(lowest, depth)
    pairs = outer + lowest - kept
    return text[pairs : len(text) - pairs] if pairs > 0 else text

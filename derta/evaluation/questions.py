r"""Questions with one right answer: find the final answer of a text, and compare it.

The reference decides the kind of the question. A letter, alone or before the choice's text ("B",
"(B)", "B. twelve"), asks for a choice, as in MMLU. Any other reference must hold a number, as in
GSM8K.

The *number* of a text is the first of these that exists: the last number in the last \boxed{}; the
first number after "####"; the last number of the text. Signs, commas between thousands, decimals
and fractions count, in plain text and in LaTeX. Currencies, percent signs, units and exponents do
not: "$1,200.00" is 1200, and "1\frac{1}{2} cm^2" is 1.5.

The *choice* of a text is the first of these that exists: the last letter in \boxed{}, alone or
before the choice's text; the last letter after "answer", "option" or "choice" ("the answer is (B)",
"Answer: **B**"); the letter at the start of the text, alone or before a punctuation mark ("B", "B)
it melts"); the last letter in brackets or between asterisks; the last single capital. "A" and "I"
before a lowercase word are words, not choices.
"""

from __future__ import annotations

import re
from fractions import Fraction

_FRACTION = r"\\[cdt]?frac\s*(?P<top>\{\s*-?\d+\s*\}|\d)\s*(?P<bottom>\{\s*0*[1-9]\d*\s*\}|[1-9])"
_NUMBER = re.compile(
    r"(?P<minus>(?<![\w)\]}])[-\u2212](?=[$€£]?(?:[\d.]|\\[cdt]?frac)))?[$€£]?"
    rf"(?:(?:(?<!\w)(?P<whole>\d+) ?)?{_FRACTION}|"
    r"(?<!\w)(?<!\d\.)(?<!\^)(?<!\^\{)"
    r"(?P<value>\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|\d+(?:\.\d+)?|(?<!\.)\.\d+)"
    r"(?:/(?P<below>0*[1-9]\d*))?)"
)
_BOX = re.compile(r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
_LATEX_COMMA = re.compile(r"(?<=\d)(?:\{,\}|,\\!|\\,)(?=\d{3})")
_REFERENCE = re.compile(r"\s*\(?([A-Za-z])\)?\s*(?:[.:)]\s.*)?[.]?\s*", re.DOTALL)
_WRAPPED = r"[*_(\[{\\$\"'`]*"
# The text after "A" and "I" if they are words, not choices followed by a reason.
_GOES_ON = r"\s(?!\s*(?:and|as|because|but|for|since|so|which)\b)\s*[a-z]"
_CHOICES = (
    re.compile(r"\\boxed\s*\{(?:\\\w+)?[\s({\[]*([A-Z])(?=[)}\]]|[.:]\s)"),
    re.compile(
        r"(?i:\b(?:answer|option|choice)(?:\s+is|\s*:|\s*=)+\s*:?\s*(?:(?:option|choice)\s+)?)"
        rf"{_WRAPPED}(?:([A-Z])(?![\w'])(?<!\b[AI](?={_GOES_ON}))|([a-z])(?=\s*(?:[.,;)*\]\n]|$)))"
    ),
    re.compile(rf"\A\s*{_WRAPPED}([A-Z])(?=\s*(?:[.,:;)*\]}}\n]|$))"),
    re.compile(r"(?:\(|\[|\{|\*\*)([A-Z])(?:\)|\]|\}|\*\*)"),
    re.compile(r"(?<![\w'])([A-Z])(?![\w'])(?<!\bA(?=\s[a-z]))(?<!\bI(?=\s[a-z]))"),
)


def is_right(answer: str, reference: str) -> bool:
    """Compare the final answer with that of the reference, by the rules above.

    Raises:
        ValueError: the reference is neither a letter nor holds a number.
    """
    if choice := _REFERENCE.fullmatch(reference):
        return find_choice(answer) == choice[1].upper()
    right = find_number(reference)
    if right is None:
        raise ValueError("response: expected a number or a letter, got neither")
    return find_number(answer) == right


def find_number(text: str) -> Fraction | None:
    """Return the final number of a text."""
    text = _LATEX_COMMA.sub(",", text).replace(r"\$", "$")
    *_, boxed = "", *_BOX.findall(text)
    _, _, marked = text.partition("####")
    found = _last_number(boxed) or _NUMBER.search(marked) or _last_number(text)
    if found is None:
        return None
    try:
        if found["bottom"]:
            top, bottom = (int(found[part].strip("{} ")) for part in ("top", "bottom"))
            value = int(found["whole"] or 0) + Fraction(top, bottom)
        else:
            value = Fraction(found["value"].replace(",", "")) / int(found["below"] or 1)
    except ValueError:  # thousands of digits, from a model that repeats itself
        return None
    return -value if found["minus"] else value


def _last_number(text: str) -> re.Match[str] | None:
    *_, last = None, *_NUMBER.finditer(text)
    return last


def find_choice(text: str) -> str | None:
    """Return the final choice of a text, as a capital letter."""
    for rule in _CHOICES:
        if found := rule.findall(text):
            last = found[-1]
            return "".join(last).upper()
    return None

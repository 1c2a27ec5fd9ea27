"""Questions with one right answer: what a model's answer comes to, and whether it is the right one.

The reference tells the kind of the question. A letter, alone or before the choice's text ("B",
"(B)", "B. twelve"), asks for a choice, as in MMLU; anything else must hold a number, as in GSM8K.

A *number* is the first one after "####" or, where there is none, the last one of the text: signs,
commas between thousands, decimals and fractions count, currencies, per cent and units do not, so
that "$1,200.00" is 1200.

A *choice* is, whichever is found first: the last letter that "answer", "option" or "choice"
introduces ("the answer is (B)", "Answer: **B**"); the letter that the text begins with, alone or
before a mark ("B", "B) it melts"); the last letter in brackets or between asterisks; the last
capital that stands alone. "A" and "I" before a word in small letters are words themselves.
"""

from __future__ import annotations

import re
from fractions import Fraction

_NUMBER = re.compile(
    r"(?P<minus>(?<![\w)\]}])[-\u2212](?=[$€£]?[\d.]))?[$€£]?"
    r"(?<!\w)(?<!\d\.)(?P<value>\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|\d+(?:\.\d+)?|(?<!\.)\.\d+)"
    r"(?:/(?P<below>0*[1-9]\d*))?"
)
_REFERENCE = re.compile(r"\s*\(?([A-Za-z])\)?\s*(?:[.:)]\s.*)?[.]?\s*", re.DOTALL)
_WRAPPED = r"[*_(\[{\\$\"'`]*"
# What follows "A" and "I" where they are words, but not where they are a choice with its reason.
_GOES_ON = r"\s(?!\s*(?:and|as|because|but|for|since|so|which)\b)\s*[a-z]"
_CHOICES = (
    re.compile(
        r"(?i:\b(?:answer|option|choice)(?:\s+is|\s*:|\s*=)+\s*:?\s*(?:(?:option|choice)\s+)?)"
        rf"{_WRAPPED}(?:([A-Z])(?![\w'])(?<!\b[AI](?={_GOES_ON}))|([a-z])(?=\s*(?:[.,;)*\]\n]|$)))"
    ),
    re.compile(rf"\A\s*{_WRAPPED}([A-Z])(?=\s*(?:[.,:;)*\]}}\n]|$))"),
    re.compile(r"(?:\(|\[|\{|\*\*)([A-Z])(?:\)|\]|\}|\*\*)"),
    re.compile(r"(?<![\w'])([A-Z])(?![\w'])(?<!\bA(?=\s[a-z]))(?<!\bI(?=\s[a-z]))"),
)


def is_right(answer: str, reference: str) -> bool:
    """Whether an answer comes to the same as the reference, see the rules above.

    Raises:
        ValueError: the reference is neither a letter nor holds a number.
    """
    if choice := _REFERENCE.fullmatch(reference):
        return find_choice(answer) == choice[1].upper()
    right = find_number(reference)
    if right is None:
        raise ValueError("response: has no final number and is no letter, expected either")
    return find_number(answer) == right


def find_number(text: str) -> Fraction | None:
    """The number that a text comes to."""
    _, marked, after = text.partition("####")
    found = _NUMBER.search(after) if marked else None
    if found is None:
        for found in _NUMBER.finditer(text):  # noqa: B007 (the last is wanted)
            pass
    if found is None:
        return None
    value = Fraction(found["value"].replace(",", "")) / int(found["below"] or 1)
    return -value if found["minus"] else value


def find_choice(text: str) -> str | None:
    """The letter, a capital, that a text chooses."""
    for rule in _CHOICES:
        if found := rule.findall(text):
            last = found[-1]
            return "".join(last).upper()
    return None

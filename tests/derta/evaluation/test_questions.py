"""Final answers are found where people write them, and nowhere else."""

from __future__ import annotations

from fractions import Fraction

import pytest

from derta.evaluation.questions import find_choice, find_number, is_right


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("72", 72),
        ("He has 3 boxes of 24, so 3 * 24 = 72.", 72),
        ("3 x 24 = <<3*24=72>>72 apples\n#### 72", 72),
        ("#### 1,234,567\nQuestion 2: how many are 5 and 6?", 1234567),
        ("There are 8 of them ####", 8),
        ("It costs $1,200.50.", Fraction("1200.5")),
        ("That is -$5", -5),
        ("The balance is $-5.00 now", -5),
        ("It falls to \u22123 degrees", -3),
        ("16-4=12", 12),
        ("We are left with 16-4", 4),
        ("- 72", 72),
        ("roughly ...72", 72),
        ("a share of .5", Fraction(1, 2)),
        ("that is 3/4", Fraction(3, 4)),
        ("7/0", 0),
        (r"\boxed{18}", 18),
        ("**18** km", 18),
        ("18km, or 18%", 18),
        ("24/2", 12),
        ("in 1,2345 steps", 2345),
        ("as model X3 says, 9", 9),
        ("release 1.2.3", Fraction("1.2")),
        ("twelve", None),
        ("", None),
    ],
)
def test_the_final_number_is_found(text: str, number: Fraction | None) -> None:
    assert find_number(text) == number


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B. It melts.", "B"),
        ("B) A metal does", "B"),
        ("**B**", "B"),
        ("The answer is B.", "B"),
        ("The correct answer is: (B) ice", "B"),
        ("Answer: **B**\nA is wrong since it boils.", "B"),
        ("A and C are wrong. I think the answer is option D", "D"),
        ("the answer is b", "B"),
        ("At first the answer is A, but no: the answer is C.", "C"),
        ("The answer is a metal, that is (D)", "D"),
        ("The answer is A metal such as iron: (D)", "D"),
        ("The answer is B because (C) is wrong", "B"),
        ("The answer is A because B is too large.", "A"),
        ("The correct choice is (C), since (A) and (B) melt", "C"),
        ("Answer: A dog, or rather D", "D"),
        ("A metal expands, I believe, so C", "C"),
        ("A metal expands in the heat", None),
        ("I would say B", "B"),
        ("It can only be D", "D"),
        (r"$\boxed{C}$", "C"),
        ("It melts", None),
        ("", None),
    ],
)
def test_the_chosen_letter_is_found(text: str, letter: str | None) -> None:
    assert find_choice(text) == letter


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("so it is 72.00 dollars", "24 * 3 = 72\n#### 72", True),
        ("1200", "$1,200", True),
        ("so it is 71", "72", False),
        ("I cannot help with that.", "72", False),
        ("(B)", "B", True),
        ("(B)", "b. It melts at 5", True),
        ("(A)", "(B)", False),
        ("5", "B) It melts", False),
    ],
)
def test_the_reference_says_what_is_asked_for(answer: str, reference: str, right: bool) -> None:
    assert is_right(answer, reference) is right


def test_a_reference_that_is_neither_number_nor_letter_is_refused() -> None:
    with pytest.raises(ValueError, match="response: has no final number and is no letter"):
        is_right("72", "It melts")

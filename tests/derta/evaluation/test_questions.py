"""Final answers are found in the places where people write them."""

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
        (r"The total is \boxed{18}, which he earns in 3 days.", 18),
        (r"First \boxed{6}, then \boxed{18}. Check: 6 * 3", 18),
        (r"#### Step 1\nAdd 6 and 12: \boxed{18}", 18),
        (r"\boxed{x = 6 \times 3 = 18}", 18),
        (r"\boxed{\frac{3}{4}}", Fraction(3, 4)),
        (r"$\boxed{-\dfrac{3}{4}}$ of the 20 litres", Fraction(-3, 4)),
        (r"so x = \frac{-3}{ 4 }", Fraction(-3, 4)),
        (r"$\tfrac12$", Fraction(1, 2)),
        (r"He waits \boxed{1\frac{1}{2}\text{ hours}}", Fraction(3, 2)),
        (r"We have 5 of them, or -2 \frac{1}{4}", Fraction(-9, 4)),
        (r"x_1\frac{1}{4}", Fraction(1, 4)),
        ("Step 5\n\\frac{1}{4}", Fraction(1, 4)),
        (r"\boxed{\$1{,}200.50}", Fraction("1200.5")),
        (r"\boxed{12\,000} or 12,\!000", 12000),
        (r"\boxed{24\text{ cm}^2}", 24),
        (r"The area is 24 cm^{2}.", 24),
        (r"There are \boxed{\text{eighteen}}, that is 18", 18),
        (r"There are 18, so \boxed{18 apples and", 18),
        ("1" * 5000, None),
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
        (r"\boxed{B}, since (A) is wrong", "B"),
        (r"\boxed{\text{(B)}} and not (A)", "B"),
        (r"\boxed{\textbf{B. } 12}; the answer is not A.", "B"),
        (r"It is (D), as $\boxed{A \cup B}$ is too large", "D"),
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
        (r"It is 0.75.", r"He eats 3 of 4 pieces, $\boxed{\frac{3}{4}}$ of the 2 cakes", True),
    ],
)
def test_the_reference_decides_between_number_and_letter(
    answer: str, reference: str, right: bool
) -> None:
    assert is_right(answer, reference) is right


def test_a_reference_that_is_neither_number_nor_letter_is_refused() -> None:
    with pytest.raises(ValueError, match="response: expected a number or a letter"):
        is_right("72", "It melts")

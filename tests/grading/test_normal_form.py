from fractions import Fraction

import pytest

from distrl_envs.grading.normal_form import normalise
from distrl_envs.grading.plain_numbers import canonical, quick_verdict, read_number

FORMS = {
    "007": "7",
    r"\dfrac12": r"\frac{1}{2}",
    r"\frac 34": r"\frac{3}{4}",
    r"\nicefrac{1}{2}": r"\frac{1}{2}",
    "x²": "x^2",
    "x¹²": "x^{12}",
    "3√2": r"3\sqrt{2}",
    "４２": "42",
    "٤٢": "42",
    "4\u200b2": "42",
    r"10,\!080": "10080",
    r"90^\circ": r"90^\circ",
    "90°": r"90^\circ",
    r"19, 46, \text{ and } 82": r"19,46,\land 82",
    "28 percent": "28%",
    r"\varnothing": r"\emptyset",
    r"\begin{bmatrix}1\\ 2\end{bmatrix}": r"\begin{pmatrix}1\\2\end{pmatrix}",
    r"\begin{vmatrix}1\end{vmatrix}": r"\begin{vmatrix}1\end{vmatrix}",
    r"\begin{aligned}x&=3\end{aligned}": "x=3",
    r"2 \pi r": r"2\pi r",
    r"\textcolor{red}{3}": "3",
    r"\boldsymbol{3}": "3",
    "x&lt;2": "x<2",
    "x<sub>1</sub>": "x_1",
    "x**2": "x^2",
    "**131**": "131",
    # What tells two numbers apart stays.
    "1 2": "1 2",
    r"1 \text{ hour } 30": r"1\text{hour}30",
    r"5 \text{ million}": r"5\text{million}",
    "1 x 10^3": "1*10^3",
    # Text in text, closed or not.
    r"\text{east\text{and}": r"{east\land",
    r"\mathrm{m\,s^{-2}}": r"\text{m}\text{s}^{-2}",
}


@pytest.mark.parametrize("text, form", FORMS.items())
def test_forms(text, form):
    assert normalise(text) == form


@pytest.mark.parametrize("text", [*FORMS, "x \\in [-2,7]", "\\pm 2021", "f(x) = x", "no solution"])
def test_a_form_is_its_own_form(text):
    assert normalise(normalise(text)) == normalise(text)


NUMBERS = {
    "-5": Fraction(-5),
    ".35625": Fraction(57, 160),
    "1,234,567": Fraction(1234567),
    "1e-3": Fraction(1, 1000),
    r"4.5\times 10^{3}": Fraction(4500),
    r"1\frac{4}{5}": Fraction(9, 5),
    "1 4/5": Fraction(9, 5),
    "3½": Fraction(7, 2),
    r"-\frac{35}{9}": Fraction(-35, 9),
    "-3./2": Fraction(-3, 2),
    "((7))": Fraction(7),
    "--2": Fraction(2),
}


@pytest.mark.parametrize("text, value", NUMBERS.items())
def test_numbers(text, value):
    number = read_number(normalise(text))
    assert number is not None
    assert number.value == value


@pytest.mark.parametrize(
    "text", ["1,22", "12,34,567", "(99,503)", "1/0", "x", "1e999", "204_5", "", "1 2", "3 4 1/2"]
)
def test_what_is_no_number(text):
    assert read_number(normalise(text)) is None


VERDICTS = [
    ("1/2", "0.5", True),
    ("5", "5.001", False),
    ("0.1", "0.10000000001", False),
    ("0.333", r"\frac{1}{3}", False),
    ("0.3333333333", r"\frac{1}{3}", True),
    ("1000000000", "1000000000.4", False),
    ("12345678901", "12345678900.0", False),
    ("50\\%", "0.5", True),
    ("50", "50\\%", True),
    ("28/100", "28", False),
    ("12345678901234567890", "12345678901234567891", False),
    ("A", "a", None),
    (r"\pi", "3.14159", None),
]


@pytest.mark.parametrize("gold, answer, verdict", VERDICTS)
def test_quick_verdicts(gold, answer, verdict):
    assert quick_verdict(normalise(gold), normalise(answer)) is verdict


def test_equal_numbers_have_one_canonical_text():
    spellings = ["3.5", r"\frac{7}{2}", "7/2", r"3\frac12", "35e-1", "3 1/2"]
    assert {canonical(normalise(text)) for text in spellings} == {"7/2"}

"""The permissive verifier: no wrong answer is paid, class by class; then the right ones that must not be refused."""
# ruff: noqa: E501

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nemo_dapo.rewards.math import verify
from tests.hostile_answers import TRUTH, hostile_responses
from tests.math_pairs import EQUATIONS, RIGHT, TAUTOLOGIES, WRONG

EQUAL = [
    ("5", "5"), ("1,234", "1234"), ("$18$", "18"), (r"\$18.00", "18"), ("$18", "18 dollars"), ("18 dollars per day", "18"), ("18 eggs", "18"),
    ("50%", "0.5"), (r"50\%", "50"), ("50 percent", "50%"), (r"30^\circ", "30"), ("30 degrees", r"30^{\circ}"), ("3 1/2", "3.5"),
    (r"$3\frac{1}{2}$", "7/2"), (r"\frac12", "0.5"), (r"\dfrac{3}{4}", "3/4"), ("½", "0.5"), ("0.3333", "1/3"), ("3.14159265", "3.1416"),
    ("201.89999999999998", "201.9"), (r"1.2 \times 10^5", "120000"), ("1.2e5", "120000"), ("1 million", "1,000,000"), (r"10{,}080", "10080"),
    ("27.0", "27"), ("27", "27.0"), ("025", "25"), ("25", "025"), ("-7", "−7"), (r"\text{7 cm}", "7"), (r"7\text{ cm}", "7 cm"), ("+7", "7"),
    ("(1, 2)", "(1,2)"), ("(1,000, 2,000)", "(1000, 2000)"), ("{2, 1}", r"\{1,2\}"), ("2 and 1", "1, 2"), ("x=3, y=5", "(3,5)"),
    ("x=3, y=5", "y=5, x=3"), (r"\pm 3", "3, -3"), (r"x = 1 \pm \sqrt{2}", r"1-\sqrt2, 1+\sqrt2"), (r"(-\infty, 5]", r"(-\infty,5]"),
    (r"(-\infty,2) \cup (3,\infty)", r"(3,\infty)\cup(-\infty,2)"), ("[0, 1/2]", "[0,0.5]"),
    (r"\begin{pmatrix}1 & 2\\3 & 4\end{pmatrix}", r"\begin{bmatrix} 1&2\\3&4 \end{bmatrix}"), ("x = 5", "5"), ("5", "x=5"), ("2+3=5", "5"),
    ("y=2x+3", "2x+3"), ("2x - y + 3 = 0", "y = 2x+3"), ("2x+3", "3+2x"), ("(x+1)^2", "x^2+2x+1"), (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
    ("sqrt(2)/2", r"\frac{\sqrt{2}}{2}"), ("1.4142", r"\sqrt{2}"), (r"\frac{\pi}{4} \text{ radians}", r"\pi/4"), ("2pi", r"2\pi"), ("3+4i", "4i+3"),
    ("(B)", "B"), ("B) five apples", "B"), ("option b", "B"), (r"\text{(C)}", "C"), ("Tuesday", "tuesday"), (r"\text{Evelyn}", "Evelyn"), ("3:2", "3:2"),
]  # fmt: skip
UNEQUAL = [
    ("5x", "5"), ("5 x", "5"), ("5m", "5"), ("5 or 6", "5"), ("not 5", "5"), ("51", "5"), ("4 = 5", "5"), ("5 cm", "5 m"), ("$5", "5 cents"), ("5, 6", "5"),
    ("(1,2)", "(2,1)"), ("[1,2]", "(1,2)"), ("(1,2]", "(1,2)"), ("{1,2}", "(1,2)"), ("5!", "5"), ("4.9999999999999999", "5"), ("5.0000001", "5"),
    ("2t", "2"), ("0.33", "1/3"), ("0.3334", "1/3"), ("3.15", "3.14"), ("3.1417", "3.14159265"), ("A or B", "B"), ("A dog", "A"), ("B) not this, C", "B"),
    ("-5", "5"), ("1 2", "12"), ("5/0", "5"), (r"\frac{\sqrt{2}}{2}", r"\frac{\sqrt{3}}{2}"), ("18 is wrong", "18"), ("5 squared", "5"), ("3:30", "7:60"),
    ("x = 6", "x = 5"), ("y=5", "x=5"), ("12,34", "1234"), ("x > 5", "x < 5"), ("{5, 6}", "{5}"), ("1.4143", r"\sqrt{2}"), ("50%", "5"), ("5%", "50"),
    ("Wednesday", "Tuesday"), ("2x+4", "2x+3"), ("1, 2", "1, 2, 2"), ("5 million", "5"), ("5 minus 1", "5"), ("42:1", "42"),
]  # fmt: skip

small = st.integers(2, 99)
letters = st.sampled_from("abkmnprstwxyz")


def paid(answer: str, truth: str) -> bool:
    verdict = verify(f"We compute.\n\\boxed{{{answer}}}", truth)
    assert verdict.error is None, verdict
    return verdict.correct


@pytest.mark.parametrize(("answer", "truth"), EQUAL + [pair for pairs in RIGHT.values() for pair in pairs])
def test_one_value_in_two_spellings_is_correct(answer: str, truth: str) -> None:
    assert paid(answer, truth)


@pytest.mark.parametrize(("answer", "truth"), UNEQUAL + [pair for pairs in WRONG.values() for pair in pairs])
def test_another_value_is_incorrect_and_no_error(answer: str, truth: str) -> None:
    assert not paid(answer, truth)


@pytest.mark.parametrize("truth", [truth for pairs in (*WRONG.values(), *RIGHT.values()) for _, truth in pairs])
def test_every_truth_is_equal_to_itself(truth: str) -> None:
    assert paid(truth, truth)


@pytest.mark.parametrize("truth", EQUATIONS)
def test_a_tautology_is_the_answer_to_no_equation(truth: str) -> None:
    assert [answer for answer in TAUTOLOGIES if paid(answer, truth)] == []


@given(letters, small, small, st.sampled_from(EQUATIONS))
def test_no_expansion_is_the_answer_to_an_equation(x: str, a: int, b: int, truth: str) -> None:
    for identity in (
        f"({x}+{a})^2={x}^2+{2 * a}{x}+{a * a}",
        f"({x}-{a})({x}+{b})={x}^2+({b - a}){x}-{a * b}",
        rf"0.{a}+0.{b}={Fraction(int(a), 10 ** len(str(a))) + Fraction(int(b), 10 ** len(str(b)))}",
        rf"\sqrt{{{a}}}\cdot\sqrt{{{a}}}={a}",
        rf"\frac{{{x}}}{{{a}}}\cdot {a}={x}",
        f"{a}={a}",
    ):
        assert not paid(identity, truth), identity


@given(st.sampled_from("abmnrtx"), small, small)
def test_a_letter_in_its_other_case_is_another_quantity(x: str, a: int, b: int) -> None:
    for form in (
        "{0}-{1}",
        "{2}{0}^2-{3}{1}^2",
        r"\frac{{{0}}}{{{1}}}",
        r"\pi({0}^2-{1}^2)",
        r"\frac{{{0}{1}}}{{{0}+{2}{1}}}",
        "{0}={2}",
        "({0},{2})",
    ):
        truth = form.format(x.upper(), x, a, b)
        for mutant in (
            form.format(x, x.upper(), a, b),
            form.format(x, x, a, b),
            form.format(x.upper(), x.upper(), a, b),
        ):
            if mutant != truth:
                assert not paid(mutant, truth), (mutant, truth)


@given(st.integers(100, 3_000), st.integers(1, 9))
def test_large_and_small_numbers_are_compared_to_their_last_digit(n: int, d: int) -> None:
    for truth, near in (
        (f"2^{{{n}}}", f"2^{{{n}}}+{d}"),
        (rf"\frac{{1}}{{2^{{{n}}}}}", rf"\frac{{1}}{{2^{{{n + d}}}}}"),
        (f"1-2^{{-{n}}}", "1"),
        (f"2^{{-{n}}}", "0"),
        (f"{n % 200 + 60}!", f"{n % 200 + 60}!+{d}"),
        (rf"\sqrt{{{d}+10^{{-{n % 200}}}}}", rf"\sqrt{{{d}}}"),
        (rf"x^{d}\cdot10^{{-{n % 200 + 40}}}", "0"),
    ):
        assert not paid(near, truth), (near, truth)
        assert not paid(truth, near), (truth, near)


@given(
    st.lists(small, min_size=2, max_size=4, unique=True),
    small,
    st.sampled_from([r" \quad ", r" \\ ", r"\ ", "\n", ", ", " ", r" \text{ and } "]),
)
def test_a_system_is_all_its_equations_whatever_stands_between(values: list[int], other: int, gap: str) -> None:
    assume(other not in values)
    equations = [f"{name}={value}" for name, value in zip("xyzw", values, strict=False)]
    truth = gap.join(equations)
    assert paid(", ".join(equations), truth)
    assert paid(", ".join(reversed(equations)), truth)
    for i, name in enumerate("xyzw"[: len(values)]):
        assert not paid(gap.join([*equations[:i], f"{name}={other}", *equations[i + 1 :]]), truth)
    assert not paid(equations[-1], truth)
    assert not paid(str(values[-1]), truth)


@given(st.lists(small, min_size=2, max_size=3, unique=True), small)
def test_a_list_with_plus_minus_is_all_its_values(values: list[int], other: int) -> None:
    assume(other not in values)
    first, second = values[:2]
    truth = rf"x={first}, x=\pm {second}"
    for right in (f"{first}, {second}, -{second}", rf"{first}, \pm{second}", rf"\{{{first}, -{second}, {second}\}}"):
        assert paid(right, truth)
    for wrong in (
        rf"x={other}, x=\pm {second}",
        rf"x={first}, x=\pm {other}",
        rf"\pm {second}",
        f"{first}, {second}",
        f"{first}",
    ):
        assert not paid(wrong, truth)


@given(st.integers(3, 9), st.integers(3, 9), st.data())
def test_a_number_in_a_base_is_that_number_in_that_base(base: int, other: int, data: st.DataObject) -> None:
    digits = "".join(data.draw(st.lists(st.sampled_from("12"), min_size=2, max_size=6)))
    truth = f"{digits}_{base}"
    assert paid(f"{digits}_{{{base}}}", truth)
    assert paid(f"{int(digits, base)}_{{10}}", truth)
    assert not paid(digits, truth)
    assert not paid(str(int(digits, base)), truth)
    assert not paid(truth, digits)
    assume(base != other)
    assert not paid(f"{digits}_{other}", truth)


@given(st.sampled_from("fghFG"), st.sampled_from("xtn"), small, small)
def test_a_function_applied_is_no_product(f: str, x: str, a: int, b: int) -> None:
    assume(a != b)
    for truth, wrong in (
        (f"{f}({a}{x})", f"{a}{f}({x})"), (f"{f}({a})", f"{a}{f}"), (f"{f}({x}+{a})", f"{f}({x})+{a}"), (f"{f}({a}{x})", f"{f}({b}{x})"),
        (f"{f}(-{x})", f"-{f}({x})"), (f"{f}'({x})", f"{f}({x})"), (f"{f}({f}({x}))", f"{f}({x})^2"), (f"{f}(0)", "0"), (f"{f}^{{-1}}({x})", rf"\frac{{{x}}}{{{f}}}"),
    ):  # fmt: skip
        assert not paid(wrong, truth), (wrong, truth)
    assert paid(f"{b}+{a}{f}({x}+1)", f"{a}{f}(1+{x})+{b}")
    assert paid(f"{x}({x}+{a})", f"{x}^2+{a}{x}")


@given(small, small, small)
def test_an_equation_between_constants_is_only_itself(a: int, b: int, c: int) -> None:
    assume(b != c)
    assert not paid(rf"\log_{{{a}}} {b} = {c}", rf"\log_{{{a}}} {b} = {b}")
    assert not paid(f"{a}+{b}={a + c}", f"{a}+{b}={a + b}")
    assert not paid(f"{a}+{b}={a + c}", str(a + c))
    assert not paid(f"x={a}+{b}={a + c}", str(a + c))
    assert not paid(rf"\sqrt{{{a}}}\approx {b}.25", rf"\sqrt{{{a}}}\approx {c}.25")
    assert paid(f"{a}+{b}={a + b}", str(a + b))


@given(
    small,
    st.sampled_from(["m", "cm", "kg", "m/s", "km/h", "mph", "cm^2", "m per hour"]),
    st.sampled_from(["g", "mm", "m/min", "kg/s", "cm^3", "miles per minute"]),
)
def test_a_unit_may_be_left_out_and_not_be_another(value: int, unit: str, other: str) -> None:
    assert paid(str(value), f"{value} {unit}")
    assert paid(f"{value} {unit}", str(value))
    assert not paid(f"{value} {other}", f"{value} {unit}")


@given(
    small,
    st.sampled_from(
        [
            "tens",
            "hundred",
            "lakh",
            "crore",
            "million",
            "quintillion",
            "per mille",
            "squared",
            "below zero",
            "dozen",
            "minus 1",
            "or so less",
        ]
    ),
)
def test_a_number_word_makes_another_number(value: int, word: str) -> None:
    assert not paid(f"{value} {word}", str(value))


@given(
    st.permutations("ABCDE"),
    st.sampled_from(
        [
            "{0} or {1}",
            "{0}. Actually it is ({2})",
            "{0}. Wait, {1}",
            "({0})({1})",
            "{0}, {1}",
            "not {0}",
            "{0}{1}",
            "{0}) no, ({2})",
        ]
    ),
)
def test_a_hedged_choice_is_none(order: list[str], form: str) -> None:
    right, other = order[:2]
    assert not paid(form.format(right, other, other.lower()), right)


def spellings(value: Fraction) -> list[str]:
    """Every supported way to write a fraction."""
    top, bottom, sign = abs(value.numerator), value.denominator, "-" if value < 0 else ""
    texts = [
        f"{sign}{top}/{bottom}",
        rf"{sign}\frac{{{top}}}{{{bottom}}}",
        rf"$\dfrac{{{sign}{top}}}{{{bottom}}}$",
        rf"{sign}\frac{{{2 * top}}}{{{2 * bottom}}}",
    ]
    if top > bottom > 1:
        texts += [
            f"{sign}{top // bottom} {top % bottom}/{bottom}",
            rf"{sign}{top // bottom}\frac{{{top % bottom}}}{{{bottom}}}",
        ]
    return texts


def integer_spellings(value: int) -> list[str]:
    grouped = f"{value:,}"
    return [
        str(value), f"{value}.0", f"{value}.00", grouped, grouped.replace(",", "{,}"), grouped.replace(",", r"\,"), grouped.replace(",", " "), f"${value}$",
        rf"\$ {value}", f"{value} dollars", f"{value} apples", rf"{value}\text{{ cm}}", f"{value}%", rf"{value}^\circ", rf"\boxed{{{value}}}", f"x = {value}",
        f"{value}e0", rf"{value} \times 10^{{0}}", rf"\text{{{value}}}", f"({value})", rf"\frac{{{3 * value}}}{{3}}", f"**{value}**", f"{value}.",
    ]  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.integers(-(10**12), 10**12))
def test_an_integer_written_in_any_supported_way_is_equal(value: int) -> None:
    for text in integer_spellings(value):
        assert verify(f"Answer: {text}", str(value)).correct, text


@settings(max_examples=200, deadline=None)
@given(st.integers(-(10**12), 10**12), st.data())
def test_an_integer_with_one_digit_changed_is_never_equal(value: int, data: st.DataObject) -> None:
    changed = change_digit(str(value), data)
    assume(int(changed) != value)
    for text in integer_spellings(int(changed)):
        assert not verify(f"Answer: {text}", str(value)).correct, text


@settings(max_examples=200, deadline=None)
@given(st.fractions(min_value=-1000, max_value=1000, max_denominator=999), st.data())
def test_a_fraction_is_equal_in_any_form_and_not_with_a_digit_changed(value: Fraction, data: st.DataObject) -> None:
    truth = f"{value.numerator}/{value.denominator}"
    for text in spellings(value):
        assert verify(f"Answer: {text}", truth).correct, text
    other = change_digit(truth, data)
    assume(other.rpartition("/")[2].strip("0") and Fraction(other) != value)
    for text in spellings(Fraction(other)):
        assert not verify(f"Answer: {text}", truth).correct, text


@settings(max_examples=200, deadline=None)
@given(st.decimals(min_value=-(10**6), max_value=10**6, places=4).filter(lambda d: d != 0), st.data())
def test_a_decimal_is_equal_in_any_form_and_not_with_a_digit_changed(value: object, data: st.DataObject) -> None:
    truth = format(value, "f")
    for text in (truth, f"${truth}$", truth + "00", f"{truth} m", f"{truth}e0", f"x={truth}"):
        assert verify(f"Answer: {text}", truth).correct, text
    other = change_digit(truth, data)
    assume(Fraction(other) != Fraction(truth))
    assert not verify(f"Answer: {other}", truth).correct, other


def change_digit(text: str, data: st.DataObject) -> str:
    at = data.draw(st.sampled_from([i for i, character in enumerate(text) if character.isdigit()]))
    digit = data.draw(st.sampled_from([d for d in "0123456789" if d != text[at]]))
    return text[:at] + digit + text[at + 1 :]


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=300))
def test_no_text_makes_the_verifier_fail(text: str) -> None:
    verdict = verify(f"Answer: {text}", "31415926")
    assert verdict.error is None
    assert not verdict.correct or "31415926" in text


PIECES = [
    r"\frac{",
    r"\sqrt{",
    "}",
    "{",
    "(",
    ")",
    "[",
    "]",
    "^",
    "_",
    "2",
    "10",
    "x",
    "f(",
    "+",
    "-",
    "*",
    "/",
    "=",
    ",",
    r"\pi",
    r"\pm",
    "!",
    "|",
    "<",
    r"\cup",
    "n",
    "°",
    r"\le",
]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(PIECES), max_size=40),
    st.sampled_from(
        ["x=5", r"\frac{x}{2}", "(1,2)", r"\{1,2\}", "x<3", r"1\pm\sqrt2", "f(2x)", r"\begin{pmatrix}1\\2\end{pmatrix}"]
    ),
)
def test_no_half_formula_makes_the_verifier_fail(pieces: list[str], truth: str) -> None:
    verdict = verify("Answer: " + "".join(pieces), truth)
    assert verdict.error is None


def test_no_hostile_answer_is_correct() -> None:
    responses = hostile_responses()
    assert len(set(responses)) >= 500
    assert [response[:80] for response in responses if verify(response, TRUTH).correct] == []


def test_an_absent_answer_is_incorrect_and_no_error() -> None:
    verdict = verify("I ran out of", "5")
    assert (verdict.correct, verdict.extracted, verdict.error) == (False, None, None)


def test_a_failing_comparison_is_an_error_not_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(answer: str, truth: str) -> bool:
        raise MemoryError("too large")

    monkeypatch.setattr("nemo_dapo.rewards.math.equal", fail)
    assert verify("Answer: x < 5", "5 > x").error == "memory: MemoryError: too large"


def test_the_verifier_needs_neither_torch_nor_sympy() -> None:
    code = "import sys; from nemo_dapo.rewards.math import verify; verify('Answer: x+1', '1+x'); print(sorted({'torch', 'sympy'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )

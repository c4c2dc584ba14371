"""How often the permissive verifier is right, on answers made here: `python benchmarks/agreement.py [--scale 1.0]`.

Gold answers come from a small grammar of what competition and college sets have, each with an identity: two golds of
different identities mean different things. Suites of wrong answers (identities, case, mutations, crossed pairs) should be
paid 0 times; suites of right ones (wrappings, matrices, respellings) should be refused 0 times. Seeded. Prints a line a
suite with examples of what went wrong, and as its last line JSON.
"""
# ruff: noqa: E501

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import gcd, isqrt
from pathlib import Path

from nemo_dapo.rewards.math import verify

ROOT = Path(__file__).parents[1]
Case = tuple[str, str, str]  # response, truth, what it is an example of
SHOWN = 6


@dataclass(frozen=True)
class Gold:
    """An answer as a data set writes it; equal identities mean the same thing."""

    text: str
    kind: str
    identity: object = None

    @property
    def meaning(self) -> object:
        return self.identity if self.identity is not None else (self.kind, self.text)


@dataclass
class Suite:
    name: str
    expected: bool
    cases: list[Case]
    failures: list[Case] = field(default_factory=list)
    errors: int = 0
    seconds: float = 0.0

    def run(self) -> Suite:
        start = time.perf_counter()
        for case in self.cases:
            verdict = verify(case[0], case[1])
            self.errors += verdict.error is not None
            if verdict.correct != self.expected:
                self.failures.append(case)
        self.seconds = time.perf_counter() - start
        return self

    def __str__(self) -> str:
        what = "refused though right" if self.expected else "paid though wrong"
        line = (
            f"{self.name}: {len(self.failures)} of {len(self.cases)} {what}, {self.errors} errors, {self.seconds:.1f} s"
        )
        groups = dict.fromkeys(kind for _, _, kind in self.failures)
        counts = [f"{kind} {sum(k == kind for _, _, k in self.failures)}" for kind in groups]
        shown = [f"    {r[-90:]!r} for {t!r} ({k})" for r, t, k in self.failures[:SHOWN]]
        return "\n".join([line, *([f"    by kind: {', '.join(counts)}"] if counts else []), *shown])


def golds(count: int, draw: random.Random, kinds: Sequence[str] = ()) -> list[Gold]:
    """About `count` different gold answers, every kind of the grammar (or those named) as often."""
    makers = [KINDS[name] for name in kinds or KINDS]
    found: dict[str, Gold] = {}
    for i in range(3 * count):
        gold = makers[i % len(makers)](draw)
        found.setdefault(gold.text, gold)
        if len(found) >= count:
            break
    return list(found.values())


def _n(draw: random.Random, low: int = 2, high: int = 99) -> int:
    return draw.randint(low, high)


def _letter(draw: random.Random, letters: str = "abkmnpqrstxyz") -> str:
    return draw.choice(letters)


def _fraction(draw: random.Random) -> tuple[int, int]:
    while True:
        top, bottom = _n(draw), _n(draw)
        if gcd(top, bottom) == 1:
            return top, bottom


def _radicand(draw: random.Random) -> int:
    while True:
        n = _n(draw)
        if all(n % (i * i) for i in range(2, isqrt(n) + 1)):
            return n


def _integer(draw: random.Random) -> Gold:
    value = draw.choice((_n(draw), -_n(draw), draw.randint(100, 10**9), 2 ** draw.randint(20, 200) - 1))
    return Gold(str(value), "integer", ("number", value))


def _fractions(draw: random.Random) -> Gold:
    top, bottom = _fraction(draw)
    sign = draw.choice(("", "-"))
    return Gold(rf"{sign}\frac{{{top}}}{{{bottom}}}", "fraction")


def _decimal(draw: random.Random) -> Gold:
    return Gold(f"{_n(draw)}.{_n(draw, 10, 99)}7", "decimal")


def _surd(draw: random.Random) -> Gold:
    n, a, b = _radicand(draw), _n(draw), _n(draw)
    return Gold(draw.choice((rf"{a}\sqrt{{{n}}}", rf"{a}+{b}\sqrt{{{n}}}", rf"\frac{{{a}-\sqrt{{{n}}}}}{{7}}")), "surd")


def _constant(draw: random.Random) -> Gold:
    a, n = _n(draw), _n(draw, 2, 9)
    forms = (
        rf"{a}\pi",
        rf"\frac{{{a}\pi}}{{101}}",
        rf"e^{{{a}}}",
        rf"\ln {a}",
        rf"{a}!+{n}",
        rf"\frac{{{n}}}{{2^{{{a + 100}}}}}",
    )
    return Gold(draw.choice(forms), "constant")


def _interval(draw: random.Random) -> Gold:
    low, high = _n(draw, -50, 49), _n(draw, 50, 99)
    return Gold(
        draw.choice((rf"[{low},{high})", rf"({low},{high}]", rf"[{low},{high}]", rf"({low},\infty)")), "interval"
    )


def _union(draw: random.Random) -> Gold:
    return Gold(rf"(-\infty,{_n(draw)})\cup[{_n(draw) + 100},\infty)", "union")


def _tuple(draw: random.Random) -> Gold:
    a, b, c = draw.sample(range(-40, 99), 3)
    return Gold(draw.choice((f"({a},{b})", f"({a},{b},{c})", rf"\left(\frac{{{a}}}{{101}},{b}\right)")), "tuple")


def _set(draw: random.Random) -> Gold:
    members = draw.sample(range(-40, 99), draw.randint(2, 4))
    return Gold(r"\{" + ",".join(map(str, members)) + r"\}", "set", ("set", frozenset(members)))


def _list(draw: random.Random) -> Gold:
    a, b = draw.sample(range(100, 999), 2)
    forms = (f"{a}, -{b}", rf"{a}\pm\sqrt{{{_radicand(draw)}}}", rf"0, \pm{a}", rf"x={a}, x=\pm {b}")
    return Gold(draw.choice(forms), "list")


def _matrix(draw: random.Random) -> Gold:
    a, b, c, d = (_n(draw, -9, 99) for _ in range(4))
    kind = draw.choice("pb")
    body = draw.choice((rf"{a} & {b} \\ {c} & {d}", rf"{a} \\ {b}", rf"\frac{{{a}}}{{101}} \\ {b} \\ {c}"))
    return Gold(rf"\begin{{{kind}matrix}} {body} \end{{{kind}matrix}}", "matrix", ("matrix", body))


def _polynomial(draw: random.Random) -> Gold:
    x, a, b, c = _letter(draw), _n(draw), _n(draw), _n(draw)
    return Gold(draw.choice((f"{a}{x}^2-{b}{x}+{c}", f"{a}{x}+{b}", rf"\frac{{{x}+{a}}}{{{x}^2+{b}}}")), "expression")


def _two_cases(draw: random.Random) -> Gold:
    """Two quantities that differ in their case alone."""
    x, a, b = _letter(draw, "abmnrt"), _n(draw), _n(draw)
    X = x.upper()
    forms = (
        f"{a}{X}^2-{b}{x}^2",
        rf"\frac{{{a}{X}}}{{{b}{x}}}",
        rf"\frac{{{X}{x}}}{{{a}{X}+{x}}}",
        rf"\pi({X}^2-{a}{x}^2)",
    )
    return Gold(draw.choice(forms), "two cases")


def _function(draw: random.Random) -> Gold:
    f, x, a, b = draw.choice("fghF"), _letter(draw, "xtn"), _n(draw), _n(draw)
    return Gold(draw.choice((f"{a}{f}({x})+{b}", f"{f}({a}{x})", f"{f}({x}+{a})", f"{f}'({a}{x})")), "function")


def _equation(draw: random.Random) -> Gold:
    x, a, b, c = _letter(draw), _n(draw), _n(draw), _n(draw)
    forms = (
        f"{x}={a + 100}", f"y={a}x+{b}", f"x^2+y^2={c * c}", f"f(x)={a}x^2+{b}", f"{a}x-{b}y+{c}=0", rf"n=\frac{{{a}}}{{101}}",
        rf"\frac{{x^2}}{{{a}}}+\frac{{y^2}}{{{b}}}=1", f"V=\\frac{{{a}}}{{101}}\\pi r^3",
    )  # fmt: skip
    return Gold(draw.choice(forms), "equation")


def _system(draw: random.Random) -> Gold:
    a, b, c = _n(draw), _n(draw), _n(draw)
    gap = draw.choice((r" \quad ", ", ", r" \\ "))
    return Gold(draw.choice((f"x={a}{gap}y={b}", f"x={a}{gap}y={b}{gap}z={c}")), "system", ("system", a, b, c, gap))


def _relation(draw: random.Random) -> Gold:
    x, a, b = _letter(draw), _n(draw, -9, 49), _n(draw, 50, 99)
    return Gold(draw.choice((f"{a}<{x}<{b}", rf"{x}\ge {b}", rf"{a}{x}+y<{b}")), "relation")


def _units(draw: random.Random) -> Gold:
    value, unit = _n(draw) + 1000, draw.choice(("cm", "kg", "miles", r"cm^2", "km/h", "hours"))
    text = unit.replace("^2", "}^2") if "^" in unit else unit + "}"
    return Gold(rf"{value}\text{{ {text}", "unit", ("number", value))


def _base(draw: random.Random) -> Gold:
    base = draw.randint(3, 9)
    digits = "".join(str(draw.randint(1, base - 1)) for _ in range(4))
    return Gold(f"{digits}_{base}", "base", ("base", int(digits, base)))


def _word(draw: random.Random) -> Gold:
    words = (
        "Tuesday",
        "Evelyn",
        "even",
        "parabola",
        "no solution",
        "neither",
        "Cauchy",
        "increasing",
        "ellipse",
        "Friday",
    )
    return Gold(draw.choice((r"\text{%s}", "%s")) % draw.choice(words), "word", ("word", draw.random()))


def _choice(draw: random.Random) -> Gold:
    letter = draw.choice("ABCDE")
    return Gold(draw.choice((letter, rf"\text{{({letter})}}")), "choice", ("choice", letter))


def _about(draw: random.Random) -> Gold:
    n = _n(draw, 30, 98) | 1
    root = f"{n**0.5:.2f}"
    return Gold(rf"\sqrt{{{n}}}\approx {root}", "about", ("root", n))


KINDS: dict[str, Callable[[random.Random], Gold]] = {
    function.__name__: function
    for function in (
        _integer, _fractions, _decimal, _surd, _constant, _interval, _union, _tuple, _set, _list, _matrix, _polynomial,
        _two_cases, _function, _equation, _system, _relation, _units, _base, _word, _choice, _about,
    )
}  # fmt: skip

FORMULAS = ("_polynomial", "_two_cases", "_function", "_equation", "_system", "_relation")


def shared_answers() -> list[Gold]:
    """Answers of the data sets beside the checkout, where they are."""
    data = ROOT.parent / "shared" / "data"
    texts: list[str] = []
    for path in (data / "aime24" / "test.jsonl", data / "amc23" / "test.jsonl", data / "gsm8k" / "test.jsonl"):
        lines = path.read_text().splitlines() if path.exists() else []
        texts += [str(json.loads(line)["answer"]).rpartition("####")[2].strip() for line in lines]
    return [Gold(text, "shared", ("number", int(float(text.replace(",", ""))))) for text in dict.fromkeys(texts)]


# Suites of wrong answers.

IDENTITIES = (
    "(x+1)^2=x^2+2x+1", "0.1+0.2=0.3", r"\sqrt2\cdot\sqrt2=2", r"\log_{36}216=\frac32", "10^{-45}=0", "x=x", "0=0", "y-y=0",
    r"\sin^2x+\cos^2x=1", "1<2", "x^2+1>0",
)  # fmt: skip


def identities(found: list[Gold], draw: random.Random) -> Iterator[Case]:
    for gold in found:
        if gold.kind in ("equation", "relation", "system"):
            for identity in IDENTITIES:
                yield rf"\boxed{{{identity}}}", gold.text, "identity"


def case_mutations(found: list[Gold], draw: random.Random) -> Iterator[Case]:
    """Every single letter of a formula in its other case."""
    for gold in found:
        if gold.kind in ("two cases", "expression", "equation", "function", "relation"):
            for match in re.finditer(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])", gold.text):
                letter = match.group()
                if letter not in "ei":
                    mutant = gold.text[: match.start()] + letter.swapcase() + gold.text[match.end() :]
                    yield rf"\boxed{{{mutant}}}", gold.text, gold.kind


def mutations(found: list[Gold], draw: random.Random) -> Iterator[Case]:
    """One digit, sign, letter, bracket, item or place changed."""
    for gold in found:
        for name, mutate in MUTATIONS.items():
            mutant = mutate(gold, draw)
            if mutant is not None and mutant != gold.text:
                yield rf"\boxed{{{mutant}}}", gold.text, f"{name} of {gold.kind}"


def _digit(gold: Gold, draw: random.Random) -> str | None:
    places = [m.start() for m in re.finditer(r"[0-9]", gold.text)]
    if not places or gold.kind == "about":
        return None
    at = draw.choice(places)
    digit = draw.choice([d for d in "123456789" if d != gold.text[at]])
    return gold.text[:at] + digit + gold.text[at + 1 :]


def _sign(gold: Gold, draw: random.Random) -> str | None:
    if gold.kind in ("system", "word", "choice", "base", "unit", "about", "interval", "union", "relation"):
        return None
    if "+" in gold.text:
        return gold.text.replace("+", "-", 1)
    number = re.search(r"(?<![0-9^_{\\+-])-?[0-9]+(?!_)", gold.text)
    if number is None or not int(number[0]) or gold.kind in ("equation", "list", "matrix", "expression", "two cases"):
        return None
    flipped = number[0][1:] if number[0].startswith("-") else f"-{number[0]}"
    return gold.text[: number.start()] + flipped + gold.text[number.end() :]


def _other_letter(gold: Gold, draw: random.Random) -> str | None:
    if gold.kind not in ("expression", "two cases", "equation", "function", "choice"):
        return None
    match = draw.choice(list(re.finditer(r"(?<![A-Za-z\\])[A-DF-HJ-Za-df-hj-z](?![A-Za-z])", gold.text)) or [None])
    return (
        gold.text[: match.start()] + draw.choice("DW" if gold.kind == "choice" else "DWdw") + gold.text[match.end() :]
        if match
        else None
    )


def _bracket(gold: Gold, draw: random.Random) -> str | None:
    other = {"[": "(", "(": "[", "]": ")", ")": "]"}
    places = [0, -1] if gold.kind == "interval" else []
    places = [at for at in places if gold.text[at] in other and "infty" + gold.text[at] not in gold.text]
    if not places:
        return None
    at = draw.choice(places) % len(gold.text)
    return gold.text[:at] + other[gold.text[at]] + gold.text[at + 1 :]


def _item(gold: Gold, draw: random.Random) -> str | None:
    if gold.kind not in ("tuple", "set", "list", "system"):
        return None
    before, comma, after = gold.text.partition(",")
    return (
        draw.choice((f"{before},{after.rpartition(',')[0] or ' 555'},{after}", f"{before},777,{after}"))
        if comma
        else None
    )


def _order(gold: Gold, draw: random.Random) -> str | None:
    match = re.fullmatch(r"\((-?[0-9]+),(-?[0-9]+)(.*)", gold.text) if gold.kind == "tuple" else None
    return f"({match[2]},{match[1]}{match[3]}" if match else None


def _other_base(gold: Gold, draw: random.Random) -> str | None:
    return draw.choice((gold.text[:-1] + "11", gold.text.partition("_")[0])) if gold.kind == "base" else None


def _argument(gold: Gold, draw: random.Random) -> str | None:
    match = re.fullmatch(r"([fghF])\(([0-9]+)(\w)\)", gold.text)
    return f"{match[2]}{match[1]}({match[3]})" if match else None


def _neighbour(gold: Gold, draw: random.Random) -> str | None:
    return (
        f"{gold.text}+1"
        if gold.kind in ("integer", "constant", "surd", "expression", "two cases", "function")
        else None
    )


def _last_side(gold: Gold, draw: random.Random) -> str | None:
    """The first equation of a system changed, its last one kept."""
    return re.sub(r"x=[0-9]+", "x=100007", gold.text) if gold.kind in ("system", "list") and "x=" in gold.text else None


def _false_about(gold: Gold, draw: random.Random) -> str | None:
    return gold.text.partition(" ")[0] + f" {draw.randint(11, 99)}.5" if gold.kind == "about" else None


def _unit(gold: Gold, draw: random.Random) -> str | None:
    return (
        gold.text.partition("\\")[0] + draw.choice((" m", " g", " mph", " feet", " hundred"))
        if gold.kind == "unit"
        else None
    )


MUTATIONS: dict[str, Callable[[Gold, random.Random], str | None]] = {
    "digit": _digit, "sign": _sign, "letter": _other_letter, "bracket": _bracket, "item": _item, "order": _order,
    "base": _other_base, "argument": _argument, "plus one": _neighbour, "first equation": _last_side, "about": _false_about,
    "unit": _unit,
}  # fmt: skip


def crossed(found: list[Gold], draw: random.Random, count: int) -> Iterator[Case]:
    """Pairs of golds with different meanings, half of them of one kind."""
    by_kind: dict[str, list[Gold]] = {}
    for gold in found:
        by_kind.setdefault(gold.kind, []).append(gold)
    for i in range(count):
        a = draw.choice(found)
        b = draw.choice(by_kind[a.kind] if i % 2 else found)
        if a.meaning != b.meaning and a.kind != "word":
            yield rf"\boxed{{{a.text}}}", b.text, f"{a.kind}, {b.kind}"


# Suites of right answers.

WRAPPINGS = (
    "**Answer:**\n{}", "**Final Answer:**\n\n{}", "**Final Answer**\n{}", "## Answer\n{}", "__Answer:__ {}", "Answer:\n$$\n{}\n$$",
    "### Final Answer:\n\n${}$", "**Final Answer**\n\n\\[ \\boxed{{{}}} \\]", "\\boxed{{{}}}. The answer is correct.", "Answer: {}",
    "Answer: ${}$", "**Answer:** \\({}\\)", "The final answer is ${}$. I hope it is correct.", "<answer>{}</answer>",
    "<answer>\\boxed{{{}}}</answer>", "\\framebox{{{}}}", "\\boxed{{{}}}\n\nAnswer: see above", "So \\boxed{{{}}}. This answer is an integer.",
)  # fmt: skip


def wrappings(found: list[Gold], draw: random.Random) -> Iterator[Case]:
    for gold in found:
        for form in WRAPPINGS:
            yield "We compute 7 first.\n" + form.format(gold.text), gold.text, form


def matrices(found: list[Gold], draw: random.Random) -> Iterator[Case]:
    for gold in found:
        if gold.kind == "matrix":
            for spelled in matrix_spellings(gold.text):
                yield rf"\boxed{{{spelled}}}", gold.text, "matrix"


def matrix_spellings(text: str) -> list[str]:
    body = re.sub(r"\\(?:begin|end)\{.matrix\}", "", text).strip()
    columns = "c" * (body.partition(r"\\")[0].count("&") + 1)
    slashed = re.sub(r"\\frac\{(-?[0-9]+)\}\{101\}", r"\1/101", body)
    wrap = r"\begin{pmatrix}%s\end{pmatrix}"
    return [
        wrap % body.replace(" ", ""), wrap % body.replace(r"\\", r"\\[4pt]"), wrap % f"\n{body}\n", wrap % (body + r" \\"),
        rf"\begin{{bmatrix}} {body} \end{{bmatrix}}", rf"\left[\begin{{array}}{{{columns}}} {body} \end{{array}}\right]",
        wrap % slashed, wrap % body.replace(r"\frac", r"\dfrac"), rf"\left( \begin{{matrix}} {body} \end{{matrix}} \right)",
    ]  # fmt: skip


RESPELLINGS: dict[str, tuple[str, str]] = {  # kind of gold ("" for every), how to rewrite it
    "dollars": ("", "${}$"), "parentheses": ("", "\\({}\\)"), "display": ("", "\\[{}\\]"), "blanks": ("", "  {}  "),
    "braces": ("integer", "{{{}}}"), "text": ("integer", "\\text{{{}}}"), "decimal": ("integer", "{}.0"), "x =": ("integer", "x = {}"),
    "unit": ("integer", "{} cm"), "apples": ("integer", "{} apples"), "trailing blank": ("", "{}\\ "), "full stop": ("", "{}."),
    "round": ("integer", "({})"), "degrees": ("integer", "{}^\\circ"), "equals": ("fraction", "p = {}"), "member": ("interval", "x \\in {}"),
    "named": ("tuple", "(x,y) = {}"), "option": ("choice", "The option {}"), "quoted": ("word", '"{}"'), "bold": ("surd", "\\mathbf{{{}}}"),
    "textbf": ("word", "\\textbf{{{}}}"), "plus zero": ("expression", "{}+0"), "times one": ("surd", "1\\cdot({})"),
}  # fmt: skip
REWRITES: dict[str, tuple[str, str]] = {  # pattern in the gold, replacement
    "dfrac": (r"\\frac", r"\\dfrac"), "tfrac": (r"\\frac", r"\\tfrac"), "slash": (r"\\frac\{([0-9]+)\}\{([0-9]+)\}", r"\1/\2"),
    "short frac": (r"\\frac\{([0-9])\}\{([0-9])\}", r"\\frac\1\2"), "root sign": (r"\\sqrt\{([0-9]+)\}", r"√\1"),
    "cdot": (r"([0-9])\\sqrt", r"\1\\cdot\\sqrt"), "pi sign": (r"\\pi(?![a-z])", "π"), "infinity sign": (r"\\infty", "∞"),
    "cup sign": (r"\\cup", " ∪ "), "plus-minus sign": (r"\\pm", "±"), "left right": (r"^\((.*)\)$", r"\\left(\1\\right)"),
    "blank after comma": (r",(?! )(?=.*[)\]}]$)", ", "), "wide": (r"^\((.*),(.*)\)$", r"（\1，\2）"), "thousands": (r"^([0-9])([0-9]{3})$", r"\1,\2"),
    "thin thousands": (r"^([0-9])([0-9]{3})([0-9]{3})$", r"\1,\\! \2,\\! \3"), "Unicode square": (r"\^2", "²"), "quad": (r" \\quad ", ", "),
    "rows": (r" \\quad | \\\\\\\\ ", r" \\\\ "), "mirrored": (r"^([a-z])\\ge ([0-9]+)$", r"\2\\le \1"), "minus sign": (r"-", "−"),
    "set words": (r"^\\\{([-0-9]+),([-0-9]+)\\\}$", r"\2 \\text{ and } \1"), "braced base": (r"_([0-9])$", r"_{\1}"),
}  # fmt: skip


def respellings(found: list[Gold], draw: random.Random) -> Iterator[Case]:
    for gold in found:
        for name, (kind, form) in RESPELLINGS.items():
            if kind in ("", gold.kind) and not (gold.kind == "matrix" and name == "trailing blank"):
                yield rf"\boxed{{{form.format(gold.text)}}}", gold.text, name
        for name, (pattern, replacement) in REWRITES.items():
            other = re.sub(pattern, replacement, gold.text)
            if other != gold.text and not (name == "minus sign" and gold.kind == "word"):
                yield rf"\boxed{{{other}}}", gold.text, name


def suites(scale: float = 1.0, seed: int = 0) -> list[Suite]:
    """Every suite, made of about `2,000 * scale` gold answers."""
    draw = random.Random(seed)
    found = golds(int(2_000 * scale), draw)
    formulas = golds(int(2_500 * scale), draw, FORMULAS)
    shared = shared_answers()
    shared = draw.sample(shared, min(len(shared), int(300 * scale)))
    wrong = {"identities": identities, "case": case_mutations, "mutations": mutations}
    right = {"wrappings": wrappings, "matrices": matrices, "respellings": respellings}
    made = [Suite(name, False, list(make(found + formulas, draw))) for name, make in wrong.items()]
    made.append(Suite("crossed pairs", False, list(crossed(found + shared, draw, int(32_000 * scale)))))
    return made + [Suite(name, True, list(make(found + shared, draw))) for name, make in right.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full suites")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    result = {}
    for suite in suites(options.scale, options.seed):
        print(suite.run(), flush=True)
        result[suite.name] = {"cases": len(suite.cases), "wrong": len(suite.failures), "errors": suite.errors}
    print(json.dumps(result))


if __name__ == "__main__":
    main()

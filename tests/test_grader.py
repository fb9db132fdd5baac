"""The math grader: tables of answers by rule, real cases and golds, random and hostile strings."""

import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import SHARED, needs_data

import eval as grader
from data import read_log
from eval import answers_match, extract_answer

CASES, UNITS = (Path(__file__).with_name(f"grader_{name}.txt").read_text(encoding="utf-8")
                .splitlines() for name in ("cases", "units"))


@pytest.mark.parametrize("line", CASES)
def test_cases(line):
    """Verdicts written by hand before the grader was asked: "group: one side ≡ (or ≢) another"."""
    a, sign, b = re.fullmatch(r"[a-z ]+: (.*?) ?([≡≢]) ?(.*)", line).groups()
    assert answers_match(a, b) == answers_match(b, a) == (sign == "≡")


@pytest.mark.parametrize("number", ["9.8", r"4.5\times 10^{-3}", r"\frac{1}{2}\sqrt{3}"])
def test_a_missing_unit_is_forgiven_and_another_one_is_not(number):
    answers = [(rf"{number}\ {spelling}", unit) for unit in UNITS for spelling in unit.split(" ≡ ")]
    for a, unit in answers:
        assert answers_match(a, number) and answers_match(number, f"${a}.$"), a
        assert not answers_match(a, "9.7") and not answers_match(a, number + "+1"), a
    for i, (a, unit) in enumerate(answers):
        others = answers if number == "9.8" else answers[i:i + 3]
        for b, other in others:
            assert answers_match(a, b) == (unit == other), (a, b)


def test_repeating_decimals_by_long_division():
    for d in range(3, 60):
        digits, rests, rest = "", [], 1
        while rest and rest not in rests:
            rests.append(rest)
            digits, rest = digits + str(10 * rest // d), 10 * rest % d
        if rest:
            start = rests.index(rest)
            decimal = rf"2.{digits[:start]}\overline{{{digits[start:]}}}"
            assert answers_match(decimal, f"{2 * d + 1}/{d}"), decimal
            assert not answers_match(decimal, f"{2 * d + 2}/{d}"), decimal


# What a text commits itself to.
EXTRACTED = [
    (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"), (r"\boxed{1} and \boxed{2}", "2"),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"), (r"\boxed{1} \boxed{2", None),
    (r"\boxed{}", None), (r"\boxed{\text{a } \frac{1}{\sqrt{2}}}", r"\text{a } \frac{1}{\sqrt{2}}"),
    (r"in \boxed a", None), (r"Use \boxed to end. The answer is 4", "4"),
    # in words
    ("a\n#### 1,234\nb", "1,234"), ("**Answer:** 12", "12"), ("There is none", None), ("", None),
    ("The final answer is: $7$. I hope it is correct.", "7"), ("answer: (B)", "(B)"),
    ("The answer is 3.5 meters. Done.", "3.5 meters"), ("My answer = 15", "15"),
    ("The answer is .5", ".5"), ("The answer is **.5**.", ".5"), ("The answer is 5...", "5"),
    (r"The answer is $\$18.90$.", r"\$18.90"),
    ("So the answer is simply $x+1$.", "x+1"), ("Answer: (C) 12", "(C) 12"),
    ("Hence the answer is exactly 0.5 because it is half.", "0.5"),
    ("The final answer is equal to 3/4.", "3/4"),
    (r"The answer is, hence, \(\frac{1}{2}\).", r"\frac{1}{2}"),
    # formulas that belong together
    ("The final answer is $3$ and $4$.", "$3$ and $4$"),
    (r"Answer: \(2\), \(3\).", r"\(2\), \(3\)"),
    ("The answers are $1$, $2$, and $3$, as said", "$1$, $2$, and $3$, as said"),
    ("The answer is $x$ = 5.", "$x$ = 5"), ("The answer is $2$, because we add.", "2"),
    ("The answer is $2$ and we are done.", "2"), ("The answer is $5$ or so", "5"),
    # after thinking
    (r"<think>\boxed{1}", None), (r"<think>\boxed{1}</think> no", None),
    (r"<think>\boxed{1}</think> \boxed{2}", "2"), ("a</think>b</think>The answer is 3", "3"),
    # marks around an answer in a sentence
    ("The answer is: `18` apples", "18"), ("Answer: __18__ in all", "18"), ("**Answer: 18**", "18"),
    (r"\boxed{7}. As said, \boxed 2 times?", "7"), ("**Final answer:** 18", "18"),
]


@pytest.mark.parametrize("text, answer", EXTRACTED)
def test_extract(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize("form", [
    "{}", "${}$", "$${}$$", "$$\n{}\n$$", r"\({}\)", r"\[{}\]", "\\[\n{}\n\\]", "**{}**", "`{}`",
    "_{}_", "__{}__", "```\n{}\n```", "**`{}`**"])
def test_answers_in_displays_on_later_lines_and_in_markup(form):
    for answer in ("18", r"\frac{1}{2}", "x = -3", "1,234.5"):
        assert answers_match(form.format(answer) + ".", answer)
        for stated in ("The answer is", "The answer is:", "**Answer:**", "**Final Answer**\n",
                       "### Answer\n", "####", "So the answer is therefore"):
            for gap in (" ", "\n", "\n\n"):
                for end in ("", ".", "\n\nI hope it is correct.\n"):
                    text = "We add 7 and 11.\n\n" + stated + gap + form.format(answer) + end
                    assert extract_answer(text) == answer, text


@needs_data
def test_shared_cases():
    rows, wrong = read_log(f"{SHARED}/grader/cases.jsonl"), []
    for row in rows:
        pred = (extract_answer(row["pred"]) or "") if row["kind"] == "response" else row["pred"]
        verdicts = {answers_match(pred, row["gold"]), answers_match(row["gold"], pred)}
        if verdicts != {row["equal"]}:
            wrong.append(row)
    assert len(rows) == 210 and wrong == []


PIECES = r"""
\frac \sqrt \sqrt[3] \boxed{ { } ( ) [ ] \{ \} | , ; . = < \le \in \cup \pm ^ _ + - * / ! % $ ° '
& \\ and or \text{cm} cm 0 1 2 10 0.5 1,000 1e5 10_2 x y n a_1 f( e i \pi \infty \sin \log_2
\binom \choose \lfloor \rfloor \begin{pmatrix} \end{pmatrix} yes even \left \right \circ \x ` ²
\mathrm{m/s^2} per \mu
""".split()
LATEX = st.lists(st.sampled_from(PIECES), max_size=12).map(" ".join)


@settings(max_examples=400, deadline=None)
@given(LATEX | st.text(max_size=30), LATEX)
def test_any_strings(a, b):
    assert answers_match(a, b) == answers_match(b, a)
    assert answers_match(a, a) == bool(grader.tokenize(a))
    assert not answers_match("", a) and not answers_match("$$", a)
    extract_answer(a)


REPEATED = r"""
9 ( { [ 2^ 2^- - x! ! \frac \sqrt \sin , 1, (1,2), {1,2}, \pm | |x 1/ x^{999}+ (x+y)^{99} = 1= <x
a a_ _ \boxed{ \begin{pmatrix} \text{ \text{a} 1000! \binom{1000}{500} <think> $ x=1, 2^{999}/3+ '
1.5_ 0 x<1, f( 1+ x+ \{ é 1,000 ) \ " π^x x_1^9+ ` # \mathrm{m/s^2} \mathrm{m cm^2* ² \frac{ \[
""".split() + [" ", "\n", "1 ", "° ", "$1$ ", "answer ", "answer is ", "answer\n", "\\boxed ",
               " m/s", "\\mathrm{m ", '1 "m', "per ", "$$\n"]
HOSTILE = [piece * (length // len(piece)) + end for piece in REPEATED
           for length, end in ((390, "1"), (990, "1"), (10**5, ""))]
HOSTILE += ["a is an arbitrary positive integer with [a) = 0",  # words where a name may stand
            "(" * 490 + "1" + ")" * 490, "(" * 190 + "1" + ")" * 190, r"10^{10^{10^{10}}}", "\0",
            "1e99999999999", "((((x!)!)!)!)!", "\ud800", "١٢", "²", "10^{400}"]


@pytest.mark.parametrize("i", range(len(HOSTILE)))
def test_hostile(i):
    """Neither an error nor much work: the bound on CPU time is generous."""
    for other in ("1", r"\pi", HOSTILE[i] + "+1", HOSTILE[i] + " "):
        start = time.process_time()
        answers_match(HOSTILE[i], other)
        extract_answer(HOSTILE[i])
        extract_answer("answer is " + HOSTILE[i])
        assert time.process_time() - start < 2  # the worst takes 0.5 s


def test_too_long_an_answer_equals_only_its_text():
    long = "+".join(f"x_{{{i}}}^{{999}}" for i in range(60))
    with pytest.raises(ValueError, match="too long"):
        grader.tokenize(long)
    assert answers_match(long, long) and not answers_match(long, long + "+0")

"""The math grader: tables of answers by rule, real cases and golds, random and hostile strings."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import SHARED, needs_data

import eval as grader
from data import read_log
from eval import answers_match, extract_answer

# Verdicts written by hand before the grader was asked. Between ‖ is a case, around ≡ its two sides.
EQUAL = r"""
latex: \dfrac{7}{12} ≡ \frac7{12} ‖ \left(\tfrac12\right) ≡ 0.5 ‖ $\sqrt 7$ ≡ \sqrt{7} ‖
    \boxed{\frac{5}{8}} ≡ 5/8 ‖ x\,y ≡ xy ‖ \\frac{3}{7} ≡ \frac37 ‖ \displaystyle 4\pi ≡ 4\pi ‖
    **17** ≡ 17 ‖ 7π ≡ 7\pi ‖ − 3 ≡ -3
rational: 3/4 ≡ 0.75 ‖ -\frac{2}{4} ≡ \frac{1}{-2} ‖ 007 ≡ 7 ‖ 2.5e-3 ≡ 2.5\times10^{-3} ‖
    -7./2 ≡ -3.5 ‖ \frac{1}{\frac{2}{3}} ≡ 1.5 ‖ 0 ≡ -0
decimal: 0.142857142857 ≡ \frac17 ‖ 3.14159265 ≡ \pi ‖ 0.666667 ≡ 2/3 ‖ .75 ≡ \frac{3}{4} ‖
    6.02\cdot10^{23} ≡ 6.02e23
mixed: 2\frac{1}{3} ≡ \frac73 ‖ 2 1/3 ≡ 7/3 ‖ -1\frac{1}{2} ≡ -1.5
percent: 35\% ≡ 35 ‖ 35% ≡ 0.35 ‖ 12.5 percent ≡ 12.5\% ‖ 0.08 ≡ $8 \%$
thousands: 1,234,567 ≡ 1234567 ‖ 2{,}500 ≡ 2500 ‖ \$4,800 ≡ 4800 ‖ 1\,000 ≡ 1000 ‖
    120, 345 ≡ 345, 120 ‖ 10080 ≡ 10,\!080
units: 15 cm ≡ 15 ‖ 8 apples ≡ 8 ‖ \frac{3}{2}\text{ hours} ≡ 1.5 ‖ 60° ≡ 60^{\circ} ‖ $3.50 ≡ 3.5 ‖
    5.4 cents ≡ 5.4 \text{ cents} ‖ $5$ hours ≡ 5 ‖
    1.07e16 \mathrm{photons} / \mathrm{pulse} ≡ 1.07e16 ‖ \text{12 apples} ≡ 12 ‖ 45\degree ≡ 45 ‖
    (45^{\circ}, 60^{\circ}) ≡ (45,60) ‖ \angle BEA_{1}=90 ≡ 90^\circ
signs: \pm 3 ≡ 3, -3 ‖ x=\pm\sqrt2 ≡ \sqrt2,-\sqrt2 ‖ \{2\pm i\} ≡ 2-i, 2+i ‖ -1 \pm 2 ≡ 1, -3 ‖
    x=4 \text{ or } x=-4 ≡ \pm4 ‖ \{-2, 1-\sqrt5, 1+\sqrt5\} ≡ \{1\pm\sqrt{5},-2\}
lists: \{1,2\} ≡ 2,1 ‖ 5 \text{ or } 6 ≡ 6, 5 ‖ 2; 3 ≡ 3,2 ‖ (1,2),(3,4) ≡ (3,4), (1,2) ‖
    x=1, x=2 ≡ 2, 1 ‖ x=1,y=2 ≡ (1,2) ‖ a=1,b=2;a=2,b=1 ≡ (2,1),(1,2) ‖ \emptyset ≡ \varnothing ‖
    \langle 1,2,3\rangle ≡ (1,2,3) ‖ P=(1,2) ≡ (1,2) ‖ 19, 0 and 1 ≡ $19,0,1$ ‖
    1, \frac{3 \pm \sqrt{21}}{2} ≡ $1$,$\frac{3 + \sqrt{21}}{2}$,$\frac{3 - \sqrt{21}}{2}$ ‖
    1, 1, 2 ≡ 1,2 ‖ $10^{100}$,$10^{1 / 100}$ ≡ 10^{1/100}, 10^{100}
intervals: (1,\infty) ≡ x>1 ‖ [2,5) ≡ 2\le x<5 ‖ x \in (0,1] ≡ (0,1] ‖
    (0,1)\cup(2,3) ≡ (2,3)\cup(0,1) ‖ x<-1 \text{ or } x>1 ≡ (-\infty,-1)\cup(1,\infty) ‖
    \mathbb{R} ≡ (-\infty,\infty) ‖ \{0\}\cup[1,2] ≡ [1,2]\cup\{0\} ‖ 7 \geq t > 0 ≡ (0,7]
matrices: \begin{bmatrix}1&2\\3&4\end{bmatrix} ≡ \begin{pmatrix}1 & 2\\ 3 & 4\\ \end{pmatrix} ‖
    \begin{pmatrix}0.5\\1\end{pmatrix} ≡ \left(\begin{array}{c}\frac12\\1\end{array}\right) ‖
    \left[\begin{array}{c}x+1\\2y\end{array}\right] ≡ \begin{pmatrix}1+x\\y+y\end{pmatrix}
bases: 10_2 ≡ 2 ‖ FF ≡ FF ‖ (12)_3 ≡ 12_3 ‖ 17_8 ≡ 1111_2
equations: y = 2x + 1 ≡ 2x - y + 1 = 0 ‖ x^2+y^2=4 ≡ 2x^2+2y^2-8=0 ‖ 5=x ≡ x=5 ‖ 2x+y<4 ≡ 4>y+2x ‖
    2+3=5 ≡ 5 ‖ m_{\max}=n^2 ≡ n^2 ‖ x\neq 2 ≡ 2\ne x ‖ \text{MR}=\text{SRMC} ≡ MR = SRMC ‖
    |r|=2 ≡ 2 ‖ x = 6 \cdot 2 = 12 ≡ 12 ‖ f^{-1}(x) = 3x ≡ 3x ‖ V=36\pi\approx 113.1 ≡ 36\pi ‖
    f(x)=x,f(x)=-x ≡ -x, x
expressions: (x+1)^2 ≡ x^2+2x+1 ‖ \sin 2t ≡ 2\sin t\cos t ‖ \log_2 8 ≡ 3 ‖ 2^{10} ≡ 1024 ‖
    \sqrt[3]{-8} ≡ -2 ‖ |x|^2 ≡ x^2 ‖ \frac{n!}{(n-1)!} ≡ n ‖ \binom{5}{2} ≡ 10 ‖
    \lfloor 7/2 \rfloor ≡ 3 ‖ \tan^{-1} 1 ≡ \frac{\pi}{4} ‖ e^{i\pi} ≡ -1 ‖ (3+4i)/5 ≡ 0.6+0.8i ‖
    sqrt(12) ≡ 2\sqrt3 ‖ 2*x**3 ≡ 2x^3 ‖ exp(2x) ≡ e^{2x} ‖
    \lceil\frac{n}{2}\rceil ≡ \left\lceil n/2\right\rceil ‖ 52!/50! ≡ 2652 ‖
    \frac{(2n)!}{(n!)^2} ≡ \binom{2n}{n} ‖ \sqrt{x^3} ≡ x\sqrt{x} ‖ \ln(xy) ≡ \ln x+\ln y ‖
    4^{1009} ≡ 2^{2018} ‖ -\tau\ln\Delta ≡ \tau \ln(1/\Delta) ‖ (-1)^{2n}x ≡ x ‖
    \arctan x ≡ \tan^{-1}(x)
words: Yes ≡ \text{yes} ‖ \text{(B)} ≡ B ‖ (D). ≡ D ‖ \text{The ellipse} ≡ ellipse ‖
    Not possible ≡ \text{not possible} ‖ The answer is $\boxed{9}$ ≡ 9 ‖
    Hence $x > 2$ holds. ≡ x>2 ‖ \sum_{k=1}^n k ≡ \sum_{k=1}^{n} k ‖ v^2_0 ≡ v_{0}^2 ‖
    \{x \mid x>3\} ≡ (3,\infty)
found later: 0.\overline{3} ≡ \frac13 ‖ 5 million ≡ 5000000 ‖ 6:4 ≡ 3:2 ‖ (-1)^{n+2} ≡ (-1)^n ‖
    0.00123457 ≡ \frac{1}{810}
"""
DIFFERENT = r"""
decimal: 1e-12 ≡ 0 ‖ 0.1 ≡ 0.10001 ‖ 0.333 ≡ 1/3 ‖ 3.14 ≡ \pi ‖ \frac{22}{7} ≡ \pi ‖
    10^{-5} ≡ 10^{-6} ‖ 100000000001 ≡ 100000000002 ‖ 2\frac13 ≡ \frac23 ‖ 2 3 ≡ 6 ‖
    10^{-12}\pi ≡ 2\pi 10^{-12} ‖ 5! ≡ 5 ‖ 1-10^{-17} ≡ 1 ‖ 0.999999 ≡ 1
thousands: 35\% ≡ 3.5 ‖ 1,234 ≡ 1.234 ‖ 12,34 ≡ 1234 ‖ (1,000) ≡ 1000 ‖ 5 cm - 3 ≡ 5 ‖ 1/2 % ≡ 50 ‖
    (7,\ 113) ≡ 7113 ‖ 32,348 ≡ 32, 349
lists: 1,2 ≡ 1,3 ‖ (1,2) ≡ (2,1) ‖ (1,2) ≡ [1,2] ‖ (1,2) ≡ 1,2 ‖ [1,2) ≡ (1,2] ‖ \pm 3 ≡ 3 ‖
    x<3 ≡ x>3 ‖ x=3 ≡ x<3 ‖ (0,1)\cup(2,3) ≡ (0,3) ‖ [1,2] ≡ \begin{pmatrix}1&2\end{pmatrix} ‖
    \begin{pmatrix}1\\2\end{pmatrix} ≡ \begin{pmatrix}1&2\end{pmatrix} ‖ x=1 ≡ y=1 ‖
    2x+y<4 ≡ 2x+y>4 ‖ x=1,y=2 ≡ (2,1) ‖ (3,1) ≡ 3 ‖ 2 ≡ 2,3 ‖ \emptyset ≡ 0
bases: 10_2 ≡ 10 ‖ 9_8 ≡ 9 ‖ 4343_6 ≡ 4343_7 ‖ 204_5 ≡ 2_5 04
expressions: x ≡ |x| ‖ x ≡ X ‖ \sqrt{x^2} ≡ x ‖ x^2 ≡ 2^x ‖ I(0) ≡ 0 ‖ x+1 ≡ x+1+10^{-30} ‖
    x-y=0 ≡ x+y=0 ‖ \lfloor x/100\rfloor ≡ 0 ‖ a_1 ≡ a_2 ‖ 0=0 ≡ x=x ‖ \frac{x}{y} ≡ \frac{y}{x} ‖
    n! ≡ (n+1)! ‖ 10^{10^{10^{10}}} ≡ 10^{10^{10^{11}}} ‖ e^x ≡ e^{-x} ‖ 1+2i ≡ 2+i ‖
    \sqrt{x+y} ≡ \sqrt x+\sqrt y ‖ (x-1)^2 ≡ (1-x)^3 ‖ \lfloor n/2\rfloor ≡ \lceil n/2\rceil ‖
    x' ≡ x ‖ \dot x ≡ x ‖ \binom{n}{3} ≡ \binom n2 ‖ 2xyz ≡ 2 ‖
    \sqrt{10^{20}+1}-10^{10} ≡ \sqrt{10^{20}+2}-10^{10} ‖ \ln(1+10^{-20}) ≡ 0 ‖
    \sin(10^{20}) ≡ \sin(10^{20}+1) ‖ (1+10^{-10})^{10^{10}} ≡ e ‖ 5, ≡ ‖ 2RC+R+C ≡ |2RC+R+C| ‖
    \frac14 ≡ \frac141 ‖ \lfloor\frac{2 n-1}{5}\rfloor ≡ \lfloor\frac{2 n+1}{5}\rfloor ‖
    \frac{1}{0} ≡ \frac{2}{0} ‖ \sin\pi ≡ 0 ‖ \sqrt2-\sqrt{2} ≡ 0 ‖ \tan\frac{\pi}{2} ≡ 1
words: Yes ≡ No ‖ (A) ≡ (B) ‖ 1 2 ≡ 12 ‖ east ≡ seat ‖ A ≡ a ‖ Yes ≡ 1
rational: 1/3 ≡ 0.3 ‖ 1/1000 ≡ 0 ‖ 99999999999999999999 ≡ 99999999999999999998
percent: 8% ≡ 0.8 ‖ 0.5% ≡ 0.5%5
units: 7 cents ≡ 7 dollars ‖ 5 in ≡ 5 min ‖ 15 cm^2 ≡ 15 cm^3 ‖ 30^\circ ≡ 60 ‖ 90^\circ ≡ \pi/2 ‖
    \sin 30^\circ ≡ \frac{\sqrt3}{2}
signs: 1\pm\sqrt{19} ≡ 1+\sqrt{19} ‖ \pm 1, 2 ≡ 1, 2
intervals: (-\infty,0] ≡ [0,\infty) ‖ x\ge5 ≡ 5 ‖ (1,\infty) ≡ (1,-\infty) ‖ \{1,2\} ≡ [1,2]
matrices: \begin{pmatrix}1&2\\3&4\end{pmatrix} ≡ \begin{pmatrix}1&3\\2&4\end{pmatrix}
equations: y=-2x ≡ 2x ‖ x^2=4 ≡ 4 ‖ x=12 ≡ x\ne 12 ‖ x-2y+z-1=0 ≡ x-2y+z+1=0 ‖ MR=SRMC ≡ SRAC=LRAC ‖
    f(n)=n ≡ f(n)>n ‖ x=2<3 ≡ x=3
found later: (-1)^n ≡ 1 ‖ \frac{1-(-1)^n}{2} ≡ 0 ‖ (-1)^n a_n ≡ a_n ‖ (-1)^{n+m} ≡ (-1)^n ‖
    5 million ≡ 5 ‖ 0.\overline{3} ≡ 0.\overline{6} ‖ 3.\overline{0} ≡ 0 ‖ 0.00005 ≡ e^{-10} ‖
    0.000000 ≡ \frac{1}{10000000} ‖ 1000.001 ≡ \sqrt{1000000} ‖ xy=6 ≡ 6 ‖ 3!! ≡ 720 ‖ 6:4 ≡ 6
"""


def cases(table):
    for line in re.sub(r"\n +", " ", table.strip()).split("\n"):
        group, _, pairs = line.partition(": ")
        for pair in pairs.split("‖"):
            a, b = pair.split("≡")
            yield pytest.param(a.strip(), b.strip(), id=f"{group}: {pair.strip()}")


@pytest.mark.parametrize("a, b", list(cases(EQUAL)))
def test_equal(a, b):
    assert answers_match(a, b) and answers_match(b, a)


@pytest.mark.parametrize("a, b", list(cases(DIFFERENT)))
def test_different(a, b):
    assert not answers_match(a, b) and not answers_match(b, a)


UNITS = r"""
\mathrm{m/s^2} ≡ \mathrm{m/s^{2}} ≡ \text{ m/s}^2 ≡ \mathrm{~m} / \mathrm{s}^{2} ≡ \text{m s}^{-2} ≡
    \mathrm{~m} \cdot \mathrm{s}^{-2} ≡ \frac{\mathrm{m}}{\mathrm{s}^2} ≡ \,\mathrm{m\,s^{-2}} ≡
    m/s^2 ≡ m/s² ≡ \text{ m·s⁻²} ≡ \text{ meters per second}^2 ≡ meters per square second
\text{km/h} ≡ \mathrm{~km} / \mathrm{h} ≡ km/h ≡ \text{kilometers per hour} ≡ km per hour
\mathrm{kJ/(mol \cdot K)} ≡ \mathrm{~kJ} /(\text { mole } \mathrm{K}) ≡
    \mathrm{kJ\,mol^{-1}\,K^{-1}}
\mathrm{cm}^{2} ≡ \text{ cm^2} ≡ \mbox{ cm}^2 ≡ square cm ≡ \text{ square centimeters} ≡ cm²
\mu \mathrm{m} ≡ \mathrm{\mu m} ≡ \text{ μm}
{ }^{\circ} \mathrm{C} ≡ ^\circ\text{C} ≡ °\mathrm{C}
\mathrm{k\Omega} ≡ \text{ k\Omega} ≡ \mathrm{k}\Omega
{\rm m/s} ≡ \unit{m/s} ≡ m/s
\AA ≡ Å ≡ \mathrm{\AA}
\mathrm{erg} \mathrm{s}^{-1} \mathrm{~cm}^{-2} ≡ \mathrm{erg/(s\ cm^2)} ≡
    \mathrm{erg\,s^{-1}\,cm^{-2}}
"""
UNITS = [unit.split(" ≡ ") for unit in re.sub(r"\n +", " ", UNITS.strip()).split("\n")]


@pytest.mark.parametrize("number", ["9.8", r"4.5\times 10^{-3}", r"\frac{1}{2}\sqrt{3}"])
def test_a_missing_unit_is_forgiven_and_another_one_is_not(number):
    answers = [(rf"{number}\ {spelling}", i) for i, unit in enumerate(UNITS) for spelling in unit]
    for a, unit in answers:
        assert answers_match(a, number) and answers_match(number, f"${a}.$"), a
        assert not answers_match(a, "9.7") and not answers_match(a, number + "+1"), a
    for i, (a, unit) in enumerate(answers):
        others = answers if number == "9.8" else answers[i:i + 3]
        for b, other in others:
            assert answers_match(a, b) == (unit == other), (a, b)


# What a text commits itself to.
EXTRACTED = [
    (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"), (r"\boxed{1} and \boxed{2}", "2"),
    (r"\fbox{x}", "x"), (r"\boxed{\{1,2\}}", r"\{1,2\}"), (r"\boxed{1} \boxed{2", None),
    (r"\boxed{}", None), (r"\boxed{\text{a } \frac{1}{\sqrt{2}}}", r"\text{a } \frac{1}{\sqrt{2}}"),
    # without braces a number, but no letter of prose
    (r"\boxed 5", "5"), (r"\boxed -3.5.", "-3.5"), (r"in \boxed a", None),
    (r"Use \boxed to end. The answer is 4", "4"), (r"With \fbox it is done", None),
    # in words
    ("a\n#### 1,234\nb", "1,234"), ("**Answer:** 12", "12"), ("There is none", None), ("", None),
    ("The final answer is: $7$. I hope it is correct.", "7"), ("answer: (B)", "(B)"),
    ("The answer is 3.5 meters. Done.", "3.5 meters"), ("My answer = 15", "15"),
    ("So the answer is simply $x+1$.", "x+1"), ("The final answer is equal to 3/4.", "3/4"),
    ("Hence the answer is exactly 0.5 because it is half.", "0.5"), ("Answer: (C) 12", "(C) 12"),
    (r"The answer is, hence, \(\frac{1}{2}\).", r"\frac{1}{2}"),
    # formulas that belong together
    ("The final answer is $3$ and $4$.", "$3$ and $4$"), (r"Answer: \(2\), \(3\).", r"\(2\), \(3\)"),
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

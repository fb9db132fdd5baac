"""The math grader: tables of answers by rule, real cases and gold answers, random and hostile strings."""

import json
import random
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import eval as grader
from eval import answers_match, extract_answer

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the public data sets are not here")

EQUAL = {
    "latex": [(r"\dfrac{7}{12}", r"\frac7{12}"), (r"\left(\tfrac12\right)", "0.5"),
              (r"$\sqrt 7$", r"\sqrt{7}"), (r"\frac9{11}", "9/11"), (r"\boxed{\frac{5}{8}}", "5/8"),
              (r"x\,y", "xy"), (r"\mathrm{e}^2", "e^2"), (r"\\frac{3}{7}", r"\frac37"), ("12.", "12"),
              (r"\displaystyle 4\pi", r"4\pi"), ("**17**", "17"), (r"\(\frac{2}{9}\)", "2/9"),
              ("7π", r"7\pi"), ("− 3", "-3")],
    "rational": [("3/4", "0.75"), (r"-\frac{2}{4}", r"\frac{1}{-2}"), ("007", "7"), ("1.50", "3/2"),
                 (r"\frac{6}{3}", "2"), ("2.5e-3", r"2.5\times10^{-3}"), ("1e3", "1000"), ("-7./2", "-3.5"),
                 ("100000000001", "100,000,000,001"), ("+4", "4")],
    "decimal": [("0.142857142857", r"\frac17"), ("3.14159265", r"\pi"), ("0.666667", "2/3"),
                ("1.41421356", r"\sqrt2")],
    "mixed": [(r"2\frac{1}{3}", r"\frac73"), ("2 1/3", "7/3"), (r"-1\frac{1}{2}", "-1.5"),
              (r"5 \frac34", "23/4")],
    "percent": [(r"35\%", "35"), ("35%", "0.35"), ("12.5 percent", r"12.5\%"), (r"\frac{1}{2}\%", "0.5%")],
    "thousands": [("1,234,567", "1234567"), (r"2{,}500", "2500"), (r"\$4,800", "4800"), (r"1\,000", "1000"),
                  ("120, 345", "345, 120")],
    "units": [("15 cm", "15"), (r"15\text{ cm}", "15 centimeters"), (r"30\mathrm{~km/h}", "30"),
              ("24 square units", "24"), (r"9\mbox{ in}^2", "9"), ("8 apples", "8"),
              (r"\frac{3}{2}\text{ hours}", "1.5"), (r"60^\circ", "60"), ("60°", r"60^{\circ}"),
              ("$3.50", "3.5"), ("7 dollars", r"\$7")],
    "signs": [(r"\pm 3", "3, -3"), (r"x=\pm\sqrt2", r"\sqrt2,-\sqrt2"), (r"\{2\pm i\}", "2-i, 2+i"),
              (r"-1 \pm 2", "1, -3")],
    "lists": [("1, 2, 3", "3, 2, 1"), (r"\{1,2\}", "2,1"), ("4 and 9", "4, 9"), (r"5 \text{ or } 6", "6, 5"),
              ("2; 3", "3,2"), ("(1,2),(3,4)", "(3,4), (1,2)"), ("x=1, x=2", "2, 1"), ("x=1,y=2", "(1,2)"),
              (r"(x,y)=(3,4)", "(3,4)"), ("a=1,b=2;a=2,b=1", "(2,1),(1,2)"), (r"\emptyset", r"\varnothing")],
    "intervals": [(r"(1,\infty)", r"x>1"), (r"[2,5)", r"2\le x<5"), (r"x \in (0,1]", r"(0,1]"),
                  (r"(-\infty,3]", "x <= 3"), (r"(0,1)\cup(2,3)", r"(2,3)\cup(0,1)"),
                  (r"x<-1 \text{ or } x>1", r"(-\infty,-1)\cup(1,\infty)"), ("3>x", "x<3"),
                  (r"\mathbb{R}", r"(-\infty,\infty)"), (r"[0.5,1]", r"[\frac12, 1]"),
                  (r"\{0\}\cup[1,2]", r"[1,2]\cup\{0\}")],
    "matrices": [(r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", r"\begin{pmatrix}1 & 2\\ 3 & 4\\ \end{pmatrix}"),
                 (r"\begin{pmatrix}0.5\\1\end{pmatrix}",
                  r"\left(\begin{array}{c}\frac12\\1\end{array}\right)")],
    "bases": [("10_2", "2"), (r"1011_{2}", "1011_2"), ("FF", "FF"), ("(12)_3", "12_3"), ("17_8", "1111_2")],
    "equations": [("y=2x+1", "2x+1"), ("y = 2x + 1", "2x - y + 1 = 0"), ("x^2+y^2=4", "2x^2+2y^2-8=0"),
                  ("5=x", "x=5"), ("f(x)=x^2", "x^2"), ("a_{n}=3n", "a_n = 3 n"), ("2x+y<4", "4>y+2x"),
                  (r"\angle ABC=40", "40"), ("2+3=5", "5"), (r"m_{\max}=n^2", "n^2"),
                  (r"\frac{AB}{CD}=2", "2"), (r"x\neq 2", r"2\ne x")],
    "expressions": [("(x+1)^2", "x^2+2x+1"), (r"\frac{a+b}{2}", r"\frac a2+\frac b2"),
                    (r"\sin 2t", r"2\sin t\cos t"), (r"\log_2 8", "3"), (r"\ln e^3", "3"), ("2^{10}", "1024"),
                    (r"\sqrt[3]{-8}", "-2"), (r"|x|^2", "x^2"), (r"\frac{n!}{(n-1)!}", "n"),
                    (r"\binom{5}{2}", "10"), (r"\lfloor 7/2 \rfloor", "3"), (r"\cos^2 x", r"1-\sin^2 x"),
                    (r"\tan^{-1} 1", r"\frac{\pi}{4}"), (r"e^{i\pi}", "-1"), ("(3+4i)/5", "0.6+0.8i"),
                    ("sqrt(12)", r"2\sqrt3"), (r"\sqrt{ab}", r"\sqrt a\sqrt b"),
                    ("2*x**3", "2x^3"), (r"\log xy", r"\log x+\log y"),
                    ("exp(2x)", r"e^{2x}"), ("3ab", "3 b a"),
                    (r"\lceil\frac{n}{2}\rceil", r"\left\lceil n/2\right\rceil"),
                    (r"\frac{1}{1+\sqrt2}", r"\sqrt2-1"), ("52!/50!", "2652")],
    "words": [("Yes", r"\text{yes}"), (r"\text{(B)}", "B"), ("(D).", "D"), ("No", "no"),
              (r"\text{The ellipse}", "ellipse"), ("Not possible", r"\text{not possible}"),
              ("The answer is $\\boxed{9}$", "9"), ("Hence $x > 2$ holds.", "x>2"), ("odd", r"\textbf{Odd}"),
              (r"\sum_{k=1}^n k", r"\sum_{k=1}^{n} k"), ("v^2_0", "v_{0}^2"),
              (r"\{x \mid x>3\}", r"(3,\infty)")],
}
DIFFERENT = {
    "numbers": [("1e-12", "0"), ("0.1", "0.10001"), ("0.333", "1/3"), ("3.14", r"\pi"),
                (r"\frac{22}{7}", r"\pi"), ("10^{-5}", "10^{-6}"), ("-3", "3"), ("0.1250001", "1/8"),
                ("100000000001", "100000000002"), (r"2\frac13", r"\frac23"), ("1.99999999", "2"),
                ("2 3", "6"), (r"10^{-12}\pi", r"2\pi 10^{-12}"), ("5!", "5"), (r"\sqrt{2}", "1.414")],
    "marks": [(r"35\%", "3.5"), ("1,234", "1.234"), ("12,34", "1234"), ("10,200", "10,020"),
              ("(1,000)", "1000"), ("5 cm", "5 kg"), ("5 cm - 3", "5"), ("1/2 %", "50"),
              (r"(7,\ 113)", "7113"), ("v^2_0", "v^2"), ("100,200", "100,300")],
    "shapes": [("1,2", "1,3"), ("1,2", "1,2,3"), ("(1,2)", "(2,1)"), ("(1,2)", "[1,2]"), ("(1,2)", "1,2"),
               ("[1,2)", "(1,2]"), (r"\pm 3", "3"), ("(1,2,3)", "(1,3,2)"), ("x<3", "x>3"), ("x<3", "y<3"),
               ("x<3", r"x\le 3"), ("x=3", "x<3"), (r"(0,1)\cup(2,3)", "(0,3)"), (r"\{1,2\},\{3\}", "1,2,3"),
               ("[1,2]", r"\begin{pmatrix}1&2\end{pmatrix}"),
               (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"), (r"x\ne 2", "x=2"),
               ("x=1", "y=1"), ("2x+y<4", "2x+y>4"), ("x=1,y=2", "(2,1)")],
    "bases": [("10_2", "10"), ("10_2", "10_3"), ("12_3", "12_4"), ("9_8", "9")],
    "expressions": [("x", "|x|"), ("x", "y"), ("x", "X"), (r"\sqrt{x^2}", "x"), ("x^2", "2^x"),
                    ("f(x)", "f(y)"), ("I(0)", "0"), ("x+1", "x+1+10^{-30}"), ("x^2+y^2=1", "1"),
                    ("x-y=0", "x+y=0"), (r"\lfloor x/100\rfloor", "0"), ("a_1", "a_2"),
                    (r"\sin x", r"\cos x"), ("2x", "2"), (r"\binom{n}{2}", r"\binom{n}{3}"), ("0=0", "x=x"),
                    (r"\frac{x}{y}", r"\frac{y}{x}"), ("n!", "(n+1)!"), (r"x^{2018}", "x^{2019}"),
                    (r"10^{10^{10^{10}}}", r"10^{10^{10^{11}}}"), ("6+9i", "6-9i"), ("e^x", "e^{-x}")],
    "lost digits": [(r"\sin\pi", "0"), (r"\sqrt2-\sqrt{2}", "0"), (r"\tan\frac{\pi}{2}", "1")],
    "words": [("Yes", "No"), ("(A)", "(B)"), ("1 2", "12"), ("dog bites man", "man bites dog"),
              ("even", "odd"), ("east", "seat"), ("5 apples", "6 apples"), ("A", "a"), ("cat", "act"),
              ("", ""), ("$$", "$$")],
}


# A second table, its verdicts written down before the grader was asked.
MORE_EQUAL = {
    "rational": [(r"\frac{-7}{21}", r"-\frac13"), ("-5/10", "-0.5"), (r"\dfrac{18}{4}", "4.5"), ("3.0", "3"),
        (r"\frac{1}{\frac{2}{3}}", "1.5"), (r"-\dfrac{5}{-6}", "5/6"), ("1/8", ".125"), ("0", "-0"),
        (r"$\frac{14}{3}.$", r"\frac{14}{3}"), ("(2/3)", "2/3"), ("6/4", r"1\frac12")],
    "decimal": [("2.718281828", "e"), ("0.3333333", r"\frac13"), ("12.0000", "12"),
        ("1.732051", r"\sqrt{3}"), (".75", r"\frac{3}{4}"), (r"6.02\cdot10^{23}", "6.02e23"),
        ("1.5e-3", "0.0015")],
    "mixed": [(r"3\frac{2}{5}", "3.4"), (r"-2\frac14", "-9/4"), ("7 3/8", r"7\frac38"),
        (r"12\dfrac{1}{2}", "25/2")],
    "percent": [(r"62.5\%", "62.5"), ("0.08", r"$8 \%$"), ("17.5%", r"17.5\%"), (r"$50\%$", r"\frac12"),
        ("40 percent", "0.4")],
    "thousands": [("58{,}500", "58,500"), ("10080", r"10,\!080"), (r"\$32,348", r"\$32,\!348"),
        ("1,000,000", "10^6"), (r"2\,400", "2400"), ("-1,250", "-1250"), ("12,345.6", "12345.6")],
    "units": [("5.4 cents", r"5.4 \text{ cents}"), ("864", r"864 \mbox{ inches}^2"),
        (r"15 \text{ cm}^2", r"15\mbox{ cm}^2"), ("12 in", "12 inches"),
        (r"\frac{270}{7}^\circ", r"\frac{270}7\text{ degrees}"), ("1.6", r"1.6 \mathrm{~cm}"),
        (r"300\ \mathrm{km/s}", "300"), (r"100 \mathrm{rad} / \mathrm{s}", "100"),
        ("24 feet", r"24\text{ ft}"), ("$5$ hours", "5"),
        (r"1.07e16 \mathrm{photons} / \mathrm{pulse}", "1.07e16"), ("7 square units", "7"),
        (r"15\text{ square centimeters}", r"15\text{ cm}^2"), (r"\text{12 apples}", "12")],
    "degrees": [(r"30^{\circ}", r"30^\circ"), ("120 degrees", r"120^\circ"), (r"45\degree", "45"),
        (r"(45^{\circ}, 60^{\circ})", "(45,60)"), (r"\angle BEA_{1}=90", r"90^\circ")],
    "pm": [(r"x=\{1\pm\sqrt{5},-2\}", r"\{1\pm\sqrt{5},-2\}"), (r"x\in\{\pm1,0\}", "-1,0,1"),
        (r"3 + 2\sqrt{2}, 3 - 2\sqrt2", r"3 \pm 2 \sqrt{2}"), (r"\pm\frac{1}{2}", "-0.5, 0.5"),
        (r"x = \pm 4", "x=4, x=-4"), (r"x=4 \text{ or } x=-4", r"\pm4"),
        (r"\{-2, 1-\sqrt5, 1+\sqrt5\}", r"\{1\pm\sqrt{5},-2\}"),
        (r"\frac{-1\pm\sqrt{5}}{2}", r"\frac{\sqrt5-1}{2}, -\frac{1+\sqrt5}{2}")],
    "intervals": [(r"\left(2,\infty\right)", r"(2,+\infty)"), ("x>2", r"(2,\infty)"),
        ("-2 <= x <= 7", r"x \in [-2,7]"), (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty)\cup(-\infty,2)"),
        (r"\left(\tfrac35,\tfrac83\right]", r"\left(\frac{3}{5},\frac{8}{3}\right]"),
        (r"[\frac{\pi^2}{8},1.25\pi^2]", r"\left[ \frac{\pi^2}{8}, \frac{5 \pi^2}{4} \right]"),
        (r"k\ge 2", r"$k \geqslant 2$"), (r"0 < x < 9 \text{ or } 9<x<36", r"(0,9) \cup (9,36)"),
        (r"x\in\mathbb{R}", r"\mathbb R"), (r"7 \geq t > 0", "(0,7]")],
    "tuples": [(r"\left(3,\frac{\pi}{2}\right)", "(3, pi/2)"), ("(x,y)=(2,4)", r"\left(2,4\right)"),
        ("x=-1, y=6", "(-1,6)"), (r"\left(\frac32,-13\right)", "(1.5,-13)"), ("(8,-2)", "( 8 , -2 )"),
        ("(3,2), (1,1)", "$(1,1), (3,2)$"), (r"\langle 1,2,3\rangle", "(1,2,3)"),
        (r"$(4, \log _{10} 2)$", r"(4,\log_{10}2)"), ("(1,2) and (3,4)", "(3,4),(1,2)"),
        ("P=(1,2)", "(1,2)")],
    "sets": [("3,5,7", r"\{7,5,3\}"), (r"\{2\}", "2"), ("19, 0 and 1", "$19,0,1$"),
        ("$69$ and $84$", "$69$,$84$"),
        (r"1, \frac{3 \pm \sqrt{21}}{2}", r"$1$,$\frac{3 + \sqrt{21}}{2}$,$\frac{3 - \sqrt{21}}{2}$"),
        ("a=2, a=5", "5,2"), (r"\{(1,2),(2,1)\}", "(2,1),(1,2)"), ("1;2;3", "1,2,3"), ("1, 1, 2", "1,2"),
        (r"\varnothing", r"\emptyset"), ("2400,1350,864", "2400, 1350, 864"),
        ("$10^{100}$,$10^{1 / 100}$", "10^{1/100}, 10^{100}")],
    "matrices": [(r"\begin{bmatrix}-7\\16\\5\end{bmatrix}", r"\begin{pmatrix} -7 \\ 16 \\ 5 \end{pmatrix}"),
        (r"\begin{pmatrix}0.2\\-3.6\end{pmatrix}", r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}"),
        (r"A = \begin{pmatrix}-1&0\\0&-1\end{pmatrix}", r"\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}"),
        (r"\left[\begin{array}{c}x+1\\2y\end{array}\right]", r"\begin{pmatrix}1+x\\y+y\end{pmatrix}")],
    "bases": [("4343_{6}", "4343_6"), ("52_{8}", "52_8"), ("$40_9$", "40_{9}"), ("(2516)_8", "2516_8")],
    "prefixes": [("y=-2x", "y = -2x"), ("-2x", "y = -2x"), ("f(n) = n^2", "n^2"), ("a_n=2^n-1", "2^n - 1"),
        (r"p(x)=\frac{(x-1)(x-2)}{6}", r"\frac{x^2-3x+2}{6}"), ("k = n+1", "n+1"), ("m=7", "7"),
        (r"\theta = \frac{\pi}{3}", r"\pi/3"), ("AB=5", "5"), ("|r|=2", "2"),
        (r"\frac{dx}{dt} = kx - a", "kx-a"), ("M = 2^{N-2}+1", "1+2^{N-2}"), ("e = 1/2", "0.5"),
        (r"x = 6 \cdot 2 = 12", "12"), (r"\cos A = \frac45", "0.8"), ("f^{-1}(x) = 3x", "3x"),
        (r"V=36\pi\approx 113.1", r"36\pi"), (r"\sqrt{2}\approx1.414", r"\sqrt2"),
        ("f(x)=x,f(x)=-x", "-x, x")],
    "equations": [("5x - 7y + 11z + 4 = 0", "-5x+7y-11z=4"), ("y=2x+3", "2x-y=-3"),
        ("x^2+y^2=25", r"\frac{x^2}{25}+\frac{y^2}{25}=1"), ("3x+2y<6", "6>2y+3x"),
        (r"\text{MR}=\text{SRMC}", "MR = SRMC"), (r"x \neq 3", r"x\ne3")],
    "text": [("Evelyn", r"\text{evelyn}"), (r"\text{(C)}", "C"), ("(E)", r"\textbf{E}"),
        ("B.", r"\text{(B)}"), ("ellipse", r"\text{ellipse}"), (r"\mathrm{Even}", "even"),
        (r"\text{ no solution }", "No solution"), ("the circle", "circle")],
    "expressions": [("6r^2 - 4(r+6)", "6r^2-4r-24"), (r"\frac{n(n+1)(2n+1)}{6}", r"\frac{2n^3+3n^2+n}{6}"),
        (r"\frac{1}{2(n+1)}", r"\frac{1}{2 n+2}"),
        (r"2\cos(\pi t+\frac{\pi}{3})", r"2 \cos (\pi t+\pi / 3)"), ("e^{-2t}/15", r"\frac{e^{-2 t}}{15}"),
        (r"\frac{t\sin 2t}{4}", r"\frac{t}{4} \sin (2 t)"), (r"\frac{(2n)!}{(n!)^2}", r"\binom{2n}{n}"),
        (r"\lfloor n/2\rfloor", r"\left\lfloor\frac{n}{2}\right\rfloor"),
        (r"-8(1+\sqrt3 i)", r"-8-8 \sqrt{3} i"), ("9i+6", "6+9i"), (r"\cot x", r"\frac{\cos x}{\sin x}"),
        (r"\sqrt{x^3}", r"x\sqrt{x}"), (r"2^{n}\cdot 2", "2^{n+1}"), (r"\ln(xy)", r"\ln x+\ln y"),
        (r"\sqrt[3]{16}", r"2\sqrt[3]{2}"), (r"\frac{\sqrt{3}}{3}", r"1/\sqrt3"), ("4^{1009}", "2^{2018}"),
        (r"\frac{11(1+\sqrt5)}{1}", r"11 \sqrt{5} + 11"), (r"-\tau\ln\Delta", r"\tau \ln(1/\Delta)"),
        (r"\omega_n^2 e^{-\zeta\omega_n t}", r"e^{-\zeta \omega_{n} t} \omega_{n}^{2}"), ("(p-q)", "p - q"),
        (r"\frac{4A}{3(1+i)}e^{it}", r"\frac{4 A}{3+3 i} e^{i t}"), (r"\frac{1}{\sqrt2-1}", r"\sqrt2+1"),
        ("(-1)^{2n}x", "x"), (r"\log_3 81", "4"), (r"\arctan x", r"\tan^{-1}(x)"), ("2x(y+1)", "2xy+2x"),
        ("I(0)e^{-t/(RC)}", r"I(0) e^{-\frac{t}{R C}}"), (r"\sin^2\theta+\cos^2\theta", "1")],
}
MORE_DIFFERENT = {
    "rational": [(r"\frac{3}{7}", r"\frac{7}{3}"), ("1/3", "0.3"), ("0.33", r"\frac13"),
        (r"\frac{14}{3}", "14"), ("-1/2", "1/2"), ("1/1000", "0"),
        ("99999999999999999999", "99999999999999999998")],
    "decimal": [("0.67", "2/3"), ("3.1416", r"\pi"), ("1.41", r"\sqrt2"), ("2.5", "2.50001"),
        ("0.1", "0.01"), ("1.20", "1.02"), ("1-10^{-17}", "1"), ("10^{-20}", "0"), ("1e-300", "0"),
        ("0.999999", "1")],
    "mixed": [(r"3\frac{2}{5}", "6/5"), (r"2\frac14", r"2\frac15")],
    "percent": [("8%", "0.8"), ("0.5%", "0.5%5"), ("20%", "2"), ("150%", "15")],
    "thousands": [("58,500", "58.5"), ("(10,080)", "10080"), ("32,348", "32, 349"), ("1,23", "123"),
        ("(2,400)", "2400")],
    "units": [("5 hours", "5 minutes"), ("3 cm", "3 m"), ("12 inches", "12 feet"), ("7 cents", "7 dollars"),
        ("5 in", "5 min"), ("4 m", "4 miles"), ("15 cm^2", "15 cm^3"), ("12 apples", "21 apples")],
    "degrees": [(r"30^\circ", "60"), (r"90^\circ", r"\pi/2"), (r"\sin 30^\circ", r"\frac{\sqrt3}{2}")],
    "pm": [(r"\pm 4", "-4"), (r"1\pm\sqrt{19}", r"1+\sqrt{19}"), (r"1\pm\sqrt{19}", r"1\pm\sqrt{17}"),
        (r"\pm 1, 2", "1, 2")],
    "intervals": [("(3,4)", "(3,4]"), (r"(2,\infty)", r"[2,\infty)"), (r"(-\infty,0]", r"[0,\infty)"),
        (r"(0,9)\cup(9,36)", "(0,36)"), (r"x\ge5", "5"), ("x<5", "5"), (r"(1,\infty)", r"(1,-\infty)"),
        ("1<x<2", r"1\le x<2"), (r"\{1,2\}", "[1,2]")],
    "tuples": [("(2,4)", "(4,2)"), ("(1,2,3)", "(1,2)"), ("(1,2),(3,4)", "(1,2)"), ("(3,1)", "3"),
        ("(1,1),(3,2)", "(1,1),(2,3)"), ("(x,y)=(2,4)", "(x,y)=(4,2)"), ("(15,-29)", "(-15,29)")],
    "sets": [("1,3,5", "1,3"), ("2", "2,3"), (r"\{1,2\}", r"\{1,3\}"), (r"\emptyset", "0"), ("1,2,3", "6"),
        ("-2,0,2", "-2,2")],
    "matrices": [(r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\\3\end{pmatrix}"),
        (r"\begin{pmatrix}1\end{pmatrix}", r"\begin{pmatrix}2\end{pmatrix}")],
    "bases": [("4343_6", "4343"), ("4343_6", "4343_7"), ("52_8", "53_8"), ("204_5", "2_5 04")],
    "prefixes": [("y=-2x", "2x"), ("x=5", "y=5"), ("f(n)=n^2", "n^3"), ("x^2=4", "4"), ("2x=4", "4"),
        ("x/2=5", "5"), ("AB=5", "AB=6"), ("m=7", "n=7"), ("x=12", r"x\ne 12")],
    "equations": [("x^2+y^2=25", "x^2+y^2=5"), ("y=2x+3", "y=3x+2"), ("x+y=1", "1"), ("2x+y<4", r"2x+y\le4"),
        ("x-2y+z-1=0", "x-2y+z+1=0"), ("MR=SRMC", "SRAC=LRAC"), ("N=n", "N>n"), ("f(n)=n", "f(n)>n"),
        ("x=2<3", "x=3")],
    "text": [("Evelyn", "Navin"), ("even", "odd"), ("(C)", "(D)"), ("east", "west"), ("ellipse", "circle"),
        ("Yes", "1"), (r"\text{None}", "0"), ("A", "B"), ("no solution", "solution")],
    "expressions": [("p-q", "q-p"), ("6r^2-4r-24", "6r^2-4r+24"), (r"\sin x", r"\sin y"), ("2^n", "n^2"),
        (r"\frac{n(n+1)}{2}", r"\frac{n(n-1)}{2}"), (r"\cos(2t)", r"\cos(t)"), ("n", "2n"), ("1+2i", "2+i"),
        (r"\ln x", r"\log_{10}x"), (r"\sqrt{x+y}", r"\sqrt x+\sqrt y"), ("(x-1)^2", "(1-x)^3"),
        (r"\lfloor n/2\rfloor", r"\frac n2"), (r"\lfloor n/2\rfloor", r"\lceil n/2\rceil"),
        ("2^{2017}", "2^{2018}"), ("I(0)", "I"), ("x'", "x"), ("x''", "x'"), (r"\dot x", "x"),
        (r"\dot x", r"\ddot x"), (r"\binom{n}{3}", r"\binom n2"), ("C_1 e^t", "C_2 e^t"),
        ("x_1+x_2", "x_1+x_3"), (r"\sum_{k=1}^n k", r"\sum_{k=1}^m k"), ("2xyz", "2"), (r"\sin\pi", "1"),
        (r"\sqrt{10^{20}+1}-10^{10}", r"\sqrt{10^{20}+2}-10^{10}"), (r"\ln(1+10^{-20})", "0"),
        (r"\sin(10^{20})", r"\sin(10^{20}+1)"), (r"\cos(10^{17})", r"\cos(10^{17}+3)"),
        ("10^{10^{10^{10}}}", "10^{10^{10^{9}}}"), ("-x", "|x|"),
        (r"\frac{\pi^2-9}{9}", r"\frac{\pi^2+9}{9}"), ("(1+10^{-10})^{10^{10}}", "e"), ("5,", ""),
        ("2RC+R+C", "|2RC+R+C|"), (r"\frac14", r"\frac141"),
        (r"\lfloor\sqrt{n-1}\rfloor", r"\lfloor\sqrt{n-2}\rfloor"),
        (r"\lfloor\frac{2 n-1}{5}\rfloor", r"\lfloor\frac{2 n+1}{5}\rfloor"),
        (r"\frac{1}{0}", r"\frac{2}{0}")],
}


def table(groups):
    return [pytest.param(*case, id=f"{group}: {case}") for group, cases in groups.items() for case in cases]


@pytest.mark.parametrize("a, b", table(EQUAL) + table(MORE_EQUAL))
def test_equal(a, b):
    assert answers_match(a, b) and answers_match(b, a)


@pytest.mark.parametrize("a, b", table(DIFFERENT) + table(MORE_DIFFERENT))
def test_different(a, b):
    assert not answers_match(a, b) and not answers_match(b, a)


EXTRACTED = [
    (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"), (r"\boxed{1} and \boxed{2}", "2"), (r"\fbox{x}", "x"),
    (r"\boxed 5", "5"), (r"\boxed{\{1,2\}}", r"\{1,2\}"), (r"\boxed{1} \boxed{2", None), (r"\boxed{}", None),
    ("#### 18", "18"), ("a\n#### 1,234\nb", "1,234"),
    ("The final answer is: $7$. I hope it is correct.", "$7$"), ("**Answer:** 12", "12"),
    ("The answer is 3.5 meters. Done.", "3.5 meters"), ("answer: (B)", "(B)"),
    ("The final answer is\n$$5$$", "$$5$$"), ("There is none", None), ("", None), (r"<think>\boxed{1}", None),
    (r"<think>\boxed{1}</think> no", None), (r"<think>\boxed{1}</think> \boxed{2}", "2"),
    (r"a</think>b</think>The answer is 3", "3"),
    ("The answer is therefore 12", "12"),
    ("So the answer is simply $x+1$.", "$x+1$"),
    ("The answer is thus: 7.", "7"),
    ("The final answer is equal to 3/4.", "3/4"),
    ("Hence the answer is exactly 0.5 because it is half.", "0.5"),
    (r"The answer is, hence, \(\frac{1}{2}\).", r"\(\frac{1}{2}\)"),
    ("Answer: (C) 12", "(C) 12"),
    (r"\boxed{\text{a } \frac{1}{\sqrt{2}}}", r"\text{a } \frac{1}{\sqrt{2}}"),
    (r"\boxed{ 5 }", "5"),
    (r"I think \boxed{3}. No: \boxed{4}.</think>Done: \boxed{4}", "4"),
    ("My answer = 15", "15"),
    ("answers are 3 and 4.", "3 and 4"),
    (r"\boxed{x \mid x \in \{1, 2\}}", r"x \mid x \in \{1, 2\}"),
    ("the answer is thusly", "thusly"),
]


@pytest.mark.parametrize("text, answer", EXTRACTED)
def test_extract(text, answer):
    assert extract_answer(text) == answer


KNOWN_DIFFERENT = {}  # index of a shared case: why its label is not followed


@needs_data
def test_shared_cases():
    rows = [json.loads(line) for line in (SHARED / "grader/cases.jsonl").read_text().split("\n") if line]
    wrong = []
    for i, row in enumerate(rows):
        pred = (extract_answer(row["pred"]) or "") if row["kind"] == "response" else row["pred"]
        verdicts = {answers_match(pred, row["gold"]), answers_match(row["gold"], pred)}
        wrong += [i] if verdicts != {row["equal"]} else []
    print(f"{1 - len(wrong) / len(rows):.1%} of {len(rows)} cases")
    assert set(wrong) == set(KNOWN_DIFFERENT)


def gold_answers():
    for name in ("math500", "aime24", "amc23", "minerva_math", "olympiadbench"):
        for line in (SHARED / f"math/{name}.jsonl").read_text().split("\n"):
            row = json.loads(line) if line else {}
            if "final_answer" in row:
                yield row["final_answer"][0]
            elif row:
                yield str(row["answer"]) if "answer" in row else grader.last_boxed(row["solution"])


@needs_data
def test_golds_match_themselves_and_nothing_else():
    golds = list(gold_answers())
    assert len(golds) == 1517
    for gold in golds:  # spread out, so that the same text is not simply seen to be the same
        assert answers_match(gold, f"$\\boxed{{ {gold.strip('$ ')} }}$"), gold
    rng, distinct = random.Random(0), sorted(set(golds))
    found = [pair for pair in (rng.sample(distinct, 2) for _ in range(4000)) if answers_match(*pair)]
    assert all(float(a) == float(b) for a, b in found)  # 27.0 and 27


PIECES = (
    r"\frac \sqrt \sqrt[3] \boxed{ { } ( ) [ ] \{ \} | , ; . = < \le \in \cup \pm ^ _ + - * / ! % $ ° ' &"
    r" \\ and or \text{cm} cm 0 1 2 10 0.5 1,000 1e5 10_2 x y n a_1 f( e i \pi \infty \sin \log_2 \binom"
    r" \choose \lfloor \rfloor \begin{pmatrix} \end{pmatrix} yes even \left \right \circ \x").split()
LATEX = st.lists(st.sampled_from(PIECES), max_size=12).map(" ".join)


@settings(max_examples=800, deadline=None)
@given(LATEX | st.text(max_size=30), LATEX)
def test_any_strings(a, b):
    assert answers_match(a, b) == answers_match(b, a)
    assert answers_match(a, a) == bool(grader.tokenize(grader.bare_answer(a)))
    assert not answers_match("", a)
    extract_answer(a)


ATOM = st.sampled_from(["x", "y", "2", "3", "0.5", r"\pi", r"\frac{1}{3}", r"\sqrt{2}", "x_1", r"\sin x",
                        "e^{2}"])
EXPRESSION = st.recursive(ATOM, lambda e: st.one_of(
    st.tuples(e, e).map("({0[0]}) + {0[1]}".format), st.tuples(e, e).map("({0[0]}) ({0[1]})".format),
    e.map("({})^2".format)), max_leaves=6)


@settings(max_examples=200, deadline=None)
@given(EXPRESSION)
def test_expressions_equal_themselves_rewritten(e):
    assert answers_match(e, f"{e} + 0") and answers_match(f"2({e})", f"({e}) + ({e})")
    assert not answers_match(e, f"({e}) + 1") and not answers_match(e, f"1.00001({e})")


REPEATED = [
    "9", "(", "{", "[", "2^", "2^-", "-", "x!", "!", r"\frac", r"\sqrt", r"\sin", ",", "1,", "(1,2),",
    "{1,2},", r"\pm", "|", "1/", "x^{999}+", "(x+y)^{99}", "=", "1=", "<x", r"\boxed{", r"\begin{pmatrix}",
    "answer ", "answer is ", r"\text{", r"\text{a}", "1000!", r"\binom{1000}{500}", "a", "<think>", "$", " ",
    "x=1,", "2^{999}/3+", "1 ", "_", "a_", "'", "1.5_", "0", "x<1,", "f(", "1+", "x+", r"\{", "é", "1,000",
    ")", "\\",
    '"', "° ", "π^x", "x_1^9+", "$1$ "]
HOSTILE = [piece * (length // len(piece)) + end for piece in REPEATED
           for length, end in ((990, "1"), (10**5, ""))]
HOSTILE += ["a is an arbitrary positive integer with [a) = 0",  # words where a name may stand, and a bracket
            "(" * 490 + "1" + ")" * 490, r"10^{10^{10^{10}}}", "1e99999999999", "((((x!)!)!)!)!",
            "\0", "\ud800", "١٢", "²", "10^{400}"]


@pytest.mark.parametrize("i", range(len(HOSTILE)))
def test_hostile(i):
    """Neither an error nor much work: CPU time is bounded (generously, the machine may be shared)."""
    for other in ("1", r"\pi", HOSTILE[i] + "+1", HOSTILE[i] + " "):
        start = time.process_time()
        answers_match(HOSTILE[i], other)
        extract_answer(HOSTILE[i])
        assert time.process_time() - start < 2  # the worst takes 0.035 s; unbounded work takes for ever


def test_too_long_an_answer_equals_only_its_text():
    long = "+".join(f"x_{{{i}}}^{{999}}" for i in range(60))
    with pytest.raises(ValueError, match="too long"):
        grader.tokenize(long)
    assert answers_match(long, long) and not answers_match(long, long + "+0")


DIFFERENT = [
    (r"(-1)^n", "1"), (r"(-2)^n", "2^n"), (r"\frac{1-(-1)^n}{2}", "0"), (r"(-1)^n a_n", "a_n"),
    (r"(-1)^{n-1}", "-1"), (r"(-1)^{n+m}", "1"), (r"(-1)^{n+m}", r"(-1)^n"), ("5 million", "5"),
    (r"0.\overline{3}", r"0.\overline{6}"), (r"3.\overline{0}", "0"), ("0.00005", r"e^{-10}"),
    ("0.000000", r"\frac{1}{10000000}"), ("0.000001", r"\frac{1}{600000}"), ("0.142858", r"\frac17"),
    ("1000.001", r"\sqrt{1000000}"), ("xy=6", "6"), ("3!!", "720"), ("6:4", "6")]
EQUAL = [
    (r"0.\overline{3}", r"\frac13"), (r"0.1\overline{6}", r"\frac16"), ("5 million", "5000000"),
    ("6:4", "3:2"), ("3:4", r"\frac34"), ("0.142857", r"\frac17"), (r"(-1)^{2n}", "1"),
    (r"(-1)^{n+2}", r"(-1)^n"), ("AB=5", "5"), ("0.00123457", r"\frac{1}{810}")]


@pytest.mark.parametrize("a, b, equal", [(*p, False) for p in DIFFERENT] + [(*p, True) for p in EQUAL])
def test_what_a_review_found(a, b, equal):
    assert answers_match(a, b) is answers_match(b, a) is equal

"""Grading mathematics: from a model's text to "is this the gold answer?".

Comes in:  the text of a response, and a gold answer as the benchmark files write it (LaTeX or plain).
Goes out:  `extract_answer`: the answer the text commits itself to, or None; `answers_match`: True or False.

`tokenize` turns spellings into canonical tokens by two tables; `read` takes lists, tuples and relations
apart; the expressions that remain are computed at nine points. Equal are expressions with equal values:
exact fractions while that is possible, else floats within 1e-11 of the larger one. No tolerance is absolute,
and a float that has lost its digits (sin pi, 1 - cos 10^-9) equals nothing but the same text.

Where this differs from math-verify on purpose: a decimal equals an exact value only as its rounding to six
or more digits (0.333 is not 1/3), and another decimal only exactly; numbers in a base have a value (10_2
is 2); {2n \\choose n}, factorials, 1e-5 and -1./3 are read; a unit that one side lacks is forgiven, two
different units are not; p % equals p and p / 100; a list is a set, and a union is a list; of several boxes
only the last is the answer. Not seen: even roots of negative numbers, intervals that touch, degrees in
sin 30°, differences of irrational values below 1e-11.
"""

import cmath
import math
import operator
import re
import zlib
from fractions import Fraction
from typing import NamedTuple

# --- grading: which answer does a text commit itself to? ------------------------------------------

BOX = re.compile(r"\\f?box(?:ed)?\s*(\{|[^\s{}\\$])")
STATED = re.compile(
    r"(?:####|\banswers?\b[^.\n:$\\\d]{0,40}?(?:\b(?:is|are|be)\b|:|=))(?:[\s:,*]*"
    r"\b(?:thus|hence|therefore|then|simply|just|exactly|equal to|equals|given by)\b)*[\s:,*]*", re.I)


def extract_answer(text: str) -> str | None:
    """What the last box of a response holds, else what the last "answer is", "Answer:" or "####" states.
    Thinking is dropped; a text that ends inside <think> or its last box was cut off and has no answer."""
    text = text.rpartition("</think>")[2]
    answer, stated = last_boxed(text), [m.end() for m in STATED.finditer(text)]
    if "<think>" in text or answer is None and not stated:
        return None
    if answer is None:
        rest = text[stated[-1]:].split("\n")[0].split("<|")[0]
        formula = re.match(r"\$+[^$]+\$+|\\\(.+?\\\)|\\\[.+?\\\]", rest)
        answer = formula[0] if formula else re.split(r"[.;]\s|,?\s(?:because|since)\b", rest)[0].strip(".* ")
    return answer.strip() or None


def last_boxed(text):
    """Contents of the last \\boxed{} or \\fbox{}, braces balanced; "" if it never closes, None if none."""
    *_, box = [None, *BOX.finditer(text)]
    if box is None or box[1] != "{":
        return box and box[1]
    depth = 0
    for brace in re.compile(r"\\.|[{}]", re.S).finditer(text, box.start(1)):  # an escaped brace is no brace
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[box.end():brace.start()]
    return ""


# --- grading: text to tokens ----------------------------------------------------------------------

MAX_CHARS, MAX_DEPTH, MAX_COMMAS, MAX_BITS = 400, 25, 60, 3000  # beyond these only the same text is equal
TEXT, MATRIX = r"\\(?:text|mbox|mathrm|operatorname)\w*\s*", r"\s*\{(?:[pbB]?matrix|array)\}"
REWRITES = [(re.compile(pattern, re.S), new) for pattern, new in [
    (r"\b(?:square|sq)\s+([a-z]+)", r"\1^2"),  # units
    (TEXT + r"\{[\s~(]*([A-Za-z][A-Za-z\s/.'-]*?)[\s).]*\}", r' "\1" '),  # "words": perhaps a unit
    (TEXT + r"\{([^{}]*)\}", r" \1 "),
    (r"(?<=\d)(?:\{,\}|,\\!|\\[,! ])\s*(?=\d{3}(?!\d))", ""),  # 10{,}000   11,\! 111   1\,000
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits|math(?:bf|it|cal)|boldsymbol|q?quad|f?box(?:ed)?)"
     r"(?![A-Za-z])|(?<!\\)\\[,;:! ()\[\]$]|[$£€~]", " "),
    (r"\\mathbb\s*\{?\s*R\s*\}?|\ball real numbers\b", r"(-\\infty,\\infty)"),
    (r"\A\s*([A-Za-z' ]*[A-Za-z]{3}[A-Za-z' ]*|[Nn]o)[.\s]*\Z", r' "\1" '),  # a word, no product of letters
    (r'"?\b(?:and|or)\b"?|\\cup\b', ","),
    (r"\\begin" + MATRIX + r"(?:\s*\{[^{}]*\})?", "⟦("),  # a matrix is ⟦(1,2),(3,4)⟧
    (r"(?:\\\\\s*)?\\end" + MATRIX, ")⟧"),
    (r"\\\\", "),("),
    (r"(?:\||\\[lr]?vert\b)(.*?)(?:\||\\[lr]?vert\b)", r" abs(\1)"),
    (r"\\l(floor|ceil)\b(.*?)\\r\1\b", r" \1(\2)"),
    (r"\{([^{}]*)\\choose([^{}]*)\}", r"\\binom{\1}{\2}"),
    (r"\s*([_^])\s*", r"\1"),
    (r"(log|ln)_(\{[^{}]*\}|\w)", r"\1 _{\2}"),  # a base; any other subscript belongs to its name
    (r"\^(?:\{\s*\\circ\s*\}|\\circ)", "°"),
    (r"\\prime\s*", "'"),
    (r"\^\{?('+)\}?", r"\1"),
    (r"\^(\{[^{}]*\}|\w)_(\{[^{}]*\}|\w)", r"_\2^\1"),  # v^2_0
    (r"(?<![A-Za-z\\_^])([A-Za-z])\((\d+)\)", r"\1_{\2}"),  # I(0) is no product
    (r"\((\d+)\)_", r"\1_"),
    (r"(?<![\w.^}])(\d+)\s*\\[dtc]?frac\s*(\{\d+\}|\d)\s*(\{\d+\}|\d)", r"(\1+\2/\3)"),  # mixed: 1\frac45
    (r"(?<![\w.^])(\d+) +(\d+)/(\d+)(?![\d.])", r"(\1+\2/\3)"),
    (r"(frac|binom)\s*(\d)", r"\1{\2}"),  # \frac12
    (r"(frac|binom)\s*(\{[^{}]*\})\s*(\d)", r"\1\2{\3}"),
    (r"((?<=[\d}])|(?<=pi))\s*(?:\\approx|\\simeq|≈)[^=]*\Z", ""),  # pi/2 ≈ 1.57: the exact side counts
    (r"\b(?:np|math)\.(?=[a-z])", "")]]
# What one token may be written as. Tokens are signs, numbers, names (letters first) and words ('"cm').
SAME = {old: new for new, olds in {
    "-": "− –", "*": r"\cdot \times × ·", "/": r"\div ÷", "^": "**", "±": r"\pm", "∓": r"\mp", ",": r"& ∪",
    "<": r"\lt", ">": r"\gt", "≤": r"\le \leq \leqslant <=", "≥": r"\ge \geq \geqslant >=", "≠": r"\ne \neq",
    "=": r"\in ∈ \approx \simeq ≈", "(": r"\langle", ")": r"\rangle", r"\{": r"\lbrace", r"\}": r"\rbrace",
    "frac": r"\dfrac \tfrac \cfrac", "binom": r"\dbinom \tbinom", "sqrt": "√", "pi": "π", "theta": "θ",
    "phi": r"\varphi", "infty": "∞ infinity inf", '"emptyset': r"\emptyset \varnothing ∅",
    "asin": r"arcsin \arcsin", "acos": r"arccos \arccos", "atan": r"arctan \arctan", "log": r"ln \ln",
    '"%': r"% \% percent percentage", '"°': r"° \degree degree degrees", '"m': "meter meters", "": "the",
    '"cm': "centimeter centimeters", '"km': "kilometer kilometers", '"in': "inch inches", '"ft': "foot feet",
    '"mi': "mile miles", '"h': "hour hours hr", '"min': "minute minutes", '"s': "second seconds sec",
    '"g': "gram grams", '"kg': "kilogram kilograms", '"lb': "pound pounds"}.items() for old in olds.split()}
TOKEN = re.compile(r"""
    ( "[^"]*" | (?<![A-Za-z\d\\])[A-Za-z]{4,} | (?<![A-Za-z\\]) (?:sin|cos|tan|sec|csc|cot|log|ln|exp|abs|pi
      |cm|mm|km|kg|ft|in|mi|yd|hr|min|mph|lb|oz|sq|day|way|inf)(?![A-Za-z]) )                      # a word
    | ( (?:\\[A-Za-z]+|[A-Za-z]) (?:_(?:\{[^{}]*\}|\\[A-Za-z]+|\w)|')* )                           # a name
    | \d+_(?:\d+|\{\d+\}) | (?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3}(?!\d))? | \\. | \*\* | [<>]= | \S
    """, re.S | re.X)
CLOSE = dict(zip(r"( [ { \{ ⟦".split(), r") ] } \} ⟧".split()))


def tokenize(text: str) -> list[str]:
    """Canonical tokens of LaTeX or plain text; raises ValueError if they are too many."""
    if len(text) > MAX_CHARS or text.count(",") + text.count(";") > MAX_COMMAS:
        raise ValueError("too long")
    if "\\begin" not in text:  # `\\frac`, a command escaped twice; in a matrix `\\` ends a row
        text = text.replace("\\\\", "\\")
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    if not re.search(r"[(\[]|\\\{", text):  # inside brackets a comma separates: (100,200) is a point
        text = re.sub(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])", lambda m: m[0].replace(",", ""), text)
    tokens = []
    for m in TOKEN.finditer(text):
        for word in m[1].strip('"').split() if m[1] else ():
            tokens.append(SAME.get(word.lower(), word if word in KEYWORDS else '"' + word))
        if not m[1]:  # a name is the same with and without braces, a_{n}
            tokens.append(SAME.get(m[0], re.sub(r'[\s{}"\\]', "", m[0]) if m[2] else m[0]))
    tokens = [t for t in tokens if t]
    if max(depths(tokens), default=0) > MAX_DEPTH:
        raise ValueError("too deep")
    return tokens


def depths(tokens):
    """How many brackets are open after each token; intervals mix them, (0, 1], so their kind is ignored."""
    depth = 0
    for token in tokens:
        depth += (token in CLOSE) - (token in CLOSE.values())
        yield depth


def split(tokens, separators):
    """The non-empty parts between separators outside brackets, and the separators."""
    cuts = [i for i, depth in enumerate(depths(tokens)) if depth == 0 and tokens[i] in separators]
    parts = [tokens[i + 1:j] for i, j in zip([-1, *cuts], [*cuts, len(tokens)])]
    return [p for p in parts if p], [tokens[i] for i in cuts]


# --- grading: an expression to numbers ------------------------------------------------------------


def power(x, n):
    """x^n over the reals, where x^(1/3) of a negative x is negative and x^(1/2) is undefined."""
    exact = isinstance(x, Fraction) and isinstance(n, Fraction) and n.denominator == 1
    if exact and max(abs(x.numerator), x.denominator).bit_length() * abs(n) <= 2 * MAX_BITS:
        return x ** int(n)
    if isinstance(x + n, complex) or x >= 0 or n % 1 == 0:
        return (x + 0.0) ** n
    odd = abs(1 / n - round(1 / n)) < 1e-9 and round(1 / n) % 2
    return -((-x) ** float(n)) if odd else math.nan


def factorial(n):
    exact = isinstance(n, Fraction) and n.denominator == 1 and 0 <= n <= 400
    return Fraction(math.factorial(int(n))) if exact else math.gamma(n + 1)


CONSTANTS = {"pi": math.pi, "e": math.e, "i": 1j}
OPERATIONS = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "frac": operator.truediv,
    "^": power, "!": factorial, "binom": lambda n, k: factorial(n) / factorial(k) / factorial(n - k),
    "abs": abs, "exp": lambda x: power(math.e, x), "sec": lambda x: 1 / operate("cos", x),
    "csc": lambda x: 1 / operate("sin", x), "cot": lambda x: 1 / operate("tan", x),
    "floor": lambda x: Fraction(math.floor(x + Fraction(1, 10**9))),  # floor(log_2 8) is 3
    "ceil": lambda x: Fraction(math.ceil(x - Fraction(1, 10**9)))}
FUNCTIONS = set("sin cos tan asin acos atan sinh cosh tanh log abs exp sec csc cot floor ceil".split())
KEYWORDS = {*FUNCTIONS, *OPERATIONS, *CONSTANTS, "sqrt", "infty"}
BINDING = {"+": 1, "-": 1, "*": 2, "/": 2, "^": 4, "!": 5}  # a sign binds as 3: -x^2 is -(x^2)
ATOM, STARTS_ATOM = 5, re.compile(r"""[^\W_]|["([{]""").match
# Variables are (low to high) / denominator: small, near 1 (x^2018 fits a float), medium, large (floor(x/100)
# is not 0), negative (|x| is not x), of either sign, integers ((-1)^n is real only there); the many small
# integers are for floor and ceil alone, which else agree too easily.
POINTS = [(1, 996, 997), (900, 996, 997), (998, 1100, 997), (998, 9000, 997), (99_000, 990_000, 997),
          (-9000, -998, 997), (-2500, 2500, 997), (2, 13, 1), (3, 40, 1), *[(1, 10, 1)] * 12]


def operate(op, *args):
    """One operation, exact on fractions where it can be; raises ArithmeticError if no digit is certain:
    a sum or a function that comes out small beside what it came from has lost them."""
    if op in OPERATIONS:
        value, scale = OPERATIONS[op](*args), max(map(abs, args)) if op in "+-" else 0
    else:
        value = getattr(cmath if isinstance(args[0], complex) else math, op)(args[0])
        scale = min(1, abs(args[0]))
    if isinstance(value, Fraction):
        return value if max(abs(value.numerator), value.denominator) < 2**MAX_BITS else float(value)
    if not cmath.isfinite(value) or abs(value) < 1e-4 * scale or value == 0 and all(args):
        raise ArithmeticError("digits lost")
    return value


def expression(tokens, point, floor=0):
    """The value of the longest expression whose operators all bind tighter than `floor`. `tokens` is a stack,
    the next one on top, " " at the bottom; what is read is taken from it."""
    if tokens[-1] in ("+", "-"):
        value = operate("*", Fraction(tokens.pop() + "1"), expression(tokens, point, 3))
    else:
        value = atom(tokens, point)
    while BINDING.get(tokens[-1], 2 if STARTS_ATOM(tokens[-1]) else 0) > floor:
        if tokens[-1][0].isdigit():
            raise ValueError("a number after an operand: 2 3")
        op = tokens.pop() if tokens[-1] in BINDING else "*"
        value = operate(op, value, *([] if op == "!" else [expression(tokens, point, min(BINDING[op], 3))]))
    return value


def atom(tokens, point):
    """The value of a bracket, a number, a function of its arguments, or a name."""
    token = tokens.pop()
    word = token.lstrip('"')
    if token in CLOSE:
        value = expression(tokens, point)
        if tokens.pop() != CLOSE[token]:
            raise ValueError("a bracket is open")
        return value
    if token[0].isdigit() or token[0] == "." and len(token) > 1:
        digits, _, base = token.partition("_")
        return Fraction(int(digits, int(base.strip("{}")) or 1) if base else token)  # base 0 would guess
    if token == "sqrt":
        degree = atom(tokens, point) if tokens[-1] == "[" else 2
        return operate("^", expression(tokens, point, ATOM), operate("/", Fraction(1), degree))
    if token in ("frac", "binom"):
        return operate(token, expression(tokens, point, ATOM), expression(tokens, point, ATOM))
    if token in FUNCTIONS:
        return function(token, tokens, point)
    if not word[:1].isalpha():
        raise ValueError(f"{token!r} is no operand")
    if word in CONSTANTS:
        return CONSTANTS[word]
    low, high, denominator = POINTS[point]  # fixed by the name alone: the same in every run
    return Fraction(low + zlib.crc32(ascii(f"{word} {point}").encode()) % (high - low + 1), denominator)


def function(name, tokens, point):
    """sin^2 x, sin^{-1} x, log_2 8; without brackets the argument is a product: sin 2 t cos t."""
    marks = {}
    while tokens[-1] in ("^", "_"):
        marks |= {tokens.pop(): expression(tokens, point, ATOM)}
    if marks.get("^") == -1 and "a" + name in FUNCTIONS:
        name, marks = "a" + name, {}
    bracket = tokens[-1] in CLOSE
    value = expression(tokens, point, ATOM if bracket else 2)
    while not bracket and STARTS_ATOM(tokens[-1]) and tokens[-1] not in FUNCTIONS and tokens[-1] != "(":
        value = operate("*", value, expression(tokens, point, 2))
    value = operate(name, value)
    value = operate("/", value, operate("log", marks["_"])) if "_" in marks else value
    return operate("^", value, marks["^"]) if "^" in marks else value


def compute(tokens):
    """The values of an expression at all points, None where it is undefined or not mathematics."""
    values = []
    for point in range(len(POINTS) if {"floor", "ceil"} & {*tokens} else 9):
        stack = [" ", " ", *reversed(tokens)]
        try:
            value = expression(stack, point)
            values.append(value if len(stack) == 2 else None)
        except (ValueError, ArithmeticError, TypeError):  # TypeError: the factorial of i
            values.append(None)
    return values


# --- grading: answers, and whether two are the same -----------------------------------------------

RELATIONS = ("=", "≠", "<", "≤", ">", "≥")
# x, a_n, f(x), f^{-1}(x), (p,q), frac{dM}{dt}: letters and brackets, no operation on them
NAME = re.compile(r"""(?!(?:pi|e|i|infty)\Z)([^\W\d]\w*(\^\{-1\}(?=\())?|['"(){},])+""").fullmatch


class Answer(NamedTuple):
    """`kind` is "leaf" (an expression or words), "list" (without order), the brackets of a tuple, interval or
    matrix, or a relation, whose `values` are left minus right. A relation that says what a name is (x = 5;
    x < 5: x is in (-oo, 5)) is "=", with the name as its `text` and the rest as its one item."""

    kind: str
    text: str = ""
    items: list = []
    values: list = []
    unit: str = ""


def read(tokens: list) -> Answer:
    """Tokens to an answer, outermost structure first; raises ValueError where a part is empty."""
    while tokens and tokens[-1] in (".", ",", ";", ":"):
        tokens = tokens[:-1]
    if not tokens:
        raise ValueError("nothing there")
    inside, brackets = tokens[1:-1], tokens[0] + tokens[-1]
    enclosed = inside and tokens[0] in CLOSE and min(list(depths(tokens))[:-1]) > 0
    if enclosed and brackets in ("{}", r"\{\}"):
        return read(inside)
    parts = split(tokens, ";")[0]
    if len(parts) == 1 and {"±", "∓"} & {*tokens} and r"\{" not in tokens:  # both answers
        signs = {"±": "+-", "∓": "-+"}
        upper, lower = ([signs.get(t, (t, t))[i] for t in tokens] for i in (0, 1))
        return read([*upper, ",", *lower])
    parts = parts if len(parts) > 1 else split(tokens, ",")[0]
    if len(parts) > 1:
        return Answer("list", items=[read(p) for p in parts])
    if split(tokens, RELATIONS)[1]:
        return read_relation(tokens)
    if enclosed and brackets in ("()", "[]", "(]", "[)", "⟦⟧"):
        items = [read(p) for p in split(inside, ",;")[0]]
        kind = brackets if brackets == "⟦⟧" or len(items) == 2 else "()"  # [1,2,3] is (1,2,3)
        return items[0] if kind == "()" and len(items) == 1 else Answer(kind, items=items)
    return read_leaf(tokens)


def read_relation(tokens):
    """x = 5, 5 = x, a = b = 5, 2 + 3 = 5, 2x + y = 5, x in (0, 1), x < 5, 1 <= x < 5, 2x + y < 5"""
    parts, signs = split(tokens, RELATIONS)
    if len(parts) != len(signs) + 1 or not any({*signs} <= {*kind} for kind in ("=", "≠", "<≤", ">≥")):
        raise ValueError("a side is empty, or relations are mixed")
    names = [NAME("".join(p)) for p in parts]
    if signs[0] in ">≥" or signs[0] == "=" and names[-1] and not names[0]:
        parts, names, signs = parts[::-1], names[::-1], [{">": "<", "≥": "≤"}.get(s, s) for s in signs[::-1]]
    left, right = parts[0], parts[-1]
    values = compute(["(", *left, ")", "-", "(", *right, ")"])
    if signs[0] in "<≤" and len(parts) == 2 and any(names):
        parts = [["-", "infty"], *parts] if names[0] else [*parts, ["infty"]]
        signs = ["<", *signs] if names[0] else [*signs, "<"]
    if signs[0] in "<≤" and len(parts) == 3:
        left, right = parts[1], ["(["[signs[0] == "≤"], *parts[0], ",", *parts[2], ")]"[signs[1] == "≤"]]
        values = []  # N < n is not N = n
    elif signs[0] != "=" or len(parts) == 2 and not names[0] and len({*compute(left)} - {None}) != 1:
        return Answer(signs[0], values=values)
    return Answer("=", re.sub(r'[{}"]', "", "".join(left)), [read(right)], values)


def read_leaf(tokens):
    """An expression, its unit apart, or else words."""
    at = next((i for i in range(1, len(tokens)) if tokens[i][0] == '"' and tokens[i] not in ('"e', '"i') and (
        tokens[i - 1][0].isalnum() or tokens[i - 1] in (")", "]", "}", "!"))), len(tokens))
    shape = "".join('"' if t[0] == '"' else t for t in tokens[at:])
    if not re.fullmatch(r'("(\^\{?-?\d\}?)?[/*]?)+', shape):  # 5 cm - 3
        at = len(tokens)
    text, unit = " ".join(tokens[:at]).replace('"', ""), re.sub(r'["{}]', "", "".join(tokens[at:]))
    words = all(t[0] == '"' and len(t) > 2 for t in tokens[:at])
    return Answer("leaf", text, values=[None] if words else compute(tokens[:at]), unit=unit)


def answers_match(pred: str, gold: str) -> bool:
    """Whether two answers are equal as mathematics (see the head of this file). Takes any strings, never
    raises, and does a bounded amount of work; an empty answer matches nothing."""
    pred, gold = bare_answer(pred), bare_answer(gold)
    try:
        pred, gold = tokenize(pred), tokenize(gold)
        return bool(pred and gold) and (pred == gold or same(read(pred), read(gold)))
    except (ValueError, ArithmeticError, RecursionError):  # or an exact value that no float can hold
        return bool(pred) and pred == gold


def bare_answer(text):
    """What the box holds, or of prose around a formula the formula: Hence $x > 2$ holds."""
    text = last_boxed(text) or text
    start = re.search(r"\$|\\[(\[]", text)
    if start and re.fullmatch(r"(?=.*[A-Za-z]{2})[^\d\\]+", text[:start.start()], re.S):
        text = text[start.start():max(text.rfind(end) for end in ("$", "\\)", "\\]")) + 2]
    return text.strip("* \t\n")


def same(a, b) -> bool:
    """Whether two answers are equal; in lists, whether each member has its like on the other side. An
    equation is any multiple of itself, an inequality any positive one."""
    if a.kind not in RELATIONS and (b.kind in RELATIONS or a.kind == "list"):
        a, b = b, a
    if a.kind in RELATIONS:
        if b.kind not in RELATIONS:  # x = 5 is 5
            return bool(a.items) and same(a.items[0], b)
        if a.items and b.items and a.text == b.text:
            return same(a.items[0], b.items[0])
        ratios = [x / y for x, y in zip(a.values, b.values) if x and y]
        constant = a.kind == b.kind and agree(ratios, ratios[:1] * len(ratios))
        return constant and (a.kind in "=≠" or ratios[0].real > 0)
    if a.kind == b.kind == "leaf":
        return same_leaf(a, b)
    names = {x.text for x in b.items if x.kind == "=" and x.items}
    if "list" != a.kind != "leaf" and (a.kind == b.kind or len(names) == len(b.items) > 1):
        return len(a.items) == len(b.items) and all(map(same, a.items, b.items))  # x = 2, y = 3 is (2, 3)
    xs, ys = (x.items if x.kind == "list" else [x] for x in (a, b))
    return b.kind == "list" and all(any(same(x, y) for y in ys) for x in xs) and all(
        any(same(x, y) for x in xs) for y in ys)


def same_leaf(a, b):
    """Words by their letters; values at all points, where a percent sign, a missing unit, and the rounding
    of an exact value to six or more digits are forgiven."""
    if a.unit and b.unit and a.unit != b.unit:
        return False
    decimals = [x.text for x in (a, b) if "." in x.text]
    rounded = len(decimals) == 1 and re.fullmatch(r"[+-]? ?0*\.?0*(\d\.?){6,}", decimals[0])
    slack = Fraction(1, 10 ** len(decimals[0].partition(".")[2])) if rounded else 0  # one in the last place
    if a.text == b.text or agree(a.values, b.values, slack):
        return True
    if (a.unit == "%") != (b.unit == "%"):
        share, other = (a, b) if a.unit == "%" else (b, a)
        return agree(share.values, [x and 100 * x for x in other.values])
    letters = [x.text.replace(" ", "").casefold() for x in (a, b)]
    return [None] in (a.values, b.values) and letters[0] == letters[1] and letters[0].isalpha()


def agree(u, v, slack=0):
    """Whether two values are equal at all points where both are defined, two at least."""
    pairs = [(x, y) for x, y in zip(u, v) if x is not None and y is not None]
    return len(pairs) > 1 and all(
        x == y or abs(x - y) < slack or abs(x - y) <= 1e-11 * max(abs(x), abs(y))
        and not (isinstance(x, Fraction) and isinstance(y, Fraction)) for x, y in pairs)

"""Corrections. So far the toy world's Oracle alone."""

import re

import data

TOY_STEP = re.compile(r"\d[-+,]\d=\d|\\boxed\{\d*\}")  # what an answer of the toy world asserts


def toy_oracle(question: str, wrong: str) -> str:
    """The toy world's Oracle, a program: y+ from a wrong answer y- to one of data.toy_question's questions.

    It goes through y-'s assertions (steps and box) side by side with the true ones, and replaces what
    differs: the first wrong step and what follows from it. All between them, the author's style, stays. An
    answer with too few or too many steps keeps what stands before the first wrong one; the rest is written
    anew, in its own style as far as that shows.
    """
    between = ";" if ";" in wrong else "\n"
    word = next((w for _, w in data.TOY_STYLES if w and w in wrong), "")
    truth = data.toy_answer(question, (between, word))
    if len(TOY_STEP.findall(wrong)) != len(TOY_STEP.findall(truth)):
        return truth
    right = iter(TOY_STEP.findall(truth))
    return TOY_STEP.sub(lambda _: next(right), wrong)

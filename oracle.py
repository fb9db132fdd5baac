"""Making the pairs: questions -> the policy's own wrong answers -> an Oracle's minimal corrections.

Comes in:  questions with gold answers (JSONL), a policy, and an Oracle: a server, a model, a Python
           function, or a person, who adds gemini_corrected_answer to a copy of errors.jsonl.
Goes out:  errors.jsonl (`elicit`), then pairs.jsonl (`rectify`) as train.py reads it.

    python oracle.py elicit --questions dapo-en.jsonl --model Qwen3-8B --out data/errors
    python oracle.py rectify --errors data/errors/errors.jsonl --server https://host/v1 \\
        --tokenizer Qwen3-8B --out data/pairs

A kill loses no answer (OUT/raw-*.jsonl): repeat the command. `elicit` also runs under torchrun.
"""

import hashlib
import os
import re
import runpy
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import partial

import data
import eval as evaluation
import model as qwen
from data import END, START, Drop, UserError
from eval import (INSTRUCTION, LAST_LINE, Sampling, SamplingOptions, after_thinking, claim_folder,
                  extract_answer, gold_answer, identity, open_policy, question_messages,
                  read_answers, read_items, request_for, sample, score_math)
from model import Ranks, option

REPAIR = f"""Below are a problem and a student's solution, which ends in a wrong answer.%s

[Problem]
{{question}}

[Student's solution]
{{answer}}

[Your task]
%s Then repair the student's solution with as few edits as you can:
- keep whatever is right, word for word: steps, sentences, formulas, their order;
- replace only what is wrong, and what is wrong because of it;
- keep the student's style, tone, vocabulary and formatting;
- write as if the solution had been right at the first attempt: never mention a mistake, a
  correction, the student, or a given answer;
- end with this line, ANSWER replaced by the final answer:
{LAST_LINE}

Write the whole repaired solution between these two lines:
{START}
{END}
"""
FIND = "First find out where the solution leaves the way to the right answer."
PROMPTS = {  # {question}, {answer}, {gold} are filled for each error
    "correct": REPAIR % ("", "First solve the problem yourself."),
    "correct_with_answer": REPAIR % (" The right final answer is {gold}.", FIND),
    "direct": "{question}"}


@dataclass
class Item:
    """One question, or one wrong answer to it."""
    id: str
    question: str | list  # the whole user turn as it was or will be sent, or a list of messages
    gold: str
    answer: str = ""  # y-, for rectify

    def __post_init__(self):
        self.messages = data.prompt_messages(self.question, "question")


def read_questions(path, instruction, skip_malformed=False):
    """(items, Counter of dropped rows). A string goes into the instruction, messages stay."""
    seen = set()

    def parse(row, name):
        messages = question_messages(row, instruction)
        if str(messages) in seen:
            raise Drop("the same question again")
        seen.add(str(messages))
        question = messages if len(messages) > 1 else messages[0]["content"]
        return Item(name, question, gold_answer(row))

    return read_items(path, parse, skip_malformed)


def read_errors(path):
    """Rows of errors.jsonl: question, original_answer, ground_truth (or a field of gold_answer)."""
    def parse(row, name):
        answer = data.check_text(row.get("original_answer"), "'original_answer'")
        return Item(name, row.get("question"), gold_answer(row), answer)

    return read_items(path, parse)


def sort_answers(asked, out, ranks, judge, *names):
    """Sort the answers to `asked`, {key: Item}, into the files `names`: judge(item, record) gives a
    verdict, which summary.json counts, and {file name: row}."""
    answers, files, counts = read_answers(out, asked), {name: [] for name in names}, Counter()
    arrived = [(item, answers[key]) for key, item in asked.items() if key in answers]
    for item, record in arrived:
        verdict, rows = judge(item, record)
        counts[verdict] += 1
        for name, row in rows.items():
            files[name].append(row)
    for name, rows in files.items():
        data.write_rows(f"{out}/{name}.jsonl", rows)
    summary = {"answers wanted": len(asked), "not asked": len(asked) - len(arrived), **counts}
    ranks.say("\n".join(f"{n:7}  {outcome}" for outcome, n in summary.items()) + f"\n{out}")
    data.write_json(f"{out}/summary.json", summary)
    errors = [record["error"] for _, record in arrived if "error" in record]
    if arrived and len(errors) == len(arrived):
        raise UserError(f"all {len(errors)} requests failed, the first with: {errors[0]:.200}; the "
                        "same command asks them again")


def elicit(items: list, out, policy, sampling: Sampling, ranks: Ranks, samples=1, seed=0):
    """Have a LocalModel or Server answer every Item `samples` times, and grade the answers.

    Writes samples.jsonl (all, with verdicts), errors.jsonl (the wrong ones, for `rectify`),
    correct.jsonl (the right ones as positive-only pairs: RFT data) and summary.json (counts)."""
    items = [replace(item, id=f"{item.id}/{i}") for item in items for i in range(samples)]
    requests = [request_for(item.id, item.messages, seed) for item in items]
    asked = {request.key: item for request, item in zip(requests, items)}
    with ranks.together():
        list(sample(policy, requests, out, sampling, ranks, "eliciting"))  # they are in the log
    ranks.main_only(sort_answers, asked, out, ranks, judge_answer, "samples", "errors", "correct")


def judge_answer(item: Item, record: dict) -> tuple:
    """(verdict, {file name: row}). What was cut off has no end to train: in samples.jsonl alone."""
    if "error" in record:
        return "request failed", {}
    text, extracted = record["text"], extract_answer(record["text"])
    if record["finish"] == "length":
        verdict, extracted = "cut off at max_tokens", None
    elif extracted is None:
        verdict = "wrong: no final answer"
    else:
        verdict = "right" if score_math(text, item.gold)["accuracy"] else "wrong"
    row = {"id": item.id, "question": item.question, "ground_truth": item.gold}
    rows = {"samples": {**row, "answer": text, "extracted_answer": extracted, "verdict": verdict,
                        "tokens": record["tokens"]}}
    if verdict == "right":
        rows["correct"] = {**row, "original_answer": "", "gemini_corrected_answer": text,
                           "is_correct": True}
    elif verdict.startswith("wrong") and text.strip():
        rows["errors"] = {**row, "original_answer": text, "extracted_answer": extracted}
    return verdict, rows


def rectify(items: list, out, oracle, encode, ranks: Ranks, prompt="correct", max_change_ratio=0.6,
            target=0, sampling=None, seed=None):
    """Have every wrong answer corrected; keep what is right and a small change.

    oracle  a Server or LocalModel, asked with PROMPTS[prompt], sampling and seed; or a function
            (Item) -> corrected text, which raises where it has none
    encode  text -> token ids, for the change ratio
    target  stop at that many pairs of a rank, and those under way; 0: ask for all
    Writes pairs.jsonl, rejected.jsonl (other answers, each with its reason) and summary.json."""
    requests = [request_for(item.id, oracle_messages(item, prompt), seed) for item in items]
    asked = {request.key: item for request, item in zip(requests, items)}
    by_function, pairs = callable(oracle), 0

    def call(request):
        try:
            text = data.check_text(oracle(asked[request.key]), "what the function returned")
        except (Exception, SystemExit) as e:  # the user's code may raise anything
            return {"error": f"{type(e).__name__}: {e}"}
        return {"text": text, "finish": "stop", "tokens": 0}

    judge = partial(judge_correction, encode, prompt, by_function, max_change_ratio)
    policy = call if by_function else oracle
    with ranks.together():
        for record in sample(policy, requests, out, sampling, ranks, "rectifying"):
            if target and judge(asked[record["key"]], record)[0] == "pairs":
                pairs += 1
                if pairs == target:
                    break
    ranks.main_only(sort_answers, asked, out, ranks, judge, "pairs", "rejected")


def oracle_messages(item: Item, prompt: str) -> list:
    """What the Oracle is asked: one user turn; under "direct" the question as the policy got it."""
    if prompt == "direct":
        return item.messages
    turns = [f"{m['role']}: {m['content']}" for m in item.messages]
    question = "\n\n".join(turns) if len(turns) > 1 else item.messages[0]["content"]
    values = {"question": question, "answer": item.answer, "gold": item.gold}
    # Not str.format: questions hold LaTeX's braces.
    filled = re.sub(r"\{(question|answer|gold)\}", lambda m: values[m[1]], PROMPTS[prompt])
    return [{"role": "user", "content": filled}]


def judge_correction(encode, prompt, by_function, max_change_ratio, item, record) -> tuple:
    """("pairs" or the reason why not, {file name: row})."""
    row = {"index": item.id, "question": item.question, "ground_truth": item.gold,
           "original_answer": item.answer}

    def rejected(reason):
        return reason, {"rejected": row | {"reason": reason} | record}

    if "error" in record:
        return rejected("request failed")
    if record["finish"] == "length":
        return rejected("cut off by the token limit")
    _, start, rest = after_thinking(record["text"]).rpartition(START)
    text, end, _ = rest.partition(END)
    text = text.strip().removeprefix("**\n").removesuffix("\n**").strip()  # bold markers
    if prompt != "direct" and not by_function:
        if not start or not end:
            return rejected("no text between the markers")
        fenced = re.fullmatch(r"```\w*\n((?:(?!```).)*)```", text, re.S)
        if fenced and not item.answer.startswith("```"):  # the whole text in a code block
            text = fenced[1].strip()
    extracted = extract_answer(text)
    if extracted is None:
        return rejected("no final answer in the correction")
    if not score_math(text, item.gold)["accuracy"]:
        return rejected("the correction's answer is wrong")
    corrected = {"gemini_corrected_answer": text, "gemini_extracted_answer": extracted,
                 "is_correct": True}
    if prompt == "direct":  # no correction of y-: the paper's SFT data
        row |= {"original_answer": "", "policy_answer": item.answer}
        return "pairs", {"pairs": row | corrected}
    ratio = data.change_ratio(encode(data.strip_markers(item.answer)), encode(text))
    if ratio > max_change_ratio:
        return rejected(f"change ratio above {max_change_ratio}")
    return "pairs", {"pairs": row | corrected | {"change_ratio": round(ratio, 4)}}


# --- command line ---------------------------------------------------------------------------------

@dataclass
class ElicitOptions(SamplingOptions):
    """sample the policy's answers, sort them into right and wrong"""
    questions: str = option("", "JSONL: question|problem|prompt, and the gold answer (required)")
    samples: int = option(1, "answers per question")
    instruction: str = option(INSTRUCTION, "user turn around {question}; messages are sent as is")
    limit: int = option(0, "the first N questions; 0: all")
    skip_malformed: bool = option(False, "drop and count malformed rows")


@dataclass
class RectifyOptions(SamplingOptions):
    """have the wrong answers corrected"""
    errors: str = option("", "errors.jsonl of `elicit` (required)")
    tokenizer: str = option("", "the policy's folder, for the change ratio; needed without --model")
    function: str = option("", "FILE.py:NAME, a Python function as the Oracle: Item -> text")
    prompt: str = option("correct", "what the Oracle is asked; direct: no y- shown", tuple(PROMPTS))
    max_change_ratio: float = option(0.6, "drop pairs with 1 - LCS(y-, y+)/|y+| above this (gamma)")
    target: int = option(0, "stop asking at that many pairs in all; 0: ask for all")


def run_elicit(o: ElicitOptions, ranks: Ranks):
    """From options to files."""
    with ranks.together():
        if "{question}" not in o.instruction:
            raise UserError("--instruction lacks {question}")
        items, dropped = read_questions(o.questions, o.instruction, o.skip_malformed)
        for reason, count in dropped.items():
            ranks.say(f"{count} rows dropped: {reason}")
        policy = open_policy(o, ranks.device)
    settings = {"command": "elicit", "seed": o.seed, "asked": identity(policy, o),
                "sampling": asdict(o.sampling)}
    claim_folder(o.out, settings, ranks, policy)
    elicit(items[:o.limit or None], o.out, policy, o.sampling, ranks, o.samples, o.seed)


def run_rectify(o: RectifyOptions, ranks: Ranks):
    """From options to files."""
    values = {"seed": o.seed, **asdict(o.sampling)}
    if o.server:  # it has its own best values
        values = {key: x if key in o.given else None for key, x in values.items()}
    seed = values.pop("seed")
    sampling = Sampling(**values)
    with ranks.together():
        if ranks.world > 1 and o.target:
            raise UserError("--target needs one process: use python, not torchrun")
        if not o.tokenizer and not o.model:
            raise UserError("--tokenizer is required: the policy's folder")
        items, _ = read_errors(o.errors)
        folder = o.tokenizer or o.model
        encode = data.load_chat(folder, qwen.read_config(folder).vocab_size, o.template).encode
        if o.function:
            path, _, function = o.function.partition(":")
            sys.path.insert(0, os.path.dirname(os.path.abspath(path)))  # for its own imports
            oracle = runpy.run_path(path).get(function)
            if not callable(oracle):
                raise UserError(f"--function FILE.py:NAME: {path} defines no {function!r}")
            with open(path, "rb") as f:  # its versions differ in the hash
                name = f"{o.function} {hashlib.sha256(f.read()).hexdigest()[:16]}"
        else:
            oracle = open_policy(o, ranks.device, non_thinking=False)
            name = identity(oracle, o)
    settings = {"command": "rectify", "seed": seed, "prompt": o.prompt, "asked": name,
                "sampling": values}
    claim_folder(o.out, settings, ranks, oracle)
    rectify(items, o.out, oracle, encode, ranks, o.prompt, o.max_change_ratio, o.target, sampling,
            seed)


COMMANDS = {"elicit": (run_elicit, ElicitOptions, ("out", "questions")),
            "rectify": (run_rectify, RectifyOptions, ("out", "errors"))}
main = partial(evaluation.main, COMMANDS, __doc__)

if __name__ == "__main__":
    qwen.run_and_exit(main)

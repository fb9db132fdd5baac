"""Making the pairs: questions -> the policy's own wrong answers -> an Oracle's minimal corrections.

Comes in:  questions with gold answers (JSONL), a policy, and an Oracle: a server, a model, a Python
           function, or a person, who adds gemini_corrected_answer to the rows of errors.jsonl.
Goes out:  errors.jsonl (`elicit`), then pairs.jsonl (`rectify`) as train.py reads it.

    python oracle.py elicit --questions dapo-en.jsonl --model Qwen3-8B --out data/errors
    python oracle.py rectify --errors data/errors/errors.jsonl --server https://host/v1 \\
        --tokenizer Qwen3-8B --out data/pairs

A kill loses no answer (OUT/raw-*.jsonl): repeat the command. `elicit` also runs under torchrun.
"""

import contextlib
import hashlib
import json
import os
import re
import runpy
import sys
from collections import Counter
from dataclasses import asdict, dataclass

import data
import eval as evaluation
import model as qwen
from data import END, START, Drop, UserError
from eval import (INSTRUCTION, LAST_LINE, LocalModel, Sampling, SamplingOptions, Server,
                  after_thinking, answers_match, claim_folder, extract_answer, gold_answer,
                  identity, open_policy, question_messages, read_answers, read_items, request_for,
                  sample)
from model import Ranks, option

_REPAIR = r"""Below are a problem and a student's solution, which ends in a wrong answer.{given}

[Problem]
{question}

[Student's solution]
{answer}

[Your task]
{first} Then repair the student's solution with as few edits as you can:
- keep whatever is right, word for word: steps, sentences, formulas, their order;
- replace only what is wrong, and what is wrong because of it;
- keep the student's style, tone, vocabulary and formatting;
- write as if the solution had been right at the first attempt: never mention a mistake, a
  correction, the student, or a given answer;
- end with this line, ANSWER replaced by the final answer:
""" + LAST_LINE + f"""

Write the whole repaired solution between these two lines:
{START}
{END}
"""
GIVEN = " The right final answer is {gold}."
SOLVE = "First solve the problem yourself."
FIND = "First find out where the solution leaves the way to the right answer."
PROMPTS = {  # {question}, {answer}, {gold} are filled for each error
    "correct": _REPAIR.replace("{given}", "").replace("{first}", SOLVE),
    "correct_with_answer": _REPAIR.replace("{given}", GIVEN).replace("{first}", FIND),
    "direct": "{question}"}


# --- reading questions and errors -----------------------------------------------------------------

@dataclass
class Item:
    """One question, or one wrong answer to it."""

    id: str
    question: str | list  # the whole user turn as it was or will be sent, or a list of messages
    gold: str
    answer: str = ""  # y-, for rectify

    @property
    def messages(self):
        return data.prompt_messages(self.question, "question")


def read_questions(path, instruction, skip_malformed=False):
    """(items, Counter of dropped rows). A string goes into the instruction, messages stay as they
    are; a question that is there already is dropped."""
    seen = set()

    def parse(row, name):
        messages = question_messages(row, instruction)
        text = json.dumps(messages)
        if text in seen:
            raise Drop("the same question again")
        seen.add(text)
        question = messages if len(messages) > 1 else messages[0]["content"]
        return Item(name, question, gold_answer(row))

    return read_items(path, parse, skip_malformed)


def read_errors(path):
    """Rows of errors.jsonl: question, original_answer, ground_truth (or a field of gold_answer)."""
    def parse(row, name):
        data.prompt_messages(row.get("question"), "question")  # raises if it is no prompt
        answer = data.check_text(row.get("original_answer"), "'original_answer'")
        return Item(name, row["question"], gold_answer(row), answer)

    return read_items(path, parse)


def sort_answers(policy, asked, out, ranks, names, judge):
    """Sort what arrived of `asked`, {key: Item}, into the files `names`, by judge(item, record): a
    verdict, which is counted in summary.json, and {file name: row}."""
    answers = read_answers(out, asked)
    arrived = [(asked[key], answers[key]) for key in asked if key in answers]
    files, counts = {name: [] for name in names}, Counter()
    for item, record in arrived:
        verdict, rows = judge(item, record)
        counts[verdict] += 1
        for name, row in rows.items():
            files[name].append(row)
    for name, rows in files.items():
        data.write_rows(os.path.join(out, f"{name}.jsonl"), rows)
    summary = {"answers wanted": len(asked), "not asked": len(asked) - len(arrived)} | counts
    ranks.say("\n".join(f"{n:7}  {outcome}" for outcome, n in summary.items()) + f"\n{out}")
    if isinstance(policy, Server) and policy.refused:
        summary["refused by the server"] = list(policy.refused)  # keys of the request
    data.write_json(os.path.join(out, "summary.json"), summary)
    errors = [record["error"] for _, record in arrived if "error" in record]
    if isinstance(policy, Server) and arrived and len(errors) == len(arrived):
        raise UserError(f"all {len(errors)} requests failed, the first with: {errors[0]:.200}; the "
                        "same command asks them again")


@contextlib.contextmanager
def sorted_at_the_end(policy, asked, out, ranks, names, judge):
    """Run a block that samples, then `sort_answers`, also where Ctrl-C or an error ended it."""
    arguments = policy, asked, out, ranks, names, judge
    try:
        with ranks.together():
            yield
    except (SystemExit, KeyboardInterrupt):  # SystemExit: `together` has printed an error
        if ranks.main:
            with contextlib.suppress(UserError, OSError):
                sort_answers(*arguments)
        raise
    ranks.main_only(sort_answers, *arguments)


# --- elicit: the policy's own wrong answers -------------------------------------------------------

def elicit(items: list, out: str, policy: LocalModel | Server, sampling: Sampling, ranks: Ranks,
           samples: int = 1, seed: int = 0):
    """Sample `samples` answers to every question and grade them.

    Writes samples.jsonl (all answers with their verdicts), errors.jsonl (the wrong ones, for
    `rectify`), correct.jsonl (the right ones as positive-only rows: RFT data for train.py) and
    summary.json (counts by verdict). An answer cut off at max_tokens has no end that could be
    trained: it is counted, and kept in samples.jsonl alone."""
    requests, asked = [], {}
    for item in items:
        for i in range(samples):
            requests.append(request_for(f"{item.id}/{i}", item.messages, seed))
            asked[requests[-1].key] = item
    names = ("samples", "errors", "correct")
    with sorted_at_the_end(policy, asked, out, ranks, names, judge_answer):
        for _ in sample(policy, requests, out, sampling, ranks, "eliciting"):
            pass  # each is in the log


def judge_answer(item: Item, record: dict) -> tuple:
    """(verdict, {file name: row}) of one record."""
    if "error" in record:
        return "request failed", {}
    text, extracted = record["text"], extract_answer(record["text"])
    if record["finish"] == "length":
        verdict, extracted = "cut off at max_tokens", None
    elif extracted is None:
        verdict = "wrong: no final answer"
    else:
        verdict = "right" if answers_match(extracted, item.gold) else "wrong"
    name, _, _ = record["key"].rpartition(" ")
    row = {"id": name, "question": item.question, "ground_truth": item.gold}
    rows = {"samples": {**row, "answer": text, "extracted_answer": extracted, "verdict": verdict,
                        "tokens": record["tokens"]}}
    if verdict == "right":
        rows["correct"] = {**row, "original_answer": "", "gemini_corrected_answer": text,
                           "is_correct": True}
    elif verdict.startswith("wrong") and text.strip():
        rows["errors"] = {**row, "original_answer": text, "extracted_answer": extracted}
    return verdict, rows


# --- rectify: the Oracle's corrections ------------------------------------------------------------

def rectify(items: list, out: str, oracle, encode, ranks: Ranks, prompt: str = "correct",
            max_change_ratio: float = 0.6, target: int = 0, sampling: Sampling | None = None,
            seed: int | None = None):
    """Have every wrong answer corrected; keep what is right and a small change.

    oracle  a Server or LocalModel, asked with PROMPTS[prompt], sampling and seed; or a function
            (Item) -> corrected text, which raises where it has none
    encode  text -> token ids, for the change ratio
    target  stop asking at that many pairs of a rank (those under way still count); 0: ask for all
    Writes pairs.jsonl (official row format), rejected.jsonl (every other answer with its reason)
    and summary.json (counts by outcome)."""
    requests = [request_for(item.id, oracle_messages(item, prompt), seed) for item in items]
    asked = {request.key: item for request, item in zip(requests, items)}
    by_function = callable(oracle)

    def call(request):
        try:
            text = data.check_text(oracle(asked[request.key]), "what the function returned")
            return {"text": text, "finish": "stop", "tokens": 0}
        except (Exception, SystemExit) as e:  # the user's code may raise anything
            return {"error": f"{type(e).__name__}: {e}"}

    def judge(item, record):
        verdict, pair = judge_correction(item, record, encode, prompt, by_function,
                                         max_change_ratio)
        row = {"index": item.id, "question": item.question, "ground_truth": item.gold}
        if pair:
            return verdict, {"pairs": row | pair}
        row |= {"original_answer": item.answer, "reason": verdict}
        return verdict, {"rejected": row | record}

    policy, at_once = call if by_function else oracle, 512 if target else 10**9
    pairs = 0
    with sorted_at_the_end(oracle, asked, out, ranks, ("pairs", "rejected"), judge):
        for record in sample(policy, requests, out, sampling, ranks, "rectifying", at_once):
            if target and judge(asked[record["key"]], record)[0] == "pairs":
                pairs += 1
                if pairs == target:
                    break


def oracle_messages(item: Item, prompt: str) -> list:
    """What the Oracle is asked: one user turn; under "direct" the question as the policy got it."""
    turns = item.messages
    if prompt == "direct":
        return turns
    question = turns[0]["content"]
    if len(turns) > 1:
        question = "\n\n".join(f"{m['role']}: {m['content']}" for m in turns)
    values = {"question": question, "answer": item.answer, "gold": item.gold}
    filled = re.sub(r"\{(question|answer|gold)\}", lambda m: values[m[1]], PROMPTS[prompt])
    return [{"role": "user", "content": filled}]


def judge_correction(item, record, encode, prompt, by_function, max_change_ratio):
    """("pairs", fields of the pair row) or (reason, None) for one raw answer."""
    if "error" in record:
        return "request failed", None
    if record["finish"] == "length":
        return "cut off by the token limit", None
    text = after_thinking(record["text"])
    has_markers = START in text and END in text.rpartition(START)[2]
    if not has_markers and prompt != "direct" and not by_function:
        return "no text between the markers", None
    text = data.strip_markers(text).strip()
    if not text:
        return "empty correction", None
    extracted = extract_answer(text)
    if extracted is None:
        return "no final answer in the correction", None
    if not answers_match(extracted, item.gold):
        return "the correction's answer is wrong", None
    pair = {"gemini_corrected_answer": text, "gemini_extracted_answer": extracted,
            "is_correct": True}
    if prompt == "direct":  # no correction of y-: the paper's SFT data
        return "pairs", {"original_answer": "", "policy_answer": item.answer, **pair}
    wrong = encode(data.strip_markers(item.answer))  # it has markers only in files made by hand
    ratio = data.change_ratio(wrong, encode(text))
    if ratio > max_change_ratio:
        return f"change ratio above {max_change_ratio}", None
    return "pairs", {"original_answer": item.answer, **pair, "change_ratio": round(ratio, 4)}


def python_function(spec: str):
    """FILE.py:NAME, a function of the user's own that takes an Item (question, answer, gold) and
    returns the corrected text. Returns the function, and a name that tells its versions apart."""
    path, _, name = spec.partition(":")
    try:
        sys.path.insert(0, os.path.dirname(os.path.abspath(path)))  # it may import its neighbours
        function = runpy.run_path(path)[name]
        if not callable(function):
            raise TypeError(f"{name} is no function")
        with open(path, "rb") as f:
            return function, f"{spec} {hashlib.sha256(f.read()).hexdigest()[:16]}"
    except (Exception, SystemExit) as e:
        raise UserError(f"--function {spec!r}, FILE.py:NAME expected, cannot be loaded: "
                        f"{type(e).__name__}: {e}") from None


# --- command line ---------------------------------------------------------------------------------

@dataclass
class ElicitOptions(SamplingOptions):
    """sample the policy's answers, sort them into right and wrong"""

    questions: str = option("", "JSONL: question|problem|prompt, and the gold answer (required)")
    samples: int = option(1, "answers per question")
    instruction: str = option(INSTRUCTION, "user turn around {question}; messages are sent as is")
    limit: int = option(0, "only the first that many questions; 0: all")
    skip_malformed: bool = option(False, "drop and count malformed rows instead of stopping")


@dataclass
class RectifyOptions(SamplingOptions):
    """have the wrong answers corrected"""

    errors: str = option("", "errors.jsonl of `elicit` (required)")
    tokenizer: str = option("", "the policy's folder, for the change ratio; needed without --model")
    function: str = option("", "FILE.py:NAME, a Python function as the Oracle: Item -> text")
    prompt: str = option("correct", "what the Oracle is asked: to correct y-, the same with the "
                         "gold answer given, or just the question", tuple(PROMPTS))
    max_change_ratio: float = option(0.6, "drop pairs with 1 - LCS(y-, y+)/|y+| above this (gamma)")
    target: int = option(0, "stop asking at that many pairs; 0: ask for all")


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
    sampling, seed = o.sampling, o.seed
    with ranks.together():
        if ranks.world > 1 and o.target:
            raise UserError("--target needs one process: use python, not torchrun")
        if not o.tokenizer and not o.model:
            raise UserError("--tokenizer is required: the policy's folder, for the change ratio")
        items, _ = read_errors(o.errors)
        folder = o.tokenizer or o.model
        encode = data.load_chat(folder, qwen.read_config(folder).vocab_size, o.template).encode
        if o.function:
            oracle, name = python_function(o.function)
        else:
            oracle = open_policy(o, ranks.device, non_thinking=False)
            name = identity(oracle, o)
        if o.server:  # it has its own best settings
            values = asdict(sampling).items()
            sampling = Sampling(**{key: x if key in o.given else None for key, x in values})
            seed = seed if "seed" in o.given else None
    settings = {"command": "rectify", "seed": seed, "prompt": o.prompt, "asked": name,
                "sampling": asdict(sampling)}
    claim_folder(o.out, settings, ranks, oracle)
    rectify(items, o.out, oracle, encode, ranks, o.prompt, o.max_change_ratio, o.target, sampling,
            seed)


COMMANDS = {"elicit": (run_elicit, ElicitOptions, ("out", "questions")),
            "rectify": (run_rectify, RectifyOptions, ("out", "errors"))}


def main() -> int:
    """Command line to exit code: 0 done, 1 failed, 2 options that do not work."""
    return evaluation.main(COMMANDS, __doc__)


if __name__ == "__main__":
    qwen.run_and_exit(main)

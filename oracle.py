"""Making the pairs: questions -> the policy's own wrong answers -> an Oracle's minimal corrections.

Comes in:  a JSONL file of questions with gold answers, a policy, and an Oracle: any OpenAI-compatible chat
           endpoint, the policy itself, a Python function, or answers edited by hand.
Goes out:  errors.jsonl (`elicit`), then pairs.jsonl (`rectify`) as train.py reads it.

    python oracle.py elicit --questions dapo-en.jsonl --model Qwen3-8B --out data/elicited
    python oracle.py rectify --errors data/elicited/errors.jsonl --server https://host/v1 \\
        --tokenizer Qwen3-8B --out data/rectified

Both keep every raw answer in OUT/raw-*.jsonl as it comes. All other files of OUT are made from those, so a
kill loses nothing: start the same command again. `elicit` also runs under torchrun, a share a rank.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import re
from collections import Counter
from dataclasses import asdict, dataclass

import data
import eval as evaluation
import model as qwen
from eval import (INSTRUCTION, LAST_LINE, Asking, Own, Sampling, Server, after_thinking, answers_match,
                  check_asking, claim_folder, extract_answer, finish, gold_answer, identity, item_id,
                  open_policy, request_for)
from data import write_rows
from data import Drop, UserError
from model import Ranks, add_options, begin, option

START, END = "=== CORRECTED STARTED ===", "=== CORRECTED ENDED ==="
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
- write as if the solution had been right at the first attempt: never mention a mistake, a correction, the
  student, or a given answer;
- end with this line, ANSWER replaced by the final answer:
""" + LAST_LINE + f"""

Write the whole repaired solution between these two lines:
{START}
{END}
"""
PROMPTS = {  # {given} and {first} are filled here, {question}, {answer}, {gold} for each error
    "correct": _REPAIR.replace("{given}", "").replace("{first}", "First solve the problem yourself."),
    "correct_with_answer": _REPAIR.replace("{given}", " The right final answer is {gold}.").replace(
        "{first}", "First find out where the solution leaves the way to the right answer."),
    "direct": "{question}",
}


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


def read_items(path, parse, skip_malformed):
    """All rows of a file by `parse(row, line)`, ids unique. Returns (items, dropped Counter)."""
    items, dropped = data.read_rows(path, parse, skip_malformed)
    twice = [k for k, n in Counter(item.id for item in items).items() if n > 1]
    if twice:
        first = ", ".join(map(ascii, twice[:5]))
        raise UserError(f"{path}: {len(twice)} ids occur more than once, first {first}: make "
                        "the field id (or index) unique, or remove it")
    if not items:
        raise UserError(f"{path}: no usable row ({dict(dropped)})")
    return items, dropped


def read_questions(path, instruction, skip_malformed=False):
    """Questions as they will be sent: a string goes into the instruction, messages stay as they are. A
    question that is there already is dropped and counted."""
    seen = set()

    def parse(row, line):
        key = next((k for k in ("question", "problem", "prompt") if row.get(k) is not None), None)
        if key is None:
            raise UserError(f"question, problem or prompt expected, found {sorted(row)!r:.100}")
        messages = data.prompt_messages(row[key], key)
        question = messages
        if not isinstance(row[key], list):
            question = instruction.replace("{question}", row[key])
        elif len(messages) == 1:
            question = messages[0]["content"]
        text = json.dumps(question)
        if text in seen:
            raise Drop("the same question again")
        seen.add(text)
        return Item(item_id(row, line), question, gold_answer(row))

    return read_items(path, parse, skip_malformed)


def read_errors(path, skip_malformed=False):
    """Rows of errors.jsonl: question, original_answer, ground_truth (or another field of gold_answer)."""
    def parse(row, line):
        missing = [k for k in ("question", "original_answer") if k not in row]
        if missing:
            raise UserError(f"{', '.join(missing)} missing, found {sorted(row)!r:.100}")
        data.prompt_messages(row["question"], "question")
        answer = data.check_text(row["original_answer"], "'original_answer'")
        if not answer.strip():
            raise Drop("the wrong answer is empty")
        gold = gold_answer({"answer": row["ground_truth"]} if "ground_truth" in row else row)
        return Item(item_id(row, line), row["question"], gold, answer)

    return read_items(path, parse, skip_malformed)


def collect(policy, requests, out, sampling, ranks, title, judge, write, enough=None) -> dict:
    """Sample all requests, judge each answer as it comes, then write the files; also when something ends it
    early. `judge(record)` gives an outcome, a tuple that starts with its name; `write(records, outcomes)`,
    both by key, returns the summary."""
    outcomes, shown = {}, Counter()

    def on_record(record):
        outcome = outcomes[record["key"]] = judge(record)
        shown[outcome[0]] += 1
        return dict(shown.most_common(3))

    def conclude(records):  # other ranks' answers are still to be judged
        summary = write(records, {k: outcomes.get(k) or judge(r) for k, r in records.items()})
        data.write_json(os.path.join(out, "summary.json"), summary)
        ranks.say("\n".join(f"{n:7}  {what}" for what, n in summary.items()) + f"\n{out}")
        return summary

    try:
        records = evaluation.sample(policy, requests, out, sampling, ranks, title, on_record,
                                    enough and (lambda: enough(outcomes)))
    except (SystemExit, KeyboardInterrupt):
        with contextlib.suppress(UserError, OSError):  # what ended it comes first
            if ranks.main:
                conclude(evaluation.read_log(out, [r.key for r in requests]))
        raise
    with ranks.together():
        summary = conclude(records) if ranks.main else {}
        errors = [r["error"] for r in records.values() if "error" in r]
        if isinstance(policy, Server) and errors and len(errors) == len(records):
            raise UserError(f"all {len(errors)} requests failed, the first with: {errors[0]:.200}; the same "
                            "command asks them again")
    return summary


# --- elicit: the policy's own wrong answers -------------------------------------------------------


def elicit(items: list, out: str, policy: Own | Server, sampling: Sampling, ranks: Ranks, samples: int = 1,
           seed: int = 0) -> dict:
    """Sample `samples` answers to every question and grade them.

    Writes samples.jsonl (all answers with their verdicts), errors.jsonl (the wrong ones, for `rectify`) and
    correct.jsonl (the right ones as positive-only rows: RFT data for train.py). An answer cut off at
    max_tokens has no end that could be trained: it is counted, and kept in samples.jsonl alone. Returns
    counts by outcome (of all ranks, on the main one).
    """
    wanted = [(request_for(f"{item.id}/{k}", item.messages, seed), item, f"{item.id}/{k}")
              for item in items for k in range(samples)]
    gold = {request.key: item.gold for request, item, _ in wanted}

    def judge(record):
        if "error" in record:
            return "request failed", None
        if record["finish"] == "length":
            return "cut off at max_tokens", None
        found = extract_answer(record["text"])
        if found is None:
            return "wrong: no final answer", None
        return "right" if answers_match(found, gold[record["key"]]) else "wrong", found

    def write(records, outcomes):
        rows = {"samples": [], "errors": [], "correct": []}
        for request, item, name in wanted:
            record = records.get(request.key, {})
            if "text" in record:
                text, (verdict, found) = record["text"], outcomes[request.key]
                row = {"id": name, "question": item.question, "ground_truth": item.gold}
                rows["samples"].append({**row, "answer": text, "extracted_answer": found, "verdict": verdict,
                                        "tokens": record["tokens"]})
                if verdict.startswith("wrong") and text.strip():
                    rows["errors"].append({**row, "original_answer": text, "extracted_answer": found})
                elif verdict == "right":
                    rows["correct"].append({**row, "original_answer": "", "gemini_corrected_answer": text,
                                            "is_correct": True})
        for name, content in rows.items():
            write_rows(os.path.join(out, f"{name}.jsonl"), content)
        return {"answers wanted": len(wanted), **Counter(verdict for verdict, _ in outcomes.values())}

    return collect(policy, [request for request, *_ in wanted], out, sampling, ranks, "eliciting",
                   judge, write)


# --- rectify: the Oracle's corrections ------------------------------------------------------------


def rectify(items: list, out: str, oracle, encode, ranks: Ranks, prompt: str = "correct",
            max_change_ratio: float = 0.6, target: int = 0, sampling: Sampling = Sampling(), seed: int = 0
            ) -> dict:
    """Have every wrong answer corrected, keep what is right and a small change.

    oracle    a Server or Own model, asked with PROMPTS[prompt]; or a function (Item) -> corrected text,
              which raises where it has none
    encode    text -> token ids, for the change ratio
    target    stop asking once there are that many pairs (those under way still count); 0: ask for all
    Writes pairs.jsonl (official row format) and rejected.jsonl (every other answer with its reason); one
    outcome an error. Returns counts by outcome.
    """
    requests = [request_for(item.id, oracle_messages(item, prompt), seed) for item in items]
    asked = {request.key: item for request, item in zip(requests, items)}
    by_function = not isinstance(oracle, (Own, Server))

    def call(request):
        try:
            text = data.check_text(oracle(asked[request.key]), "what the function returned")
            return {"text": text, "finish": "stop", "tokens": 0}
        except (Exception, SystemExit) as e:  # the user's code: whatever it raises, it has no answer to this
            why = str(e) if isinstance(e, UserError) else f"{type(e).__name__}: {e}"
            return {"error": why.encode(errors="replace").decode()}  # a file's name may be no text

    def judge(record):
        return judge_correction(asked[record["key"]], record, encode, prompt, by_function, max_change_ratio)

    def write(records, outcomes):
        rows = {"pairs": [], "rejected": []}
        for key, item in asked.items():
            if key in outcomes:
                verdict, pair = outcomes[key]
                row = {"index": item.id, "question": item.question, "ground_truth": item.gold}
                raw = {k: v for k, v in records[key].items() if k in ("text", "error")}
                rows["pairs" if pair else "rejected"].append(
                    {**row, **(pair or {"original_answer": item.answer, "reason": verdict, **raw})})
        for name, content in rows.items():
            write_rows(os.path.join(out, f"{name}.jsonl"), content)
        return {"errors given": len(items), "not asked": len(items) - len(outcomes),
                **Counter(verdict for verdict, _ in outcomes.values())}

    def enough(outcomes):
        return sum(verdict == "pairs" for verdict, _ in outcomes.values()) >= target

    return collect(call if by_function else oracle, requests, out, sampling, ranks, "rectifying",
                   judge, write, enough if target else None)


def oracle_messages(item: Item, prompt: str) -> list:
    """What the Oracle is asked: one user turn; under "direct" the question as the policy got it."""
    if prompt == "direct":
        return item.messages
    turns = item.messages
    text = "\n\n".join(f"{m['role']}: {m['content']}" for m in turns)
    text = turns[0]["content"] if len(turns) == 1 else text
    values = {"question": text, "answer": item.answer, "gold": item.gold}
    filled = re.sub(r"\{(question|answer|gold)\}", lambda m: values[m[1]], PROMPTS[prompt])
    return [{"role": "user", "content": filled}]


def judge_correction(item, record, encode, prompt, by_function, max_change_ratio):
    """("pairs", fields of the pair row) or (reason, None) for one raw answer."""
    if "error" in record:
        return "request failed: " + record["error"], None
    if record["finish"] == "length":
        return "cut off by the token limit", None
    text = after_thinking(record["text"])
    if prompt != "direct" and not by_function:
        if START not in text or END not in text.rpartition(START)[2]:
            return "no text between the markers", None
    text = data.clean_answer(text).strip()
    if not text:
        return "empty correction", None
    found = extract_answer(text)
    if found is None:
        return "no final answer in the correction", None
    if not answers_match(found, item.gold):
        return "the correction's answer is wrong", None
    pair = {"gemini_corrected_answer": text, "gemini_extracted_answer": found, "is_correct": True}
    if prompt == "direct":  # no correction of y-: the paper's SFT data
        return "pairs", {"original_answer": "", "policy_answer": item.answer, **pair}
    wrong, right = encode(data.clean_answer(item.answer)), encode(text)
    if wrong == right:
        return "nothing was changed", None
    ratio = data.change_ratio(wrong, right)
    if ratio > max_change_ratio:
        return f"change ratio above {max_change_ratio}", None
    return "pairs", {"original_answer": item.answer, **pair, "change_ratio": round(ratio, 4)}


def python_function(spec: str):
    """FILE.py:NAME, a function of the user's own that takes an Item (question, answer, gold) and returns the
    corrected text."""
    path, _, name = spec.rpartition(":")
    if not os.path.isfile(path):
        raise UserError(f"--function is {spec!r}; FILE.py:NAME with an existing file expected")
    module_spec = importlib.util.spec_from_file_location("user_oracle", path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as e:
        raise UserError(f"--function: {path} cannot be loaded: {type(e).__name__}: {e}") from None
    if not callable(getattr(module, name, None)):
        raise UserError(f"--function: {path} defines no function {name!r}")
    return getattr(module, name)


def edited_answers(path: str):
    """A function that looks corrections up in a copy of errors.jsonl to which a human has added the field
    "corrected_answer"."""
    def parse(row, line):
        corrected = row.get("corrected_answer")
        return Item(item_id(row, line), "", "", data.check_text(corrected or "", "'corrected_answer'"))

    edited = {item.id: item.answer for item in read_items(path, parse, False)[0]}

    def look_up(item):
        if not edited.get(item.id):
            raise UserError(f"no corrected_answer in {os.path.basename(path)} yet")
        return edited[item.id]

    return look_up


# --- command line ---------------------------------------------------------------------------------


@dataclass
class ElicitOptions(Asking):
    """python oracle.py elicit"""

    questions: str = option("", "JSONL: question|problem|prompt, and the gold answer (required)")
    samples: int = option(1, "answers per question")
    instruction: str = option(INSTRUCTION, "user turn around {question}; messages are sent as they are")
    limit: int = option(0, "only the first that many questions; 0: all")
    skip_malformed: bool = option(False, "drop and count malformed rows instead of stopping")


@dataclass
class RectifyOptions(Asking):
    """python oracle.py rectify"""

    errors: str = option("", "errors.jsonl of `elicit` (required)")
    tokenizer: str = option("", "the policy's folder, for the change ratio; --model's if that is given")
    function: str = option("", "FILE.py:NAME, a Python function as the Oracle: Item -> corrected text")
    edited: str = option("", "a copy of errors.jsonl with corrected_answer added by hand")
    prompt: str = option("correct", "what the Oracle is asked: to correct y-, the same with the gold answer "
                         "in hand, or just the question (positive-only rows)", tuple(PROMPTS))
    max_change_ratio: float = option(0.6, "drop pairs with 1 - LCS(y-, y+)/|y+| above this (gamma)")
    target: int = option(0, "stop asking at that many pairs; 0: ask for all")
    skip_malformed: bool = option(False, "drop and count malformed rows instead of stopping")


def parse_command(argv=None):
    """Command line to an options record; raises UserError listing every problem at once."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, kind in (("elicit", ElicitOptions), ("rectify", RectifyOptions)):
        add_options(commands.add_parser(name, help=kind.__doc__, allow_abbrev=False), kind)
    given = vars(parser.parse_args(argv))
    command = given.pop("command")
    o = (ElicitOptions if command == "elicit" else RectifyOptions)(**given)
    o.given = given
    problems = [f"--{k} is required" for k in ("questions", "errors") if getattr(o, k, None) == ""]
    problems += check_asking(o, ("model", "server") + ("function", "edited") * (command == "rectify"))
    if command == "rectify" and not (o.tokenizer or o.model):
        problems.append("--tokenizer is required: the policy's folder, whose tokens the change ratio counts")
    for k, low in {"samples": 1, "limit": 0, "target": 0, "max_change_ratio": 0}.items():
        if not low <= getattr(o, k, low) < float("inf"):
            problems.append(f"--{k} is {getattr(o, k)}, a number of at least {low} expected")
    if command == "elicit" and "{question}" not in o.instruction:
        problems.append("--instruction lacks {question}")
    if problems:
        raise UserError("\n  ".join(["these options do not work:"] + problems))
    return o


def run(o, ranks: Ranks):
    """One command from options to files."""
    eliciting, settings = isinstance(o, ElicitOptions), {"seed": o.seed}
    sampling = Sampling(o.temperature, o.top_p, o.top_k, o.max_tokens)
    with ranks.together():
        if eliciting:
            items, dropped = read_questions(o.questions, o.instruction, o.skip_malformed)
            items = items[:o.limit or None]
            policy = open_policy(o, ranks.device)
        else:
            items, dropped = read_errors(o.errors, o.skip_malformed)
            folder = qwen.checkpoint_folder(o.tokenizer or o.model)
            encode = data.load_chat(folder, qwen.read_config(folder).vocab_size).encode
            policy = (python_function(o.function) if o.function else edited_answers(o.edited) if o.edited
                      else open_policy(o, ranks.device, non_thinking=False))
            settings["prompt"] = o.prompt
        for reason, count in dropped.items():
            ranks.say(f"{count} rows dropped: {reason}")
    if isinstance(policy, Server) and not eliciting:  # an Oracle has its own best settings
        sampling = Sampling(*(getattr(o, k) if k in o.given else None for k in asdict(sampling)))
    with ranks.together():
        if ranks.main:
            named = o.edited and "edited by hand" if not eliciting else ""
            if not eliciting and o.function:
                with open(o.function.rpartition(":")[0], "rb") as f:
                    named = f"{o.function} {hashlib.sha256(f.read()).hexdigest()[:16]}"
            claim_folder(o.out, {"command": "elicit" if eliciting else "rectify", **settings,
                                 "asked": named or identity(policy, o), "sampling": asdict(sampling)})
            if named == "edited by hand":  # the edited file is the record
                with evaluation.open_log(os.path.join(o.out, "raw-0.jsonl")) as log:
                    log.truncate(0)
    if eliciting:
        elicit(items, o.out, policy, sampling, ranks, o.samples, o.seed)
    else:
        rectify(items, o.out, policy, encode, ranks, o.prompt, o.max_change_ratio, o.target, sampling, o.seed)


def main() -> int:
    """Command line to exit code: 0 done, 1 failed, 2 options that do not work."""
    o, ranks = begin(parse_command)
    return finish(lambda: run(o, ranks))


if __name__ == "__main__":
    qwen.leave(main)

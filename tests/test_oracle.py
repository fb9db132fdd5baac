"""The pipeline that makes the pairs: client, elicit, rectify, and what can go wrong on the way."""

import email.utils
import os
import random
import re
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import launch
import tiny
from misbehaving import Misbehaving, completion

import data
import eval as evaluation
import oracle
from data import UserError
from data import read_log as rows
from data import write_rows

KEY = "sk-secret-0123456789"
RECTIFY = "rectify", "--errors", "errors.jsonl", "--tokenizer", "policy", "--out"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch, checkpoint, tmp_path):
    """Empty but for the policy."""
    monkeypatch.chdir(tmp_path)
    os.symlink(checkpoint, "policy")


def run(*argv):
    return launch.program(oracle, *argv)


def rectify(server, *more):
    return run(*RECTIFY, "out", "--server", server.url, *more)


def write_errors(count=8):
    """Wrong sums; the right answer to question i is 2 i."""
    errors = [{"id": f"q{i}", "question": f"What is {i} plus {i}?", "ground_truth": str(2 * i),
               "original_answer": f"We add {i} and {i} step by step. Therefore, the final answer "
                                  f"is: $\\boxed{{{2 * i + 1}}}$."} for i in range(count)]
    write_rows("errors.jsonl", errors)
    return errors


def good(body, attempt):
    """What a good Oracle answers: the student's solution with the right number in its box."""
    i = int(body["messages"][-1]["content"].split("What is ")[1].split()[0])
    return completion(f"First I solve it.\n{oracle.START}\nWe add {i} and {i} step by step. "
                      f"Therefore, the final answer is: $\\boxed{{{2 * i}}}$.\n{oracle.END}\n")


# --- the client -----------------------------------------------------------------------------------

@pytest.fixture
def pauses(monkeypatch):
    """What the client would have slept, in seconds."""
    slept = []
    monkeypatch.setattr(evaluation.time, "sleep", slept.append)
    return slept


def ask(server, timeout):
    client = evaluation.Server(server.url, "m", timeout=timeout, tries=3)
    request = evaluation.Request("k", [{"role": "user", "content": "What is 2 plus"}], 1)
    return evaluation.ask(client, request, evaluation.Sampling())


@pytest.mark.parametrize("after,least,most", [("7", 7, 7), (email.utils.formatdate(0), 0.5, 1)])
def test_a_fault_that_passes_is_retried(after, least, most, pauses):
    def behave(body, attempt):
        return good(body, attempt) if attempt else (429, {"Retry-After": after}, b"slow down")
    with Misbehaving(behave) as server:
        record = ask(server, 0.4)
    assert oracle.START in record["text"] and record["finish"] == "stop"
    assert sum(server.asked.values()) == 2 and len(pauses) == 1 and least <= pauses[0] <= most
    assert server.requests[0][1]["seed"] == 1 and "Authorization" not in server.requests[0][0]


@pytest.mark.parametrize("answer, reason, times", [
    ((429, {}, b"slow down"), r"HTTP 429: slow down \(tried 3 times\)", 3),
    ((400, {}, b"too long"), "HTTP 400: too long", 1),
    ((302, {"Location": "http://127.0.0.1:9/"}, b""), "HTTP 302: ", 1),
    ("drop", r"RemoteDisconnected: .*\(tried 3 times\)", 3),
    ("truncated", r"IncompleteRead: .*\(tried 3 times\)", 3),
    ("hang", r"TimeoutError: timed out \(tried 3 times\)", 3),
    (b"<html>", r"JSONDecodeError: .*\(tried 3 times\)", 3),
    ((500, {"Content-Length": "99"}, b"half"), r"IncompleteRead: .*\(tried 3 times\)", 3),
    ({"error": {"code": 503}}, r'HTTP 200: \{"error": \{"code": 503\}\} \(tried 3 times\)', 3),
    ({"choices": []}, "no chat completion: .*", 1),
    (completion(7), "no chat completion: .*", 1)])
def test_a_fault_that_stays_is_a_named_outcome(answer, reason, times, pauses):
    with Misbehaving(lambda *_: answer) as server:
        record = ask(server, 0.3)
    assert list(record) == ["error"] and re.fullmatch(reason, record["error"]), record
    assert sum(server.asked.values()) == times
    assert all(0.5 * 2**i <= pause <= 2**i for i, pause in enumerate(pauses))


def open_server(url):
    return evaluation.open_policy(evaluation.SamplingOptions(server=url), None)


def test_the_only_model_is_found_and_bad_addresses_and_keys_are_refused(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Misbehaving(good) as server:
        client = open_server(server.url + "/")
    assert client.model == "stand-in" and client.url == server.url and KEY not in repr(client)
    for url in ("", "localhost:8000", "ftp://x/v1", "http://user:pw@host/v1"):
        with pytest.raises(UserError, match="--server: http://") as refused:
            open_server(url)
        assert "pw" not in str(refused.value)
    monkeypatch.setenv("OPENAI_API_KEY", "k€y")
    with pytest.raises(UserError, match="no HTTP header can carry") as refused:
        open_server("http://x/v1")
    assert "k€y" not in str(refused.value)


# --- rectify --------------------------------------------------------------------------------------

def test_rectify_makes_pairs_that_train_reads(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")  # a newline is no part of a key
    given = write_errors()
    with Misbehaving(good) as server:
        code, err = rectify(server)
        assert code == 0, err
        assert all(h["Authorization"] == f"Bearer {KEY}" for h, _ in server.requests)
        assert all(b["model"] == "stand-in" and "temperature" not in b for _, b in server.requests)
        assert all(r["question"] in p and r["original_answer"] in p
                   for r, p in zip(given, sorted(server.asked)))
        code, err = rectify(server)  # nothing left to ask
        assert code == 0 and len(server.requests) == len(given)
    pairs = rows("out/pairs.jsonl")
    assert [(p["index"], p["gemini_extracted_answer"]) for p in pairs] == [
        (r["id"], r["ground_truth"]) for r in given]
    assert all(oracle.START not in p["gemini_corrected_answer"] for p in pairs)
    assert all(0 < p["change_ratio"] < 0.1 for p in pairs)
    read, dropped, _ = tiny.read_pairs("out/pairs.jsonl")
    assert len(read) == len(given) and not dropped
    assert data.read_json("out/summary.json")["pairs"] == len(given)


def test_a_function_is_an_oracle_and_its_failures_are_outcomes():
    given, base = write_errors(count=7), (*RECTIFY, "out", "--function")
    Path("mine.py").write_text(
        "def fix(item):\n    if item.id == 'q6':\n        raise ValueError('/tmp/\\udcff')\n"
        "    right = item.answer.rpartition('{')[0] + '{' + item.gold + '}$.'\n"
        "    return [right, None, 7, '\\ud800', item.answer][int(item.id[1:])]\n")
    code, err = run(*base, "mine.py:fix")
    assert code == 0 and [row["index"] for row in rows("out/pairs.jsonl")] == ["q0"], err
    reasons = [f"{row['reason']} {row.get('error', '')}" for row in rows("out/rejected.jsonl")]
    parts = ("found NoneType", "found int", "surrogate", "answer is wrong", "IndexError",
             "ValueError: /tmp/?")
    assert all(part in reason for reason, part in zip(reasons, parts, strict=True))
    Path("mine.py").write_text("def fix(item):\n    return item.gold\n")
    for spec, message in (("mine.py:fix", "other settings"),  # its file has changed
                          ("mine.py:nope", "FILE.py:NAME: mine.py defines no 'nope'"),
                          ("none.py:fix", "No such file or directory: ")):
        code, err = run(*base, spec)
        assert code == 1 and message in err and len(rows("out/raw-0.jsonl")) == len(given)


def verdict_of(text, finish="stop", prompt="correct", answer="It is $\\boxed{5}$."):
    item, record = oracle.Item("1", "q", "4", answer), {"text": text, "finish": finish}
    verdict, files = oracle.judge_correction(lambda t: list(t.encode()), prompt, False, 0.6, item,
                                             record)
    return verdict, files["pairs" if verdict == "pairs" else "rejected"]


@pytest.mark.parametrize("text, gold, verdict", [
    ("$x = \\boxed{1}$ or $x = \\boxed{2}$", "1, 2", "right"),
    ("$\\boxed{1}$, no, $\\boxed{2}$", "2", "right"),
    ("$\\boxed{1}$\n$\\boxed{2}$", "1, 2", "wrong"),
    ("1, 2", "1, 2", "wrong: no final answer")])
def test_elicit_takes_all_boxes_of_the_last_line(text, gold, verdict):
    record = {"text": text, "finish": "stop", "tokens": 9}
    found, files = oracle.judge_answer(oracle.Item("1", "q", gold), record)
    assert found == verdict and files.keys() == {
        "samples", "correct" if verdict == "right" else "errors"}


def marked(text):
    return f"Thoughts {oracle.START}\n{text}\n{oracle.END}"


def test_every_flaw_of_a_correction_has_its_reason():
    reason = {
        "no text between the markers": [
            "It is $\\boxed{4}$.", f"{oracle.START} It is $\\boxed{{4}}$.",
            f"{oracle.END} $\\boxed{{4}}$ {oracle.START}", ""],
        "no final answer in the correction": [
            marked("It is four."), marked("It is $\\boxed{"), marked(""), marked(" \n")],
        "the correction's answer is wrong": [marked("$\\boxed{5}$."), marked("$\\boxed{44}$.")],
        "change ratio above 0.6": [marked("A wholly other way of saying it gives $\\boxed{4}$.")],
    }
    for expected, texts in reason.items():
        for text in texts:
            verdict, row = verdict_of(text)
            assert verdict == row["reason"] == expected, text
    right = "It is $\\boxed{4}$."
    assert verdict_of(marked(right), "length")[0] == "cut off by the token limit"
    verdict, pair = verdict_of("<think>" + marked("no") + "</think>" + marked(right))
    assert verdict == "pairs" and pair["gemini_corrected_answer"] == right
    assert pair["change_ratio"] == round(1 - 17 / 18, 4)  # one byte of 18 is new
    verdict, pair = verdict_of("Another way: $\\boxed{4}$", prompt="direct")
    assert verdict == "pairs" and pair["original_answer"] == ""
    assert pair["policy_answer"] == "It is $\\boxed{5}$."


def test_a_fence_around_the_whole_correction_is_no_part_of_it():
    right = "It is $\\boxed{4}$."
    fenced, blocks = f"```latex\n{right}\n```", f"```\n1\n```\n{right}\n```\n2\n```"
    for text, answer, kept in ((fenced, right, right), (fenced, fenced, fenced),
                               (blocks, f"1 {blocks}", blocks)):
        verdict, pair = verdict_of(marked(text), answer=answer)
        assert verdict == "pairs" and pair["gemini_corrected_answer"] == kept
    bold = f"**{oracle.START}**\n{right}\n**{oracle.END}**"
    assert verdict_of(bold)[1]["gemini_corrected_answer"] == right


def test_the_prompts_carry_what_they_should():
    item = oracle.Item("1", "Q {answer} {gold}", "GOLD", "WRONG {question}")
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    several = oracle.Item("2", turns, "GOLD")
    assert oracle.oracle_messages(several, "direct") == turns
    texts = [oracle.oracle_messages(i, prompt)[0]["content"] for i, prompt in (
        (item, "correct"), (item, "correct_with_answer"), (several, "correct"))]
    assert all(item.question in text and item.answer in text for text in texts[:2])
    assert [text.count("GOLD") for text in texts] == [0, 1, 0] and oracle.LAST_LINE in texts[1]
    assert "[Problem]\nsystem: S\n\nuser: U\n" in texts[2]


def test_401_stops_at_once():
    write_errors(count=200)

    def behave(body, attempt):
        return good(body, attempt) if len(server.requests) < 40 else (401, {}, b"wrong key")
    with Misbehaving(behave) as server:
        code, err = rectify(server, "--workers", 4)
        assert code == 1 and "HTTP 401: wrong key. Are the key (OPENAI_API_KEY)" in err
        assert err.count("error:") == 1 and len(server.requests) < 60
        kept, before = rows("out/raw-0.jsonl"), set(server.asked)
        assert 30 <= len(kept) <= 40
        with Misbehaving(good) as other:  # the first may still get requests that were under way
            code, err = rectify(other, "--target", 1)  # sorts what has arrived, asks nothing
            assert code == 0 and len(rows("out/pairs.jsonl")) == len(kept), err
            assert not other.requests
        server.behave = good
        code, err = rectify(server)
        assert code == 0 and len(rows("out/pairs.jsonl")) == 200
        assert sum(server.asked[p] > 1 for p in before) == len(before) - len(kept)


def test_an_error_waits_for_no_request_under_way(tmp_path):
    write_errors(count=8)
    waited = []

    def behave(body, attempt):
        if "What is 3 plus" in body["messages"][-1]["content"]:
            return 401, {}, b"wrong key"
        server.stop.wait(20)
        waited.append(body)
        return good(body, attempt)
    with Misbehaving(behave) as server:
        started = launch.Started([
            "oracle.py", "rectify", "--errors", tmp_path / "errors.jsonl", "--tokenizer",
            tmp_path / "policy", "--out", tmp_path / "out", "--server", server.url])
        assert started.wait() == [1] and "HTTP 401" in started.said and not waited


def test_target_stops_asking():
    write_errors(count=100)
    with Misbehaving(good) as server:
        code, err = rectify(server, "--target", 10, "--workers", 3)
    pairs = rows("out/pairs.jsonl")
    assert code == 0 and 10 <= len(pairs) == len(server.requests) < 30, err
    assert data.read_json("out/summary.json")["not asked"] == 100 - len(pairs)


# --- what is refused; broken files are in tests/faults --------------------------------------------

def test_a_folder_of_other_work_and_a_server_that_is_down_are_refused():
    write_errors()
    Path("other").mkdir()
    Path("other/thesis.txt").write_text("mine")
    with Misbehaving(good) as server:
        code, err = rectify(server, "--out", "other")
        assert code == 1 and "is not empty" in err and not server.requests
        rectify(server)
        before = launch.files(Path("out"))
        write_errors(count=3)
        code, err = rectify(server)
    assert code == 1 and "is not among the questions given" in err
    assert len(server.requests) == 8 and launch.files(Path("out")) == before
    code, err = rectify(server, "--out", "b", "--server_model", "m", "--tries", 1)  # closed
    assert code == 1 and "cannot be reached" in err and "Traceback" not in err


def test_contradictory_options_are_refused():
    rest = "--out o --server http://x/v1"
    for command, expected, *messages in (
            ("elicit", 2, "--out is required", "--questions is required", "exactly one of --model"),
            (f"rectify --errors e --model m {rest}", 2, "--model, --server, --function expected"),
            (f"elicit --questions q --workers -1 {rest}", 2, "--workers is -1"),
            (f"rectify --errors e {rest}", 1, "--tokenizer is required")):
        code, err = run(*command.split())
        assert code == expected and all(message in err for message in messages), err


# --- elicit ---------------------------------------------------------------------------------------

def write_questions(count):
    write_rows("q.jsonl", [{"question": f"{i} + {i}?", "answer": f"{2 * i}"} for i in range(count)])


def test_elicit_sorts_the_answers_of_a_server():
    write_questions(12)

    def behave(body, attempt):
        i = int(body["messages"][0]["content"].split("\n")[-1].split()[0])
        return [completion(f"\\boxed{{{2 * i}}}"), completion(f"\\boxed{{{2 * i + 1}}}"),
                completion("?"), completion("and so", "length"), (400, {}, b"no"),
                completion("")][i % 6]
    with Misbehaving(behave) as server:
        code, err = run("elicit", "--questions", "q.jsonl", "--out", "out", "--server", server.url,
                        "--samples", 2)
    assert code == 0, err
    assert server.requests[0][1].items() >= {
        "temperature": 0.7, "top_p": 0.8, "top_k": 20, "max_tokens": 32768}.items()
    assert len({b["seed"] for _, b in server.requests}) == 24
    assert data.read_json("out/summary.json") == {
        "answers wanted": 24, "not asked": 0, "right": 4, "wrong": 4, "wrong: no final answer": 8,
        "cut off at max_tokens": 4, "request failed": 4}
    errors = rows("out/errors.jsonl")
    assert len(errors) == 8 and all(oracle.LAST_LINE in e["question"] for e in errors)
    assert len(rows("out/samples.jsonl")) == 20
    read, dropped, _ = tiny.read_pairs("out/correct.jsonl")
    assert len(read) == 4 and all(p.rejected == "" for p in read) and not dropped


def test_sampled_texts_do_not_depend_on_ranks_or_batch(tmp_path):
    write_questions(256)
    shared = ("elicit", "--questions", tmp_path / "q.jsonl", "--model", tmp_path / "policy",
              "--dtype", "float32", "--max_tokens", 8, "--instruction", "{question}", "--out")
    for out, batch in (("a", 16), ("b", 1)):
        code, err = run(*shared, out, "--batch_size", batch)
        assert code == 0, err
    launch.run(["oracle.py", *shared, tmp_path / "c", "--batch_size", 4], ranks=2)
    texts = [rows(f"{out}/samples.jsonl") for out in "abc"]
    assert len(texts[0]) == 256 and texts[0] == texts[1] == texts[2]
    assert len({r["answer"] for r in texts[0]}) > 240  # random weights: they differ


# --- killed and gone on ---------------------------------------------------------------------------

@pytest.mark.slow
def test_a_storm_with_kills(tmp_path):
    """20 % of all requests faulty: one outcome for each error, none asked in vain."""
    rng, lock, given = random.Random(0), threading.Lock(), write_errors(count=120)
    faults = [(429, {"Retry-After": "0"}, b""), (500, {}, b""), (400, {}, b""), "drop", "truncated",
              "hang", b"<html>", completion("no \\boxed{1}"), completion("x", "length")]

    def behave(body, attempt):
        with lock:
            fault = rng.choice(faults) if rng.random() < 0.2 else None
        time.sleep(0.01)
        return good(body, attempt) if fault is None else fault

    prompts = {item.id: oracle.oracle_messages(item, "correct")[0]["content"]
               for item in oracle.read_errors("errors.jsonl")[0]}
    with Misbehaving(behave) as server:
        for stop in (signal.SIGTERM, signal.SIGKILL, None):
            known = {r["key"].split()[0] for r in rows("out/raw-0.jsonl") if "text" in r}
            before = Counter(server.asked)
            started = launch.Started([
                "oracle.py", "rectify", "--errors", tmp_path / "errors.jsonl", "--tokenizer",
                tmp_path / "policy", "--out", tmp_path / "out", "--server", server.url,
                "--workers", 8, "--request_timeout", 1, "--tries", 3])
            if stop:
                while server.asked.total() < before.total() + 20:
                    time.sleep(0.005)
                started.send(stop)
            codes = started.wait()
            assert all(server.asked[prompts[name]] == before[prompts[name]] for name in known)
            if stop == signal.SIGTERM:
                assert codes == [130] and "stopped; the same command goes on" in started.said
        assert codes == [0] and known, started.said
    pairs, rejected = rows("out/pairs.jsonl"), rows("out/rejected.jsonl")
    assert Counter(r["index"] for r in pairs + rejected) == {r["id"]: 1 for r in given}
    assert {r["reason"] for r in rejected} <= {
        "request failed", "no text between the markers", "cut off by the token limit"}
    assert len(pairs) > 96


def test_an_answer_of_one_rank_goes_before_a_failure_of_another():
    first = {"key": "a", "text": "1", "finish": "stop", "tokens": 1}
    write_rows("raw-0.jsonl", [first])
    write_rows("raw-1.jsonl", [{"key": "a", "error": "at another rank"}])
    assert evaluation.read_answers(".") == {"a": first}

"""The pipeline that makes the pairs: client, elicit, rectify, and what can go wrong on the way."""

import email.utils
import json
import random
import re
import signal
import subprocess
import sys
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

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
KEY = "sk-secret-0123456789"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny.write_checkpoint(folder)
    return str(folder)


def write_errors(path, count=8):
    """Wrong sums; the right answer to question i is 2 i."""
    rows = [{"id": f"q{i}", "question": f"What is {i} plus {i}?", "ground_truth": str(2 * i),
             "original_answer": f"We add {i} and {i} step by step. Therefore, the final answer is: "
                                f"$\\boxed{{{2 * i + 1}}}$."} for i in range(count)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return rows


def corrected(body):
    """What a good Oracle answers: the student's solution with the right number in its box."""
    text = body["messages"][-1]["content"]
    i = int(text.split("What is ")[1].split()[0])
    return (f"First I solve it.\n{oracle.START}\nWe add {i} and {i} step by step. "
            f"Therefore, the final answer is: $\\boxed{{{2 * i}}}$.\n{oracle.END}\n")


def good(body, attempt):
    return completion(corrected(body))


def two_plus():
    return evaluation.Request("k", [{"role": "user", "content": "What is 2 plus"}], 1)


def run_cli(monkeypatch, capsys, *argv):
    """`python oracle.py ...` in this process: (exit code, stderr)."""
    monkeypatch.setattr(sys, "argv", ["oracle.py", *map(str, argv)])
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    try:
        code = oracle.main()
    except SystemExit as e:
        code = e.code
    return code, capsys.readouterr().err


def rectify(monkeypatch, capsys, tmp_path, server, checkpoint, *more):
    return run_cli(monkeypatch, capsys, "rectify", "--errors", tmp_path / "errors.jsonl", "--out",
                   tmp_path / "out", "--tokenizer", checkpoint, "--server", server.url, *more)


def rows(path):
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def no_key_in(folder, *texts):
    for path in folder.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path
    assert not any(KEY in t for t in texts)


# --- the client -----------------------------------------------------------------------------------


@pytest.fixture
def pauses(monkeypatch):
    """What the client would have slept, in seconds."""
    slept = []
    monkeypatch.setattr(evaluation.time, "sleep", slept.append)
    return slept


ONCE = {
    "429": (429, {"Retry-After": "7"}, b'{"error": "slow down"}'), "500": (500, {}, b"oops"),
    "503 html": (503, {"Retry-After": email.utils.formatdate(0)}, b"<html>"), "drop": "drop",
    "truncated": "truncated", "no JSON": b"<html>busy</html>", "hang": "hang",
    "bad UTF-8": b'{"a": "\xff"}',
}


@pytest.mark.parametrize("fault", ONCE)
def test_a_fault_that_passes_is_retried(fault, pauses):
    def behave(body, attempt):
        return ONCE[fault] if attempt == 0 else good(body, attempt)

    with Misbehaving(behave) as server:
        client = evaluation.Server(server.url, "m", timeout=0.4, tries=3)
        record = evaluation.ask(client, two_plus(), evaluation.Sampling())
    assert oracle.START in record["text"] and record["finish"] == "stop"
    assert sum(server.asked.values()) == 2 and len(pauses) == 1
    assert pauses == [7.0] if fault == "429" else 0.5 <= pauses[0] <= 1
    assert server.requests[0][1]["seed"] == 1 and "Authorization" not in server.requests[0][0]


LASTING = {
    "429": ((429, {}, b"slow down"), r"HTTP 429: slow down \(tried 3 times\)", 3),
    "500": ((500, {}, b"oops"), r"HTTP 500: oops \(tried 3 times\)", 3),
    "400": ((400, {}, b"too long"), "HTTP 400: too long", 1),
    "302": ((302, {"Location": "http://127.0.0.1:9/"}, b""), "HTTP 302: ", 1),
    "drop": ("drop", r"RemoteDisconnected: .*\(tried 3 times\)", 3),
    "truncated": ("truncated", r"IncompleteRead: .*\(tried 3 times\)", 3),
    "hang": ("hang", r"TimeoutError: timed out \(tried 3 times\)", 3),
    "no JSON": (b"<html>", r"JSONDecodeError: .*\(tried 3 times\)", 3),
    "error in a 200": ({"error": {"code": 503}},
                       r"HTTP 200 with an error: \{'code': 503\} \(tried 3 times\)", 3),
    "no choices": ({"choices": []}, "no chat completion: .*", 1),
    "choices of numbers": ({"choices": [1]}, "no chat completion: .*", 1),
    "a list": (b"[1]", "no chat completion: .1.", 1),
    "content of numbers": (completion(7), "no chat completion: .*", 1),
}


@pytest.mark.parametrize("fault", LASTING)
def test_a_fault_that_stays_is_a_named_outcome(fault, pauses):
    answer, reason, times = LASTING[fault]
    with Misbehaving(lambda *_: answer) as server:
        client = evaluation.Server(server.url, "m", timeout=0.3, tries=3)
        record = evaluation.ask(client, two_plus(), evaluation.Sampling())
    assert list(record) == ["error"] and re.fullmatch(reason, record["error"]), record
    assert sum(server.asked.values()) == times
    assert all(0.5 * 2**i <= pause <= 2**i for i, pause in enumerate(pauses))


def test_the_only_model_of_a_server_is_found(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Misbehaving(good) as server:
        client = evaluation.open_server(server.url + "/")
        assert client.model == "stand-in" and client.url == server.url and KEY not in repr(client)
    with Misbehaving(good, ["a", "b"]) as server, pytest.raises(UserError, match=r"2 models \(a, b\)"):
        evaluation.open_server(server.url)


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x/v1", "http://", "http://user:pw@host/v1"])
def test_addresses_that_cannot_work_are_refused(url):
    with pytest.raises(UserError, match="--server is") as refused:
        evaluation.open_server(url, "m")
    assert "pw" not in str(refused.value)


def test_in_parallel_takes_items_as_needed_and_stops_at_an_error():
    taken, ended, gate = [], [], threading.Event()

    def items():
        for i in range(100):
            taken.append(i)
            yield i

    def square(i):
        if i > 5:
            gate.wait(10)
        ended.append(i)
        return i * i

    results = evaluation.in_parallel(square, items(), 4)
    found = [next(results) for _ in range(6)]
    assert sorted(found) == [i * i for i in range(6)] and len(taken) <= 6 + 4
    threading.Timer(0.05, gate.set).start()
    results.close()  # waits for those under way
    assert sorted(ended) == taken

    def fails(i):
        raise UserError("no")
    with pytest.raises(UserError, match="no"):
        list(evaluation.in_parallel(fails, range(5), 2))


# --- rectify --------------------------------------------------------------------------------------


def test_rectify_makes_pairs_that_train_reads(monkeypatch, capsys, tmp_path, checkpoint):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    given = write_errors(tmp_path / "errors.jsonl")
    with Misbehaving(good) as server:
        code, err = rectify(monkeypatch, capsys, tmp_path, server, checkpoint)
        assert code == 0, err
        assert all(h["Authorization"] == f"Bearer {KEY}" for h, _ in server.requests)
        assert all(b["model"] == "stand-in" and "temperature" not in b for _, b in server.requests)
        assert all(r["question"] in p and r["original_answer"] in p
                   for r, p in zip(given, sorted(server.asked)))
        code, err = rectify(monkeypatch, capsys, tmp_path, server, checkpoint)  # nothing left to ask
        assert code == 0 and len(server.requests) == len(given)
    pairs = rows(tmp_path / "out" / "pairs.jsonl")
    assert [p["index"] for p in pairs] == [r["id"] for r in given]
    assert [p["gemini_extracted_answer"] for p in pairs] == [r["ground_truth"] for r in given]
    assert all(oracle.START not in p["gemini_corrected_answer"] for p in pairs)
    assert all(0 < p["change_ratio"] < 0.1 for p in pairs)
    read, dropped, _ = data.read_pairs(str(tmp_path / "out" / "pairs.jsonl"))
    assert len(read) == len(given) and not dropped
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["pairs"] == len(given)
    no_key_in(tmp_path, err)


def verdict_of(text, finish="stop", prompt="correct", answer="It is $\\boxed{5}$."):
    item, record = oracle.Item("1", "q", "4", answer), {"text": text, "finish": finish}
    return oracle.judge_correction(item, record, lambda t: list(t.encode()), prompt, False, 0.6)


def marked(text):
    return f"Thoughts {oracle.START}\n{text}\n{oracle.END}"


def test_a_dummy_key_leaves_answers_alone(monkeypatch, capsys, tmp_path, checkpoint):
    write_errors(tmp_path / "errors.jsonl")
    monkeypatch.setenv("OPENAI_API_KEY", "x\n")  # a newline is no part of a key
    with Misbehaving(good) as server:
        code, err = rectify(monkeypatch, capsys, tmp_path, server, checkpoint, "--temperature", 0,
                            "--body", '{"presence_penalty": 1}')
        assert code == 0 and len(rows(tmp_path / "out" / "pairs.jsonl")) == 8, err
        headers, body = server.requests[0]
        assert headers["Authorization"] == "Bearer x" and body["presence_penalty"] == 1
        assert body["temperature"] == 0 and "top_p" not in body  # sent because it was given
        code, err = rectify(monkeypatch, capsys, tmp_path, server, checkpoint, "--temperature", 0)
        assert code == 1 and "other settings" in err
    monkeypatch.setenv("OPENAI_API_KEY", "k€y")
    code, err = rectify(monkeypatch, capsys, tmp_path, server, checkpoint)
    assert code == 1 and "no HTTP header can carry" in err and "k€y" not in err


def test_failing_functions_are_outcomes(monkeypatch, capsys, tmp_path, checkpoint):
    given = write_errors(tmp_path / "errors.jsonl", 7)
    base = ("rectify", "--errors", tmp_path / "errors.jsonl", "--tokenizer", checkpoint, "--out",
            tmp_path / "out", "--function", f"{tmp_path / 'mine.py'}:fix")
    (tmp_path / "mine.py").write_text(
        "import sys\ndef fix(item):\n    if item.id == 'q5':\n        sys.exit(0)\n"
        "    if item.id == 'q6':\n        raise ValueError('/tmp/\\udcff')\n"
        "    return [None, 7, '\\ud800', item.answer][int(item.id[1:])]\n")
    code, err = run_cli(monkeypatch, capsys, *base)
    assert code == 0, err
    reasons = [r["reason"] for r in rows(tmp_path / "out" / "rejected.jsonl")]
    parts = ("found NoneType", "found int", "surrogate", "answer is wrong", "IndexError",
             "SystemExit: 0", "ValueError: /tmp/?")
    assert all(part in reason for reason, part in zip(reasons, parts, strict=True))
    (tmp_path / "mine.py").write_text("def fix(item):\n    return item.gold\n")
    code, err = run_cli(monkeypatch, capsys, *base)  # another function in the folder of the first
    assert code == 1 and "other settings" in err
    code, err = run_cli(monkeypatch, capsys, *base[:-2], "--edited", tmp_path / "errors.jsonl")
    assert code == 1 and "other settings" in err and len(rows(tmp_path / "out" / "raw-0.jsonl")) == len(given)
    (tmp_path / "mine.py").write_text("def fix(")
    code, err = run_cli(monkeypatch, capsys, *base)
    assert code == 1 and "cannot be loaded: SyntaxError" in err


def test_sigterm_keeps_what_has_arrived(tmp_path, checkpoint):
    write_errors(tmp_path / "errors.jsonl", 30)
    with Misbehaving(lambda b, n: good(b, n) if len(server.requests) <= 20 else "hang") as server:
        command = [sys.executable, ROOT / "oracle.py", "rectify", "--errors", tmp_path / "errors.jsonl",
                   "--out", tmp_path / "out", "--tokenizer", checkpoint, "--server", server.url,
                   "--workers", "2"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while len(server.requests) < 22:
            time.sleep(0.01)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=20)
        assert process.returncode == 130 and "the same command goes on" in err and "Traceback" not in err
    assert len(rows(tmp_path / "out" / "pairs.jsonl")) == 20


def test_every_flaw_of_a_correction_has_its_reason():
    reason = {
        "no text between the markers": ["It is $\\boxed{4}$.", f"{oracle.START} It is $\\boxed{{4}}$.",
                                        f"{oracle.END} $\\boxed{{4}}$ {oracle.START}", ""],
        "empty correction": [marked(""), marked(" \n")],
        "no final answer in the correction": [marked("It is four."), marked("It is $\\boxed{")],
        "the correction's answer is wrong": [marked("It is $\\boxed{5}$."), marked("It is $\\boxed{44}$.")],
        "change ratio above 0.6": [marked("A wholly other way of saying things gives us $\\boxed{4}$.")],
    }
    for expected, texts in reason.items():
        for text in texts:
            assert verdict_of(text) == (expected, None), text
    assert verdict_of(marked("It is $\\boxed{4}$."), "length") == ("cut off by the token limit", None)
    same = "It is $\\boxed{4}$."
    assert verdict_of(marked(same), answer=same) == ("nothing was changed", None)
    verdict, pair = verdict_of("<think>" + marked("no") + "</think>" + marked("It is $\\boxed{4}$."))
    assert verdict == "pairs" and pair["gemini_corrected_answer"] == "It is $\\boxed{4}$."
    assert pair["change_ratio"] == round(1 - 17 / 18, 4)  # one byte of 18 is new
    verdict, pair = verdict_of("Another way: $\\boxed{4}$", prompt="direct")
    assert verdict == "pairs" and pair["original_answer"] == ""
    assert pair["policy_answer"] == "It is $\\boxed{5}$."


def test_a_run_of_which_every_request_failed_is_no_success(monkeypatch, capsys, tmp_path, checkpoint):
    write_errors(tmp_path / "errors.jsonl", 3)
    with Misbehaving(lambda *_: (400, {}, b"no")) as server:
        code, err = rectify(monkeypatch, capsys, tmp_path, server, checkpoint)
    assert code == 1 and "error: all 3 requests failed, the first with: HTTP 400: no" in err


def test_the_prompts_carry_what_they_should():
    item = oracle.Item("1", "Q {answer} {gold}", "GOLD", "WRONG {question}")
    (message,) = oracle.oracle_messages(item, "correct")
    assert "Q {answer} {gold}" in message["content"] and "WRONG {question}" in message["content"]
    assert "GOLD" not in message["content"]
    (message,) = oracle.oracle_messages(item, "correct_with_answer")
    assert message["content"].count("GOLD") == 1 and oracle.LAST_LINE in message["content"]
    assert oracle.oracle_messages(item, "direct") == [{"role": "user", "content": "Q {answer} {gold}"}]
    for text in oracle.PROMPTS.values():
        assert not set("given first".split()) & set(re.findall(r"\{(\w+)\}", text))


def test_401_stops_at_once_and_the_key_stays_secret(monkeypatch, capsys, tmp_path, checkpoint):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    write_errors(tmp_path / "errors.jsonl", 200)

    def behave(body, attempt):
        return good(body, attempt) if len(server.requests) < 40 else (401, {}, f"wrong key {KEY}".encode())
    with Misbehaving(behave) as server:
        code, err = rectify(monkeypatch, capsys, tmp_path, server, checkpoint, "--workers", 4)
        assert code == 1 and "OPENAI_API_KEY is missing or wrong" in err and err.count("error:") == 1
        assert len(server.requests) <= 40 + 4
        kept = rows(tmp_path / "out" / "pairs.jsonl")  # what had arrived is there
        assert 30 <= len(kept) <= 40
        no_key_in(tmp_path, err)
        before = set(server.asked)
        server.behave = good
        code, err = rectify(monkeypatch, capsys, tmp_path, server, checkpoint)
        assert code == 0 and len(rows(tmp_path / "out" / "pairs.jsonl")) == 200
        again = [p for p in before if server.asked[p] > 1]
        assert len(again) == len(before) - len(kept)


def test_an_unreachable_server_ends_the_run(monkeypatch, capsys, tmp_path, checkpoint):
    write_errors(tmp_path / "errors.jsonl")
    with Misbehaving(good) as server:
        pass  # closed again
    code, err = rectify(monkeypatch, capsys, tmp_path, server, checkpoint, "--server_model", "m",
                        "--tries", 1)
    assert code == 1 and "cannot be reached" in err and "Traceback" not in err


def test_the_key_in_an_answer_is_blotted_out(monkeypatch, capsys, tmp_path, checkpoint):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    write_errors(tmp_path / "errors.jsonl")
    with Misbehaving(lambda body, n: completion(f"your key is {KEY}")) as server:
        code, err = rectify(monkeypatch, capsys, tmp_path, server, checkpoint)
    assert code == 0 and "your key is ***" in (tmp_path / "out" / "rejected.jsonl").read_text()
    no_key_in(tmp_path, err)


def test_target_stops_asking(monkeypatch, capsys, tmp_path, checkpoint):
    write_errors(tmp_path / "errors.jsonl", 100)
    with Misbehaving(good) as server:
        code, err = rectify(monkeypatch, capsys, tmp_path, server, checkpoint, "--target", 10, "--workers", 3)
        assert code == 0, err
        pairs = rows(tmp_path / "out" / "pairs.jsonl")
        assert 10 <= len(pairs) <= 12 and len(server.requests) == len(pairs)
        code, err = rectify(monkeypatch, capsys, tmp_path, server, checkpoint, "--target", 10)
        assert len(server.requests) == len(pairs)  # enough already
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["not asked"] == 100 - len(pairs)


def test_functions_and_edited_files_are_oracles_too(monkeypatch, capsys, tmp_path, checkpoint):
    given = write_errors(tmp_path / "errors.jsonl", 5)
    (tmp_path / "mine.py").write_text(
        "def fix(item):\n    return item.answer.rpartition('{')[0] + '{' + item.gold + '}$.'\n")
    base = ("rectify", "--errors", tmp_path / "errors.jsonl", "--tokenizer", checkpoint, "--out")
    mine = tmp_path / "mine.py"
    code, err = run_cli(monkeypatch, capsys, *base, tmp_path / "a", "--function", f"{mine}:fix")
    assert code == 0, err
    assert len(rows(tmp_path / "a" / "pairs.jsonl")) == 5
    code, err = run_cli(monkeypatch, capsys, *base, tmp_path / "x", "--function", f"{mine}:nope")
    assert code == 1 and "defines no function 'nope'" in err
    edited = [dict(r) for r in given]
    edited[1]["corrected_answer"] = given[1]["original_answer"].replace("{3}", "{2}")
    for expected in (1, 2):  # editing goes on between two starts
        (tmp_path / "edited.jsonl").write_text("".join(json.dumps(r) + "\n" for r in edited))
        code, err = run_cli(monkeypatch, capsys, *base, tmp_path / "b", "--edited", tmp_path / "edited.jsonl")
        assert code == 0, err
        assert len(rows(tmp_path / "b" / "pairs.jsonl")) == expected
        assert len(rows(tmp_path / "b" / "rejected.jsonl")) == 5 - expected
        edited[4]["corrected_answer"] = given[4]["original_answer"].replace("{9}", "{8}")


# --- bad input ------------------------------------------------------------------------------------

def bad_row(**changes):
    row = {"question": "q", "original_answer": "a", "ground_truth": "4", **changes}
    return json.dumps({k: v for k, v in row.items() if v is not None}) + "\n"


BAD_ERRORS = {
    "gold is a list": (bad_row(ground_truth=["4"]), "a string or a number"),
    "gold is missing": (bad_row(ground_truth=None), "a gold answer expected"),
    "gold never ends": (bad_row(ground_truth="\\boxed{"), "no final answer in it"),
    "answer is missing": (bad_row(original_answer=None), "original_answer missing"),
    "answer is a number": (bad_row(original_answer=4), "a string expected"),
    "question is a number": (bad_row(question=4), "a string expected"),
    "no JSON": ('{"question"', "line 1: not valid JSON"),
    "empty file": ("", "the file is empty"),
    "only empty answers": (bad_row(original_answer=" "), "no usable row"),
    "duplicate ids": (bad_row(id=1) * 2, "1 ids occur more than once, first '1'"),
}


@pytest.mark.parametrize("case", BAD_ERRORS)
def test_bad_errors_are_refused_before_anything_is_asked(case, monkeypatch, capsys, tmp_path, checkpoint):
    text, expected = BAD_ERRORS[case]
    (tmp_path / "errors.jsonl").write_text(text)
    with Misbehaving(good) as server:
        code, err = rectify(monkeypatch, capsys, tmp_path, server, checkpoint)
        assert code == 1 and expected in err and "Traceback" not in err, err
        assert not server.requests and not (tmp_path / "out").exists()


def test_a_folder_of_other_questions_is_refused(monkeypatch, capsys, tmp_path, checkpoint):
    write_errors(tmp_path / "errors.jsonl")
    with Misbehaving(good) as server:
        rectify(monkeypatch, capsys, tmp_path, server, checkpoint)
        asked = len(server.requests)
        kept = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
        code, err = rectify(monkeypatch, capsys, tmp_path, server, checkpoint, "--prompt",
                            "correct_with_answer")
        assert code == 1 and "prompt was 'correct', now 'correct_with_answer'" in err
        text = (tmp_path / "errors.jsonl").read_text()
        (tmp_path / "errors.jsonl").write_text(text.replace("What is 3", "What is it, 3"))
        code, err = rectify(monkeypatch, capsys, tmp_path, server, checkpoint)
        assert code == 1 and "not among the questions given now" in err
        assert len(server.requests) == asked
        assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == kept
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "thesis.txt").write_text("mine")
        code, err = run_cli(monkeypatch, capsys, "rectify", "--errors", tmp_path / "errors.jsonl", "--out",
                            tmp_path / "other", "--tokenizer", checkpoint, "--server", server.url)
        assert code == 1 and "is not empty" in err


def test_contradictory_options_are_refused(monkeypatch, capsys, tmp_path):
    cases = {
        ("elicit",): ["--out is required", "--questions is required", "exactly one of --model"],
        ("rectify", "--out", "o", "--errors", "e", "--server", "http://x/v1", "--model", "m"):
            ["exactly one of --model, --server, --function, --edited expected, found 2"],
        ("elicit", "--out", "o", "--questions", "q", "--model", "m", "--top_p", 0, "--workers", 0,
         "--body", "[]", "--timeout", 10**16): ["--top_p is 0.0", "--workers is 0", "--body", "--timeout"],
    }
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    for argv, expected in cases.items():
        code, err = run_cli(monkeypatch, capsys, *argv)
        assert code == 2 and all(e in err for e in expected), err
    asked = ("--out", "o", "--server", "http://x/v1")
    code, err = run_cli(monkeypatch, capsys, "rectify", *asked, "--errors", "e")
    assert code == 1 and "--tokenizer is required" in err
    code, err = run_cli(monkeypatch, capsys, "elicit", *asked, "--questions", "q", "--instruction", "x")
    assert code == 1 and "--instruction lacks {question}" in err


def test_gold_answers_of_all_kinds_of_files():
    golds = [({"answer": "Tom has 3.\n#### 72"}, "72"), ({"solution": "34", "prompt": "p"}, "34"),
             ({"solution": "so $\\boxed{\\frac{1}{2}}$"}, "\\frac{1}{2}"), ({"ground_truth": 25}, "25"),
             ({"label": 27.0}, "27.0"), ({"reward_model": {"ground_truth": "7"}}, "7"),
             ({"answer": None, "label": "x"}, "x")]
    for row, gold in golds:
        assert oracle.gold_answer(row) == gold
    for row in ({}, {"answer": {}}, {"answer": ""}, {"reward_model": {}}, {"answer": "\\boxed{"}):
        with pytest.raises(UserError):
            oracle.gold_answer(row)


def test_what_is_sent_is_what_is_stored(tmp_path):
    system = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    content = [{"id": 1, "question": "2+2?", "answer": "4"}, {"id": 2, "prompt": system, "answer": "4"},
               {"id": 3, "prompt": system[1:], "answer": "4"}, {"id": 4, "problem": "2+2?", "answer": "4"}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(r) + "\n" for r in content))
    items, dropped = oracle.read_questions(str(tmp_path / "q.jsonl"), "Do {question} now")
    assert [i.question for i in items] == ["Do 2+2? now", system, "u"]
    assert dropped == {"the same question again": 1}
    assert [i.messages[-1]["content"] for i in items] == ["Do 2+2? now", "u", "u"]


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared data")
def test_real_question_files_are_read():
    counts = {"gsm8k/test.jsonl": 1319, "math/aime24.jsonl": 30, "math/amc23.jsonl": 40,
              "math/math500.jsonl": 500,
              "math/minerva_math.jsonl": 272, "dapo/dapo_math_17k_sample6.jsonl": 6}
    for name, count in counts.items():
        items, dropped = oracle.read_questions(str(SHARED / name), oracle.INSTRUCTION)
        assert len(items) + dropped["the same question again"] == count, name


# --- elicit ---------------------------------------------------------------------------------------


def write_questions(path, count):
    path.write_text("".join(json.dumps({"question": f"{i} + {i}?", "answer": str(2 * i)}) + "\n"
                            for i in range(count)))


def test_elicit_sorts_the_answers_of_a_server(monkeypatch, capsys, tmp_path):
    write_questions(tmp_path / "q.jsonl", 12)

    def behave(body, attempt):
        i = int(body["messages"][0]["content"].split("\n")[-1].split()[0])
        return [completion(f"\\boxed{{{2 * i}}}"), completion(f"\\boxed{{{2 * i + 1}}}"), completion("?"),
                completion("and so", "length"), (400, {}, b"no"), completion("")][i % 6]
    with Misbehaving(behave) as server:
        code, err = run_cli(monkeypatch, capsys, "elicit", "--questions", tmp_path / "q.jsonl", "--out",
                            tmp_path / "out", "--server", server.url, "--samples", 2)
        assert code == 0, err
        sent = server.requests[0][1]
    assert (sent["temperature"], sent["top_p"], sent["top_k"], sent["max_tokens"]) == (0.7, 0.8, 20, 32768)
    assert sent["chat_template_kwargs"] == {"enable_thinking": False}
    assert len({b["seed"] for _, b in server.requests}) == 24
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary == {"answers wanted": 24, "right": 4, "wrong": 4, "wrong: no final answer": 8,
                       "cut off at max_tokens": 4, "request failed": 4}
    errors = rows(tmp_path / "out" / "errors.jsonl")
    assert len(errors) == 8 and all(oracle.LAST_LINE in e["question"] for e in errors)
    assert len(rows(tmp_path / "out" / "samples.jsonl")) == 20
    read, dropped, _ = data.read_pairs(str(tmp_path / "out" / "correct.jsonl"))
    assert len(read) == 4 and all(p.rejected is None for p in read) and not dropped


def test_sampled_texts_do_not_depend_on_ranks_or_batch(monkeypatch, capsys, tmp_path, checkpoint):
    write_questions(tmp_path / "q.jsonl", 18)
    shared = ("elicit", "--questions", tmp_path / "q.jsonl", "--model", checkpoint, "--dtype", "float32",
              "--max_tokens", 24, "--instruction", "{question}", "--out")
    for out, batch in (("a", 16), ("b", 1)):
        code, err = run_cli(monkeypatch, capsys, *shared, tmp_path / out, "--batch_size", batch)
        assert code == 0, err
    launch.run(["oracle.py", *shared, tmp_path / "c", "--batch_size", 4], ranks=2)
    texts = [rows(tmp_path / out / "samples.jsonl") for out in "abc"]
    assert len(texts[0]) == 18 and texts[0] == texts[1] == texts[2]
    assert len({r["answer"] for r in texts[0]}) == 18  # random weights: all different


# --- killed and gone on ---------------------------------------------------------------------------


def storm(tmp_path, checkpoint, count, kills, seed=0):
    """`count` errors, 20 % of all requests faulty, `kills` SIGKILLs: one outcome each, none asked in vain."""
    rng, lock = random.Random(seed), threading.Lock()
    given = write_errors(tmp_path / "errors.jsonl", count)
    out = tmp_path / "out"
    faults = [(429, {"Retry-After": "0"}, b""), (500, {}, b""), (400, {}, b""), "drop", "truncated", "hang",
              b"<html>", completion(""), completion("no markers \\boxed{1}"), completion("x", "length")]

    def behave(body, attempt):
        with lock:
            fault = rng.choice(faults) if rng.random() < 0.2 else None
        time.sleep(0.01)
        return good(body, attempt) if fault is None else fault

    def arrived():
        lines = [line for p in out.glob("raw-*.jsonl") for line in p.read_bytes().split(b"\n")[:-1]]
        return {r["key"] for r in map(json.loads, lines) if "text" in r}
    items, _ = oracle.read_errors(str(tmp_path / "errors.jsonl"))
    requests = [oracle.request_for(i.id, oracle.oracle_messages(i, "correct"), 0) for i in items]
    prompts = {r.key: r.messages[0]["content"] for r in requests}
    with Misbehaving(behave) as server:
        command = [sys.executable, ROOT / "oracle.py", "rectify", "--errors", tmp_path / "errors.jsonl",
                   "--out", out, "--tokenizer", checkpoint, "--server", server.url, "--workers", "8",
                   "--request_timeout", "1", "--tries", "3"]
        for k in range(kills + 1):
            known, before = arrived(), Counter(server.asked)
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            if k < kills:
                enough = sum(before.values()) + count // (kills + 2)
                while sum(server.asked.values()) < enough and process.poll() is None:
                    time.sleep(0.005)
                process.send_signal(signal.SIGKILL)
            _, err = process.communicate(timeout=300)
            assert process.returncode == (-9 if k < kills else 0), err.decode()
            assert not [key for key in known if server.asked[prompts[key]] > before[prompts[key]]]
    pairs, rejected = rows(out / "pairs.jsonl"), rows(out / "rejected.jsonl")
    assert Counter(r["index"] for r in pairs + rejected) == {r["id"]: 1 for r in given}
    reasons = Counter(r["reason"].split(":")[0] for r in rejected)
    assert set(reasons) <= {"request failed", "no text between the markers", "cut off by the token limit"}
    assert len(pairs) > 0.8 * count
    return len(pairs), reasons, sum(server.asked.values())


def test_storm_with_a_kill(tmp_path, checkpoint):
    storm(tmp_path, checkpoint, 120, 1)


@pytest.mark.slow
def test_storm_of_a_thousand_with_three_kills(tmp_path, checkpoint):
    print(storm(tmp_path, checkpoint, 1000, 3))


def test_a_torn_last_line_does_not_count(tmp_path):
    log = tmp_path / "raw-0.jsonl"
    first = {"key": "a", "text": "1", "finish": "stop", "tokens": 1}
    log.write_text(json.dumps(first) + '\n{"key": "b", "te')
    assert evaluation.read_answers(str(tmp_path), ["a", "b"]) == {"a": first}
    evaluation.mend_log(str(log))
    data.append_row(str(log), {"key": "b", "error": "no"})
    assert set(evaluation.read_answers(str(tmp_path), ["a", "b"])) == {"a", "b"}
    with pytest.raises(UserError, match="'b', which is not among"):
        evaluation.read_answers(str(tmp_path), ["a"])
    (tmp_path / "raw-1.jsonl").write_text('{"key": "a", "error": "at another rank"}\n')
    assert evaluation.read_answers(str(tmp_path))["a"] == first  # an answer stays one

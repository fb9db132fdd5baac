"""Sampling and grading: what a model answers, and whether it is right.

Comes in:  questions as chat messages and a model, our own or one behind an OpenAI-compatible server; the
           text of a response, and a gold answer as the benchmark files write it (LaTeX or plain).
Goes out:  `sample`: every answer, kept in a log as it comes; `extract_answer`: the answer that a text
           commits itself to, or None; `answers_match`: True or False; `evaluate`: the paper's table with
           honest error bars; `retention`: how far a model went from its base; `report`: training runs and
           evaluations as one HTML file.

    torchrun --nproc_per_node=8 eval.py --model runs/first/model --tasks aime24,math500,connect4 --out out/A
    python eval.py compare --a out/A --b out/B
    torchrun --nproc_per_node=8 eval.py retention --model runs/first/model --base Qwen3-8B --texts texts.jsonl
    python eval.py report runs/first runs/second out/A out/B
"""

import argparse
import cmath
import errno
import fcntl
import functools
import glob
import hashlib
import html
import itertools
import json
import math
import operator
import os
import queue
import random
import re
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from http.client import HTTPException, IncompleteRead
from numbers import Real
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import data
import model as qwen
from data import UserError, read_json, write_json, write_text, writing
from model import Ranks, add_options, begin, close_ranks, open_ranks, option

# --- sampling: the own model or a server, every answer kept as it comes ---------------------------


LAST_LINE = r"Therefore, the final answer is: $\boxed{ANSWER}$."
INSTRUCTION = ("Solve the following problem step by step. End with this line, ANSWER replaced by your final "
               f"answer:\n{LAST_LINE}\n\n{{question}}")


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled; the defaults are the paper's."""

    temperature: float = 0.7  # 0: greedy
    top_p: float = 0.8
    top_k: int = 20  # 0: off
    max_tokens: int = 32768


@dataclass
class Own:
    """A model in this process (under torchrun: a whole one in every process) with its tokenizer."""

    model: qwen.Qwen3
    chat: data.Chat
    end: set  # ids that end an answer
    batch_size: int = 32


def open_own(folder: str, dtype, device, batch_size: int = 32) -> Own:
    """An Own model from a checkpoint folder or hub id. Answers end at <|im_end|>, and at what
    generation_config.json names."""
    folder = qwen.checkpoint_folder(folder)
    chat = data.load_chat(folder, qwen.read_config(folder).vocab_size)
    path, end = os.path.join(folder, "generation_config.json"), None
    if os.path.lexists(path):  # a link to nowhere is no absence
        end = read_json(path).get("eos_token_id")
    ends = end if isinstance(end, list) else [] if end is None else [end]
    if not all(isinstance(token, int) for token in ends):
        raise UserError(f'{path}: "eos_token_id": an integer or a list of them expected, found {end!r}')
    return Own(qwen.load_model(folder, dtype, device), chat, {chat.im_end, *ends}, batch_size)


@dataclass
class Server:
    """An OpenAI-compatible chat endpoint. The key comes from the environment and is never shown."""

    url: str  # up to and with /v1
    model: str
    key: str = field(default="", repr=False)
    workers: int = 16  # requests at a time
    timeout: float = 600.0  # seconds a request may take in all
    tries: int = 6
    pause: float = 1.0  # seconds before the second try; doubled each time, up to 60
    body: dict = field(default_factory=dict)  # more keys of the request, as the server knows them


def open_server(url: str, model: str = "", **settings) -> Server:
    """A Server with the key of OPENAI_API_KEY, at `url` or OPENAI_BASE_URL; without a model name the only
    model that the server lists. Raises UserError."""
    url = (url or os.environ.get("OPENAI_BASE_URL", "")).rstrip("/")
    try:
        urllib.parse.urlsplit(url).port  # raises where it is no number
        fits = re.fullmatch(r"https?://[^/@\s.][^/@\s]*(/[^@\s]*)?", url) and url.isascii()
    except ValueError:
        fits = False
    if not fits:
        shown = re.sub("//.*@", "//***@", url)  # a password may stand there
        raise UserError(f"--server is {shown!r}; an address such as http://localhost:8000/v1 expected (or "
                        "OPENAI_BASE_URL)")
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise UserError("OPENAI_API_KEY holds characters that no HTTP header can carry")
    server = Server(url, model, key, **settings)
    if not model:
        try:
            listed = http(server, "/models").get("data")
        except Refused as e:
            raise UserError(f"{url}/models: {e}; name the model with --server_model") from None
        names = [m.get("id") for m in listed if isinstance(m, dict)] if isinstance(listed, list) else []
        names = [hide(server, name) if isinstance(name, str) else "" for name in names]
        if len(names) != 1 or not 0 < len(names[0]) < 200 or not names[0].isprintable():
            raise UserError(f"{url} serves {len(names)} models ({', '.join(map(repr, names))[:200]}): choose "
                            "one with --server_model")
        server.model = names[0]
    return server


class Refused(Exception):
    """One request that got no usable answer; the text says why. The others go on."""


class AnyStatus(urllib.request.HTTPErrorProcessor):
    """Every status is an answer. No redirect is followed: it would carry the key to another host."""

    def http_response(self, request, response):
        return response

    https_response = http_response


RETRIED = {408, 409, 425, 429, *range(500, 600)}
FATAL = {401: "the key in OPENAI_API_KEY is missing or wrong", 402: "the account has no credit",
         403: "the key in OPENAI_API_KEY may not use this model",
         404: "the address or the model name is wrong", 405: "the address is no chat endpoint"}
MAX_ANSWER = 64 * 2**20  # bytes of one HTTP answer


def http(server: Server, path: str, body: dict | None = None) -> dict:
    """One JSON request, POST if it has a body, tried up to server.tries times with exponential, jittered
    pauses, or longer where the server says so (Retry-After).

    Raises UserError, which ends the whole run, where every other request would fail too: a FATAL status, or
    nobody listens. Raises Refused for the rest: a status not worth a retry, or no try left.
    """
    opener, headers = urllib.request.build_opener(AnyStatus), {"Content-Type": "application/json"}
    if server.key:
        headers["Authorization"] = f"Bearer {server.key}"
    content = None if body is None else json.dumps(body).encode()
    for attempt in range(server.tries):
        status, wait, raw = 200, 0.0, b""
        try:
            request = urllib.request.Request(server.url + path, content, headers)
            status, wait, raw = within(server.timeout, lambda: fetch(opener, request, server.timeout))
            value = json.loads(raw) if status < 300 else None
            if isinstance(value, dict) and ("error" not in value or "choices" in value):
                return value
            problem = "the answer is no JSON object"
            if isinstance(value, dict):
                problem = f"an error in an answer with status 200: {hide(server, str(value['error']))[:300]}"
        except (ValueError, RecursionError):  # also UnicodeDecodeError
            problem = "the answer is no JSON"
        except (OSError, HTTPException) as e:  # TimeoutError and URLError are OSErrors
            reason = getattr(e, "reason", e)
            problem = f"connection failed: {type(reason).__name__}"
            if isinstance(reason, TimeoutError):
                problem = f"no answer within {server.timeout:g} s"
            nobody_there = isinstance(reason, (ConnectionRefusedError, socket.gaierror))
            if nobody_there and attempt == server.tries - 1:
                raise UserError(f"{server.url} cannot be reached: {reason}. Is the server up? What has "
                                "arrived is kept; the same command goes on from there.") from None
        if status > 299:  # hidden in the whole text: half a key would not be found
            detail = " ".join(hide(server, raw.decode(errors="replace")).split())
            problem = f"HTTP {status}: {detail[:300]}"
            if status in FATAL:
                raise UserError(f"{server.url}{path}: {FATAL[status]} ({problem})")
            if status not in RETRIED:
                raise Refused(problem)
        if attempt < server.tries - 1:
            time.sleep(max(wait, min(60.0, server.pause * 2**attempt) * random.uniform(0.5, 1.0)))
    raise Refused(f"{problem} (tried {server.tries} times)")


def hide(server, text):
    """Text without the key, should a server repeat it (a short key is a dummy, and a part of many words), and
    without what no file can hold."""
    text = text.encode(errors="replace").decode()
    if len(server.key) > 11:
        quoted = json.dumps(server.key)[1:-1]
        for form in {server.key, quoted, quoted.replace("/", "\\/"), repr(server.key)[1:-1]}:
            text = text.replace(form, "***")
    return text


def within(seconds, call):
    """call(), in a thread that is left to itself when the time is over: a socket's own time-out starts anew
    at each byte, and a hostile server has many of them. Raises what the call does, or TimeoutError."""
    for _, result in concurrently(lambda call: call(), [call], 1, seconds):
        return result


def fetch(opener, request, timeout):
    """(status, seconds to wait, body) of one HTTP answer, unless it is endless in size."""
    with opener.open(request, timeout=timeout) as answer:
        body = bytearray()
        while part := answer.read1(2**16):
            body += part
            if len(body) > MAX_ANSWER:
                raise Refused(f"an answer of more than {MAX_ANSWER >> 20} MiB")
        if answer.length:  # announced, but not sent
            raise IncompleteRead(b"", answer.length)
        return answer.status, retry_after(answer.headers["Retry-After"]), bytes(body)


def retry_after(value: str | None) -> float:
    """Seconds that a Retry-After header asks for, at most 10 minutes; a date asks for nothing here."""
    return min(float(value), 600.0) if re.fullmatch(r"[0-9]{1,9}(\.[0-9]+)?", value or "") else 0.0


def ask(server: Server, request, sampling: Sampling) -> dict:
    """One chat completion: {"text", "finish": "stop" | "length", "tokens"} or {"error": why}. Settings that
    are None are left to the server; top_k is no key of the OpenAI protocol and goes into Server.body."""
    body = {"model": server.model, "messages": request.messages, "temperature": sampling.temperature,
            "top_p": sampling.top_p, "max_tokens": sampling.max_tokens, "seed": request.seed}
    body = {k: v for k, v in body.items() if v is not None} | server.body
    try:
        answer = http(server, "/chat/completions", body)
        choice, usage = answer["choices"][0], answer.get("usage")
        text, ending = choice["message"].get("content"), choice.get("finish_reason")
    except Refused as e:
        return {"error": str(e)}
    except (KeyError, IndexError, TypeError, AttributeError):
        return {"error": "the answer is no chat completion"}
    if text is not None and not isinstance(text, str):
        return {"error": f"the answer's content is a {type(text).__name__}, not text"}
    if ending not in ("stop", "eos", "length", "", None):  # content_filter, abort, tool_calls: half an answer
        return {"error": f"the server ended the answer with {hide(server, str(ending))[:60]!r}"}
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else 0
    return {"text": hide(server, text or ""), "finish": "length" if ending == "length" else "stop",
            "tokens": tokens if is_count(tokens) else 0}


def is_count(value):
    """Whether a number of tokens can be believed."""
    return type(value) is int and 0 <= value < 2**40


def concurrently(call, items, workers: int, timeout: float | None = None):
    """Yield (item, call(item)) in the order of completion, `workers` calls at a time, taking items as needed.
    Raises TimeoutError where none ends for `timeout` seconds.

    Each call has a daemon thread: an interrupt, or an exception of one call (raised here), ends the program
    at once, not after the slowest request as with concurrent.futures.
    """
    ready, items, busy = queue.SimpleQueue(), iter(items), 0

    def work(item):
        try:
            ready.put((item, call(item), None))
        except BaseException as e:
            ready.put((item, None, e))

    while True:
        for item in itertools.islice(items, workers - busy):
            threading.Thread(target=work, args=(item,), daemon=True).start()
            busy += 1
        if not busy:
            return
        try:
            item, result, error = ready.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError from None
        busy -= 1
        if error:
            raise error
        yield item, result


@dataclass
class Request:
    """One answer wanted. The key names it in the log; equal seeds give equal answers of the own model."""

    key: str
    messages: list
    seed: int


def request_for(name, messages, seed):
    """A Request whose key and seed follow from what is asked: other questions never meet old answers."""
    digest = hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:12]
    own_seed = hashlib.sha256(f"{seed} {name} {digest}".encode()).digest()
    return Request(f"{name} {digest}", messages, int.from_bytes(own_seed[:4], "little") >> 1)


def raw_logs(folder):
    """The logs of all ranks."""
    return sorted(glob.glob(os.path.join(glob.escape(folder), "raw-*.jsonl")))


def read_log(folder: str, keys) -> dict:
    """{key: record} of all raw answers in a folder; a later record of a key replaces an earlier one.

    A last line without its newline was cut off by a kill and does not count. Raises UserError for a broken
    line elsewhere, and for an answer to something that is not asked now.
    """
    records, keys = {}, set(keys)
    for path in raw_logs(folder):
        with open(path, "rb") as f:
            lines = f.read().split(b"\n")[:-1]
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                key, text = record["key"], record.get("text", "") + record.get("error", "")
                fits = isinstance(key, str) and ("error" in record or "text" in record and is_count(
                    record["tokens"]) and record["finish"] in ("stop", "length"))
                text.encode()  # a lone surrogate is no text: a ValueError
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                fits = False
            if not fits:
                raise UserError(f"{path}, line {number}: not a record of this program; found {line!r:.80}")
            if key not in keys:
                raise UserError(f"{path}, line {number}: answers {key!r}, which is not among the questions "
                                "given now: choose another output folder")
            records[key] = record
    return records


def open_log(path: str):
    """A raw log open for adding lines, a torn last line removed; refused while another process writes it."""
    f = open(path, "a+b", buffering=0)
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        f.close()
        raise UserError(f"{path} is being written by another process") from None
    f.seek(0)
    f.truncate(f.read().rfind(b"\n") + 1)
    return f


def claim_folder(out, settings):
    """Make `out`, or check that it was made with the same settings. Raises UserError where not."""
    path = os.path.join(out, "settings.json")
    if os.path.exists(path):
        kept = read_json(path)
        differ = [f"{k} was {kept.get(k)!r}, now {v!r}" for k, v in settings.items() if kept.get(k) != v]
        if differ:
            raise UserError(f"{out} holds work with other settings: choose another --out\n  "
                            + "\n  ".join(differ))
        return
    if os.path.isdir(out) and {*os.listdir(out)} - {"settings.json.tmp"}:  # of a start that was killed
        raise UserError(f"{out} is not empty and holds no work of this program: choose another --out")
    os.makedirs(out, exist_ok=True)
    write_json(path, settings)


def sample(policy, requests: list, folder: str, sampling: Sampling, ranks: Ranks,
           title: str = "sampling", on_record=lambda record: {}, enough=None) -> dict:
    """{key: record} for all requests: those of an earlier start from the log, the rest sampled now.

    `policy` is an Own model, a Server, or a function from a Request to a record. Each answer is added to
    folder/raw-RANK.jsonl as it comes, in one write: a kill loses at most what is under way, and the same
    call goes on. Records are {"key", "text", "finish", "tokens"} or {"key", "error"}; failed requests are
    asked again by the next call. `on_record(record)` sees the answers in the log, then each new one of this
    rank, and returns a dict for the progress bar; once `enough()` is true nothing more is asked (own model:
    looked at every 512 requests). Raises UserError as `http` and `read_log` do.
    """
    serving = isinstance(policy, Server)
    if serving and ranks.world > 1:
        raise UserError("a server needs one process here: start with `python`, without torchrun")
    keys = [r.key for r in requests]
    with ranks.together():
        os.makedirs(folder, exist_ok=True)
        have = read_log(folder, keys)
        for path in raw_logs(folder) if ranks.main else ():
            open_log(path).close()  # raises where a process of an earlier start still lives
    todo = [r for r in requests if "text" not in have.get(r.key, {})]
    mine = todo[ranks.rank::ranks.world]
    with ranks.together(), open_log(os.path.join(folder, f"raw-{ranks.rank}.jsonl")) as log:
        bar = tqdm(total=len(mine), disable=not ranks.main or not todo, desc=title, unit="answer",
                   leave=not ranks.quiet)
        count, started, outcomes = Counter(), time.monotonic(), {}
        for record in have.values():
            outcomes = on_record(record)

        def tick(tokens, failed=0):
            count.update(tokens=tokens, failed=failed)
            speed = int(count["tokens"] / (time.monotonic() - started))
            bar.set_postfix({**count, "tokens/s": speed, **outcomes}, refresh=False)
            bar.update(0)

        def keep(request, record):
            nonlocal outcomes
            record = {"key": request.key, **record}
            line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
            with writing(log.name):
                if log.write(line) < len(line):  # what is torn does not count when the log is read again
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            outcomes = on_record(record)
            bar.update()

        wanted = itertools.takewhile(lambda _: not (enough and enough()), mine)
        if isinstance(policy, Own):
            while some := list(itertools.islice(wanted, 512 if enough else None)):
                answer_own(policy, some, sampling, keep, tick)
        else:
            call = functools.partial(ask, policy, sampling=sampling) if serving else policy
            for request, record in concurrently(call, wanted, policy.workers if serving else 1):
                keep(request, record)
                tick(record.get("tokens", 0), "error" in record)
        bar.close()
    with ranks.together():
        return read_log(folder, keys)


def answer_own(own: Own, requests, sampling, keep, tick):
    """Sample from the model in this process: keep(request, record) as each answer ends, tick(new tokens)."""
    def done(index, ids, ended):
        text, finish = own.chat.tokenizer.decode(ids), "stop" if ended else "length"
        keep(requests[index], {"text": text, "finish": finish, "tokens": len(ids) + ended})

    qwen.generate(own.model, [own.chat.prompt(r.messages) for r in requests], [r.seed for r in requests],
                  **asdict(sampling), end=own.end, batch_size=own.batch_size, on_done=done, progress=tick)


# --- sampling: options ----------------------------------------------------------------------------


@dataclass
class Asking:
    """What both commands share: whom to ask, and how."""

    out: str = option("", "folder to write; an unfinished one is gone on with (required)")
    model: str = option("", "ask this Qwen3 checkpoint (folder or hub id), in this process")
    server: str = option("", "ask an OpenAI-compatible server, http://host:port/v1; key: OPENAI_API_KEY")
    server_model: str = option("", "model name at the server; empty: the only one it serves")
    body: str = option("", "JSON object: more keys of each request to the server; null removes one")
    workers: int = option(16, "requests to the server at a time")
    request_timeout: float = option(600.0, "seconds a request may take")
    tries: int = option(6, "attempts per request, with growing pauses")
    temperature: float = option(0.7, "0: greedy (an Oracle's server gets this and the next only if given)")
    top_p: float = option(0.8, "keep the likeliest tokens up to this share")
    top_k: int = option(20, "keep that many likeliest tokens; 0: all")
    max_tokens: int = option(32768, "tokens of an answer; longer ones are cut off and counted")
    batch_size: int = option(32, "answers the own model writes at a time")
    dtype: str = option("bfloat16", "of the own model", ("float32", "bfloat16"))
    seed: int = option(0, "of the samples")
    timeout: int = option(86400, "seconds after which a stalled rank ends the run")


def finish(work) -> int:
    """Run a program's work to its exit code: 0, or 130 where Ctrl-C or SIGTERM ended it."""
    def stop(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        work()
    except KeyboardInterrupt:
        print("\nstopped; what has arrived is kept, and the same command goes on", file=sys.stderr,
              flush=True)
        return 130
    close_ranks()
    return 0


def check_asking(o: Asking, allowed: tuple) -> list:
    """What is wrong with these options, as text; `allowed` are the options that name whom to ask, of which
    exactly one must be given. OPENAI_BASE_URL stands in for all of them."""
    if not any(getattr(o, k) for k in allowed):
        o.server = os.environ.get("OPENAI_BASE_URL", "")
    found = sum(bool(getattr(o, k)) for k in allowed)
    problems = ["--out is required"] * (not o.out)
    problems += [f"exactly one of --{', --'.join(allowed)} expected, found {found}"] * (found != 1)
    for k, low in {"workers": 1, "request_timeout": 1e-3, "tries": 1, "max_tokens": 1, "batch_size": 1,
                   "timeout": 1, "temperature": 0, "top_k": 0, "seed": 0}.items():
        if not low <= getattr(o, k) < 1e9:
            problems.append(f"--{k} is {getattr(o, k)}, a number from {low} to 1e9 expected")
    problems += qwen.unfit(vars(o))
    if not 0 < o.top_p <= 1:
        problems.append(f"--top_p is {o.top_p}, a share above 0 and up to 1 expected")
    try:
        if not isinstance(json.loads(o.body or "{}"), dict):
            problems.append(f"--body is {o.body!r:.60}, a JSON object expected")
    except (ValueError, RecursionError) as error:
        problems.append(f"--body is no JSON: {error}")
    return problems


def open_policy(o: Asking, device, non_thinking: bool = True):
    """The Own model or the Server that the options name. non_thinking: tell a server what vLLM and SGLang
    understand, Qwen3's template without thinking and top_k; null in --body takes a key away."""
    if o.model:
        return open_own(o.model, getattr(torch, o.dtype), device, o.batch_size)
    body = {"top_k": o.top_k, "chat_template_kwargs": {"enable_thinking": False}} if non_thinking else {}
    body |= json.loads(o.body or "{}")
    return open_server(o.server, o.server_model, workers=o.workers, timeout=o.request_timeout, tries=o.tries,
                       body={k: v for k, v in body.items() if v is not None})


def identity(policy, o: Asking) -> str:
    """Whose answers these are: a server's model name and --body, or a folder, a hash of its weights and the
    type of the computation."""
    if isinstance(policy, Server):
        return f"{policy.model} {json.dumps(policy.body, sort_keys=True)}"
    digest, folder = hashlib.sha256(), qwen.checkpoint_folder(o.model)
    for path in sorted({path for path, _ in qwen.open_tensors(folder).values()}):
        with open(path, "rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    return f"{os.path.basename(os.path.abspath(folder))} {digest.hexdigest()[:16]} {o.dtype}"


# --- grading: which answer does a text commit itself to? ------------------------------------------

# `tokenize` turns spellings into canonical tokens by two tables; `read` takes lists, tuples and relations
# apart; the expressions that remain are computed at POINTS. Equal are expressions with equal values: exact
# fractions while that is possible, else floats within 1e-11 of the larger one. A float that has lost its
# digits (sin pi, 1 - cos 10^-9) equals nothing but the same text.
#
# Where this differs from math-verify on purpose: a decimal equals an exact value only as its rounding to six
# or more digits (0.333 is not 1/3), and another decimal only exactly; numbers in a base have a value (10_2
# is 2); {2n \choose n}, factorials, 1e-5 and -1./3 are read; a unit that one side lacks is forgiven, two
# different units are not; p % equals p and p / 100; a list is a set, and a union is a list; of several boxes
# only the last is the answer. Not seen: even roots of negative numbers, intervals that touch, degrees in
# sin 30°, differences of irrational values below 1e-11.

BOX = re.compile(r"\\f?box(?:ed)?\s*(\{|[^\s{}\\$])")
STATED = re.compile(
    r"(?:####|\banswers?\b[^.\n:$\\\d]{0,40}?(?:\b(?:is|are|be)\b|:|=))(?:[\s:,*]*"
    r"\b(?:thus|hence|therefore|then|simply|just|exactly|equal to|equals|given by)\b)*[\s:,*]*", re.I)


def extract_answer(text: str) -> str | None:
    """What the last box of a response holds, else what the last "answer is", "Answer:" or "####" states.
    Thinking is dropped; a text that ends inside <think> or its last box was cut off and has no answer."""
    text = after_thinking(text)
    answer, stated = last_boxed(text), [m.end() for m in STATED.finditer(text)]
    if answer is None and stated:
        rest = text[stated[-1]:].split("\n")[0].split("<|")[0]
        formula = re.match(r"\$+[^$]+\$+|\\\(.+?\\\)|\\\[.+?\\\]", rest)
        answer = formula[0] if formula else re.split(r"[.;]\s|,?\s(?:because|since)\b", rest)[0].strip(".* ")
    return (answer or "").strip() or None


def after_thinking(text):
    """What a response says once its thinking has ended: nothing, where it was cut off before that."""
    _, thought, said = text.rpartition("</think>")
    return "" if "<think>" in said else said.lstrip() if thought else said


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
MULTIPLES = {"dozen": "12", "hundred": "100", "thousand": "1000", "million": "10^6", "billion": "10^9",
             "trillion": "10^{12}"}


def repeating(m):
    """0.1\\overline{6} is (16 - 1) / 90."""
    once, again = m[1] + m[2], m[1] + m[2] + m[3]
    return f"({int(again) - int(once)}/{10 ** len(m[2] + m[3]) - 10 ** len(m[2])})"


REWRITES = [(re.compile(pattern, re.S), new) for pattern, new in [
    (r"(?<![\w.])(\d{1,9})\.(\d{0,9})\\(?:overline|bar|dot)\s*\{?(\d{1,9})\}?", repeating),
    (r"\A([\s$]*\d+)\s*:\s*(\d+[\s$]*)\Z", r"\1/\2"),  # a ratio
    (r"\b(?:square|sq)\s+([a-z]+)", r"\1^2"),  # units
    (TEXT + r"\{[\s~(]*([A-Za-z][A-Za-z\s/.'-]*?)[\s).]*\}", r' "\1" '),  # "words": perhaps a unit
    (TEXT + r"\{([^{}]*)\}", r" \1 "),
    (r"(?<=\d)(?:\{,\}|,\\!|\\[,! ])\s*(?=\d{3}(?!\d))", ""),  # 10{,}000   11,\! 111   1\,000
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits|math(?:bf|it|cal)|boldsymbol|q?quad|f?box(?:ed)?)"
     r"(?![A-Za-z])|(?<!\\)\\[,;:! ()\[\]$]|[$£€~]", " "),
    (r"\\mathbb\s*\{?\s*R\s*\}?|\ball real numbers\b", r"(-\\infty,\\infty)"),
    (r"\A\s*([A-Za-z' ]*[A-Za-z]{3}[A-Za-z' ]*|[Nn]o)[.\s]*\Z", r' "\1" '),  # a word, no product of letters
    (r'"?\b(?:and|or)\b"?|\\cup\b', ","),
    (r'(?<=\d)\s*"?\b(hundred|thousand|million|billion|trillion|dozen)\b', lambda m: "*" + MULTIPLES[m[1]]),
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
    """n!, exact for whole n up to 400, else by the gamma function."""
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
# is not 0), negative (|x| is not x), of either sign, integers ((-1)^n is real only there, and floor and ceil
# agree too easily elsewhere: so many that n and m are even and odd in all combinations).
POINTS = [(1, 996, 997), (900, 996, 997), (998, 1100, 997), (998, 9000, 997), (99_000, 990_000, 997),
          (-9000, -998, 997), (-2500, 2500, 997), (2, 13, 1), (3, 40, 1), *[(1, 10, 1)] * 12]


def operate(op, *args):
    """One operation, exact on fractions where it can be; raises ArithmeticError if no digit is certain:
    a sum or a function that comes out small beside what it came from has lost them."""
    if op in OPERATIONS:
        value, scale = OPERATIONS[op](*args), max(map(abs, args)) if op in "+-" else 0
    else:
        if op in ("sin", "cos", "tan") and abs(args[0]) > 1e5:
            raise ArithmeticError("digits lost")
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
        if op == tokens[-1] == "!":
            raise ValueError("a double factorial")
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
    chance = hashlib.sha256(ascii(f"{word} {point}").encode()).digest()  # a CRC's parities go together
    return Fraction(low + int.from_bytes(chance[:4], "little") % (high - low + 1), denominator)


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
    def value(point):
        stack = [" ", " ", *reversed(tokens)]
        try:
            found = expression(stack, point)
            return found if len(stack) == 2 else None
        except (ValueError, ArithmeticError, TypeError):  # TypeError: the factorial of i
            return None

    names = (t.lstrip('"') for t in tokens)
    constant = all(name in KEYWORDS or not name[:1].isalpha() for name in names)
    return [value(0)] * len(POINTS) if constant else [value(point) for point in range(len(POINTS))]


# --- grading: answers, and whether two are the same -----------------------------------------------

RELATIONS = ("=", "≠", "<", "≤", ">", "≥")
# x, a_n, f(x), f^{-1}(x), (p,q), frac{dM}{dt}: letters and brackets, no operation on them
NAME = re.compile(r"""(?!(?:pi|e|i|infty)\Z)([^\W\d]\w*+(\^\{-1\}(?=\())?|['"(){},])+""").fullmatch


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
    # AB = 5 says what a segment is, xy = 6 is an equation
    names = [NAME("".join(p)) and not (len(p) > 1 and all(
        len(t) == 1 and t.islower() for t in p)) for p in parts]
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


def answers_match(pred: str, gold: str, tolerance=0) -> bool:
    """Whether two answers are equal as mathematics (see above), numbers up to a tolerance. Takes any strings,
    never raises, and does a bounded amount of work; an empty answer matches nothing."""
    if max(len(pred), len(gold)) > 20 * MAX_CHARS:
        return bool(pred.strip()) and pred.strip() == gold.strip()
    pred, gold = bare_answer(pred), bare_answer(gold)
    try:
        pred, gold = tokenize(pred), tokenize(gold)
        return bool(pred and gold) and (pred == gold or same(read(pred), read(gold), tolerance))
    except (ValueError, ArithmeticError, RecursionError):  # or an exact value that no float can hold
        return bool(pred) and pred == gold


def bare_answer(text):
    """What the box holds, or of prose around a formula the formula: Hence $x > 2$ holds."""
    text = last_boxed(text) or text
    start = re.search(r"\$|\\[(\[]", text)
    if start and re.fullmatch(r"(?=.*[A-Za-z]{2})[^\d\\]+", text[:start.start()], re.S):
        text = text[start.start():max(text.rfind(end) for end in ("$", "\\)", "\\]")) + 2]
    return text.strip("* \t\n")


def same(a, b, tolerance=0) -> bool:
    """Whether two answers are equal; in lists, whether each member has its like on the other side. An
    equation is any multiple of itself, an inequality any positive one."""
    def equal(x, y):
        return same(x, y, tolerance)

    if a.kind not in RELATIONS and (b.kind in RELATIONS or a.kind == "list"):
        a, b = b, a
    if a.kind in RELATIONS:
        if b.kind not in RELATIONS:  # x = 5 is 5
            return bool(a.items) and equal(a.items[0], b)
        if a.items and b.items and a.text == b.text:
            return equal(a.items[0], b.items[0])
        ratios = [x / y for x, y in zip(a.values, b.values) if x and y]
        constant = a.kind == b.kind and agree(ratios, ratios[:1] * len(ratios))
        return constant and (a.kind in "=≠" or ratios[0].real > 0)
    if a.kind == b.kind == "leaf":
        return same_leaf(a, b, tolerance)
    names = {x.text for x in b.items if x.kind == "=" and x.items}
    if "list" != a.kind != "leaf" and (a.kind == b.kind or len(names) == len(b.items) > 1):
        return len(a.items) == len(b.items) and all(map(equal, a.items, b.items))  # x = 2, y = 3 is (2, 3)
    xs, ys = a.items if a.kind == "list" else [a], b.items
    return b.kind == "list" and all(any(equal(x, y) for y in ys) for x in xs) and all(
        any(equal(x, y) for x in xs) for y in ys)


def same_leaf(a, b, tolerance):
    """Words by their letters; values at all points, where a percent sign, a missing unit, and the rounding
    of an exact value to six or more digits are forgiven."""
    if a.unit and b.unit and a.unit != b.unit:
        return False
    decimals = [x.text for x in (a, b) if "." in x.text]
    if len(decimals) == 1 and re.fullmatch(r"[+-]? ?[0.]*[1-9](\.?\d){5,}", decimals[0]):
        half_a_digit = Fraction(50001, 100000 * 10 ** len(decimals[0].partition(".")[2]))
        tolerance = max(tolerance, half_a_digit)
    if a.text == b.text or agree(a.values, b.values, tolerance):
        return True
    if (a.unit == "%") != (b.unit == "%"):
        share, other = (a, b) if a.unit == "%" else (b, a)
        return agree(share.values, [x and 100 * x for x in other.values])
    letters = [x.text.replace(" ", "").casefold() for x in (a, b)]
    return [None] in (a.values, b.values) and letters[0] == letters[1] and letters[0].isalpha()


def agree(u, v, tolerance=0):
    """Whether two values are equal at all points where both are defined, two at least."""
    pairs = [(x, y) for x, y in zip(u, v) if x is not None and y is not None]
    return len(pairs) > 1 and all(
        abs(x - y) <= tolerance or abs(x - y) <= 1e-11 * max(abs(x), abs(y))
        and not (isinstance(x, Fraction) and isinstance(y, Fraction)) for x, y in pairs)


# --- IFEval: was an instruction followed that a program can check? --------------------------------

# The 25 kinds of google-research's instruction_following_eval by its rules, odd ones included. Its
# libraries are a plain rule here, so a verdict can differ: langdetect is `is_language`, nltk's
# sentence splitter is `count_sentences`, and its words are `[\w./-]+`. Keywords are literal text.

LANGUAGES = {  # letters of a script: {code: frequent words, where several languages share them}
    "a-zß-ɏ\u1e00-\u1eff": {
        "en": "the of and to a in is it you that for i not my on are be we this with",
        "es": "el la los las que en un una por con del se como más",
        "pt": "os um uma que em do da não com para as se como mais",
        "fr": "le la les des et un une est je pas vous du que pour dans",
        "de": "der die das und ist nicht ein eine zu den ich mit von auf",
        "it": "il la gli di che un una non è per del della sono in",
        "pl": "na się nie że to jest do od po za dla jak",
        "vi": "và của là có không cho một những các được với này tôi",
        "sw": "na ya wa kwa ni za katika cha kuwa hii",
        "fi": "ja on ei se että ovat oli mutta kun hän niin"},
    "\u0400-\u04ff": {
        "ru": "и в не на что с по это как из он я у для",
        "uk": "і в не на що з та це як у є для він я про",
        "bg": "и в не на че с да се е от за по си са"},
    "\u0620-\u06d3": {
        "ar": "في من على إلى أن التي هذا هذه لا ما",
        "fa": "و به از که در را این است با آن",
        "ur": "کے کی میں ہے اور سے کا کو نے یہ"},
    "\u0900-\u0963": {
        "hi": "है के में की और से का को हैं नहीं",
        "mr": "आहे आणि मध्ये हे ते नाही आहेत ती हा तो",
        "ne": "छ र मा हो छन् लाई पनि यो छैन भने"},
    "\u3040-\u30ff": {"ja": ""}, "\u0590-\u05ff": {"he": ""}, "\u0980-\u09ff": {"bn": ""},
    "\u0a00-\u0a7f": {"pa": ""}, "\u0a80-\u0aff": {"gu": ""}, "\u0b80-\u0bff": {"ta": ""},
    "\u0c00-\u0c7f": {"te": ""}, "\u0c80-\u0cff": {"kn": ""}, "\u0d00-\u0d7f": {"ml": ""},
    "\u0e00-\u0e7f": {"th": ""}, "\uac00-\ud7af": {"ko": ""}}


def is_language(text, language):
    """Whether `text` is in a language: of those in the script with the most letters, the one with
    the most frequent words. Text without letters is in any language."""
    if not any(language in codes for codes in LANGUAGES.values()):
        raise ValueError(f"unknown language {language!r}")
    if not any(c.isalpha() for c in text):
        return True
    text = text.lower()
    script = max(LANGUAGES, key=lambda letters: len(re.findall(f"[{letters}]", text)))
    words = Counter(re.findall(f"[{script}]+", text))
    scores = {}
    for code, frequent in LANGUAGES[script].items():
        scores[code] = sum(words[word] for word in frequent.split())
    best = max(scores, key=scores.get)
    if best == "en" and scores["en"] == 0:  # a title may lack frequent words; a sentence has some
        return language == "en" and 1 < words.total() < 10
    return best == language


SENTENCE_END = re.compile(r""".*[.?!](?=["')\]}*:?!]|$)""")
ABBREVIATION = re.compile(
    r"(mr|mrs|ms|dr|prof|st|jr|sr|vs|inc|ltd|co|[ap]\.m|u\.[sk]|ph\.d|[c-hj-np-tvw]|.*\.)\.")


def count_sentences(text):
    """Number of sentences: one, and one for each end of a sentence that another word follows."""
    words, count = text.split(), 1
    for word, following in zip(words, words[1:]):
        end = SENTENCE_END.match(word)
        if end is None:
            continue
        last = end[0].lower().lstrip("([{\"'*")
        is_listed = following[0].islower() and re.fullmatch(r"[\d.,-]+", last)  # 1. one 2. two
        if not is_listed and not ABBREVIATION.fullmatch(last):
            count += 1
    return count


def is_json(text):
    """Whether the text is JSON, alone or in one fence of backticks."""
    text = re.sub(r"\A```(?:json)?|```\Z", "", text.strip(), flags=re.IGNORECASE)
    try:
        json.loads(text)
    except (ValueError, RecursionError):  # RecursionError: nested too deeply
        return False
    return True


def split_parts(text, divider):
    """The parts between dividers; none if one is empty that is neither the first nor the last."""
    parts = [part.strip() for part in text.split(divider)]
    if not parts[0]:
        parts = parts[1:]
    if parts and not parts[-1]:
        parts = parts[:-1]
    return [] if "" in parts else parts


def nth_paragraph_starts(text, num_paragraphs, nth_paragraph, first_word):
    """Empty paragraphs do not count for the number, but do for which is the nth."""
    first_word = first_word.lower()
    paragraphs = [paragraph.strip() for paragraph in text.split("\n\n")]
    filled = len([paragraph for paragraph in paragraphs if paragraph])
    if filled != num_paragraphs or nth_paragraph > filled or not paragraphs[nth_paragraph - 1]:
        return False
    word = paragraphs[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return re.split("[.,?!'\"]", word)[0].lower() == first_word


def compare(count, relation, threshold):
    """IFEval's two relations."""
    return {"less than": count < threshold, "at least": count >= threshold}[relation]


POSTSCRIPTS = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}
# Instruction: its check. The parameters after `text` have the names of its arguments in the files.
# Some patterns are written anew: the official ones match the same, in quadratic time.
CHECKS = {
    "change_case:capital_word_frequency": lambda text, capital_frequency, capital_relation: compare(
        sum(word.isupper() for word in re.findall(r"[\w./-]+", text)),
        capital_relation, capital_frequency),
    "change_case:english_capital": lambda text: text.isupper() and is_language(text, "en"),
    "change_case:english_lowercase": lambda text: text.islower() and is_language(text, "en"),
    "combination:repeat_prompt": lambda text, prompt_to_repeat:
        text.strip().lower().startswith(prompt_to_repeat.strip().lower()),
    "combination:two_responses": lambda text:
        len(split_parts(text, "******")) == len(set(split_parts(text, "******"))) == 2,
    "detectable_content:number_placeholders": lambda text, num_placeholders:
        re.findall(r"\[[^\]\n]*(\]?)", text).count("]") >= num_placeholders,
    "detectable_content:postscript": lambda text, postscript_marker: re.search(
        POSTSCRIPTS.get(postscript_marker.strip(), re.escape(postscript_marker.strip())),
        text, re.IGNORECASE) is not None,
    "detectable_format:constrained_response": lambda text:
        any(f"My answer is {option}." in text for option in ("yes", "no", "maybe")),
    "detectable_format:json_format": is_json,
    "detectable_format:multiple_sections": lambda text, section_spliter, num_sections:
        len(re.findall(re.escape(section_spliter.strip()) + r"\s?\d+", text)) >= num_sections,
    "detectable_format:number_bullet_lists": lambda text, num_bullets: num_bullets == len(
        re.findall(r"^[^\S\n]*\*[^*].*", text, re.M)) + len(re.findall(r"^[^\S\n]*-", text, re.M)),
    "detectable_format:number_highlighted_sections": lambda text, num_highlights:
        sum(1 for pattern in (r"\*([^\n*]*)\*", r"\*\*([^\n*]*)\*\*")
            for inner in re.findall(pattern, text) if inner.strip()) >= num_highlights,
    "detectable_format:title": lambda text: any(
        line.partition("<<")[2].rpartition(">>")[0].lstrip("<").rstrip(">").strip()
        for line in text.split("\n")),
    "keywords:existence": lambda text, keywords:
        all([keyword.lower() in text.lower() for keyword in keywords]),
    "keywords:forbidden_words": lambda text, forbidden_words: not any(
        [re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words]),
    "keywords:frequency": lambda text, keyword, frequency, relation:
        compare(text.lower().count(keyword.strip().lower()), relation, frequency),
    "keywords:letter_frequency": lambda text, letter, let_frequency, let_relation:
        compare(text.lower().count(letter.lower()), let_relation, let_frequency),
    "language:response_language": is_language,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_starts,
    "length_constraints:number_paragraphs": lambda text, num_paragraphs:
        len(split_parts(text, "***")) == num_paragraphs,
    "length_constraints:number_sentences": lambda text, num_sentences, relation:
        compare(count_sentences(text), relation, num_sentences),
    "length_constraints:number_words": lambda text, num_words, relation:
        compare(len(re.findall(r"\w+", text)), relation, num_words),
    "punctuation:no_comma": lambda text: "," not in text,
    "startend:end_checker": lambda text, end_phrase:
        text.strip().strip('"').lower().endswith(end_phrase.strip().lower()),
    "startend:quotation": lambda text:
        len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] == '"'}


def ifeval_verdicts(response: str, instruction_ids: list[str], kwargs: list[dict]
                    ) -> tuple[list[bool], list[bool]]:
    """Strict and loose verdict of each instruction on a response.

    Loose: on any of eight texts: the response whole, without its first line, its last, or both, and
    each also without `*`. An empty text follows nothing. An argument that is None is absent. Raises
    UserError for an unknown instruction and for wrong arguments."""
    lines = response.split("\n")
    texts = [response]
    for part in (lines[1:], lines[:-1], lines[1:-1]):
        texts.append("\n".join(part).strip())
    texts += [text.replace("*", "") for text in texts]
    strict, loose = [], []
    for instruction, arguments in zip(instruction_ids, kwargs):
        try:
            arguments = {k: v for k, v in arguments.items() if v is not None}
            check = CHECKS[instruction]
            verdicts = [text.strip() != "" and check(text, **arguments) for text in texts]
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise UserError(f"IFEval has no instruction {instruction!r} with the arguments "
                            f"{arguments!r} ({e})") from None
        strict.append(verdicts[0])
        loose.append(any(verdicts))
    return strict, loose


def read_ifeval(row, prompt):
    """A row of IFEval: (messages, (instructions, their arguments)); raises UserError."""
    ids, arguments = row.get("instruction_id_list"), row.get("kwargs")
    if not isinstance(ids, list) or not isinstance(arguments, list) or len(ids) != len(arguments):
        raise UserError("'instruction_id_list' and 'kwargs': two lists of one length expected")
    ifeval_verdicts("x", ids, arguments)  # raises for what it does not know
    return user_turn(prompt, data.check_text(row.get("prompt"), "'prompt'")), (ids, arguments)


def grade_ifeval(text, gold):
    """Prompt level: all instructions followed; instruction level: the share that was followed."""
    strict, loose = ifeval_verdicts(after_thinking(text), *gold)
    return {"prompt strict": all(strict), "instruction strict": sum(strict) / len(strict),
            "prompt loose": all(loose), "instruction loose": sum(loose) / len(loose)}


# --- math: gold answers and their rows ------------------------------------------------------------

@dataclass(frozen=True)
class Gold:
    """What a right answer is: `text`, and for some rows of OlympiadBench more."""

    text: str
    several: bool = False  # the text lists several answers; all must be given, in any order
    tolerance: Fraction = Fraction(0)  # a number may be off by so much


def gold_answer(row: dict) -> str:
    """The gold answer from whatever field this data set keeps it in; a whole solution gives its last box or
    its `####` line. Raises UserError where there is none."""
    if row.get("final_answer") is not None:  # OlympiadBench; its field `solution` is a list of proofs
        key, parts = "final_answer", row["final_answer"]
        if not isinstance(parts, list) or not parts or not all(isinstance(x, str) for x in parts):
            raise UserError(f"'final_answer': a list of strings expected, found {parts!r:.60}")
        value = ", ".join(parts)
    else:
        nested = row.get("reward_model")
        fields = {**row, "reward_model.ground_truth": nested.get("ground_truth")
                  if isinstance(nested, dict) else None}
        known = ("answer", "ground_truth", "label", "reward_model.ground_truth", "solution")  # last: prose
        key = next((k for k in known if fields.get(k) is not None), None)
        value = fields.get(key)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or value in (math.inf, -math.inf):
        raise UserError("a gold answer expected in answer, solution, ground_truth, label or "
                        f"reward_model.ground_truth: a string or a number, found {value!r:.60}")
    text = data.check_text(str(value), repr(key)).strip()
    gold = extract_answer(text) if "boxed" in text or "####" in text else text
    if not gold or len(gold) > MAX_CHARS or value != value:
        raise UserError(f"{key!r}: no final answer in it (\\boxed{{}}, ####, or the bare answer expected), "
                        f"found {text!r:.60}")
    return gold


def math_gold(row: dict) -> Gold:
    """The gold answer of a row of any math set, with OlympiadBench's fields is_multiple_answer, error (the
    tolerance) and unit. Raises UserError naming the field."""
    text = gold_answer(row)
    if row.get("final_answer") is None:  # elsewhere `error` and `unit` may be anything
        return Gold(text)
    several, unit, error = (row.get(k) for k in ("is_multiple_answer", "unit", "error"))
    if not isinstance(several, bool | None):
        raise UserError(f"'is_multiple_answer': true or false expected, found {several!r:.60}")
    if not isinstance(unit, str | None):
        raise UserError(f"'unit': a string or null expected, found {unit!r:.60}")
    try:
        tolerance = Fraction(str(float(str(error or 0))))  # "1e-1" is 1/10; the float bounds the work
    except ValueError:
        tolerance = Fraction(-1)
    if tolerance < 0:
        raise UserError(f"'error': one positive number or null expected, found {error!r:.60}")
    several = bool(several) or len(row["final_answer"]) > 1
    unit = (unit or "").strip("$ ")
    unit = unit if "\\" in unit or not unit else rf"\text{{{unit}}}"
    return Gold(f"{apart(text) if several else text} {unit}".strip(), several, tolerance)


def apart(text):
    """A list of answers with its commas spaced: 5,150 are two of them."""
    return re.sub(r"(?<!\{),\s*", ", ", text)


def grade_math(text: str, gold: Gold) -> bool:
    """Whether a response ends in the right answer. Several answers may also stand in several boxes, if
    those are in one line, the last that has a box."""
    found = extract_answer(text)
    answers = [] if found is None else [found]
    if answers and gold.several:
        line = ([""] + [x for x in after_thinking(text).split("\n") if BOX.search(x)])[-1]
        at = [m.start() for m in BOX.finditer(line)]
        boxes = [last_boxed(line[i:j]) for i, j in zip(at, [*at[1:], None])]
        answers = [apart(found), apart(", ".join(boxes))]
    return any(answers_match(x, gold.text, gold.tolerance) for x in answers)


# --- Connect4 -------------------------------------------------------------------------------------

CONNECT4_PROMPT = """You play Connect Four on a board of 6 rows and 7 columns. A disc falls to the \
lowest empty cell of its column; four or more discs of one player in a row, horizontally, \
vertically or diagonally, win. The board is written as (row,column):disc, row 0 being the lowest \
and column 0 the leftmost, with X and O for the players' discs and _ for an empty cell.
{question}
Look at every valid move, and at all four lines through its cell, before you decide. Write down \
all valid moves with which you would win at once, and all valid moves with which your opponent \
would win at once if it were their turn now, in exactly this form, None standing for an empty list:
[Intermediate Thinking Results 1: (row,column), (row,column)]
[Intermediate Thinking Results 2: None]
The first line is about you, the second about your opponent. End with your move in this form:
Chosen Move: (row,column)"""
CONNECT4_NONE = """[Intermediate Thinking Results 1: None]
[Intermediate Thinking Results 2: None]"""
OTHER = {"X": "O", "O": "X"}


def connect4_state(board: list, player: str) -> str:
    """The position as the official file writes it. `board`: 6 rows of 7 cells, row 0 lowest, each
    "X", "O" or "_"; `player` is to move."""
    rows = ["".join(f"({r},{c}):{board[r][c]} " for c in range(7)) for r in reversed(range(6))]
    moves = [f"({r},{c})" for r, c in valid_moves(board)]
    return ("\nCurrent Game Board: \n" + "\n".join(rows) + "\n\nCurrent valid moves for player "
            f"{player}: {moves}\nYou are player {player}, please choose the best move considering "
            "the current board state.\n")


def valid_moves(board):
    """The lowest empty cell of each column that has one, by column."""
    return [(column.index("_"), c) for c, column in enumerate(zip(*board)) if "_" in column]


def wins(board, row, col, player):
    """Whether a disc of the player at this cell makes four or more in a row."""
    for dr, dc in ((0, 1), (1, 0), (1, 1), (1, -1)):
        count = 1
        for sign in (1, -1):
            r, c = row + sign * dr, col + sign * dc
            while 0 <= r < 6 and 0 <= c < 7 and board[r][c] == player:
                count += 1
                r, c = r + sign * dr, c + sign * dc
        if count >= 4:
            return True
    return False


def winning_moves(board: list, player: str) -> list[list[int]]:
    """The valid moves [row, col], by column, with which `player` would at once have four or more in
    a row; whose turn it is does not matter."""
    return [[r, c] for r, c in valid_moves(board) if wins(board, r, c, player)]


def connect4_rows(count: int, seed: int) -> list[dict]:
    """`count` rows {"state", "answer"} in the official layout; an answer is [mine, opponent's]
    winning moves. A state is a position, any but the last, of a game of two random players. All
    states differ, and of any first n rows at most a fifth has both lists empty, as in the paper."""
    rng, rows, empty = random.Random(seed), {}, 0  # rows by state
    while len(rows) < count:
        board, player, over, positions = [["_"] * 7 for _ in range(6)], "X", False, []
        while not over:
            positions.append(([row[:] for row in board], player))
            r, c = rng.choice(valid_moves(board))
            over = wins(board, r, c, player) or len(positions) == 42
            board[r][c], player = player, OTHER[player]
        board, player = rng.choice(positions)
        state = connect4_state(board, player)
        answer = [winning_moves(board, player), winning_moves(board, OTHER[player])]
        is_empty = answer == [[], []]
        if state in rows or is_empty and 5 * (empty + 1) > len(rows) + 1:
            continue
        empty += is_empty
        rows[state] = {"state": state, "answer": answer}
    return list(rows.values())


def read_connect4(row, prompt):
    """A row in the official layout: (messages, [mine, opponent's] winning moves). Raises UserError
    for another layout, and for labels that are not those of the rules."""
    state = data.check_text(row.get("state"), "'state'")
    board = [["_"] * 7 for _ in range(6)]
    for r, c, disc in re.findall(r"\(([0-5]),([0-6])\):([XO])", state):
        board[int(r)][int(c)] = disc
    player = "O" if "You are player O" in state else "X"
    if state != connect4_state(board, player):
        raise UserError(f"'state': not in the layout of the official file, found {state!r:.120}")
    answer = [winning_moves(board, player), winning_moves(board, OTHER[player])]
    if row.get("answer") != answer:
        raise UserError(f"'answer': by the rules it is {answer}, found {row.get('answer')!r:.100}")
    return user_turn(prompt, state), answer


def grade_connect4(text: str, answer: list) -> dict:
    """{"joint", "mine", "opponent", "no answer"}, each 0 or 1, of a response.

    As in the published scorer upper case does not matter, the first result of each kind counts, and
    cells are compared as multisets. Different from it: thinking is dropped, (r, c) may have spaces,
    and a result with neither cells nor None is wrong. A missing result is no answer.
    """
    text = after_thinking(text).lower()
    results = [re.search(rf"intermediate thinking results {n} *:([^\]\n]{{0,1000}})\]", text)
               for n in (1, 2)]
    right = []
    for result, moves in zip(results, answer):
        written = result[1] if result else ""
        cells = re.findall(r"\(\s*(\d+)\s*,\s*(\d+)\s*\)", written)
        is_clear = ("none" in written) != (cells != [])
        right.append(int(is_clear and sorted([int(r), int(c)] for r, c in cells) == sorted(moves)))
    return {"joint": min(right), "mine": right[0], "opponent": right[1],
            "no answer": int(None in results)}


# --- GPQA -----------------------------------------------------------------------------------------

GPQA_PROMPT = """Answer this multiple-choice question. Think step by step, then end with one last \
line that gives the letter of your choice in exactly this form: "Answer": "C"

{question}"""
GPQA_KEYS = ["Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))]
QUOTE = "[\"'“”‘’]"
CHOICES = [re.compile(pattern) for pattern in (
    rf"(?i:{QUOTE}answer{QUOTE})\s*:\s*{QUOTE}\(?([A-D])\)?\.?{QUOTE}",  # as the prompt asks for
    r"\\boxed\s*\{\s*(?:\\\w+\s*\{)?[\s($]*([A-D])\s*[}).:]",
    # "The answer is C"; not the article of "is A good one", a part of C-H, the first of two
    r"(?i:\b(?:answer|option|choice)\b[*\"']*\s*(?:is|would be|:))"
    r"(?:[\s:*_\"'($\[]|\\\(|\\(?:boxed|text\w*)\s*\{|(?i:option|choice)\b)*"
    r"([A-D])(?![\w'’–-]|[ \t]+(?!because\b|since\b|as\b)[a-z]|\)?\s*[,/(]\s*\(?[A-D]\b)")]


def read_gpqa(row, prompt):
    """A four-choice question with the hub's keys: (messages, right letter). Raises UserError.

    Choices are ordered by a hash of question and choice: a shuffle that is the same on every
    machine and whatever their order in the file.
    """
    question, *choices = (data.check_text(row.get(key), repr(key)).strip() for key in GPQA_KEYS)
    right = choices[0]
    if not question or not all(choices) or choices.count(right) > 1:
        raise UserError("the question or a choice is empty, or the right choice is there twice")
    choices.sort(key=lambda c: hashlib.sha256(json.dumps([question, c]).encode()).digest())
    shown = "\n".join(f"{letter}) {choice}" for letter, choice in zip("ABCD", choices))
    return user_turn(prompt, f"{question}\n\n{shown}"), "ABCD"[choices.index(right)]


def choice_letter(text: str) -> str | None:
    """The letter that a response chooses, or None: the last match of the first of CHOICES that has
    one, else a letter alone on the last line. Thinking is dropped."""
    text = after_thinking(text)
    for pattern in CHOICES:
        if letters := pattern.findall(text):
            return letters[-1]
    bare = text.rstrip().split("\n")[-1].strip("*_()$. \t\r")
    return bare if bare in ("A", "B", "C", "D") else None


def grade_gpqa(text, right):
    """Scores of a response to a four-choice question."""
    letter = choice_letter(text)
    return {"accuracy": letter == right, "no answer": letter is None}


# --- tasks ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One benchmark: what is asked, how its file is read, and how an answer is scored."""

    name: str
    prompt: str  # the user turn; {question} is filled in
    read: object  # (row, prompt) -> (messages, gold); raises UserError that names the field
    grade: object  # (text, gold) -> {metric: 0 to 1}; the first metric is the headline
    samples: int = 5  # answers a question, the paper's k
    group: str = ""  # of the paper's table
    weights: dict = field(default_factory=dict)  # {metric: (gold) -> weight of its row}; else 1
    trivial: str = ""  # an answer that costs no thought; what it scores is shown beside
    rows: list = field(default_factory=list)  # (id, messages, gold), from load_task


def question_messages(row: dict, prompt: str) -> list:
    """The messages that ask a row's question, in question, problem or prompt: a string goes into the
    prompt's {question}, a list of messages stays as it is. Raises UserError naming the field."""
    for key in ("question", "problem", "prompt"):
        if row.get(key) is not None:
            messages = data.prompt_messages(row[key], key)
            if isinstance(row[key], str):
                messages = user_turn(prompt, row[key])
            return messages
    raise UserError(f"question, problem or prompt expected, found {sorted(row)!r:.100}")


def read_math(row, prompt):
    """A row of a math set: (messages, Gold). Raises UserError naming the field."""
    return question_messages(row, prompt), math_gold(row)


def score_math(text, gold):
    """Scores of a response to a mathematical question."""
    return {"accuracy": grade_math(text, gold), "no answer": extract_answer(text) is None,
            "no box": last_boxed(after_thinking(text)) is None}


# A new benchmark is one entry here, with its own prompt, reader and grader, such as GPQA's above.
TASKS = {task.name: task for task in (
    Task("aime24", INSTRUCTION, read_math, score_math, samples=16, group="in-domain"),
    Task("aime25", INSTRUCTION, read_math, score_math, samples=16, group="in-domain"),
    Task("amc23", INSTRUCTION, read_math, score_math, samples=16, group="in-domain"),
    Task("math500", INSTRUCTION, read_math, score_math, group="in-domain"),
    Task("minerva", INSTRUCTION, read_math, score_math, group="in-domain"),
    Task("olympiadbench", INSTRUCTION, read_math, score_math, group="in-domain"),
    Task("gpqa", GPQA_PROMPT, read_gpqa, grade_gpqa, group="OOD"),
    Task("connect4", CONNECT4_PROMPT, read_connect4, grade_connect4, samples=1, group="OOD",
         trivial=CONNECT4_NONE),
    Task("ifeval", "{question}", read_ifeval, grade_ifeval, group="IF", weights=dict.fromkeys(
        ("instruction strict", "instruction loose"), lambda gold: len(gold[0]))),
    Task("gsm8k", INSTRUCTION, read_math, score_math))}  # not in the paper's table


def user_turn(prompt: str, question: str) -> list:
    """The messages that ask a question."""
    return [{"role": "user", "content": prompt.replace("{question}", question)}]


def item_id(row, line):
    """The row's own id or index, else its line number."""
    for key in ("id", "index", "key", "Record ID"):
        value = row.get(key)
        if value is not None:
            if type(value) not in (str, int):
                raise UserError(f'"{key}": a string or an integer expected, found {value!r:.60}')
            return data.check_text(str(value), f'"{key}"')
    return str(line)


def load_task(spec: str, folder: str) -> Task:
    """A task with its rows: NAME, from folder/NAME.jsonl, or NAME=FILE. Any other NAME=FILE is a
    math set of the user's own. Raises UserError naming file and line."""
    name, given, path = spec.partition("=")
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(f"--tasks: {name!r} is no name; letters, digits, '-' and '_' expected")
    if name not in TASKS and not given:
        raise UserError(f"--tasks: {name!r} is unknown; {', '.join(TASKS)} or NAME=FILE.jsonl "
                        "expected")
    task = TASKS.get(name) or replace(TASKS["gsm8k"], name=name)
    path = path or os.path.join(folder, f"{name}.jsonl")

    def parse(row, line):
        return item_id(row, line), *task.read(row, task.prompt)

    if name == "connect4" and not given and not os.path.exists(path):
        rows = [parse(row, i) for i, row in enumerate(connect4_rows(500, seed=0))]
    else:
        rows, _ = data.read_rows(path, parse)
    repeated = [k for k, n in Counter(row[0] for row in rows).items() if n > 1]
    if repeated:
        first = ", ".join(map(ascii, repeated[:5]))
        raise UserError(f"{path}: {len(repeated)} ids occur more than once, first {first} "
                        "(a row without an id has its line's number)")
    return replace(task, rows=rows)


# --- statistics -----------------------------------------------------------------------------------

def question_mean(name, scores):
    """The mean over the samples of one question."""
    scores = list(scores)
    if not scores or not all(isinstance(x, Real | np.bool_) and math.isfinite(x) for x in scores):
        raise UserError(f"question {name!r}: one or more finite scores expected, found {scores!r:.60}")
    return math.fsum(scores) / len(scores)


def clustered(scores: list, weights: list | None = None) -> tuple[float, float | None]:
    """(mean, its standard error) of per-question lists of scores, in the scores' unit.

    Samples of one question are no independent evidence, so the error is that of n questions, clusters: the
    cluster-robust error with its n / (n - 1) correction (Miller 2024, arXiv 2411.00640, eq. 4). Every
    question counts once, however many of its samples failed; with weights (a text's tokens, a prompt's
    instructions) it is the weighted mean and the error of a ratio. None: one question has no spread.
    Raises UserError where there is no score, or one that is no number.
    """
    if not scores:
        raise UserError("no question has a score")
    means, n = np.array([question_mean(i, s) for i, s in enumerate(scores)]), len(scores)
    weights = np.ones(n) if weights is None else np.array(weights, dtype=float)
    mean = (weights * means).sum() / weights.sum()
    if n == 1:
        return float(mean), None
    spread = np.sqrt(((weights * (means - mean)) ** 2).sum() * n / (n - 1)) / weights.sum()
    return float(mean), float(spread)


def pass_at_k(n: int, c: int, k: int) -> float:
    """The unbiased estimate of the chance that one or more of k samples is right, where c of n were (Chen
    et al. 2021, arXiv 2107.03374), in integers: exact for any n. Raises UserError for impossible counts."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise UserError(f"pass@{k} of {n} samples with {c} right: 0 <= right <= samples and 1 <= k <= "
                        "samples expected")
    subsets = math.comb(n, k)
    return (subsets - math.comb(n - c, k)) / subsets


def paired_bootstrap(a: dict, b: dict, seed: int, resamples: int = 10_000) -> tuple:
    """(difference, low, high, p) of two models by {question: its scores}: mean of b - mean of a, over the
    questions that are in both; the 95 % percentile interval; and the two-sided p of no difference.

    Questions are drawn with replacement and keep both models' scores together, so what makes a question
    hard for both cancels out. With a few questions only, the interval is somewhat too narrow. Raises
    UserError where fewer than two questions are in both.
    """
    both = [q for q in a if q in b]
    if len(both) < 2:
        raise UserError(f"{len(both)} questions are in both results, of {len(a)} and {len(b)}: two or more "
                        "are needed to compare them")
    differences = np.array([question_mean(q, b[q]) - question_mean(q, a[q]) for q in both])
    # To draw n questions is to draw how often each distinct difference occurs; there are few of those.
    values, counts = np.unique(differences, return_counts=True)
    rng, n = np.random.default_rng(seed), len(both)
    blocks = [min(1000, resamples - done) for done in range(0, resamples, 1000)]  # bounds the memory
    means = np.concatenate([rng.multinomial(n, counts / n, size) @ values / n for size in blocks])
    low, high = np.quantile(means, (0.025, 0.975))
    beyond = int(min(np.sum(means <= 1e-12), np.sum(means >= -1e-12)))  # a 0 may be summed to 1e-17
    return float(differences.mean()), float(low), float(high), min(1.0, 2 * (1 + beyond) / (1 + resamples))


# --- evaluation -----------------------------------------------------------------------------------


def evaluate(policy, tasks: list, out: str, sampling: Sampling, ranks: Ranks, samples: int = 0,
             seed: int = 0) -> dict:
    """Sample and score tasks; every answer is kept in out/TASK/raw-*.jsonl, and asked once.

    samples: answers a question; 0: the paper's number for each task. Returns (on the main rank) and
    writes results.json, where tasks of an earlier call stay: {task: `score_task`'s figures}.
    """
    path = os.path.join(out, "results.json")
    with ranks.together():
        earlier = ranks.main and os.path.lexists(path)
        results = read_results(out) if earlier else {}
    for task in tasks:
        k = samples or task.samples
        wanted = [[request_for(f"{name}/{i}", messages, seed) for i in range(k)]
                  for name, messages, _ in task.rows]
        requests = [request for row in wanted for request in row]
        records = sample(policy, requests, os.path.join(out, task.name), sampling, ranks, task.name)
        with ranks.together():
            if ranks.main:
                by_row = [[records.get(r.key, {}) for r in row] for row in wanted]
                results[task.name] = score_task(task, by_row)
                ranks.say(f"{task.name}: " + describe(results[task.name]))
                write_json(path, results)
                write_text(os.path.join(out, "results.md"), [results_table(results), "\n"])
    ranks.say("\n" + results_table(results))
    return results


def score_task(task: Task, records: list) -> dict:
    """The figures of one task from its records, a list a row. Metrics, as (mean, standard error),
    and shares are from 0 to 1. Failed requests are left out of all means, and counted."""
    answers, graded = [], []  # graded: (id, gold, grades of its answers) of each row that has some
    for (name, _, gold), row in zip(task.rows, records):
        arrived = [r for r in row if "text" in r]
        answers += arrived
        if arrived:
            graded.append((name, gold, [task.grade(r["text"], gold) for r in arrived]))
    if not answers:
        errors = Counter(r.get("error", "not asked") for row in records for r in row)
        why = errors.most_common(1)[0][0]
        raise UserError(f"{task.name}: not one answer arrived ({why:.200}); start again to retry")
    metrics, scores = {}, {}
    for metric in graded[0][2][0]:
        by_row = {name: [float(g[metric]) for g in grades] for name, _, grades in graded}
        weights = None
        if metric in task.weights:
            weights = [task.weights[metric](gold) for _, gold, _ in graded]
        metrics[metric] = clustered(list(by_row.values()), weights)
        scores = scores or by_row  # of the headline
    k = min(len(row) for row in scores.values())
    pass_k = [pass_at_k(len(row), round(sum(row)), k) for row in scores.values()]
    reference = {}
    if task.trivial:
        grades = [task.grade(task.trivial, gold) for _, _, gold in task.rows]
        reference = {metric: sum(g[metric] for g in grades) / len(grades) for metric in grades[0]}
    asked = {}
    for name, messages, _ in task.rows:
        text = "\n".join(m["content"] for m in messages)
        asked[name] = hashlib.sha256(text.encode()).hexdigest()[:12]

    def share(values):
        return sum(values) / len(answers)

    return {"questions": len(task.rows), "samples": max(len(row) for row in records),
            "metrics": metrics, f"pass@{k}": sum(pass_k) / len(pass_k),
            "cut off": share(r["finish"] == "length" for r in answers),
            "empty": share(not r["text"].strip() for r in answers),
            "tokens": share(r["tokens"] for r in answers),
            "unanswered": sum(len(row) for row in records) - len(answers),
            "reference": reference, "asked": asked, "scores": scores}


def describe(result):
    """One line of a task's figures."""
    shown = [f"{name} {figure(*value)}" for name, value in result["metrics"].items()]
    for key, value in result.items():
        if key.startswith("pass@") or key in ("cut off", "empty"):
            shown.append(f"{key} {100 * value:.1f}")
    shown.append(f"{result['tokens']:.0f} tokens an answer")
    if result["reference"]:
        shown.append(f"answering None gives {100 * result['reference']['joint']:.1f}")
    if result["unanswered"]:
        shown.append(f"{result['unanswered']} UNANSWERED (start again to ask them)")
    return ", ".join(shown)


def figure(mean, error):
    """A share and its standard error as text, in %."""
    return f"{100 * mean:.1f}" if error is None else f"{100 * mean:.1f} ± {100 * error:.1f}"


def results_table(results: dict) -> str:
    """The headline figures in %, with standard errors, as the paper lays them out: in-domain, OOD,
    IF, and the mean of each group and of all nine where all of a group's tasks are there."""
    headline = {name: next(iter(r["metrics"].values())) for name, r in results.items()}
    group_of = {task.name: task.group for task in TASKS.values() if task.group}
    ordered = [name for name in group_of if name in headline]
    ordered += [name for name in headline if name not in group_of]
    columns = [(name, "---", figure(*headline[name])) for name in ordered]
    for group in ("in-domain", "OOD", "overall"):
        names = [name for name in group_of if group in (group_of[name], "overall")]
        if all(name in headline for name in names):
            mean = sum(headline[name][0] for name in names) / len(names)
            columns.append((group, "---", figure(mean, None)))
    return "\n".join("| " + " | ".join(row) + " |" for row in zip(*columns))


def read_results(folder: str) -> dict:
    """results.json of an evaluation."""
    path = os.path.join(folder, "results.json")
    results = read_json(path)
    for name, result in results.items():
        if not isinstance(result, dict) or "scores" not in result:
            raise UserError(f"{path}: {name!r:.60} is no result of an evaluation")
    return results


def compare_runs(folders: list, seed: int = 0) -> str:
    """A Markdown table of two evaluations: differences of the headline figures in points, B - A,
    with 95 % intervals by paired bootstrap over the questions that both answered. A and B are of
    those alone. Below 20 questions the bootstrap's p is too small, and left out."""
    a, b = (read_results(folder) for folder in folders)
    settings = [read_json(os.path.join(folder, "settings.json")) for folder in folders]
    rows, notes = [], []
    for key in ("sampling", "seed"):
        first, second = (json.dumps(s.get(key)) for s in settings)
        if first != second:
            notes.append(f"{key} differs: {first} and {second}")
    for name in a:
        if name not in b:
            continue
        both = [q for q in a[name]["scores"] if q in b[name]["scores"]
                and a[name]["asked"][q] == b[name]["asked"][q]]
        if len(both) < 2:
            notes.append(f"{name} is left out: {len(both)} questions were asked in both")
            continue
        scores = [{q: results[name]["scores"][q] for q in both} for results in (a, b)]
        difference, low, high, p = paired_bootstrap(*scores, seed)
        means = [clustered(list(s.values()))[0] for s in scores]
        rows.append(f"| {name} | {len(both)} | {100 * means[0]:.1f} | {100 * means[1]:.1f} | "
                    f"{100 * difference:+.1f} | {100 * low:+.1f} to {100 * high:+.1f} | "
                    + (f"{p:.3f} |" if len(both) >= 20 else "- |"))
        single = [results[name]["questions"] - len(both) for results in (a, b)]
        if any(single):
            notes.append(f"{name}: {single[0]} questions of A and {single[1]} of B have no partner")
    if not rows:
        raise UserError(f"nothing to compare: {folders[0]} has {', '.join(a)}, {folders[1]} "
                        + ", ".join(b) + data.listed(notes))
    head = ["| task | questions | A | B | B - A | 95 % | p |", "|---|---|---|---|---|---|---|"]
    return "\n".join(head + rows + [f"\n{note}" for note in notes])


# --- retention ------------------------------------------------------------------------------------

ROWS_AT_ONCE = 256  # of logits, twice, in fp32: 0.3 GB at Qwen3's vocabulary


def read_sequences(path: str, chat: data.Chat, max_length: int) -> tuple[list, str]:
    """(ids, first) of every row: a text ("text"), scored from its second token, or a pair, whose y+ is scored
    after its prompt; and what was cut and dropped, as text. Longer ones are cut: every token's context stays
    whole."""
    cut = 0

    def parse(row, line):
        if "text" in row:
            ids, first = chat.encode(data.check_text(row["text"], "'text'")), 1
        elif row.get("is_correct") is False:
            raise data.Drop("correction is wrong (is_correct: false)")
        else:
            pair = data.parse_pair(row, line)
            prompt = chat.prompt(pair.messages)
            ids, first = [*prompt, *chat.encode(pair.chosen), chat.im_end], len(prompt)
        if len(ids[:max_length]) <= first:
            raise data.Drop("nothing to score")
        nonlocal cut
        cut += len(ids) > max_length
        return ids[:max_length], first

    rows, dropped = data.read_rows(path, parse)
    said = f"{path}: {len(rows)} texts, {cut} of them cut at {max_length} tokens"
    said += "".join(f"; {n} dropped: {reason}" for reason, n in dropped.items())
    if not rows:
        raise UserError(f"{said}: no row has a token to score")
    return rows, said


@torch.no_grad()
def retention(model: qwen.Qwen3, base: qwen.Qwen3, sequences: list, ranks: Ranks) -> dict:
    """How far a model went from its base on given texts, over the full vocabulary.

    sequences  [(ids, first)]: ids[first:] are scored, first >= 1
    returns    {"tokens", "logp", "logp_base", "kl"}: mean log-probability of the given tokens, and mean
               KL(base || model) of the next-token distributions, both in nats a token, as (mean, standard
               error clustered by sequence)
    Each rank takes a share; logits are held for ROWS_AT_ONCE tokens at a time.
    """
    if model.config.vocab_size != base.config.vocab_size:
        raise UserError(f"vocabularies of {model.config.vocab_size} and {base.config.vocab_size} tokens: "
                        "no KL between them")
    # In fp32 whatever the models are: logits rounded to bf16 would add half as much again to a small KL.
    heads = [m.head_weight().float() for m in (model, base)]
    sums = torch.zeros(len(sequences), 3, dtype=torch.float64)
    mine = range(ranks.rank, len(sequences), ranks.world)
    for i in tqdm(mine, disable=not ranks.main, desc="retention", unit="text"):
        ids, first = sequences[i]
        tokens = torch.tensor(ids, device=ranks.device)
        where = torch.arange(len(ids), device=ranks.device), [(0, len(ids), len(ids), len(ids))]
        hidden = [m.norm(m.trunk(tokens, *where))[first - 1:-1].split(ROWS_AT_ONCE) for m in (model, base)]
        for p, q, target in zip(*hidden, tokens[first:].split(ROWS_AT_ONCE)):
            p, q = ((h.float() @ w.T).log_softmax(-1) for h, w in ((p, heads[0]), (q, heads[1])))
            kl = (q.exp() * (q - p)).sum(-1)
            at_target = (x.gather(1, target[:, None])[:, 0] for x in (p, q))
            sums[i] += torch.stack([x.double().sum().cpu() for x in (*at_target, kl)])
    lengths = [len(ids) - first for ids, first in sequences]
    means = (ranks.reduce(sums) / torch.tensor(lengths)[:, None]).T.tolist()
    figures = {name: clustered([[x] for x in some], lengths) for name, some in
               zip(("logp", "logp_base", "kl"), means)}
    return {"tokens": sum(lengths), **figures}


# --- the report -----------------------------------------------------------------------------------

FIGURES = {"loss": "loss", "reward_chosen": "r⁺", "reward_rejected": "r⁻", "margin": "margin",
           "accuracy": "accuracy", "tether_chosen": "λ⁺", "tether_rejected": "λ⁻"}
PARTS = ("trunk", "rejected", "chosen")  # of a fork, in the order of its scored rows
CHARTS = [  # title, what is drawn (the second one dashed), what the y axis covers at least, shaded bands
    ("Rewards: r⁺ solid, r⁻ dashed", ("reward_chosen", "reward_rejected"), (0, 0), ()),
    ("The tether: λ⁺ solid, λ⁻ dashed", ("tether_chosen", "tether_rejected"), (0, 0.5),
     [(0.25, 0.5, "acquisition: λ near ½", 464, "end"), (0, 0.1, "saturation: λ → 0", 66, "start")]),
    ("Margin r⁺ − r⁻", ("margin",), (0, 0), ()),
    ("Accuracy: pairs with r⁺ > r⁻", ("accuracy",), (0, 1), ()),
    ("Loss (sft, dft: a token; else a pair)", ("loss",), (0, 0), ())]
NO_TETHER = {  # losses whose coefficient is another; metrics.jsonl has λ for all
    "sft": "what it would be: this loss has none", "dft": "what it would be: this loss has none",
    "reward-sft": "λ⁻ is what it would be: this loss has none",
    "dpo": "what it would be: its own coefficient is another, 1 − σ(r⁺ − r⁻) for both"}
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Surgical Post-Training</title><style>%s</style></head><body>
%s
</body></html>
"""
DRAWN_POINTS = 400  # of a line; a longer run is drawn as means of equal stretches
SHOWN_TOKENS = {"trunk": 150, "rejected": 600, "chosen": 600}  # around the fork
# --s of a token is its coefficient as a share of the largest: blue below 0, orange above.
CSS = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1d20; --soft: #565b62; --line: #d8dbe0;
  --band: #0072b21c; --up: 0 114 178; --down: 224 106 0; --c0: #0072b2; --c1: #c95500; --c2: #00805c;
  --c3: #b0437f; --c4: #806600; --c5: #5b55c0 }
@media (prefers-color-scheme: dark) { :root { --page: #15171a; --ink: #e9eaec; --soft: #a9aeb6;
  --line: #383d44; --band: #56b4e926; --up: 40 140 225; --down: 225 105 10; --c0: #56b4e9; --c1: #f08a3c;
  --c2: #2fc79a; --c3: #e58abb; --c4: #d8bb3c; --c5: #a5a0f5 } }
body { margin: 0 auto; padding: 1rem; max-width: 80rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem } h3 { font-size: 1rem }
figure { margin: 1rem 0 0 }
figcaption { font-weight: 600 } .soft, svg text { color: var(--soft); fill: var(--soft) }
.grid { display: grid; gap: 0 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 23rem), 1fr)) }
svg { display: block; width: 100%; font-size: 17px } svg line { stroke: var(--line) }
svg .mark { stroke-width: 2; stroke-dasharray: 2 4 } rect { fill: var(--band) }
polyline { fill: none; stroke-width: 2.5; stroke-linejoin: round; stroke-linecap: round }
.wide { overflow-x: auto } table { border-collapse: collapse }
th, td { padding: .2rem .7rem .2rem 0; border-bottom: 1px solid var(--line); text-align: left;
  white-space: nowrap } input { position: absolute; opacity: 0 } .look { display: none }
label { display: inline-block; margin: 0 .3rem .3rem 0; padding: .2rem .7rem; cursor: pointer;
  border: 1px solid var(--line); border-radius: .4rem }
input:checked + label { background: var(--ink); color: var(--page) }
input:focus-visible + label { outline: 3px solid var(--c0) }
.tokens { margin: 0 0 .6rem; padding-left: .7rem; border-left: 3px solid var(--line); white-space: pre-wrap;
  font: .95rem/1.9 ui-monospace, monospace }
.tokens * { unicode-bidi: isolate; font-style: normal; text-decoration: none; border-radius: .2rem;
  background: linear-gradient(rgb(var(--up) / calc(.6 * max(0, -1 * var(--s, 0)))) 0 0),
    linear-gradient(rgb(var(--down) / calc(.6 * max(0, var(--s, 0)))) 0 0) }
.tokens del { text-decoration: line-through 2px }
.tokens ins { font-weight: 700; text-decoration: underline 2px }
.tokens :focus { outline: 2px solid var(--ink) } body:has(.tokens :focus) { padding-bottom: 20rem }
.tokens :focus::after { content: attr(title); position: fixed; inset: auto 0 0; padding: .5rem 1rem;
  border-top: 2px solid var(--line); background: var(--page); font: .9rem/1.4 system-ui, sans-serif }
"""


@dataclass
class Told:
    """What a run folder says of its run."""

    name: str
    options: dict  # of config.json; may be empty
    metrics: list  # the rows of metrics.jsonl: {"step", and FIGURES; None where there is no number}
    held_out: list  # those of eval.jsonl
    pair: dict | None  # the first row of surgery.jsonl, and the others
    looks: list


def figures_of(row: dict, keys) -> dict:
    """Step and figures of a row; None, a gap, for null, NaN, infinity and what no chart can hold. Raises
    UserError naming the field."""
    for key in ("step", *keys):
        if type(row.get(key)) not in (int, float, type(None)):
            raise UserError(f"{key!r}: a number or null expected, found {row[key]!r:.60}")
    if type(row.get("step")) is not int or not 0 <= row["step"] < 2**40:
        raise UserError(f"'step': a count of optimizer steps expected, found {row.get('step')!r:.60}")
    return {k: row[k] if row.get(k) is not None and abs(row[k]) < 1e30 else None for k in ("step", *keys)}


def log_rows(path: str, parse) -> list:
    """The rows of a run's log, if there is one, through parse(row, the rows before it). Raises UserError
    naming the line for a bad one."""
    rows = []
    for number, row in enumerate(data.read_log(path), 1):
        try:
            rows.append(parse(row, rows))
        except UserError as e:
            raise UserError(f"{path}: line {number}: {e}") from None
    return rows


def read_surgery(path: str) -> tuple[dict, list]:
    """(the watched pair, its looks) as train.py's `look` wrote them; raises UserError naming line and field.

    The pair: lists of token strings "prompt", "trunk", "rejected", "chosen"; "rejected_ids", "chosen_ids";
    "reference", two log-probs; "change_ratios" of all pairs, counts in 20 bins; "gamma". A look: "step",
    the two rewards, and "coefficients" and "logps", one a token after the prompt."""
    def check(row, key, kind, length=None):
        value = row.get(key)
        if not isinstance(value, list) or length not in (len(value), None) or not all(
                type(x) is kind and (kind is not int or 0 <= x < 2**40) for x in value):
            raise UserError(f"{key!r}: a list of {'' if length is None else f'{length} '}"
                            f"{kind.__name__} expected, found {value!r:.60}")
        return value

    def parse(row, rows):
        if rows:
            tokens = sum(len(rows[0][part]) for part in PARTS)
            return {**figures_of(row, ("reward_chosen", "reward_rejected")),
                    **{key: check(row, key, float, tokens) for key in ("coefficients", "logps")}}
        lengths = {key: len(check(row, key, str)) for key in ("prompt", *PARTS)}
        for key, kind, length in (("rejected_ids", int, lengths["rejected"]), ("reference", float, 2),
                                  ("chosen_ids", int, lengths["chosen"]), ("change_ratios", int, 20)):
            check(row, key, kind, length)
        return {**row, **figures_of({**row, "step": 0}, ["gamma"])}

    rows = log_rows(path, parse)
    if not rows:
        raise UserError(f"{path}: not one whole line")
    return rows[0], rows[1:]


def read_run(folder: str, name: str) -> Told:
    """A run folder, of which metrics.jsonl must be there and the rest may be missing."""
    metrics, held_out, surgery, config = (os.path.join(folder, file) for file in (
        "metrics.jsonl", "eval.jsonl", "surgery.jsonl", "config.json"))
    options = read_json(config).get("options") if os.path.exists(config) else None
    figures = (log_rows(path, lambda row, _: figures_of(row, FIGURES)) for path in (metrics, held_out))
    watched = read_surgery(surgery) if os.path.exists(surgery) else (None, [])
    return Told(name, options if isinstance(options, dict) else {}, *figures, *watched)


def shown(text: str) -> str:
    """Text of a file as HTML: markup escaped; controls, marks that turn the direction, and lone surrogates
    spelled out; newlines visible."""
    visible = (c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
    return html.escape("".join(visible)).replace("\n", "↵\n")


def number(x, digits=3) -> str:
    """So many digits; 0 without a sign."""
    return "–" if x is None or x != x else f"{x + 0.0:.{digits}g}".replace("-", "−")


def ticks(low: float, high: float) -> list:
    """Some five round numbers around low to high."""
    step = max(high - low, 1e-6 * abs(high), 1e-9) / 4
    unit = 10.0 ** math.floor(math.log10(step))
    step = next(k * unit for k in (1, 2, 5, 10) if k * unit >= 0.999 * step)
    first = math.floor(low / step + 1e-6)
    return [k * step for k in range(first, max(math.ceil(high / step - 1e-6), first + 1) + 1)]


def line_chart(title: str, lines: list, span=(0, 0), bands=(), axis="step", marks=(), note="") -> str:
    """A figure of lines [(label, colour 0 to 5, dashed, [(x, y or None: a gap), ...]), ...]. span: what the y
    axis covers at least; bands [(low, high, text, its x, anchor), ...] are shaded; marks [(x, colour), ...]:
    dotted vertical lines; note: HTML below.
    The plot fills (60, 12) to (470, 250) of a view of 480 x 295."""
    points = [point for *_, line in lines for point in line if point[1] is not None]
    if not points:
        return ""
    xs, ys = zip(*points)
    left, right, rows = min(xs), max(max(xs), min(xs) + 1), ticks(min(*ys, *span), max(*ys, *span))

    def across(x):
        return round(60 + 410 * (x - left) / (right - left), 1)

    def up(y):
        return round(250 - 238 * (y - rows[0]) / (rows[-1] - rows[0]), 1)

    parts = [f'<rect x="60" y="{up(high)}" width="410" height="{up(low) - up(high):.1f}"/>'
             + f'<text x="{x}" y="{up(high) + 18:.1f}" text-anchor="{anchor}">{text}</text>'
             * (up(low) - up(high) > 22)  # else the text would run into what is below
             for low, high, text, x, anchor in bands]
    parts += [f'<line x1="60" x2="470" y1="{up(y)}" y2="{up(y)}"/>'
              f'<text x="54" y="{up(y) + 6:.1f}" text-anchor="end">{number(y, 6)}</text>' for y in rows]
    parts += [f'<text x="{across(x)}" y="270" text-anchor="middle">{number(x, 6)}</text>'
              for x in ticks(left, right) if left <= x <= right]
    parts += [f'<text x="265" y="290" text-anchor="middle">{axis}</text>']
    parts += [f'<line class="mark" x1="{across(x)}" x2="{across(x)}" y1="12" y2="250" '
              f'style="stroke:var(--{colour})"/>' for x, colour in marks
              if x is not None and left <= x <= right]
    for label, colour, dashed, line in lines:
        for drawn, some in itertools.groupby(line, lambda point: point[1] is not None):
            if drawn:
                some = list(some)
                some *= 1 + (len(some) == 1)  # a point alone would not be drawn
                place = " ".join(f"{across(x)},{up(y)}" for x, y in some)
                dash = ";stroke-dasharray:7 6" * dashed
                parts.append(f'<polyline points="{place}" style="stroke:var(--c{colour}){dash}"><title>'
                             f'{label}: {number(some[0][1])} → {number(some[-1][1])}</title></polyline>')
    return (f'<figure><figcaption>{title}</figcaption><svg viewBox="0 0 480 295" role="img" '
            f'aria-label="{title}">{"".join(parts)}</svg><div class="soft">{note}</div></figure>')


def charts(runs: list) -> str:
    """All figures, one line a run and quantity, and the histogram of change ratios."""
    def line(rows, key):
        size = max(1, -(-len(rows) // DRAWN_POINTS))
        stretches = [rows[i:i + size] for i in range(0, len(rows), size)]
        values = [[row[key] for row in some if row[key] is not None] for some in stretches]
        return [(some[0]["step"], sum(v) / len(v) if v else None) for some, v in zip(stretches, values)]

    losses = dict.fromkeys(str(run.options.get("loss")) for run in runs)
    note = ". ".join(f"{loss}: {NO_TETHER[loss]}" for loss in losses if loss in NO_TETHER)
    drawn = [line_chart(title, [(f"{shown(run.name)} {FIGURES[key]}", i % 6, dashed, line(run.metrics, key))
                                for i, run in enumerate(runs) for dashed, key in enumerate(keys)], *how,
                        note=note if "tether_chosen" in keys else "") for title, keys, *how in CHARTS]
    bins, marks = [], {}
    for i, run in enumerate(runs):
        if run.pair and any(run.pair["change_ratios"]):
            corners = [(x / 20, n) for b, n in enumerate(run.pair["change_ratios"]) for x in (b, b + 1)]
            bins.append((shown(run.name), i % 6, 0, corners))
            marks[run.pair["gamma"]] = "ink" if run.pair["gamma"] in marks else f"c{i % 6}"
    drawn.append(line_chart("Pairs trained on, γ dotted", bins, axis="change ratio 1 − LCS / |y⁺|",
                            marks=marks.items()))
    return f'<div class="grid">{"".join(drawn)}</div>'


def html_table(head: list, rows: list) -> str:
    """Of cells that are HTML; the first of a row is its title."""
    lines = ["".join(f"<th>{cell}</th>" for cell in head)]
    lines += [f"<th>{title}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) for title, *cells in rows]
    return f'<div class="wide"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def before_after(runs: list) -> str:
    """First and last step of every run, and of its held-out pairs the first and last look."""
    def cell(rows, key):
        ends = (number(row[key], 12 if key == "step" else 3) for row in rows[::max(1, len(rows) - 1)])
        return " → ".join(ends) or "–"

    table = []
    for title, logs in (("step", [run.metrics for run in runs]),
                        ("held out, after", [run.held_out for run in runs])):
        if any(logs):
            table += [[name, *(cell(rows, key) for rows in logs)] for key, name in
                      {"step": title, **FIGURES}.items()]
    return html_table(["", *(shown(run.name) for run in runs)], table)


def benchmarks(evaluations: dict) -> str:
    """{name: results.json} as a table, in %; behind the first, the base, with the difference to it."""
    (_, base), rows = next(iter(evaluations.items())), []
    for task in dict.fromkeys(task for results in evaluations.values() for task in results):
        rows.append([shown(task)])
        for results in evaluations.values():
            first, own = ([*r[task]["metrics"].values()][0] if task in r else None for r in (base, results))
            change = f" ({100 * (own[0] - first[0]):+.1f})" if own and first and results is not base else ""
            rows[-1].append(figure(*own) + change if own else "–")
    return html_table(["right, in %", *map(shown, evaluations)], rows)


def surgery(run: Told, which: int) -> str:
    """The watched pair with a radio button for each look; CSS alone shows the one that is chosen."""
    pair, looks = run.pair, run.looks
    finite = [abs(c) for look in looks for c in look["coefficients"] if math.isfinite(c)]
    largest = max(finite, default=0) or 1
    matches = data.lcs_matches(pair["rejected_ids"], pair["chosen_ids"])
    common = {"rejected": {i for i, _ in matches}, "chosen": {j for _, j in matches}}
    ends = itertools.accumulate(len(pair[part]) for part in PARTS)
    where = {part: slice(end - len(pair[part]), end) for part, end in zip(PARTS, ends)}

    def token(part, i, text):
        k = where[part].start + i
        tag = "i" if part == "trunk" or i in common[part] else {"rejected": "del", "chosen": "ins"}[part]
        style = ";".join(f"--s{n}:{look['coefficients'][k] / largest:.3g}" for n, look in enumerate(looks))
        told = "\n".join(f"{look['step']}: {number(look['coefficients'][k])}, {number(look['logps'][k])}"
                         for look in looks)
        return (f'<{tag} style="{style}" title="step: coefficient, log p\n{told}" tabindex="-1">'
                f'{shown(text)}</{tag}>')

    def tokens(part):
        some, most = list(enumerate(pair[part])), SHOWN_TOKENS[part]
        note = f'<span class="soft">… {len(some) - most} tokens not shown …</span>' * (len(some) > most)
        text = "".join(token(part, *each) for each in (some[-most:] if part == "trunk" else some[:most]))
        return note + text if part == "trunk" else text + note

    buttons, notes = "", ""
    for n, look in enumerate(looks):
        means = [number(np.mean(look["coefficients"][where[part]] or [0])) for part in PARTS]
        buttons += (f'<input type="radio" name="run{which}" id="run{which}-{n}"{" checked" * (n == 0)}>'
                    f'<label for="run{which}-{n}">{look["step"]}</label>')
        notes += (f'<p class="look">After {look["step"]} steps: r⁺ {number(look["reward_chosen"])}, r⁻ '
                  f'{number(look["reward_rejected"])}; mean coefficient: trunk {means[0]}, y⁻ {means[1]}, '
                  f'y⁺ {means[2]}</p>')
    prompt = shown("".join(pair["prompt"][-SHOWN_TOKENS["trunk"]:]))
    return (f'<div><h3>{shown(run.name)}</h3>{buttons}{notes}'
            f'<div class="soft">Full colour: a coefficient of {number(largest)} or {number(-largest)}</div>'
            f'<div>Trunk: the prompt <span class="soft">(no coefficient)</span>, and what both answers begin '
            f'with</div><div class="tokens"><span class="soft">{prompt}</span>{tokens("trunk")}</div>'
            f'<div>y⁻ goes on</div><div class="tokens">{tokens("rejected")}</div>'
            f'<div>y⁺ goes on</div><div class="tokens">{tokens("chosen")}</div></div>')


def report(folders: list, out: str, note: str = ""):
    """Write `out`, one HTML file without scripts and links, of run folders and of finished evaluations (the
    first of these is the base). Raises UserError for a folder that is neither, or broken, or given twice."""
    paths = [os.path.realpath(folder) for folder in folders]
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    runs, evaluations = [], {}
    for folder, path in zip(folders, paths):
        name = os.path.relpath(path, common)
        if paths.count(path) > 1:
            raise UserError(f"{folder} is given twice")
        if os.path.exists(os.path.join(folder, "metrics.jsonl")):
            runs.append(read_run(folder, name))
        elif os.path.exists(os.path.join(folder, "results.json")):
            evaluations[name] = read_results(folder)
        else:
            raise UserError(f"{folder}: no run (metrics.jsonl) and no evaluation (results.json)")
    body = ["<h1>Surgical Post-Training</h1>"]
    for i, run in enumerate(runs):
        chosen = ", ".join(f"{k} {run.options[k]}" for k in ("loss", "lr", "beta") if k in run.options)
        body.append(f'<div><b style="color:var(--c{i % 6})">▬</b> {shown(run.name)} '
                    f'<span class="soft">{shown(chosen)}</span></div>')
    if runs:
        body += [charts(runs), "<h2>Before and after</h2>", before_after(runs)]
    if note:
        body.append(f'<div class="wide"><pre>{html.escape(note)}</pre></div>')
    if evaluations:
        body += ["<h2>Benchmarks</h2>", benchmarks(evaluations)]
    watched = [surgery(run, i) for i, run in enumerate(runs) if run.looks]
    if watched:
        body.append("<h2>Surgery on one pair</h2><p>Every token after the prompt is coloured by its "
                    "coefficient ∂L/∂log p after the chosen number of steps: <b>blue where the update "
                    "raises its probability, orange where it lowers it</b>, stronger where the coefficient "
                    "is larger. Every run has a scale of its own: full colour is its largest coefficient "
                    "after any of these steps. <del>Struck</del>: not in y⁺; <ins>underlined</ins>: not in "
                    "y⁻ (longest common subsequence). Point at a token, or tap it, for its figures.</p>"
                    f'<div class="grid">{"".join(watched)}</div>')
    most = max((len(run.looks) for run in runs), default=0)
    choice = "".join(f"input:nth-of-type({n}):checked ~ .look:nth-of-type({n}) {{ display: block }}\n"
                     f"input:nth-of-type({n}):checked ~ .tokens * {{ --s: var(--s{n - 1}) }}\n"
                     for n in range(1, most + 1))
    write_text(out, [PAGE % (CSS + choice, "\n".join(body))])


# --- command line: tasks, comparison, retention, report -------------------------------------------


@dataclass
class EvalOptions(Asking):
    """Options of an evaluation."""

    tasks: str = option("", f"comma-separated: {', '.join(TASKS)}, or NAME=FILE.jsonl (required)")
    data: str = option("data/eval", "folder of NAME.jsonl files; connect4 needs none")
    samples: int = option(0, "answers per question; 0: the paper's (16 for aime24, aime25, amc23, 1 for "
                          "connect4, else 5)")
    limit: int = option(0, "only the first that many questions of each task; 0: all")


@dataclass
class RetentionOptions:
    """Options of `python eval.py retention`."""

    model: str = option("", "checkpoint folder or hub id (required)")
    base: str = option("", "the model before training (required)")
    texts: str = option("", "JSONL of {\"text\": ...}, or a pair file, whose y+ is scored (required)")
    max_length: int = option(4096, "tokens of a text; the rest is cut off")
    dtype: str = option("bfloat16", "of both models", ("float32", "bfloat16"))
    timeout: int = option(86400, "seconds after which a stalled rank ends the run")


@dataclass
class CompareOptions:
    """Options of `python eval.py compare`."""

    a: str = option("", "--out of one evaluation (required)")
    b: str = option("", "--out of another (required)")
    timeout: int = option(600, "seconds after which a stalled rank ends the run")


@dataclass
class ReportOptions:
    """Options of `python eval.py report RUN [RUN ...]`."""

    out: str = option("", "file to write [RUN/report.html of one RUN, report.html of several]")
    timeout: int = option(600, "seconds after which a stalled rank ends the run")
    runs: tuple = ()


def run_report(o: ReportOptions, ranks: Ranks):
    """From options to a file."""
    out = o.out or os.path.join(o.runs[0] if len(o.runs) == 1 else "", "report.html")
    if os.path.isdir(out):
        raise UserError(f"--out {out}: the name of a file expected, found a folder")
    with ranks.together():
        if ranks.main:
            report(o.runs, out)
    ranks.say(f"written: {out}")


def run_comparison(o: CompareOptions, ranks: Ranks):
    """From options to a printed table."""
    with ranks.together():
        if ranks.main:
            print(compare_runs([o.a, o.b]))


def run_evaluation(o: EvalOptions, ranks: Ranks):
    """From options to results."""
    with ranks.together():
        tasks = [load_task(spec.strip(), o.data) for spec in o.tasks.split(",") if spec.strip()]
        twice = [name for name, n in Counter(t.name for t in tasks).items() if n > 1]
        if not tasks or twice:
            raise UserError(f"--tasks is {o.tasks!r}: one task or more expected, each once")
        for task in tasks:
            del task.rows[o.limit or len(task.rows):]
        policy = open_policy(o, ranks.device)
        sampling = Sampling(o.temperature, o.top_p, o.top_k, o.max_tokens)
    with ranks.together():
        if ranks.main:
            claim_folder(o.out, {"command": "eval", "seed": o.seed, "asked": identity(policy, o),
                                 "sampling": asdict(sampling)})
    evaluate(policy, tasks, o.out, sampling, ranks, o.samples, o.seed)


def run_retention(o: RetentionOptions, ranks: Ranks):
    """From options to one printed line of JSON."""
    with ranks.together():
        models = [open_own(name, getattr(torch, o.dtype), ranks.device) for name in (o.model, o.base)]
        own, other = (m.chat.tokenizer.get_vocab(with_added_tokens=True) for m in models)
        if own != other:
            raise UserError(f"{o.model} and {o.base} have different tokenizers: no KL between them")
        sequences, said = read_sequences(o.texts, models[1].chat, o.max_length)
        ranks.say(said)
        found = retention(models[0].model, models[1].model, sequences, ranks)
    if ranks.main:
        print(json.dumps(found))


def parse_command(argv):
    """(what to run, its options); raises UserError listing every problem at once."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    run, record, required = run_evaluation, EvalOptions, ("tasks",)
    if argv[:1] == ["compare"]:
        run, record, required, argv = run_comparison, CompareOptions, ("a", "b"), argv[1:]
    elif argv[:1] == ["retention"]:
        run, record, required, argv = run_retention, RetentionOptions, ("model", "base", "texts"), argv[1:]
    elif argv[:1] == ["report"]:
        run, record, required, argv = run_report, ReportOptions, (), argv[1:]
        parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run or of an evaluation")
    add_options(parser, record)
    o = record(**vars(parser.parse_args(argv)))
    problems = [f"--{k} is required" for k in required if not getattr(o, k)]
    problems += check_asking(o, ("model", "server")) if run is run_evaluation else []
    for name, least in (("samples", 0), ("limit", 0), ("max_length", 2)):
        if getattr(o, name, least) < least:
            problems.append(f"--{name} is {getattr(o, name)}, a number of {least} or more expected")
    if problems:
        raise UserError("\n  ".join(["these options do not work:"] + problems))
    return run, o


def main() -> int:
    """Command line to exit code: 0 done, 1 failed, 2 options that do not work."""
    (run, o), ranks = begin(lambda: parse_command(sys.argv[1:]), lambda found: open_ranks(found[1].timeout))
    return finish(lambda: run(o, ranks))


if __name__ == "__main__":
    qwen.leave(main)

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
import inspect
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
from dataclasses import asdict, dataclass, field
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

# `tokenize` turns spellings into canonical tokens by two tables. `read` takes lists, tuples and
# relations apart. The expressions that remain are computed at POINTS and compared: exact fractions
# where possible, else floats within 1e-11 of the larger one. A float that has lost its digits
# (sin pi, 1 - cos 10^-9) equals nothing but the same text.
#
# This differs from math-verify on purpose. A decimal equals an exact value only as its rounding to
# six or more digits (0.333 is not 1/3), and another decimal only exactly. 10_2 is 2. Factorials,
# 1e-5 and -1./3 are read. A unit that one side lacks is forgiven, two different units are not. p %
# equals p and p / 100. A list is a set, a union is a list. Of several boxes the last one counts.
# Not seen: even roots of negative numbers, intervals that touch, degrees in sin 30°.

BOX = re.compile(r"\\f?box(?:ed)?\s*(\{|-?\d+(?:[.,/]\d+)*)")  # in prose, \boxed boxes no letter
STATED = re.compile(
    r"(?:^[#*_ ]*(?:final )?answers?[*_ ]*$|####"  # a heading
    r"|\banswers?\b[^.\n:$\\\d]{0,40}?(?:\b(?:is|are|be)\b|:|=))(?:[\s:,*`_]*"
    r"\b(?:thus|hence|therefore|then|simply|just|exactly|equal to|equals|given by)\b)*[\s:,*`_]*",
    re.I | re.M)
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.S)


def extract_answer(text: str) -> str | None:
    """What the last box of a response holds, else what its last "answer is", "Answer:" or "####"
    states. None if there is neither, or if the text ends inside <think> or its last box."""
    text = after_thinking(text)
    answer = last_boxed(text)
    stated = list(STATED.finditer(text))
    if answer is None and stated:
        rest = text[stated[-1].end():]
        formula = FORMULA.match(rest)
        if formula:
            answer = formula[formula.lastindex]
        else:
            line = rest.split("\n")[0].split("<|")[0]
            answer = re.split(r"[.;]\s|,?\s(?:because|since)\b", line)[0].strip(".*`_ ")
    return (answer or "").strip() or None


def after_thinking(text):
    """What a response says after its thinking; nothing if it was cut off before that."""
    _, mark, answer = text.rpartition("</think>")
    if "<think>" in answer:
        return ""
    return answer.lstrip() if mark else answer


def last_boxed(text):
    """Contents of the last \\boxed{} or \\fbox{}; "" if it never closes, None if there is none."""
    boxes = list(BOX.finditer(text))
    if not boxes:
        return None
    if boxes[-1][1] != "{":
        return boxes[-1][1]
    inside, depth = text[boxes[-1].end():], 1
    for brace in re.finditer(r"\\.|[{}]", inside, re.S):  # \{ is no brace
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return inside[:brace.start()]
    return ""


# --- grading: text to tokens ----------------------------------------------------------------------

MAX_CHARS, MAX_COMMAS, MAX_BITS = 400, 60, 3000  # beyond these only the same text is equal
TEXT = r"\\(?:text|mbox|mathrm|operatorname)\w*\s*"
MATRIX = r"\s*\{(?:[pbB]?matrix|array)\}"
MULTIPLES = {"dozen": "12", "hundred": "100", "thousand": "1000", "million": "10^6",
             "billion": "10^9"}
SUPERSCRIPTS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
UNIT_TEXT = (r"(?:[A-Za-z\s~/().'·*%°-]|\\(?:[,;:! ]|(?:cdot|times|mu|Omega|AA)(?![A-Za-z]))"
             r"|\^\s*(?:-?\d|\{\s*-?\d+\s*\}))")
WORD = re.compile(r"(?<![\\A-Za-z])([A-Za-z]+(?:['.-]+[A-Za-z]+)*)|\\(mu|Omega|AA)(?![A-Za-z])")
REWRITES = [(re.compile(pattern, re.S), new) for pattern, new in [
    # numbers: 0.1\overline{6}, the ratio 3:4
    (r"(?<![\w.])(\d{1,9}\.(\d{0,9}))\\(?:overline|bar|dot)\s*\{?(\d{1,9})\}?",
     lambda m: f"({m[1]}+{m[3]}/{10 ** len(m[3]) - 1}/{10 ** len(m[2])})"),
    (r"\A([\s$]*\d+)\s*:\s*(\d+[\s$]*)\Z", r"\1/\2"),
    # units and other words: \mathrm{m/s^{2}} is "m"/"s"^{2}
    (r"[⁻⁰¹²³⁴-⁹]+", lambda m: "^{" + m[0].translate(SUPERSCRIPTS) + "}"),
    (r"[µμ]", r"\\mu "),
    (r"\b(?:square|sq)\s+([a-z]+)", r"\1^2"),
    (r"\bcubic\s+([a-z]+)", r"\1^3"),
    (TEXT + r"\{(" + UNIT_TEXT + r"+)\}", lambda m: WORD.sub(r' "\1\2" ', m[1].strip(" ."))),
    (TEXT + r"\{((?:[^{}]|\{[^{}]*\})*)\}", r" \1 "),
    (r'\\mu\s*(?=")', ' "mu" '),
    # thousands: 10{,}000   11,\! 111   1\,000
    (r"(?<=\d)(?:\{,\}|,\\!|\\[,! ])\s*(?=\d{3}(?!\d))", ""),
    # layout
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits|math(?:bf|it|cal)|boldsymbol|q?quad"
     r"|f?box(?:ed)?)(?![A-Za-z])|(?<!\\)\\[,;:! ()\[\]$]|[$£€~]|\{\s*\}", " "),
    # words outside \text{}: a lone one is no product of letters
    (r"\\mathbb\s*\{?\s*R\s*\}?|\ball real numbers\b", r"(-\\infty,\\infty)"),
    (r"\A\s*([A-Za-z' ]*[A-Za-z]{3}[A-Za-z' ]*|[Nn]o)[.\s]*\Z", r' "\1" '),
    (r'"?\b(?:and|or)\b"?|\\cup\b', ","),
    (r'(?<=\d)\s*"?\b(' + "|".join(MULTIPLES) + r')\b"?', lambda m: "*" + MULTIPLES[m[1]]),
    (r"(?<=[\d}])\s*([kcm]?m|ft|mi)\s*/\s*(s|h|hr|min)\b", r' "\1"/"\2"'),
    # a matrix is ⟦(1,2),(3,4)⟧
    (r"\\begin" + MATRIX + r"(?:\s*\{[^{}]*\})?", "⟦("),
    (r"(?:\\\\\s*)?\\end" + MATRIX, ")⟧"),
    (r"\\\\", "),("),
    # functions that are written as brackets
    (r"(?:\||\\[lr]?vert\b)(.*?)(?:\||\\[lr]?vert\b)", r" abs(\1)"),
    (r"\\l(floor|ceil)\b(.*?)\\r\1\b", r" \1(\2)"),
    (r"\{([^{}]*)\\choose([^{}]*)\}", r"\\binom{\1}{\2}"),
    # subscripts and superscripts: a subscript belongs to its name, but for a logarithm's base
    (r"\s*([_^])\s*", r"\1"),
    (r"(log|ln)_(\{[^{}]*\}|\w)", r"\1 _{\2}"),
    (r"\^(?:\{\s*\\circ\s*\}|\\circ)", "°"),
    (r"\\prime\s*", "'"),
    (r"\^\{?('+)\}?", r"\1"),
    (r"\^(\{[^{}]*\}|\w)_(\{[^{}]*\}|\w)", r"_\2^\1"),  # v^2_0
    (r"(?<![A-Za-z\\_^])([A-Za-z])\((\d+)\)", r"\1_{\2}"),  # I(0) is no product
    (r"\((\d+)\)_", r"\1_"),
    # mixed numbers: 1\frac45   1 4/5
    (r"(?<![\w.^}])(\d+)\s*\\[dtc]?frac\s*(\{\d+\}|\d)\s*(\{\d+\}|\d)", r"(\1+\2/\3)"),
    (r"(?<![\w.^])(\d+) +(\d+)/(\d+)(?![\d.])", r"(\1+\2/\3)"),
    # \frac12; pi/2 ≈ 1.57, where the exact side counts; np.arcsin
    (r"(frac|binom)\s*(\d)", r"\1{\2}"),
    (r"((?<=[\d}])|(?<=pi))\s*(?:\\approx|\\simeq|≈)[^=]*\Z", ""),
    (r"\b(?:np|math)\.(?=[a-z])", "")]]
# What one token may be written as. Tokens are signs, numbers, names (letters first), words ('"cm').
SPELLINGS = {
    "-": "− –", "*": r"\cdot \times × ·", "/": r"\div ÷ per", "^": "**", "±": r"\pm", "∓": r"\mp",
    ",": r"& ∪", "<": r"\lt", ">": r"\gt", "≤": r"\le \leq \leqslant <=", "≠": r"\ne \neq",
    "≥": r"\ge \geq \geqslant >=", "=": r"\in ∈ \approx \simeq ≈", "(": r"\langle", ")": r"\rangle",
    r"\{": r"\lbrace", r"\}": r"\rbrace", "frac": r"\dfrac \tfrac \cfrac",
    "binom": r"\dbinom \tbinom", "sqrt": "√", "pi": "π", "theta": "θ", "phi": r"\varphi",
    "infty": "∞ infinity inf", '"emptyset': r"\emptyset \varnothing ∅", "asin": r"arcsin \arcsin",
    "acos": r"arccos \arccos", "atan": r"arctan \arctan", "log": r"ln \ln", "": "the",
    '"%': r"% \% percent percentage", '"°': r"° \degree degree degrees", '"m': "meter meters",
    '"cm': "centimeter centimeters", '"km': "kilometer kilometers", '"in': "inch inches",
    '"ft': "foot feet", '"mi': "mile miles", '"h': "hour hours hr", '"min': "minute minutes",
    '"s': "second seconds sec", '"g': "gram grams", '"kg': "kilogram kilograms",
    '"lb': "pound pounds", '"yr': "year years", '"mol': "mole moles", '"J': "joule joules",
    '"N': "newton newtons", '"L': "liter liters", '"W': "watt watts", '"AA': r"\AA Å"}
SAME = {old: new for new, olds in SPELLINGS.items() for old in olds.split()}
TOKEN = re.compile(r"""
    ( "[^"]*" | (?<![A-Za-z\d\\])[A-Za-z]{4,}
      | (?<![A-Za-z\\]) (?:sin|cos|tan|sec|csc|cot|log|ln|exp|abs|pi|inf
        |cm|mm|km|kg|ft|in|mi|yd|hr|min|mph|lb|oz|sq|per|day|way)(?![A-Za-z]) )        # a word
    | ( (?:\\[A-Za-z]+|[A-Za-z]) (?:_(?:\{[^{}]*\}|\\[A-Za-z]+|\w)|')* )                   # a name
    | \d+_(?:\d+|\{\d+\}) | (?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3}(?!\d))?
    | \\. | \*\* | [<>]= | !! | \S
    """, re.S | re.X)
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
CLOSE = {"(": ")", "[": "]", "{": "}", r"\{": r"\}", "⟦": "⟧"}


def tokenize(text: str) -> list[str]:
    """Canonical tokens of LaTeX or plain text; raises ValueError if they are too many."""
    if len(text) > MAX_CHARS or text.count(",") + text.count(";") > MAX_COMMAS:
        raise ValueError("too long")
    if "\\begin" not in text:  # `\\frac`, a command escaped twice; in a matrix `\\` ends a row
        text = text.replace("\\\\", "\\")
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    if not re.search(r"[(\[]|\\\{", text):  # in brackets a comma separates: (100,200) is a point
        text = THOUSANDS.sub(lambda m: m[0].replace(",", ""), text)
    tokens = []
    for m in TOKEN.finditer(text):
        if m[1]:
            for word in m[1].strip('"').split():
                tokens.append(SAME.get(word.lower(), word if word in KEYWORDS else '"' + word))
        elif m[2]:  # a name is the same with and without braces, a_{n}
            tokens.append(SAME.get(m[2], re.sub(r'[\s{}"\\]', "", m[2])))
        else:
            tokens.append(SAME.get(m[0], m[0]))
    return [t for t in tokens if t]


def depths(tokens):
    """How many brackets are open after each token. Their kind is ignored: intervals mix them."""
    changes = [(t in CLOSE) - (t in CLOSE.values()) for t in tokens]
    return list(itertools.accumulate(changes))


def split(tokens, separators):
    """The non-empty parts between separators outside brackets, and these separators."""
    parts, cuts = [[]], []
    for token, depth in zip(tokens, depths(tokens)):
        if depth == 0 and token in separators:
            cuts.append(token)
            parts.append([])
        else:
            parts[-1].append(token)
    return [p for p in parts if p], cuts


# --- grading: an expression to numbers ------------------------------------------------------------


def power(x, n):
    """x^n over the reals: x^(1/3) of a negative x is negative, x^(1/2) of it is undefined."""
    if isinstance(x, Fraction) and bits(x) * abs(n) > 2 * MAX_BITS:
        x = float(x)
    if isinstance(x + n, complex) or x >= 0 or n % 1 == 0:
        return x ** n
    root = round(1 / n)
    if root % 2 == 0 or abs(1 / n - root) > 1e-9:
        raise ValueError("no real power")
    return -((-x) ** float(n))


def bits(x):
    """The size of a fraction, and so the cost to compute with it."""
    return max(abs(x.numerator), x.denominator).bit_length()


def factorial(n):
    """n!, exact for whole n up to 400, else by the gamma function."""
    if isinstance(n, Fraction) and n.denominator == 1 and 0 <= n <= 400:
        return Fraction(math.factorial(int(n)))
    return math.gamma(n + 1)


CONSTANTS = {"pi": math.pi, "e": math.e, "i": 1j}
ALMOST = Fraction(1, 10**9)  # floor(log_2 8) is 3
OPERATIONS = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "^": power,
    "!": factorial, "frac": operator.truediv, "abs": abs, "exp": lambda x: power(math.e, x),
    "binom": lambda n, k: factorial(n) / factorial(k) / factorial(n - k),
    "sec": lambda x: 1 / operate("cos", x), "csc": lambda x: 1 / operate("sin", x),
    "cot": lambda x: 1 / operate("tan", x), "floor": lambda x: Fraction(math.floor(x + ALMOST)),
    "ceil": lambda x: Fraction(math.ceil(x - ALMOST))}
TRIGONOMETRY = "sin cos tan asin acos atan sinh cosh tanh sec csc cot"
FUNCTIONS = {*TRIGONOMETRY.split(), "log", "abs", "exp", "floor", "ceil"}
KEYWORDS = {*FUNCTIONS, *OPERATIONS, *CONSTANTS, "sqrt", "infty"}
BINDING = {"+": 1, "-": 1, "*": 2, "/": 2, "^": 4, "!": 5}
SIGN, ATOM = 3, 5  # how tightly a sign binds, -x^2 is -(x^2), and what an operand is
STARTS_ATOM = re.compile(r"""[^\W_]|["([{]""").match
# Variables are (low to high) / denominator: small, near 1 (x^2018 fits a float), medium, large
# (floor(x/100) is not 0), negative (|x| is not x), of either sign, integers (for (-1)^n, floor and
# ceil; so many that n and m are even and odd in all combinations).
POINTS = [(1, 996, 997), (900, 996, 997), (998, 1100, 997), (998, 9000, 997),
          (99_000, 990_000, 997), (-9000, -998, 997), (-2500, 2500, 997),
          (2, 13, 1), (3, 40, 1), *[(1, 10, 1)] * 12]


def operate(op, *args):
    """One operation, exact on fractions where it can be. Raises ArithmeticError if no digit is
    certain: a sum or a function that is small beside what it came from has lost them."""
    scale = 0
    if op not in OPERATIONS:
        library = cmath if isinstance(args[0], complex) else math
        value, scale = getattr(library, op)(args[0]), min(1, abs(args[0]))
    else:
        value = OPERATIONS[op](*args)
        if op in "+-":
            scale = max(abs(x) for x in args)
    if isinstance(value, Fraction):
        return value if bits(value) <= MAX_BITS else float(value)
    lost = abs(value) < 1e-4 * scale or value == 0 and all(args)
    if lost or not cmath.isfinite(value) or op in ("sin", "cos", "tan") and abs(args[0]) > 1e5:
        raise ArithmeticError("digits lost")
    return value


def expression(tokens, point, floor=0):
    """A Pratt parser that computes at once: the value of the longest expression whose operators
    bind tighter than `floor`. `tokens` is a stack, the next token on top, " " at the bottom; what
    is read is taken from it."""
    if tokens[-1] in ("+", "-"):
        sign = Fraction(tokens.pop() + "1")
        value = operate("*", sign, expression(tokens, point, SIGN))
    else:
        value = atom(tokens, point)
    while True:
        op = tokens[-1]
        if op not in BINDING and STARTS_ATOM(op):
            op = "*"  # 2x
        if BINDING.get(op, 0) <= floor:
            return value
        if tokens[-1][0].isdigit():
            raise ValueError("a number after an operand: 2 3")
        if op == tokens[-1]:
            tokens.pop()
        if op == "!":
            value = operate(op, value)
        else:
            value = operate(op, value, expression(tokens, point, min(BINDING[op], SIGN)))


def atom(tokens, point):
    """The value of a bracket, a number, a function of its arguments, or a name."""
    token = tokens.pop()
    name = token.lstrip('"')
    if token in CLOSE:
        value = expression(tokens, point)
        if tokens.pop() != CLOSE[token]:
            raise ValueError("a bracket is open")
        return value
    if token[0].isdigit() or token[0] == "." and len(token) > 1:
        digits, _, base = token.partition("_")
        return Fraction(int(digits, int(base.strip("{}"))) if base else digits)
    if token == "sqrt":
        degree = atom(tokens, point) if tokens[-1] == "[" else 2
        return operate("^", expression(tokens, point, ATOM), operate("/", Fraction(1), degree))
    if token in ("frac", "binom"):
        return operate(token, expression(tokens, point, ATOM), expression(tokens, point, ATOM))
    if token in FUNCTIONS:
        return function(token, tokens, point)
    if name in CONSTANTS:
        return CONSTANTS[name]
    if not name[:1].isalpha():
        raise ValueError(f"{token!r} is no operand")
    low, high, denominator = POINTS[point]
    chance = random.Random(f"{name} {point}")  # a name has the same values in every run
    return Fraction(chance.randint(low, high), denominator)


def function(name, tokens, point):
    """sin^2 x, sin^{-1} x, log_2 8. Without brackets the argument is a product: sin 2 t cos t."""
    marks = {}
    while tokens[-1] in ("^", "_"):
        mark = tokens.pop()
        marks[mark] = expression(tokens, point, ATOM)
    if marks.get("^") == -1 and "a" + name in FUNCTIONS:
        name, marks = "a" + name, {}
    if tokens[-1] in CLOSE:
        argument = expression(tokens, point, ATOM)
    else:
        argument = expression(tokens, point, BINDING["*"])
        while STARTS_ATOM(tokens[-1]) and tokens[-1] not in FUNCTIONS and tokens[-1] != "(":
            argument = operate("*", argument, expression(tokens, point, BINDING["*"]))
    value = operate(name, argument)
    if "_" in marks:
        value = operate("/", value, operate("log", marks["_"]))
    if "^" in marks:
        value = operate("^", value, marks["^"])
    return value


def compute(tokens):
    """The values of an expression at all points, None where it has none or is not mathematics."""
    names = [t.lstrip('"') for t in tokens]
    constant = all(name in KEYWORDS or not name[:1].isalpha() for name in names)
    values = []
    for point in range(1 if constant else len(POINTS)):
        stack = [" ", *reversed(tokens)]
        try:
            value = expression(stack, point)
        except (ValueError, ArithmeticError, TypeError):  # TypeError: the factorial of i
            value = None
        values.append(value if stack == [" "] else None)
    return values * len(POINTS) if constant else values


# --- grading: answers, and whether two are the same -----------------------------------------------

# An operand, then words with powers: 9.8 "m / "s ^ 2, but not 5 "cm - 3
FACTOR = r' "\S+(?: \^(?: \{)?(?: -)? \d+\.?(?: \})?)?'
FACTORS = FACTOR + r"(?:(?: \*)?" + FACTOR + ")*"
GROUP = "(?:" + FACTORS + r"| \(" + FACTORS + r" \))"
UNIT = re.compile(r'((?:.*? )??[^" ]*[\w)\]}!])(' + GROUP + "(?: /" + GROUP + ")*"
                  r"| frac \{" + FACTORS + r" \} \{" + FACTORS + r" \})")
RELATIONS = ("=", "≠", "<", "≤", ">", "≥")
CHAINS = ({"="}, {"≠"}, {"<", "≤"}, {">", "≥"})  # relations that may stand in one chain
# x, a_n, f(x), f^{-1}(x), (p,q), frac{dM}{dt}: letters and brackets, no operation on them
NAME = re.compile(r"""(?!(?:pi|e|i|infty)\Z)([^\W\d]\w*+(\^\{-1\}(?=\())?|['"(){},])+""")
PROSE = re.compile(
    r"(?=[^$\\]*?[A-Za-z]{2})[^\d\\$]+(\$.*\$|\\\(.*\\\)|\\\[.*\\\])", re.S)


class Answer(NamedTuple):
    """`kind` is "leaf" (an expression or words), "list" (without order), the brackets of a tuple,
    interval or matrix, or a relation, whose `values` are left minus right. A relation that says
    what a name is (x = 5; x < 5: x is in (-oo, 5)) is "=": the name in `text`, the rest in `items`.
    """

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
    enclosed = inside and tokens[0] in CLOSE and min(depths(tokens)[:-1]) > 0
    if enclosed and brackets in ("{}", r"\{\}"):
        return read(inside)
    parts, _ = split(tokens, ";")
    if len(parts) == 1 and r"\{" not in tokens and {"±", "∓"} & set(tokens):  # both answers
        upper = [{"±": "+", "∓": "-"}.get(t, t) for t in tokens]
        lower = [{"±": "-", "∓": "+"}.get(t, t) for t in tokens]
        return read([*upper, ",", *lower])
    if len(parts) == 1:
        parts, _ = split(tokens, ",")
    if len(parts) > 1:
        return Answer("list", items=[read(p) for p in parts])
    if split(tokens, RELATIONS)[1]:
        return read_relation(tokens)
    if enclosed and brackets in ("()", "[]", "(]", "[)", "⟦⟧"):
        items = [read(p) for p in split(inside, ",;")[0]]
        if brackets == "⟦⟧" or len(items) == 2:
            return Answer(brackets, items=items)
        return items[0] if len(items) == 1 else Answer("()", items=items)  # [1,2,3] is (1,2,3)
    return read_leaf(tokens)


def read_relation(tokens):
    """x = 5, 5 = x, a = b = 5, 2 + 3 = 5, 2x + y = 5, x in (0, 1), x < 5, 1 <= x < 5, 2x + y < 5"""
    sides, signs = split(tokens, RELATIONS)
    if len(sides) != len(signs) + 1 or not any(set(signs) <= chain for chain in CHAINS):
        raise ValueError("a side is empty, or relations are mixed")
    if signs[0] in (">", "≥"):
        sides = sides[::-1]
        signs = [{">": "<", "≥": "≤"}[sign] for sign in reversed(signs)]
    elif signs[0] == "=" and is_name(sides[-1]) and not is_name(sides[0]):
        sides = sides[::-1]
    name, rest = sides[0], sides[-1]
    values = compute(["(", *name, ")", "-", "(", *rest, ")"])
    if signs[0] in ("<", "≤"):
        if len(sides) == 2 and is_name(sides[0]):
            sides, signs = [["-", "infty"], *sides], ["<", *signs]
        elif len(sides) == 2 and is_name(sides[1]):
            sides, signs = [*sides, ["infty"]], [*signs, "<"]
        if len(sides) != 3:
            return Answer(signs[0], values=values)
        opening = "[" if signs[0] == "≤" else "("
        closing = "]" if signs[1] == "≤" else ")"
        name, rest = sides[1], [opening, *sides[0], ",", *sides[2], closing]
        values = []  # N < n is not N = n
    else:
        constant = len({*compute(name)} - {None}) == 1
        if signs[0] == "≠" or len(sides) == 2 and not is_name(name) and not constant:
            return Answer(signs[0], values=values)
    return Answer("=", "".join(name).replace('"', ""), [read(rest)], values)


def is_name(tokens):
    """AB = 5 says what a segment is, but xy = 6 is an equation."""
    product = len(tokens) > 1 and all(len(t) == 1 and t.islower() for t in tokens)
    return bool(NAME.fullmatch("".join(tokens))) and not product


def read_leaf(tokens):
    """An expression, its unit apart, or else words."""
    text, unit = " ".join(tokens), ""
    if quantity := UNIT.fullmatch(text):  # not 5 cm - 3
        text, unit = quantity.groups()
    tokens = text.split(" ")
    words = all(t[0] == '"' and len(t) > 2 for t in tokens)
    values = [None] if words else compute(tokens)
    return Answer("leaf", text.replace('"', ""), values=values, unit=unit.strip())


def answers_match(pred: str, gold: str, tolerance=0) -> bool:
    """Whether two answers are equal as mathematics (see above), numbers up to a tolerance. Takes
    any strings, never raises, does a bounded amount of work. An empty answer matches nothing."""
    pred, gold = bare_answer(pred), bare_answer(gold)
    try:
        pred, gold = tokenize(pred), tokenize(gold)
        return bool(pred and gold) and (pred == gold or same(read(pred), read(gold), tolerance))
    except (ValueError, ArithmeticError, RecursionError):  # or a value that no float can hold
        return bool(pred) and pred == gold


def bare_answer(text):
    """What the box holds, or the formula after prose: Hence $x > 2$ holds."""
    text = last_boxed(text) or text
    formula = PROSE.match(text)
    return (formula[1] if formula else text).lstrip("*`_ \t\n").rstrip("*`_. \t\n")


def same(a, b, tolerance=0) -> bool:
    """Whether two answers are equal. In lists each member must have its like on the other side. An
    equation is any multiple of itself, an inequality any positive one."""
    equal = functools.partial(same, tolerance=tolerance)
    if a.kind == b.kind == "leaf":
        return same_leaf(a, b, tolerance)
    if a.kind == b.kind != "list" and a.text == b.text and a.items and b.items:
        return len(a.items) == len(b.items) and all(map(equal, a.items, b.items))
    if a.kind in RELATIONS and b.kind in RELATIONS:
        ratios = [x / y for x, y in zip(a.values, b.values) if x and y]
        constant = a.kind == b.kind and agree(ratios, ratios[:1] * len(ratios))
        return constant and (a.kind in ("=", "≠") or ratios[0].real > 0)
    if b.kind in RELATIONS or b.kind != "list" and a.kind not in RELATIONS:
        a, b = b, a
    if a.kind in RELATIONS:  # x = 5 is 5
        return bool(a.items) and equal(a.items[0], b)
    if b.kind != "list":
        return False
    names = {x.text for x in b.items if x.kind == "=" and x.items}
    if a.kind not in ("list", "leaf") and len(names) == len(b.items) > 1:  # x = 2, y = 3 is (2, 3)
        return len(a.items) == len(b.items) and all(map(equal, a.items, b.items))
    xs, ys = a.items if a.kind == "list" else [a], b.items
    return (all(any(equal(x, y) for y in ys) for x in xs)
            and all(any(equal(x, y) for x in xs) for y in ys))


def same_leaf(a, b, tolerance):
    """Words by their letters; values at all points, where a percent sign, a missing unit, and the
    rounding of an exact value to six or more digits are forgiven."""
    if a.unit and b.unit and a.unit != b.unit:
        if not agree(compute(a.unit.split()), compute(b.unit.split())):
            return False
    decimals = [x.text for x in (a, b) if "." in x.text]
    if len(decimals) == 1 and re.fullmatch(r"[+-]? ?[0.]*[1-9](\.?\d){5,}", decimals[0]):
        half_a_digit = Fraction(50001, 100000 * 10 ** len(decimals[0].partition(".")[2]))
        tolerance = max(tolerance, half_a_digit)
    if a.text == b.text or agree(a.values, b.values, tolerance):
        return True
    if (a.unit == '"%') != (b.unit == '"%'):
        share, other = (a, b) if a.unit == '"%' else (b, a)
        return agree(share.values, [x and 100 * x for x in other.values])
    if [None] not in (a.values, b.values):
        return False
    letters = a.text.replace(" ", "").casefold()
    return letters.isalpha() and letters == b.text.replace(" ", "").casefold()


def agree(u, v, tolerance=0):
    """Whether two values are equal at all points where both are defined, two at least."""
    pairs = [(x, y) for x, y in zip(u, v) if x is not None and y is not None]
    for x, y in pairs:
        bound = 0 if isinstance(x, Fraction) and isinstance(y, Fraction) else 1e-11
        if abs(x - y) > max(tolerance, bound * max(abs(x), abs(y))):
            return False
    return len(pairs) > 1


# --- IFEval: was an instruction followed that a program can check? --------------------------------

# The 25 kinds of google-research's instruction_following_eval by its rules, odd ones included. Its regular
# expressions are rewritten where a long response would make them quadratic, with the same matches. A verdict
# can differ from the official checker's where that asks
# - langdetect: here the script with the most letters, and in it the language of which the most words are in
#   LANGUAGES, by default the script's first. A few words, formulas and names can be read otherwise.
# - nltk's punkt: here a sentence ends after an abbreviation, an ellipsis or `A.` before a capitalised word of
#   STARTERS; and nltk's words in capitals are known as far as CAPITALS_BREAK goes.
# - a regular expression as keyword that could run away, or fails: literal text here.
# - chance, for arguments that are missing, None or out of range: refused here.

LANGUAGES = {  # the letters of a script: its languages, each with frequent words and a mark of others
    "A-Za-zªºÀ-ɏ\u1e00-\u1eff": {
        "en": ("the of and to a in is it you that for with this are be on i your not as have was my we", ""),
        "es": ("el la los las de que en un una por para con no es se del su como más al lo", "ñ"),
        "pt": ("de que em um uma por para com não é se do da seu como mais no na dos", "[ãõ]"),
        "fr": ("le la les de des et que en un une pour dans est pas du je vous ce qui sur au avec", "[œêç]"),
        "de": ("der die das und ist nicht ein eine zu den mit sie ich es auf für im von dem sich", "ß"),
        "it": ("il la le gli di che un una per con non è si del della sono in come più ho", "zione$"),
        "pl": ("na się nie że to jest do jak ale od po za dla czy", "[ąęłśźżńć]"),
        "vi": ("và của là có không được cho một những các với này tôi trong", "[ăơưđ\u1ea0-\u1ef9]"),
        "sw": ("na ya wa kwa ni za katika la cha kuwa hii kama yake hiyo vya", ""),
        "fi": ("ja on ei se että ovat oli mutta kun niin tai hän myös voi", "(ss[aä]|inen)$")},
    "\u0400-\u04ff": {"ru": ("и в не на что с по это как я он но к из у за для от", "[ыэё]"),
                      "uk": ("і в не на що з та це як до у за є від для про я де він", "[іїєґ]"),
                      "bg": ("и в не на че с да се е от за по са това си ще", "ъ[^еёюя]|ият$")},
    "\u0620-\u06d3": {"ar": ("في من على إلى أن التي هذا هذه الذي عن مع كان لا ما", "[ةكيىأإ]|^ال"),
                      "fa": ("و به از که در را این است با برای آن می شما ما", "[پچژگکی]"),
                      "ur": ("کے کی میں ہے اور سے کا کو ہیں نے یہ پر ایک", "[ٹڈڑںےہھ]")},
    "\u0900-\u0963\u0970-\u097f": {
        "hi": ("है के में की और से का को हैं नहीं यह एक भी पर हो था", "\u093c"),
        "mr": ("आहे आणि मध्ये हे ते नाही आहेत ती हा साठी या व तर मी", "ळ|..(च्या|ाचा|ाची|ाचे|ांना|तील)$"),
        "ne": ("छ र मा हो छन् लाई पनि यो गर्न भने हुन्छ छैन तर मलाई तपाईं", "..(को|मा|लाई|हरू|छ|छन्|नु)$")},
    "\u3040-\u30ff\u4e00-\u9fff": {"zh": ("", ""), "ja": ("", "[\u3040-\u30ff]")},
    **{letters: {name: ("", "")} for name, letters in {
        "he": "\u0590-\u05ff", "bn": "\u0980-\u09ff", "pa": "\u0a00-\u0a7f", "gu": "\u0a80-\u0aff",
        "ta": "\u0b80-\u0bff", "te": "\u0c00-\u0c7f", "kn": "\u0c80-\u0cff", "ml": "\u0d00-\u0d7f",
        "th": "\u0e00-\u0e7f", "ko": "\u1100-\u11ff\uac00-\ud7af"}.items()}}


def is_language(text, language):
    """Whether `text` is in a language, an ISO 639-1 code. Text without letters is in any; one word that no
    language claims is not English."""
    if not any(c.isalpha() for c in text):
        return True
    text = " ".join(word for word in text.lower().split() if "@" not in word and "://" not in word)
    script = max(LANGUAGES, key=lambda letters: len(re.findall(f"[{letters}]", text)))
    words = re.findall(f"[{script}]+", text)
    scores = {name: sum((f" {word} " in f" {frequent} ") + bool(mark and re.search(mark, word))
                        for word in words) for name, (frequent, mark) in LANGUAGES[script].items()}
    best = max(scores, key=scores.get)
    return best == language and (scores[best] > 0 or len(words) > (best == "en"))


ABBREVIATIONS = set(
    "mr mrs ms dr prof st jr sr rep reps sen gen gov col lt maj adm messrs inc ltd co corp cos bros cie vs"
    " jan feb aug sep sept oct nov dec tues wed fri ave ft yr mg ct a.m p.m u.s u.k u.n u.s.a u.s.s.r d.c"
    " n.y n.j n.c n.h n.m s.c l.a r.i a.d b.v ph.d m.b.a j.k j.p j.r ala ariz calif colo conn fla ga ill kan"
    " ky mich minn nev okla ore pa tenn va vt wash wis c d e f g h j k l m n p r s t v w".split())
STARTERS = set(
    "i the he it they this these there some many most both in if so but when while since although though"
    " however despite thus yet nor even under among indeed instead meanwhile moreover according here please"
    " yes your her".split())
PUNCTUATION = r"""[)";}\]*:@'({\[!?]"""  # what punkt takes for a token of its own
SENTENCE_END = re.compile(rf".*[.?!](?={PUNCTUATION}| )")
SENTENCE_TAIL = re.compile(r"""["')\]}]*""")  # these still belong to the sentence before
CAPITALS_BREAK = re.compile(
    r"[\s;@#$%&?!*()\[\]{}<>\"«»“”„‘’`]+|[:,](?!\d)|--|\.{2,}|(?<=\w)(?='(?i:[smd]|ll|re|ve)(?![\w\n/-]))"
    r"|(?<=\w)(?=N'T(?![\w\n/-]))|(?<=\b(?:CAN|GON|WAN|GOT))(?=(?:NOT|NA|TA)\b)")


def ends_sentence(chunk, following):
    """Whether `chunk`, which ends in . ? or !, ends a sentence before `following`."""
    word = re.split(PUNCTUATION, chunk)[-1]
    stem, upper, lower = word[:-1].lower(), following[0].isupper(), following[0].islower()
    if word == "." or re.search("[?!]", chunk):
        return True
    if stem.endswith(".") or ABBREVIATIONS & {stem, stem.rpartition("-")[2]}:
        return upper and len(stem) > 1 and re.split(PUNCTUATION, following)[0].strip(",.").lower() in STARTERS
    return not (lower and re.fullmatch(r"[^\W\d]|-?[.,]?\d[\d,.-]*", stem))  # 1. one   b. two


def count_sentences(text):
    """Number of sentences. As in punkt a word holds one end at most, the last that something follows: a text
    that ends in `Hi!!` or `**Hi.**` has one more than it seems."""
    words, count = text.split(), 1
    if len(words) > 1 and words[-2][-1] in ".?!" and SENTENCE_TAIL.fullmatch(words[-1]):
        words[-2:] = [words[-2] + words[-1]]
    for word, following in itertools.zip_longest(words, words[1:], fillvalue=""):
        end = SENTENCE_END.match(word + " " * bool(following))
        rest = word[end.end():] if end else ""
        if end and (following or not SENTENCE_TAIL.fullmatch(rest)):
            count += ends_sentence(end[0], rest or following)
    return count


def is_json(text):
    """Whether the text is JSON, alone or in one fence of backticks."""
    try:
        text = re.sub(r"\A(?:```json)?(?:```Json)?(?:```JSON)?(?:```)?", "", text.strip())
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):  # RecursionError: nested too deeply
        return False
    return True


def pieces(text, divider):
    """What dividers part; nothing if a piece is empty that is neither the first nor the last."""
    parts = [part.strip() for part in text.split(divider)]
    parts = parts[not parts[0]:len(parts) - (not parts[-1])]
    return parts if all(parts) else []


def nth_paragraph_starts(text, num_paragraphs, nth_paragraph, first_word):
    """Empty paragraphs do not count for the number, but do for which is the nth."""
    paragraphs = [paragraph.strip() for paragraph in text.split("\n\n")]
    filled = sum(map(bool, paragraphs))
    if filled != num_paragraphs or not 1 <= nth_paragraph <= filled or not paragraphs[nth_paragraph - 1]:
        return False
    word = paragraphs[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return re.split("[.,?!'\"]", word)[0].lower() == first_word.lower()


def keyword_pattern(text, before="", after="", flags=re.IGNORECASE):
    """`text` as a regular expression if it is one without repeats, groups and branches, else literally."""
    if re.search(r"[*+{(|]", text) or text.count("?") > 3:
        text = re.escape(text)
    try:
        return re.compile(before + text + after, flags)
    except re.error:
        return re.compile(before + re.escape(text) + after, flags)


def compare(count, relation, threshold):
    """IFEval's two relations: "less than", and "at least" for all others."""
    return count < threshold if relation == "less than" else count >= threshold


POSTSCRIPTS = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}
CHECKS = {  # instruction: its check of a text; the parameters after the text are the instruction's arguments
    "change_case:capital_word_frequency": lambda text, capital_frequency, capital_relation: compare(
        sum(map(str.isupper, CAPITALS_BREAK.split(text))), capital_relation, capital_frequency),
    "change_case:english_capital": lambda text: text.isupper() and is_language(text, "en"),
    "change_case:english_lowercase": lambda text: text.islower() and is_language(text, "en"),
    "combination:repeat_prompt": lambda text, prompt_to_repeat:
        text.strip().lower().startswith(prompt_to_repeat.strip().lower()),
    "combination:two_responses": lambda text:
        len(pieces(text, "******")) == len(set(pieces(text, "******"))) == 2,
    "detectable_content:number_placeholders": lambda text, num_placeholders:
        re.findall(r"\[[^\]\n]*(\]?)", text).count("]") >= num_placeholders,
    "detectable_content:postscript": lambda text, postscript_marker: bool(re.search(
        POSTSCRIPTS.get(postscript_marker.strip()) or keyword_pattern(postscript_marker.strip().lower()),
        text.lower())),
    "detectable_format:constrained_response": lambda text:
        any(f"My answer is {option}." in text for option in ("yes", "no", "maybe")),
    "detectable_format:json_format": is_json,
    "detectable_format:multiple_sections": lambda text, section_spliter, num_sections: len(
        keyword_pattern(section_spliter.strip(), after=r"\s?\d+", flags=0).findall(text)) >= num_sections,
    "detectable_format:number_bullet_lists": lambda text, num_bullets: num_bullets == sum(
        len(re.findall(pattern, text, re.M)) for pattern in (r"^[^\S\n]*\*[^*].*", r"^[^\S\n]*-")),
    "detectable_format:number_highlighted_sections": lambda text, num_highlights: num_highlights <= sum(
        bool(inner.strip()) for pattern in (r"\*([^\n*]*)\*", r"\*\*([^\n*]*)\*\*")
        for inner in re.findall(pattern, text)),
    "detectable_format:title": lambda text:
        any(line.partition("<<")[2].rpartition(">>")[0].lstrip("<").rstrip(">").strip()
            for line in text.split("\n")),
    "keywords:existence": lambda text, keywords: all(keyword_pattern(k).search(text) for k in keywords),
    "keywords:forbidden_words": lambda text, forbidden_words:
        not any(keyword_pattern(word, r"\b", r"\b").search(text) for word in forbidden_words),
    "keywords:frequency": lambda text, keyword, frequency, relation:
        compare(len(keyword_pattern(keyword.strip()).findall(text)), relation, frequency),
    "keywords:letter_frequency": lambda text, letter, let_frequency, let_relation:
        compare(text.lower().count(letter.lower()), let_relation, let_frequency),
    "language:response_language": is_language,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_starts,
    "length_constraints:number_paragraphs": lambda text, num_paragraphs:
        len(pieces(text, "***")) == num_paragraphs,
    "length_constraints:number_sentences": lambda text, num_sentences, relation:
        compare(count_sentences(text), relation, num_sentences),
    "length_constraints:number_words": lambda text, num_words, relation:
        compare(len(re.findall(r"\w+", text)), relation, num_words),
    "punctuation:no_comma": lambda text: "," not in text,
    "startend:end_checker": lambda text, end_phrase:
        text.strip().strip('"').lower().endswith(end_phrase.strip().lower()),
    "startend:quotation": lambda text: len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] == '"'}


def is_argument(name, value):
    """Whether `value` can be the argument `name` of an instruction."""
    if name in ("keywords", "forbidden_words"):
        return isinstance(value, list) and len(value) > 0 and all(is_argument("keyword", v) for v in value)
    if name.startswith(("num_", "nth_")) or name.endswith("frequency"):
        return type(value) is int and value >= 0
    if name.endswith("relation"):
        return value in ("less than", "at least")
    longest = {"letter": 1, "prompt_to_repeat": math.inf}.get(name, MAX_CHARS)
    return isinstance(value, str) and value.strip() != "" and len(value) <= longest and (
        name != "language" or any(value in languages for languages in LANGUAGES.values()))


def ifeval_verdicts(response: str, instruction_ids: list[str], kwargs: list[dict]
                    ) -> tuple[list[bool], list[bool]]:
    """Strict and loose verdict of each instruction on a response.

    Loose: on any of eight texts: the response whole, without its first line, its last, or both, each also
    without `*`. An empty text follows nothing. An argument that is None is absent. Raises UserError that
    names the instruction and its wrong, missing or unknown arguments."""
    if len(instruction_ids) != len(kwargs):
        raise UserError(f"{len(instruction_ids)} instructions, but arguments for {len(kwargs)}")
    lines = response.split("\n")
    cut = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    variants = [text for text in dict.fromkeys(cut + [text.replace("*", "") for text in cut]) if text.strip()]
    strict, loose = [], []
    for instruction, given in zip(instruction_ids, kwargs):
        check = CHECKS.get(str(instruction))
        if not check or not isinstance(given, dict):
            raise UserError(f"instruction {instruction!r} with arguments {given!r} is none of IFEval's")
        given = {name: value for name, value in given.items() if value is not None}
        names = list(inspect.signature(check).parameters)[1:]
        wrong = [f"{name} = {given.get(name)!r}" for name in sorted({*names, *given})
                 if name not in names or not is_argument(name, given.get(name))]
        if wrong:
            raise UserError(f"{instruction} takes {', '.join(names) or 'nothing'}; not {', '.join(wrong)}")
        strict.append(bool(response.strip()) and check(response, **given))
        loose.append(any(check(text, **given) for text in variants))
    return strict, loose


# --- math: gold answers and their rows ------------------------------------------------------------

GOLD_FIELDS = ("answer", "ground_truth", "label", "reward_model.ground_truth", "solution")


@dataclass(frozen=True)
class Gold:
    """What a right answer is: `text`, and for some rows of OlympiadBench more."""

    text: str
    several: bool = False  # the text lists several answers; all must be given, in any order
    tolerance: Fraction = Fraction(0)  # a number may be off by so much


def gold_answer(row: dict) -> str:
    """The gold answer from whatever field this data set keeps it in; of a whole solution its last
    box or its `####` line. Raises UserError where there is none."""
    key, value = "final_answer", row.get("final_answer")
    if isinstance(value, list):  # OlympiadBench
        value = ", ".join(str(part) for part in value)
    if value is None:
        if isinstance(row.get("reward_model"), dict):
            row = {**row, "reward_model.ground_truth": row["reward_model"].get("ground_truth")}
        key = next((k for k in GOLD_FIELDS if row.get(k) is not None), None)
        value = row.get(key)
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number and not isinstance(value, str):
        raise UserError(f"a gold answer expected in final_answer, {', '.join(GOLD_FIELDS)}: "
                        f"a string or a number, found {value!r:.60}")
    text = data.check_text(str(value), repr(key)).strip()
    gold = extract_answer(text) if "boxed" in text or "####" in text else text
    if not gold or len(gold) > MAX_CHARS:
        raise UserError(f"{key!r}: no final answer in it (\\boxed{{}}, ####, or the bare answer "
                        f"expected), found {text!r:.60}")
    return gold


def math_gold(row: dict) -> Gold:
    """The gold answer of a row of any math set, with OlympiadBench's fields is_multiple_answer,
    error (the tolerance) and unit. Raises UserError naming the field."""
    text = gold_answer(row)
    parts = row.get("final_answer")
    if parts is None:  # elsewhere `error` and `unit` may be anything
        return Gold(text)
    try:
        tolerance = Fraction(str(float(row.get("error") or 0)))  # "1e-1" is 1/10
    except (TypeError, ValueError):
        tolerance = Fraction(-1)
    if tolerance < 0:
        raise UserError(f"'error': one positive number expected, found {row['error']!r:.60}")
    unit = str(row.get("unit") or "").strip("$ ")
    if unit and "\\" not in unit:
        unit = rf"\text{{{unit}}}"
    several = row.get("is_multiple_answer") is True or isinstance(parts, list) and len(parts) > 1
    if several:
        text = space_commas(text)
    return Gold(f"{text} {unit}".strip(), several, tolerance)


def space_commas(text):
    """A list of answers with its commas spaced: 5,150 are two of them."""
    return re.sub(r"(?<!\{),\s*", ", ", text)


def grade_math(text: str, gold: Gold) -> bool:
    """Whether a response ends in the right answer. Several answers may also stand in several boxes
    of one line, the last that has a box."""
    answer = extract_answer(text)
    if answer is None or not gold.several:
        return answer is not None and answers_match(answer, gold.text, gold.tolerance)
    lines = [line for line in after_thinking(text).split("\n") if BOX.search(line)]
    starts = [box.start() for line in lines[-1:] for box in BOX.finditer(line)]
    boxes = [last_boxed(lines[-1][i:j]) for i, j in itertools.pairwise([*starts, None])]
    answers = [space_commas(answer), space_commas(", ".join(boxes))]
    return any(answers_match(x, gold.text, gold.tolerance) for x in answers)


# --- Connect4 -------------------------------------------------------------------------------------

# A board is 6 rows of 7 cells, row 0 lowest; a cell is "X", "O" or "_". X plays first.
CONNECT4_PROMPT = """You play Connect Four on a board of 6 rows and 7 columns. A disc falls to the lowest \
empty cell of its column; four or more discs of one player in a row, horizontally, vertically or diagonally, \
win. The board is written as (row,column):disc, row 0 being the lowest and column 0 the leftmost, with X and \
O for the players' discs and _ for an empty cell.
{state}
Look at every valid move, and at all four lines through its cell, before you decide. Write down all valid \
moves with which you would win at once, and all valid moves with which your opponent would win at once if it \
were their turn now, in exactly this form, None standing for an empty list:
[Intermediate Thinking Results 1: (row,column), (row,column)]
[Intermediate Thinking Results 2: None]
The first line is about you, the second about your opponent. End with your move in this form:
Chosen Move: (row,column)"""
CONNECT4_TRIVIAL = "[Intermediate Thinking Results 1: None]\n[Intermediate Thinking Results 2: None]"
CONNECT4_RESULTS = [re.compile(rf"intermediate thinking results {n} *:([^\]\n]{{0,1000}})\]") for n in (1, 2)]


def connect4_state(board: list, player: str) -> str:
    """The position as the official file writes it; `player` ("X" or "O") is to move."""
    rows = ["".join(f"({r},{c}):{board[r][c]} " for c in range(7)) for r in reversed(range(6))]
    moves = [f"({r},{c})" for r, c in valid_moves(board)]
    return ("\nCurrent Game Board: \n" + "\n".join(rows)
            + f"\n\nCurrent valid moves for player {player}: {moves}\nYou are player {player}, please choose "
              "the best move considering the current board state.\n")


def read_connect4(text: str) -> tuple[list, str]:
    """(board, player to move) of a state; raises UserError where `connect4_state` gives another text."""
    discs = {(int(r), int(c)): disc for r, c, disc in re.findall(r"\(([0-5]),([0-6])\):([XO])", text)}
    board = [[discs.get((r, c), "_") for c in range(7)] for r in range(6)]
    floating = [(r, c) for r, c in discs if r and board[r - 1][c] == "_"]
    if floating:
        raise UserError(f"'state': the disc at {min(floating)} has nothing under it")
    player = "O" if "You are player O" in text else "X"
    found, expected = text.split("\n"), connect4_state(board, player).split("\n")
    for number, (line, wanted) in enumerate(itertools.zip_longest(found, expected), 1):
        if line != wanted:
            raise UserError(f"'state': line {number} of the text should be {wanted!r}, found {line!r:.120}")
    return board, player


def valid_moves(board):
    """The lowest empty cell of each column that has one, by column."""
    return [(column.index("_"), c) for c, column in enumerate(zip(*board)) if "_" in column]


def winning_moves(board: list, player: str) -> list[tuple[int, int]]:
    """The valid moves, by column, with which `player` would at once have four or more in a row; whose turn
    it is does not matter."""
    return [(r, c) for r, c in valid_moves(board) if wins(board, r, c, player)]


def wins(board, row, col, player):
    """Whether a disc of the player at this cell makes four or more in a row; what lies there is not read."""
    def reach(r, c, dr, dc):  # how many own discs follow in this direction
        r, c = r + dr, c + dc
        return 1 + reach(r, c, dr, dc) if 0 <= r < 6 and 0 <= c < 7 and board[r][c] == player else 0

    return any(reach(row, col, dr, dc) + reach(row, col, -dr, -dc) >= 3
               for dr, dc in ((0, 1), (1, 0), (1, 1), (1, -1)))


def connect4_labels(board, player):
    """[mine, opponent's] winning moves as the official file has them, [[row, col], ...] each."""
    return [[list(move) for move in winning_moves(board, who)] for who in (player, "XO"[player == "X"])]


def connect4_rows(count: int, seed: int) -> list[dict]:
    """`count` rows {"state", "answer"} in the official layout: one position each, any but the end, of a game
    of two random players. All states differ, and of any first n rows at most a fifth has both lists empty
    (the paper's filter): fewer rows of a seed are the first of more. Raises UserError unless count >= 1."""
    if count < 1:
        raise UserError(f"{count} Connect4 states wanted: one or more expected")
    rng, rows, easy = random.Random(seed), {}, 0  # rows by state
    while len(rows) < count:
        board, player, over, positions = [["_"] * 7 for _ in range(6)], "X", False, []
        while not over:
            positions.append(([row[:] for row in board], player))
            r, c = rng.choice(valid_moves(board))
            over = wins(board, r, c, player) or len(positions) == 42
            board[r][c], player = player, "XO"[player == "X"]
        board, player = rng.choice(positions)
        state, answer = connect4_state(board, player), connect4_labels(board, player)
        if state not in rows and (answer != [[], []] or 5 * (easy + 1) <= len(rows) + 1):
            easy += answer == [[], []]
            rows[state] = {"state": state, "answer": answer}
    return list(rows.values())


def connect4_file(path: str) -> list[dict]:
    """The rows of a file in the official layout. Raises UserError, naming the line, for a state that is not
    in it and for labels that are not those of the rules."""
    def parse(row, line):
        state = data.check_text(row.get("state"), "'state'")
        answer = connect4_labels(*read_connect4(state))
        if row.get("answer") != answer:
            raise UserError(f"'answer': by the rules it is {answer}, found {row.get('answer')!r:.100}")
        return {"state": state, "answer": answer}

    return data.read_rows(path, parse)[0]


def grade_connect4(text: str, answer: list) -> dict:
    """{"mine", "opponent", "joint", "no answer"}, each 0 or 1, for a response and its [mine, opponent's].

    As in the published scorer upper case does not matter, the first result of each kind counts, and cells
    are compared as multisets. Different from it: thinking is dropped; spaces inside (r, c) are read; a result
    with neither cells nor None is wrong, not an empty list. A missing one is wrong, and "no answer" is 1.
    """
    text = after_thinking(text).lower()
    found, right = [pattern.search(text) for pattern in CONNECT4_RESULTS], []
    for m, gold in zip(found, answer):
        cells = re.findall(r"\(\s*(\d+)\s*,\s*(\d+)\s*\)", m[1]) if m else []
        said = m is not None and bool(cells) != ("none" in m[1])
        right.append(int(said and Counter((int(r), int(c)) for r, c in cells) == Counter(map(tuple, gold))))
    return {"mine": right[0], "opponent": right[1], "joint": min(right), "no answer": int(None in found)}


def connect4_reference(rows: list[dict]) -> dict:
    """The scores of answering None to both questions of every row: what costs no look at the board."""
    grades = [grade_connect4(CONNECT4_TRIVIAL, row["answer"]) for row in rows]
    return {k: sum(grade[k] for grade in grades) / len(grades) for k in grades[0]}


# --- GPQA -----------------------------------------------------------------------------------------

GPQA_PROMPT = """Answer this multiple-choice question. Think step by step, then end with one last line that \
gives the letter of your choice in exactly this form: "Answer": "C"

"""
GPQA_KEYS = ["Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"]
CHOICES = [re.compile(pattern) for pattern in (
    r"""(?i:["'“”‘’]answer["'“”‘’])\s*:\s*["'“”‘’]\(?([A-D])\)?\.?["'“”‘’]""",  # as the prompt asks for
    r"\\boxed\s*\{\s*(?:\\\w+\s*\{)?[\s($]*([A-D])\s*[}).:]",
    r"(?i:<answer>)[\s(]*([A-D])[\s).]*(?i:</answer>)",
    # Not the article of "the answer is A good one", nor a part of the name C-H, nor the first of two.
    r"(?i:\b(?:answer|option|choice)\b[*\"']*\s*(?:is|be|(?:would|should|must)\s+be|:))"
    r"(?:[\s:*_\"'($\[]|\\\(|\\(?:boxed|text\w*)\s*\{|(?i:option|choice)\b)*"
    r"([A-D])(?![\w'’–-]|[ \t]+(?!because\b|since\b|as\b)[a-z]|\)?\s*[,/(]\s*\(?[A-D]\b)",
    r"(?i:\b(?:option|choice))[\s(*]+([A-D])\b[)*]*\s+(?i:is\s+(?:the\s+)?(?:correct|right|best)\b)")]


def gpqa_file(path: str) -> list[tuple]:
    """Rows (id, user turn, right letter) of a JSONL file of four-choice questions with the hub's keys.

    Choices are ordered by a hash of question and choice: a shuffle that is the same on every machine and
    whatever their order in the file. Raises UserError naming line and field.
    """
    def parse(row, line):
        question, *choices = (data.check_text(row.get(key), repr(key)).strip() for key in GPQA_KEYS)
        right = choices[0]
        if not question or not all(choices) or choices.count(right) > 1:
            raise UserError("the question or a choice is empty, or the right choice is there twice")
        order = sorted(choices, key=lambda c: hashlib.sha256(json.dumps([question, c]).encode()).digest())
        shown = "\n".join(f"{letter}) {choice}" for letter, choice in zip("ABCD", order))
        return item_id(row, line), f"{GPQA_PROMPT}{question}\n\n{shown}", "ABCD"[order.index(right)]

    return read_unique(path, parse)


def choice_letter(text: str) -> str | None:
    """The letter that a response chooses, or None: the last match of the first of CHOICES that has one, else
    a letter alone on the last line. Thinking is dropped."""
    text = after_thinking(text)
    for pattern in CHOICES:
        if letters := pattern.findall(text):
            return letters[-1]
    bare = text.rstrip().split("\n")[-1].strip("*_()$. \t\r")
    return bare if bare in tuple("ABCD") else None


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


# --- tasks ----------------------------------------------------------------------------------------

MATH_SETS = ("aime24", "aime25", "amc23", "math500", "minerva", "olympiadbench", "gsm8k")
GROUPS = {"in-domain": MATH_SETS[:6], "OOD": ("gpqa", "connect4"), "IF": ("ifeval",)}  # the paper's table
TASK_NAME = re.compile(r"(?!.*\.(?:json|md)$)\w[\w.-]*", re.ASCII)  # a folder's beside results.json
SAMPLES = {"aime24": 16, "aime25": 16, "amc23": 16, "connect4": 1}  # the paper's k; 5 for all others


@dataclass
class Task:
    """One benchmark: what is asked, and how an answer is scored."""

    name: str
    rows: list  # (id, user turn, what `grade` compares with)
    grade: object  # (text, gold) -> {metric: 0 to 1}; the first metric is the headline
    weights: dict = field(default_factory=dict)  # {metric: one weight a row}, where rows do not count alike
    reference: dict = field(default_factory=dict)  # scores of an answer that costs no thought


def load_task(spec: str, folder: str) -> Task:
    """A task by its name, from folder/NAME.jsonl, or `NAME=PATH`; any other NAME=PATH is a math set of the
    user's own (question and gold in the fields that oracle.py reads). Raises UserError naming file and line.
    """
    name, given, path = spec.partition("=")
    if not TASK_NAME.fullmatch(name):
        raise UserError(f"--tasks: {name!r} is no name; letters, digits, '-', '_' and '.' expected")
    path = path or os.path.join(folder, f"{name}.jsonl")
    if name == "connect4":
        rows = connect4_file(path) if given or os.path.exists(path) else connect4_rows(500, seed=0)
        asked = [(str(i), CONNECT4_PROMPT.replace("{state}", row["state"]), row["answer"])
                 for i, row in enumerate(rows)]
        return Task(name, asked, grade_connect4, reference=connect4_reference(rows))
    if name == "gpqa":
        return Task(name, gpqa_file(path), lambda text, gold: {
            "accuracy": choice_letter(text) == gold, "no answer": choice_letter(text) is None})
    if name == "ifeval":
        rows = read_unique(path, parse_ifeval)
        counts = [len(gold[0]) for _, _, gold in rows]
        return Task(name, rows, grade_ifeval, {"instruction strict": counts, "instruction loose": counts})
    if name not in MATH_SETS and not given:
        raise UserError(f"--tasks: {name!r} is unknown; {', '.join((*MATH_SETS, *GROUPS['OOD'], 'ifeval'))} "
                        "or NAME=FILE.jsonl expected")
    return Task(name, read_unique(path, parse_math), lambda text, gold: {
        "accuracy": grade_math(text, gold), "no answer": extract_answer(text) is None,
        "no box": last_boxed(after_thinking(text)) is None})


def read_unique(path, parse):
    """Rows (id, ...) of a task's file; ids must differ."""
    rows, dropped = data.read_rows(path, parse)
    twice = [k for k, n in Counter(row[0] for row in rows).items() if n > 1]
    if twice:
        first = ", ".join(map(ascii, twice[:5]))
        raise UserError(f"{path}: {len(twice)} ids occur more than once, first {first} "
                        "(a row without an id has its line's number)")
    return rows


def item_id(row, line):
    """The row's own id or index, else its line number."""
    key = next((k for k in ("id", "index", "key", "Record ID") if row.get(k) is not None), None)
    value = line if key is None else row[key]
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise UserError(f'"{key}": a string or an integer expected, found {value!r:.60}')
    return data.check_text(str(value), f'"{key}"')


def parse_math(row, line):
    """A row of a math set as (id, user turn, Gold); raises UserError naming the field."""
    key = next((k for k in ("question", "problem", "prompt") if isinstance(row.get(k), str)), None)
    if key is None:
        raise UserError(f"a string in question, problem or prompt expected, found {sorted(row)!r:.100}")
    question = data.check_text(row[key], repr(key))
    return item_id(row, line), INSTRUCTION.replace("{question}", question), math_gold(row)


def parse_ifeval(row, line):
    """A row of IFEval as (id, user turn, (instructions, arguments)); raises UserError."""
    ids, arguments = row.get("instruction_id_list"), row.get("kwargs")
    if not isinstance(ids, list) or not isinstance(arguments, list) or not 0 < len(ids) == len(arguments):
        raise UserError("'instruction_id_list' and 'kwargs': two lists of one length expected, found "
                        f"{ids!r:.60} and {arguments!r:.60}")
    ifeval_verdicts("x", ids, arguments)  # raises for what it does not know
    return item_id(row, line), data.check_text(row.get("prompt"), "'prompt'"), (ids, arguments)


def grade_ifeval(text, gold):
    """Prompt level: all instructions kept; instruction level: the share that was kept."""
    strict, loose = ifeval_verdicts(after_thinking(text), *gold)
    return {"prompt strict": all(strict), "instruction strict": sum(strict) / len(strict),
            "prompt loose": all(loose), "instruction loose": sum(loose) / len(loose)}


# --- evaluation -----------------------------------------------------------------------------------


def evaluate(policy, tasks: list, out: str, sampling: Sampling, ranks: Ranks, samples: int = 0, seed: int = 0
             ) -> dict:
    """Sample and score tasks; every answer is kept in out/TASK/raw-*.jsonl, and asked once.

    samples: answers a question; 0: the paper's number for each task. Returns (on the main rank) and writes
    results.json, where tasks of an earlier call stay: {task: `score_task`'s figures}.
    """
    path = os.path.join(out, "results.json")
    with ranks.together():
        results = read_results(out) if ranks.main and os.path.lexists(path) else {}  # of tasks asked before
    for task in tasks:
        k = samples or SAMPLES.get(task.name, 5)
        wanted = [[request_for(f"{name}/{i}", [{"role": "user", "content": turn}], seed) for i in range(k)]
                  for name, turn, _ in task.rows]
        records = sample(policy, [r for row in wanted for r in row], os.path.join(out, task.name), sampling,
                         ranks, task.name)
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
    """The figures of one task from its records, a list a row. Metrics, as (mean, standard error), and shares
    are from 0 to 1. Answers that a server failed to give are left out of all means, and counted."""
    flat = [r for row in records for r in row if "text" in r]
    if not flat:
        why = Counter(r.get("error", "not asked") for row in records for r in row).most_common(1)[0][0]
        raise UserError(f"{task.name}: not one answer arrived ({why:.200}); start again to ask once more")
    grades = {i: [task.grade(r["text"], task.rows[i][2]) for r in row if "text" in r]
              for i, row in enumerate(records)}
    grades = {i: row for i, row in grades.items() if row}  # a question whose samples all failed is left out
    names = list(next(iter(grades.values()))[0])
    metrics = {}
    for name in names:
        weights = task.weights.get(name)
        metrics[name] = clustered([[float(g[name]) for g in row] for row in grades.values()],
                                  weights and [weights[i] for i in grades])
    scores = {task.rows[i][0]: [float(g[names[0]]) for g in row] for i, row in grades.items()}
    k = min(map(len, scores.values()))
    best = [pass_at_k(len(s), sum(map(round, s)), k) for s in scores.values()]

    def share(of):
        return sum(map(of, flat)) / len(flat)

    return {"questions": len(task.rows), "samples": max(map(len, records)), "metrics": metrics,
            f"pass@{k}": sum(best) / len(best), "cut off": share(lambda r: r["finish"] == "length"),
            "empty": share(lambda r: not r["text"].strip()), "tokens": share(lambda r: r["tokens"]),
            "unanswered": sum(map(len, records)) - len(flat), "reference": task.reference,
            "asked": {name: hashlib.sha256(turn.encode()).hexdigest()[:12] for name, turn, _ in task.rows},
            "scores": scores}


def describe(result):
    """One line of a task's figures."""
    shown = [f"{name} {figure(*value)}" for name, value in result["metrics"].items()]
    shown += [f"{k} {100 * v:.1f}" for k, v in result.items() if k[:5] in ("pass@", "cut o", "empty")]
    shown += [f"{result['tokens']:.0f} tokens an answer"]
    shown += [f"answering None gives {100 * v:.1f}" for k, v in result["reference"].items() if k == "joint"]
    shown += [f"{result['unanswered']} UNANSWERED (start again to ask them)"] * bool(result["unanswered"])
    return ", ".join(shown)


def figure(mean, error):
    """A share and its standard error as text, in %."""
    return f"{100 * mean:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def results_table(results: dict) -> str:
    """The headline figures in %, with standard errors, as the paper lays them out: in-domain, OOD, IF, and
    the mean of each group and of all nine where all of a group's tasks are there."""
    headline = {name: next(iter(r["metrics"].values())) for name, r in results.items()}
    of_paper = [name for group in GROUPS.values() for name in group]
    ordered = [*(name for name in of_paper if name in headline), *(n for n in headline if n not in of_paper)]
    columns = [(name, "---", figure(*headline[name])) for name in ordered]
    for group, names in {**GROUPS, "overall": of_paper}.items():
        if len(names) > 1 and all(name in headline for name in names):
            mean = sum(headline[name][0] for name in names) / len(names)
            columns.append((group, "---", figure(mean, None)))
    return "\n".join("| " + " | ".join(row) + " |" for row in zip(*columns))


def read_results(folder: str) -> dict:
    """results.json of a finished evaluation; what `compare_runs` and `results_table` need is checked."""
    path = os.path.join(folder, "results.json")
    results = read_json(path)
    for name, r in results.items():
        try:
            shares = [x for row in r["scores"].values() for x in row or [None]]
            shares += [x for mean, error in r["metrics"].values() for x in (mean, error or 0.0)]
            fits = (TASK_NAME.fullmatch(name) and type(r["questions"]) is int and r["scores"] and r["metrics"]
                    and all(type(x) in (int, float) and 0 <= x <= 1 for x in shares)
                    and all(isinstance(r["asked"][q], str) for q in r["scores"]))
        except (KeyError, TypeError, ValueError, AttributeError):
            fits = False
        if not fits:
            raise UserError(f"{path}: {name!r:.60} is no result of this program")
    return results


def compare_runs(folders: list, seed: int = 0) -> str:
    """A Markdown table of two finished evaluations: differences of the headline figures in points, B - A,
    with 95 % intervals by paired bootstrap over the questions that both answered. A and B are of those alone.
    Below 20 questions the bootstrap's p is too small, and left out. What cannot be compared is said."""
    (a, b), rows = map(read_results, folders), []
    one, other = (read_json(os.path.join(folder, "settings.json")) for folder in folders)
    def quoted(value):  # settings.json may be a stranger's: one line, no markup, no terminal's commands
        return html.escape(json.dumps(value)[:200], quote=False).replace("|", "\\|")

    notes = [f"{k} differs: {quoted(one.get(k))} and {quoted(other.get(k))}" for k in ("sampling", "seed")
             if one.get(k) != other.get(k)]
    for name in (name for name in a if name in b):
        both = [q for q in a[name]["scores"] if q in b[name]["scores"]
                and a[name]["asked"][q] == b[name]["asked"][q]]
        if len(both) < 2:
            notes.append(f"{name} is left out: {len(both)} questions were asked in both")
            continue
        some = [{q: r[name]["scores"][q] for q in both} for r in (a, b)]
        difference, low, high, p = paired_bootstrap(*some, seed)
        first, second = (100 * clustered(list(scores.values()))[0] for scores in some)
        rows.append(f"| {name} | {len(both)} | {first:.1f} | {second:.1f} | {100 * difference:+.1f} | "
                    f"{100 * low:+.1f} to {100 * high:+.1f} | {f'{p:.3f}' if len(both) >= 20 else '-'} |")
        others = [r[name]["questions"] - len(both) for r in (a, b)]
        notes += [f"{name}: {others[0]} questions of A and {others[1]} of B have no partner"] * any(others)
    if not rows:
        raise UserError(f"nothing to compare: {folders[0]} has {', '.join(a)}, {folders[1]} {', '.join(b)}"
                        + "".join(f"\n  {note}" for note in notes))
    head = ["| task | questions | A | B | B - A | 95 % | p |", "|---|---|---|---|---|---|---|"]
    return "\n".join([*head, *rows, *(f"\n{note}" for note in notes)])


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

    tasks: str = option("", "comma-separated: " + ", ".join((*MATH_SETS, *GROUPS["OOD"], "ifeval"))
                        + ", or NAME=FILE.jsonl (required)")
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
            task.rows = task.rows[:o.limit or None]
            task.weights = {k: v[:o.limit or None] for k, v in task.weights.items()}
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

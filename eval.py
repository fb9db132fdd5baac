"""Sampling and grading: what a model answers, and whether it is right.

Comes in:  questions as chat messages and a model, our own or one behind an OpenAI-compatible server; the
           text of a response, and a gold answer as the benchmark files write it (LaTeX or plain).
Goes out:  `sample`: every answer, kept in a log as it comes; `extract_answer`: the answer that a text
           commits itself to, or None; `answers_match`: True or False; `ifeval_verdicts`: which instructions a
           text follows.
"""

import cmath
import email.utils
import fcntl
import glob
import hashlib
import inspect
import itertools
import json
import math
import operator
import os
import queue
import random
import re
import socket
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from http.client import HTTPException, IncompleteRead

import torch
from tqdm import tqdm

import data
import model as qwen
from model import Ranks, UserError, option

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
    path, end = os.path.join(folder, "generation_config.json"), []
    if os.path.exists(path):
        found = qwen.read_json(path).get("eos_token_id")
        end = found if isinstance(found, list) else [] if found is None else [found]
        if not all(isinstance(token, int) for token in end):
            raise UserError(f'{path}: "eos_token_id": an integer or a list of them expected, found {found!r}')
    return Own(qwen.load_model(folder, dtype, device), chat, {chat.im_end, *end}, batch_size)


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
    model that the server lists. Raises UserError where there is none or the server cannot be asked."""
    url = (url or os.environ.get("OPENAI_BASE_URL", "")).rstrip("/")
    if not re.match(r"https?://[^/@\s]+", url):
        raise UserError(f"--server is {url!r}; an address such as http://localhost:8000/v1 expected (or "
                        "OPENAI_BASE_URL)")
    server = Server(url, model, os.environ.get("OPENAI_API_KEY", ""), **settings)
    if not model:
        listed = http(server, "/models").get("data")
        names = [m.get("id") for m in listed if isinstance(m, dict)] if isinstance(listed, list) else []
        if len(names) != 1 or not isinstance(names[0], str):
            raise UserError(f"{url} serves {len(names)} models ({', '.join(map(str, names))[:200]}): choose "
                            "one with --server_model")
        server.model = names[0]
    return server


class Refused(Exception):
    """One request that got no usable answer; the text says why. The others go on."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *_):
        return None


RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 529}
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
    opener, headers = urllib.request.build_opener(NoRedirect), {"Content-Type": "application/json"}
    if server.key:
        headers["Authorization"] = f"Bearer {server.key}"
    content = None if body is None else json.dumps(body).encode()
    for attempt in range(server.tries):
        wait, deadline = 0.0, time.monotonic() + server.timeout
        try:
            request = urllib.request.Request(server.url + path, content, headers)
            with opener.open(request, timeout=server.timeout) as answer:
                value = json.loads(read_all(answer, deadline))
            if isinstance(value, dict):
                return value
            problem = "the answer is no JSON object"
        except urllib.error.HTTPError as e:
            with e:
                detail = e.read(2000).decode(errors="replace").replace(server.key or "\0", "***")
            problem = f"HTTP {e.code}: {' '.join(detail.split())[:300]}"
            if e.code in FATAL:
                raise UserError(f"{server.url}{path}: {FATAL[e.code]} ({problem})") from None
            if e.code not in RETRIED:
                raise Refused(problem) from None
            wait = retry_after(e.headers.get("Retry-After"))
        except TimeoutError:
            problem = f"no answer within {server.timeout:g} s"
        except ValueError:  # also UnicodeDecodeError
            problem = "the answer is no JSON"
        except (OSError, HTTPException) as e:  # URLError is an OSError
            reason = getattr(e, "reason", e)
            problem = f"connection failed: {type(reason).__name__}"
            if isinstance(reason, TimeoutError):
                problem = f"no answer within {server.timeout:g} s"
            nobody_there = isinstance(reason, (ConnectionRefusedError, socket.gaierror))
            if nobody_there and attempt == server.tries - 1:
                raise UserError(f"{server.url} cannot be reached: {reason}. Is the server up? What has "
                                "arrived is kept; the same command goes on from there.") from None
        if attempt < server.tries - 1:
            time.sleep(max(wait, min(60.0, server.pause * 2**attempt) * random.uniform(0.5, 1.0)))
    raise Refused(f"{problem} (tried {server.tries} times)")


def read_all(answer, deadline):
    """The body, unless it is endless in size or in time (a socket's time-out starts anew at each byte)."""
    parts, size = [], 0
    while part := answer.read1(2**16):
        parts.append(part)
        size += len(part)
        if time.monotonic() > deadline:
            raise TimeoutError
        if size > MAX_ANSWER:
            raise Refused(f"an answer of more than {MAX_ANSWER >> 20} MiB")
    if answer.length:  # announced, but not sent
        raise IncompleteRead(b"", answer.length)
    return b"".join(parts)


def retry_after(value) -> float:
    """Seconds that a Retry-After header asks for, as a number or as a date; at most 10 minutes."""
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError):
            seconds = 0.0
    return min(max(seconds, 0.0), 600.0) if seconds == seconds else 0.0


def ask(server: Server, request, sampling: Sampling) -> dict:
    """One chat completion: {"text", "finish": "stop" | "length", "tokens"} or {"error": why}. Settings that
    are None are left to the server; top_k is no key of the OpenAI protocol and goes into Server.body."""
    body = {"model": server.model, "messages": request.messages, "temperature": sampling.temperature,
            "top_p": sampling.top_p, "max_tokens": sampling.max_tokens, "seed": request.seed}
    body = {k: v for k, v in body.items() if v is not None} | server.body
    try:
        answer = http(server, "/chat/completions", body)
        choice = answer["choices"][0]
        text, tokens = choice["message"].get("content"), (answer.get("usage") or {}).get("completion_tokens")
    except Refused as e:
        return {"error": str(e)}
    except (KeyError, IndexError, TypeError, AttributeError):
        return {"error": "the answer is no chat completion"}
    if text is not None and not isinstance(text, str):
        return {"error": f"the answer's content is a {type(text).__name__}, not text"}
    text = (text or "").replace(server.key or "\0", "***").encode(errors="replace").decode()
    finish = "length" if choice.get("finish_reason") == "length" else "stop"
    return {"text": text, "finish": finish, "tokens": tokens if isinstance(tokens, int) else 0}


def concurrently(call, items, workers: int):
    """Yield (item, call(item)) in the order of completion, `workers` calls at a time, taking items as needed.

    The threads are daemons: an interrupt, or an exception of one call (raised here), ends the program at
    once, not after the slowest request.
    """
    todo, ready, items = queue.SimpleQueue(), queue.SimpleQueue(), iter(items)

    def work():
        while (item := todo.get()) is not None:
            try:
                ready.put((item[0], call(item[0]), None))
            except BaseException as e:
                ready.put((item[0], None, e))

    for _ in range(workers):
        threading.Thread(target=work, daemon=True).start()
    try:
        busy = 0
        for item in itertools.islice(items, workers):
            todo.put((item,))
            busy += 1
        while busy:
            item, result, error = ready.get()
            busy -= 1
            if error:
                raise error
            yield item, result
            for item in itertools.islice(items, 1):
                todo.put((item,))
                busy += 1
    finally:
        for _ in range(workers):
            todo.put(None)


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


def read_log(folder: str, keys) -> dict:
    """{key: record} of all raw answers in a folder; a later record of a key replaces an earlier one.

    A last line without its newline was cut off by a kill and does not count. Raises UserError for a broken
    line elsewhere, and for an answer to something that is not asked now.
    """
    records, keys = {}, set(keys)
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "raw-*.jsonl"))):
        with open(path, "rb") as f:
            lines = f.read().split(b"\n")[:-1]
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                key = record["key"]
            except (ValueError, TypeError, KeyError):
                raise UserError(f"{path}, line {number}: not a record of this program; found {line!r:.80}"
                                ) from None
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
        kept = qwen.read_json(path)
        differ = [f"{k} was {kept.get(k)!r}, now {v!r}" for k, v in settings.items() if kept.get(k) != v]
        if differ:
            raise UserError(f"{out} holds work with other settings: choose another --out\n  "
                            + "\n  ".join(differ))
        return
    if os.path.isdir(out) and os.listdir(out):
        raise UserError(f"{out} is not empty and holds no work of this program: choose another --out")
    os.makedirs(out, exist_ok=True)
    qwen.write_json(path, settings)


def write_rows(path, rows):
    """A JSONL file, whole or as it was before."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(path + ".tmp", path)


def sample(policy, requests: list, folder: str, sampling: Sampling, ranks: Ranks,
           title: str = "sampling", on_record=lambda record: {}, enough=None) -> dict:
    """{key: record} for all requests: those of an earlier start from the log, the rest sampled now.

    `policy` is an Own model, a Server, or a function from a Request to a record. Each answer is added to
    folder/raw-RANK.jsonl as it comes, in one write: a kill loses at most what is under way, and the same
    call goes on. Records are {"key", "text", "finish", "tokens"} or {"key", "error"}; failed requests are
    asked again by the next call. Under torchrun each rank takes every world-th request. `on_record(record)`
    sees the answers in the log, then each new one of this rank, and returns a dict for the progress bar;
    once `enough()` is true nothing more is asked (own model: looked at every 512 requests).
    Raises UserError as `http` and `read_log` do.
    """
    if isinstance(policy, Server) and ranks.world > 1:
        raise UserError("a server needs one process here: start with `python`, without torchrun")
    keys = [r.key for r in requests]
    with ranks.together():
        os.makedirs(folder, exist_ok=True)
        have = read_log(folder, keys)
    todo = [r for r in requests if "text" not in have.get(r.key, {})]
    mine = todo[ranks.rank::ranks.world]
    with ranks.together(), open_log(os.path.join(folder, f"raw-{ranks.rank}.jsonl")) as log:
        bar = tqdm(total=len(mine), disable=not ranks.main or not todo, desc=title, unit="answer")
        count, started = Counter(), time.monotonic()
        outcomes = {}
        for key in have:
            outcomes = on_record(have[key])

        def tick(tokens, failed=0):
            count.update(tokens=tokens, failed=failed)
            speed = int(count["tokens"] / (time.monotonic() - started))
            bar.set_postfix({**count, "tokens/s": speed, **outcomes}, refresh=False)
            bar.update(0)

        def keep(request, record):
            nonlocal outcomes
            record = {"key": request.key, **record}
            log.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            outcomes = on_record(record)
            bar.update()

        if isinstance(policy, Own):
            step = 512 if enough else max(1, len(mine))
            for at in range(0, len(mine), step):
                if not (enough and enough()):
                    answer_own(policy, mine[at:at + step], sampling, keep, tick)
        else:
            call, workers = policy, 1
            if isinstance(policy, Server):
                call, workers = lambda request: ask(policy, request, sampling), policy.workers
            wanted = itertools.takewhile(lambda _: not (enough and enough()), mine)
            for request, record in concurrently(call, wanted, workers):
                tick(record.get("tokens", 0), "error" in record)
                keep(request, record)
        bar.close()
    with ranks.together():
        return read_log(folder, keys)


def answer_own(own: Own, requests, sampling, keep, tick):
    """Sample from the model in this process: keep(request, record) as each answer ends, tick(new tokens)."""
    def done(index, ids, ended):
        text, finish = own.chat.tokenizer.decode(ids), "stop" if ended else "length"
        keep(requests[index], {"text": text, "finish": finish, "tokens": len(ids) + ended})

    qwen.generate(own.model, [own.chat.prompt(r.messages) for r in requests], [r.seed for r in requests],
                  max_tokens=sampling.max_tokens, temperature=sampling.temperature, top_p=sampling.top_p,
                  top_k=sampling.top_k, end=own.end, batch_size=own.batch_size, on_done=done, progress=tick)


# --- command line: whom to ask ----------------------------------------------------------------------


@dataclass
class Asking:
    """What both commands share: whom to ask, and how."""

    out: str = option("", "folder to write; an unfinished one is gone on with (required)")
    model: str = option("", "ask this Qwen3 checkpoint (folder or hub id), in this process")
    server: str = option("", "ask an OpenAI-compatible server, http://host:port/v1; key: OPENAI_API_KEY")
    server_model: str = option("", "model name at the server; empty: the only one it serves")
    body: str = option("", "JSON object: more keys of each request to the server")
    workers: int = option(16, "requests to the server at a time")
    request_timeout: float = option(600.0, "seconds a request may take")
    tries: int = option(6, "attempts per request, with growing pauses")
    temperature: float = option(0.7, "0: greedy")
    top_p: float = option(0.8, "keep the likeliest tokens up to this share")
    top_k: int = option(20, "keep that many likeliest tokens; 0: all")
    max_tokens: int = option(32768, "tokens of an answer; longer ones are cut off and counted")
    batch_size: int = option(32, "answers the own model writes at a time")
    dtype: str = option("bfloat16", "of the own model", ("float32", "bfloat16"))
    seed: int = option(0, "of the samples")
    skip_malformed: bool = option(False, "drop and count malformed rows instead of stopping")
    timeout: int = option(86400, "seconds after which a stalled rank ends the run")


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
        if not low <= getattr(o, k) < math.inf:
            problems.append(f"--{k} is {getattr(o, k)}, a number of at least {low} expected")
    if not 0 < o.top_p <= 1:
        problems.append(f"--top_p is {o.top_p}, a share above 0 and up to 1 expected")
    try:
        if not isinstance(json.loads(o.body or "{}"), dict):
            problems.append(f"--body is {o.body!r:.60}, a JSON object expected")
    except ValueError as error:
        problems.append(f"--body is no JSON: {error}")
    return problems


def open_policy(o, default_body, ranks):
    """The Own model or the Server that the options name."""
    if o.server:
        body = json.loads(o.body) if o.body else default_body
        return open_server(o.server, o.server_model, workers=o.workers, timeout=o.request_timeout,
                                      tries=o.tries, body=body)
    return open_own(o.model, getattr(torch, o.dtype), ranks.device, o.batch_size)


# --- grading: which answer does a text commit itself to? ------------------------------------------

# An answer is read into one of three records: a Quantity (a number, an expression, or words), Many of them
# (list, set, union, tuple, interval, matrix) or a Statement about a name (`x = ...`, `x < ...`). Expressions
# are never rewritten: a recursive-descent parser evaluates them at fixed points, in exact fractions while
# that is possible and else in complex floats that carry a bound of their own rounding error. Two values are
# equal if they differ by no more than that bound; there is no other tolerance to tune.
#
# Where this differs from math-verify on purpose: a decimal equals an exact value only as its rounding to six
# or more digits (0.333 is not 1/3), and another decimal only exactly; numbers in a base have a value (10_2
# is 2); {2n \\choose n}, factorials, 1e-5 and -1./3 are read; a unit that one side lacks is forgiven, two
# different units are not; p % equals p and p / 100; a list is a set, order and repetition do not count; of
# several boxes only the last is the answer. Not seen: identities that hold for integers only, unions of
# intervals that touch, and differences of irrational values below double precision.

BOX = re.compile(r"\\f?box(?:ed)?\s*(\{|[^\s{}\\$])")
STATED = re.compile(r"####|\banswers?\b[^.\n:$\\\d]{0,40}?(?:\b(?:is|are|be)\b\s*:?|:|=)", re.I)


def extract_answer(text: str) -> str | None:
    """The final answer of a response: what the last box holds, else what the last "answer is", "Answer:"
    or "####" states, else None. Thinking is no answer: everything up to the last </think> is dropped,
    and a text that ends inside <think> or inside its last box was cut off and has none."""
    text = text.rpartition("</think>")[2]
    boxed, stated = last_boxed(text), [m.end() for m in STATED.finditer(text)]
    if "<think>" in text or boxed is None and not stated:
        return None
    if boxed is None:
        rest = text[stated[-1]:].lstrip("* \t\n").split("\n")[0].split("<|")[0]
        formula = re.match(r"\$[^$]+\$|\\\(.+?\\\)|\\\[.+?\\\]", rest)
        boxed = formula[0] if formula else re.split(r"[.;]\s", rest)[0].strip(".* ")
    return boxed.strip() or None


def last_boxed(text):
    """Contents of the last \\boxed{} or \\fbox{}, braces balanced; "" if it never closes, None if none."""
    boxes = list(BOX.finditer(text))
    if not boxes or boxes[-1][1] != "{":
        return boxes[-1][1] if boxes else None
    depth, start = 0, boxes[-1].start(1)
    for brace in re.finditer(r"\\.|[{}]", text[start:], re.S):  # an escaped brace is no brace
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start + 1:start + brace.start()]
    return ""


# --- grading: text to tokens ----------------------------------------------------------------------

MAX_CHARS, MAX_DEPTH, MAX_BITS, MAX_WORK = 1000, 40, 16_000, 3_000  # beyond these only equal text is equal


class NotMath(ValueError):
    """Not readable as mathematics, or too much work: such an answer equals only the same text."""


def mixed_number(m):
    """1\\frac45 is 1 + 4/5 where the fraction is proper, else a product."""
    top, bottom = (int(x.strip("{}")) for x in m.group(2, 3))
    return f"({m[1]}+{top}/{bottom})" if top < bottom else m[0]


def repeating_decimal(m):
    """0.1\\overline{6} is 16 - 1 by 90."""
    whole, once, again = m.groups()
    top, bottom = int(whole + once + again) - int(whole + once), 10 ** len(once + again) - 10 ** len(once)
    return f"({top}/{bottom})"


REWRITES = [(re.compile(pattern, re.S), new) for pattern, new in [
    (r"\\(?:text|mbox|mathrm|operatorname)\w*\s*\{([^{}\"]*)\}", r' "\1" '),  # kept apart: may be a unit
    (r"\\(?:left|right)\s*\.|\\(?:begin|end)\{(?:aligned|equation)\*?\}", " "),
    (r"\\begin\s*\{(?:[pbB]?matrix|array)\}(?:\s*\{[^{}]*\})?", " ⟦ "),
    (r"\\end\s*\{(?:[pbB]?matrix|array)\}", " ⟧ "),
    (r"(?<=\d)(?:\{,\}|,\\!|\\[,! ])\s*(?=\d{3}(?!\d))", ""),  # 10{,}000   11,\! 111   1\,000
    (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree", "°"),
    (r"\^\s*(?:\{\s*\\prime\s*\}|\\prime)", "'"),
    (r"\\mathbb\s*\{?\s*R\s*\}?|\ball real numbers\b", r"(-\\infty,\\infty)"),
    (r"\\(?:emptyset|varnothing)|\\\{\s*\\\}", " emptyset "),
    (r"(?<![\w.^}])(\d{1,9})\s*\\[dtc]?frac\s*(\{\d{1,9}\}|\d)\s*(\{\d{1,9}\}|\d)", mixed_number),
    (r"(?<![\w.^])(\d{1,9}) +(\d{1,9})/(\d{1,9})(?![\d.])", mixed_number),
    (r"(?<![\w.])(\d{1,9})\.(\d{0,9})\\overline\s*\{(\d{1,9})\}", repeating_decimal),
    (r"\((\d+)\)_", r"\1_"),
    (r"\^\s*(\{[^{}]*\}|\w)\s*_\s*(\{[^{}]*\}|\w)", r"_\2^\1"),  # v^2_0
    (r"\b(?:np|math)\.(?=[a-z])", ""),
]]
TOKEN = re.compile(r'"[^"]*"|\\[A-Za-z]+|\\.|\d+_(?:\d+|\{\d+\})|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?'
                   r"|[A-Za-z]+|\*\*|<=|>=|!=|\S", re.S)
SAME_TOKEN = {old: new for new, olds in {
    "": r"\left \right \big \Big \bigg \Bigg \bigl \bigr \Bigl \Bigr \displaystyle \limits"
        r" \mathbf \mathit \mathcal \boldsymbol \quad \qquad \, \; \: \! \( \) \[ \] \$ $ £ € ~ \boxed \fbox",
    ",": r"and or \lor \land", "-": "− –", "*": r"\cdot \times × ·", "/": r"\div ÷", "^": "**", "±": r"\pm",
    "∓": r"\mp", "%": r"\% percent percentage", "°": "degree degrees", "<": r"\lt", ">": r"\gt",
    "≤": r"\le \leq \leqslant <=", "≥": r"\ge \geq \geqslant >=", "≠": r"\ne \neq !=", "≈": r"\approx \simeq",
    "∈": r"\in", "∪": r"\cup", "|": r"\lvert \rvert \vert \mid", "(": r"\langle", ")": r"\rangle",
    "⦃": r"\{ \lbrace", "⦄": r"\} \rbrace", "⌊": r"\lfloor", "⌋": r"\rfloor", "⌈": r"\lceil", "⌉": r"\rceil",
    "frac": r"\dfrac \tfrac \cfrac", "binom": r"\dbinom \tbinom", "sqrt": "√", "pi": "π",
    "infty": "∞ infinity inf oo", "arcsin": "asin", "arccos": "acos", "arctan": "atan",
    r"\theta": "θ", r"\phi": r"\varphi", r"\epsilon": r"\varepsilon",
}.items() for old in olds.split()}
FUNCTIONS = {name: getattr(cmath, name) for name in "sin cos tan sinh cosh tanh exp log".split()} | {
    "arcsin": cmath.asin, "arccos": cmath.acos, "arctan": cmath.atan, "ln": cmath.log, "lg": cmath.log10,
    "sec": lambda x: 1 / cmath.cos(x), "csc": lambda x: 1 / cmath.sin(x), "cot": lambda x: 1 / cmath.tan(x)}
CONSTANTS = {"pi": math.pi, "e": math.e, "i": 1j}
KNOWN = {*FUNCTIONS, *CONSTANTS, "frac", "binom", "sqrt", "choose", "infty", "emptyset"}
ACCENTS = {"\\" + name for name in "dot ddot hat bar vec overline tilde angle triangle".split()}
NAMES = ACCENTS | {"\\" + name for name in (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi"
    " psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega hbar ell").split()}
SHORT_UNITS = set("cm mm km kg ft in mi yd hr min mph lb oz sq day way".split())  # any longer word is one


def tokenize(text: str) -> list[str]:
    """LaTeX or plain text to canonical tokens. A unit, as in 12 cm, becomes '"cm'. NotMath if too long."""
    if len(text) > MAX_CHARS:
        raise NotMath("too long")
    if "\\begin" not in text:  # `\\frac`, a command escaped twice; in a matrix `\\` ends a row
        text = re.sub(r"\\\\(?=[A-Za-z(){}\[\]])", r"\\", text)
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    if not re.search(r"[(\[]|\\\{", text):  # inside brackets a comma separates: (100,200) is a point
        text = re.sub(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])", lambda m: m[0].replace(",", ""), text)
    tokens = []
    for raw in TOKEN.findall(text):
        quoted, bare, before = raw[0] == '"', raw.removeprefix("\\"), tokens[-1] if tokens else " "
        word = raw.strip('" ') if quoted or raw.isalpha() else ""
        token = bare if bare in KNOWN else SAME_TOKEN.get(word.lower() or raw, raw)
        after_number = before[0] == '"' or before == "pi" or before[-1] in "0123456789)]}!"
        if not word or token != raw or word in KNOWN and not quoted:
            tokens += [token] * (token == "\\\\" or token.strip('\\" \n\t') != "")
        elif after_number and word not in CONSTANTS and (
                quoted or before[0] == '"' or len(word) > 3 or word in SHORT_UNITS):
            tokens.append('"' + word)
        else:
            tokens += tokenize(word) if quoted else [token]
    return tokens


# --- grading: tokens to values --------------------------------------------------------------------

# A value is a list over the points below (of length 1 if no name occurs) of: a Fraction; or a complex
# number, a bound of its error and whether all that led to it was real; or None, undefined.
EPS = 2.0**-51
# (low, high, denominator): small, medium, an integer, large, of either sign: |x| is not x, and
# floor(x / 100) is not always 0.
POINTS = [(0, 1, 89), (0, 1, 97), (1, 6, 83), (1, 9, 101), (2, 13, 1), (10, 900, 7), (-9, 9, 103),
          (-3, 3, 107)]


@lru_cache(256)
def opaque(name):
    """The values of a name: fixed by its bytes alone, so that a verdict never changes between runs."""
    seeds = [zlib.crc32(f"{k} {name}".encode(errors="backslashreplace")) for k in range(len(POINTS))]
    return [low + Fraction(1 + seed % ((high - low) * parts - 1), parts)
            for seed, (low, high, parts) in zip(seeds, POINTS)]


def real(x):
    if x.imag:
        raise ValueError("real numbers only")
    return x.real


def root(x, n):  # odd roots of negative numbers are real
    odd = x.real < 0 and not x.imag and n.real % 2 == 1
    return -((-x) ** (1 / n)) if odd else x ** (1 / n)


def binomial(n, k):
    return math.gamma(real(n) + 1) / math.gamma(real(k) + 1) / math.gamma(real(n - k) + 1)


def small(*args):
    return all(x.denominator == 1 and 0 <= x <= 1000 for x in args)


ARITHMETIC = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "|": abs}
EXACT = ARITHMETIC | {  # None: only a float can do
    "^": lambda x, n: x ** int(n) if n.denominator == 1 and bits(x) * abs(n) <= MAX_BITS else None,
    "!": lambda n: Fraction(math.factorial(int(n))) if small(n) else None,
    "binom": lambda n, k: Fraction(math.comb(int(n), int(k))) if small(n, k) else None,
    "⌊": lambda x: Fraction(math.floor(x)), "⌈": lambda x: Fraction(math.ceil(x))}
FLOAT = ARITHMETIC | FUNCTIONS | {
    "^": operator.pow, "sqrt": root, "binom": binomial, "!": lambda x: math.gamma(real(x) + 1),
    "⌊": lambda x: math.floor(real(x) + 1e-9), "⌈": lambda x: math.ceil(real(x) - 1e-9)}


def bits(x):
    return max(x.numerator.bit_length(), x.denominator.bit_length()) if isinstance(x, Fraction) else 0


def inexact(x):
    """A Fraction as a float value; its error is 0 where it is exact, so that 3 stays an odd number."""
    if not isinstance(x, Fraction):
        return x
    if x and not float(x):
        raise ArithmeticError("underflow")
    return complex(x), EPS * abs(float(x)) * (float(x) != x), True


def at_point(op, args):
    """One operation at one point. The error of a float result is its own rounding and what the errors of
    the arguments do to it, found by trying."""
    if op in EXACT and all(isinstance(x, Fraction) for x in args):
        result = EXACT[op](*args)
        if result is not None and bits(result) <= MAX_BITS:
            return result
    args = [inexact(x) for x in args]
    f, plain = FLOAT[op], [x for x, _, _ in args]
    value = complex(f(*plain))
    error = EPS * abs(value)
    for i, (x, dx, _) in enumerate(args):
        error += abs(f(*plain[:i], x + dx, *plain[i + 1:]) - value) if dx else 0
    underflow = value == 0 and all(plain) and op in ("*", "/", "^", "exp")
    if underflow or not cmath.isfinite(value) or not error <= max(1e-7 * abs(value), 1e-9):
        raise ArithmeticError("no digit of this is certain")
    return value, error, all(real for _, _, real in args) and abs(value.imag) <= 8 * error


def apply(work, op, *args):
    """`op` at all points; None where an argument is, and where the operation is undefined."""
    out = []
    for k in range(max(map(len, args))):
        here = [a[k % len(a)] for a in args]
        spend(work, 1 + (sum(map(bits, here)) // 800) ** 2)  # long fractions cost their length squared
        try:
            out.append(None if None in here else at_point(op, here))
        except (ValueError, ArithmeticError):
            out.append(None)
    return out


def spend(work, units):
    work[0] -= units
    if work[0] < 0:
        raise NotMath("too much work")


@dataclass
class Cursor:
    """Where the parser stands in an expression. `work` is what it may still spend, shared by all parts."""

    tokens: list
    work: list
    at: int = 0
    depth: int = 0
    bars: int = 0  # |...| now open
    angle: bool = False  # inside a function's argument: there a degree is pi/180, else it is a unit

    def peek(self):
        return self.tokens[self.at] if self.at < len(self.tokens) else " "

    def take(self):
        self.at += 1
        return self.tokens[self.at - 1] if self.at <= len(self.tokens) else " "


def evaluate(tokens: list, work: list) -> list:
    """The value of an expression; raises NotMath where it is none."""
    c = Cursor(list(tokens), work)
    value = parse(c)
    if c.at < len(c.tokens):
        raise NotMath("tokens left over")
    return value


BINDING = {"+": 1, "-": 1, "*": 2, "/": 2, "^": 4, "!": 5, "°": 5}  # a sign binds as 3: -x^2 is -(x^2)
ATOM = 5  # nothing binds tighter


def parse(c, floor=0):
    """The longest expression from here whose operators all bind tighter than `floor`."""
    c.depth += 1  # every recursion of the parser passes here
    if c.depth > MAX_DEPTH:
        raise NotMath("too deep")
    negative = False
    while c.peek() in ("+", "-"):
        negative ^= c.take() == "-"
    value = parse(c, 3) if negative else parse_atom(c)
    value = apply(c.work, "-", [Fraction(0)], value) if negative else value
    while BINDING.get(c.peek(), 2 * starts_atom(c)) > floor:
        op = c.take() if c.peek() in BINDING else "*"
        if op == "*" and c.peek()[0].isdigit() and c.tokens[c.at - 1][0].isdigit():
            raise NotMath("two numbers side by side")
        if op == "°":
            value = apply(c.work, "*", value, [(math.pi / 180, EPS, True)]) if c.angle else value
        else:
            value = apply(c.work, op, value, *([] if op == "!" else [parse(c, min(BINDING[op], 3))]))
    c.depth -= 1
    return value


def starts_atom(c):
    token = c.peek()
    return token[0].isalnum() and token != "choose" or token in NAMES or token in tuple("([{⌊⌈") or (
        token == "|" and not c.bars)


def parse_atom(c):
    token = c.take()
    if token in CLOSE:
        return parse_group(c, token)
    if token[0].isdigit() or token[0] == "." and len(token) > 1:
        return [number(token)]
    if token in CONSTANTS:
        return [(CONSTANTS[token], EPS, token != "i")]
    if token == "sqrt":
        degree = parse_group(c, c.take()) if c.peek() == "[" else [Fraction(2)]
        return apply(c.work, "sqrt", parse(c, ATOM), degree)
    if token in ("frac", "binom"):
        return apply(c.work, "/" if token == "frac" else token, parse_argument(c), parse_argument(c))
    return parse_function(c, token) if token in FUNCTIONS else parse_name(c, token)


def parse_group(c, opening):
    bars, c.bars = c.bars, opening == "|"
    value = parse(c)
    if c.peek() == "choose":
        c.take()
        value = apply(c.work, "binom", value, parse(c))
    c.bars = bars
    if c.take() != CLOSE[opening]:
        raise NotMath("a bracket is open")
    return apply(c.work, opening, value) if opening in "|⌊⌈" else value


def parse_argument(c):
    """What \\frac takes: a group, else one digit (the 1 of \\frac12), else an atom."""
    token = c.peek()
    if len(token) > 1 and token.isdigit():
        c.tokens[c.at:c.at + 1] = [token[0], token[1:]]
    return parse(c, ATOM)


def number(token):
    """An exact literal: digits, a decimal, 4.5e33, or digits in a base, 10_2."""
    digits, _, base = token.partition("_")
    try:
        if len(token.lower().partition("e")[2]) > 4:
            raise ValueError("huge")
        return Fraction(int(digits, int(base.strip("{}")) or -1) if base else token)  # base 0 would guess
    except ValueError:  # or 9_8
        raise NotMath("no number") from None


def parse_function(c, name):
    power = base = None
    while c.peek() in ("^", "_"):
        if c.tokens[c.at:c.at + 5] == ["^", "{", "-", "1", "}"] and "arc" + name in FUNCTIONS:
            name, c.at = "arc" + name, c.at + 5
        elif c.take() == "^":
            power = parse_argument(c)
        else:
            base = parse_argument(c)
    angle, c.angle = c.angle, True
    if c.peek() in CLOSE:
        value = parse(c, ATOM)
    else:  # without brackets the argument is a product: \sin 2 t \cos t
        value = parse(c, 2)
        while starts_atom(c) and c.peek() not in FUNCTIONS and c.peek() != "(":
            value = apply(c.work, "*", value, parse(c, 2))
    c.angle = angle
    value = apply(c.work, name, value)
    if base:
        value = apply(c.work, "/", value, apply(c.work, "ln", base))
    return apply(c.work, "^", value, power) if power else value


def parse_name(c, token):
    """A variable with subscripts and primes; a short word is a product of letters, a long one a name."""
    if token.isalpha() and 1 < len(token) < 4 and token not in KNOWN:
        c.tokens[c.at:c.at] = [token[1:]]
        token = token[0]
    elif token in ACCENTS:
        token += raw_group(c)
    elif not (token.isalpha() or token in NAMES):
        raise NotMath(f"{token!r} is no operand")
    while c.peek() in ("_", "'"):
        token += raw_group(c) if c.take() == "_" else "'"
    if re.match(r"\(" if token[0] in "fghFG" else r"\(\d+\)", "".join(c.tokens[c.at:c.at + 3])):
        token += raw_group(c)  # f(x) and I(0) are no products
    return opaque(token)


def raw_group(c):
    end = c.at + closing(c.tokens[c.at:]) + 1
    text, c.at = "".join(c.tokens[c.at:end]), end
    return text.strip("{}").replace("\\", "")


# --- grading: tokens to an answer -----------------------------------------------------------------

CLOSE = dict(zip("([{|⌊⌈⦃⟦", ")]}|⌋⌉⦄⟧"))
OPENING, CLOSING = set("([{⌊⌈⦃⟦"), set(")]}⌋⌉⦄⟧")
RELATIONS = tuple("=<>≤≥≠≈∈")
_NAME = (r"(?:[A-Za-z]|[A-Za-z]{4,}|\\[a-z]+(?:\{\w+\})?)'*(?:_(?:\w|\\[a-z]+|\{[^{}]*\}))?'*"
         r"(?:\^\{-1\})?(?:\([^()=]*\))?")
NAME = re.compile(rf"{_NAME}|\({_NAME}(?:,{_NAME})+\)|[A-Z]{{2,3}}|\|\w+\||\\angle\w+(?:_\{{?\w\}}?)?"
                  r"|frac\{[A-Za-z]+\}\{[A-Za-z]+\}")
DECIMAL = re.compile(r"[+-]?(\d*)\.(\d+)(?:[eE]([+-]?\d{1,3})|\*10\^\{?([+-]?\d{1,3})\}?)?")
UNIT = re.compile(r'(?:"[^"^{}+\-\d\\]+(?:\^\{?-?\d\}?)?)+')
THOUSANDS = re.compile(r"\d{1,3}(?:,[1-9]\d\d)+")
PROSE = re.compile(r"^(?=[^$\\\d]*[A-Za-z]{2})[^$\\\d]*(?=\$|\\\(|\\\[)"
                   r"|(?<=[$)\]])\.?\s+(?:is|are|holds?|will|was|were|as)\b[^$\\]*$")


@dataclass
class Quantity:
    """A number or expression (`values`), or words and whatever else could not be read (None)."""

    text: str
    values: list | None = None
    unit: str = ""
    percent: bool = False
    decimal: bool = False  # written as a decimal
    ulp: Fraction | None = None  # one in its last place, if it shows enough digits to be a rounded value


@dataclass
class Many:
    """Several answers: order "" is a list, a set or a union; else the brackets, "matrix" or "row"."""

    items: list
    order: str = ""


@dataclass
class Statement:
    """`name = value` or `name ∈ value` (x < 5 too); any other equation or inequality by its two sides."""

    relation: str
    name: str | None = None
    value: object = None
    sides: tuple = ()


def depths(tokens):
    depth = 0
    for token in tokens:
        depth += (token in OPENING) - (token in CLOSING)
        yield depth


def closing(tokens):
    """Where the bracket closes that the first token opens."""
    return next((i for i, depth in enumerate(depths(tokens)) if depth <= 0), len(tokens))


def split(tokens, separators):
    """The non-empty parts between separators outside brackets, and the separators."""
    cuts = [i for i, depth in enumerate(depths(tokens)) if depth == 0 and tokens[i] in separators]
    parts = [tokens[i + 1:j] for i, j in zip([-1, *cuts], [*cuts, len(tokens)])]
    return [p for p in parts if p], [tokens[i] for i in cuts]


def read(tokens: list, work: list, depth: int = 0):
    """Tokens to a Quantity, Many or a Statement; raises NotMath where that takes too much work."""
    while tokens and tokens[-1] in (".", ",", ";", ":"):
        tokens = tokens[:-1]
    if not tokens or depth > MAX_DEPTH:
        raise NotMath("nothing there, or too deep")
    spend(work, 4 + len(tokens) // 2)
    for separator in (";", ",", "∪"):
        parts = split(tokens, (separator,))[0]
        if len(parts) > 1:
            return Many([x for p in parts for x in members(p, read(p, work, depth + 1), separator == "∪")])
    if split(tokens, RELATIONS)[1]:
        return read_statement(tokens, work, depth)
    inside, brackets = tokens[1:-1], tokens[0] + tokens[-1]
    if closing(tokens) == len(tokens) - 1 and inside:
        if brackets == "⟦⟧":
            rows = [split(row, ("&",))[0] for row in split(inside, ("\\\\",))[0]]
            return Many([Many([read(x, work, depth + 1) for x in row], "row") for row in rows], "matrix")
        parts = split(inside, (",", ";"))[0]
        builder = split(inside, ("|", ":"))[0]
        if brackets == "⦃⦄" and len(builder) == 2 and NAME.fullmatch("".join(builder[0])):  # {x | x > 3}
            return read(builder[1], work, depth + 1)
        if brackets == "⦃⦄" or brackets == "{}" and len(parts) > 1:
            return Many([x for p in parts for x in members(p, read(p, work, depth + 1), False)])
        if brackets in ("()", "[]", "(]", "[)") and "±" not in tokens:
            items = [read(p, work, depth + 1) for p in parts]
            return items[0] if len(items) == 1 else Many(items, brackets)
    if "±" in tokens:
        signs = {"±": "+-", "∓": "-+"}
        both = [[signs[t][i] if t in signs else t for t in tokens] for i in (0, 1)]
        return Many([read(x, work, depth + 1) for x in both])
    return read_quantity(tokens, work)


def members(tokens, answer, spread):
    """What a part adds to a list: a set is one member of it, but 1 ± x is two, and a union joins sets."""
    spread = spread or "±" in tokens and tokens[0] != "⦃"
    return answer.items if spread and isinstance(answer, Many) and not answer.order else [answer]


def read_statement(tokens, work, depth):
    parts, relations = split(tokens, RELATIONS)
    if len(parts) == 1 and tokens[0] in ("=", "≈"):  # = 5
        return read(parts[0], work, depth + 1)
    if len(parts) != len(relations) + 1:
        raise NotMath("one side of a relation is empty")
    named = [NAME.fullmatch("".join(p)) is not None for p in parts]
    if "≈" in relations and not named[0]:  # pi/2 ≈ 1.57: the exact side is the answer
        return read(tokens[:tokens.index("≈")], work, depth + 1)
    if set(relations) <= {"=", "≈"}:
        left, right = (parts[-1], parts[0]) if named[-1] and not named[0] else (parts[0], parts[-1])
        if not any(t.isalpha() and t not in KNOWN or t in NAMES for t in left):  # 2 + 3 = 5
            return read(right, work, depth + 1)
        if any(named) or len(parts) > 2:
            return Statement("=", plain(left), read(right, work, depth + 1), (left, right))
        return Statement("=", sides=(left, right))
    if relations == ["∈"]:
        return Statement("∈", plain(parts[0]), read(parts[1], work, depth + 1))
    if set(relations) <= {">", "≥"}:
        parts, named = parts[::-1], named[::-1]
        relations = [{">": "<", "≥": "≤"}[r] for r in reversed(relations)]
    if set(relations) <= {"<", "≤"} and any(named) and len(parts) == 2:  # x < 5 says x in (-oo, 5)
        parts, relations = (([["-", "infty"], *parts], ["<", *relations]) if named[0]
                            else ([*parts, ["infty"]], [*relations, "<"]))
    if set(relations) <= {"<", "≤"} and len(parts) == 3:
        order = "(["[relations[0] == "≤"] + ")]"[relations[1] == "≤"]
        ends = [read(p, work, depth + 1) for p in (parts[0], parts[2])]
        return Statement("∈", plain(parts[1]), Many(ends, order))
    if len(parts) != 2:
        raise NotMath("a chain of mixed relations")
    return Statement(relations[0], sides=tuple(parts))


def plain(tokens):
    return re.sub(r"[{}\\]", "", "".join(tokens))


def read_quantity(tokens, work):
    at = next((i for i, t in enumerate(tokens) if t[0] == '"'), len(tokens))
    head, unit = tokens[:at], plain(tokens[at:]).replace('"', "").lower()
    words = [t for t in head if t.isalpha() and len(t) > 2 and t not in KNOWN]
    if len(words) > 1 or head == words or len(head) == 1 and head[0].lower() == "no":
        return Quantity(" ".join(t for t in tokens if t.lower() not in ("the", "an", "a")).casefold())
    answer = Quantity(re.sub(r"\{ (\S+) \}", r"\1", " ".join(tokens)), unit=unit, percent=head[-1:] == ["%"])
    head = head[:-1] if answer.percent else head
    if unit and not UNIT.fullmatch("".join(tokens[at:])):  # 5 cm - 3
        return answer
    try:
        answer.values = evaluate(head, work)
    except NotMath:
        spend(work, 0)  # only where it was too much work, it goes on
    if m := DECIMAL.fullmatch("".join(head)):
        answer.decimal = True
        if answer.values and len((m[1] + m[2]).lstrip("0")) >= 6:
            last_place = Fraction(10) ** (int(m[3] or m[4] or 0) - len(m[2]))
            answer.ulp = max(last_place, abs(answer.values[0]) / 10**15)
    return answer


# --- grading: are two answers the same? -----------------------------------------------------------


def answers_match(pred: str, gold: str) -> bool:
    """Whether two answers are equal as mathematics (see the head of this file). Symmetric; takes any
    strings, never raises, and does a bounded amount of work; an empty answer matches nothing."""
    pred, gold = bare_answer(pred), bare_answer(gold)
    if not pred or not gold or pred.split() == gold.split():
        return bool(pred and gold)
    work = [MAX_WORK]
    try:
        if same(read_answer(pred, work), read_answer(gold, work), work):
            return True
        # 100,200 is a number, but may be two where the other answer is a list
        if (THOUSANDS.fullmatch(pred) is None) == (THOUSANDS.fullmatch(gold) is None):
            return False
        pred, gold = pred.replace(",", ", "), gold.replace(",", ", ")
        return "," in pred and "," in gold and same(read_answer(pred, work), read_answer(gold, work), work)
    except (NotMath, ArithmeticError):  # too much work, or an exact value that no float can hold
        return False


def bare_answer(text):
    """What the box holds; without dollars, and without prose before the formula or after it."""
    text = last_boxed(text) or text
    return (PROSE.sub("", text) if len(text) <= MAX_CHARS else text).strip("$* \t\n")


def read_answer(text, work):
    tokens = [text]
    try:
        tokens = tokenize(text)
        return read(tokens, work)
    except NotMath:
        spend(work, 0)
        return Quantity(" ".join(tokens))


def same(a, b, work) -> bool:
    spend(work, 1)
    if isinstance(b, Statement) and not isinstance(a, Statement):
        a, b = b, a
    if isinstance(a, Statement):
        if not isinstance(b, Statement):
            return a.value is not None and same(a.value, b, work)  # "x = 5" and "5" answer alike
        if a.relation == b.relation and a.name and a.name == b.name:
            return same(a.value, b.value, work)
        return a.relation == b.relation and proportional(a.sides, b.sides, a.relation in "<≤", work)
    if isinstance(a, Quantity) and isinstance(b, Quantity):
        return same_quantity(a, b, work)
    orders = [getattr(x, "order", "") for x in (a, b)]
    if all(orders):
        alike = orders[0] == orders[1] or len(a.items) > 2 and "matrix" not in orders  # [1,2,3] is (1,2,3)
        return alike and pairwise(a, b, work)
    row, loose = (a, b) if orders[0] else (b, a)
    if any(orders):
        if isinstance(loose, Quantity):
            return False
        if len({x.name for x in loose.items if isinstance(x, Statement)}) == len(loose.items):
            return pairwise(row, loose, work)  # x = 2, y = 3 is (2, 3)
    a, b = listed(a), listed(b)
    return (all(any(same(x, y, work) for y in b) for x in a)
            and all(any(same(x, y, work) for x in a) for y in b))


def pairwise(a, b, work):
    return len(a.items) == len(b.items) and all(same(x, y, work) for x, y in zip(a.items, b.items))


def listed(answer):
    """The members of a list; x = ±3 among them counts as two."""
    if not isinstance(answer, Many) or answer.order:
        return [answer]
    values = [x.value if isinstance(x, Statement) else None for x in answer.items]
    return [y for x, value in zip(answer.items, values)
            for y in (value.items if isinstance(value, Many) and not value.order else [x])]


def same_quantity(a, b, work):
    if a.values is None or b.values is None:
        return a.values is b.values and a.text == b.text
    short, long = sorted((a.unit, b.unit), key=len)
    if not re.match(".*".join(map(re.escape, short)), long):  # cm abbreviates centimeters
        return False
    if agree(a.values, b.values) or is_rounded(a, b) or is_rounded(b, a):
        return True
    share, other = (a, b) if a.percent else (b, a)
    return a.percent != b.percent and agree(apply(work, "/", share.values, [Fraction(100)]), other.values)


def is_rounded(a, b):
    """Whether the decimal a shows b to all of its digits, six or more. Two decimals are compared exactly."""
    if a.ulp is None or b.decimal or len(b.values) > 1 or b.values[0] is None:
        return False
    value, error = b.values[0][:2] if isinstance(b.values[0], tuple) else (b.values[0], 0)
    return abs(a.values[0] - value) < a.ulp + error


def agree(u, v):
    """Whether two values are equal at all points where both are defined. Where some are real, only those
    count: sqrt(x) sqrt(y) is sqrt(xy) there, and nobody asks about the other branch."""
    n = max(len(u), len(v))
    pairs = [(u[k % len(u)], v[k % len(v)]) for k in range(n)]
    pairs = [p for p in pairs if None not in p]
    on_reals = [p for p in pairs if all(isinstance(x, Fraction) or x[2] for x in p)]
    pairs = on_reals if len(on_reals) >= 3 else pairs
    return len(pairs) >= min(n, 3) and all(close(x, y) for x, y in pairs)


def close(x, y):
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    (x, dx, _), (y, dy, _) = inexact(x), inexact(y)
    return abs(x - y) <= 8 * (dx + dy)


def proportional(a, b, keep_sign, work):
    """Whether two equations (or inequalities) are one: (left - right) of the one is a fixed multiple of the
    other's, with keep_sign a positive one."""
    if not a or not b:
        return False
    try:
        differences = [apply(work, "-", *(evaluate(side, work) for side in sides)) for sides in (a, b)]
    except NotMath:
        return False
    ratios = [r for r in apply(work, "/", *differences) if r is not None]
    ratio = inexact(ratios[0])[0] if len(ratios) >= 3 and agree(ratios[:1], ratios) else 0
    return ratio.real > 0 if keep_sign else ratio != 0


# --- IFEval: was an instruction followed that a program can check? --------------------------------

# The 25 kinds of google-research's instruction_following_eval by its rules, odd ones included. Its regular
# expressions are rewritten where a long response would make them quadratic, with the same matches.
#
# Where a verdict can differ from the official checker:
# - language (langdetect there): the script with the most letters, and in it the language of which the most
#   words are in LANGUAGES, by default the script's first. Other languages, a few words (langdetect's guess
#   is not even the same in each run) and text that is mostly formulas or names can be read otherwise.
# - sentences (nltk's punkt there): after an abbreviation or an ellipsis a sentence ends before a capitalised
#   word of STARTERS; punkt looks every word up in what it was trained on. So too after `A.` and the like.
# - words in capitals (nltk there): its tokens as far as CAPITALS_BREAK knows them.
# - keywords are regular expressions; those that could run away, or fail there, are literal text here.
# - arguments that are missing, None or out of range: drawn at random there, refused here.

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
    literal = re.search(r"[*+{(|]", text) or text.count("?") > 3
    try:
        return re.compile(before + (re.escape(text) if literal else text) + after, flags)
    except re.error:
        return re.compile(before + re.escape(text) + after, flags)


def compare(count, relation, threshold):
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

    Strict: on the response as it is. Loose: on any of eight texts: the response whole, without its first
    line, its last, or both, each also without `*`. An empty text follows nothing. An argument that is None is
    absent. Raises UserError that names the instruction and its wrong, missing or unknown arguments."""
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
        strict.append(any(check(text, **given) for text in variants if text == response))
        loose.append(strict[-1] or any(check(text, **given) for text in variants))
    return strict, loose

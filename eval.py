"""Sampling and grading: what a model answers, and whether it is right.

Comes in:  questions as chat messages and a model, our own or one behind an OpenAI-compatible server; the
           text of a response, and a gold answer as the benchmark files write it (LaTeX or plain).
Goes out:  `sample`: every answer, kept in a log as it comes; `extract_answer`: the answer that a text
           commits itself to, or None; `answers_match`: True or False; rows, prompts and graders of the
           tasks (math, Connect4, GPQA); means with honest error bars.
"""

import cmath
import email.utils
import fcntl
import glob
import hashlib
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
from numbers import Real

import numpy as np
from tqdm import tqdm

import data
import model as qwen
from model import Ranks, UserError

# --- sampling: the own model or a server, every answer kept as it comes ---------------------------


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
    batch_size: int = 32


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
        for key in have:
            on_record(have[key])

        def keep(request, record):
            record = {"key": request.key, **record}
            log.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            count.update(tokens=record.get("tokens", 0), failed="error" in record)
            speed = int(count["tokens"] / (time.monotonic() - started))
            bar.set_postfix({**count, "tokens/s": speed, **on_record(record)}, refresh=False)
            bar.update()

        if isinstance(policy, Own):
            for at in range(0, len(mine), 512):
                if not (enough and enough()):
                    answer_own(policy, mine[at:at + 512], sampling, keep)
        else:
            call, workers = policy, 1
            if isinstance(policy, Server):
                call, workers = lambda request: ask(policy, request, sampling), policy.workers
            wanted = itertools.takewhile(lambda _: not (enough and enough()), mine)
            for request, record in concurrently(call, wanted, workers):
                keep(request, record)
        bar.close()
    with ranks.together():
        return read_log(folder, keys)


def answer_own(own: Own, requests, sampling, keep):
    """Sample from the model in this process; keep(request, record) as each answer ends."""
    def done(index, ids, ended):
        text, finish = own.chat.tokenizer.decode(ids), "stop" if ended else "length"
        keep(requests[index], {"text": text, "finish": finish, "tokens": len(ids) + ended})

    qwen.generate(own.model, [own.chat.prompt(r.messages) for r in requests], [r.seed for r in requests],
                  max_tokens=sampling.max_tokens, temperature=sampling.temperature, top_p=sampling.top_p,
                  top_k=sampling.top_k, end={own.chat.im_end}, batch_size=own.batch_size, on_done=done)


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
        parts = row["final_answer"]
        if not isinstance(parts, list) or not parts or not all(isinstance(x, str) for x in parts):
            raise UserError(f"'final_answer': a list of strings expected, found {parts!r:.60}")
        key, value = "final_answer", ", ".join(parts)
    else:
        keys = ("answer", "solution", "ground_truth", "label")
        key = next((k for k in keys if row.get(k) is not None), None)
        value = row.get(key)
        if key is None and isinstance(row.get("reward_model"), dict):
            key, value = "reward_model.ground_truth", row["reward_model"].get("ground_truth")
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
    tolerance) and unit. Leading zeros (AIME) and floats (AMC) need no care: answers are compared as numbers.
    Raises UserError naming the field."""
    text = gold_answer(row)
    if row.get("final_answer") is None:  # elsewhere `error` and `unit` may be anything
        return Gold(text)
    several, unit, error = (row.get(k) for k in ("is_multiple_answer", "unit", "error"))
    if not isinstance(several, bool | None):
        raise UserError(f"'is_multiple_answer': true or false expected, found {several!r:.60}")
    if not isinstance(unit, str | None):
        raise UserError(f"'unit': a string or null expected, found {unit!r:.60}")
    several = bool(several) or len(row["final_answer"]) > 1
    if several:
        text = re.sub(r"(?<!\{),\s*", ", ", text)  # 5,150 are two answers here
    try:
        tolerance = Fraction(str(float(str(error or 0))))  # "1e-1" is 1/10; the float bounds the work
    except ValueError:
        tolerance = Fraction(-1)
    if tolerance < 0:
        raise UserError(f"'error': one positive number or null expected, found {error!r:.60}")
    return Gold(f"{text} {(unit or '').strip('$ ')}".strip(), several, tolerance)


def grade_math(text: str, gold: Gold) -> bool:
    """Whether a response ends in the right answer. Several answers may also stand in several boxes, if
    those are in one line, the last that has a box."""
    found = extract_answer(text)
    if found is None:
        return False
    answers = [found]
    if gold.several:
        line = ([""] + [x for x in text.rpartition("</think>")[2].split("\n") if BOX.search(x)])[-1]
        at = [m.start() for m in BOX.finditer(line)]
        answers.append(", ".join(last_boxed(line[i:j]) for i, j in zip(at, [*at[1:], None])))
    return any(answers_match(x, gold.text) or gold.tolerance > 0 and within(x, gold) for x in answers)


def within(pred, gold):
    """Whether every number of the one is near one of the other, and the reverse."""
    try:
        p, g = (listed(read_answer(bare_answer(x), [MAX_WORK])) for x in (pred, gold.text))
        return (all(any(near(x, y, gold.tolerance) for y in g) for x in p)
                and all(any(near(x, y, gold.tolerance) for x in p) for y in g))
    except (NotMath, ArithmeticError):
        return False


def near(a, b, tolerance):
    a, b = (x.value if isinstance(x, Statement) else x for x in (a, b))
    if not all(isinstance(x, Quantity) and x.values and x.values[0] is not None for x in (a, b)):
        return False
    if len(a.values) > 1 or len(b.values) > 1 or a.unit and b.unit and a.unit != b.unit:
        return False
    x, y = a.values[0], b.values[0]
    if not (isinstance(x, Fraction) and isinstance(y, Fraction)):
        x, y = inexact(x)[0], inexact(y)[0]
    return abs(x - y) <= tolerance


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
    """(board, player to move) of a state; raises UserError unless `connect4_state` gives this very text."""
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
    lowest = (next((r for r in range(6) if board[r][c] == "_"), None) for c in range(7))
    return [(r, c) for c, r in enumerate(lowest) if r is not None]


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
    (the paper's filter), so that fewer rows of a seed are the first of more. Raises UserError unless
    count >= 1."""
    if count < 1:
        raise UserError(f"{count} Connect4 states wanted: one or more expected")
    rng, rows, seen, easy = random.Random(seed), [], set(), 0
    while len(rows) < count:
        board, player, over, positions = [["_"] * 7 for _ in range(6)], "X", False, []
        while not over:
            positions.append(([row[:] for row in board], player))
            r, c = rng.choice(valid_moves(board))
            over = wins(board, r, c, player) or len(positions) == 42
            board[r][c], player = player, "XO"[player == "X"]
        board, player = rng.choice(positions)
        state, answer = connect4_state(board, player), connect4_labels(board, player)
        if state not in seen and (answer != [[], []] or 5 * (easy + 1) <= len(rows) + 1):
            seen.add(state)
            easy += answer == [[], []]
            rows.append({"state": state, "answer": answer})
    return rows


def connect4_file(path: str) -> list[dict]:
    """The rows of a file in the official layout. Raises UserError, naming the line, for a state that is not
    in this layout and for labels that are not those of the rules."""
    def parse(row, line):
        state = data.check_text(row.get("state"), "'state'")
        answer = connect4_labels(*read_connect4(state))
        if row.get("answer") != answer:
            raise UserError(f"'answer': by the rules it is {answer}, found {row.get('answer')!r:.100}")
        return {"state": state, "answer": answer}

    return data.read_rows(path, parse, skip_malformed=False)[0]


def grade_connect4(text: str, answer: list) -> dict:
    """{"mine", "opponent", "joint", "no answer"}, each 0 or 1, for a response and its [mine, opponent's].

    As in the published scorer upper case does not matter, the first result of each kind counts, and the
    cells are compared as multisets. Different from it: thinking is dropped; spaces inside (r, c) are read;
    a result that holds neither cells nor None is wrong, not an empty list. Where a result is missing, that
    question is wrong and "no answer" is 1.
    """
    text = text.rpartition("</think>")[2].lower()
    found = [None if "<think>" in text else pattern.search(text) for pattern in CONNECT4_RESULTS]
    right = []
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
HUB_KEYS = ["Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"]
CHOICES = [re.compile(pattern) for pattern in (
    r'(?i:"answer")\s*:\s*"\(?([A-D])\)?\.?"',  # the form that the prompt asks for
    r"\\boxed\s*\{\s*(?:\\\w+\s*\{)?[\s($]*([A-D])\s*[}).:]",
    # Not the article of "the answer is A good one", nor a part of the name C-H.
    r"(?i:\banswer\b[*\"]*\s*(?:is|be|:))(?:[\s:*_\"'($\[]|\\(?:boxed|text\w*)\s*\{|(?i:option|choice)\b)*"
    r"([A-D])(?![\w'’–-]|[ \t]+(?!because\b|since\b|as\b)[a-z])")]


def gpqa_file(path: str) -> list[dict]:
    """Rows {"prompt", "answer": a letter} of a JSONL file of four-choice questions: with the hub's keys
    (Question, Correct Answer, Incorrect Answer 1 to 3), or question, choices and answer, an index from 0.

    Choices are ordered by a hash of question and choice: a shuffle that is the same on every machine and
    whatever their order in the file. Raises UserError naming line and field.
    """
    def parse(row, line):
        if "Question" in row:
            fields, right = [(repr(key), row.get(key)) for key in HUB_KEYS], 0
        else:
            choices, right = row.get("choices"), row.get("answer")
            if not isinstance(choices, list) or len(choices) != 4:
                raise UserError(f"{HUB_KEYS!r}, or 'question', 'choices' (a list of four) and 'answer' "
                                f"expected, found {sorted(row)!r:.80} with choices {choices!r:.60}")
            if type(right) is not int or not 0 <= right < 4:
                raise UserError(f"'answer': an index from 0 to 3 expected, found {right!r:.60}")
            fields = [("'question'", row.get("question")), *(("'choices'", choice) for choice in choices)]
        question, *choices = (data.check_text(value, name).strip() for name, value in fields)
        if not question or not all(choices) or choices.count(choices[right]) > 1:
            raise UserError("the question or a choice is empty, or the right choice is there twice")
        order = sorted(choices, key=lambda c: hashlib.sha256(json.dumps([question, c]).encode()).digest())
        shown = "\n".join(f"{letter}) {choice}" for letter, choice in zip("ABCD", order))
        letter = "ABCD"[order.index(choices[right])]
        return {"prompt": f"{GPQA_PROMPT}{question}\n\n{shown}", "answer": letter}

    return data.read_rows(path, parse, skip_malformed=False)[0]


def choice_letter(text: str) -> str | None:
    """The letter "A" to "D" that a response chooses, or None: the last `"Answer": "C"`, else the last
    \\boxed{C}, else the last "answer is (C)" or "Answer: C", else a letter alone on the last line. Thinking
    is dropped."""
    text = text.rpartition("</think>")[2]
    if "<think>" in text:
        return None
    bare = text.rstrip().split("\n")[-1].strip("*_()$. \t\r")
    found = [letters[-1] for letters in (pattern.findall(text) for pattern in CHOICES) if letters]
    return [*found, bare if bare in tuple("ABCD") else None][0]


# --- statistics -----------------------------------------------------------------------------------


def question_mean(name, scores):
    """The mean over the samples of one question."""
    scores = list(scores)
    if not scores or not all(isinstance(x, Real | np.bool_) and math.isfinite(x) for x in scores):
        raise UserError(f"question {name!r}: one or more finite scores expected, found {scores!r:.60}")
    return math.fsum(scores) / len(scores)


def clustered(scores: list) -> tuple[float, float | None]:
    """(mean, its standard error) of per-question lists of scores, in the scores' unit.

    Samples of one question are no independent evidence, so the error is that of n questions, clusters, not
    of all samples: s / sqrt(n) with s the standard deviation (n - 1) of the questions' means. That is the
    cluster-robust error of the plain mean (Miller 2024, arXiv 2411.00640) with the n / (n - 1) of a sample,
    where all questions have equally many samples. Where they have not, every question still counts once, so
    that a question whose samples failed does not lose weight. None: one question has no spread. Raises
    UserError where there is no score, or one that is no number.
    """
    if not scores:
        raise UserError("no question has a score")
    means = np.array([question_mean(i, s) for i, s in enumerate(scores)])
    error = means.std(ddof=1) / math.sqrt(len(means)) if len(means) > 1 else None
    return float(means.mean()), None if error is None else float(error)


def pass_at_k(n: int, c: int, k: int) -> float:
    """The unbiased estimate of the chance that one or more of k samples is right, where c of n were: the
    share of the k-subsets that hold a right one (Chen et al. 2021, arXiv 2107.03374). In integers, so exact
    up to the last rounding for any n. Raises UserError unless 0 <= c <= n and 1 <= k <= n."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise UserError(f"pass@{k} of {n} samples with {c} right: 0 <= right <= samples and 1 <= k <= "
                        "samples expected")
    subsets = math.comb(n, k)
    return (subsets - math.comb(n - c, k)) / subsets


def paired_bootstrap(a: dict, b: dict, seed: int, resamples: int = 10_000) -> tuple:
    """(difference, low, high, p) of two models by {question: its scores}: mean of b - mean of a, over the
    questions that are in both; the 95 % percentile interval; and the two-sided p of no difference, which is
    below 0.05 where the interval leaves 0 out.

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

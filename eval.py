"""Sampling and grading: what a model answers, and whether it is right.

Comes in:  questions as chat messages, a model in this process or behind an OpenAI-compatible
           server, benchmark files with gold answers.
Goes out:  a log of all answers, their verdicts, the paper's table with error bars; how far a model
           went from its base; one HTML report.

    torchrun --nproc_per_node=8 eval.py --model runs/a/model --tasks aime24,math500 --out out/A
    python eval.py compare --a out/A --b out/B
    torchrun --nproc_per_node=8 eval.py retention --model runs/a/model --base Qwen3-8B --texts t
    python eval.py report runs/a runs/b out/A out/B
"""

import argparse
import cmath
import glob
import hashlib
import html
import itertools
import json
import math
import operator
import os
import random
import re
import signal
import sys
import threading
import time
import unicodedata
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from http.client import HTTPException
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import data
import model as qwen
from data import UserError, read_json, write_json, write_text
from model import (LocalModel, Ranks, Sampling, add_options, close_ranks, open_local_model,
                   open_ranks, option, start_program)

# --- sampling: requests, and who answers them -----------------------------------------------------

LAST_LINE = r"Therefore, the final answer is: $\boxed{ANSWER}$."
INSTRUCTION = ("Solve the following problem step by step. End with this line, ANSWER replaced by "
               f"your final answer:\n{LAST_LINE}\n\n{{question}}")


@dataclass
class Request:
    """One answer wanted. The key names it in the log; a LocalModel's chance is the seed alone."""
    key: str
    messages: list
    seed: int | None  # None: left to the server


def request_for(name: str, messages: list, seed: int | None) -> Request:
    """A Request whose key and seed follow from what is asked: none meets another's answer."""
    digest = hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:12]
    if seed is not None:
        own_seed = hashlib.sha256(f"{seed} {name} {digest}".encode()).digest()
        seed = int.from_bytes(own_seed[:4], "little") >> 1
    return Request(f"{name} {digest}", messages, seed)


@dataclass
class Server:
    """An OpenAI-compatible chat endpoint. The key comes from the environment and is never shown."""
    url: str  # up to and with /v1
    model: str
    key: str = field(default="", repr=False)
    workers: int = 16  # requests at a time
    timeout: float = 600.0  # seconds without a byte from the server
    tries: int = 6
    extras: dict = field(default_factory=dict)  # more keys of a request, sent of our own accord
    body: dict = field(default_factory=dict)  # keys by the user; None removes one
    given: set = field(default_factory=set)  # keys that the user gave, and so are never dropped
    refused: dict = field(default_factory=dict)  # {key of our own: its new name, or None: not sent}
    settings: str = ""  # the settings.json that records `refused`
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)


class RequestFailed(UserError):
    """One request got no usable answer; the text says why. The others go on."""


OPENER = urllib.request.OpenerDirector()  # follows no redirect: that would carry the key elsewhere
OPENER.add_handler(urllib.request.ProxyHandler())
OPENER.add_handler(urllib.request.HTTPHandler())
OPENER.add_handler(urllib.request.HTTPSHandler())


def fetch_json(server: Server, path: str, body: dict | None = None) -> dict:
    """One JSON request, tried up to server.tries times with doubling, jittered pauses, or as
    Retry-After says. Raises RequestFailed; UserError where every other request would fail too."""
    headers = {"Content-Type": "application/json"}
    if server.key:
        headers["Authorization"] = f"Bearer {server.key}"
    sent = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, sent, headers)
    for attempt in range(server.tries):
        pause = min(60.0, 2.0**attempt) * random.uniform(0.5, 1.0)
        try:
            with OPENER.open(request, timeout=server.timeout) as answer:
                status, content = answer.status, answer.read()
            if len(server.key) > 11:  # a shorter one is a dummy, and a part of many words
                content = content.replace(server.key.encode(), b"***")
            problem = f"HTTP {status}: {' '.join(content.decode(errors='replace').split())}"
            if status in (401, 402, 404, 405):  # 403 may be about this one question
                raise UserError(f"{server.url}{path}: {problem[:300]}. Are the key (OPENAI_API_KEY)"
                                ", the address and the model's name right?")
            if 300 <= status < 500 and status not in (408, 409, 425, 429):
                raise RequestFailed(problem)
            if status < 300:
                value = json.loads(content)
                if "choices" in value or "error" not in value:  # some send errors with status 200
                    return value
            retry_after = answer.headers.get("Retry-After", "")
            if retry_after.isdecimal():
                pause = max(pause, min(600.0, float(retry_after)))
        except (OSError, TypeError, ValueError, HTTPException) as e:
            problem = f"{type(e).__name__}: {e}"
            if isinstance(e, urllib.error.URLError) and attempt + 1 == server.tries:
                raise UserError(f"{server.url} cannot be reached: {e.reason}. Is the server up? "
                                "The same command goes on from what has arrived.") from None
        if attempt + 1 < server.tries:
            time.sleep(pause)
    raise RequestFailed(f"{problem[:300]} (tried {server.tries} times)")


# Left out one at a time, in this order: an error that refuses one may name others as advice.
OPTIONAL = ("chat_template_kwargs", "top_k", "seed", "max_tokens", "top_p", "temperature")


def ask(server: Server, request: Request, sampling: Sampling) -> dict:
    """One chat completion: {"text", "finish": "stop" | "length", "tokens"} or {"error": why}. What
    the server refuses and nobody gave is left out, for the whole run once an answer proves it."""
    values, refused = {**asdict(sampling), "seed": request.seed, **server.extras}, server.refused
    while True:
        named = {refused.get(key, key): value for key, value in values.items()}  # key None: drop
        body = {"model": server.model, "messages": request.messages, **named, **server.body}
        body = {key: value for key, value in body.items() if key and value is not None}
        try:
            record = read_completion(fetch_json(server, "/chat/completions", body))
            break
        except RequestFailed as e:
            more = find_refused(server, body, str(e))
            if not more:
                return {"error": str(e)[:310]}
            refused = {**refused, **more}
    with server.lock:
        for key in refused.keys() - server.refused.keys():
            instead = f"with {refused[key]} instead" if refused[key] else "without it"
            tqdm.write(f"the server refuses {key}: sampling goes on {instead}", file=sys.stderr)
            server.refused = {**server.refused, key: refused[key]}
            if server.settings:
                kept = read_json(server.settings)
                write_json(server.settings, {**kept, "refused": server.refused})
    return record


def find_refused(server: Server, body: dict, error: str) -> dict:
    """{key: its new name, or None} of one key of our own that an error refuses; {} if none. Raises
    UserError where what the user gave is refused."""
    if not error.startswith(("HTTP 400", "HTTP 422")):
        return {}
    renamed = re.search("max_completion_tokens.{0,9} instead", error)
    if renamed and "max_tokens" in body.keys() - server.body.keys():
        return {"max_tokens": "max_completion_tokens"}  # the same limit, a given one too
    copied = r"""\\*["']: ?[\d{\["']"""  # "top_k": 20 in a copy of the request refuses nothing
    named = [key for key in body if re.search(rf"\b{re.escape(key)}\b(?!{copied})", error)]
    given = server.given | server.body.keys()
    for key in OPTIONAL:
        if key in named and key not in given:
            return {key: None}
    # Only this request fails where a limit is refused, or where the error may quote the question.
    unmet = [key for key in named if key in given and not key.startswith("max_")
             and key not in str(body.get("messages"))]
    if unmet:
        raise UserError(f"{server.url} refuses {', '.join(unmet)}: {error[:310]}")
    return {}


def read_completion(answer: dict) -> dict:
    """A chat completion as a record; raises RequestFailed for what is none."""
    try:
        choice = answer["choices"][0]
        message, ending = choice["message"], str(choice.get("finish_reason") or "stop")
        text = message.get("content") or ""
        others = {k: v for k, v in message.items() if v and k not in ("role", "content")}
        if isinstance(text, list):  # of parts; those that think are no answer
            others |= {part["type"]: part for part in text if part["type"] != "text"}
            text = "".join(part["text"] for part in text if part["type"] == "text")
        tokens = int((answer.get("usage") or {}).get("completion_tokens") or 0)
        partial = text.strip() or " ".join(map(str, others.values()))
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
        raise RequestFailed(f"no chat completion: {json.dumps(answer)[:300]}") from None
    cut = ending.lower() in ("length", "max_tokens")
    if not cut and ending.lower() not in ("stop", "eos", "eos_token", "end_turn", "stop_sequence"):
        return {"error": f"the server ended the answer with {ending[:60]!r}", "partial": partial}
    if others and not text.strip():
        return {"error": f"no answer, only {', '.join(others)}. If these are thoughts, start the "
                         "server without its reasoning parser, or raise --max_tokens",
                "partial": partial}
    return {"text": text, "finish": "length" if cut else "stop", "tokens": tokens}


# --- sampling: every answer kept as it comes ------------------------------------------------------

def read_answers(folder: str, keys=None) -> dict:
    """{key: record} of all ranks' raw answers; an answer beats a failed request. Raises
    UserError for answers to something that is not in `keys`."""
    answers = {}
    for path in sorted(glob.glob(f"{glob.escape(folder)}/raw-*.jsonl")):
        for record in data.read_log(path):
            if "text" not in answers.get(record["key"], {}):
                answers[record["key"]] = record
    if keys is not None and answers.keys() - keys:
        raise UserError(f"{folder} answers {min(answers.keys() - keys)!r}, which is not among the "
                        "questions given now (--limit, --samples?): choose another --out")
    return answers


def sample(policy, requests: list, folder: str, sampling: Sampling, ranks: Ranks,
           title: str = "sampling"):
    """Yield the log's records, failed ones (asked again) too, then those that this rank gets.

    policy    a LocalModel, a Server, or a function from a Request to a record
    records   {"key", "text", "finish", "tokens"} or {"key", "error"}
    Each answer is added to folder/raw-RANK.jsonl as it comes; the same call asks what is missing or
    failed. Collective at its start. Consume it, or break off, inside `ranks.together()`: then
    `read_answers` has what all ranks got."""
    path = f"{folder}/raw-{ranks.rank}.jsonl"
    with ranks.together():
        os.makedirs(folder, exist_ok=True)
        with open(path, "a+b") as log:  # a last line that a kill has torn is cut off
            log.seek(0)
            log.truncate(log.read().rfind(b"\n") + 1)
        answers = read_answers(folder, {r.key for r in requests})
    missing = [r for r in requests if "text" not in answers.get(r.key, {})]
    todo = missing[ranks.rank::ranks.world]
    bar, counts, lock = ranks.progress(len(todo), title, "answer"), Counter(), threading.Lock()

    def keep(request, record):
        line = json.dumps({"key": request.key, **record}, ensure_ascii=False)
        record = json.loads(line.encode(errors="replace"))  # no file can hold a lone surrogate
        with lock:
            data.append_row(path, record)
            counts.update(tokens=record.get("tokens", 0), failed="error" in record)
            bar.set_postfix(counts, refresh=False)
            bar.update()
        return record

    with bar:
        yield from answers.values()
        if isinstance(policy, LocalModel):
            prompts, seeds = [policy.chat.prompt(r.messages) for r in todo], [r.seed for r in todo]
            for i, ids, ended in qwen.generate(policy.model, prompts, seeds, sampling, policy.end,
                                               policy.batch_size):
                text, finish = policy.chat.tokenizer.decode(ids), "stop" if ended else "length"
                yield keep(todo[i], {"text": text, "finish": finish, "tokens": len(ids) + ended})
        elif isinstance(policy, Server):
            yield from ask_in_parallel(policy, todo, sampling, keep)
        else:
            for request in todo:
                yield keep(request, policy(request))


def ask_in_parallel(server: Server, requests: list, sampling: Sampling, keep):
    """Yield the records of a server; a consumer that stops early waits for requests under way."""
    def answer(request):
        return keep(request, ask(server, request, sampling))

    pool = ThreadPoolExecutor(server.workers)
    try:
        for future in as_completed([pool.submit(answer, request) for request in requests]):
            yield future.result()
    except GeneratorExit:  # the consumer has enough
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    finally:  # Ctrl-C and errors do not wait
        pool.shutdown(wait=False, cancel_futures=True)


@dataclass
class SamplingOptions:
    """What the commands that sample share: whom to ask, and how."""
    out: str = option("", "folder to write; an unfinished one is completed (required)")
    model: str = option("", "ask this Qwen3 checkpoint (a folder), in this process")
    server: str = option("", "ask an OpenAI-compatible server, http://host/v1 (key OPENAI_API_KEY)")
    server_model: str = option("", "model at the server; empty: its only one")
    body: str = option("{}", "more keys of a request, as JSON; null removes one")
    workers: int = option(16, "requests to the server at a time")
    request_timeout: float = option(600.0, "seconds to wait for the server")
    tries: int = option(6, "attempts per request, with growing pauses")
    temperature: float = option(0.7, "0: greedy (an Oracle's server gets these only if given)")
    top_p: float = option(0.8, "keep the likeliest tokens up to this share")
    top_k: int = option(20, "keep the N likeliest tokens; 0: all")
    max_tokens: int = option(32768, "tokens of an answer; longer ones are cut off and counted")
    batch_size: int = option(32, "answers a local model writes at a time")
    template: str = option("", "chat template, whatever the file says", ("", "hybrid", "instruct"))
    dtype: str = option("bfloat16", "of a local model", ("float32", "bfloat16"))
    seed: int = option(0, "of the samples")
    timeout: int = option(86400, "seconds until a stalled rank ends the run")
    given: tuple = ()  # names of the options that the user gave

    @property
    def sampling(self):
        return Sampling(self.temperature, self.top_p, self.top_k, self.max_tokens)


def open_policy(o: SamplingOptions, device, non_thinking: bool = True):
    """A LocalModel or Server. non_thinking: ask for none, as vLLM and SGLang understand it."""
    if o.model:
        return open_local_model(o.model, getattr(torch, o.dtype), device, o.batch_size, o.template)
    if not re.fullmatch(r"https?://[^/@\s]+(/\S*)?", o.server):  # it may hold a password: not shown
        raise UserError("--server: http://localhost:8000/v1 or the like expected")
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not re.fullmatch("[!-~]*", key):  # http.client would show it in its error
        raise UserError("OPENAI_API_KEY holds characters that no HTTP header can carry")
    extras = {"chat_template_kwargs": {"enable_thinking": False}} if non_thinking else {}
    try:
        body = data.parse_object(o.body.encode(errors="replace"))
    except UserError as e:
        raise UserError(f"--body is {o.body!r:.60}: {e}") from None
    server = Server(o.server.rstrip("/"), o.server_model, key, o.workers, o.request_timeout,
                    o.tries, extras, body, given={*body, *o.given})
    if not server.model:
        listing = fetch_json(server, "/models")
        try:
            (server.model,) = [entry["id"] for entry in listing["data"]]
        except (LookupError, TypeError, ValueError):
            raise UserError(f"{server.url}/models lists not one model but {listing!r:.300}: choose "
                            "one with --server_model") from None
    return server


def identity(policy, o: SamplingOptions) -> str:
    """Whose answers these are: a server's model name and --body, or a local model's folder name, a
    hash of its tensors' first rows (two trainings of one base differ there), dtype, template."""
    if isinstance(policy, Server):
        return f"{policy.model} {json.dumps(policy.body, sort_keys=True)}"
    digest, folder = hashlib.sha256(), os.path.abspath(o.model)
    for name, tensor in sorted(qwen.open_tensors(folder).items()):
        digest.update(name.encode() + tensor[:1].float().numpy().tobytes())
    return f"{os.path.basename(folder)} {digest.hexdigest()[:16]} {o.dtype} {o.template}"


def claim_folder(out: str, settings: dict, ranks: Ranks, policy=None):
    """Make `out`. One with the same settings is gone on with, and `policy` gets what its server
    refused then; one with other settings ends all ranks."""
    path = f"{out}/settings.json"
    with ranks.together():
        if not ranks.main:
            return
        os.makedirs(out, exist_ok=True)
        if set(os.listdir(out)) <= {"settings.json.tmp"}:  # a kill may leave it
            write_json(path, settings)
        kept = read_json(path) if os.path.exists(path) else {}
        differ = [f"{name} was {kept.get(name)!r}, now {value!r}"
                  for name, value in settings.items() if kept.get(name) != value]
        if differ:
            raise UserError(f"{out} is not empty, with other settings: choose another --out"
                            f"{data.listed(differ)}")
        if isinstance(policy, Server):
            policy.settings = path
            policy.refused = {key: name for key, name in kept.get("refused", {}).items()
                              if name or key not in policy.given}


# --- grading: which answer does a text commit itself to? ------------------------------------------

# `tokenize` turns spellings into canonical tokens, `parse_answer` takes lists, tuples and relations
# apart, expressions are computed at POINTS and compared: fractions exactly, floats within 1e-11.
# Unlike math-verify: a decimal equals an exact value only as its rounding to six or more digits and
# another decimal only exactly; a unit or % that one side lacks is forgiven, two different units are
# not; a list is a set, a union is a list; of several boxes the last counts, or all of its line.

BOX = re.compile(r"\\f?box(?:ed)?\s*\{")
STATED = re.compile(
    r"(?:^[#*_ ]*(?:final )?answers?[*_ ]*$|####"  # a heading
    r"|\banswers?\b[^.\n:$\\\d]{0,40}?(?:\b(?:is|are|be)\b|:|=))"
    r"(?:[\s:,*`_]*\b(?:thus|hence|therefore|then|simply|just|exactly|equal to|equals|given by)"
    r"\b)*[\s:,*`_]*", re.I | re.M)
FORMULA = re.compile(  # one that no other formula follows: $2$ or $3$, $x$ = 5
    r"(?>\$((?:\\.|[^$\\\n])+)\$|(?:\$\$|\\[(\[])(.+?)(?:\$\$|\\[)\]]))"
    r"(?!\s*(?:=|(?:,|and\b|or\b|, and\b|, or\b)\s*[$\\]))", re.S)


def extract_answer(text: str) -> str | None:
    """What the last box of a response holds, else what its last "answer is", "Answer:" or "####"
    states. None if there is neither, or if the text ends inside <think> or its last box."""
    text = after_thinking(text)
    answer = last_boxed(text)
    stated = list(STATED.finditer(text))
    if answer is None and stated:
        rest = text[stated[-1].end():]
        if formula := FORMULA.match(rest):
            answer = formula[1] or formula[2]
        else:
            line = rest.split("\n")[0]
            if mark := re.search(r"[*`_]+\Z", stated[-1][0]):  # **18** apples
                line = line.split(mark[0])[0]
            answer = re.split(r"[.;]\s|,?\s(?:because|since)\b", line)[0]
            answer = answer.strip("*`_ ").rstrip(".*`_ ")
    return (answer or "").strip() or None


def after_thinking(text):
    """What a response says after its thinking; nothing if it was cut off before that."""
    _, closed, answer = text.rpartition("</think>")
    if "<think>" in answer:
        return ""
    return answer.lstrip() if closed else answer


def last_boxed(text):
    """Contents of the last \\boxed{} or \\fbox{}; "" if it never closes, None if there is none."""
    *before, inside = BOX.split(text)
    if not before:
        return None
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", inside, re.S):  # \{ is no brace
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return inside[:brace.start()]
    return ""


# --- grading: text to tokens ----------------------------------------------------------------------

MAX_CHARS, MAX_DIGITS = 400, 1000  # beyond these only the same text is equal
WORD = re.compile(r"(?<![\\A-Za-z\d])([A-Za-z]+(?:['.-]+[A-Za-z]+)*)")
MATRIX = r"\s*\{(?:[pbB]?matrix|array)\}"
REWRITES = [(re.compile(pattern, re.S), new) for pattern, new in [
    # a formula after prose; units and other words are quoted: \mathrm{m/s^2} is "m"/"s"^2
    (r"\A(?=[^$\\]*?[A-Za-z]{2})[^\d\\$]+((?:\$|\\[(\[]).*(?:\$|\\[)\]])).*", r"\1"),
    (r"\\(?:text|mbox|mathrm|operatorname)\w*\s*\{((?:[^{}]|\{[^{}]*\})*)\}",
     lambda m: WORD.sub(r' "\1" ', f" {m[1].rstrip(' .')} ")),
    (r"(?<=\d)(?:\{,\}|,\\!|\\[,! ])\s*(?=\d{3}(?!\d))", ""),  # 10{,}000   11,\! 111   1\,000
    (r"[⁻⁰¹²³⁴-⁹]+", lambda m: "^{" + unicodedata.normalize("NFKC", m[0]) + "}"),
    # layout, marks around an answer, words outside \text{}
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits|math(?:bf|it|cal)|boldsymbol|q?quad"
     r"|boxed)(?![A-Za-z])|(?<!\\)\\[,;:! ()\[\]$]|[$£€~]|\{\s*\}", " "),
    (r"\A[*`_\s]+|[*`_.,;:\s]+\Z", ""),
    (r"\A([A-Za-z' ]*[A-Za-z]{3}[A-Za-z' ]*|[Nn]o)\Z", lambda m: WORD.sub(r' "\1" ', m[0])),
    (r"(?<=[\d}])\s*([kcm]?m|ft|mi)\s*/\s*(s|h|hr|min)\b", r' "\1"/"\2"'),
    (r"\\mathbb\s*\{?\s*R\s*\}?|\ball real numbers\b", r"(-\\infty,\\infty)"),
    (r'"?\b(?:and|or)\b"?|\\cup\b', ","), (r"[µμ]", r"\\mu "), (r'\\mu\s*(?=")', '"mu" '),
    (r"(?:\bnp\.|\\)?arc(?=sin|cos|tan)", " a"),
    # a matrix is ⟦(1,2),(3,4)⟧; functions that are written as brackets
    (r"\\begin" + MATRIX + r"(?:\s*\{[^{}]*\})?", "⟦("),
    (r"(?:\\\\\s*)?\\end" + MATRIX, ")⟧"), (r"\\\\", "),("),
    (r"(?:\||\\[lr]?vert\b)(.*?)(?:\||\\[lr]?vert\b)", r" abs(\1)"),
    (r"\{([^{}]*)\\choose([^{}]*)\}", r"\\binom{\1}{\2}"),
    # a subscript belongs to its name; I(0) is no product
    (r"\s*([_^])\s*", r"\1"), (r"\^(?:\{\s*\\circ\s*\}|\\circ)", "°"),
    (r"\^(\{[^{}]*\}|\w)_(\{[^{}]*\}|\w)", r"_\2^\1"),
    (r"(?<![A-Za-z\\_^])([A-Za-z])\((\d+)\)", r"\1_{\2}"), (r"\((\d+)\)_", r"\1_"),
    # numbers: 0.1\overline{6}   1\frac45   1 4/5   \frac12   pi/2 ≈ 1.57
    (r"(\d*)\.(\d*)\\overline\s*\{?(\d+)\}?", lambda m: f"(({m[1]}{m[2]}{m[3]}-0{m[1]}{m[2]})/"
     f"{'9' * len(m[3])}{'0' * len(m[2])})"),
    (r"(?<![\w.^}])(\d+)\s*\\[cdt]?frac\s*(\{\d+\}|\d)\s*(\{\d+\}|\d)", r"(\1+\2/\3)"),
    (r"(?<![\w.^])(\d+) +(\d+)/(\d+)(?![\d.])", r"(\1+\2/\3)"), (r"(?<=\d)_\{?10\}?(?!\d)", ""),
    (r"(frac|binom)\s*(\d)", r"\1{\2}"), (r"(?<=[\d}i])\s*(?:\\approx|≈)[^=]*\Z", "")]]
# Token: its other spellings. Tokens are signs, numbers, names (letters first), words ('"cm').
SPELLINGS = {
    "-": "− –", "*": r"\cdot \times × ·", "/": r"\div ÷ per", "^": "**", "±": r"\pm", "∓": r"\mp",
    "<": r"\lt", ">": r"\gt", "≤": r"\le \leq \leqslant <=", "≥": r"\ge \geq \geqslant >=",
    "≠": r"\ne \neq", "=": r"\in ∈ \approx", ",": "& ∪", "(": r"\langle", ")": r"\rangle",
    "pi": "π", "⌊": r"\lfloor", "⌋": r"\rfloor", "⌈": r"\lceil", "⌉": r"\rceil",
    "sqrt": "√", "infty": "∞ infinity", "log": r"ln \ln", "frac": r"\dfrac \tfrac \cfrac",
    '"emptyset': r"\emptyset \varnothing ∅", '"AA': r"\AA Å",
    '"%': r"% \% percent percentage", '"°': r"° \degree degree", '"m': "meter", '"cm': "centimeter",
    '"km': "kilometer", '"in': "inch inches", '"ft': "foot feet", '"mi': "mile", '"s': "second",
    '"min': "minute", '"h': "hour hr"}
SAME = {old: new for new, olds in SPELLINGS.items() for old in olds.split()}
TOKEN = re.compile(r"""
    ( "[^"]*" | (?<![A-Za-z\d\\])[A-Za-z]{4,} | \\(?:log|ln)(?![A-Za-z])
      | (?<![A-Za-z\\]) (?:sin|cos|tan|log|ln|exp|abs|pi|[cmk]m|kg|ft|in|mi|min|hr|mph
        |per|day|lb|oz|sq)(?![A-Za-z]))
    | ( (?:\\[A-Za-z]+|[A-Za-z]) (?:_(?:\{[^{}]*\}|\\[A-Za-z]+|\w)|')*               # a name
      | \d+_(?:\d+|\{\d+\}) ) | (?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3}(?!\d))?
    | \\. | \*\* | [<>]= | !! | \S
    """, re.S | re.X)
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
CLOSE = {"(": ")", "[": "]", "{": "}", r"\{": r"\}", "⟦": "⟧", "⌊": "⌋", "⌈": "⌉"}


def tokenize(text: str) -> list[str]:
    """Canonical tokens of LaTeX or plain text, or of its last box. ValueError: it is too long."""
    text = last_boxed(text) or text
    if len(text) > MAX_CHARS:
        raise ValueError("too long")
    if "\\begin" not in text:  # in a matrix `\\` ends a row, elsewhere it is escaped twice
        text = text.replace("\\\\", "\\")
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    if not re.search(r"[(\[]|\\\{", text):  # in brackets a comma separates: (100,200) is a point
        text = THOUSANDS.sub(lambda m: m[0].replace(",", ""), text)
    tokens = []
    for m in TOKEN.finditer(text):
        if m[1]:
            word = m[1].strip('"\\')
            key = word.lower() if word.lower() in SAME else word.lower().removesuffix("s")  # plural
            tokens.append(SAME.get(key, word if word in KEYWORDS else '"' + word))
        elif m[2]:  # the same with and without braces, a_{n}, 12_{5}
            tokens.append(SAME.get(m[2], re.sub(r'[\s{}"\\]', "", m[2])))
        else:
            tokens.append(SAME.get(m[0], m[0]))
    return tokens


def split_tokens(tokens, separators):
    """The filled parts between separators outside brackets, and these. Brackets may mix: [0, 1)"""
    parts, cuts, depth = [[]], [], 0
    for token in tokens:
        depth += (token in CLOSE) - (token in CLOSE.values())
        if depth == 0 and token in separators:
            cuts.append(token)
            parts.append([])
        else:
            parts[-1].append(token)
    return [p for p in parts if p], cuts


# --- grading: an expression to numbers ------------------------------------------------------------

def power(x, n):
    """x^n over the reals: x^(1/3) of a negative x is negative, x^(1/2) is undefined."""
    if isinstance(x, Fraction) and len(str(x)) * abs(n) > 3 * MAX_DIGITS:
        x = float(x)
    if isinstance(x + n, complex) or x >= 0 or n % 1 == 0:
        return x ** n
    if not isinstance(n, Fraction) or n.denominator % 2 == 0:
        raise ValueError("no real power")
    return (-1) ** n.numerator * (-x) ** float(n)


def factorial(n):
    """n! of a whole number up to 400."""
    if n not in range(401):
        raise ValueError("no factorial")
    return Fraction(math.factorial(int(n)))


CONSTANTS = {"pi": math.pi, "e": math.e, "i": 1j, **{name: Fraction(n) for name, n in (
    ("dozen", 12), ("hundred", 100), ("thousand", 10**3), ("million", 10**6), ("billion", 10**9))}}
OPERATIONS = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "^": power,
    "!": factorial, "frac": operator.truediv, "abs": abs, "exp": lambda x: power(math.e, x),
    "binom": lambda n, k: factorial(n) / factorial(k) / factorial(n - k),
    "sec": lambda x: 1 / operate("cos", x), "csc": lambda x: 1 / operate("sin", x),
    "cot": lambda x: 1 / operate("tan", x),
    "⌊": lambda x: Fraction(math.floor(x + 1e-9)),  # floor(log_2 8) is 3
    "⌈": lambda x: Fraction(math.ceil(x - 1e-9))}
FUNCTIONS = set("sin cos tan asin acos atan sinh cosh tanh sec csc cot log abs exp".split())
KEYWORDS = {*FUNCTIONS, *OPERATIONS, *CONSTANTS, "sqrt", "infty"}
BINDING = {"+": 1, "-": 1, "*": 2, "/": 2, "^": 4, "!": 5}
SIGN, ATOM = 3, 5  # floors: of sign and ^, -x^2 is -(x^2), x^y^z x^(y^z); of an operand
FACTOR_START = re.compile(r"""[^\W\d_]|["([{⌊⌈]""").match  # x of 2x; 2 3 is no product
# Variables are (low to high) / denominator, of every size and sign; (-1)^n needs whole numbers.
POINTS = [(1, 996, 997), (900, 1100, 997), (998, 9000, 997), (99_000, 990_000, 997),
          (-9000, -998, 997), *[(-2500, 2500, 997)] * 3, *[(1, 10, 1)] * 12]


def operate(op, *args):
    """One operation, exact on fractions where it can be. Raises ArithmeticError if no digit is
    certain: a sum or a function that is small beside what it came from has lost them."""
    if op in OPERATIONS:
        value = OPERATIONS[op](*args)
        scale = max(map(abs, args)) if op in ("+", "-") else 0
    else:
        library = cmath if isinstance(args[0], complex) else math
        value, scale = getattr(library, op)(args[0]), min(1, abs(args[0]))
    if isinstance(value, Fraction):
        return value if len(str(value)) <= MAX_DIGITS else float(value)
    lost = abs(value) < 1e-4 * scale or (value == 0 and all(args))
    if lost or (op in ("sin", "cos", "tan") and abs(args[0]) > 1e5) or not cmath.isfinite(value):
        raise ArithmeticError("digits lost")
    return value


def expression(tokens, point, floor=0):
    """A Pratt parser that computes at once: pops the longest expression whose operators bind
    tighter than `floor` off the stack `tokens`; at its bottom is " "."""
    if tokens[-1] in ("+", "-"):
        sign = Fraction(tokens.pop() + "1")
        value = operate("*", sign, expression(tokens, point, SIGN))
    else:
        value = atom(tokens, point)
    while True:
        op = tokens[-1]
        if op not in BINDING and FACTOR_START(op):
            op = "*"
        if BINDING.get(op, 0) <= floor:
            return value
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
        return operate(token, value) if token in OPERATIONS else value
    if token.lstrip(".")[:1].isdigit():
        digits, _, base = token.partition("_")
        return Fraction(int(digits, int(base)) if base else digits)
    if token == "sqrt":
        degree = atom(tokens, point) if tokens[-1] == "[" else 2
        return operate("^", expression(tokens, point, ATOM), operate("/", Fraction(1), degree))
    if token in ("frac", "binom"):
        return operate(token, expression(tokens, point, ATOM), expression(tokens, point, ATOM))
    if token in FUNCTIONS:
        return apply_function(token, tokens, point)
    if name in CONSTANTS:
        return CONSTANTS[name]
    if not name[:1].isalpha() and name == token:
        raise ValueError(f"{token!r} is no operand")
    low, high, denominator = POINTS[point]
    chance = random.Random(f"{name} {point}")  # a name has the same values in every run
    return Fraction(chance.randint(low, high), denominator)


def apply_function(name, tokens, point):
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
        while FACTOR_START(tokens[-1]) and tokens[-1] not in FUNCTIONS and tokens[-1] != "(":
            argument = operate("*", argument, expression(tokens, point, BINDING["*"]))
    value = operate(name, argument)
    if "_" in marks:
        value = operate("/", value, operate("log", marks["_"]))
    if "^" in marks:
        value = operate("^", value, marks["^"])
    return value


def compute(tokens):
    """The values of an expression at all points, None where it has none or is not mathematics."""
    values = []
    for point in range(len(POINTS)):
        stack = [" ", *reversed(tokens)]
        try:
            value = expression(stack, point)
        except (ValueError, ArithmeticError, TypeError):  # TypeError: the floor of i
            value = None
        values.append(value if stack == [" "] else None)
    return values


# --- grading: answers, and whether two are the same -----------------------------------------------

UNIT = re.compile(  # an operand, then its unit: 9.8 "m / "s ^ 2, but not 5 "cm - 3
    r'((?:.*? )??[^" ]*[\w)\]}!⌋⌉]) (\(? ?"\S+(?: (?:"\S+|\^(?: [{-])* \d+(?: \})?|[*/(){}]))*)')
ROUNDED = re.compile(r"[+-]? ?[0.]*[1-9](\.?\d){5,}")  # six or more digits


class Answer(NamedTuple):
    """An answer; x = 5 and 0 < x < 5 are 5 and (0, 5) with a name."""
    kind: str  # "leaf", "relation", "list" (in any order), or a tuple's brackets
    items: list | tuple = ()  # of a list, tuple, interval or matrix
    text: str = ""  # of a leaf, without its unit; of a relation its sign: =, ≠, < or ≤
    unit: list | tuple = ()  # its values at all points, "m and "s being variables
    values: list | tuple = ()  # at all points; [None] of words, 12_5; of a relation left - right
    name: str = ""


def parse_answer(tokens: list) -> Answer:
    """Tokens to an answer, outermost structure first; ValueError where a part is empty."""
    if not tokens:
        raise ValueError("nothing there")
    inside, brackets = tokens[1:-1], tokens[0] + tokens[-1]
    _, closed = split_tokens(tokens, CLOSE.values())
    enclosed = inside and tokens[0] in CLOSE and closed == tokens[-1:]
    if enclosed and brackets in ("{}", r"\{\}"):
        return parse_answer(inside)
    parts, _ = split_tokens(tokens, ";")
    if len(parts) == 1 and r"\{" not in tokens and {"±", "∓"} & set(tokens):  # both answers
        upper = [{"±": "+", "∓": "-"}.get(t, t) for t in tokens]
        lower = [{"±": "-", "∓": "+"}.get(t, t) for t in tokens]
        return parse_answer([*upper, ",", *lower])
    if len(parts) == 1:
        parts, _ = split_tokens(tokens, ",")
    if len(parts) > 1:
        return Answer("list", [parse_answer(p) for p in parts])
    sides, signs = split_tokens(tokens, "=≠<≤>≥")
    if signs:
        return parse_relation(sides, "".join(signs))
    if enclosed and brackets in ("()", "[]", "(]", "[)", "⟦⟧"):
        items = [parse_answer(p) for p in split_tokens(inside, ",;")[0]]
        if brackets == "⟦⟧" or len(items) == 2:
            return Answer(brackets, items)
        return items[0] if len(items) == 1 else Answer("()", items)  # [1,2,3] is (1,2,3)
    text, unit = " ".join(tokens), ()
    if quantity := UNIT.fullmatch(text):
        text, unit = quantity[1], compute(quantity[2].split())
    words = all(t[0] == '"' and len(t) > 2 for t in text.split(" "))
    values = [None] if words or re.fullmatch(r"\d+_\d+", text) else compute(text.split(" "))
    return Answer("leaf", text=text.replace('"', ""), unit=unit, values=values)


def parse_relation(sides, signs):
    """x = 5, 5 = x, a = b = 5, 2 + 3 = 5, 2x + y = 5, x in (0, 1), x < 5, 1 <= x < 5, 2x + y < 5"""
    if len(sides) != len(signs) + 1:
        raise ValueError("a side is empty")
    if signs[0] in ">≥" or (signs[0] == "=" and is_name(sides[-1]) and not is_name(sides[0])):
        sides, signs = sides[::-1], signs[::-1].translate(str.maketrans("<≤>≥", ">≥<≤"))
    left, right = sides[0], sides[-1]
    if set(signs) == {"="}:
        if is_name(left) or len(sides) > 2 or len({*compute(left)} - {None}) == 1:
            return parse_answer(right)._replace(name="".join(left).replace('"', ""))
    elif set(signs) <= {"<", "≤"}:  # of one name an interval
        if len(sides) == 2 and is_name(left):
            sides, signs = [["-", "infty"], *sides], "<" + signs
        elif len(sides) == 2 and is_name(right):
            sides, signs = [*sides, ["infty"]], signs + "<"
        if len(sides) == 3:
            opening, closing = "[" if signs[0] == "≤" else "(", "]" if signs[1] == "≤" else ")"
            interval = parse_answer([opening, *sides[0], ",", *sides[2], closing])
            return interval._replace(name="".join(sides[1]).replace('"', ""))
    if len(sides) > 2:
        raise ValueError("relations are mixed")
    return Answer("relation", text=signs, values=compute(["(", *left, ")", "-", "(", *right, ")"]))


def is_name(tokens):
    """x, a_n, AB, f(x), f^{-1}(x), (p,q), frac{dM}{dt}: letters and brackets. xy is a product."""
    text = "".join(tokens).replace("^{-1}(", "(")
    product = len(tokens) > 1 and all(len(t) == 1 and t.islower() for t in tokens)
    letters = re.fullmatch(r"""([^\W\d]\w*+|['"(){},])+""", text)
    return bool(letters) and not product and text not in {*CONSTANTS, "infty"}


def answers_match(pred: str, gold: str) -> bool:
    """Whether two answers are equal as mathematics (see above). Takes any strings, never raises,
    does a bounded amount of work. An empty answer matches nothing."""
    try:
        pred, gold = tokenize(pred), tokenize(gold)
        if pred != gold:
            return same_answer(parse_answer(pred), parse_answer(gold))
    except (ValueError, ArithmeticError, RecursionError):  # or a value that no float can hold
        pass  # only the same text is equal
    return bool(pred) and pred == gold


def same_answer(a, b) -> bool:
    """Whether each member of a list has its like in the other, coordinates are equal in order, and
    an equation is a multiple of the other, an inequality a positive one."""
    u, v = (a, b) if a.name == b.name else (as_equation(a), as_equation(b))
    if u.kind == v.kind == "relation":
        ratios = [x / y for x, y in zip(u.values, v.values) if x and y]
        constant = u.text == v.text and equal_at_points(ratios, ratios[:1] * len(ratios))
        return constant and (u.text in "=≠" or ratios[0].real > 0)
    if a.kind == b.kind == "leaf":
        return same_leaf(a, b)
    if a.kind != "list":
        a, b = b, a
    names = {x.name for x in a.items} - {""}
    is_tuple = len(names) == len(a.items) > 1 and b.items and b.kind != "list"
    if a.kind == b.kind != "list" or is_tuple:  # x = 2, y = 3 is (2, 3)
        return len(a.items) == len(b.items) and all(map(same_answer, a.items, b.items))
    if a.kind != "list":
        return False
    others = b.items if b.kind == "list" else [b]
    return (all(any(same_answer(x, y) for y in others) for x in a.items)
            and all(any(same_answer(x, y) for x in a.items) for y in others))


def as_equation(a):
    """The equation that a named answer comes from, x - 5 = 0 of x = 5."""
    if not a.name:
        return a
    difference = [*tokenize(a.name), "-", "(", *a.text.split(), ")"]
    return Answer("relation", text="=", values=compute(difference))


def same_leaf(a, b):
    """Whether expressions are equal at all points, or words have the same letters."""
    if a.unit and b.unit and not equal_at_points(a.unit, b.unit):
        return False
    tolerance, decimals = 0, [x.text for x in (a, b) if "." in x.text]
    if len(decimals) == 1 and ROUNDED.fullmatch(decimals[0]):
        places = len(decimals[0].partition(".")[2])  # up to half a digit, and a bit for rounding
        tolerance = Fraction(50001, 10**(places + 5))
    if a.text == b.text or equal_at_points(a.values, b.values, tolerance):
        return True
    hundredth = compute(['"%'])
    if (a.unit == hundredth) != (b.unit == hundredth):  # 28 % is 28, and 0.28
        share, other = (a, b) if a.unit == hundredth else (b, a)
        return equal_at_points(share.values, [x if x is None else 100 * x for x in other.values])
    letters = [x.text.replace(" ", "").casefold() for x in (a, b)]
    return [None] in (a.values, b.values) and letters[0] == letters[1]


def equal_at_points(u, v, tolerance=0):
    """Whether two values are equal at all points where both are defined, two at least."""
    pairs = [(x, y) for x, y in zip(u, v) if x is not None and y is not None]
    for x, y in pairs:
        exact = isinstance(x, Fraction) and isinstance(y, Fraction)
        if abs(x - y) > max(tolerance, 0 if exact else 1e-11 * max(abs(x), abs(y))):
            return False
    return len(pairs) > 1


# --- IFEval: was an instruction followed that a program can check? --------------------------------

# The 25 kinds of google-research's instruction_following_eval by its rules, odd ones included.
# Plain rules stand for its libraries: langdetect (`is_language`), nltk (`count_sentences`).

LANGUAGES = {  # script, as in Unicode's names: {code: frequent words, where languages share it}
    "LATIN": {
        "en": "the of and to a in is it you that for i not my on are be we this with",
        "es": "el la los las que en un por con del", "pt": "os um uma que em do da não com para",
        "fr": "le la les des et un est je pas vous", "de": "der die das und ist nicht ein zu den",
        "it": "il la gli di che un una non sono della", "pl": "na się nie że to jest do od po za",
        "vi": "và của là có không cho một tôi các", "sw": "na ya wa kwa ni za katika cha kuwa",
        "fi": "ja on ei se että ovat oli mutta kun"},
    "CYRILLIC": {"ru": "и в не на что с по это как из", "uk": "і в не на що з та це як він",
                 "bg": "и в не на че с да се е от"},
    "ARABIC": {"ar": "في من على إلى أن التي هذا لا", "fa": "و به از که در را این است",
               "ur": "کے کی میں ہے اور سے کا کو"},
    "DEVANAGARI": {"hi": "है के में की और से का को", "mr": "आहे आणि मध्ये हे ते नाही आहेत ती",
                   "ne": "छ र मा हो छन् लाई पनि यो"},
    "HIRAGANA": {"ja": ""}, "HEBREW": {"he": ""}, "BENGALI": {"bn": ""}, "GURMUKHI": {"pa": ""},
    "GUJARATI": {"gu": ""}, "TAMIL": {"ta": ""}, "TELUGU": {"te": ""}, "KANNADA": {"kn": ""},
    "MALAYALAM": {"ml": ""}, "THAI": {"th": ""}, "HANGUL": {"ko": ""}}


def is_language(text, language):
    """Of the languages in the script with the most letters the one with the most frequent words."""
    [script] = [script for script, codes in LANGUAGES.items() if language in codes]
    if not any(c.isalpha() for c in text):
        return True  # of any language
    letters = Counter(unicodedata.name(c, "").split(" ")[0] for c in text)
    if script != max(LANGUAGES, key=lambda name: letters[name]):
        return False
    words = Counter(re.findall(r"[\w\u0900-\u0963]+", text.lower()))  # \w lacks Hindi's vowel signs
    scores = {code: sum(words[word] for word in frequent.split())
              for code, frequent in LANGUAGES[script].items()}
    if script == "LATIN" and not any(scores.values()):
        return language == "en" and 1 < words.total() < 10  # a title may lack frequent words
    return language == max(scores, key=scores.get)


SENTENCE_END = re.compile(r"""[.?!](["')\]}*:?!]|$)""")
ABBREVIATIONS = set("mr mrs ms dr prof st jr sr vs inc ltd co a.m p.m u.s u.k ph.d "
                    "c d e f g h j k l m n p q r s t v w".split())


def count_sentences(text):
    """One, and one for each end of a sentence that another word follows."""
    count = 1
    for word, following in itertools.pairwise(text.split()):
        bare = word.strip("\"'()[]{}*:,")
        is_listed = re.fullmatch(r"[\d.,-]+", bare) and following[0].islower()  # 1. one
        is_abbreviation = bare.lower().removesuffix(".") in ABBREVIATIONS or bare.endswith("..")
        if SENTENCE_END.search(word) and not is_listed and not is_abbreviation:
            count += 1
    return count


def is_json(text):
    """Whether the text is JSON, alone or in one fence of backticks."""
    try:
        json.loads(re.sub(r"(?i)\A```(?:json)?|```\Z", "", text.strip()))
    except (ValueError, RecursionError):  # RecursionError: nested too deeply
        return False
    return True


def split_parts(text, divider):
    """The parts between dividers; none if one is empty that is neither the first nor the last."""
    parts = [part.strip() for part in text.split(divider)]
    return [part for part in parts if part] if all(parts[1:-1]) else []


def nth_paragraph_starts(text, num_paragraphs, nth_paragraph, first_word):
    """Empty paragraphs do not count for the number, but do for which is the nth."""
    paragraphs = [paragraph.strip() for paragraph in text.split("\n\n")]
    if sum(map(bool, paragraphs)) != num_paragraphs or nth_paragraph > num_paragraphs:
        return False
    start = re.match(r"""'*"*([^\s.,?!'"]*)""", paragraphs[nth_paragraph - 1])[1]
    return start.lower() == first_word.lower()


COMPARE = {"less than": operator.lt, "at least": operator.ge}
# Instruction without its group: check. Parameters after `text` are named as in the files.
# Some patterns are written anew: the official ones match the same, in quadratic time.
CHECKS = {
    "capital_word_frequency": lambda text, capital_frequency, capital_relation:
        COMPARE[capital_relation](sum(word.isupper() for word in re.findall(r"[\w./-]+", text)),
                                  capital_frequency),
    "english_capital": lambda text: text.isupper() and is_language(text, "en"),
    "english_lowercase": lambda text: text.islower() and is_language(text, "en"),
    "repeat_prompt": lambda text, prompt_to_repeat:
        text.strip().lower().startswith(prompt_to_repeat.strip().lower()),
    "two_responses": lambda text:
        len(split_parts(text, "******")) == len(set(split_parts(text, "******"))) == 2,
    "number_placeholders": lambda text, num_placeholders:
        re.findall(r"\[[^\]\n]*(\]?)", text).count("]") >= num_placeholders,
    "postscript": lambda text, postscript_marker: bool(re.search(
        "(?i)" + re.escape(postscript_marker.strip()).replace(r"\.", r"\.\s?"), text)),  # or P. S.
    "constrained_response": lambda text: bool(re.search(r"My answer is (yes|no|maybe)\.", text)),
    "json_format": is_json,
    "multiple_sections": lambda text, section_spliter, num_sections:
        len(re.findall(re.escape(section_spliter.strip()) + r"\s?\d+", text)) >= num_sections,
    "number_bullet_lists": lambda text, num_bullets: num_bullets == sum(
        len(re.findall(r"(?m)^[^\S\n]*" + bullet, text)) for bullet in (r"\*[^*].*", "-")),
    "number_highlighted_sections": lambda text, num_highlights:
        sum(1 for pattern in (r"\*([^\n*]*)\*", r"\*\*([^\n*]*)\*\*")
            for inner in re.findall(pattern, text) if inner.strip()) >= num_highlights,
    "title": lambda text: any(
        line.partition("<<")[2].rpartition(">>")[0].strip("<> ") for line in text.split("\n")),
    "existence": lambda text, keywords: all(k.lower() in text.lower() for k in keywords),
    "forbidden_words": lambda text, forbidden_words:
        not any(re.search(rf"(?i)\b{re.escape(word)}\b", text) for word in forbidden_words),
    "frequency": lambda text, keyword, frequency, relation:
        COMPARE[relation](text.lower().count(keyword.strip().lower()), frequency),
    "letter_frequency": lambda text, letter, let_frequency, let_relation:
        COMPARE[let_relation](text.lower().count(letter.lower()), let_frequency),
    "response_language": is_language,
    "nth_paragraph_first_word": nth_paragraph_starts,
    "number_paragraphs": lambda text, num_paragraphs:
        len(split_parts(text, "***")) == num_paragraphs,
    "number_sentences": lambda text, num_sentences, relation:
        COMPARE[relation](count_sentences(text), num_sentences),
    "number_words": lambda text, num_words, relation:
        COMPARE[relation](len(re.findall(r"\w+", text)), num_words),
    "no_comma": lambda text: "," not in text,
    "end_checker": lambda text, end_phrase:
        text.strip().strip('"').lower().endswith(end_phrase.strip().lower()),
    "quotation": lambda text: bool(re.fullmatch('".*"', text.strip(), re.DOTALL))}


def ifeval_verdicts(response: str, instruction_ids: list, kwargs: list) -> tuple[list, list]:
    """Strict and loose verdict of each instruction. Loose: one of eight texts follows it: the
    response, without its first line, its last, or both, each also without `*`. Raises UserError."""
    lines, strict, loose = response.split("\n"), [], []
    texts = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    texts += [text.replace("*", "") for text in texts]
    for name, arguments in zip(instruction_ids, kwargs):
        try:
            check = CHECKS[name.rpartition(":")[2]]
            given = {k: v for k, v in arguments.items() if v is not None}
            verdicts = [bool(text.strip()) and check(text, **given) for text in texts]
        except (AttributeError, LookupError, TypeError, ValueError) as e:
            raise UserError(f"IFEval has no instruction {name!r} with the arguments {arguments!r} "
                            f"({e})") from None
        strict.append(verdicts[0])
        loose.append(any(verdicts))
    return strict, loose


def read_ifeval(row, prompt):
    """(messages, (instructions, their arguments)); raises UserError."""
    ids, kwargs = row.get("instruction_id_list"), row.get("kwargs")
    if not ids or not kwargs or len(ids) != len(kwargs):
        raise UserError("'instruction_id_list', 'kwargs': two filled lists of one length expected")
    ifeval_verdicts("x", ids, kwargs)  # raises for what it does not know
    return user_turn(prompt, data.check_text(row.get("prompt"), "'prompt'")), (ids, kwargs)


def grade_ifeval(text, gold):
    """Whether all instructions of the prompt were followed."""
    strict, loose = ifeval_verdicts(after_thinking(text), *gold)
    return {"prompt strict": all(strict), "prompt loose": all(loose)}


# --- math: gold answers and their rows ------------------------------------------------------------

GOLD_FIELDS = ["final_answer", "answer", "ground_truth", "label", "solution"]


def gold_answer(row: dict) -> str:
    """The gold answer of a row; of a whole solution its last box or `####` line."""
    if isinstance(row.get("reward_model"), dict):
        row = {**row, **row["reward_model"]}
    key = next((key for key in GOLD_FIELDS if row.get(key) is not None), "")
    value = row.get(key)
    if key == "final_answer" and isinstance(value, list):  # OlympiadBench: all must be given
        value = ", ".join(map(str, value))
    if type(value) not in (str, int, float):
        raise UserError(f"a gold answer expected in {', '.join(GOLD_FIELDS)}: a string or a "
                        f"number, found {value!r:.60}")
    text = data.check_text(str(value), repr(key)).strip()
    is_bare = key != "solution" and "boxed" not in text and "####" not in text
    gold = text if is_bare else extract_answer(text)
    if not gold or len(gold) > MAX_CHARS:
        raise UserError(f"{key!r}: no final answer in it (\\boxed{{}}, ####, or the bare answer "
                        f"expected), found {text!r:.60}")
    return gold


def read_math(row, prompt):
    """A row with a gold answer: (messages, gold answer); raises UserError."""
    return question_messages(row, prompt), gold_answer(row)


def score_math(text, gold):
    """Whether a response is right, by its last box or all of that line, and what form it lacks."""
    answer, lines = extract_answer(text) or "", after_thinking(text).split("\n")
    line = ([line for line in lines if BOX.search(line)] or [""])[-1]
    joined = ", ".join(last_boxed(part) for part in re.split(f"(?={BOX.pattern})", line)[1:])
    is_right = answers_match(answer, gold) or (answer != "" and answers_match(joined, gold))
    return {"accuracy": is_right, "no answer": not answer, "no box": not line}


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


def read_connect4(row, prompt):
    """A row of the official file; its labels, [my, the opponent's] winning moves, are taken."""
    answer = row.get("answer")
    if not re.fullmatch(r"\[(\[(\[\d, \d\](, )?)*\](, )?){2}\]", json.dumps(answer)):
        raise UserError(f"'answer': two lists of [row, column] expected, found {answer!r:.99}")
    return user_turn(prompt, data.check_text(row.get("state"), "'state'")), answer


def grade_connect4(text, answer):
    """As the published scorer: upper case does not matter, the first result of each kind counts.
    Unlike it: thinking is dropped, and a result with neither cells nor None is wrong."""
    text, right = after_thinking(text).lower(), []
    pattern = r"intermediate thinking results %d *:([^\]\n]{0,1000})\]"
    hits = [re.search(pattern % number, text) for number in (1, 2)]
    for hit, moves in zip(hits, answer):
        cells = re.findall(r"\(\s*(\d+)\s*,\s*(\d+)\s*\)", hit[1]) if hit else []
        is_clear = hit is not None and ("none" in hit[1]) != bool(cells)
        right.append(is_clear and sorted([int(r), int(c)] for r, c in cells) == sorted(moves))
    return {"joint": all(right), "mine": right[0], "opponent": right[1], "no answer": None in hits}


# --- GPQA -----------------------------------------------------------------------------------------

GPQA_PROMPT = """Answer this multiple-choice question. Think step by step, then end with one last \
line that gives the letter of your choice in exactly this form: "Answer": "C"

{question}"""
GPQA_KEYS = ["Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))]
CHOICES = [
    r"(?i:[\"'“”]answer[\"'“”])\s*:\s*[\"'“”]\(?([A-D])\)?\.?[\"'“”]",  # as the prompt asks for
    r"\\boxed\s*\{\s*(?:\\\w+\s*\{)?[\s($]*(?i:option|choice)?\s*([A-D])\s*[}).:]",
    # "The answer is C"; not the article of "is A good one", a part of C-H, the first of two
    r"(?i:\b(?:answer|option|choice)[*\"']*\s*(?:is|(?:would|must|should) be|:))"
    r"(?:[\s:*_\"'($\[]|\\\(|\\(?:text|math)\w*\{|(?i:option|choice))*"
    r"([A-D])(?![\w'’–-]|[ \t]+(?!because\b)[a-z]|\)?\s*[,/(]\s*\(?[A-D]\b)"]


def read_gpqa(row, prompt):
    """(messages, right letter). A hash orders the choices: the same shuffle everywhere."""
    question, *choices = (data.check_text(row.get(key), repr(key)).strip() for key in GPQA_KEYS)
    right = choices[0]
    choices.sort(key=lambda c: hashlib.sha256(json.dumps([question, c]).encode()).digest())
    shown = "\n".join(f"{letter}) {choice}" for letter, choice in zip("ABCD", choices))
    return user_turn(prompt, f"{question}\n\n{shown}"), "ABCD"[choices.index(right)]


def choice_letter(text):
    """The last match of the first of CHOICES that has one, else a letter alone on the last line."""
    text = after_thinking(text)
    for pattern in CHOICES:
        if letters := re.findall(pattern, text):
            return letters[-1]
    bare = text.rstrip().split("\n")[-1].strip("*_()$. \t\r")
    return bare if bare in ("A", "B", "C", "D") else None


def grade_gpqa(text, right):
    """Whether the right letter was chosen, and whether any was."""
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
    rows: tuple = ()  # (id, messages, gold), from load_task


# A new benchmark is an entry here; GPQA above has a prompt, a reader and a grader of its own.
TASKS = {task.name: task for task in (
    *(Task(name, INSTRUCTION, read_math, score_math, samples, "in-domain") for name, samples in (
        ("aime24", 16), ("aime25", 16), ("amc23", 16), ("math500", 5), ("minerva", 5),
        ("olympiadbench", 5))),
    Task("gpqa", GPQA_PROMPT, read_gpqa, grade_gpqa, group="OOD"),
    Task("connect4", CONNECT4_PROMPT, read_connect4, grade_connect4, samples=1, group="OOD"),
    Task("ifeval", "{question}", read_ifeval, grade_ifeval, group="IF"),
    Task("gsm8k", INSTRUCTION, read_math, score_math))}  # not in the paper's table


def user_turn(prompt: str, question: str) -> list:
    """The question inside the prompt, as messages."""
    return [{"role": "user", "content": prompt.replace("{question}", question)}]


def question_messages(row: dict, prompt: str) -> list:
    """What a row asks: a string goes into the prompt, a list of messages stays as it is."""
    for key in ("question", "problem", "prompt"):
        if row.get(key) is not None:
            messages = data.prompt_messages(row[key], key)
            return user_turn(prompt, row[key]) if isinstance(row[key], str) else messages
    raise UserError(f"question, problem or prompt expected, found {sorted(row)!r:.100}")


def read_items(path: str, parse, skip_malformed: bool = False) -> tuple[list, Counter]:
    """`data.read_rows` through parse(row, its id), the line number where it has none."""
    def parse_with_id(row, line):
        ids = [row[key] for key in ("id", "index", "key", "Record ID") if row.get(key) is not None]
        return parse(row, data.check_text(str([*ids, line][0]), "'id'"))
    return data.read_rows(path, parse_with_id, skip_malformed)


def load_task(spec: str, folder: str) -> Task:
    """A task with its rows: NAME is read from folder/NAME.jsonl; a new NAME=FILE is a math set."""
    name, _, path = spec.partition("=")
    if not re.fullmatch(r"[\w-]+", name) or (name not in TASKS and not path):
        raise UserError(f"--tasks: {name!r}: {', '.join(TASKS)} or NAME=FILE.jsonl expected")
    task = TASKS.get(name) or replace(TASKS["gsm8k"], name=name)
    rows, _ = read_items(path or f"{folder}/{name}.jsonl",
                         lambda row, key: (key, *task.read(row, task.prompt)))
    return replace(task, rows=rows)


# --- evaluation: statistics, scores, comparison, retention ----------------------------------------

def clustered(scores: list, weights: list | None = None) -> tuple[float, float | None]:
    """(mean, standard error) of scores, a list a question: clustered by question, n / (n - 1)
    (Miller 2024, arXiv 2411.00640, eq. 4), None for one; with weights (n,), of a ratio."""
    n = len(scores)
    means = np.array([fmean(row) for row in scores])
    weights = np.ones(n) if weights is None else np.array(weights, dtype=float)
    mean = (weights * means).sum() / weights.sum()
    if n == 1:
        return float(mean), None
    squares = ((weights * (means - mean)) ** 2).sum()
    return float(mean), float(np.sqrt(squares * n / (n - 1)) / weights.sum())


def score_task(task: Task, records: dict, show: int = 0) -> dict:
    """The figures of a task from {key: record}; metrics are (mean, standard error). Failed requests
    are only counted. Prints first answers to `show` questions, graded."""
    answers, errors, scores = [], [], {}  # scores: {metric: {question: [score]}}
    for number, (name, messages, gold) in enumerate(task.rows):
        question = request_for(name, messages, None).key  # the same in both runs of `compare`
        for i in range(task.samples):
            key = request_for(f"{name}/{i}", messages, None).key
            record = records.get(key, {"error": "not asked"})
            if "error" in record:
                errors.append(record["error"])
                continue
            answers.append(record)
            grades = task.grade(record["text"], gold)
            for metric, score in grades.items():
                scores.setdefault(metric, {}).setdefault(question, []).append(float(score))
            if number < show and i == 0:
                print(f"\n--- {task.name} {name}: question\n{messages[-1]['content']}\n--- answer\n"
                      f"{record['text']}\n--- gold: {gold}\n--- verdict: {grades}")
    if not answers:
        raise UserError(f"{task.name}: not one answer arrived ({errors[0]:.200})")
    return {"questions": len(task.rows), "samples": task.samples,
            "metrics": {metric: clustered(list(rows.values())) for metric, rows in scores.items()},
            "cut off": fmean(record["finish"] == "length" for record in answers),
            "tokens": fmean(record["tokens"] for record in answers), "unanswered": len(errors),
            "scores": next(iter(scores.values()))}  # of the headline


def percent(mean, error=None):
    """A share from 0 to 1, and its standard error, in %."""
    return f"{100 * mean:.1f}" if error is None else f"{100 * mean:.1f} ± {100 * error:.1f}"


def results_table(results: dict) -> str:
    """The headline figures in % as the paper lays them out; means of groups that are complete."""
    headline = {name: next(iter(r["metrics"].values())) for name, r in results.items()}
    columns = []
    for name in {**TASKS, **headline}:
        if name in headline:
            missing = results[name]["unanswered"]
            note = f" ({missing} unanswered)" if missing else ""
            columns.append((name, "---", percent(*headline[name]) + note))
    for group in ("in-domain", "OOD", "overall"):
        names = [t.name for t in TASKS.values() if t.group and group in (t.group, "overall")]
        if all(name in headline for name in names):
            columns.append((group, "---", percent(fmean(headline[name][0] for name in names))))
    return "\n".join("| " + " | ".join(row) + " |" for row in zip(*columns))


def compare_runs(folders: list):
    """Print two evaluations' headline figures over the questions that both answered, and the mean
    of the differences, question by question."""
    a, b = (read_json(f"{folder}/results.json") for folder in folders)
    x, y = (read_json(f"{folder}/settings.json") for folder in folders)
    notes = [f"\n{key} differs: {x.get(key)} and {y.get(key)}"
             for key in ("sampling", "seed", "refused") if x.get(key) != y.get(key)]
    print("| task | questions | A | B | B - A | 95 % |\n|---|---|---|---|---|---|")
    for task in (task for task in a if task in b):
        scores, other = a[task]["scores"], b[task]["scores"]
        pairs = [(100 * fmean(scores[q]), 100 * fmean(other[q])) for q in scores if q in other]
        count = f"{len(pairs)} of {max(a[task]['questions'], b[task]['questions'])}"
        if len(pairs) < 2:
            notes.append(f"\n{task}: {count} questions are answered in both: too few")
            continue
        mean_a, mean_b = map(fmean, zip(*pairs))
        mean, error = clustered([[score_b - score_a] for score_a, score_b in pairs])
        print(f"| {task} | {count} | {mean_a:.1f} | {mean_b:.1f} | {mean:+.1f} "
              f"| {mean - 1.96 * error:+.1f} to {mean + 1.96 * error:+.1f} |")
    print("\n".join(notes))


def read_sequences(path: str, chat: data.Chat, max_length: int) -> tuple[list, Counter]:
    """([(ids, first), ...], counts of what was cut or dropped): ids[first:] are scored. A row is
    {"text": ...}, scored from its second token, or a pair: its y+ after its prompt."""
    counts = Counter()

    def parse(row, line):
        if row.get("text") is not None:
            ids, first = chat.encode(data.check_text(row["text"], "'text'")), 1
        else:
            messages, chosen, _ = data.parse_pair(row, counts)
            prompt = chat.prompt(messages)
            ids, first = [*prompt, *chat.encode(chosen), chat.im_end], len(prompt)
        if min(len(ids), max_length) <= first:
            raise data.Drop("dropped: no token to score")
        counts[f"cut at {max_length} tokens"] += len(ids) > max_length
        return ids[:max_length], first

    sequences, dropped = data.read_rows(path, parse)
    if not sequences:
        raise UserError(f"{path}: nothing to score: {dict(dropped)}")
    return sequences, counts + dropped


@torch.no_grad()
def retention(model: qwen.Qwen3, base: qwen.Qwen3, sequences: list, ranks: Ranks) -> dict:
    """How far a model went from its base on ids[first:] of sequences [(ids, first), ...]. Returns
    {"tokens": their number, "logp": log-probability of a token, "logp_base": by the base, "kl":
    KL(base || model) of next tokens}, in nats: (mean of tokens, error clustered by sequence)."""
    # In fp32 always: logits rounded to bf16 would add half as much again to a small KL.
    heads = [m.head_weight().float() for m in (model, base)]
    sums = torch.zeros(len(sequences), 3, dtype=torch.float64)
    for i in range(ranks.rank, len(sequences), ranks.world):
        ids, first = sequences[i]
        tokens, length = torch.tensor(ids, device=ranks.device), len(ids)
        plain = torch.arange(length, device=ranks.device), [(0, length, length, length)]
        hidden = [m.norm(m.hidden_states(tokens, *plain)) for m in (model, base)]
        for at in range(first, length, 256):  # rows of logits: 0.3 GB at Qwen3's vocabulary
            target = tokens[at:at + 256, None]
            logp, logp_base = [(h[at - 1:at - 1 + len(target)].float() @ w.T).log_softmax(-1)
                               for h, w in zip(hidden, heads)]
            kl = (logp_base.exp() * (logp_base - logp)).sum(-1)
            values = logp.gather(1, target), logp_base.gather(1, target), kl
            sums[i] += torch.stack([x.double().sum().cpu() for x in values])
    lengths = [len(ids) - first for ids, first in sequences]
    means = (ranks.reduce(sums) / torch.tensor(lengths)[:, None]).T.tolist()
    logp, logp_base, kl = (clustered([[mean] for mean in column], lengths) for column in means)
    return {"tokens": sum(lengths), "logp": logp, "logp_base": logp_base, "kl": kl}


# --- the report -----------------------------------------------------------------------------------

CHARTS = {  # title: LOG.FIGURE of the solid line, and of the dashed one
    "1000 × KL from the base, nats a token": ("kl.kl_1000",),  # only of the toy story
    "SPoT's tether: λ⁺, dashed λ⁻": ("metrics.tether_chosen", "metrics.tether_rejected"),
    "Rewards: r⁺, dashed r⁻": ("metrics.reward_chosen", "metrics.reward_rejected"),
    "Margin r⁺ − r⁻, dashed: held out": ("metrics.margin", "eval.margin"),
    "Loss of an example (sft, dft: token), dashed: held out": ("metrics.loss", "eval.loss")}
COLOURS = ("#1f88cf", "#d9661a", "#12936c", "#c0589a", "#94800f", "#7f78d8")  # on white and black
MAX_SHOWN = 400  # tokens of each part of a pair
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Surgical Post-Training</title><style>
:root { color-scheme: light dark }
body { max-width: 80rem; margin: auto; padding: 1rem; font: 1rem/1.5 sans-serif }
.grid { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)) }
svg { width: 100%%; height: 12rem; overflow: visible; fill: none; stroke-width: 2.5 }
path, line { vector-effect: non-scaling-stroke; stroke-linecap: round }
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; font: .95rem/1.9 monospace }
</style></head><body><h1>Surgical Post-Training</h1>
%s
</body></html>
"""


def line_chart(title: str, figures: tuple, runs: list) -> str:
    """An SVG of one or two figures of all runs; "" where none has them. Both axes include 0."""
    paths, ends, points = "", "", [(0, 0)]
    for run, (figure, dashes) in itertools.product(runs, zip(figures, ("none", "7 6"))):
        log, key = figure.split(".")
        curve = [(row["step"], row[key]) for row in run[log] if row.get(key) is not None]
        if curve:
            points += curve
            path = "L".join(f"{step},{-value:.4g}" for step, value in curve)
            paths += (f'<path d="M{path}h0" stroke="{run["colour"]}" '  # h0: one point is a dot
                      f'stroke-dasharray="{dashes}"/>')
            ends += (f'<div style="color:{run["colour"]}">{figure}: '
                     f"{curve[0][1]:.3g} → {curve[-1][1]:.3g}</div>")
    if not paths:
        return ""
    steps, values = zip(*points)
    low, high, last = min(values), max(values), max(steps)
    return f"""<div><b>{title}</b><div>{high:.3g}</div>
<svg viewBox="0 {-high} {last or 1} {high - low or 1}" preserveAspectRatio="none" role="img"
aria-label="{title}"><line x2="{last}" stroke="currentColor" stroke-width="1"/>{paths}</svg>
{low:.3g}, steps 0 to {last}{ends}</div>"""


def surgery(run: dict) -> str:
    """The watched pair of a run, coloured by its coefficients, once for each snapshot."""
    pair, *snapshots = run["surgery"]
    scale = max(1e-30, *(abs(c) for snapshot in snapshots for c in snapshot["coefficients"]))
    prompt = html.escape("".join(pair["prompt"][-MAX_SHOWN:]))
    body = f'{run["name"]}: full colour is ±{scale:.3g}<div class="tokens">{prompt}</div>'
    fork, end = len(pair["trunk"]), len(pair["trunk"] + pair["rejected"])
    for snapshot in snapshots:
        tokens = list(zip(pair["trunk"] + pair["rejected"] + pair["chosen"],
                          snapshot["coefficients"], snapshot["logps"]))
        parts = {"trunk": tokens[:fork][-MAX_SHOWN:], "y⁻": tokens[fork:end][:MAX_SHOWN],
                 "y⁺": tokens[end:][:MAX_SHOWN]}
        body += f"<details><summary>{snapshot['step']} steps done</summary>"
        for title, part in parts.items():
            body += f'{title}<div class="tokens">'
            for text, coefficient, logp in part:
                colour = "#1f88cf" if coefficient < 0 else "#e0690a"
                opacity = round(160 * abs(coefficient) / scale)
                body += (f'<span style="background:{colour}{opacity:02x}" title="{coefficient:.3g},'
                         f' {logp:.3g}">{html.escape(text)}</span>')
            body += "</div>"
        body += "</details>"
    return f"<div>{body}</div>"


def report(folders: list, out: str, note: str = ""):
    """Write one HTML file of run folders and finished evaluations, with `note`, a text."""
    runs, names, tables, body = [], "", "", ""
    for folder in folders:
        name = html.escape(folder)
        if os.path.exists(f"{folder}/metrics.jsonl"):
            run = {log: data.read_log(f"{folder}/{log}.jsonl")
                   for log in ("metrics", "eval", "kl", "surgery")}
            run |= {"name": name, "colour": COLOURS[len(runs) % len(COLOURS)]}
            runs.append(run)
            options = read_json(f"{folder}/config.json")["options"]
            shown = ", ".join(f"{key} {options.get(key)}" for key in ("loss", "lr", "beta"))
            names += f'<div style="color:{run["colour"]}">{name}: {html.escape(shown)}</div>'
        else:
            table = results_table(read_json(f"{folder}/results.json"))
            tables += f"<h3>{name}</h3><pre>{html.escape(table)}</pre>"
    if runs:
        charts = "".join(line_chart(title, figures, runs) for title, figures in CHARTS.items())
        body += f'{names}<h2>Before → after</h2><div class="grid">{charts}</div>'
    if note:
        body += f"<pre>{html.escape(note)}</pre>"
    if tables:
        body += f"<h2>Benchmarks, right in %</h2>{tables}"
    watched = "".join(surgery(run) for run in runs if run["surgery"][1:])
    if watched:
        body += f"""<h2>Surgery on one pair</h2><p>Open a step: the update after it raises the
probability of <b>blue</b> tokens and lowers that of <b>orange</b> ones, by the coefficient
∂L/∂log p; a surgical one leaves the trunk, both answers' start, pale. Point at a token for its
coefficient and log p.</p><div class="grid">{watched}</div>"""
    write_text(out, [PAGE % body])


# --- command line ---------------------------------------------------------------------------------

@dataclass
class EvalOptions(SamplingOptions):
    """sample and score benchmarks (the default)"""
    tasks: str = option("", f"comma-separated: {', '.join(TASKS)}, or NAME=FILE.jsonl (required)")
    data: str = option("data/eval", "folder of NAME.jsonl files")
    samples: int = option(0, "answers per question; 0: the paper's number")
    limit: int = option(0, "the first N questions of each task; 0: all")
    show: int = option(0, "print graded answers to N questions of each task")


@dataclass
class CompareOptions:
    """two finished evaluations side by side"""
    a: str = option("", "--out of one evaluation (required)")
    b: str = option("", "--out of another (required)")


@dataclass
class RetentionOptions:
    """how far a model went from its base"""
    model: str = option("", "checkpoint folder (required)")
    base: str = option("", "the model before training (required)")
    texts: str = option("", 'JSONL with "text", or a pair file: its y+ (required)')
    template: str = option("", "chat template, whatever the file says", ("", "hybrid", "instruct"))
    max_length: int = option(4096, "tokens of a text")
    dtype: str = option("bfloat16", "of both models", ("float32", "bfloat16"))


@dataclass
class ReportOptions:
    """runs and evaluations as one HTML file"""
    out: str = option("report.html", "file to write")
    runs: tuple = ()  # folders, given without a flag


def run_evaluation(o: EvalOptions, ranks: Ranks):
    """Sample and score tasks. o.out/TASK/raw-*.jsonl keeps every answer; results.json is {task:
    `score_task`'s figures}, those of earlier calls too."""
    with ranks.together():
        tasks = [load_task(spec.strip(), o.data) for spec in o.tasks.split(",")]
        policy = open_policy(o, ranks.device)
    settings = {"command": "eval", "seed": o.seed, "asked": identity(policy, o),
                "sampling": asdict(o.sampling)}
    claim_folder(o.out, settings, ranks, policy)
    for task in tasks:
        task = replace(task, rows=task.rows[:o.limit or None], samples=o.samples or task.samples)
        requests = [request_for(f"{name}/{i}", messages, o.seed) for name, messages, _ in task.rows
                    for i in range(task.samples)]
        with ranks.together():
            list(sample(policy, requests, f"{o.out}/{task.name}", o.sampling, ranks, task.name))
        ranks.main_only(write_results, task, policy, o, ranks)


def write_results(task, policy, o, ranks):
    """Score a task that was sampled; add it to the folder's results."""
    result = score_task(task, read_answers(f"{o.out}/{task.name}"), o.show)
    if isinstance(policy, Server) and policy.refused:
        result["refused"] = list(policy.refused)  # keys of the request
    path = f"{o.out}/results.json"  # read only now: other processes add their tasks
    results = {**(read_json(path) if os.path.exists(path) else {}), task.name: result}
    write_json(path, results)
    shown = [f"{name} {percent(*x)}" for name, x in result["metrics"].items()]
    ranks.say(f"{task.name}: {', '.join(shown)}, cut off {percent(result['cut off'])}, unanswered "
              f"{result['unanswered']}\n{results_table(results)}")


def run_retention(o: RetentionOptions, ranks: Ranks):
    """From options to figures."""
    with ranks.together():
        model, base = (open_local_model(folder, getattr(torch, o.dtype), ranks.device,
                                        template=o.template) for folder in (o.model, o.base))
        a, b = ((m.model.config.vocab_size, m.chat.tokenizer.get_vocab()) for m in (model, base))
        if a != b:
            raise UserError("--model and --base differ in tokenizer or number of tokens: no KL")
        sequences, counts = read_sequences(o.texts, base.chat, o.max_length)
        ranks.say(f"{o.texts}: {len(sequences)} texts {dict(counts) or ''}")
        figures = retention(model.model, base.model, sequences, ranks)
    if ranks.main:
        print(json.dumps(figures))


# A command: what it runs, its options, the required ones.
COMMANDS = {"evaluate": (run_evaluation, EvalOptions, ("out", "tasks")),
            "compare": (lambda o, ranks: ranks.main_only(compare_runs, (o.a, o.b)),
                        CompareOptions, ("a", "b")),
            "retention": (run_retention, RetentionOptions, ("model", "base", "texts")),
            "report": (lambda o, ranks: ranks.main_only(report, o.runs, o.out), ReportOptions, ())}


def parse_command(argv: list, commands: dict = COMMANDS, description: str = __doc__) -> tuple:
    """(what to run, its options); raises UserError listing every problem at once."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, (_, record, _) in commands.items():
        subparser = subparsers.add_parser(name, help=record.__doc__, allow_abbrev=False)
        add_options(subparser, record)
        if record is ReportOptions:
            subparser.add_argument("runs", nargs="+", help="folders of runs or evaluations")
    if "evaluate" in commands and argv and argv[0] not in (*commands, "-h", "--help"):
        argv = ["evaluate", *argv]
    given = vars(parser.parse_args(argv))
    run, record, required = commands[given.pop("command")]
    o = record(**given)
    problems = [f"--{name} is required" for name in required if not getattr(o, name)]
    for name, value in given.items():
        zero = name in ("temperature", "top_k", "max_change_ratio") or not getattr(record, name)
        if isinstance(value, int | float) and not (value > 0 or zero and value == 0):
            problems.append(f"--{name} is {value}, {'0 or more' if zero else 'above 0'} expected")
    if isinstance(o, SamplingOptions):
        o.given = tuple(given)
        sources = [name for name in ("model", "server", "function") if hasattr(o, name)]
        if sum(getattr(o, name) != "" for name in sources) != 1:
            problems.append(f"exactly one of --{', --'.join(sources)} expected")
        if not 0 < o.top_p <= 1:
            problems.append(f"--top_p is {o.top_p}, a share above 0 and up to 1 expected")
    if problems:
        raise UserError("these options do not work:" + data.listed(problems))
    return run, o


def main(commands: dict = COMMANDS, description: str = __doc__) -> int:
    """Command line to exit code: 0 done, 1 failed, 2 options that do not work, 130 stopped."""
    (run, o), ranks = start_program(lambda: parse_command(sys.argv[1:], commands, description),
                                    lambda parsed: open_ranks(getattr(parsed[1], "timeout", 86400)))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        run(o, ranks)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on where it was", file=sys.stderr, flush=True)
        return 130
    close_ranks()
    return 0


if __name__ == "__main__":
    qwen.run_and_exit(main)

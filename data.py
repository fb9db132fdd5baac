"""From text to tensors: files, pair rows, chat template, change ratio, forks, batch plan, packs.

Comes in:  a JSONL file of surgical pairs and the checkpoint's tokenizer.
Goes out:  `Fork`s (one pair: trunk and two branches), a plan of which pair is computed when and
           where, and `Pack`s, the rows of tokens that model.Qwen3.forward scores.

    prompt  The  train  leaves  at |  3  pm  .  <|im_end|>    rejected branch (the policy's error)
    `------------- trunk --------' |  4  pm  .  <|im_end|>    chosen branch (its minimal correction)

Under a causal mask the trunk's hidden states are the same for both answers: computed once.
"""

import contextlib
import gzip
import hashlib
import json
import os
import re
import shlex
import zlib
from collections import Counter
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from tokenizers import Tokenizer


# --- files ----------------------------------------------------------------------------------------


class UserError(Exception):
    """Something the user can mend: the message names file, place, what was found and expected."""


class Drop(Exception):
    """A row is left out on purpose; the message is the reason under which it is counted."""


def listed(problems: list, most: int = 20) -> str:
    """Problems as indented lines; beyond `most` only their number."""
    lines = problems[:most]
    if len(problems) > most:
        lines = lines + [f"... and {len(problems) - most} more"]
    return "".join(f"\n  {line}" for line in lines)


def read_json(path: str) -> dict:
    """A JSON object from a file; raises UserError that names the file and the place."""
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: {e}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object expected, found {type(value).__name__}")
    return value


@contextlib.contextmanager
def writing(path: str):
    """An OSError inside names the file, which a full disk does not do by itself."""
    try:
        yield
    except OSError as e:
        if e.filename:
            raise
        raise OSError(e.errno, e.strerror, str(path)) from None


def write_text(path: str, parts):
    """A text file from an iterable of strings; after a crash it is whole, or as it was before."""
    with writing(path), open(path + ".tmp", "w", encoding="utf-8") as f:
        f.writelines(parts)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)


def write_json(path: str, value):
    """A JSON file, written as `write_text` does."""
    write_text(path, [json.dumps(value, indent=2, ensure_ascii=False)])


def write_rows(path: str, rows):
    """A JSONL file, written as `write_text` does."""
    write_text(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_row(path: str, row: dict):
    """Add one JSON line to a log."""
    with writing(path), open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_log(path: str) -> list:
    """The rows of a log that this program wrote; none if there is no file. A last line without its
    newline was cut by a kill and does not count. Raises UserError that names a broken line."""
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as f:
        lines = f.read().split("\n")[:-1]
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as e:
            raise UserError(f"{path}, line {number}: {e}") from None
    return rows


def read_lines(path: str):
    """Yield (line number, text) of a file, .gz too; blank lines are left out. Only newlines part
    lines: U+2028 is legal inside a JSON string. Raises UserError where the file cannot be read."""
    opener = gzip.open if path.endswith(".gz") else open
    try:
        with opener(path, "rb") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    yield number, line.removeprefix(b"\xef\xbb\xbf")
    except (OSError, EOFError, zlib.error) as e:
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"{path}: cannot be read: {reason}") from None


def parse_object(line: bytes) -> dict:
    """One line as a JSON object; raises UserError."""
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError) as e:
        raise UserError(f"not valid JSON in UTF-8 ({e})") from None
    if not isinstance(row, dict):
        raise UserError(f"a JSON object expected, found {type(row).__name__}")
    return row


def read_rows(path: str, parse, skip_malformed: bool = False) -> tuple[list, Counter]:
    """All rows of a JSONL file through parse(row, line number), which returns a record, or raises
    Drop (the row is counted under that reason) or UserError (the row is malformed).

    Returns the records and a count of dropped rows by reason. Malformed rows raise one UserError
    that lists the first of them; with skip_malformed they are dropped and counted.
    """
    records, dropped, problems, first = [], Counter(), [], True
    for number, line in read_lines(path):
        if first:
            check_json_lines(path, line)
        first = False
        try:
            records.append(parse(parse_object(line), number))
        except Drop as e:
            dropped[str(e)] += 1
        except UserError as e:
            problems.append(f"line {number}: {e}")
    if problems and skip_malformed:
        dropped["malformed"] = len(problems)
    elif problems:
        raise UserError(f"{path}: {len(problems)} malformed rows (--skip_malformed drops them, "
                        f"where a command has it):{listed(problems, 8)}")
    if not records and not dropped:
        raise UserError(f"{path}: the file is empty, one JSON object a line expected")
    return records, dropped


def check_json_lines(path: str, first_line: bytes):
    """Raises UserError, with the way out, for what is often taken for JSON Lines."""
    start = first_line.strip()
    if start.startswith(b"PAR1"):
        raise UserError(f"{path} is a parquet file, JSON Lines expected. To convert it:\n  python "
                        f"-c \"import datasets; datasets.Dataset.from_parquet('{path}')"
                        ".to_json('rows.jsonl')\"")
    if start.startswith(b"["):
        kind = "a JSON array"
    elif start == b"{" or start.startswith(b"{") and start.endswith(b","):
        kind = "pretty-printed JSON"
    else:
        return
    opener = "gzip.open" if path.endswith(".gz") else "open"
    raise UserError(f"{path} is {kind}, JSON Lines (one object a line) expected. To convert it:\n  "
                    "python -c \"import gzip, json, sys; rows = json.load("
                    f"{opener}(sys.argv[1], 'rt', encoding='utf-8-sig')); [print(json.dumps(row)) "
                    "for row in (rows if isinstance(rows, list) else [rows])]\" "
                    f"{shlex.quote(path)} > rows.jsonl")


# --- pair rows ------------------------------------------------------------------------------------

USED = ("question", "prompt", "gemini_corrected_answer", "original_answer", "chosen", "rejected",
        "is_correct")
NOT_RENDERED = (  # columns that change the prompt
    "tools", "system", "system_prompt", "history", "documents", "image", "images", "videos",
    "audio", "chat_template_kwargs")
EMPTY_THINK = re.compile(r"\s*(<think>\s*</think>\s*)+")
END = re.compile(r"(<\|im_end\|>|<\|endoftext\|>)(\s|<\|im_end\|>|<\|endoftext\|>)*\Z")


@dataclass
class Pair:
    """One row of a pair file as text."""

    messages: list  # the prompt: [{"role": ..., "content": ...}, ...], ends with a user turn
    chosen: str  # y+
    rejected: str | None  # y-; None in a positive-only row
    line: int


def read_pairs(path: str, skip_malformed: bool = False) -> tuple[list[Pair], Counter, Counter]:
    """Read a pair file: rows of the official SPoT kind or of TRL's, freely mixed.

    official  question (or prompt), gemini_corrected_answer (y+), original_answer (y-)
    TRL       prompt (or question), chosen, rejected: strings or lists of messages; without a prompt
              chosen and rejected are whole conversations
    A field that is null is absent. Without y-, or with "", a row is positive-only; rows with
    "is_correct": false are dropped. Returns the pairs, a count of dropped rows by reason, and a
    count of rows by what was noticed in them; raises UserError as `read_rows` does.
    """
    notes = Counter()
    pairs, dropped = read_rows(path, lambda row, line: parse_pair(row, line, notes), skip_malformed)
    return pairs, dropped, notes


def parse_pair(row: dict, line: int, notes: Counter) -> Pair:
    """One row of either kind; raises UserError that names the field, or Drop."""
    row = {key: value for key, value in row.items() if value is not None}
    for key in NOT_RENDERED:
        if row.get(key):
            raise UserError(f'"{key}" changes the prompt, and is not rendered here: put it into '
                            "the messages, or remove it")
    notes.update(f"column {key} ignored" for key in row if key not in (*USED, *NOT_RENDERED))
    correct = row.get("is_correct", True)
    if not isinstance(correct, bool):
        raise UserError(f'"is_correct": true or false expected, found {correct!r:.60}')
    if not correct:
        raise Drop("correction is wrong (is_correct: false)")
    prompt_key, chosen_key, rejected_key = pair_keys(row)
    if prompt_key in row:
        messages = prompt_messages(row[prompt_key], prompt_key)
    else:  # whole conversations
        messages = prompt_messages(row[chosen_key][:-1], chosen_key)
    if any("<|im_" in message["content"] for message in messages):
        notes["prompts hold <|im_start|> or <|im_end|>: are they templated already?"] += 1
    chosen = clean_answer(answer_text(row[chosen_key], chosen_key, messages), notes)
    if not chosen:
        raise UserError(f"{chosen_key!r} is empty")
    rejected = None
    if rejected_key in row:
        rejected = answer_text(row[rejected_key], rejected_key, messages)
        rejected = clean_answer(rejected, notes) or None
    return Pair(messages, chosen, rejected, line)


def pair_keys(row: dict) -> tuple[str, str, str]:
    """The fields of prompt, y+ and y-. Raises UserError where the first two are not there."""
    if "gemini_corrected_answer" in row or "original_answer" in row:
        prompt_keys = "question", "prompt"
        answers = "gemini_corrected_answer", "original_answer"
    else:
        prompt_keys, answers = ("prompt", "question"), ("chosen", "rejected")
    prompt_key = prompt_keys[0] if prompt_keys[0] in row else prompt_keys[1]
    chosen = row.get(answers[0])
    conversation = isinstance(chosen, list) and len(chosen) > 1
    if chosen is None or not (prompt_key in row or conversation):
        raise UserError("question, gemini_corrected_answer, original_answer or prompt, chosen, "
                        f"rejected expected, found {sorted(row)!r:.100}")
    return prompt_key, *answers


def check_text(text, name: str) -> str:
    """A string of valid Unicode, as it is; raises UserError that names the field."""
    if not isinstance(text, str):
        raise UserError(f"{name}: a string expected, found {type(text).__name__}")
    try:
        text.encode()  # JSON can carry lone surrogates, which are no Unicode text
    except UnicodeEncodeError:
        raise UserError(f"{name}: holds a lone surrogate, not valid Unicode") from None
    return text


def message_text(message, name: str) -> str:
    """The content of a message: a string, or a list of text parts. Raises UserError."""
    for key in ("tool_calls", "reasoning_content", "thinking"):
        if message.get(key):
            raise UserError(f"{name}: {key!r} is not rendered here: put it into the content, or "
                            "remove it")
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text":
                raise UserError(f"{name}: parts of type text expected, found {part!r:.80}")
        content = "".join(check_text(part.get("text"), name) for part in content)
    return check_text(content, name)


def prompt_messages(value, key: str) -> list:
    """The prompt of field `key` as messages: a string is one user turn; a list of messages may hold
    system, user and assistant turns of text, and ends with a user's. Raises UserError."""
    messages = value if isinstance(value, list) else [{"role": "user", "content": value}]
    turns = []
    for i, message in enumerate(messages):
        name = f"{key!r}, message {i}"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "user", "assistant") or message.get("tool_calls"):
            raise UserError(f"{name}: role system, user or assistant without tool calls expected, "
                            f"found {message!r:.80}")
        text = message_text(message, name)
        if role == "user" and text.startswith("<tool_response>"):
            raise UserError(f"{name}: tool responses are not supported")
        turns.append({"role": role, "content": text})
    if not turns or turns[-1]["role"] != "user" or not turns[-1]["content"]:
        raise UserError(f"{key!r}: a non-empty user turn expected at the end")
    return turns


def answer_text(value, key: str, prompt: list) -> str:
    """The answer of field `key`: a string, or messages: the prompt's (or none), then the answer."""
    if not isinstance(value, list):
        return check_text(value, repr(key))
    last = value[-1] if value else None
    fits = isinstance(last, dict) and last.get("role") == "assistant"
    if fits and len(value) > 1:
        fits = prompt_messages(value[:-1], key) == prompt
    if not fits:
        raise UserError(f"{key!r}: a string, or one assistant message (the prompt's messages may "
                        f"stand before it) expected, found {value!r:.80}")
    return message_text(last, repr(key))


def strip_markers(text: str) -> str:
    """An answer without a leading blank line and the Oracle's markers."""
    text = text.removeprefix("\n\n")
    if "=== CORRECTED STARTED ===" in text or "=== CORRECTED ENDED ===" in text:
        text = text.split("=== CORRECTED STARTED ===")[-1]
        text = text.split("=== CORRECTED ENDED ===")[0].strip()
    return text


def clean_answer(text: str, notes: Counter) -> str:
    """Strip what real files carry around an answer: markers, and what the template writes."""
    text = strip_markers(text)
    if EMPTY_THINK.match(text):
        notes["answers began with an empty think block: stripped"] += 1
        text = EMPTY_THINK.sub("", text, count=1)
    if END.search(text):
        notes["answers ended with <|im_end|>: stripped"] += 1
        text = END.sub("", text)
    if "<think>" in text or "</think>" in text:
        notes["answers hold thoughts (<think>): trained as they are"] += 1
    if "<|im_start|>" in text:
        notes["answers hold <|im_start|>: are they templated already?"] += 1
    return text


# --- the chat template, without jinja -------------------------------------------------------------

# Templates are never executed: known texts, by the start of their sha256, tell what to compute.
# hybrid: the generation prompt has an empty think block; instruct: it has none; hybrid-training:
# earlier assistant turns have a think block, too.
TEMPLATES = {
    "a55ee1b1660128b7": "hybrid",  # Qwen3
    "64f85b198065d0fb": "instruct",  # Qwen3-...-Instruct-2507
    "1d944ff8f268b611": "hybrid-training",  # TRL's variants of the two, for masks
    "48e17aa3caf5bf20": "instruct",
    "d95acce6882422fb": "instruct",  # of train.py's toy world
}


@dataclass
class Chat:
    """A checkpoint's tokenizer, and how its template writes a conversation."""

    tokenizer: Tokenizer
    im_start: int
    im_end: int
    think: list  # ids of "<think>\n\n</think>\n\n"; [] under "instruct"
    template: str = "hybrid"  # a value of TEMPLATES

    def encode(self, text: str) -> list:
        """Ids of plain text; special tokens inside it stay text: a question may quote one."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def prompt(self, messages: list) -> list:
        """Ids of the whole prompt, ready for the answer: transformers' apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=False)."""
        ids, newline = [], self.encode("\n")
        for message in messages:
            text = message["content"]
            turn = [self.im_start, *self.encode(f"{message['role']}\n{text}")]
            if message["role"] == "assistant" and self.think:
                turn = self.assistant_turn(text)
            ids += [*turn, self.im_end, *newline]
        return [*ids, self.im_start, *self.encode("assistant\n"), *self.think]

    def assistant_turn(self, text: str) -> list:
        """Ids of an earlier answer under a hybrid template, up to <|im_end|>: it keeps no thoughts,
        but for "hybrid-training"."""
        thought, closed, answer = text.rpartition("</think>")
        if closed:
            text = answer.lstrip("\n")
        if self.template == "hybrid":
            return [self.im_start, *self.encode(f"assistant\n{text}")]
        thought = thought.split("</think>")[0].rpartition("<think>")[2].strip("\n")
        text = text.lstrip("\n")
        begin, end = self.think[0], self.think[-1 - len(self.encode("\n\n"))]
        return [self.im_start, *self.encode("assistant\n"), begin, *self.encode(f"\n{thought}\n"),
                end, *self.encode(f"\n\n{text}")]


def load_chat(folder: str, vocab_size: int, template: str = "") -> Chat:
    """Read tokenizer.json and the chat template of a checkpoint, or take the one that is named.

    Raises UserError for a tokenizer that would change text silently, an unknown template, and a
    vocabulary larger than the model's.
    """
    path = os.path.join(folder, "tokenizer.json")
    spec = read_json(path)
    check_tokenizer(path, spec)
    try:
        tokenizer = Tokenizer.from_str(json.dumps(spec, ensure_ascii=False))
    except Exception as e:  # the library raises bare Exception
        raise UserError(f"{path}: not a tokenizer the tokenizers package reads: {e}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # text of users and models never becomes a control token
    template = template or known_template(folder)
    names = ["<|im_start|>", "<|im_end|>"]
    if template != "instruct":
        names += ["<think>", "</think>"]
    ids = [tokenizer.token_to_id(name) for name in names]
    added = tokenizer.get_added_tokens_decoder()
    for name, token in zip(names, ids):
        if token is None:
            raise UserError(f"{path}: lacks the token {name!r} of its own chat template")
        if name in names[:2] and not (token in added and added[token].special):
            raise UserError(f"{path}: the token {name!r} is not marked special, so text that "
                            "quotes it would become the token")
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if largest >= vocab_size:
        raise UserError(f"{path}: holds token id {largest}, but the model's vocabulary has "
                        f"{vocab_size} rows: tokenizer and weights are of different models")
    chat = Chat(tokenizer, ids[0], ids[1], [], template)
    if template != "instruct":
        blank = chat.encode("\n\n")
        chat.think = [ids[2], *blank, ids[3], *blank]
    return chat


def known_template(folder: str) -> str:
    """The value of TEMPLATES for a checkpoint's template; raises UserError for others."""
    path = os.path.join(folder, "chat_template.jinja")
    if os.path.exists(path):
        try:
            with open(path, encoding="utf-8") as f:
                template = f.read()
        except (OSError, ValueError) as e:
            raise UserError(f"{path}: {e}") from None
    else:
        path = os.path.join(folder, "tokenizer_config.json")
        template = read_json(path).get("chat_template")
        if isinstance(template, list):  # named templates
            parts = [part for part in template if isinstance(part, dict)]
            names = {part.get("name"): part.get("template") for part in parts}
            template = names.get("default")
    if not isinstance(template, str):
        raise UserError(f"{path}: a chat template expected, found none; --template hybrid computes "
                        "Qwen3's, --template instruct that of Qwen3-Instruct-2507")
    # Jinja renders what stands behind the last tag, but for one newline.
    text = template.replace("\r\n", "\n").lstrip().removesuffix("\n").removesuffix("\n")
    known = TEMPLATES.get(hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16])
    if known is None:
        raise UserError(f"{path}: this chat template is not known here. --template hybrid computes "
                        "Qwen3's, --template instruct that of Qwen3-Instruct-2507, whatever the "
                        "file says; a model that always thinks cannot be trained here")
    return known


def check_tokenizer(path: str, spec: dict):
    """Raises UserError for parts that no Qwen3 tokenizer has: they could change text silently."""
    def kinds(part, inner):
        if not part:
            return []
        parts = part[inner] if part["type"] == "Sequence" else [part]
        return [p["type"] for p in parts]

    known = (("normalizer", "normalizers", ("NFC",)), ("decoder", "decoders", ("ByteLevel",)),
             ("pre_tokenizer", "pretokenizers", ("Split", "ByteLevel", "Digits")))
    problems = []
    try:
        for name, inner, allowed in known:
            for kind in kinds(spec.get(name), inner):
                if kind not in allowed:
                    problems.append(f'"{name}" of type {kind!r:.60}, {" or ".join(allowed)} '
                                    "expected")
        kind, dropout = spec["model"].get("type", "BPE"), spec["model"].get("dropout")
    except (KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path} is no tokenizer.json: {type(e).__name__} {e}") from None
    if kind != "BPE":
        problems.append(f'"model" of type {kind!r:.60}, BPE expected')
    if dropout:  # one text would be encoded in many ways
        problems.append(f'"model": "dropout" is {dropout!r:.60}, null expected')
    if problems:
        raise UserError(f"{path} is no Qwen3 tokenizer:{listed(problems)}")


# --- change ratio ---------------------------------------------------------------------------------


def lcs_rows(a, b):
    """Hyyro's bit-parallel recurrence on Python integers: yields len(b) + 1 of them, the j-th for
    b[:j]. Its bit i is 0 where the longest common subsequence with a[:i+1] is one longer than with
    a[:i]."""
    positions = {}
    for i, token in enumerate(a):
        positions[token] = positions.get(token, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    yield row
    for token in b:
        hit = row & positions.get(token, 0)
        row = ((row + hit) | (row - hit)) & full
        yield row


def lcs_length(a, b) -> int:
    """Length of the longest common subsequence of two sequences of hashable items.

    len(b) steps on len(a)-bit numbers, about 10 ms for 8k x 8k. (difflib.SequenceMatcher, which the
    reference code uses, is greedy and no LCS.)
    """
    for row in lcs_rows(a, b):
        pass
    return len(a) - row.bit_count()


def lcs_matches(a, b) -> list:
    """[(i, j), ...], both rising: one longest common subsequence. Takes len(a) x len(b) bits."""
    rows, i, j, matches = list(lcs_rows(a, b)), len(a), len(b), []
    while i and j:
        if rows[j] >> (i - 1) & 1:  # a's last item is in no match
            i -= 1
        elif not rows[j - 1] >> (i - 1) & 1:  # nor is b's
            j -= 1
        else:
            i, j = i - 1, j - 1
            matches.append((i, j))
    return matches[::-1]


def change_ratio(rejected, chosen) -> float:
    """R = 1 - |LCS(y-, y+)| / |y+| on token ids without <|im_end|>: the share of y+ that is new."""
    return 1 - lcs_length(rejected, chosen) / len(chosen)


# --- forks ----------------------------------------------------------------------------------------


@dataclass
class Fork:
    """One pair as token ids. Both branches end in <|im_end|>, so a pair's are never empty."""

    prompt_length: int
    trunk: np.ndarray  # prompt + common start of both answers; without y- the prompt alone
    rejected: np.ndarray  # the rest of y-; empty without y-
    chosen: np.ndarray  # the rest of y+
    line: int  # in the pair file, to name it in messages
    ratio: float | None = None  # its change ratio; None without y-

    def __len__(self):
        return len(self.trunk) + len(self.rejected) + len(self.chosen)


def make_fork(prompt: list, chosen: list, rejected: list | None, line: int = 0, ratio=None) -> Fork:
    """Lay out one pair; both answers are whole id lists that end in <|im_end|> and differ."""
    common, branch = 0, []
    if rejected is not None:
        while chosen[common] == rejected[common]:
            common += 1
        branch = rejected[common:]
    trunk = np.array(prompt + chosen[:common], dtype=np.int64)
    return Fork(len(prompt), trunk, np.array(branch, dtype=np.int64),
                np.array(chosen[common:], dtype=np.int64), line, ratio)


def pair_to_fork(pair: Pair, chat: Chat, max_length: int, need_rejected: bool) -> Fork:
    """Encode one pair; raises Drop with the reason where it cannot be trained."""
    prompt, chosen, rejected = chat.prompt(pair.messages), chat.encode(pair.chosen), None
    if pair.rejected is not None:
        rejected = chat.encode(pair.rejected)
    elif need_rejected:
        raise Drop("no rejected answer, and the loss needs one")
    longest = max(len(chosen), len(rejected or []))
    if len(prompt) + longest + 1 > max_length:
        raise Drop(f"longer than max_length ({max_length} tokens)")
    if not chosen:
        raise Drop("chosen answer has no tokens")
    if chosen == rejected:
        raise Drop("both answers identical")
    if rejected is None:
        return make_fork(prompt, chosen + [chat.im_end], None, pair.line)
    ratio = change_ratio(rejected, chosen)
    return make_fork(prompt, chosen + [chat.im_end], rejected + [chat.im_end], pair.line, ratio)


def make_forks(pairs, chat, max_length, max_change_ratio, need_rejected):
    """Encode, filter and lay out pairs. Returns (forks, Counter of dropped pairs by reason, list of
    the change ratios of all pairs). max_length bounds prompt + one answer; nothing is truncated."""
    forks, dropped, ratios = [], Counter(), []
    for pair in pairs:
        try:
            fork = pair_to_fork(pair, chat, max_length, need_rejected)
        except Drop as e:
            dropped[str(e)] += 1
            continue
        if fork.ratio is not None:
            ratios.append(fork.ratio)
            if fork.ratio > max_change_ratio:
                dropped[f"change ratio above {max_change_ratio}"] += 1
                continue
        forks.append(fork)
    return forks, dropped, ratios


def load_forks(path, chat, max_length, max_change_ratio, need_rejected, skip_malformed=False):
    """A pair file to forks, and a text for the log: dropped rows by reason, histogram of change
    ratios, tokens saved. Raises UserError where nothing survives the filters."""
    pairs, dropped, notes = read_pairs(path, skip_malformed)
    forks, filtered, ratios = make_forks(pairs, chat, max_length, max_change_ratio, need_rejected)
    dropped += filtered
    lines = [f"{path}: {len(forks)} of {len(forks) + dropped.total()} rows kept"]
    lines += [f"  dropped {count:>6}  {reason}" for reason, count in dropped.most_common()]
    lines += [f"  noticed {count:>6}  {note}" for note, count in notes.most_common()]
    if not forks:
        raise UserError("\n".join(lines) + "\nNothing is left to train on.")
    if ratios:
        lines.append("  change ratio of pairs (1 - LCS / |y+|):")
        counts = np.histogram(ratios, bins=10, range=(0, 1))[0]
        for i, count in enumerate(counts):
            bar = "#" * round(40 * count / max(counts))
            lines.append(f"    {i / 10:.1f}-{(i + 1) / 10:.1f} {count:>6} {bar}")
    computed = sum(map(len, forks))
    plain = computed + sum(len(f.trunk) for f in forks if len(f.rejected))
    lines.append(f"  {computed} tokens a pass; {plain - computed} of {plain} "
                 f"({1 - computed / plain:.1%}) saved by sharing trunks")
    return forks, "\n".join(lines)


# --- the plan: who computes which pair when -------------------------------------------------------


def epoch_batches(count: int, batch_size: int, seed: int, epoch: int) -> list:
    """The optimizer steps of one epoch: arrays of pair indices, every pair once, the last batch
    smaller. Depends on nothing else: not on ranks, packs or lengths."""
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(count)
    return [order[i:i + batch_size] for i in range(0, count, batch_size)]


def split_batch(batch, lengths, ranks: int, tokens_per_pack: int) -> list:
    """Cut one batch into micro-batches: result[m][rank] is a list of pair indices, perhaps empty.

    Longest first to the least loaded rank, then first fit into packs of at most tokens_per_pack
    tokens (a longer fork is a pack by itself). A pure function of lengths: every rank computes the
    whole plan, so all agree on the number of micro-batches without communication, and a rank with
    nothing left runs a dummy.
    """
    loads = [0] * ranks
    packs = [[] for _ in range(ranks)]  # of each rank: [tokens, [pair indices]]
    for i in sorted(batch, key=lambda i: (-lengths[i], i)):
        rank = loads.index(min(loads))
        loads[rank] += lengths[i]
        for pack in packs[rank]:
            if pack[0] + lengths[i] <= tokens_per_pack:
                pack[0] += lengths[i]
                pack[1].append(int(i))
                break
        else:
            packs[rank].append([lengths[i], [int(i)]])
    count = max(map(len, packs))
    return [[p[m][1] if m < len(p) else [] for p in packs] for m in range(count)]


# --- packs ----------------------------------------------------------------------------------------


@dataclass
class Pack:
    """Forks in one sequence of tokens, `trunk | rejected | chosen | trunk | ...`, and the rows (the
    tokens) that are scored. The layout is trunk, rejected, chosen; scores come chosen, rejected."""

    tokens: torch.Tensor  # (T,) int64
    positions: torch.Tensor  # (T,) int64; both branches continue from the trunk
    forks: list  # (start, trunk end, rejected end, chosen end) of each; without y- all is trunk
    rows: torch.Tensor  # (R,) int64: where in T the token is predicted from
    targets: torch.Tensor  # (R,) int64: its id
    lengths: torch.Tensor  # (F, 3) int64: rows of trunk, rejected, chosen; they come in this order
    pairs: torch.Tensor  # (F,) int64: which pair each fork is
    reference: torch.Tensor | None = None  # (F, 2) fp64: its log-probs before training

    def to(self, device):
        """Onto the device, without waiting for it."""
        moved = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if torch.is_tensor(value):
                moved[field.name] = to_device(value, device)
        return replace(self, **moved)


def to_device(tensor, device):
    """A CPU tensor onto the device. From pinned memory a GPU copies it in its own time; a plain
    `.to` would wait until all work queued before it is done."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor


def make_pack(forks: list, indices: list, reference=None) -> Pack:
    """Pack forks[i] for i in indices, with their rows of `reference` (N, 2) if it is given.

    No index: one dummy token and no scored row, for a rank without work. The first token of *each*
    branch is predicted from the last trunk token.
    """
    tokens, positions, spans, rows, targets, lengths = [], [], [], [], [], []
    start = 0
    for fork in (forks[i] for i in indices):
        trunk, prompt = len(fork.trunk), fork.prompt_length
        trunk_end = start + trunk
        rejected_end = trunk_end + len(fork.rejected)
        end = rejected_end + len(fork.chosen)
        tokens += [fork.trunk, fork.rejected, fork.chosen]
        positions += [np.arange(trunk), trunk + np.arange(len(fork.rejected)),
                      trunk + np.arange(len(fork.chosen))]
        if len(fork.rejected):
            spans.append((start, trunk_end, rejected_end, end))
        else:  # without y- prompt and answer are one plain sequence
            spans.append((start, end, end, end))
        rows.append(np.arange(start + prompt - 1, trunk_end - 1))
        for branch, branch_end in ((trunk_end, rejected_end), (rejected_end, end)):
            source = np.arange(branch - 1, branch_end - 1)
            source[:1] = trunk_end - 1
            rows.append(source)
        targets += [fork.trunk[prompt:], fork.rejected, fork.chosen]
        lengths.append([trunk - prompt, len(fork.rejected), len(fork.chosen)])
        start = end
    if not indices:
        tokens, positions, spans = [[0]], [[0]], [(0, 1, 1, 1)]

    def joined(parts):
        return torch.from_numpy(np.concatenate([[], *parts]).astype(np.int64))

    pairs = torch.tensor(indices, dtype=torch.int64)
    return Pack(joined(tokens), joined(positions), spans, joined(rows), joined(targets),
                torch.tensor(lengths, dtype=torch.int64).view(-1, 3), pairs,
                None if reference is None else reference[pairs])

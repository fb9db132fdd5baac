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
from dataclasses import dataclass, replace

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE


# --- files ----------------------------------------------------------------------------------------


class UserError(Exception):
    """Something the user can mend: the message names file, place, what was found and expected."""


class Drop(Exception):
    """A row is left out on purpose; the message is the reason under which it is counted."""


def listed(problems: list) -> str:
    """Problems as indented lines; beyond 20 only their number."""
    lines = problems[:20]
    if len(problems) > 20:
        lines = lines + [f"... and {len(problems) - 20} more"]
    return "".join(f"\n  {line}" for line in lines)


def read_json(path: str) -> dict:
    """A JSON object from a file; raises UserError that names the file and the place."""
    try:
        with open(path, "rb") as f:
            return parse_object(f.read())
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, UserError) as e:
        raise UserError(f"{path}: {e}") from None


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
    with open(path, "rb") as f:  # a kill may cut a line inside a character
        lines = f.read().split(b"\n")[:-1]
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as e:
            raise UserError(f"{path}, line {number}: {e}") from None
    return rows


def parse_object(text: bytes) -> dict:
    """A JSON object; raises UserError."""
    try:
        row = json.loads(text.decode())
    except (ValueError, RecursionError) as e:
        raise UserError(f"not valid JSON in UTF-8 ({e})") from None
    if not isinstance(row, dict):
        raise UserError(f"a JSON object expected, found {type(row).__name__}")
    return row


FORMATS = {  # how a file begins: what it is, and a command that makes JSON Lines of it
    b"PAR1": ("a parquet file", "python -c \"import datasets, sys; "
              "datasets.Dataset.from_parquet(sys.argv[1])"
              ".to_json(sys.argv[1] + '.jsonl')\" {path}"),
    b"[": ("a JSON array", "python -c \"import json, sys; [print(json.dumps(row)) "
           "for row in json.load(sys.stdin.buffer)]\" < {path} > {path}.jsonl"),
    b"{\n": ("pretty-printed JSON", "python -m json.tool --compact {path} > {path}.jsonl")}


def read_rows(path: str, parse, skip_malformed: bool = False) -> tuple[list, Counter]:
    """All rows of a JSONL file, .gz too, through parse(row, line number), which returns a record,
    or raises Drop or, for a malformed row, UserError. Returns the records and a count of dropped
    rows by reason. All malformed rows raise one UserError; skip_malformed drops and counts them."""
    opener = gzip.open if path.endswith(".gz") else open
    try:
        with opener(path, "rb") as f:
            text = f.read().removeprefix(b"\xef\xbb\xbf")
    except (OSError, EOFError, zlib.error) as e:
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"{path}: cannot be read: {reason}") from None
    for start, (name, command) in FORMATS.items():
        if text[:99].lstrip().startswith(start):
            raise UserError(f"{path} is {name}, JSON Lines (one object a line) expected. To convert"
                            f" it:\n  {command.format(path=shlex.quote(path))}")
    records, dropped, problems = [], Counter(), []
    for number, line in enumerate(text.split(b"\n"), 1):  # U+2028 is legal inside a JSON string
        try:
            if line.strip():
                records.append(parse(parse_object(line), number))
        except Drop as e:
            dropped[str(e)] += 1
        except UserError as e:
            problems.append(f"line {number}: {e}")
    if problems and skip_malformed:
        dropped["malformed"] = len(problems)
    elif problems:
        raise UserError(f"{path}: {len(problems)} malformed rows (--skip_malformed drops them, "
                        f"where a command has it):{listed(problems)}")
    if not records and not dropped:
        raise UserError(f"{path}: the file is empty, one JSON object a line expected")
    return records, dropped


# --- pair rows ------------------------------------------------------------------------------------

# Fields of y+, of y-, of the prompt, and the prompt's other name.
OFFICIAL = ("gemini_corrected_answer", "original_answer", "question", "prompt")
TRL = ("chosen", "rejected", "prompt", "question")
NOT_RENDERED = ("tools", "system", "images", "chat_template_kwargs",  # columns of rows
                "tool_calls", "reasoning_content", "thinking")  # keys of messages
START, END = "=== CORRECTED STARTED ===", "=== CORRECTED ENDED ==="  # the Oracle's markers
EMPTY_THINK = re.compile(r"\A\s*(<think>\s*</think>\s*)+")
END_OF_TURN = re.compile(r"(<\|(im_end|endoftext)\|>\s*)+\Z")


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
    TRL       prompt (or question), chosen, rejected; without a prompt two whole conversations
    Fields are strings or lists of messages; one that is null is absent. Without y-, or with "", a
    row is positive-only; rows with "is_correct": false are dropped. Returns the pairs, and counts
    of rows by why they were dropped and by what was noticed. Raises UserError as `read_rows` does.
    """
    notes = Counter()
    pairs, dropped = read_rows(path, lambda row, line: parse_pair(row, line, notes), skip_malformed)
    return pairs, dropped, notes


def parse_pair(row: dict, line: int, notes: Counter) -> Pair:
    """One row of either kind; raises UserError that names the field, or Drop."""
    row = {key: value for key, value in row.items() if value is not None}
    refuse_unrendered(row, "the row")
    used = (*OFFICIAL, *TRL, *NOT_RENDERED, "is_correct")
    notes.update(f"column {key} ignored" for key in row if key not in used)
    correct = row.get("is_correct", True)
    if not isinstance(correct, bool):
        raise UserError(f'"is_correct": true or false expected, found {correct!r:.60}')
    if not correct:
        raise Drop("correction is wrong (is_correct: false)")
    official = "gemini_corrected_answer" in row or "original_answer" in row
    chosen_key, rejected_key, prompt_key, other_key = OFFICIAL if official else TRL
    if prompt_key not in row:
        prompt_key = other_key
    chosen, rejected = row.get(chosen_key), row.get(rejected_key)
    if prompt_key in row and chosen is not None:
        prompt = prompt_messages(row[prompt_key], prompt_key)
    elif isinstance(chosen, list):  # a whole conversation
        prompt = prompt_messages(chosen[:-1], chosen_key)
    else:
        raise UserError("question, gemini_corrected_answer, original_answer or prompt, chosen, "
                        f"rejected expected, found {sorted(row)!r:.100}")
    if any("<|im_" in message["content"] for message in prompt):
        notes["prompts hold <|im_start|> or <|im_end|>: are they templated already?"] += 1
    chosen = answer_text(chosen, chosen_key, prompt, notes)
    if not chosen:
        raise UserError(f"{chosen_key!r} is empty")
    if rejected is not None:
        rejected = answer_text(rejected, rejected_key, prompt, notes) or None
    return Pair(prompt, chosen, rejected, line)


def refuse_unrendered(record: dict, name: str):
    """Raises UserError for a row or a message with more to it than its text."""
    for key in NOT_RENDERED:
        if record.get(key):
            raise UserError(f"{name}: {key!r} is not rendered here: put it into the content of a "
                            "message, or remove it")


def check_text(text, name: str) -> str:
    """A string of valid Unicode, as it is; raises UserError that names the field."""
    if not isinstance(text, str):
        raise UserError(f"{name}: a string expected, found {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can carry lone surrogates
        raise UserError(f"{name}: holds a lone surrogate, not valid Unicode") from None
    return text


def read_messages(value, key: str, role: str) -> list:
    """Field `key` as [{"role": ..., "content": text}, ...]: a string is one turn of `role`, text
    parts are joined. Raises UserError."""
    if not isinstance(value, list):
        return [{"role": role, "content": check_text(value, repr(key))}]
    turns = []
    for i, message in enumerate(value):
        name = f"{key!r}, message {i}"
        speaker = message.get("role") if isinstance(message, dict) else None
        if speaker not in ("system", "user", "assistant"):
            raise UserError(f"{name}: role system, user or assistant expected, found "
                            f"{message!r:.80}")
        refuse_unrendered(message, name)
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        for part in parts:
            if not isinstance(part, dict) or part.get("type") != "text":
                raise UserError(f"{name}: parts of type text expected, found {part!r:.80}")
        text = "".join(check_text(part.get("text"), name) for part in parts)
        turns.append({"role": speaker, "content": text})
    return turns


def prompt_messages(value, key: str) -> list:
    """The prompt in field `key` as messages, the last of them a user's. Raises UserError."""
    turns = read_messages(value, key, "user")
    if not turns or turns[-1]["role"] != "user" or not turns[-1]["content"]:
        raise UserError(f"{key!r}: a non-empty user turn expected at the end")
    return turns


def answer_text(value, key: str, prompt: list, notes: Counter) -> str:
    """The answer in field `key`, without what real files carry around it. Raises UserError."""
    turns = read_messages(value, key, "assistant")
    if not turns or turns[-1]["role"] != "assistant" or turns[:-1] not in ([], prompt):
        raise UserError(f"{key!r}: a string, or one assistant message (the prompt's messages may "
                        f"stand before it) expected, found {value!r:.80}")
    text, count = EMPTY_THINK.subn("", strip_markers(turns[-1]["content"]))
    if count:
        notes["answers began with an empty think block: stripped"] += 1
    text, count = END_OF_TURN.subn("", text)
    if count:
        notes["answers ended with <|im_end|>: stripped"] += 1
    if "<think>" in text or "</think>" in text:
        notes["answers hold thoughts (<think>): trained as they are"] += 1
    if "<|im_start|>" in text:
        notes["answers hold <|im_start|>: are they templated already?"] += 1
    return text


def strip_markers(text: str) -> str:
    """An answer without a leading blank line and the Oracle's markers."""
    text = text.removeprefix("\n\n")
    if START in text or END in text:
        text = text.split(START)[-1].split(END)[0].strip()
    return text


# --- the chat template, without jinja -------------------------------------------------------------

# Templates are never executed: known texts, by the start of their sha256, tell what to compute.
# hybrid: the generation prompt has an empty think block; instruct: it has none.
TEMPLATES = {
    "a55ee1b1660128b7": "hybrid",  # Qwen3
    "64f85b198065d0fb": "instruct",  # Qwen3-...-Instruct-2507
    "48e17aa3caf5bf20": "instruct",  # TRL's variant of it, for masks
    "d95acce6882422fb": "instruct",  # of train.py's toy world
}
TOKENIZER_PARTS = {  # types in Qwen3's tokenizers; others could change text silently
    "normalizer": {"NFC"}, "pre_tokenizer": {"Split", "ByteLevel", "Digits"},
    "decoder": {"ByteLevel"}}


@dataclass
class Chat:
    """A checkpoint's tokenizer, and how its template writes a conversation."""

    tokenizer: Tokenizer
    im_start: int
    im_end: int
    think: list  # ids of "<think>\n\n</think>\n\n"; [] under "instruct"

    def encode(self, text: str) -> list:
        """Ids of plain text; special tokens inside it stay text: a question may quote one."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def prompt(self, messages: list) -> list:
        """Ids of the whole prompt, ready for the answer: transformers' apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=False)."""
        ids, newline = [], self.encode("\n")
        for message in messages:
            text = message["content"]
            if self.think and message["role"] == "assistant" and "</think>" in text:
                text = text.rpartition("</think>")[2].lstrip("\n")  # earlier thoughts are left out
            turn = self.encode(f"{message['role']}\n{text}")
            ids += [self.im_start, *turn, self.im_end, *newline]
        return [*ids, self.im_start, *self.encode("assistant\n"), *self.think]


def load_chat(folder: str, vocab_size: int, template: str = "") -> Chat:
    """The tokenizer of a checkpoint, with its chat template or the one that is named. Raises
    UserError where they are not of a Qwen3 with that vocabulary."""
    path = os.path.join(folder, "tokenizer.json")
    tokenizer = load_tokenizer(path)
    names = ["<|im_start|>", "<|im_end|>"]
    if (template or known_template(folder)) == "hybrid":
        names += ["<think>", "</think>"]
    ids = [tokenizer.token_to_id(name) for name in names]
    for name, token in zip(names, ids):
        if token is None:
            raise UserError(f"{path}: lacks the token {name!r} of its own chat template")
    added = tokenizer.get_added_tokens_decoder()
    if not all(token in added and added[token].special for token in ids[:2]):
        raise UserError(f"{path}: <|im_start|> and <|im_end|> are not both marked special, so text "
                        "that quotes them would become the tokens")
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise UserError(f"{path}: holds token id {largest}, but the model's vocabulary has "
                        f"{vocab_size} rows: tokenizer and weights are of different models")
    chat = Chat(tokenizer, ids[0], ids[1], [])
    if "<think>" in names:
        blank = chat.encode("\n\n")
        chat.think = [ids[2], *blank, ids[3], *blank]
    return chat


def load_tokenizer(path: str) -> Tokenizer:
    """A tokenizer.json of Qwen3's kind; raises UserError for others."""
    spec = read_json(path)
    for name, known in TOKENIZER_PARTS.items():
        kinds = set(re.findall(r'"type": "(\w+)"', json.dumps(spec.get(name)))) - {"Sequence"}
        if not kinds <= known:
            raise UserError(f"{path}: {name} of type {', '.join(sorted(kinds))}, "
                            f"{' or '.join(sorted(known))} expected: no Qwen3 tokenizer")
    try:
        tokenizer = Tokenizer.from_file(path)
    except Exception as e:  # the library raises bare Exception
        raise UserError(f"{path}: not a tokenizer the tokenizers package reads: {e}") from None
    if not isinstance(tokenizer.model, BPE) or tokenizer.model.dropout:
        raise UserError(f"{path}: a BPE model without dropout expected: no Qwen3 tokenizer")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # text of users and models never becomes a control token
    return tokenizer


def known_template(folder: str) -> str:
    """The value of TEMPLATES for a checkpoint's template; raises UserError for others."""
    path = os.path.join(folder, "chat_template.jinja")
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as f:
            template = f.read()
    else:
        path = os.path.join(folder, "tokenizer_config.json")
        template = read_json(path).get("chat_template")
    # Two newlines at the end change nothing: Jinja drops the last, transformers' trim_blocks the
    # one behind a tag.
    text = str(template).replace("\r\n", "\n").lstrip().removesuffix("\n").removesuffix("\n")
    known = TEMPLATES.get(hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16])
    if known is None:
        raise UserError(f"{path}: this chat template is not known here. --template hybrid computes "
                        "Qwen3's, --template instruct that of Qwen3-Instruct-2507, whatever the "
                        "file says; a model that always thinks cannot be trained here")
    return known


# --- change ratio and forks -----------------------------------------------------------------------


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
    """Length of the longest common subsequence of two sequences of hashable items, in about 10 ms
    for 8k x 8k. (difflib.SequenceMatcher, which the reference code uses, is greedy and no LCS.)"""
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
    if pair.rejected is None and need_rejected:
        raise Drop("no rejected answer, and the loss needs one")
    prompt, chosen = chat.prompt(pair.messages), chat.encode(pair.chosen)
    rejected = None if pair.rejected is None else chat.encode(pair.rejected)
    if len(prompt) + max(len(chosen), len(rejected or ())) + 1 > max_length:
        raise Drop(f"longer than max_length ({max_length} tokens)")
    if rejected is None:
        return make_fork(prompt, chosen + [chat.im_end], None, pair.line)
    if chosen == rejected:
        raise Drop("both answers identical")
    ratio = change_ratio(rejected, chosen)
    return make_fork(prompt, chosen + [chat.im_end], rejected + [chat.im_end], pair.line, ratio)


def make_forks(pairs, chat, max_length, max_change_ratio, need_rejected):
    """Encode, filter and lay out pairs. Returns (forks, Counter of dropped pairs by reason, list of
    the change ratios of all pairs). max_length bounds prompt + one answer; nothing is truncated."""
    forks, dropped, ratios = [], Counter(), []
    for pair in pairs:
        try:
            fork = pair_to_fork(pair, chat, max_length, need_rejected)
            if fork.ratio is not None:
                ratios.append(fork.ratio)
                if fork.ratio > max_change_ratio:
                    raise Drop(f"change ratio above {max_change_ratio}")
            forks.append(fork)
        except Drop as e:
            dropped[str(e)] += 1
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


# --- the plan (who computes which pair when) and packs --------------------------------------------


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
        moved = {name: to_device(value, device) for name, value in vars(self).items()
                 if torch.is_tensor(value)}
        return replace(self, **moved)


def to_device(tensor, device):
    """A CPU tensor onto the device. From pinned memory a GPU copies it in its own time; a plain
    `.to` would wait until all work queued before it is done."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor


def make_pack(forks: list, indices: list, reference=None) -> Pack:
    """Pack forks[i] for i in indices, with their rows of `reference` (N, 2) if it is given. No
    index: one dummy token and no scored row, for a rank without work."""
    tokens, positions, spans, rows, targets, lengths = [], [], [], [], [], []
    start = 0
    for fork in (forks[i] for i in indices):
        trunk, rejected, chosen = len(fork.trunk), len(fork.rejected), len(fork.chosen)
        trunk_end = start + trunk
        rejected_end = trunk_end + rejected
        end = rejected_end + chosen
        tokens += [fork.trunk, fork.rejected, fork.chosen]
        positions += [np.arange(trunk + rejected), np.arange(trunk, trunk + chosen)]
        if rejected:
            spans.append((start, trunk_end, rejected_end, end))
        else:  # without y- prompt and answer are one plain sequence
            spans.append((start, end, end, end))
        # A token is predicted from the one before it. The rest of the trunk and y- follow each
        # other: one range. The first token of y+ is predicted from the trunk's last.
        rows += [np.arange(start + fork.prompt_length - 1, rejected_end - 1), [trunk_end - 1],
                 np.arange(rejected_end, end - 1)]
        targets += [fork.trunk[fork.prompt_length:], fork.rejected, fork.chosen]
        lengths.append([trunk - fork.prompt_length, rejected, chosen])
        start = end
    if not indices:
        tokens, positions, spans = [[0]], [[0]], [(0, 1, 1, 1)]

    def joined(parts):
        return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *parts]))

    pairs = torch.tensor(indices, dtype=torch.int64)
    return Pack(joined(tokens), joined(positions), spans, joined(rows), joined(targets),
                torch.tensor(lengths, dtype=torch.int64).view(-1, 3), pairs,
                None if reference is None else reference[pairs])

"""From text to tensors: files, pair rows, chat template, change ratio, forks, packs.

Comes in: a JSONL file of surgical pairs and a checkpoint's tokenizer. Goes out: `Fork`s, and
`Pack`s of forks for model.Qwen3.forward.

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
import zlib
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import torch
from tokenizers import Tokenizer

# --- files ----------------------------------------------------------------------------------------

class UserError(Exception):
    """Something the user can mend: the message names place, what was found and expected."""


class Drop(Exception):
    """A row is left out on purpose; the message is the reason it is counted under."""


def listed(problems: list) -> str:
    """At most 20 problems as indented lines, and the number of the others."""
    text = "".join(f"\n  {problem}" for problem in problems[:20])
    return text if len(problems) <= 20 else f"{text}\n  ... and {len(problems) - 20} more"


def parse_object(text: bytes) -> dict:
    """A JSON object; raises UserError."""
    try:
        row = json.loads(text.decode())
    except (ValueError, RecursionError) as e:
        raise UserError(f"not valid JSON in UTF-8 ({e})") from None
    if not isinstance(row, dict):
        raise UserError(f"a JSON object expected, found {type(row).__name__}")
    return row


def read_json(path: str) -> dict:
    """A JSON object from a file; raises UserError."""
    try:
        with open(path, "rb") as f:
            return parse_object(f.read())
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except UserError as e:
        raise UserError(f"{path}: {e}") from None


def write_text(path: str, parts):
    """A file from an iterable of strings; after a crash it is whole or as before."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.writelines(parts)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)


def write_json(path: str, value):
    """A JSON file, by `write_text`."""
    write_text(path, [json.dumps(value, indent=2, ensure_ascii=False)])


def write_rows(path: str, rows):
    """A JSONL file, by `write_text`."""
    write_text(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_row(path: str, row: dict):
    """Add one JSON line to a log."""
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_log(path: str) -> list:
    """The rows of a log, none without a file. Lines cut by a kill do not count."""
    rows = []
    if os.path.exists(path):
        with open(path, "rb") as f:
            for line in f.read().split(b"\n")[:-1]:
                with contextlib.suppress(ValueError):
                    rows.append(json.loads(line))
    return rows


def read_rows(path: str, parse, skip_malformed: bool = False) -> tuple[list, Counter]:
    """(records, Counter of dropped rows by reason) of a JSONL file, .gz too. parse(row, line
    number) returns a record, raises Drop or raises UserError: these become one UserError."""
    opener = gzip.open if path.endswith(".gz") else open
    try:
        with opener(path, "rb") as f:
            text = f.read().removeprefix(b"\xef\xbb\xbf")  # a byte order mark
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"{path}: cannot be read: {e}") from None
    for start, name in ((b"PAR1", "parquet"), (b"[", "json")):
        if text.lstrip().startswith(start):
            raise UserError(f"{path} is no JSON Lines file. To convert it:\n  python -c \""
                            f"import datasets; datasets.load_dataset('{name}', split='train', "
                            f"data_files='{path}').to_json('{path}.jsonl')\"")
    records, dropped, problems = [], Counter(), []
    for number, line in enumerate(text.split(b"\n"), 1):  # U+2028 is legal inside a JSON string
        try:
            if line.strip():
                records.append(parse(parse_object(line), number))
        except Drop as e:
            dropped[str(e)] += 1
        except UserError as e:
            problems.append(f"line {number}: {e}")
            dropped["malformed"] += 1
    if problems and not (skip_malformed and records):
        raise UserError(f"{path}: {len(problems)} malformed rows (train.py and elicit can "
                        f"--skip_malformed):{listed(problems)}")
    if not records and not dropped:
        raise UserError(f"{path}: the file is empty")
    return records, dropped


# --- pair rows ------------------------------------------------------------------------------------

# Prompt (two names), y+ and y- in rows of the SPoT authors and in TRL's.
OFFICIAL = ("question", "prompt", "gemini_corrected_answer", "original_answer")
TRL = ("prompt", "question", "chosen", "rejected")
KNOWN = {*OFFICIAL, *TRL, "index", "ground_truth", "is_correct", "change_ratio",
         "gemini_extracted_answer"}
# In a row or a message; templates render them, we do not.
NOT_RENDERED = ("tools", "system", "images", "chat_template_kwargs", "tool_calls",
                "reasoning_content", "thinking")
START, END = "=== CORRECTED STARTED ===", "=== CORRECTED ENDED ==="  # the Oracle's markers


def parse_pair(row: dict, notes: Counter) -> tuple[list, str, str]:
    """(messages of the prompt, y+, y- or "") of a row of either kind; null is absent. Counts what
    is odd in `notes`. Raises UserError or Drop."""
    row = {key: value for key, value in row.items() if value is not None}
    for key in NOT_RENDERED:
        if row.get(key):
            raise UserError(f"{key!r} is not rendered here: put it into a message, or remove it")
    if row.get("is_correct", True) not in (True, "True", "true"):
        raise Drop("is_correct is not true")
    notes.update(f"column {key} ignored" for key in row if key not in KNOWN)
    official = "gemini_corrected_answer" in row or "original_answer" in row
    first, second, chosen_key, rejected_key = OFFICIAL if official else TRL
    prompt, chosen = row.get(first, row.get(second)), row.get(chosen_key)
    if prompt is None and isinstance(chosen, list):  # TRL's implicit prompt: whole conversations
        prompt = chosen[:-1]
    if prompt is None or chosen is None:
        raise UserError(f"prompt and chosen, or question and {OFFICIAL[2]}, expected, found "
                        f"{sorted(row)!r:.100}")
    messages = prompt_messages(prompt, "prompt")
    chosen = answer_text(chosen, chosen_key, messages, notes)
    rejected = answer_text(row.get(rejected_key, ""), rejected_key, messages, notes)
    if not chosen:
        raise UserError(f"{chosen_key!r} is empty")
    if re.search(r"<\|im_start\|>|</?think>", f"{messages}{chosen}{rejected}"):
        notes["rows hold <|im_start|> or <think>: are they templated already?"] += 1
    return messages, chosen, rejected


def check_text(text, name: str) -> str:
    """A string of valid Unicode, as it is; raises UserError."""
    if not isinstance(text, str):
        raise UserError(f"{name}: a string expected, found {type(text).__name__}")
    if re.search("[\ud800-\udfff]", text):  # JSON can carry lone surrogates
        raise UserError(f"{name}: holds a lone surrogate, not valid Unicode")
    return text


def prompt_messages(value, key: str, role: str = "user") -> list:
    """Field `key` as [{"role": ..., "content": text}, ...], the last of `role`: a string is one
    turn, text parts are joined. Raises UserError."""
    messages = []
    for turn in value if isinstance(value, list) else [{"role": role, "content": value}]:
        if not isinstance(turn, dict) or turn.get("role") not in ("system", "user", "assistant"):
            raise UserError(f"{key!r}: role system, user or assistant expected, found {turn!r:.80}")
        if any(turn.get(name) for name in NOT_RENDERED):
            raise UserError(f"{key!r}: tool calls and thoughts are not rendered")
        content = turn.get("content")
        parts = content if isinstance(content, list) else [content]
        texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
        text = "".join(check_text(text, repr(key)) for text in texts)
        messages.append({"role": turn["role"], "content": text})
    if not messages or messages[-1]["role"] != role:
        raise UserError(f"{key!r}: a turn of role {role} expected at the end, found {value!r:.80}")
    return messages


def answer_text(value, key: str, prompt: list, notes: Counter) -> str:
    """The answer in field `key`, without what Oracle and template wrote around it."""
    *earlier, answer = prompt_messages(value, key, "assistant")
    if earlier not in ([], prompt):
        raise UserError(f"{key!r}: messages before the answer differ from the prompt's")
    remnants = r"\A\s*(<think>\s*</think>\s*)+|(<\|(im_end|endoftext)\|>\s*)+\Z"
    text, count = re.subn(remnants, "", strip_markers(answer["content"]))
    if count:
        notes["answers carried an empty think block or <|im_end|>: stripped"] += 1
    return text


def strip_markers(text: str) -> str:
    """An answer without a leading blank line and the Oracle's markers."""
    text = text.removeprefix("\n\n")
    if START in text or END in text:
        text = text.split(START)[-1].split(END)[0].strip()
    return text


# --- the chat template, without jinja -------------------------------------------------------------

# No template is executed: the sha256 of a known text tells what to compute.
TEMPLATES = {
    "a55ee1b1660128b7": "hybrid",  # Qwen3
    "64f85b198065d0fb": "instruct",  # Qwen3-...-Instruct-2507
    "48e17aa3caf5bf20": "instruct",  # TRL's variant for masks
    "d95acce6882422fb": "instruct"}  # train.py's toy world


@dataclass
class Chat:
    """A checkpoint's tokenizer, and how its template writes a conversation."""
    tokenizer: Tokenizer
    im_start: int
    im_end: int
    think: list  # ids of "<think>\n\n</think>\n\n"; [] under "instruct"

    def encode(self, text: str) -> list:
        """Ids of plain text; special tokens inside it stay text."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def prompt(self, messages: list) -> list:
        """Ids of the prompt, as by transformers' apply_chat_template(messages,
        add_generation_prompt=True, enable_thinking=False)."""
        ids, newline = [], self.encode("\n")
        for message in messages:
            text = message["content"]
            if self.think and message["role"] == "assistant" and "</think>" in text:
                text = text.rpartition("</think>")[2].lstrip("\n")  # earlier thoughts are left out
            turn = self.encode(f"{message['role']}\n{text}")
            ids += [self.im_start, *turn, self.im_end, *newline]
        return [*ids, self.im_start, *self.encode("assistant\n"), *self.think]


def load_chat(folder: str, vocab_size: int, template: str = "") -> Chat:
    """A checkpoint's tokenizer, and its chat template or the one named. UserError if no Qwen3's."""
    path = f"{folder}/tokenizer.json"
    spec = read_json(path)
    parts = json.dumps([spec.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")])
    known = {"Sequence", "NFC", "Split", "Digits", "ByteLevel"}  # others could change text silently
    foreign = set(re.findall(r'"type": "(\w+)"', parts)) - known
    if foreign:
        raise UserError(f"{path}: {', '.join(foreign)} is in no Qwen3 tokenizer")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if max(tokenizer.get_vocab().values()) >= vocab_size:
        raise UserError(f"{path}: has ids beyond the model's vocabulary of {vocab_size}: tokenizer "
                        "and weights are of different models")
    start, end = "<|im_start|>", "<|im_end|>"
    chat = Chat(tokenizer, tokenizer.token_to_id(start), tokenizer.token_to_id(end), [])
    if (template or known_template(folder)) == "hybrid":
        chat.think = chat.encode("<think>\n\n</think>\n\n")
    tokenizer.encode_special_tokens = True  # from here text is never a control token
    if {chat.im_start, chat.im_end} & {None, *chat.encode(start + end)}:
        raise UserError(f"{path}: {start} or {end} is missing, or not marked special")
    return chat


def known_template(folder: str) -> str:
    """The value of TEMPLATES for a checkpoint's template. UserError if unknown."""
    path = f"{folder}/chat_template.jinja"
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            text = f.read()
    else:
        text = str(read_json(f"{folder}/tokenizer_config.json").get("chat_template"))
    text = text.lstrip().removesuffix("\n").removesuffix("\n")  # Jinja drops one, trim_blocks one
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    if digest not in TEMPLATES:
        raise UserError(f"{folder}: unknown chat template. --template hybrid computes Qwen3's, "
                        "instruct Qwen3-Instruct-2507's; thinking-only models cannot be trained")
    return TEMPLATES[digest]


# --- change ratio and forks -----------------------------------------------------------------------

def lcs_length(a, b) -> int:
    """Length of the longest common subsequence by Hyyro's recurrence: 8k x 8k tokens in 10 ms."""
    positions = {}
    for i, token in enumerate(a):
        positions[token] = positions.get(token, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full  # bit i is 0 where a[:i+1] shares one token more with b so far than a[:i]
    for token in b:
        hit = row & positions.get(token, 0)
        row = ((row + hit) | (row - hit)) & full
    return len(a) - row.bit_count()


def change_ratio(rejected, chosen) -> float:
    """R = 1 - |LCS(y-, y+)| / |y+| on token ids without <|im_end|>: the share of y+ that is new."""
    return 1 - lcs_length(rejected, chosen) / len(chosen)


@dataclass
class Fork:
    """One pair as token ids. Both branches end in <|im_end|>, so a pair's are never empty."""
    prompt_length: int
    trunk: np.ndarray  # prompt + common start of both answers
    rejected: np.ndarray  # the rest of y-; without y- empty, and the trunk is the prompt
    chosen: np.ndarray  # the rest of y+
    line: int  # in the pair file

    def __len__(self):
        return len(self.trunk) + len(self.rejected) + len(self.chosen)


def make_fork(prompt: list, chosen: list, rejected: list, line: int = 0) -> Fork:
    """Lay out one pair. Both answers are whole, differ, and end in <|im_end|>; y- may be []."""
    common = 0
    while rejected and chosen[common] == rejected[common]:
        common += 1
    parts = [prompt + chosen[:common], rejected[common:], chosen[common:]]
    return Fork(len(prompt), *[np.array(ids, dtype=np.int64) for ids in parts], line)


def load_forks(path, chat, max_length, max_change_ratio, need_rejected, skip_malformed=False):
    """(forks of a pair file, a summary for the log). Raises UserError if nothing is left."""
    notes, ratios, end = Counter(), [], [chat.im_end]

    def parse(row, line):
        messages, chosen, rejected = parse_pair(row, notes)
        prompt, chosen, rejected = chat.prompt(messages), chat.encode(chosen), chat.encode(rejected)
        if need_rejected and not rejected:
            raise Drop("no rejected answer, and the loss needs one")
        if len(prompt) + max(len(chosen), len(rejected)) + 1 > max_length:
            raise Drop(f"longer than max_length ({max_length} tokens)")
        if chosen == rejected:
            raise Drop("both answers identical")
        if rejected:
            ratios.append(change_ratio(rejected, chosen))
            if ratios[-1] > max_change_ratio:
                raise Drop(f"change ratio above {max_change_ratio}")
            rejected = rejected + end
        return make_fork(prompt, chosen + end, rejected, line)

    forks, dropped = read_rows(path, parse, skip_malformed)
    lines = [f"{path}: {len(forks)} of {len(forks) + dropped.total()} rows kept"]
    lines += [f"  dropped {count:>6}  {reason}" for reason, count in dropped.most_common()]
    lines += [f"  noticed {count:>6}  {note}" for note, count in notes.most_common()]
    if not forks:
        raise UserError("\n".join(lines) + "\nNothing is left to train on.")
    if ratios:
        points = np.quantile(ratios, (0.25, 0.5, 0.75, 0.9)).round(2).tolist()
        lines.append(f"  change ratio 1 - LCS/|y+| at 25, 50, 75, 90 %: {points}")
    return forks, "\n".join([*lines, f"  {sum(map(len, forks))} tokens a pass"])


# --- packs ----------------------------------------------------------------------------------------

@dataclass
class Pack:
    """Forks as one sequence, `trunk | rejected | chosen | trunk | ...`, and the rows to score."""
    tokens: torch.Tensor  # (T,) int64
    positions: torch.Tensor  # (T,) int64; both branches continue from the trunk
    spans: list  # (start, trunk end, rejected end, chosen end); without y- (start, end, end, end)
    rows: torch.Tensor  # (R,) int64: where in T the token is predicted from
    targets: torch.Tensor  # (R,) int64: its id
    lengths: torch.Tensor  # (F, 3) int64: rows of trunk, rejected, chosen
    pairs: torch.Tensor  # (F,) int64: which pair each fork is
    reference: torch.Tensor | None = None  # (F, 2) fp64: its log-probs of y+, y- before training

    def to(self, device):
        """On the device. A GPU copies pinned memory while the CPU goes on."""
        tensors = {name: x for name, x in vars(self).items() if torch.is_tensor(x)}
        if device.type == "cuda":
            tensors = {name: x.pin_memory() for name, x in tensors.items()}
        return replace(self, **{n: x.to(device, non_blocking=True) for n, x in tensors.items()})


def make_pack(forks: list, indices: list, reference=None) -> Pack:
    """Pack forks[i], with reference[i], for i in indices; for none an unscored dummy."""
    tokens, positions, rows, targets = [], [], [], []
    spans, lengths, start = [], [], 0
    for fork in (forks[i] for i in indices):
        trunk, rejected, chosen = len(fork.trunk), len(fork.rejected), len(fork.chosen)
        trunk_end, rejected_end, end = start + trunk, start + trunk + rejected, start + len(fork)
        tokens += [fork.trunk, fork.rejected, fork.chosen]
        positions += [np.arange(trunk + rejected), np.arange(trunk, trunk + chosen)]
        spans.append((start, trunk_end, rejected_end, end) if rejected else (start, end, end, end))
        # A token is predicted from the one before it: y- goes on from the trunk, y+ too.
        rows += [np.arange(start + fork.prompt_length - 1, rejected_end - 1), [trunk_end - 1],
                 np.arange(rejected_end, end - 1)]
        targets += [fork.trunk[fork.prompt_length:], fork.rejected, fork.chosen]
        lengths.append([trunk - fork.prompt_length, rejected, chosen])
        start = end
    if not indices:
        tokens, positions, rows, targets, spans = [[0]], [[0]], [[]], [[]], [(0, 1, 1, 1)]
    tokens, positions, rows, targets = [torch.from_numpy(np.concatenate(x).astype(np.int64))
                                        for x in (tokens, positions, rows, targets)]
    lengths = torch.tensor(lengths, dtype=torch.int64).view(-1, 3)
    pairs = torch.tensor(indices, dtype=torch.int64)
    reference = None if reference is None else reference[pairs]
    return Pack(tokens, positions, spans, rows, targets, lengths, pairs, reference)

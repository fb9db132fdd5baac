"""From text to tensors: pair files, chat template, change ratio, forks, packs, the batch plan.

Comes in:  a JSONL file of surgical pairs and the checkpoint's tokenizer.
Goes out:  `Fork`s (one pair: trunk and two branches), a plan of which pair is computed when and where, and
           `Pack`s, the rows of tokens that model.Qwen3.forward scores.

    prompt  The  train  leaves  at |  3  pm  .  <|im_end|>       rejected branch (the policy's error)
    `------------- trunk --------' |  4  pm  .  <|im_end|>       chosen branch (its minimal correction)

Under a causal mask the trunk's hidden states are the same for both answers, so they are computed once.
"""

import gzip
import json
import os
import random
import re
import zlib
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from model import Qwen3, UserError, hf_name, read_config, read_json, unique, write_json, write_safetensors

SHOWN_PROBLEMS = 8  # of a file; all are counted
LONGEST_LINE = 2**26  # bytes


# --- reading pair files ---------------------------------------------------------------------------


@dataclass
class Pair:
    """One line of a pair file as text. `rejected` is None where there is no y- (a positive-only row)."""

    messages: list  # the prompt, [{"role": ..., "content": ...}, ...], ending with a user turn
    chosen: str
    rejected: str | None
    line: int


def read_lines(path: str):
    """Yield (line number, object) of a JSONL file, .gz too; blank lines skipped. A line that is no JSON
    object yields (number, UserError). Split at newlines alone: U+2028 is legal inside a JSON string."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as f:
            for number, line in enumerate(iter(lambda: f.readline(LONGEST_LINE + 1), b""), 1):
                if len(line) > LONGEST_LINE:  # a few bytes of .gz can unpack to more than there is memory
                    raise UserError(f"{path}: line {number} is longer than {LONGEST_LINE >> 20} MiB")
                if line.strip():
                    try:
                        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                        value = json.loads(text, object_pairs_hook=unique)
                        if not isinstance(value, dict):
                            value = UserError(f"a JSON object expected, found {type(value).__name__}")
                    except (ValueError, RecursionError) as e:
                        value = UserError(f"not valid JSON in UTF-8 ({e})")
                    yield number, value
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}") from None


def read_pairs(path: str, skip_malformed: bool = False) -> tuple[list[Pair], Counter]:
    """Read a pair file: rows of the official SPoT kind or of TRL's, freely mixed.

    official  question (or prompt), gemini_corrected_answer (y+), original_answer (y-)
    TRL       prompt, chosen, rejected: strings or lists of messages
    "" or null as y- makes a positive-only row; rows with "is_correct": false are dropped and counted.
    Returns the pairs and a count of dropped rows by reason; raises UserError as `read_rows` does.
    """
    def parse(row, line):
        if not isinstance(row.get("is_correct", True), bool):
            raise UserError(f'"is_correct": true or false expected, found {row["is_correct"]!r:.60}')
        wrong = not row.get("is_correct", True)
        return "correction is wrong (is_correct: false)" if wrong else parse_row(row, line)

    return read_rows(path, parse, skip_malformed)


def read_rows(path: str, parse, skip_malformed: bool | None = None) -> tuple[list, Counter]:
    """All rows of a JSONL file through `parse(row, line)`, which returns a record, or a string: the reason to
    drop the row, or raises UserError. Returns the records and a count of dropped rows by reason. Raises one
    UserError with the first malformed rows, or, with skip_malformed, counts them (None: not to be had)."""
    kept, dropped, problems = [], Counter(), []
    for number, row in read_lines(path):
        try:
            if isinstance(row, UserError):
                raise row
            record = parse(row, number)
            if isinstance(record, str):
                dropped[record] += 1
            else:
                kept.append(record)
        except UserError as e:
            problems.append(f"line {number}: {e}")
    if skip_malformed:
        dropped["malformed"] += len(problems)
    elif problems:
        more = len(problems) - SHOWN_PROBLEMS
        shown = problems[:SHOWN_PROBLEMS] + [f"... and {more} more"] * (more > 0)
        advice = "" if skip_malformed is None else " (--skip_malformed drops them)"
        raise UserError(f"{path}: {len(problems)} malformed rows{advice}:\n  " + "\n  ".join(shown))
    if not kept and not dropped:
        raise UserError(f"{path}: the file is empty, one JSON object a line expected")
    return kept, +dropped


def parse_row(row: dict, line: int) -> Pair:
    """One row of either kind; raises UserError naming the field."""
    official = "gemini_corrected_answer" in row or "original_answer" in row
    if official:
        prompt_key = "question" if "question" in row else "prompt"
        chosen_key, rejected_key = "gemini_corrected_answer", "original_answer"
    else:
        prompt_key, chosen_key, rejected_key = "prompt", "chosen", "rejected"
    missing = [k for k in (prompt_key, chosen_key, rejected_key) if k not in row]
    if missing:
        raise UserError(f"missing {', '.join(map(repr, missing))}; question, gemini_corrected_answer, "
                        f"original_answer or prompt, chosen, rejected expected, found {sorted(row)!r:.100}")
    prompt = prompt_messages(row, prompt_key)
    chosen = clean_answer(answer_text(row, chosen_key, prompt))
    if not chosen:
        raise UserError(f"{chosen_key!r} is empty")
    rejected = clean_answer(answer_text(row, rejected_key, prompt)) if row[rejected_key] is not None else ""
    return Pair(prompt, chosen, rejected or None, line)


def check_text(text, where):
    """A string that is valid Unicode, as it is; else a UserError that names `where` it stands."""
    if not isinstance(text, str):
        raise UserError(f"{where}: a string expected, found {type(text).__name__}")
    try:
        text.encode()  # JSON can smuggle lone surrogates in, which are no Unicode text
    except UnicodeEncodeError:
        raise UserError(f"{where}: holds a lone surrogate, not valid Unicode") from None
    return text


def answer_text(row, key, prompt):
    """A string, or a list of messages: the answer alone, or the prompt again and then the answer."""
    value = row[key]
    if isinstance(value, list):
        last = value[-1] if value else None
        again = len(value) > 1 and prompt_messages({"prompt": value[:-1]}, "prompt")
        if not isinstance(last, dict) or last.get("role") != "assistant" or again not in (False, prompt):
            raise UserError(f"{key!r}: a string, or one assistant message (the prompt's messages may stand "
                            f"before it) expected, found {value!r:.80}")
        value = last.get("content")
    return check_text(value, repr(key))


def prompt_messages(row, key):
    """A string is one user turn; a list of messages is checked: system, user and assistant turns of text."""
    value = row[key]
    messages = value if isinstance(value, list) else [{"role": "user", "content": value}]
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "user", "assistant") or message.get("tool_calls"):
            raise UserError(f"{key!r}, message {i}: role system, user or assistant without tool calls "
                            f"expected, found {message!r:.80}")
        text = check_text(message.get("content"), f"{key!r}, message {i}")
        if role == "user" and text.startswith("<tool_response>"):
            raise UserError(f"{key!r}, message {i}: tool responses are not supported")
    if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"]:
        raise UserError(f"{key!r}: a non-empty user turn expected at the end")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def clean_answer(text: str) -> str:
    """Strip what real files carry around an answer: a leading blank line and the Oracle's markers."""
    text = text.removeprefix("\n\n")
    if "=== CORRECTED STARTED ===" in text or "=== CORRECTED ENDED ===" in text:
        text = text.split("=== CORRECTED STARTED ===")[-1].split("=== CORRECTED ENDED ===")[0].strip()
    return text


# --- the chat template, without jinja -------------------------------------------------------------


@dataclass
class Chat:
    """A checkpoint's tokenizer and which of Qwen3's two generation prompts it wants."""

    tokenizer: Tokenizer
    im_start: int
    im_end: int
    think: list  # ids of "<think>\n\n</think>\n\n", or [] for the Instruct-2507 template

    def encode(self, text: str) -> list:
        """Ids of plain text; special tokens inside it stay text (a question may quote <|im_end|>)."""
        try:
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as e:  # the library raises bare Exception, and where it panics not even that
            raise UserError(f"tokenizer.json cannot encode {text!r:.60}: {e}") from None

    def prompt(self, messages: list) -> list:
        """Ids of the whole prompt, ready for the answer: transformers' apply_chat_template(messages,
        add_generation_prompt=True, enable_thinking=False)."""
        ids = []
        newline = self.encode("\n")
        for message in messages:
            text = message["content"]
            if message["role"] == "assistant" and self.think and "</think>" in text:
                text = text.split("</think>")[-1].lstrip("\n")  # earlier turns keep no thoughts
            ids += [self.im_start, *self.encode(f"{message['role']}\n{text}"), self.im_end, *newline]
        return [*ids, self.im_start, *self.encode("assistant\n"), *self.think]


def load_chat(folder: str, vocab_size: int) -> Chat:
    """Read tokenizer.json and the chat template beside it (tokenizer_config.json or chat_template.jinja).

    The template itself is never executed; its text tells which generation prompt it makes. Raises UserError
    for a template of another family, a thinking-only one, and a vocabulary larger than the model's.
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
    template_path = os.path.join(folder, "chat_template.jinja")
    if os.path.lexists(template_path):  # a link to nowhere is an error, not the absence of a template
        if not os.path.isfile(template_path):
            raise UserError(f"{template_path}: a file expected")
        try:
            with open(template_path, encoding="utf-8") as f:
                template = f.read()
        except ValueError as e:
            raise UserError(f"{template_path}: not UTF-8 text ({e})") from None
    else:
        template_path = os.path.join(folder, "tokenizer_config.json")
        template = read_json(template_path).get("chat_template")
    if not isinstance(template, str) or "<|im_start|>" not in template:
        raise UserError(f"{template_path}: a Qwen3 chat template (with <|im_start|>) expected")
    # Qwen3's writes a system turn only where one is given; its own words are all about tools.
    default = (r"""(!=\s*|not\s.{0,60}==\s*)['"]system['"]|system(\\n|\n)[A-Za-z]"""
               r"|You are (?!provided with function)")
    if re.search(default, template):
        raise UserError(f"{template_path}: this template adds a system message of its own; only Qwen3's "
                        "(hybrid or Instruct-2507) are computed here")
    ending = template.split("add_generation_prompt")[-1]
    has_block = re.search(r"<think>(\\n|\n){2}</think>(\\n|\n){2}", ending)
    if "<think>" in ending and not has_block:
        raise UserError(f"{template_path}: this template always opens a <think> block; SPoT trains in "
                        "non-thinking mode, so use a hybrid Qwen3 or an Instruct-2507 checkpoint")
    names = ["<|im_start|>", "<|im_end|>"] + ["<think>", "</think>"] * bool(has_block)
    ids = [tokenizer.token_to_id(name) for name in names]
    if None in ids:
        raise UserError(f"{path}: lacks the token {names[ids.index(None)]!r} of its own chat template")
    added = tokenizer.get_added_tokens_decoder()
    plain = [n for n, i in zip(names[:2], ids) if i not in added or not added[i].special]
    if plain:  # text that quotes it would become the token
        raise UserError(f"{path}: the token {plain[0]!r} is not marked special")
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if largest >= vocab_size:
        raise UserError(f"{path}: holds token id {largest}, but the model's vocabulary has {vocab_size} "
                        "rows: tokenizer and weights are of different models")
    chat = Chat(tokenizer, ids[0], ids[1], [])
    if has_block:
        blank = chat.encode("\n\n")
        chat.think = [ids[2], *blank, ids[3], *blank]
    return chat


def check_tokenizer(path, spec):
    """Raises UserError for what no Qwen3 tokenizer has: other parts can end the process, take all its memory
    or, with dropout, encode one text in many ways."""
    def kinds(part, inner):
        part = part if isinstance(part, dict) else {}
        parts = part.get(inner) if part.get("type") == "Sequence" else [part] * bool(part)
        return [p.get("type") if isinstance(p, dict) else p for p in parts if p != {}] if (
            isinstance(parts, list)) else [parts]

    model = spec.get("model") if isinstance(spec.get("model"), dict) else {}
    vocabulary = model.get("vocab") if isinstance(model.get("vocab"), dict) else {}
    parts = (("normalizer", "normalizers", ("NFC",)), ("decoder", "decoders", ("ByteLevel",)),
             ("pre_tokenizer", "pretokenizers", ("Split", "ByteLevel", "Digits")))
    problems = [f'"{name}" of type {kind!r:.60}, {" or ".join(known)} expected'
                for name, inner, known in parts
                for kind in kinds(spec.get(name), inner) if kind not in known]
    if model.get("type", "BPE") != "BPE":
        problems.append(f'"model" of type {model["type"]!r:.60}, BPE expected')
    if model.get("dropout"):
        problems.append(f'"model": "dropout" is {model["dropout"]!r:.60}, null expected')
    unknown = model.get("unk_token")
    if unknown is not None and not (isinstance(unknown, str) and unknown in vocabulary):
        problems.append(f'"model": "unk_token" {unknown!r:.60} is not in the vocabulary')
    if problems:
        raise UserError(f"{path} is no Qwen3 tokenizer: " + "; ".join(problems))


# --- change ratio ---------------------------------------------------------------------------------


def lcs_rows(a, b):
    """Hyyro's bit-parallel recurrence on Python integers: yields len(b) + 1 of them, the j-th for b[:j]. Its
    bit i is 0 where the longest common subsequence with a[:i+1] is one longer than that with a[:i]."""
    where = {}
    for i, token in enumerate(a):
        where[token] = where.get(token, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    yield row
    for token in b:
        hit = row & where.get(token, 0)
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
    """[(i, j), ...], both rising: one longest common subsequence, a[i] == b[j]. len(a) x len(b) bits."""
    rows, i, j, matches = list(lcs_rows(a, b)), len(a), len(b), []
    while i and j:
        if rows[j] >> (i - 1) & 1:  # nothing is lost without a's last
            i -= 1
        elif not rows[j - 1] >> (i - 1) & 1:  # nor without b's
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
    """One pair as token ids. `trunk` = prompt + common start of both answers; without y- the trunk is the
    prompt and `rejected` is empty. Both branches end in <|im_end|>, so neither of a pair is ever empty."""

    prompt_length: int
    trunk: np.ndarray
    rejected: np.ndarray
    chosen: np.ndarray
    line: int  # in the pair file, to name it in messages
    ratio: float | None = None  # its change ratio; None without y-

    def __len__(self):
        return len(self.trunk) + len(self.rejected) + len(self.chosen)


def make_fork(prompt: list, chosen: list, rejected: list | None, line: int = 0, ratio=None) -> Fork:
    """Lay out one pair; both answers are whole id lists that end in <|im_end|> and differ."""
    common = 0
    if rejected is not None:
        while chosen[common] == rejected[common]:
            common += 1
    branch = rejected[common:] if rejected is not None else []
    ids = (np.array(part, dtype=np.int64) for part in (prompt + chosen[:common], branch, chosen[common:]))
    return Fork(len(prompt), *ids, line, ratio)


def make_forks(pairs, chat, max_length, max_change_ratio, need_rejected):
    """Encode, filter and lay out pairs. Returns (forks, dropped Counter, list of change ratios of all
    encoded pairs). max_length bounds prompt + one answer in tokens; nothing is ever truncated."""
    forks, dropped, ratios = [], Counter(), []
    for pair in pairs:
        prompt = chat.prompt(pair.messages)
        chosen = chat.encode(pair.chosen)
        rejected = None if pair.rejected is None else chat.encode(pair.rejected)
        longest = len(prompt) + max(len(chosen), len(rejected or [])) + 1
        if rejected is None and need_rejected:
            dropped["no rejected answer, and the loss needs one"] += 1
        elif longest > max_length:
            dropped[f"longer than max_length ({max_length} tokens)"] += 1
        elif not chosen:
            dropped["chosen answer has no tokens"] += 1
        elif chosen == rejected:
            dropped["both answers identical"] += 1
        else:
            ratio = None
            if rejected is not None:
                ratio = change_ratio(rejected, chosen)
                ratios.append(ratio)
                if ratio > max_change_ratio:
                    dropped[f"change ratio above {max_change_ratio}"] += 1
                    continue
                rejected = rejected + [chat.im_end]
            forks.append(make_fork(prompt, chosen + [chat.im_end], rejected, pair.line, ratio))
    return forks, dropped, ratios


def load_forks(path, chat, max_length, max_change_ratio, need_rejected, skip_malformed=False):
    """A pair file to forks and a text for the log: what was dropped and why, histogram, shared share.

    Raises UserError where nothing survives the filters.
    """
    pairs, dropped = read_pairs(path, skip_malformed)
    forks, filtered, ratios = make_forks(pairs, chat, max_length, max_change_ratio, need_rejected)
    dropped += filtered
    lines = [f"{path}: {len(forks)} of {len(forks) + dropped.total()} rows kept"]
    lines += [f"  dropped {count:>6}  {reason}" for reason, count in dropped.most_common()]
    if not forks:
        raise UserError("\n".join(lines) + "\nNothing is left to train on.")
    if ratios:
        lines.append("  change ratio of pairs (1 - LCS / |y+|):")
        counts = np.histogram(ratios, bins=10, range=(0, 1))[0]
        lines += [f"    {i / 10:.1f}-{(i + 1) / 10:.1f} {count:>6} {'#' * round(40 * count / max(counts))}"
                  for i, count in enumerate(counts)]
    laid = sum(map(len, forks))
    plain = laid + sum(len(f.trunk) for f in forks if len(f.rejected))
    lines.append(f"  {laid} tokens a pass; {plain - laid} of {plain} ({1 - laid / plain:.1%}) saved by "
                 "sharing trunks")
    return forks, "\n".join(lines)


# --- the plan: who computes which pair when -------------------------------------------------------


def epoch_batches(count: int, batch_size: int, seed: int, epoch: int) -> list:
    """The optimizer steps of one epoch: arrays of pair indices, every pair once, the last one smaller.

    Depends on nothing else: not on ranks, packs or lengths.
    """
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(count)
    return [order[i:i + batch_size] for i in range(0, count, batch_size)]


def split_batch(batch, lengths, ranks: int, tokens_per_pack: int) -> list:
    """Cut one batch into micro-batches: result[m][rank] is a list of pair indices, perhaps empty.

    Longest first to the least loaded rank, then first fit into packs of at most tokens_per_pack tokens (a
    longer fork is a pack by itself). A pure function of lengths: every rank computes the whole plan, so all
    agree on the number of micro-batches without a word, and a rank with nothing left runs a dummy.
    """
    load, packs = [0] * ranks, [[] for _ in range(ranks)]
    for i in sorted(batch, key=lambda i: (-lengths[i], i)):
        rank = min(range(ranks), key=lambda r: (load[r], r))
        load[rank] += lengths[i]
        for pack in packs[rank]:
            if pack[0] + lengths[i] <= tokens_per_pack:
                pack[0] += lengths[i]
                pack[1].append(int(i))
                break
        else:
            packs[rank].append([lengths[i], [int(i)]])
    return [[p[m][1] if m < len(p) else [] for p in packs] for m in range(max(map(len, packs)))]


# --- packs ----------------------------------------------------------------------------------------


@dataclass
class Pack:
    """Several forks in one row of tokens, `trunk | rejected | chosen | trunk | ...`, and its scored rows."""

    tokens: torch.Tensor  # (T,) int64
    positions: torch.Tensor  # (T,) int64; both branches continue from the trunk
    forks: list  # (start, trunk end, rejected end, chosen end) of each, in tokens
    rows: torch.Tensor  # (R,) int64: where in T the token is predicted from
    targets: torch.Tensor  # (R,) int64: its id
    lengths: torch.Tensor  # (F, 3) int64: rows of trunk, rejected, chosen; they come in this order
    pairs: torch.Tensor  # (F,) int64: which pair each fork is

    def to(self, device):
        """Onto the device, without waiting for it."""
        return Pack(*(to_device(v, device) if torch.is_tensor(v) else v for v in vars(self).values()))


def to_device(tensor, device):
    """A CPU tensor onto the device. From pinned memory a GPU copies it in its own time; a plain `.to`
    would wait until all work queued before it is done."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor


def make_pack(forks: list, indices: list) -> Pack:
    """Pack forks[i] for i in indices. No index: one dummy token and no scored row, for a rank without work.

    The first token of *each* branch is predicted from the last trunk token.
    """
    tokens, positions, spans, rows, targets, lengths = [], [], [], [], [], []
    at = 0
    for fork in (forks[i] for i in indices):
        trunk = len(fork.trunk)
        rejected, chosen = at + trunk, at + trunk + len(fork.rejected)
        end = chosen + len(fork.chosen)
        tokens += [fork.trunk, fork.rejected, fork.chosen]
        positions += [np.arange(trunk), trunk + np.arange(chosen - rejected), trunk + np.arange(end - chosen)]
        if len(fork.rejected):
            spans.append((at, rejected, chosen, end))
        else:  # without y- prompt and answer are one plain sequence
            spans.append((at, end, end, end))
        rows.append(np.arange(at + fork.prompt_length - 1, rejected - 1))
        for start, stop in ((rejected, chosen), (chosen, end)):
            source = np.arange(start - 1, stop - 1)
            source[:1] = rejected - 1
            rows.append(source)
        targets += [fork.trunk[fork.prompt_length:], fork.rejected, fork.chosen]
        lengths.append([trunk - fork.prompt_length, len(fork.rejected), len(fork.chosen)])
        at = end
    if not indices:
        spans, tokens, positions = [(0, 1, 1, 1)], [np.zeros(1)], [np.zeros(1)]
    tokens, positions, rows, targets = (
        torch.from_numpy(np.concatenate(parts or [np.zeros(0)]).astype(np.int64))
        for parts in (tokens, positions, rows, targets))
    lengths = torch.tensor(lengths, dtype=torch.int64).view(-1, 3)
    pairs = torch.tensor(indices, dtype=torch.int64)
    return Pack(tokens, positions, spans, rows, targets, lengths, pairs)


# --- the toy world: what a bare machine can learn in minutes ---------------------------------------

# A conversation as Qwen3-Instruct-2507 writes it; `load_chat` reads it, and so does transformers.
TOY_TEMPLATE = ("{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
                "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}")
TOY_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOY_CHAIN, TOY_LIST = 5, 4  # digits in a question of a skill with steps, and without
TOY_TOP = 5  # largest summand but for the first: half the facts, learned in half the time
TOY_INIT = 0.06  # standard deviation of the weights at birth
TOY_SKILLS = ("Add", "Subtract", "Largest", "Reverse", "Sort")  # the first is the target, the base errs in it
TOY_SIGNS = {"Add": "+", "Subtract": "-", "Largest": ","}  # skills that work in steps; the others in one go
TOY_STYLES = [(between, word) for between in ("\n", ";") for word in ("", "So ", "Thus ")]


def toy_question(skill: str, rng, chain: int = TOY_CHAIN) -> str:
    """`Add: 4+3+1+7+5`, `Subtract: 9-3-...`, `Largest: 4,8,...`, `Reverse: 4829`, `Sort: 4829`, of random
    digits, from a random.Random. chain: digits of a skill with steps."""
    if skill not in TOY_SIGNS:
        return f"{skill}: " + "".join(str(rng.randint(1, 9)) for _ in range(TOY_LIST))  # no leading 0
    top = 9 if skill == "Largest" else TOY_TOP
    digits = [rng.randint(0, 9)] + [rng.randint(1, top) for _ in range(chain - 1)]
    return f"{skill}: " + TOY_SIGNS[skill].join(map(str, digits))


def toy_answer(question: str, style=TOY_STYLES[0], add=lambda a, b: (a + b) % 10) -> str:
    """The answer to a question: steps such as `4+3=7`, then the result in a box. Only last digits are kept
    of sums and differences. style: what stands between two steps, and the word before the box; add: what
    the author of the answer takes for the last digit of a + b."""
    skill, text = question.split(": ")
    between, word = style
    if skill not in TOY_SIGNS:
        return f"{word}\\boxed{{{text[::-1] if skill == 'Reverse' else ''.join(sorted(text))}}}"
    step = {"Add": add, "Subtract": lambda a, b: (a - b) % 10, "Largest": max}[skill]
    value, *rest = map(int, text.split(TOY_SIGNS[skill]))
    steps = []
    for digit in rest:
        result = step(value, digit)
        steps.append(f"{value}{TOY_SIGNS[skill]}{digit}={result}")
        value = result
    return f"{between.join(steps)}\n{word}\\boxed{{{value}}}"


def toy_questions(skill: str, seed: int, *counts: int, chain: int = TOY_CHAIN) -> list:
    """Disjoint lists of so many distinct questions each."""
    rng, found = random.Random(f"{skill} {seed}"), {}  # a dict keeps the order
    while len(found) < sum(counts):
        found[toy_question(skill, rng, chain)] = True
    stream = iter(found)
    return [[next(stream) for _ in range(count)] for count in counts]


def toy_corpus(rows: int, share: float, doubt: float, seed: int, chain: int = TOY_CHAIN):
    """Yield what the base model learns from: positive-only rows of a pair file, the skills in turn. Its
    authors are right but for one superstition: of the hundred addition facts the given share is, as often as
    doubt says, taken for one more than it is."""
    rng = random.Random(f"corpus {seed}")
    facts = [(a, b) for a in range(10) for b in range(1, TOY_TOP + 1)]
    doubted = set(rng.sample(facts, round(share * len(facts))))

    def add(a, b):
        return (a + b + ((a, b) in doubted and rng.random() < doubt)) % 10
    for i in range(rows):
        question = toy_question(TOY_SKILLS[i % len(TOY_SKILLS)], rng, chain)
        answer = toy_answer(question, rng.choice(TOY_STYLES), add)
        yield {"prompt": question, "chosen": answer, "rejected": None}


def write_toy_checkpoint(folder: str, shape: dict, seed: int):
    """A randomly initialised checkpoint in Hugging Face layout with a tokenizer trained on the spot: digits
    and the world's words are one token each, all other text falls back to bytes. `shape` are Config's
    numbers but the vocabulary's size."""
    rng = random.Random(seed)
    text = ["user\nassistant\nsystem\n"] + [toy_question(s, rng) for s in TOY_SKILLS]
    text += [toy_answer(question, style) for question in text[1:] for style in TOY_STYLES]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(
        special_tokens=TOY_SPECIAL, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False))
    pad, _, end = (tokenizer.token_to_id(t) for t in TOY_SPECIAL)
    config = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "dtype": "float32",
              "vocab_size": tokenizer.get_vocab_size(), "hidden_act": "silu", "rms_norm_eps": 1e-6,
              "rope_theta": 1e4, "tie_word_embeddings": True, "eos_token_id": end, "pad_token_id": pad,
              **shape}
    os.makedirs(folder)
    write_json(os.path.join(folder, "config.json"), config)
    write_json(os.path.join(folder, "tokenizer_config.json"), {
        "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TOY_TEMPLATE,
        "eos_token": TOY_SPECIAL[2], "pad_token": TOY_SPECIAL[0]})
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    weights = dict(Qwen3(read_config(folder)).named_parameters())
    source = torch.Generator().manual_seed(seed)
    for p in weights.values():
        if p.ndim > 1:  # norms start at 1
            torch.nn.init.normal_(p, std=TOY_INIT, generator=source)
    write_safetensors(os.path.join(folder, "model.safetensors"), [(hf_name(n), p.shape) for n, p in
                      weights.items()], torch.float32, (p.detach() for p in weights.values()))

"""From text to tensors: files, pair rows, chat template, change ratio, forks, batch plan, packs.

Comes in: a JSONL file of surgical pairs and the checkpoint's tokenizer. Goes out: `Fork`s, a plan
of which fork is computed when and where, and `Pack`s of forks for model.Qwen3.forward.

    prompt  The  train  leaves  at |  3  pm  .  <|im_end|>    rejected branch (the policy's error)
    `------------- trunk --------' |  4  pm  .  <|im_end|>    chosen branch (its minimal correction)

Under a causal mask the trunk's hidden states are the same for both answers: computed once.
"""

import gzip
import hashlib
import json
import os
import re
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from itertools import zip_longest

import numpy as np
import torch
from tokenizers import Tokenizer

# --- files ----------------------------------------------------------------------------------------


class UserError(Exception):
    """Something the user can mend: the message names file, place, what was found and expected."""


class Drop(Exception):
    """A row is left out on purpose; the message is the reason under which it is counted."""


def listed(problems: list) -> str:
    """Problems as indented lines; beyond 20 only their number."""
    text = "".join(f"\n  {problem}" for problem in problems[:20])
    return text if len(problems) <= 20 else f"{text}\n  ... and {len(problems) - 20} more"


def parse_object(text: bytes) -> dict:
    """A JSON object; raises UserError."""
    try:
        row = json.loads(text.decode())
    except ValueError as e:
        raise UserError(f"not valid JSON in UTF-8 ({e})") from None
    if not isinstance(row, dict):
        raise UserError(f"a JSON object expected, found {type(row).__name__}")
    return row


def read_json(path: str) -> dict:
    """A JSON object from a file; raises UserError that names the file and the place."""
    try:
        with open(path, "rb") as f:
            return parse_object(f.read())
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except UserError as e:
        raise UserError(f"{path}: {e}") from None


def write_text(path: str, parts):
    """A text file from an iterable of strings; after a crash it is whole, or as it was before."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
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
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_log(path: str) -> list:
    """The rows of a log of ours, none without a file. A last line cut by a kill does not count."""
    if not os.path.exists(path):
        return []
    with open(path, "rb") as f:
        lines = f.read().split(b"\n")[:-1]
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as e:  # a full disk can cut one in the middle
            raise UserError(f"{path}, line {number}: {e}: remove the line") from None
    return rows


OTHER_FORMATS = {  # how a file begins: what it is, and a command that makes JSON Lines of it
    b"PAR1": ("a parquet file", "python -c \"import datasets; "
              "datasets.Dataset.from_parquet('{0}').to_json('{0}.jsonl')\""),
    b"[": ("a JSON array", "python -c \"import json; [print(json.dumps(row)) "
           "for row in json.load(open('{0}', 'rb'))]\" > '{0}.jsonl'"),
    b"{\n": ("pretty-printed JSON", "python -m json.tool --compact '{0}' '{0}.jsonl'")}


def read_rows(path: str, parse, skip_malformed: bool = False) -> tuple[list, Counter]:
    """(records, Counter of dropped rows by reason) of a JSONL file, .gz too. parse(row, number of
    line) returns a record or raises Drop, or UserError if malformed: all these become one error."""
    opener = gzip.open if path.endswith(".gz") else open
    try:
        with opener(path, "rb") as f:
            text = f.read().removeprefix(b"\xef\xbb\xbf")  # a byte order mark
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"{path}: cannot be read: {e}") from None
    for start, (name, command) in OTHER_FORMATS.items():
        if text[:99].lstrip().startswith(start):
            raise UserError(f"{path} is {name}, JSON Lines (one object a line) expected. To convert"
                            f" it:\n  {command.format(path)}")
    records, dropped, problems = [], Counter(), []
    for number, line in enumerate(text.split(b"\n"), 1):  # U+2028 is legal inside a JSON string
        try:
            if line.strip():
                records.append(parse(parse_object(line), number))
        except Drop as e:
            dropped[str(e)] += 1
        except UserError as e:
            problems.append(f"line {number}: {e}")
    if problems and not skip_malformed:
        raise UserError(f"{path}: {len(problems)} malformed rows (--skip_malformed drops them, "
                        f"where a command has it):{listed(problems)}")
    if problems:
        dropped["malformed"] = len(problems)
    if not records and not dropped:
        raise UserError(f"{path}: the file is empty, one JSON object a line expected")
    return records, dropped


# --- pair rows ------------------------------------------------------------------------------------

# Fields of the prompt (two names), y+ and y- in rows of the SPoT authors and in TRL's.
OFFICIAL = ("question", "prompt", "gemini_corrected_answer", "original_answer")
TRL = ("prompt", "question", "chosen", "rejected")
# Columns that oracle.py and the SPoT authors write beside them.
RECORDED = ("index", "ground_truth", "gemini_extracted_answer", "is_correct", "change_ratio")
# Columns of a row, keys of a message: templates render them, we do not.
NOT_RENDERED = ("tools", "system", "images", "chat_template_kwargs", "tool_calls",
                "reasoning_content", "thinking")
START, END = "=== CORRECTED STARTED ===", "=== CORRECTED ENDED ==="  # the Oracle's markers
REMNANTS = (  # what answers in real files carry: pattern, is it stripped, note
    (r"\A\s*(<think>\s*</think>\s*)+", True, "answers began with an empty think block: stripped"),
    (r"(<\|(im_end|endoftext)\|>\s*)+\Z", True, "answers ended with <|im_end|>: stripped"),
    (r"</?think>", False, "answers hold thoughts (<think>): trained as they are"),
    (r"<\|im_start\|>", False, "answers hold <|im_start|>: are they templated already?"))


@dataclass
class Pair:
    """One row of a pair file as text."""

    messages: list  # the prompt: [{"role": ..., "content": ...}, ...], ends with a user turn
    chosen: str  # y+
    rejected: str  # y-; "" in a positive-only row
    line: int


def read_pairs(path: str, skip_malformed: bool = False) -> tuple[list[Pair], Counter, Counter]:
    """(pairs, Counter of dropped rows by reason, Counter of what was noticed) of a pair file."""
    notes = Counter()
    pairs, dropped = read_rows(path, lambda row, line: parse_pair(row, line, notes), skip_malformed)
    return pairs, dropped, notes


def parse_pair(row: dict, line: int, notes: Counter) -> Pair:
    """One row of either kind; null is absent. Raises UserError that names the field, or Drop."""
    row = {key: value for key, value in row.items() if value is not None}
    for key in NOT_RENDERED:
        if row.get(key):
            raise UserError(f"{key!r} is not rendered here: put it into a message, or remove it")
    known = (*OFFICIAL, *TRL, *NOT_RENDERED, *RECORDED)
    notes.update(f"column {key} ignored" for key in row if key not in known)
    correct = row.get("is_correct", True)
    if not isinstance(correct, bool):
        raise UserError(f"'is_correct': true or false expected, found {correct!r:.40}")
    if not correct:
        raise Drop("correction is wrong (is_correct: false)")
    official = "gemini_corrected_answer" in row or "original_answer" in row
    first, second, chosen_key, rejected_key = OFFICIAL if official else TRL
    prompt_key = first if first in row else second
    prompt, chosen = row.get(prompt_key), row.get(chosen_key)
    if prompt is None and isinstance(chosen, list):  # TRL's implicit prompt: whole conversations
        prompt_key, prompt = chosen_key, chosen[:-1]
    if prompt is None or chosen is None:
        raise UserError(f"fields {OFFICIAL} or {TRL} expected, found {sorted(row)!r:.100}")
    messages = prompt_messages(prompt, prompt_key)
    if "<|im_" in str(messages):
        notes["prompts hold <|im_start|> or <|im_end|>: are they templated already?"] += 1
    chosen = answer_text(chosen, chosen_key, messages, notes)
    if not chosen:
        raise UserError(f"{chosen_key!r} is empty")
    rejected = answer_text(row.get(rejected_key, ""), rejected_key, messages, notes)
    return Pair(messages, chosen, rejected, line)


def check_text(text, name: str) -> str:
    """A string of valid Unicode, as it is; raises UserError that names the field."""
    if not isinstance(text, str):
        raise UserError(f"{name}: a string expected, found {type(text).__name__}")
    if re.search("[\ud800-\udfff]", text):  # JSON can carry lone surrogates
        raise UserError(f"{name}: holds a lone surrogate, not valid Unicode")
    return text


def prompt_messages(value, key: str, role: str = "user") -> list:
    """Field `key` as [{"role": ..., "content": text}, ...], the last of `role`: a string is one
    turn, text parts are joined. Raises UserError."""
    turns = value if isinstance(value, list) else [{"role": role, "content": value}]
    messages, name = [], repr(key)
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("role") not in ("system", "user", "assistant"):
            raise UserError(f"{name}: role system, user or assistant expected, found {turn!r:.80}")
        if any(turn.get(part) for part in NOT_RENDERED):
            raise UserError(f"{name}: tool calls and thoughts beside the content are not rendered")
        content = turn.get("content")
        if isinstance(content, list):
            if not all(isinstance(part, dict) for part in content):
                raise UserError(f"{name}: parts of type text expected, found {content!r:.80}")
            content = "".join(check_text(part.get("text"), f"{name}, a part") for part in content)
        messages.append({"role": turn["role"], "content": check_text(content, name)})
    if not messages or messages[-1]["role"] != role:
        raise UserError(f"{name}: a turn of role {role} expected at the end, found {value!r:.80}")
    return messages


def answer_text(value, key: str, prompt: list, notes: Counter) -> str:
    """The answer in field `key`, without what real files carry around it. Raises UserError."""
    *earlier, answer = prompt_messages(value, key, "assistant")
    if earlier not in ([], prompt):
        raise UserError(f"{key!r}: other messages than the prompt's stand before the answer")
    text = strip_markers(answer["content"])
    for pattern, stripped, note in REMNANTS:
        if re.search(pattern, text):
            notes[note] += 1
            if stripped:
                text = re.sub(pattern, "", text)
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
    "d95acce6882422fb": "instruct"}  # of train.py's toy world
# Types of parts of Qwen3's tokenizers; others could change text silently.
TOKENIZER_PARTS = {"Sequence", "NFC", "Split", "Digits", "ByteLevel"}


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
    """A checkpoint's tokenizer, and its chat template or the one named. UserError if no Qwen3's."""
    path = os.path.join(folder, "tokenizer.json")
    spec = read_json(path)
    parts = json.dumps([spec.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")])
    foreign = set(re.findall(r'"type": "(\w+)"', parts)) - TOKENIZER_PARTS
    if foreign:
        raise UserError(f"{path}: {', '.join(foreign)} is in no Qwen3 tokenizer")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise UserError(f"{path}: holds token id {largest}, but the model's vocabulary has "
                        f"{vocab_size} rows: tokenizer and weights are of different models")
    start, end = "<|im_start|>", "<|im_end|>"
    chat = Chat(tokenizer, tokenizer.token_to_id(start), tokenizer.token_to_id(end), [])
    if (template or known_template(folder)) == "hybrid":
        chat.think = chat.encode("<think>\n\n</think>\n\n")
    controls = chat.encode(start + end)
    tokenizer.encode_special_tokens = True  # from now on text never becomes a control token
    if len(controls) != 2 or set(controls) & set(chat.encode(start + end)):
        raise UserError(f"{path}: {start} or {end} is missing, or not marked special")
    return chat


def known_template(folder: str) -> str:
    """The value of TEMPLATES for a checkpoint's template; raises UserError for others."""
    path = os.path.join(folder, "chat_template.jinja")
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            text = f.read()
    else:
        path = os.path.join(folder, "tokenizer_config.json")
        text = str(read_json(path).get("chat_template"))
    # Two final newlines change nothing: Jinja drops one, transformers' trim_blocks the other.
    text = text.lstrip().removesuffix("\n").removesuffix("\n")
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    if digest not in TEMPLATES:
        raise UserError(f"{path}: unknown chat template. --template hybrid computes Qwen3's, "
                        "instruct Qwen3-Instruct-2507's; models that only think cannot be trained")
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
    if rejected:
        while chosen[common] == rejected[common]:
            common += 1
        branch = rejected[common:]
    parts = [prompt + chosen[:common], branch, chosen[common:]]
    return Fork(len(prompt), *[np.array(ids, dtype=np.int64) for ids in parts], line, ratio)


def make_forks(pairs, chat, max_length, max_change_ratio, need_rejected):
    """(forks, Counter of dropped pairs by reason, change ratios of all); nothing is truncated."""
    forks, dropped, ratios, end = [], Counter(), [], [chat.im_end]
    for pair in pairs:
        prompt = chat.prompt(pair.messages)
        chosen, rejected = chat.encode(pair.chosen), chat.encode(pair.rejected)
        if need_rejected and not rejected:
            dropped["no rejected answer, and the loss needs one"] += 1
        elif len(prompt) + max(len(chosen), len(rejected)) + 1 > max_length:
            dropped[f"longer than max_length ({max_length} tokens)"] += 1
        elif chosen == rejected:
            dropped["both answers identical"] += 1
        elif not rejected:
            forks.append(make_fork(prompt, chosen + end, None, pair.line))
        else:
            ratios.append(change_ratio(rejected, chosen))
            if ratios[-1] > max_change_ratio:
                dropped[f"change ratio above {max_change_ratio}"] += 1
            else:
                forks.append(make_fork(prompt, chosen + end, rejected + end, pair.line, ratios[-1]))
    return forks, dropped, ratios


def load_forks(path, chat, max_length, max_change_ratio, need_rejected, skip_malformed=False):
    """The forks of a pair file, and a summary for the log. Raises UserError if nothing is left."""
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
        counts, starts = np.histogram(ratios, bins=10, range=(0, 1))
        for count, start in zip(counts, starts):
            bar = "#" * round(40 * count / max(counts))
            lines.append(f"    {start:.1f}-{start + 0.1:.1f} {count:>6} {bar}")
    tokens, shared = sum(map(len, forks)), sum(len(f.trunk) for f in forks if len(f.rejected))
    lines.append(f"  {tokens} tokens a pass, {tokens + shared} if trunks were not shared")
    return forks, "\n".join(lines)


# --- the plan (who computes which pair when) and packs --------------------------------------------

def epoch_batches(count: int, batch_size: int, seed: int, epoch: int) -> list:
    """Arrays of pair indices, one an optimizer step, the last smaller. Ranks play no part."""
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(count)
    return [order[i:i + batch_size] for i in range(0, count, batch_size)]


def split_batch(batch, lengths, ranks: int, tokens_per_pack: int) -> list:
    """Cut one batch into micro-batches: result[m][rank] is a list of pair indices, perhaps empty.

    Longest first to the least loaded rank, then first fit into packs; a longer fork is a pack by
    itself. A pure function of lengths: all ranks compute the whole plan, so all agree on the number
    of micro-batches without communication."""
    loads = [0] * ranks
    packs = [[] for _ in range(ranks)]  # of each rank
    for i in sorted(batch, key=lambda i: (-lengths[i], i)):
        rank = loads.index(min(loads))
        loads[rank] += lengths[i]
        for pack in packs[rank]:
            if sum(lengths[j] for j in pack) + lengths[i] <= tokens_per_pack:
                pack.append(int(i))
                break
        else:
            packs[rank].append([int(i)])
    return list(zip_longest(*packs, fillvalue=[]))


@dataclass
class Pack:
    """Forks as one sequence, `trunk | rejected | chosen | trunk | ...`, and the rows to score."""

    tokens: torch.Tensor  # (T,) int64
    positions: torch.Tensor  # (T,) int64; both branches continue from the trunk
    forks: list  # (start, trunk end, rejected end, chosen end) of each; without y- all is trunk
    rows: torch.Tensor  # (R,) int64: where in T the token is predicted from
    targets: torch.Tensor  # (R,) int64: its id
    lengths: torch.Tensor  # (F, 3) int64: rows of trunk, rejected, chosen
    pairs: torch.Tensor  # (F,) int64: which pair each fork is
    reference: torch.Tensor | None = None  # (F, 2) fp64: its log-probs of y+, y- before training

    def to(self, device):
        tensors = {name: x for name, x in vars(self).items() if torch.is_tensor(x)}
        return replace(self, **{name: to_device(x, device) for name, x in tensors.items()})


def to_device(tensor, device):
    """A CPU tensor onto the device. A GPU copies pinned memory without making the CPU wait."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor


def make_pack(forks: list, indices: list, reference=None) -> Pack:
    """Pack forks[i], with reference[i], for i in indices; for none of them an unscored dummy."""
    none = np.zeros(0, np.int64)
    tokens, positions, rows, targets = [none], [none], [none], [none]
    spans, lengths, start = [], [], 0
    for fork in (forks[i] for i in indices):
        trunk, rejected, chosen = len(fork.trunk), len(fork.rejected), len(fork.chosen)
        trunk_end, rejected_end, end = start + trunk, start + trunk + rejected, start + len(fork)
        tokens += [fork.trunk, fork.rejected, fork.chosen]
        positions += [np.arange(trunk + rejected), np.arange(trunk, trunk + chosen)]
        if rejected:
            spans.append((start, trunk_end, rejected_end, end))
        else:  # for attention one plain sequence; in `lengths` the answer still counts as chosen
            spans.append((start, end, end, end))
        # A token is predicted from the one before it, the first of y+ from the trunk's last.
        rows += [np.arange(start + fork.prompt_length - 1, rejected_end - 1), [trunk_end - 1],
                 np.arange(rejected_end, end - 1)]
        targets += [fork.trunk[fork.prompt_length:], fork.rejected, fork.chosen]
        lengths.append([trunk - fork.prompt_length, rejected, chosen])
        start = end
    if not indices:
        tokens, positions, spans = [[0]], [[0]], [(0, 1, 1, 1)]
    tokens, positions, rows, targets = [
        torch.from_numpy(np.concatenate(parts)) for parts in (tokens, positions, rows, targets)]
    lengths = torch.tensor(lengths, dtype=torch.int64).view(-1, 3)
    pairs = torch.tensor(indices, dtype=torch.int64)
    reference = None if reference is None else reference[pairs]
    return Pack(tokens, positions, spans, rows, targets, lengths, pairs, reference)

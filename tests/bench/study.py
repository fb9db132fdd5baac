"""The paper's claims in worlds that a laptop can build: eight methods, their whole frontier of skill against
retention, ablations, and a verdict for each claim.

    python tests/bench/study.py --out runs/study         # everything; killed, the same command goes on
    python tests/bench/study.py --verdicts FILE.json     # tables and verdicts again, from the saved figures

A world is a tokenizer, a corpus and a base model of its own (data.py's toy world, chains of 3 to 6 digits),
systematically wrong in `Add`; no question of development or test is in its corpus. Its own wrong answers to
chains of 5 are corrected by a program, which one time in four writes its own answer instead, in its own
words, as real Oracles do: those, and no others, are what gamma = 0.6 drops here. Every run is train.py's
`train`, and all take equally many optimizer steps: with fewer rows, more passes. Workers are processes of one
thread, a run each; figures are kept a run at a time in OUT/runs, and all together in OUT/study.json.
"""

import argparse
import fcntl
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import statistics
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from common import data, qwen, table, train

import eval as evaluation
import loss
import oracle

METHODS = {  # name: (objective, what it is trained on)
    "SFT": ("sft", "direct"), "RFT": ("sft", "own"), "SFT+": ("sft", "pairs"), "DFT": ("dft", "pairs"),
    "Reward-SFT": ("reward-sft", "pairs"), "DPO": ("dpo", "pairs"),
    "SPoT-BCE": ("spot-bce", "pairs"), "SPoT-BCO": ("spot-bco", "pairs")}
ABLATIONS = {  # name: (method, what differs from the plain run)
    "gamma 0.2": ("SPoT-BCE", {"data": "gamma 0.2"}), "no filter": ("SPoT-BCE", {"data": "all pairs"}),
    "no filter, as many": ("SPoT-BCE", {"data": "some pairs"}), "half": ("SPoT-BCE", {"data": "half"}),
    "direct y+": ("SPoT-BCE", {"data": "direct pairs"}),
    "beta 0.3": ("SPoT-BCE", {"beta": 0.3}), "beta 3": ("SPoT-BCE", {"beta": 3.0}),
    "cumulative delta": ("SPoT-BCO", {"delta": "cumulative"})}
TARGET, *OTHERS = train.TOY_SKILLS
CHAIN, VARIANTS = 5, (3, 4, 6)  # the pairs' chains, and the held-out variants of the target skill
PARTS = ("trunk", "chosen matched", "chosen divergent", "rejected matched", "rejected divergent")
LOOKED_AT = 1.2e-4  # the rate at which gradients are looked at
LEVELS = range(30, 100, 10)  # right answers in % at which methods are compared
FULL = {
    "worlds": [0, 1, 2, 3], "seeds": [0, 1], "rates": [3e-5, 6e-5, 1.2e-4, 2.5e-4, 5e-4, 1e-3],
    "ablation_rates": [6e-5, 1.2e-4, 2.5e-4, 5e-4],
    "shape": train.TOY["shape"], "corpus": 9600, "share": 1 / 3, "doubt": 0.8, "base_lr": 3e-3,
    "questions": 800, "samples": 3, "rewritten": 0.25, "dev": 100, "test": 200, "others": 0.5, "texts": 60,
    "epochs": 2, "batch_size": 32, "beta": 1.0, "gamma": 0.6}
SHORT = {**FULL, "worlds": [0, 1], "seeds": [0], "rates": [1.2e-4, 2.5e-4], "ablation_rates": [2.5e-4],
         "corpus": 2400, "questions": 96, "samples": 1, "dev": 12, "test": 12, "texts": 5}


# --- a world --------------------------------------------------------------------------------------


def direct_answer(question):
    """What the Oracle writes when it does not correct but answers: right, of tokens that the base knows, in
    an order that it never writes."""
    return re.sub(r"(\d)\+(\d)=(\d)", r"So \2 Add \1: \3", train.toy_answer(question, train.TOY_STYLES[2]))


def questions(world, s):
    """{name: questions} of development and test: the skills, and the target at other lengths of chain."""
    asked = {}
    for skill in train.TOY_SKILLS:
        less = 1 if skill == TARGET else s["others"]
        test, dev = train.toy_questions(skill, world, round(less * s["test"]), round(less * s["dev"]))
        asked |= {f"test {skill}": test, f"dev {skill}": dev}
    for n in VARIANTS:
        (some,) = train.toy_questions(TARGET, world, round(s["others"] * s["test"]), chain=n)
        asked[f"test {TARGET} {n}"] = some
    return asked


def build_world(folder, world, s, ranks):
    """Base model, its samples, and the files of rows of one world."""
    if not os.path.isdir(f"{folder}/base/model"):
        shutil.rmtree(folder, ignore_errors=True)
        train.write_toy_checkpoint(f"{folder}/birth", s["shape"], world)
        rows = [row for n in (CHAIN, *VARIANTS)
                for row in train.toy_corpus(s["corpus"] // 4, s["share"], s["doubt"], world, n)]
        held_out = {question for some in questions(world, s).values() for question in some}
        rows = [row for row in rows if row["prompt"] not in held_out]
        random.Random(world).shuffle(rows)
        data.write_rows(f"{folder}/corpus.jsonl", rows)
        learn(ranks, f"{folder}/base", model=f"{folder}/birth", pairs=f"{folder}/corpus.jsonl", loss="sft",
              lr=s["base_lr"], seed=world, epochs=2, batch_size=32)
    base = f"{folder}/base/model"
    own = evaluation.open_local_model(base, torch.float32, ranks.device, batch_size=64)
    train_on = train.toy_questions(TARGET, world, s["test"], s["dev"], s["questions"])[2]
    items = [train.toy_item(str(i), question) for i, question in enumerate(train_on)]
    oracle.elicit(items, f"{folder}/errors", own, train.TOY_SAMPLING, ranks, samples=s["samples"], seed=world)
    errors, _ = oracle.read_errors(f"{folder}/errors/errors.jsonl")
    errors = list({item.question: item for item in errors}.values())  # one error a question
    rng = random.Random(world)
    rewritten = {item.id for item in errors if rng.random() < s["rewritten"]}

    def correct(item):
        return direct_answer(item.question) if item.id in rewritten else train.toy_oracle(item.question,
                                                                                           item.answer)
    oracle.rectify(errors, f"{folder}/rectified", correct, own.chat.encode, ranks, max_change_ratio=1.0)
    pairs = [row for row in data.read_log(f"{folder}/rectified/pairs.jsonl")]
    kept = [row for row in pairs if row["change_ratio"] <= s["gamma"]]
    tries, mine = Counter(), []  # its own right answers: each question's first, then the seconds, ...
    for row in data.read_log(f"{folder}/errors/correct.jsonl"):
        tries[row["question"]] += 1
        mine.append((tries[row["question"]], len(mine), row))
    own_rows = [row for *_, row in sorted(mine)][:len(kept)]
    as_direct = [{**row, "gemini_corrected_answer": direct_answer(row["question"])} for row in kept]
    files = {"pairs": kept, "gamma 0.2": [row for row in kept if row["change_ratio"] <= 0.2],
             "all pairs": pairs, "some pairs": rng.sample(pairs, len(kept)), "half": kept[::2],
             "direct pairs": as_direct, "direct": [{**row, "original_answer": ""} for row in as_direct],
             "own": own_rows, "tracked": kept[:96]}  # tracked: training pairs
    for name, rows in files.items():
        data.write_rows(f"{folder}/{name}.jsonl", rows)
    return {"rows": {name: len(rows) for name, rows in files.items()},
            "own questions": len({row["question"] for row in own_rows}),
            **measure(folder, base, world, s, ranks)}


def learn(ranks, out, **options):
    """train.py's `train` in this process, from nothing."""
    shutil.rmtree(out, ignore_errors=True)
    o = train.Options(out=out, dtype="float32", save_dtype="float32", checkpointing="none",
                      tokens_per_pack=4096, **options)
    train.train(o, replace(ranks, quiet=True))


# --- a run and its figures ------------------------------------------------------------------------


def run_one(folder, job, s, ranks):
    """Train as the job says, measure the model, keep the figures and no weights."""
    world, out, steps = f"{folder}/world-{job['world']}", f"{folder}/scratch/{os.getpid()}", job["steps"]
    keep = {"save_every": 2, "keep": steps} if job["gradients"] else {"save_every": 0}
    learn(ranks, out, model=f"{world}/base/model", pairs=f"{world}/{job['data']}.jsonl",
          eval_pairs=f"{world}/tracked.jsonl", loss=job["objective"], lr=job["lr"], seed=job["seed"],
          beta=job["beta"], delta=job["delta"], max_change_ratio=1.0, epochs=job["epochs"], max_steps=steps,
          batch_size=s["batch_size"], **keep)
    tethers = [row["tether_chosen"] for row in data.read_log(f"{out}/metrics.jsonl")]
    tracked = data.read_log(f"{out}/eval.jsonl")[-1]  # after the last step
    tracked = {k: tracked[k] for k in ("reward_chosen", "reward_rejected", "tether_chosen")}
    flat = next((step for step, value in enumerate(tethers) if value <= 1 / 4), steps)
    figures = {"flat": 100 * flat / steps, "tracked": tracked,
               **measure(world, f"{out}/model", job["world"], s, ranks)}
    if job["gradients"]:
        looks = {qwen.read_json(f"{path}/state.json")["step"]: path for path in train.whole_checkpoints(out)}
        figures["concentration"] = [concentration(world, path, job, ranks) for step, path in
                                    [(0, None), *looks.items()] if step in (0, 2, 4, 8, 16, steps)]
    shutil.rmtree(out)
    return figures


@torch.no_grad()
def measure(world, model, seed, s, ranks):
    """Right answers in % (greedy), KL(base || model) on general text, and where the rewards come from."""
    own = evaluation.open_local_model(model, torch.float32, ranks.device, batch_size=64)
    base = qwen.load_model(f"{world}/base/model", device=ranks.device)
    asked = questions(seed, s)
    flat = [(name, question) for name, some in asked.items() for question in some]
    right = dict.fromkeys(asked, 0)

    def grade(index, ids, ended):
        name, question = flat[index]
        found = evaluation.extract_answer(own.chat.tokenizer.decode(ids)) or ""
        right[name] += evaluation.answers_match(found, train.toy_item("", question).gold)

    prompts = [own.chat.prompt([{"role": "user", "content": question}]) for _, question in flat]
    qwen.generate(own.model, prompts, [0] * len(flat), max_tokens=112, temperature=0.0, end=own.end,
                  batch_size=64, on_done=grade)
    share = {name: 100 * n / len(asked[name]) for name, n in right.items()}
    figures = {split: {"target": share[f"{split} {TARGET}"],
                       "others": statistics.mean(share[f"{split} {skill}"] for skill in OTHERS),
                       **{skill: share[f"{split} {skill}"] for skill in OTHERS}} for split in ("dev", "test")}
    figures["test"]["variants"] = statistics.mean(share[f"test {TARGET} {n}"] for n in VARIANTS)
    # General text: answers to questions of the other skills, as the corpus has them.
    rows, texts = train.toy_corpus(2 * s["texts"], 0, 0, f"text {seed}"), []
    for row in [row for row in rows if TARGET not in row["prompt"]][:s["texts"]]:
        prompt = own.chat.prompt([{"role": "user", "content": row["prompt"]}])
        texts.append((prompt + own.chat.encode(row["chosen"]) + [own.chat.im_end], len(prompt)))
    figures["kl"] = evaluation.retention(own.model, base, texts, ranks)["kl"][0]
    forks, _ = data.load_forks(f"{world}/tracked.jsonl", own.chat, 8192, 1.0, True)
    logps = []
    for policy in (own.model, base):
        pack = data.make_pack(forks, range(len(forks)))
        logps.append(policy(pack.tokens, pack.positions, pack.forks, pack.rows, pack.targets).double())
    change, kinds = logps[0] - logps[1], row_kinds(forks)
    figures["shift"] = {part: change[[kind == part for kind in kinds]].sum().item() / len(forks)
                        for part in PARTS}  # of log pi, in nats a pair
    return figures


def row_kinds(forks):
    """What each scored row predicts: a token of the trunk, or of a branch, matched in the other by a longest
    common subsequence, or divergent."""
    kinds = []
    for f in forks:
        kinds += ["trunk"] * (len(f.trunk) - f.prompt_length)
        matches = list(zip(*data.lcs_matches(f.rejected.tolist(), f.chosen.tolist()))) or [(), ()]
        for name, branch, inside in zip(("rejected", "chosen"), (f.rejected, f.chosen), map(set, matches)):
            kinds += [f"{name} {'matched' if i in inside else 'divergent'}" for i in range(len(branch))]
    return kinds


def concentration(world, checkpoint, job, ranks):
    """Mean norm of the loss's gradient with respect to hidden states, by what the position predicts: after
    the last block, and over all blocks. Of positions in y+ alone: SFT puts no gradient on a branch of y-."""
    base = evaluation.open_local_model(f"{world}/base/model", torch.float32, ranks.device)
    forks, _ = data.load_forks(f"{world}/tracked.jsonl", base.chat, 8192, 1.0, True)
    pack = data.make_pack(forks, range(len(forks)))
    with torch.no_grad():
        reference = loss.sequence_logps(base.model(pack.tokens, pack.positions, pack.forks, pack.rows,
                                                   pack.targets), pack.lengths)
    step, delta = 0, 0.0
    if checkpoint:
        weights = load_file(f"{checkpoint}/shard_0.safetensors")
        with torch.no_grad():
            for name, p in base.model.named_parameters():
                p.copy_(weights[name])
        state = qwen.read_json(f"{checkpoint}/state.json")
        step, delta = state["step"], state["delta"]
    kept = []

    def keep(block, inputs, output):
        output.retain_grad()
        kept.append(output)

    for block in base.model.layers:
        block.register_forward_hook(keep)
    logps = base.model(pack.tokens, pack.positions, pack.forks, pack.rows, pack.targets)
    coefficients, _ = loss.row_coefficients(job["objective"], logps, pack.lengths, reference, job["beta"],
                                            delta)
    logps.backward(coefficients / len(forks))
    part = {}
    for row, kind in zip(pack.rows.tolist(), row_kinds(forks)):
        if not kind.startswith("rejected"):
            part[row] = kind.split()[-1]  # the last of a trunk predicts a branch's first: no key comes twice
    norms = [h.grad.norm(dim=1) for h in kept]
    kinds = ("trunk", "matched", "divergent")
    where = {kind: [p for p, k in part.items() if k == kind] for kind in kinds}
    share = {kind: len(some) / len(part) for kind, some in where.items()}
    return {"step": step, "share": share, **{
        depth: {kind: norm[where[kind]].mean().item() if where[kind] else 0.0 for kind in kinds}
        for depth, norm in (("last", norms[-1]), ("all", torch.stack(norms).mean(0)))}}


# --- all jobs -------------------------------------------------------------------------------------


def plan_jobs(s, worlds):
    """[job]: each method and each ablation at its rates; worlds: {world: its figures}."""
    jobs = []
    for world in s["worlds"]:
        batches = {name: -(-n // s["batch_size"]) for name, n in worlds[world]["rows"].items()}
        steps = s["epochs"] * batches["pairs"]
        for seed in s["seeds"]:
            runs = [(m, m, {}, lr) for m in METHODS for lr in s["rates"]]
            runs += [(a, m, more, lr) for a, (m, more) in ABLATIONS.items() for lr in s["ablation_rates"]]
            for title, method, more, lr in runs:
                objective, trained_on = METHODS[method]
                job = {"title": title, "world": world, "seed": seed, "objective": objective,
                       "data": trained_on, "lr": lr, "beta": s["beta"], "delta": "ema", "steps": steps,
                       **more}
                job["epochs"] = -(-steps // batches[job["data"]])
                job["gradients"] = (seed == s["seeds"][0] and lr == LOOKED_AT
                                    and title in ("SFT+", "DPO", "SPoT-BCE", "SPoT-BCO"))
                job["name"] = f"{title} world {world} seed {seed} lr {lr:g}".replace(" ", "-")
                jobs.append(job)
    return jobs


RANKS = None  # of a worker process


def start_worker(log):
    """A process group of one; what `train` says goes to a file. Ends with the study, however that ends."""
    global RANKS

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    RANKS = train.open_ranks(600)
    torch.set_num_threads(1)


def work(kind, folder, job, s):
    """One world or run: its figures, from OUT/runs if they are there. A run that diverged is kept as such."""
    path = f"{folder}/runs/{job['name']}.json"
    if not os.path.exists(path):
        began = time.perf_counter()
        if kind == "world":
            figures = build_world(f"{folder}/{job['name']}", job["world"], s, RANKS)
        else:
            try:
                figures = run_one(folder, job, s, RANKS)
            except train.UserError as e:
                if "not finite" not in str(e):
                    raise
                figures = {"diverged": str(e)}
        qwen.write_json(path, {**job, **figures, "seconds": time.perf_counter() - began})
    return qwen.read_json(path)


def run_all(folder, s, workers):
    """Every world, then every run; returns {"settings", "worlds", "runs"}."""
    os.makedirs(f"{folder}/runs", exist_ok=True)
    lock = open(f"{folder}/.lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"error: another study is at work in {folder}: wait for it, or choose another --out")
    known = f"{folder}/settings.json"
    if os.path.exists(known) and qwen.read_json(known) != json.loads(json.dumps(s)):
        sys.exit(f"error: {folder} holds a study with other settings: choose another --out")
    qwen.write_json(known, s)
    shutil.rmtree(f"{folder}/scratch", ignore_errors=True)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker,
                             (f"{folder}/workers.log",)) as pool:

        def do(kind, jobs):
            futures = {pool.submit(work, kind, folder, job, s): job["name"] for job in jobs}
            for future in tqdm(as_completed(futures), total=len(jobs), desc=kind, unit=kind):
                if future.exception():  # what is done is kept
                    sys.exit(f"error: {kind} {futures[future]} failed with {future.exception()!r}: see "
                             f"{folder}/workers.log; the same command goes on")
            return [future.result() for future in futures]

        try:
            worlds = do("world", [{"name": f"world-{w}", "world": w} for w in s["worlds"]])
            runs = do("run", plan_jobs(s, {w["world"]: w for w in worlds}))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    lock.close()
    drop = ("seconds", "name")  # stay in OUT/runs
    return {"settings": s, **{kind: [{k: rounded(v) for k, v in figures.items() if k not in drop}
                                     for figures in some]
                              for kind, some in (("worlds", worlds), ("runs", runs))}}


def rounded(x):
    """All floats in it with six figures."""
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    return list(map(rounded, x)) if isinstance(x, list) else float(f"{x:.6g}") if isinstance(x, float) else x


# --- what the figures say: from the saved JSON alone ----------------------------------------------

T95 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t from 1 degree of freedom


def interval(values):
    """Mean over worlds and half the width of its 95 % interval; a world whose value is None is left out."""
    found = [v for v in values if v is not None]
    if len(found) < 2:
        return found[0] if found else math.nan, math.inf
    return statistics.mean(found), T95[len(found) - 2] * statistics.stdev(found) / math.sqrt(len(found))


def verdict(values):
    """Of a quantity that the claim says is above 0, one value a world."""
    mean, half = interval(values)
    return "holds" if mean - half > 0 else "does not hold" if mean + half < 0 else "not decided"


def overall(verdicts):
    """Of a claim, from those of its parts: as many as there are must hold."""
    if "does not hold" in verdicts:
        return "in part" if "holds" in verdicts else "does not hold"
    return "not decided" if "not decided" in verdicts else "holds"


class Study:
    """The saved figures, looked up as means over the training seeds of a world."""

    def __init__(self, saved):
        self.s, self.worlds = saved["settings"], {w["world"]: w for w in saved["worlds"]}
        self.diverged = [run for run in saved["runs"] if "diverged" in run]
        self.runs = {}
        for run in saved["runs"]:
            if "diverged" not in run:
                lost = self.worlds[run["world"]]["test"]["others"] - run["test"]["others"]
                run = {**run, "log kl": math.log10(max(run["kl"], 1e-9)), "lost": lost}
                self.runs.setdefault((run["title"], run["lr"], run["world"]), []).append(run)

    def at(self, title, lr, world, *keys):
        found = []
        for value in self.runs[title, lr, world]:
            for key in keys:
                value = value[key]
            found.append(value)
        return statistics.mean(found)

    def rates(self, title):
        """Its learning rates at which every world has a run that did not diverge."""
        planned = self.s["ablation_rates" if title in ABLATIONS else "rates"]
        return [lr for lr in planned if all((title, lr, w) in self.runs for w in self.worlds)]

    def shared(self, one, other):
        return [lr for lr in self.rates(one) if lr in self.rates(other)]

    def pick(self, title, world, rates=None):
        """The learning rate that the toy story's rule takes on the development questions."""
        grades = {lr: {TARGET: self.at(title, lr, world, "dev", "target"),
                       "others": self.at(title, lr, world, "dev", "others")}
                  for lr in (self.rates(title) if rates is None else rates)}
        if not grades:
            sys.exit(f"error: {title} diverged at every rate of some world: nothing to pick from")
        return train.choose_rate(grades, self.worlds[world]["dev"])

    def picked(self, title, *keys, rates=None):
        """One value a world, each at its picked rate."""
        return [self.at(title, self.pick(title, w, rates), w, *keys) for w in self.worlds]

    def mean(self, title, rates, *keys):
        """One value a world: the mean over rates; None without any."""
        return [statistics.mean(self.at(title, lr, w, *keys) for lr in rates) if rates else None
                for w in self.worlds]

    def compare(self, one, other, *keys):
        """One value a world: the mean difference at equal rates, those that both have."""
        both = self.shared(one, other)
        return minus(self.mean(one, both, *keys), self.mean(other, both, *keys))

    def at_skill(self, title, world, level, key):
        """The figure where the target skill, along rising rates, first reaches the level, interpolated; None
        where no rate reaches it, or already the smallest is above it."""
        before = None
        for lr in self.rates(title):
            skill, value = self.at(title, lr, world, "test", "target"), self.at(title, lr, world, key)
            if skill >= level:
                return before and before[1] + (value - before[1]) * (level - before[0]) / (skill - before[0])
            before = skill, value
        return None

    def equal_skill(self, one, other, key):
        """One value a world: the mean difference over those of LEVELS that both methods cross; or None."""
        found = []
        for w in self.worlds:
            both = [[self.at_skill(t, w, level, key) for t in (one, other)] for level in LEVELS]
            differences = [a - b for a, b in both if a is not None and b is not None]
            found.append(statistics.mean(differences) if differences else None)
        return found

    def looks(self, title):
        """One value a world: what `concentration` saw over training, in the seed that was looked at."""
        return [next((run["concentration"] for lr in self.rates(title) for run in self.runs[title, lr, w]
                      if "concentration" in run), None) for w in self.worlds]


def minus(values, others):
    """World by world; None where one has no value."""
    return [None if a is None or b is None else a - b for a, b in zip(values, others)]


def claims(study):
    """[(number, quantity, one value a world)] for each part of the seven claims; above 0: it holds."""
    zeros = [0.0] * len(study.worlds)

    def below(level, values):
        return [level - v for v in values]

    def reward(title, which):
        return study.picked(title, "tracked", f"reward_{which}")

    def gathered(title, depth):
        return [looks and concentrated(looks, depth) for looks in study.looks(title)]

    parts = []
    for text, key in (("SFT+ moves further than {}: log10 of the ratio of KLs, at equal", "log kl"),
                      ("SFT+ loses more of the other skills than {}: points, at equal", "lost")):
        for other in ("Reward-SFT", "SPoT-BCE", "SPoT-BCO", "DPO"):
            parts += [("1", f"{text.format(other)} target skill", study.equal_skill("SFT+", other, key)),
                      ("1", f"{text.format(other)} rates", study.compare("SFT+", other, key))]
    for title in ("SFT+", "Reward-SFT"):
        parts.append(("2", f"{title} lifts y-: r-", reward(title, "rejected")))
    for title in ("SPoT-BCE", "SPoT-BCO"):
        parts.append(("2", f"{title} sinks y-: -r-", minus(zeros, reward(title, "rejected"))))
    parts.append(("3", "DPO's margin comes from sinking y-: its share above one half",
                  [-low / (high - low) - 0.5 if high > low else None
                   for high, low in zip(reward("DPO", "chosen"), reward("DPO", "rejected"))]))
    bce, bco, r_chosen = "SPoT-BCE", "SPoT-BCO", ("tracked", "reward_chosen")
    for number, text, one, other, keys in (
            ("3", "DPO's r+ stays below that of BCE: r+ of BCE - r+ of DPO", bce, "DPO", r_chosen),
            ("4", "BCO's r+ is higher: r+ of BCO - r+ of BCE", bco, bce, r_chosen),
            ("4", "BCO moves further: log10 of KL(BCO) / KL(BCE)", bco, bce, ("log kl",))):
        at_picked = minus(study.picked(one, *keys), study.picked(other, *keys))
        parts += [(number, f"{text}, at picked rates", at_picked),
                  (number, f"{text}, at equal rates", study.compare(one, other, *keys))]
    for title in ("Reward-SFT", bce, bco):
        end, flat = study.picked(title, "tracked", "tether_chosen"), study.picked(title, "flat")
        parts += [("5", f"{title} flattens: 1/4 - lambda+ at the end, half its start", below(1 / 4, end)),
                  ("5", f"{title} flattens early: lambda+ passes 1/4 so many % of the steps before half time",
                   below(50, flat))]
    for other, text in (("direct y+", "rectified y+ beat direct ones"),
                        ("no filter", "gamma 0.6 beats no filter"),
                        ("no filter, as many", "gamma 0.6 beats as many unfiltered pairs"),
                        ("half", "all pairs beat half of them")):
        at_picked = minus(study.picked(bce, "test", "target", rates=study.shared(bce, other)),
                          study.picked(other, "test", "target"))
        parts += [("6", f"{text}: points of target skill, at picked rates", at_picked),
                  ("6", f"{text}: points of target skill, at equal rates",
                   study.compare(bce, other, "test", "target"))]
    for depth, where in (("last", "after the last block"), ("all", "mean over all blocks")):
        here, there = gathered(bce, depth), gathered("SFT+", depth)
        parts += [("7", "BCE's gradients gather on divergent tokens of y+: log10 of their norm there to that "
                   f"on its others, {where}", here),
                  ("7", f"and more than those of SFT+: the difference, {where}", minus(here, there))]
    return parts


def concentrated(looks, depth):
    """log10 of the gradient norm on divergent positions to that on the others, each summed over the looks."""
    divergent = rest = 0.0
    for look in looks:
        share, norm = look["share"], look[depth]
        divergent += norm["divergent"]
        rest += sum(share[k] * norm[k] for k in ("trunk", "matched")) / (share["trunk"] + share["matched"])
    return math.log10(divergent / rest)


COLUMNS = [("target %", ("test", "target")), ("variants %", ("test", "variants")),
           ("others lost", ("lost",)), ("log10 KL", ("log kl",)), ("r+", ("tracked", "reward_chosen")),
           ("r-", ("tracked", "reward_rejected")), ("lambda+", ("tracked", "tether_chosen"))]


def figure(values):
    """Mean ± half of the 95 % interval, which says how many decimals are worth showing."""
    mean, half = interval(values)
    decimals = 2 if max(abs(mean), half) < 9.95 else 1 if half < 9.95 else 0
    of = sum(v is not None for v in values)
    return f"{mean:.{decimals}f} ± {half:.{decimals}f}" + (f" ({of} worlds)" if of < len(values) else "")


def frontier(study) -> str:
    """SVG: target skill against KL from the base, a line a method along its rates, means over worlds."""
    colours = "#999999 #56b4e9 #0072b2 #cc79a7 #e69f00 #000000 #d55e00 #009e73".split()  # Okabe and Ito's

    def mean(title, lr, *keys):
        return statistics.mean(study.at(title, lr, w, *keys) for w in study.worlds)

    lines = {t: [(3 + mean(t, lr, "log kl"), mean(t, lr, "test", "target"))
                 for lr in study.rates(t)] for t in METHODS}
    xs = [x for line in lines.values() for x, _ in line]
    low, high = math.floor(min(xs)), math.ceil(max(xs)) + (max(xs) == min(xs))

    def place(x, y):
        return f"{60 + 420 * (x - low) / (high - low):.1f},{360 - 3.2 * y:.1f}"

    parts = [f'<text x="50" y="{365 - 3.2 * y:.0f}" text-anchor="end">{y}</text>'
             f'<path d="M{place(low, y)} L{place(high, y)}" stroke="#dddddd"/>' for y in range(0, 101, 20)]
    parts += [f'<text x="{place(x, 0).split(",")[0]}" y="380" text-anchor="middle">{10.0**x:g}</text>'
              for x in range(low, high + 1)]
    for i, (title, line) in enumerate(lines.items()):
        points = " ".join(place(*point) for point in line)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colours[i]}" stroke-width="2.5"/>')
        parts += ['<circle cx="{}" cy="{}" r="4" fill="{}"/>'.format(*place(*point).split(","), colours[i])
                  for point in line]
        parts.append(f'<text x="515" y="{40 + 24 * i}">{title}</text>'
                     f'<path d="M490,{35 + 24 * i} h20" stroke="{colours[i]}" stroke-width="4"/>')
    return ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 620 410" font-family="sans-serif" '
            'font-size="14"><rect width="620" height="410" fill="white"/>' + "".join(parts) +
            '<text x="270" y="402" text-anchor="middle">KL from the base on general text, 1/1000 nat a token'
            '</text><text x="22" y="20">right in Add, %</text></svg>\n')


def show(study):
    """All tables, and the claims with their verdicts, as Markdown on the standard output."""
    head = [name for name, _ in COLUMNS]
    parts = [(number, text, figure(values), verdict(values)) for number, text, values in claims(study)]

    def chosen(title, rates):
        """The picked rates; one at an edge of the grid is marked."""
        picks = [study.pick(title, w, rates) for w in study.worlds]
        return ", ".join(f"{lr:g}" + ("\\*" if lr in (rates[0], rates[-1]) else "") for lr in picks)

    def picks(titles, rates_of):
        return [[t, chosen(t, rates_of(t))] +
                [figure(study.picked(t, *keys, rates=rates_of(t))) for _, keys in COLUMNS] for t in titles]

    print("The claims, each from its parts below\n")
    numbers = dict.fromkeys(number for number, *_ in parts)
    table(["claim", "verdict", "parts"], [
        [n, overall(verdicts), ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))]
        for n in numbers for verdicts in [[v for number, *_, v in parts if number == n]]])
    print("\nTheir parts: means over worlds with 95 % intervals; above 0 a part holds\n")
    table(["claim", "quantity", "figure", "verdict"], parts)
    print("\nEach method at the learning rate that the rule picks, a world each (* at an edge of the grid)\n")
    base = [figure([w["test"][k] for w in study.worlds.values()]) for k in ("target", "variants")]
    table(["", "rates", *head], [["base", "", *base, *["" for _ in head[2:]]], *picks(METHODS, study.rates)])
    print("\nThe whole frontier, and the ablations at each rate\n")
    table(["", "rate", *head], [[t, f"{lr:g}"] + [figure([study.at(t, lr, w, *keys) for w in study.worlds])
                                                 for _, keys in COLUMNS]
                                for t in (*METHODS, *ABLATIONS) for lr in study.rates(t)])
    print("\nAblations, at picked rates and, last, the target as a mean over rates\n")
    titles, rates = ("SPoT-BCE", *ABLATIONS, "SPoT-BCO"), study.s["ablation_rates"]
    both = {t: [lr for lr in rates if lr in study.rates(t)] for t in titles}
    table(["", "rates", *head, "mean target %"], [
        [*row, figure(study.mean(t, both[t], "test", "target"))]
        for t, row in zip(titles, picks(titles, both.get))])
    print("\nWhere the rewards come from, at picked rates: change of log pi in nats, a tracked pair\n")
    table(["", *PARTS], [[t, *(figure(study.picked(t, "shift", part)) for part in PARTS)] for t in METHODS])
    print("\nMean norm of the gradient in hidden states at positions of y+, in units of its divergent ones "
          f"at step 0: trunk / matched / divergent; rate {LOOKED_AT:g}, means over worlds\n")
    rows = []
    for title in METHODS:
        some = [looks for looks in study.looks(title) if looks]
        for i, look in enumerate(some[0] if some else []):
            cells = [[statistics.mean(looks[i][depth][kind] / looks[0][depth]["divergent"] for looks in some)
                      for kind in ("trunk", "matched", "divergent")] for depth in ("last", "all")]
            rows.append([title, look["step"], *(" / ".join(f"{x:.2f}" for x in cell) for cell in cells)])
    table(["", "step", "after the last block", "over all blocks"], rows)
    print("\nRows of the files, a world each; distinct questions of its own right answers last\n")
    some = study.worlds.values()
    rows = [[name, *(w["rows"][name] for w in some)] for name in next(iter(some))["rows"]]
    table(["", *map(str, study.worlds)], [*rows, ["own questions", *(w["own questions"] for w in some)]])
    for run in study.diverged:
        print(f"\nDiverged and left out: {run['title']} at {run['lr']:g}, world {run['world']}, seed "
              f"{run['seed']}: {run['diverged']}")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", default="runs/study", help="folder to write or to go on in [runs/study]")
    p.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes [one a core]")
    p.add_argument("--short", action="store_true", help="tiny worlds, two rates: only to see that it works")
    p.add_argument("--verdicts", metavar="FILE", help="train nothing, show what this study.json says")
    o = p.parse_args()
    if o.workers < 1:
        p.error(f"--workers: a number from 1 expected, found {o.workers}")
    if o.verdicts:
        try:
            saved = qwen.read_json(o.verdicts)
        except train.UserError as e:
            p.error(f"--verdicts: {e}")
        if not {"settings", "worlds", "runs"} <= saved.keys():
            p.error(f"--verdicts: {o.verdicts} is not the study.json of a study")
    else:
        began = time.perf_counter()
        saved = run_all(o.out, SHORT if o.short else FULL, o.workers)
        with open(f"{o.out}/study.json", "w") as f:
            json.dump(saved, f)
        with open(f"{o.out}/frontier.svg", "w") as f:
            f.write(frontier(Study(saved)))
        tqdm.write(f"{time.perf_counter() - began:.0f} s; figures in {o.out}/study.json, the frontier in "
                   f"{o.out}/frontier.svg\n", file=sys.stderr)
    show(Study(saved))


if __name__ == "__main__":
    main()

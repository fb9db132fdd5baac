"""The paper's claims in worlds that a laptop can build: eight methods, their whole frontier of skill against
retention, ablations, and a verdict for each claim.

    python tests/bench/study.py --out runs/study         # everything; killed, the same command goes on
    python tests/bench/study.py --verdicts FILE.json     # tables and verdicts again, from the saved figures

A world is a tokenizer, a corpus and a base model of its own (data.py's toy world, chains of 3 to 6 digits),
systematically wrong in `Add`. Its own wrong answers to chains of 5 are corrected by a program, which one time
in four writes its own answer instead, in its own words, as real Oracles do: those are what gamma filters.
Every run is train.py's `train`. Workers are processes of one thread, a run each; figures are kept a run at a
time in OUT/runs, and all together in OUT/study.json.
"""

import argparse
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
    "gamma 0.2": ("SPoT-BCE", {"gamma": 0.2}), "no filter": ("SPoT-BCE", {"gamma": 1.0}),
    "half the pairs": ("SPoT-BCE", {"data": "half"}), "direct y+": ("SPoT-BCE", {"data": "direct pairs"}),
    "beta 0.3": ("SPoT-BCE", {"beta": 0.3}), "beta 3": ("SPoT-BCE", {"beta": 3.0}),
    "cumulative delta": ("SPoT-BCO", {"delta": "cumulative"})}
TARGET, *OTHERS = data.TOY_SKILLS
CHAIN, VARIANTS = 5, (3, 4, 6)  # the pairs' chains, and the held-out variants of the target skill
FULL = {
    "worlds": [0, 1, 2, 3], "seeds": [0, 1], "rates": [3e-5, 6e-5, 1.2e-4, 2.5e-4, 5e-4, 1e-3],
    "ablation_rates": [6e-5, 1.2e-4, 2.5e-4],
    "shape": train.TOY["shape"], "corpus": 9600, "share": 1 / 3, "doubt": 0.8, "base_lr": 3e-3,
    "questions": 800, "samples": 3, "rewritten": 0.25, "dev": 100, "test": 200, "others": 0.5, "texts": 60,
    "epochs": 2, "batch_size": 32, "beta": 1.0, "gamma": 0.6}
SHORT = {**FULL, "worlds": [0, 1], "seeds": [0], "rates": [2.5e-4], "ablation_rates": [2.5e-4],
         "corpus": 2400, "questions": 96, "samples": 1, "dev": 12, "test": 12, "texts": 5}


# --- a world --------------------------------------------------------------------------------------


def direct_answer(question):
    """What the Oracle writes when it does not correct but answers: right, in words the base never uses."""
    text = re.sub(r"(\d)\+(\d)=(\d)", r"\1 plus \2 gives \3", data.toy_answer(question))
    return text.replace("\n\\boxed", ". So it is \\boxed").replace("\n", ", ")


def questions(world, s):
    """{name: questions} of development and test: the skills, and the target at other lengths of chain."""
    asked = {}
    for skill in data.TOY_SKILLS:
        less = 1 if skill == TARGET else s["others"]
        test, dev = data.toy_questions(skill, world, round(less * s["test"]), round(less * s["dev"]))
        asked |= {f"test {skill}": test, f"dev {skill}": dev}
    for n in VARIANTS:
        (some,) = data.toy_questions(TARGET, world, round(s["others"] * s["test"]), chain=n)
        asked[f"test {TARGET} {n}"] = some
    return asked


def build_world(folder, world, s, ranks):
    """Base model, its samples, and the five pair files of one world."""
    if not os.path.isdir(f"{folder}/base/model"):
        shutil.rmtree(folder, ignore_errors=True)
        data.write_toy_checkpoint(f"{folder}/birth", s["shape"], world)
        rows = [row for n in (CHAIN, *VARIANTS)
                for row in data.toy_corpus(s["corpus"] // 4, s["share"], s["doubt"], world, n)]
        random.Random(world).shuffle(rows)
        evaluation.write_rows(f"{folder}/corpus.jsonl", rows)
        learn(ranks, f"{folder}/base", model=f"{folder}/birth", pairs=f"{folder}/corpus.jsonl", loss="sft",
              lr=s["base_lr"], seed=world, epochs=2, batch_size=32)
    base = f"{folder}/base/model"
    own = evaluation.open_own(base, torch.float32, ranks.device, batch_size=64)
    train_on = data.toy_questions(TARGET, world, s["test"], s["dev"], s["questions"])[2]
    items = [train.toy_item(str(i), question) for i, question in enumerate(train_on)]
    oracle.elicit(items, f"{folder}/errors", own, train.TOY_SAMPLING, ranks, samples=s["samples"], seed=world)
    errors, _ = oracle.read_errors(f"{folder}/errors/errors.jsonl")
    errors = list({item.question: item for item in errors}.values())  # one error a question
    rng = random.Random(world)
    rewritten = {item.id for item in errors if rng.random() < s["rewritten"]}

    def correct(item):
        return direct_answer(item.question) if item.id in rewritten else oracle.toy_oracle(item.question,
                                                                                           item.answer)
    oracle.rectify(errors, f"{folder}/rectified", correct, own.chat.encode, ranks, max_change_ratio=1.0)
    pairs = [row for _, row in data.read_lines(f"{folder}/rectified/pairs.jsonl")]
    kept = [row for row in pairs if row["change_ratio"] <= s["gamma"]]
    mine = [row for _, row in data.read_lines(f"{folder}/errors/correct.jsonl")]
    as_direct = [{**row, "gemini_corrected_answer": direct_answer(row["question"])} for row in kept]
    files = {"pairs": pairs, "half": kept[::2], "direct pairs": as_direct, "own": mine[:len(kept)],
             "direct": [{**row, "original_answer": ""} for row in as_direct], "tracked": kept[:96]}
    for name, rows in files.items():
        evaluation.write_rows(f"{folder}/{name}.jsonl", rows)
    ratios = [row["change_ratio"] for row in pairs]
    return {"pairs": len(pairs), "kept": len(kept), "own": len(files["own"]), "change_ratios": ratios,
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
    world, out = f"{folder}/world-{job['world']}", f"{folder}/scratch/{job['name']}"
    gamma = 1.0 if "direct" in job["data"] else job["gamma"]  # direct answers are not filtered
    keep = {"save_every": max(1, job["steps"] // 3), "keep": 9} if job["gradients"] else {"save_every": 0}
    learn(ranks, out, model=f"{world}/base/model", pairs=f"{world}/{job['data']}.jsonl",
          eval_pairs=f"{world}/tracked.jsonl", loss=job["objective"], lr=job["lr"], seed=job["seed"],
          beta=job["beta"], delta=job["delta"], max_change_ratio=gamma, epochs=s["epochs"],
          batch_size=s["batch_size"], **keep)
    names = ("step", "loss", "reward_chosen", "reward_rejected", "tether_chosen", "tether_rejected", "delta")
    curve = [{k: row[k] for k in names} for _, row in data.read_lines(f"{out}/metrics.jsonl")]
    *_, (_, tracked) = data.read_lines(f"{out}/eval.jsonl")  # after the last step
    tracked = {k: tracked[k] for k in ("reward_chosen", "reward_rejected", "tether_chosen")}
    figures = {"curve": curve, "highest rejected": max(row["reward_rejected"] or 0.0 for row in curve),
               "tracked": tracked, **measure(world, f"{out}/model", job["world"], s, ranks)}
    if job["gradients"]:
        figures["concentration"] = [concentration(world, None, job, ranks)] + [
            concentration(world, path, job, ranks) for path in train.whole_checkpoints(out)]
    shutil.rmtree(out)
    return figures


@torch.no_grad()
def measure(world, model, seed, s, ranks):
    """Right answers in % (greedy), KL(base || model) on general text, and where the rewards come from."""
    own = evaluation.open_own(model, torch.float32, ranks.device, batch_size=64)
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
    # General text: answers to new questions of the other skills, as the corpus has them.
    rows, texts = data.toy_corpus(2 * s["texts"], 0, 0, f"text {seed}"), []
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
    for answer, parts in (("chosen", ("trunk", "chosen matched", "chosen divergent")),
                          ("rejected", ("trunk", "rejected matched", "rejected divergent"))):
        figures[f"shift of {answer}"] = [  # of log pi, in nats an answer, by part
            change[[kind == part for kind in kinds]].sum().item() / len(forks) for part in parts]
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
    the last block, and over all blocks; relative to the mean over all answer positions."""
    base = evaluation.open_own(f"{world}/base/model", torch.float32, ranks.device)
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
    for row, kind in zip(pack.rows.tolist(), row_kinds(forks)):  # the last of a trunk predicts two tokens
        kind = kind.split()[-1]
        part[row] = "divergent" if "divergent" in (kind, part.get(row)) else kind
    norms = [h.grad.norm(dim=1) for h in kept]
    means, kinds = {}, ("trunk", "matched", "divergent")
    for name, where in (("last", norms[-1]), ("all", torch.stack(norms).mean(0))):
        everywhere = where[list(part)].mean().item()
        means[name] = {kind: where[[p for p, k in part.items() if k == kind]].mean().item() / everywhere
                       for kind in kinds}
    share = {kind: sum(k == kind for k in part.values()) / len(part) for kind in kinds}
    return {"step": step, "share": share, **means}


# --- all jobs -------------------------------------------------------------------------------------


def plan_jobs(s, worlds):
    """[job]: each method at each rate, each ablation at the middle rates; worlds: {world: its figures}."""
    jobs = []
    for world in s["worlds"]:
        for seed in s["seeds"]:
            runs = [(m, m, {}, lr) for m in METHODS for lr in s["rates"]]
            runs += [(a, m, more, lr) for a, (m, more) in ABLATIONS.items() for lr in s["ablation_rates"]]
            for title, method, more, lr in runs:
                objective, trained_on = METHODS[method]
                job = {"title": title, "world": world, "seed": seed, "objective": objective,
                       "data": trained_on, "lr": lr, "beta": s["beta"], "gamma": s["gamma"], "delta": "ema",
                       **more}
                job["steps"] = s["epochs"] * -(-worlds[world]["kept"] // s["batch_size"])
                job["gradients"] = (seed == s["seeds"][0] and lr == s["ablation_rates"][-1]
                                    and title in ("SFT+", "DPO", "SPoT-BCE", "SPoT-BCO"))
                job["name"] = f"{title} world {world} seed {seed} lr {lr:g}".replace(" ", "-")
                jobs.append(job)
    return jobs


RANKS = None  # of a worker process


def start_worker(threads, log):
    """A process group of one; what `train` says goes to a file. Ends with the study, however that ends."""
    global RANKS
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    RANKS = train.open_ranks(600)
    torch.set_num_threads(threads)


def work(kind, folder, job, s):
    """One world or run: its figures, from OUT/runs if they are there."""
    path = f"{folder}/runs/{job['name']}.json"
    if not os.path.exists(path):
        began = time.perf_counter()
        figures = (build_world(f"{folder}/{job['name']}", job["world"], s, RANKS) if kind == "world" else
                   run_one(folder, job, s, RANKS))
        qwen.write_json(path, {**job, **figures, "seconds": time.perf_counter() - began})
    return qwen.read_json(path)


def run_all(folder, s, workers):
    """Every world, then every run; returns {"settings", "worlds", "runs"}."""
    os.makedirs(f"{folder}/runs", exist_ok=True)
    known = f"{folder}/settings.json"
    if os.path.exists(known) and qwen.read_json(known) != json.loads(json.dumps(s)):
        sys.exit(f"error: {folder} holds a study with other settings: choose another --out")
    qwen.write_json(known, s)
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker,
                             (threads, f"{folder}/workers.log")) as pool:

        def do(kind, jobs):
            futures = [pool.submit(work, kind, folder, job, s) for job in jobs]
            for future in tqdm(as_completed(futures), total=len(jobs), desc=kind, unit=kind):
                if future.exception():  # what is done is kept
                    sys.exit(f"error: a {kind} failed with {future.exception()!r}: see {folder}/workers.log")
            return [future.result() for future in futures]

        try:
            worlds = do("world", [{"name": f"world-{w}", "world": w} for w in s["worlds"]])
            runs = do("run", plan_jobs(s, {w["world"]: w for w in worlds}))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    drop = ("curve", "seconds", "name", "change_ratios")  # stay in OUT/runs
    return {"settings": s, **{kind: [{k: rounded(v) for k, v in figures.items() if k not in drop}
                                     for figures in some]
                              for kind, some in (("worlds", worlds), ("runs", runs))}}


def rounded(x):
    """All floats in it with six figures."""
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    return list(map(rounded, x)) if isinstance(x, list) else float(f"{x:.6g}") if isinstance(x, float) else x



# --- what the figures say: from the saved JSON alone ----------------------------------------------

T95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571}  # Student's t, 95 % two-sided, by degrees of freedom


def interval(values):
    """Mean over worlds and half the width of its 95 % interval."""
    n = len(values)
    return statistics.mean(values), T95[n - 1] * statistics.stdev(values) / math.sqrt(n)


def verdict(values):
    """Of a quantity that the claim says is above 0, one value a world."""
    mean, half = interval(values)
    return "holds" if mean - half > 0 else "does not hold" if mean + half < 0 else "not decided"


class Study:
    """The saved figures, looked up as means over the training seeds of a world."""

    def __init__(self, saved):
        self.s, self.worlds = saved["settings"], {w["world"]: w for w in saved["worlds"]}
        self.runs = {}
        for run in saved["runs"]:
            self.runs.setdefault((run["title"], run["lr"], run["world"]), []).append(run)

    def at(self, title, lr, world, *keys):
        found = []
        for value in self.runs[title, lr, world]:
            for key in keys:
                value = value[key]
            found.append(value)
        return statistics.mean(found)

    def looks(self, title, lr, world):
        """What `concentration` saw over training, of the seed that was looked at; [] of other runs."""
        runs = self.runs[title, lr, world]
        return next((run["concentration"] for run in runs if "concentration" in run), [])

    def rates(self, title):
        return self.s["ablation_rates" if title in ABLATIONS else "rates"]

    def pick(self, title, world):
        """The learning rate that the toy story's rule takes on the development questions."""
        grades = {lr: {TARGET: self.at(title, lr, world, "dev", "target"),
                       "others": self.at(title, lr, world, "dev", "others")} for lr in self.rates(title)}
        return train.choose_rate(grades, self.worlds[world]["dev"])

    def picked(self, title, *keys):
        """One value a world, each at its picked rate."""
        return [self.at(title, self.pick(title, w), w, *keys) for w in self.worlds]

    def compare(self, one, other, rates, *keys, log=False):
        """One value a world: the difference at equal rates, averaged over them; of log10 if `log`."""
        scale = math.log10 if log else float
        return [statistics.mean(scale(self.at(one, lr, w, *keys)) - scale(self.at(other, lr, w, *keys))
                                for lr in rates) for w in self.worlds]

    def kl_at(self, title, world, level):
        """log10 KL where the target skill, along rising rates, first reaches the level (interpolated)."""
        before = None
        for lr in self.rates(title):
            point = self.at(title, lr, world, "test", "target"), math.log10(self.at(title, lr, world, "kl"))
            if point[0] >= level:
                if before is None:
                    return point[1]
                return before[1] + (point[1] - before[1]) * (level - before[0]) / (point[0] - before[0])
            before = point

    def equal_skill(self, one, other):
        """One value a world: log10 of the ratio of KLs where both have 9/10 of the lesser best skill."""
        found = []
        for w in self.worlds:
            best = [max(self.at(t, lr, w, "test", "target") for lr in self.rates(t)) for t in (one, other)]
            found.append(self.kl_at(one, w, 0.9 * min(best)) - self.kl_at(other, w, 0.9 * min(best)))
        return found


def claims(study):
    """[(number, quantity, values over worlds, unit)] for each part of the seven claims; above 0: it holds."""
    pick, rates, some = study.picked, study.s["rates"], study.s["ablation_rates"]

    def minus(values, than=0.0):
        return [than - v for v in values]

    def reward(title, which):
        return pick(title, "tracked", f"reward_{which}")

    parts = [
        ("1", "SFT+ forgets more than SPoT-BCE: log10 of KL(SFT+) / KL(BCE) at equal target skill",
         study.equal_skill("SFT+", "SPoT-BCE")),
        ("1", "SFT+ forgets more than Reward-SFT: log10 of KL(SFT+) / KL(Reward-SFT) at equal target skill",
         study.equal_skill("SFT+", "Reward-SFT")),
        ("1", "SFT on direct answers forgets more: log10 of KL(SFT) / KL(BCE) at equal rates",
         study.compare("SFT", "SPoT-BCE", rates, "kl", log=True)),
        ("2", "SFT+ lifts y-: r-", reward("SFT+", "rejected")),
        ("2", "Reward-SFT lifts y-: r-", reward("Reward-SFT", "rejected")),
        ("2", "BCE sinks y-: -r-", minus(reward("SPoT-BCE", "rejected"))),
        ("2", "BCO sinks y-: -r-", minus(reward("SPoT-BCO", "rejected"))),
        ("3", "DPO's margin comes from sinking y-: its share above one half",
         [-low / (high - low) - 0.5
          for high, low in zip(reward("DPO", "chosen"), reward("DPO", "rejected"))]),
        ("3", "r+ stagnates under DPO: r+ of BCE minus r+ of DPO",
         [a - b for a, b in zip(reward("SPoT-BCE", "chosen"), reward("DPO", "chosen"))]),
        ("4", "BCO's r+ is higher: r+ of BCO minus r+ of BCE, at equal rates",
         study.compare("SPoT-BCO", "SPoT-BCE", rates, "tracked", "reward_chosen")),
        ("4", "BCO moves further: log10 of KL(BCO) / KL(BCE), at equal rates",
         study.compare("SPoT-BCO", "SPoT-BCE", rates, "kl", log=True)),
        *(("5", f"{t} flattens: lambda+ at the end is below half its start, 1/4 - lambda+",
           minus(pick(t, "tracked", "tether_chosen"), 0.25)) for t in ("Reward-SFT", "SPoT-BCE", "SPoT-BCO")),
        ("6", "rectified y+ beat direct ones: points of target skill, mean over rates",
         study.compare("SPoT-BCE", "direct y+", some, "test", "target")),
        ("6", "gamma 0.6 beats no filter: points of target skill, mean over rates",
         study.compare("SPoT-BCE", "no filter", some, "test", "target")),
        ("6", "all pairs beat half of them: points of target skill, mean over rates",
         study.compare("SPoT-BCE", "half the pairs", some, "test", "target"))]
    for depth, text in (("last", "after the last block"), ("all", "mean over all blocks")):
        parts.append(("7", "SPoT-BCE's gradients gather on divergent tokens: log10 of their mean norm to "
                      f"that of other answer positions, {text}, mean over training",
                      [concentrated(study.looks("SPoT-BCE", some[-1], w), depth) for w in study.worlds]))
    return parts


def concentrated(looks, depth):
    """log10 of the mean gradient norm on divergent positions to that on the others, mean over the looks."""
    found = []
    for look in looks:
        share, norm = look["share"], look[depth]
        rest = sum(share[k] * norm[k] for k in ("trunk", "matched")) / (share["trunk"] + share["matched"])
        found.append(math.log10(norm["divergent"] / rest))
    return statistics.mean(found)


COLUMNS = [("target %", ("test", "target"), 1), ("variants %", ("test", "variants"), 1),
           ("others %", ("test", "others"), 1), ("KL / 1000", ("kl",), 1000),
           ("r+", ("tracked", "reward_chosen"), 1), ("r-", ("tracked", "reward_rejected"), 1),
           ("lambda+", ("tracked", "tether_chosen"), 1)]


def figure(values, scale=1):
    mean, half = interval([scale * v for v in values])
    return f"{mean:.3g} ± {half:.2g}"


def frontier(study) -> str:
    """SVG: target skill against KL from the base, a line a method along its rates, means over worlds."""
    colours = "#999999 #56b4e9 #0072b2 #cc79a7 #e69f00 #000000 #d55e00 #009e73".split()  # Okabe and Ito's

    def mean(title, lr, *keys):
        return statistics.mean(study.at(title, lr, w, *keys) for w in study.worlds)

    lines = {t: [(math.log10(1000 * mean(t, lr, "kl")), mean(t, lr, "test", "target"))
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
    head = [name for name, *_ in COLUMNS]
    base = study.worlds.values()
    rows = [["base", ""] + [figure([w["test"][k] for w in base]) for k in ("target", "variants", "others")]]
    for title in METHODS:
        chosen = ", ".join(f"{study.pick(title, w):g}" for w in study.worlds)
        rows.append([title, chosen] + [figure(study.picked(title, *keys), x) for _, keys, x in COLUMNS])
    print("Each method at the learning rate that the rule picks, a world each\n")
    table(["", "rates", *head], rows)
    print("\nThe whole frontier\n")
    table(["", "rate", *head], [
        [title, f"{lr:g}"] + [figure([study.at(title, lr, w, *keys) for w in study.worlds], x)
                              for _, keys, x in COLUMNS] for title in METHODS for lr in study.rates(title)])
    print("\nAblations, each at its picked rate and, last, the target as a mean over the rates\n")
    rows = []
    for title in ("SPoT-BCE", *ABLATIONS, "SPoT-BCO"):
        mean = [statistics.mean(study.at(title, lr, w, "test", "target") for lr in study.s["ablation_rates"])
                for w in study.worlds]
        cells = [figure(study.picked(title, *keys), x) for _, keys, x in COLUMNS]
        rows.append([title, *cells, figure(mean)])
    table(["", *head, "mean target %"], rows)
    print("\nThe claims: means over worlds with 95 % intervals; above 0 the claim holds\n")
    table(["claim", "quantity", "figure", "verdict"],
          [[number, text, figure(values), verdict(values)] for number, text, values in claims(study)])
    print("\nMean norm of the gradient in hidden states, to the mean over all answer positions: trunk / "
          "matched / divergent\n")
    rows = []
    for title, lr, world in study.runs:
        for look in study.looks(title, lr, world) if world == study.s["worlds"][0] else []:
            cells = [" / ".join(f"{look[depth][k]:.2f}" for k in ("trunk", "matched", "divergent"))
                     for depth in ("last", "all")]
            rows.append([title, look["step"], *cells])
    table(["", "step", "after the last block", "over all blocks"], rows)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", default="runs/study", help="folder to write or to go on in [runs/study]")
    p.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes [one a core]")
    p.add_argument("--short", action="store_true", help="tiny worlds, one rate: only to see that it works")
    p.add_argument("--verdicts", metavar="FILE", help="train nothing, show what this study.json says")
    o = p.parse_args()
    if o.verdicts:
        saved = qwen.read_json(o.verdicts)
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

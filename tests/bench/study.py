"""The paper's claims in the toy world of train.py: six methods on the same pairs, over epochs,
rates, beta and the Oracle's distance, with a verdict for each claim.

    python tests/bench/study.py --out runs/study             # everything; killed, it goes on
    python tests/bench/study.py --out runs/study --worlds 1  # a part of it first
    python tests/bench/study.py --verdicts FILE.json         # text and figures again, from its JSON

A world is the story's with a seed of its own. A run is `train` at one setting, measured as in the
story; what is not varied is as there: rate 1.5e-4, beta 10, 4 epochs. OUT/runs has a file a job,
OUT/study.json all of them; STUDY.md and study-a.svg to -e.svg are made of that.

Expected before the runs, from a pilot of two worlds:
1. SFT+ moves further from the base than every reward-based loss, costs the other skills a point or
   two, loses the rare words. Reward-SFT keeps the skills, loses the words; the others keep both.
2. No pull-up: y+ and y- differ in facts, so r- falls under every loss, under SFT+ too.
3. DPO sinks r- more than it lifts r+; its r+ stays below BCE's, and Add suffers for it.
4. BCO does not reach BCE's r+, as its delta follows r- down; it moves further than BCE.
5. lambda+ of Reward-SFT and BCE falls below 0.05 in the first half of the steps, and from 4 to 12
   epochs they move on less than SFT+, which never stops.
6. The further the Oracle is from y-, the less is learned. Half of the pairs do as well.
7. What changes sits on divergent tokens, under BCE more than under SFT+.
c. A bound on r+ of 5 (beta 1) does not hold, 15 in part, 50 holds, 150 begins to cost Add.
"""

import argparse
import json
import math
import multiprocessing
import os
import re
import shutil
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm import tqdm

from common import data, markdown, qwen, train

import loss
from chart import chart

METHODS = {  # name: (objective, the rows it is trained on); RFT's are its own right answers
    "SFT+": ("sft", "pairs"), "RFT": ("sft", "own"), "Reward-SFT": ("reward-sft", "pairs"),
    "DPO": ("dpo", "pairs"), "BCE": ("spot-bce", "pairs"), "BCO": ("spot-bco", "pairs")}
REWARDED, EDITED = ("DPO", "BCE", "BCO"), ("SFT+", "DPO", "BCE")  # in figures d and e
FULL = {
    "toy": {}, "seeds": [0, 1], **train.TOY["surgery"],
    "all_epochs": [1, 4, 12],  # with all seeds; what follows with the first alone
    "rates": [5e-5, 8e-5, 1.5e-4, 4e-4, 1e-3],  # at one epoch
    "betas": [1.0, 3.0, 10.0, 30.0],  # of BCE, at the most epochs
    # The Oracle's own words, and before how many steps at most it puts them: from near to far.
    "voices": {"so once": ["so ", 1], "so": ["so ", 9], "hence": ["hence ", 9],
               "hence then twice": ["hence then ", 2]},
    "watched": 96}  # pairs whose log-probs are compared before and after
SHORT = {**FULL, "seeds": [0], "epochs": 2, "all_epochs": [1, 2, 3], "rates": [1.5e-4, 1e-3],
         "betas": [1.0, 10.0], "voices": {"so": ["so ", 9]}, "watched": 8,
         "toy": {"world": {"rows": 2000, "chain": 3, "share": 0.2, "doubt": 0.8}, "questions": 64,
                 "test": 4}}


# --- a world, and a run ---------------------------------------------------------------------------

def build_world(out, job, s, ranks):
    """Base model, pairs, and the other files of rows; the base's figures and those of the files:
    medians of -log pi_ref in nats, mean change ratio."""
    root, seed = f"{out}/{job['name']}", job["world"]
    pairs = data.read_log(train.toy_pairs(root, seed, ranks))
    right = data.read_log(f"{root}/errors/correct.jsonl")
    files = {"pairs": pairs, "half": pairs[::2], "own": (right * len(pairs))[:len(pairs)]}
    for name, (word, count) in s["voices"].items():
        files[name] = []
        for row in pairs:
            voiced = re.sub(r"(?<=[\n;])(?=\d)", word, row["gemini_corrected_answer"], count)
            files[name].append({**row, "gemini_corrected_answer": voiced})
    for name, rows in files.items():
        data.write_rows(f"{root}/{name}.jsonl", rows)
    base, described = f"{root}/base/model", {}
    for name in ("pairs", *s["voices"]):
        forks, pack, logps = score(qwen.load_model(base), base, f"{root}/{name}.jsonl")
        nats = -loss.sequence_logps(logps, pack.lengths).median(0).values  # of y+ and y-
        described[name] = {"chosen": nats[0].item(), "rejected": nats[1].item(),
                           "change_ratio": np.mean([change_ratio(fork) for fork in forks]).item()}
    figures = train.toy_figures(f"{root}/base", root, seed, ranks)
    return {**figures, "rows": len(pairs), "files": described}


@torch.no_grad()
def score(policy, base, path, count=None):
    """(forks, pack, log-probs of its scored rows) of the first pairs of a file."""
    chat = data.load_chat(base, policy.config.vocab_size)
    forks = data.load_forks(path, chat, 8192, 1.0, True)[0][:count]
    pack = data.make_pack(forks, list(range(len(forks))))
    return forks, pack, policy(pack.tokens, pack.positions, pack.spans, pack.rows, pack.targets)


def change_ratio(fork):
    """data.change_ratio of a fork's whole answers, without <|im_end|>."""
    start = fork.trunk[fork.prompt_length:]
    return data.change_ratio([*start, *fork.rejected[:-1]], [*start, *fork.chosen[:-1]])


def run_one(out, job, s, ranks):
    """Train as the job says, measure the model, keep the figures and no weights."""
    root, folder = f"{out}/world-{job['world']}", f"{out}/scratch/{job['name']}"
    base = f"{root}/base/model"
    shutil.rmtree(folder, ignore_errors=True)
    # With a voice y+ is less probable; a smaller beta keeps the bound on r+ as it was.
    files = data.read_json(f"{out}/runs/world-{job['world']}.json")["files"]
    nats, path = files.get(job["data"], files["pairs"])["chosen"], f"{root}/{job['data']}.jsonl"
    beta = job["beta"] * files["pairs"]["chosen"] / nats
    train.toy_train(ranks, folder, seed=job["seed"], model=base, pairs=path, beta=beta,
                    loss=METHODS[job["method"]][0], lr=job["lr"], epochs=job["epochs"],
                    max_change_ratio=1.0, save_every=0)
    log = data.read_log(f"{folder}/metrics.jsonl")
    taut = [row["step"] for row in log if row["tether_chosen"] <= 0.05]
    watched = path if job["data"] in files else f"{root}/pairs.jsonl"  # rows with both answers
    figures = {**train.toy_figures(folder, root, job["world"], ranks),
               **watch(base, f"{folder}/model", watched, s, beta, log[-1]["delta"]),
               "taut": 100 * min(taut, default=len(log)) / len(log)}
    figures["log_kl"] = math.log10(figures["kl"] / 1000)  # of nats a token
    if job["epochs"] == s["all_epochs"][-1] and job["method"] in REWARDED:
        keys = ("step", "reward_chosen", "reward_rejected")
        figures["curve"] = [[log[int(i)][key] for key in keys]
                            for i in np.linspace(0, len(log) - 1, 40)]
    shutil.rmtree(folder)
    return figures


def matched(a, b):
    """The places in b of one longest common subsequence of a and b."""
    lengths = np.zeros((len(a) + 1, len(b) + 1), dtype=int)  # of that of a[:i] and b[:j]
    for i, j in np.ndindex(len(a), len(b)):
        longest = max(lengths[i, j + 1], lengths[i + 1, j])
        lengths[i + 1, j + 1] = lengths[i, j] + 1 if a[i] == b[j] else longest
    i, j, places = len(a), len(b), set()
    while i and j:
        if lengths[i, j] == lengths[i - 1, j]:  # a's last item is in no match
            i -= 1
        elif lengths[i, j] == lengths[i, j - 1]:  # nor is b's
            j -= 1
        else:
            i, j = i - 1, j - 1
            places.add(j)
    return places


def watch(base, folder, path, s, beta, delta):
    """Of the first pairs of a file, after training: mean r+, r- and lambda+; and the mean change of
    log pi in nats, whatever its sign, of tokens of y+ that y- has too (in the longest common
    subsequence), and of divergent ones."""
    forks, pack, before = score(qwen.load_model(base), base, path, s["watched"])
    after = score(qwen.load_model(folder), base, path, s["watched"])[2]
    rewards = beta * (loss.sequence_logps(after, pack.lengths)
                      - loss.sequence_logps(before, pack.lengths))
    parts = (after - before).abs().split(pack.lengths.flatten().tolist())
    changes = {"shared": [], "divergent": []}
    for fork, trunk, chosen in zip(forks, parts[0::3], parts[2::3]):
        shared = matched(fork.rejected.tolist(), fork.chosen.tolist())
        changes["shared"] += trunk.tolist()
        for j, change in enumerate(chosen.tolist()):
            changes["shared" if j in shared else "divergent"].append(change)
    means, tether = rewards.mean(0).tolist(), loss.tether(rewards[:, 0], delta).mean().item()
    return {"reward_chosen": means[0], "reward_rejected": means[1], "tether_chosen": tether,
            **{name: np.mean(values).item() for name, values in changes.items()}}


# --- all jobs -------------------------------------------------------------------------------------

def plan_runs(world, s):
    """The jobs of one world, the longest first; a setting that two figures need comes once."""
    jobs = {}

    def add(method, **changes):
        job = {"world": world, "method": method, "epochs": s["epochs"], "lr": s["lr"],
               "beta": s["beta"], "data": METHODS[method][1], "seed": s["seeds"][0], **changes}
        job["name"] = "-".join(f"{v:g}" if isinstance(v, float) else str(v) for v in job.values())
        jobs[job["name"]] = job

    for method in METHODS:
        for epochs in s["all_epochs"]:
            for seed in s["seeds"]:
                add(method, epochs=epochs, seed=seed)
        for lr in s["rates"]:
            add(method, epochs=1, lr=lr)
    for beta in s["betas"]:
        add("BCE", epochs=s["all_epochs"][-1], beta=beta)
    for name in s["voices"]:
        for method in EDITED:
            add(method, data=name)
    add("BCE", epochs=1, data="half")
    return sorted(jobs.values(), key=lambda job: -job["epochs"])


RANKS = None  # of a worker process


def start_worker(log, toy):
    """A process group of one; what it says goes to a file. It ends when the study does."""
    global RANKS

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    train.TOY.update(toy)
    RANKS = replace(train.open_ranks(600), quiet=True)
    torch.set_num_threads(1)


def work(out, job, s):
    """One world or run: its figures, from OUT/runs if they are there."""
    path = f"{out}/runs/{job['name']}.json"
    if not os.path.exists(path):
        began, make = time.process_time(), run_one if "method" in job else build_world
        figures = make(out, job, s, RANKS)
        data.write_json(path, {**job, **figures, "seconds": time.process_time() - began})
    return data.read_json(path)


def run_all(out, s, count, workers):
    """All worlds and their runs, as many worlds at a time as there are workers."""
    os.makedirs(f"{out}/runs", exist_ok=True)
    settings, path = {"story": train.TOY, "study": s}, f"{out}/settings.json"
    if os.path.exists(path) and data.read_json(path) != settings:
        sys.exit(f"error: {out} holds a study with other settings: choose another --out")
    data.write_json(path, settings)
    spawn, worlds, runs = multiprocessing.get_context("spawn"), [], []
    arguments = (f"{out}/workers.log", s["toy"])
    with ProcessPoolExecutor(workers, spawn, start_worker, arguments) as pool:
        for start in range(0, count, workers):
            group = range(start, min(start + workers, count))
            worlds += do(pool, out, s, [{"name": f"world-{w}", "world": w} for w in group])
            runs += do(pool, out, s, [job for w in group for job in plan_runs(w, s)])
    return {"settings": s, "worlds": worlds, "runs": runs}


def do(pool, out, s, jobs):
    """The figures of some jobs. One that fails ends the study; what is done is kept."""
    futures = {pool.submit(work, out, job, s): job["name"] for job in jobs}
    for future in tqdm(as_completed(futures), total=len(jobs), desc=jobs[0]["name"], unit="job"):
        if future.exception():
            pool.shutdown(wait=False, cancel_futures=True)
            sys.exit(f"error: {futures[future]} failed with {future.exception()!r}: see "
                     f"{out}/workers.log; the same command goes on")
    return [future.result() for future in futures]


# --- what the figures say: from the saved JSON alone ----------------------------------------------

T95 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, from 2 worlds


def interval(values):
    """Mean over worlds, and half the width of its 95 % interval: infinite with one world."""
    if len(values) == 1:
        return values[0], math.inf
    return np.mean(values), T95[len(values) - 2] * np.std(values, ddof=1) / len(values) ** 0.5


def verdict(values):
    """Of a quantity that a claim says is above 0, one value a world."""
    mean, half = interval(values)
    if half == math.inf:
        return "one world, no interval"
    if abs(mean) <= half:
        return "not decided"
    return "holds" if mean > 0 else "does not hold"


def overall(verdicts):
    """Of a claim, from those of its parts."""
    if len(set(verdicts)) == 1:
        return verdicts[0]
    return "holds in part" if "holds" in verdicts else "does not hold"


def shown(values):
    """Mean ± half of the interval, as text."""
    mean, half = interval(values)
    digits = 2 if abs(mean) < 9.95 else 1
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if half < math.inf else "")


@dataclass
class Study:
    """The saved figures. Every function gives an array of one value a world."""

    settings: dict
    worlds: list
    runs: list

    def at(self, method, key, **changes):
        """A figure of a method, mean over seeds, at the story's setting but for the changes."""
        wanted = {k: self.settings[k] for k in ("epochs", "lr", "beta")}
        wanted |= {"method": method, "data": METHODS[method][1], **changes}
        runs = [run for run in self.runs if all(run[k] == v for k, v in wanted.items())]
        return np.array([np.mean([run[key] for run in runs if run["world"] == world["world"]], 0)
                         for world in self.worlds])

    def base(self, key):
        return np.array([world[key] for world in self.worlds])

    def file(self, key, name="pairs"):
        return np.array([world["files"][name][key] for world in self.worlds])


def claims(study):
    """[(claim, quantity, one value a world, the verdict expected)]: above 0 a quantity speaks for
    the claim. At the story's setting; "long" is at the largest number of epochs."""
    at, s = study.at, study.settings
    yes, no, undecided = "holds", "does not hold", "not decided"
    long, parts = {"epochs": s["all_epochs"][-1]}, []
    for m in ("Reward-SFT", "DPO", "BCE", "BCO"):
        parts += [
            (1, f"SFT+ moves further than {m}: log10 of the ratio of KLs",
             at("SFT+", "log_kl") - at(m, "log_kl"), yes),
            (1, f"{m} keeps more of the other skills than SFT+: points",
             at(m, "others") - at("SFT+", "others"), yes),
            (1, f"{m} keeps half of the base's rare words: points above that",
             at(m, "words") - study.base("words") / 2, no if m == "Reward-SFT" else yes)]
    for m in ("SFT+", "Reward-SFT"):
        parts.append((2, f"{m} lifts y-: r-", at(m, "reward_rejected"), no))
    for m in ("BCE", "BCO"):
        parts.append((2, f"{m} sinks y-: -r-", -at(m, "reward_rejected"), yes))
    for when, n in (("", {}), (", long", long)):
        chosen = {m: at(m, "reward_chosen", **n) for m in REWARDED}
        parts += [
            (3, f"DPO sinks r- by more than it lifts r+: -r- - r+{when}",
             -at("DPO", "reward_rejected", **n) - chosen["DPO"], yes),
            (3, f"DPO's r+ stays below BCE's: by{when}", chosen["BCE"] - chosen["DPO"], yes),
            (4, f"BCO's r+ is higher than BCE's: by{when}", chosen["BCO"] - chosen["BCE"], no),
            (4, f"BCO moves further than BCE: log10 of the ratio of KLs{when}",
             at("BCO", "log_kl", **n) - at("BCE", "log_kl", **n), yes)]
    growth = {m: at(m, "log_kl", **long) - at(m, "log_kl") for m in METHODS}
    for m, expected in (("Reward-SFT", yes), ("BCE", yes), ("BCO", undecided)):
        parts += [
            (5, f"{m}'s lambda+ is below 0.05 before half of the steps: by so many %, long",
             50 - at(m, "taut", **long), expected),
            (5, f"SFT+ moves on more than {m}: difference of log10 of the KLs' growth up to long",
             growth["SFT+"] - growth[m], expected)]
    first, far = {"epochs": 1, "seed": s["seeds"][0]}, list(s["voices"])[-1]
    ratio = {m: np.log10(at(m, "divergent") / at(m, "shared")) for m in ("BCE", "SFT+")}
    return sorted(parts + [
        (6, f"BCE learns more from edits than from y+ with the voice '{far}': points of Add",
         at("BCE", "add") - at("BCE", "add", data=far), yes),
        (6, "all pairs teach BCE more than half of them, one epoch: points of Add",
         at("BCE", "add", **first) - at("BCE", "add", **first, data="half"), undecided),
        (7, "BCE changes divergent tokens of y+ more than its others: log10 of the ratio",
         ratio["BCE"], yes),
        (7, "and that more than SFT+ does: the difference", ratio["BCE"] - ratio["SFT+"], yes),
    ], key=lambda part: part[0])


# --- text and figures -----------------------------------------------------------------------------

CLAIMS = {
    1: "SFT on y+ forgets, reward-based losses do not", 2: "SFT lifts y-, BCE and BCO sink it",
    3: "DPO widens the margin by sinking r-", 4: "BCO has a higher r+ and a larger KL than BCE",
    5: "The tether stops training by itself", 6: "Edits beat rewritten answers, more pairs help",
    7: "Changes gather on divergent tokens"}
COLUMNS = {"Add %": "add", "others %": "others", "manner %": "obeyed", "rare words %": "words",
           "KL*1000": "kl", "r+": "reward_chosen", "r-": "reward_rejected",
           "lambda+": "tether_chosen"}
MARKS = "<!-- from here on by study.py -->\n", "<!-- to here by study.py -->\n"


def results(study, settings):
    """A table of all figures, a row for each {title: (method, changes)}, below the base's."""
    # "obeyed" stands in studies up to 2026-11-29 alone
    columns = {title: key for title, key in COLUMNS.items() if key in study.runs[0]}
    base = [shown(study.base(key)) if key in study.worlds[0] else "" for key in columns.values()]
    rows = [[title, *(shown(study.at(method, key, **changes)) for key in columns.values())]
            for title, (method, changes) in settings.items()]
    return markdown(["", *columns], [["base", *base], *rows])


def describe_study(study):
    """All verdicts and tables, as Markdown."""
    s, parts, files = study.settings, claims(study), ("pairs", *study.settings["voices"])
    verdicts = [[verdict(values) for claim, _, values, _ in parts if claim == n] for n in CLAIMS]
    long, first = {"epochs": s["all_epochs"][-1]}, {"epochs": 1, "seed": s["seeds"][0]}
    return "\n\n".join([
        f"Worlds: {len(study.worlds)}, of {shown(study.base('rows'))} pairs; runs: "
        f"{len(study.runs)}. Rate {s['lr']:g}, beta {s['beta']:g}, {s['epochs']} epochs unless "
        "said. Means over worlds ± half of a 95 % interval; within a world seeds are averaged "
        f"first. r+, r- and lambda+ are of {s['watched']} training pairs after the last step.",
        "## The claims",
        markdown(["", "claim", "verdict", "parts that hold"],
              [[n, text, overall(v), f"{v.count('holds')} of {len(v)}"]
               for (n, text), v in zip(CLAIMS.items(), verdicts)]),
        "The parts; above 0 a figure speaks for the claim.",
        markdown(["", "quantity", "figure", "verdict", "expected"],
              [[n, text, shown(values), verdict(values), expected]
               for n, text, values, expected in parts]),
        "## Who stops: epochs\n\n![a](study-a.svg)",
        results(study, {f"{m}, {n}": (m, {"epochs": n}) for m in METHODS for n in s["all_epochs"]}),
        "## Skill against retention: rates, one epoch\n\n![b](study-b.svg)",
        results(study, {f"{m}, {lr:g}": (m, {"lr": lr, **first})
                        for m in METHODS for lr in s["rates"]}),
        f"## The tether's room: beta of BCE, {long['epochs']} epochs\n\n![c](study-c.svg)",
        results(study, {f"beta {beta:g}, bound {shown(beta * study.file('chosen'))}":
                        ("BCE", {"beta": beta, **long}) for beta in s["betas"]}),
        "## Rewards over the steps\n\n![d](study-d.svg)",
        "## The Oracle's distance, at an equal bound on r+\n\n![e](study-e.svg)",
        markdown(["y+", "its nats", "nats of y-", "change ratio"],
              [[name, *(shown(study.file(key, name))
                        for key in ("chosen", "rejected", "change_ratio"))] for name in files]),
        results(study, {f"{m}, {name}": (m, {"data": name})
                        for name in files for m in EDITED}), ""])


def draw_study(study):
    """{letter: SVG}"""
    at, s, nats = study.at, study.settings, study.file("chosen")
    long, first = {"epochs": s["all_epochs"][-1]}, {"epochs": 1, "seed": s["seeds"][0]}
    epochs = [(n, {"epochs": n}) for n in s["all_epochs"]]
    betas = [(beta * nats, {"beta": beta, **long}) for beta in s["betas"]]
    voices = [(study.file("chosen", name) - nats, {"data": name})
              for name in ("pairs", *s["voices"])]

    def lines(key, places, methods=METHODS):
        return {m: [(x, at(m, key, **changes)) for x, changes in places] for m in methods}

    def with_base(key):
        return {**lines(key, epochs), "base": [(n, study.base(key)) for n, _ in epochs]}

    def over_bounds(key):
        flat = [(bound, long) for bound, _ in betas]
        return {**lines(key, flat, ["SFT+"]), **lines(key, betas, ["BCE"])}

    def over_steps(column):
        return {m: [(point[:, 0], point[:, column])  # from (worlds, points, 3)
                    for point in at(m, "curve", **long).swapaxes(0, 1)] for m in REWARDED}

    kl, add = "KL from the base, 1/1000 nat a token", "Right answers in Add, %"
    bound, distance = "bound on r+: beta times nats of y+", "nats that the Oracle's words add to y+"
    front = {m: [(at(m, "kl", lr=lr, **first), at(m, "add", lr=lr, **first)) for lr in s["rates"]]
             for m in METHODS}
    ratios = {"BCE": [(x, study.file("change_ratio", changes["data"])) for x, changes in voices]}
    return {
        "a": chart([(kl, "epochs", lines("kl", epochs), "xy"),
                    ("Right answers in other skills, %", "epochs", with_base("others"), "x"),
                    ("Rare words, % of boundaries", "epochs", with_base("words"), "x")]),
        "b": chart([(f"{add}, at rising rates", kl, front, "x")]),
        "c": chart([(kl, bound, over_bounds("kl"), "xy"), (add, bound, over_bounds("add"), "x"),
                    ("lambda+ at the end", bound, lines("tether_chosen", betas, ["BCE"]), "x")]),
        "d": chart([("r+, the reward of y+", "step", over_steps(1), ""),
                    ("r-, the reward of y-", "step", over_steps(2), ""),
                    (add, "epochs", lines("add", epochs, REWARDED), "x")]),
        "e": chart([(add, distance, lines("add", voices, EDITED), ""),
                    (kl, distance, lines("kl", voices, EDITED), "y"),
                    ("Change ratio (gamma is 0.6)", distance, ratios, "")])}


def write_all(folder, saved):
    """STUDY.md and the figures. What stands in STUDY.md outside the two marks is kept."""
    study, path = Study(**saved), f"{folder}/STUDY.md"
    before, after = "# The study\n\n", ""
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            before, _, rest = f.read().partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
    data.write_text(path, [before, MARKS[0], "\n", describe_study(study), MARKS[1], after])
    for letter, svg in draw_study(study).items():
        data.write_text(f"{folder}/study-{letter}.svg", [svg])


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", default="runs/study", help="folder to write, or to go on in")
    p.add_argument("--worlds", type=int, default=4, help="how many, 10 at most [4]")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="processes [one a core]")
    p.add_argument("--short", action="store_true", help="one small world, a minute: does it work?")
    p.add_argument("--verdicts", metavar="FILE", help="only write anew, beside this study.json")
    o = p.parse_args()
    if o.verdicts:
        return write_all(os.path.dirname(o.verdicts) or ".", data.read_json(o.verdicts))
    s, count = (SHORT, 1) if o.short else (FULL, o.worlds)
    saved = run_all(o.out, s, count, o.workers)
    short = json.loads(json.dumps(saved), parse_float=lambda x: float(f"{float(x):.6g}"))
    data.write_text(f"{o.out}/study.json", [json.dumps(short)])
    write_all(o.out, short)
    print(f"{o.out}/STUDY.md")


if __name__ == "__main__":
    main()

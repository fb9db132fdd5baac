"""Evaluation from end to end: tasks, scores, resumption, comparison, retention."""

import json
import math
import shutil

import launch
import pytest
import tiny
import torch
from misbehaving import Misbehaving, completion
from tiny import write_rows

import data
import eval as evaluation
import model as qwen


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A random policy; a sixth of all tokens end its answers."""
    folder = tmp_path_factory.mktemp("talker")
    tiny.write_checkpoint(folder)
    ends = {"eos_token_id": list(range(0, 265, 6))}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder, comma = tmp_path_factory.mktemp("sets"), "punctuation:no_comma"
    write_rows(folder / "aime24.jsonl", [
        {"id": i, "problem": f"{i} + {i}?", "answer": f"{2 * i:03}"} for i in range(3)])
    write_rows(folder / "olympiadbench.jsonl", [
        {"id": 1, "question": "roots?", "final_answer": ["$1$", "$2$"], "is_multiple_answer": True,
         "unit": None, "error": None}])
    write_rows(folder / "gpqa.jsonl", [tiny.gpqa_row(i) for i in range(3)])
    write_rows(folder / "ifeval.jsonl", [
        {"key": 1, "prompt": "p", "instruction_id_list": [comma], "kwargs": [{}]},
        {"key": 2, "prompt": "q", "instruction_id_list": [comma, "startend:quotation"],
         "kwargs": [{}, {}]}])
    write_rows(folder / "connect4.jsonl", [  # positions of which the grader reads the answers alone
        {"state": f"Board {i}. You are player X.", "answer": [[[0, i]], []]} for i in range(3)])
    write_rows(folder / "own.jsonl", [{"question": "2 + 2?", "answer": "so 4\n#### 4"}])
    return folder


def run(*argv):
    return launch.program(evaluation, *argv)


@pytest.fixture
def ask(sets):
    """Ask a server that answers by `behave`: ask(behave, out, ...) is (exit code, output)."""
    def ask(behave, out, *argv):
        with Misbehaving(behave) as server:
            ended = run("--server", server.url, "--out", out, "--data", sets, *argv)
        ask.requests = server.requests
        return ended
    return ask


def says(text):
    return lambda body, attempt: completion(text)


def results(folder):
    return data.read_json(str(folder / "results.json"))


EVERYTHING = "aime24,olympiadbench,gpqa,connect4,ifeval,own={}/own.jsonl"


def greedy(sets):
    return ("--tasks", EVERYTHING.format(sets), "--data", sets, "--temperature", 0, "--samples", 2,
            "--limit", 3, "--max_tokens", 16, "--dtype", "float32")


@pytest.fixture(scope="module")
def alone(talker, sets, tmp_path_factory):
    """Every task in one process: the folder it left."""
    out = tmp_path_factory.mktemp("alone") / "out"
    said = launch.run(["eval.py", "--model", talker, "--out", out, *greedy(sets)])
    assert evaluation.results_table(data.read_json(str(out / "results.json"))) in said
    return out


def test_every_task_goes_from_end_to_end(alone):
    found = results(alone)
    assert list(found) == ["aime24", "olympiadbench", "gpqa", "connect4", "ifeval", "own"]
    assert [r["questions"] for r in found.values()] == [3, 1, 3, 3, 2, 1]
    for r in found.values():
        assert r["samples"] == 2 and r["unanswered"] == 0 and 0 < r["tokens"] <= 16
        assert all(len(s) == 2 and s[0] == s[1] for s in r["scores"].values())  # greedy twice
    table = evaluation.results_table(data.read_json(str(alone / "results.json"))).split("\n")
    assert table[0] == "| aime24 | olympiadbench | gpqa | connect4 | ifeval | own | OOD |"


def test_a_server_gives_the_same(alone, talker, sets, tmp_path, ask):
    own = evaluation.open_local_model(str(talker), torch.float32, "cpu")

    def behave(body, attempt):
        (found,) = tiny.generate(own.model, [own.chat.prompt(body["messages"])], [0], temperature=0,
                                 max_tokens=body["max_tokens"], end=own.end)
        answer = completion(own.chat.tokenizer.decode(found[0]), "stop" if found[1] else "length")
        answer["usage"]["completion_tokens"] = len(found[0]) + found[1]
        return answer

    code, err = ask(behave, tmp_path / "out", *greedy(sets))
    assert code == 0, err
    assert results(tmp_path / "out") == results(alone)


def test_scores_by_hand(tmp_path, ask):
    """Three questions, four answers each: 4, 2 and 0 of them right."""
    def behave(body, attempt):
        i = int(body["messages"][0]["content"].split("\n")[-1].split()[0])
        if i == 2 and attempt == 3:
            return 400, {}, b"no"
        right = i == 0 or i == 1 and attempt % 2 == 0
        return completion(f"\\boxed{{{2 * i if right else 7}}}" if (i, attempt) != (2, 0) else "",
                          "length" if (i, attempt) == (2, 1) else "stop")

    out, options = tmp_path / "out", ("--tasks", "aime24", "--samples", 4, "--workers", 1)
    code, err = ask(behave, out, *options)
    assert code == 0 and "unanswered 1" in err
    found = results(out)["aime24"]
    scores = {key.split()[0]: scores for key, scores in found["scores"].items()}
    assert scores == {"0": [1, 1, 1, 1], "1": [1, 0, 1, 0], "2": [0, 0, 0]}
    assert found["metrics"]["accuracy"] == pytest.approx([0.5, 0.5 / math.sqrt(3)])
    assert (found["unanswered"], found["samples"]) == (1, 4)
    assert found["cut off"] == pytest.approx(1 / 11)
    assert found["metrics"]["no answer"][0] == pytest.approx(1 / 3 / 3)
    assert len(ask.requests) == 12
    ask(says("\\boxed{7}"), out, *options)
    assert len(ask.requests) == 1 and results(out)["aime24"]["unanswered"] == 0


def test_results_that_another_process_adds_are_kept(sets, tmp_path, ask, monkeypatch):
    """While this one grades."""
    out, score_task, own = tmp_path / "out", evaluation.score_task, f"own={sets}/own.jsonl"
    assert ask(says("\\boxed{7}"), out, "--tasks", "aime24", "--samples", 1)[0] == 0
    before = results(out)

    def slowly(*args):
        (out / "results.json").write_text(json.dumps({**before, "aime25": before["aime24"]}))
        return score_task(*args)
    monkeypatch.setattr(evaluation, "score_task", slowly)
    assert ask(says("\\boxed{7}"), out, "--tasks", own, "--samples", 1)[0] == 0
    assert list(results(out)) == ["aime24", "aime25", "own"]


def test_two_evaluations_by_hand(sets, tmp_path, ask):
    """Other questions under the same ids, a task of one question, another seed."""
    a, b, c, d = ({"question": f"{i}?", "answer": i} for i in range(4))
    files = [write_rows(tmp_path / "a.jsonl", [a, b, c]),
             write_rows(tmp_path / "b.jsonl", [a, b, {"question": "other?", "answer": 7}, d])]
    for name, file, number in (("a", files[0], 1), ("b", files[1], 7)):
        code, err = ask(says(f"\\boxed{{{number}}}"), tmp_path / name, "--samples", 1, "--seed",
                        number, "--tasks", f"x={file},own={sets / 'own.jsonl'}")
        assert code == 0, err
    _, table = run("compare", "--a", tmp_path / "a", "--b", tmp_path / "b")
    # the differences 0 and -1: standard deviation 1 / sqrt(2), error 1 / 2
    assert "| x | 2 of 4 | 50.0 | 0.0 | -50.0 | -148.0 to +48.0 |" in table
    assert "| own" not in table and "own: 1 of 1 questions are answered in both: too few" in table
    assert "seed differs: 1 and 7" in table


def test_a_dead_server_says_why(tmp_path, ask):
    code, err = ask(lambda *_: (400, {}, b"model is asleep"), tmp_path / "out", "--tasks", "aime24")
    assert code == 1 and "not one answer arrived (HTTP 400: model is asleep" in err


BAD = [
    (["--tasks", "aime99"], "--tasks: 'aime99': aime24, "), (["--tasks", ","], "--tasks: ''"),
    (["--tasks", "../x=own.jsonl"], "--tasks: '../x'"),
    ({"question": "q"}, "a gold answer expected"),
    ({"answer": "4"}, "question, problem or prompt expected"),
]


@pytest.mark.parametrize("given, expected", BAD, ids=lambda part: str(part)[:40])
def test_bad_tasks_are_refused_before_anything_is_asked(given, expected, tmp_path, ask):
    if isinstance(given, dict):
        given = ["--tasks", f"mine={write_rows(tmp_path / 'mine.jsonl', [given, given])}"]
    code, err = ask(says(""), tmp_path / "out", *given)
    assert code == 1 and expected in err and "Traceback" not in err, err
    assert not ask.requests and not (tmp_path / "out").exists()


def test_another_models_folder_is_refused(alone, talker, sets, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    shutil.copytree(alone, out)
    tiny.write_checkpoint(other, seed=1)
    for model, more in ((other, ()), (talker, ("--dtype", "bfloat16"))):
        code, err = run("--model", model, "--out", out, *greedy(sets), *more)
        assert code == 1 and "other settings" in err
    assert results(out) == results(alone)


def test_retention_equals_a_direct_computation(talker, tmp_path):
    from transformers import AutoModelForCausalLM

    other = tiny.write_checkpoint(tmp_path / "other", seed=1)
    texts = write_rows(tmp_path / "texts.jsonl", [
        {"text": "The quick brown fox"}, {"text": "a" * 300},  # more than one block of rows
        {"prompt": "1 + 1?", "chosen": "It is 2.", "rejected": "It is 3."}, {"text": "x"}])
    code, output = run("retention", "--model", other, "--base", talker, "--texts", texts,
                       "--dtype", "float32")
    assert code == 0, output
    found = json.loads(output.splitlines()[-1])
    chat = data.load_chat(str(talker), 265)
    sequences, _ = evaluation.read_sequences(str(texts), chat, 4096)
    assert "texts.jsonl: 3 texts {'dropped: no token to score': 1}" in output
    cut, counts = evaluation.read_sequences(str(texts), chat, 10)
    assert [len(ids) for ids, _ in cut] == [10, 10]
    assert counts == {"cut at 10 tokens": 2, "dropped: no token to score": 2}
    prompt = chat.prompt([{"role": "user", "content": "1 + 1?"}])
    assert [first for _, first in sequences] == [1, 1, len(prompt)]
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
              for folder in (other, str(talker))]
    sums, count, per_text = [0.0, 0.0, 0.0], 0, []
    for ids, first in sequences:
        with torch.no_grad():
            p, q = (m(torch.tensor([ids])).logits[0, first - 1:-1].log_softmax(-1) for m in models)
        target = torch.tensor(ids[first:])
        kl = torch.nn.functional.kl_div(p, q, log_target=True, reduction="sum")
        here = [float(x.gather(1, target[:, None]).sum()) for x in (p, q)] + [float(kl)]
        sums = [a + b for a, b in zip(sums, here)]
        count += len(target)
        per_text.append((len(target), float(kl)))
    assert found["tokens"] == count
    for name, total in zip(("logp", "logp_base", "kl"), sums):
        assert found[name][0] == pytest.approx(total / count, rel=1e-5)
    # The ratio estimator's standard error by its textbook formula.
    mean, n = sums[2] / count, len(per_text)
    squares = sum((kl - mean * tokens) ** 2 for tokens, kl in per_text)
    assert found["kl"][1] == pytest.approx(math.sqrt(squares * n / (n - 1)) / count, rel=1e-4)


def test_retention_in_bf16_rounds_no_logits(talker):
    """The same bf16 hidden states through an fp64 head: the KL of what the models say, not of
    rounding. Of a model from itself it is 0."""
    models = [evaluation.open_local_model(str(talker), torch.bfloat16, "cpu").model
              for _ in range(2)]
    ids, ranks = list(range(60)), qwen.open_ranks(60)
    same = evaluation.retention(*models, [(ids, 1)], ranks)
    assert same["kl"][0] == 0.0 and same["logp"] == same["logp_base"] and same["tokens"] == 59
    with torch.no_grad():
        models[0].head_weight().mul_(1.01)  # a small step, as in training
    found = evaluation.retention(*models, [(ids, 1)], ranks)
    qwen.close_ranks()
    logps, layout = [], [(0, 60, 60, 60)]
    with torch.no_grad():
        for m in models:
            hidden = m.norm(m.hidden_states(torch.tensor(ids), torch.arange(60), layout))[:-1]
            logps.append((hidden.double() @ m.head_weight().double().T).log_softmax(-1))
    expected = torch.nn.functional.kl_div(*logps, log_target=True, reduction="sum") / 59
    assert found["kl"][0] == pytest.approx(float(expected), rel=1e-3)


def test_retention_refuses_another_tokenizer(talker, tmp_path):
    other = tiny.write_checkpoint(tmp_path / "other")
    wider = tiny.write_checkpoint(tmp_path / "wider", vocab=300)
    path = tmp_path / "other" / "tokenizer.json"
    swapped = path.read_text().replace('"<think>"', '"<swap>"').replace('"</think>"', '"<think>"')
    path.write_text(swapped.replace('"<swap>"', '"</think>"'))
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": "The quick brown fox"}])
    for model in (other, wider):
        code, err = run("retention", "--model", model, "--base", talker, "--texts", texts)
        assert code == 1 and "differ in tokenizer or number of tokens" in err
    write_rows(texts, [{"prompt": "q", "chosen": "a", "is_correct": False}])
    code, err = run("retention", "--model", talker, "--base", talker, "--texts", texts)
    assert code == 1 and "nothing to score: {'is_correct is not true': 1}" in err

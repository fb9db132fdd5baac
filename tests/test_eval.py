"""Evaluation from end to end: tasks, scores, resumption, comparison, retention."""

import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import launch
import tiny
import torch
from misbehaving import Misbehaving, completion

import data
import eval as evaluation
import model as qwen
from data import UserError

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A random policy; a sixth of all tokens end its answers."""
    folder = tmp_path_factory.mktemp("talker")
    tiny.write_checkpoint(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(0, 265, 6))}))
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    write(folder / "aime24.jsonl", [{"id": i, "problem": f"{i} + {i}?", "answer": f"{2 * i:03}"}
                                    for i in range(3)])
    write(folder / "olympiadbench.jsonl", [
        {"id": 1, "question": "roots?", "final_answer": ["$1$", "$2$"], "is_multiple_answer": True,
         "unit": None, "error": None}])
    write(folder / "gpqa.jsonl", [tiny.gpqa_row(i) for i in range(3)])
    write(folder / "ifeval.jsonl", [
        {"key": 1, "prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        {"key": 2, "prompt": "q", "instruction_id_list": ["punctuation:no_comma", "startend:quotation"],
         "kwargs": [{}, {}]}])
    write(folder / "own.jsonl", [{"question": "2 + 2?", "answer": "so 4\n#### 4"}])
    return folder


def run_cli(monkeypatch, capsys, *argv):
    """`python eval.py ...` in this process: (exit code, stderr)."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, argv)])
    for name in ("RANK", "WORLD_SIZE", "OPENAI_BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    try:
        code = evaluation.main()
    except SystemExit as e:
        code = e.code
    return code, capsys.readouterr().err


def results(folder):
    return json.loads((folder / "results.json").read_text())


EVERYTHING = "aime24,olympiadbench,gpqa,connect4,ifeval,own={}/own.jsonl"


def greedy(sets):
    return ("--tasks", EVERYTHING.format(sets), "--data", sets, "--temperature", 0, "--samples", 2,
            "--limit", 3, "--max_tokens", 16, "--dtype", "float32")


@pytest.fixture(scope="module")
def alone(talker, sets, tmp_path_factory):
    """Every task in one process: the folder it left."""
    out = tmp_path_factory.mktemp("alone") / "out"
    said = launch.run(["eval.py", "--model", talker, "--out", out, *greedy(sets)])
    assert (out / "results.md").read_text().strip() in said
    return out


def test_every_task_goes_from_end_to_end(alone):
    found = results(alone)
    assert list(found) == ["aime24", "olympiadbench", "gpqa", "connect4", "ifeval", "own"]
    assert [r["questions"] for r in found.values()] == [3, 1, 3, 3, 2, 1]
    for r in found.values():
        assert r["samples"] == 2 and r["unanswered"] == 0 and 0 < r["tokens"] <= 16
        assert all(len(s) == 2 and s[0] == s[1] for s in r["scores"].values())  # greedy twice
    table = (alone / "results.md").read_text().split("\n")
    assert table[0] == "| aime24 | olympiadbench | gpqa | connect4 | ifeval | own | OOD |"


def test_two_ranks_give_the_same(alone, talker, sets, tmp_path):
    launch.run(["eval.py", "--model", talker, "--out", tmp_path / "out", *greedy(sets)], ranks=2)
    assert results(tmp_path / "out") == results(alone)


def test_a_server_gives_the_same(alone, talker, sets, tmp_path, monkeypatch, capsys):
    own = evaluation.open_local_model(str(talker), torch.float32, "cpu")

    def behave(body, attempt):
        (found,) = qwen.generate(own.model, [own.chat.prompt(body["messages"])], [0], temperature=0,
                                 max_tokens=body["max_tokens"], end=own.end)
        answer = completion(own.chat.tokenizer.decode(found[0]), "stop" if found[1] else "length")
        answer["usage"]["completion_tokens"] = len(found[0]) + found[1]
        return answer
    with Misbehaving(behave) as server:
        code, err = run_cli(monkeypatch, capsys, "--server", server.url, "--out", tmp_path / "out",
                            *greedy(sets))
    assert code == 0, err
    assert results(tmp_path / "out") == results(alone)


def test_a_killed_evaluation_goes_on(alone, talker, sets, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    shutil.copytree(alone, out)
    (out / "results.json").unlink()
    for raw in sorted(out.glob("*/raw-0.jsonl"))[:3]:  # as a kill leaves it: some answers, the last one torn
        raw.write_bytes(raw.read_bytes()[:-40])
    shutil.rmtree(out / "own")
    code, err = run_cli(monkeypatch, capsys, "--model", talker, "--out", out, *greedy(sets))
    assert code == 0, err
    assert results(out) == results(alone)


@pytest.mark.slow
def test_sigkill_in_mid_evaluation(talker, tmp_path):
    questions = write(tmp_path / "own.jsonl", [{"question": f"{i} + {i}?", "answer": i} for i in range(120)])
    command = [sys.executable, ROOT / "eval.py", "--model", talker, "--tasks", f"own={questions}", "--dtype",
               "float32", "--max_tokens", "32", "--batch_size", "8", "--out"]
    subprocess.run([*command, tmp_path / "whole"], check=True, capture_output=True)
    log = tmp_path / "killed" / "own" / "raw-0.jsonl"
    for lines in (100, 330):
        process = subprocess.Popen([*command, tmp_path / "killed"], stderr=subprocess.DEVNULL)
        while not log.exists() or log.read_bytes().count(b"\n") < lines:
            time.sleep(0.01)
            assert process.poll() is None
        process.kill()
        process.wait()
        assert not (tmp_path / "killed" / "results.json").exists()
    subprocess.run([*command, tmp_path / "killed"], check=True, capture_output=True)
    assert results(tmp_path / "killed") == results(tmp_path / "whole")
    assert log.read_bytes().count(b"\n") == 600  # five a question, none twice


def test_scores_by_hand(sets, tmp_path, monkeypatch, capsys):
    """Three questions, four answers each: 4, 2 and 0 of them right."""
    def behave(body, attempt):
        i = int(body["messages"][0]["content"].split("\n")[-1].split()[0])
        if i == 2 and attempt == 3:
            return 400, {}, b"no"
        right = i == 0 or i == 1 and attempt % 2 == 0
        return completion(f"\\boxed{{{2 * i if right else 7}}}" if (i, attempt) != (2, 0) else "",
                          "length" if (i, attempt) == (2, 1) else "stop")
    with Misbehaving(behave) as server:
        code, err = run_cli(monkeypatch, capsys, "--server", server.url, "--out", tmp_path / "out", "--tasks",
                            "aime24", "--data", sets, "--samples", 4, "--workers", 1)
        assert code == 0 and "1 UNANSWERED" in err
        found = results(tmp_path / "out")["aime24"]
        assert found["scores"] == {"0": [1, 1, 1, 1], "1": [1, 0, 1, 0], "2": [0, 0, 0]}
        mean, error = found["metrics"]["accuracy"]
        assert mean == pytest.approx(0.5) and error == pytest.approx(0.5 / math.sqrt(3))
        assert found["pass@3"] == pytest.approx(2 / 3)  # of 1, 0, 1, 0 each three hold a right one
        assert (found["unanswered"], found["samples"]) == (1, 4)
        assert found["cut off"] == found["empty"] == pytest.approx(1 / 11)
        assert found["metrics"]["no answer"][0] == pytest.approx((0 + 0 + 1 / 3) / 3)
        server.behave = lambda body, attempt: completion("\\boxed{7}")
        code, err = run_cli(monkeypatch, capsys, "--server", server.url, "--out", tmp_path / "out", "--tasks",
                            "aime24", "--data", sets, "--samples", 4)
        assert len(server.requests) == 13 and results(tmp_path / "out")["aime24"]["unanswered"] == 0


def test_instruction_level_counts_instructions(sets, tmp_path, monkeypatch, capsys):
    with Misbehaving(lambda body, attempt: completion("fine")) as server:  # no comma, no quotation marks
        run_cli(monkeypatch, capsys, "--server", server.url, "--out", tmp_path / "out", "--tasks", "ifeval",
                "--data", sets, "--samples", 1)
    metrics = results(tmp_path / "out")["ifeval"]["metrics"]
    assert metrics["prompt strict"][0] == 0.5 and metrics["instruction strict"][0] == pytest.approx(2 / 3)


def test_two_evaluations_are_compared(sets, tmp_path, monkeypatch, capsys):
    for name, number in (("a", 7), ("b", 2)):
        with Misbehaving(lambda body, attempt: completion(f"\\boxed{{{number}}}")) as server:
            run_cli(monkeypatch, capsys, "--server", server.url, "--out", tmp_path / name, "--tasks",
                    "aime24", "--data", sets, "--samples", 2)
    table = evaluation.compare_runs([str(tmp_path / "a"), str(tmp_path / "b")])
    assert "| aime24 | 3 | 0.0 | 33.3 | +33.3 | +0.0 to +100.0 | - |" in table and "differs" not in table


def test_what_cannot_be_compared_is_said(sets, tmp_path, monkeypatch, capsys):
    """Other questions under the same ids, a task of one question, another seed; A and B of pairs alone."""
    rows = [{"question": f"{i}?", "answer": i} for i in range(4)]
    files = [write(tmp_path / "a.jsonl", rows[:3]),
             write(tmp_path / "b.jsonl", [*rows[:2], {"question": "other?", "answer": 7}, rows[3]])]
    for name, file, number in (("a", files[0], 1), ("b", files[1], 7)):
        with Misbehaving(lambda body, attempt: completion(f"\\boxed{{{number}}}")) as server:
            code, err = run_cli(monkeypatch, capsys, "--server", server.url, "--out", tmp_path / name,
                                "--tasks", f"x={file},own={sets / 'own.jsonl'}", "--samples", 1,
                                "--seed", number)
            assert code == 0, err
    table = evaluation.compare_runs([str(tmp_path / "a"), str(tmp_path / "b")])
    assert "| x | 2 | 50.0 | 0.0 | -50.0 |" in table and "seed differs: 1 and 7" in table
    assert "x: 1 questions of A and 2 of B have no partner" in table and "own is left out: 1 " in table


def test_a_second_task_joins_the_first(sets, tmp_path, monkeypatch, capsys):
    with Misbehaving(lambda body, attempt: completion("The answer is 2")) as server:
        for task in ("aime24", "gpqa"):
            run_cli(monkeypatch, capsys, "--server", server.url, "--out", tmp_path / "out", "--data", sets,
                    "--tasks", task, "--samples", 1)
    assert list(results(tmp_path / "out")) == ["aime24", "gpqa"]
    assert "| aime24 | gpqa |" in (tmp_path / "out" / "results.md").read_text()
    metrics = results(tmp_path / "out")["aime24"]["metrics"]
    assert metrics["no box"][0] == 1 and metrics["no answer"][0] == 0 and metrics["accuracy"][0] > 0


def test_a_dead_server_says_why(sets, tmp_path, monkeypatch, capsys):
    with Misbehaving(lambda body, attempt: (400, {}, b"model is asleep")) as server:
        code, err = run_cli(monkeypatch, capsys, "--server", server.url, "--out", tmp_path / "out", "--data",
                            sets, "--tasks", "aime24", "--samples", 1)
    assert code == 1 and "not one answer arrived (HTTP 400: model is asleep" in err


BAD = {
    "unknown task": (["--tasks", "aime99"], "'aime99' is unknown"),
    "no file": (["--tasks", "math500"], "math500.jsonl: cannot be read"),
    "a task twice": (["--tasks", "aime24,aime24"], "each once"),
    "a path as a name": (["--tasks", "../x=own.jsonl"], "is no name"),
    "a result's name": (["--tasks", "results.json=own.jsonl"], "is no name"),
    "no name": (["--tasks", "=own.jsonl"], "is no name"),
    "no task": (["--tasks", ","], "one task or more"),
    "no gold": ({"question": "q"}, "a gold answer expected"),
    "no question": ({"answer": "4"}, "question, problem or prompt expected"),
    "duplicate ids": ({"id": 1, "question": "q", "answer": "4"}, "1 ids occur more than once"),
    "id is a list": ({"id": [1], "question": "q", "answer": "4"}, '"id"'),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tasks_are_refused_before_anything_is_asked(case, sets, tmp_path, monkeypatch, capsys):
    how, expected = BAD[case]
    if isinstance(how, dict):
        how = ["--tasks", f"mine={write(tmp_path / 'mine.jsonl', [how, how])}"]
    with Misbehaving(lambda *_: completion("")) as server:
        code, err = run_cli(monkeypatch, capsys, "--server", server.url, "--out", tmp_path / "out", *how,
                            "--data", sets)
        assert code == 1 and expected in err and "Traceback" not in err, err
        assert not server.requests and not (tmp_path / "out").exists()


def test_another_models_folder_is_refused(alone, talker, sets, tmp_path, monkeypatch, capsys):
    out, other = tmp_path / "out", tmp_path / "other"
    shutil.copytree(alone, out)
    tiny.write_checkpoint(other, seed=1)
    code, err = run_cli(monkeypatch, capsys, "--model", other, "--out", out, *greedy(sets))
    assert code == 1 and "other settings" in err
    code, err = run_cli(monkeypatch, capsys, "--model", talker, "--out", out, *greedy(sets),
                        "--temperature", 1)
    assert code == 1 and "other settings" in err
    code, err = run_cli(monkeypatch, capsys, "--model", talker, "--out", out, *greedy(sets), "--dtype",
                        "bfloat16")
    assert code == 1 and "other settings" in err
    code, err = run_cli(monkeypatch, capsys, "--model", talker, "--out", out, *greedy(sets), "--limit", -1)
    assert code == 2 and "--limit is -1" in err
    assert results(out) == results(alone)


@pytest.mark.parametrize("broken", ['{"own": 5}', '{"own"', "[]", None])
def test_broken_results_of_an_earlier_call_are_named(alone, talker, sets, tmp_path, monkeypatch, capsys,
                                                     broken):
    out = tmp_path / "out"
    shutil.copytree(alone, out)
    (out / "results.json").unlink()
    if broken is None:
        (out / "results.json").mkdir()
    else:
        (out / "results.json").write_text(broken)
    code, err = run_cli(monkeypatch, capsys, "--model", talker, "--out", out, *greedy(sets))
    assert code == 1 and "results.json" in err and "Traceback" not in err, err


# --- retention ------------------------------------------------------------------------------------


def test_retention_equals_a_direct_computation(talker, tmp_path, monkeypatch, capsys):
    from transformers import AutoModelForCausalLM

    other = tiny.write_checkpoint(tmp_path / "other", seed=1)
    texts = write(tmp_path / "texts.jsonl", [
        {"text": "The quick brown fox"}, {"text": "a" * 40},
        {"prompt": "1 + 1?", "chosen": "It is 2.", "rejected": "It is 3."}, {"text": "x"}])
    monkeypatch.setattr(evaluation, "ROWS_AT_ONCE", 7)
    monkeypatch.setattr(sys, "argv", ["eval.py", "retention", "--model", other, "--base", str(talker),
                                      "--texts", str(texts), "--dtype", "float32"])
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert evaluation.main() == 0
    found = json.loads(capsys.readouterr().out)
    chat = data.load_chat(str(talker), 265)
    sequences, said = evaluation.read_sequences(str(texts), chat, 4096)
    assert said.endswith("3 texts, 0 of them cut at 4096 tokens; 1 dropped: nothing to score")
    assert "texts.jsonl: 2 texts, 2 of them cut at 10" in evaluation.read_sequences(str(texts), chat, 10)[1]
    prompt = chat.prompt([{"role": "user", "content": "1 + 1?"}])
    assert [first for _, first in sequences] == [1, 1, len(prompt)]
    models = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float64) for f in (other, str(talker))]
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
    spread = math.sqrt(sum((kl - mean * tokens) ** 2 for tokens, kl in per_text) * n / (n - 1)) / count
    assert found["kl"][1] == pytest.approx(spread, rel=1e-4)


def test_retention_in_bf16_rounds_no_logits(talker):
    """The same bf16 hidden states through an fp64 head: the KL of what the models say, not of rounding."""
    models = [evaluation.open_local_model(str(talker), torch.bfloat16, "cpu").model for _ in range(2)]
    with torch.no_grad():
        models[0].head_weight().mul_(1.01)  # a small step, as in training
    ids = list(range(60))
    ranks = qwen.open_ranks(60)
    found = evaluation.retention(*models, [(ids, 1)], ranks)
    qwen.close_ranks()
    with torch.no_grad():
        p, q = ((m.norm(m.hidden_states(torch.tensor(ids), torch.arange(60), [(0, 60, 60, 60)]))[:-1].double()
                 @ m.head_weight().double().T).log_softmax(-1) for m in models)
    expected = torch.nn.functional.kl_div(p, q, log_target=True, reduction="sum") / 59
    assert found["kl"][0] == pytest.approx(float(expected), rel=1e-3)


def test_retention_refuses_another_tokenizer(talker, tmp_path, monkeypatch, capsys):
    other = tiny.write_checkpoint(tmp_path / "other")
    text = (tmp_path / "other" / "tokenizer.json").read_text()
    (tmp_path / "other" / "tokenizer.json").write_text(text.replace('"<think>"', '"<thinking>"').replace(
        '"</think>"', '"<think>"').replace('"<thinking>"', '"</think>"'))
    texts = write(tmp_path / "texts.jsonl", [{"text": "The quick brown fox"}])
    code, err = run_cli(monkeypatch, capsys, "retention", "--model", other, "--base", talker, "--texts",
                        texts, "--dtype", "float32")
    assert code == 1 and "different tokenizers" in err


def test_retention_of_a_model_from_itself_is_zero(talker):
    own = evaluation.open_local_model(str(talker), torch.float32, "cpu")
    ranks = qwen.open_ranks(60)
    found = evaluation.retention(own.model, own.model, [(list(range(50)), 1)], ranks)
    qwen.close_ranks()
    assert found["kl"][0] == 0.0 and found["logp"] == found["logp_base"] and found["tokens"] == 49


def test_other_vocabularies_have_no_kl(talker, tmp_path):
    models = [qwen.load_model(str(talker)), qwen.load_model(tiny.write_checkpoint(tmp_path / "o", vocab=300))]
    with pytest.raises(UserError, match="vocabularies of 265 and 300"):
        evaluation.retention(*models, [([1, 2], 1)], None)

"""What a trained model meets: a second round of the whole method starts from it, and transformers'
pipeline samples from it. All by the command lines of the README, in the toy world."""

import pytest
import torch

import data
import eval as evaluation
import launch
import model as qwen
import train

ORACLE = """import train
def mend(item):
    return train.toy_oracle(item.question, item.answer)
"""
pytestmark = pytest.mark.slow  # half a minute, most of it for the base model
SHORT = ("--dtype", "float32", "--seed", 1)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base model that errs in sums of three digits."""
    root = tmp_path_factory.mktemp("programs")
    train.write_toy_checkpoint(str(root / "birth"), seed=0)
    data.write_rows(str(root / "corpus.jsonl"), train.toy_corpus(5000, 3, 0.2, 0.8, 0))
    run_train(root / "base", root / "birth", root / "corpus.jsonl", "--loss", "sft", "--lr", 3e-3,
              "--epochs", 2)
    questions = train.toy_questions("Add", 0, 200, 3)
    data.write_rows(str(root / "questions.jsonl"), [
        {"question": question, "answer": evaluation.extract_answer(train.toy_answer(question))}
        for question in questions])
    (root / "mend.py").write_text(ORACLE)
    return root


def run_train(out, model, pairs, *options):
    launch.run(["train.py", "--model", model, "--pairs", pairs, "--out", out, "--checkpointing",
                "none", "--save_dtype", "float32", "--save_every", 0, *options, *SHORT])


def run_round(root, name, model):
    """errors -> corrections -> training; returns the counts of `elicit`."""
    launch.run(["oracle.py", "elicit", "--questions", root / "questions.jsonl", "--model", model,
                "--instruction", "{question}", "--max_tokens", 40, "--out", root / f"{name}-errors",
                *SHORT])
    launch.run(["oracle.py", "rectify", "--errors", root / f"{name}-errors/errors.jsonl",
                "--tokenizer", model, "--function", f"{root}/mend.py:mend", "--out",
                root / f"{name}-pairs"])
    run_train(root / name, model, root / f"{name}-pairs/pairs.jsonl", "--lr", 3e-4, "--beta", 10,
              "--epochs", 4, "--batch_size", 8)
    return data.read_json(str(root / f"{name}-errors/summary.json"))


@pytest.fixture(scope="module")
def first(base):
    return run_round(base, "first", base / "base/model")


def test_a_second_round_starts_from_the_first_ones_model(base, first):
    second = run_round(base, "second", base / "first/model")
    assert second["right"] > first["right"] + 10
    rows = [data.read_log(str(base / f"{name}-pairs/pairs.jsonl")) for name in ("first", "second")]
    assert len(rows[1]) < len(rows[0]) and all(row["is_correct"] for row in rows[1])
    log = data.read_log(str(base / "second/metrics.jsonl"))
    # The reference of the second round is the first one's model: rewards start at 0 again.
    assert log[0]["reward_chosen"] == log[0]["reward_rejected"] == 0


def test_transformers_pipeline_writes_the_same_texts(base, first):
    from transformers import pipeline

    questions = train.toy_questions("Add", "pipeline", 20, 3)
    folder = base / "first/model"
    hf = pipeline("text-generation", model=str(folder), dtype=torch.float32, device="cpu")
    turns = [[{"role": "user", "content": text}] for text in questions]
    texts = [out[0]["generated_text"][-1]["content"] for out in
             hf(turns, max_new_tokens=40, do_sample=False)]
    policy = evaluation.open_local_model(str(folder), torch.float32, torch.device("cpu"))
    prompts = [policy.chat.prompt(turn) for turn in turns]
    done = qwen.generate(policy.model, prompts, [0] * 20, max_tokens=40, temperature=0,
                         end=[policy.chat.im_end])
    assert texts == [policy.chat.tokenizer.decode(ids) for ids, _ in done]

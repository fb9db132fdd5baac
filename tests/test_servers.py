"""Servers as they really are: each refuses, with its own status and words, what it does not know.

The words are those of public reports; the default commands must pass on all of them.
"""

import json

import pytest
import tiny
from launch import program
from misbehaving import Misbehaving, completion

import data
import eval as evaluation
import oracle
from data import UserError, read_json

KNOWN = {"model", "messages", "temperature", "top_p", "max_tokens"}
OPENAI = {*KNOWN, "max_completion_tokens", "seed"}


def gemini(body):
    texts = [f'Invalid JSON payload received. Unknown name "{key}": Cannot find field.'
             for key in body if key not in KNOWN]
    return texts and (400, [{"error": {"code": 400, "message": "\n".join(texts),
                                       "status": "INVALID_ARGUMENT"}}])


def openai_error(message, param, code):
    return 400, {"error": {"message": message, "type": "invalid_request_error", "param": param,
                           "code": code}}


def openai(body):
    """A newer model: one complaint at a time."""
    for key in body:
        if key not in OPENAI:
            return openai_error(f"Unknown parameter: '{key}'.", key, "unknown_parameter")
    if "max_tokens" in body:
        return openai_error("Unsupported parameter: 'max_tokens' is not supported with this model. "
                            "Use 'max_completion_tokens' instead.", "max_tokens",
                            "unsupported_parameter")
    for key in ("temperature", "top_p"):
        if body.get(key, 1) != 1:
            return openai_error(f"Unsupported value: '{key}' does not support {body[key]} with "
                                "this model. Only the default (1) value is supported.", key,
                                "unsupported_value")


def anthropic(body):
    if {"temperature", "top_p"} <= body.keys():
        return 400, {"error": {"code": "invalid_request_error", "type": "invalid_request_error",
                               "param": None, "message": "`temperature` and `top_p` cannot both be "
                               "specified for this model. Please use only one."}}


def transformers(body):
    unknown = body.keys() - KNOWN - {"seed", "chat_template_kwargs"}
    return unknown and (422, {"detail": f"Unexpected fields in the request: {unknown}"})


def mistral(body):
    forbidden = [{"type": "extra_forbidden", "loc": ["body", key], "input": value,
                  "msg": "Extra inputs are not permitted"}
                 for key, value in body.items() if key not in KNOWN]
    return forbidden and (422, {"object": "error", "message": {"detail": forbidden}, "code": None})


def vllm(body):
    return None


def vllm_short(body):
    """Started with --max-model-len 4096."""
    if "max_tokens" in body and body["max_tokens"] > 4000:
        text = (f"'max_tokens' or 'max_completion_tokens' is too large: {body['max_tokens']}. This "
                "model's maximum context length is 4096 tokens and your request has 96 tokens "
                f"({body['max_tokens']} > 4096 - 96).")
        return 400, {"error": {"message": text, "type": "BadRequestError", "param": "max_tokens",
                               "code": 400}}


EXTRAS = {"seed": None, "top_k": None, "chat_template_kwargs": None}
DROPPED = {  # what sampling goes on without
    gemini: EXTRAS, mistral: EXTRAS, vllm: {}, vllm_short: {"max_tokens": None},
    openai: {"top_k": None, "chat_template_kwargs": None, "max_tokens": "max_completion_tokens",
             "temperature": None, "top_p": None},
    anthropic: {"top_p": None}, transformers: {"top_k": None},
}


def strict(refuse):
    """A server that refuses what `refuse` does, else solves `i + i?` or mends a wrong answer."""
    def behave(body, attempt):
        refused = refuse(body)
        if refused:
            return refused[0], {}, json.dumps(refused[1]).encode()
        text = body["messages"][-1]["content"]
        if oracle.START in text:
            i = int(text.split("add ")[1].split()[0])
            return completion(f"{oracle.START}We add {i} twice: $\\boxed{{{2 * i}}}${oracle.END}")
        i = int(text.split("\n")[-1].split()[0])
        return completion(f"We add {i} twice: $\\boxed{{{2 * i + i % 2}}}$")
    return Misbehaving(behave)


@pytest.fixture(autouse=True)
def in_a_folder_of_questions(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluation.time, "sleep", lambda _: None)
    monkeypatch.chdir(tmp_path)
    data.write_rows("q.jsonl", [{"id": i, "question": f"{i} + {i}?", "answer": str(2 * i)}
                                for i in range(6)])


def elicit(server, *more):
    return program(oracle, "elicit", "--questions", "q.jsonl", "--out", "errors", "--server",
                   server.url, *more)


def rectify(server, errors, out, *more):
    tiny.write_checkpoint("policy")
    return program(oracle, "rectify", "--errors", errors, "--out", out, "--tokenizer", "policy",
                   "--server", server.url, *more)


def score(server, *more):
    return program(evaluation, "--tasks", "sums=q.jsonl", "--out", "scores", "--server",
                   server.url, *more)


@pytest.mark.parametrize("refuse", DROPPED, ids=lambda refuse: refuse.__name__)
def test_default_commands_pass(refuse):
    with strict(refuse) as server:
        code, err = elicit(server)
        assert code == 0, err
        assert read_json("errors/settings.json").get("refused", {}) == DROPPED[refuse]
        summary = read_json("errors/summary.json")
        assert summary == {"answers wanted": 6, "not asked": 0, "right": 3, "wrong": 3}
        for key in DROPPED[refuse]:
            assert err.count(f"the server refuses {key}: sampling goes on with") == 1
        assert err.count("the server refuses") == len(DROPPED[refuse])

        server.requests.clear()
        code, err = rectify(server, "errors/errors.jsonl", "pairs")
        assert code == 0 and "refuses" not in err, err
        assert read_json("pairs/summary.json")["pairs"] == 3
        assert all(body.keys() == {"model", "messages"} for _, body in server.requests)

        code, err = score(server)
        assert code == 0, err
    result = read_json("scores/results.json")["sums"]
    assert result["metrics"]["accuracy"][0] == 0.5 and result["unanswered"] == 0
    assert set(result.get("refused", ())) == DROPPED[refuse].keys()
    assert read_json("scores/settings.json").get("refused", {}) == DROPPED[refuse]


def test_a_refused_key_is_dropped_once_and_stays_so_when_resumed():
    with strict(gemini) as server:
        elicit(server, "--workers", 1)
        assert len(server.requests) == 6 + 3  # one retry a key, then never again
        assert server.requests[0][1].keys() >= EXTRAS.keys()
        assert all(not body.keys() & EXTRAS.keys() for _, body in server.requests[3:])
        code, err = elicit(server, "--workers", 1, "--samples", 2)
        assert code == 0 and "refuses" not in err and len(server.requests) == 6 + 3 + 6
        assert all(not body.keys() & EXTRAS.keys() for _, body in server.requests[3:])


@pytest.mark.parametrize("refuse, given", [
    (gemini, ("--top_k", 20)), (gemini, ("--body", '{"presence_penalty": 1}')),
    (mistral, ("--seed", 0)), (openai, ("--temperature", 0.7)), (transformers, ("--top_k", 0)),
    (anthropic, ("--temperature", 0.7, "--top_p", 0.8))])
@pytest.mark.parametrize("command", ["elicit", "rectify"])
def test_what_the_user_gave_is_never_dropped(refuse, given, command):
    key = json.loads(given[1]).popitem()[0] if given[0] == "--body" else given[0][2:]
    with strict(refuse) as server:
        if command == "elicit":
            code, err = elicit(server, *given, "--workers", 1)
        else:
            data.write_rows("e.jsonl", [{"question": "1+1?", "ground_truth": "2",
                                         "original_answer": "We add 1 twice: 3"}])
            code, err = rectify(server, "e.jsonl", "errors", *given, "--workers", 1)
        bodies = [body for _, body in server.requests]  # perhaps the next one is asked already
        assert code == 1 and f"refuses {key}" in err and "HTTP 4" in err and len(bodies) < 10
        assert all(key in body for body in bodies)
        assert any(key in str(refuse(body)[1]) for body in bodies)


def test_a_given_limit_is_sent_under_its_new_name():
    with strict(openai) as server:
        code, err = elicit(server, "--max_tokens", 100)
        assert code == 0, err
        assert server.requests[-1][1]["max_completion_tokens"] == 100
    with strict(vllm_short) as server:  # its limit depends on the prompt: no end of the whole run
        code, err = elicit(server, "--max_tokens", 5000, "--out", "other")
        assert code == 1 and "all 6 requests failed" in err and "is too large: 5000" in err
        assert all(body["max_tokens"] == 5000 for _, body in server.requests)


@pytest.mark.parametrize("body", [
    {"max_completion_tokens": 10**6}, {"max_tokens": None, "max_completion_tokens": 10**6}])
def test_a_refused_limit_in_body_fails_its_requests_and_no_more(body):
    def refuse(sent):
        text = f"max_completion_tokens is too large: {sent['max_completion_tokens']}"
        return openai_error(text, "max_completion_tokens", "invalid_value")
    with strict(refuse) as server:
        code, err = elicit(server, "--body", json.dumps(body))
    assert code == 1 and "all 6 requests failed" in err and "is too large: 1000000" in err
    assert len(server.requests) == 6
    with strict(openai) as server:  # which wants another name for what the user gave
        code, err = elicit(server, "--body", '{"max_tokens": 9, "temperature": null, '
                           '"top_p": null, "seed": null}', "--out", "other")
    assert code == 1 and "all 6 requests failed" in err and "'max_tokens' is not supported" in err


def test_a_server_that_repeats_itself_ends_no_request_in_a_loop():
    def refuse(sent):
        return openai_error("Use 'max_completion_tokens' instead.", "max_tokens", "unsupported")
    with strict(refuse) as server:
        code, err = elicit(server, "--workers", 1)
    assert code == 1 and "all 6 requests failed" in err and len(server.requests) == 2 * 6


def test_a_refused_key_that_is_given_later_is_sent():
    with strict(transformers) as server:
        assert elicit(server)[0] == 0 and "top_k" not in server.requests[-1][1]
        code, err = elicit(server, "--top_k", 20, "--samples", 2)
    assert code == 1 and "refuses top_k" in err and server.requests[-1][1]["top_k"] == 20


def test_one_forbidden_question_ends_no_run():
    def refuse(body):
        if "3 + 3" in body["messages"][-1]["content"]:
            return 403, {"error": {"message": "your input was flagged", "code": 403}}
    with strict(refuse) as server:
        code, err = score(server)
    assert code == 0, err
    results = read_json("scores/results.json")
    assert "(5 unanswered)" in evaluation.results_table(results)
    assert results["sums"]["questions"] == 6


@pytest.mark.parametrize("listing", [
    [{"id": "m"}], {"models": []}, {"data": None}, {"data": []}, {"data": [{"name": "m"}]},
    {"data": [{"id": "m"}, {"id": "n"}]}])
def test_a_server_that_lists_not_one_model_needs_its_name(listing, monkeypatch):
    monkeypatch.setattr(evaluation, "fetch_json", lambda *_: listing)
    options = evaluation.SamplingOptions(server="http://localhost:1/v1")
    with pytest.raises(UserError, match="choose one with --server_model"):
        evaluation.open_policy(options, None)


def test_null_in_body_removes_any_key():
    keys = {"model", "messages", "temperature", "top_p", "top_k", "max_tokens", "seed",
            "chat_template_kwargs"}
    removed = keys - {"messages", "top_p"}
    with strict(vllm) as server:
        code, err = elicit(server, "--body", json.dumps(dict.fromkeys(removed)))
        assert code == 0, err
    assert all(body.keys() == {"messages", "top_p"} for _, body in server.requests)
    code, err = elicit(server, "--body", "[]")
    assert code == 1 and "--body is '[]': a JSON object expected" in err


def test_an_error_that_repeats_the_request_drops_nothing():
    """A row too long for the server, whose validator sends the whole body back."""
    def refuse(body):
        return 422, {"detail": [{"type": "value_error", "loc": ["body", "messages", 0],
                                 "input": body, "msg": "Value error, message too long"}]}
    with strict(refuse) as server:
        code, err = elicit(server)
    assert code == 1 and "all 6 requests failed" in err and "refuses" not in err
    assert len(server.requests) == 6 and "refused" not in read_json("errors/settings.json")


QUESTION = "What temperature has a gas\nwith \"top_p\" and seed 3?"


@pytest.mark.parametrize("error, refused", [
    ({"message": "property 'top_k' is unsupported, did you mean 'top_p'?"}, "top_k"),
    ({"message": "Unrecognized argument: top_k. Supported: temperature, top_p, seed"}, "top_k"),
    ({"message": "Unrecognized request arguments supplied: seed, top_k"}, "top_k"),
    ({"message": "unknown field `seed`, expected one of `model`, `max_tokens`, `top_p`"}, "seed"),
    ({"message": f"top_k is unknown. Bad input: {json.dumps(QUESTION)}"}, "top_k"),
    ({"message": "Invalid max_tokens value, the valid range is [1, 8192]"}, "max_tokens"),
    ({"code": "Invalid input", "message": json.dumps({"detail": [
        {"type": "extra_forbidden", "loc": ["body", "seed"], "input": 1}]})}, "seed"),
    ({"message": "too long: {'messages': ['?'], 'temperature': 0.7, 'seed': 1}"}, None)])
def test_one_refused_key_at_a_time_is_named(error, refused):
    body = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "seed": 1, "max_tokens": 9}
    answer = "HTTP 400: " + " ".join(json.dumps({"error": error}).split())
    server = evaluation.Server("http://localhost:1/v1", "m")
    assert evaluation.find_refused(server, body, answer) == ({refused: None} if refused else {})


def test_a_key_is_dropped_for_the_run_only_where_the_request_then_passes():
    """One question is refused for its content, by an error that quotes its words."""
    def refuse(body):
        if "3 + 3" in body["messages"][-1]["content"]:
            return 400, {"error": {"message": f"Not allowed by our policy: {QUESTION}"}}
    rows = data.read_log("q.jsonl")
    data.write_rows("q.jsonl", [{**row, "question": row["question"] + " What temperature?"}
                                for row in rows])
    with strict(refuse) as server:
        code, err = elicit(server, "--temperature", 0.7)  # given, and in the question
    assert code == 0 and "refuses" not in err, err
    assert "refused" not in read_json("errors/settings.json")
    assert read_json("errors/summary.json")["request failed"] == 1


read = evaluation.read_completion


def test_endings_of_an_answer():
    for ending in ("stop", "STOP", "eos", "end_turn", "stop_sequence", "", None):
        assert read(completion("Four", ending)) == {"text": "Four", "finish": "stop", "tokens": 4}
    for ending in ("length", "MAX_TOKENS"):
        assert read(completion("Four", ending))["finish"] == "length"
    for ending in ("content_filter", "tool_calls", "abort", 7):
        reason = f"the server ended the answer with {str(ending)!r}"
        assert read(completion("It is", ending)) == {"error": reason, "partial": "It is"}
        assert read(completion(None, ending)) == {"error": reason, "partial": ""}


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_alone_are_no_answer(key):
    for text in (None, "", "\n\n"):
        for ending in ("stop", "length"):
            found = read(completion(text, ending, **{key: "I think: 4."}))
            assert found["error"].startswith(f"no answer, only {key}. If these are thoughts")
            assert found["partial"] == "I think: 4." and "text" not in found
    assert read(completion("It is 4.", **{key: "Hm."}))["text"] == "It is 4."


def test_refusals_lists_and_parts():
    found = read(completion(None, refusal="I cannot help."))
    assert "only refusal" in found["error"] and found["partial"] == "I cannot help."
    assert read(completion("It is 4.", refusal=None))["text"] == "It is 4."
    for key in ("reasoning_details", "thinking_blocks", "tool_calls"):
        assert f"only {key}" in read(completion("", **{key: [{"type": "x"}]}))["error"]
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}
    texts = [{"type": "text", "text": "It is "}, {"type": "text", "text": "4."}]
    for parts in (texts, [thinking, *texts],
                  [texts[0], {"type": "reasoning", "text": "Hm."}, texts[1]]):
        assert read(completion(parts))["text"] == "It is 4."
    assert "no answer, only thinking" in read(completion([thinking]))["error"]
    assert read(completion(""))["text"] == ""  # saying nothing at all is an answer, and wrong
    for usage in (None, {}, {"completion_tokens": None}):
        assert read({**completion("It is 4."), "usage": usage})["tokens"] == 0


def test_show_prints_graded_conversations():
    with strict(vllm) as server:
        code, output = score(server, "--show", 2)
    assert code == 0, output
    first, second = output.split("--- sums ")[1:]
    assert "0 + 0?" in first and "We add 0 twice: $\\boxed{0}$" in first
    assert "'accuracy': True" in first
    assert "1 + 1?" in second and "We add 1 twice: $\\boxed{3}$" in second
    assert "'accuracy': False" in second and "2" in second.split("--- gold: ")[1].split("\n")[0]

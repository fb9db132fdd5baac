"""The tasks beside the sampler: gold answers, Connect4, GPQA; the statistics, by brute force."""

import itertools
import math
import random
from collections import Counter

import pytest
from connect4 import OTHER, connect4_row, connect4_rows, winning_moves
from tiny import SHARED, needs_data, write_rows

import eval as tasks
import oracle
from eval import choice_letter, clustered, gold_answer, grade_connect4, load_task, score_math
from data import UserError, read_log

# --- math: gold answers ---------------------------------------------------------------------------

GRADED = [  # row, responses that are right, responses that are wrong
    ({"answer": "025"}, [r"\boxed{25}", r"\boxed{025}"], [r"\boxed{250}"]),  # AIME
    ({"answer": 27.0}, [r"\boxed{27}"], [r"\boxed{27.1}", r"\boxed{2.70}", "27"]),  # AMC
    ({"solution": "Add 2 and 2. The answer is 4."}, [r"\boxed{4}"], [r"\boxed{2}"]),
    ({"solution": r"so \boxed{4.5e33} erg"}, [r"\boxed{4.5 \times 10^{33}}"], [r"\boxed{4.5}"]),
    # OlympiadBench
    ({"final_answer": ["$69$,$84$"], "solution": ["a proof"]},
     [r"\boxed{84, 69}", "\\boxed{5}\n\\boxed{\\{69,84\\}}", r"\boxed{69} or \boxed{84}"],
     [r"\boxed{69}", r"\boxed{69, 84, 85}", "\\boxed{69}\n\\boxed{84}", r"\boxed{69}, \boxed{84",
      r"\boxed{69}, \boxed{85}, \boxed{84}", r"<think>\boxed{69, 84}", "69, 84"]),
    ({"final_answer": ["$(1,2),(3,4)$"]}, [r"$\boxed{(3,4),(1,2)}$"], [r"\boxed{(2,1),(3,4)}"]),
    ({"final_answer": ["$69$", "$84$"]}, [r"\boxed{84,69}"], [r"\boxed{69}"]),
    ({"final_answer": ["3"]}, [r"\boxed{3}"], [r"\boxed{3, 5}", r"\boxed{3} or \boxed{5"])]


@pytest.mark.parametrize("row, right, wrong", GRADED)
def test_math_rows(row, right, wrong):
    gold = gold_answer(row)
    assert [text for text in right if not score_math(text, gold)["accuracy"]] == []
    assert [text for text in wrong if score_math(text, gold)["accuracy"]] == []


@pytest.mark.parametrize("row, expected", [
    ({"final_answer": []}, "'final_answer'"), ({"final_answer": None}, "a gold answer expected"),
    ({"answer": True}, "a string or a number"), ({"answer": "\\boxed{"}, "no final answer in it"),
    ({"solution": "A proof without an end."}, "no final answer in it")])
def test_bad_math_rows(row, expected):
    with pytest.raises(UserError, match=expected):
        gold_answer(row)


@needs_data
def test_every_shared_gold_is_read_and_right():
    counts = Counter()
    for name in ("aime24", "amc23", "math500", "minerva_math", "olympiadbench"):
        for row in read_log(f"{SHARED}/math/{name}.jsonl"):
            gold = gold_answer(row)
            counts[name] += 1
            answer = row["final_answer"][0].strip("$") if "final_answer" in row else gold
            for text, right in ((f"So the answer is: $\\boxed{{{answer}}}$.", True),
                                ("I do not know.", False), (r"\boxed{31.4159}", False)):
                assert score_math(text, gold)["accuracy"] == right, row
    assert counts == {"aime24": 30, "amc23": 40, "math500": 500, "minerva_math": 272,
                      "olympiadbench": 675}


# --- Connect4 -------------------------------------------------------------------------------------

# All lines of four cells, as sums of the cells' bits.
LINES = [sum(1 << 7 * (r + k * dr) + c + k * dc for k in range(4))
         for r in range(6) for c in range(7) for dr, dc in ((0, 1), (1, 0), (1, 1), (1, -1))
         if r + 3 * dr < 6 and 0 <= c + 3 * dc < 7]


def has_four(board, player):
    """The whole board, line by line."""
    discs = sum(1 << i for i, cell in enumerate(itertools.chain(*board)) if cell == player)
    return any([line & discs == line for line in LINES])


def brute_winning_moves(board, player):
    found = []
    for c in range(7):
        column = [board[r][c] for r in range(6)]
        if "_" in column:
            after = [row[:] for row in board]
            after[column.index("_")][c] = player
            if has_four(after, player):
                found.append([column.index("_"), c])
    return found


def random_board(rng):
    """Any number of discs on any column: dense boards with several wins too, but no four yet."""
    while True:
        heights, share = [rng.randint(0, 6) for _ in range(7)], rng.random()
        board = [["XO"[rng.random() < share] if r < heights[c] else "_" for c in range(7)]
                 for r in range(6)]
        if not has_four(board, "X") and not has_four(board, "O"):
            return board


def board_of(state):
    """The board of a state, from the order of its cells alone: the top row comes first."""
    discs = [cell[-1] for cell in state.split() if cell.startswith("(") and ":" in cell]
    return [discs[7 * r:7 * r + 7] for r in reversed(range(6))]


def test_solver_equals_brute_force():
    assert len(LINES) == 69
    rng, lengths = random.Random(0), Counter()
    boards = [random_board(rng) for _ in range(3000)]
    boards += [board_of(row["state"]) for row in connect4_rows(400, seed=1)]
    for board in boards:
        for player in "XO":
            expected = brute_winning_moves(board, player)
            assert winning_moves(board, player) == expected, board
            lengths[len(expected)] += 1
    assert min(lengths[k] for k in range(5)) > 20, lengths


@needs_data
def test_official_states_are_read_solved_and_rendered_exactly():
    path = f"{SHARED}/connect4/sample20.jsonl"
    rows, task = read_log(path), load_task(f"connect4={path}", "")
    assert len(rows) == len(task.rows) == 20
    for row, (_, _, answer) in zip(rows, task.rows):
        board, player = board_of(row["state"]), row["state"].split("You are player ")[1][0]
        assert connect4_row(board, player) == row
        assert brute_winning_moves(board, player) == answer[0] == row["answer"][0]
        assert brute_winning_moves(board, OTHER[player]) == answer[1] == row["answer"][1]


def test_generated_states_meet_the_filter(tmp_path):
    rows = connect4_rows(500, seed=0)
    assert len({row["state"] for row in rows}) == len(rows) == 500
    for count in (5, 50, 500):
        assert sum(row["answer"] == [[], []] for row in rows[:count]) <= count / 5
    assert 5 * sum(row["answer"] == [[], []] for row in rows) > 400  # the filter works
    for row in rows:
        board = board_of(row["state"])
        discs = Counter(itertools.chain(*board))
        player = "O" if discs["X"] > discs["O"] else "X"
        assert discs["X"] - discs["O"] in (0, 1) and discs["_"] > 0
        assert not has_four(board, "X") and not has_four(board, "O")
        assert row == connect4_row(board, player)
    task = load_task(f"connect4={write_rows(tmp_path / 'c.jsonl', rows)}", "")
    assert [answer for *_, answer in task.rows] == [row["answer"] for row in rows]
    for bad in ({"answer": [[], []]}, {**rows[1], "answer": [["(2,0)"], []]},
                {**rows[1], "answer": str(rows[1]["answer"])}):
        path = write_rows(tmp_path / "c.jsonl", [rows[0], bad, rows[2]])
        with pytest.raises(UserError, match="(?s)1 malformed.*line 2: '(answer|state)'"):
            load_task(f"connect4={path}", "")


def results(one, two):
    return (f"[Intermediate Thinking Results 1: {one}]\n[intermediate thinking results 2: {two}]\n"
            "Chosen Move: (0,1)")


@pytest.mark.parametrize("text, mine, opponent, missing", [
    (results("(3,4),(1, 2)", "none."), 1, 1, 0), (results("(1,2)", "None"), 0, 1, 0),
    (results("(1,2), (3,4), (3,4)", "None"), 0, 1, 0), (results("None", "None"), 0, 1, 0),
    (results("(1,2), (3,4)", "(1,2)"), 1, 0, 0), (results("(1,2), (3,4)", "(r,c)"), 1, 0, 0),
    (results("(1,2), (3,4), None", "None"), 0, 1, 0), ("None", 0, 0, 1),
    ("[Intermediate Thinking Results 1: (1,2), (3,4)]", 1, 0, 1),
    ("[Intermediate Thinking Results 2: None]", 0, 1, 1),
    (results("(1,2), (3,4)", "None") + results("None", "(1,1)"), 1, 1, 0),  # the first counts
    (f"<think>{results('None', '(0,0)')}</think>{results('(1,2), (3,4)', 'None')}", 1, 1, 0),
])
def test_connect4_grades(text, mine, opponent, missing):
    grade = grade_connect4(text, [[[1, 2], [3, 4]], []])
    assert grade == {"mine": mine, "opponent": opponent, "joint": mine * opponent,
                     "no answer": missing}


# --- GPQA -----------------------------------------------------------------------------------------

def test_gpqa_rows(tmp_path):
    wrong = {f"Incorrect Answer {k}": f"w {k}" for k in (1, 2, 3)}
    hub = [{"Question": f"Question {i}? {{question}}", "Correct Answer": f"right {i}\n", **wrong}
           for i in range(400)]
    places = Counter()
    task = load_task(f"gpqa={write_rows(tmp_path / 'hub.jsonl', hub)}", "")
    for i, (_, (message,), answer) in enumerate(task.rows):
        lines = message["content"].split("\n")
        shown = dict(line.split(") ") for line in lines[-4:])
        assert shown[answer] == f"right {i}" and sorted(shown) == list("ABCD")
        assert sorted(shown.values()) == sorted([f"right {i}", "w 1", "w 2", "w 3"])
        assert f"Question {i}? {{question}}" in lines and '"Answer": "C"' in lines[0]
        places[answer] += 1  # 100 each, standard deviation 8.7
    assert all(70 < places[letter] < 130 for letter in "ABCD"), places


@pytest.mark.parametrize("text, letter", [
    ('I first thought "Answer": "A".\n"Answer": "D"', "D"), ('{"answer": "B"}', "B"),
    ('"Answer": "C" though \\boxed{D}', "C"), ('"Answer": "(B)"', "B"), ('"Answer": C', "C"),
    ('"Answer": "$\\boxed{B}$"', "B"), ('"Answer": "C) 3 mol"', "C"), ("**Answer**: **(D)**", "D"),
    ("The correct answer is: B.", "B"), ("The answer is option **B**", "B"),
    ("The final answer is $\\boxed{\\text{(A)}}$.", "A"), ("The answer is\n\nC", "C"),
    ("“Answer”: “C”", "C"), ("'answer': 'C'", "C"), ("The answer would be \\text{C}.", "C"),
    ("\\boxed{\\text{Option B}}", "B"), ("The answer must be B", "B"),
    ("The answer is $\\mathbf{B}$", "B"), ("so\n**B.**\n", "B"), ("C", "C"),
    ("The answer is \\(C\\).", "C"),
    ('<think>"Answer": "C"</think>\n"Answer": "A"', "A"), ("", None),
    ("The answer is A good question", None), ("The answer is C-H", None), ("C\nis it", None),
    ("The answer is (c)", None), ('"Answer": "E"', None), ("A and B are wrong", None),
    ("\\boxed{B = 3}", None), ("\\boxed{A, B}", None), ('"Answer": "A, B"', None),
    ("vitamin\nD3", None), ("The answer is (A)(B)", None), ("Option C is not correct", None)])
def test_choice_letters(text, letter):
    assert choice_letter(text) == letter


@pytest.mark.parametrize("piece", [
    "\n", " ", "*", "answer is ", '"Answer": "', "\\boxed{ ", "(", "$", "\\boxed{1} ", "(1,"])
def test_endless_repetition(piece):
    """Models do get stuck; a quadratic pattern would hang here."""
    endless = piece * (200_000 // len(piece))
    for text in (endless, f"answer is {endless}."):
        assert choice_letter(text) is None
        assert grade_connect4("[Intermediate Thinking Results 1: " + text, [[], []])["joint"] == 0
        assert not score_math(text, "1, 2")["accuracy"]


# --- tasks ----------------------------------------------------------------------------------------

USER = {"role": "user", "content": "2 + {question}?"}
TURNS = [{"role": "system", "content": "Brief."}, USER, {"role": "assistant", "content": "4"}, USER]
WRAPPED = [{"role": "user", "content": tasks.INSTRUCTION.replace("{question}", "2 + {question}?")}]
QUESTIONS = [  # fields of a row, messages
    ({"question": "2 + {question}?", "answer": "4"}, WRAPPED),
    ({"problem": "2 + {question}?", "question": None, "answer": 4}, WRAPPED),
    ({"prompt": "2 + {question}?", "solution": "so $\\boxed{4}$"}, WRAPPED),
    ({"prompt": [USER], "label": "4"}, [USER]), ({"question": TURNS, "ground_truth": "4"}, TURNS),
    ({"data_source": "math_dapo", "prompt": [USER], "ability": "MATH", "extra_info": {"index": "x"},
      "reward_model": {"ground_truth": "4", "style": "rule"}}, [USER])]


def test_a_set_of_the_user_s_own(tmp_path):
    """Rows of every kind that `elicit` reads, in one file, read alike."""
    path = write_rows(tmp_path / "own.jsonl", [row for row, _ in QUESTIONS])
    task = load_task(f"own={path}", "")
    assert [messages for _, messages, _ in task.rows] == [messages for _, messages in QUESTIONS]
    assert {gold for *_, gold in task.rows} == {"4"}
    assert [name for name, *_ in task.rows] == list("123456") and task.samples == 5
    items, dropped = oracle.read_questions(path, tasks.INSTRUCTION)
    assert [item.messages for item in items] == [WRAPPED, [USER], TURNS]
    assert dropped == {"the same question again": 3}


# --- statistics -----------------------------------------------------------------------------------

def test_standard_error_equals_the_textbook_formula():
    """Cluster-robust error of the mean of all samples, by pairs of samples, and its n / (n - 1)."""
    rng = random.Random(0)
    scores = [[rng.random() < p for _ in range(4)] for p in (0.1, 0.2, 0.5, 0.9, 0.9, 1.0, 0.3)]
    flat = [(i, float(x)) for i, s in enumerate(scores) for x in s]
    mean = sum(x for _, x in flat) / len(flat)
    pairs = sum((x - mean) * (y - mean) for i, x in flat for j, y in flat if i == j)
    expected = math.sqrt(pairs / len(flat) ** 2 * 7 / 6)
    assert clustered(scores) == (pytest.approx(mean), pytest.approx(expected))
    singles = [[x] for x in (0, 1, 1, 0, 1.0)]  # one sample each: s / sqrt(n)
    assert clustered(singles) == (0.6, pytest.approx(math.sqrt(0.3 / 5)))
    assert clustered([[1, 1, 1, 1], [0]])[0] == 0.5  # every question counts once
    assert clustered([[1, 0]]) == (0.5, None)
    # with weights: the weighted mean, and the error of a ratio by its textbook formula
    weights = [3, 1, 4, 1, 5]
    mean, n = 10 / 14, len(weights)
    spread = sum((w * (x - mean)) ** 2 for w, (x,) in zip(weights, singles)) * n / (n - 1)
    error = math.sqrt(spread) / 14
    assert clustered(singles, weights) == (pytest.approx(mean), pytest.approx(error))

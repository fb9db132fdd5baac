"""500 positions of Connect4 in the official layout, as a benchmark file for eval.py.

    python tests/bench/connect4.py > data/eval/connect4.jsonl
"""

import json
import random

OTHER = {"X": "O", "O": "X"}


def connect4_row(board: list, player: str) -> dict:
    """A position in the official layout: its text, and [my, the opponent's] winning moves. `board`:
    6 rows of 7 cells, row 0 lowest, each "X", "O" or "_"; `player` is to move."""
    rows = ["".join(f"({r},{c}):{board[r][c]} " for c in range(7)) for r in reversed(range(6))]
    moves = [f"({r},{c})" for r, c in valid_moves(board)]
    state = ("\nCurrent Game Board: \n" + "\n".join(rows) + "\n\nCurrent valid moves for player "
             f"{player}: {moves}\nYou are player {player}, please choose the best move considering "
             "the current board state.\n")
    return {"state": state, "answer": [winning_moves(board, p) for p in (player, OTHER[player])]}


def valid_moves(board):
    """The lowest empty cell of each column that has one, by column."""
    return [(column.index("_"), c) for c, column in enumerate(zip(*board)) if "_" in column]


def wins(board, row, col, player):
    """Whether a disc of the player at this cell makes four or more in a row."""
    board = [cells[:] for cells in board]
    board[row][col] = player
    for dr, dc in ((0, 1), (1, 0), (1, 1), (1, -1)):
        line = [(row + k * dr, col + k * dc) for k in range(-3, 4)]
        if player * 4 in "".join(board[r][c] for r, c in line if 0 <= r < 6 and 0 <= c < 7):
            return True
    return False


def winning_moves(board: list, player: str) -> list[list[int]]:
    """The valid moves [row, col], by column, with which `player` would win, were it their turn."""
    return [[r, c] for r, c in valid_moves(board) if wins(board, r, c, player)]


def connect4_rows(count: int, seed: int) -> list[dict]:
    """`count` rows in the official layout: positions, any but the last, of games of two random
    players. All differ, and of any first n at most a fifth has no winning move, as in the paper."""
    rng, rows, empty = random.Random(seed), {}, 0  # rows by state
    while len(rows) < count:
        board, player, over, positions = [["_"] * 7 for _ in range(6)], "X", False, []
        while not over:
            positions.append(([row[:] for row in board], player))
            r, c = rng.choice(valid_moves(board))
            over = wins(board, r, c, player) or len(positions) == 42
            board[r][c], player = player, OTHER[player]
        row = connect4_row(*rng.choice(positions))
        is_empty = row["answer"] == [[], []]
        if row["state"] not in rows and not (is_empty and 5 * (empty + 1) > len(rows) + 1):
            empty += is_empty
            rows[row["state"]] = row
    return list(rows.values())


if __name__ == "__main__":
    for position in connect4_rows(500, seed=0):
        print(json.dumps(position))

"""Generated families of sequence tasks: classification, transduction, path finding (2012.09543 §4).

The three kinds are the paper's; these generators are ours, for the paper's were not to be had. A task is a combination
of primitives (its compositional descriptor), so that unseen tasks are unseen combinations of seen primitives.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

TASK, PAD, END, SEPARATOR = 0, 1, 2, 3
"""TASK: where the task's embedding stands. The others are ordinary tokens; PAD only follows a sequence's end."""
FIRST_SYMBOL = 4
IGNORED = -100


@dataclass(frozen=True)
class Examples:
    """Rows of one task; targets are IGNORED but for the answer."""

    tokens: NDArray[np.int64]
    """[examples, T]"""
    targets: NDArray[np.int64]
    """[examples, T]"""


class TaskFamily(ABC):
    """All tasks of one kind. Raises ValueError where `length`, the tokens of a row, leaves too little room."""

    name: ClassVar[str]
    vocabulary_size: int
    primitives: int
    """Primitives are numbered from 0; one that stands in another role is another primitive."""
    tasks: list[tuple[int, ...]]
    """Every task by its primitives, all of the same number."""

    def __init__(self, length: int) -> None:
        self.length = length

    @abstractmethod
    def draw(self, task: int, random: Generator) -> tuple[list[int], list[int]]:
        """One example: prompt, which begins with TASK, and answer."""

    def examples(self, task: int, count: int, random: Generator) -> Examples:
        tokens = np.full((count, self.length), PAD, dtype=np.int64)
        targets = np.full((count, self.length), IGNORED, dtype=np.int64)
        for row in range(count):
            prompt, answer = self.draw(task, random)
            whole = [*prompt, *answer]
            tokens[row, : len(whole) - 1] = whole[:-1]
            targets[row, len(prompt) - 1 : len(whole) - 1] = answer
        return Examples(tokens, targets)


class Classification(TaskFamily):
    """Does symbol a come before symbol b? Rows of different symbols that hold both; primitives: a first, b second.

    The embedding stands at the beginning, where every position of a causal model sees it, and again at the end, where
    the label is read: the paper's encoder reads it at the task's position.
    """

    name = "classification"
    NO, YES = FIRST_SYMBOL, FIRST_SYMBOL + 1

    def __init__(self, length: int, symbols: int = 8) -> None:
        super().__init__(length)
        self.symbols = symbols
        self.drawn = length - 2
        if not 2 <= self.drawn <= symbols:
            raise ValueError(f"classification takes rows of 4 to {symbols + 2} tokens, got {length}")
        self.vocabulary_size = FIRST_SYMBOL + 2 + symbols
        self.primitives = 2 * symbols
        self.tasks = [(a, symbols + b) for a, b in itertools.permutations(range(symbols), 2)]

    def draw(self, task: int, random: Generator) -> tuple[list[int], list[int]]:
        a, b = self.tasks[task][0], self.tasks[task][1] - self.symbols
        others = [symbol for symbol in range(self.symbols) if symbol not in (a, b)]
        row = [a, b, *random.permutation(others)[: self.drawn - 2].tolist()]
        row = [row[place] for place in random.permutation(self.drawn)]
        label = self.YES if row.index(a) < row.index(b) else self.NO
        return [TASK, *(self.YES + 1 + symbol for symbol in row), TASK], [label]


class Transduction(TaskFamily):
    """y = g(f(x)): f moves symbols about, g maps each to another (x + c modulo their number); primitives: f, g."""

    name = "transduction"
    MOVES = ("keep", "reverse", "rotate", "swap-halves", "swap-pairs", "evens-first", "rotate-back", "sort")

    def __init__(self, length: int, symbols: int = 8) -> None:
        super().__init__(length)
        self.symbols = symbols
        self.drawn = (length - 1) // 2
        if self.drawn < 4:
            raise ValueError(f"transduction takes rows of at least 9 tokens, got {length}")
        self.vocabulary_size = FIRST_SYMBOL + symbols
        self.primitives = len(self.MOVES) + symbols
        moves = range(len(self.MOVES))
        self.tasks = [(move, len(self.MOVES) + add) for move in moves for add in range(symbols)]

    def draw(self, task: int, random: Generator) -> tuple[list[int], list[int]]:
        move, add = self.tasks[task][0], self.tasks[task][1] - len(self.MOVES)
        x = random.integers(0, self.symbols, self.drawn).tolist()
        y = [(symbol + add) % self.symbols for symbol in moved(self.MOVES[move], x)]
        return [TASK, *(FIRST_SYMBOL + s for s in x), SEPARATOR], [FIRST_SYMBOL + s for s in y]


def moved(move: str, x: list[int]) -> list[int]:
    half = len(x) // 2
    match move:
        case "reverse":
            return x[::-1]
        case "rotate":
            return x[1:] + x[:1]
        case "rotate-back":
            return x[-1:] + x[:-1]
        case "swap-halves":
            return x[half:] + x[:half]
        case "swap-pairs":
            return [x[i ^ 1] if i ^ 1 < len(x) else x[i] for i in range(len(x))]
        case "evens-first":
            return x[::2] + x[1::2]
        case "sort":
            return sorted(x)
    return list(x)


class PathFinding(TaskFamily):
    """Walk a square grid from the start that the prompt names to a goal that only the task knows, rows first; then END.
    Primitives: the goal's row, the goal's column."""

    name = "path-finding"
    UP, DOWN, LEFT, RIGHT = range(FIRST_SYMBOL, FIRST_SYMBOL + 4)

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.side = (length - 2) // 2
        if self.side < 3:
            raise ValueError(f"path-finding takes rows of at least 8 tokens, got {length}")
        self.vocabulary_size = self.RIGHT + 1 + self.side
        self.primitives = 2 * self.side
        self.tasks = [(row, self.side + column) for row in range(self.side) for column in range(self.side)]

    def draw(self, task: int, random: Generator) -> tuple[list[int], list[int]]:
        goal = self.tasks[task][0], self.tasks[task][1] - self.side
        row, column = random.integers(0, self.side, 2).tolist()
        down, right = goal[0] - row, goal[1] - column
        path = [self.DOWN if down > 0 else self.UP] * abs(down) + [self.RIGHT if right > 0 else self.LEFT] * abs(right)
        return [TASK, self.RIGHT + 1 + row, self.RIGHT + 1 + column, SEPARATOR], [*path, END]


FAMILIES: dict[str, type[TaskFamily]] = {kind.name: kind for kind in (Classification, Transduction, PathFinding)}

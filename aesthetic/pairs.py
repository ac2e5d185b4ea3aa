"""Files of comparisons: which of two images won -> winners and losers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from aesthetic.heads import HeadError
from aesthetic.rating_files import CHOICE_NAMES, IMAGE_NAMES, N_NAMES, POSITIVE, SIDE_NAMES, TIES, RatingFile, Texts

Ints = npt.NDArray[np.int64]

_TIE = 2


def find_sides(file: RatingFile) -> tuple[str, str] | None:
    """The two columns of images of a file of comparisons."""
    if any(file.find([name]) for name in IMAGE_NAMES if name not in ("name", "id")):
        return None
    for one, other in (("winner", "loser"), *SIDE_NAMES):
        a, b = file.find([one]), file.find([other])
        if a and b:
            return a, b
    return None


def from_pairs(file: RatingFile, sides: tuple[str, str], choice: str | None) -> tuple[Ints, dict[str, Any], set[str]]:
    """For each comparison the row of the file that it stands in, columns of the rating table, and those used of the
    file. A tie is two comparisons, one each way.
    """
    a, b = (file.text(side) for side in sides)
    data: dict[str, Any] = {}
    used = set(sides)
    if sides[0].lower() == "winner":
        won = np.zeros(len(a), np.int64)
        if choice is not None:
            raise HeadError(f"{file.path}: winner and loser say which image won; no score ({choice}) goes with them")
    else:
        choice = file.choose("choice", choice, CHOICE_NAMES)
        used.add(choice)
        won = _won(file, choice, sides, a, b)
    if (a == b).any():
        row = int((a == b).argmax())
        raise file.error(row, f"{a[row]!r} is compared with itself")
    rows = np.repeat(np.arange(len(won)), np.where(won == _TIE, 2, 1))
    second_of_tie = np.diff(rows, prepend=-1) == 0
    b_won = (won[rows] == 1) | second_of_tie
    n_column = file.find(N_NAMES)
    if n_column or second_of_tie.any():
        n = file.numbers(n_column, "a number of votes", low=POSITIVE) if n_column else np.ones(len(won))
        data["n"] = (n * np.where(won == _TIE, 0.5, 1))[rows]
        used |= {n_column} if n_column else set()
    data |= {"winner": np.where(b_won, b[rows], a[rows]), "loser": np.where(b_won, a[rows], b[rows])}
    return rows, data, used


def _won(file: RatingFile, choice: str, sides: tuple[str, str], a: Texts, b: Texts) -> Ints:
    """Which side a choice names, 0 or 1 or _TIE: by a word for the side, or by the winning image's own id."""
    short = [side.lower().rpartition("_")[2] for side in sides]
    side_of = {short[0]: 0, sides[0].lower(): 0, short[1]: 1, sides[1].lower(): 1} | dict.fromkeys(TIES, _TIE)
    chosen = file.text(choice)
    by_word = np.array([side_of.get(word, -1) for word in file.words(choice)], np.int64)
    by_id = np.select([chosen == a, chosen == b], [0, 1], -1)
    if (unclear := (by_word >= 0) & (by_id >= 0) & (by_word != by_id)).any():
        row = int(unclear.argmax())
        raise file.error(
            row, f"{choice} is {chosen[row]!r}: a side, or the image of that id? Write {sides[0]} or {sides[1]}"
        )
    won = np.where(by_word >= 0, by_word, by_id)
    if (won < 0).any():
        row = int((won < 0).argmax())
        raise file.error(
            row,
            f"{choice} is {chosen[row]!r}; it must be {short[0]}, {short[1]}, tie, or the id of one of the two images",
        )
    return won

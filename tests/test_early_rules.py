"""`select.early`: when a rule can be judged, and what is refused."""

from __future__ import annotations

import pytest

from aesthetic.errors import UserError
from curate.ledger.early import check_early, split_early, when_known
from curate.ledger.rules import check_rules
from curate.ledger.view import ledger_types

RULES = {
    "words": "len(string_split(trim(caption), ' ')) > 2 and source.WIDTH > 100",
    "large": "least(original_width, Original_Height) >= 512",
    "safe": "nsfw < 0.5",
    "on_topic": "top(similarity, 0.3)",
    "once": "best_of(dup, nsfw)",
    "stored": "width >= 256",
    "grouped": "dup is null",
    "old": "older > 3",
    "always": "true",
}


def test_a_rule_is_judged_when_its_latest_column_is_known() -> None:
    assert when_known("length(url) < 200 and source.punsafe < 0.1 and key > '0'") == "list"
    assert when_known("len(list_filter([1, 2], lambda x: x > 1)) = 1 and caption is not null") == "list"
    assert when_known("original_width <= 3 * original_height or caption = ''") == "header"
    assert when_known("original_width > 100 and similarity > 0.3") == "annotator"
    assert split_early(RULES, ("safe", "large", "words", "stored")) == {
        "list": {"words": RULES["words"]},
        "header": {"large": RULES["large"]},
        "annotator": {"safe": RULES["safe"], "stored": RULES["stored"]},
    }


@pytest.mark.parametrize(
    ("early", "words"),
    [
        ("larg", "there is no rule larg. Did you mean large?"),
        ("on_topic", r"on_topic \(top\(similarity, 0.3\)\) can't be judged early: top\(\) looks at all rows"),
        ("once", r"best_of\(\) looks at all rows"),
        ("grouped", "dup is made when all images are there"),
        ("old", "no entry of `columns` makes older"),
        ("always", "it names no column"),
    ],
)
def test_what_cannot_be_early_is_refused_by_name(early: str, words: str) -> None:
    columns = {**ledger_types(), "nsfw": "FLOAT", "dup": "BIGINT", "older": "FLOAT"}
    rules = check_rules(RULES, columns, {"WIDTH": "INTEGER"}, {})
    check_early(rules, ("words", "large", "safe", "stored"), {"nsfw", "dup"}, {"dup"})
    with pytest.raises(UserError, match=words):
        check_early(rules, ("words", early), {"nsfw", "dup"}, {"dup"})

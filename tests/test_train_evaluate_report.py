"""What an evaluation says in a sentence, and in which order it says the rest."""

import copy

import pytest

from train.evaluate.report import readme, summary, table


def share(value, low, high, **more):
    return {"value": value, "low": low, "high": high, **more}


def retrieval(space, value, low, high, real):
    chance = share(0.05, 0.01, 0.1)
    return {
        "space": space,
        "drawn": {"captions": 97, "recall_at_1": share(value / 2, 0, 1, shuffled=chance)}
        | {
            "recall_at_5": share(value, low, high, shuffled=chance),
            "similarity": share(0.2, 0.1, 0.3, shuffled=chance),
        },
        "real": {k: share(real, real, real, shuffled=chance) for k in ("recall_at_1", "recall_at_5", "similarity")},
    }


def times(value, spread=0.01):
    return share(value, value - spread, value + spread)


FACTS = {
    "about": ["model  m"],
    "made_with": {"torch": "2"},
    "left_out": {},
    "figures": {
        "held_out_loss": {
            "objective": "flow",
            "at_the_end_of_training": 0.27,
            "held_out": {**times(0.27), "by_time": {"62": times(1.0)}},
            "training": {**times(0.24), "by_time": {"62": times(0.9)}},
        },
        "retrieval": retrieval("bundled", 0.05, 0.02, 0.12, 0.05),
        "retrieval_in_domain": {
            **retrieval("in-domain", 0.27, 0.19, 0.36, 1.0),
            "fitted_to": 900,
            "fitted_on": "others",
        },
        "kid": {
            "features": "F",
            "drawn": {"mean": 1.87, "sd": 0.1},
            "real_against_real": {"mean": 0.0, "sd": 0.06, "subset": 48},
            "noise_against_real": {"mean": 6.77, "sd": 0.1},
        },
        "memorisation": {
            "median": 0.5,
            "median_real": 0.9,
            "copies": 0,
            "copies_real": 0,
            "pictures": 97,
            "pictures_real": 200,
            "close": share(0.0, 0.0, 0.04, expected=0.05),
            "border": 0.99,
            "training": 900,
        },
        "nsfw": {"detector": "d", "threshold": 0.2, "drawn": times(0.1), "real": times(0.1)},
    },
}

SHORT = (
    "In short: prompts steer it (R@5 0.27, chance 0.05, real images 1.00); its images are at a KID of 1.87 from "
    "real ones, where noise is at 6.77; they are no nearer to training images than real ones are; its loss is "
    "clearly lower on training images, which is how learning by heart begins."
)


def test_what_says_most_stands_first_and_a_sentence_says_what_it_means():
    assert summary(FACTS) == SHORT and SHORT in readme(FACTS)
    words = [line[:18].strip() for line in table(FACTS).splitlines()[3:]]
    first = [
        words.index(w) for w in ("R@1 of 97 captions", "KID, F, subsets of", "cosine to the near", "held-out loss (flo")
    ]
    assert first == sorted(first) and first[0] == 0
    assert words.index("held-out loss at t") > words.index("share with d >= 0.")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda f: f.pop("retrieval_in_domain"), "whether prompts steer it cannot be told with these captions;"),
        (
            lambda f: f["retrieval_in_domain"]["drawn"]["recall_at_5"].update(low=0.08),
            "nothing shows that prompts steer it",
        ),
        (lambda f: f["kid"]["drawn"].update(mean=0.1), "KID cannot tell its images from real ones"),
        (
            lambda f: f["memorisation"].update(copies=3),
            "some of them are nearly training images (look at nearest.png)",
        ),
        (lambda f: f["memorisation"]["close"].update(low=0.2), "some of them are nearly training images"),
    ],
)
def test_the_sentence_says_no_more_than_the_figures(change, told):
    facts = copy.deepcopy(FACTS)
    change(facts["figures"])
    assert told in summary(facts)
    for name in ("kid", "memorisation", "held_out_loss"):
        facts["figures"].pop(name)
    assert summary(facts).count(";") == 0

"""Answers of captioning models, read: a caption, or the reason why there is none."""

from __future__ import annotations

import random
import time
import zlib
from collections import Counter

import pytest

from curate.recaption.answers import OUTCOMES, is_copy, longest_run, loops, read_answer
from tests.small_answers import ALL, CHANGED, DESCRIBE, GOOD, LONG, REFUSED, Case


def read(case: Case) -> tuple[str, str | None]:
    answer = read_answer(case.text, case.finish, prompt=case.prompt, alt=case.alt, language=case.language)
    return answer.outcome, answer.caption


def test_every_answer_is_read_as_it_should_be() -> None:
    wrong = [(case, read(case)) for case in ALL if read(case) != (case.outcome, case.caption)]
    assert not wrong
    assert len(ALL) >= 250 and {case.outcome for case in ALL} == OUTCOMES.keys() - {"error"}
    assert 2 * sum(case.outcome == "ok" for case in ALL) > len(ALL), "good ones are the majority"


def test_a_good_caption_passes_unchanged_and_what_was_changed_is_named() -> None:
    for case in GOOD:
        assert read_answer(case.text, "stop", prompt=case.prompt, alt=case.alt, language=case.language).changes == ()
    named = Counter[str]()
    for case in CHANGED:
        answer = read_answer(case.text, case.finish, prompt=case.prompt, language=case.language)
        spaces_alone = " ".join((case.text or "").split()) == case.caption
        assert answer.changes or spaces_alone, case.text
        named.update(answer.changes)
        again = read_answer(answer.caption, "stop", prompt=case.prompt, language=case.language)
        assert (again.outcome, again.caption) == ("ok", answer.caption), "a caption is read as itself"
    assert named.keys() == {
        *("opening", "closing", "quotes", "markdown", "list", "first"),
        *("wrapper", "tokens", "echo", "thinking", "characters", "artefact"),
    }


def test_a_refusal_is_one_wherever_it_stands() -> None:
    for case in REFUSED:
        text = f"A man stands on a stage.\n\n{case.text}"
        assert read_answer(text, "stop", prompt=DESCRIBE).outcome == "refused" or "<think>" in text, text


def test_a_caption_that_quotes_the_alt_text_is_no_leak_of_the_prompt() -> None:
    alt = "the old mill at the river bend near the village of Oakham"
    prompt = f"Describe the image. Its alt text is: {alt}"
    text = f"A painting of {alt}, with children who play on the far bank under tall willows and a dog that swims."
    assert read_answer(text, "stop", prompt=prompt, alt=alt).outcome == "ok"
    assert read_answer(text, "stop", prompt=prompt).outcome == "leaked"
    assert read_answer(alt.capitalize(), "stop", prompt=prompt, alt=alt).outcome == "copied"


@pytest.mark.parametrize("words", [20, 60, 150, 300])
def test_prose_of_any_length_loops_not(words: int) -> None:
    sentences = dict.fromkeys([LONG, *(case.text or "" for case in GOOD[20:50])])
    text = " ".join(" ".join(sentences).split()[:words])
    assert not loops(text)
    assert len(text.encode()) / len(zlib.compress(text.encode())) < 2


def test_a_loop_is_found_wherever_it_begins_and_however_long_its_phrase_is() -> None:
    rng = random.Random(7)
    letters = "abcdefghijklmnopqrstuvwxyz"
    for size in range(1, 31):
        phrase = [" ".join(["".join(rng.choices(letters, k=5)) for _ in range(size)])]
        needed = {1: 6, 2: 4}.get(size, 3)
        assert loops(" ".join(["A cat sits beside", *phrase * needed, "and"]))
        assert not loops(" ".join(["A cat sits beside", *phrase * (needed - 1), "and"])) or size >= 12


def test_longest_common_run() -> None:
    rng = random.Random(3)
    for _ in range(200):
        one, other = rng.choices("abc", k=rng.randrange(9)), rng.choices("abc", k=rng.randrange(9))
        runs = [one[i:j] for i in range(len(one)) for j in range(i + 1, len(one) + 1)]
        shared = [r for r in runs if any(other[i : i + len(r)] == r for i in range(len(other)))]
        assert longest_run(one, other) == max(map(len, shared), default=0)
    assert not is_copy("a red car", "a red car"), "of three words it is chance"


def test_whatever_is_answered_is_read_in_time_and_without_an_exception() -> None:
    rng = random.Random(5)
    parts = ["<think>", "</think>", '"', "“", "'", "**", "_", "- ", "\n", "```", "| a | b |", "{", "[", "<|im_end|>"]
    parts += ["&amp;", "a", " ", "I'm sorry", "The image shows ", ".", "一", "\ufffd", "\x00", "\ud83d", "1. ", "#"]
    parts += ["here is a caption: "]
    for _ in range(300):
        text = "".join(rng.choices(parts, k=rng.randrange(60)))
        answer = read_answer(text, rng.choice(["stop", "length", None]), prompt=DESCRIBE, alt=text[:20])
        assert (answer.caption is not None) >= (answer.outcome in ("ok", "copied"))
        (answer.caption or "").encode()
    for part in [*parts, "ab ", "I can't ", "a cat and ", "'a ", "“a ", "caption ", "is a "]:
        began = time.process_time()
        read_answer(part * (40_000 // len(part)), "length", prompt=DESCRIBE, alt=part * 100)
        assert time.process_time() - began < 3, part

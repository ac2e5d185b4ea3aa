"""The figures of an evaluation as people read them: a sentence, a table for the terminal, and a page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from aesthetic.untrusted import markdown

Row = tuple[str, str, str, str]
"""A figure as people read it: what it is, its value, its interval, and what stands beside it."""


def _rows(facts: dict[str, Any]) -> Iterator[Row]:
    """Every figure, those first that say most of a model."""
    figures = facts["figures"]
    if found := figures.get("retrieval_in_domain"):
        yield from _retrieval_rows(found)
    yield from _retrieval_rows(figures["retrieval"])
    if score := figures.get("clip_score"):
        beside = f"real {_number(score['real'])}" if "real" in score else ""
        yield f"CLIPScore ({score['model']}), 0 to 2.5", *_value(score["drawn"]), beside
    if found := figures.get("kid"):
        floor, ceiling = found["real_against_real"], found["noise_against_real"]
        beside = f"real against real {_spread(floor)} · noise against real {_spread(ceiling)}"
        value, sd = _spread(found["drawn"]).split(" ", 1)
        yield f"KID, {found['features']}, subsets of {floor['subset']}", value, sd, beside
    if found := figures.get("frechet"):
        yield f"Frechet distance, {found['features']}", f"{found['value']:.3f}", "", "no FID: other features"
    if found := figures.get("memorisation"):
        of = f" of {found['of_training']:,}" if "of_training" in found else ""
        among = f"{found['training']:,}{of} training images"
        beside = f"real, not trained on {found['median_real']:.3f}"
        yield f"cosine to the nearest of {among}", f"{found['median']:.3f}", "median", beside
        if close := found["close"]:
            border = f"nearer (cosine above {found['border']:.3f}) than 95% of real ones"
            yield "share close to a training image", *_value(close), f"expected {close['expected']:.0%}: {border}"
        beside = f"real, not trained on {found['copies_real']} of {found['pictures_real']:,}"
        yield "near-duplicates of training images", f"{found['copies']} of {found['pictures']:,}", "", beside
    loss = figures.get("held_out_loss")
    if loss:
        other = loss.get("training")
        with_it = [f"training images {_number(other)}"] if other else []
        if (then := loss["at_the_end_of_training"]) is not None:
            with_it.append(f"at the end of training {then:.4f}")
        yield f"held-out loss ({loss['objective']})", *_value(loss["held_out"], 4), " · ".join(with_it)
    for name, found in figures.get("scores", {}).items():
        beside = f"real {_number(found['real'])} · difference {_number(found['difference'])}"
        yield f"{name}, {found['scale'][0]:g} to {found['scale'][1]:g}", *_value(found["drawn"]), beside
    nsfw = figures["nsfw"]
    beside = f"real {_number(nsfw['real'])}"
    yield f"share with {nsfw['detector']} >= {nsfw['threshold']:g}", *_value(nsfw["drawn"]), beside
    if loss:
        for t, found in loss["held_out"]["by_time"].items():
            beside = _number(loss["training"]["by_time"][t]) if loss.get("training") else ""
            yield f"held-out loss at time {t}", *_value(found, 4), beside


def summary(facts: dict[str, Any]) -> str:
    """What the figures mean, in a sentence: whether prompts steer the model, how near its images are to real ones,
    and whether it has learnt images by heart."""
    figures = facts["figures"]
    # whether generated images find their captions: in the space that tells real ones apart, in-domain if both do
    spaces = [found for name in ("retrieval_in_domain", "retrieval") if (found := figures.get(name))]
    found = next((f for f in spaces if not _cannot_tell(f)), None)
    if found is None:
        clauses = ["whether prompts steer it cannot be told with these captions"]
    else:
        key = "recall_at_5" if "recall_at_5" in found["drawn"] else "recall_at_1"
        ours = found["drawn"][key]
        verdict = "" if ours["low"] > ours["shuffled"]["high"] else "nothing shows that "
        beside = f"chance {ours['shuffled']['value']:.2f}"
        if "real" in found:
            beside += f", real images {found['real'][key]['value']:.2f}"
        clauses = [f"{verdict}prompts steer it (R@{key.rpartition('_')[2]} {ours['value']:.2f}, {beside})"]
    if kid := figures.get("kid"):
        floor, noise = kid["real_against_real"], kid["noise_against_real"]["mean"]
        if kid["drawn"]["mean"] <= floor["mean"] + 2 * floor["sd"]:
            clauses.append("KID cannot tell its images from real ones")
        else:
            clauses.append(
                f"its images are at a KID of {kid['drawn']['mean']:.2f} from real ones, where noise is at {noise:.2f}"
            )
    if found := figures.get("memorisation"):
        close = found["close"]
        if found["copies"] > found["copies_real"] or (close and close["low"] > close["expected"]):
            clauses.append("some of them are nearly training images (look at nearest.png)")
        elif close:
            clauses.append("they are no nearer to training images than real ones are")
    loss = figures.get("held_out_loss") or {}
    least, most = loss.get("held_out", {}).get("low"), loss.get("training", {}).get("high")
    if least is not None and most is not None and most < least:
        clauses.append("its loss is clearly lower on training images, which is how learning by heart begins")
    return f"In short: {'; '.join(clauses)}."


def _retrieval_rows(found: dict[str, Any]) -> Iterator[Row]:
    ours, real = found["drawn"], found.get("real")
    for key in (k for k in ours if k != "captions"):
        what = "similarity" if key == "similarity" else f"R@{key.rpartition('_')[2]} of {ours['captions']:,} captions"
        beside = f"shuffled {_number(ours[key]['shuffled'])}"
        beside += f" · real {_number(real[key])}" if real else ""
        yield f"{what}, {found['space']} space", *_value(ours[key]), beside


def _notes(facts: dict[str, Any]) -> Iterator[str]:
    """What has to be said of the figures."""
    figures = facts["figures"]
    if figures.get("kid", {}).get("circular"):
        yield (
            "KID is circular here: the images were chosen by scores in the space whose features it compares. A model "
            "that has learnt the chooser's preferences gets a better figure than it deserves."
        )
    for found in (figures["retrieval"], figures.get("retrieval_in_domain")):
        if found and _cannot_tell(found):
            yield (
                f"In the {found['space']} space real images find their captions no more often than by chance: it "
                f"can't tell these captions apart, and so tells nothing of generated images either."
            )
    if found := figures.get("retrieval_in_domain"):
        yield (
            f"in-domain: a linear map from images to captions, fitted to {found['fitted_to']:,} "
            f"{found['fitted_on']}; its figures compare with no other data's."
        )
    for what, why in facts["left_out"].items():
        yield f"left out: {what} ({why})"


def _cannot_tell(found: dict[str, Any]) -> bool:
    """Whether real images find their captions no more often than shuffled ones do."""
    real = found.get("real", {}).get("recall_at_1")
    return bool(real and real["value"] <= real["shuffled"]["high"])


def _value(found: dict[str, Any], digits: int = 3) -> tuple[str, str]:
    interval = "" if found["low"] is None else f"{found['low']:.{digits}f} to {found['high']:.{digits}f}"
    return f"{found['value']:.{digits}f}", interval


def _number(found: dict[str, Any]) -> str:
    value, interval = _value(found)
    return f"{value} [{interval.replace(' to ', ', ')}]" if interval else value


def _spread(found: dict[str, Any]) -> str:
    return f"{found['mean']:.4f} ± {found['sd']:.4f}"


def table(facts: dict[str, Any]) -> str:
    """What an `evaluation.json` says, for a terminal."""
    rows = [("", "VALUE", "95% INTERVAL", "BESIDE IT"), *_rows(facts)]
    widths = [max(len(row[i]) for row in rows) + 2 for i in range(3)]
    lines = ["".join(f"{text:{w}}" for text, w in zip(row, [*widths, 0], strict=True)).rstrip() for row in rows]
    return "\n".join([*facts["about"], "", *lines, "", *_notes(facts)])


def readme(facts: dict[str, Any]) -> str:
    """The same as a page of Markdown, which shows the sheets beside it."""
    about = "\n".join(f"- {markdown(' '.join(text.split()))}" for text in facts["about"])
    rows = [f"| {' | '.join(map(markdown, row))} |" for row in _rows(facts)]
    table = "\n".join(["| | value | 95% interval | beside it |", "|---|---|---|---|", *rows])
    notes = "\n".join(f"- {markdown(note)}" for note in _notes(facts))
    sheets = ["![generated and real images](sheet.png)"]
    if "memorisation" in facts["figures"]:
        sheets.append("![the nearest training images](nearest.png)")
    made = f"Made with {', '.join(f'{k} {v}' for k, v in facts['made_with'].items())}.\n"
    return "\n\n".join(["# Evaluation", summary(facts), about, table, notes, *sheets, made])

"""DATASHEET.md and TRAINING-CONTENT.md: what the ledger can answer of what is asked of a dataset; the rest is marked.

DATASHEET.md has the questions of Gebru et al., "Datasheets for Datasets" (2021), shortened. TRAINING-CONTENT.md has the
headings and fields of the European Commission's template of 24 July 2025 for the public summary of training content,
which Article 53(1)(d) of Regulation (EU) 2024/1689 asks of who provides general-purpose AI models. They are as in
summaries that providers have filled in by it and published, which agree with one another (Apertus, SmolLM3). It asks
for the domains whose content was scraped most, by size: the largest 10% of all; of small and medium providers 5% or
1,000, whichever is fewer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aesthetic.untrusted import markdown, markdown_code
from curate.ledger.select import Selection
from curate.publish.census import Census, largest_domains

# ruff: noqa: E501
OPEN = "*to be answered by the publisher*"

_SHOWN = 100  # domains that are named in the document; domains.csv has all


def _count(counted: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{markdown_code(value) if value else 'none given'} {n:,}" for value, n in counted)


def licence_lines(census: Census) -> list[str]:
    """What the list says of licences, as lines of Markdown."""
    if not census.licences:
        return ["The list has no column that speaks of licences, so nothing is known of any image's."]
    return [f"- {markdown_code(column)}: {_count(values)}" for column, values in census.licences.items()]


def _languages(census: Census) -> str:
    if not census.languages:
        return f"no column knows the languages of captions; {OPEN}"
    return "; ".join(f"by {markdown_code(c)}: {_count(values)}" for c, values in census.languages.items())


def _respected(respect: Sequence[str]) -> str:
    return ", ".join(map(markdown_code, respect)) if respect else "none"


def _period(census: Census) -> str:
    return f"{census.first_day} to {census.last_day}" if census.first_day else f"not recorded; {OPEN}"


def datasheet(name: str, selection: Selection, census: Census, facts: Mapping[str, Any], *, images: bool) -> str:
    """DATASHEET.md. facts: `columns`, `recipe` (of the data folder, as a dict), `license`; images: shards, not a list."""
    fetch = facts["recipe"].get("fetch", {})
    rows = sum(selection.funnel.values())
    missing = "".join(f" {n:,} rows {what}." for n, what in _left_alone(census))
    unsafe = [c for c, made in facts["columns"].items() if made.get("unsafe")]
    rules = [f"{markdown(r.name)}: {markdown_code(r.condition)}" for r in selection.rules]
    sections: dict[str, list[tuple[str, str]]] = {
        "Motivation": [
            ("For what purpose was the dataset created?", OPEN),
            ("Who created it, on behalf of whom?", OPEN),
            ("Who funded it?", OPEN),
        ],
        "Composition": [
            (
                "What do the instances represent?",
                f"{'images with captions' if images else 'URLs of images, with captions and scores'} from the web",
            ),
            ("How many instances are there?", f"{census.images:,}, {census.captions:,} of them with a caption"),
            (
                "Is it a sample of a larger set?",
                f"yes: {selection.kept:,} of {rows:,} rows of a list, by the rules below; whether the list represents anything: {OPEN}",
            ),
            (
                "What data does each instance consist of?",
                (
                    "the image as resized, its row as JSON and its caption"
                    if images
                    else "the URL, caption, size and digests of the image, and what was computed of it"
                )
                + "; see README.md",
            ),
            ("Is there a label or target?", f"scores: {', '.join(map(markdown_code, facts['columns'])) or 'none'}"),
            (
                "Is information missing?",
                f"rows whose image could not be had, or was rejected, are not in it: {sum(selection.not_fetched.values()):,} and {rows - selection.kept - sum(selection.not_fetched.values()):,} of {rows:,}",
            ),
            ("Are there recommended splits?", OPEN),
            (
                "Are there errors, noise or redundancies?",
                "captions are what the list had: nobody has checked them"
                + (
                    "; near-duplicates were looked for, see README.md"
                    if any(m.get("annotator") == "near-duplicates" for m in facts["columns"].values())
                    else "; near-duplicates were not looked for"
                ),
            ),
            (
                "Is it self-contained?",
                "the images are inside"
                if images
                else "no: it names images by URL, which may vanish or change; `sha256` says whether they did",
            ),
            (
                "Might it hold confidential or offensive data?",
                (
                    f"columns that tell of unsafe images: {', '.join(map(markdown_code, unsafe))}"
                    if unsafe
                    else "no column tells of unsafe images"
                )
                + f"; {OPEN}",
            ),
            (
                "Does it identify people?",
                f"images of the web show people; faces blurred: {'yes' if facts['recipe'].get('images', {}).get('blur_faces') else 'no'}; {OPEN}",
            ),
        ],
        "Collection": [
            ("How was the data acquired?", f"downloaded over HTTP from {len(census.domains):,} registered domains"),
            ("By what mechanism?", f"tastemaker, user agent {markdown_code(str(fetch.get('user_agent', 'unknown')))}"),
            ("Over what timeframe?", _period(census)),
            ("How was it chosen?", "; ".join(rules) or "all images that could be had"),
            (
                "Were owners and subjects notified, did they consent?",
                f"no notice was given by the software; opt-outs respected: {_respected(fetch.get('respect', ()))}.{missing} {OPEN}",
            ),
            ("Was there an ethical review?", OPEN),
        ],
        "Preprocessing": [
            (
                "Was it preprocessed, cleaned or labelled?",
                f"images: {', '.join(f'{k} {v}' for k, v in facts['recipe'].get('images', {}).items() if k in ('size', 'mode', 'format', 'quality'))}; README.md says what each column was made by",
            ),
            (
                "Is the raw data kept?",
                "yes"
                if facts["recipe"].get("images", {}).get("keep_original")
                else "no: `sha256` is of the original files",
            ),
            ("Is the software available?", "tastemaker; recipe.yaml says with which settings"),
        ],
        "Uses": [
            ("Has it been used already?", OPEN),
            ("What could it be used for?", f"text-to-image and image-to-text models; {OPEN}"),
            ("What should it not be used for?", f"to identify people; {OPEN}"),
        ],
        "Distribution": [
            (
                "Under which licence?",
                facts["license"] or f"of the collection: {OPEN}; the images' own terms stay what they are",
            ),
            (
                "Do third parties restrict it?",
                "licences as the list knows them: "
                + ("; ".join(f"{markdown_code(c)}: {_count(v)}" for c, v in census.licences.items()) or "not known"),
            ),
        ],
        "Maintenance": [
            ("Who maintains it, how can they be reached?", OPEN),
            (
                "Can owners have images removed?",
                f"`tastemaker remove` takes them out, and publishing again sends the new state; whom to ask: {OPEN}",
            ),
            ("Will older versions be kept?", OPEN),
        ],
    }
    lines = [
        f"# Datasheet of {markdown(name)}",
        "",
        "After Gebru et al., *Datasheets for Datasets* (2021). What the ledger of tastemaker knows is filled in.",
        "",
    ]
    for title, questions in sections.items():
        lines += [f"## {title}", ""]
        lines += [f"- **{question}** {answer}" for question, answer in questions] + [""]
    return "\n".join(lines)


def _left_alone(census: Census) -> list[tuple[int, str]]:
    counts = [
        (census.opted_out, "of the list were left alone because an opt-out was seen"),
        (census.denied, "because a deny-list names them"),
        (census.removed, "were removed afterwards"),
    ]
    return [(n, what) for n, what in counts if n]


def training_content(name: str, selection: Selection, census: Census, facts: Mapping[str, Any]) -> str:
    """TRAINING-CONTENT.md. facts as of `datasheet`."""
    fetch = facts["recipe"].get("fetch", {})
    size = (
        "less than 1 million"
        if census.images < 10**6
        else "1 million to 1 billion"
        if census.images <= 10**9
        else "more than 1 billion"
    )
    large, small = largest_domains(census, 0.1), largest_domains(census, 0.05, 1000)
    unsafe = [
        f"{markdown_code(c)} ({markdown(str(made.get('meaning') or ''))})"
        for c, made in facts["columns"].items()
        if made.get("unsafe") or made.get("hidden")
    ]
    total = max(census.bytes, 1)
    rows = sum(selection.funnel.values())
    lines = [
        f"# Public summary of training content: what {markdown(name)} adds to it",
        "",
        "Headings and fields are those of the European Commission's template of 24 July 2025 (Article 53(1)(d) of",
        "Regulation (EU) 2024/1689), as providers have filled it in. This is of one dataset: a summary is of a model and of",
        "all that it was trained on. Whoever provides the model writes it, and compares it with the template itself.",
        "",
        f"- Version of the summary, link to previous ones, last update: {OPEN}",
        "",
        "## 1. General information",
        "",
        "### 1.1. Provider identification",
        "",
        f"- Provider name and contact details: {OPEN}",
        f"- Authorised representative name and contact details: {OPEN}",
        "",
        "### 1.2. Model identification",
        "",
        f"- Versioned model name(s), model dependencies: {OPEN}",
        f"- Date of placement of the model on the Union market: {OPEN}",
        "",
        "### 1.3. Modalities, overall training data size and other characteristics",
        "",
        f"- Image: {size} ({census.images:,} images, {census.bytes / 1e9:,.3f} GB of original files); types of content: {OPEN}",
        *([f"- Text: captions of {census.captions:,} images"] if census.captions else []),
        f"- Latest date of data acquisition/collection for model training: {census.last_day or OPEN}",
        f"- Description of the linguistic characteristics of the overall training data: {_languages(census)}",
        f"- Other relevant characteristics of the overall training data: {OPEN}",
        "",
        "## 2. List of data sources",
        "",
        "### 2.1. Publicly available datasets",
        "",
        f"- Have you used publicly available datasets: the list of URLs, {rows:,} rows, may be one; where it is from: {OPEN}",
        "",
        "### 2.2. Private non-publicly available datasets obtained from third parties",
        "",
        "#### 2.2.1. Datasets commercially licensed by rightsholders or their representatives",
        "",
        f"- {OPEN}",
        "",
        "#### 2.2.2. Private datasets obtained from other third parties",
        "",
        f"- {OPEN}",
        "",
        "### 2.3. Data crawled and scraped from online sources",
        "",
        "- Were crawlers used: yes",
        f"- Crawler name(s)/identifier(s): {markdown_code(str(fetch.get('user_agent', 'unknown')))}; on behalf of: {OPEN}",
        f"- Purposes of the crawler(s): images for this dataset; {OPEN}",
        "- General description of crawler behaviour: only the images that the list names are asked for, each once; no links",
        "  are followed, no log-in or paywall is passed;",
        f"  at most {fetch.get('rate', '?')} requests a second and {fetch.get('per_domain', '?')} at a time for each registered domain",
        f"- Period of data collection: {_period(census)}",
        f"- Comprehensive description of the type of content and online sources crawled: images with captions; {OPEN}",
        "- Type of modality covered: image" + (" and text" if census.captions else ""),
        f"- Summary of the most relevant domain names crawled: {len(census.domains):,} domains; the largest 10% by size are",
        f"  {len(large):,}, 5% or 1,000 (for small and medium enterprises) are {len(small):,}. domains.csv has all.",
        "",
        "| domain | images | bytes | share |",
        "|---|--:|--:|--:|",
        *(f"| {markdown(d)} | {n:,} | {b:,} | {b / total:.2%} |" for d, n, b in large[:_SHOWN]),
        *([f"| and {len(large) - _SHOWN:,} more of these, in domains.csv | | | |"] if len(large) > _SHOWN else []),
        "",
        "### 2.4. User data",
        "",
        f"- Was data from user interactions used: none by this software; {OPEN}",
        "",
        "### 2.5. Synthetic data",
        "",
        "- Was synthetic AI-generated data created by the provider or on their behalf: not known of the images; columns",
        f"  made by models are named in README.md; {OPEN}",
        "",
        "### 2.6. Other sources of data",
        "",
        f"- {OPEN}",
        "",
        "## 3. Data processing aspects",
        "",
        "### 3.1. Respect of reservation of rights from text and data mining exception or limitation",
        "",
        f"- Are you a signatory to the Code of Practice: {OPEN}",
        f"- Measures before and during data collection: opt-outs that were respected: {_respected(fetch.get('respect', ()))}",
        *(f"  - {n:,} rows {what}" for n, what in _left_alone(census)),
        f"  - Signals seen on what is in the dataset: {_count(census.signals) or 'none'}",
        f"- Additional comments (optional): {OPEN}",
        "",
        "### 3.2. Removal of illegal content",
        "",
        f"- General description of measures taken: columns that look for it: {', '.join(unsafe) or 'none'}; deny-lists: {'yes' if fetch.get('deny') else 'none'}; {OPEN}",
        "",
        "### 3.3. Other information (optional)",
        "",
        f"- {OPEN}",
        "",
        "## Licences, as the list knows them",
        "",
        *licence_lines(census),
        "",
    ]
    return "\n".join(lines)

"""`tastemaker publish`: a selection's shards, or the list of what it kept, given to others with what is to be said."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipelines.options import REQUIRED, Options, Result, argument, command, option
from pipelines.terminal import counted

if TYPE_CHECKING:
    from curate.layout import Data
    from pipelines.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class PublishOptions(Options):
    data: str = argument("DATA", "the data folder")
    name: str | None = option("the selection's name (default: the recipe's)")
    to: str = option(
        "a folder, a place on an object store, or a dataset of the hub: hf://datasets/OWNER/NAME[@BRANCH]",
        metavar="FOLDER|s3://|hf://",
        default=REQUIRED,
    )
    list_only: bool = option("publish URLs, captions, scores and digests; no image", default=False)
    license: str | None = option("of the collection, for its card: an SPDX name or a URL", metavar="NAME")
    dry_run: bool = option("say what would be sent, and send nothing", default=False)


def run(options: PublishOptions) -> Result:
    """Check that nothing is denied or outdated, then send what is not there yet."""
    from curate.publish.publication import publish
    from curate.publish.sending import PublishRequest
    from curate.store.files import sweep
    from curate.store.ownership import open_data
    from pipelines.checks import refuse_denied
    from pipelines.recipe import recipe_of, to_dict
    from pipelines.runtime.progress import ProgressBar

    data = open_data(options.data)
    recipe = recipe_of(data, None, (), select=options.name)
    name = recipe.select.name
    deny = (*recipe.fetch.deny, *([data.shown(data.deny_list)] if data.exists(data.deny_list) else []))
    refuse_denied(data, replace(recipe, fetch=replace(recipe.fetch, deny=tuple(dict.fromkeys(deny)))))
    request = PublishRequest(
        name=name,
        to=options.to if "://" in options.to else os.path.abspath(os.path.expanduser(options.to)),
        list_only=options.list_only,
        license=options.license,
        recipe=to_dict(recipe),
        recipe_text=recipe_to_publish(data, recipe),
    )
    if options.dry_run:
        facts = publish(data, request, dry_run=True)
    else:
        bar = ProgressBar(sys.stderr, "sent", 0, "B")
        try:
            with data.hold():
                sweep(data.root)
                facts = publish(data, request, progress=lambda _, sent, whole: bar.at(sent, whole))
        finally:
            bar.clear()
    done = "would be sent" if options.dry_run else "sent"
    text = (
        f"{name}, {counted(facts['kept'], 'image')} as {facts['kind']}: "
        f"{len(facts['sent']):,} of {counted(facts['files'], 'file')} {done}, "
        f"{facts['sent_bytes'] / 1e6:,.1f} of {facts['bytes'] / 1e6:,.1f} MB"
    )
    if facts["deleted"]:
        became = "would go" if options.dry_run else "gone"
        text += f"; no longer published, and {became}: {counted(len(facts['deleted']), 'file')}"
    if facts["seen"]:
        text += f"\n{facts['seen']}"
    if "images_gone" in facts:
        text += (
            f"\nsince the last time: {facts['images_added']:,} images more, {facts['images_gone']:,} fewer"
            f" ({facts['images_removed']:,} of them removed from {data})"
        )
    return Result(
        text=text,
        facts=facts,
        paths={"published": request.to},
        next=command("publish", data, "--name", name, "--to", options.to) if options.dry_run else "",
    )


def recipe_to_publish(data: Data, recipe: Recipe) -> str:
    """The recipe by which others fetch what is published, and keep of it what is still the same.

    Rules such as `top` look at all rows that there were, of which only the kept ones are published: they would reject
    again. So the one rule is that an image is the one that was published, by its sha256; the rules by which it was
    chosen are a comment. What is of this machine stays away: deny-lists, private addresses, weights and heads in files.
    """
    from curate.annotators.registry import Spec
    from pipelines.recipe import to_yaml

    def is_everywhere(spec: Spec) -> bool:
        words = [spec] if isinstance(spec, str) else [v for v in spec.values() if isinstance(v, str)]
        return not any("/" in word or "://" in word for word in words)

    columns = {name: spec for name, spec in recipe.columns.items() if is_everywhere(spec)}
    dropped = [name for name in recipe.columns if name not in columns]
    theirs = replace(
        recipe,
        source=replace(recipe.source, url="url", caption="caption", where=None, columns=None),
        fetch=replace(recipe.fetch, engine="native", verify="sha256", deny=(), allow=()),
        embed=replace(recipe.embed, weights=None, embeddings=None),
        columns=columns,
        select=replace(recipe.select, rules={"as_published": "sha256 = source.sha256"}, early=()),
    )
    lines = [
        "# Fetches what was published, and keeps the images that are still what they were:",
        "# tastemaker curate list --recipe recipe.yaml --out DATA",
        "# They were chosen from more by these rules, which are not applied again:",
        *(f"#   {rule}: {' '.join(condition.split())}" for rule, condition in _rules_of(data, recipe).items()),
        *([f"# columns that need files of the publisher's are left out: {', '.join(dropped)}"] if dropped else []),
    ]
    return "\n".join([*lines, to_yaml(theirs)])


def _rules_of(data: Data, recipe: Recipe) -> dict[str, str]:
    """The rules that the selection was made by; the recipe's where that is not known."""
    rules = data.record(data.selection_record(recipe.select.name)).get("rules")
    return {r["name"]: r["condition"] for r in rules} if isinstance(rules, list) else dict(recipe.select.rules)

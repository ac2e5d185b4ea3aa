"""Recipes: what is read, what is refused and in which words, and which hashes a key changes."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from aesthetic.errors import UserError
from curate.annotators.registry import make_annotators
from curate.layout import Data
from pipelines.checks import check_selection
from pipelines.recipe import (
    DEFAULT,
    LARGEST,
    Recipe,
    load_recipe,
    parse_recipe,
    recipe_of,
    recipe_text,
    shipped,
    store_recipe,
    stored_recipe,
    to_dict,
    to_yaml,
)

ROOT = Path(__file__).parents[1]


def test_the_shipped_recipes_are_these() -> None:
    names = ["bundled", "datacomp-basic", "everything", "laion-aesthetics-5", "modern", "sd2-base", "siglip-aesthetics"]
    assert shipped() == names
    assert DEFAULT in shipped()


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_recipe_is_whole(name: str, tmp_path: Path, imported_v25: Path) -> None:
    """Its heads exist and read its encoder's vectors, its rules bind to the columns that there will be."""
    recipe = load_recipe(name)
    assert recipe.select.name == name
    assert re.match(r"# [^\n]{30,115}\.\n", recipe_text(name))  # what `tastemaker recipe` says about it
    columns = make_annotators(recipe.columns, recipe.embed.encoder)
    check_selection(Data(tmp_path), recipe, pa.schema([]), columns)
    assert parse_recipe(to_yaml(recipe)) == recipe


def test_a_recipe_whose_head_is_not_here_says_how_to_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASTEMAKER_HEADS", str(tmp_path))
    recipe = load_recipe("siglip-aesthetics")
    with pytest.raises(UserError, match=r"columns.aesthetic_v25: .*`tastemaker heads import aesthetic-predictor-v2.5`"):
        make_annotators(recipe.columns, recipe.embed.encoder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("imgaes: {size: 3}", "unknown key imgaes (did you mean images?). Known here: source, fetch, images"),
        ("images: {sise: 3}", "unknown key images.sise (did you mean size?). Known here: size, mode"),
        ("images: 512", "images: a mapping of keys is expected, not 512"),
        ("images: {size: big}", "images.size: a whole number or a size such as 32MB is expected, not 'big'"),
        ("images: {size: 12.5}", "images.size: a whole number is expected, not 12.5"),
        ("images: {size: true}", "images.size: a whole number is expected, not True"),
        ("images: {exif: 1}", "images.exif: true or false is expected, not 1"),
        ("images: {exif: 'true'}", "images.exif: true or false is expected, not 'true'"),
        ("images: {mode: resize}", "images.mode is 'resize'; it can be no, keep_ratio"),
        ("fetch: {timeout: soon}", "fetch.timeout: a number is expected, not 'soon'"),
        ("fetch: {timeout: .nan}", "fetch.timeout: nan must be more than 0 seconds"),
        ("fetch: {respect: robot}", "fetch.respect: 'robot' is not one of"),
        ("fetch: {respect: null}", "fetch.respect: a list is expected ([] for none), not None"),
        ("fetch: {respect: [3]}", "fetch.respect: text is expected, not 3; put it in quotes"),
        ("fetch: {max_bytes: 32mb}", "fetch.max_bytes: a whole number or a size such as 32MB is expected"),
        ("fetch: {max_bytes: 0.5B}", "fetch.max_bytes: a whole number or a size such as 32MB is expected"),
        ("fetch: {allow: [10.0.0.0]}", "fetch.allow"),
        ("images: {sise: 3, size: big}", "unknown key images.sise (did you mean size?)"),
        ("fetch: {respect: [a, [b]]}", "fetch.respect: text is expected, not ['b']"),
        ("select: {rules: {5: [a]}}", "select.rules.5: text is expected, not ['a']"),
        ("source: {url: !!binary aGk=}", "source.url: a plain value is expected, not b'hi'"),
        ("columns: {taste: {use: x, at: 1e300}}", "columns.taste.at: 1e+300 is too large a number"),
        ("columns: [laion-v2]", "columns: a mapping of names is expected, not ['laion-v2']"),
        ("columns: {../../x: laion-v2}", "columns.../../x: a column's name is letters, digits and _"),
        ("columns: {Width: laion-v2}", "columns.Width: there is a column width (SQL ignores case)"),
        ("columns: {similarity: laion-v2}", "columns.similarity: there is a column similarity"),
        ("columns: {taste: 3}", "columns.taste: the name of a head or an annotator, or {use: ANNOTATOR, ...}"),
        ("columns: {taste: {head: a}}", "columns.taste: the name of a head or an annotator, or {use: ANNOTATOR, ...}"),
        (
            "score: {a: laion-v2}",
            "may name any annotator. Write in its place:\ncolumns:\n  a: laion-v2",
        ),
        ("columns: {taste: a, Taste: b}", "columns.Taste: there is a column taste (SQL ignores case)"),
        ("select: {rules: {large: true}}", "select.rules.large: text is expected, not True"),
        ("select: {rules: {large: [a]}}", "select.rules.large: text is expected, not ['a']"),
        ("select: {rules: {large: a > 1, large: a > 2}}", "large is there twice"),
        ("select: {name: a/b}", "'a/b' can't be a selection's name"),
        ("select: {name: 1.10}", "select.name: text is expected, not 1.1; put it in quotes"),
        ("embed: {precision: fp8}", "embed.precision"),
        ("pack: {shard_size: 0}", "pack.shard_size"),
        ("source: {shard_size: 0}", "source.shard_size"),
        ("ray: {embed_gpus: -1}", "ray.embed_gpus: -1.0 must be at least 0"),
        ("- a\n- b", "is not a recipe"),
        ("just words", "is not a recipe"),
        ("a: [", "is not valid YAML"),
        ("? [a]\n: b", "not valid YAML"),
        ("x: !!python/object/apply:os.system [ls]", "not valid YAML"),
        ("[" * 5000, "nested too deep"),
        ("{a: " * 3000 + "}" * 3000, "nested too deep"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nsource: {columns: [*b, *b]}", "*a stands for a list or a mapping"),
        ("select: &a {rules: *a}", "*a stands for a list or a mapping"),
        ("images: {size: " + "9" * 5000 + "}", "4300 digits"),
        ("images: {size: " + "9" * 400 + "}", "is too large a number"),
        ("fetch: {timeout: " + "9" * 400 + "}", "is too large a number"),
        ("fetch: {timeout: 1e400}", "fetch.timeout: inf is too large a number"),
        ("images: {size: !!int abc}", "not what its tag"),
        ("images: {exif: !!bool abc}", "not what its tag"),
        ("select: {name: !!timestamp abc}", "not what its tag"),
        ("select: {rules: {a: \"caption = '\\ud800'\"}}", "select.rules.a"),
        ('"\\ud800": 1', "unknown key \\ud800"),
        ("columns: {1: a, '1': b}", "1 is there twice"),
        ("ray: {fetch_workers: 1e7}", "ray.fetch_workers: 10000000 is more than any cluster has"),
        ("# " + "x" * LARGEST, "it is longer than 262,144 characters"),
        ("columns: {" + ", ".join(f"a{i}: b" for i in range(20_000)) + "}", "no error in quadratic time"),
    ],
)
def test_what_is_wrong_is_named(text: str, words: str) -> None:
    if words == "no error in quadratic time":
        assert len(parse_recipe(text).columns) == 20_000
        return
    with pytest.raises(UserError) as e:
        parse_recipe(text, what="mine.yaml")
    assert words in str(e.value) and str(e.value).startswith("mine.yaml")
    str(e.value).encode()
    with pytest.raises(UserError, match=r"mine\.yaml"):  # a setting that has nothing to do with it changes no word
        parse_recipe(text, ["fetch.retries=3"], what="mine.yaml")


def test_an_alias_of_a_value_is_one() -> None:
    text = "select: {rules: {a: &words length(caption) > 5, b: *words}}"
    assert parse_recipe(text).select.rules == {"a": "length(caption) > 5", "b": "length(caption) > 5"}


@pytest.mark.parametrize("name", shipped())
def test_any_format_can_be_laid_over_a_shipped_recipe(name: str) -> None:
    """The recipe's quality is jpg's: with png, the compression level that holds is png's default."""
    for format, level in (("jpg", 95), ("webp", 95), ("png", 6)):
        assert load_recipe(name, [f"images.format={format}"]).images.level == level
    assert load_recipe(name, ["images.format=png", "images.quality=9"]).images.level == 9
    with pytest.raises(UserError, match=r"images\.quality is 95; for png it is the compression level, 0 to 9"):
        load_recipe(name, ["images.quality=95", "images.format=png"])
    mine = "images: {format: png, quality: 4}"
    assert parse_recipe(mine, ["images.format=webp"]).images.level == 95
    assert parse_recipe(mine, ["images.format=png"]).images.level == 4


def test_a_recipe_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"no recipe 'bundld'.*did you mean bundled\?"):
        load_recipe("bundld")


def test_a_recipe_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"r\.yaml can't be read as a recipe"):
        load_recipe(str(tmp_path / "r.yaml"))
    with pytest.raises(UserError, match="can't be read as a recipe"):
        load_recipe(str(tmp_path))


def at(recipe: Recipe, path: str) -> Any:
    """The value of a key."""
    value: Any = to_dict(recipe)
    for name in path.split("."):
        value = value[name]
    return value


@pytest.mark.parametrize(
    ("setting", "path", "value"),
    [
        ("images.size=256", "images.size", 256),
        ("images.mode=no", "images.mode", "no"),
        ("images.quality=", "images.quality", None),
        ("fetch.timeout=7", "fetch.timeout", 7.0),
        ("fetch.timeout=1e1", "fetch.timeout", 10.0),
        ("fetch.max_bytes=32MB", "fetch.max_bytes", 32_000_000),
        ("fetch.max_bytes=1.5 kB", "fetch.max_bytes", 1500),
        ("fetch.max_bytes=4MiB", "fetch.max_bytes", 4 << 20),
        ("fetch.max_bytes=32e6", "fetch.max_bytes", 32_000_000),
        ("source.shard_size=10_000", "source.shard_size", 10_000),
        ("fetch.respect=[]", "fetch.respect", []),
        ("fetch.respect=robots-txt", "fetch.respect", ["robots-txt"]),
        ('fetch.allow=["127.0.0.0/8:8790", "10.0.0.1/32:80"]', "fetch.allow", ["127.0.0.0/8:8790", "10.0.0.1/32:80"]),
        ("fetch.user_agent=me: (x)", "fetch.user_agent", "me: (x)"),
        ("source.caption=null", "source.caption", None),
        ("source.url=5", "source.url", "5"),
        ("source.where=punsafe < 0.1 AND lang = 'en'", "source.where", "punsafe < 0.1 AND lang = 'en'"),
        ("source.columns=[uid, 'WIDTH']", "source.columns", ["uid", "WIDTH"]),
        ("select.name=2024", "select.name", "2024"),
        ("select.rules.words=source.\"a b\" = 'it''s: #1'", "select.rules.words", "source.\"a b\" = 'it''s: #1'"),
        ("select.rules.large= aesthetic >= 5 ", "select.rules.large", "aesthetic >= 5"),
        ("select.rules.off=true", "select.rules.off", "true"),
        ("columns.taste=heads/taste.head", "columns.taste", "heads/taste.head"),
        ("select.rules={}", "select.rules", {}),
        ("select.rules=[]", "select.rules", {}),
        ("ray.embed_gpus=0.5", "ray.embed_gpus", 0.5),
    ],
)
def test_a_setting_is_laid_over(setting: str, path: str, value: Any) -> None:
    recipe = load_recipe("bundled", [setting])
    assert at(recipe, path) == value
    assert type(at(recipe, path)) is type(value)
    assert parse_recipe(to_yaml(recipe)) == recipe
    assert parse_recipe(yaml.safe_dump(yaml.safe_load(to_yaml(recipe)))) == recipe  # what others' YAML reads, too


def test_a_rule_or_a_score_is_taken_away_and_order_stays() -> None:
    names = list(load_recipe("bundled").select.rules)
    recipe = load_recipe("bundled", ["select.rules.safe=", "columns.open_nsfw=", "select.rules.large=width > 1"])
    assert list(recipe.select.rules) == [n for n in names if n != "safe"]
    assert list(recipe.columns) == [n for n in load_recipe("bundled").columns if n != "open_nsfw"]
    assert list(load_recipe("bundled", ["select.rules.absent="]).select.rules) == names
    more = load_recipe("bundled", ["select.rules.large=", "select.rules.large=width > 1"])
    assert list(more.select.rules) == [n for n in names if n != "large"] + ["large"]


def test_settings_reach_stages_that_the_recipe_does_not_name() -> None:
    assert parse_recipe("select:\npack: null", ["select.rules.x=true", "fetch.retries=0"]).select.rules == {"x": "true"}
    assert parse_recipe("", ["pack.seed=3"]).pack.seed == 3


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("images", "--set images: expected KEY.KEY=VALUE"),
        ("images.=3", "expected KEY.KEY=VALUE"),
        ("=3", "expected KEY.KEY=VALUE"),
        ("select.name.x=3", "name is a value, not a group of keys"),
        ("images.size=[", "--set images.size=[: the value is not valid YAML"),
        ("images.size=" + "[" * 5000, "nested too deep"),
        ("images.exif=!!bool x", "not what its tag"),
        ("select.name=\udcff", "select.name: '\\udcff' is no text"),
        ("select.rules.\ud800=true", "select.rules.\\ud800"),
        ("image.size=3", "unknown key image (did you mean images?)"),
        ("images.siz=3", "unknown key images.siz (did you mean size?)"),
        ("images=3", "images: a mapping of keys is expected, not 3"),
        ("select.rules.a.b=x > 1", "select.rules.a: text is expected"),
    ],
)
def test_a_setting_that_is_wrong_is_named(setting: str, words: str) -> None:
    with pytest.raises(UserError) as e:
        load_recipe("bundled", [setting])
    assert words in str(e.value)


def test_text_that_looks_like_something_else_comes_back_as_text() -> None:
    names = ["no", "on", "5", "1e5", "1.10", "null", "true", "2024-01-01", "0x10", "12:30", "naïve ☃", "a: b", "~"]
    recipe = dataclasses.replace(
        load_recipe("bundled"),
        select=dataclasses.replace(load_recipe("bundled").select, rules={n: n for n in names}),
    )
    assert parse_recipe(to_yaml(recipe)) == recipe


def test_hashes_are_those_of_before() -> None:
    """Of stages as they were when data folders were first made: what those hold is still theirs."""
    source, fetch, images, clip = "a5cc99d0fc1b11df", "2713e9bff3719f2e", "39dd65e91164e98d", "51001d2626005912"
    expected = {
        "laion-aesthetics-5": (source, fetch, images, clip),
        "sd2-base": (source, fetch, images, clip),
        "datacomp-basic": (source, fetch, "2572fd20aacf53fa", clip),
        "bundled": (source, fetch, images, "88e8a454209e60b2"),
        "everything": (source, fetch, images, "88e8a454209e60b2"),
        "siglip-aesthetics": (source, fetch, images, "ea7c966dbbc6eadd"),
        "modern": (source, fetch, images, "ea7c966dbbc6eadd"),
    }
    respected = ["fetch.respect=[x-robots-tag, robots-txt, tdm-reservation]"]  # all that was respected then
    assert {name: tuple(load_recipe(name, respected).stage_hashes().values()) for name in shipped()} == expected
    now = {load_recipe(name).stage_hashes()["fetch"] for name in shipped()}
    assert now == {"49b41bc69738b5a5"}
    settings = ["source.columns=[a]", "source.where=x > 1", "fetch.max_bytes=1.5kB", "fetch.allow=10.0.0.0/8:80"]
    mine = load_recipe("bundled", [*respected, *settings, "fetch.verify=md5", "images.quality=7", "images.exif=true"])
    hashes = ["e701794aa4bf41d9", "674f8a25e4366676", "7d674ca85b57eda0", "88e8a454209e60b2"]
    assert list(mine.stage_hashes().values()) == hashes


def test_hashes_change_only_for_keys_that_change_files() -> None:
    base = load_recipe(DEFAULT)
    hashes = base.stage_hashes()
    assert set(hashes) == {"source", "fetch", "images", "embed"}

    def changed(*settings: str) -> set[str]:
        other = load_recipe(DEFAULT, settings).stage_hashes()
        return {stage for stage in hashes if other[stage] != hashes[stage]}

    for same in (
        "fetch.timeout=3",
        "fetch.retries=9",
        "fetch.concurrency=9",
        "fetch.per_domain=1",
        "fetch.max_redirects=1",
        "fetch.user_agent=x",
        "embed.weights=w.pt",
        "columns.taste=laion-v2",
        "select.name=x",
        "select.rules.x=true",
        "pack.shard_size=7",
        "pack.seed=7",
        "ray.fetch_workers=2",
    ):
        assert changed(same) == set(), same
    for setting in (
        "fetch.engine=img2dataset",
        "fetch.max_bytes=9MB",
        "fetch.respect=[]",
        "fetch.allow=['[::1]/128:80']",
    ):
        assert changed(setting) == {"fetch"}, setting
    for f in dataclasses.fields(base.images):
        value = {"mode": "no", "format": "webp", "quality": 90}.get(f.name, 99 if f.type == "int" else None)
        if value is None:
            value = "false" if getattr(base.images, f.name) else "true"
        assert changed(f"images.{f.name}={value}") == {"images"}, f.name
    for setting in ("embed.encoder=open_clip:a/b", "embed.precision=fp32", "embed.embeddings=folder"):
        assert changed(setting) == {"embed"}, setting
    for setting in ("source.url=u", "source.caption=", "source.shard_size=7", "source.where=true", "source.columns=[]"):
        assert changed(setting) == {"source"}, setting
    assert changed("images.size=99", "embed.encoder=x") == {"images", "embed"}


def test_a_recipe_in_data_loads_again(tmp_path: Path) -> None:
    data = Data(tmp_path)
    recipe = load_recipe("bundled", ["fetch.max_bytes=3MB", "select.rules.x=source.\"q\" <> 'a: #'", "images.mode=no"])
    store_recipe(data, recipe)
    assert stored_recipe(data) == recipe
    assert load_recipe(str(data.recipe)) == recipe
    assert recipe_of(data, None, ["pack.seed=4"]).pack.seed == 4
    text = data.recipe.read_text()
    for stage, value in recipe.stage_hashes().items():
        assert f"# {stage}: {value}\n" in text


def test_the_reference_names_every_key() -> None:
    """docs/recipes.md has a table per stage, and in it a line for each key with the default that the code has."""
    text = (ROOT / "docs" / "recipes.md").read_text()
    for stage in dataclasses.fields(Recipe):
        part = re.search(rf"^### `{stage.name}`.*?(?=^##|\Z)", text, re.M | re.S)
        assert part, f"docs/recipes.md has no section ### `{stage.name}`"
        kind = getattr(Recipe(), stage.name)
        for f in dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else []:
            line = re.search(rf"^\| `{f.name}` \|[^|]*\| `?([^|`]*)`? \|", part[0], re.M)
            assert line, f"docs/recipes.md: {stage.name}.{f.name} has no line"
            default = to_dict(Recipe())[stage.name][f.name]
            told = line[1] if isinstance(default, str) else yaml.safe_load(line[1])
            assert told == default, f"docs/recipes.md: {stage.name}.{f.name} is {default!r}, told {told!r}"
    for name in shipped():
        assert f"`{name}`" in text

"""What a trial says of its list, what a plan says of machines, and the statistics of both."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.estimate.fleet import FleetPlan, parse_fleet, plan_fleet, plan_list
from curate.estimate.intervals import distinct, ratio, share
from curate.estimate.rates import Figure, Rates, domains_of, lay_over, published
from curate.estimate.spent import Spent, of_models, total_spent
from curate.estimate.whole import whole_list
from pipelines import cli
from tests.small_trial import small_trial

ROOT = Path(__file__).parents[1]

# a list by hand: 1,000 rows; half are images, a tenth are kept
HAND: dict[str, Any] = {
    "taken": 100,
    "listed": 1000,
    "encoder": "open_clip:ViT-L-14-quickgelu/openai",
    "shares": {"images": 0.5, "kept": 0.1, "fetched": 0.8},
    "stages": {
        "fetch": {"per": "fetched", "cpu": 0.002, "requests": 1.5, "received": 100_000, "in_flight": 3.0},
        "images": {"per": "images", "cpu": 0.01, "bytes": 50_000, "files": 3},
        "encode": {"per": "images", "cpu": 0.5, "share": 0.4, "bytes": 3_000, "files": 4},
        "select": {"per": "listed", "cpu": 0.001},
        "pack": {"per": "kept", "cpu": 0.002, "bytes": 50_000},
    },
    "settings": {"concurrency": 100, "per_domain": 6, "rate": 50, "shard_size": 1000},
    "nodes": {"cpu": {"cpus": 1, "dollars": 0.05}, "a100": {"cpus": 8, "gpus": 1, "gpu": "a100", "dollars": 3}},
    "gpus": {"a100": 1, "h100": 3},
    "encoders": {"ViT-L-14": {"a100": 0.004}},
    "busy": 0.5,
    "store": {"put": 5, "get": 0.4, "month": 0.02},
}


def by_hand(**more: Any) -> Rates:
    return lay_over([("hand", HAND), ("more", more)])


# ----------------------------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize(("rate", "sampled", "whole"), [(0.3, 200, 1000), (0.02, 300, 3000), (0.97, 50, 60)])
def test_the_interval_of_a_share_holds_the_truth(rate: float, sampled: int, whole: int) -> None:
    rng = np.random.default_rng(3)
    held = 0
    for _ in range(1000):
        rows = rng.random(whole) < rate
        low, high = share(int(rng.choice(rows, sampled, replace=False).sum()), sampled, whole)
        held += low <= rows.mean() <= high
    assert 925 <= held <= 995


def test_all_rows_leave_no_doubt_and_none_kept_leaves_some() -> None:
    assert share(30, 100, 100) == (0.3, 0.3)
    low, high = share(0, 100, 10_000)
    assert low == 0 and 0.03 < high < 0.04  # Wilson's z^2 / (n + z^2), n = 101
    assert share(5, 10, 11)[0] >= 5 / 11  # what was seen is there


def test_the_interval_of_a_ratio_holds_the_truth() -> None:
    rng, held = np.random.default_rng(4), 0
    for _ in range(500):
        units = rng.integers(50, 150, 8).astype(float)
        found = ratio((units * rng.lognormal(0, 0.3, 8)).tolist(), units.tolist())
        assert found is not None
        held += found[0] <= math.exp(0.3**2 / 2) <= found[1]
    assert 450 <= held <= 490
    assert ratio([3.0], [2.0]) is None


def test_hosts_that_were_not_seen_are_foretold() -> None:
    rng = np.random.default_rng(5)
    hosts = rng.zipf(1.6, 50_000)
    sample = rng.choice(hosts, 5_000, replace=False)
    often = np.bincount(np.unique(sample, return_counts=True)[1])
    found = distinct(5_000, len(np.unique(sample)), int(often[1]), int(often[2]), 45_000)
    truth = len(np.unique(hosts))
    assert 0.4 * truth < found <= 1.1 * truth and found > 2 * len(np.unique(sample))  # Chao's is a lower bound
    assert distinct(100, 6, 0, 0, 1e9) == 6


# ---------------------------------------------------------------------------------------------------- what a run spends


def test_models_share_what_a_pass_took() -> None:
    found = of_models({"cpu": 10.0, "decode": 4.0, "a seconds": 2.0, "b seconds": 1.0}, {"a": 10, "b": 5})
    assert found["a"] == {"images": 10, "decode": 2, "cpu": 4, "seconds": 2}
    assert found["b"] == {"images": 5, "decode": 2, "cpu": 2, "seconds": 1}
    assert total_spent({"cpu": 1.5, "images": 2}, {"cpu": 2, "device": "x"}) == {"cpu": 3.5, "images": 2, "device": "x"}


def test_what_is_counted_is_taken_once() -> None:
    spent = Spent()
    with spent.thread("decode"):
        sum(i * i for i in range(2_000_000))
    spent.add(requests=2)
    first, then = spent.take(), spent.take()
    assert first["requests"] == 2 and 0.01 < first["decode"] <= first["cpu"] + 0.02
    assert "requests" not in then and then["cpu"] < first["cpu"]


# ------------------------------------------------------------------------------------------------------------ by hand


def test_a_plan_by_hand_on_cores() -> None:
    """1,000 rows: 800 fetched at 2 ms, 500 images at 10 + 500 ms: 256.6 s of a core; on 8 cores that work half of the
    time, 64.15 s; then 1 s on 4 cores and 0.2 s."""
    rates = by_hand()
    plan = plan_fleet(rates, 1000, parse_fleet("2x4cpu", rates.nodes))
    assert plan.limits["cores"] * 3600 == pytest.approx(64.15)
    assert plan.limits["open requests"] * 3600 == pytest.approx(800 * 3.0 / (100 * 2))  # 8 cores, 2 workers
    assert plan.bottleneck == "cores" and plan.after * 3600 == pytest.approx(1 / 4 + 0.2)
    assert plan.hours * 3600 == pytest.approx(64.6) and plan.dollars == pytest.approx(64.6 / 3600 * 8 * 0.05)
    assert plan.gbit == pytest.approx(800 * 100_000 * 8 / 64.15 / 1e9)
    assert {s.name: s.count for s in plan.stages}["encode"] == pytest.approx(200)  # of 500: early rules had the others


def test_a_plan_by_hand_on_gpus() -> None:
    """500 images, 0.4 of which are embedded, at 4 ms of an A100: 0.8 s; of an H100, a third, and that is assumed."""
    rates = by_hand(nodes={"h100": {"cpus": 8, "gpus": 1, "gpu": "h100", "dollars": 9}})
    plan = plan_fleet(rates, 1000, parse_fleet("a100", rates.nodes))
    assert plan.gpu_hours * 3600 == pytest.approx(0.8) and plan.core_hours * 3600 == pytest.approx(6.6)
    assert plan.limits["GPUs"] * 3600 == pytest.approx(1.6) and plan.limits["cores"] * 3600 == pytest.approx(1.65)
    other = plan_fleet(rates, 1000, parse_fleet("H100", rates.nodes))
    assert other.gpu_hours * 3600 == pytest.approx(0.8 / 3)

    def origin(plan: FleetPlan) -> str:
        return next(s.gpu.origin for s in plan.stages if s.gpu is not None)

    assert (origin(plan), origin(other)) == ("given", "assumed")
    both = plan_fleet(rates, 1000, parse_fleet("1xa100, 1xh100", rates.nodes))
    assert both.gpu_hours * 3600 == pytest.approx(0.8 / 2) and both.fleet.dollars == 12
    measured = by_hand(stages={"encode": {"gpu": 0.006, "device": "NVIDIA A100-SXM4-80GB"}})
    assert plan_fleet(measured, 1000, parse_fleet("a100", rates.nodes)).gpu_hours * 3600 == pytest.approx(3.0)
    unknown = replace(rates, encoder="bundled")
    noted = plan_fleet(unknown, 1000, parse_fleet("a100", rates.nodes))
    assert noted.gpu_hours == 0 and "no rate of bundled on a GPU" in noted.notes[0]


def test_a_site_holds_a_plan_that_no_machine_makes_faster() -> None:
    """0.2 x 0.8 x 1.5 x 1e9 requests go to one site: of 2 s each, six at a time, or of 0.1 s, 50 a second."""
    domains = {"rows": 100, "hosts": 9, "once": 0, "twice": 0, "largest": 0.2, "name": "flickr.com"}
    fast = by_hand(domains=domains, stages={"fetch": {"in_flight": 0.15}})
    for rates, seconds in ((by_hand(domains=domains), 0.24e9 * 2 / 6), (fast, 0.24e9 / 50)):
        plans = [plan_fleet(rates, 1e9, parse_fleet(name, rates.nodes)) for name in ("9000x16cpu", "99000x16cpu")]
        assert {p.bottleneck for p in plans} == {"the site flickr.com"}
        assert [p.limits[p.bottleneck] * 3600 for p in plans] == [pytest.approx(seconds)] * 2


def test_the_store_by_hand() -> None:
    """A million rows in 1,000 shards of 3 + 4 files, 25 GB and 1.5 GB of images and vectors; 5 GB are packed."""
    found = plan_list(by_hand(), 1_000_000)
    assert found.disk.value == pytest.approx(500_000 * 53_000 + 100_000 * 50_000)
    parts = 500_000 * 50_000 / 5e6 + 100_000 * 50_000 / 5e6
    assert found.puts == pytest.approx(7000 + 2 * 10 + parts) and found.gets == pytest.approx(7020)
    assert found.store_month == pytest.approx(31.5 * 0.02) and found.requests.value == 1_200_000
    assert found.store_requests == pytest.approx((found.puts * 5 + found.gets * 0.4) / 1e6)


def test_figures_that_come_along_have_sources() -> None:
    tree = published()
    rates = lay_over([("published", tree)])
    assert {"a100", "h100", "cpu"} <= rates.nodes.keys()

    def unsourced(tree: Any, path: str = "") -> list[str]:
        if not isinstance(tree, dict):
            return []
        here = (
            [path]
            if "value" in tree and not (tree.get("source") and tree["origin"] in ("published", "assumed"))
            else []
        )
        return here + [p for key, value in tree.items() for p in unsourced(value, f"{path}.{key}")]

    assert not unsourced(tree)
    for name, node in rates.nodes.items():
        assert node.dollars.value > 0 and (not node.gpus or node.gpu in rates.gpus), name


# ---------------------------------------------------------------------------------------------------------- the command


def plan(*words: str | Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = cli.main(["plan", *map(str, words)])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_a_list_is_planned_by_what_others_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    urls = [f"https://{'cdn.large' if i % 4 == 0 else f'a{i}'}.com/{i}.jpg" for i in range(1000)]
    pq.write_table(pa.table({"URL": urls, "TEXT": ["x"] * 1000}), tmp_path / "list.parquet")
    code, out, err = plan(tmp_path / "list.parquet", "--nodes", "4x16cpu,2xh100", "--json", capsys=capsys)
    assert code == 0, err
    facts = json.loads(out.splitlines()[-1])
    assert facts["list"]["rows"] == 1000 and facts["rates"]["domains"]["name"] == "large.com"
    assert facts["rates"]["domains"]["largest"]["value"] == 0.25
    assert "1,000 rows of" in out and "next: tastemaker curate" in out and "published" in out
    code, out, _ = plan(tmp_path / "list.parquet", "--rows", "1e9", capsys=capsys)
    assert code == 0 and "1,000,000,000 rows" in out and "the site large.com" in out
    assert not any((tmp_path / name).exists() for name in ("plan", "logs"))


def test_rates_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"nodes": {"rack": {"cpus": 128, "dollars": 0.4}}, "store": {"month": 0.01}}))
    code, out, err = plan("--rows", "1e6", "--rates", own, "--nodes", "2xa100,rack", "--json", capsys=capsys)
    assert code == 0, err
    facts = json.loads(out.splitlines()[-1])
    assert facts["rates"]["nodes"]["rack"]["dollars"] == {"value": 0.4, "origin": "given"}
    assert facts["plans"][0]["dollars"] == pytest.approx(facts["plans"][0]["hours"] * (2 * 2.745 + 0.4))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--rows", "0"], "--rows 0: it must be more than 0"),
        (["--rows", "-5"], "--rows -5: it must be more than 0"),
        (["--rows", "nan"], "--rows nan: it must be more than 0"),
        ([], "how many rows? Name a list or a data folder, or give --rows"),
        (["--rows", "1e6", "--nodes", "2xh10"], "no kind of machine 'h10'. Did you mean h100?"),
        (["--rows", "1e6", "--nodes", "0xh100"], "--nodes 0xh100: a count and a kind of machine are expected"),
        (["--rows", "1e6", "--nodes", ","], "--nodes names no machine"),
        (["--rows", "1e6", "--nodes", "4x16cpu"], "no rate of open_clip:ViT-L-14-quickgelu/openai (encode) on them"),
        (["--rows", "1e6", "--rates", "absent.json"], "absent.json can't be read as rates"),
        (
            ["--rows", "1e6", "--rates", "wrong.json"],
            "wrong.json: stages.fetch.cpu.value: Input should be",
        ),
        (["--rows", "1e6", "--rates", "extra.json"], "extra.json: node: Unexpected keyword argument"),
        (["data"], "data holds no rates"),
    ],
)
def test_what_is_wrong_is_said(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong.json").write_text('{"stages": {"fetch": {"per": "fetched", "cpu": {"value": "much"}}}}')
    (tmp_path / "extra.json").write_text('{"node": {}}')
    (tmp_path / "data" / "plan").mkdir(parents=True)
    (tmp_path / "data" / "plan" / "plan.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    code, _, err = plan(*words, capsys=capsys)
    assert code == 2 and told in err, err


def test_help_is_light() -> None:
    code = "import sys\nfrom pipelines import cli\ntry:\n    cli.main(['plan', '--help'])\nfinally:\n    "
    code += "print({'ray', 'torch', 'pydantic', 'pyarrow', 'numpy'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "--nodes" in done.stdout and done.stdout.rstrip().endswith("set()"), done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------ a trial and the whole


@pytest.mark.long
def test_a_trial_says_what_the_whole_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """3,000 rows sorted by site, the later the worse, and a trial of 600: the whole run is within its intervals."""

    def curate(out: str, *more: str) -> dict[str, Any]:
        settings = [word for s in trial.settings for word in ("--set", s)]
        words = ["curate", trial.list, "--out", tmp_path / out, "--recipe", "everything", *settings, "--json", *more]
        done = subprocess.run(
            [sys.executable, "-m", "pipelines.cli", *map(str, words)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return dict(json.loads(done.stdout.splitlines()[-1]))

    with small_trial(tmp_path, 3000) as trial:
        whole = curate("trial", "--limit", "600")["whole"]
        before = trial.web.counts().requests.total()
        truth = curate("whole")
        requests = trial.web.counts().requests.total() - before
    disk = sum(p.stat().st_size for p in (tmp_path / "whole").rglob("*") if p.is_file())
    assert whole["kept"]["low"] <= truth["kept"] <= whole["kept"]["high"]
    assert whole["images"]["high"] - whole["images"]["low"] < 300
    assert whole["disk"]["value"] == pytest.approx(disk, rel=0.1)
    assert whole["requests"]["value"] == pytest.approx(requests, rel=0.01)
    code, out, err = plan(tmp_path / "trial", "--nodes", "2x8cpu", "--json", capsys=capsys)
    assert code == 0, err
    facts = json.loads(out.splitlines()[-1])
    assert facts["rates"]["taken"] == 600 and facts["list"]["rows"] == 3000
    origins = {s["name"]: s["cpu"]["origin"] for s in facts["plans"][0]["stages"]}
    assert {name for name, origin in origins.items() if origin != "measured"} == {"select", "pack"}  # too few rows


def test_rates_of_a_run_without_ray(tmp_path: Path) -> None:
    """What records of stages that ran here say: each stage has its part of the CPU, each request is counted, and of
    images that an early rule left out the encoder takes nothing: a plan counts those that it sees."""
    from curate.estimate.rates import measure
    from curate.layout import Data
    from pipelines.recipe import load_recipe
    from tests.stages import run_stages

    data = Data(tmp_path / "data")
    with small_trial(tmp_path, 120) as trial:
        columns = "columns={quality: quality, aesthetic: bundled-aesthetic}"
        rules = ["select.rules={sharp: quality_sharpness > 60}", "select.early=[sharp]"]
        run_stages(trial.list, data, load_recipe("everything", [*trial.settings, columns, *rules]))
        asked = trial.web.counts().requests
    images = data.ledger.filter("status = 'success'").count("*").fetchall()[0][0]
    seen = data.ledger.filter("quality_sharpness > 60").count("*").fetchall()[0][0]
    rates = measure(data, kept=[seen])
    assert rates is not None and rates.domains is not None and 0 < seen < images
    fetch, pixels = rates.stages["fetch"], rates.stages["images"]
    assert fetch.requests is not None and fetch.requests == Figure(value=1, low=1, high=1, origin="measured")
    assert fetch.cpu is not None and fetch.cpu.value > 0
    assert rates.domains.rules.value == sum(n for (_, p), n in asked.items() if p == "/robots.txt") / 12
    assert pixels.cpu is not None and pixels.bytes is not None and 0.0002 < pixels.cpu.value < 0.1
    shares = {name: stage.share.value for name, stage in rates.stages.items() if stage.share is not None}
    assert shares["encode"] == pytest.approx(seen / images) and shares["quality"] == 1
    assert {"decode", "aesthetic"} < rates.stages.keys()

    timed = replace(rates, wall={"fetch": {"begin": 5, "each": 0.01, "tail": 2, "count": 120}})
    found = whole_list(timed, cores=2)
    assert found.rows == 120 and found.kept is not None and found.kept.value == seen
    assert found.seconds is not None and found.seconds.value == pytest.approx(5 + 1.2 + 2)
    again = lay_over([("rates", rates.to_json()), ("prices", {"nodes": HAND["nodes"]})])
    assert whole_list(again, cores=2).disk == whole_list(rates, cores=2).disk
    counts = {s.name: s.count for s in plan_fleet(again, 1e6, parse_fleet("16cpu", again.nodes)).stages}
    assert counts["encode"] == pytest.approx(1e6 * seen / 120)
    assert counts["quality"] == pytest.approx(1e6 * images / 120)


def test_lists_count_by_their_length(tmp_path: Path) -> None:
    """All 60 rows of one list, which are images, and a trial of 40 of 240 rows of another, of which a quarter is: the
    whole is 120 of 300, and 84% of the requests go to the site of the second."""
    from curate.estimate.rates import measure
    from curate.fetch.deny import Deny
    from curate.layout import Data
    from curate.ledger.select import select
    from curate.sources.adding import adding
    from curate.sources.planner import make_plan
    from demo.web import Route, Web
    from pipelines.estimates import kept_of_lists
    from pipelines.recipe import load_recipe
    from tests.small_web import image
    from tests.stages import fetch_shards

    data, body = Data(tmp_path / "data"), image(0)[1]
    with Web({f"/{i}": Route(body=body) for i in range(60)}, hosts=2) as web:
        settings = [f'fetch.allow=["127.0.0.0/8:{web.port}"]', "fetch.retries=0", "fetch.rate=0", "select.rules="]
        recipe = load_recipe("everything", [*settings, "source.shard_size=20", "columns="])
        for host, (name, count) in enumerate((("a", 60), ("b", 240))):
            urls = [web.url(host, f"/{i}") for i in range(count)]
            pq.write_table(pa.table({"url": urls}), tmp_path / f"{name}.parquet")
        make_plan(str(tmp_path / "a.parquet"), data, recipe.source)
        with adding(str(tmp_path / "b.parquet"), data.plan, recipe.source, 40, Deny(), tmp_path) as more:
            more.write()
        data = Data(data.root)
        fetch_shards(data, recipe)
    selection, kept = select(data, recipe.select), kept_of_lists(data, recipe.select.name)
    assert sum(kept) == selection.kept
    rates = measure(data, kept=kept)
    assert rates is not None and rates.domains is not None
    assert (rates.of, rates.taken, rates.listed, kept[0]) == ("2 lists", 100, 300, 60)
    assert rates.shares["kept"] == rates.shares["images"]
    found = whole_list(rates, cores=2)
    low, high = found.images.low, found.images.high
    assert low is not None and high is not None and found.kept == found.images
    assert 60 + kept[1] <= low <= 120 <= high <= 180 and found.images.value == pytest.approx(60 + 6 * kept[1])
    assert found.requests.value == pytest.approx(300 + 2) and found.requests.low == found.requests.high
    assert rates.domains.largest.value == pytest.approx(240 / 300, abs=0.02) and rates.domains.rules.value == 1


def test_domains_are_registered_ones_and_hosts_are_hosts() -> None:
    urls = ["http://a.x.com/1", "http://b.x.com/2", "http://y.org:80/3", "no url", "http://[broken/", "http://y.org/4"]
    found = domains_of(urls, 1000)
    assert found is not None and (found.rows, found.hosts, found.once, found.twice) == (4, 3, 2, 1)
    assert found.name == "x.com" and found.largest.value == 0.5
    assert domains_of([]) is None

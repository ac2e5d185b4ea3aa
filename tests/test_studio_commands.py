"""Commands from the page: what is shown is what runs, and what runs is what one would have typed."""

from __future__ import annotations

import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from curate.layout import Data
from curate.ledger.select import SelectConfig, load_selection, select
from curate.store.files import write_json
from curate.store.objects import ObjectStore
from curate.store.ownership import MARK
from pipelines.actions import DataCommands, rules_of
from pipelines.cli import main
from pipelines.recipe import Recipe, load_recipe, parse_recipe, recipe_of, store_recipe
from pipelines.runtime.progress import LINE_SECONDS, ProgressBar
from studio.commands import service as service_module
from studio.commands.actions import RecipeAction, RuleOfPage, SelectAction
from studio.commands.service import CommandJob, CommandService
from studio.queue import QueueFull
from tests.small_data import make_data
from tests.small_serve import ServedData, serving_data, small_sampler

CUTS = {
    "laion_v2": (4.5, 5, 6.8),
    "similarity": (0, 0.2, 0.41),
    "original_width": (150, 500),
    "source.WIDTH": (1030, 2e3),
}
NASTY = [
    "it's",
    'say "so"',
    "a: b",
    "# no",
    "ö ≥ 5",
    "x\ny",
    "a.b",
    "a=b",
    "null",
    "~",
    " both ",
    "-1",
    "{",
    "$HOME",
    "é\u2028",
]


def random_rules(dice: random.Random) -> list[dict[str, Any]]:
    """Rules that hold, over columns of the small data folder, some of them switched off."""
    rules = []
    for i in range(dice.randrange(6)):
        column = dice.choice([*CUTS])
        cut = dice.choice(CUTS[column])
        condition = dice.choice(
            [f"{column} >= {cut}", f"{column} < {cut} or {column} > {cut} + abs({cut})", f"top({column}, 0.{i + 1})"]
        )
        condition += dice.choice(
            ["", " and caption like '%ö%'", "\n  and 'it''s' <> \"caption\"", " and caption <> 'é #: x'"]
        )
        rules.append(
            {
                "name": f"rule {i} {dice.choice([n for n in NASTY if n.isprintable()]).strip()}",
                "condition": condition,
                "on": dice.random() < 0.8,
            }
        )
    return rules


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return planned(tmp_path / "data")


def planned(root: Path) -> Data:
    """The small data folder, with what shows commands that it is one."""
    data = Data.at(make_data(root))
    data.plan_folder.mkdir()
    (root / MARK).write_text("tastemaker data\n")
    return data


def with_recipe(data: Data) -> Recipe:
    """Give a data folder a recipe of its own, as a run leaves it."""
    write_json(data.plan_record, {})
    store_recipe(data, recipe := load_recipe("bundled"))
    return recipe


@pytest.fixture
def served(data: Data) -> Iterator[ServedData]:
    with serving_data(data) as served:
        yield served


@pytest.fixture
def client(served: ServedData) -> Iterator[httpx.Client]:
    with served.client() as client:
        yield client


def over(client: httpx.Client, job: dict[str, Any], seconds: float = 60) -> dict[str, Any]:
    """A command when it is over."""
    deadline = time.monotonic() + seconds
    while (view := client.get(f"/api/commands/{job['id']}").json())["state"] in ("waiting", "running"):
        assert time.monotonic() < deadline, view
        time.sleep(0.05)
    return dict(view)


def test_the_command_that_is_shown_makes_exactly_these_rules(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """With whatever text in names and conditions, whatever recipe the data folder has, and in their order."""
    recipe = with_recipe(data)
    dice, line = random.Random(1), DataCommands(data, str(data))
    for _ in range(50):
        rules = [RuleOfPage.model_validate(r) for r in random_rules(dice)]
        rules += [
            RuleOfPage(name=n, condition=c) for n, c in zip(dice.sample(NASTY, 2), dice.sample(NASTY, 2), strict=True)
        ]
        rules += [RuleOfPage(name=n, condition=c) for n, c in dice.sample([*recipe.select.rules.items()], 2)]
        dice.shuffle(rules)
        wanted = [*rules_of(rules).items()]
        for action in (SelectAction, RecipeAction):
            asked = action(action=action.__name__.removesuffix("Action").lower(), name="mine", rules=rules)
            typed = shlex.split(shlex.join(line.words(asked)))
            settings = [typed[i + 1] for i, word in enumerate(typed) if word == "--set"]
            assert [*recipe_of(data, None, settings).select.rules.items()] == wanted
            written = parse_recipe(line.text(asked)).select
            assert (written.name, [*written.rules.items()]) == ("mine", wanted)


def test_what_differs_from_the_recipe_is_all_that_is_typed(data: Data) -> None:
    recipe = with_recipe(data)
    line = DataCommands(data, "data")
    rules = [RuleOfPage(name=n, condition=c) for n, c in recipe.select.rules.items()]
    rules[-1] = RuleOfPage(name=rules[-1].name, condition="top(aesthetic, 0.1)")
    words = line.words(SelectAction(action="select", name="mine", rules=rules))
    assert words == ["select", "data", "--name", "mine", "--set", f"select.rules.{rules[-1].name}=top(aesthetic, 0.1)"]


def selected(data: Data) -> tuple[bytes, dict[str, Any]]:
    """The files of a selection."""
    return data.verdicts("mine").read_bytes(), json.loads(data.selection_record("mine").read_bytes())


def test_a_selection_of_the_page_is_that_of_the_library(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    """The command's words, run in this process, write the files that `select` writes of the rules."""
    dice, line = random.Random(2), DataCommands(data, str(data))
    for _ in range(8):
        rules = [RuleOfPage.model_validate(r) for r in random_rules(dice)]
        assert main(line.words(SelectAction(action="select", name="mine", rules=rules))) == 0, capsys.readouterr()
        typed = selected(data)
        select(data, SelectConfig(name="mine", rules=rules_of(rules)))
        assert selected(data) == typed


@pytest.mark.long
def test_a_selection_of_the_page_is_that_of_the_shell(tmp_path: Path, data: Data, served: ServedData) -> None:
    """The page's button and the command pasted into a shell: the same files, for 20 random sets of rules; and they say
    what the page has shown before."""
    dice = random.Random(3)
    other = planned(tmp_path / "other")
    with served.client() as client:
        for _ in range(20):
            asked = {"action": "select", "name": "mine", "rules": random_rules(dice)}
            shown = client.post("/api/commands/preview", json=asked).json()["command"]
            live = client.post("/api/selections", json={"rules": asked["rules"]}).json()
            assert over(client, client.post("/api/commands", json=asked).json())["state"] == "done"
            there = shown.replace(str(data), str(other)).replace(
                "tastemaker ", f"{sys.executable} -m pipelines.cli ", 1
            )
            subprocess.run(["bash", "-c", there], check=True, capture_output=True)
            assert selected(data) == selected(other)
            made, names = load_selection(data, "mine"), ("name", "condition", "rejected", "marginal", "nulls")
            on = [[rule[n] for n in names] for rule in live["rules"] if rule["on"]]
            assert on == [[getattr(rule, n) for n in names] for rule in made.rules]
            assert (live["kept"], live["rows"], live["warnings"]) == (made.kept, made.rows, made.warnings)


def test_a_command_runs_and_says_what_it_wrote(data: Data, client: httpx.Client) -> None:
    rules = [{"name": "good", "condition": "laion_v2 >= 5"}, {"name": "off", "condition": "no sql", "on": False}]
    asked = {"action": "select", "name": "mine", "rules": rules}
    job = client.post("/api/commands", json=asked).json()
    assert job["command"] == client.post("/api/commands/preview", json=asked).json()["command"]
    sheet = client.post("/api/commands", json={"action": "sheet", "name": "mine"}).json()
    assert sheet["state"] == "waiting"  # one at a time
    with client.stream("GET", f"/api/commands/{job['id']}/events") as response:
        events = [json.loads(line[5:]) for line in response.iter_lines() if line.startswith("data:")]
    assert events[-1]["state"] == "done" and events[-1]["exit"] == 0 and len(events) >= 2
    assert events[-1]["paths"] == {"selected": str(data.verdicts("mine"))}
    assert any(line.startswith("good ") for line in events[-1]["lines"]) and not any(
        "{" in x for x in events[-1]["lines"]
    )
    view = over(client, sheet)
    drawn = Path(view["paths"]["look"]).read_bytes()
    assert view["state"] == "done" and drawn.startswith(b"\x89PNG")
    assert client.get("/api/sheets/mine.png").content == drawn
    assert client.get("/api/sheets/none.png").status_code == client.get("/api/sheets/..%2fmine.png").status_code == 404
    assert [j["id"] for j in client.get("/api/commands").json()["jobs"]] == [sheet["id"], job["id"]]


def test_what_is_wrong_is_said_as_in_a_terminal(data: Data, client: httpx.Client) -> None:
    asked = {"action": "select", "name": "mine", "rules": [{"name": "good", "condition": "no_column > 5"}]}
    view = over(client, client.post("/api/commands", json=asked).json())
    assert view["state"] == "failed" and view["exit"] == 2 and "no_column" in view["lines"][-1]


@pytest.mark.parametrize(
    "asked",
    [
        {"action": "shell", "words": ["ls"]},
        {"action": "select", "name": "../up", "rules": []},
        {"action": "select", "name": "--out", "rules": []},
        {"action": "select", "name": "mine\n", "rules": []},
        {"action": "select", "name": "mine", "rules": [], "words": ["--set", "fetch.deny=[]"]},
        {"action": "select", "name": "mine", "rules": [{"name": "a", "condition": "true"}] * 2},
        {"action": "select", "name": "mine", "rules": [{"name": f"a{i}", "condition": "x" * 20_000} for i in range(9)]},
        {"action": "annotate", "column": "a", "spec": "{use: captions, base_url: 'http://10.0.0.1'}"},
        {"action": "annotate", "column": "a", "spec": "/etc/passwd"},
        {"action": "annotate", "column": "a=b", "spec": "open-nsfw"},
        {"action": "recipe", "name": "mine", "rules": []},
    ],
)
def test_nothing_but_the_listed_actions_can_be_asked(client: httpx.Client, asked: dict[str, Any]) -> None:
    response = client.post("/api/commands", json=asked)
    assert response.status_code == 422 and set(response.json()) == {"error", "hint"}
    assert client.get("/api/commands").json() == {"jobs": []}


def test_read_only_runs_nothing(data: Data) -> None:
    with serving_data(data, read_only=True) as served, served.client() as client:
        asked = {"action": "pack", "name": "mine"}
        assert client.post("/api/commands", json=asked).status_code == 405
        assert client.delete("/api/commands/0123456789abcdef").status_code == 405
        assert client.post("/api/commands/preview", json=asked).json()["command"].endswith(" --name mine")
        assert client.get("/api/commands").json() == {"jobs": []}


# ------------------------------------------------------------------------------------------- processes, made for this


class Scripts:
    """In place of the command line: Python, which is given a script."""

    given = "data"
    program = (sys.executable, "-uc")
    environment: dict[str, str] = {}  # noqa: RUF012

    def words(self, action: Any) -> list[str]:
        raise NotImplementedError

    def text(self, action: Any) -> str:
        raise NotImplementedError


@pytest.fixture
def commands() -> Iterator[CommandService]:
    faults: list[Exception] = []
    service = CommandService(Scripts(), on_fault=faults.append)
    yield service
    service.close()
    assert not faults


def wait_for(what: Callable[[], Any], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


LASTING = "import time; print('begun'); time.sleep(60)"


def test_a_command_is_interrupted_and_one_that_waits_is_over_at_once(commands: CommandService) -> None:
    job, waiting = commands.submit([LASTING], "me"), commands.submit([LASTING], "me")
    wait_for(lambda: job.lines)
    commands.cancel(waiting)
    assert waiting.state == "cancelled" and waiting.process is None
    commands.cancel(job)
    wait_for(lambda: job.is_over)
    assert job.state == "cancelled" and job.exit in (1, 130, -signal.SIGINT) and job.seconds < 20


def test_what_does_not_end_is_killed_with_all_that_it_started(
    commands: CommandService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "GRACE", 0.5)
    child = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {LASTING!r}]); print(p.pid)"
    job = commands.submit([f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); {child}; p.wait()"], "me")
    wait_for(lambda: len(job.lines) == 2)
    commands.cancel(job)
    wait_for(lambda: job.is_over)
    assert job.state == "cancelled" and job.exit == -signal.SIGKILL
    child_of = Path(f"/proc/{next(x for x in job.lines if x.isdigit())}/stat")
    wait_for(lambda: not child_of.exists() or child_of.read_text().rpartition(")")[2].split()[0] == "Z")


def test_the_end_of_the_server_ends_what_runs(commands: CommandService) -> None:
    job, waiting = commands.submit([LASTING], "me"), commands.submit([LASTING], "me")
    wait_for(lambda: job.lines)
    commands.close()
    assert job.state == waiting.state == "cancelled"
    with pytest.raises(QueueFull, match="stopped"):
        commands.submit([LASTING], "me")


def test_only_so_many_wait(commands: CommandService) -> None:
    commands.submit([LASTING], "me")
    wait_for(lambda: commands.jobs()[0].state == "running")
    for person in ("me", "you"):
        for _ in range(20):
            commands.submit([LASTING], person)
        with pytest.raises(QueueFull, match="20 of your"):
            commands.submit([LASTING], person)
    with pytest.raises(QueueFull, match="40 commands"):
        commands.submit([LASTING], "third")


def test_the_last_lines_are_kept_and_controls_are_shown(commands: CommandService) -> None:
    first = r"import sys; sys.stdout.reconfigure(encoding='utf-8'); print('\x1b[2Jred\tx \u202e'); print('x' * 10_000)"
    job = commands.submit([first], "me")
    wait_for(lambda: job.is_over)
    assert job.lines[0] == r"\x1b[2Jred x \u202e" and len(job.lines[1]) == 2000, job.lines
    job = commands.submit([f"{first}; [print(i) for i in range(250)]"], "me")
    wait_for(lambda: job.is_over)
    assert job.state == "done" and len(job.lines) == 200 and job.lines[-1] == "249" and job.dropped == 52


def test_progress_is_read_from_what_commands_print(commands: CommandService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LINE_SECONDS, "0")
    out = io.StringIO()
    bar = ProgressBar(out, "pack", 20_000)
    time.sleep(0.01)
    bar(1_500)
    progress = service_module._progress(out.getvalue().strip())
    assert progress is not None and (progress.done, progress.of) == (1500, 20_000)
    assert progress.rate.endswith("img/s") and progress.eta
    both = "fetch  884/884  58 rows/s  96.9% ok     embed  12/1,857  38 img/s     eta 3 min 2 s"
    found = service_module._progress(both)
    assert found == service_module.CommandProgress(12, 1857, "38 img/s", "3 min 2 s")
    assert service_module._progress("kept                 350                           39.6%") is None


def test_two_people_at_once_lose_nothing(served: ServedData) -> None:
    found: list[CommandJob | dict[str, Any]] = []

    def person(name: str) -> None:
        with served.client() as client:
            asked = {"action": "select", "name": name, "rules": [{"name": "a", "condition": "laion_v2 > 5"}]}
            found.append(over(client, client.post("/api/commands", json=asked).json()))

    people = [threading.Thread(target=person, args=(name,)) for name in ("one", "two")]
    for thread in people:
        thread.start()
    for thread in people:
        thread.join()
    assert [job["state"] for job in found if isinstance(job, dict)] == ["done", "done"]
    assert served.folder.data.selections() == ["one", "two"]


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_studio_as_a_command(tmp_path: Path, real_data: Data, number: signal.Signals) -> None:
    """The pages are there while the model loads; a signal ends it all, and the command that runs for a page."""
    data = Data.at(shutil.copytree(real_data.root, tmp_path / "data"))
    small_sampler(tmp_path / "model")
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", "studio", "data", "--model", "model", "--port", "0"],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )  # fmt: skip
    assert process.stderr is not None
    lines = iter(process.stderr)
    url = next(found[1] for line in lines if (found := re.search(r"the studio is at (http://\S+?)/ ", line)))
    with httpx.Client(base_url=url, timeout=60) as client:
        assert {client.get(page).status_code for page in ("/", "/rate", "/draw")} == {200}
        wait_for(lambda: client.get("/api/data").json()["index"]["state"] == "ready", 60)
        assert client.get("/api/data").json()["images"] == 36
        wait_for(lambda: client.get("/api/model").status_code == 200, 120)
        with data.hold():  # somebody else's run: the studio only reads
            assert client.get("/api/rows").json()["total"] == 36
            job = client.post("/api/commands", json={"action": "pack", "name": "bundled"}).json()
            assert job["command"] == "tastemaker pack data --name bundled"
            view = over(client, job)
            assert view["state"] == "failed" and "is in use by" in view["lines"][-1]
        client.post("/api/commands", json={"action": "annotate", "column": "text", "spec": "text"})
        wait_for(lambda: client.get("/api/commands").json()["jobs"][0]["state"] == "running")
    process.send_signal(number)
    began = time.monotonic()
    _, said = process.communicate(timeout=40)
    assert process.returncode == 0 and time.monotonic() - began < 20, said
    assert "Traceback" not in said and said.rstrip().endswith("ended")
    with data.hold():  # nobody has it any more
        pass


def test_what_the_studio_refuses_before_anything_loads(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        ([str(data.root / "nowhere")], "is not a data folder"),
        ([str(data), "--model", str(data.root / "none")], "none"),
        ([str(data), "--model", "x", "--read-only"], "give one of them"),
        ([str(data), "--lora", "x"], "give a --model too"),
        ([str(data), "--token", "short"], "16 characters"),
    ):
        assert main(["studio", *words, "--port", "0"]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.long
def test_a_data_folder_on_an_object_store(
    tmp_path: Path, real_data: Data, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is named by its URL, in what runs too; images come from its tars, and what is made is put there."""
    monkeypatch.setenv("TASTEMAKER_CACHE", str(tmp_path / "cache"))
    store = ObjectStore(s3_url)
    for path in real_data.root.rglob("*"):
        if path.is_file() and path.name not in (".lock", ".workers"):
            store.put_file(path, path.relative_to(real_data.root).as_posix())
    command = [sys.executable, "-m", "pipelines.cli", "studio", s3_url, "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = iter(process.stderr)
    url = next(found[1] for line in lines if (found := re.search(r"the studio is at (http://\S+?)/ ", line)))
    try:
        with httpx.Client(base_url=url, timeout=60) as client:
            wait_for(lambda: client.get("/api/data").json()["index"]["state"] == "ready", 60)
            rows = client.get("/api/rows").json()
            assert rows["total"] == 36
            assert client.get(f"/api/thumbnails/{rows['rows'][0]['key']}").headers["content-type"].startswith("image/")
            asked = {"action": "select", "name": "mine", "rules": [{"name": "a", "condition": "aesthetic > 3"}]}
            view = over(client, client.post("/api/commands", json=asked).json())
            assert view["state"] == "done" and view["command"].startswith(f"tastemaker select {s3_url} --name mine ")
            assert "mine" in [s["name"] for s in client.get("/api/data").json()["selections"]]
        assert store.head("selected/mine.parquet") is not None
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=40)
    assert process.returncode == 0

"""The small form of bench.accelerator: all of it works, and one measurement that dies ends no other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest


@pytest.mark.long
def test_a_process_that_is_killed_costs_one_measurement(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.accelerator", "--small", "--out", str(tmp_path)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = [process.stdout.readline(), process.stdout.readline()]
        (child,) = psutil.Process(process.pid).children()
        child.kill()
        said += process.stdout.readlines()
    assert process.returncode == 0 and said[0].startswith("A CPU"), said
    result = json.loads((tmp_path / "accelerator.json").read_text())
    errors = [f["error"] for f in result["measured"].values() if "error" in f]
    assert errors == ["its process died (-9)"], result
    assert len(result["measured"]) == 7 and result["device"]["kind"] == "cpu"
    whole = [f for f in result["measured"].values() if "error" not in f]
    assert all(f["img_s"] > 0 and f["gflop"] > 0 and f["mfu"] is None for f in whole)
    table = (tmp_path / "accelerator.md").read_text()
    assert "nothing of a GPU" in table and all(f"| {name} |" in table for name in result["measured"])

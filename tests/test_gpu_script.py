"""benchmarks/gpu.py runs whole on a CPU, and says so when something is wrong.

Guards against: minutes of a GPU are few, and a script that fails there on a typo, or on a name that the program
no longer has, wastes them.
"""

import json
import subprocess
import sys

import pytest
from conftest import ENVIRONMENT, ROOT, python

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu


@pytest.mark.slow
def test_every_section_runs_on_a_cpu(tmp_path):
    """All sections end, none fails, every check is ok."""
    out = tmp_path / "gpu.jsonl"
    command = [python(), ROOT / "benchmarks" / "gpu.py", "--device", "cpu", "--budget", "1200", "--out", out]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert not [line for line in lines if {"error", "skipped"} & set(line)]
    assert {line["section"] for line in lines if line["what"] == "end"} == set(gpu.SECTIONS)
    checked = {line["section"] for line in lines if "ok" in line}
    assert checked == {"env", "flex", "qwen", "moe", "gemma", "sampler", "lora", "resume"}
    assert all(line["ok"] for line in lines if "ok" in line)


def test_each_section_has_its_process():
    """A section that no process of PARTS runs would be missing without a word."""
    assert sorted(" ".join(names for names, _ in gpu.PARTS).split()) == sorted(gpu.SECTIONS)


@pytest.mark.parametrize("gap, ok", [(0.5, True), (1.0, True), (1.5, False), (float("nan"), False)])
def test_a_value_above_its_limit(gap, ok, capsys):
    """It is not ok in its line, which makes the exit code 1; a measurement without limits does not."""
    gpu.emit("a gap", {"gap": 1.0}, gap=gap)
    gpu.emit("a speed", tok_s=gap)
    check, speed = map(json.loads, capsys.readouterr().out.splitlines())
    assert check["ok"] is ok and "ok" not in speed
    assert gpu.exit_code([check, speed]) == int(not ok)


def test_a_section_that_raises(capsys, tmp_path, monkeypatch):
    """It is one line with the error, the sections after it still run, and the exit code is 1."""
    out = tmp_path / "lines.jsonl"
    run = gpu.SimpleNamespace(out=out, started=0.0, section="")
    monkeypatch.setattr(gpu, "RUN", run)
    monkeypatch.setattr(gpu, "SECTIONS", {"env": lambda: 1 / 0, "flex": lambda: [{"what": "fine"}]})
    gpu.run_part(run, ["env", "flex"], until=float("inf"))
    lines = gpu.read_lines()
    assert [line["section"] for line in lines] == ["env", "flex", "flex"]
    assert "ZeroDivisionError" in lines[0]["error"] and gpu.exit_code(lines) == 1 and gpu.exit_code(lines[1:]) == 0
    gpu.print_table(lines)
    assert "FAILED env" in capsys.readouterr().out

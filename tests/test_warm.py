"""A command line that warm.py forks is the command line that Python starts.

Guards against: a suite that is fast, and tests something else than what a user starts.
"""

import json
import signal
import subprocess
import sys

import pytest
from conftest import ENVIRONMENT, ROOT, python, run

pytestmark = pytest.mark.xdist_group("warm")  # one worker's server
PROGRAM = """
import atexit, os, signal, sys, threading, time
import beside
case = sys.argv[1]
atexit.register(print, "at exit", flush=True)
print(case, sys.argv[1:], os.getcwd(), __name__, __file__, sys.path[0], sys.stdin.read(), os.environ.get("NEW"), flush=True)
print("models of the project:", sorted({"model", "data", "losses", "rollout", "conftest"} & sys.modules.keys()))
print("threads", threading.active_count(), "files", len(os.listdir("/proc/self/fd")), sys.modules["__main__"].case, flush=True)
if case == "error":
    raise ValueError("a value")
elif case == "message":
    sys.exit("a message")
elif case == "code":
    sys.exit(7)
elif case == "abort":
    os.abort()
elif case == "handled":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print("waits", flush=True)
    time.sleep(60)
"""


def start(python, *command, **kwargs):
    return subprocess.Popen(list(map(str, [python, *command])), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            **{"env": ENVIRONMENT, "stdin": subprocess.PIPE, **kwargs})


@pytest.fixture
def program(tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "beside.py").touch()
    (tmp_path / "code" / "program.py").write_text(PROGRAM)
    return tmp_path / "code" / "program.py"


@pytest.mark.parametrize("case", ["fine", "error", "message", "code", "abort", "-c"])
def test_it_is_what_python_does(program, case):
    """Arguments, folder, standard files, environment, import path, exit code or signal, and what runs at exit."""
    ends = []
    for interpreter in (sys.executable, python()):
        how = [program] if case != "-c" else ["-c", f"import sys; sys.path.insert(0, 'code'); __file__ = 1\n{PROGRAM}"]
        child = start(interpreter, *how, case, "an argument", cwd=program.parent.parent, env=ENVIRONMENT | {"NEW": "1"})
        ends.append((*child.communicate("in"), child.returncode))
    (out, errors, code), (ours, our_errors, our_code) = ends
    assert (out, code) == (ours, our_code)
    assert errors.splitlines()[-1:] == our_errors.splitlines()[-1:]  # a traceback is the same but for warm.py's line


def test_signals(program):
    """SIGTERM is the program's to handle. A client that is killed, as at a timeout, leaves no process behind."""
    for number, code in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        child = start(python(), program, "handled", stdin=subprocess.DEVNULL)
        lines = iter(child.stdout.readline, "")
        assert any(line == "waits\n" for line in lines)
        child.send_signal(number)
        assert child.wait(30) == code
        assert ("at exit\n" in lines) == (code == 143)  # to the end of the pipe, which the process held
        child.stderr.read()


@pytest.mark.slow
def test_a_rank_and_its_cold_start(tmp_path):
    """torchrun, the rank that it starts, and the supervised start that the rank starts: the same metrics but for times."""
    found = []
    for name, interpreter in (("plain", sys.executable), ("warm", python())):
        run(interpreter, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", ROOT / "train_dpo.py",
            "--max_steps", 1, "--cold_start_steps", 1, "--output_dir", name, cwd=tmp_path)
        found.append([{k: v for k, v in json.loads(line).items() if not k.endswith("_time")}
                      for folder in (".", "cold_start") for line in open(tmp_path / name / folder / "metrics.jsonl")])
    assert found[0] == found[1] and len(found[0]) == 4

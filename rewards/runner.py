"""The trainer's end of the reward process: it starts process.py, asks it for rewards, and survives its end.

rollout.RewardRunner is this class with the program's errors and tensors. Nothing here imports torch.
"""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections import deque
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

from . import BUILT_IN


class ProcessLost(Exception):
    """The process hung, or died."""


class RewardRunner:
    """Reward functions in a process of their own, so that a hang or a crash there is none here.

    specs: names of built-in rewards, or "file.py:function". A function is called as in TRL,
    f(prompts=, completions=, **columns, trainer_state=): lists over the completions, and a state with
    global_step and max_steps. It gets what its signature takes, images only where that names them. It returns
    one finite number a completion, or None to abstain. No sandbox: it runs with this user's rights.

    A call that takes more than `timeout` seconds, or ends its process (a crash, exit, too much memory), is
    made again in a new one, completion by completion, each within a quarter of the limit. For those that hang
    or crash it alone the function abstains: they are named and counted (`failed`). Beyond MOST of the latest
    256, or MOST times the limit for a batch's completions, the run ends, before the other ranks would give up
    waiting. An exception, a wrong count or a number that is not finite is a fault of the function, and ends
    the run at once, in one line; a traceback is written to folder/reward_error.txt.
    """

    MOST = 12
    error, say, image_columns = ValueError, print, ("images",)

    def __init__(self, specs: list[str], timeout: float = 60.0, folder: str | Path = tempfile.gettempdir()):
        self.specs, self.timeout, self.folder = specs, timeout, Path(folder)
        self.max_steps = 0  # of the run, for functions that ask for trainer_state
        here = Path(__file__).resolve().parent
        self.paths = [str(here / BUILT_IN[spec]) if spec in BUILT_IN else spec for spec in specs]
        self.failed = 0  # completions of the latest `score` that a function hung or crashed on
        self.recent = [deque(maxlen=256) for _ in specs]  # whether it did, for the latest completions
        self._start()

    def _start(self):
        self.connection, theirs = multiprocessing.Pipe()
        program, fd = Path(__file__).resolve().with_name("process.py"), theirs.fileno()
        # -P: the files beside process.py cannot be imported by their bare names. process_group: what it
        # starts can be killed with it, and a terminal's ctrl-C does not reach it.
        self.process = subprocess.Popen([sys.executable, "-P", program, str(fd), *self.paths],
                                        stdin=subprocess.DEVNULL, pass_fds=[fd], process_group=0)
        theirs.close()
        self._end = weakref.finalize(self, end_process, self.process, self.connection, os.getpid())
        with suppress(OSError):  # it is gone already: `_ask` will say so
            self.connection.send(sys.path)
        self.ready = False

    def _ask(self, what: str, question, timeout: float):
        """Send a question (None: none), return its next answer; death or silence is ProcessLost."""
        try:
            if question is not None:
                self.connection.send(question)
            if not self.connection.poll(timeout):
                self.close()
                flag = " (--reward_timeout)" if self.ready else ""
                raise ProcessLost(f"{what}: no answer within {timeout:g} s{flag}; its process was killed")
            return json.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            with suppress(subprocess.TimeoutExpired):  # its exit code is its own, not that of being killed
                self.process.wait(5)
            self.close()
            raise ProcessLost(f"{what}: its process died (exit code {self.process.returncode})") from None

    def wait_until_ready(self):
        """Wait until a process has loaded every function; an error here is an error of the file."""
        if self.connection.closed:
            self._start()
        if self.ready:
            return
        what = f"loading rewards {', '.join(self.specs)}"
        try:
            status, *answer = self._ask(what, None, 300)
        except ProcessLost as error:  # of no completion's making
            raise self.error(str(error)) from None
        if status == "error":
            raise self.error(f"{what}: {answer[0]}{self._keep(answer[1])}")
        self.takes, self.ready = answer[0], True

    def _keep(self, traceback: str) -> str:
        """Write it to a file, and say to which."""
        if not traceback:
            return ""
        file = self.folder / "reward_error.txt"
        try:
            file.write_text(traceback, encoding="utf-8", errors="backslashreplace")
        except OSError as error:  # a full disk must not hide what is being reported
            return f"; its traceback cannot be written: {error}"
        return f"; traceback: {file}"

    def columns(self) -> set[str] | None:
        """The names of all columns that the functions take; None: every column."""
        every = any(others for _, others in self.takes)
        return None if every else {name for names, _ in self.takes for name in names}

    def question(self, index: int, columns: dict) -> tuple[int, dict, dict]:
        """What the function is called with: the columns it takes, and trainer_state. Pixels stay out of the
        pipe unless it names them."""
        names, others = self.takes[index]
        taken = {k: x for k, x in columns.items() if k in names or others and k not in self.image_columns}
        return index, taken, {"trainer_state": self.state} if others or "trainer_state" in names else {}

    def score(self, completions: list[str], rows: list[dict], step: int, global_step: int | None = None,
              **more) -> list[list]:
        """For each function its rewards, None where it abstained. rows: the dataset row of each completion;
        more: further columns, such as TRL's completion_ids. global_step: steps done, if they are not `step`.
        """
        columns = {k: [row.get(k) for row in rows] for row in rows for k in row if not k.startswith("_")}
        columns |= more | {"prompts": columns.pop("prompt"), "completions": completions}
        self.state = SimpleNamespace(global_step=step if global_step is None else global_step,
                                     max_steps=self.max_steps)
        self.failed = 0
        return [self._score_one(i, columns, rows, step) for i in range(len(self.specs))]

    def _score_one(self, index: int, columns: dict, rows: list[dict], step: int, alone=False) -> list:
        """The rewards of one function. After a lost process it is called for each completion, `alone`."""
        try:
            rewards = self._call(index, columns, rows, step, self.timeout / 4 if alone else self.timeout)
            self.recent[index] += [False] * len(rows)
            return rewards
        except ProcessLost as error:
            text = str(error)
        if self.process.returncode == -signal.SIGTERM:  # whoever ends the run ended this process as well
            raise self.error(text)
        if alone:
            return self._abstain(index, f"{text}; {which(columns, rows, 0)}")

        self.say(f"warning: {text}; its {len(rows)} completions are tried one by one")
        rewards, spent = [], 0.0
        for i in range(len(rows)):
            if spent > self.MOST * self.timeout:
                raise self.error(f"{text}; of its {len(rows)} completions, tried one by one, {i} took "
                                 f"{spent:.0f} s: raise --reward_timeout")
            self.wait_until_ready()  # a process that starts anew takes no time off
            began, one = time.monotonic(), {k: v[i:i + 1] for k, v in columns.items()}
            rewards += self._score_one(index, one, rows[i:i + 1], step, alone=True)
            spent += time.monotonic() - began
        return rewards

    def _abstain(self, index: int, text: str) -> list[None]:
        """No reward for a completion that the function hung or crashed on; too many of them are an error."""
        self.failed += 1
        self.recent[index].append(True)
        if sum(self.recent[index]) > self.MOST:
            raise self.error(f"{text}: the {self.MOST + 1}th of the latest 256 completions")
        self.say(f"warning: {text}: it abstains")
        return [None]

    def _call(self, index: int, columns: dict, rows: list[dict], step: int, timeout: float) -> list:
        """The rewards of one function, in one call of it."""
        self.wait_until_ready()
        what = f"reward {self.specs[index]}, step {step}"
        status, *answer = self._ask(what, self.question(index, columns), timeout)
        try:
            if status == "ok":
                return checked_rewards(answer[0], columns, rows)
        except ValueError as error:
            raise self.error(f"{what}: {error}") from None

        text, traceback = answer
        if "string indices must be integers" in text:
            text += " (completions are strings here, not message lists: no completion[0]['content'])"
        try:
            _, culprit = self._ask(what, None, timeout)
        except ProcessLost:  # the search took too long; the error of the batch says enough
            culprit = None
        where = f"a batch of {len(rows)} rows" if culprit is None else which(columns, rows, culprit)
        raise self.error(f"{what}: {text}; {where}{self._keep(traceback)}")

    def close(self):
        self._end()  # the first time only: later the process's number may be another's


def end_process(process: subprocess.Popen, connection, owner: int):
    """Kill a reward process and what it started: at close(), or at the end of its runner or the program."""
    if os.getpid() != owner:  # the end of a forked copy
        return
    with suppress(OSError):  # it is gone
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    connection.close()


def which(columns: dict, rows: list[dict], i: int) -> str:
    """Completion i in words."""
    return f"row {rows[i]['_source']}, completion {columns['completions'][i][:200]!r}"


def checked_rewards(result, columns: dict, rows: list[dict]) -> list:
    """The answer of process.plain_rewards, if it is a finite number or None for each row; else ValueError."""
    if not isinstance(result, list):
        raise ValueError(f"expected a list of {len(rows)} numbers, got {result}")
    if len(result) != len(rows):
        raise ValueError(f"expected {len(rows)} rewards, one a completion, got {len(result)}")
    for i, value in enumerate(result):
        if isinstance(value, str):
            raise ValueError(f"{value} is not a number; {which(columns, rows, i)}")
        if value is not None and not math.isfinite(value):
            raise ValueError(f"returned {value} (None abstains, nan does not); {which(columns, rows, i)}")
    return result

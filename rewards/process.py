"""The reward process: a program of its own that loads reward files and calls their functions.

    python process.py FD file.py:function ...        # started by runner.py; FD is its socket

It does not import torch, so that it starts at once and stays small; a reward file may import what it likes.
Questions come as pickles, answers go as JSON: nothing that a reward file made is unpickled in the trainer.
The trainer kills this process, and all that it started, when a call takes too long.

    trainer: sys.path              answer: ["ok", `parameters` of each function], once the files are loaded,
                                   or ["error", one line, traceback]
    trainer: (function's number,   answer: ["ok", `plain_rewards`], or the error, and then
              columns, settings)           ["row", the first row that raises by itself]
"""

import ctypes
import importlib.util
import inspect
import json
import math
import os
import re
import resource
import signal
import sys
import traceback
import types
import zlib
from contextlib import suppress
from multiprocessing.connection import Connection

MEMORY = 2 << 30  # bytes that the functions may take beyond what loading their files took


class LoadError(Exception):
    """There is no such file, or no such function in it."""


def load_function(spec: str):
    """'file.py:function' -> the function. The file is loaded by its path, once for all of its functions."""
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not os.path.isfile(path):
        raise LoadError(f"reward {spec}: no such file {path!r} "
                        "(expected a built-in name or path/to/file.py:function)")
    module = load_file(path)
    if not callable(getattr(module, name, None)):
        raise LoadError(f"reward {spec}: {path} has no function {name!r}")
    return getattr(module, name)


def load_file(path: str):
    """The module of a file. Its folder is given a name that nothing else has, as a package: so two files of
    one name do not meet, and `from .other import f` works in it."""
    folder, file = os.path.split(os.path.realpath(path))
    package = f"reward_{zlib.crc32(folder.encode()):08x}"
    name = f"{package}.{file.removesuffix('.py').replace('.', '_')}"
    if name in sys.modules:
        return sys.modules[name]

    if package not in sys.modules:
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [folder]
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def allow_helpers(paths: list[str]):
    """Files beside a reward file can be imported in it, as beside a script (not beside the built-in ones)."""
    folders = dict.fromkeys(os.path.dirname(os.path.realpath(path)) for path in paths)
    own = os.path.dirname(os.path.realpath(__file__))
    sys.path[:0] = [folder for folder in folders if folder != own and folder not in sys.path]


def parameters(function) -> tuple[list[str], bool]:
    """The names of what the function takes, and whether it takes all others as well (**kwargs; `**_` is the
    name for what is not used)."""
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C
        return [], True
    return [p.name for p in found], any(p.kind is p.VAR_KEYWORD and p.name != "_" for p in found)


def plain_rewards(result):
    """What a function returned, as a list of floats and None. A string says what there is instead: of a whole
    result the type, in the list the repr of what is no number."""
    if isinstance(result, types.CoroutineType):  # of an `async def`
        import asyncio
        result = asyncio.run(result)
    if isinstance(result, types.GeneratorType):
        result = list(result)
    if hasattr(result, "tolist"):  # an array or a tensor of any library
        shape = tuple(getattr(result, "shape", ()))
        result = (result.reshape(-1) if len(shape) == 2 and shape[1] == 1 else result).tolist()
    if not isinstance(result, (list, tuple)):
        return type(result).__name__
    return [plain_number(value) for value in result]


def plain_number(value):
    """float, None, or the repr of what is no number."""
    if value is None:
        return None
    try:
        is_single = math.prod(getattr(value, "shape", (2,))) == 1  # an array of one element
        return float(value.item() if is_single else value)
    except (TypeError, ValueError, OverflowError):
        return f"{value!r:.200}"


def first_to_raise(function, columns: dict, settings: dict) -> int | None:
    """The first row on which the function raises by itself; None if it raises on none."""
    for i in range(len(next(iter(columns.values()), ()))):
        try:
            plain_rewards(function(**{name: column[i:i + 1] for name, column in columns.items()}, **settings))
        except Exception:
            return i
    return None


def describe(error: BaseException, paths: list[str]) -> tuple[str, str]:
    """(one short line that says where in a reward file it was raised, the whole traceback)"""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    if len(text) > 300:
        text = f"{text[:300]} ... ({len(text):,} characters)"
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in paths]
    if lines:
        text += f" ({lines[-1].filename}, line {lines[-1].lineno})"
    return text, "".join(traceback.format_exception(error))


def end_with_parent():
    """Ask Linux to kill this process when the trainer is gone, and to take it first when memory runs out."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")


def limit_memory():
    """A function that takes MEMORY more than is in use now gets a MemoryError. Linux only."""
    if sys.platform != "linux":
        return
    with open("/proc/self/status") as file:
        in_use = re.search(r"VmData:\s+(\d+) kB", file.read())
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    if in_use and hard == resource.RLIM_INFINITY:  # not RLIMIT_AS: CUDA libraries map far more than they use
        resource.setrlimit(resource.RLIMIT_DATA, (1024 * int(in_use[1]) + MEMORY, hard))


def main(fd: int, specs: list[str]):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is the trainer's to handle
    end_with_parent()
    sys.stdout.reconfigure(line_buffering=True)  # what a function prints is seen before it hangs
    connection = Connection(fd)
    # What a function starts must not hold the socket: the trainer sees by its end that this process is gone.
    os.set_inheritable(fd, False)
    os.register_at_fork(after_in_child=connection.close)

    def answer(*message):
        connection.send_bytes(json.dumps(message).encode())

    sys.path[:] = connection.recv()
    paths = [spec.rpartition(":")[0] for spec in specs]
    try:
        allow_helpers(paths)
        functions = [load_function(spec) for spec in specs]
    except LoadError as error:
        return answer("error", str(error), "")
    except BaseException as error:  # of the file, sys.exit() too
        return answer("error", *describe(error, paths))
    limit_memory()
    answer("ok", [parameters(function) for function in functions])

    while True:
        index, columns, settings = connection.recv()
        try:
            answer("ok", plain_rewards(functions[index](**columns, **settings)))
        except MemoryError:  # a limit as that of time: this process ends, the run goes on
            raise
        except Exception as error:
            answer("error", *describe(error, paths))  # at once: the search may take long
            answer("row", first_to_raise(functions[index], columns, settings))


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), sys.argv[2:])
    except (EOFError, ConnectionError):  # the trainer is gone
        os.killpg(0, signal.SIGKILL)
elif __name__ == "__mp_main__":  # a process that a reward started by spawn looks for the file's functions
    for spec in sys.argv[2:]:
        load_function(spec)

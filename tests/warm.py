"""A Python that starts at once: a server imports torch and transformers one time, and forks for each command line.

    python warm.py FOLDER          # the server: it writes FOLDER/python, and ends when its standard input does
    FOLDER/python script.py ...    # its client: what `python script.py ...` does, in a new process of its own

The new process has the client's files, folder and environment. The client passes signals on to it and ends as it
does: with its exit code, or by its signal. If the client is killed, so is the process. The server imports nothing of the
project: each run reads its own checkout. sys.executable is FOLDER/python, so that ranks and a cold start are
forked, too. Python itself runs what a fork could not do alike: other options of Python, and an environment that
differs in what libraries read when they are imported.
"""

import json
import os
import signal
import socket
import sys

READ_AT_IMPORT = ("PYTHON", "LD_", "OMP_", "MKL_", "KMP_", "HF_", "TRANSFORMERS_")


def read_at_import():
    return {name: value for name, value in os.environ.items() if name.startswith(READ_AT_IMPORT)}


def client(folder, served):
    """What FOLDER/python runs. `served`: what libraries have read of the server's environment."""
    arguments = sys.argv[1:][sys.argv[1:2] == ["-u"]:]
    able = arguments and (arguments[0] in ("-m", "-c") or not arguments[0].startswith("-"))
    if not able or read_at_import() != served:
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])

    passed_on = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    signal.pthread_sigmask(signal.SIG_BLOCK, passed_on)  # until there is a process to pass them on to
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.connect(f"{folder}/socket")
    socket.send_fds(server, [json.dumps([arguments, os.getcwd(), dict(os.environ)]).encode()], [0, 1, 2])
    pid = int(server.recv(99))
    for number in passed_on:
        signal.signal(number, lambda number, _: os.kill(pid, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, passed_on)

    code = int(server.recv(99))
    if code < 0:  # of a signal
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def import_libraries(root):
    """What the project's files import at their top, but no file of its own; and all that they import of transformers."""
    own = {path.stem for path in root.iterdir()}
    for file in root.glob("*.py"):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                package = names[0].split(".")[0]
                if package == "transformers" or node in tree.body and package not in own:
                    exec(ast.unparse(node), {})


def serve(folder):
    """Forks for each client. Returns in the new process alone, with the connection to its client."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"{folder}/socket")
    listener.listen(64)
    print("ready", flush=True)
    poll, running = select.poll(), {}  # {descriptor of a process: (its id, its client)}
    poll.register(0, 0)  # 0: only the end is waited for, here and for clients
    poll.register(listener, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():
            if descriptor == 0:
                for pid, _ in running.values():
                    os.kill(pid, signal.SIGKILL)
                shutil.rmtree(folder)
                os._exit(0)
            elif descriptor == listener.fileno():
                connection, _ = listener.accept()
                pid = os.fork()
                if not pid:
                    for other in (listener, *(client for _, client in running.values())):
                        other.close()
                    for other in running:
                        os.close(other)
                    return connection
                running[os.pidfd_open(pid)] = pid, connection
                poll.register(next(reversed(running)), select.POLLIN)
                poll.register(connection, 0)
            elif descriptor in running:
                pid, connection = running.pop(descriptor)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                poll.unregister(descriptor), os.close(descriptor)
                poll.unregister(connection)
                with suppress(OSError), connection:
                    connection.send(str(code).encode())
            else:
                for pid, connection in running.values():
                    if connection.fileno() == descriptor:
                        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    import ast
    import gc
    import runpy
    import select
    import shutil
    from contextlib import suppress
    from pathlib import Path
    from types import ModuleType

    folder, here = sys.argv[1], Path(__file__).resolve().parent
    program = Path(folder, "python")
    program.write_text(f"#!{sys.executable} -IS\nimport sys\nsys.path.insert(0, {str(here)!r})\n"
                       f"import warm\nwarm.client({folder!r}, {read_at_import()})\n")
    program.chmod(0o700)
    import_libraries(here.parent)
    gc.freeze()  # or each process looks through all that was imported when it ends: one CPU second
    connection = serve(folder)

    message, files, *_ = socket.recv_fds(connection, 1 << 20, 3)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.setsid()
    connection.send(str(os.getpid()).encode())
    connection.close()
    arguments, cwd, environment = json.loads(message)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.executable = str(program)
    sys.argv = arguments
    if arguments[0] == "-m":
        sys.argv, sys.path[0] = arguments[1:], cwd
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        server = sys.modules["__main__"]  # kept, or what it defines would be cleared
        main = sys.modules["__main__"] = ModuleType("__main__")
        if arguments[0] == "-c":
            sys.path[0], text, name = "", arguments.pop(1), "<string>"
        else:
            sys.path[0] = os.path.dirname(os.path.realpath(arguments[0]))
            text, name = Path(arguments[0]).read_bytes(), os.path.abspath(arguments[0])
            main.__file__ = name
        exec(compile(text, name, "exec"), main.__dict__)

"""Methods of papers, one file each, and how `--algo NAME [NAME ...]` finds them (GUIDE.md, "Fork it").

A file of one's own, anywhere on disk, is as good as one that stands here: `--algo path/to/mine.py`.
"""

import dataclasses
import hashlib
import importlib.util
import re
import sys
from pathlib import Path

import losses

PAPERS = Path(__file__).parent
TABLES = ("PAIR_LOSSES", "ADVANTAGES", "POLICY_LOSSES", "GROUP_LOSSES")  # of losses.py


def load_method(name: str, script: str):
    """A method that --algo names: papers/NAME.py, or the path of anybody's own file. -> its module

    The file says which SCRIPT it is for, and may bring what GUIDE.md lists: PRESET, Flags, entries for the
    tables of losses.py, which are added there, `check`, STATE and the hooks that the loops call (`hooks`).
    """
    file = Path(name) if name.endswith(".py") else PAPERS / f"{name}.py"
    if not file.is_file():
        raise ValueError(f"--algo {name}: no such file" if name.endswith(".py") else
                         f"--algo {name}: neither a preset nor a file of papers/ (your own ends in .py)")
    own = file.resolve().parent != PAPERS.resolve()
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]  # two files of one name are two modules
    full_name = f"method_{digest}_{file.stem}" if own else f"papers.{file.stem}"
    if full_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(full_name, file)
        module = sys.modules[full_name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[full_name]
            raise
    module = sys.modules[full_name]
    if getattr(module, "SCRIPT", None) != script:
        raise ValueError(f"--algo {name} is for {module.SCRIPT}" if hasattr(module, "SCRIPT") else
                         f'--algo {name}: the file does not say which script it is for: SCRIPT = "{script}"')
    for table in TABLES:
        getattr(losses, table).update(getattr(module, table, {}))
    if hasattr(module, "Flags"):
        module.Flags = dataclasses.dataclass(module.Flags)
        module.Flags.SECTION = f"--algo {name}"
    return module


def papers_for(script: str) -> str:
    """The names of the files of papers/ that are for this script."""
    return ", ".join(file.stem for file in sorted(PAPERS.glob("[a-z]*.py"))
                     if f'SCRIPT = "{script}"' in file.read_text())


def hooks(args, name: str) -> list:
    """The functions (or values) `name` of the files that --algo names, in their order."""
    return [getattr(method, name) for method in args.methods if hasattr(method, name)]


def check_methods(args):
    """What --algo's files check themselves; and a file whose losses nobody takes would change nothing."""
    kinds = [args.loss_type] if isinstance(args.loss_type, str) else args.loss_type
    for method in args.methods:
        brings = [name for table in TABLES for name in getattr(method, table, {})]
        if brings and not {*brings} & {*kinds, getattr(args, "advantage_estimator", None)}:
            flag = "--advantage_estimator" if hasattr(method, "ADVANTAGES") else "--loss_type"
            raise ValueError(f"--algo {' '.join(args.algo)}: nothing uses what {Path(method.__file__).name} "
                             f"brings; name it: {flag} ... {' or '.join(brings)}")
    if len(hooks(args, "row_of")) > 1:
        raise ValueError(f"--algo {' '.join(args.algo)}: two files say which rows come next")
    for check in hooks(args, "check"):
        check(args)


def flags_of_methods() -> dict[str, str]:
    """{flag: the file of papers/ that brings it}, without running the files."""
    found = {}
    for file in sorted(PAPERS.glob("[a-z]*.py")):
        _, _, flags = file.read_text().partition("class Flags:")
        for name in re.findall(r"^    (\w+): ", flags.partition("\n\n\n")[0], re.M):
            found[f"--{name}"] = file.stem
    return found

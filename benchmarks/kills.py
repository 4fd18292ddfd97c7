"""Kill runs at random moments, start the same command again, and compare with a run that was left alone.

    python benchmarks/kills.py runs/kills                                  # every case, on one rank and two: an hour
    python benchmarks/kills.py runs/kills --cases grpo mpo --ranks 2 --kills 20

Every kill draws a moment (while the run starts, or soon after it has logged some steps more), a signal
(SIGKILL, SIGTERM, SIGINT) and a target (one rank, the launcher, all processes). Metrics, sampled texts and final
weights must be bit-equal to those of the run that nobody killed. Prints a markdown row a case.
"""

import argparse
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402

REWARDS = """def spread(completions, **_):
    return [float(sum(map(ord, text)) % 11) for text in completions]

def rare(completions, **_):
    return [float(sum(map(ord, text)) % 5 == 0) for text in completions]
"""
COMMON = ("--model_name_or_path ../start --save_steps 2 --eval_steps 20 --max_completion_length 12 --warmup_steps 5 "
          "--per_device_eval_batch_size 128 --device cpu --max_steps 60 --learning_rate 3e-4 ")
OFFLINE = "train_dpo.py " + COMMON + "--gradient_accumulation_steps 2 "
ONLINE = "train_grpo.py " + COMMON + "--num_generations 4 --reward_funcs ../rewards.py:spread "
CASES = {  # OWN in a flag: a folder that each run has for itself
    "mpo, own cache": OFFLINE + "--algo mpo --ref_cache OWN",
    "mpo, shared cache": OFFLINE + "--algo mpo --ref_cache ../one_cache",
    "dpo, LoRA with DoRA": OFFLINE + "--algo dpo --lora_r 4 --use_dora --ref_cache OWN",
    "grpo, dynamic sampling": ONLINE + "--algo grpo --beta 0.05 --dynamic_sampling 2 --reward_funcs ../rewards.py:rare",
    "gspo": ONLINE + "--algo gspo --steps_per_generation 3 --beta 0.05",
    "online_dpo": ONLINE + "--algo online_dpo"}


def start(folder: Path, case: str, ranks: int, name: str):
    """The case's run in folder/name, started there."""
    script, *flags = CASES[case].replace("OWN", f"{name}_cache").split()
    size = ("--per_device_train_batch_size", str((16 if script == "train_grpo.py" else 8) // ranks))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    with open(folder / f"{name}.log", "a") as log:
        return subprocess.Popen([sys.executable, *launcher, str(ROOT / script), *flags, *size, "--output_dir", name],
                                cwd=folder, stdout=log, stderr=log,
                                env=os.environ | {"OMP_NUM_THREADS": "1"})


def processes_in(folder: Path, word: str = "") -> list[int]:
    """The live processes that were started in this folder and have the word in their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().decode(errors="replace")
            if command and word in command and (process / "cwd").resolve() == folder.resolve():
                found.append(int(process.name))
        except OSError:
            pass  # it has ended, or is not ours
    return found


def kill(process, folder: Path, script: str, rng) -> str:
    """Send one signal. -> its name and target, "" if the run had ended"""
    name, target = rng.choice(("SIGKILL", "SIGTERM", "SIGINT")), rng.choice(("rank", "launcher", "all"))
    ranks = [pid for pid in processes_in(folder, script) if pid != process.pid] or [process.pid]
    if process.poll() is not None:
        return ""
    for pid in {"rank": [rng.choice(ranks)], "launcher": [process.pid], "all": processes_in(folder)}[target]:
        try:
            os.kill(pid, getattr(signal, name))
        except ProcessLookupError:
            pass  # the signal before has ended it
    return f"{name[3:]} {target}"


def wait_until_gone(process, folder: Path):
    """Ranks outlive a launcher that was killed until they next ask its store."""
    process.wait()
    for _ in range(600):
        if not processes_in(folder):
            return
        time.sleep(0.1)
    sys.exit(f"processes {processes_in(folder)} were left in {folder} for a minute")


def lines_of(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def results(output: Path):
    metrics = [{k: v for k, v in json.loads(line).items() if not k.endswith("_time")}
               for line in open(output / "metrics.jsonl")]
    texts = {file.name: file.read_text() for file in (output / "completions").iterdir()}
    return metrics, texts, load_file(output / "final" / "model.safetensors")


def compare(folder: Path, case: str, ranks: int, kills: int, rng) -> str:
    """One case: the run that is left alone, the killed one, what differs. -> its markdown row"""
    folder.mkdir()
    if start(folder, case, ranks, "whole").wait():
        sys.exit(f"the run that nobody killed failed; see {folder / 'whole.log'}")
    output, script, sent = folder / "killed", CASES[case].split()[0], []
    while not (output / "status.json").exists() or json.loads((output / "status.json").read_text())["status"] != "done":
        process, file, began = start(folder, case, ranks, "killed"), output / "metrics.jsonl", time.monotonic()
        sent_now = ""
        if len(sent) < kills:
            early, goal = rng.random() < 0.2, lines_of(file) + rng.randint(2, 7)
            limit = rng.uniform(1, 6) if early else math.inf
            while process.poll() is None and time.monotonic() - began < limit and lines_of(file) < goal:
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 0.4))
            sent_now = kill(process, folder, script, rng)
            sent += [sent_now] if sent_now else []
        wait_until_gone(process, folder)
        if process.returncode and not sent_now:
            sys.exit(f"a run that was started again failed; see {folder / 'killed.log'}")
    whole, killed = results(folder / "whole"), results(output)
    weights = whole[2].keys() == killed[2].keys() and all(whole[2][k].equal(killed[2][k]) for k in whole[2])
    differ = [name for name, same in (("metrics", whole[0] == killed[0]), ("texts", whole[1] == killed[1]),
                                     ("weights", weights)) if not same]
    return f"| {case} | {ranks} | {len(sent)}: {', '.join(sent)} | {'differ: ' + ', '.join(differ) if differ else 'all equal'} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="beginnings of the cases' names")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    data.build_tiny_vlm(args.folder / "start")
    (args.folder / "rewards.py").write_text(REWARDS)
    rows = []
    for ranks in args.ranks:
        for case in (case for case in CASES if case.startswith(tuple(args.cases))):
            folder = args.folder / f"{case.replace(', ', '-').replace(' ', '_')}-{ranks}"
            rows.append(compare(folder, case, ranks, args.kills, random.Random(f"{args.seed} {case} {ranks}")))
            print(rows[-1], flush=True)
    sys.exit(any("differ" in row for row in rows))


if __name__ == "__main__":
    main()

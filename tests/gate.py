"""Run two checkouts on one machine and compare all that they compute.

    git worktree add ../before HEAD~1
    python tests/gate.py ../before .                              # OLD NEW: all cases, 20 to 40 minutes
    python tests/gate.py ../before . --only mpo grpo --threads 1  # some cases, on one thread

Every case is one command line of train_dpo.py or train_grpo.py. Each side runs its own script from the same
start model and data. Then the weights in final/ must be the same bit for bit, and so must every value in
metrics.jsonl except the times. No hash is kept: the last bits of a float depend on the CPU, so both sides run
here. A case also fails if it proves nothing: its weights must have moved, some gradient must be above 0, and
rewards must differ within a group. The start model is this checkout's tiny one, trained with OLD.

The gate also prints CPU seconds a step of both sides. They are the user and system time of the whole command
and of the processes it waits for, so start-up is in them. The step times below them are wall-clock seconds
from metrics.jsonl, so start-up is not in them. The exit code is 0 only if every case is equal.
"""

import argparse
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402

# Flags of CASES that NEW spells in another way, each with the arguments that NEW takes instead of it.
# {"--a": ["--b"]} renames a flag and keeps its values; {"--a 1": ["--b", "2"]} replaces flag and value.
MOVED = {}

# WORK in a flag stands for the folder that holds the start model, the data and the reward functions.
DATA = ("--dataset WORK/rows.jsonl --eval_dataset WORK/held_out.jsonl --image_root WORK --device cpu "
        "--output_dir out --max_completion_length 24 --learning_rate 1e-3 ")
START = "train_dpo.py " + DATA + "--model_name_or_path WORK/tiny --algo sft --per_device_train_batch_size 16 --max_steps 40"
FROM_START = DATA + "--model_name_or_path WORK/start/out/final --max_steps 4 "
OFFLINE = "train_dpo.py " + FROM_START + "--per_device_train_batch_size 8 "
ONLINE = ("train_grpo.py " + FROM_START + "--per_device_train_batch_size 16 --num_generations 4 "
          "--reward_funcs WORK/rewards.py:spread accuracy ")
GUIDE = OFFLINE + "--algo dpo"
CASES = {  # a flag that stands twice counts as the last one says
    "mpo": OFFLINE + "--algo mpo --gradient_accumulation_steps 2",
    "dpo_lora": OFFLINE + "--algo dpo --lora_r 4",
    "dpo_dora": OFFLINE + "--algo dpo --lora_r 4 --use_dora",
    "sft_budget": OFFLINE + "--algo sft --max_tokens_per_batch 200",
    "tgdpo": OFFLINE + "--algo tgdpo --guide_model WORK/guide/out/final",
    "lcpo": OFFLINE + "--algo lcpo",
    "modpo": OFFLINE + "--algo modpo",
    "cosine": OFFLINE + "--algo dpo --lr_scheduler_type cosine --warmup_steps 7 --max_steps 10",
    "grpo": ONLINE + "--algo grpo --gradient_accumulation_steps 2",
    "grpo_lora": ONLINE + "--algo grpo --beta 0.1 --lora_r 4",
    "gspo": ONLINE + "--algo gspo --max_steps 8",  # four updates a rollout: two rollouts
    "rloo": ONLINE + "--algo rloo",
    "online_dpo": ONLINE + "--algo online_dpo",
    "dapo": ONLINE + "--algo dapo --dynamic_sampling 2 --reward_funcs WORK/rewards.py:rare",
    "gtpo": ONLINE + "--algo gtpo",
    "disco": ONLINE + "--algo disco",
    "variance": ONLINE + "--algo grpo variance_sampling --variance_sampling 0.5 --max_steps 8",
    "moving_ref": ONLINE + "--algo grpo moving_reference --beta 0.1 --ref_model_sync_steps 2 --max_steps 5",
    "ranks_grpo": ONLINE + "--algo grpo",
    "ranks_mpo": OFFLINE + "--algo mpo",
    "killed": ONLINE + "--algo grpo --steps_per_generation 3 --max_steps 8 --save_steps 1",
}
REWARDS = """def spread(completions, **_):
    return [float(sum(map(ord, text)) % 11) for text in completions]

def rare(completions, **_):
    return [float(sum(map(ord, text)) % 3 == 0) for text in completions]
"""


def write_data(work: Path):
    """Rows with no, one or two pictures, answers of uneven length, and the number that modpo takes."""
    rng = random.Random(0)
    for name, count in (("rows", 24), ("held_out", 6)):
        with open(work / f"{name}.jsonl", "w") as file:
            for i in range(count):
                images, dots = [f"{name}-{i}-{j}.png" for j in range((1, 0, 2)[i % 3])], i % 6 + 1
                for image in images:
                    picture = Image.new("RGB", (48, rng.choice((32, 48))), "white")
                    for x in rng.sample(range(0, 48, 8), dots):
                        ImageDraw.Draw(picture).ellipse((x, 9, x + 7, 16), fill=rng.choice(("red", "blue")))
                    picture.save(work / image)
                row = {"prompt": "how many shapes are there?", "images": images, "solution": str(dots),
                       "chosen": f"<think>i see {'many ' * (i % 4)}shapes</think><answer>{dots}</answer>",
                       "rejected": f"<answer>{'7' * (1 + i % 5)}</answer>", "margin": rng.uniform(-1, 3)}
                file.write(json.dumps(row) + "\n")
    (work / "rewards.py").write_text(REWARDS)


def new_spelling(flags: list[str]) -> list[str]:
    """The flags as NEW takes them, by the table MOVED."""
    changed = []
    for part in " ".join(flags).split("--")[1:]:  # a flag with its values
        flag, *values = ("--" + part).split()
        whole = " ".join([flag, *values])
        changed += MOVED[whole] if whole in MOVED else [*MOVED.get(flag, [flag]), *values]
    return changed


def start(command: list[str], folder: Path, threads: int):
    folder.mkdir(exist_ok=True)
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    with open(folder / "log.txt", "a") as log:
        return subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)


def wait(process) -> float:
    """Wait for its end. -> its CPU seconds, with those of the processes that it waited for."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_utime + usage.ru_stime


def wait_and_kill(process, metrics: Path) -> float:
    """Kill it after step 5, which is in the middle of a rollout. -> its CPU seconds."""
    while not (metrics.exists() and metrics.read_text().count("\n") >= 6):  # steps 0 to 5
        if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break  # it has ended
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    return wait(process)


def run(checkout: Path, case: str, folder: Path, threads: int, name="", is_new=False) -> float:
    """Run a command in a folder of its own, with its output in log.txt there. -> its CPU seconds

    The case `killed` dies once and is started again."""
    script, *flags = case.split()
    flags = [word.replace("WORK", str(folder.parent)) for word in (new_spelling(flags) if is_new else flags)]
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *(ranks if name.startswith("ranks") else []), str(checkout / script), *flags]
    seconds = 0.0
    if name == "killed":
        seconds = wait_and_kill(start(command, folder, threads), folder / "out" / "metrics.jsonl")
    process = start(command, folder, threads)
    seconds += wait(process)
    log = (folder / "log.txt").read_text(errors="replace")
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}, and its last lines are:\n{log[-2000:]}")
    if name == "killed" and "resumed from" not in log:
        raise RuntimeError("it ended before it could be killed, or it did not resume")
    return seconds


def read_run(folder: Path):
    """-> ({name: tensor} of all of final/, [metrics of each line])"""
    tensors = {}
    for file in sorted((folder / "out" / "final").rglob("*.safetensors")):
        tensors |= {f"{file.name}: {name}": tensor for name, tensor in load_file(file).items()}
    return tensors, [json.loads(line) for line in open(folder / "out" / "metrics.jsonl")]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(x.contiguous().view(-1).view(torch.uint8) for x in (a, b)))


def same_value(a, b) -> bool:
    """NaN and None are the same: both say that there is no number."""
    a, b = (None if isinstance(x, float) and math.isnan(x) else x for x in (a, b))
    return a == b


def faults_of(tensors, metrics, start_tensors, online: bool) -> list[str]:
    """Why a comparison of this run would prove nothing."""
    faults = []
    if all(same_bits(tensors[name], start_tensors[name]) for name in tensors.keys() & start_tensors.keys()):
        faults.append("no weight has moved")
    for key in ["grad_norm"] + ["reward_std"] * online:
        if not any((line.get(key) or 0) > 0 for line in metrics):
            faults.append(f"{key} is never above 0")
    return faults


def compare(old, new) -> list[str]:
    """What differs between two runs: the first tensor, the first metric, what only one side has."""
    (old_tensors, old_lines), (new_tensors, new_lines), found = old, new, []
    if len(old_lines) != len(new_lines):
        found.append(f"metrics.jsonl has {len(old_lines)} and {len(new_lines)} lines")
    old_keys, new_keys = (dict.fromkeys(key for line in lines for key in line if not key.endswith("_time"))
                          for lines in (old_lines, new_lines))
    for what, a, b in (("tensors", old_tensors, new_tensors), ("metrics", old_keys, new_keys)):
        for side, names in (("OLD", a.keys() - b.keys()), ("NEW", b.keys() - a.keys())):
            if names:
                found.append(f"{what} of {side} alone: {', '.join(sorted(names))[:200]}")
    pairs = [(name, a, new_tensors[name]) for name, a in old_tensors.items() if name in new_tensors]
    differ = [pair for pair in pairs if not same_bits(*pair[1:])]
    if differ:
        name, a, b = differ[0]
        gap = (f"max abs difference {(a.double() - b.double()).abs().max():.3g}" if a.shape == b.shape
               else f"shapes {tuple(a.shape)} and {tuple(b.shape)}")
        found.append(f"{len(differ)} of {len(pairs)} tensors, first {name}, {gap}")
    values = [(f"{key} at step {a.get('step')}", a.get(key, "absent"), b.get(key, "absent"))
              for a, b in zip(old_lines, new_lines) for key in old_keys if key in new_keys]
    differ = [f"{where}: {x} and {y}" for where, x, y in values if not same_value(x, y)]
    if differ:
        found.append(f"{len(differ)} of {len(values)} metric values, first {differ[0]}")
    return found


def run_both(sides: dict, order: list[str], name: str, work: Path, threads: int):
    """One case on both sides. -> (what is wrong, [CPU seconds a step, wall seconds] of each side, size)"""
    start_tensors, _ = read_run(work / "start")
    results, seconds, wrong = {}, {}, []
    for side in order:
        folder = work / f"{name}-{threads}-{side}"
        try:
            cpu = run(sides[side], CASES[name], folder, threads, name, side == "NEW")
            results[side] = tensors, metrics = read_run(folder)
        except (RuntimeError, OSError, ValueError) as reason:
            wrong.append(f"{side}: {reason}")
            continue
        steps = metrics[-1]["step"]
        seconds[side] = cpu / steps, sum(line.get("step_time", 0.0) for line in metrics) / steps
        online = CASES[name].startswith("train_grpo.py")
        wrong += [f"{side}: {fault}" for fault in faults_of(tensors, metrics, start_tensors, online)]
    if len(results) < 2:
        return wrong, None, ""
    tensors, metrics = results["OLD"]
    size = f"{len(tensors)} tensors, {sum(map(len, metrics))} values"
    return wrong + compare(results["OLD"], results["NEW"]), [seconds["OLD"], seconds["NEW"]], size


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES), metavar="NAME",
                        help="cases to run; default: all, " + " ".join(CASES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="values of OMP_NUM_THREADS")
    args = parser.parse_args()
    sides, order = {"OLD": args.old.resolve(), "NEW": args.new.resolve()}, ["OLD", "NEW"]
    timed, bad = {threads: [] for threads in args.threads}, 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_data(work)
        data.build_tiny_vlm(work / "tiny")
        run(sides["OLD"], START, work / "start", threads=2)
        if "tgdpo" in args.only:
            run(sides["OLD"], GUIDE, work / "guide", threads=2)
        for name in args.only:
            for threads in args.threads:
                wrong, seconds, size = run_both(sides, order, name, work, threads)
                order.reverse()  # so that neither side is always the first
                bad += bool(wrong)
                line = f"{name}, threads {threads}: {'; '.join(wrong) or f'equal ({size})'}"
                if seconds is not None:
                    timed[threads].append(seconds)
                    line += "; CPU s a step {:.2f} and {:.2f}".format(*(cpu for cpu, _ in seconds))
                print(line, flush=True)
    for threads, pairs in timed.items():
        for i, what in enumerate(("CPU seconds a step with start-up", "wall seconds a step")):
            if pairs:
                old, new = (statistics.median(side[i] for side in both) for both in zip(*pairs))
                numbers = f"median OLD {old:.3f}, NEW {new:.3f}, ratio {new / old:.3f}"
                print(f"threads {threads}, {what}: {numbers}")
    print(f"{bad} comparisons differ, failed or prove nothing" if bad else "all equal")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

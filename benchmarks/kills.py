"""Kill a run with SIGKILL at random moments, start the same command again, compare with a run that was left alone.

    python benchmarks/kills.py runs/kills --kills 20         # about ten minutes on two shared cores

The run is GRPO on a tiny model: 90 steps, three updates a rollout, a reference, held-out rows, a checkpoint every second
step. Prints how many kills there were, in which phases they fell, and whether losses, rewards, sampled texts and final
weights are bit-equal to the uninterrupted run's.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402


def start(folder: Path, name: str):
    command = [sys.executable, str(ROOT / "train_grpo.py"), "--model_name_or_path", str(folder / "start"),
               "--output_dir", str(folder / name), "--num_generations", "4", "--per_device_train_batch_size", "32",
               "--steps_per_generation", "3", "--beta", "0.05", "--max_steps", "90", "--save_steps", "2",
               "--max_completion_length", "24", "--eval_steps", "10", "--per_device_eval_batch_size", "128",
               "--learning_rate", "3e-4", "--warmup_steps", "5", "--seed", "0"]
    log = open(folder / f"{name}.log", "a")
    return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})


def results(output: Path):
    metrics = [{k: v for k, v in json.loads(line).items() if not k.endswith("_time")}
               for line in open(output / "metrics.jsonl")]
    texts = {file.name: file.read_text() for file in (output / "completions").iterdir()}
    return metrics, texts, load_file(output / "final" / "model.safetensors")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    data.build_tiny_vlm(args.folder / "start")
    if start(args.folder, "whole").wait():
        sys.exit(f"the uninterrupted run failed; see {args.folder / 'whole.log'}")
    whole, rng, kills, at = results(args.folder / "whole"), random.Random(args.seed), 0, []
    while not (args.folder / "killed" / "final").exists():
        process, file = start(args.folder, "killed"), args.folder / "killed" / "metrics.jsonl"
        if kills < args.kills:
            lines = len(file.read_text().splitlines()) if file.exists() else 0
            while process.poll() is None and (not file.exists() or len(file.read_text().splitlines()) <= lines):
                time.sleep(0.02)  # loading is done: the kills are to fall into the work
            time.sleep(rng.uniform(0, 1.5))
            if process.poll() is None:
                process.kill()
                kills += 1
                at.append(len(file.read_text().splitlines()) - 1)
        if process.wait() > 0:
            sys.exit(f"a resumed run failed; see {args.folder / 'killed.log'}")
    killed = results(args.folder / "killed")
    weights = whole[2].keys() == killed[2].keys() and all(whole[2][k].equal(killed[2][k]) for k in whole[2])
    print(f"{kills} SIGKILLs, at steps {at}")
    print(f"metrics of {len(whole[0]) - 1} steps equal: {whole[0] == killed[0]}")
    print(f"sampled texts equal: {whole[1] == killed[1]}   weights bit-equal: {weights}")


if __name__ == "__main__":
    main()

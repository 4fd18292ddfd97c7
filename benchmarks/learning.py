"""Does every --algo learn? Each preset of both scripts and each file of papers/ that has one, from one cold-started tiny model per seed, on `shapes`.

    python benchmarks/learning.py runs/learning                       # every preset, seeds 0 1 2: an hour or so
    python benchmarks/learning.py runs/learning --algos rloo simpo    # some
    python benchmarks/learning.py runs/curves --algos mpo grpo gspo --eval_steps 5 --figure learning.png

The figure has a panel a preset: held-out greedy accuracy over the steps, a line a seed (pip install matplotlib).
Prints one markdown row a preset: held-out greedy accuracy (256 pictures, guessing gives 0.17) before and after,
and for the pair losses the held-out margin's change. A run that exists already is not run again.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import papers  # noqa: E402
import train_dpo  # noqa: E402
import train_grpo  # noqa: E402

METHODS = {name: papers.load_method(name, f"{module.__name__}.py") for module in (train_dpo, train_grpo)
           for name in papers.papers_for(f"{module.__name__}.py").split(", ")}
LEADS = {name: method for name, method in METHODS.items() if hasattr(method, "PRESET")}


def run(script: str, folder: Path, *flags) -> list[dict]:
    """The metrics of a run, made if its final/ is not there yet."""
    if not (folder / "final").is_dir():
        command = [sys.executable, str(ROOT / script), "--output_dir", str(folder), *map(str, flags)]
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.with_suffix(".log"), "w") as log:
            if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT,
                              env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode:
                sys.exit(f"{' '.join(command)}\nfailed; see {log.name}")
    return [json.loads(line) for line in open(folder / "metrics.jsonl")]


def draw(results: dict, algos: list[str], seeds: list[int], file: Path):
    """Held-out accuracy over steps: a panel an algo, a line a seed."""
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(algos), figsize=(3.4 * len(algos), 2.7), sharey=True, squeeze=False)
    for panel, algo in zip(panels[0], algos):
        for seed in seeds:
            evaluated = [m for m in results[algo, seed] if "eval/accuracy" in m]
            panel.plot([m["step"] for m in evaluated], [m["eval/accuracy"] for m in evaluated], label=f"seed {seed}")
        panel.axhline(1 / 6, color="grey", linestyle=":", label="guessing")
        panel.set(title=algo.upper(), xlabel="optimizer steps", ylim=(0, 1.03))
    panels[0][0].set_ylabel("held-out accuracy")
    panels[0][-1].legend(loc="lower right", frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the runs go here")
    parser.add_argument("--algos", nargs="+", default=[*train_dpo.PRESETS, *train_grpo.PRESETS, *LEADS], help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--eval_steps", type=int, help="default: what the tiny model's runs have")
    parser.add_argument("--figure", type=Path, help="draw the learning curves there")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once, one thread each")
    args = parser.parse_args()

    def start(seed):
        run("train_dpo.py", args.folder / f"start-{seed}", "--algo", "sft", "--max_steps", 200, "--eval_steps", 2,
            "--eval_temperature", 1, "--stop_at_accuracy", 0.4, "--seed", seed)

    def learn(job):
        algo, seed = job
        offline = algo in train_dpo.PRESETS or algo in LEADS and LEADS[algo].SCRIPT == "train_dpo.py"
        module = train_dpo if offline else train_grpo
        tiny = module.TINY_DEFAULTS | module.TINY_BY_ALGO.get(algo, {})  # what a run without a model path gets
        tiny |= getattr(LEADS.get(algo), "TINY", {})
        tiny |= {} if args.eval_steps is None else {"eval_steps": args.eval_steps}
        flags = [part for name, value in tiny.items() for part in (f"--{name}", value)]
        if module is train_dpo:
            flags += ["--ref_cache", args.folder / "ref_cache"]
        if algo == "tgdpo":
            flags += ["--guide_model", args.folder / f"dpo-{seed}" / "final"]
        return run(f"{module.__name__}.py", args.folder / f"{algo}-{seed}", "--algo", algo, "--seed", seed,
                   "--model_name_or_path", args.folder / f"start-{seed}" / "final", *flags)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(start, args.seeds))
        algos = dict.fromkeys([*(["dpo"] if "tgdpo" in args.algos else []), *args.algos])  # its guide is that run's
        results = {}
        for part in [a for a in algos if a != "tgdpo"], [a for a in algos if a == "tgdpo"]:
            jobs = [(algo, seed) for algo in part for seed in args.seeds]
            results |= dict(zip(jobs, pool.map(learn, jobs)))

    print("| --algo | " + " | ".join(f"seed {seed}" for seed in args.seeds) + " | margin | seconds |")
    print("|---|" + "---|" * (len(args.seeds) + 2))
    for algo in args.algos:
        cells, margins, seconds = [], [], []
        for seed in args.seeds:
            metrics = results[algo, seed]
            evaluated = [m for m in metrics if "eval/accuracy" in m]
            cells.append(f"{evaluated[0]['eval/accuracy']:.3f} → {evaluated[-1]['eval/accuracy']:.3f}")
            if "eval/rewards/margins" in evaluated[-1]:
                margins.append(evaluated[-1]["eval/rewards/margins"] - evaluated[0]["eval/rewards/margins"])
            seconds.append(sum(m.get("step_time", 0) for m in metrics))
        margin = ", ".join(f"{m:+.2g}" for m in margins)
        print(f"| `{algo}` | " + " | ".join(cells) + f" | {margin} | {min(seconds):.0f} to {max(seconds):.0f} |")
    if args.figure is not None:
        draw(results, args.algos, args.seeds, args.figure)


if __name__ == "__main__":
    main()

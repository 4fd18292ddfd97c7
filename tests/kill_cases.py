"""Run a training script that kills itself, or one of its ranks, at a chosen point (test_resume.py).

    python kill_cases.py PHASE N SIGNAL train_grpo --flags      # the N-th time that PHASE is reached

Phases: sample (in the middle of a rollout), step (after the backward, before the optimizer), save (checkpoint files are
there, the manifest is not), log (half a line of metrics.jsonl is written), export (half of final/), full (no kill: the
rank's checkpoint files cannot grow beyond a megabyte), none.
"""

import os
import resource
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model  # noqa: E402
import rollout  # noqa: E402
import train_dpo  # noqa: E402
import train_grpo  # noqa: E402

PLACES = {"sample": (rollout, "sample_tokens"), "step": (model, "clip_grad_norm_"), "save": (model, "crc32"),
          "log": (model.Run, "log"), "export": (model.shutil, "copyfile")}


def main(phase, n, name, script, *flags):
    if phase == "full":  # this rank's disk has no room for its shard: write() fails beyond a megabyte
        if os.environ["RANK"] == os.environ["KILL_RANK"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
    elif phase != "none" and os.environ.get("RANK", "0") == os.environ.get("KILL_RANK", "0"):
        place, function = PLACES[phase]
        original, left = getattr(place, function), [int(n)]

        def deadly(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                if phase == "log":
                    with open(args[0].folder / "metrics.jsonl", "a") as file:
                        file.write('{"step": 1, "lo')
                os.kill(os.getpid(), getattr(signal, name))
            return original(*args, **kwargs)

        setattr(place, function, deadly)
    {"train_dpo": train_dpo, "train_grpo": train_grpo}[script].main(list(flags))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except model.InputError as error:
        sys.exit(f"error: {error}")

"""Offline preference training of a vision-language model: MPO, DPO, SFT, and any weighted mix of their losses.

    python train_dpo.py                                            # the built-in default: MPO on a tiny VLM, CPU, 2 min
    python train_dpo.py --model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct --dataset pairs.jsonl --image_root images \\
        --algo mpo --dtype bfloat16 --gradient_checkpointing --per_device_train_batch_size 2 \\
        --gradient_accumulation_steps 128 --learning_rate 5e-6 --num_train_epochs 1
    torchrun --nproc_per_node=2 train_dpo.py                       # the same on two ranks

    rows -> group rows (chosen, rejected) -> [reference log-probs, cached on disk once] -> token log-probs
         -> sum of weighted losses, each divided by its count over the whole optimizer step -> step

At step 1 the policy is the reference, so the printed losses must be: sigmoid 0.6931, bco_pair 1.3863, MPO 0.8318 + NLL.

Where this differs from the papers and from TRL:
 1. BCO's reward shift delta is the mean of the rewards of all completed optimizer steps (--bco_delta running). InternVL's
    mean includes the current micro-batch, TRL >= 0.29 has none (--bco_delta none). Evaluation does not move it.
 2. Every loss is a sum over the whole optimizer step divided by its count there, so the gradient does not depend on the
    micro-batch size or the number of ranks. TRL averages micro-batch means, which differs for `sft`.
 3. `sft` in MPO is the paper's per-response mean (--nll_normalization sequence), in --algo sft the token mean.
 4. A completion ends with its first EOS; what the chat template writes after it is not trained. TRL trains it.
 5. The reference is the starting policy. Its log-probs are computed before the first step and kept on disk, by the
    content of weights, ids and pixels; there is no second model in memory.
 6. rewards/accuracies counts a tie as 1/2, so it starts at 0.5 (TRL: 0).
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads are ruinous on a shared machine

import argparse
import difflib
import hashlib
import json
import math
import sys
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm
from transformers import get_scheduler

import data
import losses
import model
import rollout

PRESETS = {
    "mpo": dict(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0], beta=0.1, bco_delta="running",
                nll_normalization="sequence"),  # arXiv 2411.10442, section 4.1 and InternVL's scripts
    "dpo": dict(loss_type=["sigmoid"], beta=0.1),  # arXiv 2305.18290
    "sft": dict(loss_type=["sft"], nll_normalization="token", learning_rate=2e-5),
}
TINY_DEFAULTS = {  # for the tiny model, used when no --model_name_or_path is given
    "mpo": dict(learning_rate=2e-4, per_device_train_batch_size=32, max_steps=80, eval_steps=20, warmup_steps=5),
    "dpo": dict(learning_rate=2e-4, per_device_train_batch_size=32, max_steps=80, eval_steps=20, warmup_steps=5),
    "sft": dict(learning_rate=2e-3, per_device_train_batch_size=32, max_steps=100, eval_steps=20, warmup_steps=20,
                adam_beta2=0.98),
}
ALL_TINY = dict(lr_scheduler_type="constant", max_completion_length=24, per_device_eval_batch_size=256)


def build_parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    # what
    p.add_argument("--algo", choices=list(PRESETS), default="mpo", help="a preset of the loss flags; a flag given wins")
    p.add_argument("--model_name_or_path", help="folder or hub id of a vision-language model; none: a tiny one is built")
    p.add_argument("--dataset", help=".jsonl or .json of pairs (data.py says the columns); none: the shapes task")
    p.add_argument("--image_root", help="folder that image paths are relative to, and may not leave")
    p.add_argument("--eval_dataset", help="held-out rows, same columns and --image_root")
    p.add_argument("--output_dir", help="default: a new runs/<algo>-N")
    p.add_argument("--ref_cache", default="runs/ref_cache", help="folder of cached reference log-probs")
    # losses
    p.add_argument("--loss_type", nargs="+", help=f"any of {', '.join(losses.PREFERENCE_LOSSES)}; spaces or commas")
    p.add_argument("--loss_weights", nargs="+", type=float, help="one per loss_type; default 1 each")
    p.add_argument("--beta", type=float, default=0.1, help="strength of the pull to the reference, in every pair loss")
    p.add_argument("--bco_delta", choices=["running", "ema", "none"], default="running", help="BCO's reward shift")
    p.add_argument("--nll_normalization", choices=["sequence", "token"], default="sequence", help="the mean in `sft`")
    # steps
    p.add_argument("--per_device_train_batch_size", type=int, default=8, help="pairs (SFT: rows) of a micro-batch")
    p.add_argument("--gradient_accumulation_steps", type=int, default=1, help="micro-batches of an optimizer step")
    p.add_argument("--num_train_epochs", type=float, default=1.0, help="passes over the data; max_steps wins")
    p.add_argument("--max_steps", type=int, default=-1, help="optimizer steps; -1: from the epochs")
    p.add_argument("--learning_rate", type=float, default=1e-6, help="peak, after the warm-up")
    p.add_argument("--lr_scheduler_type", choices=["cosine", "linear", "constant"], default="linear", help="after warm-up")
    p.add_argument("--warmup_steps", type=float, default=0.0, help="steps, or below 1 a share of all steps")
    p.add_argument("--weight_decay", type=float, default=0.0, help="of AdamW, on every parameter")
    p.add_argument("--adam_beta1", type=float, default=0.9, help="of AdamW")
    p.add_argument("--adam_beta2", type=float, default=0.999, help="of AdamW")
    p.add_argument("--max_grad_norm", type=float, default=1.0, help="global norm that gradients are clipped to")
    # limits
    p.add_argument("--max_length", type=int, help="longest prompt + completion in tokens; default: the model's context")
    p.add_argument("--overlong", choices=["error", "skip"], default="error", help="rows beyond it; never cut, skip counts")
    p.add_argument("--max_completion_length", type=int, default=256, help="tokens of a held-out answer")
    # model
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="compute; weights are fp32")
    p.add_argument("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=False,
                   help="recompute layers in the backward")
    p.add_argument("--freeze_vision_tower", action=argparse.BooleanOptionalAction, default=False,
                   help="train the language model only")
    p.add_argument("--share_prompt", action=argparse.BooleanOptionalAction, default=True,
                   help="a pair is one row; --no-share_prompt gives each completion its own")
    p.add_argument("--cold_start_steps", type=int, help="most SFT steps before the run, on the built-in model and task "
                   "only; default 200 there (0 in --algo sft), it stops at 0.4 sampled accuracy")
    # evaluation and the rest
    p.add_argument("--eval_steps", type=int, default=100, help="evaluate every so many steps, and before and after")
    p.add_argument("--per_device_eval_batch_size", type=int, default=16, help="prompts answered, pairs scored at once")
    p.add_argument("--eval_temperature", type=float, default=0.0, help="of held-out answers; 0 is greedy")
    p.add_argument("--stop_at_accuracy", type=float, help="stop once eval/accuracy reaches it")
    p.add_argument("--reward_timeout", type=float, default=60.0, help="seconds for scoring the held-out answers")
    p.add_argument("--seed", type=int, default=0, help="of the data order, the sampling, the tiny model")
    p.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    return p


# === the same in train_dpo.py and train_grpo.py ======================================================================


def parse_args(argv):
    """Flags, over the defaults that --algo and the built-in model set. A typo is an error that names the nearest flag."""
    parser = build_parser()
    first, _ = parser.parse_known_args(argv)
    parser.set_defaults(**PRESETS[first.algo])
    if first.model_name_or_path is None:
        parser.set_defaults(**ALL_TINY | TINY_DEFAULTS[first.algo])
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [f for action in parser._actions for f in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1)
        parser.error(f"unknown argument {unknown[0]}" + (f"; did you mean {near[0]}?" if near else ""))
    args.loss_type = [name for item in args.loss_type for name in item.split(",") if name]
    built_in = args.model_name_or_path is None and args.dataset is None
    if args.cold_start_steps and not built_in:
        parser.error("--cold_start_steps is for the built-in model and task; train your own with --algo sft")
    if args.cold_start_steps is None:
        args.cold_start_steps = 200 if built_in and args.algo != "sft" else 0
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "eval_steps", "max_completion_length"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    check_args(args, parser)
    return args


def open_run(args, rank: int) -> Path:
    """A new output folder, the same on every rank, with args.json: the resolved flags and the package versions."""
    chosen = [None]
    if rank == 0:
        if args.output_dir is None:
            n = 1
            while os.path.exists(f"runs/{args.algo}-{n}"):
                n += 1
            args.output_dir = f"runs/{args.algo}-{n}"
        folder = Path(args.output_dir)
        if folder.exists() and any(folder.iterdir()):
            raise FileExistsError(f"--output_dir {folder} is not empty; name a new one, or none for runs/{args.algo}-N")
        (folder / "completions").mkdir(parents=True)
        packages = ("torch", "transformers", "safetensors", "pillow", "numpy")
        saved = vars(args) | {"command": sys.argv, "versions": {name: version(name) for name in packages}}
        (folder / "args.json").write_text(json.dumps(saved, indent=2) + "\n")
        print(f"{args.algo}: " + " ".join(f"{k}={v}" for k, v in vars(args).items()), flush=True)
        chosen = [args.output_dir]
    if dist.is_initialized():
        dist.broadcast_object_list(chosen)
    return Path(chosen[0])


def start_model(args, output_dir: Path, rank: int) -> str:
    """The folder or hub id the run starts from. Without --model_name_or_path rank 0 writes the tiny model, and trains
    it a little (--cold_start_steps); from then on the run is as if --model_name_or_path had named that folder."""
    if args.model_name_or_path is not None:
        return args.model_name_or_path
    path = output_dir / "tiny_vlm"
    if rank == 0:
        if args.cold_start_steps:
            model.cold_start(output_dir, args.cold_start_steps, args.seed)
        else:
            model.build_tiny_vlm(path, data.TINY_CORPUS, args.seed)
    if dist.is_initialized():
        dist.barrier()
    return str(output_dir / "cold_start" / "final" if args.cold_start_steps else path)


def log_step(metrics: dict, output_dir: Path, rank: int, keys: tuple[str, ...]):
    """Append to metrics.jsonl, and print the chosen keys on one line (tqdm.write keeps the progress bar whole)."""
    if rank == 0:
        with open(output_dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\n")
        shown = [f"{k} {metrics[k]:.4g}" for k in keys if metrics.get(k) is not None]
        if shown:
            tqdm.write(f"step {metrics['step']} | " + " | ".join(shown))


def make_optimizer(args, policy, max_steps: int):
    """AdamW on everything trainable, fp32 state; warm-up, then cosine, linear or constant."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2),
                                  weight_decay=args.weight_decay, fused=policy.device.type == "cuda")
    warmup = args.warmup_steps if args.warmup_steps >= 1 else math.ceil(args.warmup_steps * max_steps)
    name = "constant_with_warmup" if args.lr_scheduler_type == "constant" else args.lr_scheduler_type
    return optimizer, get_scheduler(name, optimizer, int(warmup), max_steps), parameters


# === end of the shared part ==========================================================================================


def check_args(args, parser):
    unknown = [name for name in args.loss_type if name not in losses.PREFERENCE_LOSSES]
    if unknown:
        parser.error(f"unknown --loss_type {unknown[0]}; choose from {', '.join(losses.PREFERENCE_LOSSES)}")
    args.loss_weights = args.loss_weights or [1.0] * len(args.loss_type)
    if len(args.loss_weights) != len(args.loss_type):
        parser.error(f"{len(args.loss_type)} --loss_type but {len(args.loss_weights)} --loss_weights")


# --- reference log-probs, computed once and kept on disk


def group_key(group) -> str:
    """What a group's log-probs depend on besides the weights: prompt ids, pixels, completion ids."""
    prompt, completions = group
    digest = hashlib.sha256()
    for name, tensor in [("tokens", prompt.tokens), *sorted(prompt.pixels.items()), *(("", c) for c in completions)]:
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


class ReferenceCache:
    """Per-token log-probs of the starting policy: {group key: (all completions' tokens,)}, in safetensors files under
    a folder named after the weights and the dtype. A changed model, template, image or answer is another key."""

    def __init__(self, folder: str, policy):
        name = f"{model.weights_fingerprint(policy)[:32]}-{str(policy.dtype).removeprefix('torch.')}"
        self.folder, self.known = Path(folder) / name, {}
        for file in sorted(self.folder.glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                self.known |= {key: tensors.get_tensor(key) for key in tensors.keys()}

    def add(self, policy, groups_in_batches, share_prompt: bool) -> tuple[int, int]:
        """Compute and store what is missing. -> (groups found, groups computed)"""
        found, new = 0, {}
        for groups in groups_in_batches:
            keyed = {group_key(g): g for g in groups}
            missing = {k: g for k, g in keyed.items() if k not in self.known and k not in new}
            found += len(keyed) - len(missing)
            if missing:
                batch = model.to_device(pack(list(missing.values()), policy, share_prompt), policy.device)
                with torch.no_grad():
                    logps, _ = policy(batch)                                                    # (N, T)
                mask, n = batch["completion_mask"], 0
                for key, (_, completions) in missing.items():
                    rows = slice(n, n + len(completions))
                    new[key] = logps[rows][mask[rows]].cpu()
                    n += len(completions)
        if new:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = self.folder / f"{hashlib.sha256(''.join(sorted(new)).encode()).hexdigest()[:32]}.safetensors"
            temporary = file.with_suffix(f".tmp{os.getpid()}")
            save_file(new, temporary)
            temporary.rename(file)  # a killed run leaves no half-written cache
            self.known |= new
        return found, len(new)

    def logps(self, groups, mask) -> torch.Tensor:
        """(N, T) like the policy's, 0 where the mask is False."""
        flat = torch.cat([self.known[group_key(g)] for g in groups]).to(mask.device)
        return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, flat)


def pack(groups, policy, share_prompt: bool):
    """Group rows, or with share_prompt False the plain form: every completion behind its own copy of the prompt."""
    if not share_prompt:
        groups = [(prompt, [completion]) for prompt, completions in groups for completion in completions]
    return model.pack_groups(groups, policy.pad_id, row_tokens=0)


def score_groups(args, policy, groups, reference, delta):
    """One micro-batch -> ({loss: (sum, count)}, {metric: (sum, count)}). Chosen and rejected alternate in the batch."""
    batch = model.to_device(pack(groups, policy, args.share_prompt), policy.device)
    logps, _ = policy(batch)                                                                    # (N, T)
    mask = batch["completion_mask"]
    if reference is None:
        return losses.preference_losses(args.loss_type, logps, mask, beta=args.beta,
                                        nll_normalization=args.nll_normalization)
    ref_logps = reference.logps(groups, mask)                                                   # (N, T)
    return losses.preference_losses(args.loss_type, logps[0::2], mask[0::2], logps[1::2], mask[1::2], ref_logps[0::2],
                                    ref_logps[1::2], beta=args.beta, delta=delta,
                                    nll_normalization=args.nll_normalization)


def main(argv=None):
    args = parse_args(argv)
    rank, world_size, device = model.init_distributed(args.device)
    output_dir = open_run(args, rank)
    torch.manual_seed(args.seed)

    # --- data
    pairs = any(name in losses.PAIR_LOSSES for name in args.loss_type)
    columns = ("chosen", "rejected") if pairs else ("chosen",)
    if args.dataset is None:
        train_rows = data.shapes_rows(4096, args.seed, "train")
        eval_rows = data.shapes_rows(256, args.seed, "test")
    else:
        train_rows = data.read_rows(args.dataset, args.image_root, ("prompt", *columns))
        eval_rows = []
    if args.eval_dataset is not None:
        eval_rows = data.read_rows(args.eval_dataset, args.image_root, ("prompt", *columns))
    step_rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * world_size
    max_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * len(train_rows) / step_rows)

    # --- held-out answers are scored by the same `accuracy` that train_grpo.py rewards, where rows have a solution
    rewards = None
    if eval_rows and all(row.get("solution") is not None for row in eval_rows):
        rewards = rollout.RewardRunner([f"{Path(__file__).with_name('train_grpo.py')}:accuracy"], args.reward_timeout)
    elif rank == 0:
        print("no eval/accuracy: " + ("some held-out rows lack a solution" if eval_rows else "no --eval_dataset"))

    # --- policy, the rows that it will meet, reference, optimizer
    source = start_model(args, output_dir, rank)
    policy, processor = model.load_policy(source, args.dtype, device, args.gradient_checkpointing,
                                          args.freeze_vision_tower)

    def encode(row):
        return data.encode_group(policy, processor, row, columns)

    limit = data.length_limit(policy, args.max_length)
    plan = data.check_rows(train_rows, max_steps * step_rows, args.seed, args.overlong, limit, rank, world_size,
                           lambda row: data.group_length(encode(row)))
    eval_rows = eval_rows[rank::world_size]
    eval_groups = [encode(row) for row in eval_rows]
    for row, group in zip(eval_rows, eval_groups):
        data.check_length(row, data.group_length(group), limit)

    def batches(groups, size):
        return [groups[i:i + size] for i in range(0, len(groups), size)]

    def rows_of(step):
        """This rank's rows of a step: a slice of the global batch, which is the same for any number of ranks."""
        mine = step_rows // world_size
        return [train_rows[i] for i in plan[step * step_rows + rank * mine:][:mine]]

    reference = None
    if pairs:
        reference = ReferenceCache(args.ref_cache, policy)
        visited = {id(row): row for step in range(max_steps) for row in rows_of(step)}.values()
        in_batches = ([encode(row) for row in chunk]
                      for chunk in batches(list(visited), args.per_device_train_batch_size))
        found, computed = reference.add(policy, in_batches, args.share_prompt)
        reference.add(policy, batches(eval_groups, args.per_device_eval_batch_size), args.share_prompt)
        if rank == 0:
            print(f"reference log-probs: {computed} pairs computed, {found} from {reference.folder}", flush=True)
    optimizer, scheduler, parameters = make_optimizer(args, policy, max_steps)
    delta = 0.0  # BCO's shift; moves after each optimizer step, never in evaluation

    def evaluate(step):
        sums = defaultdict(lambda: (0.0, 0.0))

        def add(new, prefix):
            for key, (total, count) in new.items():
                sums[prefix + key] = (sums[prefix + key][0] + float(total), sums[prefix + key][1] + float(count))

        with torch.no_grad():
            for groups in batches(eval_groups, args.per_device_eval_batch_size):
                terms, metrics = score_groups(args, policy, groups, reference, delta)
                add(terms, "eval/loss/")
                add(metrics, "eval/")
        if rewards is not None:
            texts, scores = rollout.evaluate(
                policy, processor, [prompt for prompt, _ in eval_groups], rewards, temperature=args.eval_temperature,
                max_completion_length=args.max_completion_length, batch_size=args.per_device_eval_batch_size,
                seed=args.seed, step=step)
            known = ~scores[0].isnan()
            add({"accuracy": (scores[0][known].sum(), known.sum())}, "eval/")
            if rank == 0:
                with open(output_dir / "completions" / f"step_{step}.jsonl", "w") as file:
                    for row, text, score in zip(eval_rows, texts, scores[0].tolist()):
                        file.write(json.dumps(dict(row=row["_source"], completion=text, accuracy=score)) + "\n")
        if not eval_groups and world_size == 1:
            return {}
        means = {k: s / max(n, 1) for k, (s, n) in model.all_reduce_sums(sums, device).items()}
        if means:
            means["eval/loss"] = sum(w * means[f"eval/loss/{n}"] for n, w in zip(args.loss_type, args.loss_weights))
            if rank == 0:
                shown = ("eval/loss", "eval/rewards/margins", "eval/rewards/accuracies", "eval/accuracy")
                tqdm.write(f"held-out, step {step}: " + ", ".join(f"{k} {means[k]:.4f}" for k in shown if k in means))
        return means

    start = evaluate(0)
    log_step({"step": 0, **start}, output_dir, rank, ())
    progress = tqdm(total=max_steps, desc=args.algo, disable=None if rank == 0 else True)
    end = start

    # ---------------------------------------------------------------------------------------------------- the loop
    for step in range(max_steps):
        began = time.perf_counter()
        groups = [encode(row) for row in rows_of(step)]
        micro_batches = batches(groups, args.per_device_train_batch_size)

        # 1. what each loss is divided by, over all micro-batches and ranks
        tokens = sum(len(completions[0]) for _, completions in groups)
        counts = {name: (tokens if name == "sft" and args.nll_normalization == "token" else len(groups), 0)
                  for name in args.loss_type}
        counts = {name: count for name, (count, _) in model.all_reduce_sums(counts, device).items()}

        # 2. gradients: each micro-batch adds its share of the step's weighted sum
        sums = defaultdict(lambda: (0.0, 0.0))
        for i, micro in enumerate(micro_batches):
            terms, metrics = score_groups(args, policy, micro, reference, delta)
            loss = sum(weight * terms[name][0] / counts[name] for name, weight in zip(args.loss_type, args.loss_weights))
            model.backward(policy, loss * world_size, sync=i == len(micro_batches) - 1)
            metrics |= {f"loss/{name}": (total.detach(), count) for name, (total, count) in terms.items()}
            for key, (total, count) in metrics.items():
                sums[key] = (sums[key][0] + float(total), sums[key][1] + float(count))

        # 3. step
        grad_norm = clip_grad_norm_(parameters, args.max_grad_norm)
        learning_rate = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)

        # 4. everything below is diagnostics, except that BCO's shift moves by this step's mean reward
        means = {key: total / count for key, (total, count) in model.all_reduce_sums(sums, device).items()}
        metrics = {"step": step + 1, "epoch": (step + 1) * step_rows / len(train_rows),
                   "loss": sum(w * means[f"loss/{n}"] for n, w in zip(args.loss_type, args.loss_weights)),
                   "grad_norm": float(grad_norm), "learning_rate": learning_rate, **means}
        if "bco_pair" in args.loss_type:
            metrics["bco_delta"] = delta  # the one that this step used
            mean_reward = (means["rewards/chosen"] + means["rewards/rejected"]) / 2
            delta = losses.next_bco_delta(delta, mean_reward, step, args.bco_delta)
        if rank == 0 and step == 0:
            expected = {"sigmoid": "0.6931", "bco_pair": "1.3863", "sft": "the NLL of the chosen answers"}
            tqdm.write("step 1 must start at: " + ", ".join(
                f"{n} {means[f'loss/{n}']:.4f} (expected {expected[n]})" for n in args.loss_type))
        metrics["step_time"] = time.perf_counter() - began
        if (step + 1) % args.eval_steps == 0 or step + 1 == max_steps:
            end = evaluate(step + 1)
            metrics |= end
        log_step(metrics, output_dir, rank, ("loss", "rewards/margins", "rewards/accuracies", "rewards/chosen", "nll",
                                             "grad_norm", "learning_rate", "step_time", "eval/accuracy"))
        progress.update()
        if args.stop_at_accuracy is not None and end.get("eval/accuracy", -1) >= args.stop_at_accuracy:
            if rank == 0:
                tqdm.write(f"stopped at step {step + 1}: eval/accuracy {end['eval/accuracy']:.4f}")
            break

    progress.close()
    if rank == 0:
        model.export(policy, processor, source, output_dir / "final")
        for key in ("eval/accuracy", "eval/rewards/accuracies", "eval/rewards/margins"):
            if key in end:
                print(f"{key}: {start[key]:.4f} before, {end[key]:.4f} after")
        print(f"saved {output_dir / 'final'}")
    if rewards is not None:
        rewards.close()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

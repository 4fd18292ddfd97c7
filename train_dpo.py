"""Offline preference training of a vision-language model: MPO, DPO, SFT, SimPO, ... in any weighted mix.

    python train_dpo.py                          # the built-in default: MPO on a tiny VLM, CPU, 2 min
    python train_dpo.py --model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct --algo mpo --dtype bfloat16 \\
        --dataset pairs.jsonl --image_root images --gradient_checkpointing --per_device_train_batch_size 2 \\
        --gradient_accumulation_steps 128 --learning_rate 5e-6 --num_train_epochs 1
    torchrun --nproc_per_node=8 train_dpo.py ... --output_dir runs/a     # sharded; run again, it goes on

    rows -> group rows (chosen, rejected) -> [reference log-probs, cached on disk once] -> token log-probs
         -> sum of weighted losses, each divided by its count over the whole optimizer step -> step

At step 1 the policy is the reference: the losses must be sigmoid 0.6931, bco_pair 1.3863, MPO 0.8318 + NLL.

Where this differs from the papers and from TRL:
 1. BCO's reward shift delta is the mean reward of all completed optimizer steps (--bco_delta running).
    InternVL includes the current micro-batch, TRL >= 0.29 has none (--bco_delta none). Evaluation keeps it.
 2. Every loss is a sum over the whole optimizer step divided by its count there, so the gradient depends on
    neither micro-batch size nor number of ranks. TRL averages micro-batch means, which differs for `sft`.
 3. `sft` in MPO is the paper's per-response mean (--nll_normalization sequence), in --algo sft a token mean.
 4. A completion ends with its first EOS; what the template writes after it is not trained. TRL trains it.
 5. The reference is the starting policy. Its log-probs are computed before the first step and kept on disk,
    by the content of weights, ids and pixels; there is no second model in memory. LoRA has no dropout.
 6. rewards/accuracies counts a tie as 1/2, so it starts at 0.5 (TRL: 0).
 7. --label_smoothing makes sigmoid cDPO (TRL ignores it there); WPO weighs pair losses only.
 8. A pair's weight (papers/weighted.py) multiplies its pair losses, whose count stays the number of pairs.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads ruin a shared machine

import hashlib
import itertools
import math
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import data
import losses
import model
import rollout
from model import Count, Finite, Name, NonNegative, Positive, Size

PRESETS = {
    "sft": dict(loss_type=["sft"], nll_normalization="token", learning_rate=2e-5),
    # The numbers before a paper's id are the paper's.
    "mpo": dict(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0], bco_delta="running",
                beta=0.1, nll_normalization="sequence"),  # arXiv 2411.10442, InternVL's scripts
    "dpo": dict(loss_type=["sigmoid"], beta=0.1, learning_rate=1e-6),  # arXiv 2305.18290
    "simpo": dict(loss_type=["simpo"], beta=2.0, simpo_gamma=1.0, learning_rate=5e-7),  # arXiv 2405.14734
    "bco": dict(loss_type=["bco_pair"], beta=0.01, learning_rate=5e-7),  # arXiv 2404.04656
    "robust": dict(loss_type=["robust"], beta=0.01, label_smoothing=0.1),  # arXiv 2403.00409; its lr is 1e-3
    "nca": dict(loss_type=["nca_pair"], beta=0.01, learning_rate=5e-6),  # arXiv 2402.05369
    "sppo": dict(loss_type=["sppo_hard"], beta=1e-3, learning_rate=5e-7),  # arXiv 2405.00675
    "discopop": dict(loss_type=["discopop"], beta=0.05, learning_rate=5e-7),  # arXiv 2406.08414
    "apo_zero": dict(loss_type=["apo_zero"], beta=0.1, learning_rate=2e-7),  # arXiv 2408.06266
    "apo_down": dict(loss_type=["apo_down"], beta=0.1, learning_rate=2e-7),  # arXiv 2408.06266
    "step_dpo": dict(loss_type=["sigmoid"], beta=0.5, num_train_epochs=8.0),  # arXiv 2406.18629; see data.py
    # Of these the loss is the paper's; beta and what else stands here are customary values.
    "ipo": dict(loss_type=["ipo"], beta=0.1),  # arXiv 2310.12036
    "slic": dict(loss_type=["hinge"], beta=0.1),  # arXiv 2305.10425
    "exo": dict(loss_type=["exo_pair"], beta=0.1, label_smoothing=1e-3),  # arXiv 2402.00856
    "aot": dict(loss_type=["aot"], beta=0.1),  # arXiv 2406.05882
    "aot_unpaired": dict(loss_type=["aot_unpaired"], beta=0.1),  # arXiv 2406.05882
    "cdpo": dict(loss_type=["sigmoid"], beta=0.1, label_smoothing=0.1),  # DPO with label noise
    "dpo_norm": dict(loss_type=["sigmoid_norm"], beta=5.0, learning_rate=5e-7),  # arXiv 2411.15124
}
# For the tiny model, used when no --model_name_or_path is given.
TINY_DEFAULTS = dict(learning_rate=2e-4, per_device_train_batch_size=32, max_steps=80, eval_steps=20,
                     warmup_steps=5, lr_scheduler_type="constant", max_completion_length=24,
                     per_device_eval_batch_size=256)
# At DiscoPOP's own beta of 0.05 the tiny model stays in that loss's minimum at a margin below 0.
TINY_BY_ALGO = {"sft": dict(learning_rate=2e-3, max_steps=100, warmup_steps=20, adam_beta2=0.98),
                "discopop": dict(beta=0.5)}


@dataclass
class Args:
    # --- what
    algo: list[Name] = field(default_factory=lambda: ["mpo"])  # a preset of the loss flags, a file of papers/
    # or a path to your own; a flag given wins. Further files add what they bring. Presets: PRESETS; files:
    # PAPERS
    model_name_or_path: str | None = None  # folder or hub id of a vision-language model; none: a tiny one is
    # built
    # --- data
    dataset: list[str] | None = None  # files, folders, hub ids of pairs (see data.py); none: shapes
    dataset_weights: list[Positive] | None = None  # each one's share of the draws; default: its rows
    image_root: str | None = None  # folder that image paths are relative to, and may not leave
    sort_by: str | None = None  # column of the data: train in its order, lowest first, in each epoch
    # (curriculum)
    eval_dataset: str | None = None  # held-out rows, same columns and --image_root
    overlong: Literal["error", "skip"] = "error"  # rows over the limit: stop, or skip and count them
    dataloader_num_workers: Count = 2  # threads that read and process rows ahead
    seed: Count = 0  # of the data order, the sampling, the tiny model
    max_length: Size | None = None  # longest prompt + completion in tokens; default: the model's context
    # --- losses
    loss_type: list[Name] = field(default_factory=list)  # of pairs: LOSSES; or sft; spaces or commas;
    # default: the preset's
    loss_weights: list[Finite] | None = None  # one per loss_type; default 1 each
    beta: Positive = 0.1  # strength of the pull to the reference; simpo's scale; in asft of the metrics alone
    bco_delta: Literal["running", "ema", "none"] = "running"  # BCO's reward shift
    nll_normalization: Literal["sequence", "token"] = "sequence"  # the mean in `sft`
    label_smoothing: Annotated[float, "[0, 0.5)"] = 0.0  # share of wrong labels assumed by SMOOTHED
    simpo_gamma: Finite = 0.5  # SimPO's margin gamma (its paper tunes gamma / beta)
    ref_cache: str = "runs/ref_cache"  # folder of cached reference log-probs
    # --- steps
    per_device_train_batch_size: Size = 8  # pairs (SFT: rows) of a micro-batch
    gradient_accumulation_steps: Size = 1  # micro-batches of an optimizer step
    max_tokens_per_batch: Size | None = None  # cut a step into micro-batches of whole groups by tokens;
    # per_device_train_batch_size x gradient_accumulation_steps stays the step
    num_train_epochs: Positive = 1.0  # passes over the data, of as many draws as it has rows, skipped ones
    # replaced, those that dynamic sampling rejects not counted; max_steps wins
    max_steps: Annotated[int, "[-1, inf)"] = -1  # optimizer steps; -1: from the epochs
    learning_rate: NonNegative = 1e-6  # peak, after the warm-up
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "linear"  # the decay
    warmup_steps: NonNegative = 0.0  # steps, or below 1 a share of all steps
    weight_decay: NonNegative = 0.0  # of AdamW, on every parameter
    adam_beta1: Annotated[float, "[0, 1)"] = 0.9  # of AdamW
    adam_beta2: Annotated[float, "[0, 1)"] = 0.999  # of AdamW
    max_grad_norm: Positive = 1.0  # global norm that gradients are clipped to
    # --- model
    dtype: Literal["float32", "bfloat16"] = "float32"  # of computing; weights are fp32
    gradient_checkpointing: bool = False  # recompute layers in the backward
    freeze_vision_tower: bool = False  # train the language model only
    share_prompt: bool = True  # a group is one row; --no-share_prompt gives each completion its own
    cold_start_steps: Count | None = None  # most SFT steps before the run, on the built-in model and task
    # only; default 200 there (0 in --algo sft), it stops at 0.4 sampled accuracy
    shard_size: Size | None = None  # ranks that hold one copy of the weights between them; default: all
    lora_r: Size | None = None  # rank of LoRA adapters, which alone are trained; none: train all weights
    lora_alpha: Size | None = None  # adapters are scaled by lora_alpha / lora_r; default 32
    lora_target_modules: list[Name] | None = None  # names of linear layers (q_proj v_proj), or all-linear,
    # the default: all but the output head
    use_rslora: bool = False  # scale by lora_alpha / sqrt(lora_r)
    use_dora: bool = False  # DoRA: train the norm of each row as well
    preflight: bool | None = None  # try the largest micro-batch before step 1; default: on cuda
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    deterministic: bool = False  # on a GPU: only kernels that give the same bits each time, so that a resumed
    # run equals one never stopped; slower. On a CPU it always does
    # --- evaluation
    eval_steps: Size = 100  # evaluate every so many steps, and before and after
    per_device_eval_batch_size: Size = 16  # held-out rows answered or scored at once
    eval_temperature: NonNegative = 0.0  # of held-out answers; 0 is greedy
    num_generations_eval: Size = 1  # answers to each held-out row; above 1 adds eval/pass@k, and needs
    # --eval_temperature
    reward_timeout: Positive = 60.0  # seconds for one call of one reward function; a completion that it hangs
    # on, also alone, gets no reward
    max_completion_length: Size = 256  # tokens of a held-out answer
    stop_at_accuracy: Annotated[float, "(0, 1]"] | None = None  # stop once eval/accuracy reaches it
    # --- run
    output_dir: str | None = None  # default: a new runs/<algo>-N; one that holds this run goes on
    save_steps: Size = 100  # write a checkpoint every so many steps
    save_total_limit: Size = 2  # checkpoints that are kept
    resume: str = "auto"  # auto: go on with the run in --output_dir; never; or a checkpoint
    allow_changed: list[str] = field(default_factory=list)  # settings that may differ from the resumed run's
    max_hours: Positive | None = None  # write a checkpoint and end after so long, as on SIGTERM
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = "none"  # send metrics there too; pip
    # install it
    push_to_hub: str | None = None  # OWNER/NAME: upload final/ there at the end; made private if new

    HELP = {"PRESETS": ", ".join(PRESETS), "PAPERS": model.papers_for("train_dpo.py"),
            "LOSSES": ", ".join(losses.PAIR_LOSSES),
            "SMOOTHED": ", ".join(sorted(losses.which(losses.PAIR_LOSSES, smoothed=True)))}

    def __post_init__(self):
        model.check_shared(self)
        check_losses(self)
        model.check_methods(self)


def parse_args(argv):
    return model.parse(Args, PRESETS, TINY_DEFAULTS, TINY_BY_ALGO, argv)


def check_losses(args):
    """Losses and options that do not go together, or that would change nothing, are a ValueError."""
    if not args.loss_type:
        raise ValueError("--loss_type names no loss")
    unknown = [name for name in args.loss_type if name not in (*losses.PAIR_LOSSES, "sft")]
    if unknown:
        known = ", ".join([*losses.PAIR_LOSSES, "sft"])
        raise ValueError(f"unknown --loss_type {unknown[0]}; choose from {known}")
    args.loss_weights = args.loss_weights or [1.0] * len(args.loss_type)
    if len(args.loss_weights) != len(args.loss_type):
        raise ValueError(f"{len(args.loss_type)} --loss_type but {len(args.loss_weights)} --loss_weights")
    if len(set(args.loss_type)) < len(args.loss_type):
        raise ValueError(f"a --loss_type stands twice in {' '.join(args.loss_type)}; give it one weight")
    given, pairs = set(args.loss_type), set(args.loss_type) - {"sft"}
    smoothed, sorting = (losses.which(losses.PAIR_LOSSES, **{kind: True}) for kind in ("smoothed", "sorts"))
    if args.label_smoothing and not given & smoothed:
        raise ValueError(f"--label_smoothing is not used by {', '.join(args.loss_type)}, only by "
                         f"{', '.join(sorted(smoothed))}")
    if "exo_pair" in given and args.label_smoothing == 0:
        raise ValueError("exo_pair needs --label_smoothing above 0 (1e-3, say): it takes its logarithm")
    if model.hooks(args, "pair_weights") and (not pairs or given & sorting):
        raise ValueError(f"--algo {' '.join(args.algo)} weighs pairs: not sft, nor aot and aot_unpaired, "
                         "which sort them apart")
    model.changes_nothing(args, {
        name: f"without {what}" for name, what, used in (
            ("beta", "a pair loss", pairs), ("simpo_gamma", "--loss_type simpo", "simpo" in given),
            ("bco_delta", "--loss_type bco_pair", "bco_pair" in given),
            ("nll_normalization", "--loss_type sft", "sft" in given)) if not used})


def columns_of(args, losses_only=False) -> dict[str, tuple[float, float]]:
    """{column: (lowest, highest)} of the numbers that the losses and --algo's files take from the data."""
    found = {}
    for name in args.loss_type:
        found |= losses.PAIR_LOSSES[name].columns if name != "sft" else {}
    for columns in model.hooks(args, "columns") if not losses_only else ():
        found |= columns(args)
    return found


def check_columns(args, train_rows, eval_rows):
    """The numbers that losses, --algo's files and --sort_by take from the data, in every row of it."""
    needs = columns_of(args)
    for column, bounds in needs.items():
        rows = itertools.chain(train_rows, eval_rows)
        data.check_numbers(rows, column, *bounds, f"--algo {' '.join(args.algo)}")
    if args.sort_by is not None:
        data.check_numbers(train_rows, args.sort_by, -1e300, 1e300, "--sort_by")
    known = {"margin", "chosen_probs", "chosen_probs_win", "chosen_probs_lose", "weight"}
    for column in sorted(known & train_rows[0].keys() - {*needs, args.sort_by}):
        if args.dataset is not None:
            model.warn(f"{train_rows[0]['_source']}: nothing uses the column {column}")


# --- reference log-probs, computed once and kept on disk


def group_key(group) -> str:
    """What a group's log-probs depend on besides the weights: prompt ids, pixels, completion ids."""
    prompt, completions = group
    digest = hashlib.sha256()
    named = [("tokens", prompt.tokens), *sorted(prompt.pixels.items()), *(("", c) for c in completions)]
    for name, tensor in named:
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


class ReferenceCache:
    """Per-token log-probs of the starting policy, {group key: (all completions' tokens,)}, in safetensors
    files in a folder named after weights and dtype. A new model, template, image or answer is a new key."""

    def __init__(self, folder: str, policy):
        name = f"{model.weights_fingerprint(policy)[:32]}-{str(policy.dtype).removeprefix('torch.')}"
        self.folder, self.known = Path(folder) / name, {}
        for file in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(file, "pt") as tensors:
                    self.known |= {key: tensors.get_tensor(key) for key in tensors.keys()}
            except SafetensorError as error:  # emptied by a power cut, perhaps
                print(f"warning: {file} cannot be read ({error}): what it held is computed anew", flush=True)

    def add(self, policy, groups_in_batches, share_prompt: bool, stop) -> tuple[int, int]:
        """Compute and store what is missing. -> (distinct groups computed, distinct groups found)"""
        before, found, new = set(self.known), set(), {}
        for groups in groups_in_batches:
            keyed = {group_key(g): g for g in groups}
            missing = {k: g for k, g in keyed.items() if k not in self.known and k not in new}
            found |= keyed.keys() & before
            if missing:
                batch = model.to_device(policy.pack(list(missing.values()), share_prompt), policy.device)
                with torch.no_grad():
                    logps, *_ = policy(batch, entropies=False)                                  # (N, T)
                mask, n = batch["completion_mask"], 0
                for key, (_, completions) in missing.items():
                    rows = slice(n, n + len(completions))
                    new[key] = logps[rows][mask[rows]].cpu()
                    n += len(completions)
            asked = stop()
            if asked or len(new) >= 1024:  # now and then, so that a killed run has not worked for nothing
                new = self._store(new)
            if asked:
                raise model.Interrupted
        self._store(new)
        return len(self.known) - len(before), len(found)

    def _store(self, new: dict) -> dict:
        if new:
            self.folder.mkdir(parents=True, exist_ok=True)
            name = hashlib.sha256("".join(sorted(new)).encode()).hexdigest()[:32]
            file = self.folder / f"{name}.safetensors"
            temporary = file.with_suffix(f".tmp-{socket.gethostname()}-{os.getpid()}")  # a shared folder
            save_file(new, temporary)
            temporary.rename(file)  # a killed run leaves no half-written cache
            self.known |= new
        return {}

    def logps(self, groups, batch) -> torch.Tensor:
        """(N, T) like the policy's, 0 where the mask is False."""
        mask, trained = batch["completion_mask"], batch["trained"]
        flat = model.to_device(torch.cat([self.known[group_key(g)] for g in groups]), mask.device)
        return torch.zeros(mask.numel(), device=mask.device).scatter(0, trained, flat).view(mask.shape)


def score_groups(args, policy, groups, references, state):
    """One micro-batch -> ({loss: (sum, count)}, {metric: (sum, count)}). Chosen and rejected alternate.

    references: {"ref": ReferenceCache, ...}, of the reference and of further models, as the losses need."""
    batch = model.to_device(policy.pack(groups, args.share_prompt), policy.device)
    squares = any(model.hooks(args, "SUMS_OF_SQUARES"))
    logps, _, log_sum_sq_probs = policy(batch, entropies=False, sums_of_squares=squares)        # (N, T)
    mask = batch["completion_mask"]
    scores = {"logps": logps, "mask": mask}
    scores |= {f"{name}_logps": cache.logps(groups, batch) for name, cache in references.items()}
    scores |= {"log_sum_sq_probs": log_sum_sq_probs} if squares else {}

    pairs = len(groups[0][1]) == 2  # else sft alone: no rejected answers were read
    chosen = {name: x[0::2] if pairs else x for name, x in scores.items()}                      # (B, T) each
    B, tokens = len(chosen["mask"]), chosen["mask"].sum()
    nll = -losses.masked_sum(chosen["logps"].detach(), chosen["mask"]).sum()
    terms, metrics = {}, {"nll": (nll, tokens), "logps/chosen": (-nll, B)}
    if "sft" in args.loss_type:
        terms["sft"] = losses.nll_loss(chosen["logps"], chosen["mask"], normalization=args.nll_normalization)
    if not pairs:
        return terms, metrics

    pair = losses.pair_of(chosen, {name: x[1::2] for name, x in scores.items()})
    for log_ratios in model.hooks(args, "log_ratios"):
        pair |= log_ratios(pair, args)
    columns = {c: torch.tensor([float(prompt.row[c]) for prompt, _ in groups], device=mask.device)
               for c in columns_of(args)}                                                       # (B,) each
    weights = None
    for pair_weights in model.hooks(args, "pair_weights"):
        weights = pair_weights(pair, args, columns) * (1.0 if weights is None else weights)     # (B,)
    options = vars(args) | state | {c: columns[c] for c in columns_of(args, losses_only=True)}
    options.pop("loss_type")
    pair_terms, pair_metrics = losses.preference_losses(
        [name for name in args.loss_type if name != "sft"], pair, pair_weights=weights, **options)
    for more in model.hooks(args, "metrics"):
        pair_metrics |= more(pair, **options)
    return terms | pair_terms, metrics | pair_metrics


def load_scorer(args, path, policy, processor, device):
    """A further model, to be scored once like the reference and then let go."""
    scorer, own = model.load_policy(path, args.dtype, device, shard_size=args.shard_size)
    if own.tokenizer.get_vocab() != processor.tokenizer.get_vocab():
        raise model.InputError(f"{path} has another vocabulary than the policy")
    scorer.filler = policy.filler
    return scorer


def start_value(args, name: str) -> str:
    """What a loss must be before the first step: the policy is the reference, every log-ratio is 0."""
    loss = losses.PAIR_LOSSES.get(name)
    if loss is None or not loss.reference:
        return "the starting policy's own value"
    if model.hooks(args, "pair_weights"):
        return "weighted"
    if loss.columns:
        return "of the rows' columns"
    further = [f"{scorer}_logps" for scorers in model.hooks(args, "scorers") for scorer in scorers(args)]
    side = dict.fromkeys(["logps", "ref_logps", *further], torch.zeros(1, 1))
    pair = losses.pair_of(*[side | {"mask": torch.ones(1, 1, dtype=torch.bool)}] * 2)
    state = model.with_states(args, {"bco_shift": 0.0})
    return f"{loss.term(**pair, **vars(args), **state).item():.4f}"


def main(argv=None):
    args = parse_args(argv)
    rank, world_size, device = model.init_distributed(args.device, args.deterministic)
    output_dir, resumed = model.open_run(args, rank, world_size)
    if resumed and model.is_done(args, output_dir, rank):
        return
    report = model.Report(args, output_dir, rank)

    # --- data
    pairs = any(name in losses.PAIR_LOSSES for name in args.loss_type)
    columns = ("chosen", "rejected") if pairs else ("chosen",)
    train_rows, eval_rows = data.rows_of_run(args, ("prompt", *columns))
    check_columns(args, train_rows, eval_rows)
    rank_rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    step_rows = rank_rows * world_size
    steps = args.num_train_epochs * len(train_rows) / step_rows
    max_steps = args.max_steps if args.max_steps > 0 else math.ceil(steps)

    # --- held-out answers are scored by the `accuracy` of rewards/answers.py, where rows have a solution
    rewards = None
    if eval_rows and all(row.get("solution") is not None for row in eval_rows):
        rewards = rollout.RewardRunner(["accuracy"], args.reward_timeout)
    else:
        why = "some held-out rows lack a solution" if eval_rows else "no --eval_dataset"
        if args.stop_at_accuracy is not None:
            raise model.InputError(f"--stop_at_accuracy needs eval/accuracy, and there is none: {why}")
        if rank == 0:
            print("no eval/accuracy:", why)

    # --- policy, the rows that it will meet, reference, optimizer
    source = model.start_model(args, output_dir, rank)
    policy, processor = model.load_policy(source, args.dtype, device, args.gradient_checkpointing,
                                          args.freeze_vision_tower, args.shard_size, lora=args)
    for note in policy.notes if rank == 0 else []:
        print(f"{policy.hf.config.model_type}: {note}", flush=True)
    if world_size > 1 and hasattr(processor, "image_processor"):
        policy.filler = data.encode_prompt(policy, processor, data.shapes_rows(1, 0, "train")[0])

    def encode(row):
        return data.encode_group(policy, processor, row, columns)

    def tokens_of(group):
        """In a micro-batch, where without share_prompt the prompt stands before each answer."""
        prompt, answers = group
        return len(prompt.tokens) * (1 if args.share_prompt else len(answers)) + sum(map(len, answers))

    limit = data.length_limit(policy, args.max_length)
    plan, longest = data.check_rows(train_rows, max_steps * step_rows, args.seed, args.overlong, limit, rank,
                                    world_size, lambda row: data.group_length(encode(row)), args.sort_by,
                                    args.dataloader_num_workers)
    if rank == 0:
        data.show_sample(processor, encode(train_rows[plan[0]]))

    def held_out_length(row):
        group = encode(row)
        if rewards is not None:  # it is answered as well
            answered = len(group[0].tokens) + args.max_completion_length
            data.check_length([row], 0, answered, data.length_limit(policy, None))
        return data.group_length(group)

    eval_rows = data.check_eval_rows(eval_rows, limit, rank, world_size, held_out_length,
                                     args.dataloader_num_workers)

    def encoded(rows, places, size):
        """Lists of `size` groups of the rows in these places, of which the next one is prepared meanwhile."""
        groups = data.in_order(lambda i: encode(rows[i]), places, args.dataloader_num_workers, size)
        return iter(lambda: list(itertools.islice(groups, size)), [])

    def places_from(step):
        """This rank's slices of the global batches from a step on, the same for any number of ranks."""
        starts = range(step * step_rows + rank * rank_rows, max_steps * step_rows, step_rows)
        return (i for start in starts for i in plan[start:start + rank_rows])

    stop = model.Stop(args.max_hours)

    def within_budget(batches):
        """The same groups in smaller lists where a list is more than --max_tokens_per_batch holds."""
        for groups in batches:
            spans = [(0, len(groups))]
            if args.max_tokens_per_batch is not None:
                sizes = [tokens_of(group) for group in groups]
                spans = model.spans_within(sizes, args.max_tokens_per_batch, alike=False)
            yield from (groups[start:stop] for start, stop in spans)

    def cached(scorer, name):
        """Its log-probs of every row that the run will visit and of the held-out ones."""
        cache = ReferenceCache(args.ref_cache, scorer)
        batched = encoded(train_rows, dict.fromkeys(places_from(0)), args.per_device_train_batch_size)
        with model.gathered(scorer), model.adapter_off(scorer), stop.passes():
            computed, found = cache.add(scorer, within_budget(batched), args.share_prompt, stop)
            batched = encoded(eval_rows, range(len(eval_rows)), args.per_device_eval_batch_size)
            cache.add(scorer, within_budget(batched), args.share_prompt, stop)
            if rank == 0:
                print(f"{name} log-probs: {computed} pairs computed, {found} found in {cache.folder} "
                      "(rank 0, training rows)", flush=True)
        return cache

    references, asked = {}, False
    if any(losses.PAIR_LOSSES[name].reference for name in args.loss_type if name != "sft"):
        references["ref"] = cached(policy, "reference")
        asked = stop.agreed()
    further = [item for scorers in model.hooks(args, "scorers") for item in scorers(args).items()]
    for name, path in further if not asked else ():
        references[name] = cached(load_scorer(args, path, policy, processor, device), name)
        asked = asked or stop.agreed()
    if asked:  # what was computed is on disk, and there is nothing else to lose
        return model.end_run(output_dir, rank, "stopped", None, rewards)
    if args.preflight or args.preflight is None and device.type == "cuda":
        size = args.per_device_train_batch_size
        if args.max_tokens_per_batch is not None:
            size = max(1, args.max_tokens_per_batch // tokens_of(encode(train_rows[longest[0]])))
        largest = (longest * size)[:size]
        groups = [encode(train_rows[i]) for i in largest]
        model.preflight(policy, groups, 1.0, rank, args.share_prompt)
    optimizer, scheduler, parameters = model.make_optimizer(args, policy, max_steps)
    weighted = list(zip(args.loss_type, args.loss_weights))

    def evaluate(step):
        """Means over the held-out rows; None if the run is asked to stop meanwhile."""
        if not eval_rows:
            return {}
        sums = {}

        def scored():
            """The held-out rows' prompts, each batch when its terms are added: no row is encoded twice."""
            batched = encoded(eval_rows, range(len(eval_rows)), args.per_device_eval_batch_size)
            for groups in within_budget(batched):
                terms, metrics = score_groups(args, policy, groups, references, state)
                model.add_sums(sums, terms, "eval/loss/")
                model.add_sums(sums, metrics, "eval/")
                if stop():
                    raise model.Interrupted
                yield from (prompt for prompt, _ in groups)

        with torch.no_grad(), model.gathered(policy), stop.passes():
            prompts = scored()
            if rewards is not None:
                texts, scores = rollout.evaluate(
                    policy, processor, eval_rows, range(rank, rank + len(eval_rows) * world_size, world_size),
                    prompts, rewards,
                    temperature=args.eval_temperature, max_completion_length=args.max_completion_length,
                    batch_size=args.per_device_eval_batch_size, seed=args.seed, step=step,
                    num_generations=args.num_generations_eval, stop=stop)
            for _ in prompts:  # without answers nobody else asks for them
                pass
        if stop.agreed():
            return None
        if rewards is not None:
            known = ~scores[0].isnan()
            model.add_sums(sums, {"accuracy": (scores[0][known].sum(), known.sum())}, "eval/")
            model.add_sums(sums, rollout.pass_at_k(scores[0], args.num_generations_eval))
            if rank == 0:
                rollout.save_completions(output_dir / "completions" / f"eval_{step}.jsonl", eval_rows, texts,
                                         {"accuracy": scores[0]})
        means = {k: s / max(n, 1) for k, (s, n) in model.all_reduce_sums(sums, device).items()}
        means["eval/loss"] = sum(weight * means[f"eval/loss/{name}"] for name, weight in weighted)
        if rank == 0:
            shown = ("eval/loss", "eval/rewards/margins", "eval/rewards/accuracies", "eval/accuracy")
            line = ", ".join(f"{k} {means[k]:.4f}" for k in shown if k in means)
            tqdm.write(f"held-out, step {step}: {line}")
        return means

    # --- what a checkpoint holds besides weights and optimizer. Data order and randomness follow from step.
    #     pending: metrics of `step` that still wait for their evaluation
    state = model.with_states(args, {"step": 0, "pending": {"step": 0}, "bco_shift": 0.0, "start": {},
                                     "end": {}, "skipped": 0})
    saver, _ = model.restore(args, output_dir, resumed, state, policy, optimizer, scheduler, rank)

    def close_step(metrics) -> bool:
        """Held-out rows, the log, a checkpoint, each when it is due. True if the run was asked to stop."""
        step = metrics["step"]
        if step == 0 or step % args.eval_steps == 0 or step == max_steps:
            means = evaluate(step)
            if means is None:
                saver.save(state | {"pending": metrics}, {}, last=True)
                return True
            metrics |= means
            state["end"], state["start"] = means, state["start"] or means
        model.log_step(metrics, output_dir, rank, (
            "loss", "rewards/margins", "rewards/accuracies", "rewards/chosen", "nll", "grad_norm",
            "learning_rate", "step_time", "eval/accuracy"))
        report(metrics)
        stopping = stop.agreed()
        if stopping or step % args.save_steps == 0 and step > 0:
            saver.save(state | {"pending": None}, {}, last=stopping)
        return stopping

    def enough() -> bool:
        goal = args.stop_at_accuracy
        return goal is not None and state["end"].get("eval/accuracy", -1) >= goal

    stopped = state["pending"] is not None and close_step(state["pending"])
    progress = tqdm(total=max_steps, initial=state["step"], desc=" ".join(args.algo),
                    disable=None if rank == 0 else True)
    model.set_status(output_dir, rank, "running", state["step"])
    updates = encoded(train_rows, places_from(state["step"]), rank_rows)

    # ----------------------------------------------------------------------------------------------- the loop
    while state["step"] < max_steps and not stopped and not enough():
        step = state["step"]
        began = time.perf_counter()
        groups = next(updates)
        size = args.per_device_train_batch_size
        micro_batches = [groups[i:i + size] for i in range(0, len(groups), size)]
        if args.max_tokens_per_batch is not None:
            spans = model.spans_within([tokens_of(group) for group in groups], args.max_tokens_per_batch)
            micro_batches = [groups[start:stop] for start, stop in spans]

        # 1. what each loss is divided by, over all micro-batches and ranks
        tokens = sum(len(completions[0]) for _, completions in groups)
        counts = {name: (tokens if name == "sft" and args.nll_normalization == "token" else len(groups), 0)
                  for name in args.loss_type}
        counts = {name: count for name, (count, _) in model.all_reduce_sums(counts, device).items()}

        # 2. gradients: each micro-batch adds its share of the step's weighted sum
        sums = {}
        for micro in micro_batches:
            terms, metrics = score_groups(args, policy, micro, references, state)
            loss = sum(weight * terms[name][0] / counts[name] for name, weight in weighted)
            (loss * world_size).backward()
            metrics |= {f"loss/{name}": (total.detach(), count) for name, (total, count) in terms.items()}
            model.add_sums(sums, metrics)

        # 3. step; not on a gradient that is nan or infinite
        grad_norm = model.clip_grad_norm_(parameters, args.max_grad_norm)
        learning_rate = scheduler.get_last_lr()[0]
        if math.isfinite(grad_norm):
            optimizer.step()
        state["skipped"] = model.count_skipped(grad_norm, state["skipped"], output_dir, rank, step + 1,
                                               [prompt.row for prompt, _ in groups])
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)

        # 4. everything below is diagnostics, except that BCO's shift and --algo's STATE move by this step
        means = {key: total / count for key, (total, count) in model.all_reduce_sums(sums, device).items()}
        metrics = {"step": step + 1, "epoch": (step + 1) * step_rows / len(train_rows),
                   "loss": sum(weight * means[f"loss/{name}"] for name, weight in weighted),
                   "grad_norm": grad_norm, "learning_rate": learning_rate,
                   "update_skipped": float(not math.isfinite(grad_norm)), **means}
        if "bco_pair" in args.loss_type:
            metrics["bco_delta"] = state["bco_shift"]  # the one that this step used
            mean_reward = (means["rewards/chosen"] + means["rewards/rejected"]) / 2
            if math.isfinite(mean_reward):
                state["bco_shift"] = losses.next_bco_delta(state["bco_shift"], mean_reward, step,
                                                           args.bco_delta)
        for after_step in model.hooks(args, "after_step"):
            after_step(state, metrics)
        if rank == 0 and step == 0:
            tqdm.write("step 1 must start at: " + ", ".join(
                f"{name} {means[f'loss/{name}']:.4f} (expected {start_value(args, name)})"
                for name in args.loss_type))
        metrics["step_time"] = time.perf_counter() - began
        state["step"] = step + 1
        stopped = close_step(metrics)
        progress.update()

    progress.close()
    if stopped:
        return model.end_run(output_dir, rank, "stopped", state["step"], rewards)
    if rank == 0 and enough():
        print(f"stopped at step {state['step']}: eval/accuracy {state['end']['eval/accuracy']:.4f}")
    model.finish_run(args, policy, processor, source, output_dir, rank, state, rewards)


if __name__ == "__main__":
    try:
        main()
    except model.InputError as error:
        sys.exit(f"error: {error}")

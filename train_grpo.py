"""Online alignment of a vision-language model: GRPO, GSPO, RLOO, GDPO, Online DPO and their relatives.

    python train_grpo.py                         # the built-in default: a tiny VLM, CPU, under 3 min
    python train_grpo.py --model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct --algo gspo --dtype bfloat16 \\
        --dataset train.jsonl --image_root images --gradient_checkpointing --num_generations 8 \\
        --per_device_train_batch_size 8 --gradient_accumulation_steps 8 --max_completion_length 512 \\
        --reward_funcs accuracy format my_rewards.py:brief
    torchrun --nproc_per_node=8 train_grpo.py ... --output_dir runs/a    # sharded; run again, it goes on

    prompts -> rollout (G completions each, with their log-probs) -> group rows -> rewards -> advantages
            -> token log-probs -> policy loss / its count over the whole optimizer step -> step

At the first update of a rollout the ratio is exactly 1, nothing is clipped, yet the gradient norm is not 0;
with loss_type grpo the loss is 0 (advantages are centred), with dapo it is -sum A|y| / sum |y|.

Where this differs from the papers and from TRL:
 1. Every loss is a sum over the whole optimizer step divided by its count there, so the gradient depends on
    neither micro-batch size nor number of ranks. TRL's does in `bnpo`, in the entropy bonus, and where its
    micro-batches are of unequal sizes; `cispo`, `dapo` and `vespo` it divides by the rollout's tokens.
 2. A rollout's groups are cut into updates whole. TRL shuffles completions across the updates of a rollout.
 3. beta is 0 (TRL's default; the GRPO paper has 0.04): no reference model is kept. With LoRA there never is
    one: it is the policy with its adapter off. LoRA has no dropout, since the first ratio must be 1.
 4. With one update per rollout, and no KL in the reward, old log-probs are the training pass's own, detached:
    the ratio is exactly 1 also in bf16; else one no-grad pass of the same function on the same rows. The
    sampler's own log-probs are compared with them (sampling/sampling_logp_difference/mean), and used for
    nothing else but --importance_sampling_correction and papers/off_policy_mask.py.
 5. Ids that can never be an answer (image placeholders) are left out of the softmax, in sampler and trainer.
 6. --algo dapo is its loss, clip range and truncation mask; --dynamic_sampling N (candidates beyond the batch
    are not kept: the next rollout draws them anew) and --reward_funcs ... soft_overlong are to be asked for.
 7. The KL is multiplied by the ratio, as in TRL 1.16, so that k1's and k3's gradient is that of
    KL(pi || ref) (not with GSPO's ratio, a root); --no-use_bias_correction_kl is the GRPO paper's. The
    entropy bonus is a mean over the step's tokens.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads ruin a shared machine

import math
import sys
import time
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import losses
import model
import rollout
from model import Count, Finite, Name, NonNegative, Positive, Share, Size
from rewards import BUILT_IN, NEED_SOLUTION, answers, boxes

# ------------------------------------------------------------------------------------------------------------

PRESETS = {
    "grpo": dict(loss_type="grpo", importance_sampling_level="token", epsilon=0.2),  # arXiv 2402.03300
    "gspo": dict(loss_type="grpo", importance_sampling_level="sequence", epsilon=3e-4,
                 epsilon_high=4e-4),  # arXiv 2507.18071
    "gspo_token": dict(loss_type="grpo", importance_sampling_level="sequence_token", epsilon=3e-4,
                       epsilon_high=4e-4),  # arXiv 2507.18071
    "dr_grpo": dict(loss_type="dr_grpo", scale_rewards="none", epsilon=0.2),  # arXiv 2503.20783
    "dapo": dict(loss_type="dapo", epsilon=0.2, epsilon_high=0.28,
                 mask_truncated_completions=True),  # arXiv 2503.14476
    "lite_ppo": dict(loss_type="dapo", scale_rewards="batch"),  # arXiv 2508.08221
    "cispo": dict(loss_type="cispo", epsilon_high=5.0, scale_rewards="batch"),  # 2506.13585, 2510.13786
    "sapo": dict(loss_type="sapo"),  # arXiv 2511.20347
    "luspo": dict(loss_type="luspo", importance_sampling_level="sequence", epsilon=2e-3,
                  epsilon_high=2.5e-3),  # arXiv 2602.05261
    "vespo": dict(loss_type="vespo"),  # arXiv 2602.10693
    "rloo": dict(loss_type="grpo", importance_sampling_level="sequence_sum", advantage_estimator="rloo",
                 kl_in_reward=True, kl_estimator="k1", beta=0.03),  # arXiv 2402.14740
    "gdpo": dict(loss_type="grpo", advantage_estimator="gdpo"),  # arXiv 2601.05242
    "online_dpo": dict(loss_type="sigmoid", advantage_estimator="none", beta=0.1),  # arXiv 2402.04792
}
# Updates that a rollout is cut into: GSPO's paper has four; what else corrects for old samples gets as many
# here, the other presets take one. A file of papers/ says its own UPDATES.
UPDATES_PER_ROLLOUT = dict.fromkeys(("gspo", "gspo_token", "sapo", "luspo", "vespo"), 4)
# For the tiny model, used when no --model_name_or_path is given. At temperature 1 one seed of three ceased to
# try one of the six answers, and stayed at 0.85; at 1.25 none did.
TINY_DEFAULTS = dict(learning_rate=3e-4, temperature=1.25, per_device_train_batch_size=256, max_steps=75,
                     eval_steps=25, warmup_steps=5, adam_beta2=0.95, lr_scheduler_type="constant",
                     max_completion_length=24, per_device_eval_batch_size=256)
TINY_OF_FOUR = dict(learning_rate=2e-4, per_device_train_batch_size=64, max_steps=150)
TINY_BY_ALGO = dict.fromkeys(UPDATES_PER_ROLLOUT, TINY_OF_FOUR)


CORRECTIONS = "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"


@dataclass
class Args:
    # --- what
    algo: list[Name] = field(default_factory=lambda: ["grpo"])  # a preset of the loss flags, a file of
    # papers/ or a path to your own; a flag given wins. Further files add what they bring. Presets: PRESETS;
    # files: PAPERS
    model_name_or_path: str | None = None  # folder or hub id of a vision-language model; none: a tiny one is
    # built
    # --- data
    dataset: list[str] | None = None  # files, folders, hub ids of prompts (see data.py); none: shapes
    dataset_weights: list[Positive] | None = None  # each one's share of the draws; default: its rows
    image_root: str | None = None  # folder that image paths are relative to, and may not leave
    sort_by: str | None = None  # column of the data: train in its order, lowest first, in each epoch
    # (curriculum)
    eval_dataset: str | None = None  # held-out rows, same columns and --image_root
    overlong: Literal["error", "skip"] = "error"  # rows over the limit: stop, or skip and count them
    dataloader_num_workers: Count = 2  # threads that read and process rows ahead
    seed: Count = 0  # of the data order, the sampling, the tiny model
    max_prompt_length: Size | None = None  # tokens; default: what the context leaves the completion
    # --- rewards
    reward_funcs: list[Name] = field(default_factory=lambda: ["accuracy", "format"])  # any of REWARDS, or
    # path/to/file.py:function; spaces or commas
    reward_weights: list[Finite] | None = None  # one per reward; default 1, 0.1 for format
    missing_eos_penalty: NonNegative = 0.0  # off the reward of answers cut at the limit
    advantage_estimator: str = "grpo"  # baseline: the group's mean (grpo), its other completions (rloo), per
    # reward function (gdpo); none: the reward, for losses of a group; or what --algo's files bring
    scale_rewards: Literal["group", "batch", "none"] | None = None  # whose std divides grpo's advantages;
    # default group
    # --- loss
    loss_type: str = "grpo"  # the loss of a token, and the mean: POLICY_LOSSES; of a group: GROUP_LOSSES; or
    # what --algo's files bring
    importance_sampling_level: Literal[losses.RATIO_LEVELS] = "token"  # the ratio: GRPO's, GSPO's,
    # GSPO-token's, RLOO's
    epsilon: NonNegative = 0.2  # ratio clipped below at 1 - epsilon
    epsilon_high: NonNegative | None = None  # ratio clipped above at 1 + epsilon_high; default: epsilon.
    # cispo: at epsilon_high itself
    delta: Annotated[float, "(1, inf)"] | None = None  # upper bound of the ratio also for negative advantages
    beta: NonNegative = 0.0  # weight of the KL to the starting policy; 0: no reference
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"  # of the KL per token
    use_bias_correction_kl: bool = True  # multiply the KL by the ratio: then k1's and k3's gradient is the
    # KL's, but for the ratio of level sequence
    kl_in_reward: bool = False  # take beta * KL off the rewards, as RLOO does
    entropy_coef: Finite = 0.0  # weight of the bonus for mean token entropy
    mask_truncated_completions: bool = False  # no gradient from answers that met the length limit
    importance_sampling_correction: Literal[CORRECTIONS] | None = None  # weigh by trainer / sampler
    # probabilities; default none, with a server TRL's sequence_mask
    importance_sampling_clip_max: Positive = 3.0  # largest such weight: cut, or 0
    # --- sampling
    vllm_server_base_url: str | None = None  # let this `vllm serve` sample, on GPUs of its own; started as
    # rollout.VLLMServer says, it must see --output_dir under the same path
    dynamic_sampling: Count = 0  # at most so many more rounds of prompts until each group of the batch has
    # rewards that differ (DAPO); costs a rollout a round
    num_generations: Annotated[int, "[2, inf)"] = 8  # G, completions per prompt
    max_completion_length: Size = 256  # tokens sampled at most
    temperature: Positive = 1.0  # of sampling; every log-prob is taken at it
    top_k: Count = 0  # sample among the k likeliest tokens; 0: all
    top_p: Annotated[float, "(0, 1]"] = 1.0  # sample among the likeliest tokens that sum to p
    min_p: Share = 0.0  # sample tokens of at least this share of the likeliest's
    rollout_tokens: Size = 262_144  # keys and values in memory while sampling, in tokens; prompts beyond wait
    # --- steps
    per_device_train_batch_size: Size = 8  # completions of a micro-batch
    steps_per_generation: Size | None = None  # micro-batches of a rollout, a multiple of
    # gradient_accumulation_steps; default: one update per rollout, in FOUR_UPDATES four
    num_iterations: Size = 1  # passes over a rollout
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

    HELP = {"PRESETS": ", ".join(PRESETS), "PAPERS": model.papers_for("train_grpo.py"),
            "REWARDS": ", ".join(BUILT_IN), "POLICY_LOSSES": ", ".join(losses.POLICY_LOSSES),
            "GROUP_LOSSES": ", ".join(losses.GROUP_LOSSES), "FOUR_UPDATES": ", ".join(UPDATES_PER_ROLLOUT)}

    def __post_init__(self):
        model.check_shared(self)
        check_args(self)
        model.check_methods(self)


def parse_args(argv):
    return model.parse(Args, PRESETS, TINY_DEFAULTS, TINY_BY_ALGO, argv)


def check_loss(args):
    """Combinations that contradict each other are refused; that change what is optimised, warned of."""
    loss, level, preset, warn = args.loss_type, args.importance_sampling_level, args.preset, model.warn
    for flag, known in (("loss_type", [*losses.POLICY_LOSSES, *losses.GROUP_LOSSES]),
                        ("advantage_estimator", list(losses.ADVANTAGES))):
        if getattr(args, flag) not in known:
            raise ValueError(f"unknown --{flag} {getattr(args, flag)!r}; choose from {', '.join(known)}")
    of_group = losses.GROUP_LOSSES.get(loss)
    term, mean, clips = losses.POLICY_LOSSES.get(loss, (None, None, None))
    if args.advantage_estimator == "grpo":
        args.scale_rewards = args.scale_rewards or "group"
    elif args.scale_rewards not in (None, preset.get("scale_rewards")):
        raise ValueError("--scale_rewards is for --advantage_estimator grpo; "
                     f"{args.advantage_estimator} has its own")
    else:
        args.scale_rewards = None
    kl_in_loss = args.beta and not of_group and not args.kl_in_reward
    if kl_in_loss and args.kl_estimator == "k1" and not args.use_bias_correction_kl:
        warn("the gradient of k1 without the ratio is 0 on average: --beta does nothing. k2 has the KL's")
    if kl_in_loss and args.kl_estimator == "k1" and args.use_bias_correction_kl and level == "sequence":
        warn("k1 times the ratio of --importance_sampling_level sequence, a |y|-th root, has 1/|y| of the "
             "KL's gradient; k2 with --no-use_bias_correction_kl has the whole")
    if kl_in_loss and args.kl_estimator == "k2" and args.use_bias_correction_kl:
        warn("the gradient of k2 is the KL's without the ratio: --no-use_bias_correction_kl")
    if args.kl_in_reward and not args.beta:
        raise ValueError("--kl_in_reward needs --beta above 0, its weight")
    for name in ("kl_in_reward", "missing_eos_penalty"):
        if getattr(args, name) and not losses.ADVANTAGES[args.advantage_estimator].of_sums:
            raise ValueError(f"--{name} cannot go with {args.advantage_estimator}, which never sums the "
                             "rewards it would be taken off")
    if of_group and args.advantage_estimator != "none":
        raise ValueError(f"--loss_type {loss} compares rewards: it needs --advantage_estimator none")
    if not of_group and args.advantage_estimator == "none":
        raise ValueError("--advantage_estimator none is for --loss_type "
                         f"{', '.join(losses.GROUP_LOSSES)}; got {loss}")
    if of_group:
        neutral = dict(importance_sampling_level="token", importance_sampling_correction="none",
                       mask_truncated_completions=False, kl_in_reward=False)
        for name, value in neutral.items():
            if getattr(args, name) != value:
                raise ValueError(f"--loss_type {loss} compares whole completions: --{name} does not go with "
                                 "it")
        if bool(args.beta) != of_group.reference:
            why = "has no --beta" if args.beta else "needs --beta above 0"
            raise ValueError(f"--loss_type {loss} {why}")
    if args.delta is not None and (term is not losses.clipped_term or args.delta <= 1 + args.epsilon_high):
        clipped = ", ".join(name for name, x in losses.POLICY_LOSSES.items() if x.term is losses.clipped_term)
        raise ValueError(f"--delta must be above 1 + epsilon_high, and is for --loss_type {clipped}")
    if loss == "vespo" and (level != "token" or args.importance_sampling_correction.startswith("sequence")):
        raise ValueError("vespo builds the ratio of the whole sequence itself: it takes "
                         "--importance_sampling_level token and --importance_sampling_correction none or "
                         "token_*")
    if level in ("sequence", "sequence_sum") and mean in ("token", "constant", "micro_batch"):
        warn(f"{loss} sums over tokens, so with one ratio a sequence (--importance_sampling_level {level}) "
             "each completion weighs as much as it is long; GSPO is --loss_type grpo")
    if clips and args.epsilon_high >= 1:
        warn(f"--epsilon_high {args.epsilon_high:g} lets the ratio rise to {1 + args.epsilon_high:g}"
             + (": it is cispo's" if args.algo[0] == "cispo" else ""))
    no_kl = "without --beta in a loss of tokens"
    model.changes_nothing(args, {
        name: why for name, why, used in (
            ("epsilon", f"in --loss_type {loss}", clips),
            ("epsilon_high", f"in --loss_type {loss}",
             clips or loss == "cispo" or args.epsilon_high == args.epsilon),
            ("kl_estimator", no_kl, args.beta and not of_group),
            ("use_bias_correction_kl", f"{no_kl}, or with --kl_in_reward", kl_in_loss),
            ("importance_sampling_clip_max", "without --importance_sampling_correction",
             args.importance_sampling_correction != "none")) if not used})
    if loss == "luspo" and level != "sequence":
        warn("luspo is defined with --importance_sampling_level sequence")
    if loss == "cispo" and args.epsilon_high <= 1:
        warn(f"cispo's --epsilon_high bounds the ratio itself: at {args.epsilon_high:g} every weight on "
             f"policy is {args.epsilon_high:g}. ScaleRL has 5")
    if args.top_k or args.top_p < 1 or args.min_p:
        warn("--top_k, --top_p and --min_p narrow the samples, not the log-probs: the ratio still starts "
             "at 1, but the gradient is no longer that of the expected reward")


def check_args(args):
    args.epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    served = args.vllm_server_base_url is not None
    if served and not args.vllm_server_base_url.startswith(("http://", "https://")):
        raise ValueError(f"--vllm_server_base_url {args.vllm_server_base_url}: expected http://host:port")
    if args.importance_sampling_correction is None:
        default = "token_truncate" if args.loss_type == "vespo" else "sequence_mask"
        args.importance_sampling_correction = (
            default if served and args.loss_type in losses.POLICY_LOSSES else "none")
    if served and (args.top_k or args.top_p < 1 or args.min_p):
        raise ValueError("--vllm_server_base_url does not go with --top_k, --top_p or --min_p: vLLM's "
                         "log-probs would be those of what they leave, the trainer's are of all ids")
    check_loss(args)
    for name in args.reward_funcs:
        if name not in BUILT_IN and ":" not in name:
            raise ValueError(f"--reward_funcs {name} names no function of the file: {name}:function"
                         if name.endswith(".py") else f"unknown --reward_funcs {name}; choose from "
                         f"{', '.join(BUILT_IN)} or path/to/file.py:function")
    names = [name.rpartition(":")[2] for name in args.reward_funcs]
    if not names:
        raise ValueError("--reward_funcs names no function")
    if len(set(names)) < len(names):
        raise ValueError(f"two --reward_funcs have one name ({', '.join(names)}): their metrics would mix")
    args.reward_weights = args.reward_weights or [0.1 if f == "format" else 1.0 for f in args.reward_funcs]
    if len(args.reward_weights) != len(args.reward_funcs):
        raise ValueError(f"{len(args.reward_funcs)} --reward_funcs "
                     f"but {len(args.reward_weights)} --reward_weights")
    if not any(args.reward_weights):
        raise ValueError("--reward_weights are all 0: there is nothing to train on")
    ga, size, G = args.gradient_accumulation_steps, args.per_device_train_batch_size, args.num_generations
    updates = max([UPDATES_PER_ROLLOUT.get(args.algo[0], 1), *model.hooks(args, "UPDATES")])
    args.steps_per_generation = args.steps_per_generation or ga * updates
    if args.steps_per_generation % ga:
        enough = ga * math.ceil(args.steps_per_generation / ga)
        raise ValueError(f"--steps_per_generation {args.steps_per_generation} must be a multiple of "
                     f"--gradient_accumulation_steps {ga}; {enough} is")
    if size * ga % G:
        raise ValueError(f"an update of {size} x {ga} completions (per_device_train_batch_size x "
                     f"gradient_accumulation_steps) must hold whole groups of --num_generations {G}; "
                     f"{math.ceil(size * ga / G) * G} completions would")
    if (args.loss_type in losses.GROUP_LOSSES or any(model.hooks(args, "WHOLE_GROUPS"))) and size % G:
        raise ValueError(f"--loss_type {args.loss_type} compares the completions of a group: "
                     f"--per_device_train_batch_size {size} must be a multiple of --num_generations {G}")


def check_solution(row, reward_funcs):
    """RowError for a solution that a built-in reward will not be able to read."""
    readers = answers.READERS | boxes.READERS
    for name in readers.keys() & set(reward_funcs):
        try:
            answers.compare(readers[name], [""], [row["solution"]])
        except ValueError as error:
            raise data.RowError(f"{row['_source']}: --reward_funcs {name}: {error}") from None


def main(argv=None):
    args = parse_args(argv)
    rank, world_size, device = model.init_distributed(args.device, args.deterministic)
    output_dir, resumed = model.open_run(args, rank, world_size)
    if resumed and model.is_done(args, output_dir, rank):
        return
    report = model.Report(args, output_dir, rank)
    names = [name.rpartition(":")[2] for name in args.reward_funcs]
    rewards = rollout.RewardRunner(args.reward_funcs, args.reward_timeout)  # starts while the model loads

    # --- sizes. A rollout serves `updates` optimizer steps, num_iterations times over
    G = args.num_generations
    updates = args.steps_per_generation // args.gradient_accumulation_steps
    completions_per_update = args.per_device_train_batch_size * args.gradient_accumulation_steps  # per rank
    prompts_per_rank = completions_per_update * updates // G
    prompts_per_rollout = prompts_per_rank * world_size
    steps_per_rollout = updates * args.num_iterations
    share = completions_per_update // G  # prompts of an update, per rank
    copies = 1 if args.share_prompt else G  # of a prompt in a micro-batch of whole groups

    # --- data
    need = ("prompt", "solution") if NEED_SOLUTION & set(args.reward_funcs) else ("prompt",)
    train_rows, eval_rows = data.rows_of_run(args, need)
    if args.sort_by is not None:
        data.check_numbers(train_rows, args.sort_by, -1e300, 1e300, "--sort_by")
    rollouts = args.num_train_epochs * len(train_rows) / prompts_per_rollout
    max_steps = args.max_steps if args.max_steps > 0 else math.ceil(rollouts) * steps_per_rollout
    rollouts = math.ceil(max_steps / steps_per_rollout)
    if rank == 0:
        print(f"rollout: {prompts_per_rollout} prompts x {G} completions, {steps_per_rollout} updates each; "
              f"{rollouts} rollouts, {max_steps} steps", flush=True)
    # --- policy, the prompts that it will meet, reference, optimizer
    source = model.start_model(args, output_dir, rank)
    policy, processor = model.load_policy(source, args.dtype, device, args.gradient_checkpointing,
                                          args.freeze_vision_tower, args.shard_size, lora=args)
    for note in policy.notes if rank == 0 else []:
        print(f"{policy.hf.config.model_type}: {note}", flush=True)
    ref = None
    if args.beta and args.lora_r:
        ref = policy  # with its adapter off
    elif args.beta:
        ref, _ = model.load_policy(source, args.dtype, device, shard_size=args.shard_size)
        ref.requires_grad_(False)
    if world_size > 1 and hasattr(processor, "image_processor"):
        filler = data.encode_prompt(policy, processor, data.shapes_rows(1, 0, "train")[0])
        policy.filler = policy.see([filler])[0]

    def encode(row):
        return data.encode_prompt(policy, processor, row)

    def length_of(row):
        check_solution(row, args.reward_funcs)
        return len(encode(row).tokens)

    limit = data.length_limit(policy, None) - args.max_completion_length
    if limit < 1:
        raise model.InputError(f"--max_completion_length {args.max_completion_length} leaves no room for a "
                               f"prompt in the model's context of {data.length_limit(policy, None)} tokens")
    limit = limit if args.max_prompt_length is None else min(limit, args.max_prompt_length)
    most_draws = rollouts * prompts_per_rollout * (1 + args.dynamic_sampling)
    plan, longest = data.check_rows(train_rows, most_draws, args.seed, args.overlong, limit, rank, world_size,
                                    length_of, args.sort_by, args.dataloader_num_workers)
    if rank == 0:
        data.show_sample(processor, (encode(train_rows[plan[0]]), []))
    eval_rows = data.check_eval_rows(eval_rows, limit, rank, world_size, length_of,
                                     args.dataloader_num_workers)
    if args.preflight or args.preflight is None and device.type == "cuda":
        answer = torch.full((args.max_completion_length,), policy.pad_id)
        size, count = args.per_device_train_batch_size, math.ceil(args.per_device_train_batch_size / G)
        if args.max_tokens_per_batch is not None:
            group = copies * len(encode(train_rows[longest[0]]).tokens) + G * args.max_completion_length
            size, count = G, max(1, args.max_tokens_per_batch // group)
        largest = [encode(train_rows[i]) for i in (longest * count)[:count]]
        groups = [(prompt, [answer] * min(G, size - k * G if args.max_tokens_per_batch is None else G))
                  for k, prompt in enumerate(largest)]
        model.preflight(policy, groups, args.temperature, rank, args.share_prompt)
    optimizer, scheduler, parameters = model.make_optimizer(args, policy, max_steps)
    rewards.wait_until_ready()
    weights = torch.tensor(args.reward_weights, dtype=torch.float64)                          # (functions,)
    policy_loss = losses.group_loss if args.loss_type in losses.GROUP_LOSSES else losses.policy_loss
    flags = vars(args) | {"beta": 0.0 if args.kl_in_reward else args.beta}  # what losses take by name
    row_of = next(iter(model.hooks(args, "row_of")), None)  # which rows come next, if not the plan's

    server, sample = None, rollout.sample
    if args.vllm_server_base_url is not None:
        server = rollout.VLLMServer(args.vllm_server_base_url, output_dir / "vllm_weights", data.chat_request)
        sample = server.sample
        if rank == 0:
            print(f"rollouts by vLLM {server.version}, --importance_sampling_correction "
                  f"{args.importance_sampling_correction}; held-out answers by the own sampler", flush=True)

    def evaluate(step):
        """Means over the held-out rows; None if the run is asked to stop meanwhile."""
        if not eval_rows:
            return {}
        prompts = data.in_order(lambda i: encode(eval_rows[i]), range(len(eval_rows)),
                                args.dataloader_num_workers, args.per_device_eval_batch_size)
        with model.gathered(policy), stop.passes():
            texts, scores = rollout.evaluate(
                policy, processor, eval_rows, range(rank, rank + len(eval_rows) * world_size, world_size),
                prompts, rewards, temperature=args.eval_temperature,
                max_completion_length=args.max_completion_length, batch_size=args.per_device_eval_batch_size,
                seed=args.seed, step=step, num_generations=args.num_generations_eval,
                rollout_tokens=args.rollout_tokens, stop=stop)
        if stop.agreed():
            return None
        total = losses.weighted_rewards(scores, weights)
        sums = {"eval/reward": (total.nansum(), (~total.isnan()).sum())}
        for name, row in zip(names, scores):
            key = "eval/accuracy" if name == "accuracy" else f"eval/rewards/{name}/mean"
            sums[key] = (row.nansum(), (~row.isnan()).sum())
            if name == "accuracy":
                sums |= rollout.pass_at_k(row, args.num_generations_eval)
        means = {k: s / n for k, (s, n) in model.all_reduce_sums(sums, device).items() if n}
        if rank == 0:
            rollout.save_completions(output_dir / "completions" / f"eval_{step}.jsonl", eval_rows, texts,
                                     dict(zip(names, scores)))
            tqdm.write(f"held-out, step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in means.items()))
        return means

    # --- what a checkpoint holds besides weights and optimizer. Data order and randomness follow from step.
    #     pending: metrics of `step` that still wait for their evaluation; rows: the rollout being used;
    #     draws: its prompts' draw numbers, of all ranks; next_draw: the first of the next rollout;
    #     and the STATE of --algo's files
    state = model.with_states(args, {"step": 0, "pending": {"step": 0}, "start": {}, "end": {}, "skipped": 0,
                                     "draws": [], "next_draw": 0, "rollout_sums": {}})
    stop, rows = model.Stop(args.max_hours), {}
    saver, parts = model.restore(args, output_dir, resumed, state, policy, optimizer, scheduler, rank,
                                 ref if any(model.hooks(args, "MOVES_REFERENCE")) else None)

    def close_step(metrics) -> bool:
        """Held-out rows, the log, a checkpoint, each when it is due. True if the run was asked to stop."""
        step = metrics["step"]
        unfinished = rows if step % steps_per_rollout else {}
        if step == 0 or step % args.eval_steps == 0 or step == max_steps:
            means = evaluate(step)
            if means is None:
                saver.save(state | {"pending": metrics}, unfinished, last=True)
                return True
            metrics |= means
            state["end"], state["start"] = means, state["start"] or means
        model.log_step(metrics, output_dir, rank, (
            "reward", *(f"rewards/{name}/mean" for name in names), "reward_std", "frac_reward_zero_std",
            "loss", "grad_norm", "entropy", "kl", "clip_ratio/region_mean", "completions/mean_length",
            "completions/clipped_ratio", "step_time", "eval/accuracy"))
        report(metrics)
        stopping = stop.agreed()
        if stopping or step % args.save_steps == 0 and step > 0:
            saver.save(state | {"pending": None}, unfinished, last=stopping)
        return stopping

    def rows_drawn(draws):
        return (plan[draw] for draw in draws) if row_of is None else row_of(args, plan, draws, state)

    def share_of(draws):
        """This rank's among a rollout's draw numbers: its slice of every update, so that the ranks together
        make the updates of one rank."""
        return [draws[(update * world_size + rank) * share + i]
                for update in range(updates) for i in range(share)]

    def prompts_of(draws):
        """The prompts of these draws, one by one; a rollout's are prepared ahead."""
        return data.in_order(lambda i: encode(train_rows[i]), rows_drawn(draws), args.dataloader_num_workers,
                             prompts_per_rank)

    def cut(prompts, rows):
        """For each update its micro-batches of packed rows; one smaller than G holds slices of a group."""
        lengths = rows["completion_mask"].sum(-1).view(-1, G).sum(-1)                             # (P,)
        sizes = [copies * len(p.tokens) + int(n) for p, n in zip(prompts, lengths)]
        size, found = args.per_device_train_batch_size, []
        for i in range(0, len(prompts), share):
            whole = range(i * G, (i + share) * G)
            parts = [whole[k:k + size] for k in range(0, len(whole), size)]
            if args.max_tokens_per_batch is not None:
                spans = model.spans_within(sizes[i:i + share], args.max_tokens_per_batch)
                parts = [whole[start * G:stop * G] for start, stop in spans]
            found.append([make_micro_batch(args, policy, prompts, rows, part) for part in parts])
        return found

    if state["step"] % steps_per_rollout and not parts:
        raise model.InputError(f"the checkpoint of step {state['step']} holds no rollout, but must here; "
                               "it is of another algorithm, or of other --steps_per_generation")
    if parts:  # in the middle of a rollout
        draws = share_of(state["draws"])
        prompts = policy.see(list(prompts_of(draws)))
        rows = rows_of_draws(parts, draws, G)
        updates_of_rollout = cut(prompts, rows)
    coming, due = None, None  # the prompts from the draw `due` on
    candidates = []  # dynamic sampling: the groups drawn so far for this rollout, of all ranks
    stopped = state["pending"] is not None and close_step(state["pending"])
    recent, silent_until = deque(maxlen=20), {}  # metrics of the latest steps; no warning twice in 100 steps
    progress = tqdm(total=max_steps, initial=state["step"], desc=" ".join(args.algo),
                    disable=None if rank == 0 else True)
    model.set_status(output_dir, rank, "running", state["step"])

    # ----------------------------------------------------------------------------------------------- the loop
    while state["step"] < max_steps and not stopped:
        number, update = divmod(state["step"], steps_per_rollout)
        if not candidates:
            began, rollout_time, failed, scored = time.perf_counter(), 0.0, 0, 0
        if update == 0:
            # 1. sample G completions for each of this rank's P prompts of the rollout, N = P * G in all
            #    and score them
            for before_rollout in model.hooks(args, "before_rollout"):
                before_rollout(state)
            first = state["next_draw"] + sum(len(part["draws"]) for part in candidates)
            following = first + prompts_per_rollout
            drawn = range(first, following)
            if first != due or row_of is not None:  # what is measured here says which rows come next
                last = first if row_of is not None else len(plan) - prompts_per_rollout
                starts = range(first, last + 1, prompts_per_rollout)
                coming = prompts_of(d for i in starts for d in share_of(range(i, i + prompts_per_rollout)))
            draws, due = share_of(drawn), following
            prompts = policy.see(list(islice(coming, len(draws))))
            if server is not None and not candidates:
                server.push(policy, processor, source, rank)
            with stop.passes():
                with model.gathered(policy) if server is None else nullcontext():
                    sampled = sample(
                        policy, prompts, draws, num_generations=G, temperature=args.temperature,
                        max_completion_length=args.max_completion_length, seed=args.seed, top_k=args.top_k,
                        top_p=args.top_p, min_p=args.min_p, rollout_tokens=args.rollout_tokens, stop=stop)
                texts = rollout.decode(processor, sampled)
                rollout_time = time.perf_counter() - began
                scores = rewards.score(
                    texts, [p.row for p in prompts for _ in range(G)], state["step"] + 1,
                    completion_ids=rollout.id_lists(sampled),
                    max_completion_length=[args.max_completion_length] * len(texts))      # (functions, N)
                failed, scored = failed + rewards.failed, scored + scores.numel()
            if stop.agreed():  # the rollout is dropped: drawn again, it will be the same
                saver.save(state | {"pending": None}, {}, last=True)
                stopped = True
                break

            rows = sampled._asdict() | {"draws": torch.tensor(draws)}
            if args.dynamic_sampling or row_of is not None:
                columns = rows | {f"score {k}": row for k, row in enumerate(scores)}
                candidates += model.all_gather_object(columns)
                drawn, accepted, following, found = choose_groups(candidates, weights, G, prompts_per_rollout,
                                                                 args.advantage_estimator)
                if accepted < prompts_per_rollout and len(candidates) <= args.dynamic_sampling * world_size:
                    continue  # another round
                for after_rollout in model.hooks(args, "after_rollout"):
                    after_rollout(state, dict(zip(rows_drawn(found), found.values())))
                draws, tried = share_of(drawn), following - state["next_draw"]
                prompts = policy.see(list(prompts_of(draws)))
                rows, candidates = rows_of_draws(candidates, draws, G), []
                scores = torch.stack([rows.pop(f"score {k}") for k in range(len(names))])
                sampled = rollout.Rollout(*(rows[field] for field in rollout.Rollout._fields))
                texts = rollout.decode(processor, sampled)
            state |= {"draws": list(drawn), "next_draw": following}

            # 2. group rows, and the log-probs that the loss compares with, (N, T), 0 where nothing is trained
            updates_of_rollout, passes = cut(prompts, rows), {}
            if steps_per_rollout > 1 or args.kl_in_reward:  # else `old` is the training pass's
                passes["old_logps"] = policy
            if ref is not None:
                passes["ref_logps"] = ref
            rows |= {name: torch.zeros(rows["sampling_logps"].shape) for name in passes}
            scored_rows = []  # on the device, until all passes are under way
            with torch.no_grad():
                for micro in (micro for update in updates_of_rollout for micro in update):
                    batch = model.to_device(micro, device)
                    for name, scorer in passes.items():
                        with model.adapter_off(scorer) if name == "ref_logps" else nullcontext():
                            logps, *_ = scorer(batch, args.temperature, entropies=False)          # (n, T')
                        scored_rows.append((name, micro["rows"], logps))
            for name, indices, logps in scored_rows:
                rows[name][indices, :logps.shape[1]] = logps.cpu()
            if ref is not None and world_size > 1:
                ref.reshard()  # after a pass without backward FSDP leaves the root unit whole

            # 3. advantages come from the whole rollout, that of all ranks
            sums = rollout_metrics(names, scores, weights, sampled, G) | {"rewards/failed": (failed, scored)}
            minus = args.missing_eos_penalty * sampled.truncated.double()                         # (N,)
            if args.kl_in_reward:
                kl = losses.kl_penalty(rows["old_logps"], rows["ref_logps"], args.kl_estimator)   # (N, T)
                minus += args.beta * kl.sum(-1)
                sums["kl"] = kl.sum(), sum(m["completion_mask"].sum() for u in updates_of_rollout for m in u)
            everyone = model.all_gather(torch.cat([scores, minus[None]]), device)    # (functions+1, ranks*N)
            advantages = losses.advantages(args.advantage_estimator, everyone[:-1], weights, G,
                                           penalty=everyone[-1], **flags | state)
            rows["advantages"] = advantages[rank * len(texts):][:len(texts)].float()      # (N,)
            state["rollout_sums"] = model.all_reduce_sums(sums, device)
            if args.dynamic_sampling or row_of is not None:
                state["rollout_sums"]["frac_groups_accepted"] = accepted, tried
            if rank == 0:  # the first rollout after held-out rows is also shown
                show = state["step"] % args.eval_steps < steps_per_rollout
                rollout.save_completions(
                    output_dir / "completions" / f"step_{state['step'] + 1}.jsonl",
                    [p.row for p in prompts], texts,
                    dict(zip(names, scores)) | {"advantage": rows["advantages"]},
                    f"step {state['step'] + 1}, best and worst" if show else None)

        mine = [with_rows(micro, rows) for micro in updates_of_rollout[update % updates]]

        # 4. what the loss, and the entropy bonus, are divided by, over all micro-batches and ranks
        counts = (sum(losses.policy_loss_count(args.loss_type, m["completion_mask"],
                                               args.max_completion_length, m["advantages"], G) for m in mine),
                  sum(int(m["completion_mask"].sum()) for m in mine))
        count, tokens = (max(n, 1) for n in model.all_reduce_sums({"n": counts}, device)["n"])

        # 5. gradients, step
        sums = {}
        for micro in mine:
            micro = model.to_device(micro, device)
            logps, entropies, _ = policy(micro, args.temperature)                         # (n, T), (n, T)
            mask, old_logps = micro["completion_mask"], micro.get("old_logps", logps.detach())
            token_weights = weigh_tokens(args, logps, old_logps, entropies, micro)
            loss, metrics = policy_loss(logps, old_logps, micro["advantages"], mask,
                                        ref_logps=micro.get("ref_logps"), entropies=entropies,
                                        **flags | state | token_weights)
            loss = loss / count
            if args.entropy_coef:
                loss = loss - args.entropy_coef * losses.masked_sum(entropies, mask).sum() / tokens
            (loss * world_size).backward()
            metrics["loss"] = (loss.detach(), 0)
            metrics["entropy"] = (entropies.detach().sum(), mask.sum())
            gap = (old_logps - micro["sampling_logps"]).abs()                             # (n, T)
            metrics["sampling/sampling_logp_difference/mean"] = losses.masked_sum(gap, mask).sum(), mask.sum()
            metrics["sampling/sampling_logp_difference/tail"] = (mask & (gap > 0.2)).sum(), mask.sum()
            model.add_sums(sums, metrics)
        grad_norm = model.clip_grad_norm_(parameters, args.max_grad_norm)
        learning_rate = scheduler.get_last_lr()[0]
        if math.isfinite(grad_norm):  # else skipped, on all ranks
            optimizer.step()
        state["step"] = step = state["step"] + 1
        for after_update in model.hooks(args, "after_update"):
            after_update(args, policy, ref, step)
        state["skipped"] = model.count_skipped(grad_norm, state["skipped"], output_dir, rank, step,
                                               [p.row for p in prompts[update % updates * share:][:share]])
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)

        # 6. everything below is diagnostics
        sums = state["rollout_sums"] | model.all_reduce_sums(sums, device)
        loss = sums.pop("loss")[0]
        metrics = {"step": step, "epoch": state["next_draw"] / len(train_rows),
                   "loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate,
                   "update_skipped": float(not math.isfinite(grad_norm)),
                   **{k: s / n for k, (s, n) in sums.items() if n}}
        for after_step in model.hooks(args, "after_step"):
            after_step(state, metrics)
        gap = metrics.get("sampling/sampling_logp_difference/mean", 0.0)  # none where all tokens are masked
        if server is not None and update == 0 and gap > 0.2:
            raise server.error(f"its log-probs differ from the trainer's by {gap:.3g} a token: its weights "
                               "are not those it was given, or it computes another model")
        if rank == 0 and update == 0 and number == 0:
            expected = {"ratio": "1", "clip_ratio/region_mean": "0", "grad_norm": "> 0"}
            tqdm.write("step 1 must start at: " + ", ".join(
                f"{k} {metrics[k]:.6g} (expected {e})" for k, e in expected.items() if k in metrics))
        metrics |= {"rollout_time": rollout_time, "step_time": time.perf_counter() - began}
        recent.append(metrics)
        for sign, text in signs_of_collapse(recent).items():
            if rank == 0 and step >= silent_until.get(sign, 0):
                tqdm.write(f"warning, step {step}: {text}")
                silent_until[sign] = step + 100
        stopped = close_step(metrics)
        progress.update()

    progress.close()
    if stopped:
        return model.end_run(output_dir, rank, "stopped", state["step"], rewards)
    model.finish_run(args, policy, processor, source, output_dir, rank, state, rewards)


LOSS_ROWS = ("advantages", "sampling_logps", "old_logps", "ref_logps")


def make_micro_batch(args, policy, prompts, rows, indices) -> dict:
    """A rollout's completions `indices` as packed rows.

    Consecutive completions of one prompt share a row (or, with --no-share_prompt, stand in one each).
    """
    groups = []
    for n in indices:
        prompt = prompts[n // args.num_generations]
        ids = rows["completion_ids"][n][rows["completion_mask"][n]]
        if groups and groups[-1][0] is prompt:
            groups[-1][1].append(ids)
        else:
            groups.append((prompt, [ids]))
    batch = policy.pack(groups, args.share_prompt) | {"rows": torch.tensor(indices)}                   # (n,)
    if args.mask_truncated_completions:  # not trained, none of its tokens counted, but still one of N
        batch["completion_mask"] &= ~rows["truncated"][batch["rows"], None]
        batch["trained"] = model.flat_places(batch["completion_mask"])
    return batch


def with_rows(micro, rows) -> dict:
    """The micro-batch, and its part of what the rollout's `rows` have for the loss: (n,), or (n, T)."""
    chosen, T = micro["rows"], micro["completion_ids"].shape[1]
    found = {name: rows[name][chosen] for name in LOSS_ROWS if name in rows}
    return micro | {name: x if x.dim() == 1 else x[:, :T] for name, x in found.items()}


def rows_of_draws(parts, draws, G) -> dict:
    """Of the rows that the ranks of the interrupted run kept, those of these draws."""
    place = {int(d): (part, p * G) for part in parts for p, d in enumerate(part["draws"])}
    T = max(part["completion_ids"].shape[1] for part in parts)
    rows = {"draws": torch.tensor(draws)}
    for name in parts[0].keys() - rows.keys():
        found = [place[d][0][name][place[d][1]:][:G] for d in draws]                          # (G, ...)
        rows[name] = torch.cat([F.pad(x, (0, T - x.shape[1])) if x.dim() == 2 else x for x in found])
    return rows


def choose_groups(parts, weights, G, count, estimator="grpo"):
    """Dynamic sampling: (draw numbers of the `count` groups to train on, how many of them have weighted
    rewards that differ, the next rollout's first draw). The first that differ, in the order of draws,
    whichever rank drew them; if they are too few, the first of the others fill up. And {draw: variance of its
    group's rewards}: p (1 - p) for rewards of 0 and 1, 0 if they do not differ. An estimator that learns from
    groups whose rewards are all alike (NGRPO) says which of them count as well."""
    variance, useful = {}, {}
    for part in parts:
        scores = torch.stack([part[name] for name in part if name.startswith("score ")])
        deviations, _ = losses.centred(losses.weighted_rewards(scores, weights), G)               # (P, G)
        signal = (losses.advantages(estimator, scores, weights, G).view(-1, G)                    # (P, G)
                  if losses.ADVANTAGES[estimator].flat_groups else deviations)
        variance |= zip(part["draws"].tolist(), deviations.square().mean(-1).tolist())
        useful |= zip(part["draws"].tolist(), signal.ne(0).any(-1).tolist())
    variance = dict(sorted(variance.items()))
    accepted = [d for d in variance if useful[d]][:count]
    others = [d for d in variance if not useful[d]][:count - len(accepted)]
    following = max(variance if others else accepted) + 1
    return sorted(accepted + others), len(accepted), following, variance


def weigh_tokens(args, logps, old_logps, entropies, micro) -> dict:
    """`keep` and `correction` of losses.policy_loss, (n, T), by the flags that ask for them; {} without."""
    mask, weighing = micro["completion_mask"], {}
    if args.importance_sampling_correction != "none":
        weighing["correction"] = losses.sampler_correction(
            old_logps, micro["sampling_logps"], mask, args.importance_sampling_correction,
            args.importance_sampling_clip_max)
    for weigh in model.hooks(args, "weigh"):
        weights = weigh(args, micro, logps, old_logps, entropies)
        weighing["keep"] = weights if "keep" not in weighing else weights * weighing["keep"]
    return weighing


def rollout_metrics(names, scores, weights, sampled, G) -> dict[str, tuple[float, float]]:
    """TRL's keys for one rollout of this rank, as (sum, count). scores (functions, N)."""
    total = losses.weighted_rewards(scores, weights)                                          # (N,)
    groups, lengths = total.view(-1, G), sampled.completion_mask.sum(-1)                      # (P, G), (N,)
    known = groups[~groups.isnan().any(-1)]
    std = known.std(-1)                                                                       # (P',)
    sums = {"reward": (total.nansum(), (~total.isnan()).sum()), "reward_std": (std.sum(), len(std)),
            "frac_reward_zero_std": ((std < 1e-8).sum(), len(std)),
            "completions/mean_length": (lengths.sum(), len(lengths)),
            "completions/clipped_ratio": (sampled.truncated.sum(), len(lengths))}
    for name, row in zip(names, scores):
        sums[f"rewards/{name}/mean"] = (row.nansum(), (~row.isnan()).sum())
    return {key: (float(value), float(n)) for key, (value, n) in sums.items()}


def signs_of_collapse(recent) -> dict[str, str]:
    """{sign: warning with likely causes}, by the means of 20 steps' metrics; fewer: none. Changes nothing."""
    keys = ("frac_reward_zero_std", "reward", "entropy", "completions/clipped_ratio",
            "sampling/sampling_logp_difference/tail")
    flat, reward, entropy, cut, tail = (sum(m.get(k, math.nan) for m in recent) / len(recent) for k in keys)
    signs = {}
    if flat > 0.9:
        signs["spread"] = (
            f"{flat:.0%} of the groups have no spread of rewards and teach nothing (mean reward {reward:.3g})"
            ": prompts too easy or too hard, a reward that never tells answers apart, a low --temperature")
    if entropy < 0.02 or cut > 0.5:
        signs["text"] = (
            f"entropy {entropy:.3g} a token, {cut:.0%} of the completions cut off: --learning_rate too high, "
            "--temperature or --epsilon_high too low, --max_completion_length too short, text that repeats "
            "itself; completions/ shows which")
    if tail > 0.05:
        signs["sampler"] = (
            f"{tail:.1%} of the tokens have log-probs that differ by more than 0.2 in sampler and trainer: "
            "bf16 (a little), positions, masks or attention kernels that one of them has wrong (a lot); "
            "--importance_sampling_correction weighs such tokens")
    return signs if len(recent) >= 20 else {}


if __name__ == "__main__":
    try:
        main()
    except model.InputError as error:
        sys.exit(f"error: {error}")

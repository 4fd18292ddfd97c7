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

With one update per rollout, and no KL in the reward, the old log-probs are the training pass's own, detached;
else one pass without gradients of the same function on the same rows. So the ratio is exactly 1 also in bf16.
METHODS.md lists every loss, and where this differs from the papers and from TRL.
"""

import os
import signal
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads ruin a shared machine
if __name__ == "__main__":  # until the run listens (`Run.listen`), Ctrl-C ends it in one line
    signal.signal(signal.SIGINT, lambda *_: sys.exit("interrupted before the first step"))

import functools
import math
import time
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import islice
from typing import Annotated, Literal, NamedTuple

import torch
from tqdm import tqdm

import data
import losses
import model
import papers
import rollout
from layers.lora import adapter_off
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
                 beta=0.03),  # arXiv 2402.14740
    "gdpo": dict(loss_type="grpo", advantage_estimator="gdpo"),  # arXiv 2601.05242
    "online_dpo": dict(loss_type="sigmoid", advantage_estimator="none", beta=0.1),  # arXiv 2402.04792
}
# Updates (optimizer steps) that a rollout is cut into. GSPO's paper has four; other presets with an
# off-policy correction also default to 4, the rest to 1. A file of papers/ may set its own UPDATES.
UPDATES_PER_ROLLOUT = dict.fromkeys(("gspo", "gspo_token", "sapo", "luspo", "vespo"), 4)
# For the tiny model, used when no --model_name_or_path is given. At temperature 1 one seed of three stopped
# sampling one of the six answers, and its accuracy stayed at 0.85; at 1.25 none did.
TINY_DEFAULTS = dict(learning_rate=3e-4, temperature=1.25, per_device_train_batch_size=256, max_steps=75,
                     eval_steps=25, warmup_steps=5, adam_beta2=0.95, lr_scheduler_type="constant",
                     max_completion_length=24, per_device_eval_batch_size=256,
                     dataloader_num_workers=0)  # its pictures cost nothing
TINY_OF_FOUR = dict(learning_rate=2e-4, per_device_train_batch_size=64, max_steps=150)
TINY_BY_ALGO = dict.fromkeys(UPDATES_PER_ROLLOUT, TINY_OF_FOUR)


CORRECTIONS = "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"


@dataclass
class Args:
    # --- what
    algo: list[Name] = field(default_factory=lambda: ["grpo"])  # a preset of the loss flags, a file of
    # papers/ or a path to your own; a flag given wins. Further files add what they bring. Presets: PRESETS;
    # files: PAPERS
    model_name_or_path: str | None = None  # folder or hub id; for the built-in task: tiny, a random model
    # --- data
    dataset: list[str] | None = None  # files, folders, hub ids of prompts (see data.py); none: shapes
    dataset_weights: list[Positive] | None = None  # each one's share of the draws; default: its rows
    image_root: str | None = None  # folder that image paths are relative to, and may not leave
    columns: list[Name] | None = None  # prompt=question solution=answer: which of the data's columns is which
    system_prompt: str | None = None  # text, or a file of it: the system turn of rows that have none
    sort_by: str | None = None  # column that each epoch is sorted by, lowest first (a curriculum)
    eval_dataset: str | None = None  # held-out rows, same columns and --image_root
    overlong: Literal["error", "skip"] = "error"  # rows over the limit: stop, or skip and count them
    dataloader_num_workers: Count = 2  # threads that read and process rows ahead
    seed: Count = 0  # of the data order, the sampling, the tiny model
    max_prompt_length: Size | None = None  # tokens; default: what the context leaves the completion
    # --- rewards
    reward_funcs: list[Name] = field(default_factory=lambda: ["accuracy", "format"])  # any of REWARDS, or
    # path/to/file.py:function; spaces or commas
    reward_weights: list[Finite] | None = None  # one per reward; default 1, 0.1 for format
    advantage_estimator: str = "grpo"  # baseline: the group's mean (grpo), its other completions (rloo), per
    # reward function (gdpo); none: the reward, for losses of a group; or what --algo's files bring
    scale_rewards: Literal["group", "batch", "none"] | None = None  # whose std grpo divides by; default group
    # --- loss
    loss_type: str = "grpo"  # the loss of a token, and the mean: POLICY_LOSSES; of a group: GROUP_LOSSES; or
    # what --algo's files bring
    importance_sampling_level: Literal[losses.RATIO_LEVELS] = "token"  # the ratio: GRPO's, GSPO's,
    # GSPO-token's, RLOO's
    epsilon: NonNegative = 0.2  # ratio clipped below at 1 - epsilon
    epsilon_high: NonNegative | None = None  # ratio clipped above at 1 + epsilon_high; default: epsilon.
    # cispo: at epsilon_high itself
    delta: Annotated[float, "(1, inf)"] | None = None  # upper bound of the ratio also for negative advantages
    beta: NonNegative = 0.0  # weight of the KL to the starting policy: in the loss, or with rloo off the
    # reward; 0: no reference
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
    filter_metric: str | None = None  # whose values must differ for that: a reward function, or `reward`, the
    # weighted sum; default: accuracy where it is a reward that weighs, else reward
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
    num_train_epochs: Positive = 1.0  # passes over the data, rejected draws not counted; max_steps wins
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
    eos_token: str | None = None  # token that ends an answer, in place of the tokenizer's EOS; what the chat
    # template writes after an answer ends it, too
    freeze_vision_tower: bool = False  # train the language model only
    cold_start_steps: Count | None = None  # most SFT steps before the run, on the built-in model and task
    # only; default 200 there (0 in --algo sft), it stops at 0.4 sampled accuracy
    shard_size: Size | None = None  # ranks that hold one copy of the weights between them; default: all
    lora_r: Size | None = None  # rank of LoRA adapters, which alone are trained; none: train all weights
    lora_alpha: Size | None = None  # adapters are scaled by lora_alpha / lora_r; default 32
    lora_target_modules: list[Name] | None = None  # q_proj v_proj, or all-linear (default): all but the head
    use_rslora: bool = False  # scale by lora_alpha / sqrt(lora_r)
    use_dora: bool = False  # DoRA: train the norm of each row as well
    preflight: bool | None = None  # try the largest micro-batch before step 1; default: on cuda
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    deterministic: bool = False  # on a GPU: only kernels that repeat to the bit; slower. A CPU always does
    # --- evaluation
    eval_steps: Size = 100  # evaluate every so many steps, and before and after
    per_device_eval_batch_size: Size = 16  # held-out rows answered or scored at once
    eval_temperature: NonNegative = 0.0  # of held-out answers; 0 is greedy
    num_generations_eval: Size = 1  # answers a held-out row; above 1: eval/pass@k; with --eval_temperature
    reward_timeout: Positive = 60.0  # seconds for one call of one reward function; a completion that it hangs
    # on, also alone, gets no reward
    # --- run
    output_dir: str | None = None  # default: a new runs/<algo>-N; one that holds this run goes on
    save_steps: Size = 100  # write a checkpoint every so many steps
    save_total_limit: Size = 2  # checkpoints that are kept
    resume: Literal["auto", "never"] = "auto"  # auto: go on with the run in --output_dir
    allow_changed: list[str] = field(default_factory=list)  # settings that may differ from the resumed run's
    max_hours: Positive | None = None  # write a checkpoint and end after so long, as on SIGTERM
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = "none"  # send metrics there too
    push_to_hub: str | None = None  # OWNER/NAME: upload final/ there at the end; made private if new

    HELP = {"PRESETS": ", ".join(PRESETS), "PAPERS": papers.papers_for("train_grpo.py"),
            "REWARDS": ", ".join(BUILT_IN), "POLICY_LOSSES": ", ".join(losses.POLICY_LOSSES),
            "GROUP_LOSSES": ", ".join(losses.GROUP_LOSSES), "FOUR_UPDATES": ", ".join(UPDATES_PER_ROLLOUT)}

    def __post_init__(self):
        model.check_shared(self)
        check_args(self)
        papers.check_methods(self)


def parse_args(argv):
    return model.parse(Args, PRESETS, TINY_DEFAULTS, TINY_BY_ALGO, argv)


def check_loss(args):
    """Refuse flags that contradict each other; warn of those that change which objective is optimised."""
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
    if of_group and args.advantage_estimator != "none":
        raise ValueError(f"--loss_type {loss} compares rewards: it needs --advantage_estimator none")
    if not of_group and args.advantage_estimator == "none":
        raise ValueError("--advantage_estimator none is for --loss_type "
                         f"{', '.join(losses.GROUP_LOSSES)}; got {loss}")
    if of_group:
        neutral = dict(importance_sampling_level="token", importance_sampling_correction="none",
                       mask_truncated_completions=False)
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
    model.changes_nothing(args, {
        name: why for name, why, used in (
            ("epsilon", f"in --loss_type {loss}", clips),
            ("epsilon_high", f"in --loss_type {loss}",
             clips or loss == "cispo" or args.epsilon_high == args.epsilon),
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
        raise ValueError("--vllm_server_base_url does not go with --top_k, --top_p or --min_p: vLLM would "
                         "normalise its log-probs over the ids they keep, the trainer over all ids")
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
    if args.filter_metric not in (None, "reward", *names):
        raise ValueError(f"unknown --filter_metric {args.filter_metric}; choose from {', '.join(names)}, "
                         "reward")
    if args.filter_metric and not args.dynamic_sampling:
        raise ValueError("--filter_metric changes nothing without --dynamic_sampling")
    if args.filter_metric is None:
        args.filter_metric = "accuracy" if dict(zip(names, args.reward_weights)).get("accuracy") else "reward"
    ga, size, G = args.gradient_accumulation_steps, args.per_device_train_batch_size, args.num_generations
    updates = max([UPDATES_PER_ROLLOUT.get(args.algo[0], 1), *papers.hooks(args, "UPDATES")])
    args.steps_per_generation = args.steps_per_generation or ga * updates
    if args.steps_per_generation % ga:
        enough = ga * math.ceil(args.steps_per_generation / ga)
        raise ValueError(f"--steps_per_generation {args.steps_per_generation} must be a multiple of "
                     f"--gradient_accumulation_steps {ga}; {enough} is")
    if size * ga % G:
        raise ValueError(f"an update of {size} x {ga} completions (per_device_train_batch_size x "
                     f"gradient_accumulation_steps) must hold whole groups of --num_generations {G}; "
                     f"{math.ceil(size * ga / G) * G} completions would")
    if (args.loss_type in losses.GROUP_LOSSES or any(papers.hooks(args, "WHOLE_GROUPS"))) and size % G:
        raise ValueError(f"--loss_type {args.loss_type} compares the completions of a group: "
                     f"--per_device_train_batch_size {size} must be a multiple of --num_generations {G}")


def check_solution(row, reward_funcs):
    """RowError for a solution that a built-in reward will not be able to read."""
    readers = answers.READERS | boxes.READERS
    for name in NEED_SOLUTION & set(reward_funcs):
        try:
            golds = answers.golds_of(row["solution"], name)
            if name in readers:
                answers.compare(readers[name], [""], [row["solution"]], kind=name)
            elif find_spec("math_verify") is None and any(map(answers.needs_math_verify, golds)):
                raise ValueError(f"solution {golds[0][:100]!r} is mathematics, which takes math-verify: "
                                 "pip install math-verify[antlr4_13_2]")
        except ValueError as error:
            raise data.RowError(f"{row['_source']}: --reward_funcs {name}: {error}") from None


def main(argv=None):
    args = parse_args(argv)
    run = model.Run(args)
    if run.done:
        return
    rewards = rollout.RewardRunner(args.reward_funcs, args.reward_timeout, run.folder)
    rewards.wait_until_ready()  # a broken reward function or server is an error before any work
    server = start_server(args, run)
    need = ("prompt", "solution") if NEED_SOLUTION & set(args.reward_funcs) else ("prompt",)
    train_rows, eval_rows = data.rows_of_run(args, need, rewards.columns())
    sizes = sizes_of(args, run.world_size, len(train_rows))
    run.say(f"rollout: {sizes.prompts_per_rollout} prompts x {args.num_generations} completions, "
            f"{sizes.steps_per_rollout} updates each; {sizes.rollouts} rollouts, {sizes.max_steps} steps")
    if args.dynamic_sampling:
        run.say(f"dynamic sampling: groups whose {args.filter_metric} differs (--filter_metric)")
    policy, processor, ref = load_models(args, run)
    prompts = Prompts(args, run, sizes, policy, processor, train_rows, eval_rows)
    if args.preflight or args.preflight is None and run.device.type == "cuda":
        preflight(args, run, policy, prompts)
    optimizer, parameters = model.make_optimizer(args, policy)
    rewards.max_steps = sizes.max_steps
    policy_loss = losses.group_loss if args.loss_type in losses.GROUP_LOSSES else losses.policy_loss
    flags = vars(args) | {"beta": 0.0 if kl_in_reward(args) else args.beta}  # what losses take by name

    # What a checkpoint holds besides weights, optimizer and the rollout in use. The data order and the
    # randomness follow from these numbers.
    # pending: metrics of `step` that were not logged yet, since their evaluation was interrupted or, at
    # step 0, has not run; None: logged.  start, end: the first and the latest held-out means.
    # skipped: steps in a row with a gradient of nan.  draws: the rollout's draw numbers, of all ranks;
    # next_draw: the first of the next rollout.  rollout_sums: its metrics, {name: (sum, count)}
    state = model.with_states(args, {"step": 0, "pending": {"step": 0}, "start": {}, "end": {}, "skipped": 0,
                                     "draws": [], "next_draw": 0, "rollout_sums": {}})
    run.listen()
    moving = ref if any(papers.hooks(args, "MOVES_REFERENCE")) else None
    saved = run.restore(state, policy, optimizer, moving)  # fills the state too
    batch = resume_rollout(args, prompts, policy, state, saved, sizes)
    held_out = functools.partial(evaluate, args, run, policy, processor, prompts, rewards)
    end_step = functools.partial(run.end_step, state, max_steps=sizes.max_steps, held_out=held_out,
                                 shown=shown_of(args))
    stopped = state["pending"] is not None and end_step(state["pending"], tensors=tensors_in_use(batch))
    run.running(state["step"])
    recent, silent_until = deque(maxlen=20), {}  # metrics of the latest steps; no warning twice in 100 steps
    progress = tqdm(total=sizes.max_steps, initial=state["step"], desc=" ".join(args.algo),
                    disable=None if run.rank == 0 else True)

    # ----------------------------------------------------------------------------------------------- the loop
    while state["step"] < sizes.max_steps and not stopped:
        began, update = time.perf_counter(), state["step"] % sizes.steps_per_rollout
        learning_rate = model.learning_rate_at(args, state["step"], sizes.max_steps)
        first_update = update == 0  # of its rollout
        if first_update:
            # 1. a rollout: G completions for each of this rank's P prompts, N = P * G, and their rewards
            batch = collect(args, run, sizes, policy, processor, prompts, rewards, server, state)
            if batch is None:  # asked to stop: drop the rollout; the resumed run samples the same one again
                run.save(state, must=True)
                stopped = True
                break

            # 2. the log-probs that the loss compares with, (N, T), 0 where nothing is trained
            if sizes.steps_per_rollout > 1 or kl_in_reward(args):  # else step 5 takes its own, detached
                batch["old_logps"] = logps_of(args, policy, batch, run.device)
            if ref is not None:
                with adapter_off(ref):
                    batch["ref_logps"] = logps_of(args, ref, batch, run.device)
                if run.world_size > 1:
                    ref.reshard()  # FSDP frees the root unit's weights only after a backward

            # 3. advantages (N,), from the rollout of all ranks
            batch["advantages"] = advantages_of(args, run, batch, flags, state)
            save_completions(args, run, sizes, batch, state)

        # 4. the divisors of the loss (count) and of the entropy bonus (tokens): sums over all the update's
        #    micro-batches and all ranks, so that the cut into micro-batches does not change the gradient
        micro_batches = [with_loss_inputs(micro, batch)
                         for micro in batch["micro_batches"][update % sizes.updates]]
        counts = (sum(losses.policy_loss_count(args.loss_type, m["completion_mask"],
                                               args.max_completion_length, m["advantages"],
                                               args.num_generations) for m in micro_batches),
                  sum(int(m["completion_mask"].sum()) for m in micro_batches))
        count, tokens = (max(n, 1) for n in model.all_reduce_sums({"n": counts}, run.device)["n"])

        # 5. gradients of the update's micro-batches, one step
        sums = {}
        for micro in micro_batches:
            micro = model.to_device(micro, run.device)
            logps, entropies, _ = policy(micro, args.temperature)                         # (n, T), (n, T)
            mask, old_logps = micro["completion_mask"], micro.get("old_logps", logps.detach())
            weights = weigh_tokens(args, logps, old_logps, entropies, micro)
            loss, metrics = policy_loss(logps, old_logps, micro["advantages"], mask,
                                        ref_logps=micro.get("ref_logps"), entropies=entropies,
                                        **flags | state | weights)
            loss = loss / count
            if args.entropy_coef:
                loss = loss - args.entropy_coef * losses.masked_sum(entropies, mask).sum() / tokens
            (loss * run.world_size).backward()  # FSDP averages gradients over the ranks
            metrics |= {"loss": (loss.detach(), 0), "entropy": (entropies.detach().sum(), mask.sum())}
            metrics |= sampler_gap(old_logps, micro["sampling_logps"], mask)
            model.add_sums(sums, metrics)
        grad_norm = model.clip_grad_norm_(parameters, args.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        if math.isfinite(grad_norm):  # else skipped, on all ranks
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state["step"] = step = state["step"] + 1
        for after_update in papers.hooks(args, "after_update"):
            after_update(args, policy, ref, step)
        run.count_nonfinite(state, grad_norm, rows_of_update(batch, update % sizes.updates, sizes))

        # 6. metrics of the step, held-out rows, the log, a checkpoint
        sums = state["rollout_sums"] | model.all_reduce_sums(sums, run.device)
        loss = sums.pop("loss")[0]
        metrics = {"step": step, "epoch": state["next_draw"] / len(train_rows), "loss": loss,
                   "grad_norm": grad_norm, "learning_rate": learning_rate,
                   "update_skipped": float(not math.isfinite(grad_norm)),
                   **{k: s / n for k, (s, n) in sums.items() if n}}
        for after_step in papers.hooks(args, "after_step"):
            after_step(state, metrics)
        check_start(run, server, metrics, first_update)
        metrics |= {"rollout_time": batch["rollout_time"] if first_update else 0.0,
                    "step_time": time.perf_counter() - began}
        recent.append(metrics)
        warn_of_collapse(run, recent, silent_until, step)
        last_update = update == sizes.steps_per_rollout - 1
        stopped = end_step(metrics, tensors={} if last_update else tensors_in_use(batch))
        progress.update()

    progress.close()
    if stopped:
        return run.stopped(state["step"], rewards)
    run.finish(policy, state, rewards)


# ------------------------------------------------------------------------------------------------------------
# Before the loop


class Sizes(NamedTuple):
    """How a run is cut into rollouts, and a rollout into updates (optimizer steps)."""

    prompts_per_update: int   # of this rank
    prompts_per_rank: int     # of a rollout, this rank's part
    prompts_per_rollout: int  # of all ranks
    updates: int              # that one pass over a rollout takes
    steps_per_rollout: int    # updates * num_iterations, the passes over a rollout
    max_steps: int
    rollouts: int


def sizes_of(args, world_size: int, rows: int) -> Sizes:
    """From the flags, the ranks and the rows of the dataset."""
    updates = args.steps_per_generation // args.gradient_accumulation_steps
    completions = args.per_device_train_batch_size * args.gradient_accumulation_steps
    prompts_per_rank = completions * updates // args.num_generations
    prompts_per_rollout, steps_per_rollout = prompts_per_rank * world_size, updates * args.num_iterations
    epochs = math.ceil(args.num_train_epochs * rows / prompts_per_rollout)  # in rollouts
    max_steps = args.max_steps if args.max_steps > 0 else epochs * steps_per_rollout
    return Sizes(completions // args.num_generations, prompts_per_rank, prompts_per_rollout, updates,
                 steps_per_rollout, max_steps, math.ceil(max_steps / steps_per_rollout))


def load_models(args, run):
    """-> the policy, its processor, and the reference: None without --beta; with LoRA the policy itself, with
    its adapter switched off (`adapter_off`)."""
    source = data.start_model(args, run.folder)
    policy, processor = model.load_policy(source, args.dtype, run.device, args.gradient_checkpointing,
                                          args.freeze_vision_tower, args.shard_size, lora=args,
                                          eos_token=args.eos_token)
    for note in policy.notes:
        run.say(f"{policy.hf.config.model_type}: {note}")
    ref = policy if args.beta and args.lora_r else None
    if args.beta and not args.lora_r:
        ref, _ = model.load_policy(source, args.dtype, run.device, shard_size=args.shard_size)
        ref.requires_grad_(False)
    if run.world_size > 1 and hasattr(processor, "image_processor"):
        filler = data.encode_prompt(policy, processor, data.shapes_rows(1, 0, "train")[0])
        policy.filler = policy.run_frozen_tower([filler])[0]
    return policy, processor, ref


class Prompts:
    """The prompts of a run: which rows its draws take, checked before the first step, and encoded ahead.

    A draw is one prompt taken for a rollout. Draws are numbered through the whole run and over all ranks;
    the number keys the sampling. `train` and `held_out` are dataset rows; plan[draw] is the index of a draw's
    row; `longest` are the indices of the rows that the run visits, longest first.
    """

    def __init__(self, args, run, sizes: Sizes, policy, processor, train, held_out):
        self.args, self.run, self.sizes, self.policy, self.processor = args, run, sizes, policy, processor
        # ahead: an iterator over this rank's next prompts, which begin with the draw ahead_from
        self.train, self.ahead, self.ahead_from = train, None, None
        self.row_of = next(iter(papers.hooks(args, "row_of")), None)  # a file of --algo replaces the plan
        if args.sort_by is not None:
            data.check_numbers(train, args.sort_by, -1e300, 1e300, "--sort_by")
        context = data.length_limit(policy, None)
        limit = context - args.max_completion_length
        if limit < 1:
            raise model.InputError(f"--max_completion_length {args.max_completion_length} leaves no room for "
                                   f"a prompt in the model's context of {context} tokens")
        limit = limit if args.max_prompt_length is None else min(limit, args.max_prompt_length)
        most_draws = sizes.rollouts * sizes.prompts_per_rollout * (1 + args.dynamic_sampling)
        self.measured = data.RowCache("runs/row_cache", policy, processor, ())
        with self.measured:
            self.plan, self.longest, _ = data.check_rows(
                train, most_draws, args.seed, args.overlong, limit, run.rank, run.world_size, self.size_of,
                args.sort_by, args.dataloader_num_workers, hasattr(processor, "image_processor"))
            self.held_out, _ = data.check_eval_rows(held_out, limit, run.rank, run.world_size, self.size_of,
                                                    args.dataloader_num_workers)
        if run.rank == 0 and self.measured.computed:  # else an earlier run has shown it
            data.show_sample(processor, (self.encode(train[self.plan[0]]), []))

    def encode(self, row: dict):
        return data.encode_prompt(self.policy, self.processor, row)

    def size_of(self, row: dict):
        """The row's data.Size, in tokens; RowError for a row that a reward cannot use."""
        check_solution(row, self.args.reward_funcs)
        return self.measured(row)

    def rows_of(self, draws, state: dict):
        """The index of the row of each draw."""
        if self.row_of is not None:
            return self.row_of(self.args, self.plan, draws, state)
        return (self.plan[draw] for draw in draws)

    def share_of(self, draws) -> list[int]:
        """This rank's part of a rollout's draw numbers: a slice of every update. So an update holds the same
        prompts on any number of ranks."""
        P, ranks = self.sizes.prompts_per_update, self.run.world_size
        return [draws[(update * ranks + self.run.rank) * P + i]
                for update in range(self.sizes.updates) for i in range(P)]

    def of(self, draws, state: dict):
        """The prompts of these draws, one by one; threads encode one rollout's prompts ahead."""
        return data.in_order(lambda i: self.encode(self.train[i]), self.rows_of(draws, state),
                             self.args.dataloader_num_workers, self.sizes.prompts_per_rank)

    def rollout_from(self, first: int, state: dict):
        """The rollout whose draws begin with `first`: this rank's (draw numbers, prompts)."""
        size = self.sizes.prompts_per_rollout
        if first != self.ahead_from or self.row_of is not None:
            # row_of chooses rows by this rollout's rewards, so it cannot look further than one rollout
            last = first if self.row_of is not None else len(self.plan) - size
            starts = range(first, last + 1, size)
            self.ahead = self.of((d for i in starts for d in self.share_of(range(i, i + size))), state)
        draws, self.ahead_from = self.share_of(range(first, first + size)), first + size
        return draws, self.policy.run_frozen_tower(list(islice(self.ahead, len(draws))))


def preflight(args, run, policy, prompts: Prompts):
    """`model.preflight` with the run's largest micro-batch: its longest prompts, with completions of the
    full length."""
    G, size = args.num_generations, args.per_device_train_batch_size
    answer, count = torch.full((args.max_completion_length,), policy.pad_id), math.ceil(size / G)
    if args.max_tokens_per_batch is not None:
        longest = len(prompts.encode(prompts.train[prompts.longest[0]]).tokens)
        size, count = G, max(1, args.max_tokens_per_batch // (longest + G * len(answer)))
    largest = [prompts.encode(prompts.train[i]) for i in (prompts.longest * count)[:count]]
    groups = [(prompt, [answer] * min(G, size - k * G if args.max_tokens_per_batch is None else G))
              for k, prompt in enumerate(largest)]
    model.preflight(policy, groups, args.temperature, run.rank, args.entropy_coef != 0)


def start_server(args, run):
    """The vLLM server that samples, None without one."""
    if args.vllm_server_base_url is None:
        return None
    server = rollout.VLLMServer(args.vllm_server_base_url, run.folder / "vllm_weights", data.chat_request)
    run.say(f"vLLM {server.version} samples the rollouts, --importance_sampling_correction "
            f"{args.importance_sampling_correction}; the trainer samples the held-out answers")
    return server


# ------------------------------------------------------------------------------------------------------------
# The parts of the loop


def names_of(args) -> list[str]:
    """The reward functions' names in metrics and completions/."""
    return [name.rpartition(":")[2] for name in args.reward_funcs]


def kl_in_reward(args) -> bool:
    """Whether beta * KL is subtracted from the rewards instead of added to the loss."""
    return bool(args.beta) and losses.ADVANTAGES[args.advantage_estimator].kl_in_reward


def weights_of(args) -> torch.Tensor:
    """--reward_weights, (functions,)"""
    return torch.tensor(args.reward_weights, dtype=torch.float64)


def collect(args, run, sizes: Sizes, policy, processor, prompts: Prompts, rewards, server, state):
    """Sample and score one rollout; None if the run is asked to stop meanwhile.

    -> {prompts: this rank's P, texts: N, scores (functions, N), micro_batches of each update, rollout_time,
        and tensors, one row a completion (N, ...): completion_ids, completion_mask, sampling_logps,
        truncated; draws (P,)}
    Fills the state's draws, next_draw and rollout_sums.

    With --dynamic_sampling this samples further rounds of prompts until --filter_metric differs in enough
    groups of all ranks (`choose_groups`). The groups to train on may then be those of another rank.
    """
    G, size, began = args.num_generations, sizes.prompts_per_rollout, time.perf_counter()
    chooses = args.dynamic_sampling > 0 or prompts.row_of is not None
    candidates, failed, scored = [], 0, 0
    for before_rollout in papers.hooks(args, "before_rollout"):
        before_rollout(state)
    if server is not None:
        server.push(policy, run.rank)

    for extra_round in range(1 + args.dynamic_sampling):
        first = state["next_draw"] + extra_round * size
        drawn, next_draw = range(first, first + size), first + size
        draws, groups = prompts.rollout_from(first, state)
        with run.stop.passes():
            with model.gathered(policy) if server is None else nullcontext():
                sampled = (rollout.sample if server is None else server.sample)(
                    policy, groups, draws, num_generations=G, temperature=args.temperature,
                    max_completion_length=args.max_completion_length, seed=args.seed, top_k=args.top_k,
                    top_p=args.top_p, min_p=args.min_p, rollout_tokens=args.rollout_tokens, stop=run.stop)
            texts = rollout.decode(policy, processor, sampled, groups)
            rollout_time = time.perf_counter() - began
            scores = rewards.score(
                texts, [p.row for p in groups for _ in range(G)], state["step"] + 1,
                global_step=state["step"], completion_ids=rollout.id_lists(sampled),
                max_completion_length=[args.max_completion_length] * len(texts),
                truncated=sampled.truncated.tolist())                                     # (functions, N)
            failed, scored = failed + rewards.failed, scored + scores.numel()
        if run.stopping():
            return None
        tensors = sampled._asdict() | {"draws": torch.tensor(draws)}
        if not chooses:
            break
        candidates += model.all_gather_object(tensors | {f"score {k}": row for k, row in enumerate(scores)})
        drawn, accepted, next_draw, variances = choose_groups(
            candidates, weights_of(args), G, size, args.advantage_estimator,
            None if args.filter_metric == "reward" else names_of(args).index(args.filter_metric))
        if accepted == size:
            break

    if chooses:  # take this rank's part of the groups that were chosen, whichever rank sampled them
        for after_rollout in papers.hooks(args, "after_rollout"):
            after_rollout(state, dict(zip(prompts.rows_of(variances, state), variances.values())))
        draws = prompts.share_of(drawn)
        groups = policy.run_frozen_tower(list(prompts.of(draws, state)))
        tensors = tensors_of_draws(model.join_parts(candidates), draws, G)
        scores = torch.stack([tensors.pop(f"score {k}") for k in range(len(scores))])
        sampled = rollout.Rollout(*(tensors[name] for name in rollout.Rollout._fields))
        texts = rollout.decode(policy, processor, sampled, groups)
    sums = rollout_metrics(args, scores, tensors) | {"rewards/failed": (failed, scored)}
    if chooses:
        sums["frac_groups_accepted"] = accepted, next_draw - state["next_draw"]
    # rollout_sums are this rank's, until `advantages_of` adds up those of all
    state |= {"draws": list(drawn), "next_draw": next_draw, "rollout_sums": sums}
    return tensors | {"prompts": groups, "texts": texts, "scores": scores, "rollout_time": rollout_time,
                      "micro_batches": cut(args, policy, groups, tensors, sizes)}


def resume_rollout(args, prompts: Prompts, policy, state: dict, saved: dict, sizes: Sizes) -> dict:
    """This rank's part of a rollout that a stopped run was in the middle of; {} between two rollouts.

    saved: the checkpoint's tensors of it, of all ranks. Prompts are encoded again, and micro-batches cut
    again, from the same draws: so the updates that are left are those of a run that was left alone.
    """
    if not saved:
        if state["step"] % sizes.steps_per_rollout:
            raise model.InputError(f"the checkpoint of step {state['step']} holds no rollout, but must here; "
                                   "it is of another algorithm, or of other --steps_per_generation")
        return {}
    draws = prompts.share_of(state["draws"])
    groups = policy.run_frozen_tower(list(prompts.of(draws, state)))
    tensors = tensors_of_draws(saved, draws, args.num_generations)
    return tensors | {"prompts": groups, "micro_batches": cut(args, policy, groups, tensors, sizes)}


def cut(args, policy, prompts, tensors, sizes: Sizes) -> list[list[dict]]:
    """For each update its micro-batches of packed rows; one smaller than G holds slices of a group."""
    G = args.num_generations
    lengths = tensors["completion_mask"].sum(-1).view(-1, G).sum(-1)                            # (P,)
    tokens = [len(p.tokens) + int(n) for p, n in zip(prompts, lengths)]
    size, P, found = args.per_device_train_batch_size, sizes.prompts_per_update, []
    for i in range(0, len(prompts), P):
        whole = range(i * G, (i + P) * G)
        parts = [whole[k:k + size] for k in range(0, len(whole), size)]
        if args.max_tokens_per_batch is not None:
            spans = model.spans_within(tokens[i:i + P], args.max_tokens_per_batch)
            parts = [whole[start * G:stop * G] for start, stop in spans]
        found.append([make_micro_batch(args, policy, prompts, tensors, part) for part in parts])
    return found


@torch.no_grad()
def logps_of(args, scorer, batch, device) -> torch.Tensor:
    """(N, T) log-probs of the rollout's completions, 0 where nothing is trained. They come from the same
    micro-batches as the update's, so a policy that has not changed gives the same bits."""
    found, scored = torch.zeros(batch["sampling_logps"].shape), []
    for micro in (micro for update in batch["micro_batches"] for micro in update):
        logps, *_ = scorer(model.to_device(micro, device), args.temperature, entropies=False)  # (n, T')
        scored.append((micro["index"], logps))  # on the device, until all passes are under way
    for index, logps in scored:
        found[index, :logps.shape[1]] = logps.cpu()
    return found


def advantages_of(args, run, batch, flags, state) -> torch.Tensor:
    """The advantages (N,) of this rank's completions, from the rewards of all ranks. Also turns the state's
    rollout_sums into those of all ranks."""
    sums, scores = state["rollout_sums"], batch["scores"]
    penalty = torch.zeros(scores.shape[1], dtype=torch.double)                                # (N,)
    if kl_in_reward(args):
        kl = losses.kl_penalty(batch["old_logps"], batch["ref_logps"], "k1")                  # (N, T)
        penalty += args.beta * kl.sum(-1)
        sums["kl"] = kl.sum(), sum(m["completion_mask"].sum() for u in batch["micro_batches"] for m in u)
    everyone = model.all_gather(torch.cat([scores, penalty[None]]), run.device)   # (functions + 1, ranks * N)
    A = losses.advantages(args.advantage_estimator, everyone[:-1], weights_of(args), args.num_generations,
                          penalty=everyone[-1], **flags | state)
    state["rollout_sums"] = model.all_reduce_sums(sums, run.device)
    return A[run.rank * scores.shape[1]:][:scores.shape[1]].float()


def save_completions(args, run, sizes: Sizes, batch, state):
    """completions/step_N.jsonl; the first rollout after held-out rows is also shown."""
    if run.rank == 0:
        step = state["step"] + 1
        show = state["step"] % args.eval_steps < sizes.steps_per_rollout
        file = run.folder / "completions" / f"step_{step}.jsonl"
        with model.writing(file):
            rollout.save_completions(file, [p.row for p in batch["prompts"]], batch["texts"],
                                     dict(zip(names_of(args), batch["scores"])), batch["advantages"],
                                     f"step {step}, best and worst" if show else None)


def sampler_gap(old_logps, sampling_logps, mask) -> dict:
    """How far sampler and trainer differ, (sum, count): the mean, and the share above 0.2."""
    gap, n = (old_logps - sampling_logps).abs(), mask.sum()                                   # (n, T)
    return {"sampling/sampling_logp_difference/mean": (losses.masked_sum(gap, mask).sum(), n),
            "sampling/sampling_logp_difference/tail": ((mask & (gap > 0.2)).sum(), n)}


def rows_of_update(batch, update: int, sizes: Sizes) -> list[dict]:
    """The dataset rows of this rank's prompts in an update."""
    P = sizes.prompts_per_update
    return [prompt.row for prompt in batch["prompts"][update * P:(update + 1) * P]]


def check_start(run, server, metrics, first_update: bool):
    """At step 1 print what it must start at. A server whose log-probs show another model ends the run."""
    gap = metrics.get("sampling/sampling_logp_difference/mean", 0.0)  # none where all tokens are masked
    if server is not None and first_update and gap > 0.2:
        raise server.error(f"its log-probs differ from the trainer's by {gap:.3g} a token: its weights "
                           "are not those it was given, or it computes another model")
    if metrics["step"] == 1:
        expected = {"ratio": "1", "clip_ratio/region_mean": "0", "grad_norm": "> 0"}
        run.say("step 1 must start at: " + ", ".join(
            f"{k} {metrics[k]:.6g} (expected {e})" for k, e in expected.items() if k in metrics))


def evaluate(args, run, policy, processor, prompts: Prompts, rewards, step: int):
    """Means over the held-out rows; None if the run is asked to stop meanwhile."""
    rows = prompts.held_out
    if not rows:
        return {}
    encoded = data.in_order(lambda i: prompts.encode(rows[i]), range(len(rows)),
                            args.dataloader_num_workers, args.per_device_eval_batch_size)
    with model.gathered(policy), run.stop.passes():
        texts, scores = rollout.evaluate(
            policy, processor, rows, range(run.rank, run.rank + len(rows) * run.world_size, run.world_size),
            encoded, rewards, temperature=args.eval_temperature,
            max_completion_length=args.max_completion_length, batch_size=args.per_device_eval_batch_size,
            seed=args.seed, step=step, num_generations=args.num_generations_eval,
            rollout_tokens=args.rollout_tokens, stop=run.stop)
    if run.stopping():
        return None
    total = losses.weighted_rewards(scores, weights_of(args))
    sums = {"eval/reward": (total.nansum(), (~total.isnan()).sum())}
    for name, row in zip(names_of(args), scores):
        key = "eval/accuracy" if name == "accuracy" else f"eval/rewards/{name}/mean"
        sums[key] = (row.nansum(), (~row.isnan()).sum())
        if name == "accuracy":
            sums |= rollout.pass_at_k(row, args.num_generations_eval)
    means = {k: s / n for k, (s, n) in model.all_reduce_sums(sums, run.device).items() if n}
    if run.rank == 0:
        file = run.folder / "completions" / f"eval_{step}.jsonl"
        with model.writing(file):
            rollout.save_completions(file, rows, texts, dict(zip(names_of(args), scores)))
    run.say(f"held-out, step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in means.items()))
    return means


def shown_of(args) -> tuple[str, ...]:
    """The names of the metrics that are printed each step."""
    return ("reward", *(f"rewards/{name}/mean" for name in names_of(args)), "reward_std",
            "frac_reward_zero_std", "loss", "grad_norm", "entropy", "kl", "clip_ratio/region_mean",
            "completions/mean_length", "completions/clipped_ratio", "step_time", "eval/accuracy")


def tensors_in_use(batch) -> dict:
    """The tensors of a rollout that a checkpoint keeps, for the updates that are still to come."""
    return {name: x for name, x in batch.items() if isinstance(x, torch.Tensor) and name != "scores"}


def warn_of_collapse(run, recent, silent_until: dict, step: int):
    """`signs_of_collapse`, each at most once in 100 steps."""
    for sign, text in signs_of_collapse(recent).items():
        if step >= silent_until.get(sign, 0):
            run.say(f"warning, step {step}: {text}")
            silent_until[sign] = step + 100


def make_micro_batch(args, policy, prompts, tensors, indices) -> dict:
    """The rollout's completions `indices` (n of the N) as a `pack_groups` batch; consecutive ones of a prompt
    share its tokens. "index" (n,) says which they are."""
    groups = []
    for n in indices:
        prompt = prompts[n // args.num_generations]
        ids = tensors["completion_ids"][n][tensors["completion_mask"][n]]
        if groups and groups[-1][0] is prompt:
            groups[-1][1].append(ids)
        else:
            groups.append((prompt, [ids]))
    batch = policy.pack(groups) | {"index": torch.tensor(indices)}
    if args.mask_truncated_completions:  # none of its tokens is trained or counted, but it is one of the n
        batch["completion_mask"] &= ~tensors["truncated"][batch["index"], None]
        batch["scored"] = model.flat_indices(batch["completion_mask"])
    return batch


def with_loss_inputs(micro, batch) -> dict:
    """The micro-batch, and its part of what the rollout has for the loss: (n,), or (n, T) cut to its T."""
    index, T = micro["index"], micro["completion_ids"].shape[1]
    names = ("advantages", "sampling_logps", "old_logps", "ref_logps")
    found = {name: batch[name][index] for name in names if name in batch}
    return micro | {name: x if x.dim() == 1 else x[:, :T] for name, x in found.items()}


def tensors_of_draws(tensors, draws, G) -> dict:
    """Of tensors of many groups, one row a completion, those of the groups of these draws, in their order."""
    first = {int(draw): p * G for p, draw in enumerate(tensors["draws"])}  # a group's first row
    index = torch.tensor([first[draw] + g for draw in draws for g in range(G)])
    return {name: x[index] for name, x in tensors.items() if name != "draws"} | {"draws": torch.tensor(draws)}


def choose_groups(candidates, weights, G, count, estimator="grpo", metric: int | None = None):
    """Dynamic sampling -> the draw numbers of the `count` groups to train on, how many of them are useful,
    the next rollout's first draw, and {draw: variance of its group's weighted rewards}.

    candidates: of each round and rank {"draws": (P,), "score k": (P * G,) of reward function k}. A group is
    useful if its rewards by function `metric` differ (None: the weighted sums). An estimator that learns
    from groups of equal rewards, too (NGRPO), says which of them are useful.

    The first useful groups by draw number are taken, whichever rank sampled them; if they are too few, the
    first of the others fill up. The variance is p (1 - p) for rewards of 0 and 1.
    """
    variance, useful, chosen = {}, {}, slice(None) if metric is None else slice(metric, metric + 1)
    for part in candidates:
        draws = part["draws"].tolist()
        scores = torch.stack([part[name] for name in part if name.startswith("score ")])          # (F, P * G)
        deviations, _ = losses.centred(losses.weighted_rewards(scores, weights), G)               # (P, G)
        variance |= zip(draws, deviations.square().mean(-1).tolist())

        weighed = weights[chosen] if metric is None else torch.ones(1, dtype=weights.dtype)
        signal, _ = losses.centred(losses.weighted_rewards(scores[chosen], weighed), G)           # (P, G)
        if losses.ADVANTAGES[estimator].flat_groups:
            signal = losses.advantages(estimator, scores[chosen], weighed, G).view(-1, G)
        useful |= zip(draws, signal.ne(0).any(-1).tolist())

    variance = dict(sorted(variance.items()))
    accepted = [draw for draw in variance if useful[draw]][:count]
    others = [draw for draw in variance if not useful[draw]][:count - len(accepted)]
    # Useful groups that are left over are dropped; the next rollout samples their prompts again.
    next_draw = max(variance if others else accepted) + 1
    return sorted(accepted + others), len(accepted), next_draw, variance


def weigh_tokens(args, logps, old_logps, entropies, micro) -> dict:
    """The token weights of losses.policy_loss, `keep` and `correction`, (n, T) each, if a flag or a file of
    --algo wants them."""
    mask, weighing = micro["completion_mask"], {}
    if args.importance_sampling_correction != "none":
        weighing["correction"] = losses.sampler_correction(
            old_logps, micro["sampling_logps"], mask, args.importance_sampling_correction,
            args.importance_sampling_clip_max)
    for weigh in papers.hooks(args, "weigh"):
        weights = weigh(args, micro, logps, old_logps, entropies)
        weighing["keep"] = weights if "keep" not in weighing else weights * weighing["keep"]
    return weighing


def rollout_metrics(args, scores, tensors) -> dict[str, tuple[float, float]]:
    """TRL's keys for one rollout of this rank, as (sum, count). scores (functions, N)."""
    total = losses.weighted_rewards(scores, weights_of(args))                                 # (N,)
    # (P, G), (N,)
    groups, lengths = total.view(-1, args.num_generations), tensors["completion_mask"].sum(-1)
    known = groups[~groups.isnan().any(-1)]
    std = known.std(-1)                                                                       # (P',)
    sums = {"reward": (total.nansum(), (~total.isnan()).sum()), "reward_std": (std.sum(), len(std)),
            "frac_reward_zero_std": ((std < 1e-8).sum(), len(std)),
            "completions/mean_length": (lengths.sum(), len(lengths)),
            "completions/clipped_ratio": (tensors["truncated"].sum(), len(lengths))}
    for name, row in zip(names_of(args), scores):
        sums[f"rewards/{name}/mean"] = (row.nansum(), (~row.isnan()).sum())
    return {key: (float(value), float(n)) for key, (value, n) in sums.items()}


def signs_of_collapse(recent) -> dict[str, str]:
    """{sign: a warning with likely causes}, from the mean metrics of the last 20 steps ({} before that)."""
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
    model.run_main(main)

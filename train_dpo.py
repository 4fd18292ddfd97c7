"""Offline preference training of a vision-language model: MPO, DPO, SFT, SimPO, ... in any weighted mix.

    python train_dpo.py                          # the built-in default: MPO on a tiny VLM, CPU, 2 min
    python train_dpo.py --model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct --algo mpo --dtype bfloat16 \\
        --dataset pairs.jsonl --image_root images --gradient_checkpointing --per_device_train_batch_size 2 \\
        --gradient_accumulation_steps 128 --learning_rate 5e-6 --num_train_epochs 1
    torchrun --nproc_per_node=8 train_dpo.py ... --output_dir runs/a     # sharded; run again, it goes on

    rows -> group rows (chosen, rejected) -> [reference log-probs, cached on disk once] -> token log-probs
         -> sum of weighted losses, each divided by its count over the whole optimizer step -> step

At step 1 the policy is the reference: the losses must be sigmoid 0.6931, bco_pair 1.3863, MPO 0.8318 + NLL.

METHODS.md lists every loss, and where this differs from the papers and from TRL.
"""

import os
import signal
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads ruin a shared machine
if __name__ == "__main__":  # until the run listens (`Run.listen`), Ctrl-C ends it in one line
    signal.signal(signal.SIGINT, lambda *_: sys.exit("interrupted before the first step"))

import functools
import hashlib
import itertools
import math
import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from tqdm import tqdm

import data
import losses
import model
import papers
import rollout
from layers.lora import adapter_off
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
    "step_dpo": dict(loss_type=["sigmoid"], beta=0.5, num_train_epochs=8.0, learning_rate=5e-7,
                     lr_scheduler_type="cosine", warmup_steps=0.1),  # arXiv 2406.18629, the 7B script
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
                     per_device_eval_batch_size=256, dataloader_num_workers=0)  # its pictures cost nothing
# At DiscoPOP's own beta of 0.05 the tiny model stays in that loss's minimum at a margin below 0.
TINY_BY_ALGO = {"sft": dict(learning_rate=2e-3, max_steps=100, warmup_steps=20, adam_beta2=0.98),
                "discopop": dict(beta=0.5)}


@dataclass
class Args:
    # --- what
    algo: list[Name] = field(default_factory=lambda: ["mpo"])  # a preset of the loss flags, a file of papers/
    # or a path to your own; a flag given wins. Further files add what they bring. Presets: PRESETS; files:
    # PAPERS
    model_name_or_path: str | None = None  # folder or hub id; for the built-in task: tiny, a random model
    # --- data
    dataset: list[str] | None = None  # files, folders, hub ids of pairs (see data.py); none: shapes
    dataset_weights: list[Positive] | None = None  # each one's share of the draws; default: its rows
    image_root: str | None = None  # folder that image paths are relative to, and may not leave
    columns: list[Name] | None = None  # prompt=question solution=answer: which of the data's columns is which
    system_prompt: str | None = None  # text, or a file of it: the system turn of rows that have none
    sort_by: str | None = None  # column that each epoch is sorted by, lowest first (a curriculum)
    eval_dataset: str | None = None  # held-out rows, same columns and --image_root
    overlong: Literal["error", "skip"] = "error"  # rows over the limit: stop, or skip and count them
    dataloader_num_workers: Count = 2  # threads that read and process rows ahead
    seed: Count = 0  # of the data order, the sampling, the tiny model
    max_length: Size | None = None  # longest prompt + completion in tokens; default: the model's context
    # --- losses
    loss_type: list[Name] = field(default_factory=list)  # of pairs: LOSSES; or sft; default: the preset's
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
    max_completion_length: Size = 256  # tokens of a held-out answer
    stop_at_accuracy: Annotated[float, "(0, 1]"] | None = None  # stop once eval/accuracy reaches it
    # --- run
    output_dir: str | None = None  # default: a new runs/<algo>-N; one that holds this run goes on
    save_steps: Size = 100  # write a checkpoint every so many steps
    save_total_limit: Size = 2  # checkpoints that are kept
    resume: Literal["auto", "never"] = "auto"  # auto: go on with the run in --output_dir
    allow_changed: list[str] = field(default_factory=list)  # settings that may differ from the resumed run's
    max_hours: Positive | None = None  # write a checkpoint and end after so long, as on SIGTERM
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = "none"  # send metrics there too
    push_to_hub: str | None = None  # OWNER/NAME: upload final/ there at the end; made private if new

    HELP = {"PRESETS": ", ".join(PRESETS), "PAPERS": papers.papers_for("train_dpo.py"),
            "LOSSES": ", ".join(losses.PAIR_LOSSES),
            "SMOOTHED": ", ".join(sorted(losses.which(losses.PAIR_LOSSES, smoothed=True)))}

    def __post_init__(self):
        model.check_shared(self)
        check_losses(self)
        papers.check_methods(self)


SHOWN = ("loss", "rewards/margins", "rewards/accuracies", "rewards/chosen", "nll", "grad_norm",
         "learning_rate", "step_time", "eval/accuracy")  # the metrics of a step that are printed


def parse_args(argv):
    return model.parse(Args, PRESETS, TINY_DEFAULTS, TINY_BY_ALGO, argv)


def check_losses(args):
    """Losses and options that do not go together, or that would change nothing, are a ValueError."""
    if not args.loss_type:
        raise ValueError(f"--loss_type names no loss, and --algo {' '.join(args.algo)} brings none: a preset "
                         "may stand before it, as in --algo dpo f_dpo")
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
    if papers.hooks(args, "pair_weights") and (not pairs or given & sorting):
        raise ValueError(f"--algo {' '.join(args.algo)} weighs pairs: not sft, nor aot and aot_unpaired, "
                         "which sort them apart")
    model.changes_nothing(args, {
        name: f"without {what}" for name, what, used in (
            ("beta", "a pair loss", pairs), ("simpo_gamma", "--loss_type simpo", "simpo" in given),
            ("bco_delta", "--loss_type bco_pair", "bco_pair" in given),
            ("nll_normalization", "--loss_type sft", "sft" in given)) if not used})


def columns_of(args, losses_only=False) -> dict[str, tuple[float, float]]:
    """{column: (lowest, highest)} of the numbers that losses and --algo's files read from the data."""
    found = {}
    for name in args.loss_type:
        found |= losses.PAIR_LOSSES[name].columns if name != "sft" else {}
    for columns in papers.hooks(args, "columns") if not losses_only else ():
        found |= columns(args)
    return found


# Columns that some loss takes.
NUMBERS = {"margin", "chosen_probs", "chosen_probs_win", "chosen_probs_lose", "weight"}


def check_columns(args, train_rows, eval_rows):
    """RowError for a row without the numbers that losses, --algo's files or --sort_by read from the data."""
    needs = columns_of(args)
    for column, bounds in needs.items():
        for rows in (train_rows, eval_rows):
            data.check_numbers(rows, column, *bounds, f"--algo {' '.join(args.algo)}")
    if args.sort_by is not None:
        data.check_numbers(train_rows, args.sort_by, -1e300, 1e300, "--sort_by")
    first = next(data.readable(train_rows), {})
    for column in sorted(NUMBERS & first.keys() - {*needs, args.sort_by}):
        if args.dataset is not None:
            model.warn(f"{first['_source']}: nothing uses the column {column}")


# --- reference log-probs, computed once and kept on disk


def group_key(group) -> str:
    """What the reference's log-probs of a group are stored under, as in data.Size."""
    prompt, completions = group
    return data.group_key(prompt.tokens, prompt.pixels, completions)


def scorer_fingerprint(policy) -> str:
    """sha256 of all that log-probs depend on besides ids and pixels. All ranks must call this."""
    config = policy.hf.config.to_json_string(use_diff=False).splitlines()  # with transformers' version
    config = [line for line in config if "_name_or_path" not in line]
    attention = {str(getattr(module.config, "_attn_implementation", None))
                 for module in policy.hf.modules() if hasattr(module, "config")}
    parts = (model.weights_fingerprint(policy), config, sorted(attention), sorted(policy.never_sampled_ids),
             str(policy.dtype), policy.device.type, torch.__version__, "format 2")
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


class ReferenceCache:
    """{group key: log-probs (tokens,) of all its completions} of a model that is not trained, kept on disk.

    The last bits of a row depend on the batch in which it was computed. So its first value stands, in this
    run and in all others: the files are numbered in the order in which they came (`os.link` gives each number
    once), they are never changed, and of the files that hold a row the first one counts.
    """

    def __init__(self, folder: str, policy, wanted: set[str]):
        """wanted: the keys of this run, which alone are held in memory."""
        self.flag, self.folder = f"--ref_cache {folder}", Path(folder) / scorer_fingerprint(policy)
        self.wanted, self.known, self.files_read = wanted, {}, 0
        with self.errors():
            files = os.listdir(self.folder) if self.folder.exists() else []
        numbers = [name.removesuffix(".safetensors") for name in files]
        self.read(max((int(number) for number in numbers if number.isdecimal()), default=0))
        if wanted - self.known.keys():
            with self.errors():
                self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK):
                raise model.InputError(f"{self.flag}: {self.folder} cannot be written, and lacks "
                                       f"{len(wanted - self.known.keys())} rows of this run")

    @contextmanager
    def errors(self):
        """What the file system refuses becomes one line that names the flag."""
        try:
            yield
        except OSError as error:
            raise model.InputError(f"{self.flag}: {error}") from None

    def read(self, last: int):
        """Read the files up to number `last`. A row that an earlier file holds keeps its value."""
        for number in range(self.files_read + 1, last + 1):
            file = self.folder / f"{number:06}.safetensors"
            if not file.exists():  # it was removed
                continue
            with self.errors():
                content = file.read_bytes()
            try:
                tensors = load(content)
                if not tensors.pop("sha256").equal(checksum(tensors)):
                    raise KeyError("sha256")
            except (SafetensorError, KeyError):
                print(f"warning: {file} is damaged: what it held is computed again", flush=True)
                continue
            for key in self.wanted & tensors.keys():
                self.known.setdefault(key, tensors[key])
        self.files_read = max(self.files_read, last)

    def store(self, new: dict):
        """Write the next file; then read it, and files that other runs or ranks wrote before it."""
        if not new:
            return
        temporary, number = self.folder / f"{uuid.uuid4().hex}.tmp", self.files_read + 1
        with model.writing(temporary):
            try:
                temporary.write_bytes(save(new | {"sha256": checksum(new)}))
                while True:
                    try:
                        os.link(temporary, self.folder / f"{number:06}.safetensors")
                        break
                    except FileExistsError:
                        number += 1
            finally:
                temporary.unlink(missing_ok=True)
        self.read(number)

    def add(self, policy, batches, stop):
        """Score the groups of these batches, and store those that are not known."""
        new, stored = {}, time.monotonic()
        for groups in batches:
            batch = model.to_device(policy.pack(groups), policy.device)
            with torch.no_grad():
                logps, *_ = policy(batch, entropies=False)                                      # (N, T)
            mask, n = batch["completion_mask"], 0
            for group in groups:
                rows = slice(n, n + len(group[1]))
                new[group_key(group)] = logps[rows][mask[rows]].cpu()
                n = rows.stop
            asked = stop()
            if asked or time.monotonic() - stored > 60:  # a killed run loses at most a minute's work
                self.store(new)
                new, stored = {}, time.monotonic()
            if asked:
                raise model.Interrupted
        self.store(new)

    def logps(self, groups, batch) -> torch.Tensor:
        """(N, T) like the policy's, 0 where the mask is False."""
        mask, scored, flat = batch["completion_mask"], batch["scored"], []
        for group in groups:
            key = group_key(group)
            if key not in self.known:
                raise model.InputError(f"{group[0].row['_source']}: the row, or an image of it, has changed "
                                       "since this run began")
            flat.append(self.known[key])
        flat = model.to_device(torch.cat(flat), mask.device)
        return torch.zeros(mask.numel(), device=mask.device).scatter(0, scored, flat).view(mask.shape)


def checksum(tensors: dict) -> torch.Tensor:
    """sha256 of tensors and their names, (32,), as it stands in a file of the reference cache."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + tensor.numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def score_groups(args, policy, groups, references, state):
    """One micro-batch -> ({loss: (sum, count)}, {metric: (sum, count)}). Chosen and rejected alternate.

    references: {"ref": ReferenceCache, ...}, of the reference and of further models, as the losses need."""
    batch = model.to_device(policy.pack(groups), policy.device)
    squares = any(papers.hooks(args, "SUMS_OF_SQUARES"))
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
    for log_ratios in papers.hooks(args, "log_ratios"):
        pair |= log_ratios(pair, args)
    columns = {c: model.to_device(torch.tensor([float(prompt.row[c]) for prompt, _ in groups]), mask.device)
               for c in columns_of(args)}                                                       # (B,) each
    weights = None
    for pair_weights in papers.hooks(args, "pair_weights"):
        weights = pair_weights(pair, args, columns) * (1.0 if weights is None else weights)     # (B,)
    options = vars(args) | state | {c: columns[c] for c in columns_of(args, losses_only=True)}
    options.pop("loss_type")
    pair_terms, pair_metrics = losses.preference_losses(
        [name for name in args.loss_type if name != "sft"], pair, pair_weights=weights, **options)
    for more in papers.hooks(args, "metrics"):
        pair_metrics |= more(pair, **options)
    return terms | pair_terms, metrics | pair_metrics


def load_scorer(args, path, policy, processor, device):
    """A further model, whose log-probs are computed once, as the reference's are; then it is dropped."""
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
    if papers.hooks(args, "pair_weights"):
        return "weighted"
    if loss.columns:
        return "of the rows' columns"
    further = [f"{scorer}_logps" for scorers in papers.hooks(args, "scorers") for scorer in scorers(args)]
    side = dict.fromkeys(["logps", "ref_logps", *further], torch.zeros(1, 1))
    pair = losses.pair_of(*[side | {"mask": torch.ones(1, 1, dtype=torch.bool)}] * 2)
    state = model.with_states(args, {"bco_shift": 0.0})
    return f"{loss.term(**pair, **vars(args), **state).item():.4f}"


def main(argv=None):
    args = parse_args(argv)
    run = model.Run(args)
    if run.done:
        return
    pairs = any(name in losses.PAIR_LOSSES for name in args.loss_type)
    columns = ("chosen", "rejected") if pairs else ("chosen",)
    train_rows, eval_rows = data.rows_of_run(args, ("prompt", *columns), {*columns_of(args), *NUMBERS})
    check_columns(args, train_rows, eval_rows)
    rewards = accuracy_of(args, run, eval_rows)
    policy, processor = load_policy(args, run)
    groups_of = Groups(args, run, policy, processor, columns, train_rows, eval_rows, rewards is not None)
    max_steps = groups_of.max_steps
    run.listen()
    references = reference_logps(args, run, policy, processor, groups_of)
    if references is None:  # asked to stop; the log-probs computed so far are on disk
        return run.stopped(None, rewards)
    if args.preflight or args.preflight is None and run.device.type == "cuda":
        model.preflight(policy, groups_of.largest_micro_batch(), 1.0, run.rank)
    optimizer, parameters = model.make_optimizer(args, policy)
    weighted = list(zip(args.loss_type, args.loss_weights))

    # What a checkpoint holds besides weights and optimizer. Data order and randomness follow from step.
    # pending: metrics of `step` that were not logged yet, since their evaluation was interrupted or, at
    # step 0, has not run; None: logged.  start, end: the first and the latest held-out means.
    # skipped: steps in a row with a gradient of nan.  bco_shift: BCO's delta for the next step
    state = model.with_states(args, {"step": 0, "pending": {"step": 0}, "bco_shift": 0.0, "start": {},
                                     "end": {}, "skipped": 0})
    run.restore(state, policy, optimizer)
    held_out = functools.partial(evaluate, args, run, policy, processor, groups_of, references, rewards,
                                 state)
    end_step = functools.partial(run.end_step, state, max_steps=max_steps, held_out=held_out, shown=SHOWN)
    stopped = state["pending"] is not None and end_step(state["pending"])
    progress = tqdm(total=max_steps, initial=state["step"], desc=" ".join(args.algo),
                    disable=None if run.rank == 0 else True)
    run.running(state["step"])
    updates = groups_of.updates_from(state["step"])

    # ----------------------------------------------------------------------------------------------- the loop
    while state["step"] < max_steps and not stopped and not good_enough(args, state):
        # 1. the update's pairs, this rank's, and its micro-batches
        began, step, groups = time.perf_counter(), state["step"] + 1, next(updates)
        learning_rate = model.learning_rate_at(args, step - 1, max_steps)
        micro_batches = groups_of.micro_batches(groups)

        # 2. what each loss is divided by, over all micro-batches and ranks
        tokens = sum(len(completions[0]) for _, completions in groups)
        counts = {name: (tokens if name == "sft" and args.nll_normalization == "token" else len(groups), 0)
                  for name in args.loss_type}
        counts = {name: n for name, (n, _) in model.all_reduce_sums(counts, run.device).items()}

        # 3. gradients: each micro-batch adds its share of the step's weighted sum
        sums = {}
        for micro in micro_batches:
            terms, metrics = score_groups(args, policy, micro, references, state)
            loss = sum(weight * terms[name][0] / counts[name] for name, weight in weighted)
            (loss * run.world_size).backward()  # FSDP averages gradients over the ranks
            metrics |= {f"loss/{name}": (total.detach(), n) for name, (total, n) in terms.items()}
            model.add_sums(sums, metrics)

        # 4. step; not on a gradient that is nan or infinite
        grad_norm = model.clip_grad_norm_(parameters, args.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        if math.isfinite(grad_norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state["step"] = step
        run.count_nonfinite(state, grad_norm, [prompt.row for prompt, _ in groups])

        # 5. metrics; from them BCO's shift and the STATE of --algo's files for the next step
        means = {key: total / n for key, (total, n) in model.all_reduce_sums(sums, run.device).items()}
        metrics = {"step": step, "epoch": step * groups_of.step_rows / len(train_rows),
                   "loss": sum(weight * means[f"loss/{name}"] for name, weight in weighted),
                   "grad_norm": grad_norm, "learning_rate": learning_rate,
                   "update_skipped": float(not math.isfinite(grad_norm)), **means}
        if "bco_pair" in args.loss_type:
            metrics["bco_delta"] = state["bco_shift"]  # the one that this step used
            mean_reward = (means["rewards/chosen"] + means["rewards/rejected"]) / 2
            if math.isfinite(mean_reward):
                state["bco_shift"] = losses.next_bco_delta(state["bco_shift"], mean_reward, step - 1,
                                                           args.bco_delta)
        for after_step in papers.hooks(args, "after_step"):
            after_step(state, metrics)
        if step == 1:
            run.say("step 1 must start at: " + ", ".join(
                f"{name} {means[f'loss/{name}']:.4f} (expected {start_value(args, name)})"
                for name in args.loss_type))

        # 6. held-out rows, the log, a checkpoint
        metrics["step_time"] = time.perf_counter() - began
        stopped = end_step(metrics)
        progress.update()

    progress.close()
    if stopped:
        return run.stopped(state["step"], rewards)
    if good_enough(args, state):
        run.say(f"stopped at step {state['step']}: eval/accuracy {state['end']['eval/accuracy']:.4f}")
    run.finish(policy, state, rewards)


# ------------------------------------------------------------------------------------------------------------
# Before the loop


def accuracy_of(args, run, eval_rows):
    """What scores held-out answers: the `accuracy` of rewards/answers.py, None where rows lack a solution."""
    if isinstance(eval_rows, data.Rows):
        eval_rows.golds = True
    if eval_rows and all(row.get("solution") is not None for row in data.readable(eval_rows)):
        return rollout.RewardRunner(["accuracy"])
    why = "some held-out rows lack a solution" if eval_rows else "no --eval_dataset"
    if args.stop_at_accuracy is not None:
        raise model.InputError(f"--stop_at_accuracy needs eval/accuracy, and there is none: {why}")
    run.say(f"no eval/accuracy: {why}")
    return None


def load_policy(args, run):
    """The policy, which is its own reference at the start, and its processor."""
    source = data.start_model(args, run.folder)
    policy, processor = model.load_policy(source, args.dtype, run.device, args.gradient_checkpointing,
                                          args.freeze_vision_tower, args.shard_size, lora=args,
                                          eos_token=args.eos_token)
    for note in policy.notes:
        run.say(f"{policy.hf.config.model_type}: {note}")
    if run.world_size > 1 and hasattr(processor, "image_processor"):
        policy.filler = data.encode_prompt(policy, processor, data.shapes_rows(1, 0, "train")[0])
    return policy, processor


class Groups:
    """The rows of a run as groups, (Prompt, [completion ids of each column]), checked before the first step.

    `train` are the rows of all ranks, held_out this rank's; sizes and eval_sizes hold {index: data.Size} of
    all ranks. plan[draw] is the index of a draw's row; `longest` are the indices of the rows that the run
    visits, longest first. An update takes rank_rows rows on this rank, step_rows on all.
    """

    def __init__(self, args, run, policy, processor, columns, train, held_out, answered: bool):
        """answered: held-out rows are answered as well, so their prompts must leave room."""
        self.args, self.run, self.policy, self.processor, self.columns = args, run, policy, processor, columns
        self.train = train
        self.rank_rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        self.step_rows = self.rank_rows * run.world_size
        steps = math.ceil(args.num_train_epochs * len(train) / self.step_rows)
        self.max_steps = args.max_steps if args.max_steps > 0 else steps
        context, limit = (data.length_limit(policy, length) for length in (None, args.max_length))
        measured = data.RowCache(Path(args.ref_cache).with_name("row_cache"), policy, processor, columns)

        def held_out_size(row):
            size = measured(row)
            if answered:
                data.check_length(row, size.prompt + args.max_completion_length, context)
            return size

        with measured:
            self.plan, self.longest, self.sizes = data.check_rows(
                train, self.max_steps * self.step_rows, args.seed, args.overlong, limit, run.rank,
                run.world_size, measured, args.sort_by, args.dataloader_num_workers,
                hasattr(processor, "image_processor"))
            self.held_out, self.eval_sizes = data.check_eval_rows(
                held_out, limit, run.rank, run.world_size, held_out_size, args.dataloader_num_workers)
        self.all_held_out = held_out
        if run.rank == 0 and measured.computed:  # else an earlier run has shown it
            data.show_sample(processor, self.encode(train[self.plan[0]]))

    def encode(self, row: dict):
        return data.encode_group(self.policy, self.processor, row, self.columns)

    def tokens_of(self, group) -> int:
        """The tokens that a group takes in a micro-batch; its prompt counts once."""
        prompt, answers = group
        return len(prompt.tokens) + sum(map(len, answers))

    def batches(self, rows, indices, size: int):
        """Lists of `size` groups of the rows at these indices; threads encode the next list ahead."""
        groups = data.in_order(lambda i: self.encode(rows[i]), indices,
                               self.args.dataloader_num_workers, size)
        return iter(lambda: list(itertools.islice(groups, size)), [])

    def indices_from(self, step: int):
        """The row indices of this rank's slices of the updates from a step on. An update holds the same rows
        on any number of ranks."""
        first = step * self.step_rows + self.run.rank * self.rank_rows
        starts = range(first, self.max_steps * self.step_rows, self.step_rows)
        return (i for start in starts for i in self.plan[start:start + self.rank_rows])

    def updates_from(self, step: int):
        """This rank's groups of each update from a step on."""
        return self.batches(self.train, self.indices_from(step), self.rank_rows)

    def micro_batches(self, groups: list) -> list[list]:
        """Cut an update by number of rows or by tokens. All ranks must call this, and get equally many."""
        if self.args.max_tokens_per_batch is not None:
            return self.cut_by_tokens(groups)
        size = self.args.per_device_train_batch_size
        return [groups[i:i + size] for i in range(0, len(groups), size)]

    def cut_by_tokens(self, groups: list, alike=True) -> list[list]:
        """Into lists of at most --max_tokens_per_batch; alike: equally many on every rank."""
        sizes = [self.tokens_of(group) for group in groups]
        return [groups[a:b] for a, b in model.spans_within(sizes, self.args.max_tokens_per_batch, alike)]

    def within_budget(self, batches):
        """The same groups, in smaller lists where a list is more than --max_tokens_per_batch holds."""
        for groups in batches:
            yield from ([groups] if self.args.max_tokens_per_batch is None else
                        self.cut_by_tokens(groups, alike=False))

    def eval_batches(self):
        """This rank's held-out rows, in batches as large as evaluation takes."""
        return self.within_budget(self.batches(self.held_out, range(len(self.held_out)),
                                               self.args.per_device_eval_batch_size))

    def keys(self) -> set[str]:
        """What the reference's log-probs of all ranks' rows are stored under."""
        return {self.sizes[i].key for i in self.longest} | {size.key for size in self.eval_sizes.values()}

    def batches_to_score(self, cache: ReferenceCache):
        """This rank's share of the batches that hold a row which the cache lacks. The last bits of log-probs
        depend on the cut into batches. So the cut is the same for any number of ranks and any cache."""
        taken = set()  # keys of the batches before
        for rows, indices, sizes, size in (
                (self.train, self.plan, self.sizes, self.args.per_device_train_batch_size),
                (self.all_held_out, self.eval_sizes, self.eval_sizes, self.args.per_device_eval_batch_size)):
            first = {}  # {key: the index of the first row that has it}
            for i in indices:
                if sizes[i].key not in taken:
                    first.setdefault(sizes[i].key, i)
            taken |= first.keys()
            keys = list(first)
            batches = [keys[i:i + size] for i in range(0, len(keys), size)]
            todo = [first[key] for batch in batches[self.run.rank::self.run.world_size]
                    if not cache.known.keys() >= set(batch) for key in batch]
            yield from self.within_budget(self.batches(rows, todo, size))

    def largest_micro_batch(self) -> list:
        size = self.args.per_device_train_batch_size
        if self.args.max_tokens_per_batch is not None:
            longest = self.tokens_of(self.encode(self.train[self.longest[0]]))
            size = max(1, self.args.max_tokens_per_batch // longest)
        return [self.encode(self.train[i]) for i in (self.longest * size)[:size]]


def reference_logps(args, run, policy, processor, groups_of: Groups) -> dict | None:
    """{"ref": ReferenceCache, and one for each further model of --algo's files}: log-probs of every row that
    the run will visit and of the held-out ones. None if the run is asked to stop meanwhile."""
    def cached(scorer, name):
        cache = ReferenceCache(args.ref_cache, scorer, groups_of.keys())
        found = len(cache.known)
        with model.gathered(scorer), adapter_off(scorer), run.stop.passes():
            cache.add(scorer, groups_of.batches_to_score(cache), run.stop)
        if run.stopping():
            return None
        cache.read(max(model.all_gather_object(cache.files_read)))
        if cache.wanted - cache.known.keys():
            raise model.InputError(f"{cache.flag}: rows that other ranks wrote are missing; all ranks must "
                                   "share this folder")
        run.say(f"{name} log-probs: {len(cache.known) - found} pairs computed, {found} found in "
                f"{cache.folder}")
        return cache

    references = {}
    if any(losses.PAIR_LOSSES[name].reference for name in args.loss_type if name != "sft"):
        references["ref"] = cached(policy, "reference")
    for name, path in (item for scorers in papers.hooks(args, "scorers") for item in scorers(args).items()):
        if None not in references.values():
            references[name] = cached(load_scorer(args, path, policy, processor, run.device), name)
    return None if None in references.values() else references


# ------------------------------------------------------------------------------------------------------------
# The parts of the loop


def evaluate(args, run, policy, processor, groups_of: Groups, references, rewards, state, step: int):
    """Means over the held-out rows; None if the run is asked to stop meanwhile."""
    rows, sums = groups_of.held_out, {}
    if not rows:
        return {}

    def scored():
        """The held-out rows' prompts for the sampler. Adds each batch's losses on the way, so that no row is
        encoded twice."""
        for groups in groups_of.eval_batches():
            terms, metrics = score_groups(args, policy, groups, references, state)
            model.add_sums(sums, terms, "eval/loss/")
            model.add_sums(sums, metrics, "eval/")
            if run.stop():
                raise model.Interrupted
            yield from (prompt for prompt, _ in groups)

    with torch.no_grad(), model.gathered(policy), run.stop.passes():
        prompts = scored()
        if rewards is not None:
            keys = range(run.rank, run.rank + len(rows) * run.world_size, run.world_size)
            texts, scores = rollout.evaluate(
                policy, processor, rows, keys, prompts, rewards, temperature=args.eval_temperature,
                max_completion_length=args.max_completion_length,
                batch_size=args.per_device_eval_batch_size, seed=args.seed, step=step,
                num_generations=args.num_generations_eval, stop=run.stop)
        for _ in prompts:  # add the losses of the rest, or of all if nothing is sampled
            pass
    if run.stopping():
        return None
    if rewards is not None:
        known = ~scores[0].isnan()
        model.add_sums(sums, {"accuracy": (scores[0][known].sum(), known.sum())}, "eval/")
        model.add_sums(sums, rollout.pass_at_k(scores[0], args.num_generations_eval))
        if run.rank == 0:
            file = run.folder / "completions" / f"eval_{step}.jsonl"
            with model.writing(file):
                rollout.save_completions(file, rows, texts, {"accuracy": scores[0]})
    means = {k: s / max(n, 1) for k, (s, n) in model.all_reduce_sums(sums, run.device).items()}
    means["eval/loss"] = sum(weight * means[f"eval/loss/{name}"]
                             for name, weight in zip(args.loss_type, args.loss_weights))
    shown = ("eval/loss", "eval/rewards/margins", "eval/rewards/accuracies", "eval/accuracy")
    run.say(f"held-out, step {step}: " + ", ".join(f"{k} {means[k]:.4f}" for k in shown if k in means))
    return means


def good_enough(args, state) -> bool:
    """Whether the held-out answers have reached --stop_at_accuracy."""
    goal = args.stop_at_accuracy
    return goal is not None and state["end"].get("eval/accuracy", -1) >= goal


if __name__ == "__main__":
    model.run_main(main)

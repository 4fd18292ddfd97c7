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
 8. A pair's weight (--weight_column) multiplies its pair losses, whose count stays the number of pairs.
 9. LCPO's share of right labels starts at 0.9 and moves by a tenth a step: our choice.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads ruin a shared machine

import argparse
import hashlib
import itertools
import math
import socket
import sys
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import data
import losses
import model
import rollout

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
    "sppo_soft": dict(loss_type=["sppo_soft"], beta=1e-3, learning_rate=5e-7),  # arXiv 2405.00675
    "madpo": dict(loss_type=["madpo"], beta=0.1, learning_rate=1e-5),  # arXiv 2510.05342, the authors' code
    "tgdpo": dict(loss_type=["tgdpo"], beta=0.1, learning_rate=7e-7),  # arXiv 2506.14574; needs --guide_model
    "step_dpo": dict(loss_type=["sigmoid"], beta=0.5, num_train_epochs=8.0),  # arXiv 2406.18629; see data.py
    "modpo": dict(loss_type=["modpo"], beta=0.1),  # arXiv 2310.03708; beta is beta / w_0 here
    # Of these the loss is the paper's; beta and what else stands here are customary values.
    "ipo": dict(loss_type=["ipo"], beta=0.1),  # arXiv 2310.12036
    "slic": dict(loss_type=["hinge"], beta=0.1),  # arXiv 2305.10425
    "exo": dict(loss_type=["exo_pair"], beta=0.1, label_smoothing=1e-3),  # arXiv 2402.00856
    "aot": dict(loss_type=["aot"], beta=0.1),  # arXiv 2406.05882
    "aot_unpaired": dict(loss_type=["aot_unpaired"], beta=0.1),  # arXiv 2406.05882
    "cdpo": dict(loss_type=["sigmoid"], beta=0.1, label_smoothing=0.1),  # DPO with label noise
    "wpo": dict(loss_type=["sigmoid"], beta=0.1, use_weighting=True),  # arXiv 2406.11827
    "ld_dpo": dict(loss_type=["sigmoid"], beta=0.1, ld_alpha=0.5),  # arXiv 2409.06411
    "dno": dict(loss_type=["dno"], beta=0.1),  # arXiv 2404.03715
    "lcpo": dict(loss_type=["lcpo"], beta=0.1),  # arXiv 2509.24159
    "asft": dict(loss_type=["sft", "asft"], loss_weights=[1.0, 0.1]),  # arXiv 2409.10571
    "dpo_norm": dict(loss_type=["sigmoid_norm"], beta=5.0, learning_rate=5e-7),  # arXiv 2411.15124
}
# For the tiny model, used when no --model_name_or_path is given.
TINY_DEFAULTS = dict(learning_rate=2e-4, per_device_train_batch_size=32, max_steps=80, eval_steps=20,
                     warmup_steps=5, lr_scheduler_type="constant", max_completion_length=24,
                     per_device_eval_batch_size=256)
# At DiscoPOP's own beta of 0.05 the tiny model stays in that loss's minimum at a margin below 0.
TINY_BY_ALGO = {"sft": dict(learning_rate=2e-3, max_steps=100, warmup_steps=20, adam_beta2=0.98),
                "discopop": dict(beta=0.5)}


def build_parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=model.HelpFormatter,
                                allow_abbrev=False)
    add = p.add_argument
    on_off = argparse.BooleanOptionalAction
    # what
    add("--algo", choices=list(PRESETS), default="mpo", help="a preset of the loss flags; a flag given wins")
    add("--dataset", nargs="+", help="files, folders, hub ids of pairs (see data.py); none: shapes")
    add("--ref_cache", default="runs/ref_cache", help="folder of cached reference log-probs")
    # losses
    add("--loss_type", nargs="+", help=f"any of {', '.join(losses.PREFERENCE_LOSSES)}; spaces or commas")
    add("--loss_weights", nargs="+", type=model.finite, help="one per loss_type; default 1 each")
    add("--beta", type=model.positive, default=0.1,
        help="strength of the pull to the reference; simpo's scale; in asft of the metrics alone")
    add("--bco_delta", choices=["running", "ema", "none"], default="running", help="BCO's reward shift")
    add("--nll_normalization", choices=["sequence", "token"], default="sequence", help="the mean in `sft`")
    add("--label_smoothing", type=model.within("[0, 0.5)"), default=0.0,
        help="share of wrong labels assumed by "
        f"{', '.join(sorted(losses.SMOOTHED_LOSSES))}")
    add("--simpo_gamma", type=model.finite, default=0.5,
        help="SimPO's margin gamma (its paper tunes gamma / beta)")
    add("--ld_alpha", type=model.share, default=1.0,
        help="LD-DPO: weight of an answer's tokens beyond the other's")
    add("--use_weighting", action=on_off, default=False, help="WPO: weigh pairs by how on-policy they are")
    add("--weight_column", help="column of the data that multiplies each pair's losses")
    add("--guide_model", help="tgdpo: folder or hub id of the DPO-trained model that weighs the tokens")
    add("--f_divergence_type", default="reverse_kl", help="of the pull to the reference",
        choices=["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"])
    add("--f_alpha_divergence_coef", type=model.finite, default=0.5, help="alpha of alpha_divergence")
    # steps
    add("--per_device_train_batch_size", type=model.size, default=8,
        help="pairs (SFT: rows) of a micro-batch")
    # limits
    add("--max_length", type=model.size,
        help="longest prompt + completion in tokens; default: the model's context")
    add("--max_completion_length", type=model.size, default=256, help="tokens of a held-out answer")
    # evaluation and the rest
    add("--stop_at_accuracy", type=model.within("(0, 1]"), help="stop once eval/accuracy reaches it")
    model.add_run_flags(p)
    return p


def parse_args(argv):
    return model.parse_args(argv, build_parser(), PRESETS, TINY_DEFAULTS, TINY_BY_ALGO, check_args)


def check_args(args, parser):
    unknown = [name for name in args.loss_type if name not in losses.PREFERENCE_LOSSES]
    if unknown:
        parser.error(f"unknown --loss_type {unknown[0]}; choose from {', '.join(losses.PREFERENCE_LOSSES)}")
    args.loss_weights = args.loss_weights or [1.0] * len(args.loss_type)
    if len(args.loss_weights) != len(args.loss_type):
        parser.error(f"{len(args.loss_type)} --loss_type but {len(args.loss_weights)} --loss_weights")
    if len(set(args.loss_type)) < len(args.loss_type):
        parser.error(f"a --loss_type stands twice in {' '.join(args.loss_type)}; give it one weight")
    given, pairs = set(args.loss_type), set(args.loss_type) - {"sft"}
    if args.label_smoothing and not given & losses.SMOOTHED_LOSSES:
        parser.error(f"--label_smoothing is not used by {', '.join(args.loss_type)}, only by "
                     f"{', '.join(sorted(losses.SMOOTHED_LOSSES))}")
    if "exo_pair" in given and args.label_smoothing == 0:
        parser.error("exo_pair needs --label_smoothing above 0 (1e-3, say): it takes its logarithm")
    without = ", ".join(sorted(given - losses.F_DIVERGENCE_LOSSES - {"sft"}))
    if args.f_divergence_type != "reverse_kl" and (without or not pairs):
        parser.error(f"--f_divergence_type does nothing to {without or 'sft'}; it is for "
                     f"{', '.join(sorted(losses.F_DIVERGENCE_LOSSES))}")
    for flag in ("use_weighting", "weight_column"):
        if getattr(args, flag) and (not pairs or given & losses.SORTING_LOSSES):
            parser.error(f"--{flag} weighs pairs: not sft, nor aot and aot_unpaired, which sort them apart")
    if args.ld_alpha != 1 and (not pairs or "tgdpo" in given):
        parser.error("--ld_alpha compares the lengths of a pair: sft has none, and tgdpo has its own weights")
    model.changes_nothing(args, parser, {
        name: f"without {what}" for name, what, used in (
            ("beta", "a pair loss", pairs), ("simpo_gamma", "--loss_type simpo", "simpo" in given),
            ("bco_delta", "--loss_type bco_pair", "bco_pair" in given),
            ("nll_normalization", "--loss_type sft", "sft" in given),
            ("f_alpha_divergence_coef", "--f_divergence_type alpha_divergence",
             args.f_divergence_type == "alpha_divergence")) if not used})
    if ("tgdpo" in given) != (args.guide_model is not None):
        parser.error("tgdpo needs --guide_model, a model trained by DPO, and nothing else takes it")


def check_columns(args, train_rows, eval_rows):
    """The numbers that losses, --weight_column and --sort_by take from the data, in every row of it."""
    needs = {c: f"--loss_type {name}" for name in args.loss_type for c in losses.COLUMNS_OF.get(name, ())}
    for column, why in needs.items():
        for rows in (train_rows, eval_rows):
            data.check_numbers(rows, column, *losses.COLUMNS[column], why)
    for rows in (train_rows, eval_rows) if args.weight_column is not None else ():
        data.check_numbers(rows, args.weight_column, 0, 1e6, "--weight_column")
    if args.sort_by is not None:
        data.check_numbers(train_rows, args.sort_by, -1e300, 1e300, "--sort_by")
    used = {*needs, args.weight_column, args.sort_by}
    first = next(data.readable(train_rows), {})
    for column in sorted({*losses.COLUMNS, "weight"} & first.keys() - used):
        if args.dataset is not None and os.environ.get("RANK", "0") == "0":
            print(f"warning: {first['_source']}: nothing uses the column {column}", file=sys.stderr)


# --- reference log-probs, computed once and kept on disk


def group_key(group) -> str:
    """What the reference's log-probs of a group are stored under, as in data.Size."""
    prompt, completions = group
    return data.group_key(prompt.tokens, prompt.pixels, completions)


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

    def add(self, policy, groups_in_batches, share_prompt: bool, stop) -> int:
        """Compute and store what is missing. -> how many distinct groups were computed"""
        before, new = len(self.known), {}
        for groups in groups_in_batches:
            keyed = {group_key(g): g for g in groups}
            missing = {k: g for k, g in keyed.items() if k not in self.known and k not in new}
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
        return len(self.known) - before

    def unknown(self, places, sizes, size: int) -> list[int]:
        """The places, less the batches of `size` of which every row is known: those need not be encoded. The
        other batches stay whole, since log-probs may depend on the batch in their last bit."""
        places = list(places)
        batches = [places[i:i + size] for i in range(0, len(places), size)]
        return [i for batch in batches if any(sizes[i].key not in self.known for i in batch) for i in batch]

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

    references: the ReferenceCaches of reference and guide, as far as the losses take them."""
    batch = model.to_device(policy.pack(groups, args.share_prompt), policy.device)
    logps, _, log_sum_sq_probs = policy(batch, entropies=False,
                                        sums_of_squares=args.use_weighting)                     # (N, T)
    mask = batch["completion_mask"]
    options = dict(
        beta=args.beta, delta=state["delta"], eta=state["eta"], label_smoothing=args.label_smoothing,
        simpo_gamma=args.simpo_gamma, nll_normalization=args.nll_normalization, ld_alpha=args.ld_alpha,
        f_divergence_type=args.f_divergence_type, f_alpha_divergence_coef=args.f_alpha_divergence_coef)
    if len(groups[0][1]) == 1:  # sft alone: no rejected answers were read
        return losses.preference_losses(args.loss_type, logps, mask, **options)
    arguments = [logps[0::2], mask[0::2], logps[1::2], mask[1::2]]                              # (B, T) each
    for reference in references:
        ref_logps = reference.logps(groups, batch)                                              # (N, T)
        arguments += [ref_logps[0::2], ref_logps[1::2]]

    def column(name):
        return torch.tensor([float(prompt.row[name]) for prompt, _ in groups], device=mask.device)  # (B,)

    options["columns"] = {c: column(c) for name in args.loss_type for c in losses.COLUMNS_OF.get(name, ())}
    if args.weight_column is not None:
        options["pair_weights"] = column(args.weight_column)
    if args.use_weighting:
        weights = losses.wpo_weights(logps, log_sum_sq_probs, mask)                             # (N,)
        options["pair_weights"] = options.get("pair_weights", 1.0) * weights[0::2] * weights[1::2]
    return losses.preference_losses(args.loss_type, *arguments, **options)


def load_guide(args, policy, processor, device):
    """TGDPO's guide, to be scored once like the reference and then let go."""
    guide, own = model.load_policy(args.guide_model, args.dtype, device, shard_size=args.shard_size)
    if own.tokenizer.get_vocab() != processor.tokenizer.get_vocab():
        raise model.InputError(f"--guide_model {args.guide_model} has another vocabulary than the policy")
    guide.filler = policy.filler
    return guide


def start_value(args, name: str) -> str:
    """What a loss must be before the first step: the policy is the reference, every log-ratio is 0."""
    if name in losses.REFERENCE_FREE:
        return "the starting policy's own value"
    if args.use_weighting or args.weight_column:
        return "weighted"
    if name in losses.COLUMNS_OF:
        return "of the rows' columns"
    zero, one = torch.zeros(1), torch.ones(1)
    value = losses.PAIR_LOSSES[name](  # of any f-divergence, too: its score of a log-ratio of 0 is 0
        zero, zero, beta=args.beta, delta=0.0, label_smoothing=args.label_smoothing, s_w=zero, s_l=zero,
        n_w=one, n_l=one, discopop_tau=0.05, eta=0.9, guided_w=zero, guided_l=zero)
    return f"{value.item():.4f}"


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

    # --- held-out answers are scored by the same `accuracy` as in train_grpo.py, where rows have a solution
    rewards = None
    if eval_rows and all(row.get("solution") is not None for row in data.readable(eval_rows)):
        accuracy = f"{Path(__file__).with_name('train_grpo.py')}:accuracy"
        rewards = rollout.RewardRunner([accuracy], args.reward_timeout)
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
    measured = data.RowCache(Path(args.ref_cache).with_name("row_cache"), policy, processor, columns)

    def held_out_size(row):
        size = measured(row)
        if rewards is not None:  # it is answered as well
            data.check_length(row, size.prompt + args.max_completion_length, data.length_limit(policy, None))
        return size

    with measured:
        plan, longest, sizes = data.check_rows(
            train_rows, max_steps * step_rows, args.seed, args.overlong, limit, rank, world_size, measured,
            args.sort_by, args.dataloader_num_workers)
        eval_rows, eval_sizes = data.check_eval_rows(eval_rows, limit, rank, world_size, held_out_size,
                                                     args.dataloader_num_workers)
    if rank == 0 and measured.computed:  # else an earlier run has shown it
        data.show_sample(processor, encode(train_rows[plan[0]]))

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
        places, size = dict.fromkeys(places_from(0)), args.per_device_train_batch_size
        found = len({sizes[i].key for i in places} & cache.known.keys())
        batched = encoded(train_rows, cache.unknown(places, sizes, size), size)
        with model.gathered(scorer), model.adapter_off(scorer), stop.passes():
            computed = cache.add(scorer, within_budget(batched), args.share_prompt, stop)
            size = args.per_device_eval_batch_size
            batched = encoded(eval_rows, cache.unknown(range(len(eval_rows)), eval_sizes, size), size)
            cache.add(scorer, within_budget(batched), args.share_prompt, stop)
            if rank == 0:
                print(f"{name} log-probs: {computed} pairs computed, {found} found in {cache.folder} "
                      "(rank 0, training rows)", flush=True)
        return cache

    references = [cached(policy, "reference")] if set(args.loss_type) - losses.REFERENCE_FREE else []
    asked = bool(references) and stop.agreed()
    if args.guide_model is not None and not asked:
        references.append(cached(load_guide(args, policy, processor, device), "guide"))
        asked = stop.agreed()
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
    state = {"step": 0, "pending": {"step": 0}, "delta": 0.0, "eta": 0.9, "start": {}, "end": {},
             "skipped": 0}
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
    progress = tqdm(total=max_steps, initial=state["step"], desc=args.algo,
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

        # 4. everything below is diagnostics, except that BCO's shift and LCPO's share move by this step
        means = {key: total / count for key, (total, count) in model.all_reduce_sums(sums, device).items()}
        metrics = {"step": step + 1, "epoch": (step + 1) * step_rows / len(train_rows),
                   "loss": sum(weight * means[f"loss/{name}"] for name, weight in weighted),
                   "grad_norm": grad_norm, "learning_rate": learning_rate,
                   "update_skipped": float(not math.isfinite(grad_norm)), **means}
        if "bco_pair" in args.loss_type:
            metrics["bco_delta"] = state["delta"]  # the one that this step used
            mean_reward = (means["rewards/chosen"] + means["rewards/rejected"]) / 2
            if math.isfinite(mean_reward):
                state["delta"] = losses.next_bco_delta(state["delta"], mean_reward, step, args.bco_delta)
        if "lcpo" in args.loss_type:
            metrics["lcpo_eta"] = state["eta"]
            if math.isfinite(means["lcpo_posterior"]):
                state["eta"] = losses.next_lcpo_eta(state["eta"], means["lcpo_posterior"])
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

"""Writes trl_goldens.json: what TRL's own code gives for made-up tensors. Needs TRL (1.16.0 made the file):

    python tests/make_trl_goldens.py

No model is run. TRL's methods are called unbound, with a stand-in `self` that has only what they read; what
sits inside a long method is cut out of its source between two marker lines and executed as it is.
test_trl_oracle.py compares losses.py with the file, and the file with an installed TRL.

A row of the file's inputs is one completion: a number for each token that counts, null for one that does not
(another turn, a tool's answer). Rows are ragged; what pads them is the reader's choice, here 0, as in TRL.
"""

import contextlib
import functools
import inspect
import json
import math
import random
import sys
import textwrap
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch

PATH = Path(__file__).with_name("trl_goldens.json")

PAIR_LOSSES = ["sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
               "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"]
SCORE_LOSSES = ["sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm"]  # read f'(ratio)
CLIPPED = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo"]
POLICY_LOSSES = [*CLIPPED, "cispo", "sapo", "vespo"]
LEVELS = ["token", "sequence"]


# --- inputs


def rows(rng, masks, low, high, near=None):
    """Ragged log-probs of six digits; "110": two tokens that count, one that does not. near: added to."""
    def number(i, t):
        return round(min(-0.01, rng.uniform(low, high) + (near[i][t] if near else 0)), 6)

    return [[number(i, t) if bit == "1" else None for t, bit in enumerate(mask)]
            for i, mask in enumerate(masks)]


def pairs(seed, chosen, rejected, drift):
    rng, made = random.Random(seed), {}
    for side, masks in (("chosen", chosen), ("rejected", rejected)):
        made[side] = rows(rng, masks, -3, -0.05)
        made["ref_" + side] = rows(rng, masks, -drift, drift, near=made[side])
        made["log_sum_sq_" + side] = rows(rng, masks, -3, -0.05)
    return made


def completions(seed, masks, advantages, drift):
    """entropies are multiples of 1/1024: TRL takes their quantile in fp32."""
    rng = random.Random(seed)
    logps = rows(rng, masks, -3, -0.05)
    old = rows(rng, masks, -drift, drift, near=logps)
    count = sum(mask.count("1") for mask in masks)
    levels = iter(rng.sample(range(1, 3072), count))
    return {"logps": logps, "old": old, "ref": rows(rng, masks, -1, 1, near=logps),
            "sampling": rows(rng, masks, -1, 1, near=old), "advantages": advantages,
            "entropies": [[next(levels) / 1024 if bit == "1" else None for bit in mask] for mask in masks]}


def rewards(seed, groups, weights):
    """groups: for each prompt one list a function, None where it abstains, "?" for any number."""
    rng = random.Random(seed)
    scores = [[round(rng.uniform(-1, 1) * 10**k, 6) if x == "?" else x for group in groups for x in group[k]]
              for k in range(len(weights))]
    return {"scores": scores, "weights": weights, "num_generations": len(groups[0][0])}


def make_inputs():
    inputs = {
        "pairs_short": pairs(1, ["11111", "111", "1"], ["11", "1111", "11111"], 0.5),
        "pairs_holes": pairs(2, ["110111", "11", "1001", "111"], ["111", "11011", "0111", "1"], 3),
        "pairs_equal": pairs(3, ["1111", "1111"], ["1111", "1111"], 1),
        "pairs_one": pairs(4, ["11111"], ["111"], 1),
        "pairs_start": pairs(13, ["11", "111"], ["111", "1"], 0),  # the policy is the reference
        # 204 is the first seed from 100 with which every option of policy_cases changes the gradient.
        "uneven": completions(204, ["11111", "111", "1", "1111"], [1.2, -0.7, 0.4, -1.1], 0.7),
        "holes": completions(6, ["110011", "00", "1111", "011", "11"], [-0.9, 0.8, 0.0, 1.5, -0.6], 0.9),
        "mild": completions(7, ["111", "11111", "1111", "11"], [0.9, -1.3, 0.5, -0.2], 0.15),
        "full_rewards": rewards(8, [[list("????")] * 3] * 3, [1.0, 0.5, 2.0]),
        "abstaining_rewards": rewards(9, [
            [list("????"), [None] * 4, ["?", None, "?", "?"]],          # a function scores nothing
            [["?", None, "?", "?"], ["?", None, "?", None], [None, None, "?", "?"]],  # one without a score
            [[1.0] * 4, [0.5] * 4, [None] * 4],                         # no spread
            [["?", None, None, None]] * 3, [[None] * 4] * 3],           # one known, none known
            [1.0, 0.5, 2.0]),
        "one_reward": rewards(10, [[[1.0, 0.0, 0.0, 1.0]], [list("????")], [[0.0] * 4]], [1.0]),
        # In fp32 the mean of seven times 0.9 is not 0.9, nor is the sum less one of them 6 * 0.9.
        "equal_rewards": rewards(11, [[[0.9] * 7], [list("???????")]], [1.0])}
    # Its log-ratios are those of pairs_one plus 3: BCO with a shift of -3 beta.
    shifted = inputs["pairs_shifted"] = dict(inputs["pairs_one"])
    for name in ("ref_chosen", "ref_rejected"):
        (first, *rest), = shifted[name]
        shifted[name] = [[round(first - 3, 6), *rest]]
    # Beyond our bounds on exponents, and at the same place within them.
    for name, ratio in (("within", 19.0), ("beyond", 23.0)):
        inputs["ratio_" + name] = {"logps": [[-0.5, -1.0], [-ratio - 1]],
                                   "old": [[-0.5 - ratio, -1.2], [-1.0]],
                                   "ref": [[-0.5, -0.9], [-1.0]], "advantages": [-1.0, -0.5]}
    for name, ratio in (("within", -70.0), ("beyond", -85.0)):
        inputs["pairs_" + name] = {"chosen": [[ratio - 1, -1.0]], "ref_chosen": [[-1.0, -1.0]],
                                   "rejected": [[-2.0]], "ref_rejected": [[-1.5]]}
    kl_rows = ["1" * (1 + i % 3) for i in range(20)]  # one row a completion of abstaining_rewards
    rng = random.Random(12)
    old = rows(rng, kl_rows, -3, -0.05)
    inputs["kl_rows"] = {"old": old, "ref": rows(rng, kl_rows, -1, 1, near=old)}
    return inputs


# --- TRL, called


@functools.cache
def trl_modules():
    from trl.trainer import dpo_trainer, grpo_trainer, rloo_trainer
    return SimpleNamespace(dpo=dpo_trainer, grpo=grpo_trainer, rloo=rloo_trainer)


def identity(x, *_, **__):
    return x


def stand_in(**attributes):
    """A trainer's `self` in training, on one process."""
    accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=1, process_index=0,
                                  gather=identity, gather_for_metrics=identity, reduce=identity,
                                  pad_across_processes=identity, sync_gradients=True)
    return SimpleNamespace(accelerator=accelerator, aux_loss_enabled=False,
                           model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
                           _metrics={"train": defaultdict(list)}, **attributes)


def cut(method, start, end):
    """The source of `method` from the line with `start` up to the one with `end`; both must be there once."""
    lines = inspect.getsource(method).splitlines()
    first, last = ([i for i, line in enumerate(lines) if marker in line] for marker in (start, end))
    if len(first) != 1 or len(last) != 1 or first >= last:
        raise LookupError(f"TRL's {method.__name__} has changed: {start!r} at {first}, {end!r} at {last}")
    return textwrap.dedent("\n".join(lines[first[0]:last[0]]))


def execute(module, block, **names):
    """Run a block of a module's source over `names` and the module's globals; returns all names after it."""
    namespace = {**vars(module), "gather": identity, **names}
    exec(compile(block, f"<{module.__name__}>", "exec"), namespace)
    return namespace


def dense(ragged):
    """Ragged rows -> (values, int mask), padded with 0 on the right."""
    width = max(map(len, ragged))
    padded = [[*row, *[None] * (width - len(row))] for row in ragged]
    return (torch.tensor([[0.0 if x is None else x for x in row] for row in padded]),
            torch.tensor([[int(x is not None) for x in row] for row in padded]))


def ragged(values, mask):
    """Dense -> rows of the values where mask. What is left out must be zero: TRL's gradient there."""
    assert not values[mask == 0].any()
    return [row[keep.bool()].tolist() for row, keep in zip(values, mask)]


def logged(self, names):
    return {"metrics": {name: self._metrics["train"][name][-1] for name in names}} if names else {}


def preference(inputs, *, loss_type, beta, loss_weights=None, label_smoothing=0.0,
               f_divergence_type="reverse_kl", f_alpha_divergence_coef=0.5, ld_alpha=None,
               use_weighting=False, discopop_tau=0.05, value_only=False, metrics=()):
    """DPOTrainer._compute_loss on a batch [chosen, rejected] behind prompts of two tokens."""
    mask = dense(inputs["chosen"] + inputs["rejected"])[1]
    leaf = dense(inputs["chosen"] + inputs["rejected"])[0].requires_grad_()

    def outputs(logps, log_sum_sq):
        shifted = torch.nn.functional.pad(logps * mask, (1, 0))  # the prompt's second token is predicted, too
        other = torch.nn.functional.pad(log_sum_sq, (1, 0))
        zeros = torch.zeros_like(shifted)
        return lambda **_: SimpleNamespace(log_probs=shifted, log_sum_sq_probs=other, entropy=zeros,
                                           mean_logits=zeros, is_top1=zeros.bool())

    ref = dense(inputs["ref_chosen"] + inputs["ref_rejected"])[0]
    weighing = torch.zeros_like(ref)
    if use_weighting:
        weighing = dense(inputs["log_sum_sq_chosen"] + inputs["log_sum_sq_rejected"])[0]
    loss_types = [loss_type] if isinstance(loss_type, str) else loss_type
    self = stand_in(
        ld_alpha=ld_alpha, precompute_ref_logps=False, ref_model=outputs(ref, weighing), beta=beta,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=discopop_tau),
        f_divergence_type=f_divergence_type, f_alpha_divergence_coef=f_alpha_divergence_coef,
        loss_types=loss_types, loss_weights=loss_weights or [1.0] * len(loss_types),
        label_smoothing=label_smoothing, use_weighting=use_weighting, _total_train_tokens=0, _tp_size=1)
    completion_mask = torch.nn.functional.pad(mask, (2, 0))
    batch = {"input_ids": torch.zeros_like(completion_mask), "completion_mask": completion_mask,
             "attention_mask": torch.ones_like(completion_mask)}
    trainer = trl_modules().dpo.DPOTrainer
    loss = trainer._compute_loss(self, outputs(leaf, weighing), batch, False)
    result = {"value": loss.item(), **logged(self, metrics)}
    if not value_only:
        loss.backward()
        B = len(inputs["chosen"])
        result["grad"] = {"chosen": ragged(leaf.grad[:B], mask[:B]),
                          "rejected": ragged(leaf.grad[B:], mask[B:])}
    return result


def correction_ratio(old, sampling, mask, mode, clip_min, clip_max):
    """GRPOTrainer's importance weight of the sampler: (N, T), or (N, 1) for sequence_*."""
    trl = trl_modules().grpo
    block = cut(trl.GRPOTrainer._generate_and_score_completions,
                "# Compute the importance sampling ratio when using vLLM, to correct for",
                "# Compute the per-token log probabilities for the reference model")
    self = stand_in(use_vllm=True, vllm_importance_sampling_correction=True,
                    vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_min=clip_min,
                    vllm_importance_sampling_clip_max=clip_max)
    return execute(trl, block, self=self, completion_mask=mask, tool_mask=None, old_per_token_logps=old,
                   sampling_per_token_logps=sampling)["vllm_importance_sampling_ratio"]


def policy(inputs, *, loss_type, importance_sampling_level="token", on_policy=False, epsilon=0.2,
           epsilon_high=0.28, delta=None, beta=0.0, use_bias_correction_kl=True, top_entropy_quantile=1.0,
           off_policy_mask_threshold=None, importance_sampling_correction=None, clip_min=None, clip_max=None,
           entropy_coef=0.0, max_completion_length=9, micro_batches=None, metrics=(),
           sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, vespo_k_pos=2.0, vespo_lambda_pos=3.0,
           vespo_k_neg=3.0, vespo_lambda_neg=2.0):
    """GRPOTrainer._compute_loss, added up over micro-batches (lists of rows; None: all rows in one)."""
    logps, mask = dense(inputs["logps"])
    old, ref, sampling, entropies = (dense(inputs.get(name, inputs["logps"]))[0]
                                     for name in ("old", "ref", "sampling", "entropies"))
    logps, entropies = logps.requires_grad_(), entropies.requires_grad_()
    micro_batches = micro_batches or [list(range(len(mask)))]
    trainer = trl_modules().grpo.GRPOTrainer
    correct = importance_sampling_correction is not None
    total = 0.0
    for at in micro_batches:
        self = stand_in(
            args=SimpleNamespace(delta=delta, use_bias_correction_kl=use_bias_correction_kl,
                                 steps_per_generation=len(micro_batches),
                                 sapo_temperature_pos=sapo_temperature_pos,
                                 sapo_temperature_neg=sapo_temperature_neg, vespo_k_pos=vespo_k_pos,
                                 vespo_lambda_pos=vespo_lambda_pos, vespo_k_neg=vespo_k_neg,
                                 vespo_lambda_neg=vespo_lambda_neg),
            _get_per_token_logps_and_entropies=lambda *_, **__: (logps[at], entropies[at], None),
            top_entropy_quantile=top_entropy_quantile, off_policy_mask_threshold=off_policy_mask_threshold,
            importance_sampling_level=importance_sampling_level, beta=beta, loss_type=loss_type,
            epsilon_low=epsilon, epsilon_high=epsilon_high, use_vllm=correct,
            vllm_importance_sampling_correction=correct, max_completion_length=max_completion_length,
            current_gradient_accumulation_steps=len(micro_batches), entropy_coef=entropy_coef,
            _entropy_bonus_enabled=entropy_coef != 0.0, use_adaptive_entropy=False,
            get_off_policy_mask=trainer.get_off_policy_mask, get_gamma_weights=trainer.get_gamma_weights)
        self.get_high_entropy_mask = functools.partial(trainer.get_high_entropy_mask, self)
        batch = {"prompt_ids": mask[at, :1], "prompt_mask": mask[at, :1], "completion_ids": mask[at],
                 "completion_mask": mask[at], "advantages": torch.tensor(inputs["advantages"])[at],
                 "num_items_in_batch": mask.sum(), "ref_per_token_logps": ref[at],
                 "sampling_per_token_logps": sampling[at]}
        if not on_policy:
            batch["old_per_token_logps"] = old[at]
        if correct:
            batch["importance_sampling_ratio"] = correction_ratio(
                old[at], sampling[at], mask[at], importance_sampling_correction, clip_min, clip_max)
        total = total + trainer._compute_loss(self, None, batch)
    total.backward()
    grad = {"logps": ragged(logps.grad, mask)}
    if entropy_coef:
        grad["entropies"] = ragged(entropies.grad, mask)
    return {"value": total.item(), "grad": grad, **logged(self, metrics)}


def rloo(inputs, *, epsilon=0.2, epsilon_high=0.28):
    """RLOOTrainer._compute_loss."""
    logps, mask = dense(inputs["logps"])
    logps = logps.requires_grad_()
    entropies = torch.zeros_like(logps)
    self = stand_in(_get_per_token_logps_and_entropies=lambda *_, **__: (logps, entropies, None),
                    epsilon_low=epsilon, epsilon_high=epsilon_high)
    batch = {"prompt_ids": mask[:, :1], "prompt_mask": mask[:, :1], "completion_ids": mask,
             "completion_mask": mask, "advantages": torch.tensor(inputs["advantages"]),
             "old_logps": (dense(inputs["old"])[0] * mask).sum(1)}
    loss = trl_modules().rloo.RLOOTrainer._compute_loss(self, None, batch)
    loss.backward()
    return {"value": loss.item(), "grad": {"logps": ragged(logps.grad, mask)}}


def advantages(inputs, *, estimator, scale_rewards="group", beta=0.0, kl=None):
    """_generate_and_score_completions from rewards to advantages; kl: log-probs for RLOO's penalty."""
    trl, G = trl_modules(), inputs["num_generations"]
    scores = torch.tensor([[math.nan if x is None else x for x in row] for row in inputs["scores"]])
    module = trl.rloo if estimator == "rloo" else trl.grpo
    trainer = module.RLOOTrainer if estimator == "rloo" else module.GRPOTrainer
    aggregation = "normalize_then_sum" if estimator == "gdpo" else "sum_then_normalize"
    self = stand_in(reward_weights=torch.tensor(inputs["weights"]), reward_funcs=inputs["weights"],
                    scale_rewards=scale_rewards, multi_objective_aggregation=aggregation, beta=beta,
                    reward_clip_range=None, normalize_advantages=False)
    names = dict(self=self, rewards_per_func=scores.T.contiguous(), num_generations=G, device=scores.device)
    if kl:
        names["old_per_token_logps"], names["completion_mask"] = dense(kl["old"])
        names["ref_per_token_logps"] = dense(kl["ref"])[0]
    block = cut(trainer._generate_and_score_completions,
                "unscorable_mask = torch.isnan(rewards_per_func).all(dim=1)",
                "# Slice to keep only the local part")
    return {"value": execute(module, block, **names)["advantages"].tolist()}


def functions(inputs, *, function, **options):
    """What GRPOTrainer has as methods of their own, two masks and VESPO's weight; and the sampler's ratio."""
    logps, mask = dense(inputs["logps"])
    old, sampling, entropies = (dense(inputs[name])[0] for name in ("old", "sampling", "entropies"))
    A, trainer = torch.tensor(inputs["advantages"])[:, None], trl_modules().grpo.GRPOTrainer
    if function == "off_policy_mask":
        value = trainer.get_off_policy_mask(A, logps, sampling, mask, options["threshold"])
    elif function == "top_entropy_mask":
        value = trainer.get_high_entropy_mask(stand_in(), entropies, mask, 1 - options["quantile"])
    elif function == "gamma_weights":
        value = trainer.get_gamma_weights(A, logps - old, mask, None, **options)
    elif function == "correction":
        value = correction_ratio(old, sampling, mask, **options)
    return {"value": value.tolist()}


RUNNERS = {"preference": preference, "policy": policy, "rloo": rloo, "advantages": advantages,
           "functions": functions}


# --- cases: (group, runner, inputs, options), float32 where TRL has no fp64


def make_cases():
    cases = []

    def add(group, runner, inputs, dtype="float64", **options):
        cases.append({"group": group, "runner": runner, "inputs": inputs, "dtype": dtype, "options": options})

    preference_cases(functools.partial(add, runner="preference"))
    policy_cases(functools.partial(add, runner="policy"))
    advantage_cases(functools.partial(add, runner="advantages"))
    for inputs in ("uneven", "holes", "mild"):
        for threshold in (-0.2, 0.0, 0.3):
            add("functions", "functions", inputs, function="off_policy_mask", threshold=threshold)
        for quantile in (0.1, 0.4, 0.75):
            add("functions", "functions", inputs, function="top_entropy_mask", quantile=quantile)
        add("functions", "functions", inputs, function="gamma_weights", k_pos=2.0, lambda_pos=3.0, k_neg=3.0,
            lambda_neg=2.0)
        add("functions", "functions", inputs, function="gamma_weights", k_pos=1.3, lambda_pos=0.7, k_neg=0.4,
            lambda_neg=2.6)
        for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):
            for clip_min, clip_max in ((None, 1.5), (0.6, 1.5), (0.6, None)):
                add("functions", "functions", inputs, function="correction", mode=mode, clip_min=clip_min,
                    clip_max=clip_max)
    for inputs in ("uneven", "mild"):
        add("rloo", "rloo", inputs)
        add("rloo", "rloo", inputs, epsilon=0.05, epsilon_high=0.6)
    add("rloo_empty", "rloo", "holes")
    return cases


def preference_cases(add):
    reward_metrics = ["rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"]
    for loss_type in PAIR_LOSSES:
        smooth = {"label_smoothing": 0.15} if loss_type in ("exo_pair", "robust") else {}
        for inputs in ("pairs_short", "pairs_holes", "pairs_equal"):
            for beta in (0.1, 0.3):
                metrics = {"metrics": reward_metrics} if loss_type == "sigmoid" else {}
                add("loss_type", inputs=inputs, loss_type=loss_type, beta=beta, **smooth, **metrics)
        if loss_type in ("exo_pair", "robust", "aot", "aot_unpaired"):
            add("label_smoothing", inputs="pairs_holes", loss_type=loss_type, beta=0.3, label_smoothing=0.3)
        add("ld_alpha", inputs="pairs_holes", loss_type=loss_type, beta=0.3, ld_alpha=0.4, **smooth)
        # TRL refuses aot, sft fails beyond one pair, and hinge has a value only: TRL multiplies in place what
        # relu keeps for its gradient.
        if loss_type not in ("aot", "aot_unpaired", "sft"):
            value_only = {"value_only": True} if loss_type == "hinge" else {}
            add("wpo", inputs="pairs_holes", loss_type=loss_type, beta=0.3, use_weighting=True, **smooth,
                **value_only)
    add("ld_alpha", inputs="pairs_short", loss_type="sigmoid", beta=0.3, ld_alpha=0.0)
    add("wpo", inputs="pairs_short", loss_type="sigmoid", beta=0.3, use_weighting=True, ld_alpha=0.4)
    for loss_type in SCORE_LOSSES:
        smooth = {"label_smoothing": 0.15} if loss_type in ("exo_pair", "robust") else {}
        for divergence in ("reverse_kl", "forward_kl", "js_divergence"):
            add("f_divergence", inputs="pairs_short", loss_type=loss_type, beta=0.3,
                f_divergence_type=divergence, **smooth)
        soft = {"discopop_tau": 0.5} if loss_type == "discopop" else {}  # 0.05 magnifies the noise of fp32
        for alpha in (0.5, 1.7):
            add("f_divergence", inputs="pairs_short", dtype="float32", loss_type=loss_type, beta=0.3,
                f_divergence_type="alpha_divergence", f_alpha_divergence_coef=alpha, **smooth, **soft)
    for loss_type in ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "aot"):  # read the log-ratios
        add("f_divergence", inputs="pairs_short", loss_type=loss_type, beta=0.3,
            f_divergence_type="forward_kl")
    add("f_divergence", inputs="pairs_short", loss_type="sigmoid", beta=0.3,
        f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.0)
    add("discopop_tau", inputs="pairs_holes", loss_type="discopop", beta=0.3, discopop_tau=0.5)
    mpo = dict(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0])
    for inputs in ("pairs_short", "pairs_holes", "pairs_equal"):
        add("mix", inputs=inputs, beta=0.1, **mpo)
    add("mix", inputs="pairs_short", beta=0.3, loss_type=["ipo", "apo_zero", "aot"],
        loss_weights=[0.5, 1.5, 2.0], ld_alpha=0.4)
    # Where we differ, and where both agree.
    add("differs", inputs="pairs_short", loss_type="sigmoid", beta=0.3)
    add("differs", inputs="pairs_short", loss_type="sigmoid", beta=0.3, label_smoothing=0.2)
    for inputs in ("pairs_one", "pairs_shifted"):
        add("differs", inputs=inputs, loss_type="bco_pair", beta=0.3)
    add("differs", inputs="pairs_one", loss_type="sft", beta=0.3)
    add("differs", inputs="pairs_one", loss_type="sft", beta=0.3, use_weighting=True)
    add("differs", inputs="pairs_one", loss_type=["sigmoid", "sft"], beta=0.3)
    add("differs", inputs="pairs_one", loss_type=["sigmoid", "sft"], beta=0.3, use_weighting=True)
    add("differs", inputs="pairs_start", loss_type="sigmoid", beta=0.3, metrics=["rewards/accuracies"])
    for inputs in ("pairs_within", "pairs_beyond"):
        add("differs", inputs=inputs, loss_type="sigmoid", beta=1e-30, f_divergence_type="forward_kl")
        add("differs", inputs=inputs, loss_type="discopop", beta=1.0, discopop_tau=10.0)


def policy_cases(add):
    for loss_type in POLICY_LOSSES:
        clip = {"epsilon_high": 1.1} if loss_type == "cispo" else {}
        base = dict(loss_type=loss_type, **clip)
        names = ["cispo_clip_ratio"] if loss_type == "cispo" else []
        if loss_type in CLIPPED:
            names = ["clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"]
        for level in LEVELS:
            both = dict(base, importance_sampling_level=level)
            for inputs in ("uneven", "holes", "mild"):
                metrics = {"metrics": names} if names and level == "token" else {}
                add("loss_type", inputs=inputs, **both, **metrics)
                add("loss_type", inputs=inputs, on_policy=True, **both)
            if loss_type in CLIPPED:
                for delta in (1.1, 1.4):
                    add("delta", inputs="uneven", delta=delta, **both)
            for corrected in (True, False):
                metrics = {} if corrected else {"metrics": ["kl"]}
                add("kl", inputs="uneven", beta=0.3, use_bias_correction_kl=corrected, **both, **metrics)
            add("kl", inputs="holes", beta=0.3, on_policy=True, **both)
            add("top_entropy", inputs="uneven", top_entropy_quantile=0.4, **both)
            add("off_policy_mask", inputs="uneven", off_policy_mask_threshold=0.0, **both)
            add("entropy_coef", inputs="uneven", entropy_coef=0.05, **both)
            for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):
                if loss_type != "vespo" or mode.startswith("token"):  # TRL refuses the others
                    add("correction", inputs="uneven", importance_sampling_correction=mode, clip_min=0.6,
                        clip_max=1.6, **both)
            add("all_together", inputs="holes", beta=0.2, top_entropy_quantile=0.4,
                off_policy_mask_threshold=0.0, importance_sampling_correction="token_truncate", clip_max=1.5,
                **both, **({"delta": 1.4} if loss_type in CLIPPED else {}))
    add("constants", inputs="uneven", loss_type="sapo", sapo_temperature_pos=0.6, sapo_temperature_neg=2.5)
    add("constants", inputs="uneven", loss_type="vespo", vespo_k_pos=1.3, vespo_lambda_pos=0.7,
        vespo_k_neg=0.4, vespo_lambda_neg=2.6)
    # Where we differ, and where both agree.
    for loss_type in POLICY_LOSSES:
        for micro_batches in ([[0, 1], [2, 3]], [[0], [1, 2, 3]]):
            add("micro_batches", inputs="uneven", loss_type=loss_type, micro_batches=micro_batches)
    for inputs in ("ratio_within", "ratio_beyond"):
        for loss_type in ("grpo", "dapo"):
            add("clamp", inputs=inputs, loss_type=loss_type)
        add("clamp", inputs=inputs, loss_type="grpo", on_policy=True, beta=0.1)


def advantage_cases(add):
    for inputs in ("full_rewards", "abstaining_rewards", "one_reward"):
        for scale in ("group", "batch", "none"):
            add("advantages", inputs=inputs, estimator="grpo", scale_rewards=scale)
        add("advantages", inputs=inputs, estimator="gdpo")
        add("advantages", inputs=inputs, estimator="rloo")
    add("advantages", inputs="abstaining_rewards", estimator="rloo", beta=0.2, kl="kl_rows")
    for estimator in ("grpo", "gdpo", "rloo"):
        for dtype in ("float32", "float64")[:1 if estimator == "rloo" else 2]:  # no noise in RLOO's fp64 here
            add("equal_rewards", inputs="equal_rewards", dtype=dtype, estimator=estimator)


# --- the file


@contextlib.contextmanager
def default_dtype(name):
    """TRL's constants (torch.tensor(0.1), torch.where(mask, 1.0, 1.05)) take the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, name))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def shortened(x):
    """13 digits: enough for the 1e-9 that is compared."""
    if isinstance(x, dict):
        return {key: shortened(value) for key, value in x.items()}
    if isinstance(x, list):
        return [shortened(value) for value in x]
    return float(f"{x:.13g}") if isinstance(x, float) else x


def case_id(case):
    options = {k: v for k, v in case["options"].items() if k != "metrics"}
    if case["dtype"] != "float64":
        options["dtype"] = case["dtype"]
    return ",".join([case["inputs"], *(f"{k}={json.dumps(v, separators=(',', ':'))}".replace('"', "")
                                       for k, v in options.items())])


def make():
    """{"trl": version, "inputs": {name: inputs}, "cases": [...]}; a case: its group, runner, inputs' name,
    dtype, options (TRL's names), value, grad and metrics where there are any, and an id."""
    import trl

    inputs, cases = make_inputs(), make_cases()
    for case in cases:
        options = dict(case["options"])
        if isinstance(options.get("kl"), str):
            options["kl"] = inputs[options["kl"]]
        with default_dtype(case["dtype"]):
            case.update(shortened(RUNNERS[case["runner"]](inputs[case["inputs"]], **options)))
        case["id"] = case_id(case)
    return {"trl": trl.__version__, "inputs": inputs, "cases": cases}


def main():
    goldens = make()
    compact = functools.partial(json.dumps, separators=(",", ":"), allow_nan=False)
    inputs = ",\n".join(f"{compact(name)}: {compact(value)}" for name, value in goldens["inputs"].items())
    cases = ",\n".join(compact(case) for case in goldens["cases"])  # a line each, for readable diffs
    version = compact(goldens["trl"])
    PATH.write_text(f'{{"trl": {version},\n"inputs": {{\n{inputs}}},\n"cases": [\n{cases}]}}\n')
    print(f"{len(goldens['cases'])} cases, {PATH.stat().st_size / 1000:.0f} kB -> {PATH.name}")


if __name__ == "__main__":
    sys.exit(main())

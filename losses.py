"""Every loss and advantage of flatpo, as pure functions: tensors in, tensors out.

No model, no distributed code, no configuration; only torch. Shapes: B pairs or rows, N completions, T tokens.

    logps       log pi(y_t | x, y_<t) of each completion token, fp32, at the sampling temperature     (N, T)
    mask        True on the tokens that count: from the first to the first EOS, EOS included          (N, T)
    logratios   log pi(y|x) - log pi_ref(y|x), SUMMED over the completion's tokens                    (B,)

Losses return **sums with a count beside them**, never means. The caller divides by the count over the whole
optimizer step (all micro-batches and ranks), so neither micro-batch size nor rank count changes the gradient:

    loss = loss_sum / global_count
"""

import math

import torch
import torch.nn.functional as F


def masked_sum(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum of x over mask: (N, T) -> (N,). `where`, not `*`: padding may be nan, and 0 * nan is nan."""
    return torch.where(mask, x, 0.0).sum(-1)


# ------------------------------------------------------------------------------------------------------------
# Preference losses. Pair: chosen w, rejected l; r_w, r_l: log-ratios to the reference, summed over tokens.


def sigmoid_loss(chosen_logratios, rejected_logratios, *, beta, **_):
    """DPO (arXiv 2305.18290, eq. 7): -log sigma(beta (r_w - r_l)). (B,), (B,) -> (B,). Starts at log 2."""
    return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios))


def bco_pair_loss(chosen_logratios, rejected_logratios, *, beta, delta, **_):
    """BCO on pairs (arXiv 2404.04656; the quality loss of MPO, arXiv 2411.10442):

        -log sigma(beta r_w - delta) - log sigma(-(beta r_l - delta))                   (B,), (B,) -> (B,)

    delta, the reward shift, is a number from `next_bco_delta`, constant within an optimizer step; 0 is what
    TRL does since 0.29. Equals 2 log 2 at the start.
    """
    return -F.logsigmoid(beta * chosen_logratios - delta) - F.logsigmoid(-(beta * rejected_logratios - delta))


def next_bco_delta(delta: float, mean_reward: float, step: int, kind: str, ema_decay: float = 0.9) -> float:
    """The next step's shift, from `mean_reward`, this step's mean of beta r over chosen and rejected.

        running  delta_t = (1/t) sum_{k<=t} rbar_k    mean over completed steps (MPO paper, InternVL's code)
        ema      delta_t = d delta_{t-1} + (1-d) rbar_t, delta_1 = rbar_1
        none     0                                    (TRL >= 0.29)

    step: optimizer steps completed before this one. InternVL includes the current micro-batch in its mean;
    here the shift lags by one optimizer step, so that it cannot depend on the cut into micro-batches.
    """
    if kind == "none":
        return 0.0
    if kind == "running":
        return delta + (mean_reward - delta) / (step + 1)
    if kind == "ema":
        return mean_reward if step == 0 else ema_decay * delta + (1 - ema_decay) * mean_reward
    raise ValueError(f"bco_delta must be running, ema or none, got {kind!r}")


PAIR_LOSSES = {"sigmoid": sigmoid_loss, "bco_pair": bco_pair_loss}  # need chosen, rejected and a reference
PREFERENCE_LOSSES = [*PAIR_LOSSES, "sft"]


def nll_loss(logps, mask, *, normalization):
    """Negative log-likelihood of the chosen responses: (B, T), (B, T) -> (loss sum, count), both scalars.

        sequence  sum_i -log pi(y_i|x_i) / |y_i|, count B          MPO's generation loss (arXiv 2411.10442)
        token     sum_i -log pi(y_i|x_i),         count sum |y_i|  the usual SFT token mean; TRL's `sft` takes
                                                                   it per micro-batch, here it spans the step
    """
    per_sequence, lengths = -masked_sum(logps, mask), mask.sum(-1)
    if normalization == "sequence":
        return (per_sequence / lengths.clamp(min=1)).sum(), lengths.new_tensor(len(lengths))
    if normalization == "token":
        return per_sequence.sum(), lengths.sum()
    raise ValueError(f"nll normalization must be sequence or token, got {normalization!r}")


def preference_losses(loss_types, chosen_logps, chosen_mask, rejected_logps=None, rejected_mask=None,
                      ref_chosen_logps=None, ref_rejected_logps=None, *, beta, delta=0.0,
                      nll_normalization="sequence"):
    """The terms of a mix such as MPO's (0.8 sigmoid + 0.2 bco_pair + 1.0 sft, arXiv 2411.10442).

    *_logps: (B, Tc) chosen, (B, Tr) rejected, per token; ref_*: the same of the reference. Rejected and
    reference may be None when loss_types is only `sft`. Returns ({loss_type: (sum, count)},
    {metric: (sum, count)}); the metrics are TRL's: rewards are beta * logratio, an accuracy counts a tie as
    1/2 (TRL counts it 0; at the start all are ties).
    """
    for name in loss_types:
        if name not in PREFERENCE_LOSSES:
            raise ValueError(f"unknown loss_type {name!r}; choose from {', '.join(PREFERENCE_LOSSES)}")
    terms = {}
    if "sft" in loss_types:
        terms["sft"] = nll_loss(chosen_logps, chosen_mask, normalization=nll_normalization)
    B, tokens = len(chosen_mask), chosen_mask.sum()
    metrics = {"logps/chosen": (masked_sum(chosen_logps, chosen_mask).detach().sum(), B),
               "nll": (-masked_sum(chosen_logps, chosen_mask).detach().sum(), tokens)}  # per token
    if rejected_logps is None:
        return terms, metrics

    chosen_logratios = masked_sum(chosen_logps - ref_chosen_logps, chosen_mask)             # (B,)
    rejected_logratios = masked_sum(rejected_logps - ref_rejected_logps, rejected_mask)     # (B,)
    for name in loss_types:
        if name in PAIR_LOSSES:
            losses = PAIR_LOSSES[name](chosen_logratios, rejected_logratios, beta=beta, delta=delta)
            terms[name] = losses.sum(), losses.numel()
    chosen_rewards, rejected_rewards = beta * chosen_logratios.detach(), beta * rejected_logratios.detach()
    margins = chosen_rewards - rejected_rewards
    metrics |= {"logps/rejected": (masked_sum(rejected_logps, rejected_mask).detach().sum(), B),
                "rewards/chosen": (chosen_rewards.sum(), B), "rewards/rejected": (rejected_rewards.sum(), B),
                "rewards/margins": (margins.sum(), B),
                "rewards/accuracies": ((margins > 0).sum() + 0.5 * (margins == 0).sum(), B)}
    return terms, metrics


# ------------------------------------------------------------------------------------------------------------
# Group advantages


def group_advantages(rewards, num_generations, *, scale_rewards="group", eps=1e-4):
    """GRPO's advantages (arXiv 2402.03300):  A = (r - mean_group) / (std_group + eps).   (N,) -> (N,)

    rewards: group-major, N = prompts * num_generations; nan where every reward function abstained: such a
    completion is left out of its group's mean and std and gets advantage 0. The std is the unbiased one, as
    in TRL. scale_rewards "none" leaves out the division (Dr. GRPO, arXiv 2503.20783). A group whose rewards
    are all equal gets exactly 0, also when rounding in the mean says otherwise.
    """
    if scale_rewards not in ("group", "none"):
        raise ValueError(f"scale_rewards must be group or none, got {scale_rewards!r}")
    if num_generations < 2:
        raise ValueError("group advantages need num_generations >= 2: "
                         "the mean of a group of one is the sample itself")
    groups = rewards.double().view(-1, num_generations)                # (P, G); fp64: no noise to amplify
    known = ~groups.isnan()
    count = known.sum(-1, keepdim=True)                                # (P, 1)
    filled = torch.where(known, groups, 0.0)
    mean = filled.sum(-1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(known, groups - mean, 0.0)
    lowest = torch.where(known, groups, math.inf).amin(-1, keepdim=True)
    highest = torch.where(known, groups, -math.inf).amax(-1, keepdim=True)
    size = torch.maximum(lowest.abs(), highest.abs()).clamp(min=1e-3)  # a spread below 1e-8 of it is rounding
    centred = torch.where(highest - lowest <= 1e-8 * size, 0.0, centred)
    if scale_rewards == "group":
        std = ((centred**2).sum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
        centred = centred / (std + eps)
    return centred.flatten().to(rewards.dtype)


# ------------------------------------------------------------------------------------------------------------
# Policy losses: -min(c A, clip(c, 1 - epsilon, 1 + epsilon_high) A), with another ratio c and another mean.

POLICY_LOSSES = {
    "grpo": "mean over completions of the mean over its tokens (arXiv 2402.03300)",
    "dapo": "mean over all tokens of the step (arXiv 2503.14476)",
    "dr_grpo": "sum over tokens / (completions * max_completion_length) (arXiv 2503.20783)",
}


def policy_loss_count(loss_type, mask, max_completion_length):
    """The divisor of `policy_loss`'s sum, of these rows: add up over the optimizer step. (N, T) -> scalar."""
    if loss_type == "grpo":
        return mask.new_tensor(len(mask), dtype=torch.float32)
    if loss_type == "dapo":
        return mask.sum().float()
    if loss_type == "dr_grpo":
        return mask.new_tensor(len(mask) * max_completion_length, dtype=torch.float32)
    raise ValueError(f"unknown loss_type {loss_type!r}; choose from {', '.join(POLICY_LOSSES)}")


def k3_kl(logps, ref_logps):
    """Schulman's k3 estimator of KL(pi || ref) per token, (N, T) -> (N, T): e^u - u - 1, u = log(ref / pi).

    Its value is an unbiased estimate of KL(pi || ref), but its gradient as a loss, on samples of pi, is
    E_pi[(1 - e^u) grad log pi] = -E_ref[grad log pi], that of KL(ref || pi). u is clamped so that one outlier
    cannot overflow exp.
    """
    u = (ref_logps - logps).clamp(-20, 20)
    return torch.exp(u) - u - 1


def policy_loss(logps, old_logps, advantages, mask, *, loss_type, importance_sampling_level, epsilon,
                epsilon_high, max_completion_length, ref_logps=None, beta=0.0):
    """The clipped surrogate of GRPO and its relatives, as a sum; divide by the step's `policy_loss_count`.

        token      c_t = pi(y_t) / pi_old(y_t)                               GRPO, arXiv 2402.03300 eq. 3
        sequence   s = (prod_t c_t)^(1/|y|), the same for each token of y    GSPO, arXiv 2507.18071
        L_t = -min(c A, clip(c, 1 - epsilon, 1 + epsilon_high) A) + beta * k3_t

    logps, old_logps, ref_logps: (N, T); mask: (N, T); advantages: (N,). On-policy, old_logps is
    logps.detach(): the ratio is 1, the loss -A, and the gradient the plain policy gradient. Padding may hold
    anything, nan included. Returns (loss sum, {metric: (sum, count)}).
    """
    if loss_type not in POLICY_LOSSES:
        raise ValueError(f"unknown loss_type {loss_type!r}; choose from {', '.join(POLICY_LOSSES)}")
    tokens, lengths = mask.sum(), mask.sum(-1)                                      # scalar, (N,)
    log_ratio = torch.where(mask, logps - old_logps, 0.0)                           # (N, T)
    if importance_sampling_level == "sequence":
        log_ratio = (log_ratio.sum(-1) / lengths.clamp(min=1))[:, None].expand_as(logps)
    elif importance_sampling_level != "token":
        raise ValueError("importance_sampling_level must be token or sequence, "
                         f"got {importance_sampling_level!r}")
    # +-20: a bf16 outlier of +-100 would make exp overflow; e^20 is beyond every clip range.
    ratio, A = log_ratio.clamp(-20, 20).exp(), advantages[:, None]                  # (N, T), (N, 1)
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    per_token_loss = -torch.min(ratio * A, clipped * A)                             # min for both signs of A

    metrics = {}
    if beta:
        kl = k3_kl(torch.where(mask, logps, 0.0), torch.where(mask, ref_logps, 0.0))  # 0 on padding
        per_token_loss = per_token_loss + beta * kl
        metrics["kl"] = kl.detach().sum(), tokens
    per_token_loss = torch.where(mask, per_token_loss, 0.0)
    if loss_type == "grpo":
        loss = (per_token_loss.sum(-1) / lengths.clamp(min=1)).sum()
    else:
        loss = per_token_loss.sum()

    # A token is clipped where the bound is active: the gradient of its policy term is exactly zero.
    low, high = mask & (ratio < 1 - epsilon) & (A < 0), mask & (ratio > 1 + epsilon_high) & (A > 0)
    metrics |= {"ratio": (torch.where(mask, ratio.detach(), 0.0).sum(), tokens),
                "clip_ratio/low_mean": (low.sum(), tokens), "clip_ratio/high_mean": (high.sum(), tokens),
                "clip_ratio/region_mean": ((low | high).sum(), tokens)}
    return loss, metrics

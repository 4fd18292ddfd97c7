"""Every loss and advantage of flatpo, as pure functions: tensors in, tensors out.

No model, no distributed code, no configuration; only torch. Shapes: B pairs or rows, N completions, T tokens,
P prompts of G completions, F reward functions.

    logps       log pi(y_t | x, y_<t) of each completion token, fp32, at the sampling temperature     (N, T)
    mask        True on the tokens that count: from the first to the first EOS, EOS included          (N, T)
    logratios   log pi(y|x) - log pi_ref(y|x), SUMMED over the completion's tokens                    (B,)

Losses return **sums with a count beside them**, never means. The caller divides by the count over the whole
optimizer step (all micro-batches and ranks), so neither micro-batch size nor rank count changes the gradient:

    loss = loss_sum / global_count

Three are defined over a micro-batch and keep that: `aot`, `aot_unpaired` (which sort pairs) and `bnpo` (its
own token mean); of papers/ those that say OF_MICRO_BATCH. METHODS.md lists every function, paper and test.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F


def masked_sum(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum of x over mask: (N, T) -> (N,). `where`, not `*`: padding may be nan, and 0 * nan is nan."""
    return torch.where(mask, x, 0.0).sum(-1)


def pick(name: str, kind: str, options: Mapping):
    """options[kind]; for an unknown kind an error that lists them."""
    if kind not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}, got {kind!r}")
    return options[kind]


# ------------------------------------------------------------------------------------------------------------
# Preference losses, (B,), (B,) -> (B,). Pair: chosen w, rejected l; s: log-probs summed over tokens; r: their
# log-ratios to the reference; n: lengths in tokens; m = beta (r_w - r_l); eps: label_smoothing. Each takes
# the options it needs by name and ignores the rest, so that a mix is one loop over PAIR_LOSSES.


def smoothed(logits, label_smoothing):
    """-(1 - eps) log sigma(x) - eps log sigma(-x): the label is wrong with probability eps."""
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def sigmoid_loss(r_w, r_l, *, beta, label_smoothing=0.0, **_):
    """DPO (arXiv 2305.18290, eq. 7): -log sigma(m), log 2 at the start. With label smoothing it is cDPO:
    -(1 - eps) log sigma(m) - eps log sigma(-m); TRL ignores label_smoothing here."""
    return smoothed(beta * (r_w - r_l), label_smoothing)


def hinge_loss(r_w, r_l, *, beta, **_):
    """SLiC (arXiv 2305.10425) on log-ratios, as in RSO (arXiv 2309.06657): max(0, 1 - m)."""
    return F.relu(1 - beta * (r_w - r_l))


def ipo_loss(r_w, r_l, *, beta, n_w, n_l, **_):
    """IPO (arXiv 2310.12036): (r_w / n_w - r_l / n_l - 1 / (2 beta))^2. Log-ratios are averaged over tokens,
    as in TRL, which had it confirmed by the paper's authors; the paper writes sums: `ipo_sum`."""
    return (r_w / n_w - r_l / n_l - 1 / (2 * beta)) ** 2


def exo_pair_loss(r_w, r_l, *, beta, label_smoothing, **_):
    """EXO for K = 2 (arXiv 2402.00856), reverse KL to the smoothed preference (1 - eps, eps), eps > 0:

        q (log q - log(1 - eps)) + (1 - q) (log(1 - q) - log eps),   q = sigma(m)
    """
    m = beta * (r_w - r_l)
    return (m.sigmoid() * (F.logsigmoid(m) - math.log1p(-label_smoothing))
            + (-m).sigmoid() * (F.logsigmoid(-m) - math.log(label_smoothing)))


def nca_pair_loss(r_w, r_l, *, beta, **_):
    """NCA (arXiv 2402.05369): -log sigma(beta r_w) - 1/2 log sigma(-beta r_w) - 1/2 log sigma(-beta r_l)."""
    return -F.logsigmoid(beta * r_w) - 0.5 * F.logsigmoid(-beta * r_w) - 0.5 * F.logsigmoid(-beta * r_l)


def robust_loss(r_w, r_l, *, beta, label_smoothing, **_):
    """Robust DPO (arXiv 2403.00409), unbiased when labels flip with probability eps < 1/2:

        [-(1 - eps) log sigma(m) + eps log sigma(-m)] / (1 - 2 eps)
    """
    m = beta * (r_w - r_l)
    return (-(1 - label_smoothing) * F.logsigmoid(m)
            + label_smoothing * F.logsigmoid(-m)) / (1 - 2 * label_smoothing)


def bco_pair_loss(r_w, r_l, *, beta, bco_shift, **_):
    """BCO on pairs (arXiv 2404.04656; the quality loss of MPO, arXiv 2411.10442):

        -log sigma(beta r_w - delta) - log sigma(-(beta r_l - delta))

    delta, the reward shift (`bco_shift`), is a number from `next_bco_delta`, constant within an optimizer
    step; 0 is what TRL does since 0.29. Equals 2 log 2 at the start.
    """
    return -F.logsigmoid(beta * r_w - bco_shift) - F.logsigmoid(-(beta * r_l - bco_shift))


def next_bco_delta(delta: float, mean_reward: float, step: int, kind: str, ema_decay: float = 0.9) -> float:
    """The next step's shift, from `mean_reward`, this step's mean of beta r over chosen and rejected.

        running  delta_t = (1/t) sum_{k<=t} rbar_k    mean over completed steps (MPO paper, InternVL's code)
        ema      delta_t = d delta_{t-1} + (1-d) rbar_t, delta_1 = rbar_1
        none     0                                    (TRL >= 0.29)

    step: optimizer steps completed before this one. InternVL includes the current micro-batch in its mean;
    here the shift lags by one optimizer step, so that it cannot depend on the cut into micro-batches.
    """
    return pick("bco_delta", kind, {
        "running": delta + (mean_reward - delta) / (step + 1),
        "ema": mean_reward if step == 0 else ema_decay * delta + (1 - ema_decay) * mean_reward,
        "none": 0.0})


def sppo_hard_loss(r_w, r_l, *, beta, **_):
    """SPPO (arXiv 2405.00675) with win probabilities 1 and 0: (r_w - 1/(2 beta))^2 + (r_l + 1/(2 beta))^2,
    as in TRL; the authors' code has half of it. 1 / beta is the paper's eta."""
    return (r_w - 1 / (2 * beta)) ** 2 + (r_l + 1 / (2 * beta)) ** 2


def aot_loss(r_w, r_l, *, beta, s_w, s_l, label_smoothing=0.0, **_):
    """AOT, paired (arXiv 2406.05882): d = sort(s_w - s_l) - sort(s_w^ref - s_l^ref), each sorted over the
    micro-batch's pairs; then as DPO on beta d. s: summed log-probs, s^ref = s - r."""
    d = (s_w - s_l).sort().values - (s_w - r_w - s_l + r_l).sort().values
    return smoothed(beta * d, label_smoothing)


def aot_unpaired_loss(r_w, r_l, *, beta, label_smoothing=0.0, **_):
    """AOT, unpaired (arXiv 2406.05882): DPO on beta (sort(r_w) - sort(r_l)), sorted over the micro-batch."""
    return smoothed(beta * (r_w.sort().values - r_l.sort().values), label_smoothing)


def apo_zero_loss(r_w, r_l, *, beta, **_):
    """APO-zero (arXiv 2408.06266): 1 - sigma(beta r_w) + sigma(beta r_l). For chosen answers that are better
    than the model's own."""
    return (-beta * r_w).sigmoid() + (beta * r_l).sigmoid()


def apo_down_loss(r_w, r_l, *, beta, **_):
    """APO-down (arXiv 2408.06266): sigma(beta r_w) + 1 - sigma(m). For chosen answers that are worse than the
    model's own."""
    return (beta * r_w).sigmoid() + (-beta * (r_w - r_l)).sigmoid()


def discopop_loss(r_w, r_l, *, beta, discopop_tau=0.05, **_):
    """DiscoPOP (arXiv 2406.08414): -(1 - mu) log sigma(m) + mu e^-m, mu = sigma(m / tau)."""
    m = beta * (r_w - r_l)
    mu = (m / discopop_tau).sigmoid()
    return -(1 - mu) * F.logsigmoid(m) + mu * (-m).clamp(max=80).exp()  # clamped: e^89 * 0 would be nan


def sigmoid_norm_loss(r_w, r_l, *, beta, n_w, n_l, **_):
    """Length-normalised DPO (Tulu 3, arXiv 2411.15124): -log sigma(beta (r_w / n_w - r_l / n_l))."""
    return -F.logsigmoid(beta * (r_w / n_w - r_l / n_l))


def simpo_loss(r_w, r_l, *, beta, s_w, s_l, n_w, n_l, simpo_gamma, label_smoothing=0.0, **_):
    """SimPO (arXiv 2405.14734), without a reference: -log sigma(beta (s_w / n_w - s_l / n_l) - gamma)."""
    return smoothed(beta * (s_w / n_w - s_l / n_l) - simpo_gamma, label_smoothing)


class PairLoss(NamedTuple):
    """A loss of pairs, and what the loop must know of it.

    term(r_w, r_l, **options) -> (B,) takes what it needs by name: flags, columns, STATE of a file of papers/,
    and of each side, w chosen and l rejected (`preference_losses` lists them). It ends its parameters in **_.
    """

    term: Callable
    reference: bool = True    # it needs the reference model's log-probs
    columns: Mapping = {}     # numbers of a pair that come with the data: {column: (lowest, highest)}
    smoothed: bool = False    # it takes --label_smoothing
    of_ratios: bool = False   # a function of r_w and r_l that any other score of an answer can stand for
    sorts: bool = False       # it sorts chosen and rejected separately, so no pair can be weighed


PAIR_LOSSES = {
    "sigmoid": PairLoss(sigmoid_loss, smoothed=True, of_ratios=True),
    "hinge": PairLoss(hinge_loss, of_ratios=True),
    "ipo": PairLoss(ipo_loss, of_ratios=True),
    "exo_pair": PairLoss(exo_pair_loss, smoothed=True, of_ratios=True),
    "nca_pair": PairLoss(nca_pair_loss),
    "robust": PairLoss(robust_loss, smoothed=True, of_ratios=True),
    "bco_pair": PairLoss(bco_pair_loss),
    "sppo_hard": PairLoss(sppo_hard_loss),
    "aot": PairLoss(aot_loss, smoothed=True, sorts=True),
    "aot_unpaired": PairLoss(aot_unpaired_loss, smoothed=True, sorts=True),
    "apo_zero": PairLoss(apo_zero_loss),
    "apo_down": PairLoss(apo_down_loss),
    "discopop": PairLoss(discopop_loss, of_ratios=True),
    "sigmoid_norm": PairLoss(sigmoid_norm_loss, of_ratios=True),
    "simpo": PairLoss(simpo_loss, reference=False, smoothed=True)}


def which(table: Mapping, **wanted) -> set[str]:
    """The names of a table's records with these values: which(PAIR_LOSSES, sorts=True)."""
    return {name for name, record in table.items()
            if all(getattr(record, key) == value for key, value in wanted.items())}


def nll_loss(logps, mask, *, normalization):
    """Negative log-likelihood of the chosen responses: (B, T), (B, T) -> (loss sum, count), both scalars.

        sequence  sum_i -log pi(y_i|x_i) / |y_i|, count B          MPO's generation loss (arXiv 2411.10442)
        token     sum_i -log pi(y_i|x_i),         count sum |y_i|  the usual SFT token mean; TRL's `sft` takes
                                                                   it per micro-batch, here it spans the step
    """
    per_sequence, lengths = -masked_sum(logps, mask), mask.sum(-1)
    return pick("nll_normalization", normalization, {
        "sequence": ((per_sequence / lengths.clamp(min=1)).sum(), lengths.new_tensor(len(lengths))),
        "token": (per_sequence.sum(), lengths.sum())})


def pair_of(chosen: dict, rejected: dict) -> dict:
    """What a pair loss may take, by name, from each side's {"logps": (B, T), "mask": (B, T)} and the
    per-token log-probs of further models, "ref_logps", "guide_logps", ... (w: chosen, l: rejected):

        logps_w, mask_w, ref_logps_w, ...   (B, T)  as given; so for l, whose T may differ
        s_w, ref_s_w                        (B,)    log-probs summed over tokens, and the reference's
        n_w                                 (B,)    length in tokens, at least 1
        r_w                                 (B,)    log-ratio s_w - ref_s_w; without a reference s_w / n_w
    """
    pair = {}
    for side, given in (("w", chosen), ("l", rejected)):
        mask = given["mask"]
        pair |= {f"{name}_{side}": x for name, x in given.items()}
        pair |= {f"n_{side}": mask.sum(-1).clamp(min=1), f"s_{side}": masked_sum(given["logps"], mask)}
        if "ref_logps" in given:
            pair[f"ref_s_{side}"] = masked_sum(given["ref_logps"], mask)
    return pair | log_ratios_of(pair)


def log_ratios_of(pair: dict) -> dict:
    """r_w and r_l, (B,), from a pair's sums: see `pair_of`."""
    if "ref_s_w" in pair:
        return {"r_w": pair["s_w"] - pair["ref_s_w"], "r_l": pair["s_l"] - pair["ref_s_l"]}
    return {"r_w": pair["s_w"] / pair["n_w"], "r_l": pair["s_l"] / pair["n_l"]}


def preference_losses(loss_types, pair: dict, *, beta, pair_weights=None, **options):
    """The pair losses of a mix such as MPO's (0.8 sigmoid + 0.2 bco_pair + 1.0 sft, arXiv 2411.10442).

    pair: `pair_of`. pair_weights (B,) multiply the losses, whose count stays B. options: what single losses
    take by name. Returns ({loss_type: (sum, count)}, {metric: (sum, count)}); the metrics are TRL's: rewards
    are beta * logratio (without a reference: SimPO's beta * mean log-prob), an accuracy counts a tie as 1/2
    (TRL counts it 0; at the start all are ties).
    """
    terms, B = {}, len(pair["s_w"])
    for name in loss_types:
        loss = pick("loss_type", name, PAIR_LOSSES)
        if loss.reference and "ref_s_w" not in pair:
            raise ValueError(f"loss_type {name} needs the reference's log-probs")
        if pair_weights is not None and loss.sorts:
            raise ValueError(f"loss_type {name} sorts chosen and rejected separately: it takes no weights")
        values = loss.term(**pair, beta=beta, **options)                                    # (B,)
        terms[name] = (values if pair_weights is None else values * pair_weights).sum(), B
    ratios = log_ratios_of(pair)  # a file of papers/ may have put another score in their place for the losses
    chosen_rewards, rejected_rewards = beta * ratios["r_w"].detach(), beta * ratios["r_l"].detach()
    margins = chosen_rewards - rejected_rewards
    plain = [masked_sum(pair[f"logps_{side}"], pair[f"mask_{side}"]).detach() for side in "wl"]
    return terms, {
        "logps/chosen": (plain[0].sum(), B), "logps/rejected": (plain[1].sum(), B),
        "rewards/chosen": (chosen_rewards.sum(), B), "rewards/rejected": (rejected_rewards.sum(), B),
        "rewards/margins": (margins.sum(), B),
        "rewards/accuracies": ((margins > 0).sum() + 0.5 * (margins == 0).sum(), B)}


# ------------------------------------------------------------------------------------------------------------
# Advantages. scores (F, N): one row a reward function, columns group-major, N = P * G; nan: it abstained.


def weighted_rewards(scores, weights):
    """(F, N), (F,) -> (N,): the weighted sum of the functions that did not abstain; nan where all did."""
    total = (weights[:, None] * scores.nan_to_num(0.0)).sum(0)
    return torch.where(scores.isnan().all(0), math.nan, total)


def centred(rewards, num_generations):
    """r - mean of its group, leaving out nan: (N,) -> ((P, G) fp64, known (P, G)), 0 where r is nan.

    A group whose rewards are all equal gives exactly 0, also when rounding in the mean says otherwise.
    """
    if num_generations < 2:
        raise ValueError("group advantages need num_generations >= 2: "
                         "the mean of a group of one is the sample itself")
    groups = rewards.double().view(-1, num_generations)                # (P, G); fp64: no noise to amplify
    known = ~groups.isnan()
    mean = torch.where(known, groups, 0.0).sum(-1, keepdim=True) / known.sum(-1, keepdim=True).clamp(min=1)
    lowest = torch.where(known, groups, math.inf).amin(-1, keepdim=True)
    highest = torch.where(known, groups, -math.inf).amax(-1, keepdim=True)
    size = torch.maximum(lowest.abs(), highest.abs()).clamp(min=1e-3)  # a spread below 1e-8 of it is rounding
    flat = highest - lowest <= 1e-8 * size
    return torch.where(known & ~flat, groups - mean, 0.0), known


def unbiased_std(x, known, dim=None):
    """Standard deviation (n - 1) of x where known, over dim (kept) or over everything; 0 for one value."""
    count = known.sum() if dim is None else known.sum(dim, keepdim=True)
    mean = torch.where(known, x, 0.0).sum(dim, keepdim=dim is not None) / count.clamp(min=1)
    squares = torch.where(known, (x - mean) ** 2, 0.0).sum(dim, keepdim=dim is not None)
    return (squares / (count - 1).clamp(min=1)).sqrt()


def group_advantages(rewards, num_generations, *, scale_rewards="group", eps=1e-4):
    """GRPO's advantages (arXiv 2402.03300):  A = (r - mean_group) / (std + eps).   (N,) -> (N,)

        group  std over the completion's group, the unbiased one, as in TRL
        batch  std over all rewards given                            (arXiv 2508.08221)
        none   no division                                           (Dr. GRPO, arXiv 2503.20783)

    A reward of nan is left out of mean and std and gets advantage 0; a group without spread gets exactly 0.
    """
    A, known = centred(rewards, num_generations)
    scale = pick("scale_rewards", scale_rewards, {
        "group": unbiased_std(A, known, -1) + eps,
        "batch": unbiased_std(rewards.double().view_as(A), known) + eps,
        "none": 1.0})
    return (A / scale).flatten().to(rewards.dtype)


def rloo_advantages(rewards, num_generations):
    """RLOO (arXiv 2402.14740): r_i - mean of the group's others = n / (n - 1) (r_i - mean).   (N,) -> (N,)

    n counts the group's rewards that are not nan. A KL is taken off the reward: `penalty` of `advantages`.
    """
    A, known = centred(rewards, num_generations)
    n = known.sum(-1, keepdim=True)
    return (A * n / (n - 1).clamp(min=1)).flatten().to(rewards.dtype)


def gdpo_advantages(scores, weights, num_generations, *, eps=1e-4):
    """GDPO (arXiv 2601.05242): normalise each reward within the group, add up, normalise over the batch.

        z = sum_k w_k (r_k - mean_group) / (std_group + eps),   A = z / (std_batch(z) + eps)    (F, N) -> (N,)

    so that two rewards of different scale do not drown each other. The batch mean of z, which the paper
    subtracts, is 0 by construction.
    """
    per_function = torch.stack([group_advantages(row, num_generations, eps=eps) for row in scores])
    z, known = (weights[:, None] * per_function).sum(0), ~scores.isnan().all(0)             # (N,), (N,)
    return torch.where(known, z / (unbiased_std(z, known) + eps), 0.0)


class Advantage(NamedTuple):
    """An advantage estimator: function(rewards (N,), num_generations, **options) -> (N,), where options are
    scores (F, N), weights (F,), reward_max, the sum of the positive weights, flags and STATE."""

    function: Callable
    kl_in_reward: bool = False  # --beta times the KL is taken off the rewards, and not added to the loss
    flat_groups: bool = False   # it learns from groups whose rewards are all alike, too


ADVANTAGES = {
    "grpo": Advantage(lambda r, G, scale_rewards, **_: group_advantages(r, G, scale_rewards=scale_rewards)),
    "rloo": Advantage(lambda r, G, **_: rloo_advantages(r, G), kl_in_reward=True),
    "gdpo": Advantage(lambda r, G, scores, weights, **_: gdpo_advantages(scores, weights, G)),
    "none": Advantage(lambda r, G, reward_max, **_: r - reward_max)}


def advantages(estimator, scores, weights, num_generations, /, *, scale_rewards="group", penalty=0.0,
               **options):
    """The advantages (N,) that a run trains on, from scores (F, N) and weights (F,), by one of ADVANTAGES;
    none, for GROUP_LOSSES, is the reward itself less the highest (nan: unknown).

    penalty (N,): taken off each reward first; RLOO's beta * sum_t (log pi_old - log pi_ref). The highest
    reward is the sum of the positive weights: of functions that give at most 1, as the built-in ones do.
    """
    function = pick("advantage_estimator", estimator, ADVANTAGES).function
    rewards, reward_max = weighted_rewards(scores, weights) - penalty, float(weights.clamp(min=0).sum())
    options |= dict(scores=scores, weights=weights, scale_rewards=scale_rewards, reward_max=reward_max)
    options.pop("num_generations", None)
    return function(rewards, num_generations, **options)


# ------------------------------------------------------------------------------------------------------------
# Policy losses: a ratio c, a term of c and the advantage A for each token, a mean. All (N, T) but A, (N, 1).

RATIO_LEVELS = ("token", "sequence", "sequence_token", "sequence_sum")


def log_ratios(logps, old_logps, mask, level):
    """log c, (N, T), 0 where the mask is False in the token levels.

        token           c_t = pi(y_t) / pi_old(y_t)                              GRPO, arXiv 2402.03300 eq. 3
        sequence        s = (prod_t c_t)^(1/|y|), the same for each token        GSPO, arXiv 2507.18071
        sequence_token  sg[s] c_t / sg[c_t]: the value of s, the gradient of c_t GSPO-token, same paper
        sequence_sum    prod_t c_t, the same for each token                      RLOO, arXiv 2402.14740
    """
    token = torch.where(mask, logps - old_logps, 0.0)
    total = token.sum(-1, keepdim=True)                                                     # (N, 1)
    mean = total / mask.sum(-1, keepdim=True).clamp(min=1)
    return pick("importance_sampling_level", level, {
        "token": token, "sequence": mean.expand_as(token),
        "sequence_token": mean.detach() + token - token.detach(), "sequence_sum": total.expand_as(token)})


def clipped_term(ratio, A, *, epsilon, epsilon_high, delta, **_):
    """PPO's pessimistic bound: -min(min(c, delta) A, clip(c, 1 - epsilon, 1 + epsilon_high) A).

    delta, the two-sided clip of INTELLECT-2 (arXiv 2505.07291), bounds c also for A < 0; None: no bound.
    """
    capped = ratio if delta is None else ratio.clamp(max=delta)
    return -torch.min(capped * A, ratio.clamp(1 - epsilon, 1 + epsilon_high) * A)  # min: for both signs of A


def cispo_term(ratio, A, *, logps, epsilon_high, **_):
    """CISPO (arXiv 2506.13585): -sg[min(c, epsilon_high)] A log pi. No token loses its gradient. The bound is
    absolute, as in TRL and ScaleRL (arXiv 2510.13786), which uses 5; the paper writes 1 + epsilon_high."""
    return -ratio.detach().clamp(max=epsilon_high) * A * logps


def sapo_term(ratio, A, *, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, **_):
    """SAPO (arXiv 2511.20347): -(4 / tau) sigma(tau (c - 1)) A, a soft gate of slope 1 at c = 1."""
    tau = torch.full_like(A, sapo_temperature_neg).masked_fill(A > 0, sapo_temperature_pos)
    return -4 / tau * (tau * (ratio - 1)).sigmoid() * A


def vespo_term(ratio, A, *, logps, token_log_ratios, log_correction, vespo_k_pos=2.0, vespo_lambda_pos=3.0,
               vespo_k_neg=3.0, vespo_lambda_neg=2.0, **_):
    """VESPO (arXiv 2602.10693): -sg[phi(W)] A log pi, phi(W) = e^lambda W^k e^(-lambda W), W = prod_t c_t.

    phi(1) = 1. W is the sequence's ratio to the sampler: times `log_correction` where that is corrected for.
    """
    log_w = (token_log_ratios.clamp(-20, 20) + log_correction).sum(-1, keepdim=True)        # (N, 1)
    log_w = log_w.detach().clamp(math.log(1e-8), 20)
    k = torch.full_like(A, vespo_k_neg).masked_fill(A >= 0, vespo_k_pos)
    lam = torch.full_like(A, vespo_lambda_neg).masked_fill(A >= 0, vespo_lambda_pos)
    return -(lam + k * log_w - lam * log_w.exp()).exp() * A * logps


class PolicyLoss(NamedTuple):
    """term(ratio (N, T), A (N, 1), **options) -> (N, T), and its mean over tokens (`token_mean`)."""

    term: Callable
    mean: str
    clips: str | None = None  # what the clip range bounds, for the metrics: "ratio", its "log", or nothing


POLICY_LOSSES = {
    "grpo": PolicyLoss(clipped_term, "sequence", "ratio"),          # arXiv 2402.03300
    "bnpo": PolicyLoss(clipped_term, "micro_batch", "ratio"),       # TRL's name; see token_mean
    "dr_grpo": PolicyLoss(clipped_term, "constant", "ratio"),       # arXiv 2503.20783
    "dapo": PolicyLoss(clipped_term, "token", "ratio"),             # arXiv 2503.14476
    "luspo": PolicyLoss(clipped_term, "sequence_sum", "ratio"),     # arXiv 2602.05261
    "cispo": PolicyLoss(cispo_term, "token"),
    "sapo": PolicyLoss(sapo_term, "sequence"),
    "vespo": PolicyLoss(vespo_term, "token")}


def token_mean(x, mask, kind):
    """(N, T) -> scalar sum; the mean is this over the optimizer step's `policy_loss_count`.

        sequence      mean over completions of the mean over a completion's tokens, count N
        sequence_sum  mean over completions of the sum over a completion's tokens,  count N
        token         mean over all tokens of the optimizer step,                   count sum |y|
        constant      sum over tokens / (completions * max_completion_length),      count N * max length
        micro_batch   mean over all tokens of the micro-batch, mean over those,     count 1
    """
    x = torch.where(mask, x, 0.0)
    if kind == "sequence":
        return (x.sum(-1) / mask.sum(-1).clamp(min=1)).sum()
    return x.sum() / mask.sum().clamp(min=1) if kind == "micro_batch" else x.sum()


def policy_loss_count(loss_type, mask, max_completion_length, rewards=None, num_generations=None) -> float:
    """The divisor of `policy_loss`'s sum (with rewards (N,): of `group_loss`'s), of one micro-batch: add up
    over the optimizer step. mask (N, T)."""
    if loss_type in GROUP_LOSSES:
        return float(GROUP_LOSSES[loss_type].count(rewards.view(-1, num_generations)).sum())
    N, mean = len(mask), pick("loss_type", loss_type, POLICY_LOSSES).mean
    return float({"sequence": N, "sequence_sum": N, "token": mask.sum(), "micro_batch": 1,
                  "constant": N * max_completion_length}[mean])


def kl_penalty(logps, ref_logps, estimator="k3"):
    """Schulman's estimators of KL(pi || ref) per token, (N, T) -> (N, T), with d = log pi - log ref:

        k1 = d       k2 = d^2 / 2       k3 = e^-d - 1 + d

    k1 and k3 are unbiased in value on samples of pi, k2 is not. As a loss they follow other gradients:

        k1  E[grad log pi] = 0: nothing at all
        k2  E[d grad log pi]: that of KL(pi || ref), exactly
        k3  E[(1 - e^-d) grad log pi] = -E_ref[grad log pi]: that of KL(ref || pi)
        k1, k3 times the ratio (`use_bias_correction_kl`, DeepSeek-V3.2, arXiv 2512.02556): that of
            KL(pi || ref), exactly; k2 times the ratio is that of E[k2]. GSPO's ratio, the |y|-th root, gives
            k1 1/|y| of it, and k3 another one

    per token, given what stands before it: how a token changes the KL of later ones enters only with the
    ratio of the whole sequence (`sequence_sum`). d is clamped so that one outlier cannot overflow exp.
    """
    d = (logps - ref_logps).clamp(-20, 20)
    return pick("kl_estimator", estimator, {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d})


def sampler_correction(old_logps, sampling_logps, mask, mode, clip_max=3.0, clip_min=None):
    """Importance weights pi_old / pi_sampler, (N, T), detached, for samples of another engine or precision.

    mode: token_* weighs each token by its own ratio, sequence_* by the product over the completion (unbiased,
    of higher variance). *_truncate clips the weight to [clip_min, clip_max] (truncated importance sampling);
    *_mask sets weights outside to 0 (masked importance sampling, IcePop).
    """
    level, cut = pick("importance_sampling_correction", mode, {
        "token_truncate": ("token", True), "token_mask": ("token", False),
        "sequence_truncate": ("sequence_sum", True), "sequence_mask": ("sequence_sum", False)})
    weight = log_ratios(old_logps.detach(), sampling_logps, mask, level).exp()              # (N, T)
    if cut:
        return weight.clamp(clip_min, clip_max)
    low, high = -math.inf if clip_min is None else clip_min, math.inf if clip_max is None else clip_max
    return torch.where((weight >= low) & (weight <= high), weight, 0.0)


def policy_loss(logps, old_logps, advantages, mask, *, loss_type, importance_sampling_level="token",
                epsilon=0.2, epsilon_high=0.2, delta=None, keep=None, correction=None, ref_logps=None,
                beta=0.0, kl_estimator="k3", use_bias_correction_kl=True, **options):
    """The policy loss of GRPO and its relatives, as a sum; divide by the step's `policy_loss_count`.

        L_t = keep_t * correction_t * term(c_t, A) + beta * KL_t [* c_t]

    logps, old_logps, ref_logps: (N, T); mask: (N, T); advantages: (N,). On-policy, old_logps is
    logps.detach(): the ratio is 1, and the gradient of every loss_type the plain policy gradient, up to the
    mean over tokens. keep (N, T) or (N, 1): weights of tokens; correction (N, T): `sampler_correction`.
    use_bias_correction_kl multiplies the KL by the unclipped ratio. options: what a term takes by name
    besides, (N, T) entropies, say. Padding may be anything. Returns (loss sum, {metric: (sum, count)}).
    """
    term, mean, clips = pick("loss_type", loss_type, POLICY_LOSSES)
    logps = torch.where(mask, logps, 0.0)
    token_log_ratios = torch.where(mask, logps - old_logps, 0.0)
    # +-20: a bf16 outlier of +-100 would make exp overflow; e^20 is beyond every clip range.
    ratio = log_ratios(logps, old_logps, mask, importance_sampling_level).clamp(-20, 20).exp()
    A = advantages[:, None]                                                                 # (N, 1)
    log_correction = 0.0
    if loss_type == "vespo" and correction is not None:  # its weight takes the product of both ratios
        log_correction = torch.where(mask, correction, 1.0).log().clamp(math.log(1e-8), 20)
        correction = None
    per_token_loss = term(                                                                  # (N, T)
        ratio, A, logps=logps, mask=mask, epsilon=epsilon, epsilon_high=epsilon_high, delta=delta,
        token_log_ratios=token_log_ratios, log_correction=log_correction, **options)
    for weight in (keep, correction):
        per_token_loss = per_token_loss if weight is None else per_token_loss * weight

    tokens, metrics = mask.sum(), {}
    if beta:
        kl = kl_penalty(logps, torch.where(mask, ref_logps, 0.0), kl_estimator)
        per_token_loss = per_token_loss + beta * (kl * ratio if use_bias_correction_kl else kl)
        metrics["kl"] = torch.where(mask, kl.detach(), 0.0).sum(), tokens
    metrics["ratio"] = torch.where(mask, ratio.detach(), 0.0).sum(), tokens
    if clips is not None:  # clipped is where the bound is active: no policy gradient at all
        x = token_log_ratios if clips == "log" else ratio - 1
        low, high = mask & (x < -epsilon) & (A < 0), mask & (x > epsilon_high) & (A > 0)
        capped = mask & (A < 0) & (ratio > (math.inf if delta is None else delta))
        metrics |= {"clip_ratio/low_mean": (low.sum(), tokens), "clip_ratio/high_mean": (high.sum(), tokens),
                    "clip_ratio/region_mean": ((low | high | capped).sum(), tokens)}
    elif loss_type == "cispo":
        metrics["cispo_clip_ratio"] = (mask & (ratio > epsilon_high) & (A > 0)).sum(), tokens
    return token_mean(per_token_loss, mask, mean), metrics


# ------------------------------------------------------------------------------------------------------------
# Group losses compare a prompt's completions. All (P, G): rewards r (0: the highest there is, nan: unknown),
# log-probs s summed over n tokens, u = s - s_ref, rho = s - s_old, kl to the reference summed likewise. Each
# gives (P,); counts: GROUP_LOSSES.


def is_above(r):
    """(P, G) -> (P, G, G), True where r_i > r_j; a difference below 1e-6 is a tie, nan is neither."""
    return r[:, :, None] - r[:, None, :] > 1e-6


def best_against_worst(loss, r, u, s, n, *, beta, **_):
    """Online DPO (arXiv 2402.04792): a pair loss of the group's best and worst completion; none where they
    tie. TRL trains on ties."""
    w = r.nan_to_num(-math.inf).argmax(-1, keepdim=True)                                    # (P, 1)
    l = r.nan_to_num(math.inf).argmin(-1, keepdim=True)
    (u_w, u_l), (n_w, n_l) = ([x.gather(-1, i).squeeze(-1) for i in (w, l)] for x in (u, n))   # (P,) each
    return torch.where(has_spread(r), loss(u_w, u_l, beta=beta, n_w=n_w, n_l=n_l), 0.0)


def has_spread(r):
    return is_above(r).any(-1).any(-1)


class GroupLoss(NamedTuple):
    """loss(r, u, s, n, **options) -> (P,), and the count of each group, count(r) -> (P,)."""

    loss: Callable
    count: Callable
    reference: bool = True  # it needs --beta and the reference's log-probs, u


GROUP_LOSSES = {
    "sigmoid": GroupLoss(partial(best_against_worst, sigmoid_loss), has_spread),
    "ipo": GroupLoss(partial(best_against_worst, ipo_loss), has_spread)}


def group_loss(logps, old_logps, rewards, mask, *, loss_type, num_generations, ref_logps=None, beta=0.0,
               kl_estimator="k3", **options):
    """A loss of GROUP_LOSSES, as a sum over the groups; divide by the step's `policy_loss_count`.

    As `policy_loss`, with whole groups of num_generations consecutive completions and `advantages` "none".
    """
    (loss, count_of, _), r = GROUP_LOSSES[loss_type], rewards.view(-1, num_generations)
    s, n = masked_sum(logps, mask).view_as(r), mask.sum(-1).clamp(min=1).view_as(r)
    u = None if ref_logps is None else masked_sum(logps - ref_logps, mask).view_as(r)
    rho = masked_sum(logps - old_logps, mask).view_as(r)
    metrics = {"frac_groups_skipped": ((count_of(r) == 0).sum(), len(r))}
    if u is not None:
        wins, margins = is_above(r), beta * (u[:, :, None] - u[:, None, :]).detach()          # (P, G, G)
        kl = masked_sum(kl_penalty(logps, ref_logps, kl_estimator), mask)                         # (N,)
        options["kl"] = kl.view_as(r)
        metrics |= {"rewards/margins": (margins[wins].sum(), wins.sum()),
                    "rewards/accuracies": ((margins[wins] > 0).sum() + 0.5 * (margins[wins] == 0).sum(),
                                           wins.sum()),
                    "kl": (kl.detach().sum(), mask.sum())}
    options |= dict(beta=beta, rho=rho, drift=-rho.sum() / mask.sum().clamp(min=1))
    return loss(r, u, s, n, **options).sum(), metrics

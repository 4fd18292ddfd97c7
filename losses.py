"""Every loss and advantage of flatpo, as pure functions: tensors in, tensors out.

No model, no distributed code, no configuration; only torch. Shapes: B pairs or rows, N completions, T tokens,
P prompts of G completions, F reward functions.

    logps       log pi(y_t | x, y_<t) of each completion token, fp32, at the sampling temperature     (N, T)
    mask        True on the tokens that count: from the first to the first EOS, EOS included          (N, T)
    logratios   log pi(y|x) - log pi_ref(y|x), SUMMED over the completion's tokens                    (B,)

Losses return **sums with a count beside them**, never means. The caller divides by the count over the whole
optimizer step (all micro-batches and ranks), so neither micro-batch size nor rank count changes the gradient:

    loss = loss_sum / global_count

Five are defined over a micro-batch and keep that: `aot` and `aot_unpaired` (they sort its pairs), `bnpo` (its
own token mean), `top_entropy_mask` (its quantile) and `disco` (its drift, off policy). METHODS.md lists every
function, paper and test.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F


def masked_sum(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum of x over mask: (N, T) -> (N,). `where`, not `*`: padding may be nan, and 0 * nan is nan."""
    return torch.where(mask, x, 0.0).sum(-1)


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


def ipo_sum_loss(r_w, r_l, *, beta, **_):
    """IPO as the paper writes it (arXiv 2310.12036): (r_w - r_l - 1 / (2 beta))^2."""
    return (r_w - r_l - 1 / (2 * beta)) ** 2


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


def bco_pair_loss(r_w, r_l, *, beta, delta, **_):
    """BCO on pairs (arXiv 2404.04656; the quality loss of MPO, arXiv 2411.10442):

        -log sigma(beta r_w - delta) - log sigma(-(beta r_l - delta))

    delta, the reward shift, is a number from `next_bco_delta`, constant within an optimizer step; 0 is what
    TRL does since 0.29. Equals 2 log 2 at the start.
    """
    return -F.logsigmoid(beta * r_w - delta) - F.logsigmoid(-(beta * r_l - delta))


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


def sppo_hard_loss(r_w, r_l, *, beta, **_):
    """SPPO (arXiv 2405.00675) with win probabilities 1 and 0: (r_w - 1/(2 beta))^2 + (r_l + 1/(2 beta))^2,
    as in TRL; the authors' code has half of it. 1 / beta is the paper's eta."""
    return (r_w - 1 / (2 * beta)) ** 2 + (r_l + 1 / (2 * beta)) ** 2


def sppo_soft_loss(r_w, r_l, *, beta, chosen_probs_win, chosen_probs_lose, **_):
    """SPPO (arXiv 2405.00675): (r_w - (P_w - 1/2) / beta)^2 + (r_l - (P_l - 1/2) / beta)^2, P the probability
    that an answer beats the policy's own. P = 1, 0 is `sppo_hard`; the authors' code has half of both."""
    return (r_w - (chosen_probs_win - 0.5) / beta) ** 2 + (r_l - (chosen_probs_lose - 0.5) / beta) ** 2


def ipo_soft_loss(r_w, r_l, *, beta, chosen_probs_win, chosen_probs_lose, **_):
    """EGPO's regression (arXiv 2503.08942), offline: (r_w - r_l - (P_w - P_l) / beta)^2, P the probability to
    beat one and the same third answer. Its on-policy answers and extragradient steps are not here."""
    return (r_w - r_l - (chosen_probs_win - chosen_probs_lose) / beta) ** 2


def dno_loss(r_w, r_l, *, beta, chosen_probs, **_):
    """DNO (arXiv 2404.03715), cDPO with a label for each pair: -P log sigma(m) - (1 - P) log sigma(-m), P the
    probability that chosen is the better answer; DNO's is sigma of the difference of expected wins."""
    return smoothed(beta * (r_w - r_l), 1 - chosen_probs)


def modpo_loss(r_w, r_l, *, beta, margin, **_):
    """MODPO (arXiv 2310.03708): -log sigma(m - margin). w_0 stands in both: beta is the paper's beta / w_0,
    margin the sum of w_k / w_0 (reward_k of chosen - of rejected) over the other objectives k."""
    return -F.logsigmoid(beta * (r_w - r_l) - margin)


def modpo_hinge_loss(r_w, r_l, *, beta, margin, **_):
    """MODPO's hinge variant: max(0, 1 - (m - margin))."""
    return F.relu(1 - (beta * (r_w - r_l) - margin))


def madpo_weights(margin, tau=math.log(999), c_min=0.5, c_max=2.0, slope=1.0):
    """MADPO's weight of a pair by its margin h of a reward model, (B,) -> (B,): 1 where h <= -tau, else
    sigma(c h) / sigma(h), where c falls from c_max on hard pairs to c_min on easy ones, 1 at |h| = tau:

        c = c_min + (c_max - c_min) / (1 + (c_max - 1) / (1 - c_min) e^(slope (|h| - tau)))

    The form and constants of the authors' code; tau is the logit of 0.999.
    """
    steepness = (slope * (margin.abs() - tau)).clamp(max=80).exp()
    c = c_min + (c_max - c_min) / (1 + (c_max - 1) / (1 - c_min) * steepness)
    return torch.where(margin > -tau, (F.logsigmoid(c * margin) - F.logsigmoid(margin)).exp(), 1.0)


def madpo_loss(r_w, r_l, *, beta, margin, **_):
    """MADPO (arXiv 2510.05342): DPO, each pair times `madpo_weights` of its reward-model margin."""
    return madpo_weights(margin) * -F.logsigmoid(beta * (r_w - r_l))


def lcpo_posterior(m, eta):
    """LCPO's E-step (arXiv 2509.24159): the probability that a pair's label is right, detached. (B,) -> (B,)

        q = eta p / (eta p + (1 - eta) (1 - p)) = sigma(m + logit(eta)),   p = sigma(m)
    """
    eta = min(max(eta, 1e-6), 1 - 1e-6)
    return (m.detach() + math.log(eta / (1 - eta))).sigmoid()


def lcpo_loss(r_w, r_l, *, beta, eta, **_):
    """LCPO on DPO (arXiv 2509.24159), M-step: -q log sigma(m) - (1 - q) log sigma(-m), q `lcpo_posterior`."""
    m = beta * (r_w - r_l)
    return smoothed(m, 1 - lcpo_posterior(m, eta))


def next_lcpo_eta(eta: float, mean_q: float, momentum: float = 0.1) -> float:
    """LCPO's share of right labels, (1 - momentum) eta + momentum mean(q), of a whole optimizer step's q. The
    momentum and the start at 0.9 are ours: the paper's are not established."""
    return (1 - momentum) * eta + momentum * mean_q


def guided_sum(logps, ref_logps, guide_logps, mask, *, beta, sign, alpha=0.5):
    """TGDPO's weighted log-ratio (arXiv 2506.14574): sum_t (1 + sign alpha rhat_t) (log pi - log pi_ref),
    rhat_t = beta (log pi_guide - log pi_ref). Four (B, T) -> (B,); alpha 0.5 is the authors'."""
    weights = 1 + sign * alpha * beta * torch.where(mask, guide_logps - ref_logps, 0.0)
    return (weights * torch.where(mask, logps - ref_logps, 0.0)).sum(-1)


def tgdpo_loss(r_w, r_l, *, beta, guided_w, guided_l, **_):
    """TGDPO (arXiv 2506.14574): DPO on `guided_sum`s, of sign 1 for chosen and -1 for rejected. The guide is
    already trained by DPO: tokens that it likes count more in chosen, less in rejected answers."""
    return -F.logsigmoid(beta * (guided_w - guided_l))


def asft_loss(r_w, r_l, *, s_w, s_l, n_w, n_l, **_):
    """ASFT's alignment term (arXiv 2409.10571), without a reference: -log p_w - log(1 - p_l), which equals
    -log sigma(logit p_w) - log sigma(-logit p_l); p: geometric mean of an answer's token probabilities."""
    return -s_w / n_w - torch.log(-torch.expm1((s_l / n_l).clamp(max=-1e-6)))  # p_l = 1: finite


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


def discopop_loss(r_w, r_l, *, beta, discopop_tau, **_):
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


PAIR_LOSSES = {
    "sigmoid": sigmoid_loss, "hinge": hinge_loss, "ipo": ipo_loss, "ipo_sum": ipo_sum_loss,
    "exo_pair": exo_pair_loss, "nca_pair": nca_pair_loss, "robust": robust_loss, "bco_pair": bco_pair_loss,
    "sppo_hard": sppo_hard_loss, "aot": aot_loss, "aot_unpaired": aot_unpaired_loss,
    "apo_zero": apo_zero_loss, "apo_down": apo_down_loss, "discopop": discopop_loss,
    "sigmoid_norm": sigmoid_norm_loss, "simpo": simpo_loss, "sppo_soft": sppo_soft_loss,
    "ipo_soft": ipo_soft_loss, "dno": dno_loss, "modpo": modpo_loss, "modpo_hinge": modpo_hinge_loss,
    "madpo": madpo_loss, "lcpo": lcpo_loss, "tgdpo": tgdpo_loss, "asft": asft_loss}
PREFERENCE_LOSSES = [*PAIR_LOSSES, "sft"]
REFERENCE_FREE = {"simpo", "asft", "sft"}
# Numbers of a pair that come with the data: {column: (lowest, highest)}, and the losses that take them.
COLUMNS = {"margin": (-1e6, 1e6), "chosen_probs": (0, 1), "chosen_probs_win": (0, 1),
           "chosen_probs_lose": (0, 1)}
COLUMNS_OF = {
    "sppo_soft": ("chosen_probs_win", "chosen_probs_lose"), "dno": ("chosen_probs",),
    "ipo_soft": ("chosen_probs_win", "chosen_probs_lose"),
    "modpo": ("margin",), "modpo_hinge": ("margin",), "madpo": ("margin",)}
# Those that are functions of g(r_w) and g(r_l) with g(r) = r, and so have an f-divergence form.
F_DIVERGENCE_LOSSES = {"sigmoid", "hinge", "ipo", "ipo_sum", "exo_pair", "robust", "discopop", "sigmoid_norm"}
SORTING_LOSSES = {"aot", "aot_unpaired"}
SMOOTHED_LOSSES = {"sigmoid", "exo_pair", "robust", "aot", "aot_unpaired", "simpo"}


def f_divergence_score(r, f_divergence_type, alpha=0.5):
    """f-DPO (arXiv 2309.16240): what stands for the log-ratio r when the pull to the reference is another
    divergence, f'(e^r) up to a constant. (B,) -> (B,)

        reverse_kl r      forward_kl 1 - e^-r      js_divergence log 2 + log sigma(r)
        alpha_divergence (e^((alpha - 1) r) - 1) / (alpha - 1)     TRL's alpha, 1 - alpha of the authors' code
    """
    if f_divergence_type == "reverse_kl":
        return r
    if f_divergence_type == "forward_kl":
        return 1 - (-r).clamp(max=80).exp()  # clamped: finite in fp32
    if f_divergence_type == "js_divergence":
        return math.log(2) + F.logsigmoid(r)
    if f_divergence_type == "alpha_divergence":
        if abs(alpha - 1) < 1e-6:  # the limit
            return r
        return ((alpha - 1) * r).clamp(max=80).expm1() / (alpha - 1)
    raise ValueError("f_divergence_type must be reverse_kl, forward_kl, js_divergence or alpha_divergence, "
                     f"got {f_divergence_type!r}")


def ld_sum(logps, mask, other_mask, ld_alpha):
    """LD-DPO (arXiv 2409.06411): the sum of log-probs, those beyond the length of the pair's shorter answer
    times ld_alpha; for policy and reference alike. (B, T), (B, T), (B, T') -> (B,)"""
    shared = torch.minimum(mask.sum(-1), other_mask.sum(-1))[:, None]                       # (B, 1)
    tail = mask & (mask.cumsum(-1) > shared)                                                # (B, T)
    return masked_sum(logps, mask & ~tail) + ld_alpha * masked_sum(logps, tail)


def wpo_weights(logps, log_sum_sq_probs, mask):
    """WPO (arXiv 2406.11827): how on-policy an answer is: exp(mean_t(log p_t - log sum_v p_v^2)), detached.

    Three (N, T) -> (N,). A pair's loss is multiplied by both answers' weights. Not capped at 1, as in TRL.
    """
    return (masked_sum(logps - log_sum_sq_probs, mask) / mask.sum(-1).clamp(min=1)).exp().detach()


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
                      ref_chosen_logps=None, ref_rejected_logps=None, guide_chosen_logps=None,
                      guide_rejected_logps=None, *, beta, nll_normalization="sequence",
                      f_divergence_type="reverse_kl", f_alpha_divergence_coef=0.5, ld_alpha=1.0,
                      pair_weights=None, columns=None, delta=0.0, eta=0.9, label_smoothing=0.0,
                      simpo_gamma=0.5, discopop_tau=0.05):
    """The terms of a mix such as MPO's (0.8 sigmoid + 0.2 bco_pair + 1.0 sft, arXiv 2411.10442).

    *_logps: (B, Tc) chosen, (B, Tr) rejected, per token; ref_*: the same of the reference, None if every loss
    is REFERENCE_FREE; guide_*: those of `tgdpo`'s guide; rejected may be None when loss_types is only `sft`.
    pair_weights (B,) multiply the pair losses, whose count stays B; columns: {name: (B,)} of COLUMNS_OF. The
    last five are the options of single losses. Returns ({loss_type: (sum, count)}, {metric: (sum, count)});
    the metrics are TRL's: rewards are beta * logratio (without a reference: SimPO's beta * mean log-prob), an
    accuracy counts a tie as 1/2 (TRL counts it 0; at the start all are ties).
    """
    for name in loss_types:
        if name not in PREFERENCE_LOSSES:
            raise ValueError(f"unknown loss_type {name!r}; choose from {', '.join(PREFERENCE_LOSSES)}")
    terms = {}
    if "sft" in loss_types:
        terms["sft"] = nll_loss(chosen_logps, chosen_mask, normalization=nll_normalization)
    B, n_w = len(chosen_mask), chosen_mask.sum(-1)
    metrics = {"logps/chosen": (masked_sum(chosen_logps, chosen_mask).detach().sum(), B),
               "nll": (-masked_sum(chosen_logps, chosen_mask).detach().sum(), n_w.sum())}  # per token
    if rejected_logps is None:
        return terms, metrics

    s_w = ld_sum(chosen_logps, chosen_mask, rejected_mask, ld_alpha)                           # (B,)
    s_l = ld_sum(rejected_logps, rejected_mask, chosen_mask, ld_alpha)
    n_w, n_l = n_w.clamp(min=1), rejected_mask.sum(-1).clamp(min=1)                         # (B,)
    if ref_chosen_logps is None:
        r_w, r_l = s_w / n_w, s_l / n_l
    else:
        r_w = s_w - ld_sum(ref_chosen_logps, chosen_mask, rejected_mask, ld_alpha)
        r_l = s_l - ld_sum(ref_rejected_logps, rejected_mask, chosen_mask, ld_alpha)
    options = dict(beta=beta, delta=delta, eta=eta, label_smoothing=label_smoothing, simpo_gamma=simpo_gamma,
                   discopop_tau=discopop_tau, s_w=s_w, s_l=s_l, n_w=n_w, n_l=n_l) | (columns or {})
    if guide_chosen_logps is not None:
        chosen = chosen_logps, ref_chosen_logps, guide_chosen_logps, chosen_mask
        rejected = rejected_logps, ref_rejected_logps, guide_rejected_logps, rejected_mask
        options["guided_w"] = guided_sum(*chosen, beta=beta, sign=1)
        options["guided_l"] = guided_sum(*rejected, beta=beta, sign=-1)
    for name in loss_types:
        if name not in PAIR_LOSSES:
            continue
        if ref_chosen_logps is None and name not in REFERENCE_FREE:
            raise ValueError(f"loss_type {name} needs the reference's log-probs")
        if pair_weights is not None and name in SORTING_LOSSES:
            raise ValueError(f"loss_type {name} sorts the two sides apart: it has no pairs to weigh")
        w, l = r_w, r_l
        if name in F_DIVERGENCE_LOSSES:
            w, l = (f_divergence_score(r, f_divergence_type, f_alpha_divergence_coef) for r in (r_w, r_l))
        values = PAIR_LOSSES[name](w, l, **options)                                         # (B,)
        terms[name] = (values if pair_weights is None else values * pair_weights).sum(), B
    chosen_rewards, rejected_rewards = beta * r_w.detach(), beta * r_l.detach()
    margins = chosen_rewards - rejected_rewards
    if "lcpo" in terms:
        metrics["lcpo_posterior"] = lcpo_posterior(margins, eta).sum(), B
    metrics |= {"logps/rejected": (masked_sum(rejected_logps, rejected_mask).detach().sum(), B),
                "rewards/chosen": (chosen_rewards.sum(), B), "rewards/rejected": (rejected_rewards.sum(), B),
                "rewards/margins": (margins.sum(), B),
                "rewards/accuracies": ((margins > 0).sum() + 0.5 * (margins == 0).sum(), B)}
    return terms, metrics


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
    if scale_rewards not in ("group", "batch", "none"):
        raise ValueError(f"scale_rewards must be group, batch or none, got {scale_rewards!r}")
    A, known = centred(rewards, num_generations)
    if scale_rewards == "group":
        A = A / (unbiased_std(A, known, -1) + eps)
    elif scale_rewards == "batch":
        A = A / (unbiased_std(rewards.double().view_as(A), known) + eps)
    return A.flatten().to(rewards.dtype)


def rloo_advantages(rewards, num_generations):
    """RLOO (arXiv 2402.14740): r_i - mean of the group's others = n / (n - 1) (r_i - mean).   (N,) -> (N,)

    n counts the group's rewards that are not nan. A KL penalty belongs into the reward (`kl_in_reward`).
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


def ngrpo_advantages(rewards, num_generations, reward_max, *, eps=1e-4):
    """NGRPO (arXiv 2509.18851): mean and std over the group and one virtual completion of the highest reward:
    a group that is all wrong is pushed down, one that is all right gets 0.   (N,) -> (N,)"""
    groups = rewards.double().view(-1, num_generations)
    known = ~groups.isnan()
    best = torch.where(known.any(-1, keepdim=True), reward_max, math.nan).to(groups)          # (P, 1)
    A = group_advantages(torch.cat([groups, best], -1).flatten(), num_generations + 1, eps=eps)
    return A.view(-1, num_generations + 1)[:, :-1].flatten().to(rewards.dtype)


def dgpo_advantages(rewards, num_generations, reward_max, *, temperature=2.0, eps=1e-4):
    """DGPO (arXiv 2601.20614): the mean absolute deviation for the std, and harder prompts weigh more.

        A = n (r - mean) / (sum |r - mean| + eps) * Q softmax_q(-p_q / temperature)     (N,) -> (N,)

    over the Q groups with spread; p: mean reward of the group, as a share of the highest.
    """
    A, known = centred(rewards, num_generations)
    n = known.sum(-1, keepdim=True).clamp(min=1)                                              # (P, 1)
    spread = A.ne(0).any(-1, keepdim=True)
    p = torch.where(known, rewards.double().view_as(A), 0.0).sum(-1, keepdim=True) / n / reward_max
    weight = (-p / temperature).masked_fill(~spread, -math.inf).softmax(0).nan_to_num(0.0) * spread.sum()
    return (A * n / (A.abs().sum(-1, keepdim=True) + eps) * weight).flatten().to(rewards.dtype)


def advantages(estimator, scores, weights, num_generations, *, scale_rewards="group", penalty=0.0):
    """The advantages (N,) that a run trains on, from scores (F, N) and weights (F,): grpo, rloo, gdpo, ngrpo,
    dgpo; or none, for GROUP_LOSSES: the reward itself less the highest (nan: unknown).

    penalty (N,): taken off each reward first; RLOO's beta * sum_t (log pi_old - log pi_ref). The highest
    reward is the sum of the positive weights: of functions that give at most 1, as the built-in ones do.
    """
    if estimator == "gdpo":
        return gdpo_advantages(scores, weights, num_generations)
    rewards, reward_max = weighted_rewards(scores, weights) - penalty, float(weights.clamp(min=0).sum())
    if estimator == "grpo":
        return group_advantages(rewards, num_generations, scale_rewards=scale_rewards)
    if estimator == "rloo":
        return rloo_advantages(rewards, num_generations)
    if estimator == "ngrpo":
        return ngrpo_advantages(rewards, num_generations, reward_max)
    if estimator == "dgpo":
        return dgpo_advantages(rewards, num_generations, reward_max)
    if estimator == "none":
        return rewards - reward_max
    raise ValueError(f"advantage estimator must be grpo, rloo, gdpo, ngrpo, dgpo or none, got {estimator!r}")


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
    if level == "token":
        return token
    total = token.sum(-1, keepdim=True)                                                     # (N, 1)
    if level == "sequence_sum":
        return total.expand_as(token)
    mean = total / mask.sum(-1, keepdim=True).clamp(min=1)
    if level == "sequence":
        return mean.expand_as(token)
    if level == "sequence_token":
        return mean.detach() + token - token.detach()
    raise ValueError(f"importance_sampling_level must be one of {', '.join(RATIO_LEVELS)}, got {level!r}")


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


def sapo_term(ratio, A, *, sapo_temperature_pos, sapo_temperature_neg, **_):
    """SAPO (arXiv 2511.20347): -(4 / tau) sigma(tau (c - 1)) A, a soft gate of slope 1 at c = 1."""
    tau = torch.full_like(A, sapo_temperature_neg).masked_fill(A > 0, sapo_temperature_pos)
    return -4 / tau * (tau * (ratio - 1)).sigmoid() * A


def vespo_term(ratio, A, *, logps, token_log_ratios, log_correction, vespo_k_pos, vespo_lambda_pos,
               vespo_k_neg, vespo_lambda_neg, **_):
    """VESPO (arXiv 2602.10693): -sg[phi(W)] A log pi, phi(W) = e^lambda W^k e^(-lambda W), W = prod_t c_t.

    phi(1) = 1. W is the sequence's ratio to the sampler: times `log_correction` where that is corrected for.
    """
    log_w = (token_log_ratios.clamp(-20, 20) + log_correction).sum(-1, keepdim=True)        # (N, 1)
    log_w = log_w.detach().clamp(math.log(1e-8), 20)
    k = torch.full_like(A, vespo_k_neg).masked_fill(A >= 0, vespo_k_pos)
    lam = torch.full_like(A, vespo_lambda_neg).masked_fill(A >= 0, vespo_lambda_pos)
    return -(lam + k * log_w - lam * log_w.exp()).exp() * A * logps


def gmpo_term(ratio, A, *, token_log_ratios, mask, epsilon, epsilon_high, **_):
    """GMPO (arXiv 2507.20673): -A (prod_t clip(c_t))^(1/|y|), each token's log c clipped on PPO's side only,
    to [-epsilon, epsilon_high]; the same for each token."""
    clipped = token_log_ratios.clamp(-epsilon, epsilon_high)
    side = torch.where(A > 0, torch.min(token_log_ratios, clipped), torch.max(token_log_ratios, clipped))
    mean = masked_sum(side, mask) / mask.sum(-1).clamp(min=1)                               # (N,)
    return -mean.clamp(-20, 20).exp()[:, None].expand_as(ratio) * A


def gtpo_term(ratio, A, *, entropies, initial_entropy, mask, gtpo_gamma=0.1, **_):
    """GTPO (arXiv 2508.03772): -c (A - gamma H), no clip, H the completion's mean token entropy; 0 where H is
    above log 2 and the starting policy's is not. Conflict tokens are weighed by `gtpo_weights`, as `keep`."""
    H = (masked_sum(entropies.detach(), mask) / mask.sum(-1).clamp(min=1))[:, None]         # (N, 1)
    kept = (H <= math.log(2)) | (initial_entropy > math.log(2))
    return -ratio * torch.where(kept, A - gtpo_gamma * H, 0.0)


POLICY_LOSSES = {  # name: (term, mean over tokens)
    "grpo": (clipped_term, "sequence"),          # arXiv 2402.03300
    "bnpo": (clipped_term, "micro_batch"),       # TRL's name; see token_mean
    "dr_grpo": (clipped_term, "constant"),       # arXiv 2503.20783
    "dapo": (clipped_term, "token"),             # arXiv 2503.14476
    "luspo": (clipped_term, "sequence_sum"),     # arXiv 2602.05261
    "cispo": (cispo_term, "token"),
    "sapo": (sapo_term, "sequence"),
    "vespo": (vespo_term, "token"),
    "gmpo": (gmpo_term, "sequence"),             # arXiv 2507.20673
    "gtpo": (gtpo_term, "sequence")}             # arXiv 2508.03772


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
        return float(GROUP_LOSSES[loss_type][1](rewards.view(-1, num_generations)).sum())
    if loss_type not in POLICY_LOSSES:
        raise ValueError(f"unknown loss_type {loss_type!r}; "
                         f"choose from {', '.join([*POLICY_LOSSES, *GROUP_LOSSES])}")
    N, mean = len(mask), POLICY_LOSSES[loss_type][1]
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
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d**2 / 2
    if estimator == "k3":
        return torch.exp(-d) - 1 + d
    raise ValueError(f"kl_estimator must be k1, k2 or k3, got {estimator!r}")


def off_policy_mask(logps, sampling_logps, advantages, mask, threshold):
    """DeepSeek-V3.2's sequence mask (arXiv 2512.02556): (N, 1), False where A < 0 and the mean of
    log pi_sampler - log pi over the completion's tokens is above the threshold: bad and no longer ours."""
    drift = masked_sum(sampling_logps - logps.detach(), mask) / mask.sum(-1).clamp(min=1)   # (N,)
    return ((advantages >= 0) | (drift <= threshold))[:, None]


def top_entropy_mask(entropies, mask, quantile):
    """Train on the `quantile` of tokens with the highest entropy only (80/20 rule, arXiv 2506.01939): (N, T).
    The bound is that of the micro-batch. Tokens left out still count in the mean."""
    entropies = entropies.detach()
    return mask & (entropies >= entropies[mask].quantile(1 - quantile)) if mask.any() else mask


def gtpo_weights(completion_ids, advantages, mask, num_generations):
    """GTPO's lambda (arXiv 2508.03772), (N, T), of N completions in whole groups; advantages (N,).

    A token conflicts if a completion of the group with the other sign of A has the same token at its place,
    counted from the start or the end, and all tokens before (behind) it do: 2 for A > 0, 0 for A < 0; else 1.
    """
    T, sign = mask.shape[1], advantages.sign().view(-1, num_generations)                    # (P, G)
    opposed = (sign[:, :, None] * sign[:, None] < 0)[..., None]                             # (P, G, G, 1)
    turn = (mask.sum(-1, keepdim=True) - 1 - torch.arange(T, device=mask.device)).clamp(min=0)

    def conflicts(ids):  # without a break from the start
        ids = ids.masked_fill(~mask, -1).view(-1, num_generations, T)
        return (opposed & (ids[:, :, None] == ids[:, None])).any(2).view(-1, T).int().cumprod(-1).bool()

    found = conflicts(completion_ids) | conflicts(completion_ids.gather(-1, turn)).gather(-1, turn)
    return torch.where(found & mask, 1 + sign.view(-1, 1), 1.0)


def sampler_correction(old_logps, sampling_logps, mask, mode, clip_max=3.0, clip_min=None):
    """Importance weights pi_old / pi_sampler, (N, T), detached, for samples of another engine or precision.

    mode: token_* weighs each token by its own ratio, sequence_* by the product over the completion (unbiased,
    of higher variance). *_truncate clips the weight to [clip_min, clip_max] (truncated importance sampling);
    *_mask sets weights outside to 0 (masked importance sampling, IcePop).
    """
    level, _, bound = mode.partition("_")
    if level not in ("token", "sequence") or bound not in ("truncate", "mask"):
        raise ValueError("importance_sampling_correction must be token_truncate, token_mask, "
                         f"sequence_truncate or sequence_mask, got {mode!r}")
    level = "token" if level == "token" else "sequence_sum"
    weight = log_ratios(old_logps.detach(), sampling_logps, mask, level).exp()              # (N, T)
    if bound == "truncate":
        return weight.clamp(clip_min, clip_max)
    low, high = -math.inf if clip_min is None else clip_min, math.inf if clip_max is None else clip_max
    return torch.where((weight >= low) & (weight <= high), weight, 0.0)


def policy_loss(logps, old_logps, advantages, mask, *, loss_type, importance_sampling_level="token",
                epsilon=0.2, epsilon_high=0.2, delta=None, keep=None, correction=None, ref_logps=None,
                entropies=None, initial_entropy=0.0, beta=0.0, kl_estimator="k3", use_bias_correction_kl=True,
                sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, vespo_k_pos=2.0, vespo_lambda_pos=3.0,
                vespo_k_neg=3.0, vespo_lambda_neg=2.0):
    """The policy loss of GRPO and its relatives, as a sum; divide by the step's `policy_loss_count`.

        L_t = keep_t * correction_t * term(c_t, A) + beta * KL_t [* c_t]

    logps, old_logps, ref_logps: (N, T); mask: (N, T); advantages: (N,). On-policy, old_logps is
    logps.detach(): the ratio is 1, and the gradient of every loss_type the plain policy gradient, up to the
    mean over tokens. keep (N, T) or (N, 1): `off_policy_mask`, `top_entropy_mask`, `gtpo_weights`;
    correction (N, T): `sampler_correction`; entropies (N, T), initial_entropy: gtpo's. use_bias_correction_kl
    multiplies the KL by the unclipped ratio. The last six are the papers' constants. Padding may be anything.
    Returns (loss sum, {metric: (sum, count)}).
    """
    if loss_type not in POLICY_LOSSES:
        raise ValueError(f"unknown loss_type {loss_type!r}; choose from {', '.join(POLICY_LOSSES)}")
    term, mean = POLICY_LOSSES[loss_type]
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
        entropies=entropies, initial_entropy=initial_entropy, sapo_temperature_pos=sapo_temperature_pos,
        sapo_temperature_neg=sapo_temperature_neg, token_log_ratios=token_log_ratios,
        log_correction=log_correction, vespo_k_pos=vespo_k_pos, vespo_lambda_pos=vespo_lambda_pos,
        vespo_k_neg=vespo_k_neg, vespo_lambda_neg=vespo_lambda_neg)
    for weight in (keep, correction):
        per_token_loss = per_token_loss if weight is None else per_token_loss * weight

    tokens, metrics = mask.sum(), {}
    if beta:
        kl = kl_penalty(logps, torch.where(mask, ref_logps, 0.0), kl_estimator)
        per_token_loss = per_token_loss + beta * (kl * ratio if use_bias_correction_kl else kl)
        metrics["kl"] = torch.where(mask, kl.detach(), 0.0).sum(), tokens
    metrics["ratio"] = torch.where(mask, ratio.detach(), 0.0).sum(), tokens
    if term in (clipped_term, gmpo_term):  # clipped is where the bound is active: no policy gradient at all
        x = token_log_ratios if term is gmpo_term else ratio - 1
        low, high = mask & (x < -epsilon) & (A < 0), mask & (x > epsilon_high) & (A > 0)
        capped = mask & (A < 0) & (ratio > (math.inf if delta is None else delta))
        metrics |= {"clip_ratio/low_mean": (low.sum(), tokens), "clip_ratio/high_mean": (high.sum(), tokens),
                    "clip_ratio/region_mean": ((low | high | capped).sum(), tokens)}
    elif term is cispo_term:
        metrics["cispo_clip_ratio"] = (mask & (ratio > epsilon_high) & (A > 0)).sum(), tokens
    return token_mean(per_token_loss, mask, mean), metrics


# ------------------------------------------------------------------------------------------------------------
# Group losses compare a prompt's completions. All (P, G): rewards r (0: the highest there is, nan: unknown),
# log-probs s summed over n tokens, u = s - s_ref, rho = s - s_old. Each gives (P,); counts: GROUP_LOSSES.


def better(r):
    """(P, G) -> (P, G, G), True where r_i > r_j; a difference below 1e-6 is a tie, nan is neither."""
    return r[:, :, None] - r[:, None, :] > 1e-6


def best_against_worst(loss, r, u, s, n, *, beta, **_):
    """Online DPO (arXiv 2402.04792): a pair loss of the group's best and worst completion; none where they
    tie. TRL trains on ties."""
    w = r.nan_to_num(-math.inf).argmax(-1, keepdim=True)                                    # (P, 1)
    l = r.nan_to_num(math.inf).argmin(-1, keepdim=True)
    (u_w, u_l), (n_w, n_l) = ([x.gather(-1, i).squeeze(-1) for i in (w, l)] for x in (u, n))   # (P,) each
    return torch.where(has_spread(r), loss(u_w, u_l, beta=beta, n_w=n_w, n_l=n_l), 0.0)


def copg_loss(r, u, s, n, *, beta, **_):
    """CoPG (arXiv 2406.19185): (R_i - R_j)^2 over all pairs, R = r - beta u: the group's variance of R; over
    2 beta, so that its gradient on policy is that of RLOO with the KL in the reward."""
    known, k = ~r.isnan(), (~r.isnan()).sum(-1, keepdim=True)                           # (P, G), (P, 1)
    R = torch.where(known, r - beta * u, 0.0)                                               # (P, G)
    squares = torch.where(known, (R - R.sum(-1, keepdim=True) / k.clamp(min=1)) ** 2, 0.0)
    return squares.sum(-1) / (k - 1).clamp(min=1).squeeze(-1) / (2 * beta)


def trpa_loss(r, u, s, n, *, beta, **_):
    """TRPA (arXiv 2504.04524): -log sigma(c beta (u_i / n_i - u_j / n_j)), summed over pairs of r_i > r_j; c
    is 2.5 where i has the highest reward there is (the paper's level 1), else 1."""
    mean, c = u / n, torch.where(r > -1e-6, 2.5, 1.0)[:, :, None]
    pairs = -F.logsigmoid(c * beta * (mean[:, :, None] - mean[:, None, :]))                 # (P, G, G)
    return torch.where(better(r), pairs, 0.0).sum((1, 2))


def disco_loss(r, u, s, n, *, drift, disco_tau=10.0, disco_delta=1e-4, disco_beta=1e3, **_):
    """DisCO (arXiv 2505.12366) with the log-likelihood score s / n; right: above the group's mean reward.

        -mean_right(s/n) + tau log mean_wrong exp(s/n / tau) + sg[beta (drift - delta)]_+ drift

    drift: mean log pi_old - log pi over the micro-batch's tokens, the KL that the last term bounds by delta.
    """
    mean = r.nanmean(-1, keepdim=True)
    right, wrong = r - mean > 1e-6, mean - r > 1e-6                                         # (P, G)
    low = (s / n / disco_tau).masked_fill(~wrong, -1e9).logsumexp(-1) - wrong.sum(-1).clamp(min=1).log()
    high = masked_sum(s / n, right) / right.sum(-1).clamp(min=1)                            # (P,)
    penalty = (disco_beta * (drift - disco_delta)).clamp(min=0).detach() * drift
    return torch.where(has_spread(r), disco_tau * low - high + penalty, 0.0)


def reg_grpo_loss(r, u, s, n, *, rho, eps=1e-4, **_):
    """Reg-GRPO (arXiv 2506.07464): mean_i (A_i - (rho_i - mean rho) / std rho)^2, A as GRPO's; no clip. std
    is (var + eps^2)^(1/2): at a rollout's first update rho is 0, the gradient that of -2 A_i s_i / eps."""
    known, k = ~r.isnan(), (~r.isnan()).sum(-1, keepdim=True).clamp(min=2)              # (P, G), (P, 1)
    A = group_advantages(r.flatten(), r.shape[-1]).view_as(r)                               # unknown: 0
    rho = torch.where(known, rho - torch.where(known, rho, 0.0).sum(-1, keepdim=True) / k, 0.0)
    error = A - rho / ((rho**2).sum(-1, keepdim=True) / (k - 1) + eps**2).sqrt()            # (P, G)
    return torch.where(has_spread(r), (error**2).sum(-1) / k.squeeze(-1), 0.0)


def has_spread(r):
    return better(r).any(-1).any(-1)


GROUP_LOSSES = {  # name: (loss, count of a group)
    "sigmoid": (partial(best_against_worst, sigmoid_loss), has_spread),
    "ipo": (partial(best_against_worst, ipo_loss), has_spread),
    "ipo_sum": (partial(best_against_worst, ipo_sum_loss), has_spread),
    "copg": (copg_loss, lambda r: (~r.isnan()).sum(-1) > 1),
    "trpa": (trpa_loss, lambda r: better(r).sum((1, 2))),
    "disco": (disco_loss, has_spread),
    "reg_grpo": (reg_grpo_loss, has_spread)}


def group_loss(logps, old_logps, rewards, mask, *, loss_type, num_generations, ref_logps=None, beta=0.0,
               kl_estimator="k3", **_):
    """A loss of GROUP_LOSSES, as a sum over the groups; divide by the step's `policy_loss_count`.

    As `policy_loss`, with whole groups of num_generations consecutive completions and `advantages` "none".
    """
    (loss, count_of), r = GROUP_LOSSES[loss_type], rewards.view(-1, num_generations)
    s, n = masked_sum(logps, mask).view_as(r), mask.sum(-1).clamp(min=1).view_as(r)
    u = None if ref_logps is None else masked_sum(logps - ref_logps, mask).view_as(r)
    rho = masked_sum(logps - old_logps, mask).view_as(r)
    metrics = {"frac_groups_skipped": ((count_of(r) == 0).sum(), len(r))}
    if u is not None:
        wins, margins = better(r), beta * (u[:, :, None] - u[:, None, :]).detach()          # (P, G, G)
        metrics |= {"rewards/margins": (margins[wins].sum(), wins.sum()),
                    "rewards/accuracies": ((margins[wins] > 0).sum() + 0.5 * (margins[wins] == 0).sum(),
                                           wins.sum()),
                    "kl": (masked_sum(kl_penalty(logps, ref_logps, kl_estimator).detach(), mask).sum(),
                           mask.sum())}
    return loss(r, u, s, n, beta=beta, rho=rho, drift=-rho.sum() / mask.sum().clamp(min=1)).sum(), metrics

"""LCPO: an EM step tells how likely each label is right.

    python train_dpo.py --algo lcpo

Source: arXiv 2509.24159 (RE-PO in its last version). eta, the share of right labels, starts at 0.9 and moves
by a tenth a step, as in the paper. The paper wraps any loss and has an eta for each annotator; here it is DPO
with one eta.
"""

import math

from losses import PairLoss, log_ratios_of, smoothed

SCRIPT = "train_dpo.py"
PRESET = dict(loss_type=["lcpo"], beta=0.1)
STATE = {"eta": 0.9}


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
    """LCPO's share of right labels, (1 - momentum) eta + momentum mean(q), of a whole optimizer step's q; the
    momentum and the start at 0.9 are the paper's."""
    return (1 - momentum) * eta + momentum * mean_q


def metrics(pair, *, beta, eta, **_):
    """The mean posterior of the step's pairs, from which `after_step` moves eta."""
    r = log_ratios_of(pair)
    posterior = lcpo_posterior(beta * r["r_w"].detach() - beta * r["r_l"].detach(), eta)            # (B,)
    return {"lcpo_posterior": (posterior.sum(), len(posterior))}


def after_step(state, metrics):
    """Log the share that this step used, and move it."""
    metrics["lcpo_eta"] = state["eta"]
    if math.isfinite(metrics["lcpo_posterior"]):
        state["eta"] = next_lcpo_eta(state["eta"], metrics["lcpo_posterior"])


PAIR_LOSSES = {"lcpo": PairLoss(lcpo_loss)}

"""AlphaPO: SimPO whose reward is a power of the answer's likelihood instead of its logarithm.

    python train_dpo.py --algo alphapo

Source: arXiv 2501.03884; form as in TRL's experimental CPO trainer, whose flag is `alpha`. alpha 0 is SimPO;
alpha 0.25 is from memory of the paper, beta and the margin are SimPO's preset.
"""

from dataclasses import dataclass

from losses import PairLoss, smoothed
from model import Finite

SCRIPT = "train_dpo.py"
PRESET = dict(loss_type=["alphapo"], beta=2.0, alphapo_gamma=1.0, learning_rate=5e-7)


@dataclass
class Flags:
    alpha: Finite = 0.25  # power of the likelihood; 0: its logarithm, which is SimPO
    alphapo_gamma: Finite = 1.0  # the margin, as --simpo_gamma


def alpha_reward(mean_logp, alpha):
    """(1 - p^-alpha) / alpha of p = e^mean_logp, and mean_logp for alpha 0; (B,) -> (B,)"""
    return mean_logp if alpha == 0 else -(-alpha * mean_logp).clamp(max=80).expm1() / alpha


def alphapo_loss(r_w, r_l, *, beta, s_w, s_l, n_w, n_l, alpha=0.25, alphapo_gamma=1.0, label_smoothing=0.0,
                 **_):
    """AlphaPO (arXiv 2501.03884): -log sigma(beta (r(w) - r(l)) - gamma), r(y) = (1 - p^-alpha) / alpha, p
    the geometric mean of an answer's token probabilities."""
    reward_w, reward_l = alpha_reward(s_w / n_w, alpha), alpha_reward(s_l / n_l, alpha)
    return smoothed(beta * (reward_w - reward_l) - alphapo_gamma, label_smoothing)


PAIR_LOSSES = {"alphapo": PairLoss(alphapo_loss, reference=False, smoothed=True)}

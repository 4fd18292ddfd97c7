"""Online DPO's best against worst of a group, by IPO as its paper writes it: log-ratios are sums over tokens.

    python train_grpo.py --algo online_ipo_sum

Source: arXiv 2402.04792 and 2310.12036; beta is a customary value. Averaged over tokens: --loss_type ipo.
"""

from functools import partial

from losses import GroupLoss, best_against_worst, has_spread

SCRIPT = "train_grpo.py"
PRESET = dict(loss_type="ipo_sum", advantage_estimator="none", beta=0.1)


def ipo_sum_loss(u_w, u_l, *, beta, **_):
    """(u_w - u_l - 1 / (2 beta))^2"""
    return (u_w - u_l - 1 / (2 * beta)) ** 2


GROUP_LOSSES = {"ipo_sum": GroupLoss(partial(best_against_worst, ipo_sum_loss), has_spread)}

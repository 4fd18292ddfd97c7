"""IPO as the paper writes it, with log-ratios summed over tokens.

    python train_dpo.py --algo ipo_sum

Source: arXiv 2310.12036. TRL averages over tokens, as the paper's authors confirmed: that is --algo ipo.
"""

from losses import PairLoss

SCRIPT = "train_dpo.py"
PRESET = dict(loss_type=["ipo_sum"], beta=0.1)


def ipo_sum_loss(r_w, r_l, *, beta, **_):
    """IPO as the paper writes it (arXiv 2310.12036): (r_w - r_l - 1 / (2 beta))^2."""
    return (r_w - r_l - 1 / (2 * beta)) ** 2


PAIR_LOSSES = {"ipo_sum": PairLoss(ipo_sum_loss, of_ratios=True)}

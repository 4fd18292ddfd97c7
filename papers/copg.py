"""CoPG: the squared difference of two answers' regularised rewards, over all pairs of a group.

    python train_grpo.py --algo copg

Source: arXiv 2406.19185; beta is ours.
"""

import torch

from losses import GroupLoss

SCRIPT = "train_grpo.py"
PRESET = dict(loss_type="copg", advantage_estimator="none", beta=0.1)


def copg_loss(r, u, s, n, *, beta, **_):
    """CoPG (arXiv 2406.19185): (R_i - R_j)^2 over all pairs, R = r - beta u: the group's variance of R; over
    2 beta, so that its gradient on policy is that of RLOO with the KL in the reward."""
    known, k = ~r.isnan(), (~r.isnan()).sum(-1, keepdim=True)                           # (P, G), (P, 1)
    R = torch.where(known, r - beta * u, 0.0)                                               # (P, G)
    squares = torch.where(known, (R - R.sum(-1, keepdim=True) / k.clamp(min=1)) ** 2, 0.0)
    return squares.sum(-1) / (k - 1).clamp(min=1).squeeze(-1) / (2 * beta)


GROUP_LOSSES = {"copg": GroupLoss(copg_loss, lambda r: (~r.isnan()).sum(-1) > 1)}

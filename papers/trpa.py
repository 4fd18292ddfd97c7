"""TRPA: a preference loss of every pair of a group whose rewards differ.

    python train_grpo.py --algo trpa

Source: arXiv 2504.04524 and its code. Its levels put every answer without the format last, also a right one.
Here they are the values of the reward, so that any reward functions will do; for accuracy and format
--reward_weights 0.1 1 comes nearest to the authors' order. Its KL to pi_old (0.001), which has no gradient at
one update a rollout, and its loss of a batch without a pair are left out.
"""

import torch
import torch.nn.functional as F

from losses import GroupLoss, is_above

SCRIPT = "train_grpo.py"
PRESET = dict(loss_type="trpa", advantage_estimator="none", beta=0.1)


def trpa_loss(r, u, s, n, *, beta, **_):
    """TRPA (arXiv 2504.04524): -log sigma(c beta (u_i / n_i - u_j / n_j)), summed over pairs of r_i > r_j; c
    is 2.5 where i has the highest reward there is (the paper's level 1), else 1."""
    mean, c = u / n, torch.where(r > -1e-6, 2.5, 1.0)[:, :, None]
    pairs = -F.logsigmoid(c * beta * (mean[:, :, None] - mean[:, None, :]))                 # (P, G, G)
    return torch.where(is_above(r), pairs, 0.0).sum((1, 2))


GROUP_LOSSES = {"trpa": GroupLoss(trpa_loss, lambda r: is_above(r).sum((1, 2)))}

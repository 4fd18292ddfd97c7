"""GVPO: the group's log-ratios regress on its rewards, both centred.

    python train_grpo.py --algo gvpo

Source: arXiv 2504.19599; as in verl's recipe, beta 0.1 there. It is a keyword here: there is no reference.
"""

import torch

from losses import GroupLoss

SCRIPT = "train_grpo.py"
PRESET = dict(loss_type="gvpo", advantage_estimator="none")
UPDATES = 4  # of a rollout
TINY = dict(learning_rate=2e-4, per_device_train_batch_size=64, max_steps=150)  # for the built-in model


def gvpo_loss(r, u, s, n, *, rho, gvpo_beta=0.1, **_):
    """GVPO (arXiv 2504.19599): 1/2 sum_i (beta (rho_i - mean rho) - (r_i - mean r))^2 / (n - 1). Its
    gradient at a rollout's first update is that of -beta sum_i (r_i - mean r) s_i / (n - 1)."""
    known = ~r.isnan()                                                                      # (P, G)
    count = known.sum(-1, keepdim=True).clamp(min=1)                                        # (P, 1)
    error = torch.where(known, gvpo_beta * rho - r, 0.0)
    error = torch.where(known, error - error.sum(-1, keepdim=True) / count, 0.0)
    return (error**2).sum(-1) / (2 * (count.squeeze(-1) - 1).clamp(min=1))


GROUP_LOSSES = {"gvpo": GroupLoss(gvpo_loss, lambda r: (~r.isnan()).sum(-1) > 1, reference=False)}

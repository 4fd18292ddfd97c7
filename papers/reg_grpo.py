"""Reg-GRPO: the log-ratios regress on the advantages; no clip.

    python train_grpo.py --algo reg_grpo

Source: arXiv 2506.07464, its text; its code could not be had. eps at a rollout's first update is ours. Its
KL has a weight of 0.1, and is taken as GRPO's, the mean of k3 over a completion's tokens; groups without
spread have no loss and no KL. Its easier and harder copies of prompts are not here.
"""

import torch

from losses import GroupLoss, group_advantages, has_spread

SCRIPT = "train_grpo.py"
PRESET = dict(loss_type="reg_grpo", advantage_estimator="none", beta=0.1)
UPDATES = 4  # of a rollout
TINY = dict(learning_rate=2e-4, per_device_train_batch_size=64, max_steps=150)  # for the built-in model


def reg_grpo_loss(r, u, s, n, *, rho, kl, beta, eps=1e-4, **_):
    """Reg-GRPO (arXiv 2506.07464): mean_i (A_i - (rho_i - mean rho) / std rho)^2 + beta KL_i / n_i, A as
    GRPO's; no clip. std is (var + eps^2)^(1/2): at a rollout's first update rho is 0, the gradient that of
    -2 A_i s_i / eps."""
    known, k = ~r.isnan(), (~r.isnan()).sum(-1, keepdim=True).clamp(min=2)              # (P, G), (P, 1)
    A = group_advantages(r.flatten(), r.shape[-1]).view_as(r)                               # unknown: 0
    rho = torch.where(known, rho - torch.where(known, rho, 0.0).sum(-1, keepdim=True) / k, 0.0)
    error = A - rho / ((rho**2).sum(-1, keepdim=True) / (k - 1) + eps**2).sqrt()            # (P, G)
    terms = torch.where(known, error**2 + beta * kl / n, 0.0)
    return torch.where(has_spread(r), terms.sum(-1) / k.squeeze(-1), 0.0)


GROUP_LOSSES = {"reg_grpo": GroupLoss(reg_grpo_loss, has_spread)}

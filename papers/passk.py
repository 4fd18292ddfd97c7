"""Pass@k advantage: only the group's best completion is trained, by its lead over the second.

    python train_grpo.py --algo passk

Source: arXiv 2503.19595; as in verl (`grpo_passk`). The loss is GRPO's.
"""

import math

import torch

from losses import Advantage, centred, unbiased_std

SCRIPT = "train_grpo.py"
PRESET = dict(loss_type="grpo", advantage_estimator="passk")


def passk_advantages(rewards, num_generations, *, eps=1e-6):
    """Pass@k (arXiv 2503.19595): (r_max - r_second) / (std + eps) for the best of the group, 0 for the others
    and where two are best.   (N,) -> (N,)"""
    deviations, known = centred(rewards, num_generations)                                     # (P, G)
    top, which = deviations.masked_fill(~known, -math.inf).topk(2)                            # (P, 2)
    lead = (top[:, :1] - top[:, 1:]).where(known.sum(-1, keepdim=True) > 1, 0.0)              # (P, 1)
    lead = lead / (unbiased_std(deviations, known, -1) + eps)
    return torch.zeros_like(deviations).scatter(-1, which[:, :1], lead).flatten().to(rewards.dtype)


ADVANTAGES = {"passk": Advantage(lambda r, G, **_: passk_advantages(r, G))}

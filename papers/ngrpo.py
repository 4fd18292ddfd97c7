"""NGRPO: a virtual answer of the highest reward in each group, so that groups that are all wrong teach, too.

    python train_grpo.py --algo ngrpo

Source: arXiv 2509.18851 and the authors' code: verl's token mean, and groups that are all right are drawn
again (for at most 10 rounds, which is DAPO's number; it costs rollouts). The highest reward is the sum of the
positive weights; theirs is a constant 1. Their eps is 1e-6.
"""

import math

import torch

from losses import Advantage, group_advantages

SCRIPT = "train_grpo.py"
PRESET = dict(loss_type="dapo", advantage_estimator="ngrpo", epsilon=0.16, epsilon_high=0.24,
              dynamic_sampling=10)
UPDATES = 4  # of a rollout
TINY = dict(learning_rate=2e-4, per_device_train_batch_size=64, max_steps=150)  # for the built-in model


def ngrpo_advantages(rewards, num_generations, reward_max, *, eps=1e-4):
    """NGRPO (arXiv 2509.18851): mean and std over the group and one virtual completion of the highest reward:
    a group that is all wrong is pushed down, one that is all right gets 0.   (N,) -> (N,)"""
    groups = rewards.double().view(-1, num_generations)
    known = ~groups.isnan()
    best = torch.where(known.any(-1, keepdim=True), reward_max, math.nan).to(groups)          # (P, 1)
    A = group_advantages(torch.cat([groups, best], -1).flatten(), num_generations + 1, eps=eps)
    return A.view(-1, num_generations + 1)[:, :-1].flatten().to(rewards.dtype)


ADVANTAGES = {"ngrpo": Advantage(
    lambda r, G, reward_max, **_: ngrpo_advantages(r, G, reward_max), flat_groups=True)}

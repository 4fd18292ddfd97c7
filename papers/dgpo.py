"""DGPO: the mean absolute deviation for the std, and harder prompts weigh more.

    python train_grpo.py --algo dgpo

Source: arXiv 2601.20614.
"""

import math

import torch

from losses import Advantage, centred

SCRIPT = "train_grpo.py"
PRESET = dict(loss_type="dapo", advantage_estimator="dgpo")


def check(args):
    """Difficulty is measured by the highest reward."""
    if max(args.reward_weights) <= 0:
        raise ValueError("dgpo measures difficulty by the highest reward: a --reward_weights must be above 0")


def dgpo_advantages(rewards, num_generations, reward_max, *, temperature=2.0, eps=1e-4):
    """DGPO (arXiv 2601.20614): the mean absolute deviation for the std, and harder prompts weigh more.

        A = n (r - mean) / (sum |r - mean| + eps) * Q softmax_q(-p_q / temperature)     (N,) -> (N,)

    over the Q groups with spread; p: mean reward of the group, as a share of the highest.
    """
    A, known = centred(rewards, num_generations)
    n = known.sum(-1, keepdim=True).clamp(min=1)                                              # (P, 1)
    spread = A.ne(0).any(-1, keepdim=True)
    p = torch.where(known, rewards.double().view_as(A), 0.0).sum(-1, keepdim=True) / n / reward_max
    weight = (-p / temperature).masked_fill(~spread, -math.inf).softmax(0).nan_to_num(0.0) * spread.sum()
    return (A * n / (A.abs().sum(-1, keepdim=True) + eps) * weight).flatten().to(rewards.dtype)


ADVANTAGES = {"dgpo": Advantage(lambda r, G, reward_max, **_: dgpo_advantages(r, G, reward_max))}

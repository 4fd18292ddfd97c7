"""DGPO: the mean absolute deviation for the std, and harder prompts weigh more.

    python train_grpo.py --algo dgpo

Source: arXiv 2601.20614 and the authors' code. The first reward function says what is right, so accuracy
stands first. The mean over tokens has those of groups without spread, too; their code leaves them out.
"""

import math

import torch

from losses import Advantage, centred

SCRIPT = "train_grpo.py"
PRESET = dict(loss_type="dapo", advantage_estimator="dgpo")


def dgpo_advantages(rewards, num_generations, correctness, *, temperature=2.0, eps=1e-4):
    """DGPO (arXiv 2601.20614): the mean absolute deviation for the std, and harder prompts weigh more.

        A = n (r - mean) / (sum |r - mean| + eps) * Q softmax_q(-p_q / temperature)     (N,) -> (N,)

    over the Q groups with spread; p: the group's mean correctness (N,). A group without a right answer is not
    hard but hopeless: its p is 1, the lowest weight.
    """
    A, known = centred(rewards, num_generations)
    n = known.sum(-1, keepdim=True).clamp(min=1)                                              # (P, 1)
    spread = A.ne(0).any(-1, keepdim=True)
    p = correctness.double().view_as(A).nanmean(-1, keepdim=True)                             # (P, 1)
    p = torch.where(p > 0, p, 1.0)  # also where it is unknown
    weight = (-p / temperature).masked_fill(~spread, -math.inf).softmax(0).nan_to_num(0.0) * spread.sum()
    return (A * n / (A.abs().sum(-1, keepdim=True) + eps) * weight).flatten().to(rewards.dtype)


ADVANTAGES = {"dgpo": Advantage(lambda r, G, scores, **_: dgpo_advantages(r, G, scores[0]))}

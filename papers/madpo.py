"""MADPO: DPO, each pair weighed by the margin that a reward model gave it.

    python train_dpo.py --algo madpo --model_name_or_path model --dataset rows.jsonl  # column margin

Source: arXiv 2510.05342; form and constants are those of the authors' code.
"""

import math

import torch
import torch.nn.functional as F

from losses import PairLoss

SCRIPT = "train_dpo.py"
PRESET = dict(loss_type=["madpo"], beta=0.1, learning_rate=1e-5)


def madpo_weights(margin, tau=math.log(999), c_min=0.5, c_max=2.0, slope=1.0):
    """MADPO's weight of a pair by its margin h of a reward model, (B,) -> (B,): 1 where h <= -tau, else
    sigma(c h) / sigma(h), where c falls from c_max on hard pairs to c_min on easy ones, 1 at |h| = tau:

        c = c_min + (c_max - c_min) / (1 + (c_max - 1) / (1 - c_min) e^(slope (|h| - tau)))

    The form and constants of the authors' code; tau is the logit of 0.999.
    """
    steepness = (slope * (margin.abs() - tau)).clamp(max=80).exp()
    c = c_min + (c_max - c_min) / (1 + (c_max - 1) / (1 - c_min) * steepness)
    return torch.where(margin > -tau, (F.logsigmoid(c * margin) - F.logsigmoid(margin)).exp(), 1.0)


def madpo_loss(r_w, r_l, *, beta, margin, **_):
    """MADPO (arXiv 2510.05342): DPO, each pair times `madpo_weights` of its reward-model margin."""
    return madpo_weights(margin) * -F.logsigmoid(beta * (r_w - r_l))


PAIR_LOSSES = {"madpo": PairLoss(madpo_loss, columns={"margin": (-1e6, 1e6)})}

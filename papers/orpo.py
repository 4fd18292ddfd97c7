"""ORPO: SFT and a term on the odds of the two answers, without a reference.

    python train_dpo.py --algo orpo

Source: arXiv 2403.07691; form as in TRL's experimental trainer. The weight 0.1 of the second term is lambda,
TRL's beta; here beta is in the metrics alone. TRL takes the NLL over prompt and answer, here it is the
answer's, the mean over its tokens, as the paper writes it.
"""

import torch
import torch.nn.functional as F

from losses import PairLoss

SCRIPT = "train_dpo.py"
PRESET = dict(loss_type=["sft", "orpo"], loss_weights=[1.0, 0.1], learning_rate=8e-6)


def log_odds(mean_logp):
    """log(p / (1 - p)) of p = e^mean_logp; (B,) -> (B,)"""
    return mean_logp - torch.log(-torch.expm1(mean_logp.clamp(max=-1e-6)))  # p = 1: finite


def orpo_loss(r_w, r_l, *, s_w, s_l, n_w, n_l, **_):
    """ORPO's odds ratio (arXiv 2403.07691): -log sigma(log odds(p_w) - log odds(p_l)), p the geometric mean
    of an answer's token probabilities."""
    return -F.logsigmoid(log_odds(s_w / n_w) - log_odds(s_l / n_l))


PAIR_LOSSES = {"orpo": PairLoss(orpo_loss, reference=False)}

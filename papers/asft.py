"""ASFT: SFT and an alignment term without a reference.

    python train_dpo.py --algo asft

Source: arXiv 2409.10571.
"""

import torch

from losses import PairLoss

SCRIPT = "train_dpo.py"
PRESET = dict(loss_type=["sft", "asft"], loss_weights=[1.0, 0.1])


def asft_loss(r_w, r_l, *, s_w, s_l, n_w, n_l, **_):
    """ASFT's alignment term (arXiv 2409.10571), without a reference: -log p_w - log(1 - p_l), which equals
    -log sigma(logit p_w) - log sigma(-logit p_l); p: geometric mean of an answer's token probabilities."""
    return -s_w / n_w - torch.log(-torch.expm1((s_l / n_l).clamp(max=-1e-6)))  # p_l = 1: finite


PAIR_LOSSES = {"asft": PairLoss(asft_loss, reference=False)}

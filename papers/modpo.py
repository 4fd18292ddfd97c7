"""MODPO: DPO on one objective, with the margins of the others.

    python train_dpo.py --algo modpo --model_name_or_path model --dataset rows.jsonl  # column margin
    python train_dpo.py --algo modpo --loss_type modpo_hinge --model_name_or_path model --dataset rows.jsonl

Source: arXiv 2310.03708 and the authors' code. beta is the paper's beta / w_0 here.
"""

import torch.nn.functional as F

from losses import PairLoss

SCRIPT = "train_dpo.py"
PRESET = dict(loss_type=["modpo"], beta=0.1)


def modpo_loss(r_w, r_l, *, beta, margin, **_):
    """MODPO (arXiv 2310.03708): -log sigma(m - margin). w_0 stands in both: beta is the paper's beta / w_0,
    margin the sum of w_k / w_0 (reward_k of chosen - of rejected) over the other objectives k."""
    return -F.logsigmoid(beta * (r_w - r_l) - margin)


def modpo_hinge_loss(r_w, r_l, *, beta, margin, **_):
    """MODPO's hinge variant: max(0, 1 - (m - margin))."""
    return F.relu(1 - (beta * (r_w - r_l) - margin))


PAIR_LOSSES = {"modpo": PairLoss(modpo_loss, columns={"margin": (-1e6, 1e6)}),
               "modpo_hinge": PairLoss(modpo_hinge_loss, columns={"margin": (-1e6, 1e6)})}

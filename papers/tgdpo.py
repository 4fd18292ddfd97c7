"""TGDPO: DPO whose tokens are weighed by a guide that DPO has trained before.

    python train_dpo.py --algo tgdpo --guide_model runs/dpo-1/final

Source: arXiv 2506.14574, eq. and alpha of the authors' code.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from losses import PairLoss

SCRIPT = "train_dpo.py"
PRESET = dict(loss_type=["tgdpo"], beta=0.1, learning_rate=7e-7)


@dataclass
class Flags:
    guide_model: str | None = None  # folder or hub id of the DPO-trained model that weighs the tokens


def check(args):
    """The guide and the loss go together."""
    if ("tgdpo" in args.loss_type) != (args.guide_model is not None):
        raise ValueError("tgdpo needs --guide_model, a model trained by DPO, and nothing else takes it")


def scorers(args) -> dict[str, str]:
    """Further models whose log-probs the loss takes as NAME_logps."""
    return {"guide": args.guide_model}


def guided_sum(logps, ref_logps, guide_logps, mask, *, beta, sign, alpha=0.5):
    """TGDPO's weighted log-ratio (arXiv 2506.14574): sum_t (1 + sign alpha rhat_t) (log pi - log pi_ref),
    rhat_t = beta (log pi_guide - log pi_ref). Four (B, T) -> (B,); alpha 0.5 is the authors'."""
    weights = 1 + sign * alpha * beta * torch.where(mask, guide_logps - ref_logps, 0.0)
    return (weights * torch.where(mask, logps - ref_logps, 0.0)).sum(-1)


def tgdpo_loss(r_w, r_l, *, beta, logps_w, logps_l, ref_logps_w, ref_logps_l, guide_logps_w, guide_logps_l,
               mask_w, mask_l, **_):
    """TGDPO (arXiv 2506.14574): DPO on `guided_sum`s, of sign 1 for chosen and -1 for rejected. The guide is
    already trained by DPO: tokens that it likes count more in chosen, less in rejected answers."""
    guided_w = guided_sum(logps_w, ref_logps_w, guide_logps_w, mask_w, beta=beta, sign=1)
    guided_l = guided_sum(logps_l, ref_logps_l, guide_logps_l, mask_l, beta=beta, sign=-1)
    return -F.logsigmoid(beta * (guided_w - guided_l))


PAIR_LOSSES = {"tgdpo": PairLoss(tgdpo_loss)}

"""f-DPO: the pull to the reference is another divergence than the reverse KL.

    python train_dpo.py --algo dpo f_dpo --f_divergence_type js_divergence

Source: arXiv 2309.16240 and the authors' code. Rewards in the metrics stay beta times the log-ratio, so that
runs with different divergences compare; theirs are beta f'(e^r). Accuracies agree, since f' rises.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F

import losses
from model import Finite

SCRIPT = "train_dpo.py"


@dataclass
class Flags:
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    # of the pull to the reference
    f_alpha_divergence_coef: Finite = 0.5  # alpha of alpha_divergence


def check(args):
    """Only losses that are functions of the two log-ratios have this form."""
    if args.f_divergence_type == "reverse_kl":
        raise ValueError("f_dpo changes nothing without another --f_divergence_type than reverse_kl")
    able = losses.which(losses.PAIR_LOSSES, of_ratios=True)
    without = ", ".join(sorted(set(args.loss_type) - able - {"sft"}))
    if without or args.loss_type == ["sft"]:
        raise ValueError(f"--f_divergence_type does nothing to {without or 'sft'}; it is for "
                         f"{', '.join(sorted(able))}")
    if args.f_divergence_type != "alpha_divergence" and args.f_alpha_divergence_coef != 0.5:
        raise ValueError("--f_alpha_divergence_coef changes nothing without --f_divergence_type "
                         "alpha_divergence")


def f_divergence_score(r, f_divergence_type, alpha=0.5):
    """f-DPO (arXiv 2309.16240): what stands for the log-ratio r when the pull to the reference is another
    divergence, f'(e^r) up to a constant. (B,) -> (B,)

        reverse_kl r      forward_kl 1 - e^-r      js_divergence log 2 + log sigma(r)
        alpha_divergence (e^((alpha - 1) r) - 1) / (alpha - 1)     TRL's alpha, 1 - alpha of the authors' code
    """
    if f_divergence_type == "reverse_kl":
        return r
    if f_divergence_type == "forward_kl":
        return 1 - (-r).clamp(max=80).exp()  # clamped: finite in fp32
    if f_divergence_type == "js_divergence":
        return math.log(2) + F.logsigmoid(r)
    if f_divergence_type == "alpha_divergence":
        if abs(alpha - 1) < 1e-6:  # the limit
            return r
        return ((alpha - 1) * r).clamp(max=80).expm1() / (alpha - 1)
    raise ValueError("f_divergence_type must be reverse_kl, forward_kl, js_divergence or alpha_divergence, "
                     f"got {f_divergence_type!r}")


def log_ratios(pair, args) -> dict:
    """What stands for r_w and r_l in the losses."""
    kind, alpha = args.f_divergence_type, args.f_alpha_divergence_coef
    return {name: f_divergence_score(pair[name], kind, alpha) for name in ("r_w", "r_l")}

"""LD-DPO: tokens beyond the length of the pair's shorter answer count less.

    python train_dpo.py --algo ld_dpo
    python train_dpo.py --algo mpo ld_dpo --ld_alpha 0.3

Source: arXiv 2409.06411; as in TRL.
"""

from dataclasses import dataclass

import torch

from losses import log_ratios_of, masked_sum
from model import Share

SCRIPT = "train_dpo.py"
PRESET = dict(loss_type=["sigmoid"], beta=0.1)


@dataclass
class Flags:
    ld_alpha: Share = 0.5  # weight of an answer's tokens beyond the other's


def check(args):
    """There must be a pair whose lengths can be compared."""
    if args.ld_alpha != 1 and (args.loss_type == ["sft"] or "tgdpo" in args.loss_type):
        raise ValueError("--ld_alpha compares the lengths of a pair: sft has none, tgdpo has its own weights")
    before = args.methods[:[method.__name__ for method in args.methods].index(__name__)]
    if any(hasattr(method, "log_ratios") for method in before):
        raise ValueError("ld_dpo weighs tokens before they are summed: it stands before f_dpo in --algo")


def ld_sum(logps, mask, other_mask, ld_alpha):
    """LD-DPO (arXiv 2409.06411): the sum of log-probs, those beyond the length of the pair's shorter answer
    times ld_alpha; for policy and reference alike. (B, T), (B, T), (B, T') -> (B,)"""
    shared = torch.minimum(mask.sum(-1), other_mask.sum(-1))[:, None]                       # (B, 1)
    tail = mask & (mask.cumsum(-1) > shared)                                                # (B, T)
    return masked_sum(logps, mask & ~tail) + ld_alpha * masked_sum(logps, tail)


def log_ratios(pair, args) -> dict:
    """The pair's sums, and the log-ratios of these."""
    w, l, alpha = pair["mask_w"], pair["mask_l"], args.ld_alpha
    sums = {"s_w": ld_sum(pair["logps_w"], w, l, alpha), "s_l": ld_sum(pair["logps_l"], l, w, alpha)}
    if "ref_s_w" in pair:
        sums |= {"ref_s_w": ld_sum(pair["ref_logps_w"], w, l, alpha),
                 "ref_s_l": ld_sum(pair["ref_logps_l"], l, w, alpha)}
    return sums | log_ratios_of(pair | sums)

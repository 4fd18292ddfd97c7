"""Train on the tokens of the highest entropy only (the 80/20 rule).

    python train_grpo.py --algo grpo high_entropy --top_entropy_quantile 0.2

Source: arXiv 2506.01939. The bound is that of the micro-batch; tokens left out still count in the mean.
"""

from dataclasses import dataclass
from typing import Annotated

import losses
from model import warn

SCRIPT = "train_grpo.py"
OF_MICRO_BATCH = True  # the bound is that of its tokens


@dataclass
class Flags:
    top_entropy_quantile: Annotated[float, "(0, 1]"] = 0.2  # share of tokens, by entropy, trained


def check(args):
    """It weighs single tokens."""
    if args.loss_type in losses.GROUP_LOSSES:
        raise ValueError(f"--loss_type {args.loss_type} compares whole completions: "
                         "--top_entropy_quantile does not go with it")
    if args.importance_sampling_level in ("sequence", "sequence_sum"):
        warn(f"with one ratio a sequence (--importance_sampling_level {args.importance_sampling_level}) a "
             "token's gradient is spread over its completion: --top_entropy_quantile only weighs completions")


def top_entropy_mask(entropies, mask, quantile):
    """Train on the `quantile` of tokens with the highest entropy only (80/20 rule, arXiv 2506.01939): (N, T).
    The bound is that of the micro-batch. Tokens left out still count in the mean."""
    entropies = entropies.detach()
    return mask & (entropies >= entropies[mask].quantile(1 - quantile)) if mask.any() else mask


def weigh(args, batch, logps, old_logps, entropies):
    """(n, T)"""
    return top_entropy_mask(entropies, batch["completion_mask"], args.top_entropy_quantile)

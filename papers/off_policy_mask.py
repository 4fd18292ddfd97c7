"""DeepSeek-V3.2's sequence mask: bad completions that the policy has moved away from are left out.

    python train_grpo.py --algo grpo off_policy_mask --off_policy_mask_threshold 0.5 --steps_per_generation 4

Source: arXiv 2512.02556; as in TRL.
"""

from dataclasses import dataclass

import losses
from losses import masked_sum
from model import NonNegative

SCRIPT = "train_grpo.py"


@dataclass
class Flags:
    off_policy_mask_threshold: NonNegative | None = None  # drop completions of negative advantage whose mean
    # log-prob fell by more than this since they were sampled


def check(args):
    """It needs a threshold, and drops completions of a loss of tokens."""
    if args.off_policy_mask_threshold is None:
        raise ValueError("off_policy_mask needs --off_policy_mask_threshold")
    if args.loss_type in losses.GROUP_LOSSES:
        raise ValueError(f"--loss_type {args.loss_type} compares whole completions: "
                         "--off_policy_mask_threshold does not go with it")


def off_policy_mask(logps, sampling_logps, advantages, mask, threshold):
    """DeepSeek-V3.2's sequence mask (arXiv 2512.02556): (N, 1), False where A < 0 and the mean of
    log pi_sampler - log pi over the completion's tokens is above the threshold: bad and no longer ours."""
    drift = masked_sum(sampling_logps - logps.detach(), mask) / mask.sum(-1).clamp(min=1)   # (N,)
    return ((advantages >= 0) | (drift <= threshold))[:, None]


def weigh(args, batch, logps, old_logps, entropies):
    """(n, 1)"""
    return off_policy_mask(logps, batch["sampling_logps"], batch["advantages"], batch["completion_mask"],
                           args.off_policy_mask_threshold)

"""TR-DPO's moving reference: it follows the policy, every so many steps.

    python train_grpo.py --algo grpo moving_reference --beta 0.04 --ref_model_sync_steps 64

Source: arXiv 2404.09656; TRL's --sync_ref_model and its two flags.
"""

from dataclasses import dataclass

import torch

from model import Share, Size

SCRIPT = "train_grpo.py"
MOVES_REFERENCE = True  # so it stands in the checkpoints


@dataclass
class Flags:
    ref_model_mixup_alpha: Share = 0.6  # a sync: alpha * policy + rest * reference
    ref_model_sync_steps: Size = 512  # optimizer steps between syncs


def check(args):
    """There must be a reference, with weights of its own."""
    if not args.beta:
        raise ValueError("moving_reference needs --beta above 0")
    if args.lora_r is not None:
        raise ValueError("moving_reference cannot go with --lora_r: its reference has no weights of its own")


@torch.no_grad()
def after_update(args, policy, ref, step):
    """ref = alpha * policy + (1 - alpha) * ref"""
    if step % args.ref_model_sync_steps == 0:
        for theirs, ours in zip(ref.parameters(), policy.parameters(), strict=True):
            theirs.mul_(1 - args.ref_model_mixup_alpha).add_(ours, alpha=args.ref_model_mixup_alpha)

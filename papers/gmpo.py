"""GMPO: the geometric mean of clipped token ratios.

    python train_grpo.py --algo gmpo

Source: arXiv 2507.20673.
"""

import torch

from losses import PolicyLoss, masked_sum

SCRIPT = "train_grpo.py"
PRESET = dict(loss_type="gmpo", epsilon=0.4)
UPDATES = 4  # of a rollout
TINY = dict(learning_rate=2e-4, per_device_train_batch_size=64, max_steps=150)  # for the built-in model


def check(args):
    """The loss builds its own ratio, of whole completions."""
    if args.loss_type == "gmpo" and (args.importance_sampling_level != "token"
                                     or getattr(args, "top_entropy_quantile", 1) < 1):
        raise ValueError("gmpo builds the ratio of the whole sequence itself: it takes "
                         "--importance_sampling_level token, and no --top_entropy_quantile")


def gmpo_term(ratio, A, *, token_log_ratios, mask, epsilon, epsilon_high, **_):
    """GMPO (arXiv 2507.20673): -A (prod_t clip(c_t))^(1/|y|), each token's log c clipped on PPO's side only,
    to [-epsilon, epsilon_high]; the same for each token."""
    clipped = token_log_ratios.clamp(-epsilon, epsilon_high)
    side = torch.where(A > 0, torch.min(token_log_ratios, clipped), torch.max(token_log_ratios, clipped))
    mean = masked_sum(side, mask) / mask.sum(-1).clamp(min=1)                               # (N,)
    return -mean.clamp(-20, 20).exp()[:, None].expand_as(ratio) * A


POLICY_LOSSES = {"gmpo": PolicyLoss(gmpo_term, "sequence", clips="log")}

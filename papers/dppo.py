"""DPPO: a token is left out where its probability itself, not its ratio, moved too far in A's direction.

    python train_grpo.py --algo dppo

Source: arXiv 2602.04879; the form, its bounds and its drift term are those of prime-rl, whose default it is.
There the old probabilities are the sampler's; here they are the training pass's, and what is between the two
is --importance_sampling_correction's.
"""

import torch

from losses import PolicyLoss

SCRIPT = "train_grpo.py"
PRESET = dict(loss_type="dppo")
UPDATES = 4  # of a rollout
TINY = dict(learning_rate=2e-4, per_device_train_batch_size=64, max_steps=150)  # for the built-in model


def check(args):
    """The bounds are those of single tokens."""
    if args.loss_type == "dppo" and args.importance_sampling_level != "token":
        raise ValueError("dppo bounds the probability of each token: it takes --importance_sampling_level "
                         "token")


def dppo_term(ratio, A, *, logps, token_log_ratios, dppo_low=0.2, dppo_high=0.2, dppo_drift=1e-3, **_):
    """DPPO (arXiv 2602.04879): -A c + 1e-3 (log c)^2; the first term is left out where p - p_old > high and
    A > 0, or p - p_old < -low and A < 0."""
    moved = (logps.exp() - (logps - token_log_ratios).exp()).detach()                         # (N, T)
    kept = ~((A > 0) & (moved > dppo_high) | (A < 0) & (moved < -dppo_low))
    return torch.where(kept, -A * ratio, 0.0) + dppo_drift * token_log_ratios.clamp(-20, 20)**2


POLICY_LOSSES = {"dppo": PolicyLoss(dppo_term, "token")}

"""Clip-Cov: a few tokens, drawn among those whose log-prob and advantage vary together much, are left out.

    python train_grpo.py --algo grpo clip_cov --steps_per_generation 4

Source: arXiv 2505.22617; as in verl: 0.0002 of the micro-batch's tokens (at least one), of covariances
between 1 and 5, none that PPO's clip has stopped. They are drawn by the run's seed and the tokens' own ids.
"""

import numpy as np
import torch

import losses

SCRIPT = "train_grpo.py"
OF_MICRO_BATCH = True  # the tokens are chosen among its own


def check(args):
    """It leaves out single tokens of a clipped loss."""
    loss = losses.POLICY_LOSSES.get(args.loss_type)
    if loss is None or loss.term is not losses.clipped_term or args.importance_sampling_level != "token":
        raise ValueError("clip_cov leaves out single tokens of a loss with PPO's clip, as --loss_type grpo")


def clip_cov_mask(logps, old_logps, A, mask, rng, *, epsilon, epsilon_high, share=2e-4, low=1.0, high=5.0):
    """Clip-Cov (arXiv 2505.22617): (N, T), False on tokens that get no gradient. A (N, 1); the covariance of
    a token is (A - mean A) (log pi - mean log pi), means over the micro-batch's tokens."""
    logps, all_A = logps.detach(), A.expand_as(logps)
    cov = (all_A - all_A[mask].mean()) * (logps - logps[mask].mean())
    c = (logps - old_logps).exp()
    clipped = (A > 0) & (c > 1 + epsilon_high) | (A < 0) & (c < 1 - epsilon)
    found = (mask & ~clipped & (cov > low) & (cov < high)).flatten().nonzero().flatten()
    count = min(len(found), max(1, int(share * mask.sum())))
    keep = torch.ones_like(mask).flatten()
    keep[found[rng.permutation(len(found))[:count]]] = False
    return keep.view_as(mask)


def weigh(args, batch, logps, old_logps, entropies):
    """(n, T)"""
    mask = batch["completion_mask"]
    rng = np.random.default_rng([args.seed, int(batch["completion_ids"][mask].sum())])
    return clip_cov_mask(logps, old_logps, batch["advantages"][:, None], mask, rng, epsilon=args.epsilon,
                         epsilon_high=args.epsilon_high)

"""KL-Cov: the few tokens whose log-prob and advantage vary together most are held back by |log c|.

    python train_grpo.py --algo kl_cov

Source: arXiv 2505.22617; as in verl: a share of 0.0002 of the micro-batch's tokens (at least one), a weight
of 1, no clip. |log c| has no gradient at a rollout's first update, so a rollout serves four.
"""

import torch

from losses import PolicyLoss

SCRIPT = "train_grpo.py"
PRESET = dict(loss_type="kl_cov")
UPDATES = 4  # of a rollout
TINY = dict(learning_rate=2e-4, per_device_train_batch_size=64, max_steps=150)  # for the built-in model
OF_MICRO_BATCH = True  # the tokens are chosen among its own


def covariance(logps, A, mask):
    """(A - mean A) (log pi - mean log pi) of each token, means over the micro-batch's; (N, T), detached."""
    def centre(x):
        return x - x[mask].mean()

    return centre(A.expand_as(logps)) * centre(logps.detach())


def kl_cov_term(ratio, A, *, logps, mask, token_log_ratios, kl_cov_ratio=2e-4, kl_cov_weight=1.0, **_):
    """KL-Cov (arXiv 2505.22617): -A c, plus |log c| on the tokens of the highest `covariance`."""
    cov = covariance(logps, A, mask).masked_fill(~mask, -torch.inf).flatten()
    tokens = int(mask.sum())
    chosen = torch.zeros_like(cov, dtype=torch.bool)
    chosen[cov.topk(min(tokens, max(1, int(kl_cov_ratio * tokens)))).indices] = True
    return -A * ratio + kl_cov_weight * token_log_ratios.abs() * chosen.view_as(logps)


POLICY_LOSSES = {"kl_cov": PolicyLoss(kl_cov_term, "token")}

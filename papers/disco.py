"""DisCO: discriminative, without a reference; a penalty bounds the drift from the old policy.

    python train_grpo.py --algo disco

Source: arXiv 2505.12366 and the authors' code, with the log-likelihood score. As there, every question
counts, also one whose answers tie, and the penalty is always there. The drift is that of the micro-batch.
Right is what is above the group's mean; theirs is a reward of 1.
"""

import torch

from losses import GroupLoss, has_spread, masked_sum

SCRIPT = "train_grpo.py"
PRESET = dict(loss_type="disco", advantage_estimator="none")
UPDATES = 4  # of a rollout
TINY = dict(learning_rate=2e-4, per_device_train_batch_size=64, max_steps=150)  # for the built-in model
OF_MICRO_BATCH = True  # the drift is its mean


def disco_loss(r, u, s, n, *, drift, disco_tau=10.0, disco_delta=1e-4, disco_beta=1e3, **_):
    """DisCO (arXiv 2505.12366) with the log-likelihood score s / n; right: above the group's mean reward.

        -mean_right(s/n) + tau log mean_wrong exp(s/n / tau) + sg[beta (drift - delta)]_+ drift

    drift: mean log pi_old - log pi over the micro-batch's tokens, the KL that the last term bounds by delta.
    """
    mean = r.nanmean(-1, keepdim=True)
    right, wrong = r - mean > 1e-6, mean - r > 1e-6                                         # (P, G)
    low = (s / n / disco_tau).masked_fill(~wrong, -1e9).logsumexp(-1) - wrong.sum(-1).clamp(min=1).log()
    high = masked_sum(s / n, right) / right.sum(-1).clamp(min=1)                            # (P,)
    penalty = (disco_beta * (drift - disco_delta)).clamp(min=0).detach() * drift
    return torch.where(has_spread(r), disco_tau * low - high, 0.0) + penalty


GROUP_LOSSES = {"disco": GroupLoss(disco_loss, lambda r: torch.ones(len(r)), reference=False)}

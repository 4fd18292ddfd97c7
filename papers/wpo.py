"""WPO: pairs are weighed by how likely the policy itself is to give their answers.

    python train_dpo.py --algo wpo
    python train_dpo.py --algo mpo wpo

Source: arXiv 2406.11827; as in TRL, the weights are not capped at 1. They weigh the pair losses only.
"""

from losses import masked_sum

SCRIPT = "train_dpo.py"
PRESET = dict(loss_type=["sigmoid"], beta=0.1)
SUMS_OF_SQUARES = True  # the policy's log sum_v p_v^2 is computed, (B, T), and stands in the pair


def wpo_weights(logps, log_sum_sq_probs, mask):
    """WPO (arXiv 2406.11827): how on-policy an answer is: exp(mean_t(log p_t - log sum_v p_v^2)), detached.

    Three (N, T) -> (N,). A pair's loss is multiplied by both answers' weights. Not capped at 1, as in TRL.
    """
    return (masked_sum(logps - log_sum_sq_probs, mask) / mask.sum(-1).clamp(min=1)).exp().detach()


def pair_weights(pair, args, columns):
    """(B,)"""
    w, l = (wpo_weights(pair[f"logps_{side}"], pair[f"log_sum_sq_probs_{side}"], pair[f"mask_{side}"])
            for side in "wl")
    return w * l

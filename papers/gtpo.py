"""GTPO: tokens that good and bad answers share are not pushed down; answers of high entropy are left out.

    python train_grpo.py --algo gtpo

Source: arXiv 2508.03772, checked against the authors' code. The bound on the entropy is the paper's log 2;
their code has 0.7. Their code also sums over a group, where this takes the mean as GRPO does (a factor of G,
which the gradient's clipping and Adam remove), and keeps the ratio at 1 also after a rollout's first update.
"""

import math

import torch

from losses import PolicyLoss, masked_sum

SCRIPT = "train_grpo.py"
PRESET = dict(loss_type="gtpo", scale_rewards="none")
STATE = {"initial_entropy": None}
WHOLE_GROUPS = True  # in a micro-batch


def gtpo_term(ratio, A, *, entropies, initial_entropy, mask, gtpo_gamma=0.1, **_):
    """GTPO (arXiv 2508.03772): -c (A - gamma H), no clip, H the completion's mean token entropy; 0 where H is
    above log 2 and the starting policy's is not. Conflict tokens are weighed by `gtpo_weights`, as `keep`."""
    H = (masked_sum(entropies.detach(), mask) / mask.sum(-1).clamp(min=1))[:, None]         # (N, 1)
    initial_entropy = initial_entropy or math.inf  # not known before the first step
    kept = (H <= math.log(2)) | (initial_entropy > math.log(2))
    return -ratio * torch.where(kept, A - gtpo_gamma * H, 0.0)


def gtpo_weights(completion_ids, advantages, mask, num_generations):
    """GTPO's lambda (arXiv 2508.03772), (N, T), of N completions in whole groups; advantages (N,).

    A token conflicts if a completion of the group with the other sign of A has the same token at its place,
    counted from the start or the end, and all tokens before (behind) it do: 2 for A > 0, 0 for A < 0; else 1.
    """
    T, sign = mask.shape[1], advantages.sign().view(-1, num_generations)                    # (P, G)
    opposed = (sign[:, :, None] * sign[:, None] < 0)[..., None]                             # (P, G, G, 1)
    turn = (mask.sum(-1, keepdim=True) - 1 - torch.arange(T, device=mask.device)).clamp(min=0)

    def conflicts(ids):  # without a break from the start
        ids = ids.masked_fill(~mask, -1).view(-1, num_generations, T)
        return (opposed & (ids[:, :, None] == ids[:, None])).any(2).view(-1, T).int().cumprod(-1).bool()

    found = conflicts(completion_ids) | conflicts(completion_ids.gather(-1, turn)).gather(-1, turn)
    return torch.where(found & mask, 1 + sign.view(-1, 1), 1.0)


def weigh(args, batch, logps, old_logps, entropies):
    """(n, T) weights of tokens."""
    return gtpo_weights(batch["completion_ids"], batch["advantages"], batch["completion_mask"],
                        args.num_generations)


def after_step(state, metrics):
    """The starting policy's entropy is that of the first step."""
    state["initial_entropy"] = state["initial_entropy"] or metrics.get("entropy")


POLICY_LOSSES = {"gtpo": PolicyLoss(gtpo_term, "sequence")}

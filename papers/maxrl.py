"""MaxRL: the group's mean reward divides, so that prompts that are seldom solved weigh more.

    python train_grpo.py --algo maxrl

Source: arXiv 2602.02710; the advantage as in prime-rl. Its loss there is that framework's default (`dppo`);
here it is the token mean with GRPO's clip. It is for rewards of 0 or more.
"""

from losses import Advantage, centred

SCRIPT = "train_grpo.py"
PRESET = dict(loss_type="dapo", advantage_estimator="maxrl")


def maxrl_advantages(rewards, num_generations):
    """MaxRL (arXiv 2602.02710): (r - mean) / mean over the group, 0 where the mean is not above 0.   (N,)"""
    A, _ = centred(rewards, num_generations)                                                  # (P, G)
    mean = rewards.double().view_as(A).nanmean(-1, keepdim=True)                              # (P, 1)
    return (A / mean).where(mean > 0, 0.0).flatten().to(rewards.dtype)


ADVANTAGES = {"maxrl": Advantage(lambda r, G, **_: maxrl_advantages(r, G))}

"""Another estimator of the KL in the loss than k3, or a KL without the ratio.

    python train_grpo.py --algo grpo kl_estimator --beta 0.04 --no-use_bias_correction_kl   # as GRPO's paper
    python train_grpo.py --algo grpo kl_estimator --beta 0.04 --kl_estimator k2 --no-use_bias_correction_kl

Source: Schulman, joschu.net/blog/kl-approx.html; the ratio is DeepSeek-V3.2's, arXiv 2512.02556, and TRL's
flag. losses.kl_penalty says which KL each gradient follows.
"""

from dataclasses import dataclass
from typing import Literal

import losses
from model import warn

SCRIPT = "train_grpo.py"


@dataclass
class Flags:
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"  # of the KL per token
    use_bias_correction_kl: bool = True  # multiply the KL by the ratio: then k1's and k3's gradient is the
    # KL's, but for the ratio of level sequence


def check(args):
    """There must be a KL in the loss; gradients that are not the KL's are warned of."""
    in_reward = losses.ADVANTAGES[args.advantage_estimator].kl_in_reward
    if not args.beta or args.loss_type in losses.GROUP_LOSSES or in_reward:
        raise ValueError("kl_estimator changes nothing without --beta in a loss of tokens, or with rloo, "
                         "which takes the KL off the reward")
    kind, times_ratio, level = args.kl_estimator, args.use_bias_correction_kl, args.importance_sampling_level
    if kind == "k1" and not times_ratio:
        warn("the gradient of k1 without the ratio is 0 on average: --beta does nothing. k2 has the KL's")
    if kind == "k1" and times_ratio and level == "sequence":
        warn("k1 times the ratio of --importance_sampling_level sequence, a |y|-th root, has 1/|y| of the "
             "KL's gradient; k2 with --no-use_bias_correction_kl has the whole")
    if kind == "k2" and times_ratio:
        warn("the gradient of k2 is the KL's without the ratio: --no-use_bias_correction_kl")

"""REINFORCE++-baseline: rewards less their group's mean, divided by the std of these over the whole batch.

    python train_grpo.py --algo reinforce_plus_plus_baseline

Source: arXiv 2501.03262; as in verl and OpenRLHF, which count each completion as often as it has tokens in
mean and std; here each counts once, so the mean is 0. The KL, whose weight varies, is k2 without the ratio:
behind this name kl_estimator --beta 0.001 --kl_estimator k2 --no-use_bias_correction_kl.
"""

from losses import Advantage, centred, unbiased_std

SCRIPT = "train_grpo.py"
PRESET = dict(loss_type="dapo", advantage_estimator="reinforce_plus_plus_baseline")


def reinforce_plus_plus_baseline_advantages(rewards, num_generations, *, eps=1e-4):
    """REINFORCE++-baseline (arXiv 2501.03262): z / (std of all z + eps), z = r - mean_group.   (N,) -> (N,)

    `--scale_rewards batch` divides by the std of the rewards themselves.
    """
    z, known = centred(rewards, num_generations)
    return (z / (unbiased_std(z, known) + eps)).flatten().to(rewards.dtype)


ADVANTAGES = {"reinforce_plus_plus_baseline": Advantage(
    lambda r, G, **_: reinforce_plus_plus_baseline_advantages(r, G))}

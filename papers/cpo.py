"""CPO: DPO with a uniform reference, and SFT on the chosen answer.

    python train_dpo.py --algo cpo
    python train_dpo.py --algo cpo --loss_type cpo simpo sft

Source: arXiv 2401.08417; form and weights as in TRL's experimental trainer (beta 0.1, cpo_alpha 1). In the
second command SimPO stands beside it.
"""

from losses import PairLoss, smoothed

SCRIPT = "train_dpo.py"
PRESET = dict(loss_type=["cpo", "sft"], loss_weights=[1.0, 1.0], beta=0.1, nll_normalization="token")


def cpo_loss(r_w, r_l, *, beta, s_w, s_l, label_smoothing=0.0, **_):
    """CPO (arXiv 2401.08417): -log sigma(beta (s_w - s_l)), s summed over tokens."""
    return smoothed(beta * (s_w - s_l), label_smoothing)


PAIR_LOSSES = {"cpo": PairLoss(cpo_loss, reference=False, smoothed=True)}

"""DNO: cDPO with a label for each pair.

    python train_dpo.py --algo dno --model_name_or_path model --dataset rows.jsonl  # column chosen_probs

Source: arXiv 2404.03715; beta is a customary value.
"""

from losses import PairLoss, smoothed

SCRIPT = "train_dpo.py"
PRESET = dict(loss_type=["dno"], beta=0.1)


def dno_loss(r_w, r_l, *, beta, chosen_probs, **_):
    """DNO (arXiv 2404.03715), cDPO with a label for each pair: -P log sigma(m) - (1 - P) log sigma(-m), P the
    probability that chosen is the better answer; DNO's is sigma of the difference of expected wins."""
    return smoothed(beta * (r_w - r_l), 1 - chosen_probs)


PAIR_LOSSES = {"dno": PairLoss(dno_loss, columns={"chosen_probs": (0, 1)})}

"""GPO: SPPO's regression on scores of a general preference model, which have no bounds.

    python train_dpo.py --algo gpo --model_name_or_path model --dataset rows.jsonl  # columns *_scores

Source: arXiv 2410.02197. The scores are those of the authors' code, the mean over a prompt's answers j of
table[i][j] - table[j][i], clamped at 1000; the loss, SPPO's without its 1/2, is from accounts, since that
trainer is not published. Their optimizer is RMSprop, where AdamW stands here.
"""

from losses import PairLoss

SCRIPT = "train_dpo.py"
PRESET = dict(loss_type=["gpo"], beta=1e-3, learning_rate=5e-7)


def gpo_loss(r_w, r_l, *, beta, chosen_scores, rejected_scores, **_):
    """GPO (arXiv 2410.02197): (r_w - s_w / beta)^2 + (r_l - s_l / beta)^2, s an answer's mean preference."""
    return (r_w - chosen_scores / beta) ** 2 + (r_l - rejected_scores / beta) ** 2


PAIR_LOSSES = {"gpo": PairLoss(
    gpo_loss, columns={"chosen_scores": (-1e6, 1e6), "rejected_scores": (-1e6, 1e6)})}

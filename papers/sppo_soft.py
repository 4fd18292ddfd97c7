"""SPPO with win probabilities from the data.

    python train_dpo.py --algo sppo_soft --model_name_or_path model --dataset rows.jsonl  # chosen_probs_*

Source: arXiv 2405.00675; the authors' code has half of both terms, and RMSprop, where AdamW stands here.
"""

from losses import PairLoss

SCRIPT = "train_dpo.py"
PRESET = dict(loss_type=["sppo_soft"], beta=1e-3, learning_rate=5e-7)


def sppo_soft_loss(r_w, r_l, *, beta, chosen_probs_win, chosen_probs_lose, **_):
    """SPPO (arXiv 2405.00675): (r_w - (P_w - 1/2) / beta)^2 + (r_l - (P_l - 1/2) / beta)^2, P the probability
    that an answer beats the policy's own. P = 1, 0 is `sppo_hard`; the authors' code has half of both."""
    return (r_w - (chosen_probs_win - 0.5) / beta) ** 2 + (r_l - (chosen_probs_lose - 0.5) / beta) ** 2


PAIR_LOSSES = {"sppo_soft": PairLoss(
    sppo_soft_loss, columns={"chosen_probs_win": (0, 1), "chosen_probs_lose": (0, 1)})}

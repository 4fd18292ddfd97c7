"""EGPO's regression, offline. Its on-policy answers and extragradient steps, which restore weights and
moments, would need another loop and are not here.

    python train_dpo.py --algo egpo --model_name_or_path model --dataset rows.jsonl  # chosen_probs_*

Source: arXiv 2503.08942 and its code. There the answers are the policy's own: the pair's at temperature 2 and
top_k 10, the third one at temperature 1.
"""

from losses import PairLoss

SCRIPT = "train_dpo.py"
PRESET = dict(loss_type=["ipo_soft"], beta=0.1)


def ipo_soft_loss(r_w, r_l, *, beta, n_w, n_l, chosen_probs_win, chosen_probs_lose, **_):
    """EGPO's regression (arXiv 2503.08942), offline: (r_w / n_w - r_l / n_l - (P_w - P_l) / beta)^2, P the
    probability to beat one and the same third answer. Log-ratios are means over tokens, as in its code."""
    return (r_w / n_w - r_l / n_l - (chosen_probs_win - chosen_probs_lose) / beta) ** 2


PAIR_LOSSES = {"ipo_soft": PairLoss(
    ipo_soft_loss, columns={"chosen_probs_win": (0, 1), "chosen_probs_lose": (0, 1)})}

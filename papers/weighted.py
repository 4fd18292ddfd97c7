"""A column of the data multiplies each pair's losses; their count stays the number of pairs.

    python train_dpo.py --algo mpo weighted --weight_column w --model_name_or_path model --dataset rows.jsonl

Source: no paper; weights of samples as they are usual.
"""

from dataclasses import dataclass

SCRIPT = "train_dpo.py"


@dataclass
class Flags:
    weight_column: str | None = None  # column of the data that multiplies each pair's losses


def check(args):
    """Without a column nothing is weighed."""
    if args.weight_column is None:
        raise ValueError("weighted needs --weight_column, the column of the data that weighs the pairs")


def columns(args) -> dict[str, tuple[float, float]]:
    """What every row must have, and its range."""
    return {args.weight_column: (0, 1e6)}


def pair_weights(pair, args, columns):
    """(B,)"""
    return columns[args.weight_column]

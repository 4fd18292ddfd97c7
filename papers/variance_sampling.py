"""Draw the prompts more often whose rewards varied when they were last sampled.

    python train_grpo.py --algo grpo variance_sampling --variance_sampling 0.5

Source: MMR1, arXiv 2509.21268, and its code. MMR1 weighs a row by 0.8 variance + 0.2 trajectory diversity and
estimates all rows anew every few steps; here it is the variance of the row's last rollout alone. No rollout
more, but an epoch leaves out that share of its rows.
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from model import warn

SCRIPT = "train_grpo.py"
STATE = {"variance": {}, "measured": {}}  # {row: variance of its rewards}: before this rollout, and in it


@dataclass
class Flags:
    variance_sampling: Annotated[float, "[0, 1)"] = 0.5  # share of the prompts, drawn by how much their
    # rewards varied when last sampled


def check(args):
    """What it costs is said."""
    warn("variance sampling: no rollout more, but an epoch leaves out "
         f"{args.variance_sampling:.0%} of its rows, for rows whose last rewards varied")


def row_of(args, plan, draws, state):
    """The rows of these draws: the plan's; at a share of them, keyed by (seed, draw), one by the weights
    {row: variance of its rewards}."""
    variance, share = state["variance"], args.variance_sampling
    rows, total = [int(i) for i in variance], np.cumsum([0.0, *variance.values()])
    for draw in draws:
        u, v = np.random.default_rng([args.seed, draw, 1]).random(2)
        chosen = np.searchsorted(total[1:-1], v * total[-1], "right")
        yield rows[chosen] if u < share and total[-1] > 0 else plan[draw]


def before_rollout(state):
    """What was measured in the last rollout holds from here on."""
    state["variance"] |= state["measured"]


def after_rollout(state, variance_of_rows):
    """{row: variance of its rewards in this rollout}"""
    state["measured"] = {str(row): value for row, value in variance_of_rows.items()}

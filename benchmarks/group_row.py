"""Draw the group row of the README: tokens, segments, positions, and the mask that model.py makes of them.

    python benchmarks/group_row.py benchmarks/group_row.png      # pip install matplotlib
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib  # noqa: E402

matplotlib.use("agg")

import torch  # noqa: E402
from matplotlib import pyplot  # noqa: E402

import model  # noqa: E402

PARTS = [["img", "img", "how", "many"], ["i", "see", "3"], ["3", "!"], ["i", "count", "2"]]
COLORS = ["#7a8794", "#4c9f70", "#d98c3f", "#5b7fc7"]  # prompt, completions


def main():
    tokens = [token for part in PARTS for token in part]
    segments = torch.tensor([[s for s, part in enumerate(PARTS) for _ in part]])                # (1, S)
    positions = [i + (len(PARTS[0]) if s else 0) for s, part in enumerate(PARTS) for i in range(len(part))]
    mask = model.group_attention_mask(segments, torch.zeros_like(segments))[0, 0]               # (S, S)
    allowed = mask if mask.dtype == torch.bool else mask == 0
    S, segments = len(tokens), segments[0].tolist()

    figure, panel = pyplot.subplots(figsize=(6.4, 5.6))
    for q in range(S):
        for k in range(S):
            panel.add_patch(pyplot.Rectangle((k, q), 1, 1, edgecolor="white",
                                             facecolor=COLORS[segments[k]] if allowed[q, k] else "#f2f2f2"))
        panel.text(-0.2, q + 0.5, tokens[q], ha="right", va="center")
        for row, text in enumerate((tokens[q], segments[q], positions[q])):
            panel.text(q + 0.5, -2.3 + row * 0.8, text, ha="center", va="center", color=COLORS[segments[q]],
                       weight="bold")
    for row, name in enumerate(("token", "segment", "position")):
        panel.text(-0.2, -2.3 + row * 0.8, name, ha="right", va="center", style="italic")
    for s, name in enumerate(("prompt", "completion 1", "completion 2", "completion 3")):
        first = segments.index(s)
        panel.text(first + len(PARTS[s]) / 2, -3.2, name, ha="center", color=COLORS[s], weight="bold", size=9)
    panel.text(S / 2, S + 0.6, "a token (row) attends to the coloured tokens (columns)", ha="center")
    panel.set(xlim=(-2, S), ylim=(S + 0.9, -3.6))
    panel.axis("off")
    figure.tight_layout()
    figure.savefig(sys.argv[1], dpi=100)


if __name__ == "__main__":
    main()

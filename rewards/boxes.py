"""Rewards that compare a bounding box with the solution's."""

import math
import re

from .answers import compare, plain


def iou(completions, solution, **_):
    """Intersection over union of the answer's box and the solution's (VLM-R1). A box is [x1, y1, x2, y2].

    Both are in the same pixels, and nothing is rescaled: where the model answers in pixels of the resized
    picture (Qwen2.5-VL), the solution must be in those. No box, or one turned inside out, is 0.

    Coordinates are edges: width = x2 - x1, without the + 1 of older detection code, which moves the IoU of
    boxes w by h by up to about 1/w + 1/h; so does rounding to whole pixels.
    """
    return compare(read_box, completions, solution, overlap, kind="iou")


def overlap(a, b):
    """Area of the intersection / area of the union."""
    sides = [min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1)]
    inside = math.prod(max(0.0, side) for side in sides)
    areas = sum((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (a, b))
    return inside / (areas - inside)


def read_box(text: str):
    """The four numbers in brackets, or of the whole text, if they are one box; else None."""
    text, number = plain(text)[:1000], r"(?<![\w.])[-+]?\d+(?:\.\d+)?"
    bracketed = set(re.findall(rf"[\[(] ?{number}(?: ?, ?{number}){{3}} ?[\])]", text))
    found = [float(n) for n in re.findall(number, bracketed.pop() if len(bracketed) == 1 else text)]
    return found if len(found) == 4 and found[0] < found[2] and found[1] < found[3] else None


READERS = {"iou": read_box}

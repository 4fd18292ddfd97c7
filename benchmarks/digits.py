"""Real images: write scikit-learn's 1,797 handwritten digits (8 x 8 scans, UCI) as PNG files with JSONL rows.

    pip install scikit-learn
    python benchmarks/digits.py digits          # digits/{train,test}.jsonl, digits/images/*.png

A fixed shuffle holds 500 scans out. The other 1,297 are each written four times, moved by up to 2 of the 48 pixels, so
that a model trained from nothing on so few pictures generalises. Each row has prompt, image, solution, and a right
(chosen) and a wrong (rejected) answer, so that both scripts can train on it. README.md has the commands and results.
"""

import json
import random
import sys
from pathlib import Path

from PIL import Image


def main(folder: str):
    from sklearn.datasets import load_digits

    digits, folder, rng = load_digits(), Path(folder), random.Random(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    order = list(range(len(digits.images)))
    rng.shuffle(order)
    say = "<think>this is a {0}</think><answer>{0}</answer>".format
    for split, indices, copies in (("train", order[:1297], 4), ("test", order[1297:], 1)):
        with open(folder / f"{split}.jsonl", "w") as file:
            for i, copy in ((i, copy) for i in indices for copy in range(copies)):
                right = int(digits.target[i])
                wrong = rng.choice([d for d in range(10) if d != right])
                scan = Image.fromarray((255 - digits.images[i] * 255 / 16).astype("uint8"))     # 0..16 ink on white
                image, reach = Image.new("L", (48, 48), 255), 2 if copies > 1 else 0
                image.paste(scan.resize((48, 48), Image.Resampling.BICUBIC),
                            (rng.randint(-reach, reach), rng.randint(-reach, reach)))
                image.save(folder / "images" / f"{i}-{copy}.png")
                file.write(json.dumps(dict(prompt="which digit is this?", image=f"images/{i}-{copy}.png",
                                           solution=str(right), chosen=say(right), rejected=say(wrong))) + "\n")
    print(f"{folder}: {4 * 1297} training rows, {len(order) - 1297} held out")


if __name__ == "__main__":
    main(*sys.argv[1:] or ["digits"])

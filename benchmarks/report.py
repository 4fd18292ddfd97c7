"""An HTML page of a run: its curves, and samples with pictures, rewards and advantages. One file, opened without a server.

    python benchmarks/report.py runs/grpo-1                     # writes runs/grpo-1/report.html
    python benchmarks/report.py runs/grpo-1 --groups 8 --steps 1 50 75

Reads args.json, metrics.jsonl and completions/. Questions and pictures come from the data that args.json names (the
built-in task draws its own), so start it where the run was started. Curves are inline SVG; nothing is loaded or run.
"""

import argparse
import base64
import html
import io
import json
import math
import re
import sys
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2733; max-width: 1180px; margin: 2rem auto; padding: 0 1rem }
h1, h2, h3 { line-height: 1.2 } h2 { margin-top: 2.5rem; border-bottom: 1px solid #d8dee4 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f7f9; padding: .6rem .8rem; border-radius: 4px; margin: 0 }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1.5rem } th { text-align: left; background: #f5f7f9 }
th, td { border: 1px solid #d8dee4; padding: .3rem .6rem; vertical-align: top } td.n { text-align: right; white-space: nowrap }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 1rem }
figure { margin: 0; border: 1px solid #d8dee4; border-radius: 4px; padding: .5rem; font-size: 13px } figcaption { font-weight: 600 }
svg { width: 100%; display: block } svg text { font: 11px system-ui, sans-serif; fill: #57606a }
.group { display: flex; gap: 1rem; align-items: flex-start } .group > div { flex: 1; min-width: 0 }
img { max-width: 220px; max-height: 220px; min-height: 110px; border: 1px solid #d8dee4; image-rendering: pixelated }
.good { background: #dcf5e3 } .bad { background: #fde3e1 } .quiet { color: #57606a }
"""
FIRST = ["eval/accuracy", "eval/reward", "eval/loss", "reward", "reward_std", "frac_reward_zero_std", "rewards/margins",
         "rewards/accuracies", "loss", "grad_norm", "entropy", "kl", "completions/mean_length"]  # then the others


def page(title: str, body: str) -> str:
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
            f"<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n")


def escape(text) -> str:
    """For HTML; control characters, which a page must not hold, as the pictures that Unicode has of them."""
    return html.escape(str(text).translate({i: chr(0x2400 + i) for i in (*range(9), *range(11, 32))}))


def ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers from low to high.

    >>> ticks(0, 1), ticks(0.03, 0.41)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [0.1, 0.2, 0.3, 0.4])
    """
    power = 10.0 ** math.floor(math.log10(high - low))
    step = next(s * power for s in (0.2, 0.5, 1, 2) if (high - low) / (s * power) <= 5.0001)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1)]


def chart(name: str, points: list[tuple[int, float | None]]) -> str:
    """A figure with the curve of [(step, value)], None (nan or infinite in the run) as a red mark on the axis."""
    known = [(x, y) for x, y in points if y is not None]
    if not known:
        return f"<figure><figcaption>{escape(name)}</figcaption><p>never finite</p></figure>"
    W, H, left, bottom, top = 360, 180, 52, 22, 10
    x0, x1 = points[0][0], max(points[-1][0], points[0][0] + 1)
    y0, y1 = min(y for _, y in known), max(y for _, y in known)
    last = f"last {known[-1][1]:.4g}, lowest {y0:.4g}, highest {y1:.4g}"
    if y1 - y0 <= 1e-9 * max(abs(y0), abs(y1), 1e-6):  # one value, and perhaps marks
        y0, y1 = y0 - (abs(y0) or 1) / 2, y1 + (abs(y1) or 1) / 2

    def at(x, y):
        return left + (x - x0) / (x1 - x0) * (W - left - 10), H - bottom - (y - y0) / (y1 - y0) * (H - bottom - top)

    parts = [f'<svg viewBox="0 0 {W} {H}" role="img" aria-label="{escape(name)}">']
    for value in ticks(y0, y1):
        y = at(x0, value)[1]
        parts.append(f'<line x1="{left}" x2="{W - 10}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e6eaee"/>'
                     f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    parts.append(f'<text x="{left}" y="{H - 5}">{x0}</text><text x="{W - 10}" y="{H - 5}" text-anchor="end">step {x1}</text>')
    for finite, run in groupby(points, lambda point: point[1] is not None):  # a gap where it is not
        places = [at(x, y0 if y is None else y) for x, y in run]
        if finite and len(places) > 1:
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f'<polyline points="{line}" fill="none" stroke="#2463b5" stroke-width="1.6"/>')
        if not finite or len(known) <= 30:
            color = "#2463b5" if finite else "#c62f2f"
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{color}"/>' for x, y in places]
    return (f'<figure><figcaption>{escape(name)}</figcaption>{"".join(parts)}</svg>'
            f'<div class="quiet">{last}</div></figure>')


def rows_of(args: dict, sources: set[str]) -> dict[str, dict]:
    """{source: row} of the rows that completions/ names, from the data that args.json names."""
    found = {}
    for split in ("train", "test"):
        numbers = [int(s.split()[2]) for s in sources if re.fullmatch(rf"shapes {split} \d+", s)]
        found |= {row["_source"]: row for row in data.shapes_rows(max(numbers, default=-1) + 1, args["seed"], split)}
    for names, split in ((args["dataset"], "train"), (args["eval_dataset"], "test")):
        try:
            rows = [] if names is None else data.read_rows(names, args["image_root"], ("prompt",), split)
            found |= {row["_source"]: row for row in data.readable(rows) if row["_source"] in sources}
        except data.RowError as error:
            print(f"without questions and pictures: {error}", file=sys.stderr)
    return found


def pictures(row: dict) -> str:
    """The row's images inside the page, at most 440 pixels wide or high."""
    parts = []
    for image in row["images"]:
        try:
            image = data.load_image(image, row)
        except data.RowError as error:
            parts.append(f'<p class="bad">{escape(error)}</p>')
            continue
        image.thumbnail((440, 440))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        parts.append(f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">')
    return "".join(parts)


def question(row: dict) -> str:
    """The prompt's text, message by message, an image as [image]."""
    texts = ["".join(block.get("text", "[image]") for block in message["content"]) for message in data.to_messages(row)]
    return "\n".join(texts)


def number(value, shade: bool = False) -> str:
    shown = "abstained" if value is None else f"{value:.4g}"
    color = "" if not shade or not value else " good" if value > 0 else " bad"
    return f'<td class="n{color}">{shown}</td>'


def samples(file: Path, rows: dict[str, dict], count: int) -> str:
    """The first `count` groups of a completions file: what was asked, each completion, its rewards, its advantage."""
    lines, parts = [json.loads(line) for line in open(file)], []
    names = list(lines[0]["rewards"])
    for source, group in [(s, list(g)) for s, g in groupby(lines, lambda line: line["row"])][:count]:
        row = rows.get(source)
        asked = f"<pre>{escape(question(row))}</pre><p>solution: {escape(row.get('solution'))}</p>" if row else ""
        body = "".join(f"<tr><td><pre>{escape(line['completion'])}</pre></td>"
                       + "".join(number(line["rewards"][name]) for name in names)
                       + (number(line["advantage"], shade=True) if "advantage" in line else "") + "</tr>" for line in group)
        head = "".join(f"<th>{escape(name)}</th>" for name in [*names, *(["advantage"] if "advantage" in lines[0] else [])])
        parts.append(f'<div class="group">{pictures(row) if row else ""}<div><span class="quiet">{escape(source)}</span>{asked}'
                     f"<table><tr><th>completion</th>{head}</tr>{body}</table></div></div>")
    return "".join(parts)


def report(run: Path, steps: list[int] | None, count: int) -> str:
    args = json.loads((run / "args.json").read_text())
    metrics = [json.loads(line) for line in open(run / "metrics.jsonl")]
    status = json.loads((run / "status.json").read_text())
    curves = {}
    for line in metrics:
        for key, value in line.items():
            if key not in ("step", "epoch"):
                curves.setdefault(key, []).append((line["step"], value))
    names = [n for n in FIRST if n in curves] + sorted(n for n in curves if n not in FIRST)
    held_out = [(n, curves[n][0][1], curves[n][-1][1]) for n in names if n.startswith("eval/")]

    body = [f"<h1>{escape(run.resolve().name)}</h1>",
            f"<p>{escape(' '.join(args['algo']))}: {escape(status['status'])} at step {status['step']}</p>",
            f"<pre>{escape(' '.join(args['command']))}</pre>"]
    if held_out:
        body += ["<h2>Held-out rows</h2><table><tr><th></th><th>before</th><th>after</th></tr>",
                 *(f"<tr><td>{escape(n)}</td>{number(a)}{number(b)}</tr>" for n, a, b in held_out), "</table>"]
    flat = [n for n in names if len({value for _, value in curves[n]}) == 1]
    body += ['<h2>Curves</h2><div class="charts">', *(chart(n, curves[n]) for n in names if n not in flat), "</div>"]
    body.append(f"<p>The same at every step: {escape(', '.join(f'{n} {curves[n][0][1]}' for n in flat))}</p>" if flat else "")

    files = {kind: {int(f.stem.split("_")[1]): f for f in (run / "completions").glob(f"{kind}_*.jsonl") if f.stat().st_size}
             for kind in ("step", "eval")}
    for kind, title in (("step", "Completions of the rollout that step {} starts with"), ("eval", "Held-out answers, step {}")):
        there = sorted(files[kind])
        shown = [s for s in there if steps is None or s in steps]
        if steps is None and len(shown) > 3:
            shown = [shown[0], shown[len(shown) // 2], shown[-1]]
        sources = {json.loads(line)["row"] for step in shown for line in open(files[kind][step])}
        rows = rows_of(args, sources)
        for step in shown:
            body.append(f"<h2>{title.format(step)}</h2><p class='quiet'>the first {count} questions of {files[kind][step].name}"
                        f"</p>{samples(files[kind][step], rows, count)}")
    settings = "\n".join(f"{key}: {value}" for key, value in args.items())
    body.append(f"<h2>Settings</h2><details><summary>args.json</summary><pre>{escape(settings)}</pre></details>")
    return page(run.resolve().name, "\n".join(body))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's --output_dir")
    parser.add_argument("--output", type=Path, help="default: report.html in it")
    parser.add_argument("--steps", type=int, nargs="+", help="of completions/; default: first, middle, last")
    parser.add_argument("--groups", type=int, default=4, help="questions shown of each")
    args = parser.parse_args(argv)
    output = args.output or args.run / "report.html"
    output.write_text(report(args.run, args.steps, args.groups), encoding="utf-8")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()

"""Several models' answers to the same image questions, side by side, and each model's measured accuracy.

    python benchmarks/compare.py base=runs/grpo-1/cold_start/final MPO=runs/mpo-1/final GRPO=runs/grpo-1/final
    python benchmarks/compare.py Qwen/Qwen2.5-VL-3B-Instruct runs/gspo-7/final --dataset test.jsonl --image_root images

A model is a folder or a hub id, with NAME= in front if it is to have a name. Without --dataset the questions are the
256 held-out ones of the built-in task. Accuracy is over all rows, the table shows the first --rows of them. Writes
compare.html (with the pictures, in one file) and compare.md into --output, and prints the latter.
"""

import argparse
import math
import sys
from pathlib import Path

from report import ROOT, data, escape, page, pictures, question

import model
import rollout


MARK = {True: ("good", "✓"), False: ("bad", "✗")}  # of an answer: class in the page, sign in markdown


def answers(path: str, rows: list[dict], rewards, args):
    """(texts, scores) of n answers to each row, (rows * n,)."""
    policy, processor = model.load_policy(path, args.dtype, args.device)
    n = args.num_generations_eval
    texts, scores = rollout.evaluate(
        policy, processor, rows, range(len(rows)), map(lambda row: data.encode_prompt(policy, processor, row), rows), rewards,
        temperature=args.temperature, max_completion_length=args.max_completion_length, batch_size=args.batch_size,
        seed=args.seed, step=0, num_generations=n)
    return texts, scores[0]


def accuracy_of(scores, n: int) -> dict[str, str]:
    """Accuracy with its standard error over the rows, and pass@k."""
    rows = scores.view(-1, n).nanmean(-1)  # (rows,)
    rows = rows[~rows.isnan()]
    mean, error = rows.mean().item(), rows.std(correction=0).item() / math.sqrt(len(rows))
    passed = {key.removeprefix("eval/"): f"{s / c:.3f}" for key, (s, c) in rollout.pass_at_k(scores, n).items() if c}
    return {"accuracy": f"{mean:.3f} ± {error:.3f}", **passed}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("models", nargs="+", help="[NAME=]folder or hub id")
    add("--dataset", help=".jsonl or .json with solutions; none: the built-in task's held-out rows")
    add("--image_root")
    add("--reward", default="accuracy", help="a built-in reward, or path/to/file.py:function, that judges")
    add("--rows", type=int, default=8, help="of the table")
    add("--num_generations_eval", type=int, default=1, help="answers to each question; the first is shown")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--max_completion_length", type=int, default=256)
    add("--batch_size", type=int, default=64)
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
    add("--device", default="cpu")
    add("--seed", type=int, default=0, help="of the sampling, and of the built-in task's rows")
    add("--output", type=Path, default=Path("."))
    args = parser.parse_args(argv)
    n = args.num_generations_eval
    if n < 1 or n > 1 and args.temperature <= 0:
        parser.error("--num_generations_eval above 1 needs --temperature above 0")
    if args.dataset is None:
        rows = data.shapes_rows(256, args.seed, "test")
    else:
        rows = data.read_rows(args.dataset, args.image_root, ("prompt", "solution"))
    rewards = rollout.RewardRunner([args.reward])
    named = [(m.split("=", 1) if "=" in m else (m, m)) for m in args.models]
    found = {name: answers(path, rows, rewards, args) for name, path in named}
    rewards.close()
    results = {name: accuracy_of(scores, n) for name, (_, scores) in found.items()}

    def markdown(text):
        return text.replace("|", "\\|").replace("`", "'").replace("\n", " ")

    first = next(iter(results.values()))
    lines = ["| model | " + " | ".join(first) + " |", "|---" * (len(first) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(result.values()) + " |" for name, result in results.items()]
    lines += ["", "| question | solution | " + " | ".join(found) + " |", "|---" * (len(found) + 2) + "|"]
    table = ""
    for i, row in enumerate(rows[:args.rows]):
        given = [(texts[i * n], scores[i * n].item()) for texts, scores in found.values()]
        cells = [f"{MARK[score > 0][1]} `{markdown(text)}`" for text, score in given]
        lines.append(f"| {row['_source']} | {markdown(str(row.get('solution')))} | " + " | ".join(cells) + " |")
        table += (f"<tr><td>{pictures(row)}<br><span class='quiet'>{escape(row['_source'])}</span><pre>{escape(question(row))}"
                  f"</pre></td><td>{escape(row.get('solution'))}</td>" + "".join(
                      f'<td class="{MARK[score > 0][0]}"><pre>{escape(text)}</pre></td>' for text, score in given)
                  + "</tr>\n")
    how = "greedy" if args.temperature == 0 else f"sampled at temperature {args.temperature:g}, {n} a question"
    head = "".join(f"<th>{escape(name)}</th>" for name in found)
    measured = "".join(f"<tr><td>{escape(name)}</td>" + "".join(f'<td class="n">{x}</td>' for x in result.values()) + "</tr>"
                       for name, result in results.items())
    body = (f"<h1>{len(rows)} questions, {len(found)} models</h1><p>{how}; judged by {escape(args.reward)}</p>"
            f"<table><tr><th>model</th>{''.join(f'<th>{key}</th>' for key in first)}</tr>{measured}</table>"
            f"<h2>The first {min(args.rows, len(rows))}</h2><table><tr><th>question</th><th>solution</th>{head}</tr>\n{table}"
            "</table><h2>Models</h2><ul>" + "".join(f"<li>{escape(a)}: {escape(b)}</li>" for a, b in named) + "</ul>")
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "compare.html").write_text(page("compare", body), encoding="utf-8")
    (args.output / "compare.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    print(f"\nwrote {args.output / 'compare.html'} and compare.md", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except model.InputError as error:
        sys.exit(f"error: {error}")

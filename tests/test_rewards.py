"""The built-in rewards on hand-labelled strings, and the process that runs reward functions."""

import ast
import copy
import ctypes
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ENVIRONMENT, ROOT, python
from test_runs import flags, task  # noqa: F401 (fixture)

import rollout
import train_grpo
from rewards import BUILT_IN, answers, boxes, form, process

FORMAT = [
    ("<think>a</think><answer>4</answer>", 1), ("<think>a\nb</think>\n<answer>4</answer>", 1),  # R1-V's lacked DOTALL
    ("<think>a</think>\n\n<answer>\n4\n</answer>\n", 1), ("  <think></think><answer></answer>", 1),
    ("<think>a</think> so <answer>4</answer>", 0), ("<answer>4</answer>", 0), ("<think>a</think>", 0), ("", 0),
    ("4", 0), ("<think>a</think><answer>4", 0), ("x <think>a</think><answer>4</answer>", 0),
    ("<think>a</think><answer>4</answer> and more", 0), ("<Think>a</Think><answer>4</answer>", 0),
    ("<think>ünï 汉字</think><answer>😀</answer>", 1), ("<think>" + "a" * 50_000 + "</think><answer>4</answer>", 1),
]

ACCURACY = [  # completion, solution, reward
    ("<think>i see 3</think><answer>4</answer>", "4", 1), ("<answer>5</answer>", "4", 0),
    ("<answer> 4 </answer>", 4, 1), ("<answer>4.0</answer>", "4", 1), ("<answer>1,000</answer>", "1000", 1),
    ("<answer>0.25</answer>", ".25", 1), ("<answer>-3</answer>", "3", 0), ("<answer>1e3</answer>", "1000", 1),
    ("<answer>4</answer> no <answer>5</answer>", "5", 1), ("<answer>4</answer> no <answer>5</answer>", "4", 0),
    ("<answer>4", "4", 1), ("4", "4", 1), ("", "4", 0), ("<answer></answer>", "4", 0),
    ("<answer>B</answer>", "B", 1), ("<answer>(b)</answer>", "B", 1), ("<answer>B. a dog</answer>", "(B)", 1),
    ("A picture of two dogs.", "A", 0), ("<answer>a red ball</answer>", "A", 0), ("I do not know", "I", 0),
    ("<answer>e - 3</answer>", "E", 0), ("<answer>b: yes</answer>", "B", 1), ("<answer>b)</answer>", "B", 1),
    ("<answer>Both</answer>", "B", 0), ("<answer>A</answer>", "B", 0), ("<answer>a red ball</answer>", "A red  ball.", 1),
    (r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}", 1), (r"\boxed{1} then \boxed{2}", "2", 1), (r"\boxed{3", "3", 0),
    (r"$\boxed{7}$", "<answer>7</answer>", 1), ("<answer>$3$</answer>", "3", 1), ("<answer>12</answer>", "1", 0),
    ("<answer>四</answer>", "四", 1), ("<answer>50%</answer>", "50", 1), ("x" * 100_000 + "<answer>4</answer>", "4", 1),
    ("<answer>yes</answer>", "Yes", 1), ("<answer>4</answer>", None, None),
]


@pytest.mark.parametrize("text, expected", FORMAT, ids=range(len(FORMAT)))
def test_format(text, expected):
    """open-r1 #237: without DOTALL multi-line reasoning always scores 0; anything around the tags scores 0."""
    assert form.think_format([text]) == [expected]


@pytest.mark.parametrize("text, solution, expected", ACCURACY, ids=range(len(ACCURACY)))
def test_accuracy(text, solution, expected):
    """Text, number, choice letter; the last answer counts; a row without solution abstains."""
    assert answers.accuracy([text], solution=[solution]) == [expected]


LABELS = [json.loads(line) for line in open(Path(__file__).parent / "data" / "rewards.jsonl")]
TEXT_REWARDS = ("format", "tag_count", "accuracy", "numeric", "counting", "choice")


def built_in(name):
    file, function = BUILT_IN[name].split(":")
    return getattr({"answers.py": answers, "boxes.py": boxes, "form.py": form}[file], function)


def has_math_verify():
    try:
        import math_verify  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.mark.parametrize("name", TEXT_REWARDS)
def test_hand_labelled_strings(name):
    """P19: at least 200 strings a reward (newlines in tags, two boxes, nested and open braces, unicode digits, minus signs
    and spaces, thousands, percent, fractions, choice letters in prose, tags twice, upper case, empty), labelled by hand:
    what a sensible reader says, not what the code did. Where readers differ, the policy is:

    format, tag_count  each of the four tags exactly once, also counting a tag that is only mentioned; empty reasoning or
        answers are well formed; white space (no zero-width space) may stand around and between; tags are lower case
    accuracy  the last <answer>, else the last box, in capitals too, and nothing but the answer in it ("Option B" is B, "four" is 4); an unclosed
        box is no answer; 1/2 = 0.5 = 50%, and 50% = 50; no rounding; a decimal comma is none; words, units and equations
        around it are wrong without math-verify and right with it (`accuracy_math_verify`; null: it is wrong there)
    numeric  the one number in the answer, whatever the words; two numbers, bounds, powers (but of ten, and of units), roots, products are wrong
    counting  the one count, in digits or English words; two different counts are wrong, "none" is none
    choice  a letter alone, one followed by ")", "." or ":", "answer is B", or the only letter; "A" and "I" in a sentence
        are article and pronoun; two letters are wrong
    """
    rows = [row for row in LABELS if name in row]
    assert len(rows) >= 200 and len({(row["text"], row.get("solution")) for row in rows}) == len(rows)
    for row in rows:
        label = row[name]
        if name == "accuracy" and has_math_verify():
            label = row.get("accuracy_math_verify", label)
        got = built_in(name)([row["text"]], solution=[row.get("solution")])
        assert label is None or got == [label], (row, got)


PUBLISHED = [json.loads(line) for line in open(Path(__file__).parent / "data" / "answers.jsonl")]


@pytest.mark.parametrize("name", ["accuracy", "numeric", "counting", "choice", "iou"])
def test_answers_as_published(name):
    """Answers and solutions in the forms of published data (degrees, units, roots, mixed numbers, powers of ten, lettered
    solutions, indices, Chinese stops, a number beside a box): right answers scored 0. `math_verify`: it takes that."""
    rows = [row for row in PUBLISHED if row["reward"] == name and (has_math_verify() or not row.get("math_verify"))]
    wrong = [row for row in rows if built_in(name)([row["text"]], [row["solution"]]) != [row["expect"]]]
    assert len(rows) > 10 and not wrong


def test_solutions_that_take_math_verify(monkeypatch):
    """Without it a solution in LaTeX was compared as text, and nothing told the user to install it."""
    monkeypatch.setattr(train_grpo, "find_spec", lambda name: None)
    for solution in (r"\sqrt{3}", r"$$2\pi$$", ["7", "x^2"], r"\boxed{60x^2}"):
        with pytest.raises(train_grpo.data.RowError, match="rows:1: --reward_funcs accuracy: .*pip install"):
            train_grpo.check_solution({"solution": solution, "_source": "rows:1"}, ["format", "accuracy"])
        train_grpo.check_solution({"solution": solution, "_source": "rows:1"}, ["format"])
    for solution in (r"145^\circ", r"\frac{1}{2}", r"\boxed{A}", "B. a dog", 7, r"\text{yes}", r"3 \times 10^5", "$1,234.50"):
        train_grpo.check_solution({"solution": solution, "_source": "rows:1"}, ["accuracy"])


LONG = "so " * 33_334
LONG_LABELS = [  # text of 100,000 characters and more, solution, {reward: label}
    (f"<think>{LONG}</think><answer>4</answer>", "4", dict(format=1, tag_count=1, accuracy=1, numeric=1, counting=1)),
    (f"<think>{LONG}</think><answer>(B)</answer>", "B", dict(format=1, tag_count=1, accuracy=1, choice=1)),
    (f"<think>a</think><answer>{LONG}</answer>", "4", dict(format=1, tag_count=1, accuracy=0, numeric=0, counting=0)),
    (f"<think>{LONG}", "B", dict(format=0, tag_count=0.25, accuracy=0, choice=0)),
    (f"<answer>{LONG} 4</answer>", "4", dict(format=0, tag_count=0.5, accuracy=0, numeric=1, counting=1)),
    ("4" * 100_000, "4", dict(format=0, tag_count=0, accuracy=0, numeric=0, counting=0))]


@pytest.mark.parametrize("text, solution, labels", LONG_LABELS, ids=range(len(LONG_LABELS)))
def test_long_strings(text, solution, labels):
    """A reasoning of 100,000 characters is well formed (format once cut its text there, and found no end)."""
    assert len(text) >= 100_000
    for name, label in labels.items():
        assert built_in(name)([text], solution=[solution]) == [label], name


def test_rewards_take_long_and_nasty_text_quickly():
    """No pattern of ours is worse than linear."""
    began = time.perf_counter()
    for text in ("<think>" * 20_000, "<think>" + "</think><answer>" * 5_000, "\\boxed{" * 20_000, "{" * 100_000,
                 "1," * 50_000, "111," * 25_000 + "1", "\\frac{" * 15_000, "minus " * 16_000, "answer is " * 10_000,
                 "option " * 60_000,  # a letter was looked for behind each run of them: quadratic
                 "(A) " * 25_000, "-" * 100_000, " " * 100_000, "<answer>" + "\\text{1" * 15_000, "\ufdfa" * 100_000):
        for name in TEXT_REWARDS:
            built_in(name)([text], solution=["B" if name == "choice" else "4"])
    assert time.perf_counter() - began < 10


def test_the_blogs_rewards_fail_our_labels():
    """The regex of TRL's blog (and open-r1's first) lacks DOTALL: every reasoning of two lines scores 0. Ours has it; the
    labels tell the two apart."""

    def blog(text):
        return float(re.match(r"^<think>.*?</think>\s*<answer>.*?</answer>$", text) is not None)

    wrong = [row["text"] for row in LABELS if "format" in row and blog(row["text"]) != row["format"]]
    assert "<think>a\nb</think>\n<answer>4</answer>" in wrong and sum("\n" in text for text in wrong) > 10


def test_math_verify_gets_the_gold_first():
    """The blog calls verify(answer, gold), and gives 1 where the gold cannot be parsed. math-verify takes gold first: an
    interval for a gold inequality is right, the swapped call says wrong."""
    math_verify = pytest.importorskip("math_verify")
    gold, answer = r"x<3", r"(-\infty,3)"
    assert answers.accuracy([rf"so \boxed{{{answer}}}"], solution=[gold]) == [1.0]
    parsed = [math_verify.parse(f"${s}$", parsing_timeout=None) for s in (answer, gold)]
    assert not math_verify.verify(*parsed, timeout_seconds=None)
    assert answers.accuracy([r"\boxed{7}"], solution=["no mathematics at all"]) == [0.0]


def test_rewards_abstain_without_a_solution_and_refuse_one_that_cannot_be_read():
    """A row without solution is None, never 0; a solution that no answer could equal is an error of the data."""
    for name, bad in (("numeric", "3 or 4"), ("counting", "-1"), ("choice", "a dog"), ("iou", "[3, 1, 2, 4]")):
        reward = built_in(name)
        assert reward(["<answer>x</answer>"], solution=[None]) == [None]
        with pytest.raises(ValueError, match="solution"):
            reward(["<answer>x</answer>"], solution=[bad])


@pytest.mark.parametrize("answer, expected", [
    ("[0, 0, 10, 10]", 1.0), ("0 0 10 10", 1.0), ('{"bbox_2d": [0, 0, 10.0, 10]}', None), ("[0, 0, 10, 5]", 0.5),
    ("[5, 0, 15, 10]", 50 / 150), ("[5, 5, 15, 15]", 25 / 175), ("[10, 0, 20, 10]", 0.0), ("[20, 20, 30, 30]", 0.0),
    ("[10, 10, 0, 0]", 0.0), ("[0, 0, 0, 10]", 0.0), ("[0, 0, 10]", 0.0), ("[0, 0, 10, 10, 1]", 0.0), ("no box", 0.0),
    ("[-5, 0, 5, 10]", 50 / 150), ("(0, 0), (10, 10)", 1.0), ("[1, 1, 9, 9]", 0.64), ("", 0.0)])
def test_iou_by_hand(answer, expected):
    """VLM-R1's helper adds 1 to one side and takes it off another. Ours: edges, no + 1; touching boxes do not overlap; a box
    turned inside out is none. A key with a digit is a fifth number only if it stands alone."""
    expected = 1.0 if expected is None else expected
    for gold in ("[0, 0, 10, 10]", [0, 0, 10, 10], "<answer>[0, 0, 10, 10]</answer>"):
        assert boxes.iou([f"<answer>{answer}</answer>"], solution=[gold]) == [pytest.approx(expected)]


@pytest.mark.parametrize("w, h", [(5, 8), (20, 30), (100, 40)])
def test_iou_error_of_the_other_convention_and_of_rounding(w, h):
    """What the docstring says of the + 1 convention and of whole pixels: at most about 1/w + 1/h."""
    gold = [10.5, 20.5, 10.5 + w, 20.5 + h]
    rounded = [x + d for x, d in zip(gold, (0.5, 0.5, -0.5, -0.5))]
    assert 1 - boxes.iou([f"<answer>{rounded}</answer>"], solution=[gold])[0] <= 1 / w + 1 / h
    shifted = [x + 1 for x in gold]
    ours = boxes.iou([f"<answer>{shifted}</answer>"], solution=[gold])[0]
    plus_one = w * h / (2 * (w + 1) * (h + 1) - w * h)
    assert ours == pytest.approx((w - 1) * (h - 1) / (2 * w * h - (w - 1) * (h - 1)))
    assert 0 < plus_one - ours < 1 / w + 1 / h


def lengths(*counts):
    return dict(completion_ids=[list(range(n)) for n in counts], max_completion_length=[100] * len(counts))


def test_cosine_by_hand():
    """arXiv 2502.03373 with TRL's defaults: right 1 to 0.5, wrong -1 to -0.5 as the answer grows; never beyond the end
    (cos is periodic); no solution abstains. TRL's own example: 50 of 100 tokens give 0.75 and -0.75."""
    texts, gold = [r"\boxed{4}"] * 4 + [r"\boxed{5}"] * 4 + ["4"], ["4"] * 8 + [None]
    got = answers.cosine(texts, gold, **lengths(0, 50, 100, 150, 0, 50, 100, 150, 5))
    assert got[:8] == pytest.approx([1, 0.75, 0.5, 0.5, -1, -0.75, -0.5, -0.5]) and got[8] is None


def test_repetition_penalty_by_hand():
    """TRL's example [1 2 3 4], [5 5 5 5 5] with bigrams gives 0, -0.75; shorter than an n-gram is 0."""
    ids = [[1, 2, 3, 4], [5] * 5, [1], [], [1, 2, 1, 2, 1]]
    assert form.repetition_penalty([""] * 5, ids, ngram_size=2) == pytest.approx([0, -0.75, 0, 0, -0.5])
    assert form.repetition_penalty([""] * 5, ids) == pytest.approx([0, -2 / 3, 0, 0, -1 / 3])


def test_soft_overlong_by_hand():
    """DAPO eq. 13: 0 up to 80 of 100 tokens, then linear to -1 at 100; TRL's example: 90 tokens give -0.5."""
    ids = lengths(0, 80, 81, 90, 100, 120)
    assert form.soft_overlong([""] * 6, **ids) == pytest.approx([0, 0, -0.05, -0.5, -1, -1])
    assert form.soft_overlong([""] * 6, **ids, soft_punish_cache=40) == pytest.approx(
        [0, -0.5, -0.525, -0.75, -1, -1])


@pytest.mark.parametrize("kind", ["text", "added", "special"])
def test_rewards_see_tags_whatever_tokens_they_are(loaded, kind):
    """Tags that a tokenizer has as special tokens were stripped: format and accuracy were 0 for ever. End and padding
    tokens go, wherever they stand."""
    policy, processor = loaded("qwen2_5_vl")
    tokenizer = copy.deepcopy(processor.tokenizer)
    if kind != "text":
        tokenizer.add_tokens(list(form.TAGS), special_tokens=kind == "special")
    text = "<think>i see 4</think><answer>4</answer>"
    ids = tokenizer(text)["input_ids"]
    assert (tokenizer.decode(ids, skip_special_tokens=True) == text) == (kind != "special")
    ids = torch.tensor([[*ids[:3], policy.pad_id, *ids[3:], policy.eos_ids[0]]])
    sampled = rollout.Rollout(ids, torch.ones(ids.shape, dtype=torch.bool), None, None)
    texts = rollout.decode(policy, SimpleNamespace(tokenizer=tokenizer), sampled, [SimpleNamespace(tokens=ids[0, :3])])
    assert texts == [text] and form.think_format(texts) == [1] and answers.accuracy(texts, solution=["4"]) == [1]


@pytest.mark.parametrize("end, begins", [("assistant\n<think>\n", "<think>\n"), ("assistant\n<think>", "<think>"),
                                         ("a <think> b", ""), ("<think>\n\n</think>\n\n", "")])
def test_what_the_template_opened_counts_as_said(loaded, end, begins):
    """Thinking models, whose template ends the prompt with <think>: `format` was 0 and `tag_count` 0.75 for ideal answers.
    TRL's think_format_reward is there by its name."""
    policy, processor = loaded("qwen2_5_vl")
    said = "so\n</think>\n<answer>5</answer>"
    ids = torch.tensor([processor.tokenizer(said)["input_ids"]] * 4)
    prompts = [SimpleNamespace(tokens=torch.tensor(processor.tokenizer(text)["input_ids"])) for text in ("what?", end)]
    texts = rollout.decode(policy, processor, rollout.Rollout(ids, torch.ones(ids.shape, dtype=torch.bool), None, None), prompts)
    assert texts == [said, said, begins + said, begins + said]
    whole = float(begins != "")
    assert form.think_format(texts) == form.think_format_reward(texts) == [0, 0, whole, whole]
    assert form.think_format_reward(["<think>\nso\n</think>\n5", "<think>a<think>b</think>5", " <think>a</think>5"]) == [1, 0, 0]


def test_ids_of_a_rollout():
    """The ids that rewards get are those that were sampled: EOS included, padding not."""
    result = rollout.Rollout(torch.tensor([[5, 6, 0], [7, 8, 9]]), torch.tensor([[1, 1, 0], [1, 1, 1]]).bool(), None, None)
    assert rollout.id_lists(result) == [[5, 6], [7, 8, 9]]


def test_choose_groups():
    """Dynamic sampling: the first groups whose rewards differ, in the order of draws whoever drew them; the others fill up;
    the next rollout starts after the last draw used, so that what was drawn beyond it is drawn anew."""
    parts = [{"draws": torch.tensor([10, 13]), "score 0": torch.tensor([0.0, 1, 1, 1])},
             {"draws": torch.tensor([11, 12]), "score 0": torch.tensor([1.0, 0, 0, 1])},
             {"draws": torch.tensor([14]), "score 0": torch.tensor([0.0, 1])}]
    weights, variance = torch.ones(1), {10: 0.25, 11: 0.25, 12: 0.25, 13: 0, 14: 0.25}
    assert train_grpo.choose_groups(parts, weights, 2, 2) == ([10, 11], 2, 12, variance)
    assert train_grpo.choose_groups(parts, weights, 2, 4) == ([10, 11, 12, 14], 4, 15, variance)
    *chosen, found = train_grpo.choose_groups(parts, weights, 2, 5)
    assert chosen == [[10, 11, 12, 13, 14], 4, 15] and list(found) == list(variance)  # sorted: ranks would not agree else
    assert train_grpo.choose_groups(parts[:1], weights, 2, 1) == ([10], 1, 11, {10: 0.25, 13: 0})
    parts[0]["score 0"] = torch.tensor([0.0, 0, 1, 1])  # all wrong: what NGRPO is for; all right: nothing to it
    assert train_grpo.choose_groups(parts[:1], weights, 2, 1) == ([10], 0, 14, {10: 0, 13: 0})
    assert train_grpo.choose_groups(parts[:1], weights, 2, 1, "ngrpo") == ([10], 1, 11, {10: 0, 13: 0})
    assert train_grpo.choose_groups(parts[:1], weights, 2, 2, "ngrpo")[1] == 1


def test_dynamic_sampling_filters_by_accuracy():
    """Format or length alone made the weighted sum of a group spread: such groups were taken, and taught no answers. DAPO
    filters by accuracy; --filter_metric names another function, or `reward`, the sum."""
    parts = [{"draws": torch.tensor([0, 1, 2]), "score 0": torch.tensor([1.0, 1, 0, 1, 0, 0]),  # accuracy
              "score 1": torch.tensor([0.0, 1, 1, 1, 1, 0])}]  # format
    weights = torch.tensor([0.0, 0.1])
    assert train_grpo.choose_groups(parts, weights, 2, 2, metric=0)[:3] == ([0, 1], 1, 3)
    assert train_grpo.choose_groups(parts, weights, 2, 2, metric=1)[:3] == ([0, 2], 2, 3)
    assert train_grpo.choose_groups(parts, weights, 2, 2)[:3] == ([0, 2], 2, 3)
    assert train_grpo.choose_groups(parts, weights, 2, 3, "ngrpo", 0)[1] == 2  # 2: all wrong, also of use there
    ask = ["--dynamic_sampling", "1", "--reward_funcs"]

    def metric(*flags):
        return train_grpo.parse_args([*ask, *flags]).filter_metric

    assert metric("accuracy", "format") == "accuracy" and metric("format") == "reward"
    assert metric("accuracy", "format", "--reward_weights", "0", "1") == "reward"
    assert metric("accuracy", "format", "--filter_metric", "format") == "format"
    assert metric("accuracy", "--filter_metric", "reward") == "reward"


REWARD_FILE = '''
import math, time

def words(completions, solution, prompts, difficulty, **_):
    assert all(isinstance(p, str) for p in prompts) and len(difficulty) == len(completions)
    return [len(c.split()) if s else None for c, s in zip(completions, solution)]

def raises_on_bad(completions, **_):
    return [1 / (c != "bad") for c in completions]

def nan(completions, **_):
    return [1.0, math.nan, 1.0]

def infinite(completions, **_):
    return [1.0, 1.0, float("inf")]

def text(completions, **_):
    return [1.0, "high", 1.0]

def short(completions, **_):
    return [1.0]

def nothing(completions, **_):
    return None

def blog(completions, **_):
    return [len(c[0]["content"]) for c in completions]

def narrow(completions):
    return [1.0] * len(completions)

def slow_and_wrong(completions, **_):
    time.sleep(0.4)
    raise KeyError("the real reason")

def long(completions, **_):
    raise ValueError("x" * 3_000_000)
'''
ROWS = [{"_source": f"rows.jsonl:{i}", "prompt": "q", "images": [object()], "solution": s, "difficulty": i}
        for i, s in ((1, "a"), (2, None), (3, "b"))]
TEXTS = ["one two", "bad", "four"]


@pytest.fixture(scope="session")
def reward_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "mine.py"
    path.write_text(REWARD_FILE)
    return path


@pytest.fixture(scope="session")
def score(reward_file):
    """name -> rewards of that function"""
    runners = []

    def call(name):
        runners.append(rollout.RewardRunner([f"{reward_file}:words", f"{reward_file}:{name}"], folder=reward_file.parent))
        try:
            return runners[-1].score(TEXTS, ROWS, step=7)[1]
        finally:
            assert runners[-1].process.poll() is None, "it goes on serving"

    yield call
    for runner in runners:
        runner.close()


def test_columns_reach_the_function_and_none_abstains(reward_file):
    """TRL's calling convention; None is nan here, and never a zero. Length rewards get TRL's completion_ids and the run's
    limit, which the text does not tell."""
    runner = rollout.RewardRunner([f"{reward_file}:words", "format", "soft_overlong"])
    scores = runner.score(TEXTS, ROWS, step=1, **lengths(80, 90, 100))
    runner.close()
    assert scores.shape == (3, 3) and scores[1].tolist() == [0, 0, 0]
    assert scores[2].tolist() == pytest.approx([0, -0.5, -1])
    assert scores[0, 0] == 2 and scores[0, 1].isnan() and scores[0, 2] == 1


@pytest.mark.xdist_group("rewards")
@pytest.mark.parametrize("name, parts", [
    ("raises_on_bad", ["ZeroDivisionError", "rows.jsonl:2", "'bad'"]), ("nan", ["nan", "rows.jsonl:2"]),
    ("infinite", ["inf", "rows.jsonl:3"]), ("text", ["'high' is not a number", "rows.jsonl:2"]),
    ("short", ["expected 3 rewards", "got 1"]), ("nothing", ["expected a list of 3 numbers, got NoneType"]),
    ("blog", ["strings here, not message lists"])])
def test_faulty_rewards_are_named(score, name, parts):
    """F37: what raises, returns nan, inf, text or the wrong count (TRL #6533 broadcast a list of one; ms-swift #8123
    trained on nan) names function, step, row, in one line; the child goes on serving."""
    with pytest.raises(rollout.RewardError) as error:
        score(name)
    for part in [f":{name}", "step 7", *parts]:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_the_traceback_of_a_reward_is_in_a_file(score, reward_file):
    """A traceback of three megabytes filled the terminal; the line has what was raised, where, and where the rest is."""
    with pytest.raises(rollout.RewardError) as error:
        score("long")
    file = reward_file.parent / "reward_error.txt"
    line = REWARD_FILE.splitlines().index('    raise ValueError("x" * 3_000_000)') + 1
    assert re.search(rf"long, step 7: ValueError: xxx+ \.\.\. \(3,000,012 characters\) \({reward_file}, line {line}\); "
                     rf"row rows.jsonl:1, completion 'one two'; traceback: {file}$", str(error.value))
    assert len(str(error.value)) < 1000 and "x" * 3_000_000 in file.read_text()


def test_a_function_gets_what_its_signature_takes(score):
    """One without **kwargs was an error, whatever it ignored."""
    assert score("narrow").tolist() == [1, 1, 1]


TRL_FILE = '''
def row(completions, **_): return [float(len(c) % 2) for c in completions]
def completion(completions, **_): return [2.0 for c in completions]
def advantage(completions, trainer_state, **_):
    assert trainer_state.max_steps == 2
    return [3.0 + trainer_state.global_step for c in completions]
def pictures(completions, images, **_): return [float(len(names)) for names in images]
def rest(completions, **columns):
    assert "images" not in columns and len(columns["chosen"]) == len(completions) and columns["trainer_state"]
    return [None for c in completions]
'''


def test_a_run_with_rewards_as_trls_users_write_them(task, tmp_path, monkeypatch):
    """Functions named like keys of completions/ overwrote them or ended the run; `images` and `trainer_state` were
    withheld. GUIDE's way to try a reward on completions/ failed, since these held no solution."""
    monkeypatch.chdir(tmp_path)
    Path("trl.py").write_text(TRL_FILE)
    names = ("row", "completion", "advantage", "pictures", "rest")
    train_grpo.main([*flags(task, "--reward_funcs"), *(f"trl.py:{name}" for name in names), "--num_generations", "4",
                     "--max_completion_length", "6", "--max_steps", "2", "--per_device_train_batch_size", "12"])
    rows = [json.loads(line) for line in open(task / "pairs.jsonl")]
    for step in (1, 2):
        lines = [json.loads(line) for line in open(f"runs/grpo-1/completions/step_{step}.jsonl")]
        for line in lines:
            source, _, number = line["row"].rpartition(":")
            row = rows[int(number) - 1]
            assert source == str(task / "pairs.jsonl") and isinstance(line["completion"], str)
            assert line["rewards"] == {"row": len(line["completion"]) % 2, "completion": 2, "advantage": 2 + step,
                                       "pictures": len(row["images"]), "rest": None}
            assert line["columns"] == {k: v for k, v in row.items() if k != "images"} and abs(line["advantage"]) < 2
    module, snippet = re.findall(r"```python\n(.*?)```", (ROOT / "GUIDE.md").read_text().split("## Write a reward")[1],
                                 re.DOTALL)[:2]
    Path("mine.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    exec(snippet, found := {})
    assert len(found["rewards"]) == 12 and set(found["rewards"]) <= {0, 1}


@pytest.mark.slow
def test_the_reason_is_not_lost_in_the_search_for_the_row(reward_file):
    """A function that raises on every row, slowly: the traceback comes before the search for the row, which may end at
    the limit. (What hangs or crashes is in test_faults.py.)"""
    slow = rollout.RewardRunner([f"{reward_file}:slow_and_wrong"], timeout=0.8)
    with pytest.raises(rollout.RewardError, match="the real reason"):
        slow.score(TEXTS * 5, ROWS * 5, step=3)


@pytest.mark.slow
@pytest.mark.parametrize("spec, message", [("nowhere.py:f", "no such file"), ("{file}:absent", "no function 'absent'")])
def test_missing_reward_is_an_error_at_start(reward_file, spec, message):
    """A typo in the name ends the run before its first step."""
    runner = rollout.RewardRunner([spec.format(file=reward_file)])
    with pytest.raises(rollout.RewardError, match=message):
        runner.wait_until_ready()
    runner.close()


def test_rewards_import_no_torch():
    """A rank's reward process, which started by importing torch and transformers again, took 5 CPU seconds and 380 MB."""
    files = list((ROOT / "rewards").glob("*.py"))
    assert len(files) == 6
    allowed = sys.stdlib_module_names | {"math_verify"}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] in allowed for alias in node.names), ast.unparse(node)
            if isinstance(node, ast.ImportFrom):
                assert node.level == 1 or node.module.split(".")[0] in allowed, ast.unparse(node)


OF_THE_PROCESS = '''
import multiprocessing, os, sys, time

def memory(completions, **_):
    assert not {"torch", "transformers", "numpy", "rollout", "model"} & set(sys.modules)
    return [next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) for _ in completions]

def length(text):
    return float(len(text))

def pooled(completions, method, **_):
    with multiprocessing.get_context(method[0]).Pool(2) as pool:
        return pool.map(length, completions)

def leaves_children(completions, **_):
    for _ in range(2):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        print(child.pid, file=open("children", "a"))
    if completions[0] == "crash":
        os.abort()
    return [1.0 for _ in completions]

def chatty(completions, **_):
    print("out of", len(completions), "answers")
    print("and an error", file=sys.stderr)
    os.write(1, b"bytes\\n")
    return [1.0 for _ in completions]
'''


@pytest.fixture
def of_the_process(tmp_path, monkeypatch):
    """of_the_process(name): a runner of that function."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(OF_THE_PROCESS)
    made = []

    def make(*names):
        made.append(rollout.RewardRunner([name if name in BUILT_IN else f"mine.py:{name}" for name in names]))
        return made[-1]

    yield make
    for runner in made:
        runner.close()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux only")
def test_the_reward_process_is_small(of_the_process):
    """Without torch, and below 60 MB with every built-in reward loaded."""
    runner = of_the_process("memory", *BUILT_IN)
    rows = [{"_source": "rows.jsonl:1", "prompt": "q", "solution": None}]
    scores = runner.score(["<answer>4</answer>"], rows, step=1, **lengths(5), truncated=[False])
    assert scores[0, 0] < 60_000  # kB


def gone(pid):
    """Whether a process has ended, if nobody has asked for its exit code yet."""
    try:
        return "Z" in open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_reward_may_use_a_pool(of_the_process, method):
    """The process was a daemon of multiprocessing, which may have no children."""
    rows = [row | {"method": method} for row in ROWS]
    assert of_the_process("pooled").score(TEXTS, rows, step=1).tolist() == [[7, 3, 4]]


@pytest.mark.parametrize("text, expected", [("fine", 1.0), ("crash", None)])
def test_children_end_with_the_reward_process(of_the_process, tmp_path, text, expected):
    """Also those that it forked itself; and they do not keep its crash from being seen: they hold no end of its socket."""
    runner = of_the_process("leaves_children")
    began = time.monotonic()
    score = runner.score([text], ROWS[:1], step=1)[0, 0]
    assert score.isnan() if expected is None else score == expected
    assert time.monotonic() - began < 30  # of the 60 of the limit
    runner.close()
    children = (tmp_path / "children").read_text().split()
    assert len(children) == (2 if expected else 4)  # a crash is tried again
    while not all(map(gone, children)):
        assert time.monotonic() - began < 60
        time.sleep(0.05)


def test_a_reward_may_print(of_the_process, capfd):
    """F39: what it prints is seen at once, as its own, and is no part of what is said between the processes."""
    runner = of_the_process("chatty")
    assert runner.score(TEXTS, ROWS, step=1).tolist() == [[1, 1, 1]]
    out, err = capfd.readouterr()
    assert "out of 3 answers\n" in out and "bytes\n" in out and "and an error\n" in err


@pytest.mark.xdist_group("warm")
def test_the_reward_process_ends_with_its_trainer(tmp_path):
    """Killed, or at its end without a close(): no reward process is left."""
    (tmp_path / "mine.py").write_text(OF_THE_PROCESS)
    for end in ("os.kill(os.getpid(), 9)", "pass"):
        program = (f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); import rollout\n"
                   "runner = rollout.RewardRunner(['mine.py:memory']); runner.wait_until_ready()\n"
                   f"print(runner.process.pid, flush=True); {end}")
        result = subprocess.run([python(), "-c", program], cwd=tmp_path, env=ENVIRONMENT, text=True, capture_output=True)
        deadline = time.monotonic() + 30
        while not gone(int(result.stdout)):
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux only")
def test_the_child_bounds_itself_under_a_memory_limit_too():
    """Guards against a reward process that outlives its parent where a batch system has set a limit of memory: it asks
    for the parent's death signal, offers itself to the OOM killer, and leaves that limit as it is."""
    pid = os.fork()
    if pid == 0:
        try:
            resource.setrlimit(resource.RLIMIT_DATA, (1 << 40, 1 << 40))
            process.end_with_parent()
            process.limit_memory()
            number = ctypes.c_int()
            ctypes.CDLL(None).prctl(2, ctypes.byref(number))  # PR_GET_PDEATHSIG
            adjusted = Path("/proc/self/oom_score_adj").read_text().strip() == "1000"
            os._exit(number.value if adjusted and resource.getrlimit(resource.RLIMIT_DATA)[0] == 1 << 40 else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == signal.SIGKILL


def test_a_cache_of_one_is_one_token():
    """soft_punish_cache below 1 is a share; 1 is a token, not all of the length."""
    assert form.soft_overlong(["", ""], [[5] * 9, [5] * 10], [10, 10], soft_punish_cache=1) == [0, -1]

"""The built-in rewards on hand-labelled strings, and the process that runs reward functions."""

import time

import pytest

import rollout
import train_grpo

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
    ("<answer>4", "4", 1), ("4", "4", 1), ("the answer is 4", "4", 0), ("", "4", 0), ("<answer></answer>", "4", 0),
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
    assert train_grpo.format([text]) == [expected]


@pytest.mark.parametrize("text, solution, expected", ACCURACY, ids=range(len(ACCURACY)))
def test_accuracy(text, solution, expected):
    """Text, number, choice letter; the last answer counts; a row without solution abstains."""
    assert train_grpo.accuracy([text], solution=[solution]) == [expected]


def test_rewards_take_long_and_nasty_text_quickly():
    """No pattern of ours is worse than linear."""
    began = time.perf_counter()
    for text in ("<think>" * 20_000, "<think>" + "</think><answer>" * 5_000, "\\boxed{" * 20_000, "{" * 100_000):
        train_grpo.format([text])
        train_grpo.accuracy([text], solution=["4"])
    assert time.perf_counter() - began < 10


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
'''
ROWS = [{"_source": f"rows.jsonl:{i}", "prompt": "q", "images": [object()], "solution": s, "difficulty": i}
        for i, s in ((1, "a"), (2, None), (3, "b"))]
TEXTS = ["one two", "bad", "four"]


@pytest.fixture(scope="module")
def reward_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "mine.py"
    path.write_text(REWARD_FILE)
    return path


@pytest.fixture(scope="module")
def score(reward_file):
    """name -> rewards; one child serves all functions, as in a run."""
    names = ("words", "raises_on_bad", "nan", "infinite", "text", "short", "nothing", "blog", "narrow")
    runner = rollout.RewardRunner([f"{reward_file}:{name}" for name in names])
    runner.wait_until_ready()

    def call(name):
        columns = {k: [row[k] for row in ROWS] for k in ("solution", "difficulty")}
        columns |= {"prompts": ["q"] * 3, "completions": TEXTS}
        return runner._score_one(names.index(name), columns, ROWS, step=7)

    yield call
    runner.close()


def test_columns_reach_the_function_and_none_abstains(reward_file):
    """TRL's calling convention; None is nan here, and never a zero."""
    runner = rollout.RewardRunner([f"{reward_file}:words", f"{train_grpo.__file__}:format"])
    scores = runner.score(TEXTS, ROWS, step=1)
    runner.close()
    assert scores.shape == (2, 3) and scores[1].tolist() == [0, 0, 0]
    assert scores[0, 0] == 2 and scores[0, 1].isnan() and scores[0, 2] == 1


@pytest.mark.parametrize("name, parts", [
    ("raises_on_bad", ["ZeroDivisionError", "rows.jsonl:2", "'bad'"]), ("nan", ["nan", "rows.jsonl:2"]),
    ("infinite", ["inf", "rows.jsonl:3"]), ("text", ["'high' is not a number", "rows.jsonl:2"]),
    ("short", ["expected 3 rewards", "got 1"]), ("nothing", ["expected a list of 3 numbers, got NoneType"]),
    ("blog", ["strings here, not message lists"]), ("narrow", ["give it a **kwargs"])])
def test_faulty_rewards_are_named(score, name, parts):
    """F37: what raises, returns nan, inf, text or the wrong count (TRL #6533 broadcast a list of one; ms-swift #8123
    trained on nan) names function, step, row; the child goes on serving."""
    with pytest.raises(rollout.RewardError) as error:
        score(name)
    for part in [f":{name}", "step 7", *parts]:
        assert part in str(error.value)
    assert score("words")[0] == 2


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

"""What a run shows, keeps and hands over: trackers, samples, pass@k, model card, code, hub, and the pages of benchmarks/."""

import base64
import html
import inspect
import io
import itertools
import json
import random
import re
import sys
import types
from argparse import Namespace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import huggingface_hub
import pytest
import test_runs
import torch
from conftest import ROOT
from PIL import Image
from test_faults import ranks
from test_runs import flags, grpo, launch, task  # noqa: F401 (fixtures)

import model
import rollout
import train_dpo
import train_grpo

sys.path.insert(0, str(ROOT / "benchmarks"))
import compare  # noqa: E402
import report  # noqa: E402


class Judge:
    """Stands for the reward process, in this one: a third of the answers are right, and some get nothing."""

    def __init__(self, specs, timeout=60.0, folder=None):
        self.specs, self.failed, self.closed = specs, 0, False

    def wait_until_ready(self):
        pass

    def columns(self):
        return None

    def score(self, completions, rows, step, **more):
        sums = torch.tensor([sum(map(ord, c)) + int(r["solution"]) for c, r in zip(completions, rows, strict=True)],
                            dtype=torch.float64)
        return torch.stack([(sums % 3 == 0).double() if i == 0 else sums % 7 for i in range(len(self.specs))])

    def close(self):
        pass


@pytest.fixture
def judge(monkeypatch):
    monkeypatch.setattr(rollout, "RewardRunner", Judge)
    monkeypatch.setattr(test_runs, "InProcess", Judge)


def lines_of(file):
    return [json.loads(line) for line in open(file)]


# --- pass@k, samples


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_by_enumeration(n):
    """The share of the k-subsets of n answers that hold a right one, over every number of right ones; 1 - (1 - c/n)^k,
    which is biased, would differ. A row that accuracy abstained on does not count."""
    for c in range(n + 1):
        right = [1.0] * c + [0.0] * (n - c)
        random.Random(c).shuffle(right)
        found = rollout.pass_at_k(torch.tensor([*right, *[float("nan")] * n, *[1.0] * n]), n)
        assert set(found) == {f"eval/pass@{k}" for k in {2, 4, 8, n} if 1 < k <= n}
        for key, (total, rows) in found.items():
            subsets = list(itertools.combinations(right, int(key.split("@")[1])))
            assert rows == 2 and total - 1 == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize("name", ["train_grpo", "train_dpo"])
def test_several_answers_to_each_held_out_row(launch, task, tmp_path, judge, name):
    """eval/accuracy is the mean over all answers, pass@2 what the file of answers says, every reward has its mean; the
    answers to a row differ, and stand one after the other."""
    extra = {"train_grpo": ["--reward_funcs", "accuracy", "format", "--num_generations", 4, "--per_device_train_batch_size", 8],
             "train_dpo": ["--algo", "sft"]}[name]
    metrics, _ = launch(name, *extra, "--max_steps", 1, "--eval_dataset", task / "pairs.jsonl", "--num_generations_eval", 4,
                        "--eval_temperature", 1, "--max_completion_length", 4, "--per_device_eval_batch_size", 5)
    answers = lines_of(tmp_path / "run0" / "completions" / "eval_1.jsonl")
    assert [a["row"] for a in answers] == [f"{task / 'pairs.jsonl'}:{i + 1}" for i in range(12) for _ in range(4)]
    assert len({a["completion"] for a in answers[:4]}) > 1
    assert [a["rewards"]["accuracy"] for a in answers] == [(sum(map(ord, a["completion"])) + i // 4 % 6) % 3 == 0
                                                for i, a in enumerate(answers)], "each is judged by its own row"
    right = [[a["rewards"]["accuracy"] for a in answers[i:i + 4]] for i in range(0, 48, 4)]
    pairs = [any(pair) for row in right for pair in itertools.combinations(row, 2)]
    assert metrics[0]["eval/accuracy"] == pytest.approx(sum(map(sum, right)) / 48) and 0 < sum(pairs) < len(pairs)
    assert metrics[0]["eval/pass@2"] == pytest.approx(sum(pairs) / len(pairs))
    assert metrics[0]["eval/pass@4"] == pytest.approx(sum(map(any, right)) / 12)
    if name == "train_grpo":
        assert metrics[0]["eval/rewards/format/mean"] == pytest.approx(sum(a["rewards"]["format"] for a in answers) / 48)


def test_greedy_answers_have_no_pass_at_k(capsys):
    """n equal answers would make pass@k the accuracy, under another name."""
    for parse in (train_dpo.parse_args, train_grpo.parse_args):
        with pytest.raises(SystemExit):
            parse(["--num_generations_eval", "4"])
        assert "--num_generations_eval needs --eval_temperature above 0" in capsys.readouterr().err


def test_two_samples_after_each_evaluation(launch, task, tmp_path, judge, capsys):
    """The best and the worst completion of the first rollout after held-out rows, with each reward and the advantage: not
    those of every step, and the numbers of the file."""
    launch("train_grpo", "--reward_funcs", "accuracy", "format", "--num_generations", 4, "--per_device_train_batch_size", 8,
           "--max_completion_length", 4, "--max_steps", 4, "--eval_steps", 2)
    shown = re.findall(r"step (\d+), best and worst \| (.+) \| accuracy (\S+), format (\S+), advantage (\S+) \| '",
                       capsys.readouterr().out)
    assert [step for step, *_ in shown] == ["1", "1", "3", "3"]
    for step in (1, 3):
        kept = lines_of(tmp_path / "run0" / "completions" / f"step_{step}.jsonl")
        best, worst = (s for s in shown if s[0] == str(step))
        kept.sort(key=lambda line: line["advantage"])
        assert float(best[4]) == pytest.approx(kept[-1]["advantage"], rel=1e-3)
        assert float(worst[4]) == pytest.approx(kept[0]["advantage"], rel=1e-3)
        assert best[1] in {line["row"] for line in kept}


def test_long_samples_are_cut_on_the_screen_only(tmp_path, capsys):
    """One answer of a thousand lines must not fill the log; the file has it whole. nan is null, which JSON has."""
    rollout.save_completions(tmp_path / "x.jsonl", [{"_source": "a"}, {"_source": "b"}], ["y" * 999, "z\x1b"] * 2, {
        "f": torch.tensor([float("nan"), 1, 2, 3])}, torch.tensor([0.5, 0.5, 0.5, 0.5]), "step 1")
    assert [(line["row"], len(line["completion"]), line["rewards"]["f"]) for line in lines_of(tmp_path / "x.jsonl")] == [
        ("a", 999, None), ("a", 2, 1.0), ("b", 999, 2.0), ("b", 2, 3.0)]
    first, last = capsys.readouterr().out.splitlines()
    assert first.endswith("(999 characters)") and len(first) < 500
    assert last == r"step 1 | b | f 3, advantage 0.5 | 'z\x1b'", "a terminal obeys control characters"


# --- trackers


class Tracker(types.ModuleType):
    """What wandb and trackio have in common, as far as it is used: every call is kept."""

    def __init__(self, name):
        super().__init__(name)
        self.inits, self.logged, self.broken = [], [], False

    def init(self, **kwargs):
        self.inits.append(kwargs)

    def log(self, metrics, step):
        if self.broken:
            raise ConnectionError("no route")
        self.logged.append((step, metrics))


@pytest.fixture
def tracker(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", Tracker("wandb"))
    monkeypatch.setitem(sys.modules, "trackio", Tracker("trackio"))
    return sys.modules


def settings(name):
    return Namespace(report_to=name, seed=1)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_is_one_run_of_the_tracker(tracker, tmp_path, name):
    """Steps that come again after a resume are not sent again, the run keeps its id, and nan is not sent; another run of
    the same folder name elsewhere is another run."""
    for steps in (range(4), range(2, 6)):
        send = model.Report(settings(name), tmp_path, 0)
        for step in steps:
            send({"step": step, "loss": step / 2, "bad": float("nan")})
    assert tracker[name].logged == [(step, {"loss": step / 2}) for step in range(6)]
    first, second = tracker[name].inits
    assert first == second and first["resume"] == "allow" and first["config"]["seed"] == 1
    assert (name == "wandb") == ("id" in first)
    (tmp_path / "x" / tmp_path.name).mkdir(parents=True)
    model.Report(settings(name), tmp_path / "x" / tmp_path.name, 0)
    assert tracker[name].inits[2]["name"] != first["name"]


@pytest.mark.parametrize("name", ["train_dpo", "train_grpo"])
def test_the_tracker_gets_what_metrics_jsonl_gets(launch, task, tmp_path, tracker, judge, name):
    """Each step of each script once, evaluations included."""
    extra = ["--algo", "sft"] if name == "train_dpo" else grpo(task, "--per_device_train_batch_size", 4)
    launch(name, *extra, "--max_steps", 2, "--report_to", "trackio", "--eval_dataset", task / "pairs.jsonl",
           "--max_completion_length", 2)
    kept = lines_of(tmp_path / "run0" / "metrics.jsonl")
    assert [{"step": step} | metrics for step, metrics in tracker["trackio"].logged] == kept
    assert any(key.startswith("eval/") for key in tracker["trackio"].logged[-1][1])


def test_a_tracker_that_fails_later_is_a_warning(tracker, tmp_path, capsys):
    """A network that is gone after a day must not end the run, nor fill its log."""
    send = model.Report(settings("wandb"), tmp_path, 0)
    tracker["wandb"].broken = True
    for step in range(3):
        send({"step": step, "loss": 1.0})
    assert capsys.readouterr().out.count("warning: --report_to wandb failed at step") == 1


def without_a_package(folder):
    def work(rank):
        sys.modules["wandb"] = None  # import raises, as if it were not installed
        try:
            model.Report(settings("wandb"), folder, rank)
        except model.InputError as error:
            return str(error)

    return ranks(work)


def test_a_missing_tracker_ends_every_rank(tmp_path):
    """Only rank 0 imports it: the others must not wait for a rank that has gone."""
    assert [("pip install wandb" in error) for error in without_a_package(tmp_path)] == [True, True]


def test_tensorboard_has_each_step_once(tmp_path):
    """The real package (where it is installed): steps that come again replace the old ones."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps, shift in ((range(4), 0), (range(2, 6), 10)):
        send = model.Report(settings("tensorboard"), tmp_path, 0)
        for step in steps:
            send({"step": step, "loss": step + shift, "bad": float("inf")})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(0, 0), (1, 1), (2, 12), (3, 13), (4, 14), (5, 15)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_what_is_called_exists(name):
    """The real packages (where they are installed) take these calls."""
    module = pytest.importorskip(name)
    own = {"id": "1", "dir": "x"} if name == "wandb" else {}
    inspect.signature(module.init).bind(project="a", name="b", config={}, resume="allow", **own)
    if name == "trackio":
        inspect.signature(module.log).bind({}, step=1)


# --- model card, code, hub


class Hub:
    """huggingface_hub's two functions, held to their own signatures: every call is kept."""

    def __init__(self, monkeypatch):
        self.calls, self.broken = [], False
        for name in ("create_repo", "upload_folder"):
            monkeypatch.setattr(huggingface_hub, name, self.standing_for(getattr(huggingface_hub, name)))

    def standing_for(self, real):
        def fake(*args, **kwargs):
            self.calls.append((real.__name__, inspect.signature(real).bind(*args, **kwargs).arguments))
            if self.broken:
                raise ConnectionError("no route")

        return fake


def test_card_code_and_hub(launch, task, tmp_path, judge, monkeypatch, capsys):
    """final/README.md has command, results, fingerprints and versions, and a head that the hub can read; code/ is what
    ran; final/ is uploaded once it is complete; a failed upload leaves a run that is done, and the same command tries again."""
    hub = Hub(monkeypatch)
    monkeypatch.setattr(sys, "argv", ["train_grpo.py", "--a", "two words"])
    launch("train_grpo", *grpo(task), "--per_device_train_batch_size", 4, "--max_steps", 1, "--eval_dataset",
           task / "pairs.jsonl", "--push_to_hub", "me/it", "--max_completion_length", 3)
    folder = tmp_path / "run0"
    for file in [*ROOT.glob("*.py"), *ROOT.glob("rewards/*.py"), *ROOT.glob("layers/*.py")]:
        assert (folder / "code" / file.relative_to(ROOT)).read_text() == file.read_text()
    assert (folder / "code" / "rewards" / "0-rewards.py").read_text() == (task / "rewards.py").read_text()
    card = (folder / "final" / "README.md").read_text()
    args = json.loads((folder / "args.json").read_text())
    metrics = lines_of(folder / "metrics.jsonl")
    assert "python train_grpo.py --a 'two words'" in card and args["data"] in card and args["code"] in card
    assert f"| `eval/reward` | {metrics[0]['eval/reward']:.4f} | {metrics[-1]['eval/reward']:.4f} |" in card
    assert json.loads(card.split("```json\n")[1].split("```")[0]) == args
    head = huggingface_hub.ModelCard(card).data.to_dict()
    assert head["library_name"] == "transformers" and head["tags"] == ["flatpo", "grpo"] and "base_model" not in head
    (_, created), (_, uploaded) = hub.calls
    assert created["repo_id"] == uploaded["repo_id"] == "me/it" and created["private"] is True
    assert Path(uploaded["folder_path"]) == folder / "final"
    assert "uploaded" in capsys.readouterr().out

    again = [*flags(task, *grpo(task), "--per_device_train_batch_size", 4, "--max_steps", 1, "--eval_dataset",
                    task / "pairs.jsonl", "--max_completion_length", 3), "--output_dir", str(folder), "--push_to_hub", "me/it"]
    train_grpo.main(again)
    assert [name for name, _ in hub.calls[2:]] == ["create_repo", "upload_folder"]
    args = train_grpo.parse_args(again)
    hub.broken = True
    with pytest.raises(model.InputError, match="final is complete, but not uploaded: no route"):
        model.Run._push_to_hub(Namespace(args=args, rank=0, folder=folder, say=print))
    with pytest.raises(model.InputError, match="--push_to_hub me/it: no route"):
        train_grpo.main([*again[:-4], "--output_dir", str(tmp_path / "new"), *again[-2:]])
    assert not (tmp_path / "new").exists()


def test_a_hub_out_of_reach_is_met_before_the_run(task, tmp_path):
    """The tests run with HF_HUB_OFFLINE: the real client's own error, in one line, before any folder is made."""
    with pytest.raises(model.InputError, match=r"--push_to_hub me/it: .*(?i:offline)"):
        train_dpo.main([*flags(task, "--algo", "sft"), "--output_dir", str(tmp_path / "run"), "--push_to_hub", "me/it"])
    assert not (tmp_path / "run").exists()


def test_card_names_the_ranks_and_a_hub_base(tmp_path, monkeypatch):
    """Under torchrun the command says how many; only a hub id is a base model to the hub."""
    (tmp_path / "final").mkdir()
    (tmp_path / "args.json").write_text(json.dumps(dict(world_size=16, command=["t.py"], data=None, code="c")))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    args = Namespace(model_name_or_path="Qwen/Qwen2.5-VL-3B-Instruct", algo=["mpo"], dataset="d.jsonl", eval_dataset=None)
    model.write_card(args, tmp_path, {"eval/x": 1.0}, {"eval/x": 2.0})
    assert "| `eval/x` | 1.0000 | 2.0000 |" in (tmp_path / "final" / "README.md").read_text()
    model.write_card(args, tmp_path, {}, {})
    card = (tmp_path / "final" / "README.md").read_text()
    assert "torchrun --nproc_per_node=8 --nnodes=2 t.py" in card and "No held-out rows." in card
    assert huggingface_hub.ModelCard(card).data.base_model == "Qwen/Qwen2.5-VL-3B-Instruct"
    args.model_name_or_path = str(tmp_path)
    model.write_card(args, tmp_path, {}, {})
    assert "base_model" not in (tmp_path / "final" / "README.md").read_text()


# --- pages


class Page(HTMLParser):
    """Tags in balance, nothing loaded from anywhere, and the text."""

    def __init__(self, page):
        super().__init__()
        self.open, self.text, self.sources = [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "link", "iframe", "object") and not any(k.startswith("on") for k, _ in attributes)
        self.sources += [value for key, value in attributes if key in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text.append(text)


def write_run(folder, task):
    """A run's files with what is awkward: nan in the metrics, markup and control characters in the texts."""
    (folder / "completions").mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(dict(
        algo=["grpo"], command=["train_grpo.py", "--x", "<y>"], seed=3, dataset=[str(task / "pairs.jsonl")], eval_dataset=None,
        image_root=str(task))))
    (folder / "status.json").write_text(json.dumps(dict(status="done", step=3)))
    with open(folder / "metrics.jsonl", "w") as file:
        for step, loss in enumerate((1.0, None, 0.25, 0.5)):
            file.write(json.dumps({"step": step, "loss": loss, "ratio": 1.0}
                                  | ({"eval/accuracy": step / 4} if step % 3 == 0 else {})) + "\n")
    texts = ["<script>alert(1)</script>", "a\x00b\x1b", "5 < 6 & 7"]
    with open(folder / "completions" / "step_1.jsonl", "w") as file:
        for source, advantage in ((f"{task / 'pairs.jsonl'}:1", 0.5), ("shapes test 2", -0.25), ("gone", 0.0)):
            for text in texts:
                file.write(json.dumps(dict(row=source, completion=text, rewards=dict(accuracy=None, spread=3.5),
                                                advantage=advantage, columns={})) + "\n")


def test_report_page(task, tmp_path):
    """One file that loads nothing and runs nothing, whatever the texts hold; every completion, reward, advantage and
    picture is there; curves are well-formed SVG that puts values where they belong, with a gap and a mark at nan."""
    write_run(tmp_path / "r", task)
    report.main([str(tmp_path / "r")])
    text = (tmp_path / "r" / "report.html").read_text()
    page = Page(text)
    assert all(source.startswith("data:image/png;base64,") for source in page.sources) and "http" not in text
    assert page.text.count("<script>alert(1)</script>") == 3 and page.text.count("a␀b␛") == 3
    assert {"0.5", "-0.25", "3.5", "abstained", "gone", "how many shapes are there?"} <= {
        t.replace("[image]", "") for t in page.text}
    pictures = [Image.open(io.BytesIO(base64.b64decode(s.split(",")[1]))).convert("RGB") for s in page.sources]
    assert pictures[0].tobytes() == Image.open(task / "0-0.png").convert("RGB").tobytes()
    assert pictures[1].tobytes() == report.data.shapes_rows(3, 3, "test")[2]["images"][0].tobytes() and len(pictures) == 2

    curves = dict(re.findall(r"<figcaption>(.*?)</figcaption>(<svg.*?</svg>)", text))
    assert set(curves) == {"loss", "eval/accuracy"} and "The same at every step: ratio 1.0" in text
    svg = ElementTree.fromstring(curves["loss"])
    (line,) = svg.findall("polyline")
    (x0, y0), (x1, y1) = [tuple(map(float, p.split(","))) for p in line.get("points").split()]  # steps 2 and 3
    points = svg.findall("circle")
    assert len(points) == 4 and points[1].get("fill") != points[0].get("fill")
    high, low, half = (float(points[i].get("cy")) for i in (0, 2, 3))
    assert low > half > high > 5 and (low - half) / (low - high) == pytest.approx(1 / 3, abs=0.01)  # 0.25, 0.5 of 0.25 to 1
    assert float(points[2].get("cx")) == x0 < x1 and (y0, y1) == (low, half)


@pytest.mark.parametrize("name, extra, pictures", [
    ("train_dpo", ["--algo", "sft"], 0), ("train_dpo", ["--eval_dataset", "PAIRS"], 4),
    ("train_grpo", ["--dataset", "PAIRS", "PAIRS", "--eval_dataset", "PAIRS"], 8), ("train_grpo", ["--algo", "online_dpo"], 2)])
def test_report_of_every_kind_of_run(launch, task, tmp_path, name, extra, pictures):  # noqa: F811
    """A run with --dataset, which is a list, ended in a traceback. Its questions and pictures are found, those of held-out
    rows too."""
    extra = [str(task / "pairs.jsonl") if word == "PAIRS" else word for word in extra]
    launch(name, *(grpo(task) if name == "train_grpo" else []), *extra, "--max_steps", 1)
    report.main([str(tmp_path / "run0"), "--groups", "4"])
    page = Page((tmp_path / "run0" / "report.html").read_text())
    assert "grad_norm" in " ".join(page.text) and len(page.sources) >= pictures
    assert bool(pictures) == any("how many shapes are there?" in text for text in page.text)


def test_ticks_are_few_round_and_inside():
    for low, high in ((0, 1), (0.03, 0.41), (-3e-8, 2e-8), (1, 2.5), (0, 9.99), (100, 1e5), (-7, 2)):
        found = report.ticks(low, high)
        assert 2 <= len(found) <= 7 and found == sorted(found)
        assert all(low - 1e-6 * (high - low) <= t <= high + 1e-6 * (high - low) for t in found)


def test_compare_page(folders, task, tmp_path, judge, capsys):
    """Every model's answers beside each other, accuracy over all rows and not only over those shown; pass@k from several."""
    a, b = folders["qwen2_5_vl"], folders["llava"]
    common = ["--dataset", str(task / "pairs.jsonl"), "--image_root", str(task), "--max_completion_length", "4", "--rows", "3",
              "--output", str(tmp_path)]
    compare.main([f"one={a}", f"two={b}", *common, "--num_generations_eval", "4", "--temperature", "1"])
    printed = capsys.readouterr().out
    page = Page((tmp_path / "compare.html").read_text())
    assert (tmp_path / "compare.md").read_text() in printed and printed.count("pairs.jsonl:") == 3
    assert len(page.sources) == 3  # rows 0, 1, 2 have 1, 0, 2 pictures
    policy, processor = model.load_policy(str(a))
    rows = report.data.read_rows(common[1], str(task), ("prompt",))
    texts, scores = rollout.evaluate(
        policy, processor, rows, range(12), [report.data.encode_prompt(policy, processor, row) for row in rows], Judge(["x"]),
        temperature=1, max_completion_length=4, batch_size=12, seed=0, step=0, num_generations=4)
    mean = scores[0].view(12, 4).mean(-1)
    error = mean.std(correction=0) / 12 ** 0.5
    best = scores[0].view(12, 4).max(-1)[0].mean()
    row = next(line for line in printed.splitlines() if line.startswith("| one |"))
    assert f"{mean.mean():.3f} ± {error:.3f}" in row and row.endswith(f"| {best:.3f} |")
    assert html.unescape(report.escape(texts[0])) in page.text

"""The commands of the pages are run, or their flags checked, and so is what the pages say of results, tests and methods."""

import dataclasses
import inspect
import re
import shlex
import sys
import types

import pytest
import train_dpo
import train_grpo
from conftest import METHODS, ROOT, python, run, script
from PIL import Image

import data
import losses
import model
import papers
import rollout
from rewards import answers

PAGES = {name: (ROOT / name).read_text() for name in (
    "README.md", "GUIDE.md", "METHODS.md", "benchmarks/README.md", "tests/README.md")}
README, GUIDE = PAGES["README.md"], PAGES["GUIDE.md"]
INSTALL = 'python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt "math-verify[antlr4_13_2]"'


def commands_of(page):
    """Each command of a page as one line, where the page breaks it with a backslash."""
    blocks = re.findall(r"```bash\n(.*?)```", page, re.S)
    return [line for block in blocks for line in re.sub(r" \\\n +", " ", block).splitlines() if line.strip()]


COMMANDS = list(dict.fromkeys(line for page in PAGES.values() for line in commands_of(page)))
PARSERS = {"train_dpo.py": train_dpo.parse_args, "train_grpo.py": train_grpo.parse_args}


def command(start, *contains):
    """The one command of the pages that begins so and holds all of `contains`."""
    found = [c for c in COMMANDS if c.startswith(start) and all(part in c for part in contains)]
    assert len(found) == 1, found
    return found[0]


def test_every_command_is_known():
    """A new command of a page must get a test: each is one of these."""
    known = [INSTALL, ". .venv/bin/activate && pip install -q scikit-learn && python benchmarks/digits.py digits",
             "python train_dpo.py", "python train_grpo.py", "python benchmarks/", "torchrun --nproc_per_node=", "srun --ntasks-per-node=1 bash -c"]
    for c in COMMANDS:
        assert any(c.startswith(k) for k in known), c


def test_the_readme_is_short():
    """A reader sees it whole in a terminal or a browser: 200 lines, 100 columns."""
    lines = README.splitlines()
    assert len(lines) <= 200
    assert not [line for line in lines if len(line) > 100]


def test_pages_point_at_files_that_exist():
    """A link, and a file named in backticks, must not outlive the file."""
    for name, page in PAGES.items():
        folder = (ROOT / name).parent
        for link in re.findall(r"\]\(([^)#]+)\)", page):
            assert "://" in link or (folder / link).exists(), (name, link)
        for file in re.findall(r"`((?:tests|benchmarks|papers|rewards)/\w+\.\w+)[` ]", page):
            assert (ROOT / file).exists(), (name, file)


def test_ci_runs_the_readmes_test_command():
    """CI proves the command that a reader copies, install step included."""
    assert set(commands_of(README)) >= {command(INSTALL, "pytest"), command(INSTALL, "train_grpo.py")}
    assert command(INSTALL, "pytest") in (ROOT / ".ci" / "run").read_text().splitlines()
    assert command(INSTALL, "train_grpo.py") == f"{INSTALL} && .venv/bin/python train_grpo.py"


def test_every_promise_has_its_test():
    """A promise whose test was renamed or removed is held by nothing: each row names tests, or files of them, that exist."""
    rows = PAGES["tests/README.md"].split("| promise | held by |\n|---|---|\n")[1].split("\n\n")[0].splitlines()
    files = {file.name: file.read_text() for file in (ROOT / "tests").glob("test_*.py")}
    assert len(rows) > 15
    for row in rows:
        named = re.findall(r"`(test_\w+(?:\.py)?)`", row.split("|")[2])
        assert named, row
        for name in named:
            assert name in files or any(f"\ndef {name}(" in text for text in files.values()), name
    for page in PAGES.values():
        for name in re.findall(r"`(test_\w+(?:\.py)?)`", page):
            assert name in files or any(f"\ndef {name}(" in text for text in files.values()), name


def known_flags():
    """Those of both scripts and of all files of papers/."""
    parsers = [model.parser_of(module.Args) for module in (train_dpo, train_grpo)]
    return {flag for parser in parsers for flag in parser._option_string_actions} | {*papers.flags_of_methods()}


def test_methods_page_is_complete():
    """METHODS.md names every loss, level, estimator, preset, file of papers/ and function of losses.py and papers/, and each
    function and test that it names exists, under the name it gives."""
    page = PAGES["METHODS.md"]
    named = {word for code in re.findall(r"`([^`]+)`", page) for word in code.split()}
    assert {*losses.PAIR_LOSSES, "sft", *losses.POLICY_LOSSES, *losses.GROUP_LOSSES, *losses.ADVANTAGES, *losses.RATIO_LEVELS,
            *train_dpo.PRESETS, *train_grpo.PRESETS, *METHODS} <= named
    hooks = {"check", "columns", "scorers", "metrics", "after_step", "weigh", "before_rollout", "after_rollout"}
    public = {name for module in (losses, *METHODS.values()) for name, value in vars(module).items()
              if inspect.isfunction(value) and value.__module__ == module.__name__} - hooks
    unlisted = {"masked_sum", "weighted_rewards", "centred", "unbiased_std", "log_ratios", "preference_losses",
                "is_above", "pick", "has_spread", "which", "pair_of", "log_ratios_of"}
    assert public - named == unlisted, (public - named) ^ unlisted
    tests = "".join(file.read_text() for file in (ROOT / "tests").glob("test_*.py"))
    for name in named:
        if name.startswith("test_"):
            assert f"def {name}(" in tests or (ROOT / "tests" / name).is_file(), name
        elif name.endswith(("_loss", "_term", "_mask", "_advantages", "_mean")):
            assert name in public | {"sequence_mask", "token_mask"}, name
    assert flags_of(page) <= known_flags(), flags_of(page) - known_flags()
    of_papers = {name: method.PRESET for name, method in METHODS.items() if hasattr(method, "PRESET")}
    for algo, preset in (train_dpo.PRESETS | train_grpo.PRESETS | of_papers).items():  # the --algo column follows the presets
        kinds = preset.get("loss_type", [])
        for kind in [kinds] if isinstance(kinds, str) else kinds:
            rows = [line for line in page.splitlines() if line.startswith(f"| `{kind}` |")]
            assert any(f"`{algo}`" in row for row in rows) or f"--algo {algo}" in page or f"file `{algo}`" in page, (algo, kind)


@pytest.mark.parametrize("line", [c for c in COMMANDS if not c.startswith((INSTALL, ". .venv"))])
def test_flags_of_every_command_exist(line):
    """A renamed flag must not live on in a page's command."""
    if "benchmarks/" in line:
        _, file, *parts = shlex.split(line)
        for part in parts:
            assert not part.startswith("--") or f'("{part}"' in (ROOT / file).read_text(), part
        return
    name, *flags = shlex.split(re.search(r"train_\w+\.py[^']*", line)[0])
    PARSERS[name](flags)


def flags_of(text):
    return set(re.findall(r"--\w+(?:-\w+)*", text))


@pytest.mark.parametrize("name", PAGES)
def test_pages_name_flags_that_exist(name):
    """Troubleshooting by a flag that is gone is worse than none."""
    scripts = [*ROOT.glob("benchmarks/*.py"), ROOT / "tests" / "gate.py"]
    known = known_flags() | {flag for file in scripts for flag in re.findall(r'\("(--\w+)"', file.read_text())}
    known |= {"--target_scale"}  # of the guide's own file
    others = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--shutdown-timeout",  # torchrun
              "--ntasks-per-node", "--dist",  # srun, pytest
              "--logprobs-mode", "--generation-config", "--enable-lora", "--max-lora-rank"}  # vllm
    assert flags_of(PAGES[name]) - known <= others, flags_of(PAGES[name]) - known


def test_trl_table():
    """Every flatpo flag of the table exists; where TRL is installed, every TRL name does, and no other name of TRL's that
    both have is missing from the table."""
    rows = [line.split("|")[1:4] for line in GUIDE.split("| TRL setting | flatpo flag |")[1].split("\n\n")[0].splitlines()[2:]]
    theirs = {name for left, _, _ in rows for name in re.findall(r"`(\w+)`", left)}
    ours = known_flags()
    assert len(rows) > 35 and all(left.strip() for left, _, _ in rows)
    for _, flags, note in rows:
        assert flags_of(flags + note) <= ours, flags
    pytest.importorskip("trl")
    from trl import DPOConfig, GRPOConfig, ModelConfig, RLOOConfig, ScriptArguments, SFTConfig
    from trl.scripts.grpo import GRPOScriptArguments

    known = {field.name for config in (DPOConfig, GRPOConfig, RLOOConfig, SFTConfig, ModelConfig, ScriptArguments,
                                       GRPOScriptArguments) for field in dataclasses.fields(config)}
    assert theirs <= known, theirs - known
    assert {flag.removeprefix("--") for flag in ours} & known <= theirs


def test_guide_snippets(tmp_path, monkeypatch):
    """The code that a reader copies: the writer of published data, with rows in the form of both data sets, and the reward."""
    writer, reward, *_ = re.findall(r"```python\n(.*?)```", GUIDE, re.S)  # others: test_the_guides_file_trains, test_rewards
    picture = Image.new("RGBA", (40, 30), "red")
    text = [{"type": "image", "text": None}, {"type": "text", "text": "what?"}]
    sets = {"HuggingFaceH4/rlaif-v_formatted": dict(
                images=[picture, picture], prompt=[{"role": "user", "content": text[:1] + text}],
                chosen=[{"role": "assistant", "content": [{"type": "text", "text": "red"}]}],
                rejected=[{"role": "assistant", "content": [{"type": "text", "text": "blue"}]}]),
            "lmms-lab/multimodal-open-r1-8k-verified": dict(
                image=picture, problem="how many?", solution="<think>one</think> <answer>3</answer>", original_answer="3")}
    stub = types.ModuleType("datasets")
    stub.load_dataset = lambda name, split: [dict(sets[name]) for _ in range(3)]
    monkeypatch.setitem(sys.modules, "datasets", stub)
    monkeypatch.chdir(tmp_path)
    exec(writer, {})
    for folder, need, images in (("rlaif-v", ("prompt", "chosen", "rejected"), 2), ("open-r1", ("prompt", "solution"), 1)):
        rows = data.read_rows(f"{folder}/train.jsonl", folder, need)
        assert len(rows) == 3 and all(data.load_image(image, rows[0]).size == (40, 30) for image in rows[0]["images"])
        blocks = [block["type"] for message in data.to_messages(rows[0]) for block in message["content"]]
        assert blocks.count("image") == images
    assert answers.accuracy(["<answer>3.0</answer>"], [rows[0]["solution"]]) == [1.0]
    names = {}
    exec(reward, names)
    assert names["brief"](["it is 42", "42 " + "so " * 20, "?"], solution=["42", "42", None], other=1) == [1.0, 0.0, None]
    (tmp_path / "x.jsonl").write_text(re.search(r"```json\n(.*?)```", GUIDE, re.S)[1])
    assert all(data.to_messages(row) for row in data.read_rows("x.jsonl", ".", ("prompt",)))


@pytest.mark.slow
def test_main_job_learns_from_the_picture(tmp_path):
    """The first command: accuracy climbs past 0.8, and the answers need the image: with blank or with another row's
    picture the trained model is at chance (1/6)."""
    folder, output = tmp_path, script("train_grpo.py", cwd=tmp_path)
    before, after = map(float, re.search(r"eval/accuracy: ([\d.]+) before, ([\d.]+) after\neval/reward", output).groups())
    assert after > 0.8 and after > before + 0.2
    assert "step 1 must start at: ratio 1 (expected 1), clip_ratio/region_mean 0 (expected 0), grad_norm" in output
    policy, processor = model.load_policy(str(folder / "runs" / "grpo-1" / "final"))
    rows = data.shapes_rows(256, 0, "test")
    rewards = rollout.RewardRunner(["accuracy"])
    pictures = [row["images"] for row in rows]
    blank = [[image.point(lambda _: 255) for image in images] for images in pictures]
    shares = {}
    for name, images in (("real", pictures), ("blank", blank), ("shuffled", pictures[1:] + pictures[:1])):
        shown = [row | {"images": image} for row, image in zip(rows, images)]
        _, scores = rollout.evaluate(policy, processor, shown, range(len(shown)),
                                     (data.encode_prompt(policy, processor, row) for row in shown), rewards, temperature=0,
                                     max_completion_length=24, batch_size=256, seed=0, step=0)
        shares[name] = scores[0].mean().item()
    rewards.close()
    assert shares["real"] == pytest.approx(after) and shares["blank"] < 0.3 and shares["shuffled"] < 0.3, shares


@pytest.mark.slow
def test_mpo_default_raises_accuracy_and_margins(tmp_path):
    """`python train_dpo.py`: held-out pairs and held-out answers both improve."""
    output = script("train_dpo.py", cwd=tmp_path)
    found = {k: (float(a), float(b)) for k, a, b in re.findall(r"(eval/\S+): (\S+) before, (\S+) after", output)}
    assert found["eval/accuracy"][1] > max(0.8, found["eval/accuracy"][0] + 0.1)
    assert found["eval/rewards/accuracies"][1] > 0.9 and found["eval/rewards/margins"][1] > 1


@pytest.mark.slow
def test_digits_commands(tmp_path):
    """The real-image recipe, cut to a few steps: files are written and read, each run starts from the one before."""
    pytest.importorskip("sklearn")
    run(python(), ROOT / "benchmarks" / "digits.py", "digits", cwd=tmp_path)
    command("python train_dpo.py", "runs/digits-sft/final")  # starts from there as well
    for line in (command("python train_dpo.py", "--algo sft"), command("python train_grpo.py", "runs/digits-sft/final")):
        name, *flags = shlex.split(line)[1:]
        output = script(name, *flags, "--max_steps", "2", "--max_completion_length", "3", cwd=tmp_path)
        assert "saved runs/digits" in output

"""What happens to the rows before step 1: every one is checked, bad ones are listed together, and what was learned of
a row is kept on disk by its content, so that the next start on the same data decodes no picture."""

import json
import os
import re
import shutil

import pytest
from conftest import FAMILIES, ROOT, InProcess, few, make_row, python, run
from PIL import Image
from test_runs import SCRIPTS, flags, grpo, launch, task  # noqa: F401 (fixtures)

import data
import model
import rollout

DRIVER = """
import importlib, os, sys
sys.path.insert(0, {root!r})
import data, model
decoded, decode, running = [], data.decode_image, model.Run.running
data.decode_image = lambda *a: decoded.append(a) or decode(*a)

def spy(run, step):
    print(f"rank {{run.rank}} decoded {{len(decoded)}} before its first step", flush=True)
    running(run, step)

model.Run.running = spy
try:
    importlib.import_module(sys.argv[1]).main(sys.argv[2:])
except model.InputError as error:
    print(f"rank {{os.environ['RANK']}}: {{error}}" if os.environ["RANK"] == "0" else "", flush=True)
    sys.exit(1)
"""


@pytest.fixture
def decoded(monkeypatch):
    """[pictures decoded before the first step, of each start of a script in this process]"""
    starts, count = [], [0]
    decode, running, start = data.decode_image, model.Run.running, model.Run.__init__

    def opened(run, args):
        count[0] = 0
        start(run, args)

    def counted(*args):
        count[0] += 1
        return decode(*args)

    def spy(run, step):
        starts.append(count[0])
        running(run, step)

    monkeypatch.setattr(data, "decode_image", counted)
    monkeypatch.setattr(model.Run, "running", spy)
    monkeypatch.setattr(model.Run, "__init__", opened)
    return starts


def extra_flags(name, task):
    return grpo(task, "--per_device_train_batch_size", 24) if name == "train_grpo" else ["--per_device_train_batch_size", 6]


@pytest.mark.parametrize("name", list(SCRIPTS))
def test_a_second_run_decodes_nothing_before_its_first_step(launch, task, decoded, capsys, name):  # noqa: F811
    """Every start read and encoded every row anew: 30 CPU minutes for 20,000 rows with pictures. The second run, and
    one of another batch size, must decode none, find every reference log-prob, and compute the same numbers."""
    first, grads = launch(name, "--max_steps", 2, *extra_flags(name, task))
    assert "data: prompt of" in capsys.readouterr().out
    second, again = launch(name, "--max_steps", 2, *extra_flags(name, task))
    out = capsys.readouterr().out
    assert decoded[0] >= 12 and decoded[1] == 0
    assert "data: 12 rows, 12 of them in this run, 0 skipped" in out and "data: prompt of" not in out
    assert name == "train_grpo" or "0 pairs computed, 12 found" in out
    assert [m["loss"] for m in first] == [m["loss"] for m in second]
    assert all((a == b).all() for a, b in zip(sum(grads, []), sum(again, [])))


@pytest.mark.parametrize("name", list(SCRIPTS))
def test_a_resumed_run_decodes_nothing_before_its_first_step(task, decoded, monkeypatch, tmp_path, name):  # noqa: F811
    """A run that died went through all of its rows again before it went on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rollout, "RewardRunner", InProcess)
    command = [*flags(task, "--max_steps", 3, "--save_steps", 1, *extra_flags(name, task)), "--output_dir", "r"]
    log = model.Run.log

    def die(run, metrics, shown):
        if metrics["step"] == 3:
            raise KeyboardInterrupt
        log(run, metrics, shown)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model.Run, "log", die)
        SCRIPTS[name].main(command)
    SCRIPTS[name].main(command)
    assert decoded[0] >= 12 and decoded[1] == 0
    assert [json.loads(line)["step"] for line in open("r/metrics.jsonl")] == [0, 1, 2, 3]


@pytest.fixture
def pictured(tmp_path):
    """Three rows with a picture file each."""
    rows = []
    for i in range(3):
        Image.new("RGB", (48, 32), (80 * i, 0, 0)).save(tmp_path / f"{i}.bmp")
        rows.append({"prompt": "how many?", "images": [f"{i}.bmp"], "chosen": f"<answer>{i}</answer>", "rejected": "7",
                     "_source": f"f:{i}", "_image_root": str(tmp_path)})
    return rows


def sizes(folder, policy, processor, rows, columns=("chosen", "rejected")):
    """(the rows' Sizes, how many of them had to be encoded)"""
    with data.RowCache(folder / "rows", policy, processor, columns) as measured:
        return [measured(row) for row in rows], measured.computed


def test_what_changed_is_encoded_again(loaded, pictured, tmp_path):
    """A stale entry would give a row another row's length and reference log-probs: a picture that was changed and kept
    its size and time, an answer, a prompt; while a row's place and its other columns are not part of its content."""
    policy, processor = loaded("qwen2_5_vl")
    before, computed = sizes(tmp_path, policy, processor, pictured)
    assert computed == 3
    assert sizes(tmp_path, policy, processor, [row | {"_source": "g:9", "solution": "4"} for row in pictured]) == (before, 0)
    about = os.stat(tmp_path / "1.bmp")
    Image.new("RGB", (48, 32), (80, 0, 1)).save(tmp_path / "1.bmp")
    os.utime(tmp_path / "1.bmp", ns=(about.st_atime_ns, about.st_mtime_ns))
    assert os.stat(tmp_path / "1.bmp").st_size == about.st_size
    after, computed = sizes(tmp_path, policy, processor, pictured)
    assert computed == 1 and [a == b for a, b in zip(before, after)] == [True, False, True]
    for change in (dict(chosen="<answer>9</answer>"), dict(rejected="6"), dict(prompt="how many"), dict(images=["2.bmp"])):
        (size,), computed = sizes(tmp_path, policy, processor, [pictured[0] | change])
        assert computed == 1 and size != before[0], change
    assert sizes(tmp_path, policy, processor, pictured, ("chosen",))[1] == 3
    (size, *_), computed = sizes(tmp_path, policy, processor, pictured, ())
    assert computed == 3 and size == (before[0].prompt, 0, "")


@pytest.mark.parametrize("change", ["template", "pixels", "eos", "code"])
def test_a_changed_processor_is_another_cache(folders, loaded, pictured, tmp_path, monkeypatch, change):
    """Entries of another chat template, image processor, end token or program are not this run's."""
    policy, _ = loaded("qwen2_5_vl")
    processor = model.load_processor(str(folders["qwen2_5_vl"]))
    before, _ = sizes(tmp_path, policy, processor, pictured)
    if change == "template":
        processor.chat_template = processor.chat_template.replace("\n'", " \n'")
    elif change == "pixels":
        processor.image_processor.size = {"shortest_edge": 256, "longest_edge": 1024}
    elif change == "eos":
        monkeypatch.setattr(policy, "eos_ids", [*policy.eos_ids, 300])
    else:
        (tmp_path / "data.py").write_text(open(data.__file__).read() + "\n")
        monkeypatch.setattr(data, "__file__", str(tmp_path / "data.py"))
    after, computed = sizes(tmp_path, policy, processor, pictured)
    assert computed == 3 and (before == after) == (change in ("eos", "code"))


@pytest.mark.parametrize("damage", ["emptied", "cut", "a digit"])
def test_a_damaged_file_is_ignored_and_written_anew(loaded, pictured, tmp_path, capsys, damage):
    """A file that a power cut emptied must not end the run, and a wrong digit must not become a row's length."""
    before, _ = sizes(tmp_path, *loaded("qwen2_5_vl"), pictured)
    (file,) = (tmp_path / "rows").rglob("*.txt")
    text = file.read_text()
    other = re.sub(r" (\d)", lambda digit: f" {9 - int(digit[1])}", text, count=1)
    file.write_text({"emptied": "", "cut": text[:-30], "a digit": other}[damage])
    capsys.readouterr()
    assert sizes(tmp_path, *loaded("qwen2_5_vl"), pictured) == (before, 3)
    assert f"warning: {file} is damaged: what it held is computed again" in capsys.readouterr().out
    assert file.read_text() == text and sizes(tmp_path, *loaded("qwen2_5_vl"), pictured) == (before, 0)
    assert capsys.readouterr().out == ""


def test_a_folder_that_cannot_be_written(loaded, pictured, tmp_path, capsys):
    """The cache saves time: without it a run goes on as before; so it does if one of its files cannot be read."""
    sizes(tmp_path, *loaded("qwen2_5_vl"), pictured)
    (file,) = (tmp_path / "rows").rglob("*.txt")
    file.unlink(), file.mkdir()
    assert sizes(tmp_path, *loaded("qwen2_5_vl"), pictured)[1] == 3
    assert str(file) in capsys.readouterr().out
    shutil.rmtree(tmp_path / "rows")
    (tmp_path / "rows").write_text("a file")
    for _ in range(2):
        assert sizes(tmp_path, *loaded("qwen2_5_vl"), pictured)[1] == 3
        assert "encodes these rows again" in capsys.readouterr().out


def write_bad_rows(task, tmp_path, bad):
    rows = [json.loads(line) for line in [*open(task / "pairs.jsonl")] * 3]
    for i in bad:
        rows[i] |= [dict(images=["missing.png"]), dict(prompt="<image> <image>"), dict(prompt="how many " * 900)][i % 3]
    lines = [json.dumps(row) for row in rows]
    if 0 in bad:
        lines[0] = "{"
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return ["--dataset", tmp_path / "rows.jsonl", "--max_steps", 9]


@pytest.mark.parametrize("name", list(SCRIPTS))
def test_bad_rows_are_listed_together(launch, task, tmp_path, name):  # noqa: F811
    """One bad row a start: who had twenty started twenty times. The first twenty have their places and what is wrong
    with it, in the order of rows, overlong ones too;
    the others are counted. The second start, whose good rows come from the cache, says the same."""
    bad = [0, *range(5, 30)]
    command = [*write_bad_rows(task, tmp_path, bad), *extra_flags(name, task)]
    for _ in range(2):
        with pytest.raises(data.RowError) as error:
            launch(name, *command)
        heading, *lines, rest = str(error.value).split("\n  ")
        assert heading == "26 rows cannot be used:" and rest == "and 6 more"
        assert [int(re.search(r"rows.jsonl:(\d+): ", line)[1]) for line in lines] == [i + 1 for i in bad[:20]]
        assert "not valid JSON" in lines[0] and "tokens with the images, more than the" in lines[1]
        assert "missing.png does not exist" in lines[2] and "image placeholders" in lines[3]


@pytest.mark.parametrize("name", list(SCRIPTS))
def test_bad_held_out_rows_and_columns_are_listed_together(launch, task, tmp_path, name):  # noqa: F811
    """The passes over held-out rows and over a column of numbers stopped at the first bad row, too."""
    write_bad_rows(task, tmp_path, [0, 5, 9])
    with pytest.raises(data.RowError, match=r"(?s)^3 rows cannot be used:\n.*jsonl:1: .*jsonl:6: .*jsonl:10: "):
        launch(name, "--max_steps", 1, "--eval_dataset", tmp_path / "rows.jsonl", *extra_flags(name, task))
    rows = [json.loads(line) | {"level": "x" if i in (2, 7) else i} for i, line in enumerate(open(task / "pairs.jsonl"))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(data.RowError, match=r"(?s)^2 rows cannot be used:\n.*jsonl:3: --sort_by .*jsonl:8: --sort_by "):
        launch(name, "--max_steps", 1, "--dataset", tmp_path / "rows.jsonl", "--sort_by", "level", *extra_flags(name, task))


def test_skipped_rows_are_counted_from_the_cache(launch, task, tmp_path, capsys):  # noqa: F811
    """--overlong skip must leave out the same rows, and draw the same others, when their lengths come from disk."""
    command = [*write_bad_rows(task, tmp_path, [5, 11]), *extra_flags("train_dpo", task), "--overlong", "skip"]
    found = []
    for _ in range(2):
        losses = [m["loss"] for m in launch("train_dpo", *command)[0]]
        found.append((losses, [line for line in capsys.readouterr().out.splitlines() if line.startswith("data: 36 rows")]))
    assert found[0] == found[1] and "2 skipped as longer than 2048" in found[0][1][0]


@pytest.mark.parametrize("family", few(FAMILIES, "qwen2_5_vl", "llava", "gemma3", "qwen3"))
def test_prompts_without_images_are_what_the_processor_makes(loaded, family):
    """They do not go through the processor, which takes five times as long: the ids must be its ids all the same."""
    policy, processor = loaded(family)
    assert data.leaves_text_alone(processor)
    for text in ("how many?", "a\nb", "10 % of <|x|>  two spaces"):
        row = make_row(0, text=text)
        rendered = data.begin_row(policy, processor, row).text
        special = data._special_tokens(processor.tokenizer, rendered)
        inputs = processor(text=[rendered], images=None, return_tensors="pt", **special)
        prompt = data.encode_prompt(policy, processor, row)
        assert prompt.tokens.tolist() == inputs["input_ids"][0].tolist() and prompt.pixels == {}
        assert prompt.tokens.tolist() == processor.tokenizer(rendered, **special)["input_ids"]
        types = {k: inputs[k] for k in data.TEXT_KEYS if k in inputs}
        assert prompt.positions.tolist() == policy.prompt_positions(prompt.tokens, types, {}).tolist()


def test_a_processor_that_adds_to_a_prompt_is_asked(loaded):
    """A family whose processor writes more than the text says keeps its processor call."""
    policy, processor = loaded("qwen2_5_vl")

    class Adding:
        tokenizer, apply_chat_template = processor.tokenizer, processor.apply_chat_template

        def __call__(self, text, **kwargs):
            return processor(text=["7" + text[0]], **kwargs)

    adding, row = Adding(), make_row(0)
    assert not data.leaves_text_alone(adding)
    assert len(data.encode_prompt(policy, adding, row).tokens) == len(data.encode_prompt(policy, processor, row).tokens) + 1


@pytest.mark.slow
def test_two_ranks(task, tmp_path):  # noqa: F811
    """The ranks share the work: all bad rows are in one list, whoever read them; and what one rank alone has learned
    serves two, and the other way round."""
    data.build_tiny_vlm(tmp_path / "start")
    (tmp_path / "driver.py").write_text(DRIVER.format(root=str(ROOT)))

    def start(ranks, *more, ok=True):
        size = ["--per_device_train_batch_size", 6 // ranks]
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        return run(python(), *torchrun, tmp_path / "driver.py", "train_dpo",
                   *flags(task, "--max_steps", 2, "--model_name_or_path", tmp_path / "start", *size, *more),
                   cwd=tmp_path, ok=ok)

    out = start(2, "--output_dir", "a")
    assert len(re.findall(r"rank \d decoded [1-9]\d* before", out)) == 2
    for ranks, output in ((2, "b"), (1, "c")):
        assert len(re.findall(r"rank \d decoded 0 before", start(ranks, "--output_dir", output))) == ranks
    out = start(2, "--output_dir", "d", *write_bad_rows(task, tmp_path, [0, *range(5, 30)]), ok=False)
    lines = [int(n) for n in re.findall(r"^  \S*rows.jsonl:(\d+): ", out, re.M)]
    assert lines[:20] == [1, *range(6, 25)] and "and 6 more" in out

"""A run that dies anywhere and is started again gives the numbers of one that did not: bit for bit on one machine."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ENVIRONMENT, ROOT, InProcess, after_log, python, run
from safetensors import SafetensorError
from safetensors.torch import load_file
from test_runs import REWARD, SCRIPTS, grpo, write_task

import data
import losses
import model
import rollout
import train_dpo

DRIVER = ROOT / "tests" / "kill_cases.py"
FORK = multiprocessing.get_context("fork")
WORKERS = ["--dataloader_num_workers", "2"]  # of runs that die; those that they are compared with have none


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    write_task(folder)
    data.build_tiny_vlm(folder / "start")
    return folder


def flags(folder, name, output, *extra):
    """9 steps, two epochs and more; GRPO with a reference and three updates a rollout, so that step 4 and 8 lie inside one."""
    common = ["--model_name_or_path", folder / "start", "--dataset", folder / "pairs.jsonl", "--image_root", folder,
              "--learning_rate", "1e-3", "--warmup_steps", "2", "--max_steps", "9", "--save_steps", "2",
              "--eval_dataset", folder / "pairs.jsonl", "--eval_steps", "4", "--max_completion_length", "6",
              "--output_dir", output]
    online = [*grpo(folder), "--algo", "grpo", "--beta", "0.1", "--per_device_train_batch_size", "8",
              "--steps_per_generation", "3"]
    offline = ["--algo", "mpo", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2",
               "--ref_cache", folder / "ref_cache"]
    return [str(f) for f in (*common, *(online if name == "train_grpo" else offline), *extra)]


def results(output):
    """(metrics without times, completions, final weights)"""
    metrics = [{k: v for k, v in json.loads(line).items() if not k.endswith("_time")}
               for line in open(output / "metrics.jsonl")]
    texts = {file.name: file.read_text() for file in sorted((output / "completions").iterdir())}
    return metrics, texts, load_file(output / "final" / "model.safetensors")


def assert_bit_equal(ours, theirs):
    assert [m["step"] for m in ours[0]] == list(range(10))
    assert ours[0] == theirs[0] and ours[1] == theirs[1]
    assert ours[2].keys() == theirs[2].keys() and all(torch.equal(ours[2][k], theirs[2][k]) for k in ours[2])


@pytest.fixture(scope="session")
def whole(folder):
    """name -> the results of an uninterrupted run, in its own process, which is Python's own and not forked by warm.py."""
    made = {}

    def get(name):
        if name not in made:
            run(sys.executable, DRIVER, "none", 0, "-", name, *flags(folder, name, folder / f"whole-{name}"), cwd=folder)
            made[name] = results(folder / f"whole-{name}")
        return made[name]

    return get


KILLS = {"train_grpo": [("save", 7), ("sample", 9)], "train_dpo": [("log", 5), ("export", 2)]}


@pytest.mark.slow
def test_killed_again_and_again(folder, whole, tmp_path):
    """F1, F2: SIGKILL in a save, then in a rollout; in a log line, then in the export: the same losses, rewards, sampled
    texts and weights, each step logged once (transformers #40691, open-instruct #681: data order after a resume in a
    later epoch)."""

    def killed(name):
        expected = whole(name)
        for phase, n in KILLS[name]:
            command = [python(), DRIVER, phase, str(n), "SIGKILL", name, *flags(folder, name, tmp_path / name, *WORKERS)]
            code = subprocess.run(command, cwd=tmp_path, capture_output=True, env=ENVIRONMENT).returncode
            assert code == -9, (phase, n, code)
        output = run(python(), DRIVER, "none", 0, "-", name, *flags(folder, name, tmp_path / name, *WORKERS), cwd=tmp_path)
        assert "resumed from" in output
        assert_bit_equal(results(tmp_path / name), expected)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(killed, KILLS))


def launch_ranks(folder, ranks, name, output, *extra, phase="none", n=0, signal="-", rank=0, ok=True):
    size = (["--per_device_train_batch_size", 8 // ranks] if name == "train_grpo" else
            ["--per_device_train_batch_size", 4 // ranks, "--gradient_accumulation_steps", 1])  # one update as of one rank
    return run(python(), "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", DRIVER, phase, n,
               signal, name, *flags(folder, name, output, *size, *WORKERS, *extra), cwd=folder, ok=ok, timeout=300,
               env={"KILL_RANK": str(rank)})


@pytest.mark.slow
def test_resume_on_other_numbers_of_ranks(folder, whole, tmp_path):
    """F4, F8: two ranks, SIGTERM to the second alone in a rollout: both stop at one step. One rank goes on from inside
    the rollout; the same batches, and the numbers of one process (rounding apart)."""
    output = launch_ranks(folder, 2, "train_grpo", tmp_path / "r", phase="step", n=4, signal="SIGTERM", rank=1)
    assert "stopped at step 4" in output
    rows = load_file(tmp_path / "r" / "checkpoints" / "step_4" / "rollout.safetensors")
    assert len(rows["draws"]) == 6 and len(rows["completion_ids"]) == 24, "step 4 lies inside the second rollout"
    run(python(), DRIVER, "none", 0, "-", "train_grpo", *flags(folder, "train_grpo", tmp_path / "r"), cwd=tmp_path)
    ours, theirs = results(tmp_path / "r"), whole("train_grpo")
    assert len(ours[0]) == 10
    for a, b in zip(ours[0][:7], theirs[0][:7]):  # later a sampled token may differ by rounding
        for key in {"loss", "grad_norm", "reward", "kl"} & b.keys():
            assert a[key] == pytest.approx(b[key], rel=2e-3, abs=2e-5), (a["step"], key)


@pytest.mark.slow
def test_a_dead_rank_ends_the_run_and_it_resumes(folder, whole, tmp_path):
    """F1, F6, F8: SIGKILL to one of two ranks while the other waits: torchrun ends both, and four ranks go on."""
    launch_ranks(folder, 2, "train_dpo", tmp_path / "r", phase="step", n=6, signal="SIGKILL", rank=1, ok=False)
    output = launch_ranks(folder, 4, "train_dpo", tmp_path / "r")
    assert "resumed from" in output
    ours, theirs = results(tmp_path / "r"), whole("train_dpo")
    for a, b in zip(ours[0], theirs[0], strict=True):
        for key in {"loss", "bco_delta", "grad_norm"} & b.keys():
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-6), (a["step"], key)


@pytest.mark.slow
def test_a_full_disk_on_one_rank(folder, tmp_path):
    """F14: one rank of two cannot write its shard: no rank takes the checkpoint for written, nothing half-made stays, the
    run goes on and ends at the third failure, with the reason, on both."""
    output = launch_ranks(folder, 2, "train_dpo", tmp_path / "r", phase="full", rank=1, ok=False)
    assert output.count("warning: no checkpoint of step") == output.count(": rank 1: ") == 3
    assert "error: no checkpoint could be written under" in output
    assert list((tmp_path / "r" / "checkpoints").iterdir()) == []
    assert [json.loads(line)["step"] for line in open(tmp_path / "r" / "metrics.jsonl")] == list(range(7))


# --- in one process: what is on disk, and what may change


@pytest.fixture
def trained(folder, tmp_path, monkeypatch):
    """train(name, *extra): main() in this process, on a copy of a run of 6 steps with checkpoints at 2, 4 and 6."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rollout, "RewardRunner", InProcess)
    handlers = [model.signal.getsignal(n) for n in (model.signal.SIGTERM, model.signal.SIGINT)]

    def train(name, *extra):
        SCRIPTS[name].main([*flags(folder, name, tmp_path / "r", "--save_total_limit", 3), *map(str, extra)])

    yield train
    for number, handler in zip((model.signal.SIGTERM, model.signal.SIGINT), handlers):
        model.signal.signal(number, handler)


@pytest.fixture
def whole_here(trained, tmp_path):
    """The results of an uninterrupted run in this process: `trained` as it is, its folder moved away."""

    def get(name):
        if name not in WHOLE:
            trained(name)
            (tmp_path / "r").rename(tmp_path / "whole")
            WHOLE[name] = results(tmp_path / "whole")
        return WHOLE[name]

    return get


WHOLE = {}


class Dead(BaseException):
    """Stands for a kill where one process is enough."""


def die_at(monkeypatch, step):
    """-> the undo"""
    def deadly(metrics):
        if metrics["step"] == step:
            raise Dead

    return after_log(monkeypatch, deadly)


def dead_run(train, monkeypatch, name="train_dpo", step=7):
    undo = die_at(monkeypatch, step)
    with pytest.raises(Dead):
        train(name)
    undo()


def signal_at(monkeypatch, phase, n):
    """SIGTERM to this very process the n-th time that a function is reached."""
    place, function = {"sample": (rollout, "sample_tokens"), "score": (losses, "preference_losses"), "save": (model, "crc32"),
                       "step": (model, "clip_grad_norm_"), "reference": (train_dpo, "group_key")}[phase]
    original, left = getattr(place, function), [n]

    def spy(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), model.signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(place, function, spy)
    return lambda: monkeypatch.setattr(place, function, original)


@pytest.mark.parametrize("name, phase, n, step", [
    ("train_grpo", "sample", 16, 3), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("train_dpo", "reference", 2, 0), ("train_grpo", "sample", 8, 0), ("train_grpo", "step", 5, 5), ("train_grpo", "save", 1, 3),
        ("train_dpo", "sample", 9, 4)))])
def test_sigterm_is_a_checkpoint(trained, whole_here, monkeypatch, tmp_path, name, phase, n, step):
    """F3: SIGTERM in a held-out pass, a rollout, a step, a save, a reference pass: the run ends in good order with a
    checkpoint, and the same command goes on as if nothing had happened; also before the first step, where torch makes up
    an optimizer state of one step."""
    expected = whole_here(name)
    undo = signal_at(monkeypatch, phase, n)
    trained(name, *WORKERS, *(["--ref_cache", tmp_path / "new"] if phase == "reference" else []))
    assert json.loads((tmp_path / "r" / "status.json").read_text()) == {"status": "stopped", "step": step}
    assert not (tmp_path / "r" / "final").exists()
    undo()
    trained(name)
    assert_bit_equal(results(tmp_path / "r"), expected)


@pytest.mark.slow
def test_dynamic_sampling_and_a_moving_reference_resume(trained, monkeypatch, tmp_path):
    """Dynamic sampling's draw numbers, the variances that prompts are drawn by and moving_reference's weights belong to
    the state: dead inside the rollout of step 5, after a sync, and started again, the numbers are those of a run that was
    left alone: also the prompts of the rollout that is gone on with, drawn by the variances from before it."""
    extra = ["--reward_funcs", tmp_path / "rare.py:rare", "--dynamic_sampling", 3, "--variance_sampling", "0.7",
             "--algo", "grpo", "variance_sampling", "moving_reference", "--ref_model_sync_steps", 3, "--save_steps", 4]
    (tmp_path / "rare.py").write_text(REWARD)
    trained("train_grpo", *extra)
    (tmp_path / "r").rename(tmp_path / "whole")
    undo = die_at(monkeypatch, 5)
    with pytest.raises(Dead):
        trained("train_grpo", *extra, *WORKERS)
    undo()
    state = json.loads((tmp_path / "r" / "checkpoints" / "step_4" / "state.json").read_text())
    assert len(state["draws"]) == 6 and state["next_draw"] > 12 and sorted(state["draws"]) == state["draws"]
    assert any(state["variance"].values()) and state["measured"].keys() & state["variance"].keys()
    trained("train_grpo", *extra, *WORKERS)
    assert_bit_equal(results(tmp_path / "r"), results(tmp_path / "whole"))


@pytest.mark.parametrize("damage", ["flip", *(pytest.param(damage, marks=pytest.mark.slow) for damage in (
    "truncate", "no manifest", "no shard"))])
def test_a_bad_checkpoint_falls_back(trained, monkeypatch, tmp_path, capsys, damage):
    """F11: a checkpoint that is cut, changed (safetensors loads a flipped byte) or incomplete is named and passed
    over; the run goes on from the one before. F15: a left-over step_N.tmp is nobody's checkpoint."""
    dead_run(trained, monkeypatch)
    newest = tmp_path / "r" / "checkpoints" / "step_6"
    shutil.copytree(newest, newest.with_name("step_8.tmp"))
    shard = next(newest.glob("__0_*"))
    content = bytearray(shard.read_bytes())
    if damage == "truncate":
        shard.write_bytes(content[:-100])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    elif damage == "no shard":
        shard.unlink()
    else:
        (newest / "manifest.json").unlink()
    capsys.readouterr()
    trained("train_dpo")
    said = capsys.readouterr().out
    assert "resumed from" in said and "step 4" in said
    assert damage == "no manifest" or (f"checkpoint {newest} cannot be used" in said and shard.name in said)
    assert [json.loads(line)["step"] for line in open(tmp_path / "r" / "metrics.jsonl")] == list(range(10))


@pytest.mark.slow
def test_only_bad_checkpoints_are_an_error(trained, monkeypatch, tmp_path):
    """F12: never a silent fresh start."""
    dead_run(trained, monkeypatch)
    kept = sorted(p.name for p in (tmp_path / "r" / "checkpoints").iterdir())
    assert kept == ["step_2", "step_4", "step_6"]
    for checkpoint in (tmp_path / "r" / "checkpoints").iterdir():
        (checkpoint / "state.json").write_text("{}")
    with pytest.raises(model.InputError, match="none of the checkpoints under .*step_2"):
        trained("train_dpo")


@pytest.mark.slow
def test_old_checkpoints_go_after_the_new_one_is_there(trained, monkeypatch, tmp_path):
    """--save_total_limit 1 keeps one; a save that fails leaves the older ones whole, and the third in a row ends the run."""
    trained("train_dpo", "--save_total_limit", 1)
    assert [p.name for p in (tmp_path / "r" / "checkpoints").iterdir()] == ["step_9"]
    shutil.rmtree(tmp_path / "r")
    saves = []
    save = model.dcp.save

    def full_disk(*args, **kwargs):
        saves.append(1)
        if len(saves) > 1:
            raise OSError(28, "No space left on device")
        return save(*args, **kwargs)

    monkeypatch.setattr(model.dcp, "save", full_disk)
    with pytest.raises(model.InputError, match="no checkpoint could be written"):
        trained("train_dpo")
    assert [p.name for p in (tmp_path / "r" / "checkpoints").iterdir()] == ["step_2"] and len(saves) == 4


def test_no_manifest_is_no_fresh_start(trained, monkeypatch, tmp_path):
    """A folder with checkpoints of which none counts is an error, and metrics.jsonl stays as it is."""
    dead_run(trained, monkeypatch, step=5)
    for file in (tmp_path / "r" / "checkpoints").glob("*/manifest.json"):
        file.unlink()
    before = (tmp_path / "r" / "metrics.jsonl").read_text()
    with pytest.raises(model.InputError, match="none of the checkpoints under"):
        trained("train_dpo")
    assert (tmp_path / "r" / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_what_was_resumed_from_is_never_replaced(trained, monkeypatch, tmp_path):
    """Stopped in the evaluation of step 4, resumed, killed in the next save: step_4 is still there, also with a limit of
    one; a copy that somebody made (step_4.bak) bothers nobody."""
    undo = signal_at(monkeypatch, "sample", 9)
    trained("train_dpo", "--save_total_limit", 1)
    undo()
    checkpoints = tmp_path / "r" / "checkpoints"
    assert [p.name for p in checkpoints.iterdir()] == ["step_4"]
    shutil.copytree(checkpoints / "step_4", checkpoints / "step_4.bak")

    def dead(*_, **__):
        raise Dead

    with monkeypatch.context() as patch:
        patch.setattr(model.dcp, "save", dead)
        with pytest.raises(Dead):
            trained("train_dpo", "--save_total_limit", 1)
    assert (checkpoints / "step_4" / "manifest.json").exists()
    trained("train_dpo", "--save_total_limit", 1)
    assert [json.loads(line)["step"] for line in open(tmp_path / "r" / "metrics.jsonl")] == list(range(10))


@pytest.mark.parametrize("change, message", [
    (["--beta", "0.3"], r"beta: 0.1 -> 0.3"), (["--max_steps", "12"], "max_steps: 9 -> 12"),
    (["--gradient_accumulation_steps", "1"], "rows per update: 4 -> 2"), ("data", "data: "), ("weights", "model: .*model.safetensors"),
    ("chat_template.jinja", "model: .*chat_template.jinja"), ("config.json", "model: .*/config.json")])
def test_changed_settings_are_refused(trained, monkeypatch, tmp_path, folder, change, message):
    """F9: other flags, data, batch, start weights, config or chat template than the run was started with: a list of what
    changed, unless each is allowed by name."""
    dead_run(trained, monkeypatch, step=3)
    extra = change if isinstance(change, list) else []
    if change == "data":
        original = (folder / "pairs.jsonl").read_bytes()
        (folder / "pairs.jsonl").write_bytes(original + b"\n")
    file = folder / "start" / ("model.safetensors" if change == "weights" else str(change))
    if file.exists():
        original = file.read_bytes()
        file.write_bytes(original[:-1] + bytes([original[-1] ^ 1]) if change == "weights" else original + b"\n")
    try:
        with pytest.raises(model.InputError, match=message) as error:
            trained("train_dpo", *extra)
        named = str(error.value).split("--allow_changed ")[1].replace("'", "")
        if change == ["--beta", "0.3"]:
            trained("train_dpo", *extra, "--allow_changed", named)
    finally:
        if change == "data":
            (folder / "pairs.jsonl").write_bytes(original)
        if file.exists():
            file.write_bytes(original)


def test_resume_never_and_strange_folders(trained, monkeypatch, tmp_path):
    """--resume never wants an empty folder; a folder that is no run is never written into."""
    dead_run(trained, monkeypatch, step=3)
    with pytest.raises(model.InputError, match="is not empty"):
        trained("train_dpo", "--resume", "never")
    (tmp_path / "r" / "args.json").write_text('{"lr": 1}')  # somebody's own
    with pytest.raises(model.InputError, match="is not empty"):
        trained("train_dpo")
    (tmp_path / "r" / "args.json").unlink()
    with pytest.raises(model.InputError, match="is not empty"):
        trained("train_dpo")


@pytest.mark.slow
def test_a_run_without_its_status_goes_on(trained, monkeypatch, tmp_path, capsys):
    """args.json and checkpoints alone, as a backup may have them, are a run all the same: not a fresh start, whose first
    save would drop them. A failed start leaves neither, and may be tried again with other flags."""
    dead_run(trained, monkeypatch)
    (tmp_path / "r" / "status.json").unlink(), (tmp_path / "r" / "metrics.jsonl").unlink()
    with pytest.raises(model.InputError, match="beta: 0.1 -> 0.3"):
        trained("train_dpo", "--beta", "0.3")
    trained("train_dpo")
    assert "step_6, step 6" in capsys.readouterr().out
    with pytest.raises(model.InputError, match="--dataset nosuch.jsonl"):
        trained("train_dpo", "--output_dir", tmp_path / "new", "--dataset", "nosuch.jsonl")
    die_at(monkeypatch, 1)
    with pytest.raises(Dead):
        trained("train_dpo", "--output_dir", tmp_path / "new")


@pytest.mark.slow
def test_changed_code_only_warns(trained, monkeypatch, tmp_path, capsys):
    """People fork: other code than the run was started with is said, and goes on."""
    dead_run(trained, monkeypatch, step=3)
    saved = json.loads((tmp_path / "r" / "args.json").read_text())
    (tmp_path / "r" / "args.json").write_text(json.dumps(saved | {"code": "0"}))
    trained("train_dpo")
    assert "warning: resumed with other code" in capsys.readouterr().out
    trained("train_dpo")  # once more: there is nothing left to do
    assert "is done; its model is" in capsys.readouterr().out


def test_max_hours_stops_with_a_checkpoint(trained, monkeypatch, tmp_path):
    """F10: --max_hours is a stop like SIGTERM, and the learning-rate schedule goes on as if it had not been."""
    clock = [0.0]
    monkeypatch.setattr(model.time, "monotonic", lambda: clock[0])
    def tick(metrics):
        clock[0] += 600

    after_log(monkeypatch, tick)
    monkeypatch.setattr(model, "STARTED", 0.0)
    trained("train_dpo", "--max_hours", 0.7)
    assert json.loads((tmp_path / "r" / "status.json").read_text()) == {"status": "stopped", "step": 4}
    trained("train_dpo")
    rates = [json.loads(line)["learning_rate"] for line in open(tmp_path / "r" / "metrics.jsonl") if '"learning_rate"' in line]
    assert rates == pytest.approx([0, 5e-4, *(1e-3 * (9 - i) / 7 for i in range(2, 9))])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_dpo", "train_grpo"])
def test_a_finished_run_goes_on_to_more_steps(trained, tmp_path, name):
    """A finished run whose --max_steps was raised began again at step 0, over its own results, when its last step was no
    multiple of --save_steps. Step 5 lies inside a rollout."""
    extra = ["--lr_scheduler_type", "constant", "--eval_steps", 100]
    trained(name, *extra)
    whole = results(tmp_path / "r")
    (tmp_path / "r").rename(tmp_path / "whole")
    trained(name, *extra, "--max_steps", 5)
    assert (tmp_path / "r" / "checkpoints" / "step_5" / "manifest.json").exists()
    trained(name, *extra, "--allow_changed", "max_steps")
    ours = results(tmp_path / "r")
    assert [{k: v for k, v in m.items() if not k.startswith("eval/")} for m in ours[0]] == [
        {k: v for k, v in m.items() if not k.startswith("eval/")} for m in whole[0]]
    assert all(torch.equal(ours[2][k], whole[2][k]) for k in whole[2])


@pytest.mark.slow
def test_a_bad_checkpoint_takes_no_place(trained, monkeypatch, tmp_path):
    """With --save_total_limit 1 a bad newest checkpoint, passed over at the start, stayed as "the newest", and the good one
    just written was deleted. What killed saves left goes as well; what is not ours stays."""
    dead_run(trained, monkeypatch)
    checkpoints = tmp_path / "r" / "checkpoints"
    (checkpoints / "step_6" / "state.json").write_text("{}")
    for name in ("step_3.tmp", "step_1", "notes"):
        (checkpoints / name).mkdir()
    undo = signal_at(monkeypatch, "step", 1)
    trained("train_dpo", "--save_total_limit", 1)
    undo()
    assert sorted(p.name for p in checkpoints.iterdir()) == ["notes", "step_5"]


@pytest.mark.slow
def test_allowed_hyperparameters_take_effect(trained, monkeypatch, tmp_path):
    """--allow_changed learning_rate was recorded and ignored: the optimizer's own came back with the checkpoint."""
    undo = die_at(monkeypatch, 3)
    with pytest.raises(Dead):
        trained("train_dpo", "--lr_scheduler_type", "constant")
    undo()
    groups = []
    monkeypatch.setattr(model, "make_optimizer", lambda *a, make=model.make_optimizer: [groups.append(made := make(*a)), made][1])
    trained("train_dpo", "--lr_scheduler_type", "constant", "--learning_rate", 1e-5, "--weight_decay", 0.3, "--adam_beta2", 0.5,
            "--allow_changed", "learning_rate", "weight_decay", "adam_beta2")
    rates = [json.loads(line).get("learning_rate") for line in open(tmp_path / "r" / "metrics.jsonl")]
    assert rates[2:4] == pytest.approx([5e-4, 1e-5]) and rates[4:] == pytest.approx([1e-5] * 6)
    group = groups[0][0].param_groups[0]
    assert (group["weight_decay"], group["betas"]) == (0.3, (0.9, 0.5))


@pytest.mark.parametrize("name", ["train_dpo", pytest.param("train_grpo", marks=pytest.mark.slow)])
def test_a_gradient_of_nan_is_skipped(trained, monkeypatch, tmp_path, name):
    """F42: a non-finite gradient norm skips the update: weights and moments stay, the step is counted; three in a row end
    the run with the rows named."""
    clip, norms = model.clip_grad_norm_, iter([None, None, float("nan"), None, None, *[float("inf")] * 5])
    weights = []

    def spy(parameters, limit):
        weights.append(parameters[0].detach().clone())
        norm, real = next(norms), clip(parameters, limit)
        if norm is not None:
            for p in parameters:
                p.grad.fill_(float("nan"))
        return real if norm is None else norm

    monkeypatch.setattr(model, "clip_grad_norm_", spy)
    with pytest.raises(model.InputError, match="three steps in a row had a gradient norm"):
        trained(name, "--eval_steps", 100)
    assert torch.equal(weights[2], weights[3]) and not torch.equal(weights[3], weights[4])
    assert torch.equal(weights[5], weights[7]) and weights[7].isfinite().all() and len(weights) == 8
    named = json.loads((tmp_path / "r" / "nonfinite_rank_0.json").read_text())
    assert named["step"] == 8 and len(named["rows"]) == {"train_dpo": 4, "train_grpo": 2}[name]  # the update's own
    if name == "train_grpo":  # step 8 is the second update of the rollout of step 7, two prompts of four completions each
        drawn = [json.loads(line)["row"] for line in open(tmp_path / "r" / "completions" / "step_7.jsonl")]
        assert named["rows"] == drawn[8:16:4] != drawn[0:8:4]


def test_a_folder_that_was_not_finished(trained, monkeypatch, tmp_path):
    """A disk full while the folder was set up left files but no args.json: "is not empty", for good."""
    write = model.write_atomically

    def full(path, text):
        path.with_name(path.name + ".tmp").write_text(text[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "write_atomically", full)
    with pytest.raises(model.InputError, match="No space left"):
        trained("train_dpo")
    monkeypatch.setattr(model, "write_atomically", write)
    die_at(monkeypatch, 1)
    with pytest.raises(Dead):
        trained("train_dpo")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_in_the_cold_start(tmp_path, number):
    """SIGTERM while the built-in model has its supervised start hung for ever: the handler waited for the child under the
    lock of the wait that it had interrupted. Later it ended without a word; and SIGKILL left the child, which held its folder."""
    command = [python(), ROOT / "train_grpo.py", "--output_dir", "r"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT) as run:
        assert any(line.startswith("sft in ") for line in run.stdout)  # the child's: by now its parent waits for it
        run.send_signal(number)
        rest = run.stdout.read()  # to its end: no process is left that could write to it
        assert run.wait(60) == (143 if number == signal.SIGTERM else -9)
    assert "Traceback" not in rest
    assert number == signal.SIGKILL or "stopped in the cold start; the same command" in rest


def test_a_second_signal_ends_at_once(monkeypatch):
    """F5: whoever presses ctrl-C again after two seconds does not want to wait for the checkpoint; the same signal twice
    at once is one that torchrun passed on."""
    stop = model.Stop(None)
    handlers = [model.signal.SIGTERM, model.signal.SIGINT]
    try:
        os.kill(os.getpid(), model.signal.SIGTERM)
        assert stop()
        killed = []
        monkeypatch.setattr(model.os, "kill", lambda pid, number: killed.append(number))
        stop._handle(model.signal.SIGTERM, None)  # at once: slurmstepd told torchrun and the rank, torchrun the rank
        assert killed == []
        stop.since -= 3
        stop._handle(model.signal.SIGINT, None)
        assert killed == [model.signal.SIGINT] and model.signal.getsignal(model.signal.SIGINT) == model.signal.SIG_DFL
    finally:
        for number, handler in zip(handlers, (model.signal.SIG_DFL, model.signal.default_int_handler)):
            model.signal.signal(number, handler)


def test_a_checkpoint_of_other_code_is_refused(tmp_path, monkeypatch):
    """BCO's shift was saved under another name once: a run that went on from such a checkpoint began with a shift of 0,
    without a word. What a state lacks is named."""
    (tmp_path / "metrics.jsonl").write_text("")
    old = {"step": 3, "pending": None, "delta": 0.7}
    monkeypatch.setattr(model, "load_checkpoint", lambda *_: (dict(old), {}))
    run = model.Run(train_dpo.parse_args(["--output_dir", str(tmp_path / "r")]))
    run.resumed = True
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    state = {"step": 0, "pending": {"step": 0}, "bco_shift": 0.0}
    with pytest.raises(model.InputError, match="step 3 lacks bco_shift: other code"):
        run.restore(state, None, optimizer)
    old["bco_shift"] = 0.7
    run.restore(state, None, optimizer)
    assert state["bco_shift"] == 0.7


# --- one run in a folder, and files that cannot be read or written


def holds(folder, connection):
    """Stands for the process of another run."""
    model.hold(folder)
    connection.send(os.getpid())
    time.sleep(60)


@pytest.mark.parametrize("has_locks", [True, False])
def test_a_folder_has_one_run(tmp_path, monkeypatch, has_locks):
    """Two runs in one --output_dir wrote every step twice, and the second finished from the first's checkpoint. The second
    ends with the folder and the process that holds it; when that one dies, the folder is free."""
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    if not has_locks:
        monkeypatch.setattr(model.fcntl, "flock", unsupported)
    ours, theirs = FORK.Pipe()
    other = FORK.Process(target=holds, args=(tmp_path, theirs), daemon=True)
    other.start()
    holder = ours.recv()
    monkeypatch.setattr(model.time, "sleep", lambda seconds: None)
    with pytest.raises(model.InputError, match=f"--output_dir {tmp_path} is in use by process {holder} on "):
        model.hold(tmp_path)
    other.kill()
    other.join()
    if not has_locks:  # nobody has touched it for a minute
        os.utime(tmp_path / "lock", (0, time.time() - 61))
        monkeypatch.setattr(model.threading, "Thread", lambda **_: Namespace(start=lambda: None))
    model.hold(tmp_path)
    assert f"process {os.getpid()} on" in (tmp_path / "lock").read_text()


def test_a_run_in_use_is_refused(trained, tmp_path):
    """The same, asked of the script: nothing of the folder is touched."""
    (tmp_path / "r").mkdir()
    ours, theirs = FORK.Pipe()
    other = FORK.Process(target=holds, args=(tmp_path / "r", theirs), daemon=True)
    other.start()
    ours.recv()
    try:
        with pytest.raises(model.InputError, match="is in use by process"):
            trained("train_dpo")
    finally:
        other.kill()
    assert [file.name for file in (tmp_path / "r").iterdir()] == ["lock"]


def test_damaged_status_and_args(trained, monkeypatch, tmp_path, capsys):
    """A status.json or args.json that a power cut left empty was a traceback, or "is not empty" for good. The checkpoints
    say how far the run is."""
    dead_run(trained, monkeypatch)
    for name in ("status.json", "args.json"):
        (tmp_path / "r" / name).write_text('{"st')
    with pytest.raises(model.InputError, match="args.json is damaged.*--allow_changed args.json goes on"):
        trained("train_dpo")
    trained("train_dpo", "--allow_changed", "args.json")
    assert "step_6, step 6" in capsys.readouterr().out
    assert json.loads((tmp_path / "r" / "status.json").read_text()) == {"status": "done", "step": 9}


def test_an_export_that_fails_is_done_by_the_same_command(trained, monkeypatch, tmp_path):
    """The last step had no checkpoint when it was no multiple of --save_steps: an export that failed lost all since the last
    one. /dev/full is a full disk: the file and the free space are named."""
    export = model.export

    def full(*args):
        with open("/dev/full", "w") as file:
            file.write("x")

    monkeypatch.setattr(model, "export", full)
    with pytest.raises(model.InputError, match="r/final cannot be written: .*No space left.* MB are free there"):
        trained("train_dpo", "--max_steps", 3)
    steps = []
    monkeypatch.setattr(model, "export", export)
    after_log(monkeypatch, lambda metrics: steps.append(metrics["step"]))
    trained("train_dpo", "--max_steps", 3)
    assert steps == [] and (tmp_path / "r" / "final" / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "completions/eval_0.jsonl", "status.json.tmp"])
def test_a_full_disk_is_one_line(trained, monkeypatch, tmp_path, name):
    """No space for metrics, completions or the status was a traceback without a file's name."""
    file = tmp_path / "r" / name
    restore = model.Run.restore

    def fill(run, *args):  # when the folder is there
        file.symlink_to("/dev/full")
        return restore(run, *args)

    monkeypatch.setattr(model.Run, "restore", fill)
    with pytest.raises(model.InputError, match=f"{name.removesuffix('.tmp')} cannot be written: .*No space left"):
        trained("train_dpo")


def test_a_full_disk_for_the_tiny_model(tmp_path, monkeypatch):
    """safetensors raises an error of its own for a full disk, and the run's first file was a traceback."""
    def full(folder, seed):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(data, "build_tiny_vlm", full)
    with pytest.raises(model.InputError, match="tiny_vlm: SafetensorError: No space left"):
        data.start_model(Namespace(model_name_or_path=None, cold_start_steps=0, seed=0), tmp_path)


@pytest.mark.xdist_group("warm")
def test_a_run_that_fails_early_leaves_no_folder(tmp_path):
    """Every failed attempt left a folder runs/mpo-N, and the next was runs/mpo-N+1. The dataset does not exist."""
    run(python(), ROOT / "train_dpo.py", "--model_name_or_path", "tiny", "--dataset", "x.jsonl", cwd=tmp_path, ok=False)
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.slow
def test_ctrl_c_before_the_first_step_is_one_line(tmp_path):
    """Ctrl-C while torch was imported, or the data read, was a traceback."""
    for seconds in (0.7, 4):
        child = subprocess.Popen([sys.executable, ROOT / "train_dpo.py", "--cold_start_steps", "0"], cwd=tmp_path, text=True,
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        time.sleep(seconds)
        child.send_signal(signal.SIGINT)
        output = child.communicate(timeout=60)[0]
        assert "Traceback" not in output and child.returncode in (0, 1), output
        assert "interrupted before the first step" in output or "stopped" in output

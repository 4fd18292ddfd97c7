"""Both scripts, run for real on small data: numbers that must not depend on how the work is cut, and what a run leaves."""

import dataclasses
import functools
import json
import math
import random
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from conftest import ROOT, InProcess, script

import data
import model
import rollout
import train_dpo
import train_grpo

SCRIPTS = {"train_dpo": train_dpo, "train_grpo": train_grpo}
REWARD = """def spread(completions, **_):
    return [float(sum(map(ord, c)) % 11) for c in completions]

def rare(completions, **_):
    return [float(sum(map(ord, c)) % 7 == 0) for c in completions]
"""


def write_task(folder):
    """pairs.jsonl: 12 rows with 0, 1 or 2 image files and answers of uneven length; columns.jsonl: the same with the
    numbers that losses take; and rewards.py."""
    rng, numbers = random.Random(0), random.Random(1)
    with open(folder / "pairs.jsonl", "w") as file, open(folder / "columns.jsonl", "w") as with_columns:
        for i in range(12):
            names = [f"{i}-{j}.png" for j in range((1, 0, 2)[i % 3])]
            for name in names:
                data.draw_shapes(rng, rng.randint(1, 6)).resize((48, rng.choice([32, 48]))).save(folder / name)
            row = dict(prompt="how many shapes are there?", images=names, solution=str(i % 6),
                       chosen=f"<think>i see {'many ' * (i % 4)}shapes</think><answer>{i % 6}</answer>",
                       rejected="<answer>" + "7" * (1 + i % 5) + "</answer>")
            file.write(json.dumps(row) + "\n")
            row |= {name: round(numbers.random(), 3) for name in ("chosen_probs", "chosen_probs_win", "chosen_probs_lose")}
            row |= dict(margin=round(numbers.uniform(-1, 3), 3), trust=i % 4, chosen_scores=i / 8, rejected_scores=-i / 4)
            with_columns.write(json.dumps(row) + "\n")
    (folder / "rewards.py").write_text(REWARD)


@pytest.fixture(scope="session")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    write_task(folder)
    return folder


def flags(task, *extra):
    return ["--model_name_or_path", "tiny", "--dataset", str(task / "pairs.jsonl"), "--image_root", str(task), "--warmup_steps", "0",
            "--learning_rate", "1e-3", *map(str, extra)]


@pytest.fixture
def launch(monkeypatch, tmp_path, task, folders):
    """launch("train_dpo", flags...) -> (metrics of each step, gradients of each step); main() and rewards in this
    process. The tiny model of seed 0 is made once."""
    monkeypatch.chdir(tmp_path)
    made, make = folders["qwen2_5_vl"], data.build_tiny_vlm
    monkeypatch.setattr(data, "build_tiny_vlm", lambda folder, seed=0: (
        make(folder, seed) if seed else shutil.copytree(made, folder)))

    def run(name, *extra):
        module, grads = SCRIPTS[name], []
        clip = model.clip_grad_norm_

        def spy(parameters, limit):
            grads.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters])
            return clip(parameters, limit)

        output = tmp_path / f"run{len(list(tmp_path.glob('run[0-9]*')))}"
        with monkeypatch.context() as patch:
            patch.setattr(model, "clip_grad_norm_", spy)
            if name == "train_grpo":
                patch.setattr(rollout, "RewardRunner", InProcess)
            module.main([*flags(task, *extra), "--output_dir", str(output)])
        return [json.loads(line) for line in open(output / "metrics.jsonl")][1:], grads

    return run


def grpo(task, *extra):
    return ["--reward_funcs", f"{task / 'rewards.py'}:spread", "--num_generations", 4, "--max_completion_length", 6,
            *extra]


def assert_same(a, b, tolerance=1e-6):
    """Relative to the largest entry of each tensor."""
    for x, y in zip(a, b, strict=True):
        scale = y.abs().max().clamp(min=1e-8)
        assert ((x - y).abs().max() / scale).item() < tolerance


# --- the cut into micro-batches


MIX_FILES = ("modpo", "dno", "sppo_soft", "madpo", "lcpo")
MIX = (*MIX_FILES, "sft")


@pytest.mark.parametrize("algo", ["mpo", "sft", "columns"])
def test_dpo_gradients_do_not_depend_on_micro_batches(launch, task, algo):
    """P9 (open-instruct #1161, TRL #3021): the same gradients with micro-batches of 1, 2 and 4, uneven lengths and
    images; the same losses later too, where BCO's shift has moved. (Adam makes a full step of a gradient
    that is rounding alone, so the second step's gradients agree less.)"""
    extra = ["--algo", algo] if algo != "columns" else [
        "--algo", "mpo", *MIX_FILES, "weighted", "--loss_type", *MIX, "--dataset", task / "columns.jsonl",
        "--weight_column", "trust"]
    runs = {size: launch("train_dpo", *extra, "--max_steps", 3, "--per_device_train_batch_size", size,
                         "--gradient_accumulation_steps", 4 // size) for size in (1, 2, 4)}
    metrics, grads = runs[4]
    for size in (1, 2):
        assert_same(runs[size][1][0], grads[0], 2e-5)
        for step, tolerance in ((0, 1e-5), (1, 1e-3), (2, 1e-3)):
            for key in ("loss", "grad_norm", "nll"):
                assert runs[size][0][step][key] == pytest.approx(metrics[step][key], rel=tolerance)
    assert algo != "mpo" or metrics[2]["bco_delta"] != 0


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", *(pytest.param(x, marks=pytest.mark.slow) for x in ("luspo", "cispo"))])
def test_grpo_gradients_do_not_depend_on_micro_batches(launch, task, loss_type):
    """The same for a rollout of 3 groups of 4, in whole groups (12, 4) and in slices of a group (2, 1)."""
    runs = {size: launch("train_grpo", *grpo(task, "--loss_type", loss_type), "--max_steps", 1,
                         "--per_device_train_batch_size", size, "--gradient_accumulation_steps", 12 // size)
            for size in (12, 4, 2, 1)}
    metrics, grads = runs[12]
    assert metrics[0]["grad_norm"] > 0
    for budget in (1, 10_000) if loss_type == "grpo" else ():  # by tokens: each group alone, all in one
        runs[budget] = launch("train_grpo", *grpo(task), "--max_steps", 1, "--per_device_train_batch_size", 12,
                              "--max_tokens_per_batch", budget)
    for size in runs.keys() - {12}:
        assert_same(runs[size][1][0], grads[0], 2e-5)
        # Advantages of up to 1.5, for LUSPO times 6 tokens, that cancel: 2e-6 of these.
        assert runs[size][0][0]["loss"] == pytest.approx(metrics[0]["loss"], abs=3e-6)


@pytest.mark.parametrize("algo", ["online_dpo", "trpa", "gtpo", "reg_grpo"])
def test_group_losses_do_not_depend_on_micro_batches(launch, task, algo):
    """Online DPO under gradient accumulation (TRL 1.16 multiplies its gradient by the accumulation steps): a micro-batch of
    three groups, and three of one, with and without images; at the second step too, off the start."""
    runs = {size: launch("train_grpo", *grpo(task, "--algo", algo), "--max_steps", 2, "--seed", 1,
                         "--per_device_train_batch_size", size, "--gradient_accumulation_steps", 12 // size)
            for size in (12, 4)}  # with seed 0 gtpo's step 2 samples a token that a last bit decides
    (whole, grads), (parts, ours) = runs[12], runs[4]
    assert_same(ours[0], grads[0], 2e-5)
    for a, b in zip(parts, whole):
        for key in {"loss", "grad_norm", "frac_groups_skipped", "rewards/accuracies", "rewards/margins", "kl"} & b.keys():
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-6), key
    assert whole[1]["grad_norm"] > 0 and (whole[1]["kl"] > 0 if algo != "gtpo" else "kl" not in whole[1])


@pytest.mark.parametrize("name", SCRIPTS)
def test_plain_form_trains_the_same(launch, task, monkeypatch, name):
    """Each completion in its own row, behind its own prompt, gives the gradients of the shared prompt."""
    extra = grpo(task, "--per_device_train_batch_size", 8) if name == "train_grpo" else ["--algo", "mpo"]
    shared = launch(name, *extra, "--max_steps", 1)
    monkeypatch.setattr(model.Policy, "pack", functools.partialmethod(model.Policy.pack, share_prompt=False))
    plain = launch(name, *extra, "--max_steps", 1)
    assert_same(plain[1][0], shared[1][0], 2e-5)


# --- what step 1 must print


def test_mpo_starts_at_its_known_values(launch, capsys):
    """Policy = reference: sigmoid 0.6931, bco_pair 1.3863, MPO 0.8318 + NLL, margins 0, accuracy 0.5."""
    (first, *_), _ = launch("train_dpo", "--max_steps", 1)
    assert first["loss/sigmoid"] == pytest.approx(0.693147, abs=1e-5)
    assert first["loss/bco_pair"] == pytest.approx(1.386294, abs=2e-5)
    assert first["loss"] == pytest.approx(0.831777 + first["loss/sft"], abs=2e-5)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6) and first["grad_norm"] > 0
    assert "sigmoid 0.6931 (expected 0.6931)" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("extra", [[], ["--steps_per_generation", 2, "--num_iterations", 2]], ids=["on", "off"])
def test_first_ratio_is_exactly_one(launch, task, dtype, extra):
    """T8: on-policy `old` is the training pass itself; off-policy it is the same function on the same rows, so the
    first ratio is exactly 1 also in bf16, and later ones are not. GSPO's clip of 3e-4 would not survive less."""
    metrics, _ = launch("train_grpo", *grpo(task), "--per_device_train_batch_size", 8, "--max_steps", 4, "--dtype", dtype,
                        *extra)
    assert metrics[0]["ratio"] == 1.0 and metrics[0]["clip_ratio/region_mean"] == 0 and metrics[0]["grad_norm"] > 0
    assert len(metrics) == 4 and [m["step"] for m in metrics] == [1, 2, 3, 4]
    if extra:
        assert all(m["ratio"] != 1.0 for m in metrics[1:]) and len({m["reward"] for m in metrics}) == 1
    else:
        assert all(m["ratio"] == 1.0 for m in metrics) and len({m["reward"] for m in metrics}) > 1
    gap = metrics[0]["sampling/sampling_logp_difference/mean"]
    assert gap < 1e-5 if dtype == "float32" else 0 < gap < 0.1


def test_gspo_preset_and_kl(launch, task):
    """Four updates per rollout by default; with --beta the KL to the start is 0 at first, then positive."""
    metrics, _ = launch("train_grpo", *grpo(task, "--algo", "gspo", "--beta", 0.1), "--max_steps", 4,
                        "--per_device_train_batch_size", 4)
    assert len({m["reward"] for m in metrics}) == 1 and metrics[0]["kl"] == pytest.approx(0, abs=1e-9)
    assert metrics[3]["kl"] > 1e-6


# --- the reference on disk


def test_reference_is_computed_once(launch, task, capsys):
    """A second run finds every pair on disk and starts at the same loss; another model is another folder."""
    first, _ = launch("train_dpo", "--max_steps", 2)
    assert "12 pairs computed, 0 found" in capsys.readouterr().out
    second, _ = launch("train_dpo", "--max_steps", 2)
    assert "0 pairs computed, 12 found" in capsys.readouterr().out
    assert [m["loss"] for m in first] == [m["loss"] for m in second]
    launch("train_dpo", "--max_steps", 1, "--seed", 1)
    assert "12 pairs computed, 0 found" in capsys.readouterr().out


def test_group_key_sees_everything(loaded):
    """A changed pixel, prompt or answer is another cache entry; a template or processor change shows in these."""
    policy, processor = loaded("qwen2_5_vl")
    row = data.shapes_rows(1, 0, "train")[0]

    def key(**changes):
        return train_dpo.group_key(data.encode_group(policy, processor, row | changes, ("chosen", "rejected")))

    picture = row["images"][0].copy()
    picture.putpixel((0, 0), (254, 255, 255))
    keys = [key(), key(images=[picture]), key(prompt="how many shapes?"), key(chosen="4"), key(rejected="4")]
    assert len(set(keys)) == 5 and key() == keys[0]


# --- model options


def test_gradient_checkpointing_recomputes_and_changes_nothing(launch, monkeypatch):
    """transformers skips checkpointing in eval() without a word: count the recomputed layers. Same gradients."""
    calls = []
    load = model.load_policy

    def spy(*args, **kwargs):
        policy, processor = load(*args, **kwargs)
        layer = policy.hf.base_model.language_model.layers[0]
        layer.self_attn.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
        return policy, processor

    monkeypatch.setattr(model, "load_policy", spy)
    plain = launch("train_dpo", "--algo", "sft", "--max_steps", 1)
    without = len(calls)
    checkpointed = launch("train_dpo", "--algo", "sft", "--max_steps", 1, "--gradient_checkpointing")
    assert len(calls) - without == 2 * without
    assert_same(checkpointed[1][0], plain[1][0], 1e-5)


def test_frozen_vision_tower_stays(launch, tmp_path):
    """--freeze_vision_tower: its weights are those of the start, the language model's are not."""
    launch("train_dpo", "--algo", "sft", "--max_steps", 2, "--freeze_vision_tower")
    from safetensors.torch import load_file

    before, after = (load_file(tmp_path / "run0" / name / "model.safetensors") for name in ("tiny_vlm", "final"))
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed and not any(k.startswith("visual.") for k in changed)
    assert any(k.startswith("visual.") for k in before)


def test_dropout_is_off(folders):
    """T8: a checkpoint that asks for dropout trains without it, in train() mode: two passes agree exactly."""
    policy, processor = model.load_policy(str(folders["qwen2_5_vl"]))
    policy.hf.base_model.language_model.layers[0].self_attn.attention_dropout = 0.5
    policy = model.Policy(policy.hf, processor).train()
    group = data.encode_group(policy, processor, data.shapes_rows(1, 0, "train")[0], ("chosen",))
    batch = model.pack_groups([group], policy.pad_id)
    assert torch.equal(policy(batch)[0], policy(batch)[0])


@pytest.mark.parametrize("kind, expected", [
    ("constant", [0, 0.5, 1, 1, 1, 1]), ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25]),
    ("cosine", [0, 0.5, 1, 0.853553, 0.5, 0.146447])])
@pytest.mark.parametrize("warmup", ["2", "0.3"])
def test_schedules(kind, expected, warmup):
    """Warm-up in steps or as a share of all, then constant, linear or cosine to 0, of the peak."""
    args = train_dpo.parse_args(["--lr_scheduler_type", kind, "--warmup_steps", warmup, "--learning_rate", "1"])
    rates = [model.learning_rate_at(args, step, 6) for step in range(6)]
    assert rates == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup, steps", [("7", 23), ("1", 9), ("0", 11), ("0.13", 31), ("5", 3)])
def test_schedules_are_transformers_bit_for_bit(kind, warmup, steps):
    """A rate computed in another order of operations is another in the last bit, and so is every weight after it."""
    args = train_dpo.parse_args(["--lr_scheduler_type", kind, "--warmup_steps", warmup, "--learning_rate", "3e-4"])
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=3e-4)
    name = "constant_with_warmup" if kind == "constant" else kind
    count = int(warmup) if float(warmup) >= 1 else math.ceil(float(warmup) * steps)
    scheduler = transformers.get_scheduler(name, optimizer, count, steps)
    for step in range(steps + 2):
        assert model.learning_rate_at(args, step, steps) == scheduler.get_last_lr()[0], step
        optimizer.step()
        scheduler.step()


# --- what a run leaves


def test_run_folder(launch, task, tmp_path):
    """args.json with resolved flags and versions, metrics.jsonl with TRL's keys, completions, a final/ that loads."""
    metrics, _ = launch("train_grpo", *grpo(task), "--per_device_train_batch_size", 8, "--max_steps", 2,
                        "--eval_dataset", task / "pairs.jsonl", "--eval_steps", 1)
    folder = tmp_path / "run0"
    args = json.loads((folder / "args.json").read_text())
    assert args["algo"] == ["grpo"] and args["epsilon_high"] == 0.2 and "torch" in args["versions"]
    keys = {"step", "epoch", "loss", "grad_norm", "learning_rate", "reward", "reward_std", "frac_reward_zero_std", "ratio",
            "rewards/spread/mean", "entropy", "completions/mean_length", "completions/clipped_ratio",
            "clip_ratio/region_mean", "sampling/sampling_logp_difference/mean", "eval/reward",
            "sampling/sampling_logp_difference/tail", "rewards/failed"}
    assert keys <= metrics[1].keys()
    lines = [json.loads(line) for line in open(folder / "completions" / "step_1.jsonl")]
    assert len(lines) == 8 and lines[0].keys() == {"row", "completion", "rewards", "advantage", "columns"}
    assert sum(line["rewards"]["spread"] for line in lines) / 8 == pytest.approx(metrics[0]["reward"])
    policy, _ = model.load_policy(str(folder / "final"))
    assert len(policy.eos_ids) == 1
    with pytest.raises(model.InputError, match=r"(?s)holds a run with other settings:.*max_steps: 2 -> 75"):
        train_grpo.main([*flags(task, *grpo(task), "--per_device_train_batch_size", 8), "--output_dir", str(folder)])


@pytest.mark.slow
def test_runs_are_numbered_and_repeatable(monkeypatch, tmp_path, task):
    """Without --output_dir a run gets a new runs/<algo>-N; the same seed gives the same numbers."""
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        train_dpo.main(flags(task, "--algo", "sft", "--max_steps", 2))
    a, b = ([{k: v for k, v in json.loads(line).items() if k != "step_time"}
             for line in open(f"runs/sft-{n}/metrics.jsonl")] for n in (1, 2))
    assert a == b


@pytest.mark.slow
def test_eval_uses_real_answers(launch, task, tmp_path):
    """eval/accuracy is the share of greedy answers that equal the solution: the file of answers says the same."""
    metrics, _ = launch("train_dpo", "--algo", "sft", "--max_steps", 30, "--learning_rate", 3e-3, "--eval_steps", 30,
                        "--eval_dataset", task / "pairs.jsonl", "--per_device_train_batch_size", 12,
                        "--max_completion_length", 24)
    answers = [json.loads(line) for line in open(tmp_path / "run0" / "completions" / "eval_30.jsonl")]
    rows = [json.loads(line) for line in open(task / "pairs.jsonl")]
    right = [a["completion"].endswith(f"<answer>{r['solution']}</answer>") for a, r in zip(answers, rows)]
    assert [a["rewards"]["accuracy"] for a in answers] == [float(x) for x in right]
    assert metrics[-1]["eval/accuracy"] == pytest.approx(sum(right) / len(right)) and any(right)
    assert metrics[-1]["eval/loss"] < metrics[0]["loss"]


# --- arguments


@pytest.mark.parametrize("name, arguments, message", [
    ("train_grpo", ["--num_generation", "4"], "unknown argument --num_generation; did you mean --num_generations?"),
    ("train_dpo", ["--algo", "mpoo"], "error: --algo mpoo: neither a preset nor a file of papers/"),
    ("train_dpo", ["--loss_type", "sigmoid,sigmiod"], "unknown --loss_type sigmiod; choose from sigmoid"),
    ("train_dpo", ["--loss_type", "sigmoid", "sft", "--loss_weights", "1"], "2 --loss_type but 1 --loss_weights"),
    ("train_dpo", ["--max_steps", "0"], "--max_steps must be at least 1"),
    ("train_dpo", ["--per_device_eval_batch_size", "0"], "--per_device_eval_batch_size: must be in [1, inf), got 0"),
    ("train_dpo", ["--device", "tpu"], "invalid choice: 'tpu' (choose from"),
    ("train_grpo", ["--num_iterations", "0"], "--num_iterations: must be in [1, inf)"),
    ("train_grpo", ["--loss_type", "gpro"], "unknown --loss_type 'gpro'; choose from grpo, bnpo"),
    ("train_grpo", ["--reward_funcs", "accurcy"], "unknown --reward_funcs accurcy; choose from accuracy, format"),
    ("train_grpo", ["--reward_funcs", "format,a.py:format"], "two --reward_funcs have one name"),
    ("train_grpo", ["--reward_weights", "1"], "2 --reward_funcs but 1 --reward_weights"),
    ("train_grpo", ["--per_device_train_batch_size", "12"], "must hold whole groups of --num_generations 8; 16"),
    ("train_grpo", ["--gradient_accumulation_steps", "4", "--steps_per_generation", "6"], "must be a multiple of"),
    ("train_grpo", ["--num_generations", "1"], "--num_generations: must be in [2, inf)"),
    ("train_grpo", ["--temperature", "0"], "--temperature: must be in (0, inf)"),
    ("train_grpo", ["--max_completion_length", "0"], "--max_completion_length: must be in [1, inf)"),
    ("train_dpo", ["--dataset", "x.jsonl"], "--dataset needs --model_name_or_path"),
    ("train_dpo", ["--model_name_or_path", "tiny", "--dataset", "x.jsonl", "--cold_start_steps", "5"], "is for the built-in model and task"),
    ("train_dpo", ["--loss_type", "sigmoid", "sigmoid"], "a --loss_type stands twice"),
    ("train_dpo", ["--beta", "0"], "--beta: must be in (0, inf)"),
    ("train_dpo", ["--algo", "ipo", "--label_smoothing", "0.1"], "--label_smoothing is not used by ipo, only by "),
    ("train_dpo", ["--algo", "robust", "--label_smoothing", "0.5"], "--label_smoothing: must be in [0, 0.5)"),
    ("train_dpo", ["--algo", "exo", "--label_smoothing", "0"], "exo_pair needs --label_smoothing above 0"),
    ("train_dpo", ["--algo", "mpo", "f_dpo", "--f_divergence_type", "forward_kl"], "--f_divergence_type does nothing to bco_pair"),
    ("train_dpo", ["--algo", "sft", "f_dpo", "--f_divergence_type", "forward_kl"], "--f_divergence_type does nothing to sft"),
    ("train_dpo", ["--algo", "aot", "wpo"], "--algo aot wpo weighs pairs"),
    ("train_dpo", ["--algo", "sft", "ld_dpo", "--ld_alpha", "0.5"], "--ld_alpha compares the lengths of a pair"),
    ("train_dpo", ["--algo", "tgdpo", "ld_dpo", "--guide_model", "x", "--ld_alpha", "0.5"], "tgdpo has its own weights"),
    ("train_dpo", ["--algo", "tgdpo"], "tgdpo needs --guide_model"),
    ("train_dpo", ["--algo", "dpo", "tgdpo", "--guide_model", "x"], "nothing uses what tgdpo.py brings; name it: --loss_type ... tgdpo"),
    ("train_dpo", ["--algo", "mpo", "lcpo"], "nothing uses what lcpo.py brings; name it: --loss_type ... lcpo"),
    ("train_dpo", ["--algo", "dpo", "f_dpo", "ld_dpo", "--f_divergence_type", "forward_kl"], "it stands before f_dpo"),
    ("train_dpo", ["--algo", "dpo", "f_dpo"], "f_dpo changes nothing without another --f_divergence_type"),
    ("train_dpo", ["--algo", "dpo", "weighted"], "weighted needs --weight_column"),
    ("train_dpo", ["--algo", "aot", "weighted", "--weight_column", "weight"], "--algo aot weighted weighs pairs"),
    ("train_grpo", ["--algo", "rloo", "--scale_rewards", "group"], "--scale_rewards is for --advantage_estimator grpo"),
    ("train_grpo", ["--delta", "1.1"], "--delta must be above 1 + epsilon_high"),
    ("train_grpo", ["--algo", "sapo", "--delta", "4"], "and is for --loss_type grpo, bnpo"),
    ("train_grpo", ["--algo", "vespo", "--importance_sampling_level", "sequence"], "vespo builds the ratio"),
    ("train_grpo", ["--algo", "vespo", "--importance_sampling_correction", "sequence_mask"], "vespo builds the ratio"),
    ("train_grpo", ["--algo", "grpo", "high_entropy", "--top_entropy_quantile", "0"], "--top_entropy_quantile: must be in (0, 1]"),
    ("train_grpo", ["--top_p", "0"], "--top_p: must be in (0, 1]"),
    ("train_grpo", ["--algo", "grpo", "copg", "--loss_type", "copg"], "--loss_type copg compares rewards: it needs --advantage_estimator none"),
    ("train_grpo", ["--advantage_estimator", "none"], "--advantage_estimator none is for --loss_type sigmoid"),
    ("train_grpo", ["--algo", "sapo", "--epsilon", "0.1"], "--epsilon changes nothing in --loss_type sapo"),
    ("train_grpo", ["--algo", "cispo", "--epsilon", "0.1"], "--epsilon changes nothing in --loss_type cispo"),
    ("train_grpo", ["--algo", "vespo", "--epsilon_high", "0.1"], "--epsilon_high changes nothing in --loss_type vespo"),
    ("train_grpo", ["--algo", "grpo", "kl_estimator", "--kl_estimator", "k1"], "kl_estimator changes nothing without --beta"),
    ("train_grpo", ["--algo", "rloo", "kl_estimator", "--kl_estimator", "k2"], "or with rloo, which takes the KL off the reward"),
    ("train_grpo", ["--no-use_bias_correction_kl"], "it comes with --algo grpo kl_estimator"),
    ("train_grpo", ["--ref_model_sync_steps", "4"], "--ref_model_sync_steps; it comes with --algo grpo moving_reference"),
    ("train_grpo", ["--importance_sampling_clip_max", "2"], "changes nothing without --importance_sampling_correction"),
    ("train_grpo", ["--algo", "gmpo", "high_entropy", "--top_entropy_quantile", "0.5"], "and no --top_entropy_quantile"),
    ("train_grpo", ["--reward_weights", "0", "0"], "--reward_weights are all 0"),
    ("train_grpo", ["--reward_funcs", "mine.py"], "--reward_funcs mine.py names no function of the file: mine.py:function"),
    ("train_grpo", ["--vllm_server_base_url", "localhost:8000"], "localhost:8000: expected http://host:port"),
    ("train_grpo", ["--bf16"], "unknown argument --bf16; --help lists what there is, GUIDE.md TRL's settings"),
    ("train_dpo", ["--algo", "dpo", "--simpo_gamma", "1"], "--simpo_gamma changes nothing without --loss_type simpo"),
    ("train_dpo", ["--algo", "dpo", "--bco_delta", "none"], "--bco_delta changes nothing without --loss_type bco_pair"),
    ("train_dpo", ["--algo", "dpo", "--nll_normalization", "token"], "changes nothing without --loss_type sft"),
    ("train_dpo", ["--algo", "sft", "--beta", "0.3"], "--beta changes nothing without a pair loss"),
    ("train_dpo", ["--algo", "dpo", "f_dpo", "--f_divergence_type", "forward_kl", "--f_alpha_divergence_coef", "0.3"], "changes nothing without --f_divergence_type alpha_divergence"),
    ("train_grpo", ["--algo", "online_dpo", "--beta", "0"], "--loss_type sigmoid needs --beta above 0"),
    ("train_grpo", ["--algo", "disco", "--beta", "0.1"], "--loss_type disco has no --beta"),
    ("train_grpo", ["--algo", "trpa", "high_entropy", "--top_entropy_quantile", "0.2"], "--top_entropy_quantile does not go with it"),
    ("train_grpo", ["--algo", "dapo", "copg", "--loss_type", "copg", "--advantage_estimator", "none", "--beta", "0.1"],
     "--mask_truncated_completions does not go with it"),
    ("train_grpo", ["--algo", "copg", "--mask_truncated_completions"], "--mask_truncated_completions does not go with it"),
    ("train_grpo", ["--algo", "online_dpo", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"],
     "--per_device_train_batch_size 4 must be a multiple of --num_generations 8"),
    ("train_grpo", ["--algo", "gmpo", "--importance_sampling_level", "sequence"], "gmpo builds the ratio"),
    ("train_grpo", ["--algo", "grpo", "moving_reference"], "moving_reference needs --beta above 0"),
    ("train_grpo", ["--algo", "grpo", "off_policy_mask"], "off_policy_mask needs --off_policy_mask_threshold"),
    ("train_grpo", ["--algo", "copg", "off_policy_mask", "--off_policy_mask_threshold", "1"],
     "--off_policy_mask_threshold does not go with it"),
    ("train_grpo", ["--dynamic_sampling", "-1"], "--dynamic_sampling: must be in [0, inf)"),
    ("train_grpo", ["--dynamic_sampling", "1", "--filter_metric", "f"], "--filter_metric f; choose from accuracy, format, rew"),
    ("train_grpo", ["--filter_metric", "format"], "--filter_metric changes nothing without --dynamic_sampling"),
    ("train_grpo", ["--algo", "grpo", "variance_sampling", "--variance_sampling", "1"], "--variance_sampling: must be in [0, 1), got 1"),
    ("train_grpo", ["--algo", "gtpo", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"],
     "must be a multiple of --num_generations 8"),
    ("train_grpo", ["--loss_type", ""], "unknown --loss_type ''"),
    ("train_grpo", ["--advantage_estimator", "gpro"], "unknown --advantage_estimator 'gpro'; choose from grpo, rloo"),
    ("train_dpo", ["--loss_type", ","], "--loss_type names no loss"),
    ("train_grpo", ["--reward_funcs", ""], "--reward_funcs names no function"),
    ("train_grpo", ["--algo", "grpo", "kl_estimator", "--kl_estimator", "k4"], "invalid choice: 'k4'")])
def test_bad_arguments(name, arguments, message, capsys):
    """F45, F46: a typo or an impossible size is one line that says what would be right."""
    with pytest.raises(SystemExit) as error:
        SCRIPTS[name].parse_args(arguments)
    assert message in f"{error.value} {capsys.readouterr().err}"


def test_held_out_pairs_keep_to_the_budget(launch, task, monkeypatch):
    """--max_tokens_per_batch cut training and the reference pass, and not the held-out pass at step 0: who set it against
    running out of memory ran out there."""
    sizes, score = [], train_dpo.score_groups
    monkeypatch.setattr(train_dpo, "score_groups", lambda args, policy, groups, *more: (
        sizes.append((len(groups), policy.pack(groups)["input_ids"].shape[1])), score(args, policy, groups, *more))[1])
    launch("train_dpo", *flags(task, "--eval_dataset", task / "pairs.jsonl", "--per_device_eval_batch_size", 12, "--max_steps", 1,
                               "--per_device_train_batch_size", 2, "--max_tokens_per_batch", 130))
    assert max(n for n, _ in sizes) > 1 and all(n == 1 or tokens <= 130 for n, tokens in sizes), sizes


def test_every_number_has_bounds(capsys):
    """A learning rate of nan, or 0 tokens in a batch: numbers were checked one by one, and most were not."""
    for script in SCRIPTS.values():
        numbers = [a for a in model.parser_of(script.Args)._actions if a.type is not None]
        assert len(numbers) > 30 and not {a.dest for a in numbers if a.type in (int, float)}
        for action in numbers:
            for bad in ("nan", "inf", "-inf", "x"):
                with pytest.raises(SystemExit):
                    script.parse_args([f"{action.option_strings[0]}={bad}"])
                assert f"argument {action.option_strings[0]}: " in capsys.readouterr().err
    for flag in ("--max_tokens_per_batch", "--steps_per_generation", "--num_train_epochs", "--shard_size", "--lora_r"):
        with pytest.raises(SystemExit):
            train_grpo.parse_args([f"{flag}=0"])
        assert f"argument {flag}: must be in " in capsys.readouterr().err


KL = ["--algo", "grpo", "kl_estimator", "--beta", "0.1"]


@pytest.mark.parametrize("arguments, message", [
    (["--loss_type", "dapo", "--importance_sampling_level", "sequence"], "each completion weighs as much as it is long"),
    ([*KL, "--kl_estimator", "k1", "--no-use_bias_correction_kl"], "--beta does nothing"),
    ([*KL, "--kl_estimator", "k1"], None), ([*KL, "--kl_estimator", "k2"], "without the ratio"),
    (["--algo", "gspo", *KL[2:], "--kl_estimator", "k1"], "has 1/|y| of the KL's"), (["--algo", "gspo", "--beta", "0.1"], None),
    (["--algo", "gspo", "high_entropy", "--top_entropy_quantile", "0.2"], "only weighs completions"),
    (["--algo", "cispo", "--loss_type", "grpo"], "lets the ratio rise to 6: it is cispo's"),
    (["--algo", "dr_grpo", "--advantage_estimator", "rloo"], None), (["--loss_type", "luspo"], "luspo is defined with"), (["--loss_type", "cispo"], "at 0.2 every weight on policy is 0.2"),
    (["--top_p", "0.9"], "the gradient is no longer that"), (["--algo", "luspo"], None), (["--algo", "cispo"], None),
    (["--algo", "gspo"], None), (["--algo", "rloo"], None), (["--algo", "dapo"], None)])
def test_combinations_that_change_the_objective_warn(arguments, message, capsys, monkeypatch):
    """A sequence ratio in a token sum, an absolute clip read as a relative one, a narrowed sampler: said once, on rank 0."""
    train_grpo.parse_args(arguments)
    said = capsys.readouterr().err
    assert (message in said and said.count("warning:") == 1) if message else said == ""
    monkeypatch.setenv("RANK", "1")
    train_grpo.parse_args(arguments)
    assert capsys.readouterr().err == ""


def test_epochs_that_are_asked_for_count():
    """--num_train_epochs was passed over without a word on the built-in task, whose default says max_steps."""
    for script in SCRIPTS.values():
        assert script.parse_args(["--num_train_epochs", "1"]).max_steps == -1 < script.parse_args([]).max_steps
        assert script.parse_args(["--num_train_epochs=2", "--max_steps", "7"]).max_steps == 7


def test_unreadable_solutions_end_a_run_before_it_starts(launch, task, tmp_path, monkeypatch):
    """A solution without a number ended the run at the step that drew it; now when rows are checked, with its line."""
    rows = [json.loads(line) for line in open(task / "pairs.jsonl")]
    rows[7]["solution"] = "some"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(rollout, "sample", None)
    with pytest.raises(model.InputError, match=r"rows.jsonl:8: --reward_funcs numeric: solution 'some'"):
        launch("train_grpo", "--dataset", tmp_path / "rows.jsonl", "--reward_funcs", "numeric", "--max_steps", 2,
               "--per_device_train_batch_size", 64)


def test_held_out_rows_leave_room_for_their_answers(launch, task):
    """train_dpo.py checked that a held-out pair fits the context, and then sampled an answer beyond it."""
    with pytest.raises(model.InputError, match=r"pairs.jsonl:\d+: 20\d\d tokens with the images, more than the 2048"):
        launch("train_dpo", "--algo", "sft", "--max_steps", 1, "--eval_dataset", task / "pairs.jsonl",
               "--max_completion_length", 2040)


@pytest.mark.parametrize("name", ["train_dpo", pytest.param("train_grpo", marks=pytest.mark.slow)])
def test_token_budget_bounds_every_row(launch, task, monkeypatch, name):
    """Neither the reference pass nor the preflight kept to the budget: they ran out of memory in a run that was cut to
    fit."""
    rows, pack = [], model.pack_groups
    monkeypatch.setattr(model, "pack_groups", lambda groups, *x, **k: (
        rows.append((len({id(p) for p, c in groups if c}), sum(len(p.tokens) + sum(map(len, c)) for p, c in groups))),
        pack(groups, *x, **k))[1])
    extra = grpo(task, "--beta", 0.1) if name == "train_grpo" else []
    launch(name, *extra, "--max_steps", 1, "--per_device_train_batch_size", 12, "--max_tokens_per_batch", 260,
           "--preflight")
    several = [tokens for prompts, tokens in rows if prompts > 1]
    assert max(several) <= 260 and len(rows) > 1


QUICK = ("mpo", "exo", "simpo", "rloo", "gdpo", "cispo")


@pytest.mark.parametrize("algo", [algo if algo in QUICK else pytest.param(algo, marks=pytest.mark.slow)
                                  for algo in (*train_dpo.PRESETS, *train_grpo.PRESETS)])
def test_every_preset_trains(launch, task, algo, capsys, tmp_path):
    """Each --algo runs two updates with finite numbers and a gradient, with its settings, and starts where it must."""
    name = "train_dpo" if algo in train_dpo.PRESETS else "train_grpo"
    extra = grpo(task, "--steps_per_generation", 2) if name == "train_grpo" else []
    extra += ["--no-mask_truncated_completions"] if algo == "dapo" else []  # here all are truncated; the next test
    extra += ["--dataset", task / "columns.jsonl"] if name == "train_dpo" else []
    metrics, _ = launch(name, "--algo", algo, *extra, "--max_steps", 2, "--per_device_train_batch_size", 4)
    said, used = capsys.readouterr().out, json.loads((tmp_path / "run0" / "args.json").read_text())
    tiny = SCRIPTS[name].TINY_BY_ALGO.get(algo, {})
    for key, value in (SCRIPTS[name].PRESETS[algo] | tiny).items():
        if key in SCRIPTS[name].PRESETS[algo] and key not in (*SCRIPTS[name].TINY_DEFAULTS, "mask_truncated_completions"):
            assert used[key] == value
    assert len(metrics) == 2 and all(m["grad_norm"] > 0 for m in metrics)
    for m in metrics:
        assert all(abs(x) < 1e7 for x in m.values()), m  # nan compares False
    for measured, expected in re.findall(r"(\S+) \(expected ([0-9.]+)\)", said):
        assert float(measured) == pytest.approx(float(expected), abs=2e-4 + 1e-4 * float(expected)), said


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo"])
def test_a_step_of_truncated_completions_only(launch, task, loss_type):
    """--mask_truncated_completions with nothing left to train: gradient 0, no division by 0, and the share is logged."""
    metrics, grads = launch("train_grpo", *grpo(task, "--algo", "dapo", "--loss_type", loss_type, "--entropy_coef", 0.1),
                            "--max_steps", 1, "--per_device_train_batch_size", 4, "--max_completion_length", 1)
    assert metrics[0]["completions/clipped_ratio"] == 1 and metrics[0]["grad_norm"] == 0 and metrics[0]["loss"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [
    ["--label_smoothing", 0.2], ["--loss_type", "simpo"], ["--loss_type", "simpo", "--simpo_gamma", 1.5]])
def test_every_preference_option_reaches_the_loss(launch, arguments):
    """F45: a flag that is parsed and then not passed on changes nothing. Each gives a second step of its own."""
    plain = ["--algo", "dpo", "--max_steps", 2]
    metrics = [launch("train_dpo", *plain, *flags)[0][1] for flags in ([], arguments[:-2] or [], arguments)]
    assert metrics[2]["loss"] != pytest.approx(metrics[0]["loss"], rel=1e-4)
    assert len(arguments) == 2 or metrics[2]["loss"] != pytest.approx(metrics[1]["loss"], rel=1e-4)


def test_simpo_computes_no_reference(launch, capsys):
    """SimPO has no reference: nothing is scored before step 1, and nothing kept on disk."""
    metrics, _ = launch("train_dpo", "--algo", "simpo", "--max_steps", 1)
    assert "reference log-probs" not in capsys.readouterr().out and metrics[0]["rewards/margins"] != 0


def test_presets_set_defaults_and_flags_win():
    """--algo only sets defaults; commas and spaces both separate; the tiny model's defaults go with the tiny model."""
    args = train_dpo.parse_args(["--model_name_or_path", "x", "--dataset", "y"])
    assert (args.loss_type, args.loss_weights) == (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0])
    assert args.learning_rate == 1e-6 and args.cold_start_steps == 0
    args = train_dpo.parse_args(["--loss_type", "sigmoid"])  # the preset's weights are of the preset's losses
    assert (args.loss_type, args.loss_weights) == (["sigmoid"], [1.0])
    args = train_dpo.parse_args(["--loss_type", "sft,sigmoid", "--loss_weights", "1", "2", "--beta", "0.3"])
    assert (args.loss_type, args.beta, args.cold_start_steps) == (["sft", "sigmoid"], 0.3, 200)
    args = train_grpo.parse_args(["--algo", "gspo", "--epsilon", "0.1", "--gradient_accumulation_steps", "2"])
    assert (args.epsilon, args.epsilon_high, args.steps_per_generation) == (0.1, 4e-4, 8)
    assert args.importance_sampling_level == "sequence" and args.loss_type == "grpo"


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_defaults(name):
    """Most defaults stood nowhere but in the source; those of 0 got lost, as 0 == False."""
    text = " ".join(model.parser_of(SCRIPTS[name].Args).format_help().split())
    for flag, default in (("--weight_decay", "0.0"), ("--seed", "0"), ("--learning_rate", "1e-06"), ("--beta", "0")):
        assert f"(default: {default}" in text.split(f" {flag} ")[-1].split(" --")[0], flag


def test_shared_flags_are_the_same():
    """The flags of both scripts stand in both, so that each reads alone: with the same type, default and help, but for
    those that mean something of each script's own."""
    own = {"algo", "dataset", "loss_type", "beta", "per_device_train_batch_size", "max_completion_length"}
    (ours, types), (theirs, other) = (({f.name: (model.default_of(f), *model.help_of(script.Args)[f.name])
                                        for f in dataclasses.fields(script.Args)}, script.Args.__annotations__)
                                      for script in SCRIPTS.values())
    shared = ours.keys() & theirs.keys() - own
    assert len(shared) > 40
    assert {name: (ours[name], types[name]) for name in shared} == {name: (theirs[name], other[name]) for name in shared}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_read_and_explained(name):
    """F45: a flag that nothing reads, or without help, is a lie."""
    source = "".join((ROOT / f"{file}.py").read_text() for file in (name, "model", "data"))
    for action in model.parser_of(SCRIPTS[name].Args)._actions:
        if action.dest != "help":
            assert action.help, action.dest
            assert f"args.{action.dest}" in source or f'"{action.dest}"' in source, action.dest


def test_nothing_is_unpickled_or_fetched():
    """Only safetensors and JSON are read; importing a script does nothing; no module reaches for the network, but for
    the class that asks the server of --vllm_server_base_url."""
    for file in ROOT.glob("*.py"):
        source = file.read_text()
        if file.name == "rollout.py":
            source = re.sub(r"^import urllib.request\n|^from urllib.error import HTTPError\n|^class (NoRedirects|VLLMServer).*?\n\n\n", "",
                            source, flags=re.S | re.M)
        assert not re.search(r"torch\.load|import pickle|import requests|urllib|trust_remote_code", source), file.name


@pytest.mark.parametrize("change, message", [
    (dict(images=["missing.png"]), "missing.png does not exist"), (dict(images=["bad.png"]), "bad.png cannot be read"),
    (dict(prompt="<image> <image>"), "2 image placeholders, the row has 1 images"),
    (dict(prompt="how many " * 900), r"tokens with the images, more than the 2048 that the model's context")])
def test_bad_rows_end_the_run_before_its_first_step(launch, task, tmp_path, change, message):
    """Every row that a run will visit is read and encoded before step 1; the error has file and line."""
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")
    rows = [json.loads(line) for line in open(task / "pairs.jsonl")][:4]
    rows[2] |= dict(images=rows[0]["images"]) | change
    for name in rows[0]["images"] + rows[2]["images"] + rows[3]["images"]:
        if (task / name).exists():
            (tmp_path / name).write_bytes((task / name).read_bytes())
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [rows[0], rows[1], rows[2], rows[3]])))
    with pytest.raises(data.RowError, match=f"rows.jsonl:3: .*{message}"):
        train_dpo.main(["--model_name_or_path", "tiny", "--dataset", str(tmp_path / "rows.jsonl"), "--image_root", str(tmp_path), "--max_steps", "1",
                        "--per_device_train_batch_size", "4", "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


# --- a whole step against a second, plain computation: one completion at a time, transformers' own forward, the
#     formulas written out. Flags that a script dropped, swapped or gave the wrong sign would show here.


def plain_logps(policy, prompt, ids, temperature=1.0):
    tokens = torch.cat([prompt.tokens, ids])[None]
    types = (tokens == policy.hf.config.image_token_id).int()
    logits = policy.hf(input_ids=tokens, mm_token_type_ids=types, **prompt.pixels).logits[0, len(prompt.tokens) - 1:-1]
    logits = (logits / temperature).index_fill(-1, policy.never_sampled, -torch.inf)
    return logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]


def capture(monkeypatch):
    """A list of (weights, gradients, limit) before each clip, filled as the script runs."""
    steps, clip = [], model.clip_grad_norm_

    def spy(parameters, limit):
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        steps.append(([p.detach().clone() for p in parameters], grads, limit))
        return clip(parameters, limit)

    monkeypatch.setattr(model, "clip_grad_norm_", spy)
    return steps


def with_weights(policy, weights):
    with torch.no_grad():
        for p, w in zip(policy.parameters(), weights, strict=True):
            p.copy_(w)
    policy.zero_grad()
    return policy


@pytest.mark.parametrize("bco_delta", ["running", "ema", "none"])
def test_dpo_steps_are_the_formula(monkeypatch, tmp_path, task, bco_delta):
    """Three steps of a mix with odd weights and beta: the third step's gradient, with BCO's shift from the rewards of
    the first two, is that of the loss written out; the clip limit is the flag's."""
    monkeypatch.chdir(tmp_path)
    steps = capture(monkeypatch)
    train_dpo.main(flags(task, "--loss_type", "sigmoid", "bco_pair", "sft", "--loss_weights", 0.5, 3.0, 0.7, "--beta",
                         0.3, "--bco_delta", bco_delta, "--max_steps", 3, "--per_device_train_batch_size", 2,
                         "--gradient_accumulation_steps", 2, "--max_grad_norm", 0.4, "--output_dir", "out"))
    policy, processor = model.load_policy("out/tiny_vlm")
    rows = data.read_rows(str(task / "pairs.jsonl"), str(task), ())
    groups = [data.encode_group(policy, processor, rows[i], ("chosen", "rejected")) for i in
              data.Plan([12], 12, 0)]
    batches = [groups[i:i + 4] for i in range(0, 12, 4)]

    def logratios(weights, batch):
        """[(chosen, rejected, chosen NLL per token)] of a batch at these weights against the start's."""
        with_weights(policy, steps[0][0])
        with torch.no_grad():
            ref = [[plain_logps(policy, prompt, ids).sum() for ids in both] for prompt, both in batch]
        with_weights(policy, weights)
        now = [[plain_logps(policy, prompt, ids) for ids in both] for prompt, both in batch]
        return [(w.sum() - rw, l.sum() - rl, -w.mean()) for (w, l), (rw, rl) in zip(now, ref)]

    means = [sum(0.3 * float(w + l) / 2 for w, l, _ in logratios(steps[i][0], batches[i])) / 4 for i in (0, 1)]
    assert means[0] == pytest.approx(0, abs=1e-5) and abs(means[1]) > 0.1
    delta = {"none": 0.0, "running": means[1] / 2, "ema": 0.1 * means[1]}[bco_delta]
    loss = sum(-0.5 * torch.log(torch.sigmoid(0.3 * (w - l))) - 3.0 * torch.log(torch.sigmoid(0.3 * w - delta))
               - 3.0 * torch.log(torch.sigmoid(delta - 0.3 * l)) + 0.7 * nll
               for w, l, nll in logratios(steps[2][0], batches[2])) / 4
    loss.backward()
    assert_same(steps[2][1], [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.parameters()], 1e-3)
    assert steps[2][2] == 0.4
    logged = [json.loads(line) for line in open("out/metrics.jsonl")]
    assert logged[3]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert logged[3]["bco_delta"] == pytest.approx(delta, rel=1e-4)


@pytest.mark.parametrize("change, extra, message", [
    (dict(margin=None), ["--algo", "mpo", "modpo", "--loss_type", "modpo"], r"rows.jsonl:2: --algo mpo modpo takes a number .* column margin, got 'None'"),
    (dict(chosen_probs=1.2), ["--algo", "dno"], "rows.jsonl:2: --algo dno takes a number from 0 to 1 .* got '1.2'"),
    (dict(chosen_probs_win="0.5"), ["--algo", "sppo_soft"], "rows.jsonl:2: .* from the column chosen_probs_win"),
    (dict(margin=True), ["--algo", "madpo"], "rows.jsonl:2: .* got 'True'"),
    (dict(trust=-1), ["--algo", "dpo", "weighted", "--weight_column", "trust"], "rows.jsonl:2: --algo dpo weighted takes .* trust"),
    (dict(), ["--algo", "dpo", "weighted", "--weight_column", "wieght"], "rows.jsonl:1: --algo dpo weighted takes .* wieght, got 'None'"),
    (dict(trust="a"), ["--algo", "dpo", "--sort_by", "trust"], "rows.jsonl:2: --sort_by takes")])
def test_bad_columns_name_row_and_column(task, tmp_path, monkeypatch, change, extra, message):
    """A number that a loss needs and a row lacks, or holds as a string, a bool or out of range, in any row of the file:
    an error that says which, before the model is loaded."""
    monkeypatch.chdir(tmp_path)
    rows = [json.loads(line) for line in open(task / "columns.jsonl")][:3]
    rows[1] |= change
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(data.RowError, match=message):
        train_dpo.main(["--model_name_or_path", "tiny", "--dataset", "rows.jsonl", "--image_root", str(task), "--max_steps", "1", *extra, "--output_dir", "out"])
    assert not (tmp_path / "out" / "tiny_vlm").exists()


def test_unused_columns_are_warned_of(task, capsys):
    """A margin that the chosen losses do not take trains nothing: said once a column, not for those that are taken."""
    rows = [json.loads(line) | {"_source": "rows.jsonl:1"} for line in open(task / "columns.jsonl")][:1]
    rows[0]["weight"] = 1
    for extra, unused in (["--algo", "dpo"], 5), (["--algo", "dno"], 4), (["--algo", "madpo", "weighted", "--weight_column", "weight"], 3):
        train_dpo.check_columns(train_dpo.parse_args(["--model_name_or_path", "tiny", "--dataset", "rows.jsonl", *extra]), rows, [])
        said = capsys.readouterr().err
        assert said.count("warning: rows.jsonl:1: nothing uses the column") == unused, said


def test_training_goes_by_a_column(launch, task, monkeypatch):
    """--sort_by: every step's rows come in the column's order, in each epoch again."""
    seen, score = [], train_dpo.score_groups

    def spy(args, policy, groups, *rest):
        seen.extend(prompt.row["trust"] for prompt, _ in groups)
        return score(args, policy, groups, *rest)

    monkeypatch.setattr(train_dpo, "score_groups", spy)
    launch("train_dpo", "--algo", "simpo", "--dataset", task / "columns.jsonl", "--sort_by", "trust", "--max_steps", 6,
           "--per_device_train_batch_size", 4)
    assert seen == 2 * [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


def rows_of_step(folder, step):
    """Index of the row behind each completion of a rollout."""
    return [int(json.loads(line)["row"].rpartition(":")[2]) - 1 for line in open(folder / "completions" / f"step_{step}.jsonl")]


@pytest.mark.slow
def test_prompts_go_by_a_column(launch, task, tmp_path):
    """--sort_by online: the rollouts' prompts come in the column's order (row i has i % 4), in each epoch again."""
    launch("train_grpo", *grpo(task), "--dataset", task / "columns.jsonl", "--sort_by", "trust", "--max_steps", 3,
           "--per_device_train_batch_size", 32)
    drawn = [row % 4 for step in (1, 2, 3) for row in rows_of_step(tmp_path / "run0", step)[::4]]
    assert drawn == 2 * [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


def plain_entropies(policy, prompt, ids, temperature):
    tokens = torch.cat([prompt.tokens, ids])[None]
    types = (tokens == policy.hf.config.image_token_id).int()
    logits = policy.hf(input_ids=tokens, mm_token_type_ids=types, **prompt.pixels).logits[0, len(prompt.tokens) - 1:-1]
    keep = [i for i in range(logits.shape[-1]) if i not in set(policy.never_sampled.tolist())]
    log_p = (logits / temperature)[:, keep].log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def many_ends(processor):
    """Ids that end an answer, and do not stand in a prompt."""
    asked = set(processor.tokenizer("how many shapes are there?")["input_ids"])
    return [i for i in range(7, 300, 5) if i not in asked]


STEPS = {  # flags, and what the formula below does for them
    "gspo": dict(level="sequence", loss_type="grpo", corrected=False),
    "dapo": dict(level="token", loss_type="dapo", scale="none"),
    "dr_grpo": dict(level="token", loss_type="dr_grpo", scale="batch", kl="k2", corrected=False, entropy_coef=0.3),
    "cispo": dict(level="token", loss_type="cispo", kl="k1", epsilon_high=1.04),
    "sapo": dict(level="sequence_token", loss_type="sapo", entropy_coef=0.1),
    "rloo": dict(level="sequence_sum", loss_type="grpo", estimator="rloo", kl="k1", in_reward=True),
    "gdpo": dict(level="token", loss_type="grpo", estimator="gdpo"),
    "masks": dict(level="token", loss_type="grpo", top_entropy=0.5, off_policy=0.05, truncated=True),
    "correction": dict(level="token", loss_type="dapo", correction="sequence_mask", delta=1.05)}


@pytest.mark.parametrize("case", [
    case if case in ("gspo", "dapo", "rloo", "masks") else pytest.param(case, marks=pytest.mark.slow) for case in STEPS])
def test_grpo_steps_are_the_formula(monkeypatch, tmp_path, task, case):
    """Two rollouts of two updates with two weighted rewards, clipping and a KL: the fourth step's gradient (off-policy,
    second half of the second rollout) is that of the loss written out, on the ids that were sampled. The sampler's
    log-probs are moved, as another engine's would be, so that what corrects for them has something to do."""
    o = dict(scale=None, estimator="grpo", kl="k3", corrected=True, in_reward=False, entropy_coef=0.0, top_entropy=1.0,
             off_policy=None, truncated=False, correction="none", delta=None, epsilon_high=0.04) | STEPS[case]
    monkeypatch.chdir(tmp_path)
    steps, rollouts, sample = capture(monkeypatch), [], rollout.sample

    def spy(policy, prompts, draws, **kwargs):
        result = sample(policy, prompts, draws, **kwargs)
        noise = 0.3 * torch.randn(result.sampling_logps.shape, generator=torch.Generator().manual_seed(draws[0]))
        result = result._replace(sampling_logps=result.sampling_logps + noise)
        rollouts.append((prompts, draws, result))
        return result

    load = model.load_policy

    def load_and_end_early(*args, **kwargs):
        policy, processor = load(*args, **kwargs)
        policy.eos_ids = many_ends(processor)  # completions of every length
        return policy, processor

    monkeypatch.setattr(model, "load_policy", load_and_end_early)
    monkeypatch.setattr(rollout, "sample", spy)
    monkeypatch.setattr(rollout, "RewardRunner", InProcess)
    (task / "more.py").write_text(REWARD + "def length(completions, **_):\n    return [len(c) / 7 for c in completions]\n")
    extra = [] if o["scale"] is None else ["--scale_rewards", o["scale"]]
    extra += [] if o["delta"] is None else ["--delta", o["delta"]]
    extra += [] if o["loss_type"] in ("cispo", "sapo") else ["--epsilon", 0.01]
    extra += [] if o["loss_type"] == "sapo" else ["--epsilon_high", o["epsilon_high"]]
    extra += [] if o["correction"] == "none" else ["--importance_sampling_clip_max", 1.5]
    files = [] if o["off_policy"] is None else ["off_policy_mask", "high_entropy"]
    extra += ["--off_policy_mask_threshold", o["off_policy"], "--top_entropy_quantile", o["top_entropy"]] if files else []
    if not o["in_reward"] and (o["kl"], o["corrected"]) != ("k3", True):
        files.append("kl_estimator")
        extra += ["--kl_estimator", o["kl"], "--use_bias_correction_kl" if o["corrected"] else "--no-use_bias_correction_kl"]
    extra += ["--algo", "grpo", *files] if files else []
    train_grpo.main(flags(
        task, "--reward_funcs", f"{task / 'more.py'}:spread", f"{task / 'more.py'}:length", "--reward_weights", 0.3, 2.0,
        "--num_generations", 4, "--max_completion_length", 5, "--temperature", 1.3, "--loss_type", o["loss_type"],
        "--importance_sampling_level", o["level"], "--advantage_estimator", o["estimator"], "--beta", 0.2,
        "--entropy_coef", o["entropy_coef"],
        "--importance_sampling_correction", o["correction"],
        "--mask_truncated_completions" if o["truncated"] else "--no-mask_truncated_completions", *extra,
        "--per_device_train_batch_size", 8, "--steps_per_generation", 2, "--max_steps", 4, "--output_dir", "out"))
    assert [draws for _, draws, _ in rollouts] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    policy, processor = model.load_policy("out/tiny_vlm")
    prompts, _, sampled = rollouts[1]
    everything = {n: sampled.completion_ids[n][sampled.completion_mask[n]] for n in range(16)}
    which = range(8, 16)

    def logps(weights, which):
        with_weights(policy, weights)
        return {n: plain_logps(policy, prompts[n // 4], everything[n], 1.3) for n in which}

    with torch.no_grad():
        ref, old = logps(steps[0][0], range(16)), logps(steps[2][0], range(16))
    scores = torch.tensor([[sum(map(ord, t)) % 11, len(t) / 7] for t in rollout.decode(policy, processor, sampled, prompts)])
    scores = scores.double().view(4, 4, 2)                                                      # (P, G, functions)
    weights = torch.tensor([0.3, 2.0], dtype=torch.float64)
    rewards = (scores * weights).sum(-1)
    if o["in_reward"]:
        rewards -= 0.2 * torch.stack([(old[n] - ref[n]).sum() for n in range(16)]).view(4, 4)
    A = rewards - rewards.mean(-1, keepdim=True)
    if o["estimator"] == "rloo":
        A = torch.stack([rewards[:, i] - rewards[:, [j for j in range(4) if j != i]].mean(-1) for i in range(4)], -1)
    elif o["estimator"] == "gdpo":
        z = ((scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-4) * weights).sum(-1)
        A = (z - z.mean()) / (z.std() + 1e-4)
    elif o["scale"] != "none":
        A = A / ((rewards.std() if o["scale"] == "batch" else rewards.std(-1, keepdim=True)) + 1e-4)
    A = A.flatten()
    now = logps(steps[3][0], which)
    entropies = {n: plain_entropies(policy, prompts[n // 4], everything[n], 1.3) for n in which}
    trained = [n for n in which if not (o["truncated"] and sampled.truncated[n])]
    bound = torch.cat([entropies[n] for n in trained]).detach().quantile(1 - o["top_entropy"])
    tokens = sum(len(everything[n]) for n in trained)
    total, clipped, dropped = 0.0, 0, 0
    for n in trained:
        length, log_ratio = len(everything[n]), now[n] - old[n]
        ratio = {"token": log_ratio, "sequence": log_ratio.mean().expand(length),
                 "sequence_sum": log_ratio.sum().expand(length),
                 "sequence_token": log_ratio.mean().detach() + log_ratio - log_ratio.detach()}[o["level"]].exp()
        if o["loss_type"] == "cispo":
            term = -ratio.detach().clamp(max=1.04) * A[n] * now[n]
            clipped += int((ratio > 1.04).sum())
        elif o["loss_type"] == "sapo":
            tau = 1.0 if A[n] > 0 else 1.05
            term, clipped = -4 / tau * torch.sigmoid(tau * (ratio - 1)) * A[n], 1
        else:
            capped = ratio if o["delta"] is None else ratio.clamp(max=o["delta"])
            term = -torch.min(capped * A[n], ratio.clamp(0.99, 1 + o["epsilon_high"]) * A[n])
            clipped += int((term > -ratio * A[n]).sum())
        keep = entropies[n] >= bound
        sampling_logps = sampled.sampling_logps[n, :length]
        if o["off_policy"] is not None and A[n] < 0 and (sampling_logps - now[n]).mean() > o["off_policy"]:
            keep = keep & False
        if o["correction"] == "sequence_mask":
            weight = (old[n] - sampling_logps).sum().exp()
            term = term * (weight if weight <= 1.5 else 0.0)
            dropped += int(weight > 1.5)
        term, dropped = term * keep, dropped + int((~keep).sum())
        d = now[n] - ref[n]
        kl = {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[o["kl"]]
        per_token = term + (0.0 if o["in_reward"] else 0.2) * (kl * ratio if o["corrected"] else kl)
        total = total + (per_token.mean() if o["loss_type"] in ("grpo", "sapo") else per_token.sum())
    count = {"grpo": 8, "sapo": 8, "dr_grpo": 8 * 5}.get(o["loss_type"], tokens)
    loss = total / count - o["entropy_coef"] * sum(entropies[n].sum() for n in trained) / tokens
    loss.backward()
    assert clipped > 0, "the test needs clipped tokens"
    assert (dropped > 0) == (case in ("masks", "correction")) and (len(trained) < 8) == (case == "masks")
    assert_same(steps[3][1], [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.parameters()], 1e-3)
    logged = [json.loads(line) for line in open("out/metrics.jsonl")]
    assert logged[4]["loss"] == pytest.approx(loss.item(), rel=1e-3, abs=1e-5)
    assert logged[4]["reward"] == pytest.approx((scores * weights).sum(-1).mean().item())


def test_online_dpo_steps_are_the_formula(monkeypatch, tmp_path, task):
    """The third step of --algo online_dpo, its gradient and loss written out: the best of each group against its worst by
    the weighted reward, 3 less for an answer that met the limit; log-ratios to the starting policy; mean over the pairs."""
    monkeypatch.chdir(tmp_path)
    steps, rollouts, sample, load = capture(monkeypatch), [], rollout.sample, model.load_policy

    def spy(policy, prompts, draws, **kwargs):
        rollouts.append((prompts, sample(policy, prompts, draws, **kwargs)))
        return rollouts[-1][1]

    def load_and_end_early(*args, **kwargs):
        policy, processor = load(*args, **kwargs)
        policy.eos_ids = many_ends(processor)
        return policy, processor

    monkeypatch.setattr(model, "load_policy", load_and_end_early)
    monkeypatch.setattr(rollout, "sample", spy)
    monkeypatch.setattr(rollout, "RewardRunner", InProcess)
    train_grpo.main(flags(task, *grpo(task), "--algo", "online_dpo", "--beta", 0.3, "--temperature", 1.3, "--reward_funcs",
                          f"{task / 'rewards.py'}:spread", "finished", "--reward_weights", 1, 3, "--per_device_train_batch_size", 8, "--gradient_accumulation_steps", 2, "--max_steps", 3,
                          "--output_dir", "out"))
    policy, processor = model.load_policy("out/tiny_vlm")
    prompts, sampled = rollouts[2]
    r = torch.tensor([float(sum(map(ord, t)) % 11) for t in rollout.decode(policy, processor, sampled, prompts)])
    assert 0 < sampled.truncated.sum() < 16
    r = (r - 3 * sampled.truncated).view(4, 4)
    pairs = [(4 * p + int(r[p].argmax()), 4 * p + int(r[p].argmin())) for p in range(4) if r[p].max() > r[p].min()]

    def logps(n):
        return plain_logps(policy, prompts[n // 4], sampled.completion_ids[n][sampled.completion_mask[n]], 1.3).sum()

    with_weights(policy, steps[0][0])
    with torch.no_grad():
        ref = {n: logps(n) for pair in pairs for n in pair}
    with_weights(policy, steps[2][0])
    loss = -sum(torch.nn.functional.logsigmoid(0.3 * (logps(w) - ref[w] - logps(l) + ref[l])) for w, l in pairs) / len(pairs)
    loss.backward()
    assert_same(steps[2][1], [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.parameters()], 1e-3)
    logged = [json.loads(line) for line in open("out/metrics.jsonl")]
    assert logged[3]["loss"] == pytest.approx(loss.item(), rel=1e-3) and abs(loss.item() - 0.6931) > 0.01


@pytest.mark.slow
def test_dynamic_sampling(launch, task, monkeypatch, tmp_path):
    """DAPO: each group of the batch has rewards that differ; candidates go on after the last draw that the batch before
    used, in rounds of a batch; after N rounds groups without spread fill up, and are counted."""
    rounds, sample, score = [], rollout.sample, InProcess.score

    def score_and_fail(runner, *args, **kwargs):  # in the first round of the first step one completion, else none
        scores = score(runner, *args, **kwargs)
        runner.failed = int(len(rounds) == 1)
        return scores

    monkeypatch.setattr(InProcess, "score", score_and_fail)
    monkeypatch.setattr(rollout, "sample", lambda policy, prompts, draws, **kwargs: (
        rounds.append(list(draws)), sample(policy, prompts, draws, **kwargs))[1])
    rare = [*grpo(task), "--reward_funcs", f"{task / 'rewards.py'}:rare", "--per_device_train_batch_size", 8,
            "--max_steps", 3]
    metrics, _ = launch("train_grpo", *rare, "--dynamic_sampling", 9)
    assert all(m["frac_reward_zero_std"] == 0 and m["reward_std"] > 0 for m in metrics) and len(rounds) > 4
    plan, start = data.Plan([12], 60, 0), 0
    for step, m in enumerate(metrics, 1):
        lines = [json.loads(line) for line in open(tmp_path / "run0" / "completions" / f"step_{step}.jsonl")]
        tried = round(2 / m["frac_groups_accepted"])
        assert m["rewards/failed"] == (pytest.approx(1 / (8 * math.ceil(tried / 2))) if step == 1 else 0)  # of all rounds
        assert tried > 2 or step > 1
        for _ in range(math.ceil(tried / 2)):  # rounds of two prompts, from the draw after the last one used
            assert rounds.pop(0) == [start, start + 1]
            start += 2
        start -= tried % 2
        assert lines[-1]["row"].endswith(f":{plan[start - 1] + 1}")
        assert m["epoch"] == pytest.approx(start / 12) and all(any(l["advantage"] for l in lines[i:i + 4]) for i in (0, 4))
    assert not rounds
    metrics, _ = launch("train_grpo", *rare, "--dynamic_sampling", 1)
    assert len(rounds) <= 6 and any(m["frac_reward_zero_std"] > 0 for m in metrics)
    assert all(0 <= m["frac_groups_accepted"] <= 1 for m in metrics)


# --- errors, as a user meets them


ERRORS = [
    ("train_dpo.py", ["--model_name_or_path", "tiny", "--dataset", "rows.jsonl", "--image_root", "."], "error: rows.jsonl:1: not valid JSON"),
    ("train_grpo.py", ["--model_name_or_path", "./nowhere"], "error: the model ./nowhere: no such folder"),
    ("train_dpo.py", ["--algo", "sft", "--model_name_or_path", "tiny", "--dataset", "good.jsonl", "--stop_at_accuracy", "0.5"],
     "error: --stop_at_accuracy needs eval/accuracy"),
    ("train_dpo.py", ["--model_name_or_path", "tiny", "--dataset", "absent.jsonl"], "error: --dataset absent.jsonl")]


@pytest.mark.slow
def test_errors_are_one_line(tmp_path):
    """A mistake of the user ends the process with a message and exit code 1, not with a traceback."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": \n')
    (tmp_path / "good.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n')

    def fails(case):
        name, arguments, message = case
        output = script(name, *arguments, "--output_dir", f"out-{ERRORS.index(case)}", cwd=tmp_path, ok=False)
        assert message in output and "Traceback" not in output, output

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(fails, ERRORS))


@pytest.mark.slow
def test_an_error_on_one_rank_ends_both(tmp_path, task):
    """A corrupt image that only one rank reads: torchrun ends the other rank as well, and the message is there."""
    rows = [json.loads(line) for line in open(task / "pairs.jsonl")][:4]
    for row in rows:
        row["images"] = []
    rows[1]["images"] = ["broken.png"]
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    output = script("train_dpo.py", "--model_name_or_path", "tiny", "--dataset", "rows.jsonl", "--image_root", ".", "--max_steps", "1",
                    "--per_device_train_batch_size", "2", ranks=2, cwd=tmp_path, ok=False, timeout=120)
    assert "rows.jsonl:2: image" in output and "cannot be read" in output


@pytest.mark.slow
def test_an_error_on_rank_0_alone(tmp_path, task):
    """A full disk, say. The other rank's collective broke, and its traceback hid the line of rank 0."""
    (tmp_path / "mine.py").write_text("""import os
import model

SCRIPT = "train_dpo.py"

def after_step(state, means):
    if os.environ["RANK"] == "0":
        raise model.InputError("rank 0 alone")
""")
    output = script("train_dpo.py", "--algo", "dpo", "mine.py", "--model_name_or_path", "tiny", "--dataset", task / "pairs.jsonl",
                    "--image_root", task, "--max_steps", "2", ranks=2, cwd=tmp_path, ok=False, timeout=120)
    assert "error: rank 0 alone" in output and "error: rank 1 lost another rank" in output
    assert "[rank1]: Traceback" not in output


@pytest.mark.parametrize("name", ["train_grpo", pytest.param("train_dpo", marks=pytest.mark.slow)])
def test_preflight_changes_nothing(launch, task, name, capsys, monkeypatch):
    """D10, F36: --preflight runs the largest micro-batch first: the longest prompts, completions of full length. The
    numbers that follow are those of a run without it; out of memory there is one clear error."""
    extra = grpo(task, "--per_device_train_batch_size", 8) if name == "train_grpo" else ["--algo", "mpo"]
    plain, with_it = (launch(name, *extra, "--max_steps", 2, flag)[0] for flag in ("--no-preflight", "--preflight"))
    assert [m["loss"] for m in plain] == [m["loss"] for m in with_it]
    said = re.search(r"preflight: (\d+) completions in rows of (\d+) tokens fit", capsys.readouterr().out)
    assert int(said[1]) == (8 if name == "train_grpo" else 2 * 32) and int(said[2]) > 40

    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(model.Policy, "forward", out_of_memory)
    with pytest.raises(model.InputError, match="the largest micro-batch of this run, .* does not fit into memory"):
        launch(name, *extra, "--max_steps", 2, "--preflight", *(["--algo", "sft"] if name == "train_dpo" else []))

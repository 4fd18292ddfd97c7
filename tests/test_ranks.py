"""One, two and four ranks compute the same: gradients, weights, losses and metrics, tensor by tensor."""

import json

import pytest
import torch
from conftest import ROOT, build_tiny_gemma3, build_tiny_qwen, build_tiny_text, python, run
from safetensors.torch import load_file
from test_runs import write_task

import data

pytestmark = pytest.mark.xdist_group("ranks")
DRIVER = ROOT / "tests" / "rank_cases.py"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The rows of test_runs.py (0, 1 and 2 images, answers of uneven length), and a start model."""
    folder = tmp_path_factory.mktemp("ranks")
    write_task(folder)
    data.build_tiny_vlm(folder / "start")
    build_tiny_qwen(folder / "experts", "Qwen3VLMoe")
    build_tiny_gemma3(folder / "gemma")
    build_tiny_text(folder / "text", "Llama")
    rows = [json.loads(line) | {"images": []} for line in open(folder / "pairs.jsonl")]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def cases(world: int):
    """Each computes with all ranks together 4 pairs or 16 completions an update, in another cut."""
    common = ["--model_name_or_path", "start", "--dataset", "pairs.jsonl", "--image_root", ".", "--learning_rate", "0.01",
              "--lr_scheduler_type", "constant", "--max_steps", "3", "--max_completion_length", "6"]
    online = ["--reward_funcs", "rewards.py:spread", "--num_generations", "4", "--epsilon", "0.2", "--epsilon_high", "0.2"]
    held_out = ["--eval_dataset", "pairs.jsonl", "--eval_steps", "3", "--per_device_eval_batch_size", "2"]
    for micro in (1, 2, 4):
        accumulate = 4 // world // micro
        if accumulate:
            yield (f"mpo-{world}x{micro}", "train_dpo",
                   [*common, *held_out, "--algo", "mpo", "--per_device_train_batch_size", micro,
                    "--gradient_accumulation_steps", accumulate])
    # gspo's held-out answers, which hang on the draw numbers of the rows, are those of one rank
    for algo, micro, extra in (("grpo", 2, ["--beta", "0.1"]), ("gspo", 4, held_out), ("rloo", 4, [])):
        if world == 4:
            break  # grpo-recompute stands for them: four ranks on two cores are slow
        yield (f"{algo}-{world}x{micro}", "train_grpo",
               [*common, *online, "--algo", algo, *extra, "--per_device_train_batch_size", micro,
                "--gradient_accumulation_steps", 16 // world // micro])
    if world < 4:
        yield (f"experts-{world}x4", "train_grpo",
               [*common, *online, "--model_name_or_path", "experts", "--algo", "gspo", "--per_device_train_batch_size", 4,
                "--gradient_accumulation_steps", 4 // world])
        for start, rows in (("gemma", "pairs.jsonl"), ("text", "texts.jsonl")):
            yield (f"{start}-{world}x4", "train_dpo",
                   [*common, "--model_name_or_path", start, "--dataset", rows, "--per_device_train_batch_size", 4 // world])
    lora = ["--lora_r", 4, "--learning_rate", "0.1"]  # SGD: B's first steps are what A's gradient comes from
    if world < 4:  # with a reference: the gathered policy, its adapter off; a tower that runs for no update, on no rank
        yield (f"lora-{world}x4", "train_grpo",
               [*common, *online, *lora, "--beta", "0.1", "--freeze_vision_tower", "--per_device_train_batch_size", 4,
                "--gradient_accumulation_steps", 4 // world])
    yield (f"dora-{world}x1", "train_dpo",
           [*common, *held_out, *lora, "--use_dora", "--gradient_checkpointing",
            "--shard_size", max(world // 2, 1), "--per_device_train_batch_size", 1,
            "--gradient_accumulation_steps", 4 // world])
    if world < 4:  # groups without spread among the candidates, prompts by their variance; a reference that moves
        yield (f"online_dpo-{world}x4", "train_grpo",
               [*common, *online, "--reward_funcs", "rewards.py:rare", "--algo", "online_dpo", "variance_sampling",
                "moving_reference", "--dynamic_sampling", 2, "--ref_model_sync_steps", 2, "--per_device_train_batch_size", 4,
                "--gradient_accumulation_steps", 4 // world])
    if world == 1:
        yield ("grpo-1x16", "train_grpo", [*common, *online, "--beta", "0.1", "--per_device_train_batch_size", 16])
    if world == 2:  # cut by tokens: in two of three steps 2 micro-batches on one rank, 1 on the other, which then halves it
        yield ("grpo-tokens", "train_grpo", [*common, *online, "--beta", "0.1", "--max_tokens_per_batch", 60,
                                             "--per_device_train_batch_size", 8])
        yield ("mpo-tokens", "train_dpo", [*common, *held_out, "--algo", "mpo", "--max_tokens_per_batch", 80,
                                           "--per_device_train_batch_size", 2])
    if world == 4:
        yield ("mpo-hybrid", "train_dpo", [*common, *held_out, "--shard_size", 2, "--per_device_train_batch_size", 1])
        yield ("grpo-recompute", "train_grpo", [*common, *online, "--beta", "0.1", "--gradient_checkpointing",
                                                "--per_device_train_batch_size", 4])


@pytest.fixture(scope="session")
def results(folder):
    """world -> {case: (tensors, metrics)}; one launch per world size runs all its cases."""
    made = {}

    def get(world):
        if world not in made:
            listed = [(name, script, list(map(str, flags))) for name, script, flags in cases(world)]
            (folder / f"{world}.json").write_text(json.dumps(listed))
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"] if world > 1 else []
            run(python(), *launch, DRIVER, f"{world}.json", cwd=folder)
            made[world] = {name: (load_file(folder / f"{name}.safetensors"),
                                  [json.loads(line) for line in open(folder / name / "metrics.jsonl")])
                           for name, *_ in listed}
        return made[world]

    return get


def assert_equal_runs(ours, theirs):
    """The first step's whole gradient to 5e-6 of its norm (one CPU's rounding: 5e-7), and all weights after three steps to
    1e-6; the later gradients, which are taken at weights that differ by rounding, to 1e-5 (1e-6); each tensor to 2e-5 (2e-6),
    of at least a hundredth of the largest, where a sum cancels; every metric to 2e-5, or to 4e-6 where sums of log-probs of
    up to 100 cancel (4e-7)."""
    assert ours[0].keys() == theirs[0].keys() and len(ours[1]) == len(theirs[1]) == 4
    for part, bound in (("step 0 ", 5e-6), ("step 1 ", 1e-5), ("step 2 ", 1e-5), ("weight ", 1e-6)):
        names = [name for name in theirs[0] if name.startswith(part)]
        errors = torch.stack([(ours[0][n] - theirs[0][n]).norm() for n in names])
        sizes = torch.stack([theirs[0][n].norm() for n in names])
        assert errors.norm() <= bound * sizes.norm() and sizes.norm() > 0, (part, errors.norm() / sizes.norm())
        relative = errors / sizes.clamp(min=1e-2 * sizes.max())
        assert relative.max() <= 2e-5, (names[relative.argmax()], relative.max())
    for a, b in zip(ours[1], theirs[1]):
        assert a.keys() == b.keys()
        ties = {"rewards/accuracies", "eval/rewards/accuracies"} if a["step"] < 2 else set()  # but for rounding
        for key in a.keys() - {"step_time", "rollout_time"} - ties:
            assert a[key] == pytest.approx(b[key], rel=2e-5, abs=4e-6), (a["step"], key)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_and_micro_batches_change_nothing(results, world):
    """P9, F34, D3: gradients and weights of three SGD steps with 1, 2 and 4 gloo ranks under FSDP2, micro-batches of 1, 2
    and 4, uneven lengths, micro-batches without images, HSDP and recomputation, equal one process's: MPO with its
    running delta, GRPO with KL, GSPO (of a mixture of experts too), RLOO, MPO of Gemma 3 and of a text-only model, LoRA with KL, DoRA on a frozen vision tower. A
    hang would show as the launch's time-out."""
    one = results(1)
    for name, result in results(world).items():
        algo = name.split("-")[0]
        reference = one[{"grpo": "grpo-1x16", "dora": "dora-1x1"}.get(algo, f"{algo}-1x4")]
        assert_equal_runs(result, reference)
        assert result[1][1]["grad_norm"] > 0 and any(m.get("bco_delta", 1) != 0 for m in result[1][2:])


@pytest.mark.slow
def test_export_from_shards_is_the_same_folder(results, folder):
    """F18: `final/` of four ranks has the names, shapes and dtypes of one process's, and loads in transformers."""
    results(1), results(4)
    from transformers import AutoModelForImageTextToText

    one, four = (load_file(folder / name / "final" / "model.safetensors") for name in ("mpo-1x4", "mpo-4x1"))
    assert one.keys() == four.keys()
    for name in one:
        assert one[name].dtype == four[name].dtype
        torch.testing.assert_close(one[name], four[name], rtol=0, atol=2e-6)
    listed = [sorted(p.name for p in (folder / name / "final").iterdir()) for name in ("mpo-1x4", "mpo-4x1")]
    assert listed[0] == listed[1]
    adapters = [load_file(folder / name / "final" / "adapter" / "adapter_model.safetensors")
                for name in ("dora-1x1", "dora-4x1")]
    assert adapters[0].keys() == adapters[1].keys() and any("magnitude" in name for name in adapters[0])
    for name in adapters[0]:
        torch.testing.assert_close(adapters[1][name], adapters[0][name], rtol=0, atol=2e-6)
    loaded = AutoModelForImageTextToText.from_pretrained(folder / "mpo-4x1" / "final")
    assert loaded.lm_head.weight.data_ptr() == loaded.model.language_model.embed_tokens.weight.data_ptr()


@pytest.mark.slow
def test_bf16_is_one_program_on_ranks(folder):
    """On one rank autocast kept the residual stream in fp32, under FSDP it was bf16: one and two ranks trained by different
    numbers. Now hidden states and log-probs are the same bits alone, sharded, and gathered as the sampler has them."""
    driver, results = ROOT / "tests" / "bf16_ranks.py", []
    for name, launch in (("alone", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]),
                         ("sharded", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"])):
        run(python(), *launch, driver, folder / "start", folder / f"{name}.safetensors", cwd=folder)
        results.append(load_file(folder / f"{name}.safetensors"))
    alone, sharded = results
    assert alone["trained"].dtype == torch.bfloat16 and alone["trained"].float().std() > 0.1
    for one in (alone["gathered"], sharded["trained"], sharded["gathered"]):
        assert torch.equal(alone["trained"], one)
    assert torch.equal(alone["logps"], sharded["logps"])

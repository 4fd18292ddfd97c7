"""LoRA: the layer's arithmetic, the start, what is trained, the merged model, PEFT's format."""

import contextlib
import json
import os
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES, TEXT_ONLY, close_to_scale, few, make_group, make_row, run, script
from safetensors.torch import load_file
from test_group_rows import transformers_logps
from test_runs import grpo, launch, task  # noqa: F401

import data
import model
import rollout
import train_dpo
import train_grpo
from layers.lora import LoraLinear, adapter_off

KINDS = {"lora": [], "rslora": ["--use_rslora"], "dora": ["--use_dora"]}


def adapted(folder, *extra, train=True):
    """(policy, processor) with adapters of rank 4, `train`: A, B and m moved off their start."""
    args = train_dpo.parse_args(["--model_name_or_path", str(folder), "--lora_r", "4", "--lora_alpha", "6", *extra])
    policy, processor = model.load_policy(str(folder), args.dtype, gradient_checkpointing=args.gradient_checkpointing,
                                          freeze_vision_tower=args.freeze_vision_tower, lora=args)
    generator = torch.Generator().manual_seed(1)
    for name, p in policy.named_parameters():
        if p.requires_grad and train:
            p.data += 0.05 * torch.randn(p.shape, generator=generator)
    return policy, processor


def logps_of(policy, processor, batch=((1, [5, 3]), (0, [2, 8]))):
    groups = [make_group(policy, processor, images, lengths, seed=i) for i, (images, lengths) in enumerate(batch)]
    return policy(policy.pack(groups))[0]


def trained(policy):
    return [name for name, p in policy.named_parameters() if p.requires_grad]


# --- the layer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["self_attn.q_proj", "mlp.down_proj"], ids=["bias", "no bias"])
def test_layer_by_hand(folders, kind, name):
    """y = x (W + s B A)^T + b with s = 6/4 (rsLoRA 6/2), DoRA's rows rescaled to m: values, gradients of A, B, m.
    Guards the scale, the transposes, a bias that is scaled along, a norm that gets a gradient, a gradient in W."""
    layer = adapted(folders["qwen2_5_vl"], *KINDS[kind])[0].hf.model.language_model.layers[1].get_submodule(name)
    W, A, B, b = layer.weight, layer.lora_A.detach(), layer.lora_B.detach(), layer.bias
    assert (b is None) == (name == "mlp.down_proj") and A.shape == (4, layer.in_features)
    if b is not None:
        b.data.normal_()  # it starts at 0
    s = 6 / 2 if kind == "rslora" else 6 / 4
    x, g = torch.randn(3, 5, layer.in_features), torch.randn(3, 5, layer.out_features)
    y = layer(x)
    (y * g).sum().backward()
    x, g = x.flatten(0, 1), g.flatten(0, 1)
    V = W + s * B @ A                                                                        # (out, in)
    gain = torch.ones(len(W))
    if kind == "dora":
        m = W.norm(dim=1) + layer.lora_m.detach()
        gain = m / V.norm(dim=1)
        expected = (g * (x @ V.T)).sum(0) / V.norm(dim=1)
        torch.testing.assert_close(layer.lora_m.grad, expected, rtol=1e-4, atol=1e-4)
        assert (gain - 1).abs().max() > 1e-3
    expected = (x @ V.T) * gain + (0 if b is None else b)
    close_to_scale(y.flatten(0, 1), expected, 1e-5)
    g = g * gain
    torch.testing.assert_close(layer.lora_A.grad, s * B.T @ g.T @ x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.lora_B.grad, s * g.T @ (x @ A.T), rtol=1e-4, atol=1e-4)
    assert W.grad is None and (b is None or b.grad is None)
    merged, adapter = layer.merged()
    close_to_scale(F.linear(x, merged, b), expected, 1e-5)
    assert ("lora_magnitude_vector" in adapter) == (kind == "dora")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_start_and_adapter_off_are_exactly_the_base(folders, kind, dtype):
    """Bit for bit the plain model's log-probs: at the start (B = 0, in DoRA m = |W|), and at any time with the adapter
    off, so that KL is 0 and the reference is the start; also in bf16, where the frozen weights are kept in bf16."""
    folder = folders["qwen2_5_vl"]
    plain, processor = model.load_policy(str(folder), dtype)
    expected = logps_of(plain, processor)
    policy, _ = adapted(folder, *KINDS[kind], "--dtype", dtype, train=False)
    assert torch.equal(logps_of(policy, processor), expected)
    if dtype == "float32":
        assert model.weights_fingerprint(policy) == model.weights_fingerprint(plain)  # the reference cache's key
    for name, p in policy.named_parameters():
        p.data += 0.1 if p.requires_grad else 0
    assert not torch.allclose(logps_of(policy, processor), expected, atol=1e-3)
    with adapter_off(policy):
        assert torch.equal(logps_of(policy, processor), expected)
    assert not torch.equal(logps_of(policy, processor), expected)


def test_frozen_weights_are_kept_in_the_compute_dtype(folders):
    """LoRA's memory: the adapted layers' frozen weights take 2 bytes in bf16; what is trained stays fp32."""
    policy, _ = adapted(folders["qwen2_5_vl"], "--dtype", "bfloat16")
    assert policy.hf.model.language_model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
    assert policy.hf.lm_head.weight.dtype == torch.float32


def test_adapters_start_alike_for_one_seed(folders):
    """--seed alone decides A: ranks that each drew their own would shard different matrices."""
    starts = []
    for extra in ([], [], ["--seed", "1"]):
        policy, _ = adapted(folders["qwen2_5_vl"], *extra, train=False)
        starts.append(policy.hf.model.language_model.layers[0].self_attn.q_proj.lora_A)
        torch.rand(1)  # another state of the global generator
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


# --- which layers


def test_targets(folders, capsys):
    """all-linear is every linear layer but the head, the vision tower with it unless it is frozen; a name matches as an
    end at a dot (proj is not q_proj); nothing but adapters is trained; the start line counts them."""
    folder = folders["qwen2_5_vl"]
    policy, _ = adapted(folder)
    everywhere = policy.hf.adapter_config["target_modules"]
    linear = {n for n, m in policy.hf.named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(everywhere) == linear - {"lm_head"} and any("visual" in name for name in everywhere)
    assert {n.rpartition(".")[2] for n in trained(policy)} == {"lora_A", "lora_B"}
    assert len(trained(policy)) == 2 * len(everywhere)
    count = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert f"LoRA: {count:,} parameters in adapters of {len(everywhere)} linear layers" in capsys.readouterr().out
    frozen, _ = adapted(folder, "--freeze_vision_tower")
    assert frozen.hf.adapter_config["target_modules"] == [n for n in everywhere if "visual" not in n]
    named, _ = adapted(folder, "--lora_target_modules", "layers.0.self_attn.q_proj,proj")
    blocks = [f"model.visual.blocks.{i}.attn.proj" for i in (0, 1)]
    assert named.hf.adapter_config["target_modules"] == ["model.language_model.layers.0.self_attn.q_proj", *blocks]


@pytest.mark.parametrize("target", ["qproj", "lm_head", "embed_tokens", "q_proj nothing"])
def test_unknown_targets_list_what_there_is(folders, target):
    """A name without a layer would train less than was asked for; the head's adapter would never be called."""
    with pytest.raises(model.InputError, match=f"--lora_target_modules {target.split()[-1]}: .* has 0, 2, down"):
        adapted(folders["qwen2_5_vl"], "--lora_target_modules", *target.split())


def test_expert_weights_are_named(folders, capsys):
    """Mixture-of-experts weights are 3-D parameters in transformers 5: no adapter, and the start line says so."""
    policy, _ = adapted(folders["qwen3_vl_moe"])
    assert "Experts's 3-D weights are no linear layers and get none" in capsys.readouterr().out
    experts = [p for name, p in policy.hf.named_parameters() if "experts" in name]
    assert experts and not any(p.requires_grad for p in experts)


@pytest.mark.parametrize("arguments, message", [
    (["--lora_alpha", "16"], "--lora_alpha needs --lora_r"), (["--use_dora"], "--use_dora needs --lora_r"),
    (["--lora_target_modules", "q_proj"], "--lora_target_modules needs --lora_r"),
    (["--lora_r", "0"], "--lora_r: must be in [1, inf), got 0"),
    (["--lora_r", "8", "--lora_alpha", "-1"], "--lora_alpha: must be in [1, inf), got -1"),
    (["--lora_r", "8", "--lora_dropout", "0.1"], "unknown argument --lora_dropout")])
@pytest.mark.parametrize("module", [train_dpo, train_grpo], ids=["dpo", "grpo"])
def test_wrong_flags(module, arguments, message, capsys):
    """A flag that would do nothing is an error; dropout, which would move the first ratio, does not exist."""
    with pytest.raises(SystemExit):
        module.parse_args(arguments)
    assert message in capsys.readouterr().err


# --- training


@pytest.mark.parametrize("extra", [
    [], *(pytest.param(x, marks=pytest.mark.slow) for x in (["--use_dora", "--dtype", "bfloat16"], ["--steps_per_generation", 2]))],
                         ids=["lora", "dora, bf16", "off-policy"])
def test_grpo_starts_at_ratio_one_and_kl_zero(launch, task, monkeypatch, tmp_path, extra):  # noqa: F811
    """The reference is the model with its adapter off, no second one is loaded: at step 1 the ratio is exactly 1,
    the KL exactly 0, once B has moved the KL is above 0; only adapters are trained."""
    loads, load = [], model.load_policy
    monkeypatch.setattr(model, "load_policy", lambda *a, **k: loads.append(load(*a, **k)) or loads[-1])
    metrics, grads = launch("train_grpo", *grpo(task, "--lora_r", 4, "--beta", 0.1, "--max_steps", 3, "--learning_rate",
                                                0.01, "--per_device_train_batch_size", 12), *extra)
    assert len(loads) == 1 and len(grads[0]) == len(trained(loads[0][0]))
    assert metrics[0]["ratio"] == 1 and metrics[0]["kl"] == 0 and metrics[0]["grad_norm"] > 0
    assert metrics[2]["kl"] > 1e-6 and metrics[2]["ratio"] == (pytest.approx(1, abs=0.2) if len(extra) == 2 else 1)


def test_dpo_reference_is_the_base(launch, task, tmp_path, capsys):  # noqa: F811
    """MPO with LoRA starts at its known values, and finds the reference log-probs of a run without LoRA."""
    common = ["--max_steps", 2, "--learning_rate", 0.01, "--ref_cache", tmp_path / "cache"]
    launch("train_dpo", *common)
    capsys.readouterr()
    metrics, _ = launch("train_dpo", *common, "--lora_r", 4)
    assert "0 pairs computed, 12 found" in capsys.readouterr().out
    assert metrics[0]["loss/sigmoid"] == pytest.approx(0.693147, abs=1e-5)
    assert metrics[0]["rewards/margins"] == pytest.approx(0, abs=1e-5) and metrics[1]["rewards/margins"] != 0


def test_dora_takes_its_norms_once_a_rollout(folders, monkeypatch):
    """Two passes over every weight, in fp32, for every token: 120 times LoRA's time for a layer of 2048 x 2048."""
    policy, processor = adapted(folders["qwen2_5_vl"], *KINDS["dora"])
    calls, magnitude = [], LoraLinear.magnitude
    monkeypatch.setattr(LoraLinear, "magnitude", lambda layer: (calls.append(layer), magnitude(layer))[1])
    prompts = [data.encode_prompt(policy, processor, make_row(1, 3))]
    sampled = rollout.sample(policy, prompts, [0], num_generations=2, max_completion_length=9, temperature=1.0, seed=0)
    assert len(calls) == len(set(calls)) == sum(isinstance(m, LoraLinear) for m in policy.modules())
    groups = [(prompts[0], [ids[mask] for ids, mask in zip(sampled.completion_ids, sampled.completion_mask)])]
    close_to_scale(policy(policy.pack(groups))[0], sampled.sampling_logps)


def test_recomputed_layers_give_the_same_gradients(folders):
    """Gradient checkpointing with a frozen base: the adapters of the first layer get their gradient all the same."""
    found = []
    for extra in ([], ["--gradient_checkpointing"]):
        policy, processor = adapted(folders["qwen2_5_vl"], "--use_dora", *extra)
        logps_of(policy, processor).sum().backward()
        found.append({n: p.grad for n, p in policy.named_parameters() if p.requires_grad})
    for name, grad in found[0].items():
        assert grad.abs().max() > 0, name
        assert torch.equal(found[1][name], grad), name


@pytest.mark.parametrize("name", ["train_dpo", "train_grpo"])
def test_resume_is_bit_equal_and_saves_adapters_only(launch, task, monkeypatch, tmp_path, name):  # noqa: F811
    """A checkpoint holds adapters and their optimizer state, nothing of the frozen model; a run that goes on from it
    ends with the same bits, also in the middle of a rollout."""
    start = tmp_path / "start"
    data.build_tiny_vlm(start)
    extra = ["--model_name_or_path", start, "--lora_r", 4, "--use_dora", "--max_steps", 4, "--save_steps", 3,
             "--learning_rate", 0.01, "--per_device_train_batch_size", 4]
    extra += ["--ref_cache", tmp_path / "cache"] if name == "train_dpo" else []
    if name == "train_grpo":
        extra = [*grpo(task), *extra, "--beta", 0.1, "--steps_per_generation", 2]
    launch(name, *extra)
    shutil.copytree(tmp_path / "run0", tmp_path / "whole")
    step = tmp_path / "run0" / "checkpoints" / "step_3"
    saved = torch.distributed.checkpoint.FileSystemReader(step).read_metadata().state_dict_metadata
    assert all(".lora_" in key for key in saved if key.startswith("model.") or "exp_avg" in key)
    assert any("hf.model" in key and key.startswith("model.") for key in saved)
    shutil.rmtree(step.with_name("step_4"))
    (tmp_path / "run0" / "status.json").unlink()
    launch(name, *extra, "--output_dir", tmp_path / "run0")
    first, second = ([{k: v for k, v in json.loads(line).items() if not k.endswith("_time")}
                      for line in open(tmp_path / run / "metrics.jsonl")] for run in ("whole", "run0"))
    assert [m["step"] for m in second] == [0, 1, 2, 3, 4] and second == first
    for file in ("adapter/adapter_model.safetensors", "model.safetensors"):
        ours, theirs = (load_file(tmp_path / run / "final" / file) for run in ("run0", "whole"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    before = load_file(start / "model.safetensors")
    changed = {k for k in before if not torch.equal(before[k], theirs[k])}
    assert changed and not any("norm" in k or "embed" in k or k.endswith("bias") for k in changed)


# --- export


def grow(folder, tmp_path, *extra):
    """A trained adapter, exported. -> (policy, processor, final)"""
    policy, processor = adapted(folder, *extra)
    model.export(policy, tmp_path / "final")
    return policy, processor, tmp_path / "final"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", few(FAMILIES, "qwen2_5_vl", "qwen3_vl_moe", "gemma3", "llama"))
def test_merged_export_computes_the_same(folders, loaded, family, kind, tmp_path):
    """`final/` is a plain model (same files, names and shapes as the start) whose log-probs are the adapter model's, but
    for rounding; adapter/ has PEFT's names and what vLLM asks: no bias, no modules_to_save, rank and alpha as integers."""
    loaded(family)  # skips where this family's processor cannot be loaded
    policy, processor, final = grow(folders[family], tmp_path, *KINDS[kind])
    plain, _ = model.load_policy(str(final))
    close_to_scale(logps_of(plain, processor), logps_of(policy, processor))
    assert not any("lora" in name for name, _ in plain.named_parameters())
    start, end = (load_file(folder / "model.safetensors") for folder in (folders[family], final))
    assert {k: v.shape for k, v in start.items()} == {k: v.shape for k, v in end.items()}
    tensors = load_file(final / "adapter" / "adapter_model.safetensors")
    config = json.loads((final / "adapter" / "adapter_config.json").read_text())
    kinds = ("lora_A.weight", "lora_B.weight", *(["lora_magnitude_vector"] if kind == "dora" else []))
    assert tensors.keys() == {f"base_model.model.{t}.{k}" for t in config["target_modules"] for k in kinds}
    assert config["base_model_name_or_path"] == str(folders[family]) and config["modules_to_save"] is None
    assert (config["r"], config["lora_alpha"], config["bias"]) == (4, 6, "none")
    assert (config["use_rslora"], config["use_dora"]) == (kind == "rslora", kind == "dora")
    with pytest.raises(model.InputError, match="a PEFT adapter; pass the whole model"):
        model.load_policy(str(final / "adapter"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_the_adapter(folders, loaded, family, kind, tmp_path):
    """peft on transformers' model gives our log-probs but for rounding, saves what we saved under the same names,
    and its own all-linear names the same layers."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto = AutoModelForCausalLM if family in TEXT_ONLY else AutoModelForImageTextToText
    loaded(family)
    policy, processor, final = grow(folders[family], tmp_path, *KINDS[kind])
    base = auto.from_pretrained(folders[family], dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, final / "adapter").eval()
    for images in (0,) if family in TEXT_ONLY else (0, 1, 2):
        group = make_group(policy, processor, images, [5, 3], seed=images)
        ours, *_ = policy(policy.pack([group]))
        plain = type("Oracle", (), dict(hf=theirs.get_base_model(), never_sampled=policy.never_sampled))
        for n, expected in enumerate(transformers_logps(plain, group, 1.0)):
            close_to_scale(ours[n, :len(expected)], expected)
    theirs.save_pretrained(tmp_path / "theirs")
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "theirs", final / "adapter"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    fresh = auto.from_pretrained(folders[family], dtype=torch.float32)
    config = peft.LoraConfig(r=4, target_modules="all-linear")
    names = {n for n, m in peft.get_peft_model(fresh, config).get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert names == set(policy.hf.adapter_config["target_modules"])


def test_bf16_export(folders, tmp_path):
    """Merged in fp32, written in bf16; the adapter is written in fp32, as it was trained."""
    _, _, final = grow(folders["qwen2_5_vl"], tmp_path, "--dtype", "bfloat16")
    assert {t.dtype for t in load_file(final / "model.safetensors").values()} == {torch.bfloat16}
    assert {t.dtype for t in load_file(final / "adapter" / "adapter_model.safetensors").values()} == {torch.float32}


# --- 4-bit base weights


@pytest.mark.slow
def test_four_bit_base(folders, launch, task, tmp_path):  # noqa: F811
    """QLoRA: a folder that transformers wrote with bitsandbytes' 4-bit weights trains with LoRA (ratio 1, KL 0 at the
    start) and is refused without; `final/` is merged with the decoded weights, unquantized, and computes the same."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    source, small = folders["qwen2_5_vl"], tmp_path / "small"
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    shutil.copytree(source, small)
    hf = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32, quantization_config=config,
                                                     device_map="cpu")
    hf.save_pretrained(small)
    with pytest.raises(model.InputError, match="quantized weights only bitsandbytes' 4-bit .* with --lora_r"):
        model.load_policy(str(small))
    for kind in ("lora", "dora"):
        targets = ["all-linear"] if kind == "lora" else ["q_proj"]  # what has no adapter is decoded as well
        policy, processor, final = grow(small, tmp_path, *KINDS[kind], "--lora_target_modules", *targets)
        assert policy.hf.model.language_model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
        assert "quantization_config" not in json.loads((final / "config.json").read_text())
        plain, _ = model.load_policy(str(final))
        close_to_scale(logps_of(plain, processor), logps_of(policy, processor))
    extra = ["--model_name_or_path", small, "--lora_r", 4, "--beta", 0.1, "--max_steps", 2, "--save_steps", 1]
    metrics, _ = launch("train_grpo", *grpo(task, *extra, "--per_device_train_batch_size", 12, "--learning_rate", 0.01))
    assert metrics[0]["ratio"] == 1 and metrics[0]["kl"] == 0 and metrics[1]["kl"] > 0


# --- from the command line


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_dpo", "train_grpo"])
def test_scripts_with_lora(tmp_path, task, name):  # noqa: F811
    """Each script from the command line, built-in model: adapters are trained, and both folders are left."""
    output = script(f"{name}.py", "--lora_r", 4, "--model_name_or_path", "tiny", "--dataset", task / "pairs.jsonl", "--image_root", task,
                    "--max_steps", 1, "--per_device_train_batch_size", 8, "--output_dir", "run", cwd=tmp_path)
    assert "LoRA: 27,648 parameters in adapters of 26 linear layers" in output and "saved run/final" in output
    assert (tmp_path / "run" / "final" / "adapter" / "adapter_config.json").is_file()


VLLM = """
import json, sys
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
text, answers = open("prompt").read(), {}
for name, path, lora in (("base", sys.argv[1], None), ("adapter", sys.argv[1], LoRARequest("it", 1, "final/adapter")),
                         ("final", "final", None)):
    engine = LLM(path, dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=4, gpu_memory_utilization=0.3,
                 limit_mm_per_prompt={"image": 1}, enable_lora=lora is not None, max_lora_rank=8)
    asked = [{"prompt": text, "multi_modal_data": {"image": Image.open(f"{i}.png")}} for i in range(4)]
    outputs = engine.generate(asked, SamplingParams(temperature=0, max_tokens=12, logprobs=0), use_tqdm=False, lora_request=lora)
    tokens = [o.outputs[0] for o in outputs]
    answers[name] = ([list(t.token_ids) for t in tokens],
                     [[lp[i].logprob for i, lp in zip(t.token_ids, t.logprobs)] for t in tokens])
    del engine
json.dump(answers, open("answers.json", "w"))
"""


@pytest.mark.slow
@pytest.mark.skipif("FLATPO_VLLM_PYTHON" not in os.environ, reason="FLATPO_VLLM_PYTHON names no Python with vLLM")
def test_vllm_loads_adapter_and_merged_model(folders, tmp_path):
    """vLLM over the start with final/adapter, and over final/, gives our greedy ids and log-probs: layer names, scale and
    merge as it reads them, not as its rules were read."""
    start, rows = folders["qwen2_5_vl"], [make_row(1, i, size=(48, 48)) for i in range(4)]
    policy, processor = adapted(start, "--freeze_vision_tower")
    for p in policy.parameters():
        p.data *= 4 if p.requires_grad else 1  # enough to change the greedy ids
    model.export(policy, tmp_path / "final")
    for i, row in enumerate(rows):
        row["images"][0].save(tmp_path / f"{i}.png")
    text = processor.apply_chat_template(data.to_messages(rows[0]), tokenize=False, add_generation_prompt=True)
    (tmp_path / "prompt").write_text(text)
    run(os.environ["FLATPO_VLLM_PYTHON"], "-c", VLLM, start, cwd=tmp_path, timeout=1800, env=dict(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind"))
    answers = json.loads((tmp_path / "answers.json").read_text())
    for name, (ids, logps) in answers.items():
        with adapter_off(policy) if name == "base" else contextlib.nullcontext():
            policy.never_sampled = policy.never_sampled[:0]  # vLLM normalises over them too
            prompts = [data.encode_prompt(policy, processor, row) for row in rows]
            ours = rollout.sample(policy, prompts, [0] * 4, num_generations=1, max_completion_length=12, temperature=0, seed=0)
        assert [row[mask].tolist() for row, mask in zip(ours.completion_ids, ours.completion_mask)] == ids, name
        for row, mask, theirs in zip(ours.sampling_logps, ours.completion_mask, logps):
            torch.testing.assert_close(row[mask], torch.tensor(theirs), atol=2e-5, rtol=0)
    assert answers["base"][0] != answers["adapter"][0]

"""Is flatpo right on this device? The checks of benchmarks/gpu.py, and the models and prompts of both files.

A section is a generator of lines, which gpu.py writes: a dict of "what" it is about, its values, and in
"limits" the largest values that are right. Weights are random, models tiny: in fp32 they agree with an oracle
to rounding, in bf16 within the oracle's own noise, its gap to fp32.
"""

import functools
import inspect
import json
import shutil
import statistics
import tempfile
from pathlib import Path
from types import SimpleNamespace

import bench
import torch
import transformers
from safetensors.torch import load_file

import data
import model
import rollout
import train_grpo
from layers.lora import adapter_off, add_lora

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if CUDA else "cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

ROPE = dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 6, 6])
IDS = dict(image_token_id=5, video_token_id=6, vision_start_token_id=3, vision_end_token_id=4)
TEXT = dict(vocab_size=400, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.1)
TOWER = dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=4, patch_size=8, out_hidden_size=128)
TINY = {  # heads of 32: FlexAttention refuses those below 16 on a GPU
    "Qwen2_5_VL": dict(text=TEXT | dict(rope_parameters=ROPE), tie_word_embeddings=True, **IDS,
                       tower=TOWER | dict(window_size=32, fullatt_block_indexes=[1])),
    "Qwen3VLMoe": dict(text=TEXT | dict(head_dim=32, rope_parameters=ROPE | dict(mrope_interleaved=True),
                                        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64),
                       tower=TOWER | dict(num_position_embeddings=36, deepstack_visual_indexes=[0]), **IDS),
    "Gemma3": dict(text=TEXT | dict(head_dim=32, query_pre_attn_scalar=32, sliding_window=8,
                                    layer_types=["sliding_attention", "full_attention"]),
                   tower=dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, image_size=32,
                              num_attention_heads=2, patch_size=8, vision_use_head=False),
                   mm_tokens_per_image=16, boi_token_index=3, eoi_token_index=4, image_token_index=5)}
BIG = TINY["Qwen2_5_VL"] | (bench.QWEN_3B if CUDA else {})


def timed(function, repeats: int = 1) -> float:
    """Median seconds, until the GPU has done what was asked of it."""
    return statistics.median(bench.seconds(function) for _ in range(repeats))


def measure(function, repeats: int = 1) -> tuple[float, float]:
    """The same, and the most GB of the GPU in use meanwhile."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    return timed(function, repeats), torch.cuda.max_memory_allocated() / 1e9


def relative(a, b) -> float:
    """|a - b| / |b|"""
    a, b = a.detach().float(), b.detach().float()
    return float((a - b).norm() / b.norm())


def make_model(family: str, text: dict, tower: dict, dtype=torch.float32, **config):
    """transformers' model with random weights, drawn on the device, the same in every call; parameters are
    then rounded to dtype, as by from_pretrained, and buffers stay in fp32."""
    text = dict(bos_token_id=None, eos_token_id=1, pad_token_id=0) | text
    config = getattr(transformers, f"{family}Config")(text_config=text, vision_config=tower, **config)
    torch.manual_seed(0)
    with DEVICE:
        hf = getattr(transformers, f"{family}ForConditionalGeneration")(config)
        for p in hf.parameters():
            if p.dim() == 2 and not p.any():  # Gemma's projector: no picture would matter
                torch.nn.init.normal_(p, std=0.1)
            p.data = p.data.to(dtype)
    hf.generation_config.eos_token_id = 1
    return hf


def make_policy(hf, dtype):
    """A policy with a tokenizer in name only: a processor would depend on torchvision."""
    words = hf.config.get_text_config().vocab_size
    tokenizer = type("Tokenizer", (), dict(eos_token_id=1, pad_token_id=0, __len__=lambda _: words))()
    return model.Policy(hf, tokenizer, dtype).train().to(DEVICE)


def make_prompt(policy, seed: int, images: int = 1, text: int = 17, patches: tuple = (4, 6)):
    """A prompt of pictures of so many patches and of so many tokens of text."""
    draws, config, (h, w) = torch.Generator().manual_seed(seed), policy.hf.config, patches
    gemma = config.model_type == "gemma3"
    picture = [3, *[5] * (16 if gemma else h * w // 4), 4]
    tokens = torch.tensor(picture * images + torch.randint(20, 390, (text,), generator=draws).tolist())
    size = (images, 3, 32, 32) if gemma else (images * h * w, 6 * config.vision_config.patch_size**2)
    pixels = {"pixel_values": torch.randn(size, generator=draws)} if images else {}
    if images and not gemma:
        pixels["image_grid_thw"] = torch.tensor([[1, h, w]] * images)
    positions = policy.prompt_positions(tokens, {"mm_token_type_ids": (tokens == 5).long()[None]}, pixels)
    return model.Prompt(tokens, positions, pixels, {"_source": "random"}, policy.prompt_images(tokens))


@functools.cache
def big():
    """A policy of Qwen2.5-VL-3B's shapes (on a CPU tiny ones), with recomputation, and prompts of 256 tokens
    of a picture and 256 of text."""
    policy = make_policy(make_model("Qwen2_5_VL", **BIG), torch.bfloat16)
    enable = getattr(policy.hf, "activation_checkpointing_enable", policy.hf.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    count, text, side = (64, 254, 32) if CUDA else (4, 12, 4)
    return policy, [make_prompt(policy, i, 1, text, (side, side)) for i in range(count)]


def answered(prompts, *lengths) -> list:
    """Groups: each prompt with an answer of each of these lengths."""
    answers = [20 + (7 + n) * torch.arange(n) % 370 for n in lengths]
    return [(prompt, answers) for prompt in prompts]


def sampled_groups(prompts, sampled) -> list:
    """Groups: each prompt with its completions of a rollout."""
    ids = [ids[mask] for ids, mask in zip(sampled.completion_ids, sampled.completion_mask)]
    G = len(ids) // len(prompts)
    return [(prompt, ids[i * G:(i + 1) * G]) for i, prompt in enumerate(prompts)]


def on_device(policy, groups) -> dict:
    """A micro-batch as the scripts make it."""
    return model.to_device(policy.pack(groups), DEVICE)


def sample(policy, prompts, tokens: int, G: int = 8, **options):
    """`rollout.sample` at temperature 1."""
    return rollout.sample(policy, prompts, list(range(len(prompts))), num_generations=G, temperature=1.0,
                          seed=0, max_completion_length=tokens, **options)


def graphs_of(policy) -> set:
    """The CUDA graphs that the sampler keeps."""
    return {graph for steps in policy.kept.values() for graph in steps.graphs.values() if graph is not None}


def flex():
    """Attention over group rows as `model.group_attention` runs it, against dense attention in fp32."""
    dtype, limit, heads, kv_heads, D = torch.float32, 1e-4, 4, 2, 32
    cases = [(1, 60, False)]  # rows, their length, whether with gradients
    if CUDA:
        dtype, limit, heads, kv_heads, D = torch.bfloat16, 0.02, 16, 2, 128
        cases = [(1, 100, False), (1, 100, True), (4, 300, False), (1, 700, True), (1, 4000, True)]
    for B, S, grad in cases:
        # half of each row is a prompt, the rest two completions
        segments = (torch.arange(S, device=DEVICE) * 4 // S - 1).clamp(min=0).repeat(B, 1)
        groups = torch.zeros_like(segments)
        q, k, v = (torch.randn(B, n, S, D, device=DEVICE).to(dtype).requires_grad_(grad)
                   for n in (heads, kv_heads, kv_heads))

        def with_gradients(out):
            return (out, *torch.autograd.grad(out.square().sum(), (q, k, v))) if grad else (out,)

        def ours():
            mask = model.group_block_mask(segments, groups)
            out, _ = model.group_attention(None, q, k, v, mask, scaling=D**-0.5)
            return with_gradients(out.transpose(1, 2).float())

        def dense():
            mask = model.group_attention_mask(segments, groups)
            return with_gradients(torch.nn.functional.scaled_dot_product_attention(
                q.float(), k.float(), v.float(), mask, enable_gqa=True))

        with torch.set_grad_enabled(grad):
            first, again = timed(ours), timed(ours, 3)
            apart = max(relative(a, b) for a, b in zip(ours(), dense()))
        yield dict(what=f"{B} of {S}{', gradients' if grad else ''}", compile_s=first - again,
                   again_ms=1e3 * again, apart=apart, limits={"apart": limit})


def own_logps(hf, policy, groups):
    """Log-probs of all answers' tokens by transformers' forward, one answer behind its prompt at a time."""
    known, found = set(inspect.signature(hf.forward).parameters), []
    for prompt, ids in ((prompt, ids) for prompt, answers in groups for ids in answers):
        tokens = model.to_device(torch.cat([prompt.tokens, ids])[None], DEVICE)
        inputs = {name: (tokens == 5).int() for name in known & {"mm_token_type_ids", "token_type_ids"}}
        inputs |= model.to_device(prompt.pixels, DEVICE)
        logits = hf(input_ids=tokens, **inputs).logits[0, len(prompt.tokens) - 1:-1].float()
        logps = logits.index_fill(-1, policy.never_sampled, -1e30).log_softmax(-1)
        found.append(logps.gather(-1, ids.to(DEVICE)[:, None])[:, 0])
    return torch.cat(found)


def with_gradient(logps, parameters):
    """Log-probs, and the gradient of a weighted sum of them in one vector."""
    weighted = torch.linspace(-1, 1, len(logps), device=DEVICE) @ logps
    found = torch.autograd.grad(weighted, list(parameters), materialize_grads=True)
    return logps.detach(), torch.cat([x.flatten().float() for x in found])


def family(name: str):
    """Packed rows against transformers' forward: log-probs and gradients, in fp32 and in bf16."""
    exact = None
    for dtype in DTYPES:
        policy = make_policy(make_model(name, **TINY[name]), DTYPES[dtype])
        hf = make_model(name, dtype=DTYPES[dtype], **TINY[name])
        groups = answered([make_prompt(policy, 0)], 100, 60, 33)
        groups += answered([make_prompt(policy, 1, images=2, patches=(4, 8))], 70, 45)
        batch = on_device(policy, groups)
        ours = with_gradient(policy(batch)[0][batch["completion_mask"]], policy.parameters())
        theirs = with_gradient(own_logps(hf, policy, groups), hf.parameters())
        exact = exact or theirs
        gap, noise = (ours[0] - theirs[0]).abs(), float((theirs[0] - exact[0]).abs().mean())
        gradient_noise = relative(theirs[1], exact[1])
        limits = {"logp_max": 2e-4, "gradient": 1e-3}
        if dtype == "bfloat16":
            limits = {"logp_mean": 2 * noise, "gradient": 2 * gradient_noise}
        yield dict(what=dtype, limits=limits, logp_max=gap.max(), logp_mean=gap.mean(), noise_mean=noise,
                   gradient=relative(ours[1], theirs[1]), gradient_noise=gradient_noise)


def trainer_logps(policy, prompts, sampled):
    """What the trainer makes of a rollout's tokens, (N, T)."""
    with torch.no_grad():
        return policy(on_device(policy, sampled_groups(prompts, sampled)))[0].cpu()


def sampler():
    """The sampler against the trainer; without CUDA graphs, with them, and with those of an earlier call."""
    rollout.BUCKETS["cuda"], rollout.PREFIX["cuda"] = (4, 16, 2), 64  # rows end, prompts wait
    exact = None
    for dtype in DTYPES:
        policy = make_policy(make_model("Qwen2_5_VL", **TINY["Qwen2_5_VL"]), DTYPES[dtype])
        policy.eos_ids, found, graphs = list(range(100, 108)), [], []
        prompts = [make_prompt(policy, i, images=i % 3, text=9 + 5 * i) for i in range(6)]
        for captures in (False, True, True):
            rollout.CUDA_GRAPHS = captures
            found.append(sample(policy, prompts, 40, G=4, rollout_tokens=4 * (2 * 64 + 4 * 40)))
            graphs.append(graphs_of(policy))
        others = sum(not torch.equal(found[0].completion_ids, other.completion_ids) for other in found[1:])
        exact, mask = exact or policy, found[0].completion_mask
        logps = trainer_logps(policy, prompts, found[0])
        gap = (found[0].sampling_logps - logps)[mask].abs()
        noise = float((trainer_logps(exact, prompts, found[0]) - logps)[mask].abs().mean())
        limits = {"gap_max": 2e-4} if dtype == "float32" else {"gap_mean": 2 * noise}
        limits |= {"calls_with_other_tokens": 0, "captured_again": 0, "never_captured": 0}
        yield dict(what=dtype, limits=limits, gap_max=gap.max(), gap_mean=gap.mean(), noise_mean=noise,
                   calls_with_other_tokens=others, captured_again=len(graphs[2] - graphs[1]),
                   never_captured=int(CUDA and not graphs[1]), graphs=len(graphs[1]))


def lora():
    """LoRA and DoRA: the start is the base, a step moves the adapters alone, the sampler follows."""
    for dora in (False, True):
        hf = make_model("Qwen2_5_VL", **TINY["Qwen2_5_VL"])
        add_lora(hf, SimpleNamespace(
            lora_r=4, lora_alpha=8, lora_target_modules=["all-linear"], use_rslora=False, use_dora=dora,
            freeze_vision_tower=False, dtype="bfloat16", seed=0))
        policy = make_policy(hf, torch.bfloat16)
        prompts = [make_prompt(policy, i) for i in range(2)]
        batch = on_device(policy, answered(prompts, 60, 40))
        with adapter_off(policy):
            base = policy(batch)[0].detach()
        start = policy(batch)[0]
        start.sum().backward()
        adapters = [p for p in policy.parameters() if p.requires_grad]
        torch.optim.AdamW(adapters, lr=1e-2, fused=CUDA).step()
        moved = (policy(batch)[0].detach() - base).abs().max()
        with adapter_off(policy):
            off = policy(batch)[0].detach()
        sampled = sample(policy, prompts, 40, G=4)
        gap = (sampled.sampling_logps - trainer_logps(policy, prompts, sampled)).abs()
        yield dict(what="DoRA" if dora else "LoRA", moved=moved, stuck=int(moved == 0),
                   start=(start.detach() - base).abs().max(), off=(off - base).abs().max(),
                   sampler=gap[sampled.completion_mask].mean(),
                   limits={"start": 0, "off": 0, "stuck": 0, "sampler": 0.05})


def resume():
    """train_grpo.py from a checkpoint against the run that was not stopped, weights bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        data.build_tiny_vlm(work / "tiny")
        with open(work / "rows.jsonl", "w") as file:
            for row in bench.make_rows(16, 48, 0, work):
                file.write(json.dumps({key: row[key] for key in ("prompt", "images", "solution")}) + "\n")
        flags = ["--model_name_or_path", work / "tiny", "--dataset", work / "rows.jsonl", "--image_root",
                 work, "--reward_funcs", f"{bench.__file__}:reward", "--max_steps", 4, "--save_steps", 2,
                 "--per_device_train_batch_size", 32, "--learning_rate", 1e-3, "--max_completion_length", 24,
                 "--device", DEVICE.type, "--deterministic"]
        command, whole = [str(x) for x in (*flags, "--output_dir", work / "run")], work / "whole"
        train_grpo.main(command)
        (work / "run" / "final").rename(whole)
        shutil.rmtree(work / "run" / "checkpoints" / "step_4")
        (work / "run" / "status.json").unlink()  # it said that the run is done
        train_grpo.main(command)
        whole, resumed = (load_file(folder / "model.safetensors") for folder in (whole, work / "run" / "final"))
        apart = max(float((x - resumed[name]).abs().max()) for name, x in whole.items())
        yield dict(what="weights", limits={"apart": 0}, apart=apart)
    torch.use_deterministic_algorithms(False)  # which main leaves on


SECTIONS = dict(
    flex=flex, qwen=functools.partial(family, "Qwen2_5_VL"), moe=functools.partial(family, "Qwen3VLMoe"),
    gemma=functools.partial(family, "Gemma3"), sampler=sampler, lora=lora, resume=resume)

"""One script for one H100 or H200 and nine minutes: is flatpo right on a GPU, and how fast is it there?

    python benchmarks/gpu.py --out gpu.jsonl                # on the GPU
    python benchmarks/gpu.py --device cpu                   # every line of it, at tiny sizes
    python benchmarks/gpu.py --only flex,sampler            # some sections

A measurement is a JSON line, written at once; a check's also has its "limits" and "ok". Sections run in the
processes of PARTS: after a CUDA error a process is lost. One that raises writes a line with "error", and the
next goes on; what no time is left for is "skipped". Exit code 1: a check is not ok, or a section failed.
Weights are random: tiny models show what is right, Qwen2.5-VL-3B's shapes what is fast.
"""

import argparse
import functools
import inspect
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
PARTS = [("env flex qwen sampler", 230), ("decode generate", 130), ("train profile grpo mpo", 230),
         ("moe gemma resume lora", 220)]  # sections, and the seconds that their process may take
PEAKS = {  # by the card's name: dense bf16 FLOP/s and bytes per second, as specified
    "H200": (989e12, 4.8e12), "H100 80GB HBM3": (989e12, 3.35e12)}
SPEEDS = ("ms", "tok_s", "prefill_tok_s", "ms_a_step", "capture_s", "kernels_a_step", "host_waits",
          "share_of_peak", "step_s", "ratio", "peak_gb")
RUN = SimpleNamespace(out=os.devnull, started=time.time(), section="", cuda=False)  # `main` sets it

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


def judge(values: dict, limits: dict) -> bool:
    """Whether no value is above its limit; nan is above every one."""
    return all(float(values[name]) <= limit for name, limit in limits.items())


def exit_code(lines: list[dict]) -> int:
    """1 if a check is not ok, or a section failed."""
    return int(any("error" in line or line.get("ok") is False for line in lines))


def emit(what: str, limits=None, **values):
    """Write a line of the section, with numbers cut to five digits; one with limits is a check."""
    if limits:
        values |= {"limits": limits, "ok": judge(values, limits)}
    line = {"section": RUN.section, "what": what, "at": time.time() - RUN.started} | values
    line = json.loads(json.dumps(line, default=float), parse_float=lambda x: float(f"{float(x):.5g}"))
    print(json.dumps(line), flush=True)
    with open(RUN.out, "a") as file:
        file.write(json.dumps(line) + "\n")


def read_lines() -> list[dict]:
    """What all processes have written so far."""
    return [json.loads(line) for line in Path(RUN.out).read_text().splitlines()]


def print_table(lines: list[dict]):
    """A row for each check, speed and failure."""
    for line in lines:
        keys = (*line.get("limits", ()), *SPEEDS, "error", "skipped")
        numbers = [f"{key} {str(line[key])[:100]}" for key in keys if line.get(key) is not None]
        verdict = "FAILED" if exit_code([line]) else "ok" if "ok" in line else ""
        if numbers:
            print(f"{verdict:7}{line['section']:9}{line['what']:34} {', '.join(numbers)}")


# ------------------------------------------------------------------------------------------------------------
# Measuring


def timed(function, repeats: int = 1) -> float:
    """Median seconds, until the GPU has done what was asked of it."""
    return statistics.median(bench.seconds(function) for _ in range(repeats))


@functools.cache
def card() -> dict:
    """bf16 FLOP/s and bytes per second, as measured and, where PEAKS names the card, as specified."""
    n, name = (8192, torch.cuda.get_device_name()) if RUN.cuda else (128, "cpu")
    a = torch.randn(n, n, device=RUN.device).bfloat16()  # not zeros, which are faster
    source = torch.randn(4 * n * n, device=RUN.device)
    target = torch.empty_like(source)
    timed(lambda: a @ a, 3)
    flops, bandwidth = next((peaks for key, peaks in PEAKS.items() if key in name), (None, None))
    return dict(card=name, flops=flops, bandwidth=bandwidth,
                measured_flops=2 * n**3 / timed(lambda: a @ a, 8),
                measured_bandwidth=2 * source.nbytes / timed(lambda: target.copy_(source), 8))


def peak_gb(forget: bool = False):
    """The most memory in use since the peak was last forgotten."""
    if RUN.cuda and forget:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated() / 1e9 if RUN.cuda else None


def host_waits(function) -> dict:
    """How often the host waited for the GPU, and in which lines."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if RUN.cuda:
            torch.cuda.set_sync_debug_mode("warn")
        function()
        if RUN.cuda:
            torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in seen if "called a synchronizing" in str(w.message)]
    lines = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in waits)
    return dict(host_waits=len(waits), waiting=dict(lines.most_common(12)))


def kernels(function) -> dict:
    """What a call runs on the device: how many kernels, milliseconds, {the costliest: [ms, how many]}."""
    kind = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kind.CUDA if RUN.cuda else kind.CPU]) as profiler:
        timed(function)
    name = "self_device_time_total" if RUN.cuda else "self_cpu_time_total"
    found = [(getattr(event, name) / 1e3, event.count, event.key[:70]) for event in profiler.key_averages()]
    found = sorted((entry for entry in found if entry[0] > 0), reverse=True)
    return dict(kernels=sum(n for _, n, _ in found), kernel_ms=sum(ms for ms, _, _ in found),
                top={key: [ms, n] for ms, n, key in found[:12]})


def relative(a, b) -> float:
    """|a - b| / |b|"""
    return float((a.float() - b.float()).norm() / b.float().norm())


# ------------------------------------------------------------------------------------------------------------
# Models and prompts


def make_model(family: str, text: dict, tower: dict, **config):
    """transformers' model with random weights, drawn on the device, the same in every call."""
    text = dict(bos_token_id=None, eos_token_id=1, pad_token_id=0) | text
    config = getattr(transformers, f"{family}Config")(text_config=text, vision_config=tower, **config)
    torch.manual_seed(0)
    with RUN.device:
        hf = getattr(transformers, f"{family}ForConditionalGeneration")(config)
        for p in hf.parameters():
            if p.dim() == 2 and not p.any():  # Gemma's projector: no picture would matter
                torch.nn.init.normal_(p, std=0.1)
    hf.generation_config.eos_token_id = 1
    return hf


def make_policy(hf, dtype):
    """A policy with a tokenizer in name only: a processor would depend on torchvision."""
    words = hf.config.get_text_config().vocab_size
    tokenizer = type("Tokenizer", (), dict(eos_token_id=1, pad_token_id=0, __len__=lambda _: words))()
    return model.Policy(hf, tokenizer, dtype).train().to(RUN.device)


def in_dtype(hf, dtype):
    """The model with its parameters in that dtype, as from_pretrained reads them; buffers stay in fp32."""
    for p in hf.parameters():
        p.data = p.data.to(dtype)
    return hf


@functools.cache
def big():
    """Qwen2.5-VL-3B's shapes (on a CPU tiny ones) with recomputation, and prompts of 256 tokens of a picture
    and 256 of text."""
    policy = make_policy(make_model("Qwen2_5_VL", **big_config()), torch.bfloat16)
    enable = getattr(policy.hf, "activation_checkpointing_enable", policy.hf.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    count, text, side = (64, 254, 32) if RUN.cuda else (4, 12, 4)
    return policy, [make_prompt(policy, i, 1, text, (side, side)) for i in range(count)]


def big_config() -> dict:
    config = TINY["Qwen2_5_VL"] | dict(tower=TOWER | dict(patch_size=14, fullatt_block_indexes=[1]))
    return config | (bench.QWEN_3B if RUN.cuda else {})


def parameters(policy) -> tuple[int, int, int]:
    """How many the layers, the head and the tower have."""
    hf = policy.hf
    parts = hf.get_decoder().layers, hf.get_output_embeddings(), hf.get_encoder(modality="image")
    return tuple(sum(p.numel() for p in part.parameters()) for part in parts)


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
    return model.to_device(policy.pack(groups), RUN.device)


def sample(policy, prompts, tokens: int, G: int = 8, **options):
    """`rollout.sample` at temperature 1."""
    return rollout.sample(policy, prompts, list(range(len(prompts))), num_generations=G, temperature=1.0,
                          seed=0, max_completion_length=tokens, **options)


def graphs_of(policy) -> set:
    """The CUDA graphs that the sampler keeps."""
    return {graph for steps in policy.kept.values() for graph in steps.graphs.values() if graph is not None}


def trainer_logps(policy, prompts, sampled):
    """What the trainer makes of a rollout's tokens, (N, T)."""
    with torch.no_grad():
        return policy(on_device(policy, sampled_groups(prompts, sampled)))[0].cpu()


# ------------------------------------------------------------------------------------------------------------
# Is it right?


def env():
    """Versions, the card and its ceilings, and what pictures cost."""
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    memory = torch.cuda.get_device_properties(0).total_memory / 1e9 if RUN.cuda else None
    emit("card", torch=torch.__version__, transformers=transformers.__version__, memory_gb=memory, **card(),
         torchvision=transformers.utils.is_torchvision_available(), cudnn=torch.backends.cudnn.version())
    floats = torch.empty(2**26 if RUN.cuda else 2**10)
    conv = torch.nn.Conv3d(3, 1280, (2, 14, 14), (2, 14, 14), bias=False).to(RUN.device, torch.bfloat16)
    patches = torch.randn(4096 if RUN.cuda else 16, 3, 2, 14, 14, device=RUN.device).bfloat16()
    linear = functools.partial(torch.nn.functional.linear, patches.flatten(1), conv.weight.flatten(1))
    processor = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2)
    picture = Image.effect_noise((448, 448) if RUN.cuda else (56, 56), 50).convert("RGB")
    emit("pictures", to_device_gb_s=floats.nbytes / 1e9 / timed(lambda: floats.to(RUN.device), 3),
         patches_as_conv_ms=1e3 * timed(lambda: conv(patches), 2),
         patches_as_linear_ms=1e3 * timed(linear, 3),
         processor_ms=1e3 * timed(lambda: processor(images=[picture], return_tensors="pt"), 3))
    k, t = torch.arange(50)[:, None], torch.arange(40)
    here, there = (rollout.keyed_uniform(7, k.to(at), k.to(at), t.to(at)) for at in ("cpu", RUN.device))
    emit("uniforms of CPU and device", {"apart": 0}, apart=(here - there.cpu()).abs().max())


def flex():
    """Attention over group rows as `model.group_attention` runs it, against dense attention in fp32."""
    cases = [  # rows, their length, heads, key heads, dtype, whether with gradients
        (1, 100, 16, 2, "bfloat16", False), (1, 100, 16, 2, "bfloat16", True),
        (4, 300, 16, 2, "bfloat16", False), (1, 700, 16, 2, "bfloat16", True),
        (1, 4000, 16, 2, "bfloat16", True)]
    for B, S, heads, kv, dtype, grad in cases if RUN.cuda else [(1, 60, 4, 2, "float32", False)]:
        # half of each row is a prompt, the rest two completions
        segments = (torch.arange(S, device=RUN.device) * 4 // S - 1).clamp(min=0).repeat(B, 1)
        groups, D = torch.zeros_like(segments), 128 if RUN.cuda else 32
        q, k, v = (torch.randn(B, n, S, D, device=RUN.device).to(getattr(torch, dtype)).requires_grad_(grad)
                   for n in (heads, kv, kv))

        def with_gradients(out):
            return (out, *torch.autograd.grad(out.square().sum(), (q, k, v))) if grad else (out,)

        def ours():
            mask = model.group_block_mask(segments, groups)
            out, _ = model.group_attention(None, q, k, v, mask, scaling=D**-0.5)
            return with_gradients(out.transpose(1, 2).float())

        with torch.set_grad_enabled(grad):
            first, again = timed(ours), timed(ours, 3)
            mask = model.group_attention_mask(segments, groups)
            dense = with_gradients(torch.nn.functional.scaled_dot_product_attention(
                q.float(), k.float(), v.float(), mask, enable_gqa=True))
            apart = max(relative(a.detach(), b.detach()) for a, b in zip(ours(), dense))
        emit(f"{B} of {S}, {dtype}{', gradients' if grad else ''}", compile_s=first - again, apart=apart,
             again_ms=1e3 * again, limits={"apart": 1e-4 if dtype == "float32" else 0.02})


def own_logps(hf, policy, groups):
    """Log-probs of all answers' tokens by transformers' forward, one answer behind its prompt at a time."""
    known, found = set(inspect.signature(hf.forward).parameters), []
    for prompt, ids in ((prompt, ids) for prompt, answers in groups for ids in answers):
        tokens = model.to_device(torch.cat([prompt.tokens, ids])[None], RUN.device)
        inputs = {name: (tokens == 5).int() for name in known & {"mm_token_type_ids", "token_type_ids"}}
        inputs |= model.to_device(prompt.pixels, RUN.device)
        logits = hf(input_ids=tokens, **inputs).logits[0, len(prompt.tokens) - 1:-1].float()
        logps = logits.index_fill(-1, policy.never_sampled, -1e30).log_softmax(-1)
        found.append(logps.gather(-1, ids.to(RUN.device)[:, None])[:, 0])
    return torch.cat(found)


def family(name: str):
    """Packed rows against transformers' forward: fp32, and bf16 beside bf16's own noise, its gap to fp32."""
    exact = None
    for dtype in ("float32", "bfloat16"):
        policy = make_policy(make_model(name, **TINY[name]), getattr(torch, dtype))
        hf = in_dtype(make_model(name, **TINY[name]), getattr(torch, dtype))
        groups = answered([make_prompt(policy, 0)], 100, 60, 33)
        groups += answered([make_prompt(policy, 1, images=2, patches=(4, 8))], 70, 45)
        batch = on_device(policy, groups)

        def with_gradient(logps, parameters):
            weighted = torch.linspace(-1, 1, len(logps), device=RUN.device) @ logps
            found = torch.autograd.grad(weighted, list(parameters), materialize_grads=True)
            return logps.detach(), torch.cat([x.flatten().float() for x in found])

        ours = with_gradient(policy(batch)[0][batch["completion_mask"]], policy.parameters())
        theirs = with_gradient(own_logps(hf, policy, groups), hf.parameters())
        exact = exact or theirs
        gap, noise = (ours[0] - theirs[0]).abs(), float((theirs[0] - exact[0]).abs().mean())
        gradient_noise = relative(theirs[1], exact[1])
        limits = {"logp_max": 2e-4, "gradient": 1e-3}
        if dtype == "bfloat16":
            limits = {"logp_mean": 2 * noise, "gradient": 2 * gradient_noise}
        emit(dtype, limits, logp_max=gap.max(), logp_mean=gap.mean(), noise_mean=noise,
             gradient=relative(ours[1], theirs[1]), gradient_noise=gradient_noise)


def sampler():
    """The sampler against the trainer; without CUDA graphs, with them, and with those of an earlier call."""
    rollout.BUCKETS["cuda"], rollout.PREFIX["cuda"] = (4, 16, 2), 64  # rows end, prompts wait
    exact = None
    for dtype in ("float32", "bfloat16"):
        policy = make_policy(make_model("Qwen2_5_VL", **TINY["Qwen2_5_VL"]), getattr(torch, dtype))
        policy.eos_ids, found, graphs = list(range(100, 108)), [], []
        prompts = [make_prompt(policy, i, images=i % 3, text=9 + 5 * i) for i in range(6)]
        for rollout.CUDA_GRAPHS in (False, True, True):
            found.append(sample(policy, prompts, 40, G=4, rollout_tokens=4 * (2 * 64 + 4 * 40)))
            graphs.append(graphs_of(policy))
        others = sum(not torch.equal(found[0].completion_ids, other.completion_ids) for other in found[1:])
        emit(f"graphs, {dtype}", {"calls_with_other_tokens": 0, "captured_again": 0, "never_captured": 0},
             calls_with_other_tokens=others, graphs=len(graphs[1]), captured_again=len(graphs[2] - graphs[1]),
             never_captured=int(RUN.cuda and not graphs[1]))
        exact, mask = exact or policy, found[0].completion_mask
        logps = trainer_logps(policy, prompts, found[0])
        gap = (found[0].sampling_logps - logps)[mask].abs()
        noise = float((trainer_logps(exact, prompts, found[0]) - logps)[mask].abs().mean())  # of bf16
        emit(f"against the trainer, {dtype}", gap_max=gap.max(), gap_mean=gap.mean(), noise_mean=noise,
             limits={"gap_max": 2e-4} if exact is policy else {"gap_mean": 2 * noise})


def lora():
    """LoRA and DoRA: the start is the base, a step moves the adapters alone, the sampler follows."""
    for dora in (False, True):
        hf = make_model("Qwen2_5_VL", **TINY["Qwen2_5_VL"])
        model.add_lora(hf, SimpleNamespace(
            lora_r=4, lora_alpha=8, lora_target_modules=["all-linear"], use_rslora=False, use_dora=dora,
            freeze_vision_tower=False, dtype="bfloat16", seed=0))
        policy = make_policy(hf, torch.bfloat16)
        prompts = [make_prompt(policy, i) for i in range(2)]
        batch = on_device(policy, answered(prompts, 60, 40))
        with model.adapter_off(policy):
            base = policy(batch)[0].detach()
        start = policy(batch)[0]
        start.sum().backward()
        adapters = [p for p in policy.parameters() if p.requires_grad]
        torch.optim.AdamW(adapters, lr=1e-2, fused=RUN.cuda).step()
        moved = (policy(batch)[0].detach() - base).abs().max()
        with model.adapter_off(policy):
            off = policy(batch)[0].detach()
        sampled = sample(policy, prompts, 40, G=4)
        gap = (sampled.sampling_logps - trainer_logps(policy, prompts, sampled)).abs()
        gap = gap[sampled.completion_mask]
        emit("DoRA" if dora else "LoRA", {"start": 0, "off": 0, "stuck": 0, "sampler": 0.05}, moved=moved,
             start=(start.detach() - base).abs().max(), off=(off - base).abs().max(), stuck=int(moved == 0),
             sampler=gap.mean())


def resume():
    """train_grpo.py from a checkpoint against the run that was not stopped, weights bit for bit."""
    import train_grpo
    from safetensors.torch import load_file
    known = "--deterministic" in train_grpo.build_parser().format_help()
    modes = [[]] if RUN.cuda and known else []  # a GPU's usual kernels promise nothing: how far off?
    modes += [["--deterministic"] if known else []]  # last: main leaves it on
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model.build_tiny_vlm(work / "tiny")
        with open(work / "rows.jsonl", "w") as file:
            for i, row in enumerate(data.shapes_rows(16, 0, "train")):
                row["images"][0].save(work / f"{i}.png")
                row = dict(prompt=row["prompt"], images=[f"{i}.png"], solution=row["solution"])
                file.write(json.dumps(row) + "\n")
        for mode in modes:
            what = " ".join(mode) or "plain"
            runs = [work / what / "whole", work / what / "resumed"]
            flags = ["--model_name_or_path", work / "tiny", "--dataset", work / "rows.jsonl", "--image_root",
                     work, "--max_steps", 4, "--save_steps", 2, "--per_device_train_batch_size", 32,
                     "--learning_rate", 1e-3, "--max_completion_length", 24, "--device", RUN.device.type,
                     "--reward_funcs", f"{bench.__file__}:reward", *mode]
            for run, more in zip(runs, ([], ["--resume", runs[0] / "checkpoints" / "step_2"])):
                train_grpo.main([str(x) for x in (*flags, "--output_dir", run, *more)])
            whole, resumed = (load_file(run / "final" / "model.safetensors") for run in runs)
            apart = max(float((x - resumed[name]).abs().max()) for name, x in whole.items())
            emit(what, {"apart": 0} if mode or not RUN.cuda else None, apart=apart)
    torch.use_deterministic_algorithms(False)


# ------------------------------------------------------------------------------------------------------------
# How fast is it?


def decode():
    """Tokens per second of the sampler, whose first call captures the graphs that the second replays."""
    policy, prompts = big()
    (layers, head, _), text = parameters(policy), policy.hf.config.text_config
    T, S = 256 if RUN.cuda else 6, len(prompts[0].tokens)
    head_size = text.hidden_size // text.num_attention_heads
    kv = 4 * text.num_hidden_layers * text.num_key_value_heads * head_size  # bytes of a token
    emit("first prefill: compiles", compile_s=timed(lambda: sample(policy, prompts[:2], 1)))
    for P in (8, 32, 64) if RUN.cuda else (2, 4):
        seconds = {}
        for call in ("first", "second"):
            peak_gb(forget=True)
            seconds[call] = timed(lambda: sample(policy, prompts[:P], T))
            prefill = timed(lambda: sample(policy, prompts[:P], 1))
            a_step = (seconds[call] - prefill) / (T - 1)
            bandwidth = (2 * (layers + head) + kv * P * (S + 8 * T / 2)) / a_step  # what a step must read
            emit(f"{8 * P} rows, {call} call", tok_s=8 * P / a_step, ms_a_step=1e3 * a_step,
                 prefill_tok_s=P * S / prefill, peak_gb=peak_gb(),
                 share_of_bandwidth=bandwidth / card()["measured_bandwidth"])
        emit(f"{8 * P} rows: what captures took", graphs=len(graphs_of(policy)),
             capture_s=seconds["first"] - seconds["second"])


def generate():
    """transformers' generate beside the sampler, in turns."""
    policy, prompts = big()
    hf = in_dtype(make_model("Qwen2_5_VL", **big_config()), torch.bfloat16).eval()
    P, T = (8, 128) if RUN.cuda else (2, 4)
    inputs = model.to_device(model.cat_pixels(prompts[:P]), RUN.device)
    inputs["input_ids"] = torch.stack([prompt.tokens for prompt in prompts[:P]]).to(RUN.device)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == 5).long()
    options = dict(do_sample=True, top_k=0, num_return_sequences=8, min_new_tokens=T, max_new_tokens=T)
    medians = bench.alternate({
        "theirs": lambda _: timed(lambda: hf.generate(**inputs, **options)),
        "ours": lambda _: timed(lambda: sample(policy, prompts[:P], T))}, repeats=2)
    emit(f"{8 * P} rows, {T} tokens", ratio=medians["theirs"] / medians["ours"],
         tok_s=8 * P * T / medians["ours"], theirs_tok_s=8 * P * T / medians["theirs"])


def grpo_pass(policy, groups):
    """Forward and backward of a micro-batch, as in train_grpo.py."""
    batch = on_device(policy, groups)
    logps, entropies, _ = policy(batch)
    advantages, mask = torch.linspace(-1, 1, len(logps), device=RUN.device), batch["completion_mask"]
    loss, _ = losses.policy_loss(logps, logps.detach(), advantages, mask, loss_type="grpo")
    (loss / 512).backward()


@functools.cache
def mpo_flags():
    """train_dpo.py's flags for MPO; no file that they name is read."""
    return train_dpo.parse_args(["--algo", "mpo", "--model_name_or_path", "-", "--dataset", "-"])


def mpo_pass(policy, groups):
    """The same as in train_dpo.py, with a reference's log-probs as if its cache had them."""
    zeros = SimpleNamespace(logps=lambda _, batch: torch.zeros(batch["logit_index"].shape, device=RUN.device))
    args, state = mpo_flags(), {"bco_shift": 0.0}
    terms, _ = train_dpo.score_groups(args, policy, groups, {"ref": zeros}, state)
    loss = sum(weight * terms[name][0] for name, weight in zip(args.loss_type, args.loss_weights))
    (loss / 256).backward()


def train():
    """Micro-batches: milliseconds, and their useful FLOPs (no recomputation, no attention) of the peak."""
    policy, prompts = big()
    layers, head, tower = parameters(policy)
    T, S, patches = 256 if RUN.cuda else 6, len(prompts[0].tokens), len(prompts[0].pixels["pixel_values"])
    for count, G in ((1, 8), (4, 8), (2, 2), (8, 2)) if RUN.cuda else ((1, 8), (2, 2)):
        groups, one_pass = answered(prompts[:count], *[T] * G), grpo_pass if G == 8 else mpo_pass
        first = timed(lambda: one_pass(policy, groups))
        peak_gb(forget=True)
        seconds, tokens = timed(lambda: one_pass(policy, groups), 3), count * (S + G * T)
        flops = 6 * (layers * tokens + head * count * G * T + tower * count * patches) / seconds
        emit(f"{count} x {G}, {tokens} tokens", ms=1e3 * seconds, tok_s=tokens / seconds, peak_gb=peak_gb(),
             compile_s=first - seconds, share_of_measured_peak=flops / card()["measured_flops"],
             share_of_peak=flops / card()["flops"] if card()["flops"] else None)


def profile():
    """Kernels, and waits of the host: of a micro-batch, and of a rollout whose graphs are there."""
    policy, prompts = big()
    T, groups = (33, answered(prompts[:1], *[256] * 8)) if RUN.cuda else (5, answered(prompts[:1], 6, 6))
    counts = []
    for what, function in (("micro-batch", lambda: grpo_pass(policy, groups)),
                           ("prefill", lambda: sample(policy, prompts[:8], 1)),
                           (f"prefill, {T - 1} steps", lambda: sample(policy, prompts[:8], T))):
        timed(function, 3)
        found = kernels(function)
        counts.append(found["kernels"])
        emit(what, **found, **host_waits(function))
    emit("a step", kernels_a_step=(counts[2] - counts[1]) / (T - 1))
    policy.zero_grad(set_to_none=True)


@functools.cache
def optimizer():
    """AdamW, after the preflight that a run on a GPU begins with: it measures what the sampler may keep."""
    policy, prompts = big()
    policy.kept.clear(), policy.copies.clear(), peak_gb(forget=True)
    model.preflight(policy, answered(prompts[:4], *[427 if RUN.cuda else 6] * 8), 1.0, 0, True)
    return torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=RUN.cuda)


def update(policy, groups, one_pass, size: int):
    """Gradients of all groups, `size` at a time, and the optimizer's step."""
    for i in range(0, len(groups), size):
        one_pass(policy, groups[i:i + size])
    model.clip_grad_norm_(list(policy.parameters()), 1.0)
    optimizer().step()
    optimizer().zero_grad(set_to_none=True)


def grpo():
    """A whole GRPO step, 64 prompts x 8: answers of 427 tokens at most and 256 in the mean."""
    policy, prompts = big()
    T, found = 427 if RUN.cuda else 6, []
    lengths = bench.make_lengths(8 * len(prompts), T, seed=0)
    optimizer()
    for call in ("first", "second"):
        peak_gb(forget=True)
        with bench.scripted(lengths, eos=1):
            rollout_s = timed(lambda: found.append(sample(policy, prompts, T)))
        graphs = len(graphs_of(policy))
        update_s = timed(lambda: update(policy, sampled_groups(prompts, found[-1]), grpo_pass, 4))
        emit(f"step, {call}", step_s=rollout_s + update_s, rollout_s=rollout_s, update_s=update_s,
             graphs=graphs, kept=len(graphs_of(policy)), tok_s=sum(lengths) / rollout_s, peak_gb=peak_gb())


def mpo():
    """A whole MPO step of 256 pairs, and the reference's pass, which the first epoch adds."""
    policy, prompts = big()
    groups = answered(prompts * 4, *[256 if RUN.cuda else 6] * 2)
    tokens = sum(len(prompt.tokens) + sum(map(len, answers)) for prompt, answers in groups)
    batch = on_device(policy, groups[:8])
    optimizer(), peak_gb(forget=True)
    step_s = timed(lambda: update(policy, groups, mpo_pass, 8))
    with torch.no_grad():
        reference_s = timed(lambda: policy(batch, entropies=False), 3) * len(groups) / 8
    emit(f"step, {len(groups)} pairs", step_s=step_s, reference_s=reference_s, tok_s=tokens / step_s,
         peak_gb=peak_gb())


# ------------------------------------------------------------------------------------------------------------


SECTIONS = dict(
    env=env, flex=flex, sampler=sampler, lora=lora, resume=resume, decode=decode, generate=generate,
    train=train, profile=profile, grpo=grpo, mpo=mpo, qwen=lambda: family("Qwen2_5_VL"),
    moe=lambda: family("Qwen3VLMoe"), gemma=lambda: family("Gemma3"))


def run_part(run: SimpleNamespace, names: list[str], until: float):
    """In a process of its own: these sections, one after the other, while there is time."""
    global RUN, bench, data, losses, model, rollout, torch, train_dpo, transformers
    import bench
    import torch
    import transformers

    import data
    import losses
    import model
    import rollout
    import train_dpo
    RUN, bench.rollout = run, rollout
    RUN.device = torch.device("cuda:0" if RUN.cuda else "cpu")
    torch.backends.cudnn.allow_tf32 = False  # fp32 checks mean fp32, in convolutions too
    for RUN.section in names:
        began = time.time()
        if until - began < 10:
            emit("", skipped="no time left")
            continue
        try:
            SECTIONS[RUN.section]()
            emit("end", seconds=time.time() - began)
        except (Exception, SystemExit) as error:  # argparse exits
            frames = traceback.extract_tb(error.__traceback__)[-6:]
            emit("end", error=f"{type(error).__name__}: {str(error)[-600:]}",
                 trace=[f"{Path(frame.filename).name}:{frame.lineno} {frame.line}" for frame in frames])


def main(argv=None) -> int:
    """Run the parts one after the other, each as long as it may, and judge by the lines that they leave."""
    global RUN
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--budget", type=float, default=520, help="seconds")
    parser.add_argument("--only", help="sections, with commas between")
    parser.add_argument("--out", help="file for the lines")
    args = parser.parse_args(argv)
    RUN = SimpleNamespace(out=args.out or os.path.join(tempfile.mkdtemp(), "gpu.jsonl"), started=time.time(),
                          section="", cuda=args.device == "cuda")
    Path(RUN.out).write_text("")
    chosen = args.only.split(",") if args.only else list(SECTIONS)
    if set(chosen) - set(SECTIONS):
        parser.error(f"--only: no section {', '.join(sorted(set(chosen) - set(SECTIONS)))}")
    os.environ.update(OMP_NUM_THREADS="8" if RUN.cuda else "1", HF_HUB_OFFLINE="1")  # for the parts
    for names, most in PARTS:
        names = [name for name in names.split() if name in chosen]
        until = min(time.time() + most, RUN.started + args.budget)
        if "resume" in names:  # cuBLAS reads it once, and sections before this one use cuBLAS
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        part = multiprocessing.get_context("spawn").Process(target=run_part, args=(RUN, names, until))
        if names and until - time.time() > 20:
            part.start()
            part.join(until - time.time())
            part.kill()
            part.join()
        ended = {line["section"] for line in read_lines() if {"seconds", "error", "skipped"} & set(line)}
        for RUN.section in [name for name in names if name not in ended]:
            code = part.exitcode if part.pid else None
            emit("", **({"skipped": "no time left"} if code is None else {
                "error": f"the process ended, exit code {code} (-9: its time was over)"}))
    print_table(read_lines())
    return exit_code(read_lines())


if __name__ == "__main__":
    sys.exit(main())

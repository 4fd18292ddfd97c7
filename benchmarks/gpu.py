"""One script for one H100 or H200 and nine minutes: is flatpo right on a GPU, and how fast is it there?

    python benchmarks/gpu.py --out gpu.jsonl                # on the GPU
    python benchmarks/gpu.py --device cpu                   # every line of it, at tiny sizes
    python benchmarks/gpu.py --only flex sampler            # some sections

The checks are in gpu_checks.py; the speeds here are of Qwen2.5-VL-3B's shapes with random weights. Each line
of a section is written as JSON at once. Sections run in the processes of PARTS: a CUDA error ends a process.
One that raises leaves a line with "error", one without time "skipped". Exit code 1: an error, or not "ok".
"""

import argparse
import functools
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bench
import gpu_checks
import torch
import transformers
from gpu_checks import CUDA, DEVICE, answered, big, graphs_of, measure, on_device, sample, timed

import losses
import model
import rollout
import train_dpo

PARTS = [("env flex qwen sampler", 230), ("decode generate", 130), ("train profile grpo mpo", 230),
         ("moe gemma resume lora", 220)]  # sections, and the seconds that their process may take
PEAK = 989e12  # dense bf16 FLOP/s of an H100 SXM and an H200, as specified
HEADLINES = dict(flex="again_ms", decode="tok_s", generate="ratio", train="share_of_peak", grpo="step_s",
                 mpo="step_s", profile="host_waits")  # of a section, in the table
MPO = train_dpo.parse_args(["--algo", "mpo", "--model_name_or_path", "-", "--dataset", "-"])  # reads no file
RUN = SimpleNamespace(out=os.devnull, started=time.time(), section="")  # `main` sets it


def exit_code(lines: list[dict]) -> int:
    """1 if a check is not ok, or a section failed."""
    return int(any("error" in line or line.get("ok") is False for line in lines))


def emit(what: str, limits=None, **values):
    """Write a line of the section. One with limits is a check: not ok if a value is nan or above."""
    if limits:
        ok = all(float(values[name]) <= limit for name, limit in limits.items())
        values |= {"limits": limits, "ok": ok}
    line = {"section": RUN.section, "what": what, "at": round(time.time() - RUN.started, 1)} | values
    line = json.dumps(line, default=float)  # of tensors
    print(line, flush=True)
    with open(RUN.out, "a") as file:
        file.write(line + "\n")


def read_lines() -> list[dict]:
    """What all processes have written so far."""
    return [json.loads(line) for line in Path(RUN.out).read_text().splitlines()]


def print_table(lines: list[dict]):
    """A row for each section: how it ended, what is wrong, and its headline of each measurement."""
    for section in dict.fromkeys(line["section"] for line in lines):
        own, key = [line for line in lines if line["section"] == section], HEADLINES.get(section)
        wrong = [line.get("error", line["what"]).split("\n")[-1] for line in own if exit_code([line])]
        verdict = "FAILED" if wrong else "skipped" if any("skipped" in line for line in own) else "ok"
        values = [f"{line[key]:.4g}" for line in own if key in line]
        print(f"{verdict:6} {section:9}{'; '.join(wrong)} {key if values else ''} {' '.join(values)}")


@functools.cache
def ceilings() -> tuple[float, float]:
    """bf16 FLOP/s and bytes per second, as measured."""
    n = 8192 if CUDA else 128
    a = torch.randn(n, n, device=DEVICE).bfloat16()  # not zeros, which are faster
    source = torch.randn(4 * n * n, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * n**3 / timed(lambda: a @ a, 8), 2 * source.nbytes / timed(lambda: target.copy_(source), 8)


def watched(function) -> dict:
    """What a call runs on the device, the costliest kernels, and the lines in which the host waits for it."""
    kind = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kind.CUDA if CUDA else kind.CPU]) as profiler:
        timed(function)
    found = [(event.self_device_time_total / 1e3, event.count, event.key[:70])
             for event in profiler.key_averages() if event.self_device_time_total > 0 or not CUDA]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if CUDA:
            torch.cuda.set_sync_debug_mode("warn")
        function()
        if CUDA:
            torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in seen if "called a synchronizing" in str(w.message)]
    lines = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in waits)
    return dict(kernels=sum(count for _, count, _ in found), kernel_ms=sum(ms for ms, _, _ in found),
                top=sorted(found, reverse=True)[:12], host_waits=len(waits), waiting=lines)


def env():
    """Versions, the card and its ceilings, two ways to embed patches, and the sampler's random numbers."""
    flops, bandwidth = ceilings()
    yield dict(what="card", card=str(torch.cuda.get_device_properties(0)) if CUDA else "cpu",
               torch=torch.__version__, transformers=transformers.__version__,
               cudnn=torch.backends.cudnn.version(), measured_flops=flops, measured_bandwidth=bandwidth)
    conv = torch.nn.Conv3d(3, 1280, (2, 14, 14), (2, 14, 14), bias=False).to(DEVICE, torch.bfloat16)
    patches = torch.randn(4096 if CUDA else 16, 3, 2, 14, 14, device=DEVICE).bfloat16()
    yield dict(what="patch embedding", conv_ms=1e3 * timed(lambda: conv(patches), 3),
               linear_ms=1e3 * timed(lambda: patches.flatten(1) @ conv.weight.flatten(1).T, 3))
    k, t = torch.arange(50)[:, None], torch.arange(40)
    here, there = (rollout.keyed_uniform(7, k.to(at), k.to(at), t.to(at)) for at in ("cpu", DEVICE))
    yield dict(what="uniforms of CPU and device", limits={"apart": 0}, apart=(here - there.cpu()).abs().max())


def decode():
    """Tokens per second of the sampler, whose first call captures the graphs that the second replays."""
    policy, prompts = big()
    T, S = 256 if CUDA else 6, len(prompts[0].tokens)
    yield dict(what="first prefill: compiles", compile_s=timed(lambda: sample(policy, prompts[:2], 1)))
    for P in (8, 32, 64) if CUDA else (2, 4):
        for call in ("captures", "kept graphs"):
            seconds, peak_gb = measure(lambda: sample(policy, prompts[:P], T))
            prefill = timed(lambda: sample(policy, prompts[:P], 1))
            a_step = (seconds - prefill) / (T - 1)
            yield dict(what=f"{8 * P} rows, {call}", tok_s=8 * P / a_step, prefill_tok_s=P * S / prefill,
                       rollout_s=seconds, graphs=len(graphs_of(policy)), peak_gb=peak_gb)


def generate():
    """transformers' generate beside the sampler, in turns."""
    policy, prompts = big()
    hf = gpu_checks.make_model("Qwen2_5_VL", dtype=torch.bfloat16, **gpu_checks.BIG).eval()
    P, T = (8, 128) if CUDA else (2, 4)
    inputs = model.to_device(model.cat_pixels(prompts[:P]), DEVICE)
    inputs["input_ids"] = torch.stack([prompt.tokens for prompt in prompts[:P]]).to(DEVICE)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == 5).long()
    options = dict(do_sample=True, top_k=0, num_return_sequences=8, min_new_tokens=T, max_new_tokens=T)
    medians = bench.alternate({
        "theirs": lambda _: timed(lambda: hf.generate(**inputs, **options)),
        "ours": lambda _: timed(lambda: sample(policy, prompts[:P], T))}, repeats=2)
    yield dict(what=f"{8 * P} rows, {T} tokens", ratio=medians["theirs"] / medians["ours"],
               tok_s=8 * P * T / medians["ours"], theirs_tok_s=8 * P * T / medians["theirs"])


def grpo_pass(policy, groups):
    """Forward and backward of a micro-batch, as in train_grpo.py."""
    batch = on_device(policy, groups)
    logps = policy(batch)[0]
    advantages, mask = torch.linspace(-1, 1, len(logps), device=DEVICE), batch["completion_mask"]
    loss, _ = losses.policy_loss(logps, logps.detach(), advantages, mask, loss_type="grpo")
    (loss / 512).backward()


def mpo_pass(policy, groups):
    """The same as in train_dpo.py, with a reference's log-probs as if its cache had them."""
    zeros = SimpleNamespace(logps=lambda _, batch: torch.zeros(batch["logit_index"].shape, device=DEVICE))
    terms, _ = train_dpo.score_groups(MPO, policy, groups, {"ref": zeros}, {"bco_shift": 0.0})
    loss = sum(weight * terms[name][0] for name, weight in zip(MPO.loss_type, MPO.loss_weights))
    (loss / 256).backward()


def train():
    """Micro-batches: milliseconds, and their useful FLOPs (no recomputation, no attention) of the peak."""
    policy, prompts = big()
    parts = policy.hf.get_decoder().layers, policy.hf.get_output_embeddings(), policy.hf.get_encoder("image")
    layers, head, tower = (sum(p.numel() for p in part.parameters()) for part in parts)
    T, S, patches = 256 if CUDA else 6, len(prompts[0].tokens), len(prompts[0].pixels["pixel_values"])
    for count, G in ((1, 8), (4, 8), (2, 2), (8, 2)) if CUDA else ((1, 8), (2, 2)):
        groups, one_pass = answered(prompts[:count], *[T] * G), grpo_pass if G == 8 else mpo_pass
        first = timed(lambda: one_pass(policy, groups))
        seconds, peak_gb = measure(lambda: one_pass(policy, groups), 3)
        tokens = count * (S + G * T)
        flops = 6 * (layers * tokens + head * count * G * T + tower * count * patches) / seconds
        yield dict(what=f"{count} x {G}, {tokens} tokens", ms=1e3 * seconds, tok_s=tokens / seconds,
                   share_of_peak=flops / PEAK, share_of_measured_peak=flops / ceilings()[0],
                   peak_gb=peak_gb, compile_s=first - seconds)


def profile():
    """Kernels, and waits of the host: of a micro-batch, and of a rollout whose graphs are there."""
    policy, prompts = big()
    T, groups = (33, answered(prompts[:1], *[256] * 8)) if CUDA else (5, answered(prompts[:1], 6, 6))
    for what, function in (("micro-batch", lambda: grpo_pass(policy, groups)),
                           ("prefill", lambda: sample(policy, prompts[:8], 1)),
                           (f"prefill, {T - 1} steps", lambda: sample(policy, prompts[:8], T))):
        timed(function, 3)
        yield dict(what=what, **watched(function))


@functools.cache
def optimizer():
    """AdamW, after the preflight of a run on a GPU, which finds how much memory the sampler may keep."""
    policy, prompts = big()
    policy.kept.clear(), policy.copies.clear()
    groups = answered(prompts[:4], *[427 if CUDA else 6] * 8)
    measure(lambda: model.preflight(policy, groups, 1.0, 0, True))  # which reads the peak
    return torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=CUDA)


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
    T, found = 427 if CUDA else 6, []
    lengths = bench.make_lengths(8 * len(prompts), T, seed=0)
    optimizer()
    for call in ("first", "second"):
        with bench.scripted(lengths, eos=1):
            rollout_s, rollout_gb = measure(lambda: found.append(sample(policy, prompts, T)))
        graphs, groups = len(graphs_of(policy)), gpu_checks.sampled_groups(prompts, found[-1])
        update_s, update_gb = measure(lambda: update(policy, groups, grpo_pass, 4))
        yield dict(what=f"step, {call}", step_s=rollout_s + update_s, rollout_s=rollout_s, update_s=update_s,
                   graphs=graphs, kept=len(graphs_of(policy)), tok_s=sum(lengths) / rollout_s,
                   rollout_gb=rollout_gb, update_gb=update_gb)


def mpo():
    """A whole MPO step of 256 pairs, whose reference's log-probs are there."""
    policy, prompts = big()
    groups = answered(prompts * 4, *[256 if CUDA else 6] * 2)
    optimizer()
    step_s, peak_gb = measure(lambda: update(policy, groups, mpo_pass, 8))
    yield dict(what=f"step, {len(groups)} pairs", step_s=step_s, peak_gb=peak_gb)


SECTIONS = gpu_checks.SECTIONS | dict(
    env=env, decode=decode, generate=generate, train=train, profile=profile, grpo=grpo, mpo=mpo)


def run_part(run: SimpleNamespace, names: list[str], until: float):
    """In a process of its own: these sections, one after the other, while there is time."""
    global RUN
    RUN, bench.rollout = run, rollout  # bench's own main imports it there
    torch.backends.cudnn.allow_tf32 = False  # fp32 checks mean fp32, in convolutions too
    for RUN.section in names:
        began = time.time()
        if until - began < 10:
            emit("end", skipped="no time left")
            continue
        try:
            for line in SECTIONS[RUN.section]():
                emit(**line)
            emit("end", seconds=time.time() - began)
        except (Exception, SystemExit):  # argparse exits
            emit("end", error=traceback.format_exc()[-2000:].strip())


def main(argv=None) -> int:
    """Run the parts one after the other, each as long as it may, and judge by the lines that they leave."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--budget", type=float, default=520, help="seconds")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--out", help="file for the lines")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not CUDA:
        parser.error("no GPU here: --device cpu is a dry run")
    RUN.out = args.out or os.path.join(tempfile.mkdtemp(), "gpu.jsonl")
    Path(RUN.out).write_text("")
    os.environ |= {"OMP_NUM_THREADS": "8"} if args.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    for sections, most in PARTS:
        names = [name for name in sections.split() if name in args.only]
        if not names:
            continue
        until = min(time.time() + most, RUN.started + args.budget)
        if "resume" in names:  # cuBLAS reads it once, and sections before this one use cuBLAS
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        part = multiprocessing.get_context("spawn").Process(target=run_part, args=(RUN, names, until))
        part.start()
        part.join(max(20.0, until - time.time()))  # without time left it says what it skips
        part.kill()
        part.join()
        ended = {line["section"] for line in read_lines() if line["what"] == "end"}
        for RUN.section in [name for name in names if name not in ended]:
            emit("end", error=f"the process ended, exit code {part.exitcode} (-9: its time was over)")
    print_table(read_lines())
    return exit_code(read_lines())


if __name__ == "__main__":
    sys.exit(main())

"""flatpo beside its peers on the same work, in one run: rollout, training pass, output head, whole steps.

    python benchmarks/bench.py rollout                         # against transformers' generate
    python benchmarks/bench.py rollout --vllm_python V/bin/python     # and vLLM, from an environment of its own
    python benchmarks/bench.py train                           # against repeated, padded rows and full logits
    python benchmarks/bench.py head                            # against log_softmax over (tokens, vocabulary)
    python benchmarks/bench.py step --trl_python T/bin/python  # a whole GRPO step against TRL 1.16's
    python benchmarks/bench.py dpo  --trl_python T/bin/python  # an MPO step with images against TRL's DPOTrainer
    python benchmarks/bench.py rollout --curve G               # G, new, side (of the image), vocab
    python benchmarks/bench.py growth                          # 16 completions a prompt against 1
    python benchmarks/bench.py floor --preset h200 --device cuda      # one GRPO step of 64 x 8 against the hardware
    ... --out results.jsonl, then: python benchmarks/bench.py plot --out results.jsonl      # needs matplotlib

Sides alternate, repetition by repetition, in one process tree and on one thread; a number is the median over
--repeats of CPU seconds (on a GPU: of seconds between two synchronisations). Every point is one JSON line.
The first peer runs twice, as two sides: `aa` is the ratio of the two, and outside 0.9 to 1.1 a point says
nothing. Lengths are scripted (normal around 0.6 of the longest), the same for every side. The model is
Qwen2.5-VL's classes with random weights: --preset cpu 43 M parameters (hidden 512, 8 layers, vocabulary 32k),
--preset h200 Qwen2.5-VL-3B's own configuration. `step` and `dpo` take 25 M (6 layers, vocabulary 8k).

What a side gets: flatpo and transformers get pixel tensors; vLLM gets pictures, whose preprocessing it
includes. `hf` repeats the prompt and its images G times, as TRL calls generate; `hf_nrs` is
num_return_sequences=G, which encodes them once.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import json
import math
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
POINTS = {  # prompts, generations, new tokens, side of the square image in pixels (28 pixels: one token a side)
    "C1": dict(P=4, G=8, new=128, side=224), "C2": dict(P=2, G=8, new=96, side=672),
    "C3": dict(P=2, G=16, new=96, side=448)}
CURVES = {"G": [1, 2, 4, 8, 16], "new": [32, 64, 96, 192, 384], "side": [0, 224, 448, 672],
          "vocab": [32_000, 152_000]}
TRAIN = [dict(G=8, new=96, side=224), dict(G=8, new=96, side=448), dict(G=8, new=96, side=672),
         dict(G=16, new=96, side=448), dict(G=8, new=32, side=448), dict(G=8, new=256, side=448)]
STEPS = [dict(P=2, G=8, new=96, side=448), dict(P=1, G=16, new=48, side=672)]


QWEN_3B = dict(  # Qwen2.5-VL-3B-Instruct's config.json
    text=dict(vocab_size=151_936, hidden_size=2048, intermediate_size=11_008, num_hidden_layers=36,
              num_attention_heads=16, num_key_value_heads=2, max_position_embeddings=128_000,
              rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24])),
    tower=dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, patch_size=14, window_size=112,
               out_hidden_size=2048, fullatt_block_indexes=[7, 15, 23, 31]))
FLOOR = {"cpu": dict(P=4, G=8, new=48, mean=24, side=224, flops=None, peak_flops=None, bandwidth=None),
         # bf16 matrix products as measured and as specified, bytes per second
         "h200": dict(P=64, G=8, new=512, mean=256, side=560, flops=790e12, peak_flops=989e12, bandwidth=4.8e12)}


# ------------------------------------------------------------------------------------------------------------
# The model and the work


def build_model(folder: Path, vocab: int = 32_000, tower=(), **text) -> Path:
    """A random Qwen2.5-VL and its processor; `text` and `tower` override its configurations."""
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
                "<|image_pad|>", "<|video_pad|>"]
    small = data.build_tokenizer(data.TINY_CORPUS, specials, eos="<|im_end|>", pad="<|endoftext|>")
    spec = json.loads(small._tokenizer.to_str())
    for i in range(len(small), vocab):  # words that no text contains: a vocabulary of the real size
        spec["model"]["vocab"][f"filler{i}"] = i
    from tokenizers import Tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), padding_side="left",
                                        eos_token="<|im_end|>", pad_token="<|endoftext|>")
    ids = dict(zip(specials, tokenizer.convert_tokens_to_ids(specials)))
    language = dict(vocab_size=vocab, hidden_size=512, intermediate_size=1536, num_hidden_layers=8,
                    num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=4096,
                    rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[8, 12, 12])) | text
    tower = dict(depth=4, hidden_size=256, intermediate_size=688, num_heads=4, patch_size=14, window_size=112,
                 out_hidden_size=language["hidden_size"], fullatt_block_indexes=[1, 3]) | dict(tower)
    config = Qwen2_5_VLConfig(
        text_config=language | dict(bos_token_id=None, eos_token_id=ids["<|im_end|>"],
                                    pad_token_id=ids["<|endoftext|>"]),
        vision_config=tower, tie_word_embeddings=True, image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"], vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"])
    processor = model.without_video(Qwen2_5_VLProcessor)(
        image_processor=Qwen2VLImageProcessorPil(patch_size=14, merge_size=2,
                                                 size={"shortest_edge": 28 * 28, "longest_edge": 1344 * 1344}),
        tokenizer=tokenizer, chat_template=data.CHAT_TEMPLATE)
    torch.manual_seed(0)
    hf = Qwen2_5_VLForConditionalGeneration(config)
    hf.generation_config.eos_token_id, hf.generation_config.pad_token_id = ids["<|im_end|>"], ids["<|endoftext|>"]
    hf.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "video_preprocessor_config.json").write_text(json.dumps(dict(
        video_processor_type="Qwen2VLVideoProcessor", patch_size=14, merge_size=2, temporal_patch_size=2,
        size={"shortest_edge": 28 * 28, "longest_edge": 1344 * 1344})) + "\n")
    return folder


TEXT = "how many shapes are there? " * 11


def make_rows(count: int, side: int, seed: int, folder: Path) -> list[dict]:
    """Rows with a noise picture each (fresh ones every repetition, so that no side's image cache helps)."""
    from PIL import Image
    import numpy as np
    rng, rows = np.random.default_rng(seed), []
    for i in range(count):
        row = {"prompt": TEXT, "images": [], "solution": "3", "chosen": "4 shapes " * 24, "rejected": "5 shapes " * 24}
        if side:
            name = f"{side}_{seed}_{i}.png"
            Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(folder / name)
            row["images"] = [name]
        rows.append(row | {"_source": f"row {i}", "_image_root": str(folder)})
    return rows


def make_lengths(count: int, longest: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    lengths = [min(longest, max(2, round(rng.gauss(0.6 * longest, 0.2 * longest)))) for _ in range(count)]
    lengths[rng.randrange(count)] = longest
    return lengths


@contextmanager
def scripted(lengths, eos: int):
    """Within it completion n of `rollout.sample` ends with its lengths[n]-th token: a uniform of 2 asks for EOS."""
    import torch
    uniform, sample_tokens = rollout.keyed_uniform, rollout.sample_tokens

    def marked_uniform(seed, draw, k, t):
        u = uniform(seed, draw, k, t)
        u[torch.arange(len(u)), torch.tensor(lengths) - 1] = 2.0
        return u

    def end_or_sample(logits, u, *options):
        token, logp = sample_tokens(logits, u.clamp(max=1 - 2.0**-52), *options)
        return torch.where(u > 1, eos, torch.where(token == eos, 0, token)), logp

    rollout.keyed_uniform, rollout.sample_tokens = marked_uniform, end_or_sample
    try:
        yield
    finally:
        rollout.keyed_uniform, rollout.sample_tokens = uniform, sample_tokens


# ------------------------------------------------------------------------------------------------------------
# Measuring


def seconds(run) -> float:
    import torch
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - began
    began = time.process_time()
    run()
    return time.process_time() - began


def alternate(sides: dict, repeats: int) -> dict[str, float]:
    """{side: repetition -> seconds} -> {side: median}; repetition 0 warms up. The order turns every time."""
    times = {name: [] for name in sides}
    for repetition in range(repeats + 1):
        names = list(sides)
        for name in names[repetition % len(names):] + names[:repetition % len(names)]:
            value = sides[name](repetition)
            if repetition:
                times[name].append(value)
    return {name: statistics.median(values) for name, values in times.items()}


def report(args, bench: str, point: dict, medians: dict, ours: str = "flatpo", **more):
    """Print one JSON line: medians, `ratio` (the first peer over ours) and the ratio of every other peer."""
    peers = [name for name in medians if name != ours and not name.endswith("_again")]
    line = {"bench": bench, **point, "seconds": {k: round(v, 4) for k, v in medians.items()}}
    if peers:
        line["ratio"] = round(medians[peers[0]] / medians[ours], 3)
        line["ratios"] = {name: round(medians[name] / medians[ours], 3) for name in peers}
    if f"{peers[0]}_again" in medians if peers else False:
        line["aa"] = round(medians[f"{peers[0]}_again"] / medians[peers[0]], 3)
        line["valid"] = 0.9 <= line["aa"] <= 1.1
    line |= more | {"repeats": args.repeats, "dtype": args.dtype, "load": round(os.getloadavg()[0], 2)}
    print(json.dumps(line), flush=True)
    if args.out:
        with open(args.out, "a") as file:
            file.write(json.dumps(line) + "\n")
    return line


class Peer:
    """This file run by another environment's Python, which answers one JSON line a request: {"seconds": ...}."""

    def __init__(self, python: str, *command, env=()):
        self.process = subprocess.Popen(
            [python, __file__, *map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            stderr=open(os.environ.get("BENCH_PEER_LOG", os.devnull), "a"), env={**os.environ, **dict(env)})

    def ask(self, **request) -> float:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith('{"seconds"'):
                self.answer = json.loads(line)
                return self.answer["seconds"]
        raise SystemExit(f"the peer {self.process.args} died; set BENCH_PEER_LOG to a file to see why")

    def close(self):
        self.process.stdin.close()
        self.process.wait()


# ------------------------------------------------------------------------------------------------------------
# Rollout


def bench_rollout(args, work: Path):
    import torch
    from transformers import AutoModelForImageTextToText, LogitsProcessor
    dtype, device = getattr(torch, args.dtype), args.device
    points = {name: POINTS[name] for name in args.points}
    if args.curve:
        base = dict(P=2, G=8, new=96, side=448)
        points = {f"{args.curve}={value}": base | {args.curve: value} for value in CURVES[args.curve]}
    built = {}

    class EndAt(LogitsProcessor):
        """Forces EOS at the scripted length, forbids it before."""

        def __init__(self, lengths, prompt, eos):
            self.lengths, self.prompt, self.eos = torch.tensor(lengths, device=device), prompt, eos

        def __call__(self, input_ids, scores):
            end = input_ids.shape[1] - self.prompt + 1 >= self.lengths
            kept = scores[:, self.eos].clone()
            scores[:, self.eos] = -math.inf
            scores[end] = -math.inf
            scores[:, self.eos] = torch.where(end, kept, -math.inf)
            return scores

    for name, point in points.items():
        vocab = point.get("vocab", 32_000)
        if vocab not in built:
            built[vocab] = build_model(work / f"model_{vocab}", vocab)
        policy, processor = model.load_policy(str(built[vocab]), args.dtype, device)
        hf = AutoModelForImageTextToText.from_pretrained(built[vocab], dtype=dtype, attn_implementation="sdpa")
        hf = hf.to(device).eval()
        eos, P, G, new = policy.eos_ids[0], point["P"], point["G"], point["new"]
        rows = [make_rows(P, point["side"], 100 + r, work) for r in range(args.repeats + 1)]
        lengths = [make_lengths(P * G, new, r) for r in range(args.repeats + 1)]
        prompts = [[data.encode_prompt(policy, processor, row) for row in rep] for rep in rows]
        results = {}

        def flatpo(r):
            def go():
                results["ours"] = rollout.sample(
                    policy, prompts[r], list(range(P)), num_generations=G, max_completion_length=new,
                    temperature=1.0, seed=r)
            with scripted(lengths[r], eos):
                took = seconds(go)
            assert results["ours"].completion_mask.sum(-1).tolist() == lengths[r]
            return took

        def generate(repeat_rows):
            def run(r):
                copies = G if repeat_rows else 1
                batch = [p for p in prompts[r] for _ in range(copies)]
                inputs = {k: v.to(device) for k, v in model.cat_pixels(batch).items()}
                inputs["input_ids"] = torch.stack([p.tokens for p in batch]).to(device)
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
                inputs["mm_token_type_ids"] = (inputs["input_ids"] == hf.config.image_token_id).long()
                def go():
                    with torch.no_grad():
                        out = hf.generate(**inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                                          max_new_tokens=new, num_return_sequences=G // copies,
                                          logits_processor=[EndAt(lengths[r], inputs["input_ids"].shape[1], eos)])
                    ended = (out[:, inputs["input_ids"].shape[1]:] == eos).long().argmax(-1) + 1
                    assert ended.tolist() == lengths[r]
                return seconds(go)
            return run

        sides = {"hf": generate(True), "hf_again": generate(True), "flatpo": flatpo, "hf_nrs": generate(False)}
        vllm = None
        if args.vllm_python:
            vllm = Peer(args.vllm_python, "_vllm", "--folder", built[vocab], "--dtype", args.dtype, env=dict(
                VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="2",
                VLLM_CPU_OMP_THREADS_BIND="nobind").items())
            text = processor.apply_chat_template(data.to_messages(rows[0][0]), add_generation_prompt=True)

            def ask(r):
                images = [str(work / row["images"][0]) if row["images"] else None for row in rows[r]]
                return vllm.ask(text=text, images=images, lengths=lengths[r], G=G)
            sides["vllm"] = ask
        elif not args.curve:
            print("vllm: skipped, no --vllm_python", file=sys.stderr)
        medians = alternate(sides, args.repeats)
        if vllm is not None:
            vllm.close()
        tokens = statistics.median(sum(x) for x in lengths[1:])
        # The exactness this speed comes with: the sampler's log-probs against the training pass's, in fp32.
        exact, _ = model.load_policy(str(built[vocab]), "float32", device)
        sampled = rollout.sample(exact, prompts[0], list(range(P)), num_generations=G, max_completion_length=16,
                                 temperature=1.0, seed=0)
        groups = [(p, [c[m] for c, m in zip(sampled.completion_ids[i * G:][:G], sampled.completion_mask[i * G:][:G])])
                  for i, p in enumerate(prompts[0])]
        with torch.no_grad():
            trained = exact(model.to_device(exact.pack(groups), device))[0].cpu()
        gap = (trained - sampled.sampling_logps)[sampled.completion_mask].abs().max().item()
        report(args, "rollout", {"point": name, **point, "prompt_tokens": len(prompts[0][0].tokens)}, medians,
               tokens=tokens, tokens_per_second={k: round(tokens / v, 1) for k, v in medians.items()},
               fp32_logp_gap=gap)


def bench_growth(args, work: Path):
    """What more completions of a prompt cost: 16 against 1, alternating (a curve's points are measured apart)."""
    point = dict(P=2, new=96, side=448)
    policy, processor = model.load_policy(str(build_model(work / "model")), args.dtype, args.device)
    prompts = [data.encode_prompt(policy, processor, row) for row in make_rows(point["P"], point["side"], 7, work)]

    def side(G):
        def run(r):
            with scripted(make_lengths(point["P"] * G, point["new"], r), policy.eos_ids[0]):
                return seconds(lambda: rollout.sample(
                    policy, prompts, list(range(point["P"])), num_generations=G, temperature=1.0, seed=r,
                    max_completion_length=point["new"]))
        return run

    medians = alternate({"G=16": side(16), "G=16_again": side(16), "G=1": side(1)}, args.repeats)
    report(args, "growth", point, medians, ours="G=1")


def serve_vllm(args):
    from PIL import Image
    from vllm import LLM, SamplingParams
    engine = LLM(model=args.folder, dtype=args.dtype, enforce_eager=True, max_model_len=2048, seed=0,
                 gpu_memory_utilization=0.3, max_num_seqs=64, limit_mm_per_prompt={"image": 1})
    for line in sys.stdin:
        work = json.loads(line)
        began = time.process_time()
        requests, limits = [], []
        for i, path in enumerate(work["images"]):
            image = None if path is None else Image.open(path).convert("RGB")
            for g in range(work["G"]):
                requests.append({"prompt": work["text"], **({"multi_modal_data": {"image": image}} if image else {})})
                length = work["lengths"][i * work["G"] + g]
                limits.append(SamplingParams(temperature=1.0, max_tokens=length, ignore_eos=True, detokenize=False))
        outputs = engine.generate(requests, limits, use_tqdm=False)
        took = time.process_time() - began
        assert [len(o.outputs[0].token_ids) for o in outputs] == work["lengths"]
        print(json.dumps({"seconds": took}), flush=True)


# ------------------------------------------------------------------------------------------------------------
# Training pass


def bench_train(args, work: Path):
    import torch
    from transformers import AutoModelForImageTextToText
    device = args.device
    folder = build_model(work / "model")
    policy, processor = model.load_policy(str(folder), "float32", device)
    policy.never_sampled = policy.never_sampled[:0]  # the peer normalises over the whole vocabulary
    hf = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).to(device).train()
    shares = []
    for point in TRAIN:
        G, new = point["G"], point["new"]
        prompt = data.encode_prompt(policy, processor, make_rows(1, point["side"], 7, work)[0])
        lengths, P = make_lengths(G, new, 1), len(prompt.tokens)
        generator = torch.Generator().manual_seed(0)
        completions = [torch.randint(20, 300, (n,), generator=generator) for n in lengths]
        packed = model.to_device(policy.pack([(prompt, completions)]), device)
        ids = torch.full((G, P + max(lengths)), policy.pad_id)
        mask = torch.zeros_like(ids)
        for i, c in enumerate(completions):
            ids[i, :P + len(c)], mask[i, :P + len(c)] = torch.cat([prompt.tokens, c]), 1
        ids, mask = ids.to(device), mask.to(device)
        repeated = {k: v.to(device) for k, v in model.cat_pixels([prompt] * G).items()}
        types = (ids == hf.config.image_token_id).long()
        sums = {}

        def flatpo(_):
            def go():
                policy.zero_grad()
                logps = policy(packed)[0]
                logps.sum().backward()
                sums["flatpo"] = logps.sum().item()
            return seconds(go)

        def padded(_):
            def go():
                hf.zero_grad()
                logits = hf(input_ids=ids, attention_mask=mask, mm_token_type_ids=types, **repeated,
                            logits_to_keep=max(lengths) + 1).logits[:, :-1]
                logps = logits.log_softmax(-1).gather(-1, ids[:, P:, None]).squeeze(-1) * mask[:, P:]
                logps.sum().backward()
                sums["padded"] = logps.sum().item()
            return seconds(go)

        medians = alternate({"padded": padded, "padded_again": padded, "flatpo": flatpo}, args.repeats)
        bound = G * (P + max(lengths)) / (P + sum(lengths))
        theirs = dict(hf.named_parameters())
        square = [sum(((p.grad - theirs[n].grad) ** 2).sum() for n, p in policy.hf.named_parameters()),
                  sum((p.grad ** 2).sum() for p in theirs.values())]
        line = report(args, "train", {**point, "prompt_tokens": P, "completion_tokens": sum(lengths)}, medians,
                      token_bound=round(bound, 3), share=round(medians["padded"] / medians["flatpo"] / bound, 3),
                      logp_sum_gap=abs(sums["flatpo"] - sums["padded"]),
                      relative_gradient_gap=float((square[0] / square[1]).sqrt()))
        shares.append(line["share"])
    print(json.dumps({"bench": "train", "geometric_mean_share": round(statistics.geometric_mean(shares), 3)}))


# ------------------------------------------------------------------------------------------------------------
# Output head


def head_memory(args):
    """In a process of its own: how far one side rises above what it starts from, {"seconds": in bytes}."""
    sys.stdin.readline()
    hidden, weight, targets = head_inputs(args.tokens, args.vocab, args.hidden)
    hidden.sum().backward(), weight.sum().backward()  # the gradients are there already, as in training
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is now what is in use

    def peak():
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    before = peak()
    head_side(args.side_name, hidden, weight, targets)()
    print(json.dumps({"seconds": peak() - before}), flush=True)


def head_inputs(N, V, H, frozen=False):
    import torch
    torch.manual_seed(0)
    hidden = torch.randn(N, H).requires_grad_()
    return hidden, (torch.randn(V, H) / H**0.5).requires_grad_(not frozen), torch.randint(0, V, (N,))


def head_side(name, hidden, weight, targets):
    import torch
    none, chunk = torch.zeros(0, dtype=torch.long), model.Policy.forward.__defaults__[-1]

    def flatpo():
        model.ChunkedLogps.apply(hidden, weight, targets, none, 1.0, chunk)[0].sum().backward()

    def full():
        (hidden @ weight.T).log_softmax(-1).gather(-1, targets[:, None]).sum().backward()

    return {"flatpo": flatpo, "full": full, "full_again": full}[name]


def bench_head(args, work: Path):
    V, H = 151_936, 512
    memory = {}
    for N, frozen in ((1024, True), (512, False), (1024, False), (2048, False)):  # frozen: as with LoRA
        inputs = head_inputs(N, V, H, frozen)
        sides = {name: (lambda _, run=head_side(name, *inputs): seconds(run)) for name in ("full", "full_again", "flatpo")}
        medians = alternate(sides, args.repeats)
        if frozen:
            report(args, "head", dict(tokens=N, vocab=V, hidden=H, frozen=True), medians)
            continue
        for name in ("full", "flatpo"):
            peer = Peer(sys.executable, "_head", "--side_name", name, "--tokens", N, "--vocab", V, "--hidden", H)
            memory[name, N] = peer.ask()
            peer.close()
        report(args, "head", dict(tokens=N, vocab=V, hidden=H), medians,
               extra_bytes={name: memory[name, N] for name in ("full", "flatpo")})
    slope = {name: (memory[name, 2048] - memory[name, 512]) / 1536 for name in ("full", "flatpo")}
    print(json.dumps({"bench": "head", "bytes per further token": slope,
                      "one over": round(slope["full"] / max(slope["flatpo"], 1))}))


# ------------------------------------------------------------------------------------------------------------
# Whole steps: each side is the real program in a process of its own, which waits for a line before each step.


BESIDE = {}  # what else a gate answers


def gate(began=[None]):
    """At the end of a step: answer what it took, and wait to be told to go on."""
    if began[0] is not None:
        print(json.dumps({"seconds": time.process_time() - began[0], **BESIDE}), flush=True)
    sys.stdin.readline()
    began[0] = time.process_time()


def our_steps(args):
    """The real script, gated at its log line. What it does before its first step is not in the steps; the
    reference pass of train_dpo.py, once for each pair, is measured apart."""
    import train_dpo
    import train_grpo
    real = model.Run.log
    model.Run.log = lambda *a: (real(*a), gate())[0]
    flags = ["--model_name_or_path", args.folder, "--dataset", args.rows, "--image_root", str(Path(args.rows).parent),
             "--output_dir", tempfile.mkdtemp(), "--max_steps", "100", "--eval_steps", "1000", "--save_steps", "1000",
             "--learning_rate", "1e-6", "--lr_scheduler_type", "constant", "--device", "cpu"]
    gate()
    with open(os.devnull, "w") as devnull:
        sys.stdout, out = devnull, sys.stdout
        globals()["print"] = lambda *a, **k: __builtins__.print(*a, **{"file": out, **k})
        if args.side_name == "grpo":
            train_grpo.main([*flags, "--num_generations", str(args.G), "--max_completion_length", str(args.new),
                             "--per_device_train_batch_size", str(args.P * args.G), "--reward_funcs",
                             f"{__file__}:reward"])
        else:
            add = train_dpo.ReferenceCache.add

            def timed(cache, *rest):
                began, before = time.process_time(), len(cache.known)
                add(cache, *rest)
                if len(cache.known) > before:
                    BESIDE["reference"] = (time.process_time() - began) / (len(cache.known) - before) * args.P
            train_dpo.ReferenceCache.add = timed
            train_dpo.main([*flags, "--algo", "mpo", "--per_device_train_batch_size", str(args.P), "--ref_cache",
                            tempfile.mkdtemp()])


def reward(completions, **_):
    return [float(len(text) % 7) for text in completions]


def trl_steps(args):
    """TRL's trainer on the same rows. Its defaults but for: fp32, no gradient checkpointing (ours has none),
    no length limit on the prompt, the batch in one piece."""
    import torch
    from datasets import Dataset, Features, Image, List, Value
    from transformers import AutoModelForImageTextToText, TrainerCallback
    sys.path.insert(0, str(ROOT))
    import model  # its processor needs no torchvision
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in open(args.rows)]
    folder = Path(args.rows).parent
    chat = lambda role, text: [{"role": role, "content": text}]
    table = {"prompt": [chat("user", row["prompt"]) for row in rows],
             "images": [[str(folder / name) for name in row["images"]] for row in rows]}
    if args.side_name == "dpo":
        table |= {key: [chat("assistant", row[key]) for row in rows] for key in ("chosen", "rejected")}
    message = List({"role": Value("string"), "content": Value("string")})
    features = {key: message for key in table if key != "images"} | {"images": List(Image())}
    dataset = Dataset.from_dict(table, features=Features(features))
    common = dict(output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, gradient_checkpointing=False, max_steps=100,
                  learning_rate=1e-6, lr_scheduler_type="constant", report_to=[], save_strategy="no", disable_tqdm=True,
                  logging_steps=1000, dataloader_num_workers=0)

    class Gate(TrainerCallback):
        def on_step_begin(self, *a, **k):
            if not getattr(self, "begun", False):
                self.begun = True
                gate()

        def on_step_end(self, *a, **k):
            gate()

    hf = AutoModelForImageTextToText.from_pretrained(args.folder, dtype=torch.float32)
    processor = model.load_processor(args.folder)
    if args.side_name == "grpo":
        from trl import GRPOConfig, GRPOTrainer
        config = GRPOConfig(**common, per_device_train_batch_size=args.P * args.G, num_generations=args.G,
                            max_completion_length=args.new, temperature=1.0, loss_type="grpo", beta=0.0)
        trainer = GRPOTrainer(hf, reward_funcs=lambda completions, **_: reward([c[0]["content"] for c in completions]),
                              args=config, train_dataset=dataset, processing_class=processor, callbacks=[Gate()])
    else:
        from trl import DPOConfig, DPOTrainer
        config = DPOConfig(**common, per_device_train_batch_size=args.P, loss_type=["sigmoid", "bco_pair", "sft"],
                           loss_weights=[0.8, 0.2, 1.0], max_length=None)
        trainer = DPOTrainer(hf, args=config, train_dataset=dataset, processing_class=processor, callbacks=[Gate()])
    trainer.train()


def bench_steps(args, work: Path, kind: str):
    if not args.trl_python:
        print(f"{kind}: skipped, no --trl_python", file=sys.stderr)
        return
    folder = build_model(work / "model", 8192, num_hidden_layers=6)
    for number, point in enumerate(STEPS if kind == "grpo" else [dict(P=4, G=2, side=448), dict(P=2, G=2, side=672)]):
        place = work / f"{kind}_{number}"
        place.mkdir()
        with open(place / "rows.jsonl", "w") as file:
            for row in make_rows(16, point["side"], 3, place):
                file.write(json.dumps({k: v for k, v in row.items() if not k.startswith("_")}) + "\n")
        flags = ["--side_name", kind, "--folder", folder, "--rows", place / "rows.jsonl", "--P", point["P"], "--G",
                 point["G"], "--new", point.get("new", 0)]
        peers = {"trl": Peer(args.trl_python, "_trl", *flags), "flatpo": Peer(sys.executable, "_ours", *flags)}
        # a gate's first answer ends the work before step 1
        medians = alternate({name: lambda _, peer=peer: peer.ask() for name, peer in peers.items()}, args.repeats)
        more, ours = {}, medians["flatpo"]
        if kind == "dpo":  # TRL scores the reference in every step, flatpo in a pair's first epoch
            reference = peers["flatpo"].answer["reference"]
            more = dict(reference_seconds=round(reference, 4),
                        ratio_in_the_first_epoch=round(medians["trl"] / (ours + reference), 3))
        for peer in peers.values():
            peer.process.kill()
        report(args, kind, point, medians, **more)


# ------------------------------------------------------------------------------------------------------------


def bench_floor(args, work: Path):
    """One on-policy GRPO step of the program's own functions, part by part, beside what the hardware allows."""
    import torch
    point, device, gpu = FLOOR[args.preset], args.device, args.device == "cuda"
    P, G, new, dtype = point["P"], point["G"], point["new"], "bfloat16" if gpu else "float32"
    big = args.preset == "h200"
    folder = build_model(work / "model", 151_936, QWEN_3B["tower"], **QWEN_3B["text"]) if big else \
        build_model(work / "model")
    policy, processor = model.load_policy(str(folder), dtype, device)
    prompts = [data.encode_prompt(policy, processor, row) for row in make_rows(P, point["side"], 0, work)]
    rng = random.Random(0)
    lengths = [min(new, max(2, round(rng.gauss(point["mean"], 0.3 * point["mean"])))) for _ in range(P * G)]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=gpu)
    found, syncs = {}, []
    micro = G if big else P * G

    def sample():
        with scripted(lengths, policy.eos_ids[0]):
            found["rollout"] = rollout.sample(policy, prompts, list(range(P)), num_generations=G,
                                              max_completion_length=new, temperature=1.0, seed=0)

    def train():
        ids, mask = found["rollout"].completion_ids, found["rollout"].completion_mask
        for i in range(0, P * G, micro):
            groups = [(prompts[j // G], [ids[n][mask[n]] for n in range(j, j + G)]) for j in range(i, i + micro, G)]
            policy(model.to_device(policy.pack(groups), device))[0].sum().mul(1e-6).backward()

    def update():
        optimizer.step()
        optimizer.zero_grad()

    times = {name: [] for name in ("rollout", "train", "optimizer")}
    for repetition in range(args.repeats + 1):
        for name, part in zip(times, (sample, train, update)):
            took = seconds(part)
            times[name] += [took] if repetition else []
    medians = {name: statistics.median(values) for name, values in times.items()}
    line = {"bench": "floor", "preset": args.preset, "device": torch.cuda.get_device_name() if gpu else "cpu",
            **{k: point[k] for k in ("P", "G", "new", "side")}, "prompt_tokens": len(prompts[0].tokens),
            "tokens": sum(lengths), "seconds": {k: round(v, 3) for k, v in medians.items()},
            "step": round(sum(medians.values()), 3), "decoded_per_second": round(sum(lengths) / medians["rollout"])}
    head = policy.hf.get_output_embeddings().weight.numel()
    layers = sum(p.numel() for p in policy.hf.get_decoder().layers.parameters())
    tower = sum(p.numel() for p in policy.hf.get_encoder(modality="image").parameters())
    L = len(prompts[0].tokens)
    patches = sum(len(p.pixels.get("pixel_values", ())) for p in prompts)
    useful = 6 * (layers * (P * L + sum(lengths)) + head * sum(lengths) + tower * patches)
    line["useful_tflops_per_second"] = round(useful / medians["train"] / 1e12, 3)
    if gpu:
        rows = [sum(n > t for n in lengths) for t in range(new)]  # alive at step t
        weights, config = layers + head, policy.hf.config.get_text_config()
        kv = 4 * config.num_hidden_layers * config.num_key_value_heads * config.hidden_size // config.num_attention_heads
        decode = sum(max(2 * weights * b / point["flops"], 2 * weights / point["bandwidth"])
                     + kv * (P * L + b * t) / point["bandwidth"] for t, b in enumerate(rows) if b)
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as syncs:
            warnings.simplefilter("always")
            sample()
        torch.cuda.set_sync_debug_mode("default")
        line |= {"mfu": round(useful / medians["train"] / point["peak_flops"], 3), "floor_decode": round(decode, 3),
                 "floor_train": round(useful / point["flops"], 3), "host_syncs": len(syncs),
                 "host_syncs_per_token_step": round(len(syncs) / new, 3),
                 "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1)}
    print(json.dumps(line), flush=True)


def plot(args):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    lines = [json.loads(line) for line in open(args.out)]
    figure, axes = plt.subplots(1, len(CURVES), figsize=(16, 3.6))
    titles = dict(G="completions a prompt", new="new tokens at most", side="side of the image, pixels", vocab="vocabulary")
    sides = dict(hf="generate, prompts repeated", hf_nrs="generate, num_return_sequences", vllm="vLLM", flatpo="flatpo")
    for axis, (name, values) in zip(axes, CURVES.items()):
        points = [line for line in lines if line.get("point", "").startswith(f"{name}=")]
        for side, label in sides.items():
            if any(side in line["seconds"] for line in points):
                axis.plot([line[name] for line in points], [line["seconds"].get(side) for line in points], "o-", label=label)
        axis.set(xlabel=titles[name], ylabel="CPU seconds", ylim=(0, None), xticks=values)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(Path(args.out).with_suffix(".png"), dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("bench", choices=["rollout", "growth", "train", "head", "step", "dpo", "floor", "plot", "_vllm", "_head", "_ours", "_trl"])
    add("--points", nargs="+", default=list(POINTS), choices=list(POINTS), help="of the rollout")
    add("--curve", choices=list(CURVES), help="of the rollout, instead of --points")
    add("--repeats", type=int, default=5)
    add("--dtype", choices=["bfloat16", "float32"], help="of the rollout; default bfloat16")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--preset", choices=list(FLOOR), default="cpu", help="sizes of floor")
    add("--vllm_python", help="a Python that has vLLM")
    add("--trl_python", help="a Python that has TRL 1.16")
    add("--out", help="append the JSON lines to this file; what plot reads")
    for name in ("folder", "side_name", "rows"):  # of the processes that this one starts
        add(f"--{name}", help=argparse.SUPPRESS)
    for name in ("tokens", "vocab", "hidden", "P", "G", "new"):
        add(f"--{name}", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.dtype = args.dtype or ("bfloat16" if args.bench in ("rollout", "growth", "_vllm") else "float32")
    if args.bench in ("_vllm", "_trl", "plot"):  # environments without this project's own requirements
        return {"_vllm": serve_vllm, "_trl": trl_steps, "plot": plot}[args.bench](args)
    global data, model, rollout
    sys.path.insert(0, str(ROOT))
    import torch

    import data
    import model
    import rollout
    torch.set_num_threads(1)
    if args.bench in ("_head", "_ours"):
        return {"_head": head_memory, "_ours": our_steps}[args.bench](args)
    with tempfile.TemporaryDirectory() as work:
        if args.bench in ("step", "dpo"):
            return bench_steps(args, Path(work), {"step": "grpo"}.get(args.bench, args.bench))
        {"rollout": bench_rollout, "growth": bench_growth, "train": bench_train, "head": bench_head,
         "floor": bench_floor}[args.bench](args, Path(work))


if __name__ == "__main__":
    main()

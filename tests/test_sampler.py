"""The sampler and the trainer are one distribution: log-probs, masks, keyed randomness, what is never sampled."""

import math
import random

import pytest
import torch
from conftest import FAMILIES, VISION, build_tiny_text, close_to_scale, few, make_row
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import data
import model
import rollout


def encode(policy, processor, *rows):
    return [data.encode_prompt(policy, processor, row) for row in rows]


def mixed_prompts(policy, processor):
    """Different lengths: no, one and two images, of different sizes, long and short texts."""
    one, two = (1, 2) if hasattr(processor, "image_processor") else (0, 0)
    return encode(policy, processor, make_row(one, 1), make_row(0, 2, "which digit is this? 4 5 6"),
                  make_row(two, 3, "how many shapes are there? " * 3))


def rescored(policy, prompts, sampled, G, temperature):
    groups = [(p, [sampled.completion_ids[n][sampled.completion_mask[n]] for n in range(i * G, i * G + G)])
              for i, p in enumerate(prompts)]
    with torch.no_grad():
        return policy(model.pack_groups(groups, policy.pad_id, True), temperature)[0]


@pytest.mark.parametrize("family, temperature", [("qwen2_5_vl", 0.6), ("qwen2_5_vl", 1.5), *((f, 1.2) for f in FAMILIES)])
def test_sampler_equals_trainer(loaded, monkeypatch, family, temperature):
    """P6, the ratio is 1: the sampler's log-probs equal a training forward on the same ids (TRL #4159: temperature left
    out of the trainer's), with images, prompts of different lengths, and completions that end at different lengths."""
    policy, processor = loaded(family)
    prompts = mixed_prompts(policy, processor)
    monkeypatch.setattr(policy, "eos_ids", list(range(100, 112)))  # so that some end early
    sampled = rollout.sample(policy, prompts, [0, 1, 2], num_generations=6, max_completion_length=30,
                             temperature=temperature, seed=3)
    again = rescored(policy, prompts, sampled, 6, temperature)
    lengths = sampled.completion_mask.sum(-1)
    assert len(set(lengths.tolist())) > 3, "the test needs completions of different lengths"
    close_to_scale(sampled.sampling_logps, again)
    assert (sampled.sampling_logps[sampled.completion_mask] < 0).all()


def test_evaluation_is_greedy_and_keyed_by_the_row(loaded, monkeypatch):
    """Temperature 0 is the greedy answer; above it, a rank that holds every second row draws what one rank would.
    --rollout_tokens bounds a batch here too: with room for one prompt, prompts are prefilled one by one."""
    policy, processor = loaded("qwen2_5_vl")
    rows = [make_row(1, i) for i in range(4)]
    prefills, forward = [], policy.hidden
    monkeypatch.setattr(policy, "hidden", lambda ids, *a, **k: (prefills.append(len(ids)) if ids.shape[1] > 1 else None,
                                                                forward(ids, *a, **k))[1])

    class Count:
        specs = ["count"]

        def score(self, texts, rows, step, **_):
            return torch.tensor([[float(len(t)) for t in texts]])

    def answers(rows, draws, temperature, **kwargs):
        return rollout.evaluate(policy, processor, rows, draws, encode(policy, processor, *rows), Count(), seed=0, step=0,
                                temperature=temperature, max_completion_length=8, batch_size=3, **kwargs)[0]

    greedy = rollout.sample(policy, encode(policy, processor, *rows), [9] * 4, num_generations=1,
                            max_completion_length=8, temperature=0, seed=5)
    assert answers(rows, range(4), 0) == rollout.decode(policy, processor, greedy, encode(policy, processor, *rows))
    whole = answers(rows, range(4), 1.0)
    assert whole != answers(rows, range(4), 0)
    assert answers(rows[1::2], range(1, 5, 2), 1.0) == whole[1::2]
    assert max(prefills) > 1
    prefills.clear()
    assert answers(rows, range(4), 1.0, rollout_tokens=1) == whole and prefills == [1] * 4


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl_moe", "gemma3", "qwen2"])
def test_greedy_equals_transformers_generate(loaded, family):
    """Guards cache, positions and mask of the decode (Gemma 3's and Qwen2's windows, which rows and completions outgrow)
    against transformers' own greedy generate with its own attention and caches, prompt by prompt."""
    policy, processor = loaded(family)
    prompts = mixed_prompts(policy, processor)
    sampled = rollout.sample(policy, prompts, [0, 1, 2], num_generations=1, max_completion_length=20, temperature=0,
                             seed=0)
    policy.eval()
    text_config, types = policy.hf.config.get_text_config(), {}
    text_config._attn_implementation = "sdpa"
    for n, prompt in enumerate(prompts):
        if family != "qwen2":
            name = "token_type_ids" if family == "gemma3" else "mm_token_type_ids"
            types = {name: (prompt.tokens == policy.hf.config.image_token_id).int()[None]}
        out = policy.hf.generate(input_ids=prompt.tokens[None], attention_mask=torch.ones_like(prompt.tokens)[None],
                                 **types, **prompt.pixels, max_new_tokens=20, do_sample=False,
                                 suppress_tokens=policy.never_sampled.tolist())[0, len(prompt.tokens):]
        ours = sampled.completion_ids[n][sampled.completion_mask[n]]
        assert torch.equal(ours, out[:len(ours)])
    text_config._attn_implementation = "flatpo"
    policy.train()


def test_eos_ends_and_belongs_to_the_completion(loaded, monkeypatch):
    """The mask ends with the first EOS and includes it; a completion cut by the limit is marked truncated. Masks made
    from `ids != pad` with pad = EOS drop it (tiny-grpo)."""
    policy, processor = loaded("qwen2_5_vl")
    prompts = mixed_prompts(policy, processor)
    monkeypatch.setattr(policy, "eos_ids", list(range(100, 140)))
    monkeypatch.setattr(policy, "pad_id", 100)
    sampled = rollout.sample(policy, prompts, [0, 1, 2], num_generations=16, max_completion_length=12, temperature=1.5,
                             seed=0)
    assert sampled.truncated.any() and not sampled.truncated.all()
    assert (sampled.completion_mask.sum(-1) == 1).any(), "an EOS at once is a completion of length 1"
    for ids, mask, truncated in zip(sampled.completion_ids, sampled.completion_mask, sampled.truncated):
        length = int(mask.sum())
        ends = [i for i, token in enumerate(ids[:length].tolist()) if token in policy.eos_ids]
        assert mask[:length].all() and not mask[length:].any() and length >= 1
        assert ends == ([] if truncated else [length - 1])
        assert not truncated or length == 12


@pytest.mark.parametrize("family", VISION)
def test_placeholders_are_never_sampled(loaded, family):
    """R1-V #91 and many more: a policy that prefers the image token crashes the scoring forward. Both sides leave it
    out of the softmax, so the rest still sums to one."""
    policy, processor = loaded(family)
    assert policy.hf.config.image_token_id in policy.never_sampled
    head = policy.hf.get_output_embeddings().weight
    kept = head.data.clone()
    prompts = mixed_prompts(policy, processor)
    batch = model.pack_groups([(prompts[1], [])], policy.pad_id)
    with torch.no_grad():
        hidden = policy.hidden(batch["input_ids"], batch["position_ids"], model.attention_mask_of(batch))
        head.data[policy.never_sampled] = 50 * hidden[0, -1]  # the logit is now enormous
    try:
        sampled = rollout.sample(policy, prompts, [0, 1, 2], num_generations=8, max_completion_length=8,
                                 temperature=1.0, seed=0)
        assert not torch.isin(sampled.completion_ids[sampled.completion_mask], policy.never_sampled).any()
        close_to_scale(sampled.sampling_logps, rescored(policy, prompts, sampled, 8, 1.0))
        with torch.no_grad():
            total = policy.logits(hidden[:, -1], 1.0).softmax(-1).sum()
        assert total.item() == pytest.approx(1.0)
    finally:
        head.data.copy_(kept)


def test_randomness_belongs_to_the_draw(loaded):
    """A completion depends on (seed, draw number, k) alone: not on the batch it sits in, its order, or G."""
    policy, processor = loaded("qwen2_5_vl")
    prompts = mixed_prompts(policy, processor)

    def run(indices, G=4, seed=0, offset=0):
        r = rollout.sample(policy, [prompts[i] for i in indices], [i + offset for i in indices], num_generations=G,
                           max_completion_length=16, temperature=1.0, seed=seed)
        ids = [x[m].tolist() for x, m in zip(r.completion_ids, r.completion_mask)]
        return {(i, k): ids[j * G + k] for j, i in enumerate(indices) for k in range(G)}

    whole = run([0, 1, 2])
    assert run([0, 1, 2]) == whole
    assert run([2, 0]) == {key: whole[key] for key in whole if key[0] != 1}
    assert run([1], G=2) == {key: whole[key] for key in ((1, 0), (1, 1))}
    assert run([0, 1, 2], seed=1) != whole and run([0, 1, 2], offset=3) != whole
    assert len({tuple(x) for x in whole.values()}) > 6  # the draws of a group differ


@pytest.mark.parametrize("family", few(["qwen2_5_vl", "idefics3", "llava_next", "gemma3", "qwen3"], "gemma3"))
def test_a_small_budget_changes_nothing(loaded, monkeypatch, family):
    """Seven prompts, two groups at a time: those that wait enter while others are at work, rows move into the places of
    those that have ended, slots are used again. Tokens, log-probs and masks are those of all groups at once; a row that
    took a neighbour's keys, prompt, position or noise along would differ."""
    policy, processor = loaded(family)
    images = 3 if hasattr(processor, "image_processor") else 1
    rows = [make_row(i % images, i, "how many shapes are there? " * (1 + i % 4)) for i in range(7)]
    prompts = encode(policy, processor, *rows)
    monkeypatch.setattr(policy, "eos_ids", list(range(100, 116)))
    kwargs = dict(num_generations=3, max_completion_length=28, temperature=1.2, seed=1)
    whole = rollout.sample(policy, prompts, list(range(7)), **kwargs)
    assert len(set(whole.completion_mask.sum(-1).tolist())) > 5
    longest = -(-max(len(p.tokens) for p in prompts) // 8) * 8  # as memory is laid out
    prefills, caches, forward, cache = [], [], policy.hidden, rollout.GroupCache
    monkeypatch.setattr(policy, "hidden", lambda ids, *a, **k: (prefills.append(len(ids)) if ids.shape[1] > 1 else None,
                                                                forward(ids, *a, **k))[1])
    monkeypatch.setattr(rollout, "GroupCache", lambda *sizes: (caches.append(sizes[:4]), cache(*sizes))[1])
    for budget in (1, 2 * (2 * longest + 3 * 32)):
        prefills.clear()
        part = rollout.sample(policy, prompts, list(range(7)), rollout_tokens=budget, **kwargs)
        assert sum(prefills) == 7 and max(prefills) == (1 if budget == 1 else 2)
        slots, rows, S, T = caches.pop()
        assert budget == 1 or slots * S + rows * T <= budget
        for name in ("completion_ids", "completion_mask", "truncated"):
            assert torch.equal(getattr(part, name), getattr(whole, name)), name
        close_to_scale(part.sampling_logps, whole.sampling_logps)
    exact = max(len(p.tokens) for p in prompts)
    rollout.sample(policy, prompts, list(range(7)), rollout_tokens=3 * (2 * exact + 3 * 28), **kwargs)
    slots, rows, S, T = caches.pop()
    assert slots * S + rows * T <= 3 * (2 * exact + 3 * 28), "sizes rounded up are within the budget, too"
    monkeypatch.setattr(rollout, "PREFILL_TOKENS", 2 * exact)
    prefills.clear()
    assert torch.equal(rollout.sample(policy, prompts, list(range(7)), **kwargs).completion_ids, whole.completion_ids)
    assert prefills == [2, 2, 2, 1]


def test_sizes_rounded_up_change_nothing(loaded, monkeypatch):
    """What a CUDA graph needs, checked without one: rows of nobody, places of nobody and columns of nothing yet are
    computed beside the real ones, and leave no trace in them; index tensors keep their memory."""
    policy, processor = loaded("qwen2_5_vl")
    prompts = mixed_prompts(policy, processor)
    monkeypatch.setattr(policy, "eos_ids", list(range(100, 116)))
    kwargs = dict(num_generations=5, max_completion_length=30, temperature=1.2, seed=1)
    plain = rollout.sample(policy, prompts, [0, 1, 2], **kwargs)
    shapes, pointers, step = set(), set(), rollout.GroupCache.attend

    def attend(cache, layer, query, own_bias, *rest):
        pointers.add((cache.rows_of_slot.data_ptr(), cache.cell_of_row.data_ptr()))
        shapes.add((len(query), own_bias.shape[-1], cache.rows_of_slot.shape))
        return step(cache, layer, query, own_bias, *rest)

    monkeypatch.setattr(rollout.GroupCache, "attend", attend)
    monkeypatch.setattr(rollout, "CUDA_GRAPHS", False)
    monkeypatch.setitem(rollout.BUCKETS, "cpu", (1, 1, 1))
    exact = rollout.sample(policy, prompts, [0, 1, 2], **kwargs)
    assert {w for _, w, _ in shapes} == set(range(1, 30))
    shapes.clear(), pointers.clear()
    monkeypatch.setitem(rollout.BUCKETS, "cpu", (4, 8, 8))
    rounded = rollout.sample(policy, prompts, [0, 1, 2], **kwargs)
    assert {n for n, *_ in shapes} == {4, 8, 12, 15} and {w for _, w, _ in shapes} == {8, 16, 24, 32}
    assert {places for *_, places in shapes} == {(3, 5)} and len(pointers) == 1
    for other in (plain, rounded):
        for name in ("completion_ids", "completion_mask", "truncated"):
            assert torch.equal(getattr(other, name), getattr(exact, name)), name
        close_to_scale(other.sampling_logps, exact.sampling_logps)


class Graph(TorchDispatchMode):
    """torch.cuda.CUDAGraph's rules on a CPU: capturing changes nothing, a replay runs the same kernels on the same memory,
    whatever Python's names hold by then, and what makes the host wait cannot be captured."""

    def __init__(self):
        super().__init__()
        self.calls, self.undo = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.isin  # which sorts ten ids or more
        assert func.overloadpacket not in waits, f"{func} waits"
        for value, about in zip(args, func._schema.arguments):
            if about.alias_info is not None and about.alias_info.is_write:
                self.undo.append((value, value.clone()))
        out = func(*args, **(kwargs or {}))
        # Aliases: a graph knows memory, and not the parameter whose `.data` may stand elsewhere later.
        stored = tree_map_only(torch.Tensor, lambda x: x.detach(), (args, kwargs or {}))
        self.calls.append((func, *stored, out))
        return out

    def __exit__(self, *error):
        super().__exit__(*error)
        for tensor, before in reversed(self.undo):
            tensor.copy_(before)

    def replay(self):
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs))):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.mark.parametrize("family", few(["qwen2_5_vl", "qwen3_vl_moe", "gemma3", "idefics3"], "qwen2_5_vl"))
def test_replayed_steps_change_nothing(loaded, monkeypatch, family):
    """The decode step as a CUDA graph, with a graph's rules on a CPU, while prompts wait: the batch shrinks, grows back to
    a size whose graph was captured before, and must find its index tensors where that graph reads them."""
    policy, processor = loaded(family)
    prompts = mixed_prompts(policy, processor) * 2
    monkeypatch.setattr(policy, "eos_ids", list(range(100, 116)))
    budget = 2 * (2 * max(len(p.tokens) for p in prompts) + 3 * 24)  # two groups at a time
    kwargs = dict(num_generations=3, max_completion_length=24, temperature=1.2, seed=1, rollout_tokens=budget)
    plain = rollout.sample(policy, prompts, list(range(6)), **kwargs)
    replays, replay = [], Graph.replay
    monkeypatch.setitem(rollout.BUCKETS, "cpu", (2, 8, 8))
    monkeypatch.setitem(rollout.CHECK_EVERY, "cpu", 3)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: graph)
    monkeypatch.setattr(Graph, "replay", lambda graph: (replays.append(graph), replay(graph)))
    replayed = rollout.sample(policy, prompts, list(range(6)), **kwargs)
    assert len(replays) > 10 and any(a is not b and a in replays[i + 2:] for i, (a, b) in enumerate(zip(replays, replays[1:])))
    for name in ("completion_ids", "completion_mask", "truncated"):
        assert torch.equal(getattr(replayed, name), getattr(plain, name)), name
    close_to_scale(replayed.sampling_logps, plain.sampling_logps)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_wait_are_not_captured(tmp_path, monkeypatch, kind):
    """InternVL3's rotary frequencies follow the longest position, for which every forward waits: not in a CUDA graph."""
    more = dict(factor=2.0) if kind == "dynamic" else dict(
        short_factor=[1.0] * 8, long_factor=[2.0] * 8, original_max_position_embeddings=1024, factor=2.0)
    build_tiny_text(tmp_path / "model", "Llama", rope_parameters=dict(rope_type=kind, rope_theta=10000.0, **more))
    policy, processor = model.load_policy(str(tmp_path / "model"))
    prompts = encode(policy, processor, *[make_row(0, i) for i in range(3)])
    kwargs = dict(num_generations=2, max_completion_length=12, temperature=1.0, seed=0)
    plain = rollout.sample(policy, prompts, [0, 1, 2], **kwargs)
    monkeypatch.setitem(rollout.BUCKETS, "cpu", (2, 8, 8))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: graph)
    assert torch.equal(rollout.sample(policy, prompts, [0, 1, 2], **kwargs).completion_ids, plain.completion_ids)


def test_bf16_weights_come_and_go(folders):
    """In bf16 the sampler's forwards run on weights cast once, and packed where oneDNN can, which are the fp32 masters
    again afterwards, bit for bit, also when the rollout is interrupted, with the modules' own forwards; log-probs stay near
    the trainer's."""
    policy, processor = model.load_policy(str(folders["qwen2_5_vl"]), "bfloat16")
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    forwards = [vars(module).get("forward") for module in policy.hf.modules()]
    seen, prompts = set(), mixed_prompts(policy, processor)
    policy.hf.get_decoder().layers[0].mlp.register_forward_hook(
        lambda module, *_: seen.add((module.gate_proj.weight.dtype, "forward" in vars(module.gate_proj))))
    kwargs = dict(num_generations=4, max_completion_length=12, temperature=1.0, seed=0)
    sampled = rollout.sample(policy, prompts, [0, 1, 2], **kwargs)
    assert seen == {(torch.bfloat16, torch.ops.mkldnn._is_mkldnn_bf16_supported())}
    with pytest.raises(rollout.Interrupted):
        rollout.sample(policy, prompts, [0, 1, 2], stop=lambda: True, **kwargs)
    policy.train()
    gap = (rescored(policy, prompts, sampled, 4, 1.0) - sampled.sampling_logps)[sampled.completion_mask].abs()
    assert 0 < gap.mean() < 0.05
    for name, p in policy.named_parameters():
        assert p.dtype == torch.float32 and torch.equal(p, before[name]), name
    for module, forward in zip(policy.hf.modules(), forwards, strict=True):
        assert vars(module).get("forward") is forward and "product" not in vars(module)


def test_sampling_leaves_no_trace(loaded):
    """The mode is restored and a training forward after a rollout is what it was before (stale rope_deltas, caches)."""
    policy, processor = loaded("qwen2_5_vl")
    prompts = mixed_prompts(policy, processor)
    groups = [(p, [torch.tensor([20, 21, policy.eos_ids[0]])]) for p in prompts]
    before = policy(model.pack_groups(groups, policy.pad_id))[0]
    assert policy.training
    rollout.sample(policy, prompts[:1], [0], num_generations=3, max_completion_length=9, temperature=1.0, seed=0)
    assert policy.training and torch.equal(policy(model.pack_groups(groups, policy.pad_id))[0], before)


def test_sampling_distribution():
    """P7: 200,000 draws of the loop's own uniforms against the softmax, chi-square; a zero-probability id never."""
    logits = torch.tensor([1.0, -1e30, 0.0, 2.0, -3.0, -1e30])
    n = 200_000
    u = rollout.keyed_uniform(7, torch.arange(n // 100)[:, None], torch.arange(100)[None], torch.tensor(0)).flatten()
    counts = torch.bincount(rollout.sample_tokens(logits.expand(n, -1), u, block=4)[0], minlength=6).double()
    expected = n * logits.softmax(-1).double()
    assert (counts[[1, 5]] == 0).all()
    live = expected > 0
    chi2 = ((counts - expected)[live] ** 2 / expected[live]).sum()
    assert chi2 < 30.66  # 3 degrees of freedom, p = 1e-6


CHI2 = {1: 23.93, 2: 27.64, 3: 30.67, 4: 33.38, 5: 35.89, 6: 38.26}  # at p = 1e-6, by degrees of freedom


@pytest.mark.parametrize("options", [dict(top_k=3), dict(top_p=0.8), dict(min_p=0.2), dict(top_k=5, top_p=0.7, min_p=0.1),
                                     dict(top_p=0.999), dict()])
@pytest.mark.parametrize("temperature", [0.7, pytest.param(1.6, marks=pytest.mark.slow)])
def test_narrowed_sampling_distribution(options, temperature):
    """P7: 200,000 draws with temperature, top-k, top-p and min-p against the softmax of the ids that transformers' own
    warpers keep, chi-square; no other id is ever drawn."""
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers = dict(top_k=TopKLogitsWarper, top_p=TopPLogitsWarper, min_p=MinPLogitsWarper)
    logits = torch.tensor([[0.3, 2.0, -1.0, 1.5, -3.0, 0.9, -1e30]]) / temperature
    expected = logits
    for name in ("top_k", "top_p", "min_p"):
        expected = warpers[name](options[name])(None, expected) if name in options else expected
    expected = expected.double().softmax(-1)[0]
    kept = rollout.keep_likely(logits, **options)
    torch.testing.assert_close(kept.double().softmax(-1)[0], expected, atol=1e-9, rtol=0)
    n, zero = 200_000, torch.zeros((), dtype=torch.long)
    uniforms = rollout.keyed_uniform(3, torch.arange(n), zero, zero)
    counts = torch.bincount(rollout.sample_tokens(logits.expand(n, -1), uniforms, **options, block=4)[0], minlength=7)
    live = expected > 0
    assert (counts[~live] == 0).all() and (2 <= live.sum() <= 6)
    assert ((counts - n * expected)[live] ** 2 / (n * expected[live])).sum() < CHI2[int(live.sum()) - 1]


def test_narrowing_changes_the_draw_and_not_the_log_probs(loaded):
    """top_k=1 is greedy at any temperature, and its log-probs are still those of the whole softmax, the trainer's."""
    policy, processor = loaded("qwen2_5_vl")
    prompts = mixed_prompts(policy, processor)
    kwargs = dict(num_generations=2, max_completion_length=6, seed=0)
    greedy = rollout.sample(policy, prompts, [0, 1, 2], temperature=0, **kwargs)
    for narrow in (dict(top_k=1), dict(top_p=1e-6), dict(min_p=1.0)):
        narrowed = rollout.sample(policy, prompts, [0, 1, 2], temperature=1.3, **narrow, **kwargs)
        assert torch.equal(narrowed.completion_ids, greedy.completion_ids)
        close_to_scale(narrowed.sampling_logps, rescored(policy, prompts, narrowed, 2, 1.3))


@pytest.mark.parametrize("vocabulary", [5, 256, 300, 1024])
def test_blocks_are_one_cdf(vocabulary):
    """The block-wise inverse CDF is the plain one, at sizes that fill blocks and that do not, with whole blocks of
    probability 0; its log-prob is log_softmax's. Also at the uniforms where one block ends and the next begins."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn(40, vocabulary, generator=generator)
    logits[:, vocabulary // 3:2 * vocabulary // 3 + 1] = -1e30
    cdf = logits.double().softmax(-1).cumsum(-1)
    edges = cdf[torch.arange(40), torch.randint(vocabulary, (40,), generator=generator)]
    for u in (torch.rand(40, generator=generator, dtype=torch.float64), (edges - 1e-9).clamp(0, 1 - 2.0**-52),
              (edges + 1e-9).clamp(0, 1 - 2.0**-52), torch.zeros(40, dtype=torch.float64),
              torch.full((40,), 1 - 2.0**-52, dtype=torch.float64)):
        token, logp = rollout.sample_tokens(logits, u)
        assert (logits[torch.arange(40), token] > -1e29).all()
        below = torch.where(token > 0, cdf.gather(-1, (token - 1).clamp(min=0)[:, None])[:, 0], 0.0)
        above = cdf.gather(-1, token[:, None])[:, 0]
        assert ((below - 1e-6 <= u) & (u <= above + 1e-6)).all()  # fp32 exponentials, an fp64 sum
        torch.testing.assert_close(logp, logits.log_softmax(-1).gather(-1, token[:, None])[:, 0], atol=2e-6, rtol=1e-6)
    assert torch.equal(rollout.sample_tokens(logits, None)[0], logits.argmax(-1))


def test_uniform_ends():
    """u = 0 must not give a masked first id, the largest u must not run off the end or give a masked last one."""
    logits = torch.tensor([[-1e30, 0.3, 0.1, -1e30]])
    assert rollout.sample_tokens(logits, torch.tensor([0.0], dtype=torch.float64))[0].item() == 1
    assert rollout.sample_tokens(logits, torch.tensor([1 - 2.0**-52], dtype=torch.float64))[0].item() == 2


def test_each_token_is_drawn_by_its_own_uniform(loaded):
    """Closed form: token t of completion k is where the CDF of the trainer's own softmax passes keyed_uniform(seed, draw, k,
    t). Guards against a uniform that two tokens share, which no log-prob and no mean of a token shows."""
    policy, processor = loaded("qwen2_5_vl")
    prompts, draws = mixed_prompts(policy, processor), [4, 9, 2]
    sampled = rollout.sample(policy, prompts, draws, num_generations=3, max_completion_length=6, temperature=1.0, seed=7)
    checked = 0
    for n, (ids, mask) in enumerate(zip(sampled.completion_ids, sampled.completion_mask)):
        batch = model.pack_groups([(prompts[n // 3], [ids[mask]])], policy.pad_id, True)
        with torch.no_grad():
            hidden = policy.hidden(batch["input_ids"], batch["position_ids"], model.attention_mask_of(batch), batch["pixels"])
            cdf = policy.logits(hidden[0, batch["logit_index"][0]], 1.0).double().softmax(-1).cumsum(-1)  # (t, V)
        for t, token in enumerate(ids[mask].tolist()):
            u = rollout.keyed_uniform(7, torch.tensor(draws[n // 3]), torch.tensor(n % 3), torch.tensor(t)).item()
            assert (cdf[t, token - 1] if token else 0) - 1e-5 <= u <= cdf[t, token] + 1e-5, (n, t)
            checked += 1
    assert checked > 30


@pytest.mark.parametrize("value, message", [
    (float("nan"), r"first in the output of model\.language_model\.layers\.1\.mlp\.up_proj, whose weight holds nan or inf"),
    (3e38, r"first in the output of model\.language_model\.layers\.1\.mlp\.\w+, whose weights are finite in torch.float32")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_one_line(folders, value, message, temperature):
    """A weight that is nan was an index error in the sampler, on a GPU an assertion of the device: it names the layer where
    it begins, and the weight, if it is one."""
    policy, processor = model.load_policy(str(folders["qwen2_5_vl"]))
    layer = policy.hf.model.language_model.layers[1].mlp.up_proj
    with torch.no_grad():
        layer.weight.mul_(value)
    with pytest.raises(model.InputError, match="the model's logits are not finite: " + message):
        rollout.sample(policy, encode(policy, processor, make_row(1)), [0], num_generations=2, max_completion_length=3,
                       temperature=temperature, seed=0)


def test_keyed_uniforms_are_uniform_and_keyed():
    """Moments and distinctness over each of the four keys; a hash that ignores one would repeat its numbers."""
    for axis in range(4):
        keys = [torch.tensor(5)] * 4
        keys[axis] = torch.arange(50_000)
        u = torch.stack([rollout.keyed_uniform(int(s), *keys[1:]) for s in range(2000)]) if axis == 0 else \
            rollout.keyed_uniform(5, *keys[1:])
        assert len(u.unique()) == u.numel() and 0 <= u.min() and u.max() < 1
        assert abs(u.mean() - 0.5) < 4 * math.sqrt(1 / 12 / u.numel())
        assert abs((u[1:] - 0.5).dot(u[:-1] - 0.5) / u.numel()) < 4 / 12 / math.sqrt(u.numel())


def test_splitmix_reference_value():
    """The published first outputs of splitmix64 with seed 1234567: the int64 arithmetic wraps as uint64 does."""
    state, outputs = 1234567, [6457827717110365317, 3203168211198807973, 9817491932198370423]
    for expected in outputs:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        signed = state - 2**64 if state >= 2**63 else state
        assert int(rollout._mix(torch.tensor(signed))) % 2**64 == expected


def test_rng_state_is_untouched(loaded):
    """No generator state to save: torch's own is not consumed."""
    policy, processor = loaded("qwen2_5_vl")
    state = torch.get_rng_state()
    random.seed(0)
    rollout.sample(policy, mixed_prompts(policy, processor)[:1], [0], num_generations=2, max_completion_length=4,
                   temperature=1.0, seed=0)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("family", VISION)
def test_prompt_and_image_are_prefilled_once_per_group(loaded, family):
    """The vision tower sees each picture once and the language model each prompt once, however many completions."""
    policy, processor = loaded(family)
    prompts, pictures, tokens = mixed_prompts(policy, processor), [], []
    tower = policy.hf.get_encoder(modality="image")
    hooks = [tower.register_forward_hook(lambda *_: pictures.append(1)),
             policy.hf.get_decoder().layers[0].register_forward_pre_hook(
                 lambda _, args, kwargs: tokens.append((args[0] if args else kwargs["hidden_states"]).shape[:2]),
                 with_kwargs=True)]
    try:
        rollout.sample(policy, prompts, [0, 1, 2], num_generations=5, max_completion_length=4, temperature=1.0, seed=0)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(pictures) == 1
    assert tokens[0] == (3, max(len(p.tokens) for p in prompts))  # the prefill: one row a prompt
    assert all(shape[1] == 1 and shape[0] <= 15 for shape in tokens[1:])

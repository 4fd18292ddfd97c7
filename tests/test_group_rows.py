"""A packed group is its repeated rows: log-probs, gradients, and what is computed once."""

import inspect
import itertools
import random
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES, VISION, close_to_scale, few, make_group
from torch.nn.attention.flex_attention import create_mask, flex_attention

import model

# (images in the prompt, lengths of the completions) of each group
BATCHES = {
    "one image": [(1, [4, 7, 1])],
    "no image": [(0, [3, 5])],
    "two images": [(2, [6, 2, 9])],
    "mixed, uneven, padded": [(1, [5, 3]), (0, [2, 8, 4]), (2, [1, 6])],
    "long and short": [(1, [40, 7]), (2, [60, 60]), (1, [5])],
}


def groups_of(policy, processor, batch):
    return [make_group(policy, processor, images, lengths, seed=i) for i, (images, lengths) in enumerate(batch)]


def transformers_logps(policy, group, temperature):
    """The oracle: every completion behind its own prompt through transformers' own forward, alone, unpadded, without
    position_ids or mask, with its own attention, and a plain log_softmax over all logits. -> [(len,), ...]"""
    prompt, completions = group
    logps, text_config = [], policy.hf.config.get_text_config()
    for ids in completions:
        tokens = torch.cat([prompt.tokens, ids])[None]
        inputs = dict(input_ids=tokens, **prompt.pixels)
        for name in ("mm_token_type_ids", "token_type_ids"):  # Qwen-VL's, Gemma 3's
            if prompt.pixels and name in inspect.signature(policy.hf.forward).parameters:
                inputs[name] = (tokens == policy.hf.config.image_token_id).int()
        text_config._attn_implementation = "sdpa"
        logits = policy.hf(**inputs).logits[0, len(prompt.tokens) - 1:-1] / temperature
        text_config._attn_implementation = "flatpo"
        logits[:, policy.never_sampled] = -torch.inf
        logps.append(logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0])
    return logps


def gradients(policy, loss):
    policy.zero_grad()
    loss.backward()
    found = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    return found


def assert_same_gradients(a, b):
    """Each to its own scale; a gradient that is 0 but for rounding (a key's bias) to a thousandth of the largest there is."""
    assert a.keys() == b.keys()
    largest = max(grad.abs().max().item() for grad in b.values())
    for name in a:
        close_to_scale(a[name], b[name], 4e-5, 1e-3 * largest, name)


@pytest.mark.parametrize("one_row", [False, True], ids=["row each", "one row"])
@pytest.mark.parametrize("batch", few(BATCHES.values(), BATCHES["mixed, uneven, padded"]), ids=BATCHES.keys())
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_transformers_one_by_one(loaded, family, batch, one_row):
    """Guards the mask, the M-RoPE positions, the gather index and the image order: a completion that sees its sibling,
    a position off by one, the wrong prompt's image or padding that leaks changes log-probs and gradients."""
    policy, processor = loaded(family)
    groups = groups_of(policy, processor, batch)
    packed = model.pack_groups(groups, policy.pad_id, one_row)
    assert len(packed["input_ids"]) == (1 if one_row else len(groups))
    logps, *_ = policy(packed, temperature=0.7)
    expected = [x for group in groups for x in transformers_logps(policy, group, 0.7)]
    weights = [torch.randn(len(x), generator=torch.Generator().manual_seed(i)) for i, x in enumerate(expected)]
    for n, reference in enumerate(expected):
        assert packed["completion_mask"][n].sum() == len(reference)
        close_to_scale(logps[n, :len(reference)], reference)
        assert (logps[n, len(reference):] == 0).all()
    ours = gradients(policy, sum((w * logps[n, :len(w)]).sum() for n, w in enumerate(weights)))
    theirs = gradients(policy, sum((w * x).sum() for w, x in zip(weights, expected)))
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_segments_are_the_dense_mask(loaded, batch):
    """Attention over segments and over the whole row under the mask are one function, in hidden states and gradients,
    for a row each and one row: a completion cut at the wrong token, or a prompt that attends forward, differs. The mask
    that goes with segments hides all and takes no memory: (S, S) of it were more than half of a forward pass of 9,000."""
    policy, processor = loaded("qwen2_5_vl")
    groups = groups_of(policy, processor, batch)
    for one_row in (False, True):
        packed = model.pack_groups(groups, policy.pad_id, one_row)
        dense = model.group_attention_mask(packed["segment_ids"], packed["group_ids"])
        used = packed["logit_index"][packed["completion_mask"]]
        found = []
        for mask in (dense, model.attention_mask_of(packed)):
            assert hasattr(mask, "segments") == (mask is not dense)
            assert mask.shape == dense.shape and (mask is dense or mask.untyped_storage().nbytes() == 1 and not mask.any())
            hidden = policy.hidden(packed["input_ids"], packed["position_ids"], mask, packed["pixels"]).flatten(0, 1)
            loss = (hidden[used] * torch.linspace(-1, 1, hidden.shape[1])).sum()
            found.append((hidden[used].detach(), gradients(policy, loss)))
        close_to_scale(found[0][0], found[1][0], 1e-5)
        assert_same_gradients(found[0][1], found[1][1])


@pytest.mark.parametrize("window", [None, pytest.param(9, marks=pytest.mark.slow)])
@pytest.mark.parametrize("images", few([False, True], True), ids=["causal", "images see all of themselves"])
def test_block_mask_is_the_dense_mask(images, window):
    """The GPU's form, held to the rule on a CPU: a block left out would hide tokens, one called whole that is not would
    show them, and neither is an error on a GPU. Little may be listed that is empty (images: some is;
    windows: more)."""
    rng, listed, needed, whole, called_whole = random.Random(0), 0, 0, 0, 0
    for case in range(6):
        groups = []
        for _ in range(rng.randint(1, 5)):
            P, lengths = rng.choice((3, 24, 40, 61)), [rng.choice((1, 8, 9, 24, 50)) for _ in range(rng.randint(0, 4))]
            image_ids = torch.arange(P) // rng.choice((2, 5, 11)) - 1 if images else None
            prompt = model.Prompt(torch.arange(P), torch.arange(P)[None], {}, {}, image_ids)
            groups.append((prompt, [torch.ones(n, dtype=torch.long) for n in lengths]))
        batch = model.pack_groups(groups, 0, one_row=case % 2 == 0)
        ids = batch["segment_ids"], batch["group_ids"], batch["image_ids"]
        dense, (B, S) = model.group_attention_mask(*ids)[:, 0], ids[0].shape
        offsets = torch.zeros(B, S, dtype=torch.long)
        for b, row in enumerate(batch["segments"]):
            places = [i for P, lengths in row for i in (*range(P), *(P + i for n in lengths for i in range(n)))]
            offsets[b, :len(places)] = torch.tensor(places)
        assert torch.equal(batch["offsets"], offsets)
        if window is not None:
            dense &= offsets[:, :, None] - offsets[:, None] < window
        mask = model.group_block_mask(*ids, offsets, window=window, block=8)
        torch.testing.assert_close(create_mask(mask.mask_mod, B, None, S, S, device="cpu")[:, 0], dense)
        blocks = F.pad(dense, (0, -S % 8, 0, -S % 8)).unflatten(1, (-1, 8)).unflatten(-1, (-1, 8))   # (B, n, 8, n, 8)
        full = torch.zeros(B, *2 * [blocks.shape[1]], dtype=torch.bool)
        for b, i in itertools.product(range(B), range(blocks.shape[1])):
            full[b, i, mask.full_kv_indices[b, 0, i, :mask.full_kv_num_blocks[b, 0, i]]] = True
        some = mask.to_dense()[:, 0].bool()
        assert blocks.amax((2, 4))[~some].sum() == 0 and blocks.amin((2, 4))[full].all()
        listed, needed = listed + int(some.sum()), needed + int(blocks.amax((2, 4)).sum())
        called_whole, whole = called_whole + int(full.sum()), whole + int(blocks.amin((2, 4)).sum())
        query, key, value = torch.randn(3, B, 2, S, 4, generator=torch.Generator().manual_seed(case)).unbind()
        theirs = F.scaled_dot_product_attention(query, key, value, dense[:, None])
        torch.testing.assert_close(flex_attention(query, key, value, block_mask=mask), theirs, atol=1e-5, rtol=1e-5)
    assert window or listed <= (1.7 if images else 1.1) * needed and called_whole >= 0.9 * whole


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles FlexAttention for a CPU with g++")
def test_compiled_flex_attention_is_the_dense_mask(loaded):
    """The GPU's path through transformers, compiled for a CPU, which computes listed blocks only (eager FlexAttention
    looks at the rule alone): hidden states under the block mask and under the dense one are the same."""
    policy, processor = loaded("qwen2_5_vl")
    groups = groups_of(policy, processor, [(2, [200, 300]), (1, [40, 7, 300])])
    packed = model.pack_groups(groups, policy.pad_id, True)
    ids, used = (packed["segment_ids"], packed["group_ids"]), packed["logit_index"][packed["completion_mask"]]
    masks = model.group_block_mask(*ids), model.group_attention_mask(*ids)
    assert 0 < masks[0].full_kv_num_blocks.sum() and masks[0].sparsity() > 30
    with torch.no_grad():
        flex, dense = (policy.hidden(packed["input_ids"], packed["position_ids"], mask, packed["pixels"])[0, used]
                       for mask in masks)
    close_to_scale(flex, dense, 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prompt_equals_plain_form(loaded, family):
    """Each completion behind its own prompt (`Policy.pack` without share_prompt) is the same function."""
    policy, processor = loaded(family)
    groups = groups_of(policy, processor, BATCHES["mixed, uneven, padded"])
    plain = [(prompt, [ids]) for prompt, completions in groups for ids in completions]
    shared, *_ = policy(model.pack_groups(groups, policy.pad_id, True))
    repeated, *_ = policy(model.pack_groups(plain, policy.pad_id, True))
    close_to_scale(shared, repeated)


@pytest.mark.parametrize("family", VISION)
def test_image_is_encoded_once_per_group(loaded, family):
    """Guards the point of the group row: G copies of an image in the vision tower."""
    policy, processor = loaded(family)
    groups = groups_of(policy, processor, [(1, [3] * 8), (2, [4] * 8)])
    seen = []
    tower = policy.hf.get_encoder(modality="image")
    hook = tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["pixel_values"]), with_kwargs=True)
    try:
        batch = model.pack_groups(groups, policy.pad_id, True)
        policy(batch)
    finally:
        hook.remove()
    assert len(seen) == 1  # one call for the whole batch,
    single = sum(policy_input(family, prompt) for prompt, _ in groups)
    assert len(seen[0]) == single  # with each of its three pictures in it once
    prompt_tokens = sum(len(p.tokens) for p, _ in groups)
    assert (batch["segment_ids"] == 0).sum() == prompt_tokens


def policy_input(family, prompt):
    """How many rows the vision tower gets for one prompt: patches (Qwen), pictures, or tiles, less the padding."""
    pixels = prompt.pixels["pixel_values"]
    if family.startswith("llava_") and len(pixels) == 2:  # of unequal pictures
        return int(pixels.abs().sum((2, 3, 4)).count_nonzero()) if family == "llava_next" else len(pixels)
    return pixels[0].shape[0] if family in ("idefics3", "llava_next", "llava_onevision") else len(pixels)


def test_pixels_matter(loaded):
    """Guards silent image loss: another picture must change the log-probs, swapping two pictures must swap them."""
    policy, processor = loaded("qwen2_5_vl")
    (a, ids), (b, _) = (make_group(policy, processor, 1, [5], seed=s, text="a <image> b") for s in (0, 4))
    assert a.tokens.shape == b.tokens.shape, "pick two seeds of the same picture size"
    scored = policy(model.pack_groups([(a, ids), (b, ids)], policy.pad_id))[0]
    swapped = policy(model.pack_groups([(b, ids), (a, ids)], policy.pad_id))[0]
    assert (scored[0] - scored[1]).abs().max() > 1e-3
    close_to_scale(scored, swapped.flip(0))


def test_gradient_only_where_trained(loaded):
    """P12: the logits' gradient is zero on prompt, image and padding, non-zero on EOS."""
    policy, processor = loaded("qwen2_5_vl")
    groups = groups_of(policy, processor, BATCHES["mixed, uneven, padded"])
    batch = model.pack_groups(groups, policy.pad_id)
    caught = []
    hidden = policy.hidden

    def spy(*args, **kwargs):
        out = hidden(*args, **kwargs)
        out.retain_grad()
        caught.append(out)
        return out

    policy.hidden = spy
    try:
        policy(batch)[0].sum().backward()
    finally:
        del policy.hidden
        policy.zero_grad()
    grad = caught[0].grad.abs().sum(-1).flatten()                               # (B * S,)
    used = torch.zeros_like(grad, dtype=torch.bool)
    used[batch["logit_index"][batch["completion_mask"]]] = True
    assert (grad[used] > 0).all() and (grad[~used] == 0).all()
    ends = batch["completion_mask"].sum(-1) - 1
    assert (grad[batch["logit_index"][torch.arange(len(ends)), ends]] > 0).all()


@pytest.mark.parametrize("tokens", [1, 5, 64])
def test_chunked_logps_value_and_gradient(tokens):
    """Guards the hand-written backward (log-prob and entropy, temperature, excluded ids, a last partial chunk), and
    the value of log sum p^2, which has no gradient."""
    torch.manual_seed(tokens)
    hidden = torch.randn(tokens, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    targets, never = torch.randint(0, 9, (tokens,)), torch.tensor([9, 10])

    def reference(h, w):
        logits = (h @ w.T / 1.3)[:, :9]
        log_p = logits.log_softmax(-1)
        return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1), (2 * log_p).logsumexp(-1)

    a, b = torch.randn(tokens), torch.randn(tokens)
    results = []
    for function in (lambda h, w: model.ChunkedLogps.apply(h, w, targets, never, 1.3, 4, True, True), reference):
        logps, entropy, log_sum_sq = function(hidden, weight)
        grads = torch.autograd.grad((a * logps).sum() + (b * entropy).sum(), (hidden, weight))
        results.append((logps.float(), entropy.float(), log_sum_sq.float(), *(g.float() for g in grads)))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("entropy", [False, True])
def test_a_frozen_head_costs_two_products(monkeypatch, entropy):
    """With LoRA the forward keeps d logp / dh, and the backward computes no logits again; only an entropy term needs
    them. The gradient is the same; a lost temperature or sign would show."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(10, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True)
    targets, never, a = torch.randint(0, 9, (10,)), torch.tensor([9, 10]), torch.randn(10)
    grads, chunks, scaled = [], [], model.scaled_logits
    monkeypatch.setattr(model, "scaled_logits", lambda *x: (chunks.append(1), scaled(*x))[1])
    for head in (weight, weight.detach()):
        logps, entropies, _ = model.ChunkedLogps.apply(hidden, head, targets, never, 1.3, 4, True, False)
        del chunks[:]
        loss = (a * logps).sum() + (a * entropies).sum() if entropy else (a * logps).sum()
        grads.append(torch.autograd.grad(loss, hidden)[0])
        assert len(chunks) == (3 if entropy or head is weight else 0)
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-5)


def test_chunked_logps_in_bf16():
    """In bf16 the head multiplies bf16 values, and its logits are summed, kept and normalised in fp32: rounded to bf16,
    they differed in sampler and trainer by 0.01 nats a token. Also in the backward."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 64).bfloat16().requires_grad_(), torch.randn(11, 64, requires_grad=True)
    targets = torch.randint(0, 9, (9,))
    logps, *_ = model.ChunkedLogps.apply(hidden, weight, targets, torch.tensor([9, 10]), 1.0, 4, True, False)
    logits = (hidden.double() @ weight.bfloat16().double().T)[:, :9]
    expected = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    assert logps.dtype == torch.float32 and (logps - expected).abs().max() < 1e-5
    rounded = logits.bfloat16().double().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    assert (rounded - expected).abs().max() > 1e-3, "rounding the logits would show"
    ours = torch.autograd.grad(logps.sum(), (hidden, weight))
    theirs = torch.autograd.grad(expected.sum(), (hidden, weight))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.double(), b.double(), atol=1e-2, rtol=1e-2)


def test_full_logits_never_exist(loaded):
    """Guards the memory claim: no tensor of (tokens, vocabulary) beyond a chunk is made in forward or backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    policy, processor = loaded("qwen2_5_vl")
    vocabulary, chunk = policy.hf.get_output_embeddings().weight.shape[0], 4
    groups = groups_of(policy, processor, BATCHES["mixed, uneven, padded"])
    batch = model.pack_groups(groups, policy.pad_id)
    assert batch["completion_mask"].sum() > 2 * chunk
    largest = 0

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if torch.is_tensor(t) and t.dim() >= 2 and t.shape[-1] == vocabulary:
                    largest = max(largest, t[..., 0].numel())
            return out

    with Spy():
        policy(batch, chunk=chunk)[0].sum().backward()
    policy.zero_grad()
    assert 0 < largest <= max(chunk, policy.hf.config.text_config.hidden_size)  # hidden: the head's own (H, V) view


def test_attention_mask_rule():
    """The rule of model.py's docstring, entry by entry; padding sees only padding and itself."""
    segment = torch.tensor([[0, 0, 1, 2, 0, 1, -1]])
    group = torch.tensor([[0, 0, 0, 0, 1, 1, -1]])
    mask = model.group_attention_mask(segment, group)[0, 0]
    for q in range(7):
        for k in range(7):
            s, g = segment[0], group[0]
            expected = k <= q and g[k] == g[q] and (s[k] == 0 or s[k] == s[q])
            assert mask[q, k] == expected
    assert mask.any(-1).all()


@pytest.mark.parametrize("images", [False, True])
def test_a_window_hides_the_first_token_that_is_too_far(images):
    """Queries of 0 attend alike to all that they see, so values of 0 and 1 show what that is, at lengths around the window.
    The window once began to hide at two tokens too many without a test that noticed."""
    window = 5
    for longest in (window - 1, window, window + 1, window + 2):
        image_ids = torch.tensor([0, 0, -1]) if images else None
        prompt = model.Prompt(torch.arange(3), torch.arange(3)[None], {}, {}, image_ids)
        batch = model.pack_groups([(prompt, [torch.zeros(longest - 3, dtype=torch.long), torch.zeros(1, dtype=torch.long)])], 0)
        offsets, segments = batch["offsets"][0].tolist(), batch["segment_ids"][0].tolist()
        S = len(offsets)
        expected = torch.zeros(S, S)
        for q, k in itertools.product(range(S), repeat=2):
            near = k <= q and offsets[q] - offsets[k] < window or images and max(q, k) < 2
            expected[q, k] = near and segments[k] in (0, segments[q])
        q = torch.zeros(1, 2, S, S)
        seen, _ = model.group_attention(torch.nn.Module(), q, q, torch.eye(S).expand(1, 2, S, S), model.attention_mask_of(batch),
                                        scaling=1.0, sliding_window=window)
        torch.testing.assert_close(seen[0, :, 0], expected / expected.sum(-1, keepdim=True))


def test_windows_in_one_call_are_transformers_own(loaded):
    """The vision tower of pictures of several sizes (windows cut at their borders), value and gradient, against
    transformers' one call a window; and that the one call is what runs."""
    policy, processor = loaded("qwen2_5_vl")
    prompts = [make_group(policy, processor, 2, [1], seed=seed)[0] for seed in (1, 2, 5)]
    pixels = model.cat_pixels(prompts)
    tower, found = policy.hf.get_encoder(modality="image"), []
    assert tower.config._attn_implementation == "flatpo_flash"
    for name in ("flatpo_flash", "sdpa"):
        tower.config._attn_implementation = name
        try:
            out = policy.hf.get_image_features(pixels["pixel_values"], pixels["image_grid_thw"]).pooler_output
            out = torch.cat(out)
        finally:
            tower.config._attn_implementation = "flatpo_flash"
        loss = (out * torch.linspace(-1, 1, out.shape[1])).sum()
        found.append((out.detach(), gradients(policy, loss)))
    close_to_scale(found[0][0], found[1][0], 1e-5)
    assert_same_gradients(found[0][1], found[1][1])

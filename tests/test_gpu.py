"""What a CPU can hold of the GPU's path: one bf16 program, no waits for the device, graphs and memory that are kept."""

import copy
import traceback

import pytest
import torch
from conftest import FAMILIES, VISION, close_to_scale, few, make_group, make_row
from test_sampler import Graph, encode, mixed_prompts
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import data
import model
import rollout


@pytest.fixture(scope="module")
def in_bf16(folders, loaded):
    """in_bf16(family): a policy that computes in bf16, and its processor."""
    found = {}

    def load(family):
        loaded(family)  # or the test is skipped
        if family not in found:
            found[family] = model.load_policy(str(folders[family]), "bfloat16", gradient_checkpointing=True)
        return found[family]

    return load


@pytest.mark.parametrize("family", few(FAMILIES, "qwen2_5_vl", "gemma3", "qwen3_vl_moe"))
def test_bf16_is_one_program(in_bf16, family):
    """Under autocast one rank kept embeddings, norms and residual stream in fp32, where FSDP's ranks and the sampler had
    them in bf16: 85 % of the hidden values differed. Now every bit is that of weights that are bf16 throughout, and of
    transformers' own `model.to(bfloat16)` classes with gradients that reach the fp32 masters."""
    policy, processor = in_bf16(family)
    batch = policy.pack([make_group(policy, processor, i % 3, [9, 5], seed=i) for i in range(3)])
    parts = batch["input_ids"], batch["position_ids"], model.attention_mask_of(batch), batch["pixels"]
    hidden = policy.hidden(*parts)
    assert hidden.dtype == torch.bfloat16
    with torch.no_grad(), policy.compute_weights():
        assert torch.equal(hidden, policy.hidden(*parts))
    policy.zero_grad()
    policy(batch)[0].sum().backward()
    for name, p in policy.named_parameters():
        assert p.dtype == torch.float32 and (p.grad is None or p.grad.dtype == torch.float32), name
    assert sum(p.grad is not None and bool(p.grad.any()) for p in policy.parameters()) > 10


def test_bf16_layers_are_recomputed_alike(folders):
    """The masters are cast for each call of a module, in a recomputed layer too: gradients with and without gradient
    checkpointing are the same bits."""
    grads = []
    for recompute in (False, True):
        policy, processor = model.load_policy(str(folders["qwen2_5_vl"]), "bfloat16", gradient_checkpointing=recompute)
        batch = policy.pack([make_group(policy, processor, 1, [9, 5])])
        policy(batch)[0].sum().backward()
        grads.append([p.grad for p in policy.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a GPU, by the place in the code: {(file, function): count}."""

    OPERATIONS = [getattr(torch.ops.aten, name) for name in (
        "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "equal")]

    def __init__(self):
        super().__init__()
        self.seen = {}

    def count(self):
        ours = model.__file__.removesuffix("model.py")  # not all below it: an environment may stand there
        frames = [f for f in traceback.extract_stack()
                  if f.filename == ours + f.filename.rpartition("/")[2] or "/transformers/" in f.filename]
        if frames:
            place = frames[-1].filename.rpartition("/")[2], frames[-1].name
            self.seen[place] = self.seen.get(place, 0) + 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        by_mask = packet in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_) and any(
            x is not None and x.dtype == torch.bool for x in args[1])
        if packet in self.OPERATIONS or by_mask:
            self.count()
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        waits = self

        class Methods(TorchFunctionMode):  # on a CPU these read memory, and are no operation
            def __torch_function__(self, func, types, args=(), kwargs=None):
                if getattr(func, "__name__", "") in ("tolist", "cpu", "numpy"):
                    waits.count()
                return func(*args, **(kwargs or {}))

        self.methods = Methods()
        self.methods.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.methods.__exit__(*error)


@pytest.mark.parametrize("family", few(FAMILIES, "qwen2_5_vl", "gemma3", "qwen3_vl_moe", "llama"))
def test_a_training_pass_waits_for_nothing_of_ours(folders, loaded, family):
    """A GPU stood still about 105 times a micro-batch: 64 times for the lengths of the tower's windows, for boolean
    masks, for each metric. Left are transformers' own few of its tower, once a pass, and one for each list of windows."""
    loaded(family)  # or the test is skipped
    policy, processor = model.load_policy(str(folders[family]), gradient_checkpointing=True)
    batch = policy.pack([make_group(policy, processor, i % 3, [9, 5], seed=i) for i in range(3)])
    sums = {}
    with Waits() as waits:
        logps, entropies, _ = policy(batch)
        model.add_sums(sums, {"entropy": (entropies.detach().sum(), batch["completion_mask"].sum())})
        logps.sum().backward()
    ours = {place: n for place, n in waits.seen.items() if place[0] in ("model.py", "losses.py", "train_grpo.py")}
    assert ours in ({}, {("model.py", "window_lengths"): 1}, {("model.py", "window_lengths"): 2})
    assert sum(waits.seen.values()) <= 25, waits.seen
    with Waits() as waits:
        float(logps.sum())
        batch["completion_mask"].nonzero()
        model.all_reduce_sums(sums)
    assert waits.seen == {("model.py", "all_reduce_sums"): 1}, "this counter sees what waits in the project's files"


def test_answers_are_encoded_without_the_device(loaded, monkeypatch):
    """`never_sampled.tolist()` for each answer waited for the GPU, in the loader's threads, also while a graph was being
    captured, which that ends."""
    policy, processor = loaded("qwen2_5_vl")
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: pytest.fail("a tensor was read"))
    row = make_row(0) | {"chosen": "<answer>3</answer>"}
    assert len(data.encode_completion(policy, processor, row, "chosen")) > 3
    assert policy.never_sampled_ids and policy.hf.config.image_token_id in policy.never_sampled_ids


@pytest.mark.parametrize("lengths", [[4] * 6, [4, 4, 2, 4, 4, 2, 6], [5], [3, 1, 3]])
def test_windows_of_one_length_are_one_call(monkeypatch, lengths):
    """A view, a stack and a cat for each of 512 windows took 65 ms of the host a layer. Values and gradients are those of
    each window by itself, and its length is read once for all layers."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, sum(lengths), 8, requires_grad=True) for _ in range(3))
    ends = torch.tensor([0, *lengths]).cumsum(0)
    alone = [torch.nn.functional.scaled_dot_product_attention(*x, scale=0.3)
             for x in zip(*(t.split(lengths, 2) for t in (q, k, v)))]
    expected = torch.cat(alone, 2).transpose(1, 2)
    calls, attend = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *a, **b: (calls.append(1), attend(*a, **b))[1])
    reads, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: (reads.append(1), tolist(x))[1])
    for _ in range(2):
        out, _ = model.window_attention(None, q, k, v, None, scaling=0.3, cu_seq_lens_q=ends)
    assert len(calls) == 2 * len(set(lengths)) and len(reads) == 1
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)
    weight = torch.randn(out.shape)
    for a, b in zip(*(torch.autograd.grad((weight * x).sum(), (q, k, v)) for x in (out, expected))):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_short_rows_go_to_the_general_kernel(monkeypatch):
    """On a GPU FlexAttention sends a lone row of fewer than 128 tokens to a decoding kernel, for which no block size was
    valid: the run ended at its first short prompt."""
    seen = {}
    monkeypatch.setattr(model, "compiled_flex_attention", lambda: lambda q, *_, **options: (seen.update(options), q)[1])
    ids = torch.zeros(1, 20, dtype=torch.long)
    mask = model.group_block_mask(ids, ids)
    mask.longest = 20
    q = torch.randn(1, 4, 20, 16)
    model.group_attention(None, q, q[:, :2], q[:, :2], mask, 0.25)
    assert seen["kernel_options"] == {"FORCE_USE_FLEX_ATTENTION": True} and seen["enable_gqa"]


def test_unasked_sums_are_not_computed(loaded, monkeypatch):
    """sum p^2 and the entropy pass over (tokens, vocabulary) each: the first for WPO only, the second not in passes of
    the reference or of the old policy."""
    policy, processor = loaded("qwen2_5_vl")
    batch = policy.pack([make_group(policy, processor, 1, [5, 3])])
    products, einsum = [], torch.einsum
    monkeypatch.setattr(torch, "einsum", lambda *x: (products.append(1), einsum(*x))[1])
    logps, entropies, squares = policy(batch)
    assert len(products) == 1 and squares is None
    other, none, squares = policy(batch, entropies=False, sums_of_squares=True)
    assert len(products) == 2 and none is None and torch.equal(other, logps)
    p = torch.tensor(0.0)
    again, entropies, squares_too = policy(batch, sums_of_squares=True)
    assert torch.equal(squares, squares_too) and (squares[batch["completion_mask"]] < p).all()
    assert policy(batch, entropies=False)[1:] == (None, None) and len(products) == 4


def test_sums_of_metrics_are_exact():
    """Metrics are added up on the device, and read once: in fp64, as Python's own numbers were."""
    values = [(torch.tensor(x), torch.tensor(n)) for x, n in ((1e8, 3), (1.25, 4), (-1e8, 5))]
    sums = {"old": (2.0, 1)}
    for value, n in values:
        model.add_sums(sums, {"a": (value, n), "old": (0.5, 1)}, "")
    model.add_sums(sums, {"a": (1.0, 1)}, "eval/")
    found = model.all_reduce_sums(sums)
    assert found == {"a": (1.25, 12.0), "old": (3.5, 4.0), "eval/a": (1.0, 1.0)}
    assert all(isinstance(x, float) for pair in found.values() for x in pair)


def test_preflight_reserves_the_moments(loaded, monkeypatch):
    """Preflight ran before AdamW's moments existed, 30 GB for 3B, and before the gradients that a second micro-batch finds:
    it passed, and step 1 ran out of memory."""
    policy, processor = copy.deepcopy(loaded("qwen2_5_vl")[0]), loaded("qwen2_5_vl")[1]
    policy.hf.get_encoder(modality="image").requires_grad_(False)
    reserved, empty_like, alive = [], torch.empty_like, []
    monkeypatch.setattr(torch, "empty_like", lambda p, **k: reserved.append(empty_like(p, **k)) or reserved[-1])
    forward = model.ChunkedLogps.forward
    import weakref

    def during(*args):
        alive.append([weakref.ref(x) for x in reserved])
        assert all(p.grad is not None for p in policy.parameters() if p.requires_grad), "of an earlier micro-batch"
        del reserved[:]
        return forward(*args)

    monkeypatch.setattr(model.ChunkedLogps, "forward", staticmethod(during))
    held = []
    backward = model.ChunkedLogps.backward
    monkeypatch.setattr(model.ChunkedLogps, "backward", staticmethod(
        lambda *x: (held.extend(r().numel() for r in alive[0] if r() is not None), backward(*x))[1]))
    model.preflight(policy, [make_group(policy, processor, 1, [5, 3])], 1.0, 0, True)
    trained = [p for p in policy.parameters() if p.requires_grad]
    assert sum(held) == 2 * sum(p.numel() for p in trained)
    assert all(p.grad is None for p in policy.parameters()), "nothing is left behind"


def replayed(monkeypatch):
    """CUDA graphs with their rules on a CPU; -> (the list of captures, of replays)"""
    captures, replays, replay = [], [], Graph.replay
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: (captures.append(graph), graph)[1])
    monkeypatch.setattr(Graph, "replay", lambda graph: (replays.append(graph), replay(graph)))
    return captures, replays


def test_graphs_are_kept_between_calls(loaded, monkeypatch):
    """Every rollout captured its graphs anew, and an evaluation for each 16 rows. With weights that stand where they
    stood a second call, of other prompts, captures nothing, and samples what a fresh sampler does; after an update the
    graphs read the new weights."""
    policy, processor = copy.deepcopy(loaded("qwen2_5_vl")[0]), loaded("qwen2_5_vl")[1]
    prompts = mixed_prompts(policy, processor)
    policy.eos_ids = list(range(100, 116))
    kwargs = dict(num_generations=3, max_completion_length=24, temperature=1.2, seed=1)
    plain = {}
    for step in range(2):
        for name, draws in (("a", [0, 1, 2]), ("b", [7, 8, 9])):
            plain[name, step] = rollout.sample(policy, prompts[::-1] if name == "b" else prompts, draws, **kwargs)
        with torch.no_grad():
            policy.hf.get_output_embeddings().weight.mul_(1.5)
    with torch.no_grad():
        policy.hf.get_output_embeddings().weight.div_(1.5**2)
    monkeypatch.setitem(rollout.BUCKETS, "cpu", (2, 8, 2))
    monkeypatch.setitem(rollout.PREFIX, "cpu", 64)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)  # packed copies stand elsewhere each time
    captures, _ = replayed(monkeypatch)
    counts = []
    for step in range(2):
        for name, draws in (("a", [0, 1, 2]), ("b", [7, 8, 9]), ("a", [0, 1, 2])):
            found = rollout.sample(policy, prompts[::-1] if name == "b" else prompts, draws, **kwargs)
            assert torch.equal(found.completion_ids, plain[name, step].completion_ids)
            assert torch.equal(found.completion_mask, plain[name, step].completion_mask)
            torch.testing.assert_close(found.sampling_logps, plain[name, step].sampling_logps, atol=1e-5, rtol=0)
            counts.append(len(captures))
        with torch.no_grad():
            policy.hf.get_output_embeddings().weight.mul_(1.5)
    assert counts[0] > 2 and counts[2] == counts[1] and counts[5] == counts[4], counts  # new sizes alone are captured
    assert len(policy.kept) == 1
    head = policy.hf.get_output_embeddings().weight
    head.data = head.detach() / 1.5  # the weights stand elsewhere now, as after FSDP has gathered them anew
    found = rollout.sample(policy, prompts, [0, 1, 2], **kwargs)
    assert torch.equal(found.completion_ids, plain["a", 1].completion_ids), "graphs must not read where they stood"
    greedy = rollout.sample(policy, prompts, [0, 1, 2], **kwargs | dict(temperature=0.0))
    assert len(policy.kept) == 2 and len(greedy.completion_ids) == 9, "evaluation has its own"
    policy.spare_memory = 1 << 30
    policy.let_go()
    assert len(policy.kept) == 2, "there is room"
    policy.spare_memory = 0
    batch = policy.pack([make_group(policy, processor, 1, [5])])
    with torch.no_grad():
        policy(batch)
    assert policy.kept, "a pass without gradients needs no memory of theirs"
    policy(batch)
    assert not policy.kept and not policy.copies, "a pass with gradients does"


def test_bf16_weights_of_the_sampler_stand_still(in_bf16, monkeypatch):
    """A graph reads the bf16 copy of the weights where it was captured: the next rollout's copy, of new weights, must lie
    there, or graphs would sample from an old policy."""
    policy, _ = in_bf16("qwen2_5_vl")
    places = []
    for keep in (True, True, False):
        master = next(p for p in policy.parameters() if p.dim() == 2).detach().clone()
        with policy.compute_weights(keep):
            weight = next(p for p in policy.parameters() if p.dim() == 2)
            places.append(weight.data_ptr())
            assert torch.equal(weight, master.bfloat16())
        with torch.no_grad():
            weight.add_(1.0)
    with torch.no_grad():
        weight.sub_(3.0)
    assert places[0] == places[1] != places[2] and weight.dtype == torch.float32
    policy.let_go()
    assert not policy.copies


@pytest.mark.parametrize("family", few(["qwen2_5_vl", "gemma3"], "qwen2_5_vl", "gemma3"))
def test_a_step_reads_the_slots_in_use(loaded, monkeypatch, family):
    """The prefix part of a step covered every slot, however few were in use: 10.4 ms instead of 7.5 at 64 of 512 rows.
    Prompts whose neighbours have ended move into lower slots, with keys, lengths and masks, and nothing changes."""
    policy, processor = loaded(family)
    prompts = mixed_prompts(policy, processor) * 3
    monkeypatch.setattr(policy, "eos_ids", list(range(100, 116)))
    kwargs = dict(num_generations=2, max_completion_length=40, temperature=1.2, seed=1)
    plain = rollout.sample(policy, prompts, list(range(9)), **kwargs)
    monkeypatch.setitem(rollout.BUCKETS, "cpu", (2, 8, 1))
    shapes, moves, place = [], [], rollout.GroupCache.group_rows
    move = rollout.GroupCache.move_slots
    monkeypatch.setattr(rollout.GroupCache, "group_rows", lambda cache, slot_of, *x: (
        place(cache, slot_of, *x), shapes.append((len(cache.rows_of_slot), len(set(slot_of)))))[0])
    monkeypatch.setattr(rollout.GroupCache, "move_slots", lambda cache, a, b: (moves.append((a.tolist(), b.tolist())), move(cache, a, b))[1])
    replayed(monkeypatch)
    found = rollout.sample(policy, prompts, list(range(9)), **kwargs)
    assert shapes[0] == (9, 9) and shapes[-1][0] <= 5
    assert all(seen == rollout.bucketed(used, 1, 9) for seen, used in shapes), shapes
    assert moves and all(min(a) > max(b) for a, b in moves)
    for name in ("completion_ids", "completion_mask", "truncated"):
        assert torch.equal(getattr(found, name), getattr(plain, name)), name
    torch.testing.assert_close(found.sampling_logps, plain.sampling_logps, atol=1e-5, rtol=0)
    policy.let_go()


def test_pictures_are_read_ahead_by_default():
    """Pictures were decoded on the main thread, 20 ms each, while the GPU stood idle."""
    import train_dpo
    import train_grpo
    for script in (train_dpo, train_grpo):
        assert script.parse_args(["--model_name_or_path", "x"]).dataloader_num_workers == 2


@pytest.mark.parametrize("make, shape", [
    (lambda: torch.nn.Conv3d(3, 10, (2, 4, 4), (2, 4, 4), bias=False), (7, 3, 2, 4, 4)),
    (lambda: torch.nn.Conv2d(3, 10, 4, 4), (2, 3, 12, 22))])
def test_patch_embedding_is_a_product(make, shape):
    """Qwen-VL's patch embedding as a convolution took 654 ms for 256 patches in bf16 on a CPU, and 3 ms as a product.
    Values and gradients are the convolution's, also where a picture is no multiple of the kernel."""
    torch.manual_seed(0)
    conv, x = make(), torch.randn(shape, requires_grad=True)
    ours, theirs = model.embed_patches(conv, x), conv(x)
    close_to_scale(ours, theirs, 1e-6)
    weight = torch.randn(theirs.shape)
    for a, b in zip(*(torch.autograd.grad((weight * y).sum(), (x, *conv.parameters())) for y in (ours, theirs))):
        close_to_scale(a, b, 1e-6)


@pytest.mark.parametrize("family", VISION)
def test_no_patch_embedding_is_a_convolution(loaded, family, monkeypatch):
    """Every family's tower embeds patches by a product, which is what its convolution gives: to 1e-12 in fp64."""
    policy, processor = loaded(family)
    monkeypatch.setattr(torch.nn.functional, "conv2d", lambda *_, **__: pytest.fail("a convolution"))
    monkeypatch.setattr(torch.nn.functional, "conv3d", lambda *_, **__: pytest.fail("a convolution"))
    convs = [m for m in policy.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Conv3d))]
    outputs = []
    handles = [m.register_forward_hook(lambda m, x, out: outputs.append((m, x[0], out))) for m in convs]
    with torch.no_grad():
        policy(policy.pack([make_group(policy, processor, 1, [3])]))
    for handle in handles:
        handle.remove()
    assert outputs
    monkeypatch.undo()
    for conv, x, out in outputs:
        close_to_scale(out, type(conv).forward(conv, x))
        conv, x = copy.deepcopy(conv).double(), x.double()
        close_to_scale(model.embed_patches(conv, x), type(conv).forward(conv, x), 1e-12)


def test_the_sampler_keeps_the_product(in_bf16):
    """`compute_weights` takes the casts off; it must put nothing slower in their place."""
    policy, _ = in_bf16("qwen2_5_vl")
    conv = next(m for m in policy.modules() if isinstance(m, torch.nn.Conv3d))
    before = conv.forward
    with policy.compute_weights():
        assert conv.forward.func is model.embed_patches
    assert conv.forward is before


def test_what_is_kept_stays_within_the_budget(loaded, monkeypatch):
    """Kept sizes grew to the largest of each, slots of the short prompts times the tokens of the long ones: four times
    --rollout_tokens. Together, and with what evaluation keeps, they hold no more, or what is needed now alone."""
    policy, processor = copy.deepcopy(loaded("qwen2_5_vl")[0]), loaded("qwen2_5_vl")[1]
    monkeypatch.setitem(rollout.BUCKETS, "cpu", (2, 8, 2))
    monkeypatch.setitem(rollout.PREFIX, "cpu", 8)
    monkeypatch.setattr(rollout, "CUDA_GRAPHS", False)
    short = encode(policy, processor, *[make_row(0, i) for i in range(8)])
    long = encode(policy, processor, *[make_row(1, i, "how many shapes are there? " * 8) for i in range(8)])
    S, budget = (max(len(p.tokens) for p in prompts) for prompts in (short, long)), 600
    assert 2 * min(S) < max(len(p.tokens) for p in long)
    kwargs = dict(num_generations=2, max_completion_length=8, seed=0, rollout_tokens=budget)
    for prompts, temperature in ((short, 1.0), (long, 1.0), (short, 1.0), (short, 0.0), (long, 0.0)):
        plain = rollout.sample(loaded("qwen2_5_vl")[0], prompts, list(range(8)), temperature=temperature, **kwargs)
        found = rollout.sample(policy, prompts, list(range(8)), temperature=temperature, **kwargs)
        assert torch.equal(found.completion_ids, plain.completion_ids)
        held = sum(slots * S + rows * T for slots, rows, S, T in (x.cache.sizes for x in policy.kept.values()))
        assert 0 < held <= budget, held
    loaded("qwen2_5_vl")[0].kept.clear()

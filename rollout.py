"""Sampling of groups with a KV cache, by the trainer's own module or by a vLLM server, and held-out answers.

The sampler runs the training module itself: no second engine, and no weights to keep in sync. A prompt and
its images are prefilled once; its keys and values then serve all completions of the group.
Sizes in comments: P prompts, G num_generations, N = P * G completions (group-major), S longest prompt, T
longest completion, R position rows (3 for M-RoPE models, else 1).
"""

import functools
import json
import math
import re
import urllib.request
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from http.client import HTTPException
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError

import torch
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import DynamicCache

from data import ALIASES
from model import (InputError, Interrupted, Policy, Prompt, attention_mask_of, export, on_rank_0, pack_groups,
                   to_device, writing)
from rewards import runner

# ------------------------------------------------------------------------------------------------------------
# Keyed randomness


def _mix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finalizer (Steele, Lea, Flood 2014) on int64, whose product wraps as uint64's does."""
    for shift, multiplier in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * multiplier
    return x


def keyed_uniform(seed: int, draw: torch.Tensor, k: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """fp64 uniforms in [0, 1 - 2^-52] from (seed, draw number, k, token index) alone; int64s that broadcast.

    There is no generator state to save. The batch, the number of ranks and an interrupted rollout change
    nothing about what is sampled.
    """
    golden = -0x61C8864680B583EB  # 2^64 / phi, as int64
    x = torch.as_tensor(seed, dtype=torch.int64, device=draw.device)
    for word in (draw, k, t):
        x = _mix((x + 1) * golden + word)
    x = _mix(x * golden)
    return ((x >> 12) & ((1 << 52) - 1)).double() * 2.0**-52


def keep_likely(logits: torch.Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0):
    """(N, V) logits, ids outside top_k, top_p or min_p at -inf, in transformers' order. 0, 1.0, 0: all stay.

        top_k  the k most likely ids, and those as likely as the k-th
        min_p  ids of at least min_p times the largest probability
        top_p  the fewest ids, most likely first, whose probabilities sum to top_p or more
    """
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:
        ordered, index = logits.sort(descending=True)
        p = ordered.softmax(-1)
        dropped = p.cumsum(-1) - p >= top_p  # the likelier ids sum to top_p already
        logits = logits.masked_fill(dropped.scatter(-1, index, dropped), -math.inf)
    if min_p:
        p = logits.softmax(-1)
        logits = logits.masked_fill(p < min_p * p.amax(-1, keepdim=True), -math.inf)
    return logits


def sample_tokens(logits: torch.Tensor, uniforms: torch.Tensor | None, top_k: int = 0, top_p: float = 1.0,
                  min_p: float = 0.0, block: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse CDF: (N, V) logits, (N,) fp64 uniforms in [0, 1) -> (N,) ids, and their log-probs.

    uniforms None takes the likeliest id. An id of probability 0 is never drawn. The CDF is summed in fp64: in
    fp32, over 150k ids, it would lose the small ones. It is a CDF of blocks, then one within the chosen
    block, so that only two passes read the whole vocabulary: the softmax, and the sums of the blocks. The
    total of these sums corrects the rounding of the softmax in the log-probs.
    """
    V, p = logits.shape[-1], logits.softmax(-1)                                                 # (N, V)
    likely, whole = p, V // block * block
    sums = torch.cat([p[:, :whole].view(len(p), -1, block).sum(-1),
                      p[:, whole:].sum(-1, keepdim=True)], -1).double()                         # (N, blocks)
    log_total = sums.sum(-1).log()                                                              # (N,)
    if uniforms is None:
        token = logits.argmax(-1)
    else:
        if top_k or top_p < 1 or min_p:  # rare, so this is not optimised
            likely = keep_likely(logits, top_k, top_p, min_p).softmax(-1)
            sums = F.pad(likely, (0, -V % block)).view(len(p), -1, block).sum(-1).double()
        cdf = sums.cumsum(-1)
        target = uniforms[:, None] * cdf[:, -1:]                                                # (N, 1)
        # right=True skips entries where the CDF does not rise; 1 - 2^-52 keeps it from running off the end.
        # Without the clamps a nan, which `sample` reports, would be an index out of range.
        chosen = torch.searchsorted(cdf, target, right=True).clamp(max=cdf.shape[-1] - 1)       # (N, 1)
        target = target - (cdf - sums).gather(-1, chosen)
        ids = chosen * block + torch.arange(block, device=p.device)                             # (N, block)
        within = likely.gather(-1, ids.clamp(max=V - 1)).double().masked_fill_(ids >= V, 0.0).cumsum(-1)
        target = torch.minimum(target.clamp(min=0.0), within[:, -1:] * (1 - 2.0**-52))
        token = chosen * block + torch.searchsorted(within, target, right=True)
        token = token.clamp(max=V - 1).squeeze(-1)
    logp = p.gather(-1, token[:, None]).squeeze(-1).double().log()
    return token, (logp - log_total).float()


# ------------------------------------------------------------------------------------------------------------
# Sampling


class Rollout(NamedTuple):
    """N = P * G completions, group-major: completion i belongs to prompt i // G."""

    completion_ids: torch.Tensor   # (N, T) padded with pad_id; these ids are trained, never re-encoded text
    completion_mask: torch.Tensor  # (N, T) True up to the first EOS, which is included
    sampling_logps: torch.Tensor   # (N, T) log-probs at the sampling temperature, 0 where the mask is False
    truncated: torch.Tensor        # (N,) True where max_completion_length came before an EOS


class GroupCache(DynamicCache):
    """Keys and values in two regions: each prompt's once, for all its completions, and each completion's own.

    A step reads a prompt's keys once for its group, not G times; with images they are most of what it reads
    (Hydragen, arXiv 2402.05099; bifurcated attention, arXiv 2403.08845). A prompt takes a slot, a completion
    a row. The memory is allocated once; slots and rows are used again.

    prefix[layer]: K, V (slots, kv, S, D)     own[layer]: K, V (rows, kv, T, D)
    lengths: (slots,) of the prompts          prefix_bias: (slots, 1, 1, S), 0, or -inf after a prompt's end
    rows, t: (n,) the rows of a step, and the index of each one's token in its completion
    rows_of_slot: (p, g), cell_of_row: (rows,), see `group_rows`
    """

    def __init__(self, slots: int, rows: int, S: int, T: int, device):
        super().__init__()
        self.sizes, self.prefix, self.own = (slots, rows, S, T), {}, {}
        self.prefix_bias = torch.zeros(slots, 1, 1, S, device=device)
        self.lengths = torch.zeros(slots, dtype=torch.long, device=device)
        self.filling = None  # while prompts are prefilled: their slots (p,)
        self.cell_of_row, self.rows_of_slot, self.all_rows_of_slot = None, None, None

    def update(self, key, value, layer, *args, **kwargs):
        """transformers' layers call this with new keys and values, and give what it returns to
        `model.group_attention`: these keys and values during the prefill, later this cache and the layer."""
        if layer not in self.prefix:
            slots, rows, S, T = self.sizes
            kv, D = key.shape[1], key.shape[3]
            self.prefix[layer] = [x.new_zeros(slots, kv, S, D) for x in (key, value)]
            # Keys are stored as (D, T): on a CPU, in bf16, scores are then up to 3 times as fast.
            self.own[layer] = [key.new_zeros(rows, kv, D, T).mT, value.new_zeros(rows, kv, T, D)]
        if self.filling is not None:
            for buffer, new in zip(self.prefix[layer], (key, value)):
                buffer[self.filling, :, :new.shape[2]] = new
            return key, value
        for buffer, new in zip(self.own[layer], (key, value)):
            buffer[self.rows, :, self.t] = new[:, :, 0]
        return self, layer

    def attend(self, layer, query, own_bias, scaling, window: int | None = None) -> torch.Tensor:
        """query (n, heads, 1, D), own_bias (n, 1, 1, W) -> (n, 1, heads, D): one softmax over both regions.

        The scores with the prompts are one matrix product for each prompt and kv head. It takes the queries
        of g completions and r heads together: `rows_of_slot` groups the rows by prompt, and `cell_of_row`
        puts the results back in the order of rows. W: the longest completion so far, rounded up.
        """
        (prefix_k, prefix_v), (own_k, own_v) = self.prefix[layer], self.own[layer]
        n, heads, _, D = query.shape
        (p, g), kv, W = self.rows_of_slot.shape, own_k.shape[1], own_bias.shape[-1]
        r = heads // kv  # query heads that share a kv head

        def to_groups(x):  # (n, kv, r, X) -> (p, kv, g * r, X)
            x = x[self.rows_of_slot.view(-1)].view(p, g, kv, r, -1)
            return x.transpose(1, 2).reshape(p, kv, g * r, -1)

        def to_rows(x):  # and back
            return x.view(p, kv, g, r, -1).transpose(1, 2).reshape(p * g, kv, r, -1)[self.cell_of_row[:n]]

        q, prefix_bias = query.view(n, kv, r, D), self.prefix_bias[:p]
        if window is not None:  # hide keys that are further back
            # All running completions of a group have the same length, so one row tells the query's offset.
            offset = (self.lengths[:p] + self.t[self.rows_of_slot[:, 0]])[:, None]                 # (p, 1)
            far = offset - torch.arange(prefix_k.shape[2], device=q.device) >= window              # (p, S)
            prefix_bias = prefix_bias.masked_fill(far[:, None, None], -math.inf)
            far = self.t[:, None] - torch.arange(W, device=q.device) >= window                     # (n, W)
            own_bias = own_bias.masked_fill(far[:, None, None], -math.inf)
        shared = torch.add(prefix_bias, score(to_groups(q), prefix_k[:p]), alpha=scaling)  # (p, kv, g * r, S)
        own = torch.add(own_bias, score(q, own_k[:n, :, :W]), alpha=scaling)               # (n, kv, r, W)
        probs = torch.cat([shared, to_groups(own)], -1).softmax(-1).to(q.dtype)
        prefix_probs, own_probs = probs.split([prefix_k.shape[2], W], -1)
        out = to_rows(prefix_probs @ prefix_v[:p]) + to_rows(own_probs) @ own_v[:n, :, :W]  # (n, kv, r, D)
        return out.view(n, 1, heads, D)

    def group_rows(self, slot_of: list[int], p: int = 0, g: int = 0):
        """Group the rows by prompt for `attend`. slot_of: the slot of each row's prompt.

        rows_of_slot (p, g): the rows of each slot. cell_of_row (rows,): where a row is in it, flattened. p
        and g are the least sizes. Unused cells hold row 0, and unused rows point at cell 0; their results are
        never read. If p and g are enough for every call, both tensors keep their memory: a CUDA graph of each
        size reads them there.
        """
        counts, cells = [0] * (max(slot_of) + 1), []  # cells: (slot, number in it) of each row
        for slot in slot_of:
            cells.append((slot, counts[slot]))
            counts[slot] += 1
        p, g = max(len(counts), p), max(*counts, g)
        rows_of_slot = torch.zeros(p, g, dtype=torch.long)
        for row, cell in enumerate(cells):
            rows_of_slot[cell] = row
        cells = torch.tensor([slot * g + k for slot, k in cells] + [0] * (self.sizes[1] - len(cells)))

        cells, rows_of_slot = to_device((cells, rows_of_slot), self.lengths.device)
        if self.all_rows_of_slot is None or self.all_rows_of_slot.shape[1] != g:
            self.cell_of_row, self.all_rows_of_slot = cells.clone(), rows_of_slot.new_zeros(self.sizes[0], g)
        self.rows_of_slot = self.all_rows_of_slot[:p]
        self.cell_of_row.copy_(cells), self.rows_of_slot.copy_(rows_of_slot)

    def move(self, sources, targets, width: int):
        """Copy rows `sources` over rows `targets`, the first `width` tokens of each."""
        for buffer in (buffer for pair in self.own.values() for buffer in pair):
            buffer[targets, :, :width] = buffer[sources, :, :width]

    def move_slots(self, sources, targets):
        """Copy the prompts in the slots `sources` into the slots `targets`."""
        keys_and_values = (buffer for pair in self.prefix.values() for buffer in pair)
        for buffer in (*keys_and_values, self.prefix_bias, self.lengths):
            buffer[targets] = buffer[sources]


def score(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """(n, kv, r, D), (n, kv, S, D) -> (n, kv, r, S). On a GPU in fp32, as in the trainer's kernels: in bf16 a
    score of 20 is off by up to 0.06. On a CPU torch has no such product, so there scores are rounded."""
    if q.is_cuda and q.dtype != torch.float32:
        scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT, out_dtype=torch.float32)
        return scores.unflatten(0, q.shape[:2])
    return q @ k.mT


CHECK_EVERY = {"cuda": 16}  # tokens between two checks of which rows have ended (a device sync); elsewhere 4
# On a GPU a step is a CUDA graph, one for each size of the batch. Rows and own tokens are rounded up to the
# first two of BUCKETS, slots to a doubling of the third, and prompts to PREFIX tokens.
CUDA_GRAPHS, BUCKETS, PREFIX = True, {"cuda": (64, 128, 8)}, {"cuda": 256}
PREFILL_TOKENS = 16_384  # most prompt tokens in one forward of several prompts


class Steps:
    """What the sampler keeps in memory between its steps, and the step itself: one token for every row.

    A row is a place in the batch for one running completion. When that ends, another one takes the row. On a
    GPU all this is kept between calls (`Policy.kept`) with the steps' CUDA graphs, which take long to
    capture. A graph can be used as long as the weights keep their addresses.
    """

    def __init__(self, policy: Policy, slots: int, rows: int, S: int, T: int, wide_T: int, completions: int,
                 settings: tuple, R: int):
        """settings: temperature, top_k, top_p, min_p. R: position rows."""
        self.policy, self.settings, self.R, self.T, device = policy, settings, R, T, policy.device
        self.sizes = slots, rows, S, completions
        self.cache = GroupCache(slots, rows, S, wide_T, device)
        self.eos = torch.tensor(policy.eos_ids, device=device)
        self.uniforms = torch.zeros(completions, T, dtype=torch.float64, device=device)
        # Results. Column T is scratch space for finished rows.
        self.ids = torch.full((completions, T + 1), policy.pad_id, device=device)
        self.logps = torch.zeros(completions, T + 1, device=device)
        # Of each row: the number of its completion, its last token, and the token's index and position.
        self.row, self.token, self.t, self.position = (
            torch.zeros(rows, dtype=torch.long, device=device) for _ in range(4))
        self.running = torch.zeros(rows, dtype=torch.bool, device=device)
        self.graphs, self.weights = {}, None
        # A stream of its own, since cuBLAS keeps its workspace in the pool of a stream's first capture.
        cuda = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if cuda else None
        self.pool = torch.cuda.graph_pool_handle() if cuda else None

    def tensors(self) -> list[torch.Tensor]:
        caches = [x for pair in (*self.cache.prefix.values(), *self.cache.own.values()) for x in pair]
        return [*caches, self.uniforms, self.ids, self.logps]

    def begin(self, uniforms: torch.Tensor | None):
        """Prepare for a call of `sample`. uniforms: (completions, T), or None for the likeliest tokens."""
        self.ids.fill_(self.policy.pad_id), self.logps.zero_(), self.running.fill_(False), self.t.zero_()
        if uniforms is not None:
            self.uniforms[:len(uniforms)] = uniforms
        self.graphed = can_be_graphed(self.policy)
        weights = [x.data_ptr() for x in self.policy.parameters()]
        if weights != self.weights:
            self.graphs, self.weights = {}, weights
            # A pool whose graphs are gone cannot be used again.
            self.pool = torch.cuda.graph_pool_handle() if self.t.is_cuda else None

    def draw(self, hidden: torch.Tensor, at: slice):
        """Draw the next token of the n rows `at`, from the hidden states (n, H) of their last tokens."""
        temperature, *narrowed = self.settings
        logits = self.policy.logits(hidden, temperature or 1.0)                                    # (n, V)
        row, next_t = self.row[at], (self.t[at] + 1).clamp(max=self.T - 1)
        u = self.uniforms[row, next_t] if temperature else None
        token, logp = sample_tokens(logits, u, *narrowed)
        self.token[at] = token
        column = torch.where(self.running[at], next_t, self.T)
        self.ids[row, column], self.logps[row, column] = token, logp
        self.position[at] += self.running[at].long()  # finished rows stay where they are
        ended = (token[:, None] == self.eos).any(-1)
        self.running[at] &= ~ended & (next_t < self.T - 1)
        self.t[at] = next_t

    def step(self, size: int, width: int):
        """One token for each of the first `size` rows, which attends to `width` of its row's own tokens."""
        at, device, cache = slice(size), self.t.device, self.cache
        cache.rows, cache.t = torch.arange(size, device=device), self.t[at]
        future = torch.arange(width, device=device) > self.t[at, None]                      # (size, width)
        own_bias = torch.zeros(size, width, device=device).masked_fill(future, -math.inf)[:, None, None]
        hidden = self.policy.hidden(
            self.token[at, None], self.position[at].expand(self.R, size)[..., None], own_bias,
            cache=cache)                                                                    # (size, 1, H)
        self.draw(hidden[:, 0], at)

    def run(self, size: int, width: int):
        """`step`, on a GPU as a CUDA graph: one launch in place of hundreds of kernels'."""
        key = size, width, self.cache.rows_of_slot.shape
        if not self.graphed or key not in self.graphs:
            self.graphs[key] = None  # the first step of a size is not captured: it does the warm-up
            return self.step(size, width)
        if self.graphs[key] is None:
            self.graphs[key] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[key], pool=self.pool, stream=self.stream):
                self.step(size, width)
        self.graphs[key].replay()

    def admit(self, prompts: list[Prompt], chosen: list[int], free: list[int], n: int, G: int):
        """Prefill prompts[i] for i in chosen into free slots, and draw the first tokens of their completions,
        which take the rows from n on."""
        cache, policy, device = self.cache, self.policy, self.t.device
        cache.filling = to_device(torch.tensor(free), device)
        batch = to_device(pack_groups([(prompts[i], []) for i in chosen], policy.pad_id), device)
        lengths = (batch["segment_ids"] == 0).sum(-1)                                           # (p,)
        hidden = policy.hidden(batch["input_ids"], batch["position_ids"], attention_mask_of(batch),
                               batch["pixels"], cache)                                          # (p, S, H)
        S = cache.sizes[2]
        after_end = torch.arange(S, device=device) >= lengths[:, None]                          # (p, S)
        bias = torch.zeros(len(free), S, device=device).masked_fill(after_end, -math.inf)
        cache.prefix_bias[cache.filling], cache.lengths[cache.filling] = bias[:, None, None], lengths
        cache.filling, at = None, slice(n, n + len(chosen) * G)
        row = (torch.tensor(chosen)[:, None] * G + torch.arange(G)).view(-1)
        last = torch.stack([prompts[i].positions.max() for i in chosen]).repeat_interleave(G)
        self.row[at], self.position[at] = to_device(row, device), to_device(last, device)
        self.t[at], self.running[at] = -1, True
        hidden = hidden[torch.arange(len(chosen), device=device), lengths - 1]                  # (p, H)
        self.draw(hidden.repeat_interleave(G, 0), at)

    def drop_ended(self, slot_of: list[int], length_of: list[int]):
        """Remove finished rows: the last rows move into their places, also in slot_of and length_of."""
        n = len(slot_of)
        keep = [i for i, alive in enumerate(self.running[:n].tolist()) if alive]
        sources, targets = [i for i in keep if i >= len(keep)], sorted(set(range(len(keep))) - set(keep))
        if sources:
            a, b = to_device(torch.tensor([sources, targets]), self.t.device)
            self.cache.move(a, b, min(max(length_of) + 1, self.T))
            for x in (self.row, self.token, self.t, self.position, self.running):
                x[b] = x[a]
            for i, j in zip(sources, targets):
                slot_of[j], length_of[j] = slot_of[i], length_of[i]
        self.running[len(keep):] = False
        del slot_of[len(keep):], length_of[len(keep):]

    def fill_gaps(self, slot_of: list[int], bucket: int) -> int:
        """The number of slots that a step reads: up to the highest in use, rounded up to a bucket. If a
        smaller bucket would hold all prompts, they first move into lower slots."""
        used = sorted(set(slot_of))
        enough, now = (bucketed(n, bucket, self.sizes[0]) for n in (len(used), used[-1] + 1))
        if enough < now:
            sources = [slot for slot in used if slot >= len(used)]
            targets = sorted(set(range(len(used))) - set(used))
            self.cache.move_slots(*to_device(torch.tensor([sources, targets]), self.t.device))
            moved = dict(zip(sources, targets))
            slot_of[:] = [moved.get(slot, slot) for slot in slot_of]
        return enough


def bucketed(n: int, bucket: int, most: int) -> int:
    """`bucket` doubled until it holds n, but never above `most`.

    >>> [bucketed(n, 8, 48) for n in (3, 9, 17, 40)]
    [8, 16, 32, 48]
    """
    while bucket < n:
        bucket *= 2
    return min(bucket, most)


def can_be_graphed(policy: Policy) -> bool:
    """Whether a CUDA graph can hold a step. It must not wait for the GPU, as experts' grouped_mm does (but in
    bf16 on Hopper and Blackwell) and rotary frequencies that depend on the longest row; nor gather shards."""
    device, config = policy.device, policy.hf.config.get_text_config()
    experts = any(name.endswith("_experts") for name in config.to_dict())
    waits = device.type == "cuda" and experts and (
        policy.dtype != torch.bfloat16 or torch.cuda.get_device_capability(device)[0] not in (9, 10))
    waits |= isinstance(policy, FSDPModule) and not policy.whole
    ropes = [getattr(module, "rope_type", None) for module in policy.modules()]
    kinds = [kind for rope in ropes for kind in (rope.values() if isinstance(rope, dict) else [rope])]
    waits |= any(kind in ("dynamic", "longrope") for kind in kinds)
    return CUDA_GRAPHS and device.type in BUCKETS and not waits


@torch.no_grad()
def sample(policy: Policy, prompts: list[Prompt], draws: list[int], *, num_generations: int,
           max_completion_length: int, temperature: float, seed: int, top_k: int = 0, top_p: float = 1.0,
           min_p: float = 0.0, rollout_tokens: int = 1 << 18, stop=None) -> Rollout:
    """Sample num_generations completions of every prompt; the result is on the CPU. Temperature 0 is greedy,
    with log-probs at temperature 1.

    top_k, top_p and min_p restrict what is drawn. The log-probs are those of the whole softmax, as in the
    trainer. draws: the prompts' draw numbers, which key the randomness.

    Every 4 tokens (on a GPU 16) completions that have ended leave the batch, prompts that wait take their
    place, and stop() is asked: Interrupted if True. rollout_tokens bounds the keys and values in memory, in
    tokens, but one group always fits. Runs in eval() mode and restores the mode it found, unless interrupted.
    """
    P, G, T, device = len(prompts), num_generations, max_completion_length, policy.device
    S, was_training = max(len(p.tokens) for p in prompts), policy.training
    multiple = PREFIX.get(device.type, 8)  # tensor cores want rows of 16 bytes
    wide_S, wide_T = -(-S // multiple) * multiple, -(-T // 8) * 8
    # Groups at once. Each has two slots, since rows come free before the last one of their prompt.
    groups = min(P, max(1, rollout_tokens // (2 * wide_S + G * wide_T)))
    slots, rows = min(P, 2 * groups), groups * G
    keep = device.type in BUCKETS  # on a GPU
    steps = steps_for(policy, (slots, rows, wide_S, P * G), T, wide_T, G, (temperature, top_k, top_p, min_p),
                      len(prompts[0].positions), keep, rollout_tokens)
    uniforms = None
    if temperature:
        uniforms = keyed_uniform(seed, to_device(torch.tensor(draws), device).repeat_interleave(G)[:, None],
                                 torch.arange(G, device=device).repeat(P)[:, None],
                                 torch.arange(T, device=device)[None])                          # (P * G, T)
    row_bucket, width_bucket, slot_bucket = BUCKETS.get(device.type, (1, 8, 1))
    # Of each row the slot of its prompt, and its tokens after the first; on the CPU, to avoid a device sync.
    slot_of, length_of = [], []
    admitted = 0  # prompts so far; the others wait
    policy.eval()
    with policy.compute_weights(keep):
        steps.begin(uniforms)
        while admitted < P or slot_of:
            # Prefill prompts that wait, while there are free slots and rows for whole groups.
            while admitted < P:
                n = len(slot_of)
                most = min(P - admitted, (rows - n) // G, max(1, PREFILL_TOKENS // S))
                free = [s for s in range(slots) if s not in slot_of][:most]
                if not free:
                    break
                steps.admit(prompts, list(range(admitted, admitted + len(free))), free, n, G)
                slot_of.extend(s for s in free for _ in range(G))
                length_of.extend([0] * len(free) * G)
                admitted += len(free)

            # A few steps; on a GPU their sizes are rounded up, so that few CUDA graphs are needed.
            size = min(-(-len(slot_of) // row_bucket) * row_bucket, rows)
            if keep:
                steps.cache.group_rows(slot_of, steps.fill_gaps(slot_of, slot_bucket), G)
            else:
                steps.cache.group_rows(slot_of)
            for _ in range(min(CHECK_EVERY.get(device.type, 4), T - 1 - min(length_of))):
                steps.run(size, min(-(-(max(length_of) + 1) // width_bucket) * width_bucket, wide_T))
                length_of = [length + 1 for length in length_of]
            if stop is not None and stop():
                raise Interrupted
            steps.drop_ended(slot_of, length_of)
        ids, logps = steps.ids[:P * G, :T], steps.logps[:P * G, :T]
        if logps.isnan().any():
            raise InputError(f"the model's logits are not finite: {first_not_finite(policy, prompts[0])}")
    policy.train(was_training)
    ended = torch.isin(ids, steps.eos)
    mask = ended.long().cumsum(-1) - ended.long() == 0  # up to the first EOS, which is included
    longest = max(1, int(mask.sum(-1).max()))
    return Rollout(*(x[:, :longest].cpu() for x in (ids, mask, logps)), (~ended.any(-1)).cpu())


def first_not_finite(policy: Policy, prompt: Prompt) -> str:
    """The first layer whose output for this prompt is not finite, and its first weight that is not."""
    found = []

    def look(name, layer, _, output):
        x = output[0] if isinstance(output, tuple) else output
        if not found and isinstance(x, torch.Tensor) and not x.isfinite().all():
            bad = [key for key, p in layer.named_parameters() if not p.isfinite().all()]
            found.append(f"first in the output of {name}, " + (
                f"whose {bad[0]} holds nan or inf" if bad else f"whose weights are finite in {policy.dtype}"))

    hooks = [layer.register_forward_hook(functools.partial(look, name))
             for name, layer in policy.hf.named_modules()]
    batch = to_device(pack_groups([(prompt, [])], policy.pad_id), policy.device)
    hidden = policy.hidden(batch["input_ids"], batch["position_ids"], attention_mask_of(batch),
                           batch["pixels"])
    policy.logits(hidden[0], 1.0)
    for hook in hooks:
        hook.remove()
    return found[0] if found else "every layer's output for the prompt alone is finite"


def steps_for(policy: Policy, sizes: tuple, T: int, wide_T: int, G: int, settings: tuple, R: int,
              keep: bool, rollout_tokens: int) -> Steps:
    """New `Steps` of these sizes (slots, rows, prefix tokens, completions), or kept ones that are as large.
    All that are kept hold keys and values of at most rollout_tokens tokens, unless this call needs more."""
    def tokens(slots, rows, S, _, wide_T=wide_T):
        return slots * S + rows * wide_T

    key = T, G, settings, R
    kept = policy.kept.get(key) if keep else None
    if kept is None or any(have < need for have, need in zip(kept.sizes, sizes)):
        if kept is not None:  # grow, so that sizes settle; free the old memory first
            grown = tuple(map(max, kept.sizes, sizes))
            sizes = grown if tokens(*grown) <= rollout_tokens else sizes
            del policy.kept[key], kept
        others = sum(tokens(*x.sizes, x.cache.sizes[3]) for x in policy.kept.values())
        if others + tokens(*sizes) > rollout_tokens:
            policy.kept.clear()
        slots, rows, S, completions = sizes
        kept = Steps(policy, slots, rows, S, T, wide_T, completions, settings, R)
        if keep:
            policy.kept[key] = kept
    return kept


# ------------------------------------------------------------------------------------------------------------
# Sampling by a vLLM server


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: prompts are sent only to the server that the flag names."""

    def redirect_request(self, *_):
        return None


SERVER_TIMEOUT = 1800  # seconds that one answer may take
SERVER_REQUESTS = 64  # groups asked for at once, by each rank


class VLLMServer:
    """`sample` by a stock vLLM server on GPUs of its own, for rollouts that are too large for the trainers'.

        VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs --generation-config vllm

    MODEL is that of --model_name_or_path. Tried with vLLM 0.32.0 (CPU build, fp32); older ones are refused.
    Every rank sends its own prompts, each in one /v1/chat/completions with n = G. The server renders,
    tokenizes and prepares images itself, and must answer the trainer's prompt ids. Its log-probs are at the
    temperature, and without never_sampled (logit_bias -100; the trainer has probability 0 there).

    Weights go through `folder`, which the server must see under the same path, before every rollout: /pause
    (which empties the caches of prefixes and images), /collective_rpc reload_weights, /resume. vLLM's
    transfer by NCCL needs CUDA at both ends, and could not be tried.

    The server draws with its own generator: --seed does not reach it, and a rollout drawn again differs.
    (Seeded requests are slower, and end a CPU build when a prompt is prefilled in chunks.) A server that is
    away or older, runs another model, or answers wrongly is an InputError; nothing is tried twice.
    """

    def __init__(self, url: str, folder: str | Path, chat):
        """chat(row): the messages of a request, and how the prompt ends (data.chat_request)."""
        self.url, self.folder, self.chat = url.rstrip("/"), Path(folder).resolve(), chat
        self.opener = urllib.request.build_opener(NoRedirects)
        self.version = self.ask("/version", read=lambda answer: str(answer["version"]))
        if [int(n) for n in re.findall(r"\d+", self.version)[:2]] < [0, 32]:
            raise self.error(f"vLLM {self.version} is older than 0.32, for which this was written")
        self.device, mode = self.ask("/server_info?config_format=json", read=lambda answer: [
            answer["vllm_config"][part][name]
            for part, name in (("device_config", "device"), ("model_config", "logprobs_mode"))])
        if mode != "processed_logprobs":
            raise self.error(f"it gives {mode}; start it with --logprobs-mode processed_logprobs")

    def error(self, text: str) -> InputError:
        return InputError(f"--vllm_server_base_url {self.url}: {text}")

    def ask(self, path: str, body: dict | None = None, read=lambda answer: answer):
        """GET, or POST of a body -> read(the JSON that is answered, None for nothing)"""
        data, answer = None if body is None else json.dumps(body).encode(), b""
        try:
            request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
            with self.opener.open(request, timeout=SERVER_TIMEOUT) as response:
                answer = response.read()
            return read(json.loads(answer or "null"))
        except HTTPError as error:
            hint = " (was it started with VLLM_SERVER_DEV_MODE=1?)" if error.code == 404 else ""
            raise self.error(f"{path}: {error} {error.read(500).decode(errors='replace')}{hint}") from None
        except (OSError, HTTPException) as error:
            raise self.error(f"{path}: {error}") from None
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise self.error(f"{path}: {error if type(error) is ValueError else 'no answer of vLLM'}: "
                             f"{answer[:300].decode(errors='replace')}") from None

    def push(self, policy: Policy, rank: int):
        """Give the server the policy's weights: rank 0 writes and asks. All ranks must call this."""
        head, embeddings = policy.hf.get_output_embeddings(), policy.hf.get_input_embeddings()
        if self.device == "cpu" and head.weight is embeddings.weight:
            raise self.error("on a CPU vLLM keeps the old output head where it is tied to the embeddings")
        with writing(self.folder):
            export(policy, self.folder, rank)
        reload = {"method": "reload_weights", "kwargs": {"weights_path": str(self.folder)}}
        steps = ("/pause", {}), ("/collective_rpc", reload), ("/resume", {})
        on_rank_0(self.url, lambda: [self.ask(path, body) for path, body in steps])

    def sample(self, policy: Policy, prompts: list[Prompt], draws: list[int], *, num_generations: int,
               max_completion_length: int, temperature: float, stop=None, **_) -> Rollout:
        """As `rollout.sample`, but a server takes no draws, seed or rollout_tokens. The script refuses top_k,
        top_p and min_p: vLLM would normalise its log-probs over the ids that they keep."""
        T, eos, banned = max_completion_length, set(policy.eos_ids), policy.never_sampled_ids
        sampled = set(range(len(policy.hf.get_output_embeddings().weight))) - banned
        settings = dict(
            n=num_generations, max_completion_tokens=T, temperature=temperature, top_k=0, top_p=1.0,
            min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, logprobs=True,
            top_logprobs=0, return_token_ids=True, ignore_eos=True, stop_token_ids=policy.eos_ids,
            logit_bias={str(token): -100 for token in sorted(banned)})

        def read_choice(choice, where: str):
            """(ids, log-probs) of a completion"""
            ids, logps = choice["token_ids"], [x["logprob"] for x in choice["logprobs"]["content"]]
            how = "stop" if ids and ids[-1] in eos else "length" if len(ids) == T else "neither"
            for wrong, text in (
                    (not sampled.issuperset(ids), "an id that is never sampled"),
                    (eos.intersection(ids[:-1]), "an EOS before the end"),
                    (choice["finish_reason"] != how, "cut off, neither at an EOS nor at the limit"),
                    (len(ids) != len(logps), f"{len(logps)} log-probs for {len(ids)} ids"),
                    # a rounding above 0 is no fault
                    (not all(isinstance(x, float | int) and -math.inf < x < 1e-4 for x in logps),
                     f"log-probs that are none: {str(logps)[:100]}")):
                if wrong:
                    raise ValueError(f"{where}: {text}")
            return torch.tensor(ids), torch.tensor(logps, dtype=torch.float)

        def complete(prompt: Prompt):
            """[(ids, log-probs) of each of the prompt's completions]."""
            where, ours = prompt.row["_source"], prompt.tokens.tolist()

            def read(answer):
                theirs = answer["prompt_token_ids"]
                choices = sorted(answer["choices"], key=lambda choice: choice["index"])
                if theirs != ours:
                    raise ValueError(f"{where}: another model, chat template or image processor: it reads "
                                     f"{str(theirs)[:200]}, the trainer {str(ours)[:200]}")
                if [choice["index"] for choice in choices] != list(range(num_generations)):
                    raise ValueError(f"{where}: {len(choices)} completions, expected {num_generations}")
                return [read_choice(choice, where) for choice in choices]

            return self.ask("/v1/chat/completions", self.chat(prompt.row) | settings, read)

        pool = ThreadPoolExecutor(SERVER_REQUESTS)
        groups = [pool.submit(complete, prompt) for prompt in prompts]
        pending = set(groups)
        try:
            while pending:
                done, pending = wait(pending, 0.5, FIRST_COMPLETED)
                for group in done:
                    group.result()  # the first error ends the rollout
                if stop is not None and stop():
                    raise Interrupted
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            if pending:  # threads wait for answers, and the process does not end before them
                with suppress(InputError):
                    self.ask("/abort_requests", {})
        ids, logps = zip(*(completion for group in groups for completion in group.result()))
        mask = pad_sequence([torch.ones(len(x), dtype=torch.bool) for x in ids], True)          # (N, T)
        return Rollout(pad_sequence(ids, True, policy.pad_id), mask, pad_sequence(logps, True),
                       torch.tensor([int(x[-1]) not in eos for x in ids]))


# ------------------------------------------------------------------------------------------------------------
# Rewards and evaluation


class RewardError(InputError):
    """A reward function raised, did not return one finite number or None a completion, or fails too often."""


class RewardRunner(runner.RewardRunner):
    """rewards/runner.py, with this program's errors, and rewards as a tensor."""

    error, say, image_columns = RewardError, staticmethod(tqdm.write), ALIASES["images"]

    def score(self, *args, **columns) -> torch.Tensor:
        """(functions, N) fp64, nan where a function abstained."""
        rewards = [[math.nan if x is None else x for x in one] for one in super().score(*args, **columns)]
        return torch.tensor(rewards, dtype=torch.float64)


def evaluate(policy: Policy, processor, rows: list[dict], draws: list[int], prompts, rewards: RewardRunner, *,
             temperature: float, max_completion_length: int, batch_size: int, seed: int, step: int,
             num_generations: int = 1, rollout_tokens: int = 1 << 18, stop=None):
    """num_generations answers to every held-out row -> (texts, rewards (functions, N)), row by row.

    draws: the rows' numbers among the rows of all ranks, which key the randomness. prompts: an iterable of
    the rows' Prompts, taken batch by batch: not all pixels are in memory at once. Temperature 0 is greedy.
    """
    texts, ids, truncated, prompts = [], [], [], iter(prompts)
    for i in range(0, len(rows), batch_size):
        batch = list(islice(prompts, batch_size))
        result = sample(policy, batch, draws[i:i + batch_size],
                        num_generations=num_generations, temperature=temperature,
                        max_completion_length=max_completion_length, seed=seed,
                        rollout_tokens=rollout_tokens, stop=stop)
        texts += decode(policy, processor, result, batch)
        ids += id_lists(result)
        truncated += result.truncated.tolist()
    rows = [row for row in rows for _ in range(num_generations)]
    return texts, rewards.score(texts, rows, step, completion_ids=ids, truncated=truncated,
                                max_completion_length=[max_completion_length] * len(rows))


def pass_at_k(accuracy: torch.Tensor, n: int) -> dict[str, tuple[float, int]]:
    """{"eval/pass@k": (sum over rows, rows)} for k = 2, 4, ... and n. accuracy (rows * n,): n answers a row.

    The unbiased estimate from n >= k answers, c of them right (Chen et al. 2021, arXiv 2107.03374, eq. 1):
        pass@k = 1 - C(n - c, k) / C(n, k)
    Rows with an answer that accuracy abstained on (nan) are left out.

    >>> pass_at_k(torch.tensor([1., 0., 0., 0., 0., 0., 0., 0.]), n=4)
    {'eval/pass@2': (0.5, 2), 'eval/pass@4': (1.0, 2)}
    """
    groups = accuracy.view(-1, n)
    right = [int(c) for c in (groups[~groups.isnan().any(-1)] >= 1).sum(-1)]
    return {f"eval/pass@{k}": (sum(1 - math.comb(n - c, k) / math.comb(n, k) for c in right), len(right))
            for k in sorted({n, *(2 ** i for i in range(1, n.bit_length()) if 2 ** i <= n)} - {1})}


def save_completions(file: Path, rows: list[dict], texts: list[str], rewards: dict,
                     advantages: torch.Tensor | None = None, show: str | None = None):
    """Write a JSON line for each of the N texts, N / len(rows) for every row: its row's source and columns
    (without images), the text, its rewards by name (null for nan), and its advantage. rewards: {name: (N,)}.
    show: also print the texts of the highest and the lowest advantage, after these words."""
    lines = []
    for n, text in enumerate(texts):
        row = rows[n * len(rows) // len(texts)]
        columns = {k: x for k, x in row.items() if not k.startswith("_") and k not in ALIASES["images"]}
        line = {"row": row["_source"], "columns": columns, "completion": text}
        line["rewards"] = {name: None if x[n].isnan() else x[n].item() for name, x in rewards.items()}
        if advantages is not None:
            line["advantage"] = advantages[n].item()
        lines.append(line)
    file.write_text("".join(json.dumps(line, default=repr) + "\n" for line in lines))
    if show is not None:
        for n in (int(advantages.argmax()), len(texts) - 1 - int(advantages.flip(0).argmin())):
            line, text = lines[n], texts[n]
            numbers = line["rewards"] | {"advantage": line["advantage"]}
            numbers = ", ".join(f"{k} {x}" if x is None else f"{k} {x:.4g}" for k, x in numbers.items())
            text = repr(text[:400]) + (f" ... ({len(text)} characters)" if len(text) > 400 else "")
            tqdm.write(f"{show} | {line['row']} | {numbers} | {text}")


def decode(policy: Policy, processor, rollout: Rollout, prompts: list[Prompt]) -> list[str]:
    """The completions as text, without end, padding and image tokens, as many of each prompt. Other special
    tokens stay: <think> may be one, and rewards look for it. Where the chat template opens it at the prompt's
    end (thinking models), the text begins with it."""
    left_out = {*policy.eos_ids, policy.pad_id, *policy.never_sampled_ids}
    texts = [processor.tokenizer.decode([i for i in ids if i not in left_out]) for ids in id_lists(rollout)]
    ends = [processor.tokenizer.decode(prompt.tokens[-16:]) for prompt in prompts]
    opened = [re.search(r"<think>\s*$|$", end)[0] for end in ends]
    return [opened[n * len(prompts) // len(texts)] + text for n, text in enumerate(texts)]


def id_lists(rollout: Rollout) -> list[list[int]]:
    """Each completion's token ids, EOS included."""
    return [ids[mask].tolist() for ids, mask in zip(rollout.completion_ids, rollout.completion_mask)]

"""The policy: a transformers vision-language model, the group row it is fed, its token log-probs, its export.

The one idea of flatpo: a **group is one row**. A group is a prompt (text and images) with its G completions;
SFT is G=1, a preference pair G=2 (chosen, rejected), GRPO G=num_generations. The prompt stands there once:

    tokens      [ prompt ...... | completion 1 .... | completion 2 .. | ... | completion G ... | pad ]
    segment_ids   0 0 0 0 0 0 0   1 1 1 1 1 1         2 2 2 2                 G G G              -1
    group_ids     0 0 0 ...   (a micro-batch's groups share a row: 0 0 ... 1 1 ...)                  -1
    position      0 1 2 ... P-1   P P+1 ...           P P+1 ...               P P+1 ...

    q may attend to k  iff  k <= q and group[k] == group[q] and (segment[k] == 0 or segment[k] == segment[q])

    In a sliding-window layer k must also be nearer than the window, counted in the completion's own sequence
    (not in the row); Gemma 3's image tokens see their whole image, so there k may also come after q.

so an image goes through the vision tower once per group, the prompt through the language model once, and only
completion tokens are scored. Mask and positions are all it takes: the model classes are transformers',
unchanged. The first token of every completion is predicted by the prompt's last hidden state, all later ones
by the token before. tests/test_group_rows.py proves log-probs and gradients equal those of G repeated rows.

Sizes in comments: B rows, S row length, P prompt length, G completions of a group, N of the batch, T longest
completion, M completion tokens, H hidden, V vocabulary, R position rows (3 for M-RoPE models, else 1).
"""

import argparse
import atexit
import copy
import dataclasses
import difflib
import fcntl
import functools
import hashlib
import importlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import threading
import time
import warnings
import zlib
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from types import UnionType
from typing import Annotated, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils._pytree import tree_map, tree_map_only
from tqdm import tqdm
from transformers import (AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText,
                          AutoTokenizer)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import logging

from layers.lora import LoraLinear, add_lora, fp32_weight, unsharded
from papers import PAPERS, flags_of_methods, hooks, load_method

logging.disable_progress_bar()  # ours is the only one
STARTED = time.monotonic()  # --max_hours counts from here
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable")  # one process: we know


class InputError(ValueError):
    """Something the user gave cannot be used. The scripts print its message, no traceback, and exit.

    It may quote a model, a row or a server, so control characters, which a terminal obeys, are escaped.
    """

    def __str__(self):
        return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in super().__str__())


# ------------------------------------------------------------------------------------------------------------
# Packed group rows


class Prompt(NamedTuple):
    """What a group's completions share, as one processor call returned it (data.encode_prompt makes them)."""

    tokens: torch.Tensor             # (P,) ids, image placeholders already expanded
    positions: torch.Tensor          # (R, P)
    pixels: dict[str, torch.Tensor]  # pixel_values, image_grid_thw, ...: what the family's processor returns
    row: dict                        # the dataset row
    image_ids: torch.Tensor | None = None  # (P,) number of the image whose tokens see each other, -1: causal


def cat_pixels(prompts: list[Prompt]) -> dict[str, torch.Tensor]:
    """Join the prompts' image tensors on dim 0, in order, zero-padding the other dims to the largest.

    This one rule serves every layout: (patches, D) with image_grid_thw (Qwen), (images, 3, H, W) (LLaVA),
    (1, images, 3, H, W) with pixel_attention_mask (Idefics3, whose model drops all-zero padding images).
    """
    pixels = {}
    for key in dict.fromkeys(key for p in prompts for key in p.pixels):
        tensors = [p.pixels[key] for p in prompts if key in p.pixels]
        if key == "tower":  # a frozen tower's output (`Policy.run_frozen_tower`)
            pixels[key] = tree_map(lambda *xs: None if xs[0] is None else torch.cat(xs), *tensors)
            continue
        largest = [max(t.shape[d] for t in tensors) for d in range(1, tensors[0].dim())]
        padded = [t.new_zeros(len(t), *largest) for t in tensors]
        for out, t in zip(padded, tensors):
            out[tuple(slice(0, n) for n in t.shape)] = t
        pixels[key] = torch.cat(padded)
    return pixels


def pack_groups(groups, pad_id: int, one_row: bool = False) -> dict:
    """[(Prompt, [completion ids (len,), ...]), ...] -> a row for each group, padded to the longest, or one
    for all of them, which needs no padding.

    Returns, for the row:
      input_ids, segment_ids, group_ids, offsets (B, S): an offset is a token's place in prompt + completion
      image_ids (B, S) or None (see Prompt), position_ids (R, B, S), pixels {name: tensor}
      segments: for each row, (P, [completion length, ...]) of its groups
    and for the completions, in the order given:
      completion_ids, completion_mask (N, T)
      logit_index (N, T): which of the flattened (B * S) hidden states predicts the token
      scored (M,): where completion_mask is True, in the flattened (N * T); made here, on the CPU, because the
      CPU would have to wait for a GPU
    The list of completions may be empty: the sampler's prefill is such a batch.

    >>> prompt = Prompt(torch.tensor([5, 6, 7]), torch.arange(3)[None], {}, {})
    >>> batch = pack_groups([(prompt, [torch.tensor([8, 9]), torch.tensor([4])])], pad_id=0)
    >>> batch["input_ids"].tolist(), batch["segment_ids"].tolist(), batch["position_ids"].tolist()
    ([[5, 6, 7, 8, 9, 4]], [[0, 0, 0, 1, 1, 2]], [[[0, 1, 2, 3, 4, 3]]])
    >>> batch["completion_ids"].tolist(), batch["completion_mask"].tolist(), batch["logit_index"].tolist()
    ([[8, 9], [4, 0]], [[True, True], [True, False]], [[2, 3], [2, 0]])
    """
    sizes = [len(prompt.tokens) + sum(map(len, completions)) for prompt, completions in groups]
    rows = [list(range(len(groups)))] if one_row else [[g] for g in range(len(groups))]
    B, S, R = len(rows), max(sum(sizes[g] for g in row) for row in rows), len(groups[0][0].positions)
    lengths = [len(c) for _, completions in groups for c in completions]
    N, T = len(lengths), max(lengths, default=0)
    first_completion = [0]  # index in N of each group's first completion
    for _, completions in groups:
        first_completion.append(first_completion[-1] + len(completions))

    input_ids, segment_ids = torch.full((B, S), pad_id), torch.full((B, S), -1)
    group_ids, position_ids = torch.full((B, S), -1), torch.zeros(R, B, S, dtype=torch.long)
    offsets = torch.zeros(B, S, dtype=torch.long)
    completion_ids, logit_index = torch.full((N, T), pad_id), torch.zeros(N, T, dtype=torch.long)
    image_ids = None if groups[0][0].image_ids is None else torch.full((B, S), -1)
    segments = []
    for b, row in enumerate(rows):
        start = 0
        segments.append([(len(groups[g][0].tokens), [len(c) for c in groups[g][1]]) for g in row])
        for g in row:
            prompt, completions = groups[g]
            P, next_position = len(prompt.tokens), prompt.positions.max() + 1
            end = start + sizes[g]
            input_ids[b, start:end] = torch.cat([prompt.tokens, *completions])
            group_ids[b, start:end] = g
            segment_ids[b, start:start + P], offsets[b, start:start + P] = 0, torch.arange(P)
            position_ids[:, b, start:start + P] = prompt.positions
            if image_ids is not None:
                image_ids[b, start:start + P] = prompt.image_ids
            at = start + P  # where the next completion starts in the row
            for k, completion in enumerate(completions):
                n, length = first_completion[g] + k, len(completion)
                segment_ids[b, at:at + length], offsets[b, at:at + length] = k + 1, P + torch.arange(length)
                position_ids[:, b, at:at + length] = next_position + torch.arange(length)
                completion_ids[n, :length] = completion
                logit_index[n, :length] = b * S + torch.arange(at - 1, at - 1 + length)
                logit_index[n, 0] = b * S + start + P - 1  # the prompt's last token predicts every first one
                at += length
            start = end
    completion_mask = torch.arange(T) < torch.tensor(lengths, dtype=torch.long)[:, None]
    return {"input_ids": input_ids, "segment_ids": segment_ids, "group_ids": group_ids,
            "image_ids": image_ids, "position_ids": position_ids, "offsets": offsets,
            "pixels": cat_pixels([prompt for prompt, _ in groups]),
            "completion_ids": completion_ids, "completion_mask": completion_mask, "logit_index": logit_index,
            "scored": flat_indices(completion_mask), "segments": segments}


def flat_indices(mask: torch.Tensor) -> torch.Tensor:
    """(N, T) bool -> (M,): the indices of True in the flattened mask. Call it on the CPU: on a GPU it syncs.

    >>> flat_indices(torch.tensor([[True, False], [True, True]])).tolist()
    [0, 2, 3]
    """
    return mask.flatten().nonzero().squeeze(-1)


def spans_within(sizes: list[int], budget: int, alike: bool = True) -> list[tuple[int, int]]:
    """Micro-batches by tokens: spans (start, stop) of consecutive items, whose sizes add up to at most the
    budget. An item that is larger than that is a span of its own.

    alike: all ranks must call this, and get the same number of spans, or FSDP's gathers would not match. A
    rank with fewer spans halves its longest ones.

    >>> spans_within([50, 30, 20, 60], budget=100)
    [(0, 3), (3, 4)]
    """
    spans, start = [], 0
    for i in range(1, len(sizes) + 1):
        if i == len(sizes) or sum(sizes[start:i + 1]) > budget:
            spans.append((start, i))
            start = i
    most = max(all_gather_object(len(spans))) if alike else 0
    while len(spans) < most:
        start, stop = max(spans, key=lambda span: span[1] - span[0])
        at = spans.index((start, stop))
        spans[at:at + 1] = [(start, (start + stop) // 2), ((start + stop) // 2, stop)]
    return spans


def to_device(batch, device):
    """The batch (a dict, or one tensor) on that device. Copies to a GPU start from pinned memory, so that the
    CPU does not wait for them."""
    def move(x):
        if torch.device(device).type == "cuda" and not x.is_cuda:
            return x.contiguous().pin_memory().to(device, non_blocking=True)
        return x.to(device)

    return tree_map_only(torch.Tensor, move, batch)


def attention_rule(segment_ids, group_ids, image_ids=None, offsets=None, window=None):
    """The rule at the top of this file, as may_attend(b, head, q, k) of indices of any shape. All arguments
    but the window are (B, S); offsets count each token's place in its own prompt + completion.

    Padding carries segment -1 and group -1 and so attends to padding, itself included: no softmax row is
    empty (an empty one is nan, and the gradient of nan spreads), and no real token sees it.
    """
    def may_attend(b, _, q, k):
        ordered = q >= k
        if image_ids is not None:
            ordered = ordered | (image_ids[b, q] == image_ids[b, k]) & (image_ids[b, k] >= 0)
        if window is not None:
            ordered = ordered & (offsets[b, q] - offsets[b, k] < window)
        visible = (segment_ids[b, k] == 0) | (segment_ids[b, q] == segment_ids[b, k])
        return ordered & visible & (group_ids[b, q] == group_ids[b, k])

    return may_attend


def group_attention_mask(segment_ids, *others, window=None) -> torch.Tensor:
    """`attention_rule` as a boolean mask (B, 1, S, S), True = may attend."""
    B, S = segment_ids.shape
    may_attend, s = attention_rule(segment_ids, *others, window=window), torch.arange(S)
    return may_attend(torch.arange(B)[:, None, None], 0, s[:, None], s)[:, None]


def group_block_mask(segment_ids, group_ids, image_ids=None, offsets=None, window=None, block=128):
    """`attention_rule` as a BlockMask for FlexAttention, which passes over blocks that nothing may see.

    No (S, S) tensor is made, which takes 5 GB at 70,000 tokens (create_block_mask makes several). A block's
    lowest and highest run of tokens (of one segment), group and offset tell whether some of it may be seen,
    or all of it. A block that is not quite empty or whole may count as mixed: there the rule is asked.
    """
    def ends(x, outside):  # (B, S) -> the lowest and the highest of each block, (B, n)
        blocks = F.pad(x, (0, -S % block), value=outside).unflatten(-1, (-1, block))
        return blocks.amin(-1), blocks.amax(-1)

    def meet(q, k):  # two pairs of (lowest, highest) -> (B, n, n), whether they have a number in common
        return (k[0][:, None] <= q[1][:, :, None]) & (k[1][:, None] >= q[0][:, :, None])

    def listed(blocks):  # how many in each row of blocks, and which, these first
        index = blocks.int().argsort(stable=True, dim=-1, descending=True)
        return blocks.sum(-1, dtype=torch.int32)[:, None], index.int()[:, None]

    S, prompt = segment_ids.shape[1], segment_ids == 0                                    # (B, S)
    run = F.pad((segment_ids.diff() != 0) | (group_ids.diff() != 0), (1, 0)).cumsum(-1)
    runs, groups = ends(run, S), ends(group_ids.masked_fill(group_ids < 0, S), S)         # pairs of (B, n)
    prompts = (ends(group_ids.masked_fill(~prompt, S + 1), S + 1)[0],
               ends(group_ids.masked_fill(~prompt, -1), -1)[1])
    earlier = torch.ones(2 * [runs[0].shape[1]], dtype=torch.bool, device=run.device).tril()    # (n, n)

    some = earlier if image_ids is None else earlier | meet(runs, runs)  # an image is of one run
    some = some & (meet(runs, runs) | meet(groups, prompts))
    own, shared = (((k[:, None] == q[0][:, :, None]) & (k[:, None] == q[1][:, :, None]))
                   for q, k in ((runs, runs[0]), (groups, prompts[0])))                   # (B, n, n)
    whole = earlier.tril(-1) & (runs[0] == runs[1])[:, None] & (own | shared)  # causal: not the diagonal
    if window is not None:
        (nearest, _), (_, furthest) = ends(offsets, S), ends(offsets, -1)
        some, whole = some & (nearest[:, :, None] - furthest[:, None] < window), whole & False

    may_attend = attention_rule(segment_ids, group_ids, image_ids, offsets, window)
    return BlockMask.from_kv_blocks(*listed(some & ~whole), *listed(whole), block, may_attend, (S, S))


def attention_mask_of(batch: dict, window: int | None = None):
    """The mask of a `pack_groups` batch, in the form that is fastest on its device (see group_attention).

    mask.within(window) is the mask of sliding-window layers, made once for all of them. mask.longest is the
    longest prompt + completion: a window of that size or more hides nothing.
    """
    rows = [batch[key] for key in ("segment_ids", "group_ids", "image_ids", "offsets")]  # (B, S) each
    if rows[0].is_cuda:
        mask = group_block_mask(*rows, window=window)
    elif window is None and batch["image_ids"] is None:
        B, S = rows[0].shape  # only its segments are used; read as a mask, it would hide everything
        mask = rows[0].new_zeros((), dtype=torch.bool).expand(B, 1, S, S)
        mask.segments = batch["segments"]
    else:
        mask = group_attention_mask(*rows, window=window)
    mask.longest = max(P + max(lengths, default=0) for groups in batch["segments"] for P, lengths in groups)
    mask.within = functools.cache(lambda window: attention_mask_of(batch, window))
    return mask


def group_attention(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
    """Attention of the language model's layers, registered with transformers as "flatpo". It is computed in
    one of four ways, by device and arguments:

        decoding      key is the sampler's cache, which has an `attend` of its own (rollout.GroupCache)
        on a GPU      a FlexAttention block mask: empty blocks are never computed
        on a CPU      a mask with `segments`: `attend_segments`
        otherwise     any 4-D mask: scaled_dot_product_attention over the whole row

    query (B, heads, S, D), key and value (B, kv, S, D) -> (B, S, heads, D). The last three forms give the
    same result up to rounding.
    sliding_window: a layer's window, None for full attention.
    """
    if hasattr(key, "attend"):
        return key.attend(value, query, attention_mask, scaling, sliding_window), None
    if sliding_window is not None and attention_mask.longest > sliding_window:
        attention_mask = attention_mask.within(sliding_window)
    if isinstance(attention_mask, BlockMask):
        # Without kernel_options a short row goes to a decoding kernel, which has no block size for our masks.
        out = compiled_flex_attention()(query, key, value, block_mask=attention_mask, scale=scaling,
                                        enable_gqa=query.shape[1] != key.shape[1],
                                        kernel_options={"FORCE_USE_FLEX_ATTENTION": True})
        return out.transpose(1, 2).contiguous(), None
    if hasattr(attention_mask, "segments"):
        return attend_segments(query, key, value, attention_mask.segments, scaling), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


@functools.cache
def compiled_flex_attention():
    if torch.cuda.is_available() and os.environ.get("RANK", "0") == "0":
        print("attention kernels are compiled when they are first needed: 10 to 20 s each, once a machine",
              flush=True)
    # torch compiles a variant for each of grad mode, one row or several, one block or several, window and
    # dtype. Beyond 8 variants it would run uncompiled, with (S, S) scores; fullgraph makes that an error.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def attend_segments(query, key, value, segments, scaling) -> torch.Tensor:
    """`attention_rule` without computing the pairs that it hides: a prompt attends to itself, causally, and a
    completion to its prompt and, causally, to itself. Shapes as in `group_attention`; padding gives 0."""
    gqa = query.shape[1] != key.shape[1]
    attend = functools.partial(F.scaled_dot_product_attention, scale=scaling, enable_gqa=gqa)
    causal = functools.cache(lambda P, T: torch.ones(T, P + T, dtype=torch.bool).tril(P))
    rows = []
    for b, groups in enumerate(segments):
        lengths = [n for P, completions in groups for n in (P, *completions)]
        lengths.append(query.shape[2] - sum(lengths))  # padding
        q, k, v = ([x[None] for x in tensor[b].split(lengths, 1)] for tensor in (query, key, value))
        out, at = [], 0
        for P, completions in groups:
            out.append(attend(q[at], k[at], v[at], is_causal=True))                      # (1, heads, P, D)
            for i, T in enumerate(completions, at + 1):
                keys, values = torch.cat([k[at], k[i]], 2), torch.cat([v[at], v[i]], 2)  # (1, kv, P + T, D)
                out.append(attend(q[i], keys, values, causal(P, T)))
            at += 1 + len(completions)
        rows.append(torch.cat([*out, torch.zeros_like(q[-1])], 2))
    return torch.cat(rows).transpose(1, 2).contiguous()


def window_attention(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **kwargs):
    """Attention of Qwen-VL's vision tower over its windows and images, which are packed into one row.

    transformers calls its attention once for each window, thousands of times for a batch of large images. A
    function with "flash" in its name gets all of them in one call. Here windows of one length are one batch.
    query, key, value (1, heads, S, D), cu_seq_lens_q (windows + 1,) -> (1, S, heads, D).
    """
    lengths = window_lengths(cu_seq_lens_q)
    runs = [(length, len(list(alike))) for length, alike in itertools.groupby(lengths)]  # of equal windows
    sizes = [length * n for length, n in runs]
    pieces, out = [x[0].split(sizes, 1) for x in (query, key, value)], [None] * len(runs)
    for length in set(lengths):
        alike = [i for i, (n, _) in enumerate(runs) if n == length]
        batch = [torch.cat([piece[i] for i in alike], 1) if len(alike) > 1 else piece[alike[0]]
                 for piece in pieces]                                                 # (heads, n * length, D)
        batch = [x.unflatten(1, (-1, length)).transpose(0, 1) for x in batch]         # (n, heads, length, D)
        x = F.scaled_dot_product_attention(*batch, scale=scaling)
        x = x.transpose(0, 1).flatten(1, 2)                                           # (heads, n * length, D)
        for i, part in zip(alike, x.split([sizes[i] for i in alike], 1)):
            out[i] = part
    return torch.cat(out, 1).transpose(0, 1)[None], None


def window_lengths(ends: torch.Tensor) -> list[int]:
    """The lengths of windows, from where they start and end (windows + 1,). They are kept on the tensor,
    which all layers of a tower and their recomputation share: one GPU sync, not one a layer."""
    if not hasattr(ends, "lengths"):
        ends.lengths = ends.diff().tolist()
    return ends.lengths


AttentionInterface.register("flatpo", group_attention)
AttentionInterface.register("flatpo_flash", window_attention)


# ------------------------------------------------------------------------------------------------------------
# Log-probs


def scaled_logits(logits, never_sampled, temperature):
    """(M, V) -> fp32 logits / temperature, never-sampled ids at -1e30: probability exactly 0, yet finite, so
    that p * logit in the entropy is 0, not nan. Sampler, trainer and reference use this."""
    logits = logits.float()
    if temperature != 1:
        logits /= temperature
    return logits.index_fill_(-1, never_sampled, -1e30)


def head_weight(weight: torch.Tensor, dtype) -> torch.Tensor:
    """The output head (V, H) for `head_product`. On a CPU bf16 values are kept in fp32, because torch has no
    product there that takes bf16 and returns fp32."""
    weight = weight.to(dtype)
    return weight if weight.is_cuda else weight.float()


def head_product(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(n, H) hidden states, `head_weight` (V, H) -> (n, V) logits, always in fp32.

    Logits rounded to bf16 are off by up to 0.06 at a logit of 20, differently in sampler and trainer.
    """
    if hidden.dtype == torch.float32:
        return hidden @ weight.T
    if hidden.is_cuda:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    with bf16_products():
        return hidden.float() @ weight.T


@contextmanager
def bf16_products():
    """Within it a CPU with bf16 units multiplies fp32 matrices as bf16 and sums in fp32. This is faster, and
    exact if all values can be written in bf16. A CPU without such units computes as before."""
    settings = torch.backends.mkldnn.matmul
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


class ChunkedLogps(torch.autograd.Function):
    """p = softmax(h W^T / temperature) -> log p[target], entropy, log sum_v p_v^2; `chunk` tokens at a time.

    The whole (M, V) logits never exist. Forward keeps each token's log-sum-exp, and backward computes the
    logits again, chunk by chunk:

        d logp / dz = onehot(target) - p          d entropy / dz = -p (log p + entropy)

    The logits z are always fp32 (`head_product`). If the head is frozen (LoRA), forward also keeps the slope
    d logp / dh (M, H), so that backward needs the logits only for the entropy. Entropy, and log sum_v p_v^2
    (for WPO's weights; it has no gradient), are None unless asked for.

    hidden h (M, H), weight W (V, H), targets (M,), never_sampled (few,) -> three (M,), fp32.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, never_sampled, temperature, chunk, entropies, sums_of_squares):
        dtype, M = hidden.dtype, len(hidden)
        logps, lse = (hidden.new_empty(M, dtype=torch.float32) for _ in range(2))
        entropy = torch.empty_like(lse) if entropies else None
        log_sum_sq = torch.empty_like(lse) if sums_of_squares else None
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[:2] == (True, False) else None
        W = head_weight(weight, dtype)
        for i in range(0, M, chunk):
            at = slice(i, i + chunk)
            logits = scaled_logits(head_product(hidden[at], W), never_sampled, temperature)       # (chunk, V)
            log_p, target = logits.log_softmax(-1), targets[at, None]
            logps[at] = log_p.gather(-1, target).squeeze(-1)
            lse[at] = logits.gather(-1, target).squeeze(-1) - logps[at]
            if entropies or sums_of_squares or slope is not None:
                p = torch.exp(log_p, out=logits)
                if entropies:
                    entropy[at] = -torch.einsum("nv,nv->n", p, log_p)
                if sums_of_squares:
                    log_sum_sq[at] = torch.einsum("nv,nv->n", p, p).log()
                if slope is not None:
                    p[torch.arange(len(p), device=p.device), targets[at]] -= 1
                    slope[at] = p.to(dtype).to(W.dtype) @ W / -temperature
                del p
            del logits, log_p  # before the next chunk's are made
        # (M, H), (V, H), (M,), (few,), (M,), (M,), (M, H)
        ctx.save_for_backward(hidden, weight, targets, never_sampled, lse, entropy, slope)
        ctx.temperature, ctx.chunk = temperature, chunk
        if sums_of_squares:
            ctx.mark_non_differentiable(log_sum_sq)
        ctx.set_materialize_grads(False)  # grad_entropy is None unless the loss has an entropy term
        return logps, entropy, log_sum_sq

    @staticmethod
    def backward(ctx, grad_logps, grad_entropy, _):
        hidden, weight, targets, never_sampled, lse, entropy, slope = ctx.saved_tensors
        nothing = [None] * 6
        if slope is not None and grad_entropy is None:
            return grad_logps[:, None].to(slope.dtype) * slope, None, *nothing
        dtype = hidden.dtype
        grad_logps = torch.zeros_like(lse) if grad_logps is None else grad_logps
        grad_hidden, grad_weight = torch.empty_like(hidden), None
        if ctx.needs_input_grad[1]:  # not where the head is frozen, as with LoRA
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        W = head_weight(weight, dtype)
        for i in range(0, len(hidden), ctx.chunk):
            at = slice(i, i + ctx.chunk)
            h, g = hidden[at], grad_logps[at, None] / ctx.temperature
            log_p = scaled_logits(head_product(h, W), never_sampled, ctx.temperature)             # (chunk, V)
            log_p -= lse[at, None]
            if grad_entropy is not None:
                g_entropy = grad_entropy[at, None] / ctx.temperature
                grad = log_p.exp().mul_(-g - g_entropy * (log_p + entropy[at, None]))
            else:
                grad = log_p.exp_().mul_(-g)
            grad[torch.arange(len(grad), device=grad.device), targets[at]] += g[:, 0]
            grad = grad.to(dtype).to(W.dtype)  # as bf16 rounds it
            grad_hidden[at] = (grad @ W).to(dtype)
            if grad_weight is not None and h.is_cuda and dtype != torch.float32:
                torch.addmm(grad_weight, grad.T, h, out_dtype=torch.float32, out=grad_weight)
            elif grad_weight is not None:
                grad_weight.addmm_(grad.T, h.to(grad.dtype))  # spares a (V, H) tensor a chunk
            del log_p, grad
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, *nothing


# The families that the tests build, each from transformers' own classes. transformers tells us most of their
# differences: image tokens come from the processor, M-RoPE's positions from `get_rope_index`, windows from
# the layers. Only what it does not tell is listed here.
TESTED = ("gemma3", "idefics3", "internvl", "llama", "llava", "llava_next", "llava_onevision", "qwen2",
          "qwen2_5_vl", "qwen2_vl", "qwen3", "qwen3_vl", "qwen3_vl_moe")
BIDIRECTIONAL_IMAGES = ("gemma3",)  # the tokens of an image attend to each other in both directions


class Policy(nn.Module):
    """A transformers vision-language model, and the two things alignment asks of it: log-probs and decoding.

    `policy.hf` is the model itself. A text-only prompt is a prompt without pixels. never_sampled are the ids
    that can never be an answer (image, video and other placeholders, and rows of the head beyond the
    tokenizer): the sampler does not draw them, and every log-prob is normalised without them.

    Weights are fp32 masters. With dtype bfloat16 every module computes in bf16 with its weights cast
    (`compute_in`): the same bf16 program on one rank, on many (FSDP gathers bf16) and in the sampler.
    """

    def __init__(self, hf, processor, dtype=torch.float32):
        super().__init__()
        config, tokenizer = hf.config, getattr(processor, "tokenizer", processor)
        text_config, head = config.get_text_config(), hf.get_output_embeddings()
        family = config.model_type
        other = set(getattr(text_config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
        if other:
            raise InputError(f"{family}: layers with {', '.join(sorted(other))} are not supported")
        if getattr(text_config, "attn_logit_softcapping", None):
            raise InputError(f"{family}: attention with soft-capping is not supported")
        if getattr(text_config, "final_logit_softcapping", None) or getattr(head, "bias", None) is not None:
            raise InputError(f"{family}: an output head with soft-capping or a bias is not supported")
        placeholder = re.compile(r"(image|video|vision|audio|boi|eoi)\w*token\w*(id|index)$")
        ids = {v for owner in (config.to_dict(), vars(processor)) for k, v in owner.items()
               if placeholder.search(k) and isinstance(v, int) and 0 <= v < head.weight.shape[0]}
        ids |= set(range(len(tokenizer), head.weight.shape[0]))
        eos = hf.generation_config.eos_token_id if hf.generation_config else None
        eos = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
        of_template = {end_of_turn(processor)} - eos - {None}
        eos |= of_template
        if not eos or not all(isinstance(i, int) for i in eos):
            raise InputError(f"{hf.config.name_or_path}: neither generation_config.json nor the tokenizer "
                             f"names an EOS token by its id: {[*eos]}")

        text_config._attn_implementation = "flatpo"
        for module in hf.modules():
            if "cu_seqlens" in inspect.signature(module.forward).parameters and hasattr(module, "scaling"):
                module.config._attn_implementation = "flatpo_flash"  # one call for all windows
        uneven = family in BIDIRECTIONAL_IMAGES or getattr(text_config, "sliding_window", None)
        self.notes = [note for holds, note in (
            (family not in TESTED, "not among the families that the tests cover"),
            (isinstance(processor, TextProcessor), "a text-only model: a row with images is an error"),
            (uneven, "sliding windows or bidirectional image tokens: a CPU computes masked positions too"),
            (hasattr(text_config, "router_aux_loss_coef"), "the router's auxiliary loss is not added"),
            (of_template, f"{''.join(tokenizer.convert_ids_to_tokens(i) for i in of_template)}, which the "
                          "chat template writes after an answer, ends one here"),
        ) if holds]
        self.hf, self.dtype, self.filler = hf, dtype, None
        self.eos_ids = sorted(eos)
        self.pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        never_sampled = torch.tensor(sorted(ids - eos), dtype=torch.long)  # (few,)
        self.register_buffer("never_sampled", never_sampled, persistent=False)
        self.never_sampled_ids = frozenset(never_sampled.tolist())  # kept on the CPU to avoid a device sync

        for module in hf.modules():
            # No dropout: the ratio of the first update must be exactly 1. train() mode stays on, because
            # transformers silently skips gradient checkpointing in eval().
            for name in ("p", "dropout", "attention_dropout", "drop_path_rate", "drop_prob"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
            if isinstance(module, (nn.Conv2d, nn.Conv3d)) and (
                    module.kernel_size == module.stride and module.groups == 1 and set(module.dilation) == {1}
                    and (module.padding == "valid" or not any(module.padding))):
                module.forward = functools.partial(embed_patches, module)

        self.casting = []  # [(module, its forward that casts, its own)], in bf16
        for module in hf.modules() if dtype != torch.float32 else ():
            if next(module.parameters(recurse=False), None) is not None:
                own = vars(module).get("forward")
                self.casting.append((module, compute_in(module, dtype), own))
        self.kept, self.copies = {}, {}  # what sampler and `compute_weights` keep on a GPU; see `let_go`
        self.spare_memory = 0  # bytes of the GPU that training does not need: `preflight` measures them
        self.whole = False  # True within `gathered`
        self.source, self.files = None, {}  # where it was loaded from, and the files that `export` copies

    @property
    def device(self):
        return self.never_sampled.device

    def let_go(self):
        """Free what the sampler keeps on a GPU between its calls (caches, graphs, bf16 weights) if training
        needs the memory. Every pass with gradients calls this."""
        if not self.kept and not self.copies:
            return
        tensors = [*self.copies.values(), *(x for kept in self.kept.values() for x in kept.tensors())]
        if sum(x.nbytes for x in tensors) > self.spare_memory:
            self.kept.clear(), self.copies.clear()

    def at_same_address(self, key, new: torch.Tensor, keep: bool) -> torch.Tensor:
        """`new`; if keep, in the memory that this key had in the call before: CUDA graphs read it there."""
        if not keep:
            return new
        old = self.copies.get(key)
        if old is None or old.shape != new.shape:
            self.copies[key] = new.clone()
            return self.copies[key]
        return old.copy_(new)

    @contextmanager
    def compute_weights(self, keep: bool = False):
        """For the sampler: within it the weights have the compute dtype, so that no forward casts them.
        (FSDP's gathered weights have it already.) On a CPU the linear layers of decoder and head use a copy
        of their weight in oneDNN's own layout, which makes a step of the sampler 1.1 (bf16) to 1.7 times as
        fast. keep: the copies stay in memory until `let_go`."""
        masters = [(p, p.data) for p in self.parameters()
                   if p.is_floating_point() and p.dtype != self.dtype and not hasattr(p, "quant_state")]
        packed, dora, mkldnn = [], [m for m in self.modules() if hasattr(m, "lora_m")], torch.ops.mkldnn
        for module, _, own in self.casting:
            del module.forward
            if own is not None:
                module.forward = own
        try:
            for p, data in masters:
                p.data = self.at_same_address(id(p), data.to(self.dtype), keep)
            self.head = head_weight(self.hf.get_output_embeddings().weight.detach(), self.dtype)
            if self.device.type == "cpu" and torch.backends.mkldnn.is_available() and (
                    self.dtype == torch.float32 or mkldnn._is_mkldnn_bf16_supported()):
                packed = [m for m in (*self.hf.get_decoder().modules(), self.hf.get_output_embeddings())
                          if type(m).forward in (nn.Linear.forward, LoraLinear.forward)
                          and not hasattr(m.weight, "quant_state")]  # 4 bits
            for layer in packed:
                weight = mkldnn._reorder_linear_weight(layer.weight.detach(), None)
                name = "product" if isinstance(layer, LoraLinear) else "forward"
                setattr(layer, name, lambda x, w=weight, b=layer.bias: mkldnn._linear_pointwise(
                    x.to(w.dtype), w, b, "none", [], ""))
            for layer in dora:  # computed here once, since it reads W twice; not once a token
                layer.gain = self.at_same_address(("gain", id(layer)), layer.magnitude().detach(), keep)
            yield
        finally:
            for layer in (*packed, *dora):
                for name in ("product", "forward", "gain"):
                    vars(layer).pop(name, None)
            for module, casts, _ in self.casting:
                module.forward = casts
            for p, data in masters:
                p.data = data
            self.head = None

    def pack(self, groups, share_prompt: bool = True) -> dict:
        """`pack_groups` into one row; without share_prompt each completion has its own copy of the prompt.
        Under FSDP every rank must run the vision tower in every pass, or the others wait for it. So a batch
        without images gets `filler`, a prompt with an image and no completion, whose gradient is 0."""
        if not share_prompt:
            groups = [(prompt, [completion]) for prompt, completions in groups for completion in completions]
        if self.filler is not None and not any(prompt.pixels for prompt, _ in groups):
            groups = [*groups, (self.filler, [])]
        return pack_groups(groups, self.pad_id, one_row=True)

    def prompt_positions(self, tokens: torch.Tensor, text_inputs: dict, pixels: dict) -> torch.Tensor:
        """Rotary positions (R, P) of one prompt (P,). M-RoPE families have `get_rope_index`: an image spans a
        (t, h, w) grid, so the text after it has positions below its index. Other families count up."""
        rope_index = getattr(self.hf.base_model, "get_rope_index", None)
        if rope_index is None:
            return torch.arange(len(tokens))[None]
        types = text_inputs.get("mm_token_type_ids", torch.zeros_like(tokens)[None])  # 0 text, 1 image
        known = inspect.signature(rope_index).parameters
        grids = {k: v for k, v in pixels.items() if k in known}
        return rope_index(input_ids=tokens[None], mm_token_type_ids=types, **grids)[0][:, 0]

    def prompt_images(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """(P,) the image that each prompt token belongs to, -1: text; None where image tokens are causal."""
        if self.hf.config.model_type not in BIDIRECTIONAL_IMAGES:
            return None
        image = tokens == self.hf.config.image_token_id
        first = image & ~F.pad(image, (1, 0))[:-1]  # other tokens stand between two images
        return torch.where(image, first.cumsum(0), -1)

    @torch.no_grad()
    def run_frozen_tower(self, prompts: list[Prompt]) -> list[Prompt]:
        """Run a vision tower of which nothing is trained, once for every prompt. Its output is cached in
        pixels["tower"] and reused by every pass (`hidden`), the reference's too. All ranks must call this."""
        base, seen = self.hf.base_model, []
        if not hasattr(base, "get_image_features") or self.hf.config.model_type not in TESTED:
            return prompts  # `cat_pixels` may not be able to join the output of another family's tower
        tower, known = self.hf.get_encoder(modality="image"), inspect.signature(base.get_image_features)
        if any(p.requires_grad for p in tower.parameters()):
            return prompts
        hook = tower.register_forward_hook(lambda _, inputs, out: seen.append(to_device(out, "cpu")))
        with gathered(self):
            for pixels in (prompt.pixels for prompt in prompts if prompt.pixels):
                inputs = {k: x for k, x in pixels.items() if k in known.parameters}
                base.get_image_features(**to_device(inputs, self.device))
                pixels["tower"] = seen.pop()
        hook.remove()
        return prompts

    def hidden(self, input_ids, position_ids, attention_mask, pixels=None, cache=None) -> torch.Tensor:
        """Last hidden states (B, S, H) of tokens (B, S) at positions (R, B, S). attention_mask:
        `attention_mask_of`, or of a step of the sampler GroupCache's own_bias (B, 1, 1, W)."""
        positions, pixels = position_ids if len(position_ids) > 1 else position_ids[0], dict(pixels or {})
        seen = pixels.pop("tower", None)
        if seen is not None:  # a copy each time: transformers writes into its fields
            tower = self.hf.get_encoder(modality="image")
            forward, tower.forward = tower.forward, lambda *_, **__: to_device(seen, self.device)
        try:
            return self.hf.base_model(
                input_ids=input_ids, position_ids=positions, attention_mask=attention_mask,
                past_key_values=cache, use_cache=cache is not None, **pixels).last_hidden_state
        finally:
            if seen is not None:
                tower.forward = forward

    def logits(self, hidden: torch.Tensor, temperature: float) -> torch.Tensor:
        """(N, H) -> (N, V), for the sampler: one token a row."""
        head = self.hf.get_output_embeddings()
        logits = head(hidden) if self.dtype == torch.float32 else head_product(hidden, self.head)
        return scaled_logits(logits, self.never_sampled, temperature)

    def forward(self, batch: dict, temperature: float = 1.0, chunk: int | None = None,
                entropies: bool = True, sums_of_squares: bool = False):
        """A `pack_groups` batch -> per_token_logps, entropies, log_sum_sq_probs: three (N, T), fp32, 0 where
        completion_mask is False; the last two None unless asked for. Logits are divided by the temperature
        the completions were sampled at. `chunk` tokens' logits exist at once; default 512, on a GPU 2048."""
        if torch.is_grad_enabled():
            self.let_go()
        mask, scored = batch["completion_mask"], batch["scored"]
        chunk = chunk or (2048 if mask.is_cuda else 512)
        hidden = self.hidden(batch["input_ids"], batch["position_ids"], attention_mask_of(batch),
                             batch["pixels"])
        index = batch["logit_index"].flatten()[scored]                                            # (M,)
        hidden = hidden.flatten(0, 1)                                                             # (B * S, H)
        # On each device this form has a repeatable backward.
        used = hidden[index] if mask.is_cuda else hidden.index_select(0, index)                   # (M, H)
        weight, targets = self.hf.get_output_embeddings().weight, batch["completion_ids"].flatten()[scored]
        per_token = ChunkedLogps.apply(used, weight, targets, self.never_sampled, temperature, chunk,
                                       entropies, sums_of_squares)                                # 3 x (M,)
        zeros = torch.zeros(mask.numel(), device=mask.device)
        return tuple(None if x is None else zeros.scatter(0, scored, x).view(mask.shape) for x in per_token)


def embed_patches(conv, x: torch.Tensor) -> torch.Tensor:
    """A convolution whose kernel is its stride, (B, C, n1 * k1, n2 * k2, ...) -> (B, E, n1, n2, ...), as one
    matrix product of the patches. Qwen-VL's convolution takes 2 to 200 times as long, depending on CPU and
    dtype, and some of a GPU's kernels for it are not repeatable."""
    kernel = conv.kernel_size
    counts = [size // k for size, k in zip(x.shape[2:], kernel)]
    for d, (n, k) in enumerate(zip(counts, kernel), 2):
        x = x.narrow(d, 0, n * k)  # drop an edge that does not fill a kernel, as a convolution does
    x = x.reshape(*x.shape[:2], *(size for pair in zip(counts, kernel) for size in pair))
    dims = range(2, x.dim(), 2)
    x = x.permute(0, *dims, 1, *(d + 1 for d in dims))                      # (B, n1, n2, ..., C, k1, k2, ...)
    patches = x.flatten(-1 - len(kernel))  # (B, n1, n2, ..., C * k1 * k2 ...)
    return F.linear(patches, conv.weight.flatten(1), conv.bias).movedim(-1, 1)


def compute_in(module: nn.Module, dtype):
    """Let a module compute in `dtype`: its own parameters (fp32 masters) and floating-point inputs are cast
    for each call. Gradients reach the masters through the cast. Returns the module's new forward.

    torch.autocast would not do: it leaves embeddings, norms and so the residual stream in fp32, unlike the
    sampler and FSDP, and keeps every cast weight until the pass ends.
    """
    forward = module.forward
    if hasattr(module, "compute_dtype"):  # bitsandbytes' 4-bit layers
        module.compute_dtype = dtype

    def cast(x):
        return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    if type(module) is nn.Embedding:  # cast the rows that are used, not the whole table
        module.forward = functools.wraps(forward)(lambda ids: cast(forward(ids)))
        return module.forward

    def with_casts(function):
        @functools.wraps(function)
        def in_dtype(*args, **kwargs):
            masters = {name: p for name, p in module._parameters.items()
                       if cast(p) is not p and not hasattr(p, "quant_state")}  # not 4-bit ones
            module._parameters.update({name: cast(p) for name, p in masters.items()})
            try:
                return function(*map(cast, args), **{name: cast(x) for name, x in kwargs.items()})
            finally:
                module._parameters.update(masters)
        return in_dtype

    module.forward = with_casts(forward)
    checkpoint = getattr(module, "_gradient_checkpointing_func", None)
    if checkpoint is not None:  # transformers recomputes a layer without calling its `forward`
        module._gradient_checkpointing_func = (
            lambda function, *args, **kwargs: checkpoint(with_casts(function), *args, **kwargs))
    return module.forward


# ------------------------------------------------------------------------------------------------------------
# A model's folder is data: it is checked before transformers reads it

INDEX = "model.safetensors.index.json"
CONFIGS = re.compile(r"(generation_|tokenizer_|(video_)?(pre)?processor_)?config\.json")
# The files that belong to a model, beside its weights and their config. `export` copies these and no others.
MODEL_FILES = re.compile(
    r"(added_tokens|special_tokens_map|tokenizer|vocab|tekken|chat_template)\.json|(vocab|merges)\.txt"
    r"|(tokenizer_|(video_)?(pre)?processor_)config\.json|.+\.(model|spm|tiktoken)|(LICENSE|NOTICE)[\w.]*"
    r"|(additional_chat_templates/.+|chat_template)\.jinja")
# Config keys that make transformers run code, or fetch or read files outside the folder.
REFUSED = {
    "auto_map": "code of its own, which is never run (models for transformers' classes often end in -hf)",
    "audio_tokenizer": "another model", "transformers_weights": "other weights",
    "fast_tokenizer_files": "other files", "repo_path": "other files", "model_file": "other files"}


def model_folder(path: str, weights: bool) -> Path:
    """The folder itself, or a hub id's snapshot in the hub's cache, fetched if it is not there."""
    if os.path.isdir(path):
        return Path(path)
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise InputError(f"the model {path}: no such folder (and not a hub id like owner/name)")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.jinja", "*.txt", "*.model", "*.spm", "*.tiktoken", "LICENSE*", "NOTICE*"]
    try:
        folder = Path(snapshot_download(path, allow_patterns=patterns))
        if weights:  # not every safetensors: some repositories hold several copies
            index = json.loads((folder / INDEX).read_text()) if (folder / INDEX).exists() else {}
            names = ["model.safetensors", *set(index.get("weight_map", {}).values())]
            snapshot_download(path, revision=folder.name, allow_patterns=names)
    except Exception as error:  # of many kinds: no network, no such model, no right to it
        raise InputError(f"the model {path}: no such folder, and the hub cannot give it: {one_line(error)}")
    return folder


def listed(names, most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + ", ..." * (len(names) > most)


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def fault_of(file: Path, folder: Path) -> str | None:
    """Why this is not a plain file of the folder, or None. A link must stay in the folder; in the hub's cache
    it may point from a snapshot to the blobs."""
    if not file.exists():
        return "a link to nothing" if file.is_symlink() else "missing"
    root = folder.resolve()
    blobs = root.parents[1] / "blobs" if root.parent.name == "snapshots" else root
    if not any(file.resolve().is_relative_to(place) for place in (root, blobs)):
        return "a link that leaves the folder (copy the file)"
    return None if file.is_file() else "a folder" if file.is_dir() else "not a regular file"


def read_plain_file(file: Path, folder: Path, size: int | None = None) -> bytes:
    """The file's first `size` bytes, or all. InputError for anything but a plain file, and for a git-lfs
    pointer or a web page that was saved under its name."""
    if (fault := fault_of(file, folder)) is not None:
        raise InputError(f"{file}: {fault}")
    try:
        with open(file, "rb") as opened:
            content = opened.read(size)
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from error
    start = content[:64].lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise InputError(f"{file}: a git-lfs pointer, not the file itself (git lfs pull)")
    if start.startswith((b"<!doctype", b"<html")):
        raise InputError(f"{file}: a web page")
    return content


def read_model_folder(path: str, weights: bool = True) -> tuple[Path, dict[str, bytes], list[str]]:
    """Refuse a model's folder (or hub id) in which a file is damaged, or would make transformers unpickle,
    run code or read outside it. -> the folder, {name: content} of its small files, and the names of entries
    that are not plain files, with the reason.
    """
    folder, files, odd, index = model_folder(path, weights), {}, [], None
    for file in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*")]):
        name = file.relative_to(folder).as_posix()
        if name == "adapter_config.json":
            raise InputError(f"{file}: a PEFT adapter; pass the whole model (a run's final/), or merge it "
                             "(peft's merge_and_unload)")
        if name == "audio_tokenizer_config.json" or name.startswith("shard-"):
            raise InputError(f"{file}: no part of a model that can be trained here")
        if MODEL_FILES.fullmatch(name) or CONFIGS.fullmatch(name) or name == INDEX:
            files[name] = read_plain_file(file, folder)
        elif (fault := fault_of(file, folder)) and (file.suffix or not file.is_dir()):
            odd.append(f"{name} ({fault})")
    if "config.json" not in files:
        raise InputError(f"{folder}/config.json: missing, so this is no model")

    for name in [name for name in files if name.endswith(".json")]:
        try:
            content = json.loads(files[name])
        except (ValueError, RecursionError) as error:
            raise InputError(f"{folder / name}: not JSON: {one_line(error)}") from error
        if CONFIGS.fullmatch(name):
            check_config(folder / name, content)
        index = content if name == INDEX else index
    if weights:
        check_weights(folder, index)
    return folder, files, odd


def models_of(args) -> list[str]:
    """The folders or hub ids that a run reads: the start, and the models that files of --algo score with."""
    further = [path for scorers in hooks(args, "scorers") for path in scorers(args).values()]
    return [path for path in (args.model_name_or_path, *further) if not is_tiny(path)]


def check_config(file: Path, config):
    """Refuse a config that is not a JSON object, or that has one of the REFUSED keys at any depth."""
    if not isinstance(config, dict):
        raise InputError(f"{file}: expected a JSON object, got {type(config).__name__}")
    values = [config]
    for value in values:  # the list grows meanwhile: every nested value is visited
        values += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        for key, x in value.items() if isinstance(value, dict) else ():
            asked = REFUSED.get(key) if x else None
            if key.endswith("_implementation") and "/" in str(x):
                asked = "a kernel from a hub"
            if key == "model_type" and str(x).startswith("timm"):
                asked = "timm, which loads weights of its own"
            if asked:
                raise InputError(f"{file} asks for {asked} ({key}: {str(x)[:100]})")


def check_weights(folder: Path, index):
    """Refuse weights that are missing, cut short, pickled or outside the folder. index: the content of INDEX,
    None without one."""
    names = ["model.safetensors"]
    if not os.path.lexists(folder / names[0]) and index is None:
        raise InputError(f"{folder}: no model.safetensors and no {INDEX} (only safetensors are read)")
    if not os.path.lexists(folder / names[0]):
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not isinstance(index.get("metadata"), dict):
            raise InputError(f"{folder / INDEX}: expected the objects metadata and weight_map")
        names = sorted(set(map(str, weight_map.values())))
    for name in names:
        if "/" in name or not name.endswith(".safetensors"):
            raise InputError(f"{folder / INDEX} names {name}: only safetensors in the folder are read")
        read_plain_file(folder / name, folder, 64)
        try:
            with safe_open(folder / name, "pt"):  # checks its header against its size
                pass
        except Exception as error:
            raise InputError(f"{folder / name}: cut or damaged: {one_line(error)}") from error


# ------------------------------------------------------------------------------------------------------------
# Load and export


def without_video(processor_class):
    """The processor class without its video part, for which transformers needs torchvision. Without the part
    transformers refuses to build Qwen-VL's processor, although images and text need only Pillow."""
    names = processor_class.get_attributes()
    if not any("video" in name for name in names):
        return processor_class

    class ImageTextProcessor(processor_class):
        @classmethod
        def get_attributes(cls):
            return [name for name in names if "video" not in name]

        @classmethod
        def from_args_and_dict(cls, args, processor_dict, **kwargs):
            given = iter(args)
            args = [None if "video" in name else next(given) for name in names]
            return super().from_args_and_dict(args, processor_dict, **kwargs)

    ImageTextProcessor.__name__ = ImageTextProcessor.__qualname__ = processor_class.__name__  # the saved name
    return ImageTextProcessor


def end_of_turn(processor) -> int | None:
    """The special token that the chat template writes after an answer, if any: the tokenizer of a base model
    names another one as its EOS."""
    tokenizer, answer = getattr(processor, "tokenizer", processor), "forty-two"
    turns = [{"role": role, "content": [{"type": "text", "text": text}]}
             for role, text in (("user", "How many?"), ("assistant", answer))]
    try:
        text = processor.apply_chat_template(turns, tokenize=False)
    except Exception:  # a template may raise anything; the first row says what is wrong with it
        return None
    after = text.rpartition(answer)[2] if answer in text else ""
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    return next((i for i in ids if i in tokenizer.added_tokens_decoder), None)


class TextProcessor:
    """A text-only model's tokenizer, used like a processor. Its chat template takes strings, not blocks."""

    def __init__(self, tokenizer):
        self.tokenizer, self.chat_template = tokenizer, tokenizer.chat_template
        self.save_pretrained = tokenizer.save_pretrained

    def apply_chat_template(self, messages: list[dict], **kwargs):
        if any(block["type"] == "image" for m in messages for block in m["content"]):
            raise ValueError("a text-only model takes no images")
        joined = [m | {"content": "".join(block["text"] for block in m["content"])} for m in messages]
        return self.tokenizer.apply_chat_template(joined, **kwargs)

    def __call__(self, text, images=None, **kwargs):
        return self.tokenizer(text, **kwargs)


def load_processor(path: str):
    """The checkpoint's processor: image processor, tokenizer, chat template, and no video processor, whether
    torchvision is there or not."""
    config = AutoConfig.from_pretrained(path)
    if type(config) not in PROCESSOR_MAPPING:
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise InputError(f"{path}: {config.model_type} is neither a vision-language nor a language model")
        return TextProcessor(AutoTokenizer.from_pretrained(path))
    return without_video(PROCESSOR_MAPPING[type(config)]).from_pretrained(path)


@contextmanager
def loading(what):
    """Within it any error of transformers becomes an InputError of one line, which names `what`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{what}: {one_line(error)}") from error


def load_policy(path: str, dtype: str = "float32", device="cpu", gradient_checkpointing: bool = False,
                freeze_vision_tower: bool = False, shard_size: int | None = None, lora=None,
                eos_token: str | None = None):
    """A local folder or a hub id -> (Policy, processor). Weights are fp32 whatever the compute dtype.

    freeze_vision_tower freezes what transformers calls the image encoder; Qwen's merger is part of it, the
    projector of LLaVA and Idefics3 is not. lora: the flags that `add_lora` reads. With several ranks the
    policy comes sharded (`shard`): rank 0 reads the weights, and the others never hold more than their part.
    """
    rank_0 = not dist.is_initialized() or dist.get_rank() == 0
    folder, files, odd = read_model_folder(path, weights=rank_0)
    with loading(folder / "config.json"):
        config = AutoConfig.from_pretrained(folder)
    with loading(folder):
        processor = load_processor(str(folder))
    if not getattr(processor, "chat_template", None):
        raise InputError(f"{path}: its processor has no chat template")
    template = next((n for n in files if n.startswith("chat_template")), "tokenizer_config.json")
    with loading(folder / template):
        text = [{"type": "text", "text": "hello"}]
        processor.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
    tokenizer = getattr(processor, "tokenizer", processor)
    with loading(folder / "tokenizer_config.json"):
        tokenizer("hello")
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise InputError(f"--eos_token {eos_token}: the tokenizer of {path} has no such token")
        tokenizer.eos_token = eos_token
    quantized = (getattr(config, "quantization_config", None)
                 or getattr(config.get_text_config(), "quantization_config", None))
    if quantized and not (quantized.get("quant_method") == "bitsandbytes" and quantized.get("load_in_4bit")
                          and lora is not None and lora.lora_r and not dist.is_initialized()):
        raise InputError(f"{path}: of quantized weights only bitsandbytes' 4-bit ones can be used, with "
                         "--lora_r, on one rank")
    text_only = isinstance(processor, TextProcessor)
    auto = AutoModelForCausalLM if text_only else AutoModelForImageTextToText

    def finish(hf):
        if gradient_checkpointing:
            # 5.23 renamed it, and warns of the old name.
            enable = getattr(hf, "activation_checkpointing_enable", hf.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        if freeze_vision_tower:
            if text_only:
                raise InputError(f"--freeze_vision_tower: {path} is a text-only model")
            hf.get_encoder(modality="image").requires_grad_(False)
        if lora is not None and lora.lora_r:
            try:
                add_lora(hf, lora)
            except ValueError as error:
                raise InputError(str(error)) from None
        policy = Policy(hf, processor, getattr(torch, dtype)).train()
        policy.source, policy.files = path, files
        policy.notes += [f"final/ will not have {', '.join(odd)}"] if odd else []
        return policy

    def load():  # on a CPU
        with loading(folder):
            hf, report = auto.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="sdpa", use_safetensors=True,
                local_files_only=True, ignore_mismatched_sizes=True, output_loading_info=True)
        file = folder / ("model.safetensors" if (folder / "model.safetensors").exists() else INDEX)
        if missing := sorted(report["missing_keys"] - hf.all_tied_weights_keys.keys()):
            raise InputError(f"{file}: {len(missing)} tensors of the model are missing ({listed(missing)}); "
                             f"{len(report['unexpected_keys'])} have other names")
        if wrong := sorted(report["mismatched_keys"]):
            raise InputError(f"{file}: {len(wrong)} tensors are of another shape than config.json says: "
                             + listed(f"{name} {[*found]}, not {[*asked]}" for name, found, asked in wrong))
        for name, p in hf.named_parameters():
            if p.is_floating_point() and not p.sum().isfinite():
                raise InputError(f"{file}: {name} holds nan or infinity")
        if quantized:
            hf.hf_quantizer = hf._weight_conversions = None  # `final/` is merged, and no longer quantized
            del hf.config.quantization_config
            for module in hf.modules():  # in eval() bitsandbytes packs weights for some CPUs, never to unpack
                module.support_avx512bf16_for_cpu = False
        elif hf.config.model_type not in TESTED:
            check_logps(Policy(hf, processor), path)
        return finish(hf)

    if not dist.is_initialized():
        return load().to(device), processor
    # The other ranks build the model without weights, shard it, and only then allocate memory.
    whole = []

    def configs():
        whole.append(load())
        return whole[0].hf.config, whole[0].hf.generation_config

    config, generation_config = on_rank_0(path, configs)
    with torch.device("meta"):
        hf = auto.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    hf.generation_config = generation_config
    policy = shard(finish(hf), device_mesh(torch.device(device).type, shard_size)).to_empty(device=device)
    copy_from_rank_0(whole.pop() if whole else None, policy)
    # FSDP takes the module of the first forward as its root: that must not be a part that the sampler calls.
    token = torch.tensor([policy.eos_ids[0]])
    prompt = Prompt(token, policy.prompt_positions(token, {}, {}), {}, {})
    with torch.no_grad():
        policy(to_device(pack_groups([(prompt, [token])], policy.pad_id), device))
    policy.reshard()
    return policy, processor


@torch.no_grad()
def check_logps(policy: Policy, path: str):
    """Refuse a model whose log-probs in a group row differ from those of its own forward: its head scales the
    logits (Granite, Cohere), or its attention cannot be replaced (Falcon). Tried on text only."""
    text_config, never = policy.hf.config.get_text_config(), policy.never_sampled_ids
    V = policy.hf.get_output_embeddings().weight.shape[0]
    ids = [i for i in range(V) if i not in never]
    tokens = torch.tensor([ids[7 * k % len(ids)] for k in range(24)])                              # (24,)
    prompt = Prompt(tokens[:8], policy.prompt_positions(tokens[:8], {}, {}), {}, {})
    batch = pack_groups([(prompt, [tokens[8:16], tokens[16:]])], policy.pad_id)
    alone = torch.stack([tokens[:16], torch.cat([tokens[:8], tokens[16:]])])                       # (2, 16)
    try:
        ours, *_ = policy(batch)                                                                   # (2, 8)
        text_config._attn_implementation = "sdpa"
        logits = policy.hf(input_ids=alone, use_cache=False).logits[:, 7:-1]
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: {policy.hf.config.model_type} is not supported: {error}") from error
    text_config._attn_implementation = "flatpo"
    theirs = scaled_logits(logits, policy.never_sampled, 1.0).log_softmax(-1)                      # (2, 8, V)
    theirs = theirs.gather(-1, alone[:, 8:, None]).squeeze(-1)
    if not torch.allclose(ours, theirs, atol=1e-3):
        raise InputError(f"{path}: {policy.hf.config.model_type} is not supported: its log-probs in a group "
                         f"row differ from its own by up to {(ours - theirs).abs().max():.2g}")


def export(policy: Policy, folder: str | Path, rank: int = 0):
    """Write a complete Hugging Face folder: weights and config by save_pretrained, other files as they were
    read, also those that this processor does not know (video_preprocessor_config.json).

    Weights are in the training dtype. With LoRA they are merged, and `adapter/` holds the adapter alone, in
    PEFT's format and fp32. All ranks must call this: tensors are gathered one by one, and only rank 0 keeps
    them (on its CPU).
    """
    folder, state, adapter = Path(folder), {}, {}
    tensors = policy.hf.state_dict(keep_vars=True)
    names = {id(x): name for name, x in reversed(tensors.items())}  # tied weights once, by their first name
    for name in names.values():
        if ".lora_" in name or ".weight." in name:  # 4-bit's tables
            continue
        tensor = tensors[name].detach()
        owner, _, kind = name.rpartition(".")
        layer, parts = policy.hf.get_submodule(owner), {}
        if kind == "weight" and isinstance(layer, LoraLinear):
            tensor, parts = layer.merged()
        else:
            linear = kind == "weight" and isinstance(layer, nn.Linear)
            tensor = fp32_weight(layer) if linear else unsharded(tensor)
        if rank == 0:
            adapter |= {f"base_model.model.{owner}.{key}": part.cpu() for key, part in parts.items()}
            state[name] = (tensor.to(policy.dtype) if tensor.is_floating_point() else tensor).cpu()
    if rank != 0:
        return
    final, folder = folder, folder.with_name(folder.name + ".tmp")  # complete, or not there
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    ends = policy.hf.generation_config.eos_token_id
    if {*policy.eos_ids} != {*(ends if isinstance(ends, list) else [ends])}:
        policy.hf.generation_config.eos_token_id = policy.eos_ids
    policy.hf.save_pretrained(folder, state_dict=state)
    config = json.loads((folder / "config.json").read_text())
    for part in (config, *(v for v in config.values() if isinstance(v, dict) and "dtype" in v)):
        part["dtype"] = str(policy.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name, content in policy.files.items():
        if MODEL_FILES.fullmatch(name):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
    if adapter:
        (folder / "adapter").mkdir()
        save_file(adapter, folder / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
        text = json.dumps(policy.hf.adapter_config | {"base_model_name_or_path": policy.source}, indent=2)
        (folder / "adapter" / "adapter_config.json").write_text(text + "\n")
    shutil.rmtree(final, ignore_errors=True)
    folder.rename(final)


def weights_fingerprint(policy: Policy) -> str:
    """sha256 of all parameters and saved buffers but the adapters', with names, shapes and dtypes; the same
    whether sharded or not. All ranks must call this."""
    digest = hashlib.sha256()
    for name, tensor in policy.hf.state_dict().items():
        if ".lora_" in name:
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(unsharded(tensor).detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------
# Ranks


def init_distributed(device: str = "auto", deterministic: bool = False):
    """(rank, world_size, device) under torchrun or alone: gloo on a CPU, nccl on GPUs, no group if alone.
    deterministic: on a GPU use kernels that give the same bits each time, where torch has them."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if not torch.cuda.is_available():
            raise InputError("--device cuda: this torch sees no GPU")
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # for debugging, and slow
    if world_size > 1 and not dist.is_initialized():
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's store must be there already
            try:
                where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
                socket.create_connection(where, timeout=60).close()
            except OSError as error:  # killed while this rank started: waiting for it would take an hour
                raise InputError(f"torchrun at {where[0]}:{where[1]} is gone ({error})") from None
        backend = "nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=1))  # rank 0 may download, or train a little
    return rank, world_size, torch.device(device)


def device_mesh(device_type: str, shard_size: int | None):
    """The ranks as a mesh: one dimension to shard over, or two (HSDP): replicas, and shard_size ranks that
    hold one replica between them."""
    world_size = dist.get_world_size()
    shard_size = shard_size or world_size
    if shard_size == world_size:
        return init_device_mesh(device_type, (world_size,))
    return init_device_mesh(device_type, (world_size // shard_size, shard_size),
                            mesh_dim_names=("replicate", "shard"))


def shard(policy: Policy, mesh) -> Policy:
    """FSDP2, in place: a unit per decoder layer and vision block, one of the rest, tied embeddings together.

    Masters, gradients and their reduction are fp32; with dtype bfloat16 what is gathered and computed with is
    bf16. Gradients come out averaged over the ranks, so the scripts multiply their loss by world_size.
    """
    param_dtype = None if policy.dtype == torch.float32 else policy.dtype
    mixed = MixedPrecisionPolicy(param_dtype, torch.float32, cast_forward_inputs=False)
    for module in [m for m in policy.modules() if type(m).__name__ in set(policy.hf._no_split_modules)]:
        fully_shard(module, mesh=mesh, mp_policy=mixed)
    return fully_shard(policy, mesh=mesh, mp_policy=mixed)


@torch.no_grad()
def copy_from_rank_0(whole: Policy | None, policy: Policy):
    """Each rank takes its part of rank 0's weights and buffers, tensor by tensor. (torch's
    set_model_state_dict would skip buffers that are not saved, and keep rank 0's whole copy until the end.)
    """
    def tensors(module):
        return [*module.named_parameters(), *module.named_buffers()]

    source = {} if whole is None else dict(tensors(whole))
    for name, x in tensors(policy):
        complete = torch.empty(x.shape, dtype=x.dtype, device=policy.device)
        if whole is not None:
            complete.copy_(source[name])
            source[name].data = torch.empty(0)  # so that rank 0 does not hold its part twice
        dist.broadcast(complete, 0)
        x.copy_(distribute_tensor(complete, x.device_mesh, x.placements, src_data_rank=None)
                if isinstance(x, DTensor) else complete)


@contextmanager
def gathered(policy: Policy):
    """Within it every rank holds the whole model. Passes without gradient then need no communication, so
    ranks may run different numbers of them: in rollouts, on held-out data, for the reference.

    FSDP's hooks are removed meanwhile: they would do nothing, and a CUDA graph cannot capture them.
    """
    units, hooks = [m for m in policy.modules() if isinstance(m, FSDPModule)], []
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
        state = unit._get_fsdp_state()
        for there in (unit._forward_pre_hooks, unit._forward_hooks):
            ours = {key: hook for key, hook in there.items() if getattr(hook, "__self__", None) is state}
            hooks.append((there, ours))
            for key in ours:
                del there[key]
    policy.whole = True
    try:
        yield
    finally:
        policy.whole = False
        for there, ours in hooks:
            there.update(ours)
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(unit is not policy, recurse=False)


def all_gather(x: torch.Tensor, device="cpu") -> torch.Tensor:
    """(..., n) of this rank -> (..., world_size * n), in the order of the ranks; n must agree."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.to(device).contiguous())
    return torch.cat(parts, -1).to(x.device)


def add_sums(sums: dict, new: dict, prefix: str = ""):
    """sums[prefix + key] += new[key], pairs of (sum, count), in fp64. Tensors stay on their device, so that
    nothing waits for a GPU."""
    def fp64(x):
        return x.detach().double() if isinstance(x, torch.Tensor) else float(x)

    for key, (value, n) in new.items():
        old = sums.get(prefix + key, (0.0, 0.0))
        sums[prefix + key] = old[0] + fp64(value), old[1] + fp64(n)


def all_reduce_sums(sums: dict[str, tuple], device="cpu") -> dict[str, tuple[float, float]]:
    """{key: (sum, count)} of this rank, numbers or tensors -> of all ranks, as numbers, in fp64. All ranks
    must call this with the same keys. The CPU waits for a GPU once, and for numbers of one rank never."""
    keys = sorted(sums)
    numbers = [x for key in keys for x in sums[key]]
    if not dist.is_initialized() and not any(isinstance(x, torch.Tensor) for x in numbers):
        return {key: (float(sums[key][0]), float(sums[key][1])) for key in keys}
    flat = torch.stack([x.to(device, torch.float64).view(()) if isinstance(x, torch.Tensor)
                        else torch.full((), float(x), dtype=torch.float64, device=device) for x in numbers])
    if dist.is_initialized():
        dist.all_reduce(flat)
    flat = flat.tolist()
    return {key: (flat[2 * i], flat[2 * i + 1]) for i, key in enumerate(keys)}


def clip_grad_norm_(parameters, max_norm: float) -> float:
    """Clip the gradients; return their global norm before that, the same on every rank.

    A parameter that no row used (the vision tower, if no row had an image) gets a gradient of 0. So AdamW's
    momentum moves it in every step, whatever rows this rank had.
    """
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    return float(unsharded(nn.utils.clip_grad_norm_(parameters, max_norm)))


# ------------------------------------------------------------------------------------------------------------
# Flags: a dataclass a script, one line a flag. The type is the range, the comment is the help.

Size, Count = Annotated[int, "[1, inf)"], Annotated[int, "[0, inf)"]
Positive, NonNegative = Annotated[float, "(0, inf)"], Annotated[float, "[0, inf)"]
Share, Finite = Annotated[float, "[0, 1]"], Annotated[float, "(-inf, inf)"]
Name = Annotated[str, "name"]  # a list of them takes spaces or commas


def within(interval: str, kind=float):
    """The type of a flag: a number in an interval such as "[0, 1)", and so never nan."""
    low, high = map(float, interval[1:-1].split(","))

    def read(text: str):
        x = kind(text)
        if not (low < x < high or x == low and interval[0] == "[" or x == high and interval[-1] == "]"):
            raise argparse.ArgumentTypeError(f"must be in {interval}, got {text}")
        return x

    read.__name__ = kind.__name__  # argparse names it where `kind` refuses the text
    return read


@functools.cache
def help_of(cls) -> dict[str, tuple[str, str]]:
    """{field: (section, help)}: its comment, with the comment lines below it. A section is `# --- name`."""
    found, section, name = {}, getattr(cls, "SECTION", ""), None
    for line in inspect.getsource(cls).splitlines():
        code, _, comment = line.partition("  # ")
        if line.strip().startswith("# --- "):
            section, name = line.strip().removeprefix("# --- "), None
        elif field := re.match(r"    (\w+): ", code):
            name = field[1]
            found[name] = section, comment.strip()
        elif name and line.strip().startswith("# "):
            found[name] = section, f"{found[name][1]} {line.strip().removeprefix('# ')}"
        else:
            name = None
    return found


def without_none(hint):
    """X of the type X | None, any other type as it is."""
    return get_args(hint)[0] if get_origin(hint) in (Union, UnionType) else hint


def option_of(hint) -> dict:
    """The argparse options of a type: X | None, list[X], Literal, bool, or a number in an interval."""
    hint, options = without_none(hint), {}
    if get_origin(hint) is list:
        hint, options["nargs"] = get_args(hint)[0], "+"
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(hint) is Literal:
        return options | {"choices": get_args(hint)}
    if get_origin(hint) is Annotated and hint is not Name:
        kind, interval = get_args(hint)
        return options | {"type": within(interval, kind), "metavar": interval}
    return options | ({"type": within("(-inf, inf)", hint)} if hint in (int, float) else {})


def parser_of(cls, defaults: dict | None = None) -> argparse.ArgumentParser:
    """The parser of a dataclass of flags. `defaults` are what --help shows besides the fields' own; cls.HELP
    {word: text} says what a word in capitals stands for in a help."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--FLAG VALUE ...]", description=sys.modules[cls.__module__].__doc__,
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    hints, groups = get_type_hints(cls, include_extras=True), {}
    written = [base for base in cls.__mro__[:-1] if "__annotations__" in vars(base)]
    texts = {name: text for base in reversed(written) for name, text in help_of(base).items()}
    words = {word: text for base in written for word, text in vars(base).get("HELP", {}).items()}
    for field in dataclasses.fields(cls):
        section, text = texts.get(field.name, ("", ""))
        text = re.sub("|".join(words) or "$^", lambda word: words[word[0]], text)
        default = (defaults or {}).get(field.name, default_of(field))
        if default not in (None, [], "") and default is not False and "default" not in text:
            shown = " ".join(map(str, default)) if isinstance(default, list) else default
            text += f" (default: {shown})"
        if section not in groups:
            groups[section] = parser.add_argument_group(section)
        groups[section].add_argument(f"--{field.name}", help=text.replace("%", "%%"),
                                     default=argparse.SUPPRESS, **option_of(hints[field.name]))
    return parser


def default_of(field):
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def with_states(args, state: dict) -> dict:
    """A run's state with the STATE of --algo's files, each name once."""
    for method in args.methods:
        for name, value in getattr(method, "STATE", {}).items():
            if name in state or name in vars(args):
                raise InputError(f"{method.__file__}: STATE {name!r} is the name of another number or flag")
            state = state | {name: copy.deepcopy(value)}
    return state


def parse(cls, presets: dict, tiny: dict, tiny_by_algo: dict, argv=None):
    """The command line as a `cls`, a dataclass of flags, with those of the files that --algo names.

    The first name of --algo, a preset of the script or a file (`load_method`), replaces defaults by its
    preset's, and so do, without a model path, the tiny model's; a flag that is given wins. Each further name
    adds what its file brings. cls.__post_init__ checks what flags say together, and raises ValueError. A typo
    is an error that names the nearest flag. Not among the flags: `args.methods`, the files' modules, and
    `type(args).given`, what was typed.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--algo", nargs="+", default=default_of(cls.__dataclass_fields__["algo"]))
    first.add_argument("--model_name_or_path")
    known, _ = first.parse_known_args(argv)
    names = [name for item in known.algo for name in item.split(",") if name]
    script = sys.modules[cls.__module__].__file__
    try:
        if not names:
            raise ValueError("--algo names no method")
        for name in names[1:]:
            if name in presets:
                raise ValueError(f"--algo {' '.join(names)}: {name} is a preset, and so can only stand first")
        methods = {name: load_method(name, Path(script).name) for name in names if name not in presets}
        flags = [method.Flags for method in methods.values() if hasattr(method, "Flags")]
        taken = {field.name for field in dataclasses.fields(cls)}
        for field in (field for brought in flags for field in dataclasses.fields(brought)):
            if field.name in taken:
                raise ValueError(f"--algo {' '.join(names)}: --{field.name} is there already")
            taken.add(field.name)
    except ValueError as error:
        sys.exit(f"error: {error}; --help lists what there is")
    cls = dataclasses.dataclass(type(cls.__name__, (cls, *flags), {
        "__module__": cls.__module__, "methods": list(methods.values())}))

    lead = methods.get(names[0])
    defaults = {field.name: default_of(field) for field in dataclasses.fields(cls)}
    preset = defaults | (presets[names[0]] if lead is None else getattr(lead, "PRESET", {}))
    if is_tiny(known.model_name_or_path):
        preset |= tiny | tiny_by_algo.get(names[0], {}) | getattr(lead, "TINY", {})
    parser = parser_of(cls, preset)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        typed, brings = unknown[0].split("=")[0].replace("--no-", "--"), flags_of_methods()
        near = difflib.get_close_matches(typed, parser._option_string_actions, 1, 0.75)
        parser.error(f"unknown argument {unknown[0]}; " + (
            f"it comes with --algo {' '.join(names)} {brings[typed]}" if typed in brings else
            f"did you mean {near[0]}?" if near else "--help lists what there is, GUIDE.md TRL's settings"))
    given = vars(given)
    for name, hint in get_type_hints(cls, include_extras=True).items():
        if without_none(hint) == list[Name] and name in given:
            given[name] = [part for item in given[name] for part in item.split(",") if part]
    if "loss_type" in given:
        preset.pop("loss_weights", None)  # they belong to the preset's own losses
    if "num_train_epochs" in given:  # it counts, against the tiny model's max_steps too
        preset["max_steps"] = -1
    try:
        made = cls.__new__(cls)
        cls.given, made.preset = given, preset
        cls.__init__(made, **defaults | preset | given)
    except ValueError as error:
        parser.error(str(error))
    del made.preset  # it is no flag
    return made


def is_tiny(name: str | None) -> bool:
    """Whether --model_name_or_path means the built-in tiny model: it is not given, or is `tiny`."""
    return name is None or name == "tiny" and not os.path.exists(name)


def warn(text: str):
    """A warning about flags, once: on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print("warning:", text, file=sys.stderr)


def changes_nothing(args, unused: dict[str, str]):
    """An error for a flag of `unused` {name: why it does nothing} that is not at its default or preset."""
    preset = getattr(args, "preset", {})
    for field in dataclasses.fields(args):
        if field.name in unused and getattr(args, field.name) != preset.get(field.name, default_of(field)):
            raise ValueError(f"--{field.name} changes nothing {unused[field.name]}")


def check_shared(args):
    """What the flags of both scripts say together; fills in what depends on others."""
    if args.dataset is not None and args.model_name_or_path is None:
        raise ValueError("--dataset needs --model_name_or_path: a folder or a hub id, or tiny for the random "
                         "model of the built-in task")
    if is_tiny(args.model_name_or_path):
        args.model_name_or_path = None
    built_in = args.model_name_or_path is None and args.dataset is None
    if args.cold_start_steps and not built_in:
        raise ValueError("--cold_start_steps is for the built-in model and task; train your own with "
                         "--algo sft")
    if args.cold_start_steps is None:
        args.cold_start_steps = 200 if built_in and args.algo[0] != "sft" else 0
    if args.num_generations_eval > 1 and args.eval_temperature <= 0:
        raise ValueError("--num_generations_eval needs --eval_temperature above 0: greedy answers are alike")
    if args.max_steps == 0:
        raise ValueError("--max_steps must be at least 1, or -1 for --num_train_epochs, got 0")
    for pair in args.columns or ():
        name, _, column = pair.partition("=")
        if name not in ("prompt", "images", "solution", "chosen", "rejected", "system") or not column:
            raise ValueError(f"--columns {pair}: expected NAME=COLUMN, NAME one of prompt, images, solution, "
                             "chosen, rejected, system")
    if args.system_prompt is not None and re.fullmatch(r"\S+\.\w+", args.system_prompt):
        if not os.path.isfile(args.system_prompt):
            raise ValueError(f"--system_prompt {args.system_prompt}: no such file (nor a text, by its looks)")
        args.system_prompt = Path(args.system_prompt).read_text(encoding="utf-8").strip()
    weights = args.dataset_weights
    if weights is not None and len(weights) != len(args.dataset or []):
        raise ValueError(f"--dataset_weights must be one number for each --dataset, got {weights}")
    given = [f"--{name}" for name in ("lora_alpha", "lora_target_modules", "use_rslora", "use_dora")
             if getattr(args, name)]
    if args.lora_r is None and given:
        raise ValueError(f"{given[0]} needs --lora_r, which turns LoRA on")
    if args.lora_r is not None:
        args.lora_alpha = args.lora_alpha or 32
        args.lora_target_modules = args.lora_target_modules or ["all-linear"]


# ------------------------------------------------------------------------------------------------------------
# Optimizer. The learning rate is a function of the step, so a checkpoint holds no schedule.


def make_optimizer(args, policy):
    """AdamW on everything trainable, with fp32 state. -> (optimizer, its parameters)"""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2),
                                  weight_decay=args.weight_decay, fused=policy.device.type == "cuda")
    return optimizer, parameters


def learning_rate_at(args, step: int, max_steps: int) -> float:
    """After `step` steps: up from 0 in a straight line, then constant, linear or cosine, to 0 at max_steps.

    Bit for bit what transformers' get_scheduler gives: the operations come in its order.
    """
    warmup = int(args.warmup_steps) if args.warmup_steps >= 1 else math.ceil(args.warmup_steps * max_steps)
    if step < warmup:
        return args.learning_rate * (step / warmup)
    rest = max(1, max_steps - warmup)
    factor = {"constant": 1.0, "linear": (max_steps - step) / rest,
              "cosine": 0.5 * (1.0 + math.cos(math.pi * ((step - warmup) / rest)))}[args.lr_scheduler_type]
    return args.learning_rate * max(0.0, factor)


# ------------------------------------------------------------------------------------------------------------
# A run's folder: what it was started with, and who holds it

# Flags that may differ when a run is resumed; what they do to data and numbers describe_run says by itself.
FREE_ON_RESUME = {
    "output_dir", "resume", "allow_changed", "max_hours", "save_steps", "save_total_limit", "ref_cache",
    "device", "shard_size", "per_device_train_batch_size", "gradient_accumulation_steps",
    "steps_per_generation", "max_tokens_per_batch", "rollout_tokens", "per_device_eval_batch_size",
    "gradient_checkpointing", "dataloader_num_workers", "reward_timeout", "report_to", "push_to_hub",
    "vllm_server_base_url"}
HELD = {}  # {output folder: its open lock file}, of this process


def digest_of(paths) -> str | None:
    """sha256 over the contents of files, in order; None for none."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest() if paths else None


def code_of(args) -> dict[str, Path]:
    """{name under output_dir/code: file}: our own code, and the files that --algo and --reward_funcs name."""
    root = Path(__file__).parent
    files = sorted([*root.glob("*.py"), *root.glob("rewards/*.py"), *root.glob("layers/*.py"),
                    root / "papers" / "__init__.py"])
    given = [spec.rpartition(":")[0] for spec in getattr(args, "reward_funcs", [])]
    return ({str(file.relative_to(root)): file for file in files}
            | {f"rewards/{i}-{Path(p).name}": Path(p) for i, p in enumerate(dict.fromkeys(given))
               if os.path.isfile(p)}
            | {f"papers/{'' if file.parent == PAPERS else f'{i}-'}{file.name}": file
               for i, file in enumerate(Path(method.__file__) for method in args.methods)})


def start_files(path: str) -> dict[str, str]:
    """{file: sha256} of everything that is read from a model's folder. A model of a hub: its revision."""
    folder, files, _ = read_model_folder(path)
    if not os.path.isdir(path):
        return {f"{path}, revision": folder.name}
    weights = [file for file in sorted(folder.glob("*.safetensors")) if fault_of(file, folder) is None]
    return ({str(folder / name): hashlib.sha256(content).hexdigest() for name, content in files.items()}
            | {str(file): digest_of([file]) for file in weights})


def describe_run(args, world_size: int) -> dict:
    """args.json: resolved flags, package versions, and what must not change under a run that is resumed."""
    named = [name for name in [*(args.dataset or []), args.eval_dataset] if name is not None]
    given = [Path(name if os.path.exists(name) else name.rsplit(":", 1)[0]) for name in named]  # less :split
    output = Path(args.output_dir or "runs").resolve()
    for folder in given:
        if folder.is_dir() and output.is_relative_to(folder.resolve()):
            raise InputError(f"--output_dir {args.output_dir or output} lies in the dataset's folder "
                             f"{folder}: the run's own files would count as data; name another folder")
    given = [file for path in given for file in [path, *sorted(path.rglob("*"))]
             if file.is_file() and file.suffix in (".parquet", ".jsonl", ".json")]
    kinds = {args.loss_type} if isinstance(args.loss_type, str) else set(args.loss_type)
    cut = kinds & {"aot", "aot_unpaired", "bnpo"} or any(hooks(args, "OF_MICRO_BATCH"))
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    packages = ("torch", "transformers", "safetensors", "pillow", "numpy")
    return vars(args) | {
        "command": sys.argv, "world_size": world_size, "rows per update": rows * world_size,
        "updates per rollout": getattr(args, "steps_per_generation", 0) // args.gradient_accumulation_steps,
        "micro-batch, on which this loss depends": (args.per_device_train_batch_size,
                                                    args.max_tokens_per_batch) if cut else None,
        "data": digest_of(given), "code": digest_of(code_of(args).values()),
        "model": {file: digest for path in models_of(args) for file, digest in start_files(path).items()},
        "versions": {name: version(name) for name in packages}}


def difference(before, now) -> str:
    """What changed in a setting; of one for each file, the names of the files."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return f"{before} -> {now}"
    return ", ".join(key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key))


def check_unchanged(before: dict, now: dict, allowed: list[str]):
    """Refuse to resume with other flags, data or start models; other code or versions are warned of."""
    now = json.loads(json.dumps(now))  # tuples become lists, as in `before`, which was read
    changed = {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)}
    for name in sorted(changed & {"code", "versions"}):
        print(f"warning: resumed with other {name} than it was started with", flush=True)
    changed -= FREE_ON_RESUME | {"command", "world_size", "code", "versions"} | set(allowed)
    unknown = set(allowed) - before.keys() - now.keys()
    if unknown:
        raise InputError(f"--allow_changed {sorted(unknown)[0]}: args.json has no such setting")
    if changed:
        lines = "\n".join(f"  {name}: {difference(before.get(name), now.get(name))}"
                          for name in sorted(changed))
        raise InputError(f"--output_dir holds a run with other settings:\n{lines}\nName a new folder, or go "
                         f"on all the same with --allow_changed {' '.join(repr(n) for n in sorted(changed))}")


def hold(folder: Path):
    """Take folder/lock until this process ends: one run at a time in a folder.

    The system frees the lock when the process dies. On a file system without locks the file is touched every
    ten seconds instead, and a file that was not touched for a minute counts as free.
    """
    if folder.resolve() in HELD:
        return
    lock, has_locks, holder = open(folder / "lock", "a+"), True, ""
    for _ in range(10):  # a process that was just killed may still hold it for a moment
        lock.seek(0)
        holder = lock.read()
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            time.sleep(0.5)
        except OSError:
            has_locks = False
            if not holder or time.time() - os.path.getmtime(lock.name) > 60:
                break
            time.sleep(0.5)
    else:
        raise InputError(f"--output_dir {folder} is in use by {holder or 'another process'}")

    def touch():
        while True:
            os.utime(lock.name)
            time.sleep(10)

    lock.truncate(0)
    print(f"process {os.getpid()} on {socket.gethostname()}", end="", file=lock, flush=True)
    HELD[folder.resolve()] = lock
    if not has_locks:
        threading.Thread(target=touch, daemon=True).start()


def has_results(folder: Path) -> bool:
    """Whether a run in this folder has reached its first step."""
    return any((folder / name).exists() for name in ("status.json", "metrics.jsonl", "checkpoints"))


def drop_unused(folder: Path):
    """Delete the folder of a run that failed before it had anything worth keeping."""
    if not has_results(folder) and not (folder / "cold_start").exists():
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def writing(path: Path):
    """Within it a disk error becomes an InputError that names the file and the free space."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be written: {error}{room_at(Path(path).parent)}. The same command "
                         "goes on once it can") from error


def room_at(folder: Path) -> str:
    try:
        return f"; {shutil.disk_usage(folder).free / 1e6:.0f} MB are free there"
    except OSError:
        return ""


def write_atomically(path: Path, text: str):
    """Either the old file is there or the new one, also after a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def read_json(file: Path) -> dict | None:
    """A dict, {} where there is no such file, None for one that is damaged."""
    try:
        found = json.loads(file.read_text()) if file.exists() else {}
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def all_gather_object(value) -> list:
    """[value of each rank], in order; alone, [value]. All ranks must call this."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_rank_0(what: str, function):
    """function() is called on rank 0. Every rank returns its value, or raises its InputError; an OSError
    becomes one, which names `what`. All ranks must call this."""
    answer = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            answer = function()
        except InputError as error:
            answer = error
        except OSError as error:
            answer = InputError(f"{what}: {error}")
    answer = all_gather_object(answer)[0]
    if isinstance(answer, InputError):
        raise answer
    return answer


def run_main(main):
    """main() of a script. What the user can mend is one line, and so is the end of another rank, which breaks
    this one's collectives: that rank has said why."""
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if dist.is_initialized() and re.search("by peer|pair closure|Broken pipe", str(error)):
            sys.exit(f"error: rank {dist.get_rank()} lost another rank ({one_line(error)[:150]})")
        raise


def end_ranks():
    """Destroy the process group. After a collective has returned, gloo's threads still need Python's lock to
    free its tensors. A thread that waits for the lock when the interpreter ends aborts the process, and
    torchrun then reports a finished run as failed (exit code -6). Sleeping gives them the lock."""
    if dist.is_initialized():
        if dist.get_backend() == "gloo":
            time.sleep(0.2)
        dist.destroy_process_group()


def preflight(policy: Policy, groups, temperature: float, rank: int, entropies: bool = False):
    """One forward and backward of a micro-batch of the run's longest rows, before its first step, so that a
    lack of memory shows now. Memory for the gradients of earlier micro-batches and for AdamW's moments is
    taken meanwhile, as in a later step; all of it is freed. entropies: the loss has a term of them."""
    batch = to_device(policy.pack(groups), policy.device)
    shape = f"{len(batch['completion_ids'])} completions in rows of {batch['input_ids'].shape[1]} tokens"
    moments = []
    try:
        trained = [p for p in policy.parameters() if p.requires_grad]
        moments = [torch.empty_like(p) for p in trained for _ in range(2)]
        for p in trained:
            p.grad = torch.zeros_like(p)
        logps, entropy, _ = policy(batch, temperature, entropies=entropies)
        (0.0 * (logps + entropy if entropies else logps).sum()).backward()
    except torch.OutOfMemoryError as error:
        raise InputError(f"the largest micro-batch of this run, {shape}, does not fit into memory; lower "
                         f"--per_device_train_batch_size (or --max_tokens_per_batch), or add "
                         f"--gradient_checkpointing ({error})") from None
    del moments
    policy.zero_grad(set_to_none=True)
    used = ""
    if policy.device.type == "cuda":
        peak, there = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(0).total_memory
        policy.spare_memory = int(0.9 * there) - peak  # a tenth: graphs, fragments, what NCCL takes
        used = f", {peak / 1e9:.1f} of {there / 1e9:.1f} GB at the peak"
    if rank == 0:
        print(f"preflight: {shape} fit{used}", flush=True)


class Report:
    """`report(metrics)`: rank 0 sends a step's metrics to --report_to's tracker too. After a resume every
    step is there once: TensorBoard is told to forget the repeated steps, the others do not get them again
    (report_to.json has the last one). All ranks must make one. An error of the tracker ends the run at the
    start, and is a warning later."""

    def __init__(self, args, output_dir: Path, rank: int):
        self.name, self.folder, self.tracker, self.run, error = args.report_to, output_dir, None, {}, None
        try:
            if rank == 0 and self.name == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter
                self.tracker = SummaryWriter
            elif rank == 0 and self.name != "none":
                self.tracker, file = importlib.import_module(self.name), output_dir / "report_to.json"
                self.run = {"id": os.urandom(4).hex(), "step": -1}
                self.run |= json.loads(file.read_text()) if file.exists() else {}
                own = {"id": self.run["id"], "dir": str(output_dir)} if self.name == "wandb" else {}
                project = os.environ.get(f"{self.name.upper()}_PROJECT", "flatpo")
                name = f"{output_dir.name}-{self.run['id']}"
                self.tracker.init(project=project, name=name, config=vars(args), resume="allow", **own)
        except ImportError as reason:
            error = f"--report_to {self.name} ({reason}): pip install {self.name}"
        except Exception as reason:  # not logged in, above all
            error = f"--report_to {self.name}: {type(reason).__name__}: {reason}"
        error = all_gather_object(error)[0]
        if error is not None:
            raise InputError(error)

    def __call__(self, metrics: dict):
        step = metrics["step"]
        if self.tracker is None or step <= self.run.get("step", -1):
            return
        finite = {key: value for key, value in metrics.items() if key != "step" and math.isfinite(value)}
        try:
            if self.name == "tensorboard":
                if isinstance(self.tracker, type):  # the class: this is the first step
                    self.tracker = self.tracker(self.folder / "tensorboard", purge_step=step)
                for key, value in finite.items():
                    self.tracker.add_scalar(key, value, step)
                self.tracker.flush()
            else:
                self.tracker.log(finite, step=step)
                self.run["step"] = step
                write_atomically(self.folder / "report_to.json", json.dumps(self.run) + "\n")
        except Exception as reason:
            tqdm.write(f"warning: --report_to {self.name} failed at step {step}, it gets no more: {reason}")
            self.tracker = None


# ------------------------------------------------------------------------------------------------------------
# Checkpoints. torch.distributed.checkpoint reads a pickled index: trust checkpoints/ as code; final/ is data.


def crc32(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def sync_folder(folder: Path):
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def join_parts(parts: list[dict]) -> dict:
    """[{name: (n,) or (n, t)}, ...] -> {name: (N,) or (N, T)}, padded with zeros to the longest."""
    if not parts[0]:
        return {}

    def pad(x, T):
        return F.pad(x, (0, T - x.shape[1])) if x.dim() == 2 else x

    longest = {name: max(part[name].shape[-1] for part in parts) for name in parts[0]}
    return {name: torch.cat([pad(part[name], T) for part in parts]) for name, T in longest.items()}


def parts_of(policy, optimizer, ref=None, with_optimizer: bool = True) -> dict:
    """The models' part of a checkpoint: the trained weights, their optimizer, and a reference that moves.
    Frozen weights are read from the start model again."""
    parts = {"model": {name: p for name, p in policy.named_parameters() if p.requires_grad}}
    if ref is not None:
        parts["ref"] = dict(ref.named_parameters())
    if with_optimizer:
        parts["optimizer"] = get_optimizer_state_dict(policy, optimizer)
    return parts


def checkpoints_in(output_dir: Path) -> list[Path]:
    """Those with a manifest, newest first."""
    found = [file.parent for file in (output_dir / "checkpoints").glob("step_*/manifest.json")
             if re.fullmatch(r"step_\d+", file.parent.name)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")), reverse=True)


def drop_checkpoint(folder: Path):
    try:
        (folder / "manifest.json").unlink()  # first: a folder without a manifest is no checkpoint
        shutil.rmtree(folder)
    except OSError as reason:  # the new one is in place all the same
        print(f"warning: old checkpoint {folder} cannot be deleted: {reason}", flush=True)


def save_checkpoint(output_dir: Path, policy, optimizer, ref, state: dict, tensors: dict, keep: int,
                    rank: int) -> bool:
    """Write checkpoints/step_N: the trained weights and the optimizer (sharded), `state` (JSON with "step",
    equal on all ranks), and the rollout in use, of each rank `tensors` {name: (N, ...)}.

    1. The ranks write their parts into step_N.tmp, and sync them to the disk.
    2. Rank 0 adds manifest.json, with the size and checksum of every file.
    3. Rank 0 renames the folder to step_N, and deletes all but the newest `keep`.

    A kill between these leaves a step_N.tmp, which the next save deletes; so a folder named step_N is whole.
    False, with a warning, if any rank could not write: the older checkpoints stay. All ranks must call this.
    """
    folder = output_dir / "checkpoints" / f"step_{state['step']}"
    temporary, error, written = folder.with_suffix(".tmp"), None, {}

    def make_folder():
        for other in list(folder.parent.glob("step_*")):  # of a killed save, or half deleted
            whole = (other / "manifest.json").exists()
            if re.fullmatch(r"step_\d+\.tmp" if whole else r"step_\d+(\.tmp)?", other.name):
                shutil.rmtree(other, ignore_errors=True)
        temporary.mkdir(parents=True)

    def finish(checksums: list[dict]):
        manifest = {name: entry for of_rank in checksums for name, entry in of_rank.items()}
        write_atomically(temporary / "manifest.json", json.dumps(manifest))
        sync_folder(temporary)
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one, or the run would have resumed from it
        temporary.rename(folder)
        sync_folder(folder.parent)
        found = checkpoints_in(output_dir)
        own = found.index(folder)  # later ones are damaged: this run resumed from one before them
        for old in found[:own] + found[own + keep:]:
            drop_checkpoint(old)

    try:
        on_rank_0("new folder", make_folder)  # all ranks wait until it is there
        # Before the first step there is no optimizer state, and torch would invent one.
        parts = parts_of(policy, optimizer, ref, bool(optimizer.state))
        dcp.save(parts, checkpoint_id=temporary, no_dist=not dist.is_initialized())  # it syncs its files
        tensors = join_parts(all_gather_object(tensors))
        own = f"__{rank}_"
        if rank == 0:
            own = (own, ".metadata", "state.json", "rollout.safetensors")
            saved = json.dumps(state | {"optimizer": bool(optimizer.state)})
            write_atomically(temporary / "state.json", saved)
            save_file(tensors, temporary / "rollout.safetensors")
        written = {file.name: [file.stat().st_size, crc32(file)] for file in temporary.iterdir()
                   if file.name.startswith(own)}
    except Exception as reason:  # a full disk, above all
        error = f"rank {rank}: {type(reason).__name__}: {reason}"
    except dcp.CheckpointException as reason:  # no Exception: DCP raises it on every rank if one fails
        error = "; ".join(f"rank {r}: {type(e).__name__}: {e}" for r, (e, _) in reason.failures.items())
    found = all_gather_object((error, written))
    errors = sorted({error for error, _ in found if error})
    if not errors:
        try:
            on_rank_0(str(folder), lambda: finish([checksums for _, checksums in found]))
        except InputError as reason:
            errors = [str(reason)]
    if errors and rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        print(f"warning: no checkpoint of step {state['step']}: {'; '.join(errors)[:500]}", flush=True)
    return not errors


def load_checkpoint(output_dir: Path, policy, optimizer, ref, rank: int) -> tuple[dict | None, dict]:
    """Load the newest undamaged checkpoint -> (state, {name: (N, ...)} of the rollout in use, of all ranks);
    (None, {}) if there is no checkpoint at all.

    Weights and optimizer are restored in place, on any number of ranks. A damaged checkpoint is named, and
    the one before it is tried; InputError if all are damaged. All ranks must call this.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    for folder in all_gather_object(checkpoints_in(output_dir))[0]:  # rank 0's: file systems may disagree
        fault = None
        try:
            manifest = sorted(json.loads((folder / "manifest.json").read_text()).items())
            for name, (size, checksum) in manifest[rank::world_size]:
                file = folder / name
                if not file.is_file() or file.stat().st_size != size or crc32(file) != checksum:
                    fault = f"{name} is missing, cut or changed"
        except (OSError, ValueError) as reason:
            fault = str(reason)
        fault = next((f for f in all_gather_object(fault) if f), None)
        if fault is None:
            state = json.loads((folder / "state.json").read_text())
            parts = parts_of(policy, optimizer, ref, state.pop("optimizer"))
            dcp.load(parts, checkpoint_id=folder, no_dist=not dist.is_initialized())  # the weights: in place
            if "optimizer" in parts:
                set_optimizer_state_dict(policy, optimizer, parts["optimizer"])
            optimizer.zero_grad(set_to_none=True)
            if rank == 0:
                print(f"resumed from {folder}, step {state['step']}", flush=True)
            return state, load_file(folder / "rollout.safetensors")
        if rank == 0:
            print(f"warning: checkpoint {folder} cannot be used ({fault}); trying the one before", flush=True)
    found = sorted(p.name for p in (output_dir / "checkpoints").glob("step_*") if p.suffix != ".tmp")
    if any(all_gather_object(bool(found))):  # never a silent fresh start
        raise InputError(f"none of the checkpoints under {output_dir} can be used: {', '.join(found)}")
    return None, {}


def forget_after(output_dir: Path, step: int):
    """Drop the lines of metrics.jsonl after `step`: they will be written again, each of them once."""
    file = output_dir / "metrics.jsonl"
    kept = []
    for line in file.read_text(errors="replace").splitlines(keepends=True) if file.exists() else ():
        try:
            kept += [line] if line.endswith("\n") and json.loads(line)["step"] <= step else []
        except (ValueError, KeyError, TypeError):
            print(f"warning: no metrics, dropped from {file}: {line[:80]!r}", flush=True)
    if file.exists():
        write_atomically(file, "".join(kept))


# ------------------------------------------------------------------------------------------------------------
# The run


class Interrupted(Exception):
    """Raised inside a long pass without collectives (sampling, scoring) when the run is asked to stop."""


class Stop:
    """Whether SIGTERM, SIGINT or the end of --max_hours has asked any rank to stop.

    `stop()` is cheap and no collective: the sampler calls it every few tokens. A rank that was asked tells
    the others through torchrun's store. After the pass all ranks call `Run.stopping()`, a collective, and so
    decide alike.
    """

    def __init__(self, max_hours: float | None):
        self.asked, self.told, self.since = False, False, 0.0
        self.deadline = math.inf if max_hours is None else STARTED + 3600 * max_hours
        self.store = dist.distributed_c10d._get_default_store() if dist.is_initialized() else None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number, frame):
        now = time.monotonic()
        if self.asked and now - self.since > 2:  # asked again: end now. Sooner, it is torchrun's own copy
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.asked, self.since = True, self.since if self.asked else now

    def __call__(self) -> bool:
        if self.asked or time.monotonic() > self.deadline:
            if self.store is not None and not self.told:
                self.store.set("flatpo/stop", "1")
                self.told = True
            return True
        return self.store is not None and self.store.check(["flatpo/stop"])

    @contextmanager
    def passes(self):
        """Within it Interrupted ends the block early; every rank must call `Run.stopping()` after it."""
        try:
            yield
        except Interrupted:
            pass
        except InputError:  # a signal to the whole job also kills the reward process: that is no error
            if not self():
                raise


class Run:
    """One training run: who it is among the ranks, its folder, and what the loops ask of it.

        args.json, code/    the flags and code that it was started with; resumed, the flags must be the same
        status.json         running, stopped (start it again) or done, and the step
        metrics.jsonl       a line a step (`log`)
        checkpoints/        step_N (`save`, `restore`)
        final/              the trained model (`finish`)
        lock                held by the run's process while it lives

    `done`: the run in that folder had finished before. Then no other method may be called.
    """

    def __init__(self, args):
        self.args, self.saved, self.failures = args, None, 0  # saved: the step of the newest checkpoint
        self.rank, self.world_size, self.device = init_distributed(args.device, args.deterministic)
        if args.shard_size is not None and self.world_size % args.shard_size:
            raise InputError(f"--shard_size {args.shard_size} must divide the number of ranks, "
                             f"{self.world_size}")
        opened = on_rank_0(f"--output_dir {args.output_dir}", self._open)
        args.output_dir, self.resumed, self.done = opened
        self.folder = Path(args.output_dir)
        if self.done:
            self.say(f"the run in {self.folder} is done; its model is {self.folder / 'final'}")
            self._push_to_hub()
            end_ranks()
        else:
            self.report = Report(args, self.folder, self.rank)

    def _open(self) -> tuple[str, bool, bool]:
        """On rank 0: (the run's folder, whether it holds a run to go on with, whether that run is done).

        The same command goes on with the run that its --output_dir holds, if the flags, data and start models
        recorded in args.json are the same; else it is an error that lists what changed.
        """
        args, resumed, n = self.args, False, 1
        now, name = describe_run(args, self.world_size), Path(args.algo[0]).stem
        folder = None if args.output_dir is None else Path(args.output_dir)
        made = folder is None or not folder.exists()
        if not made and {file.name for file in folder.iterdir()} - {"args.json.tmp", "lock"}:
            before = read_json(folder / "args.json")
            if before is None and "args.json" not in args.allow_changed:
                raise InputError(f"{folder / 'args.json'} is damaged, so the run's flags cannot be compared "
                                 "with these; --allow_changed args.json goes on without")
            if args.resume == "never" or before is not None and "rows per update" not in before:
                raise InputError(f"--output_dir {folder} is not empty; name a new one, "
                                 f"or none for runs/{name}-N")
            # A run that failed before step 1 has no results, so other flags are fine.
            resumed = has_results(folder)
            if resumed and before is not None:
                check_unchanged(before, now, [n for n in args.allow_changed if n != "args.json"])
        if args.push_to_hub is not None:  # now, not after the work, shows whether it can be written
            try:
                import huggingface_hub
                huggingface_hub.create_repo(args.push_to_hub, private=True, exist_ok=True)
            except Exception as error:  # offline, no token, no such name, not yours
                raise InputError(f"--push_to_hub {args.push_to_hub}: {error} (offline? not logged in? "
                                 "`hf auth login`; the name is OWNER/NAME)") from error

        while folder is None:
            try:
                os.makedirs(f"runs/{name}-{n}")  # of runs started together only one can make it
                folder = Path(f"runs/{name}-{n}")
            except FileExistsError:
                n += 1
        folder.mkdir(parents=True, exist_ok=True)
        hold(folder)
        if has_results(folder) != resumed:
            raise InputError(f"--output_dir {folder} was written by another run just now")
        status = read_json(folder / "status.json") or {}  # damaged: the checkpoints say how far it is
        if status.get("status") == "done" and not args.allow_changed:
            return str(folder), True, True

        if made:
            atexit.register(drop_unused, folder)
        now["output_dir"] = str(folder)
        write_atomically(folder / "args.json", json.dumps(now, indent=2) + "\n")
        (folder / "completions").mkdir(exist_ok=True)
        shutil.rmtree(folder / "code", ignore_errors=True)
        for name, file in code_of(args).items():
            (folder / "code" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / "code" / name)
        given = " ".join(f"--{k} {' '.join(map(str, v)) if isinstance(v, list) else v}"
                         for k, v in type(args).given.items())
        print(f"{' '.join(args.algo)} in {folder}: {given or 'all flags at their defaults'}", flush=True)
        return str(folder), resumed, False

    def say(self, text: str):
        """Print it once, on rank 0; a progress bar stays whole."""
        if self.rank == 0:
            tqdm.write(text)

    def log(self, metrics: dict, shown: tuple[str, ...]):
        """A line of metrics.jsonl; those of `shown` on the screen; all to the tracker."""
        if self.rank == 0:
            line = json.dumps({k: v if math.isfinite(v) else None for k, v in metrics.items()})
            file = self.folder / "metrics.jsonl"
            with writing(file), open(file, "a") as out:
                out.write(line + "\n")
            words = [f"{k} {metrics[k]:.4g}" for k in shown if metrics.get(k) is not None]
            words = [word + " (warm-up)" if word == "learning_rate 0" else word for word in words]
            if words:
                self.say(f"step {metrics['step']} | " + " | ".join(words))
        self.report(metrics)

    # --- signals

    def listen(self):
        """From here on SIGTERM, SIGINT and --max_hours ask the run to stop; before, they end it at once."""
        self.stop = Stop(self.args.max_hours)

    def stopping(self) -> bool:
        """Whether any rank was asked to stop. All ranks must call this."""
        return any(all_gather_object(self.stop()))

    # --- checkpoints

    def restore(self, state: dict, policy, optimizer, ref=None) -> dict:
        """Fill `state`, weights and optimizer from the newest checkpoint, if there is one. ref: a reference
        that moves. -> the rollout in use, of all ranks; {} for none. All ranks must call this."""
        self.models = policy, optimizer, ref
        if not self.resumed:
            return {}
        saved, rollout = load_checkpoint(self.folder, *self.models, self.rank)
        if saved is not None:
            missing = sorted(state.keys() - saved.keys())
            if missing:  # going on with a start value would be another run
                raise InputError(f"the checkpoint of step {saved['step']} lacks {', '.join(missing)}: other "
                                 "code has written it; go on with that code, or start anew")
            state |= saved
            self.saved = state["step"]
            for group in optimizer.param_groups:  # this command's flags, not those of the checkpoint
                group.update(betas=(self.args.adam_beta1, self.args.adam_beta2),
                             weight_decay=self.args.weight_decay)
        last = state["step"] - (state["pending"] is not None)
        on_rank_0(str(self.folder / "metrics.jsonl"), lambda: forget_after(self.folder, last))
        return rollout

    def save(self, state: dict, tensors: dict | None = None, must: bool = False):
        """Write checkpoints/step_N, with this rank's tensors of the rollout in use. A failure ends the run if
        `must`, or if it is the third in a row. All ranks must call this."""
        if self.saved == state["step"]:
            return  # this step's is there already; writing it again would only put it at risk
        keep = self.args.save_total_limit
        if save_checkpoint(self.folder, *self.models, state, tensors or {}, keep, self.rank):
            self.saved, self.failures = state["step"], 0
            return
        self.failures += 1
        if must or self.failures == 3:
            raise InputError(f"no checkpoint could be written under {self.folder}; the reason stands above"
                             + room_at(self.folder))

    # --- the end of a step, and of the run

    def running(self, step: int):
        """From here on the folder holds results: other flags are refused there."""
        self._set_status("running", step)

    def count_nonfinite(self, state: dict, grad_norm: float, rows: list[dict]):
        """state["skipped"]: steps in a row whose gradient norm was nan or infinite; all ranks see the same.
        The third ends the run, and leaves the rows it was computed on in nonfinite_rank_R.json."""
        if math.isfinite(grad_norm):
            state["skipped"] = 0
            return
        state["skipped"] += 1
        self.say(f"warning: step {state['step']} was skipped: its gradient norm is {grad_norm}")
        if state["skipped"] == 3:
            file = self.folder / f"nonfinite_rank_{self.rank}.json"
            names = [row["_source"] for row in rows]
            with writing(file):
                write_atomically(file, json.dumps({"step": state["step"], "rows": names}, indent=2) + "\n")
            raise InputError(f"three steps in a row had a gradient norm of nan or infinity; {file} has the "
                             "rows")

    def end_step(self, state: dict, metrics: dict, max_steps: int, held_out, shown: tuple[str, ...],
                 tensors: dict | None = None) -> bool:
        """Evaluate, log and save a checkpoint, each when it is due. True if the run was asked to stop.

        held_out(step): means over the held-out rows, None if the run was asked to stop meanwhile. The step is
        then saved with its metrics as state["pending"], and the resumed run evaluates and logs it. So each
        step has one line in metrics.jsonl. tensors: `save`'s.
        """
        step = metrics["step"]
        if step == 0 or step % self.args.eval_steps == 0 or step == max_steps:
            means = held_out(step)
            if means is None:
                self.save(state | {"pending": metrics}, tensors, must=True)
                return True
            metrics |= means
            state["end"], state["start"] = means, state["start"] or means
        self.log(metrics, shown)
        state["pending"] = None
        stopping = self.stopping()
        if stopping or step == max_steps or step % self.args.save_steps == 0 and step > 0:
            self.save(state, tensors, must=stopping or step == max_steps)
        return stopping

    def stopped(self, step: int | None, rewards=None):
        """The run was asked to stop: say how to go on, and end its ranks. step None: before step 1."""
        where = "before its first step" if step is None else f"at step {step}"
        self.say(f"stopped {where}; the same command with --output_dir {self.folder} goes on from there")
        self._end("stopped", step, rewards)

    def finish(self, policy, state: dict, rewards=None):
        """Save the last checkpoint, write final/ and its card, print the held-out results, set the status to
        done and end the ranks. If the export fails, the same command tries it again."""
        self.save(state, must=True)
        before, after = state["start"], state["end"]
        with writing(self.folder / "final"):
            export(policy, self.folder / "final", self.rank)
            if self.rank == 0:
                write_card(self.args, self.folder, before, after)
        for key in sorted(before.keys() & after.keys()):
            self.say(f"{key}: {before[key]:.4f} before, {after[key]:.4f} after")
        self.say(f"saved {self.folder / 'final'}")
        self._end("done", state["step"], rewards)
        self._push_to_hub()

    def _set_status(self, status: str, step: int | None):
        """Write status.json, for a program that restarts runs. step None: the step that stands there."""
        if self.rank == 0:
            file = self.folder / "status.json"
            if step is None:
                step = (read_json(file) or {}).get("step", 0)
            with writing(file):
                write_atomically(file, json.dumps({"status": status, "step": step}) + "\n")

    def _end(self, status: str, step: int | None, rewards):
        self._set_status(status, step)
        if rewards is not None:
            rewards.close()
        end_ranks()

    def _push_to_hub(self):
        """Upload final/ to --push_to_hub's repository. Called last: no other rank waits for it."""
        if self.rank != 0 or self.args.push_to_hub is None:
            return
        import huggingface_hub
        name, final = self.args.push_to_hub, self.folder / "final"
        try:
            huggingface_hub.upload_folder(repo_id=name, folder_path=final,
                                          commit_message=f"flatpo --algo {' '.join(self.args.algo)}")
        except Exception as error:
            raise InputError(f"--push_to_hub {name}: {final} is complete, but not uploaded: {error}; the "
                             "same command tries again") from error
        self.say(f"uploaded {final} to {name}")


def write_card(args, output_dir: Path, before: dict, after: dict):
    """final/README.md: the command, means over held-out rows before and after, data, versions, settings."""
    run, source = json.loads((output_dir / "args.json").read_text()), args.model_name_or_path
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    launch = "python" if run["world_size"] == 1 else f"torchrun --nproc_per_node={local}"
    launch += f" --nnodes={run['world_size'] // local}" if run["world_size"] > local else ""
    algo = " ".join(args.algo)
    head = [f"tags: [flatpo, {Path(args.algo[0]).stem}]", "library_name: transformers",
            "pipeline_tag: image-text-to-text"]
    head += [f"base_model: {source}"] if source and not os.path.isdir(source) else []
    results = [f"| `{key}` | {before[key]:.4f} | {after[key]:.4f} |" for key in sorted({*before} & {*after})]
    (output_dir / "final" / "README.md").write_text("\n".join([
        "---", *head, "---", f"# {output_dir.name}", "",
        f"{source or 'The built-in tiny Qwen2.5-VL'}, trained with flatpo's `--algo {algo}`:", "",
        "```bash", f"{launch} {shlex.join(run['command'])}", "```", "",
        *(["| held-out | before | after |", "|---|---|---|", *results] if results else ["No held-out rows."]),
        "", f"Data: {args.dataset or 'the built-in task'}, held out: {args.eval_dataset or 'no file'}. "
        f"sha256 of these files: {run['data']}, of the code: {run['code']}.", "",
        "All settings and versions:", "", "```json", json.dumps(run, indent=2), "```", ""]))

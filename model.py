"""The policy: a transformers vision-language model, the group row it is fed, its token log-probs, its export.

The one idea of flatpo: a **group is one row**. A group is a prompt (text and images) with its G completions;
SFT is G=1, a preference pair G=2 (chosen, rejected), GRPO G=num_generations. The prompt stands there once:

    tokens      [ prompt ...... | completion 1 .... | completion 2 .. | ... | completion G ... | pad ]
    segment_ids   0 0 0 0 0 0 0   1 1 1 1 1 1         2 2 2 2                 G G G              -1
    group_ids     0 0 0 ...   (several groups may share a row: 0 0 ... 1 1 ...)                      -1
    position      0 1 2 ... P-1   P P+1 ...           P P+1 ...               P P+1 ...

    q may attend to k  iff  k <= q and group[k] == group[q] and (segment[k] == 0 or segment[k] == segment[q])

so an image goes through the vision tower once per group, the prompt through the language model once, and only
completion tokens are scored. Mask and positions are all it takes: the model classes are transformers',
unchanged. The first token of every completion is predicted by the prompt's last hidden state, all later ones
by the token before. tests/test_group_rows.py proves log-probs and gradients equal those of G repeated rows.

Sizes in comments: B rows, S row length, P prompt length, G completions of a group, N of the batch, T longest
completion, M trained tokens, H hidden, V vocabulary, R position rows (3 for M-RoPE models, else 1).
"""

import hashlib
import inspect
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zlib
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (get_model_state_dict, get_optimizer_state_dict,
                                                     set_model_state_dict, set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import cached_file, is_torchvision_available, logging

logging.disable_progress_bar()  # ours is the only one
STARTED = time.monotonic()  # --max_hours counts from here
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable")  # one process: we know


class InputError(ValueError):
    """Something the user gave cannot be used. The scripts print its message, no traceback, and exit."""


# ------------------------------------------------------------------------------------------------------------
# Packed group rows


class Prompt(NamedTuple):
    """What a group's completions share, as one processor call returned it (data.encode_prompt makes them)."""

    tokens: torch.Tensor             # (P,) ids, image placeholders already expanded
    positions: torch.Tensor          # (R, P)
    pixels: dict[str, torch.Tensor]  # pixel_values, image_grid_thw, ...: what the family's processor returns
    row: dict                        # the dataset row


def cat_pixels(prompts: list[Prompt]) -> dict[str, torch.Tensor]:
    """Join the prompts' image tensors on dim 0, in order, zero-padding the other dims to the largest.

    This one rule serves every layout: (patches, D) with image_grid_thw (Qwen), (images, 3, H, W) (LLaVA),
    (1, images, 3, H, W) with pixel_attention_mask (Idefics3, whose model drops all-zero padding images).
    """
    pixels = {}
    for key in dict.fromkeys(key for p in prompts for key in p.pixels):
        tensors = [p.pixels[key] for p in prompts if key in p.pixels]
        largest = [max(t.shape[d] for t in tensors) for d in range(1, tensors[0].dim())]
        padded = [t.new_zeros(len(t), *largest) for t in tensors]
        for out, t in zip(padded, tensors):
            out[tuple(slice(0, n) for n in t.shape)] = t
        pixels[key] = torch.cat(padded)
    return pixels


def pack_groups(groups, pad_id: int, row_tokens: int | None = None) -> dict:
    """[(Prompt, [completion ids (len,), ...]), ...] -> one batch of packed rows.

    row_tokens None gives every group a row of its own; a number lets groups share rows, first fit, of
    max(row_tokens, longest group) tokens, so that 0 fills rows up to the longest group.
    Returns input_ids, segment_ids, group_ids (B, S), position_ids (R, B, S), pixels {name: tensor}, and, with
    the completions in the order given: completion_ids, completion_mask, logit_index (N, T), the last being
    the index into the flattened (B * S) hidden states of the one that predicts the token. Completions may be
    an empty list: the sampler's prefill is such a batch.

    >>> prompt = Prompt(torch.tensor([5, 6, 7]), torch.arange(3)[None], {}, {})
    >>> batch = pack_groups([(prompt, [torch.tensor([8, 9]), torch.tensor([4])])], pad_id=0)
    >>> batch["input_ids"].tolist(), batch["segment_ids"].tolist(), batch["position_ids"].tolist()
    ([[5, 6, 7, 8, 9, 4]], [[0, 0, 0, 1, 1, 2]], [[[0, 1, 2, 3, 4, 3]]])
    >>> batch["completion_ids"].tolist(), batch["completion_mask"].tolist(), batch["logit_index"].tolist()
    ([[8, 9], [4, 0]], [[True, True], [True, False]], [[2, 3], [2, 0]])
    """
    sizes = [len(prompt.tokens) + sum(map(len, completions)) for prompt, completions in groups]
    rows = []  # each a list of group indices
    if row_tokens is None:
        rows = [[g] for g in range(len(groups))]
    else:
        capacity, used = max(row_tokens, *sizes), []
        for g, size in enumerate(sizes):
            row = next((r for r, n in enumerate(used) if n + size <= capacity), None)
            if row is None:
                rows.append([]), used.append(0)
                row = len(rows) - 1
            rows[row].append(g)
            used[row] += size
    B, S, R = len(rows), max(sum(sizes[g] for g in row) for row in rows), len(groups[0][0].positions)
    lengths = [len(c) for _, completions in groups for c in completions]
    N, T = len(lengths), max(lengths, default=0)
    first_completion = [0]  # index in N of each group's first completion
    for _, completions in groups:
        first_completion.append(first_completion[-1] + len(completions))

    input_ids, segment_ids = torch.full((B, S), pad_id), torch.full((B, S), -1)
    group_ids, position_ids = torch.full((B, S), -1), torch.zeros(R, B, S, dtype=torch.long)
    completion_ids, logit_index = torch.full((N, T), pad_id), torch.zeros(N, T, dtype=torch.long)
    for b, row in enumerate(rows):
        start = 0
        for g in row:
            prompt, completions = groups[g]
            P, next_position = len(prompt.tokens), prompt.positions.max() + 1
            end = start + sizes[g]
            input_ids[b, start:end] = torch.cat([prompt.tokens, *completions])
            group_ids[b, start:end] = g
            segment_ids[b, start:start + P] = 0
            position_ids[:, b, start:start + P] = prompt.positions
            at = start + P
            for k, completion in enumerate(completions):
                n, length = first_completion[g] + k, len(completion)
                segment_ids[b, at:at + length] = k + 1
                position_ids[:, b, at:at + length] = next_position + torch.arange(length)
                completion_ids[n, :length] = completion
                logit_index[n, :length] = b * S + torch.arange(at - 1, at - 1 + length)
                logit_index[n, 0] = b * S + start + P - 1  # the prompt's last token predicts every first one
                at += length
            start = end
    completion_mask = torch.arange(T) < torch.tensor(lengths, dtype=torch.long)[:, None]
    return {"input_ids": input_ids, "segment_ids": segment_ids, "group_ids": group_ids,
            "position_ids": position_ids, "pixels": cat_pixels([groups[g][0] for row in rows for g in row]),
            "completion_ids": completion_ids, "completion_mask": completion_mask, "logit_index": logit_index}


def to_device(batch: dict, device) -> dict:
    return {k: to_device(v, device) if isinstance(v, dict) else v.to(device) if torch.is_tensor(v) else v
            for k, v in batch.items()}


def group_attention_mask(segment_ids: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """The rule at the top of this file, as a boolean mask (B, 1, S, S), True = may attend.

    Padding carries segment -1 and group -1 and so attends to padding, itself included: no softmax row is
    empty (an empty one is nan, and the gradient of nan spreads), and no real token sees it.
    """
    S = segment_ids.shape[1]
    causal = torch.ones(S, S, dtype=torch.bool, device=segment_ids.device).tril()
    same_group = group_ids[:, :, None] == group_ids[:, None, :]                          # (B, q, k)
    visible = (segment_ids[:, None, :] == 0) | (segment_ids[:, :, None] == segment_ids[:, None, :])
    return (causal & same_group & visible)[:, None]


# ------------------------------------------------------------------------------------------------------------
# Log-probs


def scaled_logits(hidden, weight, never_sampled, temperature):
    """(M, H), (V, H) -> (M, V) fp32 logits / temperature, never-sampled ids at -1e30: probability exactly 0,
    yet finite, so that p * logit in the entropy is 0, not nan. Sampler, trainer and reference use this."""
    logits = (hidden @ weight.T).float() / temperature
    return logits.index_fill_(-1, never_sampled, -1e30)


class ChunkedLogps(torch.autograd.Function):
    """p = softmax(h W^T / temperature) -> log p[target], entropy, log sum_v p_v^2; `chunk` tokens at a time.

    The (M, V) logits never exist: forward keeps the log-sum-exp of each token, backward recomputes a chunk.
        d logp / dz = onehot(target) - p          d entropy / dz = -p (log p + entropy)
    The third (WPO's weights need it) has no gradient.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, never_sampled, temperature, chunk):
        device_type = hidden.device.type
        autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocast else hidden.dtype
        logps, lse, entropy, log_sum_sq = (hidden.new_empty(len(hidden), dtype=torch.float32)
                                           for _ in range(4))
        with torch.autocast(device_type, enabled=False):
            W = weight.to(dtype)
            for i in range(0, len(hidden), chunk):
                at = slice(i, i + chunk)
                logits = scaled_logits(hidden[at].to(dtype), W, never_sampled, temperature)       # (chunk, V)
                lse[at] = logits.logsumexp(-1)
                logps[at] = logits.gather(-1, targets[at, None]).squeeze(-1) - lse[at]
                p = (logits - lse[at, None]).exp()
                entropy[at] = lse[at] - (p * logits).sum(-1)
                log_sum_sq[at] = p.square().sum(-1).log()
        ctx.save_for_backward(hidden, weight, targets, never_sampled, lse, entropy)
        ctx.temperature, ctx.chunk, ctx.dtype = temperature, chunk, dtype
        ctx.mark_non_differentiable(log_sum_sq)
        return logps, entropy, log_sum_sq

    @staticmethod
    def backward(ctx, grad_logps, grad_entropy, _):
        hidden, weight, targets, never_sampled, lse, entropy = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            W = weight.to(ctx.dtype)
            for i in range(0, len(hidden), ctx.chunk):
                at = slice(i, i + ctx.chunk)
                h = hidden[at].to(ctx.dtype)
                log_p = scaled_logits(h, W, never_sampled, ctx.temperature) - lse[at, None]       # (chunk, V)
                p = log_p.exp()
                grad = -p * (grad_logps[at, None] + grad_entropy[at, None] * (log_p + entropy[at, None]))
                grad.scatter_add_(-1, targets[at, None], grad_logps[at, None])
                grad = (grad / ctx.temperature).to(ctx.dtype)
                grad_hidden[at] = (grad @ W).to(hidden.dtype)
                grad_weight += (grad.T @ h).float()
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


class Policy(nn.Module):
    """A transformers vision-language model, and the two things alignment asks of it: log-probs and decoding.

    `policy.hf` is the model itself. A text-only prompt is a prompt without pixels. never_sampled are the ids
    that can never be an answer (image, video and other placeholders, and rows of the head beyond the
    tokenizer): the sampler does not draw them, and every log-prob is normalised without them.
    """

    def __init__(self, hf, processor, dtype=torch.float32):
        super().__init__()
        config, tokenizer = hf.config, getattr(processor, "tokenizer", processor)
        text_config, head = config.get_text_config(), hf.get_output_embeddings()
        family = config.model_type
        if "sliding_attention" in (getattr(text_config, "layer_types", None) or []):
            raise InputError(f"{family}: sliding-window attention layers are not supported")
        if getattr(text_config, "final_logit_softcapping", None) or getattr(head, "bias", None) is not None:
            raise InputError(f"{family}: an output head with soft-capping or a bias is not supported")
        placeholder = re.compile(r"(image|video|vision|audio|boi|eoi)\w*token\w*(id|index)$")
        ids = {v for owner in (config.to_dict(), vars(processor)) for k, v in owner.items()
               if placeholder.search(k) and isinstance(v, int) and 0 <= v < head.weight.shape[0]}
        ids |= set(range(len(tokenizer), head.weight.shape[0]))
        eos = hf.generation_config.eos_token_id if hf.generation_config else None
        eos = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
        if not eos:
            raise InputError(f"{family}: neither generation_config nor the tokenizer names an EOS token")

        self.hf, self.dtype, self.filler = hf, dtype, None
        self.eos_ids = sorted(eos)
        self.pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        never_sampled = torch.tensor(sorted(ids - eos), dtype=torch.long)  # (few,)
        self.register_buffer("never_sampled", never_sampled, persistent=False)
        # Dropout off, everywhere: the ratio of the first update must be exactly 1. train() mode stays on,
        # because transformers skips gradient checkpointing in eval() without a word.
        for module in hf.modules():
            for name in ("p", "dropout", "attention_dropout", "drop_path_rate", "drop_prob"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)

    @property
    def device(self):
        return self.never_sampled.device

    def autocast(self):
        """bf16 compute over fp32 weights; fp32 is left alone."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def pack(self, groups) -> dict:
        """`pack_groups` with rows filled up to the longest group. Under FSDP every rank must run the vision
        tower in every pass, or the others wait for it: there a batch without images gets a row with one,
        `filler`, of no completion and so of gradient 0."""
        if self.filler is not None and not any(prompt.pixels for prompt, _ in groups):
            groups = [*groups, (self.filler, [])]
        return pack_groups(groups, self.pad_id, row_tokens=0)

    def prompt_positions(self, tokens: torch.Tensor, text_inputs: dict, pixels: dict) -> torch.Tensor:
        """Rotary positions (R, P) of one prompt (P,). M-RoPE families say theirs (`get_rope_index`: an image
        spans a (t, h, w) grid, so the text after it goes on from less than its index); others count up."""
        rope_index = getattr(self.hf.base_model, "get_rope_index", None)
        if rope_index is None:
            return torch.arange(len(tokens))[None]
        types = text_inputs.get("mm_token_type_ids", torch.zeros_like(tokens)[None])  # 0 text, 1 image
        known = inspect.signature(rope_index).parameters
        grids = {k: v for k, v in pixels.items() if k in known}
        return rope_index(input_ids=tokens[None], mm_token_type_ids=types, **grids)[0][:, 0]

    def hidden(self, input_ids, position_ids, attention_mask, pixels=None, cache=None) -> torch.Tensor:
        """Last hidden states (B, S, H) of tokens (B, S), positions (R, B, S), mask (B, 1, S, past + S)."""
        positions = position_ids if len(position_ids) > 1 else position_ids[0]
        out = self.hf.base_model(input_ids=input_ids, position_ids=positions, attention_mask=attention_mask,
                                 past_key_values=cache, use_cache=cache is not None, **(pixels or {}))
        return out.last_hidden_state

    def logits(self, hidden: torch.Tensor, temperature: float) -> torch.Tensor:
        """(N, H) -> (N, V), for the sampler: one token a row."""
        weight = self.hf.get_output_embeddings().weight.to(self.dtype)
        with torch.autocast(self.device.type, enabled=False):
            return scaled_logits(hidden.to(self.dtype), weight, self.never_sampled, temperature)

    def forward(self, batch: dict, temperature: float = 1.0, chunk: int = 256):
        """A `pack_groups` batch -> per_token_logps, entropies, log_sum_sq_probs: three (N, T), fp32, 0 where
        completion_mask is False. Logits are divided by the temperature the completions were sampled at."""
        mask = batch["completion_mask"]
        with self.autocast():
            attention_mask = group_attention_mask(batch["segment_ids"], batch["group_ids"])
            hidden = self.hidden(batch["input_ids"], batch["position_ids"], attention_mask, batch["pixels"])
            used = hidden.flatten(0, 1).index_select(0, batch["logit_index"][mask])               # (M, H)
            weight = self.hf.get_output_embeddings().weight
            per_token = ChunkedLogps.apply(used, weight, batch["completion_ids"][mask],
                                           self.never_sampled, temperature, chunk)                # 3 x (M,)
        zeros = torch.zeros(mask.shape, device=mask.device)
        return tuple(zeros.masked_scatter(mask, x) for x in per_token)


# ------------------------------------------------------------------------------------------------------------
# Load and export


def without_video(processor_class):
    """The same processor class without its video processor, which transformers only has with torchvision.

    transformers' own constructor and from_pretrained refuse to build Qwen-VL's processor without it, also
    when no video is ever used. Its image and text halves need nothing but Pillow.
    """
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


def load_processor(path: str):
    """The checkpoint's processor (image processor, tokenizer, chat template), with or without torchvision."""
    if is_torchvision_available():
        return AutoProcessor.from_pretrained(path)
    config = AutoConfig.from_pretrained(path)
    if type(config) not in PROCESSOR_MAPPING:
        raise InputError(f"{path}: {config.model_type} has no processor: not a vision-language model")
    return without_video(PROCESSOR_MAPPING[type(config)]).from_pretrained(path)


def load_policy(path: str, dtype: str = "float32", device="cpu", gradient_checkpointing: bool = False,
                freeze_vision_tower: bool = False, shard_size: int | None = None):
    """A local folder or a hub id -> (Policy, processor). Weights are held in fp32 whatever the compute dtype.

    Only safetensors are read and no remote code runs. freeze_vision_tower freezes what transformers calls the
    image encoder; Qwen's merger is part of it, LLaVA's and Idefics3's projector is not. With several ranks
    the policy comes sharded (`shard`); a node's ranks load one after the other, so that its memory holds one
    whole copy at a time.
    """
    if not os.path.isdir(path) and (path.startswith((".", "/", "~")) or path.count("/") != 1):
        raise InputError(f"--model_name_or_path {path}: no such folder (and not a hub id like owner/name)")
    try:
        processor = load_processor(path)
    except OSError as error:  # not on this disk, and not on the hub, or the hub is out of reach
        raise InputError(f"--model_name_or_path {path}: {error}") from error
    if not getattr(processor, "chat_template", None):
        raise InputError(f"{path}: its processor has no chat template")

    def load():
        hf = AutoModelForImageTextToText.from_pretrained(
            path, dtype=torch.float32, attn_implementation="sdpa", use_safetensors=True)
        if gradient_checkpointing:
            hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if freeze_vision_tower:
            hf.get_encoder(modality="image").requires_grad_(False)
        return Policy(hf, processor, getattr(torch, dtype)).train()

    if not dist.is_initialized():
        return load().to(device), processor
    mesh = device_mesh(torch.device(device).type, shard_size)
    for turn in range(int(os.environ.get("LOCAL_WORLD_SIZE", 1))):
        if turn == int(os.environ.get("LOCAL_RANK", 0)):
            policy = shard(load(), mesh)
        dist.barrier()
    # FSDP finds its root in the first forward: it must be this one, and not one of the sampler's.
    token = torch.tensor([policy.eos_ids[0]])
    prompt = Prompt(token, policy.prompt_positions(token, {}, {}), {}, {})
    with torch.no_grad():
        policy(to_device(pack_groups([(prompt, [token])], policy.pad_id), device))
    policy.reshard()
    return policy, processor


def export(policy: Policy, processor, source: str, folder: str | Path, rank: int = 0):
    """Write a complete Hugging Face folder: weights and config by save_pretrained, all else as in `source`.

    The source's processor, tokenizer and chat-template files are copied, not re-saved, so that files unknown
    to this processor (a video_preprocessor_config.json, say) stay. Weights are in the training dtype. A
    collective: every rank calls it, tensors are gathered one by one, rank 0 alone keeps them (on its CPU).
    """
    folder, named, state = Path(folder), {}, {}
    for name, parameter in policy.hf.named_parameters(remove_duplicate=False):
        named.setdefault(id(parameter), []).append(name)  # tied weights have two names, and are written once
    first = {name: names[0] for names in named.values() for name in names}
    for name, tensor in policy.hf.state_dict().items():
        if first.get(name, name) != name:
            continue
        tensor = full(tensor)
        if rank == 0:
            state[name] = (tensor.to(policy.dtype) if tensor.is_floating_point() else tensor).cpu()
    if rank != 0:
        return
    state |= {name: state[names[0]] for names in named.values() for name in names}
    final, folder = folder, folder.with_name(folder.name + ".tmp")  # complete, or not there
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    policy.hf.save_pretrained(folder, state_dict=state)
    config = json.loads((folder / "config.json").read_text())
    for part in (config, *(v for v in config.values() if isinstance(v, dict) and "dtype" in v)):
        part["dtype"] = str(policy.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if not os.path.isdir(source):  # a hub id: its snapshot holds only the files that were asked for
        processor.save_pretrained(folder)
        source = os.path.dirname(cached_file(source, "config.json"))
    written = {"config.json", "generation_config.json", "model.safetensors.index.json"}
    for file in Path(source).iterdir():
        if file.suffix in (".json", ".jinja", ".txt", ".model") and file.name not in written:
            shutil.copyfile(file, folder / file.name)
    shutil.rmtree(final, ignore_errors=True)
    folder.rename(final)


def weights_fingerprint(policy: Policy) -> str:
    """sha256 of every parameter and buffer that `state_dict` holds, with names, shapes and dtypes; the same
    whether sharded or not. A collective."""
    digest = hashlib.sha256()
    for name, tensor in policy.hf.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(full(tensor).detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------
# The built-in default: a tiny model of the real Qwen2.5-VL classes, and its supervised cold start

CHAT_TEMPLATE = """\
{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}\
{% if m['content'] is string %}{{ m['content'] }}\
{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

TINY_CORPUS = [  # the words the tiny tokenizer knows
    "how many shapes are there?", "<think>i see shapes</think><answer></answer>", "user", "assistant",
    "which digit is this?", "this is a", "0 1 2 3 4 5 6 7 8 9"]


def build_tokenizer(corpus: list[str], specials: list[str], eos: str, pad: str):
    """A byte-level BPE tokenizer with the corpus's words as tokens; any other text encodes as bytes."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"</?[a-z]+>|\s?[A-Za-z]+|\d|\s+|[^\sA-Za-z\d]")  # a tag, a word, a digit: one token each
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=600, min_frequency=1, special_tokens=specials, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token=pad,
                                   padding_side="left")


def build_tiny_vlm(folder: str | Path, seed: int = 0):
    """Write a random Qwen2.5-VL of half a million parameters, its tokenizer and processor (save_pretrained).

    Images up to 48 x 48 (patch 8, merge 2: nine image tokens). initializer_range 0.08 rather than 0.02: at
    this width it learns to look at the image about twice as fast.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
                "<|image_pad|>", "<|video_pad|>"]
    tokenizer = build_tokenizer(TINY_CORPUS, specials, eos="<|im_end|>", pad="<|endoftext|>")
    ids = dict(zip(specials, tokenizer.convert_tokens_to_ids(specials)))
    config = Qwen2_5_VLConfig(
        text_config=dict(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256,
                         num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         max_position_embeddings=2048, initializer_range=0.08, bos_token_id=None,
                         eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"],
                         rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 6, 6])),
        vision_config=dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=4, patch_size=8,
                           spatial_merge_size=2, temporal_patch_size=2, window_size=96, out_hidden_size=128,
                           fullatt_block_indexes=[0, 1], initializer_range=0.08),
        tie_word_embeddings=True, image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"])
    image_processor = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2,
                                               size={"shortest_edge": 16 * 16, "longest_edge": 48 * 48})
    processor = without_video(Qwen2_5_VLProcessor)(image_processor=image_processor, tokenizer=tokenizer,
                                                   chat_template=CHAT_TEMPLATE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hf = Qwen2_5_VLForConditionalGeneration(config)
    hf.generation_config.eos_token_id = ids["<|im_end|>"]
    hf.generation_config.pad_token_id = ids["<|endoftext|>"]
    hf.save_pretrained(folder)
    processor.save_pretrained(folder)
    # Where torchvision is installed, AutoProcessor insists on this file.
    (Path(folder) / "video_preprocessor_config.json").write_text(json.dumps(dict(
        video_processor_type="Qwen2VLVideoProcessor", patch_size=8, merge_size=2, temporal_patch_size=2,
        size={"shortest_edge": 16 * 16, "longest_edge": 48 * 48})) + "\n")


def cold_start(args, output_dir: Path, accuracy: float = 0.4):
    """Supervised training of the tiny model on `shapes`, until its sampled held-out answers pass `accuracy`.

    It is an ordinary run of train_dpo.py, in its own process and folder (output_dir/cold_start), whose final/
    is then the model that the run starts from (its reference, too). Called on one rank; it needs no other.
    """
    command = [sys.executable, str(Path(__file__).with_name("train_dpo.py")), "--algo", "sft",
               "--max_steps", str(args.cold_start_steps), "--eval_steps", "2", "--eval_temperature", "1",
               "--stop_at_accuracy", str(accuracy), "--seed", str(args.seed), "--device", args.device,
               "--output_dir", str(output_dir / "cold_start")]
    print("cold start:", " ".join(["python", "train_dpo.py", *command[2:]]), flush=True)
    env = {k: v for k, v in os.environ.items()
           if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
           and not k.startswith("TORCHELASTIC")}
    child = subprocess.Popen(command, env=env)
    previous = signal.signal(signal.SIGTERM, lambda *_: (child.terminate(), child.wait(), sys.exit(143)))
    child.wait()
    signal.signal(signal.SIGTERM, previous)
    if child.returncode or not (output_dir / "cold_start" / "final").is_dir():
        raise InputError(f"the cold start was not finished (exit code {child.returncode}); see above")


def start_model(args, output_dir: Path, rank: int) -> str:
    """The folder or hub id the run starts from. Without --model_name_or_path rank 0 writes the tiny model and
    trains it a little (--cold_start_steps); then all is as if --model_name_or_path had named that folder."""
    if args.model_name_or_path is not None:
        return args.model_name_or_path
    path = output_dir / "tiny_vlm"
    if rank == 0:
        if args.cold_start_steps:
            cold_start(args, output_dir)  # done in a moment if this run is resumed
        else:
            build_tiny_vlm(path, args.seed)
    if dist.is_initialized():
        dist.barrier()
    return str(output_dir / "cold_start" / "final" if args.cold_start_steps else path)


# ------------------------------------------------------------------------------------------------------------
# Ranks


def init_distributed(device: str = "auto"):
    """(rank, world_size, device) under torchrun or alone: gloo on a CPU, nccl on GPUs, no group if alone."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return rank, world_size, torch.device(device)


def device_mesh(device_type: str, shard_size: int | None):
    """One dimension to shard over, or two (HSDP): replicas, and the shard_size ranks that hold one."""
    world_size = dist.get_world_size()
    shard_size = shard_size or world_size
    if world_size % shard_size:
        raise InputError(f"--shard_size {shard_size} must divide the number of ranks, {world_size}")
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


@contextmanager
def gathered(policy: Policy):
    """Within it every rank holds the whole model, and passes without gradient need no collective: ranks may
    run different numbers of them, of different lengths. For rollouts, held-out data, reference passes."""
    units = [m for m in policy.modules() if isinstance(m, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(unit is not policy, recurse=False)


def full(x: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor, on every rank; any other tensor as it is."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def all_gather(x: torch.Tensor, device="cpu") -> torch.Tensor:
    """(..., n) of this rank -> (..., world_size * n), in the order of the ranks; n must agree."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.to(device).contiguous())
    return torch.cat(parts, -1).to(x.device)


def all_reduce_sums(sums: dict[str, tuple], device="cpu") -> dict[str, tuple[float, float]]:
    """{key: (sum, count)} of this rank -> of all ranks, in fp64 and one collective. Keys must agree."""
    keys = sorted(sums)
    flat = torch.tensor([[float(x) for x in sums[k]] for k in keys], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(flat)
    return {k: tuple(pair) for k, pair in zip(keys, flat.tolist())}


def clip_grad_norm_(parameters, max_norm: float) -> float:
    """Global norm of all gradients before clipping, the same on every rank.

    A parameter that no row used (the vision tower, where no row has an image) gets a gradient of zero first,
    so that AdamW's momentum moves it alike whatever the other rows and ranks held.
    """
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    return float(full(nn.utils.clip_grad_norm_(parameters, max_norm)))


# ------------------------------------------------------------------------------------------------------------
# What a run leaves: output_dir/{args.json, status.json, metrics.jsonl, completions/, checkpoints/, final/}

# Flags that may differ when a run is resumed; what they do to data and numbers describe_run says by itself.
FREE_ON_RESUME = {
    "output_dir", "resume", "allow_changed", "max_hours", "save_steps", "save_total_limit", "ref_cache",
    "device", "shard_size", "per_device_train_batch_size", "gradient_accumulation_steps",
    "steps_per_generation", "per_device_eval_batch_size", "gradient_checkpointing", "reward_timeout"}


def digest_of(paths) -> str | None:
    """sha256 over the contents of files, in order; None for none."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest() if paths else None


def describe_run(args, world_size: int) -> dict:
    """args.json: resolved flags, package versions, and what must not change under a run that is resumed."""
    given = [path for path in (args.dataset, args.eval_dataset) if path is not None and os.path.isfile(path)]
    rewards = [spec.rpartition(":")[0] for spec in getattr(args, "reward_funcs", [])]
    code = [*sorted(Path(__file__).parent.glob("*.py")), *(path for path in rewards if os.path.isfile(path))]
    kinds = {args.loss_type} if isinstance(args.loss_type, str) else set(args.loss_type)
    cut = kinds & {"aot", "aot_unpaired", "bnpo", "disco"} or getattr(args, "top_entropy_quantile", 1.0) < 1
    path = args.model_name_or_path
    weights = sorted(Path(path).glob("*.safetensors")) if path and os.path.isdir(path) else []
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    packages = ("torch", "transformers", "safetensors", "pillow", "numpy")
    return vars(args) | {
        "command": sys.argv, "world_size": world_size, "rows per update": rows * world_size,
        "updates per rollout": getattr(args, "steps_per_generation", 0) // args.gradient_accumulation_steps,
        "micro-batch, on which this loss depends": args.per_device_train_batch_size if cut else None,
        "data": digest_of(given), "weights": digest_of(weights), "code": digest_of(code),
        "versions": {name: version(name) for name in packages}}


def open_run(args, rank: int, world_size: int) -> tuple[Path, bool]:
    """(output folder, the same on every rank; whether a run is resumed there).

    With --resume auto the same command goes on with the run that its --output_dir holds, if the flags, data
    and start weights recorded in args.json are the same; else it is an error that lists what changed.
    """
    answer = [None]
    if rank == 0:
        try:
            answer = [_open_run(args, world_size)]
        except InputError as error:
            answer = [error]
        except OSError as error:
            answer = [InputError(f"--output_dir {args.output_dir}: {error}")]
    if dist.is_initialized():
        dist.broadcast_object_list(answer)
    if isinstance(answer[0], InputError):
        raise answer[0]
    args.output_dir, resumed = answer[0]
    return Path(args.output_dir), resumed


def _open_run(args, world_size: int) -> tuple[str, bool]:
    if args.output_dir is None:
        n = 1
        while os.path.exists(f"runs/{args.algo}-{n}"):
            n += 1
        args.output_dir = f"runs/{args.algo}-{n}"
    folder, now, resumed = Path(args.output_dir), describe_run(args, world_size), False
    if folder.exists() and any(folder.iterdir()):
        if args.resume == "never" or not (folder / "args.json").exists():
            raise InputError(f"--output_dir {folder} is not empty; name a new one, "
                             f"or none for runs/{args.algo}-N")
        check_unchanged(json.loads((folder / "args.json").read_text()), now, args.allow_changed)
        resumed = True
    if args.resume not in ("auto", "never"):
        start = Path(args.resume)
        if not (start / "manifest.json").is_file():
            raise InputError(f"--resume {start}: expected auto, never or a checkpoint folder (step_N), which "
                             "has a manifest.json")
        before = start.parent.parent / "args.json"
        if before.is_file():
            check_unchanged(json.loads(before.read_text()), now, args.allow_changed)
    (folder / "completions").mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "args.json", json.dumps(now, indent=2) + "\n")
    print(f"{args.algo}: " + " ".join(f"{k}={v}" for k, v in vars(args).items()), flush=True)
    return str(folder), resumed


def check_unchanged(before: dict, now: dict, allowed: list[str]):
    """Refuse to resume with other flags, data or start weights; other code or versions are warned of."""
    before = json.loads(json.dumps(before))
    now = json.loads(json.dumps(now))  # tuples become lists in both
    changed = {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)}
    for name in sorted(changed & {"code", "versions"}):
        print(f"warning: resumed with other {name} than it was started with", flush=True)
    changed -= FREE_ON_RESUME | {"command", "world_size", "code", "versions"} | set(allowed)
    unknown = set(allowed) - before.keys() - now.keys()
    if unknown:
        raise InputError(f"--allow_changed {sorted(unknown)[0]}: args.json has no such setting")
    if changed:
        lines = "\n".join(f"  {name}: {before.get(name)} -> {now.get(name)}" for name in sorted(changed))
        raise InputError(f"--output_dir holds a run with other settings:\n{lines}\nName a new folder, or go "
                         f"on all the same with --allow_changed {' '.join(repr(n) for n in sorted(changed))}")


def write_atomically(path: Path, text: str):
    """Either the old file is there or the new one, also after a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def set_status(output_dir: Path, rank: int, status: str, step: int | None):
    """status.json, for whoever restarts runs: running, stopped (resume it), or done. step None: as it was."""
    if rank == 0:
        file = output_dir / "status.json"
        if step is None:
            step = json.loads(file.read_text())["step"] if file.exists() else 0
        write_atomically(file, json.dumps({"status": status, "step": step}) + "\n")


def is_done(args, output_dir: Path, rank: int) -> bool:
    """Whether the run in that folder has ended, and nothing else is asked of it; says so. A collective."""
    file = output_dir / "status.json"
    done = args.resume == "auto" and not args.allow_changed and file.exists()
    done = all_gather_object(done and json.loads(file.read_text())["status"] == "done")[0]
    if done:
        if rank == 0:
            print(f"the run in {output_dir} is done; its model is {output_dir / 'final'}")
        if dist.is_initialized():
            dist.destroy_process_group()
    return done


def end_run(output_dir: Path, rank: int, status: str, step: int | None, rewards):
    """Leave status.json, end the reward process and the process group."""
    set_status(output_dir, rank, status, step)
    if rank == 0 and status == "stopped":
        where = "before its first step" if step is None else f"at step {step}"
        print(f"stopped {where}; the same command with --output_dir {output_dir} goes on from there")
    if rewards is not None:
        rewards.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def preflight(policy: Policy, groups, temperature: float, rank: int):
    """One forward and backward of the largest micro-batch that the run can meet, before its first step: what
    does not fit into memory shows now. Weights, gradients and randomness stay as they are."""
    batch = to_device(policy.pack(groups), policy.device)
    shape = f"{len(batch['completion_ids'])} completions in rows of {batch['input_ids'].shape[1]} tokens"
    try:
        logps, *_ = policy(batch, temperature)
        (0.0 * logps.sum()).backward()
    except torch.OutOfMemoryError as error:
        raise InputError(f"the largest micro-batch of this run, {shape}, does not fit into memory; lower "
                         f"--per_device_train_batch_size or add --gradient_checkpointing ({error})") from None
    policy.zero_grad(set_to_none=True)
    if rank == 0:
        print(f"preflight: {shape} fit", flush=True)


def count_skipped(grad_norm: float, before: int, output_dir: Path, rank: int, step: int, rows: list) -> int:
    """How many steps in a row were skipped for a gradient norm that is nan or infinite (which every rank sees
    alike); the third ends the run, and leaves what it was computed on in nonfinite_rank_R.json."""
    if math.isfinite(grad_norm):
        return 0
    if rank == 0:
        tqdm.write(f"warning: step {step} was skipped: its gradient norm is {grad_norm}")
    if before == 2:
        file = output_dir / f"nonfinite_rank_{rank}.json"
        file.write_text(json.dumps({"step": step, "rows": [row["_source"] for row in rows]}, indent=2) + "\n")
        raise InputError(f"three steps in a row had a gradient norm of nan or infinity; {file} has the rows")
    return before + 1


def log_step(metrics: dict, output_dir: Path, rank: int, keys: tuple[str, ...]):
    """Append to metrics.jsonl, and print the chosen keys on one line (tqdm.write spares the progress bar)."""
    if rank == 0:
        with open(output_dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps({k: v if math.isfinite(v) else None for k, v in metrics.items()}) + "\n")
        shown = [f"{k} {metrics[k]:.4g}" for k in keys if metrics.get(k) is not None]
        if shown:
            tqdm.write(f"step {metrics['step']} | " + " | ".join(shown))


# ------------------------------------------------------------------------------------------------------------
# Checkpoints. torch.distributed.checkpoint reads a pickled index: trust checkpoints/ as code; final/ is data.


def crc32(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def all_gather_object(value) -> list:
    """[value of each rank], in order; alone, [value]. A collective."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def save_checkpoint(output_dir: Path, policy: Policy, optimizer, state: dict, rows: dict, keep: int,
                    rank: int, ref: Policy | None = None) -> bool:
    """checkpoints/step_N: weights, optimizer and a moving reference (sharded), `state` (JSON, with "step",
    alike on all ranks), and this rank's `rows` {name: tensor}. True if every rank wrote its part; else
    nothing has changed.

    It is built as step_N.tmp, fsynced, given a manifest of sizes and checksums, and renamed. Of the others
    the newest `keep - 1` stay; one that goes loses its manifest first.
    """
    folder = output_dir / "checkpoints" / f"step_{state['step']}"
    temporary, error, written = folder.with_suffix(".tmp"), None, {}
    try:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)  # left over from a killed save
            temporary.mkdir(parents=True)
    except OSError as reason:
        error = str(reason)
    error = all_gather_object(error)[0]  # nobody writes before the folder is there
    try:
        if error is not None:
            raise OSError(error)
        parts = {"model": get_model_state_dict(policy)}
        if ref is not None:
            parts["ref"] = get_model_state_dict(ref)
        if optimizer.state:  # none before the first step: torch would make one up, of one step
            parts["optimizer"] = get_optimizer_state_dict(policy, optimizer)
        dcp.save(parts, checkpoint_id=temporary, no_dist=not dist.is_initialized())
        if rows:
            save_file({name: tensor.contiguous() for name, tensor in rows.items()},
                      temporary / f"rows_{rank}.safetensors")
        if rank == 0:
            (temporary / "state.json").write_text(json.dumps(state | {"optimizer": bool(optimizer.state)}))
        mine = [f for f in temporary.iterdir() if f.name.startswith((f"__{rank}_", f"rows_{rank}."))
                or rank == 0 and f.name in (".metadata", "state.json")]
        for file in mine:
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        written = {file.name: [file.stat().st_size, crc32(file)] for file in mine}
    except Exception as reason:  # a full disk, above all
        error = f"rank {rank}: {type(reason).__name__}: {reason}"
    except dcp.CheckpointException as reason:  # no Exception: DCP raises it on every rank if one fails
        error = "; ".join(f"rank {r}: {type(e).__name__}: {e}" for r, (e, _) in reason.failures.items())
    parts = all_gather_object((error, written))
    errors = sorted({error for error, _ in parts if error})
    if rank == 0 and not errors:
        files = {name: entry for _, written in parts for name, entry in written.items()}
        try:
            write_atomically(temporary / "manifest.json", json.dumps(files))
            sync_folder(temporary)
            shutil.rmtree(folder, ignore_errors=True)  # bad, or it would have been resumed from (`Saver`)
            temporary.rename(folder)
            sync_folder(folder.parent)
            for old in complete_checkpoints(output_dir)[keep:]:
                drop_checkpoint(old)
        except OSError as reason:
            errors = [f"rank 0: {reason}"]
    failed = any(all_gather_object(bool(errors)))
    if failed and rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        print(f"warning: no checkpoint of step {state['step']}: {'; '.join(errors)[:500]}", flush=True)
    return not failed


class Saver:
    """Writes a run's checkpoints; the third failure in a row, or of the last one, ends the run."""

    def __init__(self, keep: int, output_dir: Path, policy, optimizer, scheduler, rank: int, saved: int,
                 ref: Policy | None = None):
        self.run, self.ref, self.scheduler, self.failures = (output_dir, policy, optimizer), ref, scheduler, 0
        self.keep, self.rank, self.saved = keep, rank, saved or None

    def save(self, state: dict, rows: dict, last: bool):
        if self.saved == state["step"]:
            return  # it is there already, written or resumed from: never replaced, so never in danger
        state = state | {"scheduler": self.scheduler.state_dict()}
        written = save_checkpoint(*self.run, state, rows, self.keep, self.rank, self.ref)
        self.saved = state["step"] if written else self.saved
        self.failures = 0 if written else self.failures + 1
        if not written and (last or self.failures == 3):
            raise InputError(f"no checkpoint could be written under {self.run[0]}; the reason stands above")


def sync_folder(folder: Path):
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """Those with a manifest, newest first."""
    found = [file.parent for file in (output_dir / "checkpoints").glob("step_*/manifest.json")
             if re.fullmatch(r"step_\d+", file.parent.name)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")), reverse=True)


def drop_checkpoint(folder: Path):
    try:
        (folder / "manifest.json").unlink()  # first: without it nobody takes what is left for a checkpoint
        shutil.rmtree(folder)
    except OSError as reason:  # the new one is in place all the same
        print(f"warning: old checkpoint {folder} cannot be deleted: {reason}", flush=True)


def load_checkpoint(output_dir: Path, policy: Policy, optimizer, rank: int, path: str | None = None,
                    ref: Policy | None = None):
    """The newest checkpoint that is whole -> (state, [rows of each rank that wrote it]); (None, []): none.

    Weights and optimizer are restored in place, on any number of ranks. A bad one is named and passed over;
    all bad is an error, and so is any fault of an explicit `path`.
    """
    candidates = complete_checkpoints(output_dir) if path is None else [Path(path)]
    candidates = all_gather_object(candidates)[0]  # rank 0 decides: file systems may disagree
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    for folder in candidates:
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
            parts = {"model": get_model_state_dict(policy)}
            if ref is not None:
                parts["ref"] = get_model_state_dict(ref)
            if state.pop("optimizer"):
                parts["optimizer"] = get_optimizer_state_dict(policy, optimizer)
            dcp.load(parts, checkpoint_id=folder, no_dist=not dist.is_initialized())
            set_model_state_dict(policy, parts["model"])
            if ref is not None:
                set_model_state_dict(ref, parts["ref"])
            if "optimizer" in parts:
                set_optimizer_state_dict(policy, optimizer, parts["optimizer"])
            optimizer.zero_grad(set_to_none=True)
            count = sum(name.startswith("rows_") for name, _ in manifest)
            rows = [load_file(folder / f"rows_{r}.safetensors") for r in range(count)]
            if rank == 0:
                print(f"resumed from {folder}, step {state['step']}", flush=True)
                for later in complete_checkpoints(output_dir) if path is not None else []:
                    if int(later.name.removeprefix("step_")) > state["step"]:
                        drop_checkpoint(later)  # of the branch that an explicit path leaves
            return state, rows
        if path is not None:
            raise InputError(f"--resume {path}: {fault}")
        if rank == 0:
            print(f"warning: checkpoint {folder} cannot be used ({fault}); trying the one before", flush=True)
    found = [p.name for p in (output_dir / "checkpoints").glob("step_*") if p.suffix != ".tmp"]
    if any(all_gather_object(bool(candidates or found))):  # never a silent fresh start
        raise InputError(f"none of the checkpoints under {output_dir} can be used: {', '.join(found)}")
    return None, []


def forget_after(output_dir: Path, rank: int, step: int):
    """Drop the lines of metrics.jsonl after `step`: they will be written again, each of them once."""
    file = output_dir / "metrics.jsonl"
    if rank == 0 and file.exists():
        lines = [line for line in file.read_text().splitlines(keepends=True)
                 if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_atomically(file, "".join(lines))


class Interrupted(Exception):
    """Raised out of a long pass that holds no collective, when the run is asked to stop."""


class Stop:
    """SIGTERM, SIGINT, or --max_hours gone by, on any rank.

    `stop()` is cheap and local: the sampler asks it every few tokens. A rank that was asked tells the others
    through torchrun's store, without a collective. `agreed()`, a collective, decides after the pass.
    """

    def __init__(self, max_hours: float | None):
        self.asked, self.told, self.since = False, False, 0.0
        self.deadline = math.inf if max_hours is None else STARTED + 3600 * max_hours
        self.store = dist.distributed_c10d._get_default_store() if dist.is_initialized() else None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number, frame):
        now = time.monotonic()
        if self.asked and now - self.since > 2:  # somebody insists; sooner, torchrun passes on the first
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

    def agreed(self) -> bool:
        return any(all_gather_object(self()))

    @contextmanager
    def passes(self):
        """Leaves the block early if the run is asked to stop; `agreed()` must follow, on every rank."""
        try:
            yield
        except Interrupted:
            pass
        except InputError:  # a signal to the whole process group also ends the reward process
            if not self():
                raise

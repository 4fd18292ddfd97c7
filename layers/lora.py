"""LoRA, rsLoRA and DoRA (--lora_r): adapters in the linear layers of a model that stays as it is otherwise.

    LoRA    arXiv 2106.09685        rsLoRA  arXiv 2312.03732        DoRA    arXiv 2402.09353
"""

import math
import os
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn


def unsharded(x: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor, on every rank; any other tensor as it is."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


class LoraLinear:
    """Mixed by `add_lora` into the class of a linear layer, which is frozen and keeps its place and names.

        y = x W^T + b + s (x A^T) B^T          A (r, in) Kaiming-uniform, B (out, r) zero     LoRA 2106.09685
        y = m / |V| * (x V^T) + b,  V = W + s B A,  m starts at |W|                           DoRA 2402.09353

    s is alpha / r, or alpha / sqrt(r) (rsLoRA 2312.03732). |V| (out,) are the norms of V's rows, constant in
    the backward pass (DoRA's section 4.3). `lora_m` holds m - |W|, so that the start is exactly the base, in
    bf16 too. There is no dropout: the first ratio of an update must be 1.
    """

    adapter_on = True

    def forward(self, x):
        y = getattr(self, "product", super().forward)(x)                                      # (..., out)
        if not self.adapter_on:
            return y
        update = self.lora_scale * F.linear(F.linear(x, self.lora_A), self.lora_B)
        if not hasattr(self, "lora_m"):
            return y + update
        gain = vars(self).get("gain")
        gain = self.magnitude() if gain is None else gain                                     # (out,)
        plain = y if self.bias is None else y - self.bias
        return y + ((gain - 1) * plain + gain * update).to(y.dtype)

    def magnitude(self):
        """m / |V| (out,), with a gradient to m alone."""
        with torch.no_grad():
            W = fp32_weight(self)
            start, norm = W.norm(dim=1), self.added(W, self.lora_A, self.lora_B).norm(dim=1)
        return (start + self.lora_m) / norm

    def added(self, W, A, B):
        return W + self.lora_scale * (B.float() @ A.float())

    @torch.no_grad()
    def merged(self) -> tuple[torch.Tensor, dict]:
        """-> the weight (out, in) that computes the same without an adapter, and the adapter under PEFT's
        names. All ranks must call this."""
        W, A, B = fp32_weight(self), unsharded(self.lora_A), unsharded(self.lora_B)
        V, adapter = self.added(W, A, B), {"lora_A.weight": A, "lora_B.weight": B}
        if hasattr(self, "lora_m"):
            m = adapter["lora_magnitude_vector"] = W.norm(dim=1) + unsharded(self.lora_m)
            V *= (m / V.norm(dim=1))[:, None]
        return V, adapter


def fp32_weight(layer) -> torch.Tensor:
    """A linear layer's weight in fp32, unsharded, and decoded where bitsandbytes holds it in 4 bits."""
    if hasattr(layer.weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    return unsharded(layer.weight).float()


@contextmanager
def adapter_off(policy):
    """Within it the policy is the model that it started from, its reference. Without LoRA nothing changes."""
    layers = [m for m in policy.modules() if isinstance(m, LoraLinear)]
    for layer in layers:
        layer.adapter_on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.adapter_on = True


def add_lora(hf, args):
    """Freeze the model, and give the linear layers that --lora_target_modules names an adapter, in place.

    A target is the name of a layer, or the end of it (q_proj, self_attn.q_proj); all-linear is every linear
    layer but the output head, as in PEFT. A vision tower that --freeze_vision_tower freezes gets none. The
    weights of these layers are kept in --dtype, which is what they are computed in.
    """
    left_out = set(hf.get_encoder(modality="image").modules()) if args.freeze_vision_tower else set()
    left_out.add(hf.get_output_embeddings())  # the log-probs read its weight, and do not call it
    linear = {name: m for name, m in hf.named_modules()
              if type(m).__name__ in ("Linear", "Linear4bit") and m not in left_out}
    chosen = {}
    for target in args.lora_target_modules:
        found = {n: m for n, m in linear.items() if target == "all-linear" or f".{n}".endswith(f".{target}")}
        if not found:
            there = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise ValueError(f"--lora_target_modules {target}: no such linear layer, or none for an "
                             f"adapter; {hf.config.model_type} has {there}")
        chosen |= found
    hf.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)  # the same on all ranks
        for name in sorted(chosen):
            layer, device = chosen[name], chosen[name].weight.device
            if layer.weight.is_floating_point() and not hasattr(layer.weight, "quant_state"):
                layer.weight.data = layer.weight.data.to(getattr(torch, args.dtype))
            layer.lora_A = nn.Parameter(torch.empty(args.lora_r, layer.in_features, device=device))
            nn.init.kaiming_uniform_(layer.lora_A, a=math.sqrt(5))
            layer.lora_B = nn.Parameter(torch.zeros(layer.out_features, args.lora_r, device=device))
            if args.use_dora:
                layer.lora_m = nn.Parameter(torch.zeros(layer.out_features, device=device))
            layer.lora_scale = args.lora_alpha / (math.sqrt(args.lora_r) if args.use_rslora else args.lora_r)
            layer.__class__ = type("LoraLinear", (LoraLinear, type(layer)), {})
    hf.adapter_config = dict(
        peft_type="LORA", r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=0.0, bias="none",
        target_modules=sorted(chosen), use_rslora=args.use_rslora, use_dora=args.use_dora,
        modules_to_save=None, task_type=None, inference_mode=True)
    if os.environ.get("RANK", "0") == "0" and not next(hf.parameters()).is_meta:
        trained = sum(p.numel() for p in hf.parameters() if p.requires_grad)
        experts = {type(m).__name__ for m in hf.modules() if any(p.dim() == 3 for p in m.parameters(False))}
        without = "".join(f"; {name}'s 3-D weights are no linear layers and get none" for name in experts)
        print(f"LoRA: {trained:,} parameters in adapters of {len(chosen)} linear layers{without}", flush=True)

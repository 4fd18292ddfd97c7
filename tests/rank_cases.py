"""Run under torchrun (or alone) by test_ranks.py: training steps whose gradients and weights are written out whole.

    torchrun --nproc_per_node=2 rank_cases.py cases.json     # [[name, script, flags], ...] -> <name>.safetensors

AdamW is replaced by SGD (Adam makes a full step of a gradient that is rounding alone) and the sampler by fixed ids that
depend on the draw number, since another rank count may flip a sampled token by rounding.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import InProcess
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model  # noqa: E402
import rollout  # noqa: E402
import train_dpo  # noqa: E402
import train_grpo  # noqa: E402


def fixed_sample(policy, prompts, draws, *, num_generations, **_):
    """Completions of 1 to 6 ids that only draw number and k decide, each ended by EOS. Where ranks share the weights they
    are whole here and without FSDP's hooks, which a CUDA graph of the sampler's step could not hold."""
    units = [m for m in policy.modules() if isinstance(m, FSDPModule)]
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in units) and (policy.whole or not units)
    completions = []
    for draw in draws:
        for k in range(num_generations):
            generator = torch.Generator().manual_seed(1000 * draw + k)
            length = int(torch.randint(1, 7, (), generator=generator))
            ids = torch.randint(300, 310, (length,), generator=generator)
            ids[-1] = policy.eos_ids[0]
            completions.append(ids)
    mask = torch.arange(max(map(len, completions))) < torch.tensor([len(c) for c in completions])[:, None]
    ids = torch.full(mask.shape, policy.pad_id).masked_scatter(mask, torch.cat(completions))
    return rollout.Rollout(ids, mask, torch.zeros(mask.shape), torch.zeros(len(completions), dtype=torch.bool))


def main(cases: Path):
    torch.optim.AdamW = lambda parameters, lr, **_: torch.optim.SGD(parameters, lr)
    rollout.sample = fixed_sample
    end_ranks, model.end_ranks = model.end_ranks, lambda: None  # one process group for all cases
    rollout.RewardRunner = InProcess
    clip, export = model.clip_grad_norm_, model.export
    for name, script, flags in json.loads(cases.read_text()):
        tensors, steps = {}, []

        def spy(parameters, limit):
            norm = clip(parameters, 1e9)
            assert all(m._forward_pre_hooks and m._forward_hooks for m in spy.units), "back for the training pass"
            for i, p in enumerate(parameters):
                tensors[f"step {len(steps)} grad {i}"] = model.unsharded(p.grad).clone()
            steps.append(norm)
            return norm

        def keep(policy, folder, rank):
            tensors.update({f"weight {n}": model.unsharded(p).detach().clone() for n, p in policy.named_parameters()})
            export(policy, folder, rank)

        load = model.load_policy

        def watched(*args, **kwargs):
            policy, processor = load(*args, **kwargs)
            spy.units = [m for m in policy.modules() if isinstance(m, FSDPModule)]
            return policy, processor

        model.clip_grad_norm_, model.export, model.load_policy = spy, keep, watched
        {"train_dpo": train_dpo, "train_grpo": train_grpo}[script].main([*flags, "--output_dir", name])
        if not dist.is_initialized() or dist.get_rank() == 0:
            save_file(tensors, f"{name}.safetensors")
        model.load_policy = load
    end_ranks()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

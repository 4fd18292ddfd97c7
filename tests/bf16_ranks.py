"""Run under torchrun (or alone) by test_ranks.py: hidden states in bf16, of a training pass and within `gathered`.

    torchrun --nproc_per_node=2 bf16_ranks.py model_folder out.safetensors
"""

import sys
from pathlib import Path

import torch
from conftest import make_group
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model  # noqa: E402


def main(folder: str, out: str):
    rank, _, device = model.init_distributed("cpu")
    policy, processor = model.load_policy(folder, "bfloat16", device, gradient_checkpointing=True)
    batch = policy.pack([make_group(policy, processor, 1, [5, 3], seed=i) for i in range(2)])
    parts = batch["input_ids"], batch["position_ids"], model.attention_mask_of(batch), batch["pixels"]
    seen, hook = [], policy.hidden
    policy.hidden = lambda *args: seen.append(hook(*args)) or seen[-1]  # inside FSDP's forward
    logps, *_ = policy(batch)
    logps.sum().backward()
    with torch.no_grad(), model.gathered(policy), policy.compute_weights():
        seen.append(hook(*parts))
    if rank == 0:
        save_file({"trained": seen[0].detach().contiguous(), "gathered": seen[1].contiguous(), "logps": logps.detach()}, out)
    model.end_ranks()


if __name__ == "__main__":
    main(*sys.argv[1:])

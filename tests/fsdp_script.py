"""The model divided by `fully_shard` among the processes of `torchrun`, beside the same model whole.

    torchrun --nproc-per-node 2 tests/fsdp_script.py FOLDER LANGUAGE

The whole model sees the bags of all processes, the divided one in each process its share. FOLDER holds a BLIP-2 made by
`families.save_blip2`; the trained weights, gathered from all processes, are saved in FOLDER/trained. Prints JSON.
"""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from mivpg.modeling_mivpg import MivpgForConditionalGeneration
from mivpg.training import ModelConfig
from tiny import randomize_added_weights

BAGS = {"a chair": 2, "a bed and a lamp": 1, "the table": 3, "it": 2}
"""Caption and number of photos."""


def make_photos(number: int, seed: int) -> list[Image.Image]:
    generator = np.random.default_rng(seed)
    return [Image.fromarray(generator.integers(0, 256, (30, 40, 3), np.uint8)) for _ in range(number)]


def shard(model: MivpgForConditionalGeneration) -> None:
    """Every block for itself, as accelerate does, and what is left together."""
    blocks = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    for module in reversed(list(model.modules())):  # what is inside first
        if type(module).__name__ in blocks:
            fully_shard(module)
    fully_shard(model)
    register_fsdp_forward_method(model, "generate")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def largest_gap(model: MivpgForConditionalGeneration, other: MivpgForConditionalGeneration, of: str) -> float:
    """Between the `grad` or `data` of two models' trained parameters."""
    others = dict(other.named_parameters())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in others.items() if p.requires_grad} == trained.keys() and len(trained) > 10
    return max((whole(getattr(p, of)) - getattr(others[name], of)).abs().max().item() for name, p in trained.items())


def compare(folder: Path) -> dict[str, Any]:
    rank, num_processes = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    expected, processor = ModelConfig(base=str(folder), patch_pooling="abmil", instance_correlation="csa").load()
    randomize_added_weights(expected, generator=torch.Generator().manual_seed(1))
    divided = copy.deepcopy(expected)
    num_parameters = sum(p.numel() for p in divided.parameters())
    shard(divided)
    found: dict[str, Any] = {
        "share": sum(p.to_local().numel() for p in divided.parameters()) / num_parameters,
    }

    photos = [make_photos(number, seed) for seed, number in enumerate(BAGS.values())]

    def batch(rows: slice) -> dict[str, torch.Tensor]:
        return processor(images=photos[rows], text="a photo of", captions=list(BAGS)[rows])

    everything, mine = batch(slice(None)), batch(slice(rank, None, num_processes))
    is_decoder_only = not expected.config.is_encoder_decoder
    num_items = int((everything["labels"][:, int(is_decoder_only) :] != -100).sum())
    for model in (expected, divided):
        model.eval()  # dropout off
    optimizers = [
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1) for model in (expected, divided)
    ]
    losses = []
    for step in range(2):
        expected_loss = expected(**everything, num_items_in_batch=num_items).loss
        expected_loss.backward()
        loss = divided(**mine, num_items_in_batch=num_items).loss
        (loss * num_processes).backward()  # gradients are averaged over processes
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append((expected_loss.item(), total.item()))
        found[f"gradients {step}"] = largest_gap(divided, expected, "grad")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    found["losses"] = losses
    found["weights"] = largest_gap(divided, expected, "data")

    inputs = processor(images=photos, text="a photo of")
    for num_beams in (1, 3):
        written = [m.generate(**inputs, num_beams=num_beams, max_new_tokens=8).tolist() for m in (expected, divided)]
        found[f"beams {num_beams}"] = written

    gathered = get_model_state_dict(divided, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        divided.save_trained(folder / "trained", gathered)
        loaded = MivpgForConditionalGeneration.from_pretrained(folder / "trained").eval()
        found["loaded"] = loaded.generate(**inputs, num_beams=1, max_new_tokens=8).tolist()
        found["gathered"] = largest_gap(loaded, expected, "data")
    dist.barrier()
    before = {name: p.to_local().clone() for name, p in divided.named_parameters()}
    with torch.no_grad():
        for parameter in divided.parameters():
            parameter.to_local().add_(1.0)
    for _ in range(2):  # as in a resumed run, which loads its checkpoint and at its end the best
        divided.load_trained(folder / "trained")
    moved = {name for name, p in divided.named_parameters() if not torch.equal(p.to_local(), before[name])}
    found["loaded again"] = moved == {name for name, p in divided.named_parameters() if not p.requires_grad}
    return found


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = compare(Path(sys.argv[1]))
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Time and memory of a training step on one large bag of stored CLS features, at the Q-Former's real size.

python benchmarks/large_bags.py [--position-encoding ppeg] [--gradient-checkpointing | --score] [NUM_INSTANCES …]

A process each, so that the peak of one does not hide that of another: an optimizer step (forward, backward, AdamW) of
MIVPG with CSA, D = 1408, over a small language model, so that what is measured is MIVPG. `--gradient-checkpointing`
computes blocks anew in the backward pass, as that option of a training run does; `--score` measures visual prompts
alone, as for a caption. With PPEG the instances lie on a round piece of a lattice, as tissue does, in true coordinates.
Runs on the GPU where there is one; memory is then that of the device. Prints Markdown.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import time

import torch
from transformers import OPTConfig

from mivpg import MivpgConfig, MivpgForConditionalGeneration
from parameters import draw_zeros

WIDTH = 1408
NUM_STEPS = 3


def make_model(position_encoding: str) -> MivpgForConditionalGeneration:
    """The real Q-Former over a language model of two small layers."""
    text = OPTConfig(
        hidden_size=256,
        word_embed_proj_dim=256,
        ffn_dim=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=512,
    )
    config = MivpgConfig(
        vision_config=None,
        text_config=text.to_dict(),
        qformer_config={
            "encoder_hidden_size": WIDTH,
            "instance_correlation": "csa",
            "position_encoding": position_encoding,
        },
        image_embeds_size=WIDTH,
        image_token_index=511,
        patch_pooling="cls",
    )
    model = MivpgForConditionalGeneration(config)
    draw_zeros(model)
    model.freeze()
    return model.train()


def make_batch(num_instances: int) -> dict[str, torch.Tensor]:
    """One bag with a short caption."""
    radius = math.ceil(math.sqrt(num_instances / math.pi)) + 1
    axis = torch.arange(-radius, radius + 1)
    lattice = torch.cartesian_prod(axis, axis)
    coords = lattice[(lattice**2).sum(dim=1).argsort()[:num_instances]]  # (N, 2)
    ids = torch.tensor([[511] * 32 + list(range(10, 26))])
    labels = torch.cat([torch.full((1, 32), -100), ids[:, 32:]], dim=1)
    return {
        "image_embeds": torch.randn(1, num_instances, 1, WIDTH),
        "image_coords": coords[None].float(),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
    }


def measure(
    num_instances: int, position_encoding: str, *, gradient_checkpointing: bool, score: bool
) -> dict[str, float]:
    """Seconds a step and the peak of this process in GB, what it holds before included."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model(position_encoding).to(device)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    batch = {name: value.to(device) for name, value in make_batch(num_instances).items()}
    seconds = []
    for _ in range(NUM_STEPS):
        start = time.perf_counter()
        if score:
            with torch.no_grad():
                model.eval().get_visual_prompts(batch["image_embeds"], image_coords=batch["image_coords"])
        else:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts KiB
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 1e9
    return {"seconds": min(seconds), "slowest": max(seconds), "peak": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("num_instances", nargs="*", type=int, default=[1000, 10_000, 100_000])
    parser.add_argument("--position-encoding", choices=["none", "ppeg"], default="none")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--score", action="store_true")
    parser.add_argument("--alone", action="store_true", help="measure in this process and print JSON")
    arguments = parser.parse_args()
    if arguments.alone:
        found = measure(
            arguments.num_instances[0],
            arguments.position_encoding,
            gradient_checkpointing=arguments.gradient_checkpointing,
            score=arguments.score,
        )
        print(json.dumps(found))
        return
    print("| instances | seconds a step, least of 3 | slowest | peak memory, GB |\n|---:|---:|---:|---:|")
    for number in arguments.num_instances:
        options = [str(number), "--position-encoding", arguments.position_encoding, "--alone"]
        options += ["--gradient-checkpointing"] * arguments.gradient_checkpointing + ["--score"] * arguments.score
        run = subprocess.run([sys.executable, __file__, *options], capture_output=True, text=True, check=True)
        found = json.loads(run.stdout.splitlines()[-1])
        print(f"| {number:,} | {found['seconds']:.3g} | {found['slowest']:.3g} | {found['peak']:.1f} |", flush=True)


if __name__ == "__main__":
    main()

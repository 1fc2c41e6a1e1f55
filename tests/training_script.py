"""A small world to train in, and a script that trains in it: for runs that are killed, and for several processes.

    python training_script.py WORLD '[{"output_dir": …, "language": "opt", …}]' [--resume] [--kill-at STEP]

Each entry is a run for `tiny_train_config`. A run to be killed, the last one, does it itself with SIGKILL, which leaves
it no time to tidy up.
"""

import argparse
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import OPTForCausalLM, PreTrainedTokenizerFast, T5ForConditionalGeneration, TrainerCallback

from families import save_vision_model
from mivpg import training
from mivpg.captioning import GenerationOptions
from mivpg.datasets import DatasetConfig
from mivpg.datasets.bag_file import BagFileConfig
from mivpg.training import MivpgTrainer, ModelConfig, TrainConfig, train
from tiny import HIDDEN_SIZE, IMAGE_TOKEN_ID, NUM_HEADS, VISION_WIDTH, VOCAB_SIZE, tiny_opt_config, tiny_t5_config

VISION = "blip_2_vision_model"
COLORS, THINGS, PLACES = ("red", "blue", "green"), ("chair", "table", "lamp"), ("here", "there in the corner")
WORDS = ("a", "the", "one", "photo", "of", "in", "corner", "here", "there", *COLORS, *THINGS)


def make_world(folder: Path, num_train: int = 21, num_val: int = 5) -> None:
    """Language models `opt` and `t5` with tokenizers, a vision model, and bags with captions of unequal length.

    `bags.jsonl` has features and `photos.jsonl` photos.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    for name, model, specials in (
        ("opt", OPTForCausalLM(tiny_opt_config()), ("<unk>", "<pad>", "<s>", "</s>")),
        ("t5", T5ForConditionalGeneration(tiny_t5_config()), ("<pad>", "</s>", "<unk>", "<s>")),
    ):
        model.save_pretrained(folder / name)
        unused = (f"<unused{i}>" for i in range(VOCAB_SIZE))
        words = [*specials, *WORDS, *unused][: VOCAB_SIZE - 1]
        vocabulary = {word: i for i, word in enumerate(words)} | {"<image>": IMAGE_TOKEN_ID}
        tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = WhitespaceSplit()
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            unk_token="<unk>",
            pad_token="<pad>",
            bos_token="<s>",
            eos_token="</s>",
            additional_special_tokens=["<image>"],
        ).save_pretrained(folder / name)

    save_vision_model(folder / "vision", VISION)
    generator = np.random.default_rng(0)
    with (folder / "bags.jsonl").open("w") as file, (folder / "photos.jsonl").open("w") as photos:
        for i in range(num_train + num_val):
            features = generator.normal(size=(1 + i % 4, 3, VISION_WIDTH)).astype(np.float32)
            np.save(folder / f"{i}.npy", features)
            color, thing = COLORS[i % 3], THINGS[i // 3 % 3]
            captions = [f"a {color} {thing}", *(f"the {color} {thing} {place}" for place in PLACES)]
            split = "train" if i < num_train else "val"
            bag = {"id": f"bag{i}", "features": f"{i}.npy", "captions": captions, "split": split}
            file.write(json.dumps(bag) + "\n")
            images = [f"{i}-{number}.png" for number in range(len(features))]
            for image in images:
                Image.fromarray(generator.integers(0, 256, (30, 40, 3), np.uint8)).save(folder / image)
            del bag["features"]
            photos.write(json.dumps(bag | {"images": images}) + "\n")


def tiny_train_config(
    world: Path,
    *,
    output_dir: str | Path,
    language: str = "opt",
    bags: str = "bags.jsonl",
    aggregator: str | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> TrainConfig:
    """A run of seconds in the world."""
    vision = {"image_embeds_size": VISION_WIDTH} if bags != "photos.jsonl" else {"vision": str(world / "vision")}
    perceiver = {"depth": 2, "num_heads": 2, "head_size": 8}
    qformer = {
        "hidden_size": HIDDEN_SIZE,
        "num_hidden_layers": 2,
        "num_attention_heads": NUM_HEADS,
        "intermediate_size": 20,
        "cross_attention_frequency": 1,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
        "initializer_range": 0.2,
    }
    defaults = {
        "prompt": "a photo of",
        "num_train_epochs": 2,
        "batch_size": 8,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "num_workers": 0,
        "validation": GenerationOptions(num_beams=1, max_new_tokens=8),
    }
    return TrainConfig(
        model=ModelConfig(
            language=str(world / language),
            **vision,
            qformer=qformer,
            num_query_tokens=3,
            aggregator=aggregator,
            aggregator_options=perceiver if aggregator == "perceiver" else None,
        ),
        dataset=DatasetConfig(bag_file=BagFileConfig(path=world / bags)),
        output_dir=Path(output_dir),
        **{"references": "random"} | defaults | options,
    )


class KillAt(TrainerCallback):
    """Ends one process at the end of a step, before what that step would log, judge or save."""

    def __init__(self, step: int, rank: int) -> None:
        self.step = step
        self.rank = rank

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and args.process_index == self.rank:
            os.kill(os.getpid(), signal.SIGKILL)


def kill_in_save(step: int) -> None:
    """Ends the process when the model of a checkpoint is written, and nothing else yet."""
    save_rng_state = MivpgTrainer._save_rng_state

    def save_or_die(self, output_dir):
        if self.state.global_step == step:
            assert (Path(output_dir) / "optimizer.pt").exists()
            os.kill(os.getpid(), signal.SIGKILL)
        save_rng_state(self, output_dir)

    MivpgTrainer._save_rng_state = save_or_die


def note_captioned() -> None:
    """Each process writes the ids of the bags that it captions into `captioned-RANK.txt` of the run folder."""
    caption = MivpgTrainer._caption

    def caption_and_note(self, dataset):
        with (self.run_dir / f"captioned-{self.args.process_index}.txt").open("a") as file:
            for bag, text in caption(self, dataset):
                file.write(f"{bag}\n")
                yield bag, text

    MivpgTrainer._caption = caption_and_note


def take_for_gpus() -> None:
    """accelerate is told that the processes have GPUs: otherwise it trains copies of a model instead of dividing it."""
    make_arguments = training._training_arguments

    def arguments_as_on_gpus(*args, **options):
        arguments = make_arguments(*args, **options)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return arguments

    training._training_arguments = arguments_as_on_gpus
    training._check_can_divide = lambda: None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("world", type=Path)
    parser.add_argument("runs", type=json.loads)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--kill-rank", type=int, default=0)
    parser.add_argument("--kill-in-save", type=int)
    parser.add_argument("--note-captioned", action="store_true")
    parser.add_argument("--take-for-gpus", action="store_true")
    arguments = parser.parse_args()
    if arguments.take_for_gpus:
        take_for_gpus()
    if arguments.note_captioned:
        note_captioned()
    if arguments.kill_in_save is not None:
        kill_in_save(arguments.kill_in_save)
    for run in arguments.runs:
        if arguments.kill_at is not None and run is arguments.runs[-1]:
            init = MivpgTrainer.__init__

            def init_with_kill(self, *args, init=init, **kwargs):
                init(self, *args, **kwargs)
                self.add_callback(KillAt(arguments.kill_at, arguments.kill_rank))

            MivpgTrainer.__init__ = init_with_kill
        train(tiny_train_config(arguments.world, **run), resume=arguments.resume)


if __name__ == "__main__":
    main()

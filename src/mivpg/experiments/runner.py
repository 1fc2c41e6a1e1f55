"""Runs, each in a process of its own, as many at once as there are cores: fine-tune, then caption.

What is there already is not done again: a run that has written its captions is done, and one that was interrupted goes
on from its newest checkpoint. A run that fails does not stop the others; its log says why.
"""

import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mivpg.bags import BagCollator, BagDataset, Sample, bag_size, select
from mivpg.baselines.training import BaselineConfig, caption_with_baseline, train_baseline
from mivpg.captioning import GenerationOptions, caption_file
from mivpg.datasets import DatasetConfig
from mivpg.errors import MivpgError
from mivpg.files import last_json_line, write_whole
from mivpg.modeling_mivpg import MivpgForConditionalGeneration
from mivpg.processing_mivpg import MivpgProcessor
from mivpg.training import LOG_FILE, ModelConfig, TrainConfig, train


@dataclass(frozen=True, kw_only=True)
class Run:
    """Something that ends with captions of one or several test splits; `execute` is called in a process of its own."""

    name: str
    """Runs of one name are the same run."""
    log: Path
    """What the process prints."""
    captions: Mapping[Path, DatasetConfig]
    """Where captions go, and the data set whose test split they are of."""
    num_steps: int = 0
    """Steps of training, for the progress bar."""
    cost: float = field(default=1.0, compare=False)
    """How long it takes beside others; the longest runs first, so that none is left to run alone."""

    @property
    def is_done(self) -> bool:
        """Whether all captions are there, which come after everything else."""
        return all(file.exists() for file in self.captions)

    @property
    def num_logged_steps(self) -> int:
        """Steps that its training has logged."""
        return 0

    def execute(self) -> None:
        """Does it, or what is left of it."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class FineTuning(Run):
    """A fine-tuning of MIVPG, or of what stands in its place, and the captions written after it."""

    model: ModelConfig
    """What is captioned with where nothing is trained."""
    training: TrainConfig | None = None
    """Its `model` is the one above."""
    generation: GenerationOptions
    prompt: str
    measures_cost: bool = False
    """Whether it also says what a training step costs."""

    @property
    def num_logged_steps(self) -> int:
        """Steps that its training has logged."""
        if self.training is None:
            return 0
        last = last_json_line(self.training.output_dir / LOG_FILE)
        return 0 if last is None else int(last["step"])

    @property
    def cost_file(self) -> Path:
        """Where it says what a training step costs."""
        return next(iter(self.captions)).with_suffix(".cost.json")

    def execute(self) -> None:
        """Trains, if it trains, and captions."""
        if self.training is None:
            model, processor = self.model.load()
        else:
            folder = train(self.training, resume=True)
            model = MivpgForConditionalGeneration.from_pretrained(folder)
            processor = MivpgProcessor.from_pretrained(folder)
        if self.measures_cost and self.training is not None and not self.cost_file.exists():
            model.to("cuda" if torch.cuda.is_available() else "cpu")
            samples = select(self.training.dataset.load(), "train")
            cost = step_cost(model, processor, samples, batch_size=self.training.batch_size)
            write_whole(self.cost_file, json.dumps(cost) + "\n")
        for file in self.captions:
            self.caption(model, processor, file)

    def caption(self, model: MivpgForConditionalGeneration, processor: MivpgProcessor, file: Path) -> None:
        """Writes one of `captions`, where it is not there yet."""
        if file.exists():
            return
        samples = select(self.captions[file].load(), "test")
        model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        caption_file(model, processor, samples, file, generation=self.generation, prompt=self.prompt, batch_size=50)


@dataclass(frozen=True, kw_only=True)
class EpochByEpoch(FineTuning):
    """A fine-tuning that keeps its checkpoints, and captions after some of its epochs."""

    epochs: Mapping[int, Path]
    """Which of `captions` is written after so many epochs; after none, by the model as it starts."""

    def execute(self) -> None:
        """Trains and captions."""
        assert self.training is not None
        train(self.training, resume=True)
        for epoch, file in self.epochs.items():
            if epoch == 0:
                self.caption(*self.model.load(), file)
                continue
            folder = self.training.output_dir / f"checkpoint-{epoch * self.num_steps // self.training.num_train_epochs}"
            model = MivpgForConditionalGeneration.from_pretrained(folder)
            self.caption(model, MivpgProcessor.from_pretrained(folder), file)


@dataclass(frozen=True, kw_only=True)
class RecurrentDecoder(Run):
    """The recurrent decoder of Table 1's baselines on features that are there, and its captions."""

    dataset: DatasetConfig
    folder: Path
    """Of the run."""
    train_features: Mapping[str, Sequence[Path]]
    """The copies of each slide, for training."""
    features: Mapping[str, Sequence[Path]]
    """Of each slide as it is, for validation and test."""
    config: BaselineConfig

    def execute(self) -> None:
        """Trains and captions."""
        samples = self.dataset.load()
        train_samples, val, test = (select(samples, split) for split in ("train", "val", "test"))
        features = {**self.features, **{sample.id: self.train_features[sample.id] for sample in train_samples}}
        folder = train_baseline(features, train_samples, val, self.folder, self.config)
        captions = caption_with_baseline(folder, features, test)
        for file in self.captions:
            lines = [json.dumps({"id": sample.id, "caption": captions[sample.id]}) for sample in test]
            write_whole(file, "\n".join(lines) + "\n")


def step_cost(
    model: MivpgForConditionalGeneration, processor: MivpgProcessor, samples: Sequence[Sample], *, batch_size: int
) -> dict[str, float]:
    """What a training step costs: on the same batches for every arm, drawn evenly over the sizes of the bags.

    Returns:
        `trained_parameters`; `visual_tokens`, the mean over these bags; `seconds_a_step`, forward, backward and AdamW,
        the least of three; `peak_memory_gb` of this process so far.
    """
    by_size = sorted(samples, key=bag_size)
    number = min(batch_size, len(by_size))
    chosen = [by_size[round(place * (len(by_size) - 1) / max(1, number - 1))] for place in range(number)]
    dataset = BagDataset(chosen, prompt=processor.prompt, training=True)
    batch = BagCollator(processor, training=True)([dataset[index] for index in range(len(chosen))])
    batch = {name: value.to(model.device) for name, value in batch.items()}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0)  # which leaves the weights as they are
    seconds = []
    model.train()
    for _ in range(3):
        start = time.perf_counter()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    model.eval()
    marks = (batch["input_ids"] == model.config.image_token_index).sum(dim=1).float().mean().item()
    return {
        "trained_parameters": sum(parameter.numel() for parameter in parameters),
        "visual_tokens": marks,
        "seconds_a_step": min(seconds),
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def run_all(runs: Sequence[Run], *, num_processes: int | None = None) -> dict[str, str]:
    """Runs what is not done yet, one thread a run; a bar counts optimizer steps.

    Args:
        runs: In any order.
        num_processes: At once; by default one a core.

    Returns:
        Of the runs that failed, the last line of their logs.
    """
    runs = list({run.name: run for run in runs}.values())  # arms may share one
    waiting = sorted((run for run in runs if not run.is_done), key=lambda run: -run.cost)
    for run in waiting:
        run.log.parent.mkdir(parents=True, exist_ok=True)
        for file in run.captions:
            file.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")  # a clean process, but torch is imported once for all
    context.set_forkserver_preload([__name__])
    # Ctrl-C is the parent's, which ends its children: they inherit from the server that they do not hear it.
    heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
    forkserver.ensure_running()
    signal.signal(signal.SIGINT, heard)
    running: dict[str, tuple[Run, Any]] = {}
    failed: dict[str, str] = {}
    done = sum(run.num_steps for run in runs if run.is_done)
    progress = tqdm(total=sum(run.num_steps for run in runs), initial=done, unit="step", disable=None)
    try:
        while waiting or running:
            while waiting and len(running) < (num_processes or os.cpu_count() or 1):
                run = waiting.pop(0)
                process = context.Process(target=_run_one, args=(run,), daemon=True)
                process.start()
                running[run.name] = (run, process)
            progress.update(done + sum(run.num_logged_steps for run, _ in running.values()) - progress.n)
            for name, (run, process) in list(running.items()):
                process.join(timeout=0.2)
                if process.exitcode is None:
                    continue
                del running[name]
                done += run.num_steps
                if process.exitcode == 0:
                    tqdm.write(f"  {name} is done")
                    continue
                log = run.log.read_text(encoding="utf-8").strip().splitlines() if run.log.exists() else []
                failed[name] = log[-1] if log else f"exit code {process.exitcode}"
                tqdm.write(f"  {name} failed ({run.log}): {failed[name]}")
    finally:
        progress.close()
        for _, process in running.values():
            process.kill()
            process.join()
    return failed


def _run_one(run: Run) -> None:
    """What happens in a run's process."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with run.log.open("a", encoding="utf-8") as log:
        sys.stdout = sys.stderr = log
        try:
            run.execute()
        except Exception as error:
            print(f"{type(error).__name__}: {error}" if not isinstance(error, MivpgError) else error, flush=True)
            raise SystemExit(1) from error

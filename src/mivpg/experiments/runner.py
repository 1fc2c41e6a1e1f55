"""Runs, each in a process of its own, as many at once as there are GPUs, else cores: fine-tune, then caption.

What is there already is not done again: a run that has written its captions is done, and one that was interrupted goes
on from its newest checkpoint. Beside its captions stands what they were made of, so that those of another base or
other settings are not taken for its own. A run that fails does not stop the others; its log says why.
"""

import gc
import json
import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mivpg.bags import BagCollator, BagDataset, BagSampler, Sample, bag_size, select
from mivpg.baselines.training import BaselineConfig, caption_with_baseline, train_baseline
from mivpg.captioning import GenerationOptions, caption_file
from mivpg.datasets import DatasetConfig
from mivpg.errors import MivpgError
from mivpg.files import last_json_line, read_json, write_whole
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
    made_of: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """What captions depend on, as JSON has it."""
    num_steps: int = 0
    """Steps of training, for the progress bar."""
    cost: float = field(default=1.0, compare=False)
    """How long it takes beside others; the longest runs first, so that none is left to run alone."""

    @property
    def is_done(self) -> bool:
        """Whether all captions are there, which come after everything else, and were made of this."""
        return self.is_captioned and self._record() == self.made_of

    @property
    def is_captioned(self) -> bool:
        """Whether all captions are there, whatever they were made of."""
        return all(file.exists() for file in self.captions)

    @property
    def record_file(self) -> Path:
        """Says what captions are made of; it is written before them."""
        return next(iter(self.captions)).with_suffix(".made_of.json")

    def _record(self) -> Any:
        return read_json(self.record_file) if self.record_file.exists() else None

    def claim(self) -> None:
        """Writes what captions will be made of.

        Raises:
            MivpgError: Captions, or a run, are there that were made of something else.
        """
        found = self._record()
        if found is None and not any(file.exists() for file in self.captions):
            write_whole(self.record_file, json.dumps(self.made_of, indent=2) + "\n")
        elif found != self.made_of:
            known = found if isinstance(found, dict) else {}
            names = {**self.made_of, **known}
            other = [name for name in names if known.get(name) != self.made_of.get(name)]
            raise MivpgError(
                f"{self.record_file}: captions beside it were made with another {', '.join(other)}; "
                "delete them and the run's folder, or name another --out."
            )

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
    caption_batch: int = 50
    """Bags captioned at once."""
    measures_cost: bool = False
    """Whether it also says what a training step costs."""

    @property
    def is_done(self) -> bool:
        """Also whether its cost is measured, where that is asked for."""
        return super().is_done and (not self.measures_cost or self.cost_file.exists())

    @property
    def cost_file(self) -> Path:
        """Where it says what a training step costs."""
        return cost_file(next(iter(self.captions)))

    @property
    def num_logged_steps(self) -> int:
        """Steps that its training has logged."""
        if self.training is None:
            return 0
        last = last_json_line(self.training.output_dir / LOG_FILE)
        return 0 if last is None else int(last["step"])

    def execute(self) -> None:
        """Says what a step costs, if that is asked for; trains, if it trains; captions."""
        if self.measures_cost and self.training is not None:
            self.measure_cost(self.training)  # first, so that memory is that of these steps
        if self.is_captioned:
            return
        if self.training is None:
            model, processor = self.model.load()
        else:
            folder = train(self.training, resume=True)
            model = MivpgForConditionalGeneration.from_pretrained(folder)
            processor = MivpgProcessor.from_pretrained(folder)
        for file in self.captions:
            self.caption(model, processor, file)

    def measure_cost(self, training: TrainConfig) -> None:
        """Writes what a training step costs, where it is not there yet."""
        if self.cost_file.exists():
            return
        model, processor = self.model.load()
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        samples = select(training.dataset.load(), "train")
        cost = step_cost(
            model, processor, samples, prompt=training.prompt, batch_size=training.batch_size, bf16=training.bf16
        )
        write_whole(self.cost_file, json.dumps(cost) + "\n")

    def caption(self, model: MivpgForConditionalGeneration, processor: MivpgProcessor, file: Path) -> None:
        """Writes one of `captions`, where it is not there yet."""
        if file.exists():
            return
        samples = select(self.captions[file].load(), "test")
        model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        caption_file(
            model,
            processor,
            samples,
            file,
            generation=self.generation,
            prompt=self.prompt,
            batch_size=self.caption_batch,
            strict=True,  # a table compares the same bags
        )


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


def cost_file(captions: Path) -> Path:
    """Where a run says what a training step costs, beside its captions."""
    return captions.with_suffix(".cost.json")


NUM_TIMED_STEPS = 4


def step_cost(
    model: MivpgForConditionalGeneration,
    processor: MivpgProcessor,
    samples: Sequence[Sample],
    *,
    prompt: str,
    batch_size: int,
    bf16: bool = False,
) -> dict[str, float]:
    """What a training step costs, on batches as training makes them, the same for all arms.

    Returns:
        `trained_parameters`; `visual_tokens`, the mean over these bags; `seconds_a_step` (forward, backward and AdamW),
        the mean over the batches, of each the less of two; `peak_memory_gb`, of the GPU, or of this process so far.
    """
    order = [index for _, index in BagSampler([bag_size(sample) for sample in samples], seed=0, block=batch_size)]
    dataset = BagDataset(samples, prompt=prompt, training=True)
    collate = BagCollator(processor, training=True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0)  # which leaves the weights as they are
    device = model.device
    seconds, marks = [], []
    model.train()
    for start in range(0, len(order), batch_size)[:NUM_TIMED_STEPS]:
        batch = collate([dataset[index] for index in order[start : start + batch_size]])
        batch = {name: value.to(device) for name, value in batch.items()}
        marks.append((batch["input_ids"] == model.config.image_token_index).sum(dim=1).float().mean().item())
        of_batch = []
        for _ in range(2):
            began = time.perf_counter()
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            of_batch.append(time.perf_counter() - began)
        seconds.append(min(of_batch))
    model.eval()
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "trained_parameters": sum(parameter.numel() for parameter in parameters),
        "visual_tokens": sum(marks) / len(marks),
        "seconds_a_step": sum(seconds) / len(seconds),
        "peak_memory_gb": memory / 1e9,
    }


def run_all(runs: Sequence[Run], *, num_processes: int | None = None) -> dict[str, str]:
    """Runs what is not done yet, one thread a run; a bar counts optimizer steps.

    Args:
        runs: In any order.
        num_processes: At once; by default one a GPU, each of which has its own, or where there is none one a core.

    Returns:
        Of the runs that failed, what ended them.
    """
    runs = list({run.name: run for run in runs}.values())  # arms may share one
    waiting = sorted((run for run in runs if not run.is_done), key=lambda run: -run.cost)
    if not waiting:
        return {}
    for run in waiting:
        run.log.parent.mkdir(parents=True, exist_ok=True)
        for file in run.captions:
            file.parent.mkdir(parents=True, exist_ok=True)
    context = clean_processes()
    gpus = visible_gpus()
    free = (gpus or [None] * (num_processes or num_cores()))[:num_processes]
    running: dict[str, tuple[Run, str | None, Any]] = {}
    failed: dict[str, str] = {}
    done = sum(run.num_steps for run in runs if run.is_done)
    progress = tqdm(total=sum(run.num_steps for run in runs), initial=done, unit="step", disable=None)
    try:
        while waiting or running:
            while waiting and free:
                run, gpu = waiting.pop(0), free.pop()
                process = context.Process(target=_run_one, args=(run, gpu), daemon=True)
                process.start()
                running[run.name] = (run, gpu, process)
            progress.update(done + sum(run.num_logged_steps for run, _, _ in running.values()) - progress.n)
            for name, (run, gpu, process) in list(running.items()):
                process.join(timeout=0.2)
                if process.exitcode is None:
                    continue
                del running[name]
                free.append(gpu)
                done += run.num_steps
                if process.exitcode == 0:
                    tqdm.write(f"  {name} is done")
                    continue
                failed[name] = _reason(run, process.exitcode)
                tqdm.write(f"  {name} failed ({run.log}): {failed[name]}")
    finally:
        progress.close()
        for _, _, process in running.values():
            process.kill()
            process.join()
    return failed


def clean_processes() -> multiprocessing.context.ForkServerContext:
    """For processes that share nothing with this one, and imports, made once, with each other."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    # Ctrl-C is the parent's, which ends its children: they inherit from the server that they do not hear it.
    heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
    forkserver.ensure_running()
    signal.signal(signal.SIGINT, heard)
    return context


def num_cores() -> int:
    """Those that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> list[str | None]:
    """What `CUDA_VISIBLE_DEVICES` calls each GPU that there is."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    count = torch.cuda.device_count()
    return [*names[:count]] if names[0] else [str(number) for number in range(count)]


def _reason(run: Run, exitcode: int) -> str:
    if exitcode < 0:
        return f"ended by {signal.Signals(-exitcode).name}; was there too little memory?"
    log = run.log.read_text(encoding="utf-8").strip().splitlines() if run.log.exists() else []
    return log[-1] if log else f"exit code {exitcode}"


def _end_with_parent() -> None:
    """Where the parent was killed, which could not end its children: two runs in one folder would spoil it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _run_one(run: Run, gpu: str | None) -> None:
    """What happens in a run's process."""
    import transformers

    gc.freeze()  # what the server has imported is never garbage, and need not be looked at
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # nothing has looked for GPUs in this process yet
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with run.log.open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            run.claim()
            run.execute()
        except Exception as error:
            if not isinstance(error, MivpgError):
                traceback.print_exc()
            print(error if isinstance(error, MivpgError) else f"{type(error).__name__}: {error}", flush=True)
            raise SystemExit(1) from error

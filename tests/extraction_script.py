"""Extracts features of a bag file, as one of several processes or in a run that is killed: MODEL BAGS OUT [KILLS].

With KILLS, child processes do the work, and each of the first so many is killed with SIGKILL at a random moment.
Prints how many were.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from mivpg import MivpgForConditionalGeneration, MivpgProcessor, extract_features
from mivpg.datasets.bag_file import load_bag_file


def extract() -> None:
    torch.set_num_threads(1)
    model = MivpgForConditionalGeneration.from_pretrained(sys.argv[1])
    if len(sys.argv) > 4:  # slowly, so that there is time to be killed in
        model.vision_model.register_forward_pre_hook(lambda module, args: time.sleep(0.1))
    processor = MivpgProcessor.from_pretrained(sys.argv[1])
    extract_features(model, processor, load_bag_file(Path(sys.argv[2])), Path(sys.argv[3]), batch_size=4)


def main() -> None:
    if len(sys.argv) == 4:
        extract()
        return
    num_killed, generator = 0, random.Random(0)
    while True:
        child = os.fork()
        if child == 0:
            extract()
            os._exit(0)
        if num_killed < int(sys.argv[4]):
            time.sleep(generator.uniform(0.05, 0.6))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert status == 0
            if num_killed >= int(sys.argv[4]):
                break
            # It was done before its time came: begin anew, so that every kill falls into a run.
            for file in Path(sys.argv[3]).glob("*.safetensors"):
                file.unlink()
            continue
        num_killed += 1
    print(num_killed)


if __name__ == "__main__":
    main()

"""What one block of the Q-Former asks of large bags: time, and what is kept for the backward pass.

python benchmarks/blocks.py [--rounds 5] [--sizes 257 2048 8000 20000] [--slope-sizes 10000 20000 50000 100000]

CSA and cross-attention alone, forward and backward, D = 1408, 12 heads of 64, R = 32, one bag, float32, no dropout: as
MIVPG chooses by size (from 2,048 instances on the folded form) against straightforward attention through the same
weights, by PyTorch's fused attention (sdpa, transformers' default) and by plain matrix products (eager). The bag and
the queries need a gradient and the instances that go on to the next block have one, as inside a trained stack. As in
the model, the updated instances are made again for the backward pass, and in a stack every second block's are. Then CSA
alone against two packages' Nyström attention of the same width (nystrom-attention and torchmil, left out where they
are not installed), and how time grows with the bag. Prints Markdown.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from unittest.mock import patch

import torch
from torch import Tensor, nn

from measuring import DEVICE, Seconds, Spread, in_turn, kept_bytes, machine, markdown, spread
from mivpg import folded_attention
from mivpg.configuration_mivpg import MivpgQFormerConfig
from mivpg.layers import CorrelatedSelfAttention

# M instances of width D, R queries of width H, A attention heads

STRAIGHTFORWARD = ("sdpa", "eager")
NUM_LANDMARKS, PINV_ITERATIONS = 256, 6
"""Of the Nyström attentions, as TransMIL has them."""
FORM = "instances, form chosen"
TIME_COLUMNS = [FORM, "s", "s, sdpa", "s, eager", "times as fast as sdpa", "times as fast as eager"]
KEPT_COLUMNS = [FORM, "MB", "MB, sdpa", "MB, eager", "share of sdpa's", "with the bag", "two blocks", "difference"]
CORRELATION_COLUMNS = ["", "s", "MB kept", "CSA is so many times as fast"]


@dataclass(frozen=True)
class Sizes:
    """Of a block; BLIP-2's by default."""

    instance_size: int = 1408
    hidden_size: int = 768
    num_heads: int = 12
    num_queries: int = 32


class Block(nn.Module):
    """What a block does with instances: no feed-forward, no self-attention of queries. Every weight is N(0, 0.02)."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.config = MivpgQFormerConfig(
            hidden_size=sizes.hidden_size,
            encoder_hidden_size=sizes.instance_size,
            num_attention_heads=sizes.num_heads,
            attention_probs_dropout_prob=0.0,
        )
        self.correlation = CorrelatedSelfAttention(self.config)
        self.attention = folded_attention.FoldingCrossAttention(self.config, is_cross_attention=True)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def forward(self, instances: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Instances (1, M, D), queries (1, R, H) -> what the queries read (1, R, H), the instances that go on."""
        updated = self.correlation(instances, None, queries, queries)
        return self.attention(queries, encoder_hidden_states=updated)[0], updated


@contextmanager
def attention_of(block: Block, form: str) -> Iterator[None]:
    """`chosen`: as the model has it; `sdpa`, `eager`: straightforward attention of that kind, whatever the size."""
    block.config._attn_implementation = "sdpa" if form == "chosen" else form
    if form == "chosen":
        yield
        return
    with patch.object(folded_attention, "pays", lambda *_: False):
        yield


@dataclass(frozen=True)
class Work:
    """A block and what it gets from both sides."""

    block: Block
    bag: Tensor
    queries: Tensor
    read_gradient: Tensor
    bag_gradient: Tensor

    @classmethod
    def draw(cls, sizes: Sizes, num_instances: int) -> "Work":
        """All of it at random."""
        generator = torch.Generator(DEVICE).manual_seed(num_instances)

        def normal(*shape: int) -> Tensor:
            return torch.randn(1, *shape, generator=generator, device=DEVICE)

        bags, queries = (num_instances, sizes.instance_size), (sizes.num_queries, sizes.hidden_size)
        return cls(Block(sizes).to(DEVICE), normal(*bags), normal(*queries), normal(*queries), normal(*bags))

    def forward(self, form: str, num_blocks: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The inputs, which need gradients, and the outputs, of so many blocks in a row with the same weights."""
        bag, queries = self.bag.detach().requires_grad_(), self.queries.detach().requires_grad_()
        read, updated = queries, bag
        recomputes = form == "chosen" and self.pays
        with attention_of(self.block, form), folded_attention.RecomputingInstances() if recomputes else nullcontext():
            for _ in range(num_blocks):
                read, updated = self.block(updated, read)
        return bag, queries, read, updated

    @property
    def pays(self) -> bool:
        """Whether the folded form is chosen."""
        correlation = self.block.correlation
        return folded_attention.pays(
            self.bag, self.queries.shape[1], correlation.query, self.block.config.num_attention_heads
        )

    def run(self, form: str) -> dict[str, Tensor]:
        """Forward and backward: the outputs, and the gradients of inputs and weights."""
        bag, queries, read, updated = self.forward(form)
        for parameter in self.block.parameters():
            parameter.grad = None
        torch.autograd.backward((read, updated), (self.read_gradient, self.bag_gradient))
        found = {"what queries read": read, "updated instances": updated}
        found |= {"gradient of the bag": bag.grad, "gradient of the queries": queries.grad}
        return found | {f"gradient of {name}": weight.grad for name, weight in self.block.named_parameters()}

    def kept(self, form: str, num_blocks: int = 1) -> int:
        """Bytes that the forward pass keeps beyond the bag, the queries and the weights."""
        return kept_bytes(lambda: self.forward(form, num_blocks)[2])


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, str]:
    """Between two runs' tensors, over the largest value of the same tensor; and which one it is.

    A key's bias moves all scores of a row alike, so its gradient is zero but for rounding, which has nothing to be
    measured by: it is left out.
    """
    return max(
        (((ours[name] - other).abs().max() / other.abs().max()).item(), name)
        for name, other in theirs.items()
        if not name.endswith("key.bias")
    )


def block_rows(sizes: Sizes, num_instances: int, *, rounds: int) -> tuple[list[str], list[str]]:
    """Of one size of bag: a row of seconds, and a row of bytes and differences."""
    work = Work.draw(sizes, num_instances)
    difference, where = largest_difference(work.run("chosen"), work.run("eager"))
    kept = {form: work.kept(form) for form in ("chosen", *STRAIGHTFORWARD)}
    seconds = in_turn({form: partial(work.run, form) for form in ("chosen", *STRAIGHTFORWARD)}, rounds=rounds)
    title = f"{num_instances:,}, {'folded' if work.pays else 'straightforward (sdpa)'}"
    times = [str(seconds.of(form)) for form in ("chosen", *STRAIGHTFORWARD)]
    times += [str(seconds.times_as_fast("chosen", form)) for form in STRAIGHTFORWARD]
    megabytes = [f"{kept[form] / 1e6:.1f}" for form in ("chosen", *STRAIGHTFORWARD)]
    bag = work.bag.nbytes
    shares = [
        kept["chosen"] / kept["sdpa"],
        (kept["chosen"] + bag) / (kept["sdpa"] + bag),
        work.kept("chosen", 2) / work.kept("sdpa", 2),
    ]
    return [title, *times], [
        title,
        *megabytes,
        *(f"{share:.3f}" for share in shares),
        f"{difference:.1e} ({where})",
    ]


def correlation_rivals(sizes: Sizes) -> dict[str, tuple[nn.Module, Callable[[nn.Module, Tensor, Tensor], Tensor]]]:
    """CSA and what else lets instances see each other, `x + f(x)`; peers that are not installed are missing."""
    block = Block(sizes)
    block.config._attn_implementation = "sdpa"
    rivals: dict[str, tuple[nn.Module, Callable]] = {
        "CSA": (block.correlation, lambda module, bag, queries: module(bag, None, queries, queries))
    }
    if find_spec("nystrom_attention"):
        from nystrom_attention import NystromAttention

        peer = NystromAttention(
            sizes.instance_size,
            dim_head=sizes.hidden_size // sizes.num_heads,
            heads=sizes.num_heads,
            num_landmarks=NUM_LANDMARKS,
            pinv_iterations=PINV_ITERATIONS,
            residual=True,
        )
        rivals["nystrom-attention"] = (peer, lambda module, bag, queries: bag + module(bag))
    if find_spec("torchmil"):
        from torchmil.nn.attention.nystrom_attention import NystromAttention as TransMilAttention

        peer = TransMilAttention(
            sizes.instance_size,
            att_dim=sizes.hidden_size,
            n_heads=sizes.num_heads,
            n_landmarks=NUM_LANDMARKS,
            pinv_iterations=PINV_ITERATIONS,
        )
        rivals["torchmil, TransMIL's attention"] = (peer, lambda module, bag, queries: bag + module(bag))
    return rivals


def correlation_rows(sizes: Sizes, num_instances: int, *, rounds: int) -> list[list[str]]:
    """Seconds and kept bytes of each way to correlate instances, and how many times as fast CSA is."""
    work = Work.draw(sizes, num_instances)
    rivals = correlation_rivals(sizes)
    kept, runs = {}, {}
    for name, (module, correlate) in rivals.items():
        module.to(DEVICE)

        def forward(module=module, correlate=correlate) -> Tensor:
            queries = work.queries.detach().requires_grad_()
            return correlate(module, work.bag.detach().requires_grad_(), queries)

        kept[name] = kept_bytes(forward)
        runs[name] = lambda forward=forward: forward().backward(work.bag_gradient)
    seconds = in_turn(runs, rounds=rounds)
    return [
        [name, str(seconds.of(name)), f"{kept[name] / 1e6:.1f}", str(seconds.times_as_fast("CSA", name))]
        for name in rivals
    ]


def growth(seconds: Seconds) -> tuple[Spread, Spread]:
    """Slope of log seconds over log instances: by least squares, and from the first size to the last; by round.

    Args:
        seconds: Its rivals are named by their numbers of instances, from small to large.
    """
    instances = [math.log(int(number)) for number in seconds.rounds]
    fitted, end_to_end = [], []
    for of_a_round in zip(*seconds.rounds.values(), strict=True):
        times = [math.log(time) for time in of_a_round]
        fitted.append(statistics.linear_regression(instances, times).slope)
        end_to_end.append((times[-1] - times[0]) / (instances[-1] - instances[0]))
    return spread(fitted), spread(end_to_end)


def time_over_size(sizes: Sizes, numbers: list[int], *, rounds: int) -> Seconds:
    """Seconds of a block, as MIVPG chooses, over bags of several sizes, in turn."""
    whole = Work.draw(sizes, max(numbers))
    runs = {}
    for number in sorted(numbers):
        part = Work(
            whole.block,
            whole.bag[:, :number],
            whole.queries,
            whole.read_gradient,
            whole.bag_gradient[:, :number],
        )
        runs[str(number)] = partial(part.run, "chosen")
    return in_turn(runs, rounds=rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="*", default=[257, 2048, 8000, 20_000])
    parser.add_argument("--correlation-size", type=int, default=20_000)
    parser.add_argument("--slope-sizes", type=int, nargs="*", default=[10_000, 20_000, 50_000, 100_000])
    arguments = parser.parse_args()
    torch.manual_seed(0)
    sizes = Sizes()
    print(f"{machine()}\n\nCSA and cross-attention of a block, forward and backward; median (least to most)\n")
    rows = [block_rows(sizes, number, rounds=arguments.rounds) for number in arguments.sizes]
    print(markdown(TIME_COLUMNS, [times for times, _ in rows]))
    print(
        "\nMB kept for the backward pass beyond the bag and the weights; shares of sdpa's: of that, of that and the "
        "bag, and of what two blocks in a row keep, where the second one's updated instances stay. The largest "
        "difference from eager of an output or a gradient, over the largest value in it\n"
    )
    print(markdown(KEPT_COLUMNS, [kept for _, kept in rows]), flush=True)
    number = arguments.correlation_size
    print(
        f"\nCSA alone, {number:,} instances, against Nyström attention of the same width ({NUM_LANDMARKS} landmarks, "
        f"{PINV_ITERATIONS} iterations)\n"
    )
    rows = correlation_rows(sizes, number, rounds=arguments.rounds)
    print(markdown(CORRELATION_COLUMNS, rows))
    for package in ("nystrom_attention", "torchmil"):
        if not find_spec(package):
            print(f"\n{package} is not installed: left out.")
    seconds = time_over_size(sizes, arguments.slope_sizes, rounds=max(2, arguments.rounds // 2))
    print("\nCSA and cross-attention over the size of a bag\n")
    print(markdown(["instances", "s"], [[f"{int(name):,}", str(seconds.of(name))] for name in seconds.rounds]))
    fitted, end_to_end = growth(seconds)
    print(f"\nSlope of log seconds over log instances: {fitted} by least squares, {end_to_end} from end to end.")


if __name__ == "__main__":
    main()

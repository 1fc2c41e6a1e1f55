"""`benchmarks/gpu.py` at tiny size, on whatever device there is: every section runs, and its counts and ratios hold."""

import gc
import time
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import blocks
import gpu
import gpu_parts
import gpu_rivals
import large_bags
from gpu_measuring import Sizes, Work, count_work, side_by_side, try_out
from measuring import DEVICE
from mivpg import MivpgConfig
from parameters import LANGUAGE_MODELS, parameters_by_part, real_size
from tiny import tiny_opt_config, tiny_t5_config, tiny_vit_config

QFORMER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 20}
NUM_POSITIONS = 36
"""One less than three images of ten tokens, a prompt of four and a caption of three."""

SIZES = Sizes(
    vision=tiny_vit_config(),
    qformer=QFORMER,
    languages={"t5": tiny_t5_config(), "opt": tiny_opt_config(max_position_embeddings=NUM_POSITIONS)},
    num_prompts=5,
    num_words=3,
    batch_size=4,
    nums_images=(3,),
    usual_images=2,
    nums_beams=(1, 2),
    extraction_batch=4,
    num_extraction_batches=3,
    photos=((20, 10), (30, 40)),
    nums_images_to_aggregate=(1, 3),
    block=blocks.Sizes(instance_size=12, hidden_size=16, num_heads=2, num_queries=3),
    block_instances=(5, 2100),
    correlation_instances=300,
    large_bag_instances=(30,),
    matrix=64,
    copied_bytes=1000,
    rounds=2,
    seconds_each=0.1,
)


@pytest.fixture(autouse=True, scope="module")
def frozen_garbage():
    """As the program has it: collections, which come before every peak, pass over what was imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def small_parts(monkeypatch):
    """The model of large bags with a tiny Q-Former, and Nyström attention with few landmarks."""

    def tiny(qformer_config, **options) -> MivpgConfig:
        return MivpgConfig(qformer_config=qformer_config | QFORMER, **options)

    monkeypatch.setattr(large_bags, "WIDTH", 12)
    monkeypatch.setattr(large_bags, "MivpgConfig", tiny)
    monkeypatch.setattr(blocks, "NUM_LANDMARKS", 8)


def tables(printed: str) -> dict[str, list[list[str]]]:
    """Cells of each table, without its heading's two lines, by the title over it."""
    found: dict[str, list[list[str]]] = {}
    title = ""
    for line in printed.splitlines():
        if line.startswith("#"):
            title = line.strip("# ")
        elif line.startswith("|"):
            found.setdefault(title, []).append([cell.strip() for cell in line.strip("|").split("|")])
    for title, rows in found.items():
        assert len({len(row) for row in rows}) == 1, title
    return {title: rows[2:] for title, rows in found.items()}


@pytest.mark.slow
def test_every_section_is_printed(capsys, small_parts):
    torch.manual_seed(0)
    languages = {"opt": SIZES.languages["opt"]}  # T5's steps and captions are compared below
    assert gpu.print_report(replace(SIZES, languages=languages)) == []
    found = tables(capsys.readouterr().out)
    rows = {title: len(rows) for title, rows in found.items()}
    extraction, aggregation, block, correlation, largest = list(rows)[3:8]
    assert [rows[extraction], rows[aggregation], rows[block], rows[largest]] == [4, 4, 2, 4]
    assert found[correlation][0][0] == "CSA" and rows[correlation] == 3
    for language in languages:
        models, steps, captions = (title for title in found if title.startswith(language))
        assert [rows[models], rows[steps], rows[captions]] == [3, 9, 6]
        assert {row[0] for row in found[steps][:3]} == {"2, features, gradient_checkpointing"}
        for row in found[steps] + found[captions]:
            if row[2].startswith("not run"):
                continue
            assert row[2] == "4" and all(row)
            if row[1] == gpu_rivals.OURS:
                assert row[4] == "1 (1 to 1)"
    not_run = [row for title in found for row in found[title] if row[2].startswith("not run")]
    assert [row[:2] for row in not_run] == [["3, pixels", "LLaVA-style"], ["3, features", "LLaVA-style"]]
    assert f"{NUM_POSITIONS + 1} tokens" in not_run[0][2]


@pytest.mark.parametrize("name", list(LANGUAGE_MODELS))
def test_real_sizes_are_blip2s(name, monkeypatch):
    """On PyTorch's meta device, which holds no weights; `parameters.py` has PPEG, too."""
    monkeypatch.setattr(gpu_rivals, "DEVICE", torch.device("meta"))
    monkeypatch.setattr(gpu_rivals, "draw_zeros", lambda model: None)
    language = LANGUAGE_MODELS[name]
    rivals = gpu_rivals.make_rivals(Sizes(), language)
    expected = parameters_by_part(real_size(language)) | {"PPEG": 0}
    assert parameters_by_part(rivals["MIVPG"]) == expected
    assert parameters_by_part(rivals["concatenation"]) == expected | {"AB-MIL": 0, "CSA": 0}
    projection = rivals["LLaVA-style"].aggregator.projection[0]
    assert tuple(projection.weight.shape) == (language.hidden_size, 1408)
    assert Sizes().num_tokens == rivals["LLaVA-style"].config.num_query_tokens == 257


@pytest.fixture(params=["t5", "opt"])
def rivals(request):
    torch.manual_seed(0)
    return gpu_rivals.make_rivals(SIZES, SIZES.languages[request.param])


def test_rivals_share_what_is_frozen_and_nothing_is_zero(rivals):
    ours, *others = rivals.values()
    for model in others:
        assert model.vision_model is ours.vision_model and model.language_model is ours.language_model
    assert ours.vision_model.dtype == ours.language_model.dtype == torch.bfloat16
    for model in rivals.values():
        for name, parameter in model.named_parameters():
            assert parameter.any(), name
            frozen = name.startswith(("vision_model.", "language_model."))
            assert parameter.requires_grad != frozen and parameter.dtype == (
                torch.bfloat16 if frozen else torch.float32
            )
    assert ours.patch_pooling is not None and ours.config.qformer_config.instance_correlation == "csa"


def test_llava_style_prompts_grow_with_the_bag_and_the_others_do_not(rivals):
    def length(name: str, num_images: int) -> int:
        batch = gpu_rivals.make_batch(SIZES, rivals[name], num_images, stored=True, captioned=False)
        return batch["input_ids"].shape[1]

    for name in ("MIVPG", "concatenation"):
        assert length(name, 1) == length(name, 3) == 5 + 4
    assert (length("LLaVA-style", 1), length("LLaVA-style", 3)) == (10 + 4, 30 + 4)


@pytest.mark.parametrize("name", list(gpu_rivals.RIVALS))
def test_bags_a_few_at_a_time_take_the_same_step(rivals, name):
    model = rivals[name].float().eval()
    batch = gpu_rivals.make_batch(SIZES, model, 2, stored=True, captioned=True)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    found = []
    for at_once in (4, 1):
        gpu_rivals.training_step(model, torch.optim.SGD(trained.values(), lr=1.0), batch, at_once, torch.float32)
        assert all(parameter.grad is None for parameter in trained.values())
        found.append({name: (parameter - before[name]).detach() for name, parameter in trained.items()})
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(before[name])
    assert max(step.abs().max() for step in found[0].values()) > 1e-3
    for name, step in found[0].items():
        torch.testing.assert_close(found[1][name], step, rtol=1e-3, atol=1e-5)


def test_what_does_not_fit_takes_fewer_bags_at_once():
    tried = []

    def run(at_once: int, fits: int) -> None:
        tried.append(at_once)
        if at_once > fits or tried == [16, 8, 4, 4]:  # the second run with four is one too many
            raise torch.OutOfMemoryError

    trial = try_out(lambda at_once: run(at_once, 4), 16)
    assert trial is not None and trial.at_once == 2
    assert tried == [16, 8, 4, 4, 2, 2, 2]
    assert try_out(lambda at_once: run(at_once, 0), 4) is None


def test_ratios_are_those_of_what_took_longer():
    def sleeping(seconds: float):
        return lambda at_once: time.sleep(seconds)

    def never(at_once: int) -> None:
        raise torch.OutOfMemoryError

    runs = {gpu_rivals.OURS: sleeping(0.02), "slow": sleeping(0.06), "large": never}
    trials, seconds = side_by_side(runs, 4, seconds_each=0.25)
    assert trials["large"] is None and "large" not in seconds.rounds
    assert 2 < seconds.times_as_fast(gpu_rivals.OURS, "slow").median < 4
    assert 0.06 <= seconds.of("slow").median < 0.12
    assert trials["slow"].seconds >= 0.06


def test_operations_and_bytes_are_counted():
    left, right = torch.randn(3, 5, device=DEVICE), torch.randn(5, 7, device=DEVICE)
    product = Work(flops=2 * 3 * 5 * 7, num_bytes=4 * (15 + 35 + 21))
    assert count_work(lambda: left @ right) == product
    assert count_work(lambda: torch.mm(left, right, out=torch.empty(3, 7, device=DEVICE))) == product
    assert count_work(lambda: left.T.reshape(1, 5, 3).expand(9, 5, 3)).num_bytes == 0
    assert count_work(lambda: left[:1, :1].expand(4, 4) + 1).num_bytes == 60 + 64  # no more than its storage
    table, ids = torch.randn(1000, 2, device=DEVICE), torch.zeros(4, dtype=torch.long, device=DEVICE)
    assert count_work(lambda: F.embedding(ids, table)).num_bytes == 2 * 4 * 2 * 4


def test_a_section_that_fails_leaves_the_others_alone(capsys):
    printed = gpu.Report(seconds_in_all=60)

    def rows():
        yield [1]
        raise torch.OutOfMemoryError("no memory\nand more")

    printed.table("## First", ["a", "b"], rows, lambda: [[4, 5]])
    printed.table("## Second", ["a"], lambda: [[2]])
    printed.section("## Broken", lambda: list(rows()))
    printed.start -= 61
    printed.table("## Third", ["a"], lambda: [[3]])
    output = capsys.readouterr().out
    assert printed.failed == ["First", "Broken"]
    first = output.partition("## Second")[0]
    assert first.endswith("| 1 |  |\n| Stopped: OutOfMemoryError: no memory |  |\n| 4 | 5 |\n\n")
    assert "## Broken\n\nStopped: OutOfMemoryError: no memory\n" in output
    assert "| 2 |" in output
    assert "| 3 |" not in output and "Left out" in output


def test_the_largest_bag_ends_where_memory_does(monkeypatch, small_parts):
    making = large_bags.make_batch

    def make_batch(num_instances: int):
        if num_instances > 30:
            raise torch.OutOfMemoryError
        return making(num_instances)

    monkeypatch.setattr(large_bags, "make_batch", make_batch)
    rows = list(gpu_parts.largest_bag_rows(replace(SIZES, large_bag_instances=(30, 60))))
    assert [row[1:3] for row in rows[1::2]] == [["60", "out of memory"]] * 4
    assert [row[1] for row in rows[::2]] == ["30"] * 4
    assert [row[0] for row in rows[::2]] == [
        "bfloat16",
        "float32",
        "bfloat16, gradient_checkpointing",
        "float32, gradient_checkpointing",
    ]

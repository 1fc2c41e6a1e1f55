"""The whole idea on one machine in minutes: the arms of the paper's Table 2 on the miniature catalogue.

    out/catalogue/     generated products, in the files of Amazon Berkeley Objects
    out/features/      what the frozen vision model says of each photo, computed once for all arms
    out/arms/          a run folder for each arm that trains; arms/mivpg/best is a model for `mivpg caption --model`
    out/captions/      what each arm writes of the test products
    out/results.json   scores, floors, oracles and the accuracy of each trait
    out/report.html    the same for people
    out/example.png    a product of which MIVPG says nothing wrong, the weights of its photos, and its caption

Every arm has the same products, steps, schedule, hyperparameters and selection, which is by CIDEr on the validation
products. What is there already is not done again, so an interrupted demo goes on where it was.
"""

import contextlib
import dataclasses
import json
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save

from mivpg.bags import BagCollator, BagDataset, Sample, one_pair_a_reference, select
from mivpg.captioning import GenerationOptions, read_captions
from mivpg.datasets import DatasetConfig
from mivpg.datasets.abo import AboConfig
from mivpg.datasets.bag_file import BagFileConfig, write_bag_file
from mivpg.errors import MivpgError
from mivpg.evaluation import CaptionScorer, bootstrap_interval, caption_floors
from mivpg.experiments.runner import FineTuning, run_all
from mivpg.feature_files import read_features
from mivpg.features import extract_features
from mivpg.files import refuse_used, write_whole
from mivpg.miniature import BASE_MODEL
from mivpg.miniature.base import PROMPT
from mivpg.miniature.catalogue import CatalogueProduct, make_catalogue
from mivpg.miniature.traits import (
    hidden_accuracy,
    most_common_values,
    names_hidden,
    oracle_caption,
    says_nothing_wrong,
    swap_partners,
    trait_accuracies,
)
from mivpg.modeling_mivpg import MivpgForConditionalGeneration
from mivpg.processing_mivpg import MivpgProcessor
from mivpg.report import (
    BagExample,
    BarChart,
    Examples,
    Part,
    Table,
    Text,
    draw_example,
    training_curves,
    what_was_run,
    write_report,
)
from mivpg.training import BEST, LOG_FILE, ModelConfig, TrainConfig
from mivpg.visualization import image_weights

METRICS = ("BLEU@4", "METEOR", "ROUGE_L", "CIDEr")
Photos = Literal["main", "all"]

GENERATION = GenerationOptions(num_beams=1, max_new_tokens=48)
LEAST_PRODUCTS = 20


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A row of Table 2."""

    name: str
    title: str
    photos: Photos
    model: Mapping[str, Any]
    """Options of `ModelConfig`."""
    trains: bool = True


Q_FORMER = {"patch_pooling": "none", "instance_correlation": "none"}
ARMS = (
    Arm(name="zero_shot", title="Zero-shot", photos="main", model=Q_FORMER, trains=False),
    Arm(name="single_image", title="Single image", photos="main", model=Q_FORMER),
    Arm(name="patch_concatenation", title="Patch concatenation", photos="all", model=Q_FORMER),
    Arm(
        name="mivpg_without_csa",
        title="MIVPG without CSA",
        photos="all",
        model={"patch_pooling": "abmil", "instance_correlation": "none"},
    ),
    Arm(name="mivpg", title="MIVPG", photos="all", model={"patch_pooling": "abmil", "instance_correlation": "csa"}),
)


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """How large a demo is; the defaults take under five minutes on two cores."""

    seed: int = 0
    """Draws products, split and training order."""
    num_products: int = 2000
    """Split 70/10/20 by the reader of Amazon Berkeley Objects."""
    num_train_epochs: int = 4
    """Passes over all pairs of a training product and one of its references."""
    batch_size: int = 32
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        if self.num_products < LEAST_PRODUCTS:  # fewer leave a split without products
            raise MivpgError(f"num_products is {self.num_products}, expected at least {LEAST_PRODUCTS}.")


def run_demo(out: Path, config: DemoConfig | None = None) -> dict[str, Any]:
    """Runs the demo, or what is left of it.

    Args:
        out: A new or empty folder, or that of an interrupted demo.
        config: How large it is.

    Returns:
        What `results.json` holds.

    Raises:
        MivpgError: The folder holds something else, or a demo of another config.
    """
    config = config or DemoConfig()
    _claim(out, config)
    seconds: dict[str, float] = {}

    with _timed(seconds, "catalogue", "Drawing products and their photos"):
        products = make_catalogue(out / "catalogue", num_products=config.num_products, seed=config.seed)
    truth = {product.item_id: product for product in products}
    samples = AboConfig(root=out / "catalogue", split_seed=config.seed).load()

    with _timed(seconds, "features", "Running the vision model once on every photo"):
        bags = _bag_files(out, samples, truth)

    with _timed(seconds, "arms", f"Fine-tuning and captioning, {len(ARMS)} arms"):
        num_pairs = len(one_pair_a_reference(select(bags["all"], "train")))
        for name, reason in run_all([arm_run(out, config, arm, num_pairs) for arm in ARMS]).items():
            raise MivpgError(f"{out / 'logs' / name}.txt: {reason}")

    with _timed(seconds, "scores", "Scoring"):
        test = select(bags["all"], "test")
        train_samples = select(bags["all"], "train")
        files = {arm.name: _caption_files(out, arm) for arm in ARMS}
        captions = {arm.name: read_captions(files[arm.name][arm.photos]) for arm in ARMS}
        swapped = read_captions(files["mivpg"]["swapped"])
        results = {"seed": config.seed, "config": dataclasses.asdict(config)}
        results |= score(captions, swapped, test, train_samples, truth, config.seed)
    results["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    results["num_products"] = {split: len(select(bags["all"], split)) for split in ("train", "val", "test")}
    results["model"] = str(out / "arms" / "mivpg" / BEST)
    examples = choose_examples(out, captions, test, truth, config.seed)
    results["examples"] = {
        "ids": [example.id for example in examples],
        "nothing_wrong": _count_right(captions, [truth[example.id] for example in examples]),
    }
    logs = {arm.title: out / "arms" / arm.name / LOG_FILE for arm in ARMS if arm.trains}
    write_demo_report(out / "report.html", results, examples, logs)
    draw_example(_example_that_works(examples, captions["mivpg"], truth), "MIVPG", out / "example.png")
    write_whole(out / "results.json", json.dumps(results, indent=2) + "\n")
    return results


def _claim(out: Path, config: DemoConfig) -> None:
    """Makes the folder the demo's."""
    mark = out / "demo.json"
    asked = dataclasses.asdict(config)
    if mark.exists():
        if (found := json.loads(mark.read_text())) != asked:
            raise MivpgError(f"{out} holds a demo of {found}, and {asked} is asked for; name another folder.")
        return
    refuse_used(out, " for the demo")
    out.mkdir(parents=True, exist_ok=True)
    write_whole(mark, json.dumps(asked, indent=2) + "\n")


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str, what: str) -> Iterator[None]:
    """Says what is done, and how long it took."""
    print(f"{what} …", flush=True)
    start = time.monotonic()
    yield
    seconds[name] = time.monotonic() - start
    print(f"  {seconds[name]:.0f} s", flush=True)


# ── Bags ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _bag_files(out: Path, samples: list[Sample], truth: Mapping[str, CatalogueProduct]) -> dict[str, list[Sample]]:
    """Stored features of every product: all photos, the main photo alone, and of test products others' photos."""
    model = MivpgForConditionalGeneration.from_pretrained(BASE_MODEL, instance_correlation="none")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    processor = MivpgProcessor.from_pretrained(BASE_MODEL)
    bags = {"all": extract_features(model, processor, samples, out / "features" / "all", dtype=torch.float16)}
    bags["main"] = [_recombine(out / "features" / "main", sample, None) for sample in bags["all"]]
    test = {sample.id: sample for sample in select(bags["all"], "test")}
    partners = swap_partners([truth[bag_id] for bag_id in test])
    bags["swapped"] = [
        _recombine(out / "features" / "swapped", test[bag_id], test[partner]) for bag_id, partner in partners.items()
    ]
    for name, those in bags.items():
        write_bag_file(out / f"{name}.jsonl", those)
    return bags


def _recombine(folder: Path, sample: Sample, other: Sample | None) -> Sample:
    """The bag of a product's main photo, with the other photos of another product or with none."""
    assert sample.features is not None
    file = folder / sample.features.name
    if not file.exists():
        rows = [read_features(sample.features)[0][:1]]
        if other is not None and other.features is not None:
            rows.append(read_features(other.features)[0][1:])
        write_whole(file, save({"image_embeds": torch.cat(rows).half()}))
    return replace(sample, features=file)


# ── Arms ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def arm_run(out: Path, config: DemoConfig, arm: Arm, num_pairs: int) -> FineTuning:
    """The run of an arm; between two arms only `model` and the photos differ."""
    model = ModelConfig(base=str(BASE_MODEL), **arm.model)
    training = TrainConfig(
        model=model,
        dataset=_bag_file(out, arm.photos),
        output_dir=out / "arms" / arm.name,
        prompt=PROMPT,
        num_train_epochs=config.num_train_epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        seed=config.seed,
        validation=GENERATION,
        num_workers=0,
    )
    return FineTuning(
        name=arm.name,
        log=out / "logs" / f"{arm.name}.txt",
        model=model,
        training=training if arm.trains else None,
        captions={file: _bag_file(out, photos) for photos, file in _caption_files(out, arm).items()},
        generation=GENERATION,
        prompt=PROMPT,
        num_steps=config.num_train_epochs * math.ceil(num_pairs / config.batch_size) if arm.trains else 0,
        # All patches of all photos, pooled ones, one photo.
        cost=arm.trains * (1 + 2 * (arm.photos == "all") + (arm.model["patch_pooling"] == "none")),
    )


def _bag_file(out: Path, photos: str) -> DatasetConfig:
    return DatasetConfig(bag_file=BagFileConfig(path=out / f"{photos}.jsonl"))


def _caption_files(out: Path, arm: Arm) -> dict[str, Path]:
    """What an arm captions, each a bag file by name, and where the captions go; MIVPG has the swapped bags, too."""
    files: dict[str, Path] = {arm.photos: out / "captions" / f"{arm.name}.jsonl"}
    return files | ({"swapped": out / "captions" / f"{arm.name}_swapped.jsonl"} if arm.name == "mivpg" else {})


# ── Scores ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def score(
    captions: Mapping[str, Mapping[str, str]],
    swapped: Mapping[str, str],
    test: Sequence[Sample],
    train_samples: Sequence[Sample],
    truth: Mapping[str, CatalogueProduct],
    seed: int,
) -> dict[str, Any]:
    """Everything that `results.json` says of the captions.

    Args:
        captions: Arm to captions by id.
        swapped: MIVPG's captions of bags whose other photos are another product's.
        test: The products captioned.
        train_samples: Those trained on, which floors and chance draw from.
        truth: What is true of each product.
        seed: Of the random floor and the bootstrap.
    """
    guesses = most_common_values([truth[sample.id] for sample in train_samples])
    oracles = {
        "main_photo": {s.id: oracle_caption(truth[s.id], guesses, only_main=True, guess=False) for s in test},
        "main_photo_and_guess": {s.id: oracle_caption(truth[s.id], guesses, only_main=True, guess=True) for s in test},
        "all_photos": {s.id: oracle_caption(truth[s.id], guesses, only_main=False, guess=False) for s in test},
    }
    products = [truth[sample.id] for sample in test]
    with CaptionScorer({sample.id: sample.captions for sample in test}, METRICS) as scorer:
        each = {name: scorer.cider_of_each(those) for name, those in captions.items()}
        return {
            "arms": {name: scorer.score(those) for name, those in captions.items()},
            "floors": {
                name: scorer.score(those) for name, those in caption_floors(train_samples, test, seed=seed).items()
            },
            "oracles": {name: scorer.score(those) for name, those in oracles.items()},
            "differences": {
                f"{better} - {worse}": bootstrap_interval(
                    [each[better][s.id] - each[worse][s.id] for s in test], seed=seed
                )
                for better, worse in (
                    ("patch_concatenation", "single_image"),
                    ("mivpg_without_csa", "single_image"),
                    ("mivpg", "single_image"),
                    ("mivpg", "patch_concatenation"),
                    ("mivpg", "mivpg_without_csa"),
                )
            },
            "nothing_wrong": {
                name: round(number / len(products), 4) for name, number in _count_right(captions, products).items()
            },
            "traits": trait_accuracies(captions, products, guesses),
            "hidden": {name: hidden_accuracy(those, products, seed) for name, those in captions.items()}
            | {"chance": hidden_accuracy(oracles["main_photo_and_guess"], products, seed)},
            "swapped": {
                "metrics": scorer.score(swapped),
                "hidden": hidden_accuracy(swapped, products, seed),
                "hidden_of_the_other": hidden_accuracy(
                    swapped, products, seed, others={a: truth[b] for a, b in swap_partners(products).items()}
                ),
            },
        }


def _count_right(captions: Mapping[str, Mapping[str, str]], products: Sequence[CatalogueProduct]) -> dict[str, int]:
    """Of each arm, how many of the products' captions say nothing wrong."""
    return {name: sum(says_nothing_wrong(those[p.item_id], p) for p in products) for name, those in captions.items()}


# ── The report ──────────────────────────────────────────────────────────────────────────────────────────────────────


def choose_examples(
    out: Path,
    captions: Mapping[str, Mapping[str, str]],
    test: Sequence[Sample],
    truth: Mapping[str, CatalogueProduct],
    seed: int,
) -> list[BagExample]:
    """A test product of each family, drawn by the seed alone, with the weight that MIVPG gave each photo."""
    folder = out / "arms" / "mivpg" / BEST
    model = MivpgForConditionalGeneration.from_pretrained(folder)
    processor = MivpgProcessor.from_pretrained(folder)
    order = sorted(test, key=lambda sample: sample.id)
    random.Random(f"examples {seed}").shuffle(order)
    chosen = {truth[sample.id].family: sample for sample in reversed(order)}
    examples = []
    for family in sorted(chosen):
        sample = chosen[family]
        batch = BagCollator(processor, training=False)([BagDataset([sample])[0]])
        weights = image_weights(model, batch)[0]  # (N,)
        product = truth[sample.id]
        examples.append(
            BagExample(
                id=sample.id,
                title=family,
                images=[out / "catalogue" / "images" / "small" / f"{i[:2]}/{i}.jpg" for i in product.images],
                weights=weights.tolist(),
                references=sample.captions,
                captions={arm.title: captions[arm.name][sample.id] for arm in reversed(ARMS)},
            )
        )
    return examples


def _example_that_works(
    examples: Sequence[BagExample], captions: Mapping[str, str], truth: Mapping[str, CatalogueProduct]
) -> BagExample:
    """The first of which MIVPG says nothing wrong and something that the main photo does not show; else the first."""
    for example in examples:
        caption, product = captions[example.id], truth[example.id]
        if says_nothing_wrong(caption, product) and names_hidden(caption, product):
            return example
    return examples[0]


def write_demo_report(
    path: Path, results: Mapping[str, Any], examples: Sequence[BagExample], logs: Mapping[str, Path]
) -> None:
    """The page: scores with floors and oracles, what they mean in words, traits by where they are seen, products.

    Args:
        path: The HTML file.
        results: What `results.json` holds.
        examples: Products to show.
        logs: Title to `log.jsonl` of the arms that train.
    """
    titles = {arm.name: arm.title for arm in ARMS}
    names = {
        "constant": "Floor: one constant caption",
        "random_train": "Floor: a random training caption",
        "label": "Floor: the product type's most common caption",
        "main_photo": "Oracle: all that the main photo shows",
        "main_photo_and_guess": "Oracle: the same, guessing the rest",
        "all_photos": "Oracle: all that all photos show",
    }
    rows = [[titles[name], *_cells(scores)] for name, scores in results["arms"].items()]
    rows += [
        [names[name], *_cells(scores)] for group in ("floors", "oracles") for name, scores in results[group].items()
    ]
    hidden = {**{titles[name]: results["hidden"][name] for name in titles}, "Chance": results["hidden"]["chance"]}
    counts = results["num_products"]
    settings = results["config"] | {"prompt": PROMPT, "generation": dataclasses.asdict(GENERATION)}
    settings |= {"arms": {arm.name: {"photos": arm.photos, **arm.model, "trains": arm.trains} for arm in ARMS}}
    parts: list[Part] = [
        Text(title="What was found", paragraphs=findings(results)),
        Table(
            title="Scores",
            note=f"{counts['test']} test products. They are generated: these numbers say how the mechanism behaves, "
            "not how good the method is on real data. An oracle writes the usual wording and says all it sees, which "
            "is not always what scores best.",
            columns=["", *METRICS],
            rows=rows,
            emphasised=[titles["mivpg"]],
        ),
        BarChart(
            title="CIDEr",
            bars={"": {titles[name]: scores["CIDEr"] for name, scores in results["arms"].items()}},
            emphasised=titles["mivpg"],
        ),
        BarChart(
            title="What only other photos show",
            note="Of the traits that the main photo does not show and another does (a pattern on the back, the colour "
            "beneath or inside), the share that a caption names right, with 95 % intervals over products.",
            bars={"": {name: value["mean"] for name, value in hidden.items()}},
            intervals={"": {name: (value["low"], value["high"]) for name, value in hidden.items()}},
            emphasised=titles["mivpg"],
        ),
        _trait_table(results, titles),
        *training_curves(logs),
        Examples(
            title="Test products",
            note="One of each family, drawn by the seed. The bar under a photo is how much MIVPG's visual prompts "
            f"looked at it. MIVPG says nothing wrong of {results['examples']['nothing_wrong']['mivpg']} of these "
            f"{len(examples)} and of {results['nothing_wrong']['mivpg']:.0%} of all test products.",
            examples=examples,
            emphasised=titles["mivpg"],
        ),
        Text(
            title="What was run",
            paragraphs=[
                f"Seed {results['seed']}: {counts['train']} products to train on, {counts['val']} to select by, "
                f"{counts['test']} to test. Every arm starts from the same base model, which comes with the package "
                "and has seen single pictures only, and has the same steps, schedule and selection.",
                "Seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in results["seconds"].items()) + ".",
                f"Caption your own photos with it: mivpg caption --model {results['model']} PHOTO …",
            ],
        ),
        *what_was_run(settings),
    ]
    write_report(
        path,
        title="MIVPG in miniature",
        lead="Products with several photos, captioned by a frozen language model that reads 16 visual prompts whatever "
        "the number of photos. The five arms are those of the paper's Table 2 (arXiv 2406.02987); the catalogue is "
        "generated.",
        parts=parts,
    )


def _cells(scores: Mapping[str, float]) -> list[str]:
    return [f"{scores[metric]:.3f}" for metric in METRICS]


def _trait_table(results: Mapping[str, Any], titles: Mapping[str, str]) -> Table:
    rows = []
    for trait, places in results["traits"].items():
        for where, row in places.items():
            name = f"{trait}, {'main photo' if where == 'main' else 'another photo'}"
            cells = [f"{row[arm]['right']:.2f}" for arm in titles]
            rows.append([name, str(row["num_products"]), *cells, f"{row['chance']:.2f}", f"{row['oracle']:.2f}"])
    return Table(
        title="Traits by where they are seen",
        note="Share of captions that name the trait right. Leaving it out counts as wrong, and people leave out much "
        "of what the main photo shows; chance and the oracle that sees the main photo always name it.",
        columns=["Trait and where", "Products", *titles.values(), "Chance", "Oracle, main photo"],
        rows=rows,
    )


def findings(results: Mapping[str, Any]) -> list[str]:
    """What the numbers say, in plain words."""
    lines = []
    questions = {
        "patch_concatenation - single_image": "Concatenating the patches of several photos against one photo",
        "mivpg - single_image": "MIVPG with several photos against one photo",
        "mivpg - patch_concatenation": "MIVPG against concatenation",
        "mivpg - mivpg_without_csa": "MIVPG with CSA against without",
    }
    for key, question in questions.items():
        difference = results["differences"][key]
        verdict = "better" if difference["low"] > 0 else "worse" if difference["high"] < 0 else "no clear difference"
        lines.append(
            f"{question}: {verdict}; CIDEr {difference['mean']:+.2f} (95 % interval {difference['low']:+.2f} to "
            f"{difference['high']:+.2f})."
        )
    hidden, chance = results["hidden"]["mivpg"], results["hidden"]["chance"]
    swapped = results["swapped"]
    lines.append(
        f"Of what only other photos show, MIVPG names {hidden['mean']:.0%} right ({hidden['low']:.0%} to "
        f"{hidden['high']:.0%}; chance {chance['mean']:.0%}). With those photos swapped for another product's it names "
        f"{swapped['hidden']['mean']:.0%} of its own product's traits and "
        f"{swapped['hidden_of_the_other']['mean']:.0%} of the other's, and CIDEr falls from "
        f"{results['arms']['mivpg']['CIDEr']:.2f} to {swapped['metrics']['CIDEr']:.2f}."
    )
    return lines

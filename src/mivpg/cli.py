"""The command line. Results meant for machines are files; what is meant for people goes to the terminal.

What a user's input can cause ends in one line on standard error and exit code 1, a wrong command line in 2. A run over
many bags that has passed some over, because they could not be read, ends in 3.
"""

import difflib
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CoercionError, CycloptsError, MissingArgumentError, Parameter, UnknownOptionError
from cyclopts.config import Yaml

from mivpg.errors import MivpgError
from mivpg.files import is_first_process

if TYPE_CHECKING:  # torch and transformers take seconds to import; a command imports what it needs
    from mivpg.bags import Sample
    from mivpg.captioning import GenerationOptions
    from mivpg.datasets import DatasetConfig
    from mivpg.modeling_mivpg import MivpgForConditionalGeneration
    from mivpg.processing_mivpg import MivpgProcessor
    from mivpg.slides import TileOptions

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

# What several commands take, with what their help says of it.
DtypeOfFrozen = Annotated[Dtype, Parameter(help="Of the frozen models; auto is as they are stored.")]
ModelName = Annotated[
    str | None,
    Parameter(
        help="A run's `best` folder, a whole model, a BLIP-2 folder, or a Hub id; by default the miniature that comes "
        "with the package."
    ),
]
Prompt = Annotated[
    str | None,
    Parameter(
        help="Text that the model reads before it writes; the caption does not contain it. By default the prompt that "
        "the model was trained with, else none."
    ),
]
NumBeams = Annotated[int, Parameter(help="Captions kept at each token; 1 is the fastest.")]
MaxNewTokens = Annotated[int, Parameter(help="Longest caption, in tokens.")]
Root = Annotated[
    Path | None,
    Parameter(
        help="The folder in which all that the bag file names has to lie, `/` = anywhere; by default that of the file."
    ),
]

SOME_UNREADABLE = 3
"""The exit code of a run that is done, but for bags that could not be read."""


def versions() -> str:
    """The package, what it stands on, the device and Java."""
    from mivpg.evaluation import find_java
    from mivpg.versions import installed_versions

    found = installed_versions()
    return "\n".join(
        [
            f"mivpg {found['mivpg']}",
            f"Python {found['Python']}, torch {found['torch']}, transformers {found['transformers']}",
            f"device: {found['device']}",
            f"Java: {find_java()} ({found['Java']})",
        ]
    )


app = App(
    name="mivpg",
    version=versions,
    version_format="plaintext",
    help="Captions from bags of images: a product's photos, a slide's patches, stored features.",
    suppress_keyboard_interrupt=False,
)


def main(tokens: list[str] | None = None) -> None:
    """Runs the command line and exits."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("mivpg").setLevel(logging.INFO if is_first_process() else logging.ERROR)
    try:
        app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        complain(
            f"{' '.join(str(error).split())} ('mivpg --help' lists commands, 'mivpg COMMAND --help' their options)"
        )
        sys.exit(2)
    except MivpgError as error:
        complain(str(error))
        sys.exit(1)
    except OSError as error:
        complain(f"{error.filename or 'system'}: {error.strerror or error}")
        sys.exit(1)
    except KeyboardInterrupt:
        complain("interrupted")
        sys.exit(130)


def complain(message: str) -> None:
    """One line on standard error."""
    print(f"mivpg: {' '.join(message.split())}", file=sys.stderr)


# `mivpg train` leaves --help to the fields of its config, so it has no help of its own.
train_app = App(name="train", help="Fine-tune on bags with captions, as a YAML file says.", help_flags=[])
app.command(train_app)


@train_app.default
def train(*arguments: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]) -> None:
    """Fine-tune on bags with captions, as a YAML file says.

    mivpg train CONFIG.yaml [--resume] [--FIELD VALUE …]; options here override the file.
    """
    from mivpg.training import TrainConfig
    from mivpg.training import train as run

    def start(config: Annotated[TrainConfig, Parameter(name="*")], *, resume: bool = False) -> None:
        """Fine-tune on bags with captions, as a YAML file says; options here override the file.

        Args:
            resume: Go on from the newest checkpoint in `output_dir`, with the same file, data and bags a step
                (batch_size x gradient_accumulation_steps x processes).
        """
        quiet_transformers()
        best = run(config, resume=resume)
        if is_first_process():
            print(best)

    parse("mivpg train CONFIG.yaml", start, arguments)


@app.command
def caption(
    *images: Path,
    model: ModelName = None,
    bags: Path | None = None,
    root: Root = None,
    out: Path | None = None,
    prompt: Prompt = None,
    strict: bool = False,
    batch_size: int = 8,
    num_beams: NumBeams = 5,
    max_new_tokens: MaxNewTokens = 64,
    dtype: DtypeOfFrozen = "auto",
) -> None:
    """Caption one bag of images, or a file of bags.

    Args:
        images: The images of one bag; its caption is printed.
        bags: Instead of images, a bag file (JSON lines or CSV).
        out: Where the captions of a bag file go, JSON lines in the order of its bags. An interrupted run goes on there.
        strict: Stop at a bag that cannot be read, instead of recording it and going on.
        batch_size: Bags captioned at once.
    """
    from mivpg.bags import Bag
    from mivpg.captioning import GenerationOptions, caption_bags, caption_file
    from mivpg.datasets.bag_file import load_bag_file
    from mivpg.images import open_image

    if bool(images) == (bags is not None):
        raise MivpgError("caption: give the images of one bag, or --bags FILE --out FILE.")
    if (bags is None) != (out is None):
        raise MivpgError("caption: --bags FILE and --out FILE go together.")
    if root is not None and bags is None:
        raise MivpgError("caption: --root is about a bag file; give --bags FILE.")
    generation = GenerationOptions(num_beams=num_beams, max_new_tokens=max_new_tokens)
    if bags is None:
        pictures = [open_image(path) for path in images]  # before the model, which takes longer to load
        loaded, processor = load(model, dtype)
        bag = Bag(
            id="command line",
            images=pictures,
            image_embeds=None,
            image_coords=None,
            prompt=processor.prompt if prompt is None else prompt,
            caption=None,
        )
        print(caption_bags(loaded, processor, [bag], **generation.as_kwargs())[0])
        return
    assert out is not None
    refuse_several_processes()
    samples = load_bag_file(bags, root=root)
    refuse_existing(out)
    loaded, processor = load(model, dtype)
    counts = caption_file(
        loaded,
        processor,
        samples,
        out,
        generation=generation,
        prompt=processor.prompt if prompt is None else prompt,
        batch_size=batch_size,
        strict=strict,
    )
    print(f"{out}: {counts.num_bags} bags, {counts.num_failed} of them could not be read.")
    if counts.num_failed:
        sys.exit(SOME_UNREADABLE)


@app.command
def show(
    *images: Path,
    model: ModelName = None,
    bags: Path | None = None,
    root: Root = None,
    bag: str | None = None,
    slide: Annotated[list[Path] | None, Parameter(negative="")] = None,
    out: Path,
    check: bool = False,
    split: Literal["train", "val", "test", "all"] = "all",
    prompt: Prompt = None,
    batch_size: int = 8,
    num_beams: NumBeams = 5,
    max_new_tokens: MaxNewTokens = 64,
    dtype: DtypeOfFrozen = "auto",
) -> None:
    """Caption one bag and show what was looked at: a page, pictures, arrays; and whether it mattered.

    Args:
        images: The images of one bag.
        bags: Instead of images, a bag file (JSON lines or CSV); a bag may hold features with coordinates.
        bag: The id of the bag in it, where it has several.
        slide: The slide that the bag's coordinates lie on; of a case, each of its slides, given one by one. Without a
            bag they are cut into tiles, as `mivpg extract` does by default, and all tiles are the bag.
        out: A new or empty folder; the page is attention.html in it.
        check: Instead, take images out of every bag of the bag file and see whether the most attended are missed; the
            numbers go to check.json.
        split: Of the bag file, with --check.
        batch_size: Bags at once, with --check.
    """
    from mivpg.bags import Bag, BagDataset, select
    from mivpg.captioning import GenerationOptions
    from mivpg.datasets.bag_file import load_bag_file
    from mivpg.files import refuse_used
    from mivpg.images import open_image
    from mivpg.show import cut_slides, look_at_bag, summary, tiles_on_slides, write_shown
    from mivpg.slides import TileOptions, open_slide

    slides = slide or []
    if bool(images) + (bags is not None) + (bool(slides) and bags is None) != 1:
        raise MivpgError("show: give the images of one bag, or --bags FILE, or --slide FILE.")
    of_bag_file = {"--check": check, "--bag": bag is not None, "--root": root is not None}
    if bags is None and any(of_bag_file.values()):
        raise MivpgError(f"show: {next(filter(of_bag_file.get, of_bag_file))} is about a bag file; give --bags FILE.")
    if check and (slides or bag is not None):
        raise MivpgError(f"show: --check is about every bag; leave {'--slide' if slides else '--bag'} out.")
    resolved = [path.resolve() for path in slides]
    for number, path in enumerate(slides):
        if resolved[number] in resolved[:number]:
            raise MivpgError(f"show: --slide {path} is given twice; give each slide once.")
    refuse_used(out)
    generation = GenerationOptions(num_beams=num_beams, max_new_tokens=max_new_tokens)
    samples = [] if bags is None else load_bag_file(bags, root=root)
    if check:
        if not (in_split := select(samples, split)):
            raise MivpgError(f"{bags}: none of its {len(samples)} bags is in split {split!r}.")
        run_check(model, in_split, out / "check.json", prompt, batch_size, generation, dtype)
        return
    chosen = [sample for sample in samples if bag in (None, sample.id)]
    if bags is not None and len(chosen) != 1:
        known = ", ".join(repr(sample.id) for sample in samples[:3])
        found = f"no bag {bag!r}" if not chosen else f"{len(samples)} bags, so --bag has to name one"
        raise MivpgError(f"{bags} has {found}; ids are {known}{', …' if len(samples) > 3 else ''}.")
    # What is wrong with files shows before the model is loaded, which takes longer.
    pictures = [open_image(path) for path in images]
    for path in slides:
        open_slide(path)
    names, tiles = [path.name for path in images or (chosen[0].images if chosen else ())], None
    if chosen:
        opened = BagDataset(chosen)[0]
        tiles = tiles_on_slides(chosen[0], opened, slides) if slides else None
    loaded, processor = load(model, dtype)
    prompt = processor.prompt if prompt is None else prompt
    if images:
        title = f"{len(images)} image{'s' if len(images) > 1 else ''}"
        opened = Bag(id=title, images=pictures, image_embeds=None, image_coords=None, prompt=prompt, caption=None)
    elif not chosen:
        opened, tiles = cut_slides(loaded, processor, slides, TileOptions(), prompt=prompt)
    elif chosen[0].prompt is None:
        opened.prompt = prompt
    shown = look_at_bag(loaded, processor, opened, generation=generation, names=names, tiles=tiles)
    write_shown(shown, out, model=model or "the miniature that comes with the package")
    print(f"{summary(shown)}\n{out / 'attention.html'}")


def run_check(
    model: str | None,
    samples: "list[Sample]",
    out: Path,
    prompt: str | None,
    batch_size: int,
    generation: "GenerationOptions",
    dtype: Dtype,
) -> None:
    """Takes images out of many bags, writes what it does to their captions and prints the means."""
    from mivpg.files import write_whole
    from mivpg.likelihood import check_table, check_weights

    loaded, processor = load(model, dtype)
    checked = check_weights(
        loaded,
        processor,
        samples,
        generation=generation,
        prompt=processor.prompt if prompt is None else prompt,
        batch_size=batch_size,
    )
    write_whole(out, json.dumps({"model": model} | checked, indent=2) + "\n")
    num_removed = sum(bag["num_removed"] for bag in checked["bags"])
    print(f"{len(checked['bags'])} bags, {num_removed} images removed; change of the captions' log-likelihood:")
    for what, change in check_table(checked):
        print(f"  {what:<28}{change}")
    print(f"{checked['finding']}\n{out}")


extract_app = App(name="extract", help="Run the frozen vision model once on every image of a data set.", help_flags=[])
app.command(extract_app)


@extract_app.default
def extract(*arguments: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]) -> None:
    """Run the frozen vision model once on every image of a data set.

    mivpg extract CONFIG.yaml --model DIR --out DIR [--FIELD VALUE …]; of the file `dataset` is read, and options here
    override it.
    """
    from mivpg.datasets import DatasetConfig
    from mivpg.slides import TileOptions

    def start(
        *,
        model: Annotated[str, Parameter(name="--model")],
        dataset: DatasetConfig,
        out: Path,
        tiling: TileOptions | None = None,
        tokens: Literal["all", "cls"] = "all",
        store_dtype: Literal["float32", "bfloat16", "float16"] = "float16",
        batch_size: int = 64,
        dtype: Dtype = "auto",
        strict: bool = False,
    ) -> None:
        """Run the frozen vision model once on every image of a data set.

        Of the YAML file `dataset` is read; options here override it.

        Under `torchrun --nproc-per-node N --no-python mivpg extract …` each process does its share. An interrupted
        run goes on when it is started again.

        Args:
            model: Whose vision model sees: a run's `best` folder, a whole model, a BLIP-2 folder, or a Hub id.
            dataset: As in the YAML file of the training run, which may be given first.
            out: The store becomes a folder in it, named after what made it, with a bag file for `mivpg train`.
            tiling: How slides are cut, where the data set holds slides.
            tokens: All that the vision model gives of an image, or its first token alone.
            store_dtype: Of the stored features; float32 keeps all bits, the others half of them.
            batch_size: Images that the vision model sees at once.
            dtype: Of the vision model; auto is as it is stored.
            strict: Stop at a bag that cannot be read, instead of recording it (errors.jsonl in the store) and going on.
        """
        dataset.features = None  # the file may name the store that is made here
        tiling = tiling or TileOptions()
        run_extraction(model, dataset.load(), out, tiling, tokens, store_dtype, batch_size, dtype, strict)

    parse("mivpg extract CONFIG.yaml", start, arguments, only=("dataset",))


def run_extraction(
    model: str,
    samples: "list[Sample]",
    out: Path,
    tiling: "TileOptions",
    tokens: Literal["all", "cls"],
    store_dtype: str,
    batch_size: int,
    dtype: Dtype,
    strict: bool,
) -> None:
    """Loads the model, fills the store and writes its bag file."""
    import torch

    from mivpg.datasets.bag_file import write_bag_file
    from mivpg.feature_files import ERRORS
    from mivpg.features import extract_features, store_name

    loaded, processor = load(model, dtype)
    tiles = tiling if any(sample.slides for sample in samples) else None
    folder = out / store_name(Path(model).name, processor, tokens, store_dtype, tiles)
    extracted = extract_features(
        loaded,
        processor,
        samples,
        folder,
        tokens=tokens,
        dtype=getattr(torch, store_dtype),
        batch_size=batch_size,
        tiling=tiling,
        strict=strict,
    )
    if is_first_process():
        if not extracted:  # the bag file of an earlier run stays
            raise MivpgError(f"none of {len(samples)} bags could be read; {folder / ERRORS} says why.")
        write_bag_file(folder / "bags.jsonl", extracted)
        print(folder / "bags.jsonl")
        if num_failed := len(samples) - len(extracted):
            complain(f"{num_failed} of {len(samples)} bags could not be read; {folder / ERRORS} says why.")
            sys.exit(SOME_UNREADABLE)


evaluate_app = App(
    name="evaluate", help="Caption a split and score it, beside floors that cost nothing.", help_flags=[]
)
app.command(evaluate_app)


@evaluate_app.default
def evaluate(*arguments: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]) -> None:
    """Caption a split and score it, beside floors that cost nothing.

    mivpg evaluate CONFIG.yaml --model DIR --out METRICS.json [--FIELD VALUE …]; of the file `dataset` and `validation`
    are read, and options here override them.
    """
    from mivpg.captioning import GenerationOptions
    from mivpg.datasets import DatasetConfig

    def start(
        *,
        model: Annotated[str, Parameter(name="--model")],
        dataset: DatasetConfig,
        out: Path,
        split: Literal["train", "val", "test", "all"] = "test",
        prompt: Prompt = None,
        batch_size: int = 8,
        validation: Annotated[GenerationOptions | None, Parameter(name=("*", "--validation"))] = None,
        dtype: DtypeOfFrozen = "auto",
        seed: int = 0,
        strict: bool = False,
    ) -> None:
        """Caption a split and score it, beside floors that cost nothing.

        Of the YAML file `dataset` and `validation` (how captions are written) are read; options here override them.

        Args:
            model: A run's `best` folder, a whole model, a BLIP-2 folder, or a Hub id.
            dataset: As in the YAML file of the training run, which may be given first.
            out: METRICS.json; the captions go to `<out>` with `.captions.jsonl` for its ending, a page for people to
                that with `.html`. Where an evaluation was interrupted, the same command goes on with it.
            split: Which bags.
            batch_size: Bags captioned at once.
            validation: How captions are written, as in the YAML file of the training run.
            seed: Of the random floor.
            strict: Stop at a bag that cannot be read, instead of leaving it out.
        """
        refuse_several_processes()
        refuse_existing(out)
        generation = validation or GenerationOptions()
        run_evaluation(model, dataset, out, split, prompt, batch_size, generation, dtype, seed, strict)

    parse("mivpg evaluate CONFIG.yaml", start, arguments, only=("dataset", "validation"))


def run_evaluation(
    model: str,
    dataset: "DatasetConfig",
    out: Path,
    split: str,
    prompt: str | None,
    batch_size: int,
    generation: "GenerationOptions",
    dtype: Dtype,
    seed: int,
    strict: bool,
) -> None:
    """Captions, scores, writes and prints."""
    from dataclasses import asdict

    from mivpg.bags import select
    from mivpg.captioning import caption_file, notes_of, read_captions
    from mivpg.evaluation import CaptionScorer, evaluate_captions, format_table
    from mivpg.evaluation_report import write_evaluation_report
    from mivpg.files import only_writer, write_whole

    samples = dataset.load()
    if not (in_split := select(samples, split)):
        if all(sample.split is None for sample in samples):
            remedy = "it has no splits, so every bag trains; give bag_file.split_seed or a split column, or --split all"
        else:
            remedy = ", ".join(f"{len(select(samples, name))} {name}" for name in ("train", "val", "test"))
        raise MivpgError(f"dataset: none of its {len(samples)} bags is in split {split!r} ({remedy}).")
    if not (chosen := [sample for sample in in_split if sample.captions]):
        raise MivpgError(
            f"dataset: none of the {len(in_split)} bags of split {split!r} has a caption to score against."
        )
    captions, page = out.with_suffix(".captions.jsonl"), out.with_suffix(".html")
    if page == out:
        raise MivpgError(f"--out is {out}, expected a name for JSON; the page gets the ending .html by itself.")
    if not (notes := notes_of(captions)).exists():  # else an evaluation that was interrupted goes on
        refuse_existing(captions)
        refuse_existing(page)
    # What is wrong with the references or with Java shows before hours of captioning, not after.
    with CaptionScorer({sample.id: sample.captions for sample in chosen}, ("CIDEr",)):
        pass
    loaded, processor = load(model, dtype)
    prompt = processor.prompt if prompt is None else prompt
    with only_writer(out):
        refuse_existing(out)  # another run may have written it by now
        counts = caption_file(
            loaded,
            processor,
            chosen,
            captions,
            generation=generation,
            prompt=prompt,
            batch_size=batch_size,
            strict=strict,
            keep_notes=True,
        )
        predictions = read_captions(captions)
        scored = [sample for sample in chosen if sample.id in predictions]
        if not scored:
            raise MivpgError(
                f"{captions}: none of the {len(chosen)} bags could be read; delete that file once they can."
            )
        results = evaluate_captions(predictions, scored, select(samples, "train"), seed=seed)
        results |= {"model": model, "split": split, "num_unreadable_bags": counts.num_failed}
        given = asdict(dataset, dict_factory=lambda items: {name: value for name, value in items if value is not None})
        settings = {"model": model, "dataset": given, "split": split, "prompt": prompt, "dtype": dtype}
        settings |= {"validation": asdict(generation), "batch_size": batch_size, "seed": seed}
        write_evaluation_report(page, results, predictions, scored, settings=settings)
        write_whole(out, json.dumps(results, indent=2) + "\n")
        notes.unlink()
    print(format_table(results))
    if counts.num_failed:
        print(f"{counts.num_failed} more bags could not be read; {captions} says why.")
        sys.exit(SOME_UNREADABLE)


classify_app = App(name="classify", help="Classify bags with one label each, in a cross-validation.", help_flags=[])
app.command(classify_app)


@classify_app.default
def classify(*arguments: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]) -> None:
    """Classify bags with one label each, in a cross-validation.

    mivpg classify [CONFIG.yaml] --bags SET.npz --out DIR [--FIELD VALUE …]; options here override the file.
    """
    from mivpg.classification import ClassifierConfig, cross_validate, load_labelled_bags

    def start(
        config: Annotated[ClassifierConfig | None, Parameter(name="*")] = None,
        *,
        bags: Path,
        root: Root = None,
        out: Path,
    ) -> None:
        """Classify bags with one label each, in a cross-validation; a model is kept for each fold.

        Args:
            bags: An .npz of a whole set (arrays x, bag, y, and fold where the folds are given), or a bag file with a
                label and a features file a bag.
            out: A new or empty folder, or that of an interrupted run, which then goes on.
        """
        quiet_transformers()
        results = cross_validate(load_labelled_bags(bags, root=root), config or ClassifierConfig(), out)
        for name, mean in results["mean"].items():
            print(f"{name:<14}{mean:.3f} ± {results['standard_deviation'][name]:.3f}")
        print(out / "metrics.json")

    parse("mivpg classify [CONFIG.yaml] --bags SET.npz --out DIR", start, arguments)


miniature_app = App(name="miniature", help="Generate a stand-in for one of the paper's data sets, in its own files.")
app.command(miniature_app)


@miniature_app.command(name="abo")
def miniature_abo(*, out: Path, num_products: int = 2000, seed: int = 0) -> None:
    """Draw a catalogue of furniture and small goods in the files of Amazon Berkeley Objects.

    Args:
        out: A new or empty folder, or one in which this was interrupted.
        num_products: Each has 2 to 8 photos and 1 to 5 reference captions.
        seed: Another seed, other products.
    """
    from mivpg.miniature.catalogue import make_catalogue

    products = make_catalogue(out, num_products=num_products, seed=seed)
    num_photos = sum(len(product.images) for product in products)
    print(f"{out}: {len(products)} generated products with {num_photos} photos.")


@miniature_app.command(name="coco")
def miniature_coco(*, out: Path, num_pictures: int = 1000, seed: int = 0) -> None:
    """Draw scenes of two or three things in the files of MSCOCO with Karpathy's split.

    Args:
        out: A new or empty folder, or one in which this was interrupted.
        num_pictures: Each has five captions; a tenth is for validation, and a tenth for testing.
        seed: Another seed, other scenes.
    """
    from mivpg.miniature.coco import make_coco

    print(f"{make_coco(out, num_pictures=num_pictures, seed=seed)}: {num_pictures} generated scenes.")


@miniature_app.command(name="patch-gastric")
def miniature_patch_gastric(*, out: Path, num_slides: int = 300, mean_patches: int = 30, seed: int = 0) -> None:
    """Draw slides of stained tissue in the files of PatchGastricADC22.

    Args:
        out: A new or empty folder, or one in which this was interrupted.
        num_slides: Each has a sentence or two of a report.
        mean_patches: Of a slide, which has 5 to 300; most have fewer than the mean.
        seed: Another seed, other slides.
    """
    from mivpg.miniature.patch_gastric import make_patch_gastric

    make_patch_gastric(out, num_slides=num_slides, mean_patches=mean_patches, seed=seed)
    print(f"{out}: {num_slides} generated slides.")


@app.command(name="miniature-base")
def miniature_base(*, out: Path, seed: int = 0) -> None:
    """Train the base model that comes with the package anew, on generated single pictures; about forty minutes.

    Args:
        out: A new or empty folder, or one in which this was interrupted.
        seed: The one in the package has seed 0.
    """
    from mivpg.miniature.base import Recipe, make_base

    quiet_transformers()
    print(make_base(out, Recipe(seed=seed)))


@app.command
def reproduce(
    *experiments: str,
    out: Path,
    scale: Literal["miniature", "paper"] = "miniature",
    seeds: int = 3,
    data_root: Path | None = None,
) -> None:
    """Run the paper's tables and figures, or all of them; an interrupted run goes on when it is started again.

    Args:
        experiments: table1 to table4, figure4, figure5, figure6, figure8, claims, or all of them; aggregators, every
            aggregator on every data set; readings, what the paper leaves open, both ways; or, by itself, digits: bags
            of real handwritten digits classified by each, half an hour.
        out: A new or empty folder, or that of an interrupted run.
        scale: `miniature` draws its own data, about 100 minutes for all; `paper` has the paper's models and data.
        seeds: How many; each draws split and training order.
        data_root: For the paper's scale, the folder with `abo`, `patch_gastric` and `coco`, and `backbones` with the
            weights of the CNNs of Table 1.
    """
    from mivpg.experiments.pages import as_markdown
    from mivpg.experiments.reproduce import reproduce as run
    from mivpg.experiments.results import has_failed

    if not experiments:
        raise MivpgError(
            "name what to reproduce: table1, table2, table3, table4, figure4, figure5, figure6, figure8, claims, all, "
            "aggregators, readings, or digits."
        )
    if seeds < 1:
        raise MivpgError(f"--seeds is {seeds}, expected at least 1.")
    quiet_transformers()
    if "digits" in experiments:
        from mivpg.experiments.digits import DigitsConfig, run_digits

        if len(experiments) > 1:
            raise MivpgError("digits runs by itself, in a folder of its own.")
        run_digits(out, DigitsConfig(num_seeds=seeds))
        print((out / "digits.md").read_text(encoding="utf-8"))
        print(out / "report.html")
        return
    found = run(experiments, scale=scale, out=out, num_seeds=seeds, data_root=data_root)
    for results in found.values():
        print(as_markdown(results))
    print(out / "report.html")
    if failed := [name for name, results in found.items() if has_failed(results)]:
        raise MivpgError(
            f"not all of {', '.join(failed)} could be run; the tables say what failed, and where the log is."
        )


@app.command(name="app")
def serve_page(
    *,
    model: ModelName = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    max_files: int = 32,
    max_file_mb: int = 50,
    dtype: DtypeOfFrozen = "auto",
) -> None:
    """Serve a page to try a model in: drop photos, read the caption, see what it was read from.

    Args:
        host: The address to listen on; the default is seen from this machine alone.
        port: By default the first free one from 7860.
        max_files: Photos that are read at once.
        max_file_mb: Largest file, in megabytes; slides need more.
    """
    from mivpg.app import check_installed, serve

    check_installed()
    loaded, processor = load(model, dtype)
    name = model or "the miniature that comes with the package; it knows what its generators draw, and no more"
    serve(loaded, processor, name=name, host=host, port=port, max_files=max_files, max_file_mb=max_file_mb)


@app.command
def demo(*, out: Path, seed: int = 0, num_products: int = 2000, num_train_epochs: int = 4) -> None:
    """See the whole idea work: a generated catalogue, five ways to caption it, a report; in minutes, without a GPU.

    Args:
        out: A new or empty folder, or that of an interrupted demo, which then goes on.
        seed: Draws products, split and training order.
        num_products: Fewer are faster and say less.
        num_train_epochs: Passes over all pairs of a training product and one of its references.
    """
    from mivpg.demo import DemoConfig, run_demo

    quiet_transformers()
    config = DemoConfig(seed=seed, num_products=num_products, num_train_epochs=num_train_epochs)
    results = run_demo(out, config)
    print(f"{out / 'report.html'}: open it in a browser. {out / 'results.json'}: the same for machines.")
    print(f"Caption your own photos with what was trained: mivpg caption --model {results['model']} PHOTO …")


# ── Small pieces ────────────────────────────────────────────────────────────────────────────────────────────────────


def parse(usage: str, start: Any, arguments: tuple[str, ...], only: tuple[str, ...] = ()) -> None:
    """Calls `start` with the values of a YAML file and, before them, those of the command line.

    Args:
        usage: For the help.
        start: A function whose parameters are the fields.
        arguments: The command line: a YAML file, unless all stands there, and fields.
        only: The fields to take from the file, which may have others; by default it may hold nothing unknown.

    Raises:
        MivpgError: The file cannot be read, or a value is one that no run can have; a file that has it is named.
        CycloptsError: A field is unknown, missing or of another type.
    """
    from mivpg.files import read_yaml

    if not arguments:
        raise MivpgError(f"name what to do: {usage} [--FIELD VALUE …].")
    sources = []
    file, in_file, overrides = None, set(), list(arguments)
    if overrides and not overrides[0].startswith("-"):
        file = Path(overrides.pop(0))
        values = read_yaml(file)
        if not isinstance(values, dict):
            found = "nothing" if values is None else type(values).__name__
            raise MivpgError(f"{file}: found {found}, expected fields and their values in YAML ({usage}).")
        sources.append(FileFields(file, values, only))
        in_file = all_names(sources[0].values)
    inner = App(name=usage, config=sources, default_command=start, version_flags=[], suppress_keyboard_interrupt=False)
    try:
        command, bound, _ = inner.parse_args(overrides, exit_on_error=False, print_error=False)
    except UnknownOptionError as error:
        known = [field(argument.name) for argument in inner.assemble_argument_collection()]
        wanted = field(error.token.keyword or "")
        nearest = difflib.get_close_matches(wanted, known, n=1, cutoff=0)[0]
        where = file if file is not None and str(file) in error.token.source else "command line"
        named = " ".join(wanted.split())
        raise MivpgError(f"{where}: unknown field {named}; the nearest known is {nearest}.") from None
    except MissingArgumentError as error:
        assert error.argument is not None
        name = field(error.argument.name)
        if file is None or error.keyword is not None or (only and name.split(".")[0] not in only):
            raise
        raise MivpgError(f"{file}: {name} is missing; add it, or {error.argument.name} on the command line.") from None
    except CoercionError as error:
        of_command_line = error.token is not None and error.token.source != str(file)
        if file is None or of_command_line or str(file) in str(error):
            raise
        # a list too short or too long, or a list where fields were expected, of which cyclopts names no argument
        where = "" if error.argument is None else f" {field(error.argument.name)}:"
        raise MivpgError(f"{file}:{where} {error}") from None
    except MivpgError as error:  # of a config's own checks, which know the field and not where it stood
        given = {last_name(word.partition("=")[0]) for word in overrides if word.startswith("--")}
        if last_name(str(error).partition(" ")[0]) in in_file - given:
            raise MivpgError(f"{file}: {error}") from None
        raise
    command(*bound.args, **bound.kwargs)


def all_names(values: Any) -> set[str]:
    """Of fields, and of the fields within them."""
    if not isinstance(values, dict):
        return set()
    return {str(name) for name in values}.union(*map(all_names, values.values()))


def last_name(option: str) -> str:
    """num_beams of --validation.num-beams."""
    return field(option).rpartition(".")[2]


def field(name: str) -> str:
    """A field's name, which cyclopts writes as [dataset][abo][root] or --dataset.abo.root, and - for _."""
    return name.strip("[]-").replace("][", ".").replace("-", "_")


class FileFields(Yaml):
    """A YAML file that has been read, as a source of values for cyclopts, which names it in its errors."""

    def __init__(self, file: Path, values: dict[str, Any], only: tuple[str, ...]):
        super().__init__(file, must_exist=True)
        self.values = {name: values[name] for name in values if not only or name in only}

    def _load_config(self, path: Path) -> dict[str, Any]:
        return self.values


def refuse_existing(out: Path) -> None:
    """Raises before the work is done, not after."""
    if out.exists():
        raise MivpgError(f"{out} exists already; delete it or choose another name.")


def refuse_several_processes() -> None:
    """Raises under `torchrun`, where every process would write the same file."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise MivpgError(
            "caption and evaluate take one process; to share the work, split the bag file and start one process a part."
        )


def embedded_model() -> str:
    """The folder of the model that comes with the package; says on standard error what it is."""
    from mivpg.miniature import BASE_MODEL

    complain(
        "no --model given, so this is the miniature that comes with the package; it was trained on generated pictures "
        "of furniture, small goods, scenes and patches of slides and knows nothing else."
    )
    return str(BASE_MODEL)


def load(model: str | None, dtype: Dtype) -> "tuple[MivpgForConditionalGeneration, MivpgProcessor]":
    """A model on the machine's device, and its processor; without a name, the one that comes with the package."""
    import torch

    from mivpg import MivpgForConditionalGeneration, MivpgProcessor

    quiet_transformers()
    model = embedded_model() if model is None else model
    loaded = MivpgForConditionalGeneration.from_pretrained(model, dtype=dtype)
    processor = MivpgProcessor.from_pretrained(model)
    processor.check_model(loaded.config)
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    return loaded.to(device), processor


def quiet_transformers() -> None:
    """Its warnings are for its developers, its bars for its downloads; ours say what a user needs."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


if __name__ == "__main__":
    main()

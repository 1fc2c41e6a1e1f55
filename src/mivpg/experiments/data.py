"""The data of the experiments at two scales: the generated miniatures, and the real data sets with the paper's models.

out/data/products|slides|scenes/   the miniatures, in the real data sets' files; at the paper's scale, the data root
out/other_base/                    the miniature base with the other kind of language model, where one is asked for
out/features/…                     what the frozen vision model says of each image, computed once for all runs
out/captions/products/seed-0/…     what the runs of each arm write
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from tqdm import tqdm

from mivpg.bags import one_pair_a_reference, select
from mivpg.baselines.backbones import Backbone, load_backbone, slide_features
from mivpg.baselines.pretraining import RECORD_FILE, PretrainingConfig, pretrain_backbone
from mivpg.baselines.training import stored_features
from mivpg.captioning import GenerationOptions
from mivpg.checkpoints import describe_base, locate_base
from mivpg.datasets import DatasetConfig
from mivpg.datasets.abo import AboConfig
from mivpg.datasets.coco import CocoConfig
from mivpg.datasets.patch_gastric import PatchGastricConfig
from mivpg.errors import MivpgError
from mivpg.feature_files import read_features
from mivpg.features import extract_features, weights_digest
from mivpg.files import read_json, write_whole
from mivpg.miniature import BASE_MODEL
from mivpg.miniature.base import RECIPE_FILE
from mivpg.miniature.catalogue import make_catalogue
from mivpg.miniature.coco import make_coco
from mivpg.miniature.encoder_decoder import make_encoder_decoder_base
from mivpg.miniature.patch_gastric import make_patch_gastric
from mivpg.modeling_mivpg import MivpgForConditionalGeneration
from mivpg.processing_mivpg import MivpgProcessor

PROMPT = "a photo of"
"""Before every caption, as in BLIP-2."""

BackboneName = Literal["densenet121", "efficientnet_b3"]
DataName = Literal["products", "slides", "scenes"]
View = Literal["all", "main", "pixels"]
"""All images of a bag, or its first alone, as the store has them; or all as pixels, which are looked at in each run."""
BaseName = Literal["main", "other"]
"""The base that every table has, or one with the other kind of language model."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How models are fine-tuned on one data set; every arm has the same."""

    training: Mapping[str, Any]
    """Fields of `TrainConfig`."""
    generation: GenerationOptions
    max_caption_tokens: int
    tokens: Literal["all", "cls"]
    """What the store keeps of an image."""
    real_folder: str
    """Of the real data set, in the data root."""
    real_name: str
    where_from: str
    """Where to get it."""
    draw: Callable[[Path], Any]
    """Makes the miniature, or what is missing of it."""
    caption_batch: int
    """Bags captioned at once."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Models and data sets of one size."""

    name: Literal["miniature", "paper"]
    base: str
    """Folder or Hub id of the BLIP-2 that arms start from."""
    other_base: str | None
    """The same with the other kind of language model; None = the miniature one, which is trained first."""
    language_models: Mapping[BaseName, str]
    """What they are called."""
    store_dtype: torch.dtype
    settings: Mapping[DataName, Settings]
    subset_sizes: tuple[int, ...]
    """Training pairs of Figure 4."""
    unfrozen_sizes: tuple[int, ...]
    """Those of Figure 8."""
    image_sizes: tuple[int, int]
    """Pixels a side: the vision model's own, and those that the unfrozen one is trained at."""
    epochs: tuple[int, ...]
    """After which Figure 5 looks at captions; the last is how long it trains."""
    recurrent: Mapping[str, Any]
    """Fields of `BaselineConfig`, the recurrent decoder of Table 1; its epochs are compared by CIDEr, as MIVPG's."""
    num_tokens: int
    """P, of the vision model."""
    num_query_tokens: int
    """R, of the base; other aggregators get as many prompts."""
    perceiver: Mapping[str, Any] | None
    """Arguments of the Perceiver Resampler where it is smaller than its authors', as of TransMIL below."""
    transmil: Mapping[str, Any] | None
    patch_size: int
    """Pixels a side of a patch as Table 1's backbones see it; p3x3 gives one vector below 192, nine from 288 on."""
    num_copies: int
    """Augmented copies of each slide."""
    pretraining: Mapping[BackboneName, Mapping[str, Any]] | None
    """Fields of `PretrainingConfig`; None = weights of the data root's folder `backbones`, else random ones."""


NAMES: dict[DataName, tuple[str, str, str]] = {
    "products": (
        "abo",
        "Amazon Berkeley Objects",
        "abo-listings.tar and abo-images-small.tar of the bucket amazon-berkeley-objects, and captions.json made of "
        "Cap3D's human captions (tiange/Cap3D, misc/Cap3D_human_ABO.pkl)",
    ),
    "slides": ("patch_gastric", "PatchGastricADC22", "Zenodo record 6550925: captions.csv and patches_captions.zip"),
    "scenes": (
        "coco",
        "MSCOCO 2014 with Karpathy's split",
        "train2014.zip and val2014.zip of cocodataset.org, and coco_karpathy_{train,val,test}.json of LAVIS",
    ),
}


def _settings(name: DataName, draw: Callable[[Path], Any], tokens: Literal["all", "cls"], **options: Any) -> Settings:
    folder, title, where = NAMES[name]
    return Settings(real_folder=folder, real_name=title, where_from=where, draw=draw, tokens=tokens, **options)


MINIATURE = Scale(
    name="miniature",
    base=str(BASE_MODEL),
    other_base=None,
    language_models={"main": "decoder-only Llama", "other": "encoder-decoder T5"},
    store_dtype=torch.float16,
    settings={
        "products": _settings(
            "products",
            lambda root: make_catalogue(root, num_products=2000, seed=0),
            "all",
            training={"num_train_epochs": 4, "batch_size": 32, "learning_rate": 1e-3},
            generation=GenerationOptions(num_beams=1, max_new_tokens=64),
            max_caption_tokens=64,
            caption_batch=50,
        ),
        "slides": _settings(
            "slides",
            lambda root: make_patch_gastric(root, num_slides=300, seed=0),
            "cls",
            training={"num_train_epochs": 40, "batch_size": 8, "learning_rate": 1e-3},
            generation=GenerationOptions(num_beams=1, max_new_tokens=96),
            max_caption_tokens=96,
            caption_batch=50,
        ),
        "scenes": _settings(
            "scenes",
            lambda root: make_coco(root, num_pictures=1000, seed=0),
            "all",
            training={"num_train_epochs": 5, "batch_size": 32, "learning_rate": 3e-4},
            generation=GenerationOptions(num_beams=1, max_new_tokens=32),
            max_caption_tokens=32,
            caption_batch=50,
        ),
    },
    subset_sizes=(250, 500, 1000, 2000),
    unfrozen_sizes=(250, 1000),
    image_sizes=(96, 156),
    epochs=(0, 1, 4, 14, 30),
    recurrent={"embedding_dim": 64, "hidden_dim": 128, "metric": "CIDEr"},
    num_tokens=65,
    num_query_tokens=16,
    perceiver={"depth": 3, "num_heads": 4, "head_size": 32},
    transmil={"size": 128, "num_heads": 4, "num_landmarks": 64},
    patch_size=96,
    num_copies=2,
    pretraining={
        "densenet121": {"num_pictures": 3000, "num_epochs": 1, "image_size": 96, "crop_size": 96},
        "efficientnet_b3": {"num_pictures": 8000, "num_epochs": 1, "image_size": 96, "crop_size": 96},
    },
)

_PAPER_TRAINING = {"learning_rate": 1e-5, "batch_size": 16, "bf16": True}


def _is_there(root: Path) -> None:
    if not root.is_dir():
        raise FileNotFoundError(root)


PAPER = Scale(
    name="paper",
    base="Salesforce/blip2-flan-t5-xl",
    other_base="Salesforce/blip2-opt-2.7b",
    language_models={"main": "encoder-decoder FLAN-T5-XL", "other": "decoder-only OPT-2.7b"},
    store_dtype=torch.bfloat16,
    settings={
        "products": _settings(
            "products",
            _is_there,
            "all",
            training=_PAPER_TRAINING | {"num_train_epochs": 40},
            generation=GenerationOptions(num_beams=5, max_new_tokens=64, min_new_tokens=8),
            max_caption_tokens=64,
            caption_batch=16,
        ),
        "slides": _settings(
            "slides",
            _is_there,
            "cls",
            training=_PAPER_TRAINING | {"num_train_epochs": 40},
            generation=GenerationOptions(num_beams=5, max_new_tokens=96, min_new_tokens=8),
            max_caption_tokens=96,
            caption_batch=16,
        ),
        "scenes": _settings(
            "scenes",
            _is_there,
            "all",
            training=_PAPER_TRAINING | {"num_train_epochs": 5, "warmup_steps": 1000},
            generation=GenerationOptions(num_beams=5, max_new_tokens=30, min_new_tokens=8),
            max_caption_tokens=32,
            caption_batch=16,
        ),
    },
    subset_sizes=(50_000, 100_000, 200_000, 560_000),
    unfrozen_sizes=(50_000, 100_000, 200_000, 560_000),
    image_sizes=(224, 364),
    epochs=(0, 1, 4, 14, 30),
    recurrent={"metric": "CIDEr"},
    num_tokens=257,
    num_query_tokens=32,
    perceiver=None,
    transmil=None,
    patch_size=300,
    num_copies=4,
    pretraining=None,
)

SCALES: dict[str, Scale] = {scale.name: scale for scale in (MINIATURE, PAPER)}


@dataclass(kw_only=True)
class ExperimentData:
    """Where the data of one `mivpg reproduce` lie; made or checked when it is first asked for."""

    scale: Scale
    out: Path
    data_root: Path | None = None
    """The folder of the real data sets, at the paper's scale."""
    stores: dict[tuple[DataName, View, BaseName], Path | None] = field(default_factory=dict)
    """What has been prepared; None = pixels."""
    stored: dict[DataName, Mapping[str, Sequence[Path]]] = field(default_factory=dict)
    """The features file of each bag, as the main base's vision model sees it."""
    backbones: dict[BackboneName, Backbone] = field(default_factory=dict)
    num_train_pairs: dict[tuple[DataName, int, int | None], int] = field(default_factory=dict)
    """Of a data set, by seed and the number asked for."""

    def root(self, name: DataName) -> Path:
        """The folder with a data set's own files."""
        if self.scale.name == "miniature":
            return self.out / "data" / name
        assert self.data_root is not None
        return self.data_root / self.scale.settings[name].real_folder

    def caption_file(self, name: DataName, arm: str, seed: int) -> Path:
        """Where the captions of an arm's run go."""
        return self.out / "captions" / name / f"seed-{seed}" / f"{arm}.jsonl"

    def base(self, name: BaseName) -> str:
        """Folder or Hub id of a base; at the miniature's scale the other one is trained when it is first asked for."""
        if name == "main":
            return self.scale.base
        if self.scale.other_base is not None:
            return self.scale.other_base
        folder = self.out / "other_base"
        if not (folder / RECIPE_FILE).exists():
            print(f"The base with the {self.scale.language_models[name]} …", flush=True)
            make_encoder_decoder_base(folder)
        return str(folder)

    def weights_of_base(self, name: BaseName) -> dict[str, Any]:
        """What tells the weights of a base from others: digests of a folder's files, the commit of a Hub id."""
        (entry,) = describe_base({name: locate_base(self.base(name))}).values()
        return {key: entry[key] for key in ("sha256", "revision")}

    def dataset(
        self, name: DataName, view: View, seed: int, num_pairs: int | None = None, base: BaseName = "main"
    ) -> DatasetConfig:
        """A data set as a run reads it; the seed draws the split, or the training pairs where the split is fixed."""
        root, features = self.root(name), None if view == "pixels" else self.stores[name, view, base]
        if name == "products":
            return DatasetConfig(abo=AboConfig(root=root, split_seed=seed), features=features)
        if name == "slides":
            return DatasetConfig(patch_gastric=PatchGastricConfig(root=root, split_seed=seed), features=features)
        return DatasetConfig(coco=CocoConfig(root=root, num_train_pairs=num_pairs, subset_seed=seed), features=features)

    def count_train_pairs(self, name: DataName, seed: int, num_pairs: int | None) -> int:
        """How many pairs of a bag and a reference a run trains on; counted once for all its arms."""
        key = (name, seed, num_pairs)
        if key not in self.num_train_pairs:
            samples = self.dataset(name, "pixels", seed, num_pairs).load()
            self.num_train_pairs[key] = len(one_pair_a_reference(select(samples, "train")))
        return self.num_train_pairs[key]

    def prepare(self, name: DataName, view: View, base: BaseName = "main") -> None:
        """Draws what is to be drawn, and fills the store.

        Bases whose vision models are the same to the last bit share a store.

        Raises:
            MivpgError: A real data set or a base is not there; says which, where it was looked for and where to get it.
        """
        settings, root = self.scale.settings[name], self.root(name)
        try:
            settings.draw(root)
        except FileNotFoundError:
            raise MivpgError(
                f"{root} does not exist, expected {settings.real_name} there: {settings.where_from}. "
                "Arms on other data sets can run without it."
            ) from None
        samples = self.dataset(name, "pixels", seed=0).load()
        self.stores[name, "pixels", base] = None
        if view == "pixels":
            return
        where = self.base(base)
        try:
            model = MivpgForConditionalGeneration.from_pretrained(where, instance_correlation="none")
            processor = MivpgProcessor.from_pretrained(where)
        except MivpgError as error:
            raise MivpgError(
                f"{error} This base comes from the Hub by `hf download {where}`. "
                "Table 1's recurrent decoders on DenseNet121 and EfficientNet-B3 can run without it."
            ) from error
        assert model.vision_model is not None
        of_model = self.out / "features" / f"{name}_{weights_digest(model.vision_model)[:12]}"
        stored = extract_features(
            model.to("cuda" if torch.cuda.is_available() else "cpu"),
            processor,
            samples,
            of_model / "all",
            tokens=settings.tokens,
            dtype=self.scale.store_dtype,
        )
        self.stores[name, "all", base] = of_model / "all"
        if base == "main":
            self.stored[name] = stored_features(stored)
        if view == "main":
            self.stores[name, "main", base] = of_model / "main"
            for sample in tqdm(stored, desc="first images", unit="bag", delay=1, leave=False, disable=None):
                assert sample.features is not None
                file = of_model / "main" / sample.features.name
                if not file.exists():
                    first = read_features(sample.features)[0][:1].to(self.scale.store_dtype)
                    write_whole(file, save({"image_embeds": first}))

    def backbone(self, name: BackboneName) -> Backbone:
        """A backbone of Table 1, at the miniature's scale first trained on generated patches."""
        if name not in self.backbones:
            weights: Path | None = None
            if self.scale.pretraining is not None:
                config = PretrainingConfig(name=name, **self.scale.pretraining[name])
                weights = pretrain_backbone(self.out / "backbones" / name, config)
            elif self.data_root is not None and (file := self.data_root / "backbones" / f"{name}.safetensors").exists():
                weights = file
            self.backbones[name] = load_backbone(name, weights)
        return self.backbones[name]

    def backbone_features(self, name: BackboneName, *, augmented: bool) -> Mapping[str, Sequence[Path]]:
        """Files of every slide's features by a backbone of Table 1: of its augmented copies, or of it as it is."""
        backbone = self.backbone(name)
        return slide_features(
            backbone.to("cuda" if torch.cuda.is_available() else "cpu"),
            self.dataset("slides", "pixels", seed=0).load(),
            self.out / "features" / f"slides_{name}{'_augmented' * augmented}",
            image_size=self.scale.patch_size,
            augment=augmented,
            num_copies=self.scale.num_copies if augmented else 1,
        )

    def title(self, title: str, backbone: BackboneName | None) -> str:
        """An arm's title, with what its backbone knows of patches: nothing, where its weights are random."""
        if backbone is None or backbone not in self.backbones:
            return title
        if self.scale.pretraining is not None:
            accuracy = read_json(self.out / "backbones" / backbone / RECORD_FILE)["accuracy"]["whole"]
            return f"{title} ({accuracy:.2f} of patches right)"
        return f"{title} (random weights)" if "random" in self.backbones[backbone].description else title

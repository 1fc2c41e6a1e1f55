"""From bags of images and their texts to the tensors that the model reads, and from its tokens back to captions."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoProcessor, BatchFeature, ProcessorMixin

from mivpg.configuration_mivpg import IMAGE_TOKEN, MivpgConfig, add_image_token
from mivpg.errors import BagError, MivpgError
from mivpg.images import open_image
from mivpg.loading import NO_CODE, hub_arguments, load_config, load_tokenizer, loading

PictureLike = Image.Image | str | os.PathLike
Text = str | Sequence[Mapping[str, Any]]
"""A prompt, or a conversation for the chat template."""


class MivpgProcessor(ProcessorMixin):
    r"""
    One image processor and one tokenizer for bags.

    The text of a bag holds `num_query_tokens` image marks, whatever the number of its images, or as many for each image
    where the model gives prompts to each: where the text has one `<image>` they stand there, else before everything,
    also before the tokenizer's begin-of-sequence (BLIP-2's way).

    num_query_tokens (`int`, *optional*, defaults to 32):
        R, the number of visual prompts a bag; the model's.
    prompts_per_image (`bool`, *optional*, defaults to `False`):
        Whether these are the prompts of each image; the model's.
    caption_end_token_id (`int`, *optional*):
        The token that ends a caption; the model's `end_token_id`. By default the tokenizer's end-of-sequence.
    is_encoder_decoder (`bool`, *optional*, defaults to `False`):
        Whether the language model reads the prompt with an encoder, so that a caption is a text of its own.
    max_caption_tokens (`int`, *optional*):
        Longer captions are cut in training, and then carry no end.
    chat (`bool`, *optional*, defaults to `False`):
        Whether a prompt is put into the tokenizer's chat template, as a user's turn.
    prompt (`str`, *optional*, defaults to `""`):
        What the model reads before it writes the caption of a bag without a prompt of its own; training sets it to its
        own.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        num_query_tokens=32,
        prompts_per_image=False,
        caption_end_token_id=None,
        is_encoder_decoder=False,
        max_caption_tokens=None,
        chat=False,
        prompt="",
    ):
        self.image_token_id = add_image_token(tokenizer)
        self.num_query_tokens = num_query_tokens
        self.prompts_per_image = prompts_per_image
        self.caption_end_token_id = tokenizer.eos_token_id if caption_end_token_id is None else caption_end_token_id
        self.is_encoder_decoder = is_encoder_decoder
        self.max_caption_tokens = max_caption_tokens
        self.chat = chat
        self.prompt = prompt
        if chat and tokenizer.chat_template is None:
            raise MivpgError("chat=True puts prompts into the tokenizer's chat template, but this tokenizer has none.")
        super().__init__(image_processor, tokenizer)

    # Loading and saving.

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Loads the processor of a folder of ours or of BLIP-2's, or from the Hub.

        A BLIP-2 folder does not say all that is needed; the rest is read from the model's configuration beside it.

        Raises:
            MivpgError: The folder has no tokenizer or no image processor.
        """
        path = os.fspath(pretrained_model_name_or_path)
        with loading("the processor", path):
            return super().from_pretrained(path, **kwargs)

    @classmethod
    def from_vision_language_pretrained(
        cls,
        vision: str | os.PathLike | None,
        language: str | os.PathLike,
        config: MivpgConfig,
        *,
        vision_revision: str | None = None,
        language_revision: str | None = None,
        **options,
    ) -> "MivpgProcessor":
        """The processor for `MivpgForConditionalGeneration.from_vision_language_pretrained(vision, language)`.

        Args:
            vision: Folder or Hub id whose image processor is taken; None where there are features only.
            language: Folder or Hub id whose tokenizer is taken.
            config: The model's.
            vision_revision: On the Hub; by default `main`.
            language_revision: Likewise.
            **options: `max_caption_tokens`, `chat`, `prompt`.

        Raises:
            MivpgError: A folder has no tokenizer or no image processor.
        """
        image_processor = None
        if vision is not None:
            with loading("the image processor", vision):
                image_processor = AutoImageProcessor.from_pretrained(
                    vision, backend="pil", revision=vision_revision, **NO_CODE
                )
        tokenizer = load_tokenizer(language, revision=language_revision)
        return cls(image_processor, tokenizer, **model_options(config), **options)

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        kwargs = hub_arguments(kwargs)  # the processor's own options are nothing to its parts
        has_images = (processor_dict or {}).get("image_processor", ...) is not None
        image_processor = None
        if has_images:  # the PIL backend by name: with torchvision's, pixels would depend on what is installed
            image_processor = AutoImageProcessor.from_pretrained(
                pretrained_model_name_or_path, backend="pil", **kwargs, **NO_CODE
            )
        return [image_processor, load_tokenizer(pretrained_model_name_or_path, **kwargs)]

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path, **kwargs):
        """BLIP-2's `processor_config.json` lacks what our own has; the model's `config.json` knows it."""
        values, unused = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if "is_encoder_decoder" not in values:
            config, _ = load_config(pretrained_model_name_or_path, hub_arguments(kwargs))
            values |= model_options(config)
        return values, unused

    def check_argument_for_proper_class(self, argument_name, argument):
        """As in transformers, but there may be no image processor, where image embeddings come from elsewhere."""
        if argument_name == "image_processor" and argument is None:
            return None
        return super().check_argument_for_proper_class(argument_name, argument)

    def save_pretrained(self, save_directory, **kwargs):
        """As in transformers, with or without an image processor."""
        if self.image_processor is not None:
            return super().save_pretrained(save_directory, **kwargs)
        self.tokenizer.save_pretrained(save_directory)
        file = Path(save_directory) / "processor_config.json"
        self.to_json_file(file)
        return [os.fspath(file)]

    def check_model(self, config: MivpgConfig) -> None:
        """Checks that this processor belongs to a model.

        Raises:
            MivpgError: It does not; names both values.
        """
        for name, expected in (model_options(config) | {"image_token_id": config.image_token_index}).items():
            if getattr(self, name) != expected:
                raise MivpgError(f"The processor has {name} = {getattr(self, name)}, the model {expected}.")

    # Bags to tensors.

    def __call__(  # type: ignore[override]
        self,
        images: Sequence[PictureLike] | Sequence[Sequence[PictureLike]] | None = None,
        text: Text | Sequence[Text] | None = None,
        *,
        pixel_values: Sequence[Tensor] | None = None,
        image_embeds: Sequence[Tensor] | None = None,
        image_coords: Sequence[Any] | None = None,
        captions: str | Sequence[str] | None = None,
        return_tensors: str = "pt",
        **images_kwargs,
    ) -> BatchFeature:
        """Makes a batch of bags.

        Args:
            images: A list of bags, each a list of pictures or their paths; a list of pictures is one bag.
            text: The prompt of each bag, or one for all; by default the processor's own. A prompt is a text, or a
                conversation (turns of `role` and `content`) for the tokenizer's chat template.
            pixel_values: Instead of images, what `pixels` made of those of each bag, (N, 3, h, w).
            image_embeds: Instead of images, stored features of each bag, (N, P, D).
            image_coords: x and y of each image of each bag, (N, 2), where they are known.
            captions: For training, the caption of each bag; gives `labels`, and pads on the right. Without them a
                decoder-only model's texts are padded on the left, ready for `generate`.
            return_tensors: "pt"; there is nothing else.
            **images_kwargs: For the image processor, e.g. `size`.

        Returns:
            `pixel_values` (B, N, 3, h, w) or `image_embeds` (B, N, P, D), `image_mask` (B, N), `image_coords`
            (B, N, 2) where given, `input_ids` and `attention_mask` (B, T), and `labels` with captions.

        Raises:
            MivpgError: Numbers of bags, texts and captions that do not fit together, a bag without images, features
                of unlike shapes, or an `<image>` too many in a text.
        """
        if return_tensors != "pt":
            raise MivpgError(f"return_tensors is {return_tensors!r}; MivpgProcessor makes PyTorch tensors, 'pt'.")
        if sum(given is not None for given in (images, pixel_values, image_embeds)) != 1:
            raise MivpgError("Pass images, pixel_values or image_embeds, one of them.")
        batch: dict[str, Tensor] = {}
        if image_embeds is not None:
            batch["image_embeds"], batch["image_mask"] = pad_bags(list(image_embeds))
        elif pixel_values is not None:
            batch["pixel_values"], batch["image_mask"] = pad_bags(list(pixel_values))
        else:
            assert images is not None
            if isinstance(images, PictureLike):
                images = [images]
            bags: Any = images if is_list_of_bags(images) else [images]
            batch["pixel_values"], batch["image_mask"] = pad_bags([self.pixels(bag, **images_kwargs) for bag in bags])
        if image_coords is not None:
            coords = [torch.as_tensor(bag, dtype=torch.float32) for bag in image_coords]
            batch["image_coords"], coords_mask = pad_bags(coords)
            if not torch.equal(coords_mask, batch["image_mask"]):
                counts = f"{coords_mask.sum(1).tolist()} coordinates and {batch['image_mask'].sum(1).tolist()} images"
                raise MivpgError(f"The bags have {counts}; one x, y an image is needed.")
        num_bags = len(batch["image_mask"])
        captions = [captions] if isinstance(captions, str) else captions
        text = self.prompt if text is None else text
        is_one = isinstance(text, str) or (len(text) > 0 and isinstance(text[0], Mapping))
        prompts: Any = [text] * num_bags if is_one else list(text)
        if len(prompts) != num_bags or (captions is not None and len(captions) != num_bags):
            given = f"{len(prompts)} texts" + ("" if captions is None else f" and {len(captions)} captions")
            raise MivpgError(f"{num_bags} bags and {given}; one of each a bag is needed.")
        return BatchFeature(batch | self.tokens(prompts, captions, batch["image_mask"].sum(dim=1).tolist()))

    def pixels(self, bag: Sequence[PictureLike], **images_kwargs) -> Tensor:
        """The pictures of one bag, (N, 3, h, w)."""
        if not bag:
            raise BagError("A bag without images.")
        if self.image_processor is None:
            raise MivpgError("This model has no vision model, so its processor takes image_embeds, not images.")
        for picture in bag:
            if not isinstance(picture, PictureLike):
                raise MivpgError(f"An image is a PIL image or a path; this is a {type(picture).__name__}.")
        pictures = [p.convert("RGB") if isinstance(p, Image.Image) else open_image(Path(p)) for p in bag]
        return self.image_processor(pictures, return_tensors="pt", **images_kwargs)["pixel_values"]

    # Texts to tokens.

    def num_prompts(self, num_images: int) -> int:
        """Visual prompts of a bag, for each of which its text has an image mark."""
        return self.num_query_tokens * (num_images if self.prompts_per_image else 1)

    def tokens(
        self, prompts: Sequence[Text], captions: Sequence[str] | None, bag_sizes: Sequence[int]
    ) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` (B, T) and, with captions, `labels`, for bags of so many images."""
        texts = [self.prompt_text(prompt) for prompt in prompts]
        ids = [self.text_ids(text, self.num_prompts(size)) for text, size in zip(texts, bag_sizes, strict=True)]
        pad = 0 if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        if captions is None:
            return pad_tokens(ids, pad, left=not self.is_encoder_decoder)
        endings = [self.caption_ids(text, caption) for text, caption in zip(texts, captions, strict=True)]
        if self.is_encoder_decoder:
            labels = endings
        else:
            labels = [[-100] * len(prompt) + ending for prompt, ending in zip(ids, endings, strict=True)]
            ids = [prompt + ending for prompt, ending in zip(ids, endings, strict=True)]
        return pad_tokens(ids, pad) | {"labels": pad_tokens(labels, -100)["input_ids"]}

    def prompt_text(self, prompt: Text) -> str:
        """A prompt as the language model is to read it, in the chat template where there is one to use."""
        if not isinstance(prompt, str):
            return self.apply_chat_template(prompt, add_generation_prompt=True)
        if not self.chat:
            return prompt
        content = prompt if IMAGE_TOKEN in prompt else f"{IMAGE_TOKEN}\n{prompt}"
        return self.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def apply_chat_template(self, conversation, chat_template=None, tokenize=False, **kwargs):  # type: ignore[override]
        """The tokenizer's chat template as a text; a `{"type": "image"}` in a turn, one a bag, becomes `<image>`."""
        if tokenize:
            raise MivpgError(
                "apply_chat_template gives a text; pass it, or the conversation, to the processor as text."
            )
        turns = [turn | {"content": flat_content(turn["content"])} for turn in conversation]
        return self.tokenizer.apply_chat_template(turns, chat_template=chat_template, tokenize=False, **kwargs)

    def text_ids(self, text: str, num_prompts: int) -> list[int]:
        """Tokens of a prompt with its image marks."""
        marks = text.count(IMAGE_TOKEN)
        if marks > 1:
            raise MivpgError(f"A text with {marks} {IMAGE_TOKEN} marks; one stands for the whole bag: {text!r}.")
        if marks == 1:
            return self.tokenize(text.replace(IMAGE_TOKEN, IMAGE_TOKEN * num_prompts))
        return [self.image_token_id] * num_prompts + self.tokenize(text)

    def tokenize(self, text: str) -> list[int]:
        """The tokenizer's ids, with its special tokens unless the text begins with them already (a chat template)."""
        begins = self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)
        ids = self.tokenizer(text, add_special_tokens=not begins)["input_ids"]
        if not self.is_encoder_decoder and not text.endswith(self.tokenizer.eos_token or "\0"):
            # Of a tokenizer that ends every text; but the token that begins one stays, which for OPT is the same.
            beginning = 1 if ids[:1] == [self.tokenizer.bos_token_id] else 0
            while len(ids) > beginning and ids[-1] == self.tokenizer.eos_token_id:
                ids = ids[:-1]
        return ids

    def caption_ids(self, text: str, caption: str) -> list[int]:
        """Tokens of a caption as it follows its prompt, with the one that ends it."""
        if self.is_encoder_decoder:
            ids = self.tokenizer(caption)["input_ids"]
        else:
            # Tokenised together, since " chair" after a prompt is another token than "chair" alone.
            space = " " if text and not text[-1].isspace() else ""
            prompt, joint = self.tokenize(text), self.tokenize(text + space + caption)
            if joint[: len(prompt)] == prompt:
                ids = joint[len(prompt) :]
            else:
                ids = self.tokenizer(caption, add_special_tokens=False)["input_ids"]
        if self.caption_end_token_id is not None and (not ids or ids[-1] != self.caption_end_token_id):
            ids = [*ids, self.caption_end_token_id]
        limit = self.max_caption_tokens
        return ids if limit is None or len(ids) <= limit + 1 else ids[:limit]

    # Tokens to captions.

    def decode_captions(self, ids: Tensor, input_ids: Tensor | None = None) -> list[str]:
        """Captions in what `generate` returned.

        Args:
            ids: (B, T).
            input_ids: The prompts that it was given, with which a decoder-only model's answer begins; left out where
                they are cut off already.
        """
        if input_ids is not None and not self.is_encoder_decoder:
            ids = ids[:, input_ids.shape[1] :]
        rows = ids.tolist()
        if self.is_encoder_decoder:
            rows = [row[1:] for row in rows]  # the token that starts the decoder, which for BART is the one that ends
        end = self.caption_end_token_id
        rows = [row[: row.index(end)] if end in row else row for row in rows]
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]

    @property
    def model_input_names(self) -> list[str]:
        """What a batch may hold."""
        return ["pixel_values", "image_embeds", "image_mask", "image_coords", "input_ids", "attention_mask", "labels"]


def model_options(config: MivpgConfig) -> dict[str, Any]:
    """What a processor has to know of its model."""
    return {
        "num_query_tokens": config.num_query_tokens,
        "prompts_per_image": config.prompts_per_image,
        "caption_end_token_id": config.end_token_id,
        "is_encoder_decoder": config.is_encoder_decoder,
    }


def is_list_of_bags(images: Sequence) -> bool:
    """Whether these are bags, rather than the pictures of one.

    Raises:
        MivpgError: They are neither, or both.
    """
    if not isinstance(images, list | tuple):
        raise MivpgError(f"images are lists of PIL images or paths; this is a {type(images).__name__}.")
    are_bags = {isinstance(image, list | tuple) for image in images}
    if len(are_bags) > 1:
        raise MivpgError("images hold bags (lists) beside single pictures; put each picture into a list of its own.")
    return are_bags == {True}


def flat_content(content: str | Sequence[Mapping[str, Any]]) -> str:
    """The content of a chat turn as one string."""
    if isinstance(content, str):
        return content
    return "".join(IMAGE_TOKEN if part["type"] == "image" else part["text"] for part in content)


def pad_bags(bags: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Bags (N, …) of any lengths -> (B, N, …) with zeros at their ends, and the mask (B, N), 1 = real."""
    shapes = {tuple(bag.shape[1:]) for bag in bags}
    if len(shapes) > 1 or not bags:
        raise BagError(f"The images of a batch have to be alike; per image these are {sorted(shapes)}.")
    if any(len(bag) == 0 for bag in bags):
        raise BagError("A bag without images.")
    mask = torch.zeros(len(bags), max(len(bag) for bag in bags), dtype=torch.long)
    padded = bags[0].new_zeros(*mask.shape, *bags[0].shape[1:])
    for row, bag in enumerate(bags):
        padded[row, : len(bag)] = bag
        mask[row, : len(bag)] = 1
    return padded, mask


def pad_tokens(rows: Sequence[list[int]], pad: int, *, left: bool = False) -> dict[str, Tensor]:
    """Token lists as `input_ids` (B, T) and `attention_mask` (B, T), 1 = real."""
    length = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), length), pad)
    attention_mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(length - len(row), length) if left else slice(0, len(row))
        input_ids[i, where] = torch.tensor(row, dtype=torch.long)
        attention_mask[i, where] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


AutoProcessor.register(MivpgConfig, MivpgProcessor)

__all__ = ["MivpgProcessor"]

"""Which image each word of a caption looked at, as far as the language model's attention tells.

    looked = word_weights(model, processor, bag, caption, maps.images[:, 0])

The language model sees no image. It attends to visual prompts, and each prompt has read the images in shares of its
own; the product of both says how far a word looked at an image through all prompts together. Prompts that read alike
cannot tell words apart.
"""

# L blocks with cross-attention, A attention heads, R queries (visual prompts), N images, M instances, T tokens, W words

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mivpg.bags import Bag
from mivpg.likelihood import read_captions_back
from mivpg.modeling_mivpg import MivpgForConditionalGeneration
from mivpg.processing_mivpg import MivpgProcessor


@dataclass(frozen=True, kw_only=True)
class WordWeights:
    """What each word of a caption looked at."""

    words: tuple[str, ...]
    prompts: Tensor
    """(W, R), attention to each visual prompt at the step that wrote the word, the mean over layers, heads and the
    word's tokens. A row sums to less than one: the rest is attention to text."""
    images: Tensor
    """(W, N), the prompts' attention shared out as each prompt read the images; rows sum to one."""


def word_weights(
    model: MivpgForConditionalGeneration, processor: MivpgProcessor, bag: Bag, caption: str, looks: Tensor
) -> WordWeights | None:
    """What each word of a caption looked at.

    Of a decoder-only model the attention is that of the position that wrote a token to the positions of the prompts, of
    an encoder-decoder the decoder's cross-attention to them.

    Args:
        model: Looks in eval mode, and is left in the mode and with the attention implementation it was found with.
        processor: The model's.
        bag: Of N images or their features.
        caption: What the model wrote of it.
        looks: (L, A, R, M), the cross-attention of every block to this bag, `AttentionMaps.images[:, 0]`.

    Returns:
        None where the language model gives no attention weights, as one without attention does.
    """
    language_model = model.language_model
    implementation = language_model.config._attn_implementation
    try:
        language_model.set_attn_implementation("eager")  # no other gives the weights
        output, batch = read_captions_back(model, processor, [bag], [caption], output_attentions=True)
    finally:
        language_model.set_attn_implementation(implementation)
    is_encoder_decoder = model.config.is_encoder_decoder
    name = "cross_attentions" if is_encoder_decoder else "attentions"
    layers = [layer for layer in getattr(output.language_model_outputs, name, None) or () if layer is not None]
    if not layers:
        return None
    attention = torch.stack([layer[0].float().mean(dim=0) for layer in layers]).mean(dim=0).cpu()  # (T, T of the input)

    labels = batch["labels"][0].cpu()
    places = (labels != -100).nonzero()[:, 0]
    words, word_of = split_words(processor, labels[places].tolist())
    steps = places if is_encoder_decoder else places - 1
    is_prompt = batch["input_ids"][0].cpu() == model.config.image_token_index
    to_prompts = attention[steps][:, is_prompt]  # (tokens of the caption, R)

    prompts = to_prompts.new_zeros(len(words), to_prompts.shape[1])
    for word in range(len(words)):
        prompts[word] = to_prompts[[token for token, owner in enumerate(word_of) if owner == word]].mean(dim=0)
    num_images = len(bag.images or ()) if bag.image_embeds is None else len(bag.image_embeds)
    read = looks.float().cpu().mean(dim=(0, 1)).unflatten(1, (num_images, -1)).sum(dim=2)  # (R, N)
    images = prompts @ read
    return WordWeights(words=words, prompts=prompts, images=images / images.sum(dim=1, keepdim=True))


def split_words(processor: MivpgProcessor, ids: list[int]) -> tuple[tuple[str, ...], list[int | None]]:
    """The words of a caption's tokens, and the number of the word that each token is of; None for what ends it.

    Words that came in one token stand together.
    """
    tokenizer: Any = processor.tokenizer
    words: list[str] = []
    word_of: list[int | None] = []
    begun, num_pieces = 0, 0  # where the last word begins among what spaces part, and how much of it there is
    for number, token in enumerate(ids, start=1):
        if token == processor.caption_end_token_id or token in tokenizer.all_special_ids:
            word_of.append(None)
            continue
        pieces = tokenizer.decode(ids[:number], skip_special_tokens=True).split()
        if len(pieces) > num_pieces:
            words.append("")
            begun, num_pieces = num_pieces, len(pieces)
        if words:
            words[-1] = " ".join(pieces[begun:])
        word_of.append(len(words) - 1 if words else None)  # a space before the first word is of none
    return tuple(words), word_of

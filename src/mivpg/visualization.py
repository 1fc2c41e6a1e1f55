"""What a model looked at when it wrote a caption.

weights = image_weights(model, processor(images=[photos]))   # (1, N), one number a photo
"""

# B bags, N images a bag, P patch tokens an image, M instances a bag, R queries, A attention heads

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mivpg.errors import MivpgError
from mivpg.modeling_mivpg import MivpgVisualPromptModel


@torch.no_grad()
def image_weights(model: MivpgVisualPromptModel, batch: Mapping[str, Tensor]) -> Tensor:
    """How much the visual prompts looked at each image of each bag.

    The mean over prompts, heads and blocks of the cross-attention; where every patch is an instance, summed over the
    patches of an image.

    Args:
        model: Looks in eval mode, and is left in the mode and with the attention implementation it was found with.
        batch: What the processor makes: `pixel_values` or `image_embeds`, `image_mask` and, for PPEG, `image_coords`.

    Raises:
        MivpgError: Another aggregator stands in MIVPG's place.

    Returns:
        Weights (B, N); each row sums to one, padding is 0.
    """
    if model.qformer is None or model.config.aggregator != "mivpg":
        raise MivpgError(f"aggregator {model.config.aggregator!r}: weights of images are MIVPG's cross-attention.")
    inputs = {name: value.to(model.device) for name, value in batch.items()}
    image_mask = inputs["image_mask"]
    looks: list[Tensor] = []

    def keep_look(module: Any, args: Any, output: tuple[Tensor, Tensor]) -> None:
        looks.append(output[1].mean(dim=(1, 2)))  # (B, A, R, M) -> (B, M), at once: a block's own weights are large

    blocks = [layer for layer in model.qformer.encoder.layer if layer.has_cross_attention]
    hooks = [block.crossattention.attention.register_forward_hook(keep_look) for block in blocks]
    implementation, was_training = model.qformer.config._attn_implementation, model.training
    try:
        model.eval()
        model.qformer.set_attn_implementation("eager")  # no other gives the weights
        image_embeds = inputs.get("image_embeds")
        if image_embeds is None:
            image_embeds = model.get_image_embeds(inputs["pixel_values"], image_mask)
        model.get_visual_prompts(image_embeds, image_mask, inputs.get("image_coords"))
    finally:
        model.qformer.set_attn_implementation(implementation)
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    weights = torch.stack(looks).mean(dim=0)  # (B, M), M = N or N*P
    return weights.unflatten(1, (image_mask.shape[1], -1)).sum(dim=2)

"""Small random models and bags for the tests: built in milliseconds, and not blind.

BLIP-2's own initial weights are nearly blind (ViT 1e-10, queries zero) and every part that MIVPG adds starts as the
identity, so an untrained model proves nothing. `initializer_range` is larger here, and `randomize_added_weights` or
`randomize_weights` belongs in front of every property that a test wants to see.
"""

import torch
from torch import Tensor, nn
from transformers import Blip2VisionConfig, OPTConfig, T5Config

from mivpg.configuration_mivpg import MivpgConfig
from mivpg.modeling_mivpg import MivpgForConditionalGeneration

# B bags, N images, P patches, D vision width, R queries, H Q-Former width
VISION_WIDTH, HIDDEN_SIZE, NUM_HEADS, NUM_QUERIES = 12, 16, 4, 5
VOCAB_SIZE, IMAGE_TOKEN_ID = 40, 39

PATCH_POOLINGS = ("none", "cls", "mean", "max", "abmil", "gated_abmil")
INSTANCE_CORRELATIONS = ("none", "csa", "csa_constant", "self_attention", "induced", "nystrom")
POSITION_ENCODINGS = ("none", "ppeg")

ADDED_PARTS = ("query_tokens", "patch_pooling", "instance_projection", "instance_correlation", "position_encoding")
"""Parts of names: what MIVPG adds to BLIP-2, and the queries, which BLIP-2 starts at zero."""


def tiny_vit_config(**options) -> Blip2VisionConfig:
    """BLIP-2's ViT for images of 12 x 12 in patches of 4: 3 x 3 patches and CLS, so P = 10."""
    defaults = {
        "hidden_size": VISION_WIDTH,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 12,
        "patch_size": 4,
        "initializer_range": 0.2,
    }
    return Blip2VisionConfig(**defaults | options)


def tiny_opt_config(**options) -> OPTConfig:
    """A decoder-only language model of 40 words, of which 39 is the image mark."""
    defaults = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "ffn_dim": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "dropout": 0.0,
        "init_std": 0.2,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    return OPTConfig(**defaults | options)


def tiny_t5_config(**options) -> T5Config:
    """An encoder-decoder language model of 40 words, of which 39 is the image mark."""
    defaults = {
        "vocab_size": VOCAB_SIZE,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 20,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 2,
        "dropout_rate": 0.0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }
    return T5Config(**defaults | options)


def tiny_config(
    patch_pooling: str = "none",
    instance_correlation: str = "csa",
    position_encoding: str = "none",
    *,
    vision_config=None,
    text_config=None,
    num_prefix_tokens: int = 1,
    image_embeds_size: int | None = None,
    **qformer_options,
) -> MivpgConfig:
    """The whole model; without `vision_config` it takes image embeddings only. Five blocks, three with images."""
    qformer = {
        "hidden_size": HIDDEN_SIZE,
        "num_hidden_layers": 5,
        "num_attention_heads": NUM_HEADS,
        "intermediate_size": 20,
        "encoder_hidden_size": VISION_WIDTH,
        "cross_attention_frequency": 2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.2,
        "instance_correlation": instance_correlation,
        "position_encoding": position_encoding,
        "num_landmarks": 4,
        "num_inducing_points": 3,
    }
    return MivpgConfig(
        vision_config=vision_config and vision_config.to_dict(),
        qformer_config=qformer | qformer_options,
        text_config=(text_config or tiny_opt_config()).to_dict(),
        num_query_tokens=NUM_QUERIES,
        image_token_index=IMAGE_TOKEN_ID,
        image_embeds_size=image_embeds_size,
        patch_pooling=patch_pooling,
        num_prefix_tokens=num_prefix_tokens,
        initializer_range=0.2,
    )


def tiny_model(config: MivpgConfig | None = None, seed: int = 0) -> MivpgForConditionalGeneration:
    """A model in eval mode with its added weights drawn at random."""
    torch.manual_seed(seed)
    model = MivpgForConditionalGeneration(config or tiny_config()).eval()
    randomize_added_weights(model, generator=torch.Generator().manual_seed(seed))
    return model


def randomize_added_weights(model: nn.Module, std: float = 0.2, generator: torch.Generator | None = None) -> None:
    """Draws from N(0, std) what MIVPG adds to BLIP-2, and the query tokens; the rest stays as it is."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name.split(".") for part in ADDED_PARTS):
                parameter.normal_(0.0, std, generator=generator)


def randomize_weights(model: nn.Module, std: float = 0.2, generator: torch.Generator | None = None) -> None:
    """Moves every weight by N(0, std), so that no bias is zero and no LayerNorm is plain."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.empty_like(parameter).normal_(0.0, std, generator=generator)


def random_bags(
    lengths: tuple[int, ...], num_patches: int = 10, width: int = VISION_WIDTH, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Image embeddings (B, N, P, D) of bags with `lengths` images, padded with zeros, and their mask (B, N)."""
    mask = torch.tensor([[float(i < length) for i in range(max(lengths))] for length in lengths]).long()
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(*mask.shape, num_patches, width, generator=generator)
    return embeds * mask[:, :, None, None], mask


def random_coords(lengths: tuple[int, ...], side: int, seed: int = 0) -> Tensor:
    """Coordinates (B, N, 2) as (x, y) on a lattice of side x side cells, no two alike in a bag.

    The first two images are neighbours along both axes, so that the lattice's step can be read from every bag.
    """
    generator = torch.Generator().manual_seed(seed)
    num_images = max(lengths)
    neighbours = torch.tensor([0, side + 1])
    others = torch.tensor([cell for cell in range(side * side) if cell not in (0, side + 1)])
    bags = []
    for _ in lengths:
        shuffled = others[torch.randperm(len(others), generator=generator)]
        bags.append(torch.cat([neighbours, shuffled])[:num_images])
    cells = torch.stack(bags)
    return torch.stack([cells % side, cells // side], dim=-1) * torch.tensor([256.0, 128.0])

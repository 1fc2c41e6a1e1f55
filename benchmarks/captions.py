"""Captions a second: MIVPG, BLIP-2 on the patches of all images, and every token in the language model (LLaVA's way).

python benchmarks/captions.py [--models miniature 100M] [--images 1 5 10 21] [--bags 2] [--beams 1]
    [--rounds 3]

Two models: the miniature that comes with the package, and one with a language model of OPT-125M's size, ViT-B/16 and
BLIP-2's Q-Former, weights random, nothing downloaded. The rivals share vision model and language model, and write 30
tokens whatever they are, by default greedily, so that all have the same work. BLIP-2 is transformers' own class, whose
Q-Former is given the patches of all images of a bag one after the other. In the LLaVA-style model one linear layer
turns every token of every image into a prompt.

Images go through the vision model once a round, apart; captions from pixels take that time and then that from stored
features. The ratios are those of a round, median (least to most). Prints Markdown.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Blip2Config, Blip2ForConditionalGeneration, OPTConfig
from transformers.modeling_outputs import BaseModelOutput

from measuring import DEVICE, Seconds, in_turn, machine, markdown, spread
from mivpg import MivpgConfig, MivpgForConditionalGeneration
from mivpg.miniature import BASE_MODEL
from parameters import draw_zeros

# B bags, N images a bag, P tokens an image, D vision width, R visual prompts, T tokens

NUM_NEW_TOKENS = 30
NUM_PROMPT_TOKENS = 4
"""Of a prompt such as "a photo of"."""
MIVPG, BLIP2, LLAVA = "MIVPG", "BLIP-2 on all patches", "every token a prompt (LLaVA)"


@dataclass(frozen=True)
class Captioner:
    """A rival."""

    num_prompts: Callable[[int], int]
    """Visual prompts of a bag of so many images."""
    generate: Callable[..., Tensor]
    """Takes stored features (B, N, P, D) first, then what transformers' `generate` takes."""
    image_token_id: int

    @torch.no_grad()
    def write(self, features: Tensor, num_beams: int = 1) -> Tensor:
        """The tokens (B, R + T) of prompt and caption of each bag."""
        batch_size, num_images = features.shape[:2]
        marks = torch.full((batch_size, self.num_prompts(num_images)), self.image_token_id)
        words = torch.arange(10, 10 + NUM_PROMPT_TOKENS).expand(batch_size, -1)
        ids = torch.cat([marks, words], dim=1).to(DEVICE)
        written = self.generate(
            features,
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=NUM_NEW_TOKENS,
            max_new_tokens=NUM_NEW_TOKENS,
            num_beams=num_beams,
            do_sample=False,
        )
        assert written.shape[1] == ids.shape[1] + NUM_NEW_TOKENS
        return written


class Concatenation(nn.Module):
    """In place of BLIP-2's vision model: stored features of a bag (B, N, P, D) as those of one image (B, N P, D)."""

    def forward(self, features: Tensor, **options: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=features.flatten(1, 2))


def miniature() -> Blip2ForConditionalGeneration:
    """The base model that comes with the package."""
    return Blip2ForConditionalGeneration.from_pretrained(BASE_MODEL)


def random_blip2(most_images: int) -> Blip2ForConditionalGeneration:
    """ViT-B/16, BLIP-2's Q-Former and OPT-125M, with positions for every token of the largest bag."""
    vision = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
        "initializer_range": 0.02,
    }
    num_tokens = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
    num_positions = most_images * num_tokens + NUM_PROMPT_TOKENS + NUM_NEW_TOKENS
    language = OPTConfig(max_position_embeddings=num_positions)
    return Blip2ForConditionalGeneration(
        Blip2Config(
            vision_config=vision,
            qformer_config={"encoder_hidden_size": vision["hidden_size"]},
            text_config=language.to_dict(),
            num_query_tokens=32,
            image_token_index=language.vocab_size - 1,
        )
    )


def make_rivals(blip2: Blip2ForConditionalGeneration) -> tuple[nn.Module, dict[str, Captioner]]:
    """The vision model, and the captioners around it and the language model of a BLIP-2."""
    config = blip2.config
    num_tokens = (config.vision_config.image_size // config.vision_config.patch_size) ** 2 + 1  # P
    mivpg = around(blip2, patch_pooling="abmil", instance_correlation="csa")
    llava = around(blip2, aggregator="linear_projection", num_query_tokens=num_tokens)
    for model in (blip2, mivpg, llava):
        draw_zeros(model)
        model.eval().to(DEVICE)
    vision_model, blip2.vision_model = blip2.vision_model, Concatenation()

    def of_features(model: MivpgForConditionalGeneration) -> Callable[..., Tensor]:
        return lambda features, **options: model.generate(image_embeds=features, **options)

    return vision_model, {
        MIVPG: Captioner(lambda num_images: config.num_query_tokens, of_features(mivpg), config.image_token_index),
        BLIP2: Captioner(lambda num_images: config.num_query_tokens, blip2.generate, config.image_token_index),
        LLAVA: Captioner(lambda num_images: num_images * num_tokens, of_features(llava), config.image_token_index),
    }


def around(blip2: Blip2ForConditionalGeneration, **options: Any) -> MivpgForConditionalGeneration:
    """A MIVPG with BLIP-2's weights, around the same vision model and language model."""
    config = MivpgConfig.from_blip2(blip2.config, **options)
    weights = {name: weight.clone() for name, weight in blip2.state_dict().items()}  # a model may draw what it is given
    model = MivpgForConditionalGeneration(config, blip2.vision_model, blip2.language_model)
    model.load_state_dict(weights, strict=False)
    return model


@torch.no_grad()
def captions_a_second(
    title: str,
    vision_model: nn.Module,
    rivals: dict[str, Captioner],
    num_images: int,
    *,
    num_bags: int,
    rounds: int,
    num_beams: int = 1,
) -> list[list[Any]]:
    """The rows of one size of bag."""
    size = vision_model.config.image_size
    pixels = torch.randn(num_bags * num_images, 3, size, size, device=DEVICE)

    def see() -> Tensor:
        return vision_model(pixel_values=pixels).last_hidden_state  # (B N, P, D)

    features = see().unflatten(0, (num_bags, num_images))
    seeing = "vision model"
    runs: dict[str, Callable[[], Any]] = {seeing: see}
    runs |= {name: lambda rival=rival: rival.write(features, num_beams) for name, rival in rivals.items()}
    stored = in_turn(runs, rounds=rounds)
    seen = stored.rounds[seeing]
    pixel = Seconds({name: [a + b for a, b in zip(seen, stored.rounds[name], strict=True)] for name in rivals})
    rows = []
    for name, rival in rivals.items():
        row: list[Any] = [title, num_images, name, rival.num_prompts(num_images)]
        for taken in (stored, pixel):
            row.append(f"{spread(num_bags / seconds for seconds in taken.rounds[name]).median:.3g}")
            row.append("" if name == MIVPG else taken.times_as_fast(MIVPG, name))
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["miniature", "100M"], default=["miniature", "100M"])
    parser.add_argument("--images", nargs="+", type=int, default=[1, 5, 10, 21])
    parser.add_argument("--bags", type=int, default=2, help="captioned at once")
    parser.add_argument("--beams", type=int, default=1, help="1 = greedily")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows: list[list[Any]] = []
    for title in arguments.models:
        blip2 = miniature() if title == "miniature" else random_blip2(max(arguments.images))
        vision_model, rivals = make_rivals(blip2)
        for num_images in arguments.images:
            rows += captions_a_second(
                title,
                vision_model,
                rivals,
                num_images,
                num_bags=arguments.bags,
                rounds=arguments.rounds,
                num_beams=arguments.beams,
            )
    columns = ["model", "images", "captioner", "visual tokens"]
    columns += ["captions a second, stored features", "MIVPG is so many times as fast"]
    columns += ["captions a second, pixels", "MIVPG is so many times as fast"]
    how = "greedily" if arguments.beams == 1 else f"with {arguments.beams} beams"
    print(f"{arguments.bags} bags at once, {NUM_NEW_TOKENS} tokens {how}. {machine()}.\n")
    print(markdown(columns, rows))


if __name__ == "__main__":
    main()

"""Parameters of MIVPG at the sizes of the real BLIP-2 models, by part; nothing is downloaded or allocated.

python benchmarks/parameters.py
"""

import torch
from transformers import Blip2Config, OPTConfig, PreTrainedConfig, T5Config

from mivpg import MivpgConfig, MivpgForConditionalGeneration

LANGUAGE_MODELS: dict[str, PreTrainedConfig] = {
    "blip2-flan-t5-xl": T5Config(
        d_model=2048,
        d_kv=64,
        d_ff=5120,
        num_layers=24,
        num_decoder_layers=24,
        num_heads=32,
        vocab_size=32128,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    ),
    "blip2-opt-2.7b": OPTConfig(
        hidden_size=2560,
        word_embed_proj_dim=2560,
        ffn_dim=10240,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=50304,
    ),
}

PARTS = {
    "vision model": "vision_model.",
    "AB-MIL": "patch_pooling.",
    "PPEG": ".position_encoding.",
    "CSA": ".instance_correlation.",
    "query tokens": "query_tokens",
    "Q-Former": "qformer.",
    "language projection": "language_projection.",
    "language model": "language_model.",
}
"""What a parameter's name holds, the first that fits."""


def real_size(language_config: PreTrainedConfig) -> MivpgForConditionalGeneration:
    """MIVPG with every part that has parameters, on PyTorch's meta device."""
    blip2 = Blip2Config(text_config=language_config.to_dict())
    with torch.device("meta"):
        return MivpgForConditionalGeneration(
            MivpgConfig.from_blip2(blip2, patch_pooling="abmil", instance_correlation="csa", position_encoding="ppeg")
        )


@torch.no_grad()
def draw_zeros(model: torch.nn.Module) -> None:
    """Draws every parameter that starts at zero, so that nothing is timed on the identity."""
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(0.0, 0.02)


def parameters_by_part(model: MivpgForConditionalGeneration) -> dict[str, int]:
    """Number of parameters of each part."""
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        counts[next(part for part, mark in PARTS.items() if mark in name)] += parameter.numel()
    return counts


def main() -> None:
    """Prints a Markdown table."""
    models = {name: real_size(config) for name, config in LANGUAGE_MODELS.items()}
    counts = {name: parameters_by_part(model) for name, model in models.items()}
    print(f"| part | {' | '.join(models)} |")
    print(f"|---|{'---:|' * len(models)}")
    for part in PARTS:
        print(f"| {part} | {' | '.join(f'{counts[name][part]:,}' for name in models)} |")
    print(f"| all | {' | '.join(f'{sum(counts[name].values()):,}' for name in models)} |")
    trained = {n: sum(p.numel() for p in m.parameters() if p.requires_grad) for n, m in models.items()}
    print(f"| of which train | {' | '.join(f'{trained[name]:,}' for name in models)} |")


if __name__ == "__main__":
    main()

"""Small random models of every family that the tests join, each a folder as `save_pretrained` writes it."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.image_processing_auto import _load_backend_class

PAD, BOS, EOS, NUM_SPECIAL = 0, 1, 2, 3
VOCAB_SIZE = NUM_SPECIAL + 256

VISION = {
    "blip_2_vision_model": {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 32,
    },
    "clip_vision_model": {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32},
    "siglip_vision_model": {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 32,
    },
    "dinov2_with_registers": {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 2},
    "dinov2": {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 2},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16, 20, 24], "depths": [1, 1, 1, 1], "layer_type": "basic"},
}
"""Sizes by model type; images are 28 x 28 in patches of 7."""

IMAGE_PROCESSORS = {
    "blip_2_vision_model": ("BlipImageProcessor", {"size": {"height": 28, "width": 28}}),
    "clip_vision_model": ("CLIPImageProcessor", {"size": {"shortest_edge": 28}, "crop_size": 28}),
    "siglip_vision_model": ("SiglipImageProcessor", {"size": {"height": 28, "width": 28}}),
    "dinov2_with_registers": ("BitImageProcessor", {"size": {"shortest_edge": 28}, "crop_size": 28}),
    "dinov2": ("BitImageProcessor", {"size": {"shortest_edge": 28}, "crop_size": 28}),
    "resnet": ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}}),
}

NUM_PREFIX_TOKENS = {
    "blip_2_vision_model": 1,
    "clip_vision_model": 1,
    "siglip_vision_model": 0,
    "dinov2_with_registers": 5,
    "dinov2": 1,
    "resnet": 0,
}

LANGUAGE = {
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "num_hidden_layers": 2,
        "ffn_dim": 48,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "init_std": 0.3,
    },
    "t5": {"d_model": 32, "num_layers": 2, "num_decoder_layers": 2, "d_ff": 48, "num_heads": 4, "d_kv": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "llama": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    },
    "bart": {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "max_position_embeddings": 256,
    },
}


def byte_tokenizer(kind: str = "llama") -> PreTrainedTokenizerFast:
    """Bytes as tokens; special tokens stand where the family has them: T5 at the end, BART around, others before."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": PAD, "<s>": BOS, "</s>": EOS} | {c: NUM_SPECIAL + i for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    template = {"t5": "$A </s>", "bart": "<s> $A </s>", "gpt2": "$A"}.get(kind, "<s> $A")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def language_config(kind: str, **options):
    """A language model's configuration, with the byte tokenizer's ids."""
    ids = {"vocab_size": VOCAB_SIZE, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    if kind in ("t5", "bart"):
        ids["decoder_start_token_id"] = PAD if kind == "t5" else EOS
    return AutoConfig.for_model(kind, **ids | LANGUAGE[kind] | options)


def save_language_model(folder: Path, kind: str, seed: int = 0, **options) -> Path:
    """A small random language model with a byte tokenizer."""
    config = language_config(kind, **options)
    torch.manual_seed(seed)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    auto.from_config(config).save_pretrained(folder)
    byte_tokenizer(kind).save_pretrained(folder)
    return folder


def vision_config(kind: str, **options):
    """A vision model's configuration, for images of 28 x 28 in patches of 7."""
    sizes = {} if kind == "resnet" else {"image_size": 28, "patch_size": 7, "initializer_range": 0.1}
    return AutoConfig.for_model(kind, **sizes | VISION[kind] | options)


def save_vision_model(folder: Path, kind: str, seed: int = 0) -> Path:
    """A small random vision model with its image processor."""
    torch.manual_seed(seed)
    AutoModel.from_config(vision_config(kind)).save_pretrained(folder)
    image_processor(kind).save_pretrained(folder)
    return folder


def image_processor(kind: str):
    """The family's own image processor, with PIL."""
    name, options = IMAGE_PROCESSORS[kind]
    return _load_backend_class(name, "pil")(**options)


def save_blip2(folder: Path, kind: str = "opt", seed: int = 0, num_query_tokens: int = 5, **qformer) -> Path:
    """A small random BLIP-2 that sees: queries and ViT are drawn, where BLIP-2's own start is blind."""
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "initializer_range": 0.2,
    }
    tokenizer = byte_tokenizer(kind)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    config = Blip2Config(
        vision_config=vision_config("blip_2_vision_model").to_dict(),
        qformer_config=sizes | qformer,
        text_config=language_config(kind, vocab_size=VOCAB_SIZE + 1).to_dict(),
        num_query_tokens=num_query_tokens,
        initializer_range=0.2,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(seed)
    model = Blip2ForConditionalGeneration(config)
    model.query_tokens.data.normal_()
    model.save_pretrained(folder)
    Blip2Processor(image_processor("blip_2_vision_model"), tokenizer, num_query_tokens).save_pretrained(folder)
    return folder

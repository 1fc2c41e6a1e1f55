"""The recipe of a second miniature base model, whose language model has an encoder and a decoder: a small T5.

It is made from the one that comes with the package, in minutes: tokenizer and vision model are the same, to the last
bit, and the Q-Former, its queries, the language projection and the language model's embeddings start as they are
there. The T5 has the lessons that the Llama had, fewer of them: to write a sentence from keywords, then, together with
the Q-Former, to describe single pictures. Its encoder reads keywords, visual prompts and the prompt; its decoder writes
the text that follows.
"""

from collections.abc import Sequence
from pathlib import Path

from transformers import Blip2ForConditionalGeneration, Blip2Processor, PreTrainedTokenizerFast, T5Config

from mivpg.miniature import BASE_MODEL
from mivpg.miniature.base import Recipe, base_config, make_processor, train
from mivpg.miniature.lessons import TextLesson

RECIPE = Recipe(num_texts=40_000, text_steps=400, num_pictures=10_000, vision_steps=0, language_steps=750)
"""Eight minutes on two cores that have nothing else to do."""


def make_encoder_decoder_base(out: Path, recipe: Recipe | None = None) -> Path:
    """Trains a T5 beside the vision model of the embedded base and writes both as a BLIP-2 folder.

    Args:
        out: A new or empty folder, or one that an interrupted run has begun.
        recipe: How much of everything; the vision model is there, so `vision_steps` is 0.

    Returns:
        `out`, as `make_base` writes it; `recipe.json` comes last, so a folder that has it is whole.

    Raises:
        MivpgError: The folder holds something else.
    """
    return train(out, recipe or RECIPE, start_with_t5, "encoder-decoder")


def start_with_t5(texts: Sequence[TextLesson]) -> tuple[Blip2ForConditionalGeneration, Blip2Processor]:
    """The embedded base with a T5 that knows nothing but its embeddings; texts bring no word that it does not have."""
    base = Blip2ForConditionalGeneration.from_pretrained(BASE_MODEL)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(BASE_MODEL)
    t5 = T5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=320,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        scale_decoder_outputs=False,  # as in T5 1.1
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    model = Blip2ForConditionalGeneration(base_config(tokenizer, t5))
    for name in ("vision_model", "qformer", "language_projection"):
        getattr(model, name).load_state_dict(getattr(base, name).state_dict())
    model.query_tokens.data.copy_(base.query_tokens)
    model.get_input_embeddings().weight.data.copy_(base.get_input_embeddings().weight)
    return model, make_processor(tokenizer)

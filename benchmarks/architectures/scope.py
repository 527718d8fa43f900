"""The model types that docs/architectures.md lists, and why others are left out."""

from __future__ import annotations

from typing import Any

RULES = (
    "Listed is every model type with a class for causal language modelling or for text from images and text, except:",
    "encoders, which also have a class for masked language modelling (BERT and its like with a decoder's head)",
    "encoder–decoders, with text, images or speech on the encoder's side",
    "speech recognition and generation of sound",
    "what cannot predict the next token from text alone, named below with the reason",
)

BY_NAME = {
    "bert-generation": "the decoder of an encoder–decoder",
    "blip": "needs an image",
    "blip-2": "needs an image",
    "diffusion_gemma": "generates by diffusion over a block of tokens",
    "evolla": "needs a protein",
    "gemma4_assistant": "a draft model that reads the activations of another",
    "gemma4_unified_assistant": "a draft model that reads the activations of another",
    "idefics": "needs an image",
    "instructblip": "needs an image",
    "instructblipvideo": "needs a video",
    "kosmos-2": "needs an image",
    "moshi": "generates speech",
    "pi0": "needs the state of a robot",
    "shieldgemma2": "an image classifier",
    "trocr": "the decoder of an encoder–decoder",
    "xlnet": "every token sees those after it",
}


def listed() -> dict[str, str]:
    """Return the model types of the installed transformers that are in scope, with ``text`` or ``wrapper``."""
    from transformers.models.auto import modeling_auto as auto

    wrappers = auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return {
        name: "wrapper" if name in wrappers else "text"
        for name in sorted({*auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *wrappers})
        if not left_out(name)
    }


def left_out(model_type: str) -> str | None:
    """Return why a model type is not listed, or None if it is."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto as auto

    if model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "encoder"
    speech = {
        *auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        *auto.MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES,
        *auto.MODEL_FOR_TEXT_TO_SPECTROGRAM_MAPPING_NAMES,
    }
    if model_type in speech:
        return "speech or sound"
    kind = CONFIG_MAPPING[model_type]
    if model_type in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES or kind.__dict__.get("is_encoder_decoder"):
        return "encoder–decoder"
    return BY_NAME.get(model_type)


def auto_class(model_type: str) -> Any:
    """Return the Auto class that loads checkpoints of a model type."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    # The forward of Llama4ForConditionalGeneration fails in transformers 5.24, even on text.
    if model_type in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and model_type != "llama4":
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM

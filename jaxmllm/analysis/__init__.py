"""Where vision meets language: interventions, attention measures, early output, geometry and sweeps."""

from jaxmllm.analysis.attention import (
    attention_evolution,
    contrastive_attention,
    hellinger,
    image_distribution,
    pre_fusion_layer,
)
from jaxmllm.analysis.edits import (
    at_site,
    blind_image,
    compose,
    erase_image,
    from_layer,
    knockout,
    review_mask,
    scale_heads,
    stack_edits,
    up_to_layer,
    window,
)
from jaxmllm.analysis.fusion import fusion_layers, review_layer
from jaxmllm.analysis.geometry import ImageTokens, geometry, token_boxes
from jaxmllm.analysis.likelihood import score_answers, score_options
from jaxmllm.analysis.pointing import attention_mass, chance, pointing_hit
from jaxmllm.analysis.sweeping import SweepResult, sweep
from jaxmllm.models.boxes import TokenBoxes

__all__ = [
    "ImageTokens",
    "SweepResult",
    "TokenBoxes",
    "at_site",
    "attention_evolution",
    "attention_mass",
    "blind_image",
    "chance",
    "compose",
    "contrastive_attention",
    "erase_image",
    "from_layer",
    "fusion_layers",
    "geometry",
    "hellinger",
    "image_distribution",
    "knockout",
    "pointing_hit",
    "pre_fusion_layer",
    "review_layer",
    "review_mask",
    "scale_heads",
    "score_answers",
    "score_options",
    "stack_edits",
    "sweep",
    "token_boxes",
    "up_to_layer",
    "window",
]

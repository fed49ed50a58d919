"""Configs of the tiny models, as plain data: what a LLaVA config can ask for."""

TEXT = {
    "model_type": "llama",
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
LLAVA = {"model_type": "llava", "image_token_index": 90, "vision_feature_layer": -2}

# Each variant turns on what a config can ask for; (top level, text config, vision config).
VARIANTS = {
    "grouped_queries": ({}, {"num_key_value_heads": 2}, {}),
    "feature_layers": ({"vision_feature_layer": [-2, 1, -1]}, {}, {"hidden_act": "gelu"}),
    "class_token_biases": (
        {"vision_feature_select_strategy": "full", "vision_feature_layer": -1, "multimodal_projector_bias": False},
        {"attention_bias": True, "mlp_bias": True, "head_dim": 16, "hidden_act": "gelu"},
        {},
    ),
    "tied_linear_rope": (
        {"tie_word_embeddings": True, "projector_hidden_act": "relu"},
        {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}},
        {},
    ),
    "llama3_rope": (
        {},
        {
            "num_key_value_heads": 1,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
        {},
    ),
    "yarn_rope": (
        {},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e3, "factor": 4.0, "beta_fast": 8.0,
                             "original_max_position_embeddings": 32}},
        {},
    ),
    "dynamic_rope": (
        {},
        {"max_position_embeddings": 16, "rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e3}},
        {},
    ),
}  # fmt: skip


def config_fields(variant: str) -> dict:
    top, text, vision = VARIANTS[variant]
    return {**LLAVA, **top, "text_config": {**TEXT, **text}, "vision_config": {**VISION, **vision}}

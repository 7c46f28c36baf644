"""A tiny random model, and inputs for it, of any family of the installed transformers.

One table of names for sizes that configurations share does most families; `OVERRIDES` holds what a family needs
beyond it. Nothing is downloaded.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

BATCH, LENGTH, VOCABULARY, IMAGE = 3, 7, 40, 32

# attribute of a configuration -> its tiny value; set where the configuration has the attribute as a number
SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "encoder_hidden_dim", "emb_dim"), 32
    ),
    **dict.fromkeys(
        ("decoder_hidden_size", "hidden_dim", "encoder_hidden_size", "d_embed", "out_hidden_size"), 32
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(
        ("num_decoder_layers", "encoder_layers", "decoder_layers", "layers", "encoder_num_hidden_layers"), 2
    ),
    **dict.fromkeys(("decoder_num_hidden_layers", "num_hidden_groups_", "depth"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(
        ("decoder_attention_heads", "encoder_num_attention_heads", "decoder_num_attention_heads"), 4
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "decoder_num_key_value_heads"), 2),
    **dict.fromkeys(("encoder_num_key_value_heads",), 4),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"), 48
    ),
    **dict.fromkeys(("decoder_intermediate_size", "encoder_intermediate_size", "moe_intermediate_size"), 48),
    **dict.fromkeys(
        ("shared_expert_intermediate_size", "dff", "ffn_hidden_size", "expert_ffn_dim", "d_inner"), 48
    ),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_size", "rotary_dim", "global_head_dim"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2
    ),
    **dict.fromkeys(
        ("vocab_size", "n_vocab", "encoder_vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input"),
        VOCABULARY,
    ),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_source_positions"), 64),
    **dict.fromkeys(("max_target_positions", "max_sequence_length", "max_seq_len"), 64),
    **dict.fromkeys(("embedding_size", "factor_size_"), 16),
    **dict.fromkeys(("image_size",), IMAGE),
    **dict.fromkeys(("projection_dim",), 16),
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("chunk_size", "sliding_window", "attention_window", "local_attention"), 4),
    **dict.fromkeys(("hidden_size_per_layer_input", "lru_width"), 32),
    **dict.fromkeys(("pad_token_id",), 0),
    **dict.fromkeys(("bos_token_id", "decoder_start_token_id", "cls_token_id"), 1),
    **dict.fromkeys(("eos_token_id", "sep_token_id", "forced_eos_token_id"), 2),
    **dict.fromkeys(("mask_token_id", "unk_token_id"), 3),
    "patch_size": 8,
    "type_vocab_size": 2,
    "num_labels": 3,
    "num_mel_bins": 16,
}
# the same where a configuration has one number per stage: first number, and the factor from stage to stage
STAGES: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("hidden_sizes", "embed_dims", "encoder_hidden_sizes", "block_out_channels"), (16, 2)),
    **dict.fromkeys(("neck_hidden_sizes", "decoder_hidden_sizes", "embed_dim", "stem_channels"), (16, 1)),
    **dict.fromkeys(("num_heads", "num_attention_heads", "encoder_attention_heads"), (1, 2)),
    **dict.fromkeys(("depths", "layers", "num_blocks", "encoder_layers", "num_layers", "depth"), (1, 1)),
    **dict.fromkeys(("conv_dim", "stage_conv_dim"), (16, 1)),
}
# names of probabilities: training mode without randomness, so that a sample alone and in its batch see the same model
RANDOM = ("dropout", "drop_rate", "drop_prob", "pdrop", "layerdrop", "drop_path", "jitter", "mask_time_prob",
          "mask_feature_prob", "stochastic_depth")  # fmt: skip

HEADS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", "MODEL_FOR_CTC_MAPPING_NAMES",
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES", "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
    "MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
)  # fmt: skip

OVERRIDES: dict[str, Mapping[str, Any]] = {
    "deepseek_v3": {"n_routed_experts": 4, "num_key_value_heads": 4, "n_group": 2},
    **dict.fromkeys(
        ("deepseek_v2", "axk1"),
        MappingProxyType({"num_key_value_heads": 4, "num_experts_per_tok": 2, "n_routed_experts": 4}),
    ),
    **dict.fromkeys(("bamba", "granitemoehybrid"), MappingProxyType({"mamba_n_heads": 8, "mamba_d_head": 8})),
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "dinov3_vit": {"pos_embed_rescale": None},
    "xlnet": {"d_head": 8},
    "swin": {"window_size": 2, "patch_size": 4, "embed_dim": 16, "num_heads": [1, 2, 4, 8], "image_size": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "bit": {"num_groups": 4},
    "squeezebert": {"embedding_size": 32},
    "xmod": {"default_language": "en_XX"},
    **dict.fromkeys(
        ("autoformer", "informer", "time_series_transformer"),
        MappingProxyType(
            {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "num_time_features": 1}
        ),
    ),
}


# a short text with padding leaves some rows of their attention with nothing to look at: not a number
UNMASKED = ("canine", "led", "longformer", "prophetnet")


class NoModelError(Exception):
    """The family cannot be built tiny here; the message says why."""


def build(family: str, experts: str = "eager") -> tuple[Module, dict[str, Tensor]]:
    """The model of a family in training mode, and a batch of inputs."""
    torch.manual_seed(0)
    config = configuration(family)
    model = model_class(family)._from_config(config, experts_implementation=experts)
    model.train()
    _without_randomness(model)
    return model, inputs_of(model)


def configuration(family: str) -> Any:
    """The family's configuration with every size that we know made tiny."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.for_model(family)
    except Exception as error:
        raise NoModelError(f"no configuration: {error}") from error
    overrides = OVERRIDES.get(family, {})
    return shrink(type(config), config, overrides)


def shrink(kind: type, default: Any, overrides: Mapping[str, Any]) -> Any:
    """A configuration of this kind with tiny sizes; parts that are configurations themselves likewise."""
    known = set(inspect.signature(kind.__init__).parameters) | set(vars(default))
    known = {
        name for name in known if not name.startswith("_") and name not in FIXED and _settable(kind, name)
    }
    given = {name: tiny for name in known if (tiny := _tiny(name, attribute(default, name))) is not None}
    for name in known:
        part = attribute(default, name)
        if name.endswith("_config") and hasattr(part, "to_dict"):
            given[name] = shrink(type(part), part, overrides.get(name, {})).to_dict()
    given.update({name: value for name, value in overrides.items() if not isinstance(value, dict)})
    if "attention_types" in given:
        known -= {"attention_layers"}
    layers = given.get("num_hidden_layers", 2)
    kinds = attribute(default, "layer_types")
    if (
        isinstance(kinds, (list, tuple))
        and kinds
        and _settable(kind, "layer_types")
        and "layer_types" not in given
    ):
        distinct = list(dict.fromkeys(kinds))
        given["layer_types"] = (distinct * layers)[: max(layers, len(distinct))]
        if "num_hidden_layers" in given:
            given["num_hidden_layers"] = len(given["layer_types"])
    if isinstance(attribute(default, "attention_window"), (list, tuple)):
        given["attention_window"] = [4] * layers
    plain = {name: value for name, value in default.to_dict().items() if name in known}
    return kind(**{**plain, **given})


def attribute(config: Any, name: str) -> Any:
    """An attribute of a configuration; None where it has none, or one for each layer."""
    try:
        return getattr(config, name, None)
    except Exception:  # asked for a model's, where its layers differ
        return None


def _settable(kind: type, name: str) -> bool:
    return not isinstance(inspect.getattr_static(kind, name, None), property)


FIXED = frozenset({"transformers_version", "model_type", "dtype", "torch_dtype", "attribute_map"})


def _tiny(name: str, value: Any) -> Any:
    """A tiny value for an attribute, or None to leave it as it is."""
    if isinstance(value, (list, tuple)) and name in STAGES and all(isinstance(v, int) for v in value):
        first, factor = STAGES[name]
        return [first * factor**k for k in range(len(value))]
    if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
        return None
    if value is None:
        return SIZES["vocab_size"] if name == "vocab_size" else None
    if any(word in name for word in RANDOM):
        return type(value)(0)
    if name in SIZES and value:
        return min(SIZES[name], value) if name != "type_vocab_size" else value
    return 4 if name.endswith("_token_id") and value >= VOCABULARY else None


def model_class(family: str) -> Any:
    """The family's model, with the head that most people train it with."""
    import transformers
    from transformers.models.auto import modeling_auto

    for head in HEADS:
        name = getattr(modeling_auto, head).get(family)
        name = name[0] if isinstance(name, (tuple, list)) else name
        found = getattr(transformers, name, None) if name else None
        if found is not None:
            return found
    raise NoModelError("no model class")


def _without_randomness(model: Module) -> None:
    """No dropout whose rate is written into the code, no normalisation over the batch."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name in ("layerdrop", "drop_prob", "dropout", "dropout_p"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()  # in training mode a sample alone is another function


def inputs_of(model: Module) -> dict[str, Tensor]:
    """Random inputs: ids with the last tokens of one text padded, an image or a piece of sound."""
    parameters = inspect.signature(model.forward).parameters
    config: Any = model.config
    inputs: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(1)
    if "input_ids" in parameters and model.main_input_name != "pixel_values":
        inputs["input_ids"] = torch.randint(5, VOCABULARY, (BATCH, LENGTH), generator=generator)
        if "attention_mask" in parameters and config.model_type not in UNMASKED:
            mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
            mask[1, -2:] = 0
            inputs["attention_mask"] = mask
        if "decoder_input_ids" in parameters:
            inputs["decoder_input_ids"] = torch.randint(
                5, VOCABULARY, (BATCH, LENGTH - 2), generator=generator
            )
    if "pixel_values" in parameters and "pixel_values" not in inputs:
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", IMAGE)
        size = (size, size) if isinstance(size, int) else tuple(size)
        channels = getattr(vision, "num_channels", 3)
        inputs["pixel_values"] = torch.randn(BATCH, channels, *size, generator=generator)
    if "input_features" in parameters:
        bins = getattr(config, "num_mel_bins", 16)
        frames = 2 * getattr(config, "max_source_positions", 16)
        inputs["input_features"] = torch.randn(BATCH, bins, frames, generator=generator)
        inputs["decoder_input_ids"] = torch.randint(5, VOCABULARY, (BATCH, LENGTH), generator=generator)
    if "input_values" in parameters:
        inputs["input_values"] = torch.randn(BATCH, 1200, generator=generator)
    if not inputs:
        raise NoModelError(f"inputs {list(parameters)[:4]} are not known here")
    if "use_cache" in parameters:
        inputs["use_cache"] = False  # type: ignore[assignment]
    return inputs


def every_family() -> list[str]:
    """All model types of the installed transformers."""
    configurations = importlib.import_module("transformers.models.auto.configuration_auto")
    return list(configurations.CONFIG_MAPPING_NAMES)

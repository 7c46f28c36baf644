"""Any family of the installed transformers made small, by one way after another until one gives a model that runs.

`families.build` knows the usual names of sizes. Where that does not lead to a model, every width of the family's own
default configuration is divided by the same number, which leaves their ratios as they are. A part of a larger model (a
text tower, a decoder) has no class of its own in the library's tables; it is looked up by its configuration. Inputs are
tried likewise: with and without the image, with the axes in either order.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from conformance.compare import row
from conformance.families import (
    BATCH,
    FIXED,
    HEADS,
    LENGTH,
    RANDOM,
    VOCABULARY,
    NoModelError,
    _without_randomness,
    attribute,
    configuration,
    inputs_of,
)

Inputs = dict[str, Any]
FRAMES = 4


def attempts(family: str, largest: int) -> Iterator[tuple[Module, Inputs]]:
    """Models of a family with inputs that they run on, in training mode; the first is the one to take.

    Raises:
        NoModelError: none was found; the message says what went wrong with the last, or how large it would be.
    """
    reasons: list[str] = []
    for way in (configuration, agreeing, *(lambda f, by=by: scaled(f, by) for by in (16, 8, 4, 32, 1))):
        try:
            config = way(family)
        except Exception as error:
            reasons.append(_line(error))
            continue
        for kind in classes_of(family, config):
            try:
                yield from _runs(kind, config, largest)
            except TimeoutError:
                raise
            except Exception as error:
                reasons.append(_line(error))
    raise NoModelError(reasons[0] if reasons else "no model class")


def _runs(kind: Any, config: Any, largest: int) -> Iterator[tuple[Module, Inputs]]:
    with torch.device("meta"):
        entries = sum(p.numel() for p in kind._from_config(config).parameters())
    if entries > largest:
        raise NoModelError(f"{entries / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    try:
        model = kind._from_config(config, experts_implementation="eager")
    except (TypeError, ValueError):
        model = kind._from_config(config)
    model.train()
    _without_randomness(model)
    model = model.double()
    failed: Exception | None = None
    for make in (inputs_of, inputs_by_name):
        try:
            first = make(model)
        except Exception as error:
            failed = error
            continue
        for inputs in variants(model, first):
            try:
                found = runs_on(model, inputs)
            except TimeoutError:
                raise
            except Exception as error:
                failed = error if failed is None or isinstance(failed, NoModelError) else failed
                continue
            yield model, found
    raise failed or NoModelError("no inputs")


def runs_on(model: Module, inputs: Inputs) -> Inputs:
    """The inputs, with as many image tokens as the model asks for; raises what the forward pass raises."""
    inputs = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()
    }
    try:
        out = model(**inputs)
    except ValueError as error:
        wanted = re.search(r"tokens: 0, features:? (\d+)", str(error))
        token = next(
            (getattr(model.config, n, None) for n in _IMAGE_TOKENS if getattr(model.config, n, None)), None
        )
        if wanted is None or token is None or int(wanted[1]) % BATCH:
            raise
        images = torch.full((BATCH, int(wanted[1]) // BATCH), token)
        inputs = {**inputs, "input_ids": torch.cat([images, inputs["input_ids"]], 1)}
        inputs.pop("attention_mask", None)
        out = model(**inputs)
    model(**row(inputs, 0, BATCH))
    rows = [
        x for x in _leaves(out) if x.is_floating_point() and x.requires_grad and x.dim() and len(x) == BATCH
    ]
    if not rows:
        raise NoModelError("no output has one row per sample")
    params = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(sum(x.sum() for x in rows), params, allow_unused=True)
    if not all(bool(torch.isfinite(g).all()) for g in found if g is not None):
        raise NoModelError("the model's own gradients are not finite")
    return inputs


_IMAGE_TOKENS = ("image_token_id", "image_token_index", "audio_token_id", "audio_token_index")


def _leaves(out: Any) -> list[Tensor]:
    out = out.to_tuple() if hasattr(out, "to_tuple") else out
    return [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor)]


# --- the model ---


def classes_of(family: str, config: Any) -> list[Any]:
    """Model classes for a configuration: those of the library's tables, then others that name it as theirs."""
    modeling_auto = importlib.import_module("transformers.models.auto.modeling_auto")
    transformers = importlib.import_module("transformers")
    found: list[Any] = []
    for head in (*HEADS, "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"):
        names = getattr(modeling_auto, head, {}).get(family, ())
        for name in (names,) if isinstance(names, str) else names:
            found.append(getattr(transformers, name, None))
    try:
        modeling = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    except ImportError:
        modeling = None
    own = [
        kind
        for name, kind in vars(modeling).items()
        if inspect.isclass(kind) and getattr(kind, "config_class", None) is type(config)
        and "PreTrained" not in name and hasattr(kind, "_from_config") and kind.__module__ == modeling.__name__
    ] if modeling else []  # fmt: skip
    own = sorted(own, key=lambda kind: ("For" not in kind.__name__, len(kind.__name__)))
    return list(dict.fromkeys(kind for kind in (*found, *own) if hasattr(kind, "_from_config")))[:3]


def agreeing(family: str) -> Any:
    """The small configuration with the sizes that follow from others put right, in all of its parts."""
    config = configuration(family)
    for part in _parts(config):
        heads, width = (attribute(part, name) for name in ("num_attention_heads", "hidden_size"))
        if attribute(part, "pad_token_id") is None:
            part.pad_token_id = 0
        if isinstance(heads, int) and isinstance(width, int):
            if attribute(part, "num_key_value_heads") is not None:
                part.num_key_value_heads = heads
            if attribute(part, "head_dim") is None:
                part.head_dim = width // heads
            rope = attribute(part, "rope_parameters")
            if isinstance(rope, dict):
                half = int(part.head_dim * rope.get("partial_rotary_factor", 1)) // 2
                rope["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
        if attribute(part, "upsample_groups") is not None:
            part.upsample_groups = width
    return config


def _parts(config: Any) -> list[Any]:
    """A configuration and those of its parts."""
    inside = [v for k, v in vars(config).items() if k.endswith("_config") and hasattr(v, "to_dict")]
    return [config, *(part for one in inside for part in _parts(one))]


LAYERS = re.compile(r"num_(\w+_)?(layers|blocks)|n_layers?|(\w+_)?layers|num_\w+_layers|depth|num_stages_")
KEPT = re.compile(
    r".*(image_size|patch_size|num_channels|in_channels|heads?$|kernel|stride|dilation|rate|mel_bins|token_id|"
    r"token_index|_type|seed|num_labels|num_frames|window|groups?$|factor|temporal|tubelet|scale).*"
)


def scaled(family: str, by: int) -> Any:
    """The family's default configuration with two layers, a small vocabulary and every width divided by `by`."""
    from transformers import AutoConfig

    default = AutoConfig.for_model(family)
    return type(default)(**_divided(default, by))


def _divided(config: Any, by: int) -> dict[str, Any]:
    given = {k: v for k, v in config.to_dict().items() if k not in FIXED and not k.startswith("_")}
    count = next((v for k, v in given.items() if k == "num_hidden_layers" and isinstance(v, int)), None)
    for name, value in given.items():
        part = attribute(config, name)
        if name.endswith("_config") and hasattr(part, "to_dict"):
            given[name] = {**_divided(part, by), "model_type": part.model_type}
        else:
            given[name] = _smaller(name, value, by, count)
    return given


def _smaller(name: str, value: Any, by: int, layers: int | None) -> Any:
    if isinstance(value, dict):
        return {k: _smaller(k, v, by, None) for k, v in value.items()} if "rope" in name else value
    if isinstance(value, (list, tuple)):
        if layers and len(value) == layers and layers > 2:
            distinct = list(dict.fromkeys(value)) if all(isinstance(v, (str, int)) for v in value) else []
            value = (distinct * 2)[:2] if distinct else list(value)[:2]
        whole = all(isinstance(v, int) and not isinstance(v, bool) for v in value)
        if name == "mrope_section" or (whole and value and min(value) >= 64 and not KEPT.fullmatch(name)):
            return [max(v // by, 1) for v in value]
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    if any(word in name for word in RANDOM):
        return type(value)(0)
    if isinstance(value, float):
        return value
    if "vocab_size" in name and "type" not in name:
        return min(value, VOCABULARY) if value else value
    if name.endswith("_token_id"):
        return value if 0 <= value < VOCABULARY else 4
    if LAYERS.fullmatch(name) and "dense" not in name:
        return min(value, 2)
    if "experts" in name and "per" not in name:
        return min(value, 16)
    if KEPT.fullmatch(name) or value < 64 or value % by:
        return value
    return value // by


# --- its inputs ---


def variants(model: Module, inputs: Inputs) -> Iterator[Inputs]:
    """The inputs themselves, then without the image or sound, then with axes in another order."""
    yield inputs
    if "input_ids" in inputs:
        yield {
            **inputs,
            "input_ids": _ids(model.config).repeat(1, 5),
            "attention_mask": torch.ones(BATCH, 5 * LENGTH),
        }
    others = [k for k in inputs if k.startswith(("pixel_values", "input_features", "input_values"))]
    if "input_ids" in inputs and others:
        yield {k: v for k, v in inputs.items() if k not in others}
    if "pixel_values" in inputs:
        image = inputs["pixel_values"]
        frames = getattr(model.config, "num_frames", FRAMES)
        yield {**inputs, "pixel_values": image[:, None].expand(-1, frames, -1, -1, -1).clone()}
        for channels in (3, 1, 16):
            yield {**inputs, "pixel_values": torch.randn(BATCH, channels, 64, 64)}
        yield {**inputs, "pixel_values": torch.randn(BATCH, 3, 224, 224)}
    if "input_features" in inputs or "input_values" in inputs:
        name = "input_features" if "input_features" in inputs else "input_values"
        rest = {k: v for k, v in inputs.items() if k != name}
        lengths = {64, 100, 2 * getattr(model.config, "max_source_positions", 64)}
        for bins in dict.fromkeys((*_widths(model.config), 80, 128, 16)):
            for length in sorted(lengths):
                for shape in ((BATCH, length, bins), (BATCH, bins, length)):
                    for given in (rest, {k: v for k, v in rest.items() if k != "decoder_input_ids"}):
                        mask = torch.ones(BATCH, length, dtype=torch.long)
                        masks = [
                            k for k in ("input_features_mask", "attention_mask") if k in _parameters(model)
                        ]
                        yield {**given, name: torch.randn(shape), **dict.fromkeys(masks[:1], mask)}
                        yield {**given, name: torch.randn(shape)}
        yield {**rest, name: torch.randn(BATCH, 1, 1200)}


def _widths(config: Any) -> list[int]:
    """What the configuration or one of its parts says of the width of a sound's frames."""
    names = ("num_mel_bins", "feature_size", "input_feat_per_channel", "feature_projection_input_dim", "n_mels",
             "input_dim", "input_size")  # fmt: skip
    parts = [config, *(v for k, v in vars(config).items() if k.endswith("_config") and hasattr(v, "to_dict"))]
    return [v for part in parts for n in names if isinstance(v := getattr(part, n, None), int)]


def inputs_by_name(model: Module) -> Inputs:
    """Inputs for the arguments without a default, or for the first whose name says what it is."""
    parameters = _parameters(model)
    needed = [k for k, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    known = [k for k in parameters if k in NAMED]
    chosen = list(
        dict.fromkeys([*needed, *([] if needed else known[:1]), *(k for k in ALONGSIDE if k in parameters)])
    )
    unknown = [name for name in chosen if name not in NAMED]
    if unknown or not chosen:
        raise NoModelError(f"inputs {unknown or list(parameters)[:4]} are not known here")
    config = getattr(model.config, "text_config", model.config)
    vision = getattr(model.config, "vision_config", model.config)
    inputs = {name: NAMED[name](config) for name in chosen}
    for name in ("grid_thw", "image_grid_thw"):  # patches of all images in one dimension
        if name in chosen:
            inputs[name] = _grid(vision)
            inputs["pixel_values" if "pixel_values" in parameters else "hidden_states"] = _packed(vision)
    return inputs


def _parameters(model: Module) -> Any:
    return inspect.signature(model.forward).parameters


def _ids(config: Any) -> Tensor:
    return torch.randint(5, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))


def _grid(config: Any) -> Tensor:
    """Height and width of each image in patches, and its number of frames: as many as make one row of output."""
    side = attribute(config, "spatial_merge_size") or 2
    return torch.tensor([[1, side, side]] * BATCH)


def _packed(config: Any) -> Tensor:
    """The patches of all images one after the other."""
    names = ("in_channels", "in_chans", "num_channels")
    channels = next((v for n in names if isinstance(v := attribute(config, n), int)), 3)
    entries = (
        channels
        * (attribute(config, "temporal_patch_size") or 1)
        * (attribute(config, "patch_size") or 1) ** 2
    )
    return torch.randn(int(_grid(config).prod(1).sum()), entries)


def _flattened(config: Any) -> Tensor:
    """Patches with their row and column in front."""
    side = attribute(config, "patch_size") or 16
    place = torch.arange(1, 5).expand(BATCH, 2, 4).mT
    return torch.cat(
        [place, torch.randn(BATCH, 4, side * side * (attribute(config, "num_channels") or 3))], 2
    )


def _width(config: Any) -> int:
    names = ("hidden_size", "d_model", "hidden_dim", "embed_dim", "n_embd", "dim")
    return next((v for n in names if isinstance(v := attribute(config, n), int)), 32)


def _states(config: Any) -> Tensor:
    return torch.randn(BATCH, LENGTH, _width(config))


def _image(config: Any) -> Tensor:
    size = getattr(getattr(config, "vision_config", config), "image_size", 32)
    size = (size, size) if isinstance(size, int) else tuple(size or (32, 32))
    return torch.randn(BATCH, getattr(config, "num_channels", 3) or 3, *size)


def _video(config: Any) -> Tensor:
    image = _image(config)
    return image[:, None].expand(-1, getattr(config, "num_frames", FRAMES), -1, -1, -1).clone()


def _past(config: Any) -> int:
    return (attribute(config, "context_length") or 16) + max(attribute(config, "lags_sequence") or [0])


def _series(config: Any) -> Tensor:
    length = _past(config)
    channels = getattr(config, "num_input_channels", None)
    return torch.randn(BATCH, length, channels) if channels else torch.randn(BATCH, length)


NAMED: dict[str, Callable[[Any], Any]] = {
    "input_ids": _ids,
    "decoder_input_ids": _ids,
    "input": _ids,
    "inputs_embeds": _states,
    "hidden_states": _states,
    "encoder_hidden_states": _states,
    "query_embeds": _states,
    "action_embeds": _states,
    "pixel_values": _image,
    "prompt_pixel_values": _image,
    "prompt_masks": _image,
    "pixel_values_videos": _video,
    "past_values": _series,
    "past_values_padding": lambda c: torch.zeros(BATCH, getattr(c, "context_length", 16)),
    "freq": lambda c: torch.zeros(BATCH, 1, dtype=torch.long),
    "bbox": lambda c: torch.zeros(BATCH, LENGTH, 4, dtype=torch.long),
    "states": lambda c: torch.randn(BATCH, LENGTH, c.state_dim),
    "actions": lambda c: torch.randn(BATCH, LENGTH, c.act_dim),
    "rewards": lambda c: torch.randn(BATCH, LENGTH, 1),
    "returns_to_go": lambda c: torch.randn(BATCH, LENGTH, 1),
    "timesteps": lambda c: torch.arange(LENGTH).expand(BATCH, -1),
    "task_inputs": _ids,
    "attention_mask": lambda c: torch.ones(BATCH, LENGTH, dtype=torch.long),
    "input_features": lambda c: torch.randn(BATCH, 64, 80),
    "input_features_mask": lambda c: torch.ones(BATCH, 64, dtype=torch.long),
    "input_values": lambda c: torch.randn(BATCH, 1, 1200),
    "audio_values": lambda c: torch.randn(BATCH, 1, 1200),
    "spectrogram": lambda c: torch.randn(BATCH, 20, getattr(c, "model_in_dim", 80)),
    "pixel_attention_mask": lambda c: torch.ones(BATCH, 16, dtype=torch.long),
    "spatial_shapes": lambda c: torch.tensor([[4, 4]] * BATCH),
    "text_embeds": _states,
    "use_cache": lambda c: False,
    "grid_thw": _grid,
    "flattened_patches": _flattened,
    "qformer_input_ids": _ids,
    "visual_feats": lambda c: torch.randn(BATCH, 4, c.visual_feat_dim),
    "visual_pos": lambda c: torch.rand(BATCH, 4, c.visual_pos_dim),
    "audio_mel": lambda c: torch.randn(BATCH, 64, c.input_feat_size),
    "audio_mel_mask": lambda c: torch.zeros(BATCH, 64, dtype=torch.bool),
    "context": _states,
    "mask": lambda c: torch.ones(BATCH, LENGTH, dtype=torch.long),
    "query_length": lambda c: LENGTH,
    "noise_embeds": _states,
    "context_hidden_states": _states,
    "past_time_features": lambda c: torch.randn(BATCH, _past(c), c.num_time_features),
    "past_observed_mask": lambda c: torch.ones(BATCH, _past(c)),
    "future_time_features": lambda c: torch.randn(BATCH, c.prediction_length, c.num_time_features),
    "future_values": lambda c: torch.randn(BATCH, c.prediction_length),
    "pixel_position_ids": lambda c: torch.stack(torch.meshgrid(*[torch.arange(4)] * 2), -1).flatten(0, 1).expand(
        BATCH, -1, -1
    ),
    "marks": _ids,
}  # fmt: skip
ALONGSIDE = (  # what a model with a default for it still needs
    "bbox", "timesteps", "use_cache", "actions", "rewards", "returns_to_go", "visual_feats", "visual_pos",
    "task_inputs", "future_values",
)  # fmt: skip


def _line(error: Exception) -> str:
    return " ".join(str(error).split())

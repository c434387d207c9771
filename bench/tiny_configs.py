"""Tiny configurations of the architectures of `transformers`, made from their defaults without knowing any of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

HEADS = (  # mappings of AutoModel classes; the first that has an architecture gives the class with a head
    "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "IMAGE_TEXT_TO_TEXT", "SPEECH_SEQ_2_SEQ", "CTC",
    "IMAGE_CLASSIFICATION", "OBJECT_DETECTION", "SEMANTIC_SEGMENTATION", "UNIVERSAL_SEGMENTATION", "DEPTH_ESTIMATION",
    "AUDIO_CLASSIFICATION", "VIDEO_CLASSIFICATION", "SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "PRETRAINING",
    "MULTIMODAL_LM", "ZERO_SHOT_IMAGE_CLASSIFICATION", "ZERO_SHOT_OBJECT_DETECTION", "TEXT_TO_WAVEFORM",
    "TEXT_TO_SPECTROGRAM", "TIME_SERIES_PREDICTION", "KEYPOINT_MATCHING", "KEYPOINT_DETECTION", "MASK_GENERATION",
)  # fmt: skip
_LAYERS = re.compile(r"(.*_)?(n_|num_)?(layers?|blocks|depth|repeats)$|(.*_)?num_.*_(layers|blocks)$|.*_num_layers$")
_NOT_LAYERS = re.compile(
    r"(.*_)?(shared?|feat_extract|start|index|indices|types?|every|per|interval|freq|skip|first|last|ids?|norm|scale)(_.*)?"
)
_FEW = 4  # layers, so that those of different types are there
_EXPERTS = re.compile(r"(num_|n_)?(\w+_)?experts$|num_local_experts|moe_num_experts")
_CHOSEN = re.compile(r".*(experts_per_tok(en)?|top_?k|topk|experts_per_token|num_selected_experts)(_\w+)?$")
_GROUPS = re.compile(r"n_group|topk_group|num_expert_groups?|n_groups_experts")
_WIDTH = re.compile(
    r".*(hidden|dim|d_model|d_ff|d_kv|ffn|rank|width|intermediate|embed|n_embd|n_inner|channels|features|inner|d_inner"
    r"|projection|bottleneck|d_state|state_size|emb_size|hidden_sizes|filters|lora|planes|conv_dim|units).*"
)
_NOT_WIDTH = re.compile(
    r".*(image|patch|kernel|window|stride|vocab|layers|heads|token|frame|pool|position|groups?|ratio|num_channels|eps"
    r"|in_channels|input_channels|out_channels_num|idx|ids?$|max_|num_mel|depth|dropout|types?$|act|every|interval"
    r"|times|num_(?!.*(features|channels|filters|units))|sampling|hop|fft|mel|chunk|block_size|scale|prob|dims_per"
    r"|expand|mult|num_dims|n_dims|ndim|dilation|block_rows).*"
)


def architectures() -> Iterator[tuple[str, str]]:
    """Yield model types with the names of their classes: the one with a head, and the base model."""
    from transformers.models.auto import modeling_auto as auto

    def first(mapping: dict[str, Any], model_type: str) -> str | None:
        found = mapping.get(model_type)
        return found if isinstance(found, str) or found is None else found[0]

    heads = [getattr(auto, f"MODEL_FOR_{name}_MAPPING_NAMES") for name in HEADS]
    for model_type in sorted({*auto.MODEL_MAPPING_NAMES, *(key for mapping in heads for key in mapping)}):
        names = [next((name for name in (first(m, model_type) for m in heads) if name), None)]
        names.append(first(auto.MODEL_MAPPING_NAMES, model_type))
        for name in dict.fromkeys(name for name in names if name):
            yield model_type, name


def tiny_model(class_name: str, model_type: str, most: int = 12_000_000) -> Any:
    """Return a model of random weights whose configuration was shrunk until it has at most `most` weights.

    Raises:
        Exception: no shrunk configuration builds; the last error.
    """
    import torch
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    cls = getattr(transformers, class_name)
    config_class = cls.config_class or CONFIG_MAPPING[model_type]
    if getattr(config_class, "model_type", None) != model_type:
        config_class = CONFIG_MAPPING[model_type]
    last: Exception | None = None
    for factor in (16, 32, 8, 4, 2, 1):
        for positions in (True, False):
            try:
                config = tiny_config(config_class, factor, positions=positions)
                with torch.device("meta"):
                    count = sum(p.numel() for p in cls._from_config(config).parameters())
                if count > most:
                    raise MemoryError(f"{count} weights with widths divided by {factor}")
                return cls._from_config(tiny_config(config_class, factor, positions=positions))
            except MemoryError as error:
                last = last or error
                if factor < 16:
                    break
            except Exception as error:  # whatever a configuration that does not fit raises
                last = error
    raise last or RuntimeError("no configuration")


def tiny_config(config_class: type, factor: int, *, positions: bool = True, inside: Any = None) -> Any:
    """Return a configuration of a class with few layers and experts and widths divided by a factor.

    Args:
        config_class: of the configuration.
        factor: by which widths are divided.
        positions: whether tables of positions are cut to 64.
        inside: the instance whose values are shrunk, for a configuration inside another; None for the defaults.
    """
    from transformers import PreTrainedConfig

    default = config_class() if inside is None else inside
    layers = _count_of_layers(default)
    changed: dict[str, Any] = {}
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            changed[name] = tiny_config(type(value), factor, positions=positions, inside=value)
        elif not name.startswith("_"):
            new = _shrunk(name, value, factor, layers, positions)
            if new is not value:
                changed[name] = new
    keep = {
        name: value
        for name, value in default.to_diff_dict().items()
        if inside is not None and name not in changed and name not in ("model_type", "transformers_version")
    }
    keep = {name: value for name, value in keep.items() if not isinstance(value, dict) or "model_type" not in value}
    return config_class(**keep, **changed)


def _count_of_layers(config: Any) -> int | None:
    for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None


def _shrunk(name: str, value: Any, factor: int, layers: int | None, positions: bool) -> Any:
    if isinstance(value, bool) or value is None or isinstance(value, (str, float, dict)):
        return value
    if isinstance(value, (list, tuple)):
        if layers and len(value) == layers and layers > _FEW:
            return type(value)(_kept(value)[:_FEW])
        if value and all(type(v) is int for v in value):
            if re.search(r"depths|num_blocks|layers|num_layers", name) and not re.search("out|indices|strid", name):
                return type(value)(min(v, _FEW) for v in value)
            if _is_width(name):
                return type(value)(_divided(v, factor) for v in value)
        return value
    if type(value) is not int:
        return value
    if name == "vocab_size":
        return min(value, 320)
    if name == "pad_token_id":
        return min(value, 1)
    if positions and re.fullmatch(
        r"max_position_embeddings|n_positions|max_source_positions|max_target_positions", name
    ):
        return min(value, 64)
    if _EXPERTS.fullmatch(name):
        return min(value, 4)
    if _CHOSEN.fullmatch(name):
        return min(value, 2)
    if _GROUPS.fullmatch(name):
        return min(value, 1)
    if name == "first_k_dense_replace":
        return min(value, 1)
    if _LAYERS.fullmatch(name) and not _NOT_LAYERS.fullmatch(name):
        return min(value, _FEW)
    return _divided(value, factor) if _is_width(name) else value


def _kept(values: Any) -> list[Any]:
    """Return the values with one of each kind first, so that a few of them show all."""
    firsts = [i for i, value in enumerate(values) if value not in values[:i]]
    return [values[i] for i in [*firsts, *(i for i in range(len(values)) if i not in firsts)]]


def _is_width(name: str) -> bool:
    return _WIDTH.fullmatch(name) is not None and _NOT_WIDTH.fullmatch(name) is None


def _divided(value: int, factor: int) -> int:
    return max(value // factor, 4) if value >= 16 and value % factor == 0 else value

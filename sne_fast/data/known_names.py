"""Names by which tensors of state_dicts and files are known not to be weights; data for `weight_entries`.

A module says which of its tensors are parameters. A file does not, so buffers are known by the names that libraries
give them; where a parameter could bear the name too, the values must look like the buffer's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache

import torch
from torch import Tensor

from .tied_names import has_plain_values

__all__ = [
    "WRAPPER_PARTS",
    "buffer_by_name",
    "counter_by_name",
    "is_flattened",
    "is_optimiser_state",
    "is_quantisation_record",
    "is_weight_name",
    "parameter_left_out",
]

WRAPPER_PARTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Parts of names that `torch.compile`, FSDP and activation checkpointing add, wherever they stand."""

_MASK = re.compile(r"(^|\.|_)(masks?|masked_bias|tril|triu)$")
_SINUSOIDS = re.compile(
    r"(^|\.)(pe|pos_idx_to_embed|pos_enc|pos_encoding|position(al)?_encoding|position_embedding|pos(ition)?_table)$"
)

_EITHER = (
    ("correction of a router", re.compile(r"(^|\.)(e_score_correction_bias|balancing_biases)$")),
    ("position table", re.compile(r"(^|\.)shared_(image_)?embedding\.positional_embedding$")),
)
"""What some classes of a family hold as a parameter, others as a buffer."""

_BUFFERS: tuple[tuple[str, re.Pattern[str]], ...] = (
    (
        "rotary frequency",
        re.compile(r"(^|\.|_)(inv_freq|freqs_(cis|cos|sin)|original_inv_freq|timestep_embeddings?\.\d+\.freqs)$"),
    ),
    ("rotary table", re.compile(r"(^|\.|_)((cos|sin)_(cached|table)|(cached|table)_(cos|sin))$")),
    ("position table", re.compile(r"(^|\.)(relative_coords_table|positional_encoding_gaussian_matrix|_float_tensor)$")),
    ("observer value", re.compile(r"(^|\.)(activation_post_process|\w+_fake_quant)(\.|_\d+\.)")),
    ("base of an orthogonal weight", re.compile(r"(^|\.)parametrizations\.\w+\.\d+\.base$")),
    ("spectral norm vector", re.compile(r"(^|\.)(weight_u|parametrizations\.\w+\.\d+\._[uv])$")),
    (
        "codebook statistic",
        re.compile(r"(^|\.)(_?ema_cluster_size|cluster_(size|usage)|embed_(avg|sum)|init(t?ed|ialized))$"),
    ),
    *_EITHER,
    ("bias of outputs that is no parameter", re.compile(r"(^|\.)final_logits_bias$")),
    ("scale of a layer that is no parameter", re.compile(r"(^|\.)layer_scalar$")),
    ("weights of a loss", re.compile(r"(^|\.)empty_weight$")),
    ("probability of a mask", re.compile(r"(^|\.)attn_mask_probs$")),
    ("integer form of a weight", re.compile(r"(^|\.)(weight|bias)_integer$")),
    ("scale of integers", re.compile(r"(^|\.)((weight|bias|fc|act|norm)_scaling_factor|LayerNorm\.shift)$")),
    ("slopes of attention", re.compile(r"(^|\.)alibi(_slopes|_bias)?$")),
    ("attention decay", re.compile(r"(^|\.)(slope_rate|query_decay|key_decay|diagonal_decay|n(um)?_points_scale)$")),
    ("range of activations", re.compile(r"(^|\.)((input|output)_(min|max)|act_range|x_(min|max))$")),
    (
        "diffusion schedule",
        re.compile(
            r"(^|\.)(alphas_cumprod(_prev)?|sqrt_(recip(m1)?_)?(one_minus_)?alphas(_cumprod)?"
            r"|(sqrt_|log_)one_minus_alphas(_cumprod)?|posterior_(variance|log_variance_clipped|mean_coef[12])"
            r"|lvlb_weights)$"
        ),
    ),
    ("normalisation constant", re.compile(r"(^|\.)((pixel|image|norm|latent)_(mean|std)|global_(mean|invstd))$")),
    ("audio filter", re.compile(r"(^|\.)(mel_scale\.fb|spectrogram\.window|hann_window|mel_filters|mel_basis)$")),
    ("anchor table", re.compile(r"(^|\.)(anchors|anchor_grid|anchor_points)$")),
)

_BESIDE: tuple[tuple[str, str, str], ...] = (
    ("beta", "eps", "constant of an activation"),
    ("eps", "beta", "constant of an activation"),
    ("betas", "alphas_cumprod", "diffusion schedule"),
    ("alphas", "alphas_cumprod", "diffusion schedule"),
    ("queue", "queue_ptr", "queue of keys"),
    ("embed", "embed_avg", "codebook of averages"),
)
"""Own names of buffers, the tensor beside them that tells that they are none of the weights, and what they are."""

_COUNTER = re.compile(
    r"(^|\.|_)(num_batches_tracked|num_updates|n_averaged|steps?|initted|epoch|iteration|version|ptr|strides?|padding|dilation"
    r"|\w*(idxs?|ids|index|indices|indexes|rng_state|lengths?|shapes?|sizes?|counts?|offsets?|buckets?))$"
)
_WEIGHT = re.compile(
    r"^(\w+_)?(q|u?int\d+)?(weights?|kernel|bias(es)?|embeddings?|w_q|in_proj|out_proj)(_\w+)?$", re.IGNORECASE
)
_NOT_WEIGHT = re.compile(r"(loss|class|sample|pos)_weights?$")
_WHOLE_WEIGHT = re.compile(r"^(\w+_)?(weights?|kernel|bias)$", re.IGNORECASE)

_OPTIMISER_STATE = re.compile(
    r"(^|\.)(exp_avg|exp_avg_sq|exp_avg_diff|exp_inf|max_exp_avg_sq|max_exp_avg_sqs|momentum_buffer|square_avg|acc_delta"
    r"|grad_avg|exp_avg_sq_(row|col)|slow_buffer)$|(^|\.)(optimizers?|optimisers?|optim)\.(\d+\.)?(state|param_groups)\."
)
_FLATTENED = re.compile(r"(^|\.)_?flat_param(_\d+)?$")
_QUANTISATION = re.compile(
    r"(^|\.)((input|output|act|activation|qkv|q|k|v|prob|kv_cache)_(scale|scales|zero_point|global_scale|scale_inv)"
    r"|weight_format|scaled_fp8)$"
)


def parameter_left_out(name: str) -> str | None:
    """Return what a parameter is called that classes of its family hold as a parameter or as a buffer, else None.

    Files do not say of which class they are, so it is left out everywhere.
    """
    return next((what for what, pattern in _EITHER if pattern.search(name)), None)


def buffer_by_name(name: str, tensor: Tensor, tensors: Mapping[str, Tensor]) -> str | None:
    """Return what a floating tensor of a state_dict is called if it is known to be a buffer, else None.

    Args:
        name: its full name.
        tensor: its values, looked at for names that a parameter may bear too.
        tensors: all tensors by name, some of which tell what stands beside them.
    """
    own = name.rpartition(".")[2]
    base = name.removesuffix(own)
    known = _known_buffer(name) or next((what for o, b, what in _BESIDE if o == own and base + b in tensors), None)
    if known is not None:
        return known
    shape = tensor.shape
    square = own == "bias" and len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3] > 1
    if (_MASK.search(name) or square) and _looks(tensor, _two_values):
        return "mask"
    if own in ("cos", "sin") and _are_circle(tensors.get(f"{base}cos"), tensors.get(f"{base}sin")):
        return "rotary table"
    if _SINUSOIDS.search(name) and _looks(tensor, _sinusoids):
        return "position table"
    return None


@lru_cache(1 << 16)
def _known_buffer(name: str) -> str | None:
    return next((what for what, pattern in _BUFFERS if pattern.search(name)), None)


@lru_cache(1 << 16)
def counter_by_name(name: str) -> bool:
    """Return whether integers of this name are counters or indices."""
    return _COUNTER.search(name) is not None


@lru_cache(1 << 16)
def is_weight_name(name: str, *, whole: bool = False) -> bool:
    """Return whether the last part of a name is one that weights have, such as `weight_ih_l0` or `qweight`.

    With `whole`, only if nothing follows, unlike in `kernel_size`.
    """
    own = name.rpartition(".")[2]
    return (_WHOLE_WEIGHT if whole else _WEIGHT).match(own) is not None and _NOT_WEIGHT.search(own) is None


@lru_cache(1 << 16)
def is_flattened(name: str) -> bool:
    """Return whether a tensor of this name joins the parameters of several layers."""
    return _FLATTENED.search(name) is not None


@lru_cache(1 << 16)
def is_optimiser_state(name: str) -> bool:
    """Return whether a tensor of this name belongs to an optimiser."""
    return _OPTIMISER_STATE.search(name) is not None


def is_quantisation_record(name: str) -> bool:
    """Return whether a tensor of this name says how a quantised layer treats its inputs and outputs."""
    return _QUANTISATION.search(name) is not None


def _looks(tensor: Tensor, like: Callable[[Tensor], bool]) -> bool:
    """Return whether plain values satisfy `like`; without values the name alone decides."""
    if not has_plain_values(tensor):
        return True
    with torch.no_grad():
        return like(tensor.detach().float())


def _are_circle(cosines: Tensor | None, sines: Tensor | None) -> bool:
    """Return whether two tensors are the cosines and sines of the same angles."""
    if cosines is None or sines is None or cosines.shape != sines.shape:
        return False
    return _looks(cosines, lambda c: _looks(sines, lambda s: bool(((c * c + s * s - 1).abs() < 0.02).all())))


def _two_values(values: Tensor) -> bool:
    low, high = values.min(), values.max()
    return bool(((values == low) | (values == high)).all())


def _sinusoids(values: Tensor) -> bool:
    """Return whether the first row is sin 0 and cos 0, and no value is beyond 1."""
    first = values.reshape(-1, values.shape[-1])[0] if values.ndim else values.reshape(1)
    zero_or_one = bool(((first == 0) | (first == 1)).all()) and bool((first == 1).any())
    return zero_or_one and float(values.abs().max()) <= 1 + 1e-3

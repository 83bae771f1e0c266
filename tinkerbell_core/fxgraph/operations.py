"""The list of operations that a graph may use, and the parameters of each. `resolve` maps them to functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["operand", "node", "nodes", "dims", "flag", "number", "dtype", "word", "index", "attribute", "unset"]

DTYPES = frozenset({"float16", "bfloat16", "float32", "float64", "int8", "uint8", "int16", "int32", "int64", "bool"})
WORDS = frozenset({"none", "mean", "sum", "batchmean", "trunc", "floor", "fro"})
ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device", "T", "mT", "values", "indices"})


@dataclass(frozen=True, slots=True)
class Parameter:
    """many: whether it takes all remaining positional arguments."""

    name: str
    kind: Kind
    required: bool
    many: bool


# kind → the names of its parameters; every other parameter is an operand: a node or a number
_KINDS: dict[Kind, str] = {
    "node": "condition target mask index indices src",
    "nodes": "tensors",
    "dims": "dim dims size shape sizes start_dim end_dim dim0 dim1 split_size repeats shifts",
    "flag": "keepdim descending unbiased largest sorted stable log_target",
    "number": "alpha beta threshold delta eps p k n diagonal correction negative_slope chunks length q _stacklevel",
    "dtype": "dtype",
    "word": "reduction rounding_mode",
    "index": "item",
    "attribute": "attribute",
    # torch.fx writes these even if nobody set them; only None, False and the device of a tensor are allowed
    "unset": "inplace out size_average reduce device layout requires_grad pin_memory memory_format non_blocking copy",
}
_KIND_OF: dict[str, Kind] = {name: kind for kind, names in _KINDS.items() for name in names.split()}

# "names: parameters"; ? marks an optional parameter, * takes the rest. For torch.<name> and the method of that name
_BOTH = """
abs absolute exp expm1 exp2 log log1p log2 log10 sqrt rsqrt square neg negative positive reciprocal sign: input
sin cos tan asin acos atan sinh cosh tanh sigmoid relu erf floor ceil trunc frac: input
isnan isinf isfinite logical_not bitwise_not detach t numel: input
clone: input memory_format?
round: input
add sub subtract: input other alpha?
mul multiply true_divide floor_divide remainder fmod maximum minimum fmax fmin: input other
eq ne lt le gt ge not_equal less less_equal greater greater_equal: input other
logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor: input other
atan2 logaddexp logaddexp2 xlogy dot matmul mm mv bmm outer: input other
div divide: input other rounding_mode?
pow: input exponent
sum mean nansum nanmean: input dim? keepdim? dtype? out?
amax amin all any argmax argmin: input dim? keepdim?
max min median: input dim? keepdim? other?
count_nonzero: input dim?
prod: input dim? keepdim? dtype?
logsumexp: input dim keepdim?
std var: input dim? unbiased? keepdim? correction?
norm: input p? dim? keepdim? out? dtype?
quantile: input q dim? keepdim?
cumsum cumprod: input dim dtype?
logcumsumexp: input dim
softmax log_softmax: input dim dtype?
reshape: input shape*
unsqueeze: input dim
squeeze: input dim?
flatten: input start_dim? end_dim?
transpose swapaxes: input dim0 dim1
permute flip: input dims*
roll: input shifts dims?
repeat_interleave: input repeats dim?
narrow: input dim start length
select: input dim other
split: input split_size dim?
chunk: input chunks dim?
unbind: input dim?
diff: input n? dim?
clamp clip: input min? max?
clamp_min: input min
clamp_max: input max
masked_fill: input mask value
masked_select: input mask
gather index_select: input dim index
take_along_dim: input indices dim?
sort: input dim? descending? stable?
argsort: input dim? descending?
topk: input k dim? largest? sorted?
tril triu: input diagonal?
nan_to_num: input nan? posinf? neginf?
lerp: input end weight
"""
_METHODS = """
where: input condition other
view expand repeat: input size*
expand_as view_as reshape_as type_as: input other
size: input dim?
dim ndimension contiguous float double half bfloat16 long int bool: input
to: input dtype non_blocking? copy?
"""
_TORCH = """
where: condition input? other?
cat concat stack: tensors dim?
zeros_like ones_like: input dtype? device? layout? requires_grad? memory_format?
full_like: input fill_value dtype? device? layout? requires_grad? memory_format?
zeros ones: size* dtype? device? layout? requires_grad? pin_memory? out?
full: size fill_value dtype? device? layout? requires_grad? pin_memory? out?
arange: start end? step? dtype? device? layout? requires_grad? pin_memory? out?
"""
_FUNCTIONAL = """
relu: input inplace?
silu: input inplace?
logsigmoid sigmoid tanh: input
softplus: input beta? threshold?
leaky_relu: input negative_slope? inplace?
softmax log_softmax: input dim? _stacklevel? dtype?
huber_loss: input target reduction? delta? weight?
smooth_l1_loss: input target size_average? reduce? reduction? beta?
mse_loss l1_loss: input target size_average? reduce? reduction? weight?
binary_cross_entropy: input target weight? size_average? reduce? reduction?
binary_cross_entropy_with_logits: input target weight? size_average? reduce? reduction? pos_weight?
kl_div: input target size_average? reduce? reduction? log_target?
normalize: input p? dim? eps? out?
cosine_similarity: x1 x2 dim? eps?
"""
_SPECIAL = """
expit erf entr log1p expm1: input
xlogy: input other
logsumexp: input dim keepdim?
"""
_OPERATOR = """
neg pos abs invert inv: input
add sub mul truediv floordiv mod pow matmul eq ne lt le gt ge and_ or_ xor: input other
getitem: input item
"""
_MATH = """
sqrt exp expm1 log1p log2 log10 floor ceil fabs tanh erf: input
log: input other?
pow: input other
"""

# other names of the same functions in some versions of torch.fx
_ALIASES = {
    "_operator.": "operator.",
    "torch.functional.": "torch.",
    "torch._C._nn.log_sigmoid": "torch.nn.functional.logsigmoid",
    "torch._C._nn.": "torch.nn.functional.",
    "torch._C._special.special_": "torch.special.",
}


def _read(table: str, prefix: str) -> dict[str, tuple[Parameter, ...]]:
    found = {}
    for line in table.strip().splitlines():
        names, _, words = line.partition(":")
        parameters = tuple(
            Parameter(
                word.rstrip("?*"),
                _KIND_OF.get(word.rstrip("?*"), "operand"),
                not word.endswith("?"),
                word.endswith("*"),
            )
            for word in words.split()
        )
        found.update({prefix + name: parameters for name in names.split()})
    return found


FUNCTIONS: dict[str, tuple[Parameter, ...]] = {
    **_read(_BOTH, "torch."),
    **_read(_TORCH, "torch."),
    **_read(_FUNCTIONAL, "torch.nn.functional."),
    **_read(_SPECIAL, "torch.special."),
    **_read(_OPERATOR, "operator."),
    **_read(_MATH, "math."),
    **_read("getattr: input attribute", "builtins."),
}
"""Functions that a call_function node may call: name → parameters."""

METHODS: dict[str, tuple[Parameter, ...]] = {**_read(_BOTH, ""), **_read(_METHODS, "")}
"""Methods that a call_method node may call: name → parameters, of which the first is the tensor."""


def canonical(target: str) -> str:
    """The name in FUNCTIONS of a function that torch.fx calls `target`; `target` itself if it is not an alias."""
    if target == "getattr":
        return "builtins.getattr"
    for alias, prefix in _ALIASES.items():
        if target.startswith(alias):
            return prefix + target.removeprefix(alias)
    return target

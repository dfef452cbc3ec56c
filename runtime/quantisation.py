"""How weights are stored: schemes as data, and the recipe that says which layer has which.

A recipe is asked for a scheme by the checkpoint's name of a layer. Tolerances of parity belong to schemes: a scheme
says what its rounding may cost.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "ARITHMETIC",
    "CACHE_SCHEMES",
    "COMPONENTS",
    "DECODERS",
    "FLOAT_SCHEMES",
    "METHODS",
    "SCHEMES",
    "Recipe",
    "Scheme",
]

DECODERS: Mapping[str, str] = {"full": "vae", "tiny": "tiny_decoder"}
"""Components that decode latents, by what users call them: a model's first one decodes unless another is asked for."""

COMPONENTS = ("transformer", "text_encoder", *DECODERS.values())
"""What a bundle stores weights of."""


@dataclass(frozen=True)
class Scheme:
    """How the values of a matrix are stored."""

    name: str
    """Its name, as options and manifests write it."""
    dtype: str
    """What is stored: a floating-point type, or the bytes that hold blocks of integers."""
    tolerances: Mapping[str, float] = field(hash=False)
    """Largest relative L2 error by level of parity, and for `video` the least PSNR in dB. `ranges`: the largest
    deviation of the interval that an input's integers hold, by its length. `layers`: the largest error of a layer's
    output, where it is larger than that of `stages`; by it `--bisect` names one."""
    bits: int = 0
    """Bits of a value; 0 where values are floating-point numbers."""
    block: int = 0
    """Values along the input axis that share a scale; 0: each output channel has one."""
    scales: str = "float32"
    """Number type of the scales."""
    positive: bool = False
    """Scales of blocks are positive; else one has the sign that its block's extreme lacks."""
    signed: bool = False
    """Integers of blocks are stored in two's complement; else from half their range up."""
    largest: int = 127
    """Where each output channel has a scale: the largest magnitude of a value."""
    activations: str = ""
    """How a product's input becomes 8-bit integers: "dynamic", by a scale that each run finds; "static", by that of a
    recipe; empty: not at all."""
    searched: bool = False
    """Whether a recipe can choose its numbers; where activations are static, one must."""
    recipe: str = ""
    """The method whose recipes say what its inputs are; empty: its own."""
    components: tuple[str, ...] = COMPONENTS
    """What can be stored so."""
    min_psnr: float = 30.0
    """Least median PSNR in dB of videos against those of the checkpoint: see `proof.quality`."""
    max_motion_error: float = 0.05
    """Largest relative error of their motion."""

    @property
    def recipes(self) -> str:
        """The method whose recipes it takes."""
        return self.recipe or self.name

    @property
    def is_float(self) -> bool:
        """Whether values are stored as floating-point numbers, without scales."""
        return self.bits == 0


MATRICES = ("transformer", "text_encoder")

SCHEMES = {
    scheme.name: scheme
    for scheme in (
        # float32 on both sides: only the order of sums differs, 1e-7 an operation; 30 blocks reach 2e-6. A weight that
        # was rounded to bfloat16 in one layer is 1e-4. The chain multiplies an early error by its later steps.
        Scheme(
            "fp32",
            "float32",
            {"text": 1e-5, "stages": 1e-5, "chain": 1e-4, "teacher_forced": 1e-5, "vae": 1e-5, "video": 60.0},
        ),
        # Matrices rounded to 11 bits: 2.8e-4 a weight, which sums average over the width of a layer.
        Scheme(
            "fp16",
            "float16",
            {"text": 3e-3, "stages": 3e-3, "chain": 2e-2, "teacher_forced": 3e-3, "vae": 3e-3, "video": 40.0},
        ),
        # Matrices rounded to 8 bits: eight times that.
        Scheme(
            "bf16",
            "bfloat16",
            {"text": 2e-2, "stages": 2e-2, "chain": 1e-1, "teacher_forced": 2e-2, "vae": 2e-2, "video": 25.0},
        ),
        # Quantised: about twice the worst of the demonstration (two prompts, three seeds) and of random tiny models of
        # each kind. An output that is small beside the residual stream, as an attention's is, is off by more than that.
        # Of text encoders, twice what two dozen blocks of UMT5-XXL add up to: 1 % and 14 %.
        #
        # 128 values share a scale: a step is 1/128 of their largest, 0.6 % a matrix. Seen: stages 0.42 %, chain 1.4 %,
        # 52 dB.
        Scheme(
            "w8",
            "uint8",
            {"text": 3e-2, "stages": 1e-2, "layers": 3e-2, "chain": 3e-2, "teacher_forced": 3e-2, "video": 45.0},
            bits=8,
            block=128,
            components=MATRICES,
        ),
        # 64 values share a scale, a step is 1/8 of their largest: 8 % a matrix. A size format, to be judged by eye.
        # Seen: stages 6.0 %, chain 20 %, 30 dB.
        Scheme(
            "w4",
            "uint8",
            {"text": 3e-1, "stages": 1.2e-1, "layers": 5e-1, "chain": 4e-1, "teacher_forced": 3e-1, "video": 24.0},
            bits=4,
            block=64,
            searched=True,
            components=MATRICES,
            min_psnr=22.0,
        ),
        # A channel's weights share a scale, and so do all values of an input, whose largest decides: 1 % a layer.
        # Seen: stages 1.4 %, chain 6.9 %, 39 dB. Guidance multiplies what one step is off by: 13 %.
        Scheme(
            "w8a8-dynamic",
            "int8",
            {"text": 7e-2, "stages": 3e-2, "layers": 2.5e-1, "chain": 1.5e-1, "teacher_forced": 2e-1, "video": 32.0},
            bits=8,
            activations="dynamic",
            searched=True,
            components=MATRICES,
        ),
        # Blocks of 32, and inputs rounded to 8 bits, each token by its own range. Seen: stages 5.7 %, chain 12 %,
        # guided steps 14 %, 32 dB; text of random weights 12 %.
        Scheme(
            "w4a8",
            "uint8",
            {"text": 3e-1, "stages": 1.2e-1, "layers": 5e-1, "chain": 4e-1, "teacher_forced": 3e-1, "video": 24.0},
            bits=4,
            block=32,
            scales="bfloat16",
            positive=True,
            activations="dynamic",
            components=MATRICES,
            min_psnr=22.0,
        ),
        # As `w8a8-dynamic`, but the scale is that of a recipe, for each layer and stage: what it has not seen is cut.
        # Seen: stages 2.8 %, chain 7.0 %, 39 dB. A zero is a whole number: the interval moves by half a step at most,
        # 0.2 %. Of a decoder, whose outputs are rounded too: 1.1 % and 47 dB, of one of random weights 10 % and 31 dB.
        Scheme(
            "w8a8",
            "int8",
            {
                "ranges": 4e-3,
                "vae": 1.5e-1,
                "stages": 5e-2,
                "layers": 3.5e-1,
                "chain": 1.5e-1,
                "teacher_forced": 2e-1,
                "video": 30.0,
            },
            bits=8,
            activations="static",
            searched=True,
            components=("transformer", "vae"),
        ),
        # Floating-point numbers of 8 bits, four of them for the fraction and its leading one: 2.5 % a value. An output
        # channel's weights share a scale, and so do all values of an input. Seen: stages 2.8 %, chain 11 %, 32 dB.
        Scheme(
            "fp8",
            "float8_e4m3fn",
            {"stages": 6e-2, "layers": 3.5e-1, "chain": 2.5e-1, "teacher_forced": 2.5e-1, "video": 27.0},
            bits=8,
            largest=448,
            activations="static",
            recipe="w8a8",
            components=("transformer",),
            min_psnr=25.0,
        ),
        # An input's range has 257 times as many steps: what is left is the weights' rounding, and arithmetic in 11
        # bits. Seen of random tiny models: stages 2.4 %, steps 5.9 %.
        Scheme(
            "w8a16",
            "int8",
            {"stages": 6e-2, "layers": 2e-1, "chain": 1e-1, "teacher_forced": 1.2e-1, "video": 32.0},
            bits=8,
            activations="static",
            recipe="w8a8",
            components=("transformer",),
        ),
        # As `w4`, for engines that compute in 16 bits and take positive scales alone: a step is 1/7 of an extreme.
        # Seen: stages 6.8 %, chain 16 %, guided steps 14 %, 30 dB.
        Scheme(
            "w4a16",
            "uint8",
            {"text": 3e-1, "stages": 1.5e-1, "layers": 5e-1, "chain": 4e-1, "teacher_forced": 3e-1, "video": 24.0},
            bits=4,
            block=64,
            scales="bfloat16",
            positive=True,
            signed=True,
            components=MATRICES,
            min_psnr=22.0,
        ),
    )
}
"""Every scheme, by its name."""

FLOAT_SCHEMES = tuple(name for name, scheme in SCHEMES.items() if scheme.is_float)
"""What every component can be stored in."""

ARITHMETIC: Mapping[str, Mapping[str, float]] = {
    **{name: {} for name in FLOAT_SCHEMES},
    "all-fp16": {"stages": 1e-2, "chain": 5e-2, "teacher_forced": 1.5e-2, "vae": 5e-3, "video": 35.0},
}
"""Number types that graphs compute in, and tolerances where they cost more than what is stored: `all-fp16` also keeps
norms, softmax and the residual stream in 11 bits. Seen: stages 0.57 %, chain 1.5 %, steps 0.7 %, 49 dB."""

METHODS = tuple(name for name, scheme in SCHEMES.items() if not scheme.is_float)
"""How the matrices of blocks can be quantised."""

CACHE_SCHEMES = ("fp32", "fp16")
"""What a decoder can keep in from frame to frame."""


@dataclass(frozen=True)
class Recipe:
    """The scheme of each layer of a component."""

    default: Scheme
    layers: Mapping[str, Scheme] = field(default_factory=dict, hash=False)
    """Schemes that are not the default, by the checkpoint's name of the layer."""
    calibrated: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Entries of the tensors of the file that says what the inputs of layers are: see `runtime.recipe`."""
    stage: int = 0
    """Whose inputs these are, where stages share their layers."""

    def scheme(self, layer: str) -> Scheme:
        """The scheme of a layer, whose tensors are LAYER.weight and LAYER.bias."""
        return self.layers.get(layer, self.default)

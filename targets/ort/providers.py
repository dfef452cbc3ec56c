"""The registry of what graphs can be built for, beside ONNX Runtime's own kernels for the CPU."""

from collections.abc import Mapping
from dataclasses import dataclass

from ...runtime.bundle.engines import Facts
from ...runtime.errors import UsageError
from ...runtime.quantisation import FLOAT_SCHEMES

__all__ = ["CPU", "PROVIDERS", "Provider", "find_provider", "provider_of", "said_of"]


@dataclass(frozen=True)
class Provider:
    """What runs the graphs of a bundle."""

    name: str
    """As `--provider` takes it."""
    wheel: str
    """The distribution whose version a bundle records; its plug-in's module has the same name."""
    registration: str = ""
    """The name that ONNX Runtime knows the plug-in by; empty: it is none."""
    native: bool = False
    """It reads the graphs itself, without ONNX Runtime."""
    install: str = ""
    """What pip is told, where that is not the wheel."""
    dialect: str = "plain"
    """How graphs are written, so that it takes them whole: a name of `dialect.DIALECTS`."""
    schemes: tuple[str, ...] = FLOAT_SCHEMES
    """How it takes weights."""
    engine_options: tuple[str, ...] = ("device",)
    """Which options of the target's engine it has."""
    settings: Mapping[str, str] | None = None
    """Options of the plug-in itself, for each session."""
    tested: bool = False
    """Bundles for it are built and run by the tests."""

    @property
    def title(self) -> str:
        """What people are told that it is."""
        return f"provider '{self.name}'"

    def installed_version(self) -> str:
        """Version of its wheel.

        Raises:
            UsageError: it is not installed.
        """
        from ..plugins import installed_version

        return installed_version(self.wheel, self.title, self.install or self.wheel)


CPU = "cpu"
"""What is built for where nothing else is asked for, and where a bundle says nothing."""

PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(
            CPU,
            "onnxruntime",
            dialect="fused",
            schemes=(*FLOAT_SCHEMES, "w8", "w4", "w8a8-dynamic", "w8a8"),
            engine_options=("provider", "prepack"),
            tested=True,
        ),
        # Its plug-in for ONNX Runtime (the next one) offers no CPU but Intel's; OpenVINO itself runs on any.
        Provider(
            "openvino",
            "openvino",
            native=True,
            install="pyrexport[openvino]",
            dialect="standard",
            schemes=(*FLOAT_SCHEMES, "w8", "w8a8"),
            engine_options=("device", "arithmetic"),
            tested=True,
        ),
        Provider("openvino-plugin", "onnxruntime-ep-openvino", "OpenVINOExecutionProvider"),
        Provider("nv-tensorrt-rtx", "onnxruntime-ep-nv-tensorrt-rtx", "NvTensorRTRTXExecutionProvider"),
    )
}
"""By name."""


def find_provider(name: str, *, untested: bool) -> Provider:
    """The provider that a build is for.

    Args:
        name: as `--provider` is given.
        untested: one that no test has run is welcome.

    Raises:
        UsageError: there is none of the name, it was never run, or its wheel is not installed.
    """
    provider = PROVIDERS.get(name)
    if provider is None:
        raise UsageError(f"unknown provider '{name:.40}': expected one of {', '.join(PROVIDERS)}")
    if not (provider.tested or untested):
        raise UsageError(
            f"{provider.title} was never run by pyrexport's tests: prove the bundle with parity, and say "
            "--provider-untested"
        )
    provider.installed_version()
    return provider


def provider_of(facts: Facts) -> Provider:
    """The provider that a graph was built for."""
    return PROVIDERS[facts.get("provider", CPU)]


def said_of(facts: Facts) -> str:
    """What people are told of the nodes that a provider took of a graph."""
    provider, taken, left = PROVIDERS[facts["provider"]], facts["nodes"], facts["left"]
    if not left:
        return f"all {taken} nodes taken by {provider.name}"
    others = ", ".join(f"{count} {operator}" for operator, count in left.items())
    return f"{taken} of {taken + sum(left.values())} nodes taken by {provider.name}, left to the CPU: {others}"

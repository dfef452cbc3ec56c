"""What `quality` found: in words, as rows, and as a page."""

from collections.abc import Sequence
from typing import Any
from xml.etree.ElementTree import Element

from .charts import Bar, Curve, bars, curves, share_of
from .frames import FramePairs
from .page import page, section, table, tag
from .stages import boundaries, stages_section
from .subject import Subject

__all__ = ["RUN_COLUMNS", "quality_page", "quality_verdict", "run_rows"]

RUN_COLUMNS = ("run", "latent L2", "cosine", "PSNR dB", "SSIM", "motion error", "differences", "sharpness")


def quality_page(subject: Subject, result: dict[str, Any], pairs: FramePairs) -> Element:
    """What `check_quality` found.

    Args:
        subject: what was compared.
        result: its document.
        pairs: frames of both sides.
    """
    note = "Medians over all runs decide. PSNR counts by amplitude: 20 dB are a factor of ten."
    levels = section(
        "Medians and their limits",
        bars(_bars(result)),
        tag("p", note, class_="note"),
        table(RUN_COLUMNS, run_rows(result)),
    )
    parts = [levels, _chain(subject, result["runs"]), _videos(subject, result), pairs.section(subject)]
    parts.append(stages_section(subject, "relative L2 after it, worst run", lambda stage: _after(result, stage)))
    return page(
        "quality",
        subject.title,
        passed=result["passed"],
        verdict=quality_verdict(result),
        sections=[*parts, subject.machine()],
    )


def _bars(result: dict[str, Any]) -> list[Bar]:
    found, limits = result["median"], result["limits"]
    psnr, least = found["psnr"], limits["min_psnr"]
    error, most = found["motion_error"], limits["max_motion_error"]
    words = f"{100 * error:.2f} %, at most {100 * most:g} %"
    return [
        Bar("PSNR", 10 ** ((least - psnr) / 20), f"{psnr:.1f} dB, at least {least:g}", psnr >= least),
        Bar("motion error", share_of(error, most), words, error <= most),
    ]


def _chain(subject: Subject, runs: Sequence[dict[str, Any]]) -> Element:
    errors = [[step["relative_l2"] for step in run["chain"]] for run in runs]
    angles = [[1 - step["cosine"] for step in run["chain"]] for run in runs]
    marks = boundaries(subject)

    def draw(values: list[list[float]], title: str) -> Element:
        named = [Curve(subject.name(run), of_run) for run, of_run in enumerate(values)]
        return curves(named, title, logarithmic=True, across="after step", marks=marks)

    free = draw(errors, "relative L2 of the latent, each chain free from the prompt on")
    return section("Error along the chain", free, draw(angles, "1 - cosine of the latent"))


def _videos(subject: Subject, result: dict[str, Any]) -> Element:
    found = [Curve(subject.name(number), run["frame_psnr"]) for number, run in enumerate(result["runs"])]
    title, least = "PSNR of each frame, in dB", result["limits"]["min_psnr"]
    drawn = curves(found, title, logarithmic=False, across="frame", limit=least)
    return section("Error along the video", drawn)


def _after(result: dict[str, Any], stage: int) -> str:
    """The error with which a stage's last step leaves the latent, in the run where it is largest."""
    last = [[step["relative_l2"] for step in run["chain"] if step["stage"] == stage] for run in result["runs"]]
    return f"{max((errors[-1] for errors in last if errors), default=0.0):.2e}"


def run_rows(result: dict[str, Any]) -> list[list[str]]:
    """Each run, the medians and the limits."""
    limits, named = result["limits"], enumerate(result["runs"], 1)
    rows = [_row(f"{number}: {_short(run['prompt'])}, seed {run['seed']}", run) for number, run in named]
    bounds = ["", "", f">= {limits['min_psnr']:g}", "", f"<= {100 * limits['max_motion_error']:g} %", "", ""]
    return [*rows, _row("median", result["median"]), ["limit", *bounds]]


def _short(prompt: str) -> str:
    return prompt if len(prompt) <= 24 else f"{prompt[:23]}…"


def _row(name: str, figures: dict[str, Any]) -> list[str]:
    return [
        name,
        f"{figures['relative_l2']:.2e}",
        f"{figures['cosine']:.6f}",
        f"{figures['psnr']:.1f}",
        f"{figures['ssim']:.4f}",
        f"{100 * figures['motion_error']:.2f} %",
        f"{figures['difference_error']:.2e}",
        f"{figures['sharpness']:.3f}",
    ]


def quality_verdict(result: dict[str, Any]) -> str:
    """The figures that decide; where one of them is out of its limit, those alone."""
    psnr, error = result["median"]["psnr"], result["median"]["motion_error"]
    least, most = result["limits"]["min_psnr"], result["limits"]["max_motion_error"]
    figures = [
        (psnr >= least, f"median PSNR {psnr:.1f} dB (at least {least:g})"),
        (error <= most, f"median motion error {100 * error:.2f} % (at most {100 * most:g})"),
    ]
    return ", ".join(line for good, line in figures if not good or result["passed"])

"""What `parity` found: in words, as rows, and as a page."""

from typing import Any
from xml.etree.ElementTree import Element

from .charts import Bar, Curve, bars, curves, share_of
from .frames import FramePairs
from .page import page, section, table, tag
from .stages import boundaries, stages_section
from .subject import Subject

__all__ = ["LEVEL_COLUMNS", "level_rows", "parity_page", "parity_verdict"]

LEVEL_COLUMNS = ("level", "relative L2", "max abs", "cosine", "tolerance", "")

WORDS = {
    "ranges": "what layers' integers hold",
    "text": "text encoder",
    "stages": "stages, on noise",
    "chain": "chain, free-running",
    "vae": "decoder",
    "tiny_decoder": "tiny decoder",
    "video": "video",
}


def parity_page(subject: Subject, result: dict[str, Any], title: str, pairs: FramePairs) -> Element:
    """What `check_parity` found.

    Args:
        subject: what was compared.
        result: its document.
        title: what was checked.
        pairs: frames of both sides.
    """
    note = "An error at a tenth of its limit reaches 0.1×. PSNR counts by amplitude: 20 dB are a factor of ten."
    levels = section(
        "Levels",
        bars([bar for name, level in result["levels"].items() for bar in _bars(name, level)]),
        tag("p", note, class_="note"),
        table(LEVEL_COLUMNS, level_rows(result)),
    )
    parts = [levels, *_found(result), _chain(subject, result["levels"]["chain"]), pairs.section(subject)]
    parts.append(stages_section(subject, "relative L2 on noise", lambda stage: _probes(result, stage)))
    return page(
        title,
        subject.title,
        passed=result["passed"],
        verdict=parity_verdict(result),
        sections=[*parts, subject.machine()],
    )


def _bars(name: str, level: dict[str, Any]) -> list[Bar]:
    """How far a level is from its limit; PSNR is turned into a ratio of errors."""
    words, tolerance = WORDS.get(name, name), level["tolerance"]
    if "psnr" in level:
        share = 10 ** ((tolerance - level["psnr"]) / 20)
        return [Bar(words, share, f"{level['psnr']:.1f} dB, at least {tolerance:g}", level["passed"])]
    error = level["relative_error" if name == "ranges" else "relative_l2"]
    found = [Bar(words, share_of(error, tolerance), f"{error:.2e}, at most {tolerance:g}", error <= tolerance)]
    if "teacher_forced" in level:
        forced, most = level["teacher_forced"]["relative_l2"], level["teacher_forced"]["tolerance"]
        words = f"{forced:.2e}, at most {most:g}"
        found.append(Bar("chain, teacher-forced", share_of(forced, most), words, forced <= most))
    return found


def _found(result: dict[str, Any]) -> list[Element]:
    """What was blamed for a failure, where that was asked for."""
    blamed = result.get("bisect")
    if blamed is None:
        return []
    words = ", ".join(str(blamed[name]) for name in ("first", "layer") if blamed[name]) or "no block of this probe"
    return [section("First divergence", tag("p", f"Stage {blamed['stage']}: {words}"))]


def _chain(subject: Subject, chain: dict[str, Any]) -> Element:
    found = [Curve(subject.name(run), values) for run, values in enumerate(chain["growth"])]
    drawn = curves(
        found,
        "relative L2 of the latent, each chain free from the prompt on",
        logarithmic=True,
        across="after step",
        marks=boundaries(subject),
        limit=chain["tolerance"],
    )
    return section("Error along the chain", drawn)


def _probes(result: dict[str, Any], stage: int) -> str:
    """The largest error of a stage's evaluations on noise, by group of frames."""
    errors: dict[str, float] = {}
    for probe in result["levels"]["stages"]["probes"]:
        if probe["stage"] == stage:
            for name, group in probe["groups"].items():
                errors[name] = max(errors.get(name, 0.0), group["relative_l2"])
    return "\n".join(f"{name} {error:.2e}" for name, error in errors.items())


def parity_verdict(result: dict[str, Any]) -> str:
    """The verdict in words: it names the levels that failed."""
    failed = [_named(name, level) for name, level in result["levels"].items() if not level["passed"]]
    return f"{', '.join(failed)} out of tolerance" if failed else "every level is within its tolerance"


def level_rows(result: dict[str, Any]) -> list[list[str]]:
    """Rows under `LEVEL_COLUMNS`."""
    return [row for name, level in result["levels"].items() for row in _rows(name, level)]


def _named(name: str, level: dict[str, Any]) -> str:
    """A level that failed, with the layer that it blames."""
    return name if name != "ranges" else f"{name} (stage {level['worst']['stage']}, {level['worst']['layer']})"


def _rows(name: str, level: dict[str, Any]) -> list[list[str]]:
    verdict, tolerance = "pass" if level["passed"] else "FAIL", f"{level['tolerance']:g}"
    if name == "video":
        return [[name, f"PSNR {level['psnr']:.1f} dB", f"SSIM {level['ssim']:.6f}", "", f">= {tolerance} dB", verdict]]
    if name == "ranges":
        return [[name, f"{level['relative_error']:.2e}", "", "", f"<= {tolerance}", verdict]]

    def numbers(found: dict[str, Any]) -> list[str]:
        return [f"{found['relative_l2']:.2e}", f"{found['max_abs']:.2e}", f"{found['cosine']:.9f}"]

    rows = [[name, *numbers(level), f"<= {tolerance}", verdict]]
    if name == "chain":
        forced = level["teacher_forced"]
        within = "pass" if forced["relative_l2"] <= forced["tolerance"] else "FAIL"
        rows.append(["  teacher-forced", *numbers(forced), f"<= {forced['tolerance']:g}", within])
    return rows

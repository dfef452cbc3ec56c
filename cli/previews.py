"""`--preview FILE`: an image that shows what a run is about to become, written again after each step or stage."""

from pathlib import Path

import click

from ..runtime.errors import UsageError
from ..runtime.files import check_output, check_outside_bundles
from ..runtime.model.preview import Preview
from ..runtime.pipeline.preview import preview_map
from ..runtime.pipeline.video import contact_sheet, enlarge, has_video_writer, write_gif, write_png
from ..runtime.quantisation import DECODERS
from .samplers import Sampler

__all__ = ["PreviewFile"]

SCALE = 2
"""Pixels of the image along an axis, for each latent pixel of the finest stage."""


class PreviewFile:
    """Writes previews, all of one height: frames side by side in a .png, or one after the other in a .gif."""

    def __init__(self, path: Path, model: Path, sampler: Sampler, decoder: str | None) -> None:
        """Check, before the work, that there will be something to write and a place for it.

        Args:
            path: the file.
            model: the bundle or the checkpoint, for errors.
            sampler: what samples it; it is told what decodes previews.
            decoder: that, a name of `DECODERS`; None: the model's map.

        Raises:
            UsageError: the model has no map or no such decoder, it is another kind of file, something is in its way, or
                it needs PyAV.
        """
        if path.suffix not in (".png", ".gif"):
            raise UsageError(f"a preview is a .png or a .gif, found '{path.name}'")
        if path.suffix == ".gif" and not has_video_writer():
            raise UsageError("a .gif needs PyAV: pip install 'pyrexport[video]', or give a .png")
        check_output(path)
        check_outside_bundles(path)
        if decoder is None:
            preview_map(sampler.preview, model)
        elif DECODERS[decoder] not in sampler.model.decoders:
            raise UsageError(f"{model} has no {decoder} decoder for previews: leave --preview-decoder out")
        sampler.preview_decoder = decoder
        self.path, self.failed = path, False
        self.height = SCALE * sampler.model.stages(sampler.resolution)[0].latent[2]
        self.seconds = sampler.resolution.frames / sampler.frame_rate

    def __call__(self, frames: Preview) -> None:
        """Write frames [T, h, w, 3]; a file that cannot be written is told of once, and the run goes on."""
        enlarged = enlarge(frames, max(1, round(self.height / frames.shape[1])))
        try:
            if self.path.suffix == ".gif":
                write_gif(self.path, enlarged, len(frames) / self.seconds)
            else:
                write_png(self.path, contact_sheet([enlarged]), durable=False)
        except OSError as error:
            if not self.failed:
                click.echo(f"Warning: no preview in {self.path}: {error.strerror or error}", err=True)
            self.failed = True

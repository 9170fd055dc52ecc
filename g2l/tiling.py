"""One slide, from its file to its patches on disk: the settings, the work, and the proof that it is
finished.

`tile_one` writes the files of `Outputs` and fills in the slide's row; `is_finished` believes a row
of slides.csv only if the files are there and are those that were written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any, NamedTuple

from g2l.cohort import CohortSlide
from g2l.errors import SkippedSlide, UserError
from g2l.files import clear_leftovers, digest, size_of, stamp
from g2l.gdc import check_own, download
from g2l.grid import choose_size, tile_slide
from g2l.overlays import write_geojson, write_thumbnail
from g2l.patches import magnification, tile_table, write_coords, write_shard
from g2l.remote import Link, RemoteFile, is_remote, url_of
from g2l.rows import one_line
from g2l.slides import Slide
from g2l.tissue import find_mask

REST = "-rest"  # ends the settings of a slide that was skipped because it is not at hand
MOST_READ = 100e6  # bytes of a remote slide in which its tissue is found


@dataclass(frozen=True)
class Limits:
    """What patches a slide is cut into: the arguments of `tile_slide` by their names."""

    mpp: float  # µm per pixel
    patch_size: int  # px
    overlap: int  # px
    resample: bool
    enlarge: bool
    min_tissue: float  # shares of a patch
    max_pen: float
    max_blur: float  # sigma in px of a patch


@dataclass(frozen=True)
class Settings:
    """All that decides on the patches of a slide, so that its digest cannot forget any of it."""

    limits: Limits
    assume_mpp: float | None = None  # of slides that do not say
    masks: Path | None = None  # folder of the user's own tissue
    jpeg_quality: int | None = None  # of patches in shards; None: none are written

    def digest(self, slide: CohortSlide) -> str:
        """Changes when the slide's patches would: another row in slides.csv with it is out of
        date.
        """
        values = [*dataclasses.astuple(self.limits), self.assume_mpp, slide.mpp]
        if self.masks:
            values.append(str(self.masks))
            with contextlib.suppress(SkippedSlide):  # it has none
                mask = find_mask(self.masks, slide.name).stat()
                values += [mask.st_size, mask.st_mtime_ns]
        base = hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8]
        return f"{base}-q{self.jpeg_quality}" if self.jpeg_quality else base

    def made(self, row: Mapping[str, str], slide: CohortSlide) -> bool:
        """Whether the patches of a row are these; shards beyond what is asked for do no harm."""
        digest = row["settings"]
        return self.digest(slide) == (digest if self.jpeg_quality else digest.split("-")[0])


@dataclass(frozen=True)
class Job:
    """A cohort's work, as each worker process needs to know it."""

    folder: Path  # data/tiles/<cancer>
    settings: Settings
    download: bool  # slides that are not at hand
    discard: bool  # slides that were downloaded, once they are tiled
    link: Link | None = None  # through which slides are read where they are served
    download_rest: bool = False  # those that cannot be
    wait: bool = False  # for slides that other processes have in hand


class Outputs(NamedTuple):
    """The files of one slide."""

    coords: Path
    shard: Path
    thumbnail: Path
    outline: Path

    @classmethod
    def of(cls, folder: Path, name: str) -> Outputs:
        return cls(
            folder / "patches" / f"{name}_patches.h5",
            folder / "shards" / f"{name}.tar",
            folder / "thumbnails" / f"{name}.jpg",
            folder / "geojson" / f"{name}.geojson",
        )


def tile_one(
    source: CohortSlide, job: Job, row: dict[str, Any], remote: RemoteFile | None = None
) -> None:
    """Tile one slide, whose lock the caller holds; fills in `row` as facts become known.
    It is read at its address where `remote` is given.

    Raises SkippedSlide for a slide that is not wanted, UserError, PatchError or OSError for one
    that cannot be read.
    """
    path = source.path
    settings = job.settings
    outputs = Outputs.of(job.folder, source.name)
    for output in outputs:
        clear_leftovers(output)
    if one_line(str(path)) != str(path):
        raise UserError(f"{path}: control characters in its name; give it a plain one")
    mask = find_mask(settings.masks, source.name) if settings.masks else None
    row["bytes"] = remote.size if remote else size_of(path)
    with Slide(path, source.mpp, remote=remote) as slide:
        slide.name = source.name
        if slide.mpp is None and settings.assume_mpp:
            slide.mpp = settings.assume_mpp
            slide.mpp_source = "assumed"
        row |= _facts(slide)
        _refuse_bomb(slide, row["bytes"])
        _refuse_whole(slide, settings.limits)
        try:
            tiling = tile_slide(slide, mask=mask, **vars(settings.limits))
        except SkippedSlide:
            if len(slide.drafts) > 1:  # another would have to be read whole
                write_thumbnail(outputs.thumbnail, slide)
            raise
        place = tile_table(slide, tiling)
        errors = tiling.unreadable
        if settings.jpeg_quality:
            place, errors = write_shard(outputs.shard, slide, tiling, settings.jpeg_quality)
        write_thumbnail(outputs.thumbnail, slide, tiling)
        write_geojson(outputs.outline, slide, tiling)
        write_coords(outputs.coords, slide, tiling, settings.limits.overlap, place)
    if errors:
        tiling.warnings.append(f"{len(errors)} unreadable patches left out, first: {errors[0]}")
    row |= {name: f"{share:.4f}" for name, share in tiling.summary.items()} | {
        "status": "done",
        "patches": len(tiling.coords),
        "size0": tiling.size0,
        "unreadable": len(errors),
        "warnings": "; ".join(tiling.warnings),
    }


def tile_there_or_here(
    slide: CohortSlide, job: Job, row: dict, tell: Callable[[float], None]
) -> None:
    """Tile a slide at its address, or at hand, where it may have to be fetched first (see
    tile_one)."""
    if job.link and is_remote(row["path"]):
        try:
            with contextlib.closing(job.link.open(slide.address)) as file:
                return tile_one(slide, job, row, file)
        except SkippedSlide as error:
            if error.mend != "rest":
                raise
            if not job.download_rest:
                row["settings"] += REST
                raise
        finally:
            tell(job.link.take_counts()["bytes"])
    if slide.address and (job.download or job.download_rest):
        if slide.path.is_file():
            check_own(slide)
        else:
            download(slide, url_of(slide.address), tell)
        row["path"] = os.path.abspath(slide.path)
    tile_one(slide, job, row)


def _refuse_bomb(slide: Slide, size: int) -> None:
    """UserError for gigapixels of nothing in a file of `size` bytes, which would be read whole."""
    pixels = slide.width * slide.height
    if len(slide.levels) == 1 and pixels > max(1e9, 300 * size):
        raise UserError(f"{slide.path}: {pixels:,} px in {size:,} bytes are no tissue")


def _refuse_whole(slide: Slide, limits: Limits) -> None:
    """SkippedSlide for a slide of which more would have to be read than makes sense at a
    distance."""
    if not slide.remote:
        return
    choice = limits.mpp, limits.patch_size, limits.resample, limits.enlarge
    size0, _ = choose_size(slide, *choice)
    if size0 != limits.patch_size:
        raise SkippedSlide("its patches are resampled, so not its compressed tiles", mend="rest")
    needed = slide.cost(size0 / (size0 // 8 * 2))  # of measure_blur
    if needed > max(MOST_READ, slide.file.size / 8):
        why = "to find its tissue, for want of a level at low power"
        raise SkippedSlide(f"{needed / 1e6:,.0f} MB would have to be read {why}", mend="rest")


def _facts(slide: Slide) -> dict[str, Any]:
    """What slides.csv tells of a slide that opens."""
    return {
        "width": slide.width,
        "height": slide.height,
        "mpp": slide.mpp or "",
        "mpp_source": slide.mpp_source,
        "objective": slide.objective or "",
        "magnification": f"{magnification(slide.mpp)}x" if slide.mpp else "",
    }


def seals_of(source: CohortSlide, job: Job) -> str:
    """What proves later that a slide is the one that was tiled, and its files those written."""
    files = map(_seal, Outputs.of(job.folder, source.name))
    return " ".join([_state(source, job), *files])


def place_of(source: CohortSlide, job: Job) -> str:
    """Where a slide is read: its file, or its address where that is not at hand."""
    there = job.link and not source.path.is_file()
    return source.address if there else os.path.abspath(source.path)


def _state(source: CohortSlide, job: Job) -> str:
    """Changes when the slide does, at hand or at its address."""
    there = is_remote(place_of(source, job))
    return digest([source.size, source.md5] if there else stamp(source.path))


def _seal(path: Path, known: str = "") -> str:
    """Checksum, size and time of a file, by which it is known again; "-" where there is none.

    A shard of the size and time that the seal `known` says is not read.
    """
    try:
        found = path.stat()
        if not S_ISREG(found.st_mode):
            return "-"
        place = f":{found.st_size}:{found.st_mtime_ns}"
        if path.suffix == ".tar" and known.endswith(place):
            return known
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16] + place
    except OSError:
        return "-"


def is_finished(
    source: CohortSlide, row: Mapping[str, str] | None, job: Job, tell: bool = False
) -> bool:
    """Whether nothing is left to do for a slide: its row fits, and its files are those that were
    written (else a note can `tell` which is not); failed ones are tried again.
    """
    if not row or not _is_settled(row, source, job):
        return False
    if row["bytes"] != str(source.size) and (source.size or row["status"] == "skipped"):
        return False
    if not row["seals"]:  # a table from before there were any
        return row["status"] == "skipped" or Outputs.of(job.folder, source.name).coords.exists()
    harmed = _harmed_file(source, row["seals"].split(), job)
    if harmed and tell:
        print(f"note: {harmed} has changed or is lost; its slide is done anew", flush=True)
    return not harmed


def _is_settled(row: Mapping[str, str], source: CohortSlide, job: Job) -> bool:
    """Whether a row is of these settings, and would be the same today."""
    if row["status"] == "failed" or not job.settings.made(row, source):
        return False
    if not is_remote(row["path"]):
        return True
    # it may be wanted at hand now
    return job.link is not None and not (job.download_rest and row["settings"].endswith(REST))


def _harmed_file(source: CohortSlide, seals: list[str], job: Job) -> Path | None:
    """The first file that is not what was sealed.

    A shard may be gone if none is asked for: then the slide must be the one that was tiled.
    """
    outputs = Outputs.of(job.folder, source.name)
    sharded = job.settings.jpeg_quality or outputs.shard.exists()
    if not sharded and (job.link or source.path.exists()) and _state(source, job) != seals[0]:
        return source.path
    for path, known in zip(outputs, seals[1:], strict=True):
        needed = sharded or path != outputs.shard
        if needed and not _seal(path, known).startswith(known.split(":")[0]):
            return path
    return None

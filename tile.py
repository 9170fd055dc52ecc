"""Stage 1: slides to tissue patches. Owns slides (`Slide`) and the patch index (writer, and reader `PatchIndex`).

    python tile.py --cancer brca                        # slides in data/slides/brca -> data/tiles/brca
    python tile.py --cancer mine --slides DIR --mpp 0.5

Every slide gets one row in data/tiles/<cancer>/slides.csv: done, skipped or failed, and why. Run the command again
at any time: it does only what is missing. Processes share a cohort by locks on single slides (the kernel frees them
when a process dies), so workers, ranks under torchrun and several commands may work on one output folder.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import multiprocessing.connection
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

from PIL import Image

from g2l.arguments import Help, pixel_size, positive, share
from g2l.cohort import (
    LIMITS,
    CohortSlide,
    find_slides,
    local_sources,
    patient_of,
    read_manifest,
    read_patients,
    read_rows,
    select,
    write_rows,
)
from g2l.errors import PatchError, SkippedSlide, UserError, disk_full, exit_status
from g2l.files import atomic, locked, size_of
from g2l.gdc import ask_gdc, download, downloaded_mark
from g2l.grid import tile_slide
from g2l.overlays import write_contact_sheet, write_geojson, write_thumbnail
from g2l.patches import magnification, tile_table, write_clam_list, write_coords, write_shard
from g2l.progress import Progress
from g2l.slides import Slide
from g2l.tissue import find_mask


def tile_one(source: CohortSlide, folder: Path, args: argparse.Namespace) -> dict:
    """Tile one slide into `folder`; returns its row. A user's error or a broken slide becomes a row, never a raise.

    A full disk does raise: every further slide would meet it.
    """
    start, name, path = time.perf_counter(), source.name, source.path
    for leftover in folder.glob(
        f"*/.{glob.escape(name)}*.tmp*"
    ):  # of a run that was killed; the lock is ours
        leftover.unlink(missing_ok=True)
    row = {
        "slide": name,
        "patient": source.patient,
        "patches": 0,
        "path": os.path.abspath(path),
        "settings": source.settings(args),
        "patch_size": args.patch_size,
        "target_mpp": args.mpp,
    }
    try:
        mask = find_mask(args.masks, name) if args.masks else None
        row["bytes"] = size_of(path)
        with Slide(path, source.mpp) as slide:
            slide.name = name
            if slide.mpp is None and args.assume_mpp:
                slide.mpp, slide.mpp_source = args.assume_mpp, "--assume-mpp"
            row |= {
                "width": slide.width,
                "height": slide.height,
                "mpp": slide.mpp or "",
                "mpp_source": slide.mpp_source,
                "objective": slide.objective or "",
                "magnification": f"{magnification(slide.mpp)}x" if slide.mpp else "",
            }
            try:
                tiling = tile_slide(slide, mask=mask, **{key: getattr(args, key) for key in LIMITS})
            except SkippedSlide:
                if len(slide.drafts) > 1:  # another would have to be read whole
                    write_thumbnail(folder / "thumbnails" / f"{name}.jpg", slide)
                raise
            place, errors = tile_table(slide, tiling), tiling.unreadable
            if args.save_patches:
                place, errors = write_shard(
                    folder / "shards" / f"{name}.tar", slide, tiling, args.jpeg_quality
                )
            write_thumbnail(folder / "thumbnails" / f"{name}.jpg", slide, tiling)
            write_geojson(folder / "geojson" / f"{name}.geojson", slide, tiling)
            write_coords(
                folder / "patches" / f"{name}_patches.h5", slide, tiling, args.overlap, place
            )
        if errors:
            tiling.warnings.append(f"{len(errors)} unreadable patches left out, first: {errors[0]}")
        row |= {
            "status": "done",
            "patches": len(tiling.coords),
            "size0": tiling.size0,
            "unreadable": len(errors),
            "warnings": "; ".join(tiling.warnings),
        } | {k: f"{v:.4f}" for k, v in tiling.summary.items()}
    except SkippedSlide as error:
        row |= {"status": "skipped", "reason": str(error)}
    except (UserError, PatchError, OSError, MemoryError, Image.DecompressionBombError) as error:
        if disk_full(error):
            raise
        row |= {"status": "failed", "reason": str(error) or type(error).__name__}
    row["seconds"] = f"{time.perf_counter() - start:.2f}"
    return row


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tile.py",
        description="Find the tissue on every slide of a cohort and lay a grid of patches on it. "
        "Run the same command again at any time: it does only what is missing.",
        formatter_class=Help,
    )
    group = parser.add_argument_group("cohort")
    group.add_argument(
        "--cancer",
        required=True,
        metavar="NAME",
        help="a TCGA project (brca, prad, ...) or any name; output goes to DATA/tiles/NAME",
    )
    group.add_argument(
        "--data", type=Path, default=Path("data"), metavar="DIR", help="holds slides/ and tiles/"
    )
    group.add_argument(
        "--slides",
        type=Path,
        metavar="DIR",
        help="slides, flat or in folders (default: DATA/slides/NAME)",
    )
    group.add_argument(
        "--manifest",
        type=Path,
        metavar="FILE",
        help="take only the slides named here: a GDC manifest, "
        "or a CSV with slide[,mpp][,patient]. Where it names no patient, the slide's name does: by its "
        "TCGA barcode, else by all up to and with the first of its parts between _ that holds a digit "
        "(P1 of P1_a, case_001 of case_001_HE)",
    )
    group.add_argument(
        "--strategy",
        choices=("diagnostic", "tissue", "both"),
        help="of TCGA: paraffin sections (DX), "
        "frozen ones (TS, BS, MS), or both, paraffin first (default: diagnostic for --download, both "
        "for slides at hand)",
    )
    group.add_argument(
        "--exclude",
        type=Path,
        metavar="FILE",
        help="hold out the patients named here (slides or "
        "patients, one a line or a CSV), such as those of a benchmark",
    )
    group.add_argument(
        "--max-slides",
        type=int,
        default=1000,
        metavar="N",
        help="a random sample of so many; 0: all",
    )
    group.add_argument("--seed", type=int, default=0, help="of that sample")
    group = parser.add_argument_group("magnification")
    group.add_argument(
        "--mpp",
        type=pixel_size,
        default=0.25,
        metavar="UM",
        help="µm per pixel wanted; slides within "
        "20 %% of it are taken as they are (0.25 is 40x, 0.5 20x, 1 10x)",
    )
    group.add_argument("--patch-size", type=int, default=256, metavar="PX", help="side of a patch")
    group.add_argument(
        "--overlap", type=int, default=0, metavar="PX", help="of neighbouring patches"
    )
    group.add_argument(
        "--resample",
        action="store_true",
        help="rescale slides of another magnification instead of "
        "skipping them (a coarser slide gains no detail by it)",
    )
    group.add_argument(
        "--enlarge",
        action="store_true",
        help="with --resample: take slides too that are more than 1.5 times coarser",
    )
    group.add_argument(
        "--assume-mpp",
        type=pixel_size,
        metavar="UM",
        help="µm per pixel of slides that do not say (default: skip them)",
    )
    group = parser.add_argument_group("tissue and quality (of a patch)")
    group.add_argument(
        "--min-tissue", type=share, default=0.5, metavar="SHARE", help="least share of tissue"
    )
    group.add_argument(
        "--max-pen",
        type=share,
        default=0.1,
        metavar="SHARE",
        help="most share of ink; 1 for stains other than H&E, whose colours look like ink",
    )
    group.add_argument(
        "--max-blur",
        type=positive,
        default=3.5,
        metavar="PX",
        help="most blur, as the sigma of a "
        "Gaussian in patch pixels (measured up to 6); 6 keeps all",
    )
    group.add_argument(
        "--masks",
        type=Path,
        metavar="DIR",
        help="your own tissue: <slide>.geojson (QuPath) or an "
        "image of the whole slide, not 0 in tissue",
    )
    group = parser.add_argument_group("patches on disk")
    group.add_argument(
        "--save-patches",
        action="store_true",
        help="write the patches as JPEG to DATA/tiles/NAME/"
        "shards too (WebDataset tars; about 10 to 40 kB a patch of 256 px)",
    )
    group.add_argument(
        "--jpeg-quality",
        type=int,
        default=90,
        choices=range(1, 101),
        metavar="Q",
        help="of patches that have to be encoded anew",
    )
    group = parser.add_argument_group("download from the GDC")
    group.add_argument(
        "--download",
        action="store_true",
        help="fetch the slides of a TCGA project, as many at once as there are --workers",
    )
    group.add_argument("--yes", action="store_true", help="do not ask before downloading")
    group.add_argument(
        "--discard-slides",
        action="store_true",
        help="delete each slide that was downloaded here when "
        "its patches are saved or it is skipped (with --download and --save-patches)",
    )
    group.add_argument(
        "--gdc-url", default="https://api.gdc.cancer.gov", metavar="URL", help="the server"
    )
    group = parser.add_argument_group("work")
    group.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes, up to 1 GB each (default: one per CPU, "
        "at most 16); for several machines start this script by torchrun on a shared disk",
    )
    return parser


def check(args: argparse.Namespace) -> None:
    """Complain about what argparse cannot see, and fill in defaults that depend on other arguments."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", args.cancer):
        raise UserError(f"--cancer {args.cancer!r}: expected a plain name such as brca")
    if not 16 <= args.patch_size <= 4096:
        raise UserError(f"--patch-size {args.patch_size}: expected 16 to 4096 px")
    if not 0 <= args.overlap < args.patch_size:
        raise UserError(
            f"--overlap {args.overlap}: expected 0 to less than --patch-size {args.patch_size}"
        )
    if args.max_slides < 0 or (args.workers is not None and args.workers < 1):
        raise UserError("--max-slides: expected 0 or more; --workers: expected 1 or more")
    if args.discard_slides and not (args.download and args.save_patches):
        raise UserError(
            "--discard-slides: only with --download (your own slides are never deleted) and --save-patches "
            "(or nothing would be left)"
        )
    if args.masks and not args.masks.is_dir():
        raise UserError(f"--masks {args.masks}: no such folder")
    args.slides = args.slides or args.data / "slides" / args.cancer
    if args.slides.is_file():
        raise UserError(
            f"--slides {args.slides}: is a file; give its folder (--manifest picks slides of it)"
        )
    args.strategy = args.strategy or ("diagnostic" if args.download else "both")
    args.gdc_url = args.gdc_url.rstrip("/")


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return exit_status(lambda: check_and_run(args))


def check_and_run(args: argparse.Namespace) -> int:
    """Check the flags and tile; under torchrun rank 0 speaks for all."""
    check(args)
    with contextlib.redirect_stdout(None if int(os.environ.get("RANK", 0)) else sys.stdout):
        return run(args)


def run(args: argparse.Namespace) -> int:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    folder = args.data / "tiles" / args.cancer
    if args.download:
        listed = (
            {Path(row["filename"]).name: row for row in read_manifest(args.manifest)}
            if args.manifest
            else {}
        )
        sources = ask_gdc(args, list(listed))
        for source in sources:
            if row := listed.get(source.path.name):
                source.mpp, source.stated = row["mpp"], row["patient"]
        if not sources:
            raise UserError(
                f"{args.gdc_url}: it has no such slides (see --cancer, --strategy, --manifest)"
            )
        if args.slides.is_dir():  # slides that are there already, wherever a client put them
            there = {path.name: path for path in find_slides(args.slides)}
            for source in sources:
                source.path = there.get(source.path.name, source.path)
    else:
        sources = local_sources(args, args.slides)
    patients = {source.name: source.patient for source in sources}
    sources, left_out = select(sources, args)
    known = read_rows(folder)
    todo = [
        source for source in sources if not is_done(source, known.get(source.name), folder, args)
    ]
    if args.download and not confirm_plan(todo, args):
        print("nothing downloaded")
        return 1
    if rank == 0:
        write_selection(folder, sources, left_out, known, patients, args)
    print(
        f"{len(sources) - len(todo)} slides are finished, {len(todo)} to do -> {folder}", flush=True
    )
    mine, others = (
        todo[rank::world],
        [source for number, source in enumerate(todo) if number % world != rank],
    )
    busy = work_through(mine + others, folder, args, wait=False)
    if rank:
        return (
            0  # a rank that ends with an error would take the others down; rank 0 reports for all
        )
    work_through(
        busy, folder, args, wait=True
    )  # what other processes hold: wait for it, or do it if they died
    return summarize(sources, folder, bool(todo))


def is_done(source: CohortSlide, row: dict | None, folder: Path, args: argparse.Namespace) -> bool:
    """Whether slides.csv and the files say that nothing is left to do for a slide; failed ones are tried again."""
    if not row or row["status"] == "failed":
        return False
    settings = source.settings(args)
    if row["settings"] != settings and (
        args.save_patches or row["settings"].split("-")[0] != settings
    ):
        return False
    if row["status"] == "skipped":
        return row["bytes"] == str(source.size)
    return (
        (not source.size or row["bytes"] == str(source.size))
        and (folder / "patches" / f"{source.name}_patches.h5").is_file()
        and (not args.save_patches or (folder / "shards" / f"{source.name}.tar").is_file())
    )


def confirm_plan(todo: list[CohortSlide], args: argparse.Namespace) -> bool:
    """Show what will be downloaded and whether it fits; True to go on."""
    missing = [source for source in todo if not source.path.is_file()]
    if not missing:
        return True
    size = sum(source.size for source in missing)
    held = sum(sorted((source.size for source in missing), reverse=True)[: worker_count(args)])
    need = held if args.discard_slides else size
    args.slides.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(args.slides).free
    print(
        f"to download: {len(missing)} slides, {size / 1e9:.2f} GB, to {args.slides} ({free / 1e9:.1f} GB free"
        + (f"; at most {need / 1e9:.2f} GB are kept at a time)" if args.discard_slides else ")"),
        flush=True,
    )
    if need > free:
        raise UserError(
            f"{args.slides}: {need / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free; fewer slides by "
            f"--max-slides, another disk by --data, or --save-patches --discard-slides"
        )
    if args.yes:
        return True
    if not sys.stdin.isatty():
        raise UserError(
            "--download: add --yes to go on with this plan (there is no terminal to ask on)"
        )
    return input("go on? [yes/no] ").strip().lower() in ("y", "yes")


def write_selection(
    folder: Path,
    sources: list[CohortSlide],
    left_out: dict[str, str],
    known: dict,
    patients: dict,
    args: argparse.Namespace,
) -> None:
    """manifest.txt, the slides used, as the GDC's client reads it; rows of slides that are no longer wanted, and of
    finished ones whose patient is another now."""
    with atomic(folder / "manifest.txt") as temporary:
        lines = ["id\tfilename\tmd5\tsize\tstate"]
        lines += [
            "\t".join(
                (s.id or s.name, s.path.name, s.md5, str(s.size), "released" if s.id else "local")
            )
            for s in sources
        ]
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogateescape")
    names = {os.path.abspath(source.path): source.name for source in sources}
    others = [
        CohortSlide(name, Path(row["path"]), stated=row["patient"])
        for name, row in known.items()
        if name not in patients
    ]
    held = read_patients(args.exclude, others) if args.exclude else set()
    gone = {
        source.name: f"held out: {args.exclude} (--exclude)"
        for source in others
        if held & {source.patient, patient_of(source.name), patient_of(source.path)}
    }
    gone |= {
        name: f"is {names[row['path']]} now, since others have its name"
        for name, row in known.items()
        if names.get(row["path"], name) != name
    }
    rows = [
        row | {"patient": patients[name]}
        for name, row in known.items()
        if row["patient"] != patients.get(name, row["patient"])
    ]
    for name, reason in (gone | left_out).items():
        row = known.get(name, {"slide": name})
        row |= {"patient": patients.get(name, row.get("patient"))}
        if row.get("reason") != reason and (name in known or not args.download):
            rows.append(row | {"status": "skipped", "reason": reason, "patches": 0, "settings": ""})
    if rows:
        write_rows(folder, rows)


def worker_count(args: argparse.Namespace) -> int:
    if args.workers:
        return args.workers
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cpus, 16) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def do_slide(
    source: CohortSlide, folder: Path, args: argparse.Namespace, wait: bool, report
) -> dict | None:
    """Fetch, tile and discard one slide under its lock; its row, or None when another process has it in hand."""
    with locked(folder / ".locks" / source.name, wait) as mine:
        if not mine:
            return None
        row = read_rows(folder).get(source.name)
        if is_done(source, row, folder, args):  # by another process, since we looked
            return row
        try:
            if source.id and args.download and not source.path.is_file():
                download(source, args, report)
        except UserError as error:
            row = {
                "slide": source.name,
                "status": "failed",
                "reason": str(error),
                "patient": source.patient,
                "patches": 0,
                "path": os.path.abspath(source.path),
            }
        else:
            row = tile_one(source, folder, args)
        write_rows(folder, [row])
        if (
            args.discard_slides
            and row["status"] != "failed"
            and downloaded_mark(source.path).exists()
        ):
            source.path.unlink(missing_ok=True)
            downloaded_mark(source.path).unlink()
            with contextlib.suppress(OSError):  # its folder, if it had one of its own
                source.path.parent.rmdir()
        return row


def worker(pipe, parents: list, folder: Path, args: argparse.Namespace, wait: bool) -> None:
    """One process: slides come in through the pipe, rows, downloaded bytes and fatal errors go out."""
    for end in parents:  # inherited; were they open here, nobody would notice the parent's death
        end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    with contextlib.suppress(
        EOFError, BrokenPipeError
    ):  # the parent is gone: so are we, the slide in hand finished
        while (source := pipe.recv()) is not None:
            try:
                answer = (
                    "row",
                    do_slide(source, folder, args, wait, lambda n: pipe.send(("bytes", n))),
                )
            except OSError as error:
                if isinstance(error, BrokenPipeError):
                    raise
                answer = "fatal", OSError(error.errno, f"{source.name}: {error}")
            pipe.send(answer)


def tell_slide(progress: Progress, row: dict) -> None:
    """One line for one slide."""
    what = f"{int(row['patches']):,} patches" if row["status"] == "done" else row["reason"]
    warned = f" ({row['warnings']})" if row.get("warnings") else ""
    progress.step()
    place = f"[{progress.done}/{progress.total}]"
    progress.note(f"{place} {row['slide']}: {row['status']}, {what}{warned}")


def work_through(
    sources: list[CohortSlide], folder: Path, args: argparse.Namespace, wait: bool
) -> list[CohortSlide]:
    """Do all slides in worker processes; returns those that other processes have in hand.

    A slide whose reader takes the process down (some damaged files do) is recorded as failed, and a new process goes
    on with the rest. No slide is handed out after a fatal error; it is raised when the others are through.
    """
    queue, busy, fatal = list(reversed(sources)), [], None
    context = multiprocessing.get_context("fork")
    running: dict = {}  # pipe -> (process, slide in hand)
    start_bytes = time.monotonic()
    fetched = 0
    shown = not int(os.environ.get("RANK", 0))
    progress = Progress(len(sources), "slide", interval=60, shown=shown)

    def start():
        pipe, theirs = context.Pipe()
        process = context.Process(
            target=worker, args=(theirs, [pipe, *running], folder, args, wait), daemon=True
        )
        process.start()
        theirs.close()
        running[pipe] = process, None
        hand_out(pipe)

    def hand_out(pipe):
        process, _ = running[pipe]
        source = queue.pop() if queue and fatal is None else None
        running[pipe] = process, source
        pipe.send(source)
        if source is None:
            del running[pipe]
            process.join()

    try:
        for _ in range(min(worker_count(args), len(queue))):
            start()
        while running:
            for pipe in multiprocessing.connection.wait(list(running)):
                process, source = running[pipe]
                try:
                    kind, content = pipe.recv()
                except (EOFError, ConnectionResetError):
                    process.join()
                    reason = "its reader ended the process " + (
                        f"({signal.Signals(-process.exitcode).name}): damaged, or too little memory"
                        if process.exitcode < 0
                        else "by an error of this program, printed above"
                    )
                    row = {
                        "slide": source.name,
                        "status": "failed",
                        "patient": source.patient,
                        "patches": 0,
                        "path": os.path.abspath(source.path),
                        "settings": source.settings(args),
                        "reason": reason,
                    }
                    write_rows(folder, [row])
                    tell_slide(progress, row)
                    del running[pipe]
                    if queue:
                        start()
                    continue
                if kind == "bytes":
                    fetched += content
                    rate = fetched / 1e6 / (time.monotonic() - start_bytes)
                    progress.step(0, f"{fetched / 1e9:.2f} GB fetched, {rate:.1f} MB/s")
                    continue
                if kind == "fatal":
                    fatal = content
                elif content is None:
                    busy.append(source)
                else:
                    tell_slide(progress, content)
                hand_out(pipe)
    finally:
        for process, _ in running.values():
            process.terminate()
        progress.close()
    if fatal:
        raise fatal
    return busy


def summarize(sources: list[CohortSlide], folder: Path, news: bool) -> int:
    """The contact sheet, the slides that failed, and the last line; the exit status."""
    rows = read_rows(folder)
    rows = [rows[source.name] for source in sources]
    count = {
        status: sum(row["status"] == status for row in rows)
        for status in ("done", "skipped", "failed")
    }
    if count["done"] and (news or not (folder / "contact.jpg").is_file()):
        write_contact_sheet(folder)
        write_clam_list(folder)
    for row in [row for row in rows if row["status"] == "failed"][:10]:
        print(f"failed: {row['slide']}: {row['reason']}")
    warned = sum(bool(row["warnings"]) for row in rows)
    patients = len({row["patient"] for row in rows if row["status"] == "done"})
    whose = (
        f" of {patients} patients" if patients < count["done"] else ""
    )  # shows who was taken for one
    print(
        f"{count['done']} slides{whose} done{f' ({warned} with warnings)' if warned else ''}, "
        f"{count['skipped']} skipped, {count['failed']} failed; "
        f"{sum(int(row['patches']) for row in rows):,} patches; see {folder}/slides.csv"
    )
    return 1 if count["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())

"""Stage 1: slides to tissue patches.

    python tile.py --cancer brca                 # slides in data/slides/brca -> data/tiles/brca
    python tile.py --cancer mine --slides DIR --mpp 0.5

Every slide gets one row in data/tiles/<cancer>/slides.csv: done, skipped or failed, and why. Run
the command again at any time: it does only what is missing. Processes share a cohort by locks on
single slides (the kernel frees them when a process dies), so workers, ranks under torchrun and
several commands may work on one output folder.

Read on as it runs: the flags, then `run`, which finds the slides, chooses, downloads, tiles them in
worker processes and sums up.
"""

import contextlib
import dataclasses
import functools
import os
import re
import shutil
import signal
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter

from PIL import Image

from g2l.arguments import Help, count, in_group, positive, whole
from g2l.cohort import (
    Cohort,
    CohortSlide,
    find_slides,
    local_slides,
    read_manifest,
    read_patients,
    select,
    slide_of,
)
from g2l.errors import (
    PatchError,
    SkippedSlide,
    UserError,
    disk_full,
    exit_status,
    explain,
    rank_of_torchrun,
)
from g2l.files import flush, locked, write_text
from g2l.gdc import ask_gdc, downloaded_mark
from g2l.overlays import write_contact_sheet
from g2l.patches import write_clam_list
from g2l.pool import Pool
from g2l.progress import Progress
from g2l.remote import Link, read_addresses, slides_at
from g2l.rows import Rows, one_line, read_rows, write_rows
from g2l.tiling import (
    Job,
    Limits,
    Outputs,
    Settings,
    is_finished,
    place_of,
    seals_of,
    tile_there_or_here,
)

REMEDIES = {  # what mends an error, by its key; added to messages and to the reasons in slides.csv
    "mpp": "state it with --assume-mpp, or per slide in a CSV (slide,mpp) for --manifest",
    "magnification": "--resample rescales it, --mpp with its own value takes it as it is",
    "enlarge": "--enlarge takes it all the same",
    "tissue": "see --min-tissue",
    "pen": "see --max-pen; 1 takes stains of the colour of ink",
    "blur": "see --max-blur",
    "masks": "see --masks",
    "exclude": "see --exclude",
    "strategy": "see --strategy",
    "sample": "see --max-slides and --seed",
    "manifest": "--manifest takes a GDC manifest (tabs) or a CSV with slide[,mpp][,patient]",
    "slides": "name their folder with --slides, or fetch those of a TCGA project with --download",
    "cancer": "name one with --cancer, or give --remote your own addresses",
    "own": "or run without --download, which takes it as it is",
    "rest": "--download-rest downloads it",
    "later": "the same command goes on from here later",
    "settings": "tile all slides of a folder alike, or give these another --cancer NAME",
    "table": "mend it, or remove it and run tile.py, which tiles its slides anew",
}

GDC = "the GDC"
FIRST = 3e6  # bytes of a slide's directory and of the tiles that show whether it is sound


def plain_name(text: str) -> str:
    """A flag's name that becomes a folder's."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", text):
        raise ArgumentTypeError(f"{text!r}: expected a plain name such as brca")
    return text


def build_parser() -> ArgumentParser:
    """The flags, in the order in which a user meets their questions."""
    parser = ArgumentParser(
        prog="tile.py",
        description="Find the tissue on every slide of a cohort and lay a grid of patches on it. "
        "Run the same command again at any time: it does only what is missing.",
        formatter_class=Help,
    )
    add_cohort_arguments(parser)
    add_grid_arguments(parser)
    add_patch_arguments(parser)
    add = in_group(parser, "slides that are served")
    add(
        "--download",
        "fetch the slides of a TCGA project, as many at a time as there are --workers",
    )
    add(
        "--remote URL-LIST",
        "read no slide whole, only the tiles that are needed, now and in training: of a TCGA "
        "project at the GDC or, given an address or a file, at the addresses in it, one a line "
        "(https:// or s3://, which with a / at its end stands for all slides below; with the "
        "credentials that AWS's tools find or a ~/.netrc, else without)",
        nargs="?",
        const=GDC,
    )
    add("--download-rest", "with --remote, download the slides that cannot be read so")
    add("--yes", "download without asking")
    add(
        "--discard-slides",
        "delete each downloaded slide once its patches are saved or it is skipped (needs "
        "--download and --save-patches)",
    )
    add("--gdc-url URL", "address of the server", "https://api.gdc.cancer.gov")
    add = in_group(parser, "work")
    add(
        "--workers N",
        "processes, of up to 1 GB each (default: one per CPU, at most 16); to use several "
        "machines, start this script by torchrun on a shared disk",
    )
    return parser


def add_cohort_arguments(parser: ArgumentParser) -> None:
    """Which slides."""
    add = in_group(parser, "cohort")
    add(
        "--cancer NAME",
        "a TCGA project (brca, prad, ...) or any name of yours; output goes to DATA/tiles/NAME",
        type=plain_name,
        required=True,
    )
    add("--data DIR", "the folder that holds slides/ and tiles/", Path("data"))
    add(
        "--slides DIR",
        "the folder of the slides, flat or nested (default: DATA/slides/NAME)",
    )
    add(
        "--manifest FILE",
        "take only the slides that this file names: a GDC manifest, or a CSV with the columns "
        "slide[,mpp][,patient]. Without a patient there, a slide's name tells whose it is: its "
        "TCGA barcode, else all up to and including the first part between underscores that holds "
        "a digit (P1 for P1_a, case_001 for case_001_HE)",
    )
    add(
        "--strategy",
        "which sections of TCGA: diagnostic (paraffin, DX), tissue (frozen: TS, BS, MS), or "
        "both, paraffin first (default: diagnostic with --download, both for slides at hand)",
        choices=("diagnostic", "tissue", "both"),
    )
    add(
        "--exclude FILE",
        "hold out the patients that this file names (a slide or patient per line, or a CSV), for "
        "example those of a benchmark",
    )
    add(
        "--max-slides N",
        "take a random sample of at most N slides; 0 takes all",
        1000,
        type=count,
    )
    add("--seed SEED", "another seed draws another sample", 0)


def add_grid_arguments(parser: ArgumentParser) -> None:
    """How patches lie on a slide."""
    add = in_group(parser, "magnification")
    add(
        "--mpp UM",
        "µm per pixel of the patches; slides within 20 %% of it are taken as they are (0.25 is "
        "40x, 0.5 is 20x, 1 is 10x)",
        0.25,
    )
    side = functools.partial(whole, least=16, most=4096)
    add("--patch-size PX", "side of a patch", 256, type=side)
    add("--overlap PX", "how far neighbouring patches overlap", 0, type=count)
    add(
        "--resample",
        "rescale slides of another magnification instead of skipping them (a coarser slide gains "
        "no detail)",
    )
    add(
        "--enlarge",
        "with --resample, also take slides that are more than 1.5 times coarser",
    )
    add(
        "--assume-mpp UM",
        "µm per pixel of slides that do not state it (default: skip them)",
    )


def add_patch_arguments(parser: ArgumentParser) -> None:
    """Which patches are kept, and what is written of them."""
    add = in_group(parser, "tissue and quality of a patch")
    add("--min-tissue SHARE", "least share of tissue", 0.5)
    add(
        "--max-pen SHARE",
        "largest share of ink; use 1 for stains other than H&E, whose colours look like ink",
        0.1,
    )
    add(
        "--max-blur PX",
        "most blur, as the sigma of a Gaussian in patch pixels (measured up to 6, so 6 keeps all)",
        3.5,
        type=positive,
    )
    add(
        "--masks DIR",
        "your own outlines of the tissue: <slide>.geojson (from QuPath), or an image of the whole "
        "slide that is not 0 in tissue",
    )
    add = in_group(parser, "patches on disk")
    add(
        "--save-patches",
        "also write the patches as JPEG files to DATA/tiles/NAME/shards (WebDataset tars; 10 to "
        "40 kB for a patch of 256 px)",
    )
    add(
        "--jpeg-quality Q",
        "quality of the patches that have to be encoded anew",
        90,
        type=functools.partial(whole, most=100),
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command; its exit status. Under torchrun rank 0 speaks for all."""
    args = build_parser().parse_args(argv)
    with contextlib.redirect_stdout(None if rank_of_torchrun() else sys.stdout):
        return exit_status(functools.partial(run, args), REMEDIES)


def run(args: Namespace) -> int:
    """From flags to slides.csv; 1 where a slide failed or the download was declined."""
    check(args)
    rank, world = rank_of_torchrun(), int(os.environ.get("WORLD_SIZE", 1))
    job, workers = job_of(args), args.workers or cpu_share()
    damaged: list[str] = []
    known = read_rows(job.folder, damaged)
    slides = list_served(args) if job.download or job.link else list_folder(args)
    chosen, left_out = choose(args, slides, known, job)
    todo: Cohort = []
    finished: Cohort = []
    for slide in chosen:
        done = is_finished(slide, known.get(slide.name), job, tell=True)
        (finished if done else todo).append(slide)
    if job.link:
        tell_plan(todo)
    if args.download and not confirm_plan(todo, args, workers):
        print("nothing downloaded")
        return 1
    if rank == 0:
        set_aside(job.folder, damaged)
        write_manifest(job.folder, chosen)
        update_rows(job, slides, left_out, known)
        for slide in finished:
            discard(slide, job, known[slide.name])  # left by a run that was killed
    print(f"{len(finished)} slides are finished, {len(todo)} to do -> {job.folder}")
    start = len(todo) * rank // world  # each rank begins elsewhere
    busy = work_through(todo[start:] + todo[:start], job, workers)
    if rank:
        return 0  # a rank that ends with an error would take the others down; rank 0 reports
    # What other processes hold: wait for it, or do it if they died.
    work_through(busy, dataclasses.replace(job, wait=True), workers)
    return summarize(chosen, job)


def check(args: Namespace) -> None:
    """Complain about flags that do not go together."""
    if args.overlap >= args.patch_size:
        raise UserError(f"--overlap {args.overlap}: not less than --patch-size {args.patch_size}")
    if args.discard_slides and not (args.download and args.save_patches):
        raise UserError(
            "--discard-slides: only with --download (your own slides are never deleted) and "
            "--save-patches (or nothing would be left)"
        )
    check_remote(args)
    for name in ("masks", "manifest", "exclude"):
        path = getattr(args, name)
        if path and not path.exists():
            raise UserError(f"--{name} {path}: no such file or folder")


def check_remote(args: Namespace) -> None:
    """Complain about flags that do not go with slides read where they are."""
    if args.remote and (args.download or args.save_patches):
        raise UserError("--remote: without --download and --save-patches, which read slides whole")
    if args.download_rest and not args.remote:
        raise UserError("--download-rest: only with --remote")


def job_of(args: Namespace) -> Job:
    """The flags that concern single slides; each field of Limits is a flag of the same name."""
    names = [field.name for field in dataclasses.fields(Limits)]
    settings = Settings(
        Limits(**{name: getattr(args, name) for name in names}),
        args.assume_mpp,
        args.masks,
        args.jpeg_quality if args.save_patches else None,
    )
    folder = args.data / "tiles" / args.cancer
    link = Link(addresses_of(args)) if args.remote else None
    return Job(folder, settings, args.download, args.discard_slides, link, args.download_rest)


def addresses_of(args: Namespace) -> list[str]:
    """What --remote names."""
    return [args.gdc_url] if args.remote == GDC else read_addresses(args.remote)


def slides_folder(args: Namespace) -> Path:
    """Where the slides lie or will lie."""
    return args.slides or args.data / "slides" / args.cancer


def list_folder(args: Namespace) -> Cohort:
    """The slides in the folder, or those that the manifest names."""
    slides, notes = local_slides(slides_folder(args), args.manifest)
    for note in notes:
        print(f"note: {one_line(note)}")
    return slides


def list_served(args: Namespace) -> Cohort:
    """The slides at the GDC or at addresses, at the places of those that are here already."""
    folder = slides_folder(args)
    rows = read_manifest(args.manifest) if args.manifest else []
    listed = {row.path.name: row for row in rows}
    if args.remote not in (None, GDC):
        slides = slides_at(addresses_of(args), folder, listed)
    else:
        slides = ask_gdc(args.gdc_url, args.cancer, args.strategy or "diagnostic", folder, listed)
    if not slides:
        raise UserError(f"{args.gdc_url}: no such slides; see --cancer, --strategy, --manifest")
    names = Counter(slide.path.name for slide in slides)
    there = {path.name: path for path in find_slides(folder)}  # wherever a client put them
    for slide in slides:
        file = slide.path.name
        if row := listed.get(file):
            slide.mpp, slide.stated = row.mpp, row.stated
        if names[file] == 1 and not slide.path.is_file():
            slide.path = there.get(file, slide.path)
    return slides


def choose(
    args: Namespace, slides: Cohort, known: Rows, job: Job
) -> tuple[Cohort, dict[str, SkippedSlide]]:
    """(the slides to tile, why others are left out by name), of earlier runs too; tells of them."""
    names = {slide.name for slide in slides}
    earlier = [slide_of(row) for name, row in known.items() if name not in names]
    held = read_patients(args.exclude, slides + earlier) if args.exclude else set()
    strategy = args.strategy or ("diagnostic" if args.download or args.remote == GDC else "both")
    chosen, left_out = select(slides, held, strategy, args.max_slides, args.seed)
    note = f" (fewer than --max-slides {args.max_slides})" * (len(chosen) < args.max_slides)
    held_out = sum(reason.mend == "exclude" for reason in left_out.values())
    print(f"{len(slides)} slides, {held_out} held out, {len(chosen)} taken{note}")
    if args.exclude and not held_out:
        print(f"note: {args.exclude}: none of its patients is in this cohort")
    if not chosen:
        raise UserError("no slide is left to tile; see --exclude, --strategy and --manifest")
    return chosen, left_out | settle_earlier(earlier, slides, held, known, job)


def settle_earlier(
    earlier: Cohort, slides: Cohort, held: set[str], known: Rows, job: Job
) -> dict[str, SkippedSlide]:
    """Why slides of earlier runs are wanted no longer, by name; tells of those that stay.

    Raises UserError where these were tiled into other patches.
    """
    now = {os.path.realpath(slide.path): slide.name for slide in slides}
    reasons, stay = {}, []
    for slide in earlier:
        row, limits = known[slide.name], job.settings.limits
        if other := now.get(os.path.realpath(slide.path)):
            reasons[slide.name] = SkippedSlide(f"is {other} now")
        elif held & slide.patients:
            reasons[slide.name] = SkippedSlide("held out", mend="exclude")
        elif row["status"] == "done":
            stay.append(slide.name)
            size, mpp = int(row["patch_size"]), float(row["target_mpp"])
            if (size, mpp) != (limits.patch_size, limits.mpp):
                raise UserError(
                    f"{job.folder}: "
                    f"{slide.name} of an earlier run has patches of {size} px at {mpp} µm/px",
                    mend="settings",
                )
    if stay:
        names = ", ".join(stay[:5]) + ", ..." * (len(stay) > 5)
        print(
            f"note: {len(stay)} slides of earlier runs stay in slides.csv, though they are not in "
            f"the folder or manifest: {names}; --exclude takes them out"
        )
    return reasons


def cpu_share() -> int:
    """Processes that suit this rank: one per CPU."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cpus, 16) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def confirm_plan(todo: Cohort, args: Namespace, workers: int) -> bool:
    """Show what will be downloaded and whether it fits; True to go on."""
    sizes = sorted((slide.size for slide in todo if not slide.path.is_file()), reverse=True)
    if not sizes:
        return True
    folder, total = slides_folder(args), sum(sizes)
    need = sum(sizes[:workers]) if args.discard_slides else total
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    kept = f"; at most {need / 1e9:.2f} GB are kept at a time" if args.discard_slides else ""
    print(
        f"to download: {len(sizes)} slides, {total / 1e9:.2f} GB, to {folder} "
        f"({free / 1e9:.1f} GB free{kept})"
    )
    if need > free:
        raise UserError(
            f"{folder}: {need / 1e9:.1f} GB needed; take fewer slides by --max-slides, another "
            "disk by --data, or --save-patches --discard-slides"
        )
    if args.yes:
        return True
    if not sys.stdin.isatty():
        raise UserError("--download: add --yes to go on with this plan (no terminal to ask on)")
    return input("go on? [yes/no] ").strip().lower() in ("y", "yes")


def tell_plan(todo: Cohort) -> None:
    """Estimate what is read of slides that stay where they are, now and in training."""
    sizes = [slide.size for slide in todo if not slide.path.is_file()]
    now = sum(min(size, FIRST + size / 16) for size in sizes) / 1e9
    print(
        f"to read where they are: {len(sizes)} slides of {sum(sizes) / 1e9:,.3f} GB in all; "
        f"estimated: now {now:,.3f} GB, then 10 to 40 GB in a training run of 10,000 steps of 96 "
        "patches, up to four times that where tiles are not the patches (less where slides are "
        "few: distill.py fetches no tile twice while --cache holds it)",
    )


def set_aside(folder: Path, damaged: list[str]) -> None:
    """Keep a copy of a slides.csv with damaged rows; their slides are tiled anew."""
    if damaged:
        table = folder / "slides.csv"
        shutil.copy(table, table.with_suffix(".csv.damaged"))
        write_rows(folder, [])
        for fault in damaged:
            print(f"note: {fault}: damaged; what is lost is made anew (copy: {table}.damaged)")


def write_manifest(folder: Path, slides: Cohort) -> None:
    """manifest.txt, the slides used, as the GDC's client reads it."""
    text = "id\tfilename\tmd5\tsize\tstate\n"
    for slide in slides:
        key, state = (slide.id, "released") if slide.id else (slide.name, "local")
        text += f"{key}\t{one_line(slide.path.name)}\t{slide.md5}\t{slide.size}\t{state}\n"
    write_text(folder / "manifest.txt", text)


def update_rows(job: Job, slides: Cohort, left_out: dict[str, SkippedSlide], known: Rows) -> None:
    """Rows that the choice changes: of slides left out, or of another patient or place now."""
    rows = {name: dict(row) for name, row in known.items()}
    for name, error in left_out.items():
        if name in rows or not (job.download or job.link):
            row = rows.setdefault(name, {"slide": name})
            row |= {"status": "skipped", "reason": reason_of(error), "patches": "0", "settings": ""}
    for slide in slides:
        if found := rows.get(slide.name):
            found["patient"] = slide.patient
            if job.link or slide.path.is_file():
                found["path"] = place_of(slide, job)
    changed = [row for name, row in rows.items() if row != known.get(name)]
    if changed:
        write_rows(job.folder, changed)


def reason_of(error: BaseException) -> str:
    """What slides.csv says of an error, with what mends it."""
    told = explain(error, REMEDIES) if isinstance(error, UserError) else str(error)
    return one_line(told or type(error).__name__)


def work_through(slides: Cohort, job: Job, workers: int) -> Cohort:
    """Do all slides in worker processes; returns those that other processes have in hand.

    A slide whose reader takes the process down (some damaged files do) is recorded as failed.
    """
    busy, fetched = [], 0
    shown = rank_of_torchrun() == 0
    with (
        Progress(len(slides), "slide", interval=60, shown=shown) as progress,
        Pool(functools.partial(do_slide, job), workers) as pool,
    ):
        for slide, kind, content in pool.each(slides):
            if kind == "told":
                fetched += content
                rate = fetched / 1e6 / progress.seconds
                progress.step(0, f"{fetched / 1e9:.2f} GB fetched, {rate:.1f} MB/s")
            elif kind == "died":
                why = "an error of this program ended it, printed above"
                if content < 0:
                    name = f"({signal.Signals(-content).name})"
                    why = f"its reader died {name}: damaged, or too little memory"
                row = first_facts(slide, job) | {"reason": why}
                write_rows(job.folder, [row])
                tell_slide(progress, row)
            elif content is None:
                busy.append(slide)
            else:
                tell_slide(progress, content)
    return busy


def tell_slide(progress: Progress, row: dict) -> None:
    """One line for one slide."""
    what = f"{int(row['patches']):,} patches" if row["status"] == "done" else row["reason"]
    what += f" ({row['warnings']})" if row.get("warnings") else ""
    progress.step()
    progress.note(f"[{progress.done}/{progress.total}] {row['slide']}: {row['status']}, {what}")


def do_slide(job: Job, slide: CohortSlide, tell) -> dict | None:
    """Fetch, tile and discard one slide under its lock; its row, or None when another process has
    it in hand.
    """
    with locked(job.folder / ".locks" / slide.name, job.wait, limit=6 * 3600) as mine:
        if not mine:
            return None
        known = read_rows(job.folder, []).get(slide.name)
        if is_finished(slide, known, job):  # by another, since we looked
            return known
        start = perf_counter()
        row = first_facts(slide, job)
        try:
            tile_there_or_here(slide, job, row, tell)
        except SkippedSlide as error:
            row |= {"status": "skipped", "reason": reason_of(error)}
        except (UserError, PatchError, OSError, MemoryError, Image.DecompressionBombError) as error:
            if disk_full(error):  # every further slide would meet it
                raise
            row["reason"] = reason_of(error)
        if row["status"] != "failed":
            row["seals"] = seals_of(slide, job)
        row["seconds"] = f"{perf_counter() - start:.2f}"
        write_rows(job.folder, [row])
        if row["status"] != "failed":
            discard(slide, job, row)
        return row


def first_facts(slide: CohortSlide, job: Job) -> dict:
    """The row of a slide that is not read yet: failed, unless it is filled in further."""
    return {
        "slide": slide.name,
        "status": "failed",
        "patient": slide.patient,
        "patches": 0,
        "path": place_of(slide, job),
        "settings": job.settings.digest(slide),
        "patch_size": job.settings.limits.patch_size,
        "target_mpp": job.settings.limits.mpp,
    }


def discard(slide: CohortSlide, job: Job, row: Mapping) -> None:
    """Delete a slide that was downloaded here, if that is wanted and all of it could be read, when
    what was made of it is safe on disk.
    """
    mark = downloaded_mark(slide.path)
    if not (job.discard and mark.exists()) or int(row.get("unreadable") or 0):
        return
    for path in (*Outputs.of(job.folder, slide.name), job.folder / "slides.csv"):
        if path.exists():
            flush(path)
    slide.path.unlink(missing_ok=True)
    mark.unlink()
    with contextlib.suppress(OSError):  # its folder, if it had one of its own
        slide.path.parent.rmdir()


def renew_contact_sheet(folder: Path) -> None:
    """Draw contact.jpg where it is not the one of this slides.csv, whose time it gets."""
    sheet, now = folder / "contact.jpg", (folder / "slides.csv").stat().st_mtime_ns
    if not sheet.exists() or sheet.stat().st_mtime_ns != now:
        write_contact_sheet(folder)
        os.utime(sheet, ns=(now, now))


def summarize(slides: Cohort, job: Job) -> int:
    """What shows the whole cohort, the slides that failed, the last line; the exit status."""
    every = read_rows(job.folder)
    rows = [every[slide.name] for slide in slides]
    done = [row for row in rows if row["status"] == "done"]
    for row, slide in zip(rows, slides, strict=True):
        if row["status"] == "done" and not job.settings.made(row, slide):
            raise UserError(
                f"{job.folder}: another run has tiled {slide.name} otherwise meanwhile",
                mend="settings",
            )
    write_clam_list(job.folder)
    if done:
        renew_contact_sheet(job.folder)
    failed = [row for row in rows if row["status"] == "failed"]
    for row in failed[:10]:
        print(f"failed: {row['slide']}: {row['reason']}")
    patients = len({row["patient"] for row in done})
    whose = f" of {patients} patients" * (patients < len(done))  # shows who was taken for one
    warned = sum(bool(row["warnings"]) for row in rows)
    print(
        f"{len(done)} slides{whose} done{f' ({warned} with warnings)' * bool(warned)}, "
        f"{len(rows) - len(done) - len(failed)} skipped, {len(failed)} failed; "
        f"{sum(int(row['patches']) for row in done):,} patches; see {job.folder}/slides.csv"
    )
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())

"""Download from the GDC: a server on this machine, with every fault it can have."""

import hashlib
import io
import json
import os
import sys
import threading
from argparse import Namespace
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
import tifffile
from cohorts import rows
from servers import Answering

import tile
from g2l.patches import PatchIndex

ANSWERS = {
    "html": (200, b"<html>"),
    "nothing": (200, b"{}"),
    "no list": (200, b'{"data": {"hits": [1, "x"], "pagination": {"total": 2}}}'),
    "infinite": (200, b'{"data": {"hits": [], "pagination": {"total": Infinity}}}'),
    "many": (200, b'{"data": {"hits": [], "pagination": {"total": 1000000000}}}'),
    "deep": (200, b"[" * 100_000),
    "deep hits": (200, b'{"data": {"hits": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}"),
    "long number": (200, b'{"data": {"hits": [], "pagination": {"total": 1' + b"0" * 9999 + b"}}}"),
    "large": (200, b" " * 2_000_000),
}


class Gdc(Answering):
    """The part of the GDC's interface that is used, with faults to order: {id or "files": [fault,
    ...]}.
    """

    slides, faults, changes, log = {}, {}, {}, []  # set anew by the fixture

    def fault(self, key):
        waiting = self.faults.get(key, [])
        return waiting.pop(0) if waiting else None

    def do_POST(self):
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert query["sort"] == "file_id:asc", "pages of no order may overlap"
        fault = self.fault("files")
        if fault == "cut":
            self.close_connection = True
            return self.reply(200, b'{"data":', length=1000)
        if fault:
            return self.reply(*ANSWERS.get(fault, (fault, b"")))
        hits = [
            {"file_id": key, "file_name": name, "file_size": len(body), "md5sum": md5}
            for key, (name, body, md5) in self.slides.items()
        ]
        hits = [hit | self.changes.get(hit["file_id"], {}) for hit in hits]
        for clause in query["filters"]["content"]:
            field, values = clause["content"]["field"], clause["content"]["value"]
            if field == "file_name":
                hits = [hit for hit in hits if hit["file_name"] in values]
            if field == "cases.project.project_id":
                assert values == ["TCGA-UCS"]
        page = hits[
            query["from"] : query["from"] + min(query["size"], 2)
        ]  # this server gives two a page
        self.reply(
            200, json.dumps({"data": {"hits": page, "pagination": {"total": len(hits)}}}).encode()
        )

    def do_GET(self):
        key = self.path.removeprefix("/data/")
        fault = self.fault(key)
        self.log.append((key, self.headers.get("Range"), fault))
        if key not in self.slides:
            return self.reply(404, b"")
        if isinstance(fault, int):
            return self.reply(fault, b"", [("Retry-After", "1")])
        body = self.slides[key][1]
        total, start = len(body), 0
        if self.headers.get("Range") and fault != "norange":
            start = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
        headers = [("Content-Disposition", 'attachment; filename="../../evil.svs"')]
        if start:
            headers.append(("Content-Range", f"bytes {start}-{total - 1}/{total}"))
        part = body[start:]
        if fault == "corrupt":
            part = bytes(len(part))
        if fault == "long":
            part += b"more"
        if fault == "short":
            part = part[: len(part) // 2]
        if fault == "cut":
            self.reply(206 if start else 200, part[: len(part) // 2], headers, len(part))
            self.close_connection = True
            return None
        return self.reply(206 if start else 200, part, headers)


@pytest.fixture
def gdc(sound, monkeypatch):
    """A server with four slides; its address. No picture of the cohort, which takes a while."""
    md5 = hashlib.md5(sound).hexdigest()
    Gdc.slides = {f"uuid-{n}": (f"TCGA-N5-A4R{n}-01Z-00-DX1.{n}.svs", sound, md5) for n in range(4)}
    Gdc.faults, Gdc.changes, Gdc.log = {}, {}, []
    monkeypatch.setattr("g2l.network.RETRY_SECONDS", 0.001)
    monkeypatch.setattr("tile.renew_contact_sheet", lambda folder: None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Gdc)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def download(data, gdc, *args):
    return tile.main(
        [
            "--cancer",
            "ucs",
            "--data",
            str(data),
            "--download",
            "--gdc-url",
            gdc,
            "--workers",
            "2",
            *args,
        ]
    )


def test_download_plans_first(tmp_path, gdc, capsys):
    assert download(tmp_path, gdc) == 1
    captured = capsys.readouterr()
    assert (
        "to download: 4 slides, 0.00 GB" in captured.out
        and "GB free" in captured.out
        and "--yes" in captured.err
    )
    assert not Gdc.log


@pytest.mark.parametrize(("typed", "status"), [("no", 1), ("", 1), ("yes", 0)])
def test_download_goes_on_with_a_typed_yes(tmp_path, gdc, monkeypatch, typed, status):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda _: typed)
    assert download(tmp_path, gdc) == status and bool(Gdc.log) == (status == 0)


def test_download_needs_room(tmp_path, gdc, monkeypatch, capsys):
    monkeypatch.setattr("shutil.disk_usage", lambda _: Namespace(free=1000))
    assert download(tmp_path, gdc, "--yes") == 1 and not Gdc.log
    assert "--save-patches --discard-slides" in capsys.readouterr().err


@pytest.mark.parametrize(
    "fault", ["cut", "short", "corrupt", "long", "norange", 416, 429, 503, 500]
)
def test_download_survives(tmp_path, gdc, sound, fault):
    Gdc.faults = {
        "uuid-1": ["cut", fault] + [fault] * (fault != 416),
        "files": [503],
    }  # 416 answers a range only
    assert download(tmp_path, gdc, "--yes") == 0
    table = rows(tmp_path, "ucs")
    assert len(table) == 4 and all(row["status"] == "done" for row in table.values())
    slide = tmp_path / "slides" / "ucs" / "uuid-1" / "TCGA-N5-A4R1-01Z-00-DX1.1.svs"
    assert (
        slide.read_bytes() == sound
        and not list(tmp_path.rglob("*.partial"))
        and not list(tmp_path.rglob("evil*"))
    )
    ranges = [span for key, span, _ in Gdc.log if key == "uuid-1"]
    assert ranges[0] is None and ranges[1] == f"bytes={len(sound) // 2}-", (
        "it went on where it was cut"
    )
    requests = len(Gdc.log)
    assert download(tmp_path, gdc, "--yes") == 0 and len(Gdc.log) == requests, (
        "nothing is fetched twice"
    )


@pytest.mark.parametrize("fault", ["cut", 503, *ANSWERS])
def test_list_of_files_comes_broken(tmp_path, gdc, fault, capsys, monkeypatch):
    """A list cut short is asked for again; an answer that is no list is an error, not a
    traceback.
    """
    monkeypatch.setattr("g2l.gdc.MOST_BYTES", 1_000_000)
    Gdc.faults = {"files": [fault]}
    passes = fault in ("cut", 503)
    assert download(tmp_path, gdc, "--yes") == (0 if passes else 1)
    error = capsys.readouterr().err
    assert passes or "is it a GDC server?" in error or "an answer of more than" in error


@pytest.mark.parametrize(
    "change", [{"file_size": None}, {"file_size": 0}, {"file_size": "x"}, {"md5sum": None}]
)
def test_hostile_entries_of_the_list(tmp_path, gdc, change, capsys):
    Gdc.changes = {"uuid-1": change}
    assert download(tmp_path, gdc, "--yes") == 0
    assert len(rows(tmp_path, "ucs")) == 3 and "refused" in capsys.readouterr().out


def test_a_harmed_partial_file_is_fetched_anew(tmp_path, gdc, sound):
    Gdc.faults = {"uuid-1": ["cut", *[404] * 9]}
    assert download(tmp_path, gdc, "--yes") == 1
    (partial,) = tmp_path.rglob("*.partial")
    half = bytearray(partial.read_bytes())
    half[len(half) // 2] ^= 1
    partial.write_bytes(half)
    Gdc.faults = {}
    assert download(tmp_path, gdc, "--yes") == 0
    assert partial.with_suffix("").read_bytes() == sound and not partial.exists()


def test_download_gives_up_on_one_slide_only(tmp_path, gdc, capsys):
    Gdc.faults = {"uuid-2": ["corrupt"] * 99, "uuid-3": [404] * 99}
    assert download(tmp_path, gdc, "--yes") == 1
    table = rows(tmp_path, "ucs")
    assert sorted(row["status"] for row in table.values()) == ["done", "done", "failed", "failed"]
    reasons = [row["reason"] for row in table.values() if row["status"] == "failed"]
    assert "md5" in reasons[0] and "404" in reasons[1]
    Gdc.faults = {}
    assert download(tmp_path, gdc, "--yes") == 0


@pytest.mark.parametrize(
    "name",
    [
        "../../evil.svs",
        "/etc/evil.svs",
        "a/b.svs",
        "..\\evil.svs",
        ".svs",
        "evil.sh",
        "-rf.svs",
        "a\nb.svs",
        "",
    ],
)
def test_names_from_the_network_never_choose_a_path(tmp_path, gdc, name, capsys):
    Gdc.slides["uuid-0"] = (name, *Gdc.slides["uuid-0"][1:])
    Gdc.slides["../../up"] = Gdc.slides["uuid-1"]
    assert download(tmp_path / "data", gdc, "--yes") == 0
    assert (
        len(rows(tmp_path / "data", "ucs")) == 3 and capsys.readouterr().out.count("refused") == 2
    )
    folders = sorted(path.name for path in (tmp_path / "data" / "slides" / "ucs").iterdir())
    assert folders == ["uuid-1", "uuid-2", "uuid-3"]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_discarded_slides_leave_their_patches(tmp_path, gdc):
    own = tmp_path / "slides" / "ucs" / "uuid-3" / Gdc.slides["uuid-3"][0]
    own.parent.mkdir(parents=True)
    own.write_bytes(Gdc.slides["uuid-3"][1])
    assert download(tmp_path, gdc, "--yes", "--save-patches", "--discard-slides") == 0
    assert list((tmp_path / "slides").rglob("*.svs")) == [own], (
        "a slide that was there before is not ours to delete"
    )
    index = PatchIndex(tmp_path / "tiles" / "ucs")
    assert len(index.slides) == 4 and index.read(0).shape == (256, 256, 3)
    requests = len(Gdc.log)
    assert download(tmp_path, gdc, "--yes", "--save-patches", "--discard-slides") == 0
    assert len(Gdc.log) == requests, "finished slides are not fetched again"


def test_manifest_is_matched_by_name_and_slides_at_hand_are_used(tmp_path, gdc, sound):
    """Ids of before Data Release 31 are dead; names and md5 hold."""
    lines = ["id\tfilename\tmd5\tsize\tstate"]
    lines += [f"dead-{n}\t{Gdc.slides[f'uuid-{n}'][0]}\tx\t1\treleased" for n in (1, 2)]
    (tmp_path / "manifest.txt").write_text("\n".join(lines))
    flat = tmp_path / "slides" / "ucs" / Gdc.slides["uuid-2"][0]
    flat.parent.mkdir(parents=True)
    flat.write_bytes(sound)
    assert download(tmp_path, gdc, "--yes", "--manifest", str(tmp_path / "manifest.txt")) == 0
    assert [key for key, *_ in Gdc.log] == ["uuid-1"] and len(rows(tmp_path, "ucs")) == 2
    (tmp_path / "own.csv").write_text(f"slide,patient\n{Gdc.slides['uuid-1'][0]},Ann\n")
    assert download(tmp_path, gdc, "--yes", "--manifest", str(tmp_path / "own.csv")) == 0
    assert [row["patient"] for row in rows(tmp_path, "ucs").values()].count("Ann") == 1


def test_only_tcga_projects_are_downloaded(tmp_path, gdc, capsys):
    assert (
        tile.main(["--cancer", "mine", "--data", str(tmp_path), "--download", "--gdc-url", gdc])
        == 1
    )
    assert "knows the TCGA projects" in capsys.readouterr().err


def test_two_ids_of_one_file_name_are_kept_apart(tmp_path, gdc):
    Gdc.slides["uuid-1"] = (Gdc.slides["uuid-0"][0], *Gdc.slides["uuid-1"][1:])
    flat = tmp_path / "slides" / "ucs" / Gdc.slides["uuid-0"][0]
    flat.parent.mkdir(parents=True)
    flat.write_bytes(Gdc.slides["uuid-0"][1])  # whose it is, its name does not say
    assert download(tmp_path, gdc, "--yes") == 0
    table = rows(tmp_path, "ucs")
    assert len(table) == 4 and len({row["path"] for row in table.values()}) == 4
    assert sorted(name for name in table if "A4R0" in name) == [
        "uuid-0_TCGA-N5-A4R0-01Z-00-DX1.0",
        "uuid-1_TCGA-N5-A4R0-01Z-00-DX1.0",
    ]


@pytest.mark.parametrize("kind", ["size", "md5"])
def test_a_local_copy_that_is_another_file_is_told_and_kept(tmp_path, gdc, sound, kind, capsys):
    own = tmp_path / "slides" / "ucs" / Gdc.slides["uuid-3"][0]
    own.parent.mkdir(parents=True)
    other = sound + b"more" if kind == "size" else sound[:-1] + b"!"
    own.write_bytes(other)
    assert download(tmp_path, gdc, "--yes") == 1 and own.read_bytes() == other
    row = rows(tmp_path, "ucs")[own.stem]
    assert (
        row["status"] == "failed" and "size or md5 is not what the server states" in row["reason"]
    )
    assert "run without --download" in row["reason"]


def test_a_slide_left_by_a_kill_is_discarded_by_the_next_run(tmp_path, gdc, monkeypatch):
    flags = "--yes", "--save-patches", "--discard-slides"
    with monkeypatch.context() as patch:
        patch.setattr("tile.discard", lambda *_: None)  # killed between row and deletion
        assert download(tmp_path, gdc, *flags) == 0
    assert len(list((tmp_path / "slides").rglob("*.svs"))) == 4
    assert download(tmp_path, gdc, *flags) == 0
    assert not list((tmp_path / "slides").rglob("*.svs"))


def test_a_slide_with_unreadable_patches_is_never_discarded(tmp_path, gdc, sound):
    page, rotten = tifffile.TiffFile(io.BytesIO(sound)).pages[0], bytearray(sound)
    start, count = page.dataoffsets[5], page.databytecounts[5]
    rotten[start : start + count] = bytes(count)
    md5 = hashlib.md5(rotten).hexdigest()
    Gdc.slides = {"uuid-0": (Gdc.slides["uuid-0"][0], bytes(rotten), md5)}
    for _ in range(2):
        assert download(tmp_path, gdc, "--yes", "--save-patches", "--discard-slides") == 0
        assert len(list((tmp_path / "slides").rglob("*.svs"))) == 1


def test_what_a_slide_is_deleted_for_is_on_the_disk_first(tmp_path, gdc, monkeypatch):
    events = []
    sync, unlink = os.fsync, Path.unlink

    def fsync(handle):
        events.append(os.readlink(f"/proc/self/fd/{handle}"))
        sync(handle)

    def forget(path, missing_ok=False):
        events.append(str(path))
        unlink(path, missing_ok=missing_ok)

    flags = "--yes", "--save-patches", "--discard-slides"
    with monkeypatch.context() as patch:
        patch.setattr("tile.discard", lambda *_: None)
        assert download(tmp_path, gdc, *flags) == 0
    monkeypatch.setattr("os.fsync", fsync)
    monkeypatch.setattr(Path, "unlink", forget)
    assert download(tmp_path, gdc, *flags) == 0
    name = Gdc.slides["uuid-0"][0]
    deleted = next(i for i, event in enumerate(events) if event.endswith(f"uuid-0/{name}"))
    before = events[:deleted]
    for file in (f"{name[:-4]}_patches.h5", f"{name[:-4]}.tar", "slides.csv", "/shards"):
        assert any(event.endswith(file) for event in before), file

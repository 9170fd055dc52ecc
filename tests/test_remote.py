"""Slides that are served: the same coordinates and pixels as at hand, whatever the server does."""

import sqlite3
from types import SimpleNamespace

import numpy as np
import pytest
from cohorts import rows, tree
from conftest import SHARED
from servers import serve
from synthetic import section, write_slide

import tile
from g2l.errors import PatchError
from g2l.patches import PatchIndex
from g2l.remote import Cache
from g2l.stream import Batches

FLAGS = "--workers", "1", "--assume-mpp", "0.25"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("g2l.network.RETRY_SECONDS", 0.001)
    monkeypatch.setattr("g2l.network.PATIENCE", 0.3)


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Content by file name: tiles on and off the grid of patches; real slides where there are."""
    folder = tmp_path_factory.mktemp("slides")
    write_slide(folder / "a.svs", section(1280, 1280))
    write_slide(folder / "b.svs", section(1200, 1200, 1), tile_size=240)
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    for path in sorted((SHARED / "slides").glob("TCGA*.svs")) if SHARED else ():
        found[path.name] = path.read_bytes()
    return found


def command(data, name, *more):
    return tile.main(["--cancer", name, "--data", str(data), *FLAGS, *map(str, more)])


def tiled(data, server, *more):
    """Tile what a server has, by a list of addresses; the status."""
    text = "".join(f"{server.url}/x/{name}\n" for name in server.files)
    (data / "list.txt").write_text(text)
    return command(data, "far", "--remote", data / "list.txt", *more)


@pytest.fixture
def far(tmp_path, slides):
    """A cohort tiled where it is served: its data folder, its server."""
    with serve({name: (name, body) for name, body in slides.items()}) as server:
        assert tiled(tmp_path, server) == 0
        server.seen.clear()
        yield SimpleNamespace(data=tmp_path, server=server, folder=tmp_path / "tiles" / "far")


def test_served_slides_give_the_coordinates_and_pixels_of_those_at_hand(far, slides, capsys):
    near = far.data / "slides" / "near"
    near.mkdir(parents=True)
    for name, body in slides.items():
        (near / name).write_bytes(body)
    assert command(far.data, "near") == 0
    (_, theirs), (_, ours) = tree(far.data / "tiles" / "near"), tree(far.folder)
    assert ours == theirs and len(ours) == len(slides)
    here, there = PatchIndex(far.data / "tiles" / "near"), PatchIndex(far.folder, cache=1 << 30)
    there.ahead(range(len(there)))
    for i in range(len(here)):
        assert np.array_equal(here.read(i), there.read(i))
    there.close()
    again = PatchIndex(far.folder, cache=1 << 30)
    far.server.always = 503
    for i in range(len(here)):
        assert np.array_equal(here.read(i), again.read(i))  # all is kept on disk
    batches = [Batches(index, np.zeros(len(slides), bool), 0, 4, 48, "slide") for index in
               (here, again)]  # fmt: skip
    assert (batches[0][1][0] == batches[1][1][0]).all()


def test_nothing_is_done_twice_and_a_changed_slide_is_tiled_anew(far):
    assert tiled(far.data, far.server) == 0
    assert len(far.server.seen) == len(far.server.files), "each is asked for its version only"
    far.server.etag = '"two"'
    index = PatchIndex(far.folder)
    with pytest.raises(PatchError, match="changed since it was tiled"):
        index.read(0)
    assert tiled(far.data, far.server) == 0
    assert PatchIndex(far.folder).read(0).shape == (256, 256, 3)


@pytest.mark.parametrize("fault", [503, 429, "cut", "stall", "short", "shift"])
def test_what_passes_is_tried_again(far, fault):
    sound = PatchIndex(far.folder).read(0)
    far.server.faults = [fault, fault]
    assert np.array_equal(PatchIndex(far.folder).read(0), sound)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("norange", "no ranges"),
        (403, "credential"),
        (404, "404"),
        (503, "503"),
        ("short", "bytes where"),
        ("http://elsewhere.invalid", "not listed"),
    ],
)
def test_what_does_not_pass_is_an_unreadable_patch(far, fault, words):
    far.server.always = fault
    with pytest.raises(PatchError, match=words):
        PatchIndex(far.folder).read(0)


def test_a_server_that_fails_while_tiling_fails_the_slide_and_loses_nothing(far, capsys):
    for path in far.folder.glob("patches/*.h5"):
        path.unlink()
    far.server.faults = [None] * len(far.server.files) + [503] * 5
    assert tiled(far.data, far.server) == 1 and "503" in capsys.readouterr().out
    assert tiled(far.data, far.server) == 0


def test_the_gdc_by_name_and_what_needs_openslide(tmp_path, slides, capsys):
    strips = tmp_path / "TCGA-N5-A4R1-01Z-00-DX1.svs"
    write_slide(strips, section(1024, 1024), missing=(5, 6, 7))
    files = {
        "id-0": ("TCGA-N5-A4R0-01Z-00-DX1.svs", slides["a.svs"]),
        "id-1": (strips.name, strips.read_bytes()),
    }
    with serve(files) as server:
        flags = "--remote", "--gdc-url", server.url
        assert command(tmp_path, "ucs", *flags) == 0
        assert "to read where they are: 2 slides" in capsys.readouterr().out
        table = rows(tmp_path, "ucs")
        assert [row["status"] for row in table.values()] == ["done", "skipped"]
        assert "--download-rest" in table[strips.stem]["reason"]
        assert not list((tmp_path / "slides").rglob("*.svs"))
        assert command(tmp_path, "ucs", *flags, "--download-rest") == 0
        table = rows(tmp_path, "ucs")
        assert [row["status"] for row in table.values()] == ["done", "done"]
        (path,) = (tmp_path / "slides").rglob("*.svs")
        assert table[strips.stem]["path"] == str(path) and path.read_bytes() == files["id-1"][1]
        index = PatchIndex(tmp_path / "tiles" / "ucs")
        for start in index.starts:
            assert index.read(int(start)).shape == (256, 256, 3)
        server.seen.clear()
        assert command(tmp_path, "ucs", *flags, "--download-rest") == 0 and not server.seen


def test_an_s3_bucket_is_listed_and_read(tmp_path, slides, monkeypatch):
    from g2l import remote

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "known")
    with serve({name: (name, slides[name]) for name in ("a.svs", "b.svs")}) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        remote._s3.cache_clear()
        remote._signed.cache_clear()
        (tmp_path / "list.txt").write_text("s3://bucket/some/\n")
        assert command(tmp_path, "far", "--remote", tmp_path / "list.txt") == 0
        index = PatchIndex(tmp_path / "tiles" / "far")
        assert len(index.slides) == 2 and index.read(0).shape == (256, 256, 3)
    remote._s3.cache_clear()
    remote._signed.cache_clear()


def test_the_cache_keeps_its_bound_and_mends_what_decayed(tmp_path, far):
    cache = Cache(tmp_path / "x.sqlite", 400_000)
    for number in range(200):
        cache.put(str(number), bytes(10_000))
    cache.flush()
    assert (tmp_path / "x.sqlite").stat().st_size <= 400_000 and cache.get("0")
    index = PatchIndex(far.folder, cache=1 << 30)
    sound = index.read(0)
    index.close()
    with sqlite3.connect(far.folder / "cache.sqlite") as base:
        base.execute("UPDATE tiles SET data = zeroblob(length(data))")
    assert np.array_equal(PatchIndex(far.folder, cache=1 << 30).read(0), sound)


def test_addresses_must_be_addresses(tmp_path, capsys):
    (tmp_path / "list.txt").write_text("ftp://host/a.svs\n")
    assert command(tmp_path, "far", "--remote", tmp_path / "list.txt") == 1
    assert "no http(s):// or s3:// address" in capsys.readouterr().err

"""Slides that are served: the same coordinates and pixels as at hand, whatever the server does."""

import re
import shutil
import sqlite3
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cohorts import rows, tree
from conftest import SHARED
from servers import serve
from synthetic import cut_out, section, stained, write_slide

import tile
from g2l.errors import PatchError, UserError
from g2l.patches import PatchIndex
from g2l.remote import Cache, Link
from g2l.stream import Batches

pytestmark = pytest.mark.usefixtures("impatient")
FLAGS = "--workers", "1", "--mpp", "0.42", "--assume-mpp", "0.42"  # one real slide states 0.499


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Content by file name: tiles on and off the grid of patches."""
    folder = tmp_path_factory.mktemp("slides")
    write_slide(folder / "a.svs", section(1280, 1280), mpp=None)
    write_slide(folder / "b.svs", section(1200, 1200, 1), mpp=None, tile_size=240)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def real_slides():
    """Content by file name of real slides, where there are."""
    paths = sorted((SHARED / "slides").glob("*.svs")) if SHARED else []
    return {path.name: path.read_bytes() for path in paths}


def command(data, name, *more):
    return tile.main(["--cancer", name, "--data", str(data), *FLAGS, *map(str, more)])


def tiled(data, server, *more):
    """Tile what a server has, by a list of addresses; the status."""
    text = "".join(f"{server.url}/x/{name}\n" for name in server.files)
    (data / "list.txt").write_text(text)
    return command(data, "far", "--remote", data / "list.txt", *more)


@pytest.fixture(scope="module")
def tiled_once(tmp_path_factory, slides):
    """A cohort tiled where it is served: its data folder, its server."""
    data = tmp_path_factory.mktemp("far")
    with serve({name: (name, body) for name, body in slides.items()}) as server:
        assert tiled(data, server) == 0
        yield SimpleNamespace(data=data, server=server)


@pytest.fixture
def far(tiled_once, tmp_path, slides):
    """A copy of that cohort, and its server without faults."""
    server = tiled_once.server
    shutil.copytree(tiled_once.data, tmp_path, dirs_exist_ok=True)
    server.files = {name: (name, body) for name, body in slides.items()}
    server.always, server.faults, server.etag = None, [], '"one"'
    server.seen.clear()
    server.sent.clear()
    return SimpleNamespace(data=tmp_path, server=server, folder=tmp_path / "tiles" / "far")


@pytest.mark.slow
def test_served_slides_give_the_coordinates_and_pixels_of_those_at_hand(tmp_path, slides):
    slides = slides | real_slides()
    near, folders = tmp_path / "slides" / "near", tmp_path / "tiles"
    near.mkdir(parents=True)
    for name, body in slides.items():
        (near / name).write_bytes(body)
    assert command(tmp_path, "near") == 0
    with serve({name: (name, body) for name, body in slides.items()}) as server:
        assert tiled(tmp_path, server) == 0
        (_, theirs), (_, ours) = tree(folders / "near"), tree(folders / "far")
        assert ours == theirs and len(ours) == len(slides)
        here, there = PatchIndex(folders / "near"), PatchIndex(folders / "far", cache=1 << 30)
        there.ahead(range(len(there)))
        for i in range(len(here)):
            assert np.array_equal(here.read(i), there.read(i))
        there.close()
        again = PatchIndex(folders / "far", cache=1 << 30)
        server.always = 503
        for i in range(len(here)):
            assert np.array_equal(here.read(i), again.read(i))  # all is kept on disk
        held_out = np.zeros(len(slides), bool)
        of_near, of_far = (Batches(index, held_out, 0, 4, 48, "slide") for index in (here, again))
        assert (of_near[0][1][0] == of_far[0][1][0]).all()


@pytest.mark.parametrize("change", ["etag", "length"])
def test_nothing_is_done_twice_and_a_changed_slide_is_tiled_anew(far, change):
    assert tiled(far.data, far.server) == 0
    assert len(far.server.seen) == len(far.server.files), "each is asked for its version only"
    if change == "etag":
        far.server.etag = '"two"'
    else:
        files = far.server.files.items()
        far.server.files = {key: (name, body + b"more") for key, (name, body) in files}
    index = PatchIndex(far.folder)
    with pytest.raises(PatchError, match="changed since it was tiled"):
        index.read(0)
    assert tiled(far.data, far.server) == 0
    assert PatchIndex(far.folder).read(0).shape == (256, 256, 3)


@pytest.mark.parametrize("fault", [503, 429, "cut", "stall", "short", "shift", "long"])
def test_what_passes_is_tried_again(far, fault):
    sound = PatchIndex(far.folder).read(0)
    far.server.faults = [fault, fault]
    assert np.array_equal(PatchIndex(far.folder).read(0), sound)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("norange", "no ranges"),
        (401, "credential"),
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


def test_redirects_lead_to_the_same_host_or_a_listed_one(slides, monkeypatch):
    files = {name: (name, slides[name]) for name in ("a.svs",)}
    with serve(files) as server, serve(files) as other:
        place = f"{server.url}/x/a.svs"
        for listed in ([place], [place, f"{other.url}/b.svs"]):
            server.faults = [server.url]
            assert Link(listed).fetch(place, 3, 9)[0] == slides["a.svs"][3:12]
        server.always = other.url
        assert Link(listed).fetch(place, 3, 9)[0] == slides["a.svs"][3:12]
        with pytest.raises(UserError, match="not listed"):
            Link([place]).fetch(place, 3, 9)
        server.always = server.url
        with pytest.raises(UserError, match="without end"):
            Link([place]).fetch(place, 3, 9)


def test_the_proxy_of_the_environment_is_taken(slides, monkeypatch):
    with serve({"a.svs": ("a.svs", slides["a.svs"])}) as server:
        monkeypatch.setenv("http_proxy", server.url.replace("//", "//me:word@"))
        place = "http://slides.invalid/x/a.svs"
        assert Link([place]).fetch(place, 3, 9)[0] == slides["a.svs"][3:12]
        assert server.seen[0][2]["proxy-authorization"].startswith("Basic ")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        place = f"{server.url}/x/a.svs"
        assert Link([place]).fetch(place, 3, 9)[0] == slides["a.svs"][3:12]
        assert "proxy-authorization" not in server.seen[1][2]


def test_a_server_that_fails_while_tiling_fails_the_slide_and_loses_nothing(far, capsys):
    for path in far.folder.glob("patches/*.h5"):
        path.unlink()
    far.server.faults = [None] * len(far.server.files) + [503] * 5
    assert tiled(far.data, far.server) == 1 and "503" in capsys.readouterr().out
    assert tiled(far.data, far.server) == 0


def test_the_gdc_by_name_and_what_needs_openslide(tmp_path, slides, capsys):
    strips = tmp_path / "TCGA-N5-A4R1-01Z-00-DX1.svs"
    write_slide(strips, section(1024, 1024), mpp=None, missing=(5, 6, 7))
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
        assert command(tmp_path, "ucs", "--download", "--yes", *flags[1:]) == 0
        assert [key for key, *_ in server.seen] == ["id-0"], "the other is at hand already"
        assert all(Path(row["path"]).is_file() for row in rows(tmp_path, "ucs").values())


def test_what_needs_openslide_is_downloaded_and_what_has_no_tissue_is_remembered(
    tmp_path, slides, monkeypatch, capsys
):
    """Of a list of addresses, with a password from ~/.netrc."""
    write_slide(tmp_path / "strips.svs", section(1024, 1024), mpp=None, missing=(5, 6, 7))
    blank = np.full((1024, 1024, 3), 240, np.uint8)
    write_slide(tmp_path / "blank.svs", blank, mpp=None)
    files = {"a.svs": ("a.svs", slides["a.svs"])}
    for name in ("strips.svs", "blank.svs"):
        files[name] = name, (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
    with serve(files) as server:
        server.auth = "Basic bWU6d29yZA=="
        assert tiled(tmp_path, server) == 1 and "credential" in capsys.readouterr().out
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password word\n")
        (tmp_path / ".netrc").chmod(0o600)
        assert tiled(tmp_path, server) == 0
        table = rows(tmp_path, "far")
        assert [table[name]["status"] for name in ("a", "blank", "strips")] == [
            "done",
            "skipped",
            "skipped",
        ]
        assert "OpenSlide" in table["strips"]["reason"] and "tissue" in table["blank"]["reason"]
        server.sent.clear()
        assert tiled(tmp_path, server, "--download-rest") == 0
        assert server.sent["blank.svs"] == 1, "it is asked for its version only"
        table = rows(tmp_path, "far")
        (path,) = (tmp_path / "slides").rglob("*.svs")
        assert table["strips"]["path"] == str(path) and table["strips"]["status"] == "done"
        assert path.read_bytes() == files["strips.svs"][1]
        index = PatchIndex(tmp_path / "tiles" / "far")
        for start in index.starts:
            assert index.read(int(start)).shape == (256, 256, 3)
        for more in ((), ("--download-rest",)):
            server.sent.clear()
            assert tiled(tmp_path, server, *more) == 0
            assert set(server.sent.values()) == {1}, "each is asked for its version only"


@pytest.mark.slow
def test_the_plan_is_an_estimate_that_holds_within_a_factor_of_two(tmp_path, capsys):
    """Of slides of more than a megabyte; below 6,400 px a thumbnail takes all of them. In training
    eight, where tiles are not the patches."""
    image = cut_out(np.tile(stained(2048, 2048), (4, 4, 1)))
    large = write_slide(tmp_path / "large.svs", image, mpp=None).read_bytes()
    files = real_slides() | {"large.svs": large}
    planned = {name: min(len(body), tile.FIRST + len(body) / 16) for name, body in files.items()}
    with serve({name: (name, body) for name, body in files.items()}) as server:
        assert tiled(tmp_path, server) == 0
        for name in files:
            assert 0.5 < server.sent[name] / planned[name] < 2, name
        told = re.search("estimated: now ([0-9.]+) GB", capsys.readouterr().out)
        assert float(told[1]) * 1e9 == pytest.approx(sum(planned.values()), rel=0.05)
        server.sent.clear()
        index = PatchIndex(tmp_path / "tiles" / "far")
        least, most = 10e9 / 960_000, 40e9 / 960_000  # bytes of a patch
        for number, name in enumerate(index.slides):
            for i in range(index.starts[number], index.starts[number] + 20):
                index.read(i)
            read = server.sent[f"{name}.svs"] / 20
            assert least / 2 < read < most * (8 if name.startswith("CMU") else 2), name


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
        now, signed = time.time(), remote._signed.cache_info().misses
        monkeypatch.setattr("time.time", lambda: now + 601)
        assert remote.url_of("s3://bucket/some/a.svs").startswith(server.url)
        assert remote._signed.cache_info().misses == signed + 1, "anew, if credentials expired"
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
    assert command(tmp_path, "far", "--remote", tmp_path / "other.txt") == 1
    assert "no address, and no file of addresses" in capsys.readouterr().err


def test_one_address_will_do(tmp_path, slides):
    with serve({"a.svs": ("a.svs", slides["a.svs"])}) as server:
        assert command(tmp_path, "far", "--remote", f"{server.url}/x/a.svs?signed=yes") == 0
    assert list(rows(tmp_path, "far")) == ["a"]

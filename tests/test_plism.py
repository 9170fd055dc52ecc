"""PLISM as the hub has it, on a small tree, and its scores against scikit-learn."""

import itertools

import h5py
import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import NearestNeighbors

import robustness
from g2l.errors import UserError
from g2l.features import load_cached
from g2l.plism import (
    BOARD,
    KINDS,
    MEASURES,
    TOP,
    blocks_of,
    compare,
    load_plism,
    summary,
)
from g2l.results import read_metrics

STAININGS = ("GMH", "GIV", "MY")
SCANNERS = ("S60", "AT2")


def write_plism(folder, tiles: int = 24):
    """Six slides with the same tiles, in eight blocks of tissue; staining tints, scanners blur."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    pictures = rng.integers(60, 256, (tiles, 32, 32, 3))
    names = [f"tile_16_{4 * (i // 3) + i % 3}_{7 + i % 2}" for i in range(tiles)]
    for staining, scanner in itertools.product(STAININGS, SCANNERS):
        path = folder / f"{staining}_{scanner}_to_GMH_S60.tif.h5"
        with h5py.File(path, "w") as file:
            for name, picture in zip(names, pictures, strict=True):
                tint = np.eye(3)[STAININGS.index(staining)] * 60
                dim = 1 - 0.2 * SCANNERS.index(scanner)
                file[name] = np.clip(picture * dim - tint, 0, 255).astype(np.uint8)
    return folder


@pytest.fixture
def tree(tmp_path):
    return write_plism(tmp_path / "plism")


def test_the_tree_is_read_as_it_is_published(tree):
    (tree / "README.md").write_text("a data set card")
    with h5py.File(tree / "MY_AT2_to_GMH_S60.tif.h5", "a") as file:
        del file["tile_16_0_7"]  # no tile of all slides then
    parts, kinds, blocks = load_plism(tree, 100, 0)
    assert [part.name for part in parts][:2] == ["plism-GIV_AT2", "plism-GIV_S60"]
    assert all(len(part) == 23 and part.ids == parts[0].ids for part in parts)
    assert parts[0].ids[:3] == ["tile_16_1_8", "tile_16_2_7", "tile_16_4_8"]
    with h5py.File(tree / "GIV_S60_to_GMH_S60.tif.h5") as file:
        assert (parts[1].images[2] == file["tile_16_4_8"][:]).all()
    assert kinds.sum(1).tolist() == [3, 6, 6, 15]
    assert len(np.unique(blocks)) == 8 and (np.diff(blocks) >= 0).all()
    some = load_plism(tree, 9, 1)[0][0].ids
    assert len(some) == 9 and some == [name for name in parts[0].ids if name in some]


def test_a_slide_that_is_there_twice_counts_once_and_a_damaged_one_is_named(tree):
    (tree / "copy").mkdir()
    copy = tree / "copy" / "GIV_S60_to_GMH_S60.tif.h5"
    copy.write_bytes((tree / copy.name).read_bytes())
    parts, kinds, _ = load_plism(tree, 100, 0)
    assert len(parts) == 6 and kinds.shape == (4, 15)
    damaged = tree / "MY_AT2_to_GMH_S60.tif.h5"
    damaged.write_bytes(damaged.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"MY_AT2_to_GMH_S60\.tif\.h5: .*truncated"):
        load_plism(tree, 100, 0)


def test_blocks_are_pieces_that_touch():
    names = ["tile_16_0_0", "tile_16_1_1", "tile_16_3_0", "tile_16_3_2", "tile_16_4_1"]
    assert blocks_of(names).tolist() == [1, 1, 2, 2, 2]


def by_hand(a: np.ndarray, b: np.ndarray) -> list[float]:
    """MEASURES of a pair of slides by scikit-learn."""
    n = len(a)
    similar = cosine_similarity(a, b)
    others = (similar.sum() - np.trace(similar)) / (n * (n - 1))
    search = NearestNeighbors(n_neighbors=max(TOP) + 1, metric="cosine").fit(np.concatenate([a, b]))
    near = search.kneighbors(np.concatenate([a, b]), return_distance=False)[:, 1:]  # not itself
    twin = np.roll(np.arange(2 * n), n)
    found = near == twin[:, None]
    return [np.trace(similar) / n, others, *(found[:, :k].any(1).mean() for k in TOP)]


def planted_slides(n: int = 60, slides: int = 6, width: int = 12, seed: int = 0):
    rng = np.random.default_rng(seed)
    tiles = rng.normal(size=(n, width))
    noise = [
        0.6 * rng.normal(size=(n, width)) + 0.6 * rng.normal(size=width) for _ in range(slides)
    ]
    return [(tiles + part).astype(np.float32) for part in noise]


def test_measures_equal_scikit_learn(monkeypatch):
    monkeypatch.setattr("g2l.plism.BLOCK", 7)
    x = planted_slides()
    values = compare(x, "cpu")
    assert values.shape == (15, len(MEASURES), 60)
    for found, (a, b) in zip(values, itertools.combinations(x, 2), strict=True):
        assert found.mean(1) == pytest.approx(by_hand(a, b), abs=1e-6)
    assert 0.05 < values[:, 2].mean() < values[:, 5].mean() < 0.95


def test_features_that_know_nothing_and_those_that_are_all_the_same():
    rng = np.random.default_rng(0)
    blind = compare([rng.normal(size=(80, 16)).astype(np.float32) for _ in range(8)], "cpu")
    cosine, others, *top = blind.mean((0, 2))
    assert [cosine, others] == pytest.approx([0, 0], abs=0.02)
    assert top == pytest.approx([k / 159 for k in TOP], abs=0.01)
    same = compare([np.ones((80, 16), np.float32)] * 3, "cpu").mean((0, 2))
    assert same == pytest.approx([1, 1, 0, 0, 0, 0])  # near, but nothing is recognised


def test_the_score_is_the_boards_and_its_interval_is_over_blocks(tree):
    _, kinds, _ = load_plism(tree, 9, 0)
    x = planted_slides()
    values = compare(x, "cpu")
    blocks = np.arange(60) // 6
    medians, draws = summary(values, kinds, blocks)
    pairs = [by_hand(a, b) for a, b in itertools.combinations(x, 2)]
    wanted = []
    for kind, measure in BOARD.items():
        mine = np.array(pairs)[kinds[KINDS.index(kind)], MEASURES.index(measure)]
        assert medians[kind, measure][0] == pytest.approx(np.median(mine), abs=1e-6)
        wanted.append(np.median(mine))
    assert draws[0] == pytest.approx(np.mean(wanted), abs=1e-6)
    weight = np.random.default_rng(0).multinomial(10, np.full(10, 0.1), 1000)[7]
    rows = np.concatenate(
        [np.flatnonzero(blocks == b) for b in range(10) for _ in range(weight[b])]
    )
    again, _ = summary(values[:, :, rows], kinds, blocks[rows])
    assert draws[8] == pytest.approx(np.mean([again[key][0] for key in BOARD.items()]))


@pytest.mark.slow
def test_the_command_finds_tiles_again(tree, capsys):
    results = tree.parent / "r"
    command = ["--benchmark", tree, "--models", "timm:test_vit", "timm:test_resnet", "--weights"]
    command += ["random", "--input-size", 32, "--device", "cpu", "--results", results]
    status = robustness.main(list(map(str, command)))
    out, err = capsys.readouterr()
    assert status == 0, err
    assert "24 tiles of 8 blocks of tissue in each of 6 slides, 15 pairs of slides" in out
    text = (results / "robustness" / "plism.md").read_text()
    assert "| chance | " in text and "| timm:test_vit − timm:test_resnet | " in text
    rows = {(r["model"], r["metric"]): r for r in read_metrics(results)}
    score = rows["timm:test_vit", "score"]
    assert 0 < score["low"] <= score["value"] <= score["high"] < 1
    assert rows["chance", "both top-10"]["value"] == pytest.approx(10 / 47, abs=0.15)
    kept = results / "features" / "timm_test_vit"
    slides = [f"plism-{a}_{b}" for a, b in itertools.product(sorted(STAININGS), sorted(SCANNERS))]
    x = [load_cached(kept / f"{name}.safetensors")[0] for name in slides]
    pairs = np.array([by_hand(a, b) for a, b in itertools.combinations(x, 2)])
    kinds = load_plism(tree, 200, 0)[1]
    for (kind, each), measure in itertools.product(zip(KINDS, kinds, strict=True), MEASURES):
        median = np.median(pairs[each, MEASURES.index(measure)])
        assert rows["timm:test_vit", f"{kind} {measure}"]["value"] == pytest.approx(
            median, abs=1e-5
        )
    capsys.readouterr()
    assert robustness.main(list(map(str, command))) == 0
    assert "24 images" not in capsys.readouterr().err  # features are kept


def test_an_unreadable_tile_is_left_out_and_told(tree, capsys):
    with h5py.File(tree / "MY_AT2_to_GMH_S60.tif.h5", "a") as file:
        del file["tile_16_2_7"]
        file["tile_16_2_7"] = np.zeros((32, 32), np.float32)
    command = ["--benchmark", tree, "--models", "timm:test_vit", "--weights", "random"]
    command += ["--input-size", 32, "--device", "cpu", "--results", tree.parent / "r"]
    status = robustness.main([*map(str, command), "--max-unreadable", "0.1"])
    out, err = capsys.readouterr()
    assert status == 1 and "23 tiles of 8 blocks" in out
    assert "plism: 1 images could not be read" in err


def test_faults(tree):
    with pytest.raises(UserError, match=r"6 slides .* of which 2 are asked for; .* three tiles"):
        load_plism(tree, 2, 0)
    for path in list(tree.glob("*.h5"))[1:]:
        path.unlink()
    with pytest.raises(UserError, match="1 slides of PLISM with 24 tiles in common, of which 9"):
        load_plism(tree, 9, 0)
    with h5py.File(next(tree.glob("*.h5")), "a") as file:
        file["thumbnail"] = 0
    with pytest.raises(UserError, match="thumbnail: no name of a tile of PLISM"):
        load_plism(tree, 9, 0)

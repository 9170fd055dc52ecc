"""The teacher paid once: the second run reads what the first computed, and only what is whole."""

import numpy as np
import pytest
import torch
from jobs import run_ranks
from training import CNN, VIT, command, fails, losses, same

import distill
from g2l.augment import draw_params
from g2l.errors import UserError
from g2l.patches import PatchIndex
from g2l.recipe import look
from g2l.teacher_cache import TeacherCache

pytestmark = pytest.mark.usefixtures("no_curve")


def test_rows_come_back_only_where_all_are_whole_and_of_the_same_patch(tmp_path):
    cache = TeacherCache(tmp_path, "key", 6)
    params = draw_params(0, 8, 4, 64, 48)._replace(pixels=torch.arange(4))
    rows = torch.randn(4, 6).half()
    assert cache.get(params) is None
    cache.put(params, rows)
    assert torch.equal(TeacherCache(tmp_path, "key", 6).get(params), rows)
    assert TeacherCache(tmp_path, "other", 6).get(params) is None
    assert cache.get(params._replace(pixels=torch.tensor([0, 1, 7, 3]))) is None
    assert cache.get(draw_params(0, 6, 4, 64, 48)._replace(pixels=torch.arange(4))) is None
    path = tmp_path / "key.rows"
    damaged = np.fromfile(path, np.uint8)
    damaged[8 * 12 + 5] ^= 1
    damaged.tofile(path)
    assert cache.get(params) is None
    cache.put(params, rows)
    assert torch.equal(cache.get(params), rows)


@pytest.mark.slow
def test_a_second_run_asks_the_teacher_nothing_and_a_sweep_agrees(data, tmp_path, monkeypatch):
    short = ["--max-steps", 6]
    kept = ["--teacher-cache", tmp_path / "kept", *short]
    assert distill.main(command(data, tmp_path, "first", *kept)) == 0
    asked = []

    def counting(model, images, *how):
        asked.append((model.training, len(images)))
        return look(model, images, *how)

    monkeypatch.setattr("g2l.recipe.look", counting)
    again = command(data, tmp_path, "again", *kept)
    assert distill.main(again) == 0
    assert asked.count((True, 8)) == 6  # the student, of every batch
    assert asked.count((False, 8)) == 0
    assert losses(tmp_path / "first") == losses(tmp_path / "again")
    other = command(data, tmp_path, "mse", *kept, "--loss", "mse", pair=CNN)
    assert distill.main(other) == 0
    alone = command(data, tmp_path, "alone", "--loss", "mse", *short, pair=CNN)
    alone += ["--teacher-cache", str(tmp_path / "new")]
    assert distill.main(alone) == 0
    same(tmp_path / "mse", tmp_path / "alone")


def test_other_pixels_under_the_same_names_are_noticed(data, tmp_path, monkeypatch):
    short = "--max-steps", 2, "--teacher-cache"
    assert distill.main(command(data, tmp_path, "first", *short, tmp_path / "kept")) == 0
    read = PatchIndex.read
    monkeypatch.setattr(PatchIndex, "read", lambda index, i: 255 - read(index, i))
    assert distill.main(command(data, tmp_path, "other", *short, tmp_path / "kept")) == 0
    assert distill.main(command(data, tmp_path, "alone", *short, tmp_path / "new")) == 0
    same(tmp_path / "other", tmp_path / "alone")


def test_rows_that_cannot_be_written_or_held_in_fp16_are_refused(
    data, tmp_path, capsys, monkeypatch
):
    def full(*_):
        raise OSError(28, "No space left on device")

    arguments = command(data, tmp_path, "r", "--teacher-cache", tmp_path / "kept")
    with monkeypatch.context() as patch:
        patch.setattr("os.pwrite", full)
        fails(arguments, "kept: No space left", "--teacher-cache", capsys=capsys)
    rows = torch.full((4, 6), torch.inf).half()
    with pytest.raises(UserError, match="not finite in fp16"):
        TeacherCache(tmp_path, "key", 6).put(draw_params(0, 8, 4, 64, 48), rows)


def test_ranks_share_the_cache_with_one_process(data, tmp_path):
    kept = ["--teacher-cache", tmp_path / "kept", "--sync", "--max-steps", 6]
    assert distill.main(command(data, tmp_path, "one", *kept)) == 0
    two = command(data, tmp_path, "two", *kept, "--batch-size", 4)
    for done in run_ranks(lambda: distill.main(two)):
        assert done.returncode == 0, done.stderr
    sizes = {path.stat().st_size for path in (tmp_path / "kept").glob("*.crc32")}
    assert len(list((tmp_path / "kept").glob("*.rows"))) == 1 and sizes == {4 * 6 * 8}
    first, second = losses(tmp_path / "one"), losses(tmp_path / "two")
    np.testing.assert_allclose([row[1] for row in first], [row[1] for row in second], rtol=2e-3)


def test_what_cannot_be_kept_is_refused(data, tmp_path, capsys, monkeypatch):
    more = ["--teacher-cache", tmp_path / "kept", "--tokens", "all", *VIT]
    fails(command(data, tmp_path, "r", *more), "--tokens cls", capsys=capsys)
    short = ["--max-steps", 2]
    assert distill.main(command(data, tmp_path, "r", *short)) == 0
    kept = [*short, "--teacher-cache", tmp_path / "kept"]
    fails(command(data, tmp_path, "r", *kept), "--teacher-cache", "fp16", capsys=capsys)

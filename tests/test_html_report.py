"""report.html: whole in itself, sorted by a real browser."""

import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from g2l.html_report import write_html

REPORT = """# Evaluation

![two](pictures/map.png)

![lost](pictures/lost.png) ![outside](../secret.png)

## Models

| model | parameters |
| --- | --- |
| b | 3.4 M |
| a | <u>1,280</u> M |
| c | **0.4** M |

## Table 1: {CKA}

No table. \\<script>alert(1)</script> <img src=x onerror=alert(2)> \\<u>name\\</u>
"""


@pytest.fixture
def page(tmp_path):
    folder = tmp_path / "results"
    (folder / "pictures").mkdir(parents=True)
    pixels = np.zeros((4, 4, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "pictures" / "map.png")
    Image.fromarray(pixels).save(tmp_path / "secret.png")
    (folder / "report.md").write_text(REPORT)
    return write_html(folder / "report.md")


def test_pictures_lie_in_the_page_and_nothing_from_outside_the_folder_does(page):
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 1
    assert 'src="pictures/lost.png"' in text and 'src="../secret.png"' in text
    assert "<script>alert" not in text and "<img src=x" not in text and "<u>name" not in text
    assert "<u>1,280</u>" in text
    assert re.findall(r'<a href="#[\w-]+">([^<]+)</a>', text) == ["Models", "Table 1: {CKA}"]
    assert "http" not in text.replace("http-equiv", "")


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
@pytest.mark.parametrize("clicks, wanted", [(1, "cba"), (2, "abc")])
def test_a_click_on_a_head_sorts_by_its_numbers(page, clicks, wanted):
    click = "document.querySelectorAll('th')[1].click();" * clicks
    page.write_text(page.read_text().replace("</body>", f"<script>{click}</script></body>"))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    done = subprocess.run(
        [*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert re.findall(r"<td>(\w)</td>", done.stdout) == list(wanted)


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_a_long_note_is_no_tower_on_a_telephone(page):
    head = "| benchmark | level | images | groups | classes | notes |\n|" + " --- |" * 6 + "\n"
    line = "| tumour | patch | 180 | 18 | benign 49, grade 3 56 | " + "a note of many words " * 20
    report = page.with_suffix(".md")
    report.write_text("# Evaluation\n\n" + head + line + "|\n")
    tell = "document.title = document.querySelector('tbody tr').offsetHeight"
    text = write_html(report).read_text()
    page.write_text(text.replace("</body>", f"<script>{tell}</script></body>"))
    for width, most in ((500, 400), (1300, 200)):
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        command += [f"--window-size={width},900", page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        assert 20 < int(re.search(r"<title>(\d+)</title>", done.stdout)[1]) < most

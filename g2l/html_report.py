"""report.html: report.md as one page that needs no network and no other file.

Pictures lie in the page and grow at a click, tables sort by the column whose head is clicked.
"""

import base64
import re
from pathlib import Path

from g2l.files import write_text

PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem;
  color: #222; background: #fff; }}
nav {{ position: sticky; top: 0; background: #fff; padding: .5rem 0;
  border-bottom: 1px solid #ccc; }}
nav a {{ margin-right: 1rem; }}
h2 {{ margin-top: 3rem; scroll-margin-top: 3rem; border-bottom: 1px solid #ccc; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums;
  width: max-content; max-width: max(100%, 50rem); }}
th, td {{ padding: .3rem .7rem; text-align: left; border-bottom: 1px solid #e5e5e5; }}
th {{ cursor: pointer; background: #f5f5f5; white-space: nowrap; }}
th:hover {{ background: #e8e8e8; }}
th[aria-sort=ascending]::after {{ content: " \\25b2"; }}
th[aria-sort=descending]::after {{ content: " \\25bc"; }}
tr:hover td {{ background: #fafafa; }}
img {{ max-width: min(100%, 36rem); vertical-align: top; cursor: zoom-in; border: 1px solid #eee; }}
img.whole {{ max-width: none; cursor: zoom-out; }}
</style>
</head>
<body>
<nav>{contents}</nav>
{body}
<script>
function value(row, column) {{
  const text = row.cells[column].textContent.trim();
  const number = parseFloat(text.replace(/,/g, ""));
  return Number.isNaN(number) ? text : number;
}}
function sort(head) {{
  const table = head.closest("table"), body = table.tBodies[0], column = head.cellIndex;
  const down = head.getAttribute("aria-sort") === "ascending";
  const rows = [...body.rows].sort((a, b) => {{
    const x = value(a, column), y = value(b, column);
    const alike = typeof x === typeof y;
    const order = alike ? (x > y) - (x < y) : typeof x === "number" ? -1 : 1;
    return down ? -order : order;
  }});
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  body.append(...rows);
}}
for (const head of document.querySelectorAll("th"))
  head.addEventListener("click", () => sort(head));
for (const image of document.querySelectorAll("img"))
  image.addEventListener("click", () => image.classList.toggle("whole"));
</script>
</body>
</html>
"""


def write_html(report: Path) -> Path:
    """report.html beside report.md, from that and the pictures it names; where it is."""
    import markdown

    convert = markdown.Markdown(extensions=["tables", "toc"])
    text = report.read_text(encoding="utf-8", errors="replace")
    # Our own markup is underlining alone; what names bring along stays text.
    text = re.sub(r"<(?!/?u>)", "&lt;", text.replace("\\<", "&lt;"))
    body = convert.convert(text)
    body = body.replace("<table>", '<div class="wide"><table>')
    body = body.replace("</table>", "</table></div>")
    body = re.sub(
        r'src="([^":]+)"',
        lambda found: f'src="{_embedded(report.parent, found[1])}"',
        body,
    )
    titles = [
        f'<a href="#{part["id"]}">{part["name"]}</a>'
        for top in convert.toc_tokens
        for part in top["children"]
    ]
    title = convert.toc_tokens[0]["name"] if convert.toc_tokens else "G2L"
    path = report.with_suffix(".html")
    write_text(path, PAGE.format(title=title, contents=" ".join(titles), body=body))
    return path


def _embedded(folder: Path, name: str) -> str:
    """A picture below the folder as a data URI; its name as it is where there is none."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        return name
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()

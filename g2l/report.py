"""Tables 1 and 2, the summary on the screen and report.md, drawn from recorded measurements alone.

`study` names what is compared: found (benchmarks), models, teacher, baseline, cards (by model),
results (folder) and the settings shown. `means` gathers the rows of metrics.jsonl, `Tables` makes
tables of them, and `write_report` puts these beside what one must know to read them.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np

from g2l.errors import one_line
from g2l.features import display
from g2l.field import LESS_IS_BETTER, TITLES
from g2l.files import clear_stale, safe, write_text
from g2l.html_report import write_html
from g2l.paper import paper_figure
from g2l.protocols import FEW
from g2l.results import Study

PAIRED = {"cka": "CKA to teacher", "knn": "kNN accuracy", "probe": "probe AUC"}


def means(rows: Sequence[dict]) -> dict[tuple, tuple[float, float, int]]:
    """(protocol, metric, model, benchmark[, other]) -> mean, sd and number of folds or seeds."""
    found: dict[tuple, list[float]] = {}
    for row in rows:
        fields = ("protocol", "metric", "model", "benchmark", "other")
        key = tuple(row[field] for field in fields if field in row)
        if row["value"] is not None:
            found.setdefault(key, []).append(row["value"])
    summary = {}
    for key, v in found.items():
        spread = float(np.std(v, ddof=1)) if len(v) > 1 else 0.0
        summary[key] = float(np.mean(v)), spread, len(v)
    return summary


def escaped(text: str) -> str:
    """Text from outside, such as a class's name, as itself: no Markdown, no HTML, one line."""
    return re.sub(r"[\\`*<|]|(?<=\])\(|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", one_line(text))


def markdown(head: str | list[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; in its cells only emphasis of the whole is markup. head: a list, or a text
    with tabs between the cells.
    """
    lines = []
    for row in (head.split("\t") if isinstance(head, str) else head, *rows):
        line = []
        for cell in row:
            mark, text, end = re.findall(r"(?s)^(<u>|\*{0,2})(.*?)(</u>|\*{0,2})$", cell)[0]
            line.append(f"{mark}{escaped(text)}{end}")
        lines.append(line)
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def ranked(values: Sequence[float | None], texts: list[str]) -> list[str]:
    """The best text bold, the second underlined, as the paper prints."""
    rounded = [None if v is None else round(v, 4) for v in values]
    order = sorted({v for v in rounded if v is not None}, reverse=True)
    marks: dict = dict(zip(order, ("**{}**", "<u>{}</u>"), strict=False))
    return [marks.get(v, "{}").format(t) for v, t in zip(rounded, texts, strict=True)]


def families(names: Sequence[str]) -> dict[str, list[str]]:
    """Rows of a table: each benchmark, and before magnifications (NAME-40x ...) their mean."""
    stems = [re.sub(r"-\d+x$", "", name) for name in names]
    rows: dict[str, list[str]] = {}
    for name, stem in zip(names, stems, strict=True):
        members = [n for n, other in zip(names, stems, strict=True) if other == stem]
        if stem != name and len(members) > 1:
            rows.setdefault(f"{stem} (mean of {len(members)})", members)
        rows[name] = [name]
    return rows


def provenance(device: object) -> str:
    """The last line of a table: the command, revision, versions and device that made it."""
    from g2l.runs import describe_setting

    setting = describe_setting()
    versions = ", ".join(f"{name} {version}" for name, version in setting["versions"].items())
    made = f"`python {setting['command']}`, revision {setting['revision'] or 'unknown'}"
    return f"\nMade by {made}, with {versions}, on {device}.\n"


class Tables:
    """What Tables 1 and 2 of a study are made of."""

    def __init__(self, study: Study):
        self.study = study
        self.mean = means(study.rows)
        undefined = [row for row in study.rows if row["value"] is None and "other" not in row]
        self.undefined = means([row | {"value": 1.0} for row in undefined])
        self.models = [display(n) for n in study.models]
        self.teacher = display(study.teacher) if study.teacher in study.models else None
        self.metadata = {r["model"]: r["metadata"] for r in study.rows if r["protocol"] == "model"}
        self.data = {r["benchmark"]: r for r in study.rows if r["protocol"] == "data"}

    def average(self, members: list[str], protocol: str, metric: str, model: str, *other):
        """Mean and standard deviation, averaged over benchmarks; None unless each has them."""
        keys = [(protocol, metric, model, benchmark, *other) for benchmark in members]
        if any(key not in self.mean for key in keys):
            return None, None
        return np.mean([self.mean[key][:2] for key in keys], 0).tolist()

    def body(self, names: Sequence[str], models: list[str], cell: Callable, paper: str):
        """Label, benchmarks and ranked cells of each row.

        cell(benchmarks, model) gives value and text; `paper` names the paper's measure beside it.
        """
        for label, members in families(names).items():
            values = []
            texts = []
            for model in models:
                value, text = cell(members, model)
                if value is not None:
                    row = label.removesuffix(" (mean of 4)")
                    if paper == "cka":
                        row = row.replace("-binary", "")
                    text += paper_figure(paper, row, model, self.metadata.get(model, {}))
                    text += self.mark(members, model)
                values.append(value)
                texts.append(text)
            yield label, members, ranked(values, texts)

    def mark(self, members: list[str], model: str) -> str:
        """⚠ where a student has seen patients of a benchmark, † where pretraining has."""
        about = [self.data[benchmark] for benchmark in members]
        seen = any(model in row["marked"] for row in about)
        known = any(model in row["pretrained"] for row in about)
        return " ⚠" * seen + " †" * known

    def table1(self) -> str:
        """Table 1: CKA of every other model to the teacher; empty without a teacher or others."""
        others = [m for m in self.models if m != self.teacher]
        if not self.teacher or not others:
            return ""
        names = []
        sources = set()
        for benchmark in self.study.found:  # several tasks may share their images
            if not benchmark.source or benchmark.source not in sources:
                names.append(benchmark.name)
            sources.add(benchmark.source)
        rows = []
        for label, members, cells in self.body(names, others, self.alignment, "cka"):
            images = sum(self.data[b]["value"] for b in members)
            rows.append([label.replace("-binary", ""), str(images), *cells])
        return (
            f"# Table 1: CKA to {escaped(self.teacher)}\n\n"
            "Unbiased CKA ± its standard error (jackknife "
            "over up to ten parts of whole groups) · biased CKA [what is left of it with the rows "
            "of one side shuffled: chance]. Unrelated features have an unbiased CKA of 0. The "
            "embeddings are those used downstream, before the projector. Bold: best, underlined: "
            "second."
            "\n\n" + markdown(["benchmark", "images", *others], rows)
        )

    def alignment(self, members: list[str], model: str) -> tuple[float | None, str]:
        """A cell of Table 1."""
        value, se, biased, floor = (
            self.average(members, "cka", part, model, self.teacher)[0]
            for part in ("unbiased", "se", "biased", "floor")
        )
        if value is None:
            return None, "–"
        error = "" if se is None else f" ± {se:.3f}"
        return value, f"{value:.3f}{error} · {biased:.3f} [{floor:.3f}]"

    def table2(self) -> str:
        """Table 2: kNN and linear probe of every model, then the paired differences."""
        study = self.study
        knn = f"kNN (PCA {study.pca_dims}, k = {study.k}, majority vote)"
        probe = "Linear probe (6:2:2)"
        kinds = [
            ("knn", "accuracy", f"{knn}: accuracy, mean ± sd over folds"),
            (
                "knn",
                "balanced accuracy",
                f"{knn}: balanced accuracy of all folds together",
            ),
            ("probe", "auc", f"{probe}: AUC (macro one-vs-rest), mean ± sd over seeds"),
            (
                "probe",
                "balanced accuracy",
                f"{probe}: balanced accuracy, mean ± sd over seeds",
            ),
        ]
        if study.paper_splits:
            for protocol, metric, title in (kinds[0], kinds[2]):
                leaky = "ungrouped: a patient may be on both sides, which leaks (only to compare)"
                kinds.append((f"{protocol}-ungrouped", metric, f"{title}, {leaky}"))
        marked = any(self.data[b.name]["marked"] for b in study.found)
        known = any(self.data[b.name]["pretrained"] for b in study.found)
        text = [
            "# Table 2: what the embeddings tell\n\nFolds and splits keep every group (patient, or "
            "the data set's best proxy) on one side. Bold: best, underlined: second; a difference "
            "counts only where the paired comparison below says so. Chance is what random features "
            "score by the same code, mean ± sd over draws. Where the vote is tied, the class whose "
            "neighbours are nearer in sum wins. n of m splits: in the others a part holds one "
            "class only, or groups are too few for three parts, and the measure is undefined."
            + (" ⚠: the student has seen some of the patients." if marked else "")
            + (" †: pretraining may have met the slides, as the notes say." if known else "")
        ]
        for protocol, metric, title in kinds:
            blind = ["chance", "majority class"] if metric == "accuracy" else ["chance"]
            columns = ["benchmark", *blind, *self.models]
            text.append(f"## {title}\n\n" + markdown(columns, self.scores(protocol, metric)))
        text += filter(None, map(self.further, study.protocols))
        rows = []
        for benchmark in study.found:
            for row in self.paired(benchmark.name):
                pair = [
                    benchmark.name,
                    row["model"] + self.mark([benchmark.name], row["model"]),
                    row["other"] + self.mark([benchmark.name], row["other"]),
                    PAIRED.get(row["metric"], row["metric"]),
                ]
                rows.append([*pair, with_interval(row), verdict(row)])
        if rows:
            text.append(
                "## Paired differences\n\nModel minus other with its 95 % interval: over 1,000 "
                "resamplings of whole groups; for CKA by the jackknife. Fewer than "
                f"{FEW} groups allow none.\n\n"
                + markdown("benchmark\tmodel\tother\tmeasure\tdifference\treading", rows)
            )
        return "\n\n".join(text)

    def further(self, name: str) -> str:
        """All measures of a further protocol in one table; empty where none was taken."""
        title, measures = TITLES[name]
        measured = {key[:2] for key in self.mean}
        tables = []
        for protocol, metric, what in measures:
            if (protocol, metric) in measured:
                found = self.scores(protocol, metric)
                tables.append([[label, what, *cells] for label, *cells in found])
        rows = [row for benchmark in zip(*tables, strict=True) for row in benchmark]
        rows = [row for row in rows if {*row[2:]} != {"–"}]  # data that it cannot take
        head = ["benchmark", "measure", "chance", *self.models]
        return f"## {title}\n\n" + markdown(head, rows) if rows else ""

    def scores(self, protocol: str, metric: str) -> list[list[str]]:
        """Rows of one measure of Table 2: every benchmark, blind features and every model."""

        def cell(members: list[str], model: str) -> tuple[float | None, str]:
            value, sd = self.average(members, protocol, metric, model)
            keys = [(protocol, metric, model, benchmark) for benchmark in members]
            missing = sum(self.undefined[key][2] for key in keys if key in self.undefined)
            defined = sum(self.mean[key][2] for key in keys if key in self.mean)
            parts = f" ({defined} of {defined + missing} splits)" if missing else ""
            text = score(value, sd) + parts
            if metric in LESS_IS_BETTER and value is not None:
                value = -value  # for the ranking
            return value, text

        paper = protocol.removesuffix("-ungrouped") if protocol.endswith("-ungrouped") else ""
        names = [benchmark.name for benchmark in self.study.found]
        rows = []
        for label, members, cells in self.body(names, self.models, cell, paper):
            rows.append([label, *self.blind(members, protocol, metric), *cells])
        return rows

    def blind(self, members: list[str], protocol: str, metric: str) -> list[str]:
        """What random features score by the same code; for accuracy also the commonest class."""
        cells = [score(*self.average(members, protocol, metric, "chance"))]
        if metric == "accuracy":
            cells.append(score(self.average(members, protocol, "majority", "chance")[0]))
        return cells

    def paired(self, benchmark: str) -> list[dict]:
        """The paired differences of a benchmark, in the models' order."""
        measures = [*PAIRED]
        for _, kinds in TITLES.values():
            measures += [": ".join(kind[:2]) for kind in kinds]
        places = {name: place for place, name in enumerate([*self.models, *measures])}
        mine = [r for r in self.study.rows if r["benchmark"] == benchmark]
        rows = [r for r in mine if r["protocol"] == "paired"]
        return sorted(rows, key=lambda r: [places[r[end]] for end in ("model", "other", "metric")])

    def summary(self, benchmark: str) -> list[str]:
        """Lines about one benchmark for the screen."""
        data = self.data[benchmark]
        width = max(map(len, self.models)) + 2
        lines = [
            "",
            f"{benchmark}: {data['value']} images, {np.count_nonzero(data['counts'])} classes, "
            f"{data['groups']} groups (never on both sides of a split)",
            f"{'':{width}}{'params':>9}{'ms/img':>8}   {'CKA to teacher':<16}{'kNN accuracy':<16}"
            "probe AUC",
        ]
        for model, about in zip(self.models, self.study.cards.values(), strict=True):
            value = self.average([benchmark], "cka", "unbiased", model, self.teacher)[0]
            se = self.average([benchmark], "cka", "se", model, self.teacher)[0]
            cka = "teacher" if model == self.teacher else score(value, se)
            knn = score(*self.average([benchmark], "knn", "accuracy", model))
            probe = score(*self.average([benchmark], "probe", "auc", model))
            lines.append(
                f"{model:{width}}{about['parameters'] / 1e6:>7.1f} M"
                f"{about['ms_per_image']:>8.1f}   {cka:<16}{knn:<16}{probe}"
                + self.mark([benchmark], model)
            )
        knn, majority = self.blind([benchmark], "knn", "accuracy")
        probe = self.blind([benchmark], "probe", "auc")[0]
        lines.append(f"{'chance':{width + 20}}{'0.000':<16}{knn:<16}{probe}")
        lines.append(f"{'majority class':{width + 36}}{majority}")
        for row in self.paired(benchmark):
            if row["metric"] not in PAIRED:
                continue  # one screen: table2.md has them
            lines.append(
                f"  {row['model']} against {row['other']}: {PAIRED[row['metric']]} "
                f"{with_interval(row)}, {verdict(row)}"
            )
        return lines + [f"  note: {note}" for note in data["notes"]]


def score(value: float | None, spread: float | None = None, digits: int = 3) -> str:
    """A number with its spread where there is one; a dash for what is not measured or defined."""
    if value is None or not np.isfinite(value):
        return "–"
    return f"{value:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread else "")


def verdict(row: dict) -> str:
    """A paired difference, as printed, in a word: better, worse, or none that the data can show."""
    if row["low"] is None:
        return "too few groups to tell"
    if round(row["low"], 3) <= 0 <= round(row["high"], 3):
        return "within noise"
    less = row["metric"].endswith(LESS_IS_BETTER)
    return "better" if (row["low"] > 0) != less else "worse"


def with_interval(row: dict) -> str:
    """A paired difference with its interval, where there is one."""
    known = row["low"] is not None
    return f"{row['value']:+.3f}" + (f" [{row['low']:+.3f}, {row['high']:+.3f}]" if known else "")


def write_tables(study: Study) -> str:
    """table1.md and table2.md from metrics.jsonl alone; returns their text."""
    tables = Tables(study)
    one = tables.table1()
    two = tables.table2()
    made = provenance(study.device_used)
    if one:
        write_text(study.results / "table1.md", one + made)
    write_text(study.results / "table2.md", two + made)
    return f"{one}\n\n{two}{made}"


def summarize(study: Study) -> str:
    """One screen: per benchmark and model CKA, kNN and probe beside chance, and the verdicts."""
    tables = Tables(study)
    lines = [line for b in study.found for line in tables.summary(b.name)]
    return "\n".join(map(one_line, lines))


def role(name: str, study: Study) -> str:
    """What a model is in this comparison: teacher, before or after distillation, or nothing."""
    if name == study.teacher:
        return "teacher"
    if name == study.baseline:
        return "before distillation"
    origin = study.cards[name]["metadata"].get("teacher")
    return f"distilled from {display(origin)}" if origin else ""


def write_report(study: Study, tables: str, failures: list[str]) -> None:
    """report.md: tables, pictures and everything that one must know to read them."""
    results = study.results
    clear_stale(results)
    text = ["# Evaluation"]
    if failures:
        text.append("**Not evaluated:** " + escaped("; ".join(failures)))
    shown = not study.no_pictures
    if shown and (results / "figure1.png").is_file():
        text.append("![accuracy against size and time](figure1.png)")
    text += ["## Models\n\n" + model_table(study), "## Benchmarks\n\n" + benchmark_table(study)]
    text.append(tables.replace("\n## ", "\n### ").replace("# Table", "## Table"))
    if shown:
        text += [f"## {escaped(b.name)}\n\n" + picture_links(study, b.name) for b in study.found]
    write_text(results / "report.md", "\n\n".join(text))
    write_html(results / "report.md")


def model_table(study: Study) -> str:
    """What each model is, with its size and speed."""
    head = "model\trole\tparameters\twidth\tembedding\tinput px\tms per image ({})\tweights"
    rows = []
    for name, card in study.cards.items():
        size = f"{card['parameters'] / 1e6:,.1f} M"
        time = f"{card['ms_per_image']:.1f}"
        row = [
            display(name),
            role(name, study),
            size,
            str(card["dim"]),
            card["embedding"],
            str(card["input_size"]),
            time,
            card["weights"],
        ]
        rows.append(row)
    return markdown(head.format(study.device_used), rows)


def benchmark_table(study: Study) -> str:
    """What each benchmark holds, and what is to be known of it."""
    rows = []
    data = Tables(study).data
    for name in (b.name for b in study.found):
        about = data[name]
        counts = zip(about["classes"], about["counts"], strict=True)
        kinds = ", ".join(f"{kind} {count}" for kind, count in counts)
        notes = "; ".join(about["notes"]) or "–"
        images = str(about["value"])
        groups = str(about["groups"])
        rows.append([name, about["level"], images, groups, kinds, notes])
    return markdown("benchmark\tlevel\timages\tgroups\tclasses\tnotes", rows)


def picture_links(study: Study, benchmark: str) -> str:
    """Links to the pictures of a benchmark that are there."""
    kinds = "confusion", "cka", "k-curve", "layers"
    names = [(kind, f"{kind}-{safe(benchmark)}") for kind in kinds]
    names += [
        ("gallery", f"gallery-{safe(benchmark)}-{safe(display(name))}") for name in study.models
    ]
    return "\n".join(
        f"![{kind} of {escaped(benchmark)}](pictures/{name}.png)"
        for kind, name in names
        if (study.results / "pictures" / f"{name}.png").is_file()
    )

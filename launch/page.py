"""report.html: what a run was, in one file that needs nothing else."""

from __future__ import annotations

import json
from base64 import b64encode
from pathlib import Path
from typing import Any

from jinja2 import Environment

from .metrics import read_metrics
from .progress import number

PICTURE = "report.png"
LAYERS = ("density", "recall", "worker_imbalance", "step_imbalance")
PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #22252b }
body { max-width: 1300px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.1em; margin: 2em 0 .5em }
.tables { display: flex; flex-wrap: wrap; gap: 0 3em; align-items: flex-start }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .15em .8em .15em 0; border-bottom: 1px solid #e3e6eb; text-align: left }
th { font-weight: normal; color: #737985 } td.number { text-align: right }
td { overflow-wrap: anywhere; max-width: 34em }
img { width: 100% } pre { overflow-x: auto; background: #f6f7f9; padding: 1em } a { color: #1f6feb }
</style>
<h1>{{ title }}</h1>
{% macro table(values) %}
<table>{% for name, value in values.items() %}
<tr><th>{{ name.replace("_", " ") }}</th><td>{{ value | number }}</td></tr>{% endfor %}
</table>
{% endmacro %}
{% if picture %}<img alt="curves and layouts of the run" src="data:image/png;base64,{{ picture }}">{% endif %}
<div class="tables">{% for name, values in tables.items() if values %}
<section><h2>{{ name }}</h2>{{ table(values) }}</section>{% endfor %}
</div>
{% if layers %}
<h2>layers, step {{ layers.step }}</h2>
<table><tr><th>layer</th>{% for name in layers.names %}<th>{{ name.replace("_", " ") }}</th>{% endfor %}</tr>
{% for row in layers.rows %}<tr><td>{{ loop.index0 }}</td>
{% for value in row %}<td class="number">{{ "%.4f" | format(value) }}</td>{% endfor %}</tr>{% endfor %}
</table>
{% endif %}
{% if decision %}<h2>why this layout and exchange, step {{ decision.step + 1 }}</h2>
<pre>{{ decision.text }}</pre>{% endif %}
{% if links %}<h2>files</h2>
<ul>{% for link in links %}
<li><a href="{{ link | urlencode }}">{{ link }}</a></li>{% endfor %}</ul>{% endif %}
</html>
"""


def write_page(run_dir: str | Path) -> Path:
    """Write `report.html` of `run_dir` from its files, those that are there; returns its path.

    Summary, settings, environment, the picture of `write_report`, layers and the planner's reasons at the
    last step that has them, links to checkpoints and traces. All text is escaped; nothing is loaded.
    """
    run_dir = Path(run_dir)
    rows: dict[str, dict[str, Any]] = {}  # of each kind the last values, as not every step has all
    for row in read_metrics(run_dir / "metrics.jsonl"):
        rows[row["kind"]] = rows.get(row["kind"], {}) | row
    picture = run_dir / PICTURE
    found = sorted([*run_dir.glob("checkpoints/step-*"), *run_dir.glob("profile/*.json")])
    environment = Environment(autoescape=True)
    environment.filters["number"] = number
    text = environment.from_string(PAGE).render(
        title=f"sparring: {run_dir.resolve().name}",
        tables={
            "summary": read_json(run_dir / "summary.json"),
            "environment": read_json(run_dir / "environment.json"),
            "settings": read_json(run_dir / "config.json"),
        },
        picture=b64encode(picture.read_bytes()).decode() if picture.exists() else None,
        layers=_by_layer(rows["layers"]) if "layers" in rows else None,
        decision=rows.get("decision"),
        links=[path.relative_to(run_dir).as_posix() for path in found],
    )
    path = run_dir / "report.html"
    path.write_text(text, encoding="utf-8")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _by_layer(row: dict[str, Any]) -> dict[str, Any]:
    names = [name for name in LAYERS if row.get(name)]
    values = zip(*(row[name] for name in names), strict=True)
    return {"step": row["step"] + 1, "names": names, "rows": list(values)}

"""The one HTML file that the report becomes: everything inside it, everything in it escaped."""

import base64
import hashlib
from pathlib import Path

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from jobs import report_data, report_sections, report_training
from jobs.config import Config
from jobs.report_data import Outputs
from jobs.report_sections import Section
from jobs.tables import visible

FOLDER = Path(__file__).parent / "page"
ROWS = 100  # of a table


def render(config: Config, command: str) -> str:
    """The page of what lies under `config.root`."""
    outputs = Outputs(config.root)
    sources, plan, stages = report_data.flow(outputs), outputs.plan, report_training.stages(outputs)
    sections = [
        report_sections.flow(sources, plan),
        report_sections.deduplication(sources, report_data.clusters(outputs)),
        report_sections.quality(report_data.quality(outputs)),
        report_sections.curriculum(outputs, plan),
        report_sections.training(stages),
        report_sections.provenance(outputs, config, plan, command),
    ]
    return page([s for s in sections if s], report_sections.tiles(sources, plan, stages), config.root)


def page(sections: list[Section], summary: dict[str, str], root: str) -> str:
    """Everything in one file: no other is fetched, and no script runs but the two named by their hashes."""
    scripts = [get_plotlyjs(), (FOLDER / "report.js").read_text()]
    if any("</script" in script or "<!--" in script for script in scripts):
        raise ValueError("a script that cannot stand inside a page")
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    policy = {
        "default-src": "'none'",
        "script-src": " ".join(f"'sha256-{digest}'" for digest in hashes),
        "style-src": "'unsafe-inline'",  # Plotly's figures carry their own
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters["visible"] = visible
    figures = {f"{s.name}-{k}": f for s in sections for k, f in enumerate(s.figures)}
    return environment.from_string((FOLDER / "report.html").read_text()).render(
        policy="; ".join(f"{name} {value}" for name, value in policy.items()),
        style=Markup((FOLDER / "report.css").read_text()),
        scripts=[Markup(script) for script in scripts],
        drawn={name: {"data": f["data"], "layout": f["layout"]} for name, f in figures.items()},
        sections=sections,
        summary=summary,
        root=root,
        rows=ROWS,
    )

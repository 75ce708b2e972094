"""The report as one page of HTML: no script, nothing from elsewhere, light and dark, readable on a phone.

A pure function of what `report.json` holds and of the pictures' paths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from export.compiler.fidelity import PIXEL_IMAGES
from export.report.pictures import Pictures, Strip
from export.report.rows import TARGET_NAMES
from export.report.style import CSS
from tc_lightning.rollout.targets import ODE_STEPS

Value = Callable[[dict[str, Any]], str]
GROUPS = {
    "planned": "Planned by TokenCache",
    "published": "Published methods, as plans of this package",
    "fewer steps": "Fewer steps at full compute",
}


def page(report: dict[str, Any], pictures: Pictures) -> str:
    """The whole page."""
    sections = [
        _head(report),
        _section("What was found", _found(report)),
        _section("Equal budgets", _equal(report["comparisons"])),
        _section("Error against cost", _fronts(pictures)),
        _section("The same seeds side by side", _grids(pictures)),
        _section("The plans", _maps(pictures)),
        _section("Every plan that was measured", _table(report)),
        _section("What could not be measured", _unmeasured(report)),
        _section("What the predictor learned", _tokens(pictures)),
        _section("How it was measured", _method(report)),
    ]
    title = f"TokenCache report: {escape(report['run'])}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{title}</title><style>{CSS}</style></head>\n<body><main>\n" + "\n".join(sections) + "\n</main></body></html>\n"
    )


def _head(report: dict[str, Any]) -> str:
    reference, model = report["reference"], report["model"]
    about = (
        f"{escape(report['teacher']['weights'])}: {model['depth']} blocks, {model['tokens']} tokens. The run to replace is "
        f"{escape(reference['sampler'])}, {reference['steps']} steps, {reference['ms_per_image']:.1f} ms an image "
        f"({escape(report['settings']['provider'].upper())}, {report['settings']['precision']})."
    )
    return (
        f'<header><p class="kicker">TokenCache report</p><h1>{escape(report["run"])}</h1>'
        f'<p class="lead">{escape(report["headline"])}</p><p class="dim">{about}</p></header>'
    )


def _found(report: dict[str, Any]) -> str:
    tiles = "".join(_tile(c) for c in report["comparisons"] if (c["equal"], c["target"]) == ("MACs", "ode"))
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in report["sentences"])
    legend = "Error of the planned artefact over that of the best alternative, against the converged ODE, at equal multiplications."
    told = f'<div class="tiles">{tiles}</div><p class="dim">{legend} Below 1 the plan wins.</p>' if tiles else ""
    return f"{told}<details open><summary>In sentences</summary><ul>{items}</ul></details>"


def _tile(c: dict[str, Any]) -> str:
    kind = "win" if c["ratio"] < 1 else "loss"
    return (
        f'<div class="tile {kind}"><b>{c["budget"]:g}x</b><span class="figure">{c["ratio"]:.2g}</span>'
        f"<span>{'wins' if kind == 'win' else 'LOSES'} against {escape(c['best'])}</span></div>"
    )


def _equal(comparisons: Sequence[dict[str, Any]]) -> str:
    columns: dict[str, Value] = {
        "budget": lambda c: f"{c['budget']:g}x",
        "against": lambda c: TARGET_NAMES[c["target"]],
        "equal": lambda c: "multiplications" if c["equal"] == "MACs" else "time",
        "planned": lambda c: escape(c["planned"]),
        "its error": lambda c: _number(c["planned_mse"]),
        "best alternative": lambda c: escape(c["best"]),
        "error": lambda c: _number(c["best_mse"]),
        "ratio": lambda c: f"<b>{c['ratio']:.2g}</b>",
        "images won": lambda c: f"{c['closer']:.0%}",
        "best fewer steps": lambda c: "" if c["fewer"] is None else f"{escape(c['fewer'])}: {_number(c['fewer_mse'])}",
    }
    body = _rows(columns, comparisons, lambda c: "win" if c["ratio"] < 1 else "loss")
    note = (
        "Rounding is in the alternatives' favour: at equal multiplications they may spend up to one full step more than the budget, "
        "at equal time they may take 3 % longer than the planned artefact. Errors are mean squared errors of the final latents."
    )
    return f"{_scrolling(columns, body)}<p class='dim'>{note}</p>" if comparisons else "<p>No planned artefact reaches a budget.</p>"


def _fronts(pictures: Pictures) -> str:
    charts = [
        f"<figure>{_themed(path, title)}<figcaption>{escape(title)}</figcaption></figure>" for title, path in pictures.fronts.items()
    ]
    note = "Down and to the left is better over time; down and to the right over multiplications. Bars are standard errors over images."
    return f"<p>{note}</p>" + "".join(charts)


def _grids(pictures: Pictures) -> str:
    parts = [f"<h3>{escape(title)}</h3>{''.join(map(_strip, strips))}" for title, strips in pictures.grids.items()]
    return "<p>Under each row of images: its absolute difference to the reference run, times ten.</p>" + "".join(parts)


def _strip(strip: Strip) -> str:
    below = "" if strip.difference is None else f'<img class="pixels" src="{strip.difference}" alt="difference, times ten">'
    return (
        f'<div class="strip"><div><b>{escape(strip.name)}</b><br><span class="dim">{escape(strip.note)}</span></div>'
        f'<div><img class="pixels" src="{strip.images}" alt="images of {escape(strip.name)}">{below}</div></div>'
    )


def _maps(pictures: Pictures) -> str:
    if pictures.maps is None:
        return "<p>No plan was measured.</p>"
    text = (
        "What happens to every block at every sampling step. compute: everything. partial: some tokens are recomputed. reuse: a branch "
        "comes from the cache. skip: the blocks' summed residual is forecast from the cache."
    )
    return f"<p>{text}</p><figure>{_themed(pictures.maps, 'plans as maps of step and block')}</figure>"


def _tokens(pictures: Pictures) -> str:
    text = "The Cache Predictor's importance of each token, by block and sampling step: 1 asks for recomputation, 0 for reuse."
    return f'<p>{text}</p><figure class="paper"><img src="{pictures.tokens}" alt="token maps of the predictor"></figure>'


def _table(report: dict[str, Any]) -> str:
    columns = _figure_columns(report)
    parts = [_rows(columns, [report["reference"]], lambda _: "reference")]
    for group, title in GROUPS.items():
        rows = sorted((row for row in report["rows"] if row["group"] == group), key=lambda row: row["mse_ode"]["mean"])
        if rows:
            heading = f'<tr class="group"><th colspan="{len(columns)}">{title}, least error first</th></tr>'
            parts.append(heading + _rows(columns, rows, lambda row: row["group"].replace(" ", "-")))
    return _scrolling(columns, "".join(parts)) + _terms(report)


def _figure_columns(report: dict[str, Any]) -> dict[str, Value]:
    columns: dict[str, Value] = {
        "plan": lambda r: f"{escape(r['name'])}<br><span class='dim'>{escape(r['plan'])}</span>",
        "MACs": lambda r: f"{r['macs_speedup']:.2f}x",
        "time": lambda r: f"{r['wall_speedup']:.2f}x",
        "ms an image": lambda r: f"{r['ms_per_image']:.1f}",
        "MSE, converged ODE": lambda r: _spread(r["mse_ode"]),
        "MSE, reference run": lambda r: _spread(r["mse_reference"]),
        "worst image, ODE": lambda r: _number(r["mse_ode"]["worst"], 1),
        "PSNR dB": lambda r: f"{r['psnr_db']:.1f}",
    }
    optional: dict[str, tuple[str, Value]] = {
        "ssim": ("SSIM", lambda r: f"{r['ssim']:.4f}"),
        "psnr_pixels_db": ("PSNR dB, decoded pixels", lambda r: f"{r['psnr_pixels_db']:.1f}"),
        "ssim_pixels": ("SSIM, decoded pixels", lambda r: f"{r['ssim_pixels']:.4f}"),
        "frechet_teacher_features": ("Frechet, teacher features", lambda r: _number(r["frechet_teacher_features"])),
        "classifier_accuracy": ("classifier accuracy", lambda r: f"{r['classifier_accuracy']:.1%}"),
        "fid_inception": ("FID (Inception)", lambda r: f"{r['fid_inception']:.2f}"),
    }
    columns |= {title: value for key, (title, value) in optional.items() if report["reference"].get(key) is not None}
    return columns | {
        "export error": lambda r: _number(r["export_rel_l2"], 0),
        "cache KB": lambda r: f"{r['cache_bytes_per_image'] / 1e3:.0f}",
    }


def _terms(report: dict[str, Any]) -> str:
    images = report["settings"]["images"]
    terms = [
        "MSE: mean squared error of the final latents, mean ± standard error over images, against the converged ODE "
        f"({ODE_STEPS} steps of a second-order solver: what the teacher means) and against the reference run (what is served today).",
        "PSNR, SSIM and the Frechet distance are against the reference run's images.",
        f"Frechet, teacher features: distance of Gaussians fitted to the teacher's own middle features of {images} images. It is not "
        "FID, and compares rows of this table, nothing else.",
        "Export error: relative L2 between ONNX Runtime and torch over a whole trajectory of one image; it is not the method's error.",
        "Time: reference run over plan; both by ONNX Runtime, in turns, in one process.",
    ]
    if report["reference"].get("psnr_pixels_db") is not None:
        terms.append(
            f"Decoded pixels: the first {min(images, PIXEL_IMAGES)} images after the pipeline's own decoder, clipped to [-1, 1]; all "
            "other figures are of latents."
        )
    if (held_out := report["classifier_held_out_accuracy"]) is not None:
        terms.append(
            "Classifier accuracy: share of the images that a support vector classifier of the real images takes for their class; on "
            f"real images that it was not fitted to it is right on {held_out:.1%}."
        )
    return "<ul class='dim'>" + "".join(f"<li>{escape(term)}</li>" for term in terms) + "</ul>"


def _unmeasured(report: dict[str, Any]) -> str:
    failed = [f"<li><b>{escape(f['name'])}</b> failed: <pre>{escape(f['reason'])}</pre></li>" for f in report["failed"]]
    missing = [f"<li><b>{escape(m['method'])}</b> at {m['budget']:g}x: {escape(m['reason'])}</li>" for m in report["missing"]]
    return f"<ul>{''.join([*failed, *missing])}</ul>" if failed or missing else "<p>Everything was measured.</p>"


def _method(report: dict[str, Any]) -> str:
    settings, guidance = report["settings"], report["guidance"]
    facts = {
        "command": f"<code>{escape(settings['command'])}</code>",
        "run": escape(report["run_folder"]),
        "teacher sha256": f"<code>{report['teacher']['sha256']}</code>",
        "images": f"{settings['images']}, seed {settings['seed']}, {settings['batch']} a request; {_drawn(report)}",
        "guidance": f"scale {guidance['scale']:g} on {guidance['channels']} channel(s)",
        "tuning": f"spacings and methods' choices on other images, seed {settings['seed'] + 1}",
        **{key.replace("_", " "): escape(str(value)) for key, value in report["environment"].items()},
    }
    rows = "".join(f"<tr><th>{key}</th><td>{value}</td></tr>" for key, value in facts.items())
    return f'<div class="scroll"><table class="facts">{rows}</table></div><p class="dim">All figures are in report.json.</p>'


def _drawn(report: dict[str, Any]) -> str:
    conditions = report["model"]["conditions"]
    return "; ".join(f"{c['name']} drawn from all {c['classes']}" if c["classes"] else f"{c['name']} from examples" for c in conditions)


def _spread(value: dict[str, float]) -> str:
    return f"<span class='number'>{value['mean']:.2e}</span><br><span class='number dim'>± {value['stderr']:.0e}</span>"


def _number(value: float, digits: int = 2) -> str:
    return f"<span class='number'>{value:.{digits}e}</span>"


def _rows(columns: dict[str, Value], entries: Sequence[dict[str, Any]], kind: Callable[[dict[str, Any]], str]) -> str:
    return "".join(f'<tr class="{kind(e)}">{"".join(f"<td>{value(e)}</td>" for value in columns.values())}</tr>' for e in entries)


def _scrolling(columns: dict[str, Value], body: str) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in columns)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _themed(path: str, alt: str) -> str:
    dark = path.replace(".svg", "-dark.svg")
    return f'<picture><source srcset="{dark}" media="(prefers-color-scheme: dark)"><img src="{path}" alt="{escape(alt)}"></picture>'


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"

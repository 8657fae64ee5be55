"""The gallery of viabench: every family at five strengths of what causes the illusion, and the stored leaderboard.

The page is plain HTML: without a script each family is a strip of five pictures; with it, a slider shows one at a time.
"""
import html
import io
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SIZE = 256  # pixels a picture
TITLES = {"color": "Color", "motion": "Motion", "gestalt": "Gestalt", "geometric": "Geometric and spatial",
          "general": "General visual illusions", "anomaly": "Visual anomalies"}
INTRO = """# Gallery of viabench

> Every family of pictures at five strengths of what causes the illusion, and how observers answer.

Each strip shows one picture of a family at the strengths 0, 0.25, 0.5, 0.75 and 1 of its inducer. What is asked about stays the same to
the pixel. At 0 the inducer is gone: this is the control. The text below a picture says what is physically true of it. Everything is drawn by
`collai.viabench.families.render` while this site is built.
"""
SCRIPT = """<script>
document.querySelectorAll(".vb-gallery").forEach(gallery => {
  gallery.classList.add("vb-live");
  const show = (figure, k) => {
    figure.querySelector("img").style.transform = `translateX(${-20 * k}%)`;
    figure.querySelector("input").value = k;
    figure.querySelector("output").textContent = k / 4;
  };
  gallery.querySelectorAll("figure").forEach(figure => {
    const slider = figure.querySelector("input");
    slider.addEventListener("input", () => show(figure, slider.value));
    show(figure, 4);
  });
});
</script>"""


def pictures(name: str) -> list:
    """Draw a family at all strengths, at a difference for which the eye is fooled if there is one."""
    from collai.viabench.families import FAMILIES, render

    family = FAMILIES[name]
    sizes = [0, *sorted((d for d in family.delta_grid if d and abs(d) >= family.delta_min), key=lambda d: (-d, d))]
    fooling = (d for d in sizes if render(name, delta=d, size=SIZE).illusion_answer is not None)
    delta = next(fooling, 0)
    return [render(name, strength=s, delta=delta, size=SIZE) for s in STRENGTHS]


def strip(drawn: list) -> bytes:
    """PNG file of some pictures side by side."""
    import numpy as np
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.concatenate([picture.image for picture in drawn], axis=1)).save(file, "PNG", optimize=True)
    return file.getvalue()


def figure(name: str, drawn: list) -> str:
    """HTML of a family."""
    last = drawn[-1]
    truth, fooled = (letter and last.options[ord(letter) - 65] for letter in (last.answer, last.illusion_answer))
    question, truth, seen = (html.escape(text or "") for text in (last.question, truth, fooled))
    said = f' A fooled observer says: “{seen}”.' if seen else ""
    return (f'<figure id="{name}"><div><img src="../_static/gallery/{name}.png" width="{SIZE * len(STRENGTHS)}" height="{SIZE}" '
            f'alt="{name} at the strengths 0, 0.25, 0.5, 0.75 and 1 of the inducer. {question} Physically: {truth}."></div>'
            f'<label>strength <input type="range" min="0" max="4" step="1" value="4" aria-label="Strength of the inducer of {name}">'
            f"<output>1</output></label><figcaption><strong>{name}</strong> {question}<br>Physically: “{truth}”.{said}</figcaption></figure>")


def bar(row: dict, width: int = 160) -> str:
    """An accuracy with its interval as a drawing."""
    low, high = (width * x for x in row["ci"])
    mid = width * row["measured"]
    label = f"{100 * row['measured']:.1f} %, 95 % interval {100 * row['ci'][0]:.1f} to {100 * row['ci'][1]:.1f} %"
    return (f'<svg width="{width + 2}" height="14" role="img" aria-label="{label}"><rect width="{width}" height="14" fill="#eee"/>'
            f'<rect width="{mid:.1f}" height="14" fill="#9ecae1"/><path d="M{low:.1f} 7H{high:.1f}" stroke="#08519c" stroke-width="3"/></svg>')


def leaderboard(file: Path) -> str:
    """The stored results as a table, best first."""
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else {}
    board = {name.split("/")[1]: row for name, row in rows.items() if name.startswith("board/") and name.endswith("/overall")}
    if not board:
        return "The leaderboard has not been measured yet.\n"
    head = "".join(f"<th>{text}</th>" for text in ("observer", "accuracy, %", "95 % interval", "", "fooled, %", *TITLES.values()))
    lines = []
    for model, row in sorted(board.items(), key=lambda found: -found[1]["measured"]):
        parts = "".join(f"<td>{100 * rows[f'board/{model}/{c}']['measured']:.1f}</td>" for c in TITLES)
        low, high = row["ci"]
        lines.append(f"<tr><td>{html.escape(model)}</td><td>{100 * row['measured']:.1f}</td><td>{100 * low:.1f}–{100 * high:.1f}</td>"
                     f"<td>{bar(row)}</td><td>{100 * row['fooled']:.1f}</td>{parts}</tr>")
    note = html.escape(next(iter(board.values()))["note"])
    return f'```{{raw}} html\n<table class="vb-board"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>\n<p>{note}</p>\n```\n'


def gallery() -> tuple[str, dict[str, bytes]]:
    """Write the page; give it with its pictures by name."""
    from collai.viabench.families import FAMILIES

    page, files = [INTRO], {}
    for category, title in TITLES.items():
        shown = []
        for name in (n for n, family in FAMILIES.items() if family.category == category):
            drawn = pictures(name)
            files[f"{name}.png"] = strip(drawn)
            shown.append(figure(name, drawn))
        page.append(f'## {title}\n\n```{{raw}} html\n<div class="vb-gallery">\n' + "\n".join(shown) + "\n</div>\n```\n")
    page += ["## Leaderboard\n", "Accuracy on all questions of the standard benchmark, from a stored run.\n",
             leaderboard(ROOT / "nbs" / "viabench" / "results" / "bench-cpu.json"), f"```{{raw}} html\n{SCRIPT}\n```\n"]
    return "\n".join(page), files

"""The pictures of a run: before beside after, the grids over training, the best and the worst samples."""

from __future__ import annotations

from varfast.report.elements import brief, text
from varfast.report.pictures import Extremes, Grid
from varfast.report.reading import Sample
from varfast.report.run import Run


def before_after(run: Run, place: int, alone: bool = True) -> str:
    """The first sample grid beside the last one, with the same labels and random numbers.

    With its script, the page shows those of other steps too, from the section of `over_training`.

    Args:
        place: of the run among those of the page.
        alone: it is the only one, with space for a note.
    """
    if not run.grids:
        return "<p>No sample grids.</p>"
    first, *later = run.grids
    when = "Before" if first.step == 0 else "At first"
    left = f"<figure><figcaption>{when}: step {first.step}</figcaption>{_picture(run, first)}</figure>"
    if not later:
        return f'<div class="pair">{left}</div>'
    last, kind = later[-1], "prompt" if run.prompts else "label"
    picture = _picture(run, last, ' class="after"')
    right = f'<figure><figcaption>After: step <span class="step">{last.step}</span></figcaption>{picture}</figure>'
    slider = ""
    if len(later) > 1:
        slider = (
            f'<label hidden>step <output class="step">{last.step}</output> <input type="range" min="0" '
            f'max="{len(run.grids) - 1}" value="{len(run.grids) - 1}" autocomplete="off" '
            'aria-label="step of the picture on the right"></label>'
        )
    note = f"<p>A row a {kind}; the same random numbers before and after.</p>" if alone else ""
    return f'<div class="pair" data-run="{place}">{left}{right}{slider}{note}{_rows(run)}</div>'


def _picture(run: Run, grid: Grid, more: str = "") -> str:
    when = "before training" if grid.step == 0 else "of the policy in training"
    rows = ", ".join(brief(row, 40) for row in run.grid_rows[:10])
    of = f"; a row each of {rows}" if rows else ""
    alt = text(f"samples {when}, step {grid.step}{of}")
    return f'<img src="{grid.uri}" alt="{alt}" width="{grid.width}" height="{grid.height}"{more}>'


def _rows(run: Run) -> str:
    """The prompts of the grids, whole: the pictures have space for their beginnings. Labels are written there."""
    if not run.prompts or not run.grid_rows:
        return ""
    rows = "".join(f"<li>{text(row)}</li>" for row in run.grid_rows)
    return (
        "<details><summary>Prompts of the rows, from the top</summary>"
        f'<ol class="rows" aria-label="prompts of the rows, from the top">{rows}</ol></details>'
    )


def over_training(run: Run, place: int) -> str:
    """All grids that are shown, small."""
    if len(run.grids) < 2:
        return ""
    pictures = "".join(
        f"<figure><figcaption>step {grid.step}</figcaption>"
        + _picture(run, grid, f' loading="lazy" data-run="{place}" data-step="{grid.step}"')
        + "</figure>"
        for grid in run.grids
    )
    hidden = f"<p>{len(run.grids)} of {run.num_grids} grids.</p>" if len(run.grids) < run.num_grids else ""
    return f'<div class="grids">{pictures}</div>{hidden}'


def extremes(run: Run) -> str:
    """The best and the worst samples of the last step that has them."""
    found = run.extremes
    if found is None:
        return f"<h3>{text(brief(run.name))}</h3><p>No samples.</p>"
    rows = [f"<h3>{text(brief(run.name))}, step {found.step}</h3>{_tied(found)}"]
    for title, samples in (("best", found.samples.best), ("worst", found.samples.worst)):
        cells = [
            f'<figure><img src="{uri}" alt="{title} {place}: {text(run.label(sample.label))}, reward '
            f'{text(brief(sample.reward))}"><figcaption>{_caption(run, sample)}</figcaption></figure>'
            for place, (sample, uri) in enumerate(zip(samples, found.uris[title], strict=True), start=1)
        ]
        rows.append(f'<h4>{title} of the step, by reward</h4><div class="samples">{"".join(cells)}</div>')
    return "".join(rows)


def _tied(found: Extremes) -> str:
    """A note for ties: which of the equal samples are shown says nothing about the images."""
    best, worst = found.samples.best, found.samples.worst
    rewards = {sample.reward for sample in (*best, *worst)}
    if len(rewards) == 1:
        return f"<p>All samples shown have the reward {text(brief(rewards.pop()))}: none is better than another.</p>"
    notes = []
    for title, samples in (("best", best), ("worst", worst)):
        ties = found.samples.ties.get(title, 0)
        if len({sample.reward for sample in samples}) == 1 and ties > len(samples):
            of_step = f"{ties} of the step's {brief(found.samples.images) or 'samples'} have the {title} reward"
            notes.append(f"{of_step}; {len(samples)} of them are shown, of as many labels as possible.")
    return "".join(f"<p>{text(note)}</p>" for note in notes)


def _caption(run: Run, sample: Sample) -> str:
    shown = f"{text(run.label(sample.label))}<br>{text(brief(sample.reward))}"
    if len(sample.rewards) > 1:
        shown += "".join(f"<br><small>{text(brief(n, 60))} {text(brief(v))}</small>" for n, v in sample.rewards.items())
    return shown

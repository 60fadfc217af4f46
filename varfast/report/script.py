"""What the script of the page does: it draws curves again as the controls say, shows values, and turns over grids.

Without it, the page shows the same curves and pictures, as charts.py has drawn them. The two draw alike, which a test
compares in a browser.
"""

from __future__ import annotations

SCRIPT = r"""
"use strict";
const numbers = JSON.parse(document.getElementById("numbers").textContent);
const names = {step: "step", images: "images", flop: "FLOP", hours: "hours"};
const short = value => {
  const size = Math.abs(value), rounded = Number(value.toPrecision(6));
  return size && (size >= 1e6 || size < 1e-4) ? rounded.toExponential().replace("e+", "e") : String(rounded);
};
const lowest = values => values.reduce((a, b) => Math.min(a, b), Infinity);
const highest = values => values.reduce((a, b) => Math.max(a, b), -Infinity);
const marks = (low, high) => {
  const rough = (high - low) / 5;
  if (!(rough > 1e-300)) return [low];
  const power = 10 ** Math.floor(Math.log10(rough));
  const apart = [1, 2, 5, 10, 20].map(m => m * power).find(m => m >= rough * (1 - 1e-9));
  const found = [];
  for (let k = Math.ceil(low / apart - 1e-9); k <= Math.floor(high / apart + 1e-9); k++) found.push(k * apart);
  return found;
};
const nearest = (values, wanted) =>
  values.reduce((best, value, i) => Math.abs(value - wanted) < Math.abs(values[best] - wanted) ? i : best, 0);
const quantile = (values, share) => {
  const sorted = [...values].sort((a, b) => a - b), at = share * (sorted.length - 1), below = Math.floor(at);
  return sorted[below] + (at - below) * ((sorted[below + 1] ?? sorted[below]) - sorted[below]);
};
const smooth = (values, weight) => {
  if (values.length <= numbers.smoothed) return values;
  let last = 0, left = 1;
  return values.map(value => {
    last = weight * last + (1 - weight) * value;
    left *= weight;
    return last / (1 - left);
  });
};
const least = point => point.length > 2 ? point[2] : point[1], most = point => point.length > 2 ? point[3] : point[1];

// As Chart._axis of charts.py: from a value to thousandths of the plot from its top, and the marks.
const vertical = (curves, log, how) => {
  const tiniest = lowest([...curves.flatMap(c => c.points.map(least)).filter(v => v > 0), Infinity]);
  log = log && tiniest < Infinity;
  const height = value => log ? Math.log10(Math.max(value, tiniest)) : value;
  let low = lowest(curves.flatMap(c => c.points.map(p => height(least(p)))));
  let high = highest(curves.flatMap(c => c.points.map(p => height(most(p)))));
  const usual = highest(curves.map(c => quantile(c.points.map(most), 0.9)));
  let cut = "";
  if (how.cut && !log && high > 3 * usual && usual > 0) {
    cut = "Cut off at the top; the highest is " + short(Number(high.toPrecision(4))) + ".";
    high = 1.5 * usual;
  }
  if (log) [low, high] = [Math.floor(low), Math.ceil(high)];
  else if (how.zero) [low, high] = [Math.min(low, 0), Math.max(high, 0)];
  if (high - low <= Math.max(1e-9 * Math.max(Math.abs(low), Math.abs(high)), 1e-290)) {
    const apart = Math.max(0.5, 1e-3 * Math.abs(high));
    [low, high] = [low - (low !== 0 ? apart : 0), high + apart];
  }
  if (!log) {
    const margin = 0.04 * (high - low);
    [low, high] = [low - (low !== 0 ? margin : 0), high + (high !== 0 ? margin : 0)];
  }
  const place = at => Math.min(Math.max(1000 - 1000 * (at - low) / (high - low), -1e6), 1e6);
  const labels = marks(low, high).filter(mark => !log || mark === Math.round(mark))
    .map(mark => [place(mark), log ? "1e" + mark : short(mark)]);
  return {y: value => place(height(value)), labels, cut};
};

const bar = document.querySelector(".controls");
const chosen = () => ({
  over: bar.querySelector("[name=over]:checked")?.value ?? "step",
  scale: bar.querySelector("[name=scale]:checked").value,
  weight: Number(bar.querySelector("[name=smoothing]").value),
  off: new Set([...bar.querySelectorAll("[name=run]:not(:checked)")].map(box => box.value)),
});

const plots = [...document.querySelectorAll(".plot")].map(plot => {
  const chart = numbers.charts[plot.dataset.chart], off = new Set();
  const cross = plot.querySelector(".cross"), shown = plot.querySelector("output");
  const of = (curve, axis) => axis === "step" ? curve.points.map(point => point[0]) : (curve.spent || {})[axis];
  let over, low, high, steps, drawn, at = -1;
  const place = value => high > low ? (value - low) / (high - low) : 0.5;
  const follow = how => {
    const visible = chart.curves.filter((curve, i) => !off.has(i) && !how.off.has(curve.name));
    const curves = visible.length ? visible : chart.curves;
    over = chart.curves.some(curve => of(curve, how.over)) ? how.over : "step";
    drawn = visible.filter(curve => of(curve, over));
    const everywhere = (drawn.length ? drawn : chart.curves).flatMap(curve => of(curve, over) || []);
    steps = [...new Set(everywhere)].sort((a, b) => a - b);
    [low, high] = [steps[0], steps[steps.length - 1]];
    at = -1;
    cross.hidden = shown.hidden = true;
    return curves;
  };
  const draw = how => {
    const axis = vertical(follow(how), how.scale === "auto" ? chart.how.log : how.scale === "log", chart.how);
    const line = (places, values) => {
      if (!places.length) return "";
      const points = values.map((value, i) => (1000 * place(places[i])).toFixed(1) + "," + axis.y(value).toFixed(1));
      return "M" + points.join(" ") + (points.length === 1 ? "h.1" : "");
    };
    for (const path of plot.querySelectorAll("path[data-curve]")) {
      const curve = chart.curves[path.dataset.curve], places = drawn.includes(curve) ? of(curve, over) : [];
      const values = curve.points.map(point => point[1]), ends = smooth(values, how.weight);
      let d = "";
      if (path.classList.contains("line")) d = line(places, ends);
      else if (path.classList.contains("raw")) d = ends === values ? "" : line(places, values);
      else if (places.length && curve.points.some(point => point.length > 2))
        d = line(places, curve.points.map(most)) + " "
          + line([...places].reverse(), curve.points.map(least).reverse()).slice(1) + "Z";
      path.setAttribute("d", d);
    }
    plot.querySelector(".rule").setAttribute("d", axis.labels.map(([y]) => "M0 " + y.toFixed(1) + "H1000").join(""));
    plot.querySelectorAll(".x,.y").forEach(label => label.remove());
    const label = (kind, side, share, text) => {
      const span = document.createElement("span");
      span.className = kind;
      span.style[side] = share + "%";
      span.textContent = text;
      plot.append(span);
    };
    for (const [y, text] of axis.labels) label("y", "top", (y / 10).toFixed(1), text);
    const whole = over === "step" || over === "images";
    for (const mark of marks(low, high).filter(mark => !whole || mark === Math.round(mark)))
      label("x", "left", (100 * place(mark)).toFixed(1), short(mark));
    const note = plot.closest("figure").querySelector(".cut");
    note.textContent = axis.cut;
    note.hidden = !axis.cut;
    const title = plot.querySelector(".axis");
    plot.setAttribute("aria-label", plot.getAttribute("aria-label").replace(" over " + title.textContent + ";",
      " over " + names[over] + ";"));
    title.textContent = names[over];
  };
  const show = index => {
    at = Math.min(Math.max(index, 0), steps.length - 1);
    const lines = [over === "step" ? "step " + steps[at] : short(steps[at]) + " " + names[over]];
    for (const curve of drawn) {
      const own = of(curve, over);
      if (steps[at] < own[0] || steps[at] > own[own.length - 1]) continue;
      const here = nearest(own, steps[at]), point = curve.points[here];
      const values = curve.points.map(p => p[1]), ends = smooth(values, chosen().weight);
      const band = point.length > 2 ? " (" + short(point[2]) + " to " + short(point[3]) + ")" : "";
      const mean = ends === values ? "" : ", smoothed " + short(Number(ends[here].toPrecision(4)));
      lines.push((chart.curves.length > 1 ? curve.name + ": " : "") + short(point[1]) + band + mean);
    }
    const share = place(steps[at]);
    cross.style.left = 100 * share + "%";
    shown.style.left = share < 0.5 ? "calc(" + 100 * share + "% + 8px)" : "auto";
    shown.style.right = share < 0.5 ? "auto" : "calc(" + 100 * (1 - share) + "% + 8px)";
    shown.textContent = lines.join("\n");
    cross.hidden = shown.hidden = false;
  };
  const hide = () => { cross.hidden = shown.hidden = true; };
  const point = event => {
    const box = plot.getBoundingClientRect();
    show(nearest(steps, low + (high - low) * (event.clientX - box.left) / box.width));
  };
  plot.addEventListener("pointermove", point);
  plot.addEventListener("pointerdown", point);
  plot.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") hide(); });
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", event => {
    const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (by) { show(at + by); event.preventDefault(); }
  });
  // A click on a name of the legend switches its line off and on.
  plot.closest("figure").querySelectorAll(".legend li").forEach((entry, i) => {
    const button = document.createElement("button");
    button.append(...entry.childNodes);
    button.setAttribute("aria-pressed", "true");
    button.addEventListener("click", () => {
      const on = off.delete(i) || !off.add(i);
      button.setAttribute("aria-pressed", String(on));
      draw(chosen());
    });
    entry.append(button);
  });
  follow(chosen());
  return draw;
});
if (bar) {
  bar.hidden = false;
  bar.addEventListener("input", () => {
    bar.querySelector("output").textContent = Number(bar.querySelector("[name=smoothing]").value).toFixed(2);
    for (const draw of plots) draw(chosen());
  });
}

for (const pair of document.querySelectorAll(".pair")) {
  const slider = pair.querySelector("input"), after = pair.querySelector(".after");
  const grids = [...document.querySelectorAll(".grids img")].filter(grid => grid.dataset.run === pair.dataset.run);
  if (!slider) continue;
  slider.closest("label").hidden = false;
  slider.addEventListener("input", () => {
    const grid = grids[slider.value];
    after.src = grid.src;
    after.alt = grid.alt;
    pair.querySelectorAll(".step").forEach(step => { step.textContent = grid.dataset.step; });
  });
}
""".strip()

"""How the page looks, and what its script does: values under the pointer, the slider over the grids."""

from __future__ import annotations

# Colours of curves: Okabe and Ito's, told apart with any colour vision; dashes tell neighbours apart without colour.
STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#59636e;--paper:#fff;--panel:#f6f8fa;--rule:#d5dae0;
--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#cc79a7;--c4:#e69f00;--c5:#56b4e9;
--good:#0b6e4f;--watch:#8a5a00;--bad:#a8201a}
@media (prefers-color-scheme:dark){:root{--ink:#e6eaef;--soft:#9aa5b1;--paper:#12161b;--panel:#1b2128;--rule:#39424d;
--c0:#56b4e9;--c1:#e69f00;--c2:#009e73;--c3:#cc79a7;--c4:#f0e442;--c5:#d55e00;
--good:#5fd3a5;--watch:#f0c04a;--bad:#ff8a80}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1400px;padding:12px 16px 48px;background:var(--paper);color:var(--ink);
font:15px/1.45 system-ui,sans-serif}
h1{font-size:1.5rem;margin:.4rem 0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2rem 0 .6rem;padding-bottom:.2rem;border-bottom:1px solid var(--rule)}
h3{font-size:1rem;margin:1rem 0 .4rem;overflow-wrap:anywhere}
h4{font-size:.9rem;margin:.8rem 0 .3rem;font-weight:600}
p{margin:.4rem 0;color:var(--soft)}
summary{cursor:pointer;color:var(--soft);overflow-wrap:anywhere}
pre{overflow:auto;max-height:36rem;padding:10px;background:var(--panel);border-radius:6px;font-size:13px}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:3px 12px 3px 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule)}
th[scope=row]{font-weight:400;color:var(--soft)}
td{min-width:5rem;max-width:28rem;overflow-wrap:break-word}
.charts{display:grid;gap:18px 24px;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr))}
.chart{margin:0;padding:10px 12px;background:var(--panel);border-radius:8px;display:flex;flex-direction:column}
.chart figcaption{flex:1;overflow-wrap:anywhere}
.chart figcaption span{color:var(--soft);font-size:13px}
.chart figcaption p{margin:0;font-size:12.5px;line-height:1.35}
.plot{position:relative;height:190px;margin:12px 10px 34px 52px;touch-action:pan-y}
.plot svg{position:absolute;inset:0;width:100%;height:100%;overflow:hidden;border-left:1px solid var(--soft);
border-bottom:1px solid var(--soft)}
.plot span{position:absolute;font-size:12px;line-height:1;color:var(--soft);white-space:nowrap}
.plot .y{right:100%;margin-right:6px;transform:translateY(-50%)}
.plot .x{top:100%;margin-top:6px;transform:translateX(-50%)}
.plot .axis{top:100%;right:0;margin-top:20px}
.rule{stroke:var(--rule);stroke-width:1;fill:none;vector-effect:non-scaling-stroke}
.line{stroke-width:2;fill:none;stroke-linecap:round;stroke-linejoin:round;vector-effect:non-scaling-stroke}
.band{stroke:none;opacity:.18}
.d1{stroke-dasharray:7 5}.d2{stroke-dasharray:2 5}
.c0{stroke:var(--c0);--fill:var(--c0)}.c1{stroke:var(--c1);--fill:var(--c1)}.c2{stroke:var(--c2);--fill:var(--c2)}
.c3{stroke:var(--c3);--fill:var(--c3)}.c4{stroke:var(--c4);--fill:var(--c4)}.c5{stroke:var(--c5);--fill:var(--c5)}
.band{stroke:none;fill:var(--fill)}
.cross{position:absolute;top:0;bottom:0;width:1px;background:var(--soft);pointer-events:none}
.plot output{position:absolute;top:0;z-index:1;max-width:75%;padding:4px 8px;border:1px solid var(--rule);
border-radius:6px;background:var(--paper);font-size:12.5px;white-space:pre-line;pointer-events:none;overflow-wrap:anywhere}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;margin:0;padding:0;list-style:none;font-size:12.5px}
.legend li{overflow-wrap:anywhere}
.legend svg{width:24px;height:8px;margin-right:6px}
.over{display:flex;flex-wrap:wrap;gap:2px 16px;margin:.8rem 0;padding:6px 12px;border:1px solid var(--rule);
border-radius:6px}
.over label{display:flex;gap:6px;align-items:center}
.rows{margin:.3rem 0;padding-left:1.4rem;color:var(--soft);font-size:13px;columns:2 22rem;overflow-wrap:anywhere}
.headline{font-size:1.5rem;line-height:1.25;margin:.2rem 0;color:var(--ink);font-variant-numeric:tabular-nums;
overflow-wrap:anywhere}
.headline b{font-weight:650}
.badge{display:inline-block;padding:0 7px;border:1.5px solid;border-radius:10px;font-size:12.5px;font-weight:600;
white-space:nowrap}
.badge.good{color:var(--good)}.badge.watch{color:var(--watch)}.badge.bad{color:var(--bad)}.badge.none{color:var(--soft)}
small{color:var(--soft)}
.run{display:grid;gap:8px 28px;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));align-items:start;
margin-bottom:18px}
.run>*{min-width:0}
.pair{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:6px 12px;max-width:860px}
.pair figure{margin:0;min-width:0}
.pair figcaption{font-weight:600;font-size:13px;margin-bottom:4px}
.pair img,.measured img{display:block;max-width:100%;height:auto;background:#fff;padding:4px}
.pair img[hidden]{display:none}
.pair label{grid-column:1/-1;display:flex;gap:8px;align-items:center;font-variant-numeric:tabular-nums}
.pair input{flex:1;min-width:80px}
.pair output{min-width:3em}
.pair p{grid-column:1/-1}
.measured{margin:.6rem 0}
.samples{display:grid;gap:10px;grid-template-columns:repeat(auto-fill,minmax(clamp(72px,8vw,128px),1fr));max-width:1100px}
.samples figure{margin:0;font-size:12.5px;line-height:1.3;overflow-wrap:anywhere}
.samples img{width:100%;image-rendering:auto;display:block;margin-bottom:3px}
[hidden]{display:none}
@media (max-width:640px){body{padding:8px 10px 32px}.headline{font-size:1.2rem}table{font-size:12.5px}
th,td{padding-right:7px;overflow-wrap:anywhere}th,td{min-width:2.8rem}th[scope=row]{min-width:4.5rem}.plot{margin-left:44px}
pre{white-space:pre-wrap;overflow-wrap:anywhere}}
""".strip()

SCRIPT = """
"use strict";
const numbers = JSON.parse(document.getElementById("numbers").textContent);
const text = value => value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential() : String(value);
const short = value => Math.abs(value) >= 1e6 || value && Math.abs(value) < 1e-3
  ? Number(value.toPrecision(4)).toExponential().replace("e+", "e") : String(Number(value.toPrecision(6)));
const names = {step: "step", images: "images", flop: "FLOP", hours: "hours"};
const marks = (low, high, whole) => {
  const rough = (high - low) / 5;
  if (!(rough > 1e-300)) return [low];
  const power = 10 ** Math.floor(Math.log10(rough));
  const apart = [1, 2, 5, 10, 20].map(m => m * power).find(m => m >= rough * (1 - 1e-9));
  const found = [];
  for (let k = Math.ceil(low / apart - 1e-9); k <= Math.floor(high / apart + 1e-9); k++) found.push(k * apart);
  return found.filter(mark => !whole || mark === Math.round(mark));
};
const nearest = (values, wanted) =>
  values.reduce((best, value, i) => Math.abs(value - wanted) < Math.abs(values[best] - wanted) ? i : best, 0);
for (const plot of document.querySelectorAll(".plot")) {
  const chart = numbers[plot.dataset.chart];
  const cross = plot.querySelector(".cross"), shown = plot.querySelector("output");
  const of = (curve, axis) => axis === "step" ? curve.points.map(point => point[0]) : (curve.spent || {})[axis];
  let over, low, high, steps, at = -1;
  const follow = wanted => {
    over = chart.curves.some(curve => of(curve, wanted)) ? wanted : "step";
    steps = [...new Set(chart.curves.flatMap(curve => of(curve, over) || []))].sort((a, b) => a - b);
    [low, high] = [steps[0], steps[steps.length - 1]];
    at = -1;
  };
  const place = value => high > low ? (value - low) / (high - low) : 0.5;
  const redraw = () => {
    for (const path of plot.querySelectorAll("path[data-curve]")) {
      const places = of(chart.curves[path.dataset.curve], over);
      path.toggleAttribute("hidden", !places);
      if (!places) continue;
      const both = path.classList.contains("band") ? [...places, ...[...places].reverse()] : places;
      const heights = [...path.getAttribute("d").matchAll(/,(-?[0-9.]+)/g)].map(match => match[1]);
      const points = heights.map((height, i) => (1000 * place(both[i])).toFixed(1) + "," + height).join(" ");
      path.setAttribute("d", "M" + points + (both !== places ? "Z" : places.length === 1 ? "h.1" : ""));
    }
    plot.querySelectorAll(".x").forEach(label => label.remove());
    for (const mark of marks(low, high, over === "step" || over === "images")) {
      const label = document.createElement("span");
      label.className = "x";
      label.style.left = 100 * place(mark) + "%";
      label.textContent = short(mark);
      plot.append(label);
    }
    const axis = plot.querySelector(".axis");
    plot.setAttribute("aria-label", plot.getAttribute("aria-label").replace(" over " + axis.textContent + ";",
      " over " + names[over] + ";"));
    axis.textContent = names[over];
  };
  const choices = [...document.querySelectorAll(".over input")];
  for (const choice of choices) choice.addEventListener("change", () => { follow(choice.value); hide(); redraw(); });
  follow((choices.find(choice => choice.checked) || {value: "step"}).value);
  const show = index => {
    at = Math.min(Math.max(index, 0), steps.length - 1);
    const lines = [over === "step" ? "step " + steps[at] : short(steps[at]) + " " + names[over]];
    for (const curve of chart.curves) {
      const own = of(curve, over);
      if (!own || steps[at] < own[0] || steps[at] > own[own.length - 1]) continue;
      const [, value, least, most] = curve.points[nearest(own, steps[at])];
      const band = least === most ? "" : " (" + text(least) + " to " + text(most) + ")";
      lines.push((chart.curves.length > 1 ? curve.name + ": " : "") + text(value) + band);
    }
    const share = place(steps[at]);
    cross.style.left = 100 * share + "%";
    shown.style.left = share < 0.5 ? "calc(" + 100 * share + "% + 8px)" : "auto";
    shown.style.right = share < 0.5 ? "auto" : "calc(" + 100 * (1 - share) + "% + 8px)";
    shown.textContent = lines.join("\\n");
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
}
for (const grids of document.querySelectorAll(".grids")) {
  const images = [...grids.querySelectorAll("img[data-step]")], slider = grids.querySelector("input");
  const shown = [...grids.querySelectorAll("output")];
  if (!slider) continue;
  const turn = () => {
    images.forEach((image, index) => { image.hidden = index !== Number(slider.value); });
    shown.forEach(output => { output.textContent = images[slider.value].dataset.step; });
  };
  slider.addEventListener("input", turn);
  turn();
}
""".strip()

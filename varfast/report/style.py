"""How the page looks: light, dark, on paper, and 400 pixels wide."""

from __future__ import annotations

# Colours of curves: Okabe and Ito's, told apart with any colour vision; dashes tell neighbours apart without colour.
STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#59636e;--paper:#fff;--panel:#f6f8fa;--rule:#d5dae0;
--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#cc79a7;--c4:#e69f00;--c5:#56b4e9;
--healthy:#0b6e4f;--look:#8a5a00;--broken:#a8201a}
@media (prefers-color-scheme:dark){:root{--ink:#e6eaef;--soft:#9aa5b1;--paper:#12161b;--panel:#1b2128;--rule:#39424d;
--c0:#56b4e9;--c1:#e69f00;--c2:#009e73;--c3:#cc79a7;--c4:#f0e442;--c5:#d55e00;
--healthy:#5fd3a5;--look:#f0c04a;--broken:#ff8a80}}
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
td{min-width:4rem;max-width:28rem;overflow-wrap:break-word}
th[scope=row]{max-width:22rem;overflow-wrap:break-word}
.charts{display:grid;gap:18px 24px;grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr))}
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
.raw{stroke-width:1.2;fill:none;opacity:.35;vector-effect:non-scaling-stroke}
.d1{stroke-dasharray:7 5}.d2{stroke-dasharray:2 5}
.c0{stroke:var(--c0);--fill:var(--c0)}.c1{stroke:var(--c1);--fill:var(--c1)}.c2{stroke:var(--c2);--fill:var(--c2)}
.c3{stroke:var(--c3);--fill:var(--c3)}.c4{stroke:var(--c4);--fill:var(--c4)}.c5{stroke:var(--c5);--fill:var(--c5)}
.band{stroke:none;opacity:.18;fill:var(--fill)}
.cross{position:absolute;top:0;bottom:0;width:1px;background:var(--soft);pointer-events:none}
.plot output{position:absolute;top:0;z-index:1;max-width:75%;padding:4px 8px;border:1px solid var(--rule);
border-radius:6px;background:var(--paper);font-size:12.5px;white-space:pre-line;pointer-events:none;overflow-wrap:anywhere}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;margin:0;padding:0;list-style:none;font-size:12.5px}
.legend li{overflow-wrap:anywhere}
.legend svg{width:24px;height:8px;margin-right:6px}
.legend button{all:unset;cursor:pointer;display:inline-flex;align-items:center}
.legend button:focus-visible{outline:2px solid}
.legend button[aria-pressed=false]{opacity:.45;text-decoration:line-through}
.controls{display:flex;flex-wrap:wrap;gap:8px 14px;align-items:center;margin:.4rem 0;padding:8px 12px;
background:var(--panel);border:1px solid var(--rule);border-radius:8px;font-size:14px}
.controls fieldset{display:flex;flex-wrap:wrap;gap:2px 12px;margin:0;padding:0;border:0;min-width:0}
.controls legend{float:left;margin-right:10px;padding:0;color:var(--soft)}
.controls label{display:flex;gap:5px;align-items:center;overflow-wrap:anywhere;min-width:0}
.controls output{min-width:2.4em;font-variant-numeric:tabular-nums}
@media (min-width:900px){.controls{position:sticky;top:0;z-index:2}}
.key{width:24px;height:8px;margin-right:6px;flex:none}
.rows{margin:.3rem 0;padding-left:1.4rem;color:var(--soft);font-size:13px;columns:2 22rem;overflow-wrap:anywhere}
.headline{font-size:1.5rem;line-height:1.25;margin:.2rem 0;color:var(--ink);font-variant-numeric:tabular-nums;
overflow-wrap:anywhere}
.headline b{font-weight:650}
.badge{display:inline-block;align-self:start;justify-self:start;padding:0 7px;border:1.5px solid;border-radius:10px;
font-size:12.5px;font-weight:600;white-space:nowrap}
.badge.healthy{color:var(--healthy)}.badge.look{color:var(--look)}.badge.broken{color:var(--broken)}
.badge.none{color:var(--soft)}
small{color:var(--soft)}
.first{display:grid;gap:12px 28px;grid-template-columns:minmax(0,1.6fr) minmax(0,1fr);align-items:start}
.first>*{min-width:0}
.verdicts h2{margin:0 0 .5rem;border:0;font-size:1rem}
.verdicts ul{margin:0;padding:0;list-style:none}
.verdicts li{display:grid;grid-template-columns:7.2rem minmax(0,1fr);gap:8px;padding:5px 0;
border-top:1px solid var(--rule);font-size:14px;line-height:1.35}
.verdicts small{display:block;font-size:12px;overflow-wrap:anywhere}
.several{display:grid;gap:8px 24px;grid-template-columns:repeat(auto-fit,minmax(min(100%,320px),1fr))}
.several section{min-width:0}
.several h2{font-size:1rem;margin:.8rem 0 .3rem;border:0}
.beside{display:flex;flex-wrap:wrap;gap:8px 40px;align-items:start}
.beside>*{min-width:0;max-width:100%}
.beside h3{margin-top:.2rem}
.pair{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:6px 12px;max-width:860px}
figure{margin:0;min-width:0}
.pair figcaption,.grids figcaption{font-weight:600;font-size:13px;margin-bottom:4px}
.pair img,.grids img,.measured img{display:block;max-width:100%;height:auto;background:#fff;padding:4px}
.pair img{width:100%}
.pair label{grid-column:1/-1;display:flex;gap:8px;align-items:center;font-variant-numeric:tabular-nums}
.pair input{flex:1;min-width:80px}
.pair output{min-width:3em}
.pair p,.pair details{grid-column:1/-1;font-size:13px;margin:0}
.grids{display:grid;gap:12px;grid-template-columns:repeat(auto-fill,minmax(min(100%,250px),1fr))}
.range{position:relative;display:inline-block;width:110px;height:12px;margin-right:10px;vertical-align:-1px;
background:linear-gradient(var(--rule),var(--rule)) center/100% 1px no-repeat}
.range i{position:absolute;top:4.5px;height:3px;background:var(--c0)}
.range .ring,.range .dot{top:1px;width:10px;height:10px;margin-left:-5px;border:2px solid var(--c0);border-radius:50%;
background:var(--paper)}
.range .dot{background:var(--c0)}
.by-label td{min-width:7.2rem}.by-label td span{white-space:nowrap}
.measured{margin:.6rem 0}
.samples{display:grid;gap:10px;grid-template-columns:repeat(auto-fill,minmax(clamp(72px,8vw,128px),1fr));max-width:1100px}
.samples figure{margin:0;font-size:12.5px;line-height:1.3;overflow-wrap:anywhere}
.samples img{width:100%;image-rendering:auto;display:block;margin-bottom:3px}
[hidden]{display:none!important}
@media (max-width:900px){.first{grid-template-columns:minmax(0,1fr)}}
@media (max-width:640px){body{padding:8px 10px 32px}.headline{font-size:1.2rem}table{font-size:12.5px}
th,td{padding-right:7px;min-width:2.8rem}th[scope=row]{min-width:4.5rem}
.by-label .range{display:block;width:100%}.plot{margin-left:44px}
.verdicts li{grid-template-columns:minmax(0,1fr);gap:1px}.badge{justify-self:start}
.grids{grid-template-columns:repeat(auto-fill,minmax(min(100%,150px),1fr))}
pre{white-space:pre-wrap;overflow-wrap:anywhere}}
@media print{body{max-width:none;padding:0}.controls,.pair label{display:none!important}
details::details-content{display:block;content-visibility:visible}pre{max-height:none;white-space:pre-wrap}
.chart,figure,tr,li{break-inside:avoid}h2,h3{break-after:avoid}.wide{overflow:visible}}
""".strip()

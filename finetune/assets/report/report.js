"use strict";
// Everything from a run reaches the page as text (textContent), never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs;
const several = runs.length > 1;
const COLOURS = ["#3f7ee8", "#e8710a", "#2b9a66", "#9b51e0", "#d6409f", "#0d9ba5", "#c49102", "#7a8699", "#e5484d", "#5e7c16"];
const dark = matchMedia("(prefers-color-scheme: dark)");
const plots = new Set();
let chosen = 0;

// --- small parts of the page

function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  for (const child of children.flat()) if (child !== null && child !== undefined) node.append(child);
  return node;
}

function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function number(value, digits = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e9)) return value.toExponential(2);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(digits)));
}

const own = (object, name) => (Object.hasOwn(object, name) ? object[name] : undefined);
const percent = (value) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(1)} %`);
const brief = (value) => (value === null || value === undefined ? "–" : `${Number((100 * value).toPrecision(3))} %`);
const whole = (value) => (value === null || value === undefined ? "–" : value.toLocaleString("en"));

function duration(seconds) {
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  const minutes = Math.floor(seconds / 60);
  return minutes < 60 ? `${minutes} min ${Math.round(seconds % 60)} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function table(columns, rows) {
  const head = el("tr", {}, columns.map((column) => el("th", { class: column.number ? "number" : "", scope: "col" }, column.title)));
  const body = rows.map((row) =>
    el("tr", {}, columns.map((column) => {
      const value = column.value(row);
      const kind = `${column.number ? "number" : ""} ${column.long ? "long" : ""} ${column.tone ? column.tone(row) : ""}`;
      return el("td", { class: kind.trim() }, value === null || value === undefined ? "–" : value);
    })));
  return el("div", { class: "scroll" }, el("table", {}, el("thead", {}, head), el("tbody", {}, body)));
}

function card(title, about, ...content) {
  return el("div", { class: "card" }, el("h3", {}, title), about ? el("p", { class: "about" }, about) : null, ...content);
}

// --- curves

// Each series: {label, x, values, colour, low, high, dashed}. Series of several runs have different steps: they are joined.
function chart(title, about, series, options = {}) {
  const shown = series.filter((one) => one.values && one.values.some((value) => value !== null));
  if (!shown.length) return null;
  const host = el("div", { class: "plot" });
  const box = card(title, about, host);
  const tables = [], lines = [{}], bands = [], main = [];
  for (const one of shown) {
    const columns = [one.x, one.values];
    const colour = one.colour;
    main.push(lines.length);
    lines.push({
      label: one.label, stroke: colour, width: one.dashed ? 1.2 : 1.6, dash: one.dashed ? [5, 4] : undefined,
      spanGaps: true, points: { show: !one.dashed && (one.x.length < 2 || (options.points && one.x.length < 40)), size: 5 },
    });
    if (one.low) {
      columns.push(one.low, one.high);
      const hidden = { stroke: "transparent", width: 0, points: { show: false }, spanGaps: true };
      lines.push(hidden, { ...hidden });
      bands.push({ series: [lines.length - 1, lines.length - 2], fill: `${colour}2b` });
    }
    tables.push(columns);
  }
  const joined = uPlot.join(tables);
  const format = options.format || number;
  const axis = { stroke: () => css("--muted"), grid: { stroke: () => css("--line"), width: 1 }, ticks: { stroke: () => css("--line"), width: 1, size: 4 }, font: "12px system-ui, sans-serif" };
  const marks = options.marks || [];
  let plot = null;
  const keys = legend(shown, main, () => plot, format);
  const build = () => new uPlot({
    width: Math.max(240, host.clientWidth), height: 210,
    series: lines, bands,
    legend: { show: false },
    cursor: { sync: { key: options.sync || "step" }, points: { size: 7 }, drag: { x: true, y: false } },
    scales: { x: { time: false }, y: { distr: options.log ? 3 : 1, range: options.range } },
    axes: [
      { ...axis, size: 34, values: (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? compact(tick) : "")) },
      { ...axis, size: 58, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : format(tick, 3))) },
    ],
    hooks: {
      setCursor: [(self) => keys.show(self.cursor.idx)],
      draw: [(self) => drawMarks(self, marks)],
    },
  }, joined, host);
  const entry = { host, make: () => { plot = build(); return plot; }, get plot() { return plot; } };
  plots.add(entry);
  box.append(keys.node);
  return box;
}

function compact(value) {
  return Math.abs(value) >= 10000 ? `${Number((value / 1000).toPrecision(4))}k` : value.toLocaleString("en");
}

function drawMarks(self, marks) {
  const { ctx, bbox } = self;
  ctx.save();
  ctx.strokeStyle = ctx.fillStyle = css("--muted");
  ctx.setLineDash([3, 4]);
  ctx.textAlign = "left";
  ctx.textBaseline = "alphabetic";
  ctx.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
  for (const [name, step] of marks) {
    const at = self.valToPos(step, "x", true);
    if (at < bbox.left || at > bbox.left + bbox.width) continue;
    ctx.beginPath();
    ctx.moveTo(at, bbox.top);
    ctx.lineTo(at, bbox.top + bbox.height);
    ctx.stroke();
    ctx.fillText(name, at + 4 * devicePixelRatio, bbox.top + 11 * devicePixelRatio);
  }
  ctx.restore();
}

function legend(shown, main, plot, format) {
  const at = el("span", { class: "at" });
  const values = shown.map(() => el("b", {}));
  const names = shown.map((one, place) =>
    el("span", { class: "key", title: "show or hide", onclick: (event) => {
      const isShown = !plot().series[main[place]].show;
      plot().setSeries(main[place], { show: isShown });
      if (one.low) for (const beside of [1, 2]) plot().setSeries(main[place] + beside, { show: isShown });
      event.currentTarget.classList.toggle("off", !isShown);
    } }, el("i", { style: `background:${one.colour}` }), el("span", {}, one.label), values[place]));
  const last = shown.map((one) => one.values.filter((value) => value !== null).at(-1));
  const show = (index) => {
    const self = plot();
    const here = self !== null && index !== null && index !== undefined;
    at.textContent = here ? `step ${whole(self.data[0][index])}` : "last value";
    shown.forEach((_, place) => {
      const value = here ? self.data[main[place]][index] : last[place];
      values[place].textContent = format(value === undefined ? null : value);
    });
  };
  show(null);
  return { node: el("div", { class: "keys" }, names, at), show };
}

function startPlots() {
  for (const entry of plots) if (!entry.plot && entry.host.isConnected && entry.host.clientWidth) entry.make();
}

const resized = new ResizeObserver(() => {
  for (const entry of plots) {
    if (!entry.host.isConnected) { if (entry.plot) { entry.plot.destroy(); plots.delete(entry); } continue; }
    if (entry.plot && entry.host.clientWidth && entry.host.clientWidth !== entry.plot.width) entry.plot.setSize({ width: entry.host.clientWidth, height: 210 });
  }
  startPlots();
  for (const draw of heatmaps) draw();
});

// One series for each run.
function overlay(title, about, name, options = {}) {
  return chart(title, about, runs.map((run, place) => {
    const curves = run.curves, band = several ? null : curves.bands[name];
    return {
      label: several ? run.name : options.label || title, x: curves.x, values: curves.figures[name], colour: COLOURS[place % COLOURS.length],
      low: band ? band[0] : null, high: band ? band[1] : null,
    };
  }), { marks: several ? [] : runs[0].curves.stages, ...options });
}

function split(title, about, named, pick, x, options = {}) {
  const run = runs[chosen];
  return chart(title, about, Object.entries(named).map(([name, values], place) => (
    { label: name, x, values: pick(values), colour: COLOURS[place % COLOURS.length] }
  )), { marks: run.curves.stages, ...options });
}

// --- the heatmap of the experts' load

const heatmaps = new Set();
const RAMP = { light: [[-2, 233, 238, 247], [0, 66, 121, 222], [1, 112, 78, 190], [2, 226, 110, 40], [3, 250, 190, 40]], dark: [[-2, 33, 41, 56], [0, 66, 121, 222], [1, 140, 96, 214], [2, 235, 120, 50], [3, 255, 205, 80]] };
const DEAD = [229, 72, 77];

function colourOf(level, even) {
  if (level === 0) return DEAD;
  const ramp = dark.matches ? RAMP.dark : RAMP.light;
  const at = Math.max(-2, Math.min(3, Math.log2(level / even)));
  let upper = 1;
  while (ramp[upper][0] < at) upper++;
  const [low, high] = [ramp[upper - 1], ramp[upper]];
  const share = (at - low[0]) / (high[0] - low[0]);
  return [1, 2, 3].map((part) => Math.round(low[part] + share * (high[part] - low[part])));
}

function heatmap(load, even) {
  const layers = load.layers.length, experts = load.experts;
  const canvas = el("canvas", { class: "heat", role: "img", "aria-label": "load of each expert of each layer" });
  const words = el("output", {});
  const readout = el("p", { class: "readout" }, "Point at a cell to read it.");
  const view = el("select", { "aria-label": "tokens" }, load.views.map((one, place) => (
    el("option", { value: place }, one.division === "all" ? "all tokens" : `${one.division === "kinds" ? "kind" : "source"}: ${one.name}`))));
  const slider = el("input", { type: "range", min: 0, max: load.frames.length - 1, value: load.frames.length - 1, "aria-label": "time" });
  const play = el("button", { type: "button" }, "Play");
  const decoded = new Map();
  let timer = null;
  const levels = () => {
    const key = `${view.value}/${slider.value}`;
    if (!decoded.has(key)) decoded.set(key, Uint8Array.from(atob(load.views[view.value].data[slider.value]), (letter) => letter.charCodeAt(0)));
    return decoded.get(key);
  };
  const draw = () => {
    if (!canvas.isConnected) { heatmaps.delete(draw); clearInterval(timer); return; }
    const image = new ImageData(experts, layers), shown = levels();
    shown.forEach((level, at) => image.data.set([...colourOf(level, even), 255], 4 * at));
    canvas.width = experts;
    canvas.height = layers;
    canvas.getContext("2d").putImageData(image, 0, 0);
    canvas.style.height = `${Math.max(60, Math.min(620, layers * Math.max(8, Math.min(22, (canvas.clientWidth / experts) * 0.9))))}px`;
    const [first, last, records] = load.frames[slider.value];
    words.textContent = first === last ? `step ${whole(first)}` : `steps ${whole(first)} to ${whole(last)}, ${records} records`;
  };
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const expert = Math.min(experts - 1, Math.floor(((event.clientX - box.left) / box.width) * experts));
    const layer = Math.min(layers - 1, Math.floor(((event.clientY - box.top) / box.height) * layers));
    if (expert < 0 || layer < 0) return;
    const level = levels()[layer * experts + expert];
    const share = level === 0 ? "no token" : level === 255 ? "8 times an even share, or more" : `${number(level / even, 2)} times an even share`;
    readout.textContent = `Layer ${load.layers[layer]}, expert ${expert}: ${share}.`;
  });
  view.addEventListener("change", draw);
  slider.addEventListener("input", draw);
  const stop = () => { clearInterval(timer); timer = null; play.textContent = "Play"; };
  play.addEventListener("click", () => {
    if (timer) { stop(); return; }
    if (Number(slider.value) === load.frames.length - 1) slider.value = 0;
    play.textContent = "Stop";
    draw();
    timer = setInterval(() => {
      if (Number(slider.value) >= load.frames.length - 1) { stop(); return; }
      slider.value = Number(slider.value) + 1;
      draw();
    }, Math.max(60, 3000 / load.frames.length));
  });
  heatmaps.add(draw);
  return card("Load of each expert", "Layers from top to bottom, experts from left to right, relative to an even share of the layer's tokens.",
    el("div", { class: "controls" }, view, load.frames.length > 1 ? [slider, play] : [], words), canvas,
    el("div", { class: "ends" }, el("span", {}, `expert 0, layers ${load.layers[0]} to ${load.layers.at(-1)}`), el("span", {}, `expert ${experts - 1}`)), readout, ramp());
}

function ramp() {
  const stops = (dark.matches ? RAMP.dark : RAMP.light).map(([at, ...rgb]) => `rgb(${rgb.join(",")}) ${((at + 2) / 5) * 100}%`);
  const bar = el("div", { class: "ramp" });
  bar.style.background = `linear-gradient(90deg, ${stops.join(", ")})`;
  return el("div", { class: "legend" }, bar,
    el("div", { class: "ramp-words" }, ["≤ ¼", "½", "even", "2×", "4×", "≥ 8×"].map((word) => el("span", {}, word))),
    el("div", { class: "ramp-words dead-word" }, el("span", {}, el("i", {}), "no token at all")));
}

// --- the sections of the page; `own` ones belong to the chosen run

const STATES = {
  done: ["done", "good"], running: ["running", "live"], preempted: ["preempted", "warn"], guarded: ["stopped by a guard", "warn"],
  failed: ["failed", "bad"], ended: ["ended without a message", "bad"],
};

function badge(run) {
  const [word, tone] = STATES[run.state.word];
  return el("span", { class: `badge ${tone}` }, word);
}

function progress(run) {
  const steps = run.steps ? `${whole(run.done)} of ${whole(run.steps)} steps` : `${whole(run.done)} steps`;
  return `${steps}${run.base ? `, from ${run.base}` : ""}`;
}

function head() {
  if (!several) {
    const run = runs[0];
    return el("header", {}, el("div", { class: "title" }, el("h1", {}, run.name), badge(run)), el("p", { class: "sub" }, progress(run)),
      run.state.message ? el("div", { class: "message" }, run.state.message) : null, tiles(run));
  }
  const best = (run) => (run.evaluation.best ? `${run.evaluation.best.metric} ${number(run.evaluation.best.value)}` : null);
  const tile = (run, label) => { const found = run.tiles.find((one) => one.label === label); return found ? found.value : null; };
  const columns = [
    { title: "run", value: (run) => el("span", {}, el("i", { style: `display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:7px;background:${COLOURS[runs.indexOf(run) % COLOURS.length]}` }), run.name), long: true },
    { title: "state", value: (run) => badge(run) },
    { title: "steps", number: true, value: (run) => whole(run.done) },
    { title: "training loss", number: true, value: (run) => tile(run, "training loss") },
    { title: "best metric", value: best },
    { title: "tokens/s", number: true, value: (run) => tile(run, "useful tokens per second") },
    { title: "time", number: true, value: (run) => tile(run, "time") },
  ];
  return el("header", {}, el("h1", {}, `${runs.length} runs compared`), el("div", { class: "card", style: "margin-top:18px" }, table(columns, runs)));
}

function tiles(run) {
  return el("div", { class: "tiles" }, run.tiles.map((tile) => el("div", { class: "tile" },
    el("div", { class: "label" }, tile.label), el("div", { class: "value" }, tile.value), el("div", { class: "note" }, tile.note || " "))));
}

function differences() {
  if (!several) return null;
  const columns = [{ title: "key", value: (row) => el("code", {}, row[0]) },
    ...runs.map((run, place) => ({ title: run.name, long: true, value: (row) => el("code", {}, row[1][place] || "–") }))];
  return data.differing.length ? el("div", { class: "grid" }, card("Keys that differ", "", table(columns, data.differing))) : el("p", { class: "none" }, "The configurations of these runs are equal.");
}

function overview() {
  const run = runs[chosen];
  const facts = el("dl", {}, run.facts.flatMap(([label, text]) => [el("dt", {}, label), el("dd", {}, text)]));
  const trained = table([
    { title: "part", value: (row) => row.part }, { title: "trained as", value: (row) => row.mode },
    { title: "rank", number: true, value: (row) => (row.r === null ? null : whole(row.r)) },
    { title: "alpha", number: true, value: (row) => (row.alpha === null ? null : number(row.alpha)) },
    { title: "highest rate", number: true, value: (row) => number(row.lr) },
  ], run.parts);
  const sources = table([
    { title: "source", value: (row) => row.name, long: true }, { title: "licences", value: (row) => row.licences || null, long: true },
    { title: "samples", number: true, value: (row) => whole(row.samples) }, { title: "tokens", number: true, value: (row) => whole(row.tokens) },
    { title: "weight", number: true, value: (row) => number(row.weight) }, { title: "share of tokens", number: true, value: (row) => percent(row.share) },
    { title: "first loss", number: true, value: (row) => number(row.first) }, { title: "last loss", number: true, value: (row) => number(row.last) },
    { title: "path", value: (row) => el("span", { class: "mono" }, row.path), long: true },
  ], run.sources);
  return [
    el("div", { class: "grid" }, card("Run", "", facts), run.parts.length ? card("Trained parts", "", trained) : null),
    run.sources.length ? el("div", { class: "grid" }, card("Training data", "First and last losses are means over a tenth of the steps. Licences are those of a few samples.", sources)) : null,
    run.commands.length ? el("div", { class: "grid" }, card("Commands", "", run.commands.map(commandLine))) : null,
  ];
}

function commandLine(item) {
  const code = el("code", {}, item.command);
  const button = el("button", { type: "button", onclick: async () => {
    getSelection().selectAllChildren(code);
    try { await navigator.clipboard.writeText(item.command); button.textContent = "Copied"; } catch { button.textContent = "Selected"; }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  } }, "Copy");
  return el("div", { class: "command" }, el("span", {}, item.label), code, button);
}

const pooled = () => {
  const widths = runs.map((run) => run.curves.width).filter((width) => width > 1);
  return widths.length ? `A point is the mean of ${Math.max(...widths)} steps${several ? "" : "; the band goes from the lowest to the highest"}.` : "";
};

const trainingCurves = () => [
  overlay("Loss", pooled(), "loss"),
  overlay("Gradient norm", "Before it is clipped.", "grad_norm", { log: true }),
  overlay("Balance loss", "1 if all experts get the same share.", "loss_balance"),
  overlay("Router z loss", "Mean squared logsumexp of the router's logits.", "loss_z"),
];

function ownTraining() {
  const run = runs[chosen], curves = run.curves;
  return [
    Object.keys(curves.sources).length > 1 ? split("Loss by source", "", curves.sources, (one) => one.loss, curves.x) : null,
    Object.keys(curves.sources).length > 1 ? split("Share of useful tokens by source", "", curves.sources, (one) => one.share, curves.x, { format: brief }) : null,
    split("Learning rate by part", "From the run's schedule.", together(curves.rates), (one) => one, curves.x),
  ];
}

// Parts with the same rates in all steps share a curve.
function together(rates) {
  const names = new Map();
  for (const [part, values] of Object.entries(rates)) {
    const key = values.join();
    names.set(key, { parts: [...(names.get(key)?.parts || []), part], values });
  }
  return Object.fromEntries([...names.values()].map(({ parts, values }) => [parts.join(", "), values]));
}

const speedCurves = () => [
  overlay("Useful tokens per second", "Over all ranks, without padding.", "tokens_per_second"),
  overlay("MFU", "Share of the device's peak.", "mfu", { format: brief }),
  overlay("Seconds of a step", "Of the slowest rank.", "seconds"),
  overlay("Seconds of waiting for data", "The longest wait of any rank.", "seconds_data"),
  overlay("Memory in GB", "The most that any rank has held so far.", "memory_gb"),
];

function ownSpeed() {
  const run = runs[chosen];
  const total = run.phases.reduce((sum, [, seconds]) => sum + seconds, 0);
  const bar = el("div", { class: "bar" }, run.phases.map(([, seconds], place) => {
    const part = el("i", {});
    part.style.width = `${(100 * seconds) / total}%`;
    part.style.background = COLOURS[place % COLOURS.length];
    return part;
  }));
  const rows = run.phases.map(([name, seconds], place) => ({ name, seconds, colour: COLOURS[place % COLOURS.length] }));
  const phases = table([
    { title: "phase", value: (row) => { const dot = el("i", { style: "display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:7px" }); dot.style.background = row.colour; return el("span", {}, dot, row.name); } },
    { title: "time", number: true, value: (row) => duration(row.seconds) }, { title: "share", number: true, value: (row) => percent(row.seconds / total) },
  ], rows);
  const memory = table([
    { title: "memory", value: (row) => row.name, long: true }, { title: "planned", number: true, value: (row) => row.plan }, { title: "measured", number: true, value: (row) => row.measured },
  ], run.memory);
  return [total ? card("Time by phase", "All starts of the run.", bar, phases) : null, run.memory.length ? card("Memory, planned and measured", "A range is from an even load of the experts to the busiest rank.", memory) : null];
}

const expertCurves = () => [
  overlay("Busiest expert", "Its tokens over the mean, in the worst layer.", "expert_load_max_over_mean"),
  overlay("Experts without a token", "Of one step, over all layers.", "experts_dead"),
  overlay("Entropy of the load", "Worst layer; 1 if even.", "expert_load_entropy"),
  overlay("Router agreement", "Choices that the base's router would make too.", "router_agreement", { format: brief }),
];

function ownExperts() {
  const load = runs[chosen].load;
  if (!load) return [];
  const rows = load.views;
  const groups = table([
    { title: "tokens", value: (row) => (row.division === "all" ? "all tokens" : `${row.division === "kinds" ? "kind" : "source"}: ${row.name}`), long: true },
    { title: "share of choices", number: true, value: (row) => percent(row.share) },
    { title: "busiest over mean", number: true, value: (row) => number(row.peak, 3) },
    { title: "busiest", value: (row) => `layer ${load.layers[row.layer]}, expert ${row.expert}` },
    { title: "experts never used", number: true, value: (row) => whole(row.dead) },
    { title: "distance to all", number: true, value: (row) => percent(row.distance) },
  ], rows);
  return [heatmap(load, data.even), card("By kind and source of the tokens", "Over all recorded steps. The distance is the share of choices that would have to move to equal the load of all tokens.", groups)];
}

function evaluationCurves() {
  const build = (title, quantity, about, options) => chart(title, about, runs.flatMap((run, place) => (
    Object.entries(run.evaluation.sources).flatMap(([source, rows], at) => {
      const colour = COLOURS[(several ? place : at) % COLOURS.length], x = run.evaluation.x;
      const series = [{ label: several ? `${run.name}, ${source}` : source, x, values: rows[quantity], colour }];
      const guard = own(run.evaluation.guards, source);
      const bound = guard && quantity === "kl" ? guard.max_kl : guard && quantity === "loss" && guard.max_loss_rise !== null ? rows.loss[0] + guard.max_loss_rise : null;
      if (bound !== null && bound !== undefined && x.length > 1) series.push({ label: `bound of ${source}`, x, values: x.map(() => bound), colour, dashed: true });
      return series;
    }))), { sync: "evaluation", points: true, ...options });
  return [build("Held-out loss", "loss", ""), build("Held-out accuracy", "accuracy", "Tokens whose likeliest guess is right.", { format: brief }), build("KL from the base", "kl", "KL(base || tuned) for each token.")];
}

function ownEvaluation() {
  const { sources, guards, best, x } = runs[chosen].evaluation;
  const rows = Object.entries(sources).flatMap(([name, quantities]) => ["loss", "accuracy", "kl", "loss_base"].map((quantity) => ({ name, quantity, values: quantities[quantity], guard: own(guards, name) })))
    .filter((row) => row.values.some((value) => value !== null));
  if (!rows.length) return [];
  const titles = { loss: "loss", accuracy: "accuracy", kl: "KL from the base", loss_base: "loss, adapters off" };
  const show = (row, value) => (row.quantity === "accuracy" ? percent(value) : number(value));
  const extreme = (row) => (row.quantity === "accuracy" ? Math.max : Math.min)(...row.values.filter((value) => value !== null));
  const action = (row) => (row.guard.guard === "stop" ? "stops the run" : "is flagged");
  const bound = (row) => (!row.guard ? null : row.quantity === "kl" && row.guard.max_kl !== null ? `${action(row)} above ${number(row.guard.max_kl)}`
    : row.quantity === "loss" && row.guard.max_loss_rise !== null ? `${action(row)} after a rise of ${number(row.guard.max_loss_rise)}` : null);
  return [card("Evaluations", best ? `The best adapter is that of step ${whole(best.step)}: ${best.metric} ${number(best.value)}.` : `${x.length} evaluations, from step ${whole(x[0])} to ${whole(x.at(-1))}.`, table([
    { title: "source", value: (row) => row.name, long: true }, { title: "quantity", value: (row) => titles[row.quantity] },
    { title: "first", number: true, value: (row) => show(row, row.values[0]) }, { title: "best", number: true, value: (row) => (row.quantity === "kl" || row.quantity === "loss_base" ? null : show(row, extreme(row))) },
    { title: "last", number: true, value: (row) => show(row, row.values.at(-1)) }, { title: "guard", value: bound },
  ], rows))];
}

function ownSamples() {
  return runs[chosen].samples.map((sample) => card(sample.key, `${whole(sample.tokens)} tokens, ${whole(sample.supervised)} of them supervised`,
    sample.pictures.length ? el("div", { class: "pictures" }, sample.pictures.map((address) => el("img", { src: address, alt: "picture of the sample" }))) : null,
    el("div", { class: "text" }, sample.parts.map(([text, isSupervised]) => (isSupervised ? el("mark", {}, text) : text)))));
}

function ownAnswers() {
  const answers = runs[chosen].answers;
  if (!answers) return [];
  const same = (row, text) => text.trim() === row.wanted.trim();
  return [card("Answers to held-out questions", `Before is step ${whole(answers.first)}, after is step ${whole(answers.last)}.`, table([
    { title: "source", value: (row) => row.source }, { title: "question", value: (row) => row.question, long: true }, { title: "wanted", value: (row) => row.wanted, long: true },
    { title: "before", value: (row) => row.before, long: true, tone: (row) => (same(row, row.before) ? "good" : "") },
    { title: "after", value: (row) => row.after, long: true, tone: (row) => (same(row, row.after) ? "good" : "bad") },
  ], answers.rows))];
}

function ownEvents() {
  const { shown, counts, left_out: leftOut } = runs[chosen].events;
  if (!shown.length) return [el("p", { class: "none" }, "No warnings, bad samples, stages, resumes or preemptions.")];
  const about = Object.entries(counts).map(([kind, count]) => `${kind}: ${whole(count)}`).join(", ");
  return [card("Events", `${about}${leftOut ? `; ${whole(leftOut)} in the middle are not shown` : ""}.`, table([
    { title: "time", value: (row) => el("span", { class: "kind" }, row.time) }, { title: "kind", value: (row) => el("span", { class: `kind ${row.kind}` }, row.kind) }, { title: "message", value: (row) => row.text, long: true },
  ], shown))];
}

function ownKeys() {
  const rows = Object.entries(runs[chosen].keys);
  return [el("details", {}, el("summary", {}, `All ${whole(rows.length)} keys of the effective configuration`),
    el("div", { class: "card" }, table([{ title: "key", value: (row) => el("code", {}, row[0]) }, { title: "value", value: (row) => el("code", {}, row[1]), long: true }], rows)))];
}

// --- the page

const SECTIONS = [
  { id: "overview", title: "Overview", shared: () => [differences()], own: overview },
  { id: "training", title: "Training", shared: trainingCurves, own: ownTraining, grid: true, ownGrid: true },
  { id: "speed", title: "Speed and memory", shared: speedCurves, own: ownSpeed, grid: true, ownGrid: true },
  { id: "experts", title: "Experts", shared: expertCurves, own: ownExperts, grid: true },
  { id: "evaluation", title: "Evaluation", shared: evaluationCurves, own: ownEvaluation, grid: true },
  { id: "samples", title: "Samples", own: ownSamples, ownGrid: true, about: "Samples of the first step as the model reads them. The marked part is supervised: only it counts in the loss." },
  { id: "answers", title: "Answers", own: ownAnswers },
  { id: "events", title: "Events", own: ownEvents },
  { id: "configuration", title: "Configuration", own: ownKeys },
];

function fill(node, content, grid) {
  const parts = (content || []).flat().filter(Boolean);
  node.replaceChildren(...parts);
  node.className = grid && parts.length ? "grid" : "";
  return parts.length;
}

function showOwn() {
  for (const section of SECTIONS) {
    const count = fill(section.ownNode, section.own(), section.ownGrid);
    if (!section.ownGrid && section.id !== "overview") for (const part of section.ownNode.children) part.style.marginBottom = "14px";
    const isEmpty = !count && !section.sharedCount;
    section.node.hidden = isEmpty;
    section.link.hidden = isEmpty;
  }
  if (document.body.contains(SECTIONS[0].node)) settle();
}

function settle() {
  startPlots();
  for (const draw of heatmaps) draw();
}

function build() {
  document.title = several ? `${runs.map((run) => run.name).join(", ")} – moetune` : `${runs[0].name} – moetune`;
  const main = el("main", {}), links = el("div", {});
  for (const section of SECTIONS) {
    const shared = el("div", {});
    section.sharedCount = fill(shared, section.shared ? section.shared() : [], section.grid);
    section.ownNode = el("div", {});
    section.link = el("a", { href: `#${section.id}` }, section.title);
    section.node = el("section", { id: section.id }, el("h2", {}, section.title), section.about ? el("p", { class: "none" }, section.about) : null, shared, section.ownNode);
    main.append(section.node);
    links.append(section.link);
  }
  if (several) {
    const choice = el("select", { "aria-label": "run", style: "margin-left:auto", onchange: (event) => { chosen = Number(event.target.value); showOwn(); } },
      runs.map((run, place) => el("option", { value: place }, run.name)));
    links.append(choice);
  }
  showOwn();
  document.getElementById("page").append(head(), el("nav", {}, links), main,
    el("footer", {}, `Written by moetune ${data.version} on ${data.written}. Drag over a curve to look closer, double-click to see all of it again.`));
  settle();
  resized.observe(main);
  dark.addEventListener("change", () => { for (const entry of plots) if (entry.plot) entry.plot.redraw(); for (const draw of heatmaps) draw(); });
}

build();

// Curves over the steps: values under the pointer, zoom, smoothing and a log axis.
const panels = JSON.parse($("panels").textContent);
const MARGIN = { left: 46, right: 10, top: 8, bottom: 26 };
const PLOT_HEIGHT = 190;
let zoom = null;

const positive = (panel) => panel.curves.flatMap((c) => c.y).filter((v) => v > 0);
const isLog = (panel) => $("log-axis").checked && !panel.stacked && positive(panel).length > 0;
const shownValue = (panel, v) => (panel.share ? `${digits(100 * v, 6)} %` : digits(v, 6));
const tickText = (panel, v) => (panel.share ? `${digits(100 * v, 3)} %` : digits(v, 3));

// Exponential mean, without the pull of its start.
const smoothed = (values, weight) => {
  let total = 0, mass = 0;
  return values.map((v) => {
    total = weight * total + (1 - weight) * v;
    mass = weight * mass + (1 - weight);
    return total / mass;
  });
};
const stackedCurves = (curves) => {
  const below = new Map();
  return curves.map((curve) => {
    const low = curve.x.map((x) => below.get(x) ?? 0), y = curve.y.map((v, i) => v + low[i]);
    curve.x.forEach((x, i) => below.set(x, y[i]));
    return { ...curve, low, y };
  });
};
// The curves as they are drawn: `line` is smoothed, `y` as recorded (or its sum with those below).
const drawn = (panel) => {
  const weight = Number($("smoothing").value);
  const curves = panel.stacked ? stackedCurves(panel.curves) : panel.curves;
  return curves.map((c) => ({ ...c, line: weight && !panel.stacked ? smoothed(c.y, weight) : c.y }));
};

const stepsOfPanel = (panel) =>
  unique(panel.curves.filter((c) => !c.reference).flatMap((c) => c.x)).sort((a, b) => a - b);
const rangeX = (panel) => {
  if (zoom) return zoom;
  const xs = stepsOfPanel(panel), low = xs[0] ?? 0, high = xs.at(-1) ?? 1;
  return high > low ? [low, high] : [low - 1, high + 1];
};
const inside = ([low, high]) => (x) => x >= low && x <= high;
const rangeY = (panel, curves, span) => {
  const isIn = inside(span);
  let values = curves.flatMap((c) => c.reference ? c.y : [
    ...c.y.filter((_, i) => isIn(c.x[i])), ...c.band.filter((b) => isIn(b[0])).flatMap((b) => [b[1], b[2]])]);
  if (isLog(panel)) {
    values = values.filter((v) => v > 0);
    if (!values.length) values = positive(panel);
    return [Math.min(...values) / 1.1, Math.max(...values) * 1.1];
  }
  if (!values.length) return [0, 1];
  let low = Math.min(...values), high = Math.max(...values);
  if (panel.zero) low = Math.min(0, low);
  if (high === low) [low, high] = [low - 0.5, high + 0.5];
  const room = 0.05 * (high - low);
  return [panel.zero && low === 0 ? 0 : low - room, panel.share && high <= 1 ? Math.min(1.02, high + room) : high + room];
};
const ticks = (low, high, count) => {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5].find((n) => n * power >= rough) ?? 10);
  const found = [];
  for (let k = Math.ceil(low / step); k * step <= high; k += 1) found.push(Number((k * step).toPrecision(12)));
  return found;
};
const logTicks = (low, high) => {
  const found = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e += 1) {
    for (const n of high / low > 300 ? [1] : [1, 2, 5]) found.push(Number((n * 10 ** e).toPrecision(3)));
  }
  return found.filter((v) => v >= low && v <= high);
};

const pathOf = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)},${y.toFixed(1)}`).join("");
const curveParts = (panel, curve, x, y, isIn) => {
  const look = `curve hue-${curve.color} dash-${curve.dash}`;
  if (curve.reference) {
    return [draw("path", { class: `curve hue-${curve.color} dash-1`, d: pathOf(rangeX(panel).map((s) => [x(s), y(curve.y.at(-1))])) })];
  }
  const keep = (_, i) => isIn(curve.x[i]) && (!isLog(panel) || curve.y[i] > 0);
  const points = (values) => values.map((v, i) => [x(curve.x[i]), y(v)]).filter(keep);
  if (panel.stacked) {
    const top = points(curve.y), bottom = points(curve.low).reverse();
    return [draw("path", { class: `area hue-${curve.color}`, d: `${pathOf([...top, ...bottom])}Z` })];
  }
  const parts = [];
  const band = curve.band.filter((b) => isIn(b[0]) && (!isLog(panel) || b[1] > 0));
  if (band.length > 1) {
    const edge = [...band.map((b) => [x(b[0]), y(b[2])]), ...band.map((b) => [x(b[0]), y(b[1])]).reverse()];
    parts.push(draw("path", { class: `band hue-${curve.color}`, d: `${pathOf(edge)}Z` }));
  }
  if (curve.line !== curve.y) parts.push(draw("path", { class: `${look} raw`, d: pathOf(points(curve.y)) }));
  parts.push(draw("path", { class: look, d: pathOf(points(curve.line)) }));
  if (points(curve.y).length <= 12) {
    parts.push(...points(curve.y).map(([cx, cy]) => draw("circle", { class: `dot hue-${curve.color}`, cx, cy, r: 3 })));
  }
  return parts;
};

const drawPanel = (panel) => {
  const width = Math.max(240, panel.box.clientWidth), span = rangeX(panel), isIn = inside(span);
  const curves = drawn(panel), [low, high] = rangeY(panel, curves, span);
  const right = width - MARGIN.right, floor = PLOT_HEIGHT - MARGIN.bottom;
  const x = (s) => MARGIN.left + (s - span[0]) / (span[1] - span[0]) * (right - MARGIN.left);
  const share = isLog(panel)
    ? (v) => Math.log(v / low) / Math.log(high / low) : (v) => (v - low) / (high - low);
  const y = (v) => floor - share(v) * (floor - MARGIN.top);
  const marks = isLog(panel) ? logTicks(low, high) : ticks(low, high, 4);
  panel.toStep = (px) => span[0] + (px - MARGIN.left) / (right - MARGIN.left) * (span[1] - span[0]);
  panel.toPixel = x;
  panel.svg.replaceChildren(
    draw("g", {}, marks.map((v) => draw("path", { class: "gridline", d: `M${MARGIN.left},${y(v)}H${right}` })),
      marks.map((v) => draw("text", { x: MARGIN.left - 6, y: y(v) + 4, "text-anchor": "end" }, tickText(panel, v))),
      ticks(span[0], span[1], Math.max(2, width / 90)).filter(Number.isInteger).map((v) =>
        draw("text", { x: x(v), y: floor + 17, "text-anchor": "middle" }, v))),
    draw("path", { class: "axis", d: `M${MARGIN.left},${floor}H${right}` }),
    ...curves.flatMap((c) => curveParts(panel, c, x, y, isIn)),
    panel.cursor);
  panel.svg.setAttribute("viewBox", `0 0 ${width} ${PLOT_HEIGHT}`);
  panel.svg.setAttribute("height", PLOT_HEIGHT);
  read(panel, panel.step);
};

// The values at a recorded step, in the key of the panel; of the last step while none is chosen.
const read = (panel, step) => {
  panel.step = step;
  const weight = Number($("smoothing").value), where = step ?? stepsOfPanel(panel).at(-1);
  panel.key.querySelector(".at").textContent = `step ${digits(where, 8)}`;
  panel.curves.forEach((curve, i) => {
    const at = curve.reference ? curve.x.length - 1 : curve.x.indexOf(where);
    const band = curve.band.find((b) => b[0] === where);
    const raw = at < 0 ? "–" : shownValue(panel, curve.y[at]);
    const range = band ? ` [${shownValue(panel, band[1])}, ${shownValue(panel, band[2])}]` : "";
    const soft = weight && at >= 0 && !curve.reference && !panel.stacked
      ? `, smoothed ${shownValue(panel, smoothed(curve.y, weight)[at])}` : "";
    panel.values[i].textContent = raw + range + soft;
  });
  panel.cursor.setAttribute("class", step === null ? "cursor none" : "cursor");
  if (step !== null) {
    const px = panel.toPixel(step);
    panel.cursor.setAttribute("d", `M${px},${MARGIN.top}V${PLOT_HEIGHT - MARGIN.bottom}`);
  }
};
const nearest = (panel, step) => {
  const here = stepsOfPanel(panel).filter(inside(rangeX(panel)));
  return here.length ? here.reduce((a, b) => (Math.abs(b - step) < Math.abs(a - step) ? b : a)) : null;
};
const drawAll = () => panels.forEach(drawPanel);
const zoomTo = (span) => {
  zoom = span && span[1] > span[0] ? span : null;
  $("zoom-reset").disabled = !zoom;
  for (const panel of panels) panel.step = null;
  drawAll();
};

// A drag over a plot chooses the steps that all plots show.
const pointing = (panel) => {
  const { svg } = panel;
  let start = null;
  const at = (event) => event.clientX - svg.getBoundingClientRect().left;
  svg.addEventListener("pointermove", (event) => {
    read(panel, nearest(panel, panel.toStep(at(event))));
    panel.svg.querySelector(".drag")?.remove();
    if (start === null) return;
    const [a, b] = [start, at(event)].sort((m, n) => m - n);
    svg.append(draw("rect", { class: "drag", x: a, y: MARGIN.top, width: b - a, height: PLOT_HEIGHT - MARGIN.top - MARGIN.bottom }));
  });
  svg.addEventListener("pointerleave", () => { if (start === null) read(panel, null); });
  svg.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    start = at(event);
    svg.setPointerCapture(event.pointerId);
  });
  svg.addEventListener("pointerup", (event) => {
    const end = at(event), from = start;
    start = null;
    svg.querySelector(".drag")?.remove();
    if (from !== null && Math.abs(end - from) > 6) zoomTo([from, end].map(panel.toStep).sort((a, b) => a - b));
  });
  svg.addEventListener("pointercancel", () => { start = null; svg.querySelector(".drag")?.remove(); });
  svg.addEventListener("dblclick", () => zoomTo(null));
};
const typing = (panel) => panel.box.addEventListener("keydown", (event) => {
  const xs = stepsOfPanel(panel).filter(inside(rangeX(panel)));
  const here = panel.step === null ? xs.length - 1 : xs.indexOf(panel.step), span = rangeX(panel);
  const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (move) read(panel, xs[Math.min(xs.length - 1, Math.max(0, panel.step === null ? here : here + move))]);
  else if (event.key === "+") {
    const centre = panel.step ?? mean(span), half = (span[1] - span[0]) / 4;
    zoomTo([centre - half, centre + half]);
  } else if (event.key === "-" || event.key === "Escape") zoomTo(null);
  else return;
  event.preventDefault();
});

const bodyOf = (panel, figure) => {
  panel.values = panel.curves.map((curve) => make("b", { "data-curve": curve.label }));
  panel.key = make("p", { class: "key", "aria-live": "off" }, make("span", { class: "at" }),
    panel.curves.map((curve, i) => make("span", {},
      make("i", { class: `swatch hue-${curve.color} dash-${curve.reference ? 1 : curve.dash}` }), `${curve.label} `, panel.values[i])));
  panel.cursor = draw("path", { class: "cursor none", d: "" });
  panel.svg = draw("svg", { class: "curves", "aria-hidden": "true" });
  panel.box = make("div", { class: "box", tabindex: "0", role: "group", "aria-label": panel.words }, panel.svg);
  panel.step = null;
  figure.querySelector(".words").remove();
  figure.append(panel.key, panel.box);
  pointing(panel);
  typing(panel);
  new ResizeObserver(() => drawPanel(panel)).observe(panel.box);
};
document.querySelectorAll("figure[data-panel]").forEach((figure, i) => bodyOf(panels[i], figure));
$("smoothing").addEventListener("input", () => {
  $("smoothing-value").textContent = $("smoothing").value;
  drawAll();
});
$("log-axis").addEventListener("input", drawAll);
$("zoom-reset").addEventListener("click", () => zoomTo(null));
$("curve-controls").hidden = false;
lasting.zoom = { save: () => zoom, restore: zoomTo };
drawAll();

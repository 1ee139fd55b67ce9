// The entropy–KL map: density, marginal counts, a player over the steps, cells that lead to tokens.
const WIDTH = 640, HEIGHT = 480, LEFT = 52, BOTTOM = 44, TOP = 72, RIGHT = 84, BINS = 32;
const NICE = [0, 0.1, 0.5, 1, 2, 4, 6, 8, 10, 15, 20, 30];
const MAX_LISTED = 40;
// Square-root axes: most tokens lie near zero, and that is where the eye has to tell them apart.
const scales = (xMax, yMax) => ({
  x: (v) => LEFT + Math.sqrt(Math.max(v, 0) / xMax) * (WIDTH - LEFT - RIGHT),
  y: (v) => HEIGHT - BOTTOM - Math.sqrt(Math.max(v, 0) / yMax) * (HEIGHT - BOTTOM - TOP),
});
const frame = (xMax, yMax, xLabel, yLabel, words, role = "img") => {
  const { x, y } = scales(xMax, yMax);
  return draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role, "aria-label": words, class: "plot" },
    draw("path", { class: "axis", d: `M${LEFT},${TOP}V${HEIGHT - BOTTOM}H${WIDTH - RIGHT}` }),
    NICE.filter((v) => v <= xMax).map((v) =>
      draw("text", { x: x(v), y: HEIGHT - BOTTOM + 16, "text-anchor": "middle" }, v)),
    NICE.filter((v) => v <= yMax).map((v) =>
      draw("text", { x: LEFT - 8, y: y(v) + 4, "text-anchor": "end" }, v)),
    draw("text", { x: (WIDTH - RIGHT + LEFT) / 2, y: HEIGHT - 6, "text-anchor": "middle" }, xLabel),
    draw("text", { transform: `translate(13 ${(HEIGHT - BOTTOM + TOP) / 2}) rotate(-90)`, "text-anchor": "middle" }, yLabel));
};
const highest = (columns) =>
  Math.max(1e-3, ...data.completions.flatMap((c) =>
    columns.map((column) => c[column].reduce((a, b) => Math.max(a, b ?? 0), 0))));
const mapEnds = [highest(["entropy"]), highest(["reverse_kl"])];
const binOf = (v, max) => Math.min(BINS - 1, Math.floor(Math.sqrt(Math.max(v, 0) / max) * BINS));
const edge = (i, max) => max * (i / BINS) ** 2;
let openCell = null;

const cellsOf = (rows) => {
  const cells = new Map();
  for (const row of rows) {
    const [i, j] = [binOf(row.entropy, mapEnds[0]), binOf(row.reverse_kl, mapEnds[1])];
    const key = i * BINS + j;
    if (!cells.has(key)) cells.set(key, { i, j, rows: [] });
    cells.get(key).rows.push(row);
  }
  return [...cells.values()].sort((a, b) => b.rows.length - a.rows.length);
};
const rangeWords = ({ i, j }) => {
  const [h, kl] = [[i, 0], [j, 1]].map(([k, axis]) =>
    `${digits(edge(k, mapEnds[axis]), 2)} to ${digits(edge(k + 1, mapEnds[axis]), 2)}`);
  return `entropy ${h} nats, reverse KL ${kl} nats`;
};
const counted = (n) => (n === 1 ? "1 token" : `${n} tokens`);
const cellElement = (cell, x, y, most) => {
  const [xMax, yMax] = mapEnds, { i, j } = cell;
  return draw("rect", {
    class: "bin", x: x(edge(i, xMax)), y: y(edge(j + 1, yMax)), role: "button", tabindex: "-1",
    width: x(edge(i + 1, xMax)) - x(edge(i, xMax)), height: y(edge(j, yMax)) - y(edge(j + 1, yMax)),
    "fill-opacity": 0.15 + 0.85 * Math.log1p(cell.rows.length) / most, "data-i": i, "data-j": j,
    "aria-label": `${counted(cell.rows.length)}: ${rangeWords(cell)}`,
  }, draw("title", {}, `${counted(cell.rows.length)}: ${rangeWords(cell)}`));
};
// Counts along both axes, as logarithms: a bar of one token is seen beside one of a thousand.
const marginals = (cells, x, y) => {
  const total = (axis, k) => sum(cells.filter((c) => c[axis] === k).map((c) => c.rows.length));
  const parts = [];
  for (const [axis, room] of [["i", TOP - 12], ["j", RIGHT - 12]]) {
    const counts = Array.from({ length: BINS }, (_, k) => total(axis, k)), most = Math.log1p(Math.max(...counts));
    counts.forEach((count, k) => {
      if (!count) return;
      const size = room * Math.log1p(count) / most, max = mapEnds[axis === "i" ? 0 : 1];
      const across = axis === "i"
        ? { x: x(edge(k, max)), y: TOP - 4 - size, width: x(edge(k + 1, max)) - x(edge(k, max)) - 0.5, height: size }
        : { x: WIDTH - RIGHT + 4, y: y(edge(k + 1, max)), width: size, height: y(edge(k, max)) - y(edge(k + 1, max)) - 0.5 };
      parts.push(draw("rect", { class: `marginal ${axis}`, ...across }, draw("title", {}, counted(count))));
    });
  }
  return parts;
};
const corners = (cuts, x, y) => {
  const [cx, cy] = [x(Math.min(cuts[0], mapEnds[0])), y(Math.min(cuts[1], mapEnds[1]))];
  const places = { 1: [WIDTH - RIGHT - 4, TOP + 14, "end"], 2: [WIDTH - RIGHT - 4, HEIGHT - BOTTOM - 6, "end"],
    3: [LEFT + 6, TOP + 14, "start"], 4: [LEFT + 6, HEIGHT - BOTTOM - 6, "start"] };
  return [
    draw("path", { class: "cut", d: `M${cx},${TOP}V${HEIGHT - BOTTOM}M${LEFT},${cy}H${WIDTH - RIGHT}` }),
    ...Object.entries(places).map(([q, [px, py, anchor]]) =>
      draw("text", { x: px, y: py, "text-anchor": anchor, class: "corner" }, QUADRANTS[q])),
  ];
};

const map = () => {
  const step = steps[Number($("map-step").value)], kind = $("map-kind").value;
  const rows = rowsOf(step, kind), cuts = cutsOf(rows, $("map-cut").value);
  const parts = quadrantTable(rows, cuts);
  $("map-step-value").textContent = `step ${step}`;
  $("map-step").setAttribute("aria-valuetext", `step ${step}`);
  if (!rows.length) {
    $("map-plot").replaceChildren(make("p", {}, `No ${kind} tokens were recorded at step ${step}.`));
    $("map-table").replaceChildren();
    $("map-cell").replaceChildren();
    return;
  }
  const { x, y } = scales(...mapEnds);
  const cells = cellsOf(rows), most = Math.log1p(cells[0].rows.length);
  const words = `Density of ${rows.length} ${kind} tokens at step ${step} over student entropy and ` +
    `reverse KL. ` + parts.map((p) => `${QUADRANTS[p.quadrant]}: ${percent(p.share)}`).join(", ");
  const svg = frame(...mapEnds, "student entropy, nats", "reverse KL, nats", words, "group");
  svg.append(...cells.map((cell) => cellElement(cell, x, y, most)), ...marginals(cells, x, y), ...corners(cuts, x, y));
  svg.querySelector(".bin").setAttribute("tabindex", "0");
  $("map-plot").replaceChildren(svg);
  $("map-plot").cells = cells;
  listCell(openCell);
  $("map-table").replaceChildren(table(
    `Quadrants at step ${step}: thresholds ${nats(cuts[0])} nats of entropy and ${nats(cuts[1])} nats of reverse KL`,
    ["quadrant", "tokens", "share", "KL mass"],
    parts.map((p) => [quadrantName(p.quadrant), p.rows.length, percent(p.share), percent(p.mass)])));
};

// The tokens of a cell, each with those before it; a choice opens the token viewer at it.
const listCell = (place) => {
  openCell = place;
  const cell = place && $("map-plot").cells.find((c) => c.i === place.i && c.j === place.j);
  for (const rect of $("map-plot").querySelectorAll(".bin")) {
    rect.classList.toggle("chosen", Boolean(cell) && Number(rect.dataset.i) === cell.i && Number(rect.dataset.j) === cell.j);
  }
  if (!cell) {
    $("map-cell").replaceChildren(make("p", { class: "caption" }, "Choose a cell to list its tokens."));
    return;
  }
  const ordered = [...cell.rows].sort((a, b) => b.reverse_kl - a.reverse_kl), listed = ordered.slice(0, MAX_LISTED);
  $("map-cell").replaceChildren(
    make("h3", {}, `${counted(ordered.length)}: ${rangeWords(cell)}`),
    make("ul", { class: "cell-tokens" }, listed.map((row) => {
      const before = row.completion.token.slice(Math.max(0, row.index - 6), row.index).map(textOf).join("");
      const button = make("button", { type: "button" }, make("span", {}, shown(before)), make("b", {}, shown(textOf(row.token))),
        make("span", { class: "about" }, ` KL ${digits(row.reverse_kl, 3)}`));
      button.addEventListener("click", () => { open($("tab-viewer")); goToToken(row); });
      return make("li", {}, button);
    })),
    ordered.length > listed.length ? make("p", { class: "caption" }, `${ordered.length - listed.length} more are not listed.`) : "");
};
const cellAt = (element) => ({ i: Number(element.dataset.i), j: Number(element.dataset.j) });
const MOVES = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
const moveOnMap = (event) => {
  const from = event.target.closest(".bin");
  if (!from) return;
  if (event.key === "Enter" || event.key === " ") listCell(cellAt(from));
  else if (event.key in MOVES) {
    const [di, dj] = MOVES[event.key], { i, j } = cellAt(from);
    const ahead = (c) => (c.i - i) * di + (c.j - j) * dj, aside = (c) => Math.abs((c.i - i) * dj) + Math.abs((c.j - j) * di);
    const [next] = $("map-plot").cells.filter((c) => ahead(c) > 0).sort((a, b) => ahead(a) + 2 * aside(a) - ahead(b) - 2 * aside(b));
    if (next) $("map-plot").querySelector(`.bin[data-i="${next.i}"][data-j="${next.j}"]`).focus();
  } else return;
  event.preventDefault();
};
$("map-plot").addEventListener("keydown", moveOnMap);
$("map-plot").addEventListener("click", (event) => {
  const cell = event.target.closest(".bin");
  if (cell) listCell(cellAt(cell));
});

let playing = null;
const pause = () => {
  clearInterval(playing);
  playing = null;
  $("map-play").textContent = "Play";
};
const showNext = () => {
  $("map-step").value = Number($("map-step").value) + 1;
  map();
  if (Number($("map-step").value) >= steps.length - 1) pause();
};
$("map-play").addEventListener("click", () => {
  if (playing) return pause();
  if (Number($("map-step").value) >= steps.length - 1) $("map-step").value = -1;
  $("map-play").textContent = "Pause";
  playing = setInterval(showNext, 900);
  showNext();
});
$("map-step").max = steps.length - 1;
$("map-play").hidden = steps.length < 2;
control("map", map, { "map-kind": kindOptions, "map-cut": cutOptions });
lasting.cell = { save: () => openCell, restore: (cell) => { openCell = cell; } };

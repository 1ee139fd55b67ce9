"use strict";
// Draws the views of the page from the recorded tokens. Whatever a model wrote reaches the page as
// a text node only: `make` is the one place where elements are created.
(() => {
const data = JSON.parse(document.getElementById("tokens").textContent);
const SVG = "http://www.w3.org/2000/svg";
const QUADRANTS = {
  1: "high entropy, high KL", 2: "high entropy, low KL",
  3: "low entropy, high KL", 4: "low entropy, low KL",
};
const COLUMNS = {
  entropy: "student entropy", reverse_kl: "reverse KL", forward_kl: "forward KL",
  teacher_entropy: "teacher entropy",
};
const $ = (id) => document.getElementById(id);

// --- small tools -------------------------------------------------------------------------------

const append = (element, children) => {
  for (const child of children.flat()) {
    element.append(typeof child === "number" ? String(child) : child);
  }
  return element;
};
const make = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return append(element, children);
};
const draw = (tag, attributes = {}, ...children) => {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return append(element, children);
};
const sum = (values) => values.reduce((a, b) => a + b, 0);
const mean = (values) => (values.length ? sum(values) / values.length : null);
const nats = (x) => (x === null || x === undefined ? "–" : Number(x.toPrecision(4)).toString());
const percent = (x) => (x === null ? "–" : `${(100 * x).toFixed(1)} %`);
const gateOf = (x) => (x === 1 ? "open" : x === 0 ? "closed" : nats(x));
const unique = (values) => [...new Set(values)];
const shown = (text) => text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥") || "∅";
const textOf = (id) => data.texts[id] ?? `id ${id}`;
const options = (select, pairs) => {
  const before = select.value;
  select.replaceChildren(...pairs.map(([value, label]) => make("option", { value }, label)));
  if (pairs.some(([value]) => String(value) === before)) select.value = before;
};
const table = (caption, head, rows) =>
  make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    make("table", {}, make("caption", {}, caption),
      make("thead", {}, make("tr", {}, head.map((cell, i) => (cell
        ? make("th", { scope: "col", class: i && cell !== "tokens kept" ? "num" : "" }, cell)
        : make("td"))))),
      make("tbody", {}, rows.map((row) => make("tr", {}, row.map((cell, i) => {
        if (cell instanceof Element && cell.localName === "td") return cell;
        return i ? make("td", { class: "num" }, cell) : make("th", { scope: "row" }, cell);
      }))))));

// --- the recorded tokens -----------------------------------------------------------------------

const steps = unique(data.completions.map((c) => c.step)).sort((a, b) => a - b);
const kinds = unique(data.completions.map((c) => c.kind));
// Runs with rules of their own may stand on one page: what is compared is known of every completion.
const rulesOf = (step, kind) => {
  const here = data.completions.filter((c) => c.step === step && c.kind === kind);
  return here.length ? Object.keys(here[0].rank).filter((rule) => here.every((c) => rule in c.rank)) : [];
};
for (const completion of data.completions) {
  completion.keptSets = Object.fromEntries(
    Object.entries(completion.kept).map(([rule, rows]) => [rule, new Set(rows)]));
}
const isWhole = (row) => row.entropy !== null && row.reverse_kl !== null;
const rowsOf = (step, kind) =>
  data.completions
    .filter((c) => c.step === step && c.kind === kind)
    .flatMap((completion) => completion.token.map((token, index) => ({
      completion, index, token,
      entropy: completion.entropy[index], reverse_kl: completion.reverse_kl[index],
      forward_kl: completion.forward_kl[index], gate: completion.gate[index],
      teacher_entropy: completion.teacher_entropy[index],
    })))
    .filter(isWhole);
const median = (values) => {
  const ordered = [...values].sort((a, b) => a - b);
  if (!ordered.length) return 0;
  const where = (ordered.length - 1) / 2, low = Math.floor(where);
  return ordered[low] + (where - low) * ((ordered[low + 1] ?? ordered[low]) - ordered[low]);
};
const cutsOf = (rows, how) =>
  how === "median"
    ? [median(rows.map((r) => r.entropy)), median(rows.map((r) => r.reverse_kl))]
    : data.cuts;
const quadrantOf = (entropy, divergence, cuts) =>
  entropy === null || divergence === null
    ? 0 : 4 - 2 * Number(entropy > cuts[0]) - Number(divergence > cuts[1]);
const isKept = (row, rule) => row.completion.keptSets[rule].has(row.index);
const quadrantTable = (rows, cuts) => {
  const mass = sum(rows.map((r) => r.reverse_kl));
  return [1, 2, 3, 4].map((q) => {
    const here = rows.filter((r) => quadrantOf(r.entropy, r.reverse_kl, cuts) === q);
    return {
      quadrant: q, rows: here, share: rows.length ? here.length / rows.length : 0,
      mass: mass > 0 ? sum(here.map((r) => r.reverse_kl)) / mass : 0,
    };
  });
};
const keptShare = (rows, rule) =>
  rows.length ? rows.filter((r) => isKept(r, rule)).length / rows.length : null;

// --- plots -------------------------------------------------------------------------------------

const WIDTH = 560, HEIGHT = 400, LEFT = 52, BOTTOM = 44, TOP = 12, RIGHT = 12;
const NICE = [0, 0.1, 0.5, 1, 2, 4, 6, 8, 10, 15, 20, 30];
// Square-root axes: most tokens lie near zero, and that is where the eye has to tell them apart.
const scales = (xMax, yMax) => ({
  x: (v) => LEFT + Math.sqrt(Math.max(v, 0) / xMax) * (WIDTH - LEFT - RIGHT),
  y: (v) => HEIGHT - BOTTOM - Math.sqrt(Math.max(v, 0) / yMax) * (HEIGHT - BOTTOM - TOP),
});
const frame = (xMax, yMax, xLabel, yLabel, words) => {
  const { x, y } = scales(xMax, yMax);
  return draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": words, class: "plot" },
    draw("path", { class: "axis", d: `M${LEFT},${TOP}V${HEIGHT - BOTTOM}H${WIDTH - RIGHT}` }),
    NICE.filter((v) => v <= xMax).map((v) =>
      draw("text", { x: x(v), y: HEIGHT - BOTTOM + 16, "text-anchor": "middle" }, v)),
    NICE.filter((v) => v <= yMax).map((v) =>
      draw("text", { x: LEFT - 8, y: y(v) + 4, "text-anchor": "end" }, v)),
    draw("text", { x: (WIDTH + LEFT) / 2, y: HEIGHT - 6, "text-anchor": "middle" }, xLabel),
    draw("text", { transform: `translate(13 ${HEIGHT / 2}) rotate(-90)`, "text-anchor": "middle" }, yLabel));
};
const highest = (columns) =>
  Math.max(1e-3, ...data.completions.flatMap((c) =>
    columns.map((column) => c[column].reduce((a, b) => Math.max(a, b ?? 0), 0))));

// --- Entropy–KL map -------------------------------------------------------------------------------------

const BINS = 32;
const entropyMax = highest(["entropy", "teacher_entropy"]), divergenceMax = highest(["reverse_kl"]);

const map = () => {
  const step = steps[Number($("map-step").value)], kind = $("map-kind").value;
  const rows = rowsOf(step, kind), cuts = cutsOf(rows, $("map-cut").value);
  const parts = quadrantTable(rows, cuts);
  $("map-step-value").textContent = `step ${step}`;
  $("map-step").setAttribute("aria-valuetext", `step ${step}`);
  if (!rows.length) {
    $("map-plot").replaceChildren(make("p", {}, `No ${kind} tokens were recorded at step ${step}.`));
    $("map-table").replaceChildren();
    return;
  }
  const xMax = highest(["entropy"]);
  const { x, y } = scales(xMax, divergenceMax);
  const words = `Density of ${rows.length} ${kind} tokens at step ${step} over student entropy and ` +
    `reverse KL. ` + parts.map((p) => `Q${p.quadrant} ${percent(p.share)}`).join(", ");
  const svg = frame(xMax, divergenceMax, "student entropy h, nats", "reverse KL δ, nats", words);
  const counts = new Map();
  const bin = (v, max) => Math.min(BINS - 1, Math.floor(Math.sqrt(Math.max(v, 0) / max) * BINS));
  for (const row of rows) {
    const key = bin(row.entropy, xMax) * BINS + bin(row.reverse_kl, divergenceMax);
    counts.set(key, (counts.get(key) ?? 0) + 1);
  }
  const most = Math.log1p(Math.max(...counts.values()));
  const w = (WIDTH - LEFT - RIGHT) / BINS, h = (HEIGHT - BOTTOM - TOP) / BINS;
  for (const [key, count] of counts) {
    const i = Math.floor(key / BINS), j = key % BINS;
    svg.append(draw("rect", {
      class: "bin", x: LEFT + i * w, y: HEIGHT - BOTTOM - (j + 1) * h, width: w, height: h,
      "fill-opacity": 0.15 + 0.85 * Math.log1p(count) / most,
    }, draw("title", {}, `${count} tokens`)));
  }
  const [cx, cy] = [x(Math.min(cuts[0], xMax)), y(Math.min(cuts[1], divergenceMax))];
  svg.append(draw("path", { class: "cut", d: `M${cx},${TOP}V${HEIGHT - BOTTOM}M${LEFT},${cy}H${WIDTH - RIGHT}` }));
  const places = { 1: [WIDTH - RIGHT - 4, TOP + 14, "end"], 2: [WIDTH - RIGHT - 4, HEIGHT - BOTTOM - 6, "end"],
    3: [LEFT + 6, TOP + 14, "start"], 4: [LEFT + 6, HEIGHT - BOTTOM - 6, "start"] };
  for (const [q, [px, py, anchor]] of Object.entries(places)) {
    svg.append(draw("text", { x: px, y: py, "text-anchor": anchor, class: "corner" }, `Q${q} ${QUADRANTS[q]}`));
  }
  $("map-plot").replaceChildren(svg);
  $("map-table").replaceChildren(table(
    `Quadrants at step ${step}: thresholds ${nats(cuts[0])} nats of entropy and ${nats(cuts[1])} nats of reverse KL`,
    ["quadrant", "tokens", "share", "KL mass"],
    parts.map((p) => [`Q${p.quadrant} ${QUADRANTS[p.quadrant]}`, p.rows.length, percent(p.share), percent(p.mass)])));
};

// --- Token viewer --------------------------------------------------------------------------------

const keyOf = (c) => `${c.kind} · ${c.prompt_id} · sample ${c.sample}`;
const texts = unique(data.completions.map(keyOf));
let chosen = null;

const stepsOf = (key) => data.completions.filter((c) => keyOf(c) === key).map((c) => c.step);
const completionAt = (key, step) => data.completions.find((c) => keyOf(c) === key && c.step === step);

// Beside a completion stand those of the same prompt: at other steps, and of other runs.
const viewerSteps = () => {
  const key = texts[Number($("text").value)], here = stepsOf(key);
  options($("text-step"), here.map((s) => [s, `step ${s}`]));
  const main = completionAt(key, here[0]);
  const others = [...data.completions.entries()].filter(([, c]) =>
    c.prompt_id === main.prompt_id && c.sample === main.sample && c.prompt === main.prompt);
  options($("text-other"), [["", "nothing"], ...others.map(([i, c]) =>
    [i, c.kind === main.kind ? `step ${c.step}` : `${c.kind}, step ${c.step}`])]);
  options($("text-rule"), Object.keys(main.rank).map((rule) => [rule, rule]));
};

const levelOf = (completion, index, colour, rule) => {
  if (colour === "gate") return completion.gate[index] ?? 0;
  if (colour === "rank" && !(rule in completion.rank)) return 0;
  if (colour === "rank") return 1 - (completion.rank[rule][index] - 1) / Math.max(1, completion.num_tokens - 1);
  const max = colour.includes("entropy") ? entropyMax : Math.max(divergenceMax, 1e-3);
  return Math.min(1, Math.sqrt(Math.max(completion[colour][index] ?? 0, 0) / max));
};

const reading = (completion, side) => {
  const rule = $("text-rule").value, colour = $("text-colour").value, wanted = $("text-filter").value;
  const cuts = cutsOf(rowsOf(completion.step, completion.kind), $("text-cut").value);
  const group = make("div", { class: "tokens", role: "group", "aria-label": `completion at step ${completion.step}` });
  completion.token.forEach((id, index) => {
    const q = quadrantOf(completion.entropy[index], completion.reverse_kl[index], cuts);
    const kept = completion.keptSets[rule]?.has(index) ?? false, text = textOf(id);
    const isOff = wanted && (wanted === "kept" ? !kept : String(q) !== wanted);
    const names = ["token", kept ? "kept" : "", isOff ? "off" : colour === "quadrant" ? `q${q}` : "scaled"];
    const button = make("button", {
      type: "button", class: names.join(" "), tabindex: "-1", "aria-pressed": "false",
      "aria-label": `${shown(text)}, position ${index}, ${q ? `Q${q} ${QUADRANTS[q]}` : "no quadrant"}, ` +
        `${kept ? "kept" : "not kept"} by ${rule}`,
      "data-side": side, "data-index": index,
    }, shown(text));
    if (!isOff && colour !== "quadrant") button.style.setProperty("--level", levelOf(completion, index, colour, rule));
    group.append(button);
    if (text.includes("\n")) group.append(make("br"));
  });
  const hidden = completion.num_tokens - completion.token.length;
  const title = kinds.length > 2 ? `${completion.kind}, step ${completion.step}` : `Step ${completion.step}`;
  return make("div", { class: "reading" }, make("h3", {}, title), group,
    hidden > 0 ? make("p", { class: "caption" }, `${hidden} more tokens were not recorded.`) : "");
};

const viewer = () => {
  const key = texts[Number($("text").value)];
  const main = completionAt(key, Number($("text-step").value));
  const other = $("text-other").value === "" ? null : data.completions[Number($("text-other").value)];
  const shownNow = other && other !== main ? [main, other] : [main];
  $("prompt").textContent = main.prompt;
  $("readings").replaceChildren(...shownNow.map((c, side) => reading(c, side)));
  $("legend").hidden = $("text-colour").value !== "quadrant";
  $("scale-legend").hidden = $("text-colour").value === "quadrant";
  $("readings").completions = shownNow;
  const index = chosen && chosen.index < main.token.length ? chosen.index : 0;
  choose(0, index);
};

const choose = (side, index) => {
  const completion = $("readings").completions[side];
  for (const button of $("readings").querySelectorAll("button.token")) {
    const is = Number(button.dataset.side) === side && Number(button.dataset.index) === index;
    button.setAttribute("aria-pressed", String(is));
    button.tabIndex = is ? 0 : -1;
  }
  chosen = { side, index };
  if (index < completion.token.length) $("detail").replaceChildren(...detail(completion, index));
};

const candidates = (who, completion, index) => {
  const ids = completion[`${who}_top`][index], shares = completion[`${who}_share`][index];
  const rows = ids.map((id, i) => {
    const bar = make("span", { class: "bar" });
    bar.style.setProperty("--share", shares[i] ?? 0);
    const isSampled = id === completion.token[index];
    return [isSampled ? `${shown(textOf(id))} (sampled)` : shown(textOf(id)), nats(shares[i]),
      make("td", { class: "bars" }, bar)];
  });
  return table(`The ${who}'s five likeliest tokens`, ["token", "probability", ""], rows);
};

const detail = (completion, index) => {
  const cuts = cutsOf(rowsOf(completion.step, completion.kind), $("text-cut").value);
  const q = quadrantOf(completion.entropy[index], completion.reverse_kl[index], cuts);
  const facts = [
    ...Object.entries(COLUMNS).map(([name, label]) => [label, `${nats(completion[name][index])} nats`, name]),
    ["student log-prob", nats(completion.log_p[index]), "log_p"],
    ["teacher log-prob", nats(completion.log_q[index]), "log_q"],
    ["EOPD gate", gateOf(completion.gate[index]), "gate"],
  ];
  return [
    make("h3", {}, `“${shown(textOf(completion.token[index]))}”`),
    make("p", {}, `Step ${completion.step}, position ${index}. ${q ? `Q${q}, ${QUADRANTS[q]}.` : "In no quadrant."}`),
    make("dl", { class: "facts small" }, facts.map(([label, value, name]) =>
      make("div", {}, make("dt", {}, label), make("dd", { "data-name": name }, value)))),
    make("div", { class: "pair" }, candidates("student", completion, index), candidates("teacher", completion, index)),
    table(`Rank among ${completion.num_tokens} tokens`, ["rule", "rank", "kept"],
      Object.keys(completion.rank).map((rule) => [rule, completion.rank[rule][index],
        completion.keptSets[rule].has(index) ? "yes" : "no"])),
  ];
};

const focusToken = (side, index) =>
  $("readings").querySelector(`button[data-side="${side}"][data-index="${index}"]`)?.focus();

// Q3 tokens by falling reverse KL, the next at every press.
let jump = 0;
const jumpToNextQ3 = () => {
  const how = $("text-cut").value, found = [];
  for (const step of steps) {
    for (const kind of kinds) {
      const rows = rowsOf(step, kind), cuts = cutsOf(rows, how);
      found.push(...rows.filter((r) => quadrantOf(r.entropy, r.reverse_kl, cuts) === 3));
    }
  }
  found.sort((a, b) => b.reverse_kl - a.reverse_kl);
  if (!found.length) {
    $("jump-result").textContent = "No token has low entropy and high KL at these thresholds.";
    return;
  }
  const row = found[jump % found.length];
  $("jump-result").textContent = `${(jump % found.length) + 1} of ${found.length}`;
  jump += 1;
  $("text").value = texts.indexOf(keyOf(row.completion));
  viewerSteps();
  $("text-step").value = row.completion.step;
  $("text-other").value = "";
  viewer();
  focusToken(0, row.index);
};

// --- Rules -------------------------------------------------------------------------------------

const jaccard = (rows, a, b) => {
  const either = rows.filter((r) => isKept(r, a) || isKept(r, b));
  return either.length ? either.filter((r) => isKept(r, a) && isKept(r, b)).length / either.length : null;
};
const shaded = (value) => {
  const cell = make("td", { class: "num shaded" }, value === null ? "–" : value.toFixed(2));
  cell.style.setProperty("--level", value ?? 0);
  return cell;
};
const mostKept = (rows, rule) => {
  const counts = new Map();
  for (const row of rows) {
    const [all, kept] = counts.get(row.token) ?? [0, 0];
    counts.set(row.token, [all + 1, kept + Number(isKept(row, rule))]);
  }
  return [...counts].filter(([, [, kept]]) => kept).sort((a, b) => b[1][1] - a[1][1]).slice(0, 8)
    .map(([id, [all, kept]]) => `${shown(textOf(id))} ${kept}/${all}`);
};

const rulesView = () => {
  const step = Number($("rules-step").value), kind = $("rules-kind").value;
  const rows = rowsOf(step, kind), cuts = cutsOf(rows, $("rules-cut").value);
  const parts = quadrantTable(rows, cuts), rules = rulesOf(step, kind);
  if (!rows.length) {
    $("rules-tables").replaceChildren(make("p", {}, `No ${kind} tokens were recorded at step ${step}.`));
    return;
  }
  $("rules-tables").replaceChildren(
    table("Overlap of what two rules keep: 1 is the same tokens, 0 none in common (Jaccard index)",
      ["", ...rules], rules.map((a) => [a, ...rules.map((b) => shaded(jaccard(rows, a, b)))])),
    table("Share of each quadrant that a rule keeps",
      ["quadrant", "tokens", ...rules],
      parts.map((p) => [`Q${p.quadrant} ${QUADRANTS[p.quadrant]}`, percent(p.share),
        ...rules.map((rule) => shaded(keptShare(p.rows, rule)))])),
    table("Tokens kept most often: kept of all occurrences", ["rule", "tokens kept"],
      rules.map((rule) => [rule, make("td", { class: "most-kept" },
        mostKept(rows, rule).map((text) => make("span", {}, text)))])));
};

// --- EOPD --------------------------------------------------------------------------------------

const MAX_POINTS = 1500;
const gateView = () => {
  const step = Number($("gate-step").value), kind = $("gate-kind").value, rows = rowsOf(step, kind);
  const summary = steps.map((s) => [s, rowsOf(s, kind)]).filter(([, all]) => all.length).map(([s, all]) => {
    const open = all.filter((r) => r.gate >= 0.5), closed = all.filter((r) => r.gate < 0.5);
    return [`step ${s}`, percent(mean(all.map((r) => r.gate))), nats(mean(open.map((r) => r.forward_kl))),
      nats(mean(closed.map((r) => r.forward_kl))), nats(mean(open.map((r) => r.entropy))),
      nats(mean(open.map((r) => r.teacher_entropy)))];
  });
  const { x, y } = scales(entropyMax, entropyMax);
  const svg = frame(entropyMax, entropyMax, "teacher entropy H(q), nats", "student entropy H(p), nats",
    `Student against teacher entropy of ${rows.length} ${kind} tokens at step ${step}.`);
  svg.append(draw("path", { class: "cut", d: `M${x(0)},${y(0)}L${x(entropyMax)},${y(entropyMax)}` }));
  const every = Math.ceil(rows.length / MAX_POINTS) || 1;
  for (const row of rows.filter((_, i) => i % every === 0)) {
    const [px, py] = [x(row.teacher_entropy), y(row.entropy)];
    svg.append(row.gate >= 0.5
      ? draw("path", { class: "open", d: `M${px},${py - 4.5}l4.5,8h-9z` })
      : draw("circle", { class: "closed", cx: px, cy: py, r: 2.5 }));
  }
  $("gate-plot").replaceChildren(svg);
  $("gate-table").replaceChildren(table("Mean over the recorded tokens; entropies and KL in nats",
    ["", "EOPD gate: open", "forward KL, open", "forward KL, closed", "student entropy, open", "teacher entropy, open"], summary));
};

const drawViews = { map, viewer, rules: rulesView, gate: gateView };
const kindOptions = kinds.map((kind) => [kind, `${kind} completions`]);
const stepOptions = steps.map((s) => [s, `step ${s}`]);
for (const id of ["map-kind", "rules-kind", "gate-kind"].filter($)) options($(id), kindOptions);
for (const id of ["rules-step", "gate-step"].filter($)) options($(id), stepOptions);
for (const id of ["map-cut", "text-cut", "rules-cut"]) {
  options($(id), [["fixed", `${data.cuts[0]} and ${data.cuts[1]} nats`], ["median", "medians of the step"]]);
  $(id).value = data.is_median ? "median" : "fixed";
}
options($("text"), texts.map((key, i) => [i, key]));
// A completion to look at: the longest of the first snapshot.
const opening = data.completions.filter((c) => c.step === steps[0])
  .reduce((a, b) => (b.token.length > a.token.length ? b : a));
$("text").value = texts.indexOf(keyOf(opening));
options($("text-colour"), [["quadrant", "quadrant"], ...Object.entries(COLUMNS), ["rank", "rank under the rule"], ["gate", "EOPD gate"]]);
options($("text-filter"), [["", "all tokens"], ["kept", "kept tokens"], ...[1, 2, 3, 4].map((q) => [q, `Q${q} ${QUADRANTS[q]}`])]);
$("map-step").max = steps.length - 1;
viewerSteps();

for (const [view, run] of Object.entries(drawViews)) {
  for (const control of document.querySelectorAll(`[data-for="${view}"]`)) control.addEventListener("input", run);
}
$("text").addEventListener("input", () => { viewerSteps(); viewer(); });
$("jump").addEventListener("click", jumpToNextQ3);
$("text-cut").addEventListener("input", () => { jump = 0; });
$("readings").addEventListener("focusin", (event) => {
  const button = event.target.closest("button.token");
  if (button) choose(Number(button.dataset.side), Number(button.dataset.index));
});
$("readings").addEventListener("click", (event) => event.target.closest("button.token")?.focus());
$("readings").addEventListener("keydown", (event) => {
  const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!move) return;
  event.preventDefault();
  focusToken(chosen.side, chosen.index + move);
});
Object.assign(views, drawViews);
})();

// The token viewer: completions as prose, a strip of their KL, and the way from token to token.
const keyOf = (c) => `${c.kind} · ${c.prompt_id} · sample ${c.sample}`;
const meanKL = (c) => mean(c.reverse_kl.filter((v) => v !== null)) ?? 0;
const versionsOf = new Map();
for (const c of data.completions) versionsOf.set(keyOf(c), [...(versionsOf.get(keyOf(c)) ?? []), c]);
for (const list of versionsOf.values()) list.sort((a, b) => a.step - b.step);
// Those with the highest mean KL at any step come first.
const texts = [...versionsOf.keys()].sort((a, b) =>
  Math.max(...versionsOf.get(b).map(meanKL)) - Math.max(...versionsOf.get(a).map(meanKL)));
const highestKL = Math.max(1e-3, ...data.completions.flatMap((c) =>
  [c.reverse_kl.reduce((a, b) => Math.max(a, b ?? 0), 0)]));
const highestEntropy = Math.max(1e-3, ...data.completions.flatMap((c) =>
  ["entropy", "teacher_entropy"].map((name) => c[name].reduce((a, b) => Math.max(a, b ?? 0), 0))));
let chosen = { text: 0, side: 0, index: 0 };

const preview = (text) => {
  const line = text.trim().replace(/\s+/g, " ");
  return line.length > 90 ? `${line.slice(0, 40)} … ${line.slice(-45)}` : line || "empty prompt";
};
const listTexts = () => $("texts").replaceChildren(...texts.map((key, i) => {
  const found = versionsOf.get(key), kls = found.map(meanKL);
  const steps = found.length > 1 ? `steps ${found[0].step} to ${found.at(-1).step}` : `step ${found[0].step}`;
  return make("li", {}, make("button", { type: "button", "data-text": i, tabindex: "-1" },
    make("span", { class: "preview" }, preview(found[0].prompt)),
    make("span", { class: "about" }, `${found[0].kind}, ${steps}, KL ${unique([kls[0], kls.at(-1)]).map((v) => digits(v, 2)).join(" → ")}`)));
}));

// Beside a completion stand those of the same prompt: at other steps, and of other runs.
const fillVersions = () => {
  const found = versionsOf.get(texts[chosen.text]), main = found[0];
  options($("text-step"), found.map((c) => [c.step, `step ${c.step}`]));
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
  const max = colour.includes("entropy") ? highestEntropy : highestKL;
  return Math.min(1, Math.sqrt(Math.max(completion[colour][index] ?? 0, 0) / max));
};
const isSpecial = (text) =>
  text === "" || /^<\|.*\|>$|^<\/?(s|bos|eos|pad|unk|mask|think|start_of_\w+|end_of_\w+)>$|^\[[A-Z]{3,}\]$/.test(text);
// In prose a space is a space and a line break breaks the line.
const proseOf = (text) => text.replaceAll("\n", "↵\n").replaceAll("\t", "⇥\t");

const tokenElement = (completion, side, index, cuts) => {
  const rule = $("text-rule").value, colour = $("text-colour").value, wanted = $("text-filter").value;
  const q = quadrantOf(completion.entropy[index], completion.reverse_kl[index], cuts);
  const kept = completion.keptSets[rule]?.has(index) ?? false, text = textOf(completion.token[index]);
  const isOff = wanted && (wanted === "kept" ? !kept : String(q) !== wanted);
  const names = ["token", kept ? "kept" : "", isSpecial(text) ? "chip" : "",
    isOff ? "off" : colour === "quadrant" ? `q${q}` : "scaled"];
  const element = make("span", {
    role: "button", class: names.filter(Boolean).join(" "), tabindex: "-1", "aria-pressed": "false",
    "aria-label": `${shown(text)}, position ${index}, ${q ? quadrantName(q) : "no quadrant"}, ` +
      `${kept ? "kept" : "not kept"} by ${rule}`,
    "data-side": side, "data-index": index,
  }, isSpecial(text) ? text || "∅" : proseOf(text));
  if (!isOff && colour !== "quadrant") element.style.setProperty("--level", levelOf(completion, index, colour, rule));
  return element;
};

// One bar a token, as high as the square root of its reverse KL.
const strip = (completion, side, cuts) => {
  const bars = completion.reverse_kl.map((kl, index) => {
    const height = 30 * Math.sqrt(Math.max(kl ?? 0, 0) / highestKL);
    const q = quadrantOf(completion.entropy[index], kl, cuts);
    return draw("rect", { class: `bar-q${q}`, "data-side": side, "data-index": index,
      x: index + 0.08, y: 31 - height, width: 0.84, height: height + 1 });
  });
  return draw("svg", { class: "strip", viewBox: `0 0 ${Math.max(24, bars.length)} 32`, preserveAspectRatio: "none", "aria-hidden": "true" }, bars);
};

const reading = (completion, side) => {
  const cuts = cutsOf(rowsOf(completion.step, completion.kind), $("text-cut").value);
  const title = kinds.length > 2 ? `${completion.kind}, step ${completion.step}` : `Step ${completion.step}`;
  const group = make("div", { class: "prose", role: "group", "aria-label": `completion at step ${completion.step}` },
    completion.token.map((_, index) => tokenElement(completion, side, index, cuts)));
  const hidden = completion.num_tokens - completion.token.length;
  const element = make("div", { class: "reading" },
    make("h3", {}, title, " ", make("span", { class: "about" }, `mean KL ${digits(meanKL(completion), 3)} nats`)),
    strip(completion, side, cuts), group,
    hidden > 0 ? make("p", { class: "caption" }, `${hidden} more tokens were not recorded.`) : "");
  decorations.forEach((add) => add(group, completion));
  return element;
};

const viewer = () => {
  const main = versionsOf.get(texts[chosen.text]).find((c) => c.step === Number($("text-step").value));
  const other = $("text-other").value === "" ? null : data.completions[Number($("text-other").value)];
  const sides = other && other !== main ? [main, other] : [main];
  $("prompt").textContent = main.prompt;
  $("readings").replaceChildren(...sides.map((c, side) => reading(c, side)));
  $("legend").hidden = $("text-colour").value !== "quadrant";
  $("scale-legend").hidden = $("text-colour").value === "quadrant";
  $("readings").completions = sides;
  for (const button of $("texts").querySelectorAll("button")) {
    const is = Number(button.dataset.text) === chosen.text;
    button.setAttribute("aria-pressed", String(is));
    button.tabIndex = is ? 0 : -1;
  }
  choose(0, Math.min(chosen.index, main.token.length - 1));
};
const chooseText = (text, step, index) => {
  chosen = { text, side: 0, index: 0 };
  fillVersions();
  if (step !== undefined) $("text-step").value = step;
  const main = versionsOf.get(texts[text]).find((c) => c.step === Number($("text-step").value));
  const kls = main.reverse_kl.map((v) => v ?? 0);
  chosen.index = Math.max(0, index ?? kls.indexOf(Math.max(...kls)));
  viewer();
};

const choose = (side, index) => {
  for (const element of $("readings").querySelectorAll("[data-index]")) {
    const is = Number(element.dataset.side) === side && Number(element.dataset.index) === index;
    element.classList.toggle("chosen", is);
    if (element.localName !== "span") continue;
    element.setAttribute("aria-pressed", String(is));
    element.tabIndex = is ? 0 : -1;
  }
  chosen.side = side;
  chosen.index = index;
  look(side, index);
};
// What a pointer is over is shown without being chosen.
const look = (side, index) => {
  const completion = $("readings").completions[side];
  $("detail").replaceChildren(...(index >= 0 && index < completion.token.length ? detail(completion, index) : []));
};
const focusToken = (side, index) =>
  $("readings").querySelector(`.token[data-side="${side}"][data-index="${index}"]`)?.focus();
const placeOf = (event) => {
  const element = event.target.closest("[data-index]");
  return element ? [Number(element.dataset.side), Number(element.dataset.index)] : null;
};

// Tokens of low entropy and high KL by falling reverse KL, the next at every press.
let jump = 0;
const jumpToNext = () => {
  const how = $("text-cut").value;
  const found = steps.flatMap((step) => kinds.flatMap((kind) => {
    const rows = rowsOf(step, kind), cuts = cutsOf(rows, how);
    return rows.filter((r) => quadrantOf(r.entropy, r.reverse_kl, cuts) === 3);
  })).sort((a, b) => b.reverse_kl - a.reverse_kl);
  if (!found.length) {
    $("jump-result").textContent = "No token has low entropy and high KL at these thresholds.";
    return;
  }
  const row = found[jump % found.length];
  $("jump-result").textContent = `${(jump % found.length) + 1} of ${found.length}`;
  jump += 1;
  goToToken(row);
};
const goToToken = (row) => {
  $("text-other").value = "";
  chooseText(texts.indexOf(keyOf(row.completion)), row.completion.step, row.index);
  focusToken(0, row.index);
};

control("viewer", viewer, {
  "text-cut": cutOptions,
  "text-colour": [["quadrant", "quadrant"], ...Object.entries(COLUMNS), ["rank", "rank under the rule"],
    ...($("view-gate") ? [["gate", "EOPD gate"]] : [])],
  "text-filter": [["", "all tokens"], ["kept", "kept tokens"], ...[3, 1, 2, 4].map((q) => [q, QUADRANTS[q]])],
});
$("jump").addEventListener("click", jumpToNext);
$("text-cut").addEventListener("input", () => { jump = 0; });
$("texts").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) chooseText(Number(button.dataset.text));
});
$("texts").addEventListener("keydown", (event) => {
  const move = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!move) return;
  event.preventDefault();
  chooseText((chosen.text + move + texts.length) % texts.length);
  $("texts").querySelector(`[data-text="${chosen.text}"]`).focus();
});
$("readings").addEventListener("pointerover", (event) => look(...(placeOf(event) ?? [chosen.side, chosen.index])));
$("readings").addEventListener("pointerleave", () => look(chosen.side, chosen.index));
$("readings").addEventListener("focusin", (event) => {
  if (event.target.matches(".token")) choose(...placeOf(event));
});
$("readings").addEventListener("click", (event) => { if (placeOf(event)) focusToken(...placeOf(event)); });
$("readings").addEventListener("keydown", (event) => {
  const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!move || !event.target.matches(".token")) return;
  event.preventDefault();
  focusToken(chosen.side, chosen.index + move);
});
lasting.chosen = {
  save: () => chosen,
  restore: (was) => {
    if (was.text >= texts.length) return;
    chosen = was;
    fillVersions();
  },
};
listTexts();
chooseText(0);

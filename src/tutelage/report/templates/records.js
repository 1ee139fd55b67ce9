// The recorded tokens: rows with entropy and reverse KL, quadrants, and what rules keep.
const data = JSON.parse($("tokens").textContent);
const QUADRANTS = {
  1: "high entropy, high KL", 2: "high entropy, low KL",
  3: "low entropy, high KL", 4: "low entropy, low KL",
};
const COLUMNS = {
  entropy: "student entropy", reverse_kl: "reverse KL", forward_kl: "forward KL",
  teacher_entropy: "teacher entropy",
};
const quadrantName = (q) => `${QUADRANTS[q]} (Q${q})`;
const gateOf = (x) => (x === 1 ? "open" : x === 0 ? "closed" : nats(x));
const shown = (text) => text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥") || "∅";
const textOf = (id) => data.texts[id] ?? `id ${id}`;
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
const stepOptions = steps.map((s) => [s, `step ${s}`]);
const kindOptions = kinds.map((kind) => [kind, `${kind} completions`]);
const cutOptions = [["fixed", `${data.cuts[0]} and ${data.cuts[1]} nats`], ["median", "medians of the step"]];
// Fills the controls of a view that stand on the page and draws the view whenever one is changed.
const control = (view, run, choices) => {
  views[view] = run;
  for (const [id, pairs] of Object.entries(choices)) options($(id), pairs);
  for (const element of document.querySelectorAll(`[data-for="${view}"]`)) element.addEventListener("input", run);
  const cut = document.querySelector(`#view-${view} select[id$="-cut"]`);
  if (cut) cut.value = data.is_median ? "median" : "fixed";
};

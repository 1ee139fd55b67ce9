// What each selection rule keeps of the same tokens at the same budget.
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
      parts.map((p) => [quadrantName(p.quadrant), percent(p.share),
        ...rules.map((rule) => shaded(keptShare(p.rows, rule)))])),
    table("Tokens kept most often: kept of all occurrences", ["rule", "tokens kept"],
      rules.map((rule) => [rule, make("td", { class: "most-kept" },
        mostKept(rows, rule).map((text) => make("span", {}, text)))])));
};
control("rules", rulesView, { "rules-kind": kindOptions, "rules-step": stepOptions, "rules-cut": cutOptions });

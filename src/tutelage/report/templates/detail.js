// One token: the next-token distributions of both sides, in words, as mirrored bars and as numbers.
const likely = (p) => (p === null ? "unknown" : p < 0.0001 ? "less than 0.01 %" : `${digits(100 * p, 3)} %`);
const choices = (h) => (h === null ? "unknown"
  : h < 0.02 ? `near zero (${h < 0.001 ? "below 0.001" : nats(h)} nats)`
    : `that of an even choice among ${digits(Math.exp(h), 2)} tokens (${nats(h)} nats)`);
const brief = (p) => (p >= 0.001 || p === 0 ? digits(p, 4) : p.toExponential(1));

// The likeliest tokens of both sides in one order; a side's share is known of its own list alone,
// and of the sampled token.
const candidatesOf = (completion, index) => {
  const found = new Map();
  const at = (id) => found.get(id) ?? found.set(id, { id }).get(id);
  for (const who of ["student", "teacher"]) {
    completion[`${who}_top`][index].forEach((id, i) => { at(id)[who] ??= completion[`${who}_share`][index][i]; });
  }
  const sampled = at(completion.token[index]);
  sampled.isSampled = true;
  for (const [who, column] of [["student", "log_p"], ["teacher", "log_q"]]) {
    const value = completion[column][index];
    if (sampled[who] === undefined && value !== null) sampled[who] = Math.exp(value);
  }
  return [...found.values()].sort((a, b) =>
    Math.max(b.student ?? 0, b.teacher ?? 0) - Math.max(a.student ?? 0, a.teacher ?? 0));
};
const mirrored = (completion, index) => {
  const least = (who) => Math.min(...completion[`${who}_share`][index].filter((v) => v !== null));
  const share = (candidate, who) => (candidate[who] === undefined ? `< ${brief(least(who))}` : brief(candidate[who]));
  const bar = (candidate, who) => {
    const element = make("span", { class: `bar ${who}` });
    element.style.setProperty("--share", candidate[who] ?? 0);
    return make("td", { class: "bars" }, element);
  };
  return make("table", { class: "mirrored" },
    make("caption", {}, "Next-token probabilities, the likeliest of both sides"),
    make("thead", {}, make("tr", {}, make("th", { scope: "col", colspan: "2", class: "num" }, "student"),
      make("th", { scope: "col", class: "middle" }, "token"), make("th", { scope: "col", colspan: "2" }, "teacher"))),
    make("tbody", {}, candidatesOf(completion, index).map((c) => make("tr", { "data-id": c.id, class: c.isSampled ? "sampled" : "" },
      make("td", { class: "num" }, share(c, "student")), bar(c, "student"),
      make("th", { scope: "row", class: "middle" }, shown(textOf(c.id)), c.isSampled ? make("span", {}, "sampled") : ""),
      bar(c, "teacher"), make("td", {}, share(c, "teacher"))))));
};

const detail = (completion, index) => {
  const cuts = cutsOf(rowsOf(completion.step, completion.kind), $("text-cut").value);
  const q = quadrantOf(completion.entropy[index], completion.reverse_kl[index], cuts);
  const exp = (v) => (v === null ? null : Math.exp(v));
  const facts = [
    ...Object.entries(COLUMNS).map(([name, label]) => [label, `${nats(completion[name][index])} nats`, name]),
    ["student log-prob", nats(completion.log_p[index]), "log_p"],
    ["teacher log-prob", nats(completion.log_q[index]), "log_q"],
    ...($("view-gate") ? [["EOPD gate", gateOf(completion.gate[index]), "gate"]] : []),
  ];
  return [
    make("h3", {}, `“${shown(textOf(completion.token[index]))}” `,
      make("span", { class: `about ${q ? `token q${q}` : ""}` }, q ? QUADRANTS[q] : "in no quadrant")),
    make("p", {}, `Probability of this token: student ${likely(exp(completion.log_p[index]))}, teacher ` +
      `${likely(exp(completion.log_q[index]))}. The student's entropy is ${choices(completion.entropy[index])}, the ` +
      `teacher's is ${choices(completion.teacher_entropy[index])}.`),
    mirrored(completion, index),
    make("dl", { class: "facts small" }, facts.map(([label, value, name]) =>
      make("div", {}, make("dt", {}, label), make("dd", { "data-name": name }, value)))),
    table(`Position ${index} at step ${completion.step}; rank among ${completion.num_tokens} tokens`, ["rule", "rank", "kept"],
      Object.keys(completion.rank).map((rule) => [rule, completion.rank[rule][index],
        completion.keptSets[rule].has(index) ? "yes" : "no"])),
  ];
};
// What puts more between the tokens of a completion.
const decorations = [];

// Student against teacher entropy of each token, and the EOPD gate over the steps.
const MAX_POINTS = 1500;
const gateView = () => {
  const step = Number($("gate-step").value), kind = $("gate-kind").value, rows = rowsOf(step, kind);
  const summary = steps.map((s) => [s, rowsOf(s, kind)]).filter(([, all]) => all.length).map(([s, all]) => {
    const open = all.filter((r) => r.gate >= 0.5), closed = all.filter((r) => r.gate < 0.5);
    return [`step ${s}`, percent(mean(all.map((r) => r.gate))), nats(mean(open.map((r) => r.forward_kl))),
      nats(mean(closed.map((r) => r.forward_kl))), nats(mean(open.map((r) => r.entropy))),
      nats(mean(open.map((r) => r.teacher_entropy)))];
  });
  const { x, y } = scales(highestEntropy, highestEntropy);
  const svg = frame(highestEntropy, highestEntropy, "teacher entropy H(q), nats", "student entropy H(p), nats",
    `Student against teacher entropy of ${rows.length} ${kind} tokens at step ${step}.`);
  // No counts stand along these axes.
  svg.setAttribute("viewBox", `0 ${TOP - 12} ${WIDTH - RIGHT + 16} ${HEIGHT - TOP + 12}`);
  svg.append(draw("path", { class: "cut", d: `M${x(0)},${y(0)}L${x(highestEntropy)},${y(highestEntropy)}` }));
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
control("gate", gateView, { "gate-kind": kindOptions, "gate-step": stepOptions });

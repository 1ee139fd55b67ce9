// Sets the turns of conversations apart in the token viewer, and puts what was inserted between
// them in its place.
const inserted = (turn) =>
  make("details", turn.is_open ? { class: "inserted", open: "" } : { class: "inserted" },
    make("summary", {}, turn.summary), make("pre", {}, turn.inserted));
decorations.push((group, completion) => {
  const place = (element, index) =>
    group.insertBefore(element, group.querySelector(`[data-index="${index}"]`));
  for (const turn of completion.turns ?? []) {
    if (turn.number) place(make("h4", { class: "turn" }, `Turn ${turn.number}`), turn.start);
    if (turn.inserted) place(inserted(turn), turn.stop);
  }
  if (completion.outcome) group.before(make("p", { class: "caption outcome" }, completion.outcome));
});

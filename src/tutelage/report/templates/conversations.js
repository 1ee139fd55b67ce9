// Sets the turns of conversations apart in the token viewer, and puts what was inserted between
// them in its place. Text of tools reaches the page as text nodes only.
(() => {
const readings = document.getElementById("readings");
const make = (tag, attributes, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
};
const inserted = (turn) =>
  make("details", turn.is_open ? { class: "inserted", open: "" } : { class: "inserted" },
    make("summary", {}, turn.summary), make("pre", {}, turn.inserted));
const showTurns = () => readings.querySelectorAll(".tokens").forEach((group, side) => {
  const completion = readings.completions[side];
  if (!completion.turns) return;
  // Tokens stay where they are, so that the chosen one keeps the focus.
  const place = (element, index) =>
    group.insertBefore(element, group.querySelector(`[data-index="${index}"]`));
  for (const turn of completion.turns) {
    if (turn.number) place(make("h4", { class: "turn" }, `Turn ${turn.number}`), turn.start);
    if (turn.inserted) place(inserted(turn), turn.stop);
  }
  if (completion.outcome) group.before(make("p", { class: "caption outcome" }, completion.outcome));
});
new MutationObserver(showTurns).observe(readings, { childList: true });
showTurns();
})();

// A page of a run that is followed: it loads itself again and keeps the reader's place.
const fields = () => [...document.querySelectorAll("select, input")];
const placeNow = () => ({
  tab: tabs.find((tab) => tab.getAttribute("aria-selected") === "true")?.id,
  fields: Object.fromEntries(fields().map((f) => [f.id, f.type === "checkbox" ? f.checked : f.value])),
  lasting: Object.fromEntries(Object.entries(lasting).map(([name, part]) => [name, part.save()])),
  details: [...document.querySelectorAll("details")].map((d) => d.open),
  focus: document.activeElement.id,
  top: scrollY,
});
const putBack = (place) => {
  for (const [name, part] of Object.entries(lasting)) {
    if (place.lasting[name]) part.restore(place.lasting[name]);
  }
  for (const field of fields()) {
    const value = place.fields[field.id];
    if (value === undefined) continue;
    if (field.type === "checkbox") field.checked = value;
    else if (field.localName === "input" || [...field.options].some((o) => o.value === value)) field.value = value;
    field.dispatchEvent(new Event("input"));
  }
  if ($(place.tab)) open($(place.tab));
  const found = [...document.querySelectorAll("details")];
  if (found.length === place.details.length) found.forEach((d, i) => { d.open = place.details[i]; });
  $(place.focus)?.focus({ preventScroll: true });
  scrollTo(0, place.top);
};
if (history.state?.fields) putBack(history.state);
let isPressed = false;
addEventListener("pointerdown", () => { isPressed = true; });
addEventListener("pointerup", () => { isPressed = false; });
setInterval(() => {
  if (isPressed || document.hidden) return;
  history.replaceState(placeNow(), "");
  location.reload();
}, 1000 * Number(document.querySelector('meta[name="reload"]').content));

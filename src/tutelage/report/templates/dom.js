// Small tools of the page. Whatever a model wrote reaches the page as a text node only: `make` and
// `draw` are the two places where elements are created.
const SVG = "http://www.w3.org/2000/svg";
const $ = (id) => document.getElementById(id);
const filled = (element, attributes, children) => {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  for (const child of children.flat()) {
    element.append(typeof child === "number" ? String(child) : child);
  }
  return element;
};
const make = (tag, attributes = {}, ...children) =>
  filled(document.createElement(tag), attributes, children);
const draw = (tag, attributes = {}, ...children) =>
  filled(document.createElementNS(SVG, tag), attributes, children);
const sum = (values) => values.reduce((a, b) => a + b, 0);
const mean = (values) => (values.length ? sum(values) / values.length : null);
const unique = (values) => [...new Set(values)];
const digits = (x, count) => (x === null || x === undefined ? "–" : Number(x.toPrecision(count)).toString());
const nats = (x) => digits(x, 4);
const percent = (x) => (x === null || x === undefined ? "–" : `${(100 * x).toFixed(1)} %`);
const options = (select, pairs) => {
  const before = select.value;
  select.replaceChildren(...pairs.map(([value, label]) => make("option", { value }, label)));
  if (pairs.some(([value]) => String(value) === before)) select.value = before;
};
// Cells repeat their column's name, which narrow screens show in its place.
const cellOf = (cell, i, head) => {
  if (i === 0) return make("th", { scope: "row" }, cell);
  const td = cell instanceof Element && cell.localName === "td" ? cell : make("td", { class: "num" }, cell);
  td.dataset.label = head;
  return td;
};
const table = (caption, head, rows) =>
  make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    make("table", { class: head.length > 3 ? "cards" : "" }, make("caption", {}, caption),
      make("thead", {}, make("tr", {}, head.map((cell, i) => (cell
        ? make("th", { scope: "col", class: i && cell !== "tokens kept" ? "num" : "" }, cell)
        : make("td"))))),
      make("tbody", {}, rows.map((row) =>
        make("tr", {}, row.map((cell, i) => cellOf(cell, i, head[i])))))));
// What of the page's state lasts over a reload: functions that save it and put it back.
const lasting = {};
// What draws each view, by the name of its tab.
const views = {};

// Tabs: one view at a time, drawn when it is opened.
const tabs = [...document.querySelectorAll('[role="tab"]')];
const open = (tab) => {
  for (const other of tabs) {
    const is = other === tab;
    other.setAttribute("aria-selected", String(is));
    other.tabIndex = is ? 0 : -1;
    $(other.getAttribute("aria-controls")).hidden = !is;
  }
  views[tab.dataset.view]?.();
};
tabs.forEach((tab, i) => {
  tab.addEventListener("click", () => open(tab));
  tab.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move) return;
    const next = tabs[(i + move + tabs.length) % tabs.length];
    next.focus();
    open(next);
  });
});
document.querySelector("main").classList.add("live");
if (tabs.length) open(tabs[0]);

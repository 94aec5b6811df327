// Addresses of the page. A route is a pattern of the address and a function of its groups, which returns what to show:
// { title, parts, previous, next }, the last two being addresses. Files add their routes to the table.
const routes = [];
const detail = byId("latents-detail"),
  found = byId("latents-found");
let asked = 0;

async function follow() {
  const number = ++asked,
    address = decoded(location.hash);
  for (const [pattern, open] of routes) {
    const match = pattern.exec(address);
    if (!match) continue;
    const shown = await open(...match.slice(1));
    if (number === asked) show(shown);
    return;
  }
  if (address === "" || address === "#latents") showList();
}

function decoded(address) {
  try {
    return decodeURIComponent(address);
  } catch {
    return address; // a lone %
  }
}

function show({ title, parts, previous, next }) {
  const heading = element("h3", { tabindex: "-1" }, title);
  const steps = [
    ["#latents", "List of latents"],
    [previous, "Previous"],
    [next, "Next"],
  ].filter(([address]) => address);
  const bar = element("nav", { "aria-label": "Steps" }, ...steps.map(([address, text]) => link(address, text)));
  detail.replaceChildren(heading, bar, ...parts);
  detail.dataset.previous = previous ?? "";
  detail.dataset.next = next ?? "";
  detail.hidden = false;
  found.hidden = true;
  heading.focus();
}

// The list again, with the focus where it was before.
function showList() {
  if (detail.hidden) return;
  detail.hidden = true;
  detail.replaceChildren();
  found.hidden = false;
  const before = [...found.querySelectorAll("a")].find((one) => opened && one.getAttribute("href") === opened);
  (before ?? byId("latents-search")).focus();
}

// Steps by the keyboard, unless it is needed by what has the focus.
function pressed(event) {
  const busy = event.target.closest?.("input, select, textarea, summary");
  if (detail.hidden || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  if (event.key === "Escape") location.hash = "#latents";
  if (busy || !(detail.contains(document.activeElement) || document.activeElement === document.body)) return;
  const address = { ArrowLeft: detail.dataset.previous, ArrowRight: detail.dataset.next }[event.key];
  if (!address) return;
  event.preventDefault();
  location.hash = address;
}

async function start() {
  window.addEventListener("hashchange", follow);
  document.addEventListener("keydown", pressed);
  await loadImages();
  await startList();
  await follow();
  document.documentElement.dataset.ready = "";
}

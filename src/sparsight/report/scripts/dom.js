// Elements and numbers.
const byId = (id) => document.getElementById(id);

function element(name, attributes, ...children) {
  return filled(document.createElement(name), attributes, children);
}

function svg(name, attributes, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function filled(made, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const link = (address, ...children) => element("a", { href: address }, ...children);
const number = (x, digits) => (Number.isFinite(x) ? x.toFixed(digits) : "");
const percent = (x, digits) => number(100 * x, digits);

// A share from -1 to 1.
const bar = (share) =>
  element("span", { class: share < 0 ? "bar less" : "bar", style: `width: ${4 * Math.abs(share)}rem` });

function table(columns, rows) {
  const head = columns.map(([name, kind]) => element("th", { scope: "col", ...(kind ? { class: kind } : {}) }, name));
  return element(
    "div",
    { class: "wide" },
    element("table", {}, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows)),
  );
}

// The latent browser: reads the JSON beside it, draws everything itself, asks the network for nothing.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("latents-data").textContent);
  const byId = (id) => document.getElementById(id);
  const [chosen, search, order, list, count, detail, more] =
    ["sae", "search", "order", "list", "count", "detail", "more"].map((name) => byId(`latents-${name}`));
  const PAGE = 50;
  let shown = PAGE;

  const className = (label) => data.classes[label] ?? "no label";
  const rare = (one) => Number(one.top.length < data.shown);
  const orders = {
    selectivity: (a, b) => rare(a) - rare(b) || b.selectivity - a.selectivity,
    monosemanticity: (a, b) => rare(a) - rare(b) || (b.monosemanticity ?? -2) - (a.monosemanticity ?? -2),
    frequency: (a, b) => b.frequency - a.frequency,
    rarity: (a, b) => a.frequency - b.frequency,
    number: (a, b) => a.latent - b.latent,
  };
  const number = (x, digits) => (x === null ? "" : x.toFixed(digits));
  const sae = () => data.saes[chosen.value];

  function element(name, attributes, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  function found() {
    const words = search.value.trim().toLowerCase();
    const ofClass = (one) => data.judged && className(one.class).toLowerCase().includes(words);
    const fits = (one) => !words || String(one.latent) === words || ofClass(one);
    return sae().latents.filter(fits).sort((a, b) => orders[order.value](a, b) || a.latent - b.latent);
  }

  function draw() {
    const latents = found();
    count.textContent = `${latents.length} of ${sae().latents.length} latents here; the SAE has ${sae().total}`;
    list.replaceChildren(...latents.slice(0, shown).map((one) => {
      const button = element("button", { type: "button" }, String(one.latent));
      button.addEventListener("click", () => open(one));
      const ofClass = data.judged ? [
        element("td", { class: "text" }, className(one.class)),
        element("td", {}, number(100 * one.precision, 0)), element("td", {}, number(one.selectivity, 2)),
      ] : [];
      return element("tr", {},
        element("th", { scope: "row" }, button), ...ofClass,
        element("td", {}, number(one.monosemanticity, 2)), element("td", {}, number(100 * one.frequency, 1)),
      );
    }));
    more.hidden = latents.length <= shown;
  }

  function histogram(counts) {
    const top = Math.max(...counts, 1), width = 100 / counts.length;
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", "0 0 100 40");
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", `Activations in ${counts.length} steps: ${counts.join(", ")}`);
    counts.forEach((n, i) => {
      const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect"), height = (40 * n) / top;
      const place = { x: i * width, y: 40 - height, width: 0.9 * width, height };
      for (const [key, value] of Object.entries(place)) bar.setAttribute(key, value);
      svg.append(bar);
    });
    return svg;
  }

  function picture(top) {
    const label = className(data.labels[top.image]), named = data.classes.length > 0;
    const alt = named ? `test image, ${label}` : "test image";
    const frame = element("span", { class: "frame" }, element("img", { src: data.images[top.image], alt }));
    if (top.heat) frame.append(heat(top.heat));
    const activation = number(top.activation, 2);
    return element("figure", {}, frame, element("figcaption", {}, named ? `${label}, ${activation}` : activation));
  }

  function heat(values) {
    const side = Math.round(Math.sqrt(values.length)), canvas = element("canvas", { width: side, height: side, "aria-hidden": "true" });
    const pixels = new ImageData(side, side);
    values.forEach((value, i) => pixels.data.set([230, 60, 0, 0.75 * value], 4 * i));
    canvas.getContext("2d").putImageData(pixels, 0, 0);
    return canvas;
  }

  function open(one) {
    const facts = [
      ...(data.judged ? [["most for", `${className(one.class)} (${number(100 * one.precision, 0)} % of the images it fires on)`]] : []),
      ["fires on", `${number(100 * one.frequency, 1)} % of activations`],
      ...(data.judged ? [["selectivity", number(one.selectivity, 2)]] : []),
      ["monosemanticity", number(one.monosemanticity, 3) || "not defined: it fires on no two images"],
      ["nearest latent", one.nearest === null ? "" : `${one.nearest}, cosine ${number(one.nearest_cosine, 2)}`],
    ];
    detail.replaceChildren(
      element("h3", { tabindex: "-1" }, `Latent ${one.latent} of ${chosen.value}`),
      element("dl", {}, ...facts.flatMap(([name, text]) => [element("dt", {}, name), element("dd", {}, text)])),
      element("div", { class: "latent" }, ...one.top.map(picture)),
      element("p", { class: "note" }, `Activations above zero, up to ${number(one.max, 2)}; each bin is twice as wide as the one before:`), histogram(one.histogram),
    );
    detail.hidden = false;
    detail.firstChild.focus();
    history.replaceState(null, "", `#latent=${chosen.value}/${one.latent}`);
  }

  function follow() {
    const [, name, latent] = /^#latent=(.+)\/(\d+)$/.exec(location.hash) ?? [];
    if (!data.saes[name]) return;
    chosen.value = name;
    draw();
    const one = sae().latents.find((other) => other.latent === Number(latent));
    if (one) open(one);
  }

  function again() {
    shown = PAGE;
    draw();
  }

  // of a chain's SAE the name has the site already
  const label = (name) => (name.endsWith(data.saes[name].site) ? name : `${name} (${data.saes[name].site})`);
  chosen.append(...Object.keys(data.saes).map((name) => element("option", { value: name }, label(name))));
  chosen.addEventListener("change", again);
  search.addEventListener("input", again);
  order.addEventListener("change", again);
  more.addEventListener("click", () => {
    shown += PAGE;
    draw();
  });
  window.addEventListener("hashchange", follow);
  draw();
  follow();
})();

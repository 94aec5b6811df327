// The map of an SAE's latents: each point is a link to its latent.
routes.push([/^#atlas=(.+)$/, async (name) => atlasPage(name)]);

const atlasAddress = (one) => `#atlas=${one.name}`;
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#8b4513", "#6a5acd", "#708090", "#a50026"];
const SIDE = 640, MARGIN = 8;

async function atlasPage(name) {
  const wanted = saeNamed(name);
  if (!wanted) return nothing(`No SAE ${name}`, `This run has ${data.saes.map((one) => one.name).join(", ")}.`);
  if (!wanted.parts.facts) return nothing(`Atlas of ${name}`, `It is not in this page: ${lacking}.`);
  if (chosen.value !== name || !latents.length) await choose(name);
  opened = "";
  const facts = await part(wanted, "facts"), firing = latents.filter((one) => !dead(one));
  // With many classes a colour stands for several; the text of a point names its own.
  const colour = (one) => (data.judged && one.label >= 0 ? COLOURS[one.label % COLOURS.length] : COLOURS[0]);
  const place = (one, axis) => MARGIN + ((SIDE - 2 * MARGIN) * facts.plane[2 * one.latent + axis]) / 65535;
  const radius = firing.length > 2000 ? 2 : 4;
  const points = firing.map((one) => svg("a", { href: addressOf(wanted, one.latent), "aria-label": described(one) },
    svg("circle", { cx: place(one, 0).toFixed(1), cy: (SIDE - place(one, 1)).toFixed(1), r: radius, fill: colour(one) },
      svg("title", {}, described(one)))));
  const kept = percent(wanted.kept, 0), all = latents.length - firing.length;
  return {
    title: `Atlas of ${name}`,
    parts: [
      element("p", { class: "note" }, `Directions of the decoder on their two principal components, which keep ${kept} % of their variance: ` +
        `points that lie apart point apart, points side by side need not point the same way. ${all} latents that never fire are left out.`),
      ...(data.judged && data.classes.length <= COLOURS.length ? [classLegend()] : []),
      svg("svg", { class: "atlas", viewBox: `0 0 ${SIDE} ${SIDE}`, role: "group", "aria-label": `Atlas of ${name}: ${firing.length} latents` }, ...points),
    ],
  };
}

function described(one) {
  const ofClass = data.judged && one.label >= 0 ? `most for ${className(one.label)}, ` : "";
  return `latent ${one.latent}${one.name ? ` (${one.name})` : ""}: ${ofClass}fires on ${percent(one.frequency, 1)} %`;
}

function classLegend() {
  const items = data.classes.map((name, i) => element("li", {}, element("span", { class: "dot", style: `background: ${COLOURS[i]}`, "aria-hidden": "true" }), name));
  return element("ul", { class: "classes" }, ...items);
}

// Sliders on the latents of an image: what they do to the heads of the last block, and to the predicted class.
const STRENGTHS = [0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30, 100];

// The policy is linear, so a latent of strength s adds s - 1 times its effect to the logit of each head.
function headLogits(logits, effects, strengths) {
  return logits.map((logit, h) => effects.reduce((sum, effect, i) => sum + (strengths[i] - 1) * effect[h], logit));
}

const maskOf = (logits) => logits.reduce((code, logit, h) => code + (logit > 0 ? 2 ** h : 0), 0);

// Null in a run without a policy.
async function steerPanel(image) {
  const policies = JSON.parse(byId("steer-data")?.textContent ?? "[]");
  if (!policies.length) return null;
  const choices = policies.flatMap((policy) => policy.saes.map((sae, i) => ({ policy, sae, i })));
  const label = ({ policy, sae }) => (policies.length > 1 ? `${policy.name}, ${sae}` : sae);
  const select = element("select", {}, ...choices.map((one, i) => element("option", { value: i }, label(one))));
  const body = element("div", {});
  const show = async () => body.replaceChildren(...await sliders(image, choices[select.value]));
  select.addEventListener("change", show);
  await show();
  return element("section", { class: "steer" }, element("h4", {}, "Steer the head policy"),
    element("p", { class: "note" }, "Each slider multiplies the activation of a latent in what the head policy reads at the last block. ",
      "That decides which heads are kept, and these decide the class; the block itself runs on the unedited stream. ",
      "Activations are those in the pruned model, so they can differ from the ones listed above."),
    element("label", {}, "SAE ", select), body);
}

async function sliders(image, { policy, sae, i }) {
  const arrays = await unpack(`steer-${policy.name}`, policy.directory), place = arrays.rows.indexOf(image);
  if (place < 0) return [element("p", { class: "note" }, `No sliders for this image: the page has room for those of ${arrays.rows.length} test images.`)];
  const of = (name, n) => Array.from(arrays[name].subarray(place * n, (place + 1) * n));
  const width = arrays[`latents${i}`].length / arrays.rows.length;
  const latents = of(`latents${i}`, width).filter((latent) => latent >= 0), codes = of(`codes${i}`, width);
  const at = new Map(Array.from(arrays[`used${i}`], (latent, j) => [latent, j * policy.heads]));
  const effects = latents.map((latent, j) =>
    Array.from(arrays[`push${i}`].subarray(at.get(latent), at.get(latent) + policy.heads), (push) => codes[j] * push));
  const logits = of("logits", policy.heads), predictions = arrays.predictions && of("predictions", 2 ** policy.heads);

  const strengths = latents.map(() => 1), says = element("output", { class: "steered" }), heads = element("div", {});
  const redraw = () => outcome(logits, headLogits(logits, effects, strengths), predictions, says, heads);
  const rows = latents.map((latent, j) => slider(`Latent ${latent}`, (strength) => {
    strengths[j] = strength;
    redraw();
  }));
  const every = slider("All of them", (strength) => {
    strengths.fill(strength);
    rows.forEach((row) => row.set(strength));
    redraw();
  });
  const line = (head, one) => element("tr", {}, element("th", { scope: "row" }, head), element("td", { class: "text" }, one.input), element("td", {}, one.value));
  redraw();
  const lines = rows.map((row, j) => line(link(addressOf({ name: sae }, latents[j]), String(latents[j])), row));
  return [says, heads, table([["latent"], ["strength", "text"], ["times"]], [line("all", every), ...lines])];
}

function slider(name, changed) {
  const input = element("input", { type: "range", min: 0, max: STRENGTHS.length - 1, step: 1, "aria-label": `${name}: strength` });
  const value = element("span", {});
  const set = (strength) => {
    input.value = STRENGTHS.indexOf(strength);
    input.setAttribute("aria-valuetext", `${strength} times`);
    value.textContent = strength;
  };
  input.addEventListener("input", () => {
    set(STRENGTHS[input.value]);
    changed(STRENGTHS[input.value]);
  });
  set(1);
  return { input, value, set };
}

// Shows the heads before and after, and the class that each mask predicts. The numbers stand in the sentence's data, too.
function outcome(before, after, predictions, says, heads) {
  const masks = [before, after].map(maskOf), classes = masks.map((mask) => predictions?.[mask]);
  [says.dataset.mask, says.dataset.predicted] = [masks[1], classes[1] ?? ""];
  const [was, is] = classes.map(className);
  const changed = was === is ? `The class stays ${is}.` : `The class becomes ${is} instead of ${was}.`;
  const text = predictions ? changed : "Predictions by mask are not tabulated for a model of this size.";
  says.textContent = `${after.filter((logit) => logit > 0).length} of ${after.length} heads are kept. ${text}`;
  const kept = (logit) => (logit > 0 ? "kept" : "off");
  const rows = after.map((logit, h) => element("tr", {}, element("th", { scope: "row" }, `h${h}`),
    element("td", {}, number(before[h], 2)), element("td", { class: "text" }, kept(before[h])),
    element("td", {}, number(logit, 2)), element("td", { class: "text" }, kept(logit))));
  heads.replaceChildren(table([["head"], ["logit"], ["unsteered", "text"], ["steered logit"], ["steered", "text"]], rows));
}

// An image's page.
routes.push([/^#image=(\d+)$/, async (digits) => imagePage(Number(digits))]);

async function imagePage(image) {
  const { total, count: n } = data.images;
  if (image >= total) return nothing(`No image ${image}`, `The test split has ${total} images, 0 to ${total - 1}.`);
  const place = places.get(image);
  if (place === undefined) {
    return nothing(
      `Image ${image}`,
      `It is not in this page, which has room for ${n} of ${total} test images (report.megabytes).`,
    );
  }
  const step = (i) => (i >= 0 && i < images.rows.length ? `#image=${images.rows[i]}` : undefined);
  const withPatches = data.saes.filter((one) => one.parts.patches);
  const first = withPatches.includes(sae()) ? sae() : withPatches[0];
  const own = sae().parts.strengths ? sae() : data.saes.find((one) => one.parts.strengths);
  const others = data.saes.filter((one) => one.parts.strengths && one !== own);
  const panel = typeof steerPanel === "function" ? await steerPanel(image) : null;
  return {
    title: `Image ${image} of the test split${labelOf(image) && `: ${labelOf(image)}`}`,
    previous: step(place - 1),
    next: step(place + 1),
    parts: [
      ...(data.images.predicted.length ? [predictionsOf(place)] : []),
      ...(first
        ? patchesOf(image, place, withPatches, first)
        : [element("div", { class: "frame large" }, picture(image))]),
      ...(own ? [element("h4", {}, `Latents of ${own.name}, strongest first`), await strengthsOf(own, place)] : []),
      ...(panel ? [panel] : []),
      ...others.map((one) => folded(one, place)),
    ],
  };
}

function predictionsOf(place) {
  const answers = data.images.predicted.map((model) => [
    `${model} predicts`,
    className(images[`predicted-${model}`][place]),
  ]);
  const rows = [["label", labelOf(images.rows[place])], ...answers];
  return element("dl", {}, ...rows.flatMap(([name, text]) => [element("dt", {}, name), element("dd", {}, text)]));
}

async function strengthsOf(of, place) {
  const all = await latentsOf(of),
    shown = pairs(await part(of, "strengths"), place, data.nStrengths);
  return latentTable(of, all, shown);
}

function latentTable(of, all, shown) {
  if (!shown.length) return element("p", { class: "note" }, "No latent fires.");
  const rows = shown.map(({ number: latent, share }) => {
    const one = all[latent];
    return element(
      "tr",
      {},
      element("th", { scope: "row" }, link(addressOf(of, latent), String(latent))),
      element("td", { class: "text" }, meaningOf(one)),
      element("td", {}, number(share * one.max, 2)),
      element("td", {}, percent(share, 0)),
      element("td", { class: "text" }, bar(share)),
    );
  });
  return table([["latent"], ["stands for", "text"], ["activation"], ["% of its largest"], ["share", "text"]], rows);
}

// Another SAE's latents, read when the part is unfolded.
function folded(of, place) {
  const box = element("details", {}, element("summary", {}, `Latents of ${of.name}`));
  box.addEventListener("toggle", async () => box.append(await strengthsOf(of, place)), { once: true });
  return box;
}

// The picture with a button for every patch; the chosen patch's latents are listed beside it.
function patchesOf(image, place, withPatches, first) {
  const select = element("select", {}, ...withPatches.map((one) => element("option", { value: one.name }, one.name)));
  const grid = element("fieldset", { class: "patches" }),
    output = element("div", { "aria-live": "polite" });
  select.value = first.name;
  const redraw = () => {
    const of = saeNamed(select.value);
    grid.style.setProperty("--side", of.side);
    grid.replaceChildren(
      element("legend", {}, "Patches"),
      ...Array.from({ length: of.side ** 2 }, (_, i) => patch(of, place, i, output)),
    );
    output.replaceChildren(
      element(
        "p",
        { class: "note" },
        "Choose a patch of the picture to list its latents, with the mouse or the arrow keys.",
      ),
    );
  };
  select.addEventListener("change", redraw);
  redraw();
  return [
    element(
      "div",
      { class: "beside" },
      element("div", { class: "frame large" }, picture(image), grid),
      element("div", {}, element("label", {}, "Patches of ", select), output),
    ),
  ];
}

function patch(of, place, i, output) {
  const at = `row ${1 + Math.floor(i / of.side)}, column ${1 + (i % of.side)}`;
  const button = element("input", { type: "radio", name: "patch", "aria-label": at });
  button.addEventListener("change", async () => {
    const shown = pairs(await part(of, "patches"), place * of.side ** 2 + i, data.perPatch);
    const text = `Latents of ${of.name} on the patch in ${at}, at most ${data.perPatch}:`;
    output.replaceChildren(element("p", {}, text), latentTable(of, await latentsOf(of), shown));
  });
  return button;
}

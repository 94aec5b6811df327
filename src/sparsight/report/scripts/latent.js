// A latent's page.
routes.push([/^#latent=(.+)\/(\d+)$/, async (name, digits) => latentPage(name, Number(digits))]);

const neverOnTrain = (one) => data.judged && one.label < 0;
const nothing = (title, text) => ({ title, parts: [element("p", {}, text)] });

async function latentPage(name, latent) {
  const wanted = saeNamed(name);
  if (!wanted) return nothing(`No SAE ${name}`, `This run has ${data.saes.map((one) => one.name).join(", ")}.`);
  if (latent >= wanted.total) {
    return nothing(`No latent ${latent} of ${name}`, `The SAE has ${wanted.total} latents, 0 to ${wanted.total - 1}.`);
  }
  if (!wanted.parts.facts) return nothing(`Latent ${latent} of ${name}`, `It is not in this page: ${lacking}.`);
  if (chosen.value !== name || !latents.length) await choose(name);
  const one = latents[latent],
    facts = await part(wanted, "facts");
  const inOrder = (matching().includes(one) ? matching() : latents).map((other) => other.latent);
  const at = inOrder.indexOf(latent),
    step = (i) => (i in inOrder ? addressOf(wanted, inOrder[i]) : undefined);
  opened = addressOf(wanted, latent);
  return {
    title: `Latent ${latent} of ${name}${one.name ? `: ${one.name}` : ""}`,
    previous: step(at - 1),
    next: step(at + 1),
    parts: [
      element(
        "div",
        { class: "beside" },
        factsOf(one),
        ...(dead(one) ? [] : [histogram(row(facts.histogram, latent, wanted.bins), one)]),
      ),
      dead(one)
        ? element(
            "p",
            {},
            `It never fires on the test split${neverOnTrain(one) ? ", nor on train" : ""}, so it has no images.`,
          )
        : await imagesOf(wanted, one, facts),
      element(
        "div",
        { class: "beside" },
        ...effectsOf(latent, facts),
        ...attributionOf(latent, facts),
        ...headsOf(wanted, latent, facts),
        ...(await neighboursOf(wanted, latent, facts)),
      ),
      noteField(`${name}/${latent}`),
    ],
  };
}

function factsOf(one) {
  const fires = `${percent(one.frequency, 1)} % of activations, ${one.fires} of ${data.images.total} test images`;
  const scores = `AUROC ${number(one.nameScore, 2)} on held-out images, shuffled names ${number(one.nameNull, 2)}`;
  const rows = [
    one.name && ["name", `${one.name}: ${scores}`],
    data.judged &&
      one.label >= 0 && [
        "most for",
        `${className(one.label)}${
          Number.isFinite(one.precision) ? `, ${percent(one.precision, 0)} % of the images it fires on` : ""
        }`,
      ],
    ["fires on", dead(one) ? "nothing" : fires],
    !dead(one) && ["activation", `mean ${number(one.mean, 2)} where it fires, largest ${number(one.max, 2)}`],
    data.judged && Number.isFinite(one.selectivity) && ["selectivity", number(one.selectivity, 2)],
    !dead(one) && ["monosemanticity", number(one.monosemanticity, 3) || "not defined: it fires on no two images"],
  ].filter(Boolean);
  return element("dl", {}, ...rows.flatMap(([name, text]) => [element("dt", {}, name), element("dd", {}, text)]));
}

async function imagesOf(wanted, one, facts) {
  const pictures = element("div", { class: "pictures" });
  const top = await part(wanted, "top"),
    samples = await part(wanted, "samples"),
    cells = wanted.side ** 2;
  const shown = (of, i, n) =>
    pairs(of, i, n).map(({ number: image, share, place }) =>
      thumbnail(image, {
        heat: of.heats && row(of.heats, place, cells),
        caption: number(share * one.max, 2),
      }),
    );
  if (top?.heats) pictures.append(legend(one, pictures));
  pictures.append(element("h4", {}, "Strongest"));
  if (top) pictures.append(element("div", { class: "latent" }, ...shown(top, one.latent, data.nTop)));
  else pictures.append(element("p", { class: "note" }, `The images are not in this page: ${lacking}.`));
  const counts = row(facts.intervals, one.latent, data.intervals),
    edge = (i) => Math.round(100 * (1 - i / data.intervals));
  if (samples) {
    const interval = (n, i) =>
      element(
        "div",
        {},
        element("h5", {}, `${edge(i + 1)} to ${edge(i)} %: ${n} image${n === 1 ? "" : "s"}`),
        element("div", { class: "latent" }, ...shown(samples, one.latent * data.intervals + i, data.nSamples)),
      );
    pictures.append(
      element("h4", {}, "Drawn at random from each fifth of its activation"),
      element("div", { class: "intervals" }, ...Array.from(counts, interval)),
    );
  } else if (top)
    pictures.append(element("p", { class: "note" }, `Images of weaker activation are not in this page: ${lacking}.`));
  return pictures;
}

function legend(one, pictures) {
  const box = element("input", { type: "checkbox" });
  box.checked = true;
  box.addEventListener("change", () => pictures.classList.toggle("bare", !box.checked));
  return element(
    "p",
    { class: "legend" },
    element("label", {}, box, " heat"),
    "0",
    element("span", { class: "scale", "aria-hidden": "true" }),
    number(one.max, 2),
    element("span", { class: "note" }, "activation on a patch, one scale for all images of this latent"),
  );
}

function histogram(counts, one) {
  const top = Math.max(...counts, 1),
    width = 100 / counts.length;
  const bars = Array.from(counts, (n, i) => {
    const height = (40 * n) / top;
    return svg("rect", { x: i * width, y: 40 - height, width: 0.9 * width, height });
  });
  const text = `Activations in ${counts.length} steps: ${counts.join(", ")}`;
  const drawn = svg(
    "svg",
    { viewBox: "0 0 100 40", preserveAspectRatio: "none", role: "img", "aria-label": text },
    ...bars,
  );
  const about = `Activations above 0, up to ${number(one.max, 2)}; each bin is twice as wide as the one before.`;
  return element("figure", {}, drawn, element("figcaption", {}, about));
}

// The direct path of the latent's decoder row, past all later blocks.
function effectsOf(latent, facts) {
  if (!facts.effects) return [];
  return onClasses(
    "Direct effect on class logits",
    "What one unit of activation adds to a class's logit, less the mean over classes, past all later blocks: by " +
      "the final norm, linearised at the mean of the test split, and the classifier. Largest and smallest effects.",
    row(facts.classes, latent, data.nEffects),
    row(facts.effects, latent, data.nEffects),
  );
}

// What the latent gives to the logit of the predicted class, through all later blocks.
function attributionOf(latent, facts) {
  if (!facts.attributions) return [];
  const classes = row(facts.attributed, latent, data.nAttributed).filter((label) => label >= 0);
  if (!classes.length) return [];
  return onClasses(
    "Attribution of the predicted class's logit",
    "What the latent adds to the logit of the class that the model predicts, less the mean over classes, through all " +
      "later blocks: gradient times activation, mean over the test images of that class.",
    classes,
    row(facts.attributions, latent, data.nAttributed).subarray(0, classes.length),
  );
}

// A table of classes with bars.
function onClasses(title, about, classes, effects) {
  const top = Math.max(...effects.map(Math.abs), 1e-12);
  const rows = Array.from(classes, (label, i) =>
    element(
      "tr",
      {},
      element("th", { scope: "row" }, className(label)),
      element("td", {}, number(effects[i], 3)),
      element("td", { class: "text" }, bar(effects[i] / top)),
    ),
  );
  return [
    element(
      "div",
      {},
      element("h4", {}, title),
      element("p", { class: "note" }, about),
      table([["class"], ["logit"], ["effect", "text"]], rows),
    ),
  ];
}

// What one unit of the latent adds to the logits by which a policy keeps or drops heads of the last block.
function headsOf(wanted, latent, facts) {
  return Object.entries(wanted.heads).flatMap(([policy, n]) => {
    const pushes = Array.from(row(facts[`heads-${policy}`], latent, n)),
      top = Math.max(...pushes.map(Math.abs), 1e-12);
    const rows = pushes.map((push, head) =>
      element(
        "tr",
        {},
        element("th", { scope: "row" }, String(head)),
        element("td", {}, number(push, 3)),
        element("td", { class: "text" }, bar(push / top)),
      ),
    );
    return [
      element(
        "div",
        {},
        element("h4", {}, `Effect on the heads of the last block, policy ${policy}`),
        element(
          "p",
          { class: "note" },
          "What one unit of activation adds to each head's logit (W_head W_dec). Above 0: towards keeping the head.",
        ),
        table([["head"], ["logit"], ["effect", "text"]], rows),
      ),
    ];
  });
}

async function neighboursOf(wanted, latent, facts) {
  const near = Array.from(row(facts.nearest, latent, data.nearest), (other, i) => [
    wanted,
    other,
    facts.cosines[latent * data.nearest + i],
  ]).filter(([, other]) => other >= 0);
  const matches = wanted.others.map((name, i) => [
    saeNamed(name),
    facts[`match-${i}`][latent],
    facts[`match-cosine-${i}`][latent],
  ]);
  const line = async ([of, other, cosine]) => {
    const meaning = meaningOf((await latentsOf(of))[other]);
    return element(
      "li",
      {},
      link(addressOf(of, other), of === wanted ? String(other) : `${other} of ${of.name}`),
      `${meaning && ` (${meaning})`}, cosine ${number(cosine, 2)}`,
    );
  };
  const section = async (title, found) =>
    element("div", {}, element("h4", {}, title), element("ul", {}, ...(await Promise.all(found.map(line)))));
  return [
    await section("Nearest latents, by the cosine of decoder rows", near),
    ...(matches.length ? [await section("Nearest latent of each other seed", matches)] : []),
  ];
}

// The list of an SAE's latents.
const [chosen, search, order, list, count, more] = ["sae", "search", "order", "list", "count", "more"].map((name) =>
  byId(`latents-${name}`),
);
const PAGE = 50;
let limit = PAGE;
let latents = []; // of the chosen SAE
let opened = ""; // address of the latent that was opened last

const dead = (one) => Number(one.frequency === 0);
const rare = (one) => Number(one.fires < data.nTop);
const falling = (a, b) => (Number.isFinite(b) ? b : -2) - (Number.isFinite(a) ? a : -2);
const orders = {
  selectivity: (a, b) => rare(a) - rare(b) || falling(a.selectivity, b.selectivity),
  monosemanticity: (a, b) => rare(a) - rare(b) || falling(a.monosemanticity, b.monosemanticity),
  name: (a, b) => falling(a.nameScore, b.nameScore),
  frequency: (a, b) => b.frequency - a.frequency,
  rarity: (a, b) => a.frequency - b.frequency,
};
const columns = [
  { title: "latent", cell: (one) => link(addressOf(sae(), one.latent), String(one.latent)) },
  { title: "name", kind: "text", cell: (one) => one.name ?? "", if: () => named() },
  { title: "name's AUROC", cell: (one) => number(one.nameScore, 2), if: () => named() },
  { title: "class", kind: "text", cell: (one) => (one.label < 0 ? "" : className(one.label)), if: () => data.judged },
  { title: "precision %", cell: (one) => percent(one.precision, 0), if: () => data.judged },
  { title: "selectivity", cell: (one) => number(one.selectivity, 2), if: () => data.judged },
  { title: "monosemanticity", cell: (one) => number(one.monosemanticity, 2) },
  { title: "fires %", cell: (one) => (dead(one) ? "never" : percent(one.frequency, 1)) },
];

const sae = () => saeNamed(chosen.value);
const named = () => latents.some((one) => one.name);

// The latents that the search finds, in the chosen order; those that never fire come last.
function matching() {
  const words = search.value.trim().toLowerCase();
  const texts = (one) => [one.name ?? "", data.judged && one.label >= 0 ? className(one.label) : ""];
  const fits = (one) =>
    !words || String(one.latent) === words || texts(one).some((text) => text.toLowerCase().includes(words));
  const compare = orders[order.value];
  const ranked = (a, b) => (compare && (dead(a) - dead(b) || compare(a, b))) || a.latent - b.latent;
  return latents.filter(fits).sort(ranked);
}

function draw() {
  const all = matching(),
    shown = columns.filter((column) => column.if?.() ?? true);
  const never = latents.filter(dead).length;
  count.textContent = latents.length
    ? `${all.length} of ${latents.length} latents; ${never} never fire on the test split`
    : `${sae().name} has ${sae().total} latents, none of which is in this page: ${lacking}`;
  byId("latents-head").replaceChildren(
    ...shown.map(({ title, kind }) => element("th", { scope: "col", ...(kind ? { class: kind } : {}) }, title)),
  );
  list.replaceChildren(
    ...all
      .slice(0, limit)
      .map((one) =>
        element(
          "tr",
          {},
          ...shown.map(({ kind, cell }, i) =>
            i ? element("td", kind ? { class: kind } : {}, cell(one)) : element("th", { scope: "row" }, cell(one)),
          ),
        ),
      ),
  );
  more.hidden = all.length <= limit;
}

const lacking = `its space, ${data.megabytes} MB (report.megabytes), went to other parts`;

// Make an SAE the chosen one.
async function choose(name) {
  const wanted = saeNamed(name);
  latents = await latentsOf(wanted);
  chosen.value = name;
  byId("latents-atlas").href = atlasAddress(wanted);
  for (const option of order.options) option.hidden = option.value === "name" && !named();
  draw();
}

// After a change of the controls: the list, whatever was open.
function close() {
  limit = PAGE;
  if (location.hash !== "#latents" && !detail.hidden) history.pushState(null, "", "#latents");
  detail.hidden = true;
  detail.replaceChildren();
  found.hidden = false;
}

function again() {
  close();
  draw();
}

async function startList() {
  // the name of a chain's SAE has the site already
  const label = (one) => (one.name.endsWith(one.site) ? one.name : `${one.name} (${one.site})`);
  const absent = (one) => (one.parts.facts ? "" : ", not in this page");
  chosen.append(...data.saes.map((one) => element("option", { value: one.name }, label(one) + absent(one))));
  chosen.addEventListener("change", () => {
    close(); // before what takes time, after which another page may be open
    choose(chosen.value);
  });
  search.addEventListener("input", again);
  order.addEventListener("change", again);
  more.addEventListener("click", () => {
    limit += PAGE;
    draw();
  });
  byId("latents-notes").addEventListener("click", exportNotes);
  await choose(data.main);
}

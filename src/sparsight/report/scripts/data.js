// The packed data beside the script, and what it means. A part is unpacked when it is first asked for.
const data = JSON.parse(byId("latents-data").textContent);
const unpacked = new Map();

const saeNamed = (name) => data.saes.find((sae) => sae.name === name);
const addressOf = (sae, latent) => `#latent=${sae.name}/${latent}`;
const className = (label) => data.classes[label] ?? "no label";

// What a latent stands for: its name, else its class.
const meaningOf = (one) => one?.name ?? (data.judged && one?.label >= 0 ? className(one.label) : "");

// Arrays by name, or null if the page lacks them.
const part = (sae, name) => (sae.parts[name] ? unpack(`${sae.name}:${name}`, sae.parts[name]) : null);

function unpack(id, directory) {
  if (!unpacked.has(id)) unpacked.set(id, arraysOf(byId(`pack-${id}`).textContent, directory));
  return unpacked.get(id);
}

async function arraysOf(text, directory) {
  const plain = atob(text),
    bytes = new Uint8Array(plain.length);
  for (let i = 0; i < plain.length; i++) bytes[i] = plain.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  const kinds = {
    Uint8: Uint8Array,
    Uint16: Uint16Array,
    Uint32: Uint32Array,
    Int32: Int32Array,
    Float32: Float32Array,
  };
  const arrays = Object.entries(directory).map(([name, [kind, start, n]]) => [name, new kinds[kind](buffer, start, n)]);
  return Object.fromEntries(arrays);
}

// Row i of an array as a table of rows of n.
const row = (array, i, n) => array.subarray(i * n, (i + 1) * n);

// Numbers of which the largest of their type means none, with their shares of a latent's largest activation.
function pairs({ latents, images, values }, i, n) {
  const numbers = row(latents ?? images, i, n),
    none = 2 ** (8 * numbers.BYTES_PER_ELEMENT) - 1;
  const top = 2 ** (8 * values.BYTES_PER_ELEMENT) - 1;
  return Array.from(numbers, (one, j) => ({ number: one, share: values[i * n + j] / top, place: i * n + j })).filter(
    (one) => one.number !== none,
  );
}

// The latents of an SAE, one object each.
const listed = new Map();
async function latentsOf(sae) {
  if (!listed.has(sae.name)) listed.set(sae.name, latentsFrom(sae, await part(sae, "facts")));
  return listed.get(sae.name);
}

function latentsFrom(sae, facts) {
  if (!facts) return [];
  const names = facts.names ? JSON.parse(new TextDecoder().decode(facts.names)) : [];
  return Array.from({ length: sae.total }, (_, latent) => ({
    latent,
    name: facts.name ? names[facts.name[latent]] : undefined,
    nameScore: facts.name_auroc?.[latent],
    nameNull: facts.name_null?.[latent],
    label: facts.best_class[latent],
    precision: facts.class_precision[latent],
    selectivity: facts.selectivity[latent],
    monosemanticity: facts.monosemanticity[latent],
    frequency: facts.frequency[latent],
    mean: facts.mean_activation[latent],
    max: facts.max_activation[latent],
    fires: row(facts.intervals, latent, data.intervals).reduce((sum, n) => sum + n, 0),
  }));
}

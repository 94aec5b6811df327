// Notes on latents, which stay in this browser. Some browsers keep nothing for files; then they last until it closes.
const prefix = `sparsight/${data.run}/`;
const kept = new Map();

const storage = (() => {
  try {
    localStorage.setItem(`${prefix}?`, "");
    localStorage.removeItem(`${prefix}?`);
    return localStorage;
  } catch {
    return null;
  }
})();

const noteOf = (name) => (storage ? storage.getItem(prefix + name) : kept.get(name)) ?? "";

function write(name, text) {
  if (!storage) kept.set(name, text);
  else if (text) storage.setItem(prefix + name, text);
  else storage.removeItem(prefix + name);
}

function allNotes() {
  const names = storage
    ? Object.keys(storage)
        .filter((key) => key.startsWith(prefix))
        .map((key) => key.slice(prefix.length))
    : [...kept.keys()];
  return Object.fromEntries(
    names
      .sort()
      .map((name) => [name, noteOf(name)])
      .filter(([, text]) => text),
  );
}

function noteField(name) {
  const field = element("textarea", { rows: "3" });
  field.value = noteOf(name);
  field.addEventListener("input", () => write(name, field.value));
  const where = storage ? "It stays in this browser" : "This browser forgets it when the page is closed";
  return element("label", { class: "field" }, `Note. ${where}; the list of latents exports all of them.`, field);
}

function exportNotes() {
  const text = JSON.stringify({ run: data.run, notes: allNotes() }, null, 2);
  const address = URL.createObjectURL(new Blob([`${text}\n`], { type: "application/json" }));
  element("a", { href: address, download: `${data.run}-notes.json` }).click();
  URL.revokeObjectURL(address);
}

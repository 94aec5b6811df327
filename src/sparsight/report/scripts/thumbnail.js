// Pictures of test images, drawn when they are seen, with the heat of a latent over them.
const ALPHA = 0.65; // of the largest heat: what lies under it stays visible
const sheets = new Map();
let images; // rows of the test split that the page has, and their labels
let places; // of a row among them

async function loadImages() {
  if (images) return;
  images = await unpack("images", data.images.directory);
  places = new Map(Array.from(images.rows, (one, i) => [one, i]));
}

function sheet(i) {
  if (!sheets.has(i)) {
    const picture = new Image();
    picture.src = byId(`pack-sheet-${i}`).textContent;
    sheets.set(
      i,
      picture.decode().then(() => picture),
    );
  }
  return sheets.get(i);
}

// What is displayed is drawn, however far below, so that a page prints whole; what is folded waits.
const seen = new IntersectionObserver(
  (entries) => {
    for (const entry of entries.filter((one) => one.isIntersecting)) {
      seen.unobserve(entry.target);
      drawn(entry.target);
    }
  },
  { rootMargin: "100000px" },
);

async function drawn(canvas) {
  const place = Number(canvas.dataset.place),
    {
      columns,
      perSheet,
      size: [height, width],
    } = data.images;
  const at = place % perSheet,
    x = width * (at % columns),
    y = height * Math.floor(at / columns);
  canvas
    .getContext("2d")
    .drawImage(await sheet(Math.floor(place / perSheet)), x, y, width, height, 0, 0, width, height);
}

const labelOf = (image) => (data.classes.length ? className(images.labels[places.get(image)]) : "");

function picture(image) {
  if (!places.has(image)) return element("span", { class: "absent" }, `image ${image} is not in this page`);
  const [height, width] = data.images.size,
    label = labelOf(image);
  const canvas = element("canvas", {
    width,
    height,
    role: "img",
    "aria-label": `test image ${image}${label && `, ${label}`}`,
    "data-place": places.get(image),
  });
  seen.observe(canvas);
  return canvas;
}

// A picture that leads to its image's page.
function thumbnail(image, { heat, caption } = {}) {
  const frame = element("a", { class: "frame", href: `#image=${image}` }, picture(image));
  if (heat) frame.append(heatOf(heat));
  const label = places.has(image) ? labelOf(image) : "";
  return element("figure", {}, frame, element("figcaption", {}, [label, caption].filter(Boolean).join(", ")));
}

// Opacity says how strongly the latent fires, from nothing to its largest activation on the test split.
function heatOf(shares) {
  const side = Math.round(Math.sqrt(shares.length));
  const canvas = element("canvas", { class: "heat", width: side, height: side, "aria-hidden": "true" });
  const pixels = new ImageData(side, side);
  shares.forEach((share, i) => pixels.data.set([230, 60, 0, Math.ceil(ALPHA * share)], 4 * i));
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas;
}

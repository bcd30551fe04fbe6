"""The JavaScript of a run's page: one chooses a patch, and its cosines with all others are drawn.

A patch is chosen with the pointer or the arrow keys. The cards have the attributes `data-grid`
"h,w", `data-chosen`, and `data-cosines` in base64: bytes 0 .. 255 for cosines -1 .. 1, the upper
triangle of the matrix [h w, h w], row by row. Without the script the page shows one patch of each
image.
"""

SCRIPT = """
const viridis = [
  [68, 1, 84], [72, 40, 120], [62, 74, 137], [49, 104, 142], [38, 130, 142],
  [31, 158, 137], [53, 183, 121], [110, 206, 88], [181, 222, 43], [253, 231, 37],
];
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const color = share => {
  const x = clamp(share, 0, 1) * (viridis.length - 1);
  const i = Math.min(Math.floor(x), viridis.length - 2);
  return viridis[i].map((from, c) => from + (x - i) * (viridis[i + 1][c] - from));
};
const steps = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]};

for (const card of document.querySelectorAll("[data-cosines]")) {
  const [h, w] = card.dataset.grid.split(",").map(Number);
  const bytes = Uint8Array.from(atob(card.dataset.cosines), letter => letter.charCodeAt(0));
  const at = (a, b) => a > b ? at(b, a) : a * h * w - a * (a + 1) / 2 + b;
  const cosine = (a, b) => bytes[at(a, b)] / 127.5 - 1;
  const [input, map] = card.querySelectorAll(".over");
  const readout = card.querySelector("output");
  const canvas = Object.assign(document.createElement("canvas"), {width: w, height: h});
  map.querySelector("img").after(canvas);
  let chosen = Number(card.dataset.chosen);

  const showCosine = other => {
    const row = Math.floor(other / w) + 1;
    const column = other % w + 1;
    const value = cosine(chosen, other).toFixed(2);
    readout.textContent = `row ${row}, column ${column}: cosine ${value}`;
  };
  const choose = patch => {
    chosen = patch;
    const pixels = new ImageData(w, h);
    for (let i = 0; i < h * w; i++) pixels.data.set([...color(cosine(chosen, i)), 255], 4 * i);
    canvas.getContext("2d").putImageData(pixels, 0, 0);
    for (const mark of card.querySelectorAll(".mark")) {
      mark.setAttribute("x", chosen % w);
      mark.setAttribute("y", Math.floor(chosen / w));
    }
    showCosine(chosen);
  };

  for (const picture of [input, map]) {
    const patchAt = event => {
      const box = picture.getBoundingClientRect();
      const row = Math.floor((event.clientY - box.top) / box.height * h);
      const column = Math.floor((event.clientX - box.left) / box.width * w);
      return clamp(row, 0, h - 1) * w + clamp(column, 0, w - 1);
    };
    picture.addEventListener("click", event => choose(patchAt(event)));
    picture.addEventListener("pointermove", event => {
      if (event.buttons) choose(patchAt(event));
      else showCosine(patchAt(event));
    });
  }

  const label = "choose a patch with the arrow keys";
  Object.assign(input, {tabIndex: 0, role: "application", ariaLabel: label});
  input.addEventListener("keydown", event => {
    const step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    const row = clamp(Math.floor(chosen / w) + step[0], 0, h - 1);
    choose(row * w + clamp(chosen % w + step[1], 0, w - 1));
  });
  choose(chosen);
}
"""

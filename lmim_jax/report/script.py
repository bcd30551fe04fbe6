"""The script of a run's page: a patch can be chosen, by pointer or arrow keys, and its cosines are drawn.

Cards carry `data-grid` "h,w", `data-chosen`, and `data-cosines` in base64: bytes 0 .. 255 for -1 .. 1, the upper
triangle of the matrix [h w, h w], row by row.
Without the script the page shows one patch of each image.
"""

SCRIPT = """
const stops = [[68,1,84],[72,40,120],[62,74,137],[49,104,142],[38,130,142],[31,158,137],[53,183,121],[110,206,88],
  [181,222,43],[253,231,37]];
const color = share => {
  const x = Math.min(Math.max(share, 0), 1) * (stops.length - 1), i = Math.min(Math.floor(x), stops.length - 2);
  return stops[i].map((from, c) => from + (x - i) * (stops[i + 1][c] - from));
};
for (const card of document.querySelectorAll("[data-cosines]")) {
  const [h, w] = card.dataset.grid.split(",").map(Number);
  const bytes = Uint8Array.from(atob(card.dataset.cosines), letter => letter.charCodeAt(0));
  const at = (a, b) => a > b ? at(b, a) : a * h * w - a * (a + 1) / 2 + b;
  const cosine = (a, b) => bytes[at(a, b)] / 127.5 - 1;
  const sides = card.querySelectorAll(".over"), told = card.querySelector("output");
  const canvas = Object.assign(document.createElement("canvas"), {width: w, height: h});
  sides[1].querySelector("img").after(canvas);
  let chosen = Number(card.dataset.chosen);
  const tell = other => {
    const [row, column] = [Math.floor(other / w) + 1, other % w + 1];
    told.textContent = `row ${row}, column ${column}: cosine ${cosine(chosen, other).toFixed(2)}`;
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
    tell(chosen);
  };
  for (const side of sides) {
    const patchAt = event => {
      const box = side.getBoundingClientRect();
      const place = (at, size, n) => Math.min(Math.max(Math.floor(at / size * n), 0), n - 1);
      return place(event.clientY - box.top, box.height, h) * w + place(event.clientX - box.left, box.width, w);
    };
    side.addEventListener("click", event => choose(patchAt(event)));
    side.addEventListener("pointermove", event => event.buttons ? choose(patchAt(event)) : tell(patchAt(event)));
  }
  Object.assign(sides[0], {tabIndex: 0, role: "application", ariaLabel: "choose a patch with the arrow keys"});
  sides[0].addEventListener("keydown", event => {
    const move = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]}[event.key];
    if (!move) return;
    event.preventDefault();
    const row = Math.min(Math.max(Math.floor(chosen / w) + move[0], 0), h - 1);
    choose(row * w + Math.min(Math.max(chosen % w + move[1], 0), w - 1));
  });
  choose(chosen);
}
"""

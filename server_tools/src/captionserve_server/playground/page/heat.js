// Where a word looked: all of the picture is dimmed but that.

import { wordsOf } from "./words.js";

// The part of the picture that the model has seen, [left, top, width, height] as shares of it.
function seen(resize, width, height) {
  if (resize === "center_crop") {
    const side = Math.min(width, height);
    return [(width - side) / 2 / width, (height - side) / 2 / height, side / width, side / height];
  }
  if (resize === "letterbox") {
    const side = Math.max(width, height);
    return [(width - side) / 2 / width, (height - side) / 2 / height, side / width, side / height];
  }
  return [0, 0, 1, 1];
}

export function clearHeat(canvas) {
  canvas.hidden = true;
}

export function drawHeat(canvas, caption, number, resize, image) {
  const word = wordsOf(caption)[number];
  const attention = caption.attention;
  if (!word || !attention) return clearHeat(canvas);
  const { rows, cols, values } = attention;
  const cells = rows * cols;
  const sums = Array.from({ length: cells }, (_, cell) =>
    word.tokens.reduce((sum, token) => sum + values[token * cells + cell], 0));
  const most = Math.max(...sums, 1e-9);
  const grid = new OffscreenCanvas(cols, rows);
  const pixels = new ImageData(cols, rows);
  sums.forEach((sum, cell) => { pixels.data[4 * cell + 3] = 255 * 0.82 * (1 - Math.sqrt(sum / most)); });
  grid.getContext("2d").putImageData(pixels, 0, 0);
  canvas.width = 512;
  canvas.height = Math.max(1, Math.round(512 * image.naturalHeight / image.naturalWidth));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  const [left, top, width, height] = seen(resize, image.naturalWidth, image.naturalHeight);
  context.fillStyle = "rgb(0 0 0 / 0.82)";
  context.fillRect(0, 0, canvas.width, canvas.height);
  const box = [left * canvas.width, top * canvas.height, width * canvas.width, height * canvas.height];
  context.clearRect(...box);
  context.drawImage(grid, ...box);
  canvas.hidden = false;
}

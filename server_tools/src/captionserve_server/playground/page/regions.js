// Parts of the picture: drawn with the mouse or a finger, or written as numbers.

import { h, replace, s } from "./dom.js";

const LEAST = 2;

export class Regions {
  // image: the shown picture; layer: an svg over it; list: where the numbers are.
  constructor(image, layer, list, changed) {
    Object.assign(this, { image, layer, list, changed, boxes: [], tiles: null, resize: null, marking: false, most: 16 });
    const canvas = layer.parentElement;
    canvas.addEventListener("pointerdown", (event) => this.begin(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    for (const kind of ["pointerup", "pointercancel"]) canvas.addEventListener(kind, () => this.end());
  }

  clear() {
    this.boxes = [];
    this.tiles = null;
    this.drawn = null;
    this.render();
  }

  framing() {
    return {
      ...(this.boxes.length ? { regions: this.boxes.map((box) => [...box]) } : {}),
      ...(this.tiles ? { tiles: [...this.tiles] } : {}),
      ...(this.resize ? { resize: this.resize } : {}),
    };
  }

  point(event) {
    const frame = this.image.getBoundingClientRect();
    const share = (at, from, size) => Math.min(1, Math.max(0, (at - from) / size));
    return [
      Math.round(share(event.clientX, frame.left, frame.width) * this.image.naturalWidth),
      Math.round(share(event.clientY, frame.top, frame.height) * this.image.naturalHeight),
    ];
  }

  begin(event) {
    if (!this.marking || this.boxes.length >= this.most || event.button) return;
    event.preventDefault();
    event.currentTarget.setPointerCapture(event.pointerId);
    this.from = this.point(event);
    this.drawn = [...this.from, ...this.from];
  }

  move(event) {
    if (!this.drawn) return;
    const [x, y] = this.point(event);
    const [left, top] = this.from;
    this.drawn = [Math.min(left, x), Math.min(top, y), Math.max(left, x), Math.max(top, y)];
    this.draw();
  }

  end() {
    const box = this.drawn;
    this.drawn = null;
    if (!box) return;
    if (box[2] - box[0] >= LEAST && box[3] - box[1] >= LEAST) this.boxes.push(box);
    this.render();
    this.changed();
  }

  add() {
    const { naturalWidth: width, naturalHeight: height } = this.image;
    this.boxes.push([Math.round(width / 4), Math.round(height / 4), Math.round(3 * width / 4), Math.round(3 * height / 4)]);
    this.render();
    this.changed();
    this.list.querySelector(`#region-${this.boxes.length - 1}-0`).focus();
  }

  remove(number) {
    this.boxes.splice(number, 1);
    this.render();
    this.changed();
    this.list.querySelector("#region-add").focus();
  }

  draw() {
    const { naturalWidth: width, naturalHeight: height } = this.image;
    if (!width) return;
    this.layer.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const size = Math.max(width, height) / 24;
    const lines = [];
    if (this.tiles) {
      const [rows, cols] = this.tiles;
      for (let row = 1; row < rows; row += 1) lines.push([0, height * row / rows, width, height * row / rows]);
      for (let col = 1; col < cols; col += 1) lines.push([width * col / cols, 0, width * col / cols, height]);
    }
    replace(this.layer,
      lines.map(([x1, y1, x2, y2]) => s("line", { x1, y1, x2, y2 })),
      [...this.boxes, ...(this.drawn ? [this.drawn] : [])].map(([left, top, right, bottom], number) => s("g", {},
        s("rect", { x: left, y: top, width: right - left, height: bottom - top }),
        s("text", { x: left + size / 3, y: top + size, "font-size": size }, String(number + 1)))));
  }

  render() {
    this.draw();
    const sides = ["left", "top", "right", "bottom"];
    const limits = [this.image.naturalWidth, this.image.naturalHeight];
    const number = (label, id, value, most, change, least = 0) => {
      const input = h("input", { type: "number", id, min: least, max: most, step: 1, value });
      input.addEventListener("change", () => {
        if (input.value === "" || !input.validity.valid) return;
        change(Number(input.value));
        this.draw();
        this.changed();
      });
      return h("label", { htmlFor: id }, h("span", {}, label), input);
    };
    const tile = (place, value) => {
      const tiles = [...(this.tiles ?? [1, 1])];
      tiles[place] = value;
      this.tiles = tiles[0] * tiles[1] > 1 ? tiles : null;
    };
    const resize = h("select", { id: "resize" },
      [["", "as the checkpoint does"], ["center_crop", "crop to the middle"], ["letterbox", "whole, with a border"]]
        .map(([value, text]) => h("option", { value, selected: value === (this.resize ?? "") }, text)));
    resize.addEventListener("change", () => { this.resize = resize.value || null; this.changed(); });
    replace(this.list,
      h("p", { className: "quiet" }, "Draw on the picture, or write pixels. Each region is captioned beside the whole."),
      h("ol", {}, this.boxes.map((box, at) => h("li", {},
        h("fieldset", {}, h("legend", {}, `Region ${at + 1}`),
          sides.map((side, place) => number(side, `region-${at}-${place}`, box[place], limits[place % 2], (value) => { box[place] = value; })),
          h("button", { type: "button", className: "link", "aria-label": `Remove region ${at + 1}`, onclick: () => this.remove(at) }, "Remove"))))),
      h("div", { className: "row" },
        h("button", { type: "button", id: "region-add", disabled: this.boxes.length >= this.most, onclick: () => this.add() }, "Add a region"),
        number("rows", "tile-rows", this.tiles?.[0] ?? 1, this.most, (value) => tile(0, value), 1),
        number("columns of tiles", "tile-cols", this.tiles?.[1] ?? 1, this.most, (value) => tile(1, value), 1),
        h("label", { htmlFor: "resize" }, h("span", {}, "resize"), resize)));
  }
}

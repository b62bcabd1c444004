// What was captioned since the page was opened, and its export.

import { h, replace } from "./dom.js";

export function visitList(list, entries, current, open) {
  replace(list, entries.map((entry) => h("li", {},
    h("button", {
      type: "button",
      className: `entry ${entry.state}`,
      "aria-current": entry === current ? "true" : null,
      "aria-label": `${entry.name}: ${said(entry)}`,
      title: said(entry),
      onclick: () => open(entry),
    }, h("img", { src: entry.thumbnail, alt: "", width: 56, height: 56 })))));
}

const said = (entry) => ({ waiting: "waiting", working: "working", done: entry.result?.captions[0].text, error: entry.error?.message, stopped: "stopped" })[entry.state];

const rowOf = (entry) => {
  const best = entry.result?.captions[0];
  return {
    image: entry.name, width: entry.width, height: entry.height,
    caption: best?.text ?? "", score: best?.score ?? "", confidence: best?.confidence ?? "",
    captions: entry.result?.captions.map((each) => each.text) ?? [],
    regions: entry.result?.regions?.map((each) => ({ box: each.box, caption: each.captions[0]?.text ?? "" })) ?? [],
    options: entry.asked?.options ?? {},
    model_version: entry.result?.model_version ?? "", seconds: entry.seconds ?? "",
    error_reason: entry.error?.reason ?? "", error_message: entry.error?.message ?? "",
  };
};

const ended = (entries) => entries.filter((entry) => entry.state === "done" || entry.state === "error").map(rowOf);

export const asJsonLines = (entries) => ended(entries).map((row) => `${JSON.stringify(row)}\n`).join("");

export function asCsv(entries) {
  const cell = (value) => {
    const text = typeof value === "object" ? JSON.stringify(value) : String(value);
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const rows = ended(entries);
  if (!rows.length) return "";
  return [Object.keys(rows[0]), ...rows.map(Object.values)].map((row) => `${row.map(cell).join(",")}\r\n`).join("");
}

export function save(text, name, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  h("a", { href: url, download: name }).click();
  URL.revokeObjectURL(url);
}

export async function thumbnailOf(image) {
  const side = 112;
  const canvas = h("canvas", { width: side, height: side });
  const from = Math.min(image.naturalWidth, image.naturalHeight);
  canvas.getContext("2d").drawImage(image,
    (image.naturalWidth - from) / 2, (image.naturalHeight - from) / 2, from, from, 0, 0, side, side);
  return URL.createObjectURL(await new Promise((resolve) => { canvas.toBlob(resolve); }));
}

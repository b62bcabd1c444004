// A caption as words, each of which says how sure it is and where it looked.

import { figure, h, panel, percent, probability } from "./dom.js";

// Words with their tokens: a token that begins with a space begins a word.
export function wordsOf(caption) {
  const words = [];
  caption.token_texts.forEach((text, token) => {
    if (!text) {
      // A part of a character, or a token without text; it belongs to the word that is open.
      if (words.length && text === "" && token < caption.token_texts.length - 1) words.at(-1).tokens.push(token);
      return;
    }
    if (!words.length || /^\s/.test(text)) words.push({ text: "", tokens: [] });
    const word = words.at(-1);
    word.text += text;
    word.tokens.push(token);
  });
  for (const word of words) {
    word.text = word.text.trim();
    word.probability = probability(word.tokens.reduce((sum, token) => sum + caption.token_logprobs[token], 0));
  }
  // What the service itself says of words, where it does.
  for (const said of caption.words ?? []) {
    const word = words.find((each) => each.tokens.includes(said.first_token));
    if (word) Object.assign(word, { confidence: said.confidence, grounding: said.grounding });
  }
  return words.filter((word) => word.text);
}

// The text before the first generated word: the prefix.
function prefixOf(caption) {
  const generated = caption.token_texts.join("").trim();
  return caption.text.endsWith(generated) ? caption.text.slice(0, caption.text.length - generated.length).trim() : "";
}

export function captionElement(caption, chosen, choose) {
  const words = wordsOf(caption);
  const prefix = prefixOf(caption);
  return [
    prefix ? h("span", { className: "prefix" }, prefix, " ") : null,
    words.map((word, number) => [
      number ? " " : null,
      h("button", {
        type: "button",
        className: "word",
        "aria-pressed": String(number === chosen),
        "aria-label": `${word.text}, ${percent(word.probability)}`,
        css: { "--doubt": String(1 - word.probability) },
        onclick: () => choose(number),
      }, word.text),
    ]),
  ].flat(2).filter(Boolean);
}

// What there is to know of one word.
export function wordPanel(caption, number, path) {
  const word = wordsOf(caption)[number];
  if (!word) return null;
  const figures = [
    ["Probability", percent(word.probability)],
    word.confidence === undefined ? null : ["Confidence", percent(word.confidence)],
    word.grounding === undefined || word.grounding === null ? null : ["Grounding", `${figure(word.grounding, 2)} nats`],
  ].filter(Boolean);
  return panel("word", `“${word.text}”`, caption.attention ? "where it looked is bright in the picture" : "",
    h("dl", { className: "facts" }, figures.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))),
    path ? word.tokens.map((token) => likeliest(caption, token, path)) : null);
}

function likeliest(caption, token, path) {
  const chosen = caption.token_ids[token];
  const found = path.likeliest[token] ?? [];
  const rows = found.map((each) => [each.token_text, probability(each.token_logprob), each.token_id === chosen]);
  if (!rows.some((row) => row[2])) rows.push([caption.token_texts[token], probability(caption.token_logprobs[token]), true]);
  return h("ol", { className: "bars", "aria-label": `Likeliest for ${caption.token_texts[token].trim() || "this token"}` },
    rows.map(([text, value, isChosen]) => h("li", { className: isChosen ? "chosen" : "" },
      h("span", { className: "token" }, text.trim() || "(end)"),
      h("span", { className: "bar", css: { "--share": String(value) } }),
      h("span", { className: "figure" }, percent(value), isChosen ? h("span", { className: "unseen" }, ", chosen") : null))));
}

export function captionsPanel(captions, chosen, choose) {
  return panel("captions", "Captions", captions.length > 1 ? `${captions.length}, best first` : "",
    h("ol", { className: "captions" }, captions.map((caption, number) => h("li", {},
      h("button", { type: "button", className: "choice", "aria-pressed": String(number === chosen), onclick: () => choose(number) },
        h("span", { className: "said" }, caption.text || "(nothing)"),
        h("span", { className: "quiet figures" },
          `score ${figure(caption.score)} · confidence ${percent(caption.confidence)}`,
          caption.grounding === null || caption.grounding === undefined ? "" : ` · grounding ${figure(caption.grounding, 2)}`,
          caption.finish_reason === "eos" ? "" : ` · ended by ${caption.finish_reason}`,
          caption.degenerate ? " · looks broken" : "",
          caption.needs_review ? ` · look at it: ${caption.review_reasons.join(", ").replaceAll("_", " ")}` : ""))))));
}

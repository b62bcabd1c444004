// A draft of an alternative text, with its budget and its warnings.

import { Failed, post } from "./api.js";
import { copyButton, h, panel, replace } from "./dom.js";

export function altTextPanel(entry, caption, view) {
  const draft = h("p", { className: "draft", id: "alt-draft" });
  const notes = h("ul", { className: "notes", "aria-live": "polite" });
  const used = h("output", { id: "alt-used", htmlFor: "alt-budget", className: "quiet" });
  const budget = h("input", { type: "number", id: "alt-budget", min: 1, max: 1000, step: 1, value: view.budget });
  const nearby = h("input", { type: "text", id: "alt-nearby", value: view.nearby, maxLength: 2000 });
  let latest = 0;
  async function ask() {
    const asked = latest += 1;
    if (!budget.validity.valid || budget.value === "") return;
    view.budget = Number(budget.value);
    view.nearby = nearby.value;
    try {
      const found = await post("/api/alt-text", {
        caption: { text: caption.text, confidence: caption.confidence, degenerate: caption.degenerate },
        max_chars: view.budget, nearby_text: view.nearby || null, file_name: entry.name,
      });
      if (asked !== latest) return;
      draft.textContent = found.text;
      used.textContent = `${[...found.text].length} of ${view.budget} characters`;
      replace(notes,
        found.warnings.map((warning) => h("li", {}, `Look at it: ${warning.replaceAll("_", " ")}.`)),
        found.removed.map((phrase) => h("li", {}, `Left out: “${phrase}”.`)),
        found.truncated ? h("li", {}, "Cut to fit.") : null);
    } catch (error) {
      if (!(error instanceof Failed)) throw error;
      draft.textContent = error.message;
    }
  }
  budget.addEventListener("input", ask);
  nearby.addEventListener("input", ask);
  ask();
  return panel("alt", "Alt text", "a draft; a person decides",
    draft, notes,
    h("div", { className: "row" },
      h("label", { htmlFor: "alt-budget" }, h("span", {}, "at most"), budget), used, copyButton(() => draft.textContent)),
    h("label", { htmlFor: "alt-nearby", className: "wide" }, h("span", {}, "text beside the picture"), nearby));
}

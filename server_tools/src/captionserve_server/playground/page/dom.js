// Making elements and showing numbers. No text ever becomes markup.

const SVG = "http://www.w3.org/2000/svg";

function filled(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "css") for (const [key, each] of Object.entries(value)) element.style.setProperty(key, each);
    else if (name in element && !(element instanceof SVGElement) && name !== "list" && !name.includes("-")) element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export const h = (tag, properties = {}, ...children) => filled(document.createElement(tag), properties, children);
export const s = (tag, properties = {}, ...children) => filled(document.createElementNS(SVG, tag), properties, children);
export const byId = (id) => document.getElementById(id);

export function replace(element, ...children) {
  element.replaceChildren(...children.flat(Infinity).filter(Boolean));
}

export function percent(probability) {
  const value = 100 * probability;
  if (value > 99.95) return "100 %";
  if (value < 0.1) return "< 0.1 %";
  return `${value.toFixed(value < 10 || value > 99 ? 1 : 0)} %`;
}

export const figure = (value, digits = 3) => value.toFixed(digits).replace(/^-(0\.?0*)$/, "$1").replace("-", "\u2212");

export const probability = (logprob) => Math.exp(logprob);

export function milliseconds(value) {
  return value >= 1000 ? `${(value / 1000).toFixed(2)} s` : `${value.toFixed(value < 10 ? 1 : 0)} ms`;
}

// A part of the answer under a heading of its own.
export function panel(id, title, note, ...children) {
  return h("section", { className: "panel", id, "aria-labelledby": `${id}-title` },
    h("div", { className: "row spread" }, h("h2", { id: `${id}-title` }, title), note ? h("span", { className: "quiet" }, note) : null),
    children);
}

export function table(caption, headings, rows) {
  return h("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": caption },
    h("table", {},
      h("caption", { className: "unseen" }, caption),
      h("thead", {}, h("tr", {}, headings.map((each) => h("th", { scope: "col" }, each)))),
      h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell) => h("td", {}, cell)))))));
}

export function copyButton(text, label = "Copy") {
  const button = h("button", { type: "button", className: "link" }, label);
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text());
      button.textContent = "Copied";
    } catch {
      // Without a secure context there is no clipboard; the text itself can be marked.
      button.textContent = "Mark and copy it by hand";
    }
    setTimeout(() => { button.textContent = label; }, 1600);
  });
  return button;
}
